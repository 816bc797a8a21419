"""Logs of a run on a GPU: what pytest, in several processes and with -v, and the fuzzer beside it have said."""

import re
from pathlib import Path

#: How pytest begins the line of a test.
_BEGIN = r"^\[gw\d+\](?: \[ *\d+%\])? "


def outcomes(text: str) -> list[str]:
    """A word for each test, such as PASSED."""
    return re.findall(rf"{_BEGIN}([A-Z]+) ", text, re.M)


def failures(text: str) -> list[str]:
    """What failed, from pytest's own summary; where it was killed before that, the names alone."""
    told = re.findall(r"^(?:FAILED|ERROR) .*$", text, re.M)
    names = dict.fromkeys(re.findall(rf"{_BEGIN}((?:FAILED|ERROR) .*?) *$", text, re.M))
    return told + [name for name in names if not any(f"{line} - ".startswith(f"{name} - ") for line in told)]


def culprits(text: str) -> list[str]:
    """The tests and cases that ended their process: of cases those after which the fuzzer said neither another nor how
    many there were."""
    found = re.findall(r"crashed while running '(.*)'", text)
    found += re.findall(r"(case = .*)\n(?:(?!case = |\d+ cases, )[\s\S])*?the fuzzer ended", text)
    return list(dict.fromkeys(found))


def fuzzed(text: str) -> list[str]:
    """How many cases there were with each seed."""
    return re.findall(r"\d+ cases, \d+ failures, seed \d+", text)  # anywhere: pytest begins its lines before a test


def shorten(path: Path, most_bytes: int) -> None:
    """Leave out the middle of a text that is too long."""
    if path.exists() and path.stat().st_size > most_bytes:
        content = path.read_bytes()
        path.write_bytes(content[: most_bytes // 2] + b"\n...\n" + content[-most_bytes // 2 :])
