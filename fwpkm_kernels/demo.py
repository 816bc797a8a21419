"""FwPKM as an episodic memory that needs no training: ``python -m fwpkm_kernels.demo [FILE]``.

Memories of n² value rows read a text byte by byte, and after each byte predict the next. They are built from the
package's public functions alone: a MemoryState, fast_weight_memory_step to read and write, and product_key_lookup,
softmax and sparse_value_gather to probe. There is no network, no training, no other table, no n-gram count.

Queries
    Fixed random features of the last eight bytes that were read. Six hashed suffixes of these bytes each name one of n
    random vectors of a half, and the query half is the sum of the vectors so named: suffixes of 3 and 8 bytes in the
    first half, of 2, 4, 5 and 8 in the second. These vectors are also the sub-keys that a memory starts with. So the
    lookup finds them again by score, and their 2·4 pairs are the slots: one that depends on the last 3 bytes only, one
    on 4, one on 5, and five on all 8, so that a known short suffix answers where the long one is new. Vectors and
    hashes are random; nothing here depends on the text.
Targets
    A fixed random unit vector, the code, for each byte value. The predicted byte is the code nearest to the read.
Reading
    Token t is byte t: its query is made of the eight bytes up to it, its target is its own code. With lookahead=1 the
    memory pairs each query with the next target, so that a token's output predicts the byte after it, and is read
    before that byte is seen. Each step reads a chunk and then writes the pairs whose targets lie in it; the pair of the
    last byte read waits for the next chunk. Values start at zero, which predicts byte 0. Passes read the same stream
    again, one after the other, with the memory kept. The first byte of a pass is not counted: it is the last token of
    the pass before that predicts it, and in pass 1 there is none.
Memories
    Three memories read the same stream, one after the other, and differ in one thing from the first:

    - plain: step="paper", and no key step.
    - key-step: with the key step, of weight ``--addressing-weight``, which moves sub-keys toward being used evenly. The
      queries do not follow them.
    - normalized: step="normalized", and no key step.

    All else is the same: stream, queries, codes, initial memory, chunks, and the step size ``--lr`` of values and keys.
Needles
    ``the access code of NAME is 123456``, with random names and codes. Each has a depth d, and is hidden in the text so
    that its last digit ends a chunk: all its digits are written with that chunk. When exactly d other bytes have been
    read since, it is probed, which writes nothing: each digit is predicted from the true eight bytes before it, and the
    needle is found if all are right. These eight bytes are nowhere else in the text or the needles. In pass p a needle
    has been read p times. Chance is measured beside it: a control, a sentence of the same form that is never read, is
    probed at the same moments. Guessing digits would find one code in 10⁶.

Accuracy counts the bytes of the text, not those of the needles. A text too short for one pass is repeated. The same
seed gives the same numbers, bit for bit, on the same machine with the same versions and number of threads.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import io
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import MemoryState, __version__, fast_weight_memory_step, product_key_lookup, sparse_value_gather
from ._commands import CommandError, check_outputs, command, need, one_line, reading, try_all, write_output

CONTEXT = 8
SUFFIXES = ((3, 8), (2, 4, 5, 8))  #: lengths of the suffixes that name vectors, for each half of the query
NEEDLE = "\nthe access code of {} is {}"
NAME_LETTERS, CODE_DIGITS = 6, 6
NEEDLE_LENGTH = len(NEEDLE.format("", "")) + NAME_LETTERS + CODE_DIGITS
DEPTHS = (4096, 16384, 65536, 131072)
CONTROL_BYTES = frozenset(range(32)) - frozenset(b"\t\n\v\f\r\x1b")  #: no text has these
DEFAULT_TEXT = "Python's documentation topics"


class Kind(NamedTuple):
    """What sets a memory apart from the others."""

    step: str
    has_key_step: bool
    colour: str  #: in the plot


MEMORIES = MappingProxyType(
    {
        "plain": Kind("paper", False, "#4477aa"),
        "key-step": Kind("paper", True, "#cc6633"),
        "normalized": Kind("normalized", False, "#228833"),
    }
)


def _option(default: Any, text: str) -> Any:
    """A field of Options that is also a command-line option, with its line of help."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Options:
    """What a run depends on besides the text; the defaults are the paper's memory."""

    memories: tuple[str, ...] = _option(tuple(MEMORIES), f"some of {', '.join(MEMORIES)}")
    passes: int = _option(4, "how often each memory reads the text")
    seed: int = _option(0, "of sub-keys, hashes, codes and needles")
    device: str = _option("cuda" if torch.cuda.is_available() else "cpu", "torch device of the memories")
    backend: str = _option("auto", "auto, torch or triton")
    text_bytes: int = _option(131072, "bytes of text to read in a pass; more where the deepest needles need it")
    needles: int = _option(16, "needles for each depth")
    depths: tuple[int, ...] = _option(DEPTHS, "bytes between a needle and its probe, multiples of the chunk size")
    sub_keys: int = _option(512, "sub-keys n for each half, so n² slots")
    top_k: int = _option(8, "slots K that a byte reads and writes")
    query_width: int = _option(512, "width Dk of a query")
    value_width: int = _option(512, "width D of a value row")
    chunk_size: int = _option(512, "bytes C of a chunk, which is read, then written")
    score: str = _option("idw", "idw or dot")
    temperature: float = _option(1.0, "of the softmax over the K scores")
    lr: float = _option(0.5, "step size of a write and of the key step")
    addressing_weight: float = _option(1.0, "weight of the key step, in the memory that has one")


