"""Lines of results: what each says of its origin, how lines are read back, added up, and shown as tables."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from fwpkm_kernels import env_report
from fwpkm_kernels._commands import Lines

#: A model has learnt the task if it finds this share of the needles at its shortest length, after any number of
#: readings. What other models find at greater lengths says nothing about length.
LEARNT = 0.1

Line = dict[str, Any]


def stamp(options: Any = None, device: str = "cpu") -> Line:
    """The origin that every line names: options (a dataclass, or None), commit, versions, device and threads."""
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
    """Append each as it comes. If a killed program has left an unfinished line, that line is ended first.

    Raises:
        ValueError: a number is not finite, for which JSON has no name.
    """
    before = b""
    with contextlib.suppress(OSError):
        before = Path(path).read_bytes()
    with Lines(path, append=True) as file:
        if before and not before.endswith(b"\n"):
            file.write("")
        for line in lines:
            file.write(json.dumps(line, allow_nan=False))


def wilson(found: int, needles: int) -> tuple[float, float]:
    """The 95 % interval of a share of `found` among `needles`, by Wilson's score."""
    if needles == 0:
        return 0.0, 1.0
    z, share = 1.959964, found / needles
    middle = (share + z * z / (2 * needles)) / (1 + z * z / needles)
    half = z / (1 + z * z / needles) * math.sqrt(share * (1 - share) / needles + z * z / (4 * needles**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_saved(documents: Iterable[tuple[float, int]]) -> tuple[float, float | None]:
    """The bits saved per byte, from each document's saved bits and bytes, and the standard error over documents.

    Documents count by their bytes. The error is that of a ratio of sums over documents; None for a single document,
    which says nothing about others.
    """
    saved, sizes = zip(*documents, strict=True)
    total, count = sum(sizes), len(sizes)
    mean = sum(saved) / total
    squares = sum((bits - mean * size) ** 2 for bits, size in zip(saved, sizes, strict=True))
    return mean, math.sqrt(squares * count / (count - 1)) / total if count > 1 else None


class Tested(NamedTuple):
    """A row of the tables: models that differ only in their seeds, and are tested with memories of one size."""

    row: str
    num_keys: int | None  #: of the memory tested; None without one
    text: str | None  #: its fingerprint
    options: str  #: JSON, without the seed


def tested(line: Line) -> Tested:
    options = {name: x for name, x in line.get("options", {}).items() if name != "seed"}
    row = line.get("row", line.get("model"))
    return Tested(row, line.get("num_keys"), line.get("text"), json.dumps(options, sort_keys=True))


def names_of(rows: Iterable[Tested]) -> dict[Tested, str]:
    """The names in tables and plots: rows of one name are told apart by the options that differ."""
    alike: dict[str, dict[Tested, Line]] = {}
    for row in rows:
        alike.setdefault(row.row, {})[row] = {**json.loads(row.options), "text": row.text}
    names = {}
    for name, facts in alike.items():
        every = dict.fromkeys(key for mine in facts.values() for key in mine)
        differing = [key for key in every if len({json.dumps(mine.get(key)) for mine in facts.values()}) > 1]
        for row, mine in facts.items():
            told = ", ".join(f"{key} {mine.get(key)}" for key in differing)
            names[row] = f"{name} ({told})" if told else name
    return names


#: The fields by which the cells of one model differ.
CELL = ("test_seed", "length", "readings", "treatment", "over", "low", "high", "pairs", "overwrite")
#: What else a result depends on: a cell whose line has another of these is measured again.
SOURCE = ("training_id", "contexts", "needles", "orders")


def cell_key(line: Line) -> tuple[Any, ...]:
    """The place of a line in the tables, which a later line takes over. Fields that older lines lack are None."""
    return (*tested(line), line["seed"], *map(line.get, CELL))


def measured(line: Line) -> tuple[Any, ...]:
    """All that a result depends on: a cell whose line has the same is not measured again."""
    return (*cell_key(line), *map(line.get, SOURCE))


def latest(lines: Iterable[Line]) -> list[Line]:
    """The last line of each cell.

    Lines of a training are left out if the model has been trained anew since. Lines of perplexity are left out if their
    number of orders is not the last one's, since lines that are compared must be of one text.
    """
    lines = list(lines)

    def model(line: Line) -> tuple[Any, ...]:
        return (*tested(line), line["seed"])

    def origin(line: Line) -> tuple[Any, ...]:
        return line.get("training_id"), line.get("orders"), line.get("test_seed") if "orders" in line else None

    last = {model(line): origin(line) for line in lines}
    return list({cell_key(line): line for line in lines if origin(line) == last[model(line)]}.values())


class Recall(NamedTuple):
    """What the models of one `Tested` found at one length, after this number of readings, over all seeds."""

    shares: dict[int, float]  #: found with each seed
    found: int
    needles: int
    digits: int
    controls_found: int
    seconds: float  #: of this many readings of a context, the mean
    state_bytes: int

    @property
    def share(self) -> float:
        return self.found / self.needles

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.found, self.needles)


def summary(lines: Sequence[Line]) -> dict[Tested, dict[tuple[int, int], Recall]]:
    """The sums over seeds for each row of the tables, by length and readings."""
    cells: dict[tuple[Any, ...], list[Line]] = {}
    for line in lines:
        cells.setdefault((tested(line), line["length"], line["readings"]), []).append(line)
    sums: dict[Tested, dict[tuple[int, int], Recall]] = {}
    for (row, length, readings), same in cells.items():
        counts: dict[int, list[int]] = {}
        for line in sorted(same, key=lambda line: line["seed"]):
            found, needles = counts.setdefault(line["seed"], [0, 0])
            counts[line["seed"]] = [found + line["found"], needles + line["needles"]]
        sums.setdefault(row, {})[length, readings] = Recall(
            {seed: found / needles for seed, (found, needles) in counts.items()},
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
        """A heading and a table in Markdown, whose columns are padded so that it can be read as plain text."""
        widths = [max(3, *map(len, column)) for column in zip(self.header, *self.lines, strict=True)]
        rows = [self.header, ["-" * width for width in widths], *self.lines]
        shown = (" | ".join(map(str.ljust, row, widths)) for row in rows)
        return "\n".join([f"## {self.title}\n", *(f"| {row} |" for row in shown), ""])


def show_length(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def recall_table(lines: Sequence[Line], title: str) -> Table:
    """The needles found, in percent, with the interval; controls found; and how the models were trained."""
    sums = summary(lines)
    names = names_of(sums)
    lengths = sorted({length for recalls in sums.values() for length, _ in recalls})
    shown = []
    for row, recalls in sums.items():
        budget = ("" if has_learnt(recalls) else "not learnt: ") + _training([x for x in lines if tested(x) == row])
        for readings in sorted({readings for _, readings in recalls}):
            mine = {length: recall for (length, count), recall in recalls.items() if count == readings}
            cells = [_share(mine[length]) if length in mine else "-" for length in lengths]
            controls = f"{sum(x.controls_found for x in mine.values())} of {sum(x.needles for x in mine.values())}"
            seeds = len({seed for recall in mine.values() for seed in recall.shares})
            shown.append([names[row], _or_dash(row.num_keys), str(readings), str(seeds), *cells, controls, budget])
    header = ["model", "n", "readings", "seeds", *map(show_length, lengths), "controls found", "training"]
    title = f"{title}: needles found, % [95 % interval] of needles, worst to best of several seeds"
    return Table(title, header, shown)


def _mean(lines: Iterable[Line], name: str) -> float:
    """The mean over seeds of a field that says how a model was trained."""
    by_seed = {line["seed"]: line[name] for line in lines}
    return sum(by_seed.values()) / len(by_seed)


def _training(lines: Sequence[Line]) -> str:
    """The budget of one seed's training and what it ended with, the means over seeds."""
    names = ("bytes", "cpu_seconds", "digits_right", "gate")
    size, seconds, right, gate = (_mean(lines, f"training_{name}") for name in names)
    gates = f", gate {gate:.2f}" if lines[0]["num_keys"] is not None else ""
    return f"{size / 1000:.0f} KB, {seconds:.0f} CPU s, digits right {right:.2f}{gates}"


def _share(recall: Recall) -> str:
    low, high = recall.interval
    shown = f"{100 * recall.share:.0f} [{100 * low:.0f}, {100 * high:.0f}] of {recall.needles}"
    shares = recall.shares.values()
    return shown + (f", seeds {100 * min(shares):.0f} to {100 * max(shares):.0f}" if len(shares) > 1 else "")


def _or_dash(x: object) -> str:
    return "-" if x is None else str(x)


def cost_table(lines: Sequence[Line]) -> Table:
    """What reading a context once takes: seconds, and bytes that are kept of it."""
    sums = summary(lines)
    names = names_of(sums)
    lengths = sorted({length for recalls in sums.values() for length, _ in recalls})
    shown = []
    for row, recalls in sums.items():
        first = {length: recalls.get((length, 1)) for length in lengths}
        cells = [f"{x.seconds:.2f} s, {x.state_bytes / 2**20:.3g} MiB" if x else "-" for x in first.values()]
        shown.append([names[row], _or_dash(row.num_keys), *cells])
    header = ["model", "n", *map(show_length, lengths)]
    return Table("Reading a context once: seconds, and bytes kept of it", header, shown)


def _gain(bits: float, error: float | None) -> str:
    """Bits per byte with their standard error. Older files have an infinite error where there is none."""
    return f"{bits:.4f} ± {'?' if error is None or math.isinf(error) else f'{error:.4f}'}"


def show_bucket(bucket: tuple[int, int]) -> str:
    return " to ".join(map(show_length, bucket))


def perplexity_table(lines: Sequence[Line]) -> Table:
    """Bits per byte by position, then the gain of writing the memory, with its standard error over documents."""
    buckets = sorted({(line["low"], line["high"]) for line in lines})
    names = names_of(map(tested, lines))
    cells: dict[tuple[Tested, int, int], dict[str, dict[tuple[int, int], str]]] = {}
    for line in sorted(lines, key=lambda line: "gain" in line):
        if "gain" in line:
            what, cell = f"gain over {line['over']}", _gain(line["gain"], line["error"])
        else:
            what, cell = line["treatment"], f"{line['bits']:.4f}"
        mine = cells.setdefault((tested(line), line["seed"], line["orders"]), {})
        mine.setdefault(what, {})[line["low"], line["high"]] = cell
    shown = [
        [names[row], str(seed), str(orders), what, *(found.get(bucket, "-") for bucket in buckets)]
        for (row, seed, orders), mine in cells.items()
        for what, found in mine.items()
    ]
    header = ["model", "seed", "orders", "memory", *map(show_bucket, buckets)]
    return Table("Bits per byte by position in the text", header, shown)


#: Pairs of models: the first has what the second has, and one memory more.
PAIRS = (
    ("swa+fwpkm", "swa"),
    ("swa+pkm", "swa"),
    ("swa+fwpkm+pkm", "swa+fwpkm"),
    ("swa+fwpkm+pkm", "swa+pkm"),
    ("gdn+fwpkm", "gdn"),
)


def pairs_table(lines: Sequence[Line]) -> Table:
    """Bits per byte that a model saves of another's, each document paired with itself: of each seed, then of all."""
    lines = [line for line in lines if line["treatment"] == "on" and "bits" in line]
    buckets = sorted({(line["low"], line["high"]) for line in lines})
    names = names_of(map(tested, lines))
    by_text: dict[tuple[Any, ...], dict[Tested, Line]] = {}
    for line in lines:
        same = tuple(line[name] for name in ("seed", "test_seed", "orders", "text", "low", "high"))
        by_text.setdefault(same, {})[tested(line)] = line
    saved: dict[tuple[Tested, Tested], dict[int, dict[tuple[int, int], dict[str, tuple[float, int]]]]] = {}
    for (seed, *_, low, high), found in by_text.items():
        for one, other in ((x, y) for x in found for y in found if (x.row, y.row) in PAIRS):
            documents = saved.setdefault((one, other), {}).setdefault(seed, {})[low, high] = {}
            for name, (bits, size) in found[one]["by_document"].items():
                documents[name] = found[other]["by_document"][name][0] - bits, size
    shown = []
    for pair, seeds in sorted(saved.items(), key=lambda item: PAIRS.index((item[0][0].row, item[0][1].row))):
        several = [(", ".join(map(str, sorted(seeds))), [*seeds.values()])] if len(seeds) > 1 else []
        for label, parts in [*((str(seed), [seeds[seed]]) for seed in sorted(seeds)), *several]:
            cells = []
            for bucket in buckets:
                documents = {}
                for name, (bits, size) in (x for part in parts for x in part.get(bucket, {}).items()):
                    before = documents.get(name, (0.0, 0))
                    documents[name] = before[0] + bits, before[1] + size
                cells.append(_gain(*mean_saved(documents.values())) if documents else "-")
            shown.append([*(names[row] for row in pair), label, *cells])
    title = "Bits per byte that a model saves of another's, with the standard error over documents"
    return Table(title, ["model", "less than", "seed", *map(show_bucket, buckets)], shown)


def mqar_table(lines: Sequence[Line]) -> Table:
    """Values recalled, in percent, by pairs and length; then, over all cells, what was not to be recalled."""
    columns = sorted({(line["length"], line["pairs"]) for line in lines})
    shown = []
    for model, overwrite in dict.fromkeys((line["model"], line["overwrite"]) for line in lines):
        mine = [line for line in lines if (line["model"], line["overwrite"]) == (model, overwrite)]
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
        training = _mean(mine, "training_right")
        budget = f"{_mean(mine, 'training_steps'):.0f} steps, {_mean(mine, 'training_cpu_seconds'):.0f} s of CPU"
        others += [
            f"{100 * mine[0]['chance']:.1f}",
            f"{100 * training:.0f}, {budget}" if training >= 0.5 else f"not learnt in {budget}",
        ]
        shown.append([model, "yes" if overwrite else "no", str(seeds), *cells, *others])
    names = [f"{pairs} in {show_length(length)}" for length, pairs in columns]
    title = "Associative recall: values recalled, %, by pairs and length"
    header = ["model", "overwritten", "seeds", *names, "older value", "controls right", "chance", "right in training"]
    return Table(title, header, shown)
