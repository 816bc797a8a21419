"""States in other processes: copies, whatever the start method and whatever holds them."""

import multiprocessing
import pickle
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fwpkm_kernels import MemoryState, graphs, testing
from tests.helpers.memory import make_inputs
from tests.helpers.streaming import DEVICE, OPTIONS, Layer, contents, make_state, stream, tokens_of

METHODS = ("fork", "forkserver", "spawn")


class Named(MemoryState):
    """A state with something of its own."""

    def __init__(self, keys: Tensor, values: Tensor, name: str) -> None:
        super().__init__(keys, values)
        self.name, self.itself = name, self


def tokens() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, 6, 1, 4, generator=generator), torch.randn(2, 6, 3, generator=generator)


def step(state: MemoryState) -> Tensor:
    queries, targets = tokens()
    dtype = state.values.dtype
    return stream(state, {"queries": queries.to(dtype), "targets": targets.to(dtype)}, [6 - state.position], **OPTIONS)


def as_bytes(*tensors: Tensor) -> bytes:
    """So that what comes back shares nothing."""
    return pickle.dumps([x.detach().clone() for x in tensors])


def work(alone: MemoryState, named: Named, module: Layer, answers: Any, may_end: Any) -> None:
    """In another process: step all states; change the Parameters of the module, and reset its state to them."""
    torch.set_num_threads(1)
    results = [step(alone), step(named), step(module.state), alone.values]
    for x in module.parameters():
        x.data.mul_(0.5)
    module.state.reset()
    results += [module.state.values, module.values, module.state.keys, module.keys]
    answers.put((named.name, named.itself is named, alone.position, as_bytes(*results)))
    answers.put(alone)  # and back: a copy again
    may_end.wait(120)  # what is shared is sent while its sender lives


@pytest.mark.parametrize("method", METHODS)
def test_a_state_in_another_process_is_a_copy(method):
    """Alone, in a module, of a subclass; one that has stepped before; and on its way back."""
    context = multiprocessing.get_context(method)
    inputs = make_inputs(2, 6, dtype=torch.float32)
    inputs["queries"], inputs["targets"] = tokens()
    alone, named, module = make_state(inputs), Named(inputs["keys"], inputs["values"], "one"), Layer()
    states = (alone, named, module.state)
    for state in states:
        stream(state, inputs, [3], **OPTIONS)
    before, parameters = [contents(state) for state in states], [x.detach().clone() for x in module.parameters()]
    answers, may_end = context.Queue(), context.Event()
    child = context.Process(target=work, args=(alone, named, module, answers, may_end))
    child.start()
    *found, results = answers.get(timeout=120)
    returned = answers.get(timeout=120)
    may_end.set()
    child.join(120)
    assert child.exitcode == 0
    assert found == ["one", True, 6]
    for state, old in zip(states, before, strict=True):
        for key, x in contents(state).items():
            testing.assert_bitwise_equal(x, old[key], key)
    results = pickle.loads(results)
    for state, output in zip(states, results, strict=False):  # the child's steps are those that are made here
        testing.assert_bitwise_equal(output, step(state))
    testing.assert_bitwise_equal(results[3], alone.values)
    testing.assert_bitwise_equal(results[4], results[5])  # in the child the module's state is tied to its Parameters
    testing.assert_bitwise_equal(results[6], results[7])
    assert returned.position == 6
    testing.assert_bitwise_equal(returned.values, alone.values)
    returned.values.fill_(7.0)
    assert not (alone.values == 7.0).any()
    shares = method != "fork"  # a forked process has copies of everything that was not shared before
    for x, old in zip(module.parameters(), parameters, strict=True):
        testing.assert_bitwise_equal(x.detach(), old * (0.5 if shares else 1.0))
    module.state.reset()  # to what the other process has made of the shared Parameters
    testing.assert_bitwise_equal(module.state.values, module.values.detach())


class Steps(Dataset):
    """A data set whose workers step a state of theirs, and change its initial memory, which is pickled behind it."""

    def __init__(self) -> None:
        inputs = make_inputs(2, 6, dtype=torch.float32)
        self.state, self.values = make_state(inputs), inputs["values"]

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[int, int, int, bool]:
        before = self.state.position
        self.values.fill_(7.0)
        self.state.reset()
        is_tied = bool((self.state.values == 7.0).all())
        step(self.state)
        return index, before, self.state.position, is_tied


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_a_data_loader_have_states_of_their_own(method):
    data = Steps()
    loader = DataLoader(data, num_workers=2, batch_size=None, multiprocessing_context=method)
    found = {index: others for index, *others in loader}
    # Each of two workers has its first and its second.
    assert found == {0: [0, 6, True], 1: [0, 6, True], 2: [6, 6, True], 3: [6, 6, True]}
    assert data.state.position == 0


def test_no_private_tensor_is_shared_by_being_sent():
    inputs = make_inputs(2, 6, dtype=torch.float32)
    inputs["queries"], inputs["targets"] = tokens()
    state = make_state(inputs)
    stream(state, inputs, [3], **OPTIONS)
    other = pickle.loads(ForkingPickler.dumps(state))
    own = [state.keys, state.values, state._touched, state._position, *state._queue]
    assert not any(x.is_shared() for x in own)
    assert state._initial_values.is_shared()
    assert not any(x.is_shared() for x in (other.keys, other.values, *other._queue))
    testing.assert_bitwise_equal(step(other), step(state))


def test_what_is_shared_stays_shared():
    """The initial memory, of several states once, also where it belongs to a module."""
    inputs = make_inputs(dtype=torch.float32)
    modules = Layer(), Layer(buffers=True)
    states, (learned, frozen) = pickle.loads(ForkingPickler.dumps(([make_state(inputs), make_state(inputs)], modules)))
    assert states[0]._initial_values is states[1]._initial_values
    inputs["values"].fill_(7.0)
    assert (states[0]._initial_values == 7.0).all()
    assert learned.state._initial_values is learned.values
    assert frozen.state._initial_values is frozen.values
    assert not any(module.state.values.is_shared() for module in (learned, frozen))


def test_a_graph_is_not_sent(monkeypatch):
    """Nor used in a process that is forked from the one that captured it."""
    inputs = make_inputs(2, 8, device=DEVICE)
    state = make_state(inputs)
    from tests.helpers.graphs import graph_maker

    graph = graph_maker(monkeypatch)(state, inputs, 4, **OPTIONS)
    with pytest.raises(TypeError, match="MemoryGraph cannot be .*sent to another process.*send its state"):
        ForkingPickler.dumps({"graph": graph})
    before = contents(state)
    monkeypatch.setattr(graphs.os, "getpid", lambda: -1)
    with pytest.raises(RuntimeError, match="MemoryGraph runs in the process that captured it.*forked"):
        graph(**tokens_of(inputs, 0, 4))
    for key, x in contents(state).items():
        testing.assert_bitwise_equal(x, before[key], key)
