"""What is at the edge of being bad input: NaN, infinities, denormals, shared memory. All of it is defined."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from fwpkm_kernels import (
    chunk_value_update,
    chunk_value_update_,
    fast_weight_memory,
    product_key_lookup,
    product_key_update,
    sparse_value_gather,
    testing,
)
from fwpkm_kernels.lookup import lookup_halves
from fwpkm_kernels.options import Lookup
from tests.conftest import PLACES, SLOW_IN_INTERPRETER
from tests.helpers.memory import make_inputs, named, run
from tests.helpers.streaming import make_state, stream

INF, NAN = torch.inf, torch.nan


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """NaN and infinities where they are expected, all else to rounding."""
    for name, x in actual.items():
        wanted = expected[name].detach().to(x.device)
        torch.testing.assert_close(
            x.detach(), wanted, rtol=1e-6, atol=1e-9, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )


def changed(name: str, place: tuple[Any, ...], value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(inputs: dict[str, Tensor]) -> None:
        inputs[name][place] = value

    return change


def masked(value: float) -> Callable[[dict[str, Tensor]], None]:
    """A query that is not finite, of a token without mask and gate."""

    def change(inputs: dict[str, Tensor]) -> None:
        inputs["queries"][0, 4, 0, 0] = value
        inputs["mask"][0, 4] = inputs["gates"][0, 4] = 0.0

    return change


#: Two sequences of 9 tokens in chunks of 3, 6 sub-keys of width 2, values of width 3; what is not finite in them.
NOT_FINITE = {
    "NaN in a query": changed("queries", (0, 4, 0, 1), NAN),
    "NaN in both halves of a query": changed("queries", (0, 4), NAN),
    "NaN in a query of the first chunk": changed("queries", (0, 1, 0, 2), NAN),
    "NaN in the last query": changed("queries", (0, 8, 0, 1), NAN),
    "infinity in a query": changed("queries", (0, 4, 0, 1), INF),
    "-infinity in a query": changed("queries", (0, 4, 0, 3), -INF),
    "a query of infinities": changed("queries", (0, 4), INF),
    "infinity in the last query": changed("queries", (0, 8, 0, 1), INF),
    "NaN in a query that is masked": masked(NAN),
    "infinity in a query that is masked": masked(INF),
    "NaN in a target": changed("targets", (0, 4, 0), NAN),
    "infinity in a target": changed("targets", (0, 4, 0), INF),
    "NaN in a sub-key": changed("keys", (0, 0, 2), NAN),
    "infinity in a sub-key": changed("keys", (0, 0, 2), INF),
    "-infinity in a sub-key": changed("keys", (0, 0, 2, 1), -INF),
    "infinity in a value": changed("values", (7,), INF),
    "infinity in values that nobody reads": changed("values", (35,), INF),
    "NaN gate": changed("gates", (0, 4), NAN),
    "infinite gate": changed("gates", (0, 4), INF),
    "NaN mask": changed("mask", (0, 4), NAN),
    "negative mask": changed("mask", (0, 4), -1.0),
}
OPTIONS = {
    "carry": {},
    "drop, normalized": {"boundary": "drop", "step": "normalized"},
    "dot, silu, normalized": {"score": "dot", "weighting": "silu", "step": "normalized"},
    "drop, dot, relu": {"boundary": "drop", "score": "dot", "weighting": "relu"},
    "clip, decay": {"clip": 0.05, "weight_decay": 0.1},
}


def cases() -> list[Any]:
    """All with PyTorch; in the interpreter the first options alone, and one of them in `make test`."""
    return [
        pytest.param(place, case, options, id=f"{place.backend}-{case}-{options}", marks=marks)
        for place in PLACES
        for case in NOT_FINITE
        for options in OPTIONS
        if place.backend == "torch" or options == "carry"
        for marks in [SLOW_IN_INTERPRETER if place.backend == "triton" and case != "infinity in a query" else []]
    ]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize(("place", "case", "options"), cases())
def test_what_is_not_finite(place, case, options):
    """Outputs, slots, memory and all gradients are those of the definition, NaN by NaN."""
    inputs = make_inputs(2, 9, num_keys=6, mask="real")
    inputs = {name: x.clone() for name, x in inputs.items()}
    NOT_FINITE[case](inputs)
    all_options = {"chunk_size": 3, "top_k": 2, **OPTIONS[options]}
    expected = named(*run(reference.fast_weight_memory, inputs, **all_options))
    inputs = {name: x.to(place.device) for name, x in inputs.items()}
    with testing.assert_unchanged(inputs):
        assert_same(named(*run(fast_weight_memory, inputs, **all_options, backend=place.backend)), expected)


@pytest.mark.parametrize("name", ["a mask", "no mask", "all masked"])
def test_where_a_token_with_nan_goes(name):
    """The reads of others in its chunk and before are untouched; it writes to its own slots and sub-keys."""
    inputs = {key: x.clone() for key, x in make_inputs(1, 6, num_keys=8, mask="bool").items()}
    inputs["mask"][:] = name != "all masked"
    if name == "no mask":
        del inputs["mask"]
    options = {"chunk_size": 3, "top_k": 2, "lookahead": 0}
    clean = fast_weight_memory(**inputs, **options)
    inputs["queries"][0, 1, 0, 0] = NAN
    outputs = fast_weight_memory(**inputs, **options)
    others = [0, 2]
    testing.assert_bitwise_equal(outputs.output[:, others], clean.output[:, others], "reads of the same chunk")
    assert outputs.output[0, 1].isnan().all()
    # Of the half with NaN the first sub-keys, with the best of the other half.
    assert set((outputs.slots[0, 1] // 8).tolist()) <= {0, 1}
    first_chunk = {key: x[:, :3] if x.shape[:2] == (1, 6) else x for key, x in inputs.items()}
    one_chunk = fast_weight_memory(**first_chunk, **options)
    nan_rows = one_chunk.values.isnan().any(1).nonzero().flatten()
    assert nan_rows.tolist() == sorted(set(outputs.slots[0, 1].tolist()))
    # Sub-keys 0 and 1 of the first half, and what is picked beside them; none of the second half, where nothing is NaN.
    first, second = one_chunk.keys[0].isnan().any(-1)
    assert first[:2].all()
    assert not second.any()
    beside = set()
    for token in others:
        picks = product_key_lookup(inputs["queries"][0, token : token + 1], inputs["keys"], 2)[1][0, 0] // 8
        half = torch.cdist(inputs["queries"][0, token, :, :2], inputs["keys"][0, 0]).topk(2, largest=False).indices[0]
        assert set(picks.tolist()) <= set(half.tolist())
        beside |= set(half.tolist()) if set(half.tolist()) & {0, 1} else set()
    assert set(first.nonzero().flatten().tolist()) == {0, 1} | beside


def test_steps_with_nan_are_the_whole_with_nan():
    inputs = {name: x.clone() for name, x in make_inputs(2, 9, num_keys=6).items()}
    inputs["queries"][0, 4, 0, 1] = inputs["targets"][1, 2, 0] = NAN
    options = {"chunk_size": 3, "top_k": 2, "lookahead": 2}
    whole = fast_weight_memory(**inputs, **options)
    for cuts in ([1] * 9, [2, 5, 2]):
        state = make_state(inputs)
        output = stream(state, inputs, cuts, **options)
        actual = {"output": output, "keys": state.keys, "values": state.values}
        assert_same(actual, whole._asdict())


@pytest.mark.parametrize("options", [{}, {"clip": 0.05, "weight_decay": 0.1}], ids=["plain", "clip, decay"])
@pytest.mark.parametrize("case", ["infinity in a sub-key", "-infinity in a sub-key"])
def test_infinite_sub_keys_under_all_key_gradients(case, options):
    """They stay what they are, and nothing else hears of them: as in the definition, also backward and in steps."""
    inputs = {name: x.clone() for name, x in make_inputs(2, 9, num_keys=6, mask="real").items()}
    NOT_FINITE[case](inputs)
    options = {"chunk_size": 3, "top_k": 2, "key_gradient": "all", **options}
    expected = named(*run(reference.fast_weight_memory, inputs, **options))
    assert all(x.isfinite().all() for name, x in expected.items() if name not in ("keys", "gradient of keys"))
    assert_same(named(*run(fast_weight_memory, inputs, **options)), expected)
    state = make_state(inputs)
    output = stream(state, inputs, [2, 5, 2], **options)
    assert_same({"output": output, "keys": state.keys, "values": state.values}, expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("score", "top_k"), [("idw", 2), ("idw", 6), ("dot", 2)])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("where", ["queries", "keys"])
def test_slots_of_what_is_not_finite(where, dtype, value, score, top_k, place):
    """An infinite sub-key is infinitely far, whatever the sign of q·k; to an infinite query all are."""
    inputs = testing.make_lookup_inputs(2, 1, 6, 8, dtype=dtype, keys_dtype=dtype, device=place.device)
    if where == "queries":
        inputs.queries[1, 0, 1] = value
    else:
        inputs.keys[0, 0, 3, 2] = value
    scores, slots = product_key_lookup(*inputs, top_k, score=score, backend=place.backend)
    expected = reference.product_key_lookup(*inputs, top_k, score=score)
    testing.assert_bitwise_equal(slots, expected[1], "slots")
    torch.testing.assert_close(scores, expected[0], rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("place", "value", "top_k"),
    [
        pytest.param(place, value, top_k, id=f"{place.backend}-{value}-{top_k}", marks=marks)
        for place in PLACES
        for value in (2e19, -1e25, 3e38)
        for top_k in (2, 4)
        for marks in [SLOW_IN_INTERPRETER if place.backend == "triton" and (value, top_k) != (2e19, 2) else []]
    ],
)
def test_finite_queries_whose_squares_overflow(place, value, top_k):
    """Scores of -inf at valid slots; other queries and halves are left alone, and the key step takes them for NaN."""
    inputs = testing.make_lookup_inputs(3, 2, 4, 4, device=place.device)
    queries, keys = (x.clone().requires_grad_() for x in inputs)
    with torch.no_grad():
        queries[2, 1, 1] = value
    clean = product_key_lookup(*inputs, top_k, backend=place.backend)
    scores, slots = product_key_lookup(queries, keys, top_k, backend=place.backend)
    others = torch.ones(3, 2, dtype=torch.bool, device=place.device)
    others[2, 1] = False
    for x, expected in zip((scores, slots), clean, strict=True):
        testing.assert_bitwise_equal(x[others].detach(), expected[others])
    assert (scores[2, 1] == -INF).all()
    with torch.no_grad():
        sub_keys = lookup_halves(queries, keys, Lookup(top_k, backend=place.backend)).sub_keys
    half_keys = keys.detach()[1, 1]
    nearest = torch.cdist(queries.detach()[2, 1:, 2:], half_keys).topk(top_k, largest=False).indices[0]
    assert sub_keys[2, 1, 1].tolist() == (nearest + 12).tolist(), "picks of the other half"
    picked = set((sub_keys[2, 1, 0] - 8).tolist())
    assert len(picked) == top_k
    assert picked <= set(range(4))
    assert set((slots[2, 1] // 4).tolist()) <= picked
    assert set((slots[2, 1] % 4).tolist()) <= set(nearest.tolist())
    gradients = torch.autograd.grad(scores, [queries, keys], torch.ones_like(scores))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[0][2, 1, :2].any()
    assert gradients[0][2, 1, 2:].all()
    # The step turns to NaN what is picked, and what others pick beside it.
    new_keys = product_key_update(keys.detach(), queries.detach(), top_k=top_k, backend=place.backend)
    of_first = sub_keys[:, :, 0].flatten(0, 1).tolist()
    expected = {row for rows in of_first if {row % 8 for row in rows} & picked for row in rows}
    assert set(new_keys.isnan().any(-1).flatten().nonzero().flatten().tolist()) == expected
    assert new_keys[:, 1].isfinite().all()


@pytest.mark.parametrize("weight_decay", [0.0, 0.25])
def test_infinite_rows_that_nobody_addresses(weight_decay, place):
    """They stay what they are."""
    inputs = testing.make_update_inputs(8, 2, 12, 5, slot_pattern="one_slot", device=place.device)
    untouched = torch.arange(12, device=place.device) != inputs.slots[0, 0]
    inputs.values[untouched, 1] = INF
    run_update = functools.partial(chunk_value_update, weight_decay=weight_decay, clip=0.5, backend=place.backend)
    new_values = run_update(*inputs[:5])
    torch.testing.assert_close(new_values[untouched], (1 - weight_decay) * inputs.values[untouched])
    assert new_values[~untouched].isfinite().all()
    out = sparse_value_gather(*inputs[:3], backend=place.backend)
    assert out.isfinite().all()


@pytest.mark.parametrize("size", [1e-39, 1e-42, 1.4e-45], ids=str)
def test_denormals(size, place):
    """Values, weights, targets and scores below the least normal number are numbers, to that number's rounding."""
    # A GPU may flush what is denormal in between.
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=2e-38 if place.device == "cuda" else 2e-44)
    gather = testing.make_gather_inputs(5, 3, 12, 6, device=place.device)
    for small in (gather._replace(values=gather.values * size), gather._replace(weights=gather.weights * size)):
        close(sparse_value_gather(*small, backend=place.backend), reference.sparse_value_gather(*small))
    values, slots, weights, targets, predictions = testing.make_update_inputs(6, 3, 12, 4, device=place.device)[:5]
    options = {"lr": 0.5, "weight_decay": 0.25, "clip": 1.0}
    for small in (
        (values * size, slots, weights * size, targets, predictions),
        (values * size, slots, weights, targets * size, predictions * size),
    ):
        exact = reference.chunk_value_update(*testing.as_float64(small), **options).float()
        close(chunk_value_update(*small, **options, backend=place.backend), exact)
    queries, keys = testing.make_lookup_inputs(4, 1, 9, 8, device=place.device)
    scores, _ = product_key_lookup(queries * size, keys, 3, score="dot", backend=place.backend)
    close(scores, reference.product_key_lookup(queries * size, keys, 3, score="dot")[0])


