"""The model of several GPUs: its payloads are those that are counted on ranks, and the page is what it prints."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks import payloads, scaling
from benchmarks.collectives import count_collectives
from benchmarks.payloads import Payload, Place, Sizes
from fwpkm_kernels.distributed import replicate_tables_, shard_table_
from fwpkm_kernels.layers import ProductKeyMemory
from tests.helpers.ranks import rank_device, run_ranks

Totals = dict[tuple[str, str, str], int]
#: Two chunks and a part of a third one, tokens that are read twice, and parameters with rows that FSDP has to pad.
SMALL = Sizes(2, 11, 6, num_keys=4, heads=2, top_k=2, key_dim=8, value_dim=8, chunk=4, lookahead=2)


def make(kind: str, device: Any) -> nn.Module:
    if kind != "static":
        return SMALL.layer(device=device, scope=kind)
    sizes = {"num_keys": SMALL.num_keys, "heads": SMALL.heads, "top_k": SMALL.top_k}
    return ProductKeyMemory(SMALL.hidden, key_dim=SMALL.key_dim, value_dim=SMALL.value_dim, device=device, **sizes)


def counted(how: str, kind: str, mesh: DeviceMesh) -> Totals:
    """Bytes of a step by group, part of the step and kind of collective."""
    data, device = mesh["data"], rank_device()
    torch.manual_seed(0)
    module = make(kind, device)
    table = module.table
    if mesh["columns"].size() > 1:
        shard_table_(module, mesh["columns"])
    if how.startswith("rows"):
        fully_shard(table, mesh=data, reshard_after_forward=how == "rows again")
        fully_shard(module, mesh=data)
    elif how != "columns":
        if how == "replicated":
            replicate_tables_(module, data.get_group())
        module = nn.parallel.DistributedDataParallel(module, process_group=data.get_group())
    x = torch.randn(SMALL.batch, SMALL.length, SMALL.hidden, device=device)
    groups = {mesh.get_group(name).group_name: name for name in ("data", "columns")}
    for _ in range(3):  # DistributedDataParallel arranges its buckets in the first ones
        with count_collectives() as forward:
            y = module(x)
        with count_collectives() as backward:
            y.square().sum().backward()
    every = [("forward", call) for call in forward.calls] + [("backward", call) for call in backward.calls]
    return added_up([Payload(groups[call.group], when, call.kind, call.bytes) for when, call in every])


def every_count(parts: int, cases: list[tuple[str, str]]) -> list[Totals]:
    """Of each case, on `parts` ranks by columns times the others."""
    sizes = (torch.distributed.get_world_size() // parts, parts)
    mesh = init_device_mesh(rank_device().type, sizes, mesh_dim_names=("data", "columns"))
    return [counted(how, kind, mesh) for how, kind in cases]


def added_up(calls: list[Payload]) -> Totals:
    totals: Totals = {}
    for call in calls:
        totals[call[:3]] = totals.get(call[:3], 0) + call.bytes
    return totals


def formula(how: str, kind: str, ranks: int, parts: int) -> Totals:
    module, calls = make(kind, "meta"), payloads.columns(SMALL, kind == "static") if parts > 1 else []
    if how.startswith("rows"):
        calls += payloads.rows(SMALL, module, ranks // parts, parts, again=how == "rows again")
    elif how != "columns":
        calls += payloads.data(SMALL, module, parts)
        # Ranks tell each other which tables they have used: a number for each, of which the model of costs has none.
        calls += [Payload("data", "backward", "all_reduce", 8)] * (how == "replicated")
    return added_up(calls)


@pytest.mark.parametrize(
    ("ranks", "parts", "ways", "kinds"),
    [
        (2, 2, ["columns"], ["sequence", "batch", "static"]),
        (2, 1, ["DDP", "replicated", "rows", "rows again"], ["sequence", "static"]),
        pytest.param(4, 4, ["columns"], ["sequence", "static"], marks=pytest.mark.slow),
        pytest.param(4, 1, ["replicated", "rows again"], ["sequence"], marks=pytest.mark.slow),
        pytest.param(4, 2, ["replicated", "rows", "rows again"], ["sequence", "static"], marks=pytest.mark.slow),
    ],
)
def test_payloads_are_those_that_are_counted(ranks, parts, ways, kinds):
    cases = [(how, kind) for how in ways for kind in kinds]
    for every in run_ranks(every_count, ranks, parts, cases):
        for case, totals in zip(cases, every, strict=True):
            assert totals == formula(*case, ranks, parts), case


def test_what_a_ring_sends():
    eight, far = Place(near=8), Place(nodes=8)
    gather, total = Payload("data", "forward", "all_gather", 800), Payload("data", "backward", "all_reduce", 800)
    assert (payloads.sent(gather, eight), payloads.sent(total, eight), payloads.sent(total, Place())) == (700, 1400, 0)
    assert payloads.seconds(gather, Place()) == 0
    assert payloads.seconds(gather, eight) == pytest.approx(8e-6 + 7e-6 + 700 / 450e9)
    assert payloads.seconds(total, far) == pytest.approx(8e-6 + 2 * 15e-6 + 1400 / 50e9)
    assert payloads.seconds(gather, Place(8, 2)) == pytest.approx(8e-6 + 12e-6 + 750 / 400e9)


def test_the_page_has_what_the_program_prints():
    """In another process: in this one the kernels may belong to Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.scaling"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    tables = result.stdout.strip().split("\n\n")
    page = scaling.TABLE.read_text("utf-8")
    assert page.count("<!-- benchmarks.scaling -->") == len(tables) == 4
    assert scaling.filled_in(page, tables) == page, "write it again: python -m benchmarks.scaling --write"
    assert scaling.filled_in(page, ["| a |"] * 4).count("| a |") == 4
