"""Documents in a batch of tokens: which tokens belong to which document, and a memory for each document.

Each row of a batch [B, T] is a document, or `cu_seqlens` packs several documents into one row, one behind the other.
Tokens that a mask marks as padding belong to no document. No document's results depend on another document.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd import Function

from . import _checks as checks
from ._operators import operator
from .carry import carries_of, count_carried, prepend
from .kernels import compute_dtype
from .memory import fast_weight_memory
from .options import Options, schema_of
from .records import DocumentsCarry, Inputs
from .sequence import run_backward, run_forward


class Documents(NamedTuple):
    """Which of the tokens [B, T] belong to which document."""

    batch: int  #: B
    length: int  #: T
    mask: Tensor | None  #: [B, T]; tokens have values > 0, padding all others
    cu_seqlens: Tensor | None  #: [S + 1], on the device of the tokens or on the CPU
    cu_seqlens_cpu: Tensor | None  #: the same on the CPU, where that is known

    @property
    def number(self) -> int:
        """S: how many documents there are, empty ones too."""
        return self.batch if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def are_rows(self) -> bool:
        """Whether every row is a document, without padding."""
        return self.mask is None and self.cu_seqlens is None

    @property
    def is_one(self) -> bool:
        """Whether all tokens belong to one document, so that nothing needs to be cut apart and put back."""
        return self.batch == 1 and self.are_rows

    def bounds(self, device: torch.device) -> Tensor:
        """Where the documents of a row begin, and where the last one ends, int64 [S / B + 1]; without waiting."""
        if self.cu_seqlens is None:
            return torch.tensor([0, self.length], device=device)
        return self.cu_seqlens.to(device).long()

    def numbers(self, device: torch.device) -> Tensor:
        """The number that each position's document has within its row, int64 [T]."""
        return torch.bucketize(torch.arange(self.length, device=device), self.bounds(device)[1:], right=True)

    def pair_mask(self, lookahead: int, device: torch.device) -> Tensor | None:
        """The mask of `fast_weight_memory` where all documents write one memory: no pair crosses a border."""
        if self.cu_seqlens is None or lookahead == 0:
            return self.mask
        number = self.numbers(device)
        within = number == torch.cat((number[lookahead:], number.new_full((min(lookahead, len(number)),), -1)))
        within = within.unsqueeze(0)
        return within if self.mask is None else self.mask * within

    def pieces(self) -> list[slice | Tensor]:
        """Where each document's tokens lie among the B·T: a slice, or int64 [t], on the CPU, around padding.

        Where mask or cu_seqlens are on a GPU only, this waits for a copy of them.
        """
        if self.cu_seqlens is None:
            bounds = [row * self.length for row in range(self.batch + 1)]
        else:
            on_cpu = self.cu_seqlens.cpu() if self.cu_seqlens_cpu is None else self.cu_seqlens_cpu
            bounds = on_cpu.tolist()
        whole: list[slice | Tensor] = [slice(*pair) for pair in pairwise(bounds)]
        if self.mask is None:
            return whole
        real = (self.mask > 0).flatten().cpu()
        return [_as_slice(start + real[start:end].nonzero().flatten()) for start, end in pairwise(bounds)]

    def check(self) -> None:
        """Validate the values of cu_seqlens, where they are on the CPU and code is not compiled."""
        x, on_cpu = self.cu_seqlens, self.cu_seqlens_cpu
        if x is None or torch.compiler.is_compiling():
            return
        if on_cpu is not None and x.is_cpu and not torch.equal(x.long(), on_cpu.long()):
            raise ValueError(f"`cu_seqlens_cpu` must be `cu_seqlens` on the CPU, got {on_cpu.tolist()}, {x.tolist()}")
        on_cpu = x if on_cpu is None else on_cpu
        if on_cpu.is_cpu:
            checks.check_bounds(on_cpu.tolist(), self.length)


def _as_slice(positions: Tensor) -> slice | Tensor:
    """Consecutive positions as a slice, since a slice takes tokens without a copy; others as they are."""
    if len(positions) == 0:
        return slice(0, 0)
    first, last = int(positions[0]), int(positions[-1])
    return slice(first, last + 1) if last - first + 1 == len(positions) else positions


