"""Triton kernels and their launchers. The modules here are imported on first use, since Triton may be missing."""

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are accumulated: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32
