"""Threads and streams: what runs beside each other is what runs alone, bit by bit; no module holds anything mutable.

Triton's interpreter patches Triton's own modules while a kernel runs, so it serves one thread at a time; on a GPU the
Triton backend is tested as the other one is here.
"""

import ast
import concurrent.futures
import importlib
import inspect
import pkgutil
import re
import threading
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

import fwpkm_kernels
from fwpkm_kernels import (
    MemoryGraph,
    chunk_value_update,
    fast_weight_memory,
    fast_weight_memory_step,
    product_key_lookup,
    product_key_update,
    sparse_value_gather,
    testing,
)
from tests.conftest import Place
from tests.helpers.memory import make_inputs
from tests.helpers.streaming import make_state, stream

#: On a GPU both backends run in threads, elsewhere PyTorch alone.
THREADED = pytest.mark.parametrize(
    "place",
    [Place("torch", "cpu"), pytest.param(Place("triton", "cuda"), marks=pytest.mark.gpu)],
    ids=lambda p: p.backend,
)
OPTIONS = {"chunk_size": 4, "top_k": 2, "weight_decay": 0.01, "clip": 0.5}

Job = Callable[[], list[Tensor]]


def step_job(seed: int, place: Place) -> Job:
    """A stream of many small steps, and then all that the state holds."""
    inputs = make_inputs(2, 40, mask="real", seed=seed, dtype=torch.float32, device=place.device)

    def job() -> list[Tensor]:
        state = make_state(inputs)
        outputs = stream(state, inputs, [1, 2, 5, 1, 9, 2, 3, 1, 4, 12], **OPTIONS, backend=place.backend)
        state_of_one = [*state.state_dict().values()]
        state.reset()
        return [outputs, *state_of_one, state.values]

    return job


def training_job(seed: int, place: Place) -> Job:
    """Forward and backward of the whole memory and of each operation, again and again; backward has threads of its own
    on a GPU."""
    inputs = make_inputs(2, 9, mask="bool", seed=seed, dtype=torch.float32, device=place.device)
    queries, keys = testing.make_lookup_inputs(6, 2, 9, 8, seed=seed, device=place.device)
    update = testing.make_update_inputs(6, 6, 81, 5, seed=seed, device=place.device)
    backend = {"backend": place.backend}

    def job() -> list[Tensor]:
        results: list[Tensor] = []
        for _ in range(5):
            leaves = [inputs[name].clone().requires_grad_() for name in ("queries", "targets", "keys", "values")]
            output = fast_weight_memory(*leaves, mask=inputs["mask"], **OPTIONS, **backend)
            loss = output.output.square().sum() + output.keys.square().sum() + output.values.square().sum()
            results += [*output, *torch.autograd.grad(loss, leaves)]
            leaves = [x.clone().requires_grad_() for x in (queries, keys, update.values, update.targets)]
            q, k, v, y = leaves
            k = product_key_update(k, q, top_k=3, **backend)
            scores, slots = product_key_lookup(q, k, 3, **backend)
            weights, slots = scores.flatten(1).softmax(-1), slots.flatten(1)
            out = sparse_value_gather(v, slots, weights, **backend)
            new = chunk_value_update(v, slots, weights, y, out, **backend)
            results += [scores, out, new, *torch.autograd.grad(new.square().sum() + out.sum(), leaves)]
        return [x.detach() for x in results]

    return job


def on_threads(jobs: list[Job]) -> list[list[Tensor]]:
    """The results of jobs that start together, each on a thread of its own."""
    barrier = threading.Barrier(len(jobs))

    def start(job: Job) -> list[Tensor]:
        barrier.wait()
        return job()

    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(start, jobs))


def assert_same_results(actual: list[list[Tensor]], expected: list[list[Tensor]]) -> None:
    for one, other in zip(actual, expected, strict=True):
        for x, y in zip(one, other, strict=True):
            testing.assert_bitwise_equal(x, y)


@THREADED
@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize("make_job", [step_job, training_job])
def test_threads_do_not_disturb_each_other(make_job, count, place):
    jobs = [make_job(seed, place) for seed in range(count)]
    assert_same_results(on_threads(jobs), [job() for job in jobs])


@THREADED
def test_steps_beside_training(place):
    """One thread streams, without autograd and in inference mode too, while others train."""
    stream_job, inference_job = step_job(0, place), step_job(1, place)
    jobs = [stream_job, torch.inference_mode()(inference_job), training_job(2, place), training_job(3, place)]
    assert_same_results(on_threads(jobs), [job() for job in jobs])


