"""Packed documents, each with a memory of its own, without autograd: one address scan, one plan, one value scan.

The rows that each document touches are a compact table (`compact.py`), on which the value scan runs as on the table of
one memory. A step moves on all documents together; what one document reads and writes depends on no other.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks as checks
from .chunks import Reads, Span, count_read_positions
from .columns import sum_over_columns
from .compact import compact, count_compact_rows, gather_compact, rows_at_tokens, sum_rows, take_rows
from .kernels import compute_dtype
from .key_step import address_grad, step_keys
from .lookup import lookup_halves
from .options import Options
from .packing import PackedReads, Packing, Part, number_packed_reads, pack
from .plan import row_dtype, sum_at
from .records import Addresses, Inputs, Plan, Rows, VarlenOutput, Writes, each
from .scans import value_scan, value_scan_grad
from .weights import (
    fold_write_weights,
    fold_write_weights_grad,
    plan_reads,
    step_ratio,
    weigh,
    weigh_grad,
    write_scale,
)


class PackedKept(NamedTuple):
    """What backward reads besides the inputs. R, how many reads there can be, depends on sizes alone; A = R·J."""

    scores: Tensor  #: these four: what the lookups found, as in `Addresses`
    slots: Tensor
    half_scores: Tensor
    sub_keys: Tensor  #: as rows of the keys of their `Part`
    part_keys: Tensor  #: [writes + S, H, 2, n, Dk/2]: the keys that each part reads; [0] where none move
    write_weights: Tensor  #: [R, J]
    counts: Tensor  #: [R, J]
    order: Tensor  #: these four: the plan of each span, as in `Plan`
    rows: Tensor
    start: Tensor
    end: Tensor
    log: Tensor  #: [A, D]
    earlier: Tensor  #: where the given rows stand in the compact table, [Q]; [0] without any

    def cut(self, reads: int, accesses: int) -> "PackedKept":
        """That of so many reads and accesses as there really are."""
        sizes = {"part_keys": None, "earlier": None, "log": accesses, **dict.fromkeys(Plan._fields, accesses)}
        return PackedKept._make(x[: sizes.get(name, reads)] for name, x in self._asdict().items())

    @property
    def found(self) -> Addresses:
        """What the lookups found."""
        return Addresses(*self[:4])

    @property
    def plan(self) -> Plan:
        """The plan of each span."""
        return Plan(self.order, self.rows, self.start, self.end)


def count_sizes(length: int, documents: int, picks: int, num_slots: int, earlier: int, o: Options) -> tuple[int, int]:
    """(The most reads, rows of the compact table), for sizes that may be symbolic."""
    reads = count_read_positions(length, o.chunk_size, o.lookahead, o.boundary)
    return reads, count_compact_rows(reads * picks, num_slots, documents, earlier)


def count_copies(length: int, documents: int, shares_keys: bool, o: Options) -> int:
    """The most copies of keys that backward reads: one for each chunk of a document whose keys move, or are its own.

    Under "carry" a document that shares the initial keys and has no full chunk reads those, and has no copy.
    """
    full = length // o.chunk_size
    return full + (torch.sym_min(documents, full) if shares_keys and o.boundary == "carry" else documents)


def empty_kept(queries: Tensor, keys: Tensor, values: Tensor, documents: int, earlier: int, o: Options) -> PackedKept:
    """What backward reads, to be filled in, on the device of the queries; of sizes that may be symbolic."""
    heads, dtype = queries.shape[1], compute_dtype(values.dtype)
    picks = heads * o.top_k
    reads, num_rows = count_sizes(queries.shape[0], documents, picks, values.shape[0], earlier, o)
    copies = count_copies(queries.shape[0], documents, keys.dim() == 4, o)
    found = Addresses.empty(queries.new_empty(reads, heads), o.top_k, dtype)
    # Keys that do not move are an input of backward.
    of_keys = (copies if o.keys_move else 0, *keys.shape[-4:])

    def empty(kind: torch.dtype, *size: int) -> Tensor:
        return torch.empty(size, dtype=kind, device=queries.device)

    of_plan = (torch.int64, row_dtype(num_rows), torch.int32, torch.int32)  # order, rows, start, end
    return PackedKept._make(
        (
            *found,
            empty(keys.dtype, *of_keys),
            empty(dtype, reads, picks),
            empty(torch.int32, reads, picks),
            *(empty(kind, reads * picks) for kind in of_plan),
            empty(values.dtype, reads * picks, values.shape[1]),
            empty(torch.int64, earlier),
        )
    )


def _initial_keys(keys: Tensor, packing: Packing) -> Tensor:
    """The keys that each moving document begins with: a copy, [moving, H, 2, n, Dk/2]."""
    if keys.dim() == 4:
        return keys.repeat(len(packing.moving), 1, 1, 1, 1)
    return keys.index_select(0, _index(packing.moving, keys.device))


def _take(moved: Tensor, part: Part) -> Tensor:
    """The keys of the part's memories: a view where they are the first ones, else a copy."""
    if part.is_leading:
        return moved[: len(part.memories)]
    return moved.index_select(0, _index(part.memories, moved.device))


