"""The reference functions against numbers worked out by hand, and the lookup against a search of all n² slots."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import reference.lookup
from fwpkm_kernels.testing import KEY_PATTERNS, assert_bitwise_equal, make_lookup_inputs
from reference import brute_force_lookup, chunk_value_update, product_key_lookup, sparse_value_gather

f64 = torch.float64


def table(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=f64)


# n = 3 sub-keys per half of width 1: keys 0, 1, 3 in the first half and 0, 2, 5 in the second.
KEYS = torch.tensor([[[[0.0], [1.0], [3.0]], [[0.0], [2.0], [5.0]]]], dtype=f64)


def test_lookup_dot_by_hand():
    # half scores 2·(0, 1, 3) = (0, 2, 6) and 1·(0, 2, 5) = (0, 2, 5); sums 11 at (2, 2), 8 at (2, 1), 7 at (1, 2)
    scores, slots = product_key_lookup(torch.tensor([[2.0, 1.0]], dtype=f64), KEYS, 3, score="dot")
    assert slots.tolist() == [[8, 7, 5]]
    assert scores.tolist() == [[11.0, 8.0, 7.0]]


def test_lookup_idw_by_hand():
    # q = (1, 1): squared distances (1, 0, 4) and (1, 1, 16). The best of the second half is a tie, won by sub-key 0.
    scores, slots = product_key_lookup(torch.tensor([[1.0, 1.0]], dtype=f64), KEYS, 2, eps=0.5)
    assert slots.tolist() == [[3, 4]]
    assert_close(scores, table([-math.log(0.5) - math.log(1.5)] * 2))


def test_lookup_default_eps():
    scores, slots = product_key_lookup(torch.tensor([[3.0, 5.0]], dtype=f64), KEYS, 1)
    assert slots.tolist() == [[8]]
    assert_close(scores, table([-2 * math.log(1e-3)]))


def test_lookup_heads_have_their_own_keys():
    keys = torch.cat([KEYS, -KEYS])  # [2, 2, 3, 1]
    queries = torch.tensor([[[2.0, 1.0], [2.0, 1.0]], [[-1.0, -1.0], [-1.0, -1.0]]], dtype=f64)  # [2, H, 2]
    scores, slots = product_key_lookup(queries, keys, 1, score="dot")
    assert slots.tolist() == [[[8], [0]], [[0], [8]]]
    assert scores.tolist() == [[[11.0], [0.0]], [[0.0], [8.0]]]


def test_lookup_ties_within_a_half():
    # All half scores are equal: sub-keys 0 and 1 win in each half, then pairs in flat order (0,0), (0,1).
    scores, slots = product_key_lookup(torch.zeros(1, 2, dtype=f64), KEYS, 2, score="dot")
    assert slots.tolist() == [[0, 1]]
    assert scores.tolist() == [[0.0, 0.0]]


def test_lookup_ties_between_pairs():
    # Half scores (0, 1) twice. Ranks: sub-keys (1, 0) in both halves. Sums: 2 at ranks (0, 0), then 1 at ranks (0, 1),
    # which is slot 2, and at ranks (1, 0), which is slot 1: ranks decide, not slots.
    keys = torch.tensor([[[[0.0], [1.0]], [[0.0], [1.0]]]], dtype=f64)
    queries = torch.ones(1, 2, dtype=f64)
    assert product_key_lookup(queries, keys, 2, score="dot")[1].tolist() == [[3, 2]]
    assert brute_force_lookup(queries, keys, 2, score="dot")[1].tolist() == [[3, 1]]


def test_lookup_nan_comes_first():
    keys = KEYS.clone()
    keys[0, 0, 1] = torch.nan
    scores, slots = product_key_lookup(torch.tensor([[2.0, 1.0]], dtype=f64), keys, 2, score="dot")
    assert slots.tolist() == [[1 * 3 + 2, 1 * 3 + 1]]
    assert scores.isnan().all()


def test_lookup_score_gradient_by_hand():
    queries = torch.tensor([[2.0, 1.0]], dtype=f64, requires_grad=True)
    keys = KEYS.clone().requires_grad_()
    scores, _ = product_key_lookup(queries, keys, 1, eps=0.5)  # nearest: 1 (3 is as far) and 0
    scores.sum().backward()
    # ds/dq = −2(q − k)/(eps + d²)
    assert_close(queries.grad, table([-2 / 1.5, -2 / 1.5]))
    expected = torch.zeros_like(KEYS)
    expected[0, 0, 1] = expected[0, 1, 0] = 2 / 1.5
    assert_close(keys.grad, expected)


def test_lookup_unknown_score():
    with pytest.raises(ValueError, match="`score`"):
        product_key_lookup(torch.zeros(1, 2), KEYS.float(), 1, score="cosine")


@pytest.mark.parametrize("key_pattern", KEY_PATTERNS)
@pytest.mark.parametrize("score", ["idw", "dot"])
@pytest.mark.parametrize("top_k", [1, 3, 8, 13])
def test_lookup_matches_brute_force(key_pattern: str, score: str, top_k: int):
    queries, keys = make_lookup_inputs((3, 5), 2, 13, 6, key_pattern=key_pattern, dtype=f64)
    scores, slots = product_key_lookup(queries, keys, top_k, score=score)
    brute_scores, brute_slots = brute_force_lookup(queries, keys, top_k, score=score)
    assert scores.shape == slots.shape == (3, 5, 2, top_k)
    assert_bitwise_equal(scores, brute_scores, "scores")
    if key_pattern != "equal":
        assert_bitwise_equal(slots, brute_slots, "slots")
    # with ties the slots may differ, but each has the score it is listed with
    first, second = reference.lookup.half_scores(queries, keys, score=score)
    assert_bitwise_equal(first.gather(-1, slots // 13) + second.gather(-1, slots % 13), scores, "scores of the slots")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    half_scores=st.lists(st.integers(-3, 3), min_size=2, max_size=14),
    top_k=st.integers(1, 7),
)
def test_two_stage_rule_literally(half_scores: list[int], top_k: int):
    """The rule spelled out with Python's sort, for many ties."""
    n = len(half_scores) // 2
    top_k = min(top_k, n)
    first, second = half_scores[:n], half_scores[n : 2 * n]
    best_first = sorted(range(n), key=lambda j: (-first[j], j))[:top_k]
    best_second = sorted(range(n), key=lambda j: (-second[j], j))[:top_k]
    pairs = [
        (-(first[i] + second[j]), rank_i * top_k + rank_j, i * n + j)
        for rank_i, i in enumerate(best_first)
        for rank_j, j in enumerate(best_second)
    ]
    expected = sorted(pairs)[:top_k]
    keys = torch.tensor([first, second], dtype=f64).reshape(1, 2, n, 1)
    scores, slots = product_key_lookup(torch.ones(1, 2, dtype=f64), keys, top_k, score="dot")
    assert slots[0].tolist() == [slot for _, _, slot in expected]
    assert scores[0].tolist() == [-negated for negated, _, _ in expected]


