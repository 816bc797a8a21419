"""Segments of a sequence: what one call has read and not written yet is carried into the next."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks as checks
from ._operators import operator
from .options import Options
from .records import Carry, DocumentsCarry, Inputs, each


def count_carried(position: int, o: Options) -> int:
    """How many of the tokens before this position belong to a written chunk and are written with the next one."""
    return o.lookahead if position >= o.chunk_size else 0


def check_carry(carry: Carry | None, inputs: Inputs, o: Options, carry_name: str = "carry") -> None:
    """Validate what a segment begins with, against inputs and options that are valid; None begins a sequence.

    Errors name the carry by `carry_name`.
    """
    if o.boundary != "carry":
        raise ValueError(f'`boundary` must be "carry" with `carry` or `return_carry`, got {o.boundary!r}')
    if carry is None:
        return
    if not isinstance(carry, Carry):
        raise TypeError(f"`{carry_name}` must be a Carry, as the segment before leaves it, got {type(carry).__name__}")
    position = carry.position
    if not torch.compiler.is_compiling():  # it would make a constant of the position, and compile again for each
        position = checks.check_int(f"{carry_name}.position", position, minimum=0)
    batch, heads, width = inputs.queries.shape[0], *inputs.queries.shape[2:]
    size = count_carried(position, o) + position % o.chunk_size
    shapes = {
        "queries": ("[B, c, H, Dk]", (batch, size, heads, width)),
        "targets": ("[B, c, D]", (batch, size, inputs.targets.shape[2])),
        "gates": ("[B, c]", (batch, size)),
        "mask": ("[B, c]", (batch, size)),
    }
    for name, (layout, wanted) in shapes.items():
        x = getattr(carry, name)
        if x is None and name in ("gates", "mask"):
            continue
        checks.check_tensor(f"{carry_name}.{name}", x)
        if x.shape != wanted:
            raise ValueError(
                f"`{carry_name}.{name}` {layout} must be {list(wanted)} at position {position}, with these inputs and "
                f"`chunk_size` {o.chunk_size} and `lookahead` {o.lookahead}, got {checks.shape(x)}"
            )
        _check_kind(carry_name, name, x, inputs)


def _check_kind(carry_name: str, name: str, x: Tensor, inputs: Inputs) -> None:
    """Refuse tokens of a carry that cannot stand before those of the inputs, for their device or dtype."""
    coming, device = getattr(inputs, name), inputs.queries.device
    if x.device != device:
        raise ValueError(
            f"`{carry_name}.{name}` must be on the device of the tokens that come, {device}, got {x.device}"
        )
    if name == "mask":
        checks.check_mask(f"{carry_name}.mask", x)
    elif coming is None:
        checks.check_float(f"{carry_name}.{name}", x)
    elif x.dtype != coming.dtype:
        raise TypeError(
            f"`{carry_name}.{name}` must have the dtype of the {name} that come, {coming.dtype}, got {x.dtype}: all "
            "segments of a sequence must be of one dtype, and run under the same autocast"
        )


def prepend(carry: Carry, inputs: Inputs) -> Inputs:
    """The tokens of the carry and those that come; gates or mask that only one of both has are ones in the other."""

    def factor(before: Tensor | None, coming: Tensor | None) -> Tensor | None:
        given = coming if before is None else before
        if given is None:
            return None
        before = given.new_ones(carry.queries.shape[:2]) if before is None else before
        coming = given.new_ones(inputs.queries.shape[:2]) if coming is None else coming
        return torch.cat((before, coming), dim=1)

    return inputs._replace(
        queries=torch.cat((carry.queries, inputs.queries), dim=1),
        targets=torch.cat((carry.targets, inputs.targets), dim=1),
        gates=factor(carry.gates, inputs.gates),
        mask=factor(carry.mask, inputs.mask),
    )


def leave(inputs: Inputs, position: int, o: Options) -> Carry:
    """The carry at this position of a sequence whose last tokens are those of `inputs`."""
    first = inputs.queries.shape[1] - count_carried(position, o) - position % o.chunk_size
    tokens = (inputs.queries, inputs.targets, inputs.gates, inputs.mask)
    # Copies, since views would keep the whole sequence, and be guarded by where they begin in it under torch.compile.
    return Carry._make((*each(lambda x: x[:, first:].clone(), *tokens), position))


def count_window(o: Options) -> int:
    """W: the most tokens that a document can have read and not written yet."""
    return o.chunk_size - 1 + o.lookahead


def check_documents_carry(
    carry: DocumentsCarry | None, inputs: Inputs, documents: int, o: Options, carry_name: str = "carry"
) -> None:
    """Validate what segments of documents begin with, as `check_carry` does."""
    if o.boundary != "carry":
        raise ValueError(f'`boundary` must be "carry" with `carry` or `return_carry`, got {o.boundary!r}')
    if carry is None:
        return
    if not isinstance(carry, DocumentsCarry):
        kind = type(carry).__name__
        raise TypeError(f"`{carry_name}` must be a DocumentsCarry, as the segments before leave it, got {kind}")
    window = (documents, count_window(o))
    layouts = {"queries": "[S, W, H, Dk]", "targets": "[S, W, D]", "gates": "[S, W]", "mask": "[S, W]"}
    for name, layout in layouts.items():
        x, coming = getattr(carry, name), getattr(inputs, name)
        if x is None and name in ("gates", "mask"):
            continue
        checks.check_tensor(f"{carry_name}.{name}", x)
        wanted = window if coming is None else (*window, *coming.shape[1:])
        if x.shape != wanted:
            raise ValueError(
                f"`{carry_name}.{name}` {layout} must be {list(wanted)}, W = `chunk_size` - 1 + `lookahead`, with "
                f"these inputs and {documents} documents, got {checks.shape(x)}"
            )
        _check_kind(carry_name, name, x, inputs)
    checks.check_tensor(f"{carry_name}.position", carry.position, 1, "[S]")
    if carry.position.shape[0] != documents:
        raise ValueError(f"`{carry_name}.position` must be [{documents}], got {checks.shape(carry.position)}")
    if carry.position.dtype != torch.int64:
        raise TypeError(f"`{carry_name}.position` must be int64, got {carry.position.dtype}")
    checks.check_data(f"{carry_name}.position", carry.position)
    if carry.position.is_cpu and not torch.compiler.is_compiling():
        _check_position(f"{carry_name}.position", carry.position)


def _check_position(name: str, position: Tensor) -> None:
    if bool((position < 0).any()):
        raise ValueError(f"`{name}` must be at least 0, got {position.tolist()}")


def empty_carry(inputs: Inputs, documents: int, o: Options) -> DocumentsCarry:
    """The carry that documents begin with."""
    window = (documents, count_window(o))
    tokens = (inputs.queries, inputs.targets, inputs.gates, inputs.mask)
    position = torch.zeros(documents, dtype=torch.int64, device="cpu")
    return DocumentsCarry._make((*each(lambda x: x.new_zeros(*window, *x.shape[1:]), *tokens), position))


class Continued(NamedTuple):
    """Where the tokens lie with which documents go on, int64, on the CPU: among the S·W of their carry, all documents'
    windows one behind the other, and the T that come, behind these."""

    packed: Tensor  #: [S·W + T]: those of each document that it has not written, and its new ones; then surplus ones
    bounds: Tensor  #: [S + 1]: of the documents in `packed`
    carried: Tensor  #: [S]: how many of the first tokens of each were read in a chunk that is written
    outputs: Tensor  #: [T]: where in `packed` each token that comes stands
    last: Tensor  #: [S·W]: the carry that the documents leave
    position: Tensor  #: [S]: how many tokens each document then has had


@operator(
    "continue_documents",
    schema="(Tensor cu_seqlens, Tensor position, SymInt length, bool may_end_before, int chunk_size, int lookahead) "
    "-> Tensor[]",
)
def _continue_op(
    cu_seqlens: Tensor, position: Tensor, length: int, may_end_before: bool, chunk_size: int, lookahead: int
) -> list[Tensor]:
    bounds, position = cu_seqlens.cpu().long(), position.cpu()
    checks.check_bounds(bounds.tolist(), length, may_end_before=may_end_before)
    _check_position("carry.position", position)
    o = Options(chunk_size=chunk_size, lookahead=lookahead)
    documents, window = len(position), count_window(o)
    lengths = bounds.diff()
    carried = torch.where(position >= chunk_size, lookahead, 0)
    waiting = carried + position % chunk_size
    packed_bounds = F.pad((waiting + lengths).cumsum(0), (1, 0))
    owner = torch.repeat_interleave(waiting + lengths)
    offset = torch.arange(len(owner), device="cpu") - packed_bounds[owner] - waiting[owner]
    before = (owner + 1) * window + offset  # the last ones of the document's window
    index = torch.where(offset < 0, before, documents * window + bounds[owner] + offset)
    packed = index.new_zeros(documents * window + length)
    packed[: len(index)] = index
    outputs = (offset >= 0).nonzero().flatten()
    outputs = F.pad(outputs, (0, length - len(outputs)), value=len(index))  # a surplus place, of which there are enough
    last = last_places(lengths, torch.arange(length, device="cpu"), window)
    return [*Continued(packed, packed_bounds, carried, outputs, last, position + lengths)]


@_continue_op.register_fake
def _(cu_seqlens, position, length, may_end_before, chunk_size, lookahead):  # type: ignore[no-untyped-def]
    documents = position.shape[0]
    places = documents * count_window(Options(chunk_size=chunk_size, lookahead=lookahead))
    sizes = (places + length, documents + 1, documents, length, places, documents)
    return [torch.empty(size, dtype=torch.int64, device="cpu") for size in sizes]


def continue_documents(
    carry: DocumentsCarry, cu_seqlens: Tensor, length: int, may_end_before: bool, o: Options
) -> Continued:
    """Where documents go on, of which the `length` tokens that come, or the first ones of them, are cut by
    `cu_seqlens`."""
    return Continued(*_continue_op(cu_seqlens, carry.position, length, may_end_before, o.chunk_size, o.lookahead))


def prepend_windows(carry: DocumentsCarry, inputs: Inputs) -> Inputs:
    """The tokens of all documents' windows, S·W, before those that come; gates or mask that only one of both has are
    ones in the other."""
    flat = Carry._make((*each(lambda x: x.flatten(0, 1).unsqueeze(0), *carry[:4]), 0))
    batch = inputs._replace(**_tokens(inputs, lambda x: x.unsqueeze(0)))
    joined = prepend(flat, batch)
    return joined._replace(**_tokens(joined, lambda x: x.squeeze(0)))


def leave_documents(joined: Inputs, places: Continued, o: Options) -> DocumentsCarry:
    """The carry that documents leave, of which `prepend_windows` has joined what they have read."""
    left = take_tokens(joined, places.last)
    window = (places.position.shape[0], count_window(o))
    tokens = (left.queries, left.targets, left.gates, left.mask)
    return DocumentsCarry._make((*each(lambda x: x.unflatten(0, window), *tokens), places.position))


def take_tokens(inputs: Inputs, index: Tensor) -> Inputs:
    """Those tokens of [T, ...], by an index on the CPU; keys and values as they are."""
    index = index.to(inputs.targets.device, non_blocking=True)
    return inputs._replace(**_tokens(inputs, lambda x: x.index_select(0, index)))


def _tokens(inputs: Inputs, function: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    names = ("queries", "targets", "gates", "mask")
    return dict(zip(names, each(function, *(getattr(inputs, name) for name in names)), strict=True))


def last_places(lengths: Tensor, order: Tensor, size: int) -> Tensor:
    """Where the last `size` tokens of each of S documents lie: among `size` earlier ones of each, all documents' one
    behind the other, and the tokens that come, behind these; int64 [S·size].

    Args:
        lengths: int64 [S]: how many tokens come of each document.
        order: int64: where these lie among all that come, document by document; there may be others behind.
    """
    documents, device = lengths.shape[0], lengths.device
    wanted = lengths.unsqueeze(1) + torch.arange(size, device=device)  # among the earlier and the document's tokens
    first = (lengths.cumsum(0) - lengths).unsqueeze(1)
    own = F.pad(order, (0, 1))[(first + wanted - size).clamp(min=0)]  # of no meaning where earlier ones are meant
    earlier = size * torch.arange(documents, device=device).unsqueeze(1) + wanted
    return torch.where(wanted < size, earlier, documents * size + own).flatten()


def carries_of(carry: DocumentsCarry | None, count: int, o: Options) -> list[Carry | None]:
    """The carry of each of `count` documents. Their positions are read on the host, which waits for them."""
    if carry is None:
        return [None] * count
    parts = [[None] * count if x is None else x.split(1) for x in carry[:4]]

    def of(number: int, position: int) -> Carry:
        first = carry.queries.shape[1] - count_carried(position, o) - position % o.chunk_size
        return Carry._make((*each(lambda x: x[:, first:], *(x[number] for x in parts)), position))

    return [of(number, position) for number, position in enumerate(carry.position.tolist())]