def make_documents(
    tokens: Tensor,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None,
    are_cut: bool = False,
) -> Documents:
    """Validate the arguments that say which of the tokens [B, T, ...] belong to which document.

    Args:
        are_cut: whether the caller cuts documents apart, for which the host must know cu_seqlens. It is then copied
            here, once, and validated before anything is computed. Otherwise it is validated only if it is on the CPU.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    batch, length = tokens.shape[:2]
    if attention_mask is not None:
        checks.check_tensor("attention_mask", attention_mask, 2, "[B, T]")
        checks.check_mask("attention_mask", attention_mask)
        rule = "`attention_mask` must be [B, T] like `hidden_states` [B, T, d]"
        checks.check_shapes(attention_mask.shape == tokens.shape[:2], rule, attention_mask, tokens)
        checks.check_device("attention_mask", attention_mask, "hidden_states", tokens)
    if cu_seqlens is None and cu_seqlens_cpu is not None:
        cu_seqlens = cu_seqlens_cpu
    for name, x in (("cu_seqlens", cu_seqlens), ("cu_seqlens_cpu", cu_seqlens_cpu)):
        if x is None:
            continue
        checks.check_tensor(name, x, 1, "[S + 1]")
        checks.check_slots(name, x)
        if batch != 1:
            raise ValueError(f"`{name}` packs documents into one row, B = 1, got B = {batch}")
        if x.shape[0] < 2:
            raise ValueError(f"`{name}` [S + 1] must hold the bounds of at least one document, got {checks.shape(x)}")
    if cu_seqlens_cpu is not None and cu_seqlens is not None:
        if not cu_seqlens_cpu.is_cpu:
            raise ValueError(f"`cu_seqlens_cpu` must be on the CPU, got {cu_seqlens_cpu.device}")
        rule = "`cu_seqlens_cpu` must be `cu_seqlens` on the CPU"
        checks.check_shapes(cu_seqlens_cpu.shape == cu_seqlens.shape, rule, cu_seqlens_cpu, cu_seqlens)
    if are_cut and cu_seqlens is not None and cu_seqlens_cpu is None and not torch.compiler.is_compiling():
        cu_seqlens_cpu = cu_seqlens.cpu()
    documents = Documents(batch, length, attention_mask, cu_seqlens, cu_seqlens_cpu)
    documents.check()
    return documents


def take(x: Tensor | None, pieces: list[slice | Tensor]) -> list[Any]:
    """Cut x [B, T, ...] into the tokens of each document, [1, t, ...]; None into a None for each.

    One split has one gradient as large as x, whereas slices would have one for every document.
    """
    if x is None:
        return [None] * len(pieces)
    flat = x.flatten(0, 1)
    sizes, end = [], 0  # of the gap before a document and of the document, by turns
    for piece in pieces:
        start, stop = (piece.start, piece.stop) if isinstance(piece, slice) else (int(piece[0]), int(piece[-1]) + 1)
        if start == stop:  # the bounds of an empty document mean nothing
            start = stop = end
        sizes += [start - end, stop - start]
        end = stop
    parts = flat.split([*sizes, len(flat) - end])[1::2]
    return [
        (x if isinstance(piece, slice) else x.index_select(0, (piece - piece[0]).to(x.device))).unsqueeze(0)
        for x, piece in zip(parts, pieces, strict=True)
    ]


def put_back(parts: list[Tensor], pieces: list[slice | Tensor], like: Tensor, fill: float = 0) -> Tensor:
    """The inverse of `take`: documents' parts [1, t, ...] as one tensor [B, T, ...] like `like`, `fill` at padding."""
    packed = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).squeeze(0)
    batch, length = like.shape[:2]
    rest = packed.shape[1:]
    if packed.shape[0] != batch * length:
        index = torch.cat([torch.arange(x.start, x.stop, device="cpu") if isinstance(x, slice) else x for x in pieces])
        padded = packed.new_full((batch * length, *rest), fill)
        packed = padded.index_copy(0, index.to(packed.device), packed)
    return packed.view(batch, length, *rest)


