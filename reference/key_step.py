"""The key step: one step of the sub-keys toward being used evenly."""

import torch
from torch import Tensor

from reference.lookup import best_half_scores


def marginal_entropy_loss(
    queries: Tensor, keys: Tensor, top_k: int, *, score: str = "idw", eps: float = 1e-3
) -> Tensor:
    """-(H(P̄¹) + H(P̄²)): the negative entropies of how often the sub-keys of each half are picked.

    P of a row is the softmax over its K best half scores, and 0 elsewhere; P̄ is its mean over all rows, heads pooled;
    H(P̄) = -Σⱼ P̄ⱼ·log(P̄ⱼ + 1e-8).

    Args:
        queries: [..., H, Dk], one row per token and head.
        keys: [H, 2, n, Dk/2].

    Returns:
        A scalar, differentiable in queries and keys; 0 without rows.
    """
    loss = keys.new_zeros((), dtype=torch.promote_types(keys.dtype, torch.float32))
    for best, columns in best_half_scores(queries, keys, top_k, score=score, eps=eps):
        zeros = best.new_zeros(*best.shape[:-1], keys.shape[2])
        probabilities = zeros.scatter(-1, columns, best.softmax(-1))  # [..., H, n]
        rows = probabilities.reshape(-1, keys.shape[2])
        marginal = rows.sum(0) / max(1, len(rows))
        loss = loss + (marginal * torch.log(marginal + 1e-8)).sum()
    return loss


def step_keys(keys: Tensor, gradient: Tensor, *, lr: float, weight_decay: float, clip: float | None) -> Tensor:
    """keys - lr·(clamp(gradient, -clip, clip) + weight_decay·keys)."""
    if clip is not None:
        # Not clamp alone, which passes the gradient of NaN on: only what is within the bounds has one.
        gradient = torch.where(gradient.abs() <= clip, gradient, gradient.detach().clamp(-clip, clip))
    # The decay apart from the step: infinite sub-keys that nothing picks stay what they are.
    return (1.0 - lr * weight_decay) * keys - lr * gradient


def product_key_update(
    keys: Tensor,
    queries: Tensor,
    *,
    top_k: int,
    score: str = "idw",
    eps: float = 1e-3,
    lr: float = 1.0,
    weight: float = 1.0,
    weight_decay: float = 0.0,
    clip: float | None = None,
) -> Tensor:
    """The sub-keys after one key step, by torch.autograd.grad of weight·:func:`marginal_entropy_loss`.

    Args:
        keys: [H, 2, n, Dk/2].
        queries: [M, H, Dk], all rows that the chunk reads.
        weight: λ; 0 removes the loss, not the decay.

    Returns:
        New keys, differentiable in keys and queries.
    """
    with torch.enable_grad():
        moved = keys if keys.requires_grad else keys.detach().requires_grad_()
        loss = weight * marginal_entropy_loss(queries, moved, top_k, score=score, eps=eps)
        gradient = torch.autograd.grad(loss, moved, create_graph=True, allow_unused=True, materialize_grads=True)[0]
    return step_keys(keys, gradient, lr=lr, weight_decay=weight_decay, clip=clip)
