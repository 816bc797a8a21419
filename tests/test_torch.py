"""The operations inside PyTorch: torch.compile, autocast, autograd's corners, checkpointing."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fwpkm_kernels import (
    ChunkValueUpdate,
    FastWeightMemory,
    MemoryState,
    ProductKeyLookup,
    ProductKeyUpdate,
    SparseValueGather,
    chunk_value_update,
    chunk_value_update_,
    fast_weight_memory,
    fast_weight_memory_step,
    product_key_lookup,
    product_key_update,
    sparse_value_gather,
    testing,
)
from tests.conftest import PLACES, Place

CPU = Place("auto", "cpu")
ON_A_GPU = pytest.param(Place("triton", "cuda"), marks=pytest.mark.gpu)
#: Without kernels, and with them compiled.
PLACES_OF_LAYERS = pytest.mark.parametrize("place", [CPU, ON_A_GPU], ids=lambda place: place.device)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_operation(dtype, place):
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


@PLACES_OF_LAYERS
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_chunk(use_reentrant, place):
    leaves, plain_leaves = make_leaves(20, place.device), make_leaves(20, place.device)
    loss(checkpoint(step, *leaves.values(), use_reentrant=use_reentrant)).backward()
    loss(step(**plain_leaves)).backward()
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


class Model(torch.nn.Module):
    """What a layer around the memory is: projections, the memory, a projection."""

    def __init__(self, dtype: torch.dtype = torch.float64, device: str = "cpu", backend: str = "auto") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.queries, self.targets = torch.nn.Linear(10, 2 * 8), torch.nn.Linear(10, 7)
        self.gates, self.out = torch.nn.Linear(10, 1), torch.nn.Linear(7, 10)
        self.keys = torch.nn.Parameter(torch.randn(2, 2, 6, 4))
        self.values = torch.nn.Parameter(torch.randn(36, 7))
        self.options = {"chunk_size": 4, "top_k": 2, "addressing_weight": 0.1, "backend": backend}
        self.to(device, dtype)

    def tokens(self, x: Tensor) -> dict[str, Tensor]:
        gates = self.gates(x).squeeze(-1).sigmoid()
        return {"queries": self.queries(x).unflatten(-1, (2, 8)), "targets": self.targets(x), "gates": gates}

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output, final keys and final values."""
        memory = fast_weight_memory(**self.tokens(x), keys=self.keys, values=self.values, **self.options)
        return self.out(memory.output), memory.keys, memory.values

    def stream(self, state: MemoryState, x: Tensor) -> Tensor:
        return self.out(fast_weight_memory_step(state, **self.tokens(x), **self.options)).tanh()


