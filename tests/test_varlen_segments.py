"""Segments of packed documents, cut anywhere: they chain as one sequence, in values and gradients."""

import functools
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import reference
from fwpkm_kernels import _checks as checks
from fwpkm_kernels import fast_weight_memory_varlen, testing
from fwpkm_kernels.options import Options
from tests.conftest import PLACES, slow_in_interpreter
from tests.helpers.memory import assert_close, assert_same_bits
from tests.helpers.varlen import CHUNK, bounds, in_segments, make_packed, make_rows, run, tables_of

OPS = torch.ops.fwpkm_kernels


def check(cuts, place, rows=None, *, own_keys=False, **options):
    """Segments of these lengths are the reference's, which are whole documents; returns the carries."""
    totals = [sum(lengths) for lengths in zip(*cuts, strict=True)]
    how = {name: options.pop(name) for name in ("heads", "num_keys", "gates", "mask", "seed") if name in options}
    inputs = make_packed(totals, own_keys=own_keys, device=place.device, **how)
    rows = None if rows is None else make_rows(inputs, rows)
    options = {"chunk_size": CHUNK, "top_k": 2, **options}
    carries = []
    sparse = {"sparse_grad": options.pop("sparse_grad", False)}
    actual, gradients, _ = run(in_segments(cuts, carries), inputs, rows, backend=place.backend, **sparse, **options)
    segments = in_segments(cuts, function=reference.fast_weight_memory_varlen)
    for whole in (segments, reference.fast_weight_memory_varlen):
        expected, wanted, _ = run(whole, inputs, rows, **options)
        assert_close(actual | gradients, expected | wanted, 1e-11)
    return inputs, carries


#: How many tokens three segments have of four documents: one is empty at first, one has no tokens, one fills no chunk.
CUTS = ((CHUNK + 1, 0, 0, 1), (CHUNK - 1, 2 * CHUNK + 2, 0, 0), (2, 3 * CHUNK, 0, 1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lookahead": 0, "clip": 0.05},
        {"lookahead": CHUNK, "step": "normalized"},
        {"addressing_weight": 0.0, "lookahead": 2},
        {"addressing_weight": 0.0, "own_keys": True},
        {"own_keys": True, "rows": ((0, 3), (3, -1), (3, 7), (0, 0), (1, 2))},
        {"key_gradient": "all"},
        {"key_gradient": "all", "weight_decay": 0.1, "rows": ((0, 3), (3, -1), (3, 7))},
        {"weight_decay": 0.1, "rows": ((0, 3), (3, -1), (3, 7), (0, 0), (1, 2))},
        {"weight_decay": 0.1, "sparse_grad": True, "rows": ((0, 3), (3, -1), (3, 7))},
    ],
    ids=lambda options: "-".join(options) or "defaults",
)
def test_segments_are_one_sequence(options):
    check(CUTS, PLACES[0], **options)


def test_segments_in_triton():
    """A document that goes on behind its first chunk, beside one that begins; other rows than are read decay too."""
    check(((CHUNK + 1, 0), (CHUNK, CHUNK)), PLACES[1], heads=1, num_keys=4, weight_decay=0.1)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.backend)
def test_segments_in_groups(place, monkeypatch):
    """Of more documents than one launch takes: the same bits, in what they leave too."""
    cuts = CUTS if place.backend == "torch" else ((CHUNK, 0), (1, CHUNK))
    totals = [sum(lengths) for lengths in zip(*cuts, strict=True)]
    inputs = make_packed(totals, heads=1, num_keys=4, dtype=torch.float32, device=place.device)
    rows = make_rows(inputs, ((0, 3), (1, -1), (1, 7)))
    options = {"chunk_size": CHUNK, "top_k": 2, "weight_decay": 0.1, "sparse_grad": True, "backend": place.backend}
    found = []
    for most in (checks.MOST_HEADS, 1):
        monkeypatch.setattr(checks, "MOST_HEADS", most)
        carries = []
        results, gradients, left = run(in_segments(cuts, carries), inputs, rows, **options)
        tokens = {f"{name} of carry {i}": x for i, carry in enumerate(carries) for name, x in carry._asdict().items()}
        found.append(results | gradients | left._asdict() | tokens)
    assert_same_bits(*found)


