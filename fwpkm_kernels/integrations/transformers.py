"""The layers in Hugging Face models: `add_memory` for any decoder, and a language model of our own.

Needs transformers 5.20 or newer (``pip install 'fwpkm_kernels[transformers]'``). From 5.24 on, what was called
`past_key_values` is called `cache`; both are taken here.
"""

import functools
import inspect
import os
import re
import types
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from packaging.version import Version
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Qwen3Config, __version__
from transformers import initialization as init
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import create_masks_for_generate
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3DecoderLayer,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3PreTrainedModel,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
)
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from .. import _checks as checks
from ..layers import FastWeightProductKeyMemory, ProductKeyMemory, ValueTable
from ..layers.streamed import StreamedMemory

# Caches: a memory's layer stands behind the model's own.


class MemoryCacheLayer(CacheLayerMixin):
    """What a `Cache` keeps for a FastWeightProductKeyMemory: a memory of its own for each row.

    It stands in ``cache.layers`` behind the layers of the model, so that attention and a memory can be in one decoder
    layer, and the cache's `reset`, `reorder_cache`, `crop` and so on reach it. A deep copy of a cache, which is how a
    prompt is read once and continued many times, is of the same layer.
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
        self.refusal: str | None = None  #: why the memory cannot go on from what was read
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
        """Whether no token was read yet, in a way that can be continued or not."""
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
        if self.memory is not None and any(x.state.values.device != device for x in self.memory.sessions):
            self.memory = self.memory.to(device)

    def reset(self) -> None:
        self.refusal = self.memory = None  # the next begins with the Parameters as they are then

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

        None of them may be padding, which is on the left where there is any.

        Raises:
            ValueError: they are not all in the present chunk of every row, as what came before it is written; nor was
                the past recorded so far.
        """
        if self.memory is not None:
            kept = tokens_to_remove if tokens_to_remove > 0 else self.memory.columns + tokens_to_remove
            self.memory.rollback(max(self.memory.columns - kept, 0))

    # fla's own Cache reorders and crops what its layers hold through these.

    def _map_state(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.memory is not None:
            self.reorder_cache(function(torch.arange(self.memory.batch, device="cpu")))

    def _validate_crop(self, max_length: int) -> int:
        return max_length


def _cache_among(*arguments: Any) -> Cache | None:
    """The cache that a call was given: models have several names for it, and some give it by position."""
    return next((x for x in arguments if isinstance(x, Cache)), None)


def _find(cache: Cache, layer: nn.Module) -> MemoryCacheLayer | None:
    for entry in cache.layers:
        if isinstance(entry, MemoryCacheLayer) and entry.belongs_to(layer):
            return entry
    return None


def _find_or_append(cache: Cache, layer: FastWeightProductKeyMemory) -> MemoryCacheLayer:
    entry = _find(cache, layer)
    if entry is None:
        if (kind := cache.layer_class_to_replicate) is not None:
            # Such a cache makes its layers when they are first used, and looks for them by index.
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
    """The memory that a cache keeps for a layer, which is a new one where it keeps none yet.

    Raises:
        ValueError: the cache was built without a config and nothing says how many layers the model has; its memory has
            another number of rows; or what `refuse_continuation` was told.
    """
    entry = _find_or_append(cache, layer)
    if entry.refusal is not None:
        raise ValueError(entry.refusal)
    if entry.memory is None or (entry.memory.batch != batch and entry.is_fresh):
        entry.memory = layer.new_memory(batch)
    entry.memory.records_past = entry.record_past
    dtype = torch.promote_types(layer.keys.dtype, layer.memory_dtype)
    for session in entry.memory.sessions[:1]:
        if session.state.values.dtype != dtype:
            raise ValueError(f"`cache` must be of the memory's dtype {dtype}, got {session.state.values.dtype}")
    if entry.memory.batch != batch:
        raise ValueError(f"`cache` must have a memory for each of the {batch} rows, got {entry.memory.batch} memories")
    return entry.memory


def is_fresh(cache: Cache, layer: FastWeightProductKeyMemory) -> bool:
    """Whether a cache holds no token of a layer."""
    entry = _find(cache, layer)
    return entry is None or entry.is_fresh


def refuse_continuation(cache: Cache, layer: FastWeightProductKeyMemory, refusal: str) -> None:
    """Note in a cache that a layer read tokens without it, and with what error to refuse to go on from there."""
    entry = _find_or_append(cache, layer)
    entry.refusal, entry.memory = refusal, None


# Blocks, decoders and models with memories: classes to mix in, before the class of a model or into an object of it.


class _MemoryBlock:
    """A decoder layer that adds to the residual stream what its `memory` gives, before all else that it does."""

    memory: FastWeightProductKeyMemory | None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if "memory_mask" not in kwargs:
            raise TypeError(
                f"a {type(self).__name__} with a memory needs the mask of padding, which its model did not hand on to "
                "it: the model's forward must pass keyword arguments that it does not know to its layers"
            )
        mask, gate_means = kwargs.pop("memory_mask"), kwargs.pop("gate_means", None)
        if self.memory is not None:
            output = self.memory(
                hidden_states,
                mask,
                cache=_cache_among(*args, *kwargs.values()),
                use_cache=bool(kwargs.get("use_cache")),
                return_gate_mean=gate_means is not None,
                cu_seq_lens_q=kwargs.get("cu_seq_lens_q"),
            )
            if gate_means is not None:
                output, mean = output
                if mean is not None:  # of a memory without gates
                    gate_means.append(mean)
            hidden_states = hidden_states + output
        return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]


