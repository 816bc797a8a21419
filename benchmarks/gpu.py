"""A first look, timings, tests and compute-sanitizer on a GPU, in the order of their worth; files in one folder.

    python -m benchmarks.gpu --out DIR --minutes M [--only PART] [--compare FILE] [--device cpu]

Installs nothing, and ends before M minutes are over. Each part runs in processes of its own, which `timeout` ends; one
that a measurement or a test ended, by a crash, by taking too long or by losing the GPU, is followed by another that
goes on behind it. Files: environment.json, results.jsonl (a line per measurement, as they come), tests.txt (pytest, the
fuzzer, and the last words of measurements that ended their process), sanitizer.txt, time.png, scaling.png, and
summary.txt, which is there from the beginning, is written again as results come, and is printed last. Exit status: 0 if
what ran is right, 1 if not (the first look failed, which ends the run; a number of this package is wrong; a test or a
case of the fuzzer failed; compute-sanitizer found something; a part could not run; this package is slower than in
FILE), 2 if there is no GPU.
"""

import argparse
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks import logs
from benchmarks import smoke as first_look
from benchmarks.compare import compare
from benchmarks.goals import goals_table
from benchmarks.measure import NO_GRAPH, Result
from benchmarks.plots import FILES, plot
from benchmarks.providers import is_package
from benchmarks.results import read_results, report, to_json
from benchmarks.run import running, select_cases
from benchmarks.sanitize import TOOL_OPTIONS, TOOLS, errors_found, find_sanitizer
from fwpkm_kernels import env_report
from fwpkm_kernels._commands import CommandError, command, make_folder, write_output

ROOT = Path(__file__).resolve().parent.parent
#: What is run; tests put other commands here.
SMOKE, MEASURE, SANITIZE = (["-m", f"benchmarks.{name}"] for name in ("smoke", "run", "sanitize"))
PYTEST, FUZZ = ["-m", "pytest"], ["-m", "tests.fuzz"]
PYTEST_OPTIONS = """-v --triton-only -p no:cacheprovider -W default --tb=short --maxfail=30 --maxschedchunk=1
--continue-on-collection-errors -o faulthandler_exit_on_timeout=true"""
#: The fuzzer with other seeds where it has found something, or a case has ended its process; 130: it was interrupted.
SEEDS = """seed=0
until "$@" --seed $seed; do status=$?; [ $status != 130 ] || exit $status
echo "the fuzzer ended with status $status"; seed=$((seed + 1)); [ $seed -lt 9 ] || exit; done"""
#: What a GPU is needed for, in the order of its worth; ALONE are those that need most of its memory.
KERNEL_TESTS = [
    *(f"tests/test_{name}.py" for name in ("scans", "chunks", "lookup", "gather", "update", "key_step")),
    *(f"tests/test_{name}.py" for name in ("plan", "memory", "graphs", "streaming_kernels", "streaming")),
    *(f"tests/test_{name}.py" for name in ("compact", "rows", "varlen", "pool", "pool_graph")),
    *(f"tests/test_{name}.py" for name in ("determinism", "launch_tables", "threads", "debug", "golden_chunk")),
    *(f"tests/test_{name}.py" for name in ("autograd", "compile", "checkpoint", "layers_documents")),
]
ALONE = ["tests/test_limits.py", "tests/test_large.py"]
#: A test or a measurement that takes longer on a GPU hangs: what has to compile every kernel takes half of this.
HANGS = 60
#: Seconds between two summaries; and from the interruption of a process to its end, of pytest, which still reports, and
#: of compute-sanitizer, whose start takes longer than what it has to say.
SUMMARY_SECONDS, GRACE, TESTS_GRACE, TOOLS_GRACE = 15.0, 8.0, 12.0, 2.0
#: Seconds that the first look has at least; the tests of ALONE; and the fuzzer for its imports and its last case.
SMOKE_SECONDS, ALONE_SECONDS, FUZZ_SECONDS = first_look.HANGS + 10.0, 35.0, 15.0
CAPTURES = 3  #: that failed: then no more are tried, since each costs a process
MOST_BYTES = 8 * 2**20  #: of a text
STOPPED = "stopped by its time limit"

#: What a part says, and whether that is right.
Verdict = tuple[str, bool]


def is_over(end: float) -> bool:
    """Whether what had to end then, a time.monotonic(), has been interrupted."""
    return time.monotonic() >= end - GRACE


def was_stopped(status: int, end: float) -> bool:
    """Whether `timeout` has ended a process; it is itself killed with what does not heed an interruption."""
    return status == 124 or (status in (-9, 137) and is_over(end))


