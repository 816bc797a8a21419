"""Launches that start before the ones that they depend on have ended: which do, and that they wait before anything."""

import inspect
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from fwpkm_kernels.kernels import _common, _direct, key_step, lookup, picks, scans, segments, streaming, update

MODULES = (key_step, lookup, picks, scans, segments, streaming, update)
KERNELS = {name: kernel for module in MODULES for name, kernel in vars(module).items() if name.endswith("_kernel")}
EARLY = sorted(name for name, kernel in KERNELS.items() if "PDL" in kernel.arg_names)


def test_all_that_a_step_launches_can_start_early():
    """One that did not would end the chain: its inputs, and so the next launch, would have to wait for it."""
    of_a_step = [
        "count",
        "enqueue",
        "half_topk",
        "hot_segment",
        "key_sum",
        "merge",
        "plan_chunk",
        "read",
        "read_to_queue",
    ]
    assert [f"{name}_kernel" for name in sorted([*of_a_step, "segment", "step", "usage"])] == EARLY


@pytest.mark.parametrize("name", EARLY)
def test_a_kernel_waits_first(name):
    fn = KERNELS[name].fn
    body = textwrap.dedent(inspect.getsource(fn)).partition('"""\n')[2]
    assert body.startswith("    wait_for_inputs(PDL)\n")


COMPILED = """
from benchmarks.cases import CASES
from benchmarks.machine_code import compile_launch
from benchmarks.record import recorded_launches

with recorded_launches() as noted:
    CASES["chunk/inference"]()
    CASES["chunk/decode"]()
for launch in {launch.name: launch for launch in noted if "PDL" in launch.kernel.arg_names}.values():
    launch.arguments["PDL"] = launch.options["launch_pdl"] = True
    ptx = compile_launch(launch, "sm_90").asm["ptx"]
    ptx = ptx[ptx.index(".entry") :]
    first = min(i for i in map(ptx.find, ("ld.global", "st.global", "cp.async")) if i >= 0)
    assert 0 < ptx.index("griddepcontrol.wait") < first, launch.name
    assert "griddepcontrol.launch_dependents" in ptx, launch.name
    assert not launch.kernel.used_global_vals, launch.name  # or each launch would go by Triton's Python
    print(launch.name)
"""


def test_compiled_kernels_wait_before_every_access():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    assert sorted(result.stdout.split()) == EARLY


@pytest.mark.parametrize(
    ("programs", "capability", "hip", "starts_early"),
    [
        (_common.FEW_WARPS // 4, (9, 0), None, True),
        (_common.FEW_WARPS // 4 + 1, (9, 0), None, False),
        (1, (10, 0), None, True),
        (1, (8, 9), None, False),
        (1, (9, 4), "6.0", False),
    ],
    ids=["at most so many warps", "more", "newer", "older", "another vendor"],
)
def test_which_launches_start_early(programs, capability, hip, starts_early, monkeypatch):
    given = []
    kernel = SimpleNamespace(arg_names=["x_ptr", "PDL"], fn=lambda: None)
    on = SimpleNamespace(get_device=lambda: 0, is_cuda=True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(_direct, "launch_compiled", lambda kernel, grid, device, args, options: given.append(options))
    _common.launch(kernel, (programs, 1), on=on, num_warps=4)
    assert given == [{"num_warps": 4, "PDL": starts_early}]


@pytest.mark.parametrize("starts_early", [False, True])
def test_triton_is_told(starts_early):
    kernel = mock.MagicMock()
    _direct.launch_by_triton(kernel, (1,), (), {"num_warps": 4, "PDL": starts_early})
    told = kernel[(1,)].call_args.kwargs
    assert told.get("launch_pdl", False) is starts_early
    assert told["PDL"] is starts_early
