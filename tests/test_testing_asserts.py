"""The asserts of fwpkm_kernels.testing pass on right results and fail on planted faults."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import reference
from fwpkm_kernels import testing
from tests.helpers.lookup import expanded_lookup

f64 = torch.float64
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", FLOATS)
def test_bitwise_equal(dtype: torch.dtype):
    tensor = torch.tensor([[1.0, torch.nan], [0.0, -torch.inf]], dtype=dtype)
    testing.assert_bitwise_equal(tensor, tensor.clone())
    testing.assert_bitwise_equal(tensor.mT, tensor.mT.contiguous())
    for where, value in [((0, 0), 1 + torch.finfo(dtype).eps), ((0, 1), 0.0), ((1, 0), -0.0), ((1, 1), torch.inf)]:
        other = tensor.clone()
        other[where] = value
        with pytest.raises(AssertionError, match=rf"out: 1 of 4 .*\n +\({where[0]}, {where[1]}\)"):
            testing.assert_bitwise_equal(other, tensor, "out")


def test_bitwise_equal_compares_shape_and_dtype():
    with pytest.raises(AssertionError, match="dtype"):
        testing.assert_bitwise_equal(torch.ones(2), torch.ones(2, dtype=f64))
    with pytest.raises(AssertionError, match="shape"):
        testing.assert_bitwise_equal(torch.ones(2), torch.ones(2, 1))
    with pytest.raises(AssertionError, match="1 of 2"):
        testing.assert_bitwise_equal(torch.tensor([1, 2]), torch.tensor([1, 3]))


def test_untouched_rows():
    before = torch.full((4, 3), torch.nan)
    after = before.clone()
    after[1] = 0
    testing.assert_untouched_rows_equal(before, after, torch.tensor([[1], [1]]))
    testing.assert_untouched_rows_equal(before, before.clone(), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(AssertionError, match=r"1 of 3 untouched rows changed, first rows \[1\]"):
        testing.assert_untouched_rows_equal(before, after, torch.tensor([0]))
    signed = torch.zeros(2, 1)
    with pytest.raises(AssertionError, match="changed"):
        testing.assert_untouched_rows_equal(signed, -signed, torch.tensor([0]))


def test_deterministic():
    tensor = torch.ones(3)
    testing.assert_deterministic(lambda: {"a": tensor, "b": [tensor, None]})
    calls: list[int] = []

    def drifts() -> tuple[Tensor, Tensor]:
        calls.append(1)
        return tensor, tensor * (1 + len(calls) * 2**-23)

    with pytest.raises(AssertionError, match="tensor 1 of run 1"):
        testing.assert_deterministic(drifts)


def test_unchanged():
    inputs = testing.make_gather_inputs()
    with testing.assert_unchanged(inputs):
        inputs.values.clone().zero_()
    with pytest.raises(AssertionError, match="input 0"), testing.assert_unchanged(inputs):
        inputs.values[3, 3] = 0


@pytest.mark.parametrize("dtype", FLOATS)
def test_poisoned_memory(dtype: torch.dtype):
    like = torch.ones(3, dtype=dtype)
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    with testing.poisoned_memory():
        for tensor in (
            torch.empty(3, dtype=dtype),
            torch.empty_like(like),
            like.new_empty(3),
            torch.empty_strided((3,), (2,), dtype=dtype),
            like.new_empty_strided((3,), (1,)),
        ):
            assert tensor.isnan().all()
        assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
    assert before == (torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory)


def test_poisoned_memory_restores_what_was_set():
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="inside"), testing.poisoned_memory():
            raise RuntimeError("inside")
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def product(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """actual, exact and baseline of a matrix product; actual adds in another order."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(40, 40, generator=generator, dtype=f64).to(dtype) for _ in range(2))
    compute = torch.promote_types(dtype, torch.float32)
    exact, a, b = a.double() @ b.double(), a.to(compute), b.to(compute)
    return (a.flip(1) @ b.flip(0)).to(dtype), exact, (a @ b).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("magnitude", [2.0**-9, 1.0, 2.0**9])
def test_budget_is_kept_at_any_magnitude(dtype: torch.dtype, magnitude: float):
    actual, exact, baseline = (t * magnitude for t in product(dtype))
    testing.assert_within_budget(actual, exact, baseline, name="product", reduction_length=40)


