"""Layers on more than one rank: tables by columns, replicated tables beside FSDP, clipping, and checkpoints.

All of it rests on torch.distributed: DTensor, `fully_shard`, DistributedDataParallel and torch.distributed.checkpoint.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from .columns import group_name
from .layers import FastWeightProductKeyMemory, ProductKeyMemory, ValueTable
from .layers.table import Contents, keep
from .options import check_group
from .replicas import NoReplicas, Replicas

__all__ = ["TrainingState", "clip_grad_norm_", "replicate_tables_", "shard_table_"]

_Module = TypeVar("_Module", bound=nn.Module)


@torch.inference_mode(False)  # else no optimizer could step the new weights
def shard_table_(module: _Module, mesh: DeviceMesh) -> _Module:
    """Spread the columns of all tables of a layer or model over the ranks of a mesh, in place.

    Rank r of G keeps the columns from r·D/G to (r + 1)·D/G of each table, as a DTensor with the placement Shard(1), and
    reads and writes these: reads and writes of a column depend on no other. All else stays on every rank. A forward
    gathers the output of the memory, [B, T, D]; a backward gathers the gradient of its targets, likewise, and sums
    those of its weights, 2·R·J numbers of R reads (B·T·J for a ProductKeyMemory). Outputs have the bits of the layer
    that is not sharded, gradients agree to rounding, and those of what is on every rank are the same on every rank.

    Call it on every rank of the mesh, before optimizers, DistributedDataParallel and `fully_shard` are made. What the
    first rank has counts for all of them: its tables and the other tensors of its memory layers replace theirs. Other
    modules of a model are left alone, so build or load these alike on every rank, and seed ranks alike: dropout must
    draw the same on all. Ranks then run the same program on the same tokens, calls of `generate` too. Streaming,
    segments and `advance_memory` work on own columns; a `LayerMemory` and a `MemoryPool` hold these.

    Args:
        module: a FastWeightProductKeyMemory, a ProductKeyMemory, a ValueTable, or a model with such layers.
        mesh: of one dimension, on the type of device where the tables are; of a mesh with more, mesh["name"].

    Returns:
        The module.

    Raises:
        TypeError: `module` or `mesh` is none.
        ValueError: the mesh has another number of dimensions or another type of device, or is without this rank; the
            module has no table; a table is a DTensor already, or replicated; its width D is no multiple of the number
            of ranks; a layer has key_gradient="all", whose keys move by whole rows, or sparse_grad=True, since no
            DTensor has a sparse gradient; or ranks differ in sizes, dtypes or options. It is raised on every rank,
            that of a wrong mesh on those that have it, and nothing is changed then.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"`module` must be a torch.nn.Module, got {type(module).__name__}")
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"`mesh` must be a torch.distributed.device_mesh.DeviceMesh, got {type(mesh).__name__}")
    if mesh.ndim != 1:
        raise ValueError(f"`mesh` must have one dimension, such as mesh['columns'] of a larger one, got {mesh}")
    if mesh.get_coordinate() is None:
        raise ValueError(f"`mesh` must contain this rank, {dist.get_rank()}, got {mesh}")
    _agree(module, lambda: _check(module, mesh), mesh.get_group())
    layers = [x for x in module.modules() if isinstance(x, FastWeightProductKeyMemory | ProductKeyMemory)]
    tables = [x for x in module.modules() if isinstance(x, ValueTable)]
    weights = {table.weight for table in tables}
    _copy_from_first((x for layer in layers for x in _tensors_of(layer) if x not in weights), mesh.get_group())
    spread: dict[Tensor, Tensor] = {}  # tables may be tied
    for table in tables:
        weight = table.weight
        if weight in spread:
            table.weight = spread[weight]
        else:
            columns = distribute_tensor(weight.detach(), mesh, [Shard(1)])
            keep(table, "weight", columns, isinstance(weight, nn.Parameter))
            spread[weight] = table.weight.requires_grad_(weight.requires_grad)
        table.mesh, table.contents = mesh, Contents()
    return module


