"""The list of planted faults: each can be planted in the code as it is, and the committed results are theirs."""

import ast
import re

import pytest

from tests.faults import FAULTS, Fault

mutations = pytest.importorskip("tests.mutations", reason="needs tqdm")
ROOT, TABLE, Result = mutations.ROOT, mutations.TABLE, mutations.Result

FAULT = pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)


@FAULT
def test_a_fault_can_be_planted(fault: Fault):
    assert fault.before != fault.after
    planted = mutations.plant(fault)
    original = (ROOT / "fwpkm_kernels" / fault.file).read_text("utf-8")
    assert ast.dump(ast.parse(planted)) != ast.dump(ast.parse(original))
    for name in fault.tests.split():
        assert (ROOT / "tests" / f"test_{name}.py").is_file()


def test_no_two_faults_are_the_same():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 36
    assert len({(fault.file, fault.before, fault.after) for fault in FAULTS}) == len(FAULTS)


def test_the_committed_table_lists_these_faults():
    rows = mutations.rows_of_table()
    assert list(rows) == [fault.name for fault in FAULTS]
    changed = [fault.name for fault in FAULTS if not rows[fault.name].startswith(f"| {mutations.described(fault)} | ")]
    assert not changed, f"run python -m tests.mutations --write --only {' '.join(changed)}"


@FAULT
def test_the_committed_table_says_who_caught_a_fault(fault: Fault):
    caught_by = mutations.rows_of_table()[fault.name].split(" | ")[-2]
    if caught_by.startswith("`(Python died"):  # before a test could say so
        return
    file, test = re.fullmatch(r"`(tests/test_\w+\.py)::(\w+)(?:\[.*\])?`", caught_by).groups()
    assert f"def {test}(" in (ROOT / file).read_text("utf-8")


def test_a_fault_whose_text_is_gone_says_so(tmp_path):
    fault = FAULTS[0]
    path = tmp_path / "fwpkm_kernels" / fault.file
    path.parent.mkdir(parents=True)
    path.write_text("other code")
    result = mutations.check(fault, tmp_path)
    assert not result.caught_by
    assert "occurs 0 times" in result.trouble
    assert path.read_text() == "other code"


@pytest.mark.parametrize(
    "status, output, expected",
    [
        (0, "3 passed", ""),
        (
            1,
            "x\nFAILED tests/test_x.py::test_y[a - b, 1-c] - assert 1 == 2\n1 failed",
            "tests/test_x.py::test_y[a - b, 1-c]",
        ),
        (1, "ERROR tests/test_x.py::test_y\n1 error", "tests/test_x.py::test_y"),
        (-11, "", "(Python died of signal 11)"),
        (mutations.TIMED_OUT, "", "(the tests did not end)"),
    ],
)
def test_the_first_failure(status, output, expected):
    assert mutations.first_failure(status, output) == expected


def test_an_error_in_collecting_tests_is_no_catch():
    with pytest.raises(RuntimeError, match="status 2"):
        mutations.first_failure(2, "ERROR tests/test_x.py - ImportError")


def test_a_fault_that_survives_fails_the_run(monkeypatch, capsys):
    one, other = FAULTS[:2]
    results = {one.name: Result("tests/test_x.py::test_y", 1.0), other.name: Result("", 2.0)}
    monkeypatch.setattr(mutations, "check", lambda fault, root: results[fault.name])
    monkeypatch.setattr(mutations, "copy_checkout", lambda to: None)
    monkeypatch.setattr(mutations, "run_pytest", lambda root, arguments, limit: (0, ""))
    assert mutations.main(["--only", one.name]) == 0
    assert mutations.main(["--only", one.name, other.name]) == 1
    assert f"{other.name}: no test noticed it" in capsys.readouterr().err


def test_tests_that_fail_without_a_fault_fail_the_run(monkeypatch, capsys):
    monkeypatch.setattr(mutations, "check", lambda fault, root: Result("tests/test_x.py::test_y", 1.0))
    monkeypatch.setattr(mutations, "copy_checkout", lambda to: None)
    failed = "FAILED tests/test_x.py::test_y - assert 1 == 2"
    monkeypatch.setattr(mutations, "run_pytest", lambda root, arguments, limit: (1, failed))
    assert mutations.main(["--only", FAULTS[0].name]) == 1
    assert "without a fault" in capsys.readouterr().err


def test_written_rows_are_read_again(monkeypatch, tmp_path):
    monkeypatch.setattr(mutations, "TABLE", tmp_path / "MUTATIONS.md")
    row = f"| {mutations.described(FAULTS[0])} | `tests/test_x.py::test_y[a]` | 3 s |"
    (tmp_path / "MUTATIONS.md").write_text(mutations.table({FAULTS[0].name: row}))
    assert mutations.rows_of_table() == {FAULTS[0].name: row}
    assert TABLE.name == "MUTATIONS.md"
