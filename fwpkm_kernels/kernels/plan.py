"""The plan of the picks of sub-keys: a stable counting sort in two launches, and the picks' probabilities with it.

A half of a head has few sub-keys and many picks, so its picks are sorted by counting. Tokens come in tiles of 16: then
the tokens of a tile that picked a sub-key fit a word, bit by bit, each at most once since the picks of a half of a row
differ. `count_kernel` leaves these words; as a bit is a power of two, and a sub-key a pair of digits, all words of a
tile are one product of matrices of half precision, and exact. `place_kernel` then knows the place of each pick: where
its sub-key begins, and the picks of that in earlier tiles and, in the word, below the token's own bit.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._common import cdiv, launch, next_power_of_2

TILE = 16
#: Programs for each half of a head. Each sums the counts of all others, so that no third launch has to.
PROGRAMS = 64
#: The counts of sub-keys that a program of `place_kernel` holds.
MAX_KEYS = 4096
#: A count of tokens shares its word with the bits of a tile.
MAX_ROWS = PROGRAMS * TILE * 2**11
#: The words of all tiles have a bit, and half a byte more, for each sub-key and row: at most 128 MiB of them.
MAX_WORDS = 2**25


class PlanConfig(NamedTuple):
    """Tiles of the two kernels: digits of a sub-key, picks of a token at a time, rows of counts at a time."""

    block_high: int
    block_low: int
    block_k: int
    block_p: int
    count_warps: int
    place_warps: int


def plan_config(num_keys: int, top_k: int) -> PlanConfig:
    """Launch table, keyed by the number of sub-keys and of picks."""
    bits = max(8, (num_keys - 1).bit_length())  # digits of at least 16, for the product
    low = 2 ** ((bits + 1) // 2)
    return PlanConfig(
        block_high=2**bits // low,
        block_low=low,
        block_k=min(next_power_of_2(top_k), 8),
        block_p=max(1, 2**13 // 2**bits),
        count_warps=8 if bits > 10 else 4,
        place_warps=8,
    )


@triton.jit
def count_bits(x):
    """How many of the low 16 bits are set, the others being 0."""
    x = x - ((x >> 1) & 0x5555)
    x = (x & 0x3333) + ((x >> 2) & 0x3333)
    x = (x + (x >> 4)) & 0x0F0F
    return (x + (x >> 8)) & 0x1F


@triton.jit(do_not_specialize=["M", "first_row", "tiles"])
def count_kernel(
    sub_keys_ptr,
    half_scores_ptr,
    words_ptr,
    counts_ptr,
    probability_ptr,
    M,
    first_row,
    tiles,
    NUM_KEYS: tl.constexpr,
    TOP_K: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_HIGH: tl.constexpr,
    BLOCK_LOW: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """For each sub-key the tokens of each tile that picked it, and how many a program's tiles have; also P.

    A word is (the picks in earlier tiles of the program) << 16 | (bit t: token t of this tile). P is the softmax of the
    half scores of a row, 0 before `first_row`. A program owns `tiles` tiles of one half of one head.
    Grid: (programs, heads·2).
    """
    i_program = tl.program_id(0)
    i_group = tl.program_id(1)
    groups = tl.num_programs(1)
    all_tiles = tl.cdiv(M, TILE)

    offs_high = tl.arange(0, BLOCK_HIGH)
    offs_low = tl.arange(0, BLOCK_LOW)
    offs_n = offs_high[:, None] * BLOCK_LOW + offs_low[None, :]  # [BLOCK_HIGH, BLOCK_LOW]
    mask_n = offs_n < NUM_KEYS
    offs_p = tl.arange(0, TILE * BLOCK_K)
    bit = (1 << (offs_p // BLOCK_K)).to(tl.float16)
    offs_r = tl.arange(0, BLOCK_R)
    mask_r = offs_r < TOP_K

    counts = tl.zeros([BLOCK_HIGH, BLOCK_LOW], tl.int32)
    i_tile = i_program * tiles
    last = tl.minimum(i_tile + tiles, all_tiles)
    while i_tile < last:
        token = i_tile * TILE + tl.arange(0, TILE)
        picks = (token.to(tl.int64) * groups + i_group)[:, None] * TOP_K + offs_r[None, :]  # [TILE, BLOCK_R]
        mask = (token < M)[:, None] & mask_r[None, :]
        score = tl.load(half_scores_ptr + picks, mask=mask, other=float("-inf"))
        # Rows that there are not are kept from 0/0.
        best = tl.where(token < M, tl.max(score, axis=1), 0.0)
        power = tl.exp(score - best[:, None])
        total = tl.where(token < M, tl.sum(power, axis=1), 1.0)
        probability = tl.where((token >= first_row)[:, None], power / total[:, None], 0.0)
        tl.store(probability_ptr + picks, probability, mask=mask)

        token = i_tile * TILE + offs_p // BLOCK_K
        bits = tl.zeros([BLOCK_HIGH, BLOCK_LOW], tl.float32)
        for start in range(0, TOP_K, BLOCK_K):
            offs_k = start + offs_p % BLOCK_K
            mask_p = (token < M) & (offs_k < TOP_K)
            pick = (token.to(tl.int64) * groups + i_group) * TOP_K + offs_k
            column = tl.load(sub_keys_ptr + pick, mask=mask_p, other=-1) - i_group * NUM_KEYS  # [TILE * BLOCK_K]
            high = tl.where(mask_p, column // BLOCK_LOW, -1)
            is_high = (high[None, :] == offs_high[:, None]).to(tl.float16)
            is_low = (column % BLOCK_LOW)[:, None] == offs_low[None, :]
            bits = tl.dot(is_high, tl.where(is_low, bit[:, None], 0.0).to(tl.float16), bits)
        word = bits.to(tl.int32)
        tile_words = words_ptr + (i_group * all_tiles + i_tile).to(tl.int64) * NUM_KEYS
        tl.store(tile_words + offs_n, (counts << 16) | word, mask=mask_n)
        counts += count_bits(word)
        i_tile += 1
    row = (i_group * tl.num_programs(0) + i_program).to(tl.int64)
    tl.store(counts_ptr + row * NUM_KEYS + offs_n, counts, mask=mask_n)


@triton.jit(do_not_specialize=["M", "tiles"])
def place_kernel(
    sub_keys_ptr,
    words_ptr,
    counts_ptr,
    order_ptr,
    rows_ptr,
    start_ptr,
    end_ptr,
    first_ptr,
    M,
    tiles,
    NUM_KEYS: tl.constexpr,
    TOP_K: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Put each pick in its place. A program owns the same tiles as in `count_kernel`. Grid: (programs, heads·2)."""
    i_program = tl.program_id(0)
    i_group = tl.program_id(1)
    programs = tl.num_programs(0)
    groups = tl.num_programs(1)
    all_tiles = tl.cdiv(M, TILE)

    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < NUM_KEYS
    total = tl.zeros([BLOCK_N], tl.int32)
    before = tl.zeros([BLOCK_N], tl.int32)
    i_block = 0
    while i_block < programs:
        offs_p = i_block + tl.arange(0, BLOCK_P)
        counts = tl.load(
            counts_ptr + (i_group * programs + offs_p).to(tl.int64)[:, None] * NUM_KEYS + offs_n[None, :],
            mask=(offs_p < programs)[:, None] & mask_n[None, :],
            other=0,
        )  # [BLOCK_P, BLOCK_N]
        total += tl.sum(counts, axis=0)
        before += tl.sum(tl.where((offs_p < i_program)[:, None], counts, 0), axis=0)
        i_block += BLOCK_P
    end = i_group * M * TOP_K + tl.cumsum(total, axis=0)
    start = end - total
    if i_program == 0:
        first = first_ptr + i_group * NUM_KEYS
        tl.store(first + offs_n, start, mask=mask_n)
        if i_group == groups - 1:
            tl.store(first + NUM_KEYS, groups * M * TOP_K)

    base = start + before
    offs_r = tl.arange(0, TILE * BLOCK_R)
    i_token = offs_r // BLOCK_R
    offs_k = offs_r % BLOCK_R
    i_tile = i_program * tiles
    last = tl.minimum(i_tile + tiles, all_tiles)
    while i_tile < last:
        token = i_tile * TILE + i_token
        mask = (token < M) & (offs_k < TOP_K)
        pick = (token.to(tl.int64) * groups + i_group) * TOP_K + offs_k  # [TILE * BLOCK_R]
        row = tl.load(sub_keys_ptr + pick, mask=mask, other=0)
        column = tl.where(mask, row - i_group * NUM_KEYS, 0)
        tile_words = words_ptr + (i_group * all_tiles + i_tile).to(tl.int64) * NUM_KEYS
        word = tl.load(tile_words + column, mask=mask, other=0)
        position = tl.gather(base, column, 0) + (word >> 16) + count_bits(word & ((1 << i_token) - 1))
        tl.store(order_ptr + position, pick, mask=mask)
        tl.store(rows_ptr + position, row, mask=mask)
        tl.store(start_ptr + position, tl.gather(start, column, 0), mask=mask)
        tl.store(end_ptr + position, tl.gather(end, column, 0), mask=mask)
        i_tile += 1


