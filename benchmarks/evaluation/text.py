"""Text that every Python brings with it, needles hidden in it, and questions about them.

A needle is a sentence, ``the access code of vokuna is 483920.``; a question is its repetition, and is answered by the
digits of the code. Names in training and in tests are never the same. The text is Python's documentation topics
(`pydoc_data`) and the docstrings of its standard library, all under the licence of the Python Software Foundation;
whole topics are held out, by name.
"""

import ast
import dataclasses
import functools
import importlib
import itertools
import random
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

DIGITS = 6  #: of a code
SENTENCE = "\nthe access code of {} is {}.\n"
HELD_OUT_BYTES = 150_000
RUN = 12  #: held-out text shares no run of this many words with other text
#: Folders of the standard library whose docstrings are no prose, or which some Pythons lack.
SKIPPED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "lib2to3", "idlelib", "pydoc_data", "encodings"}
)
SEPARATOR = "\n\n"


class Corpus(NamedTuple):
    """Text to train on, and whole documents that are held out, by name."""

    training: bytes
    held_out: dict[str, bytes]

    @property
    def fingerprint(self) -> str:
        """A checksum of all the text, which differs between versions of Python."""
        return f"{zlib.crc32(self.training + b''.join(self.held_out.values())):08x}"

    def check_length(self, length: int) -> None:
        """ValueError unless there are so many bytes to train on."""
        if len(self.training) < length:
            raise ValueError(f"`corpus` must have {length} bytes to train on, got {len(self.training)}")

    def stream(self, rng: random.Random) -> bytes:
        """The held-out documents one after the other, in a drawn order."""
        return b"".join(document for _, document in self.documents(rng))

    def documents(self, rng: random.Random) -> list[tuple[str, bytes]]:
        """The held-out documents with their names, in a drawn order."""
        return rng.sample(sorted(self.held_out.items()), len(self.held_out))


@functools.cache
def python_text() -> Corpus:
    """Topics that share no run of `RUN` words with any other text are held out, in a drawn order, until there are
    `HELD_OUT_BYTES`; the other topics, and docstrings, are trained on.

    Many topics are extracts of longer ones, so that a name alone keeps nothing from training.
    """
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    docstrings, rng = _docstrings(), random.Random(0)
    runs = {name: _runs(text) for name, text in topics.items()}
    texts_with = Counter(itertools.chain(*runs.values(), *map(_runs, docstrings)))
    names = rng.sample(sorted(topics), len(topics))
    held_out: dict[str, bytes] = {}
    for name in names:
        if sum(map(len, held_out.values())) < HELD_OUT_BYTES and all(texts_with[run] == 1 for run in runs[name]):
            held_out[name] = (topics[name] + SEPARATOR).encode()
    training = [topics[name] + SEPARATOR for name in names if name not in held_out] + docstrings
    rng.shuffle(training)
    return Corpus("".join(training).encode(), held_out)


def _runs(text: str) -> set[tuple[str, ...]]:
    """All runs of `RUN` words, however the lines are broken; of a shorter text all its words."""
    words = text.split()
    return {tuple(words[i : i + RUN]) for i in range(max(1, len(words) - RUN + 1))}


def _docstrings() -> list[str]:
    """Docstrings of the standard library's modules, classes and functions, in the order of their paths."""
    root, found = Path(sysconfig.get_paths()["stdlib"]), []
    for path in sorted([*root.glob("*.py"), *root.glob("[a-z]*/*.py")]):
        if SKIPPED & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text and len(text) > 80:
                    found.append(text + SEPARATOR)
    return found


def read_files(paths: Iterable[Path]) -> Corpus:
    """Text files of the user's own: the last and every tenth before it are held out; of a single file, its last tenth.

    Raises:
        ValueError: there are no files, or empty ones.
    """
    files = {str(path): path.read_bytes() for path in sorted(paths)}
    if not all(files.values()) or not files:
        empty = [name for name, data in files.items() if not data]
        raise ValueError(f"`paths` must be of files with text, got {', '.join(empty) + ', empty' if empty else 'none'}")
    if len(files) == 1:
        ((name, data),) = files.items()
        cut = len(data) * 9 // 10
        return Corpus(data[:cut], {f"{name}, the last tenth": data[cut:]})
    held_out = {name: files.pop(name) for name in list(files)[::-10]}
    return Corpus(b"".join(files.values()), held_out)


@dataclasses.dataclass(frozen=True)
class Needle:
    """A sentence with a name and its code."""

    name: str
    code: str

    @property
    def sentence(self) -> bytes:
        return SENTENCE.format(self.name, self.code).encode()

    @property
    def question(self) -> bytes:
        """The sentence up to its code."""
        return self.sentence.partition(self.code.encode())[0]


