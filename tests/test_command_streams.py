"""Standard streams of programs: any text in any encoding, pipes that end, and files that are a stream already."""

import contextlib
import io
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fwpkm_kernels import _commands
from fwpkm_kernels._commands import CommandError, command
from tests.helpers.files import FULL


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