@pytest.mark.parametrize(("top_k", "count"), [(8, 20), (32, 119)])
def test_only_pruned_pairs_can_win(top_k: int, count: int):
    """Of the K×K pairs of ranks only those with (i+1)(j+1) ≤ K win, each of them for some scores."""
    rank = torch.arange(top_k)
    can_win = (rank + 1).unsqueeze(-1) * (rank + 1) <= top_k
    assert can_win.sum() == count
    generator = torch.Generator().manual_seed(0)
    # Sorted halves, so that a slot names a pair of ranks. Random exponents give steep and flat ones; integers, ties.
    exponents = 8 * torch.rand(900, 2, 1, generator=generator, dtype=f64) ** 2
    profiles = torch.rand(900, 2, top_k, generator=generator, dtype=f64) ** exponents
    ties = torch.randint(0, 3, (100, 2, top_k), generator=generator).to(f64)
    halves = torch.cat([profiles, ties]).sort(-1, descending=True).values
    _, slots = product_key_lookup(torch.ones(1000, 2, dtype=f64), halves.unsqueeze(-1), top_k, score="dot")
    assert can_win.view(-1)[slots].all()
    # A pair (i, j) wins when the first i+1 and j+1 of the halves are equal and far above the rest.
    for i, j in can_win.nonzero().tolist():
        steps = torch.stack([rank <= i, rank <= j]).to(f64)
        _, slots = product_key_lookup(torch.ones(1, 2, dtype=f64), steps[None, ..., None], top_k, score="dot")
        assert i * top_k + j in slots[0].tolist()


