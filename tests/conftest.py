"""Where the tests run: the Triton backend on the GPU if there is one, else in Triton's interpreter on the CPU."""

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import settings

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


# Examples of a property: few and always the same, or many and others each night. Either --hypothesis-profile or the
# environment variable chooses.
settings.register_profile("ci", max_examples=40, derandomize=True, deadline=None)
settings.register_profile("nightly", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


class Place(NamedTuple):
    """A backend and the device whose tensors it is tested with."""

    backend: str
    device: str


PLACES = [Place("torch", "cpu"), Place("triton", "cuda" if HAS_GPU else "cpu")]


@pytest.fixture(params=PLACES, ids=lambda place: place.backend)
def place(request: pytest.FixtureRequest) -> Place:
    if request.param.backend == "torch" and request.config.getoption("--gpu-rounding"):
        pytest.skip("of Triton's interpreter only")
    return request.param


@pytest.fixture
def triton_place() -> Place:
    return PLACES[1]


@pytest.fixture
def errors_on_synchronisation() -> Iterator[None]:
    """Of a test that sets torch's sync debug mode: the others do not find it set."""
    yield
    if HAS_GPU:
        torch.cuda.set_sync_debug_mode("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", metavar="I/N", help="of all test functions only each N-th, from the I-th on")
    parser.addoption("--gpu-rounding", action="store_true", help="let Triton's interpreter round as a GPU does")


@pytest.fixture(scope="session", autouse=True)
def rounding(request: pytest.FixtureRequest) -> Iterator[None]:
    if not request.config.getoption("--gpu-rounding"):
        yield
        return
    from tests.gpu_rounding import gpu_rounding

    with gpu_rounding():
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --part, so that several processes share the suite: a function's cases stay together, as its kernels are."""
    if not config.getoption("--part"):
        return
    part, parts = (int(number) for number in config.getoption("--part").split("/"))
    functions = list(dict.fromkeys(item.nodeid.split("[")[0] for item in items))
    chosen = set(functions[part - 1 :: parts])
    others = [item for item in items if item.nodeid.split("[")[0] not in chosen]
    items[:] = [item for item in items if item.nodeid.split("[")[0] in chosen]
    config.hook.pytest_deselected(items=others)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not HAS_GPU:
        # What pytest would say first on a GPU.
        assert not set(item.fixturenames) - set(item._fixtureinfo.name2fixturedefs) - {"request"}, "unknown fixtures"
        pytest.skip("needs a GPU")


#: Of a GPU's memory, what the allocator of a process may keep between tests: others share the GPU.
MOST_CACHED = 2**30


@pytest.hookimpl(trylast=True)  # after what the test's fixtures hold is gone
def pytest_runtest_teardown() -> None:
    if HAS_GPU and torch.cuda.is_initialized() and torch.cuda.memory_reserved() > MOST_CACHED:
        torch.cuda.empty_cache()
