"""What the programs share: files tried before the work and written whole after it, and text for any terminal."""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import io
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")

#: Bytes that are written to try a file: a disk where not even these fit is full.
_TRIAL = 4096


class CommandError(Exception):
    """An error that the user can put right; the program tells it in one line."""


def one_line(text: object) -> str:
    """The text with its line breaks and all else that moves the cursor escaped."""
    text = str(text).strip()
    return re.sub(r"[\0-\x1f\x7f-\x9f\u2028\u2029]", lambda found: found[0].encode("unicode_escape").decode(), text)


def command(name: str) -> Callable[[Callable[_P, int]], Callable[_P, int]]:
    """Decorate the main function of the program ``name``, which may then print any text and raise CommandError.

    While it runs, the standard streams escape the characters that their encoding lacks. Text for a pipe that nobody
    reads any more is dropped, so that the program still writes its files; any other failure of standard output, and a
    CommandError, make the exit status 2. The caller's streams are put back at the end.
    """

    def decorate(main: Callable[_P, int]) -> Callable[_P, int]:
        @functools.wraps(main)
        def run(*args: _P.args, **options: _P.kwargs) -> int:
            lost: list[OSError] = []
            with _any_text("stdout", lost), _any_text("stderr", []):
                try:
                    status = main(*args, **options)
                except CommandError as error:
                    print(f"{name}: error: {one_line(error)}", file=sys.stderr)
                    return 2
                except SystemExit as end:
                    if end.code or not lost:
                        raise
                    status = 0  # --help ended the program, and its text could not be written
                sys.stdout.flush()
                if lost and not isinstance(lost[0], BrokenPipeError):
                    print(f"{name}: error: cannot write standard output: {lost[0].strerror}", file=sys.stderr)
                    return status or 2
                return status

        return run

    return decorate


@contextlib.contextmanager
def _any_text(name: str, lost: list[OSError]) -> Iterator[None]:
    """Replace a standard stream by one that takes any text; ``lost`` gets the first error of the file below it."""
    before: Any = getattr(sys, name)
    with contextlib.ExitStack() as stack:
        now = before  # a StringIO or a notebook's stream takes any text as it is
        if before is None or getattr(before, "closed", False):
            now = stack.enter_context(open(os.devnull, "w", encoding="utf-8", errors="backslashreplace"))
        elif isinstance(before, io.TextIOWrapper):
            with contextlib.suppress(OSError):
                before.flush()
            buffer: Any = before.buffer
            with contextlib.suppress(OSError):  # fileno() raises it for a stream without a file
                # The stream's own buffer would keep what could not be written, and fail again when Python ends.
                buffer = io.BufferedWriter(_Descriptor(before.fileno(), lost))
            now = io.TextIOWrapper(buffer, before.encoding, "backslashreplace", line_buffering=True)
            stack.callback(now.detach)  # flushes, and leaves the file open
        setattr(sys, name, now)
        stack.callback(setattr, sys, name, before)
        yield


class _Descriptor(io.FileIO):
    """The file of a standard stream; ``lost`` gets its first error, and whatever is written from then on is dropped."""

    def __init__(self, descriptor: int, lost: list[OSError]) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.lost = lost

    def write(self, data: Any, /) -> int:
        if not self.lost:
            try:
                return super().write(data)
            except OSError as error:
                self.lost.append(error)
        return len(data)


def need(module: str, extra: str) -> Any:
    """Import a module; CommandError says which extra installs it, or why it cannot be imported."""
    package = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # a missing library and a cache that cannot be made raise OSError
        if isinstance(error, ModuleNotFoundError) and (error.name or package).split(".")[0] == package:
            reason = f"is missing; install it with: pip install 'fwpkm_kernels[{extra}]'"
        else:
            reason = f"cannot be imported: {error}"
        raise CommandError(f"{package} {reason}") from error


