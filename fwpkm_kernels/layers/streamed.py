"""The memory of a layer that streams: a session for each sequence, or one for the whole batch."""

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks as checks
from ..chunks import Options
from ..documents import Documents, put_back, slide, take
from ..state import MemoryState
from ..streaming import fast_weight_memory_step


class Past(NamedTuple):
    """What a session was before it read tokens that completed a chunk, and these tokens."""

    state: MemoryState
    window: Tensor | None
    hidden_states: Tensor | None  #: of these tokens, and of as many as are `skipped` before them; the window is older
    skipped: int
    tokens: tuple[Any, ...]  #: queries, targets, gates, mask


class Session:
    """One memory that streams, with the normed hidden states that the layer's convolution still needs."""

    def __init__(self, state: MemoryState, options: Options, conv_width: int) -> None:
        self.state, self.options, self.before = state, options, conv_width - 1
        #: [B, w - 1 + C, d]: of the w - 1 tokens before the present chunk, and of those of the chunk.
        self.window: Tensor | None = None
        self.past: Past | None = None
        self._last: tuple[Tensor | None, Tensor | None] = (None, None)  #: the window before, and the input of, convolve

    @property
    def place(self) -> int:
        """How many tokens of the present chunk have been read."""
        return self.state.position % self.options.chunk_size

    def convolve(self, x: Tensor, weight: Tensor, record: bool) -> Tensor:
        """The convolution of x [B, t, d], which comes next, over what came before; keeps what rollbacks may need."""
        if self.window is None:
            size = (x.shape[0], self.before + self.options.chunk_size, x.shape[2])
            with torch.inference_mode(False):  # a step outside of inference mode writes it
                self.window = torch.zeros(size, dtype=x.dtype, device=x.device)
        if record:
            self._last = (self.window.clone(), x)
        return slide(self._slide_on(x, self.state.position), weight.to(x.dtype))

    def _slide_on(self, x: Tensor, position: int) -> Tensor:
        """Put tokens into the window, at the position where it stands; they, and the w - 1 tokens before them."""
        assert self.window is not None
        place, length = position % self.options.chunk_size, x.shape[1]
        history = torch.cat((self.window[:, : self.before + place], x), dim=1)
        left = self.before + (place + length) % self.options.chunk_size
        if place + length < self.options.chunk_size:
            self.window[:, self.before + place : left] = x
        else:
            self.window[:, :left] = history[:, history.shape[1] - left :]
        return history[:, place:]

    def step(self, *tokens: Any, record: bool) -> Tensor:
        """Read queries, targets, gates and mask; with `record`, the last C that complete a chunk may be taken back."""
        length, chunk_size = tokens[0].shape[1], self.options.chunk_size
        if not record:
            self.past = None
        if not record or self.place + length < chunk_size:
            return self._step(*tokens)
        skipped = max(0, length - chunk_size)
        first: Any = tuple(None if x is None else x[:, :skipped] for x in tokens)
        rest: Any = tuple(None if x is None else x[:, skipped:] for x in tokens)
        outputs = [self._step(*first)] if skipped else []
        self.past = Past(self.state.clone(), *self._last, skipped, rest)
        return torch.cat([*outputs, self._step(*rest)], dim=1)

    def _step(self, queries: Tensor, targets: Tensor, gates: Tensor | None, mask: Tensor | None) -> Tensor:
        return fast_weight_memory_step(self.state, queries, targets, gates=gates, mask=mask, **self.options._asdict())

    @property
    def most_undone(self) -> int:
        """How many of the last tokens can be taken back."""
        return self.place if self.past is None else self.state.position - self.past.state.position

    def rollback(self, tokens: int) -> None:
        """Take back the last tokens, at most `most_undone`."""
        if tokens <= self.place:
            self.state.rollback(tokens)
            return
        assert self.past is not None
        kept = self.state.position - tokens - self.past.state.position
        self.state, self.window, hidden_states, skipped, given = self.past
        self.past = None
        if hidden_states is not None:
            self._slide_on(hidden_states[:, : skipped + kept], self.state.position - skipped)
        kept_tokens: Any = (None if x is None else x[:, :kept] for x in given)
        self._step(*kept_tokens)

    def clone(self, device: torch.device | str | int | None = None) -> "Session":
        """An independent copy, which shares the initial memory; on another device perhaps."""
        other = copy.copy(self)
        other.state = self.state.clone() if device is None else self.state.to(device)
        other.window = None if self.window is None else self.window.to(other.state.values.device, copy=True)
        other.past = None
        return other

    def select(self, rows: list[int]) -> None:
        """Go on with some of the sequences of one memory."""
        if self.state.position > 0:
            self.state.select_(rows)
        if self.window is not None:
            self.window = self.window[rows]
        self.past = None


