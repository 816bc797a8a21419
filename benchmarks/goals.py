"""What is to be reached on one H100 at the paper's sizes, beside what the rows of a run say of it."""

import dataclasses
from collections.abc import Callable, Sequence

from benchmarks.measure import Result
from benchmarks.registry import GRAPHED, PACKAGE, rows
from benchmarks.results import plain_table


@dataclasses.dataclass(frozen=True)
class Goal:
    """The most that a number may be, or the least, and how it is made of the times of some rows, in microseconds, and
    of their results."""

    name: str
    most: float
    unit: str
    rows: tuple[str, ...]
    number: Callable[[Sequence[float], Sequence[Result]], float]
    at_least: bool = False
    #: whether the goal is one of the calls in a CUDA graph only
    graph_only: bool = False


def _chunk(us: Sequence[float], results: Sequence[Result]) -> float:
    """One chunk more, of the seven by which the two sequences differ."""
    return (us[0] - us[1]) / 7


def _milliseconds(us: Sequence[float], results: Sequence[Result]) -> float:
    return us[0] / 1e3


def _ratio(us: Sequence[float], results: Sequence[Result]) -> float:
    """The first half of the rows over the second."""
    half = len(us) // 2
    return sum(us[:half]) / sum(us[half:])


def _many_slots(name: str, *operations: str) -> Goal:
    names = tuple(f"{each}/forward/training{size}" for size in ("-n4096", "") for each in operations)
    return Goal(f"{name}, 16.7 M slots over 262 144", 1.3, "x", names, _ratio)


GOALS = (
    Goal(
        "training forward, one chunk of 8x512",
        160,
        "µs",
        ("sequence/forward/8x4096", "sequence/forward/8x512"),
        _chunk,
    ),
    Goal("training backward, one chunk", 220, "µs", ("sequence/backward/8x4096", "sequence/backward/8x512"), _chunk),
    Goal("8x4096, forward + backward", 3.6, "ms", ("sequence/both/8x4096",), _milliseconds),
    Goal(
        "inference, one chunk of 512",
        25,
        "µs",
        ("step/forward/inference",),
        lambda us, results: us[0],
        graph_only=True,
    ),
    Goal("128K tokens, batch 1", 7, "ms", ("prefill/forward/128k",), _milliseconds),
    Goal(
        "8x4096, forward + backward: memory",
        2.1,
        "GiB",
        ("sequence/both/8x4096",),
        lambda us, results: (results[0].peak_bytes or 0) / 2**30,
    ),
    Goal(
        "gather: share of a copy's bandwidth",
        90,
        "%",
        ("gather/forward/training",),
        lambda us, results: 100 * results[0].floor_us / us[0],
        at_least=True,
    ),
    _many_slots("gather", "gather"),
    _many_slots("write", "update_"),
    # A whole step also looks up among eight times the sub-keys, which has a goal of its own.
    _many_slots("streaming value step (gather, then write)", "gather", "update_"),
    Goal(
        "lookup among 4096 sub-keys over 8 floors of 512",
        1.5,
        "x",
        ("lookup/forward/training-n4096", "lookup/forward/training"),
        lambda us, results: us[0] / (8 * results[1].floor_us),
    ),
)
#: The rows that the goals need, which are measured first.
ROWS = tuple(dict.fromkeys(row for goal in GOALS for row in goal.rows))
#: Those of steps, which only a provider of its own captures.
STEPS = tuple(r.name for r in rows("cuda") if r.name in ROWS and any(p.name == GRAPHED for p in r.providers()))


def goals_table(results: Sequence[Result]) -> str:
    """Each goal: what was measured eagerly and in a CUDA graph (of steps: the replay alone), how the better of both
    (the graph, where the goal is one of graphs) lies to the goal, above 1 where it misses it, and whether it does; "no
    graph" where only what was not measured could reach it. Below it what is missing, and why."""
    found = {(r.row, r.provider): r for r in results if r.kind == "cuda"}
    lines = []
    for goal in GOALS:
        ours = [found.get((row, PACKAGE)) for row in goal.rows]
        graphed = [found.get((row, GRAPHED), r) for row, r in zip(goal.rows, ours, strict=True)]
        eager = _number(goal, ours, [r and r.time_us for r in ours])
        graph = _number(goal, ours, [r and r.graph_us for r in graphed]) if goal.unit != "GiB" else None
        line = [goal.name, f"{'≥' if goal.at_least else '≤'} {goal.most:g} {goal.unit}"]
        line += ["-" if x is None else f"{x:.3g}" for x in (eager, graph)]
        numbers = [x for x in ([graph] if goal.graph_only else [eager, graph]) if x is not None]
        ratio = min((goal.most / max(x, 1e-9) if goal.at_least else x / goal.most for x in numbers), default=None)
        if eager is None and ratio is None:
            verdict = "missing"
        elif ratio is not None and ratio <= 1:
            verdict = "reached"
        else:
            verdict = "no graph" if graph is None and goal.unit != "GiB" else "missed"
        lines.append([*line, "-" if ratio is None else f"{ratio:.2f}", verdict])
    missing = []
    for row in ROWS:
        result = found.get((row, PACKAGE))
        graph_result = found.get((row, GRAPHED), result)
        if not (result and result.time_us):
            missing.append(f"{row} ({result.status if result else 'not measured'})")
        elif graph_result and not graph_result.graph_us:
            lacks = found.get((row, GRAPHED)) if row in STEPS else result
            why = "not measured" if lacks is None else lacks.status
            if lacks is not None and lacks.status == "ok":
                why = lacks.message.partition("\n")[0] or "not captured"
            missing.append(f"{row} {GRAPHED if row in STEPS else 'in a graph'} ({why})")
    table = plain_table(["goal", "", "eager", "in a graph", "ratio", ""], lines)
    return table + (f"\nmissing: {', '.join(missing)}" if missing else "")


def _number(goal: Goal, results: Sequence[Result | None], us: Sequence[float | None]) -> float | None:
    there, times = [r for r in results if r is not None], [x for x in us if x]
    return goal.number(times, there) if len(there) == len(times) == len(goal.rows) else None
