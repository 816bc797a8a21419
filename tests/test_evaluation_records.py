"""The evaluation's lines of results: statistics, what is measured again and what is not, tables, plots."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")

from benchmarks.evaluation import needles, perplexity, plots, records, under_test
from benchmarks.evaluation.models import SIZES, memories_of
from benchmarks.evaluation.options import Options, build, options_of
from benchmarks.evaluation.records import append_lines, latest, stamp, summary, wilson
from benchmarks.evaluation.text import Corpus
from benchmarks.files import read_lines
from fwpkm_kernels._commands import CommandError
from fwpkm_kernels.layers import FastWeightProductKeyMemory
from tests.helpers.evaluation_lines import ASKED, bits, line

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
    options = Options(memory={"top_k": 4})
    found = json.loads(json.dumps(stamp(options)))
    assert options_of(found["options"]) == options
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
        monkeypatch.setattr(module, "load_trained", lambda *_: (model, Options(), state, CORPUS))
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
    memory = {"num_keys": 4, "top_k": 2, "key_dim": 8, "value_dim": 4, "chunk_size": 64, "query_conv": 2}
    size = dataclasses.replace(SIZES["miniature"], hidden_size=16, heads=1, kv_heads=1, head_dim=16, parameters=20_000)
    size = dataclasses.replace(size, memory=size.memory | memory)
    trained = build(Options(), size)
    corpus = Corpus(b"a text to train on " * 300, {"held out": b"another"})
    state = {"corpus": corpus.fingerprint, "step": Options().steps}
    monkeypatch.setattr(under_test, "load_model", lambda *_: (trained, Options(), state))
    monkeypatch.setattr(under_test, "corpus_of", lambda files: corpus)
    monkeypatch.setattr(under_test, "WARM_UP", 2 * 4096)
    torch.manual_seed(Options().seed)
    (unread,) = (memory.resized(16) for memory in memories_of(trained))
    model, *_ = under_test.load_trained(Path("runs/x"), "cpu", None, 16)
    (fresh,) = memories_of(model)
    assert (fresh.num_keys, fresh.table.num_slots, fresh.options.addressing_weight) == (16, 256, 0.0)
    assert (fresh.table.weight != unread.table.weight).any(1).sum() > 16  # it has read text
    assert not torch.equal(fresh.keys, unread.keys)
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
    monkeypatch.setattr(under_test, "load_model", lambda *_: (None, Options(), state))
    monkeypatch.setattr(under_test, "corpus_of", lambda files: CORPUS)
    with pytest.raises(CommandError, match=f"^runs/x has 3 of {Options().steps} steps"):
        under_test.load_trained(Path("runs/x"), "cpu")
    state["corpus"] = "another"
    with pytest.raises(CommandError, match="^runs/x was trained on another text"):
        under_test.load_trained(Path("runs/x"), "cpu")
