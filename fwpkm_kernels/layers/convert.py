"""Between the parameters of published checkpoints and those of `FastWeightProductKeyMemory`."""

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from .. import _checks as checks

#: The names in published checkpoints, by ours. Biases may be missing, and so may all names of the gate (`g_`).
NAMES = MappingProxyType(
    {
        "q_norm.weight": "fw_q_norm.weight",
        "q_proj.weight": "fw_q_proj.weight",
        "q_proj.bias": "fw_q_proj.bias",
        "v_norm.weight": "fw_v_norm.weight",
        "v_proj.weight": "fw_v_proj.weight",
        "v_proj.bias": "fw_v_proj.bias",
        "g_norm.weight": "fw_out_gate_norm.weight",
        "g_proj.weight": "fw_out_gate.weight",
        "g_proj.bias": "fw_out_gate.bias",
        "o_norm.weight": "fw_out_norm.weight",
        "o_proj.weight": "fw_out_proj.weight",
        "o_proj.bias": "fw_out_proj.bias",
        "keys": "fwpkm.keys",
        "table.weight": "fwpkm.values",
    }
)
#: How many outputs the published gate has.
GATE_OUTPUTS = 8


def from_published(state_dict: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The parameters of a published layer, for `FastWeightProductKeyMemory.load_state_dict`.

    Norm weights are published minus 1. The 1 is added in float32 at least, and the sum stays there: half precision
    would lose digits of the small number, and only a module in half precision must lose them. The gate is published
    with 8 outputs of which the mean counts; ours has the one row that is the mean of theirs. All other tensors keep
    their dtype and may share memory with `state_dict`. Gradients flow through to what is published.

    Args:
        state_dict: tensors by name, those of the layer behind `prefix`: fw_q_norm.weight [d], fw_q_proj.weight
            [H·Dk, d], fw_v_norm.weight [d], fw_v_proj.weight [D, d], fw_out_norm.weight [D], fw_out_proj.weight [d, D],
            fwpkm.keys [2·H·n, Dk/2] (heads one after the other, the halves within), fwpkm.values [n², D], and where
            there is a gate fw_out_gate_norm.weight [d] and fw_out_gate.weight [8, d]. Each projection may have a .bias.
        prefix: what stands before these names, "model.layers.2." say; only names that go on with "fw" are looked at.

    Returns:
        Our tensors by their names in the layer's state_dict, without a prefix.

    Raises:
        TypeError, ValueError: naming `state_dict`, on a name behind the prefix that is missing or unknown, and on
            shapes of keys, values and fw_q_proj that do not fit together; all others are load_state_dict's to refuse.
    """
    # A published layer's parameters stand among those of its block, whose names begin otherwise.
    found = _checked(state_dict, prefix, list(NAMES.values()), begin="fw")
    ours = {name: found[published] for name, published in NAMES.items() if published in found}
    for name, x in ours.items():
        if name.endswith("_norm.weight"):
            ours[name] = x.to(torch.promote_types(x.dtype, torch.float32)) + 1
        elif name.startswith("g_proj."):
            # The mean is formed from differences: of equal rows it is exactly the row.
            ours[name] = x[:1] + (x - x[:1]).mean(0, keepdim=True)
    ours["keys"] = _unflatten_keys(ours["keys"], ours["q_proj.weight"], ours["table.weight"])
    return ours


def to_published(state_dict: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """A layer's parameters as published checkpoints have them: the inverse of `from_published`.

    Norm weights are taken minus 1, in float32 at least, which is exact for those of 0.5 and more; the gate becomes 8
    equal rows.

    Args:
        state_dict: the layer's, by its own names, without a prefix. What published layers do not have, a convolution of
            the queries or no norms, is refused.
        prefix: to put before the published names.

    Returns:
        Tensors by their published names behind `prefix`.

    Raises:
        TypeError, ValueError: naming `state_dict`, on a name that is missing or unknown.
    """
    published = {}
    for name, x in _checked(state_dict, "", list(NAMES)).items():
        if name.endswith("_norm.weight"):
            x = x.to(torch.promote_types(x.dtype, torch.float32)) - 1
        elif name.startswith("g_proj."):
            x = x.repeat(GATE_OUTPUTS, *[1] * (x.dim() - 1))
        elif name == "keys":
            x = x.flatten(0, 2)
        published[prefix + NAMES[name]] = x
    return published


def _checked(state_dict: Mapping[str, Tensor], prefix: str, known: list[str], begin: str = "") -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix and `begin`, after a check that they are those of a layer."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"`state_dict` must be a mapping from names to tensors, got {type(state_dict).__name__}")
    found = {name.removeprefix(prefix): x for name, x in state_dict.items() if name.startswith(prefix + begin)}
    gate = {name for name, ours in zip(known, NAMES, strict=True) if ours.startswith("g_")}
    needed = {name for name in known if not name.endswith(".bias")}
    if gate.isdisjoint(found):
        needed -= gate
    for what, names in (("lacks", needed.difference(found)), ("also has", set(found).difference(known))):
        if names:
            raise ValueError(
                f"`state_dict` must have the names of one layer behind the prefix {prefix!r}, but {what} "
                + ", ".join(sorted(names))
            )
    return found


def _unflatten_keys(keys: Tensor, q_weight: Tensor, values: Tensor) -> Tensor:
    """[2·H·n, Dk/2] -> [H, 2, n, Dk/2], with H from the H·Dk rows of q_proj.weight and n from the n² of the values."""
    heads = q_weight.shape[0] // (2 * keys.shape[-1])
    num_keys = math.isqrt(values.shape[0])
    if (2 * heads * keys.shape[-1], 2 * heads * num_keys, num_keys**2) != (len(q_weight), len(keys), len(values)):
        raise ValueError(
            "`state_dict` must have fw_q_proj.weight [H·Dk, d], fwpkm.keys [2·H·n, Dk/2] and fwpkm.values [n², D], "
            f"got {checks.shape(q_weight)}, {checks.shape(keys)} and {checks.shape(values)}"
        )
    return keys.unflatten(0, (heads, 2, num_keys))
