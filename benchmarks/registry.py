"""What is measured: a table of operations, a table of configurations, and the rows that they make.

A row is one operation, in one direction, at one configuration: `update/backward/training`. A provider is a way to
compute it. Inputs are drawn in inputs.py, formulas of what must be moved and computed are in costs.py, the providers
in eager.py (plain PyTorch), peers.py and providers.py (this package), and the check of their numbers in verify.py.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fwpkm_kernels as fwpkm
import reference
from benchmarks import costs, eager, inputs, peers, providers
from benchmarks.costs import Cost
from benchmarks.inputs import Configuration, Inputs, table
from benchmarks.providers import COMPOSED, GRAPHED, PACKAGE, Provider


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation: its inputs, its cost and its providers, this package first."""

    name: str
    directions: tuple[str, ...]
    reference: Callable[..., Any]
    make_inputs: Callable[[Configuration, str, int], Inputs]
    cost: Callable[[Configuration, str, Inputs], Cost]
    providers: tuple[Provider, ...]
    #: the inputs that can be differentiated with respect to: see `Row.wrt`
    wrt: tuple[str, ...] = ()
    in_place: bool = False
    #: where the reference is too large for the inputs that are timed: what stands for it there, in float64
    sparse: Callable[..., Any] | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    operation: Operation
    direction: str
    configuration: Configuration
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"{self.operation.name}/{self.direction}/{self.configuration.name}"

    def providers(self) -> list[Provider]:
        """Those of the operation that run on the row's device at its configuration, and then the peers."""
        every = (*self.operation.providers, *peers.providers(self.operation.name))
        return [p for p in every if self.device in p.devices and p.applies(self.configuration)]

    @property
    def wrt(self) -> tuple[str, ...]:
        """What backward differentiates with respect to: no output of a single chunk depends on the targets."""
        c, wrt = self.configuration, self.operation.wrt
        is_one_chunk = "targets" in wrt and self.operation.name != "update" and c.length <= c.chunk
        return tuple(x for x in wrt if not (is_one_chunk and x == "targets"))

    def inputs(self, device: str, seed: int = 0) -> Inputs:
        return self.operation.make_inputs(self.configuration, device, seed)

    def cotangent(self, given: Inputs) -> Tensor:
        """A random incoming gradient of the first output; one table for all rows whose output is a table."""
        c, name = self.configuration, self.operation.name
        if name == "update":
            return table(c.slots, c.width, c.dtype, given["values"].device.type, seed=1)
        likes = {"layer": "hidden_states", "layer-batch": "hidden_states", "key-step": "keys"}
        likes |= dict.fromkeys(("sequence", "sequence-rows", "documents"), "targets")
        shape = (c.tokens, c.heads, c.picks) if name == "lookup" else (c.tokens, c.width)
        if name in likes:
            shape = tuple(given[likes[name]].shape)
        drawn = inputs.normal(next(iter(given.values())).device, 3, *shape)
        return drawn if name in ("lookup", "key-step") else drawn.to(c.dtype)

    def cost(self, given: Inputs) -> Cost:
        return self.operation.cost(self.configuration, self.direction, given)


def rows(device: str | None = None, name_contains: str = "") -> list[Row]:
    """The registry, in the order in which it runs; for one device, or all rows as a CPU runs them if None."""

    every = (
        Row(operation, direction, c, device or "cpu")
        for operation in OPERATIONS
        for c in CONFIGURATIONS
        if operation.name in c.operations and device in (None, *c.devices)
        for direction in operation.directions
        if direction in c.directions
    )
    return [row for row in every if name_contains in row.name]


def _dense_applies(c: Configuration) -> bool:
    """Dense passes cost the same whatever the slots and the key step, so one of each is enough; there must be room for
    several tables; and on a CPU one chunk takes seconds."""
    is_short = c.length <= c.chunk or "cpu" not in c.devices
    is_plain = c.pattern == "uniform" and c.key_weight != 0 and c.boundary == "carry" and c.is_float32
    return is_plain and is_short and c.table_bytes <= 2**30


def _autograd_applies(c: Configuration) -> bool:
    """For a gather from a table autograd makes a dense gradient in each chunk."""
    return c.table_bytes <= 2**32


_package, _torch = functools.partial(Provider, PACKAGE), functools.partial(Provider, "pytorch")
_dense = functools.partial(Provider, "dense", applies=_dense_applies, capturable=False)
# embedding_bag wants weights in the table's dtype, and gives them a gradient as coarse as that.
_bag = functools.partial(Provider, "embedding_bag", applies=lambda c: c.is_float32, capturable=False)
_composed = functools.partial(Provider, COMPOSED)
_on_gpu = functools.partial(Provider, devices=("cuda",))


