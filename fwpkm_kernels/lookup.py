"""Product-key lookup: the best K of n² slots from the scores of 2·n sub-keys."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import _checks as checks
from .kernels import compute_dtype
from .plan import plan_segments, segment_totals

# Rows of the half scores that the PyTorch path holds at a time, in elements: 64 MiB of float32.
_BLOCK_ELEMENTS = 2**24


def _stable_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Best k of the last dimension, descending, the lowest index first among equals; NaN counts as largest.

    torch.topk promises no order among equals, and a stable sort of everything costs many times more: so the k are put
    in order, and only rows whose k-th score has equals that were left out, or with NaN, are sorted whole.
    """
    values, indices = torch.topk(scores, k)
    incomplete = (scores >= values[..., -1:]).sum(-1, dtype=torch.int32) > k
    incomplete |= values[..., 0].isnan()
    indices, by_index = torch.sort(indices, dim=-1)
    values, by_value = torch.sort(values.gather(-1, by_index), dim=-1, descending=True, stable=True)
    indices = indices.gather(-1, by_value)
    if incomplete.any():
        sorted_values, sorted_indices = torch.sort(scores[incomplete], dim=-1, descending=True, stable=True)
        values[incomplete], indices[incomplete] = sorted_values[..., :k], sorted_indices[..., :k]
    return values, indices


def _half_scores(queries: Tensor, keys: Tensor, score: str, eps: float) -> Tensor:
    """Scores of all sub-keys, [H, 2, M, n], of queries [M, H, 2, Dk/2] and keys [H, 2, n, Dk/2]."""
    rows = queries.permute(1, 2, 0, 3)
    dots = rows @ keys.transpose(-1, -2)
    if score == "dot":
        return dots
    distance = dots.mul_(-2.0).add_(rows.square().sum(-1, keepdim=True)).add_(keys.square().sum(-1).unsqueeze(-2))
    return distance.clamp_(min=0.0).add_(eps).log_().neg_()


