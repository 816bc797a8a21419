"""What every public function refuses: by which error, that it names the argument and what came, and changes nothing."""

import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fwpkm_kernels
from fwpkm_kernels import (
    ChunkValueUpdate,
    FastWeightMemory,
    MemoryGraph,
    MemoryPool,
    MemoryState,
    PoolGraph,
    ProductKeyLookup,
    ProductKeyUpdate,
    Rows,
    SparseValueGather,
    apply_rows_,
    chunk_value_update,
    chunk_value_update_,
    fast_weight_memory,
    fast_weight_memory_step,
    fast_weight_memory_varlen,
    product_key_lookup,
    product_key_update,
    sparse_value_gather,
    testing,
)
from fwpkm_kernels.options import Options
from tests.helpers.bad_input import (
    Arguments,
    Case,
    Cases,
    choice_cases,
    int_cases,
    mismatch,
    number_cases,
    option_cases,
    tensor_cases,
)
from tests.helpers.memory import assert_same_bits, make_inputs
from tests.helpers.streaming import OPTIONS, contents, make_state, stream, tokens_of
from tests.helpers.varlen import make_packed


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    """Of this process alone, for DTensors."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def lookup_cases() -> Cases:
    """Of queries [..., H, Dk] and keys [H, 2, n, Dk/2] = [1, 2, 9, 4], and the options of a lookup."""
    return {
        **tensor_cases("queries", ranks=False),
        **tensor_cases("keys"),
        "queries of no rank to speak of": Case(ValueError, ("queries",), {"queries": torch.ones(8)}, "shape"),
        "queries of odd width": Case(
            ValueError, ("queries",), {"queries": lambda a: a["queries"][..., :7]}, "shape", ("even",)
        ),
        "keys of three halves": Case(
            ValueError, ("keys",), {"keys": lambda a: a["keys"][:, [0, 1, 1]]}, "shape", ("two halves",)
        ),
        "queries against keys": mismatch("queries", "keys", lambda x: x[..., :6]),
        "heads of queries": mismatch("queries", "keys", lambda x: torch.cat((x, x), -2)),
        "heads of keys": mismatch("keys", "queries", lambda x: x.repeat(2, 1, 1, 1)),
        "width of keys": mismatch("keys", "queries", lambda x: x[..., :3]),
        **int_cases("top_k", 0, -1, 10),
        "top_k beyond n": Case(ValueError, ("top_k",), {"top_k": 10}, "value", ("9 sub-keys",)),
        **number_cases("eps", below=(0.0, -1e-3, 1e-50)),
        **choice_cases("score", "precision", "backend"),
    }


def gather_cases() -> Cases:
    return {
        **tensor_cases("values"),
        **tensor_cases("slots", "slots", ranks=False),
        **tensor_cases("weights", ranks=False),
        "scalar slots": Case(ValueError, ("slots",), {"slots": torch.tensor(0), "weights": torch.tensor(1.0)}),
        "weights against slots": mismatch("weights", "slots", lambda x: x[:, :3]),
        "rows of weights": mismatch("weights", "slots", lambda x: x[:7]),
        **slot_cases("slots"),
        **option_cases("sparse_grad", TypeError, "type", 1, None, "yes", np.bool_(True)),
        **choice_cases("backend"),
    }


def slot_cases(name: str) -> Cases:
    """Out of the range of a table of 64 rows."""

    def one(at: int) -> Callable[[Arguments], Tensor]:
        return lambda arguments: torch.where(torch.arange(4) == 3, at, arguments[name])

    return {
        f"{name} with {at}": Case(ValueError, (name,), {name: one(at)}, "", ("[0, 64)", str(at)))
        for at in (-1, 64, -(2**40), 2**40)
    }


def update_cases() -> Cases:
    """Of a table [64, 16], slots and weights [8, 4], targets and predictions [8, 16]."""
    fewer = {"predictions": lambda a: a["predictions"][:7]}
    narrow = {"predictions": lambda a: a["predictions"][:, :3]}
    return {
        **tensor_cases("values"),
        **tensor_cases("slots", "slots"),
        **tensor_cases("weights"),
        **tensor_cases("targets"),
        **tensor_cases("predictions"),
        **tensor_cases("gates", optional=True),
        **tensor_cases("mask", "mask", optional=True),
        **tensor_cases("count_slots", "slots", ranks=False, optional=True),
        "weights against slots": mismatch("weights", "slots", lambda x: x[:, :2]),
        "predictions against targets": mismatch("predictions", "targets", lambda x: x[:7]),
        "targets against slots": mismatch("targets", "slots", lambda x: x[:7], "rows", **fewer),
        "targets against values": mismatch("targets", "values", lambda x: x[:, :3], "width", **narrow),
        **{f"{name} against slots": mismatch(name, "slots", lambda x: x[:3]) for name in ("gates", "mask", "scale")},
        **slot_cases("slots"),
        **slot_cases("count_slots"),
        **number_cases("lr"),
        **{name: x for name, x in number_cases("scale", optional=True).items() if "tensor" not in name},
        **{name: x for name, x in tensor_cases("scale").items() if x.shows != "type"},
        **number_cases("weight_decay", below=(-0.1, -(10**30))),
        **number_cases("clip", below=(-1, -1e-30), optional=True),
        **choice_cases("backend"),
    }


def table_cases(instead: str = "chunk_value_update") -> Cases:
    """Tables that cannot be written in place; `instead` is what can be used."""

    def table(make: Callable[[Tensor], Any], *says: str) -> Case:
        return Case(ValueError, ("values",), {"values": lambda a: make(a["values"])}, "", says)

    return {
        "a table that requires grad": table(lambda x: x.clone().requires_grad_(), instead),
        "a part of what requires grad": table(lambda x: x.clone().requires_grad_()[:], instead),
        "a parameter": table(torch.nn.Parameter, instead),
        "an expanded row": table(lambda x: x[:1].clone().expand(64, 16), "[0, 1]", "[64, 16]"),
        "an expanded column": table(lambda x: x[:, :1].clone().expand(64, 16), "[1, 0]"),
        "one number": table(lambda x: x[0, 0].clone().expand(64, 16), "[0, 0]"),
        "rows that overlap": table(lambda x: x.clone().as_strided((64, 16), (15, 1)), "[15, 1]"),
        "columns and rows that meet": table(lambda x: torch.ones(999).as_strided((64, 16), (6, 9)), "[6, 9]"),
        # 16·64 numbers none of which shares an address: refused all the same, and said so truly.
        "rows among columns": table(
            lambda x: torch.ones(2095).as_strided((64, 16), (3, 127)),
            "row after row or column after column",
            "[3, 127]",
        ),
        "an inference tensor": table(torch.inference_mode()(Tensor.clone), "inference"),
        "a negated view": table(lambda x: torch.complex(x, x).conj().imag, "resolve_neg"),
    }


def rows_cases() -> Cases:
    """Of rows of a table [64, 16]: document and slot [5], value [5, 16]."""

    def rows(field: str, make: Callable[[Tensor], Any], error: type[Exception], name: str, *says: str) -> Case:
        def change(arguments: Arguments) -> Rows:
            given = arguments["rows"]
            return given._replace(**{field: make(getattr(given, field))})

        return Case(error, (name,), {"rows": change}, "", says)

    return {
        **tensor_cases("values"),
        "a tuple": Case(TypeError, ("rows",), {"rows": lambda a: tuple(a["rows"])}, "type"),
        "None": Case(TypeError, ("rows",), {"rows": None}, "type"),
        "no slots": rows("slot", lambda x: None, TypeError, "rows.slot", "NoneType"),
        "slots of int32": rows("slot", Tensor.int, TypeError, "rows.slot", "torch.int32"),
        "documents of bool": rows("document", Tensor.bool, TypeError, "rows.document", "torch.bool"),
        "values of bfloat16": rows("value", Tensor.bfloat16, TypeError, "rows.value", "torch.bfloat16", "float32"),
        "slots of rank 2": rows("slot", lambda x: x[None], ValueError, "rows.slot", "[1, 5]"),
        "a slot too many": rows("slot", lambda x: x.repeat(2), ValueError, "rows", "[10]"),
        "a document less": rows("document", lambda x: x[1:], ValueError, "rows", "[4]"),
        "narrow values": rows("value", lambda x: x[:, :3], ValueError, "rows", "[5, 3]"),
        "a slot behind the table": rows("slot", lambda x: x + 60, ValueError, "rows.slot", "[-1, 64)", "to 64"),
        "a slot before -1": rows("slot", lambda x: x - 1, ValueError, "rows.slot", "[-1, 64)", "from -2"),
        "on another device": rows("slot", lambda x: x.to("meta"), ValueError, "rows.slot", "meta", "cpu"),
        "a slot twice": rows("slot", lambda x: x.clamp(min=0), ValueError, "rows.slot", "0 more than once"),
        "another document": rows("document", lambda x: x + 1, ValueError, "rows", "documents [1]"),
        **choice_cases("backend"),
    }


def key_step_cases() -> Cases:
    return {
        **lookup_cases(),
        "queries of rank 2": Case(ValueError, ("queries",), {"queries": lambda a: a["queries"][0]}, "shape"),
        "queries of rank 4": Case(ValueError, ("queries",), {"queries": lambda a: a["queries"][None]}, "shape"),
        **number_cases("lr"),
        **number_cases("weight"),
        **number_cases("weight_decay", below=(-0.1,)),
        **number_cases("clip", below=(-1,), optional=True),
    }


def token_cases() -> Cases:
    """Of queries [2, 8, 1, 4] and what goes with them, 4 sub-keys of width 2, values [16, 3]; and of the options."""
    return {
        **tensor_cases("queries"),
        **tensor_cases("targets"),
        **tensor_cases("gates", optional=True),
        **tensor_cases("mask", "mask", optional=True),
        "queries of odd width": Case(
            ValueError, ("queries",), {"queries": lambda a: a["queries"][..., :3]}, "shape", ("even",)
        ),
        "queries against keys": mismatch("queries", "keys", lambda x: x[..., :2]),
        "heads of queries": mismatch("queries", "keys", lambda x: torch.cat((x, x), 2)),
        "length of targets": mismatch("targets", "queries", lambda x: x[:, :2]),
        "batch of targets": mismatch("targets", "queries", lambda x: x[:1]),
        "width of targets": mismatch("targets", "values", lambda x: x[..., :2], "width"),
        **{f"length of {name}": mismatch(name, "queries", lambda x: x[:, :2]) for name in ("gates", "mask")},
        **{f"batch of {name}": mismatch(name, "queries", lambda x: x[:1]) for name in ("gates", "mask")},
        **int_cases("chunk_size", 0, -3),
        **int_cases("top_k", 0, -1, 5),
        **int_cases("lookahead", -1),
        "lookahead beyond a chunk": Case(
            ValueError, ("lookahead", "chunk_size"), {"lookahead": 6, "chunk_size": 5}, "value"
        ),
        **number_cases("eps", below=(0.0, -1.0)),
        **number_cases("temperature", below=(0, -1.0, 1e-50)),
        **number_cases("lr"),
        **number_cases("weight_decay", below=(-0.1,)),
        **number_cases("clip", below=(-1,), optional=True),
        **number_cases("addressing_weight"),
        **choice_cases("score", "weighting", "key_gradient", "step", "boundary", "precision", "backend"),
    }


def memory_cases() -> Cases:
    """Of keys [1, 2, 4, 2] and values [16, 3]."""
    return {
        **tensor_cases("keys"),
        **tensor_cases("values"),
        "keys of three halves": Case(
            ValueError, ("keys",), {"keys": lambda a: a["keys"][:, [0, 1, 1]]}, "shape", ("two halves",)
        ),
        "values of other than n² rows": mismatch("values", "keys", lambda x: x[:15], "n²"),
        "keys for other than √N slots": mismatch("keys", "values", lambda x: x[:, :, :3], "n²"),
    }


def sequence_cases() -> Cases:
    return {
        **memory_cases(),
        **token_cases(),
        "heads of keys": mismatch("keys", "queries", lambda x: x.repeat(2, 1, 1, 1)),
        "width of keys": mismatch("keys", "queries", lambda x: x[..., :1]),
    }


def whole_cases() -> Cases:
    """What `fast_weight_memory` refuses besides: rows, where they cannot be."""
    rows = {"final": "rows"}
    return {
        **sequence_cases(),
        **choice_cases("final"),
        **option_cases("sparse_grad", TypeError, "type", 1, None, "yes", np.bool_(True)),
        "a sparse gradient beside a table": Case(ValueError, ("sparse_grad", "final"), {"sparse_grad": True}),
        "rows that decay": Case(ValueError, ("final", "weight_decay"), rows | {"weight_decay": 0.1}, "", ("0.1",)),
        "rows of coupled keys": Case(ValueError, ("final", "key_gradient"), rows | {"key_gradient": "all"}),
    }


def carry_cases() -> Cases:
    """What goes on from a segment before, or is left for the next one: `tests/test_carry.py` has what they hold."""
    flags = option_cases("return_carry", TypeError, "type", 1, None, "yes", np.bool_(True))
    return flags | option_cases("carry", TypeError, "type", 1, "x", (torch.ones(1),), {})


def varlen_cases() -> Cases:
    """Of packed tokens: queries [8, 1, 4], and what goes with them."""
    of_a_batch = {f"{what} of {name}" for what in ("length", "batch") for name in ("targets", "gates", "mask")}
    cases = {name: case for name, case in sequence_cases().items() if name not in {*of_a_batch, "heads of queries"}}
    no_rows = {"a tuple": (1, 2, 3), "a dict": {"slot": 1}, "a tensor": torch.ones(3)}
    return {
        **cases,
        **carry_cases(),
        **option_cases("sparse_grad", TypeError, "type", 1, None, "yes", np.bool_(True)),
        "heads of queries": mismatch("queries", "keys", lambda x: torch.cat((x, x), 1)),
        **{f"length of {name}": mismatch(name, "queries", lambda x: x[:2]) for name in ("targets", "gates", "mask")},
        **tensor_cases("cu_seqlens", "slots"),
        "no documents": Case(ValueError, ("cu_seqlens",), {"cu_seqlens": torch.tensor([0])}, "shape"),
        **{f"rows: {name}": Case(TypeError, ("rows",), {"rows": x}, "type") for name, x in no_rows.items()},
    }


def step_cases() -> Cases:
    no_states = {"a tensor": torch.ones(16, 3), "None": None, "a str": "state", "a state dict": {"keys": 1}}
    drop = option_cases("boundary", ValueError, "value", "drop")
    return (
        token_cases()
        | drop
        | {name: Case(TypeError, ("state",), {"state": x}, "type") for name, x in no_states.items()}
    )


def step_of_a_state_cases() -> Cases:
    of_pools = {"sessions": [0, 1], "lengths": [8, 8]}
    given = {f"{name} of a state": Case(TypeError, (name, "state"), {name: x}) for name, x in of_pools.items()}
    return step_cases() | given


def tokens_of_a_pool_cases() -> Cases:
    drop = option_cases("boundary", ValueError, "value", "drop")
    return token_cases() | drop | option_cases("weight_decay", ValueError, "value", 0.1)


def step_of_a_pool_cases() -> Cases:
    sessions = {"closed": [0, 7], "negative": [0, -1], "too few": [0], "twice": [1, 1]}
    lengths = {"too long": [9, 0], "negative": [-1, 0], "too few": [3], "of too many": torch.tensor([1, 2, 3])}
    return (
        tokens_of_a_pool_cases()
        | {f"sessions {name}": Case(ValueError, ("sessions",), {"sessions": x}) for name, x in sessions.items()}
        | {f"lengths {name}": Case(ValueError, ("lengths",), {"lengths": x}) for name, x in lengths.items()}
        | {"no sessions": Case(TypeError, ("sessions",), {"sessions": None}, "type")}
        | {"sessions by name": Case(TypeError, ("sessions",), {"sessions": ["a", "b"]})}
        | {"lengths of floats": Case(TypeError, ("lengths",), {"lengths": torch.ones(2)})}
    )


def pool_cases() -> Cases:
    return {
        **memory_cases(),
        **{
            name: case
            for name, case in int_cases("capacity", -1, 2**31).items()
            if name not in ("capacity='2'", "capacity=None")
        },
        "capacity in no bytes": Case(ValueError, ("capacity",), {"capacity": "2 GB"}, "value"),
        **option_cases("keep_past", TypeError, "type", 1, None, "yes"),
    }


def graph_of_a_pool_cases() -> Cases:
    no_pools = {"a tensor": torch.ones(16, 3), "None": None}
    given = {f"pool: {name}": Case(TypeError, ("pool",), {"pool": x}, "type") for name, x in no_pools.items()}
    return tokens_of_a_pool_cases() | given


def good_lookup() -> Arguments:
    return testing.make_lookup_inputs(5, 1, 9, 8)._asdict() | {"top_k": 3}


def good_update() -> Arguments:
    inputs = testing.make_update_inputs(gates=True, mask="real")._asdict()
    return inputs | {"count_slots": inputs["slots"].clone(), "scale": torch.ones(8)}


def good_rows() -> Arguments:
    inputs = testing.make_update_inputs()
    slot = torch.tensor([4, 2, -1, 0, 1])
    return {"values": inputs.values, "rows": Rows(torch.zeros_like(slot), slot, inputs.targets[:5])}


def good_sequence() -> Arguments:
    return make_inputs(mask="real", dtype=torch.float32) | {"chunk_size": 3, "top_k": 2}


def good_varlen() -> Arguments:
    inputs = make_packed((5, 0, 3), heads=1, num_keys=4, dtype=torch.float32)
    return inputs | {"rows": None, "chunk_size": 3, "top_k": 2}


def good_memory() -> Arguments:
    return {name: x for name, x in good_sequence().items() if name in ("keys", "values")}


def good_step(read: int = 0) -> Arguments:
    inputs = make_inputs(2, 16, mask="real", dtype=torch.float32)
    state = make_state(inputs)
    if read:
        stream(state, inputs, [read], **OPTIONS)
    return {"state": state, **tokens_of(inputs, read, read + 8), **OPTIONS}


def good_pool() -> Arguments:
    return good_memory() | {"capacity": 10}


def good_step_of_a_pool() -> Arguments:
    inputs = make_inputs(2, 8, mask="real", dtype=torch.float32)
    pool = MemoryPool(inputs["keys"], inputs["values"], capacity=100)
    return {
        "state": pool,
        **tokens_of(inputs, 0, 8),
        **OPTIONS,
        "sessions": [pool.open(), pool.open()],
        "lengths": [8, 3],
    }


def good_graph_of_a_pool() -> Arguments:
    tokens = {name: x for name, x in good_step_of_a_pool().items() if name not in ("state", "sessions", "lengths")}
    return {"pool": MemoryPool(**good_pool()), **tokens}


def parameters_of_apply(function: type[torch.autograd.Function]) -> list[inspect.Parameter]:
    """In order, which is that of the public function where `forward` takes the options as they come."""
    public = {
        FastWeightMemory: fast_weight_memory,
        ProductKeyLookup: product_key_lookup,
        ProductKeyUpdate: product_key_update,
    }
    if function in public:
        parameters = inspect.signature(public[function]).parameters
        # A Function takes tokens that are put together already, and how many of them are carried.
        carried = parameters["return_carry"].replace(name="carried", default=0) if "carry" in parameters else None
        given = {name: x if name != "return_carry" else carried for name, x in parameters.items() if name != "carry"}
        return list(given.values())
    return list(inspect.signature(function.forward).parameters.values())[1:]


def apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` of arguments by name."""
    parameters = parameters_of_apply(function)
    return lambda **arguments: function.apply(*(arguments.get(x.name, x.default) for x in parameters))


