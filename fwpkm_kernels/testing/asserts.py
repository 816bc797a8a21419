"""Asserts on results, with error budgets.

Results are judged against the same formula in float64, relative to the error that plain torch makes in the
precision under test (:func:`assert_within_budget`). Slots, untouched rows and repeated runs are compared bit by bit.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .inputs import as_float64

# Unit roundoff of a product of two factors, by the precision of the multiplier.
_UNIT_ROUNDOFF = MappingProxyType({"ieee": 2.0**-24, "tf32x3": 2.0**-22, "tf32": 2.0**-11})


def forward_and_gradients(
    function: Callable[..., Any],
    inputs: Mapping[str, Any],
    *,
    wrt: Sequence[str] = (),
    cotangent: Tensor | None = None,
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Call ``function(**inputs)`` and differentiate its first output.

    Args:
        inputs: arguments by name; tensors keep their strides.
        wrt: the names of the inputs to differentiate with respect to.
        cotangent: the incoming gradient, cast to the output's dtype; None is an expanded 1, as from ``output.sum()``.

    Returns:
        All outputs, detached, as a tuple; and the gradients by name.
    """
    leaves = {name: inputs[name].detach().requires_grad_() for name in wrt}
    result = function(**{**inputs, **leaves})
    outputs = result if isinstance(result, tuple) else (result,)
    gradients: tuple[Tensor, ...] = ()
    if wrt:
        incoming = torch.ones((), dtype=outputs[0].dtype, device=outputs[0].device).expand(outputs[0].shape)
        if cotangent is not None:
            # .to() keeps the tensor itself, strides included, where dtype and device agree already
            incoming = cotangent.to(outputs[0])
        gradients = torch.autograd.grad(outputs[0], [leaves[name] for name in wrt], incoming)
    return tuple(output.detach() for output in outputs), dict(zip(wrt, gradients, strict=True))


def assert_matches_reference(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Mapping[str, Any],
    *,
    wrt: Sequence[str] = (),
    cotangent: Tensor | None = None,
    name: str = "function",
    factor: float = 3.0,
    reduction_length: int = 1,
) -> None:
    """Outputs and gradients of ``function`` against ``reference``, within the error budget.

    Both are called with ``inputs`` by name, the reference in float64 (``exact``) and as it is (``baseline``). Float
    outputs and the gradients of the first output with respect to ``wrt`` go through :func:`assert_within_budget`; other
    outputs must be equal.
    """
    outputs, gradients = forward_and_gradients(function, inputs, wrt=wrt, cotangent=cotangent)
    exact, exact_gradients = forward_and_gradients(
        reference, as_float64(inputs), wrt=wrt, cotangent=as_float64(cotangent)
    )
    baseline, baseline_gradients = forward_and_gradients(reference, inputs, wrt=wrt, cotangent=cotangent)
    _check(len(outputs) == len(baseline), f"{name}: {len(outputs)} outputs, expected {len(baseline)}")
    for i, output in enumerate(outputs):
        label = f"{name}: output {i}"
        if output.is_floating_point():
            assert_within_budget(
                output, exact[i], baseline[i], name=label, factor=factor, reduction_length=reduction_length
            )
        else:
            assert_bitwise_equal(output, exact[i], label)
    for key, gradient in gradients.items():
        assert_within_budget(
            gradient,
            exact_gradients[key],
            baseline_gradients[key],
            name=f"{name}: gradient of {key}",
            factor=factor,
            reduction_length=reduction_length,
        )


