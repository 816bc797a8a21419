"""Sessions of a pool against a `MemoryState` for each: drawn calls, forks, rollbacks, saving, room, errors."""

import copy
import pickle
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from torch.utils.checkpoint import checkpoint

from fwpkm_kernels import MemoryPool, MemoryState, PoolFullError, fast_weight_memory_step, testing
from tests.conftest import PLACES, Place
from tests.helpers.memory import KEY_GRADIENTS
from tests.helpers.pool import Pair
from tests.helpers.streaming import BOTH

CPU = PLACES[0]
MOST_SESSIONS = 4


class Sessions(RuleBasedStateMachine):
    """What users do with a pool, in any order; after each action every session is bitwise its state."""

    place: Place = CPU
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair(self.place, keep_past=True, **self.options)
        self.written: dict[int, MemoryState] = {}  #: as it was before its last chunk was written
        self.evicted: set[int] = set()
        self.open()

    def choose(self, data: st.DataObject, *, present: bool = True) -> int:
        ids = [x for x in self.pair.states if not (present and x in self.evicted)]
        return data.draw(st.sampled_from(ids))

    def has_present(self) -> bool:
        return len(self.evicted) < len(self.pair.states)

    def has_room(self) -> bool:
        return len(self.pair.states) < MOST_SESSIONS

    @rule()
    @precondition(has_room)
    def open(self) -> None:
        self.pair.open()

    @rule(data=st.data())
    @precondition(lambda self: self.has_room() and self.has_present())
    def fork(self, data: st.DataObject) -> None:
        self.pair.fork(self.choose(data))

    @rule(data=st.data())
    @precondition(lambda self: len(self.pair.states) > 1)
    def close(self, data: st.DataObject) -> None:
        session = self.choose(data, present=False)
        self.pair.pool.close(session)
        del self.pair.states[session]
        self.written.pop(session, None)
        self.evicted.discard(session)

    @rule(data=st.data(), length=st.sampled_from([0, 1, 1, 3, 4, 9]))
    @precondition(has_present)
    def step(self, data: st.DataObject, length: int) -> None:
        ids = [x for x in self.pair.states if x not in self.evicted]
        chosen = data.draw(st.lists(st.sampled_from(ids), min_size=1, unique=True))
        lengths = data.draw(st.none() | st.lists(st.integers(0, length), min_size=len(chosen), max_size=len(chosen)))
        before = {session: self.pair.states[session].clone() for session in chosen}
        tokens_before = self.pair.drawn
        self.pair.step(chosen, length, lengths)
        for row, session in enumerate(chosen):
            self.note_past(session, row, before[session], tokens_before, length, lengths)

    def note_past(self, session, row, state, drawn, length, lengths) -> None:  # type: ignore[no-untyped-def]
        """Read the same tokens again, up to the end of the last chunk that they filled but for its last one."""
        count = length if lengths is None else lengths[row]
        filled = (state.position + count) // 4 * 4
        if filled <= state.position:
            return
        keep, self.pair.drawn = self.pair.drawn, drawn
        tokens = self.pair.tokens(row + 1, length)
        self.pair.drawn = keep
        begin, end = length - count, length - count + filled - 1 - state.position
        while begin < end:
            stop = min(end, begin + 4 - state.position % 4)
            part = {name: x[row : row + 1, begin:stop] for name, x in tokens.items()}
            fast_weight_memory_step(state, **part, **self.pair.options)
            begin = stop
        if state._binding is not None:
            self.written[session] = state

    @rule(data=st.data())
    def rollback_within_the_chunk(self, data: st.DataObject) -> None:
        session = self.choose(data, present=False)
        tokens = data.draw(st.integers(0, self.pair.pool.position(session) % 4))
        self.pair.pool.rollback(session, tokens)
        self.pair.states[session].rollback(tokens)

    @rule(data=st.data(), more=st.integers(0, 3))
    @precondition(lambda self: bool(set(self.written) - self.evicted))
    def rollback_through_the_last_chunk(self, data: st.DataObject, more: int) -> None:
        session = data.draw(st.sampled_from(sorted(set(self.written) - self.evicted)))
        state = self.written.pop(session)
        state.rollback(more % (state.position % 4 + 1))
        self.pair.pool.rollback(session, self.pair.pool.position(session) - state.position)
        self.pair.states[session] = state

    @rule(data=st.data())
    def reset(self, data: st.DataObject) -> None:
        session = self.choose(data, present=False)
        self.pair.pool.reset(session)
        self.pair.states[session].reset()
        self.written.pop(session, None)
        self.evicted.discard(session)

    @rule(data=st.data())
    @precondition(has_present)
    def evict(self, data: st.DataObject) -> None:
        session = self.choose(data)
        self.pair.pool.evict(session)
        self.evicted.add(session)
        self.written.pop(session, None)

    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        session = self.choose(data, present=False)
        self.pair.pool.restore(session)
        self.evicted.discard(session)

    @rule(data=st.data())
    def save_and_load(self, data: st.DataObject) -> None:
        """Into another session, which then is the same."""
        source, other = self.choose(data, present=False), self.choose(data, present=False)
        self.pair.pool.load_state_dict(other, self.pair.pool.state_dict(source))
        self.pair.states[other] = self.pair.states[source].clone()
        self.written.pop(other, None)
        self.evicted.discard(other)

    @invariant()
    def sessions_are_states(self) -> None:
        self.pair.check_all()
        assert self.pair.pool.capacity - self.pair.pool.num_free_rows == self.pair.count_rows()