def test_the_least_eps(place):
    """A query on a sub-key scores -log(eps), at the least eps there is."""
    tiny = torch.finfo(torch.float32).tiny
    keys = testing.make_lookup_inputs(1, 1, 9, 8, device=place.device).keys
    queries = keys[0, :, 3].reshape(1, 1, 8).clone().requires_grad_()
    scores, slots = product_key_lookup(queries, keys, 2, eps=tiny, backend=place.backend)
    assert slots[0, 0, 0] == 3 * 9 + 3
    torch.testing.assert_close(float(scores[0, 0, 0].detach()), 2 * 87.33654, rtol=1e-5, atol=0.0)
    scores[0, 0, 0].backward()
    assert queries.grad.count_nonzero() == 0
    new_keys = product_key_update(keys, queries.detach(), top_k=2, eps=tiny, backend=place.backend)
    assert new_keys.isfinite().all()


@pytest.mark.parametrize("key_gradient", ["addressing", "all"])
@pytest.mark.parametrize("boundary", ["carry", "drop"])
def test_no_heads(boundary, key_gradient, place):
    """J = 0: tokens read zeros and write nothing; chunks decay."""
    inputs = make_inputs(2, 7, heads=0, device=place.device)
    options = {"chunk_size": 3, "top_k": 2, "weight_decay": 0.25, "key_gradient": key_gradient}
    options |= {"clip": 1.0, "backend": place.backend}
    actual = named(*run(fast_weight_memory, inputs, **options, boundary=boundary))
    assert not actual["output"].any()
    assert actual["slots"].shape == (2, 7, 0)
    torch.testing.assert_close(actual["values"], inputs["values"] * 0.75 ** (2 if boundary == "carry" else 3))
    assert all(not actual[f"gradient of {name}"].any() for name in ("queries", "targets", "gates"))
    if boundary == "carry":
        check_steps(inputs, actual, options)


