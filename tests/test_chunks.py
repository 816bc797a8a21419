"""chunks.py: how a sequence is cut, and what its reads weigh and write, the kernels beside plain PyTorch."""

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fwpkm_kernels import testing
from fwpkm_kernels.options import STEPS, Options
from fwpkm_kernels.records import Plan
from fwpkm_kernels.weights import Writes, plan_writes, plan_writes_grad, sum_reads, weigh_again
from tests.conftest import PLACES

CUTS = st.fixed_dictionaries(
    {
        "length": st.integers(0, 17),
        "chunk_size": st.sampled_from([2, 3, 4, 5, 6, 1, 10**12]),
        "lookahead": st.integers(0, 6),
        "boundary": st.sampled_from(["carry", "drop"]),
    }
).map(lambda cut: cut | {"lookahead": min(cut["lookahead"], cut["chunk_size"])})


@given(CUTS, st.integers(1, 3), st.booleans())
@settings(deadline=None)
def test_reads_are_numbered_chunk_by_chunk(cut, batch, carries):
    """The arithmetic on the device says what the list of chunks says."""
    length, o = cut.pop("length"), Options(**cut)
    carried = o.lookahead if carries and o.boundary == "carry" and length >= o.chunk_size else 0
    token, chunk_of, first, end, written = [], [], [], [], []
    output = [-1] * (length * batch)
    for i, chunk in enumerate(o.cut(length, carried)):
        begin = len(token)
        assert chunk.rows(batch).start == begin
        for position in range(chunk.first, chunk.stop):
            for item in range(batch):
                if position >= chunk.start:
                    output[position * batch + item] = len(token)
                token.append((position + carried) * batch + item)
                written.append(position < chunk.last)
        assert chunk.rows(batch).stop == len(token)
        chunk_of += [i] * (len(token) - begin)
        first += [begin] * (len(token) - begin)
        end += [len(token)] * (len(token) - begin)
    reads = o.number_reads(length, batch, torch.device("cpu"), carried)
    assert [x.tolist() for x in reads] == [token, chunk_of, first, end, written, output]


class Case:
    """Reads of a sequence with tied slots, and the gradients that come in."""

    def __init__(
        self,
        o: Options,
        length: int,
        batch: int,
        carried: int,
        num_slots: int,
        mask: str | None,
        gates: bool,
        **kind: Any,
    ):
        dtype, device = kind.get("dtype", torch.float64), kind.get("device", "cpu")
        self.o, self.length, self.batch, self.carried, self.num_slots = o, length, batch, carried, num_slots
        reads = o.layout(length, batch, carried).positions * batch
        generator = torch.Generator().manual_seed(reads)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64).to(device, dtype)

        self.scores, self.grads = normal(reads, o.top_k), [normal(reads, o.top_k) for _ in "wc"]
        self.slots = testing.make_slots((reads, o.top_k), min(num_slots, 30), "zipf").to(device)
        # By batch item, as the user has them: time first they are transposed.
        tokens = (batch, length + carried)
        self.gates = normal(*tokens) if gates else None
        self.mask = None
        if mask is not None:
            self.mask = (normal(*tokens) * (mask == "some")).clamp(min=0.0)
        self.grad_queries = normal(reads, 1, 3)

    def run(self, backend: str) -> tuple[Writes, list[Tensor]]:
        """What forward makes, and all small results: of forward and of backward."""
        o, size = self.o._replace(backend=backend), (self.batch, self.length, self.o.top_k)
        outputs = (self.slots.new_full(size, -1), self.scores.new_full(size, torch.nan))
        gates, mask = (None if x is None else x.transpose(0, 1) for x in (self.gates, self.mask))
        where = (self.length, self.batch, self.carried)
        with testing.poisoned_memory():
            writes = plan_writes(self.scores, self.slots, self.num_slots, gates, mask, *where, outputs, o)
            results = [*writes.plan, writes.counts, outputs[0], outputs[1], writes.weights, writes.write_weights]
            weights, log_rows = weigh_again(self.scores, writes.plan, *where, o)
            forward = (self.scores, writes._replace(weights=weights), self.gates, self.mask)
            grad_scores, grad_gates = plan_writes_grad(*self.grads, *forward, *where, o)
            by_token = sum_reads(self.grad_queries, *where, torch.float32, o)
            results += [log_rows, weights, grad_scores, by_token]
            results += [] if grad_gates is None else [grad_gates]
        return writes, results


def assert_same_in_triton(case: Case, bound: float = 1e-12) -> Writes:
    """Integers bitwise, numbers up to rounding."""
    _, expected = case.run("torch")
    writes, actual = case.run("triton")
    for i, (x, wanted) in enumerate(zip(actual, expected, strict=True)):
        assert (x.shape, x.dtype) == (wanted.shape, wanted.dtype), i
        assert x.is_contiguous(), i
        if x.is_floating_point():
            torch.testing.assert_close(x, wanted, rtol=bound, atol=bound)
        else:
            assert torch.equal(x, wanted), i
    return writes


