"""Train one model on text with needles: ``python -m benchmarks.evaluation.train runs/swa+fwpkm-0 --model swa+fwpkm``.

Each row of a batch is text with needles that are asked for later. The loss is the cross-entropy of all bytes, plus that
of the digits that are asked for, plus the gates' mean at a price. What a step trains on depends on seed, step, rank
and number of the part alone, so that a run goes on from its checkpoint as if it had never stopped. Under ``torchrun``
ranks train together.

FOLDER gets ``checkpoint.pt`` at intervals and when the run is told to end, and ``loss.png`` at the end.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import math
import os
import random
import resource
import secrets
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.evaluation import plots
from benchmarks.evaluation.models import MODELS, SIZES, Size, size_options
from benchmarks.evaluation.options import Options, build, changed, default_options, options_of, shrunk, size_of
from benchmarks.evaluation.records import stamp
from benchmarks.evaluation.text import Corpus, python_text, read_files, training_batch
from fwpkm_kernels._commands import CommandError, command, make_folder, need, reading, write_output
from fwpkm_kernels.layers import advance_memory, parameter_groups

CHECKPOINT, PLOT = "checkpoint.pt", "loss.png"


def draw_batch(o: Options, corpus: Corpus, step: int, rank: int, part: int = 0) -> tuple[Tensor, Tensor]:
    """The data of a part of a rank's step: bytes [batch, length + 1], and which of them are asked for."""
    phase, rng = o.phase(step), random.Random(f"{o.seed} {step} {rank} {part}")
    needles = max(2, min(o.most_needles, o.needles * phase.length // 1024))
    distance = min(o.distance, phase.length // 2)
    return training_batch(corpus, phase.batch, phase.length, needles, o.questions, distance, rng)


def loss_of(model: Any, o: Options, x: Tensor, is_answer: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of a batch, a scalar with its graph, and its figures for the log, [4], without a graph.

    The figures are the bits a byte, the loss and the accuracy of digits that are asked for, and the mean gate.

    Args:
        x: bytes, int64 [batch, length + 1].
        is_answer: which of them are digits that are asked for, bool [batch, length + 1].
    """
    targets, is_answer = x[:, 1:], is_answer[:, 1:]
    dtype = getattr(torch, o.dtype)
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        output = model(x[:, :-1], output_gate_means=True)
    logits = output.logits.float()
    losses = F.cross_entropy(logits.mT, targets, reduction="none")
    asked = is_answer.sum().clamp(min=1)
    answer_loss = torch.where(is_answer, losses, 0.0).sum() / asked
    gate = torch.stack(output.gate_means).mean() if output.gate_means else losses.new_zeros(())
    right = ((logits.argmax(-1) == targets) & is_answer).sum() / asked
    loss = losses.mean() + o.answer_weight * answer_loss + o.gate_price * gate
    figures = torch.stack((losses.mean() / math.log(2), answer_loss, right, gate)).detach()
    return loss, figures


class Trainer:
    """A model, its optimizer, and the step that they have reached."""

    def __init__(self, options: Options, corpus: Corpus, device: str = "cpu", *, size: Size | None = None) -> None:
        size = size or size_of(options)
        self.options, self.size, self.corpus, self.device = options, size, corpus, torch.device(device)
        is_parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank, self.ranks = (
            (torch.distributed.get_rank(), torch.distributed.get_world_size()) if is_parallel else (0, 1)
        )
        torch.manual_seed(options.seed)
        self.model = build(options, size).to(self.device)
        groups = parameter_groups(self.model, lr=options.lr, weight_decay=options.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
        self.called: Any = self.model
        if is_parallel:
            self.called = torch.nn.parallel.DistributedDataParallel(self.model, broadcast_buffers=False)
        self.step = 0
        self.seconds = self.cpu_seconds = 0.0  #: of training, on the clock and of the processors
        self.log: list[dict[str, float]] = []  #: a line for each step
        self.origin: dict[str, Any] = {}  #: see `origin`

    @property
    def is_done(self) -> bool:
        return self.step == self.options.steps

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        if self.ranks == 1:
            return number
        torch.distributed.all_reduce(x := torch.tensor(number, device=self.device), torch.distributed.ReduceOp.MAX)
        return int(x)

    def batch(self, part: int) -> tuple[Tensor, Tensor]:
        """The data of a part of this step: bytes [batch, length + 1], and which of them are asked for."""
        x, is_answer = draw_batch(self.options, self.corpus, self.step, self.rank, part)
        return x.to(self.device), is_answer.to(self.device)

    def train_step(self) -> dict[str, float]:
        """One step of the optimizer; its line of the log.

        Raises:
            FloatingPointError: the gradient is not finite; no parameter has been changed then.
        """
        o, started, cpu_started = self.options, time.perf_counter(), time.process_time()
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = o.lr * o.rate(self.step) * (o.table_lr if group["name"] == "tables" else 1.0)
        sums = torch.zeros(4, device=self.device)
        for part in range(o.accumulate):
            x, is_answer = self.batch(part)
            is_last = part == o.accumulate - 1
            with contextlib.nullcontext() if is_last or self.ranks == 1 else self.called.no_sync():
                loss, figures = self.loss(x, is_answer)
                (loss / o.accumulate).backward()
            advance_memory(self.model)
            sums += figures / o.accumulate
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), o.clip)
        if not norm.isfinite():  # a loss that is not finite, on any rank, shows here too
            bits = sums[0].item()
            raise FloatingPointError(
                f"the gradient of step {self.step + 1} has norm {norm.item()}, at {bits} bits a byte"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ranks > 1:
            torch.distributed.all_reduce(sums)
            sums /= self.ranks
        phase = o.phase(self.step)
        tokens = phase.length * phase.batch * o.accumulate * self.ranks
        names = ("bits", "answer_loss", "digits_right", "gate", "norm")
        line = dict(zip(names, (round(x, 5) for x in (*sums.tolist(), norm.item())), strict=True))
        self.step += 1
        line |= {"step": self.step, "length": phase.length, "tokens": tokens}
        seconds = time.perf_counter() - started
        line["seconds"] = round(seconds, 4)
        self.seconds += seconds
        self.cpu_seconds += time.process_time() - cpu_started
        self.log.append(line)
        return line

    def loss(self, x: Tensor, is_answer: Tensor) -> tuple[Tensor, Tensor]:
        """That of `loss_of`."""
        return loss_of(self.called, self.options, x, is_answer)

    def state_dict(self) -> dict[str, Any]:
        return {
            "options": json.loads(json.dumps(dataclasses.asdict(self.options))),  # plain lists, which torch.load takes
            "size_options": size_options(self.size),
            "origin": self.origin,
            "corpus": self.corpus.fingerprint,
            "ranks": self.ranks,
            "step": self.step,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "log": self.log,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where another run was.

        Raises:
            ValueError: it had other options, another size, another text or another number of ranks.
        """
        ours = dataclasses.asdict(self.options) | {"text": self.corpus.fingerprint, "ranks": self.ranks}
        theirs = dataclasses.asdict(options_of(state["options"])) | {"text": state["corpus"], "ranks": state["ranks"]}
        sizes = size_options(self.size), state.get("size_options") or size_options(self.size)
        for named, size in zip((ours, theirs), sizes, strict=True):
            named |= {f"size.{name}": x for name, x in size.items()}
        if other := [f"{name} {theirs[name]} and not {ours[name]}" for name in ours if ours[name] != theirs[name]]:
            raise ValueError(f"`state` must be of the same run, got {'; '.join(other)}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.log, self.origin = state["step"], list(state["log"]), state.get("origin", {})
        self.seconds, self.cpu_seconds = state["seconds"], state["cpu_seconds"]

    def save(self, folder: Path) -> None:
        """Write the checkpoint, or leave the one before if the run is killed meanwhile; one rank does it for all."""
        if self.rank > 0:
            return
        torch.save(self.state_dict(), data := io.BytesIO())
        write_output(folder / CHECKPOINT, data.getbuffer())


def origin(device: torch.device) -> dict[str, Any]:
    """The origin of a training, which it keeps when it goes on from a checkpoint: a random id, and where it began."""
    return {"id": secrets.token_hex(8), **stamp(device=str(device))}


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """The checkpoint of a folder, on the CPU."""
    with reading(folder / CHECKPOINT):
        return torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True)


def load_model(folder: Path, device: str = "cpu") -> tuple[Any, Options, dict[str, Any]]:
    """A trained model, its options, and the rest of its checkpoint."""
    state = load_checkpoint(folder)
    del state["optimizer"]
    options, given = options_of(state["options"]), state.get("size_options")
    model = build(options, Size(**given) if given else None)
    model.load_state_dict(state.pop("model"))
    return model.to(device).eval(), options, state


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's tensors, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def told_to_end() -> Iterator[list[int]]:
    """Put the first SIGINT or SIGTERM into the list that this gives, so that a run can save before it ends.

    After that both have their former handlers again, so that a second signal ends the process at once.
    """
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        received.append(number)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        restore()


def train(trainer: Trainer, folder: Path | None, save_every: float) -> int:
    """Train to the end, with a progress bar, and save in a folder. Returns the signal that ended it before, or 0."""
    tqdm = need("tqdm", "evaluation")
    options, saved = trainer.options, time.monotonic()
    total = options.bytes * trainer.ranks
    done = int(sum(line["tokens"] for line in trainer.log))
    bar = tqdm.tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=options.model, disable=trainer.rank > 0)
    end = 0
    if trainer.step == 0:
        trainer.origin = origin(trainer.device)
    with bar, told_to_end() as received:
        while not (trainer.is_done or end):
            line = trainer.train_step()
            bar.update(line["tokens"])
            memory = peak_memory(trainer.device) / 2**30
            bar.set_postfix_str(f"{line['bits']:.2f} bits, digits {line['digits_right']:.2f}, {memory:.1f} GiB")
            end = trainer.largest(received[0] if received else 0)
            if folder is not None and time.monotonic() - saved > save_every:
                trainer.save(folder)
                saved = time.monotonic()
        if folder is not None:
            trainer.save(folder)
    return end


def check_device(name: str) -> None:
    """CommandError unless the device of that name can be used."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch that was built without CUDA
        raise CommandError(f"cannot use the device {name}: {str(error).splitlines()[0]}") from None


@contextlib.contextmanager
def on_device(name: str) -> Iterator[str]:
    """The device of this process; under torchrun, which sets up the ranks, a GPU of its own.

    No DistributedDataParallel may be left when it ends. As the last holder of the ranks' process group it would wait
    for gloo's threads without releasing the interpreter's lock, for which one of them may wait: neither goes on then.
    """
    is_parallel = torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()
    has_own = is_parallel and name.startswith("cuda")
    if has_own:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    check_device(name)
    if has_own:
        torch.cuda.set_device(name)
    if not is_parallel:
        yield name
        return
    torch.distributed.init_process_group("nccl" if name.startswith("cuda") else "gloo")
    try:
        yield name
    finally:
        torch.distributed.destroy_process_group()


@command("train")
def main(argv: Sequence[str] | None = None) -> int:
    """Train, or go on; ``argv`` replaces the command line. Returns the exit status."""
    parser = argparse.ArgumentParser("python -m benchmarks.evaluation.train", description="Train a model on needles.")
    parser.add_argument("folder", type=Path, help=f"for {CHECKPOINT}, from which a run goes on, and {PLOT}")
    parser.add_argument("--model", default="swa+fwpkm", help=f"one of {', '.join(MODELS)} (%(default)s)")
    parser.add_argument("--size", "--config", choices=SIZES, default="miniature", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="other options")
    parser.add_argument("--text", nargs="+", type=Path, metavar="FILE", help="instead of Python's documentation")
    parser.add_argument("--device", default="cpu", help="(%(default)s)")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--save-every", type=float, default=300.0, metavar="SECONDS", help="(%(default)s)")
    parser.add_argument(
        "--dry-run", type=int, metavar="STEPS", help="with small tables and short rows; nothing is saved"
    )
    parser.add_argument("--fresh", action="store_true", help=f"begin anew where there is a {CHECKPOINT}")
    arguments = parser.parse_args(argv)
    check_counts(threads=arguments.threads, dry_run=arguments.dry_run)
    folder = arguments.folder
    if os.environ.get("RANK", "0") == "0":  # ranks that try the same new file together would fail
        make_folder(folder, CHECKPOINT, PLOT)
    for module in ("tqdm", "matplotlib.figure"):
        need(module, "evaluation")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with on_device(arguments.device) as device:
        end = train_there(arguments, device)
    return 128 + end if end else 0


def train_there(arguments: argparse.Namespace, device: str) -> int:
    """What the command line asks for, on a device. Returns the signal that ended it, or 0."""
    folder = arguments.folder
    try:
        options = changed(default_options(arguments.model, arguments.size, arguments.seed), arguments.set)
        size = size_of(options)
        if arguments.dry_run:
            options, size = shrunk(options, arguments.dry_run)
        corpus = corpus_of(arguments.text)
        corpus.check_length(1 + max(phase.length for phase in options.plan))
        trainer = Trainer(options, corpus, device, size=size)
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from error
    if (folder / CHECKPOINT).exists() and not (arguments.fresh or arguments.dry_run):
        resume(trainer, folder)
    try:
        end = train(trainer, None if arguments.dry_run else folder, arguments.save_every)
    except FloatingPointError as error:
        raise CommandError(str(error)) from error
    if trainer.rank == 0:
        if not arguments.dry_run:
            title = f"{options.model}, {options.size}, seed {options.seed}"
            plots.plot_losses({title: trainer.log}, folder / PLOT)
        print(summary(trainer))
    return end


def check_counts(**given: int | None) -> None:
    """CommandError unless these options of a program, where they are given, are at least 1."""
    for name, count in given.items():
        if count is not None and count < 1:
            raise CommandError(f"--{name.replace('_', '-')} must be at least 1, got {count}")


def resume(trainer: Trainer, folder: Path) -> None:
    """Go on from the checkpoint of a folder."""
    try:
        trainer.load_state_dict(load_checkpoint(folder))
    except ValueError as error:
        raise CommandError(f"{folder / CHECKPOINT}: {error}; --fresh begins anew") from error


def corpus_of(files: Sequence[Path] | None) -> Corpus:
    """The user's text, or Python's."""
    if files is None:
        return python_text()
    with reading(" ".join(map(str, files))):
        return read_files(files)


def summary(trainer: Trainer) -> str:
    """A line: how far the training is, the figures of its last step, and what it has cost."""
    last, tokens = trainer.log[-1], sum(line["tokens"] for line in trainer.log)
    return (
        f"{trainer.step} of {trainer.options.steps} steps, {tokens / 1e6:.2f} MB: {last['bits']:.3f} bits a byte, "
        f"digits right {last['digits_right']:.3f}, gate {last['gate']:.3f}; {trainer.seconds:.0f} s, "
        f"{trainer.cpu_seconds:.0f} s of CPU, {tokens / trainer.seconds:.0f} bytes a second, "
        f"{peak_memory(trainer.device) / 2**30:.2f} GiB"
    )


if __name__ == "__main__":
    sys.exit(main())
