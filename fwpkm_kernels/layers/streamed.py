"""The memory of a layer that streams: a session for each sequence, or one for the whole batch."""

import copy
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .. import _checks as checks
from ..chunks import Options
from ..documents import Documents, put_back, slide, take
from ..state import MemoryState
from ..streaming import fast_weight_memory_step


class Session:
    """One memory that streams, with the normed hidden states that the layer's convolution still needs."""

    def __init__(self, state: MemoryState, chunk_size: int, conv_width: int) -> None:
        self.state = state
        self.chunk_size, self.before = chunk_size, conv_width - 1
        #: [B, w - 1 + C, d]: of the w - 1 tokens before the present chunk, and of those of the chunk.
        self.window: Tensor | None = None

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """The convolution of x [B, t, d], which comes next, over what came before; keeps what rollbacks may need."""
        if self.window is None:
            size = (x.shape[0], self.before + self.chunk_size, x.shape[2])
            with torch.inference_mode(False):  # a step outside of inference mode writes it
                self.window = torch.zeros(size, dtype=x.dtype, device=x.device)
        place, length = self.state.position % self.chunk_size, x.shape[1]
        history = torch.cat((self.window[:, : self.before + place], x), dim=1)
        left = self.before + (place + length) % self.chunk_size
        if place + length < self.chunk_size:
            self.window[:, self.before + place : left] = x
        else:
            self.window[:, :left] = history[:, history.shape[1] - left :]
        return slide(history[:, place:], weight.to(x.dtype))

    def clone(self, device: torch.device | str | int | None = None) -> "Session":
        """An independent copy, which shares the initial memory; on another device perhaps."""
        other = copy.copy(self)
        other.state = self.state.clone() if device is None else self.state.to(device)
        other.window = None if self.window is None else self.window.to(other.state.values.device, copy=True)
        return other

    def select(self, rows: list[int]) -> None:
        """Go on with some of the sequences of one memory."""
        if self.state.position > 0:
            self.state.select_(rows)
        if self.window is not None:
            self.window = self.window[rows]


class StreamedMemory:
    """What a `FastWeightProductKeyMemory` reads and writes in place, call after call: see its `new_memory`.

    Under scope="sequence" it holds a `MemoryState` for each sequence, under "batch" one for all. Attributes: `batch`,
    how many sequences; `positions`, how many tokens each has read, without padding; `columns`, how many with padding.
    """

    def __init__(self, keys: Tensor, values: Tensor, batch: int, scope: str, options: Options, conv_width: int) -> None:
        self.batch, self.scope, self.options = batch, scope, options
        self._initial, self._conv_width = (keys, values), conv_width
        self.sessions = [self._new_session() for _ in range(batch if scope == "sequence" else 1)]
        self.columns = 0

    @classmethod
    def of_state(cls, state: MemoryState, batch: int, options: Options) -> "StreamedMemory":
        """Around a state of the caller's own, which is stepped; for one memory of `batch` sequences."""
        self = cls.__new__(cls)
        self.batch, self.scope, self.options = batch, "batch", options
        self.sessions = [Session(state, options.chunk_size, 1)]
        self.columns = state.position
        return self

    def _new_session(self) -> Session:
        return Session(MemoryState(*self._initial), self.options.chunk_size, self._conv_width)

    @property
    def positions(self) -> list[int]:
        """How many tokens each sequence has read; under scope="batch" with padding."""
        return [x.state.position for x in (self.sessions if self.scope == "sequence" else self.sessions * self.batch)]

    def _pieces(self, documents: Documents) -> list[slice | Tensor] | None:
        """Where the tokens of each session lie among the B·T; None where one session has them all as they are."""
        return None if self.scope == "batch" or documents.is_one else documents.pieces()

    @torch.no_grad()
    def convolve(self, x: Tensor, weight: Tensor, documents: Documents) -> Tensor:
        """The layer's convolution over x [B, T, d], which comes next in the sequences; before `step`."""
        pieces = self._pieces(documents)
        if pieces is None:
            if documents.mask is not None:
                x = torch.where((documents.mask > 0).unsqueeze(-1), x, 0.0)
            return self.sessions[0].convolve(x, weight)
        parts = [one.convolve(take(x, piece), weight) for one, piece in zip(self.sessions, pieces, strict=True)]
        return put_back(parts, pieces, x) if parts else x

    def step(self, queries: Tensor, targets: Tensor, gates: Tensor | None, documents: Documents) -> Tensor:
        """Read the next tokens, [B, T, H, Dk] and [B, T, D]; the output [B, T, D], 0 at padding."""
        pieces, options = self._pieces(documents), self.options._asdict()
        if pieces is None:
            state, mask = self.sessions[0].state, documents.mask
            read = fast_weight_memory_step(state, queries, targets, gates=gates, mask=mask, **options)
        else:
            parts = []
            for one, piece in zip(self.sessions, pieces, strict=True):
                of_piece = (take(queries, piece), take(targets, piece))
                of_gates = None if gates is None else take(gates, piece)
                parts.append(fast_weight_memory_step(one.state, *of_piece, gates=of_gates, **options))
            read = put_back(parts, pieces, targets) if parts else torch.empty_like(targets)
        self.columns += documents.length
        return read

    def reset(self) -> None:
        """Let every sequence begin anew, from the initial memory as it is now."""
        for one in self.sessions:
            one.state.reset()
            one.window = None
        self.columns = 0

    def reorder(self, indices: Tensor | Sequence[int]) -> None:
        """Let the sequences at `indices` go on, in this order: beams, sub-batches, several answers to one prompt.

        Args:
            indices: [new batch], integers in [0, batch); a sequence that comes twice goes on as two.

        Raises:
            ValueError: out of range; under scope="batch", where sequences have no memory of their own, for anything but
                a part of them in its order.
        """
        rows = [checks.check_int("indices", int(x), minimum=0) for x in indices]
        if max(rows, default=-1) >= self.batch:
            raise ValueError(f"`indices` must lie in [0, {self.batch}), got {max(rows)}")
        if self.scope == "batch":
            if any(after <= before for before, after in pairwise(rows)):
                raise ValueError(
                    f'`scope`="batch" has one memory, of which no sequence can be repeated, got rows {rows}'
                )
            if len(rows) < self.batch:
                self.sessions[0].select(rows)
        else:
            # A session moves to where it is taken first; only further takers need a copy of their own.
            self.sessions = [
                self.sessions[row] if row not in rows[:place] else self.sessions[row].clone()
                for place, row in enumerate(rows)
            ]
        self.batch = len(rows)

    def rollback(self, tokens: int) -> None:
        """Take back the last `tokens` tokens of every sequence, as if they had never been read.

        Raises:
            TypeError, ValueError: where a sequence has read fewer in its present chunk: what it had read before is
                written already. Nothing has been changed then.
        """
        checks.check_int("tokens", tokens, minimum=0)
        least = min((x.state.position % self.options.chunk_size for x in self.sessions), default=0)
        if tokens > least:
            raise ValueError(
                f"`tokens` must be at most {least}, what every sequence has read of its present chunk, got {tokens}"
            )
        for one in self.sessions:
            one.state.rollback(tokens)
        self.columns -= tokens

    def clone(self) -> "StreamedMemory":
        """An independent copy, which shares the initial memory."""
        other = copy.copy(self)
        other.sessions = [one.clone() for one in self.sessions]
        return other

    def to(self, device: torch.device | str | int) -> "StreamedMemory":
        """An independent copy on another device."""
        other = copy.copy(self)
        other.sessions = [one.clone(device) for one in self.sessions]
        return other
