"""Rounding errors over many chunks stay what they are, and only the paper's step overshoots."""

import json

import pytest
import torch

errors = pytest.importorskip("benchmarks.errors", reason="needs tqdm")

SMALL = errors.Sizes(batch=1, chunk=16, top_k=4, num_keys=16, key_width=16, width=16)


def test_errors_do_not_grow_with_the_chunks(monkeypatch):
    """Where float64 gives the addresses, 64 chunks leave no more than a few times what 8 do; here twice, if that."""
    monkeypatch.setattr(errors, "TABLES", {"float32": torch.float32, "bfloat16": torch.bfloat16})
    rows = list(errors.growth(64, "paper", SMALL, 0, "cpu"))
    assert len(rows) == 2 * 64
    for name, unit in (("float32", 2**-24), ("bfloat16", 2**-9)):
        found = [row for row in rows if row["table"] == name]
        for what in ("output, same slots", "values, same slots"):
            early, late = (max(row[what] for row in part) for part in (found[:8], found[-8:]))
            assert unit / 16 < late < 4 * early, (name, what, early, late)
            assert late < 16 * unit, (name, what, late)
    # The memory as users run it, as far as it reads the same slots: the sub-keys drift by a rounding a chunk.
    for row in rows:
        if row["chunk"] <= 64 and row["table"] == "float32" and row["other slots"] == 0.0:
            assert row["keys"] < 1e-5, row
    assert sum(row["other slots"] for row in rows) / len(rows) < 0.01


def test_the_other_steps_stay_bounded_where_the_papers_overshoots(monkeypatch):
    monkeypatch.setattr(errors, "TEMPERATURES", (1.0, 0.01))
    rows = list(errors.overshoot(SMALL, 0, "cpu"))
    for row in rows:
        if row["tokens"] == 1:  # alone on its slots: the error is multiplied by 1 - α·Σw²
            taken = {"paper": row["J·Σw²"], "gradient": row["J·Σw²"] / SMALL.top_k, "normalized": 1.0}[row["step"]]
            factor = (1.0 - taken) ** 2
            assert row["after 1"] == pytest.approx(factor * row["before"], rel=1e-3, abs=1e-9)
        if row["step"] != "paper":
            assert row["after 10"] < 0.5 * row["before"], row
    worst = next(row for row in rows if (row["temperature"], row["step"], row["tokens"]) == (0.01, "paper", 16))
    assert worst["after 1"] > 3 * worst["before"]
    assert worst["after 10"] > 1e6 * worst["before"]


def test_a_narrow_table_stops_learning_where_steps_are_below_its_rounding(monkeypatch):
    """From then on nothing moves; float32 goes on."""
    monkeypatch.setattr(errors, "PASSES", (1, 64))
    monkeypatch.setattr(errors, "LEARNING_RATES", (0.3,))
    monkeypatch.setattr(errors, "TABLES", {"float32": torch.float32, "bfloat16": torch.bfloat16})
    narrow = SMALL._replace(num_keys=64)
    last = {row["table"]: row for row in errors.learning(narrow, 0, "cpu") if row["passes"] == 64}
    assert last["float32"]["error"] == pytest.approx(last["float64"]["error"], rel=1e-3)
    assert last["bfloat16"]["moved"] < 0.5 * last["float32"]["moved"]
    assert last["float64"]["error"] < last["bfloat16"]["error"] < last["float64"]["error"] + 0.1


def test_the_report_has_every_number(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(errors, "Sizes", lambda: SMALL)
    monkeypatch.setattr(errors, "PASSES", (1, 2))
    monkeypatch.setattr(errors, "TEMPERATURES", (0.1,))
    monkeypatch.setattr("sys.argv", ["errors", "--chunks", "2", "--out", str(tmp_path)])
    errors.main()
    rows = [json.loads(line) for line in (tmp_path / "errors_cpu.jsonl").read_text().splitlines()]
    assert {row["experiment"] for row in rows} == {"growth", "learning", "overshoot"}
    assert (tmp_path / "errors_cpu.png").stat().st_size > 1000
    text = capsys.readouterr().out
    assert text.count("| bfloat16 |") == 2 * len(errors.STEPS) + len(errors.LEARNING_RATES), (
        "two ranges of chunks for each step"
    )


def test_given_addresses_are_those_of_the_memory():
    """`write_given` is the memory's own read and write: in float64 the same numbers."""
    generator = torch.Generator().manual_seed(0)
    start = errors.make_memory(SMALL, generator, "cpu")
    queries, targets = next(errors.make_chunks(1, SMALL._replace(batch=2), generator, "cpu"))
    for step in errors.STEPS:
        options = {"chunk_size": SMALL.chunk, "top_k": SMALL.top_k, "boundary": "drop", "step": step}
        found = errors.fast_weight_memory(queries, targets, *start, **options)
        table = start.values.clone()
        slots, weights = found.slots.flatten(0, 1), found.weights.flatten(0, 1)
        output = errors.write_given(table, slots, weights, targets, step)
        torch.testing.assert_close(output, found.output.flatten(0, 1))
        torch.testing.assert_close(table, found.values)
