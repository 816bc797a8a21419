"""How a drawn case of the fast-weight layer is judged: in float64, against `reference/layers.py`.

Output, final memory, gate mean, slots, weights and all gradients are compared, and where the layer can stream, its
output by pieces. A layer is a composition whose rounding the operations' own cases judge, so float64 tells all that is
new here: which tokens belong together, what is handed on, and what each option does. Numbers may differ by 1e-7 of the
largest: a memory whose weights are not normalised can grow from chunk to chunk. A case whose reference is not finite
says nothing.
"""

from typing import Any

import torch
from torch import Tensor

import reference
from fwpkm_kernels.layers import FastWeightProductKeyMemory
from tests.helpers.varlen import tables_of
from tests.strategies import Case

TOLERANCE = 1e-7
#: Sizes of the constructor by the names that a case has for them.
SIZES = {"n": "num_keys", "H": "heads", "Dk": "key_dim", "D": "value_dim"}
#: Options that say how to compute, or what a module is made of; the reference has none of them.
HOW = ("precision", "initial_memory", "key_dim", "value_dim")


def check_layer(case: Case, tensors: dict[str, Tensor], backend: str, device: str) -> set[str]:
    """Raise AssertionError where layer and reference differ; returns why nothing could be said, if so."""
    sizes = {ours: case.sizes[name] for name, ours in SIZES.items()}
    options: dict[str, Any] = sizes | case.options
    torch.manual_seed(case.seed)
    made: dict[str, Any] = {"dtype": torch.float64, "memory_dtype": torch.float64, "backend": backend}
    layer = FastWeightProductKeyMemory(case.sizes["d"], **options, **made)
    for x in layer.parameters():  # ones and zeros would hide what they multiply and add
        if x.dim() == 1:
            torch.nn.init.normal_(x, mean=0.5)
    layer.to(device)
    where = {name: x for name, x in tensors.items() if name != "hidden_states"}
    x = tensors["hidden_states"].detach().requires_grad_()
    parameters = {name: p for name, p in layer.state_dict(keep_vars=True).items() if p.requires_grad}
    output, memory = layer(x, return_memory=True, **where)
    values = memory.values
    if layer.scope == "sequence":
        values = tables_of(values, layer.table.weight, len(memory.keys))
    ours = {"output": output, "keys": memory.keys, "values": values, "gate_mean": memory.gate_mean}

    kept = {name: value for name, value in options.items() if name not in HOW}
    copies = {
        name: p.detach().cpu().requires_grad_(p.requires_grad) for name, p in layer.state_dict(keep_vars=True).items()
    }
    y = tensors["hidden_states"].detach().cpu().requires_grad_()
    expected = reference.fast_weight_layer(y, copies, **kept, **{name: m.cpu() for name, m in where.items()})
    theirs = {name: getattr(expected, name) for name in ours}
    if not all(value is None or value.isfinite().all() for value in theirs.values()):
        return {"overflow"}
    assert torch.equal(memory.slots.cpu(), expected.slots), "slots"
    _compare("weights", memory.weights, expected.weights)
    for name, value in ours.items():
        _compare(name, value, theirs[name])
    # Not where G is exactly at the border of the clamp, which is a matter of rounding.
    if case.options["clip"] != 0.0:
        left = [
            _gradients(results, [x_, *leaves], case.seed)
            for results, x_, leaves in (
                (ours, x, parameters.values()),
                (theirs, y, [copies[name] for name in parameters]),
            )
        ]
        for name, actual, other in zip(["hidden_states", *parameters], *left, strict=True):
            _compare(f"gradient of {name}", actual, other)
    if case.actions:
        _check_stream(layer, tensors["hidden_states"], where, case.actions, output.detach())
    return set()


def _gradients(results: dict[str, Tensor | None], leaves: list[Tensor], seed: int) -> list[Tensor]:
    """Of all results together, with random incoming gradients."""
    generator = torch.Generator().manual_seed(seed)
    total: Any = 0.0
    for x in results.values():
        if x is not None:
            incoming = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            total = total + (x * incoming.to(x.device)).sum()
    if not total.requires_grad:  # the reference's loop over no rows
        return [torch.zeros_like(x) for x in leaves]
    return list(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))


def _check_stream(
    layer: FastWeightProductKeyMemory,
    hidden_states: Tensor,
    where: dict[str, Tensor],
    cuts: tuple[int | str, ...],
    whole: Tensor,
) -> None:
    """The output by pieces of so many tokens; "rollback" takes back a token that was never there."""
    memory, parts, begin = layer.new_memory(len(hidden_states)), [], 0
    memory.records_past = True
    with torch.no_grad():
        for cut in cuts:
            if cut == "rollback":
                layer(torch.ones_like(hidden_states[:, :1]), memory=memory)
                memory.rollback(1)
                continue
            part = slice(begin, begin + int(cut))
            given = {name: mask[:, part] for name, mask in where.items()}
            parts.append(layer(hidden_states[:, part], memory=memory, **given))
            begin += int(cut)
    _compare("stream", torch.cat(parts, dim=1), whole)


def _compare(name: str, actual: Tensor | None, expected: Tensor | None) -> None:
    if actual is None or expected is None:
        assert actual is expected, name
        return
    assert actual.shape == expected.shape, f"{name}: {list(actual.shape)}, expected {list(expected.shape)}"
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    allowed = TOLERANCE * max(1.0, float(expected.abs().max())) if expected.numel() else 0.0
    error = (actual - expected).abs()
    assert (error <= allowed).all(), f"{name} differs by {float(error.max()):.3g}, where {allowed:.3g} are allowed"
