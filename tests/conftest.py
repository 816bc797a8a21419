"""Where the tests run: the Triton backend on the GPU if there is one, else in Triton's interpreter on the CPU."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
# Triton reads it once, when it is first imported.
if HAS_GPU:
    os.environ.pop("TRITON_INTERPRET", None)
else:
    os.environ["TRITON_INTERPRET"] = "1"

#: Marks of a test that only the interpreter makes slow: a GPU runs it with the others.
SLOW_IN_INTERPRETER = [] if HAS_GPU else [pytest.mark.slow]


def slow_in_interpreter(test: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a test without parameters."""
    return test if HAS_GPU else pytest.mark.slow(test)


class Place(NamedTuple):
    """A backend and the device whose tensors it is tested with."""

    backend: str
    device: str


PLACES = [Place("torch", "cpu"), Place("triton", "cuda" if HAS_GPU else "cpu")]


@pytest.fixture(params=PLACES, ids=lambda place: place.backend)
def place(request: pytest.FixtureRequest) -> Place:
    return request.param


@pytest.fixture
def triton_place() -> Place:
    return PLACES[1]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not HAS_GPU:
        pytest.skip("needs a GPU")
