"""How a case of `tests.strategies` is run through the package and the reference, and judged.

Everything that a call returns, and all gradients of its differentiable outputs together, is compared with the reference
in float64 within the error budget of `fwpkm_kernels.testing`, whose baseline is the reference in the precision of the
case; of float64 it is exact up to 2⁻²⁹ times what float32 is off. Where the budget says nothing, these rules do; a case
in which one of them was needed counts as judged in part:

overflow    An element that is NaN or infinite in the baseline, or in the exact result once rounded, may be anything,
            and so may one that would be if large inputs were 8192 times as large: nowhere else does it take another
            order of a sum to overflow. But it is not finite in a read or a written row if inputs are NaN or infinite.
            All other elements are judged as always: so what overflows in one token may not reach another. Slots of a
            query whose half scores are not all finite must only be valid; key steps are taken without such queries,
            unless it is NaN that they hold, and a memory is judged up to the chunk that has one, or weights whose
            squares underflow or overflow where `step` divides by them.
near ties   Slots that differ from the exact ones must be explained by the rounding band of `assert_lookup_matches`, and
            integer keys, whose scores are exact, have no band. Numbers are compared where the slots agree: in the
            lookup of each head without the other rows; in the key step without rows that the band leaves open; in the
            memory up to the chunk with the first other slot, as a sequence of its own, or, if numbers are over budget,
            up to the first chunk whose key step may have other sub-keys within the errors of the keys.
unstable    A number over budget may be as far off as the exact result and the baseline move when each input, and eps,
            changes by 4 units of rounding of the computation (16 tries): cancellation, a gradient beside a jump (|G| at
            `clip`, a score at the kink of relu). Keys and values that a memory keeps in half precision from chunk to
            chunk change by half a unit of that, since they are rounded there, and any result may be off by as much.
            What is 0 stays 0. Queries and keys that tie exactly are not changed; as their few distinct numbers make an
            error of the baseline a matter of luck, 10 times that are allowed there instead of 3. A result that vanishes
            up to rounding, below √ε of the largest input, or a gradient below √ε of the incoming one, may have errors
            relative to that, where inputs are not tiny themselves; under "idw" 1/eps times that in a key step and in a
            memory that is differentiated through its own, and then nothing is judged more strictly of integer keys in a
            key step, nor where queries and keys are so small that all scores tie, since terms as large as that cancel.

Under clip = 0 a gradient passes a key step where G is exactly 0 and nowhere else: there only results are judged. Where
no row or token of a case is left to compare numbers of, "nothing left" is counted too. On a GPU the baseline of one
tf32 product has operands of 11 bits, and float32 may be off by the smallest normal number: subnormal operands lose bits
there.
"""

import dataclasses
import functools
import pickle
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fwpkm_kernels
import reference
from fwpkm_kernels import MemoryOutput, MemoryState, testing
from fwpkm_kernels.testing.asserts import half_scores_and_bands
from tests.helpers.budget import Budget, compared_rms
from tests.helpers.layer_judge import check_layer
from tests.helpers.segments import BY_TOKEN, in_segments, with_a_table
from tests.helpers.varlen import cut_documents, unpack, with_tables
from tests.strategies import EXACT_FILLS, RESETS, Case, make_tensors

Tensors = dict[str, Tensor]
#: What was needed beside the budget to judge a case.
Reasons = set[str]
#: Options that say how to compute; the reference has none of them.
HOW = ("precision", "final", "sparse_grad", "backend")
TRIES = 16
UNIT = {"ieee": 2.0**-24, "tf32x3": 2.0**-22}
#: Results that nothing but the inputs can make NaN or infinite, unlike dense gradients, in which 0·∞ may be.
HARD = ("out", "new values", "output", "values")


class Signature(NamedTuple):
    """What an operation returns, how many of that are differentiable, and with respect to what."""

    outputs: tuple[str, ...]
    differentiable: int
    inputs: tuple[str, ...]


