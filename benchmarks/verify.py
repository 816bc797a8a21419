"""Numbers before times: each provider is checked against the reference, and refused where it is wrong.

The reference is dense and takes differences of every query with every sub-key, so it is given no more than tells the
same:

- Where slots are given, the table is cut down to the rows that they name; that the others stay is checked on all.
- A lookup is compared in a sample of its tokens.
- Key steps, sequences and streams are compared twice. On a few of the tokens, in two shorter chunks (of a prompt, two
  calls of two), with the reference, within the error budget. And on the inputs that are timed, in their first two
  chunks, with the sparse form in float64, which the tests compare with the reference: there rounding decides a few
  lookups, and what follows from them, so one row in a hundred may be off.
- Columns of a table have nothing to do with each other but through sums over them, so of a sequence the reference gets
  a sample of the columns, and backward has an incoming gradient in no other.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.inputs import Inputs
from benchmarks.registry import PACKAGE, Provider, Row
from fwpkm_kernels import testing

#: Lookups are compared with the reference in as many rows as keep its differences [rows, H, n, Dk] at this size.
_SAMPLE_ELEMENTS = 2**24
#: Key steps and sequences, which it differentiates twice, in as many as keep them at this one.
_SHORT_ELEMENTS = 2**23
#: As many columns as keep a table of them at this size.
_COLUMN_ELEMENTS = 2**22
_CHUNKS = 2
#: On the inputs that are timed, rows [D] may have this error relative to their RMS, all but the share given.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
_SHARE = 0.01


def verify(row: Row, provider: Provider, inputs: Inputs, expected: "Expected") -> None:
    """Raise AssertionError unless the provider agrees with the reference on `inputs`."""
    if row.operation.name == "lookup":
        _verify_lookup(row, provider, inputs)
    elif row.operation.name.startswith("layer"):
        _verify_layer(row, provider, inputs, expected)
    elif row.operation.sparse is None:
        _verify_table(row, provider, inputs, expected)
    elif "memory" in inputs:
        _verify_stream(row, provider, inputs, expected)
    else:
        _verify_sequence(row, provider, inputs, expected)


class Numbers(NamedTuple):
    """Results of a key step, sequence or stream: outputs, and gradients, by name."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]


class Expected:
    """What the reference says of a row and its inputs: computed once, for all providers."""

    def __init__(self, row: Row, inputs: Inputs):
        self.row = row
        self.inputs = inputs
        self._short: dict[int, tuple[Inputs, Numbers, Numbers]] = {}
        self._short_layer: dict[int, tuple[Inputs, dict[str, Tensor], dict[str, Tensor]]] = {}

    @functools.cached_property
    def addressed(self) -> Tensor:
        return torch.unique(self.inputs["slots"])

    @functools.cached_property
    def results(self) -> tuple[Any, Any]:
        """Outputs and gradients of the reference in float64, and in the precision of the inputs; where slots are given,
        of the rows that are addressed."""
        compact = dict(self.inputs)
        compact["values"] = self.inputs["values"][self.addressed]
        compact["slots"] = torch.searchsorted(self.addressed, self.inputs["slots"])
        cotangent, wrt = None, ()
        if self.row.direction == "backward":
            wrt = self.row.wrt
            cotangent = self.row.cotangent(self.inputs)
            if self.row.operation.name == "update":
                cotangent = cotangent[self.addressed]
        compare = functools.partial(testing.forward_and_gradients, self.row.operation.reference, wrt=wrt)
        exact = compare(testing.as_float64(compact), cotangent=testing.as_float64(cotangent))
        return exact, compare(compact, cotangent=cotangent)

    def short(self, attempt: int) -> tuple[Inputs, Numbers, Numbers]:
        """Few tokens, other ones at each attempt, and what the reference makes of them: exact, and as a baseline."""
        if attempt not in self._short:
            inputs = _short_inputs(self.row, self.inputs, attempt)
            reduced = _reduced(inputs)
            exact = _numbers(self.row, self.row.operation.reference, testing.as_float64(reduced))
            self._short[attempt] = inputs, exact, _numbers(self.row, self.row.operation.reference, reduced)
        return self._short[attempt]

    def short_layer(self, attempt: int) -> tuple[Inputs, dict[str, Tensor], dict[str, Tensor]]:
        """The same for a layer: its output and gradients, on the CPU."""
        if attempt not in self._short_layer:
            row, short = self.row, _short_layer_inputs(self.row, self.inputs, attempt)
            wrt = row.wrt if row.direction == "both" else ()
            on_cpu = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in short.items()}
            cotangent = row.cotangent(short).cpu() if wrt else None

            def numbers(given: Inputs) -> dict[str, Tensor]:
                (output,), gradients = testing.forward_and_gradients(
                    row.operation.reference, given, wrt=wrt, cotangent=cotangent
                )
                return {"output": output, **gradients}

            self._short_layer[attempt] = short, numbers(testing.as_float64(on_cpu)), numbers(on_cpu)
        return self._short_layer[attempt]

    @functools.cached_property
    def timed_layer(self) -> Tensor:
        """The output of a layer's first chunks on the inputs that are timed, as the sparse form has it."""
        inputs, c = self.inputs, self.row.configuration
        assert self.row.operation.sparse is not None
        given = {**inputs, "hidden_states": inputs["hidden_states"][:, : _CHUNKS * c.chunk]}
        with torch.no_grad():
            output: Tensor = self.row.operation.sparse(**testing.as_float64(given))
        return output

    @functools.cached_property
    def timed(self) -> tuple[Inputs, Numbers]:
        """The inputs that are timed, and what the sparse form makes of their first chunks."""
        inputs, c = self.inputs, self.row.configuration
        if "memory" in inputs and c.length == c.chunk:  # a second step goes on with the state of the first
            inputs = _joined([inputs, self.row.inputs(inputs["queries"].device.type, 1)])
        reduced = _reduced(inputs)
        if "targets" in reduced:
            reduced |= {name: reduced[name][:, : _CHUNKS * c.chunk] for name in ("queries", "targets")}
        assert self.row.operation.sparse is not None
        return inputs, _numbers(self.row, self.row.operation.sparse, testing.as_float64(reduced))


