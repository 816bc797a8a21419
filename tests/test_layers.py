"""The layers against their definition: golden cases, every option of the constructors, documents and padding."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import reference
from fwpkm_kernels.layers import FastWeightProductKeyMemory
from reference.layers import LayerOutput
from tests.conftest import PLACES, SLOW_IN_INTERPRETER, Place
from tests.test_memory import assert_close
from tests.test_reference_layers import GOLDEN_LAYERS, check_golden_layer, draw

f64 = torch.float64
BOUND = 1e-12
HIDDEN = 6
#: Options that change sizes or how things are computed, not what: the reference has no such arguments.
NOT_IN_REFERENCE = {"key_dim", "value_dim", "bias", "initial_memory", "precision", "sparse_grad", "dropout"}


def golden_cases() -> list[Any]:
    return [
        pytest.param(
            place,
            name,
            id=f"{place.backend}-{name}",
            marks=SLOW_IN_INTERPRETER if place.backend == "triton" and name != "paper_mask" else [],
        )
        for place in PLACES
        for name in GOLDEN_LAYERS
    ]


@pytest.mark.parametrize(("place", "name"), golden_cases())
def test_golden_layers(place: Place, name: str):
    """As the authors train: the gradients of the memory, which is no parameter there, are asked for all the same."""

    def run(x: Tensor, mask: Tensor | None, parameters: dict[str, Tensor], config: dict[str, Any]) -> LayerOutput:
        layer = FastWeightProductKeyMemory.as_published(
            **config, backend=place.backend, device=place.device, dtype=f64, memory_dtype=f64
        )
        assert layer.state_dict().keys() == parameters.keys()
        given = {key: value.to(place.device) for key, value in parameters.items()}
        mask = None if mask is None else mask.to(place.device)
        output, memory = functional_call(layer, given, (x.to(place.device), mask), {"return_memory": True}, strict=True)
        return LayerOutput(output.cpu(), memory.keys.cpu(), memory.values.cpu(), memory.gate_mean, None, None)

    check_golden_layer(run, name)


def randomise(layer: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and buffer drawn, so that none is where it began; norm weights around 1."""
    with torch.no_grad():
        for i, (name, x) in enumerate([*layer.named_parameters(), *layer.named_buffers()]):
            drawn = draw(*x.shape, seed=seed + i)
            x.copy_(1 + 0.2 * drawn if "norm.weight" in name else drawn)
    return layer


def tensors_of(layer: nn.Module) -> dict[str, Tensor]:
    return dict(layer.named_parameters()) | dict(layer.named_buffers())


def with_gradients(results: dict[str, Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Results, and gradients of one loss on all of them that are real numbers."""
    real = [x for x in results.values() if x.requires_grad]
    cotangents = [draw(*x.shape, seed=90 + i).to(x.device) for i, x in enumerate(real)]
    gradients = torch.autograd.grad(real, list(leaves.values()), cotangents)
    return results | {f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)}


def of_reference(x: Tensor, tensors: dict[str, Tensor], learned: set[str], **options: Any) -> dict[str, Tensor]:
    leaves = {"hidden_states": x.detach().clone().requires_grad_()}
    leaves |= {name: y.detach().clone().requires_grad_() for name, y in tensors.items() if name in learned}
    found = reference.fast_weight_layer(leaves["hidden_states"], tensors | leaves, **options)
    results = {name: getattr(found, name) for name in ("output", "keys", "values", "gate_mean")}
    return with_gradients({name: y for name, y in results.items() if y is not None}, leaves)


def of_layer(layer: nn.Module, x: Tensor, **where: Any) -> dict[str, Tensor]:
    leaves = {"hidden_states": x.detach().clone().requires_grad_(), **dict(layer.named_parameters())}
    output, memory = layer(leaves["hidden_states"], **where, return_memory=True)
    assert memory.gate_mean is not None or not hasattr(layer, "g_proj")
    results = {"output": output, "keys": memory.keys, "values": memory.values, "gate_mean": memory.gate_mean}
    return with_gradients({name: y for name, y in results.items() if y is not None}, leaves)


def check(options: dict[str, Any], x: Tensor, **where: Any) -> dict[str, Tensor]:
    """The layer is its definition, in values and gradients; the definition's answers."""
    layer = randomise(FastWeightProductKeyMemory(HIDDEN, **options, backend="torch", dtype=f64, memory_dtype=f64))
    learned = {name for name, _ in layer.named_parameters()}
    asked = {name: value for name, value in options.items() if name not in NOT_IN_REFERENCE}
    expected = of_reference(x, tensors_of(layer), learned, **asked, **where)
    assert_close(of_layer(layer, x, **where), expected, BOUND)
    return expected


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return actual.keys() == expected.keys() and all(
        x.shape == expected[name].shape and torch.allclose(x, expected[name], rtol=1e-6, atol=0)
        for name, x in actual.items()
    )


BASE = {"num_keys": 4, "top_k": 2, "key_dim": 4, "value_dim": 5, "chunk_size": 3}
#: Other values than the defaults of each option that changes results, and what must go with it.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "num_keys": [{"num_keys": 5}],
    "heads": [{"heads": 2}],
    "top_k": [{"top_k": 3}],
    "key_dim": [{"key_dim": 6}],
    "value_dim": [{"value_dim": 4}],
    "chunk_size": [{"chunk_size": 2}],
    "lookahead": [{"lookahead": 0}, {"lookahead": 2}],
    "score": [{"score": "dot"}],
    "eps": [{"eps": 0.1}],
    "weighting": [{"weighting": "silu"}, {"weighting": "relu", "eps": 0.1}],
    "temperature": [{"temperature": 0.7}],
    "lr": [{"lr": 0.5}],
    "weight_decay": [{"weight_decay": 0.1}],
    "clip": [{"clip": 0.05}],
    "addressing_weight": [{"addressing_weight": 0.3}],
    "key_gradient": [{"key_gradient": "all"}],
    "step": [{"step": "normalized"}],
    "boundary": [{"boundary": "drop"}],
    "scope": [{"scope": "batch"}],
    "input_norm": [{"input_norm": False}],
    "query_norm": [{"query_norm": "l2"}, {"query_norm": "zscore", "heads": 2}],
    "value_norm": [{"value_norm": None}, {"value_norm": "l2"}],
    "gate": [{"gate": False}],
    "write_gate": [{"write_gate": False}, {"write_gate": False, "gate": False}],
    "bias": [{"bias": False}],
    "norm_eps": [{"norm_eps": 0.1}],
    "query_conv": [{"query_conv": 1}, {"query_conv": 3}, {"query_conv": 3, "scope": "batch"}],
}
#: What the definition does not know, tested below by name or in a file of its own.
ELSEWHERE = {"precision", "backend", "initial_memory", "memory_dtype", "output_init", "table", "layer_idx", "device"}
ELSEWHERE |= {"dtype"}


@pytest.mark.parametrize(
    "changed", [pytest.param(each, id=str(each)) for values in OPTIONS.values() for each in [*values]]
)
def test_options(changed: dict[str, Any]):
    """With the option as without, layer and definition agree, and the option makes a difference."""
    x = draw(2, 7, HIDDEN, seed=80)
    found = check(BASE | changed, x)
    assert not same(found, base_answers(x))
