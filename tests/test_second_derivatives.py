"""Second derivatives: of every Function, in every input, either those of the reference or an error, never silence."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import gradgradcheck

import fwpkm_kernels
import reference
from fwpkm_kernels import chunk_value_update, testing
from tests.conftest import SLOW_IN_INTERPRETER, Place
from tests.helpers.memory import make_inputs

LOOKUP = testing.make_lookup_inputs(3, 2, 5, 4, dtype=torch.float64)._asdict()
GATHER = testing.make_gather_inputs(4, 2, 9, 3, dtype=torch.float64)._asdict()
UPDATE = testing.make_update_inputs(4, 2, 9, 3, gates=True, mask="real", dtype=torch.float64)._asdict()
UPDATE |= {"scale": torch.rand(4, dtype=torch.float64) + 0.5}
MEMORY = make_inputs(1, 5, mask="real")
MEMORY_NAMES = ("queries", "targets", "keys", "values", "gates")


class Case(NamedTuple):
    """A call of a public function."""

    function: str
    inputs: dict[str, Any]
    differentiable: tuple[str, ...]
    options: dict[str, Any]
    outputs: int = 1  #: how many of its results are differentiable


CASES = {
    "lookup": Case("product_key_lookup", LOOKUP, ("queries", "keys"), {"top_k": 2}),
    "lookup by dot": Case("product_key_lookup", LOOKUP, ("queries", "keys"), {"top_k": 2, "score": "dot"}),
    "gather": Case("sparse_value_gather", GATHER, ("values", "weights"), {}),
    "write": Case(
        "chunk_value_update",
        UPDATE,
        ("values", "weights", "targets", "predictions", "gates", "scale"),
        {"lr": 0.7, "weight_decay": 0.1},
    ),
    "clipped write": Case("chunk_value_update", UPDATE, ("values", "weights", "targets", "predictions"), {"clip": 0.1}),
    "key step": Case("product_key_update", LOOKUP, ("keys", "queries"), {"top_k": 2}),
    "key step by dot": Case("product_key_update", LOOKUP, ("keys", "queries"), {"top_k": 2, "score": "dot"}),
    "decay of keys": Case("product_key_update", LOOKUP, ("keys",), {"top_k": 2, "weight": 0.0, "weight_decay": 0.1}),
    "memory": Case("fast_weight_memory", MEMORY, MEMORY_NAMES, {"chunk_size": 2, "top_k": 2}, 3),
    "memory with coupled keys": Case(
        "fast_weight_memory", MEMORY, MEMORY_NAMES, {"chunk_size": 2, "top_k": 2, "key_gradient": "all"}, 3
    ),
}
#: The scalar whose gradient is differentiated again; of a sum the incoming gradient needs none itself.
LOSSES: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "sum": lambda outputs: sum(x.sum() for x in outputs),  # type: ignore[arg-type, return-value]
    "squares": lambda outputs: sum(x.square().sum() for x in outputs),  # type: ignore[arg-type, return-value]
    "first output": lambda outputs: outputs[0].sum(),
}
#: Of one input alone, what is right: the results are linear in the table. All else raises.
RIGHT = {
    ("write", "values"): ("sum", "squares"),
    ("clipped write", "values"): ("sum", "squares"),
    ("memory", "values"): ("sum", "first output"),
}


def parameters() -> list[Any]:
    return [
        pytest.param(name, wanted, loss, id=f"{name}-{'+'.join(wanted)}-{loss}")
        for name, case in CASES.items()
        for wanted in (*((one,) for one in case.differentiable), case.differentiable)
        for loss in LOSSES
        if loss != "first output" or case.outputs > 1
    ]


def call(module: Any, case: Case, leaves: dict[str, Tensor], **backend: str) -> list[Tensor]:
    """The differentiable results."""
    results = getattr(module, case.function)(**{**case.inputs, **leaves}, **case.options, **backend)
    results = [results] if isinstance(results, Tensor) else list(results)
    return results[: case.outputs]


def second_derivatives(
    module: Any, case: Case, wanted: tuple[str, ...], loss: str, asked: str, **backend: str
) -> dict[str, Tensor]:
    """Gradients of the squared norm, the penalty on gradients that people use, of the gradient in `asked`."""
    leaves = {name: case.inputs[name].detach().clone().requires_grad_() for name in wanted}
    value = LOSSES[loss](call(module, case, leaves, **backend))
    (gradient,) = torch.autograd.grad(value, [leaves[asked]], create_graph=True, materialize_grads=True)
    zeros = {name: torch.zeros_like(x) for name, x in leaves.items()}
    penalty = gradient.square().sum()
    if not penalty.requires_grad:
        return zeros
    found = torch.autograd.grad(penalty, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def check(name: str, wanted: tuple[str, ...], loss: str, device: str = "cpu", **backend: str) -> None:
    """Right, or the error."""
    case = CASES[name]
    there = case._replace(inputs={key: x.to(device) for key, x in case.inputs.items() if x is not None})
    for asked in wanted:
        try:
            actual, raised = second_derivatives(fwpkm_kernels, there, wanted, loss, asked, **backend), ""
        except RuntimeError as error:
            actual, raised = {}, str(error)
        assert raised in ("", f"{case.function} cannot be differentiated twice")
        if len(wanted) == 1:
            assert (raised == "") == (loss in RIGHT.get((name, asked), ()))
        expected = second_derivatives(reference, case, wanted, loss, asked)
        for leaf, x in actual.items():
            message = f"{asked}, {leaf}"
            torch.testing.assert_close(x.to("cpu"), expected[leaf], msg=lambda m, message=message: f"{message}: {m}")


@pytest.mark.parametrize(("name", "wanted", "loss"), parameters())
def test_right_or_an_error(name, wanted, loss):
    check(name, wanted, loss)


#: What the interpreter runs in `make test-all`.
SLOW = ("memory", "memory with coupled keys", "key step by dot", "decay of keys", "lookup by dot")


@pytest.mark.parametrize(
    "name, wanted, loss",
    [
        pytest.param(name, wanted, loss, marks=SLOW_IN_INTERPRETER if name in SLOW else [])
        for name, wanted, loss in (
            *((name, wanted, loss) for (name, wanted), losses in RIGHT.items() for loss in losses),
            *((name, case.differentiable[-1], "squares") for name, case in CASES.items()),
            ("gather", "values", "squares"),
            ("write", "weights", "sum"),
        )
    ],
)
def test_triton_is_right_or_an_error(name, wanted, loss, triton_place: Place):
    check(name, (wanted,), loss, triton_place.device, backend="triton")


def test_second_derivatives_of_a_write_in_the_table():
    inputs = {name: x for name, x in UPDATE.items() if name != "values"}

    def write(values):
        return chunk_value_update(values, **inputs, lr=0.7, weight_decay=0.1).square()

    assert gradgradcheck(write, UPDATE["values"].clone().requires_grad_())


@pytest.mark.parametrize("case", CASES)
def test_hessians(case):
    """torch.autograd.functional.hessian and jvp, which differentiates twice, raise as well."""
    case = CASES[case]
    name = case.differentiable[-1] if case.function != "chunk_value_update" else "weights"

    def loss(x: Tensor) -> Tensor:
        return LOSSES["squares"](call(fwpkm_kernels, case, {name: x}))

    with pytest.raises(RuntimeError, match=f"{case.function} cannot be differentiated twice"):
        torch.autograd.functional.hessian(loss, case.inputs[name])
    with pytest.raises(RuntimeError, match=f"{case.function} cannot be differentiated twice"):
        torch.autograd.functional.jvp(loss, case.inputs[name], torch.ones_like(case.inputs[name]))
