"""The inputs of fwpkm_kernels.testing are what their options say."""

import pytest
import torch

import reference
from fwpkm_kernels import testing
from tests.helpers.lookup import expanded_lookup

f64 = torch.float64


def test_same_seed_same_inputs():
    makers = (
        testing.make_lookup_inputs,
        testing.make_gather_inputs,
        testing.make_update_inputs,
        testing.make_memory_inputs,
    )
    for make in makers:
        one, same, other = make(seed=1), make(seed=1), make(seed=2)
        for a, b in zip(one, same, strict=True):
            if a is not None:
                testing.assert_bitwise_equal(a, b)
        assert not torch.equal(one[0], other[0])


def test_a_generator_moves_on():
    generator = torch.Generator().manual_seed(0)
    first = testing.make_gather_inputs(seed=generator)
    assert not torch.equal(first.values, testing.make_gather_inputs(seed=generator).values)


def test_lookup_inputs_shapes_and_dtypes():
    queries, keys = testing.make_lookup_inputs((2, 3), 4, 5, 6, dtype=torch.bfloat16)
    assert queries.shape == (2, 3, 4, 6)
    assert keys.shape == (4, 2, 5, 3)
    assert (queries.dtype, keys.dtype) == (torch.bfloat16, torch.float32)
    assert testing.make_lookup_inputs(dtype=torch.bfloat16, keys_dtype=torch.float16).keys.dtype == torch.float16
    assert testing.make_lookup_inputs(dtype=f64).keys.dtype == f64


def test_update_inputs_shapes_and_dtypes():
    inputs = testing.make_update_inputs(7, 3, 50, 5, gates=True, mask="real", dtype=torch.bfloat16)
    shapes = [(50, 5), (7, 3), (7, 3), (7, 5), (7, 5), (7,), (7,)]
    half, full = torch.bfloat16, torch.float32
    dtypes = [half, torch.int64, full, half, full, half, full]
    for tensor, shape, dtype in zip(inputs, shapes, dtypes, strict=True):
        assert tensor.shape == shape
        assert tensor.dtype == dtype
    plain = testing.make_update_inputs()
    assert plain.gates is None
    assert plain.mask is None


def test_memory_inputs_shapes_and_dtypes():
    inputs = testing.make_memory_inputs(
        2, 7, 3, 5, 6, 4, gates=True, mask="bool", dtype=torch.bfloat16, activations_dtype=torch.float16
    )
    shapes = [(2, 7, 3, 6), (2, 7, 4), (3, 2, 5, 3), (25, 4), (2, 7), (2, 7)]
    dtypes = [torch.float16, torch.float16, torch.float32, torch.bfloat16, torch.float16, torch.bool]
    for tensor, shape, dtype in zip(inputs, shapes, dtypes, strict=True):
        assert tensor.shape == shape
        assert tensor.dtype == dtype
    plain = testing.make_memory_inputs(dtype=f64)
    assert plain.gates is plain.mask is None
    assert {x.dtype for x in plain[:4]} == {f64}


def test_memory_inputs_have_a_pattern_and_layouts():
    options = {"sub_keys": 24, "mask": "real", "gates": True, "key_pattern": "equal", "seed": 3}
    plain = testing.make_memory_inputs(**options)
    assert len(plain.keys[0, 0].unique(dim=0)) < 24
    layouts = dict.fromkeys(plain._fields, "strided")
    for name, x in testing.make_memory_inputs(**options, layout=layouts)._asdict().items():
        testing.assert_bitwise_equal(x, getattr(plain, name), name)
        assert x.stride(-1) == 2, name
    queries, keys = testing.make_lookup_inputs((2, 8), 1, 24, key_pattern="equal", seed=3)
    testing.assert_bitwise_equal(queries, plain.queries)
    testing.assert_bitwise_equal(keys, plain.keys)


@pytest.mark.parametrize(("kind", "dtype"), [("bool", torch.bool), ("int", torch.int64), ("real", torch.float32)])
def test_masks_have_both_kinds_of_rows(kind: str, dtype: torch.dtype):
    mask = testing.make_update_inputs(40, mask=kind).mask
    assert mask.dtype == dtype
    assert 0 < (mask > 0).sum() < 40
    assert (mask >= 0).all()
    assert (mask.unique().numel() > 2) == (kind == "real")


