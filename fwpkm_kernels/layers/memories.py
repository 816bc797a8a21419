"""What a memory that streams holds for its sequences: sessions of a pool, or states with a table each."""

import operator
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from ..columns import own_columns
from ..options import Options
from ..pool import MemoryPool
from ..records import Tokens
from ..state import MemoryState
from ..streaming import fast_weight_memory_step

if TYPE_CHECKING:
    from .fast_weight import FastWeightProductKeyMemory


class Origin:
    """The layer with whose own keys and table sequences have begun; it may have others now, as a load can assign them.

    There is none where the layer casts or computes them, none any more where it is gone, and none for what was pickled.
    """

    def __init__(self, layer: "FastWeightProductKeyMemory | None" = None) -> None:
        self._layer = None if layer is None else weakref.ref(layer)

    @classmethod
    def of(cls, layer: "FastWeightProductKeyMemory", keys: Tensor, values: Tensor) -> "Origin":
        return cls(layer if _are_same((keys, values), _initial(layer)) else None)

    def __reduce__(self) -> Any:
        return Origin, ()

    @property
    def tensors(self) -> tuple[Tensor, Tensor] | None:
        """The layer's keys and table as they are now; None where it computes them anew for each use, or they have no
        data, as those of an offloaded layer between its calls."""
        layer = None if self._layer is None else self._layer()
        if layer is None:
            return None
        keys, values = layer.keys, layer.table.weight
        if keys is not layer.keys or values is not layer.table.weight or keys.is_meta or values.is_meta:
            return None
        keys, values = layer._in_memory_dtype(*_initial(layer))
        return keys, values


def _initial(layer: "FastWeightProductKeyMemory") -> tuple[Tensor, Tensor]:
    """The layer's keys, and the columns of its table that this rank has.

    Raises:
        RuntimeError: FSDP has rows of them elsewhere.
    """
    return own_columns("keys", layer.keys, None), layer.table.columns


