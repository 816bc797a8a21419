"""The key step: one step of the sub-keys toward being used evenly; and the joint backward of lookup and key step."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import _checks as checks
from ._autograd import refuse_transforms
from ._operators import function_of, is_plain, operator
from .kernels import compute_dtype
from .lookup import check_lookup, half_differences, half_grad_torch, lookup_halves, pick_blocks, pick_rows
from .options import KeyStep, schema_of
from .plan import plan_picks, plan_segments, segment_totals
from .records import Addresses, Picks, Plan


def _sum_picks(coefficients: Tensor, plan: Plan, num_keys: int) -> Tensor:
    """The sums of `coefficients` [M, H, 2, K] over the picks of each sub-key, in plain PyTorch: [H, 2·n]."""
    heads = coefficients.shape[1]
    sums = coefficients.new_zeros(heads * 2 * num_keys)
    _, touched, totals = segment_totals(plan, coefficients.new_ones(1, 1), coefficients)
    sums[touched] = totals.squeeze(1)
    return sums.view(heads, 2 * num_keys)


def _pool_picks(coefficients: Tensor, sub_keys: Tensor, plan: Plan, num_keys: int, memories: int) -> Tensor:
    """For each pick, the sum of `coefficients` over all of its sub-key, heads of a memory pooled: [M, H, 2, K]."""
    if memories == 1:
        return _sum_picks(coefficients, plan, num_keys).sum(0)[sub_keys % (2 * num_keys)]
    pooled = _sum_picks(coefficients, plan, num_keys).unflatten(0, (memories, -1)).sum(1)  # [memories, 2·n]
    heads = sub_keys.shape[1] // memories
    return pooled.view(-1)[sub_keys // (heads * 2 * num_keys) * (2 * num_keys) + sub_keys % (2 * num_keys)]


def _centre(x: Tensor, probabilities: Tensor) -> Tensor:
    """x - Σ P·x, the sum over the K picks of a half."""
    return x - (probabilities * x).sum(-1, keepdim=True)


def _step_coefficients(
    probabilities: Tensor, sub_keys: Tensor, plan: Plan, num_keys: int, weight: float, num_rows: int, memories: int
) -> tuple[Tensor, Tensor, Tensor]:
    """For each pick P̄, the slope u of P̄·log(P̄ + 1e-8), centred, and the gradient c of its half score: [M, H, 2, K]."""
    usage = _pool_picks(probabilities, sub_keys, plan, num_keys, memories) / num_rows
    slope = _centre(torch.log(usage + 1e-8) + usage / (usage + 1e-8), probabilities)
    return usage, slope, weight / num_rows * probabilities * slope


@checks.without_autocast
def _step_keys_torch(
    keys: Tensor, queries: Tensor, picks: Picks, o: KeyStep, out: Tensor | None, memories: int
) -> Tensor:
    """`step_keys` in plain PyTorch, where there are rows that step."""
    half_scores, sub_keys = picks
    heads, _, num_keys, _ = keys.shape
    plan = plan_segments(sub_keys, heads * 2 * num_keys)
    probabilities, num_rows = half_scores.softmax(-1), queries.shape[0] * (heads // memories)
    _, _, coefficients = _step_coefficients(probabilities, sub_keys, plan, num_keys, o.weight, num_rows, memories)
    _, totals = half_grad_torch(
        coefficients, queries, keys, sub_keys, score=o.score, eps=o.eps, with_queries=False, plan=plan
    )
    if o.clip is not None:
        totals.clamp_(-o.clip, o.clip)
    totals.mul_(-o.lr).add_(keys, alpha=1.0 - o.lr * o.weight_decay)
    return totals.to(keys.dtype) if out is None else out.copy_(totals)


def step_keys(
    keys: Tensor, queries: Tensor, picks: Picks, o: KeyStep, *, out: Tensor | None = None, memories: int = 1
) -> Tensor:
    """New keys after a key step over queries [M, H, Dk], whose lookup gave `picks`; trusts its input.

    The heads may be those of several memories, one after the other, each of which then steps as if it were alone.

    The result is contiguous, in the dtype of `keys` [H, 2, n, Dk/2], and rounded once. It is `out` where that is given:
    a contiguous tensor like `keys`, or `keys` itself, which then moves in place.
    """
    has_rows = o.weight != 0.0 and queries.numel() > 0  # keys of width 0 have no elements to move
    if has_rows and not checks.use_triton(o.backend, queries):
        return _step_keys_torch(keys, queries, picks, o, out, memories)
    in_place = out is keys
    if out is None:
        out = torch.empty(keys.shape, dtype=keys.dtype, device=keys.device)
    if has_rows:
        from .kernels.key_step import step_keys as launch

        picks = Picks(*(x.contiguous() for x in picks))
        launch(
            keys.flatten(0, 2),
            out.view(-1, keys.shape[3]),
            queries,
            picks,
            plan_picks(picks, keys.shape[2], memories=memories),
            idw=o.score == "idw",
            lr=o.lr,
            weight=o.weight,
            weight_decay=o.weight_decay,
            clip=o.clip,
        )
    elif o.weight_decay != 0.0:
        torch.mul(keys, 1.0 - o.lr * o.weight_decay, out=out)
    elif not in_place:
        out.copy_(keys)
    return out


def _pick_grads(grad_scores: Tensor, slots: Tensor, sub_keys: Tensor, num_keys: int) -> Tensor:
    """Gradients [M, H, K] of scores as those of the half scores that they are sums of, in plain PyTorch."""
    grad_halves = torch.empty(sub_keys.shape, dtype=grad_scores.dtype, device=grad_scores.device)
    columns = sub_keys % num_keys
    for block in pick_blocks(sub_keys, slots.shape[2]):
        parts = torch.stack((slots[block] // num_keys, slots[block] % num_keys), dim=2)
        is_part = columns[block].unsqueeze(-1) == parts.unsqueeze(-2)  # [M, H, 2, K half winners, K winners]
        grad_halves[block] = torch.where(is_part, grad_scores[block, :, None, None], 0.0).sum(-1)
    return grad_halves


@checks.without_autocast
def _address_grad_torch(
    grad_new_keys: Tensor,
    keys: Tensor,
    queries: Tensor,
    grad_scores: Tensor | None,
    slots: Tensor | None,
    picks: Picks,
    o: KeyStep,
    first_row: int,
    memories: int,
) -> tuple[Tensor, Tensor]:
    """`address_grad` in plain PyTorch."""
    half_scores, sub_keys = picks
    heads, _, num_keys, half = keys.shape
    dtype, num_rows = compute_dtype(keys.dtype), (queries.shape[0] - first_row) * (heads // memories)
    plan = plan_segments(sub_keys, heads * 2 * num_keys)
    # Rows that are no part of the key step have P = 0. Their NaN would still spread, since 0·NaN is NaN: so what is
    # computed of them is set to 0 at every stage.
    outside, probabilities = slice(0, first_row), half_scores.softmax(-1)
    probabilities[outside] = 0.0
    if grad_scores is None or slots is None:
        grad_halves = torch.zeros_like(probabilities)
    else:
        grad_halves = _pick_grads(grad_scores.to(dtype), slots, sub_keys, num_keys)
    step = None
    if o.weight != 0.0 and num_rows > 0:
        usage, slope, coefficients = _step_coefficients(
            probabilities, sub_keys, plan, num_keys, o.weight, num_rows, memories
        )
        coefficients[outside] = 0.0
        grad_totals = grad_new_keys * -o.lr
        if o.clip is not None:  # the totals again, and no gradient where the clamp was active
            stepped = queries.clone()
            stepped[outside] = 0.0
            _, totals = half_grad_torch(
                coefficients, stepped, keys, sub_keys, score=o.score, eps=o.eps, with_queries=False, plan=plan
            )
            grad_totals = torch.where(totals.abs() <= o.clip, grad_totals, 0.0)
        table, directions = keys.flatten(0, 2).to(dtype), grad_totals.flatten(0, 2)
        factors, dots = coefficients, torch.empty_like(probabilities)  # dots: <V, ds/dk>
        if o.score == "idw":
            factors = torch.empty_like(coefficients)
        for block in pick_blocks(sub_keys, half):
            picked = sub_keys[block]
            vectors, distances = half_differences(queries[block].to(dtype), table, picked, o.score, o.eps)
            dots[block] = pick_rows(directions, picked).mul_(vectors).sum(-1)
            if distances is not None:
                dots[block] *= 2.0 / distances
                factors[block] = 2.0 * coefficients[block] / distances
        dots[outside] = factors[outside] = 0.0
        shares = probabilities * _centre(dots, probabilities)
        grad_slope = _pool_picks(shares, sub_keys, plan, num_keys, memories)
        bend = 1.0 / (usage + 1e-8) + 1e-8 / (usage + 1e-8).square()
        # A constant term of dP is left out, since it cancels in P·(dP - Σ P·dP).
        grad_p = slope * _centre(dots, probabilities) + grad_slope * bend / num_rows
        through_step = o.weight / num_rows * probabilities * _centre(grad_p, probabilities)
        if o.score == "idw":
            through_step += coefficients * dots  # <V, ds/dk> has the distance in its denominator too
        through_step[outside] = 0.0
        grad_halves += through_step
        step = (factors, grad_totals)
    grad_queries, grad_keys = half_grad_torch(
        grad_halves, queries, keys, sub_keys, score=o.score, eps=o.eps, step=step, plan=plan
    )
    grad_keys.add_(grad_new_keys, alpha=1.0 - o.lr * o.weight_decay)
    if o.score == "idw" and step is not None:
        factors, grad_totals = step
        grad_keys.addcmul_(grad_totals, _sum_picks(factors, plan, num_keys).view(*keys.shape[:3], 1), value=-1.0)
    return grad_queries, grad_keys


def address_grad(
    grad_new_keys: Tensor,
    keys: Tensor,
    queries: Tensor,
    grad_scores: Tensor | None,
    slots: Tensor | None,
    picks: Picks,
    o: KeyStep,
    *,
    first_row: int = 0,
    out: Tensor | None = None,
    memories: int = 1,
) -> tuple[Tensor, Tensor]:
    """The joint backward of a lookup of queries [M, H, Dk] and of a key step over queries[first_row:], same keys.

    The heads may be those of several memories, as in `step_keys`.

    Trusts its input. `grad_scores` and `slots` [M, H, K] are None without a gradient of the lookup's scores, weight and
    weight_decay are 0 without a key step. `grad_new_keys` is [H, 2, n, Dk/2], in the compute dtype.

    Returns:
        The gradients of queries [M, H, Dk], which is `out` where that is given, contiguous; and of keys
        [H, 2, n, Dk/2]; in the compute dtype.
    """
    grad_new_keys = grad_new_keys.contiguous()
    grad_queries = torch.empty(queries.shape, dtype=grad_new_keys.dtype, device=queries.device) if out is None else out
    if queries.numel() == 0:
        return grad_queries.zero_(), grad_new_keys * (1.0 - o.lr * o.weight_decay)
    if not checks.use_triton(o.backend, queries):
        grads, grad_keys = _address_grad_torch(
            grad_new_keys, keys, queries, grad_scores, slots, picks, o, first_row, memories
        )
        return grads if out is None else out.copy_(grads), grad_keys
    from .kernels.key_step import address_grad as launch

    picks = Picks(*(x.contiguous() for x in picks))
    grad_keys = launch(
        grad_new_keys.flatten(0, 2),
        keys.flatten(0, 2),
        queries,
        grad_scores,
        slots,
        picks,
        plan_picks(picks, keys.shape[2], first_row=first_row, memories=memories),
        grad_queries,
        first_row=first_row,
        idw=o.score == "idw",
        eps=o.eps,
        lr=o.lr,
        weight=o.weight,
        weight_decay=o.weight_decay,
        clip=o.clip,
    )
    return grad_queries, grad_keys.view(keys.shape)


@operator(
    "product_key_update", schema=f"(Tensor keys, Tensor queries, {schema_of(KeyStep)}) -> (Tensor, Tensor, Tensor)"
)
def _key_step_op(keys: Tensor, queries: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The new keys, and what backward reads: the half scores and sub-keys that won."""
    checks.check_tokens("queries", queries, math.prod(queries.shape[:-1]))
    o = KeyStep(*options)
    picks = lookup_halves(queries, keys, o.lookup).picks
    return step_keys(keys, queries, picks, o), *picks