def test_lookup_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch):
    queries, keys = make_lookup_inputs(11, 2, 9, 6)
    whole = product_key_lookup(queries, keys, 4)
    monkeypatch.setattr(reference.lookup, "MAX_DIFFERENCES", 2 * keys.numel())
    for actual, expected in zip(product_key_lookup(queries, keys, 4), whole, strict=True):
        assert_bitwise_equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_lookup_dtypes(dtype: torch.dtype):
    queries, keys = make_lookup_inputs(5, dtype=dtype)
    scores, slots = product_key_lookup(queries, keys, 4)
    wanted = f64 if dtype == f64 else torch.float32
    assert scores.dtype == wanted
    assert slots.dtype == torch.int64
    # half precision is cast first: nothing is computed in it
    for actual, expected in zip((scores, slots), product_key_lookup(queries.to(wanted), keys, 4), strict=True):
        assert_bitwise_equal(actual, expected)


def test_empty_inputs():
    scores, slots = product_key_lookup(torch.zeros(0, 3, 2, 4), torch.zeros(2, 2, 5, 2), 3)
    assert scores.shape == slots.shape == (0, 3, 2, 3)
    out = sparse_value_gather(torch.zeros(5, 7), torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3))
    assert out.shape == (0, 7)


VALUES = table([1, 2], [3, 4], [5, 6], [7, 8])


def test_gather_by_hand():
    slots = torch.tensor([[0, 2], [3, 3]])
    weights = table([0.5, 2], [1, -0.5])
    # 0.5·(1, 2) + 2·(5, 6);  (1 − 0.5)·(7, 8)
    assert sparse_value_gather(VALUES, slots, weights).tolist() == [[10.5, 13.0], [3.5, 4.0]]
    assert sparse_value_gather(VALUES, slots[:, None], weights[:, None]).tolist() == [[[10.5, 13.0]], [[3.5, 4.0]]]


def test_gather_gradient_by_hand():
    values, weights = VALUES.clone().requires_grad_(), table([0.5, 2], [1, -0.5]).requires_grad_()
    out = sparse_value_gather(values, torch.tensor([[0, 2], [3, 3]]), weights)
    out.backward(table([1, 0], [1, 10]))
    assert values.grad.tolist() == [[0.5, 0], [0, 0], [2, 0], [0.5, 5]]
    assert weights.grad.tolist() == [[1, 5], [87, 87]]


def test_gather_rounds_once():
    # 256 + 1 + 1: in bfloat16 each step would round back to 256
    values = torch.tensor([[256.0], [1.0]], dtype=torch.bfloat16, requires_grad=True)
    out = sparse_value_gather(values, torch.tensor([[0, 1, 1]]), torch.ones(1, 3))
    assert out.dtype == torch.bfloat16
    assert out.tolist() == [[258.0]]
    # the gradient too: row 1 has 260 accesses
    out = sparse_value_gather(values, torch.ones(260, 1, dtype=torch.int64), torch.ones(260, 1))
    (gradient,) = torch.autograd.grad(out.sum(), values)
    assert gradient.tolist() == [[0.0], [260.0]]


# Two rows of two accesses; slot 1 is accessed by both, slot 2 never. errors e = p − y.
SLOTS = torch.tensor([[0, 1], [1, 3]])
WEIGHTS = table([0.5, 0.25], [1, 2])
TARGETS = table([0, 0], [1, 1])
PREDICTIONS = table([1, 2], [2, -1])  # e = (1, 2), (1, −2)


def update(**options) -> list[list[float]]:
    return chunk_value_update(VALUES, SLOTS, WEIGHTS, TARGETS, PREDICTIONS, **options).tolist()


def test_update_by_hand():
    # scale 1: G[0] = 0.5·(1, 2); G[1] = (0.25·(1, 2) + 1·(1, −2)) / 2; G[3] = 2·(1, −2)
    assert update(scale=1.0) == [[0.5, 1], [2.375, 4.75], [5, 6], [5, 12]]


def test_update_default_scale_is_the_number_of_picks():
    assert update() == update(scale=2.0) == [[0, 0], [1.75, 5.5], [5, 6], [3, 16]]