def check_machine(place: Place, share: float, **options: Any) -> None:
    machine = type("Machine", (Sessions,), {"place": place, "options": options})
    phases = [Phase.generate] if place.backend == "triton" else [Phase.generate, Phase.shrink]
    examples = max(2, round(share * settings.default.max_examples))
    how = settings(
        max_examples=examples, stateful_step_count=12, phases=phases, suppress_health_check=list(HealthCheck),
        deadline=None,
    )  # fmt: skip
    run_state_machine_as_test(machine, settings=how)


@pytest.mark.parametrize("options", [{}, {"heads": 2, "lookahead": 3, "clip": 0.1}, {"key_gradient": "all"}], ids=str)
def test_any_actions_on_a_cpu(options):
    check_machine(CPU, 0.5, **options)


@pytest.mark.parametrize("options", [{"heads": 2}, {"lookahead": 0, "key_gradient": "all"}], ids=str)
def test_any_actions_in_triton(options):
    check_machine(PLACES[1], 0.1, **options)


@pytest.mark.slow
def test_many_actions_in_triton():
    check_machine(PLACES[1], 0.5, lookahead=2, score="dot", weighting="silu", step="normalized")


def check_ragged_calls(place: Place, **options: Any) -> None:
    """Sessions at any positions read together as each alone; what a fork writes, its origin does not see."""
    pair = Pair(place, **options)
    first, second = pair.open(), pair.open()
    pair.step([first, second], 5, [5, 2])
    other = pair.fork(first)
    pair.step([other, second], 3, [3, 2])
    pair.step([second, first, other], 1)
    pair.check_all()


def test_ragged_calls_and_a_fork(place):
    check_ragged_calls(place, heads=2)


@BOTH
@KEY_GRADIENTS
def test_ragged_calls_of_one_head(key_gradient, place):
    check_ragged_calls(place, key_gradient=key_gradient, score="dot")


@BOTH
@pytest.mark.parametrize("tokens", range(1, 8))
def test_rollback_through_a_written_chunk(tokens, place):
    """Bitwise the session that has not read them, which also goes on in the same way."""
    pair = Pair(place, heads=2, keep_past=True)
    session, other = pair.open(), pair.open()
    whole = pair.tokens(1, 20)

    def step(session: int, begin: int, end: int) -> None:
        part = {name: x[:, begin:end] for name, x in whole.items()}
        fast_weight_memory_step(pair.pool, **part, sessions=[session], **pair.options)

    def saved(session: int) -> dict[str, torch.Tensor]:
        return pair.pool.state_dict(session)

    step(session, 0, 11)
    pair.pool.rollback(session, tokens)
    step(other, 0, 11 - tokens)
    for name, x in saved(other).items():
        testing.assert_bitwise_equal(saved(session)[name], x, name)
    for one in (session, other):
        step(one, 11 - tokens, 20)
    for name, x in saved(other).items():
        testing.assert_bitwise_equal(saved(session)[name], x, name)


