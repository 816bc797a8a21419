"""The whole memory on a CPU, beside its goals: python -m benchmarks.cpu [--json FILE]

Batch 1, float32, chunks of 512 tokens, widths 512, eight picks, 262 144 slots. `benchmarks.run` measures these too.
"""

import argparse
import contextlib
import functools
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import reference
from benchmarks.measure import Call, Machine, measure_machine, prepare, quantile, time_cpu
from benchmarks.registry import COMPOSED, OPERATIONS, PACKAGE, Configuration, Row
from benchmarks.results import Figure, figures_table, to_json
from fwpkm_kernels import (
    MemoryState,
    fast_weight_memory,
    fast_weight_memory_step,
    product_key_lookup,
    sparse_value_gather,
    testing,
)
from fwpkm_kernels._commands import CommandError, Lines, check_outputs, command

HEADING = "The whole memory on this CPU (minima)"
STEP, STEP_NO_KEYS = "step of 512 tokens", "step of 512 tokens, no key step"
TRAINING, COPY, GRADIENT = "forward + backward, one chunk more", "copy of the table", "gradient table"
DENSE, DENSE_RATIO = "dense write", "dense write / step of 512 tokens, no key step"
SIZE_RATIO = "step at 512 sub-keys / at 128"
LAYER = f"layer / {COMPOSED}, forward + backward of 1024 tokens"
LAYER_TOKEN = f"layer / {COMPOSED}, one token"
NAMES = (STEP, STEP_NO_KEYS, DENSE, DENSE_RATIO, SIZE_RATIO, COPY, GRADIENT, TRAINING, LAYER, LAYER_TOKEN)

#: name: unit, goal, whether the goal is the least that it may be
GOALS: dict[str, tuple[str, float | None, bool]] = {
    STEP: ("ms", 25.0, False),
    STEP_NO_KEYS: ("ms", 15.0, False),
    DENSE: ("ms", None, False),
    DENSE_RATIO: ("x", 20.0, True),
    SIZE_RATIO: ("x", 2.0, False),
    COPY: ("ms", None, False),
    GRADIENT: ("ms", None, False),
    TRAINING: ("ms", 80.0, False),
    LAYER: ("x", 1.1, False),
    LAYER_TOKEN: ("x", 1.1, False),
}


class Sizes(NamedTuple):
    sub_keys: int = 512
    width: int = 512  #: of queries and values
    chunk: int = 512
    picks: int = 8


PAPER = Sizes()
CHUNKS = 9  #: in the longer of the two sequences of TRAINING
INTERLEAVED = 20  #: runs of SIZE_RATIO
LAYER_RUNS, TOKEN_RUNS = 10, 1000  #: of LAYER and LAYER_TOKEN