_UPDATE = Signature(("new values",), 1, ("values", "weights", "targets", "predictions", "gates", "scale"))
SIGNATURES = {
    "product_key_lookup": Signature(("scores", "slots"), 1, ("queries", "keys")),
    "sparse_value_gather": Signature(("out",), 1, ("values", "weights")),
    "chunk_value_update": _UPDATE,
    "chunk_value_update_": _UPDATE._replace(inputs=()),
    "product_key_update": Signature(("new keys",), 1, ("queries", "keys")),
    "fast_weight_memory": Signature(
        ("output", "keys", "values", "slots", "weights"), 3, ("queries", "targets", "keys", "values", "gates")
    ),
    "fast_weight_memory_step": Signature(("output", "keys", "values"), 0, ()),
    "fast_weight_memory_varlen": Signature(
        ("output", "keys", "values", "slots", "weights"),
        3,
        ("queries", "targets", "keys", "values", "gates", "row_values"),
    ),
}


def check(case: Case, backend: str = "torch", device: str = "cpu") -> Reasons:
    """Run `case` through the package and the reference; AssertionError, or whatever the package raises, if it fails.

    Returns:
        Why it was judged in part; empty if it was judged in full.
    """
    checks: dict[str, Callable[..., Reasons]] = {
        "product_key_lookup": check_lookup,
        "chunk_value_update_": check_in_place,
        "product_key_update": check_key_step,
        "fast_weight_memory": check_memory,
        "fast_weight_memory_step": check_stream,
        "fast_weight_memory_varlen": check_varlen,
    }
    tensors = make_tensors(case, device)
    if case.op == "fast_weight_layer":
        with testing.poisoned_memory(), testing.assert_unchanged(tensors):
            return check_layer(case, tensors, backend, device)
    with testing.poisoned_memory(), testing.assert_unchanged(tensors):
        return checks.get(case.op, check_plain)(Run(case, backend, device), tensors)


