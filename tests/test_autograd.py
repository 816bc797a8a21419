"""Autograd: what forward keeps, what backward gives, and what may change between them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import reference
from fwpkm_kernels import (
    FastWeightMemory,
    MemoryOutput,
    chunk_value_update,
    fast_weight_memory,
    product_key_lookup,
    sequence,
    sparse_value_gather,
    testing,
)
from fwpkm_kernels.options import STEPS
from tests.conftest import PLACES
from tests.helpers.memory import (
    BOUNDARIES,
    DIFFERENTIABLE,
    KEY_GRADIENTS,
    PLACES_SLOW,
    assert_close,
    assert_same_bits,
    check_memory,
    cotangents,
    gradients_of,
    leaves_of,
    make_inputs,
    named,
    run,
    small_call,
)
from tests.helpers.models import Model, loss, make_leaves, make_x, squares


@BOUNDARIES
@pytest.mark.parametrize("step", STEPS)
@KEY_GRADIENTS
@pytest.mark.parametrize("fast_mode", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["directions", "whole"])
def test_gradcheck(fast_mode, key_gradient, step, boundary):
    """In random directions, and, slowly, element by element."""
    leaves = leaves_of(make_inputs(2, 7, num_keys=3, width=2))
    mask = make_inputs(2, 7, mask="real")["mask"]
    options = {"chunk_size": 3, "top_k": 2, "lookahead": 2, "step": step, "boundary": boundary}

    def outputs(queries, targets, keys, values, gates):
        tensors = (queries, targets, keys, values)
        return fast_weight_memory(*tensors, gates=gates, mask=mask, key_gradient=key_gradient, **options)[:3]

    assert gradcheck(outputs, list(leaves.values()), fast_mode=fast_mode)


@KEY_GRADIENTS
def test_backward_through_the_memory_twice_with_retain_graph(key_gradient, place):
    """Nothing that backward reads, and no incoming gradient, is spoilt by an earlier backward."""
    inputs = make_inputs(1, 3, mask="real", dtype=torch.float32, device=place.device)
    leaves = leaves_of(inputs)
    options = {"chunk_size": 2, "top_k": 2, "clip": 0.3, "key_gradient": key_gradient, "backend": place.backend}
    outputs = fast_weight_memory(**{**inputs, **leaves}, **options)
    incoming = cotangents(outputs)
    with testing.assert_unchanged(incoming):
        first = torch.autograd.grad(outputs[:3], list(leaves.values()), incoming, retain_graph=True)
        second = torch.autograd.grad(outputs[:3], list(leaves.values()), incoming)
    assert_same_bits(dict(zip(leaves, first, strict=True)), dict(zip(leaves, second, strict=True)))


def two_calls(function: Callable[..., Any], inputs: dict[str, Any], *, detach: bool = False, **options: Any) -> Any:
    """The gradients of a loss on both outputs and the final state, the second half of the tokens in a second call."""
    leaves = leaves_of(inputs)
    by_token = ("queries", "targets", "gates", "mask")
    tensors = inputs | leaves
    first = function(**{k: x[:, :4] if k in by_token else x for k, x in tensors.items()}, **options)
    state = {"keys": first.keys, "values": first.values}
    if detach:
        state = {name: x.detach() for name, x in state.items()}
    second = function(**{k: x[:, 4:] if k in by_token else x for k, x in tensors.items()} | state, **options)
    output = torch.cat((first.output, second.output), dim=1)
    joined = MemoryOutput(output, second.keys, second.values, second.slots, second.weights)
    return named(joined, gradients_of(joined, leaves))


@BOUNDARIES
@KEY_GRADIENTS
@pytest.mark.parametrize("detach", [False, True], ids=["through", "detached"])
def test_two_calls_in_a_row(detach, key_gradient, boundary):
    inputs = make_inputs(2, 9, mask="bool")
    options = {"chunk_size": 2, "top_k": 2, "boundary": boundary, "key_gradient": key_gradient, "detach": detach}
    actual = two_calls(fast_weight_memory, inputs, **options)
    assert_close(actual, two_calls(reference.fast_weight_memory, inputs, **options))
    if detach:
        # No later than the first call's own outputs, the first tokens' targets have no effect.
        assert actual["gradient of targets"][:, 4:].any()
        assert not actual["gradient of targets"][:, 3].any()
        assert not actual["gradient of values"].isnan().any()


@KEY_GRADIENTS
@pytest.mark.parametrize("result", ["output", "keys", "values"])
def test_gradient_of_one_result_alone(result, key_gradient):
    inputs = make_inputs(2, 8, mask="real")

    def gradients(function):
        leaves = leaves_of(inputs)
        outputs = function(**inputs | leaves, chunk_size=3, top_k=2, key_gradient=key_gradient)
        x = getattr(outputs, result)
        cotangent = testing.random_cotangent(x)
        found = torch.autograd.grad(x, list(leaves.values()), cotangent, allow_unused=True, materialize_grads=True)
        return dict(zip(leaves, found, strict=True))

    assert_close(gradients(fast_weight_memory), gradients(reference.fast_weight_memory))


@KEY_GRADIENTS
@pytest.mark.parametrize(
    "wanted", [("values",), ("gates",), ("keys",), ("queries", "targets"), ("targets", "gates")], ids=str
)
def test_gradients_of_some_inputs(wanted, key_gradient):
    leaves, options = small_call(key_gradient)
    expected = gradients_of(fast_weight_memory(**leaves, **options), leaves)
    some = {name: x.detach().requires_grad_(name in wanted) for name, x in leaves.items()}
    outputs = fast_weight_memory(**some, **options)
    actual = gradients_of(outputs, {name: some[name] for name in wanted})
    assert_same_bits(actual, {name: expected[name] for name in wanted})


@pytest.mark.parametrize("key_gradient", ["addressing", "all"])
@pytest.mark.parametrize("name", [*DIFFERENTIABLE, "mask"])
def test_inputs_changed_after_forward(name, key_gradient):
    """The gradients stay what they were, or autograd notices."""
    leaves, options = small_call(key_gradient, addressing_weight=0.5)
    expected = gradients_of(fast_weight_memory(**leaves, **options), leaves)
    outputs = fast_weight_memory(**leaves, **options)
    with torch.no_grad():
        (leaves | options)[name].mul_(2.0)
    if name == "values" and key_gradient == "addressing":
        assert_same_bits(gradients_of(outputs, leaves), expected)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients_of(outputs, leaves)


@KEY_GRADIENTS
@pytest.mark.parametrize("addressing_weight", [1.0, 0.0])
def test_results_changed_after_forward(addressing_weight, key_gradient):
    leaves, options = small_call(key_gradient, addressing_weight=addressing_weight)
    expected = gradients_of(fast_weight_memory(**leaves, **options), leaves)
    outputs = fast_weight_memory(**leaves, **options)
    with torch.no_grad():
        for x in outputs:
            x.zero_()
    assert_same_bits(gradients_of(outputs, leaves), expected)


@pytest.mark.parametrize("options", [{}, {"clip": 0.1, "weight_decay": 0.1}, {"addressing_weight": 0.0}], ids=str)
def test_what_is_kept_for_backward(options):
    """The undo log and small tensors for each read, keys for each chunk, and no table."""
    length, chunk_size, top_k, width, num_keys = 2048, 512, 8, 64, 256
    inputs = make_inputs(1, length, 1, num_keys, 16, width, dtype=torch.float32)
    leaves = leaves_of(inputs)
    held = {x.untyped_storage().data_ptr() for x in leaves.values()}
    saved = {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        assert num_keys**2 not in x.shape
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = fast_weight_memory(**leaves, chunk_size=chunk_size, top_k=top_k, **options)
    assert leaves["values"].untyped_storage().data_ptr() not in saved
    assert max(saved.values()) < leaves["values"].nbytes // 2
    kept = sum(size for storage, size in saved.items() if storage not in held)
    assert 0 < kept <= 2 * length * (top_k + 1) * width * 4 + length // chunk_size * leaves["keys"].nbytes
    context = outputs.output.grad_fn
    assert not any(isinstance(x, Tensor) for x in vars(context).values())


def test_of_many_keys_only_the_picked_are_kept():
    """Where a chunk picks fewer sub-keys than there are, no set of keys is kept either."""
    inputs = make_inputs(1, 64, num_keys=64, key_width=16, mask="real")
    leaves, options = leaves_of(inputs), {"chunk_size": 4, "top_k": 2}
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        fast_weight_memory(**{**inputs, **leaves}, **options)
    mine = [size for address, size in saved.items() if address != leaves["keys"].data_ptr()]
    assert max(mine) < 4 * leaves["keys"].nbytes  # of 16 chunks
    check_memory(inputs, PLACES[0], **options)


@KEY_GRADIENTS
def test_slots_and_weights_that_come_back_are_not_differentiable(key_gradient):
    leaves, options = small_call(key_gradient)
    outputs = fast_weight_memory(**leaves, **options)
    assert [x.requires_grad for x in outputs] == [True, True, True, False, False]


def test_a_mask_that_requires_gradients_gets_none():
    inputs = make_inputs(2, 6, mask="real")
    inputs["mask"] = inputs["mask"].requires_grad_()
    assert not fast_weight_memory(**inputs, chunk_size=3, top_k=2).output.requires_grad


def test_addresses_are_not_differentiated_for_nothing(monkeypatch):
    def fail(*args: Any) -> Any:
        raise AssertionError("the gradients of queries and keys are not asked for")

    monkeypatch.setattr(sequence, "address_scan_grad", fail)
    inputs = make_inputs(2, 6)
    inputs["values"] = inputs["values"].requires_grad_()
    inputs["gates"] = inputs["gates"].requires_grad_()
    output = fast_weight_memory(**inputs, chunk_size=3, top_k=2).output
    assert all(grad.any() for grad in torch.autograd.grad(output.sum(), (inputs["values"], inputs["gates"])))


@PLACES_SLOW
@KEY_GRADIENTS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_memory(dtype, key_gradient, place):
    inputs = make_inputs(1, 3, dtype=torch.float32, device=place.device)
    options = {"chunk_size": 2, "top_k": 2, "key_gradient": key_gradient, "backend": place.backend}
    expected = named(*run(fast_weight_memory, inputs, **options))
    with torch.autocast(place.device, dtype=dtype):
        assert_same_bits(named(*run(fast_weight_memory, inputs, **options)), expected)


def test_apply_takes_the_arguments_of_the_function_in_its_order():
    leaves, _ = small_call()
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, 3:] = False
    tensors = [leaves[name] for name in DIFFERENTIABLE[:4]]
    positional = (3, 2, 2, "dot", 0.01, "silu", 0.7, leaves["gates"], mask, 0.5, 0.01, 0.2, 0.6, "all", "normalized")
    outputs = MemoryOutput(*FastWeightMemory.apply(*tensors, *positional, "drop", "ieee", "torch"))
    expected = fast_weight_memory(
        **leaves,
        chunk_size=3,
        top_k=2,
        lookahead=2,
        score="dot",
        eps=0.01,
        weighting="silu",
        temperature=0.7,
        mask=mask,
        lr=0.5,
        weight_decay=0.01,
        clip=0.2,
        addressing_weight=0.6,
        key_gradient="all",
        step="normalized",
        boundary="drop",
        precision="ieee",
        backend="torch",
    )
    actual = named(outputs, gradients_of(outputs, leaves))
    assert_same_bits(actual, named(expected, gradients_of(expected, leaves)))


def test_apply_has_the_defaults_of_the_function():
    leaves = leaves_of(make_inputs(1, 600, num_keys=9, gates=False, dtype=torch.float32))
    outputs = MemoryOutput(*FastWeightMemory.apply(*leaves.values()))
    actual = named(outputs, gradients_of(outputs, leaves))
    expected = fast_weight_memory(**leaves)
    assert_same_bits(actual, named(expected, gradients_of(expected, leaves)))
    assert_close(expected._asdict(), reference.fast_weight_memory(**leaves)._asdict(), 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_operation(dtype, place):
    """An operation's precision is what its arguments say; autocast belongs to the layers around it."""
    leaves, plain_leaves = make_leaves(3, place.device), make_leaves(3, place.device)

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


