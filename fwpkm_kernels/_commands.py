"""What the programs share: files tried before the work and written whole after it, and text for any terminal."""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import io
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")

#: Bytes that a trial writes: where not even they fit, the disk is full.
_TRIAL = 4096


class CommandError(Exception):
    """What the user can put right, told in one line."""


def one_line(text: object) -> str:
    """The text with its line breaks escaped."""
    return "\\n".join(str(text).splitlines())


def command(name: str) -> Callable[[Callable[_P, int]], Callable[_P, int]]:
    """Decorate the main function of the program ``name``: it may print any text, and raise CommandError.

    Within it the standard streams escape what their encoding lacks, and drop what a pipe no longer takes, so that the
    files asked for are written all the same; the caller finds its own streams again. The exit status is 2 after a
    CommandError, and where standard output failed.
    """

    def decorate(main: Callable[_P, int]) -> Callable[_P, int]:
        @functools.wraps(main)
        def run(*args: _P.args, **options: _P.kwargs) -> int:
            lost: list[OSError] = []
            with _standard_streams(lost):
                try:
                    status = main(*args, **options)
                except CommandError as error:
                    print(f"{name}: error: {one_line(error)}", file=sys.stderr)
                    return 2
                sys.stdout.flush()
                if lost and not isinstance(lost[0], BrokenPipeError):
                    print(f"{name}: error: cannot write standard output: {lost[0].strerror}", file=sys.stderr)
                    return status or 2
                return status

        return run

    return decorate


@contextlib.contextmanager
def _standard_streams(lost: list[OSError]) -> Iterator[None]:
    """Standard output and error that take any text; ``lost`` gets the first error of standard output."""
    before = sys.stdout, sys.stderr
    with _any_text(before[0], lost) as out, _any_text(before[1], []) as err:
        sys.stdout, sys.stderr = out, err
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


@contextlib.contextmanager
def _any_text(stream: Any, lost: list[OSError]) -> Iterator[Any]:
    """A stream to use in place of a standard one."""
    if stream is None or getattr(stream, "closed", False):
        with open(os.devnull, "w", encoding="utf-8", errors="backslashreplace") as nowhere:
            yield nowhere
    elif not isinstance(stream, io.TextIOWrapper):  # a StringIO, or a notebook's
        yield stream
    else:
        with contextlib.suppress(OSError):
            stream.flush()
        buffer: Any = stream.buffer
        with contextlib.suppress(OSError):  # raised where there is no file below
            # Not its own buffer: that would keep what could not be written, and fail once more when Python ends.
            buffer = io.BufferedWriter(_Descriptor(stream.fileno(), lost))
        text = io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", line_buffering=True)
        try:
            yield text
        finally:
            text.flush()
            text.detach()


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
    """Import a module; CommandError if it cannot be, with the extra that installs it."""
    package = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == package:
            raise CommandError(f"{package} is missing; install it with: pip install 'fwpkm_kernels[{extra}]'") from None
        raise CommandError(f"{package} cannot be imported: {error}") from error
    except ImportError as error:
        raise CommandError(f"{package} cannot be imported: {error}") from error


@contextlib.contextmanager
def _writing(path: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CommandError(f"cannot write {path}: {reason}") from None


def check_outputs(*paths: str | Path | None, read: str | Path | None = None) -> None:
    """Raise CommandError unless each path can be written, and they are files of their own; None is no path.

    A file that exists keeps its content, and one that does not exist is not left behind. ``read`` is a file that is
    read, which no path may be.
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
    """Open a file for writing, or create it till the stack is closed; the numbers that tell files apart."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return _create(_target(path), stack)
    if stat.S_ISDIR(found.st_mode):
        os.open(path, os.O_WRONLY)  # which raises what there is to say
    if not stat.S_ISREG(found.st_mode):  # a device, or a pipe that may have no reader yet
        if not _may(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return None
    os.close(os.open(path, os.O_WRONLY))
    if _is_replaced(path):
        _create(_beside(path), stack)
    return found.st_dev, found.st_ino


def _may(path: str | Path, mode: int) -> bool:
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def _create(path: str, stack: contextlib.ExitStack) -> tuple[int, int]:
    with open(path, "xb") as file:
        stack.callback(Path(path).unlink, missing_ok=True)
        file.write(bytes(_TRIAL))
        file.flush()
        found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino


def _target(path: str | Path) -> str:
    """The file that a path means, which may not exist. A relative path stays so: folders above the current one may be
    another user's."""
    return os.path.realpath(path) if os.path.islink(path) else os.fspath(path)


def _beside(path: str | Path) -> str:
    """A new file in the folder of the file that a path means."""
    return os.path.join(os.path.dirname(_target(path)), f".{secrets.token_hex(8)}.part")


def _own_stream(path: str | Path) -> int | None:
    """The descriptor, 1 or 2, of the standard stream that a path means, as /dev/stdout does."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
    return None


def _is_replaced(path: str | Path) -> bool:
    """Whether a file is written beside its place and then moved there: not devices, pipes, what a standard stream
    writes to, and a file in a folder that takes no others."""
    try:
        is_file = stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        return True
    folder = os.path.dirname(_target(path)) or "."
    return is_file and _own_stream(path) is None and _may(folder, os.W_OK | os.X_OK)


def write_output(path: str | Path, data: str | bytes) -> None:
    """Write a file whole or not at all, where that can be had; CommandError says why it cannot be written."""
    content = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
    with _writing(path):
        if not _is_replaced(path):
            _write_in_place(path, content)
            return
        place, beside = _target(path), _beside(path)
        try:
            with open(beside, "xb") as file:
                file.write(content)
            if os.path.exists(place):
                shutil.copymode(place, beside)
            try:
                os.replace(beside, place)
            except OSError:  # a mount point, or another user's file in a folder like /tmp: its content can be changed
                _write_in_place(place, content)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(beside)


def _write_in_place(path: str | Path, content: bytes) -> None:
    with _open_in_place(path, "wb") as file:
        _write_all(file, content)


def _write_all(file: io.FileIO, content: bytes) -> None:
    """Until an error says why there is no more; a disk that is nearly full takes a part first."""
    while content:
        content = content[file.write(content) :]


def _open_in_place(path: str | Path, mode: str) -> io.FileIO:
    """Open without a buffer, which would fail again when it is closed."""
    stream = _own_stream(path)
    if stream is None:
        return io.FileIO(path, mode)
    sys.stdout.flush()
    return io.FileIO(os.dup(stream), "wb")  # opened anew, a file would be emptied


class Lines:
    """A file of lines that are written as they come; CommandError if it cannot be opened or written."""

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


def check_folder(path: str | Path, *names: str) -> None:
    """Raise CommandError unless files of these names can be written in a folder, which may have to be made first.

    Leaves nothing behind.
    """
    path, made = Path(path), []
    try:
        with _writing(path):
            for folder in reversed((path, *path.parents)):
                if not folder.exists():
                    folder.mkdir()
                    made.append(folder)
        check_outputs(*(path / name for name in names or (f".{secrets.token_hex(8)}",)))
    finally:
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()


def try_all(actions: Iterable[Callable[[], _T]]) -> list[_T]:
    """Do all of them, the others too where some raise CommandError; what they gave, or one CommandError for all."""
    given, errors = [], []
    for action in actions:
        try:
            given.append(action())
        except CommandError as error:
            errors.append(str(error))
    if errors:
        raise CommandError("; ".join(errors))
    return given