@pytest.mark.parametrize("dtype", FLOATS)
def test_budget_sees_a_single_wrong_element(dtype: torch.dtype):
    actual, exact, baseline = product(dtype)
    actual[3, 5] += 200 * torch.finfo(dtype).eps * exact.square().mean().sqrt()
    with pytest.raises(AssertionError, match=r"product: error over budget[\s\S]*worst at\n +\(3, 5\): actual"):
        testing.assert_within_budget(actual, exact, baseline, name="product", reduction_length=40)


@pytest.mark.parametrize("dtype", FLOATS)
def test_budget_sees_a_small_error_everywhere(dtype: torch.dtype):
    actual, exact, baseline = product(dtype)
    scale = 1 + 16 * torch.finfo(dtype).eps
    with pytest.raises(AssertionError, match="over budget"):
        testing.assert_within_budget(actual * scale, exact, baseline, name="product")


def test_budget_sees_a_product_in_lower_precision():
    _, exact, baseline = product(torch.float32)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(40, 40, generator=generator, dtype=f64).float() for _ in range(2))
    rough = a.to(torch.bfloat16).float() @ b.to(torch.bfloat16).float()
    with pytest.raises(AssertionError, match="over budget"):
        testing.assert_within_budget(rough, exact, baseline, name="product", reduction_length=40)


@pytest.mark.parametrize("dtype", FLOATS)
def test_budget_allows_rounding_where_the_baseline_is_exact_by_luck(dtype: torch.dtype):
    exact = torch.tensor([1.0, 2.0, 100.0], dtype=f64)
    baseline = exact.to(dtype)
    eps = torch.finfo(dtype).eps
    testing.assert_within_budget(baseline * (1 + eps), exact, baseline, name="sum")
    with pytest.raises(AssertionError, match="over budget"):
        testing.assert_within_budget(baseline * (1 + 16 * eps), exact, baseline, name="sum")


def test_budget_of_an_all_zero_result_is_zero_unless_a_scale_is_given():
    zero = torch.zeros(4, dtype=f64)
    tiny = torch.tensor([0, 0, 1e-8, 0])
    testing.assert_within_budget(zero.float(), zero, zero.float(), name="gradient")
    testing.assert_within_budget(tiny, zero, tiny, name="gradient")
    testing.assert_within_budget(tiny, zero, zero.float(), name="gradient", scale=1.0)
    with pytest.raises(AssertionError, match="over budget"):
        testing.assert_within_budget(tiny, zero, zero.float(), name="gradient")


@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
def test_budget_wants_nan_and_infinity_in_their_places(special: float):
    exact = torch.tensor([1.0, 2.0, 3.0], dtype=f64)
    finite = exact.float()
    marked = torch.tensor([1.0, special, 3.0])
    testing.assert_within_budget(marked, marked.double(), marked, name="out")
    wrong: list[tuple[Tensor, Tensor, Tensor]] = [
        (marked, exact, finite),
        (finite, marked.double(), marked),
        (-marked if special == special else -marked.abs() * torch.inf, marked.double(), marked),
    ]
    for actual, expected, baseline in wrong:
        with pytest.raises(AssertionError, match=r"NaN or infinite|baseline"):
            testing.assert_within_budget(actual, expected, baseline, name="out")
    with pytest.raises(AssertionError, match="baseline is not finite"):
        testing.assert_within_budget(finite, exact, marked, name="out")


def test_budget_judges_the_rest_beside_a_nan():
    exact = torch.tensor([1.0, torch.nan, 3.0], dtype=f64)
    with pytest.raises(AssertionError, match="over budget"):
        testing.assert_within_budget(torch.tensor([1.0, torch.nan, 3.001]), exact, exact.float(), name="out")


def test_budget_accepts_overflow_of_the_dtype():
    exact = torch.tensor([1.0, 1e6], dtype=f64)
    testing.assert_within_budget(exact.half(), exact, exact.half(), name="out")
    assert exact.half().isinf().any()


def test_budget_compares_shapes_and_dtypes():
    exact = torch.ones(3, dtype=f64)
    with pytest.raises(AssertionError, match="`exact` must be float64"):
        testing.assert_within_budget(exact.float(), exact.float(), exact.float(), name="out")
    with pytest.raises(AssertionError, match="dtype"):
        testing.assert_within_budget(exact.half(), exact, exact.float(), name="out")
    with pytest.raises(AssertionError, match="shape"):
        testing.assert_within_budget(exact.float()[:2], exact, exact.float(), name="out")
    testing.assert_within_budget(torch.ones(0), exact[:0], torch.ones(0), name="out")