def test_backward_through_operations_twice_with_retain_graph(place):
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", PLACES[:1] + [place for place in PLACES[1:] if place.device == "cuda"], ids=str)
def test_a_model_in_autocast(dtype, place):
    """The layers around the memory give half precision; the memory takes it as if it had been given it by hand."""
    model, x = Model(torch.float32, place.device, place.backend), make_x(9, dtype=torch.float32).to(place.device)
    with torch.autocast(place.device, dtype=dtype):
        tokens = model.tokens(x)
        assert {x.dtype for x in tokens.values()} == {dtype}
        memory = fast_weight_memory(**tokens, keys=model.keys, values=model.values, **model.options)
        squares(model(x)).backward()
    assert all(parameter.grad.dtype == torch.float32 and parameter.grad.any() for parameter in model.parameters())
    tokens = {name: x.detach() for name, x in tokens.items()}
    expected = fast_weight_memory(**tokens, keys=model.keys, values=model.values, **model.options)
    assert (memory.output.dtype, memory.values.dtype) == (dtype, torch.float32)
    for one, other in zip(memory, expected, strict=True):
        testing.assert_bitwise_equal(one, other)


def test_gradients_add_up():
    """Over several backward passes: of two batches, and of two losses of one graph."""
    model = Model()
    grads = []
    for seed in (0, 1):
        model.zero_grad()
        squares(model(make_x(9, seed))).backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    model.zero_grad()
    for seed in (0, 1):
        squares(model(make_x(9, seed))).backward()
    for parameter, one, other in zip(model.parameters(), *grads, strict=True):
        testing.assert_bitwise_equal(parameter.grad, one + other)
    model.zero_grad()
    outputs = model(make_x(9))
    for x in outputs:
        x.square().sum().backward(retain_graph=True)
    for parameter, expected in zip(model.parameters(), grads[0], strict=True):
        torch.testing.assert_close(parameter.grad, expected)


def test_training_beside_no_grad_and_inference_mode():
    model, x = Model(), make_x(9)
    expected = model(x)
    with torch.no_grad():
        without = model(x)
    with torch.inference_mode():
        inferred = model(x)
    for one, *others in zip(expected, without, inferred, strict=True):
        for other in others:
            assert not other.requires_grad
            testing.assert_bitwise_equal(other, one)
    # A memory that was written without gradients is where training goes on.
    tokens = model.tokens(x)
    outputs = fast_weight_memory(**tokens, keys=without[1], values=without[2], **model.options)
    squares(outputs[:1]).backward()
    assert model.queries.weight.grad.any()
    with torch.enable_grad(), torch.no_grad():
        assert not model(x)[0].requires_grad


def test_functional_call():
    """With parameters from elsewhere, as torch.func.functional_call puts them into a module; gradients reach those."""
    model, x = Model(), make_x(9)
    squares(model(x)).backward()
    parameters = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    squares(torch.func.functional_call(model, parameters, (x,))).backward()
    for name, parameter in model.named_parameters():
        testing.assert_bitwise_equal(parameters[name].grad, parameter.grad, name)