class _MemoryDecoder:
    """A stack of decoder layers that hands the mask of the call's own tokens to those with memories."""

    layers: nn.ModuleList

    def _cache_layers(self, cache: Cache) -> list[MemoryCacheLayer]:
        """What a cache keeps for the memories, made where it is missing; before any layer reads the tokens of a call.

        Raises:
            ValueError: the cache holds tokens that a memory has not read; or was built without a config.
        """
        tokens = next((x.get_seq_length() for x in cache.layers if isinstance(x, CacheLayerMixin)), 0)
        found = []
        for block in self.layers:
            if (memory := getattr(block, "memory", None)) is None:
                continue
            # A wrapper, as PEFT's, has several, of which one is active.
            memories = [x for x in memory.modules() if isinstance(x, FastWeightProductKeyMemory)]
            is_new = not any(_find(cache, x) for x in memories)
            entries = [_find_or_append(cache, x) for x in memories]
            columns = max(x.get_seq_length() for x in entries)
            if is_new:
                states = (getattr(x, "has_previous_state", {}) for x in cache.layers)
                is_split = bool(tokens > 0) or any(any(x.values()) for x in states)
            else:  # a static cache has a tensor of tokens, for which a GPU would be waited for
                is_split = isinstance(tokens, int) and tokens != columns and not any(x.refusal for x in entries)
            if is_split:
                raise ValueError(
                    "`cache` must have been read by this model from its first token, and cropped as a whole, got one "
                    f"whose memory has read {columns} tokens, unlike its other layers"
                )
            found += entries
        return found

    def forward(self, input_ids: Tensor | None = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        if "output_gate_means" in kwargs:
            raise TypeError(f"`output_gate_means` needs a model with a head around this {type(self).__name__}")
        cache = _cache_among(*kwargs.values())
        entries = [] if cache is None else self._cache_layers(cache)
        mask = kwargs.pop("memory_mask", attention_mask)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            seen = max([0, *(x.get_seq_length() for x in entries)])
            tokens = kwargs["inputs_embeds"] if input_ids is None else input_ids
            if mask.shape[1] < seen + tokens.shape[1]:
                raise ValueError(
                    f"`attention_mask` must have a column for each token, {seen} that `cache` holds and "
                    f"{tokens.shape[1]} of this call, got {checks.shape(mask)}"
                )
            mask = mask[:, seen : seen + tokens.shape[1]]  # a static cache's has columns for tokens to come
        else:
            mask = None  # of four dimensions, or several: a user's own, which says nothing of padding
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids, attention_mask=attention_mask, memory_mask=mask, **kwargs
        )


