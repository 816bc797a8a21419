"""The test suite, compute-sanitizer and the benchmarks on a GPU; everything it finds as files in one folder.

    python -m benchmarks.gpu --out DIR --minutes M [--peers DIR] [--compare FILE] [--device cpu]

Installs nothing, and ends before M minutes are over: what it has by then is kept. Files, none of them in a subfolder:
environment.json, tests.txt (pytest and the fuzzer), sanitizer.txt, results.jsonl (one line per measurement, as they
come), time.png, roofline.png, scaling.png, and summary.txt, which is also printed last. Exit status: 0 if tests and
benchmarks ran and all that ran is right, 1 if not (a test or a case of the fuzzer failed, compute-sanitizer found
something, a number of this package is wrong, one of the steps could not run, or this package is slower than in FILE), 2
if there is no GPU.
"""

import argparse
import contextlib
import glob
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.compare import Stored, compare
from benchmarks.peers import FOLDERS
from benchmarks.plots import FILES, plot
from benchmarks.registry import is_package, rows
from benchmarks.results import figures_table, read_figures, read_results, report
from benchmarks.run import running
from fwpkm_kernels import env_report
from fwpkm_kernels._commands import CommandError, command, make_folder, write_output

ROOT = Path(__file__).resolve().parent.parent
#: Run first: what a GPU is needed for. The rest of the suite follows, the compiler's cases last.
KERNEL_TESTS = (
    "lookup",
    "update",
    "gather",
    "addressing",
    "chunks",
    "memory_kernels",
    "memory",
    "streaming_kernels",
    "streaming",
    "state",
    "graphs",
    "plan",
    "golden_chunk",
    "torch",
)
#: Of the whole time. Tests get a part at most, and so does compute-sanitizer; what they leave is for the benchmarks.
TESTS_SHARE, SANITIZER_SHARE, SANITIZER_END, BENCHMARKS_END, ALARM = 0.54, 0.15, 0.62, 0.92, 0.97
FUZZER_SHARE = 0.4  #: of the time for tests: it takes as long as it is given
#: A measurement that takes longer on a GPU hangs: it may have to compile every kernel, and then takes half of this.
CASE_SECONDS = 90.0

FINISHED, STOPPED = "finished", "stopped"  #: how the note on a step begins
PART = "== part"  #: what stands above the output of each of the processes of the tests


class Stopped(Exception):  # noqa: N818 - nothing is wrong
    """Raised in the main program by SIGTERM, SIGINT or the alarm."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def _raise_stopped(number: int, frame: Any) -> None:
    raise Stopped(number)


@contextlib.contextmanager
def signals_raise(seconds: float) -> Iterator[None]:
    """Within the block signals raise Stopped, and so does the clock after `seconds`."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)
    before = [signal.signal(number, _raise_stopped) for number in numbers]
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def run_children(
    children: Sequence[tuple[Sequence[str], dict[str, Any]]], seconds: float, *, grace: float
) -> list[int | None]:
    """Run commands side by side, each with options of its own, at most so long; see `run_child`."""
    processes: list[subprocess.Popen[Any]] = []

    def wait(some: Sequence["subprocess.Popen[Any]"], seconds: float) -> None:
        end = time.monotonic() + seconds
        for process in some:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))

    try:
        for command, options in children:
            options = {"cwd": ROOT, "stdin": subprocess.DEVNULL, "start_new_session": True, **options}
            processes.append(subprocess.Popen(command, **options))
        wait(processes, seconds)
        late = [process for process in processes if process.poll() is None]
        for process in late:
            process.send_signal(signal.SIGINT)
        wait(late, grace)
        return [None if process in late else process.returncode for process in processes]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_child(
    arguments: Sequence[str], seconds: float, *, under: Sequence[str] = (), grace: float = 10.0, **options: Any
) -> int | None:
    """Run this Python with `arguments`, at most so long; its exit status, or None if it had to be stopped.

    `under` is a command that runs it, as a debugger would.

    It is asked to stop first (SIGINT: pytest then still reports its failures), and killed with its children after
    `grace`, or at once if this program is being stopped itself.
    """
    return run_children([([*under, sys.executable, *arguments], options)], seconds, grace=grace)[0]


