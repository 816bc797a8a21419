"""FwPKM as an episodic memory that needs no training: ``python -m fwpkm_kernels.demo [FILE]``.

A memory of n² value rows reads a text byte by byte and predicts each byte from the eight before it. It is built from
the package's public functions alone: product_key_lookup, softmax, sparse_value_gather, chunk_value_update_. There is
no network, no training, no other table, no n-gram count.

Queries
    Fixed random features of the last eight bytes. Each of six suffixes of these bytes names, by a random hash, one of
    the n sub-keys of its half, and the query half is the sum of the sub-keys so named: suffixes of 2 and 8 bytes in
    the first half, of 2, 3, 4 and 5 in the second. The lookup finds them again by score, and their 2·4 pairs are the
    slots: two for each of 2, 3, 4, 5 or 8 bytes, so that a known short suffix answers where the long one is new.
    Sub-keys are random unit vectors. Nothing here depends on the text.
Targets
    A fixed random unit vector, the code, for each byte value. The predicted byte is the code nearest to the read.
Memory
    Values start at zero, which predicts byte 0. The text is read in chunks; in each: look up, gather, predict every
    byte from that read, and only then write the chunk. Passes read the same text again, with the memory kept.
Needles
    ``the access code of NAME is 123456``, with random names and codes. Each is one needle of one depth d, hidden so that
    its last digit ends a chunk. When exactly d other bytes have been read and written since, it is probed without
    being written: each digit is predicted from the true eight bytes before it, and the needle counts as found when
    all are right. No such eight bytes occur in the text or in another needle, so only what was written there can
    tell. In pass p a needle has been read p times. Beside each needle a control of the same form, which is never in
    what is read, is probed at the same moment: that is measured chance. Guessing digits finds one code in 10⁶.

Accuracy counts the bytes of the text alone, not those of the needles. A text too short for one pass is repeated.
The same seed gives the same numbers, bit for bit, on the same machine and versions.
"""

from __future__ import annotations

import argparse
import codecs
import dataclasses
import importlib
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fwpkm_kernels import __version__, chunk_value_update_, product_key_lookup, sparse_value_gather

CONTEXT = 8
SUFFIXES = ((2, 8), (2, 3, 4, 5))  #: lengths of the suffixes that name sub-keys, for each half of the query
CODE_DIGITS = 6
DEPTHS = (4096, 16384, 65536, 131072)
DEFAULT_TEXT = "Python's documentation topics"


class DemoError(Exception):
    """Something the user can put right, told in one line."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What a run depends on besides the text; the defaults are the paper's memory."""

    sub_keys: int = 512
    top_k: int = 8
    query_width: int = 512
    value_width: int = 512
    chunk_size: int = 512
    score: str = "idw"
    temperature: float = 1.0
    lr: float = 0.5
    passes: int = 4
    bytes: int = 131072
    needles: int = 16
    depths: tuple[int, ...] = DEPTHS
    seed: int = 0
    device: str = "cpu"
    backend: str = "auto"


class Read(NamedTuple):
    """One read of the memory for M contexts: what it predicts, and what a write needs to know of it."""

    slots: Tensor  # [M, K]
    weights: Tensor  # [M, K]
    predictions: Tensor  # [M, D]


class EpisodicMemory:
    """Product-key slots addressed by random features of eight bytes, holding codes of the byte that comes next."""

    def __init__(self, options: Options) -> None:
        self.options = options
        n, half = options.sub_keys, options.query_width // 2
        # Drawn on the CPU: the same seed means the same features on every device.
        generator = torch.Generator().manual_seed(options.seed)
        keys = torch.randn(1, 2, n, half, generator=generator)
        codes = torch.randn(256, options.value_width, generator=generator)
        lengths = torch.tensor([length for lengths in SUFFIXES for length in lengths])
        hashes = torch.randint(2**63 - 1, (len(lengths), CONTEXT), generator=generator)
        hashes[torch.arange(CONTEXT) < CONTEXT - lengths.unsqueeze(1)] = 0  # bytes before the suffix do not count
        self.keys = torch.nn.functional.normalize(keys, dim=-1).to(options.device)
        self.codes = torch.nn.functional.normalize(codes, dim=-1).to(options.device)  # [256, D]
        self.hashes = hashes.to(options.device)  # [suffixes, 8]
        self.values = torch.zeros(n * n, options.value_width, device=options.device)

    def queries(self, contexts: Tensor) -> Tensor:
        """Contexts [M, 8] of byte values to queries [M, 1, Dk]: each half the sum of the sub-keys that its suffixes name."""
        products = ((contexts.long() + 1).unsqueeze(1) * self.hashes).sum(-1)  # [M, suffixes], modulo 2⁶⁴
        named = (products >> 40) % self.options.sub_keys
        halves = named.split([len(lengths) for lengths in SUFFIXES], dim=1)
        return torch.cat([self.keys[0, a][halves[a]].sum(1) for a in range(2)], dim=-1).unsqueeze(1)

    def read(self, contexts: Tensor) -> Read:
        """Look up and gather for contexts [M, 8]; changes nothing."""
        o = self.options
        scores, slots = product_key_lookup(
            self.queries(contexts), self.keys, o.top_k, score=o.score, backend=o.backend
        )
        weights = torch.softmax(scores.flatten(1) / o.temperature, dim=-1)
        slots = slots.flatten(1)
        return Read(slots, weights, sparse_value_gather(self.values, slots, weights, backend=o.backend))

    def nearest_bytes(self, read: Read) -> Tensor:
        """The byte whose code is nearest to each read, [M]; byte 0 for a read of nothing. All codes have length 1."""
        return (read.predictions @ self.codes.T).argmax(-1)

    def write(self, read: Read, next_bytes: Tensor) -> None:
        """Write the codes of the bytes [M] that came next into the slots that were read."""
        chunk_value_update_(
            self.values,
            read.slots,
            read.weights,
            self.codes[next_bytes.long()],
            read.predictions,
            lr=self.options.lr,
            backend=self.options.backend,
        )


