"""What is compiled: whatever the package launches, forward and backward, at the paper's sizes and at others.

The defaults of each function are a training chunk of the paper: 8×512 tokens, n = 512, K = 8, Dk = D = 512, float32;
the table above it says what its cases change of that.
"""

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fwpkm_kernels import (
    MemoryState,
    chunk_value_update,
    chunk_value_update_,
    plan,
    product_key_lookup,
    product_key_update,
    sparse_value_gather,
)
from fwpkm_kernels.binding import Binding, make_queue
from fwpkm_kernels.kernels import picks
from fwpkm_kernels.kernels.pool import read_sessions
from fwpkm_kernels.options import Options
from fwpkm_kernels.records import Addresses, Queue, Tokens

from .record import CHUNK, NUM_KEYS, NUM_SLOTS, PICKS, QUERY, WIDTH, meta, on_meta, step, training

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
Run = Callable[..., None]
#: What runs each case, by its name.
CASES: dict[str, Callable[[], None]] = {}


def _cases(kind: str, table: dict[str, dict[str, Any]]) -> Callable[[Run], Run]:
    """Make a case of each line of a table: its name, and arguments of the function."""

    def add(run: Run) -> Run:
        CASES.update({f"{kind}/{name}": on_meta()(functools.partial(run, **given)) for name, given in table.items()})
        return run

    return add


def _backward(output: Tensor, *inputs: Tensor) -> None:
    torch.autograd.grad(output, inputs, torch.empty_like(output))


