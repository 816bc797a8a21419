"""The table of values, alone in a module."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import _checks as checks
from ..columns import own_columns, own_random_numbers

_Result = TypeVar("_Result")
TABLE_INITS = ("normal", "zeros")


class Contents:
    """What one draw or load has put into a table: what was made from the one before has no place in it any more.

    An object for each, and no count of them, which compiled code would take for a constant.
    """


class ValueTable(nn.Module):
    """A table of value rows, `weight` [num_slots, width]: the large part of a memory layer, in a module of its own.

    So FSDP can wrap it alone, `parameter_groups` gives it a group of its own, and layers can share it. Layers use the
    weight inside this module's forward, since a wrapper such as FSDP gathers it before that and frees it afterwards.

    Args:
        num_slots: N, rows.
        width: D, columns.
        init: "normal", with standard deviation D^-½, or "zeros".
        trainable: whether `weight` is a Parameter. Otherwise it is a buffer, and a cast of the module to fewer bits
            than `dtype` has, such as `.to(torch.bfloat16)`, leaves it as it is.
        dtype: of the weight, a floating-point one.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        num_slots: int,
        width: int,
        *,
        init: str = "normal",
        trainable: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.num_slots = checks.check_int("num_slots", num_slots, minimum=1)
        self.width = checks.check_int("width", width, minimum=1)
        checks.check_choice("init", init, TABLE_INITS)
        checks.check_flag("trainable", trainable)
        check_memory_dtype("dtype", dtype)
        self.init, self.memory_dtype = init, dtype
        self.contents = Contents()  #: a new one with each draw and each load
        #: The one-dimensional DeviceMesh over whose ranks `shard_table_` has spread the columns; None: all are here.
        self.mesh: Any = None
        self.replicas: Any = None  #: what `replicate_tables_` leaves to see to the gradient of the weight
        self.watched: tuple[Tensor, ...] = ()  #: the weight whose gradient that has last seen to
        self.weight: Tensor
        keep(self, "weight", torch.empty(num_slots, width, device=device, dtype=dtype), trainable)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the rows anew, or zero them."""
        if self.init == "zeros":
            nn.init.zeros_(self.weight)
        else:
            with own_random_numbers(self.mesh, self.weight):
                nn.init.normal_(self.weight, std=self.width**-0.5)
        self.contents = Contents()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.contents = Contents()  # a load of a layer comes here too
        super()._load_from_state_dict(*args, **kwargs)

    @property
    def columns(self) -> Tensor:
        """The columns of the weight that this rank has, [N, num_columns], a plain tensor.

        Raises:
            RuntimeError: FSDP has rows of them elsewhere, or there are others than those that `shard_table_` has left.
        """
        columns = own_columns("table.weight", self.weight, self.mesh)
        if columns.shape[1] != self.num_columns:
            raise RuntimeError(
                f"`table.weight` must have the {self.num_columns} columns that `shard_table_` has left this rank, got "
                f"{columns.shape[1]}, as load_state_dict(assign=True) of a whole table gives"
            )
        return columns

    @property
    def num_columns(self) -> int:
        """How many columns this rank has: D, or its part of them under `shard_table_`."""
        return self.width if self.mesh is None else self.width // self.mesh.size()

    def forward(self, function: Callable[..., _Result], *args: Any, **kwargs: Any) -> _Result:
        """``function(columns, *args, **kwargs)``. What it returns must not be the weight, nor a view of it."""
        if self.replicas is not None:
            self.replicas.watch(self)
        return function(self.columns, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ValueTable":
        self.watched = ()  # a DTensor is the same object afterwards, but without hooks
        return apply_but_round_no_buffer(self, super()._apply, fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.num_slots}, {self.width}, trainable={isinstance(self.weight, nn.Parameter)}"


def keep(module: nn.Module, name: str, x: Tensor, trainable: bool) -> None:
    """Register a tensor of a memory: a Parameter without weight decay, or a buffer.

    The attribute is for fla and other libraries, which look for it. `parameter_groups` goes by names, since
    copy.deepcopy loses attributes of Parameters.
    """
    if trainable:
        parameter = nn.Parameter(x)
        parameter._no_weight_decay = True  # type: ignore[attr-defined]
        module.register_parameter(name, parameter)
    else:
        module.register_buffer(name, x)


def apply_but_round_no_buffer(module: Any, apply: Callable[..., Any], fn: Callable[..., Any], recurse: bool) -> Any:
    """`nn.Module._apply`, but a cast leaves the module's own buffers at least the bits of its `memory_dtype`."""
    before = dict(module._buffers)
    apply(fn, recurse)
    for name, x in before.items():
        after, least = module._buffers[name], module.memory_dtype
        if x is not None and torch.promote_types(after.dtype, least) != after.dtype:
            module._buffers[name] = x.to(after.device, least)
    for name in ("keys", "weight"):  # leaving the meta device makes new Parameters, without the attribute
        if module._parameters.get(name) is not None:
            module._parameters[name]._no_weight_decay = True
    return module


def check_memory_dtype(name: str, dtype: object) -> None:
    """Refuse a `dtype` that keys and values cannot have."""
    if dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        raise TypeError(f"`{name}` must be torch.float32, float64, float16 or bfloat16, got {dtype!r}")


def check_table(table: object, num_keys: int, value_dim: int) -> None:
    """Refuse a `table` that is no ValueTable of the size that a layer needs."""
    if not isinstance(table, ValueTable):
        raise TypeError(f"`table` must be a ValueTable, got {type(table).__name__}")
    if table.weight.shape != (num_keys**2, value_dim):
        raise ValueError(
            f"`table` must have num_keys² = {num_keys**2} slots of width value_dim = {value_dim}, "
            f"got {checks.shape(table.weight)}"
        )


def check_table_kind(table: ValueTable, initial_memory: str, memory_dtype: torch.dtype) -> None:
    """Refuse a `table` that is trainable, or float64, where the fast-weight layer is not, or the other way round."""
    if (table.weight.dtype == torch.float64) != (memory_dtype == torch.float64):
        raise ValueError(f"`table` and the layer must both be float64 or neither, got {table.weight.dtype}")
    if isinstance(table.weight, nn.Parameter) != (initial_memory == "learned"):
        raise ValueError(
            f'`table` must be trainable for `initial_memory`="learned", and only then; got {initial_memory!r} with '
            f"trainable={isinstance(table.weight, nn.Parameter)}"
        )