def test_tokens_of_a_carry_count_as_accesses(monkeypatch):
    """Since they are read again: a call of few tokens of many documents may read more than kernels number."""
    inputs = make_packed((CHUNK - 1, CHUNK - 1))
    call = functools.partial(fast_weight_memory_varlen, chunk_size=CHUNK, top_k=2, return_carry=True)
    monkeypatch.setattr(checks, "MOST_ACCESSES", 2 * (CHUNK + 1) * 2 * 2)
    result, carry = call(**inputs)
    with pytest.raises(ValueError, match="accesses in one call"):
        call(**inputs | {"keys": result.keys, "rows": result.rows, "carry": carry})


@pytest.mark.parametrize("boundary", ["carry", "drop"])
def test_rows_that_no_segment_has_addressed_decay(boundary):
    """Segments that end where chunks do, without a carry: a row may be addressed in the last one first."""
    cuts, decayed = ((CHUNK, 0), (0, CHUNK), (CHUNK, 3 * CHUNK)), []
    inputs = make_packed((2 * CHUNK, 4 * CHUNK), num_keys=9)

    def call(queries, targets, keys, values, cu_seqlens, *, rows, gates, mask, **options):
        outputs, done = ([], []), cu_seqlens[:-1].tolist()
        for lengths in cuts:
            index = torch.cat([torch.arange(start, start + count) for start, count in zip(done, lengths, strict=True)])
            tokens = (x[index] for x in (queries, targets))
            factors = {"gates": gates[index], "mask": mask[index]}
            result = fast_weight_memory_varlen(*tokens, keys, values, bounds(lengths), rows=rows, **factors, **options)
            keys, rows = result.keys, result.rows
            decayed.append(rows.decay.tolist())
            for of_document, *found in zip(
                outputs, *(x.split(list(lengths)) for x in (result.output, result.slots, result.weights)), strict=True
            ):
                of_document.append(found)
            done = [start + count for start, count in zip(done, lengths, strict=True)]
        joined = [torch.cat(x) for x in zip(*(found for part in outputs for found in part), strict=True)]
        return result._replace(output=joined[0], slots=joined[1], weights=joined[2])

    options = {"chunk_size": CHUNK, "top_k": 2, "lookahead": 0, "weight_decay": 0.1, "boundary": boundary}
    actual, gradients, _ = run(call, inputs, **options)
    expected, wanted, _ = run(reference.fast_weight_memory_varlen, inputs, **options)
    assert_close(actual | gradients, expected | wanted, 1e-11)
    assert decayed == [pytest.approx([0.9**one, 0.9**other]) for one, other in ((1, 0), (1, 1), (2, 4))]


@st.composite
def segments(draw):
    """Lengths around a chunk's of the segments of some documents, and options."""
    chunk = draw(st.integers(1, 4))
    length = st.sampled_from(sorted({0, 1, chunk - 1, chunk, chunk + 1, 3 * chunk + 1}))
    documents = draw(st.integers(1, 4))
    cuts = draw(st.lists(st.tuples(*[length] * documents), min_size=1, max_size=4))
    options = {
        "chunk_size": chunk,
        "lookahead": draw(st.integers(0, chunk)),
        "clip": draw(st.sampled_from([None, 0.05])),
        "weight_decay": draw(st.sampled_from([0.0, 0.1])),
        "sparse_grad": draw(st.booleans()),
        "addressing_weight": draw(st.sampled_from([1.0, 0.0])),
        "own_keys": draw(st.booleans()),
        "heads": draw(st.integers(1, 2)),
        "num_keys": draw(st.integers(3, 5)),
        "gates": draw(st.booleans()),
        "mask": draw(st.sampled_from([None, "bool", "real"])),
        "seed": draw(st.integers(0, 9)),
    }
    return cuts, options


