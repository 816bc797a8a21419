"""Sparse value gather: weighted sums of a few rows of a large table."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.autograd import Function

from . import _checks as checks
from ._autograd import refuse_transforms
from ._operators import function_of, is_plain, operator
from .kernels import compute_dtype
from .lookup import pick_blocks, pick_rows, sum_rows
from .plan import compact_totals, plan_segments, segment_blocks
from .records import PLAN_SCHEMA, Plan


def _rows(x: Tensor) -> Tensor:
    """[..., a] as [rows, a]."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


@checks.without_autocast
def gather_torch(values: Tensor, slots: Tensor, weights: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Weighted sums of rows in plain PyTorch: [M, D]."""
    dtype = compute_dtype(values.dtype)
    if values.dtype == out_dtype == dtype:
        return sum_rows(values, slots, weights.to(dtype))
    out = torch.empty(slots.shape[0], values.shape[1], dtype=out_dtype, device=values.device)
    for block in pick_blocks(slots, values.shape[1]):
        rows = pick_rows(values, slots[block]).to(dtype)  # [block, J, D]
        out[block] = torch.bmm(weights[block].to(dtype).unsqueeze(1), rows).squeeze(1)
    return out


def gather_rows(values: Tensor, slots: Tensor, weights: Tensor, out_dtype: torch.dtype, backend: str) -> Tensor:
    """Weighted sums of rows, [M, D], for slots and weights [M, J]; trusts its input."""
    if checks.use_triton(backend, values):
        from .kernels.gather import gather

        return gather(values, slots, weights=weights, sum_dtype=out_dtype)[0]
    return gather_torch(values, slots, weights, out_dtype)


@operator("sparse_value_gather")
def _gather_op(values: Tensor, slots: Tensor, weights: Tensor, backend: str) -> Tensor:
    checks.check_tokens("slots", slots, slots.shape[0])
    checks.check_slot_range("slots", slots, values.shape[0])
    return gather_rows(values, slots, weights, values.dtype, backend)


@_gather_op.register_fake
def _(values, slots, weights, backend):  # type: ignore[no-untyped-def]
    return values.new_empty(slots.shape[0], values.shape[1])


@operator("sparse_value_gather_backward_weights")
def _weights_grad_op(grad_out: Tensor, values: Tensor, slots: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    if checks.use_triton(backend, values):
        from .kernels.gather import gather

        return gather(values, slots, vectors=grad_out, dots_dtype=dtype)[1]
    return row_dots(values, slots, grad_out).to(dtype)


@_weights_grad_op.register_fake
def _(grad_out, values, slots, dtype, backend):  # type: ignore[no-untyped-def]
    return slots.new_empty(slots.shape, dtype=dtype)


def _are_cache_lines(x: Tensor) -> bool:
    """Whether each row of x [rows, D] begins at the beginning of a cache line, of 64 bytes, and is of whole ones."""
    bytes_of_row = x.shape[1] * x.itemsize
    return x.is_contiguous() and x.data_ptr() % 64 == 0 and bytes_of_row % 64 == 0


@checks.without_autocast
def row_dots(values: Tensor, slots: Tensor, vectors: Tensor) -> Tensor:
    """<values[slots[m, j]], vectors[m]> in plain PyTorch: [M, J], in the compute dtype."""
    dtype = compute_dtype(values.dtype)
    vectors = vectors.to(dtype)
    # BLAS, without a copy of the rows. It sums rows that lie otherwise in their cache lines in another order, and where
    # a row lies in a compact table depends on other documents.
    if values.is_cpu and values.dtype == dtype and slots.numel() > 0 and all(map(_are_cache_lines, (values, vectors))):
        checks.check_slot_range("slots", slots, values.shape[0])  # what is called checks nothing
        row = torch.arange(slots.shape[0], dtype=slots.dtype, device=slots.device)
        rows = row.repeat_interleave(slots.shape[1])
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            vectors, values, slots.flatten().contiguous(), row, rows, 0
        ).view(slots.shape)
    out = torch.empty(slots.shape, dtype=dtype, device=values.device)
    for block in pick_blocks(slots, values.shape[1]):
        rows = pick_rows(values, slots[block]).to(dtype)  # [block, J, D], a copy
        torch.sum(rows.mul_(vectors[block].unsqueeze(1)), -1, out=out[block])
    return out


@operator(
    "sparse_value_gather_backward_values",
    schema=f"(Tensor grad_out, Tensor weights, {PLAN_SCHEMA}, SymInt num_slots, ScalarType dtype, bool compact, "
    "str backend) -> Tensor",
)
def _values_grad_op(  # type: ignore[no-untyped-def]
    grad_out, weights, order, rows, start, end, num_slots, dtype, compact, backend
) -> Tensor:
    """Σ weights·grad_out over each segment, in a table of zeros: [N, D], or [accesses, D] if compact."""
    plan, size = Plan(order, rows, start, end), order.numel() if compact else num_slots
    weights = weights.to(compute_dtype(dtype)).contiguous()
    uses_triton = checks.use_triton(backend, grad_out)
    if compact and not uses_triton:
        return compact_totals(plan, grad_out.to(weights.dtype), weights).to(dtype)
    out = torch.zeros(size, grad_out.shape[1], dtype=dtype, device=grad_out.device)
    if uses_triton:
        from .kernels.segments import segment_rows

        segment_rows(out, grad_out, weights, plan, compact=compact)
    else:
        touched, blocks = segment_blocks(plan, grad_out.to(weights.dtype), weights)
        for block, totals in blocks:
            out[touched[block]] = totals.to(dtype)
    return out


@_values_grad_op.register_fake
def _(grad_out, weights, order, rows, start, end, num_slots, dtype, compact, backend):  # type: ignore[no-untyped-def]
    return grad_out.new_empty(order.shape[0] if compact else num_slots, grad_out.shape[1], dtype=dtype)


def _gather(
    run: Callable[..., Tensor], values: Tensor, slots: Tensor, weights: Tensor, sparse_grad: bool, backend: str
) -> Tensor:
    """Validate, and gather by `run`, the operator or its function."""
    _check_gather(values, slots, weights, sparse_grad, backend)
    return run(values, _rows(slots), _rows(weights), backend).view(*slots.shape[:-1], values.shape[1])


def _gather_grads(
    function: Callable[[CustomOpDef], Callable[..., Tensor]],
    grad_out: Tensor,
    values: Tensor,
    slots: Tensor,
    weights: Tensor,
    needs_values: bool,
    needs_weights: bool,
    sparse_grad: bool,
    backend: str,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the table and of the weights; `function` says what is called in the place of an operator."""
    grad_values = grad_weights = None
    if needs_weights:
        grad_weights = function(_weights_grad_op)(grad_out, values, slots, weights.dtype, backend)
    if needs_values:
        plan = plan_segments(slots, values.shape[0])
        of_table = (values.shape[0], values.dtype)
        grad_values = function(_values_grad_op)(grad_out, weights, *plan, *of_table, sparse_grad, backend)
        if sparse_grad:
            # One entry per access, as torch.nn.Embedding gives: an exact count of rows would synchronise. The sum
            # of a slot's accesses stands at the first of its entries; the others are zero.
            rows = plan.rows.long().unsqueeze(0)
            grad_values = torch.sparse_coo_tensor(rows, grad_values, values.shape, check_invariants=False)
    return grad_values, grad_weights


class _SparseValueGatherBackward(Function):
    """First derivatives; differentiating them again raises."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        return _gather_grads(lambda op: op, *args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("sparse_value_gather cannot be differentiated twice")


class SparseValueGather(Function):
    """`sparse_value_gather` as an autograd Function: apply(values, slots, weights, sparse_grad, backend)."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, slots: Tensor, weights: Tensor, sparse_grad: bool = False, backend: str = "auto"
    ) -> Tensor:
        """Validate, gather, and keep the three inputs for backward."""
        refuse_transforms("sparse_value_gather", (values, slots, weights))
        out = _gather(_gather_op, values, slots, weights, sparse_grad, backend)
        ctx.save_for_backward(values, slots, weights)
        ctx.options = (sparse_grad, backend)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        """Dots of the incoming gradient with the rows for the weights; a row-owned scatter for the table."""
        needs_values, _, needs_weights = ctx.needs_input_grad[:3]
        values, slots, weights = ctx.saved_tensors
        refuse_transforms("sparse_value_gather", (grad_out, values, weights))
        inputs = (_rows(grad_out), values, _rows(slots), _rows(weights))
        needs = (needs_values, needs_weights)
        if is_plain(*inputs):
            grad_values, grad_weights = _gather_grads(function_of, *inputs, *needs, *ctx.options)
        else:
            grad_values, grad_weights = _SparseValueGatherBackward.apply(*inputs, *needs, *ctx.options)
        return grad_values, None, None if grad_weights is None else grad_weights.view(slots.shape), None, None


