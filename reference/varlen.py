"""A memory for each of several packed documents: the loop over them, and sequences that are cut into segments."""

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


class Past(NamedTuple):
    """Of each document: the memory that it began with, and all tokens that it has had."""

    keys: list[Tensor]  # [H, 2, n, Dk/2]
    tables: list[Tensor]  # [N, D]
    tokens: list[tuple[Tensor | None, ...]]  # queries [t, H, Dk], targets [t, D], gates and mask [t] or None


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
    carry: Past | None = None,
    return_carry: bool = False,
    **options: Any,
) -> Any:
    """:func:`fast_weight_memory` for each document by itself.

    Document s is the tokens from cu_seqlens[s] to cu_seqlens[s + 1]. It begins with ``values``, except for the rows
    that ``rows`` names for it, and with ``keys``, or its own of [S, ...].

    With ``carry`` they are the next tokens of documents. Each is one sequence, cut anywhere: so its memory runs over
    all tokens that it has had, from the one that it began with, and what comes of those that are new is returned. The
    ``keys`` and ``rows`` that it has left before are not needed for that.

    Args:
        queries: [T, H, Dk].
        targets: [T, D].
        keys: [H, 2, n, Dk/2] or [S, H, 2, n, Dk/2].
        values: [N, D].
        cu_seqlens: [S + 1].
        rows: a record like :class:`Rows`, or None.
        gates, mask: [T] or None, in all segments alike.
        carry: what the segments before have left; None begins the documents.
        return_carry: whether to return a pair of the result and a :class:`Past`.
        options: the others of :func:`fast_weight_memory`.
    """
    results, past = [], Past([], [], [])
    for s, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        tokens = tuple(x if x is None else x[start:stop] for x in (queries, targets, gates, mask))
        if carry is None:
            first, table = keys if keys.dim() == 4 else keys[s], values
            if rows is not None:
                own = (rows.document == s) & (rows.slot >= 0)
                table = values.index_put((rows.slot[own],), rows.value[own])
        else:
            first, table = carry.keys[s], carry.tables[s]
            pairs = zip(carry.tokens[s], tokens, strict=True)
            tokens = tuple(x if x is None or old is None else torch.cat((old, x)) for old, x in pairs)
        for old, new in zip(past, (first, table, tokens), strict=True):
            old.append(new)
        q, y, g, m = (x if x is None else x.unsqueeze(0) for x in tokens)
        assert q is not None
        assert y is not None
        result = fast_weight_memory(q, y, first, table, gates=g, mask=m, **options)
        new = slice(y.shape[1] - (stop - start), None)
        results.append((result[0][:, new], *result[1:3], *(x[:, new] for x in result[3:])))
    output, final_keys, tables, slots, weights = zip(*results, strict=True)
    documents, num_slots = len(results), values.shape[0]
    left = VarlenOutput(
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
    return (left, past) if return_carry else left
