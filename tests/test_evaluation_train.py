"""The training program of the evaluation: exact resume, determinism, options, ranks, sizes."""

import dataclasses
import gc
import importlib
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import weakref
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", "5.24")

from benchmarks.evaluation import budget, mqar, needles, records, train, under_test
from benchmarks.evaluation.models import MODELS, SIZES, count_parameters, make_config, make_model, size_options
from benchmarks.evaluation.options import Options, Phase, changed, default_options
from benchmarks.evaluation.text import Corpus, python_text
from benchmarks.evaluation.train import Trainer, load_checkpoint, load_model
from fwpkm_kernels._commands import CommandError
from fwpkm_kernels.layers import advance_memory
from tests.helpers.evaluation_models import TINY

_DRAWN = random.Random(0)
TEXT = " ".join("".join(_DRAWN.choices("abcdef", k=_DRAWN.randrange(1, 8))) for _ in range(2000)).encode()
CORPUS = Corpus(TEXT, {"held out": TEXT[::-1]})
OPTIONS = Options(
    "swa+fwpkm+pkm", plan=(Phase(96, 2, 2), Phase(128, 1, 2)), accumulate=2, warmup=2, distance=64, seed=3
)


def trained(options: Options, steps: int, corpus: Corpus = CORPUS) -> Trainer:
    trainer = Trainer(options, corpus, size=TINY)
    for _ in range(steps):
        trainer.train_step()
    return trainer


@pytest.fixture(scope="module")
def whole() -> Trainer:
    """A run from its beginning to its end."""
    return trained(OPTIONS, 4)


def numbers_of(trainer: Trainer) -> dict[str, object]:
    """All that a run has come to, but for how long it took."""
    state = trainer.state_dict()
    moments = state["optimizer"]["state"]
    tensors = {f"{index} {name}": x for index, of_one in moments.items() for name, x in of_one.items()}
    log = [{name: x for name, x in line.items() if name != "seconds"} for line in state["log"]]
    return state["model"] | tensors | {"step": state["step"], "log": log}


def assert_same_bits(one: Trainer, two: Trainer) -> None:
    ours, theirs = numbers_of(one), numbers_of(two)
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        assert torch.equal(x, theirs[name]) if isinstance(x, torch.Tensor) else x == theirs[name], name


def test_a_run_goes_on_exactly(whole, tmp_path):
    """From what a file holds; memories and the optimizer's moments go on too."""
    first = trained(OPTIONS, 2)
    first.save(tmp_path)
    second = Trainer(OPTIONS, CORPUS, size=TINY)
    second.load_state_dict(load_checkpoint(tmp_path))
    assert_same_bits(first, second)
    for _ in range(2):
        second.train_step()
    assert second.is_done
    assert_same_bits(whole, second)
    assert second.seconds > first.seconds > 0
    assert second.cpu_seconds > first.cpu_seconds > 0
    assert second.seconds == pytest.approx(sum(line["seconds"] for line in second.log), abs=1e-3)


def test_a_seed_gives_the_same_run(whole):
    assert_same_bits(whole, trained(OPTIONS, 4))
    other = trained(dataclasses.replace(OPTIONS, seed=4), 1)
    assert other.log[0]["bits"] != whole.log[0]["bits"]


def test_steps_follow_the_plan(whole):
    assert [(line["length"], line["tokens"]) for line in whole.log] == [(96, 384)] * 2 + [(128, 256)] * 2
    assert sum(line["tokens"] for line in whole.log) == OPTIONS.bytes
    with pytest.raises(IndexError):
        OPTIONS.phase(4)


def test_parts_of_a_batch_are_one_batch():
    """Gradients of two parts are the mean of theirs. There is no memory, which parts would not share."""
    options = Options("swa", plan=(Phase(96, 1, 1),), accumulate=2, warmup=0, distance=48, clip=math.inf, lr=0.0)
    trainer = Trainer(options, CORPUS, size=TINY)
    expected = [torch.zeros_like(x) for x in trainer.model.parameters()]
    bits = []
    for part in range(2):
        loss, figures = trainer.loss(*trainer.batch(part))
        bits.append(figures[0].item())
        for total, gradient in zip(expected, torch.autograd.grad(loss, trainer.model.parameters()), strict=True):
            total += gradient / 2
    assert bits[0] != bits[1]
    line = trainer.train_step()
    assert line["bits"] == pytest.approx(sum(bits) / 2, abs=1e-4)
    assert line["norm"] == pytest.approx(torch.cat([x.flatten() for x in expected]).norm().item(), rel=1e-4)


