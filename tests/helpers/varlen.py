"""Calls of `fast_weight_memory_varlen`: packed documents, gradients, and the tables that rows stand for."""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from fwpkm_kernels import Rows, fast_weight_memory_varlen, testing
from tests.helpers.memory import make_inputs
from tests.helpers.segments import BY_TOKEN

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


def in_segments(cuts, carries=None, function=fast_weight_memory_varlen):
    """A function like `fast_weight_memory_varlen` of whole documents, which calls `function` segment by segment.

    `cuts` says for each segment how many tokens it has of each document; `carries` gets what each leaves.
    """

    def call(queries, targets, keys, values, cu_seqlens, *, rows, gates=None, mask=None, **options):
        done = cu_seqlens[:-1].tolist()
        parts, carry = [[] for _ in done], None
        for lengths in cuts:
            index = torch.cat([torch.arange(start, start + count) for start, count in zip(done, lengths, strict=True)])
            index = index.to(queries.device)
            factors = {name: x[index] for name, x in (("gates", gates), ("mask", mask)) if x is not None}
            result, carry = function(
                queries[index], targets[index], keys, values, bounds(lengths), rows=rows, carry=carry,
                return_carry=True, **factors, **options,
            )  # fmt: skip
            keys, rows = result.keys, result.rows
            by_token = (result.output, result.slots, result.weights)
            for part, *found in zip(parts, *(x.split(list(lengths)) for x in by_token), strict=True):
                part.append(found)
            done = [start + count for start, count in zip(done, lengths, strict=True)]
            if carries is not None:
                carries.append(carry)
        joined = (torch.cat(x) for x in zip(*(found for part in parts for found in part), strict=True))
        return result._replace(**dict(zip(("output", "slots", "weights"), joined, strict=True)))

    return call


def with_tables(
    segments: Sequence[Sequence[int]] = (), function: Callable[..., Any] = fast_weight_memory_varlen
) -> Callable[..., tuple[Tensor, ...]]:
    """`function` with rows as two tensors, `row_slots` [R], document · N + slot or -1, and `row_values` [R, D].

    It returns output, keys, the documents' tables [S, N, D], slots and weights. Several `segments` say how many tokens
    each has of each document; of documents that are shorter the last ones are cut off.
    """

    def call(
        *,
        values: Tensor,
        cu_seqlens: Tensor,
        row_slots: Tensor | None = None,
        row_values: Tensor | None = None,
        **given: Any,
    ) -> tuple[Tensor, ...]:
        left, cuts = cu_seqlens.diff().tolist(), []
        for lengths in segments:
            cuts.append([min(pair) for pair in zip(lengths, left, strict=True)])
            left = [most - count for most, count in zip(left, cuts[-1], strict=True)]
        rows = None
        if row_slots is not None and row_values is not None:
            used = row_slots >= 0
            document, slot = row_slots // len(values), row_slots % len(values)
            rows = Rows(torch.where(used, document, 0), torch.where(used, slot, -1), row_values)
        varlen = in_segments(cuts, function=function) if len(cuts) > 1 else function
        result = varlen(values=values, cu_seqlens=cu_seqlens, rows=rows, **given)
        tables = tables_of(result.rows, values, len(cu_seqlens) - 1)
        return result.output, result.keys, tables, result.slots, result.weights

    return call


def cut_documents(tensors: dict[str, Tensor], lengths: Sequence[int]) -> dict[str, Tensor]:
    """Only so many of the first tokens of each document."""
    starts = tensors["cu_seqlens"].tolist()
    parts = [torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=False)]
    index = torch.cat(parts).to(tensors["queries"].device)
    by_token = {name: tensors[name][index] for name in BY_TOKEN if name in tensors}
    return {**tensors, **by_token, "cu_seqlens": bounds(lengths, tensors["cu_seqlens"].dtype)}


def unpack(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors of `fast_weight_memory` for each document; none knows of given rows."""
    keys, pieces = tensors["keys"], list(pairwise(tensors["cu_seqlens"].tolist()))
    of_each = keys.unbind() if keys.dim() == 5 else [keys] * len(pieces)
    return [
        {name: tensors[name][None, start:stop] for name in BY_TOKEN if name in tensors}
        | {"keys": own, "values": tensors["values"]}
        for own, (start, stop) in zip(of_each, pieces, strict=True)
    ]