class StreamedMemory:
    """What a `FastWeightProductKeyMemory` reads and writes in place, call after call: see its `new_memory`.

    Under scope="sequence" it holds a `MemoryState` for each sequence, under "batch" one for all. Attributes: `batch`,
    how many sequences; `positions`, how many tokens each has read, without padding; `columns`, how many with padding;
    `records_past`, which lets `rollback` reach further, and may be set at any time.
    """

    def __init__(self, keys: Tensor, values: Tensor, batch: int, scope: str, options: Options, conv_width: int) -> None:
        self.batch, self.scope, self.options, self.records_past = batch, scope, options, False
        self._initial, self._conv_width = (keys, values), conv_width
        self.sessions = [self._new_session() for _ in range(batch if scope == "sequence" else 1)]
        self.columns = 0

    @classmethod
    def of_state(cls, state: MemoryState, batch: int, options: Options) -> "StreamedMemory":
        """Around a state of the caller's own, which is stepped; for one memory of `batch` sequences."""
        self = cls.__new__(cls)
        self.batch, self.scope, self.options, self.records_past = batch, "batch", options, False
        self.sessions = [Session(state, options, 1)]
        self.columns = state.position
        return self

    def _new_session(self) -> Session:
        return Session(MemoryState(*self._initial), self.options, self._conv_width)

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
            return self.sessions[0].convolve(x, weight, self.records_past)
        pairs = zip(self.sessions, take(x, pieces), strict=True)
        parts = [one.convolve(part, weight, self.records_past) for one, part in pairs]
        return put_back(parts, pieces, x) if parts else x

    def step(self, queries: Tensor, targets: Tensor, gates: Tensor | None, documents: Documents) -> Tensor:
        """Read the next tokens, [B, T, H, Dk] and [B, T, D]; the output [B, T, D], 0 at padding."""
        pieces, record = self._pieces(documents), self.records_past
        if pieces is None:
            read = self.sessions[0].step(queries, targets, gates, documents.mask, record=record)
        else:
            tokens = (take(x, pieces) for x in (queries, targets, gates))
            parts = [
                one.step(q, y, g, None, record=record) for one, q, y, g in zip(self.sessions, *tokens, strict=True)
            ]
            read = put_back(parts, pieces, targets) if parts else torch.empty_like(targets)
        self.columns += documents.length
        return read

    def reset(self) -> None:
        """Let every sequence begin anew, from the initial memory as it is now."""
        for one in self.sessions:
            one.state.reset()
            one.window = one.past = None
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

        In the present chunk that costs nothing. While `records_past` is True, what completes a chunk can be taken back
        too, up to chunk_size tokens: before it reads them, a session copies its memory, table and all, and keeps them;
        after a rollback over the beginning of a chunk it reads again those that stay.

        Raises:
            TypeError, ValueError: where a sequence cannot take back so many. Nothing has been changed then.
        """
        checks.check_int("tokens", tokens, minimum=0)
        least = min((x.most_undone for x in self.sessions), default=tokens)
        if tokens > least:
            raise ValueError(
                f"`tokens` must be at most {least}, what every sequence has read of its present chunk, or with "
                f"`records_past` since it completed one, got {tokens}"
            )
        for one in self.sessions:
            one.rollback(tokens)
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
