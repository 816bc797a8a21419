"""Argument checks and the choice of a backend, shared by every operation.

Each check raises TypeError or ValueError that names the argument in backticks, what was expected and what came.
"""

import functools
import numbers
import operator
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from .records import Plan

BACKENDS = ("auto", "torch", "triton")
PRECISIONS = ("ieee", "tf32x3", "tf32")
SCORES = ("idw", "dot")

_MASKS = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
)
# NumPy's numbers are instances of numbers.Integral and numbers.Real, and most of them not of int and float.
_INTEGERS: tuple[type, ...] = (int, torch.SymInt, numbers.Integral)
_REALS: tuple[type, ...] = (int, float, torch.SymInt, torch.SymFloat, numbers.Real)

_Callable = TypeVar("_Callable", bound=Callable[..., Any])


def shape(x: Tensor) -> list[int]:
    """A shape as an error message shows it."""
    return list(x.shape)


def check_tensor(name: str, x: object, rank: int | None = None, layout: str = "") -> None:
    """`x` is a dense tensor, no DTensor, of rank `rank` if given; `layout` says in words what its dimensions are."""
    if not isinstance(x, Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor, got {type(x).__name__}")
    if hasattr(x, "to_local"):  # a DTensor; isinstance would have to import its class
        raise TypeError(f"`{name}` must be a plain tensor, got a DTensor: pass what it holds here, x.to_local()")
    if x.is_nested:
        raise TypeError(f"`{name}` must be a dense (strided) tensor, got a nested one")
    if x.layout != torch.strided:
        raise TypeError(f"`{name}` must be a dense (strided) tensor, got layout {x.layout}")
    if rank is not None and x.dim() != rank:
        raise ValueError(f"`{name}` must have {rank} dimensions {layout}, got shape {shape(x)}")


def check_data(name: str, x: Tensor) -> None:
    """`x`, which the host reads, is not on the meta device, whose tensors operators would read as anything."""
    if x.is_meta:
        raise ValueError(f"`{name}` must have data, on the cpu or a GPU, got a tensor on meta")


def check_float(name: str, x: Tensor) -> None:
    """`x` holds float32, float64, float16 or bfloat16."""
    if x.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        raise TypeError(f"`{name}` must be float32, float64, float16 or bfloat16, got {x.dtype}")


def check_mask(name: str, x: Tensor) -> None:
    """`x` holds bool, integers or one of the floats of `check_float`."""
    if x.dtype not in _MASKS:
        raise TypeError(f"`{name}` must be bool, integer, float32, float64, float16 or bfloat16, got {x.dtype}")


def check_slots(name: str, x: Tensor) -> None:
    """`x` holds int64 or int32."""
    if x.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"`{name}` must be int64 or int32, got {x.dtype}")


def check_slot_range(name: str, x: Tensor, num_slots: int, *, minimum: int = 0) -> None:
    """On CPU tensors: every entry of `x` lies in [minimum, num_slots)."""
    if x.device.type == "cpu" and x.numel() > 0:
        low, high = (int(v) for v in torch.aminmax(x))
        if low < minimum or high >= num_slots:
            raise ValueError(f"`{name}` must lie in [{minimum}, {num_slots}), got values from {low} to {high}")


