"""Norms of hidden states, queries and values, computed in float32 (float64 for float64) whatever the dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import compute_dtype

#: What a layer may do to queries or values: see `normalize`.
NORMS = ("l2", "zscore")


class RMSNorm(nn.RMSNorm):
    """x · (mean x² + eps)^-½ · weight over the last dimension, in the dtype of x.

    torch.nn.RMSNorm multiplies in the dtypes that come, and warns where a half-precision x meets a float32 weight.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The norm of x [..., d]."""
        dtype = compute_dtype(x.dtype)
        return F.rms_norm(x.to(dtype), self.normalized_shape, self.weight.to(dtype), self.eps).to(x.dtype)


def normalize(x: Tensor, kind: str | None) -> Tensor:
    """x [..., D] as it is, of length 1 ("l2"), or of mean 0 and unbiased standard deviation 1 ("zscore")."""
    if kind is None or 0 in x.shape:  # std_mean would warn
        return x
    wide = x.to(compute_dtype(x.dtype))
    if kind == "l2":
        return F.normalize(wide, dim=-1).to(x.dtype)
    # F.layer_norm would divide by the biased standard deviation, with eps inside of the root.
    std, mean = torch.std_mean(wide, dim=-1, keepdim=True)
    return ((wide - mean) / (std + 1e-6)).to(x.dtype)
