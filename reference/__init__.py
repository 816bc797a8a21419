"""The definition of every operation: literal, dense, plain PyTorch, differentiable by autograd.

Nothing here is fast and nothing here imports ``fwpkm_kernels``; the package is tested against it. Each function has the
name, the arguments and the results of the package's own, less the options that say how to compute (``backend``,
``precision``, ``sparse_grad``); the layers are functions of their parameters. ``brute_force_lookup``, which searches
all n² slots, is there to test the lookup's definition. Streaming has no definition of its own: however a sequence is
cut, outputs and state must be those of ``fast_weight_memory`` under ``boundary="carry"``. Float64 tensors are computed
in float64, all others in float32.
"""

from reference.gather import sparse_value_gather
from reference.key_step import product_key_update
from reference.layers import fast_weight_layer, product_key_layer
from reference.lookup import brute_force_lookup, product_key_lookup
from reference.memory import fast_weight_memory
from reference.update import chunk_value_update
from reference.varlen import fast_weight_memory_varlen

__all__ = [
    "brute_force_lookup",
    "chunk_value_update",
    "fast_weight_layer",
    "fast_weight_memory",
    "fast_weight_memory_varlen",
    "product_key_layer",
    "product_key_lookup",
    "product_key_update",
    "sparse_value_gather",
]
