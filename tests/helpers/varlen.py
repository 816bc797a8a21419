"""Calls of `fast_weight_memory_varlen`: packed documents, gradients, and the tables that rows stand for."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fwpkm_kernels import Rows, testing
from tests.helpers.memory import make_inputs

CHUNK = 4
#: Around a chunk's: shorter, empty, full, one more, several and a tail.
LENGTHS = (CHUNK - 1, 0, CHUNK, CHUNK + 1, 3 * CHUNK + 2)


def bounds(lengths: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
    """cu_seqlens."""
    return torch.tensor([0, *accumulate(lengths)], dtype=dtype)


def make_packed(
    lengths: Sequence[int] = LENGTHS, *, own_keys: bool = False, device: str = "cpu", **how: Any
) -> dict[str, Any]:
    """The tensor arguments by name, but rows."""
    how = {"heads": 2, "num_keys": 6, "mask": "real", **how}
    inputs = make_inputs(1, sum(lengths), device=device, **how)
    for name in ("queries", "targets", "gates", "mask"):
        if name in inputs:
            inputs[name] = inputs[name][0]
    if own_keys:
        generator = torch.Generator().manual_seed(9)
        shape = (len(lengths), *inputs["keys"].shape)
        inputs["keys"] = torch.randn(shape, generator=generator, dtype=torch.float64).to(inputs["keys"])
    return {**inputs, "cu_seqlens": bounds(lengths)}


def make_rows(inputs: dict[str, Any], places: Sequence[tuple[int, int]]) -> Rows:
    """Rows of documents and slots, with random values."""
    values = inputs["values"]
    generator = torch.Generator().manual_seed(7)
    value = torch.randn(len(places), values.shape[1], generator=generator, dtype=torch.float64).to(values)
    document, slot = torch.tensor(places, device=values.device).unbind(1)
    return Rows(document, slot, value)


def tables_of(rows: Rows, values: Tensor, documents: int) -> Tensor:
    """The table of each document, [S, N, D]."""
    used = rows.slot >= 0
    tables = values.expand(documents, *values.shape)
    if getattr(rows, "decay", None) is not None:
        tables = (tables * rows.decay.view(-1, 1, 1)).to(values.dtype)
    return tables.index_put((rows.document[used], rows.slot[used]), rows.value[used])


def run(
    function: Callable[..., Any], inputs: dict[str, Any], rows: Rows | None = None, **options: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor], Rows]:
    """Results by name, with the tables of the documents; gradients of all of them together; and the rows."""
    constants = ("mask", "cu_seqlens")
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items() if name not in constants}
    given = {name: x for name, x in inputs.items() if name in constants} | leaves
    if rows is not None:
        rows = rows._replace(value=rows.value.detach().requires_grad_())
        leaves["rows.value"] = rows.value
    result = function(**given, rows=rows, **options)
    tables = tables_of(result.rows, leaves["values"], len(inputs["cu_seqlens"]) - 1)
    outputs = [result.output, result.keys, tables]
    cotangents = [testing.random_cotangent(x, seed=index) for index, x in enumerate(outputs)]
    found = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True, materialize_grads=True)
    results = dict(zip(("output", "keys", "tables"), outputs, strict=True))
    results |= {"slots": result.slots, "weights": result.weights}
    gradients = {f"gradient of {name}": x for name, x in zip(leaves, found, strict=True)}
    return results, gradients, result.rows