def _are_same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether tensors are others, or lie where they do. What has no data of its own has no address, and is itself."""

    def place(x: Tensor) -> tuple[Any, ...]:
        return x.data_ptr(), x.device, x.shape, x.stride(), x.dtype

    return all(x is y or (x.data_ptr() != 0 and place(x) == place(y)) for x, y in zip(some, others, strict=True))


class Pooled:
    """Sessions of one `MemoryPool`, which one call steps: each costs its index and the rows that it has written."""

    def __init__(self, pool: MemoryPool, sessions: list[int], origin: Origin | None = None) -> None:
        self.pool, self.sessions, self._origin = pool, sessions, origin or Origin()
        self._begin()

    def __del__(self) -> None:
        if "pool" in vars(self):  # torch.compile makes objects without __init__
            self.pool._ended.extend(self.sessions)  # a device may be busy now

    @property
    def keys(self) -> Tensor:
        return self.pool.keys

    @property
    def values(self) -> Tensor:
        """The initial table."""
        return self.pool.values

    @property
    def dtype(self) -> torch.dtype:
        return self.pool.dtype

    @property
    def device(self) -> torch.device:
        return self.pool.device

    @property
    def positions(self) -> list[int]:
        return [self.pool.position(session) for session in self.sessions]

    @property
    def reach(self) -> list[int]:
        """How many of its last tokens each sequence can take back."""
        return [self.pool.reach(session) for session in self.sessions]

    @property
    def num_bytes(self) -> int:
        return sum(map(self.pool.num_bytes, self.sessions))

    @_disable_dynamo
    def step(self, tokens: Tokens, lengths: list[int] | None, o: Options, record: bool) -> Tensor:
        """Read the next tokens [S, t, ...], the last `lengths` of each row; with `record`, keep pasts."""
        pool, (queries, targets, gates, _) = self.pool, tokens
        self._check_contents()
        keep_past, pool.keep_past = pool.keep_past, pool.keep_past or record
        try:
            how: dict[str, Any] = {"sessions": self.sessions, "lengths": lengths, **o._asdict()}
            return fast_weight_memory_step(pool, queries, targets, gates=gates, **how)
        finally:
            pool.keep_past = keep_past

    def _begin(self) -> None:
        """Note with which keys and values the sessions begin."""
        self._begun = (self.pool.keys, self.pool.values), _versions_of(self.pool)

    @property
    def is_stale(self) -> bool:
        """Whether these have been written since, or another memory's reset has given the pool others in their place."""
        (keys, values), versions = self._begun
        return self.pool.keys is not keys or self.pool.values is not values or _versions_of(self.pool) != versions

    def _check_contents(self) -> None:
        _check_data(self.pool.keys, self.pool.values)
        if self.is_stale:
            raise RuntimeError(
                "`memory` goes on from the layer's keys and table where they lie, and these have been written or "
                "replaced since: let the sequences begin anew by reset(), or make another memory"
            )

    def rollback(self, tokens: int) -> None:
        for session in self.sessions:
            self.pool.rollback(session, tokens)

    def select(self, rows: list[int]) -> None:
        """Let these sequences go on; of one that comes twice the second is a fork."""
        for row in rows:
            if rows.count(row) > 1:  # a fork must not be refused once others are closed
                self.pool._present(self.sessions[row], "session")
        for row in {*range(len(self.sessions))} - {*rows}:
            self.pool.close(self.sessions[row])
        self.sessions = [
            self.sessions[row] if row not in rows[:place] else self.pool.fork(self.sessions[row])
            for place, row in enumerate(rows)
        ]

    def reset(self) -> None:
        tensors = self._origin.tensors if self.sessions else None  # without sessions the pool is for others to change
        if tensors is not None and not _are_same(tensors, (self.pool.keys, self.pool.values)):
            self.pool._rebind(*tensors)
        if self.sessions:
            _check_data(self.pool.keys, self.pool.values)
        for session in self.sessions:
            self.pool.reset(session)
        self._begin()

    def close(self) -> None:
        """Free what the sequences hold."""
        while self.sessions:
            self.pool.close(self.sessions.pop())

    def copy(self, device: torch.device | None = None) -> "Pooled":
        """Forks in the same pool, or the same sessions in a pool on another device, with a copy of keys and table."""
        if device is None or device == self.pool.device:
            other = Pooled(self.pool, [], self._origin)  # which frees what it has where a fork is refused
            other._begun = self._begun
            for session in self.sessions:
                other.sessions.append(self.pool.fork(session))
            return other
        keys, values = (x.detach().to(device) for x in (self.keys, self.values))
        return _load(keys, values, *self._saved())

    def _saved(self) -> tuple[int | None, list[dict[str, Tensor]]]:
        self._check_contents()
        capacity = None if self.pool.grows else self.pool.capacity
        return capacity, [self.pool.state_dict(session) for session in self.sessions]

    def __reduce__(self) -> Any:
        return _load, (self.keys, self.values, *self._saved())


def _load(keys: Tensor, values: Tensor, capacity: int | None, saved: list[dict[str, Tensor]]) -> Pooled:
    """Sessions that were saved, in a pool of their own, which has room for them although they share no rows now."""
    pool = MemoryPool(keys, values, capacity=capacity)
    pool.grow(max(0, sum(len(x["slots"]) for x in saved) - pool.capacity))
    sessions = [pool.open() for _ in saved]
    for session, state_dict in zip(sessions, saved, strict=True):
        pool.load_state_dict(session, state_dict)
    return Pooled(pool, sessions)


def _check_data(keys: Tensor, values: Tensor) -> None:
    """Refuse an initial memory whose data FSDP has freed: a kernel would read at no address, or what came after it."""
    for name, x in (("keys", keys), ("table", values)):
        if x.numel() > 0 and not x.is_meta and x.untyped_storage().size() == 0:
            raise RuntimeError(
                f"`memory` goes on from the layer's keys and table where they lie, and fully_shard has freed the {name}"
                " by a reshard(): call unshard() of the module before, and reshard() once the memory is read"
            )


