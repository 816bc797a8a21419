"""The small [rows, J] algebra between scores and scans: read weights, the plan of all writes, and write weights."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks as checks
from .chunks import Reads, items_of
from .options import Options
from .plan import count_accesses, plan_segments, row_dtype, sum_at, within_chunks
from .records import Plan, Writes, each


def plan_reads(
    slots: Tensor, num_slots: int, num_chunks: int, reads: Reads, mask: Tensor | None, boundary: str
) -> tuple[Plan, Tensor]:
    """One stable sort for the writes of all chunks: the plan of each (`within_chunks`), and n_s of every access.

    Args:
        slots: [R, J], of all reads.
        mask: [R] or None.

    Returns:
        The plan, and the counts [R, J]: under "drop" of all accesses of a chunk, under "carry" of those written and
        unmasked.
    """
    picks = slots.shape[1]
    plan = plan_segments(slots + (reads.chunk * num_slots).unsqueeze(1), num_chunks * num_slots)
    counted = None
    if boundary == "carry":
        counted = reads.written if mask is None else reads.written & (mask > 0)
        counted = counted.repeat_interleave(picks)
    counts = count_accesses(plan, counted).view(slots.shape)
    chunk, first = (x.repeat_interleave(picks) for x in (reads.chunk, reads.first * picks))
    return within_chunks(plan, num_slots, chunk, first), counts


def step_ratio(reads: Reads, mask: Tensor | None, lookahead: int, boundary: str, dtype: torch.dtype) -> Tensor | None:
    """S/E for each read, [R]; None where it is 1.

    Under "drop", E counts what the chunk writes, masked or not, and S what it reads, or the unmasked among the E.
    """
    if boundary == "carry" or (mask is None and lookahead == 0):
        return None
    size = reads.end - reads.first
    running = F.pad(torch.cumsum(reads.written, 0), (1, 0))
    written = running[reads.end] - running[reads.first]
    if mask is not None:
        running = F.pad(torch.cumsum(reads.written & (mask > 0), 0), (1, 0))
        size = running[reads.end] - running[reads.first]
    return size.to(dtype) / written.clamp(min=1)


def weigh(scores: Tensor, weighting: str, temperature: float) -> Tensor:
    """Weights [..., J] of the J picks of a token together: softmax, silu or relu of scores / temperature."""
    scaled = scores if temperature == 1.0 else scores / temperature
    if weighting == "softmax":
        return torch.softmax(scaled, dim=-1)
    return F.silu(scaled) if weighting == "silu" else torch.relu(scaled)


def weigh_grad(grad_weights: Tensor, scores: Tensor, weighting: str, temperature: float) -> Tensor:
    """Gradient of the scores, differentiable in both arguments."""
    if weighting == "softmax":
        weights = weigh(scores, weighting, temperature)
        grad = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
    else:
        scaled = scores / temperature
        if weighting == "silu":
            sigmoid = torch.sigmoid(scaled)
            grad = grad_weights * sigmoid * (1.0 + scaled * (1.0 - sigmoid))
        else:
            grad = torch.where(scaled <= 0, 0.0, grad_weights)  # a NaN score passes the gradient on
    return grad / temperature


def write_scale(weights: Tensor, ratio: Tensor | None, step: str) -> Tensor | float:
    """α of each read: ρ = S/E, J·ρ, or ρ / Σⱼ wⱼ², which is 0 where that sum underflows."""
    if step != "normalized":
        factor = float(weights.shape[-1]) if step == "paper" else 1.0
        return factor if ratio is None else factor * ratio
    squares = weights.square().sum(-1)
    is_zero = squares < torch.finfo(squares.dtype).tiny  # below it 1/x may be infinite
    numerator = torch.ones_like(squares) if ratio is None else ratio
    return torch.where(is_zero, 0.0, numerator / torch.where(is_zero, 1.0, squares))


def fold_write_weights(
    weights: Tensor, counts: Tensor, scale: Tensor | float, factors: list[Tensor], written: Tensor | None = None
) -> Tensor:
    """c = α·g·m·w / n_s, [R, J]: everything that multiplies e; 0 for a read that is not written.

    Args:
        weights: w, [R, J].
        counts: n_s, [R, J].
        scale: α, a number or [R].
        factors: gates g and mask m as far as there are any, each [R], in the dtype of the weights.
        written: [R], bool; None is all.
    """
    result = weights / counts
    for factor in (scale, *factors):
        result = result * (factor.unsqueeze(1) if isinstance(factor, Tensor) else factor)
    # A product would pass NaN on, and a read that is not written has no effect even if it is NaN.
    return result if written is None else torch.where(written.unsqueeze(1), result, 0.0)


def fold_write_weights_grad(
    grad: Tensor,
    weights: Tensor,
    counts: Tensor,
    ratio: Tensor | None,
    step: str,
    gates: Tensor | None,
    mask: Tensor | None,
    written: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of `fold_write_weights` to the weights, [R, J], and to the gates, [R]."""
    scale = write_scale(weights, ratio, step)
    per_weight = torch.where(written.unsqueeze(1), grad, 0.0) / counts
    if mask is not None:  # first, so that what is masked is 0 even if another product overflows
        per_weight = per_weight * mask.unsqueeze(1)
    per_read = (per_weight * weights).sum(1)
    for_gates = per_read * scale
    if step == "normalized":
        # α = ρ/S with S = Σ w²: dα/dw = -2·α·w / S, and 0 where α is 0. Dividing first avoids overflow.
        squares = weights.square().sum(-1, keepdim=True)
        is_zero = squares < torch.finfo(squares.dtype).tiny
        per_weight = per_weight - 2.0 * per_read.unsqueeze(1) * (weights / torch.where(is_zero, 1.0, squares))
    factor = (torch.ones_like(per_read) if gates is None else gates) * scale
    for_weights = per_weight * factor.unsqueeze(1)
    # No product, for the same reason as in `fold_write_weights`.
    return torch.where(written.unsqueeze(1), for_weights, 0.0), torch.where(written, for_gates, 0.0)


