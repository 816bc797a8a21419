"""The definition of every operation: literal, dense, plain PyTorch, differentiable by autograd.

Nothing here is fast and nothing here imports ``fwpkm_kernels``; the package is tested against it. Each function has the
name, the arguments and the results of the package's own, less the options that say how to compute (``backend``,
``precision``, ``sparse_grad``). Float64 tensors are computed in float64, all others in float32.
"""

from reference.gather import sparse_value_gather
from reference.lookup import brute_force_lookup, product_key_lookup
from reference.update import chunk_value_update

__all__ = ["brute_force_lookup", "chunk_value_update", "product_key_lookup", "sparse_value_gather"]
