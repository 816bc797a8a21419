"""A small language model, and the ways to lay it out over ranks."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fwpkm_kernels.distributed import clip_grad_norm_, replicate_tables_, shard_table_
from fwpkm_kernels.layers import FastWeightProductKeyMemory, ProductKeyMemory, ValueTable, parameter_groups
from tests.helpers.ranks import rank_device

WIDTH, TOKENS, SEQUENCES, VOCABULARY = 8, 13, 4, 11
MEMORY: dict[str, Any] = {"num_keys": 4, "heads": 2, "top_k": 2, "key_dim": 4, "value_dim": 8}
#: DistributedDataParallel; fully_shard with tables as units of their own, which stay gathered until backward or not;
#: of the blocks alone, which cannot share a table then; and beside tables that every rank has.
FORMS = ["ddp", "own unit", "own unit, resharded", "plain", "replicated"]


class Block(nn.Module):
    def __init__(self, **of_module: Any) -> None:
        super().__init__()
        kind = {"scope": "sequence"} | {x: of_module.pop(x) for x in ("scope", "initial_memory") if x in of_module}
        self.memory = FastWeightProductKeyMemory(WIDTH, chunk_size=4, **MEMORY, **kind, **of_module)
        self.pkm = ProductKeyMemory(WIDTH, **MEMORY, **of_module)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.memory(x)
        return x + self.pkm(x)


class Model(nn.Module):
    """Two blocks, whose product key memories share a table, or not."""

    def __init__(self, shares: bool = True, **of_module: Any) -> None:
        super().__init__()
        of_module = {"dtype": torch.float64} | of_module
        of_embedding = {"dtype": of_module["dtype"], "device": of_module.get("device")}
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, **of_embedding)
        self.blocks = nn.ModuleList(Block(**of_module) for _ in range(2))
        if shares:
            self.blocks[1].pkm.table = self.blocks[0].pkm.table
        self.head = nn.Linear(WIDTH, VOCABULARY, **of_embedding)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def make_model(seed: int = 0, **of_module: Any) -> Model:
    """The same on every rank, and as on one; `of_module` are options of `Model` and its layers."""
    torch.manual_seed(seed)
    return Model(**of_module).to(rank_device() if dist.is_initialized() else "cpu")


def tables_of(model: nn.Module) -> list[ValueTable]:
    return [x for x in model.modules() if isinstance(x, ValueTable)]


def make_mesh(*shape: int) -> DeviceMesh:
    """Of the dimensions "data" and "columns", or "data" alone."""
    names = ("data", "columns")[: len(shape)]
    return dist.device_mesh.init_device_mesh(rank_device().type, shape, mesh_dim_names=names)


def lay_out(model: nn.Module, form: str, dp: DeviceMesh | None, mp: DeviceMesh | None = None) -> nn.Module:
    """The model over the ranks of `dp` in one of FORMS, its tables by columns over those of `mp`; what is to be called.

    Without `dp` every rank has the whole batch.
    """
    if mp is not None:
        shard_table_(model, mp)
    if dp is None:
        return model
    ignored = {}
    if form == "replicated" or (form == "ddp" and mp is not None):
        replicate_tables_(model, dp.get_group())
        ignored = {"ignored_params": {table.weight for table in tables_of(model)}}
    if form == "ddp":
        return DistributedDataParallel(model, process_group=dp.get_group())
    if form.startswith("own unit"):
        for table in tables_of(model):
            fully_shard(table, mesh=dp, reshard_after_forward=form.endswith("resharded"))
    for block in model.blocks:
        fully_shard(block, mesh=dp, **ignored)
    return fully_shard(model, mesh=dp, **ignored)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    groups = parameter_groups(model, lr=0.01, weight_decay=0.1, table_lr=0.03)
    return torch.optim.AdamW(groups, eps=1e-6)  # large against the rounding of gradients that are 0 but for it


def batch_of(step: int, dp: DeviceMesh | None = None) -> tuple[Tensor, Tensor]:
    """Tokens of a step and those that follow, [4, 13], or this rank's rows of them."""
    tokens = torch.randint(VOCABULARY, (SEQUENCES, TOKENS + 1), generator=torch.Generator().manual_seed(100 + step))
    if dist.is_initialized():
        tokens = tokens.to(rank_device())
    if dp is not None:
        tokens = tokens.chunk(dp.size())[dp.get_local_rank()]
    return tokens[:, :-1], tokens[:, 1:]


def loss_of(run: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(run(batch[0]).mT, batch[1])


def mean_over(loss: Tensor, dp: DeviceMesh | None) -> float:
    total = loss.detach().clone()
    if dp is None:
        return float(total)
    dist.all_reduce(total, group=dp.get_group())
    return float(total / dp.size())


def train(
    run: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int], dp: DeviceMesh | None = None
) -> tuple[list[float], list[float]]:
    """Train on the batches of some steps: their losses and norms of gradients."""
    losses, norms = [], []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(run, batch_of(step, dp))
        loss.backward()
        norms.append(float(clip_grad_norm_(run.parameters(), 0.5)))
        optimizer.step()
        losses.append(mean_over(loss, dp))
    return losses, norms


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def whole_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(x.detach()) for name, x in model.named_parameters()}


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(x.grad) for name, x in model.named_parameters() if x.grad is not None}