@pytest.mark.parametrize(
    ("place", "heads", "key_width", "width", "key_gradient"),
    [
        pytest.param(place, *sizes, key_gradient, id=f"{place.backend}-{sizes}-{key_gradient}", marks=marks)
        for place in PLACES
        for sizes in ((1, 0, 3), (1, 4, 0), (0, 0, 0))
        for key_gradient in ("addressing", "all")
        for marks in [SLOW_IN_INTERPRETER if place.backend == "triton" and key_gradient == "all" else []]
    ],
)
def test_no_widths(place, heads, key_width, width, key_gradient):
    """Sub-keys of no width are all as near, so the lowest win, with equal weights."""
    inputs = make_inputs(1, 5, heads, 4, key_width, width, mask="real", device=place.device)
    options = {"chunk_size": 2, "top_k": 2, "lookahead": 1, "weight_decay": 0.25, "key_gradient": key_gradient}
    actual = named(*run(fast_weight_memory, inputs, **options, backend=place.backend))
    on_cpu = {name: x.cpu() for name, x in inputs.items()}
    assert_same(actual, named(*run(fast_weight_memory, on_cpu, **options, backend="torch")))
    if key_width == 0:
        assert (actual["slots"] == torch.tensor([0, 1] * heads, device=place.device)).all()
        torch.testing.assert_close(actual["weights"], torch.full_like(actual["weights"], 0.5 / max(1, heads)))
    check_steps(inputs, actual, options | {"backend": place.backend})