Fault = Callable[[Tensor, Tensor], None]


def lookup(**options) -> tuple[testing.LookupInputs, Tensor, Tensor, Tensor]:
    inputs = testing.make_lookup_inputs(30, 2, 16, 20, **options)
    scores, slots = reference.product_key_lookup(*inputs, 4)
    _, exact_slots = reference.product_key_lookup(*testing.as_float64(inputs), 4)
    return inputs, scores, slots, exact_slots


@pytest.mark.parametrize("key_pattern", testing.KEY_PATTERNS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("score", ["idw", "dot"])
def test_lookup_assert_accepts_the_reference(key_pattern: str, dtype: torch.dtype, score: str):
    inputs = testing.make_lookup_inputs((5, 6), 2, 16, 20, key_pattern=key_pattern, dtype=dtype)
    scores, slots = reference.product_key_lookup(*inputs, 4, score=score)
    _, exact_slots = reference.product_key_lookup(*testing.as_float64(inputs), 4, score=score)
    different = testing.assert_lookup_matches(scores, slots, *inputs, exact_slots, score=score)
    assert different <= 6


def test_lookup_assert_accepts_cancellation_and_counts_it():
    inputs, _, _, exact_slots = lookup(key_pattern="near")
    scores, slots = expanded_lookup(inputs, 4)
    different = testing.assert_lookup_matches(scores, slots, *inputs, exact_slots)
    assert different == int((slots != exact_slots).any(-1).sum()) > 0
    with pytest.raises(AssertionError, match="other slots, at most"):
        testing.assert_lookup_matches(scores, slots, *inputs, exact_slots, max_different=0.01)
    # the same scores are too far off in float64
    float64 = testing.as_float64(inputs)
    with pytest.raises(AssertionError, match="rounding band"):
        testing.assert_lookup_matches(scores.double(), slots, *float64, exact_slots)


def test_lookup_assert_accepts_tf32_only_as_tf32():
    inputs = testing.make_lookup_inputs(300, 2, 64, 64, seed=5)
    _, exact_slots = reference.product_key_lookup(*testing.as_float64(inputs), 8)
    # The multiplier keeps 10 of 23 bits; norms stay in float32.
    rounded = [((t.view(torch.int32) + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32) for t in inputs]
    scores, slots = expanded_lookup(inputs, 8, factors=testing.LookupInputs(*rounded))
    assert testing.assert_lookup_matches(scores, slots, *inputs, exact_slots, precision="tf32") > 0
    with pytest.raises(AssertionError, match="rounding band"):
        testing.assert_lookup_matches(scores, slots, *inputs, exact_slots, precision="tf32x3")


def test_lookup_assert_accepts_a_near_tie():
    # Sub-keys 0 and 1 are as good as equal: float32 may take either.
    keys = torch.tensor([[[[1.0], [1.0 + 2**-23], [5.0]], [[1.0], [7.0], [5.0]]]])
    queries = torch.zeros(1, 1, 2)
    exact_slots = torch.tensor([[[0, 3]]])
    swapped = exact_slots.flip(-1)
    scores = -2 * torch.log(torch.full((1, 1, 2), 1.001))
    assert testing.assert_lookup_matches(scores, exact_slots, queries, keys, exact_slots) == 0
    assert testing.assert_lookup_matches(scores, swapped, queries, keys, exact_slots) == 1
    # float64 tells them apart
    inputs = queries.double(), keys.double()
    scores, _ = reference.product_key_lookup(*inputs, 2)
    with pytest.raises(AssertionError, match="rounding band"):
        testing.assert_lookup_matches(scores, swapped, *inputs, exact_slots)


def swap(scores: Tensor, slots: Tensor) -> None:
    slots[7, 1, :2] = slots[7, 1, :2].flip(0)


def miss_with_right_score(scores: Tensor, slots: Tensor) -> None:
    """Leave out the best slot, with everything else as it should be then."""
    inputs = testing.make_lookup_inputs(30, 2, 16, 20)
    longer_scores, longer_slots = reference.product_key_lookup(*inputs, 5)
    scores[7, 1], slots[7, 1] = longer_scores[7, 1, 1:], longer_slots[7, 1, 1:]


def miss_the_last(scores: Tensor, slots: Tensor) -> None:
    inputs = testing.make_lookup_inputs(30, 2, 16, 20)
    longer_scores, longer_slots = reference.product_key_lookup(*inputs, 6)
    scores[7, 1, 3], slots[7, 1, 3] = longer_scores[7, 1, 5], longer_slots[7, 1, 5]


def repeat(scores: Tensor, slots: Tensor) -> None:
    slots[7, 1, 2] = slots[7, 1, 1]
    scores[7, 1, 2] = scores[7, 1, 1]


def out_of_range(scores: Tensor, slots: Tensor) -> None:
    slots[7, 1, 2] = 256


def negative(scores: Tensor, slots: Tensor) -> None:
    slots[7, 1, 2] = -1


def wrong_score(scores: Tensor, slots: Tensor) -> None:
    scores[7, 1, 0] += 1e-4


def nan_score(scores: Tensor, slots: Tensor) -> None:
    scores[7, 1, 3] = torch.nan


def other_half(scores: Tensor, slots: Tensor) -> None:
    slots[7, 1] = slots[7, 1] % 16 * 16 + slots[7, 1] // 16


def other_row(scores: Tensor, slots: Tensor) -> None:
    scores[7], slots[7] = scores[8].clone(), slots[8].clone()


def other_head(scores: Tensor, slots: Tensor) -> None:
    scores[7], slots[7] = scores[7].flip(0), slots[7].flip(0)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (swap, "rounding band"),
        (miss_with_right_score, "a better slot was missed"),
        (miss_the_last, "a better slot was missed"),
        (repeat, "repeats"),
        (out_of_range, "outside"),
        (negative, "outside"),
        (wrong_score, "rounding band"),
        (nan_score, "rounding band"),
        (other_half, "rounding band"),
        (other_row, "rounding band"),
        (other_head, "rounding band"),
    ],
)
def test_lookup_assert_sees(fault: Fault, message: str):
    inputs, scores, slots, exact_slots = lookup()
    fault(scores, slots)
    with pytest.raises(AssertionError, match=message):
        testing.assert_lookup_matches(scores, slots, *inputs, exact_slots)


