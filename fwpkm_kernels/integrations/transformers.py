"""The layers in Hugging Face models: `add_memory` for any decoder, and a language model of our own.

Needs transformers 5.20 or newer (``pip install 'fwpkm_kernels[transformers]'``). From 5.24 on, what was called
`past_key_values` is called `cache`; both are taken here.
"""

import os
import re
from collections.abc import Sequence
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from .. import _checks as checks
from ..layers import FastWeightProductKeyMemory
from .cache import MemoryCacheLayer
from .language_model import FwPKMConfig, FwPKMForCausalLM, FwPKMModel, FwPKMPreTrainedModel
from .mixins import OWN, MemoryBlock, MemoryDecoder, MemoryHead, defaults, make_memory, mix_into, plain

__all__ = [
    "FwPKMConfig",
    "FwPKMForCausalLM",
    "FwPKMModel",
    "FwPKMPreTrainedModel",
    "MemoryCacheLayer",
    "add_memory",
    "load_memory",
]


def add_memory(model: PreTrainedModel, layers: Sequence[int], **options: Any) -> PreTrainedModel:
    """Give some decoder layers of a Hugging Face model a FastWeightProductKeyMemory each, in place.

    The memory comes before everything else in its layer, and its output is added to the residual stream. With
    ``output_init="zeros"`` the model computes at first what it did before. Weights are named ``….layers.2.memory.…``.
    They have the device and dtype of their decoder layer, but keys and table have ``memory_dtype``. The model is used
    as before: `generate` keeps a memory for each row of the batch in the cache, and gradient checkpointing includes the
    memories. Assisted decoding takes drafts back: each chunk then keeps twice the rows that it has changed, or a copy
    of the table where one memory is for the whole batch or the table decays. Continuous batching (`generate_batch`)
    raises, as its cache can hold no memory.

    Padding on the left, on the right or between tokens is not remembered, if a mask [batch, columns] marks it. A call
    whose `attention_mask` has four dimensions, or is a dict of such masks, gives that mask as ``memory_mask=``.
    `cu_seq_lens_q` separates packed sequences; positions alone do not. Outside of training call the model on packed
    sequences, such as batches of DataCollatorWithFlattening, with ``use_cache=False``, since attention in transformers
    reads across borders with a cache. With initial_memory="persistent" a Trainer needs a TrainerCallback whose
    `on_step_end` calls `advance_memory`.

    With ``output_gate_means=True`` the model's output has `gate_means`: for each memory the mean gate over all tokens
    but padding, which is differentiable.

    ``model.save_pretrained(folder)`` saves the memories too; `load_memory` restores them.

    Args:
        model: with decoder layers in the `layers` of ``model.get_decoder()``, which hands its keyword arguments on to
            them: Qwen3, Llama, Gemma, Mistral, GPT-NeoX and most others, also inside of models of images and text. A
            model that does not raises in its first call; one with an encoder is refused here. MiniMax trains with
            memories but cannot generate, as it takes the cache's number of layers for its own. The model is changed.
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
    for name in OWN:
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
        memory = make_memory(config, index, options, device=weight.device, dtype=weight.dtype)
        memories.append(memory.train(model.training))
    for index, memory in zip(indices, memories, strict=True):
        blocks[index].memory = memory
        mix_into(blocks[index], MemoryBlock)
    mix_into(decoder, MemoryDecoder)
    if model is not decoder:
        mix_into(model, MemoryHead)
    model.config.fwpkm = {"layers": indices, **defaults(FastWeightProductKeyMemory), **plain(options)}
    return model


#: The name of a memory's weight within the decoder, whatever model the decoder is part of.
_WEIGHT = re.compile(r"layers\.\d+\.memory\..+")


def load_memory(model: PreTrainedModel, folder: str | os.PathLike[str]) -> PreTrainedModel:
    """Give a model, in place, the memories that were saved with a model like it.

    ``model.save_pretrained(folder)`` saves a model with its memories, but `from_pretrained` restores only the rest, and
    reports the memories' weights as unexpected::

        model = load_memory(AutoModelForCausalLM.from_pretrained(folder), folder)

    A model that is loaded without `load_memory` and saved again has lost its memories, though its config names them.

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
    saved = defaults(FastWeightProductKeyMemory) | saved
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
