"""`make evaluate`: its jobs and the order in which they run, interruptions, and the report at the end."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")

from benchmarks.evaluation import budget, mqar, needles, plots, run, train
from benchmarks.evaluation.ablations import ABLATIONS
from benchmarks.evaluation.models import MODELS, SIZES, make_config
from benchmarks.evaluation.options import Options, Phase, changed
from benchmarks.evaluation.records import append_lines, stamp
from benchmarks.files import read_lines
from fwpkm_kernels._commands import CommandError
from fwpkm_kernels.integrations.transformers import FwPKMForCausalLM
from tests.helpers.evaluation_lines import ASKED, bits, line


def jobs(models=(), seeds=(0,), rows=(), **options) -> list[list[run.Job]]:
    plan = run.Plan(Path("out"), **options)
    return run.chains_of(plan, models, dict.fromkeys(models, seeds), rows)


def test_the_jobs_of_a_model():
    (full,), (zero, one) = jobs(["full"]), jobs(["swa+fwpkm"], (0, 1))
    assert [job.title for job in one] == [f"swa+fwpkm-1: {name}" for name in ("train", "needles", "perplexity", "mqar")]
    folder = "out/runs/swa+fwpkm-1"
    assert one[0].arguments[:5] == (folder, "--model", "swa+fwpkm", "--seed", "1")
    assert one[1].arguments[:3] == (folder, "--cells", needles.CELLS)
    assert one[1].arguments[-2:] == ("--out", f"{folder}/needles.jsonl")
    assert one[3].arguments == ("--model", "swa+fwpkm", "--seed", "1", "--device", "cpu")
    assert {zero[0].run, one[0].run} == {"swa+fwpkm-0", "swa+fwpkm-1"}
    assert run.FULL_CELLS in full[1].arguments
    assert full[2].arguments[1:3] == ("--orders", "1")


def test_options_of_an_evaluation_reach_its_jobs():
    ((training, asking),) = jobs(
        ["full"], measures=("needles",), changes=("lr=1",), size="small", device="cuda", cells="512:1x1", readings="1"
    )
    assert training.arguments[5:] == ("--size", "small", "--device", "cuda", "--set", "lr=1")
    assert asking.arguments[1:7] == ("--cells", "512:1x1", "--readings", "1", "--device", "cuda")


def test_rows_that_change_no_training_share_one():
    chains = jobs(["swa+fwpkm"], rows=["defaults", "other memories in the test", "K = 4"], measures=("needles",))
    assert [chain[0].run for chain in chains] == ["swa+fwpkm-0", "swa+fwpkm-0-k-4"]
    assert [job.name for job in chains[0]] == ["train", *["needles"] * 7]
    assert {job.output.name for job in chains[0][2:]} == {"ablations.jsonl"}
    assert [job.arguments[-5] for job in chains[0][3:]] == ["64", "128", "256", "512", "1024"]
    assert chains[1][0].arguments[-2:] == ("--set", "memory.top_k=4")
    assert chains[1][1].arguments[5:7] == ("--row", "K = 4")


@pytest.mark.parametrize("row", ABLATIONS)
def test_every_ablation_is_a_run_of_its_own_with_as_many_bytes(row):
    ((training, *asking),) = jobs(rows=[row])
    assert len(asking) == len(ABLATIONS[row].test_keys)
    changes = ABLATIONS[row].changes
    assert (training.run == "swa+fwpkm-0") == (not changes)
    others = [name for name in ABLATIONS if name != row and ABLATIONS[name].changes]
    assert training.run not in {jobs(rows=[name])[0][0].run for name in others}
    options = changed(Options(), [f"{name}={value}" for name, value in changes.items()])
    assert options.bytes == Options().bytes
    memories = [SIZES["miniature"].memory | x.memory for x in (options, Options())]
    is_changed = memories[0] != memories[1] or dataclasses.replace(options, memory={}) != Options()
    assert is_changed == bool(changes)
    with torch.device("meta"):
        FwPKMForCausalLM(make_config(options.model, SIZES[options.size], options.memory, options.gate_price))


def test_a_job_that_fails_stops_only_what_needs_it():
    chains = jobs(["full", "swa"])
    done, told = [], []

    def execute(job):
        done.append(job.title)
        return "status 1" if job.title in ("full-0: train", "swa-0: needles") else None

    failures, left_out = run.run_all(chains, 2, execute, told.append)
    assert left_out == []
    assert set(done) == {f"swa-0: {name}" for name in ("train", *run.MEASURES)} | {"full-0: train", "full-0: mqar"}
    skipped = {f"full-0: {name}: not run, as the training failed" for name in ("needles", "perplexity")}
    assert set(failures) == {"full-0: train: status 1", "swa-0: needles: status 1"} | skipped
    assert len(told) == 8


def test_no_job_begins_after_an_interruption():
    done = []

    def execute(job):
        done.append(job.name)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run_all(jobs(["full", "swa", "gdn"]), 1, execute, print)
    assert done == ["train"]


def test_the_longest_jobs_begin_first_and_any_worker_takes_them():
    """Perplexity of a model is measured beside its needles, as soon as there is nothing longer to do."""
    begun, both = [], threading.Barrier(2)

    def execute(job):
        begun.append(job.title)
        if job.run == "full-0" and job.name in ("needles", "perplexity"):
            both.wait(60)

    assert run.run_all(jobs(["full"]), 2, execute, str) == ([], [])
    begun.clear()
    assert run.run_all(jobs(["swa", "gdn"]), 1, execute, str) == ([], [])
    first = [f"{model}-0: {name}" for model in ("swa", "gdn") for name in ("train", "needles")]
    assert begun == [*first, *(f"{model}-0: {name}" for name in ("perplexity", "mqar") for model in ("swa", "gdn"))]


def test_jobs_of_one_file_follow_each_other():
    running = []

    def execute(job):
        running.append(job.output)
        time.sleep(0.01)
        assert running.count(job.output) == 1
        running.remove(job.output)

    assert run.run_all(jobs(rows=["other memories in the test"]), 3, execute, str) == ([], [])


def test_no_job_begins_after_the_deadline():
    begun = []

    def execute(job):
        begun.append(job.title)
        time.sleep(0.3)

    left = run.run_all(jobs(["swa", "gdn"]), 1, execute, str, time.monotonic() + 0.15)[1]
    assert begun == ["swa-0: train"]
    assert len(left) == 7
    assert left[0] == "swa-0: needles"


def test_processes_end_with_the_one_that_began_them():
    with run.ending_children() as children:
        children.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        with pytest.raises(SystemExit) as ended:
            signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 128 + signal.SIGTERM
    assert children[0].wait(60) == -signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_job_is_a_process_of_one_thread(tmp_path, monkeypatch):
    """Results of mqar, which no other process continues, are there as a whole or not at all."""
    started, children = [], []
    options = json.loads(json.dumps(dataclasses.asdict(mqar.make_options("swa", 0))))

    class Process:
        def __init__(self, arguments, *, stdout, stderr, env):
            started.append((arguments[2:], env["OMP_NUM_THREADS"]))
            append_lines(arguments[-1], [{"options": options}])
            stdout.write(b"10 %\r20 %\nno luck\n" if len(started) == 1 else b"")

        def wait(self):
            return int(len(started) != 2)

    monkeypatch.setattr(subprocess, "Popen", Process)
    ((job,),) = [chain[-1:] for chain in run.chains_of(run.Plan(tmp_path), ["swa"], {"swa": [0]}, [])]
    error = run.execute(job, children)
    assert re.fullmatch("status 1, no luck, see .*/runs/swa-0/mqar.log", error)
    assert not job.output.exists()
    assert run.execute(job, children) is None
    assert run.execute(job, children) is None  # the results are there
    arguments = ["benchmarks.evaluation.mqar", *job.arguments, "--out", str(job.output.with_suffix(".running"))]
    assert started == [(arguments, "1")] * 2
    assert [type(child) for child in children] == [Process] * 2
    for other in ({**options, "gate_price": 0.5}, {**options, "plan": [[256, 8, 5]]}, {"unknown": 0}):
        job.output.write_text(json.dumps({"options": other}))
        assert "without a word" in run.execute(job, children)  # of its own, whatever an older run has said
    assert len(started) == 5


LOG = [{"bits": 8.0 / i, "digits_right": 0.1 * i, "tokens": 512, "gate": 0.5} for i in range(1, 10)]


def results(folder: Path) -> None:
    """Results of a run, as its programs write them."""
    folder.mkdir(parents=True, exist_ok=True)
    options = json.loads(json.dumps(dataclasses.asdict(Options("swa", "small", seed=1))))
    torch.save({"log": LOG, "options": options}, folder / train.CHECKPOINT)
    about = stamp()
    machine = {name: about[name] for name in ("versions", "device", "threads")}
    lengths = [line(length=length, readings=n, **about) for length in (4096, 131072) for n in (1, 2)]
    append_lines(folder / "needles.jsonl", lengths)
    rows = [line(row="other memories in the test", num_keys=n, found=n // 16, **about) for n in (64, 256, 1024)]
    append_lines(folder / "ablations.jsonl", rows)
    mine = [bits(model, {"a": [3.0, 1], "b": [2.0, 1]}, commit="0ld", **machine) for model in ("swa", "swa+fwpkm")]
    append_lines(folder / "perplexity.jsonl", [*mine, {**mine[0], "treatment": "off"}])
    append_lines(folder / "mqar.jsonl", [ASKED])


def test_an_evaluation_ends_in_tables_and_plots(tmp_path, monkeypatch, capsys):
    seen = []

    def execute(job, children):
        seen.append(job.title)
        if job.name == "train":
            results(job.output.parent)
        return "out of memory" if job.name == "mqar" else None

    monkeypatch.setattr(run, "execute", execute)
    arguments = [f"--out={tmp_path}", "--models", "swa", "--workers=1"]
    assert run.main(arguments) == 1
    assert seen == [f"swa-1: {name}" for name in ("train", *run.MEASURES)]
    captured = capsys.readouterr()
    assert "failed: swa-1: mqar: out of memory\n" in captured.err
    text = (tmp_path / "results.md").read_text()
    titles = re.findall("^## (.*)$", text, re.M)
    assert len(titles) == 6
    assert re.search(f"; commit {stamp()['commit']}, 0ld.$", text, re.M)
    assert all(title in captured.out for title in titles)
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {"runs", "results.md", *plots.FILES, *(f"{name}.jsonl" for name in run.RESULTS)}
    for name in plots.FILES:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert len(read_lines(tmp_path / "needles.jsonl")) == 4
    seen.clear()
    damaged = tmp_path / "runs/gdn-1"
    damaged.mkdir()
    (damaged / train.CHECKPOINT).write_bytes(b"PK")
    drawn = []
    monkeypatch.setattr(plots, "plot_losses", lambda logs, path: drawn.append([*logs]))
    assert run.main([f"--out={tmp_path}", "--report"]) == 0
    assert (seen, drawn) == ([], [["swa-1"]])
    assert f"\ncannot read {damaged / train.CHECKPOINT}: " in (tmp_path / "results.md").read_text()
    (tmp_path / "runs/swa-1/old").touch()
    assert run.main([*arguments, "--fresh"]) == 1
    assert not (tmp_path / "runs/swa-1/old").exists()


def test_nothing_is_drawn_of_nothing(tmp_path, monkeypatch, capsys):
    assert run.main([f"--out={tmp_path}", "--report"]) == 0
    assert capsys.readouterr().out == "no results\n\n"
    assert [path.name for path in tmp_path.iterdir()] == ["results.md"]


def test_minutes_choose_the_size(tmp_path, monkeypatch):
    """The one of the slowest model that is asked for; and where models have been trained, theirs."""
    asked, given = [], []
    plans = {"full": ("small", 9), "swa+fwpkm": ("miniature", 4), "gdn": ("miniature", 5)}

    def choose(device, minutes, model):
        asked.append((device, minutes, model))
        size, steps = plans[model]
        return Options(model, size, plan=(Phase(512, 2, steps), Phase(4096, 1, 3)))

    monkeypatch.setattr(budget, "choose_size", choose)
    monkeypatch.setattr(run, "try_all", lambda drawing: None)
    monkeypatch.setattr(run, "in_child", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(run, "run_all", lambda *found: given.append(found) or ([], ["swa-1: mqar"]))
    monkeypatch.setattr(train, "on_device", contextlib.nullcontext)
    arguments = [f"--out={tmp_path}", "--device=cuda", "--minutes=10", "--measures", "needles"]
    began = time.monotonic()
    assert run.main([*arguments, "--models", *plans]) == 0
    assert asked == [("cuda", 5 / 3, model) for model in plans]
    ((chains, workers, *_, deadline),) = given
    assert workers == 1
    assert began + 600 <= deadline <= time.monotonic() + 600
    for training, _ in chains:
        assert training.arguments[5:7] == ("--size", "miniature")
        assert training.arguments[-2:] == ("--set", "plan=512x2x4,4096x1x3")
    assert "\nLeft out, as 10 minutes were over: swa-1: mqar.\n" in (tmp_path / "results.md").read_text()
    results(tmp_path / "runs/swa-1")
    given.clear()
    assert run.main(arguments) == 0
    assert len(asked) == len(plans)
    for training, _ in given[0][0]:
        assert training.arguments[5:7] == ("--size", "small")
        assert training.arguments[-2:] == ("--set", "plan=512x2x120,4096x1x90")


def test_a_process_gives_what_it_returns_and_raises():
    assert run.in_child(pow, 2, 5) == 32
    with pytest.raises(CommandError, match="the process that tried the sizes was killed"):
        run.in_child(os._exit, 1)


def test_an_interrupted_evaluation_has_a_report(tmp_path, monkeypatch):
    def run_all(*_):
        results(tmp_path / "runs/swa-1")
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_all", run_all)
    monkeypatch.setattr(run, "try_all", lambda drawing: None)
    with pytest.raises(KeyboardInterrupt):
        run.main([f"--out={tmp_path}"])
    assert "## Models" in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize(
    "arguments, chains",
    [
        ([], {"full-1", "swa+fwpkm-1"}),
        (["--ablations", "K = 4"], {"swa+fwpkm-0-k-4"}),
        (["--seeds=4,5"], None),
        (["--full"], None),
    ],
)
def test_what_an_evaluation_runs(arguments, chains, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(run, "run_all", lambda chains, *_: given.extend(chains) or ([], []))
    assert run.main([f"--out={tmp_path}", *arguments]) == 0
    runs = {chain[0].run for chain in given}
    if arguments == ["--full"]:
        trained = sum(bool(ablation.changes) for ablation in ABLATIONS.values())
        assert len(runs) == len(MODELS) + 2 + 1 + trained  # two more seeds, and the ablations' own
        assert {f"swa+fwpkm-{seed}" for seed in range(4)} | {f"{model}-1" for model in MODELS} <= runs
    else:
        assert runs == (chains or {f"{model}-{seed}" for model in run.STORY for seed in (4, 5)})


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ablations", "K = 5"], "--ablations must be of defaults, .* got K = 5"),
        (["--cells=5"], "a cell must be .* got '5'"),
        (["--config=huge"], "argument --size/--config: invalid choice: 'huge'"),
    ],
)
def test_an_evaluation_says_what_is_wrong(arguments, message, tmp_path, capsys):
    try:
        status = run.main([f"--out={tmp_path / 'new'}", *arguments])
    except SystemExit as end:  # argparse's
        status = end.code
    assert status == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "new").exists()