def test_lookup_assert_sees_ascending_scores():
    inputs, scores, slots, exact_slots = lookup()
    with pytest.raises(AssertionError, match="ascend"):
        testing.assert_lookup_matches(scores.flip(-1), slots.flip(-1), *inputs, exact_slots)


def test_lookup_assert_compares_shapes_and_dtypes():
    inputs, scores, slots, exact_slots = lookup()
    with pytest.raises(AssertionError, match="scores have shape"):
        testing.assert_lookup_matches(scores[:-1], slots, *inputs, exact_slots)
    with pytest.raises(AssertionError, match="slots have shape"):
        testing.assert_lookup_matches(scores, slots[..., :3], *inputs, exact_slots)
    with pytest.raises(AssertionError, match=r"slots are torch\.int32"):
        testing.assert_lookup_matches(scores, slots.int(), *inputs, exact_slots)
    with pytest.raises(AssertionError, match=r"scores are torch\.float64"):
        testing.assert_lookup_matches(scores.double(), slots, *inputs, exact_slots)


def test_lookup_assert_with_nan_queries():
    inputs, _, _, _ = lookup()
    inputs.queries[7, 1, 3] = torch.nan
    scores, slots = reference.product_key_lookup(*inputs, 4)
    _, exact_slots = reference.product_key_lookup(*testing.as_float64(inputs), 4)
    assert scores[7, 1].isnan().all()
    assert testing.assert_lookup_matches(scores, slots, *inputs, exact_slots) == 0
    wrong = scores.clone()
    wrong[7, 1] = 0
    with pytest.raises(AssertionError, match="NaN or infinite scores differ"):
        testing.assert_lookup_matches(wrong, slots, *inputs, exact_slots)
    slots[7, 1, 0] += 16
    with pytest.raises(AssertionError, match="other slots beside NaN"):
        testing.assert_lookup_matches(scores, slots, *inputs, exact_slots)


def update_case(**options) -> dict:
    inputs = testing.make_update_inputs(12, 3, 20, 5, gates=True, mask="real", **options)
    return {**inputs._asdict(), "lr": 0.5, "clip": 0.3}


