"""product_key_update and address_grad: both backends, forward and backward, against the reference."""

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck

import reference
from fwpkm_kernels import ProductKeyUpdate, product_key_update, testing
from fwpkm_kernels.kernels.key_step import KeySumConfig, sum_picks
from fwpkm_kernels.kernels.picks import pick_sums
from fwpkm_kernels.key_step import address_grad, step_keys
from fwpkm_kernels.lookup import lookup_halves
from fwpkm_kernels.options import KeyStep, Lookup
from fwpkm_kernels.plan import plan_picks
from fwpkm_kernels.records import Addresses, Picks
from tests.conftest import HAS_GPU, SLOW_IN_INTERPRETER, Place
from tests.helpers.golden import load

# rows, heads, n, K, Dk: odd sizes, one token, K = 1, K = n, halves of one column.
SHAPES = [(3, 2, 9, 3, 14), (1, 1, 1, 1, 2), (2, 1, 5, 5, 10), (4, 1, 20, 1, 6), (2, 1, 6, 3, 2)]
DTYPES = {  # queries, keys
    "bfloat16-queries": (torch.bfloat16, torch.float32),
    "float16-queries": (torch.float16, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "float64": (torch.float64, torch.float64),
}
OPTIONS = {
    "lr": {"lr": 0.3},
    "weight": {"weight": -2.5, "lr": 3},
    "decay": {"lr": 0.5, "weight_decay": 0.1},
    "clip": {"clip": 0.02},
    "clip-decay": {"lr": 1.7, "clip": 0.02, "weight_decay": 0.05},
    "clip-zero": {"clip": 0.0, "weight_decay": 0.05},
    "no-weight": {"weight": 0, "weight_decay": 0.1},
    "lr-zero": {"lr": 0, "weight_decay": 0.1},
}


def check(inputs: testing.LookupInputs, top_k: int, place: Place, *, cotangent: str = "contiguous", **options):
    """The new keys and both gradients inside the error budget."""
    with testing.poisoned_memory(), testing.assert_unchanged(inputs):
        testing.assert_matches_reference(
            functools.partial(product_key_update, backend=place.backend),
            reference.product_key_update,
            {**inputs._asdict(), "top_k": top_k, **options},
            wrt=("queries", "keys"),
            cotangent=testing.random_cotangent(inputs.keys, layout=cotangent),
            name="product_key_update",
            reduction_length=max(inputs.queries.shape),
        )


@pytest.mark.parametrize("score", ["idw", "dot"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, score, place):
    rows, heads, n, top_k, width = shape
    check(testing.make_lookup_inputs(rows, heads, n, width, device=place.device), top_k, place, score=score)


@pytest.mark.parametrize("rows", [pytest.param(66, marks=SLOW_IN_INTERPRETER)])
def test_many_picks_of_a_sub_key(rows, place):
    """So many that their sum is split."""
    check(testing.make_lookup_inputs(rows, 1, 2, 6, device=place.device), 2, place, clip=0.02)


#: With few sub-keys in the interpreter: each is a program of its own, and the tiles go by the width and the picks.
REAL_SHAPES = [(64, 1, 512, 8, 512), (4, 4, 512, 32, 512)] if HAS_GPU else [(24, 1, 24, 8, 512), (2, 2, 40, 32, 512)]
REAL_SHAPES += [(3, 1, 64, 64, 70)]


@pytest.mark.parametrize("score", ["idw", "dot"])
@pytest.mark.parametrize("shape", [pytest.param(s, marks=SLOW_IN_INTERPRETER, id=str(s)) for s in REAL_SHAPES])
def test_matches_reference_at_real_sizes(shape, score, place):
    rows, heads, n, top_k, width = shape
    inputs = testing.make_lookup_inputs(rows, heads, n, width, device=place.device)
    # Smaller than what a normal distribution gives: else one sub-key takes all of a row's probability.
    check(inputs._replace(keys=inputs.keys * 0.1, queries=inputs.queries * 0.1), top_k, place, score=score)


@pytest.mark.parametrize("score", ["idw", "dot"])
@pytest.mark.parametrize("options", OPTIONS)
def test_options(options, score, place):
    inputs = testing.make_lookup_inputs(3, 1, 6, 10, device=place.device)
    check(inputs, 2, place, score=score, **OPTIONS[options])


@pytest.mark.parametrize("dtypes", DTYPES)
def test_dtypes(dtypes, place):
    queries, keys = DTYPES[dtypes]
    inputs = testing.make_lookup_inputs(3, 1, 7, 10, dtype=queries, keys_dtype=keys, device=place.device)
    check(inputs, 2, place, weight_decay=0.1)


@pytest.mark.parametrize("score", ["idw", "dot"])
@pytest.mark.parametrize("layout", ["transposed", "sliced", "strided", "expanded"])
def test_strides_of_inputs_and_of_incoming_gradients(layout, score, place):
    inputs = testing.make_lookup_inputs(2, 1, 6, 10, device=place.device, layout=layout)
    check(inputs, 2, place, score=score, cotangent=layout)
    assert product_key_update(inputs.keys, inputs.queries, top_k=3, backend=place.backend).is_contiguous()


def test_near_keys(place):
    """The distance to a sub-key beside the query is that of their difference; the score's own has cancelled."""
    inputs = testing.make_lookup_inputs(4, 1, 12, 32, key_pattern="near", device=place.device)

    def step(queries, keys, backend):
        """Of what the lookup finds only the sub-keys: its scores would be the larger error."""
        o = KeyStep(4, precision="ieee", backend=backend)
        sub_keys = lookup_halves(queries, keys, o.lookup).sub_keys
        halves = torch.stack(reference.lookup.half_scores(queries, keys), dim=2)
        half_scores = halves.gather(-1, sub_keys.long() - torch.tensor([[0], [12]], device=keys.device))
        return step_keys(keys, queries, Picks(half_scores, sub_keys), o)

    with testing.poisoned_memory():
        new_keys = step(*inputs, place.backend)
    exact = step(*testing.as_float64(inputs), "torch")
    baseline = reference.product_key_update(inputs.keys, inputs.queries, top_k=4)
    testing.assert_within_budget(new_keys, exact, baseline, name="new keys", reduction_length=32)
    definition = reference.product_key_update(inputs.keys.double(), inputs.queries.double(), top_k=4)
    torch.testing.assert_close(exact, definition)


def test_heads_are_pooled(place):
    """Heads that pick the same columns share P̄; a head alone does not step like one of two."""
    queries, keys = testing.make_lookup_inputs(2, 2, 4, 8, dtype=torch.float64, device=place.device)
    both = product_key_update(keys, queries, top_k=3, backend=place.backend)
    alone = product_key_update(keys[:1], queries[:, :1], top_k=3, backend=place.backend)
    assert not torch.allclose(both[:1] - keys[:1], alone - keys[:1])
    assert not torch.allclose(both[:1] - keys[:1], (alone - keys[:1]) / 2)
    twins = product_key_update(
        keys[:1].expand(2, -1, -1, -1), queries[:, :1].expand(-1, 2, -1), top_k=3, backend=place.backend
    )
    torch.testing.assert_close(twins[0] - keys[0], (alone[0] - keys[0]) / 2)


def test_a_clip_bounds_the_step(place):
    queries, keys = testing.make_lookup_inputs(3, 1, 6, 10, device=place.device)
    step = keys - product_key_update(keys, queries, top_k=3, lr=0.5, backend=place.backend)
    clip = float(2 * step.abs()[step != 0].median())
    clipped = keys - product_key_update(keys, queries, top_k=3, lr=0.5, clip=clip, backend=place.backend)
    torch.testing.assert_close(clipped, step.clamp(-0.5 * clip, 0.5 * clip), rtol=1e-4, atol=1e-6)
    assert (step.abs() > 0.5 * clip).any()


@pytest.mark.parametrize("weight_decay", [0.0, 0.25])
@pytest.mark.parametrize(("rows", "heads"), [(0, 2), (3, 0)], ids=["no rows", "no heads"])
def test_empty(rows, heads, weight_decay, place):
    queries, keys = testing.make_lookup_inputs(rows, heads, 9, 8, device=place.device)
    queries.requires_grad_(), keys.requires_grad_()
    new_keys = product_key_update(keys, queries, top_k=3, weight_decay=weight_decay, backend=place.backend)
    assert new_keys.data_ptr() != keys.data_ptr() or heads == 0
    testing.assert_bitwise_equal(new_keys, keys * (1 - weight_decay))
    new_keys.sum().backward()
    assert queries.grad.shape == queries.shape
    assert (keys.grad == 1 - weight_decay).all()


def test_keys_that_nobody_picks_stay(place):
    queries, keys = testing.make_lookup_inputs(2, 1, 30, 8, device=place.device)
    new_keys = product_key_update(keys, queries, top_k=3, backend=place.backend)
    picked = torch.zeros(2, 30, dtype=torch.bool, device=place.device)
    for side, scores in enumerate(reference.lookup.half_scores(queries, keys)):
        picked[side, scores.topk(3).indices.flatten()] = True
    assert torch.equal((new_keys != keys).any(-1)[0], picked)


@pytest.mark.parametrize("score", ["idw", "dot"])
def test_halves_are_those_of_the_lookup(score, place):
    queries, keys = testing.make_lookup_inputs(5, 2, 9, 14, device=place.device)
    o = Lookup(4, score, precision="ieee", backend=place.backend)
    with testing.poisoned_memory():
        scores, slots, half_scores, sub_keys = lookup_halves(queries, keys, o)
    halves = torch.stack(reference.lookup.half_scores(queries, keys, score=score), dim=2)
    best, columns = torch.sort(halves, dim=-1, descending=True, stable=True)
    first_rows = torch.arange(0, 36, 9, device=place.device).view(2, 2, 1)
    testing.assert_bitwise_equal(sub_keys, (columns[..., :4] + first_rows).int(), "sub_keys")
    torch.testing.assert_close(half_scores, best[..., :4])
    exact_scores, exact_slots = reference.product_key_lookup(queries, keys, 4, score=score)
    testing.assert_bitwise_equal(slots, exact_slots, "slots")
    torch.testing.assert_close(scores, exact_scores)


def lookup_and_step(queries, keys, *, first_row, top_k, score, **options):
    """What `address_grad` differentiates, by the reference: all rows are looked up, the later ones step the keys."""
    scores, _ = reference.product_key_lookup(queries, keys, top_k, score=score)
    new_keys = reference.product_key_update(keys, queries[first_row:], top_k=top_k, score=score, **options)
    return scores, new_keys


JOINT = {
    "step": {"lr": 0.7, "weight": 1.3},
    "clip-decay": {"lr": 0.7, "weight_decay": 0.1, "clip": 0.02},
    "no step": {"lr": 0.7, "weight": 0.0},
    "step only": {},
}


@pytest.mark.parametrize(("first_row", "heads"), [(0, 2), (1, 1), (3, 1)])
@pytest.mark.parametrize("score", ["idw", "dot"])
@pytest.mark.parametrize("case", JOINT)
def test_joint_backward(case, score, first_row, heads, place):
    queries, keys = testing.make_lookup_inputs(3, heads, 5, 6, dtype=torch.float64, device=place.device)
    o = KeyStep(2, score, **JOINT[case], precision="ieee", backend=place.backend)
    leaves = [queries.requires_grad_(), keys.requires_grad_()]
    results = lookup_and_step(*leaves, first_row=first_row, top_k=2, score=score, **JOINT[case])
    grad_scores = testing.random_cotangent(results[0], layout="strided")
    grad_new_keys = testing.random_cotangent(results[1], seed=2)
    if case == "step only":
        grad_scores = torch.zeros_like(grad_scores)
    expected = torch.autograd.grad(results, leaves, [grad_scores, grad_new_keys])
    queries, keys = queries.detach(), keys.detach()
    found = lookup_halves(queries, keys, o.lookup)
    of_scores = (None, None) if case == "step only" else (grad_scores, found.slots)
    with testing.poisoned_memory(), testing.assert_unchanged((queries, keys, *found, grad_new_keys)):
        gradients = address_grad(grad_new_keys, keys, queries, *of_scores, found.picks, o, first_row=first_row)
    for actual, exact, name in zip(gradients, expected, ("queries", "keys"), strict=True):
        torch.testing.assert_close(actual, exact, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("score", ["idw", "dot"])
@pytest.mark.parametrize("clip", [None, 1e9, 0.02])
def test_nan_before_the_first_row_is_no_part_of_a_key_step(clip, score, place):
    """A token that is read again, to be written: its query reaches no gradient of the others through the step."""
    queries, keys = testing.make_lookup_inputs(4, 1, 5, 6, device=place.device)
    grad_new_keys = testing.random_cotangent(keys)

    def gradients(queries):
        o = KeyStep(2, score, clip=clip, precision="ieee", backend=place.backend)
        picks = lookup_halves(queries, keys, o.lookup).picks
        picks.sub_keys[0] = picks.sub_keys[1]  # which a row that counts picks too
        return address_grad(grad_new_keys, keys, queries, None, None, picks, o, first_row=1)[0][1:]

    expected = gradients(queries)
    queries = queries.clone()
    queries[0] = torch.nan
    testing.assert_bitwise_equal(gradients(queries), expected)


def test_joint_backward_in_blocks(monkeypatch):
    """Rows beyond what is held at a time come to the same sums, up to rounding."""
    from fwpkm_kernels import lookup

    inputs = testing.make_lookup_inputs(9, 2, 7, 6, dtype=torch.float64)
    run = functools.partial(product_key_update, top_k=3, clip=0.02)
    whole = testing.forward_and_gradients(run, inputs._asdict(), wrt=("queries", "keys"))
    monkeypatch.setattr(lookup, "_PICK_ELEMENTS", 100)
    blocks = testing.forward_and_gradients(run, inputs._asdict(), wrt=("queries", "keys"))
    torch.testing.assert_close(blocks, whole)


@pytest.mark.parametrize("name", ["dot_softmax", "heads2", "clip"])
def test_golden_keys(name, place):
    """A key step with the queries, keys and options of a golden case."""
    config, tensors = load(name, torch.float32)
    queries = tensors["queries"][0, :2].to(place.device)  # few: the interpreter is slow
    keys = tensors["keys"].to(place.device)
    check(
        testing.LookupInputs(queries, keys),
        config["top_k"],
        place,
        score=config["score"],
        lr=config["lr"],
        clip=config["clip"],
        weight_decay=config["weight_decay"],
    )


def test_gradient_of_one_input_only(place):
    inputs = testing.make_lookup_inputs(2, 1, 6, 8, device=place.device)._asdict()
    run = functools.partial(product_key_update, top_k=2, backend=place.backend)
    _, both = testing.forward_and_gradients(run, inputs, wrt=("queries", "keys"))
    for wrt in ("queries", "keys"):
        _, one = testing.forward_and_gradients(run, inputs, wrt=(wrt,))
        testing.assert_bitwise_equal(one[wrt], both[wrt], wrt)


@pytest.mark.parametrize("options", [(), (0.7, 1.3, 0.1, 0.02)], ids=["defaults", "all options"])
@pytest.mark.parametrize("score", ["idw", "dot"])
def test_gradcheck(score, options):
    queries, keys = (x.requires_grad_() for x in testing.make_lookup_inputs(3, 2, 6, 6, dtype=torch.float64))
    assert gradcheck(lambda k, q: ProductKeyUpdate.apply(k, q, 3, score, 1e-3, *options), (keys, queries))


def test_one_compilation_serves_every_number_of_rows():
    def step(queries, keys):
        return product_key_update(keys, queries, top_k=4, lr=0.3, clip=0.1).square()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for rows in (20, 33, 7):
        leaves = [x.requires_grad_() for x in testing.make_lookup_inputs(rows, 2, 9, 14)]
        torch._dynamo.mark_dynamic(leaves[0], 0)
        new_keys, expected = compiled(*leaves), step(*leaves)
        torch.testing.assert_close(new_keys, expected)
        torch.testing.assert_close(
            torch.autograd.grad(new_keys.sum(), leaves), torch.autograd.grad(expected.sum(), leaves)
        )
    assert counter.frame_count == 1


def test_autocast_changes_nothing(place):
    inputs = testing.make_lookup_inputs(2, 1, 6, 8, device=place.device)._asdict()
    run = functools.partial(product_key_update, top_k=2, clip=0.02, backend=place.backend)
    expected, expected_gradients = testing.forward_and_gradients(run, inputs, wrt=("queries", "keys"))
    with torch.autocast(place.device, dtype=torch.bfloat16):
        outputs, gradients = testing.forward_and_gradients(run, inputs, wrt=("queries", "keys"))
    testing.assert_bitwise_equal(outputs[0], expected[0])
    for name, gradient in gradients.items():
        testing.assert_bitwise_equal(gradient, expected_gradients[name], name)


def test_half_precision_keys_are_rounded_once(place):
    queries, keys = testing.make_lookup_inputs(3, 1, 6, 8, dtype=torch.float16, device=place.device)
    keys = keys.half()
    o = KeyStep(3, lr=0.5, weight_decay=0.1, precision="ieee", backend=place.backend)
    picks = lookup_halves(queries, keys, o.lookup).picks
    new_keys = step_keys(keys, queries, picks, o)
    exact = step_keys(keys.float(), queries, picks, o)
    testing.assert_bitwise_equal(new_keys, exact.half())


OUT = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "clip-decay": {"clip": 0.02, "weight_decay": 0.1, "lr": 0.5},
    "no weight": {"weight": 0.0},
    "no weight, decay": {"weight": 0.0, "weight_decay": 0.1},
}


@pytest.mark.parametrize("case", OUT)
def test_out(case, place):
    """New keys in a slice of a stack, and keys that move in place, have the bits of a new tensor."""
    dtype = torch.float32 if case == "plain" else torch.bfloat16
    queries, keys = testing.make_lookup_inputs(2, 2, 4, 6, dtype=dtype, keys_dtype=dtype, device=place.device)
    o = KeyStep(2, **OUT[case], precision="ieee", backend=place.backend)
    picks = lookup_halves(queries, keys, o.lookup).picks
    with testing.poisoned_memory(), testing.assert_unchanged(queries, keys, *picks):
        expected = step_keys(keys, queries, picks, o)
        stack = torch.full((3, *keys.shape), 7.0, dtype=dtype, device=place.device)
        out = step_keys(keys, queries, picks, o, out=stack[1])
    assert out.data_ptr() == stack[1].data_ptr()
    testing.assert_bitwise_equal(stack[1], expected, "out")
    assert (stack[[0, 2]] == 7).all()
    moved = keys.clone()
    assert step_keys(moved, queries, picks, o, out=moved) is moved
    testing.assert_bitwise_equal(moved, expected, "in place")


@pytest.mark.parametrize("weight_decay", [0.0, 0.25])
def test_out_without_rows(weight_decay, place):
    queries, keys = testing.make_lookup_inputs(0, 1, 5, 6, device=place.device)
    picks = Addresses.empty(queries, 2, keys.dtype).picks
    o = KeyStep(2, weight_decay=weight_decay, backend=place.backend)
    moved, out = keys.clone(), torch.empty_like(keys)
    step_keys(moved, queries, picks, o, out=moved)
    step_keys(keys, queries, picks, o, out=out)
    testing.assert_bitwise_equal(moved, keys * (1 - weight_decay))
    testing.assert_bitwise_equal(out, moved)


def make_uneven_picks(rows, dtype, device):
    """Sub-keys [M, 2, 2, 1], of n = 3 of width 5, and their plan: one that every token picks, one that nobody does."""
    generator = torch.Generator().manual_seed(0)
    sub_keys = torch.tensor([[[0], [4]], [[6], [11]]], dtype=torch.int32).repeat(rows, 1, 1, 1)
    sub_keys[torch.rand(rows, generator=generator) < 0.05, 0, 1] = 3
    sub_keys = sub_keys.to(device)
    plan = plan_picks(Picks(torch.zeros(sub_keys.shape, dtype=dtype, device=device), sub_keys), 3)
    sizes = plan.first.diff()
    assert (sizes == 0).any()
    assert (sizes == rows).any()
    return sub_keys.flatten().long(), plan, sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_picks(dtype, triton_place):
    flat, plan, _ = make_uneven_picks(600, dtype, triton_place.device)
    coefficients = torch.rand(600, 2, 2, 1, generator=torch.Generator().manual_seed(1), dtype=dtype)
    coefficients = coefficients.to(triton_place.device)
    with testing.poisoned_memory():
        sums = pick_sums(coefficients, plan)
    expected = torch.zeros_like(sums, dtype=torch.float64).index_add_(0, flat % 6, coefficients.flatten().double())
    torch.testing.assert_close(sums.double(), expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("idw", [True, False])
@pytest.mark.parametrize("all_rows", [True, False])
@pytest.mark.parametrize("epilogue", ["update", "step_grad", "grad", "grad with steps"])
def test_sums_of_rows_of_picks(epilogue, all_rows, idw, triton_place):
    """Tiles of any size; nothing of a sub-key that nobody picked is read but its own row."""
    flat, plan, sizes = make_uneven_picks(90, torch.float32, triton_place.device)
    generator = torch.Generator().manual_seed(1)
    factors, step_factors = torch.rand(2, 90, 2, 2, 1, generator=generator).to(triton_place.device)
    queries = torch.randn(90, 2, 10, generator=generator).to(triton_place.device)
    keys, base, steps = torch.randn(3, 12, 5, generator=generator).to(triton_place.device)
    steps[sizes == 0] = torch.nan  # not defined, not read
    options = {"epilogue": epilogue[:9].strip(), "base": base, "all_rows": all_rows, "idw": idw, "decay": 0.75}
    clip = 20.0 if idw else 5.0
    options |= {"lr": 0.01, "clip": clip}
    if epilogue == "grad with steps":
        options |= {"epilogue": "grad", "step_factors": step_factors, "steps": steps}

    def totals(coefficients, vectors):
        return torch.zeros(12, 5, device=flat.device).index_add_(0, flat, coefficients.view(-1, 1) * vectors)

    total = totals(factors, queries.view(-1, 5) - keys[flat] * idw)
    if epilogue == "update":
        expected = 0.75 * keys - 0.01 * total.clamp(-clip, clip)
    elif epilogue == "step_grad":
        expected = torch.where(total.abs() <= clip, 0.01 * base, 0.0)
        expected[sizes == 0] = 0.75 * keys[sizes == 0]  # defined, though nobody reads it
    else:
        expected = 0.75 * base + total
        if epilogue == "grad with steps":
            expected -= totals(step_factors, torch.ones(5, device=flat.device)) * steps.nan_to_num()
    if not all_rows:
        expected[sizes == 0] = 7.0
    assert (total.abs() > clip).any()
    for config in (None, KeySumConfig(16, 2, 4), KeySumConfig(64, 8, 4)):
        out = torch.full_like(keys, 7.0)
        with testing.poisoned_memory():
            sum_picks(out, keys, queries, factors, plan, config=config, **options)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("clip", [None, 0.001])
def test_memories_side_by_side_are_those_of_each_alone(clip, place):
    """The same bits, with rows that are only looked up before those that step."""
    memories, heads, n, half, rows, top_k, first_row = 3, 2, 5, 3, 7, 2, 2
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(*size, generator=generator).to(place.device)

    keys, grad_keys = draw(memories * heads, 2, n, half), draw(memories * heads, 2, n, half)
    queries, grad_scores = draw(rows, memories * heads, 2 * half), draw(rows, memories * heads, top_k)
    o = KeyStep(top_k, weight_decay=0.1, clip=clip, backend=place.backend)

    def run(part: slice, memories: int):
        x, k = queries[:, part], keys[part]
        found = lookup_halves(x, k, o.lookup)
        new = step_keys(k, x[first_row:], found.picks.since(first_row), o, memories=memories)
        grads = (grad_keys[part], k, x, grad_scores[:, part], found.slots, found.picks)
        by_row, by_key = address_grad(*grads, o, first_row=first_row, memories=memories)
        return found.scores, new, by_row, by_key

    together = run(slice(None), memories)
    for memory in range(memories):
        part = slice(memory * heads, (memory + 1) * heads)
        scores, new, by_row, by_key = run(part, 1)
        testing.assert_bitwise_equal(together[0][:, part], scores)
        testing.assert_bitwise_equal(together[1][part], new)
        testing.assert_bitwise_equal(together[2][:, part], by_row)
        testing.assert_bitwise_equal(together[3][part], by_key)
