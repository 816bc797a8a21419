"""Bits per byte of held-out text by position, with the memory as it is, off, and reset.

The held-out documents follow each other in a drawn order, and a model reads them as one stream. "on": the memory is
written throughout. "off": it is read and never written, lr = 0. "reset every 4K" and "reset each document": there it
begins anew, as training left it, so that it lacks only what is older. A document's bits are compared with its own bits
under another treatment of the memory, at the same place in the stream, so that documents need not be alike.
"""

import argparse
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.evaluation.models import memories_of, new_cache
from benchmarks.evaluation.records import Line, append_lines, latest, mean_saved, measured
from benchmarks.evaluation.text import Corpus
from benchmarks.evaluation.under_test import PIECE, about, clock, load_trained
from benchmarks.files import read_lines
from fwpkm_kernels._commands import CommandError, check_outputs, command, need
from fwpkm_kernels.integrations.cache import MemoryCacheLayer

EDGES = (0, 4096, 16384, 65536, 131072)
TREATMENTS = ("on", "off", "reset every 4K", "reset each document")


class Piece(NamedTuple):
    """A document's bytes between two edges of a stream."""

    document: str
    order: int
    low: int
    high: int
    bytes: int
    bits: float  #: the sum over its bytes


def reset_memories(cache: Any) -> None:
    """Let memories begin anew, and nothing else: queries go on from the last tokens that their convolution saw."""
    for layer in cache.layers:
        if not isinstance(layer, MemoryCacheLayer) or layer.memory is None:
            continue
        memory = layer.memory
        columns, window = memory.columns, memory.window
        memory.reset()
        memory.columns = columns  # the model refuses a memory that has read less than attention
        memory.window = window


@torch.no_grad()
def bits_of_stream(
    model: Any,
    data: torch.Tensor,
    treatment: str,
    starts: list[int],
    progress: Callable[[int], object] = lambda count: None,
) -> torch.Tensor:
    """Bits of each byte but the first of a stream [T] whose documents start at `starts`, [T - 1].

    Raises:
        ValueError: `treatment` is none of `TREATMENTS`.
    """
    if treatment not in TREATMENTS:
        raise ValueError(f"`treatment` must be one of {', '.join(TREATMENTS)}, got {treatment!r}")
    memories = memories_of(model)
    options = [memory.options for memory in memories]
    if treatment == "off":
        for memory in memories:
            memory.options = memory.options._replace(lr=0.0)
    resets = {"reset every 4K": range(0, len(data), 4096), "reset each document": starts}.get(treatment, ())
    borders = {at for at in resets if at < len(data) - 1}
    ends = sorted({*range(0, len(data) - 1, PIECE), *borders, len(data) - 1})
    cache, bits = new_cache(model), []
    try:
        for begin, end in pairwise(ends):
            if begin in borders:
                reset_memories(cache)
            logits = model(data[None, begin:end], cache=cache, use_cache=True).logits[0].float()
            bits.append(F.cross_entropy(logits, data[begin + 1 : end + 1], reduction="none") / math.log(2))
            progress(end - begin)
    finally:
        for memory, before in zip(memories, options, strict=True):
            memory.options = before
    return torch.cat(bits)


def measure(
    model: Any,
    corpus: Corpus,
    treatment: str,
    orders: int,
    seed: int,
    edges: tuple[int, ...] = EDGES,
    progress: Callable[[int], object] = lambda count: None,
) -> list[Piece]:
    """The bits of every held-out document, in several orders, cut where the buckets of position meet."""
    pieces = []
    for order in range(orders):
        documents = corpus.documents(random.Random(f"{seed} {order}"))
        starts, at = [], 0
        for _, document in documents:
            starts.append(at)
            at += len(document)
        stream = b"".join(document for _, document in documents)[: edges[-1] + 1]
        bits = bits_of_stream(model, torch.tensor(list(stream), device=model.device), treatment, starts, progress)
        bits = torch.cat((bits.new_zeros(1), bits)).double()
        for (name, document), start in zip(documents, starts, strict=True):
            for low, high in pairwise(edges):
                begin, end = max(start, low, 1), min(start + len(document), high, len(stream))
                if begin < end:  # the first byte of all, which is not predicted, is in no piece
                    pieces.append(Piece(name, order, low, high, end - begin, bits[begin:end].sum().item()))
    return pieces