def plan_writes(
    scores: Tensor,
    slots: Tensor,
    num_slots: int,
    gates: Tensor | None,
    mask: Tensor | None,
    length: int,
    batch: int,
    carried: int,
    outputs: tuple[Tensor, Tensor] | None,
    o: Options,
) -> Writes:
    """Weigh the picks of all reads, and plan the writes of all chunks by one stable sort.

    Args:
        scores, slots: [R, J].
        gates, mask: [carried + length, B], any strides, or None; in the dtype of the scores.
        outputs: slots and weights of the reads for output, contiguous [B, T, J], to be filled.
    """
    if checks.use_triton(o.backend, scores):
        from .kernels import chunks as planning
        from .kernels import weights as kernels

        layout = o.layout(length, batch, carried)
        chunks = -(-length // o.chunk_size)
        how: dict[str, Any] = {"weighting": o.weighting, "temperature": o.temperature, "outputs": outputs}
        weights, keys = kernels.weigh(scores, slots, num_slots, row_dtype(chunks * num_slots), layout, **how)
        ordered, order = torch.sort(keys, stable=True)
        shape = (num_slots, row_dtype(num_slots), slots.shape[1])
        plan, counts = planning.plan_writes(ordered, order, *shape, mask, layout, count_all=o.boundary == "drop")
        write_weights = kernels.fold(weights, counts, gates, mask, layout, step=o.step, ratio=o.has_ratio)
        return Writes(weights, write_weights, counts, plan)
    reads = o.number_reads(length, batch, scores.device, carried)
    gates, mask = each(lambda x: x.flatten()[reads.token], gates, mask)
    weights = weigh(scores, o.weighting, o.temperature)
    chunks = -(-length // o.chunk_size)
    planned, counts = plan_reads(slots, num_slots, chunks, reads, mask, o.boundary)
    scale = write_scale(weights, step_ratio(reads, mask, o.lookahead, o.boundary, weights.dtype), o.step)
    factors = [x for x in (gates, mask) if x is not None]
    write_weights = fold_write_weights(weights, counts, scale, factors, reads.written)
    for output, x in zip(outputs or (), (slots, weights), strict=False):
        output.copy_(x[reads.output].view(length, batch, x.shape[1]).transpose(0, 1))
    return Writes(weights, write_weights, counts, planned)


def weigh_again(scores: Tensor, plan: Plan, length: int, batch: int, carried: int, o: Options) -> tuple[Tensor, Tensor]:
    """The weights [R, J] once more, and which row of its chunk's log each access finds, int32 [R, J]."""
    if checks.use_triton(o.backend, scores):
        from .kernels import weights as kernels

        layout = o.layout(length, batch, carried)
        return kernels.weigh_again(scores, plan, layout, weighting=o.weighting, temperature=o.temperature)
    log_rows = torch.empty_like(plan.start)
    for chunk in o.cut(length, carried):
        rows, picks = chunk.rows(batch), scores.shape[1]
        accesses = slice(rows.start * picks, rows.stop * picks)
        log_rows[accesses].scatter_(0, plan.order[accesses], plan.start[accesses])
    return weigh(scores, o.weighting, o.temperature), log_rows.view(scores.shape)


def plan_writes_grad(
    grad_weights: Tensor,
    grad_write_weights: Tensor,
    scores: Tensor,
    writes: Writes,
    gates: Tensor | None,
    mask: Tensor | None,
    length: int,
    batch: int,
    carried: int,
    o: Options,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the scores, [R, J], and of the gates if there are any, contiguous [B, carried + T] in their dtype.

    Args:
        grad_weights, grad_write_weights: of the weights as read, and of the write weights, [R, J].
        gates, mask: [B, carried + T] or None, any strides and dtype.
    """
    grad_gates = None
    gate_positions, mask_positions = each(lambda x: x.transpose(0, 1).to(scores.dtype), gates, mask)
    if checks.use_triton(o.backend, scores):
        from .kernels import weights as kernels

        if gates is not None:  # tokens that are not written keep the 0
            grad_gates = torch.zeros(batch, carried + length, dtype=gates.dtype, device=scores.device)
        grads, factors = (grad_weights, grad_write_weights), (gate_positions, mask_positions, grad_gates)
        how: dict[str, Any] = {"weighting": o.weighting, "temperature": o.temperature}
        how |= {"step": o.step, "ratio": o.has_ratio}
        layout = o.layout(length, batch, carried)
        grad_scores = kernels.fold_grad(scores, writes.weights, writes.counts, *grads, *factors, layout, **how)
        return grad_scores, grad_gates
    reads = o.number_reads(length, batch, scores.device, carried)
    gate_reads, mask_reads = each(lambda x: x.flatten()[reads.token], gate_positions, mask_positions)
    ratio = step_ratio(reads, mask_reads, o.lookahead, o.boundary, scores.dtype)
    through_write, per_read = fold_write_weights_grad(
        grad_write_weights, writes.weights, writes.counts, ratio, o.step, gate_reads, mask_reads, reads.written
    )
    grad_scores = weigh_grad(grad_weights + through_write, scores, o.weighting, o.temperature)
    if gates is not None:
        positions = carried + length
        grad_gates = items_of(sum_at(reads.token, per_read, positions * batch), positions, batch).to(gates.dtype)
    return grad_scores, grad_gates


def sum_reads(grads: Tensor, length: int, batch: int, carried: int, dtype: torch.dtype, o: Options) -> Tensor:
    """Gradients of the reads, [R, ...], summed for each token: contiguous [B, carried + T, ...], in `dtype`."""
    if checks.use_triton(o.backend, grads):
        from .kernels import chunks as kernels

        return kernels.sum_reads(grads, o.layout(length, batch, carried), dtype)
    by_token = grads.new_zeros((carried + length) * batch, *grads.shape[1:])
    for chunk in o.cut(length, carried):
        by_token[(chunk.first + carried) * batch : (chunk.stop + carried) * batch] += grads[chunk.rows(batch)]
    return items_of(by_token, carried + length, batch).to(dtype)
