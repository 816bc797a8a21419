"""Fast-weight and static product key memories as modules."""

from .optim import parameter_groups
from .product_key import ProductKeyMemory
from .stats import MemoryStats, memory_stats
from .table import ValueTable

__all__ = ["MemoryStats", "ProductKeyMemory", "ValueTable", "memory_stats", "parameter_groups"]