@_key_step_op.register_fake
def _(keys, queries, top_k, *options):  # type: ignore[no-untyped-def]
    return keys.new_empty(keys.shape), *Addresses.empty(queries, top_k, compute_dtype(keys.dtype)).picks


@operator(
    "product_key_update_backward",
    schema="(Tensor grad_new_keys, Tensor keys, Tensor queries, Tensor half_scores, Tensor sub_keys, "
    f"{schema_of(KeyStep)}) -> (Tensor, Tensor)",
)
def _key_step_grad_op(grad_new_keys, keys, queries, half_scores, sub_keys, *options) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    """The gradients of queries and keys, in their dtypes."""
    grad_new_keys, picks = grad_new_keys.to(half_scores.dtype), Picks(half_scores, sub_keys)
    grad_queries, grad_keys = address_grad(grad_new_keys, keys, queries, None, None, picks, KeyStep(*options))
    return grad_queries.to(queries.dtype), grad_keys.to(keys.dtype)


@_key_step_grad_op.register_fake
def _(grad_new_keys, keys, queries, *rest):  # type: ignore[no-untyped-def]
    return queries.new_empty(queries.shape), keys.new_empty(keys.shape)


class _ProductKeyUpdateBackward(Function):
    """First derivatives; differentiating them again raises."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        return _key_step_grad_op(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("product_key_update cannot be differentiated twice")


class ProductKeyUpdate(Function):
    """`product_key_update` as an autograd Function: apply(keys, queries, top_k, score, eps, lr, weight, weight_decay,
    clip, precision, backend)."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        """Validate and step; backward keeps both inputs, and the half scores and sub-keys that won."""
        keys, queries, *options = args  # one parameter, as in `FastWeightMemory.forward`
        refuse_transforms("product_key_update", (keys, queries))
        o = _check_key_step(keys, queries, KeyStep(*options))
        new_keys, half_scores, sub_keys = _key_step_op(keys, queries, *o)
        ctx.save_for_backward(keys, queries, half_scores, sub_keys)
        ctx.options = o
        return new_keys

    @staticmethod
    def backward(ctx: Any, grad_new_keys: Tensor) -> Any:
        """The closed form of the second derivatives of the addressing loss, times the incoming gradient."""
        needs_keys, needs_queries = ctx.needs_input_grad[:2]
        refuse_transforms("product_key_update", (grad_new_keys, *ctx.saved_tensors))
        grad_queries, grad_keys = _ProductKeyUpdateBackward.apply(grad_new_keys, *ctx.saved_tensors, *ctx.options)
        grads = (grad_keys if needs_keys else None, grad_queries if needs_queries else None)
        return (*grads, *(None,) * len(KeyStep._fields))


def _check_key_step(keys: Tensor, queries: Tensor, o: KeyStep) -> KeyStep:
    """Validate the arguments of a key step; returns the options with their numbers as int and float."""
    checks.check_tensor("queries", queries, 3, "[M, H, Dk]")
    lookup = check_lookup(queries, keys, o.lookup)
    dtype = compute_dtype(keys.dtype)
    lr, weight = checks.check_number("lr", o.lr, dtype), checks.check_number("weight", o.weight, dtype)
    weight_decay = checks.check_number("weight_decay", o.weight_decay, dtype, minimum=0)
    clip = None if o.clip is None else checks.check_number("clip", o.clip, dtype, minimum=0)
    return KeyStep(lookup.top_k, o.score, lookup.eps, lr, weight, weight_decay, clip, o.precision, o.backend)


def product_key_update(
    keys: Tensor,
    queries: Tensor,
    *,
    top_k: int,
    score: str = "idw",
    eps: float = 1e-3,
    lr: float = 1.0,
    weight: float = 1.0,
    weight_decay: float = 0.0,
    clip: float | None = None,
    precision: str = "tf32x3",
    backend: str = "auto",
) -> Tensor:
    """Step the sub-keys once toward being used evenly: gradient descent on the addressing loss.

    Each half of a row picks its K best sub-keys, as `product_key_lookup` does. With P the softmax over their scores, 0
    for the others, and P̄ its mean over all M·H rows, heads pooled::

        L = weight · Σ_halves Σ_j P̄_j · log(P̄_j + 1e-8)
        new = keys - lr · ( clamp(dL/dkeys, -clip, clip) + weight_decay · keys )

    The picks are held constant, so only sub-keys that were picked get a gradient of L. Sums over the picks of a sub-key
    have one owner and a fixed order, in float32 (float64 for float64); half precision keys are rounded once. Source:
    FwPKM, arXiv 2601.00671, the addressing loss.

    Ties: of equal scores the lower sub-key is picked. A half of a query that is NaN or, under "idw", infinite picks the
    sub-keys 0 to K - 1, and turns them to NaN, and those of its half that other rows pick beside them; no others. One
    that is finite but whose square overflows does so to the K that it picks: which ones `product_key_lookup` does not
    promise.

    Args:
        keys: [H, 2, n, Dk/2], any strides; float32, float64, float16 or bfloat16. Never changed.
        queries: [M, H, Dk], any strides. Half precision is cast to float32 on load.
        top_k: K, from 1 to n.
        score: "idw" or "dot", as in `product_key_lookup`.
        eps: added to the squared distance, in its units; > 0 in the scores' dtype. Only idw uses it.
        lr: the step size, a finite number.
        weight: λ, a finite number; 0 removes the gradient of L, and not the decay.
        weight_decay: >= 0; applies to every sub-key, also when M = 0.
        clip: bound of each element of the gradient of L, >= 0; None means no bound.
        precision: of the dot products that choose the picks, as in `product_key_lookup`.
        backend: "auto" (Triton for GPU tensors, PyTorch for CPU tensors), "torch" or "triton".

    Returns:
        New keys, contiguous and like `keys`, also when M = 0; differentiable in keys and queries, the picks being held
        constant. Sub-keys that no row picks are bitwise those of `keys` unless weight_decay > 0.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    refuse_transforms("product_key_update", (keys, queries))
    options = (top_k, score, eps, lr, weight, weight_decay, clip, precision, backend)
    new_keys: Tensor
    if is_plain(keys, queries):
        new_keys, _, _ = function_of(_key_step_op)(keys, queries, *_check_key_step(keys, queries, KeyStep(*options)))
    else:
        new_keys = ProductKeyUpdate.apply(keys, queries, *options)
    return new_keys
