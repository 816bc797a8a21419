"""Layers whose tables are spread by columns over ranks: outputs bit for bit, gradients to rounding."""

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from fwpkm_kernels import MemoryPool
from fwpkm_kernels.distributed import shard_table_
from fwpkm_kernels.layers import ProductKeyMemory, ValueTable, advance_memory
from tests.conftest import SLOW_IN_INTERPRETER
from tests.helpers.columns import (
    BATCH,
    COLUMNS,
    LENGTH,
    WIDTH,
    Results,
    draw,
    draw_like,
    dtype_of,
    f32,
    gradients_of,
    local,
    make_layer,
    make_static,
    own_part,
    train,
)
from tests.helpers.ranks import rank_device, run_ranks


def make_shared(seed: int = 0, **options: Any) -> nn.Module:
    one = make_layer(seed, **options)
    return nn.Sequential(one, make_layer(seed + 10, table=one.table, **options))


def train_in_autocast(module: nn.Module) -> Results:
    with torch.autocast(rank_device().type, torch.bfloat16):
        return train(module)


def train_compiled(module: nn.Module, **how: Any) -> Results:
    return train(module, call=torch.compile(module, fullgraph=True, backend="aot_eager"), **how)


def train_by_call(module: nn.Module) -> Results:
    """With the parameters from outside, which are no attributes of the module."""
    named = {name: x.detach().clone().requires_grad_() for name, x in module.named_parameters()}
    results = train(module, call=lambda x: torch.func.functional_call(module, named, (x,)))
    return results | {f"d {name}": local(x.grad) for name, x in named.items()}


def train_again(module: nn.Module) -> Results:
    """With activation checkpoints, of both kinds."""
    results = {}
    for reentrant in (False, True):
        module.zero_grad()
        result = train(module, call=lambda x, kind=reentrant: checkpoint(module, x, use_reentrant=kind))
        results |= {f"{name}, {reentrant}": x for name, x in result.items()}
    return results


def train_segments(layer: Any, *, detach: bool = False) -> Results:
    """Three segments: gradients of their outputs and of the memory of the last one, through all memories."""
    x, results, loss = draw(BATCH, LENGTH, WIDTH, dtype=dtype_of(layer)).requires_grad_(), {}, 0.0
    memory: Any = None
    for number, piece in enumerate(x.split([3, 5, 2], dim=1)):
        output, memory = layer(piece, memory=memory, return_memory=True)
        loss = loss + (output * draw_like(output)).sum()
        rows = memory.values if isinstance(memory.values, Tensor) else memory.values.value
        results |= {f"output {number}": output, f"keys {number}": memory.keys, f"rows {number}": rows}
        results |= {f"slots {number}": memory.slots, f"gate mean {number}": memory.gate_mean}
        if memory.carry is not None:
            results[f"carry {number}"] = memory.carry.targets
        if detach and number == 0:
            memory = memory.detach()
    loss = loss + (rows * own_part(draw(*rows.shape[:-1], COLUMNS, dtype=rows.dtype), layer)).sum()
    (loss + (memory.keys * draw_like(memory.keys)).sum() + memory.gate_mean).backward()
    return results | gradients_of(layer, x)


def advance(layer: Any) -> Results:
    """Steps of a memory that persists; after the second one all rows are replaced."""
    results = train(layer)
    for number in range(2):
        output = layer(draw(BATCH, LENGTH, WIDTH, seed=number), return_memory=number == 1)
        advance_memory(layer, reduce="mean" if layer.table.mesh else "none")
        output = output if isinstance(output, Tensor) else output[0]
        results |= {f"output {number}": output, f"keys {number}": layer.keys.clone()}
        results[f"table {number}"] = local(layer.table.weight).clone()
    return results