class EpisodicMemory:
    """Product-key slots addressed by random features of eight bytes, holding codes of the byte that comes next."""

    def __init__(self, options: Options, name: str) -> None:
        self.options, self.name = options, name
        n, half, width = options.sub_keys, options.query_width // 2, options.value_width
        # Drawn on the CPU: the same seed means the same features on every device.
        generator = torch.Generator("cpu").manual_seed(options.seed)
        features = torch.randn(1, 2, n, half, generator=generator, device="cpu", dtype=torch.float32)
        codes = torch.randn(256, width, generator=generator, device="cpu", dtype=torch.float32)
        lengths = torch.tensor([length for lengths in SUFFIXES for length in lengths], device="cpu")
        hashes = torch.randint(2**63 - 1, (len(lengths), CONTEXT), generator=generator, device="cpu")
        before = torch.arange(CONTEXT, device="cpu") < CONTEXT - lengths.unsqueeze(1)
        hashes[before] = 0  # bytes before the suffix do not count
        self.features = F.normalize(features, dim=-1).to(options.device)
        self.codes = F.normalize(codes, dim=-1).to(options.device)  # [256, D]
        self.hashes = hashes.to(options.device)  # [suffixes, 8]
        no_values = torch.zeros(1, 1, device=options.device, dtype=torch.float32).expand(n * n, width)  # takes no room
        self.state = MemoryState(self.features, no_values)
        # The first calls may compile kernels, which is not to be timed.
        self.recent = torch.full((CONTEXT - 1,), ord("\n"), dtype=torch.uint8, device=options.device)
        recent = self.recent
        self.read(torch.zeros(2 * options.chunk_size, dtype=torch.uint8, device=options.device))
        self.recall(torch.zeros(1, CONTEXT, dtype=torch.uint8, device=options.device))
        self.recent = recent
        self.state.reset()

    def queries(self, contexts: Tensor) -> Tensor:
        """Contexts [M, 8] to queries [M, 1, Dk]: each half the sum of the vectors that its suffixes name."""
        products = ((contexts.long() + 1).unsqueeze(1) * self.hashes).sum(-1)  # [M, suffixes], modulo 2⁶⁴
        named = (products >> 40) % self.options.sub_keys
        halves = named.split([len(lengths) for lengths in SUFFIXES], dim=1)
        sums = (F.embedding_bag(halves[a], self.features[0, a], mode="sum") for a in range(2))
        return torch.cat(tuple(sums), dim=-1).unsqueeze(1)

    def nearest_bytes(self, reads: Tensor) -> Tensor:
        """The byte whose code is nearest to each read [M, D]; byte 0 for a read of nothing. All codes have length 1."""
        return (reads @ self.codes.T).argmax(-1)

    def read(self, data: Tensor) -> Tensor:
        """Read the next bytes [t] and write every chunk that they fill; the byte predicted after each of them, [t]."""
        o, kind = self.options, MEMORIES[self.name]
        window = torch.cat((self.recent, data))
        self.recent = window[len(data) :]
        output = fast_weight_memory_step(
            self.state,
            self.queries(window.unfold(0, CONTEXT, 1)).unsqueeze(0),
            self.codes[data.long()].unsqueeze(0),
            chunk_size=o.chunk_size,
            top_k=o.top_k,
            lookahead=1,
            score=o.score,
            temperature=o.temperature,
            lr=o.lr,
            addressing_weight=o.addressing_weight if kind.has_key_step else 0.0,
            step=kind.step,
            backend=o.backend,
        )
        return self.nearest_bytes(output[0])

    def recall(self, contexts: Tensor) -> Tensor:
        """The byte predicted after each of the contexts [M, 8]; changes nothing."""
        o, queries, state = self.options, self.queries(contexts), self.state
        scores, slots = product_key_lookup(queries, state.keys, o.top_k, score=o.score, backend=o.backend)
        weights = torch.softmax(scores.flatten(1) / o.temperature, dim=-1)
        return self.nearest_bytes(sparse_value_gather(state.values, slots.flatten(1), weights, backend=o.backend))


