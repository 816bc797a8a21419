"""sparse_value_gather: both backends, forward and backward, against the reference."""

import functools

import pytest
import torch
from torch.autograd import gradcheck

import reference
from fwpkm_kernels import SparseValueGather, sparse_value_gather, testing
from tests.conftest import Place

# rows, J, N, D: odd sizes, one token, one pick, one column, J beyond a tile, more than 2·PIECE accesses of few slots,
# a row wider than 1024.
SHAPES = [
    (7, 3, 50, 13),
    (1, 1, 1, 1),
    (5, 4, 9, 1),
    (3, 512, 100, 5),
    (40, 8, 3, 20),
    (9, 4, 30, 32),  # rows of whole cache lines
    (2, 3, 12, 1030),
]
DTYPES = {  # table, weights
    "float32": (torch.float32, torch.float32),
    "float32-bfloat16-weights": (torch.float32, torch.bfloat16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "bfloat16-float32-weights": (torch.bfloat16, torch.float32),
    "float16": (torch.float16, torch.float32),
    "float64": (torch.float64, torch.float64),
}


def check(inputs: testing.GatherInputs, place: Place, *, cotangent: str = "contiguous"):
    """Output and gradients inside the error budget; nothing unwritten, no input changed."""
    like = inputs.values.new_empty(*inputs.slots.shape[:-1], inputs.values.shape[1])
    with testing.poisoned_memory(), testing.assert_unchanged(inputs):
        testing.assert_matches_reference(
            functools.partial(sparse_value_gather, backend=place.backend),
            reference.sparse_value_gather,
            inputs._asdict(),
            wrt=("values", "weights"),
            cotangent=testing.random_cotangent(like, layout=cotangent),
            reduction_length=max(inputs.slots.numel(), inputs.values.shape[1]),
        )


@pytest.mark.parametrize("pattern", ["uniform", "zipf", "one_slot"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, pattern, place):
    check(testing.make_gather_inputs(*shape, slot_pattern=pattern, device=place.device), place)


@pytest.mark.parametrize("dtypes", DTYPES)
def test_dtypes(dtypes, place):
    table, weights = DTYPES[dtypes]
    inputs = testing.make_gather_inputs(12, 8, 20, 24, dtype=table, weights_dtype=weights, device=place.device)
    check(inputs, place)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "strided", "expanded"])
def test_strides_of_inputs_and_of_incoming_gradients(layout, place):
    inputs = testing.make_gather_inputs((3, 4), 5, 30, 9, device=place.device, layout=layout)
    check(inputs, place, cotangent=layout)


@pytest.mark.parametrize("layout", ["sliced", "strided"])
def test_strides_that_flatten_to_strides(layout, place):
    """Slots of one pick, whose flat view is no copy."""
    inputs = testing.make_gather_inputs((4,), 1, 30, 9, device=place.device)
    check(inputs._replace(slots=testing.with_layout(inputs.slots, layout)), place)


def test_int32_slots(place):
    values, slots, weights = testing.make_gather_inputs(device=place.device)
    out = sparse_value_gather(values, slots, weights, backend=place.backend)
    narrow = sparse_value_gather(values, slots.int(), weights, backend=place.backend)
    testing.assert_bitwise_equal(narrow, out)


# Just below, at and above the lengths at which a segment is cut, 2 pieces from 64 accesses on and 3 from 96 on, behind
# accesses that fill a piece's place but for one, or hardly begin one.
@pytest.mark.parametrize(
    "length, before", [(63, 31), (64, 0), (64, 31), (65, 1), (95, 1), (96, 0), (96, 31), (127, 31), (200, 1)]
)
def test_hot_slots(length, before, place):
    """A hot slot between cold ones, and a second hot one right behind it."""
    slots = torch.cat((torch.arange(before), torch.full((length,), 40), torch.full((70,), 41), torch.tensor([50])))
    generator = torch.Generator().manual_seed(length)
    inputs = testing.GatherInputs(
        torch.randn(60, 6, generator=generator).to(place.device),
        slots[torch.randperm(len(slots), generator=generator)].unsqueeze(1).to(place.device),
        torch.randn(len(slots), 1, generator=generator).to(place.device),
    )
    check(inputs, place)


