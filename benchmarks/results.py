"""The lines of a results file, and the tables that are made of them."""

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.files import read_lines
from benchmarks.measure import Result
from benchmarks.providers import GRAPHED, PACKAGE, is_package

#: Operations that read a sequence chunk by chunk: of these, two lengths give the time of one more chunk.
SEQUENCES = ("sequence", "prefill")


def to_json(result: Result) -> str:
    return json.dumps(dataclasses.asdict(result))


def read_results(path: str | Path) -> list[Result]:
    """The rows in a file of JSON lines, without a line that was cut off or that another version wrote. Of a row that
    was measured in several rounds the last line counts: a run writes a later one only if it is quicker or not right."""
    results = {}
    for line in read_lines(path):
        with contextlib.suppress(TypeError):
            result = Result(**line)
            results[result.row, result.provider] = result
    return list(results.values())


def show_us(us: float | None) -> str:
    """Microseconds in three digits and a fitting unit."""
    if us is None:
        return "-"
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if us >= size:
            return f"{us / size:.3g} {unit}" if us < 999 * size else f"{us / size:.0f} {unit}"
    return f"{us:.3g} µs"


def table_of(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Header and one line per row: this package's time and floor, then the others' times over this package's."""
    by_row: dict[str, dict[str, Result]] = {}
    for result in results:
        by_row.setdefault(result.row, {})[result.provider] = result
    others = list(dict.fromkeys(r.provider for r in results if r.provider != PACKAGE))
    has_graph = any(r.graph_us is not None for r in results)
    header = ["row", "floor", PACKAGE, "x floor", *(["in a graph", "x floor"] if has_graph else [])]
    header += [name for other in others for name in (other, "ratio")]
    lines = []
    for name, found in by_row.items():
        ours = found.get(PACKAGE)
        any_result = max(found.values(), key=lambda r: r.floor_us)  # 0 where there were no inputs
        line = [name, show_us(any_result.floor_us or None), *time_and_ratio(ours)]
        if has_graph:
            graphed = next((r for r in (ours, found.get(GRAPHED)) if r and r.graph_us is not None), None)
            line += [show_us(graphed.graph_us), f"{graphed.graph_ratio:.2f}"] if graphed else ["-", "-"]
        for other in others:
            theirs = found.get(other)
            ratio = "-"
            if ours and theirs and ours.time_us and theirs.time_us:
                ratio = f"{theirs.time_us / ours.time_us:.2f}"
            line += [time_and_ratio(theirs)[0], ratio]
        lines.append(line)
    return header, lines


def time_and_ratio(result: Result | None) -> list[str]:
    if result is None:
        return ["-", "-"]
    if result.status != "ok":
        return [result.status, "-"]
    return [show_us(result.time_us), f"{result.ratio:.2f}"]


def plain_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in (header, *lines)
    )


def describe(machine_results: Sequence[Result]) -> str:
    """The machine and its ceilings, and how to read the table."""
    r = machine_results[-1]
    precision, kind_of_time = ("tf32", "medians") if r.kind == "cuda" else ("float32", "minima")
    versions = ", ".join(f"{name} {version}" for name, version in r.versions.items() if version)
    return (
        f"{r.device}: copies at {r.bandwidth_gb_s:.4g} GB/s, "
        f"matrix products in {precision} at {r.matmul_tflop_s:.3g} TFLOP/s\n"
        f"{versions}, commit {r.commit}\n"
        f"Times are {kind_of_time}. ratio = the other's time / this package's: above 1, this package is faster."
    )


def report(results: Sequence[Result]) -> str:
    """The table; below it the time of a chunk, the machine, and what was not right."""
    if not results:
        return "no results"
    # Where this package could not be captured in a graph, that is no fault of its numbers, but has to be seen.
    told = [r for r in results if r.status != "ok" or (r.message and is_package(r.provider))]
    problems = "\n".join(f"{r.status}: {r.row} {r.provider}: {r.message}" for r in told)
    chunks = "\n".join(
        f"{x.name}, {x.provider}: {show_us(x.us)} a chunk"
        + (f", {show_us(x.graph_us)} in a graph" if x.graph_us else "")
        + f"; {show_us(x.once_us)} once a call"
        for x in per_chunk(results)
    )
    return "\n\n".join(filter(None, (plain_table(*table_of(results)), chunks, describe(results), problems)))


def show_bytes(count: int | None) -> str:
    if count is None:
        return "-"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def tokens_of(result: Result) -> int:
    """Tokens of each item of the batch."""
    return result.sizes["tokens"] // result.sizes.get("batch", 1)


def alike(results: Sequence[Result], but_for: str) -> list[list[Result]]:
    """Timed results of one operation, direction and provider that differ in one size only, each group in its order."""
    groups: dict[tuple[Any, ...], dict[Any, Result]] = {}
    for r in results:
        if r.time_us and but_for in r.sizes:
            others = tuple(sorted((name, x) for name, x in r.sizes.items() if name != but_for))
            groups.setdefault((r.operation, r.direction, r.provider, others), {})[r.sizes[but_for]] = r
    return [[group[size] for size in sorted(group)] for group in groups.values() if len(group) > 1]


class ChunkTime(NamedTuple):
    """What one more chunk of a sequence costs, and what a call does once, in microseconds."""

    name: str  #: of the two rows
    provider: str
    us: float
    once_us: float
    graph_us: float | None  #: of a chunk, of device time alone


def per_chunk(results: Sequence[Result]) -> list[ChunkTime]:
    """The difference of the times of two lengths, over the difference in chunks. What a call does once, as copying the
    table, falls out: the shorter one takes it besides its chunks. On a GPU the launches of a chunk may take longer than
    the device: that is what graphs tell."""
    found = []
    for group in alike([r for r in results if r.operation in SEQUENCES], but_for="tokens"):
        short, long = group[0], group[-1]
        before, after = (tokens_of(r) / long.sizes["chunk"] for r in (short, long))
        us = (long.time_us - short.time_us) / (after - before)
        graph_us = (long.graph_us - short.graph_us) / (after - before) if long.graph_us and short.graph_us else None
        name = f"{long.operation}/{long.direction}: {long.configuration} less {short.configuration}"
        found.append(ChunkTime(name, long.provider, us, short.time_us - before * us, graph_us))
    return found
