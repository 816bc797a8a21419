"""Picks of sub-keys, as a lookup gives them."""

import torch

from fwpkm_kernels.records import Picks


def make_picks(rows, heads, n, top_k, *, same=False, device="cpu"):
    """`Picks` of any half scores: the K sub-keys of a half of a row are different."""
    generator = torch.Generator().manual_seed(rows + n)
    columns = torch.rand(1 if same else rows, heads, 2, n, generator=generator).argsort(-1)[..., :top_k]
    sub_keys = columns.expand(rows, -1, -1, -1) + torch.arange(0, 2 * heads * n, n).view(heads, 2, 1)
    half_scores = torch.randn(sub_keys.shape, generator=generator)
    return Picks(half_scores.to(device), sub_keys.int().contiguous().to(device))
