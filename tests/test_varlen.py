"""A memory for each packed document: that of the loop over them, and independent of the others."""

import functools
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import reference
from benchmarks.measure import allocations_cpu, peak_cpu
from fwpkm_kernels import Rows, fast_weight_memory_varlen, testing
from fwpkm_kernels import _checks as checks
from fwpkm_kernels.compact import count_compact_rows
from fwpkm_kernels.options import Options
from fwpkm_kernels.packing import MOST_LENGTHS, number_packed_reads, pack
from tests.conftest import PLACES
from tests.helpers.memory import PLACES_SLOW, assert_close, assert_same_bits
from tests.helpers.varlen import CHUNK, LENGTHS, bounds, make_packed, make_rows, run, tables_of

f64 = torch.float64
#: What is asked of them are their sizes.
KEYS = torch.empty(2, 2, 4, 1)
#: A place is unused, a row is not read, and documents 0 and 4 have rows of their own.
PLACES_OF_ROWS = ((0, 3), (4, -1), (4, 7), (0, 0), (1, 2))


def check(inputs, place, rows=None, **options) -> Rows:
    """Results and gradients are those of the reference; returns the rows."""
    inputs = {name: x if name == "cu_seqlens" else x.to(place.device) for name, x in inputs.items()}
    options = {"chunk_size": CHUNK, "top_k": 2, **options}
    with testing.poisoned_memory(), testing.assert_unchanged(inputs):
        actual, gradients, left = run(fast_weight_memory_varlen, inputs, rows, backend=place.backend, **options)
    expected, wanted, _ = run(reference.fast_weight_memory_varlen, inputs, rows, **options)
    assert_close(actual | gradients, expected | wanted)
    return left


OPTIONS = [
    {},
    {"boundary": "drop", "lookahead": 2},
    {"clip": 0.05, "lookahead": 0, "step": "normalized"},
    {"weight_decay": 0.1, "clip": 0.05},
    {"boundary": "drop", "weight_decay": 0.1, "step": "gradient"},
    {"addressing_weight": 0.0},
    {"lookahead": CHUNK, "weighting": "silu", "score": "dot"},
    {"key_gradient": "all"},
]


@PLACES_SLOW
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "defaults")
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_documents_are_those_of_the_loop(options, own, place):
    """Of every length, with keys and rows of their own or without."""
    inputs = make_packed(own_keys=own)
    rows = None
    if own:
        rows = make_rows(inputs, PLACES_OF_ROWS)
    check(inputs, place, rows, **options)


def test_documents_in_triton():
    """What the interpreter runs in `make test`: a step with a tail behind it, beside a document that only reads."""
    check(make_packed((CHUNK + 1, 2), heads=1, num_keys=4), PLACES[1])


@pytest.mark.parametrize("lengths", [(0,), (1,), (0, 0), (CHUNK,) * 3, (1,) * 9, (2 * CHUNK, 1, 2 * CHUNK)], ids=str)
@pytest.mark.parametrize("boundary", ["carry", "drop"])
def test_lengths_of_documents(lengths, boundary):
    check(make_packed(lengths, mask=None), PLACES[0], boundary=boundary)


@pytest.mark.parametrize("boundary", ["carry", "drop"])
def test_tails_are_read_and_written_together(boundary):
    """However many documents there are; under "drop" the tokens that are written come first."""
    o = Options(chunk_size=CHUNK, lookahead=2, boundary=boundary)
    cu_seqlens = bounds((CHUNK + 3, 2, 0, 3, CHUNK)).tolist()
    packing = pack(cu_seqlens, None, KEYS, o)
    step, tails = packing.spans
    assert (step.reads, tails.reads) == (2 * CHUNK, 8)
    reads = number_packed_reads(packing, o, torch.device("cpu"))
    expected = [7, 8, 9, 10, 11, 4, 5, 6] if boundary == "carry" else [4, 9, 7, 8, 5, 6, 10, 11]
    assert reads.reads.token[-8:].tolist() == expected
    assert reads.reads.written[-8:].tolist() == [boundary == "drop"] * 2 + [False] * 6
    by_lookup = reads.in_order_of_lookups(reads.document)[-8:].tolist()
    assert by_lookup == ([1, 1, 3, 3, 3, 0, 0, 0] if boundary == "carry" else [1, 1, 0, 0, 0, 3, 3, 3])


