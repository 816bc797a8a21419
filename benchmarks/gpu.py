"""A first look, timings, tests and compute-sanitizer on a GPU, in the order of their worth; files in one folder.

    python -m benchmarks.gpu --out DIR --minutes M [--only PART] [--compare FILE] [--device cpu]

Installs nothing, and ends before M minutes are over. Each part runs in processes of its own, which `timeout` ends; one
that a measurement or a test ended, by a crash, by taking too long or by losing the GPU, is followed by another that
goes on behind it. Files: environment.json, results.jsonl (a line per measurement, as they come), tests.txt (pytest and
the fuzzer), sanitizer.txt, time.png, scaling.png, and summary.txt, which is there from the beginning, is written again
as results come, and is printed last. Exit status: 0 if what ran is right, 1 if not (the first look failed, which ends
the run; a number of this package is wrong; a test or a case of the fuzzer failed; compute-sanitizer found something; a
part could not run; this package is slower than in FILE), 2 if there is no GPU.
"""

import argparse
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks.compare import Stored, compare
from benchmarks.goals import goals_table
from benchmarks.plots import FILES, plot
from benchmarks.registry import is_package
from benchmarks.results import figures_table, report
from benchmarks.run import running, select_cases
from fwpkm_kernels import env_report
from fwpkm_kernels._commands import CommandError, command, make_folder, write_output

ROOT = Path(__file__).resolve().parent.parent
#: What is run; tests put other commands here.
SMOKE, MEASURE, SANITIZE = (["-m", f"benchmarks.{name}"] for name in ("smoke", "run", "sanitize"))
PYTEST, FUZZ = ["-m", "pytest"], ["-m", "tests.fuzz"]
#: The fuzzer with other seeds where it has found something, or a case has ended its process.
SEEDS = """seed=0
until "$@" --seed $seed; do echo "the fuzzer ended with status $?"; seed=$((seed + 1)); [ $seed -lt 9 ] || exit; done"""
#: What a GPU is needed for, in the order of its worth; ALONE are those that need most of its memory.
KERNEL_TESTS = [
    *(f"tests/test_{name}.py" for name in ("memory_kernels", "chunks", "lookup", "gather", "update", "addressing")),
    *(f"tests/test_{name}.py" for name in ("plan", "memory", "graphs", "streaming_kernels", "streaming")),
    *(f"tests/test_{name}.py" for name in ("determinism", "threads", "debug", "golden_chunk", "torch")),
]
ALONE = ["tests/test_scale.py"]
#: A test or a measurement that takes longer on a GPU hangs: what has to compile every kernel takes half of this.
HANGS = 60
#: Seconds between two summaries; from the interruption of a process, so that pytest still reports, to its end.
SUMMARY_SECONDS, GRACE = 15.0, 8.0
MOST_BYTES = 8 * 2**20  #: of a text
STOPPED = "stopped by its time limit"

#: What a part says, and whether that is right.
Verdict = tuple[str, bool]


def is_over(end: float) -> bool:
    """Whether what had to end then, a time.monotonic(), has been interrupted."""
    return time.monotonic() >= end - GRACE


class Run:
    """One run: where it writes, when it ends, and what its parts have said so far."""

    def __init__(self, options: argparse.Namespace, out: Path, parts: Sequence[str]):
        self.options, self.out, self.parts = options, out, parts
        self.on_gpu = options.device == "cuda"
        self.old = Stored.read(options.compare) if options.compare else None  # before its file is overwritten
        self.environment = env_report.collect()
        self.verdicts: dict[str, Verdict] = {}
        self.notes: list[str] = []
        self.written = 0.0

    def start(
        self, arguments: Sequence[str], end: float, log: IO[Any], *, under: Sequence[str] = (), **environment: str
    ) -> "subprocess.Popen[Any]":
        """This Python with `arguments`, under another command perhaps, its output to `log`. It is interrupted, and
        killed with its children at `end`, a time.monotonic()."""
        seconds = max(1.0, end - GRACE - time.monotonic())
        limit = ["timeout", "--signal=INT", f"--kill-after={GRACE}", str(seconds)]
        kept = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
        kept |= {"PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", **environment}
        command = [*limit, *under, sys.executable, *arguments]
        return subprocess.Popen(
            command, cwd=ROOT, env=kept, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )

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

    def text(self, name: str) -> str:
        path = self.out / name
        return path.read_text("utf-8", "replace") if path.exists() else ""

    def summarise(self) -> tuple[str, str, bool]:
        """Write summary.txt; what it begins with, the rest, and whether all is right and nothing slower than before."""
        self.written = time.monotonic()
        stored = Stored.read(self.out / "results.jsonl")
        comparison, slower = compare(self.old, stored) if self.old else ("", False)
        e, right = self.environment, all(right for _, right in self.verdicts.values())
        missing = [part for part in self.parts if part not in self.verdicts or STOPPED in self.verdicts[part][0]]
        head = [
            ("all right" if right else "NOT RIGHT") + (f", but incomplete: {', '.join(missing)}" if missing else ""),
            "",
            goals_table(stored.results),
            "",
            f"fwpkm_kernels {e['fwpkm_kernels']}, commit {e['commit']}, on "
            + (", ".join(gpu["name"] for gpu in e["gpus"]) or e["cpu"]["model"]),
            f"{e['python']}, torch {e['torch']['version']}, triton {e['triton']}, driver {e['driver']}",
            "",
            *(f"{part}: {self.verdicts.get(part, ('not run yet', True))[0]}" for part in self.parts),
            *self.notes,
        ]
        tests = self.text("tests.txt")
        failures = re.findall(r"^(?:FAILED|ERROR) .*$", tests, re.M)
        body = [
            *failures[:30],
            *([f"... and {len(failures) - 30} more in tests.txt"] if len(failures) > 30 else []),
            *re.findall(r"^SKIPPED .*needs .* of a GPU's memory.*$", tests, re.M),
            "",
            str(report(stored.results)),
            *(["", figures_table(stored.figures)] if stored.figures else []),
            *(["", "compared with the stored run:", "", comparison] if self.old else []),
        ]
        begin, rest = "\n".join(head), "\n".join(body)
        write_output(self.out / "summary.txt", f"{begin}\n\n{rest}\n")
        return begin, rest, right and not slower


