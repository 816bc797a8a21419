"""Files of results: JSON lines that are read back, and pictures of matplotlib's."""

import contextlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fwpkm_kernels._commands import reading, write_output


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines, without any that was cut off; CommandError if it cannot be read."""
    with reading(path):
        text = Path(path).read_text("utf-8", "replace")
    lines = []
    for line in text.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]


def new_figure(width: float, height: float, count: int = 1) -> tuple[Any, list[Any]]:
    """A figure of so many inches with panels side by side; without pyplot, which would keep it and seek a display."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def save_figure(figure: Any, path: Path) -> Path:
    """Write a figure as PNG, whole or not at all; its path."""
    figure.savefig(png := io.BytesIO(), format="png", dpi=110)
    write_output(path, png.getvalue())
    return path


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]], texts: int = 1) -> str:
    """A table in Markdown, of which the first `texts` columns begin at the left and the others end at the right."""
    head = [f"| {' | '.join(columns)} |", "|" + "---|" * texts + "--:|" * (len(columns) - texts)]
    return "\n".join([*head, *(f"| {' | '.join(map(str, row))} |" for row in rows)])