def test_without_a_past_only_the_present_chunk_can_be_taken_back():
    pair = Pair(CPU)
    session = pair.open()
    pair.step([session], 6)
    with pytest.raises(ValueError, match="`tokens` must be at most 2, as many as .* in its present chunk, got 3"):
        pair.pool.rollback(session, 3)
    assert pair.pool.position(session) == 6
    pair.pool.keep_past = True
    pair.step([session], 3)
    with pytest.raises(ValueError, match="at most 5, .* in its present chunk and the last written one, got 6"):
        pair.pool.rollback(session, 6)
    pair.check(session)


@BOTH
def test_a_full_pool_has_written_nothing(place):
    """Of two sessions that fill their chunks in one call; then there is room, and the same call goes through."""
    pair = Pair(place, capacity=1)
    first, second = pair.open(), pair.open()
    pair.step([first, second], 3)
    before = {session: pair.pool.state_dict(session) for session in (first, second)}
    drawn = pair.drawn
    with pytest.raises(
        RuntimeError, match=r"the pool is full: \d+ rows are missing, .* and 1 of `capacity`=1 are free"
    ):
        pair.step([first, second], 1)
    for session, saved in before.items():
        for name, x in pair.pool.state_dict(session).items():
            testing.assert_bitwise_equal(x, saved[name], name)
    assert pair.pool.num_free_rows == 1
    larger = Pair(place, capacity=100)
    for _ in before:
        larger.open()
    larger.pool.load_state_dict(first, before[first])
    larger.pool.load_state_dict(second, before[second])
    larger.states, larger.drawn = pair.states, drawn
    larger.step([first, second], 1)
    larger.check_all()


def test_how_many_rows_are_missing():
    pair = Pair(CPU, capacity=400)
    session = pair.open()
    pair.step([session], 4)
    needed = pair.pool.num_rows(session)
    small = Pair(CPU, capacity=needed - 2)
    small.open()
    with pytest.raises(PoolFullError, match=f"2 rows are missing, .* {needed} new rows and {needed - 2} of") as error:
        small.step([0], 4)
    assert error.value.missing == 2
    exact = Pair(CPU, capacity=needed)
    exact.open()
    exact.step([0], 4)
    assert exact.pool.num_free_rows == 0


def run_with_pasts(capacity: int, others: int, keep_past: bool, turned: bool) -> tuple[MemoryPool, list[int]]:
    """A session without a past writes many rows, together with one that writes few and whose past had many.

    The latter is there with so many forks; the last call writes pasts or not.
    """
    pair = Pair(CPU, heads=3, keep_past=True, capacity=capacity, addressing_weight=0.0, lookahead=0)
    old, new = pair.open(), pair.open()
    used = []
    for turn in range(3):
        sessions = [old]
        if turn == 2:
            sessions = [new, old, *(pair.pool.fork(old) for _ in range(others))]
            sessions = sessions[::-1] if turned else sessions
            pair.pool.keep_past = keep_past
        pair.drawn = len(sessions)  # so that the second call writes what the first one has written
        tokens = pair.tokens(len(sessions), 4)
        few = [row for row, session in enumerate(sessions) if session != new]
        if turn == 2:
            tokens["queries"][few] = tokens["queries"][few, :1]  # all to the same slots
        fast_weight_memory_step(pair.pool, **tokens, sessions=sessions, **pair.options)
        used.append(pair.pool.capacity - pair.pool.num_free_rows)
        assert used[-1] == pair.count_rows()
    return pair.pool, used


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("keep_past", [False, True])
@pytest.mark.parametrize("others", [0, 1, 2])
def test_room_is_counted_exactly(others, keep_past, turned):
    """With pasts that make room for others, and with forks, of which the last one keeps the rows that they shared."""
    wide, used = run_with_pasts(400, others, keep_past, turned)
    tight, again = run_with_pasts(max(used), others, keep_past, turned)
    assert again == used
    for session in wide.sessions:
        for name, x in wide.state_dict(session).items():
            testing.assert_bitwise_equal(tight.state_dict(session)[name], x, name)
    with pytest.raises(PoolFullError) as error:
        run_with_pasts(max(used) - 1, others, keep_past, turned)
    assert error.value.missing == 1