WRT = ("values", "weights", "targets", "predictions", "gates")


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_matches_reference_accepts_another_order_of_summation(layout: str, dtype: torch.dtype):
    def flipped(slots: Tensor, weights: Tensor, **rest) -> Tensor:
        return reference.chunk_value_update(slots=slots.flip(1), weights=weights.flip(1), **rest)

    case = update_case(dtype=dtype, layout=layout)
    cotangent = testing.random_cotangent(case["values"], layout=layout)
    testing.assert_matches_reference(
        flipped, reference.chunk_value_update, case, wrt=WRT, cotangent=cotangent, reduction_length=3
    )


def test_matches_reference_sees_a_wrong_output():
    def unmasked(mask: Tensor, **rest) -> Tensor:
        return reference.chunk_value_update(**rest)

    with pytest.raises(AssertionError, match="update: output 0"):
        testing.assert_matches_reference(unmasked, reference.chunk_value_update, update_case(), name="update")


@pytest.mark.parametrize("name", WRT)
def test_matches_reference_sees_a_wrong_gradient(name: str):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor: Tensor) -> Tensor:
            return tensor.clone()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:
            return gradient * 1.0001

    def function(**inputs) -> Tensor:
        return reference.chunk_value_update(**{**inputs, name: Wrong.apply(inputs[name])})

    with pytest.raises(AssertionError, match=f"gradient of {name}"):
        testing.assert_matches_reference(function, reference.chunk_value_update, update_case(), wrt=WRT)


def test_matches_reference_compares_integer_outputs():
    case = {**testing.make_lookup_inputs()._asdict(), "top_k": 3}
    wrt = ("queries", "keys")
    testing.assert_matches_reference(reference.product_key_lookup, reference.product_key_lookup, case, wrt=wrt)

    def wrong(**inputs) -> tuple[Tensor, Tensor]:
        scores, slots = reference.product_key_lookup(**inputs)
        return scores, slots + 1

    with pytest.raises(AssertionError, match="output 1"):
        testing.assert_matches_reference(wrong, reference.product_key_lookup, case, wrt=wrt)


def test_forward_and_gradients_sends_strides_through():
    seen: list[Tensor] = []

    class Record(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor: Tensor) -> Tensor:
            seen.append(tensor)
            return tensor.clone()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:
            seen.append(gradient)
            return gradient

    tensor = testing.with_layout(torch.randn(3, 4), "transposed")
    testing.forward_and_gradients(lambda tensor: Record.apply(tensor), {"tensor": tensor}, wrt=["tensor"])
    cotangent = testing.random_cotangent(tensor, layout="strided")
    testing.forward_and_gradients(
        lambda tensor: Record.apply(tensor), {"tensor": tensor}, wrt=["tensor"], cotangent=cotangent
    )
    assert [t.stride() for t in seen] == [(1, 3), (0, 0), (1, 3), (9, 2)]


def test_slots_without_scores_are_judged_by_the_band():
    queries, keys = testing.make_lookup_inputs(5, 1, 12, 8)
    _, exact = reference.product_key_lookup(queries.double(), keys.double(), 4)
    assert testing.assert_lookup_matches(None, exact, queries, keys, exact) == 0
    with pytest.raises(AssertionError, match="a better slot comes later in 5 of 5 rows"):
        testing.assert_lookup_matches(None, exact.flip(-1), queries, keys, exact)
    missed = exact.clone()
    missed[0, 0, 3] = reference.product_key_lookup(queries.double(), keys.double(), 12)[1][0, 0, 11]
    with pytest.raises(AssertionError, match="a better slot was missed in 1 of 5 rows"):
        testing.assert_lookup_matches(None, missed, queries, keys, exact)


def test_products_below_the_smallest_normal_number_may_be_zero():
    queries, keys = testing.make_lookup_inputs(3, 1, 6, 4)
    queries, keys = queries * 1e-30, keys * 1e-30
    _, exact = reference.product_key_lookup(queries.double(), keys.double(), 2, score="dot")
    testing.assert_lookup_matches(torch.zeros(3, 1, 2), exact, queries, keys, exact, score="dot")
    with pytest.raises(AssertionError, match="rounding band"):
        testing.assert_lookup_matches(torch.full((3, 1, 2), 1e-36), exact, queries, keys, exact, score="dot")
