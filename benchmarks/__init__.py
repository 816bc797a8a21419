"""Measurements: `python -m benchmarks.run`, `python -m benchmarks.gpu`, `python -m benchmarks.compiled`."""
