"""What the programs share: outputs tried before the work and written whole after it, and text for any terminal."""

import ast
import contextlib
import importlib
import io
import os
import resource
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fwpkm_kernels import _commands
from fwpkm_kernels._commands import (
    CommandError,
    Lines,
    check_outputs,
    command,
    make_folder,
    need,
    one_line,
    reading,
    try_all,
    write_output,
)

ROOT = Path(__file__).resolve().parent.parent
FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder of the test's own, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, object]:
    """All that is in a folder: names, links, contents, modes and times."""
    found = {}
    for path in folder.rglob("*"):
        about = path.lstat()
        what = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path)] = (what, about.st_mode, about.st_mtime_ns if path.is_file() else 0)
    return found


def plant(folder: Path) -> None:
    """A file, a folder, links, a pipe, and what cannot be written."""
    (folder / "file").write_text("old")
    (folder / "folder").mkdir()
    (folder / "link").symlink_to("file")
    (folder / "dangling").symlink_to("folder/new")
    (folder / "lost").symlink_to("missing/new")
    (folder / "loop").symlink_to("loop")
    os.link(folder / "file", folder / "other")
    os.mkfifo(folder / "pipe")


@pytest.mark.parametrize("path", ["file", "new", "link", "dangling", "folder/new", "pipe", "/dev/null", None])
def test_what_can_be_written_is_left_as_it_was(here, path):
    plant(here)
    before = contents(here)
    check_outputs(path)
    check_outputs(None if path is None else Path(path))
    assert contents(here) == before


@pytest.mark.parametrize(
    "path, reason",
    [
        ("folder", "Is a directory"),
        ("", ""),
        ("missing/new", "No such file"),
        ("lost", "No such file"),
        ("file/new", "Not a directory"),
        ("loop", "Too many levels"),
        ("n" * 300, "File name too long"),
        ("nul\0", "null"),
        ("\ud800", "surrogates"),
    ],
)
def test_what_cannot_be_written_is_told_before_and_after_the_work(here, path, reason):
    plant(here)
    before = contents(here)
    for act in (check_outputs, lambda path: write_output(path, "new"), Lines):
        with pytest.raises(CommandError, match="^cannot write ") as raised:
            act(path)
        assert reason in str(raised.value)
    assert contents(here) == before


@pytest.fixture
def as_another(here):
    """Run as a user for whom permissions count, in a folder that he may write, but not reach from above."""
    here.chmod(0o777)
    plant(here)
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_permissions_count(here, as_another):
    os.mkdir("mine")
    Path("mine/protected").write_text("old")
    Path("mine/writable").write_text("old")
    os.chmod("mine/protected", 0o444)
    check_outputs("new", "mine/new", "mine/writable")
    with pytest.raises(CommandError, match="Permission denied"):
        check_outputs("mine/protected")
    os.chmod("mine", 0o555)
    with pytest.raises(CommandError, match="cannot write mine/new: Permission denied"):
        check_outputs("mine/new")
    with pytest.raises(CommandError, match="Permission denied"):
        make_folder("mine/deep")
    check_outputs("mine/writable")  # its folder takes no other file, so it is written in place
    write_output("mine/writable", "new")
    assert Path("mine/writable").read_text() == "new"
    assert sorted(os.listdir("mine")) == ["protected", "writable"]
    os.chmod("mine", 0o644)
    with pytest.raises(CommandError, match="Permission denied"):
        check_outputs("mine/writable")
    os.chmod("mine", 0o755)
    os.mkfifo("mine/pipe", 0o444)
    with pytest.raises(CommandError, match="Permission denied"):
        check_outputs("mine/pipe")


@pytest.mark.parametrize(
    "one, other", [("new", "./new"), ("file", "link"), ("file", "other"), ("dangling", "folder/new"), ("new", "new")]
)
def test_two_outputs_are_two_files(here, one, other):
    plant(here)
    before = contents(here)
    with pytest.raises(CommandError, match="is the same file as"):
        check_outputs(one, other)
    if one != "new":
        with contextlib.suppress(FileNotFoundError):
            os.link("file", "folder/new")
        with pytest.raises(CommandError, match="is the file that is read"):
            check_outputs(one, read=other)
        os.unlink("folder/new")
    assert contents(here).keys() == before.keys()
    check_outputs("/dev/null", "/dev/null", read="/dev/null")


