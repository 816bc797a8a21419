"""A sequence in segments, each of which takes the memory and the carry that the one before has left."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fwpkm_kernels import MemoryOutput, fast_weight_memory

BY_TOKEN = ("queries", "targets", "gates", "mask")


def segments_of(tokens: dict[str, Tensor], lengths: Sequence[int]) -> list[dict[str, Tensor]]:
    """The tokens of each segment."""
    parts = {name: tokens[name].split(list(lengths), dim=1) for name in BY_TOKEN if tokens.get(name) is not None}
    return [{name: x[i] for name, x in parts.items()} for i in range(len(lengths))]


def in_segments(lengths: Sequence[int], memory: Callable[..., Any] = fast_weight_memory) -> Callable[..., MemoryOutput]:
    """`fast_weight_memory` of a sequence that is cut into segments of these lengths; what is left is a last one.

    In a shorter sequence the last segments are cut off.
    """

    def call(keys: Tensor, values: Tensor, **given: Any) -> MemoryOutput:
        tokens = {name: given.pop(name) for name in BY_TOKEN if name in given}
        left, cuts = tokens["queries"].shape[1], []
        for length in lengths:
            cuts.append(min(length, left))
            left -= cuts[-1]
        cuts.append(left)
        results, carry = [], None
        for segment in segments_of(tokens, cuts):
            result, carry = memory(**segment, keys=keys, values=values, carry=carry, return_carry=True, **given)
            keys, values = result.keys, result.values
            results.append(result)
        output, slots, weights = (
            torch.cat([getattr(x, name) for x in results], dim=1) for name in ("output", "slots", "weights")
        )
        return MemoryOutput(output, keys, values, slots, weights)

    return call


def with_a_table(**given: Any) -> Any:
    """`fast_weight_memory` whose final rows are put into the table, as a final table has them; differentiable."""
    result = fast_weight_memory(**given)
    outputs, *carry = result if given.get("return_carry") else (result,)
    document, slot, value, _ = outputs.values
    assert not document.any()
    assert (slot.diff() > 0).logical_or(slot[1:] < 0).all()
    used = slot >= 0
    outputs = outputs._replace(values=given["values"].index_put((slot[used],), value[used]))
    return (outputs, *carry) if carry else outputs