@torch.no_grad()
def stream(layer: Any, *, cuts: tuple[int, ...] = (3, 1, 6, 2, 5)) -> Results:
    """Tokens in pieces, two of them taken back and read again; then sequences that go on, copies, a new beginning."""
    results, x = {}, draw(3, sum(cuts), WIDTH, dtype=dtype_of(layer))
    memory = layer.new_memory(3)
    memory.records_past = True
    for number, piece in enumerate(x.split(cuts, dim=1)):
        results[f"piece {number}"] = layer(piece, memory=memory)
        if number in (1, 4):
            memory.rollback(piece.shape[1])
            results[f"again {number}"] = layer(piece, memory=memory)
    other = memory.clone()
    memory.reorder([2, 0, 0] if layer.scope == "sequence" else [0, 2])
    results["reordered"] = layer(x[: memory.batch], memory=memory)
    results["clone"] = layer(x, memory=other)
    twin = copy.deepcopy(layer)
    results["deepcopy"] = twin(x, memory=twin.new_memory(3))
    memory.reset()
    results["reset"] = layer(x[: memory.batch], memory=memory)
    mask = torch.ones(3, x.shape[1], device=x.device)
    mask[0, :3] = mask[1, 5:9] = 0
    results["padded"] = layer(x, mask, memory=layer.new_memory(3))
    layer.load_state_dict({name: 0.5 * tensor for name, tensor in layer.state_dict().items()})
    memory.reset()
    results["loaded"] = layer(x[: memory.batch], memory=memory)
    results["new"] = layer(x, memory=layer.new_memory(3))
    return results


@torch.no_grad()
def stream_pool(layer: Any) -> Results:
    """Memories of one pool, which the caller has made."""
    pool, x, results = MemoryPool(layer.keys, layer.table.columns, capacity=150), draw(3, 13, WIDTH), {}
    one, two = layer.new_memory(2, pool=pool), layer.new_memory(1, pool=pool)
    for number, piece in enumerate(x.split([5, 1, 7], dim=1)):
        results[f"one {number}"] = layer(piece[:2], memory=one)
        results[f"two {number}"] = layer(piece[2:], memory=two)
    one = type(one).joined([one, two])
    return results | {"joined": layer(x, memory=one)}


@torch.no_grad()
def read(module: nn.Module) -> Results:
    """In evaluation, with other tensors after a load; what a ProductKeyMemory says of its slots."""
    x = draw(BATCH, LENGTH, WIDTH)
    results = {"output": module.eval()(x)}
    if isinstance(module, ProductKeyMemory):
        results["slots"], results["weights"] = module.address(x)
    module.load_state_dict({name: 0.5 * tensor for name, tensor in module.state_dict().items()})
    return results | {"loaded": module(x), "table": local(module.table.weight)}


class Case(NamedTuple):
    """A layer, and what is done with it."""

    make: Callable[..., nn.Module]
    run: Callable[..., Results] = train
    tolerance: float = 1e-12  #: of gradients, relative to the largest element; 1e-5 in float32, 3e-2 in bfloat16

    def both(self, mesh: Any) -> tuple[Results, Results]:
        """Of the whole layer and of the one that is spread, in which the first rank's tensors are those of all."""
        results = []
        for seed in (0, dist.get_rank()):
            module = self.make(seed).to(rank_device())
            if len(results) == 1:
                module = shard_table_(module, mesh)
                for table in (x for x in module.modules() if isinstance(x, ValueTable)):
                    assert table.columns.shape[1] * mesh.size() == table.width  # else two whole layers are compared
            torch.manual_seed(3)
            results.append(self.run(module))
        return results[0], results[1]


def layer(run: Callable[..., Results] = train, tolerance: float = 1e-12, **options: Any) -> Case:
    return Case(functools.partial(make_layer, **options), run, tolerance)


def static(run: Callable[..., Results] = train, tolerance: float = 1e-12, **options: Any) -> Case:
    return Case(functools.partial(make_static, **options), run, tolerance)


