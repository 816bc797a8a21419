"""Needles that a trained model finds: ``python -m benchmarks.evaluation.needles runs/swa+fwpkm-0``.

A context of held-out text with needles that are evenly deep is read one or several times, and then asked for each
needle. A question is asked of a copy of what was read, so that no question sees another, and its answer counts only if
every digit is right by greedy decoding. The model is given the right digits as it goes: the largest of its predictions
are right for all six exactly if greedy decoding finds them. Controls, asked for beside them, are needles that are
nowhere in the context: what is found of these is chance.
"""

import copy
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from benchmarks.evaluation.models import new_cache
from benchmarks.evaluation.text import DIGITS, Corpus, Needle, context, draw_needles

PIECE = 512  #: bytes of a call while a context is read


class Cell(NamedTuple):
    """How a length is tested."""

    length: int
    contexts: int
    needles: int  #: in each context
    readings: tuple[int, ...]


class Found(NamedTuple):
    """What was found of the needles of one length, after so many readings."""

    length: int
    readings: int
    found: int
    needles: int
    digits: int  #: right, of all digits, where the model is given those before
    controls_found: int
    by_depth: list[int]  #: found of each of the equal parts of the contexts, from their beginning
    seconds: float  #: of reading the contexts so often, once for all questions
    state_bytes: int  #: what the model keeps of a context that was read so often


@torch.no_grad()
def read(model: Any, data: torch.Tensor, cache: Any, progress: Callable[[int], object] = lambda count: None) -> None:
    """Read bytes [T] into a cache."""
    for piece in data.split(PIECE):
        model(piece.unsqueeze(0), cache=cache, use_cache=True, logits_to_keep=1)
        progress(len(piece))


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
    names = ("found", "digits", "controls", "seconds", "bytes")
    tallies = {readings: dict.fromkeys(names, 0.0) for readings in cell.readings}
    by_depth = {readings: [0] * cell.needles for readings in cell.readings}
    for _ in range(cell.contexts):
        needles = draw_needles(rng, 2 * cell.needles, is_test=True)
        hidden, controls = needles[: cell.needles], needles[cell.needles :]
        data = torch.tensor(list(context(corpus.stream(rng), cell.length, hidden, rng)), device=model.device)
        cache, seconds = new_cache(model), 0.0
        for reading in range(1, max(cell.readings) + 1):
            started = time.perf_counter()
            read(model, data, cache, progress)
            seconds += time.perf_counter() - started
            if reading not in cell.readings:
                continue
            tally = tallies[reading]
            tally["seconds"] += seconds
            tally["bytes"] = state_bytes(cache)
            for depth, (needle, control) in enumerate(zip(hidden, controls, strict=True)):
                right = answer(model, needle, cache)
                tally["digits"] += right
                tally["found"] += right == DIGITS
                by_depth[reading][depth] += right == DIGITS
                tally["controls"] += answer(model, control, cache) == DIGITS
    for readings, tally in tallies.items():
        yield Found(
            cell.length,
            readings,
            int(tally["found"]),
            cell.contexts * cell.needles,
            int(tally["digits"]),
            int(tally["controls"]),
            by_depth[readings],
            round(tally["seconds"], 3),
            int(tally["bytes"]),
        )


def state_bytes(cache: Any) -> int:
    """Bytes of the tensors in a cache, those of memories with their tables.

    A view counts for what it shows, as attention's window is one of all that a piece has brought; several of one
    storage count for no more than it has.
    """
    views: dict[tuple[int, int], dict[tuple[Any, ...], int]] = {}

    def visit(x: Any) -> None:
        if isinstance(x, torch.Tensor):
            storage = x.untyped_storage()
            views.setdefault((storage.data_ptr(), storage.nbytes()), {})[x.data_ptr(), x.shape] = x.nbytes
        elif isinstance(x, dict):
            for y in x.values():
                visit(y)
        elif isinstance(x, (list, tuple)):
            for y in x:
                visit(y)

    for layer in cache.layers:
        visit(vars(layer))
        for session in getattr(getattr(layer, "memory", None), "sessions", ()):
            visit([*session.state.named_tensors().values(), session.window])
    return sum(min(size, sum(shown.values())) for (_, size), shown in views.items())
