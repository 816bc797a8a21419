"""The parameters of a model, sorted for an optimizer."""

from typing import Any

import torch
from torch import nn

from .. import _checks as checks
from .table import ValueTable


def parameter_groups(
    module: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    table_lr: float | None = None,
    table_weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Groups of parameters for an optimizer: with decay, without decay, and tables.

    A step's tokens reach few rows of a table, but weight decay would shrink all of them. So tables are usually trained
    without decay, and at a learning rate of their own: Engram takes 5 times that of the model, Meta's memory layers
    1e-3 whatever the schedule, lucidrains' product key memory 1e-2, and sparse memory finetuning trains tables by SGD.

    Args:
        module: any model; layers of this package may be anywhere in it.
        lr: of "decay" and "no_decay".
        weight_decay: of "decay".
        table_lr: of "tables"; None is `lr`.
        table_weight_decay: of "tables".

    Returns:
        Three dicts, always, in this order, with "name", "params" (perhaps none), "lr" and "weight_decay":

        - "decay": all others.
        - "no_decay": parameters called `keys` or `…bias`, those of at most one dimension, those of modules whose class
          has a name that ends in Norm, and those with a true attribute `_no_weight_decay`.
        - "tables": all parameters of every `ValueTable`.

        Each parameter is listed once, however often it is shared or tied. Frozen parameters are listed too, which
        optimizers leave alone. A parameter that fits several groups is in the last of them.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"`module` must be a torch.nn.Module, got {type(module).__name__}")
    table_lr = lr if table_lr is None else table_lr
    rates = {"lr": lr, "weight_decay": weight_decay, "table_lr": table_lr, "table_weight_decay": table_weight_decay}
    for name, rate in rates.items():
        checks.check_number(name, rate, torch.float64, minimum=0.0)
    tables = {x for owner in module.modules() if isinstance(owner, ValueTable) for x in owner.parameters()}
    no_decay = {
        x
        for owner in module.modules()
        for name, x in owner.named_parameters(recurse=False)
        if _has_no_decay(owner, name, x)
    }
    params: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": [], "tables": []}
    for x in module.parameters():
        params["tables" if x in tables else "no_decay" if x in no_decay else "decay"].append(x)
    return [
        {"name": "decay", "params": params["decay"], "lr": lr, "weight_decay": weight_decay},
        {"name": "no_decay", "params": params["no_decay"], "lr": lr, "weight_decay": 0.0},
        {"name": "tables", "params": params["tables"], "lr": table_lr, "weight_decay": table_weight_decay},
    ]


def _has_no_decay(owner: nn.Module, name: str, x: nn.Parameter) -> bool:
    """Whether a parameter has no decay. `keys` are known by their name, as copy.deepcopy loses attributes."""
    is_named = name == "keys" or name.endswith("bias") or type(owner).__name__.endswith("Norm")
    return is_named or x.dim() <= 1 or getattr(x, "_no_weight_decay", False)
