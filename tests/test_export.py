"""torch.export, make_fx, FakeTensorMode, AOTInductor: what is traced with some tokens serves other numbers of them."""

import copy
import functools
import io
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx

from fwpkm_kernels import (
    MemoryState,
    _checks,
    chunk_value_update,
    chunk_value_update_,
    fast_weight_memory,
    fast_weight_memory_step,
    product_key_lookup,
    product_key_update,
    sparse_value_gather,
)

SMALL = {"chunk_size": 4, "top_k": 3}
#: Batch and tokens of what is traced, and of what it runs with then: also less than a chunk, and one token.
TRACED, RUN = (3, 7), [(3, 7), (2, 13), (5, 2), (1, 1)]
#: Numbers of tokens as torch.export takes them. A size that it may choose to fix is traced with less than a chunk.
DIMS: dict[str, tuple[Callable[[str], Any], tuple[int, int]]] = {
    "a range": (lambda name: Dim(name, min=1, max=64), TRACED),
    "no maximum": (Dim, TRACED),
    "tokens alone": (lambda name: Dim(name) if name == "tokens" else None, TRACED),
    "DYNAMIC": (lambda name: Dim.DYNAMIC, TRACED),
    "AUTO": (lambda name: Dim.AUTO, (5, 2)),
}


def rows(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


def update(write: Callable[..., Any], values, slots, weights, targets, gates, mask):
    """Everything that is a tensor, as one."""
    options = {"gates": rows(gates), "mask": rows(mask), "scale": 2.0 * rows(gates), "count_slots": slots, "lr": 0.5}
    return write(values, rows(slots), rows(weights), rows(targets), rows(targets) + 1.0, clip=0.5, **options)


def plain_update(values, slots, weights, targets):
    return chunk_value_update(values, rows(slots), rows(weights), rows(targets), rows(targets) + 1.0, weight_decay=0.1)


def memory(queries, targets, keys, values, gates=None, mask=None, **options):
    return tuple(fast_weight_memory(queries, targets, keys, values, gates=gates, mask=mask, **SMALL, **options))


def memory_rows(*tensors, **given):
    output, new_keys, left, *found = memory(*tensors, **given, final="rows")
    return output, new_keys, *left[:3], *found


class Case(NamedTuple):
    function: Callable[..., Any]
    tokens: str  #: names of arguments [B, T, ...]
    tables: str  #: names of the others


WHOLE = "queries targets gates mask"
CASES = {
    "lookup": Case(lambda queries, keys: product_key_lookup(queries, keys, 3), "queries", "keys"),
    "gather": Case(sparse_value_gather, "slots weights", "values"),
    "update": Case(functools.partial(update, chunk_value_update), "slots weights targets gates mask", "values"),
    "plain update": Case(plain_update, "slots weights targets", "values"),
    "key step": Case(lambda queries, keys: product_key_update(keys, rows(queries), top_k=3), "queries", "keys"),
    "memory": Case(memory, WHOLE, "keys values"),
    "no gates": Case(functools.partial(memory, step="normalized"), "queries targets", "keys values"),
    "rows": Case(memory_rows, WHOLE, "keys values"),
    "drop": Case(functools.partial(memory, boundary="drop", weight_decay=0.1), WHOLE, "keys values"),
    "coupled keys": Case(functools.partial(memory, key_gradient="all"), WHOLE, "keys values"),
}
EACH = pytest.mark.parametrize("name", CASES)


def make_tokens(names: str, size: tuple[int, int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(sum(size))
    real = functools.partial(torch.rand, generator=generator)
    tokens = {"queries": real(*size, 2, 8), "targets": real(*size, 6), "gates": real(size), "mask": real(size)}
    tokens["slots"] = torch.randint(64, (*size, 6), generator=generator)
    tokens["weights"] = real(*size, 6)
    return {name: tokens[name] for name in names.split()}


def make_tables(names: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tables = {
        name: torch.randn(size, generator=generator) for name, size in (("keys", (2, 2, 8, 4)), ("values", (64, 6)))
    }
    return {name: tables[name] for name in names.split()}


class Layer(torch.nn.Module):
    """A function of tokens, and of tables that are parameters."""

    def __init__(self, case: Case):
        super().__init__()
        self.case = case
        for name, x in make_tables(case.tables).items():
            setattr(self, name, torch.nn.Parameter(x))

    def forward(self, tokens: dict[str, Tensor]) -> Any:
        return self.case.function(**tokens, **{name: getattr(self, name) for name in self.case.tables.split()})


def exported(
    module: torch.nn.Module, names: str, how: str = "no maximum", strict: bool = False, tables: tuple[Tensor, ...] = ()
) -> torch.export.ExportedProgram:
    make_dim, size = DIMS[how]
    shapes = {name: {0: make_dim("batch"), 1: make_dim("tokens")} for name in names.split()}
    arguments = (make_tokens(names, size), *tables)
    return export(module, arguments, dynamic_shapes=(shapes, *[None] * len(tables)), strict=strict)


def loaded(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


@pytest.mark.parametrize("how", DIMS)
@EACH
def test_exported(name, how):
    case = CASES[name]
    layer = Layer(case)
    programs = [exported(layer, case.tokens, how)]
    if how == "no maximum":
        programs += [loaded(programs[0]), programs[0].run_decompositions()]
    if how in ("no maximum", "tokens alone"):
        programs.append(exported(layer, case.tokens, how, strict=True))
    for batch, length in RUN:
        tokens = make_tokens(case.tokens, (TRACED[0] if how == "tokens alone" else batch, length))
        for program in programs:
            torch.testing.assert_close(program.module()(tokens), layer(tokens))


def test_an_exported_memory_keeps_nothing_for_gradients():
    graph = exported(Layer(CASES["memory"]), WHOLE).graph
    (node,) = [node for node in graph.nodes if "fast_weight_memory" in str(node.target)]
    assert node.args[6] is False
    assert len(node.meta["val"]) == 5


@EACH
def test_operators_ask_for_limits_again(name, monkeypatch):
    """What was traced for any number of tokens; a number that is known is refused while tracing."""
    case = CASES[name]
    layer = Layer(case)
    program = exported(layer, case.tokens)
    for limit in ("MOST_TOKENS", "MOST_ACCESSES"):
        monkeypatch.setattr(_checks, limit, 7)
    tokens = make_tokens(case.tokens, (2, 4))
    for run in (program.module(), layer, lambda tokens: export(layer, (tokens,), strict=False)):
        with pytest.raises(ValueError, match="must (hold|make) at most 7 "):
            run(tokens)
        assert torch.is_grad_enabled()


def with_gradients(case: Case) -> Callable[..., tuple[Tensor, ...]]:
    def run(**inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
        results = case.function(**leaves)
        results = results if isinstance(results, tuple) else (results,)
        loss = sum(x.square().sum() for x in results if x.requires_grad)
        wrt = [x for x in leaves.values() if x.requires_grad]
        gradients = torch.autograd.grad(loss, wrt, allow_unused=True)  # a mask has none
        return (*(x.detach() for x in results), *(x for x in gradients if x is not None))

    return run


@pytest.mark.parametrize("mode", ["symbolic", "fake", "real"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@EACH
def test_make_fx(name, backward, mode):
    case = CASES[name]
    function = with_gradients(case) if backward else case.function

    def run(inputs: dict[str, Tensor]) -> Any:
        return function(**inputs)

    traced = make_fx(run, tracing_mode=mode)(make_tokens(case.tokens, TRACED) | make_tables(case.tables))
    # The gradient of coupled keys is a loop over chunks, which is traced for their number.
    is_loop = backward and name == "coupled keys"
    for size in [TRACED] if is_loop or mode != "symbolic" else RUN[:3]:
        inputs = make_tokens(case.tokens, size) | make_tables(case.tables)
        torch.testing.assert_close(traced(inputs), run(inputs))


def shapes_of(results: Any) -> list[torch.Size]:
    return [x.shape for x in (results if isinstance(results, tuple) else (results,))]


@EACH
def test_fake_tensors(name):
    case = CASES[name]
    # PyTorch runs backward passes outside of the mode; that of coupled keys makes tensors of its own.
    functions = [case.function, with_gradients(case)][: 1 if name == "coupled keys" else 2]
    for size, function in itertools.product(RUN, functions):
        inputs = make_tokens(case.tokens, size) | make_tables(case.tables)
        with FakeTensorMode() as mode:
            results = function(**{name: mode.from_tensor(x) for name, x in inputs.items()})
        assert shapes_of(results) == shapes_of(function(**inputs))


class WriteInPlace(torch.nn.Module):
    """Into a table that is a buffer, or an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("values", make_tables("values")["values"])

    def forward(self, tokens: dict[str, Tensor], values: Tensor | None = None) -> Tensor:
        values = self.values if values is None else values
        update(chunk_value_update_, values, **tokens)
        return values.sum(0)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_writes_in_place(strict):
    names = CASES["update"].tokens
    program = exported(WriteInPlace(), names, strict=strict)
    # A program and what is made of it share the buffer.
    programs = [program, loaded(program), loaded(program).run_decompositions()]
    (table,) = make_tables("values").values()
    programs.append(exported(WriteInPlace(), names, strict=strict, tables=(table,)))
    arguments = [()] * 3 + [(table,)]
    layer, modules = WriteInPlace(), [program.module() for program in programs]
    for size in RUN:
        tokens = make_tokens(names, size)
        expected = layer(tokens)
        for module, tables in zip(modules, arguments, strict=True):
            torch.testing.assert_close(module(tokens, *tables), expected)
    torch.testing.assert_close(table, layer.values)


@pytest.mark.parametrize("mode", ["symbolic", "fake", "real"])
def test_writes_in_place_by_make_fx(mode):
    names = CASES["update"].tokens

    def run(values, tokens):
        update(chunk_value_update_, values, **tokens)
        return values.sum(0)

    table, other = (make_tables("values")["values"] for _ in range(2))
    traced = make_fx(run, tracing_mode=mode)(other.clone(), make_tokens(names, TRACED))
    for size in RUN[:3] if mode == "symbolic" else [TRACED] * 2:
        tokens = make_tokens(names, size)
        torch.testing.assert_close(traced(table, tokens), run(other, tokens))
    torch.testing.assert_close(table, other)


class Stream(torch.nn.Module):
    """A state that is kept between calls; as buffers of the module, too, if they are asked for."""

    def __init__(self, bound: bool = True, buffers: bool = False) -> None:
        super().__init__()
        self.state = MemoryState(*make_tables("keys values").values())
        if bound:
            self(make_tokens(WHOLE, (TRACED[0], 0)))
        if buffers:
            for name, x in self.state.named_tensors().items():
                self.register_buffer(name, x)

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        return fast_weight_memory_step(self.state, **tokens, **SMALL)


def own_state(tokens: dict[str, Tensor], keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
    """A state that is made, bound and stepped in what is traced."""
    state = MemoryState(keys, values)
    outputs = [fast_weight_memory_step(state, **tokens, **SMALL) for _ in range(2)]
    return (*outputs, state.keys, state.values)


class OwnState(torch.nn.Module):
    def forward(self, tokens: dict[str, Tensor], keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        return own_state(tokens, keys, values)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_stream_goes_on_from_call_to_call(strict):
    layer, expected = Stream(), Stream()
    program = exported(layer, WHOLE, "tokens alone", strict)
    modules = [program.module(), loaded(program).module()]
    if strict:
        modules.append(exported(Stream(buffers=True), WHOLE, "tokens alone", strict).run_decompositions().module())
    for length in (7, 2, 13, 1):
        tokens = make_tokens(WHOLE, (TRACED[0], length))
        wanted = expected(tokens)
        for module in modules:
            torch.testing.assert_close(module(tokens), wanted)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_state_of_its_own(strict):
    tables = tuple(make_tables("keys values").values())
    program = exported(OwnState(), WHOLE, "a range", strict, tables)
    for size in RUN:
        tokens = make_tokens(WHOLE, size)
        for one in (program, program.run_decompositions()):
            torch.testing.assert_close(one.module()(tokens, *tables), own_state(tokens, *tables))


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_of_a_stream_that_is_not_bound_is_refused(strict):
    """It would be bound anew at every call."""
    layer = Stream(bound=False)
    message = "fast_weight_memory_step cannot be traced with a state that is not bound.*no tokens"
    with pytest.raises(RuntimeError, match=message):  # Dynamo's error holds it too
        exported(layer, WHOLE, "tokens alone", strict)
    for mode in ("symbolic", "fake", "real"):
        with pytest.raises(RuntimeError, match=message):
            make_fx(layer, tracing_mode=mode)(make_tokens(WHOLE, TRACED))
    assert layer.state.named_tensors().keys() == {"keys", "values", "position", "touched"}
    torch.testing.assert_close(layer(make_tokens(WHOLE, TRACED)), Stream()(make_tokens(WHOLE, TRACED)))


def test_steps_by_make_fx():
    tokens, tables = make_tokens(WHOLE, TRACED), tuple(make_tables("keys values").values())
    for mode in ("symbolic", "fake", "real"):
        traced = make_fx(own_state, tracing_mode=mode)(tokens, *tables)
        for size in RUN[:3] if mode == "symbolic" else RUN[:1]:
            torch.testing.assert_close(
                traced(make_tokens(WHOLE, size), *tables), own_state(make_tokens(WHOLE, size), *tables)
            )
    for mode in ("symbolic", "fake"):
        with pytest.raises(RuntimeError, match="fast_weight_memory_step cannot read fake tensors into a state of real"):
            make_fx(Stream(), tracing_mode=mode)(tokens)


def test_an_export_does_not_reset_a_state_itself():
    class Reset(Stream):
        def forward(self, tokens: dict[str, Tensor]) -> Tensor:
            self.state.reset()
            return super().forward(tokens)

    layer = Reset()
    fast_weight_memory_step(layer.state, **make_tokens(WHOLE, TRACED), **SMALL)
    before = layer.state.state_dict()
    with pytest.raises(RuntimeError, match="reset would be done by torch.export itself; use strict=True"):
        exported(layer, WHOLE, "tokens alone")
    program = exported(layer, WHOLE, "tokens alone", strict=True)
    for name, x in layer.state.state_dict().items():
        torch.testing.assert_close(x, before[name])
    tokens = make_tokens(WHOLE, TRACED)
    for _ in range(2):
        torch.testing.assert_close(program.module()(tokens), Stream()(tokens))


def test_a_copy_of_a_module_has_the_copy_of_its_state_as_buffers():
    layer = copy.deepcopy(Stream(buffers=True))
    layer(make_tokens(WHOLE, TRACED))
    for name, x in layer.state.named_tensors().items():
        assert getattr(layer, name) is x
    assert int(layer.position) == TRACED[1]


def test_an_exported_stream_that_fails_leaves_gradients_on(monkeypatch):
    module = exported(Stream(), WHOLE, "tokens alone").module()
    monkeypatch.setattr(_checks, "MOST_ACCESSES", 7)
    with pytest.raises(ValueError, match="at most 7"):
        module(make_tokens(WHOLE, TRACED))
    assert torch.is_grad_enabled()


class Everything(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer(case) for case in CASES.values())
        self.write = WriteInPlace()

    def forward(self, tokens: dict[str, Tensor]) -> list[Any]:
        results = [layer({name: tokens[name] for name in layer.case.tokens.split()}) for layer in self.layers]
        return [*results, self.write({name: tokens[name] for name in CASES["update"].tokens.split()})]


@pytest.mark.slow
def test_packages_of_ahead_of_time_compilation(tmp_path):
    layer, names = Everything(), "queries targets gates mask slots weights"
    program = exported(layer, names, "a range")
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "everything.pt2"))
    package = torch._inductor.aoti_load_package(path)
    for size in RUN:
        tokens = make_tokens(names, size)
        torch.testing.assert_close(package(tokens), layer(tokens))


@pytest.mark.slow
def test_a_stream_of_ahead_of_time_compilation(tmp_path):
    """Whose tensors the program keeps as buffers of its own."""
    program = exported(Stream(buffers=True), WHOLE, "tokens alone", strict=True)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "stream.pt2"))
    package, expected = torch._inductor.aoti_load_package(path), Stream()
    for length in (7, 2, 13, 1):
        tokens = make_tokens(WHOLE, (TRACED[0], length))
        torch.testing.assert_close(package(tokens), expected(tokens))


@pytest.mark.slow
def test_two_writes_compiled_by_inductor():
    """Which fuses what belongs to several of them."""
    cases = [CASES[name] for name in ("update", "plain update", "plain update")]
    inputs = make_tokens("slots weights targets gates mask", TRACED) | make_tables("values")

    def write(**inputs: Tensor) -> list[Tensor]:
        return [case.function(**{name: inputs[name] for name in f"{case.tokens} values".split()}) for case in cases]

    torch.testing.assert_close(torch.compile(write, fullgraph=True)(**inputs), write(**inputs))
