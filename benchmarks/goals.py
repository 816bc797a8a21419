"""What is to be reached at the paper's sizes, on one H100 and on two cores of a CPU, beside what rows say of it."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

from benchmarks.measure import Result
from benchmarks.providers import COMPOSED, GRAPHED, PACKAGE
from benchmarks.registry import rows
from benchmarks.results import plain_table


@dataclasses.dataclass(frozen=True)
class Goal:
    """The most that a number may be, or the least, and how it is made of some rows."""

    name: str
    most: float
    unit: str
    #: names of rows, each with a space and the provider behind it where that is not this package
    rows: tuple[str, ...]
    number: str  #: of `NUMBERS`
    at_least: bool = False
    #: whether the goal is one of the calls in a CUDA graph only
    graph_only: bool = False
    kind: str = "cuda"

    @property
    def cases(self) -> list[tuple[str, str]]:
        """Rows and providers."""
        parts = [name.partition(" ") for name in self.rows]
        return [(row, provider or PACKAGE) for row, _, provider in parts]

    @property
    def has_graph(self) -> bool:
        """Whether calls in a CUDA graph say something of it: all but memory, on a GPU."""
        return self.kind == "cuda" and self.unit != "GiB"


#: How the numbers are made: of the times of the rows, in microseconds, and of their results.
NUMBERS: dict[str, Callable[[Sequence[float], Sequence[Result]], float]] = {
    "µs": lambda us, results: us[0],
    "ms": lambda us, results: us[0] / 1e3,
    "memory": lambda us, results: (results[0].peak_bytes or 0) / 2**30,
    "chunk of 7": lambda us, results: (us[0] - us[1]) / 7,  # one more, of those by which the two sequences differ
    "chunk of 8": lambda us, results: (us[0] - us[1]) / 8e3,  # in milliseconds
    "ratio": lambda us, results: sum(us[: len(us) // 2]) / sum(us[len(us) // 2 :]),  # the first half over the second
    "ratio of memory": lambda us, results: (results[0].peak_bytes or 0) / (results[1].peak_bytes or 1),
    "floor share": lambda us, results: 100 * results[0].floor_us / us[0],
    "over 8 floors": lambda us, results: us[0] / (8 * results[1].floor_us),
}


def _lengths(direction: str) -> tuple[str, str]:
    return f"sequence/{direction}/8x4096", f"sequence/{direction}/8x512"


def _many_slots(name: str, *operations: str) -> Goal:
    names = tuple(f"{each}/forward/training{size}" for size in ("-n4096", "") for each in operations)
    return Goal(f"{name}, 16.7 M slots over 262 144", 1.3, "x", names, "ratio")


_on_cpu = functools.partial(Goal, kind="cpu")


def _layer(name: str, row: str) -> Goal:
    return _on_cpu(f"layer over {COMPOSED}, {name}", 1.1, "x", (row, f"{row} {COMPOSED}"), "ratio")


def _tables(size: str) -> list[Goal]:
    rows = tuple(f"sequence-rows/both/{size}{table}" for table in ("-n1024", ""))
    name = f"rows alone: {size}, forward + backward, a million slots over 262 144"
    return [_on_cpu(name, 1.2, "x", rows, "ratio"), _on_cpu(f"{name}: memory", 1.1, "x", rows, "ratio of memory")]


def _rows(provider: str, name: str) -> Goal:
    row = "sequence-rows/both/1x1024"
    return _on_cpu(f"{name} over rows alone: 1024 tokens", 4, "x", (f"{row} {provider}", row), "ratio", at_least=True)


_DOCUMENTS = ("documents/both/8x4096", "sequence-rows/both/8x4096")
_TRAINING, _STEP, _STILL = "sequence/both/8x4096", "step/forward/inference", "step/forward/inference-still-keys"
_CPU_LENGTHS = ("sequence/both/1x4608", "sequence/both/1x512")
_LOOKUPS = ("lookup/forward/training-n4096", "lookup/forward/training")

GOALS = (
    Goal("training forward, one chunk of 8x512", 160, "µs", _lengths("forward"), "chunk of 7"),
    Goal("training backward, one chunk", 220, "µs", _lengths("backward"), "chunk of 7"),
    Goal("8x4096, forward + backward", 3.6, "ms", (_TRAINING,), "ms"),
    Goal("inference, one chunk of 512", 25, "µs", (_STEP,), "µs", graph_only=True),
    Goal("128K tokens, batch 1", 7, "ms", ("prefill/forward/128k",), "ms"),
    Goal("8x4096, forward + backward: memory", 2.1, "GiB", (_TRAINING,), "memory"),
    Goal("gather: share of a copy's bandwidth", 90, "%", ("gather/forward/training",), "floor share", at_least=True),
    _many_slots("gather", "gather"),
    _many_slots("write", "update_"),
    # A whole step also looks up among eight times the sub-keys, which has a goal of its own.
    _many_slots("streaming value step (gather, then write)", "gather", "update_"),
    Goal("lookup among 4096 sub-keys over 8 floors of 512", 1.5, "x", _LOOKUPS, "over 8 floors"),
    _on_cpu("step of 512 tokens", 25, "ms", (_STEP,), "ms"),
    _on_cpu("step of 512 tokens, no key step", 15, "ms", (_STILL,), "ms"),
    _on_cpu("dense write over that step", 20, "x", ("update/forward/inference dense", _STILL), "ratio", at_least=True),
    _on_cpu("step at 512 sub-keys over 128", 2, "x", (_STEP, "step/forward/inference-n128"), "ratio"),
    _on_cpu("forward + backward, one chunk more", 80, "ms", _CPU_LENGTHS, "chunk of 8"),
    *_tables("8x512"),
    *_tables("1x4096"),
    _rows("fwpkm_kernels-table", "a table copied and one filled"),
    _rows("pytorch", "eager PyTorch, sparse,"),
    _on_cpu("8 documents of 4096 tokens over one memory", 1.15, "x", _DOCUMENTS, "ratio"),
    _layer("forward + backward of 1024 tokens", "layer/both/1x1024"),
    _layer("one token", "layer-decode/forward/token"),
)


def cases(kind: str) -> list[tuple[str, str]]:
    """The rows and providers that the goals of a kind of device need."""
    return list(dict.fromkeys(case for goal in GOALS if goal.kind == kind for case in goal.cases))


def goals_table(results: Sequence[Result]) -> str:
    """Each goal of the results' kind of device (of a GPU where there are none): what was measured eagerly and in a CUDA
    graph (of steps: the replay alone), how the better of both (the graph, where the goal is one of graphs) lies to the
    goal, above 1 where it misses it, and whether it does; "no graph" where only what was not measured could reach it.
    Below it what is missing, and why."""
    kind = results[-1].kind if results else "cuda"
    found = {(r.row, r.provider): r for r in results if r.kind == kind}
    lines = []
    for goal in GOALS:
        if goal.kind != kind:
            continue
        ours = [found.get(case) for case in goal.cases]
        graphed = [found.get((row, GRAPHED), r) for (row, _), r in zip(goal.cases, ours, strict=True)]
        eager = _number(goal, ours, [r and r.time_us for r in ours])
        graph = _number(goal, ours, [r and r.graph_us for r in graphed]) if goal.has_graph else None
        line = [goal.name, f"{'≥' if goal.at_least else '≤'} {goal.most:g} {goal.unit}"]
        line += ["-" if x is None else f"{x:.3g}" for x in (eager, graph)]
        numbers = [x for x in ([graph] if goal.graph_only else [eager, graph]) if x is not None]
        ratio = min((goal.most / max(x, 1e-9) if goal.at_least else x / goal.most for x in numbers), default=None)
        if eager is None and ratio is None:
            verdict = "missing"
        elif ratio is not None and ratio <= 1:
            verdict = "reached"
        else:
            verdict = "no graph" if graph is None and goal.has_graph else "missed"
        lines.append([*line, "-" if ratio is None else f"{ratio:.2f}", verdict])
    missing = []
    for row, provider in cases(kind):
        result = found.get((row, provider))
        if not (result and result.time_us):
            name = row if provider == PACKAGE else f"{row} {provider}"
            missing.append(f"{name} ({result.status if result else 'not measured'})")
        elif kind == "cuda" and (why := _lacks_graph(row, found, result)):
            missing.append(why)
    table = plain_table(["goal", "", "eager", "in a graph", "ratio", ""], lines)
    return table + (f"\nmissing: {', '.join(missing)}" if missing else "")


def _lacks_graph(row: str, found: dict[tuple[str, str], Result], result: Result) -> str | None:
    """Where there is no time in a graph: which one, and why. Steps are captured by a provider of their own alone."""
    graphed = found.get((row, GRAPHED))
    if (graphed or result).graph_us:
        return None
    is_step = any(r.name == row and GRAPHED in [p.name for p in r.providers()] for r in rows("cuda", row))
    lacks = graphed if is_step else result
    why = "not measured" if lacks is None else lacks.status
    if lacks is not None and lacks.status == "ok":
        why = lacks.message.partition("\n")[0] or "not captured"
    return f"{row} {GRAPHED if is_step else 'in a graph'} ({why})"


def _number(goal: Goal, results: Sequence[Result | None], us: Sequence[float | None]) -> float | None:
    there, times = [r for r in results if r is not None], [x for x in us if x]
    return NUMBERS[goal.number](times, there) if len(there) == len(times) == len(goal.rows) else None
