"""product_key_lookup: both backends, forward and backward, against the reference."""

import functools

import pytest
import torch
from torch.autograd import gradcheck

import reference
from fwpkm_kernels import ProductKeyLookup, product_key_lookup, testing
from fwpkm_kernels.records import Layout
from tests.conftest import SLOW_IN_INTERPRETER, Place

# rows, heads, n, K, Dk: odd sizes, one token, K = 1, K = n, halves of one column, more than one tile of sub-keys with a
# last tile narrower than K, K beyond 32.
SHAPES = [
    (5, 2, 21, 6, 14),
    (1, 1, 1, 1, 2),
    (3, 1, 7, 7, 10),
    (18, 1, 40, 1, 6),
    (4, 2, 130, 9, 70),
    (3, 1, 33, 32, 16),
    (2, 1, 300, 64, 4),
]
DTYPES = {  # queries, keys
    "float32": (torch.float32, torch.float32),
    "bfloat16-queries": (torch.bfloat16, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16-queries": (torch.float16, torch.float32),
    "float64": (torch.float64, torch.float64),
}


def check(inputs: testing.LookupInputs, top_k: int, place: Place, *, score="idw", cotangent="contiguous"):
    """Slots and scores inside their rounding band; gradients, with the picked slots held, inside the error budget."""
    options = {"top_k": top_k, "score": score}
    exact_scores, exact_slots = reference.product_key_lookup(*testing.as_float64(inputs), **options)
    grad = testing.random_cotangent(exact_scores.to(inputs.keys.dtype), layout=cotangent)
    run = {**inputs._asdict(), **options}
    with testing.poisoned_memory(), testing.assert_unchanged(inputs):
        (scores, slots), gradients = testing.forward_and_gradients(
            functools.partial(product_key_lookup, backend=place.backend),
            run,
            wrt=("queries", "keys"),
            cotangent=grad,
        )
    different = testing.assert_lookup_matches(
        scores, slots, *inputs, exact_slots, score=score, precision="tf32x3" if place.device == "cuda" else "ieee"
    )
    assert different == 0  # fixed seeds, and no near ties among them
    compare = functools.partial(testing.forward_and_gradients, reference.product_key_lookup, wrt=("queries", "keys"))
    _, exact = compare(testing.as_float64(run), cotangent=grad.double())
    _, baseline = compare(run, cotangent=grad)
    for name, gradient in gradients.items():
        testing.assert_within_budget(
            gradient, exact[name], baseline[name], name=name, reduction_length=max(inputs.queries.shape)
        )


@pytest.mark.parametrize("score", ["idw", "dot"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, score, place):
    rows, heads, n, top_k, width = shape
    check(testing.make_lookup_inputs(rows, heads, n, width, device=place.device), top_k, place, score=score)


REAL_SHAPES = [(2, 1, 4096, 64, 32), (2, 1, 4096, 8, 32), (20, 1, 512, 8, 512)]


@pytest.mark.parametrize("score", ["idw", "dot"])
@pytest.mark.parametrize("shape", [pytest.param(s, marks=SLOW_IN_INTERPRETER, id=str(s)) for s in REAL_SHAPES])
def test_matches_reference_at_real_sizes(shape, score, place):
    rows, heads, n, top_k, width = shape
    check(testing.make_lookup_inputs(rows, heads, n, width, device=place.device), top_k, place, score=score)


@pytest.mark.parametrize("dtypes", DTYPES)
def test_dtypes(dtypes, place):
    queries, keys = DTYPES[dtypes]
    inputs = testing.make_lookup_inputs(5, 2, 21, 14, dtype=queries, keys_dtype=keys, device=place.device)
    check(inputs, 6, place)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "strided", "expanded"])
def test_strides_of_inputs_and_of_incoming_gradients(layout, place):
    inputs = testing.make_lookup_inputs((2, 3), 2, 21, 14, device=place.device, layout=layout)
    check(inputs, 6, place, cotangent=layout)


