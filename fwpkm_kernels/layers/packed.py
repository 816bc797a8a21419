"""The documents of a layer's batch: packed for `run_varlen`, and what they read put back."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..documents import Documents
from ..options import Options
from ..records import DocumentsCarry, Inputs, Rows, VarlenOutput, each
from ..varlen import run_varlen


def memory_of_documents(
    queries: Tensor,
    targets: Tensor,
    keys: Tensor,
    values: Tensor,
    documents: Documents,
    *,
    gates: Tensor | None = None,
    rows: Rows | None = None,
    carry: DocumentsCarry | None = None,
    return_memory: bool = False,
    group: str = "",
    options: Options,
) -> tuple[VarlenOutput, DocumentsCarry | None]:
    """`fast_weight_memory_varlen` of the documents in a batch [B, T], without their padding.

    Args:
        queries: [B, T, H, Dk].
        targets: [B, T, D].
        gates: [B, T] or None.
        keys, values, rows, carry: as `fast_weight_memory_varlen` takes them.
        return_memory: whether there is a next segment, which needs rows and, under boundary="carry", the carry.
        group: of the ranks over which the columns of targets and values are spread; "" is none.

    Returns:
        VarlenOutput, whose output, slots and weights are [B, T, ...], at padding 0, -1 and 0; and the carry, or None.
    """
    places, cu_seqlens = _pack(documents, targets.device)

    def pack(x: Tensor) -> Tensor:
        return x.flatten(0, 1) if places is None else x.flatten(0, 1).index_select(0, places)

    def put_back(x: Tensor, fill: float) -> Tensor:
        if places is not None:
            x = x.new_full((documents.batch * documents.length, *x.shape[1:]), fill).index_copy(0, places, x)
        return x.view(documents.batch, documents.length, *x.shape[1:])

    q, y, g = each(pack, queries, targets, gates)
    is_empty = documents.number == 0
    if is_empty:
        keys, rows, carry = keys.new_zeros(keys.shape[-4:]), None, None
    result, left = run_varlen(
        Inputs(q, y, keys, values, g, None),  # type: ignore[arg-type]
        cu_seqlens,
        rows,
        carry,
        return_memory and options.boundary == "carry",
        False,
        options,
        may_end_before=documents.mask is not None,
        with_rows=return_memory,
        group=group,
        rows_name="memory.values",
        carry_name="memory.carry",
    )
    fills = ((result.output, 0), (result.slots, -1), (result.weights, 0))
    output, slots, weights = (put_back(x, fill) for x, fill in fills)
    result = result._replace(output=output, slots=slots, weights=weights)
    if is_empty:
        result = result._replace(keys=result.keys[:0])
        left = None if left is None else DocumentsCarry._make(each(lambda x: x[:0], *left))
    return result, left


def _pack(documents: Documents, device: torch.device) -> tuple[Tensor | None, Tensor]:
    """Where the tokens of the documents lie among the B·T, None where all of them are tokens, and their bounds among
    these, [S + 1], on the CPU.

    In compiled code, where the number of tokens is data, padding follows them. A mask on a GPU is copied, which waits.
    """
    if documents.number == 0:  # packed as one document of no tokens
        return None, torch.zeros(2, dtype=torch.int64, device="cpu")
    if documents.mask is not None:
        lengths, places = _real_tokens(documents, device)
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).cpu()
        if not torch.compiler.is_compiling():
            places = places[: int(cu_seqlens[-1])]
        return places, cu_seqlens
    if documents.cu_seqlens is None:
        return None, torch.arange(documents.batch + 1, device="cpu") * documents.length
    return None, documents.cu_seqlens if documents.cu_seqlens_cpu is None else documents.cu_seqlens_cpu


def _real_tokens(documents: Documents, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many tokens each document has, int64 [S], and where these lie among the B·T, document by document."""
    batch, length = documents.batch, documents.length
    real = torch.ones(batch, length, device=device) if documents.mask is None else documents.mask
    real = (real > 0).flatten()
    running = F.pad(real.cumsum(0), (1, 0))
    if documents.cu_seqlens is None:
        bounds = length * torch.arange(batch + 1, device=device)
    else:
        bounds = documents.bounds(device)
    return running[bounds].diff(), real.logical_not().sort(stable=True).indices
