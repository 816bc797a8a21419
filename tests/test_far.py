"""Strides and tables past 2³¹ elements: the tensors are small, their storage is memory that nothing touches."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fwpkm_kernels import (
    chunk_value_update,
    chunk_value_update_,
    product_key_lookup,
    product_key_update,
    sparse_value_gather,
    testing,
)
from fwpkm_kernels.kernels import pool, scans, segments, streaming, update
from fwpkm_kernels.kernels.compact import copy_rows
from fwpkm_kernels.kernels.lookup import half_grad
from fwpkm_kernels.options import Options
from fwpkm_kernels.plan import plan_segments
from fwpkm_kernels.records import Addresses, Queue, Tokens
from fwpkm_kernels.weights import plan_writes, plan_writes_grad
from tests.helpers.picks import make_picks
from tests.helpers.scans import Chunk, make_chunk

pytestmark = pytest.mark.usefixtures("room")


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
    grad_halves, sub_keys = make_picks(3, 2, 4, 2, device=triton_place.device)
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
@pytest.mark.parametrize("put", [False, True])
@pytest.mark.parametrize("name", ["source", "out"])
def test_rows_of_a_far_table_are_copied(name, put, dim, triton_place):
    generator = torch.Generator().manual_seed(0)
    near = {key: torch.randn(5, 3, generator=generator).to(triton_place.device, HALF) for key in ("source", "out")}
    slots = torch.tensor([4, -1, 0, 3, 1], device=triton_place.device)

    def call(source, out):
        out = far(out, dim) if out.stride(dim) > 2**20 else out.clone()
        copy_rows(source, slots, out, put=put)
        return out.contiguous()

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
    half_scores, sub_keys = make_picks(rows, heads, 3, picks, device=triton_place.device)
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


FAR_OF_A_POOL = [("initial", 0), ("initial", 1), ("queries", 0), ("queries", 3), ("targets", 0), ("targets", 2)]
FAR_OF_A_POOL += [("gates", 0), ("mask", 1)]


@pytest.mark.parametrize("name, dim", FAR_OF_A_POOL, ids=str)
def test_far_tensors_of_a_pools_read(name, dim, triton_place):
    """Tokens of two sessions on their way to the queues; some of their rows are their own."""
    length, sessions, heads, width, picks, device = 2, 2, 2, 4, 2, triton_place.device
    generator = torch.Generator().manual_seed(0)
    shapes = {"initial": (9, width), "queries": (length, sessions, heads, 6), "targets": (length, sessions, width)}
    shapes |= {"gates": (length, sessions), "mask": (length, sessions)}
    near = {key: torch.randn(*shape, generator=generator).to(device, HALF) for key, shape in shapes.items()}
    buffer = torch.randn(5, width, generator=generator).to(device, HALF)
    indices = (torch.arange(27, dtype=torch.int32) % 6 - 1).view(3, 9).to(device)
    seats, places = torch.tensor([2, 0], device=device), torch.tensor([1, 0], device=device)
    rows, all_picks = length * sessions, heads * picks
    slots = testing.make_slots((rows, heads, picks), 9).to(device)
    weights = torch.rand(rows, all_picks, generator=generator).to(device)
    half_scores, sub_keys = make_picks(rows, heads, 3, picks, device=device)
    found = Addresses(half_scores[:, :, 0], slots, half_scores, sub_keys)

    def call(initial, queries, targets, gates, mask):
        def empty(count: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(3, count, *shape, dtype=dtype, device=device)

        of_tokens = (empty(4, heads, 6, dtype=HALF), empty(4), empty(4), empty(3, width, dtype=HALF), empty(3, width))
        of_picks = (empty(3, heads, picks, dtype=torch.int64), empty(3, all_picks), empty(3, heads, 2, picks))
        queue = Queue(*of_tokens, *of_picks, empty(3, heads, 2, picks, dtype=torch.int32))
        output = torch.zeros_like(targets)
        if name == "targets" and targets.stride(dim) > 2**29:
            output = far(output, dim)
        how = {"tokens": Tokens(queries, targets, gates, mask), "queue": queue, "places": places, "lookahead": 1}
        pool.read_sessions(buffer, initial, indices, seats, found, weights, output, **how)
        return queue, output.contiguous()

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
        return writes, plan_writes_grad(*grads, gates, mask, 5, 2, 0, o)

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
