"""What crosses between ranks with columns of their own, what these draw, and changes to layers that are spread."""

import copy
import io
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from benchmarks.collectives import Total, count_collectives
from fwpkm_kernels.distributed import shard_table_
from fwpkm_kernels.layers import ValueTable, advance_memory, parameter_groups
from fwpkm_kernels.layers.convert import to_published
from tests.helpers.columns import (
    BATCH,
    COLUMNS,
    LENGTH,
    WIDTH,
    draw,
    dtype_of,
    f32,
    f64,
    local,
    make_layer,
    make_static,
    own_part,
)
from tests.helpers.ranks import rank_device, run_ranks


def count_bytes() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Of forward and of backward; of one that streams it is what a call costs."""
    mesh = init_device_mesh(rank_device().type, (2,))
    counts = {}
    for name, dtype, options in COUNTED:
        module = make_static(dtype=dtype) if name == "static" else make_layer(dtype=dtype, **options)
        module = shard_table_(module.to(rank_device()), mesh)
        x = draw(BATCH, LENGTH, WIDTH, dtype=dtype).requires_grad_()
        with count_collectives() as forward:
            output = module(x)
        with count_collectives() as backward:
            output.sum().backward()
        counts[f"{name} {dtype} {options}"] = forward.totals(), backward.totals()
    with torch.no_grad():
        layer = shard_table_(make_layer().to(rank_device()), mesh)
        memory = layer.new_memory(BATCH)
        with count_collectives() as first:
            layer(x.to(f64), memory=memory)
        with count_collectives() as second:
            layer(x[:, :1].to(f64), memory=memory)
    return counts | {"stream": (first.totals(), second.totals())}


COUNTED = [
    ("layer", f32, {"scope": "sequence"}),
    ("layer", f64, {"scope": "sequence"}),
    ("layer", f32, {"scope": "batch"}),
    ("layer", f32, {"scope": "batch", "boundary": "drop"}),
    ("layer", f32, {"scope": "sequence", "initial_memory": "frozen"}),
    ("static", f32, {}),
    ("static", f64, {}),
]


def test_what_crosses():
    """Forward the output, backward the gradient of the targets and the sum of those of weights: nothing else."""
    first, other = run_ranks(count_bytes, 2)
    assert first == other
    picks, tokens = 2 * 3, BATCH * LENGTH
    # A chunk that is written reads the last token of the chunk before again: here the second of two whole ones.
    reads = {"carry": BATCH * (LENGTH + 1), "drop": BATCH * LENGTH}
    for name, dtype, options in COUNTED:
        joined = Total(1, tokens * COLUMNS * dtype.itemsize)
        weights = tokens * picks if name == "static" else 2 * reads[options.get("boundary", "carry")] * picks
        backward = {"all_reduce": Total(1, weights * dtype.itemsize)}
        backward |= {} if name == "static" else {"all_gather": joined}
        assert first.pop(f"{name} {dtype} {options}") == ({"all_gather": joined}, backward), (name, dtype, options)
    pieces = [{"all_gather": Total(1, BATCH * length * COLUMNS * 8)} for length in (LENGTH, 1)]
    assert first == {"stream": tuple(pieces)}


def reset() -> dict[str, Any]:
    """What is drawn where there were numbers, and where there was no memory for them yet; random states afterwards."""
    mesh = init_device_mesh(rank_device().type, (2,))
    results: dict[str, Any] = {}
    for name in ("sequence", "frozen", "static"):
        options = {"initial_memory": "frozen"} if name == "frozen" else {}
        for device in (rank_device(), torch.device("meta")):
            module = (make_static if name == "static" else make_layer)(dist.get_rank(), device=device, **options)
            contents = shard_table_(module, mesh).table.contents
            if device.type == "meta":
                module.to_empty(device=rank_device())
            torch.manual_seed(7)
            module.reset_parameters()
            assert module.table.contents is not contents
            same = {key: x for key, x in module.state_dict().items() if key != "table.weight"}
            # The table is drawn between others: what is random after it must not depend on the rank.
            same |= {"random": torch.rand(3), "output": module(draw(BATCH, LENGTH, WIDTH))}
            whole = module.table.weight.full_tensor()
            results[f"{name} {device.type}"] = same, whole, whole.chunk(2, -1)[dist.get_rank()], module.table.columns
    table = shard_table_(ValueTable(4, 6, init="zeros"), mesh)
    nn.init.ones_(table.weight)
    table.reset_parameters()
    return results | {"zeros": table.columns}


def test_reset_parameters():
    """Each rank draws columns of its own, and all else is the same on all ranks."""
    one, two = run_ranks(reset, 2)
    for rank in (one, two):
        assert torch.equal(rank.pop("zeros"), torch.zeros(4, 3))
    for name in one:
        (same, whole, *columns), (also, its_whole, *_) = one[name], two[name]
        for key in same:
            assert torch.equal(same[key], also[key]), f"{name}: {key}"
        assert torch.equal(whole, its_whole)
        assert torch.equal(*columns)
        left, right = whole.chunk(2, -1)
        assert not torch.isin(left, right).any()
        assert 0.7 < float(whole.std()) * COLUMNS**0.5 < 1.3


def change() -> dict[str, Any]:
    """What is done with a layer that is spread: it goes on as the whole one to which the same is done."""
    mesh, x, results = init_device_mesh(rank_device().type, (2,)), draw(BATCH, LENGTH, WIDTH), {}
    for name, (options, do) in CHANGES.items():
        layers = make_layer(0, **options).to(rank_device()), make_layer(dist.get_rank(), **options).to(rank_device())
        changed = [do(layer) for layer in (layers[0], shard_table_(layers[1], mesh))]
        ours, theirs = (layer(x.to(dtype_of(layer))) for layer in changed)
        table = changed[1].table
        has_columns = torch.equal(own_part(changed[0].table.weight, changed[1]), table.columns)
        results[name] = torch.equal(ours, theirs), has_columns, type(table.weight.data), table.weight.dtype
    return results


def saved(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def scattered(layer: Any) -> Any:
    """Other strides on the first rank than on others."""
    if dist.get_rank() == 0:
        for module, name in ((layer, "keys"), (layer.table, "weight"), (layer.q_proj, "weight")):
            x = getattr(module, name).detach()
            setattr(module, name, nn.Parameter(x.mT.contiguous().mT))
    return layer


def stepped(layer: Any) -> Any:
    optimizer = torch.optim.SGD(parameter_groups(layer, lr=0.1, weight_decay=0.0), lr=0.1)
    layer(draw(BATCH, LENGTH, WIDTH)).square().mean().backward()
    optimizer.step()
    return layer


CHANGES: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "double": ({"dtype": f32}, lambda layer: layer.double()),
    "half": ({"dtype": f32}, lambda layer: layer.half()),
    "bfloat16, not rounded": ({"dtype": f32, "initial_memory": "frozen"}, lambda layer: layer.to(torch.bfloat16)),
    "deepcopy": ({}, copy.deepcopy),
    "saved": ({}, saved),
}


def test_changed_layers():
    dtypes = {"double": f64, "half": torch.float16, "bfloat16, not rounded": f32}
    for of_rank in run_ranks(change, 2):
        for name, result in of_rank.items():
            assert result == (True, True, DTensor, dtypes.get(name, f64)), name


def spread_others() -> dict[str, Any]:
    """Tensors with other strides on the first rank, tied tables, a mesh of one rank, a table alone, inference mode."""
    device, x = rank_device(), draw(BATCH, LENGTH, WIDTH)
    mesh = init_device_mesh(device.type, (2,))
    layer = shard_table_(scattered(make_layer(dist.get_rank()).to(device)), mesh)
    results: dict[str, Any] = {"strides": torch.equal(layer(x), make_layer().to(device)(x))}

    one, two = make_layer().to(device), make_layer(1).to(device)
    two.table.weight = one.table.weight
    whole = two(one(x))
    model = shard_table_(nn.Sequential(one, two), mesh)
    results["tied"] = one.table.weight is two.table.weight, torch.equal(model(x), whole)

    alone = init_device_mesh(device.type, (2, 1), mesh_dim_names=("data", "columns"))["columns"]
    layer = shard_table_(make_layer().to(device), alone)
    results["alone"] = torch.equal(layer(x), make_layer().to(device)(x)), layer.table.num_columns

    table = shard_table_(ValueTable(4, 6).to(device), mesh)
    results["table"] = table.num_columns, table(lambda columns: list(columns.shape)), table.mesh is mesh

    layer = make_layer().to(device)
    layer.table.requires_grad_(False)
    with torch.inference_mode():
        shard_table_(layer, mesh)
    results["inference"] = layer.table.weight.is_inference(), layer.table.weight.requires_grad, layer(x).requires_grad

    layer = shard_table_(make_layer(initial_memory="frozen").to(device), mesh)
    large = layer.resized(8)
    results["resized"] = large.table.mesh is None, type(large.table.weight) is Tensor, layer.table.mesh is mesh
    shard_table_(large, mesh)
    results["resized"] += (large(x).shape == x.shape,)
    layer = shard_table_(make_layer(query_conv=None).to(device), mesh)
    published = to_published(layer.state_dict())["fwpkm.values"]
    results["published"] = torch.equal(published.full_tensor(), layer.table.weight.full_tensor())
    layer = make_layer(scope="batch", initial_memory="persistent").to(device)
    layer(x)
    advance_memory(shard_table_(layer, mesh))
    results["pending"] = torch.equal(layer.keys, make_layer().to(device).keys)
    layer = stepped(shard_table_(make_layer().to(device), mesh))
    results["step"] = torch.equal(
        local(layer.table.weight), own_part(stepped(make_layer().to(device)).table.weight, layer)
    )
    return results


def test_other_layers():
    for of_rank in run_ranks(spread_others, 2):
        assert of_rank == {
            "strides": True,
            "tied": (True, True),
            "alone": (True, COLUMNS),
            "table": (3, [4, 3], True),
            "inference": (False, False, True),
            "resized": (True, True, True, True),
            "published": True,
            "pending": True,  # what a call has left behind before is forgotten, since it has all columns
            "step": True,
        }
