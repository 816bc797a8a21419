"""What the host spends on a training step, measured without a GPU: python -m benchmarks.host [--json FILE]

The memory runs forward and backward over 8 chunks, and each of its launches goes through Triton's own launcher to a
stand-in for NVIDIA's driver (libcuda.c, built by gcc when this starts), where it does nothing. Everything else is what
it is on a GPU, but for this: operators of PyTorch run on the CPU, on tensors so small that what they compute hardly
counts; the current stream is known at once; and the driver takes no time, which Triton's Python asks about each tensor.

A step is measured as it is, with every launch left to Triton's Python, and without launches: the difference to the last
one is what launches take. Times are of the processor, so that other processes disturb them less. Before that each
launch is made in both ways, and must give the driver the same function, grid, shared memory and parameters.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from fwpkm_kernels._commands import CommandError, check_outputs, command, need, write_output

from .files import markdown_table
from .record import need_compiler

SOURCE = Path(__file__).with_name("libcuda.c")
#: Tokens of a chunk for each item, items, picks, sub-keys, widths: small, with the launches of the paper's sizes.
CHUNK, BATCH, PICKS, NUM_KEYS, WIDTH = 4, 2, 8, 16, 64
CHUNKS = 8
#: How a step launches: as it is, by Triton alone, not at all.
DIRECT, TRITON, NOTHING = "direct", "through Triton", "no launches"


class Config(ctypes.Structure):
    """The first fields of `CUlaunchConfig`."""

    _fields_ = (
        *((f"{name}_{axis}", ctypes.c_uint) for name in ("grid", "block") for axis in "xyz"),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    )


class Launch(NamedTuple):
    """What the driver is given."""

    function: int
    config: tuple[int, ...]  #: grid, block and shared memory, stream, number of attributes
    parameters: tuple[bytes, ...]


_OnLaunch = ctypes.CFUNCTYPE(None, ctypes.POINTER(Config), ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))


class Driver:
    """The stand-in for libcuda, which can tell what was launched."""

    def __init__(self, folder: str) -> None:
        nvidia = need("triton.backends.nvidia", "triton")
        compiler = shutil.which("gcc") or shutil.which("cc")
        if compiler is None:
            raise CommandError("gcc is missing, which builds the stand-in for NVIDIA's driver")
        path = Path(folder, "libcuda.so.1")
        include = Path(nvidia.__path__[0], "include")
        build = [compiler, "-shared", "-fPIC", "-O2", "-Wl,-soname,libcuda.so.1", f"-I{include}", str(SOURCE)]
        result = subprocess.run([*build, "-o", str(path)], capture_output=True, text=True)
        if result.returncode != 0:
            raise CommandError(f"cannot build the stand-in for NVIDIA's driver: {result.stderr}")
        Path(folder, "libcuda.so").symlink_to(path.name)  # which Triton before 3.6 links its launcher with
        # Triton's launcher asks for the library by its name, and finds this one, which is loaded already.
        self._library = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
        self._sizes: dict[int, list[int]] = {}

    @contextlib.contextmanager
    def recorded(self) -> Iterator[list[Launch]]:
        """Within the context every launch is noted in the list."""
        launches: list[Launch] = []

        def note(config: Any, function: int, parameters: Any) -> None:
            if function not in self._sizes:
                self._sizes = parameter_sizes()
            sizes = self._sizes[function]
            numbers = tuple(getattr(config[0], name) or 0 for name, _ in Config._fields_ if name != "attributes")
            values = tuple(ctypes.string_at(parameters[i], size) for i, size in enumerate(sizes))
            launches.append(Launch(function, numbers, values))

        callback = _OnLaunch(note)
        on_launch = ctypes.c_void_p.in_dll(self._library, "on_launch")
        on_launch.value = ctypes.cast(callback, ctypes.c_void_p).value
        try:
            yield launches
        finally:
            on_launch.value = None


def parameter_sizes() -> dict[int, list[int]]:
    """Of each function that has been loaded, how many bytes its parameters have: so says its PTX."""
    import triton

    sizes = {}
    for kernel in (x for x in gc.get_objects() if type(x) is triton.JITFunction):
        for compiled_kernels, *_ in kernel.device_caches.values():
            for compiled in compiled_kernels.values():
                head = compiled.asm["ptx"].partition(".entry")[2].partition(")")[0]
                sizes[compiled.function] = [int(bits) // 8 for bits in re.findall(r"\.param\s+\.[bus](\d+)", head)]
    return sizes


@contextlib.contextmanager
def stand_in() -> Iterator[Driver]:
    """Within the context tensors of the CPU count as those of a GPU of compute capability 9.0, which runs nothing.

    For a process of its own: Triton keeps to the stand-in when the context has ended.
    """
    import triton

    if torch.cuda.is_available():
        raise CommandError("a GPU is here, whose driver the stand-in would take the place of")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        driver = Driver(folder)
        stack.enter_context(mock.patch.dict(os.environ, TRITON_LIBCUDA_PATH=folder))
        from triton.backends.nvidia.driver import CudaDriver

        active = CudaDriver()
        active.get_current_stream = lambda device: 0
        active.get_device_capability = lambda device: (9, 0)
        triton.runtime.driver.set_active(active)  # for good: what it has loaded it has to unload
        for name, value in (("is_cuda", True), ("is_cpu", False), ("get_device", lambda x: 0)):
            stack.enter_context(mock.patch.object(torch.Tensor, name, value))
        stack.enter_context(mock.patch.object(torch.cuda, "_initialized", True))
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_capability", active.get_device_capability))
        stack.enter_context(mock.patch.object(torch._C, "_cuda_getDevice", int, create=True))
        yield driver


def training(**options: Any) -> tuple[Callable[[], torch.Tensor], Callable[[torch.Tensor], None]]:
    """The memory over a sequence of 8 chunks, and the backward of its output."""
    from fwpkm_kernels import fast_weight_memory

    length = CHUNKS * CHUNK
    shapes = (BATCH, length, 1, WIDTH), (BATCH, length, WIDTH), (1, 2, NUM_KEYS, WIDTH // 2), (NUM_KEYS**2, WIDTH)
    inputs = [torch.zeros(shape, requires_grad=True) for shape in shapes]
    options = {"chunk_size": CHUNK, "top_k": PICKS} | options

    def forward() -> torch.Tensor:
        return fast_weight_memory(*inputs, **options).output

    def backward(output: torch.Tensor) -> None:
        torch.autograd.grad(output, inputs, torch.ones_like(output))

    return forward, backward


@contextlib.contextmanager
def launching(how: str) -> Iterator[list[str]]:
    """Within the context kernels are launched in this way; the list gets the name of each, unless it is DIRECT."""
    from fwpkm_kernels.kernels import _direct

    names: list[str] = []

    def launch(kernel: Any, grid: tuple[int, ...], device: int, args: tuple[Any, ...], options: Any) -> None:
        names.append(kernel.fn.__name__)
        if how == TRITON:
            _direct.launch_by_triton(kernel, grid, args, options)

    with contextlib.nullcontext() if how == DIRECT else mock.patch.object(_direct, "launch_compiled", launch):
        yield names


@contextlib.contextmanager
def compared(driver: Driver) -> Iterator[list[str]]:
    """Within the context each launch is made directly and by Triton too; the list gets the kernels' names.

    Raises:
        AssertionError: what the driver was given is not the same, or the first was not direct.
    """
    from fwpkm_kernels.kernels import _direct

    names: list[str] = []
    direct, by_triton = _direct.launch_compiled, _direct.launch_by_triton

    def launch(kernel: Any, grid: tuple[int, ...], device: int, args: tuple[Any, ...], options: Any) -> None:
        names.append(kernel.fn.__name__)
        # The first two launches of anything are Triton's: it compiles, and says what the source is.
        direct(kernel, grid, device, args, options)
        direct(kernel, grid, device, args, options)
        with driver.recorded() as launches:
            with mock.patch.object(_direct, "launch_by_triton", side_effect=AssertionError("not direct")):
                direct(kernel, grid, device, args, options)
            by_triton(kernel, grid, args, options)
        assert len(launches) == 2, (names[-1], launches)
        assert launches[0] == launches[1], (names[-1], launches)

    with mock.patch.object(_direct, "launch_compiled", launch):
        yield names


class Spread(NamedTuple):
    """Milliseconds."""

    least: float
    median: float


def measure(repeats: int) -> tuple[dict[str, dict[str, Spread]], int]:
    """For each way to launch the times of forward, backward and both, taken in turns; and how many launches."""
    forward, backward = training()
    samples: dict[str, list[tuple[float, float]]] = {DIRECT: [], TRITON: [], NOTHING: []}
    for i in range(3 + repeats):
        for how, times in samples.items():
            with launching(how) as names:
                start = time.process_time_ns()
                output = forward()
                middle = time.process_time_ns()
                backward(output)
                end = time.process_time_ns()
            if i >= 3:
                times.append(((middle - start) / 1e6, (end - middle) / 1e6))
    spreads = {}
    for how, times in samples.items():
        parts = dict(zip(("forward", "backward"), zip(*times, strict=True), strict=True))
        parts["both"] = tuple(map(sum, times))
        spreads[how] = {part: Spread(min(x), statistics.median(x)) for part, x in parts.items()}
    return spreads, len(names)


@command("host")
def main() -> int:
    """Print the table; with --json also write it to a file. Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", help="write JSON to this file")
    parser.add_argument("--repeats", type=int, default=100, help="how often each is measured")
    arguments = parser.parse_args()
    triton = need_compiler()
    check_outputs(arguments.json)
    with stand_in() as driver:
        with compared(driver) as names:
            forward, backward = training()
            backward(forward())
        spreads, launches = measure(arguments.repeats)
    print(f"{len(names)} launches give the driver the same directly as through Triton {triton.__version__}.")
    print(f"\nMilliseconds of the processor for {CHUNKS} chunks, least and median of {arguments.repeats}:\n")
    rows = []
    for how, parts in spreads.items():
        of_launches = parts["both"].least - spreads[NOTHING]["both"].least
        each = f"{1e3 * of_launches / launches:.1f}" if how != NOTHING else "–"
        rows.append([how, *(f"{x.least:.2f} {x.median:.2f}" for x in parts.values()), each])
    print(markdown_table(["", *spreads[DIRECT], "µs a launch"], rows))
    if arguments.json:
        result = {how: {part: x._asdict() for part, x in parts.items()} for how, parts in spreads.items()}
        write_output(arguments.json, json.dumps({"launches": launches, "compared": len(names), "ms": result}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
