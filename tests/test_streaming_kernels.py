"""The kernels of a streaming step, in the interpreter or on a GPU, against plain PyTorch."""

from types import SimpleNamespace

import pytest
import torch

from fwpkm_kernels.kernels import streaming
from fwpkm_kernels.options import STEPS
from fwpkm_kernels.plan import count_accesses, plan_segments
from fwpkm_kernels.weights import fold_write_weights, write_scale
from tests.conftest import HAS_GPU

DEVICE = "cuda" if HAS_GPU else "cpu"


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    "pairs, picks, num_slots",
    [(1, 1, 1), (5, 8, 4), (37, 3, 16), (13, 24, 1000), (3, 40, 25), (40, 2, 2**20)],
    ids=str,
)
def test_plan_of_a_chunk_is_that_of_the_sort(pairs, picks, num_slots, step, dtype):
    """Bit by bit; the write weights up to the rounding of a division. Some pairs are masked, some rows of weights 0."""
    random = torch.Generator().manual_seed(1)
    slots = torch.randint(num_slots, (pairs, picks), generator=random).to(DEVICE)
    weights, gates = draw(pairs, picks, dtype=dtype), draw(pairs, dtype=dtype, seed=1)
    weights[::4] = 0.0
    mask = draw(pairs, dtype=dtype, seed=2).clamp(min=0.0)
    touched = torch.zeros(num_slots, dtype=torch.uint8, device=DEVICE)

    planned, write_weights = streaming.plan_chunk(
        slots, weights, gates, mask, touched, row_dtype=torch.int32, step=step
    )
    plan = plan_segments(slots, num_slots)
    for actual, expected in zip(planned, plan, strict=True):
        assert torch.equal(actual, expected.to(actual.dtype))
    counts = count_accesses(plan, (mask > 0).repeat_interleave(picks)).view(slots.shape)
    expected = fold_write_weights(weights, counts, write_scale(weights, None, step), [gates, mask])
    torch.testing.assert_close(write_weights, expected, rtol=8 * torch.finfo(dtype).eps, atol=0.0)
    expected_touched = torch.zeros_like(touched)
    expected_touched[slots.flatten()] = 1
    assert torch.equal(touched, expected_touched)


@pytest.mark.parametrize("names", [(), ("gates",), ("mask",), ("gates", "mask")], ids=str)
def test_tokens_are_put_where_they_belong(names):
    """From strided and expanded tensors, between rows of the queue that stay as they are."""
    length, batch, heads, head, first = 3, 2, 3, 5, 4
    queries = draw(batch, length, heads, 2 * head)[..., ::2].transpose(0, 1)
    given = {
        "gates": draw(1, length).expand(batch, -1).transpose(0, 1),
        "mask": draw(batch, length).transpose(0, 1) > 0,
    }
    gates, mask = (given[name] if name in names else None for name in ("gates", "mask"))
    buffers = (draw(9, batch, heads, head, seed=1), draw(9, batch, seed=2), draw(9, batch, seed=3))
    queue = SimpleNamespace(**dict(zip(("queries", "gates", "mask"), buffers, strict=True)))
    expected = [x.clone() for x in buffers]
    for buffer, x in zip(expected, (queries, gates, mask), strict=True):
        buffer[first : first + length] = 1.0 if x is None else x
    streaming.enqueue(queries, gates, mask, queue, first)
    for actual, wanted in zip(buffers, expected, strict=True):
        assert torch.equal(actual, wanted)
