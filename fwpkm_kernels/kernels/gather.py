"""Sparse value gather: weighted sums of table rows, and dot products of a vector with table rows, in one kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import compute_dtype
from ._common import launch, next_power_of_2, row_warps


@triton.jit(do_not_specialize=["N"])
def gather_kernel(
    values_ptr, slots_ptr, weights_ptr, vectors_ptr, out_ptr, dots_ptr,
    stride_vn, stride_vd, stride_sm, stride_sj, stride_wm, stride_wj, stride_xm, stride_xd,
    factor: tl.float64, N,
    J: tl.constexpr, D: tl.constexpr, HAS_SUM: tl.constexpr, HAS_DOTS: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """out[m] = factor·Σ_j weights[m, j]·values[slots[m, j]];  dots[m, j] = factor·<vectors[m], values[slots[m, j]]>.

    A program owns one token m and reads each of its rows once for both. Under TRITON_DEBUG slots outside [0, N) stop
    it. Grid: (tokens,).
    """
    i_m = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = tl.float64 if values_ptr.dtype.element_ty == tl.float64 else tl.float32
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_d = offs_d < D
    scale = tl.full([], factor, dtype)
    total = tl.zeros([BLOCK_D], dtype)
    if HAS_DOTS:
        vector = tl.load(vectors_ptr + i_m * stride_xm + offs_d * stride_xd, mask=mask_d, other=0.0).to(dtype)
    for start in range(0, J, BLOCK_J):
        offs_j = start + tl.arange(0, BLOCK_J)
        mask_j = offs_j < J
        slot = tl.load(slots_ptr + i_m * stride_sm + offs_j.to(tl.int64) * stride_sj, mask=mask_j, other=0)  # [BLOCK_J]
        tl.device_assert((slot >= 0) & (slot < N) | (offs_j >= J), "`slots` must lie in [0, N)")
        rows = tl.load(
            values_ptr + slot.to(tl.int64)[:, None] * stride_vn + offs_d[None, :] * stride_vd,
            mask=mask_j[:, None] & mask_d[None, :], other=0.0,
        ).to(dtype)  # [BLOCK_J, BLOCK_D]
        if HAS_SUM:
            weight = tl.load(
                weights_ptr + i_m * stride_wm + offs_j.to(tl.int64) * stride_wj, mask=mask_j, other=0.0
            ).to(dtype)
            total += tl.sum(weight[:, None] * rows, axis=0)
        if HAS_DOTS:
            dot = scale * tl.sum(rows * vector[None, :], axis=1)  # [BLOCK_J]
            tl.store(dots_ptr + i_m * J + offs_j, dot.to(dots_ptr.dtype.element_ty), mask=mask_j)
    if HAS_SUM:
        tl.store(out_ptr + i_m * D + offs_d, (scale * total).to(out_ptr.dtype.element_ty), mask=mask_d)


def gather(
    values: Tensor, slots: Tensor,
    *, weights: Tensor | None = None, vectors: Tensor | None = None, sum_dtype: torch.dtype | None = None,
    dots_dtype: torch.dtype | None = None, factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Launch the weighted sums [M, D] (given `weights` [M, J]) and the dots [M, J] (given `vectors` [M, D]).

    Results are in the compute dtype of the table unless `sum_dtype` or `dots_dtype` says otherwise; what was not asked
    for is empty.
    """
    (num_rows, picks), width = slots.shape, values.shape[1]
    dtype = compute_dtype(values.dtype)
    out = torch.empty((0,) if weights is None else (num_rows, width), dtype=sum_dtype or dtype, device=values.device)
    dots = torch.empty((0,) if vectors is None else (num_rows, picks), dtype=dots_dtype or dtype, device=values.device)
    block_d = next_power_of_2(max(width, 1))
    launch(
        gather_kernel, (num_rows,),
        values, slots, values if weights is None else weights, values if vectors is None else vectors, out, dots,
        *values.stride(), *slots.stride(), *((0, 0) if weights is None else weights.stride()),
        *((0, 0) if vectors is None else vectors.stride()),
        factor, values.shape[0],
        J=picks, D=width, HAS_SUM=weights is not None, HAS_DOTS=vectors is not None,
        BLOCK_J=max(1, min(next_power_of_2(max(picks, 1)), 8, 8192 // block_d)), BLOCK_D=block_d,
        num_warps=row_warps(block_d, values.dtype), on=values,
    )
    return out, dots
