"""Checkpoints that are saved on one layout and loaded on another, and runs that go on from them."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel.ddp import _pre_dp_module_transform
from torch.nn.parallel import DistributedDataParallel

from fwpkm_kernels.distributed import TrainingState, shard_table_
from fwpkm_kernels.layers import advance_memory, parameter_groups
from tests.helpers.parallel import (
    batch_of,
    lay_out,
    loss_of,
    make_mesh,
    make_model,
    make_optimizer,
    tables_of,
    train,
    whole,
)
from tests.helpers.ranks import rank_device, run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # a checkpoint without a process group


def meshes(layout: str) -> tuple[DeviceMesh | None, DeviceMesh | None]:
    """Those over which the batch and over which columns are spread.

    Layouts are "rows" of FSDP, "ddp", "columns" with the whole batch on every rank, "both" rows of columns, and "one",
    with all of it on every rank.
    """
    size = dist.get_world_size() if dist.is_initialized() else 1
    if layout in ("rows", "ddp"):
        return make_mesh(size), None
    if layout == "columns":
        return None, dist.device_mesh.init_device_mesh(rank_device().type, (size,), mesh_dim_names=("columns",))
    if layout == "both":
        mesh = make_mesh(size // 2, 2)
        return mesh["data"], mesh["columns"]
    return None, None


class Run:
    """A model in a layout, with its optimizer."""

    def __init__(self, layout: str, seed: int = 0, **options: Any) -> None:
        self.dp, mp = meshes(layout)
        self.model = make_model(seed, **options)
        self.run = lay_out(self.model, "ddp" if layout == "ddp" else "own unit", self.dp, mp)
        self.optimizer = make_optimizer(self.model)
        self.state = {"training": TrainingState(self.run, self.optimizer)}

    def train(self, steps: range) -> list[float]:
        return train(self.run, self.optimizer, steps, self.dp)[0]

    def save(self, folder: str) -> None:
        dcp.save(self.state, checkpoint_id=folder)

    def load(self, folder: str) -> "Run":
        dcp.load(self.state, checkpoint_id=folder)
        return self

    def everything(self) -> dict[str, Any]:
        """Tensors of the model and moments of the optimizer, whole, and the options of its groups."""
        tensors = {name: whole(x).clone() for name, x in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, x in self.optimizer.state[parameter].items():
                tensors[f"{name}, {key}"] = whole(x).clone()
        groups = [{key: x for key, x in group.items() if key != "params"} for group in self.optimizer.param_groups]
        return {"tensors": tensors, "groups": groups}


def assert_same(result: dict[str, Any], expected: dict[str, Any]) -> None:
    """Bit for bit."""
    assert result["groups"] == expected["groups"]
    assert result["tensors"].keys() == expected["tensors"].keys()
    for name, x in expected["tensors"].items():
        assert torch.equal(result["tensors"][name], x), name


def saved(layout: str, folder: str) -> dict[str, Any]:
    """Two steps and a change of the learning rates, and then what was saved."""
    run = Run(layout)
    run.train(range(2))
    for group in run.optimizer.param_groups:
        group["lr"] *= 0.5
    run.save(folder)
    return run.everything()


def loaded(layouts: list[str], folder: str) -> list[dict[str, Any]]:
    """What is loaded in several layouts, by models of other numbers and optimizers that have made no step."""
    return [Run(layout, seed=1).load(folder).everything() for layout in layouts]


def check_loads(layout: str, size: int, folder: Path, others: dict[int, list[str]]) -> None:
    expected = run_ranks(saved, size, layout, str(folder))[0]
    assert_same(loaded(["one"], str(folder))[0], expected)  # without a process group
    for ranks, layouts in others.items():
        for results in run_ranks(loaded, ranks, layouts, str(folder)):
            for result in results:
                assert_same(result, expected)


@pytest.mark.parametrize("layout", ["rows", "columns", "ddp"])
def test_two_ranks_to_one_and_to_two(layout, tmp_path):
    check_loads(layout, 2, tmp_path, {2: [x for x in ("rows", "columns", "ddp") if x != layout]})


@pytest.mark.slow
def test_four_ranks_to_one_and_to_two(tmp_path):
    check_loads("both", 4, tmp_path, {2: ["rows"]})


@pytest.mark.slow
def test_two_ranks_to_four(tmp_path):
    check_loads("columns", 2, tmp_path / "columns", {4: ["rows", "columns", "both"]})
    check_loads("rows", 2, tmp_path / "rows", {4: ["columns", "ddp"]})


def bytes_of(folder: Path, of: str) -> dict[str, int]:
    """The names of the tensors in a part of a checkpoint, and the bytes of each."""
    names = {}
    for name, x in FileSystemReader(folder).read_metadata().state_dict_metadata.items():
        if name.startswith(f"training.{of}.") and hasattr(x, "size"):
            names[name.removeprefix(f"training.{of}.")] = x.size.numel() * x.properties.dtype.itemsize
    return names


def test_a_shared_table_is_saved_once(tmp_path):
    """By its first name, with its moments."""
    run_ranks(saved, 2, "rows", str(tmp_path))
    model = make_model()
    names = bytes_of(tmp_path, "model")
    assert names.keys() == model.state_dict().keys() - {"blocks.1.pkm.table.weight"}
    sizes = {name: x.nbytes for name, x in model.named_parameters()}
    assert names == sizes
    moments = bytes_of(tmp_path, "optimizers.state")
    for key in ("exp_avg", "exp_avg_sq"):
        assert {name.removesuffix(f".{key}"): x for name, x in moments.items() if name.endswith(f".{key}")} == sizes
    total = sum(sizes.values())
    assert total < sum(file.stat().st_size for file in tmp_path.glob("*.distcp")) / 3


WRAPPERS = {
    "ddp": DistributedDataParallel,
    "compiled": torch.compile,
    "compiled ddp": lambda model: torch.compile(DistributedDataParallel(model)),
    "checkpointed": lambda model: with_blocks(model, checkpoint_wrapper),
    "compiled blocks": lambda model: with_blocks(model, torch.compile),
    "all": lambda model: DistributedDataParallel(with_blocks(model, lambda x: torch.compile(checkpoint_wrapper(x)))),
}


def with_blocks(model: nn.Module, wrap: Any) -> nn.Module:
    for index, block in enumerate(model.blocks):
        model.blocks[index] = wrap(block)
    return model


class Within(nn.Module):
    """A module whose own name is that of DistributedDataParallel's."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def loaded_by_wrappers(folder: str) -> dict[str, Any]:
    """What is loaded from a plain model's checkpoint and saved again."""
    plain = Run("one")
    plain.train(range(1))
    plain.save(f"{folder}/plain")
    results = {"plain": plain.everything()}
    for name, wrap in WRAPPERS.items():
        run = Run("one", seed=1)
        model = run.model
        state = TrainingState(wrap(model), run.optimizer)
        dcp.load({"training": state}, checkpoint_id=f"{folder}/plain")
        dcp.save({"training": state}, checkpoint_id=f"{folder}/{name}")
        results[name] = Run("one", seed=2).load(f"{folder}/{name}").everything()
    within = DistributedDataParallel(Within(make_model()))
    dcp.save({"training": TrainingState(within)}, checkpoint_id=f"{folder}/within")
    return results