#: Each public function: a good call, the bad ones, and how it is called.
TABLE: dict[str, tuple[Callable[[], Arguments], Cases, Callable[..., Any]]] = {
    "product_key_lookup": (good_lookup, lookup_cases(), product_key_lookup),
    "ProductKeyLookup": (good_lookup, lookup_cases(), apply(ProductKeyLookup)),
    "sparse_value_gather": (lambda: testing.make_gather_inputs()._asdict(), gather_cases(), sparse_value_gather),
    "SparseValueGather": (lambda: testing.make_gather_inputs()._asdict(), gather_cases(), apply(SparseValueGather)),
    "chunk_value_update": (good_update, update_cases(), chunk_value_update),
    "ChunkValueUpdate": (good_update, update_cases(), apply(ChunkValueUpdate)),
    "chunk_value_update_": (good_update, update_cases() | table_cases(), chunk_value_update_),
    "apply_rows_": (good_rows, rows_cases() | table_cases("index_put"), apply_rows_),
    "product_key_update": (good_lookup, key_step_cases(), product_key_update),
    "ProductKeyUpdate": (good_lookup, key_step_cases(), apply(ProductKeyUpdate)),
    "fast_weight_memory": (good_sequence, whole_cases() | carry_cases(), fast_weight_memory),
    "fast_weight_memory_varlen": (good_varlen, varlen_cases(), fast_weight_memory_varlen),
    "FastWeightMemory": (good_sequence, whole_cases() | int_cases("carried", -1, 2), apply(FastWeightMemory)),
    "fast_weight_memory_step": (good_step, step_of_a_state_cases(), fast_weight_memory_step),
    "a later fast_weight_memory_step": (lambda: good_step(5), step_cases(), fast_weight_memory_step),
    "fast_weight_memory_step of a pool": (good_step_of_a_pool, step_of_a_pool_cases(), fast_weight_memory_step),
    "MemoryState": (good_memory, memory_cases(), MemoryState),
    "MemoryGraph": (good_step, step_cases(), MemoryGraph),
    "MemoryPool": (good_pool, pool_cases(), MemoryPool),
    "PoolGraph": (good_graph_of_a_pool, graph_of_a_pool_cases(), PoolGraph),
}


