"""States of a streamed memory: making, stepping and comparing them."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fwpkm_kernels import MemoryState, fast_weight_memory_step
from tests.conftest import HAS_GPU, PLACES, SLOW_IN_INTERPRETER, Place
from tests.helpers.memory import assert_same_bits, make_inputs

Inputs = dict[str, Any]
Cuts = list[int]

DEVICE = "cuda" if HAS_GPU else "cpu"
#: What is cut; the others are the initial memory.
BY_TOKEN = ("queries", "targets", "gates", "mask")
#: Small options of a bound state.
OPTIONS = {"chunk_size": 4, "top_k": 2, "lookahead": 1}
#: What does not depend on the kernels: on the CPU, and on a GPU if there is one.
DEVICES = pytest.mark.parametrize("place", PLACES[: 1 + HAS_GPU], ids=lambda place: place.backend)
#: Both places; the second of them in `make test-all` where that is the interpreter.
BOTH = pytest.mark.parametrize(
    "place",
    [PLACES[0], pytest.param(PLACES[1], marks=SLOW_IN_INTERPRETER)],
    ids=[place.backend for place in PLACES],
)


def tokens_of(inputs: Inputs, begin: int, end: int) -> Inputs:
    return {name: inputs[name][:, begin:end] for name in BY_TOKEN if name in inputs}


def make_state(inputs: Inputs) -> MemoryState:
    return MemoryState(inputs["keys"], inputs["values"])


def stream(
    state: MemoryState,
    inputs: Inputs,
    cuts: Cuts,
    run: Callable[..., Tensor] = fast_weight_memory_step,
    **options: Any,
) -> Tensor:
    """Step through tokens of `inputs` from the state's position on, `cuts` at a time; the joined outputs."""
    outputs = []
    for count in cuts:
        begin = state.position
        outputs.append(run(state, **tokens_of(inputs, begin, begin + count), **options))
        assert type(state.position) is int
        assert state.position == begin + count
    return torch.cat(outputs, dim=1)


def contents(state: MemoryState) -> dict[str, Tensor]:
    """Copies of all that a state is."""
    return state.state_dict() | {"touched": state._touched.clone()}


def assert_same_state(state: MemoryState, expected: MemoryState) -> None:
    assert_same_bits(contents(state), contents(expected))


#: What a step may not change, by the name that the error says: options or a change of the inputs.
BOUND: dict[str, Any] = {
    "chunk_size": {"chunk_size": 5},
    "top_k": {"top_k": 3},
    "lookahead": {"lookahead": 2},
    "score": {"score": "dot"},
    "eps": {"eps": 2e-3},
    "weighting": {"weighting": "relu"},
    "temperature": {"temperature": 2.0},
    "key_gradient": {"key_gradient": "all"},
    "step": {"step": "normalized"},
    "boundary": {"boundary": "drop"},
    "precision": {"precision": "ieee"},
    "backend": {"backend": "torch"},
    "batch": lambda tokens: {name: x[:1] for name, x in tokens.items()},
    "queries": lambda tokens: tokens | {"queries": tokens["queries"].bfloat16()},
    "targets": lambda tokens: tokens | {"targets": tokens["targets"].half()},
}


def copies() -> dict[str, Callable[[MemoryState], MemoryState]]:
    return {
        "clone": MemoryState.clone,
        "copy": copy.copy,
        "deepcopy": copy.deepcopy,
        "pickle": lambda state: pickle.loads(pickle.dumps(state)),
        "torch.save": saved_and_loaded,
    }


def saved_and_loaded(x: Any, weights_only: bool = False) -> Any:
    """Through torch.save and torch.load."""
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def half_read(**options: Any) -> tuple[Inputs, MemoryState]:
    """A state in the middle of its second chunk, bfloat16 queries and float16 targets waiting in it."""
    inputs = make_inputs(2, 11, mask="real", dtype=torch.float32)
    inputs |= {"queries": inputs["queries"].bfloat16(), "targets": inputs["targets"].half()}
    state = make_state(inputs)
    stream(state, inputs, [6], **OPTIONS | {"clip": 0.5, **options})
    return inputs, state


def learned(place: Place, **options: Any) -> tuple[dict[str, Any], nn.Parameter, nn.Parameter]:
    inputs = make_inputs(2, 9, device=place.device, **options)
    return inputs, nn.Parameter(inputs["keys"].clone()), nn.Parameter(inputs["values"].clone())


class Layer(nn.Module):
    """A module with a memory and a state of it."""

    def __init__(self, buffers: bool = False) -> None:
        super().__init__()
        inputs, self.keys, self.values = learned(Place("torch", "cpu"), dtype=torch.float32)
        if buffers:
            del self.keys, self.values
            self.register_buffer("keys", inputs["keys"])
            self.register_buffer("values", inputs["values"])
        self.state = MemoryState(self.keys, self.values)

    def forward(self, queries: Tensor, targets: Tensor) -> Tensor:
        return fast_weight_memory_step(self.state, queries, targets, **OPTIONS)


def buffers_of(state: MemoryState) -> Iterator[Tensor]:
    yield from (state.keys, state.values, state._position, state._touched)
    if state._queue is not None:
        yield from state._queue
