"""The fast-weight memory as a layer: projections and norms around `fast_weight_memory`."""

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _checks as checks
from ..documents import Documents, convolve, make_documents, memory_by_document
from ..kernels import compute_dtype
from ..memory import check_memory, fast_weight_memory
from ..options import Options
from ..state import MemoryState
from .norm import NORMS, RMSNorm, normalize
from .streamed import StreamedMemory
from .table import ValueTable, apply_but_round_no_buffer, check_memory_dtype, keep

SCOPES = ("sequence", "batch")
INITIAL_MEMORIES = ("learned", "frozen", "persistent")
OUTPUT_INITS = ("default", "zeros")

# Why a memory cannot stream.
_DROPS = '`boundary` must be "carry" for a memory that streams, got "drop"'
_PACKED = '`cu_seqlens` must be None where a memory with `scope`="batch" streams'
_TRAINED = (
    "`cache` must be read into under torch.no_grad() to be continued, got one whose tokens were read with gradients, "
    "for which the memory is left alone; to train over segments pass `memory`"
)


class LayerMemory(NamedTuple):
    """What a segment leaves behind for the next one, differentiably; S documents, or one memory for the batch."""

    keys: Tensor  #: [H, 2, n, Dk/2] under scope="batch", [S, H, 2, n, Dk/2] under "sequence"
    values: Tensor  #: [N, D] or [S, N, D]
    #: The last w - 1 normed ones, which `query_conv` reads on from: [S, w - 1, d]. None is zeros.
    hidden_states: Tensor | None = None
    gate_mean: Tensor | None = None  #: 0-d: the mean gate of the tokens of the segment; differentiable
    #: What the segment read, int64 [B, T, J], for `memory_stats` of one memory at a time; and weights [B, T, J].
    #: Neither is differentiable. Where scope="sequence" has removed padding, slots are -1 and weights 0.
    slots: Tensor | None = None
    weights: Tensor | None = None

    def detach(self) -> "LayerMemory":
        """The same without its graph: gradients of the next segment end here."""
        return LayerMemory(*(None if x is None else x.detach() for x in self))  # type: ignore[arg-type]


