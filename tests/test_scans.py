"""The kernels of the whole-sequence value scan, each against a few lines of plain PyTorch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fwpkm_kernels import testing
from fwpkm_kernels.kernels import compute_dtype
from fwpkm_kernels.kernels.scans import ReadGradConfig, read_grad_config
from fwpkm_kernels.kernels.segments import segment_config, segment_rows
from fwpkm_kernels.kernels.update import restore_rows
from fwpkm_kernels.plan import plan_segments
from tests.helpers.scans import Chunk, make_chunk, run_read, run_read_grad

# B, positions, written positions, output positions, J, N, D
SHAPES = {
    "a re-read": (3, 6, 5, 5, 3, 40, 5),
    "nothing in both": (3, 6, 2, 3, 3, 40, 5),
    "nothing written": (3, 4, 0, 4, 3, 40, 5),
    "no output": (3, 4, 4, 0, 3, 40, 5),
    "neither": (2, 2, 0, 0, 3, 40, 5),
    "all of both": (2, 5, 5, 5, 1, 1, 1),
    "two tiles": (1, 5, 4, 4, 19, 40, 7),
    "wide": (1, 3, 2, 2, 5, 9, 1030),
    "no picks": (2, 4, 3, 3, 0, 9, 5),
    "no columns": (2, 4, 3, 3, 3, 9, 0),
    "no rows": (2, 0, 0, 0, 3, 9, 5),
    "no batch": (0, 4, 3, 3, 3, 9, 5),
}
# table, activations
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float16),
    (torch.float16, torch.float32),
    (torch.float64, torch.float64),
]


def padded(rows: Tensor, before: int, after: int) -> Tensor:
    """`rows` [P, B, D] as [M, D], between rows of zeros."""
    return torch.nn.functional.pad(rows.flatten(0, 1), (0, 0, before, after))


def plain_read(chunk: Chunk) -> tuple[Tensor, Tensor]:
    """Errors and output of a chunk."""
    predictions = torch.einsum("mj,mjd->md", chunk.weights, chunk.values[chunk.slots])
    written, outputs = chunk.targets.shape[:2].numel(), chunk.grad_output.shape[:2].numel()
    errors = torch.zeros_like(predictions)
    errors[:written] = predictions[:written] - chunk.targets.flatten(0, 1)
    return errors, predictions[len(predictions) - outputs :].view(chunk.grad_output.shape)


def plain_read_grad(chunk: Chunk, factor: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of predictions, weights, write weights and targets."""
    rows, written, outputs = len(chunk.slots), chunk.targets.shape[:2].numel(), chunk.grad_output.shape[:2].numel()
    is_written = (torch.arange(rows, device=chunk.slots.device) < written).unsqueeze(1)
    old, steps = chunk.values[chunk.slots], factor * chunk.steps[chunk.step_rows]
    errors, _ = plain_read(chunk)
    r = torch.einsum("mj,mjd->md", chunk.write_weights, steps) * is_written
    grad_predictions = padded(chunk.grad_output, rows - outputs, 0) - r
    grad_weights = torch.einsum("md,mjd->mj", grad_predictions, old)
    grad_write_weights = -torch.einsum("md,mjd->mj", errors, steps)
    return grad_predictions, grad_weights, grad_write_weights, r[:written].view(chunk.targets.shape)


def in_compute_dtype(chunk: Chunk) -> Chunk:
    dtype = compute_dtype(chunk.values.dtype)
    return Chunk(*(x.to(dtype) if x.is_floating_point() else x for x in chunk))


def check(chunk: Chunk, *, factor: float = -0.6, **options: Any) -> None:
    """Both kernels inside the error budget."""
    exact, baseline = testing.as_float64(chunk), in_compute_dtype(chunk)
    length = max(chunk.slots.shape[1], chunk.values.shape[1])
    dtype, activations = baseline.values.dtype, chunk.targets.dtype
    names = ("errors", "output", "grad_predictions", "grad_weights", "grad_write_weights", "grad_targets")
    for name, actual, expected, plain in zip(
        names,
        (*run_read(chunk), *run_read_grad(chunk, factor, **options)),
        (*plain_read(exact), *plain_read_grad(exact, factor)),
        (*plain_read(baseline), *plain_read_grad(baseline, factor)),
        strict=True,
    ):
        assert actual.dtype == (activations if name in ("output", "grad_targets") else dtype), name
        assert name in ("output", "grad_targets") or actual.is_contiguous(), name
        testing.assert_within_budget(actual, expected, plain.to(actual.dtype), name=name, reduction_length=length)


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_plain_pytorch(shape, triton_place):
    check(make_chunk(SHAPES[shape], device=triton_place.device))


