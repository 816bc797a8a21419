"""The chunk write: one gradient step on the rows that a chunk addressed."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from . import _checks as checks
from ._autograd import refuse_recomputation, refuse_transforms
from ._operators import operator
from .gather import gather_torch, row_dots
from .kernels import compute_dtype
from .options import Write, schema_of
from .plan import count_accesses, count_among, plan_segments, segment_blocks, segment_totals
from .records import PLAN_SCHEMA, Plan


def write(
    values: Tensor,
    errors: Tensor,
    write_weights: Tensor,
    plan: Plan,
    o: Write,
    log: Tensor | None = None,
    decays: Tensor | None = None,
) -> None:
    """Write a chunk in place: values = (1 - lr·wd)·values - lr·clamp(Σ write_weights·errors).

    `decays` [N], bool, says which rows decay, all that the plan names among them; None is all. With a `log`
    [accesses, D], every row that the plan names is kept there as it was, where its segment starts.
    """
    if checks.use_triton(o.backend, values):
        from .kernels.update import update

        how: dict[str, Any] = {"lr": o.lr, "weight_decay": o.weight_decay, "clip": o.clip}
        update(values, values, errors, write_weights, plan, log=log, decays=decays, **how)
        return
    decay = 1.0 - o.lr * o.weight_decay
    # Without a bound the step size multiplies the smaller tensor.
    touched, blocks = segment_blocks(plan, errors, write_weights if o.clip is not None else -o.lr * write_weights)
    if log is not None:  # every access its row, of which the first of a segment is read
        torch.index_select(values, 0, plan.rows, out=log)
    rows = values.index_select(0, touched) if values.dtype != errors.dtype else None
    if o.weight_decay != 0.0:
        factors: float | Tensor = decay
        if decays is not None:
            factors = torch.ones(values.shape[0], 1, dtype=compute_dtype(values.dtype), device=values.device)
            factors[decays] = decay
        values.mul_(factors)
    for block, steps in blocks:
        if o.clip is not None:
            steps.clamp_(-o.clip, o.clip).mul_(-o.lr)
        if rows is not None:  # in half precision each row is rounded once
            values[touched[block]] = rows[block].to(steps.dtype).mul_(decay).add_(steps).to(values.dtype)
        elif values.is_cuda:  # there scatter_add_ has no deterministic form
            values.index_add_(0, touched[block], steps)
        else:  # each row once, in any order; with one index per row this is twice as fast as index_add_
            values.scatter_add_(0, touched[block].unsqueeze(1).expand_as(steps), steps)


@operator(
    "chunk_value_update",
    schema=f"(Tensor values, Tensor errors, Tensor write_weights, Tensor[] plan, {schema_of(Write)}) -> Tensor",
)
def _update_op(values, errors, write_weights, plan, *options) -> Tensor:  # type: ignore[no-untyped-def]
    o, planned = Write(*options), Plan._make(plan)
    checks.check_tokens("slots", write_weights, write_weights.shape[0])
    checks.check_rows(planned, values.shape[0])
    if checks.use_triton(o.backend, values):
        from .kernels.update import update

        out = torch.empty(values.shape, dtype=values.dtype, device=values.device)
        out.copy_(values) if o.weight_decay == 0.0 else torch.mul(values, 1.0 - o.lr * o.weight_decay, out=out)
        update(values, out, errors, write_weights, planned, lr=o.lr, weight_decay=o.weight_decay, clip=o.clip)
    else:
        out = values.clone(memory_format=torch.contiguous_format)
        write(out, errors, write_weights, planned, o)
    return out


@_update_op.register_fake
def _(values, errors, write_weights, plan, *options):  # type: ignore[no-untyped-def]
    return values.new_empty(values.shape)


@operator(
    "chunk_value_update_",
    mutates_args=("values",),
    schema=f"(Tensor(a0!) values, Tensor errors, Tensor write_weights, Tensor[] plan, {schema_of(Write)}) -> ()",
)
def _update_inplace_op(values, errors, write_weights, plan, *options) -> None:  # type: ignore[no-untyped-def]
    refuse_recomputation("chunk_value_update_")
    planned = Plan._make(plan)
    checks.check_tokens("slots", write_weights, write_weights.shape[0])
    checks.check_rows(planned, values.shape[0])
    write(values, errors, write_weights, planned, Write(*options))


def write_grad(
    grad_values: Tensor, errors: Tensor, write_weights: Tensor, slots: Tensor, plan: Plan, o: Write
) -> tuple[Tensor, Tensor]:
    """r = Σ_j c_j·Ĝ'[slot_j], [M, D], and <Ĝ'[slot_j], e>, [M, J]; Ĝ' = lr·G', and 0 where the clamp was active."""
    if checks.use_triton(o.backend, grad_values):
        from .kernels.update import update_grad

        return update_grad(grad_values, errors, write_weights, slots, plan, lr=o.lr, clip=o.clip)
    if slots.numel() == 0:
        return torch.zeros_like(errors), torch.zeros_like(write_weights)
    if o.clip is not None:
        # Ĝ' for the distinct rows only, and which of these each access touches.
        positions, touched, totals = segment_totals(plan, errors, write_weights)
        grad_values = torch.where(totals.abs() <= o.clip, grad_values[touched].to(totals.dtype), 0.0)
        segments = torch.searchsorted(positions, plan.start, right=True) - 1
        slots = torch.empty_like(segments).scatter_(0, plan.order, segments).view(slots.shape)
    sums = gather_torch(grad_values, slots, o.lr * write_weights, errors.dtype)
    return sums, o.lr * row_dots(grad_values, slots, errors)


@operator(
    "chunk_value_update_backward",
    schema="(Tensor grad_values, Tensor errors, Tensor write_weights, Tensor slots, "
    f"{PLAN_SCHEMA}, {schema_of(Write)}) -> (Tensor, Tensor)",
)
def _update_grad_op(  # type: ignore[no-untyped-def]
    grad_values, errors, write_weights, slots, order, rows, start, end, *options
) -> tuple[Tensor, Tensor]:
    plan = Plan(order, rows, start, end)
    return write_grad(grad_values, errors, write_weights, slots, plan, Write(*options))


@_update_grad_op.register_fake
def _(grad_values, errors, write_weights, slots, *rest):  # type: ignore[no-untyped-def]
    return errors.new_empty(errors.shape), errors.new_empty(slots.shape)


class _Chunk(NamedTuple):
    """What a chunk writes: as in `chunk_value_update`."""

    slots: Tensor
    weights: Tensor
    targets: Tensor
    predictions: Tensor
    gates: Tensor | None
    mask: Tensor | None
    scale: float | Tensor | None  #: α; a number or a tensor after the checks


def _fold_write(chunk: _Chunk, counts: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The errors e = p - y, [M, D], and the write weights c = α·g·m·w / n_s, [M, J]: everything that multiplies e."""
    write_weights = chunk.weights.to(dtype) / counts.view(chunk.slots.shape)
    for factor in (chunk.scale, chunk.gates, chunk.mask):
        if factor is not None:
            write_weights = write_weights * _per_row(factor, dtype, write_weights)
    errors = chunk.predictions.to(dtype) - chunk.targets.to(dtype)
    return errors.contiguous(), write_weights.contiguous()