def _tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers that hold data as plain tensors."""
    return [x for x in (*module.parameters(), *module.buffers()) if not (x.is_meta or isinstance(x, DTensor))]


def _copy_from_first(tensors: Iterable[Tensor], group: Any) -> None:
    """Give all ranks of a group what its first one has."""
    for x in [one.detach() for one in dict.fromkeys(tensors)]:
        sent = x.contiguous()  # a broadcast goes by memory, and ranks may have other strides
        dist.broadcast(sent, group=group, group_src=0)
        if sent is not x:
            x.copy_(sent)


def _agree(module: nn.Module, check: Callable[[], None], group: Any) -> None:
    """Raise on every rank of the group if `check` refuses the module of one, or it differs from that of another."""
    refused: Exception | None = None
    try:
        check()
    except ValueError as error:
        refused = error
    described = _describe(module)
    ranks = dist.get_process_group_ranks(group)
    of_ranks: list[Any] = [None] * len(ranks)
    dist.all_gather_object(of_ranks, (None if refused is None else str(refused), described), group=group)
    if refused is not None:
        raise refused
    for rank, (reason, its) in zip(ranks, of_ranks, strict=True):
        if reason is not None:
            raise ValueError(f"rank {rank} refuses its `module`: {reason}")
        first = of_ranks[0][1]
        for name in first | its:
            if first.get(name) != its.get(name):
                raise ValueError(
                    f"`module` must be the same on every rank, got {name} = {first.get(name)!r} on rank {ranks[0]} and "
                    f"{its.get(name)!r} on rank {rank}"
                )


def _check(module: nn.Module, mesh: DeviceMesh) -> None:
    tables = {name: x for name, x in module.named_modules() if isinstance(x, ValueTable)}
    if not tables:
        raise ValueError(f"`module` must have a ValueTable, got a {type(module).__name__} without one")
    for name, table in tables.items():
        named, weight = f"`{name}.weight`" if name else "`weight`", table.weight
        if isinstance(weight, DTensor):
            raise ValueError(
                f"{named} must not be sharded yet, also not by fully_shard, which comes after shard_table_; got a "
                f"DTensor with placements {weight.placements}"
            )
        if table.replicas is not None:
            raise ValueError(f"{named} must not be replicated yet: replicate_tables_ comes after shard_table_")
        if weight.device.type not in (mesh.device_type, "meta"):
            raise ValueError(f"{named} must be on the devices of `mesh`, {mesh.device_type}, got {weight.device}")
        if table.width % mesh.size():
            raise ValueError(
                f"`value_dim` must be a multiple of the {mesh.size()} ranks of `mesh`, got {table.width} in {named}"
            )
    for layer in module.modules():
        if isinstance(layer, FastWeightProductKeyMemory):
            check_group(group_name(mesh), layer.options)
        elif isinstance(layer, ProductKeyMemory) and layer.sparse_grad:
            raise ValueError("`sparse_grad` must be False where the columns of the table are spread, got True")


#: Types of attributes of modules that are options and sizes.
_DESCRIBED = int | float | str | torch.dtype | None


def _describe(module: nn.Module) -> dict[str, Any]:
    """What must be the same on every rank: of each memory layer and table its options and sizes, by name, and which of
    them share tensors."""
    described: dict[str, Any] = {}
    first: dict[Tensor, str] = {}  # a tensor that layers share goes by its first name
    layers = FastWeightProductKeyMemory | ProductKeyMemory | ValueTable
    for path, layer in module.named_modules(remove_duplicate=False):
        if isinstance(layer, layers):
            for name, part in layer.named_modules(prefix=path):
                prefix = f"{name}." if name else ""
                described[name or "its type"] = type(part).__name__
                own = {key: x for key, x in vars(part).items() if not key.startswith("_")}
                options = own.pop("options", None)
                own |= {} if options is None else options._asdict()
                described |= {prefix + key: x for key, x in own.items() if isinstance(x, _DESCRIBED)}
                if isinstance(part, ValueTable) and part.mesh is not None:
                    first_column = part.mesh.get_local_rank() * part.num_columns
                    described[f"{prefix}columns"] = f"{first_column} to {first_column + part.num_columns}"
            for name, x in (*layer.named_parameters(prefix=path), *layer.named_buffers(prefix=path)):
                described[name] = (list(x.shape), x.dtype, x.device.type, x.requires_grad, first.setdefault(x, name))
    return described


def replicate_tables_(module: _Module, group: Any = None) -> _Module:
    """Let the ranks of a group train tables that each of them has, beside FSDP or DistributedDataParallel, in place.

    Nothing of a table crosses between ranks then but its gradient, whose mean over the ranks every backward leaves in
    `grad` at its end, summed in float32 or wider; a rank that has not used a table adds 0. In each backward every rank
    of the group must use one table at least, or the others wait for it. Every backward averages, also where a step
    accumulates several of them, and under the `no_sync` of a wrapper. An optimizer that steps within a backward comes
    too early: it would see the gradient of its rank alone. FSDP must be told what to leave alone::

        replicate_tables_(model, mesh.get_group())
        fully_shard(model, mesh=mesh, ignored_params={x.weight for x in model.modules() if isinstance(x, ValueTable)})

    DistributedDataParallel, if it is made afterwards of this very module, leaves the tables alone by itself; it needs
    that for tables that `shard_table_` has spread, whose group is the ranks that have the same columns.

    The tables of the group's first rank replace those of the others. Call it once, of the whole model, on every rank of
    the group, when the tables hold data, after `shard_table_`, and before the wrappers are made. Tables of several
    calls must come first in the same order on all ranks. Of a copy of the model call it again.

    Args:
        module: with tables, which may be shared; those that are not trained are only made equal.
        group: of torch.distributed; None is the default group.

    Returns:
        The module.

    Raises:
        TypeError: `module` is none.
        ValueError: it has no table; FSDP has sharded one; one is on the meta device, or replicated already; or ranks
            differ, as for `shard_table_`. It is raised on every rank, and nothing is changed then.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"`module` must be a torch.nn.Module, got {type(module).__name__}")
    named = {name: x for name, x in module.named_modules(remove_duplicate=False) if isinstance(x, ValueTable)}
    tables = list(dict.fromkeys(named.values()))
    _agree(module, lambda: _check_replicas(module, tables), group)
    _copy_from_first((table.columns for table in tables), group)
    replicas = Replicas(tables, group) if dist.get_world_size(group) > 1 else None
    for table in tables:
        table.contents, table.replicas = Contents(), replicas
    names = {f"{name}.weight" if name else "weight" for name in named}
    names |= {*getattr(module, "_ddp_params_and_buffers_to_ignore", ())}
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)
    return module


