"""What a trained model depends on, besides the text: `Options`, and how a command line changes them."""

import ast
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.evaluation.models import SIZES, Size, make_config, make_model, split_name
from benchmarks.evaluation.text import NEEDLE_LENGTH
from fwpkm_kernels.integrations.mixins import defaults
from fwpkm_kernels.layers import FastWeightProductKeyMemory
from fwpkm_kernels.options import Options as MemoryOptions


class Phase(NamedTuple):
    """Steps with rows of one length."""

    length: int
    batch: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Options:
    """What a trained model depends on, besides the text."""

    model: str = "swa+fwpkm"
    size: str = "miniature"
    seed: int = 0
    #: phases, one after the other
    plan: tuple[Phase, ...] = (Phase(512, 2, 120), Phase(4096, 1, 90))
    #: how many parts a step's batch has, which are computed one after the other
    accumulate: int = 1
    lr: float = 3e-3
    final_lr: float = 0.1  #: where the cosine ends, over `lr`
    warmup: int = 30  #: steps
    #: the learning rate of trained tables, over `lr`: few tokens reach a row (`fwpkm_kernels.layers.parameter_groups`)
    table_lr: float = 5.0
    weight_decay: float = 0.1
    clip: float = 1.0  #: the largest norm of a gradient
    answer_weight: float = 1.0  #: the weight of the loss of digits that are asked for
    gate_price: float = 0.3
    needles: int = 6  #: for each 1024 bytes of a row, up to `most_needles`
    most_needles: int = 8
    questions: int = 2  #: for each needle
    distance: int = 256 + NEEDLE_LENGTH  #: the least number of bytes from a needle to a question
    dtype: str = "float32"  #: of autocast
    memory_layers: tuple[int, ...] = ()  #: other than the size's
    #: options of the fast-weight memories, other than the size's
    memory: dict[str, Any] = dataclasses.field(default_factory=dict)
    #: those that change when the model is tested: without the key step, after which tokens would not be found again
    test_memory: dict[str, Any] = dataclasses.field(default_factory=lambda: {"addressing_weight": 0.0})

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.plan)

    @property
    def bytes(self) -> int:
        """How many bytes one rank trains on."""
        return self.accumulate * sum(phase.length * phase.batch * phase.steps for phase in self.plan)

    def phase(self, step: int) -> Phase:
        for phase in self.plan:
            if step < phase.steps:
                return phase
            step -= phase.steps
        raise IndexError(step)

    def rate(self, step: int) -> float:
        """The learning rate of a step, over `lr`: a linear warmup, then a cosine."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return min(1.0, (step + 1) / max(1, self.warmup)) * (self.final_lr + (1 - self.final_lr) * cosine)


def options_of(given: dict[str, Any]) -> Options:
    """Options from the dict that `dataclasses.asdict`, or JSON, makes of them."""
    plan, layers = (Phase(*phase) for phase in given["plan"]), given.get("memory_layers", ())
    return Options(**{**given, "plan": tuple(plan), "memory_layers": tuple(layers)})


def size_of(options: Options) -> Size:
    return SIZES[options.size]


def build(options: Options, size: Size | None = None) -> Any:
    """The untrained model; of `size` in place of the options' own if it is given."""
    size = size or size_of(options)
    size = dataclasses.replace(size, memory_layers=options.memory_layers or size.memory_layers)
    return make_model(make_config(options.model, size, options.memory, options.gate_price), size)


def default_options(model: str, size: str, seed: int = 0) -> Options:
    """The options with which models of a size are trained."""
    return options_of({"model": model, "size": size, "seed": seed, "plan": Options.plan, **SIZES[size].training})


def changed(options: Options, changes: Sequence[str]) -> Options:
    """Options with others set, as ``lr=1e-3``, ``plan=512x2x160,4096x1x90`` or ``memory.top_k=16``.

    Raises:
        ValueError: a change names no option, or has no value for it.
    """
    given = dataclasses.asdict(options)
    apart = ("model", "size", "seed", "memory", "test_memory")
    parsers = {name: type(x) for name, x in given.items() if name not in apart}
    parsers |= {"plan": _parse_plan, "accumulate": _parse_count, "dtype": _parse_dtype, "memory_layers": _parse_layers}
    if split_name(options.model)[1]:
        parsers |= {f"memory.{name}": _parse_any for name in defaults(FastWeightProductKeyMemory)}
        parsers |= {f"test_memory.{name}": _parse_any for name in MemoryOptions._fields}
    for change in changes:
        name, _, text = change.partition("=")
        if name not in parsers:
            raise ValueError(f"`--set` must have, for {options.model}, names of {', '.join(parsers)}, got {change!r}")
        parse = parsers[name]
        try:
            value = parse(text)
        except (TypeError, ValueError):
            expected = parse.__name__ if isinstance(parse, type) else parse.__doc__
            raise ValueError(f"`{name}` must be {expected}, got {text!r}") from None
        kind, _, option = name.rpartition(".")
        (given[kind] if kind else given)[option] = value
    return options_of(given)


def _parse_plan(text: str) -> list[Phase]:
    """LENGTHxBATCHxSTEPS, and more after commas"""
    plan = [Phase(*map(int, phase.split("x"))) for phase in text.split(",")]
    if min(map(min, plan)) < 1:
        raise ValueError
    return plan


def _parse_count(text: str) -> int:
    """an integer, at least 1"""
    if int(text) < 1:
        raise ValueError
    return int(text)


def _parse_layers(text: str) -> list[int]:
    """LAYER, and more after commas"""
    return [int(layer) for layer in text.split(",")]


def _parse_dtype(text: str) -> str:
    """float32 or bfloat16"""
    if text not in ("float32", "bfloat16"):
        raise ValueError
    return text


def _parse_any(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def shrunk(options: Options, steps: int) -> tuple[Options, Size]:
    """The same model with small tables, and steps of one row of 1¼ chunks, so that a CPU can try them."""
    size = size_of(options)
    memory = options.memory | {"num_keys": 32}
    chunk = (defaults(FastWeightProductKeyMemory) | size.memory | memory)["chunk_size"]
    plan = (Phase(chunk + chunk // 4, 1, steps),)
    options = dataclasses.replace(options, plan=plan, accumulate=1, memory=memory)
    return options, dataclasses.replace(size, pkm=size.pkm | {"num_keys": 32})
