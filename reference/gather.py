"""Sparse value gather: each token reads the weighted sum of its J value rows."""

import torch
from torch import Tensor


def sparse_value_gather(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """out[t] = Σⱼ weights[t, j] · values[slots[t, j]].

    Args:
        values: [N, D], any float dtype.
        slots: [..., J], int64, in [0, N); a slot may occur more than once in a row.
        weights: [..., J], any float dtype.

    Returns:
        [..., D] in the dtype of ``values``: summed in float32 (float64 for float64), rounded once.
    """
    dtype = torch.promote_types(values.dtype, torch.float32)
    # The cast comes before the indexing so that the gradient of a half-precision table, too, is summed in float32.
    rows = values.to(dtype)[slots]  # [..., J, D]
    return (weights.to(dtype).unsqueeze(-1) * rows).sum(-2).to(values.dtype)
