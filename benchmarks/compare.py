"""What got slower than a stored run."""

from collections.abc import Sequence

from benchmarks.measure import Result
from benchmarks.providers import PACKAGE, is_package
from benchmarks.results import plain_table, show_bytes, show_us

#: Times whose ratio is less count as equal.
THRESHOLD = 1.1


def _verdict(ratio: float, old_range: tuple[float, float], new_range: tuple[float, float], threshold: float) -> str:
    """In words; a `ratio` above 1 is worse. Ranges are p10 to p90: where they overlap, it is noise."""
    apart = new_range[0] > old_range[1] if ratio > 1 else new_range[1] < old_range[0]
    if max(ratio, 1 / ratio) <= threshold:
        return ""
    word = "slower" if ratio > 1 else "faster"
    return word if apart else f"{word}, but within the noise"


def _quantiles(result: Result) -> tuple[float, float]:
    return result.p10_us or 0.0, result.p90_us or 0.0


def compare(old: Sequence[Result], new: Sequence[Result], threshold: float = THRESHOLD) -> tuple[str, bool]:
    """A table of both runs, and whether this package got slower: by more than `threshold`, and more than the noise.

    A number that was right and is not any more counts as slower. What only one of the two has is not compared.
    """
    before = {(r.row, r.provider): r for r in old}
    header = ["row", "provider", "before", "now", "ratio", "memory before", "now", ""]
    lines, worse = [], []
    for now in new:
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
    if lines:
        verdict = f"{PACKAGE} got slower: {', '.join(worse)}" if worse else f"{PACKAGE} got no slower"
        parts = [plain_table(header, lines), verdict]
    else:
        parts = ["nothing to compare: the two runs have no row in common"]
    return "\n\n".join([*_differences(old, new), *parts]), bool(worse)


def _show(result: Result) -> str:
    return show_us(result.time_us) if result.status == "ok" else result.status


def _differences(old: Sequence[Result], new: Sequence[Result]) -> list[str]:
    """What is not the same about the two runs' machines, or []."""
    if not old or not new:
        return []
    before, now = old[-1], new[-1]
    pairs = [("device", before.device, now.device), ("commit", before.commit, now.commit)]
    for name in dict.fromkeys((*before.versions, *now.versions)):
        pairs.append((name, before.versions.get(name), now.versions.get(name)))
    changed = [f"{name}: {x} before, {y} now" for name, x, y in pairs if x != y]
    return ["\n".join(changed)] if changed else []