def test_a_memory_has_what_every_part_writes():
    options = Options(plan=(Phase(96, 1, 1),), accumulate=3, warmup=0, distance=48, lr=0.0)
    trainer, other = (Trainer(options, CORPUS, size=TINY) for _ in range(2))
    other.model.train()
    for part in range(3):
        other.loss(*other.batch(part))
        advance_memory(other.model)
    trainer.train_step()
    expected = other.model.state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in trainer.model.state_dict().items())


@pytest.mark.parametrize(
    "theirs, error",
    [
        ({"options": {"lr": 1.0}}, r"lr 1\.0 and not 0\.003"),
        ({"options": {"memory": {"top_k": 3}}}, "memory .*'top_k': 3.* and not {}"),
        ({"corpus": "0"}, f"text 0 and not {CORPUS.fingerprint}"),
        ({"ranks": 2}, "ranks 2 and not 1"),
        ({"size_options": {"window": 7, "heads": 3}}, r"size\.heads 3 and not 4; size\.window 7 and not 8"),
    ],
)
def test_another_run_is_refused(whole, theirs, error):
    state = whole.state_dict()
    state |= {name: state[name] | x if isinstance(x, dict) else x for name, x in theirs.items()}
    trainer = Trainer(OPTIONS, CORPUS, size=TINY)
    with pytest.raises(ValueError, match=f"^`state` must be of the same run, got {error}$"):
        trainer.load_state_dict(state)
    assert trainer.step == 0


def test_a_checkpoint_of_before_sizes_were_kept_goes_on(whole, tmp_path, monkeypatch):
    state = whole.state_dict()
    del state["size_options"], state["origin"]
    trainer = Trainer(OPTIONS, CORPUS, size=TINY)
    trainer.load_state_dict(state)
    assert_same_bits(whole, trainer)
    torch.save(state, tmp_path / train.CHECKPOINT)
    monkeypatch.setattr("benchmarks.evaluation.options.SIZES", {"miniature": TINY})
    model, _, kept = load_model(tmp_path)
    assert all(torch.equal(x, state["model"][name]) for name, x in model.state_dict().items())
    assert set(state) - set(kept) == {"model", "optimizer"}
    line = under_test.about(OPTIONS, kept, CORPUS, "cpu", None)
    assert (line["size_options"], line["training_id"], line["training_commit"]) == (None, None, None)


def test_a_model_is_of_the_size_that_it_was_trained_with(whole, tmp_path, monkeypatch):
    whole.save(tmp_path)
    monkeypatch.setattr("benchmarks.evaluation.options.SIZES", {})
    model, options, _ = load_model(tmp_path)
    assert options == OPTIONS
    assert all(torch.equal(x, whole.model.state_dict()[name]) for name, x in model.state_dict().items())


def test_options_are_changed_by_name():
    new = changed(
        default_options("swa+fwpkm", "miniature", 7),
        [
            "plan=512x2x160,4096x1x90",
            "lr=1e-3",
            "warmup=5",
            "dtype=bfloat16",
            "memory.top_k=16",
            "memory.query_conv=None",
            "memory.score=dot",
        ],
    )
    assert new == Options(
        seed=7, plan=(Phase(512, 2, 160), Phase(4096, 1, 90)), lr=1e-3, warmup=5, dtype="bfloat16",
        memory={"top_k": 16, "query_conv": None, "score": "dot"},
    )  # fmt: skip