def check_like(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """`x` has the shape of `other`."""
    check_shapes(x.shape == other.shape, f"`{name}` must have the shape of `{other_name}`", x, other)


def check_shapes(agree: bool, rule: str, x: Tensor, other: Tensor) -> None:
    """`agree` says whether two shapes agree, and `rule` in words, with the names of both tensors, when they do."""
    if not agree:
        raise ValueError(f"{rule}, got {shape(x)} against {shape(other)}")


def check_table(values: Tensor, keys: Tensor) -> None:
    """`values` [N, D] has a row for each pair of the sub-keys of `keys` [H, 2, n, Dk/2]."""
    rule = "`values` [N, D] must have N = n² rows for the n sub-keys of `keys` [H, 2, n, Dk/2]"
    check_shapes(values.shape[0] == keys.shape[2] ** 2, rule, values, keys)


def as_device(name: str, device: Any) -> torch.device:
    """`device` as a torch.device."""
    try:
        return torch.device(device)
    except (TypeError, RuntimeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"`{name}` must be a device, got {device!r}: {str(error).splitlines()[0]}") from None


def check_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """`x` is on the device of `other`."""
    if x.device != other.device:
        raise ValueError(f"`{name}` must be on the device of `{other_name}`, got {x.device} against {other.device}")


def check_together(**tensors: Tensor) -> None:
    """All on one device; float64 mixes with no other float."""
    first_name, first = next(iter(tensors.items()))
    for name, x in tensors.items():
        check_device(name, x, first_name, first)
    floats = {name: x for name, x in tensors.items() if x.is_floating_point()}
    first_name, first = next(iter(floats.items()))
    for name, x in floats.items():
        if (x.dtype == torch.float64) != (first.dtype == torch.float64):
            raise TypeError(
                f"`{name}` and `{first_name}` must both be float64 or neither, got {x.dtype} against {first.dtype}"
            )


def check_number(name: str, x: object, dtype: torch.dtype, *, minimum: float | None = None) -> float:
    """`x` as a float: a real number, NumPy's among them, that is finite in `dtype`, and at least `minimum` if given."""
    if isinstance(x, bool) or not isinstance(x, _REALS):
        raise TypeError(f"`{name}` must be a number, got {type(x).__name__}")
    number = cast(float, x)
    # NaN fails too. math.isfinite would break the graphs of torch.compile in which x is symbolic.
    if not -torch.finfo(dtype).max <= number <= torch.finfo(dtype).max:
        raise ValueError(f"`{name}` must be finite in {dtype}, got {_shown(x)}")
    if minimum is not None and number < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, got {x}")
    return float(number)


def check_int(name: str, x: object, *, minimum: int) -> int:
    """`x` as an int, NumPy's among them: at least `minimum`, and of 64 bits."""
    if isinstance(x, bool) or not isinstance(x, _INTEGERS):
        raise TypeError(f"`{name}` must be an int, got {type(x).__name__}")
    number = cast(int, x)
    if not minimum <= number < 2**63:
        raise ValueError(f"`{name}` must be at least {minimum} and below 2**63, got {_shown(x)}")
    return number if isinstance(x, torch.SymInt) else operator.index(number)


def _shown(x: object) -> str:
    """A number as an error message shows it: Python writes no int of thousands of digits."""
    return f"an int of {x.bit_length()} bits" if isinstance(x, int) and x.bit_length() > 64 else str(x)


def check_writable(name: str, x: Tensor, function: str) -> None:
    """`x` [rows, columns] can be written in place, as `function` would not."""
    if x.requires_grad:
        raise ValueError(f"`{name}` must not require grad to be written in place; use {function}")
    if not torch.compiler.is_compiling():  # it can trace neither is_inference() nor is_neg()
        if x.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(
                f"`{name}` must not be an inference tensor to be written in place outside of inference mode"
            )
        if x.is_neg():
            raise ValueError(f"`{name}` must not be a negated view to be written in place; use resolve_neg()")
    _check_no_overlap(name, x)


def _check_no_overlap(name: str, x: Tensor) -> None:
    """Rows of `x` [rows, columns] lie one after the other, or columns do: no two programs write one address.

    A simple rule, which refuses some strides too that interleave rows and columns without an overlap.
    """
    (rows, columns), (row, column) = x.shape, x.stride()
    rows_apart = (columns <= 1 or column > 0) and (rows <= 1 or row > (columns - 1) * column)
    columns_apart = (rows <= 1 or row > 0) and (columns <= 1 or column > (rows - 1) * row)
    if not (rows_apart or columns_apart):
        raise ValueError(
            f"`{name}` must lie in memory row after row or column after column to be written in place, "
            f"got strides {list(x.stride())} for shape {shape(x)}"
        )


def check_flag(name: str, x: object) -> None:
    """`x` is True or False."""
    if not isinstance(x, bool):
        raise TypeError(f"`{name}` must be a bool, got {type(x).__name__}")


def check_choice(name: str, x: object, choices: tuple[str, ...]) -> None:
    """`x` is one of `choices`."""
    if not isinstance(x, str):
        raise TypeError(f"`{name}` must be a str, one of {', '.join(map(repr, choices))}; got {type(x).__name__}")
    if x not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}; got {x!r}")


