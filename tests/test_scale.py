"""Past 2³¹: tables, strides and numbers of accesses that 32 bits do not hold; and what is refused by name."""

import functools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
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
from fwpkm_kernels.kernels import _common, key_step, scans, segments, streaming, update
from fwpkm_kernels.kernels import picks as pick_kernels
from fwpkm_kernels.kernels.gather import gather_kernel
from fwpkm_kernels.kernels.lookup import half_grad
from fwpkm_kernels.options import Options
from fwpkm_kernels.plan import count_accesses, count_among, plan_picks, plan_segments, position_dtype, row_dtype
from fwpkm_kernels.records import Addresses, Queue, Tokens
from fwpkm_kernels.weights import plan_writes, plan_writes_grad
from tests.conftest import HAS_GPU, PLACES, SLOW_IN_INTERPRETER, Place
from tests.test_memory import make_inputs, named, run
from tests.test_plan import make_picks
from tests.test_scans import Chunk, make_chunk

#: Seconds that a test waits for the memory that it needs, once it is alone: half of what `make gpu` takes for a hang.
PATIENCE = 30


def wait_for_room(gigabytes: float, patience: float = PATIENCE) -> None:
    """Skip the test if other processes do not leave so much of the GPU's memory for so many seconds."""
    end = time.monotonic() + patience
    while (free := torch.cuda.mem_get_info()[0] / 1e9) < gigabytes:
        if time.monotonic() >= end:
            pytest.skip(f"needs {gigabytes} GB of a GPU's memory, {free:.0f} GB were free for {patience} s")
        time.sleep(0.5)


@pytest.fixture
def gigabytes() -> int:
    """What of a GPU's memory a test needs for itself; 0, unless its parameters say so, for up to a tenth of it."""
    return 0


@pytest.fixture(autouse=True)
def _room(gigabytes: int) -> Iterator[None]:
    """A GPU's memory is shared by all processes of the suite: a test that needs most of it runs alone of this file."""
    if not HAS_GPU:
        yield
        return
    import fcntl  # not on Windows

    with open(Path(tempfile.gettempdir()) / f"fwpkm-kernels-tests-{os.getuid()}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if gigabytes else fcntl.LOCK_SH)
        torch.cuda.empty_cache()
        wait_for_room(gigabytes)
        yield
        torch.cuda.empty_cache()


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
    sub_keys, half_scores = make_picks(9, 2, 5, 2, device=place.device)
    expected = plan_picks(sub_keys, half_scores, 5)
    force_64_bits()
    actual = plan_picks(sub_keys, half_scores, 5)
    assert actual.tokens.dtype == actual.order.dtype == actual.first.dtype == torch.int64
    for x, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, wanted, check_dtype=False)


# Strides past 2³¹: the tensors are small, their storage is memory that nothing touches.


