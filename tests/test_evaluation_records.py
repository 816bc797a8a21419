"""The evaluation's lines of results: statistics, what is measured again and what is not, the list of jobs, plots."""

import contextlib
import dataclasses
import json
import math
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

from benchmarks.evaluation import mqar, needles, perplexity, plots, records, run, train
from benchmarks.evaluation.ablations import ABLATIONS
from benchmarks.evaluation.models import MODELS, SIZES, make_config, memories_of
from benchmarks.evaluation.records import append_lines, latest, stamp, summary, wilson
from benchmarks.evaluation.text import Corpus
from benchmarks.files import read_lines
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
        line(text="another", found=20),
    ]
    first, other_lr, small, other_text = summary(latest(lines)).values()
    recall = first[4096, 1]
    assert recall == ({0: 0.95, 1: 0.5}, 240, 300, 1680, 3, 2.0, 2**26)
    assert recall.share == 0.8
    assert recall.interval == wilson(240, 300)
    assert first[4096, 2].found == 99
    assert (other_lr[4096, 1].found, small[4096, 1].found, other_text[4096, 1].found) == (0, 10, 20)


def test_a_model_that_is_trained_anew_loses_its_older_lines():
    """Those of another length too, which are of a model that is no more; a model of another seed keeps its own."""
    old = [line(length=x, training_id="a") for x in (4096, 8192)]
    other = line(seed=1, options={"seed": 1, "lr": 1e-3}, training_id="c")
    new = line(training_id="b", contexts=3)
    assert latest([*old, other, new]) == [other, new]
    before = [line(), line(length=8192)]  # lines of older programs say nothing of it
    assert latest(before) == before


def test_several_seeds_show_the_worst_and_the_best():
    lines = [line(seed=seed, found=found, options={}) for seed, found in ((3, 90), (1, 98), (2, 95))]
    (shown,) = records.recall_table(lines, "Models").lines
    assert shown[3:5] == ["3", "94 [91, 96] of 300, seeds 90 to 98"]


def test_rows_of_other_options_have_other_names():
    options = {"seed": 0, "lr": 1e-3, "memory": {}}
    others = [line(options=options | {"memory": {"top_k": 4}}), line(options=options), line(row="swa", options=options)]
    names = records.names_of(map(records.tested, others))
    assert [*names.values()] == ["swa+fwpkm (memory {'top_k': 4})", "swa+fwpkm (memory {})", "swa"]
    shown = [row[0] for row in records.recall_table(others, "Models").lines]
    assert shown == [row[0] for row in records.cost_table(others).lines] == [*names.values()]


def test_a_budget_is_the_mean_over_seeds():
    """However many cells there are of each."""
    lines = [line(length=x, training_cpu_seconds=100.0) for x in (1024, 2048, 4096)]
    lines.append(line(seed=1, options={"seed": 1, "lr": 1e-3}, training_cpu_seconds=200.0))
    assert "369 KB, 150 CPU s" in records.recall_table(lines, "Models").lines[0][-1]


