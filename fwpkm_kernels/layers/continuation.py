"""The memory that a call of the layer starts from: the initial one, a `LayerMemory`, or one that streams."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks as checks
from ..columns import group_name
from ..documents import Documents
from ..options import check_group
from ..records import Carry, DocumentsCarry, Rows
from ..state import MemoryState
from .streamed import StreamedMemory

if TYPE_CHECKING:
    from .fast_weight import FastWeightProductKeyMemory

# Reasons why a memory cannot stream.
DROPS = '`boundary` must be "carry" for a memory that streams, got "drop"'
_PACKED = '`cu_seqlens` must be None where a memory with `scope`="batch" streams'
_TRAINED = (
    "`cache` must be read into under torch.no_grad() to be continued, got one whose tokens were read with gradients, "
    "for which the memory is left alone; to train over segments pass `memory`"
)


class LayerMemory(NamedTuple):
    """The memory after a segment, from which the next one starts, differentiably: of S documents, or of the batch."""

    keys: Tensor  #: [H, 2, n, Dk/2] under scope="batch", [S, H, 2, n, Dk/2] under "sequence"
    #: Under scope="batch" the table, [N, D]. Under "sequence" the rows in which each document's table differs from the
    #: layer's, as `fast_weight_memory_varlen` gives them: all others are read from the layer's table as it is then.
    values: Any
    #: The last w - 1 normed hidden states, which the next segment's `query_conv` sees: [S, w - 1, d]. None is zeros.
    hidden_states: Tensor | None = None
    gate_mean: Tensor | None = None  #: 0-d: the mean gate of the tokens of the segment; differentiable
    #: The slots that the segment read, int64 [B, T, J], and their weights [B, T, J], for `memory_stats` of one memory
    #: at a time. Neither is differentiable. Where scope="sequence" has removed padding, slots are -1 and weights 0.
    slots: Tensor | None = None
    weights: Tensor | None = None
    #: What was read and not written yet: of the batch under scope="batch", of each document under "sequence". None
    #: begins with a new chunk.
    carry: Carry | DocumentsCarry | None = None

    def detach(self) -> "LayerMemory":
        """The same without its graph: gradients of the next segment end here."""
        return LayerMemory._make(None if x is None else x.detach() for x in self)


def find_memory(
    layer: "FastWeightProductKeyMemory", memory: Any, cache: Any, documents: Documents, x: Tensor
) -> LayerMemory | StreamedMemory | None:
    """The memory that a call starts from; None stands for the initial one."""
    if memory is not None and cache is not None:
        raise ValueError("`memory` and `cache` must not be given together: each says what to go on from")
    trains = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in layer.parameters()))
    if cache is not None:
        if not hasattr(cache, "layers"):
            raise TypeError(f"`cache` must be a Cache of transformers or fla, got {type(cache).__name__}")
        from ..integrations import cache as integration

        refusal = _why_not_streamed(layer, trains, documents)
        if refusal is not None and integration.is_fresh(cache, layer):
            integration.refuse_continuation(cache, layer, refusal)
            return None
        memory, name = integration.memory_of(cache, layer, documents.number), "cache"
    elif memory is None:
        return None
    elif isinstance(memory, LayerMemory):
        return _check_segment(layer, memory, documents, x)
    else:
        memory, name = _as_streamed(layer, memory, documents.number), "memory"
    if trains:
        raise ValueError(
            f"`{name}` is written in place, without gradients, but `hidden_states` or a Parameter requires grad: "
            "call under torch.no_grad(), or train over segments with memory=LayerMemory (return_memory=True)"
        )
    if memory.batch != documents.number:
        raise ValueError(
            f"`{name}` is for {memory.batch} sequences, got {documents.number} in `hidden_states` "
            f"[B, T, d], {checks.shape(x)}"
        )
    columns = layer.table.columns  # raises under FSDP, which has freed the table that the memory began with
    check_group(group_name(layer.table.mesh), layer.options)
    memory.take_over(layer.keys.shape, columns.shape, layer.scope, layer.options, layer._conv_width)
    if layer.scope == "batch" and documents.cu_seqlens is not None:
        raise ValueError(_PACKED)
    return memory


def _why_not_streamed(layer: "FastWeightProductKeyMemory", trains: bool, documents: Documents) -> str | None:
    """Why a call must leave a cache that has read nothing yet alone; None where its memory streams."""
    if layer.options.boundary != "carry":
        return DROPS
    if layer.scope == "batch" and documents.cu_seqlens is not None:
        return _PACKED
    if trains:
        return _TRAINED
    try:
        layer.table.columns  # noqa: B018
    except RuntimeError as error:
        return str(error)
    return None


def _as_streamed(layer: "FastWeightProductKeyMemory", memory: Any, batch: int) -> StreamedMemory:
    if isinstance(memory, MemoryState) and layer.scope == "batch" and layer.q_conv is None:
        return StreamedMemory.of_state(memory, batch, layer.options)
    if not isinstance(memory, StreamedMemory):
        kind = type(memory).__name__
        raise TypeError(f"`memory` must be a LayerMemory, or what new_memory() gives, got {kind}")
    return memory


def _check_segment(
    layer: "FastWeightProductKeyMemory", memory: LayerMemory, documents: Documents, hidden_states: Tensor
) -> LayerMemory:
    """Refuse a segment's memory that is not of this layer and these documents; `run_memory` and `run_varlen` check its
    rows and its carry, whose dtypes are those that the projections have now."""
    size: tuple[int, ...] = (layer.heads, 2, layer.num_keys, layer.key_dim // 2)
    is_packed = layer.scope == "sequence"
    wanted: dict[str, tuple[int, ...]] = {"keys": (documents.number, *size) if is_packed else size}
    if not is_packed:
        wanted["values"] = (layer.table.num_slots, layer.table.num_columns)
    tail = memory.hidden_states if layer.q_conv is not None else None
    if tail is not None:
        wanted["hidden_states"] = (documents.number, layer._conv_width - 1, layer.hidden_size)
    for name, size in wanted.items():
        x = getattr(memory, name)
        checks.check_tensor(f"memory.{name}", x)
        checks.check_float(f"memory.{name}", x)
        if x.shape != size:
            raise ValueError(f"`memory.{name}` must be {list(size)} for this layer and input, got {checks.shape(x)}")
        checks.check_together(**{"hidden_states": hidden_states, f"memory.{name}": x})
    if is_packed and not isinstance(memory.values, Rows):
        raise TypeError(f'`memory.values` must be Rows under scope="sequence", got {type(memory.values).__name__}')
    if is_packed:
        checks.check_tensor("memory.values.value", memory.values.value)
    if memory.carry is None:
        return memory
    kind = DocumentsCarry if is_packed else Carry
    if not isinstance(memory.carry, kind):
        raise TypeError(f"`memory.carry` must be a {kind.__name__} for this layer, got {type(memory.carry).__name__}")
    if layer.options.boundary != "carry":
        raise ValueError(
            f'`memory.carry` must be None for a layer with `boundary`="{layer.options.boundary}", whose segments leave '
            f"nothing to be written, got a {kind.__name__}"
        )
    return memory
