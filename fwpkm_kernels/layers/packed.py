"""The documents of a layer's batch: packed for `fast_weight_memory_varlen`, and what they read put back."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..documents import Documents
from ..options import Options
from ..records import DocumentsCarry, Rows, VarlenOutput, each
from ..varlen import fast_weight_memory_varlen


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
    return_carry: bool = False,
    options: Options,
) -> tuple[VarlenOutput, DocumentsCarry | None]:
    """`fast_weight_memory_varlen` of the documents in a batch [B, T], without their padding.

    Args:
        queries: [B, T, H, Dk].
        targets: [B, T, D].
        gates: [B, T] or None.
        keys, values, rows, carry: as `fast_weight_memory_varlen` takes them.

    Returns:
        VarlenOutput, whose output, slots and weights are [B, T, ...], at padding 0, -1 and 0; and the carry with
        `return_carry`.
    """
    places, cu_seqlens = _pack(documents, targets.device)

    def pack(x: Tensor) -> Tensor:
        return x.flatten(0, 1) if places is None else x.flatten(0, 1).index_select(0, places)

    def put_back(x: Tensor, fill: float) -> Tensor:
        if places is not None:
            x = x.new_full((documents.batch * documents.length, *x.shape[1:]), fill).index_copy(0, places, x)
        return x.view(documents.batch, documents.length, *x.shape[1:])

    q, y, g = each(pack, queries, targets, gates)
    how: dict[str, Any] = {"gates": g, "rows": rows, "return_carry": return_carry, **options._asdict()}
    is_empty = documents.number == 0  # which is packed as one document of no tokens
    carry = None if is_empty else carry
    if is_empty:
        keys, how["rows"] = keys.new_zeros(keys.shape[-4:]), None
    result: Any = fast_weight_memory_varlen(q, y, keys, values, cu_seqlens, carry=carry, **how)  # type: ignore[arg-type]
    result, carry = result if return_carry else (result, None)
    fills = {"output": 0, "slots": -1, "weights": 0}
    result = result._replace(**{name: put_back(getattr(result, name), fill) for name, fill in fills.items()})
    if is_empty:
        result = result._replace(keys=result.keys[:0])
        carry = None if carry is None else DocumentsCarry._make(each(lambda x: x[:0], *carry))
    return result, carry


def _pack(documents: Documents, device: torch.device) -> tuple[Tensor | None, Tensor]:
    """Where the tokens of the documents lie among the B·T, None where all of them are tokens, and their bounds among
    these, [S + 1], on the CPU.

    In compiled code, where the number of tokens is data, padding follows them. A mask on a GPU is copied, which waits.
    """
    if documents.mask is not None:
        lengths, places = _real_tokens(documents, device)
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).cpu()
        if not torch.compiler.is_compiling():
            places = places[: int(cu_seqlens[-1])]
        return places, cu_seqlens
    if documents.cu_seqlens is None:
        return None, torch.arange(max(documents.batch, 1) + 1, device="cpu") * documents.length
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
