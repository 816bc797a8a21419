"""What a process has set for all of its code changes no result: devices, dtypes, modes, locale, current folder.

Every public function, eager and compiled, and states that are made, stepped, saved and reset inside of a setting and
outside of it, fresh and bound.
"""

import contextlib
import io
import locale
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fwpkm_kernels as fk
from fwpkm_kernels import MemoryState, testing
from tests.conftest import HAS_GPU
from tests.helpers.graphs import graph_maker, replayed
from tests.helpers.memory import make_inputs
from tests.helpers.streaming import DEVICE, OPTIONS, contents, copies, make_state, saved_and_loaded, stream
from tests.helpers.varlen import make_packed


@contextlib.contextmanager
def default_device(name: str) -> Iterator[None]:
    before = torch.get_default_device()
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None if before.type == "cpu" else before)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def other_locale() -> Iterator[None]:
    """One that writes 0,5 where it is installed, else the one that knows ASCII alone."""
    before = locale.setlocale(locale.LC_ALL)
    for name in ("de_DE.UTF-8", "fr_FR.UTF-8", "C"):
        with contextlib.suppress(locale.Error):
            locale.setlocale(locale.LC_ALL, name)
            break
    try:
        yield
    finally:
        locale.setlocale(locale.LC_ALL, before)


