"""Norms that round once, whatever the dtype of what they are given and of autocast."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import compute_dtype


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` in float32 (float64 for float64), cast back to the dtype of its input.

    PyTorch's own warns where a bfloat16 activation meets a float32 weight, as it does under autocast.
    """

    def forward(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x.dtype)
        return F.rms_norm(x.to(dtype), self.normalized_shape, self.weight.to(dtype), self.eps).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` in float32 (float64 for float64), cast back to the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x.dtype)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return F.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps).to(x.dtype)