def _compiled(run: Callable[..., Any]) -> Provider:
    """torch.compile takes many seconds for each shape, so of an operation one stands for all; and not on CPUs, where it
    needs a C++ compiler and longer still."""
    return _on_gpu("torch.compile", eager.compile_lazily(run), lambda c: c.name == "training")


# In these tables a line has the arguments of one kind.
# fmt: off


def _stream(name: str) -> Operation:
    """A memory that is kept between calls. Steps branch on the host: only `MemoryGraph` knows how to capture them."""

    def kept(chunk: Callable[..., Any]) -> dict[str, Any]:
        own = {"own": lambda given: {"memory": eager.EagerMemory(given["memory"], chunk)}}
        return {"run": lambda memory, **given: memory.step(**given), "capturable": False, **own}

    return Operation(
        name, ("forward",), reference.fast_weight_memory, inputs.of_stream, costs.stream,
        (
            _package(
                lambda memory, **given: fwpkm.fast_weight_memory_step(memory, **given), capturable=False,
                own=lambda given: {"memory": fwpkm.MemoryState(*given["memory"])},
            ),
            _on_gpu(
                GRAPHED, lambda memory, queries, targets, **options: memory.graph(queries, targets),
                lambda c: c.table_bytes <= 2**34, capturable=False,  # while it captures, there are three tables
                own=lambda given: {"memory": providers.GraphedMemory(**given)}, replay=providers.graph_replay,
            ),
            # 256 chunks, step by step, would take as long as all the other rows together.
            _torch(applies=lambda c: c.length <= 8 * c.chunk, **kept(eager.chunk)),
            _on_gpu(
                "torch.compile", applies=lambda c: name == "step" and c.name == "inference",
                **kept(eager.compiled_chunk),
            ),
            _dense(applies=lambda c: name == "step" and _dense_applies(c), **kept(eager.dense_chunk)),
        ),
        in_place=True, sparse=eager.torch_memory,
    )


def _layer(name: str, scope: str) -> Operation:
    """A layer around the memory, beside the mathematics of its projections and the memory's operator."""
    around = functools.partial(functools.partial, providers.composed_layer)
    make_inputs = functools.partial(inputs.of_layer_training, scope=scope)
    memory = functools.partial(fwpkm.fast_weight_memory, final="rows" if scope == "batch" else "table")
    return Operation(
        name, ("both", "forward"), providers.reference_layer, make_inputs, costs.layer,
        (
            _package(providers.package_layer),
            _composed(around(memory)),
            _torch(around(eager.torch_memory), _autograd_applies),
        ),
        wrt=("hidden_states", *inputs.PARAMETERS, "values"), sparse=around(eager.torch_memory),
    )


_OF_SEQUENCE = ("queries", "targets", "keys", "values")
_with_rows = functools.partial(fwpkm.fast_weight_memory, final="rows", sparse_grad=True)


def _is_small(c: Configuration) -> bool:
    """What copies the table, and fills one with a gradient, is measured beside it where that takes no seconds."""
    return c.table_bytes <= 2**29 and c.tokens <= 2**13


