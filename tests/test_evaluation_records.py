"""The evaluation's lines of results: statistics, what is measured again and what is not, the list of jobs, plots."""

import contextlib
import dataclasses
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")

from benchmarks.evaluation import needles, perplexity, plots, records, run, train
from benchmarks.evaluation.ablations import ABLATIONS
from benchmarks.evaluation.models import MODELS, SIZES, make_config, memories_of
from benchmarks.evaluation.records import append_lines, read_lines, stamp, summary, wilson
from benchmarks.evaluation.text import Corpus
from fwpkm_kernels._commands import CommandError
from fwpkm_kernels.integrations.transformers import FwPKMForCausalLM
from fwpkm_kernels.layers import FastWeightProductKeyMemory

CORPUS = Corpus(b"text " * 100, {"a": b"more text " * 300, "b": b"other text " * 300})


@pytest.mark.parametrize(
    "found, needles, low, high",
    # The first four are of Newcombe's paper of 1998 (Statistics in Medicine 17, table I), method 3.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
        (0, 0, 0, 1),
    ],
)
def test_wilson(found, needles, low, high):
    assert wilson(found, needles) == pytest.approx((low, high), abs=5e-5)


def line(**changes) -> records.Line:
    return {
        "row": "swa+fwpkm", "model": "swa+fwpkm", "seed": 0, "test_seed": 0, "num_keys": 512, "length": 4096,
        "readings": 1, "contexts": 20, "found": 90, "needles": 100, "digits": 560, "controls_found": 1,
        "seconds": 40.0, "state_bytes": 2**26, "options": {"seed": 0, "lr": 1e-3}, "training_bytes": 369_000,
        "training_cpu_seconds": 110.0, "training_digits_right": 0.99, "training_gate": 0.17,
    } | changes  # fmt: skip


def test_a_summary_takes_the_last_of_a_cell_and_adds_seeds():
    lines = [
        line(found=1),
        line(),
        line(seed=1, test_seed=1, found=50, options={"seed": 1, "lr": 1e-3}, state_bytes=2**25),
        line(test_seed=7, found=100),
        line(readings=2, found=99),
        line(options={"seed": 0, "lr": 2e-3}, found=0),
        line(num_keys=128, found=10),
    ]
    first, other_lr, small = summary(lines).values()
    recall = first[4096, 1]
    assert recall == ((0, 1), 240, 300, 1680, 3, 2.0, 2**26)
    assert recall.share == 0.8
    assert recall.interval == wilson(240, 300)
    assert first[4096, 2].found == 99
    assert (other_lr[4096, 1].found, small[4096, 1].found) == (0, 10)


def test_a_table_says_what_has_not_learnt():
    """Judged at the shortest length, whatever is found elsewhere."""
    lines = [
        line(),
        line(readings=2, length=32768, found=100),
        line(row="swa", num_keys=None, found=0, training_digits_right=0.1),
        line(row="swa", num_keys=None, found=9, readings=2),
        line(row="swa", num_keys=None, found=100, length=32768),
    ]
    table = records.recall_table(lines, "Models")
    assert table.lines == [
        ["swa+fwpkm", "512", "1", "1", "90 [83, 94] of 100", "-", "1 of 100", TRAINED],
        ["swa+fwpkm", "512", "2", "1", "-", "100 [96, 100] of 100", "1 of 100", TRAINED],
        ["swa", "-", "1", "1", "0 [0, 4] of 100", "100 [96, 100] of 100", "2 of 200", UNTRAINED],
        ["swa", "-", "2", "1", "9 [5, 16] of 100", "-", "1 of 100", UNTRAINED],
    ]
    assert table.header[4:6] == ["4K", "32K"]
    heading, _, *rows = table.markdown().splitlines()
    assert heading == "## Models: needles found, % [95 % interval] of needles"
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [cells[0], *cells[2:]] == [table.header, *table.lines]
    assert {*"".join(cells[1])} == {"-"}
    cost = records.cost_table(lines)
    assert cost.lines == [["swa+fwpkm", "512", "2.00 s, 64 MiB", "-"], ["swa", "-", *["2.00 s, 64 MiB"] * 2]]


TRAINED = "369 KB, 110 CPU s, digits right 0.99, gate 0.17"
UNTRAINED = "not learnt: 369 KB, 110 CPU s, digits right 0.69"


def test_lines_are_appended_and_read_behind_one_that_is_cut_off(tmp_path):
    path = tmp_path / "lines"
    append_lines(path, [{"a": 1}])
    with open(path, "a") as file:
        file.write('{"a": 2, "b"')
    append_lines(path, ({"a": x} for x in (3, 4)))
    with open(path, "a") as file:
        file.write("5")
    assert [x["a"] for x in read_lines(path)] == [1, 3, 4]
    with pytest.raises(CommandError, match="^cannot read .*missing"):
        read_lines(tmp_path / "missing")


