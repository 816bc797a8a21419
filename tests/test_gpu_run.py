"""The run on a GPU, where there is none: faults that are planted cost what caused them, and the rest is measured."""

import contextlib
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, logs, run, sanitize, smoke
from benchmarks.goals import goals_table
from benchmarks.measure import NO_GRAPH
from benchmarks.providers import GRAPHED
from benchmarks.results import read_results
from tests import conftest
from tests.conftest import HAS_GPU, PLACES
from tests.helpers.results import gpu_rows, slower_by, some_result


@pytest.fixture
def gpu_run(monkeypatch, tmp_path, capsys):
    """Run some parts, whose commands do nothing but for those given; exit status, summary and what was printed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "plot", lambda *args: [])
    for name in ("GRACE", "TESTS_GRACE", "TOOLS_GRACE"):
        monkeypatch.setattr(gpu, name, 1.0)
    for name in ("SMOKE", "MEASURE", "PYTEST", "FUZZ", "SANITIZE"):
        monkeypatch.setattr(gpu, name, ["-c", "pass"])

    def call(*arguments: str, minutes: float = 1.0, **commands: object) -> tuple[int, str, str]:
        for name, command in commands.items():
            monkeypatch.setattr(gpu, name, command)
        status = gpu.main(["--out", str(tmp_path / "out"), "--minutes", str(minutes), *arguments])
        return status, (tmp_path / "out" / "summary.txt").read_text("utf-8"), capsys.readouterr().out

    return call


#: Measures rows on a GPU that is made up; some do to their process what GPUs do.
FAULTY = """
import os, signal, sys, time, torch
from benchmarks import run
from benchmarks.measure import NO_GRAPH, Machine, no_result
machine, lost = Machine("cuda", "made up", bandwidth_gb_s=1e3, matmul_tflop_s=100.0, commit=None, versions={}), []

def measure(row, provider, *args, **options):
    fields = {"status": "ok", "median_us": 1.0, "ratio": 1.0}
    if row.name in ("gather/forward/training", "gather/forward/training-n4096") and options["graphs"]:
        fields["message"] = NO_GRAPH
    if row.name == "gather/backward/training":
        lost.append(row)
        fields = {"status": "error"}
    if row.name == "gather/forward/training-bf16":
        time.sleep(60)
    if row.name == "gather/backward/training-bf16":
        os.kill(os.getpid(), signal.SIGKILL)
    return no_result(row, provider, machine, **fields)

def synchronize():
    if lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

torch.cuda.is_available = lambda: True
torch.cuda.synchronize, torch.cuda.empty_cache = synchronize, lambda: None
run.measure_machine, run.measure, run.release = lambda device: machine, measure, lambda machine: None
sys.exit(run.main([*sys.argv[1:], "--op", "gather/"]))
"""


@pytest.mark.slow
def test_rows_go_on_behind_what_ends_their_process(gpu_run, monkeypatch, tmp_path):
    """A failed capture, after which no other is tried, a lost GPU, a hang and a killed process."""
    monkeypatch.setattr(gpu, "CAPTURES", 1)
    monkeypatch.setattr(gpu, "HANGS", 2)
    monkeypatch.setattr(gpu, "select_cases", lambda device, whose: run.select_cases(device, "gather/", whose))
    status, summary, _ = gpu_run("--only", "rows", MEASURE=["-c", FAULTY], minutes=3)
    assert status == 1
    count = len(run.select_cases("cuda", "gather/", "own"))
    assert f"\nrows: {count} of {count} measured; " in summary
    ended = ["gather/forward/training", "gather/backward/training"]
    ended += ["gather/forward/training-bf16", "gather/backward/training-bf16"]
    for name in ended:
        assert f"{name} fwpkm_kernels ended its process" in summary
        assert (f"{name} fwpkm_kernels is error" in summary) == (name != "gather/forward/training")
    assert f"\nown rows: after {ended[0]} fwpkm_kernels no CUDA graphs, since 1 captures have failed\n" in summary
    statuses = re.findall(r"ended its process \(status (-?\d+)\)", summary)
    assert statuses == ["1", "1", "1", "-9"]
    text = (tmp_path / "out" / "tests.txt").read_text("utf-8")
    assert text.count(" ended its process with status ") == len(ended)
    assert re.search(r"Timeout.*\n(?:.*\n)+? .*in measure$", text, re.M)
    assert summary.count(" is error") == len(ended) - 1


#: A torch with a GPU that one of the tests loses, and one spoils by a capture.
TORCH = """
class cuda:
    lost = captured = False
    is_available = is_initialized = lambda: True

    def synchronize():
        if cuda.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def empty_cache():
        if cuda.captured:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")
