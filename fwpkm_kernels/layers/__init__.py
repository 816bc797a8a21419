"""Fast-weight and static product key memories as modules."""

from . import convert
from .advance import advance_memory
from .continuation import LayerMemory
from .convert import from_published, to_published
from .fast_weight import FastWeightProductKeyMemory
from .optim import parameter_groups
from .product_key import ProductKeyMemory
from .stats import MemoryStats, memory_stats
from .streamed import StreamedMemory
from .table import ValueTable

__all__ = [
    "FastWeightProductKeyMemory",
    "LayerMemory",
    "MemoryStats",
    "ProductKeyMemory",
    "StreamedMemory",
    "ValueTable",
    "advance_memory",
    "convert",
    "from_published",
    "memory_stats",
    "parameter_groups",
    "to_published",
]