def _verify_table(row: Row, provider: Provider, inputs: Inputs, expected: Expected) -> None:
    name = f"{row.name}: {provider.name}"
    values, addressed = inputs["values"], expected.addressed
    (exact, exact_gradients), (baseline, baseline_gradients) = expected.results
    length = max(inputs["slots"].numel(), values.shape[1])
    within_budget = functools.partial(testing.assert_within_budget, reduction_length=length)
    gradients: dict[str, Tensor] = {}
    if row.operation.in_place:
        own = provider.own(inputs)
        provider.run(**{**inputs, **own})
        out = own["values"]
    elif row.direction == "backward":
        (out,), gradients = testing.forward_and_gradients(
            provider.run, inputs, wrt=row.wrt, cotangent=row.cotangent(inputs)
        )
    else:
        out = provider.run(**inputs)
    others = torch.ones(len(values), dtype=torch.bool, device=values.device)
    others[addressed] = False
    if out.shape == values.shape and not row.operation.name.startswith("gather"):
        if (_rows_that_differ(values, out) & others).any():
            raise AssertionError(f"{name}: rows that were not addressed have changed")
        out = out[addressed]
    within_budget(out, exact[0], baseline[0], name=f"{name}: output")
    for key, gradient in gradients.items():
        if key == "values" and row.operation.name != "update":
            gradient = gradient.to_dense() if gradient.is_sparse else gradient
            if ((gradient != 0).any(1) & others).any():
                raise AssertionError(f"{name}: the gradient of rows that were not addressed is not 0")
        if key == "values":
            gradient = gradient[addressed]
        within_budget(gradient, exact_gradients[key], baseline_gradients[key], name=f"{name}: gradient of {key}")


def _verify_lookup(row: Row, provider: Provider, inputs: Inputs) -> None:
    """All tokens are looked up, and every so many compared; in backward only those have an incoming gradient."""
    name = f"{row.name}: {provider.name}"
    queries, keys = inputs["queries"], inputs["keys"]
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
    compare = functools.partial(testing.forward_and_gradients, wrt=row.wrt)
    _, gradients = compare(provider.run, inputs, cotangent=cotangent)
    reference = row.operation.reference
    _, exact = compare(reference, testing.as_float64(part), cotangent=cotangent[sample].double())
    _, baseline = compare(reference, part, cotangent=cotangent[sample])
    gradients["queries"] = gradients["queries"][sample]
    for key, gradient in gradients.items():
        testing.assert_within_budget(
            gradient, exact[key], baseline[key], name=f"{name}: gradient of {key}", reduction_length=max(queries.shape)
        )


