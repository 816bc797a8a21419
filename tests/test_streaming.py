"""Streaming: any cut of a sequence against the whole, the life of a state, compiled steps, captured steps."""

import copy
import functools
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from fwpkm_kernels import (
    MemoryGraph,
    MemoryState,
    fast_weight_memory,
    fast_weight_memory_step,
    graphs,
    scans,
    streaming,
    testing,
)
from fwpkm_kernels.chunks import Options
from tests.conftest import HAS_GPU, PLACES, SLOW_IN_INTERPRETER, Place
from tests.test_memory import KEY_GRADIENTS, assert_close, assert_same_bits, make_inputs

Inputs = dict[str, Any]
Cuts = list[int]

DEVICE = "cuda" if HAS_GPU else "cpu"
#: What is cut; the others are the initial memory.
BY_TOKEN = ("queries", "targets", "gates", "mask")
#: Small options of a bound state.
OPTIONS = {"chunk_size": 4, "top_k": 2, "lookahead": 1}
#: What does not depend on the kernels: on the CPU, and on a GPU if there is one.
DEVICES = pytest.mark.parametrize("place", PLACES[: 1 + HAS_GPU], ids=lambda place: place.backend)
#: Both places; the second of them in `make test-all` where that is the interpreter.
BOTH = pytest.mark.parametrize(
    "place",
    [PLACES[0], pytest.param(PLACES[1], marks=SLOW_IN_INTERPRETER)],
    ids=[place.backend for place in PLACES],
)
#: Options that later steps may change: (the small options' value, another).
FREE = {"lr": (1.0, 0.3), "weight_decay": (0.0, 0.1), "clip": (None, 0.05), "addressing_weight": (1.0, 0.2)}


def tokens_of(inputs: Inputs, begin: int, end: int) -> Inputs:
    return {name: inputs[name][:, begin:end] for name in BY_TOKEN if name in inputs}


def make_state(inputs: Inputs) -> MemoryState:
    return MemoryState(inputs["keys"], inputs["values"])


def stream(
    state: MemoryState,
    inputs: Inputs,
    cuts: Cuts,
    run: Callable[..., Tensor] = fast_weight_memory_step,
    **options: Any,
) -> Tensor:
    """Step through tokens of `inputs` from the state's position on, `cuts` at a time; the joined outputs."""
    outputs = []
    for count in cuts:
        begin = state.position
        outputs.append(run(state, **tokens_of(inputs, begin, begin + count), **options))
        assert type(state.position) is int
        assert state.position == begin + count
    return torch.cat(outputs, dim=1)