class Run:
    """One run: where it writes, when it ends, and what its parts have said so far."""

    def __init__(self, options: argparse.Namespace, out: Path, parts: Sequence[str]):
        self.options, self.out, self.parts = options, out, parts
        self.on_gpu = options.device == "cuda"
        self.old = read_results(options.compare) if options.compare else None  # before its file is overwritten
        self.environment = env_report.collect()
        self.verdicts: dict[str, Verdict] = {}
        self.notes: list[str] = []
        self.written = 0.0

    def start(
        self, what: Sequence[str], end: float, log: IO[Any], under: Sequence[str] = (), grace: float = 0, **env: str
    ) -> "subprocess.Popen[Any]":
        """This Python with `what`, under another command perhaps, its output to `log`. It is interrupted, and
        killed with its children at `end`, a time.monotonic()."""
        grace = grace or GRACE
        limit = ["timeout", "--signal=INT", f"--kill-after={grace}", str(max(1.0, end - grace - time.monotonic()))]
        kept = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
        kept |= {"PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", **env}
        command = [*limit, *under, sys.executable, *what]
        no_input, errors = subprocess.DEVNULL, subprocess.STDOUT
        return subprocess.Popen(command, cwd=ROOT, env=kept, stdin=no_input, stdout=log, stderr=errors)

    def wait(self, *processes: "subprocess.Popen[Any]") -> list[int]:
        """Their exit statuses. The summary is written meanwhile; what ends this program ends them."""
        try:
            while any(process.poll() is None for process in processes):
                time.sleep(0.1)
                if time.monotonic() > self.written + SUMMARY_SECONDS:
                    self.summarise()
            return [process.returncode for process in processes]
        finally:
            for process in processes:
                process.terminate()  # which `timeout` hands on
                process.wait()

    def tail(self, arguments: Sequence[str], end: float, lines: int) -> tuple[int, list[str]]:
        """Run it; the exit status, and the last lines of what it said."""
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
            (status,) = self.wait(self.start(arguments, end, log))
            log.seek(0)
            return status, log.read().splitlines()[-lines:]

    def text(self, name: str) -> str:
        path = self.out / name
        return path.read_text("utf-8", "replace") if path.exists() else ""

    def summarise(self) -> tuple[str, str, bool]:
        """Write summary.txt; what it begins with, the rest, and whether all is right and nothing slower than before."""
        self.written = time.monotonic()
        results = read_results(self.out / "results.jsonl")
        comparison, slower = compare(self.old, results) if self.old is not None else ("", False)
        e, right = self.environment, all(right for _, right in self.verdicts.values())
        missing = [part for part in self.parts if part not in self.verdicts or STOPPED in self.verdicts[part][0]]
        machine = ", ".join(gpu["name"] for gpu in e["gpus"]) or e["cpu"]["model"]
        head = [
            ("all right" if right else "NOT RIGHT") + (f", but incomplete: {', '.join(missing)}" if missing else ""),
            f"\n{goals_table(results)}\n",
            f"fwpkm_kernels {e['fwpkm_kernels']}, commit {e['commit']}, on {machine}",
            f"{e['python']}, torch {e['torch']['version']}, triton {e['triton']}, driver {e['driver']}\n",
            *(f"{part}: {self.verdicts.get(part, ('not run yet', True))[0]}" for part in self.parts),
            *self.notes,
        ]
        tests = self.text("tests.txt")
        failures = logs.failures(tests)
        body = [
            *failures[:30],
            *([f"... and {len(failures) - 30} more in tests.txt"] if len(failures) > 30 else []),
            *re.findall(r"^SKIPPED .*needs .* of a GPU's memory.*$", tests, re.M),
            f"\n{report(results)}",
            *([f"\ncompared with the stored run:\n\n{comparison}"] if comparison else []),
        ]
        begin, rest = "\n".join(head), "\n".join(body)
        write_output(self.out / "summary.txt", f"{begin}\n\n{rest}\n")
        return begin, rest, right and not slower


def smoke(run: Run, end: float) -> Verdict:
    status, said = run.tail([*SMOKE, "--device", run.options.device], end, 60)
    if status:
        said.append(STOPPED if is_over(end) else f"exit status {status}")
    return "\n    ".join(["", *said]), status == 0


