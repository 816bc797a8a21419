"""Classes that give blocks, decoders and models memories, as a base of a class or mixed into an object."""

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from .. import _checks as checks
from ..layers import FastWeightProductKeyMemory
from .cache import MemoryCacheLayer, cache_among, find, find_or_append


class MemoryBlock:
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
                cache=cache_among(*args, **kwargs),
                use_cache=bool(kwargs.get("use_cache")),
                return_gate_mean=gate_means is not None,
                cu_seq_lens_q=kwargs.get("cu_seq_lens_q"),
            )
            if gate_means is not None:
                output, mean = output
                if mean is not None:  # a memory without gates has none
                    gate_means.append(mean)
            hidden_states = hidden_states + output
        return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]


class MemoryDecoder:
    """A stack of decoder layers that hands the mask of the call's own tokens to those with memories."""

    config: Any
    layers: nn.ModuleList

    def _memory_blocks(self) -> list[Any]:
        """The decoder layers with memories that run: an early exit drafts with the first layers alone."""
        blocks: Any = self.layers[: self.config.num_hidden_layers]
        return [block for block in blocks if getattr(block, "memory", None) is not None]

    def _cache_layers(self, cache: Cache) -> list[MemoryCacheLayer]:
        """The layers that a cache keeps for the memories, made where they are missing.

        It is called before any layer reads the tokens of a call.

        Raises:
            ValueError: the cache holds tokens that a memory has not read; or was built without a config.
        """
        tokens = next((x.get_seq_length() for x in cache.layers if isinstance(x, CacheLayerMixin)), 0)
        found = []
        for block in self._memory_blocks():
            # A wrapper such as PEFT's holds several memories, of which one is active.
            memories = [x for x in block.memory.modules() if isinstance(x, FastWeightProductKeyMemory)]
            known = [x for x in (find(cache, x) for x in memories) if x is not None]
            columns = max([0, *(x.get_seq_length() for x in known)])
            if not known:
                states = (getattr(x, "has_previous_state", {}) for x in cache.layers)
                is_split = bool(tokens > 0) or any(any(x.values()) for x in states)
            else:  # a static cache counts in a tensor: to read it would wait for a GPU
                is_split = isinstance(tokens, int) and tokens != columns and not any(x.refusal for x in known)
            if is_split:
                raise ValueError(
                    "`cache` must have been read by this model from its first token, and cropped as a whole, got one "
                    f"whose memory has read {columns} tokens, unlike its other layers"
                )
            found += [find_or_append(cache, x) for x in memories]
        return found

    def forward(self, input_ids: Tensor | None = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        if "output_gate_means" in kwargs:
            raise TypeError(f"`output_gate_means` needs a model with a head around this {type(self).__name__}")
        # Without memories any object may be the cache, such as that of continuous batching.
        cache = cache_among(**kwargs) if self._memory_blocks() else None
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
            mask = mask[:, seen : seen + tokens.shape[1]]  # a static cache's mask has columns for later tokens
        else:
            mask = None  # a user's own, of four dimensions or several, does not say what is padding
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids, attention_mask=attention_mask, memory_mask=mask, **kwargs
        )


