"""Every program: it shows any text, tries its files before its work, and says in one line what is wrong."""

import ast
import importlib
import io
import os
import resource
import sys
from pathlib import Path

import pytest

from fwpkm_kernels._commands import CommandError, need, one_line, try_all

ROOT = Path(__file__).resolve().parent.parent


def test_an_extra_that_is_broken_is_told(here, monkeypatch):
    monkeypatch.syspath_prepend(here)
    for name, text in (("lacks", "import no_such_module"), ("old", "raise ImportError('too old')")):
        Path(f"{name}.py").write_text(text)
    Path("cut.py").write_text("raise OSError('libcut.so: cannot open shared object file')")
    for name, reason in (("lacks", "no_such_module"), ("old", "too old"), ("cut", "libcut.so")):
        with pytest.raises(CommandError, match=f"^{name} cannot be imported: .*{reason}"):
            need(name, "demo")
    with pytest.raises(CommandError, match=r"^absent is missing; install it with: pip install 'fwpkm_kernels\[demo\]'"):
        need("absent.part", "demo")


def test_one_line_moves_no_cursor():
    assert one_line("a\x1b[31m\a\rb\x85\u2028é ł\n") == "a\\x1b[31m\\x07\\rb\\x85\\u2028é ł"


def test_all_are_tried():
    done = []

    def fail(what):
        raise CommandError(what)

    assert try_all([lambda: 1, lambda: 2]) == [1, 2]
    with pytest.raises(CommandError, match="^one; two$"):
        try_all([lambda: fail("one"), lambda: done.append(1), lambda: fail("two"), lambda: done.append(2)])
    assert done == [1, 2]


def programs() -> list[str]:
    """Every module that `python -m` runs."""
    files = [
        *(ROOT / "fwpkm_kernels").rglob("*.py"),
        *(ROOT / "benchmarks").rglob("*.py"),
        *(ROOT / "tests").glob("*.py"),
    ]
    named = {path: ast.parse(path.read_text("utf-8")).body for path in files}
    return sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path, body in named.items()
        if any(isinstance(part, ast.If) and "__main__" in ast.unparse(part.test) for part in body)
    )


def called(name: str) -> str:
    """What a program is called in its messages."""
    return name.removesuffix(".__main__").rpartition(".")[2]


#: What else programs must be given.
REQUIRED = {
    "benchmarks.plots": ["results"],
    "benchmarks.evaluation.needles": ["folder", "--out=new"],
    "benchmarks.evaluation.perplexity": ["folder", "--out=new"],
    "benchmarks.evaluation.train": ["folder"],
    "benchmarks.evaluation.mqar": ["--out=new"],
}


@pytest.mark.parametrize("name", sorted({*programs()} - {"benchmarks.sanitize"}))  # which takes no arguments
def test_every_program_takes_any_text(name, monkeypatch):
    """Argparse shows what it was given; and python -OO has no docstring to describe the program."""
    module, err = pytest.importorskip(name, exc_type=ImportError), io.TextIOWrapper(io.BytesIO(), "ascii", "strict")
    monkeypatch.setattr(module, "__doc__", None)
    monkeypatch.setattr(sys, "argv", [name, *REQUIRED.get(name, []), "--ł"])
    monkeypatch.setattr(sys, "stderr", err)
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 2
    assert err.buffer.getvalue().endswith(b"unrecognized arguments: --\\u0142\n")


#: Of each program: how it is told where to write, where {} is that place, and what would be its work.
WRITERS = [
    ("benchmarks.run", ["--device=cpu", "--op=gather", "--json={}"], "measure_machine"),
    ("benchmarks.compiled", ["--json={}"], "report_cases"),
    ("benchmarks.launches", ["--json={}"], "rows"),
    ("benchmarks.host", ["--json={}"], "stand_in"),
    ("benchmarks.errors", ["--out={}"], "growth"),
    ("benchmarks.plots", ["results", "--out={}"], "plot"),
    ("benchmarks.gpu", ["--device=cpu", "--out={}"], "Run"),
    ("benchmarks.evaluation.needles", ["folder", "--out={}"], "load_trained"),
    ("benchmarks.evaluation.perplexity", ["folder", "--out={}"], "load_trained"),
    ("benchmarks.evaluation.run", ["--out={}"], "run_all"),
    ("benchmarks.evaluation.train", ["{}"], "Trainer"),
    ("benchmarks.evaluation.mqar", ["--out={}"], "train_mqar"),
    ("fwpkm_kernels.demo.__main__", ["--json={}"], "default_text"),
    ("fwpkm_kernels.demo.__main__", ["--plot={}"], "default_text"),
    ("fwpkm_kernels.integrations.example", ["--out={}"], "default_text"),
    ("tests.fuzz", ["--cases=1", "--failures={}"], "Fuzzer"),
    ("benchmarks.compiled", ["--write"], "report_cases"),
    ("benchmarks.scaling", ["--write"], "tables"),
    ("tests.mutations", ["--write"], "check_all"),
]


