"""`MemoryState.reset`: back to the initial memory as it is now, whoever wrote; and what a state is tied to."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from fwpkm_kernels import MemoryState, testing
from tests.conftest import Place
from tests.helpers.memory import make_inputs
from tests.helpers.streaming import DEVICES, OPTIONS, Layer, learned, make_state, saved_and_loaded, stream

Change = Callable[[nn.Parameter], Any]


def set_data(x: nn.Parameter) -> None:
    x.data = x.data * 0.5 + 1.0


def step_of_adam(x: nn.Parameter) -> None:
    optimizer = torch.optim.Adam([x], lr=0.1)
    x.grad = torch.ones_like(x)
    optimizer.step()


def set_storage(x: nn.Parameter) -> None:
    with torch.no_grad():
        x.set_(x.detach() + 1.0)


def swap(x: nn.Parameter) -> None:
    torch.utils.swap_tensors(x, nn.Parameter(x.detach() + 1.0))


#: Ways to change a Parameter; only the first moves the counter of the tensors that share its storage.
CHANGES: dict[str, Change] = {
    "in place": lambda x: x.detach().add_(1.0),
    "data in place": lambda x: x.data.mul_(0.99),
    "data set": set_data,
    "storage set": set_storage,
    "swapped": swap,
    "optimizer": step_of_adam,
    "vector_to_parameters": lambda x: vector_to_parameters(parameters_to_vector([x]).detach() * 2.0, [x]),
    "inference mode": torch.inference_mode()(lambda x: x.data.mul_(0.5)),
    "NumPy": lambda x: x.detach().numpy().__imul__(0.5),
}

#: Ways to write a tensor of a state from outside.
WRITES: dict[str, Callable[[MemoryState, str], Any]] = {
    "mul_": lambda state, name: getattr(state, name).mul_(0.99),
    "copy_": lambda state, name: getattr(state, name).copy_(torch.zeros_like(getattr(state, name))),
    "index": lambda state, name: getattr(state, name).__setitem__(0, 7.0),
    "data in place": lambda state, name: getattr(state, name).data.zero_(),
    "data set": lambda state, name: setattr(getattr(state, name), "data", torch.ones_like(getattr(state, name))),
    "assigned": lambda state, name: setattr(state, name, torch.ones_like(getattr(state, name))),
    "resized": lambda state, name: getattr(state, name).resize_(1, 1, 1, 1),
}


def assert_reset_to(state: MemoryState, keys: Tensor, values: Tensor) -> None:
    state.reset()
    assert state.position == 0
    testing.assert_bitwise_equal(state.keys, keys.detach())
    testing.assert_bitwise_equal(state.values, values.detach())
    assert state.keys.untyped_storage().data_ptr() != keys.untyped_storage().data_ptr()
    assert state.values.untyped_storage().data_ptr() != values.untyped_storage().data_ptr()


@DEVICES
@pytest.mark.parametrize("how", CHANGES)
def test_reset_sees_how_the_initial_memory_was_changed(how, place):
    if how == "NumPy" and place.device != "cpu":
        pytest.skip("NumPy shares memory on a CPU only")
    inputs, keys, values = learned(place)
    state = MemoryState(keys, values)
    for count in (0, 6):
        stream(state, inputs, [count], **OPTIONS, backend=place.backend)
        before = values.detach().clone()
        for x in (keys, values):
            CHANGES[how](x)
        assert not torch.equal(values, before)
        assert_reset_to(state, keys, values)
    stream(state, inputs, [9], **OPTIONS, backend=place.backend)  # which is bound as before


@DEVICES
def test_reset_sees_changes_of_what_autograd_computed(place):
    """Through the storage: the graph is not kept alive for it."""
    _, keys, values = learned(place)
    base = (values * 1.0).contiguous()
    state = MemoryState(keys, base)
    assert state._initial_values.grad_fn is None
    base.data.mul_(0.5)
    assert_reset_to(state, keys, base)


def test_reset_to_an_initial_memory_of_inference_mode():
    inputs = make_inputs(2, 9)
    with torch.inference_mode():
        keys, values = inputs["keys"].clone(), inputs["values"].clone()
    state = MemoryState(keys, values)
    stream(state, inputs, [6], **OPTIONS)
    with torch.inference_mode():
        values.mul_(0.5)
    assert_reset_to(state, keys, values)


@DEVICES
@pytest.mark.parametrize("name", ["keys", "values"])
@pytest.mark.parametrize("how", WRITES)
def test_reset_undoes_what_was_written_from_outside(how, name, place):
    inputs, keys, values = learned(place)
    state = MemoryState(keys, values)
    for count in (0, 6):
        if count:
            stream(state, inputs, [count], **OPTIONS, backend=place.backend)
        WRITES[how](state, name)
        assert not torch.equal(getattr(state, name), inputs[name])
        assert_reset_to(state, keys, values)
    stream(state, inputs, [9], **OPTIONS, backend=place.backend)
    fresh = make_state(inputs)
    stream(fresh, inputs, [9], **OPTIONS, backend=place.backend)
    testing.assert_bitwise_equal(state.values, fresh.values)


@DEVICES
def test_what_is_assigned_is_copied(place):
    """Also the initial memory itself, which is never written."""
    inputs, keys, values = learned(place)
    state = MemoryState(keys, values)
    stream(state, inputs, [6], **OPTIONS, backend=place.backend)
    table = torch.ones_like(inputs["values"])
    state.values = table
    state.keys = keys
    testing.assert_bitwise_equal(state.values, table)
    with testing.assert_unchanged(table, keys.detach()):
        stream(state, inputs, [3], **OPTIONS, backend=place.backend)
    assert not torch.equal(state.values, table)
    state.reset(touched_rows_only=True)
    testing.assert_bitwise_equal(state.values, inputs["values"])


@pytest.mark.parametrize(
    "name, x, error, message",
    [
        ("values", torch.zeros(2, 2, dtype=torch.float64), ValueError, r"`values` must be \[16, 3\].*got \[2, 2\]"),
        ("keys", torch.zeros(1, 2, 4, 2), ValueError, "`keys` must be .*float64 .* got .*float32"),
        ("values", 3, TypeError, "`values` must be a torch.Tensor, got int"),
    ],
)
def test_what_cannot_be_assigned(name, x, error, message):
    state = make_state(make_inputs())
    before = state.state_dict()
    with pytest.raises(error, match=message):
        setattr(state, name, x)
    for key, saved in state.state_dict().items():
        testing.assert_bitwise_equal(saved, before[key])


@DEVICES
@pytest.mark.parametrize("name", ["keys", "values"])
@pytest.mark.parametrize("how", ["transposed", "expanded", "negated", "initial"])
def test_reset_after_the_data_of_a_private_tensor_was_set(how, name, place):
    """To what a step could not write, or must not."""
    inputs, keys, values = learned(place)
    state, initial = MemoryState(keys, values), {"keys": keys, "values": values}[name]
    stream(state, inputs, [6], **OPTIONS, backend=place.backend)
    with torch.no_grad():
        layouts = {
            "transposed": torch.zeros_like(initial.mT.contiguous()).mT,
            "expanded": torch.zeros_like(initial[:1]).expand_as(initial),
            "negated": torch.complex(initial, initial).conj().imag,
            "initial": initial.detach(),
        }
    getattr(state, name).data = layouts[how]
    before = {one: x.detach().clone() for one, x in (("keys", keys), ("values", values))}
    assert_reset_to(state, keys, values)
    fresh = make_state(inputs)
    for one in (state, fresh):
        stream(one, inputs, [9], **OPTIONS, backend=place.backend)
    testing.assert_bitwise_equal(state.values, fresh.values)
    testing.assert_bitwise_equal(keys.detach(), before["keys"])
    testing.assert_bitwise_equal(values.detach(), before["values"])


def test_reset_forgets_what_autograd_knows_of_a_private_tensor():
    _, keys, values = learned(Place("torch", "cpu"))
    state = MemoryState(keys, values)
    state.values.add_(values)
    assert state.values.requires_grad
    assert_reset_to(state, keys, values)
    assert not state.values.requires_grad


@DEVICES
def test_what_a_state_has_learned_becomes_its_initial_memory(place):
    inputs, keys, values = learned(place)
    state = MemoryState(keys, values)
    stream(state, inputs, [6], **OPTIONS, backend=place.backend)
    state.rebind(state.keys, state.values)
    new_keys, new_values = state.keys.clone(), state.values.clone()
    stream(state, inputs, [3], **OPTIONS, backend=place.backend)
    assert not torch.equal(state.values, new_values)
    assert_reset_to(state, new_keys, new_values)


@pytest.mark.parametrize("what", ["reset", "select_", "load_state_dict", "rebind", "rollback", "values"])
def test_what_an_activation_checkpoint_would_do_again_is_refused(what):
    inputs = make_inputs(2, 6, dtype=torch.float32)
    state = make_state(inputs)
    stream(state, inputs, [6], **OPTIONS)
    saved = state.state_dict()
    calls = {
        "reset": state.reset,
        "select_": lambda: state.select_([1, 0]),
        "load_state_dict": lambda: state.load_state_dict(saved),
        "rebind": lambda: state.rebind(inputs["keys"], inputs["values"]),
        "rollback": lambda: state.rollback(1),
        "values": lambda: setattr(state, "values", inputs["values"]),
    }

    def function(x: Tensor) -> Tensor:
        calls[what]()
        return x * x

    loss = checkpoint(function, torch.ones(3, requires_grad=True), use_reentrant=False).sum()
    before = state.state_dict()
    with pytest.raises(RuntimeError, match=f"{what}.* was called in a backward pass.*activation checkpoint.*hook"):
        loss.backward()
    for name, x in state.state_dict().items():
        testing.assert_bitwise_equal(x, before[name], name)


@DEVICES
def test_touched_rows_only_believes_what_it_says(place):
    inputs = make_inputs(1, 4, num_keys=8, device=place.device)
    state = make_state(inputs)
    stream(state, inputs, [4], chunk_size=4, top_k=1, backend=place.backend)
    changed = (state.values != inputs["values"]).any(1)
    assert 0 < int(changed.sum()) <= 3
    untouched = int((state._touched == 0).nonzero()[0])
    state.values[untouched] = 7.0
    state.reset(touched_rows_only=True)
    assert (state.values[untouched] == 7.0).all()
    others = torch.arange(64, device=place.device) != untouched
    testing.assert_bitwise_equal(state.values[others], inputs["values"][others])
    testing.assert_bitwise_equal(state.keys, inputs["keys"])
    assert not state._touched.any()
    assert_reset_to(state, inputs["keys"], inputs["values"])


@DEVICES
@pytest.mark.parametrize("decayed", [4, 8])
def test_touched_rows_only_after_decay_restores_all_rows(decayed, place):
    """After a chunk, and after several at once."""
    inputs = make_inputs(1, 12, num_keys=8, device=place.device)
    state = make_state(inputs)
    options = {"chunk_size": 4, "top_k": 1, "backend": place.backend}
    stream(state, inputs, [decayed], **options, weight_decay=0.1)
    stream(state, inputs, [4], **options)  # which does not forget it
    state.values.fill_(7.0)
    state.reset(touched_rows_only=True)
    testing.assert_bitwise_equal(state.values, inputs["values"])


@pytest.mark.parametrize("what", ["load_state_dict", "rebind"])
def test_touched_rows_only_restores_all_rows_where_it_cannot_know(what):
    inputs, others = make_inputs(2, 9), make_inputs(2, 9, seed=1)
    state, other = make_state(inputs), make_state(others)
    stream(other, others, [6], **OPTIONS)
    expected = inputs
    if what == "load_state_dict":
        state.load_state_dict(other.state_dict())
    else:
        state.rebind(others["keys"], others["values"])
        expected = others
    state.reset(touched_rows_only=True)
    testing.assert_bitwise_equal(state.values, expected["values"])
    testing.assert_bitwise_equal(state.keys, expected["keys"])


def test_touched_rows_only_is_a_bool():
    with pytest.raises(TypeError, match="`touched_rows_only` must be a bool, got int"):
        make_state(make_inputs()).reset(touched_rows_only=1)


def loaded(module: nn.Module) -> nn.Module:
    other = Layer()
    other.load_state_dict({name: x + 1.0 for name, x in module.state_dict().items()})
    return other


def set_as_vector(module: nn.Module) -> nn.Module:
    vector_to_parameters(parameters_to_vector(module.parameters()).detach() * 2.0, module.parameters())
    return module


#: Ways to another module, or another state of one, whose state is tied to that module's Parameters.
TIED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "AveragedModel": lambda module: AveragedModel(module).module,
    "torch.save": saved_and_loaded,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "double": nn.Module.double,
    "bfloat16": lambda module: module.to(torch.bfloat16),
    "share_memory": nn.Module.share_memory,
    "load_state_dict": loaded,
    "vector_to_parameters": set_as_vector,
    "double of a deepcopy": lambda module: copy.deepcopy(module).double(),
    "deepcopy of double": lambda module: copy.deepcopy(module.double()),
    "torch.save of double": lambda module: saved_and_loaded(module.double()),
}


@pytest.mark.parametrize("how", TIED)
def test_a_state_stays_tied_to_the_parameters_of_its_module(how):
    first = Layer()
    first(torch.randn(2, 6, 1, 4), torch.randn(2, 6, 3))
    module = TIED[how](first)
    assert module.state.position == (0 if how == "load_state_dict" else 6)
    for _ in range(2):
        for x in module.parameters():
            x.data.mul_(0.5)
        assert_reset_to(module.state, module.keys, module.values)
    dtype = module.values.dtype
    assert module.state.values.dtype == dtype
    queries, targets = torch.randn(2, 6, 1, 4, dtype=dtype), torch.randn(2, 6, 3, dtype=dtype)
    if dtype == first.values.dtype or first is module:
        module(queries, targets)
        assert_reset_to(module.state, module.keys, module.values)


def test_an_averaged_model_resets_to_its_averages():
    module = Layer()
    averaged = AveragedModel(module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    for _ in range(3):
        for x in module.parameters():
            x.data.add_(1.0)
        averaged.update_parameters(module)
    assert not torch.equal(averaged.module.values, module.values)
    assert_reset_to(averaged.module.state, averaged.module.keys, averaged.module.values)
    assert_reset_to(module.state, module.keys, module.values)


def assigned(module: Layer) -> Layer:
    module.load_state_dict({name: x.detach() + 1.0 for name, x in module.state_dict().items()}, assign=True)
    return module


@pytest.mark.parametrize("how", [assigned, lambda module: module.double()], ids=["assign", "buffers in double"])
def test_rebind_ties_a_state_again(how):
    module = Layer(buffers=how is not assigned)
    old = module.values
    module = how(module)
    assert module.values is not old
    module.state.reset()
    testing.assert_bitwise_equal(module.state.values, old.detach())  # untied, as the docstring says
    before = module.state.state_dict()
    module.state.rebind(module.keys, module.values)
    for name, x in module.state.state_dict().items():
        testing.assert_bitwise_equal(x, before[name])
    assert_reset_to(module.state, module.keys, module.values)
    module.values.data.mul_(0.5)
    assert_reset_to(module.state, module.keys, module.values)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"values": torch.zeros(16, 5, dtype=torch.float64)}, ValueError, r"`values` must be \[16, 3\]"),
        ({"keys": torch.zeros(1, 2, 3, 2, dtype=torch.float64)}, ValueError, "`values`"),
        ({"keys": torch.zeros(1, 2, 4, 2)}, TypeError, "`keys` and `values` must both be float64"),
        ({"values": None}, TypeError, "`values` must be a torch.Tensor"),
    ],
)
def test_what_cannot_be_bound_again(changes, error, message):
    inputs = make_inputs()
    state = make_state(inputs)
    tied = state._initial_keys, state._initial_values
    with pytest.raises(error, match=message):
        state.rebind(**{name: inputs[name] for name in ("keys", "values")} | changes)
    assert (state._initial_keys, state._initial_values) == tied or state._initial_values is tied[1]


def test_reset_to_an_initial_memory_of_other_sizes_starts_anew():
    """Of which nothing is bound, as another batch may come."""
    inputs, keys, values = learned(Place("torch", "cpu"))
    state = MemoryState(keys, values)
    stream(state, inputs, [6], **OPTIONS)
    others = make_inputs(3, 9, num_keys=5)
    keys.data, values.data = others["keys"], others["values"]
    assert_reset_to(state, keys, values)
    options = {"chunk_size": 3, "top_k": 2}
    testing.assert_bitwise_equal(
        stream(state, others, [9], **options), stream(make_state(others), others, [9], **options)
    )


def test_an_initial_memory_that_is_none_any_more_is_named():
    inputs, keys, values = learned(Place("torch", "cpu"))
    state = MemoryState(keys, values)
    stream(state, inputs, [6], **OPTIONS)
    before = state.state_dict()
    values.data = values.data[:9]
    with pytest.raises(ValueError, match="`values` .*must have N = n² rows"):
        state.reset()
    for name, x in state.state_dict().items():
        testing.assert_bitwise_equal(x, before[name])