@contextlib.contextmanager
def _telling(action: str, path: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # a name that no file can have raises ValueError
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CommandError(f"cannot {action} {path}: {reason}") from None


def reading(path: str | Path) -> contextlib.AbstractContextManager[None]:
    """The context in which a program reads the file at a path; CommandError says why it cannot be read."""
    return _telling("read", path)


def _writing(path: str | Path) -> contextlib.AbstractContextManager[None]:
    return _telling("write", path)


def check_outputs(*paths: str | Path | None, read: str | Path | None = None) -> None:
    """Raise CommandError unless each path can be written, and no two are the same file; None stands for no path.

    A file that exists keeps its content, and one that does not exist is not left behind. ``read`` is a file that the
    program reads, so that no path may be the same file.
    """
    seen: dict[tuple[int, int], str] = {}
    with contextlib.suppress(OSError, ValueError):
        if read is not None and stat.S_ISREG((found := os.stat(read)).st_mode):
            seen[found.st_dev, found.st_ino] = "is the file that is read"
    with contextlib.ExitStack() as stack:
        for path in paths:
            if path is None:
                continue
            with _writing(path):
                file = _try(path, stack)
            if file in seen:
                raise CommandError(f"cannot write {path}: it {seen[file]}")
            if file is not None:
                seen[file] = f"is the same file as {path}"


def _try(path: str | Path, stack: contextlib.ExitStack) -> tuple[int, int] | None:
    """Open a file for writing, or create it until the stack is closed; its device and inode if it is a regular file."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        # A path that is no link stays relative, since the folders above the current one may be closed to this user.
        return _create(os.path.realpath(path) if os.path.islink(path) else path, stack)
    if stat.S_ISFIFO(found.st_mode) or _own_stream(path) is not None:
        # Only asked: opening a pipe would wait for its reader, and a socket cannot be opened.
        if not _may(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    else:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY))  # raises for a folder
    if _is_replaced(path):
        _create(_beside(path), stack)
    return (found.st_dev, found.st_ino) if stat.S_ISREG(found.st_mode) else None


def _may(path: str | Path, mode: int) -> bool:
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def _create(path: str | Path, stack: contextlib.ExitStack) -> tuple[int, int]:
    with open(path, "xb") as file:
        stack.callback(Path(path).unlink, missing_ok=True)
        file.write(bytes(_TRIAL))
        file.flush()
        found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino


def _beside(path: str | Path) -> str:
    """A name for a new file in the folder of another file."""
    return os.path.join(os.path.dirname(path), f".{secrets.token_hex(8)}.part")


def _own_stream(path: str | Path) -> int | None:
    """The open descriptor of what a path names: 3 for /dev/fd/3, and 1 for the file that is standard output."""
    named = re.fullmatch(r"/(?:dev|proc/self)/fd/(\d{1,9})", os.fspath(path))
    for descriptor in (1, 2, *map(int, named.groups() if named else ())):
        with contextlib.suppress(OSError, ValueError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
    return None


def is_stream(path: str | Path) -> bool:
    """Whether a path is a device, a pipe or an open stream, so that no other file has a place beside it."""
    return _own_stream(path) is not None or (os.path.exists(path) and not os.path.isfile(path))


def _is_replaced(path: str | Path) -> bool:
    """Whether a file is written under another name and then moved into place.

    That is so for a new file, and for a regular file of this user that has one name, is no open stream, and lies in a
    folder where this user may make files.
    """
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return True
    is_own = stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and found.st_uid == os.geteuid()
    return is_own and _own_stream(path) is None and _may(os.path.dirname(path) or ".", os.W_OK | os.X_OK)


def write_output(path: str | Path, data: str | bytes | memoryview) -> None:
    """Write a file; CommandError says why it cannot be written.

    A file of the user's own is replaced whole or not at all. Links, and files with several names or of other users, are
    written in place, and so remain what they are.
    """
    content = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
    with _writing(path):
        if not _is_replaced(path):
            _write_in_place(path, content)
            return
        beside = _beside(path)
        try:
            with open(beside, "xb") as file:
                file.write(content)
            with contextlib.suppress(FileNotFoundError):
                shutil.copymode(path, beside)
            try:
                os.replace(beside, path)
            except OSError:  # a mount point cannot be replaced, but its content can be changed
                _write_in_place(path, content)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(beside)


def _write_in_place(path: str | Path, content: bytes | memoryview) -> None:
    with _open_in_place(path, "wb") as file:
        _write_all(file, content)


def _write_all(file: io.FileIO, content: bytes | memoryview) -> None:
    """Write all of the content: a disk that is nearly full takes a part of it, and raises at the next call."""
    while content:
        content = content[file.write(content) :]


def _open_in_place(path: str | Path, mode: str) -> io.FileIO:
    """Open a file without a buffer, since a buffer that could not be written fails again when it is closed."""
    stream = _own_stream(path)
    if stream is not None:
        for printed in (sys.stdout, sys.stderr):
            printed.flush()
        return io.FileIO(os.dup(stream), "wb")  # opening the path again would empty the file
    # O_CREAT is left out for a file that exists: in folders like /tmp it is refused for another user's file.
    drop = os.O_CREAT if os.path.exists(path) else 0
    return io.FileIO(path, mode, opener=lambda name, flags: os.open(name, flags & ~drop, 0o666))


class Lines:
    """A file of lines, each written at once; CommandError if it cannot be opened or written."""

    def __init__(self, path: str | Path, *, append: bool = False) -> None:
        self.path = path
        with _writing(path):
            self.file = _open_in_place(path, "ab" if append else "wb")

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def write(self, line: str) -> None:
        content = (line + "\n").encode("utf-8", "backslashreplace")
        with _writing(self.path):
            _write_all(self.file, content)


def make_folder(path: str | Path, *names: str) -> None:
    """Make a folder; CommandError unless files of these names, or a new one if none is given, can be written in it."""
    with _writing(path):
        os.makedirs(path, exist_ok=True)
    check_outputs(*(os.path.join(path, name) for name in names or (secrets.token_hex(8),)))


def try_all(actions: Iterable[Callable[[], _T]]) -> list[_T]:
    """Call all actions, whichever raise CommandError; what they returned, or one CommandError with all the reasons."""
    given, errors = [], []
    for action in actions:
        try:
            given.append(action())
        except CommandError as error:
            errors.append(str(error))
    if errors:
        raise CommandError("; ".join(errors))
    return given
