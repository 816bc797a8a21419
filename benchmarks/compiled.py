"""What the compiler makes of every kernel at the paper's sizes, for GPUs that are not here.

    python -m benchmarks.compiled [--target sm_90 ...] [--case SUBSTRING] [--json FILE]

The launchers run on meta tensors of the real sizes while `JITFunction.run` only takes notes: so what is compiled is
each kernel with just the arguments, specialisations and launch configuration that it would be launched with. Registers,
stack (spills) and shared memory are read from the cubin, load widths and tensor-core instructions from its disassembly,
with the tools in Triton's own package; for AMD from the assembly.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest import mock

import torch

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclasses.dataclass(frozen=True)
class Case:
    """One launch of the package at one configuration."""

    name: str
    run: Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel and everything its compilation depends on."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Report:
    """What one kernel of one case became on one target."""

    case: str
    kernel: str
    target: str
    registers: int
    #: bytes of stack (NVIDIA) or scratch (AMD) per thread: more than 0 means spills
    stack: int
    shared: int
    num_warps: int
    #: 128-bit loads from device memory
    wide_loads: int
    narrow_loads: int
    tensor_core: int
    instructions: int
    seconds: float
    #: how many 128-bit loads the rows that a program reads at a time come to
    expected_wide_loads: int


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _slots(*shape: int) -> torch.Tensor:
    return _meta(*shape, dtype=torch.int64)


def _plan(accesses: int) -> list[torch.Tensor]:
    return [
        _slots(accesses),
        _meta(accesses, dtype=torch.int32),
        _meta(accesses, dtype=torch.int32),
        _meta(accesses, dtype=torch.int32),
    ]


def cases() -> list[Case]:
    """Every kernel, forward and backward, at the paper's sizes: 8×512 tokens, n = 512, K = 8, Dk = D = 512."""
    from fwpkm_kernels.kernels import addressing, chunks, gather, lookup, memory, segments, update
    from fwpkm_kernels.kernels.plan import plan_picks

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
                        *_plan(m * heads * 2 * k),
                        table=table,
                        centered=idw,
                    ),
                ),
            )
        )

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
        probabilities, sub_keys = _meta(m, heads, 2, k, dtype=exact), _meta(m, heads, 2, k, dtype=torch.int32)
        picks, plan = (queries, probabilities, sub_keys), tuple(_plan(sub_keys.numel()))
        first = _meta(heads * 2 * n + 1, dtype=torch.int32)
        scores, slots = _meta(m, heads, k, dtype=exact), _slots(m, heads, k)
        options: dict[str, Any] = {
            "idw": idw,
            "eps": 1e-3,
            "lr": 1.0,
            "weight": 1.0,
            "weight_decay": 0.0,
            "clip": clip,
        }
        result.append(
            Case(
                f"key_step/{name}",
                lambda: (
                    plan_picks(sub_keys, probabilities, num_keys=n, first_row=0),
                    addressing.step_keys(keys, torch.empty_like(keys), *picks, plan, first, in_place=False, **options),
                ),
            )
        )
        result.append(
            Case(
                f"key_step_backward/{name}",
                lambda: addressing.address_grad(
                    _meta(*keys.shape, dtype=exact),
                    keys,
                    *picks,
                    scores,
                    slots,
                    plan,
                    first,
                    num_rows=m * heads,
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
            segments.segment_rows(table, grad_out, coefficients, *_plan(m * j))

        def write(table=table, vectors=vectors, coefficients=coefficients, m=m, j=j):  # type: ignore[no-untyped-def]
            update.update(table, table, vectors, coefficients, *_plan(m * j), lr=1.0, weight_decay=0.0, clip=None)

        def write_decay_clip(table=table, vectors=vectors, coefficients=coefficients, m=m, j=j):  # type: ignore[no-untyped-def]
            update.update(table, table, vectors, coefficients, *_plan(m * j), lr=1.0, weight_decay=0.1, clip=1.0)

        def write_backward(table=table, vectors=vectors, coefficients=coefficients, slots=slots, m=m, j=j):  # type: ignore[no-untyped-def]
            for clip in (None, 1.0):
                update.update_grad(table, vectors, coefficients, slots, *_plan(m * j), lr=1.0, clip=clip)

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
            memory.read(table, slots, weights, written, read)
            plan = _plan(slots.numel())
            update.update(table, table, errors, weights, *plan, lr=1.0, weight_decay=0.0, clip=None, log=log)

        def chunk_backward(  # type: ignore[no-untyped-def]
            table=table, log=log, errors=errors, weights=weights, slots=slots, written=written, read=read
        ):
            steps = torch.empty_like(table, dtype=errors.dtype)
            grads = (written, torch.empty_like(weights), torch.empty_like(weights))
            memory.read_grad(log, slots, steps, slots, weights, weights, written, read, *grads, factor=1.0)
            segments.segment_rows(steps, errors, weights, *_plan(slots.numel()))

        result.append(Case(f"memory/{name}", chunk))
        result.append(Case(f"memory_backward/{name}", chunk_backward))

        def reset(table=table):  # type: ignore[no-untyped-def]
            memory.restore_rows(table, table, _meta(table.shape[0], dtype=torch.uint8))

        result.append(Case(f"memory_reset/{name}", reset))
    for name, batch, j, n, exact in (
        ("paper", 8, 8, 512, torch.float32),
        ("paper-float64", 8, 8, 512, torch.float64),
        ("J128", 1, 128, 512, torch.float32),
        ("n65536", 1, 8, 65536, torch.float32),
    ):
        # Eight chunks of 512 positions, all but the first with one that is read again.
        layout, reads = (batch, 4096, 512, 1, 1, 1, 8, 4103), 4103 * batch
        scores, slots, counts = _meta(reads, j, dtype=exact), _slots(reads, j), _meta(reads, j, dtype=torch.int32)

        def of_reads(layout=layout, scores=scores, slots=slots, counts=counts, n=n, j=j):  # type: ignore[no-untyped-def]
            row_dtype = torch.int32 if n == 512 else torch.int64
            how: dict[str, Any] = {"weighting": "softmax", "temperature": 1.0}
            by_item = (layout[0], 4096, j)
            outputs = (_slots(*by_item), _meta(*by_item, dtype=scores.dtype))
            _, keys = chunks.weigh(scores, slots, n * n, row_dtype, layout, **how, outputs=outputs)
            order = _slots(keys.numel())
            by_token = _meta(*by_item[1::-1], dtype=scores.dtype)
            for mask in (None, by_token):  # a token's mask, and its gate
                chunks.plan_writes(keys, order, n * n, row_dtype, j, mask, layout, count_all=False)
                fold: dict[str, Any] = {"normalized": mask is not None, "ratio": mask is not None}
                chunks.fold(scores, counts, mask, mask, layout, **fold)
                grads = (scores, scores, mask, mask, mask)
                chunks.fold_grad(scores, scores, counts, *grads, layout, **how, **fold)
            chunks.weigh_again(scores, order, counts.view(-1), layout, **how)
            chunks.sum_reads(_meta(len(scores), 1, 512, dtype=scores.dtype), layout, torch.bfloat16)

        result.append(Case(f"chunks/{name}", of_reads))
    # A table of width 1 sums scalars by segment.
    result.append(
        Case(
            "memory_scalars/paper",
            lambda: segments.segment_rows(_meta(512 * 512, 1), _meta(32768, 1), _meta(32768), *_plan(32768)),
        )
    )
    return result


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Within the context kernels do not run; their launches are noted in the list."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    original = JITFunction.run

    def note(self: Any, *args: Any, grid: Any, warmup: Any, **kwargs: Any) -> None:
        arguments = dict(zip(self.arg_names, args, strict=False))
        options = {}
        for name, value in kwargs.items():
            (arguments if name in self.arg_names else options)[name] = value
        launches.append(Launch(self, arguments, options))

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
}


def compile_launch(launch: Launch, target: str) -> Any:
    """Compile one noted launch for `target`, specialised as Triton would specialise it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

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
    if target.startswith("sm_"):
        gpu = GPUTarget("cuda", int(target[3:]), 32)
    else:
        gpu = GPUTarget("hip", target, 64)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=gpu, options=launch.options)


def _tool(name: str) -> str:
    import triton.backends.nvidia

    return os.path.join(os.path.dirname(triton.backends.nvidia.__file__), "bin", name)


def _examine(compiled: Any, target: str) -> dict[str, int]:
    """Registers, stack, shared memory and instruction counts of a compiled kernel."""
    if not target.startswith("sm_"):
        text = compiled.asm["amdgcn"]
        lines = [line.strip() for line in text.splitlines() if line.startswith("\t") and not line.startswith("\t.")]
        return {
            "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1]),  # type: ignore[index]
            "stack": int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1]),  # type: ignore[index]
            "shared": compiled.metadata.shared,
            "wide_loads": len(re.findall(r"(?:global|buffer)_load_dwordx4", text)),
            "narrow_loads": len(re.findall(r"(?:global|buffer)_load_(?!dwordx4)\w+", text)),
            "tensor_core": len(re.findall(r"v_mfma", text)),
            "instructions": len(lines),
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([_tool("cuobjdump"), flag, file.name], check=True, capture_output=True, text=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)", sass, re.MULTILINE)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),  # type: ignore[index]
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),  # type: ignore[index]
        "shared": compiled.metadata.shared,
        "wide_loads": sum(i.startswith(("LDG.E.128", "LDG.E.EF.128", "LDG.E.EL.128")) for i in instructions)
        + sum(i.startswith("LDGSTS") and ".128" in i for i in instructions),
        "narrow_loads": sum(i.startswith("LDG") and ".128" not in i for i in instructions),
        "tensor_core": sum(re.match(r"[A-Z]+G?MMA\b", i) is not None for i in instructions),
        "instructions": len(instructions),
    }


def _row_bytes(launch: Launch) -> int:
    """Bytes of the rows that one program of a row kernel reads at a time; 0 for other kernels."""
    sizes = {name: x.element_size() if isinstance(x, torch.Tensor) else x for name, x in launch.arguments.items()}
    if launch.kernel.__name__ == "gather_kernel":
        return min(sizes["BLOCK_J"], sizes["J"]) * sizes["D"] * sizes["values_ptr"]
    if launch.kernel.__name__ == "merge_kernel":
        return 2 * sizes["IDW"] * min(sizes["BLOCK_K"], sizes["TOP_K"]) * sizes["HALF"] * sizes["keys_ptr"]
    if launch.kernel.__name__ == "half_grad_kernel":
        row_bytes = sizes["keys_ptr"] + sizes["STEP"] * sizes["grad_totals_ptr"]
        return min(sizes["BLOCK_K"], sizes["TOP_K"]) * sizes["HALF"] * row_bytes
    if launch.kernel.__name__ == "step_kernel":
        row_bytes = sizes["IDW"] * sizes["keys_ptr"] + sizes["GRAD"] * sizes["grad_totals_ptr"]
        return sizes["TOP_K"] * min(sizes["BLOCK_D"], sizes["HALF"]) * row_bytes
    if launch.kernel.__name__ == "read_kernel":
        return min(sizes["BLOCK_J"], sizes["J"]) * sizes["D"] * sizes["values_ptr"]
    if launch.kernel.__name__ == "read_grad_kernel":
        return min(sizes["BLOCK_J"], sizes["J"]) * sizes["D"] * (sizes["log_ptr"] + sizes["steps_ptr"])
    if launch.kernel.__name__ == "restore_kernel":
        return sizes["BLOCK_N"] * sizes["D"] * sizes["initial_ptr"]
    if launch.kernel.__name__ == "segment_kernel":
        reads_table = sizes["CENTERED"] or (sizes["EPILOGUE"] != "sum" and not sizes["BASE"])
        row_bytes = reads_table * sizes["table_ptr"] + sizes["BASE"] * sizes["base_ptr"]
        return sizes["D"] * (sizes["BLOCK_A"] * sizes["vectors_ptr"] + row_bytes)
    return 0


def report_case(name: str, target: str) -> list[Report]:
    """Compile and examine every kernel that case `name` launches."""
    # Launchers ask torch which vendor's GPUs it was built for.
    with mock.patch.object(torch.version, "hip", None if target.startswith("sm_") else target):
        case = next(case for case in cases() if case.name == name)
        with recorded_launches() as launches:
            case.run()
    reports = []
    for launch in launches:
        begin = time.perf_counter()
        compiled = compile_launch(launch, target)
        threads = compiled.metadata.num_warps * (32 if target.startswith("sm_") else 64)
        reports.append(
            Report(
                case=name,
                kernel=launch.kernel.__name__,
                target=target,
                num_warps=compiled.metadata.num_warps,
                seconds=round(time.perf_counter() - begin, 2),
                expected_wide_loads=_row_bytes(launch) // (16 * threads),
                **_examine(compiled, target),
            )
        )
    return reports


def main() -> None:
    """Print the table; with --json also write one line per kernel."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", choices=TARGETS, help="may be repeated; default sm_90")
    parser.add_argument("--case", default="", help="only cases whose name has a match of this regular expression")
    parser.add_argument("--json", help="append JSON lines to this file")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="compile this many cases at a time"
    )
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("the interpreter compiles nothing: unset TRITON_INTERPRET")
    names = [case.name for case in cases() if re.search(arguments.case, case.name)]
    work = [(name, target) for target in arguments.target or ["sm_90"] for name in names]
    columns = ("target", "case", "kernel", "registers", "stack", "shared", "num_warps", "wide_loads", "narrow_loads")
    columns += ("tensor_core", "instructions", "seconds")
    template = "{:7} {:34} {:20} " + " ".join(["{:>6}"] * (len(columns) - 3))
    print(template.format(*(c[:6] if i > 2 else c for i, c in enumerate(columns))))
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for reports in pool.map(report_case, *zip(*work, strict=True)):
            for report in reports:
                row = dataclasses.asdict(report)
                print(template.format(*(row[c] for c in columns)), flush=True)
                if arguments.json:
                    with open(arguments.json, "a") as file:
                        print(json.dumps(row), file=file)


if __name__ == "__main__":
    main()