def test_no_launch_takes_too_many_documents(monkeypatch):
    """Of several heads each: those of a step, and tails that are filled up to one length, are several groups."""
    monkeypatch.setattr(checks, "MOST_HEADS", 4)
    cu_seqlens = bounds((CHUNK + 1,) * 3 + (1, 2 * CHUNK)).tolist()
    packing = pack(cu_seqlens, None, KEYS, Options(chunk_size=CHUNK))
    assert [part.memories for part in packing.parts] == [[0, 1], [2, 3], [0], [], [1, 2], [3]]
    assert packing.span_steps == [0, 0, 1, None]
    monkeypatch.setattr(checks, "NARROW_ROWS", 2 * 2 * 4)  # the sub-keys of one document
    packing = pack(cu_seqlens, None, KEYS, Options(chunk_size=CHUNK))
    assert max(len(part.memories) for part in packing.parts) == 1


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("boundary", ["carry", "drop"])
def test_documents_in_groups(own, boundary, monkeypatch):
    """Have the bits that they have together, and as many rows; in compiled code too."""
    inputs = make_packed((CHUNK + 1, CHUNK, 2, CHUNK + 1), own_keys=own, num_keys=4, dtype=torch.float32)
    rows = make_rows(inputs, ((0, 3), (3, -1), (3, 7), (1, 2)))
    options = {"chunk_size": CHUNK, "top_k": 2, "boundary": boundary, "weight_decay": 0.1, "backend": "torch"}
    compiled = torch.compile(fast_weight_memory_varlen, backend="aot_eager")
    results, gradients, left = run(fast_weight_memory_varlen, inputs, rows, **options)
    expected = results | gradients | left._asdict()
    monkeypatch.setattr(checks, "MOST_HEADS", 4)
    for function in (fast_weight_memory_varlen, compiled):
        results, gradients, left = run(function, inputs, rows, **options)
        assert_same_bits(results | gradients | left._asdict(), expected)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_tails_that_are_filled_up(own):
    """To one length, in chunks of more tokens than tails may have lengths."""
    chunk = 2 * MOST_LENGTHS + 1
    lengths = (chunk + 5, 4, 2 * chunk + 6, 0, chunk + 4, 1)
    check(make_packed(lengths, own_keys=own), PLACES[0], chunk_size=chunk)


@pytest.mark.parametrize("missing", ["gates", "mask"])
def test_without_gates_or_mask(missing):
    inputs = make_packed()
    del inputs[missing]
    check(inputs, PLACES[0], boundary="drop")


def parts_of(inputs, order):
    """The documents in another order, or some of them."""
    pieces = list(pairwise(inputs["cu_seqlens"].tolist()))
    tokens = torch.cat([torch.arange(*pieces[document]) for document in order])
    by_token = {name: inputs[name][tokens] for name in ("queries", "targets", "gates", "mask")}
    lengths = [pieces[document][1] - pieces[document][0] for document in order]
    return {**inputs, **by_token, "cu_seqlens": bounds(lengths)}


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.backend)
@pytest.mark.parametrize("boundary", ["carry", pytest.param("drop", marks=pytest.mark.slow)])
def test_a_document_does_not_depend_on_the_others(place, boundary):
    """Neither on which they are nor on their order: the same bits in Triton, and on CPUs up to rounding."""
    lengths = (CHUNK + 1, 2 * CHUNK + 2, 2) if place.backend == "triton" else LENGTHS
    inputs = make_packed(lengths, num_keys=4, dtype=torch.float32)
    inputs = {name: x if name == "cu_seqlens" else x.to(place.device) for name, x in inputs.items()}
    options = {"chunk_size": CHUNK, "top_k": 2, "boundary": boundary, "backend": place.backend}
    names = ("queries", "targets", "gates")

    def by_document(order):
        given = parts_of(inputs, order)
        leaves = [given[name].requires_grad_() for name in names]
        result = fast_weight_memory_varlen(**given, **options)
        tables = tables_of(result.rows, given["values"], len(order))
        total = sum(x.square().sum() for x in (result.output, result.keys, result.rows.value))
        by_token = dict(zip(names, torch.autograd.grad(total, leaves), strict=True))
        by_token |= {"output": result.output, "slots": result.slots, "weights": result.weights}
        sizes = [lengths[document] for document in order]
        by_token = {name: dict(zip(order, x.split(sizes), strict=True)) for name, x in by_token.items()}
        memories = {"keys": result.keys, "tables": tables}
        return by_token | {name: dict(zip(order, x, strict=True)) for name, x in memories.items()}

    everyone = by_document(range(len(lengths)))
    for order in ([1], list(reversed(range(len(lengths))))):
        some = by_document(order)
        for document in order:
            one, other = ({name: x[document] for name, x in found.items()} for found in (some, everyone))
            if place.backend == "triton":
                assert_same_bits(one, other)
            else:
                assert_close(one, other, 1e-5)


