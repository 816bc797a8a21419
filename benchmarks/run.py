"""Time every operation beside its floor and beside other ways to compute it.

    python -m benchmarks.run [--op SUBSTRING] [--device cpu|cuda] [--seconds-per-row S] [--json FILE] [--compare FILE]

A row is named operation/direction/configuration; benchmarks/README.md says how to read the numbers.
"""

import argparse
import contextlib
import faulthandler
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import goals
from benchmarks.compare import THRESHOLD, compare
from benchmarks.inputs import make_room
from benchmarks.measure import NO_GRAPH, Machine, Result, Shared, measure, measure_machine, no_result, release
from benchmarks.providers import Provider, is_package
from benchmarks.registry import Row, rows
from benchmarks.results import read_results, report, time_and_ratio, to_json
from fwpkm_kernels._commands import CommandError, Lines, check_outputs, command, is_stream, reading, write_output

#: Rounds in which all rows of a CPU's goals are measured, one after the other: a goal is a ratio or a difference of the
#: minima of its rows, and work that loads the machine for a while must not slow down one of these rows alone.
ROUNDS = 3


def case_name(row: Row, provider: Provider) -> str:
    return f"{row.name} {provider.name}"


def running(path: str | Path) -> Path:
    """The file beside a results file that names the measurement under way; it stays where nothing more can be measured
    by the process: another one, with --resume, goes on behind that measurement."""
    return Path(f"{path}.running")


def select_cases(
    device: str, name_contains: str = "", whose: str = "all", goals_only: bool = False
) -> list[tuple[Row, Provider]]:
    """What is measured, in this order: row by row on a CPU, where what the reference says of a row takes long. On a
    GPU, where a run may be out of time, this package first in all rows, and there the rows that have a goal; and last
    what has to be compiled for seconds. `whose`: "own" rows are this package's, and "other" those of the others.
    """
    cases = [(row, provider) for row in rows(device, name_contains) for provider in row.providers()]
    first = goals.cases(device)
    if goals_only:
        cases = [(row, p) for row, p in cases if (row.name, p.name) in first]
    if whose != "all":
        cases = [case for case in cases if is_package(case[1].name) == (whose == "own")]

    def turn(case: tuple[Row, Provider]) -> tuple[int, int]:
        row, name = case[0].name, case[1].name
        if is_package(name):
            return 0, with_goal.index(row) if row in with_goal else len(with_goal)
        return (2 if name == "torch.compile" else 1), 0

    with_goal = [row for row, _ in first]

    return sorted(cases, key=turn) if device == "cuda" else cases


def run_rows(
    cases: Sequence[tuple[Row, Provider]],
    machine: Machine,
    *,
    seconds: float,
    deadline: float,
    on_result: Callable[[Result], None],
    on_begin: Callable[[Row, Provider], None] = lambda row, provider: None,
    graphs: bool = True,
) -> None:
    """Measure each provider of each row, until `deadline`, a time.monotonic(); one after another they share inputs. A
    case that stands there again is timed again if it was right, without another check of its numbers."""
    shared: Shared | None = None
    are_right: dict[tuple[Row, Provider], bool] = {}
    for row, provider in cases:
        if time.monotonic() >= deadline:
            return
        if not are_right.get((row, provider), True):
            continue
        if shared is None or row is not shared.row:
            if shared is not None:
                make_room(shared.row.configuration, row.configuration)
            shared = Shared(row, machine.kind)  # the former inputs go before these are drawn
            release(machine)
        on_begin(row, provider)
        result = measure(
            row, provider, machine, seconds=seconds, shared=shared, graphs=graphs, is_right=(row, provider) in are_right
        )
        are_right[row, provider] = result.status == "ok"
        on_result(result)
        release(machine)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--op", default="", metavar="SUBSTRING", help="only rows whose name contains this")
    add("--goals", action="store_true", help="only what the goals are made of")
    add("--whose", choices=("all", "own", "other"), default="all", help="rows of this package, or others")
    add("--list", action="store_true", help="print what would be measured, and end")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU, else cpu")
    add("--seconds-per-row", type=float, default=0.5, metavar="S", help="time for each provider of a row")
    add("--json", metavar="FILE", help="write a JSON line for each result, as it comes")
    add("--resume", action="store_true", help="keep the results in FILE, measure only what it lacks")
    add("--minutes", type=float, default=float("inf"), help="start nothing new after this time")
    add("--case-seconds", type=float, metavar="S", help="end the process where one measurement takes longer")
    add("--no-graphs", action="store_true", help="capture no calls, where that fails for each of them")
    add("--no-table", action="store_true", help="no table at the end")
    add("--compare", metavar="FILE", help="show what got slower than in FILE; exit status 1 if this package did")
    add("--results", metavar="FILE", help="with --compare: measure nothing, take these results")
    add("--threshold", type=float, default=THRESHOLD, help="with --compare: times up to this ratio are no change")
    options = parser.parse_args(argv)
    if options.resume and not options.json:
        parser.error("--resume needs --json FILE")
    if options.results and not options.compare:
        parser.error("--results needs --compare FILE")
    return options


