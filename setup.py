"""Packaging of fwpkm_kernels. Reads text files only: it imports no torch and looks for no GPU."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

# The package cannot be imported here: torch may not be installed yet.
VERSION = re.search(r'^__version__ = "([^"]+)"', (ROOT / "fwpkm_kernels" / "__init__.py").read_text("utf-8"), re.M)
if VERSION is None:
    raise RuntimeError('fwpkm_kernels/__init__.py has no line __version__ = "..."')

README = ROOT / "README.md"
DEMO = ["matplotlib", "rich", "tqdm"]
# Not required: torch's own builds bring the Triton that fits them, each under another name (triton, triton-rocm,
# triton-xpu), and this one would be laid over the others. It is for a CPU build of torch, which brings none.
TRITON = ['triton>=3.4; platform_system == "Linux"']
# From 5.20 on its caches have the hooks that a memory's layer needs.
TRANSFORMERS = ["transformers>=5.20,<6"]

setup(
    name="fwpkm_kernels",
    version=VERSION.group(1),
    description="Fused Triton kernels for fast-weight product key memory, with exact gradients",
    long_description=README.read_text("utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="The fwpkm_kernels authors",
    license_expression="MIT",
    license_files=["LICENSE"],
    keywords=["triton", "pytorch", "product key memory", "fast weights", "sparse memory"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: GPU",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["fwpkm_kernels", "fwpkm_kernels.*"]),
    package_data={"fwpkm_kernels": ["py.typed"]},
    zip_safe=False,
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.8",
        "numpy",
    ],
    extras_require={
        "demo": DEMO,
        "bench": [*DEMO, "pytest-benchmark"],
        "triton": TRITON,
        "transformers": TRANSFORMERS,
        # From 5.24 on attention is given its cache as `cache`.
        "evaluation": [*DEMO, "transformers>=5.24,<6"],
        "dev": [
            *TRITON,
            *TRANSFORMERS,
            "accelerate",  # which transformers' Trainer needs
            "flash-linear-attention",  # whose cache the layers take too
            "hypothesis",
            "mypy",
            "pytest>=9",
            "pytest-xdist",
            "ruff",
            "safetensors",
            "setuptools>=77",
        ],
    },
)