def test_update_lr():
    assert update(scale=1.0, lr=0.5) == update(scale=0.5) == [[0.75, 1.5], [2.6875, 4.375], [5, 6], [6, 10]]


def test_update_scale_per_row():
    # G[0] = 2·0.5·(1, 2); G[1] = (2·0.25·(1, 2) + 4·(1, −2)) / 2; G[3] = 4·2·(1, −2)
    assert update(scale=torch.tensor([2.0, 4.0])) == [[0, 0], [0.75, 7.5], [5, 6], [-1, 24]]


def test_update_gates_do_not_change_counts():
    # G[0] = 0; G[1] = 0.5·(1, −2) / 2; G[3] = 0.5·2·(1, −2)
    assert update(scale=1.0, gates=torch.tensor([0.0, 0.5])) == [[1, 2], [2.75, 4.5], [5, 6], [6, 10]]


@pytest.mark.parametrize("mask", [torch.tensor([False, True]), torch.tensor([0, 1]), torch.tensor([0.0, 1.0])])
def test_update_masked_row_is_neither_written_nor_counted(mask: Tensor):
    # G[0] = 0; G[1] = (1, −2) / 1; G[3] = 2·(1, −2)
    assert update(scale=1.0, mask=mask) == [[1, 2], [2, 6], [5, 6], [5, 12]]


def test_update_mask_multiplies():
    # G[0] = 0.5·0.5·(1, 2); G[1] = (0.5·0.25·(1, 2) + 2·(1, −2)) / 2; G[3] = 2·2·(1, −2)
    assert update(scale=1.0, mask=torch.tensor([0.5, 2.0])) == [[0.75, 1.5], [1.9375, 5.875], [5, 6], [3, 16]]


def test_update_everything_masked():
    assert update(mask=torch.zeros(2)) == VALUES.tolist()
    assert update(mask=torch.zeros(2), weight_decay=0.5) == (0.5 * VALUES).tolist()


def test_update_count_slots():
    # n = (1, 4, 1, 2): slot 0 occurs nowhere and counts as 1
    counts = torch.tensor([[1, 1, 1], [1, 3, 3]])
    assert update(scale=1.0, count_slots=counts) == [[0.5, 1], [2.6875, 4.375], [5, 6], [6, 10]]
    # they replace the mask's counts, not its factors: n_1 = 2 although row 0 is masked
    masked = update(scale=1.0, count_slots=SLOTS, mask=torch.tensor([0, 1]))
    assert masked == [[1, 2], [2.5, 5], [5, 6], [5, 12]]


def test_update_clip():
    # G = (0.5, 1), (0.625, −0.75), (2, −4) clamped to ±0.7
    expected = table([0.5, 1.3], [2.375, 4.7], [5, 6], [6.3, 8.7])
    assert_close(table(*update(scale=1.0, clip=0.7)), expected)


def test_update_weight_decay_is_not_clipped_and_moves_all_rows():
    # values − 0.5·(clamp(G) + 0.25·values), G as above clamped to ±0.5
    expected = 0.875 * VALUES - 0.5 * table([0.5, 0.5], [0.5, -0.5], [0, 0], [0.5, -0.5])
    assert_close(table(*update(scale=1.0, lr=0.5, weight_decay=0.25, clip=0.5)), expected)


def test_update_repeated_slot_in_a_row():
    slots = torch.tensor([[1, 1]])
    # both accesses count: (0.5 + 0.25)·(1, 2) / 2
    new = chunk_value_update(VALUES, slots, WEIGHTS[:1], TARGETS[:1], PREDICTIONS[:1], scale=1.0)
    assert new.tolist() == [[1, 2], [2.625, 3.25], [5, 6], [7, 8]]


def test_update_of_no_rows_is_a_new_tensor():
    new = chunk_value_update(VALUES, SLOTS[:0], WEIGHTS[:0], TARGETS[:0], PREDICTIONS[:0])
    assert new.tolist() == VALUES.tolist()
    assert new.data_ptr() != VALUES.data_ptr()


def test_update_full_rate_stores_the_target():
    """Uniform weights, α = J and own slots: reading again gives the target, from any start."""
    slots = torch.tensor([[0, 1], [2, 3]])
    weights = torch.full((2, 2), 0.5, dtype=f64)
    new = chunk_value_update(VALUES, slots, weights, TARGETS, sparse_value_gather(VALUES, slots, weights))
    assert_close(sparse_value_gather(new, slots, weights), TARGETS)