def _per_row(factor: float | Tensor, dtype: torch.dtype, like: Tensor) -> float | Tensor:
    """A number as it is; [M] as [M, 1] beside [M, J], and as [M] beside [M]."""
    return factor.to(dtype).view(-1, *[1] * (like.dim() - 1)) if isinstance(factor, Tensor) else factor


@operator("chunk_value_update_counts")
def _counts_op(plan: list[Tensor], counted: Tensor | None, count_slots: Tensor | None, num_slots: int) -> Tensor:
    """n_s of every access, [A]: in the dtype of `start`, or int64 for `count_slots`, of which there may be more.

    It is an operator, since a trace has no values to check, and since Inductor (of torch 2.13) may read the result of a
    scatter before it is filled.
    """
    if count_slots is None:
        return count_accesses(Plan._make(plan), counted)
    checks.check_slot_range("count_slots", count_slots, num_slots)
    return count_among(Plan._make(plan), count_slots).long()


@_counts_op.register_fake
def _(plan, counted, count_slots, num_slots):  # type: ignore[no-untyped-def]
    _, _, start, _ = plan
    return start.new_empty(start.shape, dtype=start.dtype if count_slots is None else torch.int64)


def _count(plan: Plan, chunk: _Chunk, num_slots: int, count_slots: Tensor | None) -> Tensor:
    """n_s of every access, [A]."""
    counted = None
    if chunk.mask is not None and count_slots is None:
        counted = (chunk.mask > 0).unsqueeze(1).expand(chunk.slots.shape).reshape(-1)
    return _counts_op(list(plan), counted, count_slots, num_slots)


