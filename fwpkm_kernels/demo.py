"""FwPKM as an episodic memory that needs no training: ``python -m fwpkm_kernels.demo [FILE]``.

A memory of n² value rows reads a text byte by byte and predicts each byte from the eight before it. It is built from
the package's public functions alone: product_key_lookup, softmax, sparse_value_gather, chunk_value_update_. There is
no network, no training, no other table, no n-gram count.

Queries
    Fixed random features of the last eight bytes. Six hashed suffixes of these bytes each name one of the n sub-keys
    of a half, and the query half is the sum of the sub-keys so named: suffixes of 3 and 8 bytes in the first half, of
    2, 4, 5 and 8 in the second. The lookup finds them again by score, and their 2·4 pairs are the slots: one that
    depends on the last 3 bytes only, one on 4, one on 5, and five on all 8, so that a known short suffix answers
    where the long one is new. Sub-keys and hashes are random; nothing here depends on the text.
Targets
    A fixed random unit vector, the code, for each byte value. The predicted byte is the code nearest to the read.
Memory
    Values start at zero, which predicts byte 0. The text is read in chunks; in each: look up, gather, predict every
    byte from that read, and only then write the chunk. Passes read the same text again, with the memory kept.
Needles
    ``the access code of NAME is 123456``, with random names and codes. Each has a depth d, and is hidden in the text so
    that its last digit ends a chunk. When exactly d other bytes have been read and written since, it is probed, which
    writes nothing: each digit is predicted from the true eight bytes before it, and the needle is found if all are
    right. These eight bytes are nowhere else in the text or the needles. In pass p a needle has been read p times.
    Chance is measured beside it: a control, a sentence of the same form that is never read, is probed at the same
    moments. Guessing digits would find one code in 10⁶.

Accuracy counts the bytes of the text, not those of the needles. A text too short for one pass is repeated. The same
seed gives the same numbers, bit for bit, on the same machine with the same versions and number of threads.
"""

from __future__ import annotations

import argparse
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
import torch.nn.functional as F
from torch import Tensor

from fwpkm_kernels import __version__, chunk_value_update_, product_key_lookup, sparse_value_gather

CONTEXT = 8
SUFFIXES = ((3, 8), (2, 4, 5, 8))  #: lengths of the suffixes that name sub-keys, for each half of the query
NEEDLE = "\nthe access code of {} is {}"
NAME_LETTERS, CODE_DIGITS = 6, 6
NEEDLE_LENGTH = len(NEEDLE.format("", "")) + NAME_LETTERS + CODE_DIGITS
DEPTHS = (4096, 16384, 65536, 131072)
CONTROL_BYTES = frozenset(range(32)) - frozenset(b"\t\n\v\f\r\x1b")  #: no text has these
DEFAULT_TEXT = "Python's documentation topics"


class DemoError(Exception):
    """Something the user can put right, told in one line."""