class Run:
    """The two sides of a case."""

    def __init__(self, case: Case, backend: str, device: str) -> None:
        self.case, self.device = case, device
        self.dtype = torch.float64 if case.is_double else torch.float32  # of the computation
        self.signature = SIGNATURES[case.op]
        if case.options.get("clip") == 0.0 and not case.op.startswith("chunk"):
            # Gradients pass where G is exactly 0 and nowhere else, which is a matter of rounding.
            self.signature = self.signature._replace(inputs=())
        name = case.op.removesuffix("_step").removesuffix("update_") + "update" * case.op.endswith("update_")
        package = with_a_table if case.options.get("final") == "rows" else getattr(fwpkm_kernels, name)
        if case.op == "fast_weight_memory" and case.actions:
            package = in_segments([x for x in case.actions if isinstance(x, int)], package)
        definition = getattr(reference, name)
        if case.op == "fast_weight_memory_varlen":
            package, definition = with_tables(case.segments, package), with_tables((), definition)
        self.package = functools.partial(package, **case.options, backend=backend)
        options = {key: value for key, value in case.options.items() if key not in HOW}
        self.reference = functools.partial(definition, **options)
        self.incoming: list[Tensor] | None = None
        self.precision = case.options.get("precision", "ieee") if device == "cuda" else "ieee"
        normal = torch.finfo(torch.float32)
        self.floor = normal.tiny / normal.eps if device == "cuda" and not case.is_double else 0.0
        # Only sums of few factors are rightly as small as tiny inputs make them.
        small = {"tiny", "denormal"} & set(case.fills.values())
        self.may_vanish = not small or case.op == "product_key_update" or case.op.startswith("fast_weight")
        self.hard = HARD if {"nan", "inf"} & set(case.fills.values()) else ()
        # The slope of a distance's logarithm, squared, which the gradients of a key step have, and those through it.
        key_step = case.op == "product_key_update"
        is_steep = case.options.get("score") == "idw" and (key_step or case.options.get("key_gradient") == "all")
        self.steepness = 1 / case.options["eps"] if is_steep else 1.0
        # Integer keys have exact scores, and exact ties, which no rounding excuses.
        exact = all(case.fills.get(key, "same") in EXACT_FILLS for key in ("queries", "keys"))
        leaves_out = case.options.get("top_k", 0) < case.sizes.get("n", 0)
        integers = case.pattern == "equal" and exact
        all_tie = all(case.fills.get(key) in ("tiny", "denormal", "zeros") for key in ("queries", "keys"))
        self.cancels = is_steep and (all_tie or (integers and key_step))
        self.exact_ties = integers and (leaves_out or case.op == "product_key_lookup")
        # Rounding of what a memory keeps from chunk to chunk, if that is more than rounding of the computation.
        kept = [getattr(torch, case.dtypes[name]) for name in ("keys", "values") if case.op.startswith("fast_weight")]
        self.kept_eps = max((torch.finfo(x).eps for x in kept if x.itemsize < 4), default=0.0)

    def evaluate(self, function: Callable[..., Any], tensors: Tensors, **options: Any) -> Tensors:
        """Outputs and gradients by name. The incoming gradients are those of the first call, rounded as its outputs."""
        signature = self.signature
        leaves = {name: tensors[name].detach().requires_grad_() for name in signature.inputs if name in tensors}
        outputs = function(**tensors | leaves, **options)
        outputs = outputs[: len(signature.outputs)] if isinstance(outputs, tuple) else (outputs,)
        found = dict(zip(signature.outputs, outputs, strict=True))
        moving = outputs[: signature.differentiable]
        if self.incoming is None:
            layout = self.case.layouts.get("cotangent", "contiguous")
            self.incoming = [
                testing.random_cotangent(x, seed=self.case.seed + i, layout=layout) for i, x in enumerate(moving)
            ]
        if leaves:
            incoming = [gradient.to(x.dtype) for gradient, x in zip(self.incoming, moving, strict=True)]
            gradients = torch.autograd.grad(
                moving, list(leaves.values()), incoming, allow_unused=True, materialize_grads=True
            )
            for name, gradient in zip(leaves, gradients, strict=True):
                found[f"gradient of {name}"] = gradient.to_dense() if gradient.is_sparse else gradient
        return {name: x.detach() for name, x in found.items()}

    def judge(
        self,
        actual: Tensors,
        tensors: Tensors,
        *,
        length: int = 64,
        floors: dict[str, float] | None = None,
    ) -> Reasons:
        """All results against the reference."""
        evaluate = functools.partial(self.evaluate, self.reference)
        exact = evaluate(testing.as_float64(tensors))
        baseline = self.baseline(tensors, exact)
        larger = baseline
        if large := [name for name, fill in self.case.fills.items() if fill in ("huge", "extreme")]:
            larger = evaluate(self.larger(tensors, large))
        moves: Tensors = {}
        reasons: Reasons = set()
        for name, x in actual.items():
            if not x.is_floating_point():
                continue
            assert x.dtype == baseline[name].dtype, f"{name}: {x.dtype}, expected {baseline[name].dtype}"
            other, basis = exact[name], baseline[name]
            floor = max((floors or {}).get(name, 0.0), self.floor)
            budget = Budget(length, floor, name in self.hard, larger[name].isfinite())
            try:
                reasons |= budget.compare(name, x, other, basis)
            except AssertionError as error:
                moves = moves or self.moves(tensors, exact)
                farthest = torch.maximum(moves[name], (basis.double() - other).abs())
                farthest = torch.maximum(farthest, self.kept_eps / 2 * other.abs())
                factor = 10.0 if self.exact_ties else 3.0
                if self.may_vanish:
                    sources = self.incoming or () if name.startswith("gradient") else tensors.values()
                    largest, vanishes = compared_rms(sources, other, self.dtype)
                    if vanishes or self.cancels:
                        budget = budget._replace(floor=max(budget.floor, self.steepness * largest))
                try:
                    budget.compare(name, x, other, (other + farthest).to(x.dtype), factor)
                except AssertionError:
                    raise error from None
                reasons.add("unstable")
        return reasons

    def moves(self, tensors: Tensors, exact: Tensors) -> Tensors:
        """How far at most the exact result and the baseline are off for inputs that rounding may have changed."""
        farthest = {name: torch.zeros_like(x) for name, x in exact.items()}
        for i in range(TRIES):
            inputs, options = self.changed(tensors, i)
            for results in (
                self.evaluate(self.reference, inputs, **options),
                self.baseline(inputs, exact, **options),
            ):
                for name, x in results.items():
                    if x.is_floating_point():
                        farthest[name] = torch.maximum(farthest[name], (x.double() - exact[name]).abs())
        return farthest

    def baseline(self, tensors: Tensors, exact: Tensors, **options: Any) -> Tensors:
        """The reference in the dtypes of the case; of float64 as far off as float32 is, in units of rounding."""
        double = self.case.is_double
        dtypes = {name: torch.float32 if double else getattr(torch, x) for name, x in self.case.dtypes.items()}
        rounded = {name: x.to(dtypes[name]) if x.is_floating_point() else x for name, x in tensors.items()}
        if self.precision == "tf32":
            rounded = {name: as_tf32(x) for name, x in rounded.items()}
        results = self.evaluate(self.reference, rounded, **options)
        if not double:
            return results
        errors = {name: (x - exact[name]) * 2.0**-29 for name, x in results.items()}
        return {name: x + torch.where(errors[name].isfinite(), errors[name], 0.0) for name, x in exact.items()}

    def larger(self, tensors: Tensors, large: list[str]) -> Tensors:
        """The inputs in the precision of the computation, those named in `large` times a power of two."""
        computed = {name: x.to(self.dtype) if x.is_floating_point() else x for name, x in tensors.items()}
        return {name: x * 2**13 if name in large else x for name, x in computed.items()}

    def changed(self, tensors: Tensors, seed: int) -> tuple[Tensors, dict[str, float]]:
        """The inputs in float64, and eps, each number changed as the rule of the unstable says."""
        generator = torch.Generator().manual_seed(seed)
        info = torch.finfo(self.dtype)
        kept = ("keys", "values", "row_values") if self.case.op.startswith("fast_weight") else ()

        def noise(*shape: int, unit: float = 4 * info.eps) -> Tensor:
            return unit * (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1)

        changed = testing.as_float64(tensors)
        for name, x in changed.items():
            if x.is_floating_point() and name != "mask" and not (self.exact_ties and name in ("queries", "keys")):
                own = torch.finfo(tensors[name].dtype).eps / 2 if name in kept else 0.0
                relative = noise(*x.shape, unit=max(own, 4 * info.eps))
                step = x.cpu() * relative + x.cpu().sign() * info.tiny * noise(*x.shape)
                changed[name] = x + torch.where(step.isfinite(), step, 0.0).to(x.device)
        options = {"eps": self.case.options["eps"] * (1 + float(noise()))} if "eps" in self.case.options else {}
        return changed, options


