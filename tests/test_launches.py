"""What a chunk launches and moves, counted on meta tensors: a launch or a pass too many fails here.

The count of the memory runs in another process: in this one the kernels may belong to Triton's interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fwpkm_kernels
from benchmarks import launches
from benchmarks.launches import DECODE, FIXED_FLOORS, INFERENCE, TABLE_BYTES, TRAINING
from benchmarks.traffic import Traffic, distinct, hot

#: For a chunk or step: launches, and bytes over those of the floor; for a sequence: launches.
BOUNDS = {
    TRAINING[0]: (9, 1.24, 12),
    # Of it 8 MB are a gradient of queries that one kernel leaves for the next, which spares 67 MB from the cache.
    TRAINING[1]: (10, 1.31, 8),
    INFERENCE: (12, 1.37, 0),
    DECODE: (4, 1.04, 0),
}


def counted(function) -> dict[str, Traffic]:
    return {count.name: count.traffic for count in launches.count(function)}


def test_of_a_chunk(tmp_path):
    path = tmp_path / "launches.jsonl"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.launches", "--json", str(path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    totals = {row["work"]: row for row in rows if row["stage"] == "total"}
    assert set(totals) == set(BOUNDS)
    for work, (most, ratio, once) in BOUNDS.items():
        row = totals[work]
        assert row["kernels"] + row["operators"] <= most + 1e-6, (work, row)
        assert 1.0 <= (row["read"] + row["written"]) / row["floor"] <= ratio, (work, row)
        assert row["fixed_launches"] <= once + 1e-6, (work, row)
        assert row["fixed_bytes"] <= 1.02 * FIXED_FLOORS.get(work, 0) / 1e6, (work, row)
    # Nothing of the table's size moves but in copying it or setting up its gradient.
    assert all(row["read"] + row["written"] < TABLE_BYTES / 1e6 for row in rows if row["work"] != "total")
    # The read of a chunk by hand: 4104 rows of 8 picks, their targets, outputs and errors, slots and weights.
    (read,) = (row for row in rows if row["work"] == TRAINING[0] and row["stage"] == "read")
    met = distinct(4104 * 8, 2**18) * 2048
    assert read["read"] == pytest.approx((met + 4096 * 2048 + 4104 * 8 * 12) / 1e6, rel=1e-3)
    assert read["written"] == pytest.approx((4096 + 4104) * 2048 / 1e6, rel=1e-3)
    assert read["again"] == pytest.approx((4104 * 8 * 2048 - met) / 1e6, rel=1e-3)


def test_stages_name_functions_of_the_package():
    """What a function that has another name launches would count as around all stages."""
    sources = "".join(path.read_text("utf-8") for path in Path(fwpkm_kernels.__file__).parent.rglob("*.py"))
    for function in (function for functions in launches.STAGES.values() for function in functions):
        assert f"\ndef {function}(" in sources, function


def test_of_operators():
    x, y = (torch.empty(10, 4, device="meta") for _ in range(2))
    slots = torch.empty(3, dtype=torch.int64, device="meta")
    assert counted(lambda: x + y) == {"add": Traffic(320, 160)}
    assert counted(lambda: x + x) == {"add": Traffic(160, 160)}, "one tensor is read once"
    assert counted(lambda: x + y[:1].expand(10, 4)) == {"add": Traffic(176, 160)}
    assert counted(lambda: x.view(40)[3:].unsqueeze(0)) == {}, "views launch nothing"
    assert counted(lambda: torch.empty_like(x)) == {}
    assert counted(lambda: x.copy_(y)) == {"copy_": Traffic(160, 160)}
    assert counted(lambda: x.add_(y)) == {"add_": Traffic(320, 160)}
    assert counted(lambda: x[slots]) == {"index": Traffic(3 * 16 + 24, 3 * 16)}
    assert counted(lambda: x[0].index_fill_(0, slots, 1)) == {"index_fill_": Traffic(24, 12)}


def test_distinct_rows():
    assert distinct(1, 100) == pytest.approx(1.0)
    assert distinct(5, 1) == 1
    slots = torch.randint(1000, (200, 700), generator=torch.Generator().manual_seed(0))
    mean = sum(len(x.unique()) for x in slots) / 200
    assert distinct(700, 1000) == pytest.approx(mean, rel=0.01)


def test_hot_segments():
    slots = torch.randint(32, (200, 320), generator=torch.Generator().manual_seed(0))
    lengths = torch.stack([torch.bincount(x, minlength=32) for x in slots])
    is_hot = lengths >= 12
    segments, pieces = hot(320, 32, 6)
    assert segments == pytest.approx(is_hot.sum().item() / 200, rel=0.05)
    assert pieces == pytest.approx((lengths // 6)[is_hot].sum().item() / 200, rel=0.05)