@pytest.mark.parametrize(("table", "activations"), DTYPES)
def test_dtypes(table, activations, triton_place):
    check(make_chunk((3, 6, 5, 4, 4, 40, 24), table=table, activations=activations, device=triton_place.device))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "strided"])
def test_strides(layout, triton_place):
    check(make_chunk(SHAPES["a re-read"], layout=layout, device=triton_place.device))


def test_slots_of_32_bits(triton_place):
    chunk = make_chunk(SHAPES["a re-read"], device=triton_place.device)
    check(chunk._replace(slots=chunk.slots.int(), step_rows=chunk.step_rows.int()))


@pytest.mark.parametrize("block_j", [1, 2, 4, 8])
def test_one_tile_and_several(block_j, triton_place):
    check(make_chunk(SHAPES["wide"], device=triton_place.device), config=ReadGradConfig(block_j, 4))


@pytest.mark.gpu
@pytest.mark.parametrize(("table", "activations"), DTYPES)
@pytest.mark.parametrize("picks", [8, 20])
def test_real_sizes_on_a_gpu(picks, table, activations, triton_place):
    shape = (8, 513, 512, 512, picks, 2**16, 512)
    check(make_chunk(shape, table=table, activations=activations, device=triton_place.device))


def test_rows_that_are_not_written(triton_place):
    """Their errors and r are exactly 0, whatever they read, and what would be written there is not looked at."""
    chunk = make_chunk((3, 6, 4, 6, 3, 40, 5), device=triton_place.device)
    chunk.values[39] = chunk.steps[39] = torch.nan
    chunk.slots[:12].clamp_(max=38)
    chunk.slots[12:, 0] = 39
    chunk.step_rows[:12].clamp_(max=38)
    chunk.step_rows[12:] = 39
    chunk.write_weights[12:] = torch.nan
    errors, output = run_read(chunk)
    assert errors[12:].count_nonzero() == 0
    assert output[4:].isnan().all()
    grad_predictions, grad_weights, grad_write_weights, _ = run_read_grad(chunk, 0.5)
    testing.assert_bitwise_equal(grad_predictions[12:], chunk.grad_output.flatten(0, 1)[12:])
    assert grad_weights[12:, 0].isnan().all()
    assert grad_write_weights[12:].count_nonzero() == 0
    assert grad_predictions.isfinite().all()


def test_nan_stays_in_its_row(triton_place):
    chunk = make_chunk((3, 6, 4, 6, 3, 40, 5), device=triton_place.device)
    chunk.targets[1, 2] = torch.nan
    errors, output = run_read(chunk)
    assert errors.isnan().all(1).nonzero().flatten().tolist() == [5]
    assert output.isfinite().all()


def test_tiles_of_the_backward():
    """Rows are read once wherever both tiles stay in registers."""
    for width, dtype in ((512, torch.float32), (1024, torch.float32), (512, torch.bfloat16), (512, torch.float64)):
        assert read_grad_config(8, width, dtype).block_j == 8
    assert read_grad_config(128, 512, torch.float32).block_j == 2
    assert read_grad_config(0, 1, torch.float32) == ReadGradConfig(1, 1)


# Accesses by slot: around the lengths from which on a segment is cut into pieces.
HOT = {"cold": 40, "one under hot": 63, "hot": 64, "a long last piece": 127, "hotter": 170}


CLIP_AND_DECAY = {"clip": 0.5, "decay": 0.9}


