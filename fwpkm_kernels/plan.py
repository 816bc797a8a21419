"""The plan of a write: slots → segments, by one stable sort.

Every access (token, pick) names a slot. Sorted by slot, the accesses of one slot stand side by side, in their original
order: one segment, with one owner that adds them up in that order. So sums over accesses are deterministic without
atomics, and nothing here has the size of the table or a shape that depends on the data.
"""

import os
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:  # Triton may be missing
    from .kernels.picks import PickPlan

#: So many rows are numbered in 32 bits; more in 64.
NARROW_ROWS = 2**31
#: So many accesses are numbered in 32 bits, where the sum of two numbers fits too; more in 64.
NARROW_ACCESSES = 2**30
#: Whether Triton compiles the kernels' asserts, which then see slots as they came: 2³² in 32 bits would be slot 0.
ASSERTS = os.environ.get("TRITON_DEBUG", "").lower() in ("1", "on", "true", "yes", "y")
#: torch.sort takes no more on a GPU.
MOST_SORTED = 2**31 - 1
#: Rows of tokens (and heads), which kernels number in 32 bits: two programs for each are a launch.
MOST_TOKENS = 2**30 - 1
#: What kernels number in 32 bits in one call of the whole memory.
MOST_ACCESSES = 2**30 - 1
#: Heads, and sub-keys of a half: two heads' halves, and tiles of 64 sub-keys, are axes of a launch, of 65535 at most.
MOST_HEADS, MOST_KEYS = 2**14, 2**21


class Plan(NamedTuple):
    """Accesses sorted by the table row that they touch; every field is [A], one entry per sorted position."""

    order: Tensor  #: int64: which access stands at this position
    rows: Tensor  #: the row that it touches, ascending
    start: Tensor  #: where the segment of that row begins, in `position_dtype`
    end: Tensor  #: one past where it ends, likewise


def plan_segments(slots: Tensor, num_slots: int) -> Plan:
    """Sort the accesses `slots` (any shape, read flat, values in [0, num_slots)) into segments.

    Never synchronises with the host. The sort is of int32 keys where the slots fit, which takes half the passes; not
    under TRITON_DEBUG, where kernels assert that they do.
    """
    check_sort("slots", slots)
    keys = slots.reshape(-1)
    if keys.is_cuda and not ASSERTS:
        keys = keys.to(row_dtype(num_slots))
    rows, order = torch.sort(keys, stable=True)
    is_narrow = position_dtype(keys.numel()) == torch.int32
    start = torch.searchsorted(rows, rows, out_int32=is_narrow)
    end = torch.searchsorted(rows, rows, right=True, out_int32=is_narrow)
    return Plan(order, rows, start, end)


