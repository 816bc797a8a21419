"""Compact tables against brute force: which rows they have, how they are gathered, and how gradients come back."""

import pytest
import torch
from torch import Tensor

from fwpkm_kernels import compact, testing
from fwpkm_kernels.kernels import compute_dtype
from fwpkm_kernels.records import Rows

# reads, picks, slots, documents, rows of an earlier call
SIZES = {
    "one table": (7, 3, 40, None, None),
    "more accesses than slots": (9, 4, 6, None, None),
    "every slot": (64, 2, 4, None, None),
    "one slot": (5, 3, 1, None, None),
    "documents": (8, 3, 12, 3, None),
    "every row of every document": (80, 3, 4, 3, None),
    "earlier rows": (6, 2, 30, 4, 9),
    "earlier rows, and every row is touched": (80, 3, 4, 3, 5),
    "earlier rows of one table": (6, 2, 30, None, 9),
    "no reads": (0, 3, 12, None, None),
    "no reads, earlier rows": (0, 3, 12, 2, 4),
    "no picks": (4, 0, 12, None, None),
}
WIDTH = 5


def draw(name: str, device: str) -> tuple[Tensor, int, Tensor | None, int, Rows | None]:
    """Slots, N, the document of each read, S and the rows of an earlier call, a third of which are unused."""
    reads, picks, num_slots, documents, left = SIZES[name]
    generator = torch.Generator().manual_seed(len(name))
    slots = torch.randint(num_slots, (reads, picks), generator=generator)
    document = None if documents is None else torch.randint(documents, (reads,), generator=generator)
    count = documents or 1
    earlier = None
    if left is not None:
        # In any order, with unused rows between.
        at = torch.randperm(count * num_slots, generator=generator)[:left]
        is_used = torch.arange(left) % 3 != 1
        value = torch.randn(left, WIDTH, generator=generator, dtype=torch.float64) * is_used.unsqueeze(1)
        parts = (at // num_slots * is_used, torch.where(is_used, at % num_slots, -1), value)
        earlier = Rows(*(x.to(device) for x in parts))
    document = None if document is None else document.to(device)
    return slots.to(device), num_slots, document, count, earlier


def used_of(document: Tensor, slot: Tensor) -> list[tuple[int, int]]:
    """(document, slot) of the rows in use."""
    return [(d, s) for d, s in zip(document.tolist(), slot.tolist(), strict=True) if s >= 0]


@pytest.mark.parametrize("name", SIZES)
def test_rows_and_ids(name, place):
    slots, num_slots, document, count, earlier = draw(name, place.device)
    found = compact.compact(slots, num_slots, document=document, num_documents=count, earlier=earlier)
    numbers = torch.zeros(len(slots), dtype=torch.int64) if document is None else document
    touched = [(d, s) for d, row in zip(numbers.tolist(), slots.tolist(), strict=True) for s in row]
    left = [] if earlier is None else used_of(earlier.document, earlier.slot)
    expected = sorted({*touched, *left})
    assert used_of(found.document, found.slot) == expected
    size = min(slots.numel() + (0 if earlier is None else len(earlier.slot)), count * num_slots)
    assert found.slot.shape == found.document.shape == (size,)
    assert (found.slot[len(expected) :] == -1).all()
    assert (found.document[len(expected) :] == 0).all()
    assert found.ids.shape == slots.shape
    assert found.ids.flatten().tolist() == [expected.index(x) for x in touched]
    if earlier is None:
        assert found.earlier is None
    else:
        of_all = zip(earlier.document.tolist(), earlier.slot.tolist(), strict=True)
        assert found.earlier.tolist() == [expected.index(x) if x[1] >= 0 else -1 for x in of_all]


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", SIZES)
def test_gather(name, dtype, layout, place):
    """Rows come from the table, or from an earlier call; what is unused is 0."""
    slots, num_slots, document, count, earlier = draw(name, place.device)
    values = torch.randn(num_slots, WIDTH, generator=torch.Generator().manual_seed(1)).to(place.device, dtype)
    earlier = earlier and earlier._replace(value=earlier.value.to(dtype))
    found = compact.compact(slots, num_slots, document=document, num_documents=count, earlier=earlier)
    given = testing.with_layout(values, layout)
    with testing.poisoned_memory(), testing.assert_unchanged(given):
        table = compact.gather_compact(given, found, earlier, place.backend)
    expected = torch.zeros(len(found.slot), WIDTH, dtype=dtype, device=place.device)
    expected[: len(used_of(*found[:2]))] = values[found.slot[found.slot >= 0]]
    if earlier is not None:
        expected[found.earlier[earlier.slot >= 0]] = earlier.value[earlier.slot >= 0]
    testing.assert_bitwise_equal(table, expected)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "strided"])