MASK = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 0, 0]])
padded = functools.partial(train, attention_mask=MASK)
packed = functools.partial(train, batch=1, cu_seqlens=torch.tensor([0, 3, 3, 8, 10]))
compiled_padded = functools.partial(train_compiled, attention_mask=MASK)
no_tokens, no_rows = functools.partial(train, length=0), functools.partial(train, batch=0)
in_bfloat16 = {"memory_dtype": torch.bfloat16, "dtype": f32}

CASES: dict[str, dict[str, Case]] = {}
for scope in ("sequence", "batch"):
    of = functools.partial(layer, scope=scope)
    CASES[scope] = {
        "plain": of(),
        "paper": of(boundary="drop"),
        "gradient": of(step="gradient", lr=0.1, clip=0.5),
        "normalized": of(step="normalized", boundary="drop", lookahead=0),
        "decay": of(weight_decay=0.1, score="dot", weighting="silu", query_conv=None),
        "no gate": of(gate=False),
        "no gates": of(gate=False, write_gate=False),
        "no write gate": of(write_gate=False, query_norm="l2", value_norm="l2"),
        "padded": of(padded),
        "packed": of(packed),
        "no tokens": of(no_tokens),
        "no rows": of(no_rows),
        "one column": of(value_dim=2),
        "whole cache lines": of(value_dim=16),
        "frozen": of(initial_memory="frozen"),
        "by call": of(train_by_call),
    }
    CASES[f"{scope}, segments"] = {
        "carry": of(train_segments),
        "drop": of(train_segments, boundary="drop"),
        "detached": of(functools.partial(train_segments, detach=True)),
        "decay": of(train_segments, weight_decay=0.1),
        "checkpoints": of(train_again),
        "shared": Case(functools.partial(make_shared, scope=scope)),
    }
    CASES[f"{scope}, few bits"] = {
        "float32": of(tolerance=1e-5, dtype=f32),
        "float32 segments": of(train_segments, 1e-5, dtype=f32),
        "autocast": of(train_in_autocast, 3e-2, dtype=f32),
        "bfloat16": of(tolerance=3e-2, **in_bfloat16),
        "bfloat16 layer": of(tolerance=3e-2, memory_dtype=torch.bfloat16, dtype=torch.bfloat16),
        "stream": of(stream, dtype=f32),
        "bfloat16 stream": of(stream, **in_bfloat16),
    }
    CASES[f"{scope}, streaming"] = {
        "plain": of(stream),
        "decay": of(stream, weight_decay=0.1),
        "frozen": of(stream, initial_memory="frozen", query_conv=None),
        "read": of(read),
    }
CASES["sequence, streaming"]["pool"] = layer(stream_pool)
CASES["persistent"] = {
    "plain": layer(advance, scope="batch", initial_memory="persistent"),
    "decay": layer(advance, scope="batch", initial_memory="persistent", weight_decay=0.1),
    "stream": layer(stream, scope="batch", initial_memory="persistent"),
}
CASES["static"] = {
    **{output: static(output=output) for output in ("swilu", "gated", "linear")},
    "none": static(output="none", value_dim=WIDTH),
    "dropout": static(dropout=0.5, weighting="relu"),
    "no tokens": static(no_tokens),
    "one column": static(value_dim=2),
    "float32": static(tolerance=1e-5, dtype=f32),
    "autocast": static(train_in_autocast, 3e-2, dtype=f32),
    "checkpoints": static(train_again, dropout=0.5),
    "by call": static(train_by_call),
    "read": static(read),
}
CASES["compiled"] = {
    "sequence": layer(train_compiled),
    "static": static(train_compiled),
}
CASES["compiled, other ways"] = {"batch": layer(train_compiled, scope="batch"), "padded": layer(compiled_padded)}
small = {"num_keys": 3, "heads": 1, "top_k": 2, "key_dim": 2, "value_dim": 2, "backend": "triton", "dtype": f32}
in_kernels = functools.partial(train, batch=1, length=5)
CASES["triton"] = {
    "sequence": layer(in_kernels, 1e-5, chunk_size=2, **small),
    "batch": layer(in_kernels, 1e-5, chunk_size=2, scope="batch", **small),
    "static": static(in_kernels, 1e-5, **small),
}