@example(
    cut={"length": 17, "chunk_size": 5, "lookahead": 2, "boundary": "carry"},
    options={"top_k": 3},
    batch=3,
    carries=False,
    num_slots=20,
    mask="some",
    gates=True,
)
@example(
    cut={"length": 18, "chunk_size": 4, "lookahead": 1, "boundary": "drop"},
    options={"top_k": 3},
    batch=2,
    carries=False,
    num_slots=20,
    mask="some",
    gates=True,
)
@example(
    cut={"length": 9, "chunk_size": 4, "lookahead": 1, "boundary": "drop"},
    options={"top_k": 3, "step": "normalized"},
    batch=2,
    carries=False,
    num_slots=20,
    mask="some",
    gates=True,
)
@example(
    cut={"length": 9, "chunk_size": 4, "lookahead": 2, "boundary": "carry"},
    options={"top_k": 3, "step": "gradient", "weighting": "silu"},
    batch=2,
    carries=True,
    num_slots=20,
    mask="some",
    gates=True,
)
@example(
    cut={"length": 5, "chunk_size": 3, "lookahead": 1, "boundary": "carry"},
    options={"top_k": 2},
    batch=0,
    carries=True,
    num_slots=4,
    mask="some",
    gates=True,
)
@given(
    CUTS,
    st.fixed_dictionaries(
        {
            "top_k": st.integers(1, 5),
            "weighting": st.sampled_from(["softmax", "silu", "relu"]),
            "temperature": st.sampled_from([1.0, 0.6]),
            "step": st.sampled_from(STEPS),
        }
    ),
    st.integers(1, 3),
    st.booleans(),
    st.integers(1, 30),
    st.sampled_from(["some", None, "none left"]),
    st.booleans(),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_kernels_say_what_pytorch_says(cut, options, batch, carries, num_slots, mask, gates):
    o = Options(**{name: x for name, x in cut.items() if name != "length"}, **options)
    length = cut["length"]
    carried = o.lookahead if carries and o.boundary == "carry" and length >= o.chunk_size else 0
    case = Case(o, length, batch, carried, num_slots, mask, gates, device=PLACES[1].device)
    assert_same_in_triton(case)


@pytest.mark.parametrize("boundary", ["carry", "drop"])
@pytest.mark.parametrize("mask", [None, "some"])
def test_one_hot_slot_over_many_tiles(mask, boundary):
    """Every access of a chunk on one slot: a segment that spans several programs of every kernel."""
    o = Options(chunk_size=40, top_k=4, lookahead=2, boundary=boundary)
    case = Case(o, 90, 2, 0, 1, mask, True, dtype=torch.float32, device=PLACES[1].device)
    writes = assert_same_in_triton(case, 1e-5)
    sizes = [chunk.rows(2).stop - chunk.rows(2).start for chunk in o.cut(90)]
    ends = torch.cat([torch.full((4 * size,), 4 * size) for size in sizes])
    assert torch.equal(writes.plan.end.cpu().long(), ends)
    assert writes.plan.start.count_nonzero() == 0


def test_slots_of_many_chunks_need_64_bits():
    """chunk·N + slot passes 2³¹, and so may the slots themselves."""
    for num_slots in (2**30, 2**33):
        o = Options(chunk_size=4, top_k=2)
        case = Case(o, 14, 2, 0, num_slots, "some", False, device=PLACES[1].device)
        case.slots += num_slots - 1 - case.slots.max()
        writes = assert_same_in_triton(case)
        assert int(writes.plan.rows.max()) == num_slots - 1
        assert writes.plan.rows.dtype == (torch.int32 if num_slots == 2**30 else torch.int64)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("boundary", ["carry", "drop"])
def test_what_is_not_written_may_be_nan(boundary, step):
    """Gates, mask and write gradients of tokens that no chunk writes reach no result."""
    o = Options(chunk_size=5, top_k=2, lookahead=2, boundary=boundary, step=step)
    case = Case(o, 5, 2, 0, 20, "some", True, device=PLACES[1].device)
    _, expected = case.run("triton")
    case.gates[:, -2:] = case.mask[:, -2:] = torch.nan
    case.grads[1][-4:] = torch.nan
    _, actual = case.run("triton")
    for x, wanted in zip(actual, expected, strict=True):
        testing.assert_bitwise_equal(x, wanted)


def test_nan_and_infinite_scores_weigh_as_in_pytorch():
    inf, nan = torch.inf, torch.nan
    scores = torch.tensor([[-inf, -inf], [inf, 1.0], [nan, 1.0], [-inf, 2.0], [-1e30, 1e30], [0.0, -0.0]])
    for weighting in ("softmax", "silu", "relu"):
        o = Options(chunk_size=6, top_k=2, weighting=weighting, step="normalized", boundary="drop", lookahead=0)
        case = Case(o, 6, 1, 0, 9, None, False, dtype=torch.float32, device=PLACES[1].device)
        case.scores = scores.to(PLACES[1].device)
        writes, expected = (case.run(backend)[0] for backend in ("triton", "torch"))
        torch.testing.assert_close(writes.weights, expected.weights, equal_nan=True)
        torch.testing.assert_close(writes.write_weights, expected.write_weights, equal_nan=True)


def test_a_plan_is_one_of_each_chunk():
    """Its slices by chunk are what sorting each chunk alone gives."""
    o = Options(chunk_size=5, top_k=3, lookahead=2)
    case = Case(o, 12, 2, 0, 8, None, False, device=PLACES[1].device)
    writes, _ = case.run("triton")
    for chunk in o.cut(12):
        rows = chunk.rows(2)
        plan = Plan(*(x[rows.start * 3 : rows.stop * 3] for x in writes.plan))
        ordered, order = torch.sort(case.slots[rows].flatten(), stable=True)
        assert torch.equal(plan.order, order)
        assert torch.equal(plan.rows.long(), ordered)
        assert torch.equal(plan.start.long(), torch.searchsorted(ordered, ordered))
        assert torch.equal(plan.end.long(), torch.searchsorted(ordered, ordered, right=True))
