"""The golden cases, chunk by chunk, through the three operations: lookup, gather and chunk update."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fwpkm_kernels
import reference
from tests.conftest import PLACES, SLOW_IN_INTERPRETER, Place
from tests.helpers.golden import GOLDEN, NAMES, Case, assert_near, load, tolerance


class Implementation(NamedTuple):
    """The three operations, called with the arguments of the reference functions."""

    product_key_lookup: Callable[..., tuple[Tensor, Tensor]]
    sparse_value_gather: Callable[..., Tensor]
    chunk_value_update: Callable[..., Tensor]


def package(place: Place) -> Implementation:
    """The package's own operations, called with CPU tensors wherever they run."""

    def moved(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            args = tuple(x.to(place.device) if isinstance(x, Tensor) else x for x in args)
            options = {name: x.to(place.device) if isinstance(x, Tensor) else x for name, x in options.items()}
            result = function(*args, **options, backend=place.backend)
            return tuple(x.cpu() for x in result) if isinstance(result, tuple) else result.cpu()

        return call

    names = Implementation._fields
    return Implementation(*(moved(getattr(fwpkm_kernels, name)) for name in names))


IMPLEMENTATIONS = {
    "reference": Implementation(*(getattr(reference, name) for name in Implementation._fields)),
    **{place.backend: package(place) for place in PLACES},
}
#: Cases that the interpreter runs in both dtypes, for their few tokens.
QUICKEST = ("paper_i_single_chunk", "paper_j_short", "paper_n_topk2")
#: What it runs in `make test`: the smallest tables, most collisions, decay and a clip too. The rest is slow.
QUICK = (*QUICKEST, "paper_o_topk_eq_n", "heads2", "lr05_wd", "clip")


def cases(names: list[str]) -> pytest.MarkDecorator:
    """Parametrise a test with every implementation, every case of `names` and both dtypes.

    Only the QUICKEST cases are interpreted in float32, which is no other there than elsewhere.
    """
    interpreted = PLACES[1].device == "cpu"
    return pytest.mark.parametrize(
        ("implementation", "name", "dtype"),
        [
            pytest.param(
                implementation,
                name,
                dtype,
                id=f"{label}-{name}-{str(dtype).removeprefix('torch.')}",
                marks=SLOW_IN_INTERPRETER if label == "triton" and name not in QUICK else [],
            )
            for label, implementation in IMPLEMENTATIONS.items()
            for name in names
            for dtype in (torch.float64, torch.float32)
            if not (interpreted and label == "triton" and name not in QUICKEST and dtype == torch.float32)
        ],
    )


def weigh(scores: Tensor, weighting: str, temperature: float) -> Tensor:
    """Weights [..., J] of the scores [..., H, K] of a token, all heads together."""
    function = {"softmax": lambda s: s.softmax(-1), "silu": torch.nn.functional.silu, "relu": torch.relu}[weighting]
    return function(scores.flatten(-2) / temperature)


def value_scan(
    implementation: Implementation, case: Case, values: Tensor, targets: Tensor, gates: Tensor | None, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Output and final values for given slots and weights, under ``boundary="drop"``.

    Each chunk is read; then its pairs (t, t + lookahead) that lie within it are written, from the predictions read.
    Counts n_s are over all its accesses; the step size is J·S/E, with E written positions and S those to be counted.
    """
    config, slots, mask = case.config, case.tensors["slots"], case.tensors.get("mask")
    batch, length, picks = slots.shape
    outputs = []
    for start in range(0, length, config["chunk_size"]):
        stop = min(start + config["chunk_size"], length)
        predictions = implementation.sparse_value_gather(values, slots[:, start:stop], weights[:, start:stop])
        outputs.append(predictions)
        last = max(start, stop - config["lookahead"])  # one past the last written position
        written = slice(start, last)
        counted = batch * (stop - start) if mask is None else int((mask[:, written] > 0).sum())
        values = implementation.chunk_value_update(
            values,
            slots[:, written].reshape(-1, picks),
            weights[:, written].reshape(-1, picks),
            targets[:, start + config["lookahead"] : last + config["lookahead"]].flatten(0, 1),
            predictions[:, : last - start].flatten(0, 1),
            gates=None if gates is None else gates[:, written].flatten(),
            mask=None if mask is None else mask[:, written].flatten(),
            count_slots=slots[:, start:stop],
            lr=config["lr"],
            scale=picks * counted / max(1, batch * (last - start)),
            weight_decay=config["weight_decay"],
            clip=config["clip"],
        )
    return torch.cat(outputs, dim=1), values


def test_no_golden_file_is_left_out():
    assert sorted(path.stem for path in GOLDEN.glob("*.npz")) == sorted(NAMES)


@cases(NAMES)
def test_first_chunk(implementation: Implementation, name: str, dtype: torch.dtype):
    """Its keys are the initial ones: lookup and gather alone give slots, weights and output."""
    config, tensors = load(name, dtype)
    chunk = slice(0, config["chunk_size"])
    scores, slots = implementation.product_key_lookup(
        tensors["queries"][:, chunk], tensors["keys"], config["top_k"], score=config["score"]
    )
    # In float32 too: no two scores at a top-k border are within its rounding.
    assert torch.equal(slots.flatten(-2), tensors["slots"][:, chunk])
    weights = weigh(scores, config["weighting"], config["temperature"])
    assert_near(weights, tensors["weights"][:, chunk], tolerance(name, dtype), "weights")
    output = implementation.sparse_value_gather(tensors["values"], slots.flatten(-2), weights)
    assert_near(output, tensors["output"][:, chunk], tolerance(name, dtype), "output")


@cases(NAMES)
def test_value_scan(implementation: Implementation, name: str, dtype: torch.dtype):
    """With the golden slots and weights of all chunks, gather and update give every output and the final values.

    And the gradients of values, targets and gates, which reach the loss through the value scan alone. Not so in
    allgrad_me (``key_gradient="all"``), where the memorisation loss moves the keys.
    """
    case = load(name, dtype)
    tensors = case.tensors
    leaves = {key: tensors[key].requires_grad_() for key in ("values", "targets", "gates") if key in tensors}
    output, final_values = value_scan(
        implementation, case, leaves["values"], leaves["targets"], leaves.get("gates"), tensors["weights"].to(dtype)
    )
    assert_near(output, tensors["output"], tolerance(name, dtype), "output")
    assert_near(final_values, tensors["final_values"], tolerance(name, dtype), "final_values")
    if name == "allgrad_me":
        return
    # In a single chunk targets and gates move nothing that is read.
    gradients = torch.autograd.grad(
        output, list(leaves.values()), tensors["cotangent"].to(dtype), allow_unused=True, materialize_grads=True
    )
    for key, gradient in zip(leaves, gradients, strict=True):
        assert_near(gradient, tensors[f"d_{key}"], tolerance(name, dtype), f"d_{key}")


@pytest.mark.parametrize("label", IMPLEMENTATIONS)
def test_single_chunk_from_inputs(label: str):
    """The one case of a single chunk, from its inputs alone: all three operations, and the gradients through them."""
    implementation = IMPLEMENTATIONS[label]
    config, tensors = case = load("paper_i_single_chunk", torch.float64)
    assert config["T"] <= config["chunk_size"]
    names = ["queries", "keys", "values"]
    leaves = {key: tensors[key].requires_grad_() for key in names}
    scores, slots = implementation.product_key_lookup(
        leaves["queries"], leaves["keys"], config["top_k"], score=config["score"]
    )
    assert torch.equal(slots.flatten(-2), tensors["slots"])
    weights = weigh(scores, config["weighting"], config["temperature"])
    output, final_values = value_scan(
        implementation, case, leaves["values"], tensors["targets"], tensors["gates"], weights
    )
    assert_near(output, tensors["output"], 1e-12, "output")
    assert_near(final_values, tensors["final_values"], 1e-12, "final_values")
    gradients = torch.autograd.grad(output, list(leaves.values()), tensors["cotangent"])
    for key, gradient in zip(names, gradients, strict=True):
        assert_near(gradient, tensors[f"d_{key}"], 1e-12, f"d_{key}")
