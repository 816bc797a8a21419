"""Transforms of torch.func and forward-mode derivatives are refused; jacobians of autograd are right."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fwpkm_kernels import (
    ChunkValueUpdate,
    FastWeightMemory,
    MemoryState,
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
from tests.helpers.models import Model, make_x, squares


def calls() -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Every public function as a function of one of its tensors, and that tensor."""
    queries, keys = testing.make_lookup_inputs(3, 2, 6, 8, dtype=torch.float64)
    update = testing.make_update_inputs(3, 4, 36, 7, dtype=torch.float64)
    tokens = {name: x.detach() for name, x in Model().tokens(make_x(5)).items()}
    options = {"chunk_size": 2, "top_k": 2}

    def write(weights: Tensor) -> Tensor:
        return chunk_value_update(**{**update._asdict(), "weights": weights})

    def write_in_place(weights: Tensor) -> Tensor:
        chunk_value_update_(**{**update._asdict(), "weights": weights})
        return update.values

    def apply_rows(value: Tensor) -> Tensor:
        slot = torch.tensor([4, -1, 0])
        apply_rows_(update.values, Rows(torch.zeros_like(slot), slot, value))
        return update.values

    def memory(queries: Tensor) -> Tensor:
        return fast_weight_memory(**{**tokens, "queries": queries}, keys=keys, values=update.values, **options).output

    def varlen(queries: Tensor) -> Tensor:
        packed = {name: x[0] for name, x in tokens.items()} | {
            "queries": queries,
            "cu_seqlens": torch.tensor([0, 3, 5]),
        }
        return fast_weight_memory_varlen(**packed, keys=keys, values=update.values, **options).output

    state = MemoryState(keys, update.values)

    def step(queries: Tensor) -> Tensor:
        fast_weight_memory_step(state, **{**tokens, "queries": queries}, **options)
        return state.values

    return {
        "product_key_lookup": (lambda queries: product_key_lookup(queries, keys, 2)[0], queries),
        "sparse_value_gather": (lambda w: sparse_value_gather(update.values, update.slots, w), update.weights),
        "chunk_value_update": (write, update.weights),
        "chunk_value_update_": (write_in_place, update.weights),
        "apply_rows_": (apply_rows, update.targets),
        "product_key_update": (lambda queries: product_key_update(keys, queries, top_k=2), queries),
        "fast_weight_memory": (memory, tokens["queries"]),
        "fast_weight_memory_varlen": (varlen, tokens["queries"][0]),
        "fast_weight_memory_step": (step, tokens["queries"]),
    }


def with_tangent(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x, torch.ones_like(x)))


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "vmap": lambda function, x: torch.func.vmap(function)(torch.stack((x, x))),
    "grad": lambda function, x: torch.func.grad(lambda x: function(x).sum())(x),
    "vjp": torch.func.vjp,
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (torch.ones_like(x),)),
    "jacrev": lambda function, x: torch.func.jacrev(function)(x),
    "jacfwd": lambda function, x: torch.func.jacfwd(function)(x),
    "linearize": torch.func.linearize,
    "forward mode": with_tangent,
    "forward-mode jacobian": lambda function, x: torch.autograd.functional.jacobian(
        function, x, vectorize=True, strategy="forward-mode"
    ),
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", calls())
def test_transforms_are_refused(name, transform, requires_grad):
    """By the function itself, which says so, before it writes anything; and the next call runs."""
    if transform == "linearize" and name.endswith(("_", "_step")):
        pytest.skip("torch.func.linearize first calls the function as it is, and so writes")
    function, x = calls()[name]
    with torch.no_grad():
        before = function(x).clone()  # of what works in place, the table after the first write
        function, x = calls()[name]
        expected = "forward-mode" if "forward" in transform or transform == "linearize" else "torch.func"
        with torch.set_grad_enabled(True), pytest.raises(RuntimeError, match=f"^{name} does not .*{expected}"):
            TRANSFORMS[transform](function, x.clone().requires_grad_(requires_grad))
        testing.assert_bitwise_equal(function(x), before)


def test_the_refusal_says_where_a_batch_goes():
    function, x = calls()["product_key_lookup"]
    with pytest.raises(RuntimeError, match="instead of vmap, put the batch into the leading dimensions of `queries`"):
        torch.func.vmap(function)(torch.stack((x, x)))
    function, x = calls()["fast_weight_memory"]
    with pytest.raises(RuntimeError, match="instead of vmap, call it once for each item"):
        torch.func.vmap(function)(torch.stack((x, x)))