@pytest.mark.parametrize(
    "model, change, error",
    [
        ("swa+fwpkm", "rate=1", "`--set` must have, for swa.fwpkm, names of plan, .*, got 'rate=1'"),
        ("swa+fwpkm", "seed=1", "got 'seed=1'"),
        ("swa+fwpkm", "memory.topk=1", "got 'memory.topk=1'"),
        ("swa", "memory.top_k=1", "got 'memory.top_k=1'"),
        ("swa", "lr=high", "`lr` must be float, got 'high'"),
        ("swa", "warmup=1.5", "`warmup` must be int, got '1.5'"),
        ("swa", "warmup", "`warmup` must be int, got ''"),
        ("swa", "plan=512x2", "`plan` must be LENGTHxBATCHxSTEPS, .*, got '512x2'"),
        ("swa", "plan=512x0x2", "`plan` must be LENGTHxBATCHxSTEPS"),
        ("swa", "accumulate=0", "`accumulate` must be an integer, at least 1, got '0'"),
        ("swa", "accumulate=1.5", "`accumulate` must be an integer, at least 1, got '1.5'"),
        ("swa", "dtype=float16", "`dtype` must be float32 or bfloat16, got 'float16'"),
        ("lstm", "lr=1", "`model` must be one of .*, got 'lstm'"),
    ],
)
def test_what_is_no_option_is_refused(model, change, error):
    with pytest.raises(ValueError, match=error):
        changed(default_options(model, "miniature"), [change])


def test_the_learning_rate_rises_in_a_line_and_falls_in_a_cosine(whole):
    options = Options(plan=(Phase(8, 1, 60), Phase(16, 1, 40)), warmup=10, final_lr=0.2)
    assert options.rate(0) == pytest.approx(0.1, rel=1e-3)
    assert options.rate(4) == pytest.approx(0.5, rel=1e-2)
    assert options.rate(50) == pytest.approx(0.6)
    assert options.rate(100) == pytest.approx(0.2)
    rates = [options.rate(step) for step in range(9, 101)]
    assert rates == sorted(rates, reverse=True)
    assert dataclasses.replace(options, warmup=0).rate(0) == 1
    rate = OPTIONS.lr * OPTIONS.rate(3)
    assert [group["lr"] for group in whole.optimizer.param_groups] == [rate, rate, OPTIONS.table_lr * rate]


def test_the_loss_of_logits_made_by_hand():
    """Three bytes: one that nothing is known of; one asked for, half certain; one asked for, another half certain."""
    options = Options("swa", answer_weight=3.0, gate_price=0.5)
    trainer = Trainer(options, CORPUS, size=TINY)
    logits = torch.zeros(1, 3, 256)
    logits[0, 1, 20] = logits[0, 2, 31] = math.log(255)
    gates = [torch.tensor(0.25), torch.tensor(0.75)]
    trainer.called = lambda x, output_gate_means: SimpleNamespace(logits=logits, gate_means=gates)
    is_asked = torch.tensor([[False, False, True, True]])
    loss, figures = trainer.loss(torch.tensor([[5, 10, 20, 30]]), is_asked)
    bits = [8, 1, math.log2(510)]
    answer_loss = math.log(2) * (bits[1] + bits[2]) / 2
    assert figures.tolist() == pytest.approx([sum(bits) / 3, answer_loss, 0.5, 0.5], rel=1e-5)
    assert loss.item() == pytest.approx(math.log(2) * sum(bits) / 3 + 3 * answer_loss + 0.25, rel=1e-5)
    loss, figures = trainer.loss(torch.tensor([[5, 10, 20, 30]]), torch.zeros_like(is_asked))
    assert figures[1:3].tolist() == [0, 0]
    assert loss.item() == pytest.approx(math.log(2) * sum(bits) / 3 + 0.25, rel=1e-5)


def test_a_gradient_that_is_not_finite_ends_the_run():
    trainer = trained(OPTIONS, 1)
    with torch.no_grad():
        trainer.model.lm_head.weight[0, 0] = math.nan
    before = trainer.model.model.embed_tokens.weight.clone()
    with pytest.raises(FloatingPointError, match="the gradient of step 2 has norm nan, at nan bits a byte"):
        trainer.train_step()
    assert torch.equal(trainer.model.model.embed_tokens.weight, before)
    assert (trainer.step, len(trainer.log)) == (1, 1)


STAMP = {"commit": "12ab-dirty", "versions": {"torch": "2.13"}, "threads": 1}


@pytest.fixture
def small_sizes(monkeypatch, tmp_path) -> Path:
    """The program has one size, a tiny one; a text for it. Its stamps, which ask git, are made by hand."""
    monkeypatch.setattr("benchmarks.evaluation.options.SIZES", {"miniature": TINY})
    monkeypatch.setattr(train, "stamp", lambda device: STAMP | {"device": device})
    (tmp_path / "text").write_bytes(TEXT)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "text"


