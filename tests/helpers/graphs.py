"""Streaming steps as CUDA graphs: on a GPU for real, on a CPU with a stand-in for the capture."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fwpkm_kernels import MemoryGraph, MemoryState, graphs
from tests.conftest import HAS_GPU
from tests.helpers.streaming import Inputs, stream, tokens_of


class OnGpu(torch.Tensor):
    """A table that says it is on a GPU."""

    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl


class Rerun:
    """In place of a captured graph: runs the function again, with the Python values that it had."""

    def __init__(self, function: Callable[[], None], warm_up: Callable[[], None]) -> None:
        warm_up()
        self.replay = function


def graph_maker(monkeypatch: pytest.MonkeyPatch) -> Callable[..., MemoryGraph]:
    """`MemoryGraph` of some tokens of the inputs; without a GPU all of it but the capture."""

    def make(state: MemoryState, inputs: Inputs, count: int, **options: Any) -> MemoryGraph:
        table = state.values
        if not HAS_GPU:
            monkeypatch.setattr(graphs, "capture", Rerun)
            state._values = table.as_subclass(OnGpu)
        try:
            return MemoryGraph(state, **tokens_of(inputs, 0, count), **options)
        finally:
            state._values = table

    return make


def replayed(graph: MemoryGraph, state: MemoryState, inputs: Inputs, count: int) -> Tensor:
    """One call of a graph, from the state's position on."""
    return stream(state, inputs, [count], run=lambda state, **tokens: graph(**tokens))