def assert_within_budget(
    actual: Tensor,
    exact: Tensor,
    baseline: Tensor,
    *,
    name: str,
    factor: float = 3.0,
    reduction_length: int = 1,
    scale: float | None = None,
) -> None:
    """``actual`` is as near to the float64 result as plain torch in the same precision, up to a factor.

    With r the RMS of ``exact`` (or ``scale``), both of
        rms(actual − exact) / r  ≤  factor · rms(baseline − exact) / r  +  ulps
        max|actual − exact| / r  ≤  factor · max|baseline − exact| / r  +  ulps · max(1, max|exact| / r)
    must hold. Dividing by r makes the bounds independent of the magnitude of the numbers; for an all-zero ``exact`` r
    is 1 and ulps is 0. The second bound sees a single wrong element, which the first would average away. Where the
    baseline is exact by luck, as in sums of few terms, the last terms remain:
        ulps = 2 eps(dtype of the result) + 2 eps(float32, or float64 for float64) · √reduction_length
    which is the rounding of the result and of that many additions of numbers as large as it.

    NaN and infinities must be where ``exact``, rounded to the dtype of ``actual``, has them; they are left out of the
    errors.

    Args:
        actual: the result under test.
        exact: the reference's result in float64.
        baseline: the reference's result in the precision of ``actual``, and with its dtype.
        name: what the message calls it.
        factor: how many times the baseline's error is allowed.
        reduction_length: about how many terms are added up for one element.
        scale: replaces r where an RMS of ``exact`` says nothing, as for gradients that vanish analytically.
    """
    _check(exact.dtype == torch.float64, f"{name}: `exact` must be float64, got {exact.dtype}")
    _check(actual.dtype == baseline.dtype, f"{name}: dtype {actual.dtype}, expected {baseline.dtype}")
    _check(
        actual.shape == exact.shape == baseline.shape,
        f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)} (baseline {tuple(baseline.shape)})",
    )
    if actual.numel() == 0:
        return
    actual, exact, baseline = actual.detach(), exact.detach().to(actual.device), baseline.detach().to(actual.device)
    rounded = exact.to(actual.dtype)
    finite = rounded.isfinite()
    special = ~finite & ~(actual.isnan() & rounded.isnan()) & (actual != rounded)
    misplaced = special | (finite & ~actual.isfinite())
    if misplaced.any():
        raise AssertionError(
            f"{name}: {int(misplaced.sum())} of {actual.numel()} elements are NaN or infinite in one result only, "
            + _coordinates(misplaced.double(), {"actual": actual, "exact": exact})
        )
    _check(bool(baseline[finite].isfinite().all()), f"{name}: the baseline is not finite where the exact result is")

    zero = torch.zeros((), dtype=torch.float64, device=actual.device)
    exact = torch.where(finite, exact, zero)
    error = torch.where(finite, actual.double(), zero) - exact
    baseline_error = torch.where(finite, baseline.double(), zero) - exact
    count = max(1, int(finite.sum()))
    rms = math.sqrt(float(exact.square().sum()) / count)
    if scale is None:
        scale = rms
    ulps = 0.0
    if scale > 0:
        accumulator = torch.promote_types(actual.dtype, torch.float32)
        ulps = 2 * torch.finfo(actual.dtype).eps + 2 * torch.finfo(accumulator).eps * math.sqrt(reduction_length)
    else:
        scale = 1.0

    def rms_and_max(difference: Tensor) -> tuple[float, float]:
        return math.sqrt(float(difference.square().sum()) / count) / scale, float(difference.abs().max()) / scale

    rms_error, max_error = rms_and_max(error)
    baseline_rms, baseline_max = rms_and_max(baseline_error)
    rms_budget = factor * baseline_rms + ulps
    max_budget = factor * baseline_max + ulps * max(1.0, float(exact.abs().max()) / scale)
    if rms_error > rms_budget or max_error > max_budget:
        raise AssertionError(
            f"{name}: error over budget (relative to {scale:.3g})\n"
            f"  rms {rms_error:.3g}, budget {rms_budget:.3g} = {factor:g} × baseline {baseline_rms:.3g} + {ulps:.3g}\n"
            f"  max {max_error:.3g}, budget {max_budget:.3g}, baseline {baseline_max:.3g}\n  "
            + _coordinates(error.abs(), {"actual": actual, "exact": exact, "baseline": baseline})
        )