"""
TESTS = """
import os, pytest, signal, time
from torch import cuda

def test_right_0(): pass
def test_capture(): cuda.captured = True
def test_right_1(): pass
def test_sticky(): cuda.lost = True
def test_right_2(): pass
def test_hang(): time.sleep(60)
def test_right_3(): pass
def test_killed(): os.kill(os.getpid(), signal.SIGKILL)
def test_right_4(): pass
def test_wrong(): assert 1 == 2
@pytest.mark.gpu
def test_alone(): pass
"""


@pytest.mark.slow
def test_tests_go_on_behind_what_ends_their_process(gpu_run, monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text(TORCH)
    (tmp_path / "conftest.py").write_text("from tests.conftest import *")
    (tmp_path / "test_faulty.py").write_text(TESTS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu, "HANGS", 2)
    fuzz = "import os, sys; seed = int(sys.argv[-1]); print(f'case = {seed}a', flush=True)\n"
    fuzz += "if seed == 0: print('case = 0b\\nTimeout', flush=True); os._exit(1)\n"
    fuzz += "print(f'7 cases, {seed % 2} failures, seed {seed}'); sys.exit(seed % 2)"
    files = {name: [str(tmp_path / "test_faulty.py")] for name in ("KERNEL_TESTS", "ALONE")}
    status, summary, _ = gpu_run("--only", "tests", PYTEST=["-m", "pytest"], FUZZ=["-c", fuzz], **files)
    text = (tmp_path / "out" / "tests.txt").read_text("utf-8")
    assert status == 1
    # What shows after a test has passed counts as both.
    assert "\ntests: 5 failed, 9 passed; fuzzer: 7 cases, 1 failures, seed 1; fuzzer: 7 cases, 0 failures" in summary, (
        text
    )
    for name in ("capture", "sticky", "hang", "killed"):
        assert f"test_faulty.py::test_{name} ended its process; " in summary
    assert "; case = 0b ended its process; " in summary
    assert "case = 0a ended" not in summary
    assert text.count("the GPU no longer answers: CUDA error: an illegal memory access") == 1
    assert re.search(r"Timeout.*\n(?:.*\n)+? .*in test_hang$", text, re.M)


def test_the_tests_of_a_gpu_run_are_there():
    assert [name for name in (*gpu.KERNEL_TESTS, *gpu.ALONE) if not (gpu.ROOT / name).is_file()] == []


def test_cases_of_the_pytorch_path_are_left_out():
    given = [{}, {"place": PLACES[0], "size": 3}, {"size": 3, "place": PLACES[1]}, {"x": torch.ones(2)}]
    items = [SimpleNamespace(callspec=SimpleNamespace(params=params)) for params in given] + [SimpleNamespace()]
    for chosen, left_out in ((False, []), (True, [items[1]])):
        seen, kept = [], items.copy()
        hook = SimpleNamespace(pytest_deselected=lambda items, seen=seen: seen.extend(items))
        config = SimpleNamespace(getoption=lambda name, chosen=chosen: chosen and name == "--triton-only", hook=hook)
        conftest.pytest_collection_modifyitems(config, kept)
        assert seen == left_out
        assert kept == [item for item in items if item not in left_out]


def test_a_failing_smoke_ends_the_run(gpu_run, tmp_path):
    wrong = ["-c", "raise AssertionError('keys: 70.0% of 992 rows are off by more than 0.005')"]
    status, summary, printed = gpu_run(SMOKE=wrong, MEASURE=["-c", f"open({str(tmp_path / 'measured')!r}, 'w')"])
    assert status == 1
    for text in (summary, printed):
        assert "Traceback" in text
        assert "AssertionError: keys: 70.0% of 992 rows" in text
    assert "\nrows: not run yet\n" in summary
    assert not (tmp_path / "measured").exists()


def test_a_run_that_is_killed_leaves_what_it_had(gpu_run, monkeypatch, tmp_path):
    """The summary is there before the first part, says after each what it found, and is renewed in the midst of one."""
    line = run.to_json(some_result()) + "\n"
    look = f"""
