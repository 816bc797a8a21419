"""Segments of a sequence in training: any cut against the whole; what a carry refuses; streaming from training."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fwpkm_kernels import Carry, MemoryOutput, MemoryState, Rows, fast_weight_memory, fast_weight_memory_step, testing
from tests.conftest import PLACES, Place
from tests.helpers.memory import (
    KEY_GRADIENTS,
    PLACES_SLOW,
    assert_close,
    assert_same_bits,
    gradients_of,
    leaves_of,
    make_inputs,
    named,
    run,
)
from tests.helpers.segments import in_segments, segments_of
from tests.helpers.streaming import OPTIONS, contents, make_state, stream, tokens_of

SMALL = {"chunk_size": 3, "top_k": 2, "lookahead": 1, "clip": 0.5, "weight_decay": 0.1, "lr": 0.7}


def assert_segments_are_the_whole(inputs: dict[str, Tensor], cuts: list[int], **options: Any) -> None:
    """Outputs, slots, weights, final memory and all gradients."""
    expected = named(*run(fast_weight_memory, inputs, **options))
    with testing.poisoned_memory(), testing.assert_unchanged(inputs):
        actual = named(*run(in_segments(cuts), inputs, **options))
    assert_close(actual, expected)


@st.composite
def cut_sequences(draw: st.DrawFn) -> tuple[int, list[int], dict[str, Any], dict[str, Any]]:
    """Length, lengths of the segments, options, and which of gates and mask there are."""
    chunk_size = draw(st.integers(1, 4))
    lengths = st.sampled_from([0, 1, chunk_size - 1, chunk_size, chunk_size + 1, 2 * chunk_size + 1])
    cuts = draw(st.lists(lengths, min_size=1, max_size=5))
    options = {
        "chunk_size": chunk_size,
        "lookahead": draw(st.integers(0, chunk_size)),
        "top_k": draw(st.integers(1, 4)),
        "key_gradient": draw(st.sampled_from(["addressing", "addressing", "all"])),
        "addressing_weight": draw(st.sampled_from([1.0, 0.0])),
        "step": draw(st.sampled_from(["paper", "normalized"])),
        "weighting": draw(st.sampled_from(["softmax", "silu"])),
        "weight_decay": draw(st.sampled_from([0.0, 0.1])),
        "clip": draw(st.sampled_from([None, 0.3])),
    }
    given = {"gates": draw(st.booleans()), "mask": draw(st.sampled_from([None, "bool", "real"]))}
    return sum(cuts), cuts, options, given


@given(cut_sequences())
def test_any_cut_is_the_whole(case):
    length, cuts, options, given = case
    assert_segments_are_the_whole(make_inputs(2, length, **given), cuts, **options, backend="torch")


@pytest.mark.parametrize("cuts", [[1, 2, 0, 3, 1], [4, 3], [2, 1, 4]], ids=str)
@pytest.mark.parametrize("lookahead", [0, 1, 3])
def test_cuts_by_kernels(cuts, lookahead, triton_place):
    inputs = {name: x.to(triton_place.device) for name, x in make_inputs(2, sum(cuts), mask="real").items()}
    options = SMALL | {"lookahead": lookahead, "backend": triton_place.backend}
    assert_segments_are_the_whole(inputs, cuts, **options)


@PLACES_SLOW
@KEY_GRADIENTS
@pytest.mark.parametrize("num_keys", [3, 40], ids=["keys kept whole", "picks kept"])
def test_cuts_of_long_sequences(key_gradient, num_keys, place):
    inputs = {name: x.to(place.device) for name, x in make_inputs(2, 13, 2, num_keys, mask="bool").items()}
    cuts, options = [5, 1, 6, 1], SMALL | {"key_gradient": key_gradient, "backend": place.backend}
    assert_segments_are_the_whole(inputs, cuts, **options)


@KEY_GRADIENTS
def test_gradcheck_of_two_segments(key_gradient):
    """With a gradient of every number that the first segment leaves to the second."""
    inputs = make_inputs(1, 5, width=2)
    leaves = leaves_of(inputs)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(leaves, tensors, strict=True))
        return tuple(in_segments([3, 2])(**given, **SMALL | {"chunk_size": 2, "key_gradient": key_gradient})[:3])

    assert torch.autograd.gradcheck(call, tuple(leaves.values()))


def test_gates_and_masks_come_and_go():
    """What a segment does not give is one."""
    inputs = make_inputs(2, 9, mask="bool")
    whole = inputs | {"gates": inputs["gates"].clone(), "mask": inputs["mask"].clone()}
    whole["gates"][:, 4:7] = 1.0
    whole["mask"][:, :4] = True
    expected = fast_weight_memory(**whole, **SMALL)
    carry, keys, values, outputs = None, inputs["keys"], inputs["values"], []
    for begin, end, names in ((0, 4, ["gates"]), (4, 7, ["mask"]), (7, 9, ["gates", "mask"])):
        tokens = tokens_of({name: inputs[name] for name in ("queries", "targets", *names)}, begin, end)
        output, carry = fast_weight_memory(**tokens, keys=keys, values=values, carry=carry, return_carry=True, **SMALL)
        keys, values = output.keys, output.values
        outputs.append(output.output)
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected.output)
    torch.testing.assert_close(values, expected.values)


@pytest.mark.parametrize("lookahead", [0, 2])
def test_what_a_carry_holds(lookahead):
    """The tokens of the chunk that is not full, and the `lookahead` before it, and nothing else of what was given."""
    inputs = make_inputs(2, 11, mask="bool")
    options = SMALL | {"chunk_size": 4, "lookahead": lookahead}
    for length in range(12):
        given = tokens_of(inputs, 0, length)
        initial = {name: inputs[name] for name in ("keys", "values")}
        result, carry = fast_weight_memory(**given, **initial, return_carry=True, **options)
        assert isinstance(result, MemoryOutput)
        count = length % 4 + (lookahead if length >= 4 else 0)
        assert carry.position == length
        for name in ("queries", "targets", "gates", "mask"):
            testing.assert_bitwise_equal(getattr(carry, name), given[name][:, length - count :], name)
            assert getattr(carry, name).untyped_storage().nbytes() == getattr(carry, name).nbytes


def test_detach_ends_gradients():
    inputs = make_inputs(2, 7)
    leaves = leaves_of(inputs)
    first, rest = segments_of(leaves, [4, 3])
    initial = {"keys": leaves["keys"], "values": leaves["values"]}
    result, carry = fast_weight_memory(**first, **initial, return_carry=True, **SMALL)
    assert carry.queries.requires_grad
    memory = {"keys": result.keys.detach(), "values": result.values.detach()}
    output = fast_weight_memory(**rest, **memory, carry=carry.detach(), **SMALL)
    gradients = torch.autograd.grad(output.values.sum(), [leaves["queries"], leaves["values"]], allow_unused=True)
    assert (gradients[0][:, :4] == 0).all()
    assert gradients[1] is None


def changed(carry: Carry, name: str) -> Carry:
    """The carry with one thing wrong."""
    changes: dict[str, Any] = {
        "carry.queries": {"queries": carry.queries[:, 1:]},
        "carry.targets": {"targets": carry.targets[:1]},
        "carry.gates": {"gates": carry.gates[:, :1]},
        "carry.mask": {"mask": carry.mask.to(torch.complex64)},
        "carry.position": {"position": -1},
    }
    return carry._replace(**changes[name])


def a_carry(**options: Any) -> tuple[dict[str, Tensor], Carry]:
    inputs = make_inputs(2, 5, mask="bool", dtype=torch.float32)
    return inputs, fast_weight_memory(**inputs, **SMALL | options, return_carry=True)[1]


@pytest.mark.parametrize("name", ["carry.queries", "carry.targets", "carry.gates", "carry.mask", "carry.position"])
def test_a_carry_that_does_not_fit_is_named(name):
    inputs, carry = a_carry()
    with pytest.raises((TypeError, ValueError), match=f"`{name}`"):
        fast_weight_memory(**inputs, **SMALL, carry=changed(carry, name))


@pytest.mark.parametrize(
    "given, options, error, message",
    [
        ({"carry": tuple}, {}, TypeError, "`carry` must be a Carry"),
        ({"return_carry": 1}, {}, TypeError, "`return_carry` must be a bool"),
        ({"return_carry": 0}, {}, TypeError, "`return_carry` must be a bool"),
        ({"return_carry": None}, {}, TypeError, "`return_carry` must be a bool"),
        ({"return_carry": True}, {"boundary": "drop"}, ValueError, '`boundary` must be "carry"'),
        ({"carry": Carry}, {"boundary": "drop"}, ValueError, '`boundary` must be "carry"'),
        ({"carry": Carry}, {"chunk_size": 2}, ValueError, "`carry.queries`.*`chunk_size` 2"),
        ({"carry": Carry}, {"lookahead": 2}, ValueError, "`carry.queries`.*`lookahead` 2"),
    ],
)
def test_what_is_refused(given, options, error, message):
    inputs, carry = a_carry()
    if "carry" in given:
        given = {"carry": given["carry"](carry) if given["carry"] is tuple else carry}
    with pytest.raises(error, match=message):
        fast_weight_memory(**inputs, **SMALL | options, **given)


def test_dtypes_of_a_carry():
    inputs, carry = a_carry()
    with pytest.raises(
        TypeError, match="`carry.queries` must have the dtype of the queries that come, torch.bfloat16, got"
    ):
        fast_weight_memory(**inputs | {"queries": inputs["queries"].bfloat16()}, **SMALL, carry=carry)


def test_the_function_refuses_other_numbers_of_carried_tokens():
    from fwpkm_kernels import FastWeightMemory

    inputs = make_inputs(1, 6, gates=False)
    tensors = (inputs["queries"], inputs["targets"][:, 2:], inputs["keys"], inputs["values"])
    options = (3, 2, 1, "idw", 1e-3, "softmax", 1.0, None, None, 1.0, 0.0, None, 1.0, "addressing", "paper", "carry")
    with pytest.raises(ValueError, match="`carried` must be 0, or `lookahead`"):
        FastWeightMemory.apply(*tensors, *options, "ieee", "torch", 2)


def test_compiled_segments():
    """Compiled for segments of any lengths, and for the first one apart; with gradients through the carry."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def segment(tokens: dict[str, Tensor], keys: Tensor, values: Tensor, carry: Carry) -> Any:
        return fast_weight_memory(**tokens, keys=keys, values=values, carry=carry, return_carry=True, chunk_size=20)

    compiled = torch.compile(segment, fullgraph=True, backend=counter, dynamic=True)

    def chained(function: Any) -> dict[str, Tensor]:
        inputs = make_inputs(2, 204, 1, 8, 12, 7, dtype=torch.float32)  # no two sizes are the same
        leaves = leaves_of(inputs)
        first, *rest = segments_of(leaves, [25, 30, 33, 27, 29, 31, 29])
        result, carry = segment(first, leaves["keys"], leaves["values"], None)
        outputs = [result.output]
        for tokens in rest:
            result, carry = function(tokens, result.keys, result.values, carry)
            outputs.append(result.output)
        joined = result._replace(output=torch.cat(outputs, dim=1))
        return named(joined, gradients_of(joined, leaves))

    assert_close(chained(compiled), chained(segment), 1e-4)
    assert counter.frame_count <= 3  # of six calls; offsets of views may agree by chance


