"""The rows of a CPU under pytest-benchmark: python -m pytest benchmarks/test_rows.py -k gather [--benchmark-...]"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import pytest

from benchmarks.measure import Call, Clock, Machine, Shared, measure, measure_machine, number_of_repeats, warm_up
from benchmarks.providers import Provider
from benchmarks.registry import Row, rows


@pytest.fixture(scope="session")
def machine() -> Machine:
    return measure_machine("cpu")


@functools.lru_cache(maxsize=1)  # the providers of a row come one after another
def shared(row: Row) -> Shared:
    return Shared(row, "cpu")


def clock_of(benchmark: Any) -> Clock:
    """Each call is a round of pytest-benchmark, and the rounds go round the calls."""

    def clock(calls: Sequence[Call], seconds: float) -> list[float]:
        rounds, turn = number_of_repeats(seconds, warm_up(calls, seconds), least=3), itertools.cycle(calls)

        def run_and_drop(call: Call) -> None:
            call()

        benchmark.pedantic(run_and_drop, setup=lambda: ((next(turn),), {}), rounds=rounds)
        return [1e6 * second for second in benchmark.stats.stats.data]

    return clock


@pytest.mark.parametrize(
    "row, provider",
    [pytest.param(row, p, id=f"{row.name}/{p.name}") for row in rows("cpu") for p in row.providers()],
)
def test_row(row: Row, provider: Provider, benchmark: Any, machine: Machine) -> None:
    result = measure(row, provider, machine, shared=shared(row), clock=clock_of(benchmark))
    benchmark.extra_info.update(floor_us=result.floor_us, ratio=result.ratio, peak_bytes=result.peak_bytes)
    assert result.status == "ok", result.message
