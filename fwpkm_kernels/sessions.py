"""The sessions of a pool: what each holds on the device, copies of it, and how it is saved and loaded."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _checks as checks
from .binding import Binding, check_initial_memory, make_queue
from .pages import INITIAL, Pages, Shelf
from .records import Queue
from .saving import check_saved, saved_memory


class PoolFullError(RuntimeError):
    """A pool has too few free rows for what a call would write; nothing has been written."""

    def __init__(self, wanted: int, free: int, capacity: int, what: str) -> None:
        self.missing = wanted - free  #: how many rows more would be enough
        super().__init__(
            f"the pool is full: {self.missing} rows are missing, since {what} would take {wanted} new rows and {free} "
            f"of `capacity`={capacity} are free. Close or evict a session, or grow the pool"
        )


@dataclass
class Session:
    """What is known on the host of a session."""

    seat: int  #: of index and queue
    keys: int = 0  #: the seat of its keys; 0 until they move
    position: int = 0
    past: "Session | None" = None  #: as it was before its last chunk was written, its tokens still waiting
    stored: dict[str, Tensor] | None = None  #: all that it was, on the host, while it is evicted


def _held(one: Session) -> list[Session]:
    """A session and its past, as far as they are there and on the device."""
    return [x for x in (one, one.past) if x is not None and x.stored is None]


class SessionStore:
    """What the sessions of a pool read and write, over one initial memory."""

    def __init__(self, keys: Tensor, values: Tensor, capacity: int, grows: bool) -> None:
        check_initial_memory(keys, values)
        self._initial_keys, self._initial_values = keys, values
        self.binding: Binding | None = None
        self.grows = grows  #: whether there is room for as many rows as are wanted
        self.pages = Pages(capacity, values)
        #: Index [seats, N], then the tensors of `Queue`, [seats, L + C or C, ...], once they are bound.
        self.shelf = Shelf([torch.zeros(1, values.shape[0], dtype=torch.int32, device=values.device)])
        self.keys = Shelf([torch.empty(1, *keys.shape, dtype=keys.dtype, device=keys.device)])
        self.keys.take()  # seat 0 has the initial ones
        self.touched = torch.zeros(values.shape[0], dtype=torch.uint8, device=values.device)  #: plans mark it
        self.initial = values.detach()  #: the table that all share, [N, D]

    @property
    def device(self) -> torch.device:
        return self.pages.buffer.device

    @property
    def indices(self) -> Tensor:
        """Which row of the buffer holds each slot, int32 [seats, N]."""
        return self.shelf.tensors[0]

    @property
    def queue(self) -> Queue:
        """The queues of all seats."""
        return Queue(*self.shelf.tensors[1:])

    def queue_of(self, seat: int) -> Queue:
        """The queue of one seat, as that of a batch of one."""
        return Queue(*(x[seat].unsqueeze(1) for x in self.shelf.tensors[1:]))

    @property
    def chunk_size(self) -> int:
        """1 where nothing is bound, and so nothing read."""
        return 1 if self.binding is None else self.binding.options.chunk_size

    def bind(self, binding: Binding) -> None:
        """Make the queues for what is bound."""
        queue = make_queue(self._initial_keys, self._initial_values, binding, self.device)
        self.shelf.add([x.transpose(0, 1) for x in queue])
        self.binding = binding

    def unbind(self) -> None:
        """Undo `bind`; no session has read anything since."""
        del self.shelf.tensors[1:]
        self.binding = None

    def new(self) -> Session:
        """A session at the beginning, with the initial memory as it is now."""
        keys, values = self._initial_keys, self._initial_values
        self._check_as_before(keys, values)
        self.keys.tensors[0][0] = keys
        self.initial = values.detach()
        return self._new(0)

    def rebind(self, keys: Tensor, values: Tensor) -> None:
        """Let sessions begin with another initial memory from now on; see `MemoryPool._rebind`."""
        self._check_as_before(keys, values)
        self._initial_keys, self._initial_values = keys, values

    def _check_as_before(self, keys: Tensor, values: Tensor) -> None:
        """Refuse an initial memory that is none, or unlike the one for which the tensors were made."""
        check_initial_memory(keys, values)
        for name, x, like in (("keys", keys, self.keys.tensors[0][0]), ("values", values, self.initial)):
            if (x.dtype, x.device, x.shape) != (like.dtype, like.device, like.shape):
                raise RuntimeError(
                    f"`{name}` of the pool must stay {checks.shape(like)} of {like.dtype} on {like.device}, got "
                    f"{checks.shape(x)} of {x.dtype} on {x.device}: make a new pool"
                )

    def _new(self, position: int) -> Session:
        seat = self.shelf.take()
        self.indices[seat].fill_(INITIAL)
        return Session(seat, position=position)

    def copy(self, one: Session) -> Session:
        """A session that shares the rows of another, and has the rest for itself, but no past."""
        with ExitStack() as undo:
            seat, keys = self.shelf.copy(one.seat), 0
            undo.callback(self.shelf.give, seat)
            if one.keys:
                keys = self.keys.copy(one.keys)
                undo.callback(self.keys.give, keys)
            self.pages.share(self.indices[seat])
            undo.pop_all()
        return Session(seat, keys, one.position)

    def replace(self, one: Session) -> Session:
        """A session at the beginning in place of another, which is dropped."""
        new = self.new()
        with ExitStack() as undo:
            undo.callback(self.shelf.give, new.seat)
            self.drop(one)
            undo.pop_all()
        return new

    def drop(self, *ones: Session) -> None:
        """Free what sessions and their pasts hold on the device: of all, or where memory ends of none."""
        self.release([held for one in ones for held in _held(one)])

    def release(self, ones: Sequence[Session]) -> None:
        """Free what sessions hold on the device, without their pasts: of all, or where memory ends of none."""
        self.pages.release_all([self.indices[one.seat] for one in ones])
        self._give_seats(ones)

    def _give_seats(self, ones: Sequence[Session]) -> None:
        for one in ones:
            self.shelf.give(one.seat)
            if one.keys:
                self.keys.give(one.keys)

    def move(self, one: Session, position: int) -> None:
        """Take a session back to a position in its present chunk; an evicted one is saved again as it is there."""
        if one.stored is not None and self.binding is not None and "binding" in one.stored:
            queue = Queue(*(one.stored[f"queue.{name}"] for name in Queue._fields))
            tensors = {name: one.stored[name] for name in ("slots", "rows", "keys")}
            tensors["position"] = torch.tensor(position, dtype=torch.int64, device="cpu")
            one.stored = saved_memory(tensors, self.binding, queue)
        one.position = position

    def reach(self, one: Session) -> int:
        """How many of its last tokens a session can take back."""
        return one.position % self.chunk_size + (0 if one.past is None else self.chunk_size)

    def count_rows(self, one: Session) -> int:
        """How many rows a session holds, its past not included. This waits for a GPU."""
        return 0 if one.stored is not None else int((self.indices[one.seat] != INITIAL).sum())

    def _count_own(self, one: Session) -> int:
        """How many rows are free when a session and its past are dropped. This waits for a GPU."""
        return int(self.pages.without([self.indices[x.seat] for x in _held(one)])[1].sum())

    def most_wanted(self, one: Session, chunks: int, accesses: int, keep_past: bool) -> int:
        """How many free rows a session needs at most to write so many chunks of so many accesses. Waits for a GPU."""
        of_chunk, slots = min(accesses, len(self.initial)), len(self.initial)
        held = min(self.count_rows(one) + chunks * of_chunk, slots) + (of_chunk if keep_past else 0)
        return max(0, held - self._count_own(one))

    def make_room(self, wanted: int, what: str) -> None:
        """Let there be so many free rows.

        A pool that grows does so by half, but not beyond what all its seats can hold, unless more rows are missing.

        Raises:
            PoolFullError: the pool does not grow. Nothing has changed then.
        """
        missing, capacity = wanted - self.pages.num_free, len(self.pages.buffer)
        if missing <= 0:
            return
        if not self.grows:
            raise PoolFullError(wanted, self.pages.num_free, capacity, what)
        self.pages.grow(max(missing, min(capacity // 2, self.indices.numel() - capacity)))

    def save(self, one: Session) -> dict[str, Tensor]:
        """Copies of all that a session is but the initial memory."""
        if one.stored is not None:
            return {name: x.clone() for name, x in one.stored.items()}
        index = self.indices[one.seat]
        slots = torch.nonzero(index != INITIAL).flatten()
        tensors = {"slots": slots, "rows": self.pages.buffer[index[slots].long()]}
        tensors["keys"] = self.keys.tensors[0][one.keys]
        tensors["position"] = torch.tensor(one.position, dtype=torch.int64, device="cpu")
        return saved_memory(tensors, self.binding, None if self.binding is None else self.queue_of(one.seat))

    def load(self, state_dict: Mapping[str, Tensor], replaced: Session) -> Session:
        """The session that was saved, in place of another, which is dropped.

        An error leaves both sessions and rows as they were, also where memory ends; a pool that grows may have grown.
        """
        buffer, own_keys = self.pages.buffer, self.keys.tensors[0][0]
        slots = state_dict.get("slots") if isinstance(state_dict, Mapping) else None
        count = slots.numel() if isinstance(slots, Tensor) else 0
        expected = {
            "slots": torch.empty(count, dtype=torch.int64, device="meta"),
            "rows": torch.empty(count, buffer.shape[1], dtype=buffer.dtype, device="meta"),
            "keys": own_keys,
            "position": torch.empty((), dtype=torch.int64, device="meta"),
        }
        binding = check_saved(state_dict, expected, own_keys, self.initial, self.binding)
        if binding is not None and binding.batch != 1:
            raise ValueError(f"`state_dict` must be of one session, got a binding with batch {binding.batch}")
        on_host = state_dict["slots"].cpu()
        checks.check_slot_range("state_dict['slots']", on_host, len(self.initial))
        if len(on_host.unique()) < count:
            raise ValueError("`state_dict` must name each slot once in 'slots'")
        self.make_room(count - self._count_own(replaced), "the saved session")
        slots, rows, keys = (state_dict[name].to(self.device) for name in ("slots", "rows", "keys"))
        with ExitStack() as undo:
            if binding is not None and self.binding is None:
                self.bind(binding)
                undo.callback(self.unbind)
            one = self._new(int(state_dict["position"]))
            undo.callback(self.shelf.give, one.seat)
            if not torch.equal(keys, own_keys):
                one.keys = self.keys.take()
                undo.callback(self.keys.give, one.keys)
                self.keys.tensors[0][one.keys] = keys
            if binding is not None:
                for name, x in self.queue_of(one.seat)._asdict().items():
                    x.copy_(state_dict[f"queue.{name}"])
            held = _held(replaced)
            self.pages.exchange([self.indices[x.seat] for x in held], self.indices[one.seat], slots, rows)
            undo.pop_all()
        self._give_seats(held)
        return one