_COMMON = f"{__package__}.kernels._common"


def use_triton(backend: str, x: Tensor) -> bool:
    """Whether `backend` means the Triton kernels for tensors like `x`; the answer is never a silent second choice.

    Raises:
        ValueError: "triton" for a CPU tensor, unless Triton's interpreter was on when Python started.
        ImportError: Triton is needed and not installed.
    """
    on_cpu = x.is_cpu
    if backend == "torch" or (backend == "auto" and on_cpu):
        return False
    if not on_cpu and _COMMON in sys.modules:  # importing it again would take longer than all else here
        return True
    try:
        from .kernels import _common
    except ImportError as error:
        where = "it comes with PyTorch's build for this GPU"
        if on_cpu:
            where = "install it with: pip install 'fwpkm_kernels[triton]'"
        raise ImportError(
            f'`backend`="{backend}" needs Triton for tensors on {x.device.type} ({error}): {where}'
        ) from error

    if on_cpu and not _common.INTERPRETED:
        raise ValueError(
            '`backend`="triton" on CPU tensors needs Triton\'s interpreter: set TRITON_INTERPRET=1 in the environment'
            " before Python starts, or use backend='torch'"
        )
    return True


def without_autocast(function: _Callable) -> _Callable:
    """Run `function` with autocast off: an operation's precision is what its own arguments say.

    Its first argument is a tensor, or a record whose first field is one.
    """

    @functools.wraps(function)
    def wrapper(first: Any, *args: Any, **options: Any) -> Any:
        tensor = first[0] if isinstance(first, tuple) else first
        if tensor.is_cpu and not torch.is_autocast_enabled("cpu"):  # as asking is faster
            return function(first, *args, **options)
        with torch.autocast(tensor.device.type, enabled=False):
            return function(first, *args, **options)

    return wrapper  # type: ignore[return-value]


#: Up to so many rows are numbered in 32 bits, more in 64.
NARROW_ROWS = 2**31
#: Up to so many accesses are numbered in 32 bits, where the sum of two numbers fits too, more in 64.
NARROW_ACCESSES = 2**30
#: torch.sort takes no more on a GPU.
MOST_SORTED = 2**31 - 1
#: Rows of tokens (and heads), which kernels number in 32 bits: two programs for each are a launch.
MOST_TOKENS = 2**30 - 1
#: What kernels number in 32 bits in one call of the whole memory.
MOST_ACCESSES = 2**30 - 1
#: Heads, and sub-keys of a half: two heads' halves, and tiles of 64 sub-keys, are axes of a launch, of 65535 at most.
MOST_HEADS, MOST_KEYS = 2**14, 2**21


def exceeds(size: int, most: int) -> bool:
    """Whether size > most; in a trace, whether that holds for every size that may come.

    A traced program then serves all sizes, and the operators' bodies, which see numbers, check again.
    """
    if torch.compiler.is_compiling() or isinstance(size, torch.SymInt) or isinstance(most, torch.SymInt):
        from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import

        return statically_known_true(size > most)
    return size > most


def check_sort(name: str, slots: Tensor) -> None:
    """No more slots than can be sorted where they are."""
    if slots.is_cuda and exceeds(slots.numel(), MOST_SORTED):
        raise ValueError(
            f"`{name}` must hold at most {MOST_SORTED} slots to be sorted on a GPU, got shape {list(slots.shape)}"
        )


