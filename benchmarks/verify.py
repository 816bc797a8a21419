"""Numbers before times: each provider is checked against the reference, and refused where it is wrong.

The reference is dense and takes differences of every query with every sub-key, so it is given no more than tells the
same:

- Where slots are given, the table is cut down to the rows that they name; that the others stay is checked on all.
- A lookup is compared in a sample of its tokens.
- Key steps, sequences, streams and layers are compared twice. On few tokens, in two shorter chunks (of a prompt, two
  calls of two), with the reference, within the error budget. And on the inputs that are timed, in their first two
  chunks, with the sparse form in float64, which the tests compare with the reference: there rounding decides a few
  lookups, and what follows from them, so one row in a hundred may be off.
- Columns of a table have nothing to do with each other but through sums over them, so of a sequence the reference gets
  a sample of the columns, and backward has an incoming gradient in no other.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.costs import Cost
from benchmarks.inputs import Configuration, Inputs
from benchmarks.providers import PACKAGE, Provider
from benchmarks.registry import Row
from fwpkm_kernels import testing

#: Lookups are compared with the reference in as many rows as keep its differences [rows, H, n, Dk] at this size.
_SAMPLE_ELEMENTS = 2**24
#: Key steps and sequences, which it differentiates twice, in as many as keep them at this one.
_FEW_ELEMENTS = 2**23
#: As many columns as keep a table of them at this size.
_COLUMN_ELEMENTS = 2**22
#: The reference of a layer needs all columns, and gets a table of so many sub-keys.
_LAYER_SUB_KEYS = 64
_CHUNKS = 2
#: On the inputs that are timed, rows [D] may have this error relative to their RMS, all but the share given.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
_SHARE = 0.01
#: Of queries, rounding may decide the lookup of such a share. A query that picks another sub-key takes part in other
#: gradients too, of all sub-keys that it picks: of a few hundred sub-keys one such query in a thousand reaches many.
_QUERY_SHARE = 1e-3

#: Results and gradients by name: "output", "keys", "values", "gradient of keys".
Numbers = dict[str, Tensor]


def verify(provider: Provider, shared: "Shared") -> None:
    """Raise AssertionError unless a provider of a row agrees with the reference."""
    row = shared.row
    if row.operation.name == "lookup":
        _verify_lookup(provider, shared)
    elif "slots" in shared.inputs:
        _verify_table(provider, shared)
    else:
        _verify_few(provider, shared)
        if row.operation.sparse is not None and row.configuration.length >= row.configuration.chunk:
            _verify_timed(provider, shared)  # fewer tokens take the same way as the few


class Case(NamedTuple):
    """Inputs of a key step, sequence, stream or layer, and what is expected of them."""

    inputs: Inputs
    step: int  #: tokens of each call of a stream
    cotangent: Tensor | None  #: of the first output, or the columns and tokens of it that are compared
    exact: Numbers
    baseline: Numbers


class Shared:
    """What the providers of a row share: inputs of seed 0, what they cost, and what the reference says of them. Each is
    made when it is first asked for: what raises there is the error of that measurement alone."""

    def __init__(self, row: Row, kind: str):
        self.row = row
        self.kind = kind
        self._few: dict[int, Case] = {}

    @functools.cached_property
    def inputs(self) -> Inputs:
        return self.row.inputs(self.kind)

    @functools.cached_property
    def cost(self) -> Cost:
        return self.row.cost(self.inputs)

    @functools.cached_property
    def addressed(self) -> Tensor:
        return torch.unique(self.inputs["slots"])

    @functools.cached_property
    def cotangent(self) -> Tensor | None:
        return None if self.row.direction == "forward" else self.row.cotangent(self.inputs)

    @functools.cached_property
    def of_slots(self) -> tuple[Numbers, Numbers]:
        """Where slots are given, what the reference makes of the rows that they name: in float64, and as it is."""
        compact = dict(self.inputs)
        compact["values"] = self.inputs["values"][self.addressed]
        compact["slots"] = torch.searchsorted(self.addressed, self.inputs["slots"])
        cotangent = self.cotangent
        if cotangent is not None and self.row.operation.name == "update":
            cotangent = cotangent[self.addressed]
        return _of_reference(self.row, compact, cotangent)

    def few(self, attempt: int) -> Case:
        """A few tokens, other ones at each attempt, as the reference has them."""
        if attempt not in self._few:
            c, step = _of_few(self.row)
            inputs = self.row.operation.make_inputs(c, self.kind, 1000 + attempt)
            reduced = _reduced(inputs)
            cotangent = None if self.row.direction == "forward" else self.row.cotangent(reduced)
            self._few[attempt] = Case(inputs, step, cotangent, *_of_reference(self.row, reduced, cotangent))
        return self._few[attempt]

    @functools.cached_property
    def timed(self) -> Case:
        """The inputs that are timed, as the sparse form has the first chunks of them, in float64."""
        inputs, c, row = self.inputs, self.row.configuration, self.row
        if "memory" in inputs and c.length == c.chunk:  # a second step goes on with the state of the first
            more = row.inputs(self.kind, 1)
            inputs = {**inputs, **{name: torch.cat([inputs[name], more[name]], dim=1) for name in _tokens(inputs)}}
        reduced = _reduced(inputs)
        reduced |= {name: reduced[name][:, : _CHUNKS * c.chunk] for name in _tokens(inputs)}
        # Gradients of a layer are those of few tokens.
        cotangent = None if row.direction == "forward" or "hidden_states" in inputs else row.cotangent(reduced)
        assert row.operation.sparse is not None
        exact = _numbers(row, row.operation.sparse, testing.as_float64(reduced), cotangent)
        if any(reduced[name].shape[1] < inputs[name].shape[1] for name in _tokens(inputs)):
            exact = {key: x for key, x in exact.items() if key not in ("keys", "values")}  # not those of the end
        return Case(inputs, c.length, cotangent, exact, {})


def _of_few(row: Row) -> tuple[Configuration, int]:
    """The configuration with few tokens: of a sequence at most two items and two chunks, of a stream two calls, since
    the first one of a graph is run without it. And the tokens of a call."""
    c = row.configuration
    if row.operation.name.startswith("layer"):
        c = dataclasses.replace(c, sub_keys=min(c.sub_keys, _LAYER_SUB_KEYS))
    rows = max(8, _FEW_ELEMENTS // (c.heads * c.sub_keys * c.key_width))
    if row.operation.name == "key-step":
        return dataclasses.replace(c, tokens=min(rows, c.tokens)), 0
    at_once, batch = min(_CHUNKS, max(1, c.length // c.chunk)), min(c.batch, 2)
    chunks = at_once * (2 if row.operation.in_place else 1)
    chunk = min(c.chunk, rows // (max(_CHUNKS, chunks) * batch))
    step = at_once * chunk if c.length >= c.chunk else c.length
    return dataclasses.replace(c, tokens=batch * chunks * chunk, batch=batch, chunk=chunk), step


def _tokens(inputs: Inputs) -> tuple[str, ...]:
    """The names of the inputs [B, T, ...]; a key step has none."""
    return ("hidden_states",) if "hidden_states" in inputs else ("queries", "targets") if "targets" in inputs else ()


def _columns(inputs: Inputs) -> Any:
    """Some columns of a table, from all over it; of a layer all."""
    if "hidden_states" in inputs:
        return slice(None)
    slots, width = inputs["values"].shape
    count = min(width, max(2, _COLUMN_ELEMENTS // slots))
    return torch.linspace(0, width - 1, count, device=inputs["values"].device).long()


def _flat(inputs: Inputs) -> Inputs:
    """A stream's inputs as those of a sequence from then on; without gradients."""
    inputs = {**inputs, **inputs["memory"]._asdict()} if "memory" in inputs else inputs
    return {name: x.detach() if isinstance(x, Tensor) else x for name, x in inputs.items() if name != "memory"}


