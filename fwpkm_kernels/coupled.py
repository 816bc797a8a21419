"""The ablation ``key_gradient="all"``: the memorisation loss moves the keys too, so addresses depend on values.

Neither scan can then run ahead of the other, and the outer gradient is a second derivative of the memorisation loss. So
this is a plain composed path: a loop over chunks of ordinary differentiable PyTorch, in which the gradient of the keys
is written in closed form, and autograd's first derivative of that is the second one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks as checks
from .chunks import items_of, rows_of
from .kernels import compute_dtype
from .lookup import halves_op, sub_key_rows
from .options import Options
from .plan import sum_at
from .records import Inputs, MemoryOutput, each
from .update import chunk_value_update, chunk_value_update_
from .weights import weigh, weigh_grad, write_scale


def _scored_pairs(queries: Tensor, keys: Tensor, sub_keys: Tensor) -> tuple[Tensor, Tensor]:
    """The query halves [M, H, 2, 1, Dk/2] and the sub-keys [M, H, 2, K, Dk/2] that they are scored against."""
    half = keys.shape[-1]
    return queries.unflatten(-1, (2, 1, half)), F.embedding(sub_keys, keys.flatten(0, 2))


def _scores_at(queries: Tensor, keys: Tensor, sub_keys: Tensor, o: Options) -> Tensor:
    """Scores of the given sub-keys [M, H, 2, K], differentiable."""
    q, k = _scored_pairs(queries, keys, sub_keys)
    return (q * k).sum(-1) if o.score == "dot" else -torch.log(o.eps + (q - k).square().sum(-1))


def _keys_gradient(grad_scores: Tensor, queries: Tensor, keys: Tensor, sub_keys: Tensor, o: Options) -> Tensor:
    """Gradient of the keys [H, 2, n, Dk/2] from that of half scores [M, H, 2, K], differentiable in all."""
    q, k = _scored_pairs(queries, keys, sub_keys)
    if o.score == "dot":
        parts = grad_scores.unsqueeze(-1) * q
    else:
        difference = q - k
        parts = (2.0 * grad_scores / (o.eps + difference.square().sum(-1))).unsqueeze(-1) * difference
    return sum_at(sub_keys.reshape(-1), parts.flatten(0, -2), keys.shape[:3].numel()).view(keys.shape)


def _entropy_grad(half_scores: Tensor, sub_keys: Tensor, num_keys: int, weight: float) -> Tensor:
    """Gradient of -weight·(H(P̄¹) + H(P̄²)) to the half scores [M, H, 2, K]."""
    num_rows = half_scores.shape[:2].numel()
    probabilities = torch.softmax(half_scores, dim=-1)
    columns = (sub_keys % (2 * num_keys)).long()  # heads pooled
    marginal = sum_at(columns.reshape(-1), probabilities.reshape(-1), 2 * num_keys) / max(1, num_rows)
    slope = torch.log(marginal + 1e-8) + marginal / (marginal + 1e-8)
    picked = F.embedding(columns, slope.unsqueeze(1)).squeeze(-1)
    centered = picked - (probabilities * picked).sum(-1, keepdim=True)
    return weight / max(1, num_rows) * probabilities * centered


def coupled_step(
    keys: Tensor,
    queries: Tensor,
    sub_keys: Tensor,
    pair_queries: Tensor,
    pair_slots: Tensor,
    pair_rows: Tensor,
    errors: Tensor,
    factors: list[Tensor],
    o: Options,
) -> Tensor:
    """The keys after one key step along both losses, in the dtype of the keys; differentiable.

    Args:
        queries: [M, H, Dk], of the rows that the chunk reads for output.
        sub_keys: [M, H, 2, K], the best of their halves.
        pair_queries: [E, H, Dk], of the rows that are written.
        pair_slots: [E, H, K].
        pair_rows: [E, J, D], the value rows of these slots, as read.
        errors: e, [E, D].
        factors: m and g as far as there are any, each [E].
    """
    dtype = errors.dtype
    num_keys = keys.shape[2]
    current = keys.to(dtype)
    queries, pair_queries = queries.to(dtype), pair_queries.to(dtype)

    half_scores = _scores_at(queries, current, sub_keys, o)
    grad_half_scores = _entropy_grad(half_scores, sub_keys, num_keys, o.addressing_weight)
    gradient = _keys_gradient(grad_half_scores, queries, current, sub_keys, o)

    if errors.numel() > 0:
        # l = 1/(2·E·D) Σ g m |e|², e = Σ w·row - y, reaches the keys through the weights.
        pair_sub_keys = sub_key_rows(pair_slots, num_keys)
        scores = _scores_at(pair_queries, current, pair_sub_keys, o).sum(2).flatten(1)
        # Errors are multiplied by the mask first: a masked error is then 0, even if another product overflows.
        scaled = errors
        for factor in factors:
            scaled = scaled * factor.unsqueeze(1)
        grad_weights = torch.einsum("mjd,md->mj", pair_rows, scaled) / errors.numel()
        grad_scores = weigh_grad(grad_weights, scores, o.weighting, o.temperature).view(pair_slots.shape)
        grad_halves = grad_scores.unsqueeze(2).expand(pair_sub_keys.shape)
        gradient = gradient + _keys_gradient(grad_halves, pair_queries, current, pair_sub_keys, o)
    if o.clip is not None:
        # clamp alone would pass on the gradient of a NaN; here only elements within the bounds have a gradient.
        bounded = gradient.detach().clamp(-o.clip, o.clip)
        gradient = torch.where(gradient.abs() <= o.clip, gradient, bounded)
    # The decay is a factor of the keys and no part of the gradient: a term 0·keys would make an infinite one NaN.
    return ((1.0 - o.lr * o.weight_decay) * current - o.lr * gradient).to(keys.dtype)


@checks.without_autocast
def coupled_memory(inputs: Inputs, o: Options, carried: int = 0) -> MemoryOutput:
    """`fast_weight_memory` under key_gradient="all"; queries, gates and mask have `carried` tokens before the targets'.

    Differentiable where gradients are enabled; elsewhere it writes one private copy of the table in place.
    """
    differentiable = torch.is_grad_enabled()
    queries, targets, keys, values, gates, mask = inputs
    batch, length = targets.shape[:2]
    dtype = compute_dtype(values.dtype)
    rows, target_rows = rows_of(queries), rows_of(targets).to(dtype)
    gate_rows, mask_rows = each(lambda x: rows_of(x).to(dtype), gates, mask)
    new_keys, new_values = (x.clone(memory_format=torch.contiguous_format) for x in (keys, values))
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for chunk in o.cut(length, carried):
        window = rows[(chunk.first + carried) * batch : (chunk.stop + carried) * batch].to(dtype)
        with torch.no_grad():
            slots, sub_keys = halves_op(window, new_keys, *o.lookup)
        scores = _scores_at(window, new_keys.to(dtype), sub_key_rows(slots, keys.shape[2]), o).sum(2).flatten(1)
        weights = weigh(scores, o.weighting, o.temperature)
        value_rows = F.embedding(slots.flatten(1), new_values).to(dtype)
        predictions = torch.einsum("mj,mjd->md", weights, value_rows)
        new = slice((chunk.start - chunk.first) * batch, None)
        found.append((predictions[new], slots.flatten(1)[new], weights[new]))
        if not chunk.is_written:
            break

        written = slice(0, (chunk.last - chunk.first) * batch)
        tokens = slice((chunk.first + carried) * batch, (chunk.last + carried) * batch)
        pair_targets = target_rows[(chunk.first + o.lookahead) * batch : (chunk.last + o.lookahead) * batch]
        pair_gates, pair_mask = (None if x is None else x[tokens] for x in (gate_rows, mask_rows))
        errors = predictions[written] - pair_targets
        moved_keys = coupled_step(
            new_keys,
            window[new],
            sub_keys[new],
            window[written],
            slots[written],
            value_rows[written],
            errors,
            [x for x in (pair_mask, pair_gates) if x is not None],
            o,
        )
        ratio = None
        if o.boundary == "drop":
            size = torch.full((len(errors),), len(window), dtype=dtype, device=keys.device)
            if pair_mask is not None:
                size = (pair_mask > 0).sum().to(dtype).expand(size.shape)
            ratio = size / max(1, len(errors))
        write = chunk_value_update if differentiable else chunk_value_update_
        written_values = write(
            new_values,
            slots.flatten(1)[written],
            weights[written],
            pair_targets,
            predictions[written],
            gates=pair_gates,
            mask=pair_mask,
            count_slots=slots if o.boundary == "drop" else None,
            lr=o.lr,
            scale=write_scale(weights[written], ratio, o.step),
            weight_decay=o.weight_decay,
            clip=o.clip,
            backend=o.backend,
        )
        new_keys, new_values = moved_keys, new_values if written_values is None else written_values
    if not found:  # T = 0
        empty = rows.new_empty(0, keys.shape[0] * o.top_k, dtype=dtype)
        found.append((target_rows, empty.long(), empty))
    output, slots, weights = (items_of(torch.cat(parts), length, batch) for parts in zip(*found, strict=True))
    return MemoryOutput(output.to(targets.dtype), new_keys, new_values, slots, weights)