def mean_bits(pieces: list[Piece], low: int) -> float:
    """Bits per byte of a bucket."""
    inside = [piece for piece in pieces if piece.low == low]
    return sum(piece.bits for piece in inside) / sum(piece.bytes for piece in inside)


def gain(with_memory: list[Piece], without: list[Piece], low: int) -> tuple[float, float | None]:
    """Bits per byte that a treatment saves in a bucket, and the standard error of that over documents.

    A document's pieces are taken together, whatever the orders; see `mean_saved`.
    """
    documents: dict[str, tuple[float, int]] = {}
    for on, off in zip(with_memory, without, strict=True):
        if on[:5] != off[:5]:
            raise ValueError("`with_memory` and `without` must be of the same pieces of text")
        if on.low == low:
            saved, size = documents.get(on.document, (0.0, 0))
            documents[on.document] = saved + off.bits - on.bits, size + on.bytes
    return mean_saved(documents.values())


def lines_of(pieces: dict[str, list[Piece]], seconds: dict[str, float]) -> Iterator[Line]:
    """Bits per byte of each treatment and bucket, and the gain of "on" over each other treatment.

    The seconds that a treatment took, of all buckets and orders, stand in each of its lines.
    """
    buckets = sorted({(piece.low, piece.high) for piece in pieces["on"]})
    for treatment, mine in pieces.items():
        for low, high in buckets:
            inside = [piece for piece in mine if piece.low == low]
            documents = {
                name: [round(sum(x.bits for x in inside if x.document == name), 3),
                       sum(x.bytes for x in inside if x.document == name)]
                for name in sorted({x.document for x in inside})
            }  # fmt: skip
            size = {"low": low, "high": high, "bytes": sum(x.bytes for x in inside), "documents": len(documents)}
            bits = {"bits": round(mean_bits(mine, low), 6), "by_document": documents, "seconds": seconds[treatment]}
            yield {"treatment": treatment, **size, **bits}
            if treatment != "on":
                saved, error = gain(pieces["on"], mine, low)
                error = error and round(error, 6)
                yield {"treatment": "on", "over": treatment, **size, "gain": round(saved, 6), "error": error}


@command("perplexity")
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, unless the file of results has it; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation.perplexity", description="Bits per byte.")
    parser.add_argument("folder", type=Path, help="of a training run")
    parser.add_argument("--out", required=True, help="file of JSON lines to append to; what it has is kept")
    parser.add_argument("--orders", type=int, default=3, help="in which the documents are read; 3 if not given")
    parser.add_argument("--treatments", default=",".join(TREATMENTS), help="of the memory; all if not given")
    parser.add_argument("--seed", type=int, help="of the orders; the training's if not given")
    parser.add_argument("--text", nargs="+", type=Path, metavar="FILE", help="that the model was trained on")
    parser.add_argument("--row", help="name in the tables; the model's if not given")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(argv)
    treatments = given.treatments.split(",")
    if treatments[0] != "on" or not set(treatments) <= set(TREATMENTS):
        raise CommandError(
            f'--treatments must begin with "on" and be of {", ".join(TREATMENTS)}, got {given.treatments!r}'
        )
    if given.orders < 1:
        raise CommandError(f"--orders must be at least 1, got {given.orders}")
    check_outputs(given.out)
    tqdm = need("tqdm", "evaluation").tqdm
    model, options, state, corpus = load_trained(given.folder, given.device, given.text)
    seed = options.seed if given.seed is None else given.seed
    memories = memories_of(model)
    line = about(options, state, corpus, given.device, given.row)
    line |= {"num_keys": memories[0].num_keys if memories else None, "test_seed": seed, "orders": given.orders}
    treatments = treatments if memories else ["on"]
    any_bucket = dict.fromkeys(("low", "high", "over"))
    known = latest(read_lines(given.out)) if Path(given.out).is_file() else []
    if {measured({**line, "treatment": x}) for x in treatments} <= {measured(x | any_bucket) for x in known}:
        return 0
    size = min(sum(map(len, corpus.held_out.values())) - 1, EDGES[-1])
    with tqdm(total=size * given.orders * len(treatments), desc=line["row"], unit="B", unit_scale=True) as bar:
        pieces, seconds = {}, {}
        for x in treatments:
            started = clock(model)
            pieces[x] = measure(model, corpus, x, given.orders, seed, progress=bar.update)
            seconds[x] = round(clock(model) - started, 3)
    append_lines(given.out, ({**line, **one} for one in lines_of(pieces, seconds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
