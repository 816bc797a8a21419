"""Product-key lookup: the best K of n² slots from the scores of 2·n sub-keys."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from . import _checks as checks
from ._autograd import refuse_transforms
from ._operators import function_of, is_plain, operator
from .kernels import compute_dtype
from .options import Lookup, schema_of
from .plan import plan_segments, segment_totals
from .ranking import best_columns, may_have_equals, order_equals_
from .records import Addresses, Plan

# Half scores, and picked rows, that the PyTorch path holds at a time, in elements: 16 and 2 MiB of float32, which the
# allocator keeps from one block to the next, so that the system need not map and clear their pages again.
_SCORE_ELEMENTS = 2**22
_PICK_ELEMENTS = 2**19


def row_blocks(num_rows: int, row_elements: int, elements: int) -> Iterator[slice]:
    """Slices of the rows, with at most `elements` where every row has `row_elements`."""
    step = max(1, elements // max(1, row_elements))
    for begin in range(0, num_rows, step):
        yield slice(begin, begin + step)


def _half_winners(queries: Tensor, keys: Tensor, o: Lookup) -> tuple[Tensor, Tensor]:
    """The K best sub-keys of queries [2·H, M, Dk/2] among keys [2·H, n, Dk/2], in order: scores, columns [2·H, M, K].

    Under "idw" they are found by q·k - |k|²/2. |q - k|² is |q|² less twice that, which is as good as the square of the
    difference where it is no less than |q|²/2: then |q|² + |k|² is at most 8 times as much. Other rows are scored by
    the differences. A matrix product may round equal sub-keys differently: so in these rows, and in all rows where
    there may be equal sub-keys, the K are scored by their differences where two of them lie within its roundings, and
    all sub-keys are where the K-th and the next do.
    """
    if o.score == "dot":
        return best_columns(torch.bmm(queries, keys.mT), o.top_k)[:2]
    num_keys, half = keys.shape[1:]
    lengths = torch.linalg.vector_norm(queries, dim=-1, keepdim=True)
    query_norms = lengths.square()
    key_norms = keys.square().sum(-1).unsqueeze(1)  # those of equal sub-keys are equal, unlike a vector_norm's
    best, columns, others = best_columns(torch.baddbmm(key_norms, queries, keys.mT, beta=-0.5), o.top_k)
    distances, is_good = _distances(query_norms, best)
    if not is_good.all() and not best.isfinite().all():
        # An infinite query or sub-key is infinitely far, though q·k may have either sign or be NaN; NaN stays NaN.
        sums = query_norms + key_norms
        ranks = torch.baddbmm(key_norms, queries, keys.mT, beta=-0.5)
        best, columns, others = best_columns(torch.where(sums.isfinite(), ranks, -sums), o.top_k)
        distances, is_good = _distances(query_norms, best)
    has_equals = may_have_equals(keys, key_norms.squeeze(1))
    if has_equals or not is_good.all():
        largest = key_norms.expand(-1, queries.shape[1], -1).gather(-1, columns).amax(-1, keepdim=True)
        rounding = 2.0 * math.sqrt(half) * torch.finfo(keys.dtype).eps * (lengths * largest.sqrt() + largest)
        is_near = -torch.cat((best, others), -1).diff() <= rounding
        if not has_equals:
            is_near &= ~is_good
        by_difference = is_near.any(-1) | ~is_good.squeeze(-1)
        sub_keys = columns[by_difference] + num_keys * by_difference.nonzero()[:, :1]
        distances[by_difference] = _exact_distances(queries[by_difference], keys.flatten(0, 1), sub_keys)
        is_open = is_near[..., o.top_k - 1 :].any(-1)  # which ones are the K; no row is where K = n
        if is_open.any():
            sub_keys = torch.arange(num_keys, device=keys.device) + num_keys * is_open.nonzero()[:, :1]
            ranks = -_exact_distances(queries[is_open], keys.flatten(0, 1), sub_keys)
            nearest, columns[is_open], _ = best_columns(ranks, o.top_k)
            distances[is_open] = -nearest
    scores = distances.add_(o.eps).log_().neg_()
    order_equals_(scores, columns)  # which may come by other roundings than those of the ranks
    return scores, columns


def _distances(query_norms: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """|q|² - 2·best, ascending, and whether all K of a row are good: none has cancelled or is infinite, [..., 1]."""
    distances = torch.add(query_norms, best, alpha=-2.0)
    return distances, (distances[..., :1] >= 0.5 * query_norms) & (distances[..., -1:] < math.inf)


@checks.without_autocast
def _lookup_torch(queries: Tensor, keys: Tensor, o: Lookup) -> Addresses:
    """`lookup_halves` in plain PyTorch."""
    num_rows, heads, _ = queries.shape
    num_keys, half = keys.shape[2:]
    top_k, dtype = o.top_k, compute_dtype(keys.dtype)
    tables = keys.flatten(0, 1).to(dtype)
    pairs = [(i, j) for i in range(top_k) for j in range(top_k // (i + 1))]  # of which the K best are, by i·K + j
    first, second = torch.tensor(pairs, device=queries.device).unbind(1)
    result = Addresses.empty(queries, top_k, dtype)
    scores, slots, half_scores, sub_keys = result
    first_rows = _first_rows(heads, num_keys, sub_keys)
    for block in row_blocks(num_rows, 2 * heads * num_keys, _SCORE_ELEMENTS):
        rows = queries[block].to(dtype).unflatten(-1, (2, half)).permute(1, 2, 0, 3).flatten(0, 1)
        best, found = (x.unflatten(0, (heads, 2)) for x in _half_winners(rows, tables, o))
        half_scores[block] = best.permute(2, 0, 1, 3)
        torch.add(found.permute(2, 0, 1, 3), first_rows, out=sub_keys[block])
        sums = best[:, 0].index_select(-1, first) + best[:, 1].index_select(-1, second)  # [H, rows, pairs]
        best_sums, pair, _ = best_columns(sums, top_k)
        found_slots = found[:, 1].gather(-1, second[pair]).add_(found[:, 0].gather(-1, first[pair]), alpha=num_keys)
        scores[block], slots[block] = best_sums.transpose(0, 1), found_slots.transpose(0, 1)
    return result


def lookup_halves(queries: Tensor, keys: Tensor, o: Lookup) -> Addresses:
    """Look up queries [M, H, Dk] in keys [H, 2, n, Dk/2], and tell what won in each half too; trusts its input."""
    if checks.use_triton(o.backend, queries):
        from .kernels.lookup import lookup

        return lookup(queries, keys, top_k=o.top_k, idw=o.score == "idw", eps=o.eps, precision=o.precision)
    return _lookup_torch(queries, keys, o)


_SCHEMA = f"(Tensor queries, Tensor keys, {schema_of(Lookup)}) -> (Tensor, Tensor)"


@operator("product_key_lookup", schema=_SCHEMA)
def _lookup_op(queries: Tensor, keys: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """Scores and slots [M, H, K]."""
    checks.check_tokens("queries", queries, math.prod(queries.shape[:-1]))
    found = lookup_halves(queries, keys, Lookup(*options))
    return found.scores, found.slots


@_lookup_op.register_fake
def _(queries, keys, top_k, *options):  # type: ignore[no-untyped-def]
    found = Addresses.empty(queries, top_k, compute_dtype(keys.dtype))
    return found.scores, found.slots


@operator("product_key_lookup_halves", schema=_SCHEMA)
def halves_op(queries: Tensor, keys: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """Slots [M, H, K] and sub-keys [M, H, 2, K] of `lookup_halves`, as an operator: for what may be traced."""
    found = lookup_halves(queries, keys, Lookup(*options))
    return found.slots, found.sub_keys


@halves_op.register_fake
def _(queries, keys, top_k, *options):  # type: ignore[no-untyped-def]
    found = Addresses.empty(queries, top_k, compute_dtype(keys.dtype))
    return found.slots, found.sub_keys


def _first_rows(heads: int, num_keys: int, like: Tensor) -> Tensor:
    """Where each half of each head begins in keys.view(H·2·n, Dk/2): [H, 2, 1], with the dtype and device of `like`."""
    return torch.arange(0, heads * 2 * num_keys, num_keys, dtype=like.dtype, device=like.device).view(heads, 2, 1)


def sub_key_rows(slots: Tensor, num_keys: int) -> Tensor:
    """Rows of keys.view(H·2·n, Dk/2) that slots [M, H, K] are made of: [M, H, 2, K]."""
    columns = torch.stack((slots // num_keys, slots % num_keys), dim=2)
    return columns + _first_rows(slots.shape[1], num_keys, slots)


def half_differences(
    queries: Tensor, keys: Tensor, sub_keys: Tensor, score: str, eps: float
) -> tuple[Tensor, Tensor | None]:
    """The vectors v with which a half score moves its sub-key, ds/dk = 2·v/E or v, and E, in plain PyTorch.

    For queries [M, H, Dk] and keys [H·2·n, Dk/2], both in the compute dtype: v = q - k, [M, H, 2, K, Dk/2], and
    E = eps + |q - k|² from that difference; under "dot" v = q, expanded, and no E.
    """
    if score == "dot":
        return queries.unflatten(-1, (2, 1, keys.shape[1])).expand(*sub_keys.shape, -1), None
    return _differences_and_distances(queries, keys, sub_keys, eps)


def _differences_and_distances(queries: Tensor, keys: Tensor, sub_keys: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`half_differences` under "idw"."""
    vectors = _differences(queries.unflatten(-1, (2, keys.shape[1])), keys, sub_keys)
    return vectors, torch.linalg.vector_norm(vectors, dim=-1).square_().add_(eps)