class _ChunkValueUpdateBackward(Function):
    """First derivatives; differentiating them again raises."""

    @staticmethod
    def forward(ctx: Any, grad_values: Tensor, counts: Tensor, plan: Plan, o: Write, *fields: Any) -> Any:
        chunk, dtype = _Chunk(*fields), compute_dtype(grad_values.dtype)
        errors, write_weights = _fold_write(chunk, counts, dtype)
        sums, dots = _update_grad_op(grad_values, errors, write_weights, chunk.slots, *plan, *o)
        factors = {"scale": chunk.scale, "gates": chunk.gates}

        def times_other(grad: Tensor, left_out: str) -> Tensor:
            for name, factor in factors.items():
                if name != left_out and factor is not None:
                    grad = grad * _per_row(factor, dtype, grad)
            return grad

        # dc = -dots, and c = w·(α·g·m) / n_s: each factor's gradient is dc times all the others. The mask is
        # multiplied first, so that a masked row is 0 even if another product overflows.
        per_weight = -dots / counts.view(chunk.slots.shape)
        if chunk.mask is not None:
            per_weight = per_weight * _per_row(chunk.mask, dtype, per_weight)
        per_row = (per_weight * chunk.weights.to(dtype)).sum(1)
        return (
            times_other(per_weight, "").to(chunk.weights.dtype),
            sums.to(chunk.targets.dtype),
            (-sums).to(chunk.predictions.dtype),
            None if chunk.gates is None else times_other(per_row, "gates").to(chunk.gates.dtype),
            times_other(per_row, "scale").to(chunk.scale.dtype) if isinstance(chunk.scale, Tensor) else None,
        )

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("chunk_value_update cannot be differentiated twice")


class ChunkValueUpdate(Function):
    """`chunk_value_update` as an autograd Function: apply(values, slots, weights, targets, predictions, gates, mask,
    count_slots, lr, scale, weight_decay, clip, backend)."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        slots: Tensor,
        weights: Tensor,
        targets: Tensor,
        predictions: Tensor,
        gates: Tensor | None = None,
        mask: Tensor | None = None,
        count_slots: Tensor | None = None,
        lr: float = 1.0,
        scale: float | Tensor | None = None,
        weight_decay: float = 0.0,
        clip: float | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Validate and write into a new table; backward keeps the plan and small inputs, and neither of the tables."""
        chunk = _Chunk(slots, weights, targets, predictions, gates, mask, scale)
        refuse_transforms("chunk_value_update", (values, *chunk))
        o, chunk = _check_update(values, chunk, count_slots, Write(lr, weight_decay, clip, backend))
        plan = plan_segments(slots, values.shape[0])
        counts = _count(plan, chunk, values.shape[0], count_slots)
        errors, write_weights = _fold_write(chunk, counts, compute_dtype(values.dtype))
        out = _update_op(values, errors, write_weights, list(plan), *o)
        is_tensor = isinstance(chunk.scale, Tensor)
        ctx.save_for_backward(*chunk[:-1], chunk.scale if is_tensor else None, counts, *plan)
        ctx.options, ctx.scale = o, None if is_tensor else chunk.scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        """The closed form: gathers of the incoming gradient at the rows that were written."""
        *tensors, tensor_scale, counts, order, rows, start, end = ctx.saved_tensors
        refuse_transforms("chunk_value_update", (grad_out, *tensors, tensor_scale))
        o = ctx.options
        grad_values = grad_weights = grad_targets = grad_predictions = grad_gates = grad_scale = None
        if ctx.needs_input_grad[0]:
            grad_values = grad_out if o.weight_decay == 0.0 else grad_out * (1.0 - o.lr * o.weight_decay)
        if any(ctx.needs_input_grad[i] for i in (2, 3, 4, 5, 9)):
            scale = ctx.scale if tensor_scale is None else tensor_scale
            plan = Plan(order, rows, start, end)
            results = _ChunkValueUpdateBackward.apply(grad_out, counts, plan, o, *tensors, scale)
            grad_weights, grad_targets, grad_predictions, grad_gates, grad_scale = results
        written = (grad_weights, grad_targets, grad_predictions, grad_gates)
        return (grad_values, None, *written, None, None, None, grad_scale, None, None, None)