@checks.without_autocast
def _lookup_torch(queries: Tensor, keys: Tensor, top_k: int, score: str, eps: float) -> tuple[Tensor, Tensor]:
    num_rows, heads, width = queries.shape
    num_keys = keys.shape[2]
    dtype = compute_dtype(keys.dtype)
    keys = keys.to(dtype)
    pairs = [(i, j) for i in range(top_k) for j in range(top_k) if (i + 1) * (j + 1) <= top_k]
    first, second = torch.tensor(pairs, device=queries.device).unbind(1)
    scores = torch.empty(num_rows, heads, top_k, dtype=dtype, device=queries.device)
    slots = torch.empty(num_rows, heads, top_k, dtype=torch.int64, device=queries.device)
    step = max(1, _BLOCK_ELEMENTS // max(1, 2 * heads * num_keys))
    for begin in range(0, num_rows, step):
        block = slice(begin, begin + step)
        rows = queries[block].to(dtype).unflatten(-1, (2, width // 2))
        half_scores, half_columns = _stable_topk(_half_scores(rows, keys, score, eps), top_k)  # [H, 2, rows, K]
        sums = half_scores[:, 0, :, first] + half_scores[:, 1, :, second]  # [H, rows, pairs], in flat order i·K + j
        best, pair = (x[..., :top_k] for x in torch.sort(sums, dim=-1, descending=True, stable=True))
        column1 = half_columns[:, 0].gather(-1, first[pair])
        column2 = half_columns[:, 1].gather(-1, second[pair])
        scores[block] = best.transpose(0, 1)
        slots[block] = (column1 * num_keys + column2).transpose(0, 1)
    return scores, slots


@torch.library.custom_op("fwpkm_kernels::product_key_lookup", mutates_args=())
def _lookup_op(
    queries: Tensor, keys: Tensor, top_k: int, score: str, eps: float, precision: str, backend: str
) -> tuple[Tensor, Tensor]:
    if checks.use_triton(backend, queries):
        from .kernels.lookup import lookup

        return lookup(queries, keys, top_k=top_k, idw=score == "idw", eps=eps, precision=precision)
    return _lookup_torch(queries, keys, top_k, score, eps)


@_lookup_op.register_fake
def _(queries, keys, top_k, score, eps, precision, backend):  # type: ignore[no-untyped-def]
    size = (queries.shape[0], queries.shape[1], top_k)
    return queries.new_empty(size, dtype=compute_dtype(keys.dtype)), queries.new_empty(size, dtype=torch.int64)


def _sub_key_rows(slots: Tensor, num_keys: int) -> Tensor:
    """Rows of keys.view(H·2·n, Dk/2) that slots [M, H, K] are made of: [M, H, 2, K]."""
    columns = torch.stack((slots // num_keys, slots % num_keys), dim=2)
    halves = torch.arange(2 * slots.shape[1], device=slots.device).view(-1, 2, 1)
    return columns + halves * num_keys


@checks.without_autocast
def _lookup_grad_torch(
    grad_scores: Tensor, queries: Tensor, keys: Tensor, slots: Tensor, score: str, eps: float, with_keys: bool
) -> tuple[Tensor, Tensor]:
    heads, _, num_keys, half = keys.shape
    dtype = compute_dtype(keys.dtype)
    sub_keys = _sub_key_rows(slots, num_keys)
    picked = keys.reshape(-1, half)[sub_keys].to(dtype)  # [M, H, 2, K, Dk/2]
    rows = queries.to(dtype).unflatten(-1, (2, 1, half))  # [M, H, 2, 1, Dk/2]
    factors = grad_scores.to(dtype).unsqueeze(2).expand(sub_keys.shape)
    if score == "idw":
        difference = rows - picked
        factors = 2.0 * factors / (eps + difference.square().sum(-1))
        grad_queries = -torch.einsum("mhak,mhakd->mhad", factors, difference)
        vectors = difference.reshape(-1, half)
    else:
        grad_queries = torch.einsum("mhak,mhakd->mhad", factors, picked)
        vectors = rows.reshape(-1, half)
    grad_queries = grad_queries.reshape(queries.shape).to(queries.dtype)
    if not with_keys:
        return grad_queries, keys.new_empty(0)
    grad_keys = torch.zeros(heads * 2 * num_keys, half, dtype=dtype, device=keys.device)
    _, touched, totals = segment_totals(plan_segments(sub_keys, grad_keys.shape[0]), vectors, factors)
    grad_keys[touched] = totals
    return grad_queries, grad_keys.view(keys.shape).to(keys.dtype)


@torch.library.custom_op("fwpkm_kernels::product_key_lookup_backward", mutates_args=())
def _lookup_grad_op(
    grad_scores: Tensor,
    queries: Tensor,
    keys: Tensor,
    slots: Tensor,
    score: str,
    eps: float,
    with_keys: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if not checks.use_triton(backend, queries):
        return _lookup_grad_torch(grad_scores, queries, keys, slots, score, eps, with_keys)
    from .kernels.lookup import query_grad
    from .kernels.segments import segment_rows

    num_keys, half = keys.shape[2:]
    grad_queries, factors = query_grad(grad_scores, queries, keys, slots, idw=score == "idw", eps=eps)
    if not with_keys:
        return grad_queries, keys.new_empty(0)
    grad_keys = torch.zeros(keys.shape, dtype=keys.dtype, device=keys.device)
    table = keys.reshape(-1, half)
    segment_rows(
        grad_keys.view(table.shape),
        queries.reshape(-1, half),
        factors,
        *plan_segments(_sub_key_rows(slots, num_keys), table.shape[0]),
        table=table,
        centered=score == "idw",
    )
    return grad_queries, grad_keys


@_lookup_grad_op.register_fake
def _(grad_scores, queries, keys, slots, score, eps, with_keys, backend):  # type: ignore[no-untyped-def]
    grad_keys = keys.new_empty(keys.shape) if with_keys else keys.new_empty(0)
    return queries.new_empty(queries.shape), grad_keys


def _flat(x: Tensor) -> Tensor:
    """[..., a, b] as [rows, a, b]."""
    return x.reshape(x.shape[:-2].numel(), *x.shape[-2:])


class _ProductKeyLookupBackward(Function):
    """First derivatives; differentiating them again raises."""

    @staticmethod
    def forward(ctx: Any, grad_scores: Tensor, queries: Tensor, keys: Tensor, slots: Tensor, *options: Any) -> Any:
        return _lookup_grad_op(grad_scores, queries, keys, slots, *options)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("product_key_lookup cannot be differentiated twice")


class ProductKeyLookup(Function):
    """`product_key_lookup` as an autograd Function: apply(queries, keys, top_k, score, eps, precision, backend)."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        top_k: int,
        score: str = "idw",
        eps: float = 1e-3,
        precision: str = "tf32x3",
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        """Validate, look up, and keep what backward reads: both inputs and the slots."""
        _check_lookup(queries, keys, top_k, score, eps, precision, backend)
        scores, slots = _lookup_op(_flat(queries), keys, top_k, score, float(eps), precision, backend)
        size = (*queries.shape[:-1], top_k)
        scores, slots = scores.view(size), slots.view(size)
        ctx.save_for_backward(queries, keys, slots)
        ctx.mark_non_differentiable(slots)
        ctx.options = (score, float(eps), backend)
        return scores, slots

    @staticmethod
    def backward(ctx: Any, grad_scores: Tensor, _: Any) -> Any:
        """Gradients of the K winners' scores, to queries and to the sub-keys that won."""
        needs_queries, needs_keys = ctx.needs_input_grad[:2]
        queries, keys, slots = ctx.saved_tensors
        score, eps, backend = ctx.options
        grad_queries, grad_keys = _ProductKeyLookupBackward.apply(
            _flat(grad_scores),
            _flat(queries),
            keys,
            _flat(slots),
            score,
            eps,
            needs_keys,
            backend,
        )
        grad_queries = grad_queries.view(queries.shape) if needs_queries else None
        return grad_queries, grad_keys if needs_keys else None, None, None, None, None, None


def _check_lookup(
    queries: Tensor, keys: Tensor, top_k: int, score: str, eps: float, precision: str, backend: str
) -> None:
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
    if queries.shape[-2] != heads or queries.shape[-1] != 2 * half:
        raise ValueError(
            f"`queries` [..., H, Dk] and `keys` [H, 2, n, Dk/2] must agree in H and Dk, "
            f"got {checks.shape(queries)} against {checks.shape(keys)}"
        )
    checks.check_together(queries=queries, keys=keys)
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        raise TypeError(f"`top_k` must be an int, got {type(top_k).__name__}")
    if not 1 <= top_k <= num_keys:
        raise ValueError(f"`top_k` must be from 1 to the {num_keys} sub-keys of a half, got {top_k}")
    checks.check_choice("score", score, checks.SCORES)
    tiny = torch.finfo(compute_dtype(keys.dtype)).tiny  # below it eps would be 0 to the kernels
    checks.check_number("eps", eps, minimum=tiny)
    checks.check_choice("precision", precision, checks.PRECISIONS)
    checks.check_choice("backend", backend, checks.BACKENDS)


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

    Ties: in each half the lower sub-key wins, then among equal sums the lower flat position i·K + j. NaN scores count
    as the largest: a query with NaN gets NaN scores and valid slots, and leaves other queries alone. So does a query
    with infinities, whose scores may be NaN. Under "idw" a sub-key that is infinite, or whose square overflows, gives
    every query NaN scores for it, since |q - k|² is formed as |q|² - 2 q·k + |k|².

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
    result: tuple[Tensor, Tensor] = ProductKeyLookup.apply(queries, keys, top_k, score, eps, precision, backend)
    return result
