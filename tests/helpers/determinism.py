"""Runs that must give the same bits: what differs between them, and operations to run."""

import contextlib
import functools
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fwpkm_kernels import chunk_value_update, chunk_value_update_, fast_weight_memory, sparse_value_gather, testing
from tests.conftest import HAS_GPU, PLACES, Place
from tests.helpers.memory import make_inputs, named, run

# cuBLAS, which the composed path under key_gradient="all" calls, is deterministic only with it; read at its first call.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

Function = Callable[[], Any]
RUNS = 20 if HAS_GPU else 2
#: M, J, N, D of a gather and an update: hot slots beside others. Where a program takes milliseconds there are fewer.
GPU_SHAPE, SHAPE = (4096, 8, 2**16, 256), (48, 2, 9, 5)


@contextlib.contextmanager
def programs_in_order(seed: int) -> Iterator[None]:
    """In Triton's interpreter, run the programs of every launch in another order: backwards, or shuffled by a seed."""
    if HAS_GPU or seed == 0:
        yield
        return
    from triton.runtime.interpreter import interpreter_builder as builder

    set_dim, set_idx, orders = builder.set_grid_dim, builder.set_grid_idx, [[0]] * 3

    def set_grid_dim(*sizes: int) -> None:
        orders[:] = [list(reversed(range(size))) for size in sizes]
        if seed > 1:
            for order in orders:
                random.Random(seed).shuffle(order)
        set_dim(*sizes)

    def set_grid_idx(*place: int) -> None:
        set_idx(*(order[i] for order, i in zip(orders, place, strict=True)))

    builder.set_grid_dim, builder.set_grid_idx = set_grid_dim, set_grid_idx
    try:
        yield
    finally:
        del builder.set_grid_dim, builder.set_grid_idx  # the class has its own


@contextlib.contextmanager
def strict_mode() -> Iterator[None]:
    """torch raises where it has no deterministic form of an operation, and fills unwritten memory with NaN."""
    with testing.poisoned_memory():
        torch.use_deterministic_algorithms(True)
        yield


def disturb(device: str, seed: int) -> None:
    """Leave numbers in memory that is then free; on a GPU work too, of which some is still under way."""
    for size in (64, 1024, 2**14, 2**18):
        blocks = [torch.full((size,), float(seed) - 3.5, device=device) for _ in range(4)]
        del blocks
    if device == "cuda":
        with torch.cuda.stream(torch.cuda.Stream()):
            x = torch.randn(1024, 256 * (1 + seed % 3), device=device)
            for _ in range(3):
                x = torch.tanh(x @ x.T) @ x


def assert_same_bits_always(function: Function, device: str, runs: int = RUNS) -> None:
    """Every run gives the same bits: the top of tests/test_determinism.py says what differs between them."""

    def disturbed() -> Any:
        number = next(numbers)
        disturb(device, number)
        with strict_mode() if number % 2 else contextlib.nullcontext(), programs_in_order(number):
            return function()

    numbers = iter(range(runs))
    testing.assert_deterministic(disturbed, runs=runs)


def gather(place: Place, sparse_grad: bool = False) -> Function:
    """Hot slots beside others, which are read once."""
    shape = GPU_SHAPE if place.device == "cuda" else SHAPE
    inputs = testing.make_gather_inputs(*shape, slot_pattern="zipf", device=place.device)._asdict()

    def call() -> Any:
        function = functools.partial(sparse_value_gather, sparse_grad=sparse_grad, backend=place.backend)
        out, gradients = testing.forward_and_gradients(function, inputs, wrt=("values", "weights"))
        grad = gradients["values"]
        return out, gradients["weights"], (grad._indices(), grad._values()) if sparse_grad else grad

    return call


def update(place: Place, pattern: str = "zipf", **options: Any) -> Function:
    shape = GPU_SHAPE if place.device == "cuda" else SHAPE
    inputs = testing.make_update_inputs(*shape, slot_pattern=pattern, gates=True, mask="real", device=place.device)
    wrt = ("values", "weights", "targets", "predictions", "gates")

    def call() -> Any:
        function = functools.partial(chunk_value_update, **options, backend=place.backend)
        table = inputs.values.clone()
        chunk_value_update_(**inputs._replace(values=table)._asdict(), **options, backend=place.backend)
        return table, testing.forward_and_gradients(function, inputs._asdict(), wrt=wrt)

    return call


def of_keys(place: Place, function: Callable[..., Any], key_pattern: str = "random", **options: Any) -> Function:
    """A lookup or a key step; with few sub-keys, so that each is picked by many."""
    rows, heads, n, width = (4096, 2, 64, 64) if place.device == "cuda" else (3, 2, 5, 8)
    rows = 200 if place == PLACES[0] else rows  # threads
    inputs = testing.make_lookup_inputs(rows, heads, n, width, key_pattern=key_pattern, device=place.device)._asdict()
    call = functools.partial(function, top_k=3, **options, backend=place.backend)
    return lambda: testing.forward_and_gradients(call, inputs, wrt=("queries", "keys"))


def memory_inputs(place: Place, length: int) -> dict[str, Tensor]:
    sizes = {"num_keys": 16, "key_width": 32, "width": 64} if place.device == "cuda" else {"num_keys": 4}
    batch, length = (4, 100 * length) if place.device == "cuda" else (2, length)
    return make_inputs(batch, length, mask="real", dtype=torch.float32, device=place.device, **sizes)


def whole_memory(place: Place, **options: Any) -> Function:
    inputs = memory_inputs(place, 5)
    chunk_size = 200 if place.device == "cuda" else 2
    options |= {"chunk_size": chunk_size, "top_k": 2, "backend": place.backend}
    return lambda: named(*run(fast_weight_memory, inputs, **options))
