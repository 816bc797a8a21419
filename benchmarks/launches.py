"""What a chunk of the memory launches and how many bytes that moves, counted without a GPU.

    python -m benchmarks.launches [--json FILE]

The memory's public functions run on meta tensors of the paper's sizes. Triton kernels are noted instead of run, and a
dispatch mode sees every operator of PyTorch. Each is counted once, launches and bytes, though a sort, a running sum or
a sum at indices is several kernels on a GPU; views and allocations are not.

Bytes of an operator are its inputs and outputs, those of a kernel have a formula each in `traffic`.
"""

import argparse
import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fwpkm_kernels._commands import check_outputs, command, write_output

from .files import markdown_table
from .record import (
    CHUNK,
    NUM_KEYS,
    NUM_SLOTS,
    PICKS,
    QUERY,
    WIDTH,
    Launch,
    need_compiler,
    on_meta,
    recorded_launches,
    step,
    training,
)
from .traffic import Traffic, distinct, of_launch, size

BANDWIDTH = 3.0e12  # bytes a second, of an H100


class Count(NamedTuple):
    """One launch."""

    name: str
    stage: str
    traffic: Traffic
    #: of a Triton kernel; None of an operator
    launch: Launch | None


#: The functions that make a stage: the outermost of them that is running counts.
STAGES = {
    "lookup": ("lookup_halves", "look_up"),
    "queue": ("enqueue", "_carry"),
    "plan": ("_plan_pairs", "number_reads", "plan_reads", "plan_segments", "count_accesses", "plan_writes"),
    "compact table": ("compact", "take_rows", "put_rows"),
    "read": ("read_to_queue", "read_sessions", "read", "gather_rows"),
    "key step": ("step_keys",),
    "weights": (
        *("weigh", "fold", "weigh_again", "fold_grad", "step_ratio", "write_scale", "fold_write_weights"),
        *("weigh_grad", "fold_write_weights_grad"),
    ),
    "write": ("write",),
    "read and write backward": ("_read_grad",),
    "table gradient": ("_add_rows",),
    "lookup and key step backward": ("address_grad",),
}
_STAGE_OF = {function: stage for stage, functions in STAGES.items() for function in functions}

#: Allocations, and views that their schema does not call so.
_NO_LAUNCH = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "_reshape_alias"),
}
#: These write their first argument without reading it, at indices as much as they are given.
_OVERWRITE = {"copy_", "zero_", "fill_", "index_fill_", "scatter_", "index_put_"}
#: These read as much of their first argument as they return.
_PICK = {"index", "gather", "index_select"}


def stage() -> str:
    """The stage that is running."""
    frames = [frame.f_code for frame, _ in traceback.walk_stack(None)]
    names = [code.co_name for code in frames if f"{os.sep}fwpkm_kernels{os.sep}" in code.co_filename]
    return next((_STAGE_OF[name] for name in reversed(names) if name in _STAGE_OF), "around")


