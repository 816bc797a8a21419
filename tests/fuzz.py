"""The fuzzer: `python -m tests.fuzz` runs drawn cases of every operation through the package and the reference.

`tests.strategies` draws the cases and `tests.judge` judges them. A failure is shrunk, printed as a few lines of Python
that reproduce it, and stored in `fuzz-failures/`, as are hypothesis's examples of it, which the next run tries first;
the other operations go on. The same `--seed` draws the same cases, as many as `--cases` says or `--seconds` allow. Exit
status: 0, 1 if anything failed, 130 if interrupted.
"""

import argparse
import collections
import faulthandler
import hashlib
import os
import sys
import textwrap
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.database import DirectoryBasedExampleDatabase

from benchmarks.results import plain_table
from fwpkm_kernels._commands import CommandError, command, make_folder, write_output
from tests import judge, strategies
from tests.strategies import Case

try:
    from tqdm import tqdm
except ImportError:  # a machine with a GPU may lack it: then there is no bar
    tqdm = None

FAILURES = Path("fuzz-failures")
#: Cases of an operation before it is another one's turn; and where kernels have to be compiled for most of them.
ROUND, QUICK_ROUND = 50, 3
#: Seconds after which a case of a quick run hangs.
HANGS = 60.0
#: Seconds that a failure is shrunk for at most.
SHRINKING = 60.0


class _EnoughError(BaseException):
    """Ends a round: time is up. Not an Exception, which hypothesis would take for a failure."""


class Fuzzer:
    """What a run has seen so far."""

    def __init__(
        self, backend: str, device: str, failures: Path, seconds: float, most_cases: int | None, quick: bool = False
    ) -> None:
        self.backend, self.device, self.failures, self.quick = backend, device, failures, quick
        self.end = time.monotonic() + seconds
        self.most_cases = most_cases
        self.cases = 0
        self.by_op: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.seconds: collections.Counter[str] = collections.Counter()
        self.covered: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.reproductions: list[str] = []
        self.bar = None if tqdm is None else tqdm(total=most_cases, unit=" cases", disable=None, dynamic_ncols=True)

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self.end or (self.most_cases is not None and self.cases >= self.most_cases)

    def round(self, op: str, seed: int) -> bool:
        """Some cases of an operation; whether one failed, in which case it has been shrunk and reported."""
        drawn = strategies.cases(op, small=self.backend == "triton" and self.device == "cpu")
        worst: list[tuple[Case, BaseException]] = []
        shrink_until = 0.0

        @settings(
            max_examples=QUICK_ROUND if self.quick else ROUND,
            deadline=None,
            derandomize=False,
            database=DirectoryBasedExampleDatabase(self.failures / "examples" / f"{op}-{self.backend}-{self.device}"),
            phases=(Phase.reuse, Phase.generate, *(() if self.quick else (Phase.shrink,))),
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
            print_blob=False,
        )
        @hypothesis.seed(seed)  # below the settings: above them it would take the database away
        @given(drawn.map(strategies.of_few_sizes) if self.quick else drawn)
        def run(case: Case) -> None:
            nonlocal shrink_until
            if worst and time.monotonic() > shrink_until:
                raise _EnoughError
            if not worst and self.is_over:
                raise _EnoughError
            if self.quick:  # the last line of a process that hangs, which is ended, or dies
                print(f"case = {case!r}", flush=True)
                faulthandler.dump_traceback_later(HANGS, exit=True)
            begin = time.monotonic()
            try:
                reasons = judge.check(case, self.backend, self.device)
                if self.quick and self.device == "cuda":
                    torch.cuda.synchronize()  # raises what a kernel that still ran has done
            except Exception as error:
                shrink_until = shrink_until or time.monotonic() + SHRINKING
                worst[:] = [(case, error)]
                if self.quick and self.device == "cuda":
                    self.end_without_gpu(case, error)
                raise
            finally:
                faulthandler.cancel_dump_traceback_later()
                self.seconds[op] += time.monotonic() - begin
            if not worst:
                self.count(case, reasons)

        if self.bar is not None:
            self.bar.set_description(op)
        try:
            run()
        except Exception:
            if not worst:  # an error of the strategies, not of a case
                raise
        except _EnoughError:
            pass
        if worst:
            self.by_op[op]["failures"] += 1
            self.report(*worst[-1])
        return bool(worst)

    def end_without_gpu(self, case: Case, error: Exception) -> None:
        """End the process if the error took the GPU with it, which every later case would be blamed for."""
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # raises after a failed capture
        except Exception:
            self.report(case, error)
            sys.stdout.flush()
            os._exit(1)

    def count(self, case: Case, reasons: judge.Reasons) -> None:
        self.cases += 1
        if self.bar is not None:
            self.bar.update()
        self.by_op[case.op].update(["cases", *reasons], **{"in part": bool(reasons)})
        covered = {
            "dtypes": set(case.dtypes.values()),
            "layouts": set(case.layouts.values()) or {"all contiguous"},
            "numbers": set(case.fills.values()) or {"normal"},
            "pattern": {case.pattern},
            "tensors": {
                name for name in case.dtypes if name in ("gates", "mask", "scale", "count_slots", "row_values")
            },
            "sizes": {f"{name} = {value}" for name, value in case.sizes.items() if value < 2},
            "actions": {str(x) if isinstance(x, str) else "step" for x in case.actions},
            "segments": {str(len(case.segments))} if case.op == "fast_weight_memory_varlen" else set(),
            "options": {
                f"{name}={value}" for name, value in case.options.items() if name not in ("top_k", "chunk_size")
            },
        }
        if "n" in case.sizes and case.options["top_k"] in (1, case.sizes["n"]):
            covered["sizes"].add("K = 1" if case.options["top_k"] == 1 else "K = n")
        for what, kinds in covered.items():
            self.covered[what].update(kinds)

    def report(self, case: Case, error: BaseException) -> None:
        text = reproduction(case, error, self.backend, self.device)
        path = (
            self.failures / f"{case.op}-{hashlib.sha256(text.encode('utf-8', 'backslashreplace')).hexdigest()[:8]}.py"
        )
        self.reproductions.append(text)
        try:
            self.failures.mkdir(parents=True, exist_ok=True)
            write_output(path, text)
            stored = f"stored as {path}; run it with PYTHONPATH=. from the repository root"
        except (CommandError, OSError) as error:  # by now it is printed at least
            stored = f"not stored: {error}"
        say = print if self.bar is None else self.bar.write
        say(f"\n{text}\n{stored}\n")

    def summary(self) -> str:
        """By operation, and by what was covered: how many cases."""
        reasons = ("overflow", "near ties", "unstable", "nothing left")
        total: collections.Counter[str] = sum(self.by_op.values(), collections.Counter())
        lines = []
        for op, counts in [*self.by_op.items(), ("all", total)]:
            seconds = self.seconds[op] if op != "all" else self.seconds.total()
            rate = counts["cases"] / seconds if seconds else 0.0
            shown = [counts[name] for name in ("in part", *reasons, "failures")]
            lines.append([op, str(counts["cases"]), f"{seconds:.1f}", f"{rate:.1f}", *map(str, shown)])
        header = ["operation", "cases", "seconds", "cases/s", "in part", *reasons, "failures"]
        covered = [
            f"{what}: " + ", ".join(f"{kind} {number}" for kind, number in sorted(counts.items()))
            for what, counts in self.covered.items()
            if counts
        ]
        return "\n".join(
            [
                f"backend {self.backend} on {self.device}",
                plain_table(header, lines),
                "",
                "how many cases had",
                *(textwrap.fill(line, 120, subsequent_indent="    ") for line in covered),
                "",
            ]
        )