def assert_lookup_matches(
    scores: Tensor | None,
    slots: Tensor,
    queries: Tensor,
    keys: Tensor,
    exact_slots: Tensor,
    *,
    score: str = "idw",
    eps: float = 1e-3,
    precision: str = "ieee",
    max_different: float = 1.0,
    name: str = "lookup",
) -> int:
    """A lookup's scores and slots against the exact ones, up to what rounding excuses.

    Slots are compared with ``exact_slots`` for equality. In a row where they differ, some half scores within their
    rounding bands of the exact (float64) ones must explain the choice: no slot that was not picked lies above a picked
    one by more than the two bands. Every score must lie within its slot's band, which, as scores descend, leaves no
    pick out of order beyond its band either.

    The band of a half score, with u the unit roundoff of ``precision`` and c = max(4, 2·√(Dk/2)) for the length of the
    sum:
        dot:  c·u·‖q‖·‖k‖, and for numbers near the smallest normal one, τ, Dk/2·τ·(1 + ‖q‖ + ‖k‖)
        idw:  log((eps + d² + δ) / (eps + max(d² − δ, 0))) + 4·u,  d² = ‖q − k‖²,  δ = c·u·(‖q‖² + ‖k‖²)
    since an implementation may expand d² as ‖q‖² − 2 q·k + ‖k‖², whose error is relative to the norms, not to d². To
    first order the idw band is 2δ / (eps + d²); its 4·u is for the fast logarithms of GPUs, which near 1 are right in
    absolute, not in relative terms. A slot's band is the sum of its two, plus 4·u·(|s¹| + |s²|).

    Whatever rounding does: slots are in range, none repeats in a row, scores descend. Rows with NaN or infinite scores
    must have ``exact_slots``. Exact ties are within any band: test the tie rule by comparing slots bit by bit.

    Args:
        scores: [..., H, K]; None where only slots are known: the picks alone are checked then.
        slots: [..., H, K].
        queries: [..., H, Dk] and keys [H, 2, n, Dk/2], as the lookup got them.
        exact_slots: [..., H, K], the slots found in float64.
        precision: "ieee", "tf32x3" or "tf32"; float64 inputs have u = 2⁻⁵³ whatever it says.
        max_different: the largest allowed share of rows whose slots differ.

    Returns:
        How many rows have other slots than ``exact_slots``.
    """
    n = keys.shape[2]
    top_k = exact_slots.shape[-1]
    expected = (*queries.shape[:-1], top_k)
    _check(tuple(slots.shape) == expected, f"{name}: slots have shape {tuple(slots.shape)}, expected {expected}")
    _check(slots.dtype == torch.int64, f"{name}: slots are {slots.dtype}, expected torch.int64")
    wanted = torch.promote_types(torch.promote_types(queries.dtype, keys.dtype), torch.float32)
    if scores is not None:
        _check(tuple(scores.shape) == expected, f"{name}: scores have shape {tuple(scores.shape)}, expected {expected}")
        _check(scores.dtype == wanted, f"{name}: scores are {scores.dtype}, expected {wanted}")
    if slots.numel() == 0:
        return 0

    def check_rows(bad: Tensor, what: str) -> None:
        """``bad`` is [R, K]; R counts rows and heads together."""
        if bad.any():
            rows = bad.any(-1).nonzero()[:, 0]
            shown = rows[:3].tolist()
            raise AssertionError(
                f"{name}: {what} in {len(rows)} of {len(bad)} rows; first rows (row·H + head) {shown}: "
                f"slots {picked[shown].tolist()}, exact {exact_picked[shown].tolist()}, scores {given[shown].tolist()}"
            )

    picked = slots.reshape(-1, top_k)  # [R, K]
    exact_picked = exact_slots.to(slots.device).reshape(-1, top_k)
    # Slots without scores, where they are valid, are judged as if each had its exact score.
    given = picked.new_zeros(picked.shape, dtype=torch.float64)
    if scores is not None:
        given = scores.detach().reshape(-1, top_k).double()
    check_rows((picked < 0) | (picked >= n * n), f"slots outside [0, {n * n})")
    ordered = picked.sort(-1).values
    check_rows(ordered[:, 1:] == ordered[:, :-1], "a slot repeats")
    check_rows(given[:, 1:] > given[:, :-1], "scores ascend")

    unit = 2.0**-53 if wanted == torch.float64 else _UNIT_ROUNDOFF[precision]
    half, band = half_scores_and_bands(queries, keys, score, eps, unit)  # [R, 2, n]
    picked_exact = _of_slots(half, picked)  # float64 scores of the picked slots
    picked_band = _of_slots(band + 4 * unit * half.abs(), picked)
    if scores is None:
        given = picked_exact
        out_of_order = (given - picked_band)[:, 1:] > (given + picked_band)[:, :-1]
        check_rows(torch.nn.functional.pad(out_of_order, (1, 0)), "a better slot comes later")
    different = (picked != exact_picked).any(-1)

    regular = half.isfinite().all(-1).all(-1)
    special_rows = (~regular).unsqueeze(-1)
    check_rows(special_rows & (picked != exact_picked), "other slots beside NaN or infinite scores")
    agrees = (given == picked_exact) | (given.isnan() & picked_exact.isnan())
    check_rows(special_rows & ~agrees & ~picked_exact.isfinite(), "NaN or infinite scores differ")

    near = (given - picked_exact).abs() <= picked_band
    check_rows(~near & picked_exact.isfinite(), "scores outside the rounding band of their slots")

    # The largest lower bound among slots that were not picked: it is one of the K+1 best sums of lower bounds.
    suspects = (different & regular).nonzero()[:, 0]
    lower = (half - band - 4 * unit * half.abs())[suspects]
    best, index = lower.topk(min(n, top_k + 1), dim=-1)
    sums = (best[:, 0].unsqueeze(-1) + best[:, 1].unsqueeze(-2)).flatten(-2)  # [suspects, (K+1)·(K+1)]
    sum_slots = (index[:, 0].unsqueeze(-1) * n + index[:, 1].unsqueeze(-2)).flatten(-2)
    is_picked = (sum_slots.unsqueeze(-1) == picked[suspects].unsqueeze(-2)).any(-1)
    bound = sums.masked_fill(is_picked, -torch.inf).amax(-1, keepdim=True)
    missed = torch.zeros_like(picked, dtype=torch.bool)
    missed[suspects] = (picked_exact + picked_band)[suspects] < bound
    check_rows(missed, "a better slot was missed")

    count = int(different.sum())
    _check(
        count <= max_different * len(picked),
        f"{name}: {count} of {len(picked)} rows have other slots, at most {max_different:.3%} may",
    )
    return count


