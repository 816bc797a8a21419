"""What a streaming step launches besides lookup, read, key step and write: tokens to the queue, and a chunk's plan.

Rows are time-major: row i is position i // B of batch item i % B. What the user gave or gets is [positions, B, ...],
any strides; the buffers of the queue are contiguous.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..records import Addresses, Plan, Queue, Tokens
from ._common import cdiv, launch, load_rows, next_power_of_2, row_warps, wait_for_inputs
from .weights import gates_and_mask, safe_squares

#: A chunk of more accesses is planned by a sort: comparing all of them with all takes the square of their number.
MOST_COMPARED = 8192


@triton.jit
def enqueue_row(
    queries_ptr, gates_ptr, mask_ptr, queue_queries_ptr, queue_gates_ptr, queue_mask_ptr,
    position, item, row,
    stride_qp, stride_qb, stride_qh, stride_qd, stride_gp, stride_gb, stride_mp, stride_mb,
    HAS_GATES: tl.constexpr, HAS_MASK: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, BLOCK_W: tl.constexpr,
):
    """Copy the query of one token, [H·Dk], its gate and its mask (1 if there is none) to `row` of the queue."""
    offs_w = tl.arange(0, BLOCK_W)
    mask_w = offs_w < WIDTH
    q_ptrs = queries_ptr + position * stride_qp + item * stride_qb
    q_ptrs += (offs_w // HEAD).to(tl.int64) * stride_qh + (offs_w % HEAD).to(tl.int64) * stride_qd
    tl.store(queue_queries_ptr + row * WIDTH + offs_w, tl.load(q_ptrs, mask=mask_w, other=0.0), mask=mask_w)
    dtype: tl.constexpr = queue_gates_ptr.dtype.element_ty
    gate = tl.full([], 1.0, dtype)
    mask = tl.full([], 1.0, dtype)
    if HAS_GATES:
        gate = tl.load(gates_ptr + position * stride_gp + item * stride_gb).to(dtype)
    if HAS_MASK:
        mask = tl.load(mask_ptr + position * stride_mp + item * stride_mb).to(dtype)
    tl.store(queue_gates_ptr + row, gate)
    tl.store(queue_mask_ptr + row, mask)


@triton.jit
def enqueue_picks(
    slots_ptr, weights_ptr, half_scores_ptr, sub_keys_ptr,
    queue_slots_ptr, queue_weights_ptr, queue_half_scores_ptr, queue_sub_keys_ptr,
    picks, row,
    J: tl.constexpr, BLOCK_P: tl.constexpr,
):
    """Copy what one token has picked, from the picks that begin at `picks`, to `row` of the queue."""
    offs_p = tl.arange(0, BLOCK_P)
    mask_p = offs_p < J
    slot = tl.load(slots_ptr + picks + offs_p, mask=mask_p, other=0)
    tl.store(queue_slots_ptr + row * J + offs_p, slot, mask=mask_p)
    weight = tl.load(weights_ptr + picks + offs_p, mask=mask_p, other=0.0)
    tl.store(queue_weights_ptr + row * J + offs_p, weight, mask=mask_p)
    offs_h = tl.arange(0, 2 * BLOCK_P)
    mask_h = offs_h < 2 * J
    half_score = tl.load(half_scores_ptr + 2 * picks + offs_h, mask=mask_h, other=0.0)
    tl.store(queue_half_scores_ptr + 2 * row * J + offs_h, half_score, mask=mask_h)
    sub_key = tl.load(sub_keys_ptr + 2 * picks + offs_h, mask=mask_h, other=0)
    tl.store(queue_sub_keys_ptr + 2 * row * J + offs_h, sub_key, mask=mask_h)


@triton.jit(do_not_specialize=["B", "first"])
def enqueue_kernel(
    queries_ptr, gates_ptr, mask_ptr, queue_queries_ptr, queue_gates_ptr, queue_mask_ptr,
    stride_qp, stride_qb, stride_qh, stride_qd, stride_gp, stride_gb, stride_mp, stride_mb,
    B, first,
    HAS_GATES: tl.constexpr, HAS_MASK: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, BLOCK_W: tl.constexpr,
    PDL: tl.constexpr,
):
    """Queries, gates and mask of the tokens to the positions of the queue from `first` on. Grid: (rows,)."""
    wait_for_inputs(PDL)
    i_m = tl.program_id(0)
    enqueue_row(
        queries_ptr, gates_ptr, mask_ptr, queue_queries_ptr, queue_gates_ptr, queue_mask_ptr,
        (i_m // B).to(tl.int64), (i_m % B).to(tl.int64), first.to(tl.int64) * B + i_m,
        stride_qp, stride_qb, stride_qh, stride_qd, stride_gp, stride_gb, stride_mp, stride_mb,
        HAS_GATES, HAS_MASK, WIDTH, HEAD, BLOCK_W,
    )


@triton.jit(do_not_specialize=["B", "place", "lookahead"])
def read_to_queue_kernel(
    values_ptr, slots_ptr, weights_ptr, half_scores_ptr, sub_keys_ptr, queries_ptr, targets_ptr, gates_ptr, mask_ptr,
    output_ptr, queue_queries_ptr, queue_gates_ptr, queue_mask_ptr, queue_targets_ptr, queue_predictions_ptr,
    queue_slots_ptr, queue_weights_ptr, queue_half_scores_ptr, queue_sub_keys_ptr, place_ptr,
    stride_vn, stride_vd, stride_qp, stride_qb, stride_qh, stride_qd, stride_yp, stride_yb, stride_yd, stride_gp,
    stride_gb, stride_mp, stride_mb, stride_op, stride_ob, stride_od,
    B, place, lookahead,
    HAS_GATES: tl.constexpr, HAS_MASK: tl.constexpr, HAS_PLACE: tl.constexpr, J: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, HEAD: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr, PDL: tl.constexpr,
):
    """p = Σ_j weights[i, j]·values[slots[i, j]] of one row i, which goes to the queue with its token and its picks.

    The first row's position in the chunk is `place`, or with HAS_PLACE the number at `place_ptr`. Grid: (rows,).
    """
    wait_for_inputs(PDL)
    i_m = tl.program_id(0)
    position = (i_m // B).to(tl.int64)
    item = (i_m % B).to(tl.int64)
    dtype: tl.constexpr = queue_predictions_ptr.dtype.element_ty
    if HAS_PLACE:
        first = tl.load(place_ptr).to(tl.int64)
    else:
        first = place.to(tl.int64)
    row = first * B + i_m
    enqueue_row(
        queries_ptr, gates_ptr, mask_ptr, queue_queries_ptr, queue_gates_ptr, queue_mask_ptr,
        position, item, row + lookahead.to(tl.int64) * B,
        stride_qp, stride_qb, stride_qh, stride_qd, stride_gp, stride_gb, stride_mp, stride_mb,
        HAS_GATES, HAS_MASK, WIDTH, HEAD, BLOCK_W,
    )
    picks = i_m.to(tl.int64) * J
    enqueue_picks(
        slots_ptr, weights_ptr, half_scores_ptr, sub_keys_ptr,
        queue_slots_ptr, queue_weights_ptr, queue_half_scores_ptr, queue_sub_keys_ptr,
        picks, row, J, BLOCK_P,
    )

    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_d = offs_d < D
    target = tl.load(targets_ptr + position * stride_yp + item * stride_yb + offs_d * stride_yd, mask=mask_d, other=0.0)
    tl.store(queue_targets_ptr + row * D + offs_d, target, mask=mask_d)
    total = tl.zeros([BLOCK_D], dtype)
    for start in range(0, J, BLOCK_J):
        offs_j = start + tl.arange(0, BLOCK_J)
        mask_j = offs_j < J
        rows = load_rows(values_ptr, slots_ptr + picks, offs_j, mask_j, offs_d, mask_d, stride_vn, stride_vd, dtype)
        weight_j = tl.load(weights_ptr + picks + offs_j, mask=mask_j, other=0.0).to(dtype)  # [BLOCK_J]
        total += tl.sum(weight_j[:, None] * rows, axis=0)
    tl.store(queue_predictions_ptr + row * D + offs_d, total, mask=mask_d)
    output = output_ptr + position * stride_op + item * stride_ob + offs_d * stride_od
    tl.store(output, total.to(output_ptr.dtype.element_ty), mask=mask_d)


@triton.jit(do_not_specialize=["A"])
def plan_chunk_kernel(
    slots_ptr, weights_ptr, gates_ptr, mask_ptr, order_ptr, rows_ptr, start_ptr, end_ptr, write_weights_ptr,
    touched_ptr,
    A,
    J: tl.constexpr, STEP: tl.constexpr, NO_SLOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_B: tl.constexpr, PDL: tl.constexpr,
):
    """The plan of A = E·J accesses, their write weights α·g·m·w/n_s, and a mark on every row that they touch.

    The position of an access in the stable sort is how many accesses have a lower slot, or the same and come before:
    all are compared with all, at six instructions a pair. n_s counts those with mask > 0. A program owns BLOCK_M
    tokens. Grid: (token tiles,).
    """
    wait_for_inputs(PDL)
    dtype: tl.constexpr = write_weights_ptr.dtype.element_ty
    key_type: tl.constexpr = rows_ptr.dtype.element_ty
    BLOCK_A: tl.constexpr = BLOCK_M * BLOCK_J
    offs_a = tl.arange(0, BLOCK_A)
    offs_j = offs_a % BLOCK_J
    offs_m = tl.program_id(0) * BLOCK_M + offs_a // BLOCK_J
    access = offs_m * J + offs_j  # [BLOCK_A]
    mask_a = (offs_j < J) & (access < A)
    slot = tl.load(slots_ptr + access, mask=mask_a, other=0).to(key_type)

    # An integer holds three counts of ten bits: an element of the tile is compared with one access in BLOCK_B.
    less = tl.zeros([BLOCK_A, BLOCK_B], tl.int32)
    same = tl.zeros([BLOCK_A, BLOCK_B], tl.int32)
    first = tl.program_id(0) * (BLOCK_M * J)
    begin = 0
    while begin < A:
        offs_b = begin + tl.arange(0, BLOCK_B)
        mask_b = offs_b < A
        other = tl.load(slots_ptr + offs_b, mask=mask_b, other=NO_SLOT).to(key_type)[None, :]
        is_counted = tl.load(mask_ptr + offs_b // J, mask=mask_b, other=0.0) > 0
        kinds = 1 + ((offs_b < first).to(tl.int32) << 10) + (is_counted.to(tl.int32) << 20)
        less += (other < slot[:, None]).to(tl.int32)
        same += tl.where(other == slot[:, None], kinds[None, :], 0)
        begin += BLOCK_B
    before = tl.zeros([BLOCK_A, BLOCK_B], tl.int32)
    begin = first
    while begin < first + BLOCK_M * J:  # counts those of the program's own accesses that come before
        offs_b = begin + tl.arange(0, BLOCK_B)
        other = tl.load(slots_ptr + offs_b, mask=offs_b < A, other=NO_SLOT).to(key_type)[None, :]
        before += ((other == slot[:, None]) & (offs_b[None, :] < access[:, None])).to(tl.int32)
        begin += BLOCK_B
    start = tl.sum(less, axis=1)  # [BLOCK_A]
    place = start + tl.sum(((same >> 10) & 1023) + before, axis=1)
    end = start + tl.sum(same & 1023, axis=1)
    tl.store(order_ptr + place, access.to(tl.int64), mask=mask_a)
    tl.store(rows_ptr + place, slot, mask=mask_a)
    tl.store(start_ptr + place, start, mask=mask_a)
    tl.store(end_ptr + place, end, mask=mask_a)
    tl.store(touched_ptr + slot.to(tl.int64), tl.full([BLOCK_A], 1, tl.uint8), mask=mask_a)

    weight = tl.load(weights_ptr + access, mask=mask_a, other=0.0)
    count = tl.maximum(tl.sum(same >> 20, axis=1), 1).to(dtype)
    gate = tl.load(gates_ptr + offs_m, mask=mask_a, other=0.0)
    factor = tl.load(mask_ptr + offs_m, mask=mask_a, other=0.0)
    scale = tl.full([BLOCK_A], J if STEP == "paper" else 1, dtype)
    if STEP == "normalized":
        is_zero, squares = safe_squares(tl.sum(tl.reshape(weight * weight, [BLOCK_M, BLOCK_J]), axis=1))
        alpha = tl.where(is_zero, 0.0, 1.0 / squares)
        scale = tl.reshape(tl.broadcast_to(alpha[:, None], [BLOCK_M, BLOCK_J]), [BLOCK_A])
    tl.store(write_weights_ptr + access, weight / count * scale * gate * factor, mask=mask_a)


def enqueue(queries: Tensor, gates: Tensor | None, mask: Tensor | None, queue: Queue, first: int) -> None:
    """Launch the copy of queries [t, B, H, Dk], gates and mask [t, B] (None: ones) to a queue.

    The tokens go to the positions of the queue from `first` on, carried ones included.
    """
    length, batch, heads, head = queries.shape
    tensors, strides, flags = gates_and_mask(gates, mask, queue.gates)
    block_w = next_power_of_2(max(1, heads * head))
    launch(
        enqueue_kernel, (length * batch,),
        queries, *tensors, queue.queries, queue.gates, queue.mask,
        *queries.stride(), *strides,
        batch, first,
        WIDTH=heads * head, HEAD=max(1, head),
        BLOCK_W=block_w, **flags, num_warps=row_warps(block_w, queries.dtype), on=queries,
    )


def read_to_queue(
    values: Tensor, found: Addresses, weights: Tensor, tokens: Tokens, queue: Queue, output: Tensor,
    place: int | Tensor, lookahead: int,
) -> None:
    """Launch the reads of t positions, output [t, B, D], and put everything about them into a queue.

    `found` and `weights` are those of the t·B rows, contiguous. `place` is that of the first position among the tokens
    of the chunk; a tensor of one integer where it is not known yet.
    """
    queries, targets, gates, mask = tokens
    length, batch, heads, head = queries.shape
    picks, width = weights.shape[1], values.shape[1]
    block_d, block_w, block_p = (next_power_of_2(max(1, size)) for size in (width, heads * head, picks))
    factors, strides, flags = gates_and_mask(gates, mask, queue.gates)
    is_known = isinstance(place, int)
    launch(
        read_to_queue_kernel, (length * batch,),
        values, found.slots, weights, found.half_scores, found.sub_keys, queries, targets, *factors, output,
        *queue, queue.slots if is_known else place,
        *values.stride(), *queries.stride(), *targets.stride(), *strides, *output.stride(),
        batch, place if is_known else 0, lookahead,
        HAS_PLACE=not is_known, J=picks, D=width, WIDTH=heads * head, HEAD=max(1, head),
        BLOCK_J=max(1, min(block_p, 8, 8192 // block_d)), BLOCK_P=block_p, BLOCK_D=block_d, BLOCK_W=block_w, **flags,
        num_warps=row_warps(block_d, values.dtype), on=values,
    )


def plan_chunk(
    slots: Tensor, weights: Tensor, gates: Tensor, mask: Tensor, touched: Tensor, *, row_dtype: torch.dtype, step: str,
) -> tuple[Plan, Tensor]:
    """Launch the plan of a chunk's writes, of A = E·J accesses, and the write weights [E, J].

    `slots` and `weights` [E, J] are those of the pairs, at most MOST_COMPARED; `gates` and `mask` [E], in the dtype of
    the weights; all contiguous. Rows of `touched` [N], uint8, that are written become 1.
    """
    num_pairs, picks = weights.shape
    plan = Plan.empty(weights.numel(), row_dtype, weights.device)
    write_weights = torch.empty_like(weights)
    block_j = next_power_of_2(picks)
    block_m = max(1, 16 // block_j)  # with 512 tokens of 8 picks a multiprocessor has two programs
    launch(
        plan_chunk_kernel, (cdiv(num_pairs, block_m) if picks > 0 else 0,),
        slots, weights, gates, mask, plan.order, plan.rows, plan.start, plan.end, write_weights, touched,
        weights.numel(),
        J=picks, STEP=step, NO_SLOT=torch.iinfo(row_dtype).max,
        BLOCK_M=block_m, BLOCK_J=block_j, BLOCK_B=max(16, 2048 // (block_m * block_j)), num_warps=4, on=weights,
    )
    return plan, write_weights
