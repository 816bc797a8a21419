"""Files for tests of programs that write and read them."""

import os
from pathlib import Path

import pytest

FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


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
