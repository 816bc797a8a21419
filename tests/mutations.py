"""The mutation check: small faults are planted one at a time in a copy of the package, and the tests must catch each.

    python -m tests.mutations [--only NAME ...] [--list] [--write] [--jobs N]

For each fault the tests that should notice it run first; if none fails, the whole of `make test` does. A fault that
survives, or whose text is gone, makes the exit status 1. `--write` writes tests/MUTATIONS.md, with `--only` the rows of
these faults alone.

What counts is a test that fails, or the end of Python itself, as a kernel that writes past its tensors brings about in
the interpreter. An error in collecting tests, as by a copy that cannot be imported, does not; and the tests that caught
something run once more at the end, all of them, on a copy without a fault, and must pass.
"""

import argparse
import concurrent.futures
import os
import platform
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from fwpkm_kernels._commands import check_outputs, command, need, write_output
from tests.faults import FAULTS, ON_GPUS_ONLY, Fault

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests" / "MUTATIONS.md"
#: Tests that fail for changes of the code that are right, too.
IGNORED = ("tests/test_mutations.py", "tests/test_compiled.py")
#: Seconds. A fault may make a loop endless: that is noticed too.
FEW_LIMIT, ALL_LIMIT = 900, 7200


class Result(NamedTuple):
    """What became of a fault."""

    caught_by: str  #: the test that failed first; "" if none did
    seconds: float
    trouble: str = ""  #: why there is no answer


#: What `run_pytest` gives in place of an exit status.
TIMED_OUT = -1000

#: Beside the tests of a copy: that a property fails is enough, the smallest example that it fails for is not needed.
CONFTEST = """
from hypothesis import Phase, settings

def pytest_configure(config):
    settings.register_profile("mutations", settings(), phases=[Phase.explicit, Phase.generate])
    settings.load_profile("mutations")
"""


def plant(fault: Fault, root: Path = ROOT) -> str:
    """The text of the file with the fault in it.

    Raises:
        ValueError: where the text that is to be replaced does not occur exactly once.
    """
    text = (root / "fwpkm_kernels" / fault.file).read_text("utf-8")
    count = text.count(fault.before)
    if count != 1:
        raise ValueError(
            f"its text occurs {count} times in fwpkm_kernels/{fault.file} and must occur once; "
            f"plant the same fault in the code as it is now: {fault.before!r}"
        )
    return text.replace(fault.before, fault.after)


def project_files() -> list[str]:
    """The files that git knows; in an unpacked sdist, which has no git, those that were packed."""
    if not (ROOT / ".git").exists():
        return (ROOT / "fwpkm_kernels.egg-info" / "SOURCES.txt").read_text("utf-8").splitlines()
    command = ["git", "ls-files", "-z"]
    names = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout.decode("utf-8")
    return [name for name in names.split("\0") if name]


def copy_checkout(to: Path) -> None:
    """The files of the project, as they are now."""
    for name in project_files():
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)
    (to / "conftest.py").write_text(CONFTEST)


