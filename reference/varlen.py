"""A memory for each of several packed documents: the loop over them."""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reference.memory import fast_weight_memory


class Rows(NamedTuple):
    """Rows of the documents' tables."""

    document: Tensor  # int64 [R]
    slot: Tensor  # int64 [R]; -1 where a place is unused
    value: Tensor  # [R, D]


class VarlenOutput(NamedTuple):
    """What packed documents leave behind."""

    output: Tensor  # [T, D]
    keys: Tensor  # [S, H, 2, n, Dk/2]
    rows: Rows  # all S·N of them, document by document; the package gives those that the documents have read
    slots: Tensor  # [T, J]
    weights: Tensor  # [T, J]


def fast_weight_memory_varlen(
    queries: Tensor,
    targets: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    rows: Any = None,
    gates: Tensor | None = None,
    mask: Tensor | None = None,
    **options: Any,
) -> VarlenOutput:
    """:func:`fast_weight_memory` for each document by itself.

    Document s is the tokens from cu_seqlens[s] to cu_seqlens[s + 1]. It begins with ``values``, except for the rows
    that ``rows`` names for it, and with ``keys``, or its own of [S, ...].

    Args:
        queries: [T, H, Dk].
        targets: [T, D].
        keys: [H, 2, n, Dk/2] or [S, H, 2, n, Dk/2].
        values: [N, D].
        cu_seqlens: [S + 1].
        rows: a record like :class:`Rows`, or None.
        gates, mask: [T] or None.
        options: the others of :func:`fast_weight_memory`.
    """
    results = []
    for s, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        table = values
        if rows is not None:
            own = (rows.document == s) & (rows.slot >= 0)
            table = values.index_put((rows.slot[own],), rows.value[own])
        results.append(
            fast_weight_memory(
                queries[None, start:stop],
                targets[None, start:stop],
                keys if keys.dim() == 4 else keys[s],
                table,
                gates=None if gates is None else gates[None, start:stop],
                mask=None if mask is None else mask[None, start:stop],
                **options,
            )
        )
    output, final_keys, tables, slots, weights = zip(*results, strict=True)
    documents, num_slots = len(results), values.shape[0]
    return VarlenOutput(
        torch.cat(output, dim=1)[0],
        torch.stack(final_keys),
        Rows(
            torch.arange(documents).repeat_interleave(num_slots).to(values.device),
            torch.arange(num_slots).repeat(documents).to(values.device),
            torch.cat(tables),
        ),
        torch.cat(slots, dim=1)[0],
        torch.cat(weights, dim=1)[0],
    )
