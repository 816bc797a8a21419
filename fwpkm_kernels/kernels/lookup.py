"""Product-key lookup: scores of the sub-keys, the best of each half, the best of their sums, and the gradient of that.

Forward is three launches. `half_topk_kernel` scores one tile of queries against one tile of sub-keys and keeps the best
K of the tile: full score matrices never reach device memory. `half_merge_kernel` merges the tiles of a half and scores
the winners again, from differences. `pair_topk_kernel` forms the sums of the two halves and keeps the best K. (A single
launch would hold all scores of a row in one program: a tile of 16 rows by 512 sub-keys takes 255 registers a thread on
sm_90, and no tile holds a larger n.)

The gradient of a query row is `half_grad_kernel`, which the key step's backward shares; that of the sub-keys is a sum
over the rows that picked them, which `kernels/segments.py` does for every table of the package.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import compute_dtype
from ._common import cdiv, from_ordered, launch, lowest, next_power_of_2, row_warps, take_best, to_ordered

#: Candidates are made and merged a slab of rows at a time, so that they stay in the L2 cache (50 MB on an H100).
CANDIDATE_BYTES = 2**25


class LookupConfig(NamedTuple):
    """Tile of `half_topk_kernel`: BLOCK_M query rows by BLOCK_N sub-keys, BLOCK_D columns of the dot at a time."""

    block_m: int
    block_n: int
    block_d: int
    num_warps: int


def lookup_config(num_keys: int, top_k: int, dtype: torch.dtype) -> LookupConfig:
    """Launch table, keyed by the model's constants only: a token's result never depends on how many come with it.

    Tiles are as high as 16 rows for each warp: so the matrix units leave a row in one warp, and the K reductions over
    it need no shared memory. With few picks narrow tiles leave room for 4 of them on a multiprocessor (125 registers on
    sm_90); with many, wide ones leave fewer candidates to merge.
    """
    if dtype == torch.float64:
        return LookupConfig(16, max(16, next_power_of_2(top_k), min(64, next_power_of_2(num_keys))), 1, 4)
    block_m, block_n, num_warps = (64, 64, 4) if top_k <= 16 else (128, 128, 8)
    return LookupConfig(
        block_m, max(16, min(block_n, next_power_of_2(num_keys)), next_power_of_2(top_k)), 16, num_warps
    )


@triton.jit
def half_topk_kernel(
    queries_ptr,
    keys_ptr,
    candidate_ptr,
    column_ptr,
    stride_qm,
    stride_qh,
    stride_qd,
    stride_kh,
    stride_ka,
    stride_kn,
    stride_kd,
    M,
    eps: tl.float64,
    NUM_KEYS: tl.constexpr,
    HALF: tl.constexpr,
    TOP_K: tl.constexpr,
    SPLITS: tl.constexpr,
    IDW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Best TOP_K of BLOCK_N scores, for BLOCK_M rows: s = q·k, or s = -log(eps + |q|² - 2 q·k + |k|²).

    A program owns one tile of rows, one tile of the sub-keys of one half of one head, and writes its candidates, best
    first, as ordered integers. Grid: (row tiles, SPLITS, 2·H).
    """
    i_m = tl.program_id(0).to(tl.int64)
    i_split = tl.program_id(1)
    i_group = tl.program_id(2)
    i_head = (i_group // 2).to(tl.int64)
    i_half = (i_group % 2).to(tl.int64)
    dtype: tl.constexpr = tl.float64 if candidate_ptr.dtype.element_ty == tl.int64 else tl.float32

    offs_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = i_split * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < NUM_KEYS
    q_ptrs = queries_ptr + offs_m * stride_qm + i_head * stride_qh + i_half * HALF * stride_qd  # [BLOCK_M]
    k_ptrs = keys_ptr + i_head * stride_kh + i_half * stride_ka + offs_n.to(tl.int64) * stride_kn  # [BLOCK_N]

    dots = tl.zeros([BLOCK_M, BLOCK_N], dtype)
    q_norm = tl.zeros([BLOCK_M], dtype)
    k_norm = tl.zeros([BLOCK_N], dtype)
    if dtype == tl.float64:
        # Column by column: tl.dot takes no float64 before Triton 3.6.
        for _ in range(HALF):
            q = tl.load(q_ptrs, mask=mask_m, other=0.0)  # [BLOCK_M]
            k = tl.load(k_ptrs, mask=mask_n, other=0.0)  # [BLOCK_N]
            q_ptrs += stride_qd
            k_ptrs += stride_kd
            dots += q[:, None] * k[None, :]
            q_norm += q * q
            k_norm += k * k
    else:
        for start in range(0, HALF, BLOCK_D):
            offs_d = start + tl.arange(0, BLOCK_D).to(tl.int64)
            mask_d = offs_d < HALF
            q_mask = mask_m[:, None] & mask_d[None, :]
            k_mask = mask_d[:, None] & mask_n[None, :]
            q = tl.load(q_ptrs[:, None] + offs_d[None, :] * stride_qd, mask=q_mask, other=0.0)
            k = tl.load(k_ptrs[None, :] + offs_d[:, None] * stride_kd, mask=k_mask, other=0.0)
            q = q.to(dtype)  # [BLOCK_M, BLOCK_D]
            k = k.to(dtype)  # [BLOCK_D, BLOCK_N]
            dots = tl.dot(q, k, dots, input_precision=PRECISION)
            if IDW:
                q_norm += tl.sum(q * q, axis=1)
                k_norm += tl.sum(k * k, axis=0)
    if IDW:
        # Rounding may push a distance below zero; PyTorch's cdist clamps it too.
        distance = q_norm[:, None] - 2.0 * dots + k_norm[None, :]
        scores = -tl.log(tl.full([], eps, dtype) + tl.where(distance < 0, 0.0, distance))
    else:
        scores = dots

    bits = to_ordered(scores)
    bits = tl.where(mask_n[None, :], bits, lowest(bits))
    out = ((offs_m * tl.num_programs(2) + i_group) * SPLITS + i_split) * TOP_K  # [BLOCK_M]
    for i_k in range(TOP_K):
        best, column, bits = take_best(bits, offs_n[None, :])
        tl.store(candidate_ptr + out + i_k, best, mask=mask_m)
        tl.store(column_ptr + out + i_k, column, mask=mask_m)


@triton.jit
def half_merge_kernel(
    queries_ptr,
    keys_ptr,
    candidate_ptr,
    column_ptr,
    half_scores_ptr,
    sub_keys_ptr,
    stride_qm,
    stride_qh,
    stride_qd,
    stride_kh,
    stride_ka,
    stride_kn,
    stride_kd,
    H,
    eps: tl.float64,
    NUM_KEYS: tl.constexpr,
    HALF: tl.constexpr,
    TOP_K: tl.constexpr,
    SPLITS: tl.constexpr,
    IDW: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Best TOP_K of the candidates of one half, in order: their scores, and the rows of keys [H·2·n, HALF] they are.

    IDW: each score is formed again from the difference q - k, since the candidates' have cancelled, and the order is
    that of the new ones. A program owns one half of one (token, head) row. Grid: (rows, 2).
    """
    i_row = tl.program_id(0).to(tl.int64)
    i_half = tl.program_id(1).to(tl.int64)
    i_m = i_row // H
    i_head = i_row % H
    dtype: tl.constexpr = half_scores_ptr.dtype.element_ty
    out = (i_row * 2 + i_half) * TOP_K
    first_key = ((i_head * 2 + i_half) * NUM_KEYS).to(tl.int32)
    offs_r = tl.arange(0, BLOCK_R)

    # Among equal candidates the lower position is the lower sub-key.
    offs_c = tl.arange(0, BLOCK_C)[None, :]
    base = out * SPLITS
    bits = tl.load(candidate_ptr + base + offs_c, mask=offs_c < SPLITS * TOP_K, other=0)  # [1, BLOCK_C]
    bits = tl.where(offs_c < SPLITS * TOP_K, bits, lowest(bits))
    ranked = tl.zeros([1, BLOCK_R], bits.dtype)
    columns = tl.zeros([1, BLOCK_R], tl.int32)
    for i_k in range(TOP_K):
        best, position, bits = take_best(bits, offs_c)
        column = tl.load(column_ptr + base + position)  # [1]
        is_rank = (offs_r == i_k)[None, :]
        ranked = tl.where(is_rank, best[:, None], ranked)
        columns = tl.where(is_rank, column[:, None], columns)

    if IDW:
        offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
        mask_d = offs_d < HALF
        q_row = queries_ptr + i_m * stride_qm + i_head * stride_qh + i_half * HALF * stride_qd
        k_half = keys_ptr + i_head * stride_kh + i_half * stride_ka
        q = tl.load(q_row + offs_d * stride_qd, mask=mask_d, other=0.0).to(dtype)  # [BLOCK_D]
        scores = tl.zeros([BLOCK_R], dtype)
        for start in range(0, TOP_K, BLOCK_K):
            offs_k = start + tl.arange(0, BLOCK_K)
            is_rank = offs_k[:, None] == offs_r[None, :]  # [BLOCK_K, BLOCK_R]
            column = tl.sum(tl.where(is_rank, columns, 0), axis=1)  # [BLOCK_K]
            k = tl.load(
                k_half + column.to(tl.int64)[:, None] * stride_kn + offs_d[None, :] * stride_kd,
                mask=(offs_k < TOP_K)[:, None] & mask_d[None, :],
                other=0.0,
            ).to(dtype)  # [BLOCK_K, BLOCK_D]
            difference = q[None, :] - k
            score = -tl.log(tl.full([], eps, dtype) + tl.sum(difference * difference, axis=1))
            scores += tl.sum(tl.where(is_rank, score[:, None], 0.0), axis=0)
        is_winner = (offs_r < TOP_K)[None, :]
        ranked = tl.where(is_winner, to_ordered(scores)[None, :], lowest(ranked))
        columns = tl.where(is_winner, columns, NUM_KEYS + offs_r[None, :])
        for i_k in range(TOP_K):
            best, column, ranked = take_best(ranked, columns)
            tl.store(half_scores_ptr + out + i_k + tl.arange(0, 1), from_ordered(best))
            tl.store(sub_keys_ptr + out + i_k + tl.arange(0, 1), first_key + column)
    else:
        mask_r = (offs_r < TOP_K)[None, :]
        tl.store(half_scores_ptr + out + offs_r[None, :], from_ordered(ranked), mask=mask_r)
        tl.store(sub_keys_ptr + out + offs_r[None, :], first_key + columns, mask=mask_r)


@triton.jit
def pair_topk_kernel(
    half_scores_ptr,
    sub_keys_ptr,
    scores_ptr,
    slots_ptr,
    NUM_KEYS: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_PAIRS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Best TOP_K of the sums of two halves.

    Only the NUM_PAIRS pairs with (i + 1)(j + 1) <= TOP_K can win. They are numbered in flat order i·K + j, so the
    lowest number among equal sums is the lowest flat position. A program owns one (token, head) row. Grid: (rows,).
    """
    i_row = tl.program_id(0).to(tl.int64)
    offs_p = tl.arange(0, BLOCK_P)
    mask_p = offs_p < NUM_PAIRS

    # Row i of the K×K square has K // (i + 1) pairs that can win.
    first = tl.zeros([BLOCK_P], tl.int32)
    start = tl.zeros([BLOCK_P], tl.int32)
    end = 0
    for i in tl.static_range(TOP_K - 1):
        end += TOP_K // (i + 1)
        first += (offs_p >= end).to(tl.int32)
        start = tl.where(offs_p >= end, end, start)
    second = offs_p - start

    base = i_row * (2 * TOP_K)
    part1 = tl.load(half_scores_ptr + base + first, mask=mask_p, other=0.0)  # [BLOCK_P]
    part2 = tl.load(half_scores_ptr + base + TOP_K + second, mask=mask_p, other=0.0)
    key1 = tl.load(sub_keys_ptr + base + first, mask=mask_p, other=0) % NUM_KEYS
    key2 = tl.load(sub_keys_ptr + base + TOP_K + second, mask=mask_p, other=0) % NUM_KEYS
    slots = (key1.to(tl.int64) * NUM_KEYS + key2)[None, :]
    bits = to_ordered(part1 + part2)
    bits = tl.where(mask_p, bits, lowest(bits))[None, :]  # [1, BLOCK_P]
    for i_k in range(TOP_K):
        best, pair, bits = take_best(bits, offs_p[None, :])
        slot = tl.sum(tl.where(offs_p[None, :] == pair[:, None], slots, 0), axis=1)  # [1]
        tl.store(scores_ptr + i_row * TOP_K + i_k + tl.arange(0, 1), from_ordered(best))
        tl.store(slots_ptr + i_row * TOP_K + i_k + tl.arange(0, 1), slot)


def lookup(
    queries: torch.Tensor,
    keys: torch.Tensor,
    *,
    top_k: int,
    idw: bool,
    eps: float,
    precision: str,
    config: LookupConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the lookup of queries [M, H, Dk] in keys [H, 2, n, Dk/2].

    Returns scores and slots [M, H, K], the scores of the K best of each half, [M, H, 2, K], and their rows of
    keys.view(H·2·n, Dk/2), int32.
    """
    num_rows, heads, _ = queries.shape
    num_keys, half = keys.shape[2:]
    dtype = compute_dtype(keys.dtype)
    scores = torch.empty(num_rows, heads, top_k, dtype=dtype, device=queries.device)
    slots = torch.empty(num_rows, heads, top_k, dtype=torch.int64, device=queries.device)
    half_scores = torch.empty(num_rows, heads, 2, top_k, dtype=dtype, device=queries.device)
    sub_keys = torch.empty(num_rows, heads, 2, top_k, dtype=torch.int32, device=queries.device)
    if scores.numel() == 0:
        return scores, slots, half_scores, sub_keys
    config = config or lookup_config(num_keys, top_k, dtype)
    splits = cdiv(num_keys, config.block_n)
    if precision == "tf32x3":
        if torch.version.hip is not None:
            precision = "ieee"  # AMD has no tf32x3
        elif queries.dtype.itemsize == keys.dtype.itemsize == 2:
            precision = "tf32"  # one product is exact: tf32 holds every bit of both half-precision formats
    bits = torch.int64 if dtype == torch.float64 else torch.int32
    row_bytes = heads * 2 * splits * top_k * (bits.itemsize + torch.int32.itemsize)
    slab = min(num_rows, cdiv(max(1, CANDIDATE_BYTES // row_bytes), config.block_m) * config.block_m)
    candidates = torch.empty(slab, heads, 2, splits, top_k, dtype=bits, device=queries.device)
    columns = torch.empty(slab, heads, 2, splits, top_k, dtype=torch.int32, device=queries.device)
    num_pairs = sum(top_k // (i + 1) for i in range(top_k))
    block_p = next_power_of_2(num_pairs)
    block_c = next_power_of_2(splits * top_k)
    block_d = next_power_of_2(half)
    for begin in range(0, num_rows, slab):
        rows = min(slab, num_rows - begin)
        launch(
            half_topk_kernel,
            (cdiv(rows, config.block_m), splits, 2 * heads),
            queries[begin : begin + rows],
            keys,
            candidates,
            columns,
            *queries.stride(),
            *keys.stride(),
            rows,
            eps,
            NUM_KEYS=num_keys,
            HALF=half,
            TOP_K=top_k,
            SPLITS=splits,
            IDW=idw,
            PRECISION=precision,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_D=config.block_d,
            num_warps=config.num_warps,
            on=queries,
        )
        launch(
            half_merge_kernel,
            (rows * heads, 2),
            queries[begin : begin + rows],
            keys,
            candidates,
            columns,
            half_scores[begin : begin + rows],
            sub_keys[begin : begin + rows],
            *queries.stride(),
            *keys.stride(),
            heads,
            eps,
            NUM_KEYS=num_keys,
            HALF=half,
            TOP_K=top_k,
            SPLITS=splits,
            IDW=idw,
            BLOCK_C=block_c,
            BLOCK_R=next_power_of_2(top_k),
            BLOCK_K=max(1, min(next_power_of_2(top_k), 8, 4096 // block_d)),
            BLOCK_D=block_d,
            num_warps=row_warps(block_d, keys.dtype) if idw else 1,
            on=queries,
        )
    launch(
        pair_topk_kernel,
        (num_rows * heads,),
        half_scores,
        sub_keys,
        scores,
        slots,
        NUM_KEYS=num_keys,
        TOP_K=top_k,
        NUM_PAIRS=num_pairs,
        BLOCK_P=block_p,
        num_warps=4 if block_p > 256 else 1,  # one warp while a row is small
        on=queries,
    )
    return scores, slots, half_scores, sub_keys


@triton.jit
def half_grad_kernel(
    grad_halves_ptr,
    queries_ptr,
    keys_ptr,
    sub_keys_ptr,
    step_factor_ptr,
    grad_totals_ptr,
    grad_queries_ptr,
    factor_ptr,
    stride_gm,
    stride_gh,
    stride_ga,
    stride_gk,
    stride_qm,
    stride_qh,
    stride_qd,
    stride_kn,
    stride_kd,
    H,
    eps: tl.float64,
    HALF: tl.constexpr,
    TOP_K: tl.constexpr,
    IDW: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dq = Σ_k f_k·(k - q) for idw, with f = 2·ds/(eps + |q - k|²) from the difference itself; dq = Σ_k ds_k·k for dot.

    STEP adds Σ_k step_factor_k·V[k], where V, [H·2·n, Dk/2], is the gradient of the key step's totals. A program owns
    one half of one (token, head) row; it also writes the factors f (or ds), with which the sub-keys' gradient is
    f·(q - k) (or ds·q). Grid: (rows, 2).
    """
    i_row = tl.program_id(0).to(tl.int64)
    i_half = tl.program_id(1).to(tl.int64)
    i_m = i_row // H
    i_head = i_row % H
    dtype: tl.constexpr = tl.float64 if factor_ptr.dtype.element_ty == tl.float64 else tl.float32

    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_d = offs_d < HALF
    q_base = queries_ptr + i_m * stride_qm + i_head * stride_qh + i_half * HALF * stride_qd
    g_base = grad_halves_ptr + i_m * stride_gm + i_head * stride_gh + i_half * stride_ga
    pick_base = (i_row * 2 + i_half) * TOP_K
    q = tl.load(q_base + offs_d * stride_qd, mask=mask_d, other=0.0).to(dtype)  # [BLOCK_D]
    grad_q = tl.zeros([BLOCK_D], dtype)
    for start in range(0, TOP_K, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        mask_k = offs_k < TOP_K
        mask = mask_k[:, None] & mask_d[None, :]
        row = tl.load(sub_keys_ptr + pick_base + offs_k, mask=mask_k, other=0).to(tl.int64)
        factor = tl.load(g_base + offs_k.to(tl.int64) * stride_gk, mask=mask_k, other=0.0).to(dtype)  # [BLOCK_K]
        k = tl.load(
            keys_ptr + row[:, None] * stride_kn + offs_d[None, :] * stride_kd,
            mask=mask,
            other=0.0,
        ).to(dtype)  # [BLOCK_K, BLOCK_D]
        if IDW:
            k = tl.where(mask_k[:, None], k - q[None, :], 0.0)
            factor = 2.0 * factor / (tl.full([], eps, dtype) + tl.sum(k * k, axis=1))
        grad_q += tl.sum(factor[:, None] * k, axis=0)
        if STEP:
            step_factor = tl.load(step_factor_ptr + pick_base + offs_k, mask=mask_k, other=0.0)  # [BLOCK_K]
            v = tl.load(grad_totals_ptr + row[:, None] * HALF + offs_d[None, :], mask=mask, other=0.0)
            grad_q += tl.sum(step_factor[:, None] * v, axis=0)
        tl.store(factor_ptr + pick_base + offs_k, factor, mask=mask_k)
    out = grad_queries_ptr + (i_row * 2 + i_half) * HALF + offs_d
    tl.store(out, grad_q.to(grad_queries_ptr.dtype.element_ty), mask=mask_d)


def half_grad(
    grad_halves: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    sub_keys: torch.Tensor,
    *,
    idw: bool,
    eps: float,
    step_factors: torch.Tensor | None = None,
    grad_totals: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the gradient of queries [M, H, Dk], and the factors [M, H, 2, K] of the sub-keys' gradient.

    `grad_halves` are gradients of the half scores [M, H, 2, K], of any strides; `keys` is a table [H·2·n, Dk/2], and
    `sub_keys` [M, H, 2, K], contiguous, names its rows. `step_factors`, like `sub_keys`, and `grad_totals`, like
    `keys`, contiguous and in the compute dtype, are what the key step adds. The gradient is in `out_dtype`, by default
    that of the queries.
    """
    half = keys.shape[1]
    top_k = sub_keys.shape[3]
    grad_queries = torch.empty(queries.shape, dtype=out_dtype or queries.dtype, device=queries.device)
    factors = torch.empty(sub_keys.shape, dtype=compute_dtype(keys.dtype), device=queries.device)
    if factors.numel() == 0:
        return grad_queries, factors
    block_d = next_power_of_2(half)
    launch(
        half_grad_kernel,
        (queries.shape[0] * queries.shape[1], 2),
        grad_halves,
        queries,
        keys,
        sub_keys,
        factors if step_factors is None else step_factors,
        keys if grad_totals is None else grad_totals,
        grad_queries,
        factors,
        *grad_halves.stride(),
        *queries.stride(),
        *keys.stride(),
        queries.shape[1],
        eps,
        HALF=half,
        TOP_K=top_k,
        IDW=idw,
        STEP=step_factors is not None,
        BLOCK_K=max(1, min(next_power_of_2(top_k), 8, 4096 // block_d)),
        BLOCK_D=block_d,
        num_warps=row_warps(block_d, keys.dtype),
        on=queries,
    )
    return grad_queries, factors
