"""The records that travel between modules and into kernels, each with what its tensors hold and their shapes.

Nothing is computed here, and only torch is imported: kernels import this module, torch and triton, and no other module
of the package.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


def each(function: Callable[[Tensor], Tensor], *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """`function` of each tensor, and None for a tensor that is not there, as gates and mask may be."""
    return tuple(None if x is None else function(x) for x in tensors)


class Inputs(NamedTuple):
    """What a memory is given of a sequence, and the keys and values that it begins with."""

    queries: Tensor  #: [B, T, H, Dk]
    targets: Tensor  #: [B, T, D]
    keys: Tensor  #: [H, 2, n, Dk/2]
    values: Tensor  #: [N, D]
    gates: Tensor | None  #: [B, T]
    mask: Tensor | None  #: [B, T]

    def detach(self) -> "Inputs":
        """The same without autograd."""
        return Inputs(*each(Tensor.detach, *self))  # type: ignore[arg-type]


class Carry(NamedTuple):
    """What a segment of a sequence has read and not written yet, which the next segment begins with.

    These are the c tokens of the chunk that is not full, behind the L tokens before it if there is a chunk before.
    """

    queries: Tensor  #: [B, c, H, Dk], c < chunk_size + lookahead
    targets: Tensor  #: [B, c, D]
    gates: Tensor | None  #: [B, c]
    mask: Tensor | None  #: [B, c]
    position: int  #: how many tokens the sequence has had so far

    def detach(self) -> "Carry":
        """The same without its graph: gradients of the next segment end here."""
        return Carry._make((*each(Tensor.detach, *self[:4]), self.position))


class DocumentsCarry(NamedTuple):
    """What segments of S documents have read and not written yet, in shapes that do not depend on how much that is.

    Of every document these are its last W = C - 1 + L tokens, of which it goes on with those that `Carry` would have.
    """

    queries: Tensor  #: [S, W, H, Dk]; what was before a document is 0
    targets: Tensor  #: [S, W, D]
    gates: Tensor | None  #: [S, W]
    mask: Tensor | None  #: [S, W]
    position: Tensor  #: int64 [S]: how many tokens each document has had so far; best on the CPU, as `cu_seqlens`

    def detach(self) -> "DocumentsCarry":
        """The same without its graph: gradients of the next segments end here."""
        return DocumentsCarry._make(each(Tensor.detach, *self))


class Plan(NamedTuple):
    """Accesses sorted by the table row that they touch; every field is [A], one entry per sorted position."""

    order: Tensor  #: int64: which access stands at this position
    rows: Tensor  #: the row that it touches, ascending
    start: Tensor  #: where the segment of that row begins, in `position_dtype`
    end: Tensor  #: one past where it ends, likewise

    @classmethod
    def empty(cls, accesses: int, rows: torch.dtype, device: torch.device) -> "Plan":
        """A plan of so many accesses, with rows of this dtype and positions in int32, for a kernel to fill in."""
        dtypes = (torch.int64, rows, torch.int32, torch.int32)
        return cls(*(torch.empty(accesses, dtype=dtype, device=device) for dtype in dtypes))

    def split(self, sizes: list[int]) -> Iterator["Plan"]:
        """Plans of so many accesses each, one after the other: views that are made all at once."""
        return map(Plan._make, zip(*(x.split_with_sizes(sizes) for x in self), strict=True))


class Picks(NamedTuple):
    """The K best sub-keys of each half of M rows of queries: what the key step moves."""

    half_scores: Tensor  #: [M, H, 2, K], descending, in the compute dtype
    sub_keys: Tensor  #: int32 [M, H, 2, K]: the sub-keys with these scores, as rows of keys.view(H·2·n, Dk/2)

    def since(self, first_row: int) -> "Picks":
        """Those of the rows from `first_row` on."""
        return Picks(self.half_scores[first_row:], self.sub_keys[first_row:])


class Addresses(NamedTuple):
    """What a lookup of M rows of queries finds."""

    scores: Tensor  #: [M, H, K], in the compute dtype
    slots: Tensor  #: int64 [M, H, K]
    half_scores: Tensor  #: [M, H, 2, K], as in `Picks`
    sub_keys: Tensor  #: int32 [M, H, 2, K], likewise

    @classmethod
    def empty(cls, queries: Tensor, top_k: int, dtype: torch.dtype) -> "Addresses":
        """Those of queries [M, H, Dk], for a lookup to fill in."""
        size, device = queries.shape[:2], queries.device
        return cls(
            torch.empty((*size, top_k), dtype=dtype, device=device),
            torch.empty((*size, top_k), dtype=torch.int64, device=device),
            torch.empty((*size, 2, top_k), dtype=dtype, device=device),
            torch.empty((*size, 2, top_k), dtype=torch.int32, device=device),
        )

    @property
    def picks(self) -> Picks:
        """The half scores and their sub-keys."""
        return Picks(self.half_scores, self.sub_keys)

    def split(self, sizes: list[int]) -> Iterator["Addresses"]:
        """Those of so many rows each, one after the other: views that are made all at once."""
        return map(Addresses._make, zip(*(x.split_with_sizes(sizes) for x in self), strict=True))


#: A plan in the schema of a backward operator: torch.autograd.functional.jacobian(vectorize=True) can loop over an
#: operator of tensors, but over none of a list of them, which is what other operators take.
PLAN_SCHEMA = ", ".join(f"Tensor {name}" for name in Plan._fields)


class PickPlan(NamedTuple):
    """The plan of sub-keys [M, H, 2, K], and how much each is used."""

    tokens: Tensor  #: [M·H·2·K]: those that picked each sub-key of each head, in order
    order: Tensor  #: [M·H·2·K]: which of all picks that was
    first: Tensor  #: [H·2·n + 1]: where the tokens of each sub-key begin
    slope: Tensor  #: [memories·2·n]: of P̄·log(P̄ + 1e-8), at the usage P̄ of each sub-key, heads of a memory pooled
    bend: Tensor  #: [memories·2·n]: the derivative of the slope

    def sizes(self, heads: int) -> tuple[int, int]:
        """(How many sub-keys n a half has, how many of the `heads` one memory has)."""
        num_keys = (self.first.numel() - 1) // (2 * heads)
        return num_keys, heads * 2 * num_keys // self.slope.numel()


class Layout(NamedTuple):
    """The numbers from which kernels work out what `cut` and `number_reads` say; in the order that these take them."""

    batch: int
    length: int  #: of the sequence, in positions
    chunk_size: int  #: at most the length plus the lookahead, since a longer chunk cuts nothing
    lookahead: int
    rereads: int  #: of every full chunk but perhaps the first
    missing: int  #: how many of them the first chunk lacks
    full: int  #: how many chunks are written
    positions: int  #: that are read, re-reads included


class Queue(NamedTuple):
    """What waits for a chunk to be full: C tokens of the present chunk, after L that are carried from the one before.

    Time first, so that the tokens of a chunk are a slice.
    """

    queries: Tensor  #: [L + C, B, H, Dk]
    gates: Tensor  #: [L + C, B]
    mask: Tensor  #: [L + C, B]
    targets: Tensor  #: [C, B, D]
    predictions: Tensor  #: [C, B, D], not rounded
    slots: Tensor  #: int64 [C, B, H, K]
    weights: Tensor  #: [C, B, J]
    half_scores: Tensor  #: [C, B, H, 2, K]
    sub_keys: Tensor  #: int32 [C, B, H, 2, K]


class Tokens(NamedTuple):
    """Some tokens of all items of the batch, time first."""

    queries: Tensor  #: [t, B, H, Dk]
    targets: Tensor  #: [t, B, D]
    gates: Tensor | None  #: [t, B]
    mask: Tensor | None  #: [t, B]

    def part(self, begin: int, end: int) -> "Tokens":
        """The tokens from `begin` to `end`."""
        return self.map(lambda x: x[begin:end])

    def map(self, function: Callable[[Tensor], Tensor]) -> "Tokens":
        """`function` of each tensor that is there."""
        return Tokens(*each(function, *self))  # type: ignore[arg-type]


class Rows(NamedTuple):
    """Rows of tables of values; how many is known before the data are, so some places are unused: their slot is -1."""

    document: Tensor  #: int64 [R]: in whose table; 0 where there is one table, and in unused places
    slot: Tensor  #: int64 [R]: which row of that table; no row occurs twice
    value: Tensor  #: [R, D]; 0 in unused places
    #: [S], in the compute dtype: what all other rows of each table have been multiplied by, as weight decay does; None
    #: is 1. Not differentiable.
    decay: Tensor | None = None

    def detach(self) -> "Rows":
        """The same without autograd."""
        return Rows._make(each(Tensor.detach, *self))


class Writes(NamedTuple):
    """What the reads of a sequence weigh, and what they write, chunk by chunk."""

    weights: Tensor  #: w, [R, J]
    write_weights: Tensor  #: c, [R, J]
    counts: Tensor  #: n_s, int32 [R, J]
    plan: Plan  #: of each chunk, as `within_chunks` makes it


class MemoryOutput(NamedTuple):
    """What a sequence leaves behind."""

    output: Tensor  #: [B, T, D], in the targets' dtype
    keys: Tensor  #: [H, 2, n, Dk/2], after the last write
    values: Any  #: [N, D], after the last write; under final="rows" the `Rows` of it that were read, slots ascending
    slots: Tensor  #: [B, T, J], int64, of the output reads; not differentiable
    weights: Tensor  #: [B, T, J], of the output reads; not differentiable


class VarlenOutput(NamedTuple):
    """What packed documents leave behind, each with a memory of its own."""

    output: Tensor  #: [T, D], in the targets' dtype
    keys: Tensor  #: [S, H, 2, n, Dk/2], after each document's last write
    rows: Rows  #: of each document: those that it has read, and those that it began with, after its last write
    slots: Tensor  #: [T, J], int64, of the output reads; not differentiable
    weights: Tensor  #: [T, J], of the output reads; not differentiable