def rows(run: Run, end: float, whose: str = "own") -> Verdict:
    """benchmarks.run, again and again behind what ended it."""
    results = run.out / "results.jsonl"
    marker, culprits = running(results), dict[str, int]()
    marker.unlink(missing_ok=True)
    arguments = [*MEASURE, "--device", run.options.device, "--whose", whose, "--json", str(results), "--resume"]
    arguments += ["--no-table", "--seconds-per-row", "0.3"]
    arguments += ["--case-seconds", str(HANGS)] if run.on_gpu else []

    def found() -> list[Result]:
        return [r for r in read_results(results) if is_package(r.provider) == (whose == "own")]

    while True:
        minutes = max(0.0, end - GRACE - 5 - time.monotonic()) / 60
        status, tail = run.tail([*arguments, "--minutes", str(minutes)], end, 40)
        culprit = run.text(marker.name)
        if not culprit or culprit in culprits or is_over(end):
            break
        culprits[culprit] = status
        with (run.out / "tests.txt").open("a", encoding="utf-8", errors="replace") as log:
            log.write("\n".join([f"{culprit} ended its process with status {status}:", *tail, "\n"]))
        if "--no-graphs" not in arguments and sum(r.message.startswith(NO_GRAPH) for r in found()) >= CAPTURES:
            arguments.append("--no-graphs")
            run.notes.append(f"{whose} rows: after {culprit} no CUDA graphs, since {CAPTURES} captures have failed")
    marker.unlink(missing_ok=True)
    planned = {(row.name, provider.name) for row, provider in select_cases(run.options.device, whose=whose)}
    wrong = [f"{r.row} {r.provider} is {r.status}" for r in found() if r.status != "ok" and whose == "own"]
    count = sum((r.row, r.provider) in planned for r in found())
    ended = [f"{name} ended its process (status {x})" for name, x in culprits.items()]
    words = [f"{count} of {len(planned)} measured", *ended, *wrong]
    is_whole, is_stopped = count == len(planned), is_over(end - 5)
    if not is_whole:
        words.append(STOPPED if is_stopped else "\n    ".join([f"exit status {status}", *tail[-15:]]))
    return "; ".join(words), not wrong and (is_whole or is_stopped)