@THREADED
def test_states_that_share_their_initial_memory(place):
    inputs = make_inputs(2, 12, dtype=torch.float32, device=place.device)

    def job() -> list[Tensor]:
        state = make_state(inputs)
        outputs = []
        for _ in range(10):
            outputs.append(stream(state, inputs, [3, 4, 5], **OPTIONS, backend=place.backend))
            state.reset()
        return [*outputs, state.keys, state.values]

    before = inputs["values"].clone()
    assert_same_results(on_threads([job] * 4), [job()] * 4)
    testing.assert_bitwise_equal(inputs["values"], before)


def on_streams(jobs: list[Job]) -> list[list[Tensor]]:
    """The results of jobs on a stream each, launched one after the other and running beside each other."""
    streams = [torch.cuda.Stream() for _ in jobs]
    results = []
    for one, job in zip(streams, jobs, strict=True):
        one.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(one):
            results.append(job())
    for one in streams:
        torch.cuda.current_stream().wait_stream(one)
    torch.cuda.synchronize()
    return results


@pytest.mark.gpu
@pytest.mark.parametrize("make_job", [step_job, training_job])
def test_streams_do_not_disturb_each_other(make_job):
    """Twice, so that the second time finds memory that the first has freed on other streams."""
    jobs = [make_job(seed, Place("triton", "cuda")) for seed in range(2)]
    expected = [job() for job in jobs]
    torch.cuda.synchronize()
    for _ in range(2):
        assert_same_results(on_streams(jobs), expected)


