"""Options as records: of the whole memory, and of its parts, in the order in which users and operators give them.

A new option of the memory is a field of `Options` here with a check in `check_options`, an argument of the three public
functions, `fast_weight_memory`, `fast_weight_memory_varlen` and `fast_weight_memory_step`, each of which names it once
more for `Options`, and the code that it changes. Operators, the autograd Function, documents, states and graphs pass
the record on.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from . import _checks as checks
from .chunks import Chunk, Reads, count_read_positions, count_writes, cut, number_reads
from .records import Inputs, Layout

WEIGHTINGS = ("softmax", "silu", "relu")
KEY_GRADIENTS = ("addressing", "all")
STEPS = ("paper", "gradient", "normalized")
BOUNDARIES = ("carry", "drop")
FINALS = ("table", "rows")

#: A number that may be a symbol where something traces, as sizes are.
Symbolic = Annotated[int, "SymInt"]
_SCHEMA_TYPES: Mapping[Any, str] = MappingProxyType(
    {int: "int", Symbolic: "SymInt", str: "str", float: "float", float | None: "float?"}
)


def schema_of(record: type) -> str:
    """The fields of a record of options as arguments in the schema of an operator."""
    return ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in record.__annotations__.items())


class Lookup(NamedTuple):
    """The options of `product_key_lookup`, in its order."""

    top_k: Symbolic
    score: str = "idw"
    eps: float = 1e-3
    precision: str = "tf32x3"
    backend: str = "auto"


class KeyStep(NamedTuple):
    """The options of `product_key_update`, in its order."""

    top_k: Symbolic
    score: str = "idw"
    eps: float = 1e-3
    lr: float = 1.0
    weight: float = 1.0
    weight_decay: float = 0.0
    clip: float | None = None
    precision: str = "tf32x3"
    backend: str = "auto"

    @property
    def lookup(self) -> Lookup:
        """Those of the lookup whose picks the step moves."""
        return Lookup(self.top_k, self.score, self.eps, self.precision, self.backend)


class Write(NamedTuple):
    """What a write to values does besides adding up, in the order of its operators."""

    lr: float = 1.0
    weight_decay: float = 0.0
    clip: float | None = None
    backend: str = "auto"


class Options(NamedTuple):
    """The options of `fast_weight_memory`, in its order."""

    chunk_size: int = 512
    top_k: int = 8
    lookahead: int = 1
    score: str = "idw"
    eps: float = 1e-3
    weighting: str = "softmax"
    temperature: float = 1.0
    lr: float = 1.0
    weight_decay: float = 0.0
    clip: float | None = None
    addressing_weight: float = 1.0
    key_gradient: str = "addressing"
    step: str = "paper"
    boundary: str = "carry"
    precision: str = "tf32x3"
    backend: str = "auto"

    def cut(self, length: int, carried: int = 0) -> list[Chunk]:
        """The chunks of a sequence."""
        return cut(length, self.chunk_size, self.lookahead, self.boundary, carried)

    def number_reads(self, length: int, batch: int, device: torch.device, carried: int = 0) -> Reads:
        """The reads of a sequence."""
        return number_reads(length, batch, self.chunk_size, self.lookahead, self.boundary, device, carried)

    def layout(self, length: int, batch: int, carried: int = 0) -> Layout:
        """`cut` in numbers."""
        rereads = self.lookahead if self.boundary == "carry" else 0
        return Layout(
            batch,
            length,
            min(self.chunk_size, length + self.lookahead),
            self.lookahead,
            rereads,
            rereads - carried,
            count_writes(length, self.chunk_size, self.boundary),
            count_read_positions(length, self.chunk_size, self.lookahead, self.boundary, carried),
        )

    @property
    def lookup(self) -> Lookup:
        """Those of the lookups."""
        return Lookup(self.top_k, self.score, self.eps, self.precision, self.backend)

    @property
    def key_step(self) -> KeyStep:
        """Those of the key steps."""
        numbers = (self.lr, self.addressing_weight, self.weight_decay, self.clip)
        return KeyStep(self.top_k, self.score, self.eps, *numbers, self.precision, self.backend)

    @property
    def write(self) -> Write:
        """Those of a write."""
        return Write(self.lr, self.weight_decay, self.clip, self.backend)

    def keeps_picks(self, batch: int, num_keys: int) -> bool:
        """Whether backward needs less of the keys of a chunk if it keeps a row for each pick, instead of all n."""
        return batch * (self.chunk_size + self.lookahead) * self.top_k < num_keys

    @property
    def has_ratio(self) -> bool:
        """Whether α has the factor S/E."""
        return self.boundary == "drop"

    @property
    def keys_move(self) -> bool:
        """Whether a key step can change the keys at all."""
        return self.lr != 0.0 and (self.addressing_weight != 0.0 or self.weight_decay != 0.0)


class Call(NamedTuple):
    """What a call of `fast_weight_memory` says besides its options."""

    carried: int = 0  #: how many tokens queries, gates and mask have before those of the targets
    final: str = "table"
    sparse_grad: bool = False
    group: str = ""  #: the name of the process group over whose ranks the columns of values are spread; "" is none

    @property
    def is_rows(self) -> bool:
        """Whether it leaves the rows behind that it has read, and no table."""
        return self.final == "rows"

    def check(self, o: Options) -> None:
        """Validate what it is to leave behind, and that the options allow that."""
        checks.check_choice("final", self.final, FINALS)
        checks.check_flag("sparse_grad", self.sparse_grad)
        if self.sparse_grad and not self.is_rows:
            raise ValueError(f'`sparse_grad`=True needs `final`="rows", got {self.final!r}')
        check_group(self.group, o)
        reason = why_no_rows(o)
        if self.is_rows and reason is not None:
            raise ValueError(f'`final`="rows" needs {reason}')


def check_group(group: str, o: Options) -> None:
    """Refuse what a rank cannot compute with its columns of the values alone."""
    if group and o.key_gradient == "all":
        raise ValueError(
            '`key_gradient` must be "addressing" where the columns of the table are spread over ranks, since under '
            "\"all\" keys move by dots of whole rows, got 'all'"
        )


def why_no_rows(o: Options) -> str | None:
    """What `final`="rows" needs that these options do not give; None where it can be."""
    if o.weight_decay != 0.0:
        return f"`weight_decay`=0, since decay moves rows that nothing touches too, got {o.weight_decay}"
    if o.key_gradient == "all":
        return '`key_gradient`="addressing", since which rows are touched depends on values under "all"'
    return None


def check_options(o: Options, dtype: torch.dtype) -> Options:
    """Validate what a memory adds to the options of its lookup; returns them with their numbers as ints and floats.

    `dtype` is that of the sums, in which numbers must be finite.
    """
    chunk_size = checks.check_int("chunk_size", o.chunk_size, minimum=1)
    lookahead = checks.check_int("lookahead", o.lookahead, minimum=0)
    if lookahead > chunk_size:
        raise ValueError(f"`lookahead` must be from 0 to `chunk_size`, got {lookahead} against {chunk_size}")
    checks.check_choice("weighting", o.weighting, WEIGHTINGS)
    checks.check_choice("key_gradient", o.key_gradient, KEY_GRADIENTS)
    checks.check_choice("step", o.step, STEPS)
    checks.check_choice("boundary", o.boundary, BOUNDARIES)
    return o._replace(
        chunk_size=chunk_size,
        lookahead=lookahead,
        temperature=checks.check_number("temperature", o.temperature, dtype, minimum=torch.finfo(dtype).tiny),
        lr=checks.check_number("lr", o.lr, dtype),
        weight_decay=checks.check_number("weight_decay", o.weight_decay, dtype, minimum=0),
        clip=None if o.clip is None else checks.check_number("clip", o.clip, dtype, minimum=0),
        addressing_weight=checks.check_number("addressing_weight", o.addressing_weight, dtype),
    )


#: Where users give `gates` and `mask`: before this one of the options.
_BEHIND_MASK = Options._fields.index("lr")


def in_public_order(options: Sequence[Any], gates: Any, mask: Any) -> tuple[Any, ...]:
    """What stands for each option, gates and mask, in the order of `FastWeightMemory.apply`."""
    return (*options[:_BEHIND_MASK], gates, mask, *options[_BEHIND_MASK:])


def from_public_order(
    queries: Tensor, targets: Tensor, keys: Tensor, values: Tensor, *given: Any
) -> tuple[Inputs, Options, Call]:
    """What the arguments of `FastWeightMemory.apply` say, of which the last may be left out."""
    gates, mask, *_ = [*given[_BEHIND_MASK : _BEHIND_MASK + 2], None, None]
    end = len(Options._fields) + 2
    options = Options(*given[:_BEHIND_MASK], *given[_BEHIND_MASK + 2 : end])
    return Inputs(queries, targets, keys, values, gates, mask), options, Call(*given[end:])
