"""The layers against their definition: golden cases, every option of the constructors, documents and padding."""

import functools
import inspect
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import reference
from fwpkm_kernels import Rows
from fwpkm_kernels.layers import FastWeightProductKeyMemory, LayerMemory, ValueTable
from tests.conftest import PLACES, SLOW_IN_INTERPRETER, Place
from tests.helpers.layers import GOLDEN_LAYERS, check_golden_layer, draw
from tests.helpers.memory import assert_close
from tests.helpers.varlen import tables_of

f64 = torch.float64
BOUND = 1e-12
HIDDEN = 6
#: What the definition reads off its parameters.
NOT_IN_REFERENCE = {"key_dim", "value_dim", "bias", "initial_memory"}


class Found(NamedTuple):
    """What a call of the layer and its definition give alike: output and `LayerMemory`."""

    output: Tensor
    keys: Tensor
    values: Tensor
    hidden_states: Tensor | None
    gate_mean: Tensor | None
    slots: Tensor
    weights: Tensor


def golden_cases() -> list[Any]:
    return [
        pytest.param(
            place, name, id=f"{place.backend}-{name}", marks=SLOW_IN_INTERPRETER if place.backend == "triton" else []
        )
        for place in PLACES
        for name in GOLDEN_LAYERS
    ]


@pytest.mark.parametrize(("place", "name"), golden_cases())
def test_golden_layers(place: Place, name: str):
    """As the authors train: the gradients of the memory, which is no parameter there, are asked for all the same."""

    def run(x: Tensor, mask: Tensor | None, parameters: dict[str, Tensor], config: dict[str, Any]) -> Found:
        layer = FastWeightProductKeyMemory.as_published(
            **config, backend=place.backend, device=place.device, dtype=f64, memory_dtype=f64
        )
        assert layer.state_dict().keys() == parameters.keys()
        given = {key: value.to(place.device) for key, value in parameters.items()}
        mask = None if mask is None else mask.to(place.device)
        output, memory = functional_call(layer, given, (x.to(place.device), mask), {"return_memory": True}, strict=True)
        return Found(*(None if y is None else y.cpu() for y in (output, *memory[:6])))

    check_golden_layer(run, name)


def randomise(layer: nn.Module) -> nn.Module:
    """Every Parameter and buffer drawn, so that none is where it began; norm weights around 1."""
    with torch.no_grad():
        for i, (name, x) in enumerate(layer.state_dict().items()):
            drawn = draw(*x.shape, seed=i)
            x.copy_(1 + 0.2 * drawn if "norm.weight" in name else drawn)
    return layer


def make_layer(**options: Any) -> FastWeightProductKeyMemory:
    return randomise(FastWeightProductKeyMemory(HIDDEN, dtype=f64, memory_dtype=f64, **options))


