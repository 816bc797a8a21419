"""A pool whose buffer grows, by itself or when it is told to: bitwise the pool that was large from the beginning."""

from typing import Any

import pytest

from fwpkm_kernels import MemoryPool, PoolFullError, testing
from tests.conftest import PLACES
from tests.helpers.pool import Pair
from tests.helpers.streaming import BOTH

CPU = PLACES[0]


@BOTH
@pytest.mark.parametrize("keep_past", [False, True])
def test_a_pool_that_grows_is_exact(keep_past, place):
    """In the midst of a call of several chunks, of several sessions, with forks and rollbacks."""
    pair = Pair(place, heads=2, capacity=None, keep_past=keep_past)
    assert pair.pool.grows
    assert pair.pool.capacity == 0
    first, second = pair.open(), pair.open()
    pair.step([first, second], 9, [9, 6])
    grown = [pair.pool.capacity]
    third = pair.fork(first)
    pair.step([third, second, first], 9)
    grown.append(pair.pool.capacity)
    assert 0 < grown[0] < grown[1]
    pair.check_all()
    assert pair.pool.capacity - pair.pool.num_free_rows == pair.count_rows()
    assert pair.pool.capacity <= len(pair.values) * (2 * 3 + 2)  # what sessions, their pasts and free seats can hold


def test_a_pool_that_grows_takes_few_rows_more_than_it_needs():
    """Half as many again, but never more than its seats can hold."""
    pair, needed = Pair(CPU, capacity=None), []
    session = pair.open()
    for _ in range(12):
        pair.step([session], 4)
        needed.append(pair.count_rows())
        assert pair.pool.capacity <= max(needed[0], 1.5 * needed[-1])
    assert needed[0] < needed[-1]
    assert pair.pool.capacity <= len(pair.values)


@BOTH
def test_a_full_pool_goes_on_once_it_is_larger(place):
    pair = Pair(place, capacity=1, heads=2)
    first, second = pair.open(), pair.open()
    pair.step([first, second], 3)
    drawn = pair.drawn
    with pytest.raises(PoolFullError) as error:
        pair.pool_step([first, second], 1)
    pair.pool.grow(error.value.missing)
    assert not pair.pool.grows
    pair.drawn = drawn
    pair.step([first, second], 1)
    pair.check_all()
    assert pair.pool.num_free_rows == 0
    pair.pool.grow(0)
    assert pair.pool.capacity == pair.count_rows()


def test_a_pool_that_grows_to_load():
    pair, other = Pair(CPU), Pair(CPU, capacity=None)
    session, to = pair.open(), other.open()
    pair.step([session], 10)
    other.pool.load_state_dict(to, pair.pool.state_dict(session))
    other.states[to] = pair.states[session]
    other.check(to)
    assert other.pool.num_free_rows == 0


def test_rows_that_were_free_stay_so():
    pair = Pair(CPU, capacity=30)
    first, second = pair.open(), pair.open()
    pair.step([first, second], 4)
    used = pair.count_rows()
    pair.pool.close(first)
    del pair.states[first]
    pair.pool.grow(5)
    assert pair.pool.capacity == 35
    assert pair.pool.num_free_rows == 35 - pair.count_rows() > 35 - used
    pair.step([second], 12)
    pair.step([pair.open(), second], 8)
    pair.check_all()
    assert pair.pool.num_free_rows == 35 - pair.count_rows()


@pytest.mark.parametrize("rows, error", [(-1, ValueError), (1.5, TypeError), (2**31 - 400, ValueError)])
def test_bad_numbers_of_rows(rows: Any, error):
    pair = Pair(CPU)
    with pytest.raises(error, match="`rows` must be|`capacity` must be below"):
        pair.pool.grow(rows)
    assert pair.pool.capacity == 400


def test_how_many_tokens_can_be_taken_back():
    pair = Pair(CPU, capacity=None, keep_past=True)
    session = pair.open()
    assert pair.pool.reach(session) == 0
    pair.step([session], 3)
    assert pair.pool.reach(session) == 3
    pair.step([session], 3)
    assert pair.pool.reach(session) == 2 + 4
    pair.pool.rollback(session, 5)
    assert pair.pool.reach(session) == 1
    assert pair.pool.reach(pair.pool.fork(session)) == 1


def test_capacity_must_be_given():
    pair = Pair(CPU)
    with pytest.raises(TypeError, match="capacity"):
        MemoryPool(pair.keys, pair.values)
    testing.assert_bitwise_equal(MemoryPool(pair.keys, pair.values, capacity=None).values, pair.values)
