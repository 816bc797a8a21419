"""Compile a noted launch for a GPU that is not here, and read the machine code that comes out."""

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


def tool(name: str) -> str:
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
        command = [tool("nvdisasm"), "--binary", architecture, file.name]
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


def is_tensor_core(instruction: Instruction) -> bool:
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


def executed_instructions(kernel: list[Instruction], *, unknown: float | None = None) -> float | None:
    """Instructions that a warp executes; None where a loop does not say how often it runs.

    Every instruction once, taken branch or not, and those in a loop as often as it runs: `unknown` times, where that is
    given and the loop does not say.
    """
    kernel = _to_the_end(kernel)
    times: list[float] = [1] * len(kernel)
    for begin, end in _loops(kernel):
        trips = _trips(kernel, begin, end) or unknown
        if trips is None or trips < 1:
            return None
        times[begin : end + 1] = [x * trips for x in times[begin : end + 1]]
    return sum(times)
