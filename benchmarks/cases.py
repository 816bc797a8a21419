"""The launches that are compiled: every kernel, forward and backward, at the paper's sizes and at others.

A table for each kind of input says in what its cases differ from a training chunk of the paper: 8×512 tokens, n = 512,
K = 8, Dk = D = 512, float32.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fwpkm_kernels.kernels import chunks, gather, key_step, lookup, scans, segments, update, weights
from fwpkm_kernels.kernels.picks import plan_picks

from .record import CHUNK, NUM_KEYS, NUM_SLOTS, QUERY, WIDTH, meta, on_meta, step, training

#: Cases by their names, with what each of them gives to the function that launches its kernels.
Table = dict[str, dict[str, Any]]
Run = Callable[..., None]
#: What runs each case, by its name.
CASES: dict[str, Callable[[], None]] = {}

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
HALF = QUERY // 2


def _case(kind: str, table: Table, make: Callable[..., Any] | None = None) -> Callable[[Run], Run]:
    """Make a case of every line of a table: of what `make` makes of it, or else of the line itself."""

    def add(run: Run) -> Run:
        for name, sizes in table.items():
            CASES[f"{kind}/{name}"] = lambda sizes=sizes: run(make(**sizes)) if make else run(**sizes)
        return run

    return add


def _slots(*shape: int) -> Tensor:
    return meta(*shape, dtype=torch.int64)


def _plan(accesses: int, dtype: torch.dtype = torch.int32) -> list[Tensor]:
    return [_slots(accesses), *(meta(accesses, dtype=dtype) for _ in range(3))]


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, F32)


LOOKUPS: Table = {
    "paper": {},
    "paper-bf16-queries": {"q_dtype": BF16},
    "paper-bf16": {"q_dtype": BF16, "k_dtype": BF16},
    "paper-float64": {"q_dtype": F64, "k_dtype": F64},
    "paper-tf32": {"precision": "tf32"},
    "paper-ieee": {"precision": "ieee"},
    "paper-dot": {"idw": False},
    "static-pkm": {"m": 512, "heads": 4, "k": 32, "idw": False},
    "n4096": {"n": 4096},
    "n4096-K64": {"n": 4096, "k": 64},
}


def _of_lookup(
    m: int = 4096, heads: int = 1, n: int = NUM_KEYS, k: int = 8, *, idw: bool = True,
    q_dtype: torch.dtype = F32, k_dtype: torch.dtype = F32, precision: str = "tf32x3",
) -> SimpleNamespace:  # fmt: skip
    queries, keys = meta(m, heads, QUERY, dtype=q_dtype), meta(heads, 2, n, HALF, dtype=k_dtype)
    forward = {"top_k": k, "idw": idw, "eps": 1e-3, "precision": precision}
    return SimpleNamespace(queries=queries, keys=keys, sub_keys=_slots(m, heads, 2, k), forward=forward)


@_case("lookup", LOOKUPS, _of_lookup)
def _look_up(x: SimpleNamespace) -> None:
    lookup.lookup(x.queries, x.keys, **x.forward)


@_case("lookup", {"weighed": {"m": 512}}, _of_lookup)
def _look_up_weighed(x: SimpleNamespace) -> None:
    lookup.lookup(x.queries, x.keys, **x.forward, weights=meta(512, 1, 8))


@_case("lookup_backward", LOOKUPS, _of_lookup)
def _look_up_backward(x: SimpleNamespace) -> None:
    (m, heads, _, k), exact = x.sub_keys.shape, _exact(x.keys.dtype)
    grad, table = meta(m, heads, 1, k, dtype=exact).expand(-1, -1, 2, -1), x.keys.view(-1, HALF)
    idw, accesses = x.forward["idw"], m * heads * 2 * k
    lookup.half_grad(grad, x.queries, table, x.sub_keys, idw=idw, eps=1e-3)
    rows = (torch.empty_like(table), x.queries.view(-1, HALF), meta(accesses, dtype=exact))
    segments.segment_rows(*rows, *_plan(accesses), table=table, centered=idw)


KEY_STEPS: Table = {
    "paper": {},
    "paper-bf16-queries": {"q_dtype": BF16, "clip": 1.0},
    "paper-bf16": {"q_dtype": BF16, "k_dtype": BF16},
    "paper-float64": {"q_dtype": F64, "k_dtype": F64},
    "paper-dot": {"idw": False},
    "static-pkm": {"m": 512, "heads": 4, "k": 32},
    "n4096-K64": {"n": 4096, "k": 64},
}


def _of_key_step(
    m: int = 4096, heads: int = 1, n: int = NUM_KEYS, k: int = 8, *, idw: bool = True, clip: float | None = None,
    q_dtype: torch.dtype = F32, k_dtype: torch.dtype = F32,
) -> SimpleNamespace:  # fmt: skip
    queries, keys = meta(m, heads, QUERY, dtype=q_dtype), meta(heads * 2 * n, HALF, dtype=k_dtype)
    half_scores = meta(m, heads, 2, k, dtype=_exact(k_dtype))
    sub_keys = meta(m, heads, 2, k, dtype=torch.int32)
    return SimpleNamespace(
        keys=keys,
        picks=(queries, half_scores, sub_keys),
        plan=functools.partial(plan_picks, sub_keys, half_scores, num_keys=n),
        options={"idw": idw, "lr": 1.0, "weight": 1.0, "weight_decay": 0.0, "clip": clip},
    )


@_case("key_step", KEY_STEPS, _of_key_step)
def _step_keys(x: SimpleNamespace) -> None:
    key_step.step_keys(x.keys, torch.empty_like(x.keys), *x.picks, x.plan(first_row=0), **x.options)


@_case("key_step_backward", KEY_STEPS, _of_key_step)
def _step_keys_backward(x: SimpleNamespace) -> None:
    _, half_scores, sub_keys = x.picks
    (m, heads, _, k), exact = sub_keys.shape, half_scores.dtype
    found, out = (meta(m, heads, k, dtype=exact), _slots(m, heads, k)), meta(m, heads, QUERY, dtype=exact)
    grad, plan = meta(*x.keys.shape, dtype=exact), x.plan(first_row=8)
    key_step.address_grad(grad, x.keys, *x.picks, *found, plan, out, first_row=8, eps=1e-3, **x.options)


TABLES: Table = {
    "paper": {},
    "paper-bf16-table": {"dtype": BF16},
    "static-pkm": {"m": 512, "j": 128},
    "D1024": {"width": 1024},
    "D256": {"width": 256},
    "D4096": {"width": 4096},
    "paper-float64": {"dtype": F64},
    "n4096": {"n": 4096},
}
DECAYED = {name: TABLES[name] for name in ("paper", "paper-bf16-table", "D4096", "paper-float64")}


def _of_table(
    m: int = 4096, j: int = 8, n: int = NUM_KEYS, width: int = WIDTH, dtype: torch.dtype = F32
) -> SimpleNamespace:
    return SimpleNamespace(
        table=meta(n * n, width, dtype=dtype),
        vectors=meta(m, width, dtype=_exact(dtype)),
        grad_out=meta(m, width, dtype=dtype),
        weights=meta(m, j, dtype=_exact(dtype)),
        slots=_slots(m, j),
        plan=_plan(m * j),
    )


@_case("gather", TABLES, _of_table)
def _gather(x: SimpleNamespace) -> None:
    gather.gather(x.table, x.slots, weights=x.weights, sum_dtype=x.table.dtype)


@_case("gather_backward", TABLES, _of_table)
def _gather_backward(x: SimpleNamespace) -> None:
    gather.gather(x.table, x.slots, vectors=x.grad_out)
    segments.segment_rows(x.table, x.grad_out, x.weights, *x.plan)


@_case("update", TABLES, _of_table)
def _update(x: SimpleNamespace) -> None:
    update.update(x.table, x.table, x.vectors, x.weights, *x.plan, lr=1.0, weight_decay=0.0, clip=None)


@_case("update_decay_clip", DECAYED, _of_table)
def _update_decay_clip(x: SimpleNamespace) -> None:
    update.update(x.table, x.table, x.vectors, x.weights, *x.plan, lr=1.0, weight_decay=0.1, clip=1.0)


@_case("update_backward", TABLES, _of_table)
def _update_backward(x: SimpleNamespace) -> None:
    for clip in (None, 1.0):
        update.update_grad(x.table, x.vectors, x.weights, x.slots, *x.plan, lr=1.0, clip=clip)


CHUNKS: Table = {
    "paper": {},
    "paper-bf16-targets": {"activations": BF16},
    "paper-bf16-table": {"dtype": BF16, "activations": BF16},
    "paper-float64": {"dtype": F64, "activations": F64},
    "inference": {"batch": 1},
    "J128": {"batch": 1, "j": 128},
    "J128-bf16-table": {"batch": 1, "j": 128, "dtype": BF16, "activations": BF16},
    "D1024": {"width": 1024},
    "D4096": {"width": 4096},
}


def _of_chunk(
    batch: int = 8, j: int = 8, width: int = WIDTH, dtype: torch.dtype = F32, activations: torch.dtype = F32
) -> SimpleNamespace:
    """512 positions, and one before them that is read again to be written."""
    m = (CHUNK + 1) * batch
    sequence = meta(batch, 8 * CHUNK, width, dtype=activations).transpose(0, 1)
    return SimpleNamespace(
        table=meta(NUM_SLOTS, width, dtype=dtype),
        log=meta(m * j, width, dtype=dtype),
        errors=meta(m, width, dtype=_exact(dtype)),
        weights=meta(m, j, dtype=_exact(dtype)),
        slots=_slots(m, j),
        plan=_plan(m * j),
        written=sequence[CHUNK - 1 : 2 * CHUNK - 1],
        read=sequence[CHUNK : 2 * CHUNK],
    )


@_case("memory", CHUNKS, _of_chunk)
def _chunk(x: SimpleNamespace) -> None:
    scans.read(x.table, x.slots, x.weights, x.written, x.read)
    update.update(x.table, x.table, x.errors, x.weights, *x.plan, lr=1.0, weight_decay=0.0, clip=None, log=x.log)


@_case("memory_backward", CHUNKS, _of_chunk)
def _chunk_backward(x: SimpleNamespace) -> None:
    steps = torch.empty_like(x.table, dtype=x.errors.dtype)
    both, grads = (x.weights, x.weights), (x.written, torch.empty_like(x.weights), torch.empty_like(x.weights))
    scans.read_grad(x.log, x.slots, steps, x.slots, *both, x.written, x.read, *grads, factor=1.0)
    segments.segment_rows(steps, x.errors, x.weights, *x.plan)


@_case("memory_reset", CHUNKS, _of_chunk)
def _reset(x: SimpleNamespace) -> None:
    update.restore_rows(x.table, x.table, meta(NUM_SLOTS, dtype=torch.uint8))


SEQUENCES: Table = {
    "paper": {},
    "paper-float64": {"exact": F64},
    "J128": {"batch": 1, "j": 128},
    "n65536": {"batch": 1, "n": 65536},
}


@_case("chunks", SEQUENCES)
def _weights_of_reads(batch: int = 8, j: int = 8, n: int = NUM_KEYS, exact: torch.dtype = F32) -> None:
    """Eight chunks of 512 positions, all but the first with one that is read again."""
    layout, reads = (batch, 4096, 512, 1, 1, 1, 8, 4103), 4103 * batch
    scores, slots, counts = meta(reads, j, dtype=exact), _slots(reads, j), meta(reads, j, dtype=torch.int32)
    row_dtype = torch.int32 if n == NUM_KEYS else torch.int64
    how: dict[str, Any] = {"weighting": "softmax", "temperature": 1.0}
    outputs = (_slots(batch, 4096, j), meta(batch, 4096, j, dtype=exact))
    _, keys = weights.weigh(scores, slots, n * n, row_dtype, layout, **how, outputs=outputs)
    order = _slots(keys.numel())
    for mask in (None, meta(4096, batch, dtype=exact)):  # a token's mask, and its gate
        chunks.plan_writes(keys, order, n * n, row_dtype, j, mask, layout, count_all=False)
        fold: dict[str, Any] = {"step": "paper" if mask is None else "normalized", "ratio": mask is not None}
        weights.fold(scores, counts, mask, mask, layout, **fold)
        weights.fold_grad(scores, scores, counts, scores, scores, mask, mask, mask, layout, **how, **fold)
    weights.weigh_again(scores, order, counts.view(-1), layout, **how)
    chunks.sum_reads(meta(reads, 1, WIDTH, dtype=exact), layout, BF16)


@_case("wide", {"paper": {}})
def _wide() -> None:
    """Rows and positions that need 64 bits."""
    plan = _plan(32768, torch.int64)
    for dtype in (F32, BF16):
        x = _of_table(dtype=dtype)
        update.update(x.table, x.table, x.vectors, x.weights, *plan, lr=1.0, weight_decay=0.1, clip=1.0)
        segments.segment_rows(x.table, x.vectors, x.weights, *plan)
    x = _of_key_step()
    _, half_scores, sub_keys = x.picks
    by_sort = x.plan(first_row=0, listed=(_slots(sub_keys.numel()), _slots(sub_keys.numel()), _slots(len(x.keys) + 1)))
    key_step.pick_sums(half_scores, by_sort)
    key_step.step_keys(x.keys, x.keys, *x.picks, by_sort, **x.options)


@_case("memory_scalars", {"paper": {}})
def _sum_scalars() -> None:
    """A table of width 1 sums scalars by segment."""
    segments.segment_rows(meta(NUM_SLOTS, 1), meta(32768, 1), meta(32768), *_plan(32768))


# Whatever the memory itself launches.
@_case("chunk", {"training": {}, "training-bf16": {"dtype": BF16}})
def _train(dtype: torch.dtype = F32) -> None:
    with on_meta():
        for part in training(8, 2 * CHUNK, dtype):
            part()


STEPS: Table = {
    "inference": {"tokens": CHUNK, "position": CHUNK},
    "inference-bf16": {"tokens": CHUNK, "position": CHUNK, "dtype": BF16},
    "decode": {"tokens": 1, "position": CHUNK + 88},
}


@_case("chunk", STEPS)
def _stream(tokens: int, position: int, dtype: torch.dtype = F32) -> None:
    with on_meta():
        step(tokens, position, dtype)()