def smoke(run: Run, end: float) -> Verdict:
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        (status,) = run.wait(run.start([*SMOKE, "--device", run.options.device], end, log))
        log.seek(0)
        said = log.read().splitlines()[-60:]
    if status:
        said.append(STOPPED if is_over(end) else f"exit status {status}")
    return "\n    ".join(["", *said]), status == 0


def rows(run: Run, end: float, whose: str = "own") -> Verdict:
    """benchmarks.run, again and again behind what ended it."""
    results = run.out / "results.jsonl"
    marker, culprits = running(results), []
    marker.unlink(missing_ok=True)
    arguments = [*MEASURE, "--device", run.options.device, "--whose", whose, "--json", str(results), "--resume"]
    arguments += ["--no-table", "--seconds-per-row", "0.3"]
    arguments += ["--case-seconds", str(HANGS)] if run.on_gpu else []
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        while True:
            minutes = max(0.0, end - GRACE - 5 - time.monotonic()) / 60
            (status,) = run.wait(run.start([*arguments, "--minutes", str(minutes)], end, log))
            culprit = marker.read_text("utf-8", "replace") if marker.exists() else ""
            if not culprit or culprit in culprits or is_over(end):
                break
            culprits.append(culprit)
        marker.unlink(missing_ok=True)
        log.seek(0)
        tail = log.read().splitlines()[-15:]
    planned = {(row.name, provider.name) for row, provider in select_cases(run.options.device, whose=whose)}
    found = [r for r in Stored.read(results).results if is_package(r.provider) == (whose == "own")]
    wrong = [f"{r.row} {r.provider} is {r.status}" for r in found if r.status != "ok"] if whose == "own" else []
    count = sum((r.row, r.provider) in planned for r in found)
    words = [f"{count} of {len(planned)} measured", *(f"{name} ended its process" for name in culprits), *wrong]
    is_stopped = is_over(end - 5)
    if count < len(planned):
        words.append(STOPPED if is_stopped else "\n    ".join([f"exit status {status}", *tail]))
    return "; ".join(words), not wrong and (count == len(planned) or is_stopped)