def run_twice(capacity: int, turned: bool) -> Pair:
    """A session has written the same rows twice, keeping its past, when it writes together with a new one."""
    pair = Pair(CPU, keep_past=True, capacity=capacity, top_k=4, lookahead=0, addressing_weight=0.0)
    new, old = pair.open(), pair.open()
    for _ in range(2):
        pair.drawn = 0
        pair.pool_step([old], 4)
    pair.pool_step([old, new] if turned else [new, old], 4)
    return pair


@pytest.mark.parametrize("turned", [False, True])
def test_a_pool_of_any_capacity_is_full_or_right(turned):
    wide = run_twice(400, turned)
    results = []
    for capacity in range(20, 60):
        try:
            pair = run_twice(capacity, turned)
        except PoolFullError:
            results.append(False)
            continue
        results.append(True)
        assert capacity - pair.pool.num_free_rows == pair.count_rows()
        for session in (0, 1):
            for name, x in wide.pool.state_dict(session).items():
                testing.assert_bitwise_equal(pair.pool.state_dict(session)[name], x, name)
    assert results == sorted(results)
    assert len(set(results)) == 2


def test_rows_that_are_not_free_are_not_taken():
    pages = Pair(CPU, capacity=3).pool._store.pages
    with pytest.raises(RuntimeError, match="`count` must be at most the 3 rows that are free, got 4"):
        pages.find(4)
    assert len(pages.find(3).unique()) == 3


def test_a_load_has_the_room_of_what_it_replaces():
    """The rows of the past as well, which the session shares with it."""
    pair = Pair(CPU, keep_past=True)
    session = pair.open()
    pair.step([session], 8)
    saved = pair.pool.state_dict(session)
    held = pair.pool.capacity - pair.pool.num_free_rows
    assert held > pair.pool.num_rows(session)
    tight = Pair(CPU, keep_past=True, capacity=held)
    tight.open()
    tight.step([0], 8)
    tight.pool.load_state_dict(0, saved)
    tight.check(0)


@BOTH
def test_rollback_of_an_evicted_session(place):
    """It is saved and comes back as one that has been rolled back while it was there."""
    pair = Pair(place, lookahead=2)
    session = pair.open()
    pair.step([session], 7)
    pair.pool.evict(session)
    pair.pool.rollback(session, 2)
    pair.states[session].rollback(2)
    pair.check(session)
    pair.pool.restore(session)
    pair.check(session)
    pair.step([session], 5)
    pair.check(session)


def test_a_fork_takes_rows_only_for_what_it_writes():
    pair = Pair(CPU)
    session = pair.open()
    pair.step([session], 12)
    free = pair.pool.num_free_rows
    other = pair.fork(session)
    assert pair.pool.num_free_rows == free
    pair.step([other], 3)
    assert pair.pool.num_free_rows == free
    pair.step([other], 1)
    assert free - 2 * 8 <= pair.pool.num_free_rows < free  # 8 accesses, those of a carried token, and its own
    pair.pool.close(session)
    pair.pool.close(other)
    assert pair.pool.num_free_rows == pair.pool.capacity


def test_reset_takes_over_the_initial_memory_as_it_is():
    pair = Pair(CPU)
    session = pair.open()
    pair.step([session], 9)
    pair.keys.mul_(0.5)
    pair.values.add_(1.0)
    pair.pool.reset(session)
    pair.states[session].reset()
    pair.step([session], 9)
    pair.check(session)


def test_read_writes_nothing(place):
    """Of the present keys and values: what a lookahead-0 step of a copy gives at the same place."""
    pair = Pair(place, heads=2)
    first, second = pair.open(), pair.open()
    pair.step([first, second], 6, [6, 5])
    before = {session: pair.pool.state_dict(session) for session in (first, second)}
    queries = pair.tokens(3, 2)["queries"]
    read = pair.pool.read([second, first, second], queries, top_k=2, backend=place.backend)
    for row, session in enumerate([second, first, second]):
        state = MemoryState(pair.states[session].keys, pair.states[session].values)
        targets = torch.zeros(1, 2, 4, device=place.device)
        options = pair.options | {"lookahead": 0}
        wanted = fast_weight_memory_step(state, queries[row : row + 1], targets, **options)
        testing.assert_bitwise_equal(read[row : row + 1], wanted)
    for session, saved in before.items():
        for name, x in pair.pool.state_dict(session).items():
            testing.assert_bitwise_equal(x, saved[name], name)


