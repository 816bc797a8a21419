"""The layers as mixers of flash-linear-attention (fla)."""

from typing import Any

from torch import Tensor, nn


class FLAMixer(nn.Module):
    """A layer with the signature of fla's mixers, such as `fla.layers.GatedDeltaNet`, to stand in their place.

    fla's blocks norm what they hand to a mixer: give the layer ``input_norm=False`` there. fla's `Cache` is one of
    transformers, so a FastWeightProductKeyMemory keeps its memory in it as it does in theirs; it grows by layer
    index, so set ``layer.num_hidden_layers`` to the model's (`fwpkm_kernels.integrations.transformers`).

    Args:
        layer: a FastWeightProductKeyMemory or a ProductKeyMemory, kept as `layer`.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None, Any]:
        """The layer's output, None in place of attentions, and the cache.

        Args:
            hidden_states: [B, T, d].
            attention_mask: [B, T], or [B, columns] of all that the cache has seen, as fla hands it to every call.
            past_key_values: fla's `Cache`, or None.
            kwargs: what the layer takes by name, such as ``cu_seqlens``.
        """
        if attention_mask is not None:
            attention_mask = attention_mask[:, -hidden_states.shape[1] :]
        output = self.layer(hidden_states, attention_mask, cache=past_key_values, use_cache=bool(use_cache), **kwargs)
        return output, None, past_key_values
