"""The same bits every time: of every operation, forward and backward, whatever the launch and whatever ran before.

On a GPU runs are repeated while other work is under way. In the interpreter, which runs one program after the other, a
plain repetition would prove nothing: there the programs of a launch run in another order each time, as nothing orders
them on a GPU. Everywhere fresh memory holds something else in each run, and every other run is under
torch.use_deterministic_algorithms(True), which refuses what is not, and must not change the bits. A program that read
what another one of its launch writes, two that wrote the same place, or a sum that took in unwritten memory would show.
"""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

import fwpkm_kernels.kernels
from fwpkm_kernels import (
    MemoryGraph,
    MemoryState,
    fast_weight_memory_step,
    fast_weight_memory_varlen,
    product_key_lookup,
    product_key_update,
    testing,
)
from fwpkm_kernels.plan import plan_segments
from tests.conftest import HAS_GPU, PLACES, SLOW_IN_INTERPRETER, Place
from tests.helpers.determinism import (
    RUNS,
    Function,
    assert_same_bits_always,
    gather,
    memory_inputs,
    of_keys,
    programs_in_order,
    update,
    whole_memory,
)
from tests.helpers.streaming import contents, make_state, stream, tokens_of
from tests.helpers.varlen import make_packed
from tests.helpers.varlen import run as run_packed


def stream_steps(place: Place, **options: Any) -> Function:
    """A part of a chunk, its end, several chunks at once; all that the state then is."""
    inputs = memory_inputs(place, 7)
    factor = 100 if place.device == "cuda" else 1
    options |= {"chunk_size": 2 * factor, "top_k": 2, "backend": place.backend}

    def call() -> Any:
        state, outputs = MemoryState(inputs["keys"], inputs["values"]), []
        for begin, end in ((0, 1), (1, 2), (2, 6), (6, 7)):
            part = slice(begin * factor, end * factor)
            tokens = {name: inputs[name][:, part] for name in ("queries", "targets", "gates", "mask")}
            outputs.append(fast_weight_memory_step(state, **tokens, **options))
        return outputs, state.state_dict()

    return call


def packed_documents(place: Place, **options: Any) -> Function:
    """Two that step together and have tails, beside one that only reads."""
    factor = 100 if place.device == "cuda" else 1
    lengths = [length * factor for length in (5, 3, 1)]
    inputs = make_packed(lengths, heads=1, num_keys=4, dtype=torch.float32, device=place.device)
    options |= {"chunk_size": 2 * factor, "top_k": 2, "backend": place.backend}
    return lambda: run_packed(fast_weight_memory_varlen, inputs, **options)


def segments_of_documents(place: Place) -> Function:
    """With gradients through the carry, the rows and their decay; that of the values is sparse."""
    factor = 100 if place.device == "cuda" else 1
    parts = [
        make_packed([x * factor for x in lengths], heads=1, num_keys=4, dtype=torch.float32, device=place.device)
        for lengths in ((3, 2), (2, 1))
    ]
    leaves = {name: parts[0][name].requires_grad_() for name in ("queries", "targets", "keys", "values", "gates")}
    options = {"chunk_size": 2 * factor, "top_k": 2, "backend": place.backend, "weight_decay": 0.1}

    def call() -> Any:
        result, carry, memory = None, None, {"values": leaves["values"]}
        for part in parts:
            given = part | memory | {"carry": carry, "return_carry": True, "sparse_grad": True}
            result, carry = fast_weight_memory_varlen(**given, **options)
            memory |= {"keys": result.keys, "rows": result.rows}
        total = result.output.sum() + result.keys.square().sum() + result.rows.value.square().sum()
        found = torch.autograd.grad(total, list(leaves.values()))
        return [result.output, result.keys, *result.rows, *(x.to_dense() if x.is_sparse else x for x in found)]

    return call


