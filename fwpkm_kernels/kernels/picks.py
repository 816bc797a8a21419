"""The plan of the picks of sub-keys: a stable counting sort in two launches, and how much each sub-key is used.

A half of a head has few sub-keys and many picks, so its picks are sorted by counting. Tokens come in tiles of 16: then
the tokens of a tile that picked a sub-key fit half a word, bit by bit, each at most once since the picks of a half of a
row differ. `count_kernel` leaves these words; as a bit is a power of two, and a sub-key a pair of digits, all words of
a tile are one product of matrices of half precision, and exact. The other half of a word is the number of picks in the
tile that belong before the sub-key's own. So `usage_kernel`, whose program owns a sub-key, finds where its tokens
begin, and which they are, from the words of that sub-key alone; lists them; and sums what the key step needs of them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..records import PickPlan, Picks
from ._common import cdiv, launch, next_power_of_2, wait_for_inputs

TILE = 16
#: The most sub-keys of a half: a program of `count_kernel` holds a word for each.
MAX_KEYS = 4096
#: There is a word for each sub-key and tile: at most 128 MiB of them.
MAX_WORDS = 2**25


class PlanConfig(NamedTuple):
    """Tiles of the two kernels: digits of a sub-key, picks of a token at a time; tiles, and tokens, at a time."""

    block_high: int
    block_low: int
    block_k: int
    block_t: int
    block_a: int
    count_warps: int
    usage_warps: int


def plan_config(num_rows: int, num_keys: int, top_k: int) -> PlanConfig:
    """Launch table, keyed by the number of rows, of sub-keys and of picks."""
    bits = max(8, (num_keys - 1).bit_length())  # digits of at least 16, for the product
    low = 2 ** ((bits + 1) // 2)
    block_k = next_power_of_2(top_k)
    block_t = min(max(next_power_of_2(cdiv(num_rows, TILE)), 32), 512)
    usage_warps = max(1, min(4, block_t // 64))
    mean = max(1, num_rows * top_k // num_keys)  # tokens that picked a sub-key
    return PlanConfig(
        block_high=2**bits // low, block_low=low, block_k=min(block_k, 8), block_t=block_t,
        # A popular sub-key is picked by far more tokens than the mean, and the launch takes as long as its program.
        block_a=min(max(next_power_of_2(mean), 32), 64, max(1, 256 * usage_warps // block_k)),
        count_warps=8 if bits > 10 else 4, usage_warps=usage_warps,
    )


@triton.jit
def count_bits(x):
    """How many of the low 16 bits are set, the others being 0."""
    x = x - ((x >> 1) & 0x5555)
    x = (x & 0x3333) + ((x >> 2) & 0x3333)
    x = (x + (x >> 4)) & 0x0F0F
    return (x + (x >> 8)) & 0x1F


@triton.jit(do_not_specialize=["M"])
def count_kernel(
    sub_keys_ptr, words_ptr,
    M,
    NUM_KEYS: tl.constexpr, TOP_K: tl.constexpr, TILE: tl.constexpr,
    BLOCK_HIGH: tl.constexpr, BLOCK_LOW: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):
    """For each sub-key the tokens of a tile that picked it, and how many picks of the tile are of lower sub-keys.

    A word is (picks of lower sub-keys) << 16 | (bit t: token t of this tile). A program owns one tile of one half of
    one head. Grid: (tiles, heads·2).
    """
    wait_for_inputs(PDL)
    i_tile = tl.program_id(0)
    i_group = tl.program_id(1)
    offs_high = tl.arange(0, BLOCK_HIGH)
    offs_low = tl.arange(0, BLOCK_LOW)
    offs_p = tl.arange(0, TILE * BLOCK_K)
    token = i_tile * TILE + offs_p // BLOCK_K
    bit = (1 << (offs_p // BLOCK_K)).to(tl.float16)
    bits = tl.zeros([BLOCK_HIGH, BLOCK_LOW], tl.float32)
    for start in range(0, TOP_K, BLOCK_K):
        offs_k = start + offs_p % BLOCK_K
        mask_p = (token < M) & (offs_k < TOP_K)
        pick = (token.to(tl.int64) * tl.num_programs(1) + i_group) * TOP_K + offs_k
        column = tl.load(sub_keys_ptr + pick, mask=mask_p, other=-1) - i_group * NUM_KEYS  # [TILE * BLOCK_K]
        high = tl.where(mask_p, column // BLOCK_LOW, -1)
        is_high = (high[None, :] == offs_high[:, None]).to(tl.float16)
        is_low = (column % BLOCK_LOW)[:, None] == offs_low[None, :]
        bits = tl.dot(is_high, tl.where(is_low, bit[:, None], 0.0).to(tl.float16), bits)
    word = tl.reshape(bits.to(tl.int32), [BLOCK_HIGH * BLOCK_LOW])
    counts = count_bits(word)
    lower = tl.cumsum(counts, axis=0) - counts
    offs_n = tl.arange(0, BLOCK_HIGH * BLOCK_LOW)
    words = words_ptr + (i_group * tl.num_programs(0) + i_tile).to(tl.int64) * NUM_KEYS
    tl.store(words + offs_n, (lower << 16) | word, mask=offs_n < NUM_KEYS)


@triton.jit
def probabilities(scores, mask):
    """The softmax P of the half scores of each row, [ROWS, BLOCK_K], -inf where there is no pick.

    Rows where `mask` is not set are kept from 0/0.
    """
    best = tl.where(mask, tl.max(scores, axis=1), 0.0)
    powers = tl.exp(scores - best[:, None])
    return powers / tl.where(mask, tl.sum(powers, axis=1), 1.0)[:, None]


@triton.jit(do_not_specialize=["M", "first_row"])
def usage_kernel(
    half_scores_ptr, sub_keys_ptr, words_ptr, tokens_ptr, order_ptr, first_ptr, slope_ptr, bend_ptr,
    M, H, first_row, share: tl.float64,
    NUM_KEYS: tl.constexpr, TOP_K: tl.constexpr, WORDS: tl.constexpr, TILE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):
    """The slope u = log(P̄ + 1e-8) + P̄/(P̄ + 1e-8) of P̄·log(P̄ + 1e-8), and u', for each sub-key: [memories, 2, n].

    P̄ is `share` times the sum of P over the picks of the sub-key in rows from `first_row` on, the H heads of a
    memory pooled. With WORDS a program first lists the tokens that picked it, in order, from the words of
    `count_kernel`, and where they begin; then which of all picks [M, H, 2, K] these are. Without WORDS these lists
    are given. A program owns one sub-key of one half, of all heads of a memory. Grid: (2·n, memories).
    """
    wait_for_inputs(PDL)
    i_key = tl.program_id(0)
    i_memory = tl.program_id(1)
    all_heads = H * tl.num_programs(1)
    dtype: tl.constexpr = half_scores_ptr.dtype.element_ty
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = (offs_k < TOP_K)[None, :]
    usage = tl.zeros([BLOCK_A], dtype)
    i_head = i_memory * H
    while i_head < (i_memory + 1) * H:
        row = i_head * (2 * NUM_KEYS) + i_key
        i_group = row // NUM_KEYS
        if WORDS:
            all_tiles = tl.cdiv(M, TILE)
            words = words_ptr + i_group.to(tl.int64) * all_tiles * NUM_KEYS + row % NUM_KEYS
            lower = tl.zeros([BLOCK_T], tl.int32)
            i_tile = 0
            while i_tile < all_tiles:
                offs_t = i_tile + tl.arange(0, BLOCK_T)
                word = tl.load(words + offs_t.to(tl.int64) * NUM_KEYS, mask=offs_t < all_tiles, other=0)
                lower += (word >> 16) & 0xFFFF
                i_tile += BLOCK_T
            begin = i_group * M * TOP_K + tl.sum(lower, axis=0)
            end = begin
            i_tile = 0
            while i_tile < all_tiles:
                offs_t = i_tile + tl.arange(0, BLOCK_T)
                word = tl.load(words + offs_t.to(tl.int64) * NUM_KEYS, mask=offs_t < all_tiles, other=0)
                left = word & 0xFFFF  # [BLOCK_T]
                counts = count_bits(left)
                place = end + tl.cumsum(counts, axis=0) - counts
                while tl.max(left, axis=0) > 0:  # takes the lowest bit of each word; most have one or none
                    bit = left & -left
                    tl.store(tokens_ptr + place, offs_t * TILE + count_bits(bit - 1), mask=left > 0)
                    left -= bit
                    place += 1
                end += tl.sum(counts, axis=0)
                i_tile += BLOCK_T
            tl.store(first_ptr + row, begin)
            if row == all_heads * (2 * NUM_KEYS) - 1:
                tl.store(first_ptr + row + 1, end)
            tl.debug_barrier()  # the threads that read a token next are not those that listed it
        else:
            begin = tl.load(first_ptr + row)
            end = tl.load(first_ptr + row + 1)
        position = begin
        while position < end:
            offs_a = position + tl.arange(0, BLOCK_A)
            mask_a = offs_a < end
            token = tl.load(tokens_ptr + offs_a, mask=mask_a, other=-1)  # [BLOCK_A]
            first_pick = (token.to(tl.int64) * (2 * all_heads) + i_group) * TOP_K
            picks = first_pick[:, None] + offs_k[None, :]  # [BLOCK_A, BLOCK_K]
            mask = mask_a[:, None] & mask_k
            scores = tl.load(half_scores_ptr + picks, mask=mask, other=float("-inf"))
            is_own = tl.load(sub_keys_ptr + picks, mask=mask, other=-1) == row
            if WORDS:
                own = tl.sum(tl.where(is_own, picks, 0), axis=1)
                tl.store(order_ptr + offs_a, own.to(order_ptr.dtype.element_ty), mask=mask_a)
            is_used = is_own & (token >= first_row)[:, None]
            usage += tl.sum(tl.where(is_used, probabilities(scores, mask_a), 0.0), axis=1)
            position += BLOCK_A
        i_head += 1
    mean = tl.sum(usage, axis=0) * tl.full([], share, dtype)
    more = mean + 1e-8
    i_key += i_memory * (2 * NUM_KEYS)
    tl.store(slope_ptr + i_key, tl.log(more) + mean / more)
    tl.store(bend_ptr + i_key, 1.0 / more + 1e-8 / (more * more))


def can_plan(num_rows: int, heads: int, num_keys: int) -> bool:
    """Whether `plan_picks` lists the picks of so many rows, heads and sub-keys itself; else `listed` must be given."""
    return num_keys <= MAX_KEYS and 2 * heads * cdiv(num_rows, TILE) * num_keys <= MAX_WORDS


def plan_picks(
    picks: Picks,
    *, num_keys: int, first_row: int, memories: int = 1, listed: tuple[Tensor, Tensor, Tensor] | None = None,
    config: PlanConfig | None = None,
) -> PickPlan:
    """Launch the plan of the sub-keys, and the slopes from their half scores, of M > 0 rows, both contiguous.

    The K picks of a half of a token and head differ, and name sub-keys of that half in a table [H·2·n, Dk/2], as
    those of a lookup do: of others the plan is undefined. The usage is that of rows from `first_row` on, in each of
    `memories` that the heads belong to, one after the other. `listed` are the tokens, order and first of the plan,
    where these are known already; else they are int32.
    """
    num_rows, heads, _, top_k = picks.sub_keys.shape
    groups, device = 2 * heads, picks.sub_keys.device
    config = config or plan_config(num_rows, num_keys, top_k)
    slope, bend = (torch.empty(memories * 2 * num_keys, dtype=picks.half_scores.dtype, device=device) for _ in range(2))
    words = picks.sub_keys  # a stand-in, which the kernel does not read
    if listed is None:
        tokens, order = torch.empty(2, picks.sub_keys.numel(), dtype=torch.int32, device=device)
        first = torch.empty(groups * num_keys + 1, dtype=torch.int32, device=device)
        tiles = cdiv(num_rows, TILE)
        words = torch.empty(groups * tiles, num_keys, dtype=torch.int32, device=device)
        launch(
            count_kernel, (tiles, groups),
            picks.sub_keys, words,
            num_rows,
            NUM_KEYS=num_keys, TOP_K=top_k, TILE=TILE,
            BLOCK_HIGH=config.block_high, BLOCK_LOW=config.block_low, BLOCK_K=config.block_k,
            num_warps=config.count_warps, num_stages=1,  # the loop has few steps, and would spill if it were pipelined
            on=words,
        )
    else:
        tokens, order, first = listed
    launch(
        usage_kernel, (2 * num_keys, memories),
        *picks, words, tokens, order, first, slope, bend,
        num_rows, heads // memories, first_row, 1.0 / max(1, (num_rows - first_row) * (heads // memories)),
        NUM_KEYS=num_keys, TOP_K=top_k, WORDS=listed is None, TILE=TILE,
        BLOCK_T=config.block_t, BLOCK_A=config.block_a, BLOCK_K=next_power_of_2(top_k), num_warps=config.usage_warps,
        on=words,
    )
    return PickPlan(tokens, order, first, slope, bend)


@triton.jit
def pick_sums_kernel(
    coefficient_ptr, order_ptr, first_ptr, sums_ptr,
    H,
    NUM_KEYS: tl.constexpr, BLOCK_A: tl.constexpr,
):
    """Sums of `coefficient` over the picks of each sub-key, the H heads of a memory pooled, [memories, 2, n].

    A program owns one sub-key of one half, of all heads of a memory. Grid: (2·n, memories).
    """
    i_key = tl.program_id(0)
    i_memory = tl.program_id(1)
    total = tl.zeros([BLOCK_A], sums_ptr.dtype.element_ty)
    i_head = i_memory * H
    while i_head < (i_memory + 1) * H:
        row = i_head * (2 * NUM_KEYS) + i_key
        position = tl.load(first_ptr + row)
        end = tl.load(first_ptr + row + 1)
        while position < end:
            offs_a = position + tl.arange(0, BLOCK_A)
            pick = tl.load(order_ptr + offs_a, mask=offs_a < end, other=0)
            total += tl.load(coefficient_ptr + pick, mask=offs_a < end, other=0.0)  # [BLOCK_A]
            position += BLOCK_A
        i_head += 1
    tl.store(sums_ptr + i_memory * (2 * NUM_KEYS) + i_key, tl.sum(total, axis=0))


def pick_sums(coefficients: Tensor, plan: PickPlan) -> Tensor:
    """Launch the sums of `coefficients` [M, H, 2, K] over the picks of each sub-key, as the slopes are pooled."""
    sums = torch.empty_like(plan.slope)
    num_keys, pooled = plan.sizes(coefficients.shape[1])
    launch(
        pick_sums_kernel, (2 * num_keys, coefficients.shape[1] // pooled),
        coefficients, plan.order, plan.first, sums,
        pooled,
        NUM_KEYS=num_keys, BLOCK_A=512, num_warps=4, on=coefficients,
    )
    return sums