def as_tf32(x: Tensor) -> Tensor:
    """Float32 with the 13 lowest bits cut off, as one product of tensor cores reads it; other dtypes as they are."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32) if x.dtype == torch.float32 else x


def check_plain(run: Run, tensors: Tensors) -> Reasons:
    """Operations whose slots are given: the gather, and a write into a new table."""
    actual = run.evaluate(run.package, tensors)
    if "new values" in actual and not run.case.options["weight_decay"]:
        testing.assert_untouched_rows_equal(tensors["values"], actual["new values"], tensors["slots"])
    return run.judge(actual, tensors, length=max(tensors["slots"].numel(), tensors["values"].shape[1]))


def check_in_place(run: Run, tensors: Tensors) -> Reasons:
    """The table is what the write into a new one gives, bit by bit, where it was; nothing else is written."""
    table = testing.with_layout(tensors["values"], run.case.layouts.get("values", "contiguous"))
    place = table.data_ptr()
    write = functools.partial(fwpkm_kernels.chunk_value_update_, **run.package.keywords)
    assert write(**tensors | {"values": table}) is None
    assert table.data_ptr() == place
    decays = bool(run.case.options["weight_decay"])
    expected = run.evaluate(run.package, tensors)
    if not decays:
        testing.assert_untouched_rows_equal(tensors["values"], table, tensors["slots"])
    rows = torch.arange(len(table), device=table.device)
    if decays and table.dtype == torch.bfloat16 and run.device == "cpu":
        # Triton's interpreter truncates where PyTorch, which decays the other rows of a new table, rounds.
        rows = tensors["slots"].unique()
    testing.assert_bitwise_equal(table[rows], expected["new values"][rows], "in place")
    return run.judge({"new values": table}, tensors, length=max(tensors["slots"].numel(), table.shape[1]))


def finite_rows(queries: Tensor, keys: Tensor, options: dict[str, Any]) -> Tensor:
    """[..., H]: all half scores are finite numbers in the precision of the computation, and the norms too."""
    scored = {key: options[key] for key in ("score", "eps")}
    dtype = torch.promote_types(torch.promote_types(queries.dtype, keys.dtype), torch.float32)
    finite = torch.stack(reference.lookup.half_scores(queries, keys, **scored)).isfinite().all(-1).all(0)
    norms = keys.to(dtype).square().sum(-1).isfinite().all(-1).all(-1)  # [H]
    return finite & norms & queries.to(dtype).square().sum(-1).isfinite()


def overflows(queries: Tensor, keys: Tensor, options: dict[str, Any]) -> Tensor:
    """[..., H]: which sub-keys are picked is not promised: half scores are not finite, and not for NaN in the query
    alone."""
    for_nan = queries.isnan().any(-1) & ~keys.isnan().flatten(1).any(-1)
    return ~finite_rows(queries, keys, options) & ~for_nan


def check_slots(run: Run, scores: Tensor | None, slots: Tensor, queries: Tensor, keys: Tensor) -> Reasons:
    """Slots [..., H, K] of a lookup are the exact ones up to rounding; of queries that overflow they are valid."""
    case = run.case
    n = keys.shape[2]
    assert ((slots >= 0) & (slots < n * n)).all(), f"slots outside of [0, {n * n})"
    finite = finite_rows(queries, keys, case.options).all(-1)  # [...]
    options = {key: case.options[key] for key in ("score", "eps")}
    _, exact = reference.product_key_lookup(queries.double(), keys.double(), slots.shape[-1], **options)
    testing.assert_lookup_matches(
        None if scores is None else scores[finite], slots[finite], queries[finite], keys, exact[finite],
        precision=run.precision, **options,
    )  # fmt: skip
    if run.exact_ties:
        testing.assert_bitwise_equal(slots[finite], exact[finite], "slots of keys that tie exactly")
    return set() if finite.all() else {"overflow"}


def most_terms(tensors: Tensors, top_k: int) -> int:
    """As many terms as a sub-key's gradient may have, or a dot product."""
    rows, heads, width = tensors["queries"].shape
    return max(1, rows * heads * top_k, width)