def test_near_keys(place):
    inputs = testing.make_lookup_inputs(6, 1, 24, 32, key_pattern="near", device=place.device)
    scores, slots = product_key_lookup(*inputs, 4, backend=place.backend)
    _, exact = reference.product_key_lookup(*testing.as_float64(inputs), 4)
    testing.assert_lookup_matches(scores, slots, *inputs, exact, precision="tf32x3")


def test_scores_beside_a_sub_key(place):
    """By the difference q - k: |q|² - 2 q·k + |k|² would have lost every digit of most distances."""
    queries, keys = testing.make_lookup_inputs(8, 1, 40, 32, device=place.device)
    queries[::2] = keys[0, :, :4].transpose(0, 1).flatten(1).unsqueeze(1) + 1e-4 * queries[::2]  # the others are far
    options = {"top_k": 3, "eps": 1e-6}
    scores, slots = product_key_lookup(queries, keys, backend=place.backend, **options)
    exact, exact_slots = reference.product_key_lookup(*testing.as_float64((queries, keys)), **options)
    testing.assert_bitwise_equal(slots, exact_slots, "slots")
    torch.testing.assert_close(scores.double(), exact, rtol=3e-6, atol=0.0)


@pytest.mark.parametrize("score", ["idw", "dot"])
@pytest.mark.parametrize(
    "shape, precision",
    [
        *(((20, 2, 21, 6, 14), precision) for precision in ("ieee", "tf32x3", "tf32")),
        ((9, 1, 150, 16, 6), "tf32x3"),
        ((4, 1, 9, 9, 8), "tf32x3"),
    ],
    ids=str,
)
def test_exact_ties_go_to_the_lowest_index(shape, precision, score, place):
    rows, heads, n, top_k, width = shape
    inputs = testing.make_lookup_inputs(rows, heads, n, width, key_pattern="equal", device=place.device)
    _, slots = product_key_lookup(*inputs, top_k, score=score, precision=precision, backend=place.backend)
    _, expected = reference.product_key_lookup(*testing.as_float64(inputs), top_k, score=score)
    testing.assert_bitwise_equal(slots, expected, "slots")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("half", [1, 5, 16, 64])