def compiled_environment() -> dict[str, str]:
    """The environment less what would send the kernels to Triton's interpreter."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def run_tests(path: Path, seconds: float) -> str:
    """pytest, in several processes, since a GPU waits for the compiler, and the fuzzer beside it; outputs to `path`;
    how it ended, in words."""
    first = [f"tests/test_{name}.py" for name in KERNEL_TESTS]
    others = sorted(f"tests/{file.name}" for file in (ROOT / "tests").glob("test_*.py"))
    others.sort(key=lambda name: name == "tests/test_compiled.py")
    files = [*first, *(name for name in others if name not in first)]
    arguments = ["-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", "-m", "not slow", *files]
    arguments += ["--continue-on-collection-errors"]  # of what may not be installed
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = max(1, min(8, cores // 2))
    environment = {**compiled_environment(), "PYTHONUNBUFFERED": "1"}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // parts)))
    with contextlib.ExitStack() as stack:
        commands = {f"{i + 1} of {parts}": [*arguments, "--part", f"{i + 1}/{parts}"] for i in range(parts)}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        commands["fuzzer"] = ["-m", "tests.fuzz", "--device", device, "--seconds", str(FUZZER_SHARE * seconds)]
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8")) for _ in commands]
        children = [
            ([sys.executable, *command], {"stdout": output, "stderr": subprocess.STDOUT, "env": environment})
            for command, output in zip(commands.values(), outputs, strict=True)
        ]
        try:
            statuses = run_children(children, seconds, grace=10.0)
        finally:  # what there is is kept
            with path.open("w", encoding="utf-8") as file:
                for name, output in zip(commands, outputs, strict=True):
                    output.seek(0)
                    file.write(f"{PART} {name}\n{output.read()}\n")
    if None in statuses:
        return f"{STOPPED} at their time limit of {seconds:.0f} s"
    return f"{FINISHED}, status {max(status or 0 for status in statuses)}"


def count_tests(text: str) -> str:
    """pytest's own counts, or, where it was killed before it gave them, the letters of its progress lines."""
    names = {".": "passed", "F": "failed", "E": "error", "s": "skipped", "x": "xfailed", "X": "xpassed"}
    sums = dict.fromkeys(("failed", "passed", "skipped", "xfailed", "xpassed", "error"), 0)
    for part in text.split(PART):
        found = re.findall(r"^=*\s*(?:no tests ran|(\d+ \w+(?:, \d+ \w+)*)) in [\d.]+s.*?=*$", part, re.M)
        counts = re.findall(r"(\d+) (\w+)", found[-1]) if found else []
        letters = "".join(re.findall(r"^([.FEsxX]+)(?:\s+\[\s*\d+%\])?$", part, re.M))
        for number, name in counts or [] if found else [(letters.count(c), name) for c, name in names.items()]:
            name = "error" if name == "errors" else name
            if name in sums:
                sums[name] += int(number)
    return ", ".join(f"{number} {name}" for name, number in sums.items() if number) or "none finished"


def count_fuzzed(text: str) -> str:
    """The fuzzer's last line."""
    found = re.findall(r"^\d+ cases, \d+ failures, seed \d+$", text, re.M)
    return found[-1] if found else "none finished"


def too_large(text: str) -> list[str]:
    """pytest's lines on the tests that were skipped because others held the memory that they need."""
    return re.findall(r"^SKIPPED .*needs .* of a GPU's memory.*$", text, re.M)


def tests_failed(text: str) -> bool:
    """A test, or a case of the fuzzer."""
    return bool(re.search(r"[1-9]\d* (failed|error|failures)", f"{count_tests(text)}; {count_fuzzed(text)}"))