def reproduction(case: Case, error: BaseException, backend: str, device: str) -> str:
    """A script that runs the case alone."""
    what = str(error).strip().splitlines()
    setting = 'os.environ["TRITON_INTERPRET"] = "1"' if device == "cpu" else 'os.environ.pop("TRITON_INTERPRET", None)'
    lines = [
        *(f"# {line}" for line in (f"{type(error).__name__}: {what[0] if what else ''}", *what[1:])),
        *(["import os", "", setting, ""] if backend == "triton" else []),
        "from tests.judge import check",
        "from tests.strategies import Case",
        "",
        f"case = {case!r}",
        f"check(case, backend={backend!r}, device={device!r})",
    ]
    return "\n".join(lines) + "\n"


@command("fuzz")
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--op", choices=strategies.OPERATIONS, help="one operation; default: all in turns")
    parser.add_argument("--seconds", type=float, help="stop after so long; default: 60, or no limit beside --cases")
    parser.add_argument("--cases", type=int, help="stop after so many cases")
    parser.add_argument("--seed", type=int, default=0, help="draws the same cases again")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--backend", choices=["torch", "triton"], help="default: torch on a CPU, else triton")
    parser.add_argument(
        "--quick", action="store_true", help="few sizes, the memory first, nothing shrunk: where kernels are compiled"
    )
    parser.add_argument("--failures", type=Path, default=FAILURES, help="the folder of what failed")
    o = parser.parse_args(arguments)
    backend = o.backend or ("torch" if o.device == "cpu" else "triton")
    # Triton reads it when it is first imported, which is when a kernel is first needed.
    if backend == "triton" and o.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    elif o.device == "cuda":
        os.environ.pop("TRITON_INTERPRET", None)
        if not torch.cuda.is_available():
            parser.error("--device cuda: no GPU is available")
    make_folder(o.failures)
    seconds = o.seconds if o.seconds is not None else (60.0 if o.cases is None else float("inf"))
    fuzzer = Fuzzer(backend, o.device, o.failures, seconds, o.cases, o.quick)
    ops = [o.op] if o.op else list(strategies.OPERATIONS)
    if o.quick:
        ops.sort(key=lambda op: not op.startswith("fast_weight_memory"))
    status = 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # operations without a deterministic form, where memory is poisoned
            turn = 0
            while ops and not fuzzer.is_over:
                for op in list(ops):
                    if fuzzer.round(op, seed=o.seed * 1_000_003 + turn):
                        ops.remove(op)
                    turn += 1
    except KeyboardInterrupt:
        status = 130
    if fuzzer.bar is not None:
        fuzzer.bar.close()
    print(fuzzer.summary())
    print(f"{fuzzer.cases} cases, {len(fuzzer.reproductions)} failures, seed {o.seed}")
    return 1 if fuzzer.reproductions else status


if __name__ == "__main__":
    sys.exit(main())
