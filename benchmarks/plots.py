"""Plots of a results file: python -m benchmarks.plots results.jsonl [--out DIR]. Needs matplotlib."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Result
from benchmarks.registry import PACKAGE
from benchmarks.run import read_results

_COLORS = {"pytorch": "tab:orange", "embedding_bag": "tab:green", "dense": "tab:red"}


def _axes(lines: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(10, 1.5 + 0.3 * lines), layout="constrained")


def _finish(figure: Any, axes: Any, names: Sequence[str], results: Sequence[Result], path: Path) -> Path:
    axes.set_xscale("log")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="x", which="both", alpha=0.3)
    axes.legend(loc="best")
    axes.set_title(f"{results[-1].device}, torch {results[-1].versions.get('torch')}", fontsize=10)
    figure.savefig(path, dpi=120)
    return path


def plot(results: Sequence[Result], out: Path) -> list[Path]:
    """Draw time beside floor and the other providers' times over this package's; the files written."""
    timed = [r for r in results if r.status == "ok" and r.time_us]
    ours = {r.row: r for r in timed if r.provider == PACKAGE}
    others = [r for r in timed if r.provider != PACKAGE and r.row in ours]
    names = list(ours)
    if not names:
        return []
    place = {name: i for i, name in enumerate(names)}
    files = []

    figure, axes = _axes(len(names))
    axes.barh(range(len(names)), [r.time_us for r in ours.values()], color="tab:blue", alpha=0.7, label=PACKAGE)
    graphs = [r for r in ours.values() if r.graph_us is not None]
    if graphs:
        axes.plot(
            [r.graph_us for r in graphs], [place[r.row] for r in graphs], "D", color="navy", ms=4, label="in a graph"
        )
    for provider in dict.fromkeys(r.provider for r in others):
        mine = [r for r in others if r.provider == provider]
        color = _COLORS.get(provider)
        axes.plot([r.time_us for r in mine], [place[r.row] for r in mine], "o", color=color, ms=4, label=provider)
    floors = [r.floor_us for r in ours.values()]
    axes.plot(floors, range(len(names)), "|", color="black", ms=12, mew=2, label="floor")
    axes.set_xlabel("time, µs")
    files.append(_finish(figure, axes, names, results, out / "time.png"))

    if others:
        figure, axes = _axes(len(names))
        for provider in dict.fromkeys(r.provider for r in others):
            mine = [r for r in others if r.provider == provider]
            ratios = [r.time_us / ours[r.row].time_us for r in mine]
            axes.plot(ratios, [place[r.row] for r in mine], "o", color=_COLORS.get(provider), label=provider)
        axes.axvline(1.0, color="black", lw=1)
        axes.set_xlabel(f"time / time of {PACKAGE}: right of 1, {PACKAGE} is faster")
        files.append(_finish(figure, axes, names, results, out / "ratio.png"))
    return files


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description="Plot a results file.")
    parser.add_argument("results", help="a file of JSON lines from benchmarks.run --json")
    parser.add_argument("--out", default=".", help="folder for the PNGs")
    options = parser.parse_args(argv)
    files = plot(read_results(options.results), Path(options.out))
    print("\n".join(map(str, files)) or "nothing to plot")
    return 0 if files else 1


if __name__ == "__main__":
    sys.exit(main())
