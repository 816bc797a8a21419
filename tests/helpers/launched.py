"""Cases of test_host.py, each for a process of its own in which kernels are compiled; and a small kernel for them."""

import importlib
import sys
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton import knobs

from benchmarks import host
from benchmarks.record import on_meta, recorded_launches
from fwpkm_kernels import fast_weight_memory
from fwpkm_kernels.kernels import _common, _direct


@triton.jit(do_not_specialize=["N"])
def scale_kernel(x_ptr, out_ptr, stride, N, factor: tl.float64, BLOCK: tl.constexpr, ROUND: tl.constexpr):
    """out = factor·x, or that rounded down. A program owns BLOCK elements. Grid: (tiles,)."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets * stride, mask=offsets < N).to(tl.float64) * factor
    if ROUND:
        x = tl.floor(x)
    tl.store(out_ptr + offsets, x.to(out_ptr.dtype.element_ty), mask=offsets < N)


def compare_options() -> None:
    """Forward and backward with other branches, dtypes and layouts."""
    # Kernels that do nothing leave slots as they are, and operators of PyTorch read these.
    zeros = mock.patch.multiple(torch, empty=torch.zeros, empty_like=torch.zeros_like)
    with host.stand_in() as driver, host.compared(driver) as names, zeros:
        for options in (
            {"clip": 0.1, "weight_decay": 0.1, "score": "dot"},
            {"lookahead": 2, "boundary": "drop", "step": "normalized", "weighting": "silu", "temperature": 2.0},
            {"addressing_weight": 0.0, "lookahead": 0, "weighting": "relu", "step": "gradient"},
        ):
            forward, backward = host.training(**options)
            backward(forward())
    assert len({*names}) > 15, {*names}


def compare_arguments() -> None:
    """One kernel, whose arguments differ one at a time in what Triton compiles for."""
    x = torch.zeros(64)
    usual = {"x": x, "out": torch.zeros(64), "stride": 2, "N": 40, "factor": 0.5, "BLOCK": 16, "ROUND": False}

    def scale(grid: tuple[int, ...] = (3,), num_warps: int = 1, **changed: Any) -> None:
        a = usual | changed
        constants = {name: a[name] for name in changed.get("order", ("BLOCK", "ROUND"))}
        arguments = (a["x"], a["out"], a["stride"], a["N"], a["factor"])
        _common.launch(scale_kernel, grid, *arguments, **constants, num_warps=num_warps, on=a["x"])

    changes: list[dict[str, Any]] = [
        {},
        {"grid": (2, 3)},
        {"grid": (2, 1, 4)},
        {"x": x[4:]},
        {"x": x[1:]},
        {"out": x[1:]},
        {"x": x[1:], "out": x[1:]},
        {"x": x.half()},
        {"x": x.to(torch.int32)},
        {"out": x.double()},
        *({"stride": stride} for stride in (0, 1, 3, 16, 17, 32, 2**31 - 1, 2**31, 2**40, -1, -16, -(2**31), -(2**33))),
        *({"N": n} for n in (0, 1, 16, 2**31 - 1, 2**31, 2**63 - 1, -1)),
        *({"factor": factor} for factor in (1.0, 1e-300, float("nan"), 2)),
        {"BLOCK": 32},
        {"ROUND": True},
        {"num_warps": 2},
        {"BLOCK": 2, "num_warps": 2},
        {"BLOCK": 2, "num_warps": 2, "order": ("ROUND", "BLOCK")},
    ]
    with host.stand_in() as driver:
        functions = []
        for change in changes * 2:
            with driver.recorded() as launches:
                with mock.patch.object(_direct, "SUPPORTED", False):
                    scale(**change)
                for _ in range(3):
                    scale(**change)
            assert len({*launches}) == 1, (change, launches)
            functions.append(launches[0].function)
        assert len({*functions}) >= 15, len({*functions})
        # What is usual was direct by then: Triton's Python sees none of it.
        with mock.patch.object(_direct, "launch_by_triton", side_effect=AssertionError):
            for change in changes:
                if not any(not 0 <= change.get(name, 0) < 2**31 for name in ("stride", "N")):
                    scale(**change)


def watch() -> None:
    """Hooks and debugging modes see every launch; another device, and a kernel that is loaded again, are their own."""
    launched = sys.modules[__name__]
    x = torch.zeros(64)

    def scale() -> None:
        _common.launch(launched.scale_kernel, (1,), x, x, 1, 8, 1.0, BLOCK=16, ROUND=False, num_warps=1, on=x)

    def by_triton() -> bool:
        with mock.patch.object(_direct, "launch_by_triton", wraps=_direct.launch_by_triton) as seen:
            scale()
        return seen.called

    with host.stand_in() as driver:
        assert by_triton()
        scale()
        assert not by_triton()

        seen: list[Any] = []
        knobs.runtime.launch_enter_hook.add(seen.append)
        assert by_triton()
        assert len(seen) == 1
        knobs.runtime.launch_enter_hook.remove(seen.append)
        knobs.runtime.launch_exit_hook.add(seen.append)
        assert by_triton()
        knobs.runtime.launch_exit_hook.remove(seen.append)
        assert len(seen) == 2
        for owner, name, value in ((knobs.runtime, "debug", True), (knobs.compilation, "instrumentation_mode", "x")):
            with (
                mock.patch.object(owner, name, value, create=True),
                mock.patch.object(_direct, "launch_by_triton") as patched,
            ):
                scale()
            assert patched.called, name
        with mock.patch.object(triton.JITFunction, "run") as noted:
            scale()
        assert noted.called
        launched.scale_kernel.add_pre_run_hook(lambda *args, **options: seen.append(args))
        assert by_triton()
        assert len(seen) == 3
        launched.scale_kernel.pre_run_hooks.clear()
        assert not by_triton()

        with driver.recorded() as launches:
            scale()
            with (
                mock.patch.object(torch.Tensor, "get_device", return_value=1),
                mock.patch.object(torch.cuda, "current_device", return_value=1),
                mock.patch.object(triton.runtime.driver.active, "get_current_device", return_value=1),
            ):
                scale()
                scale()
        assert launches[0].function != launches[1].function == launches[2].function

        old = launched.scale_kernel
        importlib.reload(launched)
        assert launched.scale_kernel is not old
        assert by_triton()
        scale()
        assert not by_triton()
        launched.scale_kernel._unsafe_update_src(launched.scale_kernel.src.replace("factor", "factor * 2.0", 1))
        assert by_triton()


class NoHost(TorchDispatchMode):
    """Refuses operators whose result the host waits for, or that read what the host holds."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        assert torch.Tag.data_dependent_output not in func.tags, func
        assert torch.Tag.dynamic_output_shape not in func.tags, func
        assert all(x.is_meta for x in tensors), func
        return result


def train_without_host() -> None:
    """Forward and backward of a sequence on tensors that hold nothing: nothing in them may depend on a value."""
    shapes = {
        "queries": (2, 20, 1, 16),
        "targets": (2, 20, 8),
        "keys": (1, 2, 16, 8),
        "values": (256, 8),
        "gates": (2, 20),
    }
    for options in (
        {},
        {"clip": 0.1, "weight_decay": 0.1, "score": "dot"},
        {"boundary": "drop", "step": "normalized", "weighting": "silu", "temperature": 2.0},
        {"addressing_weight": 0.0, "lookahead": 0, "weighting": "relu", "step": "gradient"},
        {"top_k": 1, "chunk_size": 2},  # keeps a row for each pick
    ):
        for masked in (False, True):
            inputs = {name: torch.empty(shape, device="meta", requires_grad=True) for name, shape in shapes.items()}
            mask = torch.empty(2, 20, device="meta") if masked else None
            with on_meta(), recorded_launches() as launches, NoHost():
                output = fast_weight_memory(**inputs, mask=mask, **{"chunk_size": 8, "top_k": 4} | options).output
                torch.autograd.grad(output, list(inputs.values()), torch.empty_like(output), allow_unused=True)
            assert len(launches) > 20
