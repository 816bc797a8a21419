"""A sequence without autograd: addresses, weights, plan and values, and their backward, for operators and streams."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks as checks
from .chunks import rows_of
from .columns import sum_over_columns
from .compact import compact, spread_rows, take_rows
from .kernels import compute_dtype
from .options import Options
from .records import Addresses, Inputs, MemoryOutput, Plan, Writes, each
from .scans import address_scan, address_scan_grad, value_scan, value_scan_grad
from .weights import plan_writes, plan_writes_grad, sum_reads, weigh_again


class Kept(NamedTuple):
    """What the backward of a sequence reads besides its inputs; R reads, A = R·J accesses. No table is among them."""

    found: Addresses  #: of the reads, M = R
    chunk_keys: Tensor  #: of the keys, what `address_scan` keeps
    write_weights: Tensor  #: [R, J]
    counts: Tensor  #: int32 [R, J]
    plan: Plan  #: of each chunk
    log: Tensor  #: [A, D]: the undo log; each chunk's distinct rows as it read them, where their segments start
    # Only of values that are read and written in a compact table:
    ids: Tensor | None = None  #: int64 [R, J]: the row of that table which each access finds
    slot: Tensor | None = None  #: int64 [P]: which slot each row of that table stands for

    def flat(self) -> list[Tensor]:
        """All tensors that there are, as operators take and return them."""
        fields = [[x] if isinstance(x, Tensor) else x for x in self if x is not None]
        return [x for field in fields for x in field]

    @classmethod
    def of(cls, flat: Sequence[Tensor]) -> "Kept":
        """The record of what `flat` gave."""
        (
            scores, slots, half_scores, sub_keys, chunk_keys, write_weights, counts, order, rows, start, end, log,
            *compacted,
        ) = flat  # fmt: skip
        found, plan = Addresses(scores, slots, half_scores, sub_keys), Plan(order, rows, start, end)
        return cls(found, chunk_keys, write_weights, counts, plan, log, *compacted)


def run_scans(
    queries: Tensor,
    targets: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Tensor | None,
    mask: Tensor | None,
    output: Tensor,
    o: Options,
    *,
    carried: int = 0,
    keep: bool = False,
    found_for_output: tuple[Tensor, Tensor] | None = None,
    compacted: bool = False,
) -> tuple[Tensor, Tensor, Kept]:
    """Both scans, for a sequence before which `carried` positions (0 or L) wait to be written.

    Args:
        queries: [(carried + T)·B, H, Dk], time first.
        targets: [B, T, D].
        values: [N, D], written in place, but not where they are compacted.
        gates, mask: [carried + T, B], flat or not, or None; in the compute dtype.
        output: [B, T, D], to be filled.
        found_for_output: slots and weights of the reads for output, contiguous [B, T, J], to be filled.
        compacted: whether the rows that the sequence touches are gathered, to be read and written in a table of theirs.

    Returns:
        The keys after the last write; the values, or the compact table [P, D], after it; and what backward needs, in
        which keys and log are empty without `keep`.
    """
    batch, length, width = targets.shape
    chunks = o.cut(length, carried)
    found, new_keys, chunk_keys = address_scan(queries, keys, chunks, batch, carried, keep, o)
    scores, slots = found.scores.flatten(1), found.slots.flatten(1)
    gates, mask = each(lambda x: x.view(carried + length, batch), gates, mask)
    of_table: tuple[Tensor, ...] = ()
    if compacted:
        touched = compact(slots, values.shape[0])
        slots, of_table = touched.ids, (touched.ids, touched.slot)
        values = take_rows(values, touched.slot, o.backend)
    writes = plan_writes(scores, slots, values.shape[0], gates, mask, length, batch, carried, found_for_output, o)
    if compacted and found_for_output is not None:
        ids = found_for_output[0]
        ids.copy_(touched.slot[ids])
    log = values.new_empty(slots.numel() if keep else 0, width)
    spans = [chunk.span(o.lookahead) for chunk in chunks]
    value_scan(values, targets, slots, writes, output, log if keep else None, spans, o)
    kept = Kept(found, chunk_keys, writes.write_weights, writes.counts, writes.plan, log, *of_table)
    return new_keys, values, kept


@checks.without_autocast
def run_forward(
    inputs: Inputs, keep: bool, o: Options, carried: int = 0, *, compacted: bool = False
) -> tuple[MemoryOutput, Kept]:
    """What a sequence leaves behind; and what backward reads, in which keys and log are empty without `keep`.

    Queries, gates and mask have `carried` positions before those of the targets; there are no results for these.
    `compacted`: the values left behind are the compact table, the slots of whose rows are among what backward reads.
    """
    queries, targets, keys, values, gates, mask = inputs
    size, dtype = (*targets.shape[:2], queries.shape[2] * o.top_k), compute_dtype(values.dtype)
    gates, mask = each(lambda x: x.transpose(0, 1).to(dtype), gates, mask)
    keys = keys.contiguous()  # then the kept copies and the final keys are contiguous too
    if not compacted:
        values = values.clone(memory_format=torch.contiguous_format)
    output = torch.empty(targets.shape, dtype=targets.dtype, device=targets.device)
    slots = torch.empty(size, dtype=torch.int64, device=values.device)
    weights = torch.empty(size, dtype=dtype, device=values.device)
    tensors = (rows_of(queries), targets, keys, values, gates, mask, output)
    how: dict[str, Any] = {"keep": keep, "found_for_output": (slots, weights), "compacted": compacted}
    new_keys, new_values, kept = run_scans(*tensors, o, carried=carried, **how)
    return MemoryOutput(output, new_keys, new_values, slots, weights), kept


@checks.without_autocast
def run_backward(
    queries: Tensor,
    targets: Tensor,
    gates: Tensor | None,
    mask: Tensor | None,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    num_keys: int,
    with_addresses: bool,
    kept: Kept,
    o: Options,
    carried: int = 0,
    *,
    spread: bool = True,
    group: str = "",
) -> list[Tensor]:
    """Gradients of queries, targets, keys, values, and of the gates if there are any.

    Those of queries and keys are empty unless `with_addresses`. That of values that were compacted is of the compact
    table's rows, [P, D], unless it is `spread` to all N. With a `group`, targets, log and the gradients of output and
    values are this rank's columns.
    """
    batch, length = targets.shape[:2]
    dtype, device = kept.write_weights.dtype, queries.device
    grad_output, grad_keys, grad_values = grads
    if grad_output is None:
        grad_output = torch.zeros((), dtype=dtype, device=device).expand(targets.shape)
    # No other gradient of the table that the chunks have read is made: each turns this copy of the incoming one further
    # into the outgoing one.
    num_rows = num_keys**2 if kept.slot is None else kept.slot.shape[0]
    table_grad = torch.empty(num_rows, targets.shape[2], dtype=dtype, device=device)
    table_grad.zero_() if grad_values is None else table_grad.copy_(grad_values)
    chunks = o.cut(length, carried)
    scores, slots = kept.found.scores.flatten(1), kept.found.slots.flatten(1) if kept.ids is None else kept.ids
    weights, log_rows = weigh_again(scores, kept.plan, length, batch, carried, o)
    writes = Writes(weights, kept.write_weights, kept.counts, kept.plan)
    grad_targets, grad_weights, grad_write_weights = value_scan_grad(
        table_grad, grad_output, targets, slots, writes, kept.log, log_rows, [c.span(o.lookahead) for c in chunks], o
    )
    grad_weights, grad_write_weights = sum_over_columns(group, grad_weights, grad_write_weights)
    grad_scores, grad_gates = plan_writes_grad(
        grad_weights, grad_write_weights, scores, writes, gates, mask, length, batch, carried, o
    )
    grad_queries, new_grad_keys = queries.new_empty(0), kept.chunk_keys.new_empty(0)
    if with_addresses:
        heads, width = queries.shape[2:]
        if grad_keys is None:
            grad_keys = torch.zeros(heads, 2, num_keys, width // 2, dtype=dtype, device=device)
        grad_found = grad_scores.view(kept.found.scores.shape)
        by_read, new_grad_keys = address_scan_grad(
            grad_keys.to(dtype), grad_found, rows_of(queries), kept.found, kept.chunk_keys, chunks, batch, carried, o
        )
        grad_queries = sum_reads(by_read, length, batch, carried, queries.dtype, o)
        new_grad_keys = new_grad_keys.to(kept.chunk_keys.dtype).clone(memory_format=torch.contiguous_format)
    new_grad_values = table_grad.to(kept.log.dtype)
    if kept.slot is not None and spread:
        new_grad_values = spread_rows(new_grad_values, kept.slot, num_keys**2, o.backend)
    results = [grad_queries, grad_targets, new_grad_keys, new_grad_values]
    return results if grad_gates is None else [*results, grad_gates]
