"""What a layer checks of its arguments before a memory sees them."""

from typing import Any

import torch

from ..memory import check_memory
from ..options import Options
from ..records import Inputs


def check_options(o: Options, heads: int, num_keys: int, key_dim: int, memory_dtype: torch.dtype) -> Options:
    """Validate the options by the memory's own check, on meta tensors of these sizes."""
    meta: dict[str, Any] = {"device": "meta", "dtype": memory_dtype}
    queries, targets = torch.empty(1, 0, heads, key_dim, **meta), torch.empty(1, 0, 1, **meta)
    keys, values = torch.empty(heads, 2, num_keys, key_dim // 2, **meta), torch.empty(num_keys**2, 1, **meta)
    return check_memory(Inputs(queries, targets, keys, values, None, None), o)


def one_of(name: str, x: Any, other_name: str, other: Any) -> Any:
    """The value of an argument that has two names."""
    if x is not None and other is not None and x is not other:
        raise ValueError(f"`{other_name}` is another name of `{name}`, and must not be given with another value")
    return other if x is None else x
