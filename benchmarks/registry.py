"""What is measured: operations, configurations and providers, and what each row must at least move and compute.

A row is one operation, in one direction, at one configuration. A provider is a way to compute it. Every provider is
called with the arguments of the reference of the same name, so that each can be checked against it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fwpkm_kernels as fwpkm
import reference
from fwpkm_kernels import testing

#: Arguments by name: tensors and options.
Inputs = dict[str, Any]

#: The provider that the others are compared with.
PACKAGE = "fwpkm_kernels"


@dataclasses.dataclass(frozen=True)
class Configuration:
    """Sizes, dtype and access pattern. `dtype` is that of the table, and of the queries of a lookup."""

    name: str
    tokens: int
    operations: tuple[str, ...]
    devices: tuple[str, ...]
    heads: int = 1
    sub_keys: int = 512
    picks: int = 8
    key_width: int = 512
    width: int = 512
    dtype: torch.dtype = torch.float32
    pattern: str = "uniform"
    score: str = "idw"
    directions: tuple[str, ...] = ("forward", "backward")

    @property
    def slots(self) -> int:
        return self.sub_keys**2

    @property
    def accesses(self) -> int:
        return self.tokens * self.heads * self.picks

    def shrunk(self) -> "Configuration":
        """The same at a size that takes milliseconds on a CPU."""
        return dataclasses.replace(
            self,
            tokens=min(self.tokens, 12),
            sub_keys=16 if self.sub_keys <= 512 else 32,
            picks=min(self.picks, 10),
            key_width=14,
            width=24,
        )


@dataclasses.dataclass(frozen=True)
class Cost:
    """The least that has to be done, whoever does it."""

    #: every input read once and every output written once; of a table, the distinct rows that are addressed
    bytes: int
    #: as the mathematics has it
    flops: int
    #: tensor-core products for each product of the mathematics on a GPU: three in tf32x3, which is as exact as float32
    passes: int = 1


@dataclasses.dataclass(frozen=True)
class Provider:
    """One way to compute an operation; `run` takes the reference's arguments by name."""

    name: str
    run: Callable[..., Any]
    applies: Callable[[Configuration], bool] = lambda configuration: True
    #: whether a CUDA graph can hold it: no synchronisation with the host
    capturable: bool = True


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation: its inputs, its cost and its providers, this package first."""

    name: str
    directions: tuple[str, ...]
    reference: Callable[..., Any]
    make_inputs: Callable[[Configuration, str, int], Inputs]
    cost: Callable[[Configuration, str, Inputs], Cost]
    providers: tuple[Provider, ...]
    #: the inputs that backward differentiates with respect to
    wrt: tuple[str, ...] = ()
    in_place: bool = False


@dataclasses.dataclass(frozen=True)
class Row:
    operation: Operation
    direction: str
    configuration: Configuration

    @property
    def name(self) -> str:
        return f"{self.operation.name}/{self.direction}/{self.configuration.name}"

    def providers(self) -> list[Provider]:
        return [provider for provider in self.operation.providers if provider.applies(self.configuration)]

    def inputs(self, device: str, seed: int = 0) -> Inputs:
        return self.operation.make_inputs(self.configuration, device, seed)

    def cotangent(self, inputs: Inputs) -> Tensor:
        """A random incoming gradient of the first output; one table for all rows whose output is a table."""
        c = self.configuration
        if self.operation.name == "lookup":
            return _normal(inputs["queries"].device, 3, c.tokens, c.heads, c.picks)
        if self.operation.name == "update":
            return table(c.slots, c.width, c.dtype, str(inputs["values"].device), seed=1)
        return _normal(inputs["values"].device, 3, c.tokens, c.width).to(c.dtype)

    def cost(self, inputs: Inputs) -> Cost:
        return self.operation.cost(self.configuration, self.direction, inputs)


def rows(device: str | None = None, name_contains: str = "") -> list[Row]:
    """The registry, in the order in which it runs; for one device, or for all if None."""

    def every() -> Iterator[Row]:
        for operation in OPERATIONS:
            for configuration in CONFIGURATIONS:
                if operation.name in configuration.operations and (device in (None, *configuration.devices)):
                    for direction in operation.directions:
                        if direction in configuration.directions:
                            yield Row(operation, direction, configuration)

    return [row for row in every() if name_contains in row.name]


# ---- inputs ----


def _normal(device: Any, seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)


@functools.lru_cache(maxsize=4)
def table(slots: int, width: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """A value table [slots, width], drawn on the device; shared, since it may have 537 MB, so never to be written."""
    return _normal(device, seed, slots, width).to(dtype)


def _accesses(c: Configuration, device: str, seed: int) -> tuple[Tensor, Tensor]:
    """Slots, and weights that sum to 1, both [tokens, J]."""
    shape = (c.tokens, c.heads * c.picks)
    slots = testing.make_slots(shape, c.slots, c.pattern, seed=seed).to(device)
    return slots, _normal(device, seed, *shape).softmax(-1)


def _lookup_inputs(c: Configuration, device: str, seed: int) -> Inputs:
    half = c.key_width // 2
    return {
        "queries": _normal(device, 100 + seed, c.tokens, c.heads, c.key_width).to(c.dtype),
        "keys": _normal(device, 1, c.heads, 2, c.sub_keys, half),  # one set of keys, whatever the seed
        "top_k": c.picks,
        "score": c.score,
    }


def _gather_inputs(c: Configuration, device: str, seed: int) -> Inputs:
    slots, weights = _accesses(c, device, seed)
    return {"values": table(c.slots, c.width, c.dtype, device), "slots": slots, "weights": weights}


def _update_inputs(c: Configuration, device: str, seed: int) -> Inputs:
    return {
        **_gather_inputs(c, device, seed),
        "targets": _normal(device, 200 + seed, c.tokens, c.width).to(c.dtype),
        "predictions": _normal(device, 300 + seed, c.tokens, c.width),
    }


# ---- costs ----


def _size(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _touched(c: Configuration, inputs: Inputs) -> int:
    """Bytes of the distinct table rows that are addressed."""
    return int(torch.unique(inputs["slots"]).numel()) * c.width * c.dtype.itemsize


def _lookup_cost(c: Configuration, direction: str, inputs: Inputs) -> Cost:
    queries, keys = inputs["queries"], inputs["keys"]
    winners = c.tokens * c.heads * c.picks
    if direction == "forward":
        # scores float32 and slots int64 go out; a product with every sub-key
        return Cost(_size(queries, keys) + 12 * winners, 2 * c.tokens * c.heads * c.sub_keys * c.key_width, passes=3)
    # gradients have the sizes of queries and keys; a multiplication and an addition for each of the two, and, for idw,
    # a subtraction and a squared norm
    return Cost(2 * _size(queries, keys) + 12 * winners, winners * c.key_width * (7 if c.score == "idw" else 4))


def _gather_cost(c: Configuration, direction: str, inputs: Inputs, *, sparse: bool = False) -> Cost:
    read = _touched(c, inputs) + _size(inputs["slots"], inputs["weights"])
    out = c.tokens * c.width * c.dtype.itemsize
    if direction == "forward":
        return Cost(read + out, 2 * c.accesses * c.width)
    grad_table = _touched(c, inputs) if sparse else _size(inputs["values"])
    return Cost(read + out + grad_table + _size(inputs["weights"]), 4 * c.accesses * c.width)


def _small_update_inputs(inputs: Inputs) -> int:
    return _size(inputs["slots"], inputs["weights"], inputs["targets"], inputs["predictions"])


def _update_cost(c: Configuration, direction: str, inputs: Inputs) -> Cost:
    if direction == "forward":  # the old table in, the new one out
        return Cost(2 * _size(inputs["values"]) + _small_update_inputs(inputs), 2 * c.accesses * c.width)
    # The gradient of the table passes through as it is: only the addressed rows of it are read.
    gradients = _size(inputs["weights"], inputs["targets"], inputs["predictions"])
    return Cost(_touched(c, inputs) + _small_update_inputs(inputs) + gradients, 4 * c.accesses * c.width)


def _update_inplace_cost(c: Configuration, direction: str, inputs: Inputs) -> Cost:
    return Cost(2 * _touched(c, inputs) + _small_update_inputs(inputs), 2 * c.accesses * c.width)


# ---- providers ----


def torch_lookup(queries: Tensor, keys: Tensor, top_k: int, score: str, eps: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Matrix product, torch.topk of each half, torch.topk of the pairs; the logarithm of the winners only."""
    n, half = keys.shape[2:]
    rows = queries.to(keys.dtype).unflatten(-1, (2, half)).permute(1, 2, 0, 3)  # [H, 2, M, Dk/2]
    scores = rows @ keys.mT  # [H, 2, M, n]
    if score == "idw":
        distance = rows.square().sum(-1, keepdim=True) - 2 * scores + keys.square().sum(-1).unsqueeze(-2)
        nearest, columns = distance.topk(top_k, largest=False)
        best = -torch.log(eps + nearest.clamp(min=0))
    else:
        best, columns = scores.topk(top_k)
    sums = (best[:, 0].unsqueeze(-1) + best[:, 1].unsqueeze(-2)).flatten(-2)  # [H, M, K·K]
    out, pair = sums.topk(top_k)
    slots = columns[:, 0].gather(-1, pair // top_k) * n + columns[:, 1].gather(-1, pair % top_k)
    return out.transpose(0, 1), slots.transpose(0, 1)


def torch_gather(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """The rows, [M, J, D], and one batched product with the weights."""
    rows = values[slots].to(weights.dtype)
    return torch.bmm(weights.unsqueeze(1), rows).squeeze(1).to(values.dtype)


def embedding_bag(values: Tensor, slots: Tensor, weights: Tensor, *, sparse: bool = False) -> Tensor:
    return F.embedding_bag(slots, values, mode="sum", per_sample_weights=weights.to(values.dtype), sparse=sparse)


def _torch_steps(num_slots: int, slots: Tensor, weights: Tensor, targets: Tensor, predictions: Tensor) -> Tensor:
    """What each access adds to its row, [M·J, D]; the only array of the table's length is one of counts."""
    accesses = slots.flatten()
    counts = torch.zeros(num_slots, device=slots.device).index_add_(0, accesses, torch.ones_like(weights).flatten())
    write_weights = slots.shape[1] * weights / counts[slots]
    return (write_weights.unsqueeze(-1) * (targets - predictions).unsqueeze(1)).flatten(0, 1)


def torch_update_(values: Tensor, slots: Tensor, weights: Tensor, targets: Tensor, predictions: Tensor) -> None:
    """M·J rows added into the table, by whichever of the two ways is faster: atomics on GPUs, index_put_ on CPUs."""
    steps = _torch_steps(values.shape[0], slots, weights, targets, predictions).to(values.dtype)
    if values.is_cuda:
        values.index_add_(0, slots.flatten(), steps)
    else:
        values.index_put_((slots.flatten(),), steps, accumulate=True)


def torch_update(values: Tensor, slots: Tensor, weights: Tensor, targets: Tensor, predictions: Tensor) -> Tensor:
    """The same, into a copy of the table."""
    out = values.clone()
    torch_update_(out, slots, weights, targets, predictions)
    return out


def _dense_step(values: Tensor, slots: Tensor, weights: Tensor, targets: Tensor, predictions: Tensor) -> Tensor:
    """J·G/n_s over the whole table."""
    terms = weights.unsqueeze(-1) * (predictions - targets).unsqueeze(1)
    gradient = torch.zeros_like(values).index_add_(0, slots.flatten(), terms.flatten(0, 1).to(values.dtype))
    counts = torch.bincount(slots.flatten(), minlength=values.shape[0]).clamp(min=1)
    return slots.shape[1] * gradient / counts.unsqueeze(1)


def dense_update(values: Tensor, slots: Tensor, weights: Tensor, targets: Tensor, predictions: Tensor) -> Tensor:
    """The write as the equation has it: a gradient and a step for all rows."""
    return values - _dense_step(values, slots, weights, targets, predictions)


def dense_update_(values: Tensor, slots: Tensor, weights: Tensor, targets: Tensor, predictions: Tensor) -> None:
    values.sub_(_dense_step(values, slots, weights, targets, predictions))


def _plain_access(configuration: Configuration) -> bool:
    """Dense passes cost the same whatever the slots, so one access pattern of them is enough."""
    return configuration.pattern == "uniform" and configuration.dtype == torch.float32


def _is_float32(configuration: Configuration) -> bool:
    """embedding_bag wants weights in the table's dtype, and gives them a gradient as coarse as that."""
    return configuration.dtype == torch.float32


OPERATIONS = (
    Operation(
        "lookup",
        ("forward", "backward"),
        reference.product_key_lookup,
        _lookup_inputs,
        _lookup_cost,
        (Provider(PACKAGE, fwpkm.product_key_lookup), Provider("pytorch", torch_lookup)),
        wrt=("queries", "keys"),
    ),
    Operation(
        "gather",
        ("forward", "backward"),
        reference.sparse_value_gather,
        _gather_inputs,
        _gather_cost,
        (
            Provider(PACKAGE, fwpkm.sparse_value_gather),
            Provider("pytorch", torch_gather),
            Provider("embedding_bag", embedding_bag, _is_float32, capturable=False),
        ),
        wrt=("values", "weights"),
    ),
    Operation(
        "gather-sparse-grad",
        ("backward",),
        reference.sparse_value_gather,
        _gather_inputs,
        functools.partial(_gather_cost, sparse=True),
        (
            Provider(PACKAGE, functools.partial(fwpkm.sparse_value_gather, sparse_grad=True)),
            Provider("embedding_bag", functools.partial(embedding_bag, sparse=True), capturable=False),
        ),
        wrt=("values", "weights"),
    ),
    Operation(
        "update",
        ("forward", "backward"),
        reference.chunk_value_update,
        _update_inputs,
        _update_cost,
        (
            Provider(PACKAGE, fwpkm.chunk_value_update),
            Provider("pytorch", torch_update),
            Provider("dense", dense_update, _plain_access, capturable=False),
        ),
        wrt=("values", "weights", "targets", "predictions"),
    ),
    Operation(
        "update_",
        ("forward",),
        reference.chunk_value_update,
        _update_inputs,
        _update_inplace_cost,
        (
            Provider(PACKAGE, fwpkm.chunk_value_update_),
            Provider("pytorch", torch_update_),
            Provider("dense", dense_update_, _plain_access, capturable=False),
        ),
        in_place=True,
    ),
)

_ALL = ("lookup", "gather", "gather-sparse-grad", "update", "update_")
_VALUES = ("gather", "update", "update_")
_WRITES = ("update", "update_")
_GPU, _CPU, _BOTH = ("cuda",), ("cpu",), ("cuda", "cpu")

CONFIGURATIONS = (
    # A chunk in training, 8 × 512 tokens, and at inference, 512: the paper's sizes.
    Configuration("training", 4096, _ALL, _GPU),
    Configuration("training-bf16", 4096, ("lookup", *_VALUES), _GPU, dtype=torch.bfloat16),
    Configuration("inference", 512, _ALL, _BOTH),
    Configuration("inference-bf16", 512, ("gather", "update_"), _CPU, dtype=torch.bfloat16),
    # A product-key memory that is not written: four heads of 32.
    Configuration("static-pkm", 512, ("lookup", "gather"), _GPU, heads=4, picks=32, score="dot"),
    Configuration("static-pkm", 512, ("lookup",), _CPU, heads=4, picks=32, score="dot"),
    Configuration("static-pkm", 512, ("gather",), _CPU, heads=4, picks=32, score="dot", directions=("forward",)),
    Configuration("n4096", 4096, ("lookup",), _GPU, sub_keys=4096),
    Configuration("inference-n4096", 512, ("lookup",), _CPU, sub_keys=4096),
    Configuration("training-zipf", 4096, _WRITES, _GPU, pattern="zipf"),
    Configuration("training-one-slot", 4096, _WRITES, _GPU, pattern="one_slot"),
    Configuration("inference-zipf", 512, ("update_",), _CPU, pattern="zipf"),
    Configuration("inference-one-slot", 512, ("update_",), _CPU, pattern="one_slot"),
)