def test_to_another_pool():
    pair, other = Pair(CPU), Pair(CPU, capacity="1 KiB")
    assert other.pool.capacity == 1024 // (4 * 4)
    session, to = pair.open(), other.open()
    pair.step([session], 6)
    saved = pair.pool.state_dict(session)
    assert all(x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes for x in saved.values())
    other.pool.load_state_dict(to, saved)
    other.states[to], other.drawn = pair.states[session], pair.drawn
    other.step([to], 5)
    other.check(to)


#: What is refused: a call of the pool with two sessions at position 6, and what the error says.
REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "unknown": (lambda p: p.pool.position(7), ValueError, r"`session` must be open, among \[0, 1\], got 7"),
    "no id": (lambda p: p.pool.fork("0"), TypeError, "`session` must be an int, got str"),
    "no sessions": (lambda p: step(p), TypeError, "`sessions` must be the ids of a pool's sessions, got NoneType"),
    "one id": (lambda p: step(p, sessions=torch.tensor(0)), ValueError, "`sessions` must have 1 dimension"),
    "float ids": (lambda p: step(p, sessions=torch.ones(2)), TypeError, "`sessions` must be int64 or int32"),
    "one length": (lambda p: step(p, sessions=[0, 1], lengths=1), TypeError, "`lengths` must be a number for each"),
    "twice": (lambda p: step(p, sessions=[0, 0]), ValueError, r"`sessions` must name each session once, got \[0, 0\]"),
    "too few": (lambda p: step(p, sessions=[0]), ValueError, "`sessions` must name one for each row .* 2, got 1"),
    "lengths": (lambda p: step(p, sessions=[0, 1], lengths=[1, 3]), ValueError, r"from 0 to 2 .* got \[1, 3\]"),
    "ids on meta": (lambda p: step(p, sessions=torch.ones(2, device="meta").long()), ValueError, "`sessions` must"),
    "float lengths": (lambda p: step(p, sessions=[0, 1], lengths=torch.ones(2)), TypeError, "`lengths` must be int64"),
    "evicted": (lambda p: evicted_step(p), ValueError, "`sessions` must not be evicted, got 0: restore it first"),
    "bound": (lambda p: step(p, sessions=[0, 1], top_k=3), ValueError, "`top_k` must stay as in .*, 2, got 3"),
    "decay": (lambda p: step(p, sessions=[0, 1], weight_decay=0.1), ValueError, "`weight_decay` must be 0 in a pool"),
    "shape": (lambda p: step(p, sessions=[0, 1], drop="targets"), ValueError, "`targets`"),
    "read": (lambda p: p.pool.read([0], p.tokens(1, 1)["targets"]), ValueError, "`queries` must have 4 dimensions"),
    "tokens": (lambda p: p.pool.rollback(0, -1), ValueError, "`tokens` must be at least 0"),
    "copy": (lambda p: copy.deepcopy(p.pool), TypeError, "a MemoryPool cannot be copied or pickled"),
    "pickle": (lambda p: pickle.dumps(p.pool), TypeError, "a MemoryPool cannot be copied or pickled"),
    "state": (lambda p: step(p, state=p.states[0], sessions=[0, 1]), TypeError, "need a MemoryPool as `state`"),
    "no mapping": (lambda p: p.pool.load_state_dict(0, []), TypeError, "`state_dict` must be a mapping"),
    "names": (lambda p: p.pool.load_state_dict(0, {}), ValueError, "`state_dict` must hold 'slots'"),
    "slots": (lambda p: load(p, slots=lambda x: x + 25), ValueError, r"must lie in \[0, 25\)"),
    "repeated": (lambda p: load(p, slots=torch.zeros_like), ValueError, "must name each slot once in 'slots'"),
    "rows": (lambda p: load(p, rows=lambda x: x[1:]), ValueError, "'rows' must be"),
    "gradient": (lambda p: checkpointed(p), RuntimeError, "was called in a backward pass"),
}  # fmt: skip


def step(pair: Pair, drop: str = "", state: Any = None, **options: Any) -> torch.Tensor:
    tokens = pair.tokens(2, 2)
    if drop:
        tokens[drop] = tokens[drop][:1]
    return fast_weight_memory_step(pair.pool if state is None else state, **tokens, **{**pair.options, **options})