def run_cases(name: str, which: tuple[str, ...] = ()) -> dict[str, tuple[Results, Results]]:
    mesh = init_device_mesh(rank_device().type, (dist.get_world_size(),))
    return {name: case.both(mesh) for name, case in CASES[name].items() if not which or name in which}


def check_spread(results: list[Any], cases: dict[str, Case]) -> None:
    for name in results[0]:
        check_case([of_rank[name] for of_rank in results], name, cases[name].tolerance)


def check_case(results: list[tuple[Results, Results]], case: str, tolerance: float) -> None:
    for rank, (whole, spread) in enumerate(results):
        assert whole.keys() == spread.keys()
        for name, x in spread.items():
            what, expected, is_own = f"{case}: {name} on rank {rank}", whole[name], x.shape != whole[name].shape
            if is_own:
                expected = expected.chunk(len(results), -1)[rank]
            assert x.shape == expected.shape, what
            assert x.dtype == expected.dtype, what
            if not name.startswith("d "):
                assert torch.equal(x, expected), what
                continue
            assert is_own or torch.equal(x, results[0][1][name]), f"{what} is another than on rank 0"
            if x.numel() > 0:
                error, most = float((x.double() - expected.double()).abs().max()), float(whole[name].abs().max())
                assert error <= tolerance * most, f"{what}: error {error:.3g} of {most:.3g}"


BY_COMPILERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("compiled", "compiled, other ways")]
BY_COMPILERS.append(pytest.param("triton", marks=SLOW_IN_INTERPRETER))
OTHERS = [name for name in CASES if not name.startswith(("compiled", "triton"))]


@pytest.mark.parametrize("name", OTHERS)
def test_outputs_are_equal_and_gradients_agree(name):
    check_spread(run_ranks(run_cases, 2, name), CASES[name])


@pytest.mark.parametrize("name", BY_COMPILERS)
def test_compiled_and_in_kernels(name):
    check_spread(run_ranks(run_cases, 2, name), CASES[name])


def run_on_four() -> dict[str, Any]:
    """All of four ranks have columns of their own; or two have, for one half of a batch and for the other."""
    results: dict[str, Any] = {}
    for name, case in (
        ("sequence", "plain"),
        ("batch", "plain"),
        ("static", "swilu"),
        ("sequence, streaming", "plain"),
    ):
        results[name] = run_cases(name, (case,))[case]
    mesh = init_device_mesh(rank_device().type, (2, 2), mesh_dim_names=("data", "columns"))
    halves = draw(2, 1, LENGTH, WIDTH)
    make = functools.partial(make_layer, scope="batch", initial_memory="persistent")
    layer = shard_table_(make(dist.get_rank() % 2).to(rank_device()), mesh["columns"])
    layer(halves[mesh["data"].get_local_rank()])
    advance_memory(layer, mesh["data"].get_group())
    ends = []
    for half in halves:
        whole = make().to(rank_device())
        whole(half)
        advance_memory(whole, reduce="none")
        ends.append((whole.keys, own_part(whole.table.weight, layer)))
    return results | {"advanced": (layer.keys, layer.table.columns), "ends": ends}


@pytest.mark.slow
def test_four_ranks():
    results = run_ranks(run_on_four, 4)
    for name in results[0].keys() - {"advanced", "ends"}:
        check_case([of_rank[name] for of_rank in results], name, 1e-12)
    for of_rank in results:
        for own, *ends in zip(of_rank["advanced"], *of_rank["ends"], strict=True):
            torch.testing.assert_close(own, sum(ends) / 2, rtol=1e-12, atol=1e-14)