def _differences(queries: Tensor, keys: Tensor, sub_keys: Tensor) -> Tensor:
    """q - k, [..., K, Dk/2], of queries [..., Dk/2] and the rows of keys [H·2·n, Dk/2] that sub_keys [..., K] name."""
    vectors = pick_rows(keys, sub_keys)
    return torch.sub(queries.unsqueeze(-2), vectors, out=vectors)


def _exact_distances(queries: Tensor, keys: Tensor, sub_keys: Tensor) -> Tensor:
    """|q - k|² from the differences, [rows, K]: of queries [rows, Dk/2], keys [H·2·n, Dk/2] and sub_keys [rows, K]."""
    distances = torch.empty(sub_keys.shape, dtype=queries.dtype, device=queries.device)
    for block in pick_blocks(sub_keys, keys.shape[1]):
        torch.linalg.vector_norm(_differences(queries[block], keys, sub_keys[block]), dim=-1, out=distances[block])
    return distances.square_()


def pick_blocks(picks: Tensor, width: int, times: int = 1) -> Iterator[slice]:
    """Slices of the rows of `picks` [M, ...] for which the picked rows, of `width`, may be held at a time, or
    `times` as many.
    """
    return row_blocks(picks.shape[0], picks.shape[1:].numel() * width, times * _PICK_ELEMENTS)


