"""The plan of a write: slots → segments, by one stable sort.

Every access (token, pick) names a slot. Sorted by slot, the accesses of one slot stand side by side, in their original
order: one segment, with one owner that adds them up in that order. So sums over accesses are deterministic without
atomics, and nothing here has the size of the table or a shape that depends on the data.
"""

import itertools
import os
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import NARROW_ACCESSES, NARROW_ROWS, check_sort, exceeds
from ._operators import is_plain
from .records import PickPlan, Picks, Plan

#: Whether Triton compiles the kernels' asserts. Slots are then not cut to 32 bits, in which 2³² would pass as slot 0.
ASSERTS = os.environ.get("TRITON_DEBUG", "").lower() in ("1", "on", "true", "yes", "y")

# Sums that `segment_blocks` holds at a time, in elements: 8 MiB of float32.
_BLOCK_ELEMENTS = 2**21


def plan_segments(slots: Tensor, num_slots: int) -> Plan:
    """Sort the accesses `slots` (any shape, read flat, values in [0, num_slots)) into segments.

    Never synchronises with the host.
    """
    rows, order = sort_slots(slots, num_slots)
    dtype = position_dtype(rows.numel())
    if is_plain(rows):  # a shape that depends on the data costs nothing here, and two searches cost several times more
        _, counts = torch.unique_consecutive(rows, return_counts=True)
        end = counts.cumsum(0)
        bounds = torch.stack((end - counts, end)).to(dtype)
        start, end = bounds.repeat_interleave(counts, dim=1, output_size=rows.numel()).unbind()
        return Plan(order, rows, start, end)
    is_narrow = dtype == torch.int32
    start = torch.searchsorted(rows, rows, out_int32=is_narrow)
    end = torch.searchsorted(rows, rows, right=True, out_int32=is_narrow)
    return Plan(order, rows, start, end)