def test_a_table_says_what_has_not_learnt():
    """Judged at the shortest length, whatever is found elsewhere."""
    lines = [
        line(),
        line(readings=2, length=32768, found=100),
        line(row="swa", num_keys=None, found=0, training_digits_right=0.1),
        line(row="swa", num_keys=None, found=9, readings=2, training_digits_right=0.1),
        line(row="swa", num_keys=None, found=100, length=32768, training_digits_right=0.1),
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
    assert heading == "## Models: needles found, % [95 % interval] of needles, worst to best of several seeds"
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [cells[0], *cells[2:]] == [table.header, *table.lines]
    assert {*"".join(cells[1])} == {"-"}
    cost = records.cost_table(lines)
    assert cost.lines == [["swa+fwpkm", "512", "2.00 s, 64 MiB", "-"], ["swa", "-", *["2.00 s, 64 MiB"] * 2]]


TRAINED = "369 KB, 110 CPU s, digits right 0.99, gate 0.17"
UNTRAINED = "not learnt: 369 KB, 110 CPU s, digits right 0.10"


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


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_lines_are_what_every_reader_of_json_takes(number, tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_lines(tmp_path / "lines", [{"a": 1}, {"gain": number}])
    assert (tmp_path / "lines").read_text() == '{"a": 1}\n'


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
    model.device = torch.device("cpu")
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


@pytest.mark.parametrize("changed", ["text", "training", "options", "contexts", "needles"])
def test_a_cell_is_measured_again_where_what_it_is_of_has_changed(changed, tmp_path, monkeypatch, trained):
    """And then is known: its line takes the place of the older one."""
    asked = []

    def measure(model, corpus, cell, *_):
        asked.append(cell)
        return [found_of(cell, 1)]

    monkeypatch.setattr(needles, "measure", measure)
    arguments = ["folder", f"--out={tmp_path / 'out'}", "--readings=1", "--cells"]
    monkeypatch.setattr(needles, "about", lambda *_: about)
    about = line(text="a", training_id="b")
    assert needles.main([*arguments, "512:2x3"]) == 0
    cells = {"contexts": "512:3x3", "needles": "512:2x4"}.get(changed, "512:2x3")
    about |= {"text": {"text": "c"}, "training": {"training_id": "c"}, "options": {"options": {"lr": 1}}}.get(
        changed, {}
    )
    for _ in range(2):
        assert needles.main([*arguments, cells]) == 0
    assert len(asked) == 2
    assert len(latest(read_lines(tmp_path / "out"))) == (2 if changed in ("text", "options") else 1)


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
    assert ["seconds" in x for x in lines] == [True, True, False]
    assert records.perplexity_table(lines).lines == [
        ["swa+fwpkm", "0", "1", "on", "2.0050"],
        ["swa+fwpkm", "0", "1", "off", "3.0050"],
        ["swa+fwpkm", "0", "1", "gain over off", "1.0000 ± 0.0000"],
    ]
    calls.clear()
    about = perplexity.about
    monkeypatch.setattr(perplexity, "about", lambda *given: about(*given) | {"training_id": "another"})
    for more in ([], [], ["--orders=2"], ["--seed=5", "--orders=2"]):
        assert perplexity.main([*arguments, *more]) == 0
    assert calls == ["on", "off"] * 3
    kept = latest(read_lines(tmp_path / "out"))
    assert [(x["orders"], x["test_seed"], x["training_id"]) for x in kept] == [(2, 5, "another")] * 3
    monkeypatch.setattr(perplexity, "memories_of", lambda model: [])
    assert perplexity.main([*arguments[:1], f"--out={tmp_path / 'plain'}"]) == 0
    assert [x["treatment"] for x in read_lines(tmp_path / "plain")] == ["on"]


def bits(model, documents, **changes) -> records.Line:
    """A line of perplexity, with bits and bytes of each document."""
    size = {"low": 0, "high": 4096, "bytes": 0, "bits": 2.0, "by_document": documents}
    return line(row=model, text="a", orders=2, treatment="on", **size) | changes


def test_models_are_compared_document_by_document():
    """Only where they have read the same; the error is that over documents, and a pair of seeds is one of each."""
    lines = [
        bits("swa+fwpkm+pkm", {"a": [90.0, 50], "b": [40.0, 10]}),
        bits("swa+fwpkm", {"a": [100.0, 50], "b": [43.0, 10]}),
        bits("swa+pkm", {"a": [90.0, 50], "b": [40.0, 10]}, orders=3),
        bits("swa+fwpkm", {"a": [0.0, 50], "b": [0.0, 10]}, treatment="off"),
        bits("swa+fwpkm+pkm", {"a": [90.0, 50], "b": [40.0, 10]}, seed=1),
        bits("swa+fwpkm", {"a": [95.0, 50], "b": [40.0, 10]}, seed=1),
        bits("gdn", {"a": [90.0, 50]}, text="another"),
        bits("gdn+fwpkm", {"a": [80.0, 50]}),
    ]
    table = records.pairs_table(lines)
    first, second = records.mean_saved([(10.0, 50), (3.0, 10)]), records.mean_saved([(5.0, 50), (0.0, 10)])
    both = records.mean_saved([(15.0, 100), (3.0, 20)])
    assert first[0] == pytest.approx(13 / 60)
    assert table.lines == [
        ["swa+fwpkm+pkm", "swa+fwpkm", label, f"{gain:.4f} ± {error:.4f}"]
        for label, (gain, error) in (("0", first), ("1", second), ("0, 1", both))
    ]
    assert records.pairs_table(lines[2:4]).lines == []


def test_perplexity_is_drawn_of_each_seed_once(tmp_path, monkeypatch):
    """And models of other options have panels of their own."""
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure))
    lines = [
        bits("swa", {}, bits=x, seed=seed, options={"lr": lr}) for x, seed, lr in ((1, 0, 1), (4, 1, 1), (7, 0, 2))
    ]
    plots.plot_perplexity(lines, tmp_path)
    panels = [(axes.get_title(), *axes.lines[0].get_ydata()) for axes in drawn[0].axes]
    assert panels == [("swa (lr 1), seeds 0, 1", 2.5), ("swa (lr 2), seed 0", 7.0)]


def test_recall_is_drawn_with_what_tells_lines_apart(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure))
    plots.plot_recall([line(), line(options={"lr": 1})], tmp_path)
    labels = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert labels == ["swa+fwpkm (lr 0.001)", "swa+fwpkm (lr 1)"]


def test_losses_are_means_of_the_last_ten():
    assert plots.means_of_last([4.0, 2.0, 6.0]) == [4.0, 3.0, 4.0]
    assert plots.means_of_last([*range(30)])[-1] == sum(range(20, 30)) / 10
    assert plots.means_of_last([]) == []


#: Of associative recall.
ASKED = {
    "model": "swa", "seed": 0, "length": 256, "pairs": 8, "overwrite": True, "right": 30, "asked": 40, "stale": 3,
    "overwritten": 20, "controls_right": 1, "controls": 16, "chance": 1 / 64, "training_right": 0.5,
    "training_steps": 500, "training_cpu_seconds": 40.2,
}  # fmt: skip


def test_associative_recall_is_added_up():
    kept = {"overwrite": False, "overwritten": 0, "stale": 0}
    lines = [ASKED | {"seed": seed, "right": 30 + seed} | more for seed in (0, 2) for more in (kept, {})]
    lines[2:] = [x | {"training_cpu_seconds": 60.2} for x in lines[2:]]
    lines += [{**lines[0], "right": 40}, {**lines[0], "model": "gdn", "training_right": 0.1}]
    table = records.mqar_table(latest(lines))
    assert table.header[:4] == ["model", "overwritten", "seeds", "8 in 256"]
    assert table.lines == [
        ["swa", "no", "2", "90.0", "-", "6.2", "1.6", "50, 500 steps, 50 s of CPU"],
        ["swa", "yes", "2", "77.5", "15.0", "6.2", "1.6", "50, 500 steps, 50 s of CPU"],
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
    options = json.loads(json.dumps(dataclasses.asdict(train.Options("swa", "small", seed=1))))
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
        return train.Options(model, size, plan=(train.Phase(512, 2, steps), train.Phase(4096, 1, 3)))

    monkeypatch.setattr(train, "choose_size", choose)
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
