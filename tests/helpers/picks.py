"""Picks of sub-keys, as a lookup gives them."""

import torch


def make_picks(rows, heads, n, top_k, *, same=False, device="cpu"):
    """Sub-keys [M, H, 2, K], the K of a half of a row being different, and half scores."""
    generator = torch.Generator().manual_seed(rows + n)
    columns = torch.rand(1 if same else rows, heads, 2, n, generator=generator).argsort(-1)[..., :top_k]
    sub_keys = columns.expand(rows, -1, -1, -1) + torch.arange(0, 2 * heads * n, n).view(heads, 2, 1)
    return sub_keys.int().contiguous().to(device), torch.randn(sub_keys.shape, generator=generator).to(device)
