"""The definition of the whole memory against the golden cases: every output, the final state and every gradient."""

import pytest
import torch
from torch.autograd import gradcheck

import reference
from fwpkm_kernels import testing
from tests.test_golden_chunk import NAMES, assert_near, load

OPTIONS = (
    "chunk_size",
    "top_k",
    "lookahead",
    "score",
    "weighting",
    "temperature",
    "lr",
    "weight_decay",
    "clip",
    "addressing_weight",
    "key_gradient",
)


@pytest.mark.parametrize("name", NAMES)
def test_golden(name):
    config, tensors = load(name, torch.float64)
    names = [key for key in ("queries", "targets", "keys", "values", "gates") if key in tensors]
    leaves = {key: tensors[key].requires_grad_() for key in names}
    result = reference.fast_weight_memory(
        **leaves, mask=tensors.get("mask"), boundary="drop", **{option: config[option] for option in OPTIONS}
    )
    assert torch.equal(result.slots, tensors["slots"])
    answers = {"output": result.output, "weights": result.weights}
    answers |= {"final_keys": result.keys, "final_values": result.values}
    gradients = torch.autograd.grad(
        result.output, list(leaves.values()), tensors["cotangent"], allow_unused=True, materialize_grads=True
    )
    answers |= {f"d_{key}": gradient for key, gradient in zip(names, gradients, strict=True)}
    for key, answer in answers.items():
        assert_near(answer, tensors[key].double(), 1e-12, key)


def test_key_step_of_a_single_chunk():
    config, tensors = load("paper_i_single_chunk", torch.float64)
    keys = reference.product_key_update(
        tensors["keys"],
        tensors["queries"].flatten(0, 1),
        top_k=config["top_k"],
        score=config["score"],
        lr=config["lr"],
        weight=config["addressing_weight"],
        weight_decay=config["weight_decay"],
        clip=config["clip"],
    )
    assert_near(keys, tensors["final_keys"], 1e-12, "final_keys")


@pytest.mark.parametrize("boundary", ["drop", "carry"])
@pytest.mark.parametrize("step", ["paper", "normalized"])
def test_gradcheck(step, boundary):
    queries, keys = testing.make_lookup_inputs((2, 7), 1, 4, 4, dtype=torch.float64)
    inputs = testing.make_update_inputs(14, 2, 16, 3, gates=True, mask="real", dtype=torch.float64)
    targets, gates, mask = inputs.targets.view(2, 7, 3), inputs.gates.view(2, 7), inputs.mask.view(2, 7)

    def run(queries, targets, keys, values, gates):
        options = {"chunk_size": 3, "top_k": 2, "lookahead": 2, "step": step, "boundary": boundary}
        return reference.fast_weight_memory(queries, targets, keys, values, gates=gates, mask=mask, **options)[:3]

    leaves = [x.clone().requires_grad_() for x in (queries, targets, keys, inputs.values, gates)]
    assert gradcheck(run, leaves)


def test_carry_gives_the_same_wherever_a_sequence_is_cut():
    """The memory after k full chunks, and outputs up to any length, do not depend on what comes later."""
    queries, keys = testing.make_lookup_inputs((2, 17), 1, 6, 4, dtype=torch.float64)
    values, _, _, targets, _, _, _ = testing.make_update_inputs(34, 2, 36, 3, dtype=torch.float64)
    targets = targets.view(2, 17, 3)
    options = {"chunk_size": 4, "top_k": 3, "lookahead": 3}
    whole = reference.fast_weight_memory(queries, targets, keys, values, **options)
    for length in (1, 3, 4, 5, 8, 15, 16):
        part = reference.fast_weight_memory(queries[:, :length], targets[:, :length], keys, values, **options)
        testing.assert_bitwise_equal(part.output, whole.output[:, :length], f"output of {length} tokens")
    state = reference.fast_weight_memory(queries[:, :16], targets[:, :16], keys, values, **options)
    testing.assert_bitwise_equal(state.values, whole.values, "values")
    testing.assert_bitwise_equal(state.keys, whole.keys, "keys")
