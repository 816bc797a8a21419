"""Between scores and scans, for all reads of a sequence at once: read weights, write weights, and their backward.

Between `weigh` and `kernels.chunks.plan_writes` stands a stable sort of the keys that the former makes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..records import Layout, Plan
from ._common import cdiv, launch, next_power_of_2
from .chunks import LAYOUT, load_factor, locate

#: Elements of a tile; a single row may have more.
_TILE = 512


@triton.jit
def tile_of_reads(R, J: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr):
    """A program's reads and their mask [BLOCK_R], the mask of picks [1, BLOCK_J], and mask and offsets of the tile."""
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_j = tl.arange(0, BLOCK_J)
    mask_r = offs_r < R
    mask_j = (offs_j < J)[None, :]
    at = offs_r.to(tl.int64)[:, None] * J + offs_j[None, :]  # [BLOCK_R, BLOCK_J]
    return offs_r, mask_r, mask_j, mask_r[:, None] & mask_j, at


@triton.jit
def weighed(scores, mask_j, temperature, WEIGHTING: tl.constexpr):
    """Weights of the picks of each row, and the scaled scores: [BLOCK_R, BLOCK_J]."""
    scaled = scores / tl.full([], temperature, scores.dtype)
    if WEIGHTING == "softmax":
        scaled = tl.where(mask_j, scaled, float("-inf"))
        weights = tl.exp(scaled - tl.max(scaled, axis=1)[:, None])
        weights = weights / tl.sum(weights, axis=1)[:, None]
    elif WEIGHTING == "silu":
        weights = scaled / (1.0 + tl.exp(-scaled))
    else:
        weights = tl.where(scaled <= 0, 0.0, scaled)  # so NaN stays NaN
    return weights, scaled


@triton.jit(do_not_specialize=["R", *LAYOUT])
def weigh_kernel(
    scores_ptr, slots_ptr, weights_ptr, keys_ptr, output_slots_ptr, output_weights_ptr,
    N, R, B, T, C, L, REREADS, MISSING, FULL, P, temperature: tl.float64,
    J: tl.constexpr, WEIGHTING: tl.constexpr, OUTPUT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr,
):
    """weights[r] = softmax, silu or relu of scores[r] / temperature;  keys[r, j] = chunk·N + slots[r, j].

    With OUTPUT slots and weights of the reads for output go to their batch item and position too. A program owns
    BLOCK_R reads. Grid: (read tiles,).
    """
    offs_r, _, mask_j, mask, at = tile_of_reads(R, J, BLOCK_R, BLOCK_J)
    scores = tl.load(scores_ptr + at, mask=mask, other=0.0)
    slots = tl.load(slots_ptr + at, mask=mask, other=0)
    weights, _ = weighed(scores, mask_j, temperature, WEIGHTING)
    item, position, chunk, first, _, rereads, _ = locate(offs_r, B, T, C, L, REREADS, MISSING, FULL, P)
    tl.store(weights_ptr + at, weights, mask=mask)
    key_dtype: tl.constexpr = keys_ptr.dtype.element_ty
    tl.store(keys_ptr + at, chunk.to(key_dtype)[:, None] * N + slots.to(key_dtype), mask=mask)
    if OUTPUT:
        is_output = offs_r // B - first >= rereads
        out = (item.to(tl.int64) * T + position)[:, None] * J + tl.arange(0, BLOCK_J)[None, :]
        tl.store(output_slots_ptr + out, slots, mask=mask & is_output[:, None])
        tl.store(output_weights_ptr + out, weights, mask=mask & is_output[:, None])