def check_steps(inputs: dict[str, Tensor], expected: dict[str, Tensor], options: dict[str, Any]) -> None:
    """A sequence in steps, the last of which is more than a chunk, is the whole."""
    state = make_state(inputs)
    output = stream(state, inputs, [1, 1, inputs["queries"].shape[1] - 2], **options)
    assert_same({"output": output, "keys": state.keys, "values": state.values}, expected)


@pytest.mark.parametrize("score", ["idw", "dot"])
@pytest.mark.parametrize(("heads", "key_width"), [(0, 4), (2, 0)], ids=["no heads", "no width"])
def test_key_steps_of_no_heads_or_widths(heads, key_width, score, place):
    """Nothing moves, forward or backward; sub-keys of no width all score alike."""
    queries, keys = testing.make_lookup_inputs(3, heads, 6, key_width, device=place.device)
    queries.requires_grad_(), keys.requires_grad_()
    new_keys = product_key_update(keys, queries, top_k=2, score=score, clip=1.0, backend=place.backend)
    scores, slots = product_key_lookup(queries, keys, 2, score=score, backend=place.backend)
    (new_keys.sum() + scores.sum()).backward()
    assert new_keys.shape == keys.grad.shape == keys.shape
    assert queries.grad.shape == queries.shape
    assert slots.tolist() == [[[0, 1]] * heads] * 3


