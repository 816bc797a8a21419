"""A memory for each of several packed documents: operators, the autograd Function, checks, and the public function."""

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import _checks as checks
from ._autograd import is_exporting, refuse_transforms
from ._operators import operator
from .documents import Documents, DocumentsOutput, check_bounds, memory_by_document, put_back, take
from .kernels import compute_dtype
from .memory import check_memory
from .options import Options, schema_of
from .packed import PackedKept, count_sizes, empty_kept, run_packed, run_packed_grad
from .records import DocumentsCarry, Inputs, Rows, VarlenOutput, each

_INPUTS = (
    "Tensor queries, Tensor targets, Tensor keys, Tensor values, Tensor cu_seqlens, Tensor? gates, Tensor? mask, "
    "Tensor? document, Tensor? slot, Tensor? value"
)


@operator("fast_weight_memory_varlen", schema=f"({_INPUTS}, bool keep, {schema_of(Options)}) -> Tensor[]")
def _forward_op(  # type: ignore[no-untyped-def]
    queries, targets, keys, values, cu_seqlens, gates, mask, document, slot, value, keep, *options
) -> list[Tensor]:
    bounds, rows = cu_seqlens.tolist(), None if value is None else Rows(document, slot, value)
    check_bounds(bounds, len(queries))
    _check_rows(rows, len(bounds) - 1, values)
    inputs = Inputs(queries, targets, keys, values, gates, mask)
    (output, new_keys, left, slots, weights), kept = run_packed(inputs, bounds, rows, keep, Options(*options))
    return [output, new_keys, *left, slots, weights, *(kept or ())]


@_forward_op.register_fake
def _(  # type: ignore[no-untyped-def]
    queries, targets, keys, values, cu_seqlens, gates, mask, document, slot, value, keep, *options
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
    "SymInt num_slots, Tensor cu_seqlens, Tensor? gates, Tensor? mask, Tensor row_document, Tensor row_slot, "
    f"bool with_addresses, bool with_values, {_KEPT}, {schema_of(Options)}) -> Tensor[]",
)
def _backward_op(  # type: ignore[no-untyped-def]
    grad_output, grad_keys, grad_rows, queries, targets, keys, num_slots, cu_seqlens, gates, mask, document, slot,
    with_addresses, with_values, *rest,
) -> list[Tensor]:  # fmt: skip
    kept, o = PackedKept(*rest[: len(PackedKept._fields)]), Options(*rest[len(PackedKept._fields) :])
    bounds, grads, flags = cu_seqlens.tolist(), (grad_output, grad_keys, grad_rows), (with_addresses, with_values)
    results = run_packed_grad(
        queries, targets, keys, num_slots, gates, mask, bounds, grads, document, slot, kept, *flags, o
    )
    return [x for x in results if x is not None]


@_backward_op.register_fake
def _(  # type: ignore[no-untyped-def]
    grad_output, grad_keys, grad_rows, queries, targets, keys, num_slots, cu_seqlens, gates, mask, document, slot,
    with_addresses, with_values, *rest,
):  # fmt: skip
    kept = PackedKept(*rest[: len(PackedKept._fields)])
    results = [
        queries.new_empty(queries.shape if with_addresses else 0),
        targets.new_empty(targets.shape),
        keys.new_empty(keys.shape if with_addresses else 0),
        kept.log.new_empty((num_slots, targets.shape[1]) if with_values else 0),
        *(() if gates is None else (gates.new_empty(gates.shape),)),
        kept.log.new_empty(kept.earlier.shape[0], targets.shape[1]),
    ]
    return results


