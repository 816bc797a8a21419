"""A look before anything else on a GPU, at the paper's sizes, against backend="torch": python -m benchmarks.smoke

A sequence forward and backward, a key step, steps of a stream, and the same steps as CUDA graphs. What differs raises.
"""

import argparse
import dataclasses
import faulthandler
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import inputs, registry
from fwpkm_kernels import (
    MemoryGraph,
    MemoryState,
    fast_weight_memory,
    fast_weight_memory_step,
    product_key_update,
    testing,
)
from fwpkm_kernels._commands import command

#: Rounding decides a few lookups, and what follows from them: such a share of the rows may be off by more than this
#: error, relative to the median of the rows that are not 0. Queries that are off by 1e-6 give a third of it at most.
SHARE, TOLERANCE = 0.03, 5e-3
#: Such a query is part of the gradients of all sub-keys that it picks, of which there are few.
KEYS_SHARE = 0.15
#: A fault of the last tile of a kernel is one of few rows: of these last rows such a share may be off.
LAST, LAST_SHARE = 16, 0.25
#: A step that takes longer on a GPU hangs; the first one compiles for most of this.
HANGS = 50.0
#: Batch and chunks of what is read.
BATCH, CHUNKS = 8, 2


def check(name: str, found: Tensor, wanted: Tensor, before: Tensor | None = None, most: float = SHARE) -> None:
    """Compare rows, of which the share `most` may be off; of a table that was written those that either has changed."""
    found, wanted = ((x if before is None else x - before).detach().double().flatten(0, -2) for x in (found, wanted))
    rows = (found != 0).any(1) | (wanted != 0).any(1)
    error, size = (found - wanted)[rows].square().sum(1), wanted[rows].square().sum(1).median()
    off = (~(error <= TOLERANCE**2 * size)).double()
    for what, some, share in (("", off, most), ("the last ", off[-LAST:], LAST_SHARE)):
        if not some.mean() <= share:  # NaN where there are no rows
            raise AssertionError(
                f"{name}: {some.mean():.1%} of {what}{len(some)} rows are off by more than {TOLERANCE}"
            )


def sequence(c: inputs.Configuration, device: str) -> None:
    given = inputs.of_sequence(c, device, 0)
    names = ("queries", "targets", "keys", "values")
    cotangent = inputs.normal(device, 3, *given["targets"].shape)

    def run(backend: str) -> tuple[Any, dict[str, Tensor]]:
        return testing.forward_and_gradients(
            lambda **tensors: fast_weight_memory(**tensors, backend=backend), given, wrt=names, cotangent=cotangent
        )

    (found, gradients), (wanted, wanted_gradients) = run("triton"), run("torch")
    for i, name in enumerate(("output", "keys", "values")):
        check(name, found[i], wanted[i], given.get(name))
    for name in names:
        most = KEYS_SHARE if name == "keys" else SHARE
        check(f"gradient of {name}", gradients[name], wanted_gradients[name], most=most)


def key_step(c: inputs.Configuration, device: str) -> None:
    given = inputs.of_key_step(c, device, 0)
    found, wanted = (product_key_update(**given, backend=backend) for backend in ("triton", "torch"))
    check("keys", found, wanted, given["keys"])


def stream(c: inputs.Configuration, device: str, graphed: bool = False) -> None:
    """Whole chunks, of which the second writes with what the first has carried over."""
    given = inputs.of_stream(c, device, 0)
    memory, tokens = given.pop("memory"), [given.pop(name).split(c.chunk, 1) for name in ("queries", "targets")]
    states = [MemoryState(*memory) for _ in range(2)]
    if graphed:
        step: Callable[..., Tensor] = MemoryGraph(states[0], *(parts[0] for parts in tokens), **given)
    else:

        def step(*part: Tensor) -> Tensor:
            return fast_weight_memory_step(states[0], *part, **given, backend="triton")

    for part in zip(*tokens, strict=True):
        check("output", step(*part), fast_weight_memory_step(states[1], *part, **given, backend="torch"))
    for name in ("keys", "values"):
        check(name, *(getattr(state, name) for state in states), getattr(memory, name))


def steps(device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """What is looked at, in this order; names, and calls that raise."""
    c = next(c for c in registry.CONFIGURATIONS if c.name == "8x512")
    c = dataclasses.replace(c, tokens=BATCH * CHUNKS * c.chunk)
    if device == "cpu":
        c = dataclasses.replace(c.shrunk(), batch=1, chunk=4, tokens=8, sub_keys=4, picks=2)
    yield "sequence, forward and backward", lambda: sequence(c, device)
    yield "key step", lambda: key_step(c, device)
    yield "streaming step", lambda: stream(c, device)
    if device == "cuda":
        yield "streaming step as a CUDA graph", lambda: stream(c, device, graphed=True)


@command("smoke")
def main(argv: Sequence[str] | None = None) -> int:
    """Look at everything; raises at the first thing that is wrong. Returns the exit status, 2 if there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smoke", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: in Triton's interpreter, small")
    device = parser.parse_args(argv).device
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is first needed
        print("on a CPU: small sizes in Triton's interpreter, and no CUDA graph")
    elif not torch.cuda.is_available():
        print("no GPU is visible to torch", file=sys.stderr)
        return 2
    try:
        for name, step in steps(device):
            print(f"{name}: ", end="", flush=True)
            if device == "cuda":
                faulthandler.dump_traceback_later(HANGS, exit=True)
            step()
            print("right", flush=True)
    finally:
        faulthandler.cancel_dump_traceback_later()
    return 0


if __name__ == "__main__":
    sys.exit(main())
