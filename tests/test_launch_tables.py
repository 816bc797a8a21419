"""Every launch table: whatever a launch is given, the bits are the same each time."""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

import fwpkm_kernels.kernels
from fwpkm_kernels import MemoryState, fast_weight_memory_step, product_key_update, testing
from fwpkm_kernels.kernels import _common, chunks, key_step, lookup, scans, segments, streaming
from fwpkm_kernels.kernels import picks as pick_plan
from fwpkm_kernels.kernels import update as update_kernels
from fwpkm_kernels.kernels import weights as weight_kernels
from fwpkm_kernels.kernels.compact import copy_rows
from fwpkm_kernels.kernels.gather import gather as gather_rows
from fwpkm_kernels.kernels.update import decay_rows
from fwpkm_kernels.options import Options
from fwpkm_kernels.plan import plan_picks, plan_segments
from fwpkm_kernels.streaming import _plan_pairs
from fwpkm_kernels.weights import plan_writes, plan_writes_grad
from tests.conftest import HAS_GPU, SLOW_IN_INTERPRETER, Place
from tests.helpers.determinism import (
    GPU_SHAPE,
    RUNS,
    SHAPE,
    Function,
    assert_same_bits_always,
    gather,
    memory_inputs,
    update,
)
from tests.helpers.picks import make_picks
from tests.helpers.pool import Pair
from tests.helpers.scans import make_chunk, run_read, run_read_grad


def warps(*numbers: int) -> tuple[int, ...]:
    """Numbers of warps, which mean nothing to the interpreter."""
    return numbers if HAS_GPU else numbers[:1]


#: Accesses at a time, and warps.
SEGMENT_CONFIGS = [segments.SegmentConfig(*config) for config in ((1, 4), (2, 1), (2, 8), (32, 8))]


@pytest.mark.parametrize("config", SEGMENT_CONFIGS, ids=str)
def test_every_tile_of_segment_sums(config, triton_place, monkeypatch):
    monkeypatch.setattr(segments, "segment_config", lambda *_: config)
    assert_same_bits_always(update(triton_place, clip=0.3), triton_place.device, min(RUNS, 5))


@pytest.mark.parametrize("piece", [16, 64])
def test_every_length_of_a_piece(piece, triton_place, monkeypatch):
    monkeypatch.setattr(segments, "PIECE", piece)
    assert_same_bits_always(gather(triton_place), triton_place.device, 2)


LOOKUP_CONFIGS = [
    lookup.LookupConfig(block_m, block_n, block_d, num_warps)
    for block_m, block_n, block_d in ((16, 16, 16), (64, 32, 32), (128, 128, 16))
    for num_warps in warps(4, 8)
]


@pytest.mark.parametrize("config", LOOKUP_CONFIGS, ids=str)
def test_every_tile_of_a_lookup(config, triton_place, monkeypatch):
    monkeypatch.setattr(lookup, "lookup_config", lambda *_: config)
    rows = 4096 if HAS_GPU else 5
    inputs = testing.make_lookup_inputs(rows, 1, 40, 24, device=triton_place.device)
    options = {"top_k": 3, "idw": True, "eps": 1e-3, "precision": "tf32x3"}
    assert_same_bits_always(lambda: lookup.lookup(*inputs, **options), triton_place.device, min(RUNS, 5))


@pytest.mark.parametrize("config", [{"block_k": 1, "block_a": 4}, {"block_low": 32, "block_high": 64}], ids=str)
@pytest.mark.parametrize("block_t", [512, 2])
def test_every_tile_of_a_plan_of_picks(block_t, config, triton_place, monkeypatch):
    """And they are all the same plan."""
    picks = make_picks(20000 if HAS_GPU else 50, 1, 4, 3, device=triton_place.device)
    expected, table = plan_picks(picks, 4), pick_plan.plan_config
    config = {**config, "block_t": block_t}
    monkeypatch.setattr(pick_plan, "plan_config", lambda *sizes: table(*sizes)._replace(**config))
    assert_same_bits_always(lambda: plan_picks(picks, 4), triton_place.device, min(RUNS, 5))
    for name, x, wanted in zip(expected._fields, plan_picks(picks, 4), expected, strict=True):
        if name in ("slope", "bend"):  # sums of floats, in another order
            torch.testing.assert_close(x, wanted)
        else:
            testing.assert_bitwise_equal(x, wanted, name)


