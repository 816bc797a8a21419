"""What a bug report needs: ``python -m fwpkm_kernels.env_report``, or ``--json`` for the same as JSON.

Works where Triton is missing, where torch was built without CUDA and where no driver is installed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import __version__
from ._commands import command, one_line

# Settings that change which code runs, where, or how exactly it computes.
ENVIRONMENT_VARIABLES = (
    "TRITON_INTERPRET",
    "TRITON_DEBUG",
    "TRITON_CACHE_DIR",
    "TRITON_ALWAYS_COMPILE",
    "TRITON_F32_DEFAULT",
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "CUDA_LAUNCH_BLOCKING",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_COMPILE_DISABLE",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
)


def _run(*words: str) -> str | None:
    """Standard output of a command, stripped; None if it is missing, fails or hangs."""
    try:
        done = subprocess.run(words, capture_output=True, timeout=20, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "backslashreplace").strip()


def _read(path: str) -> str:
    """The text of a file, or an empty string if it cannot be read."""
    try:
        return Path(path).read_text("utf-8", "replace")
    except OSError:
        return ""


def _commit() -> str | None:
    """The commit that the environment variable FWPKM_COMMIT names, for copies of a checkout; else the git commit of the
    checkout that the package runs from, with "-dirty" after it if tracked files differ; else None.
    """
    if commit := os.environ.get("FWPKM_COMMIT"):
        return commit
    root = Path(__file__).resolve().parent.parent
    # Without this check a copy installed inside another project's checkout would report that project's commit.
    if not (root / ".git").exists():
        return None
    return _run("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _version(module: str) -> str | None:
    """The version of an importable module; None if it is not installed; the error if its import fails."""
    try:
        return str(getattr(importlib.import_module(module), "__version__", "unknown"))
    except ModuleNotFoundError as error:
        return None if error.name == module else f"import failed: {error}"
    except Exception as error:  # a report on a broken installation must still come out
        return f"import failed: {type(error).__name__}: {error}"


def _cpu() -> dict[str, Any]:
    model = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.M)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": model.group(1).strip() if model else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "torch_threads": torch.get_num_threads(),
    }


def _driver() -> str | None:
    """The version of the NVIDIA or AMD kernel driver; None if neither is loaded."""
    nvidia = re.search(r"Kernel Module.*?\s(\d+\.\d[\d.]*)", _read("/proc/driver/nvidia/version"))
    if nvidia:
        return nvidia.group(1)
    answer = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if answer:
        return answer.splitlines()[0].strip()
    return _read("/sys/module/amdgpu/version").strip() or None


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        # On AMD the architecture is what compilers are told; major.minor is only a translation of it.
        capability = getattr(properties, "gcnArchName", None) if torch.version.hip else None
        gpus.append(
            {
                "name": properties.name,
                "capability": capability or f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return gpus


def _auto_backend(triton: str | None, has_gpu: bool) -> dict[str, str]:
    """What ``backend="auto"`` picks for CPU and for GPU tensors; nothing ever falls back silently."""
    if not has_gpu:
        gpu = "none (no GPU visible)"
    elif triton is None or triton.startswith("import failed"):
        gpu = "none (Triton missing: an error, not a fallback)"
    else:
        gpu = "triton"
    return {"cpu_tensors": "torch", "gpu_tensors": gpu}


def collect() -> dict[str, Any]:
    """Everything the report says, as a dictionary that ``json.dumps`` takes.

    Fields that do not apply (no checkout, no Triton, no driver) are None, and ``gpus`` is an empty list without a GPU.
    """
    triton = _version("triton")
    gpus = _gpus()
    return {
        __package__: __version__,
        "commit": _commit(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        "cpu": _cpu(),
        "torch": {
            "version": str(torch.__version__),
            "git": torch.version.git_version,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        },
        "triton": triton,
        "numpy": _version("numpy"),
        "driver": _driver(),
        "gpus": gpus,
        "auto_backend": _auto_backend(triton, bool(gpus)),
        "environment": {name: os.environ[name] for name in ENVIRONMENT_VARIABLES if name in os.environ},
    }


def _lines(report: dict[str, Any], indent: str = "") -> list[str]:
    """The report as ``name: value`` lines, nested parts indented."""
    lines = []
    for name, value in report.items():
        label = f"{indent}{name}:"
        if isinstance(value, dict) and value:
            lines += [label, *_lines(value, indent + "  ")]
        elif isinstance(value, list) and value:
            lines += [label, *(line for i, item in enumerate(value) for line in _lines({str(i): item}, indent + "  "))]
        else:
            lines.append(f"{label} {'none' if value in (None, {}, []) else one_line(value)}")
    return lines


@command("env_report")
def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; ``argv`` replaces the command line. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}.env_report", description=f"Print what a bug report about {__package__} needs."
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    options = parser.parse_args(argv)
    report = collect()
    print(json.dumps(report, indent=2) if options.json else "\n".join(_lines(report)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