#: Lengths that a training call has read before a stream goes on.
READ = [0, 1, 3, 4, 5, 8, 10]


@pytest.mark.parametrize("length", READ)
@KEY_GRADIENTS
def test_streaming_goes_on_from_training(length, key_gradient):
    check_streaming(length, PLACES[0], key_gradient=key_gradient)


@pytest.mark.parametrize("length", [3, 9])
def test_streaming_goes_on_from_training_by_kernels(length, triton_place):
    check_streaming(length, triton_place)


def check_streaming(length: int, place: Place, **options: Any) -> None:
    """State, outputs and resets are those of a stream of the whole sequence."""
    inputs = {name: x.to(place.device) for name, x in make_inputs(2, 15, mask="real").items()}
    options = OPTIONS | {"lr": 0.5, "backend": place.backend, **options}
    expected = make_state(inputs)
    stream(expected, inputs, [length], **options)
    keys, values = inputs["keys"], inputs["values"].clone().requires_grad_()
    given = tokens_of(inputs, 0, length)
    output, carry = fast_weight_memory(**given, keys=keys, values=values, return_carry=True, **options)
    address = output.values.data_ptr()
    with testing.poisoned_memory():
        state = MemoryState.from_output(output, carry, keys=keys, values=values, **options)
    assert state.values.data_ptr() == address, "the table is not copied"
    assert not state.values.requires_grad
    assert_close(state.state_dict(), expected.state_dict())
    if length < 15:
        assert_close(
            {"": stream(state, inputs, [15 - length], **options)},
            {"": stream(expected, inputs, [15 - length], **options)},
        )
    assert_close(state.state_dict(), expected.state_dict())
    state.reset(touched_rows_only=True)
    assert_same_bits({"values": state.values}, {"values": values.detach()})


