"""What is refused where tables are spread over ranks, on every rank, with nothing changed; ranks that do not come."""

import os
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fwpkm_kernels.distributed import clip_grad_norm_, replicate_tables_, shard_table_
from fwpkm_kernels.layers import FastWeightProductKeyMemory, ValueTable, advance_memory
from tests.helpers.columns import BATCH, COLUMNS, LENGTH, WIDTH, draw, f32, f64, make_layer, make_static
from tests.helpers.ranks import RankError, rank_device, run_ranks


def is_first() -> bool:
    return dist.get_rank() == 0


def make_mesh() -> DeviceMesh:
    return init_device_mesh(rank_device().type, (dist.get_world_size(),))


def spread(module: nn.Module) -> nn.Module:
    return shard_table_(module.to(rank_device()), make_mesh())


def under_fsdp() -> nn.Module:
    layer = make_layer().to(rank_device())
    fully_shard(layer.table, mesh=make_mesh())
    return layer


def two_layers(**options: Any) -> nn.Module:
    return nn.Sequential(make_layer(), make_layer(1, **options))


def share_on_the_first() -> nn.Module:
    one = make_layer()
    return nn.Sequential(one, make_layer(1, table=one.table if is_first() else None))


#: A module on each rank, and what its refusal says on the first rank, and on the second.
REFUSED: dict[str, tuple[Callable[[], Any], str, str]] = {
    name: (make, *((said, said) if isinstance(said, str) else said))
    for name, make, said in (
        ("no tables", lambda: nn.Linear(2, 2), "`module` must have a ValueTable, got a Linear without one"),
        ("spread", lambda: spread(make_layer()), "`table.weight` must not be sharded yet"),
        (
            "replicated",
            lambda: replicate_tables_(make_layer().to(rank_device())),
            "`table.weight` must not be replicated yet",
        ),
        ("FSDP", under_fsdp, "`table.weight` must not be sharded yet, also not by fully_shard"),
        (
            "width",
            lambda: two_layers(value_dim=5),
            "`value_dim` must be a multiple of the 2 ranks of `mesh`, got 5 in `1",
        ),
        ("a table", lambda: ValueTable(4, 3), "multiple of the 2 ranks of `mesh`, got 3 in `weight`"),
        ("keys", lambda: two_layers(key_gradient="all"), '`key_gradient` must be "addressing"'),
        ("sparse", lambda: make_static(sparse_grad=True), "`sparse_grad` must be False"),
        (
            "width of one",
            lambda: make_layer(value_dim=COLUMNS if is_first() else 5),
            ("rank 1 refuses its `module`: `value_dim` must be a multiple", "`value_dim` must be a multiple of"),
        ),
        (
            "a table of one",
            lambda: make_layer() if is_first() else nn.Linear(2, 2),
            ("rank 1 refuses its `module`: `module` must have a Val", "`module` must have a ValueTable"),
        ),
        (
            "chunk_size",
            lambda: make_layer(chunk_size=4 + dist.get_rank()),
            "got chunk_size = 4 on rank 0 and 5 on rank 1",
        ),
        (
            "value_dim",
            lambda: make_layer(value_dim=4 + 4 * dist.get_rank()),
            "got value_dim = 4 on rank 0 and 8 on rank 1",
        ),
        ("norm_eps", lambda: two_layers(norm_eps=10 ** -(dist.get_rank() + 4)), "got 1.q_norm.eps = 0.0001 on rank 0"),
        (
            "dropout",
            lambda: make_static(dropout=0.5 * dist.get_rank()),
            "got dropout.p = 0.0 on rank 0 and 0.5 on rank 1",
        ),
        (
            "layers",
            lambda: nn.Sequential(*[make_layer() for _ in range(1 + dist.get_rank())]),
            "got 1 = None on rank 0 and 'Fast",
        ),
        (
            "kind",
            lambda: make_layer() if is_first() else make_static(),
            "got its type = 'FastWeightProductKeyMemory' on",
        ),
        ("dtype", lambda: make_layer(dtype=f32 if is_first() else f64), "torch.float32"),
        ("bias", lambda: make_layer(bias=is_first()), r"got q_proj.bias = \(\[12\], torch.float64"),
        ("scope", lambda: make_layer(scope="batch" if is_first() else "sequence"), "got scope = 'batch' on rank 0"),
        ("mode", lambda: make_layer().train(is_first()), "got training = True on rank 0 and False on rank 1"),
        ("frozen", lambda: make_layer().requires_grad_(is_first()), "True.* on rank 0 and .*False.* on rank 1"),
        ("meta", lambda: make_layer(device=rank_device() if is_first() else "meta"), "'meta'"),
        (
            "shared",
            share_on_the_first,
            r"got 1.table.weight = .*, '0.table.weight'\) on rank 0 and .*, '1.table.weight'\)",
        ),
    )
}


