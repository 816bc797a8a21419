"""What the memories of the demo read: a text in which needles are hidden, and a pass over it."""

import importlib
import itertools
import math
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .._commands import CommandError, reading
from .memory import CONTEXT, EpisodicMemory, Options

NEEDLE = "\nthe access code of {} is {}"
NAME_LETTERS, CODE_DIGITS = 6, 6
NEEDLE_LENGTH = len(NEEDLE.format("", "")) + NAME_LETTERS + CODE_DIGITS
CONTROL_BYTE = re.compile(rb"[\0-\x08\x0e-\x1a\x1c-\x1f]")  #: all but white space and escape; no text has one
DEFAULT_TEXT = "Python's documentation topics"


class Needle(NamedTuple):
    """A hidden sentence that ends chunk number ``chunk``, and a control of the same form that is never read."""

    text: bytes
    control: bytes
    depth: int
    chunk: int


class Stream(NamedTuple):
    """What every pass reads: the text with the needles hidden in it."""

    data: bytes
    is_text: list[bool]
    needles: list[Needle]

    def commonest(self) -> float:
        """The share of the commonest byte: what is right of the guess that it comes always."""
        return max(map(self.data.count, set(self.data))) / len(self.data)


class PassResult(NamedTuple):
    """What one pass of a memory showed; the lists have one entry per depth."""

    accuracy: float
    seconds: float
    bytes_per_second: float
    found: list[int]
    controls_found: list[int]


def code_contexts(needle: bytes) -> list[bytes]:
    """The eight bytes before each digit of a needle's code."""
    return [needle[i - CONTEXT : i] for i in range(len(needle) - CODE_DIGITS, len(needle))]


def make_sentences(count: int, text: bytes, rng: random.Random) -> list[bytes]:
    """Needle sentences whose code digits each follow eight bytes found neither in the text nor in another sentence."""
    sentences: list[bytes] = []
    seen: set[bytes] = set()
    repeated_text = text + text[:CONTEXT]
    for _ in range(100 * count):
        name = "".join(rng.choice(letters) for letters in ("bdfgklmnprstvz", "aeiou") * (NAME_LETTERS // 2))
        code = "".join(rng.choice("0123456789") for _ in range(CODE_DIGITS))
        sentence = NEEDLE.format(name, code).encode()
        contexts = set(code_contexts(sentence))
        if not contexts & seen and not any(context in repeated_text for context in contexts):
            sentences.append(sentence)
            seen |= contexts
            if len(sentences) == count:
                return sentences
    raise CommandError(f"could not draw {count} different needles; ask for fewer with --needles")


def chunks_in_pass(options: Options) -> int:
    """Chunks of one pass: enough for the bytes of text asked for, and for every needle to reach its depth."""
    hidden = options.needles * len(options.depths) * NEEDLE_LENGTH
    deepest_first = sorted(options.depths, reverse=True)
    return max(
        math.ceil((options.text_bytes + hidden) / options.chunk_size),
        *(depth // options.chunk_size + options.needles * rank for rank, depth in enumerate(deepest_first, 1)),
    )


def make_stream(text: bytes, options: Options) -> Stream:
    """Hide the needles in the text, one at the end of a chunk, each so early that its depth still fits in the pass.

    The text is repeated where it is too short, and cut where the last chunk is full.
    """
    size, chunks, rng = options.chunk_size, chunks_in_pass(options), random.Random(options.seed)
    sentences = make_sentences(2 * options.needles * len(options.depths), text, rng)
    needles: dict[int, Needle] = {}
    for depth in sorted(options.depths, reverse=True):
        free = [chunk for chunk in range(chunks - depth // size) if chunk not in needles]
        for chunk in sorted(rng.sample(free, options.needles)):
            needles[chunk] = Needle(sentences.pop(), sentences.pop(), depth, chunk)

    endless_text = itertools.cycle(text)
    data, is_text = bytearray(), []
    for chunk in range(chunks):
        hidden = needles[chunk].text if chunk in needles else b""
        data += bytes(itertools.islice(endless_text, size - len(hidden))) + hidden
        is_text += [True] * (size - len(hidden)) + [False] * len(hidden)
    return Stream(bytes(data), is_text, [needles[chunk] for chunk in sorted(needles)])


def to_tensor(contexts: Iterable[bytes], device: str) -> Tensor:
    """Byte strings of one length as a uint8 tensor with a row for each."""
    return torch.tensor([list(context) for context in contexts], dtype=torch.uint8, device=device)


def is_found(memory: EpisodicMemory, sentences: Sequence[bytes]) -> list[bool]:
    """For each sentence whether every digit of its code is predicted, each from the true eight bytes before it."""
    contexts = [context for sentence in sentences for context in code_contexts(sentence)]
    predicted = memory.recall(to_tensor(contexts, memory.options.device))
    digits = to_tensor([sentence[-CODE_DIGITS:] for sentence in sentences], memory.options.device)
    return (predicted.view_as(digits) == digits).all(-1).tolist()


def read_pass(memory: EpisodicMemory, stream: Stream, progress: Callable[[int], object]) -> PassResult:
    """Read the stream once more, chunk by chunk, and probe each needle when its depth is reached."""
    o = memory.options
    started = time.perf_counter()
    data = to_tensor([stream.data], o.device)[0]
    found: Counter[int] = Counter()
    controls_found: Counter[int] = Counter()
    predicted = []
    for chunk, part in enumerate(data.split(o.chunk_size)):
        predicted.append(memory.read(part))
        for needle in stream.needles:
            if needle.chunk + needle.depth // o.chunk_size == chunk:
                hit, control_hit = is_found(memory, [needle.text, needle.control])
                found[needle.depth] += hit
                controls_found[needle.depth] += control_hit
        progress(len(part))
    is_right = torch.cat(predicted)[:-1] == data[1:]
    counted = torch.tensor(stream.is_text[1:], device=o.device)
    accuracy = int((is_right & counted).sum()) / int(counted.sum())
    seconds = time.perf_counter() - started
    return PassResult(
        accuracy,
        seconds,
        len(stream.data) / seconds,
        [found[depth] for depth in o.depths],
        [controls_found[depth] for depth in o.depths],
    )


def default_text() -> bytes:
    """The prose of Python's documentation topics, in the order of their names."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return "\n".join(topics[name] for name in sorted(topics)).encode()


def read_text(path: Path, limit: int) -> bytes:
    """At most ``limit`` bytes of a text file in any encoding that has no control bytes but white space.

    CommandError says what is wrong with any other file.
    """
    with reading(path), path.open("rb") as file:
        data = file.read(limit)
    if not data:
        raise CommandError(f"{path} is empty; the demo needs a text to read")
    if byte := CONTROL_BYTE.search(data):
        raise CommandError(f"{path} is a binary file: byte {byte.start()} is 0x{byte[0].hex()}")
    return data