def streamed(cuts: Cuts, queries, targets, keys, values, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`fast_weight_memory` in steps: output, keys, values."""
    by_token = {"queries": queries, "targets": targets}
    by_token |= {name: options.pop(name) for name in ("gates", "mask") if name in options}
    state = MemoryState(keys, values)
    return stream(state, by_token, cuts, **options), state.keys, state.values


def contents(state: MemoryState) -> dict[str, Tensor]:
    """Copies of all that a state is."""
    return state.state_dict() | {"touched": state._touched.clone()}


def assert_same_state(state: MemoryState, expected: MemoryState) -> None:
    assert_same_bits(contents(state), contents(expected))


@st.composite
def calls(
    draw: st.DrawFn, most_chunk: int = 6, most_steps: int = 7, most_keys: int = 6, most_items: int = 3
) -> tuple[Inputs, dict[str, Any], Cuts]:
    """Every option of a step, drawn jointly, and random cuts: single tokens, to a chunk's end, over several chunks."""
    chunk_size = draw(st.integers(1, most_chunk))
    num_keys = draw(st.integers(1, most_keys))
    options = {
        "chunk_size": chunk_size,
        "top_k": draw(st.integers(1, num_keys)),
        "lookahead": draw(st.integers(0, chunk_size)),
        "score": draw(st.sampled_from(["idw", "dot"])),
        "eps": draw(st.sampled_from([1e-3, 0.3])),
        "weighting": draw(st.sampled_from(["softmax", "silu", "relu"])),
        "temperature": draw(st.sampled_from([1.0, 0.6, 3.0])),
        "lr": draw(st.sampled_from([1.0, 0.3, 0.0])),
        "weight_decay": draw(st.sampled_from([0.0, 0.05])),
        "clip": draw(st.sampled_from([None, 0.0, 0.02, 10.0])),
        "addressing_weight": draw(st.sampled_from([1.0, 0.2, 0.0])),
        "key_gradient": draw(st.sampled_from(["addressing", "all"])),
        "step": draw(st.sampled_from(["paper", "normalized"])),
    }
    cuts: Cuts = []
    kinds = st.sampled_from(["one token", "to the end of a chunk", "a chunk", "any"])
    for kind in draw(st.lists(kinds, min_size=1, max_size=most_steps)):
        lengths = {
            "one token": 1,
            "to the end of a chunk": chunk_size - sum(cuts) % chunk_size,
            "a chunk": chunk_size,
        }
        cuts.append(lengths[kind] if kind in lengths else draw(st.integers(1, 2 * chunk_size + 1)))
    inputs = make_inputs(
        draw(st.integers(1, most_items)),
        sum(cuts),
        draw(st.integers(1, 2)),
        num_keys,
        2 * draw(st.integers(1, 3)),
        draw(st.integers(1, 4)),
        gates=draw(st.booleans()),
        mask=draw(st.sampled_from([None, *testing.MASK_KINDS, "none left"])),
        seed=draw(st.integers(0, 2**16)),
    )
    return inputs, options, cuts


def check_cuts(inputs: Inputs, options: dict[str, Any], cuts: Cuts, place: Place) -> None:
    """Outputs and final memory of the steps are those of the whole sequence, here and in the reference."""
    inputs = {name: x.to(place.device) for name, x in inputs.items()}
    with testing.poisoned_memory(), testing.assert_unchanged(inputs):
        answers = streamed(cuts, **inputs, **options, backend=place.backend)
    actual = dict(zip(("output", "keys", "values"), answers, strict=True))
    for bound, whole in (
        (1e-12, fast_weight_memory(**inputs, **options, backend=place.backend)),
        (1e-9, reference.fast_weight_memory(**inputs, **options)),
    ):
        assert_close(actual, {name: getattr(whole, name) for name in actual}, bound)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(calls())
def test_any_cut_is_the_whole(call):
    check_cuts(*call, PLACES[0])


@settings(max_examples=2, deadline=None, derandomize=True)
@given(calls(most_chunk=2, most_steps=2, most_keys=2, most_items=2))
def test_any_cut_is_the_whole_in_triton(call):
    check_cuts(*call, PLACES[1])


@pytest.mark.slow
@settings(max_examples=8, deadline=None, derandomize=True)
@given(calls(most_chunk=4, most_steps=4, most_keys=4))
def test_many_cuts_are_the_whole_in_triton(call):
    check_cuts(*call, PLACES[1])


#: keys and values, activations, options; with those of OPTIONS, and 9 tokens cut into CUTS.
BUDGETS = {
    "float32": (torch.float32, torch.float32, {}),
    "float32-clip-decay": (torch.float32, torch.float32, {"clip": 0.1, "weight_decay": 0.05, "lr": 0.5}),
    "float32-normalized-silu": (
        torch.float32,
        torch.float32,
        {"weighting": "silu", "score": "dot", "step": "normalized"},
    ),
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


#: What a step may not change, by the name that the error says: options or a change of the inputs.
BOUND: dict[str, Any] = {
    "chunk_size": {"chunk_size": 5},
    "top_k": {"top_k": 3},
    "lookahead": {"lookahead": 2},
    "score": {"score": "dot"},
    "eps": {"eps": 2e-3},
    "weighting": {"weighting": "relu"},
    "temperature": {"temperature": 2.0},
    "key_gradient": {"key_gradient": "all"},
    "step": {"step": "normalized"},
    "boundary": {"boundary": "drop"},
    "precision": {"precision": "ieee"},
    "backend": {"backend": "torch"},
    "batch": lambda tokens: {name: x[:1] for name, x in tokens.items()},
    "queries": lambda tokens: tokens | {"queries": tokens["queries"].bfloat16()},
    "targets": lambda tokens: tokens | {"targets": tokens["targets"].half()},
}


def test_every_option_is_free_or_bound():
    assert set(FREE) == set(streaming.FREE_OPTIONS)
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


#: Changes to the arguments of a step that are refused: error, message, changed tokens, changed options.
BAD: dict[str, tuple[type[Exception], str, Callable[[Inputs], Inputs], dict[str, Any]]] = {
    "queries of rank 3": (ValueError, r"`queries`.*\[2, 3, 4\]", lambda x: {"queries": x["queries"][:, :, 0]}, {}),
    "targets of rank 2": (ValueError, r"`targets`.*\[2, 3\]", lambda x: {"targets": x["targets"][..., 0]}, {}),
    "queries against keys": (ValueError, "`queries`.*`keys`", lambda x: {"queries": x["queries"][..., :2]}, {}),
    "targets against values": (ValueError, "`targets`.*`values`", lambda x: {"targets": x["targets"][..., :2]}, {}),
    "queries against targets": (ValueError, "`queries`.*`targets`", lambda x: {"targets": x["targets"][:, :2]}, {}),
    "gates of another length": (ValueError, "`gates`.*`queries`", lambda x: {"gates": torch.ones(2, 2)}, {}),
    "integer gates": (TypeError, "`gates`.*int64", lambda x: {"gates": torch.ones(2, 3).long()}, {}),
    "mask of another length": (ValueError, "`mask`.*`queries`", lambda x: {"mask": torch.ones(2, 4)}, {}),
    "complex mask": (TypeError, "`mask`.*complex", lambda x: {"mask": torch.ones(2, 3).cfloat()}, {}),
    "float64 beside float32": (TypeError, "float64", lambda x: {"targets": x["targets"].double()}, {}),
    "no tensor": (TypeError, "`targets`.*list", lambda x: {"targets": [1.0]}, {}),
    "boundary drop": (ValueError, "`boundary`.*'carry'.*'drop'", lambda x: {}, {"boundary": "drop"}),
    "chunk_size": (ValueError, "`chunk_size`.*0", lambda x: {}, {"chunk_size": 0}),
    "lookahead": (ValueError, "`lookahead`.*`chunk_size`.*5", lambda x: {}, {"lookahead": 5}),
    "top_k": (ValueError, "`top_k`.*5", lambda x: {}, {"top_k": 5}),
    "weighting": (ValueError, "`weighting`.*'max'", lambda x: {}, {"weighting": "max"}),
    "temperature": (ValueError, "`temperature`.*0", lambda x: {}, {"temperature": 0.0}),
    "lr": (ValueError, "`lr`.*nan", lambda x: {}, {"lr": float("nan")}),
    "weight_decay": (ValueError, "`weight_decay`.*-1", lambda x: {}, {"weight_decay": -1.0}),
    "clip": (ValueError, "`clip`.*-1", lambda x: {}, {"clip": -1.0}),
    "addressing_weight": (TypeError, "`addressing_weight`.*str", lambda x: {}, {"addressing_weight": "1"}),
    "backend": (ValueError, "`backend`.*'cuda'", lambda x: {}, {"backend": "cuda"}),
}


@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_nothing_changes(case, first):
    error, message, changes, options = BAD[case]
    inputs = make_inputs(2, 8, dtype=torch.float32)
    state = make_state(inputs)
    if not first:
        stream(state, inputs, [5], **OPTIONS)
    before, tokens = contents(state), tokens_of(inputs, 5, 8)
    with testing.assert_unchanged(tokens), pytest.raises(error, match=message):
        fast_weight_memory_step(state, **tokens | changes(tokens), **OPTIONS | options)
    assert_same_bits(contents(state), before)
    assert ("binding" in before) is not first


def test_a_backend_that_cannot_run_binds_nothing(monkeypatch):
    from fwpkm_kernels.kernels import _common

    monkeypatch.setattr(_common, "INTERPRETED", False)
    inputs = make_inputs(2, 3)
    state = make_state(inputs)
    with pytest.raises(ValueError, match=r"`backend`.*TRITON_INTERPRET=1"):
        stream(state, inputs, [3], **OPTIONS, backend="triton")
    assert "binding" not in state.state_dict()
    stream(state, inputs, [3], **OPTIONS)


def test_a_step_wants_a_state():
    inputs = make_inputs(2, 3)
    with pytest.raises(TypeError, match="`state`.*MemoryState.*Tensor"):
        fast_weight_memory_step(inputs["values"], **tokens_of(inputs, 0, 3), **OPTIONS)


BAD_MEMORY = {
    "keys of rank 3": (ValueError, r"`keys`.*\[2, 4, 2\]", lambda k, v: (k[0], v)),
    "three halves": (ValueError, "`keys`.*two halves", lambda k, v: (torch.cat((k, k), 1), v)),
    "values of rank 1": (ValueError, r"`values`.*\[16\]", lambda k, v: (k, v[:, 0])),
    "not n² rows": (ValueError, r"`values`.*`keys`.*\[15, 3\]", lambda k, v: (k, v[1:])),
    "integer values": (TypeError, "`values`.*int64", lambda k, v: (k, v.long())),
    "float64 beside float32": (TypeError, "`keys`.*`values`", lambda k, v: (k.float(), v)),
    "no tensor": (TypeError, "`keys`.*list", lambda k, v: (k.tolist(), v)),
}


@pytest.mark.parametrize("case", BAD_MEMORY)
def test_bad_initial_memory_is_named(case):
    error, message, change = BAD_MEMORY[case]
    inputs = make_inputs()
    with pytest.raises(error, match=message):
        MemoryState(*change(inputs["keys"], inputs["values"]))


@DEVICES
def test_the_initial_memory_is_shared_and_never_written(place):
    inputs = make_inputs(2, 9, device=place.device)
    options = OPTIONS | {"weight_decay": 0.1, "backend": place.backend}
    with testing.assert_unchanged(inputs):
        one, other = make_state(inputs), make_state(inputs)
        for state in (one, other):
            for name in ("keys", "values"):
                assert getattr(state, name).data_ptr() != inputs[name].data_ptr()
                assert not getattr(state, name).requires_grad
        stream(one, inputs, [5], **options)
        testing.assert_bitwise_equal(other.values, inputs["values"])
        stream(other, inputs, [9], **options)
        stream(one, inputs, [4], **options)
        one.reset()
        assert_close({"values": one.values, "keys": one.keys}, {name: inputs[name] for name in ("values", "keys")}, 0.0)


@DEVICES
@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_initial_memory_of_any_strides(layout, place):
    inputs, plain = make_inputs(layout=layout, device=place.device), make_inputs(device=place.device)
    state = make_state(inputs)
    assert state.keys.is_contiguous()
    assert state.values.is_contiguous()
    stream(state, plain, [5], **OPTIONS, backend=place.backend)
    assert not torch.equal(state.values, plain["values"])
    state.reset()
    testing.assert_bitwise_equal(state.keys, plain["keys"])
    testing.assert_bitwise_equal(state.values, plain["values"])


def test_repr_says_where_the_state_is():
    state = make_state(make_inputs())
    assert repr(state) == "MemoryState(position=0, heads=1, n=4, Dk=4, values=[16, 3] of torch.float64 on cpu)"


@DEVICES
@pytest.mark.parametrize("length", [1, 5, 8, 9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_reset_gives_a_fresh_state(weight_decay, length, place):
    """Nothing of what was read before is seen again, wherever the sequence was left."""
    inputs = make_inputs(2, 9, mask="real", device=place.device)
    options = OPTIONS | {"lookahead": 3, "weight_decay": weight_decay, "backend": place.backend}
    state, fresh = make_state(inputs), make_state(inputs)
    stream(state, {name: x.flip(0) if name in BY_TOKEN else x for name, x in inputs.items()}, [length], **options)
    state.reset()
    assert state.position == 0
    for name in ("keys", "values"):
        testing.assert_bitwise_equal(getattr(state, name), inputs[name])
    testing.assert_bitwise_equal(
        stream(state, inputs, [2, 4, 3], **options), stream(fresh, inputs, [2, 4, 3], **options)
    )
    for name in ("keys", "values", "_touched", "_position"):
        testing.assert_bitwise_equal(getattr(state, name), getattr(fresh, name), name)


def test_reset_of_a_state_that_never_stepped():
    inputs = make_inputs()
    state = make_state(inputs)
    state.reset()
    assert_same_state(state, make_state(inputs))


@DEVICES
def test_reset_restores_the_rows_that_were_touched(place):
    inputs = make_inputs(1, 4, num_keys=8, device=place.device)
    state = make_state(inputs)
    stream(state, inputs, [4], chunk_size=4, top_k=1, backend=place.backend)
    changed = (state.values != inputs["values"]).any(1)
    assert 0 < int(changed.sum()) <= 3
    assert state._touched[changed].all()
    untouched = int((state._touched == 0).nonzero()[0])
    state.values[untouched] = 7.0
    state.reset()
    assert (state.values[untouched] == 7.0).all()
    others = torch.arange(64, device=place.device) != untouched
    testing.assert_bitwise_equal(state.values[others], inputs["values"][others])
    assert not state._touched.any()


@DEVICES
def test_reset_after_decay_restores_all_rows(place):
    inputs = make_inputs(1, 8, num_keys=8, device=place.device)
    state = make_state(inputs)
    options = {"chunk_size": 4, "top_k": 1, "backend": place.backend}
    stream(state, inputs, [4], **options, weight_decay=0.1)
    stream(state, inputs, [4], **options)  # which does not forget it
    state.values.fill_(7.0)
    state.reset()
    testing.assert_bitwise_equal(state.values, inputs["values"])


def test_reset_to_an_initial_memory_that_was_changed_in_place():
    inputs = make_inputs(2, 8)
    state = make_state(inputs)
    options = {"chunk_size": 3, "top_k": 2}
    stream(state, inputs, [8], **options)
    inputs["values"] += 1.0
    inputs["keys"] += 1.0
    state.reset()
    assert torch.equal(state.values, inputs["values"])
    assert torch.equal(state.keys, inputs["keys"])


@pytest.mark.parametrize("failing", ["write", "step_keys"])
def test_reset_after_a_step_that_failed_halfway(failing, monkeypatch):
    inputs = make_inputs(2, 8)
    state = make_state(inputs)
    options = {"chunk_size": 3, "top_k": 2}
    stream(state, inputs, [4], **options)
    for module in (streaming, scans):
        monkeypatch.setattr(module, failing, lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stream(state, inputs, [4], **options)
    monkeypatch.undo()
    state.reset()
    stream(state, inputs, [8], **options)
    fresh = make_state(inputs)
    stream(fresh, inputs, [8], **options)
    assert_same_state(state, fresh)


def test_equal_states_save_equal_tensors_and_no_other_tokens():
    inputs = make_inputs(2, 11)
    options = {"chunk_size": 4, "top_k": 2, "lookahead": 2, "addressing_weight": 0.0}
    states = []
    for cuts in ([11], [1] * 11, [5, 3, 3], [8, 3]):
        states.append(make_state(inputs))
        stream(states[-1], inputs, cuts, **options)
    for state in states[1:]:
        for name, x in state.state_dict().items():
            torch.testing.assert_close(x, states[0].state_dict()[name], msg=name)
    assert not states[0].state_dict()["queue.targets"][3:].any()
    states[0].reset()
    assert not any(x.any() for name, x in states[0].state_dict().items() if name.startswith("queue"))


def copies() -> dict[str, Callable[[MemoryState], MemoryState]]:
    return {
        "clone": MemoryState.clone,
        "deepcopy": copy.deepcopy,
        "pickle": lambda state: pickle.loads(pickle.dumps(state)),
    }


@DEVICES
@pytest.mark.parametrize("how", copies())
@pytest.mark.parametrize("read", [0, 6])
def test_copies_are_independent(read, how, place):
    inputs = make_inputs(2, 10, device=place.device)
    options = OPTIONS | {"backend": place.backend}
    state, expected = make_state(inputs), make_state(inputs)
    for one in (state, expected):
        if read:
            stream(one, inputs, [read], **options)
    other = copies()[how](state)
    assert_same_state(other, state)
    storages = [x.untyped_storage().data_ptr() for one in (state, other) for x in _buffers(one)]
    assert len(set(storages)) == len(storages)
    stream(other, {name: x.flip(0) if name in BY_TOKEN else x for name, x in inputs.items()}, [10 - read], **options)
    wanted = stream(expected, inputs, [10 - read], **options)
    testing.assert_bitwise_equal(stream(state, inputs, [10 - read], **options), wanted)
    assert_same_state(state, expected)
    other.reset()
    testing.assert_bitwise_equal(stream(other, inputs, [10], **options)[:, read:], wanted)


def _buffers(state: MemoryState) -> Iterator[Tensor]:
    yield from (state.keys, state.values, state._position, state._touched)
    if state._queue is not None:
        yield from state._queue


def test_a_clone_shares_the_initial_memory_only():
    state = make_state(make_inputs())
    assert state.clone()._initial_values is state._initial_values


def half_read(**options: Any) -> tuple[Inputs, MemoryState]:
    """A state in the middle of its second chunk, bfloat16 queries and float16 targets waiting in it."""
    inputs = make_inputs(2, 11, mask="real", dtype=torch.float32)
    inputs |= {"queries": inputs["queries"].bfloat16(), "targets": inputs["targets"].half()}
    state = make_state(inputs)
    stream(state, inputs, [6], **OPTIONS | {"clip": 0.5, **options})
    return inputs, state


def test_state_dict_is_flat_contiguous_and_unshared():
    _, state = half_read()
    saved = state.state_dict()
    assert all(type(name) is str and type(x) is Tensor and x.is_contiguous() for name, x in saved.items())
    storages = [x.untyped_storage().data_ptr() for x in (*saved.values(), *_buffers(state))]
    assert len(set(storages)) == len(storages)
    assert sum(x.untyped_storage().nbytes() for x in saved.values()) == sum(x.nbytes for x in saved.values())
    # The initial memory is not among them.
    assert [name for name, x in saved.items() if x.shape == state.values.shape] == ["values"]


@pytest.mark.parametrize("bound", [False, True], ids=["fresh", "bound"])
def test_safetensors_in_the_middle_of_a_chunk(bound, tmp_path):
    inputs, state = half_read()
    save_file(state.state_dict(), tmp_path / "state.safetensors")
    other = make_state(inputs | {name: torch.zeros_like(inputs[name]) for name in ("keys", "values")})
    if bound:
        stream(other, inputs, [9], **OPTIONS)
    other.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert other.position == 6
    assert_same_bits(other.state_dict(), state.state_dict())
    testing.assert_bitwise_equal(stream(other, inputs, [1, 4], **OPTIONS), stream(state, inputs, [1, 4], **OPTIONS))
    assert_same_bits(other.state_dict(), state.state_dict())
    other.reset()
    # Its own initial memory, not that of the state that was saved.
    assert other.position == 0
    assert other.keys.count_nonzero() == 0
    assert other.values.count_nonzero() == 0


def test_a_loaded_state_is_bound():
    inputs, state = half_read()
    other = make_state(inputs)
    other.load_state_dict(state.state_dict())
    with pytest.raises(ValueError, match="`top_k`.*2.*3"):
        stream(other, inputs, [1], **OPTIONS | {"top_k": 3})


def test_what_is_loaded_is_not_shared():
    inputs, state = half_read()
    saved, other = state.state_dict(), make_state(inputs)
    other.load_state_dict(saved)
    with testing.assert_unchanged(saved):
        stream(other, inputs, [5], **OPTIONS)


def test_an_unbound_state_saves_and_loads(tmp_path):
    inputs = make_inputs(2, 6)
    save_file(make_state(inputs).state_dict(), tmp_path / "state.safetensors")
    saved = load_file(tmp_path / "state.safetensors")
    state = make_state(inputs | {name: torch.zeros_like(inputs[name]) for name in ("keys", "values")})
    state.load_state_dict(saved)
    expected = make_state(inputs)
    testing.assert_bitwise_equal(stream(state, inputs, [6], **OPTIONS), stream(expected, inputs, [6], **OPTIONS))
    # Into a bound state too, which is then as a fresh one.
    state.load_state_dict(saved)
    assert state.position == 0
    assert_same_bits(state.state_dict(), saved)


def rebind(**changes: Any) -> Callable[[Inputs], Inputs]:
    """What a state would save that was bound to other options."""
    return lambda saved: half_read(**changes)[1].state_dict()


def rewrite(text: bytes) -> Callable[[Inputs], Inputs]:
    return lambda saved: {"binding": torch.tensor(list(text), dtype=torch.uint8)}


def replace(before: bytes, after: bytes) -> Callable[[Inputs], Inputs]:
    """Other text in the binding."""

    def change(saved: Inputs) -> Inputs:
        text = bytes(saved["binding"].tolist())
        assert before in text
        return rewrite(text.replace(before, after))(saved)

    return change


#: Changes to a state dict that are refused: message, changed entries; None removes one.
BAD_STATE: dict[str, tuple[str, Callable[[Inputs], Inputs]]] = {
    "other shape of values": (r"'values'.*\[16, 3\].*\[16, 4\]", lambda s: {"values": torch.zeros(16, 4)}),
    "other dtype of keys": ("'keys'.*float32.*float64", lambda s: {"keys": s["keys"].double()}),
    "other dtype of position": ("'position'.*int64.*int32", lambda s: {"position": s["position"].int()}),
    "no tensor": ("'position'.*int", lambda s: {"position": 6}),
    "no keys": ("'keys'", lambda s: {"keys": None}),
    "no position": ("'position'", lambda s: {"position": None}),
    "no binding": ("binding|queue", lambda s: {"binding": None}),
    "no queue": ("'position'", lambda s: {name: None for name in s if name not in ("keys", "values", "position")}),
    "negative position": ("'position'", lambda s: {"position": torch.tensor(-1)}),
    "no gates in the queue": ("queue.gates", lambda s: {"queue.gates": None}),
    "unknown name": ("'more'", lambda s: {"more": torch.zeros(1)}),
    "other shape in the queue": (r"'queue.slots'", lambda s: {"queue.slots": s["queue.slots"][:1]}),
    "other dtype in the queue": (
        "'queue.queries'.*bfloat16.*float32",
        lambda s: {"queue.queries": s["queue.queries"].float()},
    ),
    "other chunk_size": ("`chunk_size`.*4.*5|'queue", rebind(chunk_size=5)),
    "binding no tensor": ("'binding'", lambda s: {"binding": "{}"}),
    "binding no text": ("'binding'", rewrite(b"\xff\xfe")),
    "binding no JSON": ("'binding'", rewrite(b"{")),
    "binding no mapping": ("'binding'", rewrite(b"[]")),
    "binding empty": ("'binding'", rewrite(b"")),
    "binding of floats": ("'binding'", lambda s: {"binding": s["binding"].float()}),
    "binding without options": ("'binding'", replace(b'"options"', b'"other"')),
    "binding with one dtype": ("'binding'", replace(b'"bfloat16", ', b"")),
    "binding with an unknown option": ("'binding'", replace(b'"top_k"', b'"top"')),
    "binding with an unknown dtype": ("'binding'", replace(b"bfloat16", b"bfloat17")),
    "binding with what is no dtype": ("'binding'", replace(b"bfloat16", b"nn")),
    "binding with an integer dtype": ("'binding'|'queue", replace(b"bfloat16", b"int64")),
    "binding with a batch of text": ("'binding'", replace(b'"batch": 2', b'"batch": "2"')),
    "binding with a negative batch": ("'binding'", replace(b'"batch": 2', b'"batch": -2')),
    "binding with a float chunk_size": ("'binding'", replace(b'"chunk_size": 4', b'"chunk_size": 4.5')),
    "binding with a negative top_k": ("'binding'", replace(b'"top_k": 2', b'"top_k": -2')),
    "binding with an unknown score": ("'binding'", replace(b'"idw"', b'"idv"')),
    "binding with boundary drop": ("'binding'", replace(b'"carry"', b'"drop"')),
}


@pytest.mark.parametrize("bound", [False, True], ids=["fresh", "bound"])
@pytest.mark.parametrize("case", BAD_STATE)
def test_a_state_dict_that_does_not_fit_changes_nothing(case, bound):
    message, change = BAD_STATE[case]
    inputs, source = half_read()
    saved = source.state_dict()
    saved = {name: x for name, x in (saved | change(saved)).items() if x is not None}
    state = make_state(inputs)
    if bound:
        stream(state, inputs, [3], **OPTIONS)
    elif case == "other chunk_size":
        state.load_state_dict(saved)  # a fresh state takes any
        return
    before = contents(state)
    with pytest.raises(ValueError, match=message) as caught:
        state.load_state_dict(saved)
    assert "`" in str(caught.value)
    assert_same_bits(contents(state), before)


@pytest.mark.parametrize("name", [name for name in BOUND if isinstance(BOUND[name], dict) and name != "boundary"])
def test_a_bound_state_takes_no_other_options(name):
    _, state = half_read()
    before = contents(state)
    with pytest.raises(ValueError, match=f"`{name}`"):
        state.load_state_dict(half_read(**BOUND[name])[1].state_dict())
    assert_same_bits(contents(state), before)


@pytest.mark.parametrize("bound", [False, True], ids=["unbound", "bound"])
def test_one_compilation_serves_all_steps(bound):
    """Over chunk ends, for one number of tokens; binding at the first step costs at most one more."""
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
    inputs = make_inputs(2, 23, dtype=torch.float32)
    state, expected = make_state(inputs), make_state(inputs)
    compiled = torch.compile(fast_weight_memory_step, fullgraph=True, backend="aot_eager")
    cuts = [9, 1, 6, 7]
    wanted = stream(expected, inputs, cuts, **OPTIONS)
    testing.assert_bitwise_equal(stream(state, inputs, cuts, run=compiled, **OPTIONS), wanted)
    assert_same_state(state, expected)


def test_a_compiled_model_around_a_step():
    """What the graph does with the output and with the memory before and after is in the right order."""
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


@BOTH
@pytest.mark.parametrize(
    ("count", "names", "key_gradient"),
    [(1, ("gates", "mask"), "addressing"), (7, (), "addressing"), (2, ("gates", "mask"), "all")],
    ids=["read only", "over several chunks", "to the end of a chunk"],
)
def test_opcheck(count, names, key_gradient, place):
    inputs = make_inputs(2, 13, mask="bool", dtype=torch.float32, device=place.device)
    state = make_state(inputs)
    options = OPTIONS | {"key_gradient": key_gradient, "backend": place.backend}
    stream(state, inputs, [6], **options)
    memory = (state.keys, state.values, state._position, state._touched)
    tokens = tokens_of(inputs, 6, 6 + count)
    factors = [tokens[name] if name in names else None for name in ("gates", "mask")]
    arguments = (*memory, *state._queue, tokens["queries"], tokens["targets"], *factors, *Options(**options))
    torch.library.opcheck(torch.ops.fwpkm_kernels.fast_weight_memory_step.default, arguments)


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
    begin = 0
    for count in (2, 1, 7):
        tokens = tokens_of(inputs, begin, begin + count)
        by_time = streaming.Tokens(*(tokens[name].transpose(0, 1) for name in BY_TOKEN))
        with torch.no_grad(), NoSynchronisation(state._position) as mode:
            streaming._step(state.keys, state.values, state._position, state._touched, queue, by_time, o)
        assert mode.calls > 10
        begin += count
    assert state.position == 10

    # What a graph captures, where gates and masks are not given and the place is a tensor.
    tokens = streaming.Tokens(by_time.queries[:1], by_time.targets[:1], None, None)
    output, where = torch.empty_like(tokens.targets), torch.arange(1, 2, device=triton_place.device)
    with torch.no_grad(), NoSynchronisation(state._position):
        streaming.read_piece(state.keys, state.values, queue, tokens, output, where, o)
        streaming.close_chunk(state.keys, state.values, state._touched, queue, False, o)


@pytest.fixture
def errors_on_synchronisation() -> Iterator[None]:
    yield
    if HAS_GPU:
        torch.cuda.set_sync_debug_mode("default")


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


class OnGpu(torch.Tensor):
    """A table that says it is on a GPU."""

    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl


class Rerun:
    """In place of a captured graph: runs the function again, with the Python values that it had."""

    def __init__(self, function: Callable[[], None], warm_up: Callable[[], None]) -> None:
        warm_up()
        self.replay = function


@pytest.fixture
def make_graph(monkeypatch) -> Callable[..., MemoryGraph]:
    """`MemoryGraph` of some tokens of the inputs; without a GPU all of it but the capture."""

    def make(state: MemoryState, inputs: Inputs, count: int, **options: Any) -> MemoryGraph:
        table = state.values
        if not HAS_GPU:
            monkeypatch.setattr(graphs, "capture", Rerun)
            state.values = table.as_subclass(OnGpu)
        try:
            return MemoryGraph(state, **tokens_of(inputs, 0, count), **options)
        finally:
            state.values = table

    return make


def replayed(graph: MemoryGraph, state: MemoryState, inputs: Inputs, count: int) -> Tensor:
    """One call of a graph, from the state's position on."""
    return stream(state, inputs, [count], run=lambda state, **tokens: graph(**tokens))


@KEY_GRADIENTS
@pytest.mark.parametrize("names", [(), ("gates",), ("mask",), ("gates", "mask")], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("lookahead", [0, 1, 6])
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_replays_are_eager_steps(count, lookahead, batch, names, key_gradient, make_graph):
    """Bit by bit, from the first chunk on; one replay a call or several; and again after a reset."""
    inputs = make_inputs(batch, 36, num_keys=5, mask="real", dtype=torch.float32, device=DEVICE)
    inputs = {name: x for name, x in inputs.items() if name in ("queries", "targets", "keys", "values", *names)}
    options = {"chunk_size": 6, "top_k": 2, "lookahead": lookahead, "weight_decay": 0.01, "key_gradient": key_gradient}
    state, expected = make_state(inputs), make_state(inputs)
    graph = make_graph(state, inputs, count, **options)
    for _ in range(2):
        wanted = stream(expected, inputs, [count] * (36 // count), **options)
        outputs = [replayed(graph, state, inputs, 6) for _ in range(3)]
        outputs.append(replayed(graph, state, inputs, 18))
        testing.assert_bitwise_equal(torch.cat(outputs, 1), wanted)
        assert_same_state(state, expected)
        state.reset()
        expected.reset()


def test_making_a_graph_changes_nothing(make_graph):
    inputs = make_inputs(2, 9, device=DEVICE)
    state = make_state(inputs)
    stream(state, inputs, [5], **OPTIONS)
    before = contents(state)
    for count in (1, 2, 4):
        make_graph(state, inputs, count, **OPTIONS)
    assert_same_bits(contents(state), before)


def test_replays_between_eager_steps(make_graph):
    """Of several sizes, on one state, which is also reset and loaded into."""
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


#: Captures that are refused: error, message, tokens, options.
BAD_CAPTURE: dict[str, tuple[type[Exception], str, int, dict[str, Any]]] = {
    "tokens that do not divide": (ValueError, r"`queries`.*`chunk_size`.*\[2, 3, 1, 4\].*4", 3, {}),
    "more tokens than a chunk": (ValueError, "`queries`.*`chunk_size`", 8, {}),
    "no tokens": (ValueError, "`queries`.*`chunk_size`", 0, {}),
    "backend torch": (ValueError, "`backend`.*'torch'", 2, {"backend": "torch"}),
    "boundary drop": (ValueError, "`boundary`", 2, {"boundary": "drop"}),
    "unknown option": (TypeError, "chunksize", 2, {"chunksize": 4}),
    "bad option": (ValueError, "`lr`.*inf", 2, {"lr": float("inf")}),
}


@pytest.mark.parametrize("bound", [False, True], ids=["unbound", "bound"])
@pytest.mark.parametrize("case", BAD_CAPTURE)
def test_a_capture_that_is_refused_changes_nothing(case, bound, make_graph):
    error, message, count, options = BAD_CAPTURE[case]
    inputs = make_inputs(2, 8, device=DEVICE)
    state = make_state(inputs)
    if bound:
        stream(state, inputs, [4], **OPTIONS)
    before = contents(state)
    with pytest.raises(error, match=message):
        make_graph(state, inputs, count, **OPTIONS | options)
    assert_same_bits(contents(state), before)


def test_a_capture_binds_as_a_step_does(make_graph):
    inputs = make_inputs(2, 8, device=DEVICE)
    state = make_state(inputs)
    make_graph(state, inputs, 4, **OPTIONS)
    with pytest.raises(ValueError, match="`top_k`"):
        stream(state, inputs, [4], **OPTIONS | {"top_k": 3})
    with pytest.raises(ValueError, match="`top_k`"):
        make_graph(state, inputs, 4, **OPTIONS | {"top_k": 3})


def test_a_state_on_a_cpu_is_not_captured():
    inputs = make_inputs(2, 8)
    state = make_state(inputs)
    with pytest.raises(ValueError, match="`state`.*GPU.*cpu"):
        MemoryGraph(state, **tokens_of(inputs, 0, 4), **OPTIONS)
    assert "binding" not in state.state_dict()


#: Calls that are refused: message, what of gates and mask was captured, tokens read before, changes to the 4 tokens.
BAD_REPLAY: dict[str, tuple[str, tuple[str, ...], int, Callable[[Inputs], Inputs]]] = {
    "tokens no multiple": ("`queries`.*2.*3", ("gates", "mask"), 4, lambda x: {n: t[:, :3] for n, t in x.items()}),
    "position no multiple": ("`state`.*2.*5", ("gates", "mask"), 5, lambda x: x),
    "gates not captured": ("`gates`", ("mask",), 4, lambda x: x),
    "mask not captured": ("`mask`", ("gates",), 4, lambda x: x),
    "no gates": ("`gates`", ("gates", "mask"), 4, lambda x: x | {"gates": None}),
    "no mask": ("`mask`", ("gates", "mask"), 4, lambda x: x | {"mask": None}),
    "another batch": ("`queries`.*2.*1", ("gates", "mask"), 4, lambda x: {n: t[:1] for n, t in x.items()}),
    "other queries": ("`queries`.*bfloat16", ("gates", "mask"), 4, lambda x: x | {"queries": x["queries"].bfloat16()}),
    "other targets": ("`targets`.*float16", ("gates", "mask"), 4, lambda x: x | {"targets": x["targets"].half()}),
    "other gates": ("`gates`.*bfloat16", ("gates", "mask"), 4, lambda x: x | {"gates": x["gates"].bfloat16()}),
    "other mask": ("`mask`.*float32", ("gates", "mask"), 4, lambda x: x | {"mask": 0.5 * x["mask"].float()}),
    "other width": ("`targets`.*`values`", ("gates", "mask"), 4, lambda x: x | {"targets": x["targets"][..., :2]}),
}


@pytest.mark.parametrize("case", BAD_REPLAY)
def test_a_replay_that_is_refused_changes_nothing(case, make_graph):
    message, names, read, change = BAD_REPLAY[case]
    inputs = make_inputs(2, 12, mask="bool", dtype=torch.float32, device=DEVICE)
    state = make_state(inputs)
    captured = {name: x for name, x in inputs.items() if name in ("queries", "targets", *names)}
    graph = make_graph(state, captured, 2, **OPTIONS)
    stream(state, inputs, [read], **OPTIONS)
    before = contents(state)
    with pytest.raises(ValueError, match=message):
        graph(**change(tokens_of(inputs, read, read + 4)))
    assert_same_bits(contents(state), before)


def test_a_replay_on_a_state_that_was_bound_again_is_refused(make_graph):
    inputs = make_inputs(2, 8, device=DEVICE)
    state = make_state(inputs)
    fresh = state.state_dict()
    graph = make_graph(state, inputs, 4, **OPTIONS)
    state.load_state_dict(fresh)  # which was not bound
    with pytest.raises(ValueError, match="`state`"):
        replayed(graph, state, inputs, 4)
    testing.assert_bitwise_equal(state.values, inputs["values"])


@pytest.mark.parametrize("name", ["keys", "values"])
def test_a_replay_on_other_tensors_is_refused(name, make_graph):
    inputs = make_inputs(2, 8, device=DEVICE)
    state = make_state(inputs)
    graph = make_graph(state, inputs, 4, **OPTIONS)
    setattr(state, name, getattr(state, name).clone())
    before = contents(state)
    with pytest.raises(ValueError, match="`state`"):
        replayed(graph, state, inputs, 8)
    assert_same_bits(contents(state), before)


def test_replays_in_triton(make_graph, triton_place):
    inputs = make_inputs(1, 8, num_keys=2, dtype=torch.float32, device=triton_place.device)
    options = {"chunk_size": 2, "top_k": 1, "backend": triton_place.backend}
    state, expected = make_state(inputs), make_state(inputs)
    graph = make_graph(state, inputs, 1, **options)
    wanted = stream(expected, inputs, [1] * 6, **options)
    testing.assert_bitwise_equal(replayed(graph, state, inputs, 6), wanted)
    assert_same_state(state, expected)


@pytest.mark.gpu
@KEY_GRADIENTS
def test_a_replay_never_waits_for_the_gpu(key_gradient, make_graph, errors_on_synchronisation):
    inputs = make_inputs(2, 24, device="cuda")
    state = make_state(inputs)
    graph = make_graph(state, inputs, 2, **OPTIONS, key_gradient=key_gradient)
    replayed(graph, state, inputs, 8)
    torch.cuda.set_sync_debug_mode("error")
    replayed(graph, state, inputs, 16)
