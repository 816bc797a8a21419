"""The fuzzer itself: what it finds, prints, stores and counts."""

import collections
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fwpkm_kernels
from tests import fuzz, judge
from tests.strategies import OPERATIONS, Case, make_tensors

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def seen(monkeypatch):
    """The cases of a run, of which every third is said to be judged in part; none is really run."""
    cases: list[Case] = []

    def check(case: Case, backend: str, device: str) -> set[str]:
        assert (backend, device) == ("torch", "cpu")
        cases.append(case)
        return {"overflow", "near ties"} if len(cases) % 3 == 0 else set()

    monkeypatch.setattr(judge, "check", check)
    return cases


@pytest.fixture
def plant(monkeypatch):
    """A gather that forgets the last pick of long rows."""
    original = fwpkm_kernels.sparse_value_gather

    def gather(values, slots, weights, **options):
        if slots.shape[-1] > 2:
            slots, weights = slots[..., :-1], weights[..., :-1]
        return original(values, slots, weights, **options)

    monkeypatch.setattr(fwpkm_kernels, "sparse_value_gather", gather)


def test_a_planted_fault_is_found_shrunk_printed_and_stored(plant, monkeypatch, tmp_path, capsys):
    arguments = ["--op", "sparse_value_gather", "--cases", "100", "--failures", str(tmp_path)]
    assert fuzz.main(arguments) == 1
    printed = capsys.readouterr().out
    (path,) = tmp_path.glob("*.py")
    assert path.read_text() in printed
    assert "1 failures" in printed
    case = eval(re.search("^case = (.*)$", path.read_text(), re.M)[1], {"Case": Case})
    assert case.sizes == {"rows": 1, "J": 3, "N": 1, "D": 1}
    assert not case.layouts
    assert not case.fills
    with pytest.raises(AssertionError, match="out"):
        runpy.run_path(str(path))

    # The next run tries it first.
    tried = []
    original = judge.check
    monkeypatch.setattr(judge, "check", lambda case, *place: (tried.append(case), original(case, *place))[1])
    assert fuzz.main(arguments) == 1
    assert tried[0] == case
    monkeypatch.undo()
    runpy.run_path(str(path))
    capsys.readouterr()


def test_the_summary_counts_what_ran(seen, tmp_path, capsys):
    assert fuzz.main(["--cases", "120", "--seed", "5", "--failures", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "120 cases, 0 failures, seed 5" in printed
    rows = {row[0]: row[1:] for row in map(str.split, printed.splitlines()) if row}
    by_op = collections.Counter(case.op for case in seen)
    for op, count in by_op.items():
        assert rows[op][0] == str(count)
    # cases, seconds, cases/s, in part, overflow, near ties, unstable, nothing left, failures
    assert rows["all"][0:1] + rows["all"][3:] == ["120", "40", "40", "40", "0", "0", "0"]
    covered = " ".join(printed.split())
    for text, count in {
        "bfloat16": sum("bfloat16" in case.dtypes.values() for case in seen),
        "normal": sum(not case.fills for case in seen),
        "all contiguous": sum(not case.layouts for case in seen),
        "gates": sum("gates" in case.dtypes for case in seen),
        "score=dot": sum(case.options.get("score") == "dot" for case in seen),
        "rows = 0": sum(case.sizes.get("rows") == 0 for case in seen),
    }.items():
        assert count
        assert f"{text} {count}" in covered


def test_every_operation_has_its_turn_and_a_seed_repeats_the_cases(seen, monkeypatch, tmp_path):
    monkeypatch.setattr(fuzz, "ROUND", 5)
    arguments = ["--cases", str(5 * len(OPERATIONS)), "--failures", str(tmp_path), "--seed"]
    runs = []
    for seed in ("1", "1", "2"):
        assert fuzz.main([*arguments, seed]) == 0
        runs.append(seen.copy())
        seen.clear()
    assert {case.op for case in runs[0]} == set(OPERATIONS)
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_a_quick_run_draws_few_sizes_the_memory_first_and_shrinks_nothing(seen, monkeypatch, tmp_path):
    arguments = ["--quick", "--failures", str(tmp_path)]
    assert fuzz.main([*arguments, "--cases", "100"]) == 0
    first = list(dict.fromkeys(case.op for case in seen[: 2 * fuzz.QUICK_ROUND]))
    assert first == ["fast_weight_memory", "fast_weight_memory_step"]
    assert {case.op for case in seen} == set(OPERATIONS)
    for name in ("n", "Dk", "D", "J", "H"):
        assert len({case.sizes[name] for case in seen if name in case.sizes}) <= 2
    assert {case.options["top_k"] for case in seen if "top_k" in case.options} <= {1, 3, 5}
    assert all(case.options["top_k"] <= case.sizes["n"] for case in seen if "n" in case.sizes)
    distinct = [case.sizes for case in seen if case.pattern == "distinct"]
    assert all(sizes["rows"] * sizes["J"] <= sizes["N"] for sizes in distinct)
    for case in seen:
        make_tensors(case)

    tried = []
    monkeypatch.setattr(judge, "check", lambda case, *place: tried.append(case) or 1 / 0)
    assert fuzz.main([*arguments, "--op", "fast_weight_memory"]) == 1
    assert len(tried) <= 2  # once more, to see that it fails again


def test_a_run_ends_with_its_time(seen, tmp_path, capsys):
    assert fuzz.main(["--seconds", "0.5", "--failures", str(tmp_path)]) == 0
    assert f"{len(seen)} cases, 0 failures" in capsys.readouterr().out


def test_an_interrupted_run_says_what_it_did(monkeypatch, tmp_path, capsys):
    count = 0

    def check(*args):
        nonlocal count
        count += 1
        if count > 10:
            raise KeyboardInterrupt
        return set()

    monkeypatch.setattr(judge, "check", check)
    assert fuzz.main(["--failures", str(tmp_path)]) == 130
    assert "10 cases, 0 failures" in capsys.readouterr().out


def test_a_reproduction_says_where_it_ran():
    case = Case("sparse_value_gather", {"rows": 1}, {"values": "float32"}, actions=(1, "reset"))
    for backend, device in (("torch", "cpu"), ("triton", "cpu"), ("triton", "cuda")):
        text = fuzz.reproduction(case, AssertionError("wrong\nby 1"), backend, device)
        compile(text, "text", "exec")
        assert text.startswith("# AssertionError: wrong\n# by 1\n")
        assert f"check(case, backend={backend!r}, device={device!r})" in text
        assert ('["TRITON_INTERPRET"] = "1"' in text) == ((backend, device) == ("triton", "cpu"))
        assert ('pop("TRITON_INTERPRET"' in text) == (device == "cuda")
        assert eval(repr(case), {"Case": Case}) == case


def test_the_command_runs_kernels_in_the_interpreter(tmp_path):
    command = ["-m", "tests.fuzz", "--backend", "triton", "--op", "sparse_value_gather", "--cases", "3", "--failures"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "backend triton on cpu" in done.stdout
    assert "3 cases, 0 failures, seed 0" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which the fuzzer removes, and later tests need
    with pytest.raises(SystemExit, match="2"):
        fuzz.main(["--device", "cuda"])
    assert "no GPU" in capsys.readouterr().err