class FastWeightProductKeyMemory(nn.Module):
    """A token mixer: each token reads a fast-weight product key memory, which each chunk of tokens rewrites.

    ::

        q = q_proj(conv(q_norm(x)))    v = value_norm(v_proj(v_norm(x)))    g = sigmoid(g_proj(g_norm(x)))
        p = fast_weight_memory(q, targets=v, gates=g)                      what is read, [B, T, D]
        y = g·p + (1 - g)·v                                                p + v with gate=False
        output = o_proj(o_norm(y))                                         the caller adds the residual

    Source: FwPKM, arXiv 2601.00671, section 3; without `query_conv`, which is not in the paper.

    **Scope.** "sequence": each row of the batch, or each document of a packed row, has a memory of its own, which
    begins as the initial one; padding is removed before the memory sees it; so what comes out for a document depends on
    no other, nor on padding. For now this is a loop over documents, each with a private table. "batch": all rows read
    and write one memory, as the authors train; `attention_mask` then is the mask of `fast_weight_memory`, and in a
    packed row no pair of tokens is written across a border.

    **Initial memory.** "learned": `keys` and `table.weight` are Parameters; every call begins with them, gradients
    through all writes reach them, and nothing outlives a call. "frozen": the same from fixed buffers. "persistent",
    which needs scope="batch": from buffers that `advance_memory` sets to what the last training call left behind; so
    several calls between two advances all begin alike, and the last of them counts. No call writes them.

    **Streaming or segments.** `memory=layer.new_memory(batch)`, or a `cache` of transformers or fla, is read and
    written in place, without autograd; a prompt may be cut anywhere, down to single tokens. It needs boundary="carry".
    A cache that has read nothing yet is left alone where gradients are asked for, as in training with use_cache=True,
    or where the memory cannot stream, and then refuses to be continued. `memory=` a `LayerMemory`, which
    return_memory=True gives, is differentiable.

    **dtype.** Projections and norms are of `dtype`; `keys` and `table` are created in `memory_dtype`. The fast memory
    runs in `memory_dtype`, or wider, whatever `module.to(dtype)` makes of the Parameters; buffers are never rounded by
    it. A float64 layer has a float64 memory. The output is in the dtype of the input.

    **torch.compile.** Training compiles with fullgraph=True; of more than one document the backward then computes each
    again. key_gradient="all" breaks the graph. Values of `cu_seqlens` are validated in eager code, and in compiled code
    under scope="sequence".

    **Data parallelism.** Under scope="sequence" results do not depend on how a batch is split over ranks; under "batch"
    the memory is of the rank's batch, so they do.

    Args:
        hidden_size: d.
        num_keys: n, sub-keys per half; the table has N = n² rows.
        heads: H.
        top_k: K, picks per head; J = H·K.
        key_dim: Dk, width of a head's query, even.
        value_dim: D, width of a table's row; at least 2 for the norm "zscore".
        chunk_size, lookahead, score, eps, weighting, temperature, lr, weight_decay, clip, addressing_weight,
        key_gradient, step, boundary, precision, backend: of `fast_weight_memory`; `layer.options` holds them.
        scope: "sequence" or "batch".
        initial_memory: "learned", "frozen" or "persistent".
        memory_dtype: of keys, table and the memory's arithmetic.
        query_conv: w, the width of a causal depthwise convolution on the normed hidden states before q_proj; None has
            none. It never reaches over the beginning of a document, nor sees padding.
        input_norm: whether there are q_norm, v_norm and g_norm; False in a block that norms already.
        query_norm, value_norm: None, "l2" or "zscore" ((x - mean) / (std + 1e-6), std unbiased), of each head's query,
            of the values.
        gate: whether g mixes what is read with v.
        write_gate: whether g scales what a token writes.
        bias: of the projections.
        norm_eps: of the RMS norms.
        output_init: "default", or "zeros": o_proj begins as 0, so that an inserted layer does nothing at first.
        table: a `ValueTable` to use, perhaps shared with other layers; None makes one.
        layer_idx: kept for the caller, as transformers and fla number their layers.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    keys: Tensor

    def __init__(
        self,
        hidden_size: int,
        *,
        num_keys: int = 512,
        heads: int = 1,
        top_k: int = 8,
        key_dim: int = 512,
        value_dim: int = 512,
        chunk_size: int = 512,
        lookahead: int = 1,
        score: str = "idw",
        eps: float = 1e-3,
        weighting: str = "softmax",
        temperature: float = 1.0,
        lr: float = 1.0,
        weight_decay: float = 0.0,
        clip: float | None = None,
        addressing_weight: float = 1.0,
        key_gradient: str = "addressing",
        step: str = "paper",
        boundary: str = "carry",
        precision: str = "tf32x3",
        backend: str = "auto",
        scope: str = "sequence",
        initial_memory: str = "learned",
        memory_dtype: torch.dtype = torch.float32,
        query_conv: int | None = None,
        input_norm: bool = True,
        query_norm: str | None = None,
        value_norm: str | None = "zscore",
        gate: bool = True,
        write_gate: bool = True,
        bias: bool = True,
        norm_eps: float = 1e-5,
        output_init: str = "default",
        table: ValueTable | None = None,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"hidden_size": hidden_size, "num_keys": num_keys, "heads": heads, "value_dim": value_dim}
        for name, x in (sizes | {"key_dim": key_dim}).items():
            checks.check_int(name, x, minimum=1)
        if key_dim % 2:
            raise ValueError(f"`key_dim` must be even, one half of a query for each set of sub-keys, got {key_dim}")
        for name, kind in (("query_norm", query_norm), ("value_norm", value_norm)):
            if kind is not None:
                checks.check_choice(name, kind, NORMS)
        if value_norm == "zscore" and value_dim < 2:
            raise ValueError('`value_norm`="zscore" needs a `value_dim` of at least 2, got 1')
        for name, flag in {"input_norm": input_norm, "gate": gate, "write_gate": write_gate, "bias": bias}.items():
            checks.check_flag(name, flag)
        checks.check_choice("scope", scope, SCOPES)
        checks.check_choice("initial_memory", initial_memory, INITIAL_MEMORIES)
        checks.check_choice("output_init", output_init, OUTPUT_INITS)
        if initial_memory == "persistent" and scope == "sequence":
            raise ValueError(
                '`initial_memory`="persistent" needs `scope`="batch": of a memory for each sequence, '
                'none could be the one that goes on; got "sequence"'
            )
        if query_conv is not None:
            checks.check_int("query_conv", query_conv, minimum=1)
        norm_eps = checks.check_number("norm_eps", norm_eps, torch.float32, minimum=torch.finfo(torch.float32).tiny)
        check_memory_dtype("memory_dtype", memory_dtype)
        if (torch.get_default_dtype() if dtype is None else dtype) == torch.float64:
            memory_dtype = torch.float64
        elif memory_dtype == torch.float64:
            raise ValueError(f"`memory_dtype` can be torch.float64 only where `dtype` is, got {dtype}")
        options = Options(
            chunk_size, top_k, lookahead, score, eps, weighting, temperature, lr, weight_decay, clip,
            addressing_weight, key_gradient, step, boundary, precision, backend,
        )  # fmt: skip
        self.options = _check_options(options, heads, num_keys, key_dim, memory_dtype)
        self.hidden_size, self.num_keys, self.heads = hidden_size, num_keys, heads
        self.key_dim, self.value_dim = key_dim, value_dim
        self.scope, self.initial_memory, self.memory_dtype = scope, initial_memory, memory_dtype
        self.query_norm, self.value_norm = query_norm, value_norm
        self.gate, self.write_gate, self.output_init, self.layer_idx = gate, write_gate, output_init, layer_idx

        of_module: dict[str, Any] = {"device": device, "dtype": dtype}
        has_gate = gate or write_gate

        def norm(width: int) -> RMSNorm:
            return RMSNorm(width, norm_eps, **of_module)

        self.q_norm = norm(hidden_size) if input_norm else None
        self.v_norm = norm(hidden_size) if input_norm else None
        self.g_norm = norm(hidden_size) if input_norm and has_gate else None
        self.o_norm = norm(value_dim)
        self.q_conv = None
        if query_conv is not None:
            self.q_conv = nn.Conv1d(hidden_size, hidden_size, query_conv, groups=hidden_size, bias=False, **of_module)
        self.q_proj = nn.Linear(hidden_size, heads * key_dim, bias, **of_module)
        self.v_proj = nn.Linear(hidden_size, value_dim, bias, **of_module)
        self.g_proj = nn.Linear(hidden_size, 1, bias, **of_module) if has_gate else None
        self.o_proj = nn.Linear(value_dim, hidden_size, bias, **of_module)
        is_learned = initial_memory == "learned"
        keep(self, "keys", torch.empty(heads, 2, num_keys, key_dim // 2, device=device, dtype=memory_dtype), is_learned)
        if table is None:
            table = ValueTable(num_keys**2, value_dim, trainable=is_learned, device=device, dtype=memory_dtype)
        else:
            _check_table(table, num_keys, value_dim, initial_memory, memory_dtype)
        self.table = table
        self._pending: tuple[Tensor, Tensor] | None = None  #: the memory that `advance_memory` will commit
        self.reset_parameters(table=False)

    @classmethod
    def as_published(cls, hidden_size: int, **options: Any) -> "FastWeightProductKeyMemory":
        """The layer as its authors train it: one memory for the batch, chunks that drop what passes their end, and a
        memory that persists. `options` are those of the constructor."""
        published = {"scope": "batch", "boundary": "drop", "initial_memory": "persistent"}
        return cls(hidden_size, **(published | options))

    def reset_parameters(self, *, table: bool = True) -> None:
        """Draw all Parameters and buffers anew; also what `to_empty` has left without a value.

        Args:
            table: whether the table is drawn anew too, which may be shared.
        """
        for module in self.children():
            if isinstance(module, RMSNorm | nn.Linear):
                module.reset_parameters()
        if self.g_proj is not None and self.g_proj.bias is not None:
            nn.init.zeros_(self.g_proj.bias)
        if self.q_conv is not None:
            nn.init.normal_(self.q_conv.weight, std=self.q_conv.kernel_size[0] ** -0.5)
        if self.output_init == "zeros":
            for x in self.o_proj.parameters():
                nn.init.zeros_(x)
        bound = self.key_dim**-0.5
        nn.init.uniform_(self.keys, -bound, bound)
        self._pending = None
        if table:
            self.table.reset_parameters()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._pending = None  # of the memory before
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> "FastWeightProductKeyMemory":
        return apply_but_round_no_buffer(self, super()._apply, fn, recurse)

    @torch.inference_mode(False)
    def resized(self, num_keys: int) -> "FastWeightProductKeyMemory":
        """An independent copy over a fresh memory with another number of sub-keys: train small, test large.

        Raises:
            TypeError, ValueError: for a bad `num_keys`; ValueError too for initial_memory="learned", whose keys and
                values are Parameters that belong to their size.
        """
        checks.check_int("num_keys", num_keys, minimum=self.options.top_k)
        if self.initial_memory == "learned":
            raise ValueError(
                '`initial_memory`="learned" trains keys and values of one size; only "frozen" and "persistent" can '
                f"have another `num_keys`, got {num_keys}"
            )
        old = self.table
        table = ValueTable(
            num_keys**2,
            self.value_dim,
            init=old.init,
            trainable=False,
            device=old.weight.device,
            dtype=old.weight.dtype,
        )
        other = copy.deepcopy(self, {id(old): table, id(self._pending): None, id(self.keys): None})
        bound = self.key_dim**-0.5
        other.keys = self.keys.new_empty(self.heads, 2, num_keys, self.key_dim // 2).uniform_(-bound, bound)
        other.num_keys = num_keys
        return other

    def extra_repr(self) -> str:
        """Sizes, and what is not at its default of the options."""
        sizes = f"heads={self.heads}, num_keys={self.num_keys}, scope={self.scope!r}, memory={self.initial_memory!r}"
        defaults = Options()._asdict()
        return ", ".join([sizes, *(f"{k}={v!r}" for k, v in self.options._asdict().items() if v != defaults[k])])

    @torch.no_grad()
    def new_memory(self, batch: int = 1) -> StreamedMemory:
        """A memory to stream with: as `memory=` of calls whose batches have `batch` rows, or documents.

        Under scope="sequence" each has a memory of its own; under "batch" all write one.

        Raises:
            TypeError, ValueError: for a bad `batch`, and where the layer has boundary="drop", which cannot stream.
        """
        checks.check_int("batch", batch, minimum=0)
        if self.options.boundary != "carry":
            raise ValueError(_DROPS)
        keys, values = self._in_memory_dtype(self.keys, self.table.weight)
        return StreamedMemory(keys, values, batch, self.scope, self.options, self._conv_width)

    @property
    def _conv_width(self) -> int:
        """w; 1 without a convolution."""
        return 1 if self.q_conv is None else self.q_conv.kernel_size[0]

    def _in_memory_dtype(self, *tensors: Tensor) -> list[Tensor]:
        """Keys and values in the dtype that the memory runs in; themselves, where they have it."""
        return [x.to(torch.promote_types(x.dtype, self.memory_dtype)) for x in tensors]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        use_cache: bool = False,
        *,
        past_key_values: Any = None,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_cpu: Tensor | None = None,
        memory: "LayerMemory | StreamedMemory | MemoryState | None" = None,
        return_memory: bool = False,
        return_gate_mean: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Read and rewrite the memory along a batch of sequences.

        Args:
            hidden_states: [B, T, d].
            attention_mask: [B, T], bool, integer or real; what is > 0 is a token, the rest padding. Where it lies on a
                GPU, scope="sequence" waits for a copy of it, once a call (with a `query_conv` that streams, twice).
                Under scope="batch" it multiplies what is written, as in `fast_weight_memory`, and NaN at padding
                spreads.
            cache, past_key_values: a `Cache` of transformers or fla, to stream with; two names of one argument.
            use_cache: taken, and without effect, as other mixers take it: a cache that is given is used.
            cu_seqlens: [S + 1], int32 or int64, non-decreasing from 0 to T: the borders of documents that are packed
                into one row; then B = 1. `cu_seq_lens_q` is another name of it.
            cu_seqlens_cpu: the same on the CPU, which saves a copy that the host waits for.
            memory: what to go on from: a `StreamedMemory` in place, or a `LayerMemory`, differentiably, with an empty
                queue. Under scope="batch" a `MemoryState` too, if there is no `query_conv`.
            return_memory: whether to return a `LayerMemory` too. Under scope="sequence" that is a table for each
                document.
            return_gate_mean: whether to return the mean gate of all tokens too, 0-d and differentiable.
            kwargs: what models hand on to all their layers; but for `cu_seq_lens_q` it is ignored.

        Returns:
            output [B, T, d], 0 at padding under scope="sequence"; with a `LayerMemory`, or the mean gate, behind it.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came. Nothing has been written then,
                nor where a projection refuses the dtype of `hidden_states`.
        """
        x = hidden_states
        checks.check_tensor("hidden_states", x, 3, "[B, T, d]")
        checks.check_float("hidden_states", x)
        if x.shape[2] != self.hidden_size:
            raise ValueError(f"`hidden_states` must have width d = {self.hidden_size}, got shape {checks.shape(x)}")
        if return_memory and return_gate_mean:
            raise ValueError("`return_gate_mean` must be False with `return_memory`: the LayerMemory holds it")
        cu_seqlens = _one_of("cu_seqlens", cu_seqlens, "cu_seq_lens_q", kwargs.get("cu_seq_lens_q"))
        cache = _one_of("cache", cache, "past_key_values", past_key_values)
        documents = make_documents(x, attention_mask, cu_seqlens, cu_seqlens_cpu, are_cut=self.scope == "sequence")
        memory = self._find_memory(memory, cache, documents, x)
        if return_memory and isinstance(memory, StreamedMemory):
            raise ValueError("`return_memory` must be False where a memory streams: it is written in place")
        if self.scope == "sequence" and attention_mask is not None:
            x = torch.where((attention_mask > 0).unsqueeze(-1), x, 0.0)  # NaN there reaches nothing

        queries, tail = self._queries(x, documents, memory)
        targets = normalize(self.v_proj(x if self.v_norm is None else self.v_norm(x)), self.value_norm)
        gates = None
        if self.g_proj is not None:
            gates = torch.sigmoid(self.g_proj(x if self.g_norm is None else self.g_norm(x))).squeeze(-1)
        write_gates = gates if self.write_gate else None
        result: Any = None
        if isinstance(memory, StreamedMemory):
            read = memory.step(queries, targets, write_gates, documents)
        else:
            result = self._remember(queries, targets, write_gates, documents, memory, return_memory)
            read = result.output
        if self.gate and gates is not None:
            y = torch.lerp(targets, read, gates.unsqueeze(-1))  # g·p + (1 - g)·v
        else:
            y = read + targets
        output = self.o_proj(self.o_norm(y))
        if self.scope == "sequence" and attention_mask is not None:
            output = torch.where((attention_mask > 0).unsqueeze(-1), output, 0.0)
        output = output.to(hidden_states.dtype)  # which autocast may have changed
        if not return_memory:
            return (output, _mean(gates, attention_mask)) if return_gate_mean else output
        left = LayerMemory(result.keys, result.values, tail, _mean(gates, attention_mask), result.slots, result.weights)
        return output, left

    def _queries(
        self, x: Tensor, documents: Documents, memory: LayerMemory | StreamedMemory | None
    ) -> tuple[Tensor, Tensor | None]:
        """Queries [B, T, H, Dk], and what the convolution of the next segment begins with."""
        normed, tail = x if self.q_norm is None else self.q_norm(x), None
        if self.q_conv is not None:
            weight = self.q_conv.weight
            if isinstance(memory, StreamedMemory):
                normed = memory.convolve(normed, weight, documents)
            else:
                if self.scope == "batch" and documents.mask is not None:  # padding stands in its place, and is 0
                    normed = torch.where((documents.mask > 0).unsqueeze(-1), normed, 0.0)
                    documents = documents._replace(mask=None)
                normed, tail = convolve(normed, weight, documents, None if memory is None else memory.hidden_states)
        queries = self.q_proj(normed).unflatten(-1, (self.heads, self.key_dim))
        return normalize(queries, self.query_norm), tail

    def _remember(
        self,
        queries: Tensor,
        targets: Tensor,
        gates: Tensor | None,
        documents: Documents,
        memory: LayerMemory | None,
        return_memory: bool,
    ) -> Any:
        """The memory's own part, differentiable: a MemoryOutput, or a DocumentsOutput."""

        def run(weight: Tensor) -> Any:
            initial = (self.keys, weight) if memory is None else (memory.keys, memory.values)
            keys, values = self._in_memory_dtype(*initial)
            if self.scope == "sequence":
                return memory_by_document(
                    queries,
                    targets,
                    keys,
                    values,
                    documents,
                    gates=gates,
                    return_memory=return_memory,
                    options=self.options,
                )
            mask = _mask_borders(documents, self.options.lookahead, queries.device)
            return fast_weight_memory(queries, targets, keys, values, gates=gates, mask=mask, **self.options._asdict())

        result = self.table(run)
        if self.initial_memory == "persistent" and self.training and not _in_backward():
            self._pending = (result.keys.detach(), result.values.detach())
        return result

    def _find_memory(
        self, memory: Any, cache: Any, documents: Documents, x: Tensor
    ) -> LayerMemory | StreamedMemory | None:
        """What the call goes on from; None is the initial memory."""
        if memory is not None and cache is not None:
            raise ValueError("`memory` and `cache` must not be given together: each says what to go on from")
        trains = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
        if cache is not None:
            if not hasattr(cache, "layers"):
                raise TypeError(f"`cache` must be a Cache of transformers or fla, got {type(cache).__name__}")
            from ..integrations import cache as integration

            refusal = self._why_not_streamed(trains, documents)
            if refusal is not None and integration.is_fresh(cache, self):
                integration.refuse_continuation(cache, self, refusal)
                return None
            memory, name = integration.memory_of(cache, self, documents.number), "cache"
        elif memory is None:
            return None
        elif isinstance(memory, LayerMemory):
            return self._check_segment(memory, documents)
        else:
            memory, name = self._as_streamed(memory, documents.number), "memory"
        if trains:
            raise ValueError(
                f"`{name}` is written in place, without gradients, but `hidden_states` or a Parameter requires grad: "
                "call under torch.no_grad(), or train over segments with memory=LayerMemory (return_memory=True)"
            )
        if memory.batch != documents.number:
            raise ValueError(
                f"`{name}` is for {memory.batch} sequences, got {documents.number} in `hidden_states` "
                f"[B, T, d], {checks.shape(x)}"
            )
        memory.take_over(self.keys, self.table.weight, self.scope, self.options, self._conv_width)
        if self.scope == "batch" and documents.cu_seqlens is not None:
            raise ValueError(_PACKED)
        return memory

    def _why_not_streamed(self, trains: bool, documents: Documents) -> str | None:
        """Why a call leaves the memory of a cache alone that has read nothing yet; None where it streams."""
        if self.options.boundary != "carry":
            return _DROPS
        if self.scope == "batch" and documents.cu_seqlens is not None:
            return _PACKED
        return _TRAINED if trains else None

    def _as_streamed(self, memory: Any, batch: int) -> StreamedMemory:
        if isinstance(memory, MemoryState) and self.scope == "batch" and self.q_conv is None:
            return StreamedMemory.of_state(memory, batch, self.options)
        if not isinstance(memory, StreamedMemory):
            kind = type(memory).__name__
            raise TypeError(f"`memory` must be a LayerMemory, or what new_memory() gives, got {kind}")
        return memory

    def _check_segment(self, memory: LayerMemory, documents: Documents) -> LayerMemory:
        """A segment's memory has the shapes of this layer's, for as many documents as there are."""
        count = documents.number if self.scope == "sequence" else None
        wanted = {
            "keys": (self.heads, 2, self.num_keys, self.key_dim // 2),
            "values": (self.num_keys**2, self.value_dim),
        }
        for name, size in wanted.items():
            size = size if count is None else (count, *size)
            checks.check_tensor(f"memory.{name}", getattr(memory, name))
            checks.check_float(f"memory.{name}", getattr(memory, name))
            if getattr(memory, name).shape != size:
                raise ValueError(
                    f"`memory.{name}` must be {list(size)} for this layer and input, "
                    f"got {checks.shape(getattr(memory, name))}"
                )
        tail, size = memory.hidden_states, (documents.number, self._conv_width - 1, self.hidden_size)
        if self.q_conv is not None and tail is not None and tail.shape != size:
            raise ValueError(f"`memory.hidden_states` must be {list(size)}, got {checks.shape(tail)}")
        return memory


def advance_memory(model: nn.Module, group: Any = None, reduce: str = "mean") -> None:
    """Set the memory of each layer with initial_memory="persistent" to what its last training call left behind.

    Call it once a step, after backward: an activation checkpoint computes with the old memory until then. Layers that
    have made no training call since the last advance stay as they are; evaluation changes nothing.

    Args:
        model: a module that contains such layers.
        group: of torch.distributed; None is the default group, if there is one.
        reduce: "mean": every rank moves by the mean over ranks of (new - old), so that ranks stay equal; every rank
            must have made a training call. "none": each rank goes its own way, as the authors' do; under
            DistributedDataParallel that needs broadcast_buffers=False, else rank 0's memory replaces the others' before
            every forward.

    Raises:
        ValueError: for another `reduce`, or where layers with something pending share a table.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}")
    checks.check_choice("reduce", reduce, ("mean", "none"))
    layers = [x for x in model.modules() if isinstance(x, FastWeightProductKeyMemory) and x._pending is not None]
    if len({id(layer.table) for layer in layers}) < len(layers):
        raise ValueError("`model` has layers that share a table, and each would advance it: give each its own")
    is_parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
    for layer in layers:
        assert layer._pending is not None
        for memory, new in zip((layer.keys, layer.table.weight), layer._pending, strict=True):
            with torch.no_grad():
                if reduce == "mean" and is_parallel and torch.distributed.get_world_size(group) > 1:
                    moved = new.to(memory.device) - memory
                    torch.distributed.all_reduce(moved, group=group)
                    memory.add_(moved, alpha=1.0 / torch.distributed.get_world_size(group))
                else:
                    memory.copy_(new)
        layer._pending = None


def _in_backward() -> bool:
    """Whether an activation checkpoint computes the forward again: then what it leaves behind is pending already."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _mean(gates: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
    """The mean gate of all tokens, without padding; 0-d, in the compute dtype."""
    if gates is None:
        return None
    gates = gates.to(compute_dtype(gates.dtype))
    if attention_mask is None:
        return gates.sum() / max(1, math.prod(gates.shape))  # 0 of no tokens, as a price on gates wants it
    real = attention_mask > 0
    return torch.where(real, gates, 0.0).sum() / real.sum().clamp(min=1)


def _mask_borders(documents: Documents, lookahead: int, device: torch.device) -> Tensor | None:
    """The mask of `fast_weight_memory` for one memory of all documents: it leaves out pairs that cross a border."""
    if documents.cu_seqlens is None or lookahead == 0:
        return documents.mask
    number = documents.numbers(device)
    within = number == torch.cat((number[lookahead:], number.new_full((min(lookahead, len(number)),), -1)))
    within = within.unsqueeze(0)
    return within if documents.mask is None else documents.mask * within


def _check_options(o: Options, heads: int, num_keys: int, key_dim: int, memory_dtype: torch.dtype) -> Options:
    """Validate the memory's options, as it would itself."""
    meta: dict[str, Any] = {"device": "meta", "dtype": memory_dtype}
    queries, targets = torch.empty(1, 0, heads, key_dim, **meta), torch.empty(1, 0, 1, **meta)
    keys, values = torch.empty(heads, 2, num_keys, key_dim // 2, **meta), torch.empty(num_keys**2, 1, **meta)
    return check_memory(queries, targets, keys, values, None, None, o)


def _one_of(name: str, x: Any, other_name: str, other: Any) -> Any:
    """Whichever of two names of one argument was used."""
    if x is not None and other is not None and x is not other:
        raise ValueError(f"`{other_name}` is another name of `{name}`, and must not be given with another value")
    return other if x is None else x


def _check_table(
    table: ValueTable, num_keys: int, value_dim: int, initial_memory: str, memory_dtype: torch.dtype
) -> None:
    if not isinstance(table, ValueTable):
        raise TypeError(f"`table` must be a ValueTable, got {type(table).__name__}")
    if table.weight.shape != (num_keys**2, value_dim):
        raise ValueError(
            f"`table` must have num_keys² = {num_keys**2} slots of width value_dim = {value_dim}, "
            f"got {checks.shape(table.weight)}"
        )
    if (table.weight.dtype == torch.float64) != (memory_dtype == torch.float64):
        raise ValueError(f"`table` and the layer must both be float64 or neither, got {table.weight.dtype}")
    if isinstance(table.weight, nn.Parameter) != (initial_memory == "learned"):
        raise ValueError(
            f'`table` must be trainable for `initial_memory`="learned", and only then; got {initial_memory!r} with '
            f"trainable={isinstance(table.weight, nn.Parameter)}"
        )