@pytest.mark.parametrize("key_pattern", testing.KEY_PATTERNS)
@pytest.mark.parametrize("key_width", [2, 10])
def test_key_patterns(key_pattern: str, key_width: int):
    queries, keys = testing.make_lookup_inputs(20, 2, 24, key_width, key_pattern=key_pattern)
    first, _ = reference.lookup.half_scores(queries, keys)
    ties = sum(len(row) - len(row.unique()) for row in first.reshape(-1, 24))
    assert (ties > 100) == (key_pattern == "equal")
    if key_pattern == "near":
        nearest = torch.exp(-first.amax(-1)).sqrt()  # distances up to √eps
        assert nearest.max() < 0.15
        assert keys.norm(dim=-1).median() > 2


@pytest.mark.parametrize("score", ["idw", "dot"])
def test_equal_keys_give_the_same_slots_in_every_precision(score: str):
    inputs = testing.make_lookup_inputs(50, 2, 40, 20, key_pattern="equal", dtype=torch.bfloat16)
    _, slots = reference.product_key_lookup(*inputs, 8, score=score)
    _, exact = reference.product_key_lookup(*testing.as_float64(inputs), 8, score=score)
    testing.assert_bitwise_equal(slots, exact)
    _, slots = expanded_lookup(inputs, 8, score)
    testing.assert_bitwise_equal(slots, exact)


def test_slot_patterns():
    for pattern in testing.SLOT_PATTERNS:
        slots = testing.make_slots((40, 5), 1000, pattern)
        assert slots.shape == (40, 5)
        assert slots.dtype == torch.int64
        assert slots.min() >= 0
        assert slots.max() < 1000
        counts = slots.flatten().bincount().sort(descending=True).values
        distinct = int((counts > 0).sum())
        assert {
            "uniform": 100 < distinct < 200,
            "zipf": distinct < 120 and counts[0] >= 10,
            "one_slot": distinct == 1,
            "distinct": distinct == 200,
        }[pattern]
    assert testing.make_slots((2, 2), 4, "distinct").flatten().sort().values.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="distinct"):
        testing.make_slots((2, 3), 5, "distinct")


def test_unknown_options_are_named():
    for call, word in [
        (lambda: testing.make_slots((2,), 5, "normal"), "pattern"),
        (lambda: testing.make_lookup_inputs(key_pattern="far"), "key_pattern"),
        (lambda: testing.make_update_inputs(mask="float"), "mask"),
        (lambda: testing.with_layout(torch.ones(2), "diagonal"), "layout"),
    ]:
        with pytest.raises(ValueError, match=f"`{word}`"):
            call()


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_layouts(layout: str, dtype: torch.dtype):
    plain = torch.arange(1, 25).reshape(2, 3, 4).to(dtype)
    tensor = testing.with_layout(plain, layout)
    strides = {
        "contiguous": (12, 4, 1),
        "transposed": (12, 1, 3),
        "sliced": (18, 6, 1),
        "strided": (27, 9, 2),
        "expanded": (0, 4, 1),
    }
    assert tensor.stride() == strides[layout]
    assert torch.equal(tensor, plain[:1].expand(2, 3, 4) if layout == "expanded" else plain)
    assert testing.with_layout(torch.tensor(3.0), layout).item() == 3.0
    assert testing.with_layout(torch.arange(3), layout).shape == (3,)
    if layout in ("sliced", "strided") and dtype.is_floating_point:
        assert tensor.as_strided((1,), (1,), 0).isnan().all()
        assert tensor.storage_offset() == 1


def test_layouts_reach_every_tensor_or_the_named_ones():
    assert all(not t.is_contiguous() for t in testing.make_update_inputs(gates=True, mask="bool", layout="strided"))
    some = testing.make_gather_inputs(layout={"values": "transposed"})
    assert some.values.stride() == (1, 64)
    assert some.weights.is_contiguous()


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_cotangents(layout: str):
    like = torch.zeros(3, 4, dtype=torch.bfloat16)
    cotangent = testing.random_cotangent(like, layout=layout)
    assert cotangent.shape == like.shape
    assert cotangent.dtype == like.dtype
    assert cotangent.isfinite().all()
    assert (cotangent.stride() == (0, 0)) == (layout == "expanded")


def test_as_float64():
    inputs = testing.as_float64(testing.make_update_inputs(mask="bool"))
    assert isinstance(inputs, testing.UpdateInputs)
    assert inputs.values.dtype == f64
    assert inputs.slots.dtype == torch.int64
    assert inputs.mask.dtype == torch.bool
    nested = testing.as_float64({"a": [torch.ones(1), 3], "b": (None, torch.ones(1, requires_grad=True))})
    assert nested["a"][0].dtype == nested["b"][1].dtype == f64
    assert not nested["b"][1].requires_grad