def test_names_are_without_those_of_wrappers(tmp_path):
    results = run_ranks(loaded_by_wrappers, 1, str(tmp_path))[0]
    for name in WRAPPERS:
        assert_same(results[name], results["plain"])
        assert bytes_of(tmp_path / name, "model") == bytes_of(tmp_path / "plain", "model")
    own = {f"module.{name}": size for name, size in bytes_of(tmp_path / "plain", "model").items()}
    assert bytes_of(tmp_path / "within", "model") == own


def with_buffers(layout: str, initial_memory: str, folder: str, seed: int = 0) -> dict[str, Any]:
    """Buffers of a model that was saved, or with another seed loaded, which makes it forget what is pending."""
    run = Run(layout, seed, scope="batch", initial_memory=initial_memory)
    loss_of(run.run, batch_of(0, run.dp)).backward()
    if seed == 0:
        advance_memory(run.model, None if run.dp is None else run.dp.get_group())
        run.optimizer.step()
        run.save(folder)
    else:
        contents = [table.contents for table in tables_of(run.model)]
        run.load(folder)
        assert all(table.contents is not x for table, x in zip(tables_of(run.model), contents, strict=True))
        left = run.everything()
        advance_memory(run.model)
        assert_same(run.everything(), left)
    return run.everything()


