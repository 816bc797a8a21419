"""Rows at sizes that take no time, and results that nothing has measured."""

import dataclasses

import torch

from benchmarks import goals, registry
from benchmarks.measure import Machine, Result
from benchmarks.providers import PACKAGE

MACHINE = Machine("cpu", "test", 10.0, 0.1, commit=None, versions={"torch": torch.__version__})


def shrunk(row: registry.Row) -> registry.Row:
    return dataclasses.replace(row, configuration=row.configuration.shrunk())


#: Of CPUs and GPUs; the same row can be there for both.
ROWS = {row.name: shrunk(row) for row in registry.rows()}


def some_result(**fields) -> Result:
    """A result of this package with times that say what they are."""
    times = {"min_us": 90.0, "p10_us": 95.0, "median_us": 100.0, "p90_us": 110.0, "repeats": 9, "peak_bytes": 2**20}
    machine = dataclasses.asdict(Machine("cuda", "test", 3000.0, 400.0, commit=None, versions={}))
    costs = {"dtype": "float32", "sizes": {}, "bytes": 10**6, "flops": 10**7, "floor_us": 50.0, "ratio": 2.0}
    names = {"operation": "gather", "direction": "forward", "configuration": "inference", "provider": PACKAGE}
    return Result(**{**names, **machine, **costs, **times, **fields})


def slower_by(factor: float, **fields) -> Result:
    times = {name: factor * getattr(some_result(), name) for name in ("min_us", "p10_us", "median_us", "p90_us")}
    return some_result(**times, **fields)


def gpu_rows(**us: float) -> list[Result]:
    """Results of the rows that goals need, all of the same time eagerly and in a graph but for some."""
    results = []
    for row, _ in goals.cases("cuda"):
        operation, direction, configuration = row.split("/")
        time = us.get(configuration, 100.0)
        names = {"operation": operation, "direction": direction, "configuration": configuration}
        graph = {"graph_us": time / 2, "graph_ratio": 1.0}
        results.append(some_result(**names, **graph, median_us=time, peak_bytes=2 * 2**30))
    return results