class Needle(NamedTuple):
    """A hidden sentence that ends chunk number ``chunk``, and a control of the same form that is never read."""

    text: bytes
    control: bytes
    depth: int
    chunk: int


class PassResult(NamedTuple):
    """What one pass showed; the lists have one entry per depth."""

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
    for _ in range(100 * count):
        if len(sentences) == count:
            break
        name = "".join(rng.choice(letters) for letters in ("bdfgklmnprstvz", "aeiou") * 3)
        code = "".join(rng.choice("0123456789") for _ in range(CODE_DIGITS))
        sentence = f"\nthe access code of {name} is {code}".encode()
        contexts = set(code_contexts(sentence))
        if not contexts & seen and not any(context in text for context in contexts):
            sentences.append(sentence)
            seen |= contexts
    if len(sentences) < count:
        raise DemoError(f"could not draw {count} different needles; ask for fewer with --needles")
    return sentences


class Stream(NamedTuple):
    """What every pass reads: the text with the needles hidden in it."""

    data: bytes
    is_text: list[bool]
    needles: list[Needle]


def make_stream(text: bytes, options: Options) -> Stream:
    """Hide the needles in the text, one at the end of a chunk, each so early that its depth still fits in the pass.

    The text is repeated where it is too short, and cut where the last chunk is full.
    """
    size, rng = options.chunk_size, random.Random(options.seed)
    sentences = make_sentences(2 * options.needles * len(options.depths), text, rng)
    length = len(sentences[0])
    deepest_first = sorted(options.depths, reverse=True)
    hidden_bytes = options.needles * len(options.depths) * length
    chunks = max(
        math.ceil((options.bytes + hidden_bytes) / size),
        *(depth // size + options.needles * rank for rank, depth in enumerate(deepest_first, 1)),
    )
    needles: dict[int, Needle] = {}
    for depth in deepest_first:
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
    predicted = memory.nearest_bytes(memory.read(to_tensor(contexts, memory.options.device)))
    digits = to_tensor([sentence[-CODE_DIGITS:] for sentence in sentences], memory.options.device)
    return (predicted.view_as(digits) == digits).all(-1).tolist()


def read_pass(memory: EpisodicMemory, stream: Stream, progress: Callable[[int], object]) -> PassResult:
    """Read and write the stream once, chunk by chunk, and probe each needle when its depth is reached."""
    o = memory.options
    started = time.perf_counter()
    data = to_tensor([b"\n" * CONTEXT + stream.data], o.device)[0]
    contexts, next_bytes = data.unfold(0, CONTEXT, 1)[:-1], data[CONTEXT:]
    is_text = torch.tensor(stream.is_text, device=o.device)
    right = torch.zeros((), dtype=torch.int64, device=o.device)
    due: dict[int, list[Needle]] = {}
    for needle in stream.needles:
        due.setdefault(needle.chunk + needle.depth // o.chunk_size, []).append(needle)
    found, controls_found = dict.fromkeys(o.depths, 0), dict.fromkeys(o.depths, 0)
    for chunk, start in enumerate(range(0, len(stream.data), o.chunk_size)):
        part = slice(start, start + o.chunk_size)
        read = memory.read(contexts[part])
        right += ((memory.nearest_bytes(read) == next_bytes[part]) & is_text[part]).sum()
        memory.write(read, next_bytes[part])
        for needle in due.get(chunk, ()):
            hit, control_hit = is_found(memory, [needle.text, needle.control])
            found[needle.depth] += hit
            controls_found[needle.depth] += control_hit
        progress(o.chunk_size)
    accuracy = right.item() / sum(stream.is_text)
    seconds = time.perf_counter() - started
    return PassResult(
        accuracy,
        seconds,
        len(stream.data) / seconds,
        [found[depth] for depth in o.depths],
        [controls_found[depth] for depth in o.depths],
    )


def run(stream: Stream, options: Options, progress: Callable[[int], object] = lambda count: None) -> list[PassResult]:
    """All passes over the stream with one memory; ``progress`` is called with the bytes read since its last call."""
    memory = EpisodicMemory(options)
    return [read_pass(memory, stream, progress) for _ in range(options.passes)]