def _check_gather(values: Tensor, slots: Tensor, weights: Tensor, sparse_grad: bool, backend: str) -> None:
    checks.check_tensor("values", values, 2, "[N, D]")
    checks.check_tensor("slots", slots)
    checks.check_tensor("weights", weights)
    checks.check_float("values", values)
    checks.check_slots("slots", slots)
    checks.check_float("weights", weights)
    if slots.dim() < 1:
        raise ValueError("`slots` must have at least 1 dimension [..., J], got a scalar")
    checks.check_like("weights", weights, "slots", slots)
    checks.check_tokens("slots", slots, math.prod(slots.shape[:-1]))
    checks.check_together(values=values, slots=slots, weights=weights)
    checks.check_flag("sparse_grad", sparse_grad)
    checks.check_choice("backend", backend, checks.BACKENDS)


def sparse_value_gather(
    values: Tensor, slots: Tensor, weights: Tensor, *, sparse_grad: bool = False, backend: str = "auto"
) -> Tensor:
    """Read the table: out[t] = Σ_j weights[t, j] · values[slots[t, j]].

    Sums are accumulated in float32 (float64 for float64) whatever the table holds. Duplicate slots count each time.
    The table's gradient is summed slot by slot in a fixed order: deterministic, without atomics. Source: FwPKM, arXiv
    2601.00671, the read; the same as torch.nn.functional.embedding_bag(mode="sum", per_sample_weights=weights).

    Args:
        values: the table, [N, D], any strides; float32, float64, float16 or bfloat16.
        slots: [..., J], int64 or int32, in [0, N). The range is checked on CPU tensors, also under torch.compile; on a
            GPU, where a check would synchronise, by the kernel under TRITON_DEBUG=1 only, set before the import.
        weights: [..., J], any float dtype (float64 exactly if the table is).
        sparse_grad: give the table's gradient as an uncoalesced sparse COO tensor with one entry per access, as
            torch.nn.Embedding(sparse=True) does: no dense [N, D] gradient. PyTorch takes it through no cast and no
            view: with values=parameter.bfloat16() backward raises. Not with torch.compile, which has no sparse
            gradients. DistributedDataParallel takes them only for the weight of a torch.nn.EmbeddingBag or Embedding
            with sparse=True; for other parameters it fails with "Cannot access storage of SparseTensorImpl".
        backend: "auto" (Triton for GPU tensors, PyTorch for CPU tensors), "torch" or "triton".

    Returns:
        out [..., D] in the table's dtype, differentiable in values and weights. NaN in a row or weight reaches only
        the tokens that read it. No tokens give an empty result; J = 0 gives zeros. Denormals are numbers like others on
        CPUs and, as sums and products in float32 keep them there, on NVIDIA GPUs.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    instead_of_vmap = "put the batch into the leading dimensions of `slots` and `weights`"
    refuse_transforms("sparse_value_gather", (values, slots, weights), instead_of_vmap)
    if is_plain(values, slots, weights):
        return _gather(function_of(_gather_op), values, slots, weights, sparse_grad, backend)
    out: Tensor = SparseValueGather.apply(values, slots, weights, sparse_grad, backend)
    return out