def sort_slots(slots: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """Sort `slots` (any shape, read flat, values in [0, num_slots)) stably: (the slots, which one stands where).

    The sort is of int32 keys where the slots fit, which takes half the passes on a GPU; not under TRITON_DEBUG, where
    kernels assert that they do.
    """
    check_sort("slots", slots)
    keys = slots.reshape(-1)
    if keys.is_cuda and not ASSERTS:
        keys = keys.to(row_dtype(num_slots))
    return torch.sort(keys, stable=True)


def plan_picks(picks: Picks, num_keys: int, *, first_row: int = 0, memories: int = 1) -> PickPlan:
    """Which tokens picked each sub-key, by Triton kernels: for the few rows of a table of sub-keys.

    `picks`, contiguous, are those that a lookup gives. The usage is that of the rows from `first_row` on, in each of
    `memories` that the heads belong to, one after the other.
    """
    from .kernels.picks import can_plan
    from .kernels.picks import plan_picks as launch

    rows, heads, _, top_k = picks.sub_keys.shape
    listed = None
    if not can_plan(rows, heads, num_keys):
        plan = plan_segments(picks.sub_keys, heads * 2 * num_keys)
        bounds = torch.arange(heads * 2 * num_keys + 1, dtype=plan.rows.dtype, device=plan.rows.device)
        first = torch.searchsorted(plan.rows, bounds, out_int32=plan.start.dtype == torch.int32)
        listed = (plan.order // (2 * heads * top_k), plan.order, first)
    return launch(picks, num_keys=num_keys, first_row=first_row, memories=memories, listed=listed)


def count_accesses(plan: Plan, counted: Tensor | None = None) -> Tensor:
    """n_s of each access: how many accesses its slot has, at least 1; [A], in the accesses' own order.

    `counted` [A], bool, in that order too, says which accesses count; None means all.
    """
    if counted is None:
        counts = plan.end - plan.start
    else:
        running = F.pad(torch.cumsum(counted[plan.order], 0, dtype=plan.start.dtype), (1, 0))
        counts = (running[plan.end] - running[plan.start]).clamp_(min=1)
    return torch.empty_like(counts).scatter_(0, plan.order, counts)


def count_among(plan: Plan, count_slots: Tensor) -> Tensor:
    """n_s of each access, counted over other slots: how often its slot occurs in `count_slots`, at least 1.

    Slots that no access names, and numbers outside of the table, count for no access.
    """
    check_sort("count_slots", count_slots)
    # In the wider dtype of the two: a slot of 64 bits cut to 32 could be another slot.
    dtype = torch.promote_types(plan.rows.dtype, count_slots.dtype)
    plan = plan._replace(rows=plan.rows.to(dtype))
    counted = torch.sort(count_slots.reshape(-1).to(dtype)).values
    is_narrow = position_dtype(counted.numel()) == torch.int32
    first = torch.searchsorted(counted, plan.rows, out_int32=is_narrow)
    last = torch.searchsorted(counted, plan.rows, right=True, out_int32=is_narrow)
    return torch.empty_like(first).scatter_(0, plan.order, (last - first).clamp_(min=1))


def within_chunks(plan: Plan, num_slots: int, chunk: Tensor, first_access: Tensor) -> Plan:
    """Turn the plan of chunk·num_slots + slot, the accesses being in the order of the chunks, into one for each chunk.

    `chunk` and `first_access` [A] say for each access which chunk it is in, and which access is the first of that one.
    The accesses of a chunk stand at the same positions before and after the sort; the slice of every field at these
    positions is then a plan of its own, of that chunk's accesses and of rows of the table.
    """
    first = first_access.to(plan.start.dtype)
    rows = (plan.rows - chunk * num_slots).to(row_dtype(num_slots))
    return Plan(plan.order - first_access, rows, plan.start - first, plan.end - first)


def row_dtype(num_slots: int) -> torch.dtype:
    """The narrowest dtype, int32 or int64, that numbers so many rows."""
    return torch.int32 if num_slots <= NARROW_ROWS else torch.int64


def position_dtype(num_accesses: int) -> torch.dtype:
    """The narrowest dtype, int32 or int64, for where each of so many accesses stands, and for how many there are.

    int64 where something traces that does not know how many.
    """
    return torch.int32 if exceeds(NARROW_ACCESSES + 1, num_accesses) else torch.int64


def segment_totals(plan: Plan, vectors: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of the segments in plain PyTorch: (positions [U], rows [U], totals [U, D]) for the U distinct rows.

    totals[u] = Σ_a coefficients[a]·vectors[a // PER_VECTOR], in order. Its shapes depend on the data: for CPUs.
    """
    positions = _starts(plan).nonzero().flatten()
    return positions, plan.rows[positions].long(), _Bags(plan, vectors, coefficients).sums(positions)


def segment_blocks(plan: Plan, vectors: Tensor, coefficients: Tensor) -> tuple[Tensor, Iterator[tuple[slice, Tensor]]]:
    """`segment_totals`, as all rows [U], and block by block of these: which ones, and their totals.

    A few MiB at a time, which the allocator keeps from one block to the next: what is larger it takes from the system
    and gives back, and clearing its pages may take as long as the sums.
    """
    positions = _starts(plan).nonzero().flatten()
    return plan.rows[positions].long(), _Bags(plan, vectors, coefficients).blocks(positions)


def compact_totals(plan: Plan, vectors: Tensor, coefficients: Tensor) -> Tensor:
    """The same sums, [A, D]: each where its segment starts, and 0 elsewhere."""
    return _Bags(plan, vectors, coefficients).sums(torch.where(_starts(plan), plan.start, plan.end))


def _starts(plan: Plan) -> Tensor:
    """Which of the sorted accesses are the first of their segment, [A]."""
    return plan.start == torch.arange(plan.start.numel(), device=plan.start.device)


class _Bags:
    """The sorted accesses of a plan, each with its vector and coefficient, to be summed in plain PyTorch."""

    def __init__(self, plan: Plan, vectors: Tensor, coefficients: Tensor) -> None:
        self.plan, self.vectors = plan, vectors.contiguous()
        if plan.order.numel() > 0:
            self.vector_of = plan.order // (plan.order.numel() // vectors.shape[0])
            self.coefficients = coefficients.reshape(-1)[plan.order]

    def sums(self, first: Tensor, begin: int = 0, end: int | None = None) -> Tensor:
        """Σ coefficients[a]·vectors[a // PER_VECTOR] over the accesses from first[i] up to first[i + 1], of those from
        `begin` up to `end`: [I, D]."""
        if first.numel() == 0 or self.vectors.shape[1] == 0:
            return self.vectors.new_empty(first.numel(), self.vectors.shape[1])
        return F.embedding_bag(
            self.vector_of[begin:end],
            self.vectors,
            first.to(self.vector_of.dtype) - begin,
            mode="sum",
            per_sample_weights=self.coefficients[begin:end],
        )

    def blocks(self, first: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The same, so many at a time that they have `_BLOCK_ELEMENTS`."""
        step = max(1, _BLOCK_ELEMENTS // max(1, self.vectors.shape[1]))
        bounds = [*first[::step].tolist(), self.plan.order.numel()]
        for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
            block = slice(number * step, (number + 1) * step)
            yield block, self.sums(first[block], begin, end)


def sum_at(index: Tensor, x: Tensor, size: int) -> Tensor:
    """The rows of x summed at `index`, [size, ...], in a fixed order on either device; differentiable."""
    zeros = x.new_zeros(size, *x.shape[1:])
    if x.is_cuda:  # there index_add is atomic, whereas index_put sorts and then adds up
        return zeros.index_put((index.long(),), x, accumulate=True)
    return zeros.index_add(0, index, x)
