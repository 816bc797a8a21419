"""The layer that a cache of transformers keeps for a memory; fla's cache is one of transformers' caches."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from ..layers import FastWeightProductKeyMemory
from ..layers.streamed import StreamedMemory


class MemoryCacheLayer(CacheLayerMixin):
    """What a `Cache` keeps for a FastWeightProductKeyMemory: a memory of its own for each row.

    It stands in ``cache.layers`` behind the layers of the model, so that attention and a memory can be in one decoder
    layer, and the cache's `reset`, `reorder_cache`, `crop` and so on reach it. A deep copy of a cache goes with the
    same layer, so that a prompt can be read once and continued many times.
    """

    # A static cache with one layer that is not compileable would lose its mask when single tokens are decoded.
    is_compileable = True
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, layer: FastWeightProductKeyMemory) -> None:
        super().__init__()
        self._layer = weakref.ref(layer)
        self.memory: StreamedMemory | None = None
        self.refusal: str | None = None  #: why later calls cannot go on: tokens were read without the memory
        self.record_past = False

    def __reduce__(self) -> Any:
        raise TypeError("a MemoryCacheLayer cannot be pickled, as it goes with a layer: pickle what was read instead")

    def __deepcopy__(self, memo: dict[int, Any]) -> "MemoryCacheLayer":
        other = object.__new__(MemoryCacheLayer)
        vars(other).update(vars(self))
        other.memory = None if self.memory is None else self.memory.clone()
        return other

    def belongs_to(self, layer: nn.Module) -> bool:
        return self._layer() is layer

    @property
    def is_fresh(self) -> bool:
        """Whether no token has been read yet, with the memory or without it."""
        return self.refusal is None and self.get_seq_length() == 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("a memory's layer of a cache holds no key and value states")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a memory's layer of a cache holds no key and value states")

    def get_seq_length(self) -> int:
        return 0 if self.memory is None else self.memory.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def activate_past_recording(self) -> None:
        """Let `crop` take back tokens over the beginning of a chunk too: `StreamedMemory.records_past`."""
        self.record_past = True

    def offload(self) -> None:
        self._move(torch.device("cpu"))

    def prefetch(self) -> None:
        if (layer := self._layer()) is not None:
            self._move(layer.keys.device)

    def _move(self, device: torch.device) -> None:
        if self.memory is not None and self.memory.batch > 0 and self.memory.device != device:
            self.memory = self.memory.to(device)

    def reset(self) -> None:
        self.refusal = self.memory = None  # the next call begins with the Parameters as they are then

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.memory is not None:
            self.memory.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.memory is not None:
            self.reorder_cache(torch.arange(self.memory.batch, device="cpu").repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Take back columns: the last ``-tokens_to_remove``, or, for a positive number, all beyond so many.

        None of them may be padding, so padding must be on the left.

        Raises:
            ValueError: some come before the present chunk of a row, whose memory has been written since, and no past
                was recorded that reaches so far. A cache that was cropped as a whole cannot go on then, since its
                other layers have been cropped before.
        """
        if self.memory is not None:
            kept = tokens_to_remove if tokens_to_remove > 0 else self.memory.columns + tokens_to_remove
            try:
                self.memory.rollback(max(self.memory.columns - kept, 0))
            except ValueError as error:
                raise ValueError(
                    f"{error}. The cache's layers before this one have been cropped by now, so it cannot go on: read "
                    "the tokens anew, and call activate_past_recording() of the cache before what is to be taken back"
                ) from error

    # fla's own Cache calls these to reorder and crop what its layers hold.

    def _map_state(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.memory is not None:
            self.reorder_cache(function(torch.arange(self.memory.batch, device="cpu")))

    def _validate_crop(self, max_length: int) -> int:
        return max_length


_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")  #: what models and their blocks call a cache


def cache_among(*args: Any, **kwargs: Any) -> Cache | None:
    """The cache among a call's arguments: models have several names for it, and some pass it by position.

    Raises:
        TypeError: what has a cache's name is none, so that a memory would take each call for a new document.
    """
    for name in _NAMES:
        if (cache := kwargs.get(name)) is not None:
            if not isinstance(cache, Cache):
                raise TypeError(f"`{name}` must be a Cache of transformers or fla, got {type(cache).__name__}")
            return cache
    return next((x for x in (*args, *kwargs.values()) if isinstance(x, Cache)), None)


def find(cache: Cache, layer: nn.Module) -> MemoryCacheLayer | None:
    for entry in cache.layers:
        if isinstance(entry, MemoryCacheLayer) and entry.belongs_to(layer):
            return entry
    return None


def find_or_append(cache: Cache, layer: FastWeightProductKeyMemory) -> MemoryCacheLayer:
    entry = find(cache, layer)
    if entry is None:
        if (kind := cache.layer_class_to_replicate) is not None:
            # Such a cache makes its layers when they are first used, and finds them by index: the model's come first.
            layers = getattr(layer, "num_hidden_layers", None)
            if layers is None:
                raise ValueError(
                    f"`cache` must know how many layers the model has, got a {type(cache).__name__} built without a "
                    "config: build it with config=model.config, or set `num_hidden_layers` of the layer"
                )
            while len(cache.layers) < layers:
                cache.layers.append(kind())
        entry = MemoryCacheLayer(layer)
        cache.layers.append(entry)
    return entry


def memory_of(cache: Cache, layer: FastWeightProductKeyMemory, batch: int) -> StreamedMemory:
    """The memory that a cache keeps for a layer; a new one where it keeps none yet.

    Raises:
        ValueError: the cache was built without a config and nothing says how many layers the model has; its memory has
            another dtype or number of rows; or `refuse_continuation` was called.
    """
    entry = find_or_append(cache, layer)
    if entry.refusal is not None:
        raise ValueError(entry.refusal)
    if entry.memory is None or (entry.memory.batch != batch and entry.is_fresh):
        entry.memory = layer.new_memory(batch)
    entry.memory.records_past = entry.record_past
    dtype = torch.promote_types(layer.keys.dtype, layer.memory_dtype)
    if entry.memory.batch > 0 and entry.memory.dtype != dtype:
        raise ValueError(f"`cache` must be of the memory's dtype {dtype}, got {entry.memory.dtype}")
    if entry.memory.batch != batch:
        raise ValueError(f"`cache` must have a memory for each of the {batch} rows, got {entry.memory.batch} memories")
    return entry.memory


def is_fresh(cache: Cache, layer: FastWeightProductKeyMemory) -> bool:
    """Whether a cache holds no token of a layer."""
    entry = find(cache, layer)
    return entry is None or entry.is_fresh


def refuse_continuation(cache: Cache, layer: FastWeightProductKeyMemory, refusal: str) -> None:
    """Note in a cache that a layer has read tokens without it, so that calls which would go on raise `refusal`."""
    entry = find_or_append(cache, layer)
    entry.refusal, entry.memory = refusal, None