def refuse_modules() -> dict[str, tuple[str, bool]]:
    """What each refusal says, and whether nothing has changed."""
    results, mesh = {}, make_mesh()
    for name, (make, *_) in REFUSED.items():
        module = make()
        if name not in ("meta", "FSDP", "spread"):
            module.to(rank_device())
        before = {
            key: (x, id(x), None if x.is_meta else local_of(x).clone())
            for key, x in module.state_dict(keep_vars=True).items()
        }
        tables = [(x, x.mesh, x.contents) for x in module.modules() if isinstance(x, ValueTable)]
        try:
            shard_table_(module, mesh)
            said = "nothing"
        except ValueError as error:
            said = str(error)
        after = module.state_dict(keep_vars=True)
        same = all(
            after[key] is x and (x.is_meta or torch.equal(local_of(x), held)) for key, (x, _, held) in before.items()
        )
        results[name] = said, same and all(x.mesh is mesh_of and x.contents is held for x, mesh_of, held in tables)
    return results


def local_of(x: Tensor) -> Tensor:
    return (x.to_local() if isinstance(x, DTensor) else x).detach()


def test_modules_are_refused_on_every_rank():
    for rank, of_rank in enumerate(run_ranks(refuse_modules, 2, group_timeout=20)):
        assert of_rank.keys() == REFUSED.keys()
        for name, (said, is_unchanged) in of_rank.items():
            assert re.search(REFUSED[name][1 + rank], said), f"{name} on rank {rank}: {said}"
            assert is_unchanged, f"{name} on rank {rank}"


def refuse_calls() -> list[str]:
    """Each says what was wrong; calls after them work."""
    mesh, device = make_mesh(), rank_device()
    layer, x = make_layer().to(device), draw(BATCH, LENGTH, WIDTH)
    two = init_device_mesh(device.type, (1, 2), mesh_dim_names=("data", "columns"))
    first = DeviceMesh(device.type, [0])
    persistent = shard_table_(make_layer(scope="batch", initial_memory="persistent").to(device), mesh)
    whole = make_layer(scope="batch", initial_memory="persistent").to(device)
    model = nn.ModuleList((whole, persistent))
    for one in model:
        one(x)
    keys = whole.keys.clone()
    assigned = shard_table_(make_layer().to(device), mesh)
    assigned.load_state_dict(make_layer().to(device).state_dict(), assign=True)
    trained = shard_table_(make_layer().to(device), mesh)
    trained(x).sum().backward()
    calls = {
        "TypeError: `module` must be a torch.nn.Module, got int": lambda: shard_table_(3, mesh),
        "TypeError: `mesh` must be a torch.distributed.device_mesh.DeviceMesh, got ProcessGroup": lambda: shard_table_(
            layer, mesh.get_group()
        ),
        "TypeError: `mesh` must be a torch.distributed.device_mesh.DeviceMesh, got NoneType": lambda: shard_table_(
            layer, None
        ),
        "ValueError: `mesh` must have one dimension, such as mesh['columns'] of a larger one": lambda: shard_table_(
            layer, two
        ),
        "ValueError: `mesh` must contain this rank, 1": lambda: is_first() or shard_table_(layer, first),
        "ValueError: `sparse_grad` must be False": lambda: make_static(
            table=spread(make_static()).table, sparse_grad=True
        ),
        "ValueError: `key_gradient` must be": lambda: moves_keys(x),
        'ValueError: `key_gradient` must be "addressing"': lambda: moves_keys(x, streams=True),
        "TypeError: `module` must be a torch.nn.Module, got NoneType": lambda: replicate_tables_(None),
        "ValueError: `module` must have a ValueTable, got a ReLU without one": lambda: replicate_tables_(nn.ReLU()),
        "ValueError: `module` must have its tables whole, or by columns": lambda: replicate_tables_(under_fsdp()),
        "TypeError: `parameters` must be tensors, got int": lambda: clip_grad_norm_(3, 1.0),
        "TypeError: `parameters` must be tensors, got one that is a str": lambda: clip_grad_norm_(["weight"], 1.0),
        "TypeError: `max_norm` must be a number, got NoneType": lambda: clip_grad_norm_(trained.parameters(), None),
        "ValueError: `max_norm` must be at least 0, got -1.0": lambda: clip_grad_norm_(trained.parameters(), -1.0),
        "ValueError: `max_norm` must be at least 0, got nan": lambda: clip_grad_norm_(
            trained.parameters(), float("nan")
        ),
        "TypeError: `norm_type` must be a number, got str": lambda: clip_grad_norm_(trained.parameters(), 1.0, "inf"),
        "ValueError: `norm_type` must be above 0, got 0": lambda: clip_grad_norm_(trained.parameters(), 1.0, 0),
        "ValueError: `group` must be the ranks that have the same columns of the table": lambda: advance_memory(
            model, dist.new_group([0, 1])
        ),
        "RuntimeError: `table.weight` must have the 4 columns that `shard_table_` has left this rank, got 8": lambda: (
            assigned(x)
        ),
        "RuntimeError: `table.weight` must be here": lambda: FastWeightProductKeyMemory.__call__(under_fsdp_table(), x),
    }
    wrong = []
    for said, call in calls.items():
        try:
            call()
            came = "nothing"
        except Exception as error:
            came = f"{type(error).__name__}: {error}"
        if not came.startswith(said) and not (is_first() and "this rank, 1" in said):
            wrong.append(f"{said} <- {came}")
    assert torch.equal(whole.keys, keys)  # the first of the layers that `group` does not fit to has not been advanced
    assert layer.table.mesh is None
    shard_table_(layer, mesh)(x)
    advance_memory(model)
    assert not torch.equal(whole.keys, keys)
    return wrong


