"""The operations inside PyTorch: torch.compile, autocast, autograd's corners, checkpointing."""

import os
import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from fwpkm_kernels import chunk_value_update, chunk_value_update_, product_key_lookup, sparse_value_gather, testing


def make_leaves(rows: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Inputs of `step`: 2 heads, 9 sub-keys, 81 slots."""
    queries, keys = testing.make_lookup_inputs(rows, 2, 9, 14, device=device)
    inputs = testing.make_update_inputs(rows, 8, 81, 13, gates=True, device=device)
    leaves = {"queries": queries, "keys": keys, "values": inputs.values, "targets": inputs.targets}
    return {name: x.requires_grad_() for name, x in {**leaves, "gates": inputs.gates}.items()}


def step(queries, keys, values, targets, gates):
    """One chunk: look up, read, write."""
    scores, slots = product_key_lookup(queries, keys, 4)
    slots, weights = slots.flatten(1), scores.flatten(1).softmax(-1)
    out = sparse_value_gather(values, slots, weights)
    return out, chunk_value_update(values, slots, weights, targets, out, gates=gates, clip=0.1)


def loss(outputs):
    out, new_values = outputs
    return out.sum() + new_values.square().sum()


def assert_same_step(compiled, rows: int):
    leaves, eager_leaves = make_leaves(rows), make_leaves(rows)
    for name in ("queries", "targets", "gates"):
        torch._dynamo.mark_dynamic(leaves[name], 0)
    outputs, eager_outputs = compiled(**leaves), step(**eager_leaves)
    loss(outputs).backward()
    loss(eager_outputs).backward()
    for actual, expected in zip(outputs, eager_outputs, strict=True):
        torch.testing.assert_close(actual, expected)
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, eager_leaves[name].grad, msg=lambda m, name=name: f"{name}: {m}")


def test_compiled_step_equals_eager():
    assert_same_step(torch.compile(step, fullgraph=True), 20)


def test_one_compilation_serves_every_number_of_tokens():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for rows in (20, 33, 7):
        assert_same_step(compiled, rows)
    assert counter.frame_count == 1


def test_compiled_write_in_place():
    def write(values, slots, weights, targets, predictions):
        chunk_value_update_(values, slots, weights, targets, predictions, weight_decay=0.1)
        return values.sum()

    inputs = testing.make_update_inputs()[:5]
    expected = testing.make_update_inputs()[:5]
    total = torch.compile(write, fullgraph=True, backend="aot_eager")(*inputs)
    assert total == write(*expected)
    testing.assert_bitwise_equal(inputs[0], expected[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype, place):
    """An operation's precision is what its arguments say; autocast belongs to the layers around it."""
    leaves, plain_leaves = make_leaves(20, place.device), make_leaves(20, place.device)

    def run(queries, keys, values, targets, gates):
        scores, slots = product_key_lookup(queries, keys, 4, backend=place.backend)
        slots, weights = slots.flatten(1), scores.flatten(1) / 8
        out = sparse_value_gather(values, slots, weights, backend=place.backend)
        new_values = chunk_value_update(values, slots, weights, targets, out, gates=gates, backend=place.backend)
        return out, new_values

    expected = run(**plain_leaves)
    loss(expected).backward()
    with torch.autocast(place.device, dtype=dtype):
        outputs = run(**leaves)
        loss(outputs).backward()
    for actual, plain in zip(outputs, expected, strict=True):
        testing.assert_bitwise_equal(actual, plain)
    for name, leaf in leaves.items():
        testing.assert_bitwise_equal(leaf.grad, plain_leaves[name].grad, name)


def test_checkpointing():
    leaves, plain_leaves = make_leaves(20), make_leaves(20)
    loss(checkpoint(step, *leaves.values(), use_reentrant=False)).backward()
    loss(step(**plain_leaves)).backward()
    for name, leaf in leaves.items():
        testing.assert_bitwise_equal(leaf.grad, plain_leaves[name].grad, name)


def test_backward_twice_with_retain_graph(place):
    """Nothing that backward reads is spoilt by an earlier backward."""
    queries, keys = (x.requires_grad_() for x in testing.make_lookup_inputs(5, 1, 9, 8, device=place.device))
    inputs = testing.make_update_inputs(5, 3, 81, 6, device=place.device)
    values, weights = inputs.values.requires_grad_(), inputs.weights.requires_grad_()
    scores, _ = product_key_lookup(queries, keys, 3, backend=place.backend)
    new_values = chunk_value_update(**inputs._asdict(), clip=0.3, backend=place.backend)
    out = sparse_value_gather(new_values, inputs.slots, weights * scores.flatten(1), backend=place.backend)
    leaves = [queries, keys, values, weights]
    first = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(out.sum(), leaves), strict=True):
        testing.assert_bitwise_equal(one, other)


def test_triton_on_cpu_tensors_without_the_interpreter_is_an_error():
    """In a process of its own: here the interpreter may be on."""
    script = """
import torch, fwpkm_kernels
try:
    fwpkm_kernels.product_key_lookup(torch.ones(1, 1, 4), torch.ones(1, 2, 3, 2), 1, backend="triton")
except ValueError as error:
    assert "`backend`" in str(error) and "TRITON_INTERPRET=1" in str(error), error
else:
    raise SystemExit("no error")
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


@pytest.mark.gpu
def test_the_torch_backend_runs_on_a_gpu():
    """It gives what it gives on the CPU, up to rounding, also where PyTorch is told to be deterministic."""

    def run(device):
        queries, keys = (x.requires_grad_() for x in testing.make_lookup_inputs(20, 2, 9, 14, device=device))
        inputs = testing.make_update_inputs(20, 8, 81, 13, gates=True, device=device)
        leaves = [queries, keys, inputs.values.requires_grad_(), inputs.targets.requires_grad_()]
        scores, slots = product_key_lookup(queries, keys, 4, backend="torch")
        slots, weights = slots.flatten(1), scores.flatten(1).softmax(-1)
        out = sparse_value_gather(inputs.values, slots, weights, backend="torch")
        new_values = chunk_value_update(
            inputs.values, slots, weights, inputs.targets, out, gates=inputs.gates, clip=0.1, backend="torch"
        )
        gradients = torch.autograd.grad(loss((out, new_values)), leaves)
        return [x.detach().cpu() for x in (scores, slots, out, new_values, *gradients)]

    with testing.poisoned_memory():
        for on_gpu, on_cpu in zip(run("cuda"), run("cpu"), strict=True):
            torch.testing.assert_close(on_gpu, on_cpu)
