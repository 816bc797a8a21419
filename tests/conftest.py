"""Where the tests run: the Triton backend on the GPU if there is one, else in Triton's interpreter on the CPU."""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import settings

pytest.register_assert_rewrite("tests.helpers")  # before anything imports them: their asserts show values too

HAS_GPU = torch.cuda.is_available()
# Triton reads it once, when it is first imported.
if HAS_GPU:
    os.environ.pop("TRITON_INTERPRET", None)
else:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure() -> None:
    if not HAS_GPU and find_spec("triton"):
        from tests.helpers import interpreter

        interpreter.hasten()


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
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def as_another(here: Path) -> Iterator[None]:
    """Run as a user for whom permissions count, in a folder that he may write, but not reach from above."""
    here.chmod(0o777)
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def triton_place() -> Place:
    return PLACES[1]


#: Seconds that a test waits for the memory that it needs, once it is alone: half of what `make gpu` takes for a hang.
PATIENCE = 30


def wait_for_room(gigabytes: float, patience: float = PATIENCE) -> None:
    """Skip the test if other processes do not leave so much of the GPU's memory for so many seconds."""
    end = time.monotonic() + patience
    while (free := torch.cuda.mem_get_info()[0] / 1e9) < gigabytes:
        if time.monotonic() >= end:
            pytest.skip(f"needs {gigabytes} GB of a GPU's memory, {free:.0f} GB were free for {patience} s")
        time.sleep(0.5)


@pytest.fixture
def gigabytes() -> int:
    """What of a GPU's memory a test needs for itself; 0, unless its parameters say so, for up to a tenth of it."""
    return 0


@pytest.fixture
def room(gigabytes: int) -> Iterator[None]:
    """A GPU's memory is shared by all processes of the suite: of the tests that ask for room, one that needs most of it
    runs alone."""
    if not HAS_GPU:
        yield
        return
    import fcntl  # not on Windows

    with open(Path(tempfile.gettempdir()) / f"fwpkm-kernels-tests-{os.getuid()}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if gigabytes else fcntl.LOCK_SH)
        torch.cuda.empty_cache()
        wait_for_room(gigabytes)
        yield
        torch.cuda.empty_cache()


@pytest.fixture
def errors_on_synchronisation() -> Iterator[None]:
    """Of a test that sets torch's sync debug mode: the others do not find it set."""
    yield
    if HAS_GPU:
        torch.cuda.set_sync_debug_mode("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--triton-only", action="store_true", help="leave out the cases of the PyTorch path")
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
    if config.getoption("--triton-only"):

        def is_torch_case(item: pytest.Item) -> bool:
            parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
            return any(isinstance(x, Place) and x.backend == "torch" for x in parameters)

        config.hook.pytest_deselected(items=[item for item in items if is_torch_case(item)])
        items[:] = [item for item in items if not is_torch_case(item)]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not HAS_GPU:
        # What pytest would say first on a GPU.
        assert not set(item.fixturenames) - set(item._fixtureinfo.name2fixturedefs) - {"request"}, "unknown fixtures"
        pytest.skip("needs a GPU")


@pytest.hookimpl(trylast=True)  # after what the test's fixtures hold is gone
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """What a test does to the GPU shows in the test itself, and its memory is left to the processes that share it."""
    if not HAS_GPU or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()  # raises after an access that was not allowed
        torch.cuda.empty_cache()  # and this one after a capture that failed
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" not in os.environ:
            raise
        # All later tests of this process would fail: pytest-xdist names this one, and starts another process.
        with item.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"{item.nodeid}: the GPU no longer answers: {error}", file=sys.stderr, flush=True)
        os._exit(1)
