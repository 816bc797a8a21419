"""How packed documents are cut into chunks, and how the reads of all of them are numbered.

Step s is chunk s of every document that has a full one. Its reads are numbered as those of a chunk of a batch whose
items are these documents: position by position, document by document, those with more chunks first, so that the
documents of a step are the first ones of the step before. What is left of the documents, their tails, comes last.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .chunks import Reads, Span
from .options import Options

#: Tails are filled up to so many different lengths.
MOST_LENGTHS = 8


class Part(NamedTuple):
    """Reads that are looked up together, and before they are written."""

    reads: slice  #: among those of all documents
    memories: list[int]  #: whose keys they read, among `Packing.moving`; empty for the keys that all begin with
    rereads: int = 0  #: how many of their positions are read again
    is_written: bool = False  #: whether a key step happens after them
    lengths: list[int] | None = None  #: of tails, document by document; None where the reads are those of a step
    rows: int = 0  #: to which tails are filled up, so that the heads of their memories are looked up side by side

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
    moving: list[int]  #: documents with keys of their own, those with more chunks first
    parts: list[Part]
    spans: list[Span]  #: of the values, whose targets and outputs are in the order of the reads; without `decays`
    span_documents: list[list[int]]  #: of each span: its documents

    @property
    def num_reads(self) -> int:
        """R."""
        return sum(span.reads for span in self.spans)


class PackedReads(NamedTuple):
    """Where each read of a packing comes from."""

    reads: Reads  #: their chunks are spans
    document: Tensor  #: int64 [R]
    pairs: Tensor  #: int64: of each read that is written, the token whose target it is written with
    outputs: Tensor  #: int64 [T]: the tokens in the order of their output reads
    again: Tensor  #: int64: which reads are re-reads


def pack(bounds: list[int], o: Options, shares_keys: bool) -> Packing:
    """Cut documents into chunks; `shares_keys` says whether all of them begin with the same keys."""
    lengths = [stop - start for start, stop in pairwise(bounds)]
    is_carried = o.boundary == "carry"
    full = [length // o.chunk_size for length in lengths]
    writes = full if is_carried else [-(-length // o.chunk_size) for length in lengths]
    moving = sorted(range(len(lengths)), key=lambda document: -full[document])
    if shares_keys:  # the other documents never write
        moving = [document for document in moving if writes[document] > 0 and o.keys_move]
    stepping = sorted((s for s in range(len(lengths)) if full[s] > 0), key=lambda document: -full[document])
    parts: list[Part] = []
    spans: list[Span] = []
    span_documents: list[list[int]] = []
    read = pair = output = 0

    def add_span(documents: list[int], rereads: int, written: int, outputs: int, is_written: bool) -> slice:
        nonlocal read, pair, output
        count = rereads + outputs
        spans.append(Span(count, slice(pair, pair + written), slice(output, output + outputs), is_written))
        span_documents.append(documents)
        read, pair, output = read + count, pair + written, output + outputs
        return slice(read - count, read)

    for step in range(max(full, default=0)):
        documents = [document for document in stepping if full[document] > step]
        count, rereads = len(documents), o.lookahead if is_carried and step > 0 else 0
        written = count * (rereads + o.chunk_size - o.lookahead)
        reads = add_span(documents, count * rereads, written, count * o.chunk_size, True)
        parts.append(Part(reads, list(range(count if moving else 0)), rereads, True))
    tails = [document for document, length in enumerate(lengths) if length % o.chunk_size > 0]
    number = {document: index for index, document in enumerate(moving)}
    # Those that read the keys that all begin with come first, and are looked up together; the others with those that
    # are filled up to as many rows. That depends on a document alone, as bits of sums over the rows do on their number.
    unit = -(-o.chunk_size // MOST_LENGTHS)

    def rows_of_tail(document: int) -> int:
        return -(-(lengths[document] % o.chunk_size) // unit) * unit if document in number else 0

    tails.sort(key=lambda document: (rows_of_tail(document), number.get(document, -1)))
    first = read
    if is_carried and tails:
        add_span(tails, 0, 0, sum(lengths[document] % o.chunk_size for document in tails), False)
    for document in tails:
        left = lengths[document] % o.chunk_size
        reads = slice(first, first + left)
        if not is_carried:
            reads = add_span([document], 0, max(left - o.lookahead, 0), left, True)
        first = reads.stop
        rows = rows_of_tail(document)
        if not is_carried:
            parts.append(Part(reads, [number[document]] if rows > 0 else [], 0, True))
        elif parts and parts[-1].lengths is not None and parts[-1].rows == rows:
            parts[-1] = parts[-1]._replace(reads=slice(parts[-1].reads.start, reads.stop))
            parts[-1].memories.extend([number[document]] if rows > 0 else [])
            parts[-1].lengths.append(left)
        else:
            parts.append(Part(reads, [number[document]] if rows > 0 else [], lengths=[left], rows=rows))
    if not moving and parts:  # all read the same keys, which never move
        parts = [Part(slice(0, read), [])]
    return Packing(bounds, moving, parts, spans, span_documents)


def number_packed_reads(packing: Packing, o: Options, device: torch.device) -> PackedReads:
    """Number the reads of all documents. Computed on the CPU, and copied."""
    starts = torch.tensor(packing.bounds[:-1], dtype=torch.int64, device="cpu")
    token, document, written, pairs, outputs, again = [], [], [], [], [], []
    first, step = 0, 0
    for span, documents in zip(packing.spans, packing.span_documents, strict=True):
        count = span.outputs.stop - span.outputs.start
        members = torch.tensor(documents, dtype=torch.int64, device="cpu")
        if count == len(documents) * o.chunk_size and span.is_written:  # a step
            rereads = span.reads // len(documents) - o.chunk_size
            position = torch.arange(step * o.chunk_size - rereads, (step + 1) * o.chunk_size, device="cpu")
            token.append((position.unsqueeze(1) + starts[members]).flatten())
            document.append(members.repeat(len(position)))
            step += 1
        else:
            ends = torch.tensor([packing.bounds[s + 1] for s in documents], dtype=torch.int64, device="cpu")
            left = (ends - starts[members]) % o.chunk_size
            owner = torch.repeat_interleave(left)
            before = (left.cumsum(0) - left)[owner]
            token.append((ends - left)[owner] + torch.arange(count, device="cpu") - before)
            document.append(members[owner])
        reads = token[-1]
        num_written = span.pairs.stop - span.pairs.start
        pairs.append(reads[:num_written] + o.lookahead)
        outputs.append(reads[span.reads - count :])
        again.append(torch.arange(first, first + span.reads - count, device="cpu"))
        written.append(torch.arange(span.reads, device="cpu") < num_written)
        first += span.reads
    empty = torch.empty(0, dtype=torch.int64, device="cpu")
    sizes = torch.tensor([span.reads for span in packing.spans], dtype=torch.int64, device="cpu")
    ends = sizes.cumsum(0)
    chunk = torch.repeat_interleave(sizes)
    tokens, output_tokens = torch.cat([empty, *token]), torch.cat([empty, *outputs])
    is_output = torch.ones(len(tokens), dtype=torch.bool, device="cpu")
    reread = torch.cat([empty, *again])
    is_output[reread] = False
    output = torch.empty_like(output_tokens)
    output[output_tokens] = is_output.nonzero().flatten()
    fields = (
        tokens,
        chunk,
        (ends - sizes)[chunk],
        ends[chunk],
        torch.cat([empty.bool(), *written]),
        output,
        torch.cat([empty, *document]),
        torch.cat([empty, *pairs]),
        output_tokens,
        reread,
    )
    on_device = [x.to(device, non_blocking=True) for x in fields]
    return PackedReads(Reads(*on_device[:6]), *on_device[6:])
