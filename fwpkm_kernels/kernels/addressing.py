"""The key step: a step of the sub-keys toward being used evenly, and its backward, joint with the lookup's.

A half of a row picks K sub-keys with probabilities P; P̄ is their mean over the rows of all heads, and
u = log(P̄ + 1e-8) + P̄/(P̄ + 1e-8) the slope of P̄·log(P̄ + 1e-8). Everything here is [rows, 2, K] beside the rows of the
sub-keys that were picked; of all sub-keys the plan (`kernels/plan.py`) has a bit for each row. Sums over the picks of a
sub-key go by that plan: of vectors in `kernels/segments.py`, of numbers in `pick_sums_kernel`, which takes care of the
rows that nobody picked too.

Forward is `pick_sums_kernel`, from P to P̄; `step_kernel`, from the picks to the factors of q - k; and one sum with the
"update" epilogue: the gradient is never stored. Backward runs these two again, with the gradient V of the totals, then
`score_grad_kernel`, which leaves one gradient for each half score picked, the lookup's own included, to `half_grad` in
`kernels/lookup.py`.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ._common import launch, next_power_of_2, row_warps
from .lookup import half_grad
from .segments import SegmentConfig, segment_config, segment_rows


@triton.jit
def pick_sums_kernel(
    coefficient_ptr,
    step_factor_ptr,
    order_ptr,
    first_ptr,
    sums_ptr,
    table_ptr,
    steps_ptr,
    out_ptr,
    stride_tn,
    stride_td,
    H,
    decay: tl.float64,
    NUM_KEYS: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums of `coefficient` over the picks of each sub-key, heads pooled, [2, n]; and rows of `out` [H·2·n, Dk/2].

    ROWS: out[row] = decay·table[row] where "unpicked" or in "all" rows; STEP: less the sum of the row's `step_factor`
    times steps[row]. A program owns one sub-key of one half, of all heads. Grid: (2·n,).
    """
    i_key = tl.program_id(0)
    dtype: tl.constexpr = sums_ptr.dtype.element_ty
    total = tl.zeros([BLOCK_A], dtype)
    i_head = 0
    while i_head < H:
        row = i_head * (2 * NUM_KEYS) + i_key
        begin = tl.load(first_ptr + row)
        end = tl.load(first_ptr + row + 1)
        if STEP:
            step_total = tl.zeros([BLOCK_A], dtype)
        position = begin
        while position < end:
            offs_a = position + tl.arange(0, BLOCK_A)
            mask_a = offs_a < end
            access = tl.load(order_ptr + offs_a, mask=mask_a, other=0)
            total += tl.load(coefficient_ptr + access, mask=mask_a, other=0.0)  # [BLOCK_A]
            if STEP:
                step_total += tl.load(step_factor_ptr + access, mask=mask_a, other=0.0)
            position += BLOCK_A
        if ROWS != "none":
            is_written = begin == end
            if ROWS == "all":
                is_written = begin <= end
            if is_written:
                base = row.to(tl.int64)
                for start in range(0, HALF, BLOCK_D):
                    offs_d = start + tl.arange(0, BLOCK_D).to(tl.int64)
                    mask_d = offs_d < HALF
                    x = tl.load(table_ptr + base * stride_tn + offs_d * stride_td, mask=mask_d, other=0.0).to(dtype)
                    x *= tl.full([], decay, dtype)
                    if STEP:  # steps of rows that nobody picked are not defined
                        mask_s = offs_d < tl.where(begin < end, HALF, 0)
                        step = tl.load(steps_ptr + base * HALF + offs_d, mask=mask_s, other=0.0)
                        x -= tl.sum(step_total, axis=0) * step
                    tl.store(out_ptr + base * HALF + offs_d, x.to(out_ptr.dtype.element_ty), mask=mask_d)
        i_head += 1
    tl.store(sums_ptr + i_key, tl.sum(total, axis=0))


@triton.jit
def load_usage(marginal_ptr, row, mask, i_head, share, NUM_KEYS: tl.constexpr):
    """P̄ of the sub-keys in the rows `row` of the table, from the sums [2, n] of P over all rows."""
    total = tl.load(marginal_ptr + row - i_head * (2 * NUM_KEYS), mask=mask, other=1.0)
    return total * tl.full([], share, total.dtype)


