"""Activation checkpoints: what they compute again, and what must not be."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fwpkm_kernels import MemoryOutput, MemoryState, chunk_value_update_, fast_weight_memory, testing
from tests.helpers.memory import KEY_GRADIENTS, assert_same_bits, cotangents, small_call
from tests.helpers.models import PLACES_OF_LAYERS, Model, loss, make_leaves, make_x, squares, step


@PLACES_OF_LAYERS
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_chunk(use_reentrant, place):
    leaves, plain_leaves = make_leaves(20, place.device), make_leaves(20, place.device)
    loss(checkpoint(step, *leaves.values(), use_reentrant=use_reentrant)).backward()
    loss(step(**plain_leaves)).backward()
    for name, leaf in leaves.items():
        testing.assert_bitwise_equal(leaf.grad, plain_leaves[name].grad, name)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_model_in_autocast(use_reentrant):
    """What is computed again is computed as the first time."""
    grads = []
    for run in (lambda model, x: model(x), lambda model, x: checkpoint(model, x, use_reentrant=use_reentrant)):
        model, x = Model(torch.float32), make_x(9, dtype=torch.float32).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = run(model, x)
        squares(outputs).backward()
        grads.append([x.grad, *(parameter.grad for parameter in model.parameters())])
    for one, other in zip(*grads, strict=True):
        testing.assert_bitwise_equal(one, other)


@PLACES_OF_LAYERS
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_checkpoint_does_not_apply_a_step_twice(compiled, use_reentrant, place):
    """Its backward is refused, and the state is what one step made it."""
    model = Model(device=place.device, backend=place.backend)
    state, expected = MemoryState(model.keys, model.values), MemoryState(model.keys, model.values)
    run = torch.compile(model.stream, backend="aot_eager") if compiled else model.stream
    for one in (state, expected):
        model.stream(one, make_x(3).to(place.device))
    model.stream(expected, make_x(6).to(place.device))
    output = checkpoint(run, state, make_x(6).to(place.device).requires_grad_(), use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match="fast_weight_memory_step was called in a backward pass.*checkpoint"):
        output.sum().backward()
    for name, saved in state.state_dict().items():
        testing.assert_bitwise_equal(saved, expected.state_dict()[name], name)


def test_a_policy_that_saves_the_output_of_a_step():
    """The way to have a step inside of a checkpoint: it is not computed again."""

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        is_step = op is torch.ops.fwpkm_kernels.fast_weight_memory_step.default
        return CheckpointPolicy.MUST_SAVE if is_step else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    with_policy = functools.partial(checkpoint, use_reentrant=False, context_fn=contexts)
    grads, states = [], []
    for run in (lambda function, *args: function(*args), with_policy):
        model = Model()
        states.append(MemoryState(model.keys, model.values))
        for length in (3, 6):
            run(model.stream, states[-1], make_x(length)).sum().backward()
        grads.append([model.out.weight.grad, model.out.bias.grad])
    for one, other in zip(*grads, strict=True):
        testing.assert_bitwise_equal(one, other)
    assert states[0].position == 9
    for name, saved in states[0].state_dict().items():
        testing.assert_bitwise_equal(saved, states[1].state_dict()[name], name)


def make_writer() -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """A layer that writes a table in place, its input, and that table. What it does after that saves a tensor."""
    inputs = testing.make_update_inputs()

    def layer(x: Tensor) -> Tensor:
        x = x.sin()
        chunk_value_update_(*inputs[:4], x.detach(), lr=0.5)
        return x.exp()

    return layer, inputs.predictions.requires_grad_(), inputs.values


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_checkpoint_does_not_write_in_place_twice(compiled, use_reentrant):
    layer, x, expected = make_writer()
    layer(x)
    layer, x, table = make_writer()
    torch._dynamo.reset()
    run = torch.compile(layer, backend="aot_eager") if compiled else layer
    output = checkpoint(run, x, use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match="chunk_value_update_ was called in a backward pass.*checkpoint"):
        output.sum().backward()
    testing.assert_bitwise_equal(table, expected)


def test_a_policy_that_saves_a_write_in_place():
    """The way to have one inside of a checkpoint: backward does not do it again."""

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        is_write = op is torch.ops.fwpkm_kernels.chunk_value_update_.default
        return CheckpointPolicy.MUST_SAVE if is_write else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    results = []
    for run in (lambda layer, x: layer(x), functools.partial(checkpoint, use_reentrant=False, context_fn=contexts)):
        layer, x, table = make_writer()
        run(layer, x).sum().backward()
        results.append((x.grad, table))
    for one, other in zip(*results, strict=True):
        testing.assert_bitwise_equal(one, other)


@pytest.mark.parametrize("use_reentrant", [False, True])
@KEY_GRADIENTS
def test_a_checkpointed_memory(key_gradient, use_reentrant):
    leaves, options = small_call(key_gradient)

    def outputs(queries, targets, keys, values, gates):
        return tuple(fast_weight_memory(queries, targets, keys, values, gates=gates, **options))

    # A reentrant checkpoint gives leaves their gradients in backward() only.
    def gradients(result):
        torch.autograd.backward(result[:3], cotangents(MemoryOutput(*result)))
        found = {name: x.grad for name, x in leaves.items()}
        for x in leaves.values():
            x.grad = None
        return found

    expected = gradients(outputs(**leaves))
    assert_same_bits(gradients(checkpoint(outputs, *leaves.values(), use_reentrant=use_reentrant)), expected)