class Needle(NamedTuple):
    """A hidden sentence that ends chunk number ``chunk``, and a control of the same form that is never read."""

    text: bytes
    control: bytes
    depth: int
    chunk: int


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
        raise CommandError(f"could not draw {count} different needles; ask for fewer with --needles")
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
    predicted = memory.recall(to_tensor(contexts, memory.options.device))
    digits = to_tensor([sentence[-CODE_DIGITS:] for sentence in sentences], memory.options.device)
    return (predicted.view_as(digits) == digits).all(-1).tolist()


def read_pass(memory: EpisodicMemory, stream: Stream, progress: Callable[[int], object]) -> PassResult:
    """Read the stream once more, chunk by chunk, and probe each needle when its depth is reached."""
    o = memory.options
    started = time.perf_counter()
    data = to_tensor([stream.data], o.device)[0]
    due: dict[int, list[Needle]] = {}
    for needle in stream.needles:
        due.setdefault(needle.chunk + needle.depth // o.chunk_size, []).append(needle)
    found, controls_found = dict.fromkeys(o.depths, 0), dict.fromkeys(o.depths, 0)
    predicted = []
    for chunk, part in enumerate(data.split(o.chunk_size)):
        predicted.append(memory.read(part))
        for needle in due.get(chunk, ()):
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
    for position, byte in enumerate(data):
        if byte in CONTROL_BYTES:
            raise CommandError(f"{path} is a binary file: byte {position} is 0x{byte:02x}")
    return data


def check(options: Options) -> None:
    """Raise CommandError for options that no run can have."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name != "seed" and isinstance(value, (int, float)) and not value > 0:
            raise CommandError(f"{_flag(field.name)} must be positive, got {value}")
    if options.chunk_size < NEEDLE_LENGTH:
        raise CommandError(f"--chunk-size must hold a needle of {NEEDLE_LENGTH} bytes, got {options.chunk_size}")
    if len(set(options.depths)) < len(options.depths) or any(d < 1 or d % options.chunk_size for d in options.depths):
        raise CommandError(f"--depths must be different multiples of --chunk-size {options.chunk_size}")
    if len(set(options.memories)) < len(options.memories):
        raise CommandError(f"--memories must be different, got {' '.join(options.memories)}")
    if options.query_width % 2 or options.top_k > options.sub_keys:
        raise CommandError("--query-width must be even and --top-k at most --sub-keys")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Options]:
    """The command line: where to read and write, and the options of the run."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}.demo",
        description="FwPKM as an episodic memory without training: it reads a text, predicts every byte from the eight "
        "before it, and recalls access codes hidden in the text. Memories with and without the key step, and with the "
        "normalized step, are compared.",
    )
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help=f"a text (default: {DEFAULT_TEXT})")
    parser.add_argument("--plot", type=Path, default=Path("demo.png"), metavar="PNG", help="(default: demo.png)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write options and results as JSON too")
    choices = {"memories": tuple(MEMORIES), "score": ("idw", "dot"), "backend": ("auto", "torch", "triton")}
    for field in dataclasses.fields(Options):
        default: Any = field.default
        many = isinstance(default, tuple)
        shown = " ".join(map(str, default)) if many else default
        parser.add_argument(
            _flag(field.name),
            type=type(default[0]) if many else type(default),
            nargs="+" if many else None,
            choices=choices.get(field.name),
            default=default,
            metavar="NAME" if field.name == "memories" else None,
            help=f"{field.metadata['help']} (default: {shown})",
        )
    arguments = parser.parse_args(argv)
    values = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Options)}
    options = Options(**{**values, "memories": tuple(values["memories"]), "depths": tuple(values["depths"])})
    check(options)
    return arguments, options


