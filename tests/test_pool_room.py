"""A pool that has no room, or an error before it writes: what a call would have read, it has not read."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fwpkm_kernels import MemoryPool, PoolFullError, fast_weight_memory_step, testing
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
