"""The chunk write: each addressed row of the table moves once, from its own segment of accesses; and its backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..records import Plan
from . import compute_dtype
from ._common import cdiv, launch, next_power_of_2, row_warps
from .gather import gather
from .segments import segment_rows


@triton.jit
def decay_kernel(
    values_ptr, written_ptr,
    stride_vn, stride_vd,
    N, decay: tl.float64,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """values[s] = decay·values[s] for rows that were not written. A program owns BLOCK_N rows. Grid: (row tiles,)."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    dtype: tl.constexpr = tl.float64 if values_ptr.dtype.element_ty == tl.float64 else tl.float32
    written = tl.load(written_ptr + offs_n, mask=offs_n < N, other=1)
    mask = ((written == 0) & (offs_n < N))[:, None] & (offs_d < D)[None, :]
    pointers = values_ptr + offs_n[:, None] * stride_vn + offs_d[None, :] * stride_vd  # [BLOCK_N, BLOCK_D]
    rows = tl.full([], decay, dtype) * tl.load(pointers, mask=mask, other=0.0).to(dtype)
    tl.store(pointers, rows.to(values_ptr.dtype.element_ty), mask=mask)


def decay_rows(values: Tensor, written: Tensor, *, decay: float) -> None:
    """Launch the decay, in place, of the rows of `values` [N, D] where `written` [N] (uint8) is 0."""
    num_slots, width = values.shape
    if values.numel() == 0:
        return
    block_d = next_power_of_2(width)
    block_n = max(1, 2048 // block_d)
    launch(
        decay_kernel, (cdiv(num_slots, block_n),),
        values, written,
        *values.stride(),
        num_slots, decay,
        D=width, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=max(4, row_warps(block_d, values.dtype)), on=values,
    )


def update(
    values: Tensor, out: Tensor, errors: Tensor, write_weights: Tensor, plan: Plan,
    *, lr: float, weight_decay: float, clip: float | None, log: Tensor | None = None, decays: Tensor | None = None,
) -> None:
    """Launch out[s] = decay·values[s] - lr·clamp(Σ write_weights·errors) for the rows that the plan names.

    `errors` is [M, D]; `write_weights` is [M, J], contiguous. `out` is `values` itself (the write in place: all
    other rows decay too, or those where `decays` [N], bool, is True) or a table whose other rows are already what
    they should be. `log` [accesses, D] keeps each row as it was, where its segment starts.
    """
    decay = 1.0 - lr * weight_decay
    segment_rows(
        out, errors, write_weights, plan, epilogue="update", table=values, decay=decay, lr=lr, clip=clip, log=log,
    )
    if out is values and weight_decay != 0.0:
        written = torch.zeros(values.shape[0], dtype=torch.uint8, device=values.device)
        if decays is not None:  # other rows are left out as if they were written
            written = torch.logical_not(decays, out=written)
        decay_rows(values, written.index_fill_(0, plan.rows.long(), 1), decay=decay)


def step_grad(
    grad_values: Tensor, errors: Tensor, write_weights: Tensor, plan: Plan, *, lr: float, clip: float,
) -> Tensor:
    """Launch Ĝ' = lr·grad_values, 0 where the clamp was active: [accesses, D], each row where its segment starts."""
    steps = torch.empty(plan.order.numel(), errors.shape[1], dtype=compute_dtype(errors.dtype), device=errors.device)
    segment_rows(
        steps, errors, write_weights, plan, epilogue="step_grad", table=grad_values, compact=True, lr=lr, clip=clip,
    )
    return steps


def update_grad(
    grad_values: Tensor, errors: Tensor, write_weights: Tensor, slots: Tensor, plan: Plan,
    *, lr: float, clip: float | None,
) -> tuple[Tensor, Tensor]:
    """Launch r = Σ_j c_j·Ĝ'[slot_j], [M, D], and <Ĝ'[slot_j], e>, [M, J].

    Ĝ' = lr·grad_values, and 0 where the clamp was active. Without a clip it is read from `grad_values` itself. With
    one, the rows' sums are formed again, and the rows of Ĝ' go to a compact array of one row per access.
    """
    if clip is None:
        return gather(grad_values, slots, weights=write_weights, vectors=errors, factor=lr)
    steps = step_grad(grad_values, errors, write_weights, plan, lr=lr, clip=clip)
    compact_slots = torch.empty_like(plan.start).scatter_(0, plan.order, plan.start).view_as(slots)
    return gather(steps, compact_slots, weights=write_weights, vectors=errors)


@triton.jit
def restore_kernel(
    values_ptr, initial_ptr, touched_ptr,
    stride_vn, stride_vd, stride_in, stride_id,
    N,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """values[s] = initial[s] for rows that were touched. A program owns BLOCK_N rows. Grid: (row tiles,)."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    touched = tl.load(touched_ptr + offs_n, mask=offs_n < N, other=0)
    mask = (touched != 0)[:, None] & (offs_d < D)[None, :]
    rows = tl.load(initial_ptr + offs_n[:, None] * stride_in + offs_d[None, :] * stride_id, mask=mask, other=0.0)
    tl.store(values_ptr + offs_n[:, None] * stride_vn + offs_d[None, :] * stride_vd, rows, mask=mask)


def restore_rows(values: Tensor, initial: Tensor, touched: Tensor) -> None:
    """Launch values[s] = initial[s], in place, for the rows where `touched` [N] (uint8 or bool, contiguous) is not 0.

    Other rows are neither read nor written.
    """
    num_slots, width = values.shape
    if values.numel() == 0:
        return
    block_d = next_power_of_2(width)
    block_n = max(1, 8192 // block_d)
    launch(
        restore_kernel, (cdiv(num_slots, block_n),),
        values, initial, touched.view(torch.uint8),
        *values.stride(), *initial.stride(),
        num_slots,
        D=width, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=max(4, row_warps(block_d, values.dtype)), on=values,
    )