@pytest.mark.parametrize("block_d", [4, 64])
@pytest.mark.parametrize("block_a", [1, 16])
def test_every_tile_of_a_key_step(block_a, block_d, triton_place, monkeypatch):
    rows, n, width = (4096, 64, 64) if HAS_GPU else (20, 5, 8)
    queries, keys = testing.make_lookup_inputs(rows, 1, n, width, device=triton_place.device)
    config = key_step.KeySumConfig(block_a, block_d, 4)
    monkeypatch.setattr(key_step, "key_sum_config", lambda *_: config)
    options = {"top_k": 3, "backend": triton_place.backend}
    assert_same_bits_always(lambda: product_key_update(keys, queries, **options), triton_place.device, min(RUNS, 5))


@pytest.mark.parametrize("block_j", [1, 2, 8])
@pytest.mark.parametrize("num_warps", warps(4, 8))
def test_every_tile_of_the_backward_of_a_read(num_warps, block_j, triton_place):
    shape = (8, 513, 512, 512, 8, 4096, 512) if HAS_GPU else (1, 3, 2, 2, 8, 9, 5)
    chunk = make_chunk(shape, device=triton_place.device)
    config = scans.ReadGradConfig(block_j, num_warps)
    call = lambda: (run_read(chunk), run_read_grad(chunk, 0.3, config=config))  # noqa: E731
    assert_same_bits_always(call, triton_place.device, min(RUNS, 5))


@pytest.mark.parametrize("tile", [16, 512])
@pytest.mark.parametrize("boundary", ["carry", "drop"])
def test_every_tile_of_the_plan_of_a_sequence(boundary, tile, triton_place, monkeypatch):
    """Counts, write weights and the sort that they follow."""
    monkeypatch.setattr(weight_kernels, "_TILE", tile)
    o = Options(chunk_size=7, top_k=3, boundary=boundary, step="normalized", backend="triton")
    length, batch = (3000, 8) if HAS_GPU else (16, 2)
    reads = o.layout(length, batch).positions * batch
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(reads, 3, generator=generator).to(triton_place.device)
    slots = testing.make_slots((reads, 3), 9, "zipf").to(triton_place.device)
    mask = torch.rand(length, batch, generator=generator).sub(0.3).clamp(min=0.0).to(triton_place.device)
    call = lambda: plan_writes(scores, slots, 9, mask, mask, length, batch, 0, None, o)  # noqa: E731
    assert_same_bits_always(call, triton_place.device, min(RUNS, 5))


@pytest.mark.parametrize("most", [0, 8192], ids=["by a sort", "by comparing"])
def test_both_plans_of_a_streamed_chunk(most, triton_place, monkeypatch):
    monkeypatch.setattr(streaming, "MOST_COMPARED", most)
    call = chunk_plan(triton_place)
    assert_same_bits_always(call, triton_place.device, min(RUNS, 5))