@contextlib.contextmanager
def no_folder() -> Iterator[None]:
    """A current folder that has been removed."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def strict_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


Ambient = Callable[[], contextlib.AbstractContextManager[Any]]
#: Settings that compiled code could heed too.
TORCH_SETTINGS: dict[str, Ambient] = {
    "default device": lambda: default_device("meta"),
    "device context": lambda: torch.device("meta"),
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "inference mode": lambda: torch.inference_mode(),
    "no grad": lambda: torch.no_grad(),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}
AMBIENTS: dict[str, Ambient] = {
    **TORCH_SETTINGS,
    "float16 by default": lambda: default_dtype(torch.float16),
    "no inference mode": lambda: torch.inference_mode(False),
    "float16 autocast": lambda: torch.autocast("cpu", torch.float16),
    "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True),
    "deterministic algorithms": deterministic,
    "locale": other_locale,
    "no current folder": no_folder,
    "warnings as errors": strict_warnings,
}


def run(function: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
    """Results and, where the mode allows it, gradients of what requires them."""
    results = function(*tensors)
    results = [results] if isinstance(results, Tensor) else list(results)
    found = [x.detach() for x in results]
    if any(x.requires_grad for x in results):
        loss = sum(x.double().square().sum() for x in results if x.requires_grad)
        found += torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)
    return found


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


#: For the function, or for what torch.compile makes of it.
Call = Callable[[Callable[..., Any]], list[Tensor]]


def lookup(backend: str) -> Call:
    tensors = leaves(*testing.make_lookup_inputs(4, 2, 9, 8))
    return lambda f: run(lambda q, k: f(q, k, 3, backend=backend), tensors)


def gather(backend: str) -> Call:
    values, slots, weights = testing.make_gather_inputs()
    tensors = leaves(values, weights)
    return lambda f: run(lambda v, w: f(v, slots, w, backend=backend), tensors)


def write(backend: str) -> Call:
    x = testing.make_update_inputs(gates=True)
    tensors = leaves(x.values, x.weights, x.targets, x.predictions, x.gates)
    options = {"count_slots": x.slots.clone(), "clip": 0.5, "weight_decay": 0.1, "backend": backend}
    return lambda f: run(lambda v, w, y, p, g: f(v, x.slots, w, y, p, gates=g, **options), tensors)


def write_in_place(backend: str) -> Call:
    x = testing.make_update_inputs()
    count_slots = x.slots.clone()  # Dynamo takes no tensor twice

    def call(f: Callable[..., Any]) -> list[Tensor]:
        values = x.values.clone()
        f(values, x.slots, x.weights, x.targets, x.predictions, count_slots=count_slots, lr=0.5, backend=backend)
        return [values]

    return call


def apply_rows(backend: str) -> Call:
    x, slot = testing.make_update_inputs(), torch.tensor([3, -1, 0], device="cpu")
    rows = fk.Rows(torch.zeros_like(slot), slot, x.targets[:3])

    def call(f: Callable[..., Any]) -> list[Tensor]:
        values = x.values.clone()
        f(values, rows, backend=backend)
        return [values]

    return call


def key_step(backend: str) -> Call:
    queries, keys = testing.make_lookup_inputs(4, 2, 9, 8)
    tensors = leaves(keys, queries)
    return lambda f: run(lambda k, q: f(k, q, top_k=3, backend=backend), tensors)


def memory(backend: str) -> Call:
    inputs = make_inputs(2, 6, mask="bool", dtype=torch.float32)
    tensors = leaves(*(inputs[name] for name in ("queries", "targets", "keys", "values", "gates")))
    options = {"chunk_size": 4, "top_k": 2, "mask": inputs["mask"], "backend": backend}

    def read(f: Callable[..., Any], q: Tensor, y: Tensor, k: Tensor, v: Tensor, g: Tensor) -> list[Tensor]:
        rows = f(q, y, k, v, gates=g, final="rows", **options)
        return [*f(q, y, k, v, gates=g, weight_decay=0.1, **options), *rows[:2], *rows.values[:3], *rows[3:]]

    return lambda f: run(lambda *x: read(f, *x), tensors)


def varlen(backend: str) -> Call:
    inputs = make_packed((5, 0, 2), heads=1, num_keys=4, dtype=torch.float32)
    tensors = leaves(*(inputs[name] for name in ("queries", "targets", "keys", "values", "gates")))
    options = {"chunk_size": 4, "top_k": 2, "weight_decay": 0.1, "mask": inputs["mask"], "backend": backend}

    def call(f: Callable[..., Any]) -> list[Tensor]:
        def flat(q: Tensor, y: Tensor, k: Tensor, v: Tensor, g: Tensor) -> list[Tensor]:
            result = f(q, y, k, v, inputs["cu_seqlens"], gates=g, **options)
            return [result.output, result.keys, *result.rows, result.slots, result.weights]

        return run(flat, tensors)

    return call


def steps(backend: str) -> Call:
    """Of a fresh state, which the first one binds, and of a bound one."""
    inputs = make_inputs(2, 6, dtype=torch.float32)
    queries, targets = inputs["queries"], inputs["targets"]

    def call(f: Callable[..., Any]) -> list[Tensor]:
        state = make_state(inputs)
        outputs = [f(state, queries, targets, **OPTIONS, backend=backend) for _ in range(2)]
        return [*outputs, *contents(state).values()]

    return call


#: Every public function: given a backend, makes its inputs.
CALLS: dict[Callable[..., Any], Callable[[str], Call]] = {
    fk.apply_rows_: apply_rows,
    fk.product_key_lookup: lookup,
    fk.sparse_value_gather: gather,
    fk.chunk_value_update: write,
    fk.chunk_value_update_: write_in_place,
    fk.product_key_update: key_step,
    fk.fast_weight_memory: memory,
    fk.fast_weight_memory_step: steps,
    fk.fast_weight_memory_varlen: varlen,
}


def test_every_public_function_is_here():
    assert {function.__name__ for function in CALLS} == {name for name in fk.__all__ if name.islower()}


def assert_same(actual: list[Tensor], expected: list[Tensor], with_gradients: bool) -> None:
    """The same bits on the same device: of the results, and of the gradients where some were taken."""
    assert actual
    assert len(actual) == len(expected) or not with_gradients
    for x, wanted in zip(actual, expected, strict=False):
        assert x.device == wanted.device
        testing.assert_bitwise_equal(x, wanted)


@contextlib.contextmanager
def all_at_once() -> Iterator[None]:
    with default_device("meta"), default_dtype(torch.bfloat16), torch.autocast("cpu", torch.bfloat16):
        yield


EAGER = [
    pytest.param(function, setting, "torch", id=f"{function.__name__}-{name}")
    for function in CALLS
    for name, setting in AMBIENTS.items()
]
#: The kernels with what could matter to them, together, since the interpreter takes its time.
EAGER += [
    pytest.param(function, all_at_once, "triton", id=f"{function.__name__}-triton", marks=pytest.mark.slow)
    for function in CALLS
    if not HAS_GPU
]


@pytest.mark.parametrize("function, setting, backend", EAGER)
def test_a_setting_changes_no_result(function, setting, backend):
    call = CALLS[function](backend)
    expected = call(function)
    with setting():
        with_gradients = torch.is_grad_enabled()
        actual = call(function)
    assert_same(actual, expected, with_gradients)


@pytest.mark.slow
@pytest.mark.parametrize("ambient", TORCH_SETTINGS)
@pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)
def test_a_setting_changes_no_result_of_compiled_code(function, ambient):
    """Compiled inside of the setting or, for an odd place in the list, outside, and called in both."""
    call, inside = CALLS[function]("torch"), list(TORCH_SETTINGS).index(ambient) % 2 == 0
    expected = call(function)
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for is_inside in (inside, not inside):
        with TORCH_SETTINGS[ambient]() if is_inside else contextlib.nullcontext():
            actual = call(compiled)
        assert_same(actual, expected, not is_inside or ambient not in ("inference mode", "no grad"))


#: Made before any setting: 3 and then 6 of them are read.
TOKENS = make_inputs(2, 9, dtype=torch.float32)


def step(state: MemoryState) -> Tensor:
    return fk.fast_weight_memory_step(state, TOKENS["queries"][:, 3:], TOKENS["targets"][:, 3:], **OPTIONS)


def everything(state: MemoryState) -> list[Tensor]:
    """All that a state does but its steps: copies, saving and loading, tying, selecting, rolling back, resetting."""
    results = []
    for name, copied in copies().items():
        other = copied(state)
        if other.position:
            results.append(step(other.select([1, 0])))
            other.select_(torch.tensor([1, 1], device="cpu"))
        results += [step(other), *contents(other).values()]
        other.rollback(1)
        results += contents(other).values()
        other.reset(touched_rows_only=name == "clone")
        assert other.position == 0
    other = make_state(TOKENS)
    other.load_state_dict(saved_and_loaded(state.state_dict(), weights_only=True))
    other.values = other.values * 0.5
    other.rebind(TOKENS["keys"] * 1.0, TOKENS["values"] * 1.0)
    assert repr(other)
    results += [step(other), *other.to("cpu").state_dict().values(), *other.named_tensors().values()]
    other.reset()
    return [*results, *contents(other).values()]


@pytest.mark.parametrize("read", [0, 3], ids=["fresh", "bound"])
@pytest.mark.parametrize("ambient", AMBIENTS)
def test_a_setting_changes_nothing_of_a_state(ambient, read):
    """Made, stepped, copied, saved and reset inside of it and outside, in every order."""

    def made() -> MemoryState:
        state = make_state(TOKENS)
        stream(state, {name: TOKENS[name] for name in ("queries", "targets")}, [read], **OPTIONS)
        return state

    plain = made()
    expected = everything(plain)
    with AMBIENTS[ambient]():
        inside = made()
        assert inside._position.device.type == "cpu"
        assert_same(everything(plain), expected, True)
        assert_same(everything(inside), expected, True)
    assert_same(everything(inside), expected, True)
    plain.reset()
    inside.reset()
    assert_same([step(inside), *contents(inside).values()], [step(plain), *contents(plain).values()], True)


@pytest.mark.parametrize("ambient", TORCH_SETTINGS)
def test_a_setting_changes_nothing_of_a_graph(ambient, monkeypatch):
    """Captured inside of it, and replayed inside and outside."""
    inputs = make_inputs(2, 24, dtype=torch.float32, device=DEVICE)
    expected, state, make_graph = make_state(inputs), make_state(inputs), graph_maker(monkeypatch)
    wanted = stream(expected, inputs, [2] * 12, **OPTIONS)
    with TORCH_SETTINGS[ambient]():
        graph = make_graph(state, inputs, 2, **OPTIONS)
        outputs = [replayed(graph, state, inputs, 14)]
    outputs.append(replayed(graph, state, inputs, 10))
    assert_same([torch.cat(outputs, 1), *contents(state).values()], [wanted, *contents(expected).values()], True)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_state_that_a_compiled_step_binds_in_inference_mode(backend):
    """Outside of it too the state can be stepped, compiled and eagerly, reset, loaded into, and copied."""
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a compiler")
    torch._dynamo.reset()
    compiled = torch.compile(fk.fast_weight_memory_step, backend=backend, fullgraph=True)
    inputs = make_inputs(2, 6, dtype=torch.float32)
    queries, targets = inputs["queries"], inputs["targets"]
    state, expected = make_state(inputs), make_state(inputs)
    with torch.inference_mode():
        compiled(state, queries, targets, **OPTIONS)
    fk.fast_weight_memory_step(expected, queries, targets, **OPTIONS)
    assert not any(x.is_inference() for x in state.named_tensors().values())
    saved = state.state_dict()
    for function in (compiled, fk.fast_weight_memory_step, compiled):
        testing.assert_bitwise_equal(
            function(state, queries, targets, **OPTIONS),
            fk.fast_weight_memory_step(expected, queries, targets, **OPTIONS),
        )
    for name, x in contents(state).items():
        testing.assert_bitwise_equal(x, contents(expected)[name])
    state.load_state_dict(saved)
    state.reset()
    assert state.position == 0
    testing.assert_bitwise_equal(state.values, inputs["values"])


def make_and_step(queries: Tensor, targets: Tensor, keys: Tensor, values: Tensor) -> MemoryState:
    state = MemoryState(keys, values)
    for _ in range(2):
        fk.fast_weight_memory_step(state, queries, targets, **OPTIONS)
    return state.select([1, 0])


def test_what_compiled_code_leaves_in_inference_mode_can_be_used_outside():
    """Made, stepped twice and selected from in one function, which makes the tensors that it writes itself."""
    torch._dynamo.reset()
    names = ("queries", "targets", "keys", "values")
    inputs = make_inputs(2, 6, dtype=torch.float32)
    with torch.inference_mode():
        made = torch.compile(make_and_step, backend="aot_eager", fullgraph=True)(*(inputs[name] for name in names))
    expected = make_and_step(*(inputs[name] for name in names))
    for one in (made, expected):
        step(one)
    assert_same([*contents(made).values()], [*contents(expected).values()], True)
    made.reset()
    made.load_state_dict(expected.state_dict())
    assert_same([step(made.clone()), step(made)], [step(expected.clone()), step(expected)], True)


def test_a_position_stays_on_the_cpu_wherever_a_state_is_loaded():
    state = make_state(make_inputs(dtype=torch.float32))
    step(state)
    file = io.BytesIO()
    torch.save(state, file)
    for weights_only in (False, True):
        file.seek(0)
        other = torch.load(file, map_location="meta", weights_only=weights_only)
        assert other.values.is_meta
        assert other._position.device.type == "cpu"
        assert other.position == state.position == 6