def depth_label(depth: int) -> str:
    """4096 as 4K; any other number in full."""
    return f"{depth // 1024}K" if depth % 1024 == 0 else str(depth)


def chance(results: Sequence[PassResult]) -> list[float]:
    """Controls found at each depth, on average over the passes."""
    return [sum(found) / len(results) for found in zip(*(r.controls_found for r in results), strict=True)]


def show(results: Mapping[str, Sequence[PassResult]], stream: Stream, options: Options, commonest: float) -> None:
    """Print the tables of accuracy and of needles."""
    console, table = need("rich.console", "demo"), need("rich.table", "demo")
    out = console.Console()
    numbers = range(1, options.passes + 1)
    columns = ("memory", *(f"pass {number}" for number in numbers), "seconds a pass", "bytes/s")
    accuracy = table.Table(*columns, title="Accuracy by pass: bytes predicted before they are read")
    needles = table.Table("memory", "needle read", title=f"Needles found, of {options.needles} at each depth")
    for depth in options.depths:
        needles.add_column(f"after {depth_label(depth)}", justify="right")
    for name, passes in results.items():
        seconds = sum(r.seconds for r in passes) / len(passes)
        accuracy.add_row(
            name, *(f"{r.accuracy:.1%}" for r in passes), f"{seconds:.2f}", f"{len(stream.data) / seconds:,.0f}"
        )
        for number, result in zip(numbers, passes, strict=True):
            read = "once" if number == 1 else f"{number} times"
            needles.add_row(name if number == 1 else "", read, *map(str, result.found))
        needles.add_row("", "never (chance)", *(f"{mean:g}" for mean in chance(passes)), end_section=True)
    out.print(accuracy)
    out.print(
        f"Always the commonest byte: {commonest:.1%}. Times are means over the passes;\n"
        f"bytes/s count {len(stream.data):,} bytes a pass, needles included.\n"
    )
    out.print(needles)
    out.print(f"Guessing all {CODE_DIGITS} digits finds {10.0**-CODE_DIGITS * options.needles:g} of {options.needles}.")


def plot(results: Mapping[str, Sequence[PassResult]], options: Options, commonest: float) -> bytes:
    """Draw accuracy by pass for all memories, and for each one a grid of the needles found by depth and pass: a PNG."""
    figure = need("matplotlib.figure", "demo").Figure(figsize=(12, 7.5), layout="constrained", dpi=150)
    figure.get_layout_engine().set(hspace=0.06)
    colour_map = need("matplotlib.colors", "demo").LinearSegmentedColormap
    top, *grids = figure.subplot_mosaic([["top"] * len(results), list(results)]).values()
    passes = range(1, options.passes + 1)

    width = 0.86 / len(results)
    for index, (name, rows) in enumerate(results.items()):
        places = [number + (index + 0.5) * width - 0.43 for number in passes]
        heights = [100 * r.accuracy for r in rows]
        bars = top.bar(places, heights, 0.94 * width, color=MEMORIES[name].colour, label=name)
        top.bar_label(bars, fmt="%.1f", fontsize=9, padding=1)
    top.axhline(100 * commonest, color="black", linestyle="--", label=f"commonest byte: {100 * commonest:.1f} %")
    top.set(title="Bytes predicted before they are read", ylabel="% of bytes", ylim=(0, 112), yticks=range(0, 101, 20))
    top.set_xticks(passes, [f"pass {number}" for number in passes])
    top.spines[["top", "right"]].set_visible(False)
    top.legend(loc="upper left", ncols=len(results) + 1, frameon=False)

    labels = [f"read {number}×" for number in passes] + ["never read\n(chance)"]
    for axes, (name, rows) in zip(grids, results.items(), strict=True):
        found: list[Sequence[float]] = [*(r.found for r in rows), chance(rows)]
        shares = [[count / options.needles for count in row] for row in found]
        colours = colour_map.from_list(name, ["#eeeeee", MEMORIES[name].colour])
        axes.pcolormesh(shares, cmap=colours, vmin=0, vmax=1, edgecolors="white", linewidth=2)
        for y, row in enumerate(found):
            for x, count in enumerate(row):
                ink = "white" if count > 0.65 * options.needles else "black"
                axes.text(x + 0.5, y + 0.5, f"{count:.3g}", ha="center", va="center", color=ink)
        axes.set(title=f"{name}: needles found, of {options.needles}", xlabel="other bytes read since the needle")
        axes.set_xticks([x + 0.5 for x in range(len(options.depths))], [depth_label(depth) for depth in options.depths])
        axes.set_yticks([y + 0.5 for y in range(len(labels))], labels if axes is grids[0] else [])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.invert_yaxis()
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def as_json(
    results: Mapping[str, Sequence[PassResult]], stream: Stream, options: Options, commonest: float, text: str
) -> str:
    """Options and results; ``text`` is the name of what was read."""
    report = {
        __package__: __version__,
        "torch": str(torch.__version__),
        "text": text,
        "text_bytes": sum(stream.is_text),
        "options": dataclasses.asdict(options),
        "commonest_byte": commonest,
        "memories": {
            name: {
                "step": MEMORIES[name].step,
                "addressing_weight": options.addressing_weight if MEMORIES[name].has_key_step else 0.0,
                "passes": [result._asdict() for result in passes],
            }
            for name, passes in results.items()
        },
    }
    return json.dumps(report, indent=2) + "\n"


