"""Every kernel compiles at the paper's sizes, without spills and with 128-bit moves of table rows; no GPU is needed.

The compiler runs in other processes: in this one the kernels may belong to Triton's interpreter.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.compiled import TABLE, TARGETS
from benchmarks.machine_code import Instruction, executed_instructions, occupancy
from benchmarks.traffic import KERNELS, Kernel

#: Instructions that a warp may execute at most, where a training chunk of the paper is compiled for sm_90.
MOST_EXECUTED = {"half_topk_kernel": 4900, "merge_kernel": 1200, "step_kernel": 460}


@pytest.fixture(scope="module")
def reports(request, tmp_path_factory):
    """What became of the kernels of some cases on a target."""
    target, cases = request.param
    path = tmp_path_factory.mktemp("compiled") / "reports.jsonl"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # A cache of its own: what is examined is what today's compiler makes of today's code.
    environment["TRITON_CACHE_DIR"] = str(path.parent / "cache")
    command = [sys.executable, "-m", "benchmarks.compiled", "--target", target, "--case", cases, "--json", str(path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads(line) for line in path.read_text().splitlines()]


#: By target: all cases on sm_90, elsewhere a few.
FEW = "^chunk/|^memory/rows$|^pool/decode$|/(paper|paper-bf16-table|static-pkm)$"
ALL_KERNELS = [(name, "" if name == "sm_90" else FEW) for name in TARGETS]


@pytest.mark.parametrize("reports", [("sm_90", "^chunk/training$")], ids=["sm_90"], indirect=True)
def test_a_training_chunk_spills_nothing_and_executes_no_more_than_it_did(reports):
    assert len(reports) > 20
    assert not [report for report in reports if report["stack"] > 0 or report["spills"] > 0]
    for moves in ("loads", "stores"):
        assert not [report for report in reports if report[f"wide_{moves}"] < report[f"expected_wide_{moves}"]]
    executed = {report["kernel"]: report["executed"] for report in reports}
    assert all(executed[name] <= most for name, most in MOST_EXECUTED.items())


@pytest.mark.slow
@pytest.mark.parametrize("reports", ALL_KERNELS, ids=TARGETS, indirect=True)
def test_no_spills_and_wide_moves_of_rows(reports):
    assert {report["kernel"] for report in reports} == set(KERNELS)
    spilled = [report for report in reports if report["stack"] > 0 or report["spills"] > 0]
    assert not spilled
    for moves in ("loads", "stores"):
        narrow = [report for report in reports if report[f"wide_{moves}"] < report[f"expected_wide_{moves}"]]
        assert not narrow
        # Of every kernel of rows there is a case in which a row has 128 bits for each lane.
        of_rows = {
            name for name, kernel in KERNELS.items() if getattr(kernel, moves) is not Kernel._field_defaults[moves]
        }
        if moves == "stores":  # of a program that writes 64 columns, so that several share a popular sub-key
            of_rows -= {"key_sum_kernel"}
            if reports[0]["target"] == "gfx942":  # whose waves are wider than these programs' rows
                of_rows -= {"step_grad_kernel"}
        assert {report["kernel"] for report in reports if report[f"expected_wide_{moves}"] > 0} == of_rows
    # It stores rows only, on either of two paths.
    segments = [report for report in reports if report["kernel"] == "segment_kernel"]
    assert not [report for report in segments if report["expected_wide_stores"] > 0 and report["narrow_stores"] > 0]
    lookups = [report for report in reports if report["kernel"] == "half_topk_kernel"]
    without = {report["case"] for report in lookups if report["tensor_core"] == 0}
    assert all("float64" in case or "ieee" in case for case in without)


def test_every_kernel_is_listed():
    sources = (Path(__file__).parents[1] / "fwpkm_kernels" / "kernels").glob("*.py")
    kernels = {
        name for source in sources for name in re.findall(r"^def (\w+_kernel)\(", source.read_text("utf-8"), re.M)
    }
    assert set(KERNELS) == kernels


def test_committed_table():
    section = re.search(r"^## sm_90$(.*?)^## ", TABLE.read_text("utf-8"), re.M | re.S)
    lines = [line.split(" | ") for line in section[1].splitlines() if line.startswith("| ")]
    head, *lines = lines
    assert {line[0].removeprefix("| ") for line in lines} == set(KERNELS), "python -m benchmarks.compiled --write"
    for line in lines:
        assert line[head.index("spills")] == "0"
        for moves in ("loads", "stores"):
            wide, expected, _ = map(int, line[head.index(moves)].split(" / "))
            assert wide >= expected


def test_occupancy():
    assert occupancy("sm_90", 32, 0, 4) == 1.0
    assert occupancy("sm_90", 255, 0, 8) == 0.125  # by registers: one program of eight warps, of 64
    assert occupancy("sm_90", 32, 0, 1) == 0.5  # 32 programs of one warp
    assert occupancy("sm_80", 32, 60 * 1024, 8) == 0.25  # two programs, by shared memory


def as_kernel(*lines: str) -> list[Instruction]:
    parts = [re.match(r"(?:@(\S+) )?(\S+)(.*)", line).groups() for line in lines]
    return [Instruction(16 * i, predicate or "", *rest) for i, (predicate, *rest) in enumerate(parts)]


def test_executed_instructions():
    step, test, again = "IADD3 R3, P4, R3, 0x10, RZ", "ISETP.GE.U32.AND P3, PT, R3, 0x30, PT", "@!P3 BRA 0x10"

    def of_loop(before: str, *body: str) -> int | None:
        return executed_instructions(as_kernel(before, *body, again, "EXIT", "NOP"))

    assert of_loop("CS2R R2, SRZ", step, test) == 1 + 3 * 3 + 1
    for below in ("IMAD.MOV.U32 R3, RZ, RZ, -0x10", "MOV R3, 0xfffffff0"):
        assert of_loop(below, step, test) == 1 + 4 * 3 + 1
    assert of_loop("MOV R3, RZ", test, step) == 1 + 4 * 3 + 1, "what it compares is not yet counted up"
    inner = ("MOV R5, RZ", "IADD3 R5, R5, 0x1, RZ", "ISETP.NE.AND P0, PT, R5, 0x7, PT", "@P0 BRA 0x20")
    assert of_loop("MOV R3, RZ", *inner, step, test) == 1 + 3 * (1 + 7 * 3 + 3) + 1
    for unknown in ("LDG.E R3, [R4.64]", "IADD3 R3, R4, 0x1, RZ", "S2R R4"):
        assert of_loop(unknown, step, test) is None
    assert executed_instructions(as_kernel("S2R R0", "@P3 BRA 0x20", "EXIT")) == 3, "a branch forwards"
    flag, copy = "UPLOP3.LUT UP0, UPT, UPT, UPT, UPT, 0x80, 0x0", "PLOP3.LUT P3, PT, PT, PT, UP0, 0x80, 0x0"
    assert of_loop(flag, copy, flag.replace("0x80", "0x40")) == 1 + 2 * 3 + 1
    assert of_loop(flag, copy, flag) is None, "it stays set"