class _MemoryHead:
    """A model around such a decoder: it collects the means of the gates, and tells `generate`'s padding."""

    config: Any
    is_gradient_checkpointing: bool
    get_decoder: Callable[[], Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:  # of which some models tell their decoder in masks of their own
            kwargs.setdefault("memory_mask", mask)
        is_asked = kwargs.pop("output_gate_means", False)
        return_dict = kwargs.pop("return_dict", None)
        price = getattr(self.config, "gate_price", 0.0) if kwargs.get("labels") is not None else 0.0
        means: list[Tensor] = []
        to_collect = {"gate_means": means} if is_asked or price else {}
        output = super().forward(*args, return_dict=True, **to_collect, **kwargs)  # type: ignore[misc]
        if to_collect:
            is_lost = output[0].requires_grad and not all(x.requires_grad for x in means)
            if is_lost and self.is_gradient_checkpointing:
                raise ValueError(
                    "`use_reentrant` must be False in gradient_checkpointing_kwargs for the means of gates to have "
                    "gradients, got True"
                )
            if price and means:
                output.loss = output.loss + price * _share(**kwargs) * torch.stack(means).mean()
            if is_asked:
                kind: Any = type(output)
                output = _with_gate_means(kind)(**output, gate_means=tuple(means))
        is_tuple = not (self.config.return_dict if return_dict is None else return_dict)
        return output.to_tuple() if is_tuple else output

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        # A static cache's mask has four dimensions already. Tokens that are generated one by one are never padding; a
        # piece of a prompt comes first, or says of no length.
        is_decoding = kwargs.get("next_sequence_length") == 1 and not kwargs.get("is_first_iteration")
        inputs["memory_mask"] = None if is_decoding else kwargs.get("attention_mask")
        return inputs

    def _prepare_cache_for_generation(self, config: Any, model_kwargs: dict[str, Any], *args: Any) -> Any:
        """As inherited; with the layers of the memories, which must be there when the past begins to be recorded."""
        result = super()._prepare_cache_for_generation(config, model_kwargs, *args)  # type: ignore[misc]
        cache = model_kwargs.get("cache", model_kwargs.get("past_key_values"))
        if cache is not None:
            self.get_decoder()._cache_layers(cache)
            if config.is_assistant:
                cache.activate_past_recording()
        return result


def _share(labels: Tensor, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
    """What a call's labels are of all labels of a step, over which its loss is summed, if that is said."""
    return 1.0 if num_items_in_batch is None else (labels[..., 1:] != -100).sum() / num_items_in_batch


@functools.cache
def _with_gate_means(kind: type) -> type:
    """A class of outputs, with the means of gates."""
    names = {
        "__module__": kind.__module__,
        "__annotations__": {"gate_means": tuple[Tensor, ...] | None},
        "__reduce__": lambda self: (_output, (kind, dict(self))),  # pickle finds its class nowhere
        "gate_means": None,
    }
    return dataclass(type(kind.__name__, (kind,), names))


def _output(kind: type, values: dict[str, Any]) -> Any:
    return _with_gate_means(kind)(**values)


def _signed(forward: Callable[..., Any], inner: Callable[..., Any]) -> Callable[..., Any]:
    """A method with the signature of the inner one, by which a Trainer chooses columns and `generate` arguments.

    What comes by position goes on by name, but for the first argument.
    """
    parameters = inspect.signature(inner).parameters.items()
    names = [name for name, x in parameters if x.kind is x.POSITIONAL_OR_KEYWORD][2:]

    @functools.wraps(inner)
    def signed(self: Any, *args: Any, **kwargs: Any) -> Any:
        named = dict(zip(names, args[1:], strict=False))
        return forward(self, *args[:1], *args[1 + len(named) :], **named, **kwargs)

    return signed


@functools.cache
def _mixed(mixin: Any, kind: Any) -> type:
    """The class `kind` with a mixin; it goes by its name, by which transformers' plans and configs find it."""
    names = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__reduce_ex__": lambda self, protocol: (_empty, (mixin, kind), self.__dict__),  # pickle finds it nowhere
    }
    for name in ("forward", "prepare_inputs_for_generation"):
        if hasattr(mixin, name) and hasattr(kind, name):
            names[name] = _signed(getattr(mixin, name), getattr(kind, name))
    return type(kind.__name__, (mixin, kind), names)


def _empty(mixin: Any, kind: Any) -> Any:
    cls: Any = _mixed(mixin, kind)
    return cls.__new__(cls)


def _mix_into(module: nn.Module, mixin: Any) -> None:
    if not isinstance(module, mixin):
        kind: Any = type(module)
        module.__class__ = _mixed(mixin, kind)
        if "_old_forward" in vars(module):  # what accelerate's hooks run, for a model on several devices
            vars(module)["_old_forward"] = types.MethodType(type(module).forward, module)


_OWN = ("hidden_size", "layer_idx", "table", "device", "dtype")  #: of a layer's arguments, what the model says


def _defaults(kind: type) -> dict[str, Any]:
    """The options of a layer, as a config's file holds them."""
    parameters = inspect.signature(kind).parameters
    return _plain({name: x.default for name, x in parameters.items() if name not in _OWN})


def add_memory(model: PreTrainedModel, layers: Sequence[int], **options: Any) -> PreTrainedModel:
    """Give some decoder layers of a Hugging Face model a FastWeightProductKeyMemory each, in place.

    It stands before all else that the layer does: the residual stream gains what the memory gives. With
    ``output_init="zeros"`` the model computes at first what it did. Weights are named ``….layers.2.memory.…``, and have
    the device and dtype of their decoder layer, but for keys and table, which have ``memory_dtype``. What the model is
    used with goes on: `generate` has a memory for each row of the batch, which it keeps in the cache, gradient
    checkpointing checkpoints the memory too. Assisted decoding takes drafts back, which costs a copy of the tables for
    each chunk.

    Left, right and inner padding, as a mask [batch, columns], is no part of what is remembered. A call whose
    `attention_mask` is of four dimensions, or a dict of such, says of padding by ``memory_mask=``, [batch, columns].
    `cu_seq_lens_q` separates packed sequences, positions alone do not; call with ``use_cache=False`` then, as batches
    of DataCollatorWithFlattening outside of training: with a cache, attention in transformers reads across borders.
    With initial_memory="persistent" a Trainer needs a TrainerCallback whose `on_step_end` calls `advance_memory`.

    The model takes ``output_gate_means=True``, for an output with `gate_means`: for each memory the mean of its gate
    over real tokens, which is differentiable.

    ``model.save_pretrained(folder)`` saves the memories too; `load_memory` restores them.

    Args:
        model: with decoder layers in the `layers` of ``model.get_decoder()``, which hands its keyword arguments on to
            them: Qwen3, Llama, Gemma, Mistral, GPT-NeoX and most others, also inside of models of images and text. One
            that does not is refused by its first call; one with an encoder here. MiniMax trains with memories but
            cannot generate, as it takes the cache's number of layers for its own. It is changed.
        layers: indices of decoder layers.
        options: of FastWeightProductKeyMemory. They stand in ``model.config.fwpkm`` afterwards.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; nothing is changed then.
    """
    if getattr(model, "get_decoder", None) is None or not hasattr(model.get_decoder(), "layers"):
        raise TypeError(f"`model` must have a decoder with `layers`, got {type(model).__name__}")
    if model.config.is_encoder_decoder:
        raise TypeError(f"`model` must have no encoder, got {type(model).__name__}")
    for name in _OWN:
        if name in options:
            raise TypeError(f"`{name}` must not be among the options, as the model says what it is")
    decoder = model.get_decoder()
    blocks = decoder.layers
    if any(getattr(block, "memory", None) is not None for block in blocks):
        raise ValueError("`model` must have no memory yet, got one that has")
    indices = [checks.check_int("layers", index, minimum=0) for index in layers]
    if not indices or len(set(indices)) < len(indices) or max(indices) >= len(blocks):
        raise ValueError(f"`layers` must be different indices below {len(blocks)}, got {indices}")

    config = model.config.get_text_config(decoder=True)
    memories = []
    for index in indices:
        weight = next(p for p in blocks[index].parameters() if p.is_floating_point())
        if weight.is_meta:
            raise ValueError(f"`model` must hold its weights in memory, got layer {index} on the meta device")
        memory = _make_memory(config, index, options, device=weight.device, dtype=weight.dtype)
        memories.append(memory.train(model.training))
    for index, memory in zip(indices, memories, strict=True):
        blocks[index].memory = memory
        _mix_into(blocks[index], _MemoryBlock)
    _mix_into(decoder, _MemoryDecoder)
    if model is not decoder:
        _mix_into(model, _MemoryHead)
    model.config.fwpkm = {"layers": indices, **_defaults(FastWeightProductKeyMemory), **_plain(options)}
    return model


def _make_memory(config: Any, index: int, options: dict[str, Any], **kwargs: Any) -> FastWeightProductKeyMemory:
    if isinstance(dtype := options.get("memory_dtype"), str):
        options = {**options, "memory_dtype": getattr(torch, dtype)}
    memory = FastWeightProductKeyMemory(config.hidden_size, layer_idx=index, **options, **kwargs)
    memory.num_hidden_layers = config.num_hidden_layers  # for a cache that does not know
    return memory


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Options as a config's file can hold them: names of dtypes, and Python's numbers for NumPy's."""
    plain = {name: x.item() if hasattr(x, "item") else x for name, x in options.items()}
    return {name: str(x).removeprefix("torch.") if isinstance(x, torch.dtype) else x for name, x in plain.items()}


#: A memory's weight, by its name in the decoder, whatever that is part of.
_WEIGHT = re.compile(r"layers\.\d+\.memory\..+")


def load_memory(model: PreTrainedModel, folder: str | os.PathLike[str]) -> PreTrainedModel:
    """Give a model, in place, the memories that were saved with a model like it.

    For a model with memories, ``model.save_pretrained(folder)`` saves all, but `from_pretrained` restores the rest
    alone, and reports these weights as unexpected::

        model = load_memory(AutoModelForCausalLM.from_pretrained(folder), folder)

    A model that is loaded and saved again without that has no memories, though its config says so.

    Args:
        model: as for `add_memory`, without memories, or with those of the options that were saved.
        folder: where it was saved, in safetensors, in one file or many; or the name of a repository on the Hub.

    Returns:
        The model.

    Raises:
        ValueError: no memory was saved there; or the model's memories, or sizes, are of another configuration.
    """
    config = AutoConfig.from_pretrained(folder)
    saved = getattr(config, "fwpkm", None)
    if saved is None:
        hint = "; AutoModelForCausalLM loads an FwPKMForCausalLM" if isinstance(config, FwPKMConfig) else ""
        raise ValueError(
            f"`folder` must have been saved from a model with memories of `add_memory`, got {folder}{hint}"
        )
    saved = _defaults(FastWeightProductKeyMemory) | saved
    decoder = model.get_decoder()
    if any(getattr(block, "memory", None) is not None for block in decoder.layers):
        present = model.config.fwpkm
        for name in sorted({*saved, *present}):
            if saved.get(name) != present.get(name):
                raise ValueError(
                    f"`model` must have the memories of the checkpoint, with {name}={saved.get(name)!r}, got "
                    f"{name}={present.get(name)!r}"
                )
    else:
        add_memory(model, **saved)
    state: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            for found in filter(None, map(_WEIGHT.search, tensors.keys())):
                state[found[0]] = tensors.get_tensor(found.string)
    for name, x in decoder.state_dict().items():
        if not _WEIGHT.match(name):
            continue
        if name not in state:
            raise ValueError(f"`folder` must hold {name}, got a checkpoint without it")
        if state[name].shape != x.shape:
            raise ValueError(
                f"`model` must have {name} of shape {checks.shape(state[name])}, as in the checkpoint, got "
                f"{checks.shape(x)}"
            )
    decoder.load_state_dict(state, strict=False)
    return model


def _weight_files(folder: str | os.PathLike[str]) -> list[str]:
    missing_is_none = {"_raise_exceptions_for_missing_entries": False}
    if (index := cached_file(folder, SAFE_WEIGHTS_INDEX_NAME, **missing_is_none)) is not None:
        return list(get_checkpoint_shard_files(folder, index)[0])
    return [str(cached_file(folder, SAFE_WEIGHTS_NAME))]


# A language model with memories of both kinds, of transformers' parts.

_INSTALLED = Version(__version__)  #: of transformers
_MIXERS = {"gdn": "linear_attention", "swa": "sliding_attention", "fa": "full_attention"}


@strict
class FwPKMConfig(Qwen3Config):
    """A Qwen3 whose layers mix by full, sliding or linear attention, with memories in some.

    Args, besides those of Qwen3Config:
        layer_types: for each layer "full_attention", "sliding_attention" (of `sliding_window` tokens) or
            "linear_attention", which is a Gated DeltaNet. Full by default.
        linear_conv_kernel_dim, linear_key_head_dim, linear_value_head_dim, linear_num_key_heads,
            linear_num_value_heads: of the Gated DeltaNets, as in Qwen3NextConfig.
        memory_layers: layers with a FastWeightProductKeyMemory before the mixer.
        memory: its options, by name.
        pkm_layers: layers with a ProductKeyMemory in place of the MLP.
        pkm: its options, by name.
        share_pkm_table: whether these have one table of values together.
        gate_price: the loss gains so much for each unit of the gates' mean over memories; 0 is the published model. It
            needs labels in the call, which a Trainer with `label_smoothing_factor` takes out.

    Raises:
        ValueError: naming the field.
    """

    model_type = "fwpkm"

    linear_conv_kernel_dim: int = 4
    linear_key_head_dim: int = 64
    linear_value_head_dim: int = 64
    linear_num_key_heads: int = 8
    linear_num_value_heads: int = 8
    memory_layers: list[int] = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict)
    pkm_layers: list[int] = field(default_factory=list)
    pkm: dict[str, Any] = field(default_factory=dict)
    share_pkm_table: bool = False
    gate_price: float | int = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.use_sliding_window and self.layer_types is None:
            raise ValueError("`layer_types` must say which layers have a window, got None with `use_sliding_window`")
        # Qwen3Config has no window otherwise.
        self.use_sliding_window = "sliding_attention" in (self.layer_types or ())
        self.memory, self.pkm = _plain(self.memory), _plain(self.pkm)
        super().__post_init__(**kwargs)

    def validate_memories(self) -> None:
        for name in ("memory_layers", "pkm_layers"):
            layers = getattr(self, name)
            if len(set(layers)) < len(layers) or not all(0 <= index < self.num_hidden_layers for index in layers):
                raise ValueError(f"`{name}` must be different indices below {self.num_hidden_layers}, got {layers}")
        for name, kind in (("memory", FastWeightProductKeyMemory), ("pkm", ProductKeyMemory)):
            if wrong := sorted(set(getattr(self, name)) - set(_defaults(kind))):
                raise ValueError(f"`{name}` must have options of {kind.__name__} that a model leaves open, got {wrong}")
        if unknown := set(self.layer_types or ()) - set(_MIXERS.values()):
            raise ValueError(f"`layer_types` must be of {sorted(_MIXERS.values())}, got {sorted(unknown)}")

    @classmethod
    def published(cls, name: str = "gdn | pkm@6 + fwpkm@2,10", **changes: Any) -> "FwPKMConfig":
        """The paper's model: 12 layers of width 768, a vocabulary of 32 000, a window of 512 tokens.

        Args:
            name: mixers, which take turns, of "gdn" (Gated DeltaNet), "swa" (sliding window) and "fa" (full
                attention); then, after a bar, memories and their layers.
            changes: fields with other values.

        Raises:
            ValueError: the name is of another form.
        """
        mixers, _, memories = name.partition("|")
        layers: dict[str, list[int]] = {"pkm": [], "fwpkm": []}
        try:
            types = [_MIXERS[mixer.strip()] for mixer in mixers.split("+")]
            for memory in memories.split("+") if memories.strip() else []:
                kind, _, indices = memory.strip().partition("@")
                layers[kind] += [int(index) for index in indices.split(",")]
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"`name` must be as in 'gdn + swa | pkm@6 + fwpkm@2,10', of the mixers {sorted(_MIXERS)}, got {name!r}"
            ) from error
        published = {
            "vocab_size": 32000,
            "hidden_size": 768,
            "intermediate_size": 2304,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "sliding_window": 512,
            "layer_types": [types[index % len(types)] for index in range(12)],
            "memory_layers": layers["fwpkm"],
            "pkm_layers": layers["pkm"],
        }
        return cls(**{**published, **changes})


