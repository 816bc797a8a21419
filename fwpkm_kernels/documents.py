"""Documents in a batch of tokens: which tokens belong to which document.

Each row of a batch [B, T] is a document, or `cu_seqlens` packs several documents into one row, one behind the other.
Tokens that a mask marks as padding belong to no document. No document's results depend on another document.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks as checks
from .kernels import compute_dtype


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
        are_cut: whether the caller cuts documents apart, for which the host must know mask and cu_seqlens. The latter
            is then copied here, once, and validated before anything is computed. Otherwise it is validated only if it
            is on the CPU.

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
        if are_cut:
            checks.check_data("attention_mask", attention_mask)
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
    if cu_seqlens is not None and (not tokens.is_meta or (are_cut and cu_seqlens_cpu is None)):
        checks.check_data("cu_seqlens", cu_seqlens)
    if are_cut and cu_seqlens is not None and cu_seqlens_cpu is None and not torch.compiler.is_compiling():
        cu_seqlens_cpu = cu_seqlens.cpu()
    documents = Documents(batch, length, attention_mask, cu_seqlens, cu_seqlens_cpu)
    documents.check()
    return documents


def mean_gate(gates: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
    """The mean gate of all tokens but padding; 0-d, in the compute dtype."""
    if gates is None:
        return None
    gates = gates.to(compute_dtype(gates.dtype))
    if attention_mask is None:
        return gates.sum() / max(1, math.prod(gates.shape))  # 0 without tokens, so that a penalty on gates is 0 too
    real = attention_mask > 0
    return torch.where(real, gates, 0.0).sum() / real.sum().clamp(min=1)