def with_gradients(found: Any, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is found, by name, and the gradients of one loss on all of it but slots and weights."""
    results = {name: x for name, x in found._asdict().items() if x is not None}
    real = [x for name, x in results.items() if name not in ("slots", "weights")]
    cotangents = [draw(*x.shape, seed=90 + i).to(x.device) for i, x in enumerate(real)]
    gradients = torch.autograd.grad(real, list(leaves.values()), cotangents)
    return results | {f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)}


def copies(x: Tensor, memory: LayerMemory | None) -> dict[str, Tensor]:
    """Input and memory of a call as leaves."""
    given = {"x": x}
    if memory is not None:
        values = memory.values.value if isinstance(memory.values, Rows) else memory.values
        given |= {"memory.keys": memory.keys, "memory.values": values, "memory.hidden_states": memory.hidden_states}
    return {name: y.detach().clone().requires_grad_() for name, y in given.items() if y is not None}


def memory_of(leaves: dict[str, Tensor], memory: LayerMemory | None) -> LayerMemory | None:
    """The memory with the leaves in it."""
    if memory is None:
        return None
    values = leaves["memory.values"]
    if isinstance(memory.values, Rows):
        values = memory.values._replace(value=values)
    return LayerMemory(leaves["memory.keys"], values, leaves.get("memory.hidden_states"))


def with_tables(memory: LayerMemory, table: Tensor) -> LayerMemory:
    """With a table for each document in the place of its rows."""
    if not isinstance(memory.values, Rows):
        return memory
    return memory._replace(values=tables_of(memory.values, table, len(memory.keys)))


def of_layer(
    layer: FastWeightProductKeyMemory, x: Tensor, memory: LayerMemory | None = None, **where: Any
) -> dict[str, Tensor]:
    leaves = copies(x, memory)
    output, left = layer(leaves["x"], **where, memory=memory_of(leaves, memory), return_memory=True)
    found = Found(output, *with_tables(left, layer.table.weight)[:6])
    if memory is None:
        leaves |= dict(layer.named_parameters())
    return with_gradients(found, leaves)


def of_reference(
    layer: FastWeightProductKeyMemory,
    options: dict[str, Any],
    x: Tensor,
    memory: LayerMemory | None = None,
    **where: Any,
) -> dict[str, Tensor]:
    """The definition's answers with the tensors of `layer`."""
    leaves = copies(x, memory)
    parameters = {name: y.detach().clone() for name, y in layer.state_dict().items()}
    learned = {name: parameters[name].requires_grad_() for name, _ in layer.named_parameters()}
    options = {name: value for name, value in options.items() if name not in NOT_IN_REFERENCE}
    given = memory_of(leaves, memory)
    given = None if given is None else with_tables(given, parameters["table.weight"])
    found = reference.fast_weight_layer(leaves["x"], parameters, **options, **where, memory=given)
    return with_gradients(found, leaves if memory is not None else leaves | learned)


def check(options: dict[str, Any], x: Tensor, **where: Any) -> dict[str, Tensor]:
    """The layer is its definition, in values and gradients; the answers."""
    layer = make_layer(**options)
    expected = of_reference(layer, options, x, **where)
    assert_close(of_layer(layer, x, **where), expected, BOUND)
    return expected


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return actual.keys() == expected.keys() and all(
        x.shape == expected[name].shape and torch.allclose(x, expected[name], rtol=1e-6, atol=0)
        for name, x in actual.items()
    )


BASE: dict[str, Any] = {"num_keys": 4, "top_k": 2, "key_dim": 4, "value_dim": 5, "chunk_size": 3}
#: The arguments of the constructor that change what is computed, each with other values than in BASE or by default.
OPTIONS: dict[str, list[Any]] = {
    "num_keys": [5],
    "heads": [2],
    "top_k": [3],
    "key_dim": [6],
    "value_dim": [4],
    "chunk_size": [2],
    "lookahead": [0, 2],
    "score": ["dot"],
    "eps": [0.1],
    "weighting": ["silu", "relu"],
    "temperature": [0.7],
    "lr": [0.5],
    "weight_decay": [0.1],
    "clip": [0.05],
    "addressing_weight": [0.3],
    "key_gradient": ["all"],
    "step": ["gradient", "normalized"],
    "boundary": ["drop"],
    "scope": ["batch"],
    "query_conv": [1, 3],
    "input_norm": [False],
    "query_norm": ["l2", "zscore"],
    "value_norm": [None, "l2"],
    "gate": [False],
    "write_gate": [False],
    "bias": [False],
    "norm_eps": [0.1],
}
#: Those that do not.
OTHERS = {"precision", "backend", "initial_memory", "memory_dtype", "output_init", "table"}
OTHERS |= {"layer_idx", "device", "dtype"}
X = draw(2, 7, HIDDEN, seed=80)


@functools.cache
def base_answers() -> dict[str, Tensor]:
    return check(BASE, X)


def test_every_option_is_tested():
    _, _, *names = inspect.signature(FastWeightProductKeyMemory.__init__).parameters
    assert set(names) == OPTIONS.keys() | OTHERS


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in OPTIONS.items() for value in values])
def test_options(name: str, value: Any):
    """With each and without it, layer and definition agree, and it makes a difference."""
    assert not same(check(BASE | {name: value}, X), base_answers())


@pytest.mark.parametrize(
    "options",
    [
        {"heads": 2, "query_norm": "zscore", "value_norm": "l2", "query_conv": 3, "lookahead": 2, "weight_decay": 0.1},
        {"gate": False, "write_gate": False, "scope": "batch", "weighting": "silu", "clip": 0.1},
        {"gate": False, "query_conv": 2, "scope": "batch", "boundary": "drop", "step": "gradient"},
        {"write_gate": False, "input_norm": False, "score": "dot", "bias": False, "key_gradient": "all"},
    ],
    ids=str,
)
@pytest.mark.parametrize("where", ["rows", "padded", "packed", "packed and padded"])
def test_options_together(options: dict[str, Any], where: str):
    """With documents and padding; what scope="sequence" removes may be NaN there."""
    options = BASE | options
    x, given = draw(2, 7, HIDDEN, seed=80), {}
    if "packed" in where:
        x, given["cu_seqlens"] = x.view(1, 14, HIDDEN), torch.tensor([0, 4, 4, 5, 14])
    if "padded" in where:
        # On the left, inside and on the right; the document of one token is padding.
        given["attention_mask"] = torch.tensor([0, 1, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 0]).view(x.shape[:2])
        if options.get("scope") != "batch":
            x = torch.where(given["attention_mask"].unsqueeze(-1) > 0, x, torch.nan)
    expected = check(options, x, **given)
    assert all(y.isfinite().all() for y in expected.values())