def mean_gate(gates: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
    """The mean gate of all tokens but padding; 0-d, in the compute dtype."""
    if gates is None:
        return None
    gates = gates.to(compute_dtype(gates.dtype))
    if attention_mask is None:
        return gates.sum() / max(1, math.prod(gates.shape))  # 0 without tokens, so that a penalty on gates is 0 too
    real = attention_mask > 0
    return torch.where(real, gates, 0.0).sum() / real.sum().clamp(min=1)


class DocumentsOutput(NamedTuple):
    """What a memory for each document has read, and the memories after it if they are asked for."""

    output: Tensor  #: [B, T, D], in the targets' dtype; 0 at padding
    slots: Tensor  #: [B, T, J], int64; -1 at padding
    weights: Tensor  #: [B, T, J]; 0 at padding
    keys: Tensor | None  #: [S, H, 2, n, Dk/2], after each document's last write
    values: Tensor | None  #: [S, N, D], likewise


def memory_by_document(
    queries: Tensor,
    targets: Tensor,
    keys: Tensor,
    values: Tensor,
    documents: Documents,
    *,
    gates: Tensor | None = None,
    mask: Tensor | None = None,
    carry: DocumentsCarry | None = None,
    return_memory: bool = False,
    options: Options,
) -> DocumentsOutput:
    """`fast_weight_memory` for each document by itself, in a loop; each starts from the initial memory.

    Compiled code cannot loop over documents whose number and lengths are data. There an operator runs the loop, and its
    backward computes each document's forward again; under key_gradient="all" the loop is a break of the graph instead.

    Args:
        queries: [B, T, H, Dk].
        targets: [B, T, D].
        keys: [H, 2, n, Dk/2], from which all documents start, or [S, H, 2, n, Dk/2], one for each.
        values: [N, D], likewise, or [S, N, D].
        gates: [B, T] or None.
        mask: [B, T] or None: that of `fast_weight_memory`; neither it nor that of the carry is known in compiled code,
            unless key_gradient is "all".
        carry: what each document goes on from; None begins them all.
        return_memory: whether the final memories are returned: S tables.
    """
    tensors = (queries, targets, keys, values, gates)
    if torch.compiler.is_compiling() and not documents.is_one:
        if options.key_gradient == "all":
            return _untraced_loop(*tensors, mask, carry, documents, return_memory, options)
        cu_seqlens = documents.cu_seqlens if documents.cu_seqlens_cpu is None else documents.cu_seqlens_cpu
        carried = (None,) * 4 if carry is None else (*carry[:3], carry.position)
        results = _MemoryByDocument.apply(*tensors, *carried, documents.mask, cu_seqlens, return_memory, *options)
        return DocumentsOutput(*results[:3], *(results[3:] or (None, None)))
    return _loop(*tensors, mask, carry, documents, return_memory, options)


def _loop(
    queries: Tensor,
    targets: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Tensor | None,
    mask: Tensor | None,
    carry: DocumentsCarry | None,
    documents: Documents,
    return_memory: bool,
    o: Options,
) -> DocumentsOutput:
    if documents.number == 0:  # one call makes the empty results, and there are no memories
        empty = fast_weight_memory(queries, targets, keys, values, gates=gates, mask=mask, **o._asdict())
        memories = (x.new_empty(0, *x.shape) if return_memory else None for x in (keys, values))
        return DocumentsOutput(empty.output, empty.slots, empty.weights, *memories)
    pieces = documents.pieces()
    outputs, slots, weights, final_keys, final_values = [], [], [], [], []
    initial = (_of_each(keys, 4, len(pieces)), _of_each(values, 2, len(pieces)))
    tokens = (take(x, pieces) for x in (queries, targets, gates, mask))
    for q, y, g, m, k, v, c in zip(*tokens, *initial, carries_of(carry, len(pieces), o), strict=True):
        result = fast_weight_memory(q, y, k, v, gates=g, mask=m, carry=c, **o._asdict())
        outputs.append(result.output)
        slots.append(result.slots)
        weights.append(result.weights)
        if return_memory:  # otherwise this table is freed before the next document makes one
            final_keys.append(result.keys)
            final_values.append(result.values)
        del result
    return DocumentsOutput(
        put_back(outputs, pieces, targets),
        put_back(slots, pieces, targets, -1),
        put_back(weights, pieces, targets),
        _together(final_keys) if return_memory else None,
        _together(final_values) if return_memory else None,
    )


def _of_each(x: Tensor, rank: int, count: int) -> Sequence[Tensor]:
    """The tensor of each document: x itself where all share it, else the views that x [S, ...] is unbound into.

    Unbinding has one gradient as large as x, whereas x[number] would have one for every document.
    """
    if x.dim() == rank:
        return [x] * count
    return [x.squeeze(0)] if count == 1 else x.unbind()


def _together(tables: list[Tensor]) -> Tensor:
    """All documents' tables as one tensor [S, ...]; a single table is not copied."""
    return tables[0].unsqueeze(0) if len(tables) == 1 else torch.stack(tables)


_untraced_loop = _disable_dynamo(_loop)

_INPUTS = (
    "Tensor queries, Tensor targets, Tensor keys, Tensor values, Tensor? gates, "
    "Tensor? carry_queries, Tensor? carry_targets, Tensor? carry_gates, Tensor? carry_position, "
    "Tensor? mask, Tensor? cu_seqlens"
)
_TENSORS = 11  #: so many are these
_OPTIONS = schema_of(Options)


@operator("fast_weight_memory_documents", schema=f"({_INPUTS}, bool return_memory, {_OPTIONS}) -> Tensor[]")
def _documents_op(  # type: ignore[no-untyped-def]
    queries, targets, keys, values, gates, c_queries, c_targets, c_gates, position, mask, cu_seqlens, return_memory,
    *options,
) -> list[Tensor]:  # fmt: skip
    carry = None if position is None else DocumentsCarry(c_queries, c_targets, c_gates, None, position)
    documents = make_documents(targets, mask, cu_seqlens, None, are_cut=True)
    results = _loop(queries, targets, keys, values, gates, None, carry, documents, return_memory, Options(*options))
    return [x for x in results if x is not None]


@_documents_op.register_fake
def _(  # type: ignore[no-untyped-def]
    queries, targets, keys, values, gates, c_queries, c_targets, c_gates, position, mask, cu_seqlens, return_memory,
    *options,
):  # fmt: skip
    o = Options(*options)
    count = queries.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    size = (*queries.shape[:2], queries.shape[2] * o.top_k)
    results = [
        torch.empty_like(targets, memory_format=torch.contiguous_format),
        queries.new_empty(size, dtype=torch.int64),
        queries.new_empty(size, dtype=compute_dtype(values.dtype)),
    ]
    if return_memory:
        results += [x.new_empty(count, *x.shape[-rank:]) for x, rank in ((keys, 4), (values, 2))]
    return results


@operator(
    "fast_weight_memory_documents_backward",
    schema=f"(Tensor? grad_output, Tensor? grad_keys, Tensor? grad_values, {_INPUTS}, {_OPTIONS}) -> Tensor[]",
)
def _documents_backward_op(  # type: ignore[no-untyped-def]
    grad_output, grad_keys, grad_values, queries, targets, keys, values, gates, c_queries, c_targets, c_gates, position,
    mask, cu_seqlens, *options,
) -> list[Tensor]:  # fmt: skip
    o, documents = Options(*options), make_documents(targets, mask, cu_seqlens, None, are_cut=True)
    carry = None if position is None else DocumentsCarry(c_queries, c_targets, c_gates, None, position)
    of_carry = {"queries": c_queries, "targets": c_targets, "gates": c_gates}
    totals, carry_totals = (
        {name: torch.zeros_like(x, memory_format=torch.contiguous_format) for name, x in given.items() if x is not None}
        for given in (
            {"queries": queries, "targets": targets, "keys": keys, "values": values, "gates": gates},
            of_carry,
        )
    )
    pieces = documents.pieces()
    tokens = (take(x, pieces) for x in (queries, targets, gates, grad_output))
    carries = carries_of(carry, len(pieces), o)
    for number, (piece, one, q, y, g, grad_y) in enumerate(zip(pieces, carries, *tokens, strict=True)):
        k, v, grad_k, grad_v = (
            x if x is None or x.dim() == rank else x[number]
            for x, rank in ((keys, 4), (values, 2), (grad_keys, 4), (grad_values, 2))
        )
        inputs, carried, before = Inputs(q, y, k, v, g, None), 0, 0
        if one is not None:
            inputs, carried, before = prepend(one, inputs), count_carried(one.position, o), one.queries.shape[1]
            if grad_y is not None:  # the tokens of the carry have no output here
                grad_y = F.pad(grad_y, (0, 0, before - carried, 0))
        inputs = inputs._replace(targets=inputs.targets[:, carried:])
        _, kept = run_forward(inputs, True, o, carried)
        grads = (grad_y, grad_k, grad_v)
        found = run_backward(*inputs[:2], *inputs[4:], grads, k.shape[2], True, kept, o, carried)
        for name, x in zip(("queries", "targets", "keys", "values", "gates"), found, strict=False):
            if name in ("keys", "values"):  # documents that share a memory add their gradients
                total = totals[name] if totals[name].shape == x.shape else totals[name][number]
                total += x
                continue
            count = before - (carried if name == "targets" else 0)
            if name in totals:
                totals[name].flatten(0, 1)[piece] = x[0, count:]
            if name in carry_totals:
                carry_totals[name][number, carry_totals[name].shape[1] - count :] = x[0, :count]
    return [*totals.values(), *carry_totals.values()]


@_documents_backward_op.register_fake
def _(  # type: ignore[no-untyped-def]
    grad_output, grad_keys, grad_values, queries, targets, keys, values, gates, c_queries, c_targets, c_gates, *rest
):
    inputs = (queries, targets, keys, values, gates, c_queries, c_targets, c_gates)
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs if x is not None]


class _MemoryByDocument(Function):
    """The loop as one operator, and its backward as another, which computes each document's forward again."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        """The arguments are those of the operator."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args[:_TENSORS])
        ctx.options = args[_TENSORS + 1 :]
        output, slots, weights, *memory = _documents_op(*args)
        ctx.mark_non_differentiable(slots, weights)
        return (output, slots, weights, *memory)

    @staticmethod
    def backward(ctx: Any, grad_output: Any, _slots: Any, _weights: Any, *grads: Any) -> Any:
        grads = (grad_output, *(grads or (None, None)))
        none = (None,) * len(ctx.needs_input_grad)
        if all(x is None for x in grads):
            return none
        given = ctx.saved_tensors
        results = iter(_documents_backward_op(*grads, *given, *ctx.options))
        found = [None if x is None else next(results) for x in given[:8]]  # of all tensors before the position
        return (*found, *none[len(found) :])