def _queries_and_keys(
    m: int = 8 * CHUNK, heads: int = 1, n: int = NUM_KEYS, queries: torch.dtype = F32, keys: torch.dtype = F32
) -> tuple[Tensor, Tensor]:
    return (
        meta(m, heads, QUERY, dtype=queries, requires_grad=True),
        meta(heads, 2, n, QUERY // 2, dtype=keys, requires_grad=True),
    )


@_cases(
    "lookup",
    {
        "paper": {},
        "paper-bf16-queries": {"queries": BF16},
        "paper-bf16": {"queries": BF16, "keys": BF16},
        "paper-float64": {"queries": F64, "keys": F64},
        "paper-tf32": {"precision": "tf32"},
        "paper-ieee": {"precision": "ieee"},
        "paper-dot": {"score": "dot"},
        "static-pkm": {"m": 512, "heads": 4, "top_k": 32, "score": "dot"},
        "n4096": {"n": 4096},
        "n4096-K64": {"n": 4096, "top_k": 64},
    },
)
def _look_up(top_k: int = PICKS, score: str = "idw", precision: str = "tf32x3", **sizes: Any) -> None:
    queries, keys = _queries_and_keys(**sizes)
    scores, _ = product_key_lookup(queries, keys, top_k, score=score, precision=precision)
    _backward(scores, queries, keys)


@_cases(
    "key_step",
    {
        "paper": {},
        "paper-bf16-queries": {"queries": BF16, "clip": 1.0},
        "paper-bf16": {"queries": BF16, "keys": BF16},
        "paper-float64": {"queries": F64, "keys": F64},
        "paper-dot": {"score": "dot"},
        "static-pkm": {"m": 512, "heads": 4, "top_k": 32},
        "n4096-K64": {"n": 4096, "top_k": 64},
    },
)
def _step_keys(top_k: int = PICKS, score: str = "idw", clip: float | None = None, **sizes: Any) -> None:
    queries, keys = _queries_and_keys(**sizes)
    _backward(product_key_update(keys, queries, top_k=top_k, score=score, clip=clip), queries, keys)


def _values_slots_weights(
    m: int = 8 * CHUNK, j: int = PICKS, width: int = WIDTH, dtype: torch.dtype = F32
) -> tuple[Tensor, Tensor, Tensor]:
    values = meta(NUM_SLOTS, width, dtype=dtype, requires_grad=True)
    weights = meta(m, j, dtype=torch.promote_types(dtype, F32), requires_grad=True)
    return values, meta(m, j, dtype=torch.int64), weights


TABLES_OF_VALUES: dict[str, dict[str, Any]] = {
    "paper": {},
    "paper-bf16-table": {"dtype": BF16},
    "static-pkm": {"m": 512, "j": 128},
    "D1024": {"width": 1024},
    "D256": {"width": 256},
    "D4096": {"width": 4096},
    "paper-float64": {"dtype": F64},
}


@_cases("gather", TABLES_OF_VALUES)
@_cases("scalars", {"paper": {"j": 1, "width": 1}})
def _gather(**sizes: Any) -> None:
    values, slots, weights = _values_slots_weights(**sizes)
    _backward(sparse_value_gather(values, slots, weights), values, weights)


@_cases("update", TABLES_OF_VALUES)
def _update(**sizes: Any) -> None:
    values, slots, weights = _values_slots_weights(**sizes)
    shape = (len(slots), values.shape[1])
    targets, predictions = (meta(*shape, dtype=x.dtype, requires_grad=True) for x in (values, weights))
    for options in ({}, {"weight_decay": 0.1, "clip": 1.0}):
        new = chunk_value_update(values, slots, weights, targets, predictions, **options)
        _backward(new, values, weights, targets, predictions)
        with torch.no_grad():
            chunk_value_update_(values.detach(), slots, weights, targets, predictions, **options)


@_cases("chunk", {"training": {}, "training-bf16": {"dtype": BF16}, "masked": {"masked": True, "step": "normalized"}})
@_cases(
    "memory",
    {
        "paper-bf16-table": {"dtype": BF16, "table": BF16},
        "paper-float64": {"dtype": F64, "keys": F64, "table": F64},
        "masked-float64": {"dtype": F64, "keys": F64, "table": F64, "masked": True},
        "drop": {"masked": True, "step": "normalized", "boundary": "drop"},
        "paper-dot": {"score": "dot"},
        "rows": {"final": "rows"},
        "rows-bf16": {"final": "rows", "table": BF16},
        "inference": {"batch": 1},
        "J128": {"batch": 1, "heads": 4, "top_k": 32},
        "J128-drop": {"batch": 1, "heads": 4, "top_k": 32, "masked": True, "step": "normalized", "boundary": "drop"},
        "J128-bf16-table": {"batch": 1, "heads": 4, "top_k": 32, "masked": True, "dtype": BF16, "table": BF16},
        "D1024": {"width": 1024},
        "D4096": {"width": 4096},
        "n65536": {"batch": 1, "num_keys": 65536},
    },
)
def _train(**sizes: Any) -> None:
    for part in training(**sizes):
        part()


@_cases(
    "chunk",
    {
        "inference": {"tokens": CHUNK, "position": CHUNK},
        "inference-bf16": {"tokens": CHUNK, "position": CHUNK, "dtype": BF16},
        "decode": {"tokens": 1, "position": CHUNK + 88},
    },
)
def _stream(tokens: int, position: int, dtype: torch.dtype = F32) -> None:
    step(tokens, position, dtype)()


@_cases("pool", {"decode": {}, "decode-bf16": {"dtype": BF16}, "decode-heads": {"heads": 4}})
def _read_sessions(sessions: int = 16, heads: int = 1, dtype: torch.dtype = F32) -> None:
    """A token of each session, and a read without writing."""
    queue = make_queue(
        meta(heads, 2, NUM_KEYS, QUERY // 2),
        meta(NUM_SLOTS, WIDTH),
        Binding(sessions, dtype, dtype, Options()),
        torch.device("meta"),
    )
    queue = Queue(*(x.transpose(0, 1).contiguous() for x in queue))
    queries, targets = meta(1, sessions, heads, QUERY, dtype=dtype), meta(1, sessions, WIDTH, dtype=dtype)
    found = Addresses.empty(queries.flatten(0, 1), PICKS, F32)
    where, index = meta(sessions, dtype=torch.int64), meta(sessions, NUM_SLOTS, dtype=torch.int32)
    tables = (meta(16 * CHUNK, WIDTH), meta(NUM_SLOTS, WIDTH), index)
    weights, output = meta(sessions, heads * PICKS), torch.empty_like(targets)
    tokens = Tokens(queries, targets, None, None)
    read_sessions(*tables, where, found, weights, output)
    read_sessions(*tables, where, found, weights, output, tokens=tokens, queue=queue, places=where, lookahead=1)


@_cases("reset", {name: given for name, given in TABLES_OF_VALUES.items() if "j" not in given})
def _reset(**sizes: Any) -> None:
    values, _, weights = _values_slots_weights(**sizes)
    MemoryState(meta(1, 2, NUM_KEYS, QUERY // 2, dtype=weights.dtype), values).reset(touched_rows_only=True)


@_cases("wide", {"paper": {}})
def _need_64_bits() -> None:
    """Rows and positions of 64 bits, and picks that are planned by a sort."""
    with mock.patch.multiple(plan, NARROW_ROWS=0, NARROW_ACCESSES=0), mock.patch.object(picks, "MAX_KEYS", 0):
        for dtype in (F32, BF16):
            _gather(dtype=dtype)
            _update(dtype=dtype)
        _train()
        _stream(CHUNK, CHUNK)
