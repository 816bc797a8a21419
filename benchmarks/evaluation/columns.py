"""Train a small model with tables over ranks: ``torchrun --nproc-per-node 2 -m benchmarks.evaluation.columns``.

Ranks are a mesh of data × columns: those of one row read the same text and have different columns of each table.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from benchmarks.collectives import count_collectives
from benchmarks.evaluation.options import Options, build, default_options
from benchmarks.evaluation.text import python_text
from benchmarks.evaluation.train import check_counts, draw_batch, loss_of, on_device, peak_memory
from fwpkm_kernels._commands import CommandError, command
from fwpkm_kernels.distributed import clip_grad_norm_, replicate_tables_, shard_table_
from fwpkm_kernels.layers import advance_memory, parameter_groups


def train(options: Options, columns: int, steps: int, device: torch.device) -> None:
    """Train for some steps; rank 0 prints what came out, and what it took."""
    sizes = (dist.get_world_size() // columns, columns)
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("data", "columns"))
    data = mesh["data"].get_group()
    torch.manual_seed(options.seed)  # every rank makes the same model
    model = shard_table_(build(options).to(device), mesh["columns"])
    replicate_tables_(model, data)
    parallel = DistributedDataParallel(model, process_group=data) if sizes[0] > 1 else model
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=options.lr, weight_decay=options.weight_decay))
    corpus, rates = python_text(), []
    for step in range(steps):
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = options.lr * options.rate(step) * (options.table_lr if group["name"] == "tables" else 1.0)
        x, is_answer = (x.to(device) for x in draw_batch(options, corpus, step, mesh.get_local_rank("data")))
        with count_collectives() as counted:
            loss, figures = loss_of(parallel, options, x, is_answer)
            loss.backward()
            clip_grad_norm_(model.parameters(), options.clip)
            advance_memory(model, data)
        optimizer.step()
        optimizer.zero_grad()
        rates.append(sizes[0] * x[:, 1:].numel() / (time.perf_counter() - started))
        if dist.get_rank() == 0 and (step % 20 == 19 or step == steps - 1):
            print(f"step {step + 1}: {figures[0]:.2f} bits a byte, digits right {figures[2]:.2f}", flush=True)
    dist.all_gather_object(peaks := [0] * dist.get_world_size(), peak_memory(device))
    if dist.get_rank() == 0:
        print(f"{sorted(rates)[steps // 2]:.0f} tokens/s, the median of {steps} steps")
        print(f"peak memory of each rank: {', '.join(f'{peak / 2**20:.0f} MiB' for peak in peaks)}")
        for name in (name for name in ("data", "columns") if mesh[name].size() > 1):
            for kind, (calls, num_bytes) in counted.totals(mesh[name].get_group()).items():
                print(f"last step, {name}: {kind} {calls} times, {num_bytes} bytes a rank")


@command("columns")
def main(argv: Sequence[str] | None = None) -> int:
    """Train; ``argv`` replaces the command line. Returns the exit status."""
    parser = argparse.ArgumentParser("torchrun ... -m benchmarks.evaluation.columns", description="Train on ranks.")
    parser.add_argument("--columns", type=int, help="ranks over which a table is spread (default: all)")
    parser.add_argument("--steps", type=int, default=210, help="of the optimizer (%(default)s)")
    parser.add_argument("--device", default="cpu", help="(%(default)s)")
    arguments = parser.parse_args(argv)
    check_counts(columns=arguments.columns, steps=arguments.steps)
    with on_device(arguments.device) as device:
        if not dist.is_initialized():
            raise CommandError("start it by torchrun --nproc-per-node 2 -m benchmarks.evaluation.columns")
        columns, options = arguments.columns or dist.get_world_size(), default_options("swa+fwpkm", "miniature")
        if dist.get_world_size() % columns:
            raise CommandError(f"--columns must divide the {dist.get_world_size()} ranks, got {columns}")
        train(options, columns, min(arguments.steps, options.steps), torch.device(device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