def test_the_program_trains_and_goes_on_and_refuses(small_sizes, monkeypatch, capsys):
    arguments = ["folder", "--text", "text", "--set", "distance=48"]
    assert train.main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("3 of 3 steps, 0.00 MB: ")
    assert "swa+fwpkm: 100%" in printed.err
    assert sorted(os.listdir("folder")) == [train.CHECKPOINT, train.PLOT]
    model, options, state = load_model(Path("folder"))
    assert (options.steps, options.distance, state["step"], model.training) == (3, 48, 3, False)
    assert Path("folder", train.PLOT).read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(train.plots, "plot_losses", lambda logs, path: [])  # most of so short a run
    assert train.main(arguments) == 0  # there is nothing left to do
    assert load_checkpoint(Path("folder"))["seconds"] == state["seconds"]
    about = under_test.about(options, state, CORPUS, "cpu", None)
    assert (about["training_commit"], about["training_versions"]) == ("12ab-dirty", {"torch": "2.13"})
    assert about["training_device"] == "cpu"
    assert about["size_options"] == json.loads(json.dumps(about["size_options"])) == size_options(TINY)
    capsys.readouterr()
    assert train.main([*arguments, "lr=1e-4"]) == 2
    error = "`state` must be of the same run, got lr 0.003 and not 0.0001; --fresh begins anew"
    assert capsys.readouterr().err == f"train: error: folder/checkpoint.pt: {error}\n"
    assert train.main([*arguments, "lr=1e-4", "--fresh"]) == 0
    _, options, fresh = load_model(Path("folder"))
    assert options.lr == 1e-4
    assert len({found["origin"]["id"] for found in (state, fresh)}) == 2


def test_a_signal_saves_first(small_sizes, monkeypatch, capsys):
    step, before = Trainer.train_step, signal.getsignal(signal.SIGTERM)

    def step_and_tell(trainer):
        line = step(trainer)
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return line

    arguments = ["folder", "--text", "text"]
    monkeypatch.setattr(train.plots, "plot_losses", lambda logs, path: [])
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", step_and_tell)
        assert train.main(arguments) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    assert capsys.readouterr().out.startswith("2 of 3 steps")
    cut = load_checkpoint(Path("folder"))
    assert cut["step"] == 2
    assert train.main(arguments) == 0
    gone_on = load_checkpoint(Path("folder"))
    assert gone_on["log"][:2] == cut["log"]
    assert len(cut["origin"]["id"]) == 16
    assert gone_on["origin"] == cut["origin"]
    assert train.main(["whole", "--text", "text"]) == 0
    assert_same_state(Path("whole"), Path("folder"))


def assert_same_state(one: Path, two: Path) -> None:
    ours, theirs = load_checkpoint(one)["model"], load_checkpoint(two)["model"]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())