def test_every_program_that_writes_is_asked():
    silent = {"benchmarks.estimates", "benchmarks.evaluation.columns", "benchmarks.sanitize", "benchmarks.smoke"}
    silent |= {"fwpkm_kernels.demo.serve", "fwpkm_kernels.env_report"}
    assert {name for name, *_ in WRITERS} == {*programs()} - silent


@pytest.mark.parametrize("name, arguments, work", WRITERS)
def test_every_program_tries_its_outputs_before_it_works(name, arguments, work, here, monkeypatch, capsys):
    module = pytest.importorskip(name, exc_type=ImportError)

    def worked(*args, **options):
        raise AssertionError("it worked first")

    monkeypatch.setattr(module, work, worked)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for path in ("file", "results"):
        Path(path).write_text("old")
    place = here / "file" / "below"
    if "--write" in arguments:
        monkeypatch.setattr(module, "TABLE", place)
    monkeypatch.setattr(module, "need", lambda *names: None, raising=False)
    monkeypatch.setattr(sys, "argv", [name, *(argument.format(place) for argument in arguments)])
    assert module.main() == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith(f"{called(name)}: error: cannot write {place}")
    assert sorted(os.listdir(here)) == ["file", "results"]


def test_a_run_tries_the_file_beside_its_results_too(here, monkeypatch, capsys):
    run = importlib.import_module("benchmarks.run")
    name = "n" * 250
    Path(name).write_text("old")
    assert run.main(["--device=cpu", "--op=gather", f"--json={name}"]) == 2
    assert capsys.readouterr().err == f"run: error: cannot write {name}.running: File name too long\n"
    assert Path(name).read_text() == "old"


def test_a_plot_that_fails_costs_no_numbers(here, monkeypatch, capsys):
    errors = pytest.importorskip("benchmarks.errors")
    pytest.importorskip("matplotlib")

    def no_plot(rows):
        raise RuntimeError("no fonts")

    for name in ("growth", "learning", "overshoot"):
        monkeypatch.setattr(errors, name, lambda *args, name=name: [{"experiment": name}])
    monkeypatch.setattr(errors, "report", lambda rows: "| Σ |")
    monkeypatch.setattr(errors, "plot", no_plot)
    monkeypatch.setattr(sys, "argv", ["errors", "--out=out"])
    with pytest.raises(RuntimeError, match="no fonts"):
        errors.main()
    assert len(Path("out/errors_cpu.jsonl").read_text().splitlines()) == 5
    assert "Σ" in capsys.readouterr().out


def test_a_program_tries_its_disk_before_it_measures(here, monkeypatch, capsys):
    run = importlib.import_module("benchmarks.run")
    monkeypatch.delattr(run, "measure_machine")
    Path("results").write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        assert run.main(["--device=cpu", "--json=results"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capsys.readouterr().err == "run: error: cannot write results: File too large\n"
    assert Path("results").read_text() == "old"


@pytest.mark.parametrize(
    "name, arguments, reason",
    [
        ("benchmarks.plots", ["folder"], "cannot read folder: Is a directory"),
        ("benchmarks.plots", ["missing"], "cannot read missing: No such file or directory"),
        ("benchmarks.run", ["--compare=folder"], "cannot read folder: Is a directory"),
        ("benchmarks.run", ["--compare=file", "--results=missing"], "cannot read missing: No such file or directory"),
        ("benchmarks.run", ["--device=cpu", "--resume", "--json=closed"], "cannot read closed: Permission denied"),
        ("benchmarks.errors", ["--device=abacus"], "cannot use the device abacus: "),
        ("fwpkm_kernels.demo.__main__", ["missing", "--plot=new"], "cannot read missing: No such file or directory"),
    ],
)
def test_what_cannot_be_read_ends_in_one_line(name, arguments, reason, here, as_another, monkeypatch, capsys):
    Path("folder").mkdir()
    Path("file").touch()
    Path("closed").touch(0o222)
    os.chmod("closed", 0o222)
    module = importlib.import_module(name)
    monkeypatch.setattr(module, "need", lambda *names: None, raising=False)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    assert module.main() == 2
    err = capsys.readouterr().err
    assert err.startswith(f"{called(name)}: error: {reason}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["benchmarks.compiled", "benchmarks.launches", "tests.mutations"])
def test_programs_that_need_triton_say_so_first(name, here, monkeypatch, capsys):
    module = importlib.import_module(name)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    argument = "--json=new"
    if name == "tests.mutations":
        monkeypatch.setattr(module, "TABLE", here / "new")
        monkeypatch.delattr(module, "check_all")
        argument = "--write"
    monkeypatch.setattr(sys, "argv", [name, argument])
    assert module.main() == 2
    assert "pip install 'fwpkm_kernels[triton]'" in capsys.readouterr().err
    assert os.listdir(here) == []
