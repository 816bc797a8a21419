"""A memory for each of several packed documents: checks, the loop where it must be, and the public function."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo

from . import _checks as checks
from ._autograd import refuse_transforms
from .carry import (
    carries_of,
    check_documents_carry,
    continue_documents,
    empty_carry,
    leave_documents,
    prepend_windows,
    take_tokens,
)
from .kernels import compute_dtype
from .memory import check_memory, fast_weight_memory
from .options import Options, check_group
from .packed_function import check_rows, run_documents
from .records import DocumentsCarry, Inputs, Rows, VarlenOutput, each


def _check_rows_given(name: str, rows: Rows, documents: int, values: Tensor) -> None:
    """Refuse rows that are not those of so many documents over these values."""
    if not isinstance(rows, Rows):
        raise TypeError(f"`{name}` must be Rows(document, slot, value), got {type(rows).__name__}")
    checks.check_tensor(f"{name}.document", rows.document, 1, "[R]")
    checks.check_tensor(f"{name}.slot", rows.slot, 1, "[R]")
    checks.check_tensor(f"{name}.value", rows.value, 2, "[R, D]")
    checks.check_like(f"{name}.document", rows.document, f"{name}.slot", rows.slot)
    rule = f"`{name}.value` [R, D] must have a row for each of `{name}.slot` [R]"
    checks.check_shapes(rows.value.shape[0] == rows.slot.shape[0], rule, rows.value, rows.slot)
    rule = f"`{name}.value` [R, D] must be as wide as `values` [N, D]"
    checks.check_shapes(rows.value.shape[1] == values.shape[1], rule, rows.value, values)
    for field, x in ((f"{name}.document", rows.document), (f"{name}.slot", rows.slot)):
        if x.dtype != torch.int64:
            raise TypeError(f"`{field}` must be int64, got {x.dtype}")
        checks.check_device(field, x, "values", values)
    if rows.decay is not None:
        checks.check_tensor(f"{name}.decay", rows.decay, 1, "[S]")
        if rows.decay.shape[0] != documents:
            raise ValueError(f"`{name}.decay` must be [{documents}], got {checks.shape(rows.decay)}")
        if rows.decay.dtype != compute_dtype(values.dtype):
            raise TypeError(f"`{name}.decay` must be {compute_dtype(values.dtype)}, got {rows.decay.dtype}")
        checks.check_device(f"{name}.decay", rows.decay, "values", values)
    if rows.value.dtype != values.dtype:
        raise TypeError(f"`{name}.value` must have the dtype of `values`, {values.dtype}, got {rows.value.dtype}")
    checks.check_device(f"{name}.value", rows.value, "values", values)
    if not torch.compiler.is_compiling():
        check_rows(rows, documents, values, name)


def _check_varlen(
    inputs: Inputs, cu_seqlens: Tensor, rows: Rows | None, o: Options, may_end_before: bool, rows_name: str
) -> Options:
    """Validate the arguments; returns the options with their numbers as ints and floats."""
    queries, keys, values = inputs.queries, inputs.keys, inputs.values
    checks.check_tensor("cu_seqlens", cu_seqlens, 1, "[S + 1]")
    checks.check_slots("cu_seqlens", cu_seqlens)
    checks.check_data("cu_seqlens", cu_seqlens)
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
        checks.check_bounds(cu_seqlens.tolist(), queries.shape[0], may_end_before=may_end_before)
    if rows is not None:
        _check_rows_given(rows_name, rows, documents, values)
    return o


@_disable_dynamo
def _by_document(
    inputs: Inputs,
    cu_seqlens: Tensor,
    rows: Rows | None,
    carry: DocumentsCarry | None,
    o: Options,
    *,
    may_end_before: bool,
    with_rows: bool,
) -> VarlenOutput:
    """The loop over documents, each with a table of its own, all of whose rows are handed out if `with_rows`.

    Compiled code breaks here, since it cannot loop over documents whose number and lengths are data. What it has not
    checked, since that is data too, is checked now.
    """
    queries, targets, keys, values, gates, mask = inputs
    cu_seqlens, num_slots = cu_seqlens.cpu(), len(values)
    checks.check_bounds(cu_seqlens.tolist(), len(queries), may_end_before=may_end_before)
    lengths = cu_seqlens.diff().tolist()
    check_rows(rows, len(lengths), values)
    count, total = len(lengths), sum(lengths)
    # One split has one gradient as large as its input, whereas slices would have one for every document.
    tokens: Any = ([None] * count if x is None else x[:total].split(lengths) for x in (queries, targets, gates, mask))
    of_each = keys.unbind() if keys.dim() == 5 else [keys] * count
    tables: Sequence[Tensor] = [values] * count
    if rows is not None:
        used = rows.slot >= 0
        places = (rows.document[used], rows.slot[used])
        start = values.expand(count, *values.shape)
        if rows.decay is not None:
            start = (start * rows.decay.detach().view(-1, 1, 1)).to(values.dtype)
        tables = start.index_put(places, rows.value[used]).unbind()
    results = []
    for *of_document, k, v, c in zip(*tokens, of_each, tables, carries_of(carry, count, o), strict=True):
        q, y, g, m = each(lambda x: x.unsqueeze(0), *of_document)
        result = fast_weight_memory(q, y, k, v, gates=g, mask=m, carry=c, **o._asdict())  # type: ignore[arg-type]
        # Without rows this table is freed before the next document makes one.
        results.append(result if with_rows else result._replace(values=values[:0]))
        del result
    surplus = (0, 0, 0, len(queries) - total)
    output, slots, weights = (
        F.pad(torch.cat([getattr(x, name)[0] for x in results]), surplus, value=fill)
        for name, fill in (("output", 0), ("slots", -1), ("weights", 0))
    )
    names = torch.arange(count * num_slots if with_rows else 0, device=values.device)
    left = Rows(names // num_slots, names % num_slots, torch.cat([x.values for x in results]))
    return VarlenOutput(output, torch.stack([x.keys for x in results]), left, slots, weights)


def run_varlen(
    inputs: Inputs,
    cu_seqlens: Tensor,
    rows: Rows | None,
    carry: DocumentsCarry | None,
    return_carry: bool,
    sparse_grad: bool,
    o: Options,
    *,
    may_end_before: bool = False,
    with_rows: bool = True,
    group: str = "",
    rows_name: str = "rows",
    carry_name: str = "carry",
) -> tuple[VarlenOutput, DocumentsCarry | None]:
    """`fast_weight_memory_varlen`, and the carry with `return_carry`.

    With `may_end_before` there may be tokens behind the last document, which belong to none: their output and weights
    are 0, their slots -1. Without `with_rows` the rows that are left need not be handed out. With the name of a process
    `group`, targets, values, rows and the carry's targets are this rank's columns of them. Errors name rows and carry
    by `rows_name` and `carry_name`.
    """
    value = rows.value if isinstance(rows, Rows) else None
    of_carry = carry if isinstance(carry, DocumentsCarry) else ()
    refuse_transforms("fast_weight_memory_varlen", (*inputs, value, *of_carry))
    o = _check_varlen(inputs, cu_seqlens, rows, o, may_end_before, rows_name)
    checks.check_flag("return_carry", return_carry)
    checks.check_flag("sparse_grad", sparse_grad)
    documents = cu_seqlens.shape[0] - 1
    if carry is not None or return_carry:
        check_documents_carry(carry, inputs, documents, o, carry_name)
    check_group(group, o)
    loops = o.key_gradient == "all"
    if sparse_grad and loops:
        raise ValueError(f'`sparse_grad`=True needs `key_gradient`="addressing", got {o.key_gradient!r}')
    if not torch.compiler.is_compiling():
        cu_seqlens = cu_seqlens.cpu()  # once, and not in each operator
    places, left, packed = None, None, inputs
    if carry is not None or return_carry:
        before = empty_carry(inputs, documents, o) if carry is None else carry
        places = continue_documents(before, cu_seqlens, inputs.targets.shape[0], may_end_before, o)
        joined = prepend_windows(before, inputs)
        if return_carry:
            left = leave_documents(joined, places, o)
        if carry is not None and not loops:
            index = places.packed
            if not torch.compiler.is_compiling():  # where its size must not depend on the data
                index = index[: int(places.bounds[-1])]
            packed = take_tokens(joined, index)
        del joined  # which is large, and not needed while the memories run
    if loops:
        result = _by_document(inputs, cu_seqlens, rows, carry, o, may_end_before=may_end_before, with_rows=with_rows)
    elif carry is None or places is None:
        none = torch.zeros(documents, dtype=torch.int64, device="cpu") if may_end_before else None
        result = run_documents(inputs, cu_seqlens, none, rows, sparse_grad, o, group)
    else:
        result = run_documents(packed, places.bounds, places.carried, rows, sparse_grad, o, group)
        index = places.outputs.to(inputs.targets.device, non_blocking=True)
        output, slots, weights = (x.index_select(0, index) for x in (result.output, result.slots, result.weights))
        result = result._replace(output=output, slots=slots, weights=weights)
    return result, left


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
    carry: DocumentsCarry | None = None,
    return_carry: bool = False,
    sparse_grad: bool = False,
) -> Any:
    """`fast_weight_memory` for each of several documents that are packed one behind the other, all in one call.

    Document s is the tokens from cu_seqlens[s] to cu_seqlens[s + 1]. Its results are those of::

        fast_weight_memory(queries[None, start:stop], targets[None, start:stop], keys, values, ...)

    so chunks begin anew with it, no pair crosses its borders, and clamps, counts and key steps are its own. It depends
    on no other document: which ones share the call, and in which order, changes no bit of it on GPUs. Documents may be
    empty. All that they share are the initial keys and values, whose gradients are sums over the documents.

    A table for each document is never made. The rows that a document addresses are known before the first value is
    read; they are gathered once, from `rows` or else from `values`, read and written there, and handed out as `rows`:
    the next segments of the documents go on from these, and from the final keys, differentiably. What a document has
    read and not written yet is its part of the carry. With `carry`, `rows` and the final keys segments of any lengths,
    0 too, are one sequence of each document, in values and gradients, as those of `fast_weight_memory`; without a carry
    they are that only if they end where chunks do, with lookahead 0.

    Args:
        queries: [T, H, Dk]: the tokens of all documents.
        targets: [T, D].
        keys: [H, 2, n, Dk/2], with which all documents begin; or [S, H, 2, n, Dk/2], those of each.
        values: [N, D], N = n²; never changed, as all inputs.
        cu_seqlens: [S + 1], int32 or int64, from 0 to T, not decreasing; on the CPU. Elsewhere it is copied, which
            waits for the device. Values are checked where they are known: on the CPU, and in the operator.
        rows: Rows(document, slot, value), int64 [Q], int64 [Q], [Q, D], in the dtype of `values`: rows that a document
            reads instead of those of `values`. A place with slot -1 is unused. No slot of a document occurs twice, and
            all are in range, which is checked on the CPU; on a GPU one of the two is read. Where there is a fourth
            field `decay` [S], in the compute dtype, a document's other rows are those of `values` times its decay.
        gates: [T], write gates; None is all ones.
        mask: [T], bool, integer or real, >= 0, as in `fast_weight_memory`; None is all ones.
        carry: what the segments before have left of each document; None begins them all. Its position lies best on the
            CPU, as `cu_seqlens`. It needs boundary="carry", and the same options in all segments.
        return_carry: whether to return what these segments leave, likewise.
        sparse_grad: give the gradient of `values` as a sparse COO tensor [N, D] of the rows that were read from them,
            those of documents that share a slot summed, and rounded once. On CPUs it is coalesced. On a GPU, where the
            number of slots would have to be waited for, it has min(R, N) entries: one for each slot, and others of 0 at
            a slot that has one. PyTorch takes it through no cast and no view: with values=parameter.bfloat16() backward
            raises. Not with key_gradient="all", nor with torch.compile, which has no sparse gradients.
        others: as in `fast_weight_memory`. key_gradient="all" loops over the documents, with a table for each.

    Returns:
        VarlenOutput(output, keys, rows, slots, weights): output [T, D] in the targets' dtype; final keys
        [S, H, 2, n, Dk/2]; rows, those that each document has read, and those given, after its last write, in the order
        of documents and slots, then unused places; slots (int64) and weights of the output reads, [T, J]. R, how many
        rows there are, depends on sizes alone: the accesses that T tokens can make, and Q, or S·N if that is less; S·N
        under key_gradient="all". With a carry the tokens that are read again count too: those that there are, whose
        number positions say, but in compiled code all that a carry holds. With a weight decay all other rows of a
        document have decayed too: `rows.decay` says to what part of those of `values`, (1 - lr · weight_decay) for each
        chunk that the document has written, those before the rows that were given included. It is a constant for
        gradients.
        With `return_carry` a pair of all that and a `DocumentsCarry`: of every document its last C - 1 + L tokens, a
        copy, so that shapes depend on sizes alone. The tokens of a carry are looked up and read again by the next call.
        Output, keys and rows.value are differentiable in queries, targets, keys, values, gates and rows.value, and in
        the tensors of the carry, whose gradients flow into the segments that its tokens came from. What is
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
    result, left = run_varlen(inputs, cu_seqlens, rows, carry, return_carry, sparse_grad, o)
    return (result, left) if return_carry else result
