"""What a launch of each kernel moves and how often its loops run: formulas beside every kernel's name.

Bytes are those that a launch reads from and writes to device memory if nothing stays in the caches from one launch to
the next, and everything that it reads again itself does. Slots are taken to be uniform, A accesses to N rows meeting
N·(1 - (1 - 1/N)^A) different ones.
"""

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .record import NUM_SLOTS, WIDTH, Launch


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that a launch moves."""

    read: float = 0.0
    written: float = 0.0
    #: what it reads again, from the caches
    again: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.read + other.read, self.written + other.written, self.again + other.again)

    def __rmul__(self, times: float) -> "Traffic":
        return Traffic(times * self.read, times * self.written, times * self.again)


def size(*tensors: Tensor | None) -> int:
    """Bytes of the different elements of tensors: an expanded one has few. None has none."""

    def of_one(x: Tensor) -> int:
        return x.itemsize * math.prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride != 0)

    return sum(of_one(x) for x in tensors if x is not None)


def reads(*tensors: Tensor | None) -> Traffic:
    """Every element is read once."""
    return Traffic(read=size(*tensors))


def writes(*tensors: Tensor | None) -> Traffic:
    """Every element is written once."""
    return Traffic(written=size(*tensors))


def distinct(accesses: float, rows: int) -> float:
    """How many of `rows` rows so many uniform accesses meet, on average."""
    return -rows * math.expm1(accesses * math.log1p(-1.0 / rows)) if rows > 1 else min(accesses, rows)


def reads_rows(accesses: float, num_rows: int, row_bytes: float) -> Traffic:
    """Rows are read from memory where they are met first, and from the caches after that."""
    met = distinct(accesses, num_rows)
    return Traffic(met * row_bytes, 0.0, (accesses - met) * row_bytes)


def hot(accesses: int, num_rows: int, piece: int) -> tuple[float, float]:
    """How many segments are hot, and how many pieces these have: lengths are binomial."""
    mean = accesses / num_rows
    lengths = torch.arange(2 * piece, min(accesses, int(mean + 20 * math.sqrt(mean)) + 2 * piece) + 1)
    share = torch.tensor(1.0 / num_rows, dtype=torch.float64)
    segments = num_rows * torch.distributions.Binomial(accesses, share).log_prob(lengths).exp()
    return float(segments.sum()), float((segments * (lengths // piece)).sum())


def _values(x: Any) -> Traffic:
    """Rows of a table of values, at slots."""
    return reads_rows(x.slots_ptr.numel(), len(x.values_ptr), x.D * x.values_ptr.itemsize)


def _picked(x: Any, table: Tensor) -> Traffic:
    """Rows of a table of sub-keys, at the picks."""
    return reads_rows(x.sub_keys_ptr.numel(), len(table), x.HALF * table.itemsize)


def _half_topk(x: Any) -> Traffic:
    queries, keys = size(x.queries_ptr), size(x.keys_ptr)
    candidates = x.M * x.grid[2] * x.SPLITS * x.TOP_K * (x.candidate_ptr.itemsize + x.column_ptr.itemsize)
    return Traffic(queries + keys, candidates, (x.SPLITS - 1) * queries + (x.grid[0] - 1) * keys)


def _merge(x: Any) -> Traffic:
    picks, row = x.grid[0] * 2 * x.TOP_K, x.HALF * x.keys_ptr.itemsize
    candidates = Traffic(read=picks * x.SPLITS * (x.candidate_ptr.itemsize + x.column_ptr.itemsize))
    results = writes(x.half_scores_ptr, x.sub_keys_ptr, x.scores_ptr, x.slots_ptr)
    results += (x.WEIGHTING != "none") * writes(x.weights_ptr)
    differences = reads(x.queries_ptr) + reads_rows(picks, x.keys_ptr.numel() // x.HALF, row)
    return candidates + results + x.IDW * differences


def _half_grad(x: Any) -> Traffic:
    read = reads(x.grad_halves_ptr, x.queries_ptr, x.sub_keys_ptr) + x.ADD * reads(x.grad_queries_ptr)
    return read + _picked(x, x.keys_ptr) + writes(x.grad_queries_ptr, x.factor_ptr)


def _usage(x: Any) -> Traffic:
    picks = size(x.half_scores_ptr, x.sub_keys_ptr)
    # Each token's picks are read for each sub-key that it picked.
    results = Traffic(picks, size(x.slope_ptr, x.bend_ptr), (x.TOP_K - 1) * picks)
    if not x.WORDS:
        return results + reads(x.tokens_ptr, x.first_ptr)
    # The words are read to see where the tokens of a sub-key begin, and again to list them; what was listed too.
    listed = writes(x.tokens_ptr, x.order_ptr, x.first_ptr)
    return results + reads(x.words_ptr) + listed + Traffic(again=size(x.words_ptr, x.tokens_ptr))


def _key_sum(x: Any) -> Traffic:
    accesses, num_rows, queries = x.order_ptr.numel(), len(x.keys_ptr), size(x.queries_ptr)
    met = num_rows if x.ALL_ROWS else distinct(accesses, num_rows)
    again = max(0.0, accesses * x.HALF * x.queries_ptr.itemsize - queries)
    row = x.keys_ptr.itemsize + x.STEP * x.steps_ptr.itemsize
    row += (x.EPILOGUE != "update") * (0 if x.base_ptr is None else x.base_ptr.itemsize)
    read = reads(x.tokens_ptr, x.order_ptr, x.first_ptr, x.factor_ptr, x.queries_ptr)
    return (
        read + x.STEP * reads(x.step_factor_ptr) + Traffic(met * x.HALF * row, met * x.HALF * x.out_ptr.itemsize, again)
    )


def _step_grad(x: Any) -> Traffic:
    read = reads(x.half_scores_ptr, x.sub_keys_ptr, x.slope_ptr, x.queries_ptr)
    read += x.IDW * _picked(x, x.keys_ptr) + _picked(x, x.grad_totals_ptr)
    return read + writes(x.factor_ptr, x.dot_ptr, x.share_ptr, x.grad_queries_ptr)


def _score_grad(x: Any) -> Traffic:
    of_step = reads(x.half_scores_ptr, x.slope_ptr, x.bend_ptr, x.grad_slope_ptr, x.dot_ptr)
    read = reads(x.sub_keys_ptr) + x.LOOKUP * reads(x.grad_scores_ptr, x.slots_ptr) + x.STEP * of_step
    return read + writes(x.grad_halves_ptr)


def _read_to_queue(x: Any) -> Traffic:
    waits = (x.queries_ptr, x.targets_ptr, x.slots_ptr, x.weights_ptr, x.half_scores_ptr, x.sub_keys_ptr)
    predictions = Traffic(written=x.grid[0] * x.D * x.queue_predictions_ptr.itemsize)
    return _values(x) + reads(*waits) + writes(*waits, x.output_ptr) + predictions


def _read_sessions(x: Any) -> Traffic:
    """Rows are taken to be those of the initial table, and none of two sessions the same."""
    waits = (x.queries_ptr, x.targets_ptr, x.slots_ptr, x.weights_ptr, x.half_scores_ptr, x.sub_keys_ptr)
    predictions = Traffic(written=x.grid[0] * x.D * x.queue_predictions_ptr.itemsize)
    queued = reads(*waits) + writes(*waits) + predictions
    indices = Traffic(read=x.slots_ptr.numel() * x.index_ptr.itemsize)
    values = reads_rows(x.slots_ptr.numel(), len(x.initial_ptr), x.D * x.initial_ptr.itemsize)
    read = values + indices + reads(x.slots_ptr, x.weights_ptr) + writes(x.output_ptr)
    return read + x.ENQUEUE * (queued + (-1.0) * reads(x.slots_ptr, x.weights_ptr))


def _plan_chunk(x: Any) -> Traffic:
    read = reads(x.slots_ptr, x.weights_ptr, x.gates_ptr, x.mask_ptr)
    again = Traffic(written=x.A, again=(x.grid[0] - 1) * size(x.slots_ptr, x.mask_ptr))
    return read + again + writes(x.order_ptr, x.rows_ptr, x.start_ptr, x.end_ptr, x.write_weights_ptr)


def _gather(x: Any) -> Traffic:
    of_sum, of_dots = reads(x.weights_ptr) + writes(x.out_ptr), reads(x.vectors_ptr) + writes(x.dots_ptr)
    return _values(x) + reads(x.slots_ptr) + x.HAS_SUM * of_sum + x.HAS_DOTS * of_dots


def _segment(x: Any) -> Traffic:
    accesses, num_rows = x.order_ptr.numel(), len(x.table_ptr)
    met, (segments, pieces) = distinct(accesses, num_rows), hot(accesses, num_rows, x.PIECE)
    read = met * x.rows_ptr.itemsize + accesses * x.coefficients_ptr.itemsize
    read += (x.CENTERED or x.EPILOGUE != "sum") * met * x.D * x.table_ptr.itemsize
    written = (met - segments) * (x.out_ptr.itemsize + x.LOG * x.log_ptr.itemsize) + pieces * x.partials_ptr.itemsize
    again = max(0.0, accesses * x.D * x.vectors_ptr.itemsize - size(x.vectors_ptr))
    return reads(x.order_ptr, x.start_ptr, x.end_ptr, x.vectors_ptr) + Traffic(read, x.D * written, again)


def _hot_segment(x: Any) -> Traffic:
    segments, pieces = hot(x.start_ptr.numel(), len(x.out_ptr), x.PIECE)
    read = pieces * x.partials_ptr.itemsize + (x.EPILOGUE != "sum") * segments * x.table_ptr.itemsize
    written = segments * (x.out_ptr.itemsize + x.LOG * x.log_ptr.itemsize)
    return reads(x.start_ptr, x.end_ptr) + Traffic(x.D * read, x.D * written)


def _copy_rows(x: Any) -> Traffic:
    # Slots are different ones, as many as there can be.
    rows = len(x.slots_ptr) * x.D
    return reads(x.slots_ptr) + Traffic(rows * x.source_ptr.itemsize, rows * x.out_ptr.itemsize)


def _read_grad(x: Any) -> Traffic:
    accesses, row = x.log_rows_ptr.numel(), x.D * (x.log_ptr.itemsize + x.steps_ptr.itemsize)
    twice = Traffic(again=(x.BLOCK_J < x.J) * accesses * row)
    small = reads(x.log_rows_ptr, x.step_rows_ptr, x.weights_ptr, x.write_weights_ptr, x.targets_ptr, x.grad_output_ptr)
    written = writes(x.grad_targets_ptr, x.grad_predictions_ptr, x.grad_weights_ptr, x.grad_write_weights_ptr)
    return small + reads_rows(accesses, NUM_SLOTS, row) + twice + written


def _whole(x: Any) -> Traffic:
    """Of a kernel that is given no table: all of its arguments, once."""
    tensors = {name: value for name, value in vars(x).items() if isinstance(value, Tensor)}
    tables = [name for name, value in tensors.items() if value.shape == (NUM_SLOTS, WIDTH)]
    if tables:
        raise ValueError(
            f"a kernel without a formula is given a table as {tables}: say in KERNELS what it moves of that"
        )
    return reads(*{id(value): value for value in tensors.values()}.values())


class Kernel(NamedTuple):
    """Formulas of a kernel: each is a function of the arguments of a launch, and of its grid."""

    #: what the launch moves
    traffic: Callable[[Any], Traffic] = _whole
    #: bytes that a program reads, and stores, at a time as whole rows
    loads: Callable[[Any], int] = lambda x: 0
    stores: Callable[[Any], int] = lambda x: 0
    #: how often loops run that do not say so: those over the picks of a sub-key, the positions of a search and so on
    trips: Callable[[Any], float] = lambda x: 1.0


def _bytes(columns: int, *tensors: Tensor) -> int:
    """Of a row of so many columns of each tensor."""
    return columns * sum(x.itemsize for x in tensors)


#: Every kernel of the package.
KERNELS = {
    "half_topk_kernel": Kernel(_half_topk),
    "merge_kernel": Kernel(_merge, loads=lambda x: x.IDW * min(x.BLOCK_K, x.TOP_K) * _bytes(x.HALF, x.keys_ptr)),
    "half_grad_kernel": Kernel(
        _half_grad,
        loads=lambda x: min(x.BLOCK_K, x.TOP_K) * _bytes(x.HALF, x.keys_ptr),
        stores=lambda x: _bytes(x.HALF, x.grad_queries_ptr),
    ),
    "count_kernel": Kernel(lambda x: reads(x.sub_keys_ptr) + writes(x.words_ptr)),
    "usage_kernel": Kernel(
        _usage, trips=lambda x: max(1.0, x.tokens_ptr.numel() / (x.slope_ptr.numel() * x.H) / x.BLOCK_A)
    ),
    "step_kernel": Kernel(lambda x: reads(x.half_scores_ptr, x.sub_keys_ptr, x.slope_ptr) + writes(x.factor_ptr)),
    "key_sum_kernel": Kernel(
        _key_sum,
        loads=lambda x: x.BLOCK_A * _bytes(min(x.BLOCK_D, x.HALF), x.queries_ptr),
        # A block of columns is less than what all warps store 128 bits of.
        stores=lambda x: _bytes(min(x.BLOCK_D, x.HALF), x.out_ptr),
        trips=lambda x: max(1.0, x.tokens_ptr.numel() / len(x.keys_ptr) / x.BLOCK_A),
    ),
    "step_grad_kernel": Kernel(
        _step_grad,
        loads=lambda x: x.TOP_K * min(x.BLOCK_D, x.HALF) * (x.IDW * x.keys_ptr.itemsize + x.grad_totals_ptr.itemsize),
        stores=lambda x: _bytes(min(x.BLOCK_D, x.HALF), x.grad_queries_ptr),
    ),
    "pick_sums_kernel": Kernel(lambda x: reads(x.coefficient_ptr, x.order_ptr, x.first_ptr) + writes(x.sums_ptr)),
    "score_grad_kernel": Kernel(_score_grad),
    "enqueue_kernel": Kernel(
        lambda x: reads(x.queries_ptr) + writes(x.queries_ptr),
        loads=lambda x: _bytes(x.WIDTH, x.queries_ptr),
        stores=lambda x: _bytes(x.WIDTH, x.queue_queries_ptr),
    ),
    "read_to_queue_kernel": Kernel(
        _read_to_queue,
        loads=lambda x: min(x.BLOCK_J, x.J) * _bytes(x.D, x.values_ptr),
        stores=lambda x: _bytes(x.D, x.queue_predictions_ptr, x.output_ptr),
    ),
    "read_sessions_kernel": Kernel(
        _read_sessions,
        loads=lambda x: 2 * min(x.BLOCK_J, x.J) * _bytes(x.D, x.initial_ptr),
        stores=lambda x: _bytes(x.D, x.output_ptr) + x.ENQUEUE * _bytes(x.D, x.queue_predictions_ptr),
    ),
    "plan_chunk_kernel": Kernel(_plan_chunk, trips=lambda x: math.ceil(x.A / x.BLOCK_B)),
    "weigh_kernel": Kernel(),
    "plan_kernel": Kernel(trips=lambda x: x.SPAN.bit_length()),
    "count_unmasked_kernel": Kernel(),
    "fold_kernel": Kernel(),
    "weigh_again_kernel": Kernel(),
    "fold_grad_kernel": Kernel(),
    "sum_reads_kernel": Kernel(
        loads=lambda x: _bytes(min(x.BLOCK_W, x.WIDTH), x.reads_ptr),
        stores=lambda x: _bytes(min(x.BLOCK_W, x.WIDTH), x.out_ptr),
    ),
    "gather_kernel": Kernel(
        _gather,
        loads=lambda x: min(x.BLOCK_J, x.J) * _bytes(x.D, x.values_ptr),
        stores=lambda x: x.HAS_SUM * _bytes(x.D, x.out_ptr),
    ),
    "segment_kernel": Kernel(
        _segment,
        loads=lambda x: (
            x.BLOCK_A * _bytes(x.D, x.vectors_ptr) + (x.CENTERED or x.EPILOGUE != "sum") * _bytes(x.D, x.table_ptr)
        ),
        # Or a partial sum: AMD's compiler makes one store of the two.
        stores=lambda x: _bytes(x.D, x.out_ptr) + x.LOG * _bytes(x.D, x.log_ptr),
    ),
    # A program has a few columns of its rows.
    "hot_segment_kernel": Kernel(_hot_segment),
    "decay_kernel": Kernel(
        loads=lambda x: x.BLOCK_N * _bytes(x.D, x.values_ptr), stores=lambda x: x.BLOCK_N * _bytes(x.D, x.values_ptr)
    ),
    "read_kernel": Kernel(
        lambda x: _values(x) + reads(x.slots_ptr, x.weights_ptr, x.targets_ptr) + writes(x.output_ptr, x.errors_ptr),
        loads=lambda x: min(x.BLOCK_J, x.J) * _bytes(x.D, x.values_ptr),
        stores=lambda x: _bytes(x.D, x.errors_ptr, x.output_ptr),
    ),
    "read_grad_kernel": Kernel(
        _read_grad,
        loads=lambda x: min(x.BLOCK_J, x.J) * _bytes(x.D, x.log_ptr, x.steps_ptr),
        stores=lambda x: _bytes(x.D, x.grad_predictions_ptr, x.grad_targets_ptr),
    ),
    "copy_rows_kernel": Kernel(
        _copy_rows,
        loads=lambda x: x.BLOCK_R * _bytes(x.D, x.source_ptr),
        stores=lambda x: x.BLOCK_R * _bytes(x.D, x.out_ptr),
    ),
    "restore_kernel": Kernel(
        loads=lambda x: x.BLOCK_N * _bytes(x.D, x.initial_ptr), stores=lambda x: x.BLOCK_N * _bytes(x.D, x.values_ptr)
    ),
}


def _arguments(launch: Launch) -> SimpleNamespace:
    return SimpleNamespace(**launch.arguments, grid=launch.grid)


def of_launch(launch: Launch) -> Traffic:
    """What a launch moves."""
    return KERNELS[launch.name].traffic(_arguments(launch))


def unknown_trips(launch: Launch) -> float:
    """How often the loops of a launch run whose code does not say so."""
    return KERNELS[launch.name].trips(_arguments(launch))


def row_bytes(launch: Launch) -> tuple[int, int]:
    """Bytes that a program of a launch reads and stores at a time as whole rows."""
    kernel, arguments = KERNELS[launch.name], _arguments(launch)
    return int(kernel.loads(arguments)), int(kernel.stores(arguments))