def moves_keys(x: Tensor, *, streams: bool = False) -> None:
    """Call a layer whose keys move by whole rows, with a table that another one has spread."""
    layer = make_layer(table=spread(make_layer()).table, key_gradient="all").to(rank_device())
    with torch.set_grad_enabled(not streams):
        layer(x, memory=layer.new_memory(BATCH) if streams else None)


def under_fsdp_table() -> nn.Module:
    """A layer that asks for the columns of a table whose rows lie on other ranks."""
    layer = make_layer(initial_memory="frozen").to(rank_device())
    spread_rows = torch.distributed.tensor.distribute_tensor(
        layer.table.weight, make_mesh(), [torch.distributed.tensor.Shard(0)]
    )
    layer.table.weight = spread_rows
    return layer


def test_calls_are_refused():
    assert run_ranks(refuse_calls, 2, group_timeout=20) == [[], []]


def refuse_devices() -> str:
    mesh = make_mesh()
    table = ValueTable(4, 4, device="cpu" if mesh.device_type == "cuda" else "meta")
    if mesh.device_type == "cpu":
        fake = torch._subclasses.FakeTensorMode()
        with fake:
            table.weight = nn.Parameter(torch.empty(4, 4, device="cuda"))
    try:
        shard_table_(table, mesh)
    except ValueError as error:
        return str(error)
    return "nothing"


def test_devices():
    for said in run_ranks(refuse_devices, 2):
        assert re.match("`weight` must be on the devices of `mesh`, (cpu, got cuda|cuda, got cpu)", said), said


def wait_for_the_other(how: str, where: str) -> None:
    """The second rank ends, or sleeps, before its part of a collective of forward or of backward."""
    layer, x = spread(make_layer()), draw(BATCH, LENGTH, WIDTH)
    if where == "backward":
        output = layer(x)
    if dist.get_rank() == 1:
        if how == "ends":
            os._exit(3)
        time.sleep(5)
        return
    begin = time.monotonic()
    try:
        if where == "backward":
            output.sum().backward()
        else:
            layer(x).sum().item()
    finally:
        assert time.monotonic() - begin < 60


@pytest.mark.parametrize("where", ["forward", pytest.param("backward", marks=pytest.mark.slow)])
def test_a_rank_that_does_not_come(where):
    """The other one ends with torch's own time-out."""
    error, nothing = run_ranks(wait_for_the_other, 2, "sleeps", where, group_timeout=2, expects_errors=True)
    assert nothing is None
    assert re.search("Timed out waiting 2000ms|timeout", str(error), re.IGNORECASE), error


@pytest.mark.parametrize("where", ["forward", pytest.param("backward", marks=pytest.mark.slow)])
def test_a_rank_that_dies(where):
    """The other one ends with torch's own error."""
    with pytest.raises(RankError, match="rank 1 died with exit code 3") as caught:
        run_ranks(wait_for_the_other, 2, "ends", where, group_timeout=20)
    assert caught.value.exit_codes == {1: 3}
    if torch.cuda.device_count() < 2:  # gloo sees it at once, nccl waits
        assert re.search("RuntimeError: .*(Connection (closed|reset)|Broken pipe|Timed out)", caught.value.errors[0])