@pytest.mark.parametrize("initial_memory", ["persistent", "frozen"])
def test_buffers_are_saved(initial_memory, tmp_path):
    for layout, other in (("columns", "rows"), ("rows", "columns")):
        folder = str(tmp_path / layout)
        expected = run_ranks(with_buffers, 2, layout, initial_memory, folder)[0]
        assert "blocks.1.memory.table.weight" in bytes_of(tmp_path / layout, "model")
        assert "blocks.1.memory.keys" in bytes_of(tmp_path / layout, "model")
        for result in run_ranks(with_buffers, 2, other, initial_memory, folder, 1):
            assert_same(result, expected)
        assert_same(with_buffers("one", initial_memory, folder, 1), expected)


def test_a_save_before_the_first_step_changes_nothing(tmp_path):
    """PyTorch makes the moments that are saved by a step, which leaves other traces in some optimizers."""
    one, two = Run("one"), Run("one")
    for run in (one, two):
        run.optimizer = torch.optim.NAdam(run.model.parameters())
        run.state = {"training": TrainingState(run.run, run.optimizer)}
    one.save(str(tmp_path))
    assert not one.optimizer.state
    one.train(range(1))
    two.train(range(1))
    assert_same(one.everything(), two.everything())


def test_a_load_is_noticed_by_streams(tmp_path):
    run, other = Run("one"), Run("one", seed=1)
    other.save(str(tmp_path))
    layer, x = run.model.blocks[0].memory.eval(), torch.zeros(1, 5, 8, dtype=torch.float64)
    memory = layer.new_memory()
    with torch.no_grad():
        layer(x, memory=memory)
        run.load(str(tmp_path))
        with pytest.raises(RuntimeError, match="have been written or replaced since"):
            layer(x, memory=memory)


def test_what_a_checkpoint_lacks_is_an_error(tmp_path):
    run = Run("one")
    run.save(str(tmp_path))
    larger = Run("one", seed=1)
    larger.model.more = nn.Linear(2, 2)
    before = copy.deepcopy(larger.model.state_dict())
    with pytest.raises(dcp.CheckpointException, match="Missing key in checkpoint state_dict: training.model.more"):
        larger.load(str(tmp_path))
    for name, x in larger.model.state_dict().items():
        assert torch.equal(x, before[name])
    state = run.state["training"].state_dict()
    del state["model"]["head.bias"]
    with pytest.raises(KeyError, match="head.bias"):
        run.state["training"].load_state_dict(state)


def test_an_optimizer_beside_gradients_takes_its_moments(tmp_path):
    """Gradients stay; and a state dict of an optimizer that has made no step is that of no step."""
    run, other, third = Run("one"), Run("one", seed=1), Run("one", seed=2)
    fresh = run.state["training"].state_dict()["optimizers"]["state"]
    assert all(float(x["step"]) == 0 for x in fresh.values())
    losses = run.train(range(2))
    assert losses == Run("one").train(range(2))
    run.save(str(tmp_path))
    loss_of(other.run, batch_of(0)).backward()
    gradients = {name: x.grad.clone() for name, x in other.model.named_parameters()}
    assert_same(other.load(str(tmp_path)).everything(), run.everything())
    for name, x in other.model.named_parameters():
        assert torch.equal(x.grad, gradients[name])
    third.state["training"].load_state_dict(copy.deepcopy(run.state["training"].state_dict()))
    assert_same(third.everything(), run.everything())


