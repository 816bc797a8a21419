"""The options of the whole memory, in one record, and what each of its parts is given of them."""

from typing import Any, NamedTuple

import torch

from .chunks import Chunk, Reads, count_read_positions, count_writes, cut, number_reads
from .records import Layout

#: The fields of `Options` in the schema of an operator.
OPTIONS_SCHEMA = (
    "int chunk_size, int top_k, int lookahead, str score, float eps, str weighting, float temperature, float lr, "
    "float weight_decay, float? clip, float addressing_weight, str key_gradient, str step, str boundary, "
    "str precision, str backend"
)


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
    def lookup(self) -> dict[str, Any]:
        """Those of `lookup_halves`."""
        names = ("top_k", "score", "eps", "precision", "backend")
        return {name: getattr(self, name) for name in names}

    @property
    def key_step(self) -> dict[str, Any]:
        """Those of `step_keys`."""
        names = ("score", "eps", "lr", "weight_decay", "clip", "backend")
        return {"weight": self.addressing_weight} | {name: getattr(self, name) for name in names}

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
