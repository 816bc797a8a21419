"""The whole memory over a sequence: read, write and key step, chunk by chunk."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from reference.gather import sparse_value_gather
from reference.key_step import marginal_entropy_loss, step_keys
from reference.lookup import product_key_lookup
from reference.update import chunk_value_update


class MemoryOutput(NamedTuple):
    """What a sequence leaves behind."""

    output: Tensor  # [B, T, D]
    keys: Tensor  # [H, 2, n, Dk/2]
    values: Tensor  # [N, D]
    slots: Tensor  # [B, T, J]
    weights: Tensor  # [B, T, J]


class Read(NamedTuple):
    """One read of some positions."""

    predictions: Tensor  # [B, t, D]
    slots: Tensor  # [B, t, J]
    weights: Tensor  # [B, t, J]


def fast_weight_memory(
    queries: Tensor,
    targets: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    chunk_size: int = 512,
    top_k: int = 8,
    lookahead: int = 1,
    score: str = "idw",
    eps: float = 1e-3,
    weighting: str = "softmax",
    temperature: float = 1.0,
    gates: Tensor | None = None,
    mask: Tensor | None = None,
    lr: float = 1.0,
    weight_decay: float = 0.0,
    clip: float | None = None,
    addressing_weight: float = 1.0,
    key_gradient: str = "addressing",
    step: str = "paper",
    boundary: str = "carry",
) -> MemoryOutput:
    """Read a sequence, and rewrite keys and values after each chunk from the state that the chunk read.

    The pair (t, t + lookahead) is written with e = p_t - y_{t+lookahead}. ``boundary="drop"``: a chunk writes the pairs
    that lie within it, the last chunk too if it is not full. ``"carry"``: it writes the pairs that end in it, of which
    the first ``lookahead`` are looked up and read again; a chunk that is not full is read, not written.

    Args:
        queries: [B, T, H, Dk].
        targets: [B, T, D].
        keys: [H, 2, n, Dk/2].
        values: [N, D], N = n²; one table for the whole batch.
        gates: [B, T], write gates; None is all ones.
        mask: [B, T], bool, integer or real, >= 0; it multiplies, and mask > 0 counts as unmasked.
        addressing_weight: λ of the key step's loss.
        key_gradient: "addressing", or "all": the memorisation loss moves the keys too.
        step: "gradient", α = S/E; "paper", α = J·S/E; or "normalized", α = (S/E)/Σⱼw².

    Returns:
        The output in the dtype of the targets, final keys and values, and slots and weights of the output reads.
        Everything but the slots is differentiable in queries, targets, keys, values and gates.
    """
    batch, length = queries.shape[:2]
    differentiable = torch.is_grad_enabled()

    def read(keys: Tensor, values: Tensor, start: int, stop: int) -> Read:
        scores, slots = product_key_lookup(queries[:, start:stop], keys, top_k, score=score, eps=eps)
        weights, slots = weigh(scores.flatten(-2), weighting, temperature), slots.flatten(-2)
        # Predictions inside the memory are not rounded, whatever the dtype of the table.
        return Read(sparse_value_gather(values.to(weights.dtype), slots, weights), slots, weights)

    reads = [read(keys, values, 0, 0)]  # of nothing: a sequence may be empty
    for start in range(0, length, chunk_size):
        stop = min(start + chunk_size, length)
        with torch.enable_grad():
            # What the key step differentiates; the same keys as far as the outer gradient goes.
            moved = keys if keys.requires_grad else keys.detach().requires_grad_()
            output = read(moved, values, start, stop)
            reads.append(output)
            if boundary == "carry" and stop - start < chunk_size:
                break
            first = start if boundary == "drop" else max(0, start - lookahead)
            last = max(first, stop - lookahead)  # one past the last position that is written
            # Read for themselves, so that what is read and not written has no part in the loss, not even 0·NaN.
            written = read(moved, values, first, last)
            pair_targets = targets[:, first + lookahead : last + lookahead]
            pair_gates = None if gates is None else gates[:, first:last]
            pair_mask = None if mask is None else mask[:, first:last]

            positions = batch * (last - first)  # E
            counted = positions
            if boundary == "drop":
                counted = batch * (stop - start) if pair_mask is None else int((pair_mask > 0).sum())
            ratio = counted / max(1, positions)  # S/E

            loss = addressing_weight * marginal_entropy_loss(queries[:, start:stop], moved, top_k, score=score, eps=eps)
            if key_gradient == "all":
                loss = loss + memorisation_loss(written, pair_targets, pair_gates, pair_mask)
            gradient = torch.autograd.grad(
                loss, moved, create_graph=differentiable, allow_unused=True, materialize_grads=True, retain_graph=True
            )[0]
            scale: float | Tensor = ratio
            if step == "paper":
                scale = written.slots.shape[-1] * ratio
            elif step == "normalized":
                squares = written.weights.square().sum(-1)
                scale = torch.where(squares > 0, ratio / torch.where(squares > 0, squares, 1.0), 0.0).flatten()
            values = chunk_value_update(
                values,
                written.slots.flatten(0, 1),
                written.weights.flatten(0, 1),
                pair_targets.flatten(0, 1),
                written.predictions.flatten(0, 1),
                gates=None if pair_gates is None else pair_gates.flatten(),
                mask=None if pair_mask is None else pair_mask.flatten(),
                count_slots=output.slots if boundary == "drop" else None,
                lr=lr,
                scale=scale,
                weight_decay=weight_decay,
                clip=clip,
            )
            keys = step_keys(keys, gradient, lr=lr, weight_decay=weight_decay, clip=clip)
        if not differentiable:
            keys, values = keys.detach(), values.detach()
    joined = Read(*(torch.cat(parts, dim=1) for parts in zip(*reads, strict=True)))
    return MemoryOutput(joined.predictions.to(targets.dtype), keys, values, joined.slots, joined.weights)


def weigh(scores: Tensor, weighting: str, temperature: float) -> Tensor:
    """Weights of the J picks of a token together: softmax, silu or relu of scores / temperature."""
    function = {"softmax": lambda s: s.softmax(-1), "silu": F.silu, "relu": torch.relu}[weighting]
    return function(scores / temperature)


def memorisation_loss(written: Read, targets: Tensor, gates: Tensor | None, mask: Tensor | None) -> Tensor:
    """1/(2·E·D) · Σ over the written pairs of g·m·|p - y|²; 0 without any."""
    errors = (written.predictions - targets.to(written.predictions.dtype)).square().sum(-1)  # [B, written]
    for factor in (gates, mask):
        if factor is not None:
            errors = errors * factor.to(errors.dtype)
    return errors.sum() / (2 * max(1, errors.numel()) * targets.shape[-1])