def test_a_parameter_without_moments(tmp_path):
    """It had no gradient before the save: a load asks for moments, or leaves them as 0 where it may."""
    run, other = Run("one"), Run("one", seed=1)
    for one in (run, other):
        one.model.unused = nn.Linear(2, 2, dtype=torch.float64)
        one.optimizer.add_param_group({"params": list(one.model.unused.parameters()), "name": "unused"})
    run.train(range(2))
    run.save(str(tmp_path))
    with pytest.raises(dcp.CheckpointException, match="Missing key .*optimizers.state.unused"):
        other.load(str(tmp_path))
    dcp.load(other.state, checkpoint_id=tmp_path, planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
    assert not any(float(x) for x in other.optimizer.state[other.model.unused.bias]["exp_avg"])
    assert other.train(range(2, 4)) == run.train(range(2, 4))


def test_several_optimizers_and_none(tmp_path):
    def make(seed: int) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        model = make_model(seed)
        groups = parameter_groups(model, lr=0.01, weight_decay=0.1)
        return model, [torch.optim.AdamW(groups[:2]), torch.optim.SGD(groups[2:], lr=0.1, momentum=0.9)]

    model, optimizers = make(0)
    loss_of(model, batch_of(0)).backward()
    for optimizer in optimizers:
        optimizer.step()
    dcp.save({"training": TrainingState(model, optimizers)}, checkpoint_id=tmp_path)
    other, others = make(1)
    dcp.load({"training": TrainingState(other, others)}, checkpoint_id=tmp_path)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        for optimizer, its in zip(optimizers, others, strict=True):
            for key, x in optimizer.state.get(one, {}).items():
                assert torch.equal(its.state[two][key], x)
    alone = make_model(2)
    dcp.load({"training": TrainingState(alone)}, checkpoint_id=tmp_path)
    assert torch.equal(alone.head.weight, model.head.weight)


def saved_with_own_columns() -> None:
    model = shard_table_(make_model(), meshes("columns")[1])
    _pre_dp_module_transform(model)
    TrainingState(model).state_dict()


def test_own_columns_are_not_saved_as_all():
    for error in run_ranks(saved_with_own_columns, 2, expects_errors=True):
        assert "`blocks.0.memory.table.weight` must be the DTensor that `shard_table_` has made" in str(error)


def first_half(layouts: list[str], folder: str) -> list[list[float]]:
    """Losses of twenty steps in each layout, which is saved after the tenth."""
    losses = []
    for layout in layouts:
        run = Run(layout)
        losses.append(run.train(range(10)))
        run.save(f"{folder}/{layout}")
        losses[-1] += run.train(range(10, 20))
    return losses


def second_half(pairs: list[tuple[str, str]], folder: str) -> list[list[float]]:
    """Losses of steps 10 to 19 in one layout, from the checkpoint of another."""
    return [Run(layout, seed=1).load(f"{folder}/{before}").train(range(10, 20)) for before, layout in pairs]


def check_second_half(losses: list[float], expected: list[float]) -> None:
    """To the rounding of float64, which twenty steps enlarge a little."""
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-9, atol=0)


def check_resumed(folder: Path, pairs_of: dict[int, list[tuple[str, str]]]) -> None:
    """Runs on two ranks, and what becomes of them on other numbers of ranks, in one layout from another."""
    before = sorted({x for pairs in pairs_of.values() for x, _ in pairs})
    expected = Run("one").train(range(20))
    assert expected[-1] < 0.9 * expected[0]
    for losses in run_ranks(first_half, 2, before, str(folder)):
        for of_layout in losses:
            check_second_half(of_layout, expected)
    for size, pairs in pairs_of.items():
        results = run_ranks(second_half, size, pairs, str(folder)) if size > 1 else [second_half(pairs, str(folder))]
        for losses in results:
            for of_pair in losses:
                check_second_half(of_pair, expected[10:])


@pytest.mark.slow
def test_a_run_goes_on_with_the_same_losses_on_other_ranks(tmp_path):
    one, two = [("rows", "one"), ("columns", "one")], [("columns", "rows"), ("rows", "columns")]
    check_resumed(tmp_path, {1: one, 2: two, 4: [("columns", "rows"), ("rows", "both")]})
