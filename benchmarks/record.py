"""What the package launches, noted instead of run: on meta tensors of the paper's sizes, without a GPU."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from fwpkm_kernels._commands import CommandError, need

#: The paper's sizes: tokens of a chunk for each item, picks, sub-keys, widths of queries and values.
CHUNK, PICKS, NUM_KEYS, QUERY, WIDTH = 512, 8, 512, 512, 512
NUM_SLOTS = NUM_KEYS**2


def need_compiler() -> Any:
    """Triton; CommandError where it is missing, or where its interpreter is on."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise CommandError("Triton's interpreter compiles and launches nothing: unset TRITON_INTERPRET")
    return need("triton", "triton")


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel and everything its compilation depends on; and where it was launched."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        """Of the kernel."""
        return str(self.kernel.__name__)


@contextlib.contextmanager
def recorded_launches(on_launch: Callable[[Launch], None] = lambda launch: None) -> Iterator[list[Launch]]:
    """Within the context kernels do not run; their launches are noted in the list, and `on_launch` is told of each."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def note(self: Any, *args: Any, grid: Any, warmup: Any, **kwargs: Any) -> None:
        arguments = dict(zip(self.arg_names, args, strict=False))
        options = {}
        for name, value in kwargs.items():
            (arguments if name in self.arg_names else options)[name] = value
        launches.append(Launch(self, arguments, options, tuple(grid)))
        on_launch(launches[-1])

    with mock.patch.object(JITFunction, "run", note):
        yield launches


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Within the context the memory takes meta tensors for those of a GPU, and its operators run as plain functions."""

    def run(operator: CustomOpDef, *args: Any, **kwargs: Any) -> Any:
        return operator._init_fn(*args, **kwargs)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(CustomOpDef, "__call__", run))
        stack.enter_context(mock.patch.object(Tensor, "is_cuda", True))
        for name in ("cuda.device", "autocast"):
            stack.enter_context(mock.patch(f"torch.{name}", return_value=contextlib.nullcontext()))
        stack.enter_context(mock.patch("torch.cuda.current_device", return_value=-1))
        stack.enter_context(mock.patch("torch.cuda.is_current_stream_capturing", return_value=False))
        yield


def meta(*shape: int, dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> Tensor:
    """A tensor that has a shape and no elements."""
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=requires_grad)


def training(
    batch: int = 8, length: int = 2 * CHUNK, dtype: torch.dtype = torch.float32, *, keys: torch.dtype = torch.float32,
    table: torch.dtype = torch.float32, heads: int = 1, num_keys: int = NUM_KEYS, width: int = WIDTH,
    masked: bool = False, **options: Any,
) -> tuple[Callable[[], None], Callable[[], None]]:  # fmt: skip
    """`fast_weight_memory` over a sequence, and the backward of what it returned: to be called one after the other."""
    from fwpkm_kernels import fast_weight_memory

    inputs = {
        "queries": meta(batch, length, heads, QUERY, dtype=dtype, requires_grad=True),
        "targets": meta(batch, length, width, dtype=dtype, requires_grad=True),
        "keys": meta(heads, 2, num_keys, QUERY // 2, dtype=keys, requires_grad=True),
        "values": meta(num_keys**2, width, dtype=table, requires_grad=True),
    }
    if masked:
        inputs["gates"] = meta(batch, length, dtype=keys, requires_grad=True)
        options["mask"] = meta(batch, length, dtype=keys)
    output: list[Tensor] = []

    def forward() -> None:
        output.append(fast_weight_memory(**inputs, **options).output)

    def backward() -> None:
        torch.autograd.grad(output[0], list(inputs.values()), torch.empty_like(output[0]))

    return forward, backward


def step(tokens: int, position: int, dtype: torch.dtype = torch.float32) -> Callable[[], object]:
    """`fast_weight_memory_step` of one conversation, somewhere in its second chunk."""
    from fwpkm_kernels import MemoryState, fast_weight_memory_step

    state = MemoryState(meta(1, 2, NUM_KEYS, QUERY // 2), meta(NUM_SLOTS, WIDTH))
    queries, targets = meta(1, tokens, 1, QUERY, dtype=dtype), meta(1, tokens, WIDTH, dtype=dtype)
    fast_weight_memory_step(state, queries[:, :0], targets[:, :0])  # binds
    state._position.fill_(position)
    return lambda: fast_weight_memory_step(state, queries, targets)
