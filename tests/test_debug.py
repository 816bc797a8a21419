"""TRITON_DEBUG: kernels stop at slots that are out of range; without it nothing of that is in them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fwpkm_kernels import testing
from fwpkm_kernels.plan import plan_segments
from tests.conftest import HAS_GPU

ROOT = Path(__file__).resolve().parent.parent

COMPILE = r"""
import json, re, sys
from benchmarks import machine_code, record
from benchmarks.cases import CASES
for case in ("gather/paper", "update/paper"):
    with record.recorded_launches() as launches:
        CASES[case]()
    for launch in launches:
        if launch.name not in ("gather_kernel", "segment_kernel"):
            continue
        for debug in (False, True):
            launch.options["debug"] = debug
            kernel = machine_code.compile_launch(launch, "sm_90")
            body = kernel.asm["ttir"].split("tt.func", 1)[1].split("{", 1)[1]
            print(json.dumps({
                "kernel": launch.name,
                "debug": debug,
                "asserts": kernel.asm["ptx"].count("call.uni __assertfail") + kernel.asm["ptx"].count("__assertfail,"),
                "reads_n": bool(re.search(r"%N\b", re.sub(r"loc\(.*", "", body))),
            }))
"""


def test_asserts_are_compiled_under_debug_only():
    """For sm_90; without debug not even the number of rows is read, so the kernel is as it was without the check."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert {report["kernel"] for report in reports} == {"gather_kernel", "segment_kernel"}
    for report in reports:
        assert (report["asserts"] > 0) == report["reads_n"] == report["debug"], report


@pytest.fixture
def debugged_interpreter(monkeypatch):
    """The interpreter looks at no environment; its options say whether it checks what a kernel asserts."""
    if HAS_GPU:
        pytest.skip("kernels are compiled here")
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(debug=True))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("slot", [-1, 12])
def test_kernels_stop_at_slots_out_of_range(slot, dtype, debugged_interpreter):
    """The launchers; the public functions do not get that far with CPU tensors. Three picks: a lane is masked."""
    from fwpkm_kernels.kernels.gather import gather
    from fwpkm_kernels.kernels.segments import segment_rows

    values, slots, weights = testing.make_gather_inputs(2, 3, 12, 5)
    slots = slots.to(dtype)
    out = torch.zeros_like(values)
    vectors = torch.ones(2, 5)
    gather(values, slots, weights=weights, vectors=vectors)
    segment_rows(out, vectors, weights, plan_segments(slots, 12))
    steps = torch.zeros(6, 5)
    segment_rows(steps, vectors, weights, plan_segments(slots, 12), compact=True)  # more rows than `steps` has
    slots[1, 2] = slot
    for options in ({"weights": weights}, {"vectors": vectors}):
        with pytest.raises(Exception, match=r"`slots` must lie in \[0, N\)"):
            gather(values, slots, **options)
    for options in ({}, {"epilogue": "update"}, {"epilogue": "add"}):
        with pytest.raises(Exception, match=r"`slots` must lie in \[0, N\)"):
            segment_rows(out, vectors, weights, plan_segments(slots, 12), **options)


OUT_OF_RANGE = """
import torch
from fwpkm_kernels import chunk_value_update_, sparse_value_gather
values = torch.zeros(64, 16, device="cuda")
slots = torch.arange(32, device="cuda").view(8, 4)
weights, rows = torch.ones(8, 4, device="cuda"), torch.ones(8, 16, device="cuda")
def run(slots):
    if {write}:
        chunk_value_update_(values, slots, weights, rows, rows)
    else:
        sparse_value_gather(values, slots, weights)
    torch.cuda.synchronize()
run(slots)
print("in range", flush=True)
run(slots + 33)
"""


@pytest.mark.gpu
@pytest.mark.parametrize("write", [False, True], ids=["gather", "write"])
def test_a_gpu_stops_at_slots_out_of_range(write):
    """In a process of its own, whose GPU context does not outlive it."""
    environment = os.environ | {"TRITON_DEBUG": "1"}
    command = [sys.executable, "-c", OUT_OF_RANGE.format(write=write)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.stdout.startswith("in range"), done.stderr[-4000:]
    assert done.returncode != 0
    assert "must lie in [0, N)" in done.stdout + done.stderr