@given(segments())
def test_drawn_segments_are_one_sequence(case):
    cuts, options = case
    check(cuts, PLACES[0], **options)


@slow_in_interpreter
@settings(max_examples=10)
@given(segments())
def test_drawn_segments_by_kernels(case):
    cuts, options = case
    check(cuts, PLACES[1], **options)


def test_what_a_carry_holds():
    """The last tokens of each document, with zeros before them, and how many there have been; on the CPU."""
    inputs, carries = check(CUTS, PLACES[0], lookahead=2)
    window = CHUNK + 1
    for index, carry in enumerate(carries):
        done = torch.tensor(CUTS[: index + 1]).sum(0)
        assert carry.position.is_cpu
        assert carry.position.tolist() == done.tolist()
        for name in ("queries", "targets", "gates", "mask"):
            for document, (start, _) in enumerate(pairwise(inputs["cu_seqlens"].tolist())):
                so_far = inputs[name][start : start + int(done[document])]
                padded = torch.cat((so_far.new_zeros(window, *so_far.shape[1:]), so_far))[-window:]
                assert torch.equal(getattr(carry, name)[document], padded)


def test_gates_and_masks_come_and_go():
    """What a segment does not give is one."""
    inputs = make_packed((3, 4), heads=1)
    first, second = torch.tensor([0, 1, 3, 4, 5]), torch.tensor([2, 6])
    expected_inputs = inputs | {"gates": inputs["gates"].clone(), "mask": inputs["mask"].clone()}
    expected_inputs["gates"][second] = 1.0
    expected_inputs["mask"][first] = 1.0
    expected = reference.fast_weight_memory_varlen(**expected_inputs, chunk_size=2, top_k=2)
    carry, keys, rows, outputs = None, inputs["keys"], None, torch.empty_like(expected.output)
    for index, lengths, factor in ((first, (2, 3), "gates"), (second, (1, 1), "mask")):
        tokens = {name: inputs[name][index] for name in ("queries", "targets", factor)}
        result, carry = fast_weight_memory_varlen(
            **tokens, keys=keys, values=inputs["values"], cu_seqlens=bounds(lengths), rows=rows, carry=carry,
            return_carry=True, chunk_size=2, top_k=2,
        )  # fmt: skip
        keys, rows = result.keys, result.rows
        outputs[index] = result.output
    torch.testing.assert_close(outputs, expected.output)
    torch.testing.assert_close(tables_of(rows, inputs["values"], 2).flatten(0, 1), expected.rows.value)


def test_gradcheck_of_two_segments():
    inputs = make_packed((5, 4), heads=1, num_keys=3, width=2)
    constants = {name: inputs.pop(name) for name in ("mask", "cu_seqlens")}
    leaves = [x.requires_grad_() for x in inputs.values()]

    def call(*tensors):
        named = dict(zip(inputs, tensors, strict=True))
        result = in_segments(((3, 2), (2, 2)))(**named, **constants, rows=None, chunk_size=2, top_k=2)
        return result.output, result.keys, result.rows.value

    torch.autograd.gradcheck(call, leaves, fast_mode=True)


def test_detach_ends_gradients():
    inputs = make_packed((3, 1))
    queries = inputs["queries"].requires_grad_()
    options = {"chunk_size": 2, "top_k": 2, "rows": None}
    _, carry = fast_weight_memory_varlen(**inputs, return_carry=True, **options)
    assert carry.queries.requires_grad
    later = {name: x.detach() for name, x in inputs.items()}
    assert fast_weight_memory_varlen(**later, carry=carry, **options).keys.requires_grad
    assert not fast_weight_memory_varlen(**later, carry=carry.detach(), **options).keys.requires_grad
    assert queries.grad is None


