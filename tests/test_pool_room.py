"""A pool that has no room, or an error before it writes: what a call would have done, it has not done."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fwpkm_kernels import MemoryPool, PoolFullError, fast_weight_memory_step, pages, testing
from tests.conftest import PLACES
from tests.helpers.pool import Pair
from tests.helpers.streaming import BOTH

CPU = PLACES[0]
LENGTHS = [12, 2, 4]  # three chunks, none, one


def begun(place: Any, capacity: int, keep_past: bool) -> tuple[Pair, list[int]]:
    """Three sessions, of which the first has written a chunk."""
    pair = Pair(place, capacity=capacity, keep_past=keep_past)
    sessions = [pair.open() for _ in LENGTHS]
    pair.step(sessions[:1], 4)
    return pair, sessions


def saved(pool: MemoryPool) -> dict[int, dict[str, Tensor]]:
    return {session: pool.state_dict(session) for session in pool.sessions}


def assert_saved(pool: MemoryPool, before: dict[int, dict[str, Tensor]]) -> None:
    assert pool.sessions == [*before]
    for session, expected in before.items():
        for name, x in pool.state_dict(session).items():
            testing.assert_bitwise_equal(x, expected[name], name)


@BOTH
@pytest.mark.parametrize("keep_past", [False, True])
def test_a_call_of_several_chunks_reads_all_or_nothing(keep_past, place):
    """Also of the sessions that fill no chunk; and as many rows as were missing are enough."""
    pair, sessions = begun(place, 10, keep_past)
    before, reach, free = saved(pair.pool), pair.pool.reach(sessions[0]), pair.pool.num_free_rows
    drawn, missing = pair.drawn, []
    for turn in range(3):
        with pytest.raises(PoolFullError, match="rows are missing, since the 3 chunks that a session reads") as error:
            pair.pool_step(sessions, 12, LENGTHS)
        missing.append(error.value.missing)
        assert_saved(pair.pool, before)
        assert pair.pool.num_free_rows == free + 2 * turn
        assert pair.pool.reach(sessions[0]) == reach
        pair.drawn = drawn
        pair.pool.grow(2)
    assert missing == [missing[0], missing[0] - 2, missing[0] - 4]
    pair.pool.grow(missing[-1] - 2)
    pair.step(sessions, 12, LENGTHS)
    pair.check_all()


@pytest.mark.parametrize("keep_past", [False, True])
def test_a_call_of_several_chunks_in_a_pool_of_any_capacity(keep_past):
    """Where it may be full and is not, the sessions go on under their numbers, and hold what they hold elsewhere."""
    wide, sessions = begun(CPU, 400, keep_past)
    wide.pool_step(sessions, 12, LENGTHS)
    needed, results = wide.count_rows(), []
    for capacity in range(needed - 4, 120, 2):
        pair, _ = begun(CPU, capacity, keep_past)
        before = saved(pair.pool)
        try:
            pair.pool_step(sessions, 12, LENGTHS)
        except PoolFullError:
            results.append("full")
            assert_saved(pair.pool, before)
            continue
        results.append("right")
        assert_saved(pair.pool, saved(wide.pool))
        assert capacity - pair.pool.num_free_rows == pair.count_rows() == needed
        assert [pair.pool.reach(session) for session in sessions] == [wide.pool.reach(session) for session in sessions]
    assert results == sorted(results)
    assert set(results) == {"full", "right"}


@pytest.mark.parametrize("keep_past", [False, True])
def test_where_memory_ends_before_a_chunk_is_written(keep_past, monkeypatch):
    """The keys of the second session find no place, when those of the first one have had theirs."""
    pair = Pair(CPU, keep_past=keep_past)
    sessions = [pair.open(), pair.open()]
    pair.step(sessions, 3)
    before, drawn, shelf, taken = saved(pair.pool), pair.drawn, pair.pool._store.keys, []
    free, take = pair.pool.num_free_rows, shelf.take

    def refuse() -> int:
        taken.append(take())
        if len(taken) == 2:
            shelf.give(taken[-1])
            raise torch.OutOfMemoryError("no memory is left")
        return taken[-1]

    monkeypatch.setattr(shelf, "take", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        pair.pool_step(sessions, 1)
    monkeypatch.undo()
    assert_saved(pair.pool, before)
    assert pair.pool.num_free_rows == free
    assert sorted(shelf._free) == sorted({*taken, *shelf._free})  # given back, and once
    pair.drawn = drawn
    pair.step(sessions, 1)
    pair.check_all()


def test_a_first_step_that_finds_no_room_binds_nothing():
    pair = Pair(CPU, capacity=1)
    session = pair.open()
    before = saved(pair.pool)
    with pytest.raises(PoolFullError):
        pair.pool_step([session], 4)
    assert_saved(pair.pool, before)
    tokens = pair.tokens(1, 4)
    fast_weight_memory_step(pair.pool, **tokens, sessions=[session], **pair.options | {"chunk_size": 8})
    assert pair.pool.position(session) == 4


class MemoryEnds(TorchDispatchMode):
    """After so many more tensors there is no memory for another one, once."""

    def __init__(self, tensors: int) -> None:
        super().__init__()
        self._left = tensors

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.numel() > 0 and not x.is_meta]
        if made and not any(x.alias_info for x in func._schema.returns):
            self._left -= 1
            if self._left == -1:
                raise torch.OutOfMemoryError("no memory is left")
        return result


def check_books(pool: MemoryPool) -> None:
    """Each seat is of one session or free, and rows are counted as often as indices name them, or are free."""
    store = pool._store
    held = [x for one in pool._sessions.values() for x in (one, one.past) if x is not None and x.stored is None]
    for shelf, seats in ((store.shelf, [x.seat for x in held]), (store.keys, [0, *(x.keys for x in held if x.keys)])):
        assert sorted(seats + shelf._free) == list(range(len(shelf.tensors[0])))
    named = torch.cat([store.indices[x.seat] for x in held]).long()
    references = torch.bincount(named[named >= 0], minlength=pool.capacity)
    testing.assert_bitwise_equal(store.pages.references, references.int())
    free = store.pages._free[: store.pages.num_free].long()
    testing.assert_bitwise_equal(free.sort().values, (references == 0).nonzero().flatten())


def acted(name: str, pool: MemoryPool, given: dict[str, Tensor]) -> None:
    """Session 0 has written two chunks, 1 is a fork of it that has written a third and has a past, 2 is evicted."""
    acts: dict[str, Callable[[], Any]] = {
        "open": pool.open,
        "close": lambda: pool.close(1),
        "reset": lambda: pool.reset(1),
        "fork": lambda: pool.fork(1),
        "rollback": lambda: pool.rollback(1, 3),
        "rollback of an evicted one": lambda: pool.rollback(2, 1),
        "evict": lambda: pool.evict(1),
        "restore": lambda: pool.restore(2),
        "load": lambda: pool.load_state_dict(1, given),
        "load in place of an evicted one": lambda: pool.load_state_dict(2, given),
    }
    acts[name]()


ACTIONS = ["open", "close", "reset", "fork", "rollback", "rollback of an evicted one", "evict", "load"]
WITH_ROOM = [(name, 400) for name in ("restore", "load", "load in place of an evicted one")]


@pytest.mark.parametrize("name, capacity", [*((name, 28) for name in ACTIONS), *WITH_ROOM])
def test_wherever_memory_ends_nothing_has_changed(name, capacity):
    """And the same call works once there is memory; in the small pool `load` needs the rows of what it replaces."""
    pools = []
    for _ in range(2):
        pair = Pair(CPU, capacity=capacity, keep_past=True)
        pair.step([pair.open()], 9)
        given = pair.pool.state_dict(0)
        assert [pair.pool.fork(0), pair.pool.fork(0)] == [1, 2]
        pair.pool_step([1], 4)
        pair.pool.evict(2)
        pair.pool.open()  # takes the last seat that is free
        pools.append(pair.pool)
        assert (pair.pool.num_free_rows < len(given["slots"])) is (capacity < 400)
    pool, expected = pools
    acted(name, expected, given)
    for tensors in range(100):
        before, free, reach = saved(pool), pool.num_free_rows, [pool.reach(session) for session in pool.sessions]
        try:
            with MemoryEnds(tensors):
                acted(name, pool, given)
            break
        except torch.OutOfMemoryError:
            check_books(pool)
            assert_saved(pool, before)
            assert pool.num_free_rows == free
            assert [pool.reach(session) for session in pool.sessions] == reach
    assert tensors > 2
    check_books(pool)
    assert_saved(pool, saved(expected))


def test_a_load_that_fails_binds_nothing():
    """Then a step may bind other options, and without a failure the load binds its own."""
    pair, other = Pair(CPU), Pair(CPU)
    pair.step([pair.open()], 9)
    given, session = pair.pool.state_dict(0), other.open()
    for tensors in range(100):
        try:
            with MemoryEnds(tensors):
                other.pool.load_state_dict(session, given)
            break
        except torch.OutOfMemoryError:
            assert other.pool._store.binding is None
            check_books(other.pool)
    other.states[session] = pair.states[0]
    other.step([session, other.open()], 7)
    other.check_all()


def ends_in_use(function: Callable[..., Any], use: int) -> Callable[..., Any]:
    """The function, but memory ends when it is used for this time."""
    uses = iter([False] * use + [True])

    def ends(*args: Any, **how: Any) -> Any:
        if next(uses, False):
            raise torch.OutOfMemoryError("no memory is left")
        return function(*args, **how)

    return ends


@pytest.mark.parametrize("keep_past", [False, True])
def test_where_memory_ends_while_rows_are_copied(keep_past, monkeypatch):
    """For chunks of two sessions that share rows: no value has been written, and no past is of what is not written."""
    pair = Pair(CPU, capacity=60, keep_past=keep_past)
    pair.step([pair.open()], 4)
    sessions = [0, pair.fork(0)]
    pair.step(sessions, 7)
    drawn, failures = pair.drawn, 0
    for use in range(10):
        try:
            with monkeypatch.context() as patch:
                patch.setattr(pages, "take_rows", ends_in_use(pages.take_rows, use))
                pair.step(sessions, 1)
            break
        except torch.OutOfMemoryError:
            failures += 1
            check_books(pair.pool)
            pair.check_all()
            assert [pair.pool.reach(session) for session in sessions] == [3, 3]
            pair.drawn = drawn
    assert failures >= 3
    check_books(pair.pool)
    pair.check_all()
    for session in sessions:
        pair.pool.close(session)
    assert pair.pool.num_free_rows == 60


@pytest.mark.parametrize("function", ["copy", "drop"])
def test_where_memory_ends_in_a_call_of_several_chunks(function, monkeypatch):
    """Before it, within it, or as its sessions are taken over: all sessions are where they were."""
    pair, sessions = begun(CPU, 40, True)
    store, before, free, drawn = pair.pool._store, saved(pair.pool), pair.pool.num_free_rows, pair.drawn
    for use in range(20):
        try:
            with monkeypatch.context() as patch:
                patch.setattr(store, function, ends_in_use(getattr(store, function), use))
                pair.step(sessions, 12, LENGTHS)
            break
        except torch.OutOfMemoryError:
            check_books(pair.pool)
            assert_saved(pair.pool, before)
            assert pair.pool.num_free_rows == free
            pair.drawn = drawn
    assert use > 3
    check_books(pair.pool)
    pair.check_all()


def test_a_session_that_a_finalizer_has_ended_is_closed_once():
    pair = Pair(CPU)
    sessions = [pair.open(), pair.open()]
    pair.step(sessions, 4)
    pair.pool._ended.append(sessions[0])
    with pytest.raises(torch.OutOfMemoryError), MemoryEnds(0):
        pair.pool.open()
    assert pair.pool.sessions == sessions[1:]
    check_books(pair.pool)
