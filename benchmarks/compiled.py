"""What the compiler makes of every kernel at the paper's sizes, for GPUs that are not here.

    python -m benchmarks.compiled [--target sm_90 ...] [--case REGEX] [--json FILE]
    python -m benchmarks.compiled --write            # COMPILED.md: sm_90, and what benchmarks.launches counts

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
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch

from fwpkm_kernels._commands import Lines, check_outputs, command, need, write_output

from . import estimates, launches
from .machine_code import (
    Instruction,
    compile_launch,
    disassemble,
    executed_instructions,
    is_tensor_core,
    specialize,
    tool,
)
from .record import recorded_launches

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


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


class Rows(NamedTuple):
    """What a program of a kernel moves as whole rows, in bytes.

    Each is a function of the launch's arguments, with the size of an element in place of every tensor.
    """

    #: rows read at a time
    loads: Callable[[Any], int] = lambda x: 0
    #: rows stored at a time
    stores: Callable[[Any], int] = lambda x: 0


#: Every kernel of the package.
ROWS = {
    "half_topk_kernel": Rows(),
    "merge_kernel": Rows(loads=lambda x: x.IDW * min(x.BLOCK_K, x.TOP_K) * x.HALF * x.keys_ptr),
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
        command = [tool("cuobjdump"), "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    names = [instruction.name for instruction in kernel]
    loads = [name for name in names if name.startswith("LDG")]  # LDGSTS too, which loads to shared memory
    stores = [name for name in names if name.startswith("STG")]
    return {
        "registers": registers,
        "stack": stack,
        "spills": sum(name.startswith(("LDL", "STL")) for name in names),
        "occupancy": occupancy(compiled.target, registers, compiled.shared, compiled.num_warps),
        "wide_loads": sum(".128" in name for name in loads),
        "narrow_loads": sum(".128" not in name for name in loads),
        "wide_stores": sum(".128" in name for name in stores),
        "narrow_stores": sum(".128" not in name for name in stores),
        "tensor_core": sum(map(is_tensor_core, kernel)),
        "instructions": len(kernel),
        "executed": executed_instructions(kernel),
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
    from .cases import CASES

    # Launchers ask torch which vendor's GPUs it was built for.
    built_for = mock.patch.object(torch.version, "hip", None if target.startswith("sm_") else target)
    with built_for, recorded_launches() as launches:
        CASES[name]()
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
    from .cases import CASES

    names = [name for name in CASES if re.search(pattern, name)]
    parts = pool.map(compile_case, names, [target] * len(names))
    return examine([kernel for part in parts for kernel in part], target)


TABLE = Path(__file__).parent / "COMPILED.md"
#: Of the committed table: the target, and the cases, which are chunks of the paper and what these do not launch.
TABLE_TARGET = "sm_90"
TABLE_CASES = r"^chunk/|/(paper|paper-bf16-table|paper-bf16-queries|static-pkm)$"

INTRODUCTION = """\
# What the compiler makes of the kernels

Generated by `python -m benchmarks.compiled --write` with Triton {triton} and torch {torch}; no GPU is needed. What a
test holds every kernel to, at these and other sizes, and for sm_80, sm_100 and gfx942 too, is in
`tests/test_compiled.py`: no spills, and rows of tables moved 128 bits at a time. Other versions of Triton give other
counts.

- *registers* of a thread; *spills*: instructions that move spilled registers; *shared* memory in bytes.
- *occupancy*: the most warps of the kernel that a multiprocessor can hold, given registers, shared memory and warps of
  a program, of those it can hold of any: 64, in at most 32 programs.
- *loads*, *stores*: 128-bit ones / those that the rows of a program come to / narrower ones. Narrower ones are slots,
  weights and the like, and rows on a path that only other strides take.
- *tensor*: tensor-core instructions in the program. *code*: all instructions in it.
- *run*: instructions that a warp executes: all once, both sides of branches, and those in a loop as often as it runs. A
  dash: a loop does not say how often, or the data do.

A line is a kernel as the case compiles it; a later case that compiles to the same numbers is left out.
"""


def _table(reports: list[Report]) -> str:
    """One target's part of the committed table."""
    lines = [
        "| kernel | case | warps | registers | spills | shared | occupancy | loads | stores | tensor | code | run |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
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
            lines.append("| " + " | ".join(map(str, (x.kernel, x.case, *cells))) + " |")
    return "\n".join(lines)


def write_table(pool: ProcessPoolExecutor) -> None:
    """Write the committed file."""
    import triton

    parts = [INTRODUCTION.format(triton=triton.__version__, torch=torch.__version__.partition("+")[0])]
    parts += [f"## {TABLE_TARGET}\n", _table(report_cases(TABLE_CASES, TABLE_TARGET, pool)) + "\n"]
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
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}, and nothing else")
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
        columns += ("executed",)
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