def test_compiled_once_for_all_borders_and_numbers():
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def train(first, second):
        options = {"chunk_size": CHUNK, "top_k": 2, "return_carry": True}
        one, carry = fast_weight_memory_varlen(**first, **options)
        memory = {"keys": one.keys, "rows": one.rows, "carry": carry}
        two, carry = fast_weight_memory_varlen(**second | memory, **options)
        parts = (one.output, two.output, two.keys, two.rows.value, carry.queries)
        return sum(x.square().sum() for x in parts), carry.position

    compiled = torch.compile(train, fullgraph=True, backend=counter)
    for lengths in ((CUTS[0], CUTS[1]), ((9, 5), (1, 3)), ((CHUNK,) * 3, (CHUNK + 1, 0, 1))):
        parts = [make_packed(x, seed=seed) for seed, x in enumerate(lengths)]
        parts[1]["values"] = parts[0]["values"]
        leaves = [part[name].requires_grad_() for part in parts for name in ("queries", "gates")]
        leaves += [parts[0]["keys"].requires_grad_(), parts[0]["values"].requires_grad_()]
        for part in parts:
            for name in ("queries", "targets", "gates", "mask", "cu_seqlens"):
                torch._dynamo.mark_dynamic(part[name], 0)
        total, position = compiled(*parts)
        expected, wanted = train(*parts)
        assert torch.equal(position, wanted)
        for one, other in zip(torch.autograd.grad(total, leaves), torch.autograd.grad(expected, leaves), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    assert counter.frame_count == 1


@pytest.mark.parametrize("boundary", ["carry", "drop"])
def test_surplus_tokens_of_the_operator(boundary):
    """Those behind the last bound have no output and no gradient, and change none."""
    inputs = make_packed((CHUNK + 1, 3, 0, 2))
    given = inputs | {"cu_seqlens": inputs["cu_seqlens"][:3], "carried": torch.zeros(2, dtype=torch.int64)}
    names = ("queries", "targets", "keys", "values", "cu_seqlens", "carried", "gates", "mask")
    o = Options(chunk_size=CHUNK, top_k=2, boundary=boundary, weight_decay=0.1)
    length = int(given["cu_seqlens"][-1])
    grads = [
        testing.random_cotangent(x) for x in (inputs["targets"][:length], inputs["keys"].expand(2, -1, -1, -1, -1))
    ]

    def call(given):
        tensors = [given[name] for name in names]
        output, keys, document, slot, value, slots, weights, *kept = OPS.fast_weight_memory_varlen(
            *tensors, *(None,) * 4, True, *o
        )
        incoming = (torch.cat((grads[0], torch.full_like(output[length:], torch.nan))), grads[1], None)
        how = (document, slot, None, True, True, True, "")
        found = OPS.fast_weight_memory_varlen_backward(
            *incoming, *tensors[:3], len(tensors[3]), *tensors[4:], *how, *kept, *o
        )
        used = slot >= 0
        by_token = [output, slots, weights, *found[:2], found[4]]
        return [*by_token, keys, *found[2:4], document[used], slot[used], value[used]]

    whole = call(given)
    first = call(given | {name: inputs[name][:length] for name in ("queries", "targets", "gates", "mask")})
    for index, (one, other) in enumerate(zip(whole, first, strict=True)):
        if index < 6:
            assert (one[length:] == (-1 if index == 1 else 0)).all()
            one = one[:length]
        testing.assert_bitwise_equal(one, other)


def carried(cu_seqlens, counts, **options):
    inputs = make_packed((3, 2))
    tensors = [inputs[name] for name in ("queries", "targets", "keys", "values")]
    o = Options(**{"chunk_size": CHUNK, "top_k": 2, "lookahead": 2} | options)
    none = (None,) * 6
    return OPS.fast_weight_memory_varlen(*tensors, torch.tensor(cu_seqlens), torch.tensor(counts), *none, False, *o)


@pytest.mark.parametrize(
    "cu_seqlens, counts, options, message",
    [
        ([0, 3, 6], [0, 0], {}, "`cu_seqlens` must go from 0 to T = 5, got 0 to 6"),
        ([0, 3, 5], [0, 1], {}, "`carried` must be 0 or 2, .* got 1 for document 1 of 2 tokens"),
        ([0, 4, 5], [0, 2], {}, "no more than a document has tokens, got 2 for document 1 of 1 tokens"),
        ([0, 3, 5], [2, 0], {"boundary": "drop"}, "`carried` must be 0, .* got 2 for document 0"),
    ],
)
def test_what_the_operator_refuses(cu_seqlens, counts, options, message):
    with pytest.raises(ValueError, match=message):
        carried(cu_seqlens, counts, **options)


def bad(**changes):
    return lambda carry: carry._replace(**changes)


BAD = {
    "a tuple": (tuple, TypeError, "`carry` must be a DocumentsCarry"),
    "of other documents": (lambda c: c._replace(queries=c.queries[:1]), ValueError, r"`carry.queries` \[S, W, H, Dk\]"),
    "of another window": (lambda c: c._replace(targets=c.targets[:, 1:]), ValueError, r"must be \[2, 4, 5\], W ="),
    "gates of another window": (lambda c: c._replace(gates=c.gates[:, 1:]), ValueError, "`carry.gates`"),
    "of another dtype": (lambda c: c._replace(queries=c.queries.float()), TypeError, "the dtype of the queries"),
    "a mask of complex numbers": (lambda c: c._replace(mask=c.mask.to(torch.complex64)), TypeError, "`carry.mask`"),
    "no targets": (bad(targets=None), TypeError, "`carry.targets` must be a torch.Tensor"),
    "a number of tokens": (bad(position=3), TypeError, "`carry.position` must be a torch.Tensor"),
    "too many positions": (bad(position=torch.zeros(3, dtype=torch.int64)), ValueError, "`carry.position` must be"),
    "narrow positions": (bad(position=torch.zeros(2, dtype=torch.int32)), TypeError, "must be int64"),
    "positions on meta": (
        lambda c: c._replace(position=c.position.to("meta")),
        ValueError,
        "`carry.position` must have",
    ),
    "negative positions": (bad(position=torch.tensor([0, -1])), ValueError, r"must be at least 0, got \[0, -1\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_carry(name):
    change, error, message = BAD[name]
    inputs, options = make_packed((5, 2), width=5), {"chunk_size": CHUNK, "top_k": 2}
    _, carry = fast_weight_memory_varlen(**inputs, return_carry=True, **options)
    with pytest.raises(error, match=message):
        fast_weight_memory_varlen(**inputs, carry=change(carry), **options)


@pytest.mark.parametrize("name", ["carry", "return_carry"])
def test_segments_need_the_boundary(name):
    inputs, options = make_packed((5, 2)), {"chunk_size": CHUNK, "top_k": 2}
    _, carry = fast_weight_memory_varlen(**inputs, return_carry=True, **options)
    given = {"carry": carry} if name == "carry" else {"return_carry": True}
    with pytest.raises(ValueError, match='`boundary` must be "carry"'):
        fast_weight_memory_varlen(**inputs, **given, boundary="drop", **options)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"key_gradient": "all"}], ids=str)
def test_decay_is_a_constant(options):
    """Also one that requires a gradient, which otherwise would come of the rows that a loop makes tables from, or go on
    through every segment."""
    inputs, o = make_packed((5, 2)), {"chunk_size": CHUNK, "top_k": 2} | options
    decay = torch.tensor([0.5, 0.25], dtype=torch.float64, requires_grad=True)
    rows = make_rows(inputs, ((0, 3), (1, 2)))._replace(decay=decay)
    assert not rows.detach().decay.requires_grad
    result = fast_weight_memory_varlen(**inputs, rows=rows, **o)
    tensors = [x for x in (result.output, *result.rows) if x is not None]
    assert not any(x.requires_grad for x in tensors)
    constant = fast_weight_memory_varlen(**inputs, rows=rows.detach(), **o)
    for one, other in zip(tensors, [x for x in (constant.output, *constant.rows) if x is not None], strict=True):
        testing.assert_bitwise_equal(one, other)
