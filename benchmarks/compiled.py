"""What the compiler makes of every kernel at the paper's sizes, for GPUs that are not here.

    python -m benchmarks.compiled [--target sm_90 ...] [--case REGEX] [--json FILE]
    python -m benchmarks.compiled --write            # COMPILED.md: all targets, and what benchmarks.launches counts

The launchers run on meta tensors of the real sizes while `JITFunction.run` only takes notes: so what is compiled is
each kernel with just the arguments, specialisations and launch configuration that it would be launched with. Registers,
stack and shared memory are read from the cubin, all else from its disassembly, with the tools in Triton's own package;
for AMD from the assembly.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch

from fwpkm_kernels._commands import Lines, check_outputs, command, need, write_output
from fwpkm_kernels.records import Layout, Picks, Plan

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclasses.dataclass(frozen=True)
class Case:
    """One launch of the package at one configuration."""

    name: str
    run: Callable[[], Any]


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


@dataclasses.dataclass(frozen=True)
class Report:
    """What one kernel of one case became on one target."""

    case: str
    kernel: str
    target: str
    num_warps: int
    #: of a thread; for AMD vector registers
    registers: int
    #: bytes of stack (NVIDIA) or scratch (AMD) per thread: more than 0 means spills
    stack: int
    #: instructions that move spilled registers (NVIDIA); spilled registers (AMD)
    spills: int
    shared: int
    #: most warps that a multiprocessor can hold of this kernel, of those it can hold of any; AMD: waves of a SIMD
    occupancy: float
    #: 128-bit loads from device memory, others, and how many 128-bit ones the rows that a program reads at a time take
    wide_loads: int
    narrow_loads: int
    expected_wide_loads: int
    #: the same of stores
    wide_stores: int
    narrow_stores: int
    expected_wide_stores: int
    tensor_core: int
    instructions: int
    #: that a warp executes: see `executed_instructions`
    executed: int | None
    #: of the top-k, warp instructions executed for each (token, head) row: see `topk_instructions`
    topk_per_row: float | None


class Rows(NamedTuple):
    """What a program of a kernel moves as whole rows, in bytes, and what is a row of the top-k.

    Each is a function of the launch's arguments, with the size of an element in place of every tensor.
    """

    #: rows read at a time
    loads: Callable[[Any], int] = lambda x: 0
    #: rows stored at a time
    stores: Callable[[Any], int] = lambda x: 0
    #: top-k kernels: (token, head) rows of the whole launch
    topk: Callable[[Any], int] | None = None


#: Every kernel of the package.
ROWS = {
    "half_topk_kernel": Rows(topk=lambda x: x.M * x.grid[2] // 2),
    "merge_kernel": Rows(
        loads=lambda x: x.IDW * min(x.BLOCK_K, x.TOP_K) * x.HALF * x.keys_ptr, topk=lambda x: x.grid[0]
    ),
    "half_grad_kernel": Rows(
        loads=lambda x: min(x.BLOCK_K, x.TOP_K) * x.HALF * x.keys_ptr,
        stores=lambda x: x.HALF * x.grad_queries_ptr,
    ),
    "count_kernel": Rows(),
    "usage_kernel": Rows(),
    "step_kernel": Rows(),
    "key_sum_kernel": Rows(
        loads=lambda x: x.BLOCK_A * min(x.BLOCK_D, x.HALF) * x.queries_ptr,
        # A block of columns is less than what all warps store 128 bits of.
        stores=lambda x: min(x.BLOCK_D, x.HALF) * x.out_ptr,
    ),
    "step_grad_kernel": Rows(
        loads=lambda x: x.TOP_K * min(x.BLOCK_D, x.HALF) * (x.IDW * x.keys_ptr + x.grad_totals_ptr),
        stores=lambda x: min(x.BLOCK_D, x.HALF) * x.grad_queries_ptr,
    ),
    "pick_sums_kernel": Rows(),
    "score_grad_kernel": Rows(),
    "enqueue_kernel": Rows(loads=lambda x: x.WIDTH * x.queries_ptr, stores=lambda x: x.WIDTH * x.queue_queries_ptr),
    "read_to_queue_kernel": Rows(
        loads=lambda x: min(x.BLOCK_J, x.J) * x.D * x.values_ptr,
        stores=lambda x: x.D * (x.queue_predictions_ptr + x.output_ptr),
    ),
    "plan_chunk_kernel": Rows(),
    "weigh_kernel": Rows(),
    "plan_kernel": Rows(),
    "count_unmasked_kernel": Rows(),
    "fold_kernel": Rows(),
    "weigh_again_kernel": Rows(),
    "fold_grad_kernel": Rows(),
    "sum_reads_kernel": Rows(
        loads=lambda x: min(x.BLOCK_W, x.WIDTH) * x.reads_ptr, stores=lambda x: min(x.BLOCK_W, x.WIDTH) * x.out_ptr
    ),
    "gather_kernel": Rows(
        loads=lambda x: min(x.BLOCK_J, x.J) * x.D * x.values_ptr, stores=lambda x: x.HAS_SUM * x.D * x.out_ptr
    ),
    "segment_kernel": Rows(
        loads=lambda x: x.D * x.BLOCK_A * x.vectors_ptr + x.D * (x.CENTERED or x.EPILOGUE != "sum") * x.table_ptr,
        # Or a partial sum: AMD's compiler makes one store of the two.
        stores=lambda x: x.D * (x.out_ptr + x.LOG * x.log_ptr),
    ),
    # A program has a few columns of its rows.
    "hot_segment_kernel": Rows(),
    "decay_kernel": Rows(
        loads=lambda x: x.BLOCK_N * x.D * x.values_ptr, stores=lambda x: x.BLOCK_N * x.D * x.values_ptr
    ),
    "read_kernel": Rows(
        loads=lambda x: min(x.BLOCK_J, x.J) * x.D * x.values_ptr, stores=lambda x: x.D * (x.errors_ptr + x.output_ptr)
    ),
    "read_grad_kernel": Rows(
        loads=lambda x: min(x.BLOCK_J, x.J) * x.D * (x.log_ptr + x.steps_ptr),
        stores=lambda x: x.D * (x.grad_predictions_ptr + x.grad_targets_ptr),
    ),
    "restore_kernel": Rows(
        loads=lambda x: x.BLOCK_N * x.D * x.initial_ptr, stores=lambda x: x.BLOCK_N * x.D * x.values_ptr
    ),
}


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _slots(*shape: int) -> torch.Tensor:
    return _meta(*shape, dtype=torch.int64)


def _plan(accesses: int, dtype: torch.dtype = torch.int32) -> Plan:
    return Plan(_slots(accesses), *(_meta(accesses, dtype=dtype) for _ in range(3)))


def cases() -> list[Case]:
    """Every kernel, forward and backward, at the paper's sizes: 8×512 tokens, n = 512, K = 8, Dk = D = 512."""
    from fwpkm_kernels.kernels import chunks, gather, key_step, lookup, scans, segments, update
    from fwpkm_kernels.kernels import weights as weighing
    from fwpkm_kernels.kernels.picks import plan_picks

    bf16 = torch.bfloat16
    result = []

    def add_lookup(
        name: str,
        m: int,
        heads: int,
        n: int,
        k: int,
        width: int,
        *,
        idw: bool,
        q_dtype: torch.dtype = torch.float32,
        k_dtype: torch.dtype = torch.float32,
        precision: str = "tf32x3",
    ) -> None:
        queries, keys = _meta(m, heads, width, dtype=q_dtype), _meta(heads, 2, n, width // 2, dtype=k_dtype)
        exact = torch.promote_types(k_dtype, torch.float32)
        grad = _meta(m, heads, 1, k, dtype=exact).expand(-1, -1, 2, -1)
        table, sub_keys = keys.view(-1, width // 2), _slots(m, heads, 2, k)
        result.append(
            Case(
                f"lookup/{name}",
                lambda: lookup.lookup(queries, keys, top_k=k, idw=idw, eps=1e-3, precision=precision),
            )
        )
        result.append(
            Case(
                f"lookup_backward/{name}",
                lambda: (
                    lookup.half_grad(grad, queries, table, sub_keys, idw=idw, eps=1e-3),
                    segments.segment_rows(
                        torch.empty_like(table),
                        queries.view(-1, width // 2),
                        _meta(m * heads * 2 * k, dtype=exact),
                        _plan(m * heads * 2 * k),
                        table=table,
                        centered=idw,
                    ),
                ),
            )
        )

    def weighed_lookup() -> None:
        options: dict[str, Any] = {"top_k": 8, "idw": True, "eps": 1e-3, "precision": "tf32x3"}
        lookup.lookup(_meta(512, 1, 512), _meta(1, 2, 512, 256), **options, weights=_meta(512, 1, 8))

    result.append(Case("lookup/weighed", weighed_lookup))

    def add_key_step(
        name: str,
        m: int,
        heads: int,
        n: int,
        k: int,
        width: int,
        *,
        idw: bool,
        clip: float | None = None,
        q_dtype: torch.dtype = torch.float32,
        k_dtype: torch.dtype = torch.float32,
    ) -> None:
        exact = torch.promote_types(k_dtype, torch.float32)
        queries, keys = _meta(m, heads, width, dtype=q_dtype), _meta(heads * 2 * n, width // 2, dtype=k_dtype)
        half_scores, sub_keys = _meta(m, heads, 2, k, dtype=exact), _meta(m, heads, 2, k, dtype=torch.int32)
        picks = Picks(half_scores, sub_keys)
        scores, slots = _meta(m, heads, k, dtype=exact), _slots(m, heads, k)
        options: dict[str, Any] = {"idw": idw, "lr": 1.0, "weight": 1.0, "weight_decay": 0.0, "clip": clip}

        def plan(first_row: int) -> tuple[torch.Tensor, ...]:
            return plan_picks(sub_keys, half_scores, num_keys=n, first_row=first_row)

        result.append(
            Case(
                f"key_step/{name}",
                lambda: key_step.step_keys(keys, torch.empty_like(keys), queries, picks, plan(0), **options),
            )
        )
        result.append(
            Case(
                f"key_step_backward/{name}",
                lambda: key_step.address_grad(
                    _meta(*keys.shape, dtype=exact),
                    keys,
                    queries,
                    scores,
                    slots,
                    picks,
                    plan(8),
                    _meta(m, heads, width, dtype=exact),
                    first_row=8,
                    eps=1e-3,
                    **options,
                ),
            )
        )

    add_lookup("paper", 4096, 1, 512, 8, 512, idw=True)
    add_lookup("paper-bf16-queries", 4096, 1, 512, 8, 512, idw=True, q_dtype=bf16)
    add_lookup("paper-bf16", 4096, 1, 512, 8, 512, idw=True, q_dtype=bf16, k_dtype=bf16)
    add_lookup("paper-float64", 4096, 1, 512, 8, 512, idw=True, q_dtype=torch.float64, k_dtype=torch.float64)
    for precision in ("tf32", "ieee"):
        add_lookup(f"paper-{precision}", 4096, 1, 512, 8, 512, idw=True, precision=precision)
    add_lookup("paper-dot", 4096, 1, 512, 8, 512, idw=False)
    add_lookup("static-pkm", 512, 4, 512, 32, 512, idw=False)
    add_lookup("n4096", 4096, 1, 4096, 8, 512, idw=True)
    add_lookup("n4096-K64", 4096, 1, 4096, 64, 512, idw=True)
    add_key_step("paper", 4096, 1, 512, 8, 512, idw=True)
    add_key_step("paper-bf16-queries", 4096, 1, 512, 8, 512, idw=True, clip=1.0, q_dtype=bf16)
    add_key_step("paper-bf16", 4096, 1, 512, 8, 512, idw=True, q_dtype=bf16, k_dtype=bf16)
    add_key_step("paper-float64", 4096, 1, 512, 8, 512, idw=True, q_dtype=torch.float64, k_dtype=torch.float64)
    add_key_step("paper-dot", 4096, 1, 512, 8, 512, idw=False)
    add_key_step("static-pkm", 512, 4, 512, 32, 512, idw=True)
    add_key_step("n4096-K64", 4096, 1, 4096, 64, 512, idw=True)

    for name, m, j, n, width, dtype in (
        ("paper", 4096, 8, 512, 512, torch.float32),
        ("paper-bf16-table", 4096, 8, 512, 512, bf16),
        ("static-pkm", 512, 128, 512, 512, torch.float32),
        ("D1024", 4096, 8, 512, 1024, torch.float32),
        ("D256", 4096, 8, 512, 256, torch.float32),
        ("D4096", 4096, 8, 512, 4096, torch.float32),
        ("paper-float64", 4096, 8, 512, 512, torch.float64),
        ("n4096", 4096, 8, 4096, 512, torch.float32),
    ):
        table = _meta(n * n, width, dtype=dtype)
        exact = torch.promote_types(dtype, torch.float32)
        vectors, coefficients, slots = _meta(m, width, dtype=exact), _meta(m, j, dtype=exact), _slots(m, j)
        grad_out = _meta(m, width, dtype=dtype)

        def forward(table=table, slots=slots, coefficients=coefficients):  # type: ignore[no-untyped-def]
            gather.gather(table, slots, weights=coefficients, sum_dtype=table.dtype)

        def backward(table=table, slots=slots, grad_out=grad_out, coefficients=coefficients, m=m, j=j):  # type: ignore[no-untyped-def]
            gather.gather(table, slots, vectors=grad_out)
            segments.segment_rows(table, grad_out, coefficients, _plan(m * j))

        def write(table=table, vectors=vectors, coefficients=coefficients, m=m, j=j):  # type: ignore[no-untyped-def]
            update.update(table, table, vectors, coefficients, _plan(m * j), lr=1.0, weight_decay=0.0, clip=None)

        def write_decay_clip(table=table, vectors=vectors, coefficients=coefficients, m=m, j=j):  # type: ignore[no-untyped-def]
            update.update(table, table, vectors, coefficients, _plan(m * j), lr=1.0, weight_decay=0.1, clip=1.0)

        def write_backward(table=table, vectors=vectors, coefficients=coefficients, slots=slots, m=m, j=j):  # type: ignore[no-untyped-def]
            for clip in (None, 1.0):
                update.update_grad(table, vectors, coefficients, slots, _plan(m * j), lr=1.0, clip=clip)

        result.append(Case(f"gather/{name}", forward))
        result.append(Case(f"gather_backward/{name}", backward))
        result.append(Case(f"update/{name}", write))
        result.append(Case(f"update_backward/{name}", write_backward))
        if name.startswith(("paper", "D4096")):
            result.append(Case(f"update_decay_clip/{name}", write_decay_clip))

    for name, batch, j, width, dtype, activations in (
        ("paper", 8, 8, 512, torch.float32, torch.float32),
        ("paper-bf16-targets", 8, 8, 512, torch.float32, bf16),
        ("paper-bf16-table", 8, 8, 512, bf16, bf16),
        ("paper-float64", 8, 8, 512, torch.float64, torch.float64),
        ("inference", 1, 8, 512, torch.float32, torch.float32),
        ("J128", 1, 128, 512, torch.float32, torch.float32),
        ("J128-bf16-table", 1, 128, 512, bf16, bf16),
        ("D1024", 8, 8, 1024, torch.float32, torch.float32),
        ("D4096", 8, 8, 4096, torch.float32, torch.float32),
    ):
        # One chunk: 512 positions, and one before them that is read again to be written.
        m, exact = 513 * batch, torch.promote_types(dtype, torch.float32)
        table, log = _meta(512 * 512, width, dtype=dtype), _meta(m * j, width, dtype=dtype)
        errors, weights, slots = _meta(m, width, dtype=exact), _meta(m, j, dtype=exact), _slots(m, j)
        sequence = _meta(batch, 4096, width, dtype=activations).transpose(0, 1)
        written, read = sequence[511:1023], sequence[512:1024]

        def chunk(  # type: ignore[no-untyped-def]
            table=table, log=log, errors=errors, weights=weights, slots=slots, written=written, read=read
        ):
            scans.read(table, slots, weights, written, read)
            plan = _plan(slots.numel())
            update.update(table, table, errors, weights, plan, lr=1.0, weight_decay=0.0, clip=None, log=log)

        def chunk_backward(  # type: ignore[no-untyped-def]
            table=table, log=log, errors=errors, weights=weights, slots=slots, written=written, read=read
        ):
            steps = torch.empty_like(table, dtype=errors.dtype)
            grads = (written, torch.empty_like(weights), torch.empty_like(weights))
            scans.read_grad(log, slots, steps, slots, weights, weights, written, read, *grads, factor=1.0)
            segments.segment_rows(steps, errors, weights, _plan(slots.numel()))

        result.append(Case(f"memory/{name}", chunk))
        result.append(Case(f"memory_backward/{name}", chunk_backward))

        def reset(table=table):  # type: ignore[no-untyped-def]
            update.restore_rows(table, table, _meta(table.shape[0], dtype=torch.uint8))

        result.append(Case(f"memory_reset/{name}", reset))
    for name, batch, j, n, exact in (
        ("paper", 8, 8, 512, torch.float32),
        ("paper-float64", 8, 8, 512, torch.float64),
        ("J128", 1, 128, 512, torch.float32),
        ("n65536", 1, 8, 65536, torch.float32),
    ):
        # Eight chunks of 512 positions, all but the first with one that is read again.
        layout, reads = Layout(batch, 4096, 512, 1, 1, 1, 8, 4103), 4103 * batch
        scores, slots, counts = _meta(reads, j, dtype=exact), _slots(reads, j), _meta(reads, j, dtype=torch.int32)

        def of_reads(layout=layout, scores=scores, slots=slots, counts=counts, n=n, j=j):  # type: ignore[no-untyped-def]
            row_dtype = torch.int32 if n == 512 else torch.int64
            how: dict[str, Any] = {"weighting": "softmax", "temperature": 1.0}
            by_item = (layout.batch, 4096, j)
            outputs = (_slots(*by_item), _meta(*by_item, dtype=scores.dtype))
            _, keys = weighing.weigh(scores, slots, n * n, row_dtype, layout, **how, outputs=outputs)
            order = _slots(keys.numel())
            by_token = _meta(*by_item[1::-1], dtype=scores.dtype)
            for mask in (None, by_token):  # a token's mask, and its gate
                chunks.plan_writes(keys, order, n * n, row_dtype, j, mask, layout, count_all=False)
                step = "paper" if mask is None else "normalized"
                fold: dict[str, Any] = {"step": step, "ratio": mask is not None}
                weighing.fold(scores, counts, mask, mask, layout, **fold)
                grads = (scores, scores, mask, mask, mask)
                weighing.fold_grad(scores, scores, counts, *grads, layout, **how, **fold)
            weighing.weigh_again(scores, Plan(order, order, counts.view(-1), counts.view(-1)), layout, **how)
            chunks.sum_reads(_meta(len(scores), 1, 512, dtype=scores.dtype), layout, torch.bfloat16)

        result.append(Case(f"chunks/{name}", of_reads))

    def wide() -> None:
        for dtype in (torch.float32, bf16):
            table, vectors, coefficients = _meta(512 * 512, 512, dtype=dtype), _meta(4096, 512), _meta(4096, 8)
            plan = _plan(32768, torch.int64)
            update.update(table, table, vectors, coefficients, plan, lr=1.0, weight_decay=0.1, clip=1.0)
            segments.segment_rows(table, vectors, coefficients, plan)
        sub_keys, half_scores = _meta(4096, 1, 2, 8, dtype=torch.int32), _meta(4096, 1, 2, 8)
        listed = (_slots(4096 * 2 * 8), _slots(4096 * 2 * 8), _slots(2 * 512 + 1))
        by_sort = plan_picks(sub_keys, half_scores, num_keys=512, first_row=0, listed=listed)
        key_step.pick_sums(half_scores, by_sort)
        keys = _meta(1024, 256)
        step: dict[str, Any] = {"idw": True, "lr": 1.0, "weight": 1.0, "weight_decay": 0.0, "clip": None}
        key_step.step_keys(keys, keys, _meta(4096, 1, 512), Picks(half_scores, sub_keys), by_sort, **step)

    # Rows and positions that need 64 bits.
    result.append(Case("wide/paper", wide))
    # A table of width 1 sums scalars by segment.
    result.append(
        Case(
            "memory_scalars/paper",
            lambda: segments.segment_rows(_meta(512 * 512, 1), _meta(32768, 1), _meta(32768), _plan(32768)),
        )
    )

    from . import launches as whole_memory

    def memory_case(name: str, run: Callable[[], Any]) -> None:
        def on_meta() -> None:
            with whole_memory.on_meta():
                run()

        result.append(Case(f"chunk/{name}", on_meta))

    def train(dtype: torch.dtype) -> None:
        for part in whole_memory.training(8, 1024, dtype):
            part()

    # Whatever the memory itself launches.
    memory_case("training", lambda: train(torch.float32))
    memory_case("training-bf16", lambda: train(bf16))
    memory_case("inference", lambda: whole_memory.step(512, 512)())
    memory_case("inference-bf16", lambda: whole_memory.step(512, 512, bf16)())
    memory_case("decode", lambda: whole_memory.step(1, 600)())
    return result


@contextlib.contextmanager
def recorded_launches(on_launch: Callable[[Launch], None] = lambda launch: None) -> Iterator[list[Launch]]:
    """Within the context kernels do not run; their launches are noted in the list, and `on_launch` is told of each."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    original = JITFunction.run

    def note(self: Any, *args: Any, grid: Any, warmup: Any, **kwargs: Any) -> None:
        arguments = dict(zip(self.arg_names, args, strict=False))
        options = {}
        for name, value in kwargs.items():
            (arguments if name in self.arg_names else options)[name] = value
        launches.append(Launch(self, arguments, options, tuple(grid)))
        on_launch(launches[-1])

    JITFunction.run = note
    try:
        yield launches
    finally:
        JITFunction.run = original


_TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.bool: "i1",
}


def specialize(launch: Launch) -> dict[str, Any]:
    """Signature, constants and attributes as Triton would specialise the launch."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        specialized = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or (specialized and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + _TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialized and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = parameter.annotation_type
    return {"signature": signature, "constexprs": constants, "attrs": attributes}


def compile_launch(launch: Launch, target: str) -> Any:
    """Compile one noted launch for `target`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if target.startswith("sm_"):
        gpu = GPUTarget("cuda", int(target[3:]), 32)
    else:
        gpu = GPUTarget("hip", target, 64)
    return triton.compile(ASTSource(fn=launch.kernel, **specialize(launch)), target=gpu, options=launch.options)


def _tool(name: str) -> str:
    import triton.backends.nvidia

    return os.path.join(os.path.dirname(triton.backends.nvidia.__file__), "bin", name)


class Instruction(NamedTuple):
    """One line of a disassembly, its address counted from the kernel's first."""

    address: int
    predicate: str
    name: str
    operands: str


def _code(cubin: bytes) -> bytes:
    """The instructions of the one kernel in a cubin: the section .text.KERNEL of this ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    (code,) = (
        cubin[begin : begin + length]
        for name, _, _, _, begin, length in sections
        if cubin.startswith(b".text.", sections[names][4] + name)
    )
    return code


def disassemble(cubins: list[bytes], target: str) -> list[list[Instruction]]:
    """The instructions of each, but the padding at their ends.

    One run of the disassembler for all of them: it takes 0.4 s to start.
    """
    codes = [_code(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        architecture = {"sm_80": "SM80", "sm_90": "SM90a", "sm_100": "SM100a"}[target]
        command = [_tool("nvdisasm"), "--binary", architecture, file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?\w+) )?\s*([A-Z][\w.]*)([^;]*);", text, re.MULTILINE)
    assert len(lines) * 16 == sum(map(len, codes)), "the disassembly is not of 16 bytes an instruction"
    kernels, begin = [], 0
    for code in codes:
        kernel = []
        for address, predicate, name, operands in lines[begin // 16 : (begin + len(code)) // 16]:
            if name.startswith("BRA"):
                label = re.search("0x([0-9a-f]+)", operands)
                operands = operands if label is None else operands.replace(label[0], hex(int(label[1], 16) - begin))
            kernel.append(Instruction(int(address, 16) - begin, predicate, name, operands))
        while kernel[-1].name == "NOP" or (
            kernel[-1].name.startswith("BRA") and _target(kernel[-1]) == kernel[-1].address
        ):
            kernel.pop()
        kernels.append(kernel)
        begin += len(code)
    return kernels


def _target(branch: Instruction) -> int:
    found = re.search(r"0x([0-9a-f]+)", branch.operands)
    return int(found[1], 16) if found else -1


def _is_tensor_core(instruction: Instruction) -> bool:
    return re.match(r"[A-Z]+G?MMA\b", instruction.name) is not None


def _number(kernel: list[Instruction], register: str) -> int | None:
    """What the last instruction that writes the register moves there, if that is a number."""
    # A pair of registers is named by its even one, and cleared at once.
    pair = re.sub(r"\d+$", lambda x: str(int(x[0]) // 2 * 2), register)
    for instruction in reversed(kernel):
        operands = instruction.operands.replace(",", "").split()
        if operands[:1] == [register] or (operands[:1] == [pair] and instruction.name == "CS2R"):
            if not re.search("MOV|CS2R", instruction.name):
                return None
            if operands[-1] in ("RZ", "URZ", "SRZ"):
                return 0
            value = int(operands[-1], 16) if re.match("-?0x", operands[-1]) else None
            return value if value is None or value < 2**31 else value - 2**32
    return None


def _trips(kernel: list[Instruction], begin: int, end: int) -> int | None:
    """How often the loop runs whose last instruction, at index `end`, branches to `begin`; None if it does not say.

    It says so if it compares a counter that starts at a number with another: MOV R64, -0x4 before it, and in it
    IADD3 R64, R64, 0x4, then ISETP.NE P1, R64, 0x1c. Or if it runs once more while a flag is set that it clears: twice.
    """
    body, branch = kernel[begin:end], kernel[end]
    found = re.search(r"U?P\d", branch.operands if branch.name == "BRA.U" else branch.predicate)
    predicate = found[0] if found else "none"
    for at_test, test in reversed(list(enumerate(body))):
        operands = test.operands.replace(".reuse", "")
        copied = re.match(rf" {predicate}, .*\b(UP\d)", operands)
        if test.name.startswith("PLOP3") and copied:
            predicate = copied[1]
            # Bit 7 of the table is the result for three operands that are true.
            cleared = re.compile(rf" {predicate}, UPT, UPT, UPT, UPT, 0x[0-7]?[0-9a-f],")
            if any(x.name.startswith("UPLOP3") and cleared.match(x.operands) for x in body[at_test:]):
                return 2
        compared = re.match(rf" {predicate}, U?PT, (U?R\d+), 0x([0-9a-f]+)\b", operands)
        if re.match(r"U?ISETP\.(NE|LT|GE)\b", test.name) and compared:
            counter, limit = compared[1], int(compared[2], 16)
            first = _number(kernel[:begin], counter)
            for at_step, step in enumerate(body):
                added = re.match(
                    rf" {counter}, (?:U?P\w+, )*{counter}, 0x([0-9a-f]+)\b", step.operands.replace(".reuse", "")
                )
                if re.match(r"U?IADD|VIADD", step.name) and added and first is not None:
                    return (limit - first) // int(added[1], 16) + (at_test < at_step)
    return None


def _to_the_end(kernel: list[Instruction]) -> list[Instruction]:
    """Without what stands behind the last EXIT, such as waiting for a barrier."""
    return kernel[: max(i for i, instruction in enumerate(kernel) if instruction.name == "EXIT") + 1]


def _loops(kernel: list[Instruction]) -> list[tuple[int, int]]:
    """Indices of the first and the last instruction of each loop."""
    indices = {instruction.address: i for i, instruction in enumerate(kernel)}
    ends = [i for i, instruction in enumerate(kernel) if instruction.name.startswith("BRA")]
    targets = [indices.get(_target(kernel[i]), i) for i in ends]
    return [(begin, end) for begin, end in zip(targets, ends, strict=True) if begin < end]


def executed_instructions(kernel: list[Instruction], first: int = 0, *, unknown: float | None = None) -> float | None:
    """Instructions that a warp executes from index `first` on; None where a loop does not say how often it runs.

    Every instruction once, taken branch or not, and those in a loop as often as it runs: `unknown` times, where that is
    given and the loop does not say.
    """
    kernel = _to_the_end(kernel)
    times: list[float] = [1] * len(kernel)
    for begin, end in _loops(kernel):
        if begin >= first:
            trips = _trips(kernel, begin, end) or unknown
            if trips is None or trips < 1:
                return None
            times[begin : end + 1] = [x * trips for x in times[begin : end + 1]]
    return sum(times[first:])


def topk_instructions(kernel: list[Instruction], top_k: int) -> int | None:
    """Instructions that a warp executes in the top-k of a kernel; None where that cannot be told.

    What comes after the loop with the tensor-core instructions, or all if there are none. Loops must run a divisor of K
    times: they are over the picks.
    """
    kernel = _to_the_end(kernel)
    loops = _loops(kernel)
    first = 0
    tensor_core = [i for i, instruction in enumerate(kernel) if _is_tensor_core(instruction)]
    if tensor_core:
        first = max([end for begin, end in loops if begin <= tensor_core[-1] <= end], default=tensor_core[-1]) + 1
    trips = [_trips(kernel, begin, end) for begin, end in loops if begin >= first]
    if any(x is None or x < 1 or top_k % x != 0 for x in trips):
        return None
    return executed_instructions(kernel, first)


class Limits(NamedTuple):
    """What a multiprocessor holds at a time (CUDA C++ programming guide, technical specifications)."""

    warps: int
    blocks: int
    registers: int
    shared: int


LIMITS = {
    "sm_80": Limits(64, 32, 65536, 164 * 1024),
    "sm_90": Limits(64, 32, 65536, 228 * 1024),
    "sm_100": Limits(64, 32, 65536, 228 * 1024),
}


def occupancy(target: str, registers: int, shared: int, num_warps: int) -> float:
    """Most warps of a kernel that a multiprocessor can hold, of those that it can hold of any."""
    limits = LIMITS[target]
    # Registers go to warps in units of 256 and to four warps at a time; a block has 1 KB of shared memory of its own.
    warps = limits.registers // (math.ceil(registers * 32 / 256) * 256) // 4 * 4
    blocks = min(
        limits.blocks,
        limits.warps // num_warps,
        warps // num_warps,
        limits.shared // (math.ceil(shared / 128) * 128 + 1024),
    )
    return blocks * num_warps / limits.warps


def _examine_nvidia(compiled: "Compiled", kernel: list[Instruction]) -> dict[str, Any]:
    """Registers, stack and instruction counts of a cubin and its disassembly."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.binary)
        file.flush()
        command = [_tool("cuobjdump"), "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    names = [instruction.name for instruction in kernel]
    loads = [name for name in names if name.startswith("LDG")]  # LDGSTS too, which loads to shared memory
    stores = [name for name in names if name.startswith("STG")]
    topk = None
    if compiled.topk_rows and (not compiled.has_dot or any(map(_is_tensor_core, kernel))):
        topk = topk_instructions(kernel, compiled.top_k)
    return {
        "registers": registers,
        "stack": stack,
        "spills": sum(name.startswith(("LDL", "STL")) for name in names),
        "occupancy": occupancy(compiled.target, registers, compiled.shared, compiled.num_warps),
        "wide_loads": sum(".128" in name for name in loads),
        "narrow_loads": sum(".128" not in name for name in loads),
        "wide_stores": sum(".128" in name for name in stores),
        "narrow_stores": sum(".128" not in name for name in stores),
        "tensor_core": sum(map(_is_tensor_core, kernel)),
        "instructions": len(kernel),
        "executed": executed_instructions(kernel),
        "topk_per_row": None if topk is None else topk * compiled.num_warps * compiled.programs / compiled.topk_rows,
    }


def _examine_amd(compiled: "Compiled") -> dict[str, Any]:
    """The same of AMD's assembly, as far as it tells."""
    text = compiled.binary.decode()

    def number(pattern: str) -> int:
        return int(re.search(pattern, text)[1])  # type: ignore[index]

    def count(pattern: str) -> int:
        return len(re.findall(pattern, text))

    waves = number(r"; Occupancy: (\d+)")  # of a SIMD, by its registers
    if compiled.shared > 0:  # 64 KB, of four SIMDs
        waves = min(waves, 65536 // compiled.shared * compiled.num_warps // 4)
    return {
        "registers": number(r"\.vgpr_count:\s+(\d+)"),
        "stack": number(r"\.private_segment_fixed_size:\s+(\d+)"),
        "spills": number(r"\.vgpr_spill_count:\s+(\d+)") + number(r"\.sgpr_spill_count:\s+(\d+)"),
        "occupancy": waves / 8,
        "wide_loads": count(r"(?:global|buffer)_load_dwordx4"),
        "narrow_loads": count(r"(?:global|buffer)_load_(?!dwordx4)\w+"),
        "wide_stores": count(r"(?:global|buffer)_store_dwordx4"),
        "narrow_stores": count(r"(?:global|buffer)_store_(?!dwordx4)\w+"),
        "tensor_core": count("v_mfma"),
        "instructions": sum(
            line.startswith("\t") and not line.startswith(("\t.", "\t;")) for line in text.splitlines()
        ),
        "executed": None,
        "topk_per_row": None,
    }


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One launch, compiled: what its report needs."""

    case: str
    kernel: str
    target: str
    num_warps: int
    shared: int
    row_loads: int
    row_stores: int
    topk_rows: int
    programs: int
    top_k: int
    #: whether it forms what it ranks, by dot products
    has_dot: bool
    #: cubin, or AMD's assembly
    binary: bytes

    def report(self, found: dict[str, Any]) -> Report:
        """What was found, with what the rows take."""
        lanes = 16 * self.num_warps * (32 if self.target.startswith("sm_") else 64)
        names = ("case", "kernel", "target", "num_warps", "shared")
        return Report(
            **{name: getattr(self, name) for name in names},
            expected_wide_loads=self.row_loads // lanes,
            expected_wide_stores=self.row_stores // lanes,
            **found,
        )


def compile_case(name: str, target: str) -> list[Compiled]:
    """Compile every kernel that case `name` launches."""
    # Launchers ask torch which vendor's GPUs it was built for.
    with mock.patch.object(torch.version, "hip", None if target.startswith("sm_") else target):
        case = next(case for case in cases() if case.name == name)
        with recorded_launches() as launches:
            case.run()
    # Most launches of a sequence are alike.
    different = {str((launch.name, specialize(launch), launch.options)): launch for launch in launches}
    results = []
    for launch in different.values():
        compiled = compile_launch(launch, target)
        sizes = {name: x.element_size() if isinstance(x, torch.Tensor) else x for name, x in launch.arguments.items()}
        arguments, rows = SimpleNamespace(**sizes, grid=launch.grid), ROWS.get(launch.name, Rows())
        results.append(
            Compiled(
                case=name,
                kernel=launch.name,
                target=target,
                num_warps=compiled.metadata.num_warps,
                shared=compiled.metadata.shared,
                row_loads=int(rows.loads(arguments)),
                row_stores=int(rows.stores(arguments)),
                topk_rows=rows.topk(arguments) if rows.topk else 0,
                programs=math.prod(launch.grid),
                top_k=sizes.get("TOP_K", 0),
                has_dot="PRECISION" in sizes,
                binary=compiled.asm["cubin"] if target.startswith("sm_") else compiled.asm["amdgcn"].encode(),
            )
        )
    return results


def examine(compiled: list[Compiled], target: str) -> list[Report]:
    """Report on kernels that were compiled for one target."""
    if not target.startswith("sm_"):
        return [kernel.report(_examine_amd(kernel)) for kernel in compiled]
    codes = disassemble([kernel.binary for kernel in compiled], target)
    return [kernel.report(_examine_nvidia(kernel, code)) for kernel, code in zip(compiled, codes, strict=True)]


def report_cases(pattern: str, target: str, pool: ProcessPoolExecutor) -> list[Report]:
    """Compile and examine all kernels of the cases whose name has a match of the regular expression."""
    names = [case.name for case in cases() if re.search(pattern, case.name)]
    parts = pool.map(compile_case, names, [target] * len(names))
    return examine([kernel for part in parts for kernel in part], target)


TABLE = Path(__file__).parent / "COMPILED.md"
#: Cases of the committed table: chunks of the paper, and what these do not launch.
TABLE_CASES = r"^chunk/|/(paper|paper-bf16-table|paper-bf16-queries|static-pkm)$"

INTRODUCTION = """\
# What the compiler makes of the kernels

Generated by `python -m benchmarks.compiled --write` with Triton {triton} and torch {torch}; no GPU is needed. What a
test holds every kernel to, at these and other sizes, is in `tests/test_compiled.py`: no spills, and rows of tables
moved 128 bits at a time. Other versions of Triton give other counts.

- *registers* of a thread; *spills*: instructions that move spilled registers; *shared* memory in bytes.
- *occupancy*: the most warps of the kernel that a multiprocessor can hold, given registers, shared memory and warps of
  a program, of those it can hold of any: 64, in at most 32 programs. For gfx942: waves of a SIMD, of 8.
- *loads*, *stores*: 128-bit ones / those that the rows of a program come to / narrower ones. Narrower ones are slots,
  weights and the like, and rows on a path that only other strides take.
- *tensor*: tensor-core instructions in the program. *code*: all instructions in it.
- *run*: instructions that a warp executes: all once, both sides of branches, and those in a loop as often as it runs. A
  dash: a loop does not say how often, as in AMD's assembly, or the data do.
- *top-k*: of these, what all programs that work for a (token, head) row execute for it after the loop of tensor-core
  instructions, or in all if there are none. Rows that a tile has no tokens for count with the others: decoding fills
  one of 64.

A line is a kernel as the case compiles it; a later case that compiles to the same numbers is left out.
"""


def _table(reports: list[Report]) -> str:
    """One target's part of the committed table."""
    lines = [
        "| kernel | case | warps | registers | spills | shared | occupancy | loads | stores | tensor | code | run "
        "| top-k |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    seen = set()
    order = list(ROWS)
    reports = sorted(reports, key=lambda x: not x.case.startswith("chunk/"))
    for x in sorted(reports, key=lambda x: order.index(x.kernel) if x.kernel in ROWS else len(order)):
        cells = (
            x.num_warps,
            x.registers,
            x.spills,
            x.shared,
            f"{x.occupancy:.0%}",
            f"{x.wide_loads} / {x.expected_wide_loads} / {x.narrow_loads}",
            f"{x.wide_stores} / {x.expected_wide_stores} / {x.narrow_stores}",
            x.tensor_core,
            x.instructions,
            "–" if x.executed is None else x.executed,
        )
        if (x.kernel, cells) not in seen:
            seen.add((x.kernel, cells))
            topk = "–" if x.topk_per_row is None else f"{x.topk_per_row:.0f}"
            lines.append("| " + " | ".join(map(str, (x.kernel, x.case, *cells, topk))) + " |")
    return "\n".join(lines)


def write_table(pool: ProcessPoolExecutor) -> None:
    """Write the committed file."""
    import triton

    from . import estimates, launches

    parts = [INTRODUCTION.format(triton=triton.__version__, torch=torch.__version__.partition("+")[0])]
    for target in TARGETS:
        parts += [f"## {target}\n", _table(report_cases(TABLE_CASES, target, pool)) + "\n"]
    parts.append(launches.markdown(launches.rows()))
    parts.append(estimates.markdown(estimates.estimates(pool)))
    write_output(TABLE, "\n".join(parts))


@command("compiled")
def main() -> int:
    """Print the table; with --json also write one line per kernel. Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--target", action="append", choices=TARGETS, help="may be repeated; default sm_90")
    parser.add_argument("--case", default="", help="only cases whose name has a match of this regular expression")
    parser.add_argument("--json", help="append JSON lines to this file")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}, of all targets, and nothing else")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="compile this many cases at a time"
    )
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("the interpreter compiles nothing: unset TRITON_INTERPRET")
    need("triton", "triton")
    check_outputs(TABLE if arguments.write else arguments.json)
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ProcessPoolExecutor(arguments.jobs))
        if arguments.write:
            write_table(pool)
            return 0
        file = stack.enter_context(Lines(arguments.json, append=True)) if arguments.json else None
        columns = ("case", "kernel", "target", "num_warps", "registers", "stack", "spills", "shared", "occupancy")
        columns += ("wide_loads", "narrow_loads", "wide_stores", "narrow_stores", "tensor_core", "instructions")
        columns += ("executed", "topk_per_row")
        template = "{:34} {:20} {:6} " + " ".join(["{:>6}"] * (len(columns) - 3))
        print(template.format(*(c[:6] if i > 2 else c for i, c in enumerate(columns))))
        for target in arguments.target or ["sm_90"]:
            for report in report_cases(arguments.case, target, pool):
                row = dataclasses.asdict(report)
                cells = ("-" if row[c] is None else row[c] for c in columns)
                print(template.format(*(round(x, 2) if isinstance(x, float) else x for x in cells)), flush=True)
                if file is not None:
                    file.write(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
