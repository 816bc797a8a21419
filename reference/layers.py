"""The layers: projections, norms and gates around the fast-weight memory, and around a static one."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from reference.gather import sparse_value_gather
from reference.lookup import product_key_lookup
from reference.memory import fast_weight_memory, weigh


class Memory(Protocol):
    """What a call starts from."""

    keys: Tensor  # [H, 2, n, Dk/2]; with scope="sequence" [S, H, 2, n, Dk/2], one for each of S documents
    values: Tensor  # [N, D]; [S, N, D]
    hidden_states: Tensor | None  # [S, w - 1, d], what q_conv sees before each document; None is 0


class LayerOutput(NamedTuple):
    """What a call gives, and the memory that it leaves."""

    output: Tensor  # [B, T, d]
    keys: Tensor  # these three as in Memory
    values: Tensor
    hidden_states: Tensor | None
    gate_mean: Tensor | None  # a scalar
    slots: Tensor  # [B, T, J]
    weights: Tensor  # [B, T, J]


def fast_weight_layer(
    hidden_states: Tensor,
    parameters: Mapping[str, Tensor],
    *,
    num_keys: int,
    heads: int = 1,
    top_k: int = 8,
    lookahead: int = 1,
    scope: str = "sequence",
    query_conv: int | None = None,
    input_norm: bool = True,
    query_norm: str | None = None,
    value_norm: str | None = "zscore",
    gate: bool = True,
    write_gate: bool = True,
    norm_eps: float = 1e-5,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    memory: Memory | None = None,
    **options: Any,
) -> LayerOutput:
    """The layer with a fast-weight memory; the block around it adds ``hidden_states``.

    With x the hidden states, and p what :func:`fast_weight_memory` reads with queries q, targets v and write gates g:

    q = query_norm(q_proj(q_conv(q_norm(x))))
    v = value_norm(v_proj(v_norm(x)))
    g = sigmoid(g_proj(g_norm(x)))
    output = o_proj(o_norm(g·p + (1 − g)·v)), or o_proj(o_norm(p + v)) without ``gate``

    A document is a row of [B, T], or with ``cu_seqlens`` a piece of the only row. ``scope="sequence"``: every document
    has a memory of its own, all from the same beginning, and tokens that ``attention_mask`` leaves out are removed
    before anything else is done. ``scope="batch"``: there is one memory; ``attention_mask`` is its mask, which is 0 too
    where ``cu_seqlens`` puts a token and the one ``lookahead`` later into different documents.

    Args:
        hidden_states: [B, T, d].
        parameters: by their names in the layer's state_dict; a bias may be missing.
        query_conv: the width w of the causal convolution ``q_conv`` of each channel, which sees the tokens of one
        document; None leaves it out. With ``scope="batch"`` it sees 0 at tokens that are not real.
        input_norm: False leaves out q_norm, v_norm and g_norm.
        query_norm: of the query of each head: None, "l2" or "zscore", as ``value_norm``.
        gate: whether g mixes p and v.
        write_gate: whether g is a write gate of the memory.
        attention_mask: [B, T]; a token is real where it is above 0.
        cu_seqlens: [S + 1], for a batch of one: document s is the tokens from cu_seqlens[s] to cu_seqlens[s + 1].
        memory: what the call starts from; None: "keys" and "table.weight" of the parameters.
        options: the others of :func:`fast_weight_memory`.

    Returns:
        Output, final memory, the mean of g over real tokens (0 without any; None if there is no g), slots and weights.
        Where a token is removed the output is 0, slots are -1 and weights 0.
    """
    batch, length, _ = hidden_states.shape
    if cu_seqlens is None:
        documents = list(torch.arange(batch * length).view(batch, length))
    else:
        documents = [torch.arange(start, stop) for start, stop in pairwise(cu_seqlens.tolist())]
    real = torch.ones(batch, length, dtype=torch.bool) if attention_mask is None else attention_mask > 0
    keys = parameters["keys"].reshape(heads, 2, num_keys, -1) if memory is None else memory.keys
    values = parameters["table.weight"] if memory is None else memory.values
    before = None if memory is None else memory.hidden_states
    if before is None and query_conv is not None:
        before = hidden_states.new_zeros(len(documents), query_conv - 1, hidden_states.shape[-1])
    options |= {"top_k": top_k, "lookahead": lookahead}

    def project(
        x: Tensor, pieces: dict[int, Tensor], is_real: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
        """q [b, t, H, Dk], v [b, t, D] and g [b, t] of x [b, t, d], and the last w - 1 tokens of each document.

        ``pieces`` has the documents, by their numbers, as indices into the b·t tokens.
        """

        def normed(name: str) -> Tensor:
            return _rms_norm(x, parameters[name], norm_eps) if input_norm else x

        features, last = normed("q_norm.weight"), []
        if query_conv is not None:
            features = torch.where(is_real.unsqueeze(-1), features, 0.0).flatten(0, 1)
            windows = [torch.cat([before[s], features[piece]]) for s, piece in pieces.items()]
            parts = [_convolve(window, parameters["q_conv.weight"]) for window in windows]
            features = torch.cat([features[:0], *parts]).view(x.shape)  # of no documents too
            last = [window[len(window) - query_conv + 1 :] for window in windows]
        q = _linear("q_proj", features, parameters).unflatten(-1, (heads, -1))
        v = _linear("v_proj", normed("v_norm.weight"), parameters)
        g = None
        if gate or write_gate:
            g = torch.sigmoid(_linear("g_proj", normed("g_norm.weight"), parameters)).squeeze(-1)
        return _normalize(q, query_norm), _normalize(v, value_norm), g, last

    def mix(p: Tensor, v: Tensor, g: Tensor | None) -> Tensor:
        y = g.unsqueeze(-1) * p + (1 - g.unsqueeze(-1)) * v if gate else p + v
        return _linear("o_proj", _rms_norm(y, parameters["o_norm.weight"], norm_eps), parameters)

    if scope == "batch":
        mask = attention_mask
        if cu_seqlens is not None:
            number = torch.cat([torch.full_like(document, s) for s, document in enumerate(documents)])
            pairs = max(0, length - lookahead)
            within = torch.ones(batch, length, dtype=torch.bool)
            within[0, :pairs] = number[:pairs] == number[lookahead:]
            mask = within if mask is None else within * mask
        q, v, g, last = project(hidden_states, dict(enumerate(documents)), real)
        result = fast_weight_memory(q, v, keys, values, gates=g if write_gate else None, mask=mask, **options)
        gate_mean = None if g is None else g[real].sum() / max(1, int(real.sum()))
        tail = torch.stack(last) if last else before
        return LayerOutput(mix(result.output, v, g), result.keys, result.values, tail, gate_mean, *result[3:])

    if memory is None:
        keys, values = (x.expand(len(documents), *x.shape) for x in (keys, values))
    final_keys, final_values, tail = keys.clone(), values.clone(), None if query_conv is None else before.clone()
    tokens = hidden_states.flatten(0, 1)  # [B·T, d]
    output, gates = torch.zeros_like(tokens), tokens.new_zeros(len(tokens))
    slots = torch.full((len(tokens), heads * top_k), -1)
    weights = torch.zeros(slots.shape, dtype=torch.promote_types(tokens.dtype, torch.float32))
    for s, document in enumerate(documents):
        kept = document[real.flatten()[document]]
        everything = torch.arange(len(kept))
        q, v, g, last = project(tokens[kept].unsqueeze(0), {s: everything}, torch.ones(1, len(kept), dtype=torch.bool))
        result = fast_weight_memory(q, v, keys[s], values[s], gates=g if write_gate else None, **options)
        output[kept] = mix(result.output, v, g)[0]
        final_keys[s], final_values[s] = result.keys, result.values
        slots[kept], weights[kept] = result.slots[0], result.weights[0]
        if g is not None:
            gates[kept] = g[0]
        if query_conv is not None:
            tail[s] = last[0]
    gate_mean = gates.sum() / max(1, int(real.sum())) if gate or write_gate else None
    output, slots, weights = (x.unflatten(0, (batch, length)) for x in (output, slots, weights))
    return LayerOutput(output, final_keys, final_values, tail, gate_mean, slots, weights)


def product_key_layer(
    hidden_states: Tensor,
    parameters: Mapping[str, Tensor],
    *,
    num_keys: int,
    heads: int = 4,
    top_k: int = 32,
    query_norm: str | None = "rms",
    score: str = "dot",
    eps: float = 1e-3,
    weighting: str = "softmax",
    temperature: float = 1.0,
    output: str = "swilu",
    norm_eps: float = 1e-5,
) -> Tensor:
    """The layer with a static memory: every token reads, nothing is written.

    With x the hidden states, q = query_norm(q_proj(x)) for each head, and r = Σ over heads and picks of weight · value,
    where the weights of a head are softmax, silu or relu of scores / temperature over its K picks:

    "swilu": value_proj(r · silu(gate_proj(x)))
    "gated": sigmoid(gate_proj(x)) · value_proj(r)
    "linear": value_proj(r)
    "none": r

    Args:
        hidden_states: [..., d].
        parameters: by their names in the layer's state_dict; a bias may be missing.
        query_norm: "rms" (query_norm.weight [Dk]), "layer" (query_norm.weight and .bias [Dk]) or None.

    Returns:
        [..., d]; with ``output="none"`` [..., D].
    """
    queries = _linear("q_proj", hidden_states, parameters).unflatten(-1, (heads, -1))  # [..., H, Dk]
    if query_norm == "rms":
        queries = _rms_norm(queries, parameters["query_norm.weight"], norm_eps)
    elif query_norm == "layer":
        weight, bias = parameters["query_norm.weight"], parameters["query_norm.bias"]
        queries = F.layer_norm(queries, weight.shape, weight, bias, norm_eps)
    keys = parameters["keys"].reshape(heads, 2, num_keys, -1)
    scores, slots = product_key_lookup(queries, keys, top_k, score=score, eps=eps)
    weights = weigh(scores, weighting, temperature)  # each head for itself
    read = sparse_value_gather(parameters["table.weight"], slots.flatten(-2), weights.flatten(-2))
    read = read.to(hidden_states.dtype)
    if output == "none":
        return read
    if output == "linear":
        return _linear("value_proj", read, parameters)
    gate = _linear("gate_proj", hidden_states, parameters)
    if output == "gated":
        return torch.sigmoid(gate) * _linear("value_proj", read, parameters)
    return _linear("value_proj", read * F.silu(gate), parameters)


def _linear(name: str, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    return F.linear(x, parameters[f"{name}.weight"], parameters.get(f"{name}.bias"))


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean x² + eps) · weight over the last dimension, in the dtype of x, which only the result is rounded to."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)).to(x.dtype)


def _normalize(x: Tensor, norm: str | None) -> Tensor:
    """ "zscore": (x − mean) / (std + 1e-6) with the unbiased std; "l2": x / max(|x|, 1e-12); None: x."""
    if norm is None:
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if norm == "zscore":
        centred = wide - wide.mean(-1, keepdim=True)
        std = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / (x.shape[-1] - 1) ** 0.5
        wide = centred / (std + 1e-6)
    else:
        wide = F.normalize(wide, dim=-1)
    return wide.to(x.dtype)


def _convolve(window: Tensor, weight: Tensor) -> Tensor:
    """z_t = Σᵢ weight[:, 0, i] · window[t + i], for the window [w - 1 + t, d] and weight [d, 1, w]: z is [t, d]."""
    width = weight.shape[-1]
    length = len(window) - width + 1
    return sum(weight[:, 0, i] * window[i : i + length] for i in range(width))