def _tensors(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    return [y for part in x for y in _tensors(part)] if isinstance(x, (list, tuple)) else []


def _of_operator(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Traffic:
    inputs, outputs = _tensors(args), _tensors(result)
    if "out" in kwargs:
        outputs = [kwargs["out"]]
    if name in _OVERWRITE:
        if name in ("scatter_", "index_fill_"):
            moved = inputs[1].numel() * inputs[0].itemsize
        else:
            moved = size(inputs[-1] if name == "index_put_" else inputs[0])
        return Traffic(size(*inputs[1:]), moved)
    if name in _PICK:
        return Traffic(size(*outputs) + size(*inputs[1:]), size(*outputs))
    unique = {id(x): x for x in inputs}
    return Traffic(size(*unique.values()), size(*outputs))


class _Operators(TorchDispatchMode):
    """Notes every operator that launches something."""

    def __init__(self, counts: list[Count]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        # The alias of a view is not one that is written.
        is_view = any(x.alias_info is not None and not x.alias_info.is_write for x in func._schema.returns)
        on_device = [x for x in _tensors(result) if x.is_meta and x.numel() > 0]
        if on_device and not is_view and name not in _NO_LAUNCH:
            self.counts.append(Count(name, stage(), _of_operator(name, args, kwargs, result), None))
        return result


def count(function: Callable[[], Any]) -> list[Count]:
    """What a function launches; to be called within `on_meta`."""
    counts: list[Count] = []

    def note(launch: Launch) -> None:
        counts.append(Count(launch.name, stage(), of_launch(launch), launch))

    with recorded_launches(note), _Operators(counts):
        function()
    return counts


class Row(NamedTuple):
    """A stage of one kind of work."""

    work: str
    stage: str
    #: launches of Triton kernels and of operators, for each chunk or step
    kernels: float
    operators: float
    #: megabytes for each chunk or step
    read: float
    written: float
    again: float
    floor: float
    #: launches and megabytes that a sequence has once, however long it is
    fixed_launches: float
    fixed_bytes: float


TRAINING = ("training, forward", "training, backward")
INFERENCE, DECODE = "inference, one chunk", "decode, one token"
#: Floors that the design names for a chunk, in µs: from bytes and from arithmetic.
DESIGN_FLOORS = {TRAINING[0]: 110, TRAINING[1]: 160, INFERENCE: 12}
#: What a training sequence moves at least, besides its chunks: a copy of the table, and a gradient that starts at zero.
TABLE_BYTES = NUM_SLOTS * WIDTH * 4
FIXED_FLOORS = {TRAINING[0]: 2 * TABLE_BYTES, TRAINING[1]: TABLE_BYTES}


def floors(work: str) -> dict[str, float]:
    """Bytes that each stage moves at least: inputs read once, outputs written once, of the table the rows met.

    The rows that a chunk reads do not fit the L2 cache and are read again to be written. What is small stays in it.
    """
    tokens = {INFERENCE: CHUNK, DECODE: 1}.get(work, 8 * CHUNK)
    rows, vector = distinct(tokens * PICKS, NUM_SLOTS) * WIDTH * 4, tokens * WIDTH * 4
    queries, keys = tokens * QUERY * 4, NUM_KEYS * QUERY * 4
    if work == TRAINING[1]:
        return {
            "read and write backward": 2 * rows + 4 * vector,
            "table gradient": 2 * rows,
            "lookup and key step backward": 2 * queries + 3 * keys,
        }
    lookup = {"lookup": queries + keys}
    if work == DECODE:
        return lookup | {"read": rows + vector}
    write = {"key step": keys, "write": (3 if work == TRAINING[0] else 2) * rows}
    return lookup | write | {"read": rows + 3 * vector}


def _sums(function: Callable[[], Any]) -> dict[str, Tensor]:
    """For each stage of a function: kernels, operators, megabytes read, written and read again."""
    sums: dict[str, Tensor] = {}
    for x in count(function):
        is_kernel, megabytes = x.launch is not None, (moved / 1e6 for moved in dataclasses.astuple(x.traffic))
        row = torch.tensor([is_kernel, not is_kernel, *megabytes], dtype=torch.float64)
        sums[x.stage] = sums.get(x.stage, 0.0) + row
    return sums


def rows() -> list[Row]:
    """Count everything."""
    result = []

    def add(work: str, per_chunk: dict[str, Tensor], once: dict[str, Tensor]) -> None:
        floor = floors(work)
        for name in (name for name in (*STAGES, "around") if name in per_chunk):
            launches, moved = once[name].split([2, 3])
            of_chunk = (*per_chunk[name].tolist(), floor.get(name, 0.0) / 1e6)
            result.append(Row(work, name, *of_chunk, float(launches.sum()), float(moved[:2].sum())))

    with on_meta():
        # The first chunk of a sequence has nothing to read again, the others are alike.
        one, eight = (map(_sums, training(8, chunks * CHUNK)) for chunks in (1, 8))
        for work, first, every in zip(TRAINING, one, eight, strict=True):
            per_chunk = {name: (every[name] - first.get(name, 0.0)) / 7 for name in every}
            add(work, per_chunk, {name: first.get(name, 0.0) - per_chunk[name] for name in every})
        for work, tokens, position in ((INFERENCE, CHUNK, CHUNK), (DECODE, 1, CHUNK + 100)):
            per_chunk = _sums(step(tokens, position))
            add(work, per_chunk, {name: torch.zeros(5) for name in per_chunk})
    return result


def totals(rows: list[Row]) -> list[Row]:
    """The sums of each kind of work."""
    works = dict.fromkeys(row.work for row in rows)
    return [
        Row(work, "total", *(sum(x) for x in zip(*(row[2:] for row in rows if row.work == work), strict=True)))
        for work in works
    ]


def _cells(row: Row) -> list[str]:
    def number(x: float) -> str:
        return f"{x:.1f}" if abs(x) < 9.95 and round(x, 1) % 1 else f"{round(x)}"

    ratio = f"{(row.read + row.written) / row.floor:.2f}" if row.floor else "–"
    once = [row.fixed_launches, row.fixed_bytes] if row.work in TRAINING else []
    return [row.stage, *map(number, row[2:8]), ratio, *map(number, once)]


def _micros(megabytes: float) -> float:
    return megabytes * 1e12 / BANDWIDTH


def markdown(every: list[Row]) -> str:
    """The part of the committed table."""
    parts = [
        f"""\
## Launches and bytes of a chunk

Counted by `python -m benchmarks.launches`, which says how: n = {NUM_KEYS}, K = {PICKS}, Dk = D = {WIDTH}, float32,
uniform slots. A training chunk is {8 * CHUNK} tokens; its figures are a seventh of what eight chunks take more than
one. *Once* is what is left of one: what a sequence takes, however long (less than 0 where a first chunk takes less
than others). Inference is a step of {CHUNK} tokens, decoding one of 1.

- *kernels*: launches of Triton kernels; *operators* of PyTorch: each at least one launch.
- *read*, *written*: megabytes from and to device memory, if nothing stays in the caches between launches.
- *again*: megabytes that a launch reads again, from the caches.
- *floor*: megabytes that have to move, see `floors` there; *ratio*: read and written over that."""
    ]
    for total in totals(every):
        work, moved = total.work, total.read + total.written
        spent = f"{_micros(moved):.1f} µs of bytes at 3.0 TB/s, floor {_micros(total.floor):.1f} µs"
        if work in DESIGN_FLOORS:
            of_design = "with the arithmetic of the lookup and what the design counts besides"
            spent += f", or {DESIGN_FLOORS[work]} µs {of_design}"
        if work in FIXED_FLOORS:
            spent += f"; once {_micros(total.fixed_bytes):.0f} µs, floor {_micros(FIXED_FLOORS[work] / 1e6):.0f} µs"
        columns = ["stage", "kernels", "operators", "read", "written", "again", "floor", "ratio"]
        columns += ["launches, once", "MB, once"] if work in TRAINING else []
        table = markdown_table(columns, [_cells(row) for row in [*every, total] if row.work == work])
        parts.append(f"### {work[0].upper()}{work[1:]}\n\n{spent}.\n\n{table}")
    return "\n\n".join(parts) + "\n"


@command("launches")
def main() -> int:
    """Print the tables; with --json also write a line for each stage and total. Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", help="write JSON lines to this file")
    arguments = parser.parse_args()
    need_compiler()
    check_outputs(arguments.json)
    every = rows()
    print(markdown(every))
    if arguments.json:
        write_output(arguments.json, "".join(json.dumps(row._asdict()) + "\n" for row in every + totals(every)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