def _chunks_at_once(row: Row) -> int:
    """Of a few tokens, what one call gets; a call of less than a chunk gets its own tokens."""
    c = row.configuration
    return min(_CHUNKS, max(1, c.length // c.chunk))


def _short_inputs(row: Row, inputs: Inputs, attempt: int) -> Inputs:
    """Few tokens of those that are timed: of a sequence, at most two items and two chunks; of a stream, two calls."""
    c = row.configuration
    keys = inputs["memory"].keys if "memory" in inputs else inputs["keys"]
    rows = max(8, _SHORT_ELEMENTS // keys.numel())

    def cut(x: Tensor, count: int) -> Tensor:
        begin = min(attempt * count, x.shape[-3 if x is queries else -2] - count)
        return x.narrow(x.dim() - (3 if x is queries else 2), begin, count)

    queries = inputs["queries"]
    if "targets" not in inputs:
        return {**inputs, "queries": cut(queries, min(rows, c.tokens))}
    batch = min(c.batch, 2)
    # A stream goes on in a second call: the first one of a graph is run without it.
    chunks = _chunks_at_once(row) * (2 if "memory" in inputs else 1)
    chunk = min(c.chunk, rows // (max(_CHUNKS, chunks) * batch))
    length = chunk * chunks
    if "memory" in inputs:
        seeds = range(-(-length // c.length))
        inputs = _joined([row.inputs(queries.device.type, 1000 * attempt + seed) for seed in seeds])
        queries = inputs["queries"]
    short = {"queries": cut(queries, length)[:batch], "targets": cut(inputs["targets"], length)[:batch]}
    return {**inputs, **short, "chunk_size": chunk}


def _joined(parts: list[Inputs]) -> Inputs:
    """The tokens of several calls one after the other."""
    return {**parts[0], **{name: torch.cat([part[name] for part in parts], dim=1) for name in ("queries", "targets")}}


def _columns(values: Tensor) -> Tensor:
    """Some columns of a table, from all over it."""
    count = min(values.shape[1], max(2, _COLUMN_ELEMENTS // values.shape[0]))
    return torch.linspace(0, values.shape[1] - 1, count, device=values.device).long()


def _reduced(inputs: Inputs) -> Inputs:
    """Inputs of a sequence with some columns of targets and table; a stream's are those of a sequence from then on."""
    inputs = dict(inputs)
    if "memory" in inputs:
        inputs |= inputs.pop("memory")._asdict()
    if "values" not in inputs:
        return inputs
    columns = _columns(inputs["values"])
    cut = {name: inputs[name].detach()[..., columns] for name in ("targets", "values")}
    return {**{name: x.detach() if isinstance(x, Tensor) else x for name, x in inputs.items()}, **cut}


def _numbers(row: Row, function: Callable[..., Any], reduced: Inputs) -> Numbers:
    """What the reference, or what stands for it, makes of reduced inputs."""
    # The cotangent is that of all columns and tokens, of which these inputs may have some.
    if row.direction == "forward":
        with torch.no_grad():
            found = function(**reduced)
        return Numbers(_named(found), {})
    cotangent = _cotangent(row, reduced)
    outputs, gradients = testing.forward_and_gradients(function, reduced, wrt=row.wrt, cotangent=cotangent)
    return Numbers(_named(outputs), gradients)


def _named(outputs: Any) -> dict[str, Tensor]:
    """A key step returns keys; a sequence output, keys, values, and more."""
    if isinstance(outputs, Tensor):
        return {"keys": outputs}
    return {"keys": outputs[0]} if len(outputs) == 1 else dict(zip(("output", "keys", "values"), outputs, strict=False))


def _cotangent(row: Row, inputs: Inputs) -> Tensor:
    """An incoming gradient of the first output, drawn for its shape."""
    of = inputs["targets"] if "targets" in inputs else inputs["keys"]
    generator = torch.Generator(of.device).manual_seed(3)
    drawn = torch.randn(of.shape, generator=generator, device=of.device, dtype=torch.float64)
    return drawn.to(row.configuration.dtype).to(of.dtype)  # in float64 too, the numbers that the provider gets


def _in_full(cotangent: Tensor, inputs: Inputs) -> Tensor:
    """The same gradient for inputs with all columns and tokens: 0 in the others."""
    if "targets" not in inputs:
        return cotangent
    full = torch.zeros_like(inputs["targets"])
    full[:, : cotangent.shape[1], _columns(inputs["values"])] = cotangent.to(full.dtype)
    return full


def _verify_sequence(row: Row, provider: Provider, inputs: Inputs, expected: Expected) -> None:
    """Key steps and sequences, in both directions."""
    name = f"{row.name}: {provider.name}"

    def run(given: Inputs, length: int | None) -> Numbers:
        if row.direction == "forward":
            return Numbers(_named(provider.run(**given)), {})
        reduced = _reduced(given)
        if length is not None:
            reduced["targets"] = reduced["targets"][:, :length]
        incoming = _in_full(_cotangent(row, reduced), given)
        outputs, gradients = testing.forward_and_gradients(provider.run, given, wrt=row.wrt, cotangent=incoming)
        return Numbers(_named(outputs), gradients)

    def check_short(attempt: int) -> None:
        short, exact, baseline = expected.short(attempt)
        _compare(name, short, run(short, None), exact, _within_budget(short, baseline), rows_are_exact=True)

    _twice(check_short)
    timed, exact = expected.timed
    length = exact.outputs["output"].shape[1] if "output" in exact.outputs else None
    _compare(name, timed, run(timed, length), exact, _mostly_near(row), rows_are_exact=False)


def _verify_stream(row: Row, provider: Provider, inputs: Inputs, expected: Expected) -> None:
    """Steps from a fresh state: what they return, and the state that they leave."""
    name = f"{row.name}: {provider.name}"
    c = row.configuration

    def run(given: Inputs, step: int) -> Numbers:
        parts = [
            {**given, **{key: given[key][:, begin : begin + step] for key in ("queries", "targets")}}
            for begin in range(0, given["queries"].shape[1], step)
        ]
        own = provider.own(parts[0])
        output = torch.cat([provider.run(**{**part, **own}) for part in parts], dim=1)
        return Numbers({"output": output, "keys": own["memory"].keys, "values": own["memory"].values}, {})

    def check_short(attempt: int) -> None:
        short, exact, baseline = expected.short(attempt)
        step = c.length if c.length < c.chunk else short["chunk_size"] * _chunks_at_once(row)
        _compare(name, short, run(short, step), exact, _within_budget(short, baseline), rows_are_exact=True)

    _twice(check_short)
    if c.length >= c.chunk:  # fewer tokens take the same way as in the short stream
        timed, exact = expected.timed
        _compare(name, timed, run(timed, c.length), exact, _mostly_near(row), rows_are_exact=False)


def _short_layer_inputs(row: Row, inputs: Inputs, attempt: int) -> Inputs:
    """Few tokens of at most two documents, in two chunks, and few sub-keys with the rows of their pairs: the norms of a
    layer need all columns, of which the reference can have a small table."""
    c = row.configuration
    few = min(c.sub_keys, 64)
    keys = inputs["keys"].detach()[:, :, :few]
    pairs = (torch.arange(few).unsqueeze(1) * c.sub_keys + torch.arange(few)).flatten().to(keys.device)
    batch = min(c.batch, 2)
    chunk = min(c.chunk, max(8, _SHORT_ELEMENTS // keys.numel()) // (_CHUNKS * batch))
    x = inputs["hidden_states"]
    if c.length < c.chunk:  # so few tokens take as many calls
        several = dataclasses.replace(c, tokens=_CHUNKS * chunk)
        x = row.operation.make_inputs(several, x.device.type, attempt)["hidden_states"]
    begin = min(attempt * chunk, x.shape[1] - _CHUNKS * chunk)
    x = x.detach()[:batch, begin : begin + _CHUNKS * chunk]
    return {**inputs, "hidden_states": x, "keys": keys, "values": inputs["values"].detach()[pairs], "chunk_size": chunk}


def _verify_layer(row: Row, provider: Provider, inputs: Inputs, expected: "Expected") -> None:
    """Few tokens and sub-keys with the reference, gradients too; the outputs that are timed with the sparse form."""
    name, c = f"{row.name}: {provider.name}", row.configuration

    def run(given: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        if row.operation.in_place:
            own = {**given, **provider.own(given)}
            parts = given["hidden_states"].split(c.length, dim=1)
            return torch.cat([provider.run(**{**own, "hidden_states": x}) for x in parts], dim=1), {}
        if row.direction == "forward":
            return provider.run(**given).detach(), {}
        (output,), gradients = testing.forward_and_gradients(
            provider.run, given, wrt=row.wrt, cotangent=row.cotangent(given)
        )
        return output, gradients

    def check_short(attempt: int) -> None:
        short, exact, baseline = expected.short_layer(attempt)
        length = max(short["hidden_states"][..., 0].numel() * short["top_k"], *short["keys"].shape[2:], c.width)
        output, gradients = run(short)
        for key, found in {"output": output, **gradients}.items():
            title = f"{name}: {key if key == 'output' else f'gradient of {key}'}"
            testing.assert_within_budget(found.cpu(), exact[key], baseline[key], name=title, reduction_length=length)

    _twice(check_short)
    if row.operation.sparse is None:
        return
    exact = expected.timed_layer
    _mostly_near(row)(f"{name}: output", ("outputs", "output"), None, run(inputs)[0][:, : exact.shape[1]], exact)


def _twice(check: Callable[[int], None]) -> None:
    """Where rounding decides a lookup, right numbers fail; other tokens do not meet that again, and wrong ones do."""
    with contextlib.suppress(AssertionError):
        return check(0)
    return check(1)  # after the exception is gone, and the tables that it holds


#: Compares some numbers: name, what is compared as (kind, name), which rows of a table (or None), found, exact.
Check = Callable[[str, tuple[str, str], Tensor | None, Tensor, Tensor], None]


def _compare(name: str, inputs: Inputs, actual: Numbers, exact: Numbers, check: Check, *, rows_are_exact: bool) -> None:
    """Compare what there is of `exact`: the first tokens, some columns, and, of a table, the rows that changed, which
    are the same ones if `rows_are_exact`."""
    if "memory" in inputs:
        inputs = {**inputs, **inputs["memory"]._asdict()}
    is_whole = "output" not in exact.outputs or exact.outputs["output"].shape[1] == inputs["queries"].shape[1]
    for kind in ("outputs", "gradients"):
        for key, numbers in getattr(exact, kind).items():
            if kind == "outputs" and key != "output" and not is_whole:
                continue  # the state after the first chunks
            found, mask = getattr(actual, kind)[key].detach(), None
            if key in ("output", "targets", "queries") and "targets" in inputs:
                found = found[:, : numbers.shape[1]]
            if key in ("output", "targets"):
                found = found[..., _columns(inputs["values"])]
            if key == "values":
                columns, before = _columns(inputs["values"]), inputs["values"].detach()
                if kind == "gradients":
                    before = before.new_zeros(()).expand(before.shape)
                mask = (numbers != before[:, columns].double()).any(1)
                moved = _rows_that_differ(before, found)
                if rows_are_exact and (moved & ~mask).any():
                    raise AssertionError(f"{name}: {kind} of rows of the table that are not addressed have changed")
                mask |= moved
                found = found[mask][:, columns]
            check(f"{name}: {kind} {key}", (kind, key), mask, found, numbers if mask is None else numbers[mask])


def _rows_that_differ(before: Tensor, after: Tensor) -> Tensor:
    """Which rows, [N]; block by block, since a table may fill the device."""
    blocks = max(1, 2**26 // before.shape[1])
    return torch.cat([(a != b).any(1) for a, b in zip(before.split(blocks), after.split(blocks), strict=True)])


def _within_budget(short: Inputs, baseline: Numbers) -> Check:
    keys = short["memory"].keys if "memory" in short else short["keys"]
    length = max(short["queries"][..., 0].numel() * short["top_k"], *keys.shape[2:])

    def check(name: str, key: tuple[str, str], mask: Tensor | None, found: Tensor, exact: Tensor) -> None:
        near = getattr(baseline, key[0])[key[1]]
        near = near if mask is None else near[mask]
        testing.assert_within_budget(found, exact, near, name=name, reduction_length=length)

    return check


def _mostly_near(row: Row) -> Check:
    tolerance = _TOLERANCE[row.configuration.dtype]

    def check(name: str, key: tuple[str, str], mask: Tensor | None, found: Tensor, exact: Tensor) -> None:
        error = (found.double() - exact).square().sum(-1)
        far = error > tolerance**2 * exact.square().sum(-1).mean()
        share = float((far | ~error.isfinite()).double().mean())
        if share > _SHARE:
            raise AssertionError(
                f"{name}: {share:.2%} of the rows of the timed inputs are off by more than {tolerance}"
            )

    return check
