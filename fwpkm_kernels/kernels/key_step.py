"""The key step: a step of the sub-keys toward being used evenly, and its backward, joint with the lookup's.

A half of a row picks K sub-keys with probabilities P, the softmax of its half scores; P̄ is their mean over the rows of
all heads, and u = log(P̄ + 1e-8) + P̄/(P̄ + 1e-8) the slope of P̄·log(P̄ + 1e-8). Everything here is [rows, 2, K] beside
the rows of the sub-keys that were picked. `kernels/picks.py` lists the picks of each sub-key, and has its u and u'.

Forward is then `step_kernel`, from the picks to the factors of q - k, and `key_sum_kernel`, whose sum is not stored
but stepped by. Backward is `step_grad_kernel`, the same with the gradient V of the totals; `pick_sums_kernel`, the sums
that the gradient of P̄ takes; `score_grad_kernel`, which leaves one gradient for each half score picked, the lookup's
own included, to `half_grad` in `kernels/lookup.py`; and `key_sum_kernel` again. There are few sub-keys, so one program
sums all picks of one, many at a time, since every token may have picked it; nothing is left to be added up after it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..records import PickPlan, Picks
from ._common import cdiv, launch, next_power_of_2, wait_for_inputs
from .lookup import half_grad
from .picks import pick_sums, probabilities
from .segments import finish_row


class KeySumConfig(NamedTuple):
    """Tile of `key_sum_kernel`: BLOCK_A picks by BLOCK_D columns at a time."""

    block_a: int
    block_d: int
    num_warps: int


def key_sum_config(width: int, picks: float, dtype: torch.dtype) -> KeySumConfig:
    """Launch table, keyed by the width of a sub-key, the picks that one has on average, and the dtype of the sums."""
    block_a = min(max(next_power_of_2(max(1, int(picks))), 16), 64)
    # The column blocks are narrow, so that several programs share a sub-key that many tokens pick.
    block_d = min(next_power_of_2(max(1, width)), 64)
    return KeySumConfig(block_a * 4 // dtype.itemsize, block_d, max(1, block_a * block_d // 1024))


@triton.jit(do_not_specialize=["R", "first_row"])
def step_kernel(
    half_scores_ptr, sub_keys_ptr, slope_ptr, factor_ptr,
    R, H, POOLED, first_row, share: tl.float64, weight: tl.float64,
    NUM_KEYS: tl.constexpr, TOP_K: tl.constexpr, IDW: tl.constexpr, SEVERAL: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):
    """Factors f = c·2/E of q - k (or c, of q, for dot), with c = weight·share·P·(u - Σ P·u); 0 before `first_row`.

    2/E = 2·exp(half score), where E = eps + |q - k|². The sums of f·(q - k) over the picks of a sub-key are the
    totals that it steps by. `share` is 1 / rows. With SEVERAL the heads are those of memories of POOLED heads each,
    whose slopes lie one after the other. A program owns BLOCK_R of the R halves of these. Grid: (tiles of halves,).
    """
    wait_for_inputs(PDL)
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    is_stepped = (offs_r < R) & (offs_r // (2 * H) >= first_row)
    mask = is_stepped[:, None] & (offs_k < TOP_K)[None, :]
    picks = offs_r.to(tl.int64)[:, None] * TOP_K + offs_k[None, :]  # [BLOCK_R, BLOCK_K]
    scores = tl.load(half_scores_ptr + picks, mask=mask, other=float("-inf"))
    row = tl.load(sub_keys_ptr + picks, mask=mask, other=0)
    i_head = offs_r // 2 % H
    if SEVERAL:
        i_head -= i_head // POOLED
    u = tl.load(slope_ptr + row - (i_head * (2 * NUM_KEYS))[:, None], mask=mask, other=0.0)
    factor = factors_of_step(scores, u, is_stepped, share, weight, IDW)
    tl.store(factor_ptr + picks, factor, mask=(offs_r < R)[:, None] & (offs_k < TOP_K)[None, :])


@triton.jit
def factors_of_step(scores, u, mask, share, weight, IDW: tl.constexpr):
    """Factors of the key step from the half scores and slopes of the picks of each row, 0 where `mask` is not set."""
    probability = probabilities(scores, mask)
    factor = probability * (u - tl.sum(probability * u, axis=1)[:, None])
    factor *= tl.full([], weight, factor.dtype) * tl.full([], share, factor.dtype)
    if IDW:
        factor *= 2.0 * tl.exp(scores)
    return factor


@triton.jit(do_not_specialize=["first_row"])
def key_sum_kernel(
    queries_ptr, factor_ptr, step_factor_ptr, tokens_ptr, order_ptr, first_ptr, keys_ptr, steps_ptr, base_ptr, out_ptr,
    stride_qm, stride_qh, stride_qd, stride_kn, stride_kd,
    first_row, decay: tl.float64, lr: tl.float64, clip: tl.float64,
    NUM_KEYS: tl.constexpr, HALF: tl.constexpr, IDW: tl.constexpr, EPILOGUE: tl.constexpr, CLIP: tl.constexpr,
    STEP: tl.constexpr, ALL_ROWS: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):
    """total = Σ f·(q - k) over the picks of sub-key k (or Σ f·q, for dot) from `first_row` on; then the EPILOGUE:

        "update"     out = decay·k - lr·clamp(total)                            the key step
        "step_grad"  out = lr·base where |total| <= clip, else 0                V, where the clamp was not active
        "grad"       out = decay·base - (Σ step_factor)·step + total            the gradient of the sub-keys

    The middle term is there only with STEP. A program owns BLOCK_D columns of one row of the table [H·2·n, Dk/2]. Rows
    that nobody picked are written only with ALL_ROWS, as if total were 0. Grid: (H·2·n, column blocks).
    """
    wait_for_inputs(PDL)
    i_row = tl.program_id(0)
    begin = tl.load(first_ptr + i_row)
    end = tl.load(first_ptr + i_row + 1)
    is_written = begin < end
    if ALL_ROWS:
        is_written = begin <= end
    if is_written:
        dtype: tl.constexpr = factor_ptr.dtype.element_ty
        i_group = i_row // NUM_KEYS
        offs_d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask_d = offs_d < HALF
        base_row = i_row.to(tl.int64) * HALF + offs_d  # [BLOCK_D]
        k_ptrs = keys_ptr + i_row.to(tl.int64) * stride_kn + offs_d * stride_kd
        k = tl.load(k_ptrs, mask=mask_d, other=0.0).to(dtype)
        q_ptrs = queries_ptr + (i_group // 2).to(tl.int64) * stride_qh + ((i_group % 2) * HALF + offs_d) * stride_qd
        totals = tl.zeros([BLOCK_A, BLOCK_D], dtype)
        step_totals = tl.zeros([BLOCK_A], dtype)
        offs_a = begin + tl.arange(0, BLOCK_A)
        token = tl.load(tokens_ptr + offs_a, mask=offs_a < end, other=0)  # [BLOCK_A]
        pick = tl.load(order_ptr + offs_a, mask=offs_a < end, other=0)
        position = begin
        while position < end:
            # Factors before the first row are 0, but 0 times a NaN query is NaN: so those queries are not read.
            mask_a = (position + tl.arange(0, BLOCK_A) < end) & (token >= first_row)
            # The next picks are loaded before the queries of these, so that a step waits for memory once, not twice.
            position += BLOCK_A
            offs_a = position + tl.arange(0, BLOCK_A)
            next_token = tl.load(tokens_ptr + offs_a, mask=offs_a < end, other=0)
            next_pick = tl.load(order_ptr + offs_a, mask=offs_a < end, other=0)
            factor = tl.load(factor_ptr + pick, mask=mask_a, other=0.0)  # [BLOCK_A]
            if STEP:
                step_totals += tl.load(step_factor_ptr + pick, mask=mask_a, other=0.0)
            q = tl.load(
                q_ptrs[None, :] + token.to(tl.int64)[:, None] * stride_qm,
                mask=mask_a[:, None] & mask_d[None, :], other=0.0,
            ).to(dtype)  # [BLOCK_A, BLOCK_D]
            if IDW:
                q -= k[None, :]  # where there is no pick, the factor is 0
            totals += factor[:, None] * q
            token = next_token
            pick = next_pick
        total = tl.sum(totals, axis=0)  # [BLOCK_D]
        scale = tl.full([], decay, dtype)
        if EPILOGUE == "grad":
            result = scale * tl.load(base_ptr + base_row, mask=mask_d, other=0.0)
            if STEP:  # rows of `steps` that nobody picked were not written
                step = tl.load(steps_ptr + base_row, mask=offs_d < tl.where(begin < end, HALF, 0), other=0.0)
                result -= tl.sum(step_totals, axis=0) * step
            result += total
        else:
            old = k
            if EPILOGUE == "step_grad":
                old = tl.load(base_ptr + base_row, mask=mask_d, other=0.0)
            result = finish_row(total, old, decay, lr, clip, EPILOGUE, CLIP)
            result = tl.where(begin < end, result, scale * k)
        tl.store(out_ptr + base_row, result.to(out_ptr.dtype.element_ty), mask=mask_d)


@triton.jit(do_not_specialize=["first_row"])
def step_grad_kernel(
    half_scores_ptr, sub_keys_ptr, slope_ptr, queries_ptr, keys_ptr, grad_totals_ptr, grad_queries_ptr, factor_ptr,
    dot_ptr, share_ptr,
    stride_qm, stride_qh, stride_qd, stride_kn, stride_kd,
    H, POOLED, first_row, share: tl.float64, weight: tl.float64, direction: tl.float64,
    NUM_KEYS: tl.constexpr, HALF: tl.constexpr, TOP_K: tl.constexpr, IDW: tl.constexpr, SEVERAL: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """With V, the gradient of the totals: a = <V, ds/dk> = 2·<V, q - k>/E (or <V, q>), and P·(a - Σ P·a), the parts of
    the gradient of u; the factors f of `step_kernel`; and Σ f·V over the picks, the gradient of q in f·(q - k).

    The heads are those of `step_kernel`. V is `direction` times the table `grad_totals` [H·2·n, Dk/2], and the
    factors are those of that table. All are 0 in rows before `first_row`. A program owns one half of one (token,
    head) row. It reads V once if it fits one tile, else twice. Grid: (rows, 2).
    """
    i_row = tl.program_id(0).to(tl.int64)
    i_half = tl.program_id(1).to(tl.int64)
    i_m = i_row // H
    i_head = i_row % H
    dtype: tl.constexpr = factor_ptr.dtype.element_ty
    is_stepped = i_m >= first_row

    offs_k = tl.arange(0, BLOCK_K)
    mask_s = offs_k < tl.where(is_stepped, TOP_K, 0)
    picks = (i_row * 2 + i_half) * TOP_K + offs_k  # [BLOCK_K]
    scores = tl.load(half_scores_ptr + picks, mask=mask_s, other=float("-inf"))
    row = tl.load(sub_keys_ptr + picks, mask=mask_s, other=0).to(tl.int64)
    first_key = i_head * (2 * NUM_KEYS)
    if SEVERAL:
        first_key -= i_head // POOLED * (2 * NUM_KEYS)
    u = tl.load(slope_ptr + row - first_key, mask=mask_s, other=0.0)
    dot = tl.zeros([BLOCK_K], dtype)
    v = tl.zeros([BLOCK_K, BLOCK_D], dtype)  # if one tile has all columns, the second loop uses it too
    q_base = queries_ptr + i_m * stride_qm + i_head * stride_qh + i_half * HALF * stride_qd
    for start in range(0, HALF, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D).to(tl.int64)
        mask_d = offs_d < HALF
        mask = mask_s[:, None] & mask_d[None, :]
        vector = tl.load(q_base + offs_d * stride_qd, mask=mask_d, other=0.0).to(dtype)[None, :]  # [1, BLOCK_D]
        if IDW:
            k = tl.load(keys_ptr + row[:, None] * stride_kn + offs_d[None, :] * stride_kd, mask=mask, other=0.0)
            vector = vector - k.to(dtype)  # [BLOCK_K, BLOCK_D]
        v = tl.load(grad_totals_ptr + row[:, None] * HALF + offs_d[None, :], mask=mask, other=0.0)
        dot += tl.sum(v * vector, axis=1)
    dot = tl.where(mask_s, dot, 0.0)  # the query of a row that does not step may be NaN
    probability = tl.reshape(probabilities(scores[None, :], is_stepped), [BLOCK_K])
    factor = tl.reshape(factors_of_step(scores[None, :], u[None, :], is_stepped, share, weight, IDW), [BLOCK_K])
    factor *= tl.full([], direction, dtype)
    dot *= tl.full([], direction, dtype)
    if IDW:
        dot *= 2.0 * tl.exp(scores)
    for start in range(0, HALF, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D).to(tl.int64)
        mask_d = offs_d < HALF
        if BLOCK_D < HALF:
            mask = mask_s[:, None] & mask_d[None, :]
            v = tl.load(grad_totals_ptr + row[:, None] * HALF + offs_d[None, :], mask=mask, other=0.0)
        grad_q = tl.sum(factor[:, None] * v, axis=0)  # [BLOCK_D]
        tl.store(grad_queries_ptr + (i_row * 2 + i_half) * HALF + offs_d, grad_q, mask=mask_d)
    mask_k = offs_k < TOP_K
    tl.store(factor_ptr + picks, factor, mask=mask_k)
    tl.store(dot_ptr + picks, dot, mask=mask_k)
    tl.store(share_ptr + picks, probability * (dot - tl.sum(probability * dot, axis=0)), mask=mask_k)


@triton.jit(do_not_specialize=["first_row"])
def score_grad_kernel(
    grad_scores_ptr, slots_ptr, sub_keys_ptr, half_scores_ptr, slope_ptr, bend_ptr, grad_slope_ptr, dot_ptr,
    grad_halves_ptr,
    stride_gm, stride_gh, stride_gk,
    H, POOLED, first_row, share: tl.float64, weight: tl.float64,
    NUM_KEYS: tl.constexpr, TOP_K: tl.constexpr, IDW: tl.constexpr, LOOKUP: tl.constexpr, STEP: tl.constexpr,
    SEVERAL: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):
    """Gradient of each half score that was picked.

    LOOKUP: the sum of the gradients of the picked slots that it is part of. STEP, in rows from `first_row` on:
    P·(dP - Σ P·dP), where up to a constant dP = weight·share·((u - Σ P·u)·(a - Σ P·a) + share·B·u'), a is `dot` and B
    the sum of P·(a - Σ P·a) over the picks of a sub-key; for idw also c·a, since a is divided by E like the factors. A
    program owns one half of one (token, head) row. Grid: (rows, 2).
    """
    i_row = tl.program_id(0).to(tl.int64)
    i_half = tl.program_id(1).to(tl.int64)
    i_m = i_row // H
    i_head = i_row % H
    dtype: tl.constexpr = grad_halves_ptr.dtype.element_ty

    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < TOP_K
    picks = (i_row * 2 + i_half) * TOP_K + offs_k  # [BLOCK_K]
    row = tl.load(sub_keys_ptr + picks, mask=mask_k, other=0).to(tl.int64)
    grad = tl.zeros([BLOCK_K], dtype)
    if LOOKUP:
        column = row - (i_head * 2 + i_half) * NUM_KEYS
        for start in range(0, TOP_K, BLOCK_P):
            offs_p = start + tl.arange(0, BLOCK_P)
            mask_p = offs_p < TOP_K
            slot = tl.load(slots_ptr + i_row * TOP_K + offs_p, mask=mask_p, other=0)
            g_ptrs = grad_scores_ptr + i_m * stride_gm + i_head * stride_gh + offs_p.to(tl.int64) * stride_gk
            grad_score = tl.load(g_ptrs, mask=mask_p, other=0.0).to(dtype)  # [BLOCK_P]
            part = tl.where(i_half == 0, slot // NUM_KEYS, slot % NUM_KEYS)
            grad += tl.sum(tl.where(column[:, None] == part[None, :], grad_score[None, :], 0.0), axis=1)
    if STEP:
        is_stepped = i_m >= first_row
        mask_s = offs_k < tl.where(is_stepped, TOP_K, 0)
        scores = tl.load(half_scores_ptr + picks, mask=mask_s, other=float("-inf"))
        dot = tl.load(dot_ptr + picks, mask=mask_s, other=0.0)
        key = row - i_head * (2 * NUM_KEYS)
        if SEVERAL:
            key += i_head // POOLED * (2 * NUM_KEYS)
        u = tl.load(slope_ptr + key, mask=mask_s, other=0.0)
        bend = tl.load(bend_ptr + key, mask=mask_s, other=0.0)
        grad_slope = tl.load(grad_slope_ptr + key, mask=mask_s, other=0.0)
        probability = tl.reshape(probabilities(scores[None, :], is_stepped), [BLOCK_K])
        u -= tl.sum(probability * u, axis=0)
        grad_p = u * (dot - tl.sum(probability * dot, axis=0)) + tl.full([], share, dtype) * grad_slope * bend
        grad_p -= tl.sum(probability * grad_p, axis=0)
        if IDW:
            grad_p += u * dot
        grad += tl.full([], weight, dtype) * tl.full([], share, dtype) * probability * grad_p
    tl.store(grad_halves_ptr + picks, grad, mask=mask_k)


def sum_picks(
    out: Tensor, keys: Tensor, queries: Tensor, factors: Tensor, plan: PickPlan,
    *, epilogue: str, idw: bool, step_factors: Tensor | None = None, steps: Tensor | None = None,
    base: Tensor | None = None, all_rows: bool = True, first_row: int = 0, decay: float = 1.0, lr: float = 1.0,
    clip: float | None = None, config: KeySumConfig | None = None,
) -> Tensor:
    """Launch the sums over the picks of each sub-key from `first_row` on, and their `epilogue` into `out`, the result.

    `keys` and `out` are tables [H·2·n, Dk/2], `out` contiguous, and may be the same; `base` and `steps`, like them, are
    contiguous and in the compute dtype. `factors` and `step_factors` are [M, H, 2, K], of queries [M, H, Dk].
    """
    heads, half = queries.shape[1], keys.shape[1]
    config = config or key_sum_config(half, plan.order.numel() / keys.shape[0], factors.dtype)
    launch(
        key_sum_kernel, (keys.shape[0], cdiv(half, config.block_d)),
        queries, factors, factors if step_factors is None else step_factors, plan.tokens, plan.order, plan.first, keys,
        keys if steps is None else steps, keys if base is None else base, out,
        *queries.stride(), *keys.stride(),
        first_row, decay, lr, 0.0 if clip is None else clip,
        NUM_KEYS=keys.shape[0] // (2 * heads), HALF=half, IDW=idw, EPILOGUE=epilogue, CLIP=clip is not None,
        STEP=step_factors is not None, ALL_ROWS=all_rows,
        BLOCK_A=config.block_a, BLOCK_D=config.block_d, num_warps=config.num_warps, on=queries,
    )
    return out


def find_factors(picks: Picks, plan: PickPlan, *, idw: bool, weight: float, first_row: int = 0) -> Tensor:
    """Launch the factors of the key step over the rows from `first_row` on, [M, H, 2, K]."""
    num_rows, heads, _, top_k = picks.sub_keys.shape
    num_keys, pooled = plan.sizes(heads)
    factors = torch.empty_like(picks.half_scores)
    block_k = next_power_of_2(top_k)
    block_r = max(1, 512 // block_k)
    launch(
        step_kernel, (cdiv(num_rows * heads * 2, block_r),),
        *picks, plan.slope, factors,
        num_rows * heads * 2, heads, pooled, first_row, 1.0 / ((num_rows - first_row) * pooled), weight,
        NUM_KEYS=num_keys, TOP_K=top_k, IDW=idw, SEVERAL=pooled < heads,
        BLOCK_R=block_r, BLOCK_K=block_k, num_warps=4, on=factors,
    )
    return factors


def step_keys(
    keys: Tensor, out: Tensor, queries: Tensor, picks: Picks, plan: PickPlan,
    *, idw: bool, lr: float, weight: float, weight_decay: float, clip: float | None,
) -> None:
    """Launch out[j] = decay·keys[j] - lr·clamp(Σ f·(q - keys[j])), where the sum is over the picks of j.

    `keys` and `out` are tables [H·2·n, Dk/2], `out` contiguous, and may be the same. `picks`, contiguous, are those of
    queries [M, H, Dk], and `plan` is `plan_picks` of them.
    """
    decay = 1.0 - lr * weight_decay
    sum_picks(
        out, keys, queries, find_factors(picks, plan, idw=idw, weight=weight), plan,
        epilogue="update", idw=idw, all_rows=decay != 1.0 or out.data_ptr() != keys.data_ptr(), decay=decay, lr=lr,
        clip=clip,
    )


def step_grad(
    queries: Tensor, keys: Tensor, picks: Picks, plan: PickPlan, grad_totals: Tensor, grad_queries: Tensor,
    *, direction: float, idw: bool, weight: float, first_row: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the factors of the key step times `direction`, a, and the parts of B, each [M, H, 2, K].

    V is direction·grad_totals, a table like `keys` [H·2·n, Dk/2], contiguous, in the compute dtype. `grad_queries`
    [M, H, Dk], contiguous, in that dtype too, receives Σ f·V over the picks of each half.
    """
    (num_rows, heads, _), half, top_k = queries.shape, keys.shape[1], picks.sub_keys.shape[3]
    factors, dots, shares = (torch.empty_like(picks.half_scores) for _ in range(3))
    block_k = next_power_of_2(top_k)
    num_keys, pooled = plan.sizes(heads)
    launch(
        step_grad_kernel, (num_rows * heads, 2),
        *picks, plan.slope, queries, keys, grad_totals, grad_queries, factors, dots, shares,
        *queries.stride(), *keys.stride(),
        heads, pooled, first_row, 1.0 / ((num_rows - first_row) * pooled), weight, direction,
        NUM_KEYS=num_keys, HALF=half, TOP_K=top_k, IDW=idw, SEVERAL=pooled < heads,
        # All picks are in one tile, so that their sums need no second pass, with as many columns as registers hold.
        BLOCK_K=block_k, BLOCK_D=max(1, min(next_power_of_2(half), 2048 // block_k)), num_warps=2, on=queries,
    )
    return factors, dots, shares


def score_grad(
    grad_scores: Tensor | None, slots: Tensor | None, picks: Picks, plan: PickPlan, step: tuple[Tensor, Tensor] | None,
    *, idw: bool, weight: float, first_row: int,
) -> Tensor:
    """Launch the gradients of the half scores picked, [M, H, 2, K].

    `grad_scores` [M, H, K], any strides, and `slots`, like it, are the lookup's or None; `step` is (sums B, a) or None.
    """
    grad_halves = torch.empty_like(picks.half_scores)
    num_rows, heads, _, top_k = grad_halves.shape
    block_k = next_power_of_2(top_k)
    num_keys, pooled = plan.sizes(heads)
    launch(
        score_grad_kernel, (num_rows * heads, 2),
        picks.half_scores if grad_scores is None else grad_scores, picks.sub_keys if slots is None else slots,
        picks.sub_keys, picks.half_scores, plan.slope, plan.bend, *(step or (picks.half_scores,) * 2), grad_halves,
        *((0, 0, 0) if grad_scores is None else grad_scores.stride()),
        heads, pooled, first_row, 1.0 / max(1, (num_rows - first_row) * pooled), weight,
        NUM_KEYS=num_keys, TOP_K=top_k, IDW=idw, LOOKUP=grad_scores is not None, STEP=step is not None,
        SEVERAL=pooled < heads, BLOCK_K=block_k, BLOCK_P=max(1, min(block_k, 1024 // block_k)), num_warps=1,
        on=grad_halves,
    )
    return grad_halves


def address_grad(
    grad_new_keys: Tensor, keys: Tensor, queries: Tensor, grad_scores: Tensor | None, slots: Tensor | None,
    picks: Picks, plan: PickPlan, out: Tensor,
    *, first_row: int, idw: bool, eps: float, lr: float, weight: float, weight_decay: float, clip: float | None,
) -> Tensor:
    """Launch the backward of a lookup and a key step from the same keys: the gradient of keys.

    The gradient of queries goes to `out` [M, H, Dk]. `keys` and `grad_new_keys` are tables [H·2·n, Dk/2], the second
    contiguous and in the compute dtype, as both gradients are. The key step was over the rows from `first_row` on;
    without rows or weight there was none. `plan` is `plan_picks` of `picks`, contiguous, with that `first_row`.
    """
    factors = directions = step = None
    if weight != 0.0 and first_row < queries.shape[0]:
        directions, direction = grad_new_keys, -lr
        if clip is not None:  # the totals are formed again: where they were clamped there is no gradient
            directions, direction = torch.empty_like(grad_new_keys), 1.0
            sum_picks(
                directions, keys, queries, find_factors(picks, plan, idw=idw, weight=weight, first_row=first_row), plan,
                epilogue="step_grad", idw=idw, base=grad_new_keys, all_rows=False, first_row=first_row, lr=-lr,
                clip=clip,
            )
        factors, dots, shares = step_grad(
            queries, keys, picks, plan, directions, out,
            direction=direction, idw=idw, weight=weight, first_row=first_row,
        )
        step = (pick_sums(shares, plan), dots)
    grad_halves = score_grad(grad_scores, slots, picks, plan, step, idw=idw, weight=weight, first_row=first_row)
    _, grad_factors = half_grad(grad_halves, queries, keys, picks.sub_keys, idw=idw, eps=eps, out=out, add=bool(step))
    return sum_picks(
        torch.empty_like(grad_new_keys), keys, queries, grad_factors, plan,
        epilogue="grad", idw=idw, step_factors=factors if idw else None, steps=directions, base=grad_new_keys,
        decay=1.0 - lr * weight_decay,
    )
