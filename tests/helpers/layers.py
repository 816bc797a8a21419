"""The golden cases of the fast-weight layer, for the layer and for its definition."""

from typing import Any

import torch
from torch import Tensor

from fwpkm_kernels.layers.convert import from_published
from tests.helpers.golden import assert_near, load

f64 = torch.float64
GOLDEN_LAYERS = ["no_gate", "no_value_norm", "paper", "paper_mask"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=f64)


def check_golden_layer(run: Any, name: str) -> None:
    """What tests/golden/layers/README.md promises.

    ``run(hidden_states, mask, parameters, config)`` takes parameters by the layer's own names, and gives what has the
    names of `LayerOutput`.
    """
    config, tensors = load(f"layers/{name}", f64)
    published = {key: x for key, x in tensors.items() if key.startswith("published:")}
    leaves = {"hidden_states": tensors["hidden_states"], **published}
    leaves = {key: x.clone().requires_grad_() for key, x in leaves.items()}
    parameters = from_published({key: leaves[key] for key in published}, "published:")
    result = run(leaves["hidden_states"], tensors.get("mask"), parameters, config)
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