def can_plan(num_rows: int, heads: int, num_keys: int) -> bool:
    """Whether `plan_picks` takes the picks of so many rows and heads, of so many sub-keys."""
    words = 2 * heads * cdiv(num_rows, TILE) * num_keys
    return num_keys <= MAX_KEYS and num_rows <= MAX_ROWS and words <= MAX_WORDS


def plan_picks(
    sub_keys: torch.Tensor,
    half_scores: torch.Tensor,
    *,
    num_keys: int,
    first_row: int,
    config: PlanConfig | None = None,
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Launch the plan of `sub_keys` [M, H, 2, K], and the softmax of `half_scores`, like it, both contiguous.

    The K picks of a half of a token and head differ, and name sub-keys of that half in a table [H·2·n, Dk/2], as those
    of a lookup do. Of others the plan is undefined.

    Returns:
        order, rows, start, end of the plan, each [M·H·2·K]; where the picks of each sub-key begin, [H·2·n + 1], int32;
        and the probabilities [M, H, 2, K], 0 in rows before `first_row`.
    """
    num_rows, heads, _, top_k = sub_keys.shape
    groups, device = 2 * heads, sub_keys.device
    order = torch.empty(sub_keys.numel(), dtype=torch.int64, device=device)
    rows, start, end = torch.empty(3, sub_keys.numel(), dtype=torch.int32, device=device)
    first = torch.empty(groups * num_keys + 1, dtype=torch.int32, device=device)
    probabilities = torch.empty_like(half_scores)
    if sub_keys.numel() == 0:
        return (order, rows, start, end), first.zero_(), probabilities
    config = config or plan_config(num_keys, top_k)
    all_tiles = cdiv(num_rows, TILE)
    tiles = cdiv(all_tiles, PROGRAMS)
    programs = cdiv(all_tiles, tiles)
    words = torch.empty(groups * all_tiles, num_keys, dtype=torch.int32, device=device)
    counts = torch.empty(groups * programs, num_keys, dtype=torch.int32, device=device)
    block_r = next_power_of_2(top_k)
    launch(
        count_kernel,
        (programs, groups),
        sub_keys,
        half_scores,
        words,
        counts,
        probabilities,
        num_rows,
        first_row,
        tiles,
        NUM_KEYS=num_keys,
        TOP_K=top_k,
        TILE=TILE,
        BLOCK_HIGH=config.block_high,
        BLOCK_LOW=config.block_low,
        BLOCK_K=config.block_k,
        BLOCK_R=block_r,
        num_warps=config.count_warps,
        num_stages=1,  # few steps: pipelined they spill
        on=sub_keys,
    )
    launch(
        place_kernel,
        (programs, groups),
        sub_keys,
        words,
        counts,
        order,
        rows,
        start,
        end,
        first,
        num_rows,
        tiles,
        NUM_KEYS=num_keys,
        TOP_K=top_k,
        TILE=TILE,
        BLOCK_N=config.block_high * config.block_low,
        BLOCK_P=config.block_p,
        BLOCK_R=block_r,
        num_warps=config.place_warps,
        on=sub_keys,
    )
    return (order, rows, start, end), first, probabilities