def plan_picks(sub_keys: Tensor, half_scores: Tensor, num_keys: int, *, first_row: int = 0) -> "PickPlan":
    """Which tokens picked each sub-key, by Triton kernels: for the few rows of a table of sub-keys.

    `sub_keys` and `half_scores` [M, H, 2, K], contiguous, are those that a lookup gives. The usage is that of the rows
    from `first_row` on.
    """
    from .kernels.picks import can_plan
    from .kernels.picks import plan_picks as launch

    rows, heads, _, top_k = sub_keys.shape
    listed = None
    if not can_plan(rows, heads, num_keys):
        plan = plan_segments(sub_keys, heads * 2 * num_keys)
        bounds = torch.arange(heads * 2 * num_keys + 1, dtype=plan.rows.dtype, device=sub_keys.device)
        first = torch.searchsorted(plan.rows, bounds, out_int32=plan.start.dtype == torch.int32)
        listed = (plan.order // (2 * heads * top_k), plan.order, first)
    return launch(sub_keys, half_scores, num_keys=num_keys, first_row=first_row, listed=listed)


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

    What no access names counts for none, as any number outside of the table.
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


def exceeds(size: int, most: int) -> bool:
    """Whether size > most; where something traces, whether every size that may come does.

    What is traced then serves all sizes, and the operators' bodies, which see numbers, ask again.
    """
    if torch.compiler.is_compiling() or isinstance(size, torch.SymInt) or isinstance(most, torch.SymInt):
        from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import

        return statically_known_true(size > most)
    return size > most


def check_sort(name: str, slots: Tensor) -> None:
    """No more slots than can be sorted where they are."""
    if slots.is_cuda and exceeds(slots.numel(), MOST_SORTED):
        raise ValueError(
            f"`{name}` must hold at most {MOST_SORTED} slots to be sorted on a GPU, got shape {list(slots.shape)}"
        )


def check_tokens(name: str, x: Tensor, num_tokens: int) -> None:
    """No more tokens (times heads) than the kernels number in 32 bits."""
    if exceeds(num_tokens, MOST_TOKENS):
        raise ValueError(
            f"`{name}` must hold at most {MOST_TOKENS} tokens (times heads) in one call, got shape {list(x.shape)}"
        )


def check_num_keys(keys: Tensor) -> None:
    """No more heads and sub-keys [H, 2, n, Dk/2] than the kernels number in 32 bits and launch."""
    heads, _, num_keys, _ = keys.shape
    limits = ((heads, MOST_HEADS), (num_keys, MOST_KEYS), (2 * heads * num_keys, NARROW_ROWS))
    if any(exceeds(size, most) for size, most in limits):
        raise ValueError(
            f"`keys` [H, 2, n, Dk/2] must have at most {MOST_HEADS} heads, {MOST_KEYS} sub-keys in each half, and "
            f"{NARROW_ROWS} in all, got shape {list(keys.shape)}"
        )


def check_num_accesses(queries: Tensor, num_accesses: int) -> None:
    """No more accesses than the kernels of a sequence number in 32 bits."""
    if exceeds(num_accesses, MOST_ACCESSES):
        raise ValueError(
            f"`queries` [B, T, H, Dk] must make at most {MOST_ACCESSES} accesses in one call, top_k for each head and "
            f"token, and those that are read again; got {num_accesses} for shape {list(queries.shape)}"
        )


def check_rows(plan: Plan, num_slots: int, name: str = "slots") -> None:
    """On CPU tensors, where it costs no synchronisation: the plan names rows in [0, num_slots) only."""
    if plan.rows.device.type == "cpu" and plan.rows.numel() > 0:
        low, high = int(plan.rows[0]), int(plan.rows[-1])
        if low < 0 or high >= num_slots:
            raise ValueError(f"`{name}` must lie in [0, {num_slots}), got values from {low} to {high}")


def segment_totals(plan: Plan, vectors: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of the segments in plain PyTorch: (positions [U], rows [U], totals [U, D]) for the U distinct rows.

    totals[u] = Σ_a coefficients[a]·vectors[a // PER_VECTOR], in order. Its shapes depend on the data: for CPUs.
    """
    positions = torch.nonzero(plan.start == torch.arange(plan.start.numel(), device=plan.start.device)).flatten()
    rows = plan.rows[positions].long()
    if positions.numel() == 0 or vectors.shape[1] == 0:
        return positions, rows, vectors.new_empty(positions.numel(), vectors.shape[1])
    per_vector = plan.order.numel() // vectors.shape[0]
    totals = F.embedding_bag(
        plan.order // per_vector,
        vectors.contiguous(),
        positions,
        mode="sum",
        per_sample_weights=coefficients.reshape(-1)[plan.order],
    )
    return positions, rows, totals


def sum_at(index: Tensor, x: Tensor, size: int) -> Tensor:
    """The rows of x summed at `index`, [size, ...], in a fixed order on either device; differentiable."""
    zeros = x.new_zeros(size, *x.shape[1:])
    if x.is_cuda:  # where index_add is atomic, and accumulation at indices is sorted
        return zeros.index_put((index.long(),), x, accumulate=True)
    return zeros.index_add(0, index, x)
