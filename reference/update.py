"""Chunk value update: one gradient step on the values of the slots that a chunk accessed."""

import torch
from torch import Tensor


def chunk_value_update(
    values: Tensor,
    slots: Tensor,
    weights: Tensor,
    targets: Tensor,
    predictions: Tensor,
    *,
    gates: Tensor | None = None,
    mask: Tensor | None = None,
    count_slots: Tensor | None = None,
    lr: float = 1.0,
    scale: float | Tensor | None = None,
    weight_decay: float = 0.0,
    clip: float | None = None,
) -> Tensor:
    """The values after one write.

    e[t] = predictions[t] − targets[t]
    G[s] = (1 / n_s) · Σ_{(t, j): slots[t, j] = s} α[t] · gates[t] · mask[t] · weights[t, j] · e[t]
    new_values[s] = values[s] − lr · (clamp(G[s], −clip, clip) + weight_decay · values[s])

    Args:
        values: [N, D], any float dtype.
        slots: [M, J], int64, in [0, N).
        weights: [M, J].
        targets: [M, D].
        predictions: [M, D].
        gates: [M], write gates; None is all ones.
        mask: [M], bool, integer or real, ≥ 0; None is all ones. It multiplies, and a row with mask > 0 counts as
        unmasked.
        count_slots: any shape, int64: n_s is how often s occurs in it, at least 1. None: the slots of the unmasked
        rows.
        scale: α, a float or [M]; None is J.

    Returns:
        A new [N, D] in the dtype of ``values``: computed in float32 (float64 for float64), rounded once. Differentiable
        in values, weights, targets, predictions, gates and a tensor scale.
    """
    N = values.shape[0]
    M, J = slots.shape
    dtype = torch.promote_types(values.dtype, torch.float32)
    table = values.to(dtype)
    errors = predictions.to(dtype) - targets.to(dtype)

    # α·g·m·w, one factor for each access
    factors = weights.to(dtype) * _per_row(J if scale is None else scale, M, table)
    if gates is not None:
        factors = factors * _per_row(gates, M, table)
    if mask is not None:
        factors = factors * _per_row(mask, M, table)

    if count_slots is None:
        count_slots = slots if mask is None else slots[mask > 0]
    counts = torch.bincount(count_slots.reshape(-1), minlength=N).clamp(min=1)  # n_s

    terms = factors.unsqueeze(-1) * errors.unsqueeze(-2)  # [M, J, D]
    gradient = torch.zeros_like(table).index_add(0, slots.reshape(-1), terms.flatten(0, 1))
    gradient = gradient / counts.unsqueeze(-1)
    if clip is not None:
        # Not clamp alone, which passes the gradient of NaN on: only what is within the bounds has one.
        gradient = torch.where(gradient.abs() <= clip, gradient, gradient.detach().clamp(-clip, clip))
    # The decay apart from the step: infinite rows that nothing addresses stay what they are.
    return ((1.0 - lr * weight_decay) * table - lr * gradient).to(values.dtype)


def _per_row(factor: float | Tensor, M: int, like: Tensor) -> Tensor:
    """A number or [M] as a column [M, 1] with the dtype and device of ``like``."""
    return torch.as_tensor(factor, dtype=like.dtype, device=like.device).expand(M).unsqueeze(-1)