def check_lookup(run: Run, tensors: Tensors) -> Reasons:
    queries, keys = tensors["queries"], tensors["keys"]
    actual = run.evaluate(run.package, tensors)
    reasons = check_slots(run, actual["scores"], actual["slots"], queries, keys)
    exact, baseline = (run.reference(**x)[1] for x in (testing.as_float64(tensors), tensors))
    agree = ((actual["slots"] == exact) & (baseline == exact)).all(-1)  # [rows, H]
    keep = agree & finite_rows(queries, keys, run.case.options)
    # A logarithm is as wrong as the relative error of its argument, however near to 0 it is.
    floors = {"scores": 1.0 if run.case.options["score"] == "idw" else 0.0}
    if keep.all():
        length = most_terms(tensors, run.case.options["top_k"])
        return reasons | run.judge(actual, tensors, length=length, floors=floors)
    if not agree.all():
        reasons.add("near ties")
    if not keep.any():
        reasons.add("nothing left")
    for head in range(keep.shape[1]):
        part = {"queries": queries[keep[:, head], head : head + 1], "keys": keys[head : head + 1]}
        run.incoming = None
        # Again from the start: with other rows beside them, PyTorch's products may round otherwise.
        reasons |= check_lookup(run, part)
    return reasons


def step_floor(run: Run, weight: str, queries: Tensor) -> float:
    """How large the terms are whose sum moves a sub-key: under "dot" multiples of queries, which cancel if scores are
    nearly equal."""
    finite = queries[queries.isfinite()].double()
    largest = float(finite.square().mean().sqrt()) if run.case.options["score"] == "dot" and finite.numel() else 0.0
    return abs(run.case.options["lr"] * run.case.options[weight]) * largest