@pytest.mark.parametrize(
    "arguments, error",
    [
        (["--text", "text", "missing"], "cannot read text missing: No such file"),
        (["--model", "lstm"], "`model` must be one of "),
        (["--text", "text", "--set", "memory.num_keys=0"], "`num_keys` must be at least 1"),
        (["--text", "text", "--set", "lr=1e30"], "the gradient of step [23] has norm (nan|inf)"),
        (["--text", "text", "--set", "plan=20000x1x1"], "`corpus` must have 20001 bytes to train on, got "),
        (["--device", "abacus"], "cannot use the device abacus: "),
        (["--device", "meta"], "cannot use the device meta: "),
        (["--dry-run", "0"], "--dry-run must be at least 1, got 0"),
        (["--dry-run", "-1"], "--dry-run must be at least 1, got -1"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
    ],
)
def test_what_the_program_cannot_do_it_says_in_a_line(small_sizes, capsys, arguments, error):
    assert train.main(["folder", *arguments]) == 2
    last = capsys.readouterr().err.rstrip("\n").splitlines()[-1]
    assert re.search(f"train: error: {error}", last)


def test_an_error_within_a_step_is_no_users_mistake(small_sizes, monkeypatch):
    def fail(trainer):
        raise ValueError("a mistake of ours")

    monkeypatch.setattr(Trainer, "train_step", fail)
    with pytest.raises(ValueError, match="a mistake of ours"):
        train.main(["folder", "--text", "text"])


def test_measures_say_that_a_device_cannot_be_used(tmp_path, capsys):
    with pytest.raises(CommandError, match="cannot use the device abacus"):
        under_test.load_trained(tmp_path, "abacus")
    assert mqar.main(["--device=abacus", f"--out={tmp_path / 'new'}"]) == 2
    assert capsys.readouterr().err.startswith("mqar: error: cannot use the device abacus: ")


def test_any_name_of_a_cpu_is_one(monkeypatch):
    monkeypatch.setattr(records.env_report, "collect", lambda: REPORT)
    assert records.stamp(device="cpu:0")["device"] == "an abacus"


REPORT = {
    "torch": {"version": "2"}, "commit": None, "cpu": {"model": "an abacus"}, "python": "3", "triton": "3",
    "fwpkm_kernels": "1",
}  # fmt: skip


def test_what_needs_transformers_says_so(monkeypatch):
    package = importlib.import_module("benchmarks.evaluation")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CommandError, match=r"^transformers is missing; .* 'fwpkm_kernels\[evaluation\]'$"):
        importlib.reload(package)


