"""The rows of a CPU under pytest-benchmark: python -m pytest benchmarks/cpu_rows.py -k gather [--benchmark-...]

`benchmarks.run` runs this file too, with the rows that it selected, and gets a result from each test.
"""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from benchmarks.measure import (
    Call,
    Clock,
    Machine,
    Result,
    Shared,
    measure,
    measure_machine,
    number_of_repeats,
    warm_up,
)
from benchmarks.registry import Provider, Row, rows


@dataclasses.dataclass(eq=False)  # pytest wants to hash its plugins
class Measurements:
    """What is to be measured, and where the results go; a plugin of the pytest session that measures."""

    cases: Sequence[tuple[Row, Provider]]
    machine: Machine
    seconds: float = 0.5
    deadline: float = math.inf  #: a time.monotonic()
    on_result: Callable[[Result], None] = lambda result: None
    on_begin: Callable[[Row, Provider], None] = lambda row, provider: None
    failures: list[str] = dataclasses.field(default_factory=list)
    interrupted: bool = False

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failures.append(str(report.longrepr))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # What a provider does wrong is in its result; whatever else fails would be lost with pytest's own report.
        if report.failed and (_KEPT, True) not in report.user_properties:
            self.failures.append(str(report.longrepr))

    def pytest_keyboard_interrupt(self) -> None:
        self.interrupted = True


_KEPT = "result is kept"


def run(measurements: Measurements) -> None:
    """Measure in a pytest session that prints nothing. Raises KeyboardInterrupt or RuntimeError if that ended it."""
    options = ["-o", "addopts=", "-o", "filterwarnings=", "--capture=no"]
    options += [x for name in ("terminal", "cacheprovider", "faulthandler", "xdist") for x in ("-p", f"no:{name}")]
    status = pytest.main([*options, __file__], plugins=[measurements])
    _shared.cache_clear()
    if measurements.interrupted and not measurements.failures:
        raise KeyboardInterrupt
    if measurements.failures or status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError("\n".join(measurements.failures) or f"pytest ended with {status!r}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    plugins = metafunc.config.pluginmanager.get_plugins()
    given = next((plugin for plugin in plugins if isinstance(plugin, Measurements)), None)
    cases = given.cases if given else [(row, provider) for row in rows("cpu") for provider in row.providers()]
    ids = [f"{row.name}/{provider.name}" for row, provider in cases]
    metafunc.parametrize("row, provider", cases, ids=ids)


@pytest.fixture(scope="session")
def measurements(request: pytest.FixtureRequest) -> Measurements:
    plugins = request.config.pluginmanager.get_plugins()
    given = next((plugin for plugin in plugins if isinstance(plugin, Measurements)), None)
    return given or Measurements((), measure_machine("cpu"))


@functools.lru_cache(maxsize=1)  # the providers of a row come one after another
def _shared(row: Row) -> Shared:
    return Shared(row, "cpu")


def pedantic(benchmark: Any) -> Clock:
    """pytest-benchmark as a clock: each call is a round, and the rounds go round the calls."""

    def clock(calls: Sequence[Call], seconds: float) -> list[float]:
        once_us = warm_up(calls, seconds)
        turn = itertools.cycle(calls)

        def run_and_drop(call: Call) -> None:
            call()

        benchmark.pedantic(
            run_and_drop, setup=lambda: ((next(turn),), {}), rounds=number_of_repeats(seconds, once_us, least=3)
        )
        return [1e6 * second for second in benchmark.stats.stats.data]

    return clock


def test_row(
    row: Row,
    provider: Provider,
    benchmark: Any,
    measurements: Measurements,
    record_property: Callable[[str, object], None],
) -> None:
    if time.monotonic() >= measurements.deadline:
        pytest.skip("out of time")
    measurements.on_begin(row, provider)
    result = measure(
        row,
        provider,
        measurements.machine,
        seconds=measurements.seconds,
        shared=_shared(row),
        clock=pedantic(benchmark),
    )
    benchmark.extra_info.update(floor_us=result.floor_us, ratio=result.ratio, peak_bytes=result.peak_bytes)
    measurements.on_result(result)
    record_property(_KEPT, True)
    if result.status != "ok":
        pytest.fail(f"{result.status}: {result.message}", pytrace=False)