def test_a_mask_that_is_no_bool():
    """In a batch it multiplies, and what is not above 0 is padding."""
    mask = torch.tensor([[0.5, 1, 0, 2, 1, 0, 1], [0, 0, 1.5, 1, 1, 1, 1]], dtype=f64)
    options = BASE | {"scope": "batch", "query_conv": 2}
    found = check(options, X, attention_mask=mask)
    assert not same(found, check(options, X, attention_mask=mask > 0))
    cuts = torch.tensor([0, 4, 14])
    packed = check(options, X.view(1, 14, HIDDEN), attention_mask=mask.view(1, 14), cu_seqlens=cuts)
    assert not same(packed, found)
    options["scope"] = "sequence"
    assert same(check(options, X, attention_mask=mask), check(options, X, attention_mask=mask > 0))


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_backends(scope: str, place: Place):
    """One chunk of two tokens, its write, and a token that reads it."""
    options = BASE | {"scope": scope, "chunk_size": 2, "lookahead": 0}
    layer = make_layer(**options, backend=place.backend, precision="ieee").to(place.device)
    assert (layer.options.backend, layer.options.precision) == (place.backend, "ieee")
    expected = of_reference(make_layer(**options), options, X[:1, :3])
    found = of_layer(layer, X[:1, :3].to(place.device))
    assert_close({name: y.cpu() for name, y in found.items()}, expected, BOUND)


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_a_segment_after_another(scope: str):
    options = BASE | {"scope": scope, "query_conv": 3, "heads": 2}
    layer = make_layer(**options)
    _, memory = layer(X, return_memory=True)
    # A second segment from elsewhere than the initial memory; gradients reach what it began with.
    expected = of_reference(layer, options, X.flip(1), memory)
    assert_close(of_layer(layer, X.flip(1), memory), expected, BOUND)
    assert expected["gradient of memory.keys"].count_nonzero() > 0
    assert expected["gradient of memory.hidden_states"].count_nonzero() > 0


@pytest.mark.parametrize("initial_memory", ["frozen", "persistent"])
@pytest.mark.parametrize("own_table", [True, False])
def test_initial_memory(initial_memory: str, own_table: bool):
    """The same, but that neither keys nor values are Parameters."""
    table = None if own_table else ValueTable(16, 5, trainable=False, dtype=f64)
    options = BASE | {"scope": "batch", "initial_memory": initial_memory}
    layer = make_layer(**options, table=table)
    assert {name for name, _ in layer.named_buffers()} == {"keys", "table.weight"}
    assert own_table or layer.table is table
    expected = of_reference(layer, options, X)
    assert_close(of_layer(layer, X), expected, BOUND)
    learned = check(BASE | {"scope": "batch"}, X)
    assert same(expected, {name: y for name, y in learned.items() if name in expected})
    assert learned.keys() - expected.keys() == {"gradient of keys", "gradient of table.weight"}


def test_what_each_layer_holds():
    """The names of the state_dict are an interface: checkpoints and optimizers go by them."""
    options = BASE | {"heads": 2, "query_conv": 3}
    assert {name: tuple(x.shape) for name, x in make_layer(**options).state_dict().items()} == {
        "q_norm.weight": (6,),
        "v_norm.weight": (6,),
        "g_norm.weight": (6,),
        "o_norm.weight": (5,),
        "q_proj.weight": (8, 6),
        "q_proj.bias": (8,),
        "v_proj.weight": (5, 6),
        "v_proj.bias": (5,),
        "g_proj.weight": (1, 6),
        "g_proj.bias": (1,),
        "o_proj.weight": (6, 5),
        "o_proj.bias": (6,),
        "q_conv.weight": (6, 1, 3),
        "keys": (2, 2, 4, 2),
        "table.weight": (16, 5),
    }
    bare = make_layer(**BASE, gate=False, write_gate=False, bias=False, input_norm=False)
    projections = {f"{name}_proj.weight" for name in "qvo"}
    assert bare.state_dict().keys() == projections | {"o_norm.weight", "keys", "table.weight"}
