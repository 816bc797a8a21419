"""Lines of results as the evaluation's programs write them."""

from benchmarks.evaluation.records import Line


def line(**changes) -> Line:
    return {
        "row": "swa+fwpkm", "model": "swa+fwpkm", "seed": 0, "test_seed": 0, "num_keys": 512, "length": 4096,
        "readings": 1, "contexts": 20, "found": 90, "needles": 100, "digits": 560, "controls_found": 1,
        "seconds": 40.0, "state_bytes": 2**26, "options": {"seed": 0, "lr": 1e-3}, "training_bytes": 369_000,
        "training_cpu_seconds": 110.0, "training_digits_right": 0.99, "training_gate": 0.17,
    } | changes  # fmt: skip


#: Of associative recall.
ASKED = {
    "model": "swa", "seed": 0, "length": 256, "pairs": 8, "overwrite": True, "right": 30, "asked": 40, "stale": 3,
    "overwritten": 20, "controls_right": 1, "controls": 16, "chance": 1 / 64, "training_right": 0.5,
    "training_steps": 500, "training_cpu_seconds": 40.2,
}  # fmt: skip


def bits(model, documents, **changes) -> Line:
    """A line of perplexity, with bits and bytes of each document."""
    size = {"low": 0, "high": 4096, "bytes": 0, "bits": 2.0, "by_document": documents}
    return line(row=model, text="a", orders=2, treatment="on", **size) | changes
