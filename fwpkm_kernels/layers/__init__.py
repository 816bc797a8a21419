"""Fast-weight and static product key memories as modules."""

from .fast_weight import FastWeightProductKeyMemory, LayerMemory, advance_memory
from .streamed import StreamedMemory
from .table import ValueTable

__all__ = ["FastWeightProductKeyMemory", "LayerMemory", "StreamedMemory", "ValueTable", "advance_memory"]
