"""Other people's packages as providers: adapters only, used where a package is installed or its folder is named.

The environment variable FWPKM_PEERS lists folders, separated as in PATH: site folders, unpacked wheels, or the root of
a checkout of the authors' code. A package that is not there gives no provider. One that is there but cannot be imported
gives a provider that raises the reason.

Only its learned projections and norms are taken out of a module, since the inputs here are what comes after them. What
a package cannot do raises NotImplementedError, and whatever it returns is checked like any other provider's.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.eager import EPS
from benchmarks.inputs import Configuration
from benchmarks.providers import Provider
from fwpkm_kernels.options import Options
from reference.memory import MemoryOutput

#: The environment variable that names the folders.
FOLDERS = "FWPKM_PEERS"


def providers(operation_name: str) -> list[Provider]:
    """The peers that can compute an operation and are there."""
    return [p for operation, module, p in _ADAPTERS if operation == operation_name and _is_there(module)]


@contextlib.contextmanager
def _folders_on_path() -> Iterator[None]:
    before = list(sys.path)
    sys.path[:0] = [os.path.abspath(folder) for folder in os.environ.get(FOLDERS, "").split(os.pathsep) if folder]
    try:
        yield
    finally:
        sys.path[:] = before


def _is_there(module: str) -> bool:
    with _folders_on_path():
        try:
            return importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:  # a parent package
            return False


def _load(module: str) -> Any:
    with _folders_on_path():
        return importlib.import_module(module)


def _require(given: Mapping[str, Any], **only: Any) -> None:
    """Each of these options must be the only thing that it can be."""
    for name, value in only.items():
        if given[name] != value:
            raise NotImplementedError(f"`{name}` can only be {value!r} there, got {given[name]!r}")


_PKM = "product_key_memory"


class _Access(nn.Module):
    """In place of a table: keeps the slots, and hands the scores on as the output."""

    slots: Tensor

    def forward(self, slots: Tensor, per_sample_weights: Tensor) -> Tensor:
        self.slots = slots
        return per_sample_weights


@functools.lru_cache(maxsize=8)
def _pkm_addressing(heads: int, sub_keys: int, top_k: int, half: int) -> Any:
    """Its module as far as the scores: without projection, norm, softmax and table."""
    with torch.device("meta"):
        memory = _load(_PKM).PKM(1, heads=heads, num_keys=sub_keys, topk=top_k, dim_head=half)
    memory.to_queries = memory.norm = memory.gate_activation = nn.Identity()
    memory.values = _Access()
    del memory.keys  # a parameter; what is set in its place is a plain tensor with a gradient of its own
    return memory


def _pkm_lookup(queries: Tensor, keys: Tensor, top_k: int, score: str) -> tuple[Tensor, Tensor]:
    _require({"score": score}, score="dot")
    heads, _, sub_keys, half = keys.shape
    memory = _pkm_addressing(heads, sub_keys, top_k, half)
    memory.keys = keys.transpose(1, 2)
    halves_first = queries.to(keys.dtype).unflatten(-1, (2, half)).transpose(1, 2)  # [M, 2, H, Dk/2]
    scores = memory(halves_first.reshape(1, -1, 2 * heads * half))
    return scores.view(-1, heads, top_k), memory.values.slots.view(-1, heads, top_k)


_FAST_WEIGHT = "fast_weight_product_key_memory"


def _fast_weight(keys: Tensor, values: Tensor, top_k: int, lr: float = 1.0, weight: float = 1.0) -> Any:
    """Its module on these keys [H, 2, n, Dk/2] and values [N, H, D], without projections and norms.

    `retrieve(targets, past, eps, query_tokens=queries)` then takes queries [B, T, H·Dk] and targets [B, T, H·D].
    """
    heads, _, sub_keys, half = keys.shape
    width = values.shape[2]
    with torch.device("meta"):
        memory = _load(_FAST_WEIGHT).fwPKM(
            heads * width, heads=heads, num_memories=sub_keys**2, topk=top_k,
            dim_queries_keys=heads * half, dim_values=heads * width, use_boundary_embed=False,
            learning_rate=lr, addressing_loss_weight=weight, mse_loss_weight_to_keys=0.0,
        )  # fmt: skip
    for name in ("keys", "memories", "to_queries", "to_gates", "to_values", "to_out"):
        delattr(memory, name)
    memory.zero = torch.zeros((), device=keys.device)  # it takes its device from this buffer
    memory.keys, memory.memories = keys.transpose(0, 1), values
    memory.to_queries = lambda queries: queries.unflatten(-1, (heads, 2, half)).movedim(-2, 0)
    memory.to_values = lambda targets: targets.unflatten(-1, (heads, width))
    memory.to_gates = lambda targets: torch.ones_like(targets[..., :1, None])
    memory.to_out = nn.Identity()
    return memory


@functools.lru_cache(maxsize=8)
def _fast_weight_addressing(
    heads: int, sub_keys: int, half: int, top_k: int, device: torch.device, dtype: torch.dtype, lr: float, weight: float
) -> Any:
    """The module on values of width 1: it cannot look up without reading, nor step the keys without writing."""
    keys = torch.empty(heads, 2, sub_keys, half, device=device, dtype=dtype)
    return _fast_weight(keys, keys.new_zeros(sub_keys**2, heads, 1), top_k, lr, weight)


def _fast_weight_retrieve(
    queries: Tensor, keys: Tensor, top_k: int, lr: float = 1.0, weight: float = 1.0
) -> tuple[Any, dict[str, Tensor]]:
    heads, _, sub_keys, half = keys.shape
    memory = _fast_weight_addressing(heads, sub_keys, half, top_k, keys.device, keys.dtype, lr, weight)
    memory.keys = keys.transpose(0, 1)
    rows = queries.to(keys.dtype).flatten(1).unsqueeze(0)
    targets = rows.new_zeros(1, rows.shape[1], heads)
    return memory, memory.retrieve(targets, idw_eps=EPS, query_tokens=rows)[1]


def _fast_weight_lookup(queries: Tensor, keys: Tensor, top_k: int, score: str) -> tuple[Tensor, Tensor]:
    _require({"score": score}, score="idw")
    _, found = _fast_weight_retrieve(queries, keys, top_k)
    return found["scores"].gather(-1, found["sub_indices"])[0], found["final_indices"][0]


def _fast_weight_key_step(keys: Tensor, queries: Tensor, top_k: int, score: str, weight: float) -> Tensor:
    _require({"heads": keys.shape[0], "score": score}, heads=1, score="idw")
    memory, found = _fast_weight_retrieve(queries, keys, top_k, weight=weight)
    _, steps = memory.store(found, idw_eps=EPS)  # [2, 1, H, n, Dk/2]
    return keys + steps[:, 0].transpose(0, 1)


def _fast_weight_sequence(
    queries: Tensor, targets: Tensor, keys: Tensor, values: Tensor, **options: Any
) -> MemoryOutput:
    """Its retrieve and store, chunk by chunk.

    It writes the last token of a chunk with the chunk's first target, which a gate of 0 undoes; its step has neither
    the factor J nor the C/(C - 1) of the tokens that are read but not written, so both go into its learning rate.
    """
    batch, length, heads, _ = queries.shape
    o = Options(**options)
    # it keeps a memory for each item of a batch, and tables of their own for the heads
    given = {"batch": batch, "heads": heads, **o._asdict()}
    _require(given, batch=1, heads=1, lookahead=1, score="idw", weighting="softmax", temperature=1, step="paper")
    _require(given, weight_decay=0, clip=None, key_gradient="addressing", boundary="drop", eps=EPS)
    memory = _fast_weight(keys, values.unsqueeze(1), o.top_k)
    past = None
    outputs, slots, weights = [], [], []
    for start in range(0, length, o.chunk_size):
        chunk = slice(start, start + o.chunk_size)
        rows = queries[:, chunk].flatten(2)
        output, found = memory.retrieve(targets[:, chunk], past, idw_eps=EPS, query_tokens=rows)
        outputs.append(output)
        slots.append(found["final_indices"].flatten(2))
        weights.append(found["final_scores"].flatten(2))
        tokens = output.shape[1]
        written = torch.ones_like(output[..., 0]) * (torch.arange(tokens, device=output.device) < tokens - 1)
        memory.learning_rate = o.lr * o.top_k * tokens / max(1, tokens - 1)
        memory.addressing_loss_weight = o.addressing_weight * o.lr / memory.learning_rate
        stored = memory.store({**found, "gates": written[..., None, None]}, past, idw_eps=EPS)
        past = _load(_FAST_WEIGHT).Memories(*stored)
    if past is not None:
        keys, values = keys + past.keys[:, 0].transpose(0, 1), values + past.memory_values[0, :, 0]
    return MemoryOutput(torch.cat(outputs, 1), keys, values, torch.cat(slots, 1), torch.cat(weights, 1))


_AUTHORS = "src.models.fwpkm.fwpkm"
_AUTHORS_GATHER = "src.models.fwpkm.xformer_embeddingbag_grad_wrapper"
_AUTHORS_SCORES = {"idw": "idw", "dot": "dot_product"}


@functools.lru_cache(maxsize=8)
def _authors_memory(**options: Any) -> Any:
    """Its module, without parameters."""
    with torch.device("meta"):
        return _load(_AUTHORS).FastWeightProductKeyMemory(**options)


def _authors_lookup(queries: Tensor, keys: Tensor, top_k: int, score: str) -> tuple[Tensor, Tensor]:
    heads, _, sub_keys, half = keys.shape
    sizes = {"mem_k_dim": 2 * half, "mem_v_dim": 1, "mem_heads": heads, "mem_topk": top_k, "mem_n_subkeys": sub_keys}
    memory = _authors_memory(**sizes, qk_score_type=_AUTHORS_SCORES[score])
    scores, slots, *_ = memory.get_indices(queries.to(keys.dtype).contiguous(), keys.flatten(0, 2))
    return scores, slots


def _authors_gather(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    return _load(_AUTHORS_GATHER).xformers_embedding_bag(slots, values, weights)


def _authors_sequence(queries: Tensor, targets: Tensor, keys: Tensor, values: Tensor, **options: Any) -> MemoryOutput:
    """Its module's forward, as it trains. Final keys and values have no gradient: it leaves them in its parameters."""
    o = Options(**options)
    _require(o._asdict(), eps=EPS, step="paper", boundary="drop")
    if o.clip not in (None, 1.0):
        raise NotImplementedError(f"`clip` can only be None or 1.0 there, got {o.clip!r}")
    if o.addressing_weight == 0:
        raise NotImplementedError("`addressing_weight` cannot be 0 there")
    heads, width = queries.shape[2:]
    differentiable = torch.is_grad_enabled()
    memory = _authors_memory(
        mem_k_dim=width, mem_v_dim=values.shape[1], mem_heads=heads, mem_topk=o.top_k, mem_n_subkeys=keys.shape[2],
        qk_score_type=_AUTHORS_SCORES[o.score], score_nonlinear=o.weighting, score_temperature=o.temperature,
        learning_rate=o.lr, weight_decay=o.weight_decay, grad_clip=o.clip is not None, lookahead=o.lookahead,
        addr_loss_weight=o.addressing_weight, mem_grad_to_values_only=o.key_gradient == "addressing",
        fp32_fw=values.dtype != torch.float64,
    )  # fmt: skip
    memory.train(differentiable)
    # Copies, since it overwrites its parameters with what the last chunk leaves; and it takes gradients of its own.
    parameters = {"keys": keys.flatten(0, 2).clone(), "values": values.clone()}
    for parameter in parameters.values():
        if not parameter.requires_grad:
            parameter.requires_grad_()
    inputs = {"q": queries.flatten(2), "ref_v": targets, "gates": None, "chunk_size": o.chunk_size, "loss_mask": None}
    result = torch.func.functional_call(memory, parameters, kwargs=inputs)
    return MemoryOutput(
        result["output"] if differentiable else result["output"].detach(),
        parameters["keys"].detach().view_as(keys),
        parameters["values"].detach(),
        result["indices"].flatten(2),
        result["scores"].flatten(2),
    )


