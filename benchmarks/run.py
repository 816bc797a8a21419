"""Time every operation beside its floor and beside other ways to compute it.

    python -m benchmarks.run [--op SUBSTRING] [--device cpu|cuda] [--seconds-per-row S] [--json FILE]

A row is named operation/direction/configuration; benchmarks/README.md says how to read the numbers.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.measure import Expected, Machine, Result, measure, measure_machine, release
from benchmarks.registry import PACKAGE, Row, rows

#: Exit status when the GPU no longer answers: nothing more can be measured by this process, but by another.
DEVICE_LOST = 3


def to_json(result: Result) -> str:
    return json.dumps(dataclasses.asdict(result), ensure_ascii=False)


def read_results(path: str | Path) -> list[Result]:
    """The results in a file of JSON lines, without a line that was cut off or that another version wrote."""
    results = []
    if os.path.exists(path):
        for line in Path(path).read_text("utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError, TypeError):
                results.append(Result(**json.loads(line)))
    return results


def run_rows(
    selected: Sequence[Row],
    machine: Machine,
    *,
    seconds: float,
    done: set[tuple[str, str]],
    deadline: float,
    on_result: Callable[[Result], None],
) -> None:
    """Measure every provider of every row that is not `done`, until `deadline`, a time.monotonic()."""
    for row in selected:
        providers = [provider for provider in row.providers() if (row.name, provider.name) not in done]
        if not providers or time.monotonic() >= deadline:
            continue
        inputs = row.inputs(machine.kind)
        expected = Expected(row, inputs)
        for provider in providers:
            if time.monotonic() < deadline:
                on_result(measure(row, provider, machine, seconds=seconds, inputs=inputs, expected=expected))
                release(machine)


# ---- tables ----


def show_us(us: float | None) -> str:
    """Microseconds in three digits and a fitting unit."""
    if us is None:
        return "-"
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if us >= size:
            return f"{us / size:.3g} {unit}" if us < 999 * size else f"{us / size:.0f} {unit}"
    return f"{us:.3g} µs"


def table_of(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Header and one line per row: this package's time and floor, then the others' times over this package's."""
    by_row: dict[str, dict[str, Result]] = {}
    for result in results:
        by_row.setdefault(result.row, {})[result.provider] = result
    others = list(dict.fromkeys(r.provider for r in results if r.provider != PACKAGE))
    has_graph = any(r.graph_us is not None for r in results)
    header = ["row", "floor", PACKAGE, "x floor", *(["in a graph", "x floor"] if has_graph else [])]
    header += [name for other in others for name in (other, "ratio")]
    lines = []
    for name, found in by_row.items():
        ours = found.get(PACKAGE)
        any_result = ours or next(iter(found.values()))
        line = [name, show_us(any_result.floor_us), *_time_and_ratio(ours)]
        if has_graph:
            line += ["-", "-"]
            if ours and ours.graph_us is not None:
                line[-2:] = [show_us(ours.graph_us), f"{ours.graph_ratio:.2f}"]
        for other in others:
            theirs = found.get(other)
            ratio = "-"
            if ours and theirs and ours.time_us and theirs.time_us:
                ratio = f"{theirs.time_us / ours.time_us:.2f}"
            line += [_time_and_ratio(theirs)[0], ratio]
        lines.append(line)
    return header, lines


def _time_and_ratio(result: Result | None) -> list[str]:
    if result is None:
        return ["-", "-"]
    if result.status != "ok":
        return [result.status, "-"]
    return [show_us(result.time_us), f"{result.ratio:.2f}"]


def plain_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in (header, *lines)
    )


def describe(machine_results: Sequence[Result]) -> str:
    """The machine and its ceilings, and how to read the table."""
    r = machine_results[-1]
    precision, kind_of_time = ("tf32", "medians") if r.kind == "cuda" else ("float32", "minima")
    versions = ", ".join(f"{name} {version}" for name, version in r.versions.items() if version)
    return (
        f"{r.device}: copies at {r.bandwidth_gb_s:.4g} GB/s, "
        f"matrix products in {precision} at {r.matmul_tflop_s:.3g} TFLOP/s\n"
        f"{versions}, commit {r.commit}\n"
        f"Times are {kind_of_time}. ratio = the other's time / this package's: above 1, this package is faster."
    )