@pytest.mark.parametrize(
    "length, table, options",
    [
        *((length, torch.float32, {}) for length in HOT),
        ("cold", torch.bfloat16, CLIP_AND_DECAY),
        ("hot", torch.float64, CLIP_AND_DECAY),
        ("a long last piece", torch.float32, CLIP_AND_DECAY),
        ("hotter", torch.bfloat16, CLIP_AND_DECAY),
    ],
    ids=str,
)
def test_the_log_keeps_rows_as_they_were(length, table, options, triton_place):
    """The write in place with a log and without give the same bits, and the log has each row at its segment's start."""
    slots = torch.cat((torch.arange(5), torch.full((HOT[length],), 7), torch.tensor([8, 8, 9])))
    slots = slots[torch.randperm(len(slots), generator=torch.Generator().manual_seed(0))].unsqueeze(1)
    chunk = make_chunk((1, len(slots), len(slots), 0, 1, 12, 5), table=table, layout="sliced")
    chunk = Chunk(*(x.to(triton_place.device) for x in chunk._replace(slots=slots)))
    exact = compute_dtype(table)
    errors = torch.randn(len(slots), 5, generator=torch.Generator().manual_seed(1)).to(triton_place.device, exact)
    plan = plan_segments(chunk.slots, 12)
    log = torch.full((len(slots), 5), 7.0, dtype=table, device=triton_place.device)
    with_log, without = chunk.values.clone(), chunk.values.clone()
    new = torch.empty_like(chunk.values).copy_(chunk.values)
    with testing.poisoned_memory():
        segment_rows(with_log, errors, chunk.weights, plan, epilogue="update", lr=0.3, log=log, **options)
        segment_rows(without, errors, chunk.weights, plan, epilogue="update", lr=0.3, **options)
        segment_rows(
            new, errors, chunk.weights, plan, epilogue="update", lr=0.3, table=chunk.values, log=log.clone(), **options
        )
    testing.assert_bitwise_equal(with_log, without, "in place")
    testing.assert_bitwise_equal(with_log, new, "table and out")
    assert not torch.equal(with_log[7], chunk.values[7])
    starts = plan.start.unique().long()
    testing.assert_bitwise_equal(log[starts], chunk.values[plan.rows[starts].long()], "log")
    others = torch.ones(len(slots), dtype=torch.bool, device=log.device).index_fill_(0, starts, False)
    assert (log[others] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 3, 40, 130])
def test_sums_of_narrow_rows(width, dtype, triton_place):
    """Scalars are summed by segment a piece at a time; hot segments and cold ones."""
    slots = torch.cat((torch.full((100,), 3), torch.arange(9), torch.full((33,), 5)))
    slots = slots[torch.randperm(len(slots), generator=torch.Generator().manual_seed(0))].to(triton_place.device)
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(len(slots), width, generator=generator, dtype=torch.float64).to(triton_place.device)
    coefficients = torch.randn(len(slots), generator=generator, dtype=torch.float64).to(triton_place.device)
    out = torch.zeros(12, width, dtype=dtype, device=triton_place.device)
    with testing.poisoned_memory():
        segment_rows(out, vectors.to(dtype), coefficients.to(dtype), plan_segments(slots, 12))
    expected = torch.zeros(12, width, dtype=torch.float64, device=out.device)
    expected.index_add_(0, slots, coefficients.to(dtype).double()[:, None] * vectors.to(dtype).double())
    baseline = torch.zeros_like(out).index_add_(0, slots, coefficients.to(dtype)[:, None] * vectors.to(dtype))
    testing.assert_within_budget(out, expected, baseline, name="sums", reduction_length=128)


def test_tiles_of_narrow_rows():
    assert [segment_config(width, torch.float32).block_a for width in (1, 100, 256, 512, 2048, 4096)] == [
        32,
        4,
        2,
        2,
        2,
        1,
    ]


@pytest.mark.parametrize("flags", [torch.bool, torch.uint8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "strided"])
@pytest.mark.parametrize("shape", [(50, 5), (3, 5000), (1, 1), (0, 5), (5, 0)], ids=str)
def test_restore(shape, layout, dtype, flags, triton_place):
    generator = torch.Generator().manual_seed(0)
    values, initial = (torch.randn(*shape, generator=generator).to(triton_place.device, dtype) for _ in range(2))
    touched = (torch.rand(shape[0], generator=generator) < 0.4).to(triton_place.device, flags)
    if flags == torch.uint8:
        touched *= 5
    restored = testing.with_layout(values, layout)
    original = testing.with_layout(initial, "sliced" if layout == "contiguous" else "contiguous")
    original[touched == 0] = torch.nan
    with testing.assert_unchanged(original, touched):
        restore_rows(restored, original, touched)
    testing.assert_bitwise_equal(restored, torch.where((touched != 0)[:, None], initial, values))
