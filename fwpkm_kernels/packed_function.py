"""Packed documents with autograd: the operators, and the Function that runs them."""

import functools
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import _checks as checks
from ._autograd import is_exporting, refuse_transforms
from ._operators import operator
from .compact import sparse_sums
from .kernels import compute_dtype
from .memory import count_most_accesses
from .options import Options, schema_of
from .packed import (
    PackedKept,
    count_sizes,
    empty_kept,
    run_packed,
    run_packed_grad,
    slots_of_values,
)
from .packing import final_decay
from .records import Inputs, Rows, VarlenOutput, each

_INPUTS = (
    "Tensor queries, Tensor targets, Tensor keys, Tensor values, Tensor cu_seqlens, Tensor? carried, Tensor? gates, "
    "Tensor? mask, Tensor? document, Tensor? slot, Tensor? value, Tensor? decay"
)


def _cuts(cu_seqlens: Tensor, carried: Tensor | None, length: int, o: Options) -> tuple[list[int], list[int] | None]:
    """The bounds of the documents, and how many carried tokens each begins with, as lists that are valid."""
    bounds = cu_seqlens.tolist()
    checks.check_bounds(bounds, length, may_end_before=carried is not None)
    if carried is None:
        return bounds, None
    before = carried.tolist()
    allowed = (0, o.lookahead if o.boundary == "carry" else 0)
    for number, (count, (start, stop)) in enumerate(zip(before, pairwise(bounds), strict=True)):
        if count not in allowed or count > stop - start:
            raise ValueError(
                f"`carried` must be {' or '.join(map(str, sorted(set(allowed))))}, and no more than a document has "
                f"tokens, got {count} for document {number} of {stop - start} tokens"
            )
    return bounds, before


@operator("fast_weight_memory_varlen", schema=f"({_INPUTS}, bool keep, {schema_of(Options)}) -> Tensor[]")
def _forward_op(  # type: ignore[no-untyped-def]
    queries, targets, keys, values, cu_seqlens, carried, gates, mask, document, slot, value, decay, keep, *options
) -> list[Tensor]:
    """`carried` [S], int64, on the CPU: how many of its first tokens each document has read before, 0 or `lookahead`.

    They have no output: it and the weights are 0 there, and slots -1. With `carried` all that holds for tokens behind
    the last of `cu_seqlens` too, which then may be less than T.
    """
    o, rows = Options(*options), None if value is None else Rows(document, slot, value, decay)
    # Here the tokens of a carry, which are read again, count too.
    checks.check_num_accesses(queries, count_most_accesses(queries, o.chunk_size, o.lookahead, o.top_k))
    bounds, before = _cuts(cu_seqlens, carried, len(queries), o)
    check_rows(rows, len(bounds) - 1, values)
    inputs = Inputs(queries, targets, keys, values, gates, mask)
    (output, new_keys, left, slots, weights), kept = run_packed(inputs, bounds, before, rows, keep, o)
    return [output, new_keys, *left[:3], slots, weights, *(kept or ())]


@_forward_op.register_fake
def _(  # type: ignore[no-untyped-def]
    queries, targets, keys, values, cu_seqlens, carried, gates, mask, document, slot, value, decay, keep, *options
):
    o, documents = Options(*options), cu_seqlens.shape[0] - 1
    picks, earlier = queries.shape[1] * o.top_k, 0 if slot is None else slot.shape[0]
    size = (queries.shape[0], picks)
    _, num_rows = count_sizes(size[0], documents, picks, values.shape[0], earlier, o)
    results = [
        queries.new_empty(targets.shape, dtype=targets.dtype),
        keys.new_empty(documents, *keys.shape[-4:]),
        *(queries.new_empty(num_rows, dtype=torch.int64) for _ in range(2)),
        values.new_empty(num_rows, values.shape[1]),
        queries.new_empty(size, dtype=torch.int64),
        queries.new_empty(size, dtype=compute_dtype(values.dtype)),
    ]
    return [*results, *(empty_kept(queries, keys, values, documents, earlier, o) if keep else ())]


_KEPT = ", ".join(f"Tensor {name}" for name in PackedKept._fields)


@operator(
    "fast_weight_memory_varlen_backward",
    schema="(Tensor? grad_output, Tensor? grad_keys, Tensor? grad_rows, Tensor queries, Tensor targets, Tensor keys, "
    "SymInt num_slots, Tensor cu_seqlens, Tensor? carried, Tensor? gates, Tensor? mask, "
    "Tensor row_document, Tensor row_slot, Tensor? decay, bool with_addresses, bool with_values, bool spread, "
    f"str group, {_KEPT}, {schema_of(Options)}) -> Tensor[]",
)
def _backward_op(  # type: ignore[no-untyped-def]
    grad_output, grad_keys, grad_rows, queries, targets, keys, num_slots, cu_seqlens, carried, gates, mask, document,
    slot, decay, with_addresses, with_values, spread, group, *rest,
) -> list[Tensor]:  # fmt: skip
    kept, o = PackedKept(*rest[: len(PackedKept._fields)]), Options(*rest[len(PackedKept._fields) :])
    grads, how = (grad_output, grad_keys, grad_rows), (decay, with_addresses, with_values, spread, group)
    cuts = _cuts(cu_seqlens, carried, len(queries), o)
    results = run_packed_grad(
        queries, targets, keys, num_slots, gates, mask, *cuts, grads, document, slot, kept, *how, o
    )
    return [x for x in results if x is not None]