def _reduced(inputs: Inputs) -> Inputs:
    """Inputs of a sequence with some columns of targets and table."""
    inputs = _flat(inputs)
    cut = [name for name in ("targets", "values") if "targets" in inputs]
    return {**inputs, **{name: inputs[name][..., _columns(inputs)] for name in cut}}


def _in_full(cotangent: Tensor, inputs: Inputs) -> Tensor:
    """The same gradient for inputs with all columns and tokens: 0 in the others."""
    if "targets" not in inputs:
        return cotangent
    full = torch.zeros_like(inputs["targets"])
    full[:, : cotangent.shape[1], _columns(inputs)] = cotangent.to(full.dtype)
    return full


def _numbers(row: Row, function: Callable[..., Any], inputs: Inputs, cotangent: Tensor | None) -> Numbers:
    """Outputs, and with a cotangent gradients. A key step returns keys; a sequence output, keys, values and more."""
    wrt = () if cotangent is None else row.wrt
    outputs, gradients = testing.forward_and_gradients(function, inputs, wrt=wrt, cotangent=cotangent)
    names = ("keys",) if row.operation.name == "key-step" else ("output", "keys", "values")
    return dict(zip(names, outputs, strict=False)) | {f"gradient of {name}": x for name, x in gradients.items()}


def _of_reference(row: Row, inputs: Inputs, cotangent: Tensor | None) -> tuple[Numbers, Numbers]:
    """In float64, and as it is."""
    exact = _numbers(row, row.operation.reference, testing.as_float64(inputs), cotangent)
    return exact, _numbers(row, row.operation.reference, inputs, cotangent)


