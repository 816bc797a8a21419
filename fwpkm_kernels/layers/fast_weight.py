"""The fast-weight memory as a layer: projections and norms around `fast_weight_memory`."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks as checks
from .._autograd import in_backward
from ..columns import cut_columns, group_name, join_columns
from ..documents import Documents, make_documents, mean_gate
from ..memory import run_memory
from ..options import Options, why_no_rows
from ..pool import MemoryPool
from ..records import Inputs, Rows
from ..state import MemoryState
from .arguments import check_options, one_of
from .continuation import DROPS, LayerMemory, find_memory
from .convolution import convolve
from .memories import make_memories
from .norm import NORMS, RMSNorm, normalize
from .packed import memory_of_documents
from .streamed import StreamedMemory
from .table import ValueTable, apply_but_round_no_buffer, check_memory_dtype, check_table, check_table_kind, keep

SCOPES = ("sequence", "batch")
INITIAL_MEMORIES = ("learned", "frozen", "persistent")
OUTPUT_INITS = ("default", "zeros")


class FastWeightProductKeyMemory(nn.Module):
    """A token mixer: each token reads a fast-weight product key memory, which each chunk of tokens rewrites.

    ::

        q = q_proj(conv(q_norm(x)))    v = value_norm(v_proj(v_norm(x)))    g = sigmoid(g_proj(g_norm(x)))
        p = fast_weight_memory(q, targets=v, gates=g)                      what is read, [B, T, D]
        y = g·p + (1 - g)·v                                                p + v with gate=False
        output = o_proj(o_norm(y))                                         the caller adds the residual

    Source: FwPKM, arXiv 2601.00671, section 3; without `query_conv`, which is not in the paper.

    **Scope.** "sequence": each row of the batch, or each document of a packed row, has a memory of its own, which
    begins as the initial one. Padding is removed before the memory sees it, so a document's output depends neither on
    other documents nor on padding. "batch": all rows read and write one memory, as the authors train. `attention_mask`
    is then the mask of `fast_weight_memory`, and in a packed row no pair of tokens is written across a border.

    **Initial memory.** "learned": `keys` and `table.weight` are Parameters; every call begins with them, gradients
    through all writes reach them, and nothing outlives a call. "frozen": the same from fixed buffers. "persistent",
    which needs scope="batch": buffers too, which no call writes and `advance_memory` sets to the memory that the last
    training call left behind. Several calls between two advances all begin with the same memory; the last one counts.

    **Streaming or segments.** `memory=layer.new_memory(batch)`, or a `cache` of transformers or fla, is read and
    written in place, without autograd; a prompt may be cut anywhere, down to single tokens. That needs
    boundary="carry". Where gradients are asked for, as in training with use_cache=True, or where the memory cannot
    stream, a call leaves a cache that has read nothing yet alone, and later calls with that cache raise. A
    `LayerMemory`, which return_memory=True returns, is differentiable; as `memory=` it starts the next segment.

    **dtype.** Projections and norms are of `dtype`; `keys` and `table` are created in `memory_dtype`.
    `module.to(dtype)` may cast Parameters, but it never rounds buffers, and the fast memory runs in `memory_dtype` or
    wider all the same. A float64 layer has a float64 memory. The output is in the dtype of the input.

    **torch.compile.** Training compiles with fullgraph=True, padded documents and segments too; only key_gradient="all"
    breaks the graph. Values of `cu_seqlens` are validated in eager code, and in compiled code under scope="sequence".

    **More ranks.** Under scope="sequence" results do not depend on how a batch is split over ranks; under "batch" the
    memory is of the rank's batch, so they do. `fwpkm_kernels.distributed` spreads the table's columns over ranks.

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
        query_conv: w, the width of a causal depthwise convolution on the normed hidden states before q_proj; None
            leaves it out. It sees neither padding nor tokens of another document.
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
                '`initial_memory`="persistent" needs `scope`="batch", whose one memory can go on after a call, '
                'got "sequence"'
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
        self.options = check_options(options, heads, num_keys, key_dim, memory_dtype)
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
            check_table(table, num_keys, value_dim)
            check_table_kind(table, initial_memory, memory_dtype)
        self.table = table
        #: The memory that `advance_memory` will commit, and the `contents` of the table that it was made from.
        self._pending: tuple[Tensor, Tensor | Rows, object] | None = None
        self.reset_parameters(table=False)

    @classmethod
    def as_published(cls, hidden_size: int, **options: Any) -> "FastWeightProductKeyMemory":
        """The layer as its authors train it: one memory for the batch, chunks that drop what passes their end, and a
        memory that persists. `options` are those of the constructor."""
        published = {"scope": "batch", "boundary": "drop", "initial_memory": "persistent"}
        return cls(hidden_size, **(published | options))

    def reset_parameters(self, *, table: bool = True) -> None:
        """Draw all Parameters and buffers anew, also after `to_empty`, which leaves them without values.

        Args:
            table: whether the table, which other layers may share, is drawn anew too.
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

    def _apply(self, fn: Any, recurse: bool = True) -> "FastWeightProductKeyMemory":
        return apply_but_round_no_buffer(self, super()._apply, fn, recurse)

    @torch.inference_mode(False)
    def resized(self, num_keys: int) -> "FastWeightProductKeyMemory":
        """An independent copy with a fresh memory of another number of sub-keys, to train small and test large.

        The new table is whole, also where `shard_table_` has spread the old one: it can spread the copy's.

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
        like: dict[str, Any] = {"device": old.weight.device, "dtype": old.weight.dtype}
        table = ValueTable(num_keys**2, self.value_dim, init=old.init, trainable=False, **like)
        other = copy.deepcopy(self, {id(old): table, id(self._pending): None, id(self.keys): None})
        bound = self.key_dim**-0.5
        other.keys = self.keys.new_empty(self.heads, 2, num_keys, self.key_dim // 2).uniform_(-bound, bound)
        other.num_keys = num_keys
        return other

    def extra_repr(self) -> str:
        """Sizes, and the options that are not at their defaults."""
        sizes = f"heads={self.heads}, num_keys={self.num_keys}, scope={self.scope!r}, memory={self.initial_memory!r}"
        defaults = Options()._asdict()
        return ", ".join([sizes, *(f"{k}={v!r}" for k, v in self.options._asdict().items() if v != defaults[k])])

    @torch.no_grad()
    def new_memory(
        self, batch: int = 1, *, capacity: int | str | None = None, pool: MemoryPool | None = None
    ) -> StreamedMemory:
        """A memory to stream with: pass it as `memory=` to calls whose batches have `batch` rows or documents.

        Under scope="sequence" each of them is a session of one `MemoryPool`, which reads the layer's table where it
        lies: nobody may write table or keys while the memory is in use, and a step that sees that somebody has raises.
        With `weight_decay` each has a table of its own. Under scope="batch" all write one table.

        Args:
            capacity: of the pool, as `MemoryPool` takes it. A call that finds it full raises `PoolFullError`, and no
                sequence has read anything then. For that a call of several chunks, if there is no room for all that it
                could write, keeps the rows of before until it ends, and may be refused where it would just have fitted.
                None: it grows.
            pool: the caller's, over this layer's `keys` and `table.weight`. `close` frees what the sequences hold for
                other memories; where a memory is gone without it, the next call that uses the pool does.

        Raises:
            TypeError, ValueError: for bad arguments, or those of a pool where there is none, and where the layer has
                boundary="drop", which cannot stream.
        """
        checks.check_int("batch", batch, minimum=0)
        if self.options.boundary != "carry":
            raise ValueError(DROPS)
        memories = make_memories(self, batch, capacity, pool)
        return StreamedMemory(memories, batch, self.scope, self.options, self._conv_width)

    @property
    def _conv_width(self) -> int:
        """w; 1 without a convolution."""
        return 1 if self.q_conv is None else self.q_conv.kernel_size[0]

    def _in_memory_dtype(self, *tensors: Tensor) -> list[Tensor]:
        """Keys and values in the dtype that the memory runs in; no copies of those that have it."""
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
            attention_mask: [B, T], bool, integer or real: tokens have values > 0, padding all others. A mask on a GPU
                is copied to the host under scope="sequence", which waits once a call (with a `query_conv` that streams,
                twice). Under scope="batch" the mask multiplies what is written, as in `fast_weight_memory`, and a NaN
                at padding spreads.
            cache, past_key_values: a `Cache` of transformers or fla, to stream with; two names of one argument.
            use_cache: accepted, as other mixers do, and ignored: a cache that is given is used.
            cu_seqlens: [S + 1], int32 or int64, non-decreasing from 0 to T: the borders of documents that are packed
                into one row; then B = 1. `cu_seq_lens_q` is another name of it.
            cu_seqlens_cpu: the same on the CPU, which saves a copy that the host waits for.
            memory: the memory to start from: a `StreamedMemory`, written in place, or a `LayerMemory`, differentiable:
                its segment goes on. A layer with scope="batch" and no `query_conv` takes a `MemoryState` too.
            return_memory: whether to return a `LayerMemory` too; under scope="sequence" with the rows of each document.
            return_gate_mean: whether to return the mean gate of all tokens too, 0-d and differentiable.
            kwargs: what models pass to all their layers; everything but `cu_seq_lens_q` is ignored.

        Returns:
            output [B, T, d], 0 at padding under scope="sequence"; a pair of it and what else was asked for.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came. No memory has been written
                then, nor after a PoolFullError, or where a projection refuses the dtype of `hidden_states`.
        """
        x = hidden_states
        checks.check_tensor("hidden_states", x, 3, "[B, T, d]")
        checks.check_float("hidden_states", x)
        if x.shape[2] != self.hidden_size:
            raise ValueError(f"`hidden_states` must have width d = {self.hidden_size}, got shape {checks.shape(x)}")
        if return_memory and return_gate_mean:
            raise ValueError("`return_gate_mean` must be False with `return_memory`: the LayerMemory holds it")
        cu_seqlens = one_of("cu_seqlens", cu_seqlens, "cu_seq_lens_q", kwargs.get("cu_seq_lens_q"))
        cache = one_of("cache", cache, "past_key_values", past_key_values)
        documents = make_documents(x, attention_mask, cu_seqlens, cu_seqlens_cpu, are_cut=self.scope == "sequence")
        memory = find_memory(self, memory, cache, documents, x)
        if return_memory and isinstance(memory, StreamedMemory):
            raise ValueError("`return_memory` must be False where a memory streams: it is written in place")
        if self.scope == "sequence" and attention_mask is not None:
            x = torch.where((attention_mask > 0).unsqueeze(-1), x, 0.0)  # a NaN at padding reaches no token

        queries, tail = self._queries(x, documents, memory)
        targets = normalize(self.v_proj(x if self.v_norm is None else self.v_norm(x)), self.value_norm)
        gates = None
        if self.g_proj is not None:
            gates = torch.sigmoid(self.g_proj(x if self.g_norm is None else self.g_norm(x))).squeeze(-1)
        write_gates, mesh = gates if self.write_gate else None, self.table.mesh
        result: Any = None
        given = (queries, cut_columns(targets, mesh), write_gates, documents)
        if isinstance(memory, StreamedMemory):
            read = memory.step(*given)
        else:
            result, carry = self._remember(*given, memory, return_memory)
            read = result.output
        read = join_columns(read, mesh)
        if self.gate and gates is not None:
            y = torch.lerp(targets, read, gates.unsqueeze(-1))  # g·p + (1 - g)·v
        else:
            y = read + targets
        output = self.o_proj(self.o_norm(y))
        if self.scope == "sequence" and attention_mask is not None:
            output = torch.where((attention_mask > 0).unsqueeze(-1), output, 0.0)
        output = output.to(hidden_states.dtype)  # autocast may have changed it
        if not return_memory:
            return (output, mean_gate(gates, attention_mask)) if return_gate_mean else output
        mean = mean_gate(gates, attention_mask)
        values = result.rows if self.scope == "sequence" else result.values
        return output, LayerMemory(result.keys, values, tail, mean, result.slots, result.weights, carry)

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
                if self.scope == "batch" and documents.mask is not None:  # padding keeps its place, as zeros
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
        """Run the memory, differentiably: a MemoryOutput or a VarlenOutput, and the carry for a next segment."""
        before: Any = None if memory is None else memory.carry  # of the kind that this scope has
        leaves_carry = return_memory and self.options.boundary == "carry"
        group = group_name(self.table.mesh)

        def run(weight: Tensor) -> Any:
            if self.scope == "sequence":
                how: dict[str, Any] = {"gates": gates, "carry": before, "return_memory": return_memory, "group": group}
                keys, values = self._in_memory_dtype(self.keys if memory is None else memory.keys, weight)
                if memory is not None:
                    how["rows"] = memory.values._replace(value=memory.values.value.to(values.dtype))
                return memory_of_documents(queries, targets, keys, values, documents, options=self.options, **how)
            keys, values = self._in_memory_dtype(*((self.keys, weight) if memory is None else memory[:2]))
            mask = documents.pair_mask(self.options.lookahead, queries.device)
            # Of a table that is not returned the rows that are read will do, unless decay or segments before move more.
            moved_before = memory is not None and self.initial_memory == "persistent"
            needs_table = return_memory or moved_before or why_no_rows(self.options)
            inputs, final = Inputs(queries, targets, keys, values, gates, mask), "table" if needs_table else "rows"
            of_call = (before, leaves_carry, final, False, self.options)
            return run_memory(inputs, *of_call, group=group, carry_name="memory.carry")

        result, carry = self.table(run)
        # An activation checkpoint computes the forward again in backward: what it leaves behind is pending already.
        is_again = not torch.compiler.is_compiling() and in_backward()
        if self.initial_memory == "persistent" and self.training and not is_again:
            self._pending = (result.keys.detach(), result.values.detach(), self.table.contents)
        return result, carry