def assert_untouched_rows_equal(before: Tensor, after: Tensor, slots: Tensor, name: str = "values") -> None:
    """The rows [N, D] that ``slots`` does not name are bitwise the same."""
    _check(before.shape == after.shape, f"{name}: shape {tuple(after.shape)}, expected {tuple(before.shape)}")
    untouched = torch.ones(before.shape[0], dtype=torch.bool, device=before.device)
    untouched[slots.reshape(-1).to(before.device)] = False
    rows = untouched.nonzero()[:, 0]
    changed = (_bits(before) != _bits(after))[rows].flatten(1).any(-1)
    if changed.any():
        wrong = rows[changed]
        raise AssertionError(
            f"{name}: {len(wrong)} of {len(rows)} untouched rows changed, first rows {wrong[:5].tolist()}"
        )


def assert_bitwise_equal(actual: Tensor, expected: Tensor, name: str = "tensor") -> None:
    """Same shape, dtype and bits: NaN equals the same NaN, and −0.0 is not 0.0."""
    _check(actual.dtype == expected.dtype, f"{name}: dtype {actual.dtype}, expected {expected.dtype}")
    _check(actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    actual, expected = actual.detach(), expected.detach().to(actual.device)
    different = _bits(actual) != _bits(expected)
    if different.any():
        raise AssertionError(
            f"{name}: {int(different.sum())} of {actual.numel()} elements differ in their bits, "
            + _coordinates(different.double(), {"actual": actual, "expected": expected})
        )


def assert_deterministic(function: Callable[[], Any], *, runs: int = 2, name: str = "function") -> None:
    """Every call of ``function()`` returns the same bits: a tensor, or nested tuples, lists and mappings of tensors."""
    first = list(_tensors(function()))
    for run in range(1, runs):
        again = list(_tensors(function()))
        _check(len(again) == len(first), f"{name}: run {run} returned {len(again)} tensors, run 0 {len(first)}")
        for i, (one, other) in enumerate(zip(again, first, strict=True)):
            assert_bitwise_equal(one, other, f"{name}: tensor {i} of run {run}")


@contextmanager
def assert_unchanged(*values: Any) -> Iterator[None]:
    """All tensors in ``values``, nested or not, have the same bits after the block as before."""
    tensors = list(_tensors(values))
    before = [tensor.detach().clone() for tensor in tensors]
    yield
    for i, (tensor, old) in enumerate(zip(tensors, before, strict=True)):
        assert_bitwise_equal(tensor, old, f"input {i}")


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within the block torch.empty and its kin return NaN (integers: the largest number), so unwritten outputs show.

    This is torch's deterministic mode with ``fill_uninitialized_memory``; operations without a deterministic form only
    warn.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        memory.fill_uninitialized_memory = fill


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, tuple | list):
        for entry in value:
            yield from _tensors(entry)


