"""A language model with memories of both kinds, built of transformers' parts."""

from dataclasses import field
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from packaging.version import Version
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, __version__
from transformers import initialization as init
from transformers.cache_utils import Cache
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

from ..layers import FastWeightProductKeyMemory, ProductKeyMemory, ValueTable
from . import parallel
from .mixins import MemoryBlock, MemoryDecoder, MemoryHead, defaults, make_memory, plain, with_signature

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
        share_pkm_table: whether the ProductKeyMemories share one table of values.
        gate_price: what the loss gains for each unit of the mean gate over all memories; 0 in the published model. The
            call needs labels for it, which a Trainer with `label_smoothing_factor` takes out.

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

    @property
    def base_model_tp_plan(self) -> dict[str, str] | None:  # type: ignore[override]
        return parallel.tp_plan(self)

    @property
    def base_model_fsdp_plan(self) -> dict[str, str] | None:  # type: ignore[override]
        return parallel.fsdp_plan(self)

    def __post_init__(self, **kwargs: Any) -> None:
        if self.use_sliding_window and self.layer_types is None:
            raise ValueError("`layer_types` must say which layers have a window, got None with `use_sliding_window`")
        # Without this Qwen3Config drops the window.
        self.use_sliding_window = "sliding_attention" in (self.layer_types or ())
        self.memory, self.pkm = plain(self.memory), plain(self.pkm)
        super().__post_init__(**kwargs)

    def validate_memories(self) -> None:
        for name in ("memory_layers", "pkm_layers"):
            layers = getattr(self, name)
            if len(set(layers)) < len(layers) or not all(0 <= index < self.num_hidden_layers for index in layers):
                raise ValueError(f"`{name}` must be different indices below {self.num_hidden_layers}, got {layers}")
        for name, kind in (("memory", FastWeightProductKeyMemory), ("pkm", ProductKeyMemory)):
            if wrong := sorted(set(getattr(self, name)) - set(defaults(kind))):
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


class FwPKMBlock(MemoryBlock, Qwen3DecoderLayer):
    """A decoder layer of FwPKMModel, whose ProductKeyMemory uses `table` if one is given."""

    forward = with_signature(MemoryBlock.forward, Qwen3DecoderLayer.forward)

    def __init__(self, config: Any, layer_idx: int, table: ValueTable | None = None) -> None:
        super().__init__(config, layer_idx)
        if config.layer_types[layer_idx] == "linear_attention":
            mixer: Any = _GatedDeltaNet(config, layer_idx)
            self.self_attn = mixer
        if layer_idx in config.pkm_layers:
            memory: Any = ProductKeyMemory(config.hidden_size, table=table, layer_idx=layer_idx, **config.pkm)
            self.mlp = memory
        self.memory = make_memory(config, layer_idx, config.memory) if layer_idx in config.memory_layers else None


class FwPKMPreTrainedModel(Qwen3PreTrainedModel):
    config: FwPKMConfig
    config_class = FwPKMConfig
    _no_split_modules = ["FwPKMBlock"]  # noqa: RUF012  transformers declares it so

    def _init_weights(self, module: nn.Module) -> None:
        # A layer is initialised after the modules in it. Under transformers' guard torch.nn.init changes no loaded
        # weight.
        if isinstance(module, (FastWeightProductKeyMemory, ProductKeyMemory)):
            module.reset_parameters()
        elif not isinstance(module, ValueTable):
            super()._init_weights(module)
        if isinstance(module, Qwen3NextGatedDeltaNet):
            init.ones_(module.dt_bias)
            init.copy_(module.A_log, torch.empty_like(module.A_log).uniform_(0.01, 16).log_())


class FwPKMModel(MemoryDecoder, FwPKMPreTrainedModel, Qwen3Model):
    """Qwen3Model with other decoder layers."""

    def __init__(self, config: FwPKMConfig) -> None:
        super(Qwen3Model, self).__init__(config)  # Qwen3Model's own would make its decoder layers
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
        cache = next((x for x in kwargs.values() if isinstance(x, Cache)), None)
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


class FwPKMForCausalLM(MemoryHead, FwPKMPreTrainedModel, Qwen3ForCausalLM):
    """A language model with memories, by its FwPKMConfig; in all else as Qwen3ForCausalLM.

    ``AutoModelForCausalLM.from_pretrained(folder)`` loads it once this module has been imported.

    It takes ``output_gate_means=True``, and caches, padding and packed sequences as `add_memory` describes them. Gated
    DeltaNets need fla to separate packed sequences.
    """

    forward = with_signature(MemoryHead.forward, Qwen3ForCausalLM.forward)
    prepare_inputs_for_generation = with_signature(
        MemoryHead.prepare_inputs_for_generation, Qwen3ForCausalLM.prepare_inputs_for_generation
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
        self._is_stateful = "linear_attention" in (config.layer_types or ())  # its states cannot be taken back
        self.post_init()


# Where this module is copied or reloaded, the last one takes the name.
AutoConfig.register("fwpkm", FwPKMConfig, exist_ok=True)
AutoModelForCausalLM.register(FwPKMConfig, FwPKMForCausalLM, exist_ok=True)
