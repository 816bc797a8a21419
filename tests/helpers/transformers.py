"""Small Hugging Face models with memories, and prompts for them."""

import inspect

import torch
from packaging.version import Version
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Qwen3Config, Qwen3ForCausalLM, logging
from transformers.models.qwen3_next import modeling_qwen3_next

from fwpkm_kernels.integrations import language_model
from fwpkm_kernels.integrations.transformers import FwPKMConfig, FwPKMForCausalLM, add_memory

logging.set_verbosity_error()
logging.disable_progress_bar()

#: What transformers calls a cache, from 5.24 on and before.
CACHE = "cache" if "cache" in inspect.signature(Qwen3ForCausalLM.forward).parameters else "past_key_values"
PAD, VOCABULARY, PROMPT = 0, 61, 23
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "initializer_range": 0.2,  # so that greedy decoding does not stand still
}
MEMORY = {"num_keys": 8, "top_k": 2, "key_dim": 8, "value_dim": 16, "chunk_size": 6, "query_conv": 3}
MEMORIES = ("keys", "table.weight")  #: what has a dtype of its own
#: Before, transformers makes wrong masks for three kinds.
THIRD = "full_attention" if Version("5.24") <= language_model._INSTALLED else "sliding_attention"
PKM = {"num_keys": 8, "top_k": 2, "heads": 2, "key_dim": 8, "value_dim": 16}
OWN = {
    **SIZES,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "sliding_attention", THIRD, "linear_attention"],
    "sliding_window": 7,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "memory_layers": [0, 2],
    "memory": MEMORY,
    "pkm_layers": [1, 3],
    "pkm": PKM,
}
ONLY_GDN = {**OWN, "layer_types": ["linear_attention"] * 4, "pkm_layers": []}
GREEDY = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": PAD}


def put_gated_delta_nets_into_pytorch(monkeypatch) -> None:
    """As where fla is not installed, whose kernels need a GPU."""
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        function = getattr(modeling_qwen3_next, name)
        monkeypatch.setattr(modeling_qwen3_next, name, inspect.unwrap(function))


def qwen(seed: int = 0, **changes) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, **changes)).eval()


def with_memory(**options) -> Qwen3ForCausalLM:
    return add_memory(qwen(), [0, 2], **(MEMORY | options))


def own(**changes) -> FwPKMForCausalLM:
    torch.manual_seed(0)
    return FwPKMForCausalLM(FwPKMConfig(**(OWN | changes))).eval()


def neox() -> GPTNeoXForCausalLM:
    """Of a model whose blocks call the cache `layer_past`."""
    torch.manual_seed(0)
    sizes = {name: x for name, x in SIZES.items() if name not in ("num_key_value_heads", "head_dim")}
    return add_memory(GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)).eval(), [0, 2], **MEMORY)


MAKERS = {"added": with_memory, "neox": neox, "own": own, "only_gdn": lambda: own(**ONLY_GDN)}


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows, and the mask of the second, which is shorter and padded on the left."""
    ids = torch.randint(1, VOCABULARY, (2, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    return ids * mask, mask


def read(model, cache, ids, mask=None, cuts=(5, 10, 1, 7)) -> torch.Tensor:
    """Logits of pieces that are read one after the other."""
    logits, seen = [], 0 if mask is None else mask.shape[1] - ids.shape[1]
    for piece in ids.split(list(cuts), 1):
        seen += piece.shape[1]
        past = None if mask is None else mask[:, :seen]
        logits.append(model(piece, attention_mask=past, use_cache=True, **{CACHE: cache}).logits)
    return torch.cat(logits, 1)


def close(actual, expected) -> None:
    """Up to float32's rounding; the Gated DeltaNets differ most, in chunks and step by step."""
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) == len(list(model.parameters()))
    model.zero_grad()
    return found
