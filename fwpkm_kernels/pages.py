"""Where the sessions of a `MemoryPool` keep what they have written: rows of one buffer, with an index for each session.

A page is one row of the buffer. Larger pages would need fewer numbers for the same rows, but the rows that a chunk
writes are scattered over a table: pages of them would be partly empty, and a fork would copy whole pages for single
rows. At the paper's size, with 4 096 random tokens read by keys as a layer draws them, the next chunk of a fork writes
550 of the 30 000 rows that it shares, and copies these; in pages of 16 it would copy 7 600.

So a session's index says for each slot which row of the buffer holds its value, or that the session still reads the
initial table, and a count for each row says how many indices name it.
"""

from collections.abc import Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from . import _checks as checks
from .compact import put_rows, take_rows
from .records import Plan

#: What an index says of a slot whose value is that of the initial table.
INITIAL = -1

#: Bytes of the units in which a capacity may be given.
_UNITS = MappingProxyType({"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40})


def count_rows(capacity: object, row_bytes: int) -> int:
    """How many rows a capacity means: a number of rows, or a text as "2 GiB"."""
    if not isinstance(capacity, str):
        return _check_rows(checks.check_int("capacity", capacity, minimum=0))
    number, unit = capacity.strip()[:-3], capacity.strip()[-3:]
    try:
        size = int(float(number) * _UNITS[unit])
        if size < 0:
            raise ValueError
    except (KeyError, ValueError, OverflowError):
        raise ValueError(
            f"`capacity` must be a number of rows, or bytes as '2 GiB' (KiB, MiB, GiB, TiB) and not negative, "
            f"got {capacity!r}"
        ) from None
    return _check_rows(size // max(1, row_bytes))


def _check_rows(rows: int) -> int:
    """Refuse a buffer whose rows an int32 could not number."""
    if rows >= checks.NARROW_ROWS:
        raise ValueError(f"`capacity` must be below {checks.NARROW_ROWS} rows, got {rows}")
    return rows


class Shelf:
    """Tensors [seats, ...], of which seats are lent out; they grow by an eighth when more are asked for than there are.

    Then they are other tensors, so captured graphs end there.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        self._free = list(range(len(tensors[0])))

    def add(self, tensors: Sequence[Tensor]) -> None:
        """More tensors with the same seats, from tensors [1, ...]."""
        self.tensors += [x.new_zeros(len(self.tensors[0]), *x.shape[1:]) for x in tensors]

    def take(self) -> int:
        """A seat, whose tensors hold anything."""
        if not self._free:
            seats = len(self.tensors[0])
            more = max(1, seats // 8)
            grown = [x.new_zeros(seats + more, *x.shape[1:]) for x in self.tensors]
            for new, x in zip(grown, self.tensors, strict=True):
                new[:seats] = x
            self.tensors, self._free = grown, list(range(seats + more - 1, seats - 1, -1))
        return self._free.pop()

    def give(self, seat: int) -> None:
        """Take a seat back."""
        self._free.append(seat)

    def copy(self, seat: int) -> int:
        """Another seat with the same contents."""
        other = self.take()
        for x in self.tensors:
            x[other] = x[seat]
        return other

    @property
    def num_bytes(self) -> int:
        """Of one seat."""
        return sum(x[0].numel() * x.itemsize for x in self.tensors)


class Missing:
    """Which rows of a chunk's plan a session must get before it may write them: counted without waiting for a GPU.

    Those are the ones that it has never written, and those that it shares; with `keep_past`, all. `references` says how
    many indices will name each row when the chunk is written. Without `keep_past` the session lets the shared rows go
    then, so they are counted off for the chunks that are written after it.
    """

    def __init__(self, references: Tensor, index: Tensor, plan: Plan, keep_past: bool) -> None:
        self._rows, positions = plan.rows, torch.arange(len(plan.start), device=plan.start.device)
        rows = index[plan.rows.long()]
        is_written = rows != INITIAL
        is_shared = is_written if keep_past else is_written & (references[rows.clamp(min=0).long()] > 1)
        is_first = positions == plan.start  # of its row
        self._is_missing = is_first & (is_shared | ~is_written)
        #: int64 [2]: how many rows are missing, and how many of these are shared.
        self.counts = torch.stack((self._is_missing.sum(), (is_first & is_shared).sum()))
        if not keep_past:
            let_go = (is_first & is_shared).to(references.dtype)
            references.index_add_(0, rows.clamp(min=0).long(), let_go, alpha=-1)

    def slots(self, count: int) -> Tensor:
        """The slots whose rows are missing, int64 [count]; `count` is known, so nothing waits for it."""
        order = torch.argsort(self._is_missing.to(torch.uint8), descending=True, stable=True)
        return self._rows[order[:count]].long()


class Pages:
    """A buffer of rows, how many indices name each, and which are free."""

    def __init__(self, capacity: int, values: Tensor) -> None:
        device = values.device
        self.buffer = torch.empty(capacity, values.shape[1], dtype=values.dtype, device=device)
        self.references = torch.zeros(max(1, capacity), dtype=torch.int32, device=device)
        self._free = torch.arange(capacity - 1, -1, -1, dtype=torch.int32, device=device)  # the first `num_free` ones
        self.num_free = capacity

    def find(self, count: int) -> Tensor:
        """Rows that are free, int32 [count]; the caller has seen that there are as many."""
        if count > self.num_free:
            raise RuntimeError(f"`count` must be at most the {self.num_free} rows that are free, got {count}")
        return self._free[self.num_free - count : self.num_free].clone()

    def grow(self, rows: int) -> None:
        """Add free rows, which are taken after those that are free already; the buffer is another tensor then."""
        before = len(self.buffer)
        capacity = _check_rows(before + rows)
        buffer = self.buffer.new_empty(capacity, self.buffer.shape[1])
        references = self.references.new_zeros(max(1, capacity))
        buffer[:before], references[:before] = self.buffer, self.references[:before]
        more = torch.arange(capacity - 1, before - 1, -1, dtype=torch.int32, device=buffer.device)
        self.buffer, self.references, self._free = buffer, references, torch.cat((more, self._free))
        self.num_free += rows

    def share(self, index: Tensor) -> None:
        """Count another index that names the same rows as this one. This waits for a GPU."""
        rows = index[index != INITIAL].long()
        self.references[rows] += 1

    def without(self, indices: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """How many indices name each row when these [N] no longer do, int32, and whether it is free by that, bool.

        Both are known without waiting for a GPU.
        """
        references = self.references.clone()
        for index in indices:
            references.index_add_(0, index.clamp(min=0).long(), (index != INITIAL).to(references.dtype), alpha=-1)
        return references, (self.references > 0) & (references == 0)

    def release_all(self, indices: Sequence[Tensor]) -> None:
        """Let indices [N] name no rows any more; those that none names are free then. This waits for a GPU."""
        nowhere = self._free[:0]
        self.exchange(indices, nowhere, nowhere.long(), self.buffer[:0])

    def exchange(self, indices: Sequence[Tensor], index: Tensor, slots: Tensor, values: Tensor) -> None:
        """Release all rows of some indices, and give another one, which has none there, rows of these values at slots.

        The caller has seen that there are as many. This waits for a GPU. Where memory ends, nothing has changed.
        """
        references, is_freed = self.without(indices)
        free = torch.cat((self._free[: self.num_free], is_freed.nonzero().flatten().to(torch.int32)))
        left = len(free) - len(slots)
        taken = free[left:].long()
        references.index_fill_(0, taken, 1)
        # From here on nothing is allocated.
        self.buffer.index_copy_(0, taken, values)
        index.index_copy_(0, slots, free[left:])
        for one in indices:
            one.fill_(INITIAL)
        self._free[:left] = free[:left]
        self.references, self.num_free = references, left

    def own(self, index: Tensor, slots: Tensor, num_shared: int, initial: Tensor, backend: str) -> None:
        """Give an index rows of its own at these slots, with the values that it reads there now.

        `num_shared` is how many of them it shares by now. It is known, and no shared row can be free afterwards, since
        others name it: so nothing here waits for a GPU. Where memory ends, no row has been given.
        """
        if len(slots) == 0:
            return
        old, taken = index[slots].long(), self.find(len(slots))
        rows_taken, shared, is_shared = taken.long(), old.clamp(min=0), (old != INITIAL).to(self.references.dtype)
        sources = [(initial, torch.where(old == INITIAL, slots, -1))]
        if num_shared > 0:
            sources.append((self.buffer, old))
        for source, rows in sources:
            copied = take_rows(source, rows, backend)
            put_rows(self.buffer, torch.where(rows < 0, -1, rows_taken), copied, backend)
        # The rows are still free, whatever is in them, until all that takes memory is done.
        self.num_free -= len(slots)
        self.references.index_fill_(0, rows_taken, 1)
        if num_shared > 0:
            self.references.index_add_(0, shared, is_shared, alpha=-1)
        index.index_copy_(0, slots, taken)

    def look_up(self, slots: Tensor, rows: Tensor, initial: Tensor) -> Tensor:
        """The values [A, D] of slots [A] whose index says `rows` [A]: of the buffer, or of the initial table."""
        values = initial.index_select(0, slots)
        is_own = rows != INITIAL
        values[is_own] = self.buffer[rows[is_own].long()]
        return values


def rows_of(index: Tensor, slots: Tensor) -> Tensor:
    """The rows of the buffer, int64 and like `slots`, of slots that all have one."""
    return index[slots.long()].long()
