"""Documents in a batch of tokens: what is packed or padded, cut apart, and a memory for each.

A batch [B, T] holds a document in each row. Where `cu_seqlens` packs several into one row, they lie behind each other;
where a mask says that tokens are padding, they belong to no document. A document never knows of the others.
"""

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
from .kernels import compute_dtype
from .memory import Kept, fast_weight_memory, run_backward, run_forward
from .options import Options, schema_of


class Documents(NamedTuple):
    """Which of the tokens [B, T] belong together."""

    batch: int  #: B
    length: int  #: T
    mask: Tensor | None  #: [B, T]; what is > 0 is a token, all else is padding
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
        """Whether all tokens are those of one document: then nothing is cut apart, nor put back."""
        return self.batch == 1 and self.are_rows

    def bounds(self, device: torch.device) -> Tensor:
        """Where the documents of a row begin, and where the last one ends, int64 [S / B + 1]; nothing waits."""
        if self.cu_seqlens is None:
            return torch.tensor([0, self.length], device=device)
        return self.cu_seqlens.to(device).long()

    def numbers(self, device: torch.device) -> Tensor:
        """Of each position in a row the number of its document in the row, int64 [T]."""
        return torch.bucketize(torch.arange(self.length, device=device), self.bounds(device)[1:], right=True)

    def pieces(self) -> list[slice | Tensor]:
        """Of each document where its tokens lie among the B·T: a slice, or if padding lies between them int64 [t].

        On the CPU: where mask or cu_seqlens lie on a GPU only, this waits for a copy.
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
            _check_bounds(on_cpu.tolist(), self.length)


def _check_bounds(bounds: list[int], length: int) -> None:
    if bounds[0] != 0 or bounds[-1] != length:
        raise ValueError(f"`cu_seqlens` must go from 0 to T = {length}, got {bounds[0]} to {bounds[-1]}")
    for index, (before, after) in enumerate(pairwise(bounds)):
        if after < before:
            raise ValueError(f"`cu_seqlens` must not decrease, got {before}, {after} at {index}, {index + 1}")


def _as_slice(positions: Tensor) -> slice | Tensor:
    """Positions that lie one behind the other as a slice, which needs no copy of what it takes."""
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
    """Validate what says which of the tokens [B, T, ...] belong together.

    Args:
        are_cut: whether documents will be cut apart, for which the host must know cu_seqlens: then it is copied here,
            once, and validated before anything is computed. Else its values are validated where that waits for nothing.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    batch, length = tokens.shape[:2]
    if attention_mask is not None:
        checks.check_tensor("attention_mask", attention_mask, 2, "[B, T]")
        checks.check_mask("attention_mask", attention_mask)
        if attention_mask.shape != tokens.shape[:2]:
            raise ValueError(
                f"`attention_mask` must be [B, T] like `hidden_states` [B, T, d], "
                f"got {checks.shape(attention_mask)} against {checks.shape(tokens)}"
            )
        if attention_mask.device != tokens.device:
            raise ValueError(
                f"`attention_mask` must be on the device of `hidden_states`, "
                f"got {attention_mask.device} against {tokens.device}"
            )
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
        if cu_seqlens_cpu.shape != cu_seqlens.shape:
            raise ValueError(
                f"`cu_seqlens_cpu` must be `cu_seqlens` on the CPU, "
                f"got {checks.shape(cu_seqlens_cpu)} against {checks.shape(cu_seqlens)}"
            )
    if are_cut and cu_seqlens is not None and cu_seqlens_cpu is None and not torch.compiler.is_compiling():
        cu_seqlens_cpu = cu_seqlens.cpu()
    documents = Documents(batch, length, attention_mask, cu_seqlens, cu_seqlens_cpu)
    documents.check()
    return documents


def take(x: Tensor | None, pieces: list[slice | Tensor]) -> list[Any]:
    """The tokens of each document, [1, t, ...], out of [B, T, ...]; of None, None each.

    By one split, whose gradient is as large as x once, not once for every document.
    """
    if x is None:
        return [None] * len(pieces)
    flat = x.flatten(0, 1)
    sizes, end = [], 0  # of what lies between documents, and of each, by turns
    for piece in pieces:
        start, stop = (piece.start, piece.stop) if isinstance(piece, slice) else (int(piece[0]), int(piece[-1]) + 1)
        if start == stop:  # an empty document, wherever it is said to be
            start = stop = end
        sizes += [start - end, stop - start]
        end = stop
    parts = flat.split([*sizes, len(flat) - end])[1::2]
    return [
        (x if isinstance(piece, slice) else x.index_select(0, (piece - piece[0]).to(x.device))).unsqueeze(0)
        for x, piece in zip(parts, pieces, strict=True)
    ]


def put_back(parts: list[Tensor], pieces: list[slice | Tensor], like: Tensor, fill: float = 0) -> Tensor:
    """The inverse of `take`: what documents have, [1, t, ...] each, as [B, T, ...] of `like`; padding has `fill`."""
    packed = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).squeeze(0)
    batch, length = like.shape[:2]
    rest = packed.shape[1:]
    if packed.shape[0] != batch * length:
        index = torch.cat([torch.arange(x.start, x.stop, device="cpu") if isinstance(x, slice) else x for x in pieces])
        padded = packed.new_full((batch * length, *rest), fill)
        packed = padded.index_copy(0, index.to(packed.device), packed)
    return packed.view(batch, length, *rest)