def test_a_backward_pass_under_a_transform_is_refused():
    function, x = calls()["sparse_value_gather"]
    x = x.requires_grad_()
    out = function(x)
    with pytest.raises(RuntimeError, match="^sparse_value_gather does not run under transforms"):
        torch.func.vmap(lambda grad: torch.autograd.grad(out, x, grad)[0])(torch.stack((out, out)).detach())


@pytest.mark.parametrize("name", [name for name in calls() if not name.endswith(("_", "_step"))])
def test_jacobians_and_vjps_of_autograd(name):
    """torch.autograd.functional, row by row; vectorized where PyTorch can loop over an operator, else an error."""
    function, x = calls()[name]
    expected = torch.stack(
        [
            torch.autograd.grad(function(leaf := x.clone().requires_grad_()).flatten()[i], leaf)[0]
            for i in range(function(x).numel())
        ]
    )
    jacobian = torch.autograd.functional.jacobian(function, x)
    testing.assert_bitwise_equal(jacobian.reshape(expected.shape), expected)
    cotangent = testing.random_cotangent(function(x))
    _, product = torch.autograd.functional.vjp(function, x, cotangent)
    torch.testing.assert_close(product, torch.einsum("i,i...->...", cotangent.flatten(), expected))
    if name in ("fast_weight_memory", "fast_weight_memory_varlen"):
        with pytest.raises(RuntimeError, match=f"{name}_backward"):
            torch.autograd.functional.jacobian(function, x, vectorize=True)
    else:
        vectorized = torch.autograd.functional.jacobian(function, x, vectorize=True)
        testing.assert_bitwise_equal(vectorized, jacobian)


@pytest.mark.parametrize("training", [False, True])
def test_transforms_elsewhere_in_a_compiled_function(training):
    """The check compiles, and what other parts of the function do with vmap or grad is no concern of it."""
    model = Model().requires_grad_(training)

    def run(x: Tensor) -> Tensor:
        x = torch.func.vmap(lambda item: item * item.sum())(x)
        x = x + torch.func.grad(lambda x: x.cos().sum())(x)
        return squares(model(x)) + product_key_lookup(model.tokens(x)["queries"], model.keys, 2)[0].sum()

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    grads = []
    for one in (compiled, run):
        x = make_x(5).requires_grad_(training)
        value = one(x)
        grads.append([value, *(torch.autograd.grad(value, x) if training else ())])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("transform", ["vmap", "jvp"])
@pytest.mark.parametrize("name", calls())
def test_transforms_are_refused_in_a_compiled_function(name, transform):
    """Where torch.compile goes around what a Function does, to operators that would drop derivatives."""
    function, x = calls()[name]
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: TRANSFORMS[transform](function, x), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=f"{name} does not run under transforms"):
        compiled(x)


def applications() -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Every Function, applied by hand, as a function of one of its tensors, and that tensor."""
    queries, keys = testing.make_lookup_inputs(3, 2, 6, 8)
    update, targets = testing.make_update_inputs(3, 4, 36, 7), torch.randn(1, 3, 7)
    values, slots, weights, *errors = update[:5]
    return {
        "ProductKeyLookup": (lambda x: ProductKeyLookup.apply(x, keys, 2)[0], queries),
        "SparseValueGather": (lambda x: SparseValueGather.apply(values, slots, x), weights),
        "ChunkValueUpdate": (lambda x: ChunkValueUpdate.apply(values, slots, x, *errors), weights),
        "ProductKeyUpdate": (lambda x: ProductKeyUpdate.apply(keys, x, 2), queries),
        "FastWeightMemory": (lambda x: FastWeightMemory.apply(x, targets, keys, values, 2, 2)[0], queries[None]),
    }


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "forward mode"])
@pytest.mark.parametrize("name", applications())
def test_transforms_of_functions_applied_by_hand_are_refused(name, transform, compiled):
    """By PyTorch, or by what the Function runs; nothing comes out."""
    function, x = applications()[name]

    def run(x: Tensor) -> Any:
        return TRANSFORMS[transform](function, x)

    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"functorch transforms|the jvp function|transforms of torch.func|forward-mode"):
        (torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run)(x)
