"""Lookups in plain PyTorch."""

import torch
from torch import Tensor

import reference
from fwpkm_kernels import testing


def expanded_lookup(
    inputs: testing.LookupInputs, top_k: int, score: str = "idw", factors: testing.LookupInputs | None = None
) -> tuple[Tensor, Tensor]:
    """A lookup in float32 with distances as ‖q‖² − 2 q·k + ‖k‖²; ``factors`` replace q and k in the product."""
    rows, heads, width = inputs.queries.shape
    n = inputs.keys.shape[2]

    def halves(inputs: testing.LookupInputs) -> tuple[Tensor, Tensor]:
        return inputs.queries.float().reshape(rows, heads, 2, width // 2).permute(1, 2, 0, 3), inputs.keys.float()

    q, k = halves(factors or inputs)
    half = q @ k.mT  # [H, 2, rows, n]
    if score == "idw":
        q, k = halves(inputs)
        distance = q.square().sum(-1)[..., None] - 2 * half + k.square().sum(-1)[..., None, :]
        half = -torch.log(1e-3 + distance.clamp(min=0))
    # Each row and head as a head of its own, whose keys of width 1 are the half scores.
    keys = half.permute(2, 0, 1, 3).reshape(rows * heads, 2, n, 1)
    scores, slots = reference.product_key_lookup(torch.ones(rows * heads, 2), keys, top_k, score="dot")
    return scores.reshape(rows, heads, top_k), slots.reshape(rows, heads, top_k)
