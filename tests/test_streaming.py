"""Streaming: any cut of a sequence against the whole, options and errors of a step, compiled steps."""

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from fwpkm_kernels import (
    MemoryState,
    fast_weight_memory,
    fast_weight_memory_step,
    scans,
    streaming,
    testing,
)
from fwpkm_kernels.binding import FREE_OPTIONS
from fwpkm_kernels.lanes import Lanes
from fwpkm_kernels.options import Options
from tests.conftest import PLACES, SLOW_IN_INTERPRETER
from tests.helpers.memory import KEY_GRADIENTS, assert_close, assert_same_bits, make_inputs
from tests.helpers.streaming import (
    BOTH,
    BOUND,
    BY_TOKEN,
    OPTIONS,
    Cuts,
    assert_same_state,
    contents,
    make_state,
    stream,
    tokens_of,
)

#: Options that later steps may change: (the small options' value, another).
FREE = {"lr": (1.0, 0.3), "weight_decay": (0.0, 0.1), "clip": (None, 0.05), "addressing_weight": (1.0, 0.2)}


def streamed(cuts: Cuts, queries, targets, keys, values, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`fast_weight_memory` in steps: output, keys, values."""
    by_token = {"queries": queries, "targets": targets}
    by_token |= {name: options.pop(name) for name in ("gates", "mask") if name in options}
    state = MemoryState(keys, values)
    return stream(state, by_token, cuts, **options), state.keys, state.values


#: keys and values, activations, options; with those of OPTIONS, and 9 tokens cut into CUTS.
BUDGETS = {
    "float32": (torch.float32, torch.float32, {}),
    "float32-clip-decay": (torch.float32, torch.float32, {"clip": 0.1, "weight_decay": 0.05, "lr": 0.5}),
    "float32-normalized-silu": (
        torch.float32,
        torch.float32,
        {"weighting": "silu", "score": "dot", "step": "normalized"},
    ),
    "float32-gradient": (torch.float32, torch.float32, {"step": "gradient"}),
    "float32-all": (torch.float32, torch.float32, {"key_gradient": "all"}),
    "bfloat16-activations": (torch.float32, torch.bfloat16, {}),
    "bfloat16-activations-all": (torch.float32, torch.bfloat16, {"key_gradient": "all"}),
    "float16-activations": (torch.float32, torch.float16, {"weight_decay": 0.05}),
    "bfloat16-table": (torch.bfloat16, torch.bfloat16, {}),
    "float16-table": (torch.float16, torch.float32, {"weight_decay": 0.05}),
}
CUTS = {"single tokens": [1] * 9, "uneven": [2, 5, 1, 1], "whole": [9]}


def budget_cases() -> list[Any]:
    return [
        pytest.param(place, budget, cuts, id=f"{place.backend}-{budget}-{cuts}", marks=marks)
        for place in PLACES
        for budget in BUDGETS
        for cuts in CUTS
        for marks in (
            [SLOW_IN_INTERPRETER]
            if place.backend == "triton" and (budget, cuts) != ("bfloat16-activations", "uneven")
            else [[]]
        )
    ]


@pytest.mark.parametrize(("place", "budget", "cuts"), budget_cases())
def test_precision(place, budget, cuts):
    """Inside the error budget of the whole in plain PyTorch; what waits in the queue loses nothing."""
    table, activations, options = BUDGETS[budget]
    inputs = make_inputs(
        2, 9, 1, 6, 8, 5, mask="real", dtype=table, activations_dtype=activations, device=place.device, seed=3
    )
    options = {"chunk_size": 3, "top_k": 3, **options}
    with testing.poisoned_memory(), testing.assert_unchanged(inputs):
        testing.assert_matches_reference(
            functools.partial(streamed, CUTS[cuts], backend=place.backend),
            lambda **arguments: tuple(reference.fast_weight_memory(**arguments)[:3]),
            inputs | options,
            reduction_length=64,
        )


@BOTH
@pytest.mark.parametrize("layout", ["transposed", "sliced", "strided"])
def test_strides_of_inputs(layout, place):
    sizes = (2, 5, 1, 3, 4, 3)
    inputs = make_inputs(*sizes, mask="real", device=place.device, layout=layout)
    plain = make_inputs(*sizes, mask="real", device=place.device)
    options = {"chunk_size": 2, "top_k": 2, "backend": place.backend}
    for actual, expected in zip(
        streamed([1, 4], **inputs, **options), streamed([1, 4], **plain, **options), strict=True
    ):
        torch.testing.assert_close(actual, expected)


@BOTH
def test_each_step_may_have_gates_and_mask_or_none(place):
    """None is all ones, whatever the steps before it gave."""
    inputs = make_inputs(2, 6, mask="bool", device=place.device)
    inputs["gates"][:, 2:4] = 1.0
    inputs["mask"][:, 1:3] = True
    options = {"chunk_size": 3, "top_k": 2, "lookahead": 2, "backend": place.backend}
    expected, state = make_state(inputs), make_state(inputs)
    wanted = stream(expected, inputs, [1, 1, 1, 1, 2], **options)
    outputs = []
    for begin, end in itertools.pairwise([0, 1, 2, 3, 4, 6]):
        tokens = tokens_of(inputs, begin, end)
        if begin in (2, 3):
            del tokens["gates"]
        if begin in (1, 2):
            tokens["mask"] = None
        outputs.append(fast_weight_memory_step(state, **tokens, **options))
    testing.assert_bitwise_equal(torch.cat(outputs, 1), wanted)
    assert_same_state(state, expected)


@pytest.mark.parametrize("cuts", [[1] * 11, [11], [3, 3, 3, 2], [2, 5, 4]], ids=str)
@pytest.mark.parametrize("lookahead", [0, 1, 3])
def test_only_carried_tokens_are_looked_up_twice(lookahead, cuts, monkeypatch):
    rows = []

    def lookup_halves(queries: Tensor, *args: Any, **options: Any) -> Any:
        rows.append(queries.shape[0])
        return original(queries, *args, **options)

    original = streaming.lookup_halves
    for module in (streaming, scans):
        monkeypatch.setattr(module, "lookup_halves", lookup_halves)
    streamed(cuts, **make_inputs(2, 11), chunk_size=3, top_k=2, lookahead=lookahead)
    # Three chunks are full, of which the first carries nothing in.
    assert sum(rows) == 2 * (11 + 2 * lookahead)


def test_the_whole_chunks_of_a_prompt_are_looked_up_at_once_where_keys_stand_still(monkeypatch):
    calls = []

    def lookup_halves(queries: Tensor, *args: Any, **options: Any) -> Any:
        calls.append(queries.shape[0])
        return original(queries, *args, **options)

    original = streaming.lookup_halves
    for module in (streaming, scans):
        monkeypatch.setattr(module, "lookup_halves", lookup_halves)
    streamed([1, 14], **make_inputs(2, 15), chunk_size=3, top_k=2, lookahead=2, addressing_weight=0.0)
    # One token; two that complete the first chunk, which carries nothing in; four chunks after two carried tokens.
    assert calls == [2, 4, 2 * (2 + 12)]


@BOTH
@pytest.mark.parametrize(("batch", "count"), [(2, 0), (0, 2), (0, 3)], ids=str)
@KEY_GRADIENTS
def test_empty_steps(key_gradient, batch, count, place):
    """No tokens change nothing; a chunk of no items is a chunk: it decays."""
    inputs = make_inputs(batch, 9, device=place.device)
    options = {"chunk_size": 3, "top_k": 2, "lr": 0.5, "weight_decay": 0.1, "key_gradient": key_gradient}
    state = make_state(inputs)
    output = stream(state, inputs, [count] * 3, **options, backend=place.backend)
    assert output.shape == (batch, 3 * count, 3)
    decay = 0.95 ** (3 * count // 3)
    torch.testing.assert_close(state.values, inputs["values"] * decay)
    torch.testing.assert_close(state.keys, inputs["keys"] * decay)


@BOTH
def test_an_empty_step_in_the_middle_changes_nothing(place):
    inputs = make_inputs(2, 6, device=place.device)
    state = make_state(inputs)
    stream(state, inputs, [5], **OPTIONS, backend=place.backend)
    with testing.assert_unchanged(state.keys, state.values, state._position, state._touched, state._queue):
        output = stream(state, inputs, [0], **OPTIONS, backend=place.backend)
    assert output.shape == (2, 0, 3)


@BOTH
def test_two_runs_are_bitwise_equal(place):
    inputs = make_inputs(2, 7, dtype=torch.float32, device=place.device)
    run = functools.partial(streamed, [2, 1, 4], **inputs, chunk_size=3, top_k=2, backend=place.backend)
    testing.assert_deterministic(run)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype, place):
    inputs = make_inputs(1, 5, dtype=torch.float32, device=place.device)
    run = functools.partial(streamed, [2, 3], **inputs, chunk_size=3, top_k=2, backend=place.backend)
    expected = run()
    with torch.autocast(place.device, dtype=dtype):
        actual = run()
    for one, other in zip(actual, expected, strict=True):
        testing.assert_bitwise_equal(one, other)


@BOTH
def test_inputs_that_require_grad_give_an_output_that_does_not(place):
    inputs = make_inputs(2, 5, device=place.device)
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    options = {"chunk_size": 3, "top_k": 2, "backend": place.backend}
    outputs = streamed([2, 3], **leaves, **options)
    for actual, expected in zip(outputs, streamed([2, 3], **inputs, **options), strict=True):
        assert not actual.requires_grad
        testing.assert_bitwise_equal(actual, expected)


def test_inference_mode_and_its_end():
    """A state made and bound in inference mode steps outside of it, and the reverse."""
    inputs = make_inputs(2, 8)
    expected = make_state(inputs)
    wanted = stream(expected, inputs, [3, 3, 2], **OPTIONS)
    for modes in itertools.product((True, False), repeat=4):
        with torch.inference_mode(modes[0]):
            state = make_state(inputs)
        outputs = []
        for mode, count in zip(modes[1:], [3, 3, 2], strict=True):
            with torch.inference_mode(mode):
                outputs.append(stream(state, inputs, [count], **OPTIONS).clone())
        testing.assert_bitwise_equal(torch.cat(outputs, 1), wanted)
        assert_same_state(state, expected)
        state.reset()


@BOTH
@pytest.mark.parametrize("name", FREE)
def test_a_chunk_is_written_with_the_options_of_the_step_that_completes_it(name, place):
    """Each chunk with its own; without lookahead a chunk is a call of the whole."""
    inputs = make_inputs(2, 6, device=place.device)
    options = {"chunk_size": 3, "top_k": 2, "lookahead": 0, "backend": place.backend}
    one, other = FREE[name]
    state = make_state(inputs)
    outputs = [
        stream(state, inputs, [count], **options, **{name: value})
        for count, value in ((2, other), (1, one), (1, one), (2, other))
    ]
    first = fast_weight_memory(
        **tokens_of(inputs, 0, 3), keys=inputs["keys"], values=inputs["values"], **options, **{name: one}
    )
    second = fast_weight_memory(
        **tokens_of(inputs, 3, 6), keys=first.keys, values=first.values, **options, **{name: other}
    )
    expected = {"output": torch.cat((first.output, second.output), 1), "keys": second.keys, "values": second.values}
    assert_close({"output": torch.cat(outputs, 1), "keys": state.keys, "values": state.values}, expected, 1e-12)


@pytest.mark.parametrize("name", FREE)
def test_a_step_over_several_chunks_writes_all_with_its_options(name):
    inputs = make_inputs(2, 8)
    one, other = FREE[name]
    state, expected = make_state(inputs), make_state(inputs)
    stream(state, inputs, [2], **OPTIONS, **{name: one})
    stream(state, inputs, [6], **OPTIONS, **{name: other})
    stream(expected, inputs, [2, 6], **OPTIONS, **{name: other})
    assert_same_state(state, expected)


def test_every_option_is_free_or_bound():
    assert set(FREE) == set(FREE_OPTIONS)
    assert set(Options._fields) == set(FREE) | (set(BOUND) - {"batch", "queries", "targets"})


@pytest.mark.parametrize("name", BOUND)
def test_what_the_first_step_binds_may_not_change(name):
    inputs = make_inputs(2, 9, dtype=torch.float32)
    state = make_state(inputs)
    stream(state, inputs, [6], **OPTIONS)
    change, tokens = BOUND[name], tokens_of(inputs, 6, 9)
    options = OPTIONS | change if isinstance(change, dict) else OPTIONS
    tokens = tokens if isinstance(change, dict) else change(tokens)
    before = contents(state)
    with pytest.raises(ValueError, match=r"`queries`.*batch.*2.*1" if name == "batch" else f"`{name}`"):
        fast_weight_memory_step(state, **tokens, **options)
    assert_same_bits(contents(state), before)
    # Not even an empty step, nor one after a reset.
    state.reset()
    with pytest.raises(ValueError, match="`queries`" if name == "batch" else f"`{name}`"):
        fast_weight_memory_step(state, **{key: x[:, :0] for key, x in tokens.items()}, **options)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_first_step_that_is_refused_binds_nothing(compiled):
    """In a backward pass, as an activation checkpoint would run it; later steps may be of another batch size."""
    inputs = make_inputs(2, 6)
    state = make_state(inputs)
    before = contents(state)
    torch._dynamo.reset()
    run = torch.compile(fast_weight_memory_step, backend="eager") if compiled else fast_weight_memory_step
    leaf = torch.ones((), requires_grad=True)
    doubled = leaf * 2.0
    doubled.register_hook(lambda grad: stream(state, inputs, [3], run=run, **OPTIONS).sum())
    with pytest.raises(RuntimeError, match="fast_weight_memory_step was called in a backward pass"):
        doubled.backward()
    assert_same_bits(contents(state), before)
    stream(state, {name: x[:1] if name in BY_TOKEN else x for name, x in inputs.items()}, [3], **OPTIONS)


def test_numbers_of_another_type_are_the_same_options():
    inputs = make_inputs(2, 8)
    state, expected = make_state(inputs), make_state(inputs)
    wanted = stream(expected, inputs, [3, 5], **OPTIONS, eps=1.0, temperature=1.0, lr=1.0, clip=1.0)
    output = stream(state, inputs, [3], **OPTIONS, eps=1, temperature=1, lr=1, clip=1)
    output = torch.cat((output, stream(state, inputs, [5], **OPTIONS, eps=1.0, temperature=1.0, clip=1)), 1)
    testing.assert_bitwise_equal(output, wanted)
    assert_same_state(state, expected)


def test_gates_and_mask_may_change_their_dtypes():
    inputs = make_inputs(2, 8, mask="int", dtype=torch.float32)
    inputs["gates"] = inputs["gates"].bfloat16().float()
    other = inputs | {"gates": inputs["gates"].bfloat16(), "mask": inputs["mask"].bool()}
    state, expected = make_state(inputs), make_state(inputs)
    stream(expected, inputs, [3, 5], **OPTIONS)
    stream(state, inputs, [3], **OPTIONS)
    stream(state, other, [5], **OPTIONS)
    assert_same_state(state, expected)


@pytest.mark.parametrize("bound", [False, True], ids=["unbound", "bound"])
def test_one_compilation_serves_all_steps(bound):
    """Over chunk ends, for one number of tokens; binding at the first step costs at most one more."""
    torch._dynamo.reset()
    inputs = make_inputs(2, 24, mask="bool", dtype=torch.float32)
    state, expected = make_state(inputs), make_state(inputs)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fast_weight_memory_step, fullgraph=True, backend=counter)
    cuts = [2] * 12
    wanted = stream(expected, inputs, cuts, **OPTIONS)
    output = stream(state, inputs, [2], **OPTIONS) if bound else inputs["targets"][:, :0]
    output = torch.cat((output, stream(state, inputs, cuts[bound:], run=compiled, **OPTIONS)), 1)
    testing.assert_bitwise_equal(output, wanted)
    assert_same_state(state, expected)
    assert counter.frame_count == (1 if bound else 2)
    # Nor do a reset, another state of the same shapes, or inputs that require grad compile it again.
    state.reset()
    other = make_state(inputs)
    stream(other, inputs, [2], **OPTIONS)
    for one in (state, other):
        stream(one, inputs, [2, 2], run=compiled, **OPTIONS)
    assert counter.frame_count == (1 if bound else 2)


def test_compiled_steps_of_many_tokens():
    torch._dynamo.reset()
    inputs = make_inputs(2, 23, dtype=torch.float32)
    state, expected = make_state(inputs), make_state(inputs)
    compiled = torch.compile(fast_weight_memory_step, fullgraph=True, backend="aot_eager")
    cuts = [9, 1, 6, 7]
    wanted = stream(expected, inputs, cuts, **OPTIONS)
    testing.assert_bitwise_equal(stream(state, inputs, cuts, run=compiled, **OPTIONS), wanted)
    assert_same_state(state, expected)


def test_a_compiled_model_around_a_step():
    """What the graph does with the output and with the memory before and after is in the right order."""
    torch._dynamo.reset()
    inputs = make_inputs(2, 8, dtype=torch.float32)

    def model(state: MemoryState, queries: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        before = state.values.sum()
        output = fast_weight_memory_step(state, queries * 2.0, targets, **OPTIONS).square()
        return output, before, state.values.sum()

    compiled = torch.compile(model, fullgraph=True)
    state, expected = make_state(inputs), make_state(inputs)
    for one in (state, expected):
        stream(one, {name: x for name, x in inputs.items() if name != "gates"}, [3], **OPTIONS)
    for begin in (3, 5):
        tokens = [inputs[name][:, begin : begin + 2] for name in ("queries", "targets")]
        for actual, wanted in zip(compiled(state, *tokens), model(expected, *tokens), strict=True):
            torch.testing.assert_close(actual, wanted)
    assert_same_state(state, expected)


@pytest.mark.parametrize("name", ["fast_weight_memory_step", "fast_weight_memory_first_step"])
def test_inductor_leaves_steps_out_of_its_cuda_graphs(name):
    """A step reads the position and branches on it, which a captured graph would freeze."""
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.fwpkm_kernels, name).default.tags


class NoSynchronisation(TorchDispatchMode):
    """Fails on what would make the host wait for a GPU: a number read, or a shape that depends on data."""

    def __init__(self, position: Tensor) -> None:
        super().__init__()
        self.position = position.data_ptr()
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name == "_local_scalar_dense":
            assert args[0].data_ptr() == self.position, "reads a number"
        assert name not in ("nonzero", "masked_select", "_unique2", "unique_consecutive", "bincount", "equal"), name
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            assert all(x is None or x.dtype != torch.bool for x in args[1]), f"{name} with a mask"
        if name in ("index_put", "index_put_"):  # a number would come from the host
            assert args[2].dim() > 0, name
        assert name != "repeat_interleave" or isinstance(args[-1], int), "repeats that are a tensor"
        self.calls += 1
        return function(*args, **(kwargs or {}))


@KEY_GRADIENTS
@pytest.mark.parametrize(
    "options", [{}, {"clip": 0.1, "weight_decay": 0.1, "step": "normalized"}], ids=["plain", "all"]
)
def test_a_step_reads_nothing_back(options, key_gradient, triton_place):
    """The operator's body, which a mode does not see from outside."""
    inputs = make_inputs(2, 10, num_keys=2, mask="bool", dtype=torch.float32, device=triton_place.device)
    state = make_state(inputs)
    options = {"chunk_size": 3, "top_k": 2, "lookahead": 2, "key_gradient": key_gradient, **options}
    o = Options(**options, backend=triton_place.backend)
    queue = state._bind(inputs["queries"], inputs["targets"], o)
    memory = streaming.Memory(state.keys, state.values, state._touched, queue)
    begin = 0
    for count in (2, 1, 7):
        tokens = tokens_of(inputs, begin, begin + count)
        given = [tokens[name] for name in BY_TOKEN]
        with torch.no_grad(), NoSynchronisation(state._position) as mode:
            streaming._step(memory, state._position, *given, *o)
        assert mode.calls > 10
        begin += count
    assert state.position == 10

    # What a graph captures, where gates and masks are not given and the place is a tensor.
    tokens = streaming.Tokens(*(x[:, :1].transpose(0, 1) for x in given[:2]), None, None)
    output, place = torch.empty_like(tokens.targets), torch.tensor(1, device=triton_place.device)
    with torch.no_grad(), NoSynchronisation(state._position):
        streaming.read_piece(memory, tokens, output, place, o)
        streaming.close_chunk(memory, False, Lanes(), o)


@pytest.mark.gpu
@KEY_GRADIENTS
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_step_never_waits_for_the_gpu(compiled, key_gradient, errors_on_synchronisation):
    inputs = make_inputs(2, 30, num_keys=8, mask="bool", dtype=torch.float32, device="cuda")
    options = OPTIONS | {"key_gradient": key_gradient}
    run = torch.compile(fast_weight_memory_step, fullgraph=True) if compiled else fast_weight_memory_step
    state = make_state(inputs)
    stream(state, inputs, [1, 3, 6, 1, 3, 6], run=run, **options)
    state.reset()
    torch.cuda.set_sync_debug_mode("error")
    stream(state, inputs, [1, 3, 6, 1, 3, 6], run=run, **options)
    state.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_sizes_on_a_gpu(dtype):
    inputs = make_inputs(1, 2048, 1, 512, 512, 512, dtype=dtype, activations_dtype=torch.bfloat16, device="cuda")
    state = make_state(inputs)
    output = stream(state, inputs, [512, 100, 412, 1, 1023], chunk_size=512)
    whole = fast_weight_memory(**inputs)
    for actual, expected in ((output, whole.output), (state.keys, whole.keys), (state.values, whole.values)):
        error, norm = (actual.double() - expected.double()).norm(), expected.double().norm()
        assert error <= (1e-5 if actual.dtype == torch.float32 else 1e-2) * norm
