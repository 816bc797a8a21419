"""A chunk made of the three operations, and a model around the memory: what a layer does with them."""

import pytest
import torch
from torch import Tensor

from fwpkm_kernels import (
    MemoryState,
    chunk_value_update,
    fast_weight_memory,
    fast_weight_memory_step,
    product_key_lookup,
    sparse_value_gather,
    testing,
)
from tests.conftest import Place

CPU = Place("auto", "cpu")
ON_A_GPU = pytest.param(Place("triton", "cuda"), marks=pytest.mark.gpu)
#: Without kernels, and with them compiled.
PLACES_OF_LAYERS = pytest.mark.parametrize("place", [CPU, ON_A_GPU], ids=lambda place: place.device)


def make_leaves(rows: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Inputs of `step`: 2 heads, 9 sub-keys, 81 slots."""
    queries, keys = testing.make_lookup_inputs(rows, 2, 9, 14, device=device)
    inputs = testing.make_update_inputs(rows, 8, 81, 13, gates=True, device=device)
    leaves = {"queries": queries, "keys": keys, "values": inputs.values, "targets": inputs.targets}
    return {name: x.requires_grad_() for name, x in {**leaves, "gates": inputs.gates}.items()}


def step(queries, keys, values, targets, gates):
    """One chunk: look up, read, write."""
    scores, slots = product_key_lookup(queries, keys, 4)
    slots, weights = slots.flatten(1), scores.flatten(1).softmax(-1)
    out = sparse_value_gather(values, slots, weights)
    return out, chunk_value_update(values, slots, weights, targets, out, gates=gates, clip=0.1)


def loss(outputs):
    out, new_values = outputs
    return out.sum() + new_values.square().sum()


class Model(torch.nn.Module):
    """What a layer around the memory is: projections, the memory, a projection."""

    def __init__(self, dtype: torch.dtype = torch.float64, device: str = "cpu", backend: str = "auto") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.queries, self.targets = torch.nn.Linear(10, 2 * 8), torch.nn.Linear(10, 7)
        self.gates, self.out = torch.nn.Linear(10, 1), torch.nn.Linear(7, 10)
        self.keys = torch.nn.Parameter(torch.randn(2, 2, 6, 4))
        self.values = torch.nn.Parameter(torch.randn(36, 7))
        self.options = {"chunk_size": 4, "top_k": 2, "addressing_weight": 0.1, "backend": backend}
        self.to(device, dtype)

    def tokens(self, x: Tensor) -> dict[str, Tensor]:
        gates = self.gates(x).squeeze(-1).sigmoid()
        return {"queries": self.queries(x).unflatten(-1, (2, 8)), "targets": self.targets(x), "gates": gates}

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output, final keys and final values."""
        memory = fast_weight_memory(**self.tokens(x), keys=self.keys, values=self.values, **self.options)
        return self.out(memory.output), memory.keys, memory.values

    def stream(self, state: MemoryState, x: Tensor) -> Tensor:
        return self.out(fast_weight_memory_step(state, **self.tokens(x), **self.options)).tanh()


def make_x(length: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, length, 10, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def squares(outputs: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([x.double().square().sum() for x in outputs]).sum()
