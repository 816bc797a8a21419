"""torch.compile: a chunk, the memory and its steps, in one graph and with one compilation for all lengths."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fwpkm_kernels
from fwpkm_kernels import (
    MemoryState,
    chunk_value_update,
    chunk_value_update_,
    fast_weight_memory,
    fast_weight_memory_step,
    product_key_lookup,
    product_key_update,
    sparse_value_gather,
    testing,
)
from tests.conftest import Place
from tests.helpers.memory import (
    BOUNDARIES,
    KEY_GRADIENTS,
    assert_close,
    assert_same_bits,
    gradients_of,
    leaves_of,
    make_inputs,
    named,
    run,
)
from tests.helpers.models import CPU, ON_A_GPU, PLACES_OF_LAYERS, Model, loss, make_leaves, make_x, squares, step


def assert_same_step(compiled, rows: int, device: str = "cpu"):
    leaves, eager_leaves = make_leaves(rows, device), make_leaves(rows, device)
    for name in ("queries", "targets", "gates"):
        torch._dynamo.mark_dynamic(leaves[name], 0)
    outputs, eager_outputs = compiled(**leaves), step(**eager_leaves)
    loss(outputs).backward()
    loss(eager_outputs).backward()
    for actual, expected in zip(outputs, eager_outputs, strict=True):
        torch.testing.assert_close(actual, expected)
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, eager_leaves[name].grad, msg=lambda m, name=name: f"{name}: {m}")


@PLACES_OF_LAYERS
def test_a_compiled_chunk_equals_eager(place):
    assert_same_step(torch.compile(step, fullgraph=True), 20, place.device)


def test_one_compilation_of_a_chunk_serves_every_number_of_tokens():
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


def assert_same_training(
    compiled: Callable[[Model], Any], counter: CompileCounterWithBackend, mark: bool, place: Place
) -> None:
    """Several training steps of varying lengths, outputs and gradients and what the optimizer makes of them."""
    models = [Model(device=place.device, backend=place.backend) for _ in range(2)]
    runs = compiled(models[0]), models[1]
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9) for model in models]
    frames = []
    for length in (13, 18, 12, 22):  # products of fewer rows on a CPU are compiled otherwise by inductor itself
        results = []
        for forward, optimizer in zip(runs, optimizers, strict=True):
            x = make_x(length, seed=length).to(place.device).requires_grad_()
            if mark and forward is runs[0]:
                torch._dynamo.mark_dynamic(x, 1)
            optimizer.zero_grad()
            outputs = forward(x)
            squares(outputs).backward()
            optimizer.step()
            results.append([*outputs, x.grad])
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)
        for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            assert one.grad.any()
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
        frames.append(counter.frame_count)
    if mark:
        assert frames[0] == 1
    assert len(set(frames)) == 1


#: Inductor on a CPU starts a C++ compiler for each graph.
BACKENDS_AND_PLACES = [
    ("aot_eager", CPU),
    pytest.param("inductor", CPU, marks=pytest.mark.slow),
    *(pytest.param(backend, *ON_A_GPU.values, marks=pytest.mark.gpu) for backend in ("aot_eager", "inductor")),
]


@pytest.mark.parametrize("backend, place", BACKENDS_AND_PLACES, ids=lambda x: getattr(x, "device", x))
def test_compiled_training(backend, place):
    """One compilation for all lengths, as their dimension is marked dynamic."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    assert_same_training(functools.partial(torch.compile, fullgraph=True, backend=counter), counter, True, place)


def test_compiled_training_where_all_dimensions_are_dynamic():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = functools.partial(torch.compile, fullgraph=True, backend=counter, dynamic=True)
    assert_same_training(compiled, counter, False, CPU)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_training_with_coupled_keys(backend):
    """What Dynamo cannot trace, the backward of key_gradient="all", runs as it is; all else is compiled around it."""
    results = []
    for compiled in (True, False):
        model, x = Model(), make_x(5).requires_grad_()
        model.options |= {"key_gradient": "all"}
        torch._dynamo.reset()
        outputs = (torch.compile(model, backend=backend) if compiled else model)(x)
        squares(outputs).backward()
        results.append([*outputs, x.grad, *(parameter.grad for parameter in model.parameters())])
    assert all(x.any() for x in results[1])
    torch.testing.assert_close(*results)


