"""The definition of the layers: against the golden cases, and against numbers worked out another way."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import reference
from fwpkm_kernels import MemoryOutput
from fwpkm_kernels.layers import from_published
from reference.layers import LayerOutput
from tests.test_golden_chunk import GOLDEN, assert_near, load

f64 = torch.float64
GOLDEN_LAYERS = ["no_gate", "no_value_norm", "paper", "paper_mask"]
#: hidden_size, heads, num_keys, key_dim, value_dim
D_MODEL, HEADS, NUM_KEYS, KEY_DIM, VALUE_DIM = 6, 2, 4, 4, 5
SMALL = {"num_keys": NUM_KEYS, "heads": HEADS, "top_k": 2, "chunk_size": 3}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=f64)


def make_parameters(query_conv: int | None = None, bias: bool = True) -> dict[str, Tensor]:
    """Random parameters of a small layer, norm weights around 1."""
    shapes = {"q_norm": (D_MODEL,), "v_norm": (D_MODEL,), "g_norm": (D_MODEL,), "o_norm": (VALUE_DIM,)}
    shapes |= {"q_proj": (HEADS * KEY_DIM, D_MODEL), "v_proj": (VALUE_DIM, D_MODEL), "g_proj": (1, D_MODEL)}
    shapes |= {"o_proj": (D_MODEL, VALUE_DIM), "table": (NUM_KEYS**2, VALUE_DIM)}
    if query_conv is not None:
        shapes["q_conv"] = (D_MODEL, 1, query_conv)
    parameters = {f"{name}.weight": draw(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    for name in ("q_norm", "v_norm", "g_norm", "o_norm"):
        parameters[f"{name}.weight"] = 1 + 0.2 * parameters[f"{name}.weight"]
    if bias:
        for i, name in enumerate(("q_proj", "v_proj", "g_proj", "o_proj")):
            parameters[f"{name}.bias"] = draw(shapes[name][0], seed=20 + i)
    parameters["keys"] = draw(HEADS, 2, NUM_KEYS, KEY_DIM // 2, seed=30)
    return parameters


def layer(x: Tensor, parameters: Mapping[str, Tensor], **options: Any) -> LayerOutput:
    return reference.fast_weight_layer(x, parameters, **(SMALL | options))


def check_golden_layer(run: Any, name: str) -> None:
    """What tests/golden/layers/README.md promises.

    ``run(hidden_states, mask, parameters, config)`` takes parameters by the layer's own names, and gives a
    `LayerOutput`, or what has the same names; slots may be left out as None.
    """
    config, tensors = load(f"layers/{name}", f64)
    published = {key: x for key, x in tensors.items() if key.startswith("published:")}
    leaves = {"hidden_states": tensors["hidden_states"], **published}
    leaves = {key: x.clone().requires_grad_() for key, x in leaves.items()}
    parameters = from_published({key: leaves[key] for key in published}, "published:")
    result = run(leaves["hidden_states"], tensors.get("mask"), parameters, config)
    if result.slots is not None:
        assert torch.equal(result.slots, tensors["slots"])
    hidden_out = leaves["hidden_states"] + result.output
    answers = {"layer_output": result.output, "hidden_out": hidden_out}
    answers |= {"final_keys": result.keys.flatten(0, 2), "final_values": result.values}
    gradients = torch.autograd.grad(hidden_out, list(leaves.values()), tensors["cotangent"])
    answers |= {f"d_{key}": x for key, x in zip(leaves, gradients, strict=True)}
    asked = {"config", "mask", "cotangent", "slots", *leaves}
    assert answers.keys() == tensors.keys() - asked
    for key, answer in answers.items():
        assert_near(answer, tensors[key], 1e-12, key)


def test_no_golden_layer_is_left_out():
    assert sorted(path.stem for path in (GOLDEN / "layers").glob("*.npz")) == GOLDEN_LAYERS


@pytest.mark.parametrize("name", GOLDEN_LAYERS)
def test_golden_layers(name: str):
    def run(x: Tensor, mask: Tensor | None, parameters: dict[str, Tensor], config: dict[str, Any]) -> LayerOutput:
        options = {key: value for key, value in config.items() if key not in ("hidden_size", "key_dim", "value_dim")}
        options |= {"scope": "batch", "boundary": "drop"}
        return reference.fast_weight_layer(x, parameters, attention_mask=mask, **options)

    check_golden_layer(run, name)
