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
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fwpkm_kernels._commands import check_outputs, command, need, write_output

from .record import (
    CHUNK,
    NUM_KEYS,
    NUM_SLOTS,
    PICKS,
    QUERY,
    WIDTH,
    Launch,
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
    "lookup": ("lookup_halves", "_look_up"),
    "queue": ("_enqueue", "_carry"),
    "plan": ("_plan_pairs", "number_reads", "plan_reads", "plan_segments", "count_accesses", "plan_writes"),
    "read": ("read_to_queue", "read", "gather_rows"),
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
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "_reshape_alias",
}
#: These write their first argument without reading it, at indices as much as they are given.
_OVERWRITE = {"copy_", "zero_", "fill_", "index_fill_", "scatter_", "index_put_"}
#: These read as much of their first argument as they return.
_PICK = {"index", "gather", "index_select"}


def callers() -> list[str]:
    """The functions of the package that are running, the outermost first."""
    names, frame = [], sys._getframe(1)
    while frame is not None:
        if f"{os.sep}fwpkm_kernels{os.sep}" in frame.f_code.co_filename:
            names.append(frame.f_code.co_name)
        frame = frame.f_back  # type: ignore[assignment]
    return names[::-1]


def stage() -> str:
    """The stage that is running."""
    return next((_STAGE_OF[name] for name in callers() if name in _STAGE_OF), "around")


def _tensors(x: Any) -> list[torch.Tensor]:
    if isinstance(x, torch.Tensor):
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


def _sums(counts: list[Count]) -> dict[str, list[float]]:
    """For each stage: kernels, operators, megabytes read, written and read again."""
    sums: dict[str, list[float]] = {}
    for x in counts:
        row = sums.setdefault(x.stage, [0.0] * 5)
        moved = (x.launch is not None, x.launch is None, *(y / 1e6 for y in dataclasses.astuple(x.traffic)))
        row[:] = [a + b for a, b in zip(row, moved, strict=True)]
    return sums


def rows() -> list[Row]:
    """Count everything."""
    result = []

    def add(work: str, per_chunk: dict[str, list[float]], fixed: dict[str, list[float]]) -> None:
        floor = floors(work)
        order = [*STAGES, "around"]
        for name in sorted(per_chunk, key=order.index):
            kernels, operators, read, written, again = per_chunk[name]
            once = fixed.get(name, [0.0] * 5)
            moved = (read, written, again, floor.get(name, 0.0) / 1e6)
            result.append(Row(work, name, kernels, operators, *moved, sum(once[:2]), sum(once[2:4])))

    with on_meta():
        # The first chunk of a sequence has nothing to read again, the others are alike.
        counted = []
        for chunks in (1, 8):
            counted.append([_sums(count(part)) for part in training(8, chunks * CHUNK)])
        for work, one, eight in zip(TRAINING, *counted, strict=True):
            per_chunk = {name: [(b - a) / 7 for a, b in zip(one[name], eight[name], strict=True)] for name in eight}
            fixed = {name: [a - b for a, b in zip(one[name], per_chunk[name], strict=True)] for name in eight}
            add(work, per_chunk, fixed)
        add(INFERENCE, _sums(count(step(CHUNK, CHUNK))), {})
        add(DECODE, _sums(count(step(1, CHUNK + 100))), {})
    return result


def totals(rows: list[Row]) -> list[Row]:
    """The sums of each kind of work."""
    works = dict.fromkeys(row.work for row in rows)
    return [
        Row(work, "total", *(sum(x) for x in zip(*(row[2:] for row in rows if row.work == work), strict=True)))
        for work in works
    ]


def _lines(rows: list[Row]) -> list[str]:
    def number(x: float) -> str:
        return f"{x:.1f}" if abs(x) < 9.95 and round(x, 1) % 1 else f"{round(x)}"

    lines = []
    for row in rows:
        moved = row.read + row.written
        cells = [row.stage, *map(number, (row.kernels, row.operators, row.read, row.written, row.again))]
        cells += [number(row.floor), f"{moved / row.floor:.2f}" if row.floor else "–"]
        cells += [number(row.fixed_launches), number(row.fixed_bytes)] if row.work in TRAINING else []
        lines.append("| " + " | ".join(cells) + " |")
    return lines


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
        work = total.work
        spent = (
            f"{_micros(total.read + total.written):.1f} µs of bytes at 3.0 TB/s, floor {_micros(total.floor):.1f} µs"
        )
        if work in DESIGN_FLOORS:
            spent += (
                f", or {DESIGN_FLOORS[work]} µs with the arithmetic of the lookup and what the design counts besides"
            )
        if work in FIXED_FLOORS:
            spent += f"; once {_micros(total.fixed_bytes):.0f} µs, floor {_micros(FIXED_FLOORS[work] / 1e6):.0f} µs"
        head = "| stage | kernels | operators | read | written | again | floor | ratio |"
        head += " launches, once | MB, once |" if work in TRAINING else ""
        lines = [head, "|---|" + "--:|" * (head.count("|") - 2)]
        lines += _lines([row for row in every if row.work == work] + [total])
        parts.append(f"### {work[0].upper()}{work[1:]}\n\n{spent}.\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _micros(megabytes: float) -> float:
    return megabytes * 1e12 / BANDWIDTH


@command("launches")
def main() -> int:
    """Print the tables; with --json also write a line for each stage and total. Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", help="write JSON lines to this file")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("the interpreter launches nothing: unset TRITON_INTERPRET")
    need("triton", "triton")
    check_outputs(arguments.json)
    every = rows()
    print(markdown(every))
    if arguments.json:
        write_output(arguments.json, "".join(json.dumps(row._asdict()) + "\n" for row in every + totals(every)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