def _check_replicas(module: nn.Module, tables: list[ValueTable]) -> None:
    if not tables:
        raise ValueError(f"`module` must have a ValueTable, got a {type(module).__name__} without one")
    for table in tables:
        if isinstance(table.weight, DTensor) and table.weight.placements != (Shard(1),):
            raise ValueError(
                "`module` must have its tables whole, or by columns: name their weights in `ignored_params` of "
                f"fully_shard; got placements {table.weight.placements}"
            )
        if table.weight.is_meta:
            raise ValueError("`module` must have tables that hold data, got one on the meta device")
        if table.replicas is not None and not isinstance(table.replicas, NoReplicas):
            raise ValueError("`module` must have tables that are not replicated yet, got one that is")


def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_`, where some parameters are DTensors, on one mesh or on several.

    That of PyTorch refuses plain tensors beside DTensors, and DTensors of different meshes, as `shard_table_` and
    `fully_shard` leave them. Gradients must be those of the whole batch: on plain tensors the mean over ranks, as
    DistributedDataParallel or `replicate_tables_` leaves it.

    Args:
        parameters: those with a `grad` are clipped, in place.
        max_norm: of all of them together.
        norm_type: as there, > 0.

    Returns:
        The norm before clipping, 0-d, a plain tensor, the same on every rank.

    Raises:
        TypeError: `parameters` are no tensors, or a number is none.
        ValueError: `max_norm` is negative or NaN, or `norm_type` not above 0.
    """
    for name, number in (("max_norm", max_norm), ("norm_type", norm_type)):
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise TypeError(f"`{name}` must be a number, got {type(number).__name__}")
    if not max_norm >= 0:
        raise ValueError(f"`max_norm` must be at least 0, got {max_norm}")
    if not norm_type > 0:
        raise ValueError(f"`norm_type` must be above 0, got {norm_type}")
    if not isinstance(parameters, Iterable):
        raise TypeError(f"`parameters` must be tensors, got {type(parameters).__name__}")
    kinds: dict[Any, list[Tensor]] = {}
    for x in [parameters] if isinstance(parameters, Tensor) else parameters:
        if not isinstance(x, Tensor):
            raise TypeError(f"`parameters` must be tensors, got one that is a {type(x).__name__}")
        if x.grad is not None:
            lies = (x.grad.device_mesh, x.grad.placements) if isinstance(x.grad, DTensor) else None
            kinds.setdefault(lies, []).append(x)
    norms = []
    for kind in kinds.values():
        norm = nn.utils.get_total_norm([x.grad for x in kind if x.grad is not None], norm_type)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = nn.utils.get_total_norm(norms, norm_type)
    for kind in kinds.values():
        nn.utils.clip_grads_with_norm_(kind, max_norm, total)
    return total


class TrainingState:
    """A model and its optimizers for torch.distributed.checkpoint, which saves on one layout and loads on another.

    ::

        dcp.save({"training": TrainingState(model, optimizer)}, checkpoint_id=folder)
        dcp.load({"training": TrainingState(model, optimizer)}, checkpoint_id=folder)

    The layouts may differ in the number of ranks and in how each tensor lies on them: whole, by rows, by columns, by
    both. Tensors go by the names of the model that no wrapper has changed, and a table that layers share is saved once.
    What a training call has left for `advance_memory` is not saved: save after it.

    Args:
        model: the model, with or without wrappers.
        optimizers: one or several, over its parameters.
    """

    def __init__(self, model: nn.Module, optimizers: Any = ()) -> None:
        self.model = model
        self.optimizers = (optimizers,) if isinstance(optimizers, torch.optim.Optimizer) else tuple(optimizers)

    def state_dict(self) -> dict[str, Any]:
        """What is to be saved, or the places that a load fills.

        Raises:
            RuntimeError: own columns are in the place of a DTensor, where something has prepared the model for
                DistributedDataParallel, which `replicate_tables_` makes needless: they would be saved as all columns.
        """
        for name, x in self.model.named_modules():
            if isinstance(x, ValueTable) and x.mesh is not None and not isinstance(x.weight, DTensor):
                raise RuntimeError(
                    f"`{name}.weight` must be the DTensor that `shard_table_` has made, got a plain tensor: call "
                    "replicate_tables_, and make DistributedDataParallel of the model as it is"
                )
        tensors = self.model.state_dict()
        of_model = {name: tensors[path] for path, name in _names_to_save(self.model).items()}
        fresh = _make_states(self.model, self.optimizers)
        of_optimizers = get_optimizer_state_dict(self.model, self.optimizers) if self.optimizers else {}
        for optimizer in fresh:
            optimizer.state.clear()
        return {"model": of_model, "optimizers": of_optimizers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what a load has filled."""
        of_model = state_dict["model"]
        self.model.load_state_dict({path: of_model[name] for path, name in _names_to_save(self.model).items()})
        _make_states(self.model, self.optimizers)
        if self.optimizers:
            set_optimizer_state_dict(self.model, self.optimizers, state_dict["optimizers"])


def _make_states(model: nn.Module, optimizers: tuple[torch.optim.Optimizer, ...]) -> list[torch.optim.Optimizer]:
    """Make the state of optimizers that have made no step yet; these.

    PyTorch makes it by a step with gradients of 0, which it leaves out where a parameter has a gradient, so that a load
    would leave out the moments, without an error; and it counts that step, by which the next ones would differ.
    """
    fresh = [x for x in optimizers if not x.state]
    if not fresh:
        return []
    parameters = [x for optimizer in fresh for group in optimizer.param_groups for x in group["params"]]
    gradients = [x.grad for x in parameters]
    for x in parameters:
        x.grad = None
    try:
        get_optimizer_state_dict(model, fresh)
    finally:
        for x, gradient in zip(parameters, gradients, strict=True):
            x.grad = gradient
    for optimizer in fresh:
        for state in optimizer.state.values():
            if "step" in state:
                state["step"].zero_()
    return fresh


def _names_to_save(model: nn.Module) -> dict[str, str]:
    """By each name in the model's state dict that by which it is saved: the first of a shared tensor's, without what
    wrappers have put into it."""
    first: dict[Any, str] = {}
    named = model.state_dict(keep_vars=True)
    return {
        path: first.setdefault(x if isinstance(x, Tensor) else path, _own_name(model, path))
        for path, x in named.items()
    }


def _own_name(model: nn.Module, path: str) -> str:
    """A name in the model's state dict, without what DistributedDataParallel, compile and checkpoints put into it."""
    at: Any = model
    parts = []
    for part in path.split("."):
        is_ours = not (part == "module" and isinstance(at, nn.parallel.DistributedDataParallel))
        if is_ours and part not in ("_orig_mod", "_checkpoint_wrapped_module"):
            parts.append(part)
        at = getattr(at, part, None)
    return ".".join(parts)