class _GatedDeltaNet(Qwen3NextGatedDeltaNet):
    """A Gated DeltaNet with the signature of Qwen3's attention."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        cache = kwargs.pop("cache", None)
        cache = kwargs.pop("past_key_values", None) if cache is None else cache
        return super().forward(hidden_states, cache, attention_mask, **kwargs), None


class FwPKMBlock(_MemoryBlock, Qwen3DecoderLayer):
    """A decoder layer of FwPKMModel; `table` is a table of values that its ProductKeyMemory shares."""

    forward = _signed(_MemoryBlock.forward, Qwen3DecoderLayer.forward)

    def __init__(self, config: Any, layer_idx: int, table: ValueTable | None = None) -> None:
        super().__init__(config, layer_idx)
        if config.layer_types[layer_idx] == "linear_attention":
            mixer: Any = _GatedDeltaNet(config, layer_idx)
            self.self_attn = mixer
        if layer_idx in config.pkm_layers:
            memory: Any = ProductKeyMemory(config.hidden_size, table=table, layer_idx=layer_idx, **config.pkm)
            self.mlp = memory
        self.memory = _make_memory(config, layer_idx, config.memory) if layer_idx in config.memory_layers else None


class FwPKMPreTrainedModel(Qwen3PreTrainedModel):
    config: FwPKMConfig
    config_class = FwPKMConfig
    _no_split_modules = ["FwPKMBlock"]  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        # A layer comes after what is in it. What was loaded is left alone by torch.nn.init under transformers' guard.
        if isinstance(module, (FastWeightProductKeyMemory, ProductKeyMemory)):
            module.reset_parameters()
        elif not isinstance(module, ValueTable):
            super()._init_weights(module)
        if isinstance(module, Qwen3NextGatedDeltaNet):
            init.ones_(module.dt_bias)
            init.copy_(module.A_log, torch.empty_like(module.A_log).uniform_(0.01, 16).log_())


class FwPKMModel(_MemoryDecoder, FwPKMPreTrainedModel, Qwen3Model):
    """Qwen3Model with other decoder layers."""

    def __init__(self, config: FwPKMConfig) -> None:
        super(Qwen3Model, self).__init__(config)  # of any model: Qwen3Model's own would make its decoder layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList()
        tables: list[Any] = []
        for index in range(config.num_hidden_layers):
            block = FwPKMBlock(config, index, *tables[:1])
            self.layers.append(block)
            if config.share_pkm_table and index in config.pkm_layers:
                tables.append(block.mlp.table)
        first, *others = (f"layers.{index}.mlp.table.weight" for index in config.pkm_layers[: len(tables)] or [0])
        self._tied_weights_keys = dict.fromkeys(others, first)
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("`input_ids` or `inputs_embeds` must be given, and not both")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        cache = _cache_among(*kwargs.values())
        if position_ids is None:
            # A new cache of linear attention alone cannot say how many tokens it has seen.
            seen = 0 if cache is None or all(cache.is_linear) else cache.get_seq_length()
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0) + seen
        kwargs.setdefault("memory_mask", attention_mask)
        if not isinstance(attention_mask, dict):
            attention_mask = create_masks_for_generate(self.config, inputs_embeds, attention_mask, cache, position_ids)
        return super().forward(
            attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs
        )


class FwPKMForCausalLM(_MemoryHead, FwPKMPreTrainedModel, Qwen3ForCausalLM):
    """A language model with memories, by its FwPKMConfig; in all else as Qwen3ForCausalLM.

    ``AutoModelForCausalLM.from_pretrained(folder)`` loads it once this module has been imported.

    It takes ``output_gate_means=True``, and is used, with caches, padding and packed sequences, as is said of
    `add_memory`. Gated DeltaNets need fla to separate packed sequences.
    """

    forward = _signed(_MemoryHead.forward, Qwen3ForCausalLM.forward)
    prepare_inputs_for_generation = _signed(
        _MemoryHead.prepare_inputs_for_generation, Qwen3ForCausalLM.prepare_inputs_for_generation
    )

    def __init__(self, config: FwPKMConfig) -> None:
        super(Qwen3ForCausalLM, self).__init__(config)
        kinds = sorted(set(config.layer_types or ()))
        if len(kinds) == 3 and Version("5.24") > _INSTALLED:
            raise ValueError(
                "`layer_types` must be of two kinds at most before transformers 5.24, which makes wrong masks for a "
                f"cache of three; got {kinds} and transformers {_INSTALLED}"
            )
        self.model = FwPKMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._is_stateful = "linear_attention" in (config.layer_types or ())  # whose states cannot be taken back
        self.post_init()


# The last of several copies of this module, or of its reloads, has the name.
AutoConfig.register("fwpkm", FwPKMConfig, exist_ok=True)
AutoModelForCausalLM.register(FwPKMConfig, FwPKMForCausalLM, exist_ok=True)