def compare_with_stored(options: argparse.Namespace, old: Sequence[Result], new: Sequence[Result]) -> bool:
    """Print the comparison; whether this package got slower."""
    text, slower = compare(old, new, options.threshold)
    print(f"\nCompared with {options.compare}\n\n{text}")
    return slower


@command("run")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the registry; `argv` replaces the command line. Exit status 1: something is wrong, failed or got slower."""
    options = parse(argv)
    deadline = time.monotonic() + 60 * options.minutes
    old = read_results(options.compare) if options.compare else None  # before anything is written, perhaps to its file
    if old is not None and options.results:
        return int(compare_with_stored(options, old, read_results(options.results)))
    has_gpu = torch.cuda.is_available()
    device = options.device or ("cuda" if has_gpu else "cpu")
    if device == "cuda" and not has_gpu:
        print("no GPU is visible to torch: use --device cpu", file=sys.stderr)
        return 2
    if device == "cuda" and os.environ.get("TRITON_INTERPRET") == "1":
        print("timings of Triton's interpreter mean nothing: unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    selected = rows(device, options.op)
    if not selected:
        print(f"no row for {device} has {options.op!r} in its name; the rows are:", file=sys.stderr)
        print("\n".join(row.name for row in rows(device)), file=sys.stderr)
        return 2
    planned = select_cases(device, options.op, options.whose, options.goals)
    if options.list:
        print("\n".join(case_name(*case) for case in planned))
        return 0

    marker = running(options.json) if options.json and not is_stream(options.json) else None
    check_outputs(options.json, marker)
    has_file = options.resume and marker is not None and os.path.exists(options.json)
    results = {(r.row, r.provider): r for r in (read_results(options.json) if has_file else [])}
    cases = [(row, p) for row, p in planned if (row.name, p.name) not in results]
    ended = ""
    if options.resume and marker and marker.exists():
        with reading(marker):
            ended = marker.read_text("utf-8", "replace")
    failed = lost = False
    errors: list[CommandError] = []

    def record(write: Callable[..., None], *what: Any) -> None:
        """After an error nothing more is written, so that all is measured before the error is told."""
        if not errors:
            try:
                write(*what)
            except CommandError as error:
                errors.append(error)

    with contextlib.ExitStack() as stack:
        file = None
        if options.json:
            file = stack.enter_context(Lines(options.json, append=options.resume))
            if options.resume and os.path.getsize(options.json):
                file.write("")  # a line that was cut off must not run into the next one
        stack.callback(faulthandler.cancel_dump_traceback_later)

        def begin_case(row: Row, provider: Provider) -> None:
            if marker is not None:
                record(write_output, marker, case_name(row, provider))
            if options.case_seconds:
                faulthandler.dump_traceback_later(options.case_seconds, exit=True)

        def keep(result: Result) -> None:
            former = results.get((result.row, result.provider))
            if former is None or result.status != "ok" or (result.time_us or 0) < (former.time_us or 0):
                results[result.row, result.provider] = result
                if file is not None:
                    record(file.write, to_json(result))
            time_text, ratio = time_and_ratio(result)
            over = "" if ratio == "-" else f", {ratio} x floor"
            print(f"{result.row} {result.provider}: {time_text}{over}", flush=True)
            if marker is not None and result.message.startswith(NO_GRAPH):  # which another process goes on behind
                raise RuntimeError("after a failed capture torch takes no other: --resume goes on in a new process")
            if device == "cuda" and result.status == "error":
                torch.cuda.synchronize()  # raises if the error took the device with it
                torch.cuda.empty_cache()  # and this one, if it was raised while a graph was captured

        try:
            if cases:
                machine = measure_machine(device)
            for row, provider in cases:
                if case_name(row, provider) == ended:
                    message = "it ended the process that measured it, by a crash or by taking too long"
                    keep(no_result(row, provider, machine, status="error", message=message))
            cases = [case for case in cases if case_name(*case) != ended]
            again = [(row, p) for row, p in cases if device == "cpu" and (row.name, p.name) in goals.cases(device)]
            if cases:
                run_rows(
                    cases + again * (ROUNDS - 1), machine, on_result=keep, on_begin=begin_case,
                    seconds=options.seconds_per_row, deadline=deadline, graphs=not options.no_graphs,
                )  # fmt: skip
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
        except RuntimeError as error:
            print(f"the device failed: {error}" if device == "cuda" else f"failed: {error}", file=sys.stderr)
            lost, failed = device == "cuda", True
        if marker is not None and not lost:
            marker.unlink(missing_ok=True)
    names = {row.name for row in selected}
    shown = [r for r in results.values() if r.row in names]
    if not options.no_table:
        print(report(shown))
        if shown and not options.op and options.whose == "all":
            print(f"\n{goals.goals_table(shown)}")
        missing = len({(row.name, p.name) for row, p in planned} - {(r.row, r.provider) for r in shown})
        if missing:
            print(f"{missing} measurements were not made: out of time, or stopped")
    slower = old is not None and compare_with_stored(options, old, shown)
    if errors:
        raise errors[0]
    return int(failed or slower or any(r.status != "ok" for r in shown))


if __name__ == "__main__":
    sys.exit(main())
