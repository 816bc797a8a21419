"""The rows of tables that some reads touch, as a compact table; and the way back.

Addresses never depend on values, so the rows that a call will touch are known before the first value is read. One
stable sort of document·N + slot numbers them. Gathered once, they are a small table, on which reads and writes run as
on a large one, with these numbers for slots.

How many rows there are depends on the data. So a compact table has as many as there can be: for S documents
min(accesses + rows given, S·N). Those that are not used stand last, and have slot -1 and the value 0. Triton's path
never waits for a GPU; PyTorch's, which is there to compare with on one, does.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks as checks
from ._autograd import refuse_recomputation, refuse_transforms
from ._operators import operator
from .kernels import compute_dtype
from .plan import plan_segments, sort_slots, sum_at
from .private import shares_storage
from .records import Rows


class Compact(NamedTuple):
    """Which row of which table each of R compact rows stands for, and which of them each access finds."""

    document: Tensor  #: int64 [R]; 0 where unused
    slot: Tensor  #: int64 [R]; -1 where unused. Used rows come first, in ascending order of document and slot
    ids: Tensor  #: int64, in the shape of the accesses: the row of the compact table that each finds
    earlier: Tensor | None  #: int64 [Q]: the rows where those of an earlier call stand; -1 of its unused ones


def count_compact_rows(accesses: int, num_slots: int, num_documents: int = 1, earlier: int = 0) -> int:
    """R: how many rows a compact table has; the numbers may be symbolic."""
    return torch.sym_min(accesses + earlier, num_documents * num_slots)


def compact(
    slots: Tensor,
    num_slots: int,
    *,
    document: Tensor | None = None,
    num_documents: int = 1,
    earlier: Rows | None = None,
) -> Compact:
    """Number the rows that accesses touch, and those that an earlier call has left behind.

    Args:
        slots: [reads, J], int64, in [0, num_slots).
        num_slots: N, rows of a table.
        document: int64 [reads], in [0, num_documents): in whose table each read reads; None is one table.
        earlier: rows that the compact table holds too, touched or not.
    """
    keys, unused = slots, num_documents * num_slots
    if document is not None:
        keys = slots + (document * num_slots).unsqueeze(1)
    keys = keys.reshape(-1)
    accesses, left = keys.numel(), 0
    if earlier is not None:
        left = earlier.slot.numel()
        keys = torch.cat((keys, torch.where(earlier.slot < 0, unused, earlier.document * num_slots + earlier.slot)))
    ordered, order = sort_slots(keys, unused + 1)
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    torch.ne(ordered[1:], ordered[:-1], out=is_first[1:])
    numbers = torch.cumsum(is_first, 0) - 1
    ids = torch.empty_like(numbers).scatter_(0, order, numbers)
    size = count_compact_rows(accesses, num_slots, num_documents, left)
    # One place more, where unused rows of an earlier call go if every row of the tables is touched.
    rows = numbers.new_full((size + 1,), unused).scatter_(0, numbers, ordered.long())[:size]
    is_unused = rows == unused
    places = None
    if earlier is not None:
        places = torch.where(earlier.slot < 0, -1, ids[accesses:])
    return Compact(
        torch.where(is_unused, 0, rows // num_slots),
        torch.where(is_unused, -1, rows % num_slots),
        ids[:accesses].view(slots.shape),
        places,
    )


def take_rows(table: Tensor, slot: Tensor, backend: str) -> Tensor:
    """table[slot], [R, D]; 0 where the slot is -1."""
    if checks.use_triton(backend, table):
        from .kernels.compact import copy_rows

        out = torch.empty(slot.shape[0], table.shape[1], dtype=table.dtype, device=table.device)
        copy_rows(table, slot, out, put=False)
        return out
    # Whole rows by their numbers: several times as fast on a CPU as an index or a mask.
    rows = table.index_select(0, slot.clamp(min=0))
    return rows.index_fill_(0, (slot < 0).nonzero().flatten(), 0.0)


def rows_at_tokens(x: Tensor, rows: Tensor, tokens: Tensor, length: int, backend: str) -> Tensor:
    """The `rows` [P] of x [R, ...] at `tokens` [P], none of them twice, and 0 elsewhere: [T, ...]."""
    if len(tokens) == 0:
        return x.new_zeros(length, *x.shape[1:])
    at = tokens.new_full((length,), -1).scatter_(0, tokens, rows)
    return take_rows(x.flatten(1), at, backend).view(length, *x.shape[1:])


def put_rows(table: Tensor, slot: Tensor, rows: Tensor, backend: str) -> None:
    """table[slot] = rows [R, D], of one dtype, in place; but for slots -1, and no other slot occurs twice."""
    if checks.use_triton(backend, table):
        from .kernels.compact import copy_rows

        copy_rows(rows, slot, table, put=True)
        return
    used = (slot >= 0).nonzero().flatten()
    table.index_copy_(0, slot.index_select(0, used), rows if len(used) == len(rows) else rows.index_select(0, used))


def gather_compact(values: Tensor, found: Compact, earlier: Rows | None, backend: str) -> Tensor:
    """The compact table [R, D]: rows of `values`, or what an earlier call has left of them."""
    table = take_rows(values, found.slot, backend)
    if earlier is not None and earlier.decay is not None:
        table.mul_(earlier.decay[found.document].unsqueeze(1))
    if earlier is not None and found.earlier is not None:
        put_rows(table, found.earlier, earlier.value, backend)
    return table


def spread_rows(grads: Tensor, slot: Tensor, num_slots: int, backend: str) -> Tensor:
    """The gradient [N, D] of a table from those of its rows [R, D], which are rows of one document."""
    out = torch.zeros(num_slots, grads.shape[1], dtype=grads.dtype, device=grads.device)
    put_rows(out, slot, grads, backend)
    return out


def sum_rows(grads: Tensor, slot: Tensor, num_slots: int, dtype: torch.dtype, backend: str) -> Tensor:
    """`spread_rows` of rows of several documents, which share the table: rows of a slot are summed in their order.

    Rows without a slot may hold anything.
    """
    used = slot >= 0
    if not checks.use_triton(backend, grads):
        if grads.is_cuda:
            return sum_at(slot[used], grads[used], num_slots).to(dtype)
        # Unused rows go to one more, since to leave them out would take a copy of all others.
        total = torch.zeros(num_slots + 1, grads.shape[1], dtype=grads.dtype, device=grads.device)
        return total.index_add_(0, torch.where(used, slot, num_slots), grads)[:-1].to(dtype)
    from .kernels.segments import segment_rows

    out = torch.zeros(num_slots, grads.shape[1], dtype=dtype, device=grads.device)
    plan = plan_segments(torch.where(used, slot, num_slots), num_slots + 1)
    # A segment that starts nowhere is summed by no program, so that nothing of an unused row is read.
    is_unused = plan.rows == num_slots
    plan = plan._replace(start=plan.start.masked_fill(is_unused, -1), end=plan.end.masked_fill(is_unused, -1))
    segment_rows(out, grads, torch.ones(len(grads), dtype=compute_dtype(grads.dtype), device=grads.device), plan)
    return out


def sparse_rows(grads: Tensor, slot: Tensor, num_slots: int) -> Tensor:
    """`spread_rows` as a sparse COO tensor [N, D]; slots are those of a compact table: ascending, unused ones last.

    On CPUs it is coalesced, with an entry for each slot that is used. On a GPU, whose number of those would have to be
    waited for, unused rows are entries of 0 at the first slot, so that it is not coalesced.
    """
    size = (num_slots, grads.shape[1])
    if grads.is_cuda:
        unused, place = slot < 0, slot[:1].clamp(min=0)  # which is a slot even where none is used
        indices, rows = torch.where(unused, place, slot), grads.masked_fill(unused.unsqueeze(1), 0.0)
        return torch.sparse_coo_tensor(indices.unsqueeze(0), rows, size, check_invariants=False)
    used = int((slot >= 0).sum())
    entries = (slot[:used].unsqueeze(0), grads[:used])
    return torch.sparse_coo_tensor(*entries, size, check_invariants=False, is_coalesced=True)


def sparse_sums(grads: Tensor, slot: Tensor, num_slots: int, dtype: torch.dtype, backend: str) -> Tensor:
    """`sum_rows` as a sparse COO tensor [N, D] in this dtype, to which the sum of a slot is rounded once.

    On CPUs it is coalesced, with an entry for each slot that is used. On a GPU it has min(R, N) entries, of which each
    slot that is used has one; the others are 0, as in `sparse_rows`.
    """
    if grads.is_cuda or checks.use_triton(backend, grads):  # whose sums need no number of slots that are used
        at = compact(slot.new_empty(0), num_slots, earlier=Rows(torch.zeros_like(slot), slot, grads))
        assert at.earlier is not None
        return sparse_rows(sum_rows(grads, at.earlier, len(at.slot), dtype, backend), at.slot, num_slots)
    used = (slot >= 0).nonzero().flatten()
    ordered, order = slot.index_select(0, used).sort(stable=True)
    named, counts = ordered.unique_consecutive(return_counts=True)
    # Sums straight from the rows: to take those that are used and to coalesce them would copy them twice.
    sums = F.embedding_bag(used[order], grads, counts.cumsum(0) - counts, mode="sum").to(dtype)
    entries, size = (named.unsqueeze(0), sums), (num_slots, grads.shape[1])
    return torch.sparse_coo_tensor(*entries, size, check_invariants=False, is_coalesced=True)


@operator(
    "apply_rows_",
    mutates_args=("values",),
    schema="(Tensor(a0!) values, Tensor document, Tensor slot, Tensor value, str backend) -> ()",
)
def _apply_rows_op(values: Tensor, document: Tensor, slot: Tensor, value: Tensor, backend: str) -> None:
    refuse_recomputation("apply_rows_")
    checks.check_slot_range("rows.slot", slot, values.shape[0], minimum=-1)
    if document.is_cpu and bool(document.any()):
        numbers = document.unique().tolist()
        raise ValueError(f"`rows` must be those of one table, whose `document` is 0, got rows of documents {numbers}")
    if slot.is_cpu:
        ordered = slot[slot >= 0].sort().values
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        if len(twice) > 0:
            raise ValueError(f"`rows.slot` must name no slot twice, got {int(twice[0])} more than once")
    put_rows(values, slot.contiguous(), value, backend)


def apply_rows_(values: Tensor, rows: Rows, *, backend: str = "auto") -> None:
    """Write rows into a table: values[slot] = value, in place, for all places in use.

    With the `Rows` that `fast_weight_memory(final="rows")` gives, the table becomes the final one. Triton's path never
    waits for a GPU. No autograd: nothing here is differentiable, and rows are read as if detached.

    Args:
        values: [N, D], any float dtype.
        rows: document [R], int64, 0 in each place; slot [R], int64, in [-1, N), where -1 marks an unused place and no
            other slot occurs twice; value [R, D], in the dtype of `values`; decay None, since no other row is written.
            Documents and slots are checked on CPU tensors.
        backend: "auto" (Triton for GPU tensors, PyTorch for CPU tensors), "torch" or "triton".

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; ValueError for a table that
            requires grad, that shares memory with `rows`, or that `chunk_value_update_` would refuse too.
        RuntimeError: in a backward pass and under transforms of torch.func, as from `chunk_value_update_`.

    Nothing has been written by then.
    """
    if not isinstance(rows, Rows):
        raise TypeError(f"`rows` must be Rows, got {type(rows).__name__}")
    refuse_transforms("apply_rows_", (values, *rows))
    checks.check_tensor("values", values, 2, "[N, D]")
    checks.check_float("values", values)
    if rows.decay is not None:
        raise ValueError(
            "`rows.decay` must be None, since rows that are not named are not written, got a decay of each document"
        )
    names = {f"rows.{name}": x for name, x in zip(Rows._fields, rows[:3], strict=False)}
    for (name, x), (rank, layout) in zip(names.items(), ((1, "[R]"), (1, "[R]"), (2, "[R, D]")), strict=True):
        checks.check_tensor(name, x, rank, layout)
        if rank == 1 and x.dtype != torch.int64:
            raise TypeError(f"`{name}` must be int64, got {x.dtype}")
    if rows.value.dtype != values.dtype:
        raise TypeError(f"`rows.value` must have the dtype of `values`, got {rows.value.dtype} against {values.dtype}")
    size = (rows.slot.shape[0], values.shape[1])
    if rows.value.shape != size or rows.document.shape != rows.slot.shape:
        shapes = ", ".join(str(checks.shape(x)) for x in rows[:3])
        raise ValueError(f"`rows` must be document [R], slot [R] and value [R, D], D = {size[1]}, got {shapes}")
    checks.check_together(values=values, **names)
    checks.check_choice("backend", backend, checks.BACKENDS)
    checks.check_writable("values", values, "values.index_put")
    for name, x in names.items():
        if shares_storage(values, x):
            raise ValueError(f"`{name}` must share no memory with `values`, which is written: clone it")
    _apply_rows_op(values, rows.document, rows.slot, rows.value.detach(), backend)
