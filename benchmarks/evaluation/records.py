"""Lines of results: what each says of where it comes from, how they are read back, added up, and shown as tables."""

import contextlib
import dataclasses
import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from fwpkm_kernels import env_report
from fwpkm_kernels._commands import Lines, need, reading

#: The share of needles that a model finds at its shortest length, after some number of readings, if it has learnt the
#: task. What others find at greater lengths says nothing about length.
LEARNT = 0.1

Line = dict[str, Any]


def stamp(options: Any = None, device: str = "cpu") -> Line:
    """What every line says: options (a dataclass, or None), commit, versions, device and threads."""
    report = env_report.collect()
    named = {"torch": report["torch"]["version"], "transformers": transformers.__version__}
    return {
        **({} if options is None else {"options": dataclasses.asdict(options)}),
        "commit": report["commit"],
        "versions": {name: report[name] for name in ("python", "triton", "fwpkm_kernels")} | named,
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else report["cpu"]["model"],
        "threads": torch.get_num_threads(),
    }


def append_lines(path: str | Path, lines: Iterable[Line]) -> None:
    """Append each as it comes, behind the end of a line that a killed program has left unfinished."""
    before = b""
    with contextlib.suppress(OSError):
        before = Path(path).read_bytes()
    with Lines(path, append=True) as file:
        if before and not before.endswith(b"\n"):
            file.write("")
        for line in lines:
            file.write(json.dumps(line))


def read_lines(path: str | Path) -> list[Line]:
    """The lines of a file, without any that was cut off; CommandError if it cannot be read."""
    with reading(path):
        text = Path(path).read_text("utf-8", "replace")
    lines = []
    for line in text.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]


def wilson(found: int, needles: int) -> tuple[float, float]:
    """The 95 % interval of a share of `found` among `needles`, by Wilson's score."""
    if needles == 0:
        return 0.0, 1.0
    z, share = 1.959964, found / needles
    middle = (share + z * z / (2 * needles)) / (1 + z * z / needles)
    half = z / (1 + z * z / needles) * math.sqrt(share * (1 - share) / needles + z * z / (4 * needles**2))
    return max(0.0, middle - half), min(1.0, middle + half)


class Tested(NamedTuple):
    """A line of the tables: models trained alike but for their seeds, and tested over a memory of one size."""

    row: str
    num_keys: int | None  #: of the memory tested; None without one
    options: str  #: JSON, without the seed


def tested(line: Line) -> Tested:
    options = {name: x for name, x in line["options"].items() if name != "seed"}
    return Tested(line["row"], line["num_keys"], json.dumps(options, sort_keys=True))


class Recall(NamedTuple):
    """What the models of one `Tested` found at one length after so many readings, all seeds together."""

    seeds: tuple[int, ...]
    found: int
    needles: int
    digits: int
    controls_found: int
    seconds: float  #: of reading a context so often, the mean
    state_bytes: int

    @property
    def share(self) -> float:
        return self.found / self.needles

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.found, self.needles)


def cell_key(line: Line) -> tuple[Any, ...]:
    """What a cell is measured of: a later line with the same takes the place of one before."""
    return (*tested(line), line["seed"], line["test_seed"], line["length"], line["readings"])


def summary(lines: Sequence[Line]) -> dict[Tested, dict[tuple[int, int], Recall]]:
    """Of each row of the tables, by length and readings, the sums over seeds of the last line of each cell."""
    cells: dict[tuple[Any, ...], list[Line]] = {}
    for line in {cell_key(line): line for line in lines}.values():
        cells.setdefault((tested(line), line["length"], line["readings"]), []).append(line)
    sums: dict[Tested, dict[tuple[int, int], Recall]] = {}
    for (row, length, readings), same in cells.items():
        sums.setdefault(row, {})[length, readings] = Recall(
            tuple(sorted({line["seed"] for line in same})),
            *(sum(line[name] for line in same) for name in ("found", "needles", "digits", "controls_found")),
            sum(line["seconds"] for line in same) / sum(line["contexts"] for line in same),
            max(line["state_bytes"] for line in same),
        )
    return sums


def has_learnt(recalls: dict[tuple[int, int], Recall]) -> bool:
    shortest = min(length for length, _ in recalls)
    return max(recall.share for (length, _), recall in recalls.items() if length == shortest) >= LEARNT


class Table(NamedTuple):
    title: str
    header: list[str]
    lines: list[list[str]]

    def markdown(self) -> str:
        """A heading and a table in Markdown, with columns that are as wide as their cells, to be read as they are."""
        need("rich", "evaluation")
        from rich import box, console, table

        shown = table.Table(*self.header, box=box.MARKDOWN)
        for line in self.lines:
            shown.add_row(*line)
        widths = [max(map(len, column)) + 3 for column in zip(self.header, *self.lines, strict=True)]
        text = io.StringIO()
        console.Console(file=text, width=sum(widths) + 1, markup=False, highlight=False).print(shown)
        return f"## {self.title}\n\n{text.getvalue().strip()}\n"


