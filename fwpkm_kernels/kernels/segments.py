"""Sums over the accesses of each row of a table: one owner per row, a fixed order, no atomics.

A plan (`fwpkm_kernels.plan`) lists the accesses of a table sorted by row. The program at sorted position i works if i
opens a piece of its row's segment, and exits otherwise; so a launch needs no host-side count of the distinct rows.

A segment of at least 2·PIECE accesses ("hot") is cut into len // PIECE pieces of PIECE accesses, the last one taking
the remainder. Pieces of hot segments start at least PIECE positions apart, so i // PIECE names a private row of the
buffer of partial sums; `hot_segment_kernel` adds those in order.

What is done with a sum is the EPILOGUE:
    "sum"        out[row] = total                                           gradient of a gathered table, of sub-keys
    "update"     out[row] = decay·table[row] - lr·clamp(total)              the write
    "step_grad"  out[row] = lr·table[row] where |total| <= clip, else 0     what the write's backward gathers
with out[segment start] instead of out[row] when COMPACT: a [accesses, D] array in place of an [N, D] one. With a LOG
the table's row as it was is kept too, in such an array.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..records import Plan
from . import compute_dtype
from ._common import cdiv, check_grid, launch, next_power_of_2, row_warps, wait_for_inputs

PIECE = 32
#: Pieces in which a program of `hot_segment_kernel` looks for hot segments; most programs find none.
WINDOWS = 4


class SegmentConfig(NamedTuple):
    """Tile of `segment_kernel`: BLOCK_A accesses by a whole row at a time."""

    block_a: int
    num_warps: int


def segment_config(width: int, dtype: torch.dtype) -> SegmentConfig:
    """Launch table, keyed by the width of a row and the narrowest dtype among those read."""
    # Two accesses at a time hide half the latency of a long segment. One very wide row fills the registers; of rows
    # narrower than 256 a tile holds as many as have 512 elements, up to a whole piece.
    block_d = next_power_of_2(width)
    block_a = 1 if width > 2048 else min(max(512 // block_d, 2), PIECE)
    return SegmentConfig(block_a=block_a, num_warps=row_warps(block_d, dtype))


@triton.jit
def finish_row(total, old, decay, lr, clip, EPILOGUE: tl.constexpr, CLIP: tl.constexpr):
    """Turn the sum of one segment, and the row `old` of the table, into one row of the output."""
    decay = tl.full([], decay, total.dtype)
    lr = tl.full([], lr, total.dtype)
    clip = tl.full([], clip, total.dtype)
    if EPILOGUE == "update":
        if CLIP:  # comparisons, so that NaN stays NaN
            total = tl.where(total > clip, clip, tl.where(total < -clip, -clip, total))
        total = decay * old - lr * total
    if EPILOGUE == "step_grad":
        total = tl.where((total <= clip) & (total >= -clip), lr * old, 0.0)
    return total


@triton.jit(do_not_specialize=["N", "A"])
def segment_kernel(
    vectors_ptr, coefficients_ptr, table_ptr, out_ptr, log_ptr, partials_ptr, order_ptr, rows_ptr, start_ptr, end_ptr,
    stride_vm, stride_vd, stride_tn, stride_td, stride_on, stride_od,
    decay: tl.float64, lr: tl.float64, clip: tl.float64, N, A,
    PER_VECTOR: tl.constexpr, D: tl.constexpr, EPILOGUE: tl.constexpr, CENTERED: tl.constexpr, CLIP: tl.constexpr,
    COMPACT: tl.constexpr, LOG: tl.constexpr, PIECE: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """total = Σ c_a·v_a over the accesses a of one row (CENTERED: Σ c_a·(v_a - table[row])), then the epilogue.

    Access a belongs to vector a // PER_VECTOR. A program owns the piece that opens at its position, if one does. Under
    TRITON_DEBUG rows outside [0, N) stop it. Grid: (accesses,).
    """
    wait_for_inputs(PDL)
    i_a = tl.program_id(0).to(start_ptr.dtype.element_ty)
    # Everything at a position is loaded at once, before it is known whether a piece opens there. One nearly always
    # does, and then its vectors arrive after two waits for memory, not three.
    start = tl.load(start_ptr + i_a)
    end = tl.load(end_ptr + i_a)
    row = tl.load(rows_ptr + i_a).to(tl.int64)
    offs_a = i_a + tl.arange(0, BLOCK_A)
    access = tl.load(order_ptr + offs_a, mask=offs_a < A, other=0)  # [BLOCK_A]
    is_hot = end - start >= 2 * PIECE
    # A segment that is not hot is one piece; the last one of a hot segment may be longer.
    opening = tl.where(is_hot, (end - start) // PIECE * PIECE, 1)
    if ((i_a - start) % PIECE == 0) & (i_a - start < opening):
        dtype: tl.constexpr = partials_ptr.dtype.element_ty
        last = tl.where(end - i_a >= 2 * PIECE, i_a + PIECE, end)
        if CENTERED or not COMPACT or EPILOGUE != "sum":  # a row of the table is read or written
            tl.device_assert((row >= 0) & (row < N), "`slots` must lie in [0, N)")
        offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
        mask_d = offs_d < D
        old = tl.zeros([BLOCK_D], dtype)
        if CENTERED or EPILOGUE != "sum":
            old = tl.load(table_ptr + row * stride_tn + offs_d * stride_td, mask=mask_d, other=0.0).to(dtype)
        total = tl.zeros([BLOCK_D], dtype)
        position = i_a
        while position < last:
            mask_a = position + tl.arange(0, BLOCK_A) < last
            position += BLOCK_A
            offs_a = position + tl.arange(0, BLOCK_A)
            next_access = tl.load(order_ptr + offs_a, mask=offs_a < last, other=0)
            coefficient = tl.load(coefficients_ptr + access, mask=mask_a, other=0.0).to(dtype)  # [BLOCK_A]
            vector = tl.load(
                vectors_ptr + (access // PER_VECTOR)[:, None] * stride_vm + offs_d[None, :] * stride_vd,
                mask=mask_a[:, None] & mask_d[None, :], other=0.0,
            ).to(dtype)  # [BLOCK_A, BLOCK_D]
            if CENTERED:
                vector = tl.where(mask_a[:, None], vector - old[None, :], 0.0)
            total += tl.sum(coefficient[:, None] * vector, axis=0)
            access = next_access
        if is_hot:
            tl.store(partials_ptr + (i_a // PIECE).to(tl.int64) * D + offs_d, total, mask=mask_d)
        else:
            total = finish_row(total, old, decay, lr, clip, EPILOGUE, CLIP)
            out_row = start.to(tl.int64) if COMPACT else row
            out = out_ptr + out_row * stride_on + offs_d * stride_od
            tl.store(out, total.to(out_ptr.dtype.element_ty), mask=mask_d)
            if LOG:
                log = log_ptr + start.to(tl.int64) * D + offs_d
                tl.store(log, old.to(log_ptr.dtype.element_ty), mask=mask_d)


@triton.jit(do_not_specialize=["A"])
def hot_segment_kernel(
    table_ptr, out_ptr, log_ptr, partials_ptr, rows_ptr, start_ptr, end_ptr,
    stride_tn, stride_td, stride_on, stride_od,
    decay: tl.float64, lr: tl.float64, clip: tl.float64, A,
    D: tl.constexpr, EPILOGUE: tl.constexpr, CLIP: tl.constexpr, COMPACT: tl.constexpr, LOG: tl.constexpr,
    PIECE: tl.constexpr, WINDOWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):
    """Add the partial sums of each hot segment in order, then the epilogue.

    At most one hot segment starts within PIECE positions. A program owns BLOCK_D columns of those that start in WINDOWS
    such pieces. Grid: (accesses / (WINDOWS·PIECE), column blocks).
    """
    wait_for_inputs(PDL)
    first_piece = tl.program_id(0).to(start_ptr.dtype.element_ty) * WINDOWS
    offs_a = first_piece * PIECE + tl.arange(0, WINDOWS * PIECE)
    mask_a = offs_a < A
    starts = tl.load(start_ptr + offs_a, mask=mask_a, other=-1)
    ends = tl.load(end_ptr + offs_a, mask=mask_a, other=-1)
    is_hot = (starts == offs_a) & (ends - starts >= 2 * PIECE)
    left = tl.where(is_hot, starts, -1)  # [WINDOWS * PIECE]
    start = tl.max(left, axis=0)
    while start >= 0:
        is_start = left == start
        end = tl.max(tl.where(is_start, ends, -1), axis=0)
        dtype: tl.constexpr = partials_ptr.dtype.element_ty
        pieces = (end - start) // PIECE
        row = tl.load(rows_ptr + start).to(tl.int64)
        offs_d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask_d = offs_d < D
        old = tl.zeros([BLOCK_D], dtype)
        if EPILOGUE != "sum":
            old = tl.load(table_ptr + row * stride_tn + offs_d * stride_td, mask=mask_d, other=0.0).to(dtype)
        total = tl.zeros([BLOCK_D], dtype)
        first = 0
        while first < pieces:
            offs_p = first + tl.arange(0, BLOCK_P)
            partial = tl.load(
                partials_ptr + (start // PIECE + offs_p).to(tl.int64)[:, None] * D + offs_d[None, :],
                mask=(offs_p < pieces)[:, None] & mask_d[None, :], other=0.0,
            )  # [BLOCK_P, BLOCK_D]
            total += tl.sum(partial, axis=0)
            first += BLOCK_P
        total = finish_row(total, old, decay, lr, clip, EPILOGUE, CLIP)
        out_row = start.to(tl.int64) if COMPACT else row
        out = out_ptr + out_row * stride_on + offs_d * stride_od
        tl.store(out, total.to(out_ptr.dtype.element_ty), mask=mask_d)
        if LOG:
            log = log_ptr + start.to(tl.int64) * D + offs_d
            tl.store(log, old.to(log_ptr.dtype.element_ty), mask=mask_d)
        left = tl.where(is_start, -1, left)
        start = tl.max(left, axis=0)


def segment_rows(
    out: Tensor, vectors: Tensor, coefficients: Tensor, plan: Plan,
    *, epilogue: str = "sum", table: Tensor | None = None, log: Tensor | None = None, centered: bool = False,
    compact: bool = False, decay: float = 1.0, lr: float = 1.0, clip: float | None = None,
    config: SegmentConfig | None = None,
) -> None:
    """Launch the sums of `coefficients` (contiguous, A of them) times `vectors` [V, D] into rows of `out`.

    Rows of `out` that no access names are left as they are.
    `table` is the table that the epilogue reads and that `centered` subtracts; it may be `out`. "update" also stores
    the table's rows as they were in `log` [A, D] (contiguous, in its dtype), each where its segment starts; other rows
    of `log` are left as they are.
    """
    accesses, width = plan.order.numel(), vectors.shape[1]
    if accesses == 0 or width == 0:
        return
    table = out if table is None else table
    config = config or segment_config(width, min(vectors.dtype, table.dtype, key=lambda dtype: dtype.itemsize))
    partials = torch.empty(accesses // PIECE + 1, width, dtype=compute_dtype(coefficients.dtype), device=vectors.device)
    block_d = next_power_of_2(width)
    # Column blocks are narrow, since hot segments are few: so several programs share the partial sums of one.
    hot_block_d = min(block_d, 128)
    hot_grid = (cdiv(accesses, WINDOWS * PIECE), cdiv(width, hot_block_d))
    check_grid(hot_segment_kernel, hot_grid)
    launch(
        segment_kernel, (accesses,),
        vectors, coefficients, table, out, out if log is None else log, partials,
        plan.order, plan.rows, plan.start, plan.end,
        *vectors.stride(), *table.stride(), *out.stride(),
        decay, lr, 0.0 if clip is None else clip, table.shape[0], accesses,
        PER_VECTOR=accesses // vectors.shape[0], D=width, EPILOGUE=epilogue, CENTERED=centered, CLIP=clip is not None,
        COMPACT=compact, LOG=log is not None, PIECE=PIECE,
        BLOCK_A=config.block_a, BLOCK_D=block_d, num_warps=config.num_warps, on=vectors,
    )
    if accesses >= 2 * PIECE:
        launch(
            hot_segment_kernel, hot_grid,
            table, out, out if log is None else log, partials, plan.rows, plan.start, plan.end,
            *table.stride(), *out.stride(),
            decay, lr, 0.0 if clip is None else clip, accesses,
            D=width, EPILOGUE=epilogue, CLIP=clip is not None, COMPACT=compact, LOG=log is not None, PIECE=PIECE,
            WINDOWS=WINDOWS,
            BLOCK_P=16, BLOCK_D=hot_block_d, num_warps=1, on=vectors,
        )
