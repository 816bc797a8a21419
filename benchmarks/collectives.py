"""Collectives counted: how many calls of each kind a rank makes, and how many bytes they move.

    with count_collectives() as counted:
        loss(model(x)).backward()
    counted.totals()  # {"all_reduce": Total(calls=2, bytes=4096)}

All ways to a collective come to the operators of `c10d`: functions of torch.distributed, DTensor, fully_shard,
DistributedDataParallel, compiled code, in custom operators and in backward, on a CPU and on a GPU. So these are counted
in torch's dispatcher, below its modes and autograd; a TorchDispatchMode does not see custom operators from within, nor
what C++ calls by itself.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

#: The kind of each operator, and the argument that counts: the tensors that are reduced, sent or received; of a gather
#: the whole result, of a scatter, or of an exchange, the whole input. A barrier moves no data.
_OPERATORS = {
    "allreduce_": ("all_reduce", "tensors"),
    "allreduce_coalesced_": ("all_reduce", "tensors"),
    "allgather_": ("all_gather", "output_tensors"),
    "_allgather_base_": ("all_gather", "output_tensor"),
    "allgather_coalesced_": ("all_gather", "output_lists"),
    "allgather_into_tensor_coalesced_": ("all_gather", "outputs"),
    "reduce_scatter_": ("reduce_scatter", "input_tensors"),
    "_reduce_scatter_base_": ("reduce_scatter", "input_tensor"),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", "inputs"),
    "alltoall_": ("all_to_all", "input_tensors"),
    "alltoall_base_": ("all_to_all", "input"),
    "broadcast_": ("broadcast", "tensors"),
    "reduce_": ("reduce", "tensors"),
    "gather_": ("gather", "output_tensors"),  # nothing but on the rank that gathers
    "scatter_": ("scatter", "input_tensors"),  # nothing but on the rank that scatters
    "send": ("send", "tensors"),
    "recv_": ("recv", "tensors"),
    "recv_any_source_": ("recv", "tensors"),
    "barrier": ("barrier", ""),
    "monitored_barrier_": ("barrier", ""),
}
#: Below autograd and the modes of Python, above every device's kernels, and switched off by none of them.
_KEY = torch._C.DispatchKey.BackendSelect
_THIS = f"count_collectives: torch {torch.__version__}"


class Call(NamedTuple):
    """One collective on this rank."""

    kind: str
    bytes: int
    group: str  #: the name of the process group
    size: int  #: how many ranks it has


class Total(NamedTuple):
    """All collectives of a kind."""

    calls: int
    bytes: int


class Collectives:
    """The calls of a rank in their order."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def totals(self, group: dist.ProcessGroup | None = None) -> dict[str, Total]:
        """By kind; only those of a group if it is given."""
        totals: dict[str, Total] = {}
        for call in self.calls:
            if group is None or call.group == group.group_name:
                calls, num_bytes = totals.get(call.kind, Total(0, 0))
                totals[call.kind] = Total(calls + 1, num_bytes + call.bytes)
        return totals

    @property
    def bytes(self) -> int:
        """Of all calls."""
        return sum(call.bytes for call in self.calls)


_counting = False


@contextlib.contextmanager
def count_collectives() -> Iterator[Collectives]:
    """Count the collectives that this process starts, in all of its threads, while the context lasts.

    Raises RuntimeError if this torch has a collective that is unknown here, or does not let them be counted, so that
    none is missed in silence; and where a count is on already. What a program asks of a backend object, not of a
    process group, or writes into another GPU's memory itself, is not seen.
    """
    global _counting
    if _counting:
        raise RuntimeError("count_collectives: the collectives of this process are being counted already")
    found = _find_operators()
    counted = Collectives()
    library = torch.library.Library("c10d", "IMPL")
    _counting = True
    try:
        for name, operator in found.items():
            library.impl(name, _counter(counted, name, operator), _KEY.name, with_keyset=True)
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"c10d::{name}", _KEY.name):
                raise RuntimeError(f"{_THIS} does not let c10d::{name} be counted")
        yield counted
    finally:
        library._destroy()
        _counting = False


def _find_operators() -> dict[str, Any]:
    """All operators of this torch that take a process group."""
    if not dist.is_available():
        raise RuntimeError("count_collectives: this torch is built without torch.distributed")
    found = {}
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, name = name.partition("::")
        if namespace != "c10d":
            continue
        operator = getattr(torch.ops.c10d, name.partition(".")[0])
        operator = getattr(operator, name.partition(".")[2] or "default")
        arguments = {argument.name for argument in operator._schema.arguments}
        if "process_group" not in arguments:  # such as check_for_nan
            continue
        kind, counts = _OPERATORS.get(name, ("", ""))
        if not kind or (counts and counts not in arguments):
            raise RuntimeError(f"{_THIS} has a collective that is unknown here: {operator._schema}")
        found[name] = operator
    missing = {"allreduce_", "_allgather_base_", "_reduce_scatter_base_", "broadcast_", "alltoall_base_"} - set(found)
    if missing:
        raise RuntimeError(f"{_THIS} has no c10d::{', c10d::'.join(sorted(missing))}")
    return found


def _counter(counted: Collectives, name: str, operator: Any) -> Callable[..., Any]:
    """A kernel that counts a call and hands it on."""
    kind, counts = _OPERATORS[name]
    names = [argument.name for argument in operator._schema.arguments]
    below = torch._C._dispatch_keyset_full_after(_KEY)

    def count(keys: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        arguments = dict(zip(names, args, strict=False)) | kwargs
        group = dist.ProcessGroup.unbox(arguments["process_group"])
        tensors = tree_leaves(arguments[counts]) if counts else []
        num_bytes = sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor))
        counted.calls.append(Call(kind, num_bytes, group.group_name, group.size()))
        return operator.redispatch(keys & below, *args, **kwargs)

    return count
