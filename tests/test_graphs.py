"""Streaming steps as CUDA graphs: on a GPU for real, on a CPU with a stand-in for the capture."""

import contextlib
import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fwpkm_kernels import (
    MemoryGraph,
    MemoryState,
    fast_weight_memory,
    fast_weight_memory_step,
    key_step,
    plan,
    streaming,
    testing,
)
from fwpkm_kernels.records import Picks
from tests.conftest import HAS_GPU
from tests.helpers.graphs import OnGpu, graph_maker, replayed
from tests.helpers.memory import KEY_GRADIENTS, assert_same_bits, make_inputs
from tests.helpers.streaming import (
    BY_TOKEN,
    DEVICE,
    OPTIONS,
    assert_same_state,
    contents,
    make_state,
    stream,
    tokens_of,
)


@pytest.fixture
def make_graph(monkeypatch) -> Callable[..., MemoryGraph]:
    return graph_maker(monkeypatch)


#: Tokens a replay, lookahead, batch, and what is given besides queries and targets.
REPLAYS = [(count, lookahead, 3, ("gates", "mask")) for count in (1, 2, 3, 6, 12) for lookahead in (0, 1, 6)]
REPLAYS += [(2, 1, batch, names) for batch in (1, 3) for names in ((), ("gates",), ("mask",))]