def _run(row: Row, provider: Provider, case: Case) -> Numbers:
    """What a provider makes of it: of a stream, steps from a fresh state, and the state that they leave."""
    inputs, tokens = case.inputs, _tokens(case.inputs)
    if not row.operation.in_place:
        cotangent = None if case.cotangent is None else _in_full(case.cotangent, inputs)
        return _numbers(row, provider.run, inputs, cotangent)
    parts = [
        {**inputs, **{name: inputs[name][:, begin : begin + case.step] for name in tokens}}
        for begin in range(0, inputs[tokens[0]].shape[1], case.step)
    ]
    own = provider.own(parts[0])
    found = {"output": torch.cat([provider.run(**{**part, **own}) for part in parts], dim=1)}
    if "memory" in inputs:
        found |= {"keys": own["memory"].keys, "values": own["memory"].values}
    return found


def _found(
    provider: Provider, shared: Shared, case: Case, *, rows_are_exact: bool
) -> Iterator[tuple[str, str, Any, Tensor, Tensor]]:
    """What there is of `case.exact`: the first tokens, some columns, and, of a table, the rows that changed, which are
    the same ones if `rows_are_exact`. Yields a name for messages, the key, the rows, what was found and what is exact.
    """
    name, inputs = f"{shared.row.name}: {provider.name}", _flat(case.inputs)
    found = _run(shared.row, provider, case)
    for key, exact in case.exact.items():
        x, rows, of = found[key].detach(), ..., key.removeprefix("gradient of ")
        x = x.to_dense() if x.is_sparse else x
        if of in ("output", *_tokens(inputs)):
            x = x[:, : exact.shape[1]]
        if of in ("output", "targets"):
            x = x[..., _columns(inputs)]
        if of == "values":
            before = inputs["values"] if key == "values" else x.new_zeros(()).expand(x.shape)
            rows, moved = (exact != before[:, _columns(inputs)].double()).any(1), _rows_that_differ(before, x)
            if rows_are_exact and (moved & ~rows).any():
                raise AssertionError(f"{name}: {key}: rows of the table that are not addressed have changed")
            rows |= moved
            x = x[rows][:, _columns(inputs)]
        yield f"{name}: {key}", key, rows, x, exact[rows]


