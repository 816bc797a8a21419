"""What a state saves, loads and pickles, and what of that is refused."""

import copy
import io
import multiprocessing
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fwpkm_kernels import MemoryState, testing
from tests.helpers.memory import assert_same_bits, make_inputs
from tests.helpers.streaming import (
    OPTIONS,
    Inputs,
    assert_same_state,
    buffers_of,
    contents,
    half_read,
    make_state,
    saved_and_loaded,
    stream,
)


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


def test_state_dict_is_flat_contiguous_and_unshared():
    _, state = half_read()
    saved = state.state_dict()
    assert all(type(name) is str and type(x) is Tensor and x.is_contiguous() for name, x in saved.items())
    storages = [x.untyped_storage().data_ptr() for x in (*saved.values(), *buffers_of(state))]
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


def test_torch_load_accepts_a_state_that_it_need_not_trust():
    """As it does a state dict: what is pickled is plain, and checked when it is loaded."""
    inputs, state = half_read()
    state.rebind(torch.nn.Parameter(inputs["keys"]), torch.nn.Parameter(inputs["values"]))
    other = saved_and_loaded(state, weights_only=True)
    assert_same_state(other, state)
    testing.assert_bitwise_equal(stream(other, inputs, [5], **OPTIONS), stream(state, inputs, [5], **OPTIONS))
    other.reset()
    testing.assert_bitwise_equal(other.values, inputs["values"])


#: Changes to what is pickled that must be refused: the message, and the change.
BAD_PICKLES: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "a slot out of range": ("queue.slots", lambda x: x["_memory"]["queue"]["slots"].fill_(10**6)),
    "equal sub-keys": ("queue.sub_keys", lambda x: x["_memory"]["queue"]["sub_keys"].fill_(0)),
    "no queue": ("queue", lambda x: x["_memory"]["queue"].clear()),
    "a negative position": ("`position`", lambda x: x.update(_position=-1)),
    "no position": ("_position", lambda x: x.pop("_position")),
    "another table": ("`values`", lambda x: x["_memory"].update(values=torch.zeros(9, 3))),
    "an absurd chunk": ("binding", lambda x: x["_binding"]["options"].update(chunk_size=10**12, lookahead=10**12 + 1)),
    "no initial memory": ("`keys`", lambda x: x.update(_initial_keys=None)),
    "a method": ("'reset'", lambda x: x.update(reset={})),
    "a name that is none": ("unknown=", lambda x: x.update({1: 2})),
    "no memory": ("hold what it was", lambda x: x.update(_memory=None)),
    "a queue of other things": ("hold what it was", lambda x: x["_memory"].update(queue=[1])),
    "no flags": ("hold what it was", lambda x: x["_memory"].pop("touched")),
    "flags of another size": ("touched", lambda x: x["_memory"].update(touched=torch.zeros(3, dtype=torch.uint8))),
    "a huge batch": ("binding", lambda x: x["_binding"].update(batch=2**62)),
}


@pytest.mark.parametrize("what", BAD_PICKLES)
def test_a_pickle_that_is_no_state_is_refused(what):
    message, change = BAD_PICKLES[what]
    fields = copy.deepcopy(half_read()[1].__getstate__())
    change(fields)
    with pytest.raises((TypeError, ValueError), match=message):
        MemoryState.__new__(MemoryState).__setstate__(fields)


def test_a_file_of_the_old_format_is_refused():
    """Which has no data when objects are made."""
    file = io.BytesIO()
    torch.save(half_read()[1], file, _use_new_zipfile_serialization=False)
    for weights_only in (False, True):
        file.seek(0)
        with pytest.raises(ValueError, match="MemoryState cannot be read from a file in torch.save's old format"):
            torch.load(file, weights_only=weights_only)


@pytest.mark.parametrize("read", [0, 6, 8])
def test_a_distributed_checkpoint_loads_into_a_state_that_a_step_of_no_tokens_has_bound(read, tmp_path):
    checkpoint = pytest.importorskip("torch.distributed.checkpoint")
    inputs = make_inputs(2, 11, mask="real")
    state = make_state(inputs)
    stream(state, inputs, [read], **OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about running without process groups
        checkpoint.save({"memory": state}, checkpoint_id=tmp_path)
        fresh = make_state(inputs | {name: torch.zeros_like(inputs[name]) for name in ("keys", "values")})
        if read:
            with pytest.raises(ValueError, match="'position'.*step it with no tokens first"):
                checkpoint.load({"memory": fresh}, checkpoint_id=tmp_path)
            assert fresh.position == 0
            assert not fresh.values.any()
        for options, fits in (({"temperature": 0.123456789}, False), ({}, True)):
            other = fresh.clone()
            stream(other, inputs, [0], **OPTIONS, **options)
            if fits:
                checkpoint.load({"memory": other}, checkpoint_id=tmp_path)
                assert_same_bits(other.state_dict(), state.state_dict())
                testing.assert_bitwise_equal(
                    stream(other, inputs, [3], **OPTIONS), stream(state, inputs, [3], **OPTIONS)
                )
            else:
                with pytest.raises(ValueError, match="`temperature` must stay"):
                    checkpoint.load({"memory": other}, checkpoint_id=tmp_path)