def show_length(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def recall_table(lines: Sequence[Line], title: str) -> Table:
    """The needles found, in percent, with the interval; controls found; and how the models were trained."""
    sums = summary(lines)
    lengths = sorted({length for recalls in sums.values() for length, _ in recalls})
    shown = []
    for row, recalls in sums.items():
        budget = ("" if has_learnt(recalls) else "not learnt: ") + _training([x for x in lines if tested(x) == row])
        for readings in sorted({readings for _, readings in recalls}):
            mine = {length: recall for (length, count), recall in recalls.items() if count == readings}
            cells = [_share(mine[length]) if length in mine else "-" for length in lengths]
            controls = f"{sum(x.controls_found for x in mine.values())} of {sum(x.needles for x in mine.values())}"
            seeds = len({seed for recall in mine.values() for seed in recall.seeds})
            shown.append([row.row, _or_dash(row.num_keys), str(readings), str(seeds), *cells, controls, budget])
    header = ["model", "n", "readings", "seeds", *map(show_length, lengths), "controls found", "training"]
    return Table(f"{title}: needles found, % [95 % interval] of needles", header, shown)


def _training(lines: Sequence[Line]) -> str:
    """The budget of one seed's training and what it ended with, the means over seeds."""
    names = ("bytes", "cpu_seconds", "digits_right", "gate")
    size, seconds, right, gate = (sum(line[f"training_{name}"] for line in lines) / len(lines) for name in names)
    gates = f", gate {gate:.2f}" if lines[0]["num_keys"] is not None else ""
    return f"{size / 1000:.0f} KB, {seconds:.0f} CPU s, digits right {right:.2f}{gates}"


def _share(recall: Recall) -> str:
    low, high = recall.interval
    return f"{100 * recall.share:.0f} [{100 * low:.0f}, {100 * high:.0f}] of {recall.needles}"


def _or_dash(x: object) -> str:
    return "-" if x is None else str(x)


def cost_table(lines: Sequence[Line]) -> Table:
    """What reading a context once takes: seconds, and bytes that are kept of it."""
    sums = summary(lines)
    lengths = sorted({length for recalls in sums.values() for length, _ in recalls})
    shown = []
    for row, recalls in sums.items():
        first = {length: recalls.get((length, 1)) for length in lengths}
        cells = [f"{x.seconds:.2f} s, {x.state_bytes / 2**20:.3g} MiB" if x else "-" for x in first.values()]
        shown.append([row.row, _or_dash(row.num_keys), *cells])
    header = ["model", "n", *map(show_length, lengths)]
    return Table("Reading a context once: seconds, and bytes kept of it", header, shown)


def _error(error: float | None) -> str:
    """A standard error; what older files had for none was infinite."""
    return "?" if error is None or math.isinf(error) else f"{error:.4f}"


def perplexity_table(lines: Sequence[Line]) -> Table:
    """Bits per byte by position, then the gain of writing the memory, with its standard error over documents."""
    buckets = sorted({(line["low"], line["high"]) for line in lines})
    cells: dict[tuple[str, int, str], dict[tuple[int, int], str]] = {}
    for line in sorted(lines, key=lambda line: "gain" in line):
        if "gain" in line:
            what, cell = f"gain over {line['over']}", f"{line['gain']:.4f} ± {_error(line['error'])}"
        else:
            what, cell = line["treatment"], f"{line['bits']:.4f}"
        cells.setdefault((line["row"], line["seed"], what), {})[line["low"], line["high"]] = cell
    order = list(dict.fromkeys((line["row"], line["seed"]) for line in lines))
    shown = [
        [row, str(seed), what, *(mine.get(bucket, "-") for bucket in buckets)]
        for (row, seed, what), mine in sorted(cells.items(), key=lambda item: order.index(item[0][:2]))
    ]
    names = [f"{show_length(low)} to {show_length(high)}" for low, high in buckets]
    return Table("Bits per byte by position in the text", ["model", "seed", "memory", *names], shown)


def mqar_table(lines: Sequence[Line]) -> Table:
    """Values recalled, in percent, by pairs and length; then, over all cells, what was not to be recalled."""
    last = {(x["model"], x["seed"], x["length"], x["pairs"], x["overwrite"]): x for x in lines}.values()
    columns = sorted({(line["length"], line["pairs"]) for line in last})
    shown = []
    for model, overwrite in dict.fromkeys((line["model"], line["overwrite"]) for line in last):
        mine = [line for line in last if (line["model"], line["overwrite"]) == (model, overwrite)]
        cells = []
        for column in columns:
            same = [line for line in mine if (line["length"], line["pairs"]) == column]
            asked = sum(line["asked"] for line in same)
            cells.append(f"{100 * sum(line['right'] for line in same) / asked:.1f}" if asked else "-")
        seeds = len({line["seed"] for line in mine})
        others = [
            f"{100 * sum(line[part] for line in mine) / total:.1f}"
            if (total := sum(line[of] for line in mine))
            else "-"
            for part, of in (("stale", "overwritten"), ("controls_right", "controls"))
        ]
        training = sum(line["training_right"] for line in mine) / len(mine)
        budget = f"{mine[0]['training_steps']} steps, {mine[0]['training_cpu_seconds']:.0f} s of CPU"
        others += [
            f"{100 * mine[0]['chance']:.1f}",
            f"{100 * training:.0f}, {budget}" if training >= 0.5 else f"not learnt in {budget}",
        ]
        shown.append([model, "yes" if overwrite else "no", str(seeds), *cells, *others])
    names = [f"{pairs} in {show_length(length)}" for length, pairs in columns]
    title = "Associative recall: values recalled, %, by pairs and length"
    header = ["model", "overwritten", "seeds", *names, "older value", "controls right", "chance", "right in training"]
    return Table(title, header, shown)