def _bits(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().resolve_neg().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def _coordinates(badness: Tensor, shown: Mapping[str, Tensor], count: int = 5) -> str:
    """The worst few elements, with their coordinates and their numbers."""
    worst = badness.reshape(-1).topk(min(count, badness.numel()))
    lines = []
    for amount, flat in zip(worst.values.tolist(), worst.indices.tolist(), strict=True):
        if amount > 0:
            where = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), badness.shape))
            lines.append(f"{where}: " + ", ".join(f"{name} {tensor[where].item()!r}" for name, tensor in shown.items()))
    return "worst at\n    " + "\n    ".join(lines)


def half_scores_and_bands(queries: Tensor, keys: Tensor, score: str, eps: float, unit: float) -> tuple[Tensor, Tensor]:
    """Float64 scores of all sub-keys and their rounding bands, both [R, 2, n] with R = rows · H."""
    heads, _, n, half = keys.shape
    q = queries.detach().double().reshape(-1, heads, 2, half).permute(1, 2, 0, 3)  # [H, 2, rows, Dk/2]
    k = keys.detach().double().to(queries.device)
    c = max(4.0, 2 * math.sqrt(half))
    q_norm = q.norm(dim=-1).unsqueeze(-1)
    k_norm = k.norm(dim=-1).unsqueeze(-2)
    if score == "dot":
        scores = q @ k.mT
        # Below the smallest normal number rounding is absolute, and some hardware has nothing there but 0.
        tiny = torch.finfo(torch.float64 if unit == 2.0**-53 else torch.float32).tiny
        band = c * unit * q_norm * k_norm + half * tiny * (1 + q_norm + k_norm)
    else:
        distance = torch.cdist(q, k, compute_mode="donot_use_mm_for_euclid_dist").square()
        delta = c * unit * (q_norm.square() + k_norm.square())
        scores = -torch.log(eps + distance)
        band = torch.log((eps + distance + delta) / (eps + (distance - delta).clamp(min=0))) + 4 * unit
    scores, band = (t.permute(2, 0, 1, 3).reshape(-1, 2, n) for t in (scores, band))
    return scores, band


def _of_slots(half: Tensor, slots: Tensor) -> Tensor:
    """Sums of two halves [R, 2, n] for slots [R, K]."""
    n = half.shape[-1]
    return half[:, 0].gather(-1, slots // n) + half[:, 1].gather(-1, slots % n)