def far(x: Tensor, dim: int, reach: int = 2**31) -> Tensor:
    """A copy whose last entry along `dim` lies more than `reach` elements from the first."""
    size = x.shape[dim]
    assert size > 1, "nothing would lie far"
    others = [i for i in range(x.dim()) if i != dim % x.dim()]
    stride = max(-(-reach // (size - 1)), x.numel() // size) + 1
    strides = [stride] * x.dim()
    inner = 1
    for i in reversed(others):
        strides[i] = inner
        inner *= x.shape[i]
    assert inner < stride
    storage = torch.empty(stride * (size - 1) + inner, dtype=x.dtype, device=x.device)
    return storage.as_strided(x.shape, strides).copy_(x)


def assert_far(call: Callable[..., Any], near: dict[str, Tensor], name: str, dim: int, reach: int = 2**31) -> None:
    """`call` of the tensors gives the same bits if the one called `name` is far."""
    expected = list(testing.asserts._tensors(call(**near)))
    actual = testing.asserts._tensors(call(**near | {name: far(near[name], dim, reach)}))
    for x, wanted in zip(actual, expected, strict=True):
        testing.assert_bitwise_equal(x, wanted, f"{name}, dimension {dim}")


#: Tensors of 16 bits where there is a choice: 4 GiB of address space each.
HALF = torch.float16


@pytest.mark.parametrize("name, dim", [*(("queries", d) for d in range(3)), *(("keys", d) for d in range(4))], ids=str)
def test_a_lookup_of_far_queries_and_keys(name, dim, triton_place):
    queries, keys = testing.make_lookup_inputs(2, 2, 4, 6, dtype=HALF, keys_dtype=HALF, device=triton_place.device)
    call = functools.partial(product_key_lookup, top_k=2, backend="triton")
    # Of a far width the second half of a query lies behind 2³¹ too.
    reach = 2**32 if (name, dim) == ("queries", 2) else 2**31
    assert_far(call, {"queries": queries, "keys": keys}, name, dim, reach)


@pytest.mark.parametrize("name, dim", [("queries", 0), ("queries", 2), ("table", 0), ("table", 1)], ids=str)
def test_a_key_step_of_far_queries_and_keys(name, dim, triton_place):
    """With its gradient; keys of which a table [H·2·n, Dk/2] is no copy."""
    queries, keys = testing.make_lookup_inputs(2, 1, 3, 6, dtype=HALF, keys_dtype=HALF, device=triton_place.device)

    def call(queries, table):
        keys = table.unflatten(0, (1, 2, 3))
        leaves = [x.detach().requires_grad_() for x in (queries, keys)]
        new_keys = product_key_update(leaves[1], leaves[0], top_k=2, backend="triton")
        return new_keys.detach(), *torch.autograd.grad(new_keys.float().square().sum(), leaves)

    assert_far(call, {"queries": queries, "table": keys.flatten(0, 2)}, name, dim)


@pytest.mark.parametrize("name, dim", [("grad_halves", 0), ("grad_halves", 3), ("queries", 2), ("keys", 0)], ids=str)
def test_far_gradients_of_a_lookup(name, dim, triton_place):
    sub_keys, grad_halves = make_picks(3, 2, 4, 2, device=triton_place.device)
    queries, keys = testing.make_lookup_inputs(3, 2, 4, 6, dtype=HALF, keys_dtype=HALF, device=triton_place.device)
    near = {"grad_halves": grad_halves.to(HALF), "queries": queries, "keys": keys.flatten(0, 2)}
    assert_far(functools.partial(half_grad, sub_keys=sub_keys, idw=True, eps=1e-3), near, name, dim)


@pytest.mark.parametrize(
    "name, dim", [(name, dim) for name in ("values", "slots", "weights", "grad_out") for dim in (0, 1)], ids=str
)
def test_far_tensors_of_a_gather(name, dim, place):
    values, slots, weights = testing.make_gather_inputs(3, 4, 5, 6, dtype=HALF, weights_dtype=HALF, device=place.device)
    grad_out = testing.random_cotangent(torch.empty(3, 6, dtype=HALF, device=place.device))

    def call(values, slots, weights, grad_out):
        leaves = [x.detach().requires_grad_() for x in (values, weights)]
        out = sparse_value_gather(leaves[0], slots, leaves[1], sparse_grad=True, backend=place.backend)
        grad_values, grad_weights = torch.autograd.grad(out, leaves, grad_out)
        return out.detach(), grad_values._values(), grad_weights

    near = {"values": values, "slots": slots.int(), "weights": weights, "grad_out": grad_out}
    assert_far(call, near, name, dim)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_far_table_is_written_in_place(dim, weight_decay, place):
    """Its unwritten rows decay in a kernel of their own."""
    inputs = testing.make_update_inputs(40, 2, 5, 3, dtype=HALF, device=place.device)._replace(slots=None)
    slots = testing.make_slots((40, 2), 5, "zipf").clamp(max=3).to(place.device)

    def call(values):
        table = far(values, dim) if values.stride(dim) > 2**20 else values.clone()
        arguments = inputs._replace(values=table, slots=slots)._asdict()
        chunk_value_update_(**arguments, weight_decay=weight_decay, clip=0.4, backend=place.backend)
        return table.contiguous()

    assert_far(call, {"values": inputs.values}, "values", dim)


def test_a_far_gradient_of_an_update(triton_place):
    inputs = testing.make_update_inputs(6, 2, 5, 3, dtype=HALF, device=triton_place.device)

    def call(grad, clip):
        leaves = [x.detach().requires_grad_() for x in (inputs.weights, inputs.targets)]
        arguments = inputs._replace(weights=leaves[0], targets=leaves[1])._asdict()
        out = chunk_value_update(**arguments, clip=clip, backend="triton")
        return torch.autograd.grad(out, leaves, grad)

    grad = testing.random_cotangent(inputs.values)
    assert_far(functools.partial(call, clip=0.3), {"grad": grad}, "grad", 0)


@pytest.mark.parametrize("length", [70, 3], ids=["hot", "cold"])
@pytest.mark.parametrize("name, dim", [("vectors", 0), ("vectors", 1), ("table", 0), ("table", 1)], ids=str)
def test_far_tensors_of_segment_sums(name, dim, length, triton_place):
    """What is summed, and what is subtracted from it and stepped; hot segments and cold ones."""
    generator = torch.Generator().manual_seed(0)
    slots = torch.cat((torch.zeros(length, dtype=torch.int64), torch.tensor([1, 2, 2]))).to(triton_place.device)
    near = {"vectors": torch.randn(len(slots), 3, generator=generator), "table": torch.randn(4, 3, generator=generator)}
    near = {key: x.to(triton_place.device, HALF) for key, x in near.items()}
    coefficients = torch.randn(len(slots), generator=generator).to(triton_place.device)

    def call(vectors, table):
        out = torch.zeros(4, 3, device=triton_place.device)
        options = {"epilogue": "update", "table": table, "centered": True}
        segments.segment_rows(out, vectors, coefficients, plan_segments(slots, 4), **options)
        return out

    assert_far(call, near, name, dim)


@pytest.mark.parametrize(
    "name, dim",
    [(name, 0) for name in ("values", "targets", "grad_output", "steps")]
    + [("targets", 1), ("targets", 2), ("values", 1), ("grad_output", 1)],
    ids=str,
)
def test_far_tensors_of_the_value_scan(name, dim, triton_place):
    """Its read and the backward of that, which read the log as a table; what they write lies as far."""
    chunk = make_chunk((2, 3, 2, 2, 3, 9, 5), table=HALF, activations=HALF, device=triton_place.device)
    near = chunk._replace(steps=chunk.steps.to(HALF))._asdict()

    def call(**tensors):
        c = Chunk(**tensors)
        # One strided like the targets, the other like the incoming gradient.
        grad_targets, output = torch.zeros_like(c.targets), torch.zeros_like(c.grad_output)
        if name == "targets" and c.targets.stride(dim) > 2**29:
            grad_targets = far(grad_targets, dim)
        if name == "grad_output" and c.grad_output.stride(dim) > 2**29:
            output = far(output, dim)
        errors = scans.read(c.values, c.slots, c.weights, c.targets, output)
        grads = [torch.zeros_like(c.weights) for _ in range(2)]
        arguments = (c.values, c.slots, c.steps, c.step_rows, c.weights, c.write_weights, c.targets, c.grad_output)
        grad_predictions = scans.read_grad(*arguments, grad_targets, *grads)
        return errors, output.contiguous(), grad_predictions, grad_targets.contiguous(), *grads

    assert_far(call, near, name, dim)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", ["values", "initial"])
def test_a_far_table_is_restored(name, dim, triton_place):
    generator = torch.Generator().manual_seed(0)
    near = {key: torch.randn(5, 3, generator=generator).to(triton_place.device, HALF) for key in ("values", "initial")}
    touched = torch.tensor([1, 0, 0, 1, 1], dtype=torch.uint8, device=triton_place.device)

    def call(values, initial):
        table = far(values, dim) if values.stride(dim) > 2**20 else values.clone()
        update.restore_rows(table, initial, touched)
        return table.contiguous()

    assert_far(call, near, name, dim)


@pytest.mark.parametrize(
    "name, dim",
    [
        ("values", 0),
        ("values", 1),
        ("queries", 0),
        ("queries", 3),
        ("targets", 0),
        ("targets", 2),
        ("gates", 0),
        ("mask", 1),
    ],
    ids=str,
)
def test_far_tensors_of_a_streaming_step(name, dim, triton_place):
    """Tokens on their way to the queue, of which only some are read; the output lies as far as the targets."""
    length, batch, heads, width, picks = 3, 2, 2, 4, 2
    generator = torch.Generator().manual_seed(0)
    shapes = {"values": (9, width), "queries": (length, batch, heads, 6), "targets": (length, batch, width)}
    shapes |= {"gates": (length, batch), "mask": (length, batch)}
    near = {
        key: torch.randn(*shape, generator=generator).to(triton_place.device, HALF) for key, shape in shapes.items()
    }
    rows, all_picks = length * batch, heads * picks
    slots = testing.make_slots((rows, heads, picks), 9).to(triton_place.device)
    weights = torch.rand(rows, all_picks, generator=generator).to(triton_place.device)
    sub_keys, half_scores = make_picks(rows, heads, 3, picks, device=triton_place.device)
    found = Addresses(half_scores[:, :, 0], slots, half_scores, sub_keys)

    def call(values, queries, targets, gates, mask):
        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(5, batch, *shape, dtype=dtype, device=triton_place.device)

        of_tokens = (empty(heads, 6, dtype=HALF), empty(), empty(), empty(width, dtype=HALF), empty(width))
        of_picks = (empty(heads, picks, dtype=torch.int64), empty(all_picks), empty(heads, 2, picks))
        queue = Queue(*of_tokens, *of_picks, empty(heads, 2, picks, dtype=torch.int32))
        output = torch.zeros_like(targets)
        if name == "targets" and targets.stride(dim) > 2**29:
            output = far(output, dim)
        streaming.read_to_queue(values, found, weights, Tokens(queries, targets, gates, mask), queue, output, 1, 1)
        carried = Queue(*(x.clone() for x in queue))
        streaming.enqueue(queries, gates, mask, carried, 1)
        return queue, output.contiguous(), carried

    assert_far(call, near, name, dim)


@pytest.mark.parametrize("name, dim", [("gates", 0), ("gates", 1), ("mask", 0), ("mask", 1)], ids=str)
def test_far_gates_and_mask_of_a_sequence(name, dim, triton_place):
    """Their weights, counts and gradients; [B, T] here, as the user gave them."""
    o = Options(chunk_size=2, top_k=2, lookahead=1, backend="triton")
    reads = o.layout(5, 2).positions * 2
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(reads, 2, generator=generator).to(triton_place.device)
    slots = testing.make_slots((reads, 2), 4).to(triton_place.device)
    near = {key: torch.rand(2, 5, generator=generator).to(triton_place.device) for key in ("gates", "mask")}

    def call(gates, mask):
        writes = plan_writes(scores, slots, 4, gates.T, mask.T, 5, 2, 0, None, o)
        grads = (writes.weights, writes.write_weights, scores, writes)
        return writes, plan_writes_grad(*grads, gates, mask, 5, 2, o)

    assert_far(call, near, name, dim)


def test_rows_at_the_end_of_a_table_of_more_than_32_bits(place):
    """Contiguous, N·D > 2³¹, of which a few rows are ever touched."""
    num_slots, width = 2**25 + 2, 64
    values = torch.empty(num_slots, width, dtype=HALF, device=place.device)
    rows = torch.tensor([0, 1, 2**24, 2**25 - 1, 2**25, 2**25 + 1], device=place.device)
    inputs = testing.make_update_inputs(20, 3, len(rows), width, dtype=HALF, gates=True, device=place.device)
    values[rows] = inputs.values

    def results(table, slots):
        leaf, weights = table.detach().requires_grad_(), inputs.weights.clone().requires_grad_()
        out = sparse_value_gather(leaf, slots, weights, sparse_grad=True, backend=place.backend)
        grad_values, grad_weights = torch.autograd.grad(out.square().sum(), [leaf, weights])
        chunk_value_update_(**inputs._replace(values=table, slots=slots)._asdict(), backend=place.backend)
        return out.detach(), grad_values._indices()[0], grad_values._values(), grad_weights

    actual, expected = results(values, rows[inputs.slots]), results(inputs.values, inputs.slots)
    for x, wanted in zip(actual, (expected[0], rows[expected[1]], *expected[2:]), strict=True):
        testing.assert_bitwise_equal(x, wanted)
    testing.assert_bitwise_equal(values[rows], inputs.values, "written in place")


# A table of more than 2³¹ elements, against the few rows of it that are touched.


class LargeTable:
    """A memory of n² slots of which only those of `chosen` sub-keys can be addressed, the very last among them.

    Without the sub-keys that no query comes near it is a small memory, whose slots are in the same order.
    """

    def __init__(self, n: int, width: int, dtype: torch.dtype, place: Place) -> None:
        self.n, self.place, generator = n, place, torch.Generator().manual_seed(0)
        self.chosen = torch.tensor([0, 1, n // 3, n // 2, n // 2 + 1, n - 3, n - 2, n - 1])
        few = len(self.chosen)
        self.small_keys = torch.randn(1, 2, few, 16, generator=generator).to(place.device)
        self.small_values = torch.randn(few * few, width, generator=generator).to(place.device, dtype)
        self.keys = torch.full((1, 2, n, 16), 1e3, device=place.device)
        self.keys[:, :, self.chosen.to(place.device)] = self.small_keys
        self.rows = (self.chosen.unsqueeze(1) * n + self.chosen).flatten().to(place.device)
        self.values = torch.zeros(n * n, width, dtype=dtype, device=place.device)
        self.values[self.rows] = self.small_values
        self.queries = torch.randn(1, 14, 1, 32, generator=generator).to(place.device)
        self.queries[:, ::3] = self.small_keys[:, :, -1].flatten()  # so these read the last slot of all
        self.targets = torch.randn(1, 14, width, generator=generator).to(place.device)

    def large_slots(self, small: Tensor) -> Tensor:
        return self.rows[small]

    def check_operations(self) -> None:
        """A gather, its gradients, and a write in place: the same bits."""
        inputs = testing.make_update_inputs(
            40, 3, len(self.rows), self.values.shape[1], slot_pattern="zipf", dtype=self.values.dtype, gates=True
        )
        inputs = type(inputs)(*(None if x is None else x.to(self.place.device) for x in inputs))
        inputs.slots[0] = len(self.rows) - 1
        results = []
        for values, slots in ((self.values, self.large_slots(inputs.slots)), (self.small_values, inputs.slots)):
            leaf, weights = values.detach().requires_grad_(), inputs.weights.clone().requires_grad_()
            out = sparse_value_gather(leaf, slots, weights, sparse_grad=True, backend=self.place.backend)
            grad_values, grad_weights = torch.autograd.grad(out.float().square().sum(), [leaf, weights])
            arguments = inputs._replace(values=values, slots=slots)._asdict()
            chunk_value_update_(**arguments, clip=0.5, lr=0.7, backend=self.place.backend)
            results.append((out.detach(), grad_values._values(), grad_weights, grad_values._indices()[0]))
        for actual, expected in zip(results[0][:3], results[1][:3], strict=True):
            testing.assert_bitwise_equal(actual, expected)
        assert torch.equal(results[0][3], self.large_slots(results[1][3]))
        testing.assert_bitwise_equal(self.values[self.rows], self.small_values, "written in place")

    def check_a_stream(self) -> None:
        """Part of a chunk, its end, and several chunks at once; and a reset."""
        results = []
        for keys, values in ((self.keys, self.values), (self.small_keys, self.small_values)):
            state = MemoryState(keys, values)
            outputs = [
                fast_weight_memory_step(
                    state,
                    self.queries[:, part],
                    self.targets[:, part],
                    chunk_size=4,
                    top_k=3,
                    step="normalized",
                    backend=self.place.backend,
                )
                for part in (slice(0, 3), slice(3, 4), slice(4, 14))
            ]
            written = state.values[self.rows] if keys is self.keys else state.values.clone()
            state.reset()
            reset = state.values[self.rows] if keys is self.keys else state.values
            results.append((torch.cat(outputs, 1), written, reset))
        assert not torch.equal(results[0][1], self.small_values)
        testing.assert_bitwise_equal(results[0][2], self.small_values, "after a reset")
        for actual, expected in zip(*results, strict=True):
            self.assert_close(actual, expected)

    def check_training(self) -> None:
        """Outputs and gradients of a short sequence; the table's gradient is 0 in all other rows."""
        results = []
        for keys, values in ((self.keys, self.values), (self.small_keys, self.small_values)):
            leaves = [x.detach().requires_grad_() for x in (self.queries, self.targets, keys, values)]
            found = fast_weight_memory(
                *leaves, chunk_size=4, top_k=3, step="normalized", clip=0.5, backend=self.place.backend
            )
            slots, output = found.slots, found.output
            del found  # and with it the new table
            *gradients, grad_values = torch.autograd.grad(output.square().sum(), leaves)
            if keys is self.keys:
                gradients[2] = gradients[2][:, :, self.chosen.to(keys.device)]
                total = grad_values.count_nonzero()
                grad_values = grad_values[self.rows]
                assert grad_values.count_nonzero() == total, "other rows have a gradient"
            else:
                slots = self.large_slots(slots)
            results.append((output.detach(), *gradients, grad_values, slots))
        assert torch.equal(results[0][-1], results[1][-1])
        assert self.rows[-1] in results[0][-1]
        for actual, expected in zip(results[0][:-1], results[1][:-1], strict=True):
            self.assert_close(actual, expected)

    def assert_close(self, actual: Tensor, expected: Tensor) -> None:
        """Up to a rounding: tiles of a lookup depend on n, and a query near a sub-key magnifies what they change."""
        error = float((actual.double() - expected.double()).norm() / expected.double().norm())
        assert error <= max(8 * torch.finfo(self.values.dtype).eps, 1e-5), error


@pytest.mark.parametrize("place", [PLACES[0], pytest.param(PLACES[1], marks=SLOW_IN_INTERPRETER)], ids=str)
def test_what_the_large_tables_are_held_against(place):
    """The same with a table that is not large."""
    table = LargeTable(10, 5, torch.float32, place)
    table.check_operations()
    table.check_a_stream()
    table.check_training()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, gigabytes", [(torch.bfloat16, 52), (torch.float32, 42)], ids=str)
def test_a_table_of_more_than_32_bits(dtype, gigabytes):
    """16.7 M slots of 256 columns: 2³² elements. Training has a table, a new one, and the gradient in float32."""
    table = LargeTable(4096, 256, dtype, Place("triton", "cuda"))
    assert table.values.numel() == 2**32
    table.check_operations()
    if dtype == torch.bfloat16:
        table.check_training()
    torch.cuda.empty_cache()
    table.check_a_stream()


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