def _power_of_two(c: Configuration) -> bool:
    """The kernel of its backward, which writes too, takes no other widths."""
    return c.is_float32 and c.width & (c.width - 1) == 0


def _idw(c: Configuration) -> bool:
    """It keeps several arrays of all differences, [tokens, H, n, Dk/2]: of 2 GiB each for 4096 tokens and n = 512."""
    return c.score == "idw" and c.sub_keys <= 512


def _idw_step(c: Configuration) -> bool:
    """It has a distribution of sub-keys for each head, here the heads share one; and float32 is built in."""
    return _idw(c) and c.is_float32 and c.heads == 1


def _dropping(c: Configuration) -> bool:
    """Neither carries pairs over a boundary, nor works without a key step."""
    return c.boundary == "drop" and c.key_weight != 0


def _dropping_alone(c: Configuration) -> bool:
    """It keeps a memory for each item of a batch."""
    return _dropping(c) and _idw_step(c) and c.batch == 1


_pkm, _fast, _authors = (
    functools.partial(Provider, name) for name in ("product-key-memory", "fast-weight-product-key-memory", "authors")
)
#: Operation, module that must be there, and provider.
_ADAPTERS: tuple[tuple[str, str, Provider], ...] = (
    ("lookup", _PKM, _pkm(_pkm_lookup, lambda c: c.score == "dot")),
    ("lookup", _FAST_WEIGHT, _fast(_fast_weight_lookup, _idw)),
    ("lookup", _AUTHORS, _authors(_authors_lookup)),
    ("gather", _AUTHORS_GATHER, _authors(_authors_gather, _power_of_two)),
    ("key-step", _FAST_WEIGHT, _fast(_fast_weight_key_step, _idw_step)),
    ("sequence", _FAST_WEIGHT, _fast(_fast_weight_sequence, _dropping_alone)),
    ("sequence", _AUTHORS, _authors(_authors_sequence, lambda c: _dropping(c) and _power_of_two(c), capturable=False)),
)
