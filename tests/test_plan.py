"""plan.py: slots → segments."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fwpkm_kernels import plan as plans
from fwpkm_kernels import testing
from fwpkm_kernels._checks import check_rows
from fwpkm_kernels.kernels import picks as kernels
from fwpkm_kernels.plan import count_accesses, count_among, plan_picks, plan_segments, segment_blocks, segment_totals
from fwpkm_kernels.records import Picks
from tests.conftest import SLOW_IN_INTERPRETER
from tests.helpers.picks import make_picks

slot_lists = st.lists(st.integers(0, 11), max_size=200).map(lambda slots: torch.tensor(slots, dtype=torch.int64))


@given(slot_lists)
@settings(deadline=None)
def test_segments_are_the_sorted_accesses(slots):
    plan = plan_segments(slots, 12)
    expected = sorted(range(len(slots)), key=lambda access: slots[access].item())  # stable, as the plan must be
    assert plan.order.tolist() == expected
    assert plan.rows.tolist() == [slots[access].item() for access in expected]
    for position, row in enumerate(plan.rows.tolist()):
        start, end = plan.start[position].item(), plan.end[position].item()
        assert [i for i, other in enumerate(plan.rows.tolist()) if other == row] == list(range(start, end))


@given(slot_lists, slot_lists)
@settings(deadline=None)
def test_counts(slots, count_slots):
    own = torch.bincount(slots, minlength=12)[slots]
    plan = plan_segments(slots, 12)
    assert torch.equal(count_accesses(plan).long(), own)
    among = torch.bincount(count_slots, minlength=12)[slots].clamp(min=1)
    assert torch.equal(count_among(plan, count_slots).long(), among)
    counted = torch.arange(len(slots)) % 3 > 0
    some = torch.bincount(slots[counted], minlength=12)[slots].clamp(min=1)
    assert torch.equal(count_accesses(plan, counted).long(), some)


@given(slot_lists, st.integers(1, 4))
@settings(deadline=None)
def test_totals_are_sums_over_the_accesses(slots, picks):
    slots = slots[: len(slots) // picks * picks].view(-1, picks)
    generator = torch.Generator().manual_seed(slots.numel())
    vectors = torch.randn(slots.shape[0], 3, generator=generator, dtype=torch.float64)
    weights = torch.randn(slots.shape, generator=generator, dtype=torch.float64)
    positions, rows, totals = segment_totals(plan_segments(slots, 12), vectors, weights)
    expected = torch.zeros(12, 3, dtype=torch.float64)
    expected.index_add_(0, slots.flatten(), (weights.unsqueeze(2) * vectors.unsqueeze(1)).flatten(0, 1))
    assert rows.tolist() == sorted(set(slots.flatten().tolist()))
    assert len(positions) == len(rows)
    torch.testing.assert_close(totals, expected[rows])


@pytest.mark.parametrize("elements", [1, 6, 10**6])
def test_blocks_of_totals_are_the_totals(elements, monkeypatch):
    monkeypatch.setattr(plans, "_BLOCK_ELEMENTS", elements)
    generator = torch.Generator().manual_seed(0)
    vectors, weights = (torch.randn(40, size, generator=generator) for size in (3, 4))
    plan = plan_segments(testing.make_slots((40, 4), 25, seed=1), 25)
    _, expected_rows, expected = segment_totals(plan, vectors, weights)
    rows, blocks = segment_blocks(plan, vectors, weights)
    numbers, totals = zip(*blocks, strict=True)
    assert torch.equal(rows, expected_rows)
    assert [number for block in numbers for number in range(len(rows))[block]] == list(range(len(rows)))
    assert all(block.numel() <= max(elements, 3) for block in totals)
    testing.assert_bitwise_equal(torch.cat(totals), expected)


def test_a_plan_of_any_shape_and_layout():
    slots = testing.make_slots((6, 4), 9, seed=1)
    for layout in ("transposed", "sliced", "strided"):
        for plain, strided in zip(
            plan_segments(slots, 9), plan_segments(testing.with_layout(slots, layout), 9), strict=True
        ):
            testing.assert_bitwise_equal(strided, plain, layout)


def slopes(half_scores, sub_keys, n, first_row=0):
    """u and u' of each sub-key of a half, in float64."""
    heads = sub_keys.shape[1]
    probabilities = half_scores.double().softmax(-1)
    probabilities[:first_row] = 0.0
    columns = (sub_keys % (2 * n)).flatten().long()
    usage = probabilities.new_zeros(2 * n).index_add_(0, columns, probabilities.flatten())
    usage /= max(1, (len(sub_keys) - first_row) * heads)
    return (usage + 1e-8).log() + usage / (usage + 1e-8), 1 / (usage + 1e-8) + 1e-8 / (usage + 1e-8).square()


