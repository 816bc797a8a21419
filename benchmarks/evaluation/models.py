"""The models that are compared: one composition, `FwPKMForCausalLM`, with other mixers and memories.

A model's name is its mixer, "full", "swa" (sliding window) or "gdn" (Gated DeltaNet), then "+fwpkm" for a fast-weight
product key memory before the mixer of some layers, and "+pkm" for a static product key memory in place of the MLP of
some. All models of a size have as many parameters outside of tables and sub-keys: the width of the MLPs makes up for
what projections of memories and other mixers take.
"""

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, apply_rotary_pos_emb
from transformers.models.qwen3_next import modeling_qwen3_next

from fwpkm_kernels.integrations.transformers import FwPKMConfig, FwPKMForCausalLM
from fwpkm_kernels.layers import FastWeightProductKeyMemory

MIXERS = MappingProxyType({"full": "full_attention", "swa": "sliding_attention", "gdn": "linear_attention"})
MODELS = ("swa+fwpkm", "full", "swa", "gdn", "swa+pkm", "gdn+fwpkm", "swa+fwpkm+pkm")


@dataclasses.dataclass(frozen=True)
class Size:
    """What all models of a size have in common."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    parameters: int  #: outside of tables and sub-keys
    window: int
    gdn: dict[str, int]
    memory_layers: tuple[int, ...]
    pkm_layers: tuple[int, ...]
    memory: dict[str, Any]
    pkm: dict[str, Any]
    context_attention: bool = True  #: whether full attention has the convolution and the head start
    initializer_range: float | None = None  #: None: hidden_size^-0.5, which `_start` then changes
    training: dict[str, Any] = dataclasses.field(default_factory=dict)  #: `Options` other than the defaults


def size_options(size: Size) -> dict[str, Any]:
    """A size as JSON has it, without `training`, which is a part of a model's `Options`."""
    given = json.loads(json.dumps(dataclasses.asdict(size)))
    del given["training"]
    return given


_MEMORY: dict[str, Any] = {"scope": "batch", "initial_memory": "persistent"}

SIZES = MappingProxyType(
    {
        "miniature": Size(
            hidden_size=128, layers=2, heads=4, kv_heads=4, head_dim=32, parameters=480_000, window=64,
            gdn={"heads": 4, "head_dim": 32},
            memory_layers=(0,), pkm_layers=(0,),
            memory=_MEMORY
            | {"num_keys": 512, "key_dim": 128, "value_dim": 64, "top_k": 16, "chunk_size": 256, "query_conv": 16},
            pkm={"num_keys": 128, "heads": 2, "key_dim": 64, "value_dim": 128, "top_k": 16},
        ),
        "small": Size(
            hidden_size=256, layers=4, heads=8, kv_heads=8, head_dim=32, parameters=3_000_000, window=128,
            gdn={"heads": 8, "head_dim": 32},
            memory_layers=(0,), pkm_layers=(2,),
            memory=_MEMORY | {"key_dim": 256, "value_dim": 128, "top_k": 16, "chunk_size": 256, "query_conv": 16},
            pkm={"num_keys": 256, "key_dim": 128, "value_dim": 256, "top_k": 16},
            training={"plan": ((512, 4, 400), (4096, 2, 400)), "lr": 2e-3},
        ),
        "medium": Size(
            hidden_size=512, layers=8, heads=8, kv_heads=8, head_dim=64, parameters=25_000_000, window=256,
            gdn={"heads": 8, "head_dim": 64},
            memory_layers=(0, 5), pkm_layers=(3,),
            memory=_MEMORY | {"key_dim": 256, "value_dim": 256, "top_k": 16, "query_conv": 16},
            pkm={"key_dim": 256},
            training={
                "plan": ((1024, 8, 500), (4096, 4, 1500)), "lr": 1e-3, "warmup": 100, "dtype": "bfloat16",
                "distance": 512 + 64,
            },
        ),
        # The paper's model, on bytes. `parameters` are those of "gdn" with MLPs of the paper's width, 2304. Memories
        # have boundary="carry" and not the paper's "drop", as only these can be read in pieces.
        "published": Size(
            hidden_size=768, layers=12, heads=12, kv_heads=4, head_dim=64, parameters=87_928_512, window=512,
            gdn={"heads": 8, "head_dim": 64},
            memory_layers=(2, 10), pkm_layers=(6,),
            memory=_MEMORY, pkm={},
            context_attention=False, initializer_range=0.02,
            training={
                "plan": ((4096, 4, 20_000),), "accumulate": 8, "lr": 3e-4, "warmup": 1000, "dtype": "bfloat16",
                "distance": 512 + 64, "gate_price": 0.0, "test_memory": {},
            },
        ),
    }
)  # fmt: skip