@pytest.mark.parametrize("name", ["targets", "predictions", "weights"])
def test_what_shares_memory_with_the_table_is_read_before_it_is_written(name, place):
    inputs = testing.make_update_inputs(8, 4, 8, 4, device=place.device)._asdict()
    copied = inputs | {name: inputs["values"].clone()}
    expected = chunk_value_update(**copied, lr=0.5, clip=0.3, backend=place.backend)
    inputs[name] = inputs["values"]
    chunk_value_update_(**inputs, lr=0.5, clip=0.3, backend=place.backend)
    testing.assert_bitwise_equal(inputs["values"], expected)


def test_rows_that_touch_without_overlapping_are_written(place):
    """Interleaved, transposed, padded, and a row without a stride: strides that look strange and are not."""
    for strides, shape in (((1, 64), (64, 16)), ((3, 200), (64, 16)), ((17, 1), (64, 16)), ((0, 5), (1, 16))):
        inputs = testing.make_update_inputs(2, 2, *shape, device=place.device)
        table = torch.zeros(8192, device=place.device).as_strided(shape, strides).copy_(inputs.values)
        expected = chunk_value_update(**inputs._asdict(), backend=place.backend)
        chunk_value_update_(**inputs._replace(values=table)._asdict(), backend=place.backend)
        testing.assert_bitwise_equal(table.contiguous(), expected)


def test_negated_views_are_read_as_what_they_are(place):
    """Numbers that PyTorch keeps with the other sign, as the imaginary part of a conjugate."""
    values, slots, weights = testing.make_gather_inputs(device=place.device)
    negated = torch.complex(values, values).conj().imag
    assert negated.is_neg()
    testing.assert_bitwise_equal(
        sparse_value_gather(negated, slots, weights, backend=place.backend),
        sparse_value_gather(-values, slots, weights, backend=place.backend),
    )


class Named(Tensor):
    """A subclass that adds nothing."""


@pytest.mark.parametrize("wrap", [torch.nn.Parameter, lambda x: x.as_subclass(Named)], ids=["parameter", "subclass"])
def test_parameters_and_subclasses_are_tensors(wrap, place):
    queries, keys = testing.make_lookup_inputs(3, 1, 6, 4, device=place.device)
    scores, slots = product_key_lookup(wrap(queries), wrap(keys), 2, backend=place.backend)
    expected = product_key_lookup(queries, keys, 2, backend=place.backend)
    testing.assert_bitwise_equal(scores.as_subclass(Tensor), expected[0])
    testing.assert_bitwise_equal(slots.as_subclass(Tensor), expected[1])