def _rows_that_differ(before: Tensor, after: Tensor) -> Tensor:
    """Which rows, [N]; block by block, since a table may fill the device."""
    blocks = max(1, 2**26 // before.shape[1])
    return torch.cat([(a != b).any(1) for a, b in zip(before.split(blocks), after.split(blocks), strict=True)])


def _verify_few(provider: Provider, shared: Shared) -> None:
    """Within the error budget of the reference."""

    def verify_once(case: Case) -> None:
        inputs = _flat(case.inputs)
        first = inputs[(*_tokens(inputs), "queries")[0]]
        length = max(first[..., 0].numel() * inputs["top_k"], first.shape[-1], *inputs["keys"].shape[2:])
        for name, key, rows, found, exact in _found(provider, shared, case, rows_are_exact=True):
            testing.assert_within_budget(found, exact, case.baseline[key][rows], name=name, reduction_length=length)

    # Where rounding decides a lookup, right numbers fail; other tokens do not meet that again, and wrong ones do.
    with contextlib.suppress(AssertionError):
        return verify_once(shared.few(0))
    return verify_once(shared.few(1))  # after the exception is gone, and the tables that it holds


def _verify_timed(provider: Provider, shared: Shared) -> None:
    """Mostly near: rounding decides a few lookups, and what follows from them."""
    tolerance, case = _TOLERANCE[shared.row.configuration.dtype], shared.timed
    for name, key, _, found, exact in _found(provider, shared, case, rows_are_exact=False):
        error = (found.double() - exact).square().sum(-1)
        far = error > tolerance**2 * exact.square().sum(-1).mean()
        share = float((far | ~error.isfinite()).double().mean())
        if share > (_key_share(case) if key == "gradient of keys" else _SHARE):
            raise AssertionError(
                f"{name}: {share:.2%} of the rows of the timed inputs are off by more than {tolerance}"
            )


def _key_share(case: Case) -> float:
    """The share of the sub-keys whose gradient the queries may reach that rounding has given other picks."""
    tokens = case.exact["gradient of queries"].shape[:-2].numel()
    return min(0.5, max(_SHARE, _QUERY_SHARE * tokens * (case.inputs["top_k"] + 1) / case.inputs["keys"].shape[-2]))


def _verify_table(provider: Provider, shared: Shared) -> None:
    """The rows that slots name within the error budget; of the others nothing changes, and no gradient is taken."""
    row, inputs, (exact, baseline) = shared.row, shared.inputs, shared.of_slots
    values = inputs["values"]
    if row.operation.in_place:
        own = provider.own(inputs)
        provider.run(**{**inputs, **own})
        found = {"output": own["values"]}
    else:
        found = _numbers(row, provider.run, inputs, shared.cotangent)
    others = torch.ones(len(values), dtype=torch.bool, device=values.device)
    others[shared.addressed] = False
    before = {"gradient of values": shared.cotangent, "output": values}
    if row.operation.name.startswith("gather"):
        before = {"gradient of values": values.new_zeros(()).expand(values.shape)}
    for key, x in found.items():
        name = f"{row.name}: {provider.name}: {key}"
        if key in before:
            x = x.to_dense() if x.is_sparse else x
            if (_rows_that_differ(before[key], x) & others).any():
                raise AssertionError(f"{name}: rows that are not addressed have changed")
            x = x[shared.addressed]
        length = max(inputs["slots"].numel(), values.shape[1])
        testing.assert_within_budget(x, exact[key], baseline[key], name=name, reduction_length=length)


def _verify_lookup(provider: Provider, shared: Shared) -> None:
    """All tokens are looked up, and every so many compared; in backward only those have an incoming gradient."""
    row, inputs = shared.row, shared.inputs
    name, queries, keys = f"{row.name}: {provider.name}", inputs["queries"], inputs["keys"]
    rows = max(8, _SAMPLE_ELEMENTS // max(1, keys.numel()))
    sample = torch.arange(0, len(queries), max(1, len(queries) // rows), device=queries.device)
    part = {**inputs, "queries": queries[sample]}
    precision = "tf32x3" if queries.is_cuda and provider.name == PACKAGE else "ieee"

    exact_slots = row.operation.reference(**testing.as_float64(part))[1]
    scores, slots = provider.run(**inputs)
    testing.assert_lookup_matches(
        scores[sample], slots[sample], part["queries"], keys, exact_slots, score=inputs["score"], precision=precision
    )
    if row.direction == "forward":
        return
    # Where rounding picked other slots, or the same in another order, gradients are those of other scores.
    agrees = (slots[sample] == exact_slots).flatten(1).all(1)
    if agrees.float().mean() < 0.9:
        raise AssertionError(f"{name}: {int((~agrees).sum())} of {len(sample)} tokens have other slots")
    cotangent = torch.zeros_like(scores)
    cotangent[sample[agrees]] = row.cotangent(inputs)[sample[agrees]].to(cotangent.dtype)
    exact, baseline = _of_reference(row, part, cotangent[sample])
    found = _numbers(row, provider.run, inputs, cotangent)
    found["gradient of queries"] = found["gradient of queries"][sample]
    for key in ("gradient of queries", "gradient of keys"):
        about = {"name": f"{name}: {key}", "reduction_length": max(queries.shape)}
        testing.assert_within_budget(found[key], exact[key], baseline[key], **about)
