"""How a sequence is cut into chunks, and how the reads of its chunks are numbered.

A chunk of the sequence reads the positions [start, stop) for output. Under ``boundary="carry"`` it first reads the
``lookahead`` positions before start again, for writing only: they belong to the chunk before, which could not see their
targets. So a chunk is a window [first, stop) of positions, of which it writes a prefix [first, last).

The reads of a sequence are numbered chunk by chunk, position by position, batch item by batch item. In this order a
chunk's reads, those it writes, and those it outputs are slices.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """What the value scan reads before it writes: consecutive reads, the first of them written, the last for output."""

    reads: int  #: how many, of each item of the batch
    pairs: slice  #: of the targets: those of its first reads
    outputs: slice  #: of the output: where its last reads go
    is_written: bool  #: whether decay happens after it
    #: Makes bool [N], which rows of the table then decay, when it is asked for: all spans' together would need N bytes
    #: for each. None is all rows.
    decays: Callable[[], Tensor] | None = None


class Chunk(NamedTuple):
    """One chunk of a sequence, in positions."""

    first: int  #: of the window that it reads
    start: int  #: of what it reads for output
    stop: int  #: one past the window
    last: int  #: one past what it writes; ``first`` if it writes nothing
    is_written: bool  #: whether decay and key step happen after it
    offset: int  #: how many positions all chunks before it read

    def rows(self, batch: int) -> slice:
        """Its reads among those of the sequence."""
        return slice(self.offset * batch, (self.offset + self.stop - self.first) * batch)

    def span(self, lookahead: int) -> "Span":
        """What the value scan does of it."""
        pairs = slice(self.first + lookahead, self.last + lookahead)
        return Span(self.stop - self.first, pairs, slice(self.start, self.stop), self.is_written)


def cut(length: int, chunk_size: int, lookahead: int, boundary: str, carried: int = 0) -> list[Chunk]:
    """The chunks of a sequence of `length` positions, before which there are `carried` ones (0 or `lookahead`)."""
    chunks: list[Chunk] = []
    offset = 0
    for start in range(0, length, chunk_size):
        stop = min(start + chunk_size, length)
        is_written = boundary == "drop" or stop - start == chunk_size
        first = max(-carried, start - lookahead) if boundary == "carry" and is_written else start
        last = max(first, stop - lookahead) if is_written else first
        chunks.append(Chunk(first, start, stop, last, is_written, offset))
        offset += stop - first
    return chunks


def count_read_positions(length: int, chunk_size: int, lookahead: int, boundary: str, carried: int = 0) -> int:
    """How many positions the chunks of a sequence read, re-reads included; `length` may be symbolic."""
    if boundary == "drop":
        return length
    # The first chunk has re-reads only if positions are carried into it.
    with_rereads = length // chunk_size - (0 if carried else 1)
    return length + lookahead * torch.sym_max(with_rereads, 0)


def rows_of(x: Tensor) -> Tensor:
    """[B, T, ...] as [T·B, ...], time first: so every chunk is a slice. A copy unless B = 1."""
    return x.transpose(0, 1).flatten(0, 1)


def items_of(rows: Tensor, length: int, batch: int) -> Tensor:
    """[T·B, ...] as [B, T, ...], contiguous."""
    return rows.view(length, batch, *rows.shape[1:]).transpose(0, 1).contiguous()


def count_writes(length: int, chunk_size: int, boundary: str) -> int:
    """How many chunks of a sequence are written; `length` may be symbolic."""
    return length // chunk_size if boundary == "carry" else (length + chunk_size - 1) // chunk_size


class Reads(NamedTuple):
    """Where each read of a sequence comes from: every field but `output` is [R]."""

    token: Tensor  #: int64: what it reads, as position·B + batch item, counted from the first position there is
    chunk: Tensor  #: int64: the chunk that reads it
    first: Tensor  #: int64: the first read of that chunk
    end: Tensor  #: int64: one past the last read of that chunk
    written: Tensor  #: bool: whether it is written
    output: Tensor  #: int64 [T·B]: for each position and batch item, which read is its output


def number_reads(
    length: int,
    batch: int,
    chunk_size: int,
    lookahead: int,
    boundary: str,
    device: torch.device,
    carried: int = 0,
) -> Reads:
    """Number the reads of a sequence, as `cut` cuts it. Computed on the device: nothing waits for it."""
    positions = torch.arange(length, device=device)
    if boundary == "drop":
        position = positions
        chunk = positions // chunk_size
        first = chunk * chunk_size
        end = (first + chunk_size).clamp(max=length)
        written = position < end - lookahead
        output = positions
    else:
        full = length // chunk_size
        num_reads = count_read_positions(length, chunk_size, lookahead, boundary, carried)
        reads = torch.arange(num_reads, device=device)
        # Chunks are found as if the first one had all its re-reads, by counting those `missing`; a last chunk that is
        # not full has none.
        window, missing = chunk_size + lookahead, lookahead - carried
        chunk = (reads + missing) // window
        first = (chunk * window - missing).clamp(min=0)
        is_full = chunk < full
        has_rereads = is_full if carried else is_full & (chunk > 0)
        position = chunk * chunk_size + reads - first - lookahead * has_rereads
        end = (chunk * window + window - missing).clamp(max=num_reads)
        written = is_full & (position < (chunk + 1) * chunk_size - lookahead)
        rereads = (positions // chunk_size + (1 if carried else 0)).clamp(max=full - (0 if carried else 1))
        output = positions + lookahead * rereads.clamp(min=0)

    items = torch.arange(batch, device=device)

    def for_items(x: Tensor) -> Tensor:
        return x.unsqueeze(1).expand(-1, batch).reshape(-1)

    return Reads(
        ((position + carried).unsqueeze(1) * batch + items).view(-1),
        for_items(chunk),
        for_items(first * batch),
        for_items(end * batch),
        for_items(written),
        (output.unsqueeze(1) * batch + items).view(-1),
    )
