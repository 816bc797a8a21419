"""The state of a streamed memory: initial memory, reset, copies, saving and loading."""

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fwpkm_kernels import (
    MemoryState,
    scans,
    streaming,
    testing,
)
from tests.test_memory import assert_close, assert_same_bits, make_inputs
from tests.test_streaming import (
    BOTH,
    BY_TOKEN,
    DEVICES,
    OPTIONS,
    assert_same_state,
    contents,
    make_state,
    stream,
)

Inputs = dict[str, Any]
Cuts = list[int]


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


def copies() -> dict[str, Callable[[MemoryState], MemoryState]]:
    return {
        "clone": MemoryState.clone,
        "copy": copy.copy,
        "deepcopy": copy.deepcopy,
        "pickle": lambda state: pickle.loads(pickle.dumps(state)),
        "torch.save": saved_and_loaded,
    }


def saved_and_loaded(x: Any, weights_only: bool = False) -> Any:
    """Through torch.save and torch.load."""
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


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


def step_in_a_process(pickled: bytes, tokens: Inputs) -> bytes:
    state = pickle.loads(pickled)
    output = stream(state, tokens, [5], **OPTIONS)
    return pickle.dumps((output, state))


def test_a_pickled_state_goes_to_a_new_process_and_back():
    """It says all that a step needs: no other process knows what was bound."""
    inputs = make_inputs(2, 11)
    state = make_state(inputs)
    stream(state, inputs, [6], **OPTIONS)
    tokens = {name: inputs[name] for name in ("queries", "targets")}
    before = contents(state)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        output, other = pickle.loads(pool.apply(step_in_a_process, (pickle.dumps(state), tokens)))
    assert_same_bits(contents(state), before)
    testing.assert_bitwise_equal(output, stream(state, tokens, [5], **OPTIONS))
    assert_same_state(other, state)
    other.reset()
    testing.assert_bitwise_equal(other.values, inputs["values"])


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


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_saved_state_dict_in_the_middle_of_a_chunk(weights_only):
    inputs, state = half_read()
    saved = saved_and_loaded(state.state_dict(), weights_only)
    other = make_state(inputs)
    other.load_state_dict(saved)
    testing.assert_bitwise_equal(stream(other, inputs, [5], **OPTIONS), stream(state, inputs, [5], **OPTIONS))
    assert_same_bits(other.state_dict(), state.state_dict())


@pytest.mark.parametrize("bound", [False, True], ids=["fresh", "bound"])
def test_safetensors_in_the_middle_of_a_chunk(bound, tmp_path):
    inputs, state = half_read()
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(state.state_dict(), tmp_path / "state.safetensors")
    other = make_state(inputs | {name: torch.zeros_like(inputs[name]) for name in ("keys", "values")})
    if bound:
        stream(other, inputs, [9], **OPTIONS)
    other.load_state_dict(safetensors.load_file(tmp_path / "state.safetensors"))
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
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(make_state(inputs).state_dict(), tmp_path / "state.safetensors")
    saved = safetensors.load_file(tmp_path / "state.safetensors")
    state = make_state(inputs | {name: torch.zeros_like(inputs[name]) for name in ("keys", "values")})
    state.load_state_dict(saved)
    expected = make_state(inputs)
    testing.assert_bitwise_equal(stream(state, inputs, [6], **OPTIONS), stream(expected, inputs, [6], **OPTIONS))
    # Into a bound state too, which is then as a fresh one.
    state.load_state_dict(saved)
    assert state.position == 0
    assert_same_bits(state.state_dict(), saved)
