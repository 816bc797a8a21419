"""Small static memories, and tokens for them."""

from typing import Any

import torch
from torch import Tensor

from fwpkm_kernels.layers import ProductKeyMemory

SMALL: dict[str, Any] = {"num_keys": 5, "heads": 2, "top_k": 3, "key_dim": 6, "value_dim": 7}
WIDTH = 8


def make_layer(seed: int = 0, **options: Any) -> ProductKeyMemory:
    torch.manual_seed(seed)
    layer = ProductKeyMemory(WIDTH, **{**SMALL, **options})
    with torch.no_grad():
        for name, x in layer.named_parameters():
            if name.startswith("query_norm"):  # ones and zeros would hide a norm that forgets them
                x.add_(torch.randn_like(x) * 0.3)
    return layer


def make_tokens(*leading: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*leading, WIDTH, generator=generator, dtype=torch.float64).to(device, dtype)
