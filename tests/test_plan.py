"""plan.py: slots → segments."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fwpkm_kernels import testing
from fwpkm_kernels.plan import check_rows, count_accesses, count_among, plan_segments, segment_totals

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


def test_a_plan_of_any_shape_and_layout():
    slots = testing.make_slots((6, 4), 9, seed=1)
    for layout in ("transposed", "sliced", "strided"):
        for plain, strided in zip(
            plan_segments(slots, 9), plan_segments(testing.with_layout(slots, layout), 9), strict=True
        ):
            testing.assert_bitwise_equal(strided, plain, layout)


@pytest.mark.parametrize("slots", [[-1, 3], [3, 9]])
def test_range_is_checked_on_cpu(slots):
    with pytest.raises(ValueError, match=r"`slots` must lie in \[0, 9\)"):
        check_rows(plan_segments(torch.tensor(slots), 9), 9)


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