class Spread(NamedTuple):
    """Milliseconds, or a ratio of them: what is reported, and where the middle of the samples lies."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, samples_us: Sequence[float]) -> "Spread":
        return cls(*(x / 1e3 for x in (min(samples_us), quantile(samples_us, 0.1), quantile(samples_us, 0.9))))

    def over(self, other: "Spread") -> "Spread":
        return Spread(self.value / other.value, self.low / other.high, self.high / other.low)

    def less(self, other: "Spread", parts: int) -> "Spread":
        """The difference, in so many parts."""
        return Spread(*(x / parts for x in (self.value - other.value, self.low - other.high, self.high - other.low)))


def _tokens(c: Sizes, chunks: int, seed: int) -> tuple[Tensor, Tensor]:
    """Queries [1, T, 1, Dk] and targets [1, T, D]."""
    generator = torch.Generator().manual_seed(seed)
    length = chunks * c.chunk
    queries = torch.randn(1, length, 1, c.width, generator=generator)
    return queries, torch.randn(1, length, c.width, generator=generator)


def _memory(c: Sizes) -> tuple[Tensor, Tensor]:
    keys = torch.randn(1, 2, c.sub_keys, c.width // 2, generator=torch.Generator().manual_seed(1))
    return keys, _table(c.sub_keys**2, c.width)


@functools.lru_cache(maxsize=1)
def _table(slots: int, width: int) -> Tensor:
    return torch.randn(slots, width, generator=torch.Generator().manual_seed(0))


def steps(c: Sizes, **options: Any) -> tuple[MemoryState, list[Callable[[], Any]]]:
    """A memory that has read its first chunk, and calls that each let it read and write another, going round four."""
    state = MemoryState(*_memory(c))
    options = {"chunk_size": c.chunk, "top_k": c.picks, **options}

    def step(tokens: tuple[Tensor, Tensor]) -> None:
        fast_weight_memory_step(state, *tokens, **options)

    chunks = [_tokens(c, 1, seed) for seed in range(4)]
    step(chunks[0])
    return state, [lambda tokens=tokens: step(tokens) for tokens in chunks[1:] + chunks[:1]]


class DenseWrite(NamedTuple):
    """What the second step of `steps` writes where keys stay, for the write as the equation has it."""

    values: Tensor  #: [N, D]
    slots: Tensor  #: [M, K]
    weights: Tensor  #: [M, K]
    targets: Tensor  #: [M, D]
    predictions: Tensor  #: [M, D]

    @classmethod
    def of_second_chunk(cls, state: MemoryState, c: Sizes) -> "DenseWrite":
        """With one token of lookahead, the last token of a chunk is written with the next one's."""
        (first, _), (second, targets) = _tokens(c, 1, 0), _tokens(c, 1, 1)
        queries = torch.cat([first[0, -1:], second[0, :-1]])
        scores, slots = product_key_lookup(queries, state.keys, c.picks)
        weights, slots = scores.flatten(1).softmax(-1), slots.flatten(1)
        return cls(state.values.clone(), slots, weights, targets[0], sparse_value_gather(state.values, slots, weights))

    def run(self) -> Tensor:
        slots = self.slots.flatten()
        terms = (self.weights.unsqueeze(-1) * (self.predictions - self.targets).unsqueeze(1)).flatten(0, 1)
        G = torch.zeros_like(self.values).index_add_(0, slots, terms)
        n_s = torch.bincount(slots, minlength=len(self.values)).clamp(min=1)
        return self.values - self.slots.shape[1] * G / n_s.unsqueeze(1)

    def check(self, after: Tensor) -> None:
        """Raise AssertionError unless a table, and that of `run`, is what the reference makes of this write."""
        addressed, places = torch.unique(self.slots, return_inverse=True)
        inputs = {**self._asdict(), "values": self.values[addressed], "slots": places}
        exact = reference.chunk_value_update(**testing.as_float64(inputs))
        baseline = reference.chunk_value_update(**inputs)
        untouched = torch.ones(len(after), dtype=torch.bool)
        untouched[addressed] = False
        for name, values in (("step", after), ("dense write", self.run())):
            testing.assert_within_budget(values[addressed], exact, baseline, name=name, reduction_length=after.shape[1])
            testing.assert_bitwise_equal(values[untouched], self.values[untouched], f"untouched rows of the {name}")


def training_call(c: Sizes, chunks: int) -> Callable[[], Any]:
    """Forward and backward of a sequence of so many chunks: gradients of everything that has one."""
    inputs = [x.detach().requires_grad_() for x in (*_tokens(c, chunks, 0), *_memory(c))]
    grad_output = torch.randn(inputs[1].shape, generator=torch.Generator().manual_seed(2))

    def call() -> None:
        output = fast_weight_memory(*inputs, chunk_size=c.chunk, top_k=c.picks).output
        torch.autograd.grad(output, inputs, grad_output)

    return call


def layer_calls(c: Sizes, name: str, direction: str, length: int) -> tuple[list[Call], list[Call]]:
    """Calls of a layer, and of its projections and its operator: one row of the registry, two of its providers."""
    operation = next(x for x in OPERATIONS if x.name == name)
    sizes = {"chunk": c.chunk, "sub_keys": c.sub_keys, "picks": c.picks, "key_width": c.width, "width": c.width}
    row = Row(operation, direction, Configuration("figures", length, (), (), **sizes))
    inputs = row.inputs("cpu")
    found = {p.name: p for p in operation.providers}
    layer, composed = (
        [prepare(row, p, {**inputs, **p.own(inputs)} if operation.in_place else inputs)]
        for p in (found[PACKAGE], found[COMPOSED])
    )
    return layer, composed