def _train_as_rank(rank: int, folder: str, port: int, steps: int) -> None:
    """One of two processes as torchrun starts them; each saves what it has in the end."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.chdir(folder)
    importlib.import_module("benchmarks.evaluation.options").SIZES = MappingProxyType({"miniature": TINY})
    step = Trainer.train_step

    def step_and_save(trainer):
        line = step(trainer)
        torch.save(trainer.state_dict(), f"{trainer.step} {rank}.pt")
        if rank == 1 and trainer.step == steps:  # one rank is told, and all end
            os.kill(os.getpid(), signal.SIGTERM)
        return line

    Trainer.train_step = step_and_save
    destroy = torch.distributed.destroy_process_group

    def destroy_last_holder():
        parallel = torch.nn.parallel.DistributedDataParallel
        assert not any(isinstance(x, parallel) for x in gc.get_objects())  # see on_device: the ranks might never end
        destroy()

    torch.distributed.destroy_process_group = destroy_last_holder
    status = train.main(["folder", "--model", "swa+fwpkm+pkm", "--text", "text", "--set", "accumulate=2"])
    assert status == (128 + signal.SIGTERM if steps < 3 else 0)


@pytest.mark.slow
def test_two_ranks_train_together_and_go_on(small_sizes):
    """Ranks have the same parameters and memories, of different rows; a run that is cut ends as one that is not."""
    folder, ends = small_sizes.parent, []
    for name, runs in (("whole", [4]), ("cut", [2, 4])):
        (folder / name).mkdir()
        (folder / name / "text").write_bytes(TEXT)
        for steps in runs:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            torch.multiprocessing.spawn(_train_as_rank, (str(folder / name), port, steps), nprocs=2)
        one, two = (torch.load(folder / name / f"3 {rank}.pt", weights_only=True) for rank in (0, 1))
        for key, x in one["model"].items():
            assert torch.equal(x, two["model"][key]), key
        ends.append(load_checkpoint(folder / name / "folder"))
        assert ends[-1]["log"][-1]["tokens"] == 128 * 2 * 2
    assert ends[0]["ranks"] == 2
    for key, x in ends[0]["model"].items():
        assert torch.equal(x, ends[1]["model"][key]), key
    alone = Trainer(dataclasses.replace(default_options("swa+fwpkm+pkm", "miniature"), accumulate=2), CORPUS, size=TINY)
    with pytest.raises(ValueError, match="ranks 2 and not 1"):
        alone.load_state_dict(ends[0])


@pytest.mark.parametrize("minutes, size, asked", [(2, "miniature", 2), (4, "small", 3), (99, "medium", 4)])
def test_the_largest_size_that_fits_is_chosen(minutes, size, asked):
    """None is tried that is larger than one that takes too long; the largest has no room."""
    minutes_of, tried = {"miniature": 2, "small": 4, "medium": 90}, []

    def measure(options, corpus, device):
        tried.append((options.size, corpus, device))
        if options.size not in minutes_of:
            raise torch.OutOfMemoryError("no room")
        return 60.0 * minutes_of[options.size]

    chosen = budget.choose_size("cuda", minutes, "swa", corpus=CORPUS, measure=measure)
    assert chosen == default_options("swa", size)
    assert tried == [(name, CORPUS, "cuda") for name in list(SIZES)[:asked]]


def test_where_none_fits_the_smallest_has_its_plan_cut():
    chosen = budget.choose_size("cpu", 1.0, corpus=CORPUS, measure=lambda options, corpus, device: 120.0)
    default = default_options("swa+fwpkm", "miniature")
    assert dataclasses.replace(chosen, plan=default.plan) == default
    assert chosen.plan == tuple(phase._replace(steps=phase.steps // 2) for phase in default.plan)


def test_no_room_for_the_smallest_is_an_error():
    def measure(options, corpus, device):
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError):
        budget.choose_size("cuda", 1.0, corpus=CORPUS, measure=measure)


@pytest.mark.parametrize("has_room", [True, False])
def test_a_size_leaves_its_room_to_the_next(monkeypatch, has_room):
    """Also to what comes after the last one, which here has no room or takes too long."""
    alive, left = [], []

    def measure(options, corpus, device):
        trainer = torch.nn.Module()
        alive.append(weakref.ref(trainer))
        if len(alive) == 2 and not has_room:
            raise torch.OutOfMemoryError("no room")
        return 60.0 * len(alive)

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: left.append([ref() for ref in alive]))
    assert budget.choose_size("cuda", 1.5, corpus=CORPUS, measure=measure).size == "miniature"
    assert left == [[None], [None, None]]


def test_a_plan_is_timed_by_a_few_steps_of_each_phase(small_sizes, monkeypatch):
    """The first of a phase, which may compile, is not counted."""
    options = dataclasses.replace(default_options("swa", "miniature"), plan=(Phase(64, 1, 100), Phase(96, 1, 2)))
    taken = []

    def step(trainer):
        taken.append(trainer.step)
        trainer.step += 1
        return {"seconds": {0: 50.0, 100: 7.0}.get(trainer.step - 1, 2.0 + trainer.step % 2)}

    monkeypatch.setattr(Trainer, "train_step", step)
    assert budget.plan_seconds(options, CORPUS, "cpu") == pytest.approx(100 * (2 + 3 + 2) / 3 + 2 * 2)
    assert taken == [0, 1, 2, 3, 100, 101]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("model", MODELS)
def test_models_of_a_size_have_as_many_parameters(model, size):
    options = default_options(model, size)
    with torch.device("meta"):
        made = make_model(make_config(model, SIZES[size], options.memory, options.gate_price), SIZES[size])
    assert count_parameters(made)[0] == pytest.approx(SIZES[size].parameters, rel=0.005)
    if (model, size) == ("gdn", "published"):
        assert made.config.intermediate_size == 2304


@pytest.mark.slow
def test_the_published_model_is_tried(small_sizes):
    """In a process of its own, of which it says how much memory it took."""
    arguments = ["folder", "--config=published", "--model=gdn+fwpkm+pkm", "--dry-run=3", "--text=text", "--threads=1"]
    run = [sys.executable, "-m", "benchmarks.evaluation.train", *arguments]
    path = os.pathsep.join(sys.path)
    done = subprocess.run(run, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=True)
    assert done.stdout.startswith("3 of 3 steps, ")
    assert float(re.search(r"([\d.]+) GiB$", done.stdout)[1]) < 8
    assert os.listdir("folder") == []


@pytest.mark.slow
def test_a_model_learns_to_find_needles(tmp_path):
    """In a minute, of 512 bytes; controls, which are nowhere, are not found."""
    options = changed(default_options("swa+fwpkm", "miniature"), ["plan=512x2x160", "memory.num_keys=128"])
    trainer = Trainer(options, python_text())
    while not trainer.is_done:
        trainer.train_step()
    trainer.save(tmp_path)
    model, *_ = load_model(tmp_path)
    (found,) = needles.measure(model, python_text(), needles.Cell(512, 10, 4, (1,)), seed=0)
    assert found.found > 0.9 * found.needles
    assert found.controls_found == 0