@KEY_GRADIENTS
@pytest.mark.parametrize("count, lookahead, batch, names", REPLAYS, ids=str)
def test_replays_are_eager_steps(count, lookahead, batch, names, key_gradient, make_graph):
    """Bit by bit, from the first chunk on; one replay a call or several; and again after a reset.

    With several chunks a graph they are bit by bit those of as many steps of one chunk.
    """
    inputs = make_inputs(batch, 36, num_keys=5, mask="real", dtype=torch.float32, device=DEVICE)
    inputs = {name: x for name, x in inputs.items() if name in ("queries", "targets", "keys", "values", *names)}
    options = {"chunk_size": 6, "top_k": 2, "lookahead": lookahead, "weight_decay": 0.01, "key_gradient": key_gradient}
    state, expected = make_state(inputs), make_state(inputs)
    graph = make_graph(state, inputs, count, **options)
    for _ in range(2):
        wanted = stream(expected, inputs, [min(count, 6)] * (36 // min(count, 6)), **options)
        call = max(count, 6)
        outputs = [replayed(graph, state, inputs, call) for _ in range(18 // call)]
        outputs.append(replayed(graph, state, inputs, 36 - state.position))
        testing.assert_bitwise_equal(torch.cat(outputs, 1), wanted)
        assert_same_state(state, expected)
        state.reset()
        expected.reset()


def test_a_refused_replay_binds_nothing(make_graph):
    """Of a state that was set up anew, for another dtype."""
    inputs = make_inputs(2, 8, dtype=torch.float32, device=DEVICE)
    keys, values = (torch.nn.Parameter(inputs[name]) for name in ("keys", "values"))
    state = MemoryState(keys, values)
    graph = make_graph(state, inputs, 4, **OPTIONS)
    keys.data, values.data = keys.data.bfloat16(), values.data.bfloat16()
    state.reset()
    with pytest.raises(ValueError, match="`state` has other tensors than at the capture"):
        graph(**{name: inputs[name][:, :4] for name in ("queries", "targets")})
    stream(state, {name: inputs[name].bfloat16() for name in ("queries", "targets")}, [8], **OPTIONS)


def test_making_a_graph_changes_nothing(make_graph):
    inputs = make_inputs(2, 9, device=DEVICE)
    state = make_state(inputs)
    stream(state, inputs, [5], **OPTIONS)
    before = contents(state)
    for count in (1, 2, 4):
        make_graph(state, inputs, count, **OPTIONS)
    assert_same_bits(contents(state), before)


def test_replays_between_eager_steps(make_graph):
    """Of several sizes, on one state, which is also reset, loaded into and rolled back."""
    inputs = make_inputs(2, 24, dtype=torch.float32, device=DEVICE)
    state, expected = make_state(inputs), make_state(inputs)
    stream(expected, inputs, [2], **OPTIONS)
    expected.reset()
    by_two, by_four = (make_graph(state, inputs, count, **OPTIONS) for count in (2, 4))

    def both(cut: int, graph: MemoryGraph | None) -> None:
        pieces = [cut] if graph is None else [graph._count] * (cut // graph._count)
        wanted = stream(expected, inputs, pieces, **OPTIONS)
        actual = stream(state, inputs, [cut], **OPTIONS) if graph is None else replayed(graph, state, inputs, cut)
        testing.assert_bitwise_equal(actual, wanted)
        assert_same_state(state, expected)

    for _ in range(2):
        for cut, graph in ((2, by_two), (2, None), (4, by_four), (1, None), (1, None), (6, by_two), (8, by_four)):
            both(cut, graph)
        state.reset()
        expected.reset()
    both(6, by_two)
    saved = expected.state_dict()
    both(6, by_two)
    for one in (state, expected):
        one.load_state_dict(saved)
    both(10, by_two)
    both(2, by_two)
    for one in (state, expected):
        one.rollback(2)
    both(2, by_two)


def test_outputs_of_replays_are_tensors_of_their_own(make_graph):
    inputs = make_inputs(2, 16, device=DEVICE)
    state = make_state(inputs)
    graph = make_graph(state, inputs, 2, **OPTIONS)
    first = replayed(graph, state, inputs, 2)
    with testing.assert_unchanged(first, inputs):
        replayed(graph, state, inputs, 14)
    assert not first.requires_grad


def test_a_replay_takes_what_requires_grad(make_graph):
    inputs = make_inputs(2, 8, device=DEVICE)
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    state, expected = make_state(leaves), make_state(inputs)
    graph = make_graph(state, leaves, 4, **OPTIONS)
    output = replayed(graph, state, leaves, 8)
    assert not output.requires_grad
    testing.assert_bitwise_equal(output, stream(expected, inputs, [4, 4], **OPTIONS))


@KEY_GRADIENTS
def test_autocast_changes_no_replay(key_gradient, make_graph):
    """Neither while the graphs are captured nor later."""
    inputs = make_inputs(2, 16, dtype=torch.float32, device=DEVICE)
    options = OPTIONS | {"key_gradient": key_gradient}
    state, expected = make_state(inputs), make_state(inputs)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        graph = make_graph(state, inputs, 2, **options)
        output = replayed(graph, state, inputs, 16)
    testing.assert_bitwise_equal(output, stream(expected, inputs, [2] * 8, **options))
    assert_same_state(state, expected)


@pytest.mark.parametrize("captured", [True, False])
def test_replays_in_inference_mode_and_outside(captured, make_graph):
    inputs = make_inputs(2, 16, dtype=torch.float32, device=DEVICE)
    state, expected = make_state(inputs), make_state(inputs)
    with torch.inference_mode(captured):
        graph = make_graph(state, inputs, 2, **OPTIONS)
    with torch.inference_mode():
        first = replayed(graph, state, inputs, 8).clone()
    output = torch.cat((first, replayed(graph, state, inputs, 8)), 1)
    testing.assert_bitwise_equal(output, stream(expected, inputs, [2] * 8, **OPTIONS))
    assert_same_state(state, expected)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_strides_of_what_is_captured_and_replayed(layout, make_graph):
    inputs = make_inputs(2, 8, mask="real", device=DEVICE)
    strange = {name: testing.with_layout(x, layout) if name in BY_TOKEN else x for name, x in inputs.items()}
    plain = {name: x.contiguous() for name, x in strange.items()}
    state, expected = make_state(inputs), make_state(inputs)
    graph = make_graph(state, strange, 2, **OPTIONS)
    output = replayed(graph, state, strange, 8)
    torch.testing.assert_close(output, stream(expected, plain, [2] * 4, **OPTIONS))


def test_a_capture_binds_as_a_step_does(make_graph):
    inputs = make_inputs(2, 8, device=DEVICE)
    state = make_state(inputs)
    make_graph(state, inputs, 4, **OPTIONS)
    with pytest.raises(ValueError, match="`top_k`"):
        stream(state, inputs, [4], **OPTIONS | {"top_k": 3})
    with pytest.raises(ValueError, match="`top_k`"):
        make_graph(state, inputs, 4, **OPTIONS | {"top_k": 3})


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps], ids=lambda how: how.__name__)
def test_a_graph_is_not_copied(how, make_graph):
    inputs = make_inputs(2, 8, device=DEVICE)
    graph = make_graph(make_state(inputs), inputs, 4, **OPTIONS)
    with pytest.raises(TypeError, match="MemoryGraph cannot be copied, pickled.*copy or send its state"):
        how(graph)


def test_a_copied_state_is_not_the_one_that_was_captured(make_graph):
    """The graph goes on writing the state that it was made of, and only that."""
    inputs = make_inputs(2, 16, dtype=torch.float32, device=DEVICE)
    state = make_state(inputs)
    graph = make_graph(state, inputs, 2, **OPTIONS)
    replayed(graph, state, inputs, 6)
    other = copy.deepcopy(state)
    with testing.assert_unchanged(contents(other)):
        output = replayed(graph, state, inputs, 10)
    testing.assert_bitwise_equal(stream(other, inputs, [2] * 5, **OPTIONS), output)
    assert_same_state(state, other)


def test_a_replay_is_refused_under_transforms_and_in_a_checkpoint(make_graph):
    inputs = make_inputs(2, 8, device=DEVICE)
    state = make_state(inputs)
    graph = make_graph(state, inputs, 4, **OPTIONS)
    tokens = tokens_of(inputs, 0, 4)
    before = contents(state)
    with pytest.raises(RuntimeError, match="MemoryGraph does not run under transforms"):
        torch.func.vmap(lambda targets: graph(**{**tokens, "targets": targets}))(
            tokens["targets"].expand(2, -1, -1, -1)
        )
    assert_same_bits(contents(state), before)
    leaf = torch.ones((), dtype=torch.float64, device=DEVICE, requires_grad=True)
    output = checkpoint(lambda leaf: graph(**tokens) * leaf.exp(), leaf, use_reentrant=False)
    after = contents(state)
    with pytest.raises(RuntimeError, match="MemoryGraph was called in a backward pass"):
        output.sum().backward()
    assert_same_bits(contents(state), after)


def test_replays_in_triton(make_graph, triton_place):
    inputs = make_inputs(1, 8, num_keys=2, dtype=torch.float32, device=triton_place.device)
    options = {"chunk_size": 2, "top_k": 1, "backend": triton_place.backend}
    state, expected = make_state(inputs), make_state(inputs)
    graph = make_graph(state, inputs, 1, **options)
    wanted = stream(expected, inputs, [1] * 6, **options)
    testing.assert_bitwise_equal(replayed(graph, state, inputs, 6), wanted)
    assert_same_state(state, expected)


def test_a_step_that_is_refused_in_a_capture_binds_nothing(monkeypatch):
    inputs = make_inputs(2, 8, device=DEVICE)
    state = make_state(inputs)
    table, before = state.values, contents(state)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        state._values = table.as_subclass(OnGpu)
        with pytest.raises(RuntimeError, match="would freeze the position; use MemoryGraph"):
            fast_weight_memory_step(state, **tokens_of(inputs, 0, 4), **OPTIONS)
    state._values = table
    assert_same_bits(contents(state), before)
    assert state._binding is None


@pytest.mark.gpu
@KEY_GRADIENTS
def test_a_replay_never_waits_for_the_gpu(key_gradient, make_graph, errors_on_synchronisation):
    inputs = make_inputs(2, 24, device="cuda")
    state = make_state(inputs)
    graph = make_graph(state, inputs, 2, **OPTIONS, key_gradient=key_gradient)
    replayed(graph, state, inputs, 8)
    torch.cuda.set_sync_debug_mode("error")
    replayed(graph, state, inputs, 16)


def test_several_chunks_a_graph_from_any_chunk_on(make_graph):
    """Their graph is not bound to multiples of its own length."""
    inputs = make_inputs(2, 24, dtype=torch.float32, device=DEVICE)
    state, expected = make_state(inputs), make_state(inputs)
    graph = make_graph(state, inputs, 8, **OPTIONS)
    wanted = stream(expected, inputs, [4] * 5, **OPTIONS)
    outputs = [stream(state, inputs, [4], **OPTIONS), replayed(graph, state, inputs, 16)]
    testing.assert_bitwise_equal(torch.cat(outputs, 1), wanted)
    assert_same_state(state, expected)


def test_a_capture_warms_up_on_picks_that_can_be_planned(make_graph, monkeypatch):
    """A queue that no token has filled names one sub-key many times; a plan of that would send writes anywhere."""
    planned = []

    def plan_picks(picks: Picks, num_keys: int, **options: Any) -> Any:
        sub_keys = picks.sub_keys.sort(-1).values
        assert (sub_keys.diff(dim=-1) > 0).all()
        assert (sub_keys // num_keys == torch.arange(4, device=sub_keys.device).view(2, 2, 1)).all()
        planned.append(len(sub_keys))
        return plan.plan_picks(picks, num_keys, **options)

    monkeypatch.setattr(key_step, "plan_picks", plan_picks)
    inputs = make_inputs(2, 4, heads=2, dtype=torch.float32, device=DEVICE)
    make_graph(make_state(inputs), inputs, 2, **OPTIONS, backend="triton")
    assert planned == [8]


class Stream:
    """A stand-in for a CUDA stream: notes what it waits for, and is the current one where it is entered."""

    current: "Stream"

    def __init__(self) -> None:
        self.waited: list[Stream] = []

    def wait_stream(self, other: "Stream") -> None:
        self.waited.append(other)

    def __enter__(self) -> None:
        self.before, Stream.current = Stream.current, self

    def __exit__(self, *exc: object) -> None:
        Stream.current = self.before


@pytest.mark.parametrize("fails, lanes", [("look_up", 0), ("_plan_pairs", 1), ("write", 2), (None, 2)])
def test_lanes_are_joined_after_an_error(fails, lanes, monkeypatch, make_graph):
    """The captured stream waits for every lane that was launched on, and for no other; here streams are stand-ins."""
    inputs = make_inputs(2, 12, num_keys=5, dtype=torch.float32, device=DEVICE)
    state = make_state(inputs)
    graph = make_graph(state, inputs, 6, chunk_size=6, top_k=2)
    Stream.current = captured = Stream()
    for name, value in (
        ("Stream", Stream),
        ("stream", lambda stream: stream),
        ("current_stream", lambda: Stream.current),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    state._values = state.values.as_subclass(OnGpu)
    if fails is None:
        graph._run_close(state)
    else:

        def fail(*args: Any, **options: Any) -> None:
            raise MemoryError("planted")

        monkeypatch.setattr(streaming, fails, fail)
        captured.waited.clear()
        with pytest.raises(MemoryError, match="planted"):
            graph._run_close(state)
    forked = {stream for stream in captured.waited if captured in stream.waited}
    assert len(forked) == len(set(captured.waited)) == lanes


class Layer(torch.nn.Module):
    """The example of docs/memory.md."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = torch.nn.Parameter(keys), torch.nn.Parameter(values)

    def forward(self, queries: Tensor, targets: Tensor, gates: Tensor) -> Tensor:
        options = {"chunk_size": 3, "top_k": 2}
        return fast_weight_memory(queries, targets, self.keys, self.values, gates=gates, **options).output


class NoGraph:
    """In place of a captured graph: a replay leaves everything as the capture left it."""

    def replay(self) -> None:
        pass


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, what `make_graphed_callables` needs of CUDA. What it captures simply runs, on gradients of 1."""
    if HAS_GPU:
        return
    nothing = contextlib.nullcontext()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", NoGraph)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: nothing)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nothing)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda.graphs, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch, "empty_like", torch.ones_like)


@pytest.mark.usefixtures("stand_ins")
def test_training_in_a_graph():
    """`torch.cuda.make_graphed_callables` takes a module with the memory, and gives its output and gradients.

    Without a GPU the graphs are stand-ins, whose replays compute nothing: then it is called as it was captured.
    """
    inputs = make_inputs(2, 9, num_keys=5, dtype=torch.float32, device=DEVICE)
    eager, layer = (Layer(inputs["keys"].clone(), inputs["values"].clone()) for _ in range(2))
    tokens = [inputs[name].requires_grad_() for name in ("queries", "targets", "gates")]
    samples = [(torch.rand_like(x) if HAS_GPU else x.detach().clone()).requires_grad_() for x in tokens]
    graphed = torch.cuda.make_graphed_callables(layer, tuple(samples))
    for scale in (1.0, 0.5) if HAS_GPU else (1.0,):
        results = []
        for module in (graphed, eager):
            with torch.no_grad():
                module.values.mul_(scale)  # as an optimizer does it
            output = module(*tokens)
            grads = torch.autograd.grad(output, [*tokens, module.keys, module.values], torch.ones_like(output))
            results.append(dict(zip(("output", *"qygkv"), (output.detach().clone(), *grads), strict=True)))
        assert_same_bits(*results)
