"""What the sessions of a pool read: rows of a buffer, or of the initial table where they have written none.

A session's index [N], int32, says which row of the buffer holds the value of a slot, or -1 where the session has not
written it. Rows of tokens are time-major: row i is position i // S of session i % S.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..records import Addresses, Queue, Tokens
from ._common import launch, next_power_of_2, row_warps
from .streaming import enqueue_picks, enqueue_row
from .weights import gates_and_mask


@triton.jit
def load_session_rows(
    buffer_ptr, initial_ptr, index_ptr, slots_ptr, offs_j, mask_j, offs_d, mask_d,
    stride_un, stride_in, stride_id, DTYPE: tl.constexpr,
):
    """The values that a session reads at the slots of picks `offs_j`: [BLOCK_J, BLOCK_D], 0 outside of the masks."""
    slot = tl.load(slots_ptr + offs_j, mask=mask_j, other=0).to(tl.int64)  # [BLOCK_J]
    row = tl.load(index_ptr + slot, mask=mask_j, other=-1).to(tl.int64)
    is_own = row >= 0
    own = tl.load(
        buffer_ptr + row[:, None] * stride_un + offs_d[None, :],
        mask=(mask_j & is_own)[:, None] & mask_d[None, :], other=0.0,
    )
    initial = tl.load(
        initial_ptr + slot[:, None] * stride_in + offs_d[None, :] * stride_id,
        mask=(mask_j & (row < 0))[:, None] & mask_d[None, :], other=0.0,
    )
    return tl.where(is_own[:, None], own, initial).to(DTYPE)


@triton.jit(do_not_specialize=["S", "N", "C", "lookahead"])
def read_sessions_kernel(
    buffer_ptr, initial_ptr, index_ptr, seats_ptr, places_ptr, slots_ptr, weights_ptr, half_scores_ptr, sub_keys_ptr,
    queries_ptr, targets_ptr, gates_ptr, mask_ptr, output_ptr,
    queue_queries_ptr, queue_gates_ptr, queue_mask_ptr, queue_targets_ptr, queue_predictions_ptr, queue_slots_ptr,
    queue_weights_ptr, queue_half_scores_ptr, queue_sub_keys_ptr,
    stride_un, stride_in, stride_id, stride_qp, stride_qb, stride_qh, stride_qd, stride_yp, stride_yb, stride_yd,
    stride_gp, stride_gb, stride_mp, stride_mb, stride_op, stride_ob, stride_od,
    S, N, C, lookahead,
    HAS_GATES: tl.constexpr, HAS_MASK: tl.constexpr, ENQUEUE: tl.constexpr,
    J: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
):
    """p = Σ_j weights[i, j]·(value of slots[i, j] in the session's memory): to the output, and with ENQUEUE the token
    with all that was found for it to the session's queue, from its place on.

    The session of row i has the seat seats[i % S] of index and queue. A program owns one row i. Grid: (rows,).
    """
    i_m = tl.program_id(0)
    position = (i_m // S).to(tl.int64)
    item = (i_m % S).to(tl.int64)
    seat = tl.load(seats_ptr + item)
    dtype: tl.constexpr = queue_predictions_ptr.dtype.element_ty
    picks = i_m.to(tl.int64) * J
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_d = offs_d < D
    total = tl.zeros([BLOCK_D], dtype)
    for start in range(0, J, BLOCK_J):
        offs_j = start + tl.arange(0, BLOCK_J)
        mask_j = offs_j < J
        rows = load_session_rows(
            buffer_ptr, initial_ptr, index_ptr + seat * N, slots_ptr + picks, offs_j, mask_j, offs_d, mask_d,
            stride_un, stride_in, stride_id, dtype,
        )
        weight = tl.load(weights_ptr + picks + offs_j, mask=mask_j, other=0.0).to(dtype)  # [BLOCK_J]
        total += tl.sum(weight[:, None] * rows, axis=0)
    output = output_ptr + position * stride_op + item * stride_ob + offs_d * stride_od
    tl.store(output, total.to(output_ptr.dtype.element_ty), mask=mask_d)
    if ENQUEUE:
        place = tl.load(places_ptr + item) + position
        row = seat * C + place
        enqueue_row(
            queries_ptr, gates_ptr, mask_ptr, queue_queries_ptr, queue_gates_ptr, queue_mask_ptr,
            position, item, seat * (C + lookahead) + lookahead + place,
            stride_qp, stride_qb, stride_qh, stride_qd, stride_gp, stride_gb, stride_mp, stride_mb,
            HAS_GATES, HAS_MASK, WIDTH, HEAD, BLOCK_W,
        )
        tl.store(queue_predictions_ptr + row * D + offs_d, total, mask=mask_d)
        target_ptrs = targets_ptr + position * stride_yp + item * stride_yb + offs_d * stride_yd
        tl.store(queue_targets_ptr + row * D + offs_d, tl.load(target_ptrs, mask=mask_d, other=0.0), mask=mask_d)
        enqueue_picks(
            slots_ptr, weights_ptr, half_scores_ptr, sub_keys_ptr,
            queue_slots_ptr, queue_weights_ptr, queue_half_scores_ptr, queue_sub_keys_ptr,
            picks, row, J, BLOCK_P,
        )


def read_sessions(
    buffer: Tensor, initial: Tensor, index: Tensor, seats: Tensor, found: Addresses, weights: Tensor, output: Tensor,
    *, tokens: Tokens | None = None, queue: Queue | None = None, places: Tensor | None = None, lookahead: int = 0,
) -> None:
    """Launch the reads of t positions of S sessions, output [t, S, D]; with `tokens`, put them into the queues.

    `buffer` [rows, D] is contiguous, `index` [seats, N] too, `seats` and `places` [S] are int64. `found` and `weights`
    are those of the t·S rows, contiguous. `tokens` are [t, S, ...], of any strides; the tensors of `queue` are
    [seats, L + C or C, ...], contiguous, and `places` says where the first token of each session goes.
    """
    length, sessions, width = output.shape
    picks = weights.shape[1]
    queries, targets, gates, mask = tokens or Tokens(output[..., None], output, None, None)
    heads, head = queries.shape[2:]
    buffers = (weights,) * 9 if queue is None else tuple(queue)
    factors, strides, flags = gates_and_mask(gates, mask, weights if queue is None else queue.gates)
    block_d, block_w, block_p = (next_power_of_2(max(1, size)) for size in (width, heads * head, picks))
    launch(
        read_sessions_kernel, (length * sessions,),
        buffer, initial, index, seats, seats if places is None else places, found.slots, weights, found.half_scores,
        found.sub_keys, queries, targets, *factors, output,
        *buffers,
        buffer.stride(0), *initial.stride(), *queries.stride(), *targets.stride(),
        *strides, *output.stride(),
        sessions, index.shape[1], 0 if queue is None else queue.targets.shape[1], lookahead,
        **flags, ENQUEUE=queue is not None,
        J=picks, D=width, WIDTH=heads * head, HEAD=max(1, head),
        BLOCK_J=max(1, min(block_p, 8, 8192 // block_d)), BLOCK_P=block_p, BLOCK_D=block_d, BLOCK_W=block_w,
        num_warps=row_warps(block_d, initial.dtype), on=initial,
    )