@_backward_op.register_fake
def _(  # type: ignore[no-untyped-def]
    grad_output, grad_keys, grad_rows, queries, targets, keys, num_slots, cu_seqlens, carried, gates, mask, document,
    slot, decay, with_addresses, with_values, spread, group, *rest,
):  # fmt: skip
    kept = PackedKept(*rest[: len(PackedKept._fields)])
    num_rows, dtype = (num_slots, kept.log.dtype) if spread else (slot.shape[0], compute_dtype(kept.log.dtype))
    results = [
        queries.new_empty(queries.shape if with_addresses else 0),
        targets.new_empty(targets.shape),
        keys.new_empty(keys.shape if with_addresses else 0),
        targets.new_empty((num_rows, targets.shape[1]), dtype=dtype) if with_values else kept.log.new_empty(0),
        *(() if gates is None else (gates.new_empty(gates.shape),)),
        kept.log.new_empty(kept.earlier.shape[0], targets.shape[1]),
    ]
    return results


class _VarlenBackward(Function):
    """First derivatives, that of the values dense or sparse; differentiating them again raises."""

    @staticmethod
    def forward(ctx: Any, sum_values: Callable[[Tensor], Tensor] | None, *args: Any) -> Any:
        results = _backward_op(*args)
        if sum_values is not None:
            results[3] = sum_values(results[3])
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("fast_weight_memory_varlen cannot be differentiated twice")


class _Varlen(Function):
    """apply(queries, targets, keys, values, cu_seqlens, carried, gates, mask, document, slot, value, decay,
    sparse_grad, group, *options) gives output, keys, document, slot, value, slots and weights."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        tensors, sparse_grad, group, options = args[:12], args[12], args[13], args[14:]
        results = _forward_op(*tensors, True, *options)
        output, keys, document, slot, value, slots, weights, *kept = results
        # The table is not needed again.
        ctx.save_for_backward(*tensors[:3], *tensors[4:8], document, slot, tensors[11], *kept)
        ctx.mark_non_differentiable(document, slot, slots, weights)
        ctx.options, ctx.num_slots, ctx.sparse_grad, ctx.group = options, tensors[3].shape[0], sparse_grad, group
        return output, keys, document, slot, value, slots, weights

    @staticmethod
    def backward(ctx: Any, grad_output: Any, grad_keys: Any, _d: Any, _s: Any, grad_rows: Any, *_: Any) -> Any:
        grads, needs = (grad_output, grad_keys, grad_rows), ctx.needs_input_grad
        if all(grad is None for grad in grads):
            return (None,) * len(needs)
        saved = ctx.saved_tensors  # once, since activation checkpoints give them out once
        inputs, kept = saved[:10], PackedKept(*saved[10:])
        refuse_transforms("fast_weight_memory_varlen", (*grads, *inputs))
        flags = (needs[0] or needs[2], needs[3], not ctx.sparse_grad, ctx.group)
        sum_values = None
        if needs[3] and ctx.sparse_grad:
            slot, backend = slots_of_values(inputs[8], kept.earlier), Options(*ctx.options).backend
            of_table = {"num_slots": ctx.num_slots, "dtype": kept.log.dtype}
            sum_values = functools.partial(sparse_sums, slot=slot, **of_table, backend=backend)
        grad_queries, grad_targets, grad_keys, grad_values, *grad_gates, grad_value = _VarlenBackward.apply(
            sum_values, *grads, *inputs[:3], ctx.num_slots, *inputs[3:], *flags, *kept, *ctx.options
        )
        of_tokens = (grad_queries, grad_targets, grad_keys, grad_values, None, None, *(grad_gates or (None,)), None)
        found = (*of_tokens, None, None, grad_value)
        wanted = (x if is_needed else None for x, is_needed in zip(found, needs, strict=False))
        return (*wanted, *(None,) * (len(needs) - len(found)))


def run_documents(
    inputs: Inputs,
    cu_seqlens: Tensor,
    carried: Tensor | None,
    rows: Rows | None,
    sparse_grad: bool,
    o: Options,
    group: str = "",
) -> VarlenOutput:
    """The memories with or without gradients, by the operator, whose `carried` this is."""
    given = (None,) * 4 if rows is None else rows
    tensors = (*inputs[:4], cu_seqlens, carried, *inputs[4:], *given)
    # A program of torch.export has no gradients, so it keeps nothing for them.
    differentiable = torch.is_grad_enabled() and not is_exporting()
    if differentiable and any(x is not None and x.requires_grad for x in (*inputs[:-1], given[2])):
        results = _Varlen.apply(*tensors, sparse_grad, group, *o)
    else:
        results = _forward_op(*each(Tensor.detach, *tensors), False, *o)
    output, new_keys, document, slot, value, slots, weights = results
    decay = final_decay(cu_seqlens, carried, given[3], inputs.values, o)
    return VarlenOutput(output, new_keys, Rows(document, slot, value, decay), slots, weights)


def check_rows(rows: Rows | None, documents: int, values: Tensor, name: str = "rows") -> None:
    """On CPU tensors: rows name documents and slots that there are, none of them twice."""
    if rows is None or not rows.slot.is_cpu:
        return
    checks.check_slot_range(f"{name}.slot", rows.slot, len(values), minimum=-1)
    used = rows.slot >= 0
    document = rows.document[used]
    checks.check_slot_range(f"{name}.document", document, documents)
    names = (document.long() * len(values) + rows.slot[used]).sort().values
    twice = (names[1:] == names[:-1]).nonzero()
    if len(twice) > 0:
        number, slot = divmod(int(names[twice[0, 0]]), len(values))
        raise ValueError(
            f"`{name}` must hold no slot of a document twice, got document {number}, slot {slot} more than once"
        )