def check_tokens(name: str, x: Tensor, num_tokens: int) -> None:
    """No more tokens (times heads) than the kernels number in 32 bits."""
    if exceeds(num_tokens, MOST_TOKENS):
        raise ValueError(
            f"`{name}` must hold at most {MOST_TOKENS} tokens (times heads) in one call, got shape {list(x.shape)}"
        )


def check_num_keys(keys: Tensor) -> None:
    """No more heads and sub-keys [H, 2, n, Dk/2] than the kernels number in 32 bits and launch."""
    heads, _, num_keys, _ = keys.shape
    limits = ((heads, MOST_HEADS), (num_keys, MOST_KEYS), (2 * heads * num_keys, NARROW_ROWS))
    if any(exceeds(size, most) for size, most in limits):
        raise ValueError(
            f"`keys` [H, 2, n, Dk/2] must have at most {MOST_HEADS} heads, {MOST_KEYS} sub-keys in each half, and "
            f"{NARROW_ROWS} in all, got shape {list(keys.shape)}"
        )


def most_memories(keys: Tensor) -> int:
    """Of how many memories, each with keys [H, 2, n, Dk/2] as these, one launch takes the heads and sub-keys."""
    heads, _, num_keys, _ = keys.shape[-4:]
    return max(1, min(MOST_HEADS // heads, NARROW_ROWS // (2 * heads * num_keys)))


def check_num_accesses(queries: Tensor, num_accesses: int) -> None:
    """No more accesses than the kernels of a sequence number in 32 bits."""
    if exceeds(num_accesses, MOST_ACCESSES):
        raise ValueError(
            f"`queries` [B, T, H, Dk] must make at most {MOST_ACCESSES} accesses in one call, top_k for each head and "
            f"token, and those that are read again; got {num_accesses} for shape {list(queries.shape)}"
        )


def check_rows(plan: Plan, num_slots: int, name: str = "slots") -> None:
    """On CPU tensors, where it costs no synchronisation: the plan names rows in [0, num_slots) only."""
    if plan.rows.device.type == "cpu" and plan.rows.numel() > 0:
        low, high = int(plan.rows[0]), int(plan.rows[-1])
        if low < 0 or high >= num_slots:
            raise ValueError(f"`{name}` must lie in [0, {num_slots}), got values from {low} to {high}")


def check_indices(indices: Tensor | Sequence[int], batch: int) -> Tensor:
    """Validate the argument of `select`, and make it an int64 tensor [new B]."""
    if not isinstance(indices, Tensor):
        try:
            items = [x.item() if isinstance(x, Tensor) and x.numel() == 1 else x for x in indices]
        except TypeError:
            raise TypeError(f"`indices` must be a tensor or a sequence of ints, got {type(indices).__name__}") from None
        numbers = [check_int("indices", x, minimum=0) for x in items]
        if max(numbers, default=-1) >= batch:
            raise ValueError(f"`indices` must lie in [0, {batch}), got {max(numbers)}")
        return torch.tensor(numbers, dtype=torch.int64, device="cpu")
    check_tensor("indices", indices, 1, "[new B]")
    check_slots("indices", indices)
    check_data("indices", indices)
    if not torch.compiler.is_compiling():  # indices in a trace have no values
        check_slot_range("indices", indices, batch)
    return indices.long()


def check_bounds(bounds: list[int], length: int, *, may_end_before: bool = False) -> None:
    """`cu_seqlens`, here `bounds`, cuts `length` tokens into documents, or the first ones of them."""
    is_short = may_end_before and bounds[-1] < length
    if bounds[0] != 0 or (bounds[-1] != length and not is_short):
        raise ValueError(f"`cu_seqlens` must go from 0 to T = {length}, got {bounds[0]} to {bounds[-1]}")
    for index, (before, after) in enumerate(pairwise(bounds)):
        if after < before:
            raise ValueError(f"`cu_seqlens` must not decrease, got {before}, {after} at {index}, {index + 1}")
