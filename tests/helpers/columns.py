"""Small layers for ranks over which `shard_table_` spreads their tables, and a step of training."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from fwpkm_kernels.layers import FastWeightProductKeyMemory, ProductKeyMemory
from tests.helpers.ranks import rank_device

f32, f64 = torch.float32, torch.float64
WIDTH, COLUMNS, BATCH, LENGTH = 6, 8, 2, 10
Results = dict[str, Tensor]


def make_layer(seed: int = 0, **options: Any) -> FastWeightProductKeyMemory:
    torch.manual_seed(seed)
    sizes = {"num_keys": 6, "heads": 2, "top_k": 3, "key_dim": 6, "value_dim": COLUMNS, "chunk_size": 4}
    options = sizes | {"query_conv": 2, "dtype": f64} | options
    return FastWeightProductKeyMemory(WIDTH, **options)


def make_static(seed: int = 0, **options: Any) -> ProductKeyMemory:
    torch.manual_seed(seed)
    sizes = {"num_keys": 5, "heads": 2, "top_k": 3, "key_dim": 6, "value_dim": COLUMNS, "dtype": f64}
    return ProductKeyMemory(WIDTH, **(sizes | options))


def draw(*shape: int, seed: int = 1, dtype: torch.dtype = f64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=f64).to(dtype).to(rank_device())


def draw_like(x: Tensor, seed: int = 2) -> Tensor:
    return draw(*x.shape, seed=seed, dtype=x.dtype)


def own_part(x: Tensor, layer: Any) -> Tensor:
    """What a rank has of all columns."""
    mesh = layer.table.mesh
    return x if mesh is None else x.chunk(mesh.size(), -1)[mesh.get_local_rank()]


def local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def gradients_of(module: nn.Module, x: Tensor) -> Results:
    """Gradients have a "d" in front of their names."""
    named = {"input": x, **dict(module.named_parameters())}
    return {f"d {name}": local(p.grad) for name, p in named.items() if p.grad is not None}


def dtype_of(module: nn.Module) -> torch.dtype:
    return next(p.dtype for name, p in module.named_parameters() if name.endswith("q_proj.weight"))


def train(module: nn.Module, *, batch: int = BATCH, length: int = LENGTH, call: Any = None, **how: Any) -> Results:
    """One step: the output, and all gradients."""
    x = draw(batch, length, WIDTH, dtype=dtype_of(module)).requires_grad_()
    how = tree_map(lambda value: value.to(x.device) if isinstance(value, Tensor) else value, how)
    output = (module if call is None else call)(x, **how)
    output.backward(draw_like(output))
    return {"output": output, **gradients_of(module, x)}
