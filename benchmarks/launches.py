"""What a chunk of the memory launches and how many bytes that moves, counted without a GPU.

    python -m benchmarks.launches [--json FILE]

The memory's public functions run on meta tensors of the paper's sizes. Triton kernels are noted instead of run, and a
dispatch mode sees every operator of PyTorch. Each is counted once, launches and bytes, though a sort, a running sum or
a sum at indices is several kernels on a GPU; views and allocations are not.

Bytes are those that a launch reads from and writes to device memory if nothing stays in the caches from one launch to
the next, and everything that it reads again itself does: for an operator its inputs and outputs, for a kernel
`TRAFFIC`. Slots are taken to be uniform, A accesses to N rows meeting N·(1 - (1 - 1/N)^A) different ones.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
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

BANDWIDTH = 3.0e12  # bytes a second, of an H100


class Traffic(NamedTuple):
    """Bytes that a launch moves."""

    read: float
    written: float
    #: what it reads again, from the caches
    again: float = 0.0


class Count(NamedTuple):
    """One launch."""

    name: str
    stage: str
    traffic: Traffic
    is_triton: bool


def distinct(accesses: float, rows: int) -> float:
    """How many of `rows` rows so many uniform accesses meet, on average."""
    return -rows * math.expm1(accesses * math.log1p(-1.0 / rows)) if rows > 1 else min(accesses, rows)


def size(*tensors: torch.Tensor) -> int:
    """Bytes of the different elements of tensors: an expanded one has few."""
    lengths = ([n for n, stride in zip(x.shape, x.stride(), strict=True) if stride != 0] for x in tensors)
    return sum(math.prod(n) * x.itemsize for n, x in zip(lengths, tensors, strict=True))


def _rows(accesses: float, table: torch.Tensor, num_rows: int, width: int) -> tuple[float, float]:
    """Bytes that accesses to rows of a table read from memory, and from the caches."""
    row, met = width * table.itemsize, distinct(accesses, num_rows)
    return met * row, (accesses - met) * row


def _half_topk(x: Any) -> Traffic:
    queries, keys = size(x.queries_ptr), size(x.keys_ptr)
    candidates = x.M * x.grid[2] * x.SPLITS * x.TOP_K * (x.candidate_ptr.itemsize + x.column_ptr.itemsize)
    return Traffic(queries + keys, candidates, (x.SPLITS - 1) * queries + (x.grid[0] - 1) * keys)


def _merge(x: Any) -> Traffic:
    halves = x.grid[0] * 2
    candidates = halves * x.TOP_K * x.SPLITS * (x.candidate_ptr.itemsize + x.column_ptr.itemsize)
    results = size(x.half_scores_ptr, x.sub_keys_ptr, x.scores_ptr, x.slots_ptr)
    results += (x.WEIGHTING != "none") * size(x.weights_ptr)
    if not x.IDW:
        return Traffic(candidates, results)
    keys, again = _rows(halves * x.TOP_K, x.keys_ptr, x.keys_ptr.numel() // x.HALF, x.HALF)
    return Traffic(candidates + size(x.queries_ptr) + keys, results, again)


def _half_grad(x: Any) -> Traffic:
    accesses, num_rows = x.sub_keys_ptr.numel(), x.keys_ptr.shape[0]
    keys, again = _rows(accesses, x.keys_ptr, num_rows, x.HALF)
    read = size(x.grad_halves_ptr, x.queries_ptr, x.sub_keys_ptr) + keys + x.ADD * size(x.grad_queries_ptr)
    return Traffic(read, size(x.grad_queries_ptr, x.factor_ptr), again)


def _step_grad(x: Any) -> Traffic:
    accesses, num_rows = x.sub_keys_ptr.numel(), x.keys_ptr.shape[0]
    read = size(x.half_scores_ptr, x.sub_keys_ptr, x.slope_ptr, x.queries_ptr)
    again = 0.0
    for table, is_read in ((x.keys_ptr, x.IDW), (x.grad_totals_ptr, True)):
        if is_read:
            once, more = _rows(accesses, table, num_rows, x.HALF)
            read, again = read + once, again + more
    return Traffic(read, size(x.factor_ptr, x.dot_ptr, x.share_ptr, x.grad_queries_ptr), again)


def _score_grad(x: Any) -> Traffic:
    read = size(x.sub_keys_ptr)
    read += size(x.grad_scores_ptr, x.slots_ptr) if x.LOOKUP else 0
    read += size(x.half_scores_ptr, x.slope_ptr, x.bend_ptr, x.grad_slope_ptr, x.dot_ptr) if x.STEP else 0
    return Traffic(read, size(x.grad_halves_ptr))


def _usage(x: Any) -> Traffic:
    # The words are read to see where the tokens of a sub-key begin, and again to list them; what was listed too.
    read = size(x.words_ptr) if x.WORDS else size(x.tokens_ptr, x.first_ptr)
    again = size(x.words_ptr, x.tokens_ptr) if x.WORDS else 0
    # Each token's picks are read for each sub-key that it picked.
    picks = size(x.half_scores_ptr, x.sub_keys_ptr)
    written = size(x.tokens_ptr, x.order_ptr, x.first_ptr) if x.WORDS else 0
    return Traffic(read + picks, written + size(x.slope_ptr, x.bend_ptr), again + (x.TOP_K - 1) * picks)


def _key_sum(x: Any) -> Traffic:
    accesses, num_rows = x.order_ptr.numel(), x.keys_ptr.shape[0]
    met = num_rows if x.ALL_ROWS else distinct(accesses, num_rows)
    row, queries = x.HALF * x.keys_ptr.itemsize, size(x.queries_ptr)
    read = size(x.tokens_ptr, x.order_ptr, x.first_ptr, x.factor_ptr) + queries + met * row
    read += size(x.step_factor_ptr) + met * x.HALF * x.steps_ptr.itemsize if x.STEP else 0
    read += met * x.HALF * x.base_ptr.itemsize if x.EPILOGUE != "update" else 0
    again = max(0.0, accesses * x.HALF * x.queries_ptr.itemsize - queries)
    return Traffic(read, met * x.HALF * x.out_ptr.itemsize, again)


def _pick_sums(x: Any) -> Traffic:
    return Traffic(size(x.coefficient_ptr, x.order_ptr, x.first_ptr), size(x.sums_ptr))


def _step(x: Any) -> Traffic:
    return Traffic(size(x.half_scores_ptr, x.sub_keys_ptr, x.slope_ptr), size(x.factor_ptr))


def _count(x: Any) -> Traffic:
    return Traffic(size(x.sub_keys_ptr), size(x.words_ptr))


def _gather(x: Any) -> Traffic:
    rows, again = _rows(x.slots_ptr.numel(), x.values_ptr, x.values_ptr.shape[0], x.D)
    read = rows + size(x.slots_ptr) + (size(x.weights_ptr) if x.HAS_SUM else 0)
    read += size(x.vectors_ptr) if x.HAS_DOTS else 0
    return Traffic(read, (size(x.out_ptr) if x.HAS_SUM else 0) + (size(x.dots_ptr) if x.HAS_DOTS else 0), again)


def _hot(accesses: int, num_rows: int, piece: int) -> tuple[float, float]:
    """How many segments are hot, and how many pieces these have: lengths are binomial."""
    segments = pieces = 0.0
    mean = accesses / num_rows
    for length in range(2 * piece, min(accesses, int(mean + 20 * math.sqrt(mean)) + 2 * piece) + 1):
        log = math.lgamma(accesses + 1) - math.lgamma(length + 1) - math.lgamma(accesses - length + 1)
        log += -length * math.log(num_rows) + (accesses - length) * math.log1p(-1.0 / num_rows)
        segments += num_rows * math.exp(log)
        pieces += num_rows * math.exp(log) * (length // piece)
    return segments, pieces


def _segment(x: Any) -> Traffic:
    accesses, num_rows = x.order_ptr.numel(), x.table_ptr.shape[0]
    met, (hot, pieces) = distinct(accesses, num_rows), _hot(accesses, num_rows, x.PIECE)
    row = {name: x.D * getattr(x, name).itemsize for name in ("table_ptr", "out_ptr", "log_ptr", "vectors_ptr")}
    read = (
        size(x.order_ptr, x.start_ptr, x.end_ptr) + met * x.rows_ptr.itemsize + accesses * x.coefficients_ptr.itemsize
    )
    vectors = size(x.vectors_ptr)
    if x.CENTERED or x.EPILOGUE != "sum":
        read += met * row["table_ptr"]
    written = (met - hot) * (row["out_ptr"] + x.LOG * row["log_ptr"]) + pieces * x.D * x.partials_ptr.itemsize
    return Traffic(read + vectors, written, max(0.0, accesses * row["vectors_ptr"] - vectors))


def _hot_segment(x: Any) -> Traffic:
    accesses, num_rows = x.start_ptr.numel(), x.out_ptr.shape[0]
    hot, pieces = _hot(accesses, num_rows, x.PIECE)
    read = size(x.start_ptr, x.end_ptr) + pieces * x.D * x.partials_ptr.itemsize
    read += hot * x.D * x.table_ptr.itemsize if x.EPILOGUE != "sum" else 0
    return Traffic(read, hot * x.D * (x.out_ptr.itemsize + x.LOG * x.log_ptr.itemsize))


def _read(x: Any) -> Traffic:
    rows, again = _rows(x.slots_ptr.numel(), x.values_ptr, x.values_ptr.shape[0], x.D)
    return Traffic(rows + size(x.slots_ptr, x.weights_ptr, x.targets_ptr), size(x.output_ptr, x.errors_ptr), again)


def _read_piece(x: Any) -> Traffic:
    rows, again = _rows(x.slots_ptr.numel(), x.values_ptr, x.values_ptr.shape[0], x.D)
    waits = size(x.queries_ptr, x.targets_ptr, x.slots_ptr, x.weights_ptr, x.half_scores_ptr, x.sub_keys_ptr)
    predictions = x.grid[0] * x.D * x.queue_predictions_ptr.itemsize
    return Traffic(rows + waits, waits + predictions + size(x.output_ptr), again)


def _enqueue(x: Any) -> Traffic:
    return Traffic(size(x.queries_ptr), size(x.queries_ptr))


def _plan_chunk(x: Any) -> Traffic:
    read = size(x.slots_ptr, x.weights_ptr, x.gates_ptr, x.mask_ptr)
    written = size(x.order_ptr, x.rows_ptr, x.start_ptr, x.end_ptr, x.write_weights_ptr)
    return Traffic(read, written + x.A, (x.grid[0] - 1) * size(x.slots_ptr, x.mask_ptr))


def _read_grad(x: Any) -> Traffic:
    accesses = x.log_rows_ptr.numel()
    rows = x.D * (x.log_ptr.itemsize + x.steps_ptr.itemsize)
    met = distinct(accesses, NUM_SLOTS)
    reads = 2 if x.BLOCK_J < x.J else 1
    small = (x.log_rows_ptr, x.step_rows_ptr, x.weights_ptr, x.write_weights_ptr, x.targets_ptr, x.grad_output_ptr)
    written = (x.grad_targets_ptr, x.grad_predictions_ptr, x.grad_weights_ptr, x.grad_write_weights_ptr)
    return Traffic(met * rows + size(*small), size(*written), (reads * accesses - met) * rows)


def _whole(x: Any) -> Traffic:
    """Of a kernel that is given no table: all of its arguments, once."""
    tensors = {id(value): value for value in vars(x).values() if isinstance(value, torch.Tensor)}
    return Traffic(size(*tensors.values()), 0.0)


#: What a launch of each kernel moves, from its arguments and its grid; of others see `_whole`.
TRAFFIC: dict[str, Callable[[Any], Traffic]] = {
    "half_topk_kernel": _half_topk,
    "merge_kernel": _merge,
    "half_grad_kernel": _half_grad,
    "count_kernel": _count,
    "usage_kernel": _usage,
    "step_kernel": _step,
    "step_grad_kernel": _step_grad,
    "key_sum_kernel": _key_sum,
    "pick_sums_kernel": _pick_sums,
    "score_grad_kernel": _score_grad,
    "gather_kernel": _gather,
    "segment_kernel": _segment,
    "hot_segment_kernel": _hot_segment,
    "read_kernel": _read,
    "read_to_queue_kernel": _read_piece,
    "read_grad_kernel": _read_grad,
    "enqueue_kernel": _enqueue,
    "plan_chunk_kernel": _plan_chunk,
}

#: The functions that make a stage: the outermost of them that is running counts.
STAGES = {
    "lookup_halves": "lookup",
    "_look_up": "lookup",
    "_enqueue": "queue",
    "_carry": "queue",
    "_plan_pairs": "plan",
    "read_to_queue": "read",
    "step_keys": "key step",
    "number_reads": "plan",
    "plan_reads": "plan",
    "plan_segments": "plan",
    "count_accesses": "plan",
    "plan_writes": "plan",
    "weigh": "weights",
    "fold": "weights",
    "weigh_again": "weights",
    "fold_grad": "weights",
    "step_ratio": "weights",
    "write_scale": "weights",
    "fold_write_weights": "weights",
    "read": "read",
    "gather_rows": "read",
    "write": "write",
    "_read_grad": "read and write backward",
    "_add_rows": "table gradient",
    "weigh_grad": "weights",
    "fold_write_weights_grad": "weights",
    "address_grad": "lookup and key step backward",
}

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
    return next((STAGES[name] for name in callers() if name in STAGES), "around")


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
            self.counts.append(Count(name, stage(), _of_operator(name, args, kwargs, result), False))
        return result


def _of_kernel(launch: Launch) -> Traffic:
    arguments = SimpleNamespace(**launch.arguments, grid=launch.grid)
    if launch.name not in TRAFFIC:
        tensors = {name: x for name, x in launch.arguments.items() if isinstance(x, torch.Tensor)}
        tables = [name for name, x in tensors.items() if x.shape == (NUM_SLOTS, WIDTH)]
        if tables:
            raise ValueError(f"{launch.name} is given a table as {tables}: say in TRAFFIC what it moves of that")
    return TRAFFIC.get(launch.name, _whole)(arguments)


def count(function: Callable[[], Any]) -> list[Count]:
    """What a function launches; to be called within `on_meta`."""
    counts: list[Count] = []

    def note(launch: Launch) -> None:
        counts.append(Count(launch.name, stage(), _of_kernel(launch), True))

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
        moved = (x.is_triton, not x.is_triton, *(y / 1e6 for y in x.traffic))
        row[:] = [a + b for a, b in zip(row, moved, strict=True)]
    return sums


def rows() -> list[Row]:
    """Count everything."""
    result = []

    def add(work: str, per_chunk: dict[str, list[float]], fixed: dict[str, list[float]]) -> None:
        floor = floors(work)
        order = [*dict.fromkeys(STAGES.values()), "around"]
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