def tests(run: Run, end: float) -> Verdict:
    """The kernels' tests, in several processes, since a GPU waits for the compiler, and the fuzzer beside them."""
    cores = len(os.sched_getaffinity(0))
    parts = max(1, min(8, cores // 2))
    pytest = [*PYTEST, "-v", "--triton-only", "-m", "not slow", "-p", "no:cacheprovider", "-W", "default"]
    pytest += ["--tb=short", "--maxfail=30", "--continue-on-collection-errors", "--maxschedchunk=1", "-o"]
    pytest += [f"faulthandler_timeout={HANGS}", "-o", "faulthandler_exit_on_timeout=true", "-n"]
    fuzz = [*FUZZ, "--device", run.options.device, "--backend", "triton", "--quick", "--seconds"]
    left = end - time.monotonic()
    environment = {"OMP_NUM_THREADS": str(max(1, cores // parts)), "COLUMNS": "200"}
    with tempfile.TemporaryDirectory() as failures, (run.out / "tests.txt").open("ab") as log:
        fuzz += [str(0.7 * left), "--failures", failures]
        beside = [run.start(fuzz, end - 0.2 * left, log, under=["sh", "-c", SEEDS, "sh"], **environment)]
        if run.on_gpu:  # compiles what compute-sanitizer then need not wait for
            beside.append(run.start(SANITIZE, end, log))
        together = run.start([*pytest, str(parts), *KERNEL_TESTS], end - 0.2 * left, log, **environment)
        statuses, is_stopped = run.wait(together, *beside), is_over(end - 0.2 * left)
        statuses += run.wait(run.start([*pytest, "1", "-m", "gpu", *ALONE], end, log, **environment))
    text = run.text("tests.txt")
    lines = re.findall(r"^\[gw\d+\](?: \[ *\d+%\])? ([A-Z]+) ", text, re.M)
    counts = ", ".join(f"{lines.count(word)} {word.lower()}" for word in dict.fromkeys(sorted(lines)))
    fuzzed = re.findall(r"\d+ cases, \d+ failures, seed \d+", text)  # anywhere: pytest begins its lines before a test
    culprits = re.findall(r"crashed while running '(.*)'", text)
    # A case after which the fuzzer said neither another nor how many there were.
    culprits += re.findall(r"(case = .*)\n(?:(?!case = |\d+ cases, )[\s\S])*?the fuzzer ended", text)
    is_stopped = is_stopped or is_over(end)
    failed = "FAILED" in lines or "ERROR" in lines or "the fuzzer ended" in text
    words = [counts or "no test ran", *(f"fuzzer: {line}" for line in fuzzed or ["no case"])]
    words += [f"{name} ended its process" for name in dict.fromkeys(culprits)]
    words += [STOPPED] if is_stopped else [f"exit statuses {statuses}"] if any(statuses) else []
    return "; ".join(words), not failed and (is_stopped or (bool(lines) and not any(statuses)))


#: How a finding begins; and each tool, and what its last line says of the errors that it found.
FINDING = r"^=+ +(?:Invalid|Misaligned|Error: Race)"
SANITIZERS = {
    "memcheck": r"ERROR SUMMARY: (\d+) errors?",
    "racecheck": r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?",
}


def sanitizer(run: Run, end: float) -> Verdict:
    """Both tools over benchmarks.sanitize, whose kernels are compiled by then."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), *sorted(glob.glob("/usr/local/cuda*"))]
    places = [os.path.join(home, place) for home in filter(None, homes) for place in ("bin", "compute-sanitizer")]
    program = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *places]))
    if program is None:
        return "not present", True
    options = ["--target-processes", "application-only", "--report-api-errors", "no", "--print-limit", "20"]
    words, right = [], True
    with (run.out / "sanitizer.txt").open("a+", encoding="utf-8", errors="replace") as log:
        if "tests" not in run.parts:
            run.wait(run.start(SANITIZE, end, log))
        for tool, summary in SANITIZERS.items():
            begin, limit = log.seek(0, os.SEEK_END), end
            if tool == "memcheck":
                limit = time.monotonic() + 0.5 * (end - time.monotonic())
            under = [program, "--tool", tool, *options]
            # Only then is an access just behind a tensor one outside of what CUDA has allocated.
            (status,) = run.wait(run.start(SANITIZE, limit, log, under=under, PYTORCH_NO_CUDA_MEMORY_CACHING="1"))
            log.seek(begin)
            text = log.read()
            found = re.findall(summary, text)
            errors = int(found[-1]) if found else len(re.findall(FINDING, text, re.M))
            last = ([line for line in text.splitlines() if line.strip("= ")] or ["it said nothing"])[-1]
            how = "" if found and not status else STOPPED if is_over(limit) else f"status {status}: {last}"
            words.append(f"{tool} {errors} errors" + (f" ({how})" if how else ""))
            right = right and errors == 0 and not (found and status)  # one that does not run here has found nothing
    return "; ".join(words), right


def providers(run: Run, end: float) -> Verdict:
    return rows(run, end, "other")


#: The parts in the order of their worth, and the share of the whole time that is over when each ends at the latest.
PARTS: dict[str, tuple[Callable[[Run, float], Verdict], float]] = {
    "smoke": (smoke, 0.2),
    "rows": (rows, 0.55),
    "tests": (tests, 0.8),
    "sanitizer": (sanitizer, 0.88),
    "providers": (providers, 0.94),
}


def shorten(path: Path) -> None:
    """Leave out the middle of a text that is too long."""
    if path.exists() and path.stat().st_size > MOST_BYTES:
        content = path.read_bytes()
        path.write_bytes(content[: MOST_BYTES // 2] + b"\n...\n" + content[-MOST_BYTES // 2 :])


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
    write_output(out / "environment.json", json.dumps(run.environment, indent=2) + "\n")
    run.summarise()
    for part in run.parts:
        function, share = PARTS[part]
        end = begin + 60 * options.minutes * (share if options.only is None else max(end for _, end in PARTS.values()))
        print(f"{part}, for at most {end - time.monotonic():.0f} s: ", end="", flush=True)
        run.verdicts[part] = _, right = function(run, end)
        print("right" if right else "NOT RIGHT", flush=True)
        shorten(out / "tests.txt")
        shorten(out / "sanitizer.txt")
        run.summarise()
        if part == "smoke" and not right:
            break
    try:
        plot(Stored.read(out / "results.jsonl").results, out, plots)
    except (ImportError, CommandError) as error:
        run.notes.append(f"no plots: {error}")
    head, body, right = run.summarise()
    print(f"\n{body}\n\n{head}", flush=True)  # turned round: of much output only the end may be shown
    return int(not right)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
