"""Files of programs: tried before the work, which leaves them as they were, and written whole after it."""

import contextlib
import os
import resource
import socket
import stat
import threading
from pathlib import Path

import pytest

from fwpkm_kernels._commands import CommandError, Lines, check_outputs, make_folder, reading, write_output
from tests.helpers.files import FULL, plant


def contents(folder: Path) -> dict[str, object]:
    """All that is in a folder: names, links, contents, modes and times."""
    found = {}
    for path in folder.rglob("*"):
        about = path.lstat()
        what = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path)] = (what, about.st_mode, about.st_mtime_ns if path.is_file() else 0)
    return found


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
