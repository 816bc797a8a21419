"""How rounding errors grow over many chunks, and what a narrow table loses: python -m benchmarks.errors [--out DIR].

Three experiments, each against the same in float64:

- growth: one sequence through tables of each dtype, with every step. Each memory finds its own addresses, where near
  ties may fall the other way; then again with the addresses of the float64 memory, which leaves the rounding alone.
- learning: the same pairs written again and again, with several step sizes. A step below half of the distance between
  two neighbours of a narrow table is lost.
- overshoot: the loss on a token after writing it, where weights are peaked, with every step.

Everything runs on a CPU in about a minute; the tables go to the terminal, numbers and a plot to --out.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from fwpkm_kernels import chunk_value_update_, fast_weight_memory, product_key_lookup, sparse_value_gather
from fwpkm_kernels._commands import CommandError, command, make_folder, need, try_all, write_output
from fwpkm_kernels.options import STEPS

from .files import markdown_table, save_figure

TABLES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LEARNING_RATES = (1.0, 0.3, 0.1, 0.03, 0.01)
PASSES = (1, 4, 16, 64, 256, 1024)
#: The table of growth has medians over the chunks between these.
EDGES = (1, 8, 32, 64, 128)
TEMPERATURES = (1.0, 0.3, 0.1, 0.03, 0.01)


class Sizes(NamedTuple):
    """A small memory of the paper's proportions: 512 tokens there read 8 of 262 144 slots each."""

    batch: int = 2
    chunk: int = 64
    top_k: int = 8
    num_keys: int = 64
    key_width: int = 64
    width: int = 64


class Memory(NamedTuple):
    """The initial memory, in numbers that every dtype of the table holds exactly."""

    keys: Tensor  # [1, 2, n, Dk/2], float32
    values: Tensor  # [N, D], float32, rounded to 7 bits