def _option(default: Any, text: str) -> Any:
    """A field of Options that is also a command-line option, with its line of help."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Options:
    """What a run depends on besides the text; the defaults are the paper's memory."""

    passes: int = _option(4, "how often the text is read")
    seed: int = _option(0, "of sub-keys, hashes, codes and needles")
    device: str = _option("cuda" if torch.cuda.is_available() else "cpu", "torch device of the memory")
    backend: str = _option("auto", "auto, torch or triton")
    text_bytes: int = _option(131072, "bytes of text to read in a pass; more where the deepest needles need it")
    needles: int = _option(16, "needles for each depth")
    depths: tuple[int, ...] = _option(DEPTHS, "bytes between a needle and its probe, multiples of the chunk size")
    sub_keys: int = _option(512, "sub-keys n for each half, so n² slots")
    top_k: int = _option(8, "slots K that a byte reads and writes")
    query_width: int = _option(512, "width Dk of a query")
    value_width: int = _option(512, "width D of a value row")
    chunk_size: int = _option(512, "bytes C that are read before they are written")
    score: str = _option("idw", "idw or dot")
    temperature: float = _option(1.0, "of the softmax over the K scores")
    lr: float = _option(0.5, "step size of a write")


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
        self.keys = F.normalize(keys, dim=-1).to(options.device)
        self.codes = F.normalize(codes, dim=-1).to(options.device)  # [256, D]
        self.hashes = hashes.to(options.device)  # [suffixes, 8]
        self.values = torch.zeros(n * n, options.value_width, device=options.device)
        # The first calls may compile kernels, which is not to be timed. A write without error changes nothing.
        read = self.read(torch.zeros(options.chunk_size, CONTEXT, dtype=torch.uint8, device=options.device))
        self._write(read, read.predictions)

    def queries(self, contexts: Tensor) -> Tensor:
        """Contexts [M, 8] to queries [M, 1, Dk]: each half the sum of the sub-keys that its suffixes name."""
        products = ((contexts.long() + 1).unsqueeze(1) * self.hashes).sum(-1)  # [M, suffixes], modulo 2⁶⁴
        named = (products >> 40) % self.options.sub_keys
        halves = named.split([len(lengths) for lengths in SUFFIXES], dim=1)
        sums = (F.embedding_bag(halves[a], self.keys[0, a], mode="sum") for a in range(2))
        return torch.cat(tuple(sums), dim=-1).unsqueeze(1)

    def read(self, contexts: Tensor) -> Read:
        """Look up and gather for contexts [M, 8]; changes nothing."""
        o = self.options
        scores, slots = product_key_lookup(self.queries(contexts), self.keys, o.top_k, score=o.score, backend=o.backend)
        weights = torch.softmax(scores.flatten(1) / o.temperature, dim=-1)
        slots = slots.flatten(1)
        return Read(slots, weights, sparse_value_gather(self.values, slots, weights, backend=o.backend))

    def nearest_bytes(self, read: Read) -> Tensor:
        """The byte whose code is nearest to each read, [M]; byte 0 for a read of nothing. All codes have length 1."""
        return (read.predictions @ self.codes.T).argmax(-1)

    def write(self, read: Read, next_bytes: Tensor) -> None:
        """Write the codes of the bytes [M] that came next into the slots that were read."""
        self._write(read, self.codes[next_bytes.long()])

    def _write(self, read: Read, targets: Tensor) -> None:
        lr, backend = self.options.lr, self.options.backend
        chunk_value_update_(self.values, read.slots, read.weights, targets, read.predictions, lr=lr, backend=backend)


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
    repeated_text = text + text[:CONTEXT]
    for _ in range(100 * count):
        if len(sentences) == count:
            break
        name = "".join(rng.choice(letters) for letters in ("bdfgklmnprstvz", "aeiou") * (NAME_LETTERS // 2))
        code = "".join(rng.choice("0123456789") for _ in range(CODE_DIGITS))
        sentence = NEEDLE.format(name, code).encode()
        contexts = set(code_contexts(sentence))
        if not contexts & seen and not any(context in repeated_text for context in contexts):
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


def default_text() -> bytes:
    """The prose of Python's documentation topics, in the order of their names."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return "\n".join(topics[name] for name in sorted(topics)).encode()


def read_text(path: Path, limit: int) -> bytes:
    """At most ``limit`` bytes of a text file in any encoding that has no control bytes but white space.

    DemoError says what is wrong with any other file.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit)
    except OSError as error:
        raise DemoError(f"cannot read {path}: {error.strerror}") from None
    if not data:
        raise DemoError(f"{path} is empty; the demo needs a text to read")
    for position, byte in enumerate(data):
        if byte in CONTROL_BYTES:
            raise DemoError(f"{path} is a binary file: byte {position} is 0x{byte:02x}")
    return data


def check(options: Options) -> None:
    """Raise DemoError for options that no run can have."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name != "seed" and isinstance(value, (int, float)) and not value > 0:
            raise DemoError(f"{_flag(field.name)} must be positive, got {value}")
    if options.chunk_size < NEEDLE_LENGTH:
        raise DemoError(f"--chunk-size must hold a needle of {NEEDLE_LENGTH} bytes, got {options.chunk_size}")
    if len(set(options.depths)) < len(options.depths) or any(d < 1 or d % options.chunk_size for d in options.depths):
        raise DemoError(f"--depths must be different multiples of --chunk-size {options.chunk_size}")
    if options.query_width % 2 or options.top_k > options.sub_keys:
        raise DemoError("--query-width must be even and --top-k at most --sub-keys")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Options]:
    """The command line: where to read and write, and the options of the run."""
    parser = argparse.ArgumentParser(
        prog="python -m fwpkm_kernels.demo",
        description="FwPKM as an episodic memory without training: it reads a text, predicts every byte from the eight "
        "before it, and recalls access codes hidden in the text.",
    )
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help=f"a text (default: {DEFAULT_TEXT})")
    parser.add_argument("--plot", type=Path, default=Path("demo.png"), metavar="PNG", help="(default: demo.png)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write options and results as JSON too")
    choices = {"score": ("idw", "dot"), "backend": ("auto", "torch", "triton")}
    for field in dataclasses.fields(Options):
        default: Any = field.default
        many = isinstance(default, tuple)
        shown = " ".join(map(str, default)) if many else default
        parser.add_argument(
            _flag(field.name),
            type=int if many else type(default),
            nargs="+" if many else None,
            choices=choices.get(field.name),
            default=default,
            help=f"{field.metadata['help']} (default: {shown})",
        )
    arguments = parser.parse_args(argv)
    values = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Options)}
    options = Options(**{**values, "depths": tuple(values["depths"])})
    check(options)
    return arguments, options


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        package = name.split(".")[0]
        raise DemoError(f"{package} is missing; install it with: pip install 'fwpkm_kernels[demo]'") from None


def depth_label(depth: int) -> str:
    """4096 as 4K; any other number in full."""
    return f"{depth // 1024}K" if depth % 1024 == 0 else str(depth)


def chance(results: Sequence[PassResult]) -> list[float]:
    """Controls found at each depth, on average over the passes."""
    return [sum(found) / len(results) for found in zip(*(r.controls_found for r in results), strict=True)]


def show(results: Sequence[PassResult], stream: Stream, options: Options, commonest: float) -> None:
    """Print the tables of accuracy and of needles."""
    console, table = _import("rich.console"), _import("rich.table")
    out = console.Console()
    accuracy = table.Table("pass", "bytes predicted", "seconds", "bytes/s", title="Accuracy by pass")
    needles = table.Table("read", title=f"Needles found, of {options.needles} at each depth")
    for depth in options.depths:
        needles.add_column(f"after {depth_label(depth)}", justify="right")
    for number, result in enumerate(results, 1):
        speed = f"{result.bytes_per_second:,.0f}"
        accuracy.add_row(str(number), f"{result.accuracy:.1%}", f"{result.seconds:.2f}", speed)
        needles.add_row("once" if number == 1 else f"{number} times", *map(str, result.found))
    needles.add_row("never (chance)", *(f"{mean:g}" for mean in chance(results)))
    out.print(accuracy)
    out.print(
        f"Always the commonest byte: {commonest:.1%}. bytes/s count {len(stream.data):,} bytes, needles included.\n"
    )
    out.print(needles)
    out.print(f"Guessing all {CODE_DIGITS} digits finds {10.0**-CODE_DIGITS * options.needles:g} of {options.needles}.")


def plot(results: Sequence[PassResult], options: Options, commonest: float, path: Path) -> None:
    """Draw accuracy by pass, and needle recall by depth and pass."""
    figure = _import("matplotlib.figure").Figure(figsize=(11, 4.6), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2, width_ratios=(1, 2))
    colours = _import("matplotlib").colormaps["viridis"]
    shades = [colours(0.85 - 0.7 * i / len(results)) for i in range(len(results))]
    passes = range(1, len(results) + 1)
    left.bar_label(left.bar(passes, [100 * r.accuracy for r in results], color=shades), fmt="%.1f")
    left.axhline(100 * commonest, color="black", linestyle="--", label=f"commonest byte: {100 * commonest:.1f} %")
    left.set(title="Bytes predicted before they are written", xlabel="pass", ylabel="% of bytes", xticks=passes)

    groups: list[tuple[str, Any, Sequence[float]]]
    groups = [(f"read {number}×", shade, r.found) for number, shade, r in zip(passes, shades, results, strict=True)]
    groups.append(("never read (chance)", "crimson", chance(results)))
    width = 0.85 / len(groups)
    for index, (label, colour, found) in enumerate(groups):
        places = [i + (index + 0.5) * width - 0.425 for i in range(len(options.depths))]
        bars = right.bar(places, [100 * f / options.needles for f in found], 0.94 * width, color=colour, label=label)
        right.bar_label(bars, fmt="%.0f", fontsize=8, color="crimson" if colour == "crimson" else "black")
    right.set(title="Needles found", xlabel="other bytes read and written since the needle", ylabel="% of needles")
    right.set_xticks(range(len(options.depths)), [depth_label(depth) for depth in options.depths])
    for axes, columns in ((left, 1), (right, 5)):
        axes.set(ylim=(0, 108), yticks=range(0, 101, 20))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns, frameon=False, fontsize=9)
    figure.savefig(path, format="png")


def demo(arguments: argparse.Namespace, options: Options) -> None:
    """Read the text, run all passes, and show, plot and save what came out."""
    for path in filter(None, (arguments.plot, arguments.json)):
        if path.is_dir() or not path.parent.is_dir():
            raise DemoError(f"cannot write {path}: it is a directory, or its directory is missing")
    text = read_text(arguments.file, chunks_in_pass(options) * options.chunk_size) if arguments.file else default_text()
    tqdm, _, _ = map(_import, ("tqdm", "rich", "matplotlib"))  # what is missing shows before the work, not after it
    stream = make_stream(text, options)
    commonest = max(map(stream.data.count, set(stream.data))) / len(stream.data)
    print(f"text: {arguments.file or DEFAULT_TEXT}, {sum(stream.is_text):,} bytes a pass")
    if len(text) < sum(stream.is_text):
        print(f"note: the text has only {len(text):,} bytes, so each pass repeats it")
    print("options:", *(f"{name}={value}" for name, value in dataclasses.asdict(options).items()))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"a needle: {stream.needles[0].text.decode().strip()}", flush=True)
    try:
        memory = EpisodicMemory(options)
    except (ValueError, RuntimeError, AssertionError, ImportError) as error:
        raise DemoError(f"cannot set up the memory: {str(error).partition(chr(10))[0]}") from error
    results: list[PassResult] = []
    total = options.passes * len(stream.data)
    with tqdm.tqdm(total=total, unit="B", unit_scale=True, mininterval=0.5) as bar:
        for number in range(1, options.passes + 1):
            bar.set_description(f"pass {number}")
            results.append(read_pass(memory, stream, bar.update))
            bar.set_postfix_str(f"{results[-1].accuracy:.1%} predicted")
    show(results, stream, options, commonest)
    plot(results, options, commonest, arguments.plot)
    print(f"plot: {arguments.plot}")
    if arguments.json:
        report = {
            "fwpkm_kernels": __version__,
            "torch": str(torch.__version__),
            "text": str(arguments.file or DEFAULT_TEXT),
            "text_bytes": sum(stream.is_text),
            "options": dataclasses.asdict(options),
            "commonest_byte": commonest,
            "passes": [result._asdict() for result in results],
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; ``argv`` replaces the command line. Returns the exit status."""
    try:
        demo(*parse(argv))
    except DemoError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