@pytest.mark.parametrize("pattern", ["uniform", "one_slot"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_gradient_is_the_dense_one(dtype, pattern, place):
    inputs = testing.make_gather_inputs(30, 4, 25, 10, dtype=dtype, slot_pattern=pattern, device=place.device)._asdict()
    run = functools.partial(sparse_value_gather, backend=place.backend)
    _, dense = testing.forward_and_gradients(run, inputs, wrt=("values", "weights"))
    _, sparse = testing.forward_and_gradients(
        functools.partial(run, sparse_grad=True), inputs, wrt=("values", "weights")
    )
    assert sparse["values"].layout == torch.sparse_coo
    assert sparse["values"]._nnz() == 120
    testing.assert_bitwise_equal(sparse["values"].to_dense(), dense["values"])
    testing.assert_bitwise_equal(sparse["weights"], dense["weights"])


def test_sparse_gradient_trains_a_million_slots(place):
    """No dense gradient: SparseAdam moves only the rows that were read."""
    table = torch.nn.Parameter(torch.zeros(2**20, 8, device=place.device))
    optimizer = torch.optim.SparseAdam([table], lr=0.1)
    slots = torch.tensor([[5, 2**20 - 1], [5, 77]], device=place.device)
    out = sparse_value_gather(table, slots, torch.ones_like(slots).float(), sparse_grad=True, backend=place.backend)
    out.sum().backward()
    assert table.grad.is_sparse
    optimizer.step()
    assert table.detach().abs().sum(1).nonzero().flatten().tolist() == [5, 77, 2**20 - 1]


def test_rows_that_were_not_read_get_no_gradient(place):
    values, slots, weights = testing.make_gather_inputs(device=place.device)
    values.requires_grad_()
    sparse_value_gather(values, slots, weights, backend=place.backend).sum().backward()
    testing.assert_untouched_rows_equal(torch.zeros_like(values), values.grad, slots)


@pytest.mark.parametrize("wrt", ["values", "weights"])
def test_gradient_of_one_input_only(wrt, place):
    inputs = testing.make_gather_inputs(device=place.device)._asdict()
    run = functools.partial(sparse_value_gather, backend=place.backend)
    _, both = testing.forward_and_gradients(run, inputs, wrt=("values", "weights"))
    _, one = testing.forward_and_gradients(run, inputs, wrt=(wrt,))
    testing.assert_bitwise_equal(one[wrt], both[wrt], wrt)


def test_nan_reaches_only_the_tokens_that_read_it(place):
    values, slots, weights = testing.make_gather_inputs(8, 3, 40, 5, device=place.device)
    expected = sparse_value_gather(values, slots, weights, backend=place.backend)
    values[slots[0, 0]] = torch.nan
    out = sparse_value_gather(values, slots, weights, backend=place.backend)
    readers = (slots == slots[0, 0]).any(1)
    assert out[readers].isnan().all()
    testing.assert_bitwise_equal(out[~readers], expected[~readers])


@pytest.mark.parametrize(("shape", "picks", "width"), [((0,), 3, 6), ((2, 0), 3, 6), ((4,), 0, 6), ((4,), 3, 0)])
def test_empty(shape, picks, width, place):
    values, slots, weights = testing.make_gather_inputs(shape, picks, 10, width, device=place.device)
    values.requires_grad_(), weights.requires_grad_()
    out = sparse_value_gather(values, slots, weights, backend=place.backend)
    testing.assert_bitwise_equal(out.detach(), torch.zeros(*shape, width, device=place.device))
    out.sum().backward()
    assert values.grad.count_nonzero() == 0
    assert weights.grad.shape == weights.shape


def test_gradcheck():
    values, slots, weights = testing.make_gather_inputs(5, 3, 6, 4, dtype=torch.float64)
    assert gradcheck(
        lambda v, w: SparseValueGather.apply(v, slots, w), [values.requires_grad_(), weights.requires_grad_()]
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["uniform", "zipf", "one_slot"])
def test_real_sizes_on_a_gpu(pattern, dtype, triton_place):
    check(
        testing.make_gather_inputs(4096, 8, 2**16, 512, slot_pattern=pattern, dtype=dtype, device="cuda"), triton_place
    )
