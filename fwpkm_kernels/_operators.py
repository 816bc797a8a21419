"""How operators are registered: under the package's own name, once in a process.

When a name is registered again, PyTorch frees the operator that had it, and code that still holds that one crashes.
"""

import os
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef, _maybe_get_opdef
from torch.nn import Parameter

#: A copy of the package under another name, ``a.b.fwpkm_kernels`` say, has operators of its own.
NAMESPACE = re.sub(r"\W|^(?=\d)", "_", __package__ or "", flags=re.ASCII)


def operator(
    name: str,
    *,
    mutates_args: str | Iterable[str] = (),
    schema: str | None = None,
    tags: tuple[torch.Tag, ...] = (),
) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """As torch.library.custom_op, but a module that is loaded again gives the operator that exists its new function.

    What was compiled or imported before goes on working, and runs the new function.

    Raises:
        ImportError: if the operator exists with another schema or other tags.
    """
    qualified = f"{NAMESPACE}::{name}"

    def register(function: Callable[..., Any]) -> CustomOpDef:
        known = _maybe_get_opdef(qualified)
        if known is None:
            return torch.library.custom_op(qualified, mutates_args=mutates_args, schema=schema, tags=tags)(function)
        wanted = schema or torch.library.infer_schema(function, mutates_args=mutates_args)
        if known._schema != wanted or tuple(known._tags) != tags:
            raise ImportError(
                f"the arguments or tags of {qualified} have changed since {_folder(known._init_fn)} was first imported:"
                " restart Python, since PyTorch cannot replace an operator that is in use"
            )
        known.register_kernel(None)(function)
        return known

    return register


def is_plain(*tensors: object) -> bool:
    """Whether an operator of these CPU tensors gives what its function gives, and no more comes of it.

    No gradient is asked for, no tensor is of a class of its own or a view that the dispatcher resolves, and nothing
    traces or watches operators. PyTorch's way to the function, by an autograd Function and the dispatcher, takes up to
    0.1 ms, which may then be left out.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state():
        return False
    grad, is_batched = torch.is_grad_enabled(), torch._C._functorch.is_legacy_batchedtensor
    return all(
        isinstance(x, Tensor)
        and (type(x) is Tensor or type(x) is Parameter)
        and x.is_cpu
        and not (grad and x.requires_grad)
        and not (x.is_neg() or x._is_zerotensor() or is_batched(x))
        for x in tensors
    )


def function_of(op: CustomOpDef) -> Callable[..., Any]:
    """The function of an operator, which the tensors of `is_plain` may take in its place."""
    return op._backend_fns[None]


def _folder(function: Callable[..., Any]) -> str:
    """Where the source of a function lies."""
    return os.path.realpath(os.path.dirname(function.__code__.co_filename))


def _refuse_other_owners() -> None:
    """Raise ImportError if another copy, or other code, has registered operators in the namespace of this package."""
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith(f"{NAMESPACE}::"):
            known = _maybe_get_opdef(name)
            owner = "a torch.library.Library" if known is None else _folder(known._init_fn)
            if owner != _folder(operator):
                raise ImportError(
                    f"{__package__} in {_folder(operator)} cannot register its operators, since {owner} has registered"
                    f" {name}: import one of the two in a process, or give one of them another name"
                )


_refuse_other_owners()