def tests(run: Run, end: float) -> Verdict:
    """The kernels' tests, in several processes, since a GPU waits for the compiler, and the fuzzer beside them."""
    cores = len(os.sched_getaffinity(0))
    parts = max(1, min(8, cores // 2))
    pytest = [*PYTEST, *PYTEST_OPTIONS.split(), "-m", "not slow", "-o", f"faulthandler_timeout={HANGS}", "-n"]
    fuzz = [*FUZZ, "--device", run.options.device, "--backend", "triton", "--quick", "--seconds"]
    left = end - time.monotonic()
    first = end - max(0.2 * left, min(ALONE_SECONDS + TESTS_GRACE, 0.5 * left))  # the end of all but ALONE
    environment = {"OMP_NUM_THREADS": str(max(1, cores // parts)), "COLUMNS": "200"}
    with tempfile.TemporaryDirectory() as failures, (run.out / "tests.txt").open("ab") as log:
        fuzz += [str(max(1.0, first - GRACE - FUZZ_SECONDS - time.monotonic())), "--failures", failures]
        started = {"fuzzer": run.start(fuzz, first, log, under=["sh", "-c", SEEDS, "sh"], **environment)}
        if run.on_gpu:  # compiles what compute-sanitizer then need not wait for
            started["sanitize"] = run.start(SANITIZE, first, log)
        both = [[*pytest, str(parts), *KERNEL_TESTS], [*pytest, "1", "-m", "gpu", *ALONE]]
        started["pytest"] = run.start(both[0], first, log, grace=TESTS_GRACE, **environment)
        statuses = dict(zip(started, run.wait(*started.values()), strict=True))
        stopped = [name for name, x in statuses.items() if was_stopped(x, first)]
        (last,) = run.wait(run.start(both[1], end, log, grace=TESTS_GRACE, **environment))
        statuses["pytest alone"], stopped = last, stopped + ["pytest alone"] * was_stopped(last, end)
    text = run.text("tests.txt")
    lines = logs.outcomes(text)
    counts = ", ".join(f"{lines.count(word)} {word.lower()}" for word in dict.fromkeys(sorted(lines)))
    failed = "FAILED" in lines or "ERROR" in lines or "the fuzzer ended" in text
    # 1: tests failed, which pytest has said; 5: none was selected.
    unfit = [name for name, x in statuses.items() if x not in ((0, 1, 5) if "pytest" in name else (0,))]
    words = [counts or "no test ran", *(f"fuzzer: {line}" for line in logs.fuzzed(text) or ["no case"])]
    words += [f"{name} ended its process" for name in logs.culprits(text)] + ([STOPPED] if stopped else [])
    words += [f"{name}: exit status {x}" for name, x in statuses.items() if x]
    return "; ".join(words), bool(lines) and not failed and {*unfit} <= {*stopped}


def sanitizer(run: Run, end: float) -> Verdict:
    """Both tools over benchmarks.sanitize, whose kernels are compiled by then."""
    program = find_sanitizer()
    if program is None:
        return "not present", True
    words, right = [], True
    with tempfile.TemporaryDirectory() as folder, (run.out / "sanitizer.txt").open("a", encoding="utf-8") as log:
        if "tests" not in run.parts:
            run.wait(run.start(SANITIZE, end, log))
        started = []
        for tool in TOOLS:
            under = [program, "--tool", tool, *TOOL_OPTIONS]
            # Only then is an access just behind a tensor one outside of what CUDA has allocated.
            with Path(folder, tool).open("wb") as its:
                started.append(run.start(SANITIZE, end, its, under, TOOLS_GRACE, PYTORCH_NO_CUDA_MEMORY_CACHING="1"))
        for tool, status in zip(TOOLS, run.wait(*started), strict=True):
            text = Path(folder, tool).read_text("utf-8", "replace")
            log.write(text)
            errors, is_whole = errors_found(tool, text)
            last = ([line for line in text.splitlines() if line.strip("= ")] or ["it said nothing"])[-1]
            stopped = was_stopped(status, end)
            how = "" if is_whole and not status else STOPPED if stopped else f"status {status}: {last}"
            count = "nothing found by then" if stopped and not errors else f"{errors} errors"
            words.append(f"{tool} {count}" + (f" ({how})" if how else ""))
            right = right and errors == 0 and not (is_whole and status)  # one that does not run here has found nothing
    return "; ".join(words), right


#: The parts in the order of their worth, and the share of the whole time that is over when each ends at the latest.
PARTS: dict[str, tuple[Callable[[Run, float], Verdict], float]] = {
    "smoke": (smoke, 0.2),
    "rows": (rows, 0.55),
    "tests": (tests, 0.72),
    "sanitizer": (sanitizer, 0.9),
    "providers": (functools.partial(rows, whose="other"), 0.965),
}


@command("gpu")
def main(argv: Sequence[str] | None = None) -> int:
    """Run everything, or one part; `argv` replaces the command line. Returns the exit status."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", default="gpu-results", metavar="DIR", help="folder for the results")
    parser.add_argument("--minutes", type=float, default=7.0, metavar="M", help="ends before this time is over")
    parser.add_argument("--only", choices=tuple(PARTS), help="one part, beside the results that are there")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try it out without a GPU")
    parser.add_argument("--compare", metavar="FILE", help="results of a former run: say what got slower since")
    options = parser.parse_args(argv)
    if options.minutes <= 0:
        parser.error("--minutes must be greater than 0")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU is visible to torch; --device cpu runs the same on the CPU", file=sys.stderr)
        return 2
    out = Path(options.out).resolve()
    plots = [name for name in FILES if name != "roofline.png"]  # there is room for eight files, and one is for a log
    names = ["environment.json", "results.jsonl", "summary.txt", "tests.txt", "sanitizer.txt", *plots]
    make_folder(out, *names, running("results.jsonl").name)
    run = Run(options, out, [options.only] if options.only else list(PARTS))
    for name in names if options.only is None else [f"{options.only}.txt"]:
        (out / name).unlink(missing_ok=True)
    (out / "results.jsonl").touch()
    if options.only in ("rows", "providers"):  # which measure what the file lacks: all of theirs, whatever it was
        old = read_results(out / "results.jsonl")
        kept = [r for r in old if is_package(r.provider) == (options.only == "providers")]
        write_output(out / "results.jsonl", "".join(f"{to_json(result)}\n" for result in kept))
    write_output(out / "environment.json", json.dumps(run.environment, indent=2) + "\n")
    run.summarise()
    whole = 60 * options.minutes
    last = whole * max(share for _, share in PARTS.values())
    for part in run.parts:
        function, share = PARTS[part]
        end = max(whole * share, SMOKE_SECONDS) if part == "smoke" else whole * share
        end = begin + (last if options.only else min(end, last))
        print(f"{part}, for at most {end - time.monotonic():.0f} s: ", end="", flush=True)
        run.verdicts[part] = _, right = function(run, end)
        print("right" if right else "NOT RIGHT", flush=True)
        for name in ("tests.txt", "sanitizer.txt"):
            logs.shorten(out / name, MOST_BYTES)
        run.summarise()
        if part == "smoke" and not right:
            break
    try:
        plot(read_results(out / "results.jsonl"), out, plots)
    except (ImportError, CommandError) as error:
        run.notes.append(f"no plots: {error}")
    head, body, right = run.summarise()
    print(f"\n{body}\n\n{head}", flush=True)  # turned round: of much output only the end may be shown
    return int(not right)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
