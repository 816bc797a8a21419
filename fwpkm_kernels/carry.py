"""Segments of a sequence: what one call has read and not written yet is carried into the next."""

import torch
from torch import Tensor

from . import _checks as checks
from .options import Options
from .records import Carry, DocumentsCarry, Inputs, each


def count_carried(position: int, o: Options) -> int:
    """How many of the tokens before this position belong to a written chunk and are written with the next one."""
    return o.lookahead if position >= o.chunk_size else 0


def check_carry(carry: Carry | None, inputs: Inputs, o: Options) -> None:
    """Validate what a segment begins with, against inputs and options that are valid; None begins a sequence."""
    if o.boundary != "carry":
        raise ValueError(f'`boundary` must be "carry" with `carry` or `return_carry`, got {o.boundary!r}')
    if carry is None:
        return
    if not isinstance(carry, Carry):
        raise TypeError(f"`carry` must be a Carry, as return_carry=True gives it, got {type(carry).__name__}")
    position = carry.position
    if not torch.compiler.is_compiling():  # it would make a constant of the position, and compile again for each
        position = checks.check_int("carry.position", position, minimum=0)
    batch, heads, width = inputs.queries.shape[0], *inputs.queries.shape[2:]
    checks.check_tensor("carry.queries", carry.queries, 4, "[B, c, H, Dk]")
    size = count_carried(position, o) + position % o.chunk_size
    shapes = {
        "queries": ("[B, c, H, Dk]", (batch, size, heads, width)),
        "targets": ("[B, c, D]", (batch, size, inputs.targets.shape[2])),
        "gates": ("[B, c]", (batch, size)),
        "mask": ("[B, c]", (batch, size)),
    }
    for name, (layout, wanted) in shapes.items():
        x, coming = getattr(carry, name), getattr(inputs, name)
        if x is None and name in ("gates", "mask"):
            continue
        checks.check_tensor(f"carry.{name}", x)
        if x.shape != wanted:
            raise ValueError(
                f"`carry.{name}` {layout} must be {list(wanted)} at position {position}, with these inputs and "
                f"`chunk_size` {o.chunk_size} and `lookahead` {o.lookahead}, got {checks.shape(x)}"
            )
        checks.check_device(f"carry.{name}", x, "queries", inputs.queries)
        if name == "mask":
            checks.check_mask("carry.mask", x)
        elif coming is None:
            checks.check_float(f"carry.{name}", x)
        elif x.dtype != coming.dtype:
            raise TypeError(f"`carry.{name}` must have the dtype of `{name}`, {coming.dtype}, got {x.dtype}")


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
    return Carry._make((*each(lambda x: x[:, first:], *tokens), position))


def carries_of(carry: DocumentsCarry | None, count: int, o: Options) -> list[Carry | None]:
    """The carry of each of `count` documents. Their positions are read on the host, which waits for them."""
    if carry is None:
        return [None] * count
    parts = [[None] * count if x is None else x.split(1) for x in carry[:3]]

    def of(number: int, position: int) -> Carry:
        first = carry.queries.shape[1] - count_carried(position, o) - position % o.chunk_size
        return Carry._make((*each(lambda x: x[:, first:], *(x[number] for x in parts)), None, position))

    return [of(number, position) for number, position in enumerate(carry.position.tolist())]
