"""A table of more than 2³¹ elements, against the few rows of it that are touched."""

import pytest
import torch
from torch import Tensor

from fwpkm_kernels import (
    MemoryState,
    chunk_value_update_,
    fast_weight_memory,
    fast_weight_memory_step,
    sparse_value_gather,
    testing,
)
from tests.conftest import PLACES, SLOW_IN_INTERPRETER, Place

pytestmark = pytest.mark.usefixtures("room")


class LargeTable:
    """A memory of n² slots of which only those of `chosen` sub-keys can be addressed, the very last among them.

    Without the sub-keys that no query comes near it is a small memory, whose slots are in the same order.
    """

    def __init__(self, n: int, width: int, dtype: torch.dtype, place: Place) -> None:
        self.n, self.place, generator = n, place, torch.Generator().manual_seed(0)
        self.chosen = torch.tensor([0, 1, n // 3, n // 2, n // 2 + 1, n - 3, n - 2, n - 1])
        few = len(self.chosen)
        self.small_keys = torch.randn(1, 2, few, 16, generator=generator).to(place.device)
        self.small_values = torch.randn(few * few, width, generator=generator).to(place.device, dtype)
        self.keys = torch.full((1, 2, n, 16), 1e3, device=place.device)
        self.keys[:, :, self.chosen.to(place.device)] = self.small_keys
        self.rows = (self.chosen.unsqueeze(1) * n + self.chosen).flatten().to(place.device)
        self.values = torch.zeros(n * n, width, dtype=dtype, device=place.device)
        self.values[self.rows] = self.small_values
        self.queries = torch.randn(1, 14, 1, 32, generator=generator).to(place.device)
        self.queries[:, ::3] = self.small_keys[:, :, -1].flatten()  # so these read the last slot of all
        self.targets = torch.randn(1, 14, width, generator=generator).to(place.device)

    def large_slots(self, small: Tensor) -> Tensor:
        return self.rows[small]

    def check_operations(self) -> None:
        """A gather, its gradients, and a write in place: the same bits."""
        inputs = testing.make_update_inputs(
            40, 3, len(self.rows), self.values.shape[1], slot_pattern="zipf", dtype=self.values.dtype, gates=True
        )
        inputs = type(inputs)(*(None if x is None else x.to(self.place.device) for x in inputs))
        inputs.slots[0] = len(self.rows) - 1
        results = []
        for values, slots in ((self.values, self.large_slots(inputs.slots)), (self.small_values, inputs.slots)):
            leaf, weights = values.detach().requires_grad_(), inputs.weights.clone().requires_grad_()
            out = sparse_value_gather(leaf, slots, weights, sparse_grad=True, backend=self.place.backend)
            grad_values, grad_weights = torch.autograd.grad(out.float().square().sum(), [leaf, weights])
            arguments = inputs._replace(values=values, slots=slots)._asdict()
            chunk_value_update_(**arguments, clip=0.5, lr=0.7, backend=self.place.backend)
            results.append((out.detach(), grad_values._values(), grad_weights, grad_values._indices()[0]))
        for actual, expected in zip(results[0][:3], results[1][:3], strict=True):
            testing.assert_bitwise_equal(actual, expected)
        assert torch.equal(results[0][3], self.large_slots(results[1][3]))
        testing.assert_bitwise_equal(self.values[self.rows], self.small_values, "written in place")

    def check_a_stream(self) -> None:
        """Part of a chunk, its end, and several chunks at once; and a reset."""
        results = []
        for keys, values in ((self.keys, self.values), (self.small_keys, self.small_values)):
            state = MemoryState(keys, values)
            outputs = [
                fast_weight_memory_step(
                    state,
                    self.queries[:, part],
                    self.targets[:, part],
                    chunk_size=4,
                    top_k=3,
                    step="normalized",
                    backend=self.place.backend,
                )
                for part in (slice(0, 3), slice(3, 4), slice(4, 14))
            ]
            written = state.values[self.rows] if keys is self.keys else state.values.clone()
            state.reset()
            reset = state.values[self.rows] if keys is self.keys else state.values
            results.append((torch.cat(outputs, 1), written, reset))
        assert not torch.equal(results[0][1], self.small_values)
        testing.assert_bitwise_equal(results[0][2], self.small_values, "after a reset")
        for actual, expected in zip(*results, strict=True):
            self.assert_close(actual, expected)

    def check_training(self) -> None:
        """Outputs and gradients of a short sequence; the table's gradient is 0 in all other rows."""
        results = []
        for keys, values in ((self.keys, self.values), (self.small_keys, self.small_values)):
            leaves = [x.detach().requires_grad_() for x in (self.queries, self.targets, keys, values)]
            found = fast_weight_memory(
                *leaves, chunk_size=4, top_k=3, step="normalized", clip=0.5, backend=self.place.backend
            )
            slots, output = found.slots, found.output
            del found  # and with it the new table
            *gradients, grad_values = torch.autograd.grad(output.square().sum(), leaves)
            if keys is self.keys:
                gradients[2] = gradients[2][:, :, self.chosen.to(keys.device)]
                total = grad_values.count_nonzero()
                grad_values = grad_values[self.rows]
                assert grad_values.count_nonzero() == total, "other rows have a gradient"
            else:
                slots = self.large_slots(slots)
            results.append((output.detach(), *gradients, grad_values, slots))
        assert torch.equal(results[0][-1], results[1][-1])
        assert self.rows[-1] in results[0][-1]
        for actual, expected in zip(results[0][:-1], results[1][:-1], strict=True):
            self.assert_close(actual, expected)

    def assert_close(self, actual: Tensor, expected: Tensor) -> None:
        """Up to a rounding: tiles of a lookup depend on n, and a query near a sub-key magnifies what they change."""
        error = float((actual.double() - expected.double()).norm() / expected.double().norm())
        assert error <= max(8 * torch.finfo(self.values.dtype).eps, 1e-5), error


@pytest.mark.parametrize("place", [PLACES[0], pytest.param(PLACES[1], marks=SLOW_IN_INTERPRETER)], ids=str)
def test_what_the_large_tables_are_held_against(place):
    """The same with a table that is not large."""
    table = LargeTable(10, 5, torch.float32, place)
    table.check_operations()
    table.check_a_stream()
    table.check_training()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, gigabytes", [(torch.bfloat16, 52), (torch.float32, 42)], ids=str)
def test_a_table_of_more_than_32_bits(dtype, gigabytes):
    """16.7 M slots of 256 columns: 2³² elements. Training has a table, a new one, and the gradient in float32."""
    table = LargeTable(4096, 256, dtype, Place("triton", "cuda"))
    assert table.values.numel() == 2**32
    table.check_operations()
    if dtype == torch.bfloat16:
        table.check_training()
    torch.cuda.empty_cache()
    table.check_a_stream()
