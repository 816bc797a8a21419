"""Needles that a trained model finds: ``python -m benchmarks.evaluation.needles runs/swa+fwpkm-0``.

A context of held-out text with needles that are evenly deep is read one or several times, and then asked for each
needle. A question is asked of a copy of what was read, so that no question sees another, and its answer counts only if
every digit is right by greedy decoding. The model is given the right digits in one call: its likeliest predictions are
all right exactly if greedy decoding finds all six digits. Controls, asked for beside them, are needles that are
nowhere in the context: what is found of these is chance.
"""

import argparse
import copy
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.evaluation.models import memories_of, new_cache
from benchmarks.evaluation.records import append_lines, latest, measured
from benchmarks.evaluation.text import DIGITS, NEEDLE_LENGTH, Corpus, Needle, context, draw_needles
from benchmarks.evaluation.under_test import about, clock, load_trained, read, state_bytes
from benchmarks.files import read_lines
from fwpkm_kernels._commands import CommandError, check_outputs, command, need


class Cell(NamedTuple):
    """How a length is tested."""

    length: int
    contexts: int
    needles: int  #: in each context
    readings: tuple[int, ...]


class Found(NamedTuple):
    """What was found in contexts of one length, after this number of readings."""

    length: int
    readings: int
    found: int
    needles: int
    digits: int  #: right predictions of digits, given the digits before
    controls_found: int
    control_digits: int
    by_depth: list[int]  #: found in each of the equal parts of the contexts, from their beginning
    seconds: float  #: of this many readings of all contexts, without the questions
    state_bytes: int  #: what the model keeps of a context after these readings


@torch.no_grad()
def answer(model: Any, needle: Needle, cache: Any) -> int:
    """How many digits of a needle's code a copy of the cache predicts."""
    question = torch.tensor(list(needle.question + needle.code.encode()), device=model.device)
    logits = model(question[None, :-1], cache=copy.deepcopy(cache), use_cache=True, logits_to_keep=DIGITS).logits
    return int((logits[0].argmax(-1) == question[-DIGITS:]).sum())


def measure(
    model: Any, corpus: Corpus, cell: Cell, seed: int, progress: Callable[[int], object] = lambda count: None
) -> Iterator[Found]:
    """What a model finds in contexts of one length, for each number of readings."""
    rng = random.Random(f"{seed} {cell.length}")
    # For each number of readings the count of right digits, of needles and of controls, [2, contexts, needles].
    digits = {x: torch.zeros(2, cell.contexts, cell.needles, dtype=torch.int64) for x in cell.readings}
    seconds, kept = dict.fromkeys(cell.readings, 0.0), dict.fromkeys(cell.readings, 0)
    for number in range(cell.contexts):
        needles = draw_needles(rng, 2 * cell.needles, is_test=True)
        hidden, controls = needles[: cell.needles], needles[cell.needles :]
        data = torch.tensor(list(context(corpus.stream(rng), cell.length, hidden, rng)), device=model.device)
        cache, spent = new_cache(model), 0.0
        for reading in range(1, max(cell.readings) + 1):
            started = clock(model)
            read(model, data, cache, progress)
            spent += clock(model) - started
            if reading in cell.readings:
                seconds[reading] += spent
                kept[reading] = state_bytes(cache)
                right = [[answer(model, needle, cache) for needle in asked] for asked in (hidden, controls)]
                digits[reading][:, number] = torch.tensor(right)
    for readings, right in digits.items():
        is_found = right == DIGITS
        yield Found(
            cell.length,
            readings,
            found=int(is_found[0].sum()),
            needles=cell.contexts * cell.needles,
            digits=int(right[0].sum()),
            controls_found=int(is_found[1].sum()),
            control_digits=int(right[1].sum()),
            by_depth=is_found[0].sum(0).tolist(),
            seconds=round(seconds[readings], 3),
            state_bytes=kept[readings],
        )


CELLS = "4096:20x5,8192:10x10,32768:5x20,131072:2x20"


def parse_cells(text: str, readings: tuple[int, ...]) -> list[Cell]:
    """Cells from LENGTH:CONTEXTSxNEEDLES[:READINGS] with commas between; READINGS are numbers like 1/2."""
    cells = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+):(\d+)x(\d+)(?::(\d+(?:/\d+)*))?", part.strip())
        numbers = [int(x) for x in found.groups()[:3]] if found else [0]
        own = tuple(int(x) for x in found[4].split("/")) if found and found[4] else readings
        if 0 in (*numbers, *own):
            raise CommandError(f"a cell must be LENGTH:CONTEXTSxNEEDLES[:READINGS], all positive, got {part!r}")
        length, contexts, needles = numbers
        if length < needles * NEEDLE_LENGTH:
            raise CommandError(f"{needles} needles of {NEEDLE_LENGTH} bytes do not fit into {length}, got {part!r}")
        cells.append(Cell(length, contexts, needles, own))
    return cells


@command("needles")
def main(argv: Sequence[str] | None = None) -> int:
    """Measure the cells that the file of results lacks; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation.needles", description="Ask for needles.")
    parser.add_argument("folder", type=Path, help="of a training run")
    parser.add_argument("--out", required=True, help="file of JSON lines to append to; cells that it has are kept")
    parser.add_argument("--cells", default=CELLS, help=f"LENGTH:CONTEXTSxNEEDLES[:READINGS],...; {CELLS} if not given")
    parser.add_argument("--readings", default="1,2,4", help="of cells that do not say; 1,2,4 if not given")
    parser.add_argument("--num-keys", type=int, help="ask over fresh memories with so many sub-keys")
    parser.add_argument("--seed", type=int, help="of contexts and needles; the training's if not given")
    parser.add_argument("--text", nargs="+", type=Path, metavar="FILE", help="that the model was trained on")
    parser.add_argument("--row", help="name in the tables; the model's if not given")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(argv)
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", given.readings):
        raise CommandError(f"--readings must be positive numbers with commas between, got {given.readings!r}")
    cells = parse_cells(given.cells, tuple(int(x) for x in given.readings.split(",")))
    check_outputs(given.out)
    tqdm = need("tqdm", "evaluation").tqdm
    model, options, state, corpus = load_trained(given.folder, given.device, given.text, given.num_keys)
    memories = memories_of(model)
    test_seed = options.seed if given.seed is None else given.seed
    line = about(options, state, corpus, given.device, given.row)
    line |= {"num_keys": memories[0].num_keys if memories else None, "test_seed": test_seed}
    known = set(map(measured, latest(read_lines(given.out)))) if Path(given.out).is_file() else set()
    for cell in cells:
        line |= {"length": cell.length, "contexts": cell.contexts, "needles": cell.contexts * cell.needles}
        if known.issuperset(measured({**line, "readings": readings}) for readings in cell.readings):
            continue
        total = cell.length * cell.contexts * max(cell.readings)
        with tqdm(total=total, desc=f"{line['row']} {cell.length}", unit="B", unit_scale=True) as bar:
            found = measure(model, corpus, cell, test_seed, bar.update)
            append_lines(given.out, ({**line, **one._asdict()} for one in found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
