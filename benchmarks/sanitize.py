"""Launch every kernel once or twice at small, odd sizes: python -m benchmarks.sanitize

For compute-sanitizer, under which a launch costs a hundred times as much: `make gpu` runs this under memcheck and
racecheck. Nothing is compared here; that the numbers are right is what the tests are for.
"""

import glob
import os
import re
import shutil
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from fwpkm_kernels import (
    MemoryState,
    chunk_value_update,
    chunk_value_update_,
    fast_weight_memory,
    fast_weight_memory_step,
    product_key_lookup,
    product_key_update,
    sparse_value_gather,
    testing,
)
from fwpkm_kernels._commands import command

#: Odd, so that every tile has lanes that must be masked.
TOKENS, HEADS, SUB_KEYS, PICKS, HALF, WIDTH, CHUNK = 21, 2, 13, 3, 5, 11, 6

#: Each tool, and what its last line says of the errors that it found; and how a finding begins.
TOOLS = {
    "memcheck": r"ERROR SUMMARY: (\d+) errors?",
    "racecheck": r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?",
}
FINDING = r"^=+ +(?:Invalid|Misaligned|Error: Race)"
TOOL_OPTIONS = ["--target-processes", "application-only", "--report-api-errors", "no", "--print-limit", "20"]


def find_sanitizer() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), *sorted(glob.glob("/usr/local/cuda*"))]
    places = [os.path.join(home, place) for home in filter(None, homes) for place in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *places]))


#: A race that is none: lanes that hold the same element of a sum all store it, one instruction, though the last bit may
#: differ where a lane has fused its own product into an addition (triton-lang/triton#7264). The hardware lets the same
#: lane win each time. Where a barrier is missing, reads and writes meet, or instructions of two places do.
SAME_STORE = re.compile(r"^=+ +Error: Race reported between (Write access at .*)\n=+ +and \1 \[", re.M)


def errors_found(tool: str, text: str) -> tuple[int, bool]:
    """How many errors a tool has found, and whether it came to its end."""
    found = re.findall(TOOLS[tool], text)
    count = int(found[-1]) if found else len(re.findall(FINDING, text, re.M))
    return count - len(SAME_STORE.findall(text)), bool(found)


def run(device: str, backend: str = "auto") -> None:
    """Every public operation forward and backward, and a memory that is streamed and reset."""

    def normal(*shape: int, seed: int = 0) -> Tensor:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
        return x.requires_grad_()

    def backward(*outputs: Tensor) -> None:
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])

    queries, keys = normal(TOKENS, HEADS, 2 * HALF), normal(HEADS, 2, SUB_KEYS, HALF, seed=1)
    values, targets = normal(SUB_KEYS**2, WIDTH, seed=2), normal(TOKENS, WIDTH, seed=3)
    for score in ("idw", "dot"):
        scores, _ = product_key_lookup(queries, keys, PICKS, score=score, backend=backend)
        backward(scores)
    backward(product_key_update(keys, queries, top_k=PICKS, backend=backend))

    # One slot for all, so that it is written in pieces; and slots of their own.
    for pattern, options in (("uniform", {"clip": 0.5}), ("one_slot", {"weight_decay": 0.1})):
        slots = testing.make_slots((TOKENS, 8), SUB_KEYS**2, pattern, seed=4).to(device)
        weights = normal(TOKENS, 8, seed=5)
        predictions = sparse_value_gather(values, slots, weights, backend=backend)
        backward(chunk_value_update(values, slots, weights, targets, predictions, **options, backend=backend))
        with torch.no_grad():
            chunk_value_update_(values.clone(), slots, weights, targets, predictions, **options, backend=backend)

    options = {"chunk_size": CHUNK, "top_k": PICKS, "clip": 1.0, "backend": backend}
    sequence = queries.unsqueeze(0), targets.unsqueeze(0)
    result = fast_weight_memory(*sequence, keys, values, **options)
    backward(result.output, result.keys, result.values)
    state = MemoryState(keys, values)
    for begin, end in ((0, 1), (1, TOKENS)):
        fast_weight_memory_step(state, *(x[:, begin:end].detach() for x in sequence), **options)
    state.reset(touched_rows_only=True)
    if device == "cuda":
        torch.cuda.synchronize()


@command("sanitize")
def main(argv: Sequence[str] | None = None) -> int:
    """Run it on the GPU; returns the exit status, 2 if there is none."""
    if not torch.cuda.is_available():
        print("no GPU is visible to torch", file=sys.stderr)
        return 2
    run("cuda")
    print("every kernel was launched")
    return 0


if __name__ == "__main__":
    sys.exit(main())
