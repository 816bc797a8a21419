"""Plots of an evaluation's results, as PNG; matplotlib's."""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from benchmarks.evaluation.records import Line, Recall, names_of, show_bucket, show_length, summary, tested
from benchmarks.files import new_figure, save_figure

#: The files of plots. A plot without data is not written.
FILES = ("recall.png", "loss.png", "perplexity.png", "num_keys.png")


def _draw_recalls(axes: Any, recalls: dict[int, Recall], label: str, number: int) -> None:
    """A line of shares over lengths or sizes, with their intervals as bars, in the colour of this number."""
    x = sorted(recalls)
    shares = [recalls[at].share for at in x]
    bars = [
        [max(0.0, recall.share - recall.interval[0]) for recall in map(recalls.get, x)],
        [max(0.0, recall.interval[1] - recall.share) for recall in map(recalls.get, x)],
    ]
    axes.errorbar(x, shares, bars, marker="o", ms=4, capsize=3, label=label, color=f"C{number}")


def _finish(axes: Any, title: str, label: str, ticks: Sequence[int], show: Callable[[int], str]) -> None:
    axes.set(title=title, xlabel=label, ylabel="needles found", ylim=(-0.03, 1.03), xscale="log")
    axes.set_xticks(ticks, [show(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def plot_recall(lines: Sequence[Line], path: Path) -> list[Path]:
    """Recall by length, a panel for each number of readings and a line for each model."""
    sums = summary(lines)
    names = names_of(sums)
    counts = sorted({readings for recalls in sums.values() for _, readings in recalls})
    if not counts:
        return []
    figure, panels = new_figure(6 * len(counts), 4.5, len(counts))
    for axes, readings in zip(panels, counts, strict=True):
        for number, (row, recalls) in enumerate(sums.items()):
            mine = {length: recall for (length, count), recall in recalls.items() if count == readings}
            if mine:
                _draw_recalls(axes, mine, names[row], number)
        title = "read once" if readings == 1 else f"read {readings} times"
        ticks = sorted({length for recalls in sums.values() for length, _ in recalls})
        _finish(axes, title, "bytes of the context", ticks, show_length)
    return [save_figure(figure, path)]


def plot_num_keys(lines: Sequence[Line], path: Path) -> list[Path]:
    """Recall by the number of sub-keys in the test: of the rows that were tested over several sizes."""
    curves: dict[tuple[str, int], dict[int, dict[int, Recall]]] = {}
    sums = summary(lines)
    names = names_of(sums)
    for row, recalls in sums.items():
        for (length, readings), recall in recalls.items():
            if readings == 1 and row.num_keys is not None:
                curves.setdefault((names[row], length), {}).setdefault(row.num_keys, {})[length] = recall
    curves = {key: sizes for key, sizes in curves.items() if len(sizes) > 1}
    if not curves:
        return []
    rows = list(dict.fromkeys(row for row, _ in curves))
    figure, panels = new_figure(6 * len(rows), 4.5, len(rows))
    for axes, row in zip(panels, rows, strict=True):
        mine = {length: sizes for (name, length), sizes in curves.items() if name == row}
        for number, (length, sizes) in enumerate(sorted(mine.items())):
            recalls_of = {size: recalls[length] for size, recalls in sizes.items()}
            _draw_recalls(axes, recalls_of, show_length(length), number)
        ticks = sorted({size for sizes in mine.values() for size in sizes})
        _finish(axes, f"{row}, read once", "sub-keys n in the test, of n² slots", ticks, str)
    return [save_figure(figure, path)]


def means_of_last(values: Sequence[float], count: int = 10) -> list[float]:
    """Of each value, the mean of it and of those before it, `count` together."""
    sums = [0.0, *accumulate(values)]
    return [(sums[i] - sums[max(0, i - count)]) / min(count, i) for i in range(1, len(sums))]


def plot_losses(logs: dict[str, list[dict[str, float]]], path: Path) -> list[Path]:
    """Bits, digits right and gate over the bytes trained on: means of the last ten steps; a line for each run.

    Of a single run each step is drawn too.
    """
    if not logs:
        return []
    labels = {"bits": "bits a byte", "digits_right": "digits right, of those asked for", "gate": "mean gate"}
    figure, panels = new_figure(6 * len(labels), 4.5, len(labels))
    for axes, (name, label) in zip(panels, labels.items(), strict=True):
        for run, log in logs.items():
            trained, values = [*accumulate(line["tokens"] for line in log)], [line[name] for line in log]
            if len(logs) == 1:
                axes.plot(trained, values, "C0", lw=1, alpha=0.3)
            axes.plot(trained, means_of_last(values), lw=1, label=run)
        axes.set(xlabel="bytes trained on", ylabel=label)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    return [save_figure(figure, path)]


def plot_perplexity(lines: Sequence[Line], path: Path) -> list[Path]:
    """Bits per byte by position, a panel for each model and a line for each treatment: the mean over seeds."""
    bits: dict[str, dict[str, dict[tuple[int, int], dict[int, float]]]] = {}
    names = names_of(map(tested, lines))
    for line in lines:
        if "bits" in line:
            buckets = bits.setdefault(names[tested(line)], {}).setdefault(line["treatment"], {})
            buckets.setdefault((line["low"], line["high"]), {})[line["seed"]] = line["bits"]
    if not bits:
        return []
    figure, panels = new_figure(6 * len(bits), 4.5, len(bits))
    for axes, (name, treatments) in zip(panels, bits.items(), strict=True):
        positions = sorted({bucket for buckets in treatments.values() for bucket in buckets})
        for treatment, buckets in treatments.items():
            means = [math.fsum(buckets[bucket].values()) / len(buckets[bucket]) for bucket in sorted(buckets)]
            axes.plot([*map(positions.index, sorted(buckets))], means, marker="o", ms=4, label=treatment)
        axes.set_xticks(range(len(positions)), [*map(show_bucket, positions)])
        seeds = {seed for buckets in treatments.values() for found in buckets.values() for seed in found}
        title = f"{name}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, sorted(seeds)))}"
        axes.set(title=title, xlabel="position, bytes", ylabel="bits a byte")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return [save_figure(figure, path)]
