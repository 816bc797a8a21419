"""The reads of a pool's decoding steps as a CUDA graph: on a GPU for real, on a CPU with a stand-in for the capture."""

import copy
from typing import Any

import pytest
import torch

from fwpkm_kernels import PoolGraph, graphs
from tests.conftest import HAS_GPU, PLACES
from tests.helpers.graphs import Rerun
from tests.helpers.pool import Pair

PLACE = PLACES[-1] if HAS_GPU else PLACES[0]


def capture(monkeypatch: pytest.MonkeyPatch, pair: Pair, rows: int, length: int, **options: Any) -> PoolGraph:
    """A graph of so many sessions and tokens; without a GPU all of it but the capture."""
    tokens = pair.tokens(rows, length)
    if not HAS_GPU:
        monkeypatch.setattr(graphs, "capture", Rerun)
        monkeypatch.setattr(graphs, "_check_place", lambda *args: None)
    return PoolGraph(pair.pool, **tokens, **{**pair.options, **options})


@pytest.mark.parametrize("place", PLACES[HAS_GPU:], ids=lambda place: place.backend)
@pytest.mark.parametrize("length", [1, 2])
def test_replays_are_steps(length, place, monkeypatch):
    """One graph for any sessions at any positions, while others come and go, keys move and the pool grows."""
    pair = Pair(place, heads=2)
    first = pair.open()
    pair.step([first], 4)
    second = pair.open()
    graph = capture(monkeypatch, pair, 2, length)
    for turn in range(10):
        pair.step([second, first] if turn % 2 else [first, second], length, run=graph)
        pair.check_all()
    other = pair.fork(second)
    pair.step([other], 2)
    for pairing in ([other, first], [second, other], [other, first], [first, other]):
        pair.step(pairing, length, run=graph)
    pair.check_all()


def test_a_full_pool_has_written_nothing(monkeypatch):
    pair = Pair(PLACE, capacity=1)
    session = pair.open()
    graph = capture(monkeypatch, pair, 1, 1)
    for _ in range(3):
        pair.step([session], 1, run=graph)
    with pytest.raises(RuntimeError, match="the pool is full"):
        pair.step([session], 1, run=graph)
    pair.check(session)


def test_a_capture_that_fails_is_made_again(monkeypatch):
    """By the next call; no session is left over from the one that failed."""
    pair = Pair(PLACE)
    session = pair.open()
    graph = capture(monkeypatch, pair, 1, 1)
    pair.open()  # in the seat that the capture has given back
    other = pair.open()  # for which the pool's tensors grow
    works = graphs.capture

    def fails(*args: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(graphs, "capture", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        graph(**pair.tokens(1, 1), sessions=[session])
    assert pair.pool.sessions == list(pair.states)
    pair.check_all()
    monkeypatch.setattr(graphs, "capture", works)
    for turn in range(9):
        pair.step([other if turn % 2 else session], 1, run=graph)
    pair.check_all()


def test_autocast_changes_nothing(monkeypatch):
    """Also not of the chunks that a call writes, whose key step multiplies matrices."""
    pair = Pair(PLACE, heads=2, key_gradient="all")
    session = pair.open()
    graph = capture(monkeypatch, pair, 1, 1)

    def run(**tokens: Any) -> torch.Tensor:
        with torch.autocast(torch.device(PLACE.device).type, torch.bfloat16):
            return graph(**tokens)

    for _ in range(9):
        pair.step([session], 1, run=run)
    pair.check(session)


def test_what_is_refused(monkeypatch):
    pair = Pair(PLACE)
    first, second = pair.open(), pair.open()
    graph = capture(monkeypatch, pair, 2, 2)
    pair.step([first], 3)
    tokens = pair.tokens(2, 2)
    calls = {
        "2 tokens left in their chunks, got position 3": {"sessions": [first, second]},
        "`sessions` must name each session once": {"sessions": [second, second]},
        "`gates` must be given if and only if": {"sessions": [first, second], "gates": None},
        "`mask` must have the dtype that was captured": {"sessions": [first, second], "mask": tokens["mask"] > 0},
        r"`queries` must have the S and t that were captured, \[2, 2\], got \[1, 2, 1, 6\]": {"sessions": [first]}
        | pair.tokens(1, 2),
    }
    for match, changed in calls.items():
        with pytest.raises(ValueError, match=match):
            graph(**{**tokens, **changed})
    pair.check_all()
    with pytest.raises(TypeError, match="a PoolGraph cannot be copied"):
        copy.copy(graph)


def test_what_cannot_be_captured():
    pair = Pair(PLACES[0])
    with pytest.raises(ValueError, match="`pool` must be on a GPU to be captured, got cpu"):
        PoolGraph(pair.pool, **pair.tokens(1, 1), **pair.options)
    with pytest.raises(TypeError, match=r"`options` must be among .*, got \['lengths'\]"):
        PoolGraph(pair.pool, **pair.tokens(1, 1), lengths=[1])
    with pytest.raises(TypeError, match="`pool` must be a MemoryPool, got NoneType"):
        PoolGraph(None, **pair.tokens(1, 1))
