"""The reads of a sequence, all at once: where each comes from, the plan of what it writes, and sums over reads.

Which token a read reads, in which chunk, and whether it is written, follows from its number by the integers of
`fwpkm_kernels.records.Layout`; so every kernel works it out for itself, and no array of the reads' places is made.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..records import Layout, Plan
from ._common import cdiv, launch, next_power_of_2, row_warps

# The numbers of a `Layout`. They are not specialised, so that one compilation serves sequences of any length.
LAYOUT = ("B", "T", "C", "L", "REREADS", "MISSING", "FULL", "P")


@triton.jit
def locate(read, B, T, C, L, REREADS, MISSING, FULL, P):
    """Of reads: (batch item, position, chunk, the first read position of that chunk, one past its last, how many of
    them it reads again, how many it writes)."""
    index = read // B
    window = C + REREADS
    # Chunks are counted as if the first one had all its re-reads. The last one may be short, and then has none.
    chunk = (index + MISSING) // window
    first = chunk * window - MISSING
    rereads = tl.where((chunk < FULL) & (first >= 0), REREADS, 0)
    end = tl.minimum(first + window, P)
    first = tl.maximum(first, 0)
    position = chunk * C + index - first - rereads
    written = rereads + tl.minimum((chunk + 1) * C, T) - chunk * C - L
    written = tl.where(chunk < FULL, tl.maximum(written, 0), 0)
    return read % B, position, chunk, first, end, rereads, written


@triton.jit
def load_factor(x_ptr, index, item, stride_p, stride_b, mask):
    """A gate or a mask of tokens."""
    return tl.load(x_ptr + index.to(tl.int64) * stride_p + item.to(tl.int64) * stride_b, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["A", "SPAN", "stride_mp", "stride_mb", *LAYOUT])
def plan_kernel(
    keys_ptr, sorted_ptr, mask_ptr, order_ptr, rows_ptr, start_ptr, end_ptr, counts_ptr, flags_ptr,
    stride_mp, stride_mb,
    N, A, SPAN, B, T, C, L, REREADS, MISSING, FULL, P,
    J: tl.constexpr, COUNT: tl.constexpr, BLOCK_A: tl.constexpr,
):
    """Of each sorted position: which access of its chunk stands there, its row, and where that row's segment lies.

    `keys` are sorted, and `sorted` says which access stands at each position. With COUNT "all" or "written"
    counts[access] is the number of such accesses in its segment; written ones come first in a segment, since a chunk
    writes its first reads. With "unmasked" flags[position] says whether an access is written and unmasked. A chunk has
    at most 2·SPAN - 1 accesses, SPAN a power of two. A program owns BLOCK_A positions. Grid: (position tiles,).
    """
    offs_a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    mask_a = offs_a < A
    _, _, chunk, first, end, _, written = locate(offs_a // J, B, T, C, L, REREADS, MISSING, FULL, P)
    first_access = first * B * J
    end_access = end * B * J
    key = tl.load(keys_ptr + offs_a, mask=mask_a, other=0)
    access = tl.load(sorted_ptr + offs_a, mask=mask_a, other=0)
    start = first_access
    stop = first_access
    step = SPAN
    while step > 0:
        in_start = mask_a & (start + step <= end_access)
        in_stop = mask_a & (stop + step <= end_access)
        before = tl.load(keys_ptr + start + step - 1, mask=in_start, other=0)
        after = tl.load(keys_ptr + stop + step - 1, mask=in_stop, other=0)
        start += tl.where(in_start & (before < key), step, 0)
        stop += tl.where(in_stop & (after <= key), step, 0)
        step //= 2
    key_dtype: tl.constexpr = keys_ptr.dtype.element_ty
    row = key - chunk.to(key_dtype) * N
    tl.store(order_ptr + offs_a, access - first_access, mask=mask_a)
    tl.store(rows_ptr + offs_a, row.to(rows_ptr.dtype.element_ty), mask=mask_a)
    tl.store(start_ptr + offs_a, start - first_access, mask=mask_a)
    tl.store(end_ptr + offs_a, stop - first_access, mask=mask_a)
    if COUNT == "all":
        tl.store(counts_ptr + access, stop - start, mask=mask_a)
    elif COUNT == "written":
        limit = first_access + written * B * J
        counted = start  # one past the accesses of the segment that are written
        step = SPAN
        while step > 0:
            inside = mask_a & (counted + step <= stop)
            other = tl.load(sorted_ptr + counted + step - 1, mask=inside, other=0)
            counted += tl.where(inside & (other < limit), step, 0)
            step //= 2
        tl.store(counts_ptr + access, tl.maximum(counted - start, 1), mask=mask_a)
    else:
        read = (access // J).to(tl.int32)
        index = read // B
        is_written = mask_a & (index - first < written)
        item, position, _, _, _, _, _ = locate(read, B, T, C, L, REREADS, MISSING, FULL, P)
        token_mask = load_factor(mask_ptr, position + REREADS - MISSING, item, stride_mp, stride_mb, is_written)
        tl.store(flags_ptr + offs_a, (is_written & (token_mask > 0)).to(tl.int32), mask=mask_a)


@triton.jit(do_not_specialize=["A", *LAYOUT])
def count_unmasked_kernel(
    running_ptr, order_ptr, start_ptr, end_ptr, counts_ptr,
    A, B, T, C, L, REREADS, MISSING, FULL, P,
    J: tl.constexpr, BLOCK_A: tl.constexpr,
):
    """counts[access] = how much the running sum grows over its segment, at least 1. Grid: (position tiles,)."""
    offs_a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    mask_a = offs_a < A
    _, _, _, first, _, _, _ = locate(offs_a // J, B, T, C, L, REREADS, MISSING, FULL, P)
    first_access = first * B * J
    start = first_access + tl.load(start_ptr + offs_a, mask=mask_a, other=0)
    end = first_access + tl.load(end_ptr + offs_a, mask=mask_a, other=1)
    access = first_access + tl.load(order_ptr + offs_a, mask=mask_a, other=0)
    before = tl.load(running_ptr + start - 1, mask=mask_a & (start > 0), other=0)
    after = tl.load(running_ptr + end - 1, mask=mask_a, other=0)
    tl.store(counts_ptr + access, tl.maximum(after - before, 1), mask=mask_a)


def plan_writes(
    keys: Tensor, order: Tensor, num_slots: int, row_dtype: torch.dtype, picks: int, mask: Tensor | None,
    layout: Layout,
    *, count_all: bool,
) -> tuple[Plan, Tensor]:
    """Launch the plan of every chunk, from the stable sort (`keys`, `order`) [R·J] of what `weigh` made.

    `mask` [positions, B] counts where it is > 0. With `count_all` all accesses of a chunk count, else those that are
    written and unmasked. Returns the plan, whose start and end are int32, and counts [R, J] (int32).
    """
    accesses = keys.numel()
    plan = Plan.empty(accesses, row_dtype, keys.device)
    counts = torch.empty(layout.positions * layout.batch, picks, dtype=torch.int32, device=keys.device)
    count = "all" if count_all else "written" if mask is None else "unmasked"
    flags = torch.empty_like(plan.start) if count == "unmasked" else counts
    block_a = 256
    longest = min(layout.chunk_size + layout.rereads, layout.positions) * layout.batch * picks
    grid = (cdiv(accesses, block_a),)
    launch(
        plan_kernel, grid,
        keys, order, keys if mask is None else mask, plan.order, plan.rows, plan.start, plan.end, counts, flags,
        *((0, 0) if mask is None else mask.stride()),
        num_slots, accesses, next_power_of_2(longest), *layout,
        J=picks, COUNT=count, BLOCK_A=block_a, num_warps=4, on=keys,
    )
    if count == "unmasked":
        running = torch.cumsum(flags, 0, dtype=torch.int32)
        launch(
            count_unmasked_kernel, grid,
            running, plan.order, plan.start, plan.end, counts,
            accesses, *layout,
            J=picks, BLOCK_A=block_a, num_warps=4, on=keys,
        )
    return plan, counts


@triton.jit(do_not_specialize=["B", "T", "C", "REREADS", "MISSING", "FULL"])
def sum_reads_kernel(
    reads_ptr, out_ptr,
    B, T, C, REREADS, MISSING, FULL,
    WIDTH: tl.constexpr, BLOCK_W: tl.constexpr,
):
    """out[item, position] = reads[its read for output] + reads[its re-read], of those that it has.

    Positions that are carried, before 0, have a re-read only. A program owns BLOCK_W columns of one token. Grid:
    (tokens, column blocks).
    """
    token = tl.program_id(0)
    item = token % B
    carried = REREADS - MISSING
    position = token // B - carried
    chunk = (position + C) // C - 1  # -1 for a carried position, of which there are at most C
    window = C + REREADS
    first = chunk * window - MISSING
    rereads = tl.where((chunk < FULL) & (first >= 0), REREADS, 0)
    read = tl.maximum(first, 0) + rereads + position - chunk * C
    # The next chunk reads the last ones of this one again, if it is full.
    before = (chunk + 1) * C - position
    is_reread = (before <= REREADS) & (chunk + 1 < FULL)
    again = (chunk + 1) * window - MISSING + REREADS - before
    offs_w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    mask_w = offs_w < WIDTH
    row = (read * B + item).to(tl.int64) * WIDTH
    total = tl.load(reads_ptr + row + offs_w, mask=offs_w < tl.where(position >= 0, WIDTH, 0), other=0.0)
    row = (again * B + item).to(tl.int64) * WIDTH
    total += tl.load(reads_ptr + row + offs_w, mask=offs_w < tl.where(is_reread, WIDTH, 0), other=0.0)
    out = out_ptr + (item.to(tl.int64) * (T + carried) + token // B) * WIDTH + offs_w
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=mask_w)


def sum_reads(reads: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """Launch the sums over the reads of each token: [B, carried + T, ...] in `dtype`, contiguous, from [R, ...]."""
    positions = layout.length + layout.rereads - layout.missing
    out = torch.empty(layout.batch, positions, *reads.shape[1:], dtype=dtype, device=reads.device)
    width = reads.shape[1:].numel()
    block_w = min(next_power_of_2(width), 1024)
    launch(
        sum_reads_kernel, (layout.batch * positions, cdiv(width, block_w)),
        reads, out,
        layout.batch, layout.length, layout.chunk_size, layout.rereads, layout.missing, layout.full,
        WIDTH=width, BLOCK_W=block_w, num_warps=row_warps(block_w, reads.dtype), on=reads,
    )
    return out
