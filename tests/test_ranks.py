"""The ranks that tests run functions on: results, errors, ends of processes, groups that follow one another."""

import gc
import os
import time
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.helpers import ranks
from tests.helpers.ranks import RankError, rank_device, run_ranks


class Named(NamedTuple):
    rank: int
    tensors: dict[str, Tensor]


def summed(x: Tensor) -> Named:
    x = x.to(rank_device()) * (dist.get_rank() + 1)
    dist.all_reduce(x)
    return Named(dist.get_rank(), {"row": x[1], "process": torch.tensor(os.getpid())})


def test_results_of_each_rank_and_the_same_processes_for_the_next_call():
    x = torch.arange(6.0).view(2, 3)
    before = run_ranks(summed, 2, x)
    after = run_ranks(summed, 2, 2 * x)
    for factor, results in (3, before), (6, after):
        assert [one.rank for one in results] == [0, 1]
        for one in results:
            assert type(one) is Named
            torch.testing.assert_close(one.tensors["row"], factor * x[1], rtol=0, atol=0)
    processes = [[int(one.tensors["process"]) for one in results] for results in (before, after)]
    assert processes[0] == processes[1]
    assert len({*processes[0], os.getpid()}) == 3


def settings() -> tuple[int, int, Tensor]:
    return torch.get_num_threads(), dist.get_world_size(), torch.rand(2)


def test_calls_begin_alike():
    before, after = run_ranks(settings, 2), run_ranks(settings, 2)
    assert [one[:2] for one in before + after] == [(1, 2)] * 4
    assert len({tuple(one[2].tolist()) for one in before + after}) == 1


def gathered(names: tuple[str, ...], shape: tuple[int, ...], groups: int = 0) -> tuple[Tensor, Tensor, list[int]]:
    """A product of DTensors, whose placements torch keeps in caches, and a sum over the last dimension of the mesh; in
    a process where other groups were made before."""
    for _ in range(groups):
        dist.new_group([0])
    mesh = init_device_mesh(rank_device().type, shape, mesh_dim_names=names)
    x = torch.arange(24.0).view(4, 6).to(rank_device())
    sharded = distribute_tensor(x, mesh, [Replicate()] * (len(shape) - 1) + [Shard(1)])
    product = sharded @ distribute_tensor(x.T, mesh, [Replicate()] * (len(shape) - 1) + [Shard(0)])
    noise = torch.nn.functional.dropout(sharded, 0.5)  # a random operator has a tracker of the mesh
    assert noise.to_local().shape == sharded.to_local().shape
    rank = torch.tensor(float(dist.get_rank()), device=rank_device())
    dist.all_reduce(rank, group=mesh.get_group(names[-1]))
    return product.full_tensor(), rank, dist.get_process_group_ranks(mesh.get_group(names[0]))


def test_meshes_of_calls_that_follow_one_another():
    """Of one shape and name, so that they are equal to torch, but their groups have other names; of another name."""
    x = torch.arange(24.0).view(4, 6)
    for first, groups in ("rows", 3), ("rows", 0), ("others", 1):
        for product, total, group in run_ranks(gathered, 2, (first, "columns"), (1, 2), groups):
            torch.testing.assert_close(product, x @ x.T)
            assert (float(total), len(group)) == (1.0, 1)
    for product, total, group in run_ranks(gathered, 2, ("columns",), (2,)):
        torch.testing.assert_close(product, x @ x.T)
        assert (float(total), group) == (1.0, [0, 1])


@pytest.mark.slow
def test_meshes_of_two_dimensions():
    x = torch.arange(24.0).view(4, 6)
    for _ in range(2):
        results = run_ranks(gathered, 4, ("rows", "columns"), (2, 2))
        assert [float(total) for _, total, _ in results] == [1.0, 1.0, 5.0, 5.0]
        assert [group for _, _, group in results] == [[0, 2], [1, 3], [0, 2], [1, 3]]
        for product, _, _ in results:
            torch.testing.assert_close(product, x @ x.T)


def trained() -> Tensor:
    """A gradient of DistributedDataParallel, which holds its group, in a cycle."""
    device = rank_device()
    model = nn.parallel.DistributedDataParallel(
        nn.Linear(3, 2, device=device), device_ids=None if device.type == "cpu" else [device]
    )
    model.itself = model
    model(torch.full((1, 3), float(dist.get_rank()), device=device)).sum().backward()
    return model.module.weight.grad