def make_memory(sizes: Sizes, generator: torch.Generator, device: str) -> Memory:
    keys = torch.randn(1, 2, sizes.num_keys, sizes.key_width // 2, generator=generator)
    values = 0.02 * torch.randn(sizes.num_keys**2, sizes.width, generator=generator)
    return Memory(keys.to(device), values.bfloat16().to(torch.float32).half().float().bfloat16().float().to(device))


def make_chunks(count: int, sizes: Sizes, generator: torch.Generator, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Queries [B, C, 1, Dk] near 512 centres, of frequencies like words', and targets [B, C, D] that go with them."""
    centres = torch.randn(512, sizes.key_width, generator=generator)
    answers = torch.randn(512, sizes.width, generator=generator)
    for _ in range(count):
        shape = (sizes.batch, sizes.chunk)
        word = (512 ** torch.rand(shape, generator=generator)).long() - 1  # log-uniform: a density of 1/rank
        queries = centres[word] + 0.3 * torch.randn(*shape, sizes.key_width, generator=generator)
        targets = answers[word] + 0.3 * torch.randn(*shape, sizes.width, generator=generator)
        yield queries.unsqueeze(2).to(device), targets.to(device)


def distance(actual: Tensor, exact: Tensor) -> float:
    """|actual - exact| / |exact|."""
    return float((actual.double() - exact).norm() / exact.norm())


def differ(slots: Tensor, exact: Tensor) -> float:
    """The share of picks that the exact memory did not make for the same token, in whatever order."""
    return float(1.0 - (slots.unsqueeze(-1) == exact.unsqueeze(-2)).any(-1).double().mean())


def growth(count: int, step: str, sizes: Sizes, seed: int, device: str) -> Iterator[dict[str, Any]]:
    """For each chunk and dtype of the table, the errors of output, keys and values, and the share of other slots."""
    generator = torch.Generator().manual_seed(seed)
    start = make_memory(sizes, generator, device)
    options: dict[str, Any] = {"chunk_size": sizes.chunk, "top_k": sizes.top_k, "boundary": "drop", "step": step}
    exact_keys, exact_values = (x.double() for x in start)
    own = {name: (start.keys, start.values.to(dtype)) for name, dtype in TABLES.items()}
    given = {name: start.values.to(dtype) for name, dtype in TABLES.items()}
    chunks = tqdm(make_chunks(count, sizes, generator, device), f"growth, {step}", count, leave=False)
    for number, (queries, targets) in enumerate(chunks):
        with torch.no_grad():
            exact = fast_weight_memory(queries.double(), targets.double(), exact_keys, exact_values, **options)
            slots, weights = exact.slots.flatten(0, 1), exact.weights.flatten(0, 1)
            for name in TABLES:
                keys, values = own[name]
                found = fast_weight_memory(queries, targets, keys, values, **options)
                own[name] = (found.keys, found.values)
                table, output = given[name], write_given(given[name], slots, weights, targets, step)
                yield {
                    "experiment": "growth",
                    "step": step,
                    "table": name,
                    "chunk": number + 1,
                    "output": distance(found.output, exact.output),
                    "keys": distance(found.keys, exact.keys),
                    "values": distance(found.values, exact.values),
                    "other slots": differ(found.slots, exact.slots),
                    "output, same slots": distance(output, exact.output.flatten(0, 1)),
                    "values, same slots": distance(table, exact.values),
                }
        exact_keys, exact_values = exact.keys, exact.values


def write_given(table: Tensor, slots: Tensor, weights: Tensor, targets: Tensor, step: str) -> Tensor:
    """Read a chunk's tokens and write it in place, as the memory does, with given slots and weights [B·C, J]."""
    batch, length = targets.shape[:2]
    weights = weights.float()
    output = sparse_value_gather(table.float(), slots, weights)
    pairs = (torch.arange(batch * length, device=table.device) % length) < length - 1
    after = targets.roll(-1, 1).flatten(0, 1)
    scale = torch.ones(len(slots), device=table.device)
    if step == "paper":
        scale = scale * slots.shape[1]
    elif step == "normalized":
        scale = scale / weights.square().sum(1)
    arguments = (table, slots[pairs], weights[pairs], after[pairs], output[pairs])
    chunk_value_update_(*arguments, scale=scale[pairs] * length / (length - 1), count_slots=slots)
    return output


def learning(sizes: Sizes, seed: int, device: str) -> Iterator[dict[str, Any]]:
    """256 random pairs, written pass by pass: the relative error of reading them, after several numbers of passes."""
    generator = torch.Generator().manual_seed(seed)
    keys, _ = make_memory(sizes, generator, device)
    queries = torch.randn(256, 1, sizes.key_width, generator=generator).to(device)
    targets = torch.randn(256, sizes.width, generator=generator).to(device)
    scores, slots = (x.flatten(1) for x in product_key_lookup(queries, keys, sizes.top_k))
    weights = scores.softmax(-1)
    scale = 1.0 / weights.square().sum(1)
    for lr in tqdm(LEARNING_RATES, "learning", leave=False):
        for name, dtype in ({"float64": torch.float64} | TABLES).items():
            table = torch.zeros(sizes.num_keys**2, sizes.width, dtype=dtype, device=device)
            w, y, a = (x.to(torch.promote_types(dtype, torch.float32)) for x in (weights, targets, scale))
            moved = math.nan
            for number in range(1, PASSES[-1] + 1):
                before = table.clone() if number in PASSES else None
                predictions = sparse_value_gather(table.to(w.dtype), slots, w)
                chunk_value_update_(table, slots, w, y, predictions, lr=lr, scale=a)
                if before is not None:
                    read = sparse_value_gather(table.to(w.dtype), slots, w)
                    moved = float((table != before)[slots.unique()].double().mean())
                    yield {
                        "experiment": "learning",
                        "lr": lr,
                        "table": name,
                        "passes": number,
                        "error": distance(read, targets.double()),
                        "moved": moved,
                    }


def overshoot(sizes: Sizes, seed: int, device: str) -> Iterator[dict[str, Any]]:
    """A chunk written once and ten times, with softmax weights of several temperatures: the loss on its own tokens."""
    generator = torch.Generator().manual_seed(seed)
    start = make_memory(sizes, generator, device)
    for temperature in TEMPERATURES:
        for tokens in (1, sizes.chunk):
            queries = torch.randn(1, tokens, 1, sizes.key_width, generator=generator).to(device)
            targets = torch.randn(1, tokens, sizes.width, generator=generator).to(device)
            options: dict[str, Any] = {"chunk_size": tokens, "top_k": sizes.top_k, "temperature": temperature}
            options |= {"lookahead": 0, "addressing_weight": 0.0}
            for step in STEPS:
                keys, values, losses = *start, []
                for _ in range(11):
                    found = fast_weight_memory(queries, targets, keys, values, **options, step=step)
                    values = found.values
                    losses.append(float((found.output - targets).square().mean()))
                yield {
                    "experiment": "overshoot",
                    "temperature": temperature,
                    "tokens": tokens,
                    "step": step,
                    "J·Σw²": float(sizes.top_k * found.weights.square().sum(-1).mean()),
                    "before": losses[0],
                    "after 1": losses[1],
                    "after 10": losses[10],
                }


def report(rows: list[dict[str, Any]]) -> str:
    """The three tables, in Markdown; of growth medians over ranges of chunks, and the worst output in each."""

    def of(experiment: str, **labels: Any) -> list[dict[str, Any]]:
        return [row for row in rows if row["experiment"] == experiment and labels.items() <= row.items()]

    columns = ["output", "keys", "values", "output, same slots", "values, same slots"]
    last = max(row["chunk"] for row in of("growth"))
    growths = []
    for step, name in itertools.product(STEPS, TABLES):
        for first, end in itertools.pairwise([0, *(edge for edge in EDGES if edge < last), last]):
            found = [row for row in of("growth", step=step, table=name) if first < row["chunk"] <= end]
            numbers = [statistics.median(row[column] for row in found) for column in columns]
            numbers += [max(row["output"] for row in found), statistics.mean(row["other slots"] for row in found)]
            growths.append([step, name, f"{first + 1}-{end}", *map(_number, numbers)])
    learned = []
    for lr, name in itertools.product(LEARNING_RATES, ("float64", *TABLES)):
        found = of("learning", lr=lr, table=name)
        learned.append([lr, name, *(_number(row["error"]) for row in found), f"{found[-1]['moved']:.1%}"])
    shot, losses = [], ["J·Σw²", "before", "after 1", "after 10"]
    for row in sorted(of("overshoot"), key=lambda row: (row["tokens"], -row["temperature"])):
        shot.append([row["tokens"], row["temperature"], row["step"], *(_number(row[column]) for column in losses)])
    tables = [
        markdown_table(["step", "table", "chunks", *columns, "worst output", "other slots"], growths, texts=3),
        markdown_table(["lr", "table", *(f"{n} passes" for n in PASSES), "still moving"], learned, texts=2),
        markdown_table(["tokens", "temperature", "step", *losses], shot, texts=3),
    ]
    return "\n\n".join(tables)


def _number(value: float) -> str:
    return f"{value:.2g}"


def plot(rows: list[dict[str, Any]]) -> Any:
    """A figure of errors over the chunks, a row of panels for each step; dashed with the float64 memory's addresses."""
    from matplotlib.figure import Figure

    figure = Figure((15, 3.25 * len(STEPS)), layout="constrained")
    panels = figure.subplots(len(STEPS), 4, sharex=True, sharey="col")
    for step, line in zip(STEPS, panels, strict=True):
        line[0].set_ylabel("relative error against float64")
        for axes, name in zip(line, ("output", "keys", "values", "other slots"), strict=True):
            for number, table in enumerate(TABLES):
                found = [r for r in rows if (r["experiment"], r.get("step"), r.get("table")) == ("growth", step, table)]
                chunks, color = [row["chunk"] for row in found], f"C{number}"
                axes.plot(chunks, [row[name] for row in found], color=color, lw=1, label=table)
                if f"{name}, same slots" in found[0]:
                    same = [row[f"{name}, same slots"] for row in found]
                    axes.plot(chunks, same, "--", color=color, lw=1, label=f"{table}, float64's slots")
            axes.set_yscale("log" if name != "other slots" else "linear")
            axes.set_title(f"{name}, step {step!r}", fontsize=10)
            axes.grid(alpha=0.3)
    panels[0][0].legend(fontsize=7)
    for axes in panels[-1]:
        axes.set_xlabel("chunks written")
    return figure


@command("errors")
def main() -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=256, help="how many chunks the sequence has (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="where everything runs (%(default)s)")
    parser.add_argument("--out", type=Path, help="a folder for errors_DEVICE.png and errors_DEVICE.jsonl")
    arguments = parser.parse_args()
    try:
        name = f"errors_{torch.empty(1, device=arguments.device).device.type}"
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch that was built without CUDA
        raise CommandError(f"cannot use the device {arguments.device}: {str(error).splitlines()[0]}") from None
    out = arguments.out
    if out is not None:
        make_folder(out, f"{name}.jsonl", f"{name}.png")
        need("matplotlib.backends.backend_agg", "bench")
    sizes, place = Sizes(), (arguments.seed, arguments.device)
    rows = [row for step in STEPS for row in growth(arguments.chunks, step, sizes, *place)]
    rows += [*learning(sizes, *place), *overshoot(sizes, *place)]
    print(report(rows))
    if out is not None:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        picture = out / f"{name}.png"
        try_all([lambda: write_output(out / f"{name}.jsonl", lines), lambda: save_figure(plot(rows), picture)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