def pick_rows(table: Tensor, rows: Tensor) -> Tensor:
    """table[rows], of a table [N, D]; several times as fast on a CPU."""
    return table.index_select(0, rows.reshape(-1)).view(*rows.shape, table.shape[1])


def sum_rows(table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Σ_k weights[..., k]·table[rows[..., k]], of a table [N, D] in the dtype of the weights: [..., D]."""
    picks, width = rows.shape[-1], table.shape[1]
    if rows.numel() == 0 or width == 0:
        return weights.new_zeros(*rows.shape[:-1], width)
    weights = weights.reshape(-1, picks).contiguous()
    sums = F.embedding_bag(rows.reshape(-1, picks), table, mode="sum", per_sample_weights=weights)
    return sums.view(*rows.shape[:-1], width)


@checks.without_autocast
def half_grad_torch(
    grad_halves: Tensor,
    queries: Tensor,
    keys: Tensor,
    sub_keys: Tensor,
    *,
    score: str,
    eps: float,
    with_queries: bool = True,
    with_keys: bool = True,
    step: tuple[Tensor, Tensor] | None = None,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """`kernels.lookup.half_grad` in plain PyTorch, and the sums over the picks of each sub-key.

    `step` is what a key step adds to the gradient of queries: its factors [M, H, 2, K], and the gradient of the totals
    that it steps by, [H, 2, n, Dk/2]. `plan` is the plan of `sub_keys` where there is one already.

    Returns:
        The gradients of queries [M, H, Dk] and of keys [H, 2, n, Dk/2], in the compute dtype; [0] if not asked for.
    """
    dtype = compute_dtype(keys.dtype)
    half = keys.shape[-1]
    table = keys.flatten(0, 2).to(dtype)
    grad_queries = torch.empty(queries.shape if with_queries else 0, dtype=dtype, device=queries.device)
    grad_keys = torch.zeros(keys.shape if with_keys else 0, dtype=dtype, device=keys.device)

    def add_keys(plan: Plan, vectors: Tensor, factors: Tensor) -> None:
        _, touched, totals = segment_totals(plan, vectors, factors)
        grad_keys.flatten(0, 2).index_add_(0, touched, totals)

    if score == "dot":
        factors = grad_halves.to(dtype)
        if with_queries:
            grad_queries.copy_(sum_rows(table, sub_keys, factors).flatten(-2))
        if with_keys:
            halves = queries.to(dtype).reshape(sub_keys.shape[:3].numel(), half)  # the same for all picks
            add_keys(plan or plan_segments(sub_keys, table.shape[0]), halves, factors)
    else:
        # A key step comes with the plan of all picks: to sort each block anew would cost it more than a longer block.
        for block in pick_blocks(sub_keys, half, 1 if with_queries else 8):
            picked = sub_keys[block]
            vectors, distances = _differences_and_distances(queries[block].to(dtype), table, picked, eps)
            factors = 2.0 * grad_halves[block].to(dtype) / distances
            if with_queries:
                grad_queries[block] = torch.einsum("mhak,mhakd->mhad", factors, vectors).neg_().flatten(-2)
            if with_keys:
                if plan is None or len(picked) < len(sub_keys):
                    plan = plan_segments(picked, table.shape[0])
                add_keys(plan, vectors.flatten(0, -2), factors)
    if with_queries and step is not None:
        step_factors, grad_totals = step
        grad_queries += sum_rows(grad_totals.flatten(0, 2), sub_keys, step_factors).flatten(-2)
    return grad_queries, grad_keys


@operator(
    "product_key_lookup_backward",
    schema="(Tensor grad_scores, Tensor queries, Tensor keys, Tensor slots, bool with_keys, "
    f"{schema_of(Lookup)}) -> (Tensor, Tensor)",
)
def _lookup_grad_op(grad_scores, queries, keys, slots, with_keys, *options) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    """The gradients of queries [M, H, Dk] and of keys [H, 2, n, Dk/2]; that of keys is [0] if not `with_keys`."""
    o = Lookup(*options)
    grad_halves = grad_scores.unsqueeze(2).expand(-1, -1, 2, -1)  # a score is the sum of two half scores
    sub_keys = sub_key_rows(slots, keys.shape[2])
    if not checks.use_triton(o.backend, queries):
        grad_queries, grad_keys = half_grad_torch(
            grad_halves, queries, keys, sub_keys, score=o.score, eps=o.eps, with_keys=with_keys
        )
        return grad_queries.to(queries.dtype), grad_keys.to(keys.dtype)
    from .kernels.lookup import half_grad
    from .kernels.segments import segment_rows

    table = keys.flatten(0, 2)
    grad_queries, factors = half_grad(grad_halves, queries, table, sub_keys, idw=o.score == "idw", eps=o.eps)
    if not with_keys:
        return grad_queries, keys.new_empty(0)
    grad_keys = torch.zeros(keys.shape, dtype=keys.dtype, device=keys.device)
    halves, plan = queries.unflatten(-1, (2, keys.shape[3])).flatten(0, 2), plan_segments(sub_keys, table.shape[0])
    segment_rows(grad_keys.view(table.shape), halves, factors, plan, table=table, centered=o.score == "idw")
    return grad_queries, grad_keys


@_lookup_grad_op.register_fake
def _(grad_scores, queries, keys, slots, with_keys, *options):  # type: ignore[no-untyped-def]
    grad_keys = keys.new_empty(keys.shape) if with_keys else keys.new_empty(0)
    return queries.new_empty(queries.shape), grad_keys


def _flat(x: Tensor) -> Tensor:
    """[..., a, b] as [rows, a, b]."""
    return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def _look_up(run: Callable[..., Any], queries: Tensor, keys: Tensor, o: Lookup) -> tuple[Tensor, Tensor]:
    """Scores and slots [..., H, K] by `run`, the operator or its function."""
    scores, slots = run(_flat(queries), keys, *o)
    size = (*queries.shape[:-1], o.top_k)
    return scores.view(size), slots.view(size)


class _ProductKeyLookupBackward(Function):
    """First derivatives; differentiating them again raises."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        return _lookup_grad_op(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("product_key_lookup cannot be differentiated twice")


class ProductKeyLookup(Function):
    """`product_key_lookup` as an autograd Function: apply(queries, keys, top_k, score, eps, precision, backend)."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        """Validate, look up, and keep what backward reads: both inputs and the slots."""
        queries, keys, *options = args  # one parameter, as in `FastWeightMemory.forward`
        refuse_transforms("product_key_lookup", (queries, keys))
        o = check_lookup(queries, keys, Lookup(*options))
        scores, slots = _look_up(_lookup_op, queries, keys, o)
        ctx.save_for_backward(queries, keys, slots)
        ctx.mark_non_differentiable(slots)
        ctx.options = o
        return scores, slots

    @staticmethod
    def backward(ctx: Any, grad_scores: Tensor, _: Any) -> Any:
        """Gradients of the K winners' scores, to queries and to the sub-keys that won."""
        needs_queries, needs_keys = ctx.needs_input_grad[:2]
        queries, keys, slots = ctx.saved_tensors
        refuse_transforms("product_key_lookup", (grad_scores, queries, keys))
        rows = (_flat(grad_scores), _flat(queries), keys, _flat(slots))
        grad_queries, grad_keys = _ProductKeyLookupBackward.apply(*rows, needs_keys, *ctx.options)
        grad_queries = grad_queries.view(queries.shape) if needs_queries else None
        return grad_queries, grad_keys if needs_keys else None, *(None,) * len(Lookup._fields)


def check_lookup(queries: Tensor, keys: Tensor, o: Lookup) -> Lookup:
    """Validate the arguments of a lookup; returns the options with their numbers as int and float."""
    checks.check_tensor("queries", queries)
    checks.check_tensor("keys", keys, 4, "[H, 2, n, Dk/2]")
    checks.check_float("queries", queries)
    checks.check_float("keys", keys)
    heads, halves, num_keys, half = keys.shape
    if halves != 2:
        raise ValueError(f"`keys` must hold two halves, [H, 2, n, Dk/2], got shape {checks.shape(keys)}")
    if queries.dim() < 2:
        raise ValueError(f"`queries` must have at least 2 dimensions [..., H, Dk], got shape {checks.shape(queries)}")
    if queries.shape[-1] % 2:
        raise ValueError(f"`queries` must have an even width Dk, got shape {checks.shape(queries)}")
    rule = "`queries` [..., H, Dk] and `keys` [H, 2, n, Dk/2] must agree in H and Dk"
    checks.check_shapes(queries.shape[-2] == heads and queries.shape[-1] == 2 * half, rule, queries, keys)
    checks.check_num_keys(keys)
    checks.check_tokens("queries", queries, math.prod(queries.shape[:-1]))
    checks.check_together(queries=queries, keys=keys)
    top_k = checks.check_int("top_k", o.top_k, minimum=1)
    if top_k > num_keys:
        raise ValueError(f"`top_k` must be from 1 to the {num_keys} sub-keys of a half, got {top_k}")
    checks.check_choice("score", o.score, checks.SCORES)
    dtype = compute_dtype(keys.dtype)
    eps = checks.check_number("eps", o.eps, dtype, minimum=torch.finfo(dtype).tiny)  # less may be 0 in that dtype
    checks.check_choice("precision", o.precision, checks.PRECISIONS)
    checks.check_choice("backend", o.backend, checks.BACKENDS)
    return Lookup(top_k, o.score, eps, o.precision, o.backend)


def product_key_lookup(
    queries: Tensor,
    keys: Tensor,
    top_k: int,
    *,
    score: str = "idw",
    eps: float = 1e-3,
    precision: str = "tf32x3",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Find the K best of n² slots for every query and head.

    The score of sub-key j of half a is q·k (`score="dot"`) or -log(eps + |q - k|²) (`score="idw"`), q and k being the
    halves of width Dk/2. Each half keeps its K best; the K best of their K×K sums win, and slot = j1·n + j2. Source:
    FwPKM, arXiv 2601.00671; product keys, arXiv 1907.05242.

    Under "idw" the K best of a half are found by 2 q·k - |k|², and scored and put in order by the difference q - k
    itself, on CPUs where the distance |q|² less that has cancelled: so scores are exact to rounding everywhere.

    Ties: in each half the lower sub-key wins, then among equal sums the lower flat position i·K + j. NaN scores count
    as the largest: a half of a query with NaN picks the sub-keys 0 to K - 1 with scores of NaN, and leaves its other
    half and other queries alone; a sub-key with NaN is picked by every query, on GPUs before others by one with NaN.
    Under "idw" an infinite half of a query picks 0 to K - 1 too, with scores of -inf, or NaN, which comes first, where
    the sub-key has the same infinity in the same column. For other queries -inf is the score of an
    infinite sub-key, or of one whose square overflows: it is picked only where the others are fewer than K. A finite
    half of a query whose square overflows (in float32 from 1.8e19 on) scores -inf at sub-keys of ordinary size too, and
    its gradient is 0. It picks K different ones, so its slots are valid; which ones is not promised and differs between
    backends. Its other half and other queries are left alone.

    Denormals are numbers like others on CPUs. On NVIDIA GPUs sums and products in float32 keep them too; the dot
    products that choose the picks under "tf32x3" and "tf32" may not. eps, and so what log is taken of, is none.

    Args:
        queries: [..., H, Dk], any strides. Half precision is cast to float32 on load.
        keys: [H, 2, n, Dk/2], any strides.
        top_k: K, from 1 to n.
        score: "idw" or "dot".
        eps: added to the squared distance, in its units; > 0 in the scores' dtype. Only idw uses it.
        precision: of the dot products on GPUs: "ieee", "tf32x3" (error like float32; one product, which is exact,
            where queries and keys are both half precision) or "tf32" (other neighbours in a few rows of a thousand).
            AMD has no tf32x3: there it means ieee. float64 is always ieee.
        backend: "auto" (Triton for GPU tensors, PyTorch for CPU tensors), "torch" or "triton".

    Returns:
        scores [..., H, K], descending, float32 (float64 for float64), differentiable in queries and keys with the slots
        held constant; and slots [..., H, K], int64. Only the winners get gradients. An empty batch gives empty results.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    instead_of_vmap = "put the batch into the leading dimensions of `queries`"
    refuse_transforms("product_key_lookup", (queries, keys), instead_of_vmap)
    options = (top_k, score, eps, precision, backend)
    if is_plain(queries, keys):
        return _look_up(function_of(_lookup_op), queries, keys, check_lookup(queries, keys, Lookup(*options)))
    result: tuple[Tensor, Tensor] = ProductKeyLookup.apply(queries, keys, *options)
    return result
