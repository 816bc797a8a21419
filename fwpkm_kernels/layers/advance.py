"""`advance_memory`: a persistent memory becomes what the last training call has left behind."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks as checks
from ..compact import put_rows, spread_rows, take_rows
from ..records import Rows
from .fast_weight import FastWeightProductKeyMemory

_GROUP = "`group` must be the ranks that have the same columns of the table, such as mesh['data'].get_group()"


def advance_memory(model: nn.Module, group: Any = None, reduce: str = "mean") -> None:
    """Set the memory of each layer with initial_memory="persistent" to what its last training call left behind.

    Where the call made no table these are the rows that it has read, and all others are not written. It makes one,
    which replaces all rows, with weight_decay, return_memory=True, key_gradient="all" or ``memory=``.

    Call it once a step, after backward: an activation checkpoint computes with the old memory until then. Layers that
    have made no training call since the last advance stay as they are; evaluation changes nothing. A load or a draw of
    the layer, or of its table alone, drops what a call before it has left behind.

    Args:
        model: a module that contains such layers.
        group: of torch.distributed; None is the default group, if there is one. Where `shard_table_` has spread the
            columns it is the group of ranks that have the same columns, and None that rank alone if all ranks have
            different ones.
        reduce: "mean": every rank moves by the mean over ranks of (new - old), so that ranks stay equal; every rank
            must have made a training call. "none": each rank goes its own way, as the authors' do; under
            DistributedDataParallel that needs broadcast_buffers=False, else rank 0's memory replaces the others' before
            every forward.

    Raises:
        TypeError: `model` is no module, or `reduce` no string.
        ValueError: for another `reduce`; where layers with something pending share a table; or for a `group` without
            this rank, or whose ranks have different columns of a table. Nothing has changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}")
    checks.check_choice("reduce", reduce, ("mean", "none"))
    layers = [x for x in model.modules() if isinstance(x, FastWeightProductKeyMemory) and _is_pending(x)]
    if len({id(layer.table) for layer in layers}) < len(layers):
        raise ValueError("`model` has layers that share a table, and each would advance it: give each its own")
    is_parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
    ranks_of = [_count_ranks(layer.table.mesh, group) if reduce == "mean" and is_parallel else 1 for layer in layers]
    rows_of = [(0, 0)] * len(layers)
    if any(ranks > 1 for ranks in ranks_of):
        rows_of = _compare_ranks(layers, ranks_of, group)  # of all layers, before the first one is moved
    for layer, ranks, of_table in zip(layers, ranks_of, rows_of, strict=True):
        assert layer._pending is not None
        tensors = ((layer.keys, (-1, -1)), (layer.table.columns, of_table))
        with torch.no_grad():
            for (memory, num_rows), new in zip(tensors, layer._pending[:2], strict=True):
                if ranks > 1:
                    _advance_by_mean(memory, new, *num_rows, group, ranks)
                elif isinstance(new, Rows):
                    put_rows(memory, new.slot.to(memory.device), new.value.to(memory), "auto")
                else:
                    memory.copy_(new)
        layer._pending = None


def _is_pending(layer: FastWeightProductKeyMemory) -> bool:
    """Whether a training call has left a memory behind, and the table that it was made from is still there."""
    return layer._pending is not None and layer._pending[2] is layer.table.contents


def _count_ranks(mesh: Any, group: Any) -> int:
    """How many ranks have the same columns of a table, which is spread over the ranks of `mesh`, if over any."""
    ranks = torch.distributed.get_world_size(group)
    if ranks < 1:
        raise ValueError("`group` must contain this rank, got a group of others")
    if mesh is None:
        return ranks
    if group is None and mesh.size() == ranks:
        return 1
    if len({*mesh.mesh.tolist()} & {*torch.distributed.get_process_group_ranks(group)}) > 1:
        raise ValueError(f"{_GROUP}, got one with several of the ranks {mesh.mesh.tolist()}, which have different ones")
    return ranks


def _compare_ranks(layers: list[FastWeightProductKeyMemory], ranks_of: list[int], group: Any) -> list[tuple[int, int]]:
    """Of each layer the least and the most rows that a rank has of the new table; -1 stands for all of them.

    Raises:
        ValueError: the ranks have different columns, as on a diagonal of a mesh, of which a rank alone sees nothing.
    """
    own = []
    for layer in layers:
        assert layer._pending is not None
        new, mesh = layer._pending[1], layer.table.mesh
        num_rows = len(new.slot) if isinstance(new, Rows) else -1
        own.append([num_rows, 0 if mesh is None else mesh.get_local_rank()])
    numbers = torch.tensor(own, device=layers[0].keys.device)
    of_ranks = [torch.empty_like(numbers) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(of_ranks, numbers, group=group)
    least, most = (x.tolist() for x in torch.stack(of_ranks).aminmax(dim=0))
    for ranks, (_, first), (_, last) in zip(ranks_of, least, most, strict=True):
        if ranks > 1 and first != last:
            raise ValueError(f"{_GROUP}, got one with parts {first} to {last} of them")
    return [(low, high) for (low, _), (high, _) in zip(least, most, strict=True)]


def _advance_by_mean(memory: Tensor, new: Tensor | Rows, least: int, most: int, group: Any, ranks: int) -> None:
    """Move the memory by the mean over ranks of what each has moved: rows, or all of it where one has no rows."""
    if isinstance(new, Rows):
        slot = new.slot.to(memory.device)
        moved = new.value.to(memory) - take_rows(memory, slot, "auto")
        if least >= 0:
            _add_rows(memory, slot, moved, most, group, ranks)
            return
        moved = spread_rows(moved, slot, len(memory), "auto")
    else:
        moved = new.to(memory) - memory
    torch.distributed.all_reduce(moved, group=group)
    memory.add_(moved, alpha=1.0 / ranks)


def _add_rows(table: Tensor, slot: Tensor, moved: Tensor, most: int, group: Any, ranks: int) -> None:
    """Add the mean over ranks of rows `moved` [R, D] at `slot` [R] to the table; no rank has more than `most`."""
    missing = most - len(slot)  # ranks may have read different numbers of tokens
    of_ranks = []
    for x in (F.pad(slot, (0, missing), value=-1), F.pad(moved, (0, 0, 0, missing))):
        of_ranks.append([torch.empty_like(x) for _ in range(ranks)])
        torch.distributed.all_gather(of_ranks[-1], x, group=group)
    # One rank after the other, and no row twice at a time: every rank adds up in the same order.
    for its_slot, its_moved in zip(*of_ranks, strict=True):
        used = its_slot >= 0
        table.index_add_(0, its_slot[used], its_moved[used], alpha=1.0 / ranks)
