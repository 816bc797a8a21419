"""The memory of the demo: product-key slots that are addressed by the last eight bytes, and the options of a run."""

import dataclasses
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import MemoryState, fast_weight_memory_step, product_key_lookup, sparse_value_gather
from .._commands import CommandError

CONTEXT = 8
SUFFIXES = ((3, 8), (2, 4, 5, 8))  #: lengths of the suffixes that name vectors, for each half of the query
DEPTHS = (4096, 16384, 65536, 131072)


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
        # All is drawn on the CPU, so that a seed means the same features on every device.
        generator = torch.Generator("cpu").manual_seed(options.seed)
        features = torch.randn(1, 2, n, half, generator=generator, device="cpu", dtype=torch.float32)
        codes = torch.randn(256, width, generator=generator, device="cpu", dtype=torch.float32)
        lengths = torch.tensor([length for lengths in SUFFIXES for length in lengths], device="cpu")
        hashes = torch.randint(2**63 - 1, (len(lengths), CONTEXT), generator=generator, device="cpu")
        before = torch.arange(CONTEXT, device="cpu") < CONTEXT - lengths.unsqueeze(1)
        hashes[before] = 0  # the bytes before a suffix have no say in its hash
        self.features = F.normalize(features, dim=-1).to(options.device)
        self.codes = F.normalize(codes, dim=-1).to(options.device)  # [256, D]
        self.hashes = hashes.to(options.device)  # [suffixes, 8]
        # One zero, expanded: the state keeps the values that it starts with, and these take no room.
        no_values = torch.zeros(1, 1, device=options.device, dtype=torch.float32).expand(n * n, width)
        self.state = MemoryState(self.features, no_values)
        self.recent = newlines = torch.full((CONTEXT - 1,), ord("\n"), dtype=torch.uint8, device=options.device)
        # The first calls may compile kernels. They are made here, so that no pass counts that time.
        self.read(torch.zeros(2 * options.chunk_size, dtype=torch.uint8, device=options.device))
        self.recall(torch.zeros(1, CONTEXT, dtype=torch.uint8, device=options.device))
        self.recent = newlines
        self.state.reset()

    def queries(self, contexts: Tensor) -> Tensor:
        """Contexts [M, 8] to queries [M, 1, Dk]: each half the sum of the vectors that its suffixes name."""
        products = ((contexts.long() + 1).unsqueeze(1) * self.hashes).sum(-1)  # [M, suffixes], modulo 2⁶⁴
        named = (products >> 40) % self.options.sub_keys
        halves = named.split([len(lengths) for lengths in SUFFIXES], dim=1)
        sums = (F.embedding_bag(halves[a], self.features[0, a], mode="sum") for a in range(2))
        return torch.cat(tuple(sums), dim=-1).unsqueeze(1)

    def nearest_bytes(self, reads: Tensor) -> Tensor:
        """The byte whose code, of length 1 as all are, is nearest to each read [M, D]; byte 0 for a read of zeros."""
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


def set_up(options: Options, name: str) -> EpisodicMemory:
    """A new memory; CommandError if the device or the backend cannot have it."""
    try:
        return EpisodicMemory(options, name)
    except OSError as error:
        needed = "torch's first operator call needs a cache or temporary folder that it can use"
        raise CommandError(f"cannot set up the memory: {needed}: {error}") from error
    except (ValueError, RuntimeError, AssertionError, ImportError) as error:
        raise CommandError(f"cannot set up the memory: {str(error).partition(chr(10))[0]}") from error
