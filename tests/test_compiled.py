"""Every kernel compiles at the paper's sizes, without spills and with 128-bit loads of table rows; no GPU is needed.

The compiler runs in other processes: in this one the kernels may belong to Triton's interpreter.
"""

import collections
import json
import os
import subprocess
import sys

import pytest

from benchmarks.compiled import TARGETS


@pytest.fixture(scope="module")
def reports(request, tmp_path_factory):
    """What became of every kernel on one target: in all cases on sm_90, elsewhere in a few."""
    path = tmp_path_factory.mktemp("compiled") / "reports.jsonl"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # A cache of its own: what is examined is what today's compiler makes of today's code.
    environment["TRITON_CACHE_DIR"] = str(path.parent / "cache")
    command = [sys.executable, "-m", "benchmarks.compiled", "--target", request.param, "--json", str(path)]
    if request.param != "sm_90":
        command += ["--case", "/(paper|paper-bf16-table|static-pkm)$"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads(line) for line in path.read_text().splitlines()]


SM_90 = pytest.param("sm_90")
OTHERS = [pytest.param(target, marks=pytest.mark.slow) for target in TARGETS if target != "sm_90"]


@pytest.mark.parametrize("reports", [SM_90, *OTHERS], indirect=True)
def test_no_spills_and_wide_loads_of_rows(reports):
    kernels = collections.Counter(report["kernel"] for report in reports)
    assert set(kernels) == {
        "half_topk_kernel",
        "merge_kernel",
        "half_grad_kernel",
        "count_kernel",
        "place_kernel",
        "pick_sums_kernel",
        "step_kernel",
        "score_grad_kernel",
        "gather_kernel",
        "segment_kernel",
        "hot_segment_kernel",
        "decay_kernel",
        "read_kernel",
        "read_grad_kernel",
        "restore_kernel",
        "weigh_kernel",
        "plan_kernel",
        "fold_kernel",
        "weigh_again_kernel",
        "fold_grad_kernel",
        "sum_reads_kernel",
    }
    spilled = [report for report in reports if report["stack"] > 0]
    assert not spilled
    narrow = [report for report in reports if report["wide_loads"] < report["expected_wide_loads"]]
    assert not narrow
    row_kernels = {
        "merge_kernel",
        "half_grad_kernel",
        "step_kernel",
        "gather_kernel",
        "segment_kernel",
        "read_kernel",
        "read_grad_kernel",
        "restore_kernel",
    }
    assert {report["kernel"] for report in reports if report["expected_wide_loads"] > 0} == row_kernels
    lookups = [report for report in reports if report["kernel"] == "half_topk_kernel"]
    without = {report["case"] for report in lookups if report["tensor_core"] == 0}
    assert without <= {"lookup/paper-float64", "lookup/paper-ieee"}
