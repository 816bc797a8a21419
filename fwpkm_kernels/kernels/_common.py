"""Shared by all kernel files: order-preserving integers for top-k, and launches on the device of a tensor."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _direct


@triton.jit
def to_ordered(x, HAS_NAN: tl.constexpr = True):
    """Map floats to integers of the same width that sort the same way: NaN highest, -0.0 equal to 0.0.

    No float maps to the lowest integer, which therefore marks "taken" and "out of range" in a top-k. Without HAS_NAN
    the integers of NaN are any.
    """
    is_nan = x != x
    bits = tl.where(x == 0, 0.0, x).to(tl.int64 if x.dtype == tl.float64 else tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ highest(bits), bits)
    return tl.where(is_nan, highest(bits), bits) if HAS_NAN else bits


@triton.jit
def from_ordered(bits):
    """Inverse of `to_ordered`, up to the sign of zero and the payload of NaN."""
    bits = tl.where(bits < 0, bits ^ highest(bits), bits)
    return bits.to(tl.float64 if bits.dtype == tl.int64 else tl.float32, bitcast=True)


@triton.jit
def highest(bits):
    """The integer that `to_ordered` makes of NaN, for ordered integers like `bits`."""
    return 0x7FFFFFFFFFFFFFFF if bits.dtype == tl.int64 else 0x7FFFFFFF


@triton.jit
def lowest(bits):
    """The integer that `to_ordered` makes of no float, for ordered integers like `bits`."""
    return -0x8000000000000000 if bits.dtype == tl.int64 else -0x80000000


@triton.jit
def take_best(bits, offs):
    """Largest entry of each row, the lowest column among equals: (its bits, its column, the rows without it).

    `bits` are [ROWS, COLUMNS], or [COLUMNS] of one row; the first two results have one column. `offs` are the columns
    that the entries stand for: [1 or ROWS, COLUMNS] or [COLUMNS], different in each row.
    """
    axis: tl.constexpr = len(bits.shape) - 1
    best = tl.max(bits, axis=axis, keep_dims=True)
    column = tl.min(tl.where(bits == best, offs, 0x7FFFFFFF), axis=axis, keep_dims=True)
    return best, column, tl.where(offs == column, lowest(bits), bits)


@triton.jit
def take_top(bits, columns, COUNT, BLOCK_K: tl.constexpr):
    """The COUNT largest entries of each row, their columns, and what is left, as in `take_best`.

    The first two are [ROWS, BLOCK_K] or [BLOCK_K], COUNT <= BLOCK_K.
    """
    offs_k = tl.arange(0, BLOCK_K)
    if len(bits.shape) == 1:
        best = tl.zeros([BLOCK_K], bits.dtype)
    else:
        best = tl.zeros([bits.shape[0], BLOCK_K], bits.dtype)
        offs_k = offs_k[None, :]
    best_columns = best.to(tl.int32)
    for i_k in range(COUNT):
        bit, column, bits = take_best(bits, columns)
        best = tl.where(offs_k == i_k, bit, best)
        best_columns = tl.where(offs_k == i_k, column, best_columns)
    return best, best_columns, bits


@triton.jit
def in_order(bits, columns, NUM_KEYS: tl.constexpr, TOP_K: tl.constexpr, BLOCK_R: tl.constexpr):
    """The first TOP_K of `bits` and their `columns`, [BLOCK_R], largest first, the lower column among equals."""
    offs_r = tl.arange(0, BLOCK_R)
    bits = tl.where(offs_r < TOP_K, bits, lowest(bits))
    columns = tl.where(offs_r < TOP_K, columns, NUM_KEYS + offs_r)
    if BLOCK_R > 64:  # a comparison of all with all would fill the registers
        best, best_columns, _ = take_top(bits, columns, TOP_K, BLOCK_R)
        return best, best_columns
    is_larger = bits[None, :] > bits[:, None]  # [BLOCK_R, BLOCK_R]
    is_before = is_larger | ((bits[None, :] == bits[:, None]) & (columns[None, :] < columns[:, None]))
    rank = tl.sum(is_before.to(tl.int32), axis=1)  # [BLOCK_R]
    source = tl.sum(tl.where(rank[:, None] == offs_r[None, :], offs_r[:, None], 0), axis=0)  # [BLOCK_R]
    return tl.gather(bits, source, 0), tl.gather(columns, source, 0)


def row_warps(block_d: int, dtype: torch.dtype) -> int:
    """Warps for a kernel whose tiles are whole rows of `dtype`: as many as keep 128 bits of a row for every lane."""
    lanes = 64 if torch.version.hip is not None else 32
    return max(1, min(8, block_d * dtype.itemsize // (16 * lanes)))


#: The most programs of a launch: Triton multiplies the axes in 32 bits, and silently launches none on overflow.
MOST_PROGRAMS = 2**31 - 1


def check_grid(kernel: Any, grid: tuple[int, ...]) -> None:
    """Refuse more programs than one launch takes. A launcher of two kernels asks before the first one writes."""
    x, y, z = (*grid, 1, 1)[:3]
    if x * y * z > MOST_PROGRAMS or y > 65535 or z > 65535:
        raise ValueError(f"{grid} programs are too many for one launch of {kernel.fn.__name__}: pass less at a time")


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """The first statement of a kernel with PDL: what it reads is written when the launches before it have ended.

    "Programmatic dependent launch": the programs of such a launch start before that, and the next launch may start when
    all of them have, so that neither waits for the GPU to be told. Nothing may be read or written before this.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