def test_segments_go_on_from_rows_and_keys():
    """Two calls that are cut where chunks end are one, with gradients through the rows and the keys between them."""
    lengths = (3 * CHUNK, 2 * CHUNK + 1, CHUNK)
    inputs = make_packed(lengths)
    options = {"chunk_size": CHUNK, "top_k": 2, "lookahead": 0}
    first = [CHUNK, 2 * CHUNK, 0]
    pieces = list(pairwise(inputs["cu_seqlens"].tolist()))
    heads = [torch.arange(start, start + cut) for (start, _), cut in zip(pieces, first, strict=True)]
    tails = [torch.arange(start + cut, stop) for (start, stop), cut in zip(pieces, first, strict=True)]

    def in_segments(queries, targets, keys, values, cu_seqlens, *, gates, mask, rows, **options):
        outputs, result = [], None
        for parts in (heads, tails):
            index = torch.cat(parts)
            result = fast_weight_memory_varlen(
                queries[index], targets[index], keys if result is None else result.keys, values,
                bounds([len(x) for x in parts]), rows=rows if result is None else result.rows,
                gates=gates[index], mask=mask[index], **options,
            )  # fmt: skip
            outputs.append([x.split([len(x) for x in parts]) for x in (result.output, result.slots, result.weights)])
        joined = [
            torch.cat([x for pair in zip(*both, strict=True) for x in pair]) for both in zip(*outputs, strict=True)
        ]
        return result._replace(output=joined[0], slots=joined[1], weights=joined[2])

    rows = make_rows(inputs, ((0, 3), (2, 5), (2, -1)))
    actual, gradients, _ = run(in_segments, inputs, rows, **options)
    expected, wanted, _ = run(fast_weight_memory_varlen, inputs, rows, **options)
    assert_close(actual | gradients, expected | wanted)


def test_rows_that_are_handed_out():
    """In the order of documents and slots, each once, with those given, and nothing else; then unused places."""
    inputs = make_packed((CHUNK + 1, 1), heads=1, num_keys=8)
    rows = make_rows(inputs, ((1, 63), (0, -1), (0, 0)))
    left = fast_weight_memory_varlen(**inputs, rows=rows, chunk_size=CHUNK, top_k=1, backend="torch").rows
    used = left.slot >= 0
    names = list(zip(left.document[used].tolist(), left.slot[used].tolist(), strict=True))
    assert names == sorted(set(names))
    assert {(1, 63), (0, 0)} <= set(names)
    assert not used[len(names) :].any()
    assert not left.document[~used].any()
    assert not left.value[~used].any()
    assert len(left.slot) == count_compact_rows(CHUNK + 2, 64, 2, 3)
    with torch.no_grad():
        without = fast_weight_memory_varlen(**inputs, rows=left, chunk_size=CHUNK, top_k=1, backend="torch").rows
    assert len(without.slot) == CHUNK + 2 + len(left.slot)


def test_what_requires_no_gradient_costs_none():
    """Without a gradient of the values no array of N rows is made, and keys and queries may need none."""
    inputs = make_packed((2 * CHUNK + 1, 3))
    options = {"chunk_size": CHUNK, "top_k": 2}
    _, expected, _ = run(fast_weight_memory_varlen, inputs, **options)
    for name in ("queries", "targets", "keys", "values", "gates"):
        leaf = inputs[name].detach().requires_grad_()
        result = fast_weight_memory_varlen(**{**inputs, name: leaf}, **options)
        outputs = [result.output, result.keys, tables_of(result.rows, inputs["values"], 2)]
        if name == "values":
            outputs[2] = tables_of(result.rows, leaf, 2)
        used = [(x, testing.random_cotangent(x, seed=i)) for i, x in enumerate(outputs) if x.requires_grad]
        outputs, cotangents = zip(*used, strict=True)
        (found,) = torch.autograd.grad(outputs, leaf, cotangents)
        testing.assert_bitwise_equal(found, expected[f"gradient of {name}"], name)