def decided_rows(run: Run, queries: Tensor, keys: Tensor, unit: float) -> Tensor:
    """[M]: errors of `unit` leave the rows of queries [M, H, Dk] no choice of their best sub-keys."""
    (rows, heads), n, top_k = queries.shape[:2], keys.shape[2], run.case.options["top_k"]
    if not rows or top_k >= n:
        return torch.ones(rows, dtype=torch.bool, device=queries.device)
    half, band = half_scores_and_bands(queries, keys, run.case.options["score"], run.case.options["eps"], unit)
    best, at = half.sort(-1, descending=True)
    band = band.gather(-1, at)
    reach = (best - band)[..., :top_k].amin(-1) > (best + band)[..., top_k:].amax(-1)  # [M·H, 2]
    return (reach | ~half.isfinite().all(-1)).all(-1).view(rows, heads).all(-1)


def check_key_step(run: Run, tensors: Tensors) -> Reasons:
    """Without the rows of which rounding may pick other sub-keys than the exact scores."""
    options = run.case.options
    reasons: Reasons = set()
    unit = 2.0**-53 if run.case.is_double else UNIT[run.precision]
    overflowing = overflows(tensors["queries"], tensors["keys"], options).any(-1)
    if overflowing.any():
        reasons.add("overflow")
        tensors = tensors | {"queries": tensors["queries"][~overflowing]}
    rows, top_k = len(tensors["queries"]), options["top_k"]
    if not run.exact_ties:
        decided = decided_rows(run, tensors["queries"], tensors["keys"], unit)
        if not decided.all():
            reasons.add("near ties")
            tensors = tensors | {"queries": tensors["queries"][decided]}
    if rows and not len(tensors["queries"]):
        reasons.add("nothing left")
    actual = run.evaluate(run.package, tensors)
    floors = {"new keys": step_floor(run, "weight", tensors["queries"])}
    return reasons | run.judge(actual, tensors, length=most_terms(tensors, top_k), floors=floors)


def check_memory(run: Run, tensors: Tensors) -> Reasons:
    actual = run.evaluate(run.package, tensors)
    stop, reasons = first_other_slots(run, tensors, actual["slots"])
    if stop == tensors["queries"].shape[1]:
        try:
            return reasons | run.judge(actual, tensors, floors=memory_floors(run, tensors))
        except AssertionError:
            stop = first_undecided(run, tensors)
            if stop == tensors["queries"].shape[1]:
                raise
            reasons.add("near ties")
    reasons |= set() if stop else {"nothing left"}
    run.incoming = None
    return reasons | check_memory(run, {**tensors, **tokens(tensors, 0, stop)})


