"""What got slower than a stored run."""

from collections.abc import Sequence

from benchmarks.measure import Result
from benchmarks.providers import PACKAGE, is_package
from benchmarks.results import plain_table, show_bytes, show_us

#: Times whose ratio is less count as equal.
THRESHOLD = 1.1


def _verdict(was: Result, now: Result, ratio: float, threshold: float) -> str:
    """In words. Where the ranges from p10 to p90 overlap, it is noise."""
    if max(ratio, 1 / ratio) <= threshold:
        return ""
    word, fast, slow = ("slower", was, now) if ratio > 1 else ("faster", now, was)
    return word if slow.p10_us > fast.p90_us else f"{word}, but within the noise"


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
        times, peaks = ([show(r) for r in (was, now)] for show in (_time, lambda r: show_bytes(r.peak_bytes)))
        line = [now.row, now.provider, *times, "-", *peaks, ""]
        if was.status == "ok" and now.status != "ok":
            line[-1] = f"now {now.status}"
        elif was.time_us and now.time_us:
            ratio = now.time_us / was.time_us
            line[4], line[-1] = f"{ratio:.2f}", _verdict(was, now, ratio, threshold)
        lines.append(line)
        if is_package(now.provider) and line[-1] in ("slower", f"now {now.status}"):
            worse.append(now.row if now.provider == PACKAGE else f"{now.row} {now.provider}")
    if lines:
        verdict = f"{PACKAGE} got slower: {', '.join(worse)}" if worse else f"{PACKAGE} got no slower"
        parts = [plain_table(header, lines), verdict]
    else:
        parts = ["nothing to compare: the two runs have no row in common"]
    differences = _differences(old[-1], new[-1]) if old and new else ""
    return "\n\n".join(filter(None, [differences, *parts])), bool(worse)


def _time(result: Result) -> str:
    return show_us(result.time_us) if result.status == "ok" else result.status


def _differences(old: Result, new: Result) -> str:
    """What is not the same about the two runs' machines."""
    before, now = ({"device": r.device, "commit": r.commit, **r.versions} for r in (old, new))
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return "\n".join(f"{name}: {before.get(name)} before, {now.get(name)} now" for name in changed)
