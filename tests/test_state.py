"""The state of a streamed memory: initial memory, reset, copies, selection and rollback."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from fwpkm_kernels import (
    MemoryState,
    fast_weight_memory_step,
    scans,
    streaming,
    testing,
)
from tests.helpers.memory import assert_close, assert_same_bits, make_inputs
from tests.helpers.streaming import (
    BOTH,
    BY_TOKEN,
    DEVICE,
    DEVICES,
    OPTIONS,
    assert_same_state,
    buffers_of,
    contents,
    copies,
    make_state,
    saved_and_loaded,
    stream,
    tokens_of,
)


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
    storages = [x.untyped_storage().data_ptr() for one in (state, other) for x in buffers_of(one)]
    assert len(set(storages)) == len(storages)
    stream(other, {name: x.flip(0) if name in BY_TOKEN else x for name, x in inputs.items()}, [10 - read], **options)
    wanted = stream(expected, inputs, [10 - read], **options)
    testing.assert_bitwise_equal(stream(state, inputs, [10 - read], **options), wanted)
    assert_same_state(state, expected)
    other.reset()
    testing.assert_bitwise_equal(stream(other, inputs, [10], **options)[:, read:], wanted)


@BOTH
def test_a_deep_copy_goes_on_bit_by_bit(place):
    """In the middle of a chunk, on either backend; and so does what it was copied from."""
    inputs = make_inputs(1, 6, dtype=torch.float32, device=place.device)
    options = OPTIONS | {"chunk_size": 3, "backend": place.backend}
    state = make_state(inputs)
    stream(state, inputs, [1], **options)
    other = copy.deepcopy(state)
    for one in (state, other):
        assert one.position == 1
    outputs = [stream(one, inputs, [3], **options) for one in (state, other)]
    testing.assert_bitwise_equal(*outputs)
    assert_same_state(state, other)


def test_a_clone_shares_the_initial_memory_only():
    state = make_state(make_inputs())
    assert state.clone()._initial_values is state._initial_values
    assert copy.copy(state)._initial_values is state._initial_values


@pytest.mark.parametrize("how", [copy.deepcopy, saved_and_loaded])
def test_states_copied_together_go_on_sharing_their_initial_memory(how):
    inputs = make_inputs()
    states = how([make_state(inputs) for _ in range(2)])
    one, other = (state._initial_values.data_ptr() for state in states)
    assert one == other
    assert one != inputs["values"].data_ptr()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "clone"])
@pytest.mark.parametrize("counted", range(3))
def test_a_copy_returns_to_an_initial_memory_that_was_changed_before(counted, how):
    """However often PyTorch counts that the initial memory was changed, of which a copy knows nothing."""
    inputs = make_inputs(2, 6)
    for _ in range(counted):
        inputs["values"].add_(0.0)
    state = make_state(inputs)
    stream(state, inputs, [6], **OPTIONS)
    inputs["values"].add_(1.0)
    for one in (copies()[how](state), state):
        one.reset()
        testing.assert_bitwise_equal(one.values, inputs["values"])


def test_a_copy_remembers_which_rows_to_copy_back():
    """So that its reset of these alone is as cheap as that of the state."""
    inputs = make_inputs(1, 4, num_keys=9)
    state = make_state(inputs)
    stream(state, inputs, [4], **OPTIONS)
    other = copy.deepcopy(state)
    testing.assert_bitwise_equal(other._touched, state._touched)
    with torch.no_grad():
        other.values.fill_(7.0)
    other.reset(touched_rows_only=True)
    testing.assert_bitwise_equal((other.values == 7.0).all(1), state._touched == 0)


@pytest.mark.parametrize("how", copies())
def test_copies_made_in_inference_mode(how):
    inputs = make_inputs(2, 10)
    state = make_state(inputs)
    stream(state, inputs, [6], **OPTIONS)
    with torch.inference_mode():
        other = copies()[how](state)
    testing.assert_bitwise_equal(stream(other, inputs, [4], **OPTIONS), stream(state, inputs, [4], **OPTIONS))
    other.reset()
    assert_close({"values": other.values}, {"values": inputs["values"]}, 0.0)


class WithName(MemoryState):
    """A subclass with an attribute of its own."""


@pytest.mark.parametrize("how", copies())
def test_copies_of_a_subclass(how):
    inputs = make_inputs()
    state = WithName(inputs["keys"], inputs["values"])
    state.names = ["one"]
    other = copies()[how](state)
    assert type(other) is WithName
    assert other.names == ["one"]
    assert (other.names is state.names) == (how in ("clone", "copy"))


@pytest.mark.parametrize("device", [DEVICE, "meta"])
@pytest.mark.parametrize("read", [0, 6])
def test_a_copy_on_a_device_stays_there(read, device):
    """All of it but the position, which must not be waited for; the initial memory is shared where it is."""
    inputs = make_inputs(2, 11, dtype=torch.float32)
    state = make_state(inputs)
    stream(state, inputs, [read], **OPTIONS)
    before, other = contents(state), state.to(device)
    assert other._initial_values is state._initial_values
    for position in (read, 0):
        tensors = [other.keys, other.values, other._touched, *(other._queue or ())]
        assert {x.device.type for x in tensors} == {torch.device(device).type}
        assert other._position.device.type == "cpu"
        assert other.position == position
        other.reset()
    assert saved_and_loaded(other)._device == other.values.device
    given = {name: x[:, :4].to(device) for name, x in inputs.items() if name in ("queries", "targets")}
    output = fast_weight_memory_step(other, **given, **OPTIONS)
    assert output.device.type == torch.device(device).type
    assert_same_bits(contents(state), before)
    if device != "meta":
        expected = fast_weight_memory_step(make_state(inputs), **tokens_of(given, 0, 4), **OPTIONS)
        testing.assert_bitwise_equal(output, expected)
        assert not torch.equal(other.values, inputs["values"])


@pytest.mark.parametrize(
    "device, error", [("nowhere", ValueError), (torch.float32, TypeError), (None, TypeError), ("cpu:x", ValueError)]
)
def test_what_is_no_device_is_named(device, error):
    with pytest.raises(error, match="`device` must be a device, got"):
        make_state(make_inputs()).to(device)


@DEVICES
@pytest.mark.parametrize("indices", [[0], [2, 1], [1, 1, 0, 2], [2, 0, 1], []], ids=str)
@pytest.mark.parametrize("in_place", [False, True], ids=["select", "select_"])
def test_selected_items_go_on_as_if_they_had_been_alone(in_place, indices, place):
    """In the first chunk, which nothing has been written before: so the others leave no trace."""
    inputs = make_inputs(3, 13, mask="real", device=place.device)
    options = OPTIONS | {"chunk_size": 6, "lookahead": 2, "backend": place.backend}
    state, alone = make_state(inputs), make_state(inputs)
    stream(state, inputs, [5], **options)
    chosen = {name: x[indices] if name in BY_TOKEN else x for name, x in inputs.items()}
    stream(alone, chosen, [5], **options)
    before = contents(state)
    other = state
    if in_place:
        state.select_(indices)
    else:
        other = state.select(torch.tensor(indices, dtype=torch.int32, device=place.device))
        assert_same_bits(contents(state), before)
    output, expected = (stream(one, chosen, [1, 7], **options) for one in (other, alone))
    torch.testing.assert_close(output, expected)
    assert_close({"values": other.values, "keys": other.keys}, {"values": alone.values, "keys": alone.keys}, 1e-12)


def test_beams_share_what_was_written():
    """After a chunk an item's tokens are in the table that all items read, so a selection keeps what others wrote."""
    inputs = make_inputs(3, 12)
    options = OPTIONS | {"lookahead": 0}
    state = make_state(inputs)
    stream(state, inputs, [8], **options)
    other = state.select([1])
    fresh = MemoryState(state.keys, state.values)
    chosen = {name: x[[1]] if name in BY_TOKEN else x for name, x in inputs.items()}
    expected = fast_weight_memory_step(fresh, **tokens_of(chosen, 8, 12), **options)
    testing.assert_bitwise_equal(stream(other, chosen, [4], **options), expected)
    testing.assert_bitwise_equal(other.values, fresh.values)


