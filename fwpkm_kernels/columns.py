"""What crosses between ranks, over which the columns of the values are spread.

Reads and writes of a column depend on no other column, so each rank runs them on its own columns. Only what is summed
over columns, the gradients of the weights, and what needs whole rows, outside of the memory, has to cross.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def sum_over_columns(group: str, *parts: Tensor) -> tuple[Tensor, ...]:
    """The sums over the ranks of a process group of tensors of one shape and dtype, by one all-reduce.

    Args:
        group: the name of the group; "" leaves the tensors as they are.
    """
    if not group:
        return parts
    from torch.distributed import _functional_collectives as collectives

    total = collectives.all_reduce(torch.stack(parts), "sum", group)  # type: ignore[arg-type]  # a name that is typed
    return collectives.wait_tensor(total).unbind()


def group_name(mesh: Any) -> str:
    """That of the ranks of a one-dimensional DeviceMesh; "" for None."""
    return "" if mesh is None else mesh.get_group().group_name


def cut_columns(x: Tensor, mesh: Any) -> Tensor:
    """This rank's columns of x [..., D], which all ranks have; backward gathers the gradient of all columns."""
    if mesh is None:
        return x
    from torch.distributed.tensor import DTensor, Replicate, Shard

    whole = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    return whole.redistribute(placements=[Shard(x.dim() - 1)]).to_local()


def join_columns(x: Tensor, mesh: Any) -> Tensor:
    """All columns [..., D] of which x has this rank's; backward cuts the gradient, which must be that of every rank."""
    if mesh is None:
        return x
    from torch.distributed.tensor import DTensor, Replicate, Shard

    own = DTensor.from_local(x, mesh, [Shard(x.dim() - 1)], run_check=False)
    return own.redistribute(placements=[Replicate()]).to_local(grad_placements=[Replicate()])


def same_on_all(x: Tensor, mesh: Any) -> Tensor:
    """x, which all ranks have and use for their columns; backward sums its gradients over the ranks."""
    if mesh is None:
        return x
    from torch.distributed.tensor import DTensor, Partial, Replicate

    whole = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    return whole.to_local(grad_placements=[Partial()])


def own_columns(name: str, x: Tensor, mesh: Any) -> Tensor:
    """The columns that this rank has of a table [N, D], a plain tensor: all of them if it is one, or without a mesh.

    Raises:
        RuntimeError: rows of the table, or columns that no mesh is known of, lie elsewhere.
    """
    if mesh is None and not hasattr(x, "to_local"):  # isinstance would have to import the class of a DTensor
        return x
    from torch.distributed.tensor import DTensor

    if not isinstance(x, DTensor):  # DistributedDataParallel puts own columns in its place
        return x
    if not all(at.is_replicate() or (mesh is not None and at.is_shard(1)) for at in x.placements):
        raise RuntimeError(
            f"`{name}` must be here, whole or with the columns that `shard_table_` leaves a rank, got a DTensor with "
            f"placements {x.placements}: of a module of fully_shard call unshard() before, and reshard() afterwards"
        )
    return x.to_local()


@contextlib.contextmanager
def own_random_numbers(mesh: Any, x: Tensor) -> Iterator[None]:
    """Let each rank draw numbers of its own for its columns x; ranks that were seeded alike go on alike.

    PyTorch sees to that where x is on a GPU; ranks on CPUs would all draw the same columns.
    """
    if mesh is None or x.device.type != "cpu":
        yield
        return
    seed = int(torch.randint(2**62, (), device="cpu")) + mesh.get_local_rank()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        yield