def test_a_current_folder_that_is_gone_cannot_be_written(here):
    (here / "gone").mkdir()
    os.chdir("gone")
    (here / "gone").rmdir()
    with pytest.raises(CommandError, match="cannot write new: No such file"):
        check_outputs("new")


def test_a_file_is_replaced_whole(here, monkeypatch):
    plant(here)
    (here / "own").write_text("old")
    os.chmod("own", 0o640)
    os.umask(mask := os.umask(0))
    before = os.stat("own").st_ino
    write_output("own", "é\ud800")
    assert (here / "own").read_bytes() == "é\\ud800".encode()
    assert stat.S_IMODE(os.stat("own").st_mode) == 0o640
    assert os.stat("own").st_ino != before
    write_output(here / "new", b"\0")
    assert stat.S_IMODE(os.stat("new").st_mode) == 0o666 & ~mask

    def replace(*paths):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(os, "replace", replace)  # as where the file is a mount point
    write_output("own", "2")
    assert (here / "own").read_text() == "2"
    assert not [name for name in os.listdir(here) if name.endswith(".part")]


def test_links_and_files_with_several_names_stay_what_they_are(here):
    plant(here)
    before = os.stat("file").st_ino
    for name in ("file", "link"):
        write_output(name, name)
        assert [(here / same).read_text() for same in ("file", "link", "other")] == [name] * 3
    assert os.stat("file").st_ino == before
    write_output("dangling", b"1")
    assert (here / "folder" / "new").read_bytes() == b"1"
    assert (here / "link").is_symlink()
    assert (here / "dangling").is_symlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user's files")
def test_a_file_of_another_user_stays_his(here, as_another, monkeypatch):
    os.seteuid(0)
    for name in ("his", "lines"):
        Path(name).write_text("old")
        os.chmod(name, 0o666)
        os.chown(name, 1, 1)
    os.seteuid(65534)
    write_output("his", "moving it here would be allowed")
    assert os.stat("his").st_uid == 1
    os.seteuid(0)
    os.chmod(here, 0o1777)
    os.seteuid(65534)
    really_open = os.open

    def protected(path, flags, *rest, **options):
        """As fs.protected_regular has it, which not every kernel is set to."""
        if flags & os.O_CREAT and str(path) in ("his", "lines"):
            raise PermissionError(13, "Permission denied")
        opened.append(str(path))
        return really_open(path, flags, *rest, **options)

    opened: list[str] = []
    monkeypatch.setattr(os, "open", protected)
    check_outputs("his", "lines")
    opened.clear()
    write_output("his", "new")
    with Lines("lines") as lines:
        lines.write("new")
    assert opened == ["his", "lines"]  # and not past what stands for the kernel
    assert Path("his").read_text() == "new"
    assert Path("lines").read_text() == "new\n"
    assert os.stat("his").st_uid == 1


def test_a_disk_that_is_full_half_way_costs_no_file_that_is_replaced(here):
    plant(here)
    (here / "own").write_text("old")
    before = contents(here)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        check_outputs("own", "new")
        for path in ("own", "new"):
            with pytest.raises(CommandError, match=f"cannot write {path}: File too large"):
                write_output(path, bytes(100_000))
        with Lines("lines") as lines, pytest.raises(CommandError, match="File too large"):
            lines.write("x" * 10_000)
        os.unlink("lines")
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        for path in ("own", "new"):
            with pytest.raises(CommandError, match="File too large"):
                check_outputs(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(here) == before


@FULL
def test_devices_and_pipes_are_written_as_they_are(here):
    plant(here)
    check_outputs("/dev/full")  # only the writing tells
    with pytest.raises(CommandError, match="cannot write /dev/full: No space left on device"):
        write_output("/dev/full", "text")
    with Lines("/dev/full") as lines, pytest.raises(CommandError, match="No space left"):
        lines.write("text")
    write_output("/dev/null", "text")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(Path("pipe").read_bytes()))
    reader.start()
    write_output("pipe", bytes(200_000))  # more than a pipe holds
    reader.join(10)
    assert read == [bytes(200_000)]