def of(arguments: Arguments, name: str) -> Any:
    """An argument; what a step is not given is the state's, or the pool's."""
    return arguments[name] if name in arguments else getattr(arguments.get("state", arguments.get("pool")), name)


def left(state: MemoryState | MemoryPool) -> dict[str, Tensor]:
    """Copies of all that a state is, or that the sessions of a pool are."""
    if isinstance(state, MemoryState):
        return contents(state)
    return {f"{one}.{name}": x for one in state.sessions for name, x in state.state_dict(one).items()}


def shown(x: Any, shows: str) -> str:
    if shows == "shape":
        return str(list(x.shape))
    return {"type": lambda: type(x).__name__, "dtype": lambda: str(x.dtype), "value": lambda: str(x)}[shows]()


@pytest.mark.parametrize(("function", "name"), [(f, name) for f, (_, cases, _) in TABLE.items() for name in cases])
def test_it_is_named_and_nothing_changes(function, name):
    make, cases, call = TABLE[function]
    case, good = cases[name], make()
    bad = good | {key: x(good) if callable(x) else x for key, x in case.changes.items()}
    state = good.get("state")
    before = None if state is None else left(state)
    tensors = [x for x in (*good.values(), *bad.values()) if type(x) is Tensor and not x.is_meta and not x.is_nested]
    tensors = [x.detach() for x in tensors if x.layout == torch.strided and x.dtype != torch.float8_e5m2]
    with testing.assert_unchanged(tensors), pytest.raises(case.error) as caught:
        call(**bad)
    message = str(caught.value)
    assert type(caught.value) is case.error
    for argument in case.names:
        assert f"`{argument}`" in message
        assert case.shows == "" or shown(of(bad, argument), case.shows) in message, message
    assert all(words in message for words in case.says), message
    if state is not None:
        assert_same_bits(left(state), before)


