"""What the demo tells: tables, a plot and JSON."""

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence

import torch

from .. import __name__ as package
from .. import __version__
from .._commands import need
from .memory import MEMORIES, Options
from .stream import CODE_DIGITS, PassResult, Stream

Results = Mapping[str, Sequence[PassResult]]  #: the passes of each memory, by its name


def depth_label(depth: int) -> str:
    """4096 as 4K; any other number in full."""
    return f"{depth // 1024}K" if depth % 1024 == 0 else str(depth)


def chance(results: Sequence[PassResult]) -> list[float]:
    """Controls found at each depth, on average over the passes."""
    return [sum(found) / len(results) for found in zip(*(r.controls_found for r in results), strict=True)]


def show(results: Results, stream: Stream, options: Options) -> None:
    """Print the tables of accuracy and of needles."""
    console, table = need("rich.console", "demo"), need("rich.table", "demo")
    out = console.Console()
    numbers = range(1, options.passes + 1)
    columns = ("memory", *(f"pass {number}" for number in numbers), "seconds a pass", "bytes/s")
    accuracy = table.Table(*columns, title="Accuracy by pass: bytes predicted before they are read")
    needles = table.Table("memory", "needle read", title=f"Needles found, of {options.needles} at each depth")
    for depth in options.depths:
        needles.add_column(f"after {depth_label(depth)}", justify="right")
    for name, passes in results.items():
        seconds = sum(r.seconds for r in passes) / len(passes)
        accuracy.add_row(
            name, *(f"{r.accuracy:.1%}" for r in passes), f"{seconds:.2f}", f"{len(stream.data) / seconds:,.0f}"
        )
        for number, result in zip(numbers, passes, strict=True):
            read = "once" if number == 1 else f"{number} times"
            needles.add_row(name if number == 1 else "", read, *map(str, result.found))
        needles.add_row("", "never (chance)", *(f"{mean:g}" for mean in chance(passes)), end_section=True)
    out.print(accuracy)
    out.print(
        f"Always the commonest byte: {stream.commonest():.1%}. Times are means over the passes;\n"
        f"bytes/s count {len(stream.data):,} bytes a pass, needles included.\n"
    )
    out.print(needles)
    out.print(f"Guessing all {CODE_DIGITS} digits finds {10.0**-CODE_DIGITS * options.needles:g} of {options.needles}.")


def plot(results: Results, stream: Stream, options: Options) -> bytes:
    """Draw accuracy by pass for all memories, and for each one a grid of the needles found by depth and pass: a PNG."""
    figure = need("matplotlib.figure", "demo").Figure(figsize=(12, 7.5), layout="constrained", dpi=150)
    figure.get_layout_engine().set(hspace=0.06)
    colour_map = need("matplotlib.colors", "demo").LinearSegmentedColormap
    top, *grids = figure.subplot_mosaic([["top"] * len(results), list(results)]).values()
    passes, commonest = range(1, options.passes + 1), 100 * stream.commonest()

    width = 0.86 / len(results)
    for index, (name, rows) in enumerate(results.items()):
        places = [number + (index + 0.5) * width - 0.43 for number in passes]
        heights = [100 * r.accuracy for r in rows]
        bars = top.bar(places, heights, 0.94 * width, color=MEMORIES[name].colour, label=name)
        top.bar_label(bars, fmt="%.1f", fontsize=9, padding=1)
    top.axhline(commonest, color="black", linestyle="--", label=f"commonest byte: {commonest:.1f} %")
    top.set(title="Bytes predicted before they are read", ylabel="% of bytes", ylim=(0, 112), yticks=range(0, 101, 20))
    top.set_xticks(passes, [f"pass {number}" for number in passes])
    top.spines[["top", "right"]].set_visible(False)
    top.legend(loc="upper left", ncols=len(results) + 1, frameon=False)

    labels = [f"read {number}×" for number in passes] + ["never read\n(chance)"]
    for axes, (name, rows) in zip(grids, results.items(), strict=True):
        found: list[Sequence[float]] = [*(r.found for r in rows), chance(rows)]
        shares = [[count / options.needles for count in row] for row in found]
        colours = colour_map.from_list(name, ["#eeeeee", MEMORIES[name].colour])
        axes.pcolormesh(shares, cmap=colours, vmin=0, vmax=1, edgecolors="white", linewidth=2)
        for y, row in enumerate(found):
            for x, count in enumerate(row):
                ink = "white" if count > 0.65 * options.needles else "black"
                axes.text(x + 0.5, y + 0.5, f"{count:.3g}", ha="center", va="center", color=ink)
        axes.set(title=f"{name}: needles found, of {options.needles}", xlabel="other bytes read since the needle")
        axes.set_xticks([x + 0.5 for x in range(len(options.depths))], [depth_label(depth) for depth in options.depths])
        axes.set_yticks([y + 0.5 for y in range(len(labels))], labels if axes is grids[0] else [])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.invert_yaxis()
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def as_json(results: Results, stream: Stream, options: Options, text: str) -> str:
    """Options and results; ``text`` is the name of what was read."""
    report = {
        package: __version__,
        "torch": str(torch.__version__),
        "text": text,
        "text_bytes": sum(stream.is_text),
        "options": dataclasses.asdict(options),
        "commonest_byte": stream.commonest(),
        "memories": {
            name: {
                "step": MEMORIES[name].step,
                "addressing_weight": options.addressing_weight if MEMORIES[name].has_key_step else 0.0,
                "passes": [result._asdict() for result in passes],
            }
            for name, passes in results.items()
        },
    }
    return json.dumps(report, indent=2) + "\n"