import pathlib, time
out = pathlib.Path({str(tmp_path / "out")!r})
assert "smoke: not run yet" in (out / "summary.txt").read_text("utf-8")
(out / "results.jsonl").write_text({line!r}, "utf-8")
begin = time.monotonic()
while "gather/forward/inference" not in (out / "summary.txt").read_text("utf-8"):
    assert time.monotonic() < begin + 10
"""
    monkeypatch.setattr(gpu, "SUMMARY_SECONDS", 0.1)
    monkeypatch.setattr(gpu, "select_cases", lambda *args, **options: [])
    _, summary, _ = gpu_run("--only", "smoke", SMOKE=["-c", look])
    assert "Traceback" not in summary
    see = f"print(open({str(tmp_path / 'out' / 'summary.txt')!r}, encoding='utf-8').read()); raise SystemExit(1)"
    gpu_run(SMOKE=["-c", "print('right')"], SANITIZE=["-c", see])
    assert "smoke: \n    right\nrows: 0 of 0 measured\n" in (tmp_path / "out" / "tests.txt").read_text("utf-8")


def test_what_hangs_is_ended_with_its_time(gpu_run):
    begin = time.monotonic()
    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    status, summary, _ = gpu_run("--only", "rows", MEASURE=["-c", stubborn], minutes=0.02)
    assert time.monotonic() - begin < 20
    assert status == 0
    assert summary.startswith("all right, but incomplete: rows\n")
    assert re.search(r"^rows: 0 of \d+ measured; stopped by its time limit$", summary, re.M)


@pytest.mark.parametrize(
    "part, command", [("rows", "MEASURE"), ("tests", "PYTEST"), ("tests", "FUZZ"), ("providers", "MEASURE")]
)
def test_a_part_that_cannot_run_is_not_right(part, command, gpu_run):
    status, summary, _ = gpu_run("--only", part, **{command: ["-c", "import nothing_of_this_name"]})
    assert status == 1
    assert summary.startswith("NOT RIGHT")
    assert re.search(f"^{part}: .*exit status", summary, re.M)


#: Ends as the fuzzer does where it is interrupted.
SLEEPING = """
import sys, time
try:
    print("case = 1", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize(
    "pytest_does, sanitize_does, words, shell",
    [
        ("print('[gw0] PASSED test_a.py::test_b ')", "pass", "", "dash"),
        ("print('[gw0] PASSED test_a.py::test_b ')", "pass", "", "bash"),
        ("raise SystemExit(4)", "pass", "pytest: exit status 4; pytest alone: exit status 4", "dash"),
        ("pass", "pass", "no test ran", "bash"),
        ("print('[gw0] PASSED test_a.py::test_b ')", "raise SystemExit(3)", "sanitize: exit status 3", "dash"),
    ],
)
def test_a_fuzzer_at_its_limit_hides_nothing(pytest_does, sanitize_does, words, shell, gpu_run, monkeypatch, tmp_path):
    """It ends what runs beside it no sooner, and is itself no failure, whatever shell runs it."""
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    (tmp_path / "sh").symlink_to(shutil.which(shell))
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    commands = {"PYTEST": ["-c", pytest_does], "SANITIZE": ["-c", sanitize_does], "FUZZ": ["-c", SLEEPING]}
    status, summary, _ = gpu_run("--only", "tests", minutes=0.08, **commands)
    text = (tmp_path / "out" / "tests.txt").read_text("utf-8")
    assert text.count("case = ") == 1
    assert "the fuzzer ended" not in text
    assert "fuzzer: exit status 124" in summary
    assert words in summary
    assert (status, summary.startswith("all right, but incomplete: tests")) == ((1, False) if words else (0, True))


def test_failed_tests_have_names_where_pytest_was_killed():
    text = "[gw0] [  5%] FAILED a.py::test_a[x y] \n[gw1] [ 10%] ERROR a.py::test_b \n[gw1] PASSED a.py::test_c \n"
    assert logs.failures(text) == ["FAILED a.py::test_a[x y]", "ERROR a.py::test_b"]
    text += "FAILED a.py::test_a[x y] - assert 1 == 2\n"
    assert logs.failures(text) == ["FAILED a.py::test_a[x y] - assert 1 == 2", "ERROR a.py::test_b"]


@pytest.mark.parametrize("part, kept", [("rows", "pytorch"), ("providers", "fwpkm_kernels"), ("smoke", None)])
def test_a_part_alone_measures_all_of_its_rows_again(part, kept, gpu_run, tmp_path):
    results = [some_result(provider=name) for name in ("pytorch", "fwpkm_kernels")]
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "results.jsonl"
    path.write_text("".join(run.to_json(x) + "\n" for x in results), "utf-8")
    gpu_run("--only", part)
    assert read_results(path) == [x for x in results if kept in (None, x.provider)]


#: A kernel of the second case loses the GPU, which is seen then or when it is asked for.
LOSING = """
import sys, torch
from tests import fuzz, judge
cases = []

def ask():
    if len(cases) > 1:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

def check(case, *place):
    cases.append(case)
    if "{when}" == "at once":
        ask()
    return set()

torch.cuda.is_available = lambda: True
torch.cuda.synchronize, torch.cuda.empty_cache, judge.check = ask, lambda: None, check
sys.exit(fuzz.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("when", ["at once", "later"])
def test_the_case_that_loses_the_gpu_ends_the_fuzzer(when, tmp_path):
    arguments = ["--quick", "--device", "cuda", "--cases", "9", "--failures", str(tmp_path)]
    command = [sys.executable, "-c", LOSING.replace("{when}", when), *arguments]
    done = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1, done.stderr
    first, second, reproduced = re.findall("^case = .*$", done.stdout, re.M)
    assert first != second == reproduced
    assert len(list(tmp_path.glob("*.py"))) == 1
    assert "# RuntimeError: CUDA error: an illegal memory access" in done.stdout


def test_goals_say_where_there_is_no_graph():
    """A goal that only a graph could reach is not missed; that of inference is one of graphs."""
    name, step = "gather/forward/training", "step/forward/inference"
    results = [
        dataclasses.replace(r, graph_us=None, message=f"{NO_GRAPH}: out of memory\nand more") if r.row == name else r
        for r in gpu_rows(inference=20.0)
        if not r.row.startswith("prefill/")
    ]
    results = [dataclasses.replace(r, graph_us=None) if r.row == step else r for r in results]
    text = goals_table(results)
    assert re.search(r"^gather: share of a copy's bandwidth +≥ 90 % +50 +- +1.80 +no graph$", text, re.M)
    assert re.search(r"^inference, one chunk of 512 +≤ 25 µs +20 +- +- +no graph$", text, re.M)
    assert f"{name} in a graph ({NO_GRAPH}: out of memory)" in text
    assert f"{step} fwpkm_kernels-graph (not measured)" in text
    graphed = [r for r in results if r.row == step]
    graphed = [dataclasses.replace(r, provider=GRAPHED, status="error", message="") for r in graphed]
    assert f"{step} fwpkm_kernels-graph (error)" in goals_table([*results, *graphed])


@pytest.mark.parametrize("found, right", [("0", True), ("3", False)])
def test_sanitizer_is_run_and_read(found, right, gpu_run, monkeypatch, tmp_path):
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text(
        f"""#!/bin/sh
case $2 in
memcheck) echo "========= ERROR SUMMARY: {found} errors"; exit {found};;
racecheck) echo "========= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)";;
esac
"""
    )
    program.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    status, summary, _ = gpu_run("--only", "sanitizer")
    assert status == (not right)
    how = "" if right else f" (status {found}: ========= ERROR SUMMARY: {found} errors)"
    assert f"\nsanitizer: memcheck {found} errors{how}; racecheck 0 errors\n" in summary


@pytest.mark.parametrize(
    "program, words, right",
    [
        ("echo '========= Invalid __global__ read of size 4'; sleep 60", "memcheck 1 errors (stopped", False),
        (
            "echo '========= COMPUTE-SANITIZER'; sleep 60",
            "memcheck nothing found by then (stopped by its time limit)",
            True,
        ),
        ("echo driver too old; exit 1", "memcheck 0 errors (status 1: driver too old)", True),
        (None, "not present", True),
    ],
)
def test_sanitizer_that_does_not_end_or_run(program, words, right, gpu_run, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda *args, path: program and str(tmp_path / "program"))
    (tmp_path / "program").write_text(f"#!/bin/sh\n{program}\n")
    (tmp_path / "program").chmod(0o755)
    status, summary, _ = gpu_run("--only", "sanitizer", minutes=0.05)
    assert status == (not right)
    assert f"\nsanitizer: {words}" in summary


def test_files_of_a_run(gpu_run, monkeypatch, tmp_path):
    """There is room for a ninth; long texts are cut; one part keeps what the others have left, and all parts do not."""
    monkeypatch.setattr(gpu, "MOST_BYTES", 1000)
    monkeypatch.setattr(gpu, "plot", lambda results, out, names: [(out / name).touch() for name in names])
    monkeypatch.setattr(shutil, "which", lambda *args, path: sys.executable)
    status, _, _ = gpu_run(FUZZ=["-c", "print('begin', 'x' * 2000, 'end')"])
    assert status == 1  # nothing was measured
    out = tmp_path / "out"
    files = {path.name: path.stat().st_size for path in out.iterdir()}
    assert len(files) <= 7
    assert {"environment.json", "results.jsonl", "tests.txt", "sanitizer.txt", "summary.txt"} < {*files}
    assert files["tests.txt"] < 1100
    text = (out / "tests.txt").read_text("utf-8")
    assert text.startswith("begin")
    assert text.endswith("end\n")
    (out / "results.jsonl").write_text(run.to_json(some_result()) + "\n", "utf-8")
    _, summary, _ = gpu_run("--only", "smoke")
    assert "gather/forward/inference" in summary
    assert (out / "tests.txt").read_text("utf-8") == text
    assert "no results" in gpu_run()[1]


def test_a_run_compares(gpu_run, monkeypatch, tmp_path):
    old, new, out = (tmp_path / name for name in ("old", "new", "out"))
    old.write_text(run.to_json(some_result()) + "\n", "utf-8")
    new.write_text(run.to_json(slower_by(2.0)) + "\n", "utf-8")
    monkeypatch.setattr(gpu, "select_cases", lambda *args, **options: [])
    measured = ["-c", f"import shutil; shutil.copy({str(new)!r}, {str(out / 'results.jsonl')!r})"]
    status, summary, _ = gpu_run("--compare", str(old), "--only", "rows", MEASURE=measured)
    assert status == 1
    assert summary.startswith("all right")
    assert "got slower: gather/forward/inference" in summary


@pytest.mark.skipif(HAS_GPU, reason="kernels are compiled here, and not interpreted")
def test_smoke_in_the_interpreter(capsys):
    """Where there is no GPU: small sizes, and all but the CUDA graph."""
    assert smoke.main(["--device", "cpu"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "on a CPU: small sizes in Triton's interpreter, and no CUDA graph"
    assert said[1:] == [f"{name}: right" for name, _ in smoke.steps("cpu")]


def test_smoke_finds_what_is_wrong_in_the_last_tile_alone():
    wanted = torch.ones(4104, 2)
    smoke.check("output", wanted, wanted)
    for rows, right in ((slice(2000, 2008), True), (slice(-2, None), True), (slice(-8, None), False)):
        found = wanted.clone()
        found[rows] += 1
        with contextlib.nullcontext() if right else pytest.raises(AssertionError, match="of the last 16 rows"):
            smoke.check("output", found, wanted)


@pytest.mark.parametrize("function", ["fast_weight_memory", "product_key_update", "fast_weight_memory_step"])
def test_smoke_finds_what_is_wrong(function, monkeypatch, capsys):
    names = ("fast_weight_memory", "product_key_update", "fast_weight_memory_step")

    def plant(name: str, factor: float) -> None:
        original = getattr(smoke, name)

        def planted(*args, backend, **options):
            out = original(*args, backend="torch", **options)
            wrong = factor if backend == "triton" else 1.0
            return wrong * out if isinstance(out, torch.Tensor) else out._replace(output=wrong * out.output)

        monkeypatch.setattr(smoke, name, planted)

    for name in names:
        plant(name, 1.01 if name == function else 1.0)
    with pytest.raises(AssertionError, match="rows are off by more than"):
        smoke.main(["--device", "cpu"])
    assert capsys.readouterr().out.count("right") == names.index(function)


RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at gather_kernel+0x830 in gather.py:49
=========     and {other} [2 hazards]
=========
========= Error: Race reported between Write access at gather_kernel+0x1050 in gather.py:50
=========     and Read access at gather_kernel+0x1090 in gather.py:51 [3 hazards]
=========
========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)
"""


@pytest.mark.parametrize(
    "other, errors",
    [
        ("Write access at gather_kernel+0x830 in gather.py:49", 1),
        ("Write access at gather_kernel+0x8a0 in gather.py:52", 2),
        ("Read access at gather_kernel+0x830 in gather.py:49", 2),
    ],
    ids=["lanes that store one element", "stores of two places", "a read"],
)
def test_lanes_that_store_the_same_element_are_no_race(other, errors):
    assert sanitize.errors_found("racecheck", RACE.format(other=other)) == (errors, True)
