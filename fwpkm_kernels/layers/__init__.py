"""Fast-weight and static product key memories as modules."""

from .convert import from_published, to_published
from .table import ValueTable

__all__ = ["ValueTable", "from_published", "to_published"]