def check_picks(picks, n, first_row=0):
    """`plan_picks` is the sort, bit by bit, and the slopes at the usage of each sub-key."""
    half_scores, sub_keys = picks
    _, heads, _, top_k = sub_keys.shape
    with testing.poisoned_memory(), testing.assert_unchanged(*picks):
        plan = plan_picks(picks, n, first_row=first_row)
    sort = plan_segments(sub_keys, heads * 2 * n)
    assert plan.order.tolist() == sort.order.tolist()
    assert plan.tokens.tolist() == (sort.order // (heads * 2 * top_k)).tolist()
    sizes = torch.bincount(sub_keys.flatten().long(), minlength=heads * 2 * n)
    assert plan.first.tolist() == [0, *sizes.cumsum(0).tolist()]
    slope, bend = slopes(half_scores, sub_keys, n, first_row)
    rtol = 1e-5 if half_scores.dtype == torch.float32 else 1e-12
    torch.testing.assert_close(plan.slope.double(), slope, rtol=rtol, atol=rtol, equal_nan=True)
    torch.testing.assert_close(plan.bend.double(), bend, rtol=rtol, atol=rtol, equal_nan=True)


# rows, heads, n, K: tiles that are full and not, K = 1, K = n, K that is no power of two, odd n, many of either.
PICKS = [(5, 1, 9, 3), (16, 2, 20, 1), (37, 1, 5, 5), (33, 3, 6, 2), (1, 1, 1, 1)]
PICKED = [pytest.param((18, 1, 257, 33), False, id="many")]
PICKED += [pytest.param(x, same, id=f"{x}-{'same' if same else 'different'}") for x in PICKS for same in (False, True)]
#: And as many sub-keys as are counted, each of which is a program.
PICKED += [pytest.param((18, 1, kernels.MAX_KEYS, 64), False, marks=SLOW_IN_INTERPRETER, id="most")]


@pytest.mark.parametrize("shape, same", PICKED)
def test_counting_picks_is_sorting_them(shape, same, triton_place):
    check_picks(make_picks(*shape, same=same, device=triton_place.device), shape[2], first_row=2)


@pytest.mark.parametrize("rows, blocks", [(70, {}), (48, {"block_t": 1}), (70, {"block_t": 2, "block_a": 4})], ids=str)
def test_more_tiles_and_tokens_than_a_program_takes_at_a_time(rows, blocks, monkeypatch, triton_place):
    table = kernels.plan_config
    monkeypatch.setattr(kernels, "plan_config", lambda *sizes: table(*sizes)._replace(**blocks))
    half_scores, sub_keys = make_picks(rows, 2, 7, 3, device=triton_place.device)
    check_picks(Picks(half_scores.double(), sub_keys), 7)


@pytest.mark.parametrize("limit", ["MAX_KEYS", "MAX_WORDS"])
def test_more_picks_than_can_be_counted(limit, monkeypatch, triton_place):
    monkeypatch.setattr(kernels, limit, 8)
    monkeypatch.setattr(kernels, "count_kernel", None)
    check_picks(make_picks(20, 2, 9, 3, device=triton_place.device), 9, first_row=2)


def test_usage_at_extreme_scores(triton_place):
    """Of a row with NaN the sub-keys have no usage, and others keep theirs."""
    picks = make_picks(4, 1, 9, 3, device=triton_place.device)
    picks.half_scores[0, 0, 0] = torch.tensor([torch.nan, 1.0, 0.0])
    picks.half_scores[1, 0, 1] = torch.tensor([1e30, 0.0, -torch.inf])
    check_picks(picks, 9)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(4096, 1, 512, 8), (513, 4, 512, 32), (40000, 1, 1000, 8), (4096, 1, 4096, 64)], ids=str
)
def test_counting_at_real_sizes(shape):
    for same in (False, True):
        check_picks(make_picks(*shape, same=same, device="cuda"), shape[2])


