"""What got slower than a stored run."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.measure import Result
from benchmarks.registry import PACKAGE, is_package
from benchmarks.results import Figure, plain_table, read_figures, read_results, show_bytes, show_us

#: Times whose ratio is less count as equal.
THRESHOLD = 1.1


class Stored(NamedTuple):
    """The lines of a results file."""

    results: Sequence[Result]
    figures: Sequence[Figure]

    @classmethod
    def read(cls, path: str | Path) -> "Stored":
        return cls(read_results(path), read_figures(path))


def _verdict(ratio: float, old_range: tuple[float, float], new_range: tuple[float, float], threshold: float) -> str:
    """In words; a `ratio` above 1 is worse. Ranges are p10 to p90: where they overlap, it is noise."""
    apart = new_range[0] > old_range[1] if ratio > 1 else new_range[1] < old_range[0]
    if max(ratio, 1 / ratio) <= threshold:
        return ""
    word = "slower" if ratio > 1 else "faster"
    return word if apart else f"{word}, but within the noise"


def _quantiles(result: Result) -> tuple[float, float]:
    return result.p10_us or 0.0, result.p90_us or 0.0


def compare(old: Stored, new: Stored, threshold: float = THRESHOLD) -> tuple[str, bool]:
    """A table of both runs, and whether this package got slower: by more than `threshold`, and more than the noise.

    A number that was right and is not any more counts as slower. What only one of the two has is not compared.
    """
    before = {(r.row, r.provider): r for r in old.results}
    header = ["row", "provider", "before", "now", "ratio", "memory before", "now", ""]
    lines, worse = [], []
    for now in new.results:
        was = before.get((now.row, now.provider))
        if was is None:
            continue
        line = [now.row, now.provider, _show(was), _show(now), "-", show_bytes(was.peak_bytes)]
        line += [show_bytes(now.peak_bytes), ""]
        if was.status == "ok" and now.status != "ok":
            line[-1] = f"now {now.status}"
        elif was.time_us and now.time_us:
            ratio = now.time_us / was.time_us
            line[4], line[-1] = f"{ratio:.2f}", _verdict(ratio, _quantiles(was), _quantiles(now), threshold)
        lines.append(line)
        if is_package(now.provider) and line[-1] in ("slower", f"now {now.status}"):
            worse.append(now.row if now.provider == PACKAGE else f"{now.row} {now.provider}")
    figures_before = {f.figure: f for f in old.figures}
    figures = []
    for figure in new.figures:
        stored = figures_before.get(figure.figure)
        if stored is None or stored.value <= 0 or figure.value <= 0:
            continue
        ratio, ranges = figure.value / stored.value, [(f.low, f.high) for f in (stored, figure)]
        if figure.at_least:  # more is better: turned round
            ratio, ranges = 1 / ratio, [(-high, -low) for low, high in ranges]
        verdict = _verdict(ratio, *ranges, threshold)
        shown = [f"{f.value:.3g} {f.unit}" for f in (stored, figure)]
        figures.append([figure.figure, *shown, f"{figure.value / stored.value:.2f}", verdict])
        if verdict == "slower":
            worse.append(figure.figure)
    parts = _differences(old, new)
    if lines:
        parts.append(plain_table(header, lines))
    if figures:
        parts.append(plain_table(["figure", "before", "now", "ratio", ""], figures))
    if not lines and not figures:
        parts.append("nothing to compare: the two runs have no row in common")
    elif worse:
        parts.append(f"{PACKAGE} got slower: " + ", ".join(worse))
    else:
        parts.append(f"{PACKAGE} got no slower")
    return "\n\n".join(parts), bool(worse)


def _show(result: Result) -> str:
    return show_us(result.time_us) if result.status == "ok" else result.status


def _differences(old: Stored, new: Stored) -> list[str]:
    """What is not the same about the two runs' machines, or []."""
    a, b = ((*stored.results, *stored.figures) for stored in (old, new))
    if not a or not b:
        return []
    before, now = a[-1], b[-1]
    pairs = [("device", before.device, now.device), ("commit", before.commit, now.commit)]
    for name in dict.fromkeys((*before.versions, *now.versions)):
        pairs.append((name, before.versions.get(name), now.versions.get(name)))
    changed = [f"{name}: {x} before, {y} now" for name, x, y in pairs if x != y]
    return ["\n".join(changed)] if changed else []