def _put(moved: Tensor, part: Part, keys: Tensor) -> None:
    """The inverse of `_take`, in place."""
    if part.is_leading:
        moved[: len(part.memories)] = keys
    else:
        moved.index_copy_(0, _index(part.memories, moved.device), keys)


def _index(numbers: list[int], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu").to(device, non_blocking=True)


class _Fold:
    """Rows of reads with the heads of the part's memories side by side, [rows, memories·H, ...], and back."""

    def __init__(self, part: Part, heads: int, device: torch.device) -> None:
        self.reads, self.memories = part.reads, max(1, len(part.memories))
        self.heads = heads
        self.filled = part.fill_up(device) if part.lengths is not None and part.memories else None

    def __call__(self, x: Tensor, *, is_gradient: bool = False) -> Tensor:
        """x [R, H, ...] of the part's reads, folded; where tails are filled up a read again, or 0 for a gradient."""
        x = x[self.reads]
        if self.filled is not None:
            taken, places = self.filled
            zeros = x.new_zeros(len(taken), *x.shape[1:]) if is_gradient else None
            x = x.index_select(0, taken) if zeros is None else zeros.index_copy_(0, places, x)
        return x.view(-1, self.memories * self.heads, *x.shape[2:])

    def back(self, x: Tensor) -> Tensor:
        """The inverse: those of the part's reads."""
        x = x.reshape(-1, self.heads, *x.shape[2:])
        return x if self.filled is None else x.index_select(0, self.filled[1])


def _scan_addresses(
    queries: Tensor, keys: Tensor, packing: Packing, kept: PackedKept | None, o: Options
) -> tuple[Addresses, Tensor]:
    """Look up every read, part by part, and move the keys after each: the addresses of `queries` [R, H, Dk], and the
    final keys [S, H, 2, n, Dk/2]."""
    heads = queries.shape[1]
    moved = _initial_keys(keys, packing)
    parts = [Addresses.empty(queries[:0], o.top_k, compute_dtype(keys.dtype))]  # there may be no tokens
    copied = 0
    for part in packing.parts:
        part_keys, fold = _take(moved, part), _Fold(part, heads, keys.device)
        now = part_keys.flatten(0, 1) if part.memories else keys
        rows = fold(queries)
        found = lookup_halves(rows, now, o.lookup)
        if kept is not None and o.keys_move:
            kept.part_keys[copied : copied + len(part_keys)] = part_keys
            copied += len(part_keys)
        if part.is_written and o.keys_move:
            picks = found.picks.since(part.rereads)
            step_keys(now, rows[part.rereads :], picks, o.key_step, out=now, memories=fold.memories)
            if not part.is_leading:
                _put(moved, part, part_keys)
        parts.append(Addresses(*(fold.back(x) for x in found)))
    if kept is not None:
        kept.part_keys[copied:] = 0.0
    new_keys = keys.expand(len(packing.bounds) - 1, *keys.shape[-4:]).clone(memory_format=torch.contiguous_format)
    new_keys.index_copy_(0, _index(packing.moving, keys.device), moved)
    return Addresses(*(torch.cat(columns) for columns in zip(*parts, strict=True))), new_keys


def _scan_addresses_grad(
    grad_keys: Tensor | None,
    grad_scores: Tensor,
    queries: Tensor,
    keys: Tensor,
    packing: Packing,
    kept_keys: Tensor,
    found: Addresses,
    o: Options,
) -> tuple[Tensor, Tensor]:
    """Backward of the address scan, in the compute dtype: the gradients of `queries` [R, H, Dk] and of `keys`."""
    heads = queries.shape[1]
    dtype, documents = grad_scores.dtype, len(packing.bounds) - 1
    shape = (documents, *keys.shape[-4:])
    total = torch.empty(shape, dtype=dtype, device=keys.device)
    total.zero_() if grad_keys is None else total.copy_(grad_keys)
    members = _index(packing.moving, keys.device)
    moved = total.index_select(0, members)
    shared = torch.zeros(keys.shape[-4:], dtype=dtype, device=keys.device)
    grad_queries = torch.empty(queries.shape, dtype=dtype, device=queries.device)
    no_step = o.key_step._replace(weight=0.0, weight_decay=0.0)
    copied = sum(len(part.memories) for part in packing.parts)
    constant = None if o.keys_move else _initial_keys(keys, packing)
    for part in reversed(packing.parts):
        fold, count = _Fold(part, heads, keys.device), len(part.memories)
        copied -= count
        part_keys = kept_keys[copied : copied + count] if constant is None else _take(constant, part)
        part_found = Addresses(*(fold(x) for x in found))
        by_row, after = address_grad(
            _take(moved, part).flatten(0, 1) if count > 0 else shared,
            part_keys.flatten(0, 1) if count > 0 else keys,
            fold(queries),
            fold(grad_scores, is_gradient=True),
            part_found.slots,
            part_found.picks,
            o.key_step if part.is_written and o.keys_move else no_step,
            first_row=part.rereads,
            memories=fold.memories,
        )
        grad_queries[part.reads] = fold.back(by_row)
        if count > 0:
            _put(moved, part, after.view(count, *shared.shape))
        else:
            shared = after
    total.index_copy_(0, members, moved)
    return grad_queries, total if keys.dim() == 5 else total.sum(0) + shared


class _Weighed(NamedTuple):
    """What multiplies in the write weights of all reads, [R, ...]."""

    ratio: Tensor | None
    gates: Tensor | None
    mask: Tensor | None


def _factors(
    gates: Tensor | None, mask: Tensor | None, packed: PackedReads, packing: Packing, dtype: torch.dtype, o: Options
) -> _Weighed:
    """S/E, gates and mask of each read; S and E are those of a chunk of one document."""
    reads, ratio = packed.reads, None
    if o.has_ratio:  # here every token is one read, and the tokens of a document's chunk lie side by side
        bounds = torch.tensor(packing.bounds, dtype=torch.int64, device="cpu").to(reads.token.device, non_blocking=True)
        tokens = torch.arange(packing.bounds[-1], device=bounds.device)
        document = torch.bucketize(tokens, bounds[1:], right=True)
        first = bounds[document] + (tokens - bounds[document]) // o.chunk_size * o.chunk_size
        end = torch.minimum(first + o.chunk_size, bounds[document + 1])
        by_token = Reads(tokens, document, first, end, tokens < end - o.lookahead, tokens)
        mask_now = None if mask is None else mask[: len(tokens)]
        ratio = step_ratio(by_token, mask_now, o.lookahead, o.boundary, dtype)
    by_read = each(lambda x: x[reads.token], ratio, gates, mask)
    return _Weighed(*by_read)


def _spans(packing: Packing, document: Tensor, o: Options) -> list[Span]:
    """The spans, and which rows of the compact table [R] decay after each."""
    if o.weight_decay == 0.0 or o.lr == 0.0:
        return packing.spans
    is_written = torch.zeros(len(packing.spans), len(packing.bounds) - 1, dtype=torch.bool, device="cpu")
    for number, documents in enumerate(packing.span_documents):
        is_written[number, documents] = True
    of_spans = is_written.to(document.device, non_blocking=True).unbind()
    return [
        span._replace(decays=functools.partial(of_span.__getitem__, document)) if span.is_written else span
        for span, of_span in zip(packing.spans, of_spans, strict=True)
    ]


def slots_of_values(slot: Tensor, earlier: Tensor) -> Tensor:
    """The slots of a compact table, with -1 for rows that were given, at `earlier` [Q], and so not read from values."""
    if len(earlier) == 0:
        return slot
    return F.pad(slot, (0, 1)).scatter(0, torch.where(earlier < 0, len(slot), earlier), -1)[:-1]


def _padded(x: Tensor, size: int) -> Tensor:
    """x [rows, ...] with zeros behind it, [size, ...]."""
    return x if len(x) == size else torch.cat((x, x.new_zeros(size - len(x), *x.shape[1:])))


@checks.without_autocast
def run_packed(
    inputs: Inputs, bounds: list[int], carried: list[int] | None, earlier: Rows | None, keep: bool, o: Options
) -> tuple[VarlenOutput, PackedKept | None]:
    """What packed documents leave behind, and with `keep` what backward reads.

    `inputs` are those of one batch item without its dimension: queries [T, H, Dk], keys [H, 2, n, Dk/2] or
    [S, H, 2, n, Dk/2], ...; `bounds` [S + 1] and `carried` [S] those of `pack`. Carried tokens, and tokens behind the
    last bound, have output and weights 0 and slots -1.
    """
    queries, targets, keys, values, gates, mask = inputs
    documents, dtype, picks = len(bounds) - 1, compute_dtype(values.dtype), queries.shape[1] * o.top_k
    packing = pack(bounds, carried, keys, o)
    packed = number_packed_reads(packing, o, queries.device)
    reads = packed.reads
    num_earlier = 0 if earlier is None else len(earlier.slot)
    _, num_rows = count_sizes(len(queries), documents, picks, len(values), num_earlier, o)
    kept = log = None
    if keep:  # what the scans do not fill in has a size and a dtype here, but no memory
        kept = empty_kept(queries.to("meta"), keys, values, documents, num_earlier, o)
        part_keys, log = (torch.empty_like(x, device=queries.device) for x in (kept.part_keys, kept.log))
        kept = kept._replace(part_keys=part_keys)
    keys = keys.contiguous()
    lookups = packed.in_order_of_lookups(reads.token)
    found, new_keys = _scan_addresses(queries.index_select(0, lookups), keys, packing, kept, o)
    found = Addresses(*map(packed.in_order_of_reads, found))
    scores, slots = found.scores.flatten(1), found.slots.flatten(1)

    at = compact(slots, len(values), document=packed.document, num_documents=documents, earlier=earlier)
    extra = (0, num_rows - len(at.slot))
    at = at._replace(document=F.pad(at.document, extra), slot=F.pad(at.slot, extra, value=-1))
    table = gather_compact(values, at, earlier, o.backend)

    gates, mask = each(lambda x: x.to(dtype), gates, mask)
    factors = _factors(gates, mask, packed, packing, dtype, o)
    weights = weigh(scores, o.weighting, o.temperature)
    plan, counts = plan_reads(at.ids, num_rows, len(packing.spans), reads, factors.mask, o.boundary)
    scale = write_scale(weights, factors.ratio, o.step)
    multiplied = [x for x in (factors.gates, factors.mask) if x is not None]
    write_weights = fold_write_weights(weights, counts, scale, multiplied, reads.written)

    size = packing.num_reads * picks
    if log is not None:
        log[size:] = 0.0
    output = torch.empty(1, len(packed.outputs), values.shape[1], dtype=targets.dtype, device=targets.device)
    writes = Writes(weights, write_weights, counts, plan)
    value_scan(
        table,
        targets.index_select(0, packed.pairs).unsqueeze(0),
        *(at.ids, writes, output, None if log is None else log[:size], _spans(packing, at.document, o), o),
    )
    rows = Rows(at.document, at.slot, table)
    if kept is not None and log is not None:
        given = at.slot.new_empty(0) if at.earlier is None else at.earlier
        flat = (*found, kept.part_keys, write_weights, counts, *plan, log, given)
        kept = PackedKept._make(_padded(x.to(like.dtype), len(like)) for x, like in zip(flat, kept, strict=True))
    number = torch.arange(len(packed.outputs), device=queries.device)
    output = rows_at_tokens(output[0], number, packed.outputs, len(targets), o.backend)
    slots, weights = (
        x.new_full((len(targets), picks), fill).index_copy_(0, packed.outputs, x.index_select(0, reads.output))
        for x, fill in ((slots, -1), (weights, 0.0))
    )
    return VarlenOutput(output, new_keys, rows, slots, weights), kept


@checks.without_autocast
def run_packed_grad(
    queries: Tensor,
    targets: Tensor,
    keys: Tensor,
    num_slots: int,
    gates: Tensor | None,
    mask: Tensor | None,
    bounds: list[int],
    carried: list[int] | None,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    document: Tensor,
    slot: Tensor,
    kept: PackedKept,
    decay: Tensor | None,
    with_addresses: bool,
    with_values: bool,
    spread: bool,
    group: str,
    o: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of queries, targets, keys, values, gates and of the given rows' values.

    `grads` are those of output, final keys and final rows, of which `document` and `slot` say which they are; `decay`
    is that of the given rows. The gradients of queries and keys are empty unless `with_addresses`, and that of values
    is, unless `with_values`: it is [num_slots, D], or with `spread` False that of the rows that were read, [R, D], in
    the compute dtype, since those of documents that share a slot are still to be summed. With a `group`, targets, log
    and the gradients of output and rows are this rank's columns.
    """
    grad_output, grad_keys, grad_rows = grads
    table_dtype, width = kept.log.dtype, targets.shape[1]
    dtype, picks = compute_dtype(table_dtype), queries.shape[1] * o.top_k
    packing = pack(bounds, carried, keys, o)
    packed = number_packed_reads(packing, o, queries.device)
    reads, earlier = packed.reads, kept.earlier
    kept = kept.cut(packing.num_reads, packing.num_reads * picks)
    plan, scores = kept.plan, kept.scores.flatten(1)
    order = plan.order + (reads.first * picks).repeat_interleave(picks)
    ids = torch.empty_like(order).scatter_(0, order, plan.rows.long()).view(scores.shape)
    log_rows = torch.empty_like(plan.start).scatter_(0, order, plan.start).view(scores.shape)
    weights = weigh(scores, o.weighting, o.temperature)
    writes = Writes(weights, kept.write_weights, kept.counts, plan)

    table_grad = torch.empty(len(slot), width, dtype=dtype, device=queries.device)
    table_grad.zero_() if grad_rows is None else table_grad.copy_(grad_rows)
    if grad_output is None:
        grad_output = torch.zeros((), dtype=dtype, device=targets.device).expand(targets.shape)
    grad_pairs, grad_weights, grad_write_weights = value_scan_grad(
        table_grad,
        grad_output.index_select(0, packed.outputs).unsqueeze(0),
        targets.index_select(0, packed.pairs).unsqueeze(0),
        *(ids, writes, kept.log, log_rows, _spans(packing, document, o), o),
    )
    number = torch.arange(len(packed.pairs), device=queries.device)
    grad_weights, grad_write_weights = sum_over_columns(group, grad_weights, grad_write_weights)
    grad_targets = rows_at_tokens(grad_pairs[0], number, packed.pairs, len(targets), o.backend)
    del grad_pairs

    gates_now, mask_now = each(lambda x: x.to(dtype), gates, mask)
    factors = _factors(gates_now, mask_now, packed, packing, dtype, o)
    through_write, per_read = fold_write_weights_grad(
        grad_write_weights, weights, kept.counts, factors.ratio, o.step, factors.gates, factors.mask, reads.written
    )
    grad_scores = weigh_grad(grad_weights + through_write, scores, o.weighting, o.temperature)
    grad_gates = None if gates is None else sum_at(reads.token, per_read, len(gates)).to(gates.dtype)

    grad_queries, grad_initial = queries.new_empty(0), keys.new_empty(0)
    if with_addresses:
        by_lookup, grad_initial = _scan_addresses_grad(
            grad_keys,
            packed.in_order_of_lookups(grad_scores.view(kept.scores.shape)),
            queries.index_select(0, packed.in_order_of_lookups(reads.token)),
            keys.contiguous(),
            packing,
            kept.part_keys,
            Addresses(*map(packed.in_order_of_lookups, kept.found)),
            o,
        )
        by_read = packed.in_order_of_reads(by_lookup)
        by_token = rows_at_tokens(by_read, reads.output, packed.outputs, len(queries), o.backend)
        # Of each token there is at most one, so that the order of the sums does not matter.
        by_token.index_add_(0, reads.token[packed.again], by_read.index_select(0, packed.again))
        grad_queries, grad_initial = by_token.to(queries.dtype), grad_initial.to(keys.dtype)

    grad_earlier = take_rows(table_grad, earlier, o.backend).to(table_dtype)
    grad_values = kept.log.new_empty(0)
    if with_values:
        if decay is not None:
            table_grad.mul_(decay[document].unsqueeze(1))
        grad_values = table_grad
        if spread:
            grad_values = sum_rows(table_grad, slots_of_values(slot, earlier), num_slots, table_dtype, o.backend)
    return grad_queries, grad_targets, grad_initial, grad_values, grad_gates, grad_earlier