@pytest.mark.parametrize(
    "indices, error, message",
    [
        ([3], ValueError, r"`indices` must lie in \[0, 3\), got 3"),
        ([torch.tensor(3)], ValueError, r"`indices` must lie in \[0, 3\), got 3"),
        (torch.tensor([1], device="meta"), ValueError, "`indices` must have data"),
        (np.array(1), TypeError, "`indices` must be a tensor or a sequence of ints, got ndarray"),
        (torch.tensor([-1]), ValueError, r"`indices` must lie in \[0, 3\)"),
        ([0.5], TypeError, "`indices` must be an int, got float"),
        ([True], TypeError, "`indices` must be an int, got bool"),
        (torch.tensor([True]), TypeError, "`indices` must be int64 or int32"),
        (torch.tensor(1), ValueError, "`indices` must have 1 dimensions"),
        (1, TypeError, "`indices` must be a tensor or a sequence of ints, got int"),
    ],
)
def test_what_cannot_be_selected(indices, error, message):
    inputs = make_inputs(3, 5)
    state = make_state(inputs)
    stream(state, inputs, [5], **OPTIONS)
    before = contents(state)
    for select in (state.select, state.select_):
        with pytest.raises(error, match=message):
            select(indices)
    assert_same_bits(contents(state), before)