def _check_update(values: Tensor, chunk: _Chunk, count_slots: Tensor | None, o: Write) -> tuple[Write, _Chunk]:
    """Validate the arguments of a write; returns options and chunk, with their numbers as floats."""
    slots, weights, targets, predictions, gates, mask, scale = chunk
    checks.check_tensor("values", values, 2, "[N, D]")
    checks.check_tensor("slots", slots, 2, "[M, J]")
    checks.check_tensor("weights", weights, 2, "[M, J]")
    checks.check_tensor("targets", targets, 2, "[M, D]")
    checks.check_tensor("predictions", predictions, 2, "[M, D]")
    checks.check_slots("slots", slots)
    floats = {"values": values, "weights": weights, "targets": targets, "predictions": predictions}
    checks.check_like("weights", weights, "slots", slots)
    checks.check_tokens("slots", slots, slots.shape[0])
    checks.check_like("predictions", predictions, "targets", targets)
    for what, name, other, dim in (("as many rows", "slots", slots, 0), ("the width", "values", values, 1)):
        rule = f"`targets` must have {what} of `{name}`"
        checks.check_shapes(targets.shape[dim] == other.shape[dim], rule, targets, other)
    rows = {"gates": gates, "mask": mask, "scale": scale if isinstance(scale, Tensor) else None}
    for name, row in rows.items():
        if row is not None:
            checks.check_tensor(name, row, 1, "[M]")
            rule = f"`{name}` must have one entry for each row of `slots`"
            checks.check_shapes(row.shape[0] == slots.shape[0], rule, row, slots)
            if name != "mask":
                floats[name] = row
            else:
                checks.check_mask(name, row)
    for name, x in floats.items():
        checks.check_float(name, x)
    checks.check_together(**floats)
    checks.check_together(values=values, slots=slots)
    if mask is not None:
        checks.check_device("mask", mask, "values", values)
    if count_slots is not None:
        checks.check_tensor("count_slots", count_slots)
        checks.check_slots("count_slots", count_slots)
        checks.check_together(values=values, count_slots=count_slots)
    dtype = compute_dtype(values.dtype)
    lr = checks.check_number("lr", o.lr, dtype)
    if not isinstance(scale, Tensor):
        scale = checks.check_number("scale", float(slots.shape[1]) if scale is None else scale, dtype)
    weight_decay = checks.check_number("weight_decay", o.weight_decay, dtype, minimum=0)
    clip = None if o.clip is None else checks.check_number("clip", o.clip, dtype, minimum=0)
    checks.check_choice("backend", o.backend, checks.BACKENDS)
    return Write(lr, weight_decay, clip, o.backend), _Chunk(*chunk[:-1], scale)