def set_up(options: Options, name: str) -> EpisodicMemory:
    """A new memory; CommandError if the device or the backend cannot have it."""
    try:
        return EpisodicMemory(options, name)
    except OSError as error:
        needed = "torch's first operator call needs a cache or temporary folder that it can use"
        raise CommandError(f"cannot set up the memory: {needed}: {error}") from error
    except (ValueError, RuntimeError, AssertionError, ImportError) as error:
        raise CommandError(f"cannot set up the memory: {str(error).partition(chr(10))[0]}") from error


def demo(arguments: argparse.Namespace, options: Options) -> None:
    """Let every memory read the text, and show, plot and save what came out."""
    check_outputs(arguments.json, arguments.plot, read=arguments.file)
    text = read_text(arguments.file, chunks_in_pass(options) * options.chunk_size) if arguments.file else default_text()
    # What is missing shows before the work, not after it.
    tqdm, *_ = (need(name, "demo") for name in ("tqdm", "rich.table", "matplotlib.backends.backend_agg"))
    stream = make_stream(text, options)
    commonest = max(map(stream.data.count, set(stream.data))) / len(stream.data)
    print(f"text: {one_line(arguments.file or DEFAULT_TEXT)}, {sum(stream.is_text):,} bytes a pass")
    if len(text) < sum(stream.is_text):
        print(f"note: the text has only {len(text):,} bytes, so each pass repeats it")
    shown = {k: ",".join(map(str, x)) if isinstance(x, tuple) else x for k, x in dataclasses.asdict(options).items()}
    print("options:", *(f"{name}={value}" for name, value in shown.items()))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"a needle: {stream.needles[0].text.decode().strip()}", flush=True)
    set_up(options, options.memories[0])  # what cannot be set up shows before the progress bar does
    results: dict[str, list[PassResult]] = {}
    total = len(options.memories) * options.passes * len(stream.data)
    with tqdm.tqdm(total=total, unit="B", unit_scale=True, mininterval=0.5) as bar:
        for name in options.memories:
            results[name] = []
            memory = set_up(options, name)
            for number in range(1, options.passes + 1):
                bar.set_description(f"{name}, pass {number}")
                results[name].append(read_pass(memory, stream, bar.update))
                bar.set_postfix_str(f"{results[name][-1].accuracy:.1%} predicted")
            del memory  # before the next one: a table is large

    def save() -> None:
        name = str(arguments.file or DEFAULT_TEXT)
        write_output(arguments.json, as_json(results, stream, options, commonest, name))

    def draw() -> None:
        write_output(arguments.plot, plot(results, options, commonest))

    try:
        try_all([save, draw] if arguments.json else [draw])
    finally:
        show(results, stream, options, commonest)
    print(f"plot: {one_line(arguments.plot)}")


@command("demo")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; ``argv`` replaces the command line. Returns the exit status."""
    demo(*parse(argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
