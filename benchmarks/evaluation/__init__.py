"""What a memory is good for: small language models with and without one, trained and measured on long texts."""

from fwpkm_kernels._commands import need

need("transformers", "evaluation")  # which every module here imports