def test_a_nan_at_an_unused_place_reaches_no_gradient(place):
    """As the gradient of a row's norm is, where the row is 0."""
    inputs = make_packed((2, 1), heads=1, num_keys=8, dtype=torch.float32, device=place.device)
    leaves = [inputs[name].requires_grad_() for name in ("queries", "targets", "keys", "values", "gates")]
    options = {"chunk_size": 2, "top_k": 2, "lookahead": 0, "backend": place.backend}
    rows = fast_weight_memory_varlen(**inputs, **options).rows
    rows = fast_weight_memory_varlen(**inputs, **options, rows=rows).rows
    assert (rows.slot < 0).any()
    found = torch.autograd.grad(rows.value.square().sum(1).sqrt().sum(), leaves)
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("options", [{}, {"boundary": "drop", "clip": 0.1, "weight_decay": 0.1}], ids=str)
def test_gradcheck(options):
    inputs = make_packed((2 * CHUNK + 1, CHUNK, 2), heads=1, num_keys=4, width=2)
    rows = make_rows(inputs, ((0, 3), (2, -1), (2, 5)))
    constants = {name: inputs.pop(name) for name in ("mask", "cu_seqlens")}
    leaves = [x.requires_grad_() for x in (*inputs.values(), rows.value)]

    def call(*tensors):
        *given, value = tensors
        named = dict(zip(inputs, given, strict=True))
        result = fast_weight_memory_varlen(
            **named, **constants, rows=rows._replace(value=value), chunk_size=CHUNK, top_k=2, **options
        )
        return result.output, result.keys, result.rows.value

    torch.autograd.gradcheck(call, leaves, fast_mode=True)
    once = torch.autograd.grad(call(*leaves)[0].square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(once[0].sum(), leaves[0])


def test_compiled_where_tokens_and_documents_vary_in_number():
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def train(inputs):
        result = fast_weight_memory_varlen(**inputs, chunk_size=CHUNK, top_k=2)
        return result.output.square().sum() + result.keys.square().sum() + result.rows.value.square().sum()

    compiled = torch.compile(train, fullgraph=True, backend=counter)
    for lengths in (LENGTHS, (9, 5, 1), (CHUNK,) * 4):
        inputs = make_packed(lengths)
        leaves = [inputs[name].requires_grad_() for name in ("queries", "keys", "values", "gates")]
        for name in ("queries", "targets", "gates", "mask", "cu_seqlens"):
            torch._dynamo.mark_dynamic(inputs[name], 0)
        found = torch.autograd.grad(compiled(inputs), leaves)
        for one, other in zip(found, torch.autograd.grad(train(inputs), leaves), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    assert counter.frame_count == 1


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.backend)
def test_autocast_changes_nothing(place):
    inputs = make_packed((CHUNK + 1, 2), heads=1, num_keys=4, dtype=torch.float32, device=place.device)
    call = functools.partial(fast_weight_memory_varlen, chunk_size=CHUNK, top_k=2, backend=place.backend)
    expected = call(**inputs)
    with torch.autocast(place.device, torch.bfloat16):
        found = call(**inputs)
    for one, other in zip(
        (*found[:2], *found.rows[:3], *found[3:]), (*expected[:2], *expected.rows[:3], *expected[3:]), strict=True
    ):
        testing.assert_bitwise_equal(one, other)


def test_half_precision_tables():
    inputs = make_packed(dtype=torch.bfloat16, mask=None)
    result, gradients, _ = run(fast_weight_memory_varlen, inputs, chunk_size=CHUNK, top_k=2, weight_decay=0.1)
    for name, x in (result | gradients).items():
        assert x.isfinite().all(), name
    assert result["tables"].dtype == gradients["gradient of values"].dtype == torch.bfloat16


def bad(**changes):
    return lambda inputs: {**inputs, **changes}


def rows_of(places, dtype=torch.float64, **changes):
    return lambda inputs: {
        **inputs,
        "rows": make_rows({"values": inputs["values"].to(dtype)}, places)._replace(**changes),
    }


BAD = {
    "not from 0": (bad(cu_seqlens=torch.tensor([1, 26])), ValueError, "`cu_seqlens` must go from 0 to T"),
    "not to T": (bad(cu_seqlens=torch.tensor([0, 25])), ValueError, "`cu_seqlens` must go from 0 to T"),
    "decreasing": (bad(cu_seqlens=torch.tensor([0, 9, 8, 26])), ValueError, "must not decrease"),
    "of no documents": (bad(cu_seqlens=torch.tensor([0])), ValueError, "at least one document"),
    "on meta": (bad(cu_seqlens=torch.tensor([0, 26], device="meta")), ValueError, "`cu_seqlens` must have data"),
    "of floats": (bad(cu_seqlens=torch.tensor([0.0, 26.0])), TypeError, "`cu_seqlens` must be int64 or int32"),
    "a list": (bad(cu_seqlens=[0, 26]), TypeError, "`cu_seqlens` must be a torch.Tensor"),
    "a batch": (lambda x: {**x, "queries": x["queries"].unsqueeze(0)}, ValueError, r"\[T, H, Dk\]"),
    "keys of too few": (
        lambda x: {**x, "keys": x["keys"].repeat(2, 1, 1, 1, 1)},
        ValueError,
        "each of the S documents",
    ),
    "gates of a batch": (lambda x: {**x, "gates": x["gates"].unsqueeze(0)}, ValueError, r"`gates` must have 1 dim"),
    "no record": (lambda x: {**x, "rows": tuple(make_rows(x, ((0, 1),)))}, TypeError, "`rows` must be Rows"),
    "no such document": (rows_of(((5, 1),)), ValueError, r"`rows.document` must lie in \[0, 5\)"),
    "no such slot": (rows_of(((0, 36),)), ValueError, r"`rows.slot` must lie in \[-1, 36\)"),
    "twice": (rows_of(((0, 3), (1, 3), (0, 3))), ValueError, "document 0, slot 3 more than once"),
    "of other widths": (
        rows_of(((0, 3),), value=torch.zeros(1, 2)),
        ValueError,
        r"as wide as `values` \[N, D\], got \[1, 2\] against \[36, 3\]",
    ),
    "of too few values": (
        rows_of(((0, 3), (1, 2)), value=torch.zeros(1, 3)),
        ValueError,
        r"a row for each of `rows.slot` \[R\], got \[1, 3\] against \[2\]",
    ),
    "of another dtype": (rows_of(((0, 3),), torch.float32), TypeError, "`rows.value` must have the dtype of `values`"),
    "decays of too few": (
        rows_of(((0, 3),), decay=torch.ones(2, dtype=f64)),
        ValueError,
        r"`rows.decay` must be \[5\]",
    ),
    "a decay of numbers": (rows_of(((0, 3),), decay=0.9), TypeError, "`rows.decay` must be a torch.Tensor"),
    "narrow decays": (rows_of(((0, 3),), decay=torch.ones(5)), TypeError, "`rows.decay` must be torch.float64"),
    "sparse with a table for each": (bad(sparse_grad=True, key_gradient="all"), ValueError, "`sparse_grad`=True needs"),
    "narrow slots": (rows_of(((0, 3),), slot=torch.tensor([3], dtype=torch.int32)), TypeError, "must be int64"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    change, error, message = BAD[name]
    with pytest.raises(error, match=message):
        fast_weight_memory_varlen(**change(make_packed()), chunk_size=CHUNK, top_k=2)


@pytest.mark.parametrize("name", ["not from 0", "not to T", "decreasing", "no such document", "twice"])
def test_bad_data_in_the_loop_of_compiled_code(name):
    """Where it is known there only."""
    change, error, message = BAD[name]
    options = {"chunk_size": CHUNK, "top_k": 2, "key_gradient": "all"}
    compiled = torch.compile(functools.partial(fast_weight_memory_varlen, **options), backend="eager")
    with pytest.raises(error, match=message):
        compiled(**change(make_packed()))


@pytest.mark.parametrize("chunk_size", [CHUNK, 2**31 - 1])
def test_cu_seqlens_may_be_int32(chunk_size):
    """A chunk may be longer than all documents: a call that is given no carry, and asked for none, makes none."""
    inputs = make_packed()
    narrow = {**inputs, "cu_seqlens": bounds(LENGTHS, torch.int32)}
    options = {"chunk_size": chunk_size, "top_k": 2, "weight_decay": 0.1, "boundary": "drop"}
    found, expected = (fast_weight_memory_varlen(**x, **options) for x in (narrow, inputs))
    testing.assert_bitwise_equal(found.output, expected.output)
    writes = torch.tensor([-(-length // chunk_size) for length in LENGTHS], dtype=torch.float64)
    for result in (found, expected):
        torch.testing.assert_close(result.rows.decay, 0.9**writes)


@st.composite
def cases(draw):
    """Documents around a chunk's length, and options that change what is read, written or counted."""
    chunk = draw(st.sampled_from([1, 2, 3, 4, 2 * MOST_LENGTHS + 1]))
    length = st.sampled_from(sorted({0, 1, chunk - 1, chunk, chunk + 1, 2 * chunk, 3 * chunk + 1}))
    options = {
        "chunk_size": chunk,
        "top_k": draw(st.integers(1, 3)),
        "lookahead": draw(st.integers(0, chunk)),
        "boundary": draw(st.sampled_from(["carry", "drop"])),
        "step": draw(st.sampled_from(["paper", "gradient", "normalized"])),
        "weight_decay": draw(st.sampled_from([0.0, 0.1])),
        "clip": draw(st.sampled_from([None, 0.05])),
        "addressing_weight": draw(st.sampled_from([1.0, 0.0])),
    }
    how = {
        "own_keys": draw(st.booleans()),
        "heads": draw(st.integers(1, 2)),
        "num_keys": draw(st.integers(3, 5)),
        "gates": draw(st.booleans()),
        "mask": draw(st.sampled_from([None, "bool", "real"])),
        "seed": draw(st.integers(0, 9)),
    }
    lengths = draw(st.lists(length, min_size=1, max_size=5))
    places = st.tuples(st.integers(0, len(lengths) - 1), st.integers(-1, how["num_keys"] ** 2 - 1))
    used = draw(st.lists(places, max_size=4, unique_by=lambda place: place if place[1] >= 0 else object()))
    return lengths, how, used, options


@given(cases())
def test_drawn_documents_are_those_of_the_loop(case):
    lengths, how, places, options = case
    inputs = make_packed(lengths, **how)
    check(inputs, PLACES[0], make_rows(inputs, places) if places else None, **options)


def test_backward_keeps_no_table():
    """Nor waits for the values to stay: they may be written before it runs."""
    inputs = make_packed((5, 3), num_keys=9)
    values = inputs["values"].detach().clone().requires_grad_()
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append(x.shape) or x, lambda x: x):
        result = fast_weight_memory_varlen(**{**inputs, "values": values}, chunk_size=2, top_k=2)
    assert values.shape not in shapes
    with torch.no_grad():
        values.add_(1)
    result.output.sum().backward()


def test_a_sparse_gradient_sums_over_documents(place):
    """That of the dense one, with an entry for each slot that was read from the values, once on CPUs."""
    inputs = make_packed(heads=1, num_keys=8, device=place.device)
    rows = make_rows(inputs, ((0, 3), (0, -1), (4, 7)))
    options, gradients = {"chunk_size": CHUNK, "top_k": 2, "weight_decay": 0.1, "backend": place.backend}, []
    for sparse_grad in (False, True):
        values = inputs["values"].clone().requires_grad_()
        result = fast_weight_memory_varlen(**inputs | {"values": values}, rows=rows, sparse_grad=sparse_grad, **options)
        loss = result.output.square().sum() + result.rows.value.square().sum()
        gradients += torch.autograd.grad(loss, values)
    dense, sparse = gradients
    assert sparse.is_sparse
    torch.testing.assert_close(sparse.to_dense(), dense)
    document, slot = (x[result.rows.slot >= 0].tolist() for x in (result.rows.document, result.rows.slot))
    given = {(0, 3), (4, 7)}
    read = {one for number, one in zip(document, slot, strict=True) if (number, one) not in given}
    assert set(sparse._indices()[0].tolist()) == read
    assert sparse.is_cuda or (sparse.is_coalesced() and len(sparse.values()) == len(read))


def test_a_sparse_gradient_in_half_precision_is_rounded_once(place):
    """However many documents share a slot: it has the bits of the dense one."""
    documents = 400 if place.backend == "torch" else 5
    inputs = make_packed((4,) * documents, heads=1, num_keys=4, dtype=torch.bfloat16, device=place.device)
    options, gradients = {"chunk_size": CHUNK, "top_k": 2, "backend": place.backend}, []
    for sparse_grad in (False, True):
        values = inputs["values"].clone().requires_grad_()
        result = fast_weight_memory_varlen(**inputs | {"values": values}, sparse_grad=sparse_grad, **options)
        cotangents = [testing.random_cotangent(x) for x in (result.output, result.rows.value)]
        gradients += torch.autograd.grad((result.output, result.rows.value), values, cotangents)
    dense, sparse = gradients
    assert sparse.dtype == torch.bfloat16
    testing.assert_bitwise_equal(sparse.to_dense(), dense)


def test_a_sparse_gradient_is_not_differentiated_again(place):
    inputs = make_packed((2, 3), heads=1, num_keys=4, device=place.device)
    leaves = [inputs[name].requires_grad_() for name in ("values", "targets")]
    options = {"chunk_size": 2, "top_k": 2, "backend": place.backend}
    result = fast_weight_memory_varlen(**inputs, sparse_grad=True, **options)
    sparse, _ = torch.autograd.grad(result.output.square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(torch.sparse.sum(sparse), leaves[1])


@pytest.mark.parametrize("lengths", [(0,), (1, 0)], ids=str)
def test_a_sparse_gradient_of_few_tokens(lengths):
    inputs = make_packed(lengths)
    values = inputs["values"].requires_grad_()
    result = fast_weight_memory_varlen(**inputs, chunk_size=CHUNK, top_k=2, sparse_grad=True)
    (grad,) = torch.autograd.grad(result.output.sum() + result.rows.value.sum(), values)
    assert grad.is_sparse
    assert grad.shape == values.shape
    assert (grad._nnz() > 0) == (sum(lengths) > 0)


@pytest.mark.parametrize(
    ("requires_grad", "sparse_grad", "most"), [(False, False, 0), (True, True, 0), (True, False, 1)]
)
def test_no_array_has_n_rows(requires_grad, sparse_grad, most):
    """Forward and backward; but the gradient of the values, if it is dense."""
    inputs = make_packed((9, 4), heads=1, num_keys=200, width=16, dtype=torch.float32)
    values = inputs["values"].requires_grad_(requires_grad)
    leaves = [inputs["queries"].requires_grad_(), *([values] if requires_grad else [])]

    def train():
        result = fast_weight_memory_varlen(**inputs, chunk_size=CHUNK, top_k=2, sparse_grad=sparse_grad)
        return torch.autograd.grad(result.output.sum(), leaves)

    train()
    assert sum(size >= values.numel() for size in allocations_cpu(train)) == most


def test_decay_costs_no_mask_for_each_chunk():
    """Which rows decay after a chunk is made when the chunk has been read, and is not kept."""
    inputs = make_packed((64,), heads=1, num_keys=40, mask=None, gates=False, width=2, dtype=torch.float32)
    options, peaks = {"chunk_size": 1, "top_k": 8, "lookahead": 0, "addressing_weight": 0.0}, []
    for weight_decay in (0.0, 0.1):
        call = functools.partial(fast_weight_memory_varlen, **inputs, weight_decay=weight_decay, **options)
        peaks.append(peak_cpu(call))
    rows = 64 * 8
    assert peaks[1] - peaks[0] < 16 * rows  # of a few arrays of the rows, and not of 64


def test_what_backward_keeps_is_made_once():
    """With no memory beside it that is not used."""
    inputs = make_packed((40, 24, 33), heads=1, num_keys=40, mask=None, gates=False, width=4, dtype=torch.float32)
    call = functools.partial(fast_weight_memory_varlen, **inputs, chunk_size=8, addressing_weight=0.0)
    without, kept = peak_cpu(call), []
    inputs["queries"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x):
        call()
    assert peak_cpu(call) - without < 0.75 * sum(kept)  # of which a part is needed without gradients too


def test_documents_that_write_nothing_have_no_copies_of_the_keys():
    """Which would be larger than all else that a batch of many short documents keeps."""
    inputs = make_packed([2] * 6)
    inputs["queries"].requires_grad_()
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.shape) or x, lambda x: x):
        fast_weight_memory_varlen(**inputs, chunk_size=5, top_k=2)
    copies = [size[0] for size in sizes if size[1:] == inputs["keys"].shape]
    assert copies == [4]  # T // C = 2 chunks at most, and as many documents that have one
