"""The memory that a call of the layer starts from: the initial one, a `LayerMemory`, or one that streams."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks as checks
from ..documents import Documents
from ..records import each
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
    values: Tensor  #: [N, D] or [S, N, D]
    #: The last w - 1 normed hidden states, which the next segment's `query_conv` sees: [S, w - 1, d]. None is zeros.
    hidden_states: Tensor | None = None
    gate_mean: Tensor | None = None  #: 0-d: the mean gate of the tokens of the segment; differentiable
    #: The slots that the segment read, int64 [B, T, J], and their weights [B, T, J], for `memory_stats` of one memory
    #: at a time. Neither is differentiable. Where scope="sequence" has removed padding, slots are -1 and weights 0.
    slots: Tensor | None = None
    weights: Tensor | None = None

    def detach(self) -> "LayerMemory":
        """The same without its graph: gradients of the next segment end here."""
        return LayerMemory(*each(Tensor.detach, *self))  # type: ignore[arg-type]


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
        return _check_segment(layer, memory, documents)
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
    memory.take_over(layer.keys, layer.table.weight, layer.scope, layer.options, layer._conv_width)
    if layer.scope == "batch" and documents.cu_seqlens is not None:
        raise ValueError(_PACKED)
    return memory


def _why_not_streamed(layer: "FastWeightProductKeyMemory", trains: bool, documents: Documents) -> str | None:
    """Why a call must leave a cache that has read nothing yet alone; None where its memory streams."""
    if layer.options.boundary != "carry":
        return DROPS
    if layer.scope == "batch" and documents.cu_seqlens is not None:
        return _PACKED
    return _TRAINED if trains else None


def _as_streamed(layer: "FastWeightProductKeyMemory", memory: Any, batch: int) -> StreamedMemory:
    if isinstance(memory, MemoryState) and layer.scope == "batch" and layer.q_conv is None:
        return StreamedMemory.of_state(memory, batch, layer.options)
    if not isinstance(memory, StreamedMemory):
        kind = type(memory).__name__
        raise TypeError(f"`memory` must be a LayerMemory, or what new_memory() gives, got {kind}")
    return memory


def _check_segment(layer: "FastWeightProductKeyMemory", memory: LayerMemory, documents: Documents) -> LayerMemory:
    """Refuse a segment's memory whose shapes are not those of this layer and these documents."""
    count = documents.number if layer.scope == "sequence" else None
    wanted = {
        "keys": (layer.heads, 2, layer.num_keys, layer.key_dim // 2),
        "values": (layer.num_keys**2, layer.value_dim),
    }
    for name, size in wanted.items():
        size = size if count is None else (count, *size)
        checks.check_tensor(f"memory.{name}", getattr(memory, name))
        checks.check_float(f"memory.{name}", getattr(memory, name))
        if getattr(memory, name).shape != size:
            raise ValueError(
                f"`memory.{name}` must be {list(size)} for this layer and input, "
                f"got {checks.shape(getattr(memory, name))}"
            )
    tail, size = memory.hidden_states, (documents.number, layer._conv_width - 1, layer.hidden_size)
    if layer.q_conv is not None and tail is not None and tail.shape != size:
        raise ValueError(f"`memory.hidden_states` must be {list(size)}, got {checks.shape(tail)}")
    return memory
