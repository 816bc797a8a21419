"""Small layers that stream, and what they read."""

from typing import Any

import torch
from torch import Tensor

from fwpkm_kernels.layers import FastWeightProductKeyMemory

WIDTH, CHUNK, LENGTH = 7, 4, 14


def make_layer(scope: str, **options: Any) -> FastWeightProductKeyMemory:
    torch.manual_seed(0)
    options = {"num_keys": 6, "heads": 2, "top_k": 3, "key_dim": 6, "value_dim": 5, "chunk_size": CHUNK} | options
    layer = FastWeightProductKeyMemory(WIDTH, scope=scope, dtype=torch.float64, memory_dtype=torch.float64, **options)
    return layer.requires_grad_(False)


def make_input(batch: int = 3, length: int = LENGTH) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