def make_x(length: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, length, 10, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def squares(outputs: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([x.double().square().sum() for x in outputs]).sum()


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
        for run, optimizer in zip(runs, optimizers, strict=True):
            x = make_x(length, seed=length).to(place.device).requires_grad_()
            if mark and run is runs[0]:
                torch._dynamo.mark_dynamic(x, 1)
            optimizer.zero_grad()
            outputs = run(x)
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


def calls() -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Every public function as a function of one of its tensors, and that tensor."""
    queries, keys = testing.make_lookup_inputs(3, 2, 6, 8, dtype=torch.float64)
    update = testing.make_update_inputs(3, 4, 36, 7, dtype=torch.float64)
    tokens = {name: x.detach() for name, x in Model().tokens(make_x(5)).items()}
    options = {"chunk_size": 2, "top_k": 2}

    def write(weights: Tensor) -> Tensor:
        return chunk_value_update(**{**update._asdict(), "weights": weights})

    def write_in_place(weights: Tensor) -> Tensor:
        chunk_value_update_(**{**update._asdict(), "weights": weights})
        return update.values

    def memory(queries: Tensor) -> Tensor:
        return fast_weight_memory(**{**tokens, "queries": queries}, keys=keys, values=update.values, **options).output

    state = MemoryState(keys, update.values)

    def step(queries: Tensor) -> Tensor:
        fast_weight_memory_step(state, **{**tokens, "queries": queries}, **options)
        return state.values

    return {
        "product_key_lookup": (lambda queries: product_key_lookup(queries, keys, 2)[0], queries),
        "sparse_value_gather": (lambda w: sparse_value_gather(update.values, update.slots, w), update.weights),
        "chunk_value_update": (write, update.weights),
        "chunk_value_update_": (write_in_place, update.weights),
        "product_key_update": (lambda queries: product_key_update(keys, queries, top_k=2), queries),
        "fast_weight_memory": (memory, tokens["queries"]),
        "fast_weight_memory_step": (step, tokens["queries"]),
    }


def with_tangent(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x, torch.ones_like(x)))


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "vmap": lambda function, x: torch.func.vmap(function)(torch.stack((x, x))),
    "grad": lambda function, x: torch.func.grad(lambda x: function(x).sum())(x),
    "vjp": torch.func.vjp,
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (torch.ones_like(x),)),
    "jacrev": lambda function, x: torch.func.jacrev(function)(x),
    "jacfwd": lambda function, x: torch.func.jacfwd(function)(x),
    "linearize": torch.func.linearize,
    "forward mode": with_tangent,
    "forward-mode jacobian": lambda function, x: torch.autograd.functional.jacobian(
        function, x, vectorize=True, strategy="forward-mode"
    ),
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", calls())
def test_transforms_are_refused(name, transform, requires_grad):
    """By the function itself, which says so, before it writes anything; and the next call runs."""
    if transform == "linearize" and name.endswith(("_", "_step")):
        pytest.skip("torch.func.linearize first calls the function as it is, and so writes")
    function, x = calls()[name]
    with torch.no_grad():
        before = function(x).clone()  # of what works in place, the table after the first write
        function, x = calls()[name]
        expected = "forward-mode" if "forward" in transform or transform == "linearize" else "torch.func"
        with torch.set_grad_enabled(True), pytest.raises(RuntimeError, match=f"^{name} does not .*{expected}"):
            TRANSFORMS[transform](function, x.clone().requires_grad_(requires_grad))
        testing.assert_bitwise_equal(function(x), before)


def test_the_refusal_says_where_a_batch_goes():
    function, x = calls()["product_key_lookup"]
    with pytest.raises(RuntimeError, match="instead of vmap, put the batch into the leading dimensions of `queries`"):
        torch.func.vmap(function)(torch.stack((x, x)))
    function, x = calls()["fast_weight_memory"]
    with pytest.raises(RuntimeError, match="instead of vmap, call it once for each item"):
        torch.func.vmap(function)(torch.stack((x, x)))


def test_a_backward_pass_under_a_transform_is_refused():
    function, x = calls()["sparse_value_gather"]
    x = x.requires_grad_()
    out = function(x)
    with pytest.raises(RuntimeError, match="^sparse_value_gather does not run under transforms"):
        torch.func.vmap(lambda grad: torch.autograd.grad(out, x, grad)[0])(torch.stack((out, out)).detach())


@pytest.mark.parametrize("name", [name for name in calls() if not name.endswith(("_", "_step"))])
def test_jacobians_and_vjps_of_autograd(name):
    """torch.autograd.functional, row by row; vectorized where PyTorch can loop over an operator, else an error."""
    function, x = calls()[name]
    expected = torch.stack(
        [
            torch.autograd.grad(function(leaf := x.clone().requires_grad_()).flatten()[i], leaf)[0]
            for i in range(function(x).numel())
        ]
    )
    jacobian = torch.autograd.functional.jacobian(function, x)
    testing.assert_bitwise_equal(jacobian.reshape(expected.shape), expected)
    cotangent = testing.random_cotangent(function(x))
    _, product = torch.autograd.functional.vjp(function, x, cotangent)
    torch.testing.assert_close(product, torch.einsum("i,i...->...", cotangent.flatten(), expected))
    if name == "fast_weight_memory":
        with pytest.raises(RuntimeError, match="fast_weight_memory_backward"):
            torch.autograd.functional.jacobian(function, x, vectorize=True)
    else:
        vectorized = torch.autograd.functional.jacobian(function, x, vectorize=True)
        testing.assert_bitwise_equal(vectorized, jacobian)


@pytest.mark.parametrize("training", [False, True])
def test_transforms_elsewhere_in_a_compiled_function(training):
    """The check compiles, and what other parts of the function do with vmap or grad is no concern of it."""
    model = Model().requires_grad_(training)

    def run(x: Tensor) -> Tensor:
        x = torch.func.vmap(lambda item: item * item.sum())(x)
        x = x + torch.func.grad(lambda x: x.cos().sum())(x)
        return squares(model(x)) + product_key_lookup(model.tokens(x)["queries"], model.keys, 2)[0].sum()

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    grads = []
    for one in (compiled, run):
        x = make_x(5).requires_grad_(training)
        value = one(x)
        grads.append([value, *(torch.autograd.grad(value, x) if training else ())])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("transform", ["vmap", "jvp"])
@pytest.mark.parametrize("name", calls())
def test_transforms_are_refused_in_a_compiled_function(name, transform):
    """Where torch.compile goes around what a Function does, to operators that would drop derivatives."""
    function, x = calls()[name]
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: TRANSFORMS[transform](function, x), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=f"{name} does not run under transforms"):
        compiled(x)


def applications() -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Every Function, applied by hand, as a function of one of its tensors, and that tensor."""
    queries, keys = testing.make_lookup_inputs(3, 2, 6, 8)
    update, targets = testing.make_update_inputs(3, 4, 36, 7), torch.randn(1, 3, 7)
    values, slots, weights, *errors = update[:5]
    return {
        "ProductKeyLookup": (lambda x: ProductKeyLookup.apply(x, keys, 2)[0], queries),
        "SparseValueGather": (lambda x: SparseValueGather.apply(values, slots, x), weights),
        "ChunkValueUpdate": (lambda x: ChunkValueUpdate.apply(values, slots, x, *errors), weights),
        "ProductKeyUpdate": (lambda x: ProductKeyUpdate.apply(keys, x, 2), queries),
        "FastWeightMemory": (lambda x: FastWeightMemory.apply(x, targets, keys, values, 2, 2)[0], queries[None]),
    }


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "forward mode"])
@pytest.mark.parametrize("name", applications())
def test_transforms_of_functions_applied_by_hand_are_refused(name, transform, compiled):
    """By PyTorch, or by what the Function runs; nothing comes out."""
    function, x = applications()[name]

    def run(x: Tensor) -> Any:
        return TRANSFORMS[transform](function, x)

    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"functorch transforms|the jvp function|transforms of torch.func|forward-mode"):
        (torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run)(x)


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
def test_operations_of_the_torch_backend_on_a_gpu():
    """They give what they give on the CPU, up to rounding; tests/test_memory.py has the whole memory."""

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