@pytest.mark.parametrize("slots", [[-1, 3], [3, 9]])
def test_range_is_checked_on_cpu(slots):
    with pytest.raises(ValueError, match=r"`slots` must lie in \[0, 9\)"):
        check_rows(plan_segments(torch.tensor(slots), 9), 9)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_slots_counted_that_are_out_of_range_are_no_other_slots(dtype):
    """Though their low 32 bits are those of a slot."""
    plan = plan_segments(torch.tensor([1, 0, 3], dtype=dtype), 4)
    count_slots = torch.tensor([2**32 + 1, 2**33, -(2**32), 2**32 - 1, 2**31, -(2**31) - 1, 0, 0, -1, 4])
    assert count_among(plan, count_slots).tolist() == [1, 2, 1]


@pytest.mark.parametrize("asserts", [False, True])
def test_rows_are_narrow_on_a_gpu_unless_kernels_assert_their_range(asserts, monkeypatch):
    """2³² would be row 0 in 32 bits, and pass."""
    monkeypatch.setattr(plans, "ASSERTS", asserts)
    with FakeTensorMode():
        slots = torch.empty(3, 2, dtype=torch.int64, device="cuda")
        assert plan_segments(slots, 12).rows.dtype == (torch.int64 if asserts else torch.int32)


@pytest.mark.gpu
def test_a_plan_on_a_gpu_under_debug_holds_slots_as_they_came(monkeypatch):
    monkeypatch.setattr(plans, "ASSERTS", True)
    assert plan_segments(torch.tensor([3, 2**32, -(2**32)], device="cuda"), 12).rows.tolist() == [-(2**32), 3, 2**32]


@pytest.mark.gpu
def test_a_plan_on_a_gpu_is_the_one_on_the_cpu():
    slots = testing.make_slots((4096, 8), 2**18, "zipf")
    for on_cpu, on_gpu in zip(plan_segments(slots, 2**18), plan_segments(slots.cuda(), 2**18), strict=True):
        assert torch.equal(on_gpu.cpu().long(), on_cpu.long())


@pytest.mark.gpu
def test_no_operation_waits_for_the_gpu():
    from fwpkm_kernels import chunk_value_update, chunk_value_update_, product_key_lookup, sparse_value_gather

    queries, keys = testing.make_lookup_inputs(64, 1, 32, 16, device="cuda")
    inputs = testing.make_update_inputs(64, 4, 1024, 16, gates=True, mask="bool", device="cuda")
    queries.requires_grad_(), keys.requires_grad_(), inputs.values.requires_grad_(), inputs.weights.requires_grad_()

    def step():
        product_key_lookup(queries, keys, 4)[0].sum().backward()
        for sparse_grad in (False, True):
            out = sparse_value_gather(inputs.values, inputs.slots, inputs.weights, sparse_grad=sparse_grad)
            torch.autograd.grad(out.sum(), [inputs.values, inputs.weights])
        chunk_value_update(**inputs._asdict(), clip=1.0, weight_decay=0.1).sum().backward()
        chunk_value_update_(**inputs._replace(values=inputs.values.detach())._asdict(), weight_decay=0.1)

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