def test_what_is_no_file_is_opened_to_try_it(here, monkeypatch):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        with pytest.raises(CommandError, match="cannot write socket: No such device"):
            check_outputs("socket")
    flags: list[int] = []
    monkeypatch.setattr(os, "open", lambda path, flag: flags.append(flag) or os.dup(2))
    check_outputs("/dev/null")
    (flag,) = flags
    assert flag & os.O_NONBLOCK  # a line without a carrier would wait for one
    assert flag & os.O_NOCTTY


def run_alone(code: str, **options) -> "subprocess.CompletedProcess[bytes]":
    """Run code in a new Python that has the helpers' names, but need not import torch."""
    source = Path(_commands.__file__).read_text("utf-8")
    return subprocess.run([sys.executable, "-c", f"{source}\n{code}"], timeout=60, **options)


OWN_STREAM = """
@command("x")
def main():
    print("before", end=" ")
    check_outputs("/dev/stdout")
    write_output("/dev/stdout", "data\\n")
    with Lines("/dev/stdout") as lines:
        lines.write("line")
    print("after")
    return 0

print("first")
main()
print("last")
"""


def test_standard_output_as_a_file_keeps_what_is_printed(here):
    with open("out", "wb") as out:
        run_alone(OWN_STREAM, stdout=out, check=True)
    assert Path("out").read_text().split() == ["first", "before", "data", "line", "after", "last"]
    done = run_alone(OWN_STREAM, stdout=subprocess.PIPE, check=True)
    assert done.stdout.split() == [b"first", b"before", b"data", b"line", b"after", b"last"]


def test_an_open_descriptor_is_written_where_it_stands(here):
    code = """
import sys
path = sys.argv[1]
check_outputs(path)
write_output(path, "data\\n")
with Lines(path) as lines:
    lines.write("line")
"""
    for folder in ("/dev/fd", "/proc/self/fd"):
        with open("out", "wb") as out:
            out.write(b"before\n")
            out.flush()
            source = Path(_commands.__file__).read_text("utf-8")
            arguments = [sys.executable, "-c", source + code, f"{folder}/{out.fileno()}"]
            subprocess.run(arguments, check=True, pass_fds=[out.fileno()], timeout=60)
            out.write(b"after\n")
        assert Path("out").read_text().split() == ["before", "data", "line", "after"]


def test_standard_error_as_a_file_keeps_its_order(here):
    code = """
@command("x")
def main():
    print("first", end=" ", file=sys.stderr)
    write_output("/dev/stderr", "data")

main()
"""
    with open("err", "wb") as err:
        run_alone(code, stderr=err, check=True)
    assert Path("err").read_text() == "first data"


def test_standard_output_may_be_a_socket(here):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        run_alone(OWN_STREAM, stdout=theirs, check=True)
        theirs.close()
        assert ours.recv(1000).split()[1:4] == [b"before", b"data", b"line"]


def test_lines_come_as_they_are_written(here):
    plant(here)
    with Lines("file") as lines:
        lines.write("é\ud800")
        assert Path("file").read_bytes() == "é\\ud800\n".encode()
    with Lines("file", append=True) as lines:
        lines.write("2")
    assert Path("file").read_text("utf-8").splitlines()[1] == "2"


def test_a_folder_is_made_and_tried(here):
    plant(here)
    for path in ("folder", "a/b/c", "."):
        before = contents(here)
        make_folder(path)
        make_folder(path, "x.png", "y.png")
        assert contents(here).items() >= before.items()
        assert os.path.isdir(path)
    assert os.listdir("a/b/c") == []
    before = contents(here)
    for path, names in (("file", ()), ("a/" + "n" * 300, ()), ("a", ("n" * 300,)), (".", ("new", "folder"))):
        with pytest.raises(CommandError, match="^cannot write "):
            make_folder(path, *names)
    assert contents(here) == before


@pytest.mark.parametrize(
    "path, reason", [("folder", "Is a directory"), ("missing", "No such file"), ("loop", "Too many"), ("nul\0", "null")]
)
def test_what_cannot_be_read_is_told(here, path, reason):
    plant(here)
    with pytest.raises(CommandError, match=f"^cannot read {path}: .*{reason}"), reading(path), open(path) as file:
        file.read()


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


SHOWN = "é ł \udce9 µs"