def chunk_launches(place: Place) -> Function:
    """All kernels around a sequence's chunks: weights, plans, counts, write weights, and the backward of these."""
    device = place.device
    length, batch, width = (3000, 8, 256) if device == "cuda" else (9, 2, 5)
    options = {"chunk_size": length // 3, "top_k": 3, "lookahead": 1, "step": "normalized", "backend": "triton"}
    o = Options(**options)
    reads = o.layout(length, batch).positions * batch
    generator = torch.Generator().manual_seed(0)
    scores, grad_weights, grad_write_weights = torch.randn(3, reads, 3, generator=generator).to(device)
    slots = testing.make_slots((reads, 3), 9, "zipf").to(device)
    mask = torch.rand(length, batch, generator=generator).sub(0.3).clamp(min=0.0).to(device)
    gates = torch.rand(batch, length, generator=generator).to(device)
    summed = torch.randn(reads, width, generator=generator).to(device)

    def call() -> Any:
        writes = plan_writes(scores, slots, 9, gates.T, mask, length, batch, 0, None, o)
        grads = (grad_weights, grad_write_weights, scores, writes)
        of_writes = plan_writes_grad(*grads, gates, mask.T, length, batch, 0, o)
        layout = o.layout(length, batch)
        options = {"weighting": "softmax", "temperature": 1.0}
        again = weight_kernels.weigh_again(scores, writes.plan, layout, **options)
        return writes, of_writes, again, chunks.sum_reads(summed, layout, torch.float32)

    return call


def by_rows(place: Place) -> Function:
    """What goes through rows in their order: the decay of those not written, a reset, and copies of them."""
    shape = GPU_SHAPE[2:] if place.device == "cuda" else SHAPE[2:]
    initial = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(place.device)
    flags = (torch.arange(shape[0], device=place.device) % 3 == 0).to(torch.uint8)

    def call() -> Any:
        decayed, values = initial.clone(), torch.zeros_like(initial)
        decay_rows(decayed, flags, decay=0.9)
        update_kernels.restore_rows(values, initial, flags)
        slots = torch.where(flags != 0, torch.arange(shape[0], device=place.device), -1)
        taken, put = torch.empty_like(initial), torch.zeros_like(initial)
        copy_rows(initial, slots, taken, put=False)
        copy_rows(taken, slots, put, put=True)
        return decayed, values, taken, put

    return call


def sums_and_dots(place: Place) -> Function:
    shape = GPU_SHAPE if place.device == "cuda" else (3, 8, 9, 5)
    values, slots, weights = testing.make_gather_inputs(*shape, device=place.device)
    vectors = torch.randn(shape[0], shape[3], generator=torch.Generator().manual_seed(0)).to(place.device)
    return lambda: gather_rows(values, slots, weights=weights, vectors=vectors)


def hot_sums(place: Place) -> Function:
    """One row's, of many pieces, and some of single accesses."""
    accesses, width = (4096, 256) if place.device == "cuda" else (200, 5)
    vectors = torch.randn(accesses, width, generator=torch.Generator().manual_seed(0)).to(place.device)
    slots = torch.zeros(accesses, dtype=torch.int64, device=place.device)
    slots[::50] = torch.arange(len(slots[::50]), device=place.device)
    plan = plan_segments(slots, accesses)

    def call() -> Any:
        out = torch.zeros(accesses, width, device=place.device)
        segments.segment_rows(out, vectors, vectors[:, 0].contiguous(), plan)
        return out

    return call


def chunk_plan(place: Place) -> Function:
    """Of a streamed chunk, by comparing."""
    slots = testing.make_slots((2000 if HAS_GPU else 15, 4), 11, "zipf").to(place.device)
    weights = torch.rand(slots.shape, generator=torch.Generator().manual_seed(0)).to(place.device)
    gates, mask = weights[:, 0].contiguous(), weights[:, 1].contiguous()
    options = Options(top_k=4, backend="triton")

    def call() -> Any:
        touched = torch.zeros(11, dtype=torch.uint8, device=slots.device)
        return _plan_pairs(slots.view(-1, 1, 4), weights, gates, mask, touched, options), touched

    return call


def read(place: Place) -> Function:
    chunk = make_chunk((8, 513, 512, 512, 8, 4096, 512) if HAS_GPU else (1, 3, 2, 2, 8, 9, 5), device=place.device)
    return lambda: run_read(chunk)


def sub_key_launches(place: Place) -> Function:
    """The kernels of a lookup's backward and of a key step and its own; the gradient's factors are any numbers."""
    rows, heads, n, width, top_k = (4096, 2, 64, 64, 8) if place.device == "cuda" else (2, 1, 5, 8, 3)
    queries, keys = testing.make_lookup_inputs(rows, heads, n, width, device=place.device)
    table, options = keys.flatten(0, 2), {"idw": True, "eps": 1e-3}
    where = lookup.lookup(queries, keys, top_k=top_k, precision="ieee", **options)
    picks, plan = where.picks, plan_picks(where.picks, n)
    numbers = {"idw": True, "weight": 0.5, "first_row": 1}

    def call() -> Any:
        grad_totals = torch.ones_like(table)
        found = key_step.find_factors(picks, plan, **numbers)
        out = torch.empty_like(queries)
        factors, dots, shares = key_step.step_grad(
            queries, table, picks, plan, grad_totals, out, direction=1.0, **numbers
        )
        sums = pick_plan.pick_sums(shares, plan)
        grad_scores = picks.half_scores[:, :, 0]
        grad_halves = key_step.score_grad(grad_scores, where.slots, picks, plan, (sums, dots), **numbers)
        return (
            found,
            factors,
            sums,
            grad_halves,
            lookup.half_grad(grad_halves, queries, table, where.sub_keys, out=out, add=True, **options),
        )

    return call


def look_up(place: Place) -> Function:
    inputs = testing.make_lookup_inputs(512 if place.device == "cuda" else 3, 1, 40, 24, device=place.device)
    return lambda: lookup.lookup(*inputs, top_k=3, idw=True, eps=1e-3, precision="tf32x3")


def small_stream(place: Place) -> Function:
    """A chunk in two steps, the first of which reads only."""
    inputs = memory_inputs(place, 2)
    length = inputs["queries"].shape[1]
    options = {"chunk_size": length, "top_k": 2, "backend": place.backend}

    def call() -> Any:
        state = MemoryState(inputs["keys"], inputs["values"])
        parts = (slice(0, length // 2), slice(length // 2, length))
        outputs = [
            fast_weight_memory_step(state, inputs["queries"][:, part], inputs["targets"][:, part], **options)
            for part in parts
        ]
        return outputs, state.state_dict()

    return call


def served(place: Place) -> Function:
    """Two sessions of a pool at different places, of which one has written a chunk; and a read of both."""

    def call() -> Any:
        pair = Pair(place)
        sessions = [pair.open(), pair.open()]
        output = pair.pool_step(sessions, 7, [5, 6])
        read = pair.pool.read(sessions, pair.tokens(2, 1)["queries"], top_k=2, backend=place.backend)
        return output, read, [pair.pool.state_dict(session) for session in sessions]

    return call


class Launched(NamedTuple):
    """A kernel: something that launches it, and what it may be launched with instead of what it is."""

    function: Callable[[Place], Function]
    instead: tuple[dict[str, int], ...]  #: tiles, and warps
    whole: tuple[str, ...] = ()  #: tiles that hold all there is of something, and can be no smaller
    #: Of which tile a program owns one: the axis of the grid, the tile, and of how many things.
    owns: tuple[int, str, Callable[[dict[str, Any]], int]] | None = None
    exact: bool = False  #: no sum of floats: the same bits whatever the launch


BY_READS = (0, "BLOCK_R", lambda arguments: arguments["R"])
BY_POSITIONS = (0, "BLOCK_A", lambda arguments: arguments["A"])
BY_ROWS = (0, "BLOCK_N", lambda arguments: arguments["N"])
TILES_OF_PICKS = ({"BLOCK_J": 1, "num_warps": 1}, {"BLOCK_J": 4, "num_warps": 8})
TILES_OF_READS = ({"BLOCK_R": 4, "num_warps": 1}, {"BLOCK_R": 32, "num_warps": 8})
LAUNCHED = {
    "gather_kernel": Launched(sums_and_dots, TILES_OF_PICKS, ("BLOCK_D",)),
    "read_kernel": Launched(read, TILES_OF_PICKS, ("BLOCK_D",)),
    "read_to_queue_kernel": Launched(small_stream, TILES_OF_PICKS, ("BLOCK_P", "BLOCK_D", "BLOCK_W")),
    "read_sessions_kernel": Launched(served, TILES_OF_PICKS, ("BLOCK_P", "BLOCK_D", "BLOCK_W")),
    "enqueue_kernel": Launched(small_stream, ({"num_warps": 8},), ("BLOCK_W",), exact=True),
    "plan_chunk_kernel": Launched(
        chunk_plan,
        ({"BLOCK_M": 1, "BLOCK_B": 16, "num_warps": 1}, {"BLOCK_M": 16, "BLOCK_B": 64, "num_warps": 8}),
        ("BLOCK_J",),
        (0, "BLOCK_M", lambda arguments: arguments["A"] // arguments["J"]),
        exact=True,
    ),
    "merge_kernel": Launched(
        look_up,
        ({"BLOCK_K": 1, "num_warps": 1}, {"BLOCK_K": 2, "num_warps": 8}),
        ("BLOCK_C", "BLOCK_R", "BLOCK_D", "BLOCK_P"),
    ),
    "half_grad_kernel": Launched(
        sub_key_launches, ({"BLOCK_K": 1, "num_warps": 1}, {"BLOCK_K": 2, "num_warps": 8}), ("BLOCK_D",)
    ),
    "pick_sums_kernel": Launched(sub_key_launches, ({"BLOCK_A": 2, "num_warps": 1}, {"BLOCK_A": 64, "num_warps": 8})),
    "step_kernel": Launched(
        sub_key_launches,
        ({"BLOCK_R": 2, "num_warps": 1}, {"BLOCK_R": 32, "num_warps": 8}),
        ("BLOCK_K",),
        BY_READS,
    ),
    "step_grad_kernel": Launched(
        sub_key_launches, ({"BLOCK_D": 1, "num_warps": 1}, {"BLOCK_D": 2, "num_warps": 8}), ("BLOCK_K",)
    ),
    "score_grad_kernel": Launched(
        sub_key_launches, ({"BLOCK_P": 1, "num_warps": 4}, {"BLOCK_P": 2, "num_warps": 8}), ("BLOCK_K",)
    ),
    "hot_segment_kernel": Launched(
        hot_sums,
        ({"BLOCK_P": 1, "BLOCK_D": 4, "num_warps": 1}, {"BLOCK_P": 4, "BLOCK_D": 64, "num_warps": 8}),
        owns=(1, "BLOCK_D", lambda arguments: arguments["D"]),
    ),
    "decay_kernel": Launched(
        by_rows,
        ({"BLOCK_N": 1, "num_warps": 1}, {"BLOCK_N": 4, "num_warps": 8}),
        ("BLOCK_D",),
        BY_ROWS,
        exact=True,
    ),
    "restore_kernel": Launched(
        by_rows, ({"BLOCK_N": 1, "num_warps": 1}, {"BLOCK_N": 4, "num_warps": 8}), ("BLOCK_D",), BY_ROWS, exact=True
    ),
    "copy_rows_kernel": Launched(
        by_rows,
        ({"BLOCK_R": 1, "num_warps": 1}, {"BLOCK_R": 4, "num_warps": 8}),
        ("BLOCK_D",),
        BY_READS,
        exact=True,
    ),
    "plan_kernel": Launched(
        chunk_launches, ({"BLOCK_A": 16, "num_warps": 1}, {"BLOCK_A": 64}), (), BY_POSITIONS, exact=True
    ),
    "count_unmasked_kernel": Launched(
        chunk_launches, ({"BLOCK_A": 16, "num_warps": 1}, {"BLOCK_A": 64}), (), BY_POSITIONS, exact=True
    ),
    "sum_reads_kernel": Launched(
        chunk_launches,
        ({"BLOCK_W": 2, "num_warps": 8}, {"BLOCK_W": 4}),
        (),
        (1, "BLOCK_W", lambda arguments: arguments["WIDTH"]),
        exact=True,
    ),
    **{
        name: Launched(chunk_launches, TILES_OF_READS, ("BLOCK_J",), BY_READS)
        for name in ("weigh_kernel", "fold_kernel", "weigh_again_kernel", "fold_grad_kernel")
    },
}
#: Those whose tables decide on more than tiles: above.
BY_TABLE = {
    "segment_kernel": segments.SegmentConfig,
    "half_topk_kernel": lookup.LookupConfig,
    "read_grad_kernel": scans.ReadGradConfig,
    "count_kernel": pick_plan.PlanConfig,
    "usage_kernel": pick_plan.PlanConfig,
    "key_sum_kernel": key_step.KeySumConfig,
}
MODULES = [
    importlib.import_module(module.name)
    for module in pkgutil.iter_modules(fwpkm_kernels.kernels.__path__, "fwpkm_kernels.kernels.")
]


def is_a_tile(name: str) -> bool:
    return name.startswith("BLOCK_")


def launches() -> list[Any]:
    """Warps alone mean nothing to the interpreter, which runs the second of each kernel in `make test-all`."""
    return [
        pytest.param(
            name,
            instead,
            marks=SLOW_IN_INTERPRETER if instead is not launched.instead[0] else [],
            id=f"{name}-{'-'.join(f'{key}={value}' for key, value in instead.items())}",
        )
        for name, launched in LAUNCHED.items()
        for instead in launched.instead
        if HAS_GPU or any(map(is_a_tile, instead))
    ]


@pytest.mark.parametrize("name, instead", launches())
def test_every_launch(name, instead, triton_place, monkeypatch):
    launched = LAUNCHED[name]
    function = launched.function(triton_place)
    expected = function()
    launch, seen = _common.launch, set()
    results = []

    def call() -> Any:
        results[:] = [function()]
        return results[0]

    def otherwise(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        if kernel.fn.__name__ == name:
            assert set(instead) <= set(options)
            seen.update((key, options[key]) for key in instead)
            options |= instead
            if launched.owns is not None:
                axis, tile, count = launched.owns
                sizes = dict(zip(kernel.fn.__code__.co_varnames, args, strict=False)) | options
                grid = (*grid[:axis], -(-count(sizes) // options[tile]), *grid[axis + 1 :])
        launch(kernel, grid, *args, **options)

    for module in MODULES:
        if hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", otherwise)
    assert_same_bits_always(call, triton_place.device, min(RUNS, 5))
    assert seen - set(instead.items()), "as it is launched anyway, or not at all"
    for x, wanted in zip(*map(testing.asserts._tensors, (*results, expected)), strict=True):
        if launched.exact:
            testing.assert_bitwise_equal(x, wanted)
        else:
            torch.testing.assert_close(x, wanted, rtol=1e-4, atol=1e-4)


def test_every_kernel_is_launched_otherwise():
    """Every tile of each that can be another is; every table is in the tests above."""
    kernels = {
        name: [argument for argument in x.fn.__code__.co_varnames[: x.fn.__code__.co_argcount] if is_a_tile(argument)]
        for module in MODULES
        for name, x in vars(module).items()
        if name.endswith("_kernel")
    }
    assert set(kernels) == set(LAUNCHED) | set(BY_TABLE)
    assert not set(LAUNCHED) & set(BY_TABLE)
    for name, launched in LAUNCHED.items():
        varied = {key for instead in launched.instead for key in instead if is_a_tile(key)}
        assert sorted(kernels[name]) == sorted({*varied, *launched.whole}), name
        assert not varied & set(launched.whole)
    tables = {x for module in MODULES for name, x in vars(module).items() if name.endswith("Config")}
    assert tables == set(BY_TABLE.values())
