"""How long a chunk should take on an H100, from instructions and bytes: estimates, until somebody measures.

    python -m benchmarks.estimates

Each launch of `benchmarks.launches` is compiled for sm_90, and its time taken as the longest of: its warp instructions,
at four of them a clock and multiprocessor; its bytes, from device memory; these and what it reads again, from the L2
cache; and what a launch takes that does nothing but wait for memory twice. A launch that waits for another adds a gap.
Nothing is known here of latencies that few warps leave open, nor of pipes that are narrower than the issue of
instructions: so a kernel may take longer, hardly less.
"""

import argparse
import collections
import math
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from fwpkm_kernels import product_key_lookup
from fwpkm_kernels._commands import command

from .files import markdown_table
from .launches import FIXED_FLOORS, INFERENCE, TRAINING, Count, count
from .machine_code import compile_launch, disassemble, executed_instructions, specialize
from .record import CHUNK, PICKS, QUERY, Launch, meta, need_compiler, on_meta, step, training
from .traffic import Traffic, unknown_trips

TARGET = "sm_90"
#: Warp instructions a second: 132 multiprocessors, four a clock, 1.7 GHz under load.
ISSUE = 132 * 4 * 1.7e9
MEMORY, CACHE = 3.0e12, 5.5e12  #: bytes a second
LEAST, GAP = 2.0, 1.0  #: µs of a launch that only waits for memory; between two launches in a CUDA graph
#: What the design wants of a chunk, in µs, and what still stands in the way.
GOALS = {TRAINING[0]: 160, TRAINING[1]: 220, INFERENCE: 25}
OBSTACLES = {
    TRAINING[0]: """\
Rows of values are 98 µs of it, which no kernel can spare. Next is the lookup: its top-k and tensor core share 20 µs,
and the rows of the winners come from the cache once more. Four launches do little but wait.""",
    TRAINING[1]: """\
Rows of values are 101 µs. Sub-keys that were picked come from the cache three times: in `step_grad_kernel` beside the
gradient of their totals, in `half_grad_kernel` and, as queries, in `key_sum_kernel`. Three launches do little but wait;
two of them plan picks that forward has planned.""",
    INFERENCE: """\
Every launch waits for another, and most only for memory: seven of them make the lane of addresses, the longest one.
Launches that start before the last one has ended (programmatic dependent launch) hide a part of the gaps on an H200.
`plan_chunk_kernel` compares all accesses with all.""",
}


class Estimate(NamedTuple):
    """A kernel, or an operator of PyTorch, in one kind of work: its launches in a chunk, and all of them together."""

    work: str
    stage: str
    name: str
    launches: float
    instructions: float  #: millions of a warp; 0 for operators, whose code nobody sees
    megabytes: float
    again: float
    micros: float
    bound: str


def warp_instructions(launch: Launch) -> float:
    """Of all programs of a launch."""
    compiled = compile_launch(launch, TARGET)
    (kernel,) = disassemble([compiled.asm["cubin"]], TARGET)
    executed = executed_instructions(kernel, unknown=unknown_trips(launch))
    assert executed is not None
    return executed * compiled.metadata.num_warps * math.prod(launch.grid)


def launch_micros(instructions: float, traffic: Traffic) -> tuple[float, str]:
    """µs of one launch, and what they are bound by."""
    moved = traffic.read + traffic.written
    times = {
        "instructions": 1e6 * instructions / ISSUE,
        "memory": 1e6 * moved / MEMORY,
        "cache": 1e6 * (moved + traffic.again) / CACHE,
        "latency": LEAST,
    }
    bound = max(times, key=lambda name: times[name])
    return times[bound] + GAP, bound


def _of_work(work: str) -> list[Estimate]:
    """A chunk of a sequence that has more before and after it, or a step."""

    def several(chunks: int) -> list[Count]:
        return [count(part) for part in training(8, chunks * CHUNK)][TRAINING.index(work)]

    with on_meta():
        # Of the third chunk: what three have more than two.
        parts = [(1, count(step(CHUNK, CHUNK)))] if work == INFERENCE else [(1, several(3)), (-1, several(2))]
    sums: dict[tuple[str, str], Tensor] = {}
    bounds: dict[tuple[str, str], str] = {}
    known: dict[str, float] = {}
    for sign, x in ((sign, x) for sign, counts in parts for x in counts):
        instructions = 0.0
        if x.launch is not None:
            alike = str((x.name, x.launch.grid, specialize(x.launch), x.launch.options))
            instructions = known[alike] = known.get(alike) or warp_instructions(x.launch)
        key = (x.stage, x.name)
        micros, bounds[key] = launch_micros(instructions, x.traffic)
        moved = x.traffic.read + x.traffic.written
        numbers = (1.0, instructions / 1e6, moved / 1e6, x.traffic.again / 1e6, micros)
        sums[key] = sums.get(key, 0.0) + sign * torch.tensor(numbers, dtype=torch.float64)
    return [Estimate(work, *key, *row.tolist(), bounds[key]) for key, row in sums.items() if row[0] > 0.01]