class DocumentsOutput(NamedTuple):
    """What a memory for each document leaves behind."""

    output: Tensor  #: [B, T, D], in the targets' dtype; 0 at padding
    slots: Tensor  #: [B, T, J], int64; -1 at padding
    weights: Tensor  #: [B, T, J]; 0 at padding
    keys: Tensor | None  #: [S, H, 2, n, Dk/2], of each document after its last write, if asked for
    values: Tensor | None  #: [S, N, D], likewise


def memory_by_document(
    queries: Tensor,
    targets: Tensor,
    keys: Tensor,
    values: Tensor,
    documents: Documents,
    *,
    gates: Tensor | None = None,
    return_memory: bool = False,
    options: Options,
) -> DocumentsOutput:
    """`fast_weight_memory` for each document by itself, each from the initial memory: a plain loop.

    Compiled code cannot loop over as many documents as there happen to be, of lengths that are data; there an operator
    does, whose backward computes each document again. Under key_gradient="all" it is a break of the graph.

    Args:
        queries: [B, T, H, Dk].
        targets: [B, T, D].
        keys: [H, 2, n, Dk/2] of all documents, or [S, H, 2, n, Dk/2], of each its own.
        values: [N, D] of all documents, or [S, N, D], of each its own.
        gates: [B, T] or None.
        return_memory: whether the final memories are returned: S tables.
    """
    tensors = (queries, targets, keys, values, gates)
    if torch.compiler.is_compiling() and not documents.is_one:
        if options.key_gradient == "all":
            return _untraced_loop(*tensors, documents, return_memory, options)
        cu_seqlens = documents.cu_seqlens if documents.cu_seqlens_cpu is None else documents.cu_seqlens_cpu
        results = _MemoryByDocument.apply(*tensors, documents.mask, cu_seqlens, return_memory, *options)
        return DocumentsOutput(*results[:3], *(results[3:] or (None, None)))
    return _loop(*tensors, documents, return_memory, options)


def _loop(
    queries: Tensor,
    targets: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Tensor | None,
    documents: Documents,
    return_memory: bool,
    o: Options,
) -> DocumentsOutput:
    if documents.number == 0:  # no rows: what the operator makes of them, and no memory
        empty = fast_weight_memory(queries, targets, keys, values, gates=gates, **o._asdict())
        memories = (x.new_empty(0, *x.shape) if return_memory else None for x in (keys, values))
        return DocumentsOutput(empty.output, empty.slots, empty.weights, *memories)
    pieces = documents.pieces()
    outputs, slots, weights, final_keys, final_values = [], [], [], [], []
    initial = (_of_each(keys, 4, len(pieces)), _of_each(values, 2, len(pieces)))
    tokens = (take(x, pieces) for x in (queries, targets, gates))
    for q, y, g, k, v in zip(*tokens, *initial, strict=True):
        result = fast_weight_memory(q, y, k, v, gates=g, **o._asdict())
        outputs.append(result.output)
        slots.append(result.slots)
        weights.append(result.weights)
        if return_memory:  # else the table is gone before the next document makes one
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
    """A memory's tensor of each document, of what is all documents' or [S, ...]: a view, and so is the gradient of one.

    Not x[number], whose gradient is as large as all of them, for every document.
    """
    if x.dim() == rank:
        return [x] * count
    return [x.squeeze(0)] if count == 1 else x.unbind()


def _together(tables: list[Tensor]) -> Tensor:
    """[S, ...]; no copy of one."""
    return tables[0].unsqueeze(0) if len(tables) == 1 else torch.stack(tables)


_untraced_loop = _disable_dynamo(_loop)

_INPUTS = "Tensor queries, Tensor targets, Tensor keys, Tensor values, Tensor? gates, Tensor? mask, Tensor? cu_seqlens"


@operator("fast_weight_memory_documents", schema=f"({_INPUTS}, bool return_memory, {schema_of(Options)}) -> Tensor[]")
def _documents_op(  # type: ignore[no-untyped-def]
    queries, targets, keys, values, gates, mask, cu_seqlens, return_memory, *options
) -> list[Tensor]:
    documents = make_documents(targets, mask, cu_seqlens, None, are_cut=True)
    results = _loop(queries, targets, keys, values, gates, documents, return_memory, Options(*options))
    return [x for x in results if x is not None]