def test_a_backward_pass_that_needs_what_a_state_took_over_raises():
    inputs = make_inputs(1, 4)
    leaves = leaves_of(inputs)
    output, carry = fast_weight_memory(**leaves, return_carry=True, **OPTIONS)
    after = output.values.square().sum()
    state = MemoryState.from_output(output, carry, keys=inputs["keys"], values=inputs["values"], **OPTIONS)
    stream(
        state,
        {"queries": inputs["queries"].repeat(1, 2, 1, 1), "targets": inputs["targets"].repeat(1, 2, 1)},
        [4],
        **OPTIONS,
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        after.backward()


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"output": tuple}, TypeError, "`output` must be a MemoryOutput"),
        ({"output": Rows}, TypeError, "`output.values` must be a table"),
        ({"carry": None}, TypeError, "`carry` must be a Carry"),
        ({"chunk_size": 2}, ValueError, "`carry.queries`.*`chunk_size` 2"),
        ({"boundary": "drop"}, ValueError, "`boundary` must be"),
        ({"keys": torch.zeros(1, 2, 5, 2)}, ValueError, "`values`.*N = n²"),
        ({"keys": torch.zeros(1, 2, 3, 2), "values": torch.zeros(9, 3)}, ValueError, "`keys` must be"),
    ],
)
def test_what_from_output_refuses(change, error, message):
    inputs = make_inputs(2, 5, dtype=torch.float32)
    output, carry = fast_weight_memory(**inputs, **SMALL, return_carry=True)
    given = {"output": output, "carry": carry, "keys": inputs["keys"], "values": inputs["values"]} | SMALL | change
    if change.get("output") is tuple:
        given["output"] = tuple(output)
    if change.get("output") is Rows:
        given["output"] = fast_weight_memory(**inputs, **SMALL | {"weight_decay": 0.0}, final="rows")
    with pytest.raises(error, match=message):
        MemoryState.from_output(**given)