def test_equal_sub_keys_at_any_columns(half, dtype):
    """Those that a matrix product rounds differently, at the edge of a tile, tie too."""
    generator = torch.Generator().manual_seed(0)
    for n in range(5, 49):
        queries, keys = testing.make_lookup_inputs(33, 1, n, 2 * half, dtype=dtype, keys_dtype=dtype)
        lower, higher = torch.randperm(n, generator=generator)[: n // 2 * 2].view(2, -1).sort(0).values
        keys[:, :, higher] = keys[:, :, lower]
        twin = torch.arange(n)
        twin[higher] = lower
        _, slots = product_key_lookup(queries, keys, 1, backend="torch")
        for winner in (slots // n, slots % n):
            testing.assert_bitwise_equal(twin[winner], winner, f"winners of {n}, the lower of equals")


def test_all_keys_equal(place):
    queries = torch.ones(2, 1, 4, device=place.device)
    _, slots = product_key_lookup(queries, torch.ones(1, 2, 200, 2, device=place.device), 5, backend=place.backend)
    # (0, 0) then (0, 1), (0, 2), ... : the lower pair position among equal sums
    assert slots.tolist() == [[[0, 1, 2, 3, 4]]] * 2


def test_zero_ties_with_minus_zero(place):
    # With eps = 1/2 and a query of 0: -log(1/2 + 1/2) is -0.0, the others are log 2 and -log 2, whose sum is 0.0.
    near, at_one, far = (0.0, 0.0, 0.0), (0.5, 0.5, 0.0), (1.0, 0.5, 0.5)
    keys = torch.tensor([[[far, at_one], [at_one, near]]], device=place.device)
    queries = torch.zeros(1, 1, 6, device=place.device)
    scores, slots = product_key_lookup(queries, keys, 2, eps=0.5, backend=place.backend)
    assert scores[0, 0, 1] == 0.0
    # Second is the pair (0, 1) of -0.0 and -0.0, at a lower position than (1, 0) of -log 2 and log 2.
    assert slots.tolist() == [[[1 * 2 + 1, 1 * 2 + 0]]]


@pytest.mark.parametrize("idw", [True, False])
def test_tiles_change_no_bits(idw, triton_place):
    """Those of as many columns at a time, that is; the others may change the last ones, and no slots."""
    from fwpkm_kernels.kernels.lookup import LookupConfig, lookup

    inputs = testing.make_lookup_inputs(18, 1, 70, 70, device=triton_place.device)
    options = {"top_k": 5, "idw": idw, "eps": 1e-3, "precision": "tf32x3"}
    expected = lookup(*inputs, **options, config=LookupConfig(64, 32, 32, 4))
    for config in (LookupConfig(16, 16, 32, 4), LookupConfig(128, 64, 32, 8), LookupConfig(16, 128, 32, 4)):
        for actual, one in zip(lookup(*inputs, **options, config=config), expected, strict=True):
            testing.assert_bitwise_equal(actual, one, str(config))
    _, slots, _, _ = lookup(*inputs, **options, config=LookupConfig(16, 16, 16, 4))
    testing.assert_bitwise_equal(slots, expected[1], "slots")


@pytest.mark.parametrize("idw", [True, False])
def test_few_rows_have_tiles_of_their_own_and_the_same_bits(idw, triton_place, monkeypatch):
    from fwpkm_kernels.kernels import lookup

    queries, keys = testing.make_lookup_inputs(20, 1, 70, 70, device=triton_place.device)
    options = {"top_k": 5, "idw": idw, "eps": 1e-3, "precision": "tf32x3"}
    few, result = lookup.lookup_config(20, keys, 5), lookup.lookup(queries, keys, **options)
    monkeypatch.setattr(lookup, "FEW_ROWS", 0)
    many = lookup.lookup_config(20, keys, 5)
    assert (few.block_m, few.block_n, few.block_d) == (many.block_m // 2, many.block_n // 2, many.block_d)
    for name, actual, expected in zip(
        ("scores", "slots", "half scores", "sub-keys"), result, lookup.lookup(queries, keys, **options), strict=True
    ):
        testing.assert_bitwise_equal(actual, expected, name)


def test_only_sub_keys_in_consecutive_columns_have_tiles_for_few_rows(monkeypatch):
    """Of others |k|² would be summed in an order that depends on the tile."""
    pytest.importorskip("triton")
    from fwpkm_kernels.kernels import lookup

    keys = torch.empty(1, 2, 512, 256)
    assert lookup.lookup_config(1, keys, 8) != lookup.lookup_config(2000, keys, 8)
    strided = torch.empty(1, 2, 256, 512).mT
    assert lookup.lookup_config(1, strided, 8) == lookup.lookup_config(2000, strided, 8)
    # So do they not where the candidates of narrow tiles would take another number of warps.
    many = torch.empty(1, 2, 4096, 256)
    assert lookup.lookup_config(1, many, 8) == lookup.lookup_config(2000, many, 8)


@pytest.mark.parametrize(
    "top_k, weighting",
    [(1, "silu"), (3, "softmax"), (3, "relu"), pytest.param(8, "softmax", marks=SLOW_IN_INTERPRETER)],
)
def test_weights_of_the_picks(top_k, weighting, triton_place, monkeypatch):
    """They are those of `kernels.weights.weigh`, and change nothing else."""
    from fwpkm_kernels.kernels import lookup
    from fwpkm_kernels.kernels.weights import weigh

    inputs = testing.make_lookup_inputs(70, 1, 20, 6, device=triton_place.device)
    options = {"top_k": top_k, "idw": False, "eps": 1e-3, "precision": "tf32x3"}
    how = {"weighting": weighting, "temperature": 0.7}
    expected = lookup.lookup(*inputs, **options)
    scores, slots = (x[:, 0] for x in expected[:2])
    expected_weights, _ = weigh(scores, slots, 400, torch.int32, Layout(1, 70, 70, 0, 0, 0, 1, 70), **how)
    weights = torch.full((70, 1, top_k), torch.nan, device=triton_place.device)
    monkeypatch.setattr(lookup, "CANDIDATE_BYTES", 1)  # in slabs
    for actual, one in zip(lookup.lookup(*inputs, **options, weights=weights, **how), expected, strict=True):
        testing.assert_bitwise_equal(actual, one)
    if triton_place.device == "cpu":
        testing.assert_bitwise_equal(weights[:, 0], expected_weights, "weights")
    else:  # the sum over the picks of a row may have another order
        torch.testing.assert_close(weights[:, 0], expected_weights, rtol=1e-6, atol=1e-7)


def test_rows_in_slabs(triton_place, monkeypatch):
    """Candidates that would not fit the cache are made and merged some rows at a time; nothing else changes."""
    from fwpkm_kernels.kernels import lookup

    inputs = testing.make_lookup_inputs(70, 1, 20, 6, device=triton_place.device)
    options = {"top_k": 4, "idw": True, "eps": 1e-3, "precision": "tf32x3"}
    expected = lookup.lookup(*inputs, **options)
    monkeypatch.setattr(lookup, "CANDIDATE_BYTES", 1)
    for name, actual, whole in zip(
        ("scores", "slots", "half scores", "sub-keys"), lookup.lookup(*inputs, **options), expected, strict=True
    ):
        testing.assert_bitwise_equal(actual, whole, name)


def test_a_token_does_not_depend_on_its_batch(triton_place):
    """Only with Triton: a BLAS may choose another algorithm for another batch."""
    queries, keys = testing.make_lookup_inputs(37, 2, 40, 16, device=triton_place.device)
    scores, slots = product_key_lookup(queries, keys, 5, backend="triton")
    one_scores, one_slots = product_key_lookup(queries[20:21], keys, 5, backend="triton")
    testing.assert_bitwise_equal(one_scores, scores[20:21], "scores")
    testing.assert_bitwise_equal(one_slots, slots[20:21], "slots")


def test_nan_stays_in_its_row(place):
    queries, keys = testing.make_lookup_inputs(6, 1, 21, 8, device=place.device)
    expected, expected_slots = product_key_lookup(queries, keys, 4, backend=place.backend)
    queries[2, 0, 1] = torch.nan  # the first half
    scores, slots = product_key_lookup(queries, keys, 4, backend=place.backend)
    others = torch.arange(6, device=place.device) != 2
    testing.assert_bitwise_equal(scores[others], expected[others], "scores")
    testing.assert_bitwise_equal(slots[others], expected_slots[others], "slots")
    assert scores[2].isnan().all()
    reference_slots = reference.product_key_lookup(queries, keys, 4)[1]
    testing.assert_bitwise_equal(slots[2], reference_slots[2], "slots of the NaN row")


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_infinite_queries_beside_infinite_sub_keys(value, sign, place):
    """Of equal infinities the difference is NaN, which is the largest; of others it is infinite."""
    queries, keys = testing.make_lookup_inputs(3, 1, 7, 8, device=place.device)
    queries[1, 0, 1], keys[0, 0, 2, 1] = value, sign * value
    scores, slots = product_key_lookup(queries, keys, 3, backend=place.backend)
    expected_scores, expected = reference.product_key_lookup(queries, keys, 3)
    testing.assert_bitwise_equal(slots, expected, "slots")
    torch.testing.assert_close(scores, expected_scores, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_infinite_dots_are_no_nan(value, place):
    """Though infinity times the rest of a number that tf32 holds, which is 0, is one."""
    queries, keys = torch.ones(1, 1, 4, device=place.device), torch.ones(1, 2, 6, 2, device=place.device)
    queries[0, 0, 1], keys[0, 0, 2] = value, -2.0
    scores, slots = product_key_lookup(queries, keys, 2, score="dot", backend=place.backend)
    _, expected = reference.product_key_lookup(queries, keys, 2, score="dot")
    assert scores.tolist() == [[[torch.inf] * 2]]
    testing.assert_bitwise_equal(slots, expected, "slots")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_an_infinite_dot_with_numbers_that_round_up(dtype, place):
    """Whose rest has the other sign: infinity times that is minus infinity."""
    queries = torch.ones(1, 1, 4, dtype=dtype, device=place.device)
    keys = torch.ones(1, 2, 6, 2, device=place.device)
    queries[0, 0, 1], keys[:] = torch.inf, 1.0 + 0.75 * 2**-10
    scores, slots = product_key_lookup(queries, keys, 2, score="dot", backend=place.backend)
    assert scores.tolist() == [[[torch.inf] * 2]]
    assert slots.tolist() == [[[0, 1]]]


@pytest.mark.parametrize("score", ["idw", "dot"])
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, -1], ids=hex)
def test_every_nan_is_nan(bits, score, place):
    """Also the one that GPUs make, whose bits a rounding turns to those of 0."""
    queries, keys = testing.make_lookup_inputs(2, 1, 6, 4, device=place.device)
    queries.view(torch.int32)[0, 0, 1] = bits
    scores, slots = product_key_lookup(queries, keys, 2, score=score, backend=place.backend)
    assert scores[0].isnan().all()
    assert (slots[0] // 6).tolist() == [[0, 0]] or (slots[0] // 6).tolist() == [[0, 1]]
    others = product_key_lookup(queries[1:], keys, 2, score=score, backend=place.backend)
    testing.assert_bitwise_equal(scores[1:], others[0], "scores of the other query")


def test_only_winners_get_gradients(place):
    queries, keys = testing.make_lookup_inputs(2, 1, 30, 8, device=place.device)
    keys.requires_grad_()
    scores, slots = product_key_lookup(queries, keys, 3, backend=place.backend)
    scores.sum().backward()
    touched = keys.grad.abs().sum(-1)[0] > 0
    expected = torch.zeros_like(touched)
    expected[0, slots.flatten() // 30] = True
    expected[1, slots.flatten() % 30] = True
    assert torch.equal(touched, expected)


@pytest.mark.parametrize("wrt", ["queries", "keys"])
def test_gradient_of_one_input_only(wrt, place):
    inputs = testing.make_lookup_inputs(3, 1, 20, 8, device=place.device)._asdict()
    run = functools.partial(product_key_lookup, top_k=3, backend=place.backend)
    _, both = testing.forward_and_gradients(run, inputs, wrt=("queries", "keys"))
    _, one = testing.forward_and_gradients(run, inputs, wrt=(wrt,))
    testing.assert_bitwise_equal(one[wrt], both[wrt], wrt)


@pytest.mark.parametrize(("rows", "heads"), [((2, 0), 3), ((2, 4), 0)], ids=["no tokens", "no heads"])
def test_empty(rows, heads, place):
    queries, keys = testing.make_lookup_inputs(rows, heads, 9, 8, device=place.device)
    queries.requires_grad_(), keys.requires_grad_()
    scores, slots = product_key_lookup(queries, keys, 4, backend=place.backend)
    assert scores.shape == slots.shape == (*rows, heads, 4)
    scores.sum().backward()
    assert queries.grad.shape == queries.shape
    assert keys.grad.count_nonzero() == 0


@pytest.mark.parametrize("score", ["idw", "dot"])
def test_gradcheck(score):
    inputs = testing.make_lookup_inputs(3, 2, 6, 6, dtype=torch.float64)
    assert gradcheck(lambda q, k: ProductKeyLookup.apply(q, k, 3, score)[0], [x.requires_grad_() for x in inputs])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(512, 1, 512, 8, 512), (128, 4, 512, 32, 512), (64, 1, 4096, 64, 512)], ids=str)
@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
def test_real_sizes_on_a_gpu(shape, precision):
    rows, heads, n, top_k, width = shape
    inputs = testing.make_lookup_inputs(rows, heads, n, width, device="cuda")
    scores, slots = product_key_lookup(*inputs, top_k, precision=precision)
    _, exact = reference.product_key_lookup(*testing.as_float64(inputs), top_k)
    testing.assert_lookup_matches(scores, slots, *inputs, exact, precision=precision, max_different=0.01)