#: By name; those that the interpreter runs in `make test-all`.
OPERATIONS: dict[str, Callable[[Place], Function]] = {
    "lookup": lambda place: of_keys(place, product_key_lookup),
    "lookup by dot products, with ties": lambda place: of_keys(place, product_key_lookup, "equal", score="dot"),
    "gather": gather,
    "gather, sparse gradient": lambda place: gather(place, True),
    "update": update,
    "update, clip and decay": lambda place: update(place, clip=0.3, weight_decay=0.1),
    "update of one slot": lambda place: update(place, "one_slot"),
    "key step": lambda place: of_keys(place, product_key_update),
    "key step, clip and decay": lambda place: of_keys(place, product_key_update, clip=0.02, weight_decay=0.1),
    "stream": stream_steps,
    "stream, normalized": lambda place: stream_steps(place, step="normalized", clip=0.1, weight_decay=0.1),
    "memory": whole_memory,
    "packed documents": packed_documents,
    "segments of documents": segments_of_documents,
    "memory, drop": lambda place: whole_memory(place, boundary="drop", step="normalized", clip=0.1, weight_decay=0.1),
    "memory, all key gradients": lambda place: whole_memory(place, boundary="drop", key_gradient="all"),
}
SLOW = (
    "packed documents",
    "segments of documents",
    "stream, normalized",
    "memory, drop",
    "memory, all key gradients",
    "key step, clip and decay",
)
ON_PLACES = pytest.mark.parametrize(
    "name, place",
    [
        pytest.param(
            name,
            place,
            marks=SLOW_IN_INTERPRETER if name in SLOW and place.backend == "triton" else [],
            id=f"{name}-{place.backend}",
        )
        for name in OPERATIONS
        for place in PLACES
    ],
)


@ON_PLACES
def test_every_operation_gives_the_same_bits(name, place):
    assert_same_bits_always(OPERATIONS[name](place), place.device)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_torch_backend_on_a_gpu(name):
    assert_same_bits_always(OPERATIONS[name](Place("torch", "cuda")), "cuda", 5)


@pytest.mark.gpu
def test_replays_of_a_graph(triton_place):
    """From equal states, and they are those of eager steps; tests/test_graphs.py has other options and sizes."""
    inputs = memory_inputs(triton_place, 8)
    count, options = 100, {"chunk_size": 200, "top_k": 2, "backend": "triton"}
    expected = make_state(inputs)
    wanted = stream(expected, inputs, [count] * 8, **options), contents(expected)
    state = make_state(inputs)
    graph = MemoryGraph(state, **tokens_of(inputs, 0, count), **options)

    def call() -> Any:
        state.reset()
        return graph(**tokens_of(inputs, 0, 8 * count)), contents(state)

    assert_same_bits_always(call, "cuda")
    for x, y in zip(*map(testing.asserts._tensors, (call(), wanted)), strict=True):
        testing.assert_bitwise_equal(x, y)


def test_no_kernel_has_atomics():
    """Nor does anything else read or write what another program of its launch may be writing: `tl` has no other way."""
    folder = Path(fwpkm_kernels.__file__).parent / "kernels"
    files = sorted(folder.glob("*.py"))
    assert len(files) >= 9
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [getattr(node, field, None) for field in ("attr", "id", "name")]
            assert not any("atomic" in name for name in names if isinstance(name, str)), f"{file}:{node.lineno}"


def test_a_plan_is_the_same_each_time(place):
    slots = testing.make_slots((2**20 if place.device == "cuda" else 300,), 50, "zipf").to(place.device)
    assert_same_bits_always(lambda: plan_segments(slots, 50), place.device, min(RUNS, 5))


@triton.jit
def overwrite_kernel(out_ptr):
    """What the last program of a launch leaves. Grid: any of two axes."""
    tl.store(out_ptr, tl.program_id(0) * 10 + tl.program_id(1))


def test_other_orders_of_programs_are_other_orders():
    """What this file rests on where there is no GPU."""
    if HAS_GPU:
        pytest.skip("the interpreter is not used")
    last = []
    for seed in range(4):
        out = torch.zeros(1, dtype=torch.int32)
        with programs_in_order(seed):
            overwrite_kernel[(5, 4)](out)
        last.append(int(out))
    assert last[:2] == [43, 0]
    assert len(set(last)) > 2
