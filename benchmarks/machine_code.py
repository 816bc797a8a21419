"""Compile a noted launch for a GPU that is not here, and read the machine code that comes out."""

import itertools
import math
import os
import re
import struct
import subprocess
import tempfile
from typing import Any, NamedTuple

import torch

from .record import Launch

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


def _run_tool(name: str, *arguments: str) -> str:
    """What a tool of NVIDIA's in Triton's package prints."""
    import triton.backends.nvidia

    path = os.path.join(os.path.dirname(triton.backends.nvidia.__file__), "bin", name)
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


class Instruction(NamedTuple):
    """One line of a disassembly; its address counts from the first of the first kernel."""

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
        text = _run_tool("nvdisasm", "--binary", architecture, file.name).replace(".reuse", "")
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?\w+) )?\s*([A-Z][\w.]*)([^;]*);", text, re.MULTILINE)
    instructions = [Instruction(int(address, 16), *rest) for address, *rest in lines]
    assert len(lines) * 16 == sum(map(len, codes)), "the disassembly is not of 16 bytes an instruction"
    kernels = []
    for end, code in zip(itertools.accumulate(map(len, codes)), codes, strict=True):
        kernel = instructions[(end - len(code)) // 16 : end // 16]
        while kernel[-1].name == "NOP" or _target(kernel[-1]) == kernel[-1].address:
            kernel.pop()
        kernels.append(kernel)
    return kernels


def _target(instruction: Instruction) -> int | None:
    """Where a branch goes; None if it does not say, and of what is no branch."""
    found = re.search(r"0x([0-9a-f]+)", instruction.operands) if instruction.name.startswith("BRA") else None
    return int(found[1], 16) if found else None


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
        copied = re.match(rf" {predicate}, .*\b(UP\d)", test.operands)
        if test.name.startswith("PLOP3") and copied:
            predicate = copied[1]
            # Bit 7 of the table is the result for three operands that are true.
            cleared = re.compile(rf" {predicate}, UPT, UPT, UPT, UPT, 0x[0-7]?[0-9a-f],")
            if any(x.name.startswith("UPLOP3") and cleared.match(x.operands) for x in body[at_test:]):
                return 2
        compared = re.match(rf" {predicate}, U?PT, (U?R\d+), 0x([0-9a-f]+)\b", test.operands)
        if re.match(r"U?ISETP\.(NE|LT|GE)\b", test.name) and compared:
            counter, limit = compared[1], int(compared[2], 16)
            first = _number(kernel[:begin], counter)
            for at_step, step in enumerate(body):
                added = re.match(rf" {counter}, (?:U?P\w+, )*{counter}, 0x([0-9a-f]+)\b", step.operands)
                if re.match(r"U?IADD|VIADD", step.name) and added and first is not None:
                    return (limit - first) // int(added[1], 16) + (at_test < at_step)
    return None


def executed_instructions(kernel: list[Instruction], *, unknown: float | None = None) -> float | None:
    """Instructions that a warp executes; None where a loop does not say how often it runs.

    Every instruction once, taken branch or not, and those in a loop as often as it runs: `unknown` times, where that is
    given and the loop does not say. What stands behind the last EXIT, such as waiting for a barrier, is left out.
    """
    kernel = kernel[: max(i for i, instruction in enumerate(kernel) if instruction.name == "EXIT") + 1]
    indices = {instruction.address: i for i, instruction in enumerate(kernel)}
    times: list[float] = [1] * len(kernel)
    for end, branch in enumerate(kernel):
        begin = indices.get(_target(branch), end)
        if begin < end:  # a loop
            trips = _trips(kernel, begin, end) or unknown
            if trips is None or trips < 1:
                return None
            times[begin : end + 1] = [x * trips for x in times[begin : end + 1]]
    return sum(times)


#: What a multiprocessor holds at a time (CUDA C++ programming guide, technical specifications): warps, blocks and
#: registers of every target, and bytes of shared memory.
WARPS, BLOCKS, REGISTERS = 64, 32, 65536
SHARED = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}


def occupancy(target: str, registers: int, shared: int, num_warps: int) -> float:
    """Most warps of a kernel that a multiprocessor can hold, of those that it can hold of any."""
    # Registers go to warps in units of 256 and to four warps at a time; a block has 1 KB of shared memory of its own.
    warps = REGISTERS // (math.ceil(registers * 32 / 256) * 256) // 4 * 4
    by_shared = SHARED[target] // (math.ceil(shared / 128) * 128 + 1024)
    return min(BLOCKS, WARPS // num_warps, warps // num_warps, by_shared) * num_warps / WARPS


def _examine_nvidia(compiled: Any, kernel: list[Instruction], target: str) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run_tool("cuobjdump", "-res-usage", file.name)
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    names = [instruction.name for instruction in kernel]
    loads = [".128" in name for name in names if name.startswith("LDG")]  # LDGSTS too, which loads to shared memory
    stores = [".128" in name for name in names if name.startswith("STG")]
    return {
        "registers": registers,
        "stack": stack,
        "spills": sum(name.startswith(("LDL", "STL")) for name in names),
        "occupancy": occupancy(target, registers, compiled.metadata.shared, compiled.metadata.num_warps),
        "wide_loads": loads.count(True),
        "narrow_loads": loads.count(False),
        "wide_stores": stores.count(True),
        "narrow_stores": stores.count(False),
        "tensor_core": sum(re.match(r"[A-Z]+G?MMA\b", name) is not None for name in names),
        "instructions": len(kernel),
        "executed": executed_instructions(kernel),
    }


def _examine_amd(compiled: Any) -> dict[str, Any]:
    text, shared = compiled.asm["amdgcn"], compiled.metadata.shared

    def number(pattern: str) -> int:
        return int(re.search(pattern, text)[1])

    def count(pattern: str) -> int:
        return len(re.findall(pattern, text, re.MULTILINE))

    waves = number(r"; Occupancy: (\d+)")  # of a SIMD, by its registers
    if shared > 0:  # 64 KB, of four SIMDs
        waves = min(waves, 65536 // shared * compiled.metadata.num_warps // 4)
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
        "instructions": count(r"^\t[^.;]"),
        "executed": None,
    }


def examine(kernels: list[Any], target: str) -> list[dict[str, Any]]:
    """Registers, stack and instruction counts of compiled kernels: fields of `benchmarks.compiled.Report`."""
    if not target.startswith("sm_"):
        return [_examine_amd(kernel) for kernel in kernels]
    codes = disassemble([kernel.asm["cubin"] for kernel in kernels], target)
    return [_examine_nvidia(kernel, code, target) for kernel, code in zip(kernels, codes, strict=True)]