def interleaved(pairs: tuple[list[Callable[[], Any]], list[Callable[[], Any]]], runs: int) -> tuple[Spread, Spread]:
    """Times of calls of the one and of the other, in turns."""
    samples: tuple[list[float], list[float]] = ([], [])
    for i in range(runs + 1):
        for calls, times in zip(pairs, samples, strict=True):
            begin = time.perf_counter()
            calls[i % len(calls)]()
            times.append((time.perf_counter() - begin) * 1e6)
    first, second = (Spread.of(times[1:]) for times in samples)  # the first round warms up
    return first, second


def run(
    machine: Machine,
    *,
    on_figure: Callable[[Figure], None],
    deadline: float = math.inf,
    seconds: float = 2.0,
    c: Sizes = PAPER,
    small: int = 128,
) -> None:
    """Measure everything in NAMES, until `deadline`, a time.monotonic(); AssertionError if a table comes out wrong."""

    def say(name: str, spread: Spread) -> None:
        unit, goal, at_least = GOALS[name]
        on_figure(
            Figure(
                name, spread.value, unit, spread.low, spread.high, goal, at_least,
                machine.kind, machine.name, machine.commit, machine.versions,
            )
        )  # fmt: skip

    def late() -> bool:
        return time.monotonic() >= deadline

    if late():
        return
    say(STEP, Spread.of(time_cpu(steps(c)[1], seconds)))
    if late():
        return
    state, calls = steps(c, addressing_weight=0.0)
    dense = DenseWrite.of_second_chunk(state, c)
    calls[0]()
    dense.check(state.values)
    step = Spread.of(time_cpu(calls, seconds))
    say(STEP_NO_KEYS, step)
    dense_time = Spread.of(time_cpu([dense.run], seconds))
    say(DENSE, dense_time)
    say(DENSE_RATIO, dense_time.over(step))
    del state, calls, dense
    if late():
        return
    large_time, small_time = interleaved((steps(c)[1], steps(c._replace(sub_keys=small))[1]), INTERLEAVED)
    say(SIZE_RATIO, large_time.over(small_time))
    if late():
        return
    values = _memory(c)[1]
    say(COPY, Spread.of(time_cpu([values.clone], seconds)))
    say(GRADIENT, Spread.of(time_cpu([lambda: torch.empty_like(values).zero_()], seconds)))
    if late():
        return
    short = Spread.of(time_cpu([training_call(c, 1)], 2 * seconds))
    long = Spread.of(time_cpu([training_call(c, CHUNKS)], 2 * seconds))
    say(TRAINING, long.less(short, CHUNKS - 1))
    for name, kind, runs in (
        (LAYER, ("layer", "both", 2 * c.chunk), LAYER_RUNS),
        (LAYER_TOKEN, ("layer-decode", "forward", 1), TOKEN_RUNS),
    ):
        if late():
            return
        layer_time, composed_time = interleaved(layer_calls(c, *kind), runs)
        say(name, layer_time.over(composed_time))


@command("cpu")
def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status, 1 if a table came out wrong or the file could not be written."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write a JSON line for each figure, as it comes")
    options = parser.parse_args(argv)
    check_outputs(options.json)
    figures: list[Figure] = []
    status = 0
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(Lines(options.json)) if options.json else None

        def keep(figure: Figure) -> None:
            figures.append(figure)
            if file is not None:
                file.write(to_json(figure))

        try:
            run(measure_machine("cpu"), on_figure=keep)
        except AssertionError as error:
            print(f"wrong: {error}", file=sys.stderr)
            return 1
        except CommandError as error:  # what was measured is still shown
            print(f"failed: {error}", file=sys.stderr)
            status = 1
    print(f"{HEADING}\n\n{figures_table(figures)}")
    return status


if __name__ == "__main__":
    sys.exit(main())