@triton.jit
def slope(usage):
    """Derivative of P̄·log(P̄ + 1e-8)."""
    return tl.log(usage + 1e-8) + usage / (usage + 1e-8)


@triton.jit
def step_kernel(
    probability_ptr,
    sub_keys_ptr,
    marginal_ptr,
    queries_ptr,
    keys_ptr,
    grad_totals_ptr,
    factor_ptr,
    dot_ptr,
    share_ptr,
    stride_qm,
    stride_qh,
    stride_qd,
    stride_kn,
    stride_kd,
    H,
    eps: tl.float64,
    share: tl.float64,
    weight: tl.float64,
    direction: tl.float64,
    NUM_KEYS: tl.constexpr,
    HALF: tl.constexpr,
    TOP_K: tl.constexpr,
    IDW: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Factors f = 2c/E of q - k, E = eps + |q - k|² (or c, of q, for dot), with c = weight·share·P·(u - Σ P·u).

    Their sums over the picks of a sub-key are the totals that it steps by. `share` is 1 / (the number of rows). GRAD:
    with V, the gradient of the totals, also a = <V, ds/dk> = 2·<V, q - k>/E (or <V, q>) and the parts P·(a - Σ P·a) of
    the gradient of u. V is `direction` times the table `grad_totals` [H·2·n, Dk/2], and the factors are those of that
    table. A program owns one half of one (token, head) row. Grid: (rows, 2).
    """
    i_row = tl.program_id(0).to(tl.int64)
    i_half = tl.program_id(1).to(tl.int64)
    i_m = i_row // H
    i_head = i_row % H
    dtype: tl.constexpr = factor_ptr.dtype.element_ty

    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < TOP_K
    picks = (i_row * 2 + i_half) * TOP_K + offs_k  # [BLOCK_K]
    probability = tl.load(probability_ptr + picks, mask=mask_k, other=0.0)
    row = tl.load(sub_keys_ptr + picks, mask=mask_k, other=0).to(tl.int64)
    u = slope(load_usage(marginal_ptr, row, mask_k, i_head, share, NUM_KEYS))
    factor = (
        tl.full([], weight, dtype) * tl.full([], share, dtype) * probability * (u - tl.sum(probability * u, axis=0))
    )
    if IDW or GRAD:
        norm = tl.zeros([BLOCK_K], dtype)
        dot = tl.zeros([BLOCK_K], dtype)
        q_base = queries_ptr + i_m * stride_qm + i_head * stride_qh + i_half * HALF * stride_qd
        for start in range(0, HALF, BLOCK_D):
            offs_d = start + tl.arange(0, BLOCK_D).to(tl.int64)
            mask_d = offs_d < HALF
            mask = mask_k[:, None] & mask_d[None, :]
            vector = tl.load(q_base + offs_d * stride_qd, mask=mask_d, other=0.0).to(dtype)[None, :]  # [1, BLOCK_D]
            if IDW:
                k = tl.load(keys_ptr + row[:, None] * stride_kn + offs_d[None, :] * stride_kd, mask=mask, other=0.0)
                vector = vector - k.to(dtype)  # [BLOCK_K, BLOCK_D]
                norm += tl.sum(vector * vector, axis=1)
            if GRAD:
                v = tl.load(grad_totals_ptr + row[:, None] * HALF + offs_d[None, :], mask=mask, other=0.0)
                dot += tl.sum(v * vector, axis=1)
        if IDW:
            scale = 2.0 / (tl.full([], eps, dtype) + norm)
            factor *= scale
            dot *= scale
        if GRAD:
            dot *= tl.full([], direction, dtype)
            factor *= tl.full([], direction, dtype)
            tl.store(dot_ptr + picks, dot, mask=mask_k)
            tl.store(share_ptr + picks, probability * (dot - tl.sum(probability * dot, axis=0)), mask=mask_k)
    tl.store(factor_ptr + picks, factor, mask=mask_k)


@triton.jit
def score_grad_kernel(
    grad_scores_ptr,
    slots_ptr,
    sub_keys_ptr,
    probability_ptr,
    marginal_ptr,
    grad_slope_ptr,
    dot_ptr,
    grad_halves_ptr,
    stride_gm,
    stride_gh,
    stride_gk,
    H,
    share: tl.float64,
    weight: tl.float64,
    NUM_KEYS: tl.constexpr,
    TOP_K: tl.constexpr,
    IDW: tl.constexpr,
    LOOKUP: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Gradient of each half score that was picked.

    LOOKUP: the sum of the gradients of the picked slots that it is part of. STEP: P·(dP - Σ P·dP), where up to a
    constant dP = weight·share·((u - Σ P·u)·(a - Σ P·a) + share·B·u'), a is `dot` and B the sum of P·(a - Σ P·a) over
    the picks of a sub-key; for idw also c·a, since a is divided by E like the factors. A program owns one half of one
    (token, head) row. Grid: (rows, 2).
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
        probability = tl.load(probability_ptr + picks, mask=mask_k, other=0.0)
        dot = tl.load(dot_ptr + picks, mask=mask_k, other=0.0)
        usage = load_usage(marginal_ptr, row, mask_k, i_head, share, NUM_KEYS)
        grad_slope = tl.load(grad_slope_ptr + row - i_head * (2 * NUM_KEYS), mask=mask_k, other=0.0)
        u = slope(usage)
        u -= tl.sum(probability * u, axis=0)
        bend = 1.0 / (usage + 1e-8) + 1e-8 / ((usage + 1e-8) * (usage + 1e-8))  # u'
        grad_p = u * (dot - tl.sum(probability * dot, axis=0)) + tl.full([], share, dtype) * grad_slope * bend
        grad_p -= tl.sum(probability * grad_p, axis=0)
        if IDW:
            grad_p += u * dot
        grad += tl.full([], weight, dtype) * tl.full([], share, dtype) * probability * grad_p
    tl.store(grad_halves_ptr + picks, grad, mask=mask_k)


def pick_sums(
    coefficients: torch.Tensor,
    order: torch.Tensor,
    first: torch.Tensor,
    table: torch.Tensor,
    out: torch.Tensor | None,
    *,
    heads: int,
    all_rows: bool = False,
    decay: float = 1.0,
    step_factors: torch.Tensor | None = None,
    steps: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launch the sums of `coefficients` [M, H, 2, K] over the picks of each sub-key, heads pooled: [2·n].

    Beside it `out`, unless None, gets decay·table in the rows that nobody picked, or in all rows; with `step_factors`,
    like `coefficients`, less their sum over the picks of a row times that row of `steps`. `out` and `steps` are tables
    [H·2·n, Dk/2], contiguous.
    """
    num_keys, half = table.shape[0] // (2 * heads), table.shape[1]
    block_d = min(next_power_of_2(half), 1024)
    sums = torch.empty(2 * num_keys, dtype=coefficients.dtype, device=coefficients.device)
    launch(
        pick_sums_kernel,
        (2 * num_keys,),
        coefficients,
        coefficients if step_factors is None else step_factors,
        order,
        first,
        sums,
        table,
        table if steps is None else steps,
        table if out is None else out,
        *table.stride(),
        heads,
        decay,
        NUM_KEYS=num_keys,
        HALF=half,
        ROWS="none" if out is None else "all" if all_rows else "unpicked",
        STEP=step_factors is not None,
        # A sub-key that every token picks is one program's: many picks at a time, as many numbers as registers hold.
        BLOCK_A=1024 if step_factors is None else 512,
        BLOCK_D=block_d,
        num_warps=row_warps(block_d, table.dtype),
        on=coefficients,
    )
    return sums


def pick_config(queries: torch.Tensor, keys: torch.Tensor) -> SegmentConfig:
    """Tiles for sums over the picks of each sub-key: of these there are few, and of picks many."""
    config = segment_config(keys.shape[1], min(queries.dtype, keys.dtype, key=lambda dtype: dtype.itemsize))
    # Four rows at a time are as many bytes under way as the cache can serve. A program for every pick would mostly be
    # one that looks and leaves, which takes longer than the sums.
    return config._replace(block_a=2 * config.block_a, window=8)


def step_factors(
    queries: torch.Tensor,
    keys: torch.Tensor,
    probabilities: torch.Tensor,
    sub_keys: torch.Tensor,
    marginal: torch.Tensor,
    *,
    idw: bool,
    eps: float,
    weight: float,
    num_rows: int,
    grad_totals: torch.Tensor | None = None,
    direction: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the factors of the key step; with V = direction·grad_totals also a and the parts of B; each [M, H, 2, K].

    With V the factors are already multiplied by `direction`.
    """
    heads, half, top_k = queries.shape[1], keys.shape[1], sub_keys.shape[3]
    factors = torch.empty_like(probabilities)
    dots, shares = factors, factors
    if grad_totals is not None:
        dots, shares = torch.empty_like(factors), torch.empty_like(factors)
    block_k = next_power_of_2(top_k)
    launch(
        step_kernel,
        (queries.shape[0] * heads, 2),
        probabilities,
        sub_keys,
        marginal,
        queries,
        keys,
        keys if grad_totals is None else grad_totals,
        factors,
        dots,
        shares,
        *queries.stride(),
        *keys.stride(),
        heads,
        eps,
        1.0 / num_rows,
        weight,
        direction,
        NUM_KEYS=keys.shape[0] // (2 * heads),
        HALF=half,
        TOP_K=top_k,
        IDW=idw,
        GRAD=grad_totals is not None,
        BLOCK_K=block_k,
        # All picks at a time, so that sums over them need no second pass; of each as many columns as registers hold.
        BLOCK_D=max(1, min(next_power_of_2(half), 2048 // block_k)),
        num_warps=2,
        on=queries,
    )
    return factors, dots, shares


def step_keys(
    keys: torch.Tensor,
    out: torch.Tensor,
    queries: torch.Tensor,
    probabilities: torch.Tensor,
    sub_keys: torch.Tensor,
    plan: tuple[torch.Tensor, ...],
    first: torch.Tensor,
    *,
    in_place: bool,
    idw: bool,
    eps: float,
    lr: float,
    weight: float,
    weight_decay: float,
    clip: float | None,
) -> None:
    """Launch out[j] = decay·keys[j] - lr·clamp(Σ f·(q - keys[j])), where the sum is over the picks of j.

    `keys` and `out` are tables [H·2·n, Dk/2], `out` contiguous; `in_place` says that they are the same. `probabilities`
    and `sub_keys` [M, H, 2, K] are those of queries [M, H, Dk], and `plan` and `first` are the plan of `sub_keys`.
    """
    heads, half = queries.shape[1], keys.shape[1]
    decay = 1.0 - lr * weight_decay
    # A row that somebody picked is first written when its sum is known, and nobody else reads it by then.
    unpicked = None if in_place and decay == 1.0 else out
    marginal = pick_sums(probabilities, plan[0], first, keys, unpicked, heads=heads, decay=decay)
    factors, _, _ = step_factors(
        queries,
        keys,
        probabilities,
        sub_keys,
        marginal,
        idw=idw,
        eps=eps,
        weight=weight,
        num_rows=queries.shape[0] * heads,
    )
    segment_rows(
        out,
        queries.reshape(-1, half),
        factors,
        *plan,
        epilogue="update",
        table=keys,
        centered=idw,
        decay=decay,
        lr=lr,
        clip=clip,
        config=pick_config(queries, keys),
    )


def score_grad(
    grad_scores: torch.Tensor | None,
    slots: torch.Tensor | None,
    sub_keys: torch.Tensor,
    step: tuple[torch.Tensor, ...] | None,
    *,
    num_keys: int,
    idw: bool,
    weight: float,
    num_rows: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Launch the gradients of the half scores picked, [M, H, 2, K].

    `grad_scores` [M, H, K], any strides, and `slots`, like it, are the lookup's; `step` is (probabilities, marginal,
    sums B, a). Either may be None.
    """
    grad_halves = torch.empty(sub_keys.shape, dtype=dtype, device=sub_keys.device)
    heads, _, top_k = sub_keys.shape[1:]
    block_k = next_power_of_2(top_k)
    unused = grad_halves
    launch(
        score_grad_kernel,
        (sub_keys.shape[0] * heads, 2),
        unused if grad_scores is None else grad_scores,
        sub_keys if slots is None else slots,
        sub_keys,
        *(step or (unused, unused, unused, unused)),
        grad_halves,
        *((0, 0, 0) if grad_scores is None else grad_scores.stride()),
        heads,
        1.0 / max(1, num_rows),
        weight,
        NUM_KEYS=num_keys,
        TOP_K=top_k,
        IDW=idw,
        LOOKUP=grad_scores is not None,
        STEP=step is not None,
        BLOCK_K=block_k,
        BLOCK_P=max(1, min(block_k, 1024 // block_k)),
        num_warps=1,
        on=sub_keys,
    )
    return grad_halves


def address_grad(
    grad_new_keys: torch.Tensor,
    keys: torch.Tensor,
    queries: torch.Tensor,
    probabilities: torch.Tensor,
    sub_keys: torch.Tensor,
    grad_scores: torch.Tensor | None,
    slots: torch.Tensor | None,
    plan: tuple[torch.Tensor, ...],
    first: torch.Tensor,
    out: torch.Tensor,
    *,
    idw: bool,
    eps: float,
    lr: float,
    weight: float,
    weight_decay: float,
    clip: float | None,
    num_rows: int,
) -> torch.Tensor:
    """Launch the backward of a lookup and a key step from the same keys: the gradient of keys.

    That of queries goes to `out` [M, H, Dk]. `keys` and `grad_new_keys` are tables [H·2·n, Dk/2], the second contiguous
    and in the compute dtype, as both gradients are. The key step was over `num_rows` rows, the others having
    probabilities of 0; without rows or weight there was none.
    """
    heads, half = queries.shape[1], keys.shape[1]
    num_keys = keys.shape[0] // (2 * heads)
    rows = queries.reshape(-1, half)
    options: dict[str, Any] = {"idw": idw, "weight": weight, "num_rows": num_rows}
    decay = 1.0 - lr * weight_decay
    factors = directions = step = None
    if weight != 0.0 and num_rows > 0:
        marginal = pick_sums(probabilities, plan[0], first, keys, None, heads=heads)
        inputs = (queries, keys, probabilities, sub_keys, marginal)
        directions, direction = grad_new_keys, -lr
        if clip is not None:  # the totals again, and no gradient where the clamp was active
            factors, _, _ = step_factors(*inputs, eps=eps, **options)
            directions, direction = torch.empty_like(grad_new_keys), 1.0
            segment_rows(
                directions,
                rows,
                factors,
                *plan,
                epilogue="step_grad",
                table=keys,
                base=grad_new_keys,
                centered=idw,
                lr=-lr,
                clip=clip,
                config=pick_config(queries, keys),
            )
        factors, dots, shares = step_factors(*inputs, eps=eps, grad_totals=directions, direction=direction, **options)
        grad_keys = torch.empty_like(grad_new_keys)
        grad_slope = pick_sums(
            shares,
            plan[0],
            first,
            grad_new_keys,
            grad_keys,
            heads=heads,
            all_rows=True,
            decay=decay,
            step_factors=factors if idw else None,
            steps=directions,
        )
        step = (probabilities, marginal, grad_slope, dots)
    else:
        grad_keys = grad_new_keys * decay
    grad_halves = score_grad(
        grad_scores, slots, sub_keys, step, num_keys=num_keys, dtype=probabilities.dtype, **options
    )
    _, grad_factors = half_grad(
        grad_halves,
        queries,
        keys,
        sub_keys,
        idw=idw,
        eps=eps,
        step_factors=factors,
        grad_totals=directions,
        out=out,
    )
    segment_rows(
        grad_keys,
        rows,
        grad_factors,
        *plan,
        epilogue="add",
        table=keys,
        base=grad_keys,
        centered=idw,
        config=pick_config(queries, keys),
    )
    return grad_keys