# What matters most comes first: a run that is stopped keeps that.
OPERATIONS = (
    Operation(
        "sequence", ("both", "forward", "backward"), reference.fast_weight_memory, inputs.of_sequence, costs.sequence,
        (
            _package(fwpkm.fast_weight_memory),
            _torch(eager.torch_memory, _autograd_applies),
            _dense(functools.partial(eager.torch_memory, dense=True)),
        ),
        wrt=_OF_SEQUENCE, sparse=eager.torch_memory,
    ),
    Operation(
        "sequence-rows", ("both",), providers.without_values(reference.fast_weight_memory),
        inputs.of_sequence, costs.sequence_rows,
        (
            _package(providers.without_values(_with_rows)),
            Provider(f"{PACKAGE}-table", providers.without_values(fwpkm.fast_weight_memory), _is_small),
            _torch(providers.without_values(eager.torch_memory), _is_small),
        ),
        wrt=_OF_SEQUENCE, sparse=providers.without_values(eager.torch_memory),
    ),
    Operation(
        "documents", ("both",), providers.by_document(reference.fast_weight_memory),
        inputs.of_sequence, costs.documents,
        (
            _package(providers.package_documents),
            _torch(providers.by_document(eager.torch_memory), lambda c: c.tokens <= 2**13),
        ),
        wrt=_OF_SEQUENCE, sparse=providers.by_document(eager.torch_memory),
    ),
    _stream("step"),
    _stream("prefill"),
    _stream("decode"),
    Operation(
        "lookup", ("forward", "backward"), reference.product_key_lookup, inputs.of_lookup, costs.lookup,
        (_package(fwpkm.product_key_lookup), _torch(eager.torch_lookup), _compiled(eager.torch_lookup)),
        wrt=("queries", "keys"),
    ),
    Operation(
        "gather", ("forward", "backward"), reference.sparse_value_gather, inputs.of_gather, costs.gather,
        (
            _package(fwpkm.sparse_value_gather), _torch(eager.torch_gather), _compiled(eager.torch_gather),
            _bag(eager.embedding_bag),
        ),
        wrt=("values", "weights"),
    ),
    Operation(
        "gather-sparse-grad", ("backward",), reference.sparse_value_gather, inputs.of_gather,
        functools.partial(costs.gather, sparse=True),
        (
            _package(functools.partial(fwpkm.sparse_value_gather, sparse_grad=True)),
            _bag(functools.partial(eager.embedding_bag, sparse=True)),
        ),
        wrt=("values", "weights"),
    ),
    Operation(
        "update_", ("forward",), reference.chunk_value_update, inputs.of_update, costs.update_inplace,
        (
            _package(fwpkm.chunk_value_update_), _torch(eager.torch_update_), _compiled(eager.torch_update_),
            _dense(eager.dense_update_),
        ),
        in_place=True,
    ),
    Operation(
        "reset", ("forward",), lambda values, slots: values, inputs.of_reset, costs.reset,
        (
            _package(providers.package_reset, own=providers.own_written),
            Provider(
                f"{PACKAGE}-touched", functools.partial(providers.package_reset, touched_rows_only=True),
                own=providers.own_written,
            ),
            _torch(
                lambda values, slots, initial: values.copy_(initial),
                own=lambda given: {"values": given["values"] + 1.0, "initial": given["values"]},
            ),
        ),
        in_place=True,
    ),
    Operation(
        "key-step", ("forward", "backward"), reference.product_key_update, inputs.of_key_step, costs.key_step,
        (
            _package(fwpkm.product_key_update), _torch(eager.torch_key_step), _compiled(eager.torch_key_step),
            Provider("dense", eager.dense_key_step),
        ),
        wrt=("keys", "queries"), sparse=eager.torch_key_step,
    ),
    Operation(
        "update", ("forward", "backward"), reference.chunk_value_update, inputs.of_update, costs.update,
        (_package(fwpkm.chunk_value_update), _torch(eager.torch_update), _dense(eager.dense_update)),
        wrt=("values", "weights", "targets", "predictions"),
    ),
    _layer("layer", "sequence"),
    _layer("layer-batch", "batch"),
    Operation(
        "layer-decode", ("forward",), providers.reference_layer, functools.partial(inputs.of_layer, scope="sequence"),
        costs.layer,
        (
            _package(providers.package_layer_step, capturable=False, own=providers.own_layer_memory),
            _composed(
                providers.composed_layer_step, capturable=False,
                own=lambda given: {"memory": fwpkm.MemoryState(given["keys"], given["values"])},
            ),
        ),
        in_place=True,
    ),
)
# fmt: on


_OPERATIONS = ("lookup", "gather", "gather-sparse-grad", "update_", "key-step", "update")
_LAYERS = ("layer", "layer-batch")
_GPU, _CPU, _BOTH = ("cuda",), ("cpu",), ("cuda", "cpu")
_FORWARD = ("forward",)
_BF16 = {"dtype": torch.bfloat16}
_STILL = {"key_weight": 0.0}
_TRAINING = ("both",)
#: Tables of 16 384 to 16.7 million rows, the last ones narrow.
_TABLES: dict[str, dict[str, Any]] = {
    "-n128": {"sub_keys": 128},
    "": {},
    "-n1024": {"sub_keys": 1024},
    "-n4096-d16": {"sub_keys": 4096, "width": 16},
}
_STATIC = {"heads": 4, "picks": 32, "score": "dot"}

