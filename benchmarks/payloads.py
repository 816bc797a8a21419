"""What ranks send: payloads of a fast-weight layer's collectives by formula, and a model of their times.

Payloads are what `count_collectives` counts, to which tests/test_scaling.py holds the formulas, on ranks of a CPU.
Times are a model, held to nothing.
"""

import math
from typing import Any, NamedTuple

from torch import nn

from fwpkm_kernels.chunks import count_read_positions
from fwpkm_kernels.layers import FastWeightProductKeyMemory, ValueTable

#: Bytes a second of a GPU in each direction, as data sheets have it: NVLink 4, and a port of InfiniBand NDR.
NVLINK, INFINIBAND = 450e9, 50e9
#: Assumed, in seconds: what a collective takes to start, and to hand anything on within a node and to another one.
CALL, NVLINK_HOP, INFINIBAND_HOP = 8e-6, 1e-6, 5e-6
#: How often a ring sends a payload, but for the R-th part that a rank keeps.
TIMES = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}


class Sizes(NamedTuple):
    """A layer and its batch: the paper's. A rank of data parallelism, or a group of columns, has such a batch."""

    batch: int = 8
    length: int = 4096
    hidden: int = 768
    num_keys: int = 512
    heads: int = 1
    top_k: int = 8
    key_dim: int = 512
    value_dim: int = 512
    chunk: int = 512
    lookahead: int = 1
    itemsize: int = 4  #: of a number in the memory, its outputs and all gradients

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.length

    @property
    def table(self) -> int:
        """Bytes of the table."""
        return self.num_keys**2 * self.value_dim * self.itemsize

    def layer(self, **how: Any) -> FastWeightProductKeyMemory:
        """The layer, on the meta device unless `how` has another."""
        sizes = {"num_keys": self.num_keys, "heads": self.heads, "top_k": self.top_k, "key_dim": self.key_dim}
        sizes |= {"value_dim": self.value_dim, "chunk_size": self.chunk, "lookahead": self.lookahead}
        return FastWeightProductKeyMemory(self.hidden, **{"device": "meta", **sizes, **how})


class Payload(NamedTuple):
    """A collective of a step: which group of ranks, when, which kind, and bytes as `count_collectives` counts them."""

    over: str
    when: str
    kind: str
    bytes: int


def columns(s: Sizes, static: bool = False) -> list[Payload]:
    """Of tables by columns: outputs, gradients of targets, and sums of the gradients of weights, all in float32.

    A static memory has no targets, and one kind of weights; the others have those of reads and of writes.
    """
    outputs = s.tokens * s.value_dim * s.itemsize
    reads = s.tokens if static else 2 * s.batch * count_read_positions(s.length, s.chunk, s.lookahead, "carry")
    sums = Payload("columns", "backward", "all_reduce", reads * s.heads * s.top_k * s.itemsize)
    gathers = [Payload("columns", when, "all_gather", outputs) for when in ("forward", "backward")]
    return [gathers[0], sums] if static else [*gathers, sums]


def data(s: Sizes, module: nn.Module, parts: int = 1) -> list[Payload]:
    """Of data parallelism: all gradients, those of a table dense, of which each rank has one of `parts` by columns."""
    rest = sum(math.prod(shape) for shape in rest_of(module))
    return [Payload("data", "backward", "all_reduce", s.table // parts + rest * s.itemsize)]


def rows(s: Sizes, module: nn.Module, ranks: int, parts: int = 1, again: bool = False) -> list[Payload]:
    """Of FSDP, the table in a unit of its own, gathered `again` in backward under reshard_after_forward=True.

    The root, which has the rest, never is. Each rank has as many rows of a tensor as the others, padding among them.
    """

    def padded(*shape: int) -> int:
        return -(-shape[0] // ranks) * ranks * math.prod(shape[1:]) * s.itemsize

    table = padded(s.num_keys**2, s.value_dim // parts)
    rest = sum(padded(*shape) for shape in rest_of(module))
    gathered = [Payload("data", "forward", "all_gather", table + rest)]
    gathered += [Payload("data", "backward", "all_gather", table)] * again
    return [*gathered, Payload("data", "backward", "reduce_scatter", table + rest)]


def rest_of(module: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of all parameters but tables."""
    tables = {x.weight for x in module.modules() if isinstance(x, ValueTable)}
    return [tuple(x.shape) for x in module.parameters() if x not in tables]


class Place(NamedTuple):
    """Where the ranks of a group are: so many of a node, in so many nodes."""

    near: int = 1
    nodes: int = 1

    @property
    def ranks(self) -> int:
        """How many they are."""
        return self.near * self.nodes


def sent(call: Payload, place: Place) -> float:
    """Bytes that a rank sends in a ring, and receives."""
    return TIMES[call.kind] * call.bytes * (place.ranks - 1) / place.ranks


def seconds(call: Payload, place: Place) -> float:
    """Of a collective: a ring for each GPU that the group has in a node, so that all their InfiniBand ports are used.

    Of each ring only one GPU sends to the next node. To start, a tree takes the place of the ring between nodes.
    """
    if place.ranks == 1:
        return 0.0
    bandwidth = NVLINK if place.nodes == 1 else min(NVLINK, place.near * INFINIBAND)
    hops = (place.near - 1) * NVLINK_HOP + math.ceil(math.log2(place.nodes)) * INFINIBAND_HOP
    return CALL + TIMES[call.kind] * hops + sent(call, place) / bandwidth