def report(results: Sequence[Result], *, rich_allowed: bool = False) -> str | None:
    """Print the table with rich and return None, or return it as text."""
    if not results:
        return "no results"
    problems = "\n".join(f"{r.status}: {r.row} {r.provider}: {r.message}" for r in results if r.status != "ok")
    header, lines = table_of(results)
    text = describe(results) + ("\n\n" + problems if problems else "")
    if rich_allowed:
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            pass
        else:
            shown = Table()
            for i, name in enumerate(header):
                shown.add_column(name, justify="right" if i else "left", no_wrap=True)
            for line in lines:
                shown.add_row(*line)
            Console(width=max(Console().width, sum(len(h) + 14 for h in header))).print(shown)
            print(text)
            return None
    return plain_table(header, lines) + "\n\n" + text


class Progress:
    """A bar with tqdm in a terminal; without, a line for each result."""

    def __init__(self, total: int):
        self.bar = None
        if sys.stderr.isatty():
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                self.bar = tqdm(total=total, unit="measurement", leave=False)

    def step(self, result: Result) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(f"{result.row} {result.provider}")
            self.bar.update()
            return
        time_text, ratio = _time_and_ratio(result)
        print(
            f"{result.row} {result.provider}: {time_text}" + (f", {ratio} x floor" if ratio != "-" else ""), flush=True
        )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--op", default="", metavar="SUBSTRING", help="only rows whose name contains this")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU, else cpu")
    parser.add_argument(
        "--seconds-per-row", type=float, default=0.5, metavar="S", help="time for each provider of a row"
    )
    parser.add_argument("--json", metavar="FILE", help="write a JSON line for each result, as it comes")
    parser.add_argument("--resume", action="store_true", help="keep the results in FILE, measure only what it lacks")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start nothing new after this time")
    parser.add_argument("--no-table", action="store_true", help="no table at the end")
    options = parser.parse_args(argv)
    if options.resume and not options.json:
        parser.error("--resume needs --json FILE")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the registry; `argv` replaces the command line. Returns the exit status: 1 if anything is wrong or failed."""
    options = parse(argv)
    begin = time.monotonic()
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

    results = read_results(options.json) if options.resume else []
    done = {(r.row, r.provider) for r in results}
    names = {row.name for row in selected}
    lost = False
    with contextlib.ExitStack() as stack:
        file = None
        if options.json:
            # A line that was cut off must not run into the next one.
            mode = "a" if options.resume else "w"
            file = stack.enter_context(open(options.json, mode, encoding="utf-8"))
            if options.resume and file.tell():
                file.write("\n")
        progress = Progress(sum((row.name, p.name) not in done for row in selected for p in row.providers()))
        stack.callback(progress.close)

        def keep(result: Result) -> None:
            results.append(result)
            if file is not None:
                print(to_json(result), file=file, flush=True)
            progress.step(result)
            if result.status == "error" and device == "cuda":
                torch.cuda.synchronize()  # raises if the error took the device with it

        try:
            machine = measure_machine(device)
            run_rows(
                selected,
                machine,
                seconds=options.seconds_per_row,
                done=done,
                deadline=begin + 60 * options.minutes,
                on_result=keep,
            )
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
        except RuntimeError as error:
            print(f"the device failed: {error}", file=sys.stderr)
            lost = True
    shown = [r for r in results if r.row in names]
    if not options.no_table:
        text = report(shown, rich_allowed=sys.stdout.isatty())
        if text is not None:
            print(text)
        missing = sum(len(row.providers()) for row in selected) - len(shown)
        if missing:
            print(f"{missing} measurements were not made: out of time, or stopped")
    if lost:
        return DEVICE_LOST
    return int(any(r.status != "ok" for r in shown))


if __name__ == "__main__":
    sys.exit(main())