class MemoryHead:
    """A model around such a decoder: it collects the gates' means, and passes on the mask of padding."""

    config: Any
    is_gradient_checkpointing: bool
    get_decoder: Callable[[], Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:  # some models make other masks of it for their decoder
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
        # The mask in `inputs` has four dimensions if the cache is static, so memories get the original one. Tokens that
        # are generated one by one are never padding. A piece of a prompt is the first iteration, or comes without
        # `next_sequence_length`.
        is_decoding = kwargs.get("next_sequence_length") == 1 and not kwargs.get("is_first_iteration")
        inputs["memory_mask"] = None if is_decoding else kwargs.get("attention_mask")
        return inputs

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As inherited, without memories: through it come `generate_batch` and all else of continuous batching.

        Raises:
            TypeError: the model has memories. Errors of `forward` would come too late: `generate_batch` logs them.
        """
        if self.get_decoder()._memory_blocks():
            raise TypeError(
                "`model` must have no memory for continuous batching, whose cache can hold none, got "
                f"{type(self).__name__} with memories: call `generate`, or serve sessions of a MemoryPool, as "
                "fwpkm_kernels.demo.serve does"
            )
        return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]

    def _prepare_cache_for_generation(self, config: Any, model_kwargs: dict[str, Any], *args: Any) -> Any:
        """As inherited, and make the memories' layers, which must be there before the past begins to be recorded."""
        result = super()._prepare_cache_for_generation(config, model_kwargs, *args)  # type: ignore[misc]
        cache = cache_among(**model_kwargs)
        if cache is not None:
            self.get_decoder()._cache_layers(cache)
            if config.is_assistant:
                cache.activate_past_recording()
        return result


def _share(labels: Tensor, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
    """The share of a call's labels among those of its step, if their number is given: the loss is a sum over calls."""
    return 1.0 if num_items_in_batch is None else (labels[..., 1:] != -100).sum() / num_items_in_batch


@functools.cache
def _with_gate_means(kind: type) -> type:
    """A class of outputs like `kind`, with a field for the means of gates."""
    names = {
        "__module__": kind.__module__,
        "__annotations__": {"gate_means": tuple[Tensor, ...] | None},
        # No module has the class under its name, by which pickle would look for it.
        "__reduce__": lambda self: (_output, (kind, dict(self))),
        "gate_means": None,
    }
    return dataclass(type(kind.__name__, (kind,), names))


def _output(kind: type, values: dict[str, Any]) -> Any:
    return _with_gate_means(kind)(**values)


def with_signature(forward: Callable[..., Any], inner: Callable[..., Any]) -> Callable[..., Any]:
    """The method `forward` with the signature of `inner`, by which a Trainer chooses columns and `generate` arguments.

    Arguments by position are passed on by name, but for the first.
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
    """The class `kind` with a mixin; it keeps its name, by which transformers' plans and configs find it."""
    names = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        # No module has the class under its name, by which pickle would look for it.
        "__reduce_ex__": lambda self, protocol: (_empty, (mixin, kind), self.__dict__),
    }
    for name in ("forward", "prepare_inputs_for_generation"):
        if hasattr(mixin, name) and hasattr(kind, name):
            names[name] = with_signature(getattr(mixin, name), getattr(kind, name))
    return type(kind.__name__, (mixin, kind), names)


def _empty(mixin: Any, kind: Any) -> Any:
    cls: Any = _mixed(mixin, kind)
    return cls.__new__(cls)


def mix_into(module: nn.Module, mixin: Any) -> None:
    if not isinstance(module, mixin):
        kind: Any = type(module)
        module.__class__ = _mixed(mixin, kind)
        if "_old_forward" in vars(module):  # accelerate's hooks run it, for a model on several devices
            vars(module)["_old_forward"] = types.MethodType(type(module).forward, module)


OWN = ("hidden_size", "layer_idx", "table", "device", "dtype")  #: the arguments of a layer that its model determines


def defaults(kind: type) -> dict[str, Any]:
    """The options of a layer, as a config's file holds them."""
    parameters = inspect.signature(kind).parameters
    return plain({name: x.default for name, x in parameters.items() if name not in OWN})


def make_memory(config: Any, index: int, options: dict[str, Any], **kwargs: Any) -> FastWeightProductKeyMemory:
    if isinstance(dtype := options.get("memory_dtype"), str):
        options = {**options, "memory_dtype": getattr(torch, dtype)}
    memory = FastWeightProductKeyMemory(config.hidden_size, layer_idx=index, **options, **kwargs)
    memory.num_hidden_layers = config.num_hidden_layers  # for a cache that was built without a config
    return memory


def plain(options: dict[str, Any]) -> dict[str, Any]:
    """Options as a config's file can hold them: names of dtypes, and Python's numbers for NumPy's."""
    plain = {name: x.item() if hasattr(x, "item") else x for name, x in options.items()}
    return {name: str(x).removeprefix("torch.") if isinstance(x, torch.dtype) else x for name, x in plain.items()}