#: Warps of a launch up to which it starts early: half of those that an H100 holds. With all launches early, graphs of
#: one and of eight chunks of 512 tokens took 14 and 12 % less time on an H200, but backward of 8×512 6 % more: where
#: launches fill the GPU, programs that wait take the place of those that they wait for.
FEW_WARPS = 132 * 32


def has_pdl(kernel: Any, device: int) -> bool:
    """Whether a GPU can start a launch before those that it depends on have ended: sm_90 and newer.

    A kernel keeps the answers as its own attribute, since torch takes microseconds for each.
    """
    known: dict[int, bool] | None = getattr(kernel, "fwpkm_has_pdl", None)
    if known is None:
        known = kernel.fwpkm_has_pdl = {}
    if device not in known:
        is_nvidia = torch.version.hip is None and hasattr(getattr(tl.extra, "cuda", None), "gdc_wait")
        known[device] = is_nvidia and torch.cuda.get_device_capability(device) >= (9, 0)
    return known[device]


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, on: Tensor, **options: Any) -> None:
    """Run `kernel` on the device of tensor `on`, which need not be the current one; without programs nothing runs.

    A kernel with the constant PDL starts early where its launch is small and the GPU can do that.
    """
    if 0 in grid:
        return
    check_grid(kernel, grid)
    device = on.get_device()  # -1 of a CPU tensor
    if "PDL" in kernel.arg_names:
        is_small = math.prod(grid) * options["num_warps"] <= FEW_WARPS
        options["PDL"] = is_small and on.is_cuda and device >= 0 and has_pdl(kernel, device)
    if on.is_cuda and device != torch.cuda.current_device():  # entering its context takes several microseconds
        with torch.cuda.device(device):
            _direct.launch_compiled(kernel, grid, device, args, options)
    else:
        _direct.launch_compiled(kernel, grid, device, args, options)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n, of n >= 1. Triton's own takes 25 times as long."""
    return 1 << (n - 1).bit_length()


def cdiv(n: int, size: int) -> int:
    """How many pieces of `size` hold n. Triton's own takes 25 times as long."""
    return -(-n // size)


#: Whether the kernels run in Triton's interpreter, on CPU tensors: decided once, when Triton is imported.
INTERPRETED = not isinstance(to_ordered, triton.JITFunction)


@triton.jit
def load_rows(table_ptr, rows_ptr, offs_j, mask_j, offs_d, mask_d, stride_n, stride_d, DTYPE: tl.constexpr):
    """The rows of a table that `rows_ptr` names for picks `offs_j`: [BLOCK_J, BLOCK_D], 0 outside of the masks."""
    row = tl.load(rows_ptr + offs_j, mask=mask_j, other=0).to(tl.int64)  # [BLOCK_J]
    pointers = table_ptr + row[:, None] * stride_n + offs_d[None, :] * stride_d
    return tl.load(pointers, mask=mask_j[:, None] & mask_d[None, :], other=0.0).to(DTYPE)