def check_varlen(run: Run, tensors: Tensors) -> Reasons:
    """As a memory, of which each document is cut off at a chunk of its own."""
    actual = run.evaluate(run.package, tensors)
    documents = unpack(tensors)
    lengths = [x["queries"].shape[1] for x in documents]
    alone = dataclasses.replace(run.case, op="fast_weight_memory", actions=())
    stops, reasons = [], set()
    for s, (document, slots) in enumerate(zip(documents, actual["slots"].split(lengths), strict=True)):
        one = Run(alone, "torch", run.device)
        one.package = functools.partial(memory_of, run, tensors, s)
        stop, why = first_other_slots(one, document, slots.unsqueeze(0))
        run.exact_ties &= one.exact_ties
        stops.append(stop)
        reasons |= why
    if stops == lengths:
        try:
            return reasons | run.judge(actual, tensors, floors=memory_floors(run, tensors))
        except AssertionError:
            stops = [first_undecided(Run(alone, "torch", run.device), document) for document in documents]
            if stops == lengths:
                raise
            reasons.add("near ties")
    reasons |= set() if any(stops) else {"nothing left"}
    run.incoming = None
    return reasons | check_varlen(run, cut_documents(tensors, stops))


def memory_of(run: Run, tensors: Tensors, document: int, queries: Tensor, **_: Any) -> MemoryOutput:
    """What the package leaves of a document after so many tokens, in the company of the others."""
    lengths = tensors["cu_seqlens"].diff().tolist()
    lengths[document] = queries.shape[1]
    output, keys, *rest = run.package(**cut_documents(tensors, lengths))
    return MemoryOutput(output, keys[document], *rest)


def memory_floors(run: Run, tensors: Tensors) -> dict[str, float]:
    return {"keys": step_floor(run, "addressing_weight", tensors["queries"])}


def tokens(tensors: Tensors, begin: int, end: int) -> Tensors:
    return {name: tensors[name][:, begin:end] for name in BY_TOKEN if name in tensors}


def first_other_slots(run: Run, tensors: Tensors, slots: Tensor) -> tuple[int, Reasons]:
    """Where the chunk begins in which slots [B, T, J] first differ from the exact ones here or in the baseline; T if
    nowhere. What differs is explained by the keys that the package itself has there."""
    length, chunk_size = slots.shape[1], run.case.options["chunk_size"]
    with torch.no_grad():
        exact, baseline = (run.reference(**x) for x in (testing.as_float64(tensors), tensors))
        other = ((slots != exact.slots) | (baseline.slots != exact.slots)).any(-1)  # [B, T]
        overflowing = overflows(tensors["queries"], tensors["keys"], run.case.options).any(-1)
        if run.case.options["step"] == "normalized":
            squares = exact.weights.square().sum(-1)
            info = torch.finfo(run.dtype)
            overflowing |= (squares > 0) & ~((squares > 2 * info.tiny) & (squares < info.max / 2))
        reasons = {why for why, at in (("near ties", other), ("overflow", overflowing)) if at.any()}
        if not reasons:
            return length, set()
        other = (other | overflowing).any(0)  # [T]
        heads = tensors["keys"].shape[0]
        for begin in range(0, length, chunk_size):
            end = min(begin + chunk_size, length)
            keys = tensors["keys"]
            if begin:
                keys = run.package(**{**tensors, **tokens(tensors, 0, begin)}).keys
                run.exact_ties = False  # of keys that have moved, rounding decides
            picked = slots[:, begin:end].unflatten(-1, (heads, -1))
            reasons |= check_slots(run, None, picked, tensors["queries"][:, begin:end], keys)
    return int(other.nonzero()[0]) // chunk_size * chunk_size, reasons


def without_gates(actions: Iterable[int | str], length: int, device: str) -> Tensor:
    """[length]: of the tokens after the last reset, which are in a step that is given neither gates nor mask."""
    bare, begin, is_bare = torch.zeros(length, dtype=torch.bool, device=device), 0, False
    for action in actions:
        if isinstance(action, int):
            bare[begin : begin + action] = is_bare
            begin += action
        elif action in RESETS:
            begin = 0
        is_bare = action == "no gates"
    return bare