def chunk_value_update(
    values: Tensor,
    slots: Tensor,
    weights: Tensor,
    targets: Tensor,
    predictions: Tensor,
    *,
    gates: Tensor | None = None,
    mask: Tensor | None = None,
    count_slots: Tensor | None = None,
    lr: float = 1.0,
    scale: float | Tensor | None = None,
    weight_decay: float = 0.0,
    clip: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Write a chunk: one step of gradient descent on the rows of the table that its tokens addressed.

    With e_t = predictions_t - targets_t::

        G[s] = (1 / n_s) · Σ_{(t, j): slots[t, j] = s} α_t · g_t · m_t · weights[t, j] · e_t
        new[s] = values[s] - lr · ( clamp(G[s], -clip, clip) + weight_decay · values[s] )

    n_s is the number of accesses of slot s, at least 1. Each slot's accesses are added in their order by one owner, in
    float32 (float64 for float64); a half precision table is rounded once per row. Source: FwPKM, arXiv 2601.00671, the
    memorisation step.

    Args:
        values: the table, [N, D], any strides; float32, float64, float16 or bfloat16. Never changed.
        slots: [M, J], int64 or int32, in [0, N). The range is checked on CPU tensors, also under torch.compile; on a
            GPU, where a check would synchronise, by the kernel under TRITON_DEBUG=1 only, set before the import.
        weights: [M, J], the read weights w.
        targets: y, [M, D].
        predictions: p, [M, D], what was read with these slots and weights.
        gates: g, [M]; None means 1.
        mask: m >= 0, [M], bool, integer or real; it multiplies, and gets no gradient. None means 1. Not checked for
            its sign: a negative or NaN mask multiplies too, and counts as masked.
        count_slots: the accesses that n_s is counted over, any shape, in [0, N); default: the slots of the rows with
            m > 0. The range is checked on CPU tensors, also under torch.compile; on a GPU, also under TRITON_DEBUG=1,
            what is outside counts for no slot: they address no memory and are only compared with `slots`.
        lr: the step size, a finite number in the dtype of the sums, as all numbers here. torch.compile compiles again
            for every new number, at most torch._dynamo.config.recompile_limit times (8), after which fullgraph=True
            raises. A schedule that compiles once is a tensor scale: it times f is lr times f, without clip and
            weight_decay.
        scale: α, a number or [M]; default J.
        weight_decay: >= 0; applies to every row of the table.
        clip: bound of each element of G, >= 0; None means no bound.
        backend: "auto" (Triton for GPU tensors, PyTorch for CPU tensors), "torch" or "triton".

    NaN in a target, prediction, weight or gate of a row goes to the slots of that row, also where its mask is 0: a
    factor of 0 does not hide it.

    Returns:
        A new table like `values`, also when M = 0; differentiable in values, weights, targets, predictions, gates and a
        tensor scale. Rows that no access names are bitwise those of `values` unless weight_decay > 0.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    refuse_transforms("chunk_value_update", (values, weights, targets, predictions, gates, mask, scale))
    out: Tensor = ChunkValueUpdate.apply(
        values, slots, weights, targets, predictions, gates, mask, count_slots, lr, scale, weight_decay, clip, backend
    )
    return out


def chunk_value_update_(
    values: Tensor,
    slots: Tensor,
    weights: Tensor,
    targets: Tensor,
    predictions: Tensor,
    *,
    gates: Tensor | None = None,
    mask: Tensor | None = None,
    count_slots: Tensor | None = None,
    lr: float = 1.0,
    scale: float | Tensor | None = None,
    weight_decay: float = 0.0,
    clip: float | None = None,
    backend: str = "auto",
) -> None:
    """Write a chunk into `values` itself: `chunk_value_update` in place, moving only the rows that are addressed.

    Arguments are those of `chunk_value_update`; all are read before the table is written, so they may share memory with
    it. No autograd: nothing here is differentiable. With weight_decay > 0 every row moves.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; ValueError for a table that
            requires grad, does not lie in memory row after row or column after column (so that it could overlap
            itself), is a negated view, or is an inference tensor outside of inference mode. In a compiled function the
            last two are errors of PyTorch's own, which do not name the table.
        RuntimeError: in a backward pass, where an activation checkpoint would write again: write outside of it, or let
            a policy save the operator (torch.utils.checkpoint.create_selective_checkpoint_contexts). Under a transform
            of torch.func.

    Nothing has been written by then.
    """
    chunk = _Chunk(slots, weights, targets, predictions, gates, mask, scale)
    refuse_transforms("chunk_value_update_", (values, *chunk, count_slots))
    o, chunk = _check_update(values, chunk, count_slots, Write(lr, weight_decay, clip, backend))
    checks.check_writable("values", values, "chunk_value_update")
    plan = plan_segments(slots, values.shape[0])
    counts = _count(plan, chunk, values.shape[0], count_slots)
    # The tensors are detached, since torch.export takes no block of no_grad without a result, and an error in such a
    # block leaves gradients disabled.
    chunk = _Chunk._make(x.detach() if isinstance(x, Tensor) else x for x in chunk)
    errors, write_weights = _fold_write(chunk, counts, compute_dtype(values.dtype))
    _update_inplace_op(values, errors, write_weights, list(plan), *o)