def test_a_module_that_holds_its_group():
    for _ in range(3):
        for gradient in run_ranks(trained, 2):
            torch.testing.assert_close(gradient, torch.full((2, 3), 0.5))


class UnpicklableError(Exception):
    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")


def fails(which: tuple[int, ...], error: type[Exception] = ValueError, *args: Any) -> Any:
    if dist.get_rank() in which:
        model = trained_model()
        raise error(*args, *([f"rank {dist.get_rank()}"] if not args else ())) from KeyError(model)
    return dist.get_rank()


def trained_model() -> nn.Module:
    device = rank_device()
    return nn.parallel.DistributedDataParallel(nn.Linear(1, 1, device=device), init_sync=False)


def test_errors_that_are_expected():
    """Of every rank or of one, in processes that stay."""
    run_ranks(settings, 2)
    pool = ranks._pools[2]
    errors = run_ranks(fails, 2, (0, 1), expects_errors=True)
    assert [(type(error), str(error)) for error in errors] == [(ValueError, "rank 0"), (ValueError, "rank 1")]
    error, result = run_ranks(fails, 2, (0,), expects_errors=True)
    assert (type(error), result) == (ValueError, 1)
    assert (
        run_ranks(fails, 2, (0, 1), UnpicklableError, 3, 4, expects_errors=True)
        == [("UnpicklableError", "3 and 4")] * 2
    )
    (error, _) = run_ranks(returns, 2, "DTensor", expects_errors=True)
    assert type(error) is TypeError
    assert "full_tensor()" in str(error)
    assert len(run_ranks(returns, 2, "lambda", expects_errors=True)) == 2
    assert ranks._pools[2] is pool


def returns(what: str) -> Any:
    """What is not sent."""
    if what == "DTensor":
        return DTensor.from_local(torch.ones(1, device=rank_device()), init_device_mesh(rank_device().type, (2,)))
    return lambda: None


def waits_for_the_other(how: str) -> None:
    if dist.get_rank() == 0:
        x = torch.ones(1, device=rank_device())
        dist.all_reduce(x)
        x.item()
    elif how == "raises":
        raise ValueError("alone")
    elif how == "ends":
        os._exit(3)
    elif how == "exits":
        raise SystemExit(4)
    else:
        time.sleep(60)


def test_an_error_of_one_rank_is_raised_here(monkeypatch):
    monkeypatch.setattr(ranks, "GRACE", 0.3)
    begin = time.monotonic()
    with pytest.raises(RankError, match="rank 1 raised:\nTraceback(?s:.*)ValueError: alone") as caught:
        run_ranks(waits_for_the_other, 2, "raises", timeout=50)
    assert (set(caught.value.errors), caught.value.exit_codes) == ({1}, {})
    assert "in waits_for_the_other" in caught.value.errors[1]
    assert time.monotonic() - begin < 40
    assert 2 not in ranks._pools


@pytest.mark.slow
def test_a_rank_that_ends():
    """The other one notices, and says so."""
    for expects_errors in (False, True):
        with pytest.raises(RankError, match="rank 1 died with exit code 3") as caught:
            run_ranks(waits_for_the_other, 2, "ends", expects_errors=expects_errors)
        assert caught.value.exit_codes == {1: 3}
        assert set(caught.value.errors) <= {0}  # gloo says it; nccl waits
        if rank_device_type() == "cpu":
            assert "all_reduce" in caught.value.errors[0]


def rank_device_type() -> str:
    return "cuda" if ranks._has_gpus(2) else "cpu"


@pytest.mark.slow
def test_ranks_that_do_not_answer():
    """A rank that sleeps, and one that waits for it as long as the group's limit."""
    run_ranks(settings, 2)
    processes = ranks._pools[2].processes
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match="no answer within 1 s of rank 0, 1$"):
        run_ranks(waits_for_the_other, 2, "sleeps", timeout=1)
    assert time.monotonic() - begin < 30
    assert not any(process.is_alive() for process in processes)


def test_one_rank_and_what_an_exit_is():
    assert run_ranks(fails, 1, ()) == [0]
    (error,) = run_ranks(exits, 1, expects_errors=True)
    assert type(error) is SystemExit


def exits() -> None:
    raise SystemExit(4)


def test_pools_leave_nothing():
    """Neither processes nor files."""
    run_ranks(settings, 1)
    pool = ranks._pools[1]
    folder = pool.folder.name
    assert os.path.isdir(folder)
    ranks._end_pools()
    assert not any(process.is_alive() for process in pool.processes)
    assert not os.path.exists(folder)
    ranks._pools.clear()
    gc.collect()