def weigh(
    scores: Tensor, slots: Tensor, num_slots: int, key_dtype: torch.dtype, layout: Layout,
    *, weighting: str, temperature: float, outputs: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the weights [R, J] of reads with `scores` and `slots` [R, J], and the keys [R·J] whose sort plans writes.

    `outputs` are slots (int64) and weights of the output reads, contiguous [B, T, J], to be filled.
    """
    weights = torch.empty_like(scores)
    keys = torch.empty(scores.numel(), dtype=key_dtype, device=scores.device)
    grid, tiles = _tiles(*scores.shape)
    launch(
        weigh_kernel, grid,
        scores, slots, weights, keys, *(outputs or (slots, weights)),
        num_slots, scores.shape[0], *layout, temperature,
        WEIGHTING=weighting, OUTPUT=outputs is not None, **tiles, on=scores,
    )
    return weights, keys


def _tiles(num_reads: int, picks: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid of a kernel over the picks of reads, and its sizes, tile and warps: a program owns whole rows."""
    block_j = next_power_of_2(picks)
    block_r = max(1, _TILE // block_j)
    programs = cdiv(num_reads, block_r) if picks > 0 else 0
    num_warps = min(max(block_j // 256, 4), 16)
    return (programs,), {"J": picks, "BLOCK_R": block_r, "BLOCK_J": block_j, "num_warps": num_warps}


@triton.jit
def safe_squares(squares):
    """(Whether Σ w² counts as 0, Σ w² or 1 where it does): below the smallest normal number 1/x may be infinite."""
    tiny = tl.full(
        [], 2.2250738585072014e-308 if squares.dtype == tl.float64 else 1.1754943508222875e-38, squares.dtype
    )
    is_zero = squares < tiny
    return is_zero, tl.where(is_zero, 1.0, squares)


@triton.jit
def write_factors(
    running_ptr, gates_ptr, mask_ptr,
    offs_r, mask_r, weights,
    stride_gp, stride_gb, stride_mp, stride_mb,
    B, T, C, L, REREADS, MISSING, FULL, P,
    J: tl.constexpr, STEP: tl.constexpr, RATIO: tl.constexpr, HAS_GATES: tl.constexpr, HAS_MASK: tl.constexpr,
):
    """Of reads: (whether they are written, α, g, m, Σ w² or 1 where that is 0), each [BLOCK_R].

    `weights` are 0 where there is no pick. With RATIO α has the factor S/E; where there is a mask, S is a
    difference of the running sum of unmasked reads.
    """
    dtype: tl.constexpr = weights.dtype
    item, position, _, first, end, _, written = locate(offs_r, B, T, C, L, REREADS, MISSING, FULL, P)
    is_written = mask_r & (offs_r // B - first < written)
    ones = tl.full(offs_r.shape, 1.0, dtype)
    ratio = ones
    if RATIO:
        size = (end - first) * B
        if HAS_MASK:
            last = (first + written) * B - 1
            size = tl.load(running_ptr + last, mask=is_written, other=0)
            size -= tl.load(running_ptr + first * B - 1, mask=is_written & (first > 0), other=0)
        ratio = size.to(dtype) / tl.maximum(written * B, 1).to(dtype)
    squares = ones
    if STEP == "normalized":
        is_zero, squares = safe_squares(tl.sum(weights * weights, axis=1))
        scale = tl.where(is_zero, 0.0, ratio / squares)
    elif STEP == "paper":
        scale = J * ratio
    else:
        scale = ratio
    gate = ones
    if HAS_GATES:
        gate = load_factor(gates_ptr, position + REREADS - MISSING, item, stride_gp, stride_gb, is_written)
    token_mask = ones
    if HAS_MASK:
        token_mask = load_factor(mask_ptr, position + REREADS - MISSING, item, stride_mp, stride_mb, is_written)
    return is_written, scale, gate, token_mask, squares


@triton.jit(do_not_specialize=["R", "stride_gp", "stride_gb", "stride_mp", "stride_mb", *LAYOUT])
def fold_kernel(
    weights_ptr, counts_ptr, running_ptr, gates_ptr, mask_ptr, write_weights_ptr,
    stride_gp, stride_gb, stride_mp, stride_mb,
    R, B, T, C, L, REREADS, MISSING, FULL, P,
    J: tl.constexpr, STEP: tl.constexpr, RATIO: tl.constexpr, HAS_GATES: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr,
):
    """c = α·g·m·w / n_s, and 0 for a read that is not written. A program owns BLOCK_R reads. Grid: (read tiles,)."""
    offs_r, mask_r, _, mask, at = tile_of_reads(R, J, BLOCK_R, BLOCK_J)
    weights = tl.load(weights_ptr + at, mask=mask, other=0.0)
    counts = tl.load(counts_ptr + at, mask=mask, other=1)
    is_written, scale, gate, token_mask, _ = write_factors(
        running_ptr, gates_ptr, mask_ptr, offs_r, mask_r, weights, stride_gp, stride_gb, stride_mp, stride_mb,
        B, T, C, L, REREADS, MISSING, FULL, P, J, STEP, RATIO, HAS_GATES, HAS_MASK,
    )
    result = weights / counts.to(weights.dtype) * scale[:, None] * gate[:, None] * token_mask[:, None]
    # Chosen, not multiplied by 0: a read that is not written has no effect even if it is NaN.
    tl.store(write_weights_ptr + at, tl.where(is_written[:, None], result, 0.0), mask=mask)


def gates_and_mask(
    gates: Tensor | None, mask: Tensor | None, unused: Tensor,
) -> tuple[list[Tensor], list[int], dict[str, bool]]:
    """Tensors, strides and flags of gates and mask; for None a kernel takes `unused`, and does not read it."""
    tensors = [unused if x is None else x for x in (gates, mask)]
    strides = [stride for x in (gates, mask) for stride in ((0, 0) if x is None else x.stride())]
    return tensors, strides, {"HAS_GATES": gates is not None, "HAS_MASK": mask is not None}


def _running_sum(mask: Tensor | None, ratio: bool, unused: Tensor) -> Tensor:
    """How many reads are unmasked up to each, as far as α with S/E takes it."""
    return unused if mask is None or not ratio else torch.cumsum((mask > 0).flatten(), 0, dtype=torch.int32)


def fold(
    weights: Tensor, counts: Tensor, gates: Tensor | None, mask: Tensor | None, layout: Layout,
    *, step: str, ratio: bool,
) -> Tensor:
    """Launch the write weights c [R, J] from weights w and counts n_s [R, J].

    `gates` and `mask` are [positions, B], any strides, in the dtype of the weights. With `ratio` α has S/E, as under
    boundary "drop": there every position is one read of each batch item.
    """
    write_weights = torch.empty_like(weights)
    grid, tiles = _tiles(*weights.shape)
    tensors, strides, flags = gates_and_mask(gates, mask, weights)
    launch(
        fold_kernel, grid,
        weights, counts, _running_sum(mask, ratio, weights), *tensors, write_weights,
        *strides,
        weights.shape[0], *layout,
        STEP=step, RATIO=ratio, **flags, **tiles, on=weights,
    )
    return write_weights


@triton.jit(do_not_specialize=["R", *LAYOUT])
def weigh_again_kernel(
    scores_ptr, order_ptr, start_ptr, weights_ptr, log_rows_ptr,
    R, B, T, C, L, REREADS, MISSING, FULL, P, temperature: tl.float64,
    J: tl.constexpr, WEIGHTING: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr,
):
    """The weights as in `weigh_kernel`, and for each access the row of its chunk's log: where its segment starts.

    A program owns BLOCK_R reads, and as many sorted positions as these have picks. Grid: (read tiles,).
    """
    offs_r, _, mask_j, mask, at = tile_of_reads(R, J, BLOCK_R, BLOCK_J)
    weights, _ = weighed(tl.load(scores_ptr + at, mask=mask, other=0.0), mask_j, temperature, WEIGHTING)
    tl.store(weights_ptr + at, weights, mask=mask)
    _, _, _, first, _, _, _ = locate(offs_r, B, T, C, L, REREADS, MISSING, FULL, P)
    access = (first.to(tl.int64) * B * J)[:, None] + tl.load(order_ptr + at, mask=mask, other=0)
    tl.store(log_rows_ptr + access, tl.load(start_ptr + at, mask=mask, other=0), mask=mask)


def weigh_again(
    scores: Tensor, plan: Plan, layout: Layout, *, weighting: str, temperature: float,
) -> tuple[Tensor, Tensor]:
    """Launch the weights [R, J] once more, and the row of its chunk's log that each access finds: [R, J], int32."""
    weights, log_rows = torch.empty_like(scores), torch.empty_like(scores, dtype=plan.start.dtype)
    grid, tiles = _tiles(*scores.shape)
    launch(
        weigh_again_kernel, grid,
        scores, plan.order, plan.start, weights, log_rows,
        scores.shape[0], *layout, temperature,
        WEIGHTING=weighting, **tiles, on=scores,
    )
    return weights, log_rows


@triton.jit(do_not_specialize=["R", "stride_gp", "stride_gb", "stride_mp", "stride_mb", *LAYOUT])
def fold_grad_kernel(
    scores_ptr, weights_ptr, counts_ptr, grad_weights_ptr, grad_write_weights_ptr, running_ptr, gates_ptr, mask_ptr,
    grad_scores_ptr, grad_gates_ptr,
    stride_gp, stride_gb, stride_mp, stride_mb,
    R, B, T, C, L, REREADS, MISSING, FULL, P, temperature: tl.float64,
    J: tl.constexpr, WEIGHTING: tl.constexpr, STEP: tl.constexpr, RATIO: tl.constexpr, HAS_GATES: tl.constexpr,
    HAS_MASK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr,
):
    """From dw (as read) and dc: ds, through c = α·g·m·w / n_s and w = weights(s / temperature), and dg.

    A token is written by one read at most, which stores its dg. A program owns BLOCK_R reads. Grid: (read tiles,).
    """
    offs_r, mask_r, _, mask, at = tile_of_reads(R, J, BLOCK_R, BLOCK_J)
    weights = tl.load(weights_ptr + at, mask=mask, other=0.0)
    counts = tl.load(counts_ptr + at, mask=mask, other=1)
    dtype: tl.constexpr = weights.dtype
    is_written, scale, gate, token_mask, squares = write_factors(
        running_ptr, gates_ptr, mask_ptr, offs_r, mask_r, weights, stride_gp, stride_gb, stride_mp, stride_mb,
        B, T, C, L, REREADS, MISSING, FULL, P, J, STEP, RATIO, HAS_GATES, HAS_MASK,
    )
    grad = tl.load(grad_write_weights_ptr + at, mask=mask & is_written[:, None], other=0.0)
    # The mask comes first: a masked token stays 0 then, even if a product of the other factors overflows.
    per_weight = grad * token_mask[:, None] / counts.to(dtype)
    per_read = tl.sum(per_weight * weights, axis=1)  # [BLOCK_R]
    if HAS_GATES:
        item, position, _, _, _, _, _ = locate(offs_r, B, T, C, L, REREADS, MISSING, FULL, P)
        grad_gate = per_read * scale
        carried = REREADS - MISSING
        out = grad_gates_ptr + item.to(tl.int64) * (T + carried) + position + carried
        tl.store(out, grad_gate.to(grad_gates_ptr.dtype.element_ty), mask=is_written)
    if STEP == "normalized":
        # α = ρ/S with S = Σ w²: dα/dw = -2·α·w / S, and 0 where α is. To divide w by S first avoids overflow.
        per_weight -= 2.0 * per_read[:, None] * (weights / squares[:, None])
    through_write = per_weight * (gate * scale)[:, None]
    # Chosen, not multiplied by 0: a read that is not written has no effect even if it is NaN.
    grad = tl.load(grad_weights_ptr + at, mask=mask, other=0.0) + tl.where(is_written[:, None], through_write, 0.0)
    if WEIGHTING == "softmax":
        grad = weights * (grad - tl.sum(weights * grad, axis=1)[:, None])
    else:
        scaled = tl.load(scores_ptr + at, mask=mask, other=0.0) / tl.full([], temperature, dtype)
        if WEIGHTING == "silu":
            sigmoid = 1.0 / (1.0 + tl.exp(-scaled))
            grad = grad * sigmoid * (1.0 + scaled * (1.0 - sigmoid))
        else:
            grad = tl.where(scaled <= 0, 0.0, grad)  # not `scaled > 0`: the gradient of a NaN score stays NaN
    tl.store(grad_scores_ptr + at, grad / tl.full([], temperature, dtype), mask=mask)


def fold_grad(
    scores: Tensor, weights: Tensor, counts: Tensor, grad_weights: Tensor, grad_write_weights: Tensor,
    gates: Tensor | None, mask: Tensor | None, grad_gates: Tensor | None, layout: Layout,
    *, weighting: str, temperature: float, step: str, ratio: bool,
) -> Tensor:
    """Launch the gradient of the scores [R, J] from those of the weights as read and of the write weights, [R, J].

    With gates their gradient goes to `grad_gates`, contiguous [B, positions], where a token is written; it is left
    elsewhere. `gates`, `mask` and `ratio` are those of `fold`.
    """
    grad_scores = torch.empty_like(scores)
    grid, tiles = _tiles(*scores.shape)
    tensors, strides, flags = gates_and_mask(gates, mask, weights)
    launch(
        fold_grad_kernel, grid,
        scores, weights, counts, grad_weights, grad_write_weights, _running_sum(mask, ratio, weights), *tensors,
        grad_scores, grad_scores if grad_gates is None else grad_gates,
        *strides,
        scores.shape[0], *layout, temperature,
        WEIGHTING=weighting, STEP=step, RATIO=ratio, **flags, **tiles, on=scores,
    )
    return grad_scores