def test_a_state_that_has_read_nothing_has_no_items_to_select():
    with pytest.raises(ValueError, match="`indices` .*has not read one yet"):
        make_state(make_inputs()).select([0])


#: Tokens that are kept, that are read after them, and how many of these are the right ones; chunks are of 4.
DRAFTS = [(0, 3, 0), (0, 0, 0), (1, 2, 1), (3, 0, 0), (4, 3, 0), (6, 1, 0), (9, 2, 1)]


@BOTH
@pytest.mark.parametrize("lookahead", [0, 1, 3])
@pytest.mark.parametrize("kept, drafted, accepted", DRAFTS, ids=str)
def test_what_is_rolled_back_has_never_been_read(kept, drafted, accepted, lookahead, place):
    """Bit by bit, at once and in what is read and written later."""
    inputs = make_inputs(2, 13, mask="real", device=place.device)
    options = OPTIONS | {"lookahead": lookahead, "backend": place.backend}
    state, expected = make_state(inputs), make_state(inputs)
    stream(state, inputs, [kept], **options)
    stream(expected, inputs, [kept, accepted], **options)
    wrong = {name: x.clone() for name, x in inputs.items()}
    for name in BY_TOKEN:
        wrong[name][:, kept + accepted :] = torch.nan if inputs[name].is_floating_point() else 1
    stream(state, wrong, [drafted - drafted // 2, drafted // 2], **options)
    state.rollback(drafted - accepted)
    assert_same_state(state, expected)
    rest = [1, 13 - expected.position - 1]
    testing.assert_bitwise_equal(stream(state, inputs, rest, **options), stream(expected, inputs, rest, **options))
    assert_same_state(state, expected)


@pytest.mark.parametrize("read", [0, 3, 4, 9])
def test_what_cannot_be_rolled_back(read):
    """What has been written is not taken back, and of no tokens nothing can be."""
    inputs = make_inputs(2, 9)
    state = make_state(inputs)
    if read:
        stream(state, inputs, [read], **OPTIONS)
    before = contents(state)
    most = read % OPTIONS["chunk_size"]
    for tokens in (most + 1, 2**62):
        with pytest.raises(ValueError, match=f"`tokens` must be at most {most}, .* got {tokens}"):
            state.rollback(tokens)
    with pytest.raises(ValueError, match="`tokens` must be at least 0 .* got -1"):
        state.rollback(-1)
    for tokens in (True, 1.0, "1", None, torch.tensor(1)):
        with pytest.raises(TypeError, match=f"`tokens` must be an int, got {type(tokens).__name__}"):
            state.rollback(tokens)
    state.rollback(0)
    assert_same_bits(contents(state), before)


def test_compiled_code_rolls_back():
    """As many tokens as it is told, a number that it does not know when it is compiled."""
    torch._dynamo.reset()
    inputs = make_inputs(2, 8, dtype=torch.float32)

    def draft(state: MemoryState, queries: Tensor, targets: Tensor, tokens: int) -> Tensor:
        output = fast_weight_memory_step(state, queries, targets, **OPTIONS)
        state.rollback(tokens)
        return output

    compiled = torch.compile(draft, fullgraph=True, backend="aot_eager", dynamic=True)
    state, expected = make_state(inputs), make_state(inputs)
    for one in (state, expected):
        stream(one, inputs, [4], **OPTIONS)
    for tokens in (2, 1, 2):
        given = [inputs[name][:, 4:6] for name in ("queries", "targets")]
        for one, function in ((state, compiled), (expected, draft)):
            function(one, *given, tokens)
        assert_same_state(state, expected)
    with pytest.raises(ValueError, match="`tokens` must be at most 3, .* got 4"):
        compiled(state, *given, 4)
