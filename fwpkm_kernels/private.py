"""The tensors that belong to a state alone, which its steps write in and out of inference mode."""

import torch
from torch import Tensor

from ._operators import operator


@operator("private_copy")
def private_copy(x: Tensor, device: torch.device) -> Tensor:
    """A contiguous copy on a device, which a step may write in and out of inference mode.

    It is an operator, since a tensor that compiled code makes in inference mode can be written in inference mode only.
    """
    with torch.inference_mode(False):
        return x.detach().to(device, copy=True, memory_format=torch.contiguous_format)


@private_copy.register_fake
def _(x, device):  # type: ignore[no-untyped-def]
    return torch.empty(x.shape, dtype=x.dtype, device=device)


def writable(x: Tensor) -> Tensor:
    """The tensor itself, without a graph, or a copy where a step outside of inference mode could not write it."""
    if x.requires_grad:
        x.detach_()
    return private_copy(x, x.device) if x.is_inference() or x.is_neg() or not x.is_contiguous() else x


def shares_storage(x: Tensor, y: Tensor) -> bool:
    if torch.compiler.is_compiling():  # tensors have no addresses there
        return False
    return bool(torch._C._is_alias_of(x, y))  # type: ignore[attr-defined]


def leaf(x: Tensor) -> Tensor:
    """The tensor itself if it is a leaf, otherwise the same data without its graph."""
    return x if x.is_leaf else x.detach()


@operator("rollback", mutates_args=("position",))
def rollback(position: Tensor, tokens: int, chunk_size: int) -> None:
    """Take back the last tokens of the present chunk; an operator, since compiled code cannot read the position."""
    read = int(position) % chunk_size
    if tokens > read:
        raise ValueError(f"`tokens` must be at most {read}, as many as the present chunk has read, got {tokens}")
    position -= tokens