def bad_calls() -> dict[str, tuple[str, Callable[[Tensor], Any], Tensor]]:
    """Of every public function: an argument that it refuses, a call with that one, and the tensor to call it with."""
    queries, keys = testing.make_lookup_inputs(3, 2, 6, 8)
    update = testing.make_update_inputs(3, 4, 36, 7)
    tensors = update._asdict()
    del tensors["weights"]
    targets, state = torch.randn(1, 3, 7), MemoryState(keys, update.values)
    memory, options = (targets, keys, update.values), {"chunk_size": 2, "top_k": 2}
    other = torch.zeros(3, 5, dtype=torch.int64)
    return {
        "product_key_lookup": ("top_k", lambda x: product_key_lookup(x, keys, 99), queries),
        "sparse_value_gather": ("weights", lambda x: sparse_value_gather(update.values, other, x), update.weights),
        "chunk_value_update": ("clip", lambda x: chunk_value_update(**tensors, weights=x, clip=-1.0), update.weights),
        "chunk_value_update_": ("clip", lambda x: chunk_value_update_(**tensors, weights=x, clip=-1.0), update.weights),
        "product_key_update": ("eps", lambda x: product_key_update(keys, x, top_k=2, eps=0.0), queries),
        "fast_weight_memory": ("step", lambda x: fast_weight_memory(x, *memory, **options, step="?"), queries[None]),
        "fast_weight_memory_step": (
            "lookahead",
            lambda x: fast_weight_memory_step(state, x, targets, **options, lookahead=-1),
            queries[None],
        ),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_compiled_functions_name_a_bad_argument(name):
    argument, call, x = bad_calls()[name]
    torch._dynamo.reset()
    with pytest.raises(ValueError, match=f"^`{argument}` must "):
        torch.compile(lambda x: call(x * 2.0), backend="eager")(x.requires_grad_())


@pytest.mark.slow
def test_compiled_autograd():
    """The backward pass, too, goes through Dynamo, in one graph."""
    model, x = Model(), make_x(9)
    squares(model(x)).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    torch._dynamo.reset()
    loss = squares(torch.compile(model, fullgraph=True, backend="aot_eager")(x))
    with torch._dynamo.compiled_autograd._enable(torch.compile(fullgraph=True, backend="aot_eager")):
        loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend, place", BACKENDS_AND_PLACES, ids=lambda x: getattr(x, "device", x))
def test_compiled_streaming(backend, place):
    """Steps of varying lengths through one compilation, with the layers around them."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    model = Model(device=place.device, backend=place.backend).requires_grad_(False)
    states = [MemoryState(model.keys, model.values) for _ in range(2)]
    for state in states:
        model.stream(state, make_x(3).to(place.device))  # the first step binds
    compiled = torch.compile(Model.stream, fullgraph=True, backend=counter)
    for seed, length in enumerate((2, 5, 9, 3, 4)):
        x, plain = (make_x(length, seed).to(place.device) for _ in range(2))
        torch._dynamo.mark_dynamic(x, 1)
        torch.testing.assert_close(compiled(model, states[0], x), model.stream(states[1], plain))
    assert counter.frame_count == 1
    for name, saved in states[0].state_dict().items():
        torch.testing.assert_close(saved, states[1].state_dict()[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("bound", [False, True], ids=["unbound", "bound"])
def test_compilations_of_a_streaming_step(bound):
    """One where tokens are marked dynamic, one more if the first call binds, one more for single tokens."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model = Model().requires_grad_(False)
    state, expected = MemoryState(model.keys, model.values), MemoryState(model.keys, model.values)
    if bound:
        for one in (state, expected):
            model.stream(one, make_x(3))
    compiled = torch.compile(Model.stream, fullgraph=True, backend=counter)
    frames = []
    for seed, length in enumerate((3, 5, 2, 9, 4, 1, 1, 7, 1)):
        x, plain = make_x(length, seed), make_x(length, seed)
        if length > 1:
            torch._dynamo.mark_dynamic(x, 1)
        torch.testing.assert_close(compiled(model, state, x), model.stream(expected, plain))
        frames.append(counter.frame_count)
    assert frames == [1, *([1] * 4 + [2] * 4 if bound else [2] * 4 + [3] * 4)]


def scheduled(name: str) -> Callable[..., Tensor]:
    """A call of a public function with a step size, a number or a tensor; the table that it leaves."""
    update = testing.make_update_inputs(6, 4, 36, 7, gates=True, dtype=torch.float64)
    tokens = {name: x.detach() for name, x in Model().tokens(make_x(4)).items()}
    gates = tokens.pop("gates")
    _, keys = testing.make_lookup_inputs(3, 2, 6, 8, dtype=torch.float64)
    state = MemoryState(keys, update.values)
    options = {"chunk_size": 4, "top_k": 2, "lookahead": 0, "addressing_weight": 0.0}

    def write(lr: float = 1.0, factor: Tensor | None = None) -> Tensor:
        scale = None if factor is None else (4.0 * factor).expand(6)
        return chunk_value_update(**update._asdict(), lr=lr, scale=scale)

    def memory(lr: float = 1.0, factor: Tensor | None = None) -> Tensor:
        scaled = gates if factor is None else gates * factor
        return fast_weight_memory(**tokens, keys=keys, values=update.values, gates=scaled, lr=lr, **options).values

    def step(lr: float = 1.0, factor: Tensor | None = None) -> Tensor:
        fast_weight_memory_step(state, **tokens, gates=gates if factor is None else gates * factor, lr=lr, **options)
        return state.values.clone()

    return {"chunk_value_update": write, "fast_weight_memory": memory, "fast_weight_memory_step": step}[name]


@pytest.mark.parametrize("name", ["chunk_value_update", "fast_weight_memory", "fast_weight_memory_step"])
def test_a_schedule_of_step_sizes_compiles_once_as_a_tensor(name):
    """The way around a compilation for every new number, of which there may be few."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    run, expected = scheduled(name), scheduled(name)
    expected(), run()  # the first step of a state binds
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    factors = [1.0 / (1 + i) ** 0.5 for i in range(torch._dynamo.config.recompile_limit + 2)]
    for factor in factors:
        actual = compiled(factor=torch.tensor(factor, dtype=torch.float64))
        torch.testing.assert_close(actual, expected(lr=factor), rtol=1e-12, atol=1e-12)
    assert counter.frame_count == 1


def assert_compiled_equals_eager(compiled: Callable[..., Any], length: int, **options: Any) -> None:
    """Outputs, and gradients of all inputs, with the number of tokens marked dynamic."""
    inputs = make_inputs(2, length, heads=2, mask="bool", dtype=torch.float32)
    leaves = leaves_of(inputs)
    expected = named(*run(fast_weight_memory, inputs, **options))
    for name in ("queries", "targets", "gates"):
        torch._dynamo.mark_dynamic(leaves[name], 1)
    torch._dynamo.mark_dynamic(inputs["mask"], 1)
    outputs = compiled(**leaves, mask=inputs["mask"])
    assert_close(named(outputs, gradients_of(outputs, leaves)), expected, 1e-5)


@BOUNDARIES
def test_a_compiled_memory_equals_eager(boundary):
    options = {"chunk_size": 3, "top_k": 2, "lookahead": 2, "boundary": boundary}

    def step(**inputs):
        return fast_weight_memory(**inputs, **options)

    torch._dynamo.reset()
    assert_compiled_equals_eager(torch.compile(step, fullgraph=True), 8, **options)


@pytest.mark.parametrize("addressing_weight", [1.0, 0.0])
@BOUNDARIES
def test_one_compilation_of_the_memory_serves_every_number_of_tokens(boundary, addressing_weight):
    options = {"chunk_size": 3, "top_k": 2, "boundary": boundary, "addressing_weight": addressing_weight}

    def step(**inputs):
        return fast_weight_memory(**inputs, **options)

    torch._dynamo.reset()  # the same code with other options counts as a recompilation
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for length in (8, 20, 5, 12):
        assert_compiled_equals_eager(compiled, length, **options)
    assert counter.frame_count == 1


@KEY_GRADIENTS
def test_a_compiled_memory_without_gradients(key_gradient):
    inputs = make_inputs(dtype=torch.float32)

    def read(**inputs):
        return fast_weight_memory(**inputs, chunk_size=3, top_k=2, key_gradient=key_gradient)

    compiled = torch.compile(read, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(**inputs)._asdict(), read(**inputs)._asdict())


@pytest.mark.parametrize("name", ["ProductKeyLookup", "ProductKeyUpdate", "FastWeightMemory"])
def test_a_function_takes_any_number_of_options_in_compiled_code(name):
    """Dynamo drops ctx where the arguments are as many as the parameters of forward."""
    queries, keys = testing.make_lookup_inputs(3, 2, 6, 8)
    given, options = {
        "ProductKeyLookup": ((queries, keys, 2), ("dot", 1e-3, "ieee", "torch")),
        "ProductKeyUpdate": ((keys, queries, 2), ("dot", 1e-3, 0.5, 1.0, 0.0, None, "ieee", "torch")),
        "FastWeightMemory": (
            (queries[None], torch.randn(1, 3, 7), keys, torch.randn(36, 7), 2, 2),
            (1, "dot", 1e-3, "softmax", 1.0, None, None),
        ),
    }[name]
    function = getattr(fwpkm_kernels, name)
    for count in range(len(options) + 1):
        torch._dynamo.reset()
        arguments = (*given, *options[:count])
        compiled = torch.compile(lambda *args: function.apply(*args), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*arguments), function.apply(*arguments), rtol=0, atol=0)