@command("program")
def program(argument: str = SHOWN) -> int:
    print(argument)
    raise CommandError(f"{argument}\nand more")


ENCODINGS = {
    "ascii": "\\xe9 \\u0142 \\udce9 \\xb5s",
    "latin-1": "é \\u0142 \\udce9 µs",
    "cp1252": "é \\u0142 \\udce9 µs",
    "utf-8": "é ł \\udce9 µs",
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("has_file", [True, False])
def test_any_text_is_shown(here, monkeypatch, encoding, has_file):
    streams = []
    for name in ("stdout", "stderr"):
        buffer = open(name, "w+b") if has_file else io.BytesIO()  # noqa: SIM115
        streams.append(io.TextIOWrapper(buffer, encoding, "strict"))
        monkeypatch.setattr(sys, name, streams[-1])
    print("first", end=" ")
    print("first", end=" ", file=sys.stderr)
    assert program() == 2
    assert [sys.stdout, sys.stderr] == streams
    for stream, expected in zip(streams, ("first {}\n", "first program: error: {}\\nand more\n"), strict=True):
        assert stream.errors == "strict"
        stream.write("last")
        stream.flush()
        stream.buffer.seek(0)
        assert stream.buffer.read().decode(encoding) == expected.format(ENCODINGS[encoding]) + "last"
        stream.close()


def test_a_stream_without_bytes_is_left_alone():
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        assert program() == 2
    assert out.getvalue() == f"{SHOWN}\n"
    assert err.getvalue().count("\n") == 1


def test_streams_that_are_closed_are_no_error(monkeypatch):
    for out in (None, io.TextIOWrapper(io.BytesIO())):
        if out is not None:
            out.close()
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", out)
        assert program() == 2
        assert sys.stdout is out


PRINTS = """
@command("x")
def main():
    for number in range(20000):
        print(number)
    open("worked", "w").close()
    return 0

sys.exit(main())
"""


def test_a_pipe_that_ends_early_does_not_end_the_work(here):
    """Nor does it leave a message when Python ends."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as out:
        done = run_alone(PRINTS, stdout=out, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (here / "worked").exists()


@FULL
def test_full_standard_output_is_told(here):
    with open("/dev/full", "wb") as full:
        done = run_alone(PRINTS, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (2, b"x: error: cannot write standard output: No space left on device\n")
    assert (here / "worked").exists()


def test_help_that_is_lost_is_told(here):
    code = 'import argparse\ncommand("x")(lambda: argparse.ArgumentParser().parse_args(["--help"]))()'
    with open(os.devnull, "wb") as nowhere:
        assert run_alone(code, stdout=nowhere).returncode == 0
    if os.path.exists("/dev/full"):
        with open("/dev/full", "wb") as full:
            done = run_alone(code, stdout=full, stderr=subprocess.PIPE)
        assert done.stderr == b"x: error: cannot write standard output: No space left on device\n"


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
    ("fwpkm_kernels.demo", ["--json={}"], "default_text"),
    ("fwpkm_kernels.demo", ["--plot={}"], "default_text"),
    ("fwpkm_kernels.integrations.example", ["--out={}"], "default_text"),
    ("tests.fuzz", ["--cases=1", "--failures={}"], "Fuzzer"),
    ("benchmarks.compiled", ["--write"], "report_cases"),
    ("tests.mutations", ["--write"], "check_all"),
]


def test_every_program_that_writes_is_asked():
    silent = {"benchmarks.estimates", "benchmarks.sanitize", "benchmarks.smoke", "fwpkm_kernels.env_report"}
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
    assert captured.err.startswith(f"{name.rpartition('.')[2]}: error: cannot write {place}")
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
        ("fwpkm_kernels.demo", ["missing", "--plot=new"], "cannot read missing: No such file or directory"),
    ],
)
def test_what_cannot_be_read_ends_in_one_line(name, arguments, reason, here, as_another, monkeypatch, capsys):
    Path("closed").touch(0o222)
    os.chmod("closed", 0o222)
    module = importlib.import_module(name)
    monkeypatch.setattr(module, "need", lambda *names: None, raising=False)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    assert module.main() == 2
    err = capsys.readouterr().err
    assert err.startswith(f"{name.rpartition('.')[2]}: error: {reason}")
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