@_documents_op.register_fake
def _(queries, targets, keys, values, gates, mask, cu_seqlens, return_memory, *options):  # type: ignore[no-untyped-def]
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
    schema=f"(Tensor? grad_output, Tensor? grad_keys, Tensor? grad_values, {_INPUTS}, {schema_of(Options)}) -> Tensor[]",
)
def _documents_backward_op(  # type: ignore[no-untyped-def]
    grad_output, grad_keys, grad_values, queries, targets, keys, values, gates, mask, cu_seqlens, *options
) -> list[Tensor]:
    o, documents = Options(*options), make_documents(targets, mask, cu_seqlens, None, are_cut=True)
    inputs = (queries, targets, keys, values, gates)
    results = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in inputs if x is not None]
    pieces = documents.pieces()
    tokens = (take(x, pieces) for x in (queries, targets, gates, grad_output))
    for number, (piece, q, y, g, grad_y) in enumerate(zip(pieces, *tokens, strict=True)):
        k, v, grad_k, grad_v = (
            x if x is None or x.dim() == rank else x[number]
            for x, rank in ((keys, 4), (values, 2), (grad_keys, 4), (grad_values, 2))
        )
        grads = (grad_y, grad_k, grad_v)
        kept = Kept(*run_forward(q, y, k, v, g, None, True, o)[5:])
        found = run_backward(q, y, g, None, grads, k.shape[2], True, kept, o)
        for place, x in enumerate(found):
            if place in (2, 3):  # of the memory, which all documents begin with or each its own
                total = results[place] if results[place].shape == x.shape else results[place][number]
                total += x
            else:
                flat = results[place].flatten(0, 1)
                flat[piece] = x[0]
    return results


@_documents_backward_op.register_fake
def _(  # type: ignore[no-untyped-def]
    grad_output, grad_keys, grad_values, queries, targets, keys, values, gates, mask, cu_seqlens, *options
):
    inputs = (queries, targets, keys, values, gates)
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs if x is not None]


class _MemoryByDocument(Function):
    """The loop as one operator, and its backward as another, which runs the loop again with autograd."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args[:7])
        ctx.options = args[8:]
        results = _documents_op(*args)
        ctx.mark_non_differentiable(*results[1:3])
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, grad_output: Any, _slots: Any, _weights: Any, *grads: Any) -> Any:
        grads = (grad_output, *(grads or (None, None)))
        none = (None,) * (3 + len(ctx.options))
        if all(x is None for x in grads):
            return (None,) * 5 + none
        results = _documents_backward_op(*grads, *ctx.saved_tensors, *ctx.options)
        has_gates = ctx.saved_tensors[4] is not None
        return (*results, *none) if has_gates else (*results, None, *none)


def convolve(x: Tensor, weight: Tensor, documents: Documents, tail: Tensor | None) -> tuple[Tensor, Tensor]:
    """A causal depthwise convolution over the tokens of each document: z_t = Σ_i weight_i · x_{t - w + 1 + i}.

    Before the beginning of a document stand zeros, or `tail`; padding is not there. On the device: nothing waits.

    Args:
        x: [B, T, d].
        weight: [d, 1, w].
        tail: the w - 1 tokens before each document, [S, w - 1, d]; None is zeros.

    Returns:
        z [B, T, d], and the last w - 1 tokens of each document, [S, w - 1, d].
    """
    before = weight.shape[2] - 1
    count, (batch, length, width) = documents.number, x.shape
    if tail is None:
        tail = x.new_zeros(count, before, width)
    weight = weight.to(x.dtype)
    if documents.are_rows:
        window = torch.cat((tail.to(x.dtype), x), dim=1)
        return slide(window, weight), window[:, length:]
    # A row without its padding, and in front of each document its tail: so no window of w tokens meets two documents.
    real = (
        torch.ones(batch, length, dtype=torch.bool, device=x.device) if documents.mask is None else documents.mask > 0
    )
    running = F.pad(real.long().cumsum(1), (1, 0))  # tokens before each position
    bounds = documents.bounds(x.device)
    starts = running[:, bounds] + before * torch.arange(len(bounds), device=x.device)  # of each tail, [B, S / B + 1]
    places = running[:, :-1] + before * (documents.numbers(x.device) + 1)
    size = length + before * (len(bounds) - 1)
    places = torch.where(real, places, size)  # padding goes where nothing is read
    tail_places = (starts[:, :-1, None] + torch.arange(before, device=x.device)).flatten(1)

    def columns(index: Tensor) -> Tensor:
        return index.unsqueeze(-1).expand(-1, -1, width)

    window = x.new_zeros(batch, size + 1, width).scatter(1, columns(places), x)
    window = window.scatter(1, columns(tail_places), tail.to(x.dtype).reshape(*tail_places.shape, width))
    z = slide(window[:, :size], weight).gather(1, columns(torch.where(real, places - before, 0)))
    ends = (starts[:, 1:, None] - before + torch.arange(before, device=x.device)).flatten(1)
    last = window.gather(1, columns(ends)).view(count, before, width)
    return torch.where(real.unsqueeze(-1), z, 0.0), last


def slide(window: Tensor, weight: Tensor) -> Tensor:
    """The depthwise convolution of a window [B, t + w - 1, d] with [d, 1, w], [B, t, d]."""
    if window.shape[1] < weight.shape[2]:  # of no tokens, which conv1d refuses
        return window[:, :0]
    return F.conv1d(window.transpose(1, 2), weight, groups=weight.shape[0]).transpose(1, 2)
