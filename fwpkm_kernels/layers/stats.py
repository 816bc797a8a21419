"""How a memory is used: figures for a log, as tensors."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks as checks
from ..kernels import compute_dtype
from ..plan import plan_segments


class MemoryStats(NamedTuple):
    """Figures of the accesses of one call, each a tensor without dimensions; NaN where there is nothing to average."""

    coverage: Tensor  #: the share of all slots that are used
    collisions: Tensor  #: the share of accesses whose slot another token accesses too
    divergence: Tensor  #: KL, in nats, of the slots' shares of accesses from uniform shares: 0 to log N
    entropy: Tensor  #: in nats, of a token's weights, the mean over tokens: 0 to log J
    hits: Tensor  #: accesses of a used slot after its first, the mean over used slots
    gate: Tensor  #: the mean over tokens
    erosion: Tensor  #: what is left of the first write to a used slot, the mean over used slots: 0 to 1


def memory_stats(slots: Tensor, weights: Tensor, num_slots: int, gates: Tensor | None = None) -> MemoryStats:
    """Say how evenly tokens use the slots of a memory, and how much of what they write is overwritten.

    With A accesses in all, c_s of them to slot s, U slots that have any, and w̃ = |w| / Σ|w| over a token's picks:

        coverage = U / N                              divergence = Σ_s (c_s/A) · log(N · c_s/A)
        collisions = Σ_{s: ≥ 2 tokens} c_s / A         entropy = mean over tokens of -Σ_j w̃_j · log w̃_j
        hits = (A - U) / U                            erosion = mean over used s of (1 - g/J)^(c_s - 1)

    Erosion is an estimate: a write moves each of a token's J rows by about g/J of itself, g being the mean gate. It
    counts every access as a write.

    No shape depends on data, and nothing waits for the slots' device, on which all is computed; only `float` of a
    result waits. The results carry no gradients.

    Slots are those of one memory: where each sequence has its own, as under scope="sequence", call it for each.

    Args:
        slots: [..., J], int64 or int32, all J picks of each token: in [0, N), or -1 at places that do not count, such
            as padding. The range is checked on CPU tensors, in eager code.
        weights: [..., J], any float dtype, of either sign. A token of weights that are all 0 has no entropy.
        num_slots: N.
        gates: [...], what each token's write is multiplied with, any float dtype. Without them `gate` is NaN, and
            `erosion` that of a memory without gates, g = 1. Those of tokens whose slots are all -1 do not count.

    Returns:
        MemoryStats, in float32 (float64 for float64 weights). Without accesses coverage is 0 and all else NaN.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    _check_stats(slots, weights, gates)
    num_slots = checks.check_int("num_slots", num_slots, minimum=1)
    if not torch.compiler.is_compiling():
        checks.check_slot_range("slots", slots, num_slots, minimum=-1)
    dtype, picks = compute_dtype(weights.dtype), slots.shape[-1]
    size = (math.prod(slots.shape[:-1]), picks)
    slots, weights = slots.reshape(size), weights.detach().reshape(size).to(dtype)

    # Accesses are sorted by slot, and by token within a slot: a slot's figures are counted at its first access.
    plan = plan_segments(slots, num_slots)
    counted = plan.rows >= 0
    position = torch.arange(counted.shape[0], dtype=plan.start.dtype, device=slots.device)
    is_first = counted & (plan.start == position)
    token = plan.order // max(picks, 1)
    is_shared = counted & (token[plan.start] != token[plan.end - 1])
    accesses, used, shared = (x.sum().to(dtype) for x in (counted, is_first, is_shared))
    count = (plan.end - plan.start).to(dtype)

    magnitudes = torch.where(slots >= 0, weights.abs(), 0.0)
    total = magnitudes.sum(-1, keepdim=True)
    is_weighed = total > 0
    entropies = torch.special.entr(magnitudes / torch.where(is_weighed, total, 1.0)).sum(-1)

    gate = torch.full((), math.nan, dtype=dtype, device=slots.device)
    if gates is not None:
        has_slots = (slots >= 0).any(-1)
        gate = torch.where(has_slots, gates.detach().reshape(size[0]).to(dtype), 0.0).sum() / has_slots.sum()
    left = (1.0 - (1.0 if gates is None else gate) / max(picks, 1)) ** (count - 1.0)
    return MemoryStats(
        coverage=used / num_slots,
        collisions=shared / accesses,
        divergence=torch.where(counted, torch.log(count * (num_slots / accesses)), 0.0).sum() / accesses,
        entropy=entropies.sum() / is_weighed.sum(),
        hits=(accesses - used) / used,
        gate=gate,
        erosion=torch.where(is_first, left, 0.0).sum() / used,
    )


def _check_stats(slots: Tensor, weights: Tensor, gates: Tensor | None) -> None:
    checks.check_tensor("slots", slots)
    checks.check_slots("slots", slots)
    if slots.dim() < 1:
        raise ValueError("`slots` must have at least 1 dimension [..., J], got a scalar")
    checks.check_tensor("weights", weights)
    checks.check_float("weights", weights)
    checks.check_like("weights", weights, "slots", slots)
    checks.check_together(weights=weights, slots=slots)
    if gates is not None:
        checks.check_tensor("gates", gates)
        checks.check_float("gates", gates)
        if gates.shape != slots.shape[:-1]:
            raise ValueError(
                f"`gates` must have the shape of `slots` less its last dimension, {list(slots.shape[:-1])}, "
                f"got {checks.shape(gates)}"
            )
        checks.check_together(weights=weights, gates=gates)