def evicted_step(pair: Pair) -> None:
    pair.pool.evict(0)
    step(pair, sessions=[0, 1])


def load(pair: Pair, **changes: Any) -> None:
    saved = pair.pool.state_dict(1)
    pair.pool.load_state_dict(0, saved | {name: change(saved[name]) for name, change in changes.items()})


def checkpointed(pair: Pair) -> None:
    x = torch.zeros((), requires_grad=True)
    checkpoint(lambda x: x * step(pair, sessions=[0, 1]).sum(), x, use_reentrant=False).backward()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    act, error, match = REFUSED[name]
    pair = Pair(CPU)
    pair.open(), pair.open()
    pair.step([0, 1], 6)
    free = pair.pool.num_free_rows
    with pytest.raises(error, match=match):
        act(pair)
    if name == "evicted":
        pair.pool.restore(0)
    if name != "gradient":  # whose forward has stepped
        pair.check_all()
        assert pair.pool.num_free_rows == free


@pytest.mark.parametrize(
    "capacity, error",
    [
        (-1, ValueError),
        (1.5, TypeError),
        ("2 GB", ValueError),
        ("-3 GiB", ValueError),
        ("nan GiB", ValueError),
        ("GiB", ValueError),
        (2**31, ValueError),
    ],
)
def test_capacities_that_are_none(capacity, error):
    with pytest.raises(error, match="`capacity` must be"):
        MemoryPool(torch.zeros(1, 2, 2, 2), torch.zeros(4, 3), capacity=capacity)


def test_the_initial_memory_must_stay_where_it_is():
    pair = Pair(CPU)
    pair.open()
    pair.pool._values.data = pair.pool._values.data.double()
    pair.pool._keys.data = pair.pool._keys.data.double()
    with pytest.raises(RuntimeError, match="`keys` of the pool must stay .* of torch.float32 .*: make a new pool"):
        pair.pool.open()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_modes(mode):
    """A pool that was made and stepped in one mode goes on in another."""
    with mode():
        pair = Pair(CPU)
        session = pair.open()
        with torch.no_grad():
            pair.step([session], 5)
    pair.step([session], 6)
    pair.check(session)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype, place):
    pair = Pair(place)
    keys, values = pair.keys.to(dtype), pair.values.to(dtype)
    pool, state = MemoryPool(keys, values, capacity=100), MemoryState(keys, values)
    session = pool.open()
    tokens = {name: x.to(dtype) for name, x in pair.tokens(1, 10).items()}
    for begin, end in ((0, 3), (3, 4), (4, 7), (7, 8), (8, 10)):
        part = {name: x[:, begin:end] for name, x in tokens.items()}
        output = fast_weight_memory_step(pool, **part, sessions=[session], **pair.options)
        testing.assert_bitwise_equal(output, fast_weight_memory_step(state, **part, **pair.options))
    saved = pool.state_dict(session)
    testing.assert_bitwise_equal(saved["rows"], state.values[saved["slots"]])
    testing.assert_bitwise_equal(saved["keys"], state.keys)


@BOTH
@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_strides_of_the_initial_memory(layout, place):
    pair, plain = Pair(place), Pair(place)
    if layout == "transposed":
        pair.keys, pair.values = (x.mT.contiguous().mT for x in (pair.keys, pair.values))
    else:
        pair.keys, pair.values = (torch.cat((x, x), -1)[..., : x.shape[-1]] for x in (pair.keys, pair.values))
    pair.pool = MemoryPool(pair.keys, pair.values, capacity=100)
    for one in (pair, plain):
        one.open()
    testing.assert_bitwise_equal(pair.step([0], 11), plain.step([0], 11))


def test_keep_past_must_be_a_bool():
    """In the constructor and as an attribute."""
    pair = Pair(CPU, keep_past=True)
    for wrong in ("no", 1, None):
        with pytest.raises(TypeError, match="`keep_past` must be a bool, got"):
            pair.pool.keep_past = wrong
    assert pair.pool.keep_past is True
    with pytest.raises(TypeError, match="`keep_past` must be a bool, got int"):
        Pair(CPU, keep_past=0)
