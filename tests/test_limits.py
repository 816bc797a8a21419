"""What needs 64 bits, what is refused by name, and the same bits where 64 bits are forced."""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fwpkm_kernels import (
    MemoryState,
    chunk_value_update,
    chunk_value_update_,
    fast_weight_memory,
    fast_weight_memory_step,
    plan,
    product_key_lookup,
    product_key_update,
    sparse_value_gather,
    testing,
)
from fwpkm_kernels._checks import check_num_accesses, check_num_keys, check_sort, check_tokens
from fwpkm_kernels.kernels import _common, key_step, segments
from fwpkm_kernels.kernels import picks as pick_kernels
from fwpkm_kernels.kernels.gather import gather_kernel
from fwpkm_kernels.plan import count_accesses, count_among, plan_picks, plan_segments, position_dtype, row_dtype
from tests.conftest import SLOW_IN_INTERPRETER, Place
from tests.helpers.memory import make_inputs, named, run
from tests.helpers.picks import make_picks

pytestmark = pytest.mark.usefixtures("room")


def meta(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# What needs 64 bits, and what is refused: predicates, on tensors that need no memory.


@pytest.mark.parametrize("num_slots, expected", [(2**31, torch.int32), (2**31 + 1, torch.int64)])
def test_rows_widen_past_32_bits(num_slots, expected):
    assert row_dtype(num_slots) == expected
    assert torch.iinfo(expected).max >= num_slots - 1


@pytest.mark.parametrize("accesses", [1, 2**30, 2**30 + 1, 2**31 - 1, 2**31, 2**31 + 1, 2**33])
def test_positions_of_accesses_widen_before_a_sum_of_two_overflows(accesses):
    planned = plan_segments(meta(accesses), 10)
    assert planned.start.dtype == planned.end.dtype == position_dtype(accesses)
    assert planned.start.dtype == (torch.int32 if accesses <= 2**30 else torch.int64)
    assert torch.iinfo(planned.start.dtype).max >= 2 * accesses - 1
    assert count_accesses(planned).dtype == planned.start.dtype
    assert count_among(planned, meta(2**30)).dtype == torch.int32
    assert count_among(planned, meta(2**30 + 1)).dtype == torch.int64


def test_a_table_of_more_elements_needs_nothing_else():
    """Offsets into tables are always formed in 64 bits: N·D just below and above 2³¹ is the same to all but shapes."""
    for num_slots in (2**24 - 1, 2**24, 2**24 + 1):
        values = meta(num_slots, 128, dtype=torch.float16)
        out = sparse_value_gather(values, meta(5, 3), meta(5, 3, dtype=torch.float32))
        assert out.shape == (5, 128)
        assert row_dtype(num_slots) == torch.int32


def gather_of(tokens: int) -> None:
    sparse_value_gather(meta(9, 1, dtype=torch.float16), meta(tokens, 1), meta(tokens, 1, dtype=torch.float16))


def update_of(tokens: int) -> None:
    rows = meta(tokens, 1, dtype=torch.float16)
    chunk_value_update(meta(9, 1, dtype=torch.float16), meta(tokens, 1), rows, rows, rows)


def lookup_of(tokens: int, heads: int = 1, num_keys: int = 3) -> None:
    keys = meta(heads, 2, num_keys, 1, dtype=torch.float16)
    product_key_lookup(meta(tokens, heads, 2, dtype=torch.float16), keys, 1)


def key_step_of(tokens: int) -> None:
    keys, queries = meta(1, 2, 3, 1, dtype=torch.float16), meta(tokens, 1, 2, dtype=torch.float16)
    product_key_update(keys, queries, top_k=1)


def memory_of(length: int, top_k: int = 3, **options: Any) -> None:
    tensors = ((2, length, 1, 2), (2, length, 1), (1, 2, 3, 1), (9, 1))
    with torch.no_grad():
        fast_weight_memory(*(meta(*shape, dtype=torch.float32) for shape in tensors), top_k=top_k, **options)


REFUSED = {
    "gather": (gather_of, 2**30, r"`slots` .*1073741823 tokens.*\[1073741824, 1\]"),
    "update": (update_of, 2**30, r"`slots` .*1073741823 tokens.*\[1073741824, 1\]"),
    "lookup": (lookup_of, 2**30, r"`queries` .*1073741823 tokens.*\[1073741824, 1, 2\]"),
    "heads of queries": (functools.partial(lookup_of, heads=2), 2**29, r"`queries` .*\[536870912, 2, 2\]"),
    "key step": (key_step_of, 2**30, r"`queries` .*\[1073741824, 1, 2\]"),
    "heads": (lambda heads: lookup_of(1, heads), 2**14 + 1, r"`keys` .*16384 heads.*\[16385, 2, 3, 1\]"),
    "sub-keys": (lambda n: lookup_of(1, 1, n), 2**21 + 1, r"`keys` .*2097152 sub-keys.*\[1, 2, 2097153, 1\]"),
    "heads of sub-keys": (lambda heads: lookup_of(1, heads, 2**21), 2**9 + 1, r"`keys` .*2147483648 in all.*\[513,"),
    "accesses": (
        functools.partial(memory_of, lookahead=0),
        2**30 // 6 + 1,
        r"`queries` .*1073741823 accesses.*got 1073741826 for",
    ),
    "re-reads": (
        functools.partial(memory_of, chunk_size=1, lookahead=1),
        2**30 // 12 + 1,
        r"`queries` .*1073741823 accesses.*got 1073741832 for",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_kernel_numbers_is_refused_by_name(case):
    call, size, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call(size)
    if case not in ("accesses", "re-reads"):  # whose chunks would be listed
        call(size - 1)


def test_limits_themselves_are_allowed():
    check_tokens("x", meta(1), 2**30 - 1)
    check_num_accesses(meta(1), 2**30 - 1)
    check_num_keys(meta(2**9, 2, 2**21, 0))
    check_num_keys(meta(2**14, 2, 2**16, 0))


def test_more_than_a_gpu_sorts():
    """torch.sort takes 2³¹ - 1 there; elsewhere any number."""
    for is_cuda, count in ((True, 2**31 - 1), (False, 2**31)):
        check_sort("slots", SimpleNamespace(is_cuda=is_cuda, numel=lambda count=count: count))
    slots = SimpleNamespace(is_cuda=True, numel=lambda: 2**31, shape=(2**28, 8))
    with pytest.raises(ValueError, match=r"`slots` must hold at most 2147483647 slots.*\[268435456, 8\]"):
        check_sort("slots", slots)


@pytest.mark.parametrize("grid", [(2**31,), (2**30, 2), (2**16, 2**15), (2**16, 2**16), (1, 65536), (1, 1, 65536)])
def test_a_launch_that_triton_would_leave_out_raises(grid):
    """The product of the axes is formed in 32 bits before a launch; some overflow to 0, and nothing is launched."""
    with pytest.raises(ValueError, match="too many for one launch of gather_kernel"):
        _common.launch(gather_kernel, grid, on=torch.empty(0))


# 64 bits, forced: the same bits as 32.


@pytest.fixture
def force_64_bits(monkeypatch):
    """Call it to have all rows and positions in 64 bits from then on; it returns what of positions launches see."""
    seen: set[torch.dtype] = set()
    monkeypatch.setattr(pick_kernels, "MAX_KEYS", 0)  # picks of keys are planned by the sort, before and after

    def force() -> set[torch.dtype]:
        monkeypatch.setattr(plan, "NARROW_ROWS", 0)
        monkeypatch.setattr(plan, "NARROW_ACCESSES", 0)
        launch = _common.launch

        def spy(kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
            names = kernel.fn.__code__.co_varnames
            seen.update(args[names.index(name)].dtype for name in ("start_ptr", "first_ptr") if name in names)
            launch(kernel, grid, *args, **options)

        for module in (segments, key_step):
            monkeypatch.setattr(module, "launch", spy)
        return seen

    return force


def check_forced(call: Callable[[], Any], force: Callable[[], set], place: Place, allowed: set = frozenset()) -> None:
    """The same bits, and what is summed is found by numbers of 64 bits only, or of those `allowed`."""
    expected = call()
    seen = force()
    actual = call()
    for x, wanted in zip(testing.asserts._tensors(actual), testing.asserts._tensors(expected), strict=True):
        testing.assert_bitwise_equal(x, wanted)
    assert place.backend == "torch" or seen == {torch.int64} | allowed


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_a_gather_forced_to_64_bits(sparse_grad, place, force_64_bits):
    inputs = testing.make_gather_inputs(80, 2, 9, 5, slot_pattern="zipf", device=place.device)._asdict()

    def call():
        function = functools.partial(sparse_value_gather, sparse_grad=sparse_grad, backend=place.backend)
        out, gradients = testing.forward_and_gradients(function, inputs, wrt=("values", "weights"))
        grad = gradients["values"]
        of_values = (grad._indices(), grad._values()) if sparse_grad else grad
        return out, of_values, gradients["weights"]

    check_forced(call, force_64_bits, place)


@pytest.mark.parametrize("options", [{}, {"clip": 0.2, "weight_decay": 0.1, "count": True}], ids=["plain", "all"])
def test_an_update_forced_to_64_bits(options, place, force_64_bits):
    """Hot slots among them."""
    inputs = testing.make_update_inputs(70, 2, 9, 5, slot_pattern="zipf", mask="real", device=place.device)
    options = dict(options)
    if options.pop("count", False):
        options["count_slots"] = testing.make_slots((50,), 9).to(place.device)

    def call():
        function = functools.partial(chunk_value_update, **options, backend=place.backend)
        wrt = ("values", "weights", "targets", "predictions")
        table = inputs.values.clone()
        chunk_value_update_(**inputs._replace(values=table)._asdict(), **options, backend=place.backend)
        return testing.forward_and_gradients(function, inputs._asdict(), wrt=wrt), table

    check_forced(call, force_64_bits, place)


@pytest.mark.parametrize("score", ["idw", pytest.param("dot", marks=SLOW_IN_INTERPRETER)])
def test_keys_forced_to_64_bits(score, place, force_64_bits):
    """The gradient of a lookup, and a key step with its own."""
    inputs = testing.make_lookup_inputs(5, 1, 5, 6, device=place.device)._asdict()

    def call():
        look_up = functools.partial(product_key_lookup, top_k=2, score=score, backend=place.backend)
        step = functools.partial(product_key_update, top_k=2, score=score, clip=0.03, backend=place.backend)
        return [
            testing.forward_and_gradients(function, inputs, wrt=("queries", "keys")) for function in (look_up, step)
        ]

    check_forced(call, force_64_bits, place)


@pytest.mark.parametrize("boundary", ["carry", pytest.param("drop", marks=SLOW_IN_INTERPRETER)])
def test_a_memory_forced_to_64_bits(boundary, place, force_64_bits):
    """A chunk's positions are its own, of 32 bits; rows, chunk·N + slot and picks have 64."""
    inputs = make_inputs(1, 5, num_keys=3, mask="real", dtype=torch.float32, device=place.device)
    options = {"chunk_size": 2, "top_k": 2, "clip": 0.1, "boundary": boundary, "backend": place.backend}
    check_forced(lambda: named(*run(fast_weight_memory, inputs, **options)), force_64_bits, place, {torch.int32})


def test_a_stream_forced_to_64_bits(place, force_64_bits, monkeypatch):
    inputs = make_inputs(1, 7, num_keys=3, mask="real", dtype=torch.float32, device=place.device)

    def call():
        state = MemoryState(inputs["keys"], inputs["values"])
        outputs = [
            fast_weight_memory_step(
                state,
                *(inputs[name][:, part] for name in ("queries", "targets")),
                mask=inputs["mask"][:, part],
                chunk_size=2,
                top_k=2,
                backend=place.backend,
            )
            for part in (slice(0, 1), slice(1, 2), slice(2, 6), slice(6, 7))
        ]
        return outputs, state.state_dict()

    check_forced(call, force_64_bits, place, {torch.int32})


def test_picks_of_keys_planned_in_64_bits(place, force_64_bits):
    picks = make_picks(9, 2, 5, 2, device=place.device)
    expected = plan_picks(picks, 5)
    force_64_bits()
    actual = plan_picks(picks, 5)
    assert actual.tokens.dtype == actual.order.dtype == actual.first.dtype == torch.int64
    for x, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, wanted, check_dtype=False)


@pytest.mark.gpu
@pytest.mark.parametrize("gigabytes", [24])
def test_many_accesses(gigabytes, force_64_bits):
    """2²⁷ of them: their plan, and the sums that go by it, in 32 bits and in 64."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    slots = torch.randint(1000, (2**24, 8), generator=generator, device="cuda", dtype=torch.int32)
    weights = torch.rand(slots.shape, generator=generator, device="cuda")
    values = torch.zeros(1000, 4, device="cuda", requires_grad=True)

    def gradient() -> Tensor:
        out = sparse_value_gather(values, slots, weights)
        return torch.autograd.grad(out.sum(), [values])[0]

    narrow = gradient()
    expected = torch.zeros(1000, dtype=torch.float64, device="cuda")
    expected.index_add_(0, slots.flatten(), weights.flatten().double())
    torch.testing.assert_close(narrow.double(), expected.unsqueeze(1).expand(-1, 4), rtol=1e-5, atol=0.0)
    force_64_bits()
    testing.assert_bitwise_equal(gradient(), narrow)


@pytest.mark.gpu
@pytest.mark.parametrize("accesses, gigabytes", [(2**27, 10), (2**30 + 8, 60)], ids=str)
def test_a_plan_of_many_accesses(accesses, gigabytes):
    """The larger one has positions of 64 bits."""
    slots = torch.randint(2**20, (accesses,), device="cuda", dtype=torch.int32)
    planned = plan_segments(slots, 2**20)
    assert planned.start.dtype == position_dtype(accesses)
    for part in torch.arange(accesses, device="cuda").split(2**26):
        row, start, end = planned.rows[part], planned.start[part], planned.end[part]
        assert torch.equal(slots[planned.order[part]], row)
        assert ((start <= part) & (part < end)).all()
        assert torch.equal(planned.rows[start], row)
        assert torch.equal(planned.rows[end - 1], row)
        before = (start - 1).clamp(min=0)
        assert ((planned.rows[before] < row) | (start == 0)).all()
        same = planned.rows[part[1:] - 1] == row[1:]
        assert (~same | (planned.order[part[1:] - 1] < planned.order[part[1:]])).all(), "a stable sort"