@pytest.mark.parametrize("function", [name for name in TABLE if name not in ("MemoryGraph", "PoolGraph")])
def test_the_good_call_is_good(function):
    make, _, call = TABLE[function]
    call(**make())


def test_numbers_of_numpy_are_numbers():
    numbers = {"chunk_size": 3, "top_k": 2, "lookahead": 1, "eps": 0.5, "temperature": 2.0, "lr": 0.5, "clip": 1.0}
    of_numpy = {name: (np.int64 if type(x) is int else np.float32)(x) for name, x in numbers.items()}
    inputs = {name: x for name, x in good_sequence().items() if name not in numbers}
    expected = fast_weight_memory(**inputs, **numbers)
    assert_same_bits(fast_weight_memory(**inputs, **of_numpy)._asdict(), expected._asdict())
    state = make_state(inputs)
    for options in (of_numpy, numbers):
        stream(state, inputs, [4], **options)
    state.load_state_dict(state.state_dict())  # whose bound options are JSON
    lookup = good_lookup() | {"top_k": np.int32(3)}
    testing.assert_bitwise_equal(product_key_lookup(**lookup)[1], product_key_lookup(**good_lookup())[1])
    new_keys = product_key_update(**lookup, lr=np.float64(0.5), weight=np.int8(1))
    testing.assert_bitwise_equal(new_keys, product_key_update(**good_lookup(), lr=0.5))
    update = good_update() | {"scale": np.float32(2.0)}
    testing.assert_bitwise_equal(chunk_value_update(**update), chunk_value_update(**update | {"scale": 2}))