def first_undecided(run: Run, tensors: Tensors) -> int:
    """Where the chunk begins whose key step may take other sub-keys for the errors that its keys have; T if nowhere.
    Unlike slots, these do not come back."""
    length, chunk_size = tensors["queries"].shape[1], run.case.options["chunk_size"]
    exact = testing.as_float64(tensors)
    for begin in range(0, length, chunk_size):
        unit = 2.0**-53 if run.case.is_double else UNIT[run.precision]
        keys = tensors["keys"]
        if begin:
            with torch.no_grad():
                keys = run.reference(**{**exact, **tokens(exact, 0, begin)})[1]
            unit = max(16 * unit, torch.finfo(tensors["keys"].dtype).eps)
        rows = tensors["queries"][:, begin : begin + chunk_size].flatten(0, 1)
        if (begin or run.case.pattern != "equal") and not decided_rows(run, rows, keys, unit).all():
            return begin
    return length


def check_stream(run: Run, tensors: Tensors, most: int | None = None) -> Reasons:
    """Steps against the whole in the reference; slots of the whole in the package say how far they can be compared, and
    so does `most`."""
    initial = MemoryState(tensors["keys"], tensors["values"])
    step = functools.partial(fwpkm_kernels.fast_weight_memory_step, **run.package.keywords)
    length, chunk_size = tensors["queries"].shape[1], run.case.options["chunk_size"]
    bare = without_gates(run.case.actions, length, run.device)
    optional = {name: torch.where(bare, 1, tensors[name]).to(tensors[name].dtype) for name in ("gates", "mask")
                if name in tensors}  # fmt: skip
    tensors = tensors | optional
    with torch.no_grad():
        stop, reasons = first_other_slots(run, tensors, run.package(**tensors).slots)
    stop = stop if most is None else min(stop, most)
    if length and not stop:
        reasons.add("nothing left")
    state, outputs, is_bare = initial, [], False
    for action in run.case.actions:
        begin = state.position
        if action == "clone":
            other = state
            state = state.clone()
            # The other goes its own way.
            step(other, **tokens(tensors, 0, 1))
        elif action == "state_dict":
            saved = state.state_dict()
            state = MemoryState(tensors["keys"], tensors["values"])
            state.load_state_dict(saved)
        elif action == "pickle":
            state = pickle.loads(pickle.dumps(state))
        elif action == "select" and outputs:  # before its first step a state has no items
            turned = list(reversed(range(len(tensors["queries"]))))
            state = state.select(turned)
            state.select_(turned)
        elif action == "rollback":
            draft = tokens(tensors, 0, chunk_size - 1 - begin % chunk_size)  # which are not the next ones
            step(state, **draft)
            state.rollback(draft["queries"].shape[1])
            assert state.position == begin
        elif action in RESETS:
            state.reset(touched_rows_only=action != "reset")
            outputs = []
            for name in ("keys", "values"):
                testing.assert_bitwise_equal(getattr(state, name), tensors[name], f"{name} after a reset")
            assert state.position == 0
        elif isinstance(action, int):
            given = tokens(tensors, begin, min(begin + action, stop))
            if is_bare:
                given = {name: x for name, x in given.items() if name not in optional}
            outputs.append(step(state, **given))
            assert state.position == min(begin + action, stop)
        is_bare = action == "no gates"
    actual = {"output": torch.cat(outputs, 1), "keys": state.keys, "values": state.values}
    whole = {**tensors, **tokens(tensors, 0, state.position)}
    try:
        return reasons | run.judge(actual, whole, floors=memory_floors(run, whole))
    except AssertionError:
        undecided = first_undecided(run, whole)
        if undecided == state.position:
            raise
    return reasons | {"near ties"} | check_stream(run, tensors, undecided)
