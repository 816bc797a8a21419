"""A memory for each of several packed documents: checks, the loop where it must be, and the public function."""

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from . import _checks as checks
from ._autograd import refuse_transforms
from .carry import check_documents_carry, continue_documents, empty_carry, prepend_windows, take_tokens
from .documents import Documents, DocumentsOutput, memory_by_document, put_back, take
from .kernels import compute_dtype
from .memory import check_memory
from .options import Options
from .packed_function import check_rows, run_documents
from .records import DocumentsCarry, Inputs, Rows, VarlenOutput, each


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
        checks.check_bounds(cu_seqlens.tolist(), queries.shape[0])
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
        if rows.decay is not None:
            checks.check_tensor("rows.decay", rows.decay, 1, "[S]")
            if rows.decay.shape[0] != documents:
                raise ValueError(f"`rows.decay` must be [{documents}], got {checks.shape(rows.decay)}")
            if rows.decay.dtype != compute_dtype(values.dtype):
                raise TypeError(f"`rows.decay` must be {compute_dtype(values.dtype)}, got {rows.decay.dtype}")
            checks.check_device("rows.decay", rows.decay, "values", values)
        if rows.value.dtype != values.dtype:
            raise TypeError(f"`rows.value` must have the dtype of `values`, {values.dtype}, got {rows.value.dtype}")
        checks.check_device("rows.value", rows.value, "values", values)
        if not torch.compiler.is_compiling():
            check_rows(rows, documents, values)
    return o


def _by_document(
    inputs: Inputs, cu_seqlens: Tensor, carry: DocumentsCarry | None, rows: Rows | None, o: Options
) -> VarlenOutput:
    """The loop over documents, each with a table of its own, all of whose rows are handed out."""
    queries, targets, keys, values, gates, mask = inputs
    num_documents, num_slots = cu_seqlens.shape[0] - 1, values.shape[0]
    tables = values
    if rows is not None:
        tables = values.expand(num_documents, *values.shape)
        if rows.decay is not None:
            tables = (tables * rows.decay.view(-1, 1, 1)).to(values.dtype)
        tables = tables.flatten(0, 1)
        place = torch.where(rows.slot < 0, len(tables), rows.document * num_slots + rows.slot)
        padded = torch.cat((tables, tables.new_zeros(1, values.shape[1])))
        tables = padded.index_put((place,), rows.value)[:-1].unflatten(0, (num_documents, num_slots))
    documents = Documents(1, queries.shape[0], None, cu_seqlens, None)
    q, y, g, m = each(lambda x: x.unsqueeze(0), queries, targets, gates, mask)
    how: dict[str, Any] = {"gates": g, "mask": m, "carry": carry, "return_memory": True, "options": o}
    result = memory_by_document(q, y, keys, tables, documents, **how)  # type: ignore[arg-type]
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


def _go_on(
    inputs: Inputs,
    cu_seqlens: Tensor,
    carry: DocumentsCarry | None,
    rows: Rows | None,
    sparse_grad: bool,
    o: Options,
) -> tuple[VarlenOutput, DocumentsCarry]:
    """What segments of documents leave behind, with the carry that the next ones begin with."""
    before = empty_carry(inputs, cu_seqlens.shape[0] - 1, o) if carry is None else carry
    places = continue_documents(before, cu_seqlens, len(inputs.targets), o)
    both = prepend_windows(before, inputs)
    outputs, last = (x.to(both.targets.device, non_blocking=True) for x in (places.outputs, places.last))
    if o.key_gradient == "all":
        result = _by_document(inputs, cu_seqlens, carry, rows, o)
    elif carry is None:
        result = run_documents(inputs, cu_seqlens, None, rows, sparse_grad, o)
    else:
        packed = places.packed
        if not torch.compiler.is_compiling():  # where its size must not depend on the data
            packed = packed[: int(places.bounds[-1])]
        packed = packed.to(both.targets.device, non_blocking=True)
        result = run_documents(take_tokens(both, packed), places.bounds, places.carried, rows, sparse_grad, o)
        output, slots, weights = (x.index_select(0, outputs) for x in (result.output, result.slots, result.weights))
        result = result._replace(output=output, slots=slots, weights=weights)
    left = take_tokens(both, last)
    tokens = (left.queries, left.targets, left.gates, left.mask)
    window = before.queries.shape[:2]
    return result, DocumentsCarry._make((*each(lambda x: x.unflatten(0, window), *tokens), places.position))


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
            those of documents that share a slot summed. On CPUs it is coalesced. On a GPU, where the number of rows
            would have to be waited for, it has R entries, and those of unused places are 0 at a slot that is used. Not
            with key_gradient="all", nor with torch.compile, which has no sparse gradients.
        others: as in `fast_weight_memory`. key_gradient="all" loops over the documents, with a table for each.

    Returns:
        VarlenOutput(output, keys, rows, slots, weights): output [T, D] in the targets' dtype; final keys
        [S, H, 2, n, Dk/2]; rows, those that each document has read, and those given, after its last write, in the order
        of documents and slots, then unused places; slots (int64) and weights of the output reads, [T, J]. R, how many
        rows there are, depends on sizes alone: the accesses that T tokens can make, and Q, or S·N if that is less; S·N
        under key_gradient="all". With a weight decay all other rows of a document have decayed too: `rows.decay` says
        to what part of those of `values`, (1 - lr · weight_decay) for each chunk that the document has written, those
        before the rows that were given included. It is a constant for gradients.
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
    value = rows.value if isinstance(rows, Rows) else None
    of_carry = carry if isinstance(carry, DocumentsCarry) else ()
    refuse_transforms("fast_weight_memory_varlen", (*inputs, value, *of_carry))
    o = _check_varlen(inputs, cu_seqlens, rows, o)
    if not torch.compiler.is_compiling():
        cu_seqlens = cu_seqlens.cpu()  # once, and not in each operator
    checks.check_flag("return_carry", return_carry)
    checks.check_flag("sparse_grad", sparse_grad)
    if sparse_grad and o.key_gradient == "all":
        raise ValueError('`sparse_grad`=True needs `key_gradient`="addressing", got "all"')
    if carry is not None or return_carry:
        check_documents_carry(carry, inputs, cu_seqlens.shape[0] - 1, o)
        result, left = _go_on(inputs, cu_seqlens, carry, rows, sparse_grad, o)
        return (result, left) if return_carry else result
    if o.key_gradient == "all":
        return _by_document(inputs, cu_seqlens, None, rows, o)
    return run_documents(inputs, cu_seqlens, None, rows, sparse_grad, o)
