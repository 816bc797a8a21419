"""The chunk write: one gradient step on the rows that a chunk addressed."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from . import _checks as checks
from .gather import row_dots
from .kernels import compute_dtype
from .plan import Plan, check_rows, count_accesses, count_among, plan_segments, segment_totals


def _clamp(totals: Tensor, clip: float | None) -> Tensor:
    return totals if clip is None else totals.clamp(-clip, clip)


@torch.library.custom_op("fwpkm_kernels::chunk_value_update", mutates_args=())
def _update_op(
    values: Tensor,
    errors: Tensor,
    write_weights: Tensor,
    order: Tensor,
    rows: Tensor,
    start: Tensor,
    end: Tensor,
    lr: float,
    weight_decay: float,
    clip: float | None,
    backend: str,
) -> Tensor:
    plan = Plan(order, rows, start, end)
    check_rows(plan, values.shape[0])
    decay = 1.0 - lr * weight_decay
    out = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    out.copy_(values) if weight_decay == 0.0 else torch.mul(values, decay, out=out)
    if checks.use_triton(backend, values):
        from .kernels.update import update

        update(values, out, errors, write_weights, *plan, lr=lr, weight_decay=weight_decay, clip=clip)
    else:
        _, touched, totals = segment_totals(plan, errors, write_weights)
        out[touched] = (decay * values[touched].to(totals.dtype) - lr * _clamp(totals, clip)).to(out.dtype)
    return out


@_update_op.register_fake
def _(values, errors, write_weights, order, rows, start, end, lr, weight_decay, clip, backend):  # type: ignore[no-untyped-def]
    return values.new_empty(values.shape)


@torch.library.custom_op("fwpkm_kernels::chunk_value_update_", mutates_args=("values",))
def _update_inplace_op(
    values: Tensor,
    errors: Tensor,
    write_weights: Tensor,
    order: Tensor,
    rows: Tensor,
    start: Tensor,
    end: Tensor,
    lr: float,
    weight_decay: float,
    clip: float | None,
    backend: str,
) -> None:
    plan = Plan(order, rows, start, end)
    check_rows(plan, values.shape[0])
    if checks.use_triton(backend, values):
        from .kernels.update import update

        update(values, values, errors, write_weights, *plan, lr=lr, weight_decay=weight_decay, clip=clip)
        return
    decay = 1.0 - lr * weight_decay
    _, touched, totals = segment_totals(plan, errors, write_weights)
    new_rows = (decay * values[touched].to(totals.dtype) - lr * _clamp(totals, clip)).to(values.dtype)
    if weight_decay != 0.0:
        values.mul_(decay)
    values[touched] = new_rows


@torch.library.custom_op("fwpkm_kernels::chunk_value_update_backward", mutates_args=())
def _update_grad_op(
    grad_values: Tensor,
    errors: Tensor,
    write_weights: Tensor,
    slots: Tensor,
    order: Tensor,
    rows: Tensor,
    start: Tensor,
    end: Tensor,
    lr: float,
    clip: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """r = Σ_j c_j·Ĝ'[slot_j], [M, D], and <Ĝ'[slot_j], e>, [M, J]; Ĝ' = lr·G', and 0 where the clamp was active."""
    plan = Plan(order, rows, start, end)
    if checks.use_triton(backend, grad_values):
        from .kernels.update import update_grad

        return update_grad(grad_values, errors, write_weights, slots, *plan, lr=lr, clip=clip)
    positions, touched, totals = segment_totals(plan, errors, write_weights)
    step_grad = lr * grad_values[touched].to(totals.dtype)  # [U, D]
    if clip is not None:
        step_grad = torch.where(totals.abs() <= clip, step_grad, 0.0)
    # Which of the U distinct rows each access touches.
    segments = torch.searchsorted(positions, start, right=True) - 1
    compact_slots = torch.empty_like(segments).scatter_(0, order, segments).view(slots.shape)
    dots = row_dots(step_grad, compact_slots, errors)
    if compact_slots.numel() == 0:
        return torch.zeros_like(errors), dots
    sums = torch.nn.functional.embedding_bag(
        compact_slots, step_grad, mode="sum", per_sample_weights=write_weights.contiguous()
    )
    return sums, dots


@_update_grad_op.register_fake
def _(grad_values, errors, write_weights, slots, order, rows, start, end, lr, clip, backend):  # type: ignore[no-untyped-def]
    return errors.new_empty(errors.shape), errors.new_empty(slots.shape)


class _Write(NamedTuple):
    """One write, folded: everything that multiplies the error is in the write weights c = α·g·m·w / n_s."""

    plan: Plan
    errors: Tensor  #: e = p - y, [M, D]
    write_weights: Tensor  #: c, [M, J]
    counts: Tensor  #: n_s of each access, [M, J]


def _fold_write(
    num_slots: int,
    dtype: torch.dtype,
    slots: Tensor,
    weights: Tensor,
    targets: Tensor,
    predictions: Tensor,
    gates: Tensor | None,
    mask: Tensor | None,
    count_slots: Tensor | None,
    scale: float | Tensor,
) -> _Write:
    plan = plan_segments(slots, num_slots)
    if count_slots is not None:
        counts = count_among(slots, count_slots)
    elif mask is not None:
        # Masked rows count as accesses of a slot that does not exist.
        counts = count_among(slots, torch.where((mask > 0).unsqueeze(1), slots, num_slots))
    else:
        counts = count_accesses(plan).view(slots.shape)
    write_weights = weights.to(dtype) / counts
    for factor in (scale, gates, mask):
        if isinstance(factor, Tensor):
            write_weights = write_weights * factor.to(dtype).unsqueeze(1)
        elif factor is not None:
            write_weights = write_weights * factor
    errors = predictions.to(dtype) - targets.to(dtype)
    return _Write(plan, errors.contiguous(), write_weights.contiguous(), counts)


class _ChunkValueUpdateBackward(Function):
    """First derivatives; differentiating them again raises."""

    @staticmethod
    def forward(
        ctx: Any,
        grad_values: Tensor,
        slots: Tensor,
        weights: Tensor,
        targets: Tensor,
        predictions: Tensor,
        gates: Tensor | None,
        mask: Tensor | None,
        count_slots: Tensor | None,
        lr: float,
        scale: float | Tensor,
        clip: float | None,
        backend: str,
    ) -> Any:
        dtype = compute_dtype(grad_values.dtype)
        write = _fold_write(
            grad_values.shape[0], dtype, slots, weights, targets, predictions, gates, mask, count_slots, scale
        )
        sums, dots = _update_grad_op(
            grad_values, write.errors, write.write_weights, slots, *write.plan, lr, clip, backend
        )
        # dc = -dots; c = w · (α·g·m) / n_s, whose row factor is taken apart one name at a time.
        per_weight = -dots / write.counts
        factors = {"scale": scale, "gates": gates, "mask": mask}
        row_factors = {k: f.to(dtype) if isinstance(f, Tensor) else f for k, f in factors.items() if f is not None}

        def times_all_but(grad: Tensor, name: str) -> Tensor:
            for other, factor in row_factors.items():
                if other != name:
                    grad = grad * (factor.view(-1, *[1] * (grad.dim() - 1)) if isinstance(factor, Tensor) else factor)
            return grad

        per_row = (per_weight * weights.to(dtype)).sum(1)
        return (
            times_all_but(per_weight, "").to(weights.dtype),
            sums.to(targets.dtype),
            (-sums).to(predictions.dtype),
            None if gates is None else times_all_but(per_row, "gates").to(gates.dtype),
            times_all_but(per_row, "scale").to(scale.dtype) if isinstance(scale, Tensor) else None,
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
        """Validate and write into a new table; backward keeps small inputs and neither of the two tables."""
        _check_update(
            values,
            slots,
            weights,
            targets,
            predictions,
            gates,
            mask,
            count_slots,
            lr,
            scale,
            weight_decay,
            clip,
            backend,
        )
        scale = float(slots.shape[1]) if scale is None else scale
        write = _fold_write(
            values.shape[0],
            compute_dtype(values.dtype),
            slots,
            weights,
            targets,
            predictions,
            gates,
            mask,
            count_slots,
            scale,
        )
        lr, weight_decay, clip = float(lr), float(weight_decay), None if clip is None else float(clip)
        out = _update_op(values, write.errors, write.write_weights, *write.plan, lr, weight_decay, clip, backend)
        tensor_scale = scale if isinstance(scale, Tensor) else None
        ctx.save_for_backward(slots, weights, targets, predictions, gates, mask, count_slots, tensor_scale)
        ctx.set_materialize_grads(False)
        ctx.options = (lr, None if tensor_scale is not None else scale, weight_decay, clip, backend)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None) -> Any:
        """The closed form: gathers of the incoming gradient at the rows that were written."""
        if grad_out is None or not any(ctx.needs_input_grad):
            return (None,) * 13
        slots, weights, targets, predictions, gates, mask, count_slots, tensor_scale = ctx.saved_tensors
        lr, scale, weight_decay, clip, backend = ctx.options
        grad_values = grad_weights = grad_targets = grad_predictions = grad_gates = grad_scale = None
        if ctx.needs_input_grad[0]:
            grad_values = grad_out if weight_decay == 0.0 else grad_out * (1.0 - lr * weight_decay)
        if any(ctx.needs_input_grad[1:]):
            grad_weights, grad_targets, grad_predictions, grad_gates, grad_scale = _ChunkValueUpdateBackward.apply(
                grad_out,
                slots,
                weights,
                targets,
                predictions,
                gates,
                mask,
                count_slots,
                lr,
                scale if tensor_scale is None else tensor_scale,
                clip,
                backend,
            )
        return (
            grad_values,
            None,
            grad_weights,
            grad_targets,
            grad_predictions,
            grad_gates,
            None,
            None,
            None,
            grad_scale,
            None,
            None,
            None,
        )


def _check_update(
    values: Tensor,
    slots: Tensor,
    weights: Tensor,
    targets: Tensor,
    predictions: Tensor,
    gates: Tensor | None,
    mask: Tensor | None,
    count_slots: Tensor | None,
    lr: float,
    scale: float | Tensor | None,
    weight_decay: float,
    clip: float | None,
    backend: str,
) -> None:
    checks.check_tensor("values", values, 2, "[N, D]")
    checks.check_tensor("slots", slots, 2, "[M, J]")
    checks.check_tensor("weights", weights, 2, "[M, J]")
    checks.check_tensor("targets", targets, 2, "[M, D]")
    checks.check_tensor("predictions", predictions, 2, "[M, D]")
    checks.check_slots("slots", slots)
    floats = {"values": values, "weights": weights, "targets": targets, "predictions": predictions}
    checks.check_like("weights", weights, "slots", slots)
    checks.check_like("predictions", predictions, "targets", targets)
    for name, x, other_name, other, dim in (
        ("targets", targets, "slots", slots, 0),
        ("targets", targets, "values", values, 1),
    ):
        if x.shape[dim] != other.shape[dim]:
            what = ("as many rows", "the width")[dim]
            raise ValueError(
                f"`{name}` must have {what} of `{other_name}`, got {checks.shape(x)} against {checks.shape(other)}"
            )
    rows = {"gates": gates, "mask": mask, "scale": scale if isinstance(scale, Tensor) else None}
    for name, row in rows.items():
        if row is not None:
            checks.check_tensor(name, row, 1, "[M]")
            if row.shape[0] != slots.shape[0]:
                raise ValueError(
                    f"`{name}` must have one entry for each row of `slots`, "
                    f"got {checks.shape(row)} against {checks.shape(slots)}"
                )
            if name != "mask":
                floats[name] = row
            elif row.is_complex():
                raise TypeError(f"`mask` must be bool, integer or real, got {row.dtype}")
    for name, x in floats.items():
        checks.check_float(name, x)
    checks.check_together(**floats)
    checks.check_together(values=values, slots=slots)
    if mask is not None and mask.device != values.device:
        raise ValueError(f"`mask` must be on the device of `values`, got {mask.device} against {values.device}")
    if count_slots is not None:
        checks.check_tensor("count_slots", count_slots)
        checks.check_slots("count_slots", count_slots)
        checks.check_together(values=values, count_slots=count_slots)
    checks.check_number("lr", lr)
    if not isinstance(scale, Tensor) and scale is not None:
        checks.check_number("scale", scale)
    checks.check_number("weight_decay", weight_decay, minimum=0)
    if clip is not None:
        checks.check_number("clip", clip, minimum=0)
    checks.check_choice("backend", backend, checks.BACKENDS)


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
        slots: [M, J], int64 or int32, in [0, N); the range is checked on CPU tensors only.
        weights: [M, J], the read weights w.
        targets: y, [M, D].
        predictions: p, [M, D], what was read with these slots and weights.
        gates: g, [M]; None means 1.
        mask: m >= 0, [M], bool, integer or real; it multiplies. None means 1.
        count_slots: the accesses that n_s is counted over, any shape; default: the slots of the rows with m > 0.
        lr: the step size, a finite number.
        scale: α, a finite number or [M]; default J.
        weight_decay: >= 0; applies to every row of the table.
        clip: bound of each element of G, >= 0; None means no bound.
        backend: "auto" (Triton for GPU tensors, PyTorch for CPU tensors), "torch" or "triton".

    Returns:
        A new table like `values`, also when M = 0; differentiable in values, weights, targets, predictions, gates and a
        tensor scale. Rows that no access names are bitwise those of `values` unless weight_decay > 0.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
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

    Arguments are those of `chunk_value_update`. No autograd: nothing here is differentiable. With weight_decay > 0
    every row moves.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; ValueError for a table that
            requires grad. Nothing has been written by then.
    """
    _check_update(
        values, slots, weights, targets, predictions, gates, mask, count_slots, lr, scale, weight_decay, clip, backend
    )
    if values.requires_grad:
        raise ValueError("`values` must not require grad to be written in place; use chunk_value_update")
    with torch.no_grad():
        write = _fold_write(
            values.shape[0],
            compute_dtype(values.dtype),
            slots,
            weights,
            targets,
            predictions,
            gates,
            mask,
            count_slots,
            float(slots.shape[1]) if scale is None else scale,
        )
        _update_inplace_op(
            values,
            write.errors,
            write.write_weights,
            *write.plan,
            float(lr),
            float(weight_decay),
            None if clip is None else float(clip),
            backend,
        )
