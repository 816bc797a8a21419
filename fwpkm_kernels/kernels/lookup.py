"""Product-key lookup: scores of the sub-keys, the best of each half, the best of their sums, and the gradient of that.

Forward is two launches. `half_topk_kernel` ranks one tile of sub-keys for one tile of queries and keeps the best K of
the tile: full score matrices never reach device memory. `merge_kernel` merges the tiles of the two halves of a row,
scores the winners from differences, forms the sums of the halves and keeps the best K. (A single launch would hold all
scores of a row in one program: a tile of 16 rows by 512 sub-keys takes 255 registers a thread on sm_90, and no tile
holds a larger n.)

The gradient of a query row is `half_grad_kernel`, which the key step's backward shares; that of the sub-keys is a sum
over the rows that picked them, which `kernels/segments.py` does for every table of the package.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..records import Addresses
from . import compute_dtype
from ._common import (
    cdiv,
    from_ordered,
    in_order,
    launch,
    lowest,
    next_power_of_2,
    row_warps,
    take_best,
    take_top,
    to_ordered,
    wait_for_inputs,
)
from .weights import weighed

#: Candidates are made and merged a slab of rows at a time, so that they stay in the L2 cache (50 MB on an H100).
CANDIDATE_BYTES = 2**25


class LookupConfig(NamedTuple):
    """Tile of `half_topk_kernel`: BLOCK_M query rows by BLOCK_N sub-keys, BLOCK_D columns of the dot at a time."""

    block_m: int
    block_n: int
    block_d: int
    num_warps: int


#: With up to so many rows, the tiles for many rows would leave half of an H100's multiprocessors without a program.
FEW_ROWS = 1024


def lookup_config(num_rows: int, keys: Tensor, top_k: int) -> LookupConfig:
    """Launch table. A token's result never depends on how many come with it.

    BLOCK_M, BLOCK_N and the warps depend on the number of rows and change no bits: a dot product is a sum of those of
    BLOCK_D columns each in every tile. If the columns of a sub-key are consecutive, all tiles of float32 and half
    precision spread them over equally many lanes, so that |k|² is summed in one order. And where FEW_ROWS matters,
    `merge_kernel` has one warp for the candidates of either tile.

    Tiles are as high as 16 rows for each warp: so the matrix units leave a row in one warp, and the K reductions over
    it need no shared memory. With few picks they are so narrow that a multiprocessor holds two programs of 8 warps (128
    registers on sm_90); with many, wide ones leave fewer candidates to merge. (On an H200, with few picks, tiles of 128
    sub-keys take 5 % less of 512 sub-keys and 10 % less of 4096; on sm_80 they do not fit the registers.)
    """
    width = next_power_of_2(keys.shape[2])
    if keys.dtype == torch.float64:
        return LookupConfig(16, max(16, next_power_of_2(top_k), min(64, width)), 1, 4)
    if top_k > 16:
        return LookupConfig(128, max(16, min(128, width), next_power_of_2(top_k)), 16, 8)
    is_few = num_rows <= FEW_ROWS and width * top_k <= 32 * 512 and keys.stride(3) == 1
    if is_few or width < 64:
        # Narrow ones leave no multiprocessor without a program; with more rows, wider ones leave fewer with three.
        return LookupConfig(64, max(16, min(32 if num_rows <= FEW_ROWS // 4 else 64, width)), 32, 4)
    return LookupConfig(128, 64, 32, 8)


def merge_warps(block_c: int, block_p: int, row_bytes: int) -> int:
    """Warps for `merge_kernel`: one, whose reductions need no shared memory, while its tiles fit registers.

    The candidates of both halves take 16 bytes of each of `block_c` columns, pairs as much, and of the sub-keys, rows
    of `row_bytes` (0: not read), several are held at a time.
    """
    return max(1, min(8, max(block_c // 512, block_p // 256, row_bytes // 2048)))


@triton.jit
def split(x, IDW: tl.constexpr):
    """x as the nearest number that tf32 holds, and the rest: not finite where x is not.

    Nearest, so that the rests have both signs: of truncated ones the products that are left out would add up. The last
    4096th below the largest float32 is rounded to infinity.
    """
    big = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    if not IDW:  # idw replaces all scores that are not finite
        big = tl.where(x == x, big, x)  # a NaN with the largest payload would be rounded to 0
    return big, x - big


@triton.jit
def dot_part(q, k, Q_SMALL: tl.constexpr, K_SMALL: tl.constexpr, IDW: tl.constexpr, PRECISION: tl.constexpr):
    """q·k of a few columns: [BLOCK_M, BLOCK_N]. Tensor cores truncate as they add, so longer sums are formed outside.

    "tf32x3" is q_small·k_big + q_big·k_small + q_big·k_big. Without Q_SMALL or K_SMALL that rest is 0, and left out.
    """
    if PRECISION == "tf32x3":
        q_big, q_small = split(q, IDW)
        k_big, k_small = split(k, IDW)
        part = tl.zeros([q.shape[0], k.shape[1]], tl.float32)
        if Q_SMALL:
            part = tl.dot(q_small, k_big, part, input_precision="tf32")
        if K_SMALL:
            part = tl.dot(q_big, k_small, part, input_precision="tf32")
        if not IDW:  # idw replaces all scores that are not finite
            part = tl.where(tl.abs(part) < float("inf"), part, 0.0)  # rests of infinities are NaN, q_big·k_big is right
        return tl.dot(q_big, k_big, part, input_precision="tf32")
    return tl.dot(q, k, input_precision=PRECISION)


@triton.jit(do_not_specialize=["M"])
def half_topk_kernel(
    queries_ptr, keys_ptr, candidate_ptr, column_ptr,
    stride_qm, stride_qh, stride_qd, stride_kh, stride_ka, stride_kn, stride_kd,
    M,
    NUM_KEYS: tl.constexpr, HALF: tl.constexpr, TOP_K: tl.constexpr, SPLITS: tl.constexpr, IDW: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Best TOP_K of BLOCK_N sub-keys, for BLOCK_M rows, by q·k, or IDW: by 2 q·k - |k|², which is |q|² - |q - k|².

    Only the rank matters under IDW: |q|² is the same for all sub-keys, -log(eps + d²) falls with d², and `merge_kernel`
    scores the winners from their differences. Sub-keys tie here only where rounding makes their 2 q·k - |k|² equal. A
    program owns one tile of rows, one tile of the sub-keys of one half of one head, and writes its candidates,
    best first, as ordered integers. Grid: (row tiles, SPLITS, 2·H).
    """
    wait_for_inputs(PDL)
    i_m = tl.program_id(0).to(tl.int64)
    i_split = tl.program_id(1)
    i_group = tl.program_id(2)
    i_head = (i_group // 2).to(tl.int64)
    i_half = (i_group % 2).to(tl.int64)
    dtype: tl.constexpr = tl.float64 if candidate_ptr.dtype.element_ty == tl.int64 else tl.float32
    # tf32 holds every bit of both half-precision formats.
    Q_SMALL: tl.constexpr = queries_ptr.dtype.element_ty.primitive_bitwidth > 16
    K_SMALL: tl.constexpr = keys_ptr.dtype.element_ty.primitive_bitwidth > 16

    offs_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = i_split * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < NUM_KEYS
    q_ptrs = queries_ptr + offs_m * stride_qm + i_head * stride_qh + i_half * HALF * stride_qd  # [BLOCK_M]
    k_ptrs = keys_ptr + i_head * stride_kh + i_half * stride_ka + offs_n.to(tl.int64) * stride_kn  # [BLOCK_N]

    dots = tl.zeros([BLOCK_M, BLOCK_N], dtype)
    k_norm = tl.zeros([BLOCK_N], dtype)
    if dtype == tl.float64:
        # Column by column: tl.dot takes no float64 before Triton 3.6.
        for _ in range(HALF):
            q = tl.load(q_ptrs, mask=mask_m, other=0.0)  # [BLOCK_M]
            k = tl.load(k_ptrs, mask=mask_n, other=0.0)  # [BLOCK_N]
            q_ptrs += stride_qd
            k_ptrs += stride_kd
            dots += q[:, None] * k[None, :]
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
            if IDW:
                k_norm += tl.sum(k * k, axis=0)
            dots += dot_part(q, k, Q_SMALL, K_SMALL, IDW, PRECISION)
    if IDW:
        # A score is not finite because q or k is not: the distance is then infinite, or NaN if k has NaN. (If q has
        # NaN, all scores of the row are NaN; infinities, which are equal too, rank the sub-keys in the same order.)
        far = to_ordered(tl.where(k_norm == k_norm, float("-inf"), k_norm))  # [BLOCK_N]
        scores = 2.0 * dots - k_norm[None, :]
        bits = tl.where(tl.abs(scores) < float("inf"), to_ordered(scores, HAS_NAN=False), far[None, :])
    else:
        bits = to_ordered(dots)
    bits = tl.where(mask_n[None, :], bits, lowest(bits))
    out = ((offs_m * tl.num_programs(2) + i_group) * SPLITS + i_split) * TOP_K  # [BLOCK_M]
    for start in range(0, TOP_K, BLOCK_K):
        best, columns, bits = take_top(bits, offs_n[None, :], min(BLOCK_K, TOP_K - start), BLOCK_K)
        offs_k = start + tl.arange(0, BLOCK_K)
        at = out[:, None] + offs_k[None, :]  # [BLOCK_M, BLOCK_K]
        mask = mask_m[:, None] & (offs_k < TOP_K)[None, :]
        tl.store(candidate_ptr + at, best, mask=mask)
        tl.store(column_ptr + at, columns, mask=mask)


@triton.jit
def merge_kernel(
    queries_ptr, keys_ptr, candidate_ptr, column_ptr, half_scores_ptr, sub_keys_ptr, scores_ptr, slots_ptr, weights_ptr,
    stride_qm, stride_qh, stride_qd, stride_kh, stride_ka, stride_kn, stride_kd,
    H, eps: tl.float64, temperature: tl.float64,
    NUM_KEYS: tl.constexpr, HALF: tl.constexpr, TOP_K: tl.constexpr, NUM_PAIRS: tl.constexpr, SPLITS: tl.constexpr,
    IDW: tl.constexpr, WEIGHTING: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
    PDL: tl.constexpr,
):
    """Best TOP_K of the candidates of each half, in order, and best TOP_K of the sums of the two halves.

    Writes the half scores, the rows of keys [H·2·n, HALF] that they are of, the sums and their slots. IDW: each half
    score is formed again from the difference q - k, since the candidates' have cancelled, and the order is that of the
    new ones. Of the sums only the NUM_PAIRS pairs with (i + 1)(j + 1) <= TOP_K can win. They are numbered in flat order
    i·K + j, so the lowest number among equal sums is the lowest flat position. With a WEIGHTING, which may be "none",
    also writes the weights softmax, silu or relu(sums / temperature). A program owns one (token, head) row. Grid:
    (rows,).
    """
    wait_for_inputs(PDL)
    i_row = tl.program_id(0).to(tl.int64)
    i_m = i_row // H
    i_head = i_row % H
    dtype: tl.constexpr = half_scores_ptr.dtype.element_ty
    offs_r = tl.arange(0, BLOCK_R)

    # Both halves are loaded before either is searched, so that the program waits for memory once.
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < SPLITS * TOP_K
    candidates1 = i_row * (2 * SPLITS * TOP_K) + offs_c
    candidates2 = candidates1 + SPLITS * TOP_K
    bits1 = tl.load(candidate_ptr + candidates1, mask=mask_c, other=0)  # [BLOCK_C]
    bits2 = tl.load(candidate_ptr + candidates2, mask=mask_c, other=0)
    columns1 = tl.load(column_ptr + candidates1, mask=mask_c, other=0)
    columns2 = tl.load(column_ptr + candidates2, mask=mask_c, other=0)
    bits1 = tl.where(mask_c, bits1, lowest(bits1))
    bits2 = tl.where(mask_c, bits2, lowest(bits2))
    best1 = tl.zeros([BLOCK_R], bits1.dtype)
    best2 = best1
    keys1 = best1.to(tl.int32)
    keys2 = keys1
    # As in `take_top`, for both halves at a time: a reduction over a warp takes long, and two take hardly longer.
    for i_k in range(TOP_K):
        bit1, column1, bits1 = take_best(bits1, columns1)
        bit2, column2, bits2 = take_best(bits2, columns2)
        best1 = tl.where(offs_r == i_k, bit1, best1)
        best2 = tl.where(offs_r == i_k, bit2, best2)
        keys1 = tl.where(offs_r == i_k, column1, keys1)
        keys2 = tl.where(offs_r == i_k, column2, keys2)

    if IDW:
        q_ptrs = queries_ptr + i_m * stride_qm + i_head * stride_qh
        k_ptrs = keys_ptr + i_head * stride_kh
        second_half = tl.full([], HALF, tl.int64) * stride_qd
        distances1 = tl.zeros([BLOCK_R], dtype)
        distances2 = tl.zeros([BLOCK_R], dtype)
        for start in range(0, TOP_K, BLOCK_K):
            offs_k = start + tl.arange(0, BLOCK_K)
            row1 = tl.gather(keys1, offs_k, 0).to(tl.int64)[:, None]  # [BLOCK_K, 1]
            row2 = tl.gather(keys2, offs_k, 0).to(tl.int64)[:, None]
            squares1 = tl.zeros([BLOCK_K, BLOCK_D], dtype)
            squares2 = tl.zeros([BLOCK_K, BLOCK_D], dtype)
            for first in tl.static_range(0, HALF, BLOCK_D):
                offs_d = first + tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
                mask_d = offs_d < HALF
                mask = (offs_k < TOP_K)[:, None] & mask_d
                q1 = tl.load(q_ptrs + offs_d * stride_qd, mask=mask_d, other=0.0).to(dtype)  # [1, BLOCK_D]
                q2 = tl.load(q_ptrs + second_half + offs_d * stride_qd, mask=mask_d, other=0.0).to(dtype)
                k1 = tl.load(k_ptrs + row1 * stride_kn + offs_d * stride_kd, mask=mask, other=0.0).to(dtype)
                k2 = tl.load(k_ptrs + stride_ka + row2 * stride_kn + offs_d * stride_kd, mask=mask, other=0.0).to(dtype)
                squares1 += (q1 - k1) * (q1 - k1)
                squares2 += (q2 - k2) * (q2 - k2)
            distance1 = tl.sum(squares1, axis=1)  # [BLOCK_K]
            distance2 = tl.sum(squares2, axis=1)
            is_chunk = offs_r // BLOCK_K == start // BLOCK_K
            distances1 = tl.where(is_chunk, tl.gather(distance1, offs_r % BLOCK_K, 0), distances1)
            distances2 = tl.where(is_chunk, tl.gather(distance2, offs_r % BLOCK_K, 0), distances2)
        best1 = to_ordered(-tl.log(tl.full([], eps, dtype) + distances1))
        best2 = to_ordered(-tl.log(tl.full([], eps, dtype) + distances2))
        best1, keys1 = in_order(best1, keys1, NUM_KEYS, TOP_K, BLOCK_R)
        best2, keys2 = in_order(best2, keys2, NUM_KEYS, TOP_K, BLOCK_R)

    mask_r = offs_r < TOP_K
    out = i_row * (2 * TOP_K) + offs_r
    first_key = (i_head * (2 * NUM_KEYS)).to(tl.int32)
    tl.store(half_scores_ptr + out, from_ordered(best1), mask=mask_r)
    tl.store(half_scores_ptr + out + TOP_K, from_ordered(best2), mask=mask_r)
    tl.store(sub_keys_ptr + out, first_key + keys1, mask=mask_r)
    tl.store(sub_keys_ptr + out + TOP_K, first_key + NUM_KEYS + keys2, mask=mask_r)

    # Row i of the K×K square has K // (i + 1) pairs that can win.
    offs_p = tl.arange(0, BLOCK_P)
    mask_p = offs_p < NUM_PAIRS
    first = tl.zeros([BLOCK_P], tl.int32)
    start = tl.zeros([BLOCK_P], tl.int32)
    end = 0
    for i in tl.static_range(TOP_K - 1):
        end += TOP_K // (i + 1)
        first += (offs_p >= end).to(tl.int32)
        start = tl.where(offs_p >= end, end, start)
    second = tl.where(mask_p, offs_p - start, 0)
    sums = from_ordered(tl.gather(best1, first, 0)) + from_ordered(tl.gather(best2, second, 0))  # [BLOCK_P]
    slots = tl.gather(keys1, first, 0).to(tl.int64) * NUM_KEYS + tl.gather(keys2, second, 0)
    bits = to_ordered(sums)
    bits = tl.where(mask_p, bits, lowest(bits))
    best, pairs, _ = take_top(bits, offs_p, TOP_K, BLOCK_R)
    scores = from_ordered(best)  # [BLOCK_R]
    slots = tl.gather(slots, pairs, 0)
    out = i_row * TOP_K + offs_r
    tl.store(scores_ptr + out, scores, mask=mask_r)
    tl.store(slots_ptr + out, slots, mask=mask_r)
    if WEIGHTING != "none":
        weights, _ = weighed(scores[None, :], mask_r[None, :], temperature, WEIGHTING)
        tl.store(weights_ptr + out, tl.reshape(weights, [BLOCK_R]), mask=mask_r)


def lookup(
    queries: Tensor, keys: Tensor,
    *, top_k: int, idw: bool, eps: float, precision: str, weights: Tensor | None = None, weighting: str = "softmax",
    temperature: float = 1.0, config: LookupConfig | None = None,
) -> Addresses:
    """Launch the lookup of queries [M, H, Dk] in keys [H, 2, n, Dk/2].

    `weights`, [M, H, K], contiguous and in the compute dtype, is filled with the softmax, silu or relu of a row's
    scores / temperature.
    """
    num_rows, heads, _ = queries.shape
    num_keys, half = keys.shape[2:]
    dtype = compute_dtype(keys.dtype)
    found = Addresses.empty(queries, top_k, dtype)
    scores, slots, half_scores, sub_keys = found
    if scores.numel() == 0:
        return found
    config = config or lookup_config(num_rows, keys, top_k)
    splits = cdiv(num_keys, config.block_n)
    if precision == "tf32x3" and torch.version.hip is not None:
        precision = "ieee"  # AMD has no tf32
    bits = torch.int64 if dtype == torch.float64 else torch.int32
    row_bytes = heads * 2 * splits * top_k * (bits.itemsize + torch.int32.itemsize)
    slab = min(num_rows, cdiv(max(1, CANDIDATE_BYTES // row_bytes), config.block_m) * config.block_m)
    candidates = torch.empty(slab, heads, 2, splits, top_k, dtype=bits, device=queries.device)
    columns = torch.empty(slab, heads, 2, splits, top_k, dtype=torch.int32, device=queries.device)
    num_pairs = sum(top_k // (i + 1) for i in range(top_k))
    block_p = next_power_of_2(num_pairs)
    block_c = next_power_of_2(splits * top_k)
    width = next_power_of_2(max(1, half))
    # A tile has so few columns that a warp holds several sub-keys side by side: a sum takes few steps between lanes.
    block_d = min(width, max(256 // keys.dtype.itemsize, width // 8))
    num_warps = merge_warps(block_c, block_p, width * dtype.itemsize if idw else 0)
    for begin in range(0, num_rows, slab):
        rows = min(slab, num_rows - begin)
        of_slab = slice(begin, begin + rows)
        launch(
            half_topk_kernel, (cdiv(rows, config.block_m), splits, 2 * heads),
            queries[of_slab], keys, candidates, columns,
            *queries.stride(), *keys.stride(),
            rows,
            NUM_KEYS=num_keys, HALF=half, TOP_K=top_k, SPLITS=splits, IDW=idw, PRECISION=precision,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_D=config.block_d,
            BLOCK_K=min(next_power_of_2(top_k), 8), num_warps=config.num_warps, on=queries,
        )
        launch(
            merge_kernel, (rows * heads,),
            queries[of_slab], keys, candidates, columns, half_scores[of_slab], sub_keys[of_slab], scores[of_slab],
            slots[of_slab], (scores if weights is None else weights)[of_slab],
            *queries.stride(), *keys.stride(),
            heads, eps, temperature,
            NUM_KEYS=num_keys, HALF=half, TOP_K=top_k, NUM_PAIRS=num_pairs, SPLITS=splits, IDW=idw,
            WEIGHTING="none" if weights is None else weighting,
            BLOCK_C=block_c, BLOCK_R=next_power_of_2(top_k),
            # Few rows leave a program many registers: it then waits once for the sub-keys of all picks.
            BLOCK_K=max(1, min(next_power_of_2(top_k), 8 if num_rows <= FEW_ROWS else 4, 1024 * num_warps // block_d)),
            BLOCK_D=block_d,
            BLOCK_P=block_p, num_warps=num_warps, on=queries,
        )
    return found


@triton.jit
def half_grad_kernel(
    grad_halves_ptr, queries_ptr, keys_ptr, sub_keys_ptr, grad_queries_ptr, factor_ptr,
    stride_gm, stride_gh, stride_ga, stride_gk, stride_qm, stride_qh, stride_qd, stride_kn, stride_kd,
    H, eps: tl.float64,
    HALF: tl.constexpr, TOP_K: tl.constexpr, IDW: tl.constexpr, ADD: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """dq = Σ_k f_k·(k - q) for idw, with f = 2·ds/(eps + |q - k|²) from the difference itself; dq = Σ_k ds_k·k for dot.

    With ADD dq is added to `grad_queries`. A program owns one half of one (token, head) row; it also writes the factors
    f (or ds), with which the sub-keys' gradient is f·(q - k) (or ds·q). Grid: (rows, 2).
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
            keys_ptr + row[:, None] * stride_kn + offs_d[None, :] * stride_kd, mask=mask, other=0.0,
        ).to(dtype)  # [BLOCK_K, BLOCK_D]
        if IDW:
            k = tl.where(mask_k[:, None], k - q[None, :], 0.0)
            factor = 2.0 * factor / (tl.full([], eps, dtype) + tl.sum(k * k, axis=1))
        grad_q += tl.sum(factor[:, None] * k, axis=0)
        tl.store(factor_ptr + pick_base + offs_k, factor, mask=mask_k)
    out = grad_queries_ptr + (i_row * 2 + i_half) * HALF + offs_d
    if ADD:
        grad_q += tl.load(out, mask=mask_d, other=0.0).to(dtype)
    tl.store(out, grad_q.to(grad_queries_ptr.dtype.element_ty), mask=mask_d)


def half_grad(
    grad_halves: Tensor, queries: Tensor, keys: Tensor, sub_keys: Tensor,
    *, idw: bool, eps: float, out: Tensor | None = None, add: bool = False,
) -> tuple[Tensor, Tensor]:
    """Launch the gradient of queries [M, H, Dk], and the factors [M, H, 2, K] of the sub-keys' gradient.

    `grad_halves` are gradients of the half scores [M, H, 2, K], of any strides; `keys` is a table [H·2·n, Dk/2], and
    `sub_keys` [M, H, 2, K], contiguous, names its rows. The gradient is written to `out`, contiguous and of any dtype,
    by default a new tensor in that of the queries; with `add` it is added to what `out` holds.
    """
    half, top_k = keys.shape[1], sub_keys.shape[3]
    grad_queries = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device) if out is None else out
    factors = torch.empty(sub_keys.shape, dtype=compute_dtype(keys.dtype), device=queries.device)
    block_d = next_power_of_2(max(1, half))
    launch(
        half_grad_kernel, (queries.shape[0] * queries.shape[1], 2),
        grad_halves, queries, keys, sub_keys, grad_queries, factors,
        *grad_halves.stride(), *queries.stride(), *keys.stride(),
        queries.shape[1], eps,
        HALF=half, TOP_K=top_k, IDW=idw, ADD=add,
        BLOCK_K=max(1, min(next_power_of_2(top_k), 8, 4096 // block_d)), BLOCK_D=block_d,
        num_warps=row_warps(block_d, keys.dtype), on=queries,
    )
    return grad_queries, factors