@pytest.mark.gpu
def test_threads_with_streams_of_their_own():
    def on_a_stream(job: Job) -> Job:
        return lambda: on_streams([job])[0]

    jobs = [make(seed, Place("triton", "cuda")) for seed, make in enumerate((step_job, training_job) * 2)]
    expected = [job() for job in jobs]
    torch.cuda.synchronize()
    assert_same_results(on_threads([on_a_stream(job) for job in jobs]), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("graphed", [False, True], ids=["eager", "graph"])
def test_a_state_that_moves_between_streams(graphed):
    """Each step on another stream, which waits for the one before: nothing that a step frees is used too early."""
    inputs = make_inputs(2, 64, dtype=torch.float32, device="cuda")
    tokens = [{name: inputs[name][:, t : t + 4] for name in ("queries", "targets")} for t in range(0, 64, 4)]
    expected = make_state(inputs)
    wanted = [fast_weight_memory_step(expected, **one, **OPTIONS) for one in tokens]
    state = make_state(inputs)
    step: Callable[..., Tensor] = lambda **one: fast_weight_memory_step(state, **one, **OPTIONS)  # noqa: E731
    if graphed:
        step = MemoryGraph(state, **tokens[0], **OPTIONS)
    streams, outputs = [torch.cuda.Stream() for _ in range(3)], []
    for i, one in enumerate(tokens):
        with torch.cuda.stream(streams[i % 3]):
            streams[i % 3].wait_stream(streams[(i - 1) % 3] if i else torch.cuda.default_stream())
            outputs.append(step(**one))
            # Memory that is freed here may be taken at once by what runs on this stream.
            torch.full((1 << 16,), torch.nan, device="cuda")
        if i % 5 == 0:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    assert_same_results([[*outputs, state.keys, state.values]], [[*wanted, expected.keys, expected.values]])


@pytest.mark.gpu
def test_graphs_replayed_on_two_streams():
    """Two graphs of two states: each has its static tensors, lanes and outputs for itself."""
    jobs: list[Job] = []
    expected = []
    for seed in range(2):
        inputs = make_inputs(2, 48, seed=seed, dtype=torch.float32, device="cuda")
        tokens = {name: inputs[name] for name in ("queries", "targets")}
        state, plain = make_state(inputs), make_state(inputs)
        graph = MemoryGraph(state, **{name: x[:, :2] for name, x in tokens.items()}, **OPTIONS)
        outputs = [
            fast_weight_memory_step(plain, **{name: x[:, t : t + 2] for name, x in tokens.items()}, **OPTIONS)
            for t in range(0, 48, 2)
        ]
        expected.append([torch.cat(outputs, 1), plain.keys, plain.values])
        jobs.append(lambda graph=graph, tokens=tokens, state=state: [graph(**tokens), state.keys, state.values])
    torch.cuda.synchronize()
    assert_same_results(on_streams(jobs), expected)


@pytest.mark.gpu
def test_graphs_are_captured_beside_other_threads():
    """Whose allocations break no capture, and whose results are what they are alone."""
    inputs = make_inputs(2, 48, dtype=torch.float32, device="cuda")
    tokens = {name: inputs[name] for name in ("queries", "targets")}
    some = {name: x[:, :2] for name, x in tokens.items()}
    MemoryGraph(make_state(inputs), **some, **OPTIONS)  # which compiles the kernels
    expected = make_state(inputs)
    wanted = [
        fast_weight_memory_step(expected, **{name: x[:, t : t + 2] for name, x in tokens.items()}, **OPTIONS)
        for t in range(0, 48, 2)
    ]

    def capture_and_replay() -> list[Tensor]:
        with torch.cuda.stream(torch.cuda.Stream()):
            state = make_state(inputs)
            results = [MemoryGraph(state, **some, **OPTIONS)(**tokens), state.keys, state.values]
            torch.cuda.current_stream().synchronize()
        return results

    training = training_job(0, Place("triton", "cuda"))
    alone = training()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # so that training asks the device for memory; not while a graph is being captured
    results = on_threads([capture_and_replay, training])
    torch.cuda.synchronize()
    assert_same_results(results, [[torch.cat(wanted, 1), expected.keys, expected.values], alone])


IMMUTABLE = (
    torch.Tag,
    *(type(None), bool, int, float, complex, str, bytes, frozenset, range, type(...)),
    *(torch.dtype, torch.device, torch.layout),
    *(types.ModuleType, types.BuiltinFunctionType, types.UnionType, types.GenericAlias, typing.TypeVar, re.Pattern),
    torch._library.custom_ops.CustomOpDef,  # registered once, when the module is imported
)


def mutable_parts(x: Any) -> Iterator[str]:
    """What can change in an object that a module holds; nothing, it is to be hoped."""
    if isinstance(x, tuple):  # named ones too
        for part in x:
            yield from mutable_parts(part)
    elif isinstance(x, types.MappingProxyType):
        for part in x.values():
            yield from mutable_parts(part)
    elif isinstance(x, types.FunctionType):
        parts = [*(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values()]
        if "fwpkm_kernels" in x.__code__.co_filename:  # a decorator of PyTorch knows what it does
            parts += [cell.cell_contents for cell in x.__closure__ or ()]
        for part in parts:
            if not isinstance(part, (types.FunctionType, type)):  # those stand in modules themselves
                yield from mutable_parts(part)
    elif isinstance(x, type):
        if x.__module__.startswith("fwpkm_kernels"):
            for name, part in vars(x).items():
                if not name.startswith("__") and not is_machinery(x, name, part):
                    yield from (f"{x.__name__}.{name}: {what}" for what in mutable_parts(part))
    elif not (isinstance(x, IMMUTABLE) or type(x).__module__.startswith(("triton.", "typing", "__future__"))):
        yield f"{type(x).__name__} {x!r:.60}"


def is_machinery(owner: type, name: str, part: Any) -> bool:
    """Whether Python put it into the class: descriptors, and the tables of named tuples and protocols."""
    descriptors = (property, classmethod, staticmethod, types.MemberDescriptorType, types.GetSetDescriptorType)
    return isinstance(part, descriptors) or inspect.isdatadescriptor(part) or name.startswith(("_field", "_abc"))


def test_nothing_global_is_mutable():
    modules = [fwpkm_kernels]
    for found in pkgutil.walk_packages(fwpkm_kernels.__path__, "fwpkm_kernels."):
        if not found.name.startswith("fwpkm_kernels.integrations."):  # whose classes have lists as transformers' have
            modules.append(importlib.import_module(found.name))
    assert len(modules) > 20
    found = [
        f"{module.__name__}.{name}: {what}"
        for module in modules
        for name, x in vars(module).items()
        if not name.startswith("__")  # __all__, __path__: of the import system; __compiled_fn_0: of torch.compile
        and vars(interpreter).get(name) is not x  # some versions leave their own names in a kernel's module
        for what in mutable_parts(x)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "x", [[], {}, set(), torch.zeros(()), ([],), types.MappingProxyType({"a": []}), lambda x=[]: x, threading.Lock()]
)  # fmt: skip
def test_what_is_mutable_is_found(x):
    assert list(mutable_parts(x))


def test_no_function_rebinds_what_a_module_holds():
    for found in pkgutil.walk_packages(fwpkm_kernels.__path__, "fwpkm_kernels."):
        tree = ast.parse(inspect.getsource(importlib.import_module(found.name)))
        assert not any(isinstance(node, ast.Global) for node in ast.walk(tree)), found.name
