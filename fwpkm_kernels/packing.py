"""How packed documents are cut into chunks, and how the reads of all of them are numbered.

Step s is chunk s of every document that has a full one. Its reads are numbered as those of a chunk of a batch whose
items are these documents: position by position, document by document, those that step longer first, so that the
documents of a step are the first ones of the step before. What is left of the documents, their tails, comes last; in it
reads that are written come first, and otherwise all of a document before those of the next. Where one launch cannot
take all documents, they go in groups, one behind the other, each with a span of its own in a step.

A document may begin with carried tokens: they belong to its chunk before, are read again and written with its first
chunk, and have no output. Such documents take part from step 1 on, which is the first that reads tokens again.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks as checks
from .chunks import Reads, Span
from .kernels import compute_dtype
from .options import Options

#: Tails are filled up to so many different lengths.
MOST_LENGTHS = 8


class Part(NamedTuple):
    """Reads that are looked up together, and before they are written."""

    reads: slice  #: among those of all documents, in the order of `PackedReads.lookups`
    memories: list[int]  #: whose keys they read, among `Packing.moving`; empty for the keys that all begin with
    rereads: int = 0  #: how many of their positions are read again
    is_written: bool = False  #: whether a key step happens after them
    lengths: list[int] | None = None  #: of tails, document by document; None where the reads are those of a step
    rows: int = 0  #: to which tails are filled up, so that the heads of their memories are looked up side by side

    @property
    def is_leading(self) -> bool:
        """Whether its memories are the first ones, as those of a step whose documents are all that still step."""
        return self.lengths is None and self.memories == list(range(len(self.memories)))

    def fill_up(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Of tails: which of the part's reads stands in each of rows·memories places, the last one of a document again
        behind it; and in which place each read stands."""
        lengths = torch.tensor(self.lengths, dtype=torch.int64, device="cpu")
        first, row = lengths.cumsum(0) - lengths, torch.arange(self.rows, device="cpu").unsqueeze(1)
        owner = torch.repeat_interleave(lengths)
        place = (torch.arange(len(owner), device="cpu") - first[owner]) * len(lengths) + owner
        taken = (first + torch.minimum(row, lengths - 1)).flatten()
        return taken.to(device, non_blocking=True), place.to(device, non_blocking=True)


class Packing(NamedTuple):
    """The chunks of packed documents."""

    bounds: list[int]  #: [S + 1]: where the tokens of each document begin, and where those of the last one end
    origins: list[int]  #: [S]: the token with which the chunk of step 0 of each document begins, or would begin
    moving: list[int]  #: documents with keys of their own, those that step longer first
    parts: list[Part]
    spans: list[Span]  #: of the values, whose targets and outputs are in the order of the reads; without `decays`
    span_documents: list[list[int]]  #: of each span: its documents
    span_steps: list[int | None]  #: of each span: its step, which may have several; None of tails

    @property
    def num_reads(self) -> int:
        """R."""
        return sum(span.reads for span in self.spans)


class PackedReads(NamedTuple):
    """Where each read of a packing comes from."""

    reads: Reads  #: their chunks are spans; `output` [P] says which of them are output, in their order
    document: Tensor  #: int64 [R]
    pairs: Tensor  #: int64: of each read that is written, the token whose target it is written with
    outputs: Tensor  #: int64 [P]: the token of each output read; carried and surplus tokens have none
    again: Tensor  #: int64: which reads are re-reads
    #: int64 [R]: the reads as they are looked up, all of a tail side by side; None if that is their order.
    lookups: Tensor | None

    def in_order_of_lookups(self, x: Tensor) -> Tensor:
        """x [R, ...] of the reads, as they are looked up."""
        return x if self.lookups is None else x.index_select(0, self.lookups)

    def in_order_of_reads(self, x: Tensor) -> Tensor:
        """The inverse."""
        return x if self.lookups is None else torch.empty_like(x).index_copy_(0, self.lookups, x)


