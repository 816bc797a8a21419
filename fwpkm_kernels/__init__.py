"""Triton kernels for Fast-weight Product Key Memory (FwPKM, arXiv 2601.00671)."""

from .gather import SparseValueGather, sparse_value_gather
from .lookup import ProductKeyLookup, product_key_lookup
from .update import ChunkValueUpdate, chunk_value_update, chunk_value_update_

__version__ = "0.1.0"

__all__ = [
    "ChunkValueUpdate",
    "ProductKeyLookup",
    "SparseValueGather",
    "chunk_value_update",
    "chunk_value_update_",
    "product_key_lookup",
    "sparse_value_gather",
]
