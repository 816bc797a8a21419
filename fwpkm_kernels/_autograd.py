"""What autograd, its transforms and traces cannot do with our functions is refused here, before it is computed."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode, has_proxy_slot

_LOOP = "call it once for each item of a batch"


def refuse_transforms(name: str, args: Iterable[Any], instead_of_vmap: str = _LOOP) -> None:
    """Raise under a transform of torch.func, or for a tensor with a tangent of forward-mode differentiation.

    The operators have no rules for either, and those that run without autograd would drop derivatives silently. Public
    functions call this, and backward passes before they apply a Function of their own. Functions call it too when they
    run, since compiled code may apply them directly; in eager code PyTorch itself refuses a Function under a transform.

    Args:
        name: of the public function.
        args: its arguments, tensors and others.
        instead_of_vmap: what a caller does who wants a batch.

    Raises:
        RuntimeError: naming the function and what to do instead.
    """
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{name} does not run under transforms of torch.func: instead of vmap, {instead_of_vmap}; instead of grad,"
            " vjp or jacrev, use torch.autograd.grad or torch.autograd.functional; forward-mode differentiation"
            " (jvp, jacfwd) is not supported"
        )
    # The level is looked at first, since every unpack_dual takes a part of a microsecond.
    if forward_ad._current_level >= 0 and any(_has_tangent(x) for x in args):
        raise RuntimeError(
            f"{name} does not support forward-mode differentiation (torch.autograd.forward_ad): use torch.autograd"
            ".grad, or torch.autograd.functional.jacobian with its default strategy"
        )


def _has_tangent(x: Any) -> bool:
    return isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None


def in_backward() -> bool:
    """Whether the caller runs in a backward pass, as what an activation checkpoint computes again does."""
    return torch._C._current_graph_task_id() != -1


def refuse_recomputation(name: str) -> None:
    """Raise in a backward pass, where an activation checkpoint would apply what `name` writes a second time.

    PyTorch does not tell whether it is a checkpoint or a hook that calls.
    """
    if in_backward():
        raise RuntimeError(
            f"{name} was called in a backward pass. If it was by an activation checkpoint, which computes its function"
            " again, the memory would be written twice: call it outside of the checkpoint, or let a policy save it"
            " (torch.utils.checkpoint.create_selective_checkpoint_contexts). If it was by a gradient hook: note there"
            " what is to be written, and call it when backward() has returned"
        )


def is_exporting() -> bool:
    """The flag of torch.compiler.is_exporting(), which in torch.compile before PyTorch 2.13 is True by mistake."""
    return torch.compiler._is_exporting_flag


def refuse_traces(name: str, memory: Tensor, tokens: Tensor, is_bound: bool) -> None:
    """Raise where a trace of a function that writes a state would be a program that does something else.

    torch.export and make_fx keep the tensors of a state as constants, which every call of the program then writes. A
    first step in the program would bind the state at every call, so that one must be made before the trace. A state
    that is made in the trace is a part of the program, and is allowed.

    Args:
        memory: one of the state's tensors.
        tokens: one of the tensors that the state reads.
        is_bound: whether the state has stepped before.
    """
    if torch.compiler.is_compiling() and not is_exporting():
        return
    mode = None if torch.compiler.is_dynamo_compiling() else get_proxy_mode()
    if isinstance(memory, FakeTensor) or (mode is not None and has_proxy_slot(memory, mode.tracer)):
        return
    if not is_bound and (is_exporting() or mode is not None):
        raise RuntimeError(
            f"{name} cannot be traced with a state that is not bound, since the program would bind it anew at every"
            " call: step the state with no tokens and the same options first"
        )
    if isinstance(tokens, FakeTensor) and not is_exporting():
        raise RuntimeError(
            f"{name} cannot read fake tensors into a state of real ones: make the state of fake ones too, inside of"
            " what make_fx traces, or use torch.export"
        )