@pytest.mark.parametrize("position", [0, 2, 6])
def test_a_read_writes_nothing(position, place):
    """It is what a step without lookahead would read, of any batch; the state stays bitwise as it is."""
    inputs = {name: x.to(place.device) for name, x in make_inputs(3, 8, 2, dtype=torch.float32).items()}
    options = OPTIONS | {"backend": place.backend}
    state = make_state(inputs)
    if position:
        stream(state, inputs, [position], **options)
    before = contents(state)
    how = {} if position else {"top_k": 2, "backend": place.backend}
    queries = inputs["queries"][:2, :5].requires_grad_()
    with testing.poisoned_memory():
        output = state.read(queries, **how)
    assert_same_bits(contents(state), before)
    assert not output.requires_grad
    fresh = MemoryState(state.keys, state.values)
    expected = fast_weight_memory_step(
        fresh, queries, inputs["targets"][:2, :5], **options | {"chunk_size": 100, "lookahead": 0}
    )
    torch.testing.assert_close(output, expected)


def test_dtype_and_options_of_a_read():
    inputs = make_inputs(2, 5, dtype=torch.float32)
    state, queries = make_state(inputs), inputs["queries"]
    assert state.read(queries.bfloat16(), top_k=2).dtype == torch.float32
    stream(state, inputs | {"targets": inputs["targets"].half()}, [2], **OPTIONS)
    assert state.read(queries).dtype == torch.float16
    assert state.read(queries[:, :0], top_k=2).shape == (2, 0, 3)
    for name, x in {
        "top_k": 3,
        "score": "dot",
        "eps": 0.1,
        "weighting": "relu",
        "temperature": 2.0,
        "precision": "ieee",
        "backend": "torch",
    }.items():
        with pytest.raises(ValueError, match=f"`{name}` must stay as in the state's first step"):
            state.read(queries, **{name: x})
    with pytest.raises(ValueError, match="`queries` must have 4 dimensions"):
        state.read(queries[0])
    with pytest.raises(ValueError, match="`top_k` must be from 1"):
        make_state(inputs).read(queries, top_k=9)


def test_a_read_compiles():
    inputs = make_inputs(2, 5, dtype=torch.float32)
    state = make_state(inputs)
    stream(state, inputs, [3], **OPTIONS)
    compiled = torch.compile(lambda x: state.read(x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs["queries"]), state.read(inputs["queries"]))