class _VarlenBackward(Function):
    """First derivatives; differentiating them again raises."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        return tuple(_backward_op(*args))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("fast_weight_memory_varlen cannot be differentiated twice")


class _Varlen(Function):
    """apply(queries, targets, keys, values, cu_seqlens, gates, mask, document, slot, value, *options) gives output,
    keys, document, slot, value, slots and weights."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        tensors, options = args[:10], args[10:]
        results = _forward_op(*tensors, True, *options)
        output, keys, document, slot, value, slots, weights, *kept = results
        ctx.save_for_backward(*tensors[:3], *tensors[4:7], document, slot, *kept)  # the table is not needed again
        ctx.mark_non_differentiable(document, slot, slots, weights)
        ctx.options, ctx.num_slots = options, tensors[3].shape[0]
        return output, keys, document, slot, value, slots, weights

    @staticmethod
    def backward(ctx: Any, grad_output: Any, grad_keys: Any, _d: Any, _s: Any, grad_rows: Any, *_: Any) -> Any:
        grads, none = (grad_output, grad_keys, grad_rows), (None,) * len(ctx.options)
        if all(grad is None for grad in grads):
            return (None,) * 10 + none
        saved = ctx.saved_tensors  # once, since activation checkpoints give them out once
        queries, targets, keys, *others = saved[:8]
        refuse_transforms("fast_weight_memory_varlen", (*grads, *saved[:8]))
        needs = ctx.needs_input_grad
        flags = (needs[0] or needs[2], needs[3])
        grad_queries, grad_targets, grad_keys, grad_values, *grad_gates, grad_value = _VarlenBackward.apply(
            *grads, queries, targets, keys, ctx.num_slots, *others, *flags, *saved[8:], *ctx.options
        )
        found = (grad_queries, grad_targets, grad_keys, grad_values, None, *(grad_gates or (None,)), None, None, None)
        found = (*found, grad_value)
        return (*(x if is_needed else None for x, is_needed in zip(found, needs, strict=False)), *none)


def _check_rows(rows: Rows | None, documents: int, values: Tensor) -> None:
    """On CPU tensors: rows name documents and slots that there are, none of them twice."""
    if rows is None or not rows.slot.is_cpu:
        return
    checks.check_slot_range("rows.slot", rows.slot, len(values), minimum=-1)
    used = rows.slot >= 0
    document = rows.document[used]
    checks.check_slot_range("rows.document", document, documents)
    names = (document.long() * len(values) + rows.slot[used]).sort().values
    twice = (names[1:] == names[:-1]).nonzero()
    if len(twice) > 0:
        name = int(names[twice[0, 0]])
        raise ValueError(
            "`rows` must hold no slot of a document twice, got document "
            f"{name // len(values)}, slot {name % len(values)} more than once"
        )


def _check_varlen(inputs: Inputs, cu_seqlens: Tensor, rows: Rows | None, o: Options) -> Options:
    """Validate the arguments; returns the options with their numbers as ints and floats."""
    queries, keys, values = inputs.queries, inputs.keys, inputs.values
    checks.check_tensor("cu_seqlens", cu_seqlens, 1, "[S + 1]")
    checks.check_slots("cu_seqlens", cu_seqlens)
    if cu_seqlens.is_meta:
        raise ValueError("`cu_seqlens` must have data, on the cpu, got a tensor on meta")
    if cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"`cu_seqlens` [S + 1] must hold the bounds of at least one document, got shape {checks.shape(cu_seqlens)}"
        )
    documents = cu_seqlens.shape[0] - 1
    checks.check_tensor("keys", keys)
    if keys.dim() == 5:
        rule = "`keys` [S, H, 2, n, Dk/2] must have keys for each of the S documents of `cu_seqlens` [S + 1]"
        checks.check_shapes(keys.shape[0] == documents, rule, keys, cu_seqlens)
        inputs = inputs._replace(keys=keys.flatten(0, 1)[: keys.shape[1]])  # as if all had those of the first
    o = check_memory(inputs, o, tokens="T")
    if cu_seqlens.is_cpu and not torch.compiler.is_compiling():
        check_bounds(cu_seqlens.tolist(), queries.shape[0])
    if documents * keys.shape[-4] > checks.MOST_HEADS:
        raise ValueError(
            f"`cu_seqlens` must hold at most {checks.MOST_HEADS} documents (times heads), got {documents} documents"
        )
    if rows is not None:
        if not isinstance(rows, Rows):
            raise TypeError(f"`rows` must be Rows(document, slot, value), got {type(rows).__name__}")
        checks.check_tensor("rows.document", rows.document, 1, "[R]")
        checks.check_tensor("rows.slot", rows.slot, 1, "[R]")
        checks.check_tensor("rows.value", rows.value, 2, "[R, D]")
        checks.check_like("rows.document", rows.document, "rows.slot", rows.slot)
        rule = "`rows.value` [R, D] must have a row for each of `rows.slot` [R], as wide as `values`"
        checks.check_shapes(rows.value.shape == (*rows.slot.shape, values.shape[1]), rule, rows.value, values)
        for name, x in (("rows.document", rows.document), ("rows.slot", rows.slot)):
            if x.dtype != torch.int64:
                raise TypeError(f"`{name}` must be int64, got {x.dtype}")
            checks.check_device(name, x, "values", values)
        if rows.value.dtype != values.dtype:
            raise TypeError(f"`rows.value` must have the dtype of `values`, {values.dtype}, got {rows.value.dtype}")
        checks.check_device("rows.value", rows.value, "values", values)
        if not torch.compiler.is_compiling():
            _check_rows(rows, documents, values)
    return o


