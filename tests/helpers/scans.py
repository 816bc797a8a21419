"""Chunks for the kernels of the value scan, and how these are called."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fwpkm_kernels import testing
from fwpkm_kernels.kernels import compute_dtype
from fwpkm_kernels.kernels.scans import read, read_grad


class Chunk(NamedTuple):
    """One chunk: what is read, what is written, and the gradients that come in."""

    values: Tensor  # [N, D]
    slots: Tensor  # [M, J]
    weights: Tensor  # [M, J]
    write_weights: Tensor  # [M, J]
    targets: Tensor  # [P_w, B, D]
    steps: Tensor  # [N, D]
    step_rows: Tensor  # [M, J]
    grad_output: Tensor  # [P_o, B, D]


def make_chunk(
    shape: tuple[int, ...],
    *,
    table: torch.dtype = torch.float32,
    activations: torch.dtype = torch.float32,
    layout: str = "contiguous",
    device: str = "cpu",
) -> Chunk:
    """Normal numbers; targets and grad_output are parts of a [B, T, D] whose other entries are NaN."""
    batch, positions, written, outputs, picks, num_slots, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    exact = compute_dtype(table)

    def normal(*size: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(device, dtype)

    def part_of_a_sequence(length: int) -> Tensor:
        sequence = torch.full((batch, positions + 4, width), torch.nan, dtype=activations, device=device)
        part = testing.with_layout(sequence, layout).transpose(0, 1)[2 : 2 + length]
        return part.copy_(normal(length, batch, width, dtype=activations))

    def rows(seed: int) -> Tensor:
        return testing.make_slots((positions * batch, picks), num_slots, "zipf", seed=seed).to(device)

    return Chunk(
        testing.with_layout(normal(num_slots, width, dtype=table), layout),
        rows(0),
        normal(positions * batch, picks, dtype=exact),
        normal(positions * batch, picks, dtype=exact),
        part_of_a_sequence(written),
        testing.with_layout(normal(num_slots, width, dtype=exact), layout),
        rows(1),
        part_of_a_sequence(outputs),
    )


def run_read(chunk: Chunk) -> tuple[Tensor, Tensor]:
    """The kernel's errors and output; the output lies like `grad_output` and nothing around it is written."""
    output = like_in_a_sequence(chunk.grad_output)
    with testing.poisoned_memory(), testing.assert_unchanged(chunk):
        errors = read(chunk.values, chunk.slots, chunk.weights, chunk.targets, output)
    assert_nothing_around(output)
    return errors, output


def run_read_grad(chunk: Chunk, factor: float, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The kernel's gradients; those of the targets lie like `targets` and nothing around them is written."""
    grad_targets = like_in_a_sequence(chunk.targets)
    size, dtype = (3, *chunk.weights.shape), compute_dtype(chunk.values.dtype)
    grad_weights, grad_write_weights = (torch.full(size, 7.0, dtype=dtype, device=chunk.slots.device) for _ in "wc")
    with testing.poisoned_memory(), testing.assert_unchanged(chunk):
        grad_predictions = read_grad(
            chunk.values,
            chunk.slots,
            chunk.steps,
            chunk.step_rows,
            chunk.weights,
            chunk.write_weights,
            chunk.targets,
            chunk.grad_output,
            grad_targets,
            grad_weights[1],
            grad_write_weights[1],
            factor=factor,
            **options,
        )
    assert_nothing_around(grad_targets)
    assert (grad_weights[::2] == 7).all()
    assert (grad_write_weights[::2] == 7).all()
    return grad_predictions, grad_weights[1], grad_write_weights[1], grad_targets


def like_in_a_sequence(part: Tensor) -> Tensor:
    """A tensor of the strides of `part`, its storage full of 7."""
    storage = torch.full((part.untyped_storage().nbytes() // part.element_size(),), 7.0, dtype=part.dtype)
    return storage.to(part.device).as_strided(part.shape, part.stride(), part.storage_offset())


def assert_nothing_around(part: Tensor) -> None:
    storage = part.as_strided((part.untyped_storage().nbytes() // part.element_size(),), (1,), 0).clone()
    storage.as_strided(part.shape, part.stride(), part.storage_offset()).fill_(7.0)
    assert (storage == 7.0).all()
