"""Configurations, and the inputs that are drawn for them."""

import dataclasses
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fwpkm_kernels import testing

#: Arguments by name: tensors and options.
Inputs = dict[str, Any]

#: λ of the key step. Random keys are used almost evenly, so that with λ = 1 they would move by less than is rounded
#: away, and a wrong step would not show; with this they move by about a hundredth of their size. It changes no time.
KEY_WEIGHT = 500.0


class Memory(NamedTuple):
    """The memory that a stream starts from: shared, so never to be written."""

    keys: Tensor  #: [H, 2, n, Dk/2]
    values: Tensor  #: [N, D]


@dataclasses.dataclass(frozen=True)
class Configuration:
    """Sizes, dtypes and access pattern.

    `dtype` is that of the table and of the tokens, `tokens` those of all items of the `batch`. Sequences and streams
    choose their own slots: `pattern` is for the operations that are given some.
    """

    name: str
    tokens: int
    operations: tuple[str, ...]
    devices: tuple[str, ...]
    batch: int = 1
    chunk: int = 512
    heads: int = 1
    sub_keys: int = 512
    picks: int = 8
    key_width: int = 512
    width: int = 512
    dtype: torch.dtype = torch.float32
    pattern: str = "uniform"
    score: str = "idw"
    key_weight: float = KEY_WEIGHT
    boundary: str = "carry"
    #: "both": forward and backward in one call, as in training; "backward" alone finds forward done
    directions: tuple[str, ...] = ("forward", "backward")

    @property
    def slots(self) -> int:
        return self.sub_keys**2

    @property
    def length(self) -> int:
        """Tokens of each item of the batch."""
        return self.tokens // self.batch

    @property
    def accesses(self) -> int:
        return self.tokens * self.heads * self.picks

    @property
    def is_float32(self) -> bool:
        return self.dtype == torch.float32

    @property
    def table_bytes(self) -> int:
        return self.slots * self.width * self.dtype.itemsize

    def shrunk(self) -> "Configuration":
        """The same at a size that takes milliseconds on a CPU, with at most three chunks of eight tokens."""
        batch, chunk = min(self.batch, 2), 8
        length = chunk * min(3, self.length // self.chunk) if self.length >= self.chunk else min(self.length, chunk)
        return dataclasses.replace(
            self, tokens=batch * length, batch=batch, chunk=chunk, sub_keys=16 if self.sub_keys <= 512 else 32,
            picks=min(self.picks, 10), key_width=14, width=24, key_weight=min(self.key_weight, 1.0),
        )  # fmt: skip


def normal(device: Any, seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)


@functools.lru_cache(maxsize=3)
def table(slots: int, width: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """A value table [slots, width], drawn on the device; shared, since it may have 34 GB, so never to be written."""
    return normal(device, seed, slots, width).to(dtype)


def make_room(before: Configuration, c: Configuration) -> None:
    """Forget a large table of `before`, unless the inputs of `c`, which are drawn next, are on it too."""
    tables = [(x.slots, x.width, x.dtype) for x in (before, c)]
    if tables[0] != tables[1] and before.table_bytes > 2**31:
        table.cache_clear()


def _keys(c: Configuration, device: str) -> Tensor:
    """One set of keys, whatever the seed of the tokens."""
    return normal(device, 1, c.heads, 2, c.sub_keys, c.key_width // 2)


def _queries(c: Configuration, device: str, seed: int) -> Tensor:
    return normal(device, 100 + seed, c.tokens, c.heads, c.key_width).to(c.dtype)


def _targets(c: Configuration, device: str, seed: int) -> Tensor:
    return normal(device, 200 + seed, c.tokens, c.width).to(c.dtype)


def of_lookup(c: Configuration, device: str, seed: int) -> Inputs:
    return {"queries": _queries(c, device, seed), "keys": _keys(c, device), "top_k": c.picks, "score": c.score}


def of_key_step(c: Configuration, device: str, seed: int) -> Inputs:
    return {**of_lookup(c, device, seed), "weight": c.key_weight}


def of_gather(c: Configuration, device: str, seed: int) -> Inputs:
    """Slots, and weights that sum to 1, both [tokens, J]."""
    shape = (c.tokens, c.heads * c.picks)
    slots = testing.make_slots(shape, c.slots, c.pattern, seed=seed).to(device)
    weights = normal(device, seed, *shape).softmax(-1)
    return {"values": table(c.slots, c.width, c.dtype, device), "slots": slots, "weights": weights}


def of_reset(c: Configuration, device: str, seed: int) -> Inputs:
    """The initial values, and the slots that were written since."""
    inputs = of_gather(c, device, seed)
    return {name: inputs[name] for name in ("values", "slots")}


def of_update(c: Configuration, device: str, seed: int) -> Inputs:
    return {
        **of_gather(c, device, seed),
        "targets": _targets(c, device, seed),
        "predictions": normal(device, 300 + seed, c.tokens, c.width),
    }


def _options(c: Configuration) -> Inputs:
    return {"chunk_size": c.chunk, "top_k": c.picks, "score": c.score, "addressing_weight": c.key_weight}


def _of_memory(c: Configuration, device: str, seed: int) -> tuple[Inputs, Memory]:
    tokens = {
        "queries": _queries(c, device, seed).view(c.batch, c.length, c.heads, c.key_width),
        "targets": _targets(c, device, seed).view(c.batch, c.length, c.width),
    }
    return {**tokens, **_options(c)}, Memory(_keys(c, device), table(c.slots, c.width, c.dtype, device))


def _for_training(inputs: Inputs) -> Inputs:
    """All tensors require gradients: forward is that of training, which keeps what backward reads."""
    return {name: x.detach().requires_grad_() if isinstance(x, Tensor) else x for name, x in inputs.items()}


def of_sequence(c: Configuration, device: str, seed: int) -> Inputs:
    inputs, memory = _of_memory(c, device, seed)
    return _for_training({**inputs, **memory._asdict(), "boundary": c.boundary})


#: The layer's own parameters among the inputs of a layer; its table is `values`, as of all operations.
PARAMETERS = (
    *(f"{name}_norm.weight" for name in "qvgo"),
    *(f"{name}_proj.{kind}" for name in "qvgo" for kind in ("weight", "bias")),
    "keys",
)


def of_layer(c: Configuration, device: str, seed: int, *, scope: str) -> Inputs:
    """Hidden states as wide as a row of the table, and parameters for which queries are as normal as a sequence's."""
    out = {"q": c.heads * c.key_width, "v": c.width, "g": 1, "o": c.width}
    inputs: Inputs = {"hidden_states": normal(device, 100 + seed, c.batch, c.length, c.width).to(c.dtype)}
    for number, name in enumerate(PARAMETERS[:-1]):
        part, kind = name.split("_")
        shapes = {"norm.weight": (c.width,), "proj.weight": (out[part], c.width), "proj.bias": (out[part],)}
        x = normal(device, 10 + number, *shapes[kind]) * (c.width**-0.5 if kind == "proj.weight" else 0.1)
        inputs[name] = (x + 1 if kind == "norm.weight" else x).to(c.dtype)
    inputs |= {"keys": _keys(c, device), "values": table(c.slots, c.width, c.dtype, device), "scope": scope}
    return inputs | _options(c)


def of_layer_training(c: Configuration, device: str, seed: int, *, scope: str) -> Inputs:
    return _for_training(of_layer(c, device, seed, scope=scope))


def of_stream(c: Configuration, device: str, seed: int) -> Inputs:
    inputs, memory = _of_memory(c, device, seed)
    return {**inputs, "memory": memory}