def blocked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention over all keys, or over a window in blocks of its width, so that its cost is linear in length.

    For transformers' `AttentionInterface`. Queries [B, H, T, d] are the last T of the S positions of keys and values
    [B, G, S, d]; padding and packed documents are not known here.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    length, past = query.shape[2], key.shape[2] - query.shape[2]
    if sliding_window is None or key.shape[2] <= sliding_window:
        if past == 0:
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        elif query.device.type == "cpu":
            # A mask of 128K keys would add more than half of the time of attention without one. So past and present are
            # read apart, and weighed by the sums of their exponentials, which no public function returns.
            read = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            before, sum_before = read(query, key[:, :, :past], value[:, :, :past], scale=scaling)
            now, sum_now = read(query, key[:, :, past:], value[:, :, past:], is_causal=True, scale=scaling)
            out = torch.lerp(now, before, (sum_before - sum_now).sigmoid().unsqueeze(-1))
        else:
            visible = causal_lower_right(length, key.shape[2])
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scaling)
        return out.transpose(1, 2), None
    # Keys are padded until a whole window stands before the first query: block i of queries then sees keys i·w to
    # (i + 2)·w.
    window, (batch, heads, _, width) = sliding_window, query.shape
    blocks = -(-length // window)
    right, before = blocks * window - length, window - past
    query = F.pad(query, (0, 0, 0, right)).view(batch, heads, blocks, window, width)
    key, value = (F.pad(x, (0, 0, before, right)).unfold(2, 2 * window, window).mT for x in (key, value))
    q, k = torch.arange(window, device=query.device).unsqueeze(1), torch.arange(2 * window, device=query.device)
    visible = ((k > q) & (k <= q + window)).expand(blocks, -1, -1).clone()
    first = max(0, before)
    for block in range(-(-first // window)):
        visible[block] &= k >= first - block * window
    flat = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out = F.scaled_dot_product_attention(*flat, attn_mask=visible.repeat(batch, 1, 1).unsqueeze(1), scale=scaling)
    return out.view(batch, blocks, heads, window, width).transpose(2, 3).flatten(1, 2)[:, :length], None


AttentionInterface.register("blocked", blocked_attention)


def in_torch_on_cpus(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of transformers that calls the function it wraps, which is plain PyTorch, if its input is on a CPU.

    Where fla is installed transformers takes its kernels for Gated DeltaNets, which need a GPU.
    """
    in_torch = inspect.unwrap(function)

    @functools.wraps(function)
    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (in_torch if x.is_cpu else function)(x, *args, **kwargs)

    return call


for _name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
    setattr(modeling_qwen3_next, _name, in_torch_on_cpus(getattr(modeling_qwen3_next, _name)))


class ContextAttention(Qwen3Attention):
    """Full attention whose queries and keys come from a causal convolution, and match contexts from the start.

    In a small budget plain attention does not learn to look needles up. This one begins with that ability: a query is a
    projection of the last bytes up to its own, and a key the same projection of the bytes before its own, so that each
    byte finds the bytes that followed a similar context. Only a quarter of a head is rotated, as in Qwen3-Next.
    """

    WIDTH = 8  #: of the convolution, in tokens
    SHARPNESS = 3.0  #: the weight of the query norm at the beginning

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        width = config.hidden_size
        self.conv = nn.Conv1d(width, 2 * width, self.WIDTH, groups=width, bias=False)

    @torch.no_grad()
    def start(self) -> None:
        """Draw the filters, and let keys match the queries of the first head that reads them."""
        filters = torch.randn(self.conv.weight.shape[0] // 2, self.WIDTH) * self.WIDTH**-0.5
        filters[:, 0] = 0.0
        self.conv.weight.copy_(torch.stack((filters, filters.roll(-1, 1)), 1).view_as(self.conv.weight))
        of_heads = self.q_proj.weight.unflatten(0, (-1, self.num_key_value_groups, self.head_dim))
        self.k_proj.weight.copy_(of_heads[:, 0].flatten(0, 1))
        self.q_norm.weight.fill_(self.SHARPNESS)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        x = hidden_states.mT
        before = F.pad(x, (self.WIDTH - 1, 0))
        if cache is not None:
            layer = cache.layers[self.layer_idx]
            seen = layer.get_seq_length()
            history = layer.update_conv_state(x, conv_kernel_size=self.WIDTH - 1)
            before = history if seen else before
        mixed = self.conv(before[..., -(x.shape[-1] + self.WIDTH - 1) :]).unflatten(1, (-1, 2))
        q, k = (self._heads(linear(mixed[:, :, i].mT)) for i, linear in enumerate((self.q_proj, self.k_proj)))
        q, k, v = self.q_norm(q), self.k_norm(k), self._heads(self.v_proj(hidden_states))
        cos, sin = position_embeddings
        is_still = torch.arange(self.head_dim, device=x.device) % (self.head_dim // 2) >= self.head_dim // 8
        cos, sin = torch.where(is_still, 1.0, cos).to(x.dtype), torch.where(is_still, 0.0, sin).to(x.dtype)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        out, _ = blocked_attention(self, q, k, v, None, scaling=self.scaling)
        return self.o_proj(out.flatten(2)), None

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def split_name(model: str) -> tuple[str, bool, bool]:
    """A name's mixer, whether it has fast-weight memories, and whether it has static ones."""
    mixer, *memories = model.split("+")
    if mixer not in MIXERS or len(set(memories)) < len(memories) or set(memories) - {"fwpkm", "pkm"}:
        raise ValueError(f"`model` must be one of {', '.join(MODELS)}, got {model!r}")
    return mixer, "fwpkm" in memories, "pkm" in memories


def make_config(
    model: str, size: Size, memory: dict[str, Any], gate_price: float, vocab_size: int = 256
) -> FwPKMConfig:
    """The configuration of a model of `MODELS`; `make_model` sets the width of its MLPs.

    Args:
        memory: options of the fast-weight memories, other than the size's.
        gate_price: what a call with `labels` adds to its loss for each unit of the mean gate.

    Raises:
        ValueError: for another model.
    """
    mixer, has_memory, has_pkm = split_name(model)
    gdn = size.gdn
    return FwPKMConfig(
        vocab_size=vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=8,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        sliding_window=size.window,
        layer_types=[MIXERS[mixer]] * size.layers,
        linear_key_head_dim=gdn["head_dim"],
        linear_value_head_dim=gdn["head_dim"],
        linear_num_key_heads=gdn["heads"],
        linear_num_value_heads=gdn["heads"],
        memory_layers=list(size.memory_layers) if has_memory else [],
        memory={**size.memory, **memory} if has_memory else {},
        pkm_layers=list(size.pkm_layers) if has_pkm else [],
        pkm=size.pkm if has_pkm else {},
        gate_price=gate_price,
        initializer_range=size.initializer_range or size.hidden_size**-0.5,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
        attn_implementation="blocked",
    )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters there are outside of tables and sub-keys, and how many numbers in these."""
    of_memory = [x for name, x in model.state_dict().items() if name.endswith((".keys", ".table.weight"))]
    others = [x for name, x in model.named_parameters() if not name.endswith((".keys", ".table.weight"))]
    return sum(x.numel() for x in others), sum(x.numel() for x in of_memory)


def make_model(config: FwPKMConfig, size: Size) -> FwPKMForCausalLM:
    """The model, with MLPs of the width with which it comes nearest to the size's number of parameters."""
    with torch.device("meta"):
        probes = []
        for width in (8, 16):
            config.intermediate_size = width
            probes.append(count_parameters(_compose(config, size))[0])
    slope = (probes[1] - probes[0]) // 8
    config.intermediate_size = round(8 + (size.parameters - probes[0]) / slope)
    model = _compose(config, size)
    if size.initializer_range is None:
        _start(model)
    return model


@torch.no_grad()
def _start(model: FwPKMForCausalLM) -> None:
    """Enlarge embeddings and shrink what layers add, so that tokens outweigh what the first layers add to them.

    Otherwise a memory's queries would depend little on single tokens, and learn slowly.
    """
    nn.init.normal_(model.model.embed_tokens.weight)
    for name, weight in model.named_parameters():
        if name.endswith(("self_attn.o_proj.weight", "self_attn.out_proj.weight", "mlp.down_proj.weight")):
            weight.mul_((2 * model.config.num_hidden_layers) ** -0.5)
    for module in model.modules():
        if isinstance(module, ContextAttention):
            module.start()


def _compose(config: FwPKMConfig, size: Size) -> FwPKMForCausalLM:
    model = FwPKMForCausalLM(config)
    if size.context_attention and config.layer_types[0] == "full_attention":
        for index, block in enumerate(model.model.layers):
            block.self_attn = ContextAttention(config, index)
            block.self_attn.apply(model._init_weights)
    return model


def memories_of(model: nn.Module) -> list[FastWeightProductKeyMemory]:
    """The fast-weight memories of a model, in the order of its layers."""
    return [x for x in model.modules() if isinstance(x, FastWeightProductKeyMemory)]


def new_cache(model: Any) -> DynamicCache:
    """An empty cache, in which attention with a convolution can keep its last tokens."""
    model = getattr(model, "module", model)
    cache = DynamicCache(config=model.config)
    for index, block in enumerate(model.model.layers):
        if isinstance(block.self_attn, ContextAttention):
            cache.layers[index] = LinearAttentionAndFullAttentionLayer()
    return cache