def pack(bounds: list[int], carried: list[int] | None, keys: Tensor, o: Options) -> Packing:
    """Cut documents into chunks.

    Args:
        bounds: [S + 1]; tokens behind the last one belong to no document.
        carried: [S]: how many of its first tokens each document has read before, 0 or `lookahead`; None is 0.
        keys: with which they begin, [H, 2, n, Dk/2] of all or [S, H, 2, n, Dk/2] of each.
    """
    shares_keys, most = keys.dim() == 4, checks.most_memories(keys)
    carried = [0] * (len(bounds) - 1) if carried is None else carried
    lengths = [stop - start - before for (start, stop), before in zip(pairwise(bounds), carried, strict=True)]
    is_carried = o.boundary == "carry"
    full = [length // o.chunk_size for length in lengths]
    writes = full if is_carried else [-(-length // o.chunk_size) for length in lengths]
    first_step = [min(before, 1) for before in carried]
    last_step = [count + first if count > 0 else 0 for count, first in zip(full, first_step, strict=True)]
    stepping = sorted(range(len(lengths)), key=lambda document: -last_step[document])
    moving = list(stepping)
    if shares_keys:  # the other documents never write
        moving = [document for document in moving if writes[document] > 0 and o.keys_move]
    number = {document: index for index, document in enumerate(moving)}
    parts: list[Part] = []
    spans: list[Span] = []
    span_documents: list[list[int]] = []
    span_steps: list[int | None] = []
    read = pair = output = 0

    def add_span(documents: list[int], rereads: int, written: int, outputs: int, step: int | None = None) -> slice:
        nonlocal read, pair, output
        count, is_written = rereads + outputs, step is not None or not is_carried
        spans.append(Span(count, slice(pair, pair + written), slice(output, output + outputs), is_written))
        span_documents.append(documents)
        span_steps.append(step)
        read, pair, output = read + count, pair + written, output + outputs
        return slice(read - count, read)

    for step in range(max(last_step, default=0)):
        while last_step[stepping[-1]] <= step:  # those that step longer stand first
            stepping.pop()
        documents = [document for document in stepping if first_step[document] <= step]
        rereads = o.lookahead if is_carried and step > 0 else 0
        for begin in range(0, len(documents), most):
            group = documents[begin : begin + most]
            written = len(group) * (rereads + o.chunk_size - o.lookahead)
            reads = add_span(group, len(group) * rereads, written, len(group) * o.chunk_size, step)
            parts.append(Part(reads, [number[document] for document in group] if moving else [], rereads, True))
    tails = [document for document, length in enumerate(lengths) if length % o.chunk_size > 0]
    # Those that read the keys that all begin with come first, and are looked up together; the others with those that
    # are filled up to as many rows. That depends on a document alone, as bits of sums over the rows do on their number.
    unit = -(-o.chunk_size // MOST_LENGTHS)

    def rows_of_tail(document: int) -> int:
        return -(-(lengths[document] % o.chunk_size) // unit) * unit if document in number else 0

    tails.sort(key=lambda document: (rows_of_tail(document), number.get(document, -1)))
    first, sizes = read, [lengths[document] % o.chunk_size for document in tails]
    if tails:
        add_span(tails, 0, 0 if is_carried else sum(max(left - o.lookahead, 0) for left in sizes), sum(sizes))
    for document, left in zip(tails, sizes, strict=True):
        reads = slice(first, first + left)
        first = reads.stop
        rows = rows_of_tail(document)
        if not is_carried and o.keys_move:  # a key step is one of as many rows as it has
            parts.append(Part(reads, [number[document]] if rows > 0 else [], 0, True))
        elif parts and parts[-1].lengths is not None and parts[-1].rows == rows and len(parts[-1].memories) < most:
            parts[-1] = parts[-1]._replace(reads=slice(parts[-1].reads.start, reads.stop))
            parts[-1].memories.extend([number[document]] if rows > 0 else [])
            parts[-1].lengths.append(left)
        else:
            parts.append(Part(reads, [number[document]] if rows > 0 else [], lengths=[left], rows=rows))
    if not moving and parts:  # all read the same keys, which never move
        parts = [Part(slice(0, read), [])]
    origins = [
        start + before - first * o.chunk_size
        for start, before, first in zip(bounds[:-1], carried, first_step, strict=True)
    ]
    return Packing(bounds, origins, moving, parts, spans, span_documents, span_steps)


def number_packed_reads(packing: Packing, o: Options, device: torch.device) -> PackedReads:
    """Number the reads of all documents. Computed on the CPU, and copied at once."""
    origins = torch.tensor(packing.origins, dtype=torch.int64, device="cpu")
    ends = torch.tensor(packing.bounds[1:], dtype=torch.int64, device="cpu")
    parts: list[list[Tensor]] = []
    first, lookups = 0, None
    of_spans = zip(packing.spans, packing.span_documents, packing.span_steps, strict=True)
    for chunk, (span, documents, step) in enumerate(of_spans):
        count = span.outputs.stop - span.outputs.start
        members = torch.tensor(documents, dtype=torch.int64, device="cpu")
        if step is not None:
            rereads = span.reads // len(documents) - o.chunk_size
            position = torch.arange(step * o.chunk_size - rereads, (step + 1) * o.chunk_size, device="cpu")
            token = (position.unsqueeze(1) + origins[members]).flatten()
            document = members.repeat(len(position))
        else:
            left = (ends - origins)[members] % o.chunk_size
            owner = torch.repeat_interleave(left)
            before = (left.cumsum(0) - left)[owner]
            token = (ends[members] - left)[owner] + torch.arange(count, device="cpu") - before
            document = members[owner]
            if span.is_written:
                order = (ends[document] - token <= o.lookahead).long().sort(stable=True).indices
                token, document = token[order], document[order]
                if o.lookahead > 0 and len(documents) > 1:
                    back = torch.empty_like(order).scatter_(0, order, torch.arange(count, device="cpu"))
                    lookups = torch.cat((torch.arange(first, device="cpu"), first + back))
        written = span.pairs.stop - span.pairs.start
        read = torch.arange(first, first + span.reads, device="cpu")
        stop = first + span.reads
        parts.append(
            [
                token,
                *(torch.full_like(token, x) for x in (chunk, first, stop)),
                (read < first + written).long(),
                read[span.reads - count :],
                document,
                token[:written] + o.lookahead,
                token[span.reads - count :],
                read[: span.reads - count],
            ]
        )
        first = stop
    empty = [torch.empty(0, dtype=torch.int64, device="cpu")]
    fields = [torch.cat(x) for x in zip(*parts, strict=True)] or empty * 10
    fields += [] if lookups is None else [lookups]
    on_device = list(torch.cat(fields).to(device, non_blocking=True).split([len(x) for x in fields]))
    on_device[4] = on_device[4].bool()  # whether a read is written
    document, pairs, outputs, again, *by_lookup = on_device[6:]
    of_reads = Reads(*on_device[:6])
    return PackedReads(of_reads, document, pairs, outputs, again, by_lookup[0] if by_lookup else None)


def final_decay(
    cu_seqlens: Tensor, carried: Tensor | None, decay: Tensor | None, like: Tensor, o: Options
) -> Tensor | None:
    """What rows that a document has not addressed have been multiplied by after its last write, [S], in the compute
    dtype of `like`, where `decay` is that before its first; None is 1. A constant for gradients. Nothing waits
    for the device."""
    factor, decay = 1.0 - o.lr * o.weight_decay, None if decay is None else decay.detach()
    if factor == 1.0:
        return decay
    lengths = cu_seqlens.long().diff()  # which a chunk is added to
    if carried is not None:
        lengths = lengths - carried
    writes = lengths // o.chunk_size if o.boundary == "carry" else (lengths + o.chunk_size - 1) // o.chunk_size
    powers = torch.pow(factor, writes.double()).to(like.device, compute_dtype(like.dtype), non_blocking=True)
    return powers if decay is None else decay * powers
