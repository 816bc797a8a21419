"""Triton kernels for Fast-weight Product Key Memory (FwPKM, arXiv 2601.00671)."""

from .compact import apply_rows_
from .gather import SparseValueGather, sparse_value_gather
from .graphs import MemoryGraph, PoolGraph
from .key_step import ProductKeyUpdate, product_key_update
from .lookup import ProductKeyLookup, product_key_lookup
from .memory import FastWeightMemory, fast_weight_memory
from .pool import MemoryPool
from .records import Carry, DocumentsCarry, MemoryOutput, Rows, VarlenOutput
from .sessions import PoolFullError
from .state import MemoryState
from .streaming import fast_weight_memory_step
from .update import ChunkValueUpdate, chunk_value_update, chunk_value_update_
from .varlen import fast_weight_memory_varlen

__version__ = "0.1.0"

__all__ = [
    "Carry",
    "ChunkValueUpdate",
    "DocumentsCarry",
    "FastWeightMemory",
    "MemoryGraph",
    "MemoryOutput",
    "MemoryPool",
    "MemoryState",
    "PoolFullError",
    "PoolGraph",
    "ProductKeyLookup",
    "ProductKeyUpdate",
    "Rows",
    "SparseValueGather",
    "VarlenOutput",
    "apply_rows_",
    "chunk_value_update",
    "chunk_value_update_",
    "fast_weight_memory",
    "fast_weight_memory_step",
    "fast_weight_memory_varlen",
    "product_key_lookup",
    "product_key_update",
    "sparse_value_gather",
]
