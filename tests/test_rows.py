"""final="rows", sparse gradients and `apply_rows_`: what final="table" gives, bit by bit, and no array of N rows."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck

from benchmarks.measure import allocations_cpu
from fwpkm_kernels import MemoryOutput, Rows, apply_rows_, fast_weight_memory, testing
from tests.helpers.memory import BOUNDARIES, assert_same_bits, leaves_of, make_inputs

#: (batch, length, heads, num_keys, key_width, width), options of the inputs, options of the memory
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any], dict[str, Any]]] = {
    "masked": ((2, 8, 1, 4, 4, 3), {"mask": "real"}, {}),
    "no gates": ((2, 7, 2, 5, 4, 3), {"gates": False}, {"lookahead": 3, "step": "normalized"}),
    "clamped": ((2, 7, 1, 4, 4, 3), {}, {"clip": 0.05, "step": "gradient"}),
    "still keys": ((1, 7, 1, 4, 4, 3), {}, {"addressing_weight": 0.0}),
    "fewer tokens than a chunk": ((2, 2, 1, 4, 4, 3), {}, {}),
    "one slot": ((1, 7, 1, 1, 4, 3), {}, {"top_k": 1}),
    "more slots than accesses": ((1, 4, 1, 30, 4, 3), {}, {}),
    "half precision": ((2, 7, 1, 4, 4, 3), {"dtype": torch.bfloat16, "activations_dtype": torch.float32}, {"lr": 0.3}),
    "strided": ((2, 7, 1, 4, 4, 3), {"dtype": torch.float32, "layout": "strided"}, {}),
    "no tokens": ((2, 0, 1, 4, 4, 3), {}, {}),
}


def expanded(values: Tensor, rows: Rows) -> Tensor:
    """The table that the rows make of the initial one, differentiably in both."""
    used = rows.slot >= 0
    return values.index_put((rows.slot[used],), rows.value[used])


def both(inputs: dict[str, Any], **options: Any) -> tuple[dict[str, Tensor], ...]:
    """Results and gradients with final="table", with "rows", and with "rows" and a sparse gradient."""
    found = []
    for how in ({"final": "table"}, {"final": "rows"}, {"final": "rows", "sparse_grad": True}):
        leaves = leaves_of(inputs)
        # What the rows leave of the initial table has a gradient of its own, which is not the memory's.
        table = inputs["values"].detach().clone().requires_grad_()
        outputs = fast_weight_memory(**inputs | leaves, **options, **how)
        final = outputs.values if how["final"] == "table" else expanded(table, outputs.values)
        results = (outputs.output, outputs.keys, final)
        incoming = [testing.random_cotangent(x, seed=i) for i, x in enumerate(results)]
        of_rows = [] if how["final"] == "table" else [table]
        grads = torch.autograd.grad(results, [*leaves.values(), *of_rows], incoming)
        named = {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=False)}
        if of_rows:
            sparse = named["gradient of values"]
            assert sparse.is_sparse == how.get("sparse_grad", False)
            assert not sparse.is_sparse or sparse.is_cuda or sparse.is_coalesced()
            named["gradient of values"] = sparse.to_dense() + grads[-1]
        results = MemoryOutput(outputs.output, outputs.keys, final, outputs.slots, outputs.weights)
        found.append(results._asdict() | named)
    return tuple(found)


@BOUNDARIES
@pytest.mark.parametrize("case", CASES)
def test_rows_are_the_rows_of_the_table(case, boundary, place):
    shape, given, options = CASES[case]
    inputs = make_inputs(*shape, **given, device=place.device)
    options = {"chunk_size": 3, "top_k": 2, "boundary": boundary, "backend": place.backend} | options
    with testing.poisoned_memory(), testing.assert_unchanged(inputs):
        table, *others = both(inputs, **options)
    for other in others:
        assert_same_bits(other, table)


def test_segments_leave_the_rows_of_the_table(place):
    """The second of two segments, which writes what the first one has carried over."""
    inputs = make_inputs(2, 11, mask="bool", dtype=torch.float32, device=place.device)
    options = {"chunk_size": 3, "top_k": 2, "backend": place.backend}
    first, second = ({name: x if name in ("keys", "values") else x[:, part] for name, x in inputs.items()}
                     for part in (slice(5), slice(5, None)))  # fmt: skip
    before, carry = fast_weight_memory(**first, **options, return_carry=True)
    second |= {"keys": before.keys, "values": before.values}
    table = fast_weight_memory(**second, **options, carry=carry)
    rows = fast_weight_memory(**second, **options, carry=carry, final="rows")
    rows = rows._replace(values=expanded(before.values, rows.values))
    assert_same_bits(rows._asdict(), table._asdict())


def test_which_rows_there_are(place):
    """Those that are read, re-reads too, in ascending order; unused places stand last."""
    inputs = make_inputs(2, 7, num_keys=30, device=place.device)
    options = {"chunk_size": 3, "top_k": 2, "addressing_weight": 0.0, "backend": place.backend}
    outputs = fast_weight_memory(**inputs, **options, final="rows")
    touched = outputs.slots.unique()
    rows = outputs.values
    assert isinstance(rows, Rows)
    assert rows.slot.shape == (2 * (7 + 1) * 2,)
    testing.assert_bitwise_equal(rows.slot[: len(touched)], touched)
    assert (rows.slot[len(touched) :] == -1).all()
    assert not rows.value[len(touched) :].any()
    assert not rows.document.any()
    small = fast_weight_memory(**make_inputs(2, 7, num_keys=2, device=place.device), **options, final="rows")
    assert small.values.slot.shape == (4,)


@pytest.mark.parametrize("fast_mode", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["directions", "whole"])
@BOUNDARIES
def test_gradcheck(boundary, fast_mode):
    leaves = leaves_of(make_inputs(2, 7, num_keys=3, width=2))
    options = {"chunk_size": 3, "top_k": 2, "lookahead": 2, "boundary": boundary, "final": "rows"}

    def outputs(queries, targets, keys, values, gates):
        found = fast_weight_memory(queries, targets, keys, values, gates=gates, **options)
        return found.output, found.keys, found.values.value

    assert gradcheck(outputs, list(leaves.values()), fast_mode=fast_mode)


def test_differentiating_twice_is_an_error(place):
    inputs = make_inputs(1, 4, dtype=torch.float32, device=place.device)
    for sparse_grad in (False, True):
        leaves = leaves_of(inputs)
        options = {"chunk_size": 2, "top_k": 2, "final": "rows", "sparse_grad": sparse_grad, "backend": place.backend}
        outputs = fast_weight_memory(**inputs | leaves, **options)
        grads = torch.autograd.grad(outputs.output.sum(), list(leaves.values()), create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            grads[0].sum().backward()


@pytest.mark.parametrize("optimizer", ["SGD", "SparseAdam"])
def test_a_sparse_gradient_trains(optimizer, place):
    """The rows that were read move as with a dense gradient, and no other row moves."""
    inputs = make_inputs(2, 7, num_keys=20, dtype=torch.float32, device=place.device)
    options = {"chunk_size": 3, "top_k": 2, "final": "rows", "backend": place.backend}
    tables = []
    for sparse_grad in (False, True):
        values = torch.nn.Parameter(inputs["values"].clone())
        kind = torch.optim.SGD if optimizer == "SGD" else torch.optim.SparseAdam if sparse_grad else torch.optim.Adam
        optimizing = kind([values], lr=0.1)
        outputs = fast_weight_memory(**inputs | {"values": values}, **options, sparse_grad=sparse_grad)
        outputs.output.square().sum().backward()
        if sparse_grad:
            assert values.grad.is_sparse
            if place.device == "cpu":
                # PyTorch keeps the entries of a gradient that it accumulates, but does not say that they are coalesced.
                used = outputs.values.slot[outputs.values.slot >= 0]
                assert torch.equal(values.grad._indices()[0], used)
        optimizing.step()
        tables.append(values.detach())
    torch.testing.assert_close(tables[1], tables[0])
    testing.assert_untouched_rows_equal(inputs["values"], tables[1], outputs.values.slot.clamp(min=0))


def test_a_sparse_gradient_passes_no_cast():
    """As the docs say: a Parameter in half precision has a sparse gradient, one that is cast to it has none."""
    inputs = make_inputs(2, 7, dtype=torch.float32)
    options = {"chunk_size": 3, "top_k": 2, "final": "rows", "sparse_grad": True}
    half = inputs["values"].bfloat16().requires_grad_()
    fast_weight_memory(**inputs | {"values": half}, **options).output.sum().backward()
    assert half.grad.is_sparse
    wide = inputs["values"].clone().requires_grad_()
    output = fast_weight_memory(**inputs | {"values": wide.bfloat16()}, **options).output
    with pytest.raises(RuntimeError, match="converting to a different layout"):
        output.sum().backward()


N = 200 * 200
WIDTH = 16


@pytest.mark.parametrize(
    ("requires_grad", "sparse_grad", "most"), [(False, False, 0), (True, True, 0), (True, False, 1)]
)
def test_no_array_has_n_rows(requires_grad, sparse_grad, most):
    """Forward and backward; but the gradient of the values, if it is dense."""
    inputs = make_inputs(2, 20, num_keys=200, width=WIDTH, dtype=torch.float32)
    values = inputs.pop("values")
    leaves = leaves_of({name: x for name, x in inputs.items() if name != "mask"})

    def train(final: str = "rows") -> Any:
        table = values.requires_grad_(requires_grad)
        options = {"chunk_size": 8, "top_k": 4, "final": final, "sparse_grad": sparse_grad and final == "rows"}
        outputs = fast_weight_memory(**leaves, values=table, **options)
        wanted = [*leaves.values(), table] if requires_grad else [*leaves.values()]
        return torch.autograd.grad(outputs.output.sum(), wanted)

    def large(call: Any) -> int:
        """Allocations of at least a byte for each element of the table."""
        return sum(size >= N * WIDTH for size in allocations_cpu(call))

    assert large(train) == most
    assert large(functools.partial(train, "table")) == 2  # so that they would be seen


@BOUNDARIES
def test_one_compilation_serves_every_number_of_tokens(boundary):
    options = {"chunk_size": 3, "top_k": 2, "boundary": boundary, "final": "rows"}

    def train(**inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = fast_weight_memory(**inputs, **options)
        return outputs.output, outputs.keys, *outputs.values

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(train, fullgraph=True, backend=counter)
    for length in (8, 20, 5, 12):
        results = []
        for function in (train, compiled):
            leaves = leaves_of(make_inputs(2, length, num_keys=9, dtype=torch.float32))
            for name in ("queries", "targets", "gates"):
                torch._dynamo.mark_dynamic(leaves[name], 1)
            found = function(**leaves)
            (found[0].square().sum() + found[4].sin().sum()).backward()
            results.append([*found, *(x.grad for x in leaves.values())])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)
    assert counter.frame_count == 1


def some_rows(place: Any, dtype: torch.dtype = torch.float32) -> Rows:
    slot = torch.tensor([5, -1, 0, 3], device=place.device)
    value = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).to(place.device, dtype)
    return Rows(torch.zeros_like(slot), slot, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "strided"])
def test_apply_rows(layout, dtype, place):
    rows = some_rows(place, dtype)
    values = testing.with_layout(torch.ones(7, 3, device=place.device, dtype=dtype), layout)
    expected = values.clone()
    expected[[5, 0, 3]] = rows.value[[0, 2, 3]]
    with testing.assert_unchanged(rows):
        assert apply_rows_(values, rows, backend=place.backend) is None
    testing.assert_bitwise_equal(values, expected)
    detached = rows._replace(value=rows.value.clone().requires_grad_())
    apply_rows_(values, detached, backend=place.backend)
    assert not values.requires_grad


def test_applied_rows_are_the_final_table(place):
    inputs = make_inputs(2, 9, mask="bool", dtype=torch.float32, device=place.device)
    options = {"chunk_size": 3, "top_k": 2, "backend": place.backend}
    expected = fast_weight_memory(**inputs, **options).values
    rows = fast_weight_memory(**inputs, **options, final="rows").values
    apply_rows_(inputs["values"], rows, backend=place.backend)
    testing.assert_bitwise_equal(inputs["values"], expected)


def test_apply_rows_compiles(place):
    def write(values: Tensor, rows: Rows) -> Tensor:
        apply_rows_(values, rows, backend=place.backend)
        return values.sum()

    tables = [torch.ones(7, 3, device=place.device) for _ in range(2)]
    rows = some_rows(place)
    compiled = torch.compile(write, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tables[0], rows), write(tables[1], rows))
    testing.assert_bitwise_equal(*tables)


def test_apply_rows_in_a_backward_pass_is_an_error(place):
    values, x = torch.ones(7, 3, device=place.device), torch.ones((), requires_grad=True)
    x.register_hook(lambda _: apply_rows_(values, some_rows(place), backend=place.backend))
    with pytest.raises(RuntimeError, match="apply_rows_ was called in a backward pass"):
        x.sin().backward()
    assert (values == 1).all()


@pytest.mark.gpu
def test_nothing_waits_for_a_gpu(errors_on_synchronisation):
    inputs = make_inputs(2, 9, mask="bool", dtype=torch.float32, device="cuda")
    leaves = leaves_of(inputs)
    torch.cuda.set_sync_debug_mode("error")
    for sparse_grad in (False, True):
        outputs = fast_weight_memory(**inputs | leaves, chunk_size=3, top_k=2, final="rows", sparse_grad=sparse_grad)
        torch.autograd.grad((outputs.output, outputs.values.value), list(leaves.values()),
                            (torch.ones_like(outputs.output), torch.ones_like(outputs.values.value)))  # fmt: skip
        apply_rows_(inputs["values"].detach(), outputs.values)


def test_rows_of_a_table_that_has_decayed_are_refused():
    """The rows that are not named would have to be written too."""
    values = torch.zeros(9, 3)
    rows = Rows(torch.zeros(1, dtype=torch.int64), torch.tensor([4]), torch.ones(1, 3), torch.tensor([0.9]))
    with pytest.raises(ValueError, match="`rows.decay` must be None"):
        apply_rows_(values, rows)
    assert not values.any()


@pytest.mark.parametrize("name", ["value", "slot", "document"])
def test_rows_that_share_memory_with_the_table_are_refused(name):
    """They would be read while the table is written."""
    if name == "value":
        values = torch.zeros(9, 3)
        rows = Rows(torch.zeros(2, dtype=torch.int64), torch.tensor([4, 0]), values[2:4])
    else:
        storage = torch.zeros(27, dtype=torch.int64)
        values = storage.view(torch.float64).view(9, 3)
        others = {"document": torch.zeros(2, dtype=torch.int64), "slot": torch.tensor([4, 0])}
        rows = Rows(**others | {name: storage[:2]}, value=torch.ones(2, 3, dtype=torch.float64))
    before = values.clone()
    with pytest.raises(ValueError, match=f"`rows.{name}`.*share"):
        apply_rows_(values, rows)
    assert torch.equal(values, before)
