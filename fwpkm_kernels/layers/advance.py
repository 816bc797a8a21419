"""`advance_memory`: a persistent memory becomes what the last training call has left behind."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks as checks
from ..compact import apply_rows_, take_rows
from ..records import Rows
from .fast_weight import FastWeightProductKeyMemory


def advance_memory(model: nn.Module, group: Any = None, reduce: str = "mean") -> None:
    """Set the memory of each layer with initial_memory="persistent" to what its last training call left behind.

    Of a call without weight_decay these are the rows that it has read; all others are not written.

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
    ranks = torch.distributed.get_world_size(group) if reduce == "mean" and is_parallel else 1
    for layer in layers:
        assert layer._pending is not None
        for memory, new in zip((layer.keys, layer.table.weight), layer._pending, strict=True):
            with torch.no_grad():
                if isinstance(new, Rows):
                    _advance_rows(memory, new, group, ranks)
                elif ranks > 1:
                    moved = new.to(memory.device) - memory
                    torch.distributed.all_reduce(moved, group=group)
                    memory.add_(moved, alpha=1.0 / ranks)
                else:
                    memory.copy_(new)
        layer._pending = None


def _advance_rows(table: Tensor, rows: Rows, group: Any, ranks: int) -> None:
    """Write the rows that a call has left into the table; of several ranks the mean of what each has moved."""
    slot, value = rows.slot.to(table.device), rows.value.to(table)
    if ranks == 1:
        apply_rows_(table, Rows(torch.zeros_like(slot), slot, value))
        return
    moved = value - take_rows(table, slot, "auto")
    count = torch.tensor([len(slot)], device=table.device)
    counts = [torch.empty_like(count) for _ in range(ranks)]
    torch.distributed.all_gather(counts, count, group=group)
    missing = int(torch.cat(counts).max()) - len(slot)  # ranks may have read different numbers of tokens
    of_ranks = []
    for x in (F.pad(slot, (0, missing), value=-1), F.pad(moved, (0, 0, 0, missing))):
        of_ranks.append([torch.empty_like(x) for _ in range(ranks)])
        torch.distributed.all_gather(of_ranks[-1], x, group=group)
    # One rank after the other, and no row twice at a time: every rank adds up in the same order.
    for its_slot, its_moved in zip(*of_ranks, strict=True):
        used = its_slot >= 0
        table.index_add_(0, its_slot[used], its_moved[used], alpha=1.0 / ranks)