def run_pytest(root: Path, arguments: list[str], limit: float) -> tuple[int, str]:
    """The exit status and the output of a run, in the checkout at `root`, that stops at the first failure."""
    # No bytecode, whose age goes by whole seconds; a fixed seed, so that a fault is caught by the same test each time.
    environment = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "400"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
    command += arguments
    try:
        done = subprocess.run(
            command, cwd=root, env=os.environ | environment, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return TIMED_OUT, ""
    return done.returncode, done.stdout + done.stderr


def first_failure(status: int, output: str) -> str:
    """Which test failed first, "" if all passed.

    Raises:
        RuntimeError: if the tests did not run.
    """
    if status == TIMED_OUT:
        return "(the tests did not end)"
    if status < 0:
        return f"(Python died of signal {-status})"
    if status == 0:
        return ""
    failed = re.search(r"^(?:FAILED|ERROR) (\S+\.py::\w+(?:\[.*?\])?)(?: - .*)?$", output, re.M)
    if status != 1 or failed is None:
        raise RuntimeError(f"pytest ended with status {status}: {output[-1500:]}")
    return failed[1]


def check(fault: Fault, root: Path) -> Result:
    """Plant a fault in the copy at `root`, run the tests there, and take it out again."""
    begin = time.monotonic()
    path = root / "fwpkm_kernels" / fault.file
    original = path.read_text("utf-8")
    files = [f"tests/test_{name}.py" for name in fault.tests.split()]
    # Kernels do not run in cases of the other backend, and PyTorch's cases are the faster ones for all else, but for
    # code that serves kernels alone, whose tests are selected by that name.
    of_kernels = fault.file.startswith("kernels/") or "triton" in fault.select
    select = f"not {'[torch' if of_kernels else '[triton'}"
    select += f" and ({fault.select})" if fault.select else ""
    few = ["-m", "not slow", *files, "-k", select]
    everything = ["-m", "not slow", *(f"--ignore={name}" for name in IGNORED), "tests"]
    caught_by = trouble = ""
    try:
        path.write_text(plant(fault, root), "utf-8")
        caught_by = first_failure(*run_pytest(root, few, FEW_LIMIT))
        if not caught_by:
            caught_by = first_failure(*run_pytest(root, everything, ALL_LIMIT))
    except (ValueError, RuntimeError) as error:
        trouble = str(error)
    finally:
        path.write_text(original, "utf-8")
    return Result(caught_by, time.monotonic() - begin, trouble)


def check_all(faults: list[Fault], jobs: int) -> dict[str, Result]:
    """What became of each fault; several at a time, every job in a copy of its own.

    Raises:
        RuntimeError: if a test that caught something fails without a fault too.
    """
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory(prefix="fwpkm-mutations-") as folder:
        copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(jobs):
            copy_checkout(Path(folder) / str(number))
            copies.put(Path(folder) / str(number))

        def work(fault: Fault) -> tuple[Fault, Result]:
            root = copies.get()
            try:
                return fault, check(fault, root)
            finally:
                copies.put(root)

        with (
            concurrent.futures.ThreadPoolExecutor(jobs) as pool,
            tqdm(total=len(faults), unit="fault", dynamic_ncols=True) as bar,
        ):
            for done in concurrent.futures.as_completed([pool.submit(work, fault) for fault in faults]):
                fault, result = done.result()
                results[fault.name] = result
                bar.update()
                bar.set_postfix_str(f"{sum(bool(x.caught_by) for x in results.values())} caught")
                said = f"caught by {result.caught_by}" if result.caught_by else result.trouble or "SURVIVED"
                bar.write(f"{fault.name}: {said}")
        control = sorted({x.caught_by for x in results.values() if "::" in x.caught_by})
        if control:
            failed = first_failure(*run_pytest(copies.get(), control, ALL_LIMIT))
            if failed:
                raise RuntimeError(f"{failed} fails without a fault too")
    return results


def _code(text: str) -> str:
    """Code in a cell of a table, on one line."""
    text = text.strip("\n").replace("\n", " ⏎ ").replace("|", "\\|")
    return f"`{text.strip()}`" if text.strip() else "nothing"


def described(fault: Fault) -> str:
    """The cells of a fault's row that are known before it is planted."""
    breaks = fault.breaks.replace("|", "\\|")
    return f"{fault.name} | {fault.file} | {_code(fault.before)} → {_code(fault.after)} | {breaks}"


def rows_of_table() -> dict[str, str]:
    """The rows of the committed table, by the name of the fault."""
    lines = TABLE.read_text("utf-8").splitlines() if TABLE.exists() else []
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines if line.endswith(" s |")}


def table(rows: dict[str, str]) -> str:
    """The text of tests/MUTATIONS.md."""
    # Triton has other names as a distribution, as that for AMD.
    versions = f"torch {metadata.version('torch')}, triton {need('triton', 'triton').__version__}"
    text = f"""# Faults that were planted, and the tests that caught them

Written by `python -m tests.mutations --write` (`make mutations ARGS=--write`). One fault at a time is planted in a copy
of the package, and the tests must fail. First those run that should notice it, and only where none does all of
`make test`. Tests of the code's text and of the compiler ({", ".join(IGNORED)})
do not count, and every test named here passes without a fault.

{len(FAULTS)} faults; Python {platform.python_version()}, {versions}.
Kernels run in Triton's interpreter on a CPU. Seconds are those of one process until the first failure.

| fault | file | planted | what it breaks | caught by | seconds |
| --- | --- | --- | --- | --- | --- |
"""
    text += "".join(f"{rows[fault.name]}\n" for fault in FAULTS if fault.name in rows)
    text += """
## What only a GPU can show

Not planted: the interpreter runs the programs of a launch one after the other, and knows neither streams nor devices.

| file | fault | what shows it |
| --- | --- | --- |
"""
    return text + "".join(f"| {fault.file} | {fault.change} | {fault.shown_by} |\n" for fault in ON_GPUS_ONLY)


@command("mutations")
def main(arguments: list[str] | None = None) -> int:
    """Run the check; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[fault.name for fault in FAULTS])
    parser.add_argument("--list", action="store_true", help="print the faults and plant none")
    parser.add_argument("--write", action="store_true", help=f"write {os.path.relpath(TABLE, ROOT)}")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="how many at a time (default: 2)")
    options = parser.parse_args(arguments)
    faults = [fault for fault in FAULTS if not options.only or fault.name in options.only]
    if options.list:
        for fault in faults:
            print(f"{fault.name}  ({fault.file}): {fault.breaks}")
        return 0
    if options.write:
        check_outputs(TABLE)
        need("triton", "triton")  # which the table names
    try:
        results = check_all(faults, options.jobs)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    rows = rows_of_table() if options.only else {}
    for fault in faults:
        result = results[fault.name]
        caught_by = f"`{result.caught_by}`".replace("|", "\\|") if result.caught_by else "**nothing**"
        rows[fault.name] = f"| {described(fault)} | {caught_by} | {result.seconds:.0f} s |"
    if options.write:
        write_output(TABLE, table(rows))
    lost = [fault for fault in faults if not results[fault.name].caught_by]
    for fault in lost:
        print(f"{fault.name}: {results[fault.name].trouble or 'no test noticed it'}", file=sys.stderr)
    print(f"{len(faults) - len(lost)} of {len(faults)} faults were caught")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