def _versions_of(pool: MemoryPool) -> list[int]:
    """How often keys and values of a pool have been written in place, as far as that is known."""
    return [0 if x.is_inference() else x._version for x in (pool.keys, pool.values)]


class Past(NamedTuple):
    """A state as it was before it read tokens that completed a chunk, and these tokens."""

    state: MemoryState
    tokens: Tokens


def _cut(tokens: Tokens, part: slice) -> Tokens:
    """Some of the tokens [S, t, ...] of each row."""
    return tokens.map(lambda x: x[:, part])


class States:
    """A `MemoryState` for each sequence, or one for all of a batch; steps go from one to the next."""

    def __init__(self, states: list[MemoryState], options: Options, origin: Origin | None = None) -> None:
        self.states, self._options, self._origin = states, options, origin or Origin()
        self._pasts: list[Past | None] = [None] * len(states)

    @property
    def keys(self) -> Tensor:
        return self._first.keys

    @property
    def values(self) -> Tensor:
        return self._first.values

    @property
    def _first(self) -> MemoryState:
        if not self.states:
            raise ValueError(
                "`memory` must be for one sequence at least to have a dtype and a device, got one for none"
            )
        return self.states[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def positions(self) -> list[int]:
        return [state.position for state in self.states]

    @property
    def reach(self) -> list[int]:
        """How many of its last tokens each state can take back."""
        chunk_size = self._options.chunk_size
        begins = [
            state.position if past is None else past.state.position
            for state, past in zip(self.states, self._pasts, strict=True)
        ]
        return [position - begin + begin % chunk_size for position, begin in zip(self.positions, begins, strict=True)]

    @property
    def num_bytes(self) -> int:
        return sum(x.nbytes for state in self.states for x in state.named_tensors().values())

    def step(self, tokens: Tokens, lengths: list[int] | None, o: Options, record: bool) -> Tensor:
        """Read the next tokens [S, t, ...], the last `lengths` of each row; or [B, t, ...] where one state has all."""
        self._options = o
        if len(self.states) == 1 and lengths is None:
            return self._read(0, tokens, record)
        length = tokens.targets.shape[1]
        output = torch.zeros_like(tokens.targets)
        for row, count in enumerate(lengths or [length] * len(self.states)):
            part = slice(length - count, length)
            of_row = tokens.map(operator.itemgetter(slice(row, row + 1)))
            output[row : row + 1, part] = self._read(row, _cut(of_row, part), record)
        return output

    def _read(self, index: int, tokens: Tokens, record: bool) -> Tensor:
        """Read with one state; with `record`, the last C tokens of a full chunk can be taken back."""
        state, length, chunk_size = self.states[index], tokens.targets.shape[1], self._options.chunk_size
        if not record:
            self._pasts[index] = None
        if not record or state.position % chunk_size + length < chunk_size:
            return self._step(index, tokens)
        skipped = max(0, length - chunk_size)
        outputs = [self._step(index, _cut(tokens, slice(skipped)))] if skipped else []
        past = Past(state.clone(), _cut(tokens, slice(skipped, None)))
        outputs.append(self._step(index, past.tokens))
        self._pasts[index] = past
        return torch.cat(outputs, dim=1)

    def _step(self, index: int, tokens: Tokens) -> Tensor:
        queries, targets, gates, mask = tokens
        how: dict[str, Any] = {"gates": gates, "mask": mask, **self._options._asdict()}
        return fast_weight_memory_step(self.states[index], queries, targets, **how)

    def rollback(self, tokens: int) -> None:
        for index, (state, past) in enumerate(zip(self.states, self._pasts, strict=True)):
            if past is None or tokens <= state.position % self._options.chunk_size:
                state.rollback(tokens)
                continue
            kept = state.position - tokens - past.state.position  # of the recorded tokens
            self.states[index], self._pasts[index] = past.state, None
            if kept < 0:
                past.state.rollback(-kept)
            else:
                self._step(index, _cut(past.tokens, slice(kept)))

    @torch.inference_mode(False)  # so a copy made in inference mode can be stepped outside of it
    def select(self, rows: list[int]) -> None:
        """Let these states go on; of one that comes twice the second is a copy."""
        taken = [(row, row in rows[:place]) for place, row in enumerate(rows)]
        self._pasts = [None if is_again else self._pasts[row] for row, is_again in taken]
        self.states = [self.states[row].clone() if is_again else self.states[row] for row, is_again in taken]

    def select_batch(self, rows: list[int]) -> None:
        """Let these sequences of the one state of a batch go on."""
        if self.states[0]._binding is not None:  # a state that is not bound has no rows yet
            self.states[0].select_(rows)
        self._pasts = [None]

    def reset(self) -> None:
        tensors = self._origin.tensors
        for state in self.states:
            # A state that is tied to other tensors would restore its whole table, and not the rows that it has written.
            if tensors is not None and not _are_same(tensors, (state._initial_keys, state._initial_values)):
                state.rebind(*tensors)
            _check_data(state._initial_keys, state._initial_values)
            state.reset()
        self._pasts = [None] * len(self.states)

    def close(self) -> None:
        """Free the tables."""
        self.states, self._pasts = [], []

    @torch.inference_mode(False)
    def copy(self, device: torch.device | None = None) -> "States":
        """Independent copies, which share the initial memory and have no past."""
        states = [state.clone() if device is None else state.to(device) for state in self.states]
        return States(states, self._options, self._origin)


Memories = Pooled | States


def make_memories(layer: "FastWeightProductKeyMemory", count: int, capacity: int | str | None, pool: Any) -> Memories:
    """Memories for so many sequences of a layer, or under scope="batch" one for all of them.

    Raises:
        TypeError, ValueError: as `new_memory` of the layer.
    """
    keys, values = layer._in_memory_dtype(*_initial(layer))
    scope, o = layer.scope, layer.options
    if scope == "batch" or o.weight_decay != 0.0:
        for name, x in (("capacity", capacity), ("pool", pool)):
            if x is not None:
                raise ValueError(f'`{name}` must be None with `scope`="batch" and with `weight_decay`, got {x!r}')
        states = [MemoryState(keys, values) for _ in range(1 if scope == "batch" else count)]
        return States(states, o, Origin.of(layer, keys, values))
    if pool is None:
        pool = MemoryPool(keys, values, capacity=capacity)
    elif not isinstance(pool, MemoryPool):
        raise TypeError(f"`pool` must be a MemoryPool, got {type(pool).__name__}")
    elif capacity is not None:
        raise ValueError(f"`capacity` must be None with `pool`, which has one, got {capacity!r}")
    elif not _are_same((keys, values), (pool.keys, pool.values)):
        raise ValueError(
            "`pool` must be MemoryPool(layer.keys, layer.table.weight, ...) of this layer, whose Parameters must be of "
            f"its memory's dtype {values.dtype}, got {pool!r} over other tensors"
        )
    memories = Pooled(pool, [], Origin.of(layer, keys, values))  # which frees what it has if one is refused
    for _ in range(count):
        memories.sessions.append(pool.open())
    return memories


def joined(memories: Sequence[Memories]) -> Pooled:
    """The sessions of several of one pool, which these lose.

    Raises:
        ValueError: they are not of one pool.
    """
    pooled = [one for one in memories if isinstance(one, Pooled)]
    if len(pooled) < len(memories) or len({id(one.pool) for one in pooled}) != 1:
        raise ValueError("`memories` must all be in one MemoryPool")
    first = next((one for one in pooled if one.is_stale), pooled[0])  # if any is, so are all together
    together = Pooled(first.pool, [], first._origin)
    together._begun = first._begun
    for one in pooled:
        together.sessions += one.sessions
        one.sessions = []
    return together