def test_a_stamp_says_where_a_line_comes_from():
    options = train.Options(memory={"top_k": 4})
    found = json.loads(json.dumps(stamp(options)))
    assert train.options_of(found["options"]) == options
    assert found["versions"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert {"commit", "device"} <= set(found)
    assert "options" not in stamp()


@pytest.fixture
def trained(monkeypatch):
    """A stand-in for a trained model."""
    state = {"step": 250, "cpu_seconds": 12.34, "log": [{"tokens": 512, "digits_right": 0.5, "gate": 0.25}] * 2}
    model = torch.nn.Module()
    for module in (needles, perplexity):
        monkeypatch.setattr(module, "load_trained", lambda *_: (model, train.Options(), state, CORPUS))
    return model


def found_of(cell, readings) -> needles.Found:
    return needles.Found(cell.length, readings, 1, cell.contexts * cell.needles, 9, 0, 1, [1], 1.5, 100)


def test_needles_go_on_where_they_were_interrupted(tmp_path, monkeypatch, trained):
    out = tmp_path / "needles.jsonl"
    asked = []

    def measure(model, corpus, cell, seed, progress):
        for readings in cell.readings:
            if len(asked) == 3:
                raise KeyboardInterrupt
            asked.append((cell.length, readings, seed))
            yield found_of(cell, readings)

    monkeypatch.setattr(needles, "measure", measure)
    arguments = ["folder", f"--out={out}", "--cells=512:2x3,1024:1x2:1/4,2048:1x1", "--readings=1,2"]
    with pytest.raises(KeyboardInterrupt):
        needles.main(arguments)
    assert [(x["length"], x["readings"], x["needles"]) for x in read_lines(out)] == [
        (512, 1, 6),
        (512, 2, 6),
        (1024, 1, 2),
    ]
    asked.clear()
    monkeypatch.setattr(
        needles, "measure", lambda *given: asked.append(given[2]) or map(found_of, [given[2]] * 2, given[2].readings)
    )
    assert needles.main(arguments) == 0
    assert [cell.length for cell in asked] == [1024, 2048]
    lines = read_lines(out)
    assert len(summary(lines)) == 1
    assert sorted(next(iter(summary(lines).values()))) == [
        (512, 1),
        (512, 2),
        (1024, 1),
        (1024, 4),
        (2048, 1),
        (2048, 2),
    ]
    assert (lines[0]["training_bytes"], lines[0]["training_cpu_seconds"]) == (1024, 12.3)
    assert (lines[0]["held_out"], lines[0]["text"]) == (["a", "b"], CORPUS.fingerprint)
    asked.clear()
    assert needles.main(arguments) == 0
    assert asked == []
    assert needles.main([*arguments, "--seed=3"]) == 0
    assert len(asked) == 3


def test_a_model_is_tested_over_memories_of_another_size(monkeypatch):
    memory = {"num_keys": 4, "top_k": 2, "key_dim": 8, "value_dim": 4, "chunk_size": 8, "query_conv": 2}
    size = dataclasses.replace(SIZES["miniature"], hidden_size=16, heads=1, kv_heads=1, head_dim=16, parameters=20_000)
    size = dataclasses.replace(size, memory=size.memory | memory)
    trained = train.build(train.Options(), size)
    corpus = Corpus(b"a text to train on " * 300, {"held out": b"another"})
    state = {"corpus": corpus.fingerprint, "step": train.Options().steps}
    monkeypatch.setattr(needles, "load_model", lambda *_: (trained, train.Options(), state))
    monkeypatch.setattr(needles, "corpus_of", lambda files: corpus)
    model, *_ = needles.load_trained(Path("runs/x"), "cpu", None, 16)
    (fresh,) = memories_of(model)
    assert (fresh.num_keys, fresh.table.num_slots, fresh.options.addressing_weight) == (16, 256, 0.0)
    assert fresh.table.weight.abs().sum(1).count_nonzero() > 16  # it has read text
    assert not model.training


def test_perplexity_is_measured_once(tmp_path, monkeypatch, trained):
    calls = []

    def measure(model, corpus, treatment, orders, seed, progress):
        calls.append(treatment)
        bits = {"on": 2.0, "off": 3.0}[treatment]
        return [perplexity.Piece(name, 0, 0, 4096, 100, 100 * bits + i) for i, name in enumerate("ab")]

    monkeypatch.setattr(perplexity, "measure", measure)
    monkeypatch.setattr(perplexity, "memories_of", lambda model: [FastWeightProductKeyMemory(4, num_keys=8, key_dim=4)])
    arguments = ["folder", f"--out={tmp_path / 'out'}", "--orders=1", "--treatments=on,off"]
    assert [perplexity.main(arguments) for _ in range(2)] == [0, 0]
    assert calls == ["on", "off"]
    lines = read_lines(tmp_path / "out")
    assert [(x["treatment"], x.get("bits"), x.get("over"), x.get("gain")) for x in lines] == [
        ("on", 2.005, None, None),
        ("off", 3.005, None, None),
        ("on", None, "off", 1.0),
    ]
    assert records.perplexity_table(lines).lines == [
        ["swa+fwpkm", "0", "on", "2.0050"],
        ["swa+fwpkm", "0", "off", "3.0050"],
        ["swa+fwpkm", "0", "gain over off", "1.0000 ± 0.0000"],
    ]
    monkeypatch.setattr(perplexity, "memories_of", lambda model: [])
    assert perplexity.main([*arguments[:1], f"--out={tmp_path / 'plain'}"]) == 0
    assert [x["treatment"] for x in read_lines(tmp_path / "plain")] == ["on"]


#: Of associative recall.
ASKED = {
    "model": "swa", "seed": 0, "length": 256, "pairs": 8, "overwrite": True, "right": 30, "asked": 40, "stale": 3,
    "overwritten": 20, "controls_right": 1, "controls": 16, "chance": 1 / 64, "training_right": 0.5,
    "training_steps": 500, "training_cpu_seconds": 40.2,
}  # fmt: skip


def test_associative_recall_is_added_up():
    kept = {"overwrite": False, "overwritten": 0, "stale": 0}
    lines = [ASKED | {"seed": seed, "right": 30 + seed} | more for seed in (0, 2) for more in (kept, {})]
    table = records.mqar_table([*lines, {**lines[0], "right": 40}, {**lines[0], "model": "gdn", "training_right": 0.1}])
    assert table.header[:4] == ["model", "overwritten", "seeds", "8 in 256"]
    assert table.lines == [
        ["swa", "no", "2", "90.0", "-", "6.2", "1.6", "50, 500 steps, 40 s of CPU"],
        ["swa", "yes", "2", "77.5", "15.0", "6.2", "1.6", "50, 500 steps, 40 s of CPU"],
        ["gdn", "no", "1", "75.0", "-", "6.2", "1.6", "not learnt in 500 steps, 40 s of CPU"],
    ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--cells=4096:20"], "a cell must be LENGTH:CONTEXTSxNEEDLES.* got '4096:20'"),
        (["--cells=4096:20x5,0:1x1"], "all positive, got '0:1x1'"),
        (["--cells=4096:20x5:1/0"], "got '4096:20x5:1/0'"),
        (["--cells="], "got ''"),
        (["--cells=512:1x50"], "50 needles of .* bytes do not fit into 512"),
        (["--readings=1,none"], "--readings must be positive numbers .* got '1,none'"),
        ([], "cannot read folder/checkpoint.pt: No such file"),
    ],
)
def test_needles_say_what_is_wrong(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert needles.main(["folder", "--out=new", *arguments]) == 2
    (tmp_path / "folder").mkdir()
    assert needles.main(["folder", "--out=new", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--treatments=off"], "--treatments must begin with \"on\" .* got 'off'"),
        (["--treatments=on,reset"], "got 'on,reset'"),
        (["--orders=0"], "--orders must be at least 1, got 0"),
        ([], "cannot read folder/checkpoint.pt: No such file"),
    ],
)
def test_perplexity_says_what_is_wrong(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert perplexity.main(["folder", f"--out={tmp_path / 'new'}", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_model_that_is_not_trained_to_its_end_is_refused(monkeypatch):
    state = {"corpus": CORPUS.fingerprint, "step": 3}
    monkeypatch.setattr(needles, "load_model", lambda *_: (None, train.Options(), state))
    monkeypatch.setattr(needles, "corpus_of", lambda files: CORPUS)
    with pytest.raises(CommandError, match=f"^runs/x has 3 of {train.Options().steps} steps"):
        needles.load_trained(Path("runs/x"), "cpu")
    state["corpus"] = "another"
    with pytest.raises(CommandError, match="^runs/x was trained on another text"):
        needles.load_trained(Path("runs/x"), "cpu")


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
    options = train.changed(train.Options(), [f"{name}={value}" for name, value in changes.items()])
    assert options.bytes == train.Options().bytes
    memories = [SIZES["miniature"].memory | x.memory for x in (options, train.Options())]
    is_changed = memories[0] != memories[1] or dataclasses.replace(options, memory={}) != train.Options()
    assert is_changed == bool(changes)
    with torch.device("meta"):
        FwPKMForCausalLM(make_config(options.model, SIZES[options.size], options.memory, options.gate_price))


def test_a_job_that_fails_stops_only_what_needs_it():
    chains = jobs(["full", "swa"])
    done, told = [], []

    def execute(job):
        done.append(job.title)
        return "status 1" if job.title in ("full-0: train", "swa-0: needles") else None

    failures = run.run_all(chains, 2, execute, told.append)
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


def test_a_job_is_a_process_of_one_thread(tmp_path, monkeypatch):
    """Results of mqar, which no other process continues, are there as a whole or not at all."""
    started = []

    def process(arguments, *, stdout, stderr, env):
        started.append((arguments[2:], env["OMP_NUM_THREADS"]))
        Path(arguments[-1]).write_text("lines")
        stdout.write(b"10 %\r20 %\nno luck\n")
        return subprocess.CompletedProcess(arguments, int(len(started) == 1))

    monkeypatch.setattr(subprocess, "run", process)
    ((job,),) = [chain[-1:] for chain in run.chains_of(run.Plan(tmp_path), ["swa"], {"swa": [0]}, [])]
    error = run.execute(job)
    assert re.fullmatch("status 1, no luck, see .*/runs/swa-0/mqar.log", error)
    assert not job.output.exists()
    assert run.execute(job) is None
    assert job.output.read_text() == "lines"
    assert run.execute(job) is None
    arguments = ["benchmarks.evaluation.mqar", *job.arguments, "--out", str(job.output.with_suffix(".running"))]
    assert started == [(arguments, "1")] * 2


LOG = [{"bits": 8.0 / i, "digits_right": 0.1 * i, "tokens": 512, "gate": 0.5} for i in range(1, 10)]


def results(folder: Path) -> None:
    """Results of a run, as its programs write them."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"log": LOG}, folder / train.CHECKPOINT)
    about = stamp()
    lengths = [line(length=length, readings=n, **about) for length in (4096, 131072) for n in (1, 2)]
    append_lines(folder / "needles.jsonl", lengths)
    rows = [line(row="other memories in the test", num_keys=n, found=n // 16, **about) for n in (64, 256, 1024)]
    append_lines(folder / "ablations.jsonl", rows)
    bits = {"row": "swa", "seed": 0, "low": 0, "high": 4096}
    append_lines(folder / "perplexity.jsonl", [bits | {"treatment": x, "bits": 3.0} for x in ("on", "off")])
    append_lines(folder / "mqar.jsonl", [ASKED])


def test_an_evaluation_ends_in_tables_and_plots(tmp_path, monkeypatch, capsys):
    seen = []

    def execute(job):
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
    titles = re.findall("^## (.*)$", (tmp_path / "results.md").read_text(), re.M)
    assert len(titles) == 5
    assert all(title in captured.out for title in titles)
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {"runs", "results.md", *plots.FILES, *(f"{name}.jsonl" for name in run.RESULTS)}
    for name in plots.FILES:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert len(read_lines(tmp_path / "needles.jsonl")) == 4
    seen.clear()
    assert run.main([f"--out={tmp_path}", "--report"]) == 0
    assert seen == []
    (tmp_path / "runs/swa-1/old").touch()
    assert run.main([*arguments, "--fresh"]) == 1
    assert not (tmp_path / "runs/swa-1/old").exists()


def test_nothing_is_drawn_of_nothing(tmp_path, monkeypatch, capsys):
    assert run.main([f"--out={tmp_path}", "--report"]) == 0
    assert capsys.readouterr().out == "no results\n\n"
    assert [path.name for path in tmp_path.iterdir()] == ["results.md"]


def test_minutes_choose_the_size(tmp_path, monkeypatch):
    asked, given = [], []

    def choose(device, minutes, model):
        asked.append((device, minutes, model))
        return train.Options(model, "small", plan=(train.Phase(512, 2, 9), train.Phase(4096, 1, 3)))

    monkeypatch.setattr(train, "choose_size", choose, raising=False)
    monkeypatch.setattr(run, "run_all", lambda chains, workers, *_: given.append((chains, workers)) or [])
    monkeypatch.setattr(train, "on_device", contextlib.nullcontext)
    assert run.main([f"--out={tmp_path}", "--device=cuda", "--minutes=10", "--measures", "needles"]) == 0
    assert asked == [("cuda", 2.5, "full")]
    ((chains, workers),) = given
    assert workers == 1
    for training, _ in chains:
        assert training.arguments[5:7] == ("--size", "small")
        assert training.arguments[-2:] == ("--set", "plan=512x2x9,4096x1x3")


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
    monkeypatch.setattr(run, "run_all", lambda chains, *_: given.extend(chains) or [])
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
    ],
)
def test_an_evaluation_says_what_is_wrong(arguments, message, tmp_path, capsys):
    assert run.main([f"--out={tmp_path / 'new'}", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "new").exists()
