"""Train one model on text with needles: ``python -m benchmarks.evaluation.train runs/swa+fwpkm-0 --model swa+fwpkm``.

Each row of a batch is text with needles that are asked for later. The loss is the cross-entropy of all bytes, plus that
of the digits that are asked for, plus the gates' mean at a price. What a step trains on follows from seed, step, rank
and number of the part alone, so that a run goes on from its checkpoint as if it had never stopped. Under ``torchrun``
ranks train together.
"""

import argparse
import ast
import contextlib
import dataclasses
import io
import json
import math
import random
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.evaluation.models import MODELS, SIZES, Size, make_config, make_model
from benchmarks.evaluation.text import NEEDLE_LENGTH, Corpus, python_text, training_batch
from fwpkm_kernels._commands import command, make_folder, need, reading, write_output
from fwpkm_kernels.layers import advance_memory, parameter_groups

CHECKPOINT = "checkpoint.pt"


class Phase(NamedTuple):
    """Steps with rows of one length."""

    length: int
    batch: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Options:
    """What a trained model depends on, besides the text."""

    model: str = "swa+fwpkm"
    size: str = "miniature"
    seed: int = 0
    #: phases, one after the other
    plan: tuple[Phase, ...] = (Phase(512, 2, 160), Phase(4096, 1, 90))
    #: parts of a batch, one after the other in each step
    accumulate: int = 1
    lr: float = 3e-3
    final_lr: float = 0.1  #: of `lr`, where the cosine ends
    warmup: int = 30  #: steps
    weight_decay: float = 0.1
    clip: float = 1.0  #: the gradient's norm
    answer_weight: float = 1.0  #: of the loss of digits that are asked for
    gate_price: float = 0.1
    needles: int = 6  #: for each 1024 bytes of a row, up to `most_needles`
    most_needles: int = 8
    questions: int = 2  #: for each needle
    distance: int = 256 + NEEDLE_LENGTH  #: bytes at least from a needle to a question
    dtype: str = "float32"  #: of autocast
    #: options of the fast-weight memories, other than the size's
    memory: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.plan)

    @property
    def bytes(self) -> int:
        return sum(phase.length * phase.batch * phase.steps for phase in self.plan)

    def phase(self, step: int) -> Phase:
        for phase in self.plan:
            if step < phase.steps:
                return phase
            step -= phase.steps
        raise IndexError(step)

    def rate(self, step: int) -> float:
        """The learning rate of a step, over `lr`: a line up, then a cosine."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return min(1.0, (step + 1) / self.warmup) * (self.final_lr + (1 - self.final_lr) * cosine)


def options_of(given: dict[str, Any]) -> Options:
    """Options from the dict that `dataclasses.asdict`, or JSON, makes of them."""
    return Options(**{**given, "plan": tuple(Phase(*phase) for phase in given["plan"])})


class Trainer:
    """A model, its optimizer, and how far they are."""

    def __init__(self, options: Options, corpus: Corpus, device: str = "cpu", *, size: Size | None = None) -> None:
        self.options, self.corpus, self.device = options, corpus, torch.device(device)
        is_parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank, self.ranks = (
            (torch.distributed.get_rank(), torch.distributed.get_world_size()) if is_parallel else (0, 1)
        )
        torch.manual_seed(options.seed)
        size = size or SIZES[options.size]
        self.model = make_model(make_config(options.model, size, options.memory, options.gate_price), size)
        self.model.to(self.device)
        groups = parameter_groups(self.model, lr=options.lr, weight_decay=options.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
        self.called: Any = self.model
        if is_parallel:
            self.called = torch.nn.parallel.DistributedDataParallel(self.model, broadcast_buffers=False)
        self.step = 0
        self.log: list[dict[str, float]] = []  #: a line for each step

    @property
    def is_done(self) -> bool:
        return self.step == self.options.steps

    def batch(self, part: int) -> tuple[Tensor, Tensor]:
        """What a part of this step trains on: bytes [batch, length + 1], and which of them are asked for."""
        o, phase = self.options, self.options.phase(self.step)
        rng = random.Random(f"{o.seed} {self.step} {self.rank} {part}")
        needles = max(2, min(o.most_needles, o.needles * phase.length // 1024))
        distance = min(o.distance, phase.length // 2)
        x, is_answer = training_batch(self.corpus, phase.batch, phase.length, needles, o.questions, distance, rng)
        return x.to(self.device), is_answer.to(self.device)

    def train_step(self) -> dict[str, float]:
        """One step of the optimizer; its line of the log."""
        o, started = self.options, time.perf_counter()
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = o.lr * o.rate(self.step)
        sums = torch.zeros(4, device=self.device)
        for part in range(o.accumulate):
            x, is_answer = self.batch(part)
            is_last = part == o.accumulate - 1
            with contextlib.nullcontext() if is_last or self.ranks == 1 else self.called.no_sync():
                loss, figures = self.loss(x, is_answer)
                (loss / o.accumulate).backward()
            sums += figures / o.accumulate
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), o.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        advance_memory(self.model)
        if self.ranks > 1:
            torch.distributed.all_reduce(sums)
            sums /= self.ranks
        phase = o.phase(self.step)
        tokens = phase.length * phase.batch * o.accumulate * self.ranks
        names = ("bits", "answer_loss", "digits_right", "gate", "norm")
        line = dict(zip(names, (round(x, 5) for x in (*sums.tolist(), norm.item())), strict=True))
        self.step += 1
        line |= {"step": self.step, "length": phase.length, "tokens": tokens}
        line["seconds"] = round(time.perf_counter() - started, 4)
        self.log.append(line)
        return line

    def loss(self, x: Tensor, is_answer: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a batch; and its bits a byte, loss and accuracy of digits that are asked for, and mean gate."""
        o, targets, is_answer = self.options, x[:, 1:], is_answer[:, 1:]
        dtype = getattr(torch, o.dtype)
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            output = self.called(x[:, :-1], output_gate_means=True)
        logits = output.logits.float()
        losses = F.cross_entropy(logits.mT, targets, reduction="none")
        asked = is_answer.sum().clamp(min=1)
        answer_loss = torch.where(is_answer, losses, 0.0).sum() / asked
        gate = torch.stack(output.gate_means).mean() if output.gate_means else losses.new_zeros(())
        right = ((logits.argmax(-1) == targets) & is_answer).sum() / asked
        loss = losses.mean() + o.answer_weight * answer_loss + o.gate_price * gate
        figures = torch.stack((losses.mean() / math.log(2), answer_loss, right, gate)).detach()
        return loss, figures

    def state_dict(self) -> dict[str, Any]:
        return {
            "options": json.loads(json.dumps(dataclasses.asdict(self.options))),  # plain lists, which torch.load takes
            "corpus": self.corpus.fingerprint,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "log": self.log,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if options_of(state["options"]) != self.options or state["corpus"] != self.corpus.fingerprint:
            raise ValueError("`state` must be of a run with the same options and text")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.log = state["step"], list(state["log"])

    def save(self, folder: Path) -> None:
        """Write the checkpoint whole, so that a run that is killed has the one before."""
        torch.save(self.state_dict(), data := io.BytesIO())
        write_output(folder / CHECKPOINT, data.getvalue())


def load_checkpoint(folder: Path, device: str = "cpu") -> dict[str, Any]:
    with reading(folder / CHECKPOINT):
        return torch.load(folder / CHECKPOINT, map_location=device, weights_only=True)


def load_model(folder: Path, device: str = "cpu") -> tuple[Any, Options, dict[str, Any]]:
    """A trained model, its options, and its checkpoint."""
    state = load_checkpoint(folder, device)
    options = options_of(state["options"])
    size = SIZES[options.size]
    model = make_model(make_config(options.model, size, options.memory, options.gate_price), size)
    model.load_state_dict(state["model"])
    return model.to(device).eval(), options, state