def parameters_of(function: Any) -> set[str]:
    """By name; for options that are passed on, all of them."""
    if isinstance(function, type) and issubclass(function, torch.autograd.Function):
        return {x.name for x in parameters_of_apply(function)}
    names = set(inspect.signature(function).parameters)
    return names - {"options"} | set(Options._fields) if "options" in names else names


def test_every_argument_of_every_public_function_is_in_the_table():
    records = {"Carry", "DocumentsCarry", "MemoryOutput", "PoolFullError", "Rows", "VarlenOutput"}
    functions = set(fwpkm_kernels.__all__) - records
    assert functions == set(TABLE) - {"a later fast_weight_memory_step", "fast_weight_memory_step of a pool"}
    for function in functions:
        _, cases, _ = TABLE[function]
        changed = {name for case in cases.values() for name in case.changes}
        named = {name for case in cases.values() for name in case.names}
        expected = parameters_of(getattr(fwpkm_kernels, function))
        assert expected - changed == set(), function
        assert expected - named == set(), function


def test_a_backend_that_cannot_run_binds_nothing(monkeypatch):
    from fwpkm_kernels.kernels import _common

    monkeypatch.setattr(_common, "INTERPRETED", False)
    inputs = make_inputs(2, 3)
    state = make_state(inputs)
    with pytest.raises(ValueError, match=r"`backend`.*TRITON_INTERPRET=1"):
        stream(state, inputs, [3], **OPTIONS, backend="triton")
    assert "binding" not in state.state_dict()
    stream(state, inputs, [3], **OPTIONS)


def test_triton_on_cpu_tensors_without_the_interpreter_is_an_error():
    """In a process of its own: here the interpreter may be on."""
    script = """
import torch, fwpkm_kernels
try:
    fwpkm_kernels.product_key_lookup(torch.ones(1, 1, 4), torch.ones(1, 2, 3, 2), 1, backend="triton")
except ValueError as error:
    assert "`backend`" in str(error) and "TRITON_INTERPRET=1" in str(error), error
else:
    raise SystemExit("no error")
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