#: Each tool, and what its last line says of what it found.
SANITIZERS = {
    "memcheck": r"ERROR SUMMARY: (\d+ errors?)",
    "racecheck": r"RACECHECK SUMMARY: (\d+ hazards? displayed \(\d+ errors?, \d+ warnings?\))",
}


def find_sanitizer() -> str | None:
    found = shutil.which("compute-sanitizer")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), *sorted(glob.glob("/usr/local/cuda*"))]
    for home in filter(None, homes):
        for place in ("bin", "compute-sanitizer"):
            found = found or shutil.which("compute-sanitizer", path=os.path.join(home, place))
    return found


def run_sanitizer(path: Path, seconds: float) -> dict[str, str]:
    """Both tools over benchmarks.sanitize, their output to `path`; what each says, in words."""
    program = find_sanitizer()
    if program is None:
        return {"compute-sanitizer": "not present"}
    # Only then is an access just behind a tensor one outside of what CUDA has allocated.
    environment = {**compiled_environment(), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    options = ["--target-processes", "application-only", "--report-api-errors", "no", "--print-limit", "20"]
    end, found = time.monotonic() + seconds, {}
    for i, tool in enumerate(SANITIZERS):
        # The first one also compiles the kernels, and gets two thirds of the time.
        limit = max(0.0, end - time.monotonic()) * (2 / 3 if i == 0 else 1)
        with path.open("a+", encoding="utf-8") as file:
            begin = file.tell()
            status = run_child(
                ["-m", "benchmarks.sanitize"],
                limit,
                under=[program, "--tool", tool, *options],
                grace=2.0,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
            )
            file.seek(begin)
            found[tool] = sanitizer_verdict(tool, file.read(), status, limit)
    return found


def sanitizer_verdict(tool: str, text: str, status: int | None, limit: float) -> str:
    """What a tool found, from its output and exit status; None is the status of one that was stopped."""
    summary = re.findall(SANITIZERS[tool], text)
    if status is None:
        findings = len(re.findall(r"^=+ +(?:Invalid|Misaligned|Error: Race)", text, re.M))
        return f"{STOPPED} at its time limit of {limit:.0f} s, {findings or 'no'} errors till then"
    if not summary:
        lines = [line for line in text.splitlines() if line.strip("= ")]
        return f"could not run (exit status {status}): {lines[-1] if lines else 'it said nothing'}"
    return summary[-1] + ("" if status == 0 or not summary[-1].startswith("0 ") else f", but exit status {status}")


def sanitizer_right(verdict: str) -> bool:
    """No errors; a tool that is not there, does not run here or was stopped has found none."""
    no_fault = re.fullmatch(r"0 errors?|\d+ hazards? displayed \(0 errors?, \d+ warnings?\)", verdict)
    return bool(no_fault) or verdict == "not present" or verdict.startswith("could not run") or "no errors" in verdict


def planned_measurements(device: str) -> int:
    """How many there are with the peers that are there."""
    return sum(len(row.providers()) for row in rows(device))


def run_benchmarks(path: Path, device: str, seconds: float, seconds_per_row: float, planned: int) -> str:
    """benchmarks.run in processes of its own: one that a measurement ended, by a crash, by taking too long or by losing
    the GPU, is followed by another that goes on after it."""
    begin, marker = time.monotonic(), running(path)
    marker.unlink(missing_ok=True)

    def progress() -> tuple[int, str]:
        return len(read_results(path)), marker.read_text("utf-8") if marker.exists() else ""

    with contextlib.ExitStack() as stack:
        stack.callback(marker.unlink, missing_ok=True)
        while True:
            left = seconds - (time.monotonic() - begin)
            if left <= 0:
                return f"{STOPPED} at their time limit"
            arguments = ["-m", "benchmarks.run", "--device", device, "--json", str(path), "--resume", "--no-table"]
            arguments += ["--seconds-per-row", str(seconds_per_row), "--minutes", str(max(0.0, left - 5) / 60)]
            arguments += ["--case-seconds", str(CASE_SECONDS)] if device == "cuda" else []
            before = progress()
            with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
                status = run_child(arguments, left, grace=3.0, stderr=errors, env=compiled_environment())
                errors.seek(0)
                tail = "\n".join(errors.read().splitlines()[-15:])
            count, under_way = after = progress()
            if status is None or (status in (0, 1) and not under_way):
                return FINISHED if count == planned else f"{STOPPED} at their time limit"
            if after == before:  # each process goes past what ended the one before
                return f"ended with exit status {status}:\n{tail}"


def write_summary(
    out: Path,
    notes: dict[str, str],
    environment: dict[str, Any],
    *,
    sanitizer: dict[str, str],
    planned: int,
    old: Stored | None,
) -> bool:
    """Write and print summary.txt; whether everything in it is right, and nothing slower than in `old`."""
    tests_file = out / "tests.txt"
    text = tests_file.read_text("utf-8", "replace") if tests_file.exists() else ""
    results = read_results(out / "results.jsonl")
    figures = read_figures(out / "results.jsonl")
    failures = re.findall(r"^(?:FAILED|ERROR) .*$", text, re.M)
    tests_note, benchmarks_note = notes.get("tests", STOPPED), notes.get("benchmarks", STOPPED)
    tests_right = tests_note.endswith("status 0") or (tests_note.startswith(STOPPED) and not tests_failed(text))
    benchmarks_right = benchmarks_note.startswith((FINISHED, STOPPED)) and bool(results)
    wrong = [result for result in results if is_package(result.provider) and result.status != "ok"]
    sanitizer_is_right = all(map(sanitizer_right, sanitizer.values()))
    all_right = tests_right and benchmarks_right and sanitizer_is_right and not wrong
    comparison, slower = compare(old, Stored(results, figures)) if old else ("", False)
    complete = tests_note.startswith(FINISHED) and benchmarks_note.startswith(FINISHED)
    gpus = ", ".join(gpu["name"] for gpu in environment["gpus"]) or environment["cpu"]["model"]
    parts = [
        ("all right" if all_right else "NOT RIGHT") + ("" if complete else ", but incomplete"),
        f"fwpkm_kernels {environment['fwpkm_kernels']}, commit {environment['commit']}, on {gpus}",
        f"{environment['python']}, torch {environment['torch']['version']}, triton {environment['triton']}, "
        f"driver {environment['driver']}",
        "",
        f"tests: {count_tests(text) if text else 'none'} ({tests_note})",
        f"fuzzer: {count_fuzzed(text)}",
        *failures[:30],
        *([f"... and {len(failures) - 30} more in tests.txt"] if len(failures) > 30 else []),
        *too_large(text),
        "",
        *(f"{tool}: {verdict}" for tool, verdict in sanitizer.items()),
        "",
        f"benchmarks: {len(results)} of {planned or 'unknown'} measurements ({benchmarks_note})",
        "",
        str(report(results)),
        *(["", figures_table(figures)] if figures else []),
        *(["", "compared with the stored run:", "", comparison] if old else []),
        *([f"\nplots: {notes['plots']}"] if "plots" in notes else []),
        *(
            [f"\nwhat is above is what there was when it was stopped by {notes['stopped']}"]
            if "stopped" in notes
            else []
        ),
    ]
    summary = "\n".join(parts) + "\n"
    print("\n" + summary, flush=True)
    try:
        write_output(out / "summary.txt", summary)
    except CommandError as error:
        print(f"failed: {error}", file=sys.stderr)
        return False
    return all_right and not slower


def draw_plots(out: Path) -> str | None:
    """None, or why there are none."""
    try:
        plot(read_results(out / "results.jsonl"), out)
    except (ImportError, CommandError) as error:
        return f"none: {error}"
    return None


@command("gpu")
def main(argv: Sequence[str] | None = None) -> int:
    """Run everything; `argv` replaces the command line. Returns the exit status."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", default="gpu-results", metavar="DIR", help="folder for the results")
    parser.add_argument("--minutes", type=float, default=9.0, metavar="M", help="ends before this time is over")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try it out without a GPU")
    parser.add_argument(
        "--seconds-per-row", type=float, default=0.3, metavar="S", help="time for each provider of a row"
    )
    parser.add_argument(
        "--peers", default="", metavar="DIR", help="folders of other packages to measure, separated as in PATH"
    )
    parser.add_argument("--compare", metavar="FILE", help="results of a former run: say what got slower since")
    options = parser.parse_args(argv)
    if options.minutes <= 0:
        parser.error("--minutes must be greater than 0")
    peers = [os.path.abspath(folder) for folder in options.peers.split(os.pathsep) if folder]
    for path in (*peers, *filter(None, [options.compare])):
        if not os.path.exists(path):
            parser.error(f"there is no {path}")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU is visible to torch; --device cpu runs the same on the CPU", file=sys.stderr)
        return 2

    total = 60 * options.minutes
    if peers:  # read by the processes that measure
        os.environ[FOLDERS] = os.pathsep.join([*peers, *filter(None, [os.environ.get(FOLDERS)])])
    old = Stored.read(options.compare) if options.compare else None  # before its file is overwritten
    out = Path(options.out).resolve()
    names = ("results.jsonl", "summary.txt", "environment.json", "tests.txt", "sanitizer.txt", *FILES)
    make_folder(out, *names, running("results.jsonl").name)
    for name in names:
        (out / name).unlink(missing_ok=True)
    environment = env_report.collect()
    (out / "environment.json").write_text(json.dumps(environment, indent=2) + "\n", "utf-8")
    (out / "results.jsonl").touch()

    notes: dict[str, str] = {}
    sanitizer: dict[str, str] = {}
    stopped = planned = 0

    def left(share: float) -> float:
        """Seconds until so much of the time is over."""
        return max(0.0, share * total - (time.monotonic() - begin))

    try:
        with signals_raise(left(ALARM)):
            print(f"tests, for at most {left(TESTS_SHARE):.0f} s, to {out.name}/tests.txt", flush=True)
            notes["tests"] = run_tests(out / "tests.txt", left(TESTS_SHARE))
            print(f"tests: {count_tests((out / 'tests.txt').read_text('utf-8', 'replace'))}", flush=True)
            if options.device == "cuda":
                seconds = min(left(SANITIZER_END), SANITIZER_SHARE * total)
                print(f"compute-sanitizer, for at most {seconds:.0f} s, to {out.name}/sanitizer.txt", flush=True)
                sanitizer = run_sanitizer(out / "sanitizer.txt", seconds)
                print("\n".join(f"{tool}: {verdict}" for tool, verdict in sanitizer.items()), flush=True)
            planned = planned_measurements(options.device)
            seconds = left(BENCHMARKS_END)
            print(f"benchmarks, {planned} measurements, for at most {seconds:.0f} s", flush=True)
            notes["benchmarks"] = run_benchmarks(
                out / "results.jsonl", options.device, seconds, options.seconds_per_row, planned
            )
            missing_plots = draw_plots(out)
            if missing_plots:
                notes["plots"] = missing_plots
    except Stopped as reason:
        notes["stopped"] = "its time limit" if reason.number == signal.SIGALRM else str(reason)
        stopped = 0 if reason.number == signal.SIGALRM else 128 + reason.number
    except Exception:  # the summary of what there is must still come out
        notes["stopped"] = f"an error:\n{traceback.format_exc()}"
        stopped = 1
    all_right = write_summary(out, notes, environment, sanitizer=sanitizer, planned=planned, old=old)
    return stopped or int(not all_right)


if __name__ == "__main__":
    sys.exit(main())
