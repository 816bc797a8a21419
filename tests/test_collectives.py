"""The count of collectives: known sizes, from every place that collectives are called in."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from benchmarks import collectives
from benchmarks.collectives import Call, Collectives, Total, count_collectives
from tests.helpers.ranks import rank_device, run_ranks

Totals = dict[str, Total]


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=rank_device())


def each_kind() -> list[Call]:
    """The functions of torch.distributed, with two ranks."""
    rank, other = dist.get_rank(), 1 - dist.get_rank()
    dist.all_reduce(zeros(1))
    with count_collectives() as counted:
        dist.all_reduce(zeros(5, 3))
        dist.all_reduce(zeros(dtype=torch.float64))
        dist.all_gather([zeros(2), zeros(2)], zeros(2))
        dist.all_gather_into_tensor(zeros(8, dtype=torch.bfloat16), zeros(4, dtype=torch.bfloat16))
        dist.reduce_scatter_tensor(zeros(3), zeros(6))
        dist.all_to_all_single(zeros(4, 2), zeros(4, 2))
        dist.broadcast(zeros(7, dtype=torch.int64), 0)
        dist.reduce(zeros(9), 0)
        dist.gather(zeros(2), [zeros(2), zeros(2)] if rank == 0 else None, 0)
        dist.scatter(zeros(2), [zeros(2), zeros(2)] if rank == 0 else None, 0)
        if rank == 0:
            dist.send(zeros(3), other)
        else:
            dist.recv(zeros(3), other)
        dist.all_reduce(zeros(0))
        dist.barrier()
    dist.all_reduce(zeros(1))
    assert counted.bytes == sum(call.bytes for call in counted.calls)
    return counted.calls


def test_each_kind():
    both = [
        ("all_reduce", 60), ("all_reduce", 8), ("all_gather", 16), ("all_gather", 16), ("reduce_scatter", 24),
        ("all_to_all", 32), ("broadcast", 56), ("reduce", 36),
    ]  # fmt: skip
    own = [("gather", 16), ("scatter", 16), ("send", 12)], [("gather", 0), ("scatter", 0), ("recv", 12)]
    for rank, calls in enumerate(run_ranks(each_kind, 2)):
        assert [call[:2] for call in calls] == [*both, *own[rank], ("all_reduce", 0), ("barrier", 0)]
        assert {call.size for call in calls} == {2}


def redistributed() -> tuple[list[Call], Tensor]:
    mesh = init_device_mesh(rank_device().type, (2,))
    x = DTensor.from_local(zeros(4, 3) + dist.get_rank(), mesh, [Shard(-1)])
    with count_collectives() as counted:
        whole = x.redistribute(mesh, [Replicate()]).to_local()
    return counted.calls, whole


def test_a_redistribution():
    for calls, whole in run_ranks(redistributed, 2):
        assert [call[:2] for call in calls] == [("all_gather", 4 * 6 * 4)]
        torch.testing.assert_close(whole, torch.tensor([0.0, 0, 0, 1, 1, 1]).expand(4, 6))


def in_an_operator() -> tuple[Totals, Totals, Tensor]:
    """An operator whose backward calls another, which adds up over ranks."""

    @torch.library.custom_op("fwpkm_test_collectives::summed", mutates_args=())
    def summed(x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @torch.library.custom_op("fwpkm_test_collectives::copied", mutates_args=())
    def copied(x: Tensor) -> Tensor:
        return x.clone()

    copied.register_autograd(lambda ctx, gradient: summed(gradient))
    x = zeros(5).requires_grad_()
    with count_collectives() as forward:
        y = copied(x)
    with count_collectives() as backward:
        (y * (dist.get_rank() + 1)).sum().backward()
    return forward.totals(), backward.totals(), x.grad


def test_an_operator_in_backward():
    for forward, backward, gradient in run_ranks(in_an_operator, 2):
        assert (forward, backward) == ({}, {"all_reduce": Total(1, 20)})
        torch.testing.assert_close(gradient, torch.full((5,), 3.0))


def data_parallel() -> tuple[Totals, Totals, Tensor]:
    torch.manual_seed(dist.get_rank())
    module = nn.Linear(6, 4, device=rank_device())
    on = None if rank_device().type == "cpu" else [rank_device()]
    with count_collectives() as made:
        module = nn.parallel.DistributedDataParallel(module, device_ids=on)
    x = zeros(3, 6) + dist.get_rank()
    with count_collectives() as stepped:
        module(x).sum().backward()
    return made.totals(), stepped.totals(), module.module.weight.grad


def test_distributed_data_parallel():
    """Its gradients, 28 numbers in one bucket."""
    for made, stepped, gradient in run_ranks(data_parallel, 2):
        assert made["broadcast"].bytes >= 28 * 4
        assert stepped == {"all_reduce": Total(1, 28 * 4)}
        torch.testing.assert_close(gradient, torch.full((4, 6), 1.5))


def fully_sharded() -> tuple[Totals, Totals, Tensor]:
    mesh = init_device_mesh(rank_device().type, (2,))
    module = nn.Linear(6, 4, device=rank_device())
    fully_shard(module, mesh=mesh)
    x = zeros(3, 6) + dist.get_rank()
    with count_collectives() as forward:
        y = module(x)
    with count_collectives() as backward:
        y.sum().backward()
    return forward.totals(), backward.totals(), module.weight.grad.full_tensor()


def test_fully_shard():
    """Forward gathers the parameters, and backward, which has them still, scatters their gradients."""
    for forward, backward, gradient in run_ranks(fully_sharded, 2):
        assert forward == {"all_gather": Total(1, 28 * 4)}
        assert backward == {"reduce_scatter": Total(1, 28 * 4)}
        torch.testing.assert_close(gradient, torch.full((4, 6), 1.5))


def on_a_mesh() -> tuple[Totals, Totals, Totals]:
    mesh = init_device_mesh(rank_device().type, (2, 2), mesh_dim_names=("rows", "columns"))
    rows, columns = mesh.get_group("rows"), mesh.get_group("columns")
    x = DTensor.from_local(zeros(4, 3), mesh, [Replicate(), Shard(-1)])
    with count_collectives() as counted:
        dist.all_reduce(zeros(3), group=rows)
        x.redistribute(mesh, [Replicate(), Replicate()])
    return counted.totals(rows), counted.totals(columns), counted.totals(dist.group.WORLD)


@pytest.mark.slow
def test_groups_of_a_mesh():
    for rows, columns, world in run_ranks(on_a_mesh, 4):
        assert (rows, columns, world) == ({"all_reduce": Total(1, 12)}, {"all_gather": Total(1, 96)}, {})


def compiled() -> tuple[Totals, Tensor]:
    from torch.distributed._functional_collectives import all_reduce

    function = torch.compile(lambda x: all_reduce(x * 2, "sum", dist.group.WORLD) + 1, backend="aot_eager")
    function(zeros(4))
    with count_collectives() as counted:
        y = function(zeros(4) + 1)
    return counted.totals(), y


@pytest.mark.slow
def test_compiled_code():
    for totals, y in run_ranks(compiled, 2):
        assert totals == {"all_reduce": Total(1, 16)}
        torch.testing.assert_close(y, torch.full((4,), 5.0))


def under_other_tools() -> tuple[Totals, Totals]:
    """CommDebugMode, which hands calls on, and the mode of inference."""
    from torch.distributed.tensor.debug import CommDebugMode

    with count_collectives() as debugged, CommDebugMode():
        dist.all_reduce(zeros(4))
    with torch.inference_mode(), count_collectives() as inferred:
        dist.all_reduce(zeros(4))
    return debugged.totals(), inferred.totals()


def test_modes_change_no_count():
    assert run_ranks(under_other_tools, 2) == [({"all_reduce": Total(1, 16)},) * 2] * 2


def after_an_error() -> Collectives:
    with pytest.raises(ZeroDivisionError), count_collectives():
        _ = 1 / 0
    with count_collectives() as counted:
        with pytest.raises(RuntimeError, match="counted already"), count_collectives():
            pass
        dist.all_reduce(zeros(2))
    dist.all_reduce(zeros(2))
    return counted


def test_a_count_at_a_time():
    (counted,) = run_ranks(after_an_error, 1)
    assert counted.totals() == {"all_reduce": Total(1, 8)}


def test_a_torch_with_other_collectives_is_refused(monkeypatch):
    """Rather than counted as none."""
    for name, kind in ("broadcast_", None), ("allreduce_", ("all_reduce", "inputs")):
        with monkeypatch.context() as patch:
            if kind is None:
                patch.delitem(collectives._OPERATORS, name)
            else:
                patch.setitem(collectives._OPERATORS, name, kind)
            with pytest.raises(RuntimeError, match=f"unknown here: c10d::{name}"), count_collectives():
                pass
    monkeypatch.setattr(torch._C, "_dispatch_get_all_op_names", lambda: ["c10d::allreduce_", "aten::add"])
    with pytest.raises(RuntimeError, match="has no c10d::_allgather_base_"), count_collectives():
        pass
