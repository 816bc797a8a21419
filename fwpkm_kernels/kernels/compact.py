"""Rows between a table and an array of them: gathered, or written back."""

import triton
import triton.language as tl
from torch import Tensor

from ._common import cdiv, launch, next_power_of_2, row_warps


@triton.jit(do_not_specialize=["R"])
def copy_rows_kernel(
    source_ptr, slots_ptr, out_ptr,
    stride_sn, stride_sd, stride_on, stride_od,
    N, R,
    D: tl.constexpr, PUT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """out[r] = source[slots[r]], and 0 where the slot is -1. With PUT out[slots[r]] = source[r], and nothing there.

    The table has N rows; under TRITON_DEBUG slots outside [-1, N) stop the program, which owns BLOCK_R rows.
    Grid: (row tiles,).
    """
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_r = offs_r < R
    mask_d = offs_d < D
    slot = tl.load(slots_ptr + offs_r, mask=mask_r, other=-1).to(tl.int64)  # [BLOCK_R]
    tl.device_assert((slot >= -1) & (slot < N), "`slot` must lie in [-1, N)")
    used = slot >= 0
    source_row = offs_r if PUT else slot
    out_row = slot if PUT else offs_r
    stored = used if PUT else mask_r
    pointers = source_ptr + source_row[:, None] * stride_sn + offs_d[None, :] * stride_sd  # [BLOCK_R, BLOCK_D]
    rows = tl.load(pointers, mask=used[:, None] & mask_d[None, :], other=0.0)
    out = out_ptr + out_row[:, None] * stride_on + offs_d[None, :] * stride_od
    tl.store(out, rows, mask=stored[:, None] & mask_d[None, :])


def copy_rows(source: Tensor, slots: Tensor, out: Tensor, *, put: bool) -> None:
    """Launch out[r] = source[slots[r]] of a table `source`; with `put` out[slots[r]] = source[r] of a table `out`.

    Both are of one dtype, and `slots` [R] are contiguous. Where one is -1, a gathered row is 0 and nothing is put. With
    `put` no slot occurs twice.
    """
    width = source.shape[1]
    if slots.numel() == 0 or width == 0:
        return
    block_d = next_power_of_2(width)
    block_r = max(1, 2048 // block_d)
    launch(
        copy_rows_kernel, (cdiv(slots.numel(), block_r),),
        source, slots, out,
        *source.stride(), *out.stride(),
        len(out if put else source), slots.numel(),
        D=width, PUT=put, BLOCK_R=block_r, BLOCK_D=block_d,
        num_warps=max(4, row_warps(block_d, source.dtype)), on=source,
    )
