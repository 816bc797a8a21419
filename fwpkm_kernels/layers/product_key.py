"""The static product key memory as a module."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks as checks
from ..columns import join_columns, same_on_all
from ..gather import sparse_value_gather
from ..kernels import compute_dtype
from ..lookup import check_lookup, product_key_lookup
from ..options import WEIGHTINGS, Lookup
from ..weights import weigh
from .norm import RMSNorm
from .table import ValueTable, check_table, keep

QUERY_NORMS = ("rms", "layer")
OUTPUTS = ("swilu", "gated", "linear", "none")


class ProductKeyMemory(nn.Module):
    """A large table that each token reads at a few slots, found by product keys, in place of a feed-forward layer.

    Each head makes a query of the token, finds its K best of n² slots, and weighs them by their scores; the rows of all
    heads add up to the token's read. Tokens do not see each other, and only an optimizer changes the table. Source:
    product keys, arXiv 1907.05242; `output="swilu"`, arXiv 2412.09764.

        q = query_norm(q_proj(x))                                 [..., H, Dk]
        scores, slots = product_key_lookup(q, keys, K)            [..., H, K]
        weights = weighting(scores / temperature)                 over the K picks of each head
        read = Σ weights · table[slots]                           [..., D], over all H·K picks

    Args:
        hidden_size: d, the width of input and output.
        num_keys: n, sub-keys in each half; the table has n² slots.
        heads: H.
        top_k: K, picks of each head, at most n.
        key_dim: Dk, even: the width of a query, of which each half has Dk/2.
        value_dim: D, the width of the table.
        query_norm: of each head's query, with a weight [Dk] that the heads share: "rms", "layer" (a bias too) or None.
            It is computed in float32.
        score, eps: of a sub-key, as in `product_key_lookup`: "dot" or "idw".
        weighting: "softmax", "silu" or "relu" of scores / temperature.
        temperature: > 0, in the units of the scores.
        output: "swilu": value_proj(read · silu(gate_proj(x))); "gated": sigmoid(gate_proj(x)) · value_proj(read);
            "linear": value_proj(read); "none": the read itself, for which D must be d.
        dropout: the probability with which training zeroes each element of the read.
        sparse_grad: give the table's gradient as a sparse COO tensor, with the limits that `sparse_value_gather` names:
            AdamW takes none, SparseAdam and SGD do; not under torch.compile.
        bias: of the projections.
        norm_eps: added to the mean square (variance) of a query under its norm.
        table: a `ValueTable` of n² slots and width D to read, which layers may share; None makes one.
        precision, backend: as in `product_key_lookup`.
        layer_idx: the layer's number in a model; kept for the caller.
        device, dtype: of projections and norm. `keys` and `table` are float32 (float64 for float64), and become half
            precision only with the whole module, as by `.to(torch.bfloat16)`.

    Parameters: `q_proj`, `query_norm`, `gate_proj` and `value_proj` as the options ask for them; `keys`
    [H, 2, n, Dk/2]; `table.weight` [n², D]. `parameter_groups` sorts them for an optimizer.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    gate_proj: nn.Linear

    def __init__(
        self,
        hidden_size: int,
        *,
        num_keys: int = 512,
        heads: int = 4,
        top_k: int = 32,
        key_dim: int = 512,
        value_dim: int = 512,
        query_norm: str | None = "rms",
        score: str = "dot",
        eps: float = 1e-3,
        weighting: str = "softmax",
        temperature: float = 1.0,
        output: str = "swilu",
        dropout: float = 0.0,
        sparse_grad: bool = False,
        bias: bool = True,
        norm_eps: float = 1e-5,
        table: ValueTable | None = None,
        precision: str = "tf32x3",
        backend: str = "auto",
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = checks.check_int("hidden_size", hidden_size, minimum=1)
        self.num_keys = checks.check_int("num_keys", num_keys, minimum=1)
        self.heads = checks.check_int("heads", heads, minimum=1)
        self.key_dim = checks.check_int("key_dim", key_dim, minimum=2)
        if self.key_dim % 2:
            raise ValueError(f"`key_dim` must be even, two halves of a query, got {key_dim}")
        self.value_dim = checks.check_int("value_dim", value_dim, minimum=1)
        checks.check_choice("output", output, OUTPUTS)
        if output == "none" and value_dim != hidden_size:
            raise ValueError(
                f'`value_dim` must be `hidden_size` with `output`="none", got {value_dim} against {hidden_size}'
            )
        self.output = output
        if query_norm is not None:
            checks.check_choice("query_norm", query_norm, QUERY_NORMS)
        norm_eps = checks.check_number("norm_eps", norm_eps, torch.float32, minimum=0.0)
        dropout = checks.check_number("dropout", dropout, torch.float64, minimum=0.0)
        if dropout > 1:
            raise ValueError(f"`dropout` must be a probability, at most 1, got {dropout}")
        for name, flag in (("sparse_grad", sparse_grad), ("bias", bias)):
            checks.check_flag(name, flag)
        self.sparse_grad, self.layer_idx = sparse_grad, layer_idx

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)

        memory_dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.q_proj = linear(hidden_size, heads * key_dim)
        self.query_norm: nn.Module = nn.Identity()
        if query_norm is not None:
            norm = RMSNorm if query_norm == "rms" else nn.LayerNorm
            self.query_norm = norm(key_dim, eps=norm_eps, device=device, dtype=dtype)
        self.keys: Tensor
        keys = torch.empty(heads, 2, num_keys, key_dim // 2, device=device, dtype=memory_dtype)
        keep(self, "keys", keys, trainable=True)
        options = Lookup(top_k, score, eps, precision, backend)
        options = check_lookup(keys.new_empty(0, heads, key_dim), keys, options)
        self.top_k, self.score, self.eps, self.precision, self.backend = options
        checks.check_choice("weighting", weighting, WEIGHTINGS)
        lowest = torch.finfo(compute_dtype(memory_dtype)).tiny
        self.temperature = checks.check_number("temperature", temperature, memory_dtype, minimum=lowest)
        self.weighting = weighting
        if table is None:
            table = ValueTable(num_keys**2, value_dim, device=device, dtype=memory_dtype)
        else:
            check_table(table, num_keys, value_dim)
            if sparse_grad and table.mesh is not None:
                raise ValueError("`sparse_grad` must be False where the columns of `table` are spread, got True")
        self.table = table
        self.dropout = nn.Dropout(dropout)
        if output in ("swilu", "gated"):
            self.gate_proj = linear(hidden_size, value_dim if output == "swilu" else hidden_size)
        self.value_proj = nn.Identity() if output == "none" else linear(value_dim, hidden_size)
        self._draw_keys()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, also those that `to_empty()` left as they were; a shared table with them."""
        for module in self.children():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]
        self._draw_keys()

    def _draw_keys(self) -> None:
        bound = self.key_dim**-0.5
        nn.init.uniform_(self.keys, -bound, bound)

    def address(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Slots [..., H·K], int64, and weights [..., H·K] of hidden states [..., d]: what `memory_stats` takes."""
        checks.check_tensor("hidden_states", hidden_states)
        checks.check_float("hidden_states", hidden_states)
        if hidden_states.dim() < 1 or hidden_states.shape[-1] != self.hidden_size:
            raise ValueError(
                f"`hidden_states` must have shape [..., {self.hidden_size}], got {checks.shape(hidden_states)}"
            )
        queries = self.query_norm(self.q_proj(hidden_states).unflatten(-1, (self.heads, self.key_dim)))
        scores, slots = product_key_lookup(
            queries,
            self.keys,
            self.top_k,
            score=self.score,
            eps=self.eps,
            precision=self.precision,
            backend=self.backend,
        )
        return slots.flatten(-2), weigh(scores, self.weighting, self.temperature).flatten(-2)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """The layer's output [..., d] for hidden states [..., d], in their dtype; the block adds the residual.

        `attention_mask`, and what else models pass to their layers by name, is ignored: each token is read by itself,
        so padding changes no other token.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        slots, weights = self.address(hidden_states)
        weights, mesh = same_on_all(weights, self.table.mesh), self.table.mesh
        read = self.table(sparse_value_gather, slots, weights, sparse_grad=self.sparse_grad, backend=self.backend)
        read = self.dropout(join_columns(read.to(hidden_states.dtype), mesh))
        if self.output == "swilu":
            read = read * F.silu(self.gate_proj(hidden_states))
        out = self.value_proj(read)
        if self.output == "gated":
            out = torch.sigmoid(self.gate_proj(hidden_states)) * out
        return out.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return (
            f"{self.hidden_size}, num_keys={self.num_keys}, heads={self.heads}, top_k={self.top_k}, "
            f"score={self.score!r}, weighting={self.weighting!r}, output={self.output!r}"
        )
