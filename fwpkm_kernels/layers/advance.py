"""`advance_memory`: a persistent memory becomes what the last training call has left behind."""

from typing import Any

import torch
from torch import nn

from .. import _checks as checks
from .fast_weight import FastWeightProductKeyMemory


def advance_memory(model: nn.Module, group: Any = None, reduce: str = "mean") -> None:
    """Set the memory of each layer with initial_memory="persistent" to what its last training call left behind.

    Call it once a step, after backward: an activation checkpoint computes with the old memory until then. Layers that
    have made no training call since the last advance stay as they are; evaluation changes nothing.

    Args:
        model: a module that contains such layers.
        group: of torch.distributed; None is the default group, if there is one.
        reduce: "mean": every rank moves by the mean over ranks of (new - old), so that ranks stay equal; every rank
            must have made a training call. "none": each rank goes its own way, as the authors' do; under
            DistributedDataParallel that needs broadcast_buffers=False, else rank 0's memory replaces the others' before
            every forward.

    Raises:
        ValueError: for another `reduce`, or where layers with something pending share a table.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}")
    checks.check_choice("reduce", reduce, ("mean", "none"))
    layers = [x for x in model.modules() if isinstance(x, FastWeightProductKeyMemory) and x._pending is not None]
    if len({id(layer.table) for layer in layers}) < len(layers):
        raise ValueError("`model` has layers that share a table, and each would advance it: give each its own")
    is_parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
    for layer in layers:
        assert layer._pending is not None
        for memory, new in zip((layer.keys, layer.table.weight), layer._pending, strict=True):
            with torch.no_grad():
                if reduce == "mean" and is_parallel and torch.distributed.get_world_size(group) > 1:
                    moved = new.to(memory.device) - memory
                    torch.distributed.all_reduce(moved, group=group)
                    memory.add_(moved, alpha=1.0 / torch.distributed.get_world_size(group))
                else:
                    memory.copy_(new)
        layer._pending = None