CONFIGURATIONS = (
    # Whole sequences in training, batch × length.
    Configuration("8x4096", 32768, ("sequence", *_LAYERS), _GPU, batch=8, directions=("both", "forward", "backward")),
    Configuration("8x4096-still-keys", 32768, ("sequence",), _GPU, batch=8, **_STILL),
    Configuration("8x512", 4096, ("sequence",), _GPU, batch=8),
    Configuration("8x2048", 16384, ("sequence",), _GPU, batch=8),
    Configuration("8x4096-bf16", 32768, ("sequence",), _GPU, batch=8, **_BF16),
    Configuration("8x4096-n4096-bf16-d256", 32768, ("sequence",), _GPU, batch=8, sub_keys=4096, width=256, **_BF16),
    Configuration("8x4096-drop", 32768, ("sequence",), _GPU, batch=8, boundary="drop"),
    Configuration("1x1024", 1024, _LAYERS, _CPU, directions=("both", "forward")),
    Configuration("1x512", 512, ("sequence",), _CPU, directions=("both", "forward", "backward")),
    Configuration("1x4608", 4608, ("sequence",), _CPU, directions=("both", "forward", "backward")),
    Configuration("1x4608-still-keys", 4608, ("sequence",), _CPU, directions=_FORWARD, **_STILL),
    Configuration("1x1024-drop", 1024, ("sequence",), _BOTH, boundary="drop"),
    # At the price of the rows that are touched, whatever the table; and a memory for each of several documents.
    Configuration("1x1024", 1024, ("sequence-rows",), _BOTH, directions=_TRAINING),
    *(
        Configuration(f"{name}{size}", 4096, ("sequence-rows",), _BOTH, batch, directions=_TRAINING, **sizes)
        for name, batch in (("8x512", 8), ("1x4096", 1))
        for size, sizes in _TABLES.items()
    ),
    Configuration("8x1024", 8192, ("documents", "sequence-rows"), _BOTH, batch=8, directions=_TRAINING),
    Configuration("8x4096", 32768, ("documents", "sequence-rows"), _BOTH, batch=8, directions=_TRAINING),
    # Streams: chunks, a prompt, single tokens.
    Configuration("inference", 512, ("step", *_OPERATIONS, "reset"), _BOTH),
    Configuration("inference-still-keys", 512, ("step",), _BOTH, **_STILL),
    Configuration("inference-n128", 512, ("step",), _BOTH, sub_keys=128),
    Configuration("128k", 131072, ("prefill",), _GPU),
    Configuration("4k", 4096, ("prefill",), _CPU),
    Configuration("token", 1, ("decode", "layer-decode"), _BOTH),
    # A chunk in training, 8 × 512 tokens; at inference it has 512 (above).
    Configuration("training", 4096, (*_OPERATIONS, "reset"), _GPU),
    Configuration("training-bf16", 4096, ("lookup", "gather", "update_", "update"), _GPU, **_BF16),
    Configuration("inference-bf16", 512, ("gather", "update_"), _CPU, **_BF16),
    # Other widths of the rows.
    Configuration("training-d256", 4096, ("gather", "update_"), _GPU, width=256, directions=_FORWARD),
    Configuration("training-d1024", 4096, ("gather", "update_"), _GPU, width=1024, directions=_FORWARD),
    Configuration("inference-d256", 512, ("gather", "update_"), _CPU, width=256, directions=_FORWARD),
    Configuration("inference-d1024", 512, ("gather", "update_"), _CPU, width=1024, directions=_FORWARD),
    # A product-key memory that is not written: four heads of 32.
    Configuration("static-pkm", 512, ("lookup", "gather"), _GPU, **_STATIC),
    Configuration("static-pkm", 512, ("lookup",), _CPU, **_STATIC),
    Configuration("static-pkm", 512, ("gather",), _CPU, directions=_FORWARD, **_STATIC),
    # Skewed slots.
    Configuration("training-zipf", 4096, ("gather", "update_", "update"), _GPU, pattern="zipf"),
    Configuration("training-one-slot", 4096, ("gather", "update_", "update"), _GPU, pattern="one_slot"),
    Configuration("inference-zipf", 512, ("update_",), _CPU, pattern="zipf"),
    Configuration("inference-one-slot", 512, ("update_",), _CPU, pattern="one_slot"),
    # Few and many sub-keys: 16 384 and 16.7 million slots.
    Configuration("training-n128", 4096, ("lookup", "key-step"), _GPU, sub_keys=128),
    Configuration("training-n4096", 4096, ("lookup", "key-step"), _GPU, sub_keys=4096),
    Configuration("inference-n128", 512, ("lookup",), _CPU, sub_keys=128, directions=_FORWARD),
    Configuration("inference-n4096", 512, ("lookup",), _CPU, sub_keys=4096),
    Configuration("training-n4096", 4096, ("gather", "update_"), _GPU, sub_keys=4096, directions=_FORWARD),
    Configuration("inference-n4096", 512, ("step",), _GPU, sub_keys=4096),
)
