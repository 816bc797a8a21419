"""Fast-weight and static product key memories as modules."""

from .table import ValueTable

__all__ = ["ValueTable"]