def test_update_rounds_once():
    values = torch.ones(1, 1, dtype=torch.bfloat16)
    # 257 accesses with e = 1 sum to 257/257 only when counted and added in float32
    M = 257
    new = chunk_value_update(
        values, torch.zeros(M, 1, dtype=torch.int64), torch.ones(M, 1), torch.zeros(M, 1), torch.ones(M, 1)
    )
    assert new.dtype == torch.bfloat16
    assert new.tolist() == [[0.0]]


def test_update_gradient_by_hand():
    leaves = [t.clone().requires_grad_() for t in (VALUES, WEIGHTS, TARGETS, PREDICTIONS)]
    values, weights, targets, predictions = leaves
    gates = torch.ones(2, dtype=f64, requires_grad=True)
    new = chunk_value_update(
        values, SLOTS, weights, targets, predictions, gates=gates, scale=1.0, clip=1.5, weight_decay=0.25, lr=2.0
    )
    new.backward(table([1, 1], [1, 1], [1, 1], [1, 1]))
    # G[3] = (2, −4) is clamped, so nothing flows through slot 3: Ĝ' = lr·(1, 1) on slots 0 and 1 only
    assert values.grad.tolist() == [[0.5, 0.5]] * 4  # 1 − lr·wd
    assert weights.grad.tolist() == [[-6, -3], [1, 0]]  # −⟨Ĝ', e⟩ / n: −2·3, −2·3/2; −2·(−1)/2, 0
    assert predictions.grad.tolist() == [[-1.25, -1.25], [-1, -1]]  # −Σⱼ w Ĝ' / n: −2·(0.5 + 0.125); −2·1/2
    assert targets.grad.tolist() == [[1.25, 1.25], [1, 1]]
    assert gates.grad.tolist() == [-3.75, 1.0]  # Σⱼ w · dw: 0.5·(−6) + 0.25·(−3); 1·1


@pytest.mark.parametrize("score", ["idw", "dot"])
def test_lookup_gradcheck(score: str):
    queries, keys = make_lookup_inputs(3, 2, 5, 4, dtype=f64)
    queries, keys = queries.requires_grad_(), keys.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: product_key_lookup(q, k, 3, score=score)[0], (queries, keys))


def test_gather_gradcheck():
    values = torch.randn(6, 3, dtype=f64, requires_grad=True)
    weights = torch.randn(4, 2, dtype=f64, requires_grad=True)
    slots = torch.tensor([[0, 5], [5, 5], [1, 2], [2, 0]])
    assert torch.autograd.gradcheck(lambda v, w: sparse_value_gather(v, slots, w), (values, weights))


@pytest.mark.parametrize("clip", [None, 0.4])
@pytest.mark.parametrize("masked", [False, True])
def test_update_gradcheck(clip: float | None, masked: bool):
    generator = torch.Generator().manual_seed(3)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=f64).requires_grad_()

    slots = torch.tensor([[0, 5], [5, 5], [1, 2], [2, 0]])
    mask = torch.tensor([1.0, 0.5, 0.0, 2.0]) if masked else None
    tensors = (leaf(6, 3), leaf(4, 2), leaf(4, 3), leaf(4, 3), leaf(4), leaf(4))
    assert torch.autograd.gradcheck(
        lambda v, w, y, p, g, a: chunk_value_update(
            v, slots, w, y, p, gates=g, mask=mask, scale=a, lr=0.7, weight_decay=0.1, clip=clip
        ),
        tensors,
    )


def test_a_memory_without_tokens_is_as_it_was():
    queries, keys = make_lookup_inputs((2, 0), 1, 3, 4)
    values = torch.randn(9, 5)
    for boundary in ("carry", "drop"):
        outputs = reference.fast_weight_memory(
            queries, values.new_zeros(2, 0, 5), keys, values, top_k=2, weight_decay=0.1, boundary=boundary
        )
        assert outputs.output.shape == (2, 0, 5)
        assert outputs.slots.shape == outputs.weights.shape == (2, 0, 2)
        assert torch.equal(outputs.values, values)
        assert torch.equal(outputs.keys, keys)