def lookup_micros(num_keys: int) -> float:
    """µs of the lookup of a training chunk in so many sub-keys of each half."""
    queries, keys = meta(8 * CHUNK, 1, QUERY), meta(1, 2, num_keys, QUERY // 2)
    with on_meta():
        counts = count(lambda: product_key_lookup(queries, keys, PICKS))
    return sum(launch_micros(warp_instructions(x.launch), x.traffic)[0] for x in counts if x.launch is not None)


def of_the_whole(every: list[Estimate]) -> list[tuple[str, float, float]]:
    """Other goals of the design, by these estimates: what, µs estimated, µs wanted."""
    training = sum(x.micros for x in every if x.work in TRAINING)
    once = sum(FIXED_FLOORS.values()) / MEMORY * 1e6
    _, among_others = on_lanes([x for x in every if x.work == INFERENCE])
    return [
        ("8×4096 tokens, forward + backward, with the copy and the gradient of the table", 8 * training + once, 3600),
        ("128K tokens, batch 1, in graphs of several chunks", 256 * among_others, 7000),
        ("lookup of a training chunk at n = 4096; 1.5 × 8 × its floor at n = 512", lookup_micros(4096), 192),
    ]


def estimates(pool: ProcessPoolExecutor | None = None) -> list[Estimate]:
    """Every launch of a training chunk, forward and backward, and of a step of one chunk."""
    works = (*TRAINING, INFERENCE)
    return [x for part in (pool.map if pool else map)(_of_work, works) for x in part]


def on_lanes(rows: list[Estimate]) -> tuple[float, float]:
    """µs of a chunk of a streaming step in a CUDA graph: alone, and each of many, whose lanes overlap.

    There a chunk's plan and values run beside its addresses (`fwpkm_kernels.lanes.Lanes`).
    """
    spent = collections.defaultdict[str, float](float)
    for x in rows:
        spent[x.stage] += x.micros
    found, values = spent["queue"] + spent["lookup"], spent["read"] + spent["write"]
    alone = found + max(spent["key step"], max(spent["plan"], spent["read"]) + spent["write"])
    return alone, max(found + spent["key step"], spent["plan"], values)


def markdown(every: list[Estimate]) -> str:
    """The part of the committed table."""
    parts = [
        f"""\
## Estimates, not measurements

`python -m benchmarks.estimates`: of an H100, from what is above, for the sizes of *launches and bytes*. A launch takes
the longest of its warp instructions at {ISSUE / 1e12:.2f}·10¹² a second, its bytes at {MEMORY / 1e12:.1f} TB/s, these
and what it reads again at {CACHE / 1e12:.1f} TB/s, and {LEAST:.0f} µs; and a gap of {GAP:.0f} µs comes before it. What
this knows nothing of, such as latencies that few warps leave open, makes a kernel slower. What a sequence takes once,
whatever its length, is not in it: its sort, its copies."""
    ]
    columns = ["kernel", "launches", "warp instructions, M", "MB", "MB again", "µs", "bound by"]
    for work in dict.fromkeys(x.work for x in every):
        rows = [x for x in every if x.work == work]
        cells = []
        for x in rows:
            numbers = (f"{number:.1f}" for number in (x.megabytes, x.again, x.micros))
            millions = f"{x.instructions:.1f}" if x.instructions else "–"
            cells.append((x.stage, x.name, round(x.launches), millions, *numbers, x.bound))
        text = f"{sum(x.micros for x in rows):.0f} µs estimated, the goal is {GOALS[work]} µs."
        if work == INFERENCE:
            alone, among_others = on_lanes(rows)
            text += f" In a graph lanes overlap: {alone:.0f} µs alone, {among_others:.0f} µs among other chunks."
        table = markdown_table(["stage", *columns], cells, texts=2)
        parts.append(f"### {work[0].upper()}{work[1:]}\n\n{text} {OBSTACLES[work]}\n\n{table}")
    whole = [(name, f"{micros:.0f}", goal) for name, micros, goal in of_the_whole(every)]
    parts.append("### Of the whole\n\n" + markdown_table(["", "µs estimated", "goal"], whole))
    return "\n\n".join(parts) + "\n"


@command("estimates")
def main() -> int:
    """Print the tables. Returns the exit status."""
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    need_compiler()
    print(markdown(estimates()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