def _by_document(inputs: Inputs, cu_seqlens: Tensor, rows: Rows | None, o: Options) -> VarlenOutput:
    """The loop over documents, each with a table of its own, all of whose rows are handed out."""
    queries, targets, keys, values, gates, mask = inputs
    num_documents, num_slots = cu_seqlens.shape[0] - 1, values.shape[0]
    tables = values
    if rows is not None:
        tables = values.expand(num_documents, *values.shape).flatten(0, 1)
        place = torch.where(rows.slot < 0, len(tables), rows.document * num_slots + rows.slot)
        padded = torch.cat((tables, tables.new_zeros(1, values.shape[1])))
        tables = padded.index_put((place,), rows.value)[:-1].unflatten(0, (num_documents, num_slots))
    documents = Documents(1, queries.shape[0], None, cu_seqlens, None)
    q, y, g, m = each(lambda x: x.unsqueeze(0), queries, targets, gates, mask)
    result = memory_by_document(q, y, keys, tables, documents, gates=g, mask=m, return_memory=True, options=o)  # type: ignore[arg-type]
    assert result.keys is not None
    assert result.values is not None
    names = torch.arange(num_documents * num_slots, device=values.device)
    left = Rows(names // num_slots, names % num_slots, result.values.flatten(0, 1))
    return VarlenOutput(result.output[0], result.keys, left, result.slots[0], result.weights[0])


def memory_of_documents(
    queries: Tensor,
    targets: Tensor,
    keys: Tensor,
    values: Tensor,
    documents: Documents,
    *,
    gates: Tensor | None = None,
    carry: DocumentsCarry | None = None,
    return_memory: bool = False,
    options: Options,
) -> DocumentsOutput:
    """What `memory_by_document` gives, without a loop where `fast_weight_memory_varlen` can do it.

    It cannot where a table or a carry for each document is given or asked for, where keys depend on values, with more
    documents than its kernels number, and in compiled code with padding, whose number is data.
    """
    loops = return_memory or values.dim() == 3 or options.key_gradient == "all" or documents.number == 0
    loops = loops or documents.number * keys.shape[-4] > checks.MOST_HEADS
    if carry is not None or loops or (documents.mask is not None and torch.compiler.is_compiling()):
        how: dict[str, Any] = {"gates": gates, "carry": carry, "return_memory": return_memory, "options": options}
        return memory_by_document(queries, targets, keys, values, documents, **how)
    if documents.mask is None:
        pieces: list[Any] = [slice(0, documents.batch * documents.length)]
        cu_seqlens = documents.cu_seqlens if documents.cu_seqlens_cpu is None else documents.cu_seqlens_cpu
        if cu_seqlens is None:
            cu_seqlens = torch.arange(documents.batch + 1, device="cpu") * documents.length
    else:
        pieces = documents.pieces()
        lengths = [len(x) if isinstance(x, Tensor) else x.stop - x.start for x in pieces]
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], device="cpu")

    def pack(x: Tensor | None) -> Tensor | None:
        return x if x is None else x.flatten(0, 1) if documents.mask is None else torch.cat(take(x, pieces), 1)[0]

    q, y, g = (pack(x) for x in (queries, targets, gates))
    result = fast_weight_memory_varlen(q, y, keys, values, cu_seqlens, gates=g, **options._asdict())  # type: ignore[arg-type]
    fills = ((result.output, 0), (result.slots, -1), (result.weights, 0))
    output, slots, weights = (put_back([x.unsqueeze(0)], pieces, targets, fill) for x, fill in fills)
    return DocumentsOutput(output, slots, weights, None, None)