@pytest.mark.parametrize("shape", [(50, 20, 5), (3, 3, 5000), (1, 1, 1), (9, 0, 5), (9, 4, 0)], ids=str)
def test_put(shape, layout, place):
    """In any order; rows without a slot, whatever they hold, and slots without a row change nothing."""
    num_slots, count, width = shape
    generator = torch.Generator().manual_seed(0)
    values, rows = torch.randn(num_slots, width, generator=generator), torch.randn(count, width, generator=generator)
    slot = torch.randperm(num_slots, generator=generator)[:count]
    is_unused = torch.arange(count) % 4 == 2
    slot[is_unused], rows[is_unused] = -1, torch.nan
    expected = values.clone()
    expected[slot[~is_unused]] = rows[~is_unused]
    table = testing.with_layout(values.to(place.device), layout)
    compact.put_rows(table, slot.to(place.device), rows.to(place.device), place.backend)
    testing.assert_bitwise_equal(table.cpu(), expected)


@pytest.mark.parametrize("name", SIZES)
def test_gradients_come_back(name, place):
    """Dense and sparse: the rows of a slot are summed over documents; those without a slot may hold anything."""
    slots, num_slots, document, count, _ = draw(name, place.device)
    found = compact.compact(slots, num_slots, document=document, num_documents=count)
    grads = torch.randn(len(found.slot), WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    grads = torch.where(found.slot.unsqueeze(1) < 0, torch.nan, grads.to(place.device))
    expected = torch.zeros(num_slots, WIDTH, dtype=torch.float64, device=place.device)
    for slot, grad in zip(found.slot.tolist(), grads, strict=True):
        if slot >= 0:
            expected[slot] += grad
    given = (grads, found.slot, num_slots)
    summed = compact.sum_rows(*given, torch.float64, place.backend)
    torch.testing.assert_close(summed, expected, rtol=1e-14, atol=1e-14)
    if document is None:
        sparse = compact.sparse_rows(*given)
        testing.assert_bitwise_equal(sparse.to_dense(), expected)
        if place.device == "cpu":
            assert sparse.is_coalesced()
            torch._validate_sparse_coo_tensor_args(sparse.indices(), sparse.values(), sparse.shape, True)
            assert torch.equal(sparse.indices()[0], found.slot[found.slot >= 0])
        testing.assert_bitwise_equal(compact.spread_rows(*given, place.backend), expected)
    sparse = compact.sparse_sums(*given, torch.float64, place.backend)
    torch.testing.assert_close(sparse.to_dense(), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sparse_sums(dtype, place):
    """Rows of a slot are summed, and rounded once; those without a slot, anywhere among them, may hold anything."""
    slot = torch.tensor([3, -1, 0, 3, -1, 7, 0, 3] * 100)
    # Rows that bfloat16 rounds, and whose sums float32 does not.
    grads = 1.0 + torch.randint(4, (800, WIDTH), generator=torch.Generator().manual_seed(0)) / 1024.0
    expected = torch.zeros(9, WIDTH, dtype=torch.float64).index_add_(0, slot[slot >= 0], grads[slot >= 0].double())
    grads = torch.where(slot.unsqueeze(1) < 0, torch.nan, grads).to(place.device, compute_dtype(dtype))
    sparse = compact.sparse_sums(grads, slot.to(place.device), 9, dtype, place.backend)
    testing.assert_bitwise_equal(sparse.to_dense().cpu(), expected.to(dtype))
    if place.device == "cpu":
        assert sparse.is_coalesced()
        assert sparse.indices().tolist() == [[0, 3, 7]]
    else:  # of an entry for each slot at most, all but three are 0
        assert sparse._nnz() == 9


def test_sparse_sums_of_unused_rows(place):
    """Where a call has been given all rows that it reads."""
    grads = torch.full((4, WIDTH), torch.nan, device=place.device)
    unused = torch.full((4,), -1, device=place.device)
    sparse = compact.sparse_sums(grads, unused, 9, torch.bfloat16, place.backend)
    assert sparse.to_dense().count_nonzero() == 0


@pytest.mark.gpu
def test_nothing_waits_for_a_gpu(errors_on_synchronisation):
    slots, num_slots, document, count, earlier = draw("earlier rows", "cuda")
    values = torch.randn(num_slots, WIDTH, device="cuda", dtype=torch.float64)
    torch.cuda.set_sync_debug_mode("error")
    found = compact.compact(slots, num_slots, document=document, num_documents=count, earlier=earlier)
    table = compact.gather_compact(values, found, earlier, "auto")
    compact.sum_rows(table, found.slot, num_slots, values.dtype, "auto")
    compact.sparse_rows(table, found.slot, num_slots)
    compact.sparse_sums(table, found.slot, num_slots, values.dtype, "auto")
    compact.put_rows(values, found.slot, table, "auto")
