"""Plots of a results file: python -m benchmarks.plots results.jsonl [--out DIR]. Needs matplotlib."""

import argparse
import functools
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from benchmarks.files import new_figure, save_figure
from benchmarks.measure import Result
from benchmarks.providers import PACKAGE
from benchmarks.results import alike, read_results, tokens_of
from fwpkm_kernels._commands import command, make_folder, need, one_line, try_all

_LINES = ("-", ":", "--", "-.")


def _color(number: int) -> Any:
    from matplotlib import colormaps

    return colormaps["tab20"](2 * number % 20 + number // 10 % 2)  # the ten strong ones first


def _save(figure: Any, results: Sequence[Result], path: Path) -> Path:
    r = results[-1]
    figure.suptitle(f"{r.device}, torch {r.versions.get('torch')}, commit {(r.commit or 'unknown')[:12]}", fontsize=10)
    return save_figure(figure, path)


def _plot_times(timed: Sequence[Result]) -> Any:
    """Each row's time beside its floor; and the other providers' times over this package's."""
    ours = {r.row: r for r in timed if r.provider == PACKAGE}
    others = [r for r in timed if r.provider != PACKAGE and r.row in ours]
    if not ours:
        return None
    place = {name: i for i, name in enumerate(ours)}
    figure, panels = new_figure(16 if others else 9, 2 + 0.28 * len(ours), 1 + bool(others))
    left, right = panels[0], panels[-1]
    left.barh(range(len(ours)), [r.time_us for r in ours.values()], color=_color(0), alpha=0.7, label=PACKAGE)
    graphs = [r for r in ours.values() if r.graph_us is not None]
    if graphs:
        times, places = [r.graph_us for r in graphs], [place[r.row] for r in graphs]
        left.plot(times, places, "D", color="navy", ms=4, label="in a graph")
    for number, (provider, mine) in enumerate(_grouped(others, lambda r: r.provider).items(), start=1):
        places, style = [place[r.row] for r in mine], {"color": _color(number), "ms": 4, "label": provider}
        left.plot([r.time_us for r in mine], places, "o", **style)
        right.plot([r.time_us / ours[r.row].time_us for r in mine], places, "o", **style)
    floors = [r.floor_us for r in ours.values()]
    left.plot(floors, range(len(ours)), "|", color="black", ms=12, mew=2, label="floor")
    left.set_xlabel("time, µs")
    left.set_yticks(range(len(ours)), list(ours))
    if others:
        right.axvline(1.0, color="black", lw=1)
        right.set_xlabel(f"time / time of {PACKAGE}: right of 1, {PACKAGE} is faster")
        right.set_yticks(range(len(ours)), [])
    for axes in panels:
        axes.set_xscale("log")
        axes.set_ylim(len(ours) - 0.5, -0.5)
        axes.grid(axis="x", which="both", alpha=0.3)
        axes.legend(loc="best")
    return figure


def _plot_roofline(timed: Sequence[Result]) -> Any:
    """What each row of this package reaches, under the two ceilings that were measured."""
    ours = [r for r in timed if r.provider == PACKAGE and r.flops and r.bytes]
    if not ours:
        return None
    figure, (axes,) = new_figure(10, 7)
    marks = {"forward": "o", "backward": "s"}
    operations = list(dict.fromkeys(r.operation for r in ours))
    for (operation, direction), mine in _grouped(ours, lambda r: (r.operation, r.direction)).items():
        intensity, reached = [r.flops / r.bytes for r in mine], [r.flops / r.time_us / 1e6 for r in mine]  # TFLOP/s
        style = {"color": _color(operations.index(operation)), "alpha": 0.8, "label": f"{operation} {direction}"}
        axes.plot(intensity, reached, marks.get(direction, "^"), **style)
    # Runs that were resumed have measured their ceilings again: the lines are the last ones.
    bandwidth, rate = ours[-1].bandwidth_gb_s / 1e3, ours[-1].matmul_tflop_s
    intensities = [r.flops / r.bytes for r in ours]
    ends = sorted((0.5 * min(intensities), rate / bandwidth, 2 * max(*intensities, rate / bandwidth)))
    ceiling = [min(rate, x * bandwidth) for x in ends]
    axes.plot(ends, ceiling, color="black", label=f"copies {1e3 * bandwidth:.4g} GB/s, products {rate:.3g} TFLOP/s")
    axes.set(xscale="log", yscale="log", xlabel="flops / bytes, the least of both", ylabel="TFLOP/s reached")
    axes.grid(which="both", alpha=0.3)
    axes.legend(loc="best", fontsize=8)
    return figure


def _grouped(results: Sequence[Result], key: Callable[[Result], Any]) -> dict[Any, list[Result]]:
    groups: dict[Any, list[Result]] = {}
    for r in results:
        groups.setdefault(key(r), []).append(r)
    return groups


def _plot_scaling(timed: Sequence[Result]) -> Any:
    """Time against the number of slots, time and memory against the tokens: of rows that differ in nothing else."""
    by_slots, by_tokens = alike(timed, "sub_keys"), alike(timed, "tokens")
    with_memory = [group for group in by_tokens if all(r.peak_bytes for r in group)]
    slots, time, memory = lambda r: r.sizes["sub_keys"] ** 2, lambda r: r.time_us, lambda r: r.peak_bytes / 2**20
    panels = [
        (by_slots, slots, time, "slots N", "time, µs"),
        (by_tokens, tokens_of, time, "tokens T of each item", "time, µs"),
        (with_memory, tokens_of, memory, "tokens T of each item", "memory on top of the inputs, MiB"),
    ]
    panels = [panel for panel in panels if panel[0]]
    if not panels:
        return None
    shown = [group[0] for groups, *_ in panels for group in groups]
    works = list(dict.fromkeys(f"{r.operation} {r.direction}" for r in shown))
    providers = sorted(dict.fromkeys(r.provider for r in shown), key=lambda name: name != PACKAGE)
    figure, axes_of = new_figure(7 * len(panels), 7.5, len(panels))
    for axes, (groups, x, y, x_label, y_label) in zip(axes_of, panels, strict=True):
        for group in groups:
            r = group[0]
            color, line = works.index(f"{r.operation} {r.direction}"), providers.index(r.provider)
            points = [x(r) for r in group], [y(r) for r in group]
            axes.plot(*points, color=_color(color), linestyle=_LINES[line % len(_LINES)], marker="o", ms=4)
        axes.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label)
        axes.grid(which="both", alpha=0.3)
    for number, name in enumerate(works):
        axes_of[0].plot([], [], color=_color(number), label=name)
    for number, name in enumerate(providers):
        axes_of[0].plot([], [], color="black", linestyle=_LINES[number % len(_LINES)], label=name)
    figure.legend(loc="outside lower center", ncols=2 * len(panels), fontsize=8)
    return figure


#: The files; none is written without data for it.
FILES = {"time.png": _plot_times, "roofline.png": _plot_roofline, "scaling.png": _plot_scaling}


def plot(results: Sequence[Result], out: Path, names: Collection[str] = FILES) -> list[Path]:
    """Draw those of `names` that have data, the others too where one cannot be written; the files written."""
    timed = [r for r in results if r.status == "ok" and r.time_us]
    figures = [(draw(timed), name) for name, draw in FILES.items() if name in names]
    return try_all(functools.partial(_save, figure, timed, out / name) for figure, name in figures if figure)


@command("plots")
def main(argv: Sequence[str] | None = None) -> int:
    """Draw; returns the exit status, 1 if there was nothing to draw."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description="Plot a results file.")
    parser.add_argument("results", help="a file of JSON lines from benchmarks.run --json")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the PNGs, made if need be")
    options = parser.parse_args(argv)
    results = read_results(options.results)
    make_folder(options.out, *FILES)
    need("matplotlib.backends.backend_agg", "bench")
    files = plot(results, options.out)
    print("\n".join(map(one_line, files)) or "nothing to plot")
    return 0 if files else 1


if __name__ == "__main__":
    sys.exit(main())