def fast_weight_memory_varlen(
    queries: Tensor,
    targets: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    rows: Rows | None = None,
    gates: Tensor | None = None,
    mask: Tensor | None = None,
    chunk_size: int = 512,
    top_k: int = 8,
    lookahead: int = 1,
    score: str = "idw",
    eps: float = 1e-3,
    weighting: str = "softmax",
    temperature: float = 1.0,
    lr: float = 1.0,
    weight_decay: float = 0.0,
    clip: float | None = None,
    addressing_weight: float = 1.0,
    key_gradient: str = "addressing",
    step: str = "paper",
    boundary: str = "carry",
    precision: str = "tf32x3",
    backend: str = "auto",
) -> VarlenOutput:
    """`fast_weight_memory` for each of several documents that are packed one behind the other, all in one call.

    Document s is the tokens from cu_seqlens[s] to cu_seqlens[s + 1]. Its results are those of::

        fast_weight_memory(queries[None, start:stop], targets[None, start:stop], keys, values, ...)

    so chunks begin anew with it, no pair crosses its borders, and clamps, counts and key steps are its own. It depends
    on no other document: which ones share the call, and in which order, changes no bit of it on GPUs. Documents may be
    empty. All that they share are the initial keys and values, whose gradients are sums over the documents.

    A table for each document is never made. The rows that a document addresses are known before the first value is
    read; they are gathered once, from `rows` or else from `values`, read and written there, and handed out as `rows`:
    the next segments of the documents go on from these, and from the final keys, differentiably. (As each call starts
    with an empty queue, that is one sequence only if segments end where chunks do, with lookahead 0.)

    Args:
        queries: [T, H, Dk]: the tokens of all documents.
        targets: [T, D].
        keys: [H, 2, n, Dk/2], with which all documents begin; or [S, H, 2, n, Dk/2], those of each.
        values: [N, D], N = n²; never changed, as all inputs.
        cu_seqlens: [S + 1], int32 or int64, from 0 to T, not decreasing; on the CPU. Elsewhere it is copied, which
            waits for the device. Values are checked where they are known: on the CPU, and in the operator.
        rows: Rows(document, slot, value), int64 [Q], int64 [Q], [Q, D], in the dtype of `values`: rows that a document
            reads instead of those of `values`. A place with slot -1 is unused. No slot of a document occurs twice, and
            all are in range, which is checked on the CPU; on a GPU one of the two is read.
        gates: [T], write gates; None is all ones.
        mask: [T], bool, integer or real, >= 0, as in `fast_weight_memory`; None is all ones.
        others: as in `fast_weight_memory`. key_gradient="all" loops over the documents, with a table for each.

    Returns:
        VarlenOutput(output, keys, rows, slots, weights): output [T, D] in the targets' dtype; final keys
        [S, H, 2, n, Dk/2]; rows, those that each document has read, and those given, after its last write, in the order
        of documents and slots, then unused places; slots (int64) and weights of the output reads, [T, J]. R, how many
        rows there are, depends on sizes alone: the accesses that T tokens can make, and Q, or S·N if that is less; S·N
        under key_gradient="all". With weight_decay all other rows of a document have decayed too, to
        (1 - lr · weight_decay) for each chunk that it wrote, times those of `values`: `rows` does not hold them.
        Output, keys and rows.value are differentiable in queries, targets, keys, values, gates and rows.value. What is
        kept for that is as in `fast_weight_memory`, with a copy of a document's keys for each of its chunks; a dense
        gradient [N, D] is filled only if `values` requires one.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    o = Options(
        chunk_size, top_k, lookahead, score, eps, weighting, temperature, lr, weight_decay, clip,
        addressing_weight, key_gradient, step, boundary, precision, backend,
    )  # fmt: skip
    inputs = Inputs(queries, targets, keys, values, gates, mask)
    value = rows.value if isinstance(rows, Rows) else None
    refuse_transforms("fast_weight_memory_varlen", (*inputs, value))
    o = _check_varlen(inputs, cu_seqlens, rows, o)
    if not torch.compiler.is_compiling():
        cu_seqlens = cu_seqlens.cpu()  # once, and not in each operator
    if o.key_gradient == "all":
        return _by_document(inputs, cu_seqlens, rows, o)
    tensors = (*inputs[:4], cu_seqlens, gates, mask, *(rows or (None,) * 3))
    # A program of torch.export has no gradients, so it keeps nothing for them.
    differentiable = torch.is_grad_enabled() and not is_exporting()
    if differentiable and any(x is not None and x.requires_grad for x in (*inputs[:-1], value)):
        output, new_keys, document, slot, value, slots, weights = _Varlen.apply(*tensors, *o)
    else:
        detached = each(Tensor.detach, *tensors)
        output, new_keys, document, slot, value, slots, weights = _forward_op(*detached, False, *o)
    return VarlenOutput(output, new_keys, Rows(document, slot, value), slots, weights)
