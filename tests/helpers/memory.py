"""Calls of the whole memory: inputs, gradients, and how near two results must be."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from fwpkm_kernels import MemoryOutput, fast_weight_memory, testing
from tests.conftest import PLACES, SLOW_IN_INTERPRETER, Place

DIFFERENTIABLE = ("queries", "targets", "keys", "values", "gates")
#: Instead of the fixture `place`, where the interpreter takes many seconds.
PLACES_SLOW = pytest.mark.parametrize(
    "place", [PLACES[0], pytest.param(PLACES[1], marks=SLOW_IN_INTERPRETER)], ids=lambda place: place.backend
)
BOUNDARIES = pytest.mark.parametrize("boundary", ["carry", "drop"])
KEY_GRADIENTS = pytest.mark.parametrize("key_gradient", ["addressing", "all"])


def make_inputs(
    batch: int = 2,
    length: int = 8,
    heads: int = 1,
    num_keys: int = 4,
    key_width: int = 4,
    width: int = 3,
    *,
    gates: bool = True,
    mask: str | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    activations_dtype: torch.dtype | None = None,
    device: str = "cpu",
    layout: str = "contiguous",
) -> dict[str, Any]:
    """The tensor arguments by name; ``mask`` is None, one of MASK_KINDS, or "none left", which masks every token."""
    inputs = testing.make_memory_inputs(
        batch, length, heads, num_keys, key_width, width, gates=gates, mask="bool" if mask == "none left" else mask,
        seed=seed, dtype=dtype, activations_dtype=activations_dtype, device=device, layout=layout,
    )  # fmt: skip
    if mask == "none left":
        inputs.mask.zero_()
    return {name: x for name, x in inputs._asdict().items() if x is not None}


def leaves_of(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The inputs that gradients are asked of, as leaves."""
    return {name: inputs[name].detach().requires_grad_() for name in DIFFERENTIABLE if name in inputs}


def cotangents(outputs: MemoryOutput, seed: int = 5) -> list[Tensor]:
    return [testing.random_cotangent(x, seed=seed + i) for i, x in enumerate(outputs[:3])]


def gradients_of(outputs: MemoryOutput, leaves: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Gradients of one loss on output, final keys and final values together."""
    found = torch.autograd.grad(
        outputs[:3], list(leaves.values()), cotangents(outputs), allow_unused=True, materialize_grads=True, **options
    )
    return dict(zip(leaves, found, strict=True))


def run(function: Callable[..., Any], inputs: dict[str, Any], **options: Any) -> tuple[MemoryOutput, dict[str, Tensor]]:
    """Outputs and gradients."""
    leaves = leaves_of(inputs)
    outputs = function(**{**inputs, **leaves}, **options)
    return outputs, gradients_of(outputs, leaves)


def named(outputs: MemoryOutput, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return outputs._asdict() | {f"gradient of {name}": x for name, x in gradients.items()}


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        testing.assert_bitwise_equal(x, expected[name], name)


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 1e-9) -> None:
    """Relative in norm, beside a gradient that vanishes analytically up to rounding; slots are equal."""
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        wanted = expected[name].detach()
        assert (x.shape, x.dtype) == (wanted.shape, wanted.dtype), name
        if x.is_floating_point():
            error, norm = float((x.detach() - wanted).norm()), float(wanted.norm())
            assert error <= bound * max(norm, 1e-3), f"{name}: error {error:.3g} over {bound:.3g} of {norm:.3g}"
        else:
            testing.assert_bitwise_equal(x, wanted, name)


def check_memory(inputs: dict[str, Any], place: Place, **options: Any) -> None:
    """Outputs, slots, weights and all gradients are those of the reference, in float64."""
    inputs = {name: x.to(place.device) for name, x in inputs.items()}
    with testing.poisoned_memory(), testing.assert_unchanged(inputs):
        actual = named(*run(fast_weight_memory, inputs, **options, backend=place.backend))
    assert_close(actual, named(*run(reference.fast_weight_memory, inputs, **options)))


def small_call(key_gradient: str = "addressing", **options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Leaves and options of a call of three chunks with a mask."""
    options = {"chunk_size": 3, "top_k": 2, "key_gradient": key_gradient, **options}
    inputs = make_inputs(2, 8, mask="real", dtype=torch.float32)
    return leaves_of(inputs), {**options, "mask": inputs["mask"]}