NEEDLE_LENGTH = len(Needle("a" * 6, "0" * DIGITS).sentence)


def draw_needle(rng: random.Random, *, is_test: bool) -> Needle:
    """A needle whose name is one of those for tests, or one of the others."""
    while True:
        name = "".join(rng.choice(letters) for letters in ("bdfgklmnprstvz", "aeiou") * 3)
        if (zlib.crc32(name.encode()) % 4 == 0) == is_test:
            return Needle(name, "".join(rng.choice("0123456789") for _ in range(DIGITS)))


def draw_needles(rng: random.Random, count: int, *, is_test: bool) -> list[Needle]:
    """Needles with different names."""
    needles: dict[str, Needle] = {}
    while len(needles) < count:
        needle = draw_needle(rng, is_test=is_test)
        needles.setdefault(needle.name, needle)
    return list(needles.values())


def hide(text: bytes, sentences: Sequence[tuple[int, bytes]], length: int) -> tuple[bytes, list[int]]:
    """Text with sentences between its bytes, `length` bytes in all, and where each sentence begins.

    Args:
        sentences: where each should begin, in ascending order; one that would overlap the one before follows it.
    """
    parts, starts, used, at = [], [], 0, 0
    for where, sentence in sentences:
        piece = max(0, min(where, length) - at)
        parts += [text[used : used + piece], sentence]
        used, at = used + piece, at + piece + len(sentence)
        starts.append(at - len(sentence))
    parts.append(text[used : used + max(0, length - at)])
    return b"".join(parts)[:length], starts


def training_row(
    corpus: Corpus, length: int, needles: int, questions: int, distance: int, rng: random.Random
) -> tuple[bytes, list[bool]]:
    """`length` bytes of text with needles, each asked for `questions` times at least `distance` bytes later.

    Returns the bytes, and for each whether it is a digit that a question asks for. A question that comes nearer to its
    needle, as other sentences have moved that, does not ask for its digits, nor does one that is moved over the row's
    end. As the miniature models are trained, 56 % of the questions of rows of 513 bytes ask, and 96 % of 4097.

    Raises:
        ValueError: the text for training is shorter than a row.
    """
    corpus.check_length(length)
    events: list[tuple[int, bool, Needle]] = []
    for needle in draw_needles(rng, needles, is_test=False):
        first = rng.randrange(max(1, length - distance - 2 * NEEDLE_LENGTH))
        events.append((first, False, needle))
        events += [
            (rng.randrange(first + distance, max(first + distance, length - NEEDLE_LENGTH) + 1), True, needle)
            for _ in range(questions)
        ]
    events.sort(key=lambda event: event[:2])
    start = rng.randrange(len(corpus.training) - length + 1)
    text = corpus.training[start : start + length]
    data, starts = hide(text, [(where, needle.sentence) for where, _, needle in events], length)
    is_answer, first_starts = [False] * length, {}
    for (_, is_question, needle), start in zip(events, starts, strict=True):
        begin = start + len(needle.question)
        if not is_question:
            first_starts[needle.name] = start
        elif start - first_starts[needle.name] >= distance and begin + DIGITS <= length:
            is_answer[begin : begin + DIGITS] = [True] * DIGITS
    return data, is_answer


def training_batch(
    corpus: Corpus, batch: int, length: int, needles: int, questions: int, distance: int, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """Rows of `length` + 1 bytes, int64 [batch, length + 1], and which of their bytes are asked for, bool."""
    rows = [training_row(corpus, length + 1, needles, questions, distance, rng) for _ in range(batch)]
    return torch.tensor([list(data) for data, _ in rows]), torch.tensor([is_answer for _, is_answer in rows])


def context(text: bytes, length: int, needles: Sequence[Needle], rng: random.Random) -> bytes:
    """`length` bytes of a text, from its beginning and over again where it ends, with needles that are evenly deep.

    Needle number i of m is at a drawn place in the i-th of m equal parts.

    Raises:
        ValueError: the needles are longer than the context, or the text is empty.
    """
    plain = length - NEEDLE_LENGTH * len(needles)
    if plain < 0:
        raise ValueError(f"`length` must be {NEEDLE_LENGTH} for each of {len(needles)} needles or more, got {length}")
    if not text:
        raise ValueError("`text` must not be empty, got 0 bytes")
    text = text * -(-plain // len(text))
    places = [int((i + rng.random()) / len(needles) * plain) + i * NEEDLE_LENGTH for i in range(len(needles))]
    return hide(text, list(zip(places, (needle.sentence for needle in needles), strict=True)), length)[0]
