"""The memory of a layer that streams: a session for each sequence, or one for the whole batch."""

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks as checks
from ..documents import Documents, put_back, take
from ..options import Options
from ..records import each
from ..state import MemoryState
from ..streaming import fast_weight_memory_step
from .convolution import slide


class Past(NamedTuple):
    """A session as it was before it read tokens that completed a chunk, and these tokens."""

    state: MemoryState
    window: Tensor | None
    hidden_states: Tensor | None  #: of these tokens and the `skipped` ones before them, which are not in the window
    skipped: int
    tokens: tuple[Any, ...]  #: queries, targets, gates, mask


class Session:
    """One memory that streams, with the normed hidden states that the layer's convolution still needs."""

    def __init__(self, state: MemoryState, options: Options, conv_width: int) -> None:
        self.state, self.options, self.before = state, options, conv_width - 1
        #: [B, w - 1 + C, d]: hidden states of the w - 1 tokens before the present chunk, then of the chunk's.
        self.window: Tensor | None = None
        self.past: Past | None = None
        self._coming: Tensor | None = None  #: what `convolve` was given; `step` puts it into the window

    @property
    def place(self) -> int:
        """How many tokens of the present chunk have been read."""
        return self.state.position % self.options.chunk_size

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """Convolve the next tokens' x [B, t, d] with what came before; `step` then puts x into the window."""
        self._coming = x
        return slide(self._history(x, self.state.position), weight.to(x.dtype))

    def _history(self, x: Tensor, position: int) -> Tensor:
        """x, whose first token has this position, behind the w - 1 hidden states before it."""
        if self.window is None:
            before = x.new_zeros(x.shape[0], self.before, x.shape[2])
        else:
            place = position % self.options.chunk_size
            before = self.window[:, place : place + self.before].to(x.dtype)
        return torch.cat((before, x), dim=1)

    def _keep(self, x: Tensor, position: int) -> None:
        """Put x, whose first token has this position, into the window, and drop what it no longer needs."""
        chunk_size, place, length = self.options.chunk_size, position % self.options.chunk_size, x.shape[1]
        if self.window is None:
            with torch.inference_mode(False):  # a later step outside of inference mode writes it
                size = (x.shape[0], self.before + chunk_size, x.shape[2])
                self.window = torch.zeros(size, dtype=x.dtype, device=x.device)
        left = self.before + (place + length) % chunk_size
        if place + length < chunk_size:
            self.window[:, self.before + place : left] = x
        else:
            history = torch.cat((self.window[:, : self.before + place], x), dim=1)
            self.window[:, :left] = history[:, history.shape[1] - left :]

    def step(self, *tokens: Any, record: bool) -> Tensor:
        """Read queries, targets, gates and mask; with `record`, the last C tokens of a full chunk can be taken back."""
        length, position, coming = tokens[0].shape[1], self.state.position, self._coming
        if not record:
            self.past = None
        if record and self.place + length >= self.options.chunk_size:
            output = self._step_recorded(tokens, coming)
        else:
            output = self._step(*tokens)
        if coming is not None:  # only now, so that a step that raises has changed nothing
            self._keep(coming, position)
        self._coming = None
        return output

    def _step_recorded(self, tokens: tuple[Any, ...], coming: Tensor | None) -> Tensor:
        skipped = max(0, tokens[0].shape[1] - self.options.chunk_size)
        first: Any = each(lambda x: x[:, :skipped], *tokens)
        rest: Any = each(lambda x: x[:, skipped:], *tokens)
        outputs = [self._step(*first)] if skipped else []
        window = None if self.window is None else _copy(self.window)
        past = Past(self.state.clone(), window, coming, skipped, rest)
        outputs.append(self._step(*rest))
        self.past = past
        return torch.cat(outputs, dim=1)

    def _step(self, queries: Tensor, targets: Tensor, gates: Tensor | None, mask: Tensor | None) -> Tensor:
        return fast_weight_memory_step(self.state, queries, targets, gates=gates, mask=mask, **self.options._asdict())

    @property
    def most_undone(self) -> int:
        """How many of the last tokens can be taken back."""
        if self.past is None:
            return self.place
        position = self.past.state.position
        return self.state.position - position + position % self.options.chunk_size

    def rollback(self, tokens: int) -> None:
        """Take back the last tokens, at most `most_undone`."""
        if tokens <= self.place:
            self.state.rollback(tokens)
            return
        assert self.past is not None
        kept = self.state.position - tokens - self.past.state.position  # of the recorded tokens
        self.state, self.window, hidden_states, skipped, given = self.past
        self.past = None
        if hidden_states is not None:
            self._keep(hidden_states[:, : max(0, skipped + kept)], self.state.position - skipped)
        if kept < 0:
            self.state.rollback(-kept)
        else:
            kept_tokens: Any = each(lambda x: x[:, :kept], *given)
            self._step(*kept_tokens)

    @torch.inference_mode(False)  # so a copy made in inference mode can be stepped outside of it
    def clone(self, device: torch.device | str | int | None = None) -> "Session":
        """An independent copy, on `device` if given, which shares the initial memory and has no recorded past."""
        other = copy.copy(self)
        other.state = self.state.clone() if device is None else self.state.to(device)
        other.window = None if self.window is None else _copy(self.window, other.state.values.device)
        other.past = None
        return other

    def select(self, rows: list[int]) -> None:
        """Keep some of the sequences of one memory."""
        if self.state._binding is not None:  # a state that is not bound has no rows yet
            self.state.select_(rows)
        if self.window is not None:
            with torch.inference_mode(False):
                self.window = self.window[rows].clone()
        self.past = None


def _copy(x: Tensor, device: torch.device | None = None) -> Tensor:
    """A copy that can be written in and out of inference mode."""
    with torch.inference_mode(False):
        return x.to(device or x.device, copy=True)


class StreamedMemory:
    """What a `FastWeightProductKeyMemory` reads and writes in place, call after call: see its `new_memory`.

    Under scope="sequence" it holds a `MemoryState` for each sequence, under "batch" one for all. Attributes: `batch`,
    how many sequences; `positions`, how many tokens each has read, without padding; `columns`, how many with padding;
    `records_past`, which lets `rollback` reach further, and may be set at any time.
    """

    def __init__(self, keys: Tensor, values: Tensor, batch: int, scope: str, options: Options, conv_width: int) -> None:
        self.batch, self.scope, self.conv_width, self.records_past = batch, scope, conv_width, False
        count = batch if scope == "sequence" else 1
        self.sessions = [Session(MemoryState(keys, values), options, conv_width) for _ in range(count)]
        self.columns = 0

    @classmethod
    def of_state(cls, state: MemoryState, batch: int, options: Options) -> "StreamedMemory":
        """Wrap the caller's own state, which steps write, as one memory of `batch` sequences."""
        self = cls.__new__(cls)
        self.batch, self.scope, self.conv_width, self.records_past = batch, "batch", 1, False
        self.sessions = [Session(state, options, 1)]
        self.columns = state.position
        return self

    def take_over(self, keys: Tensor, values: Tensor, scope: str, options: Options, conv_width: int) -> None:
        """Use the layer's present options from now on; refuse a layer unlike the one that has made this memory.

        The states themselves refuse a change of options that must be the same in all steps.
        """
        names = ("scope", "query_conv", "keys", "values", "chunk_size")
        came = (scope, conv_width, keys.shape, values.shape, options.chunk_size)
        for one in self.sessions[:1]:
            own = (self.scope, self.conv_width, one.state.keys.shape, one.state.values.shape, one.options.chunk_size)
            for name, ours, theirs in zip(names, came, own, strict=True):
                if ours != theirs:
                    ours, theirs = (list(x) if isinstance(x, torch.Size) else x for x in (ours, theirs))
                    raise ValueError(
                        f"`memory` must have been made by this layer, whose {name} is {ours}, got {theirs}"
                    )
        for one in self.sessions:
            one.options = options

    @property
    def positions(self) -> list[int]:
        """How many tokens each sequence has read; under scope="batch" padding counts."""
        return [x.state.position for x in (self.sessions if self.scope == "sequence" else self.sessions * self.batch)]

    def _pieces(self, documents: Documents) -> list[slice | Tensor] | None:
        """Where each session's tokens lie among the B·T; None where one session reads all of them in place."""
        return None if self.scope == "batch" or documents.is_one else documents.pieces()

    @torch.no_grad()
    def convolve(self, x: Tensor, weight: Tensor, documents: Documents) -> Tensor:
        """The layer's convolution over the next tokens' x [B, T, d]; to be called before `step`."""
        pieces = self._pieces(documents)
        if pieces is None:
            if documents.mask is not None:
                x = torch.where((documents.mask > 0).unsqueeze(-1), x, 0.0)
            return self.sessions[0].convolve(x, weight)
        pairs = zip(self.sessions, take(x, pieces), strict=True)
        parts = [one.convolve(part, weight) for one, part in pairs]
        return put_back(parts, pieces, x) if parts else x

    def step(self, queries: Tensor, targets: Tensor, gates: Tensor | None, documents: Documents) -> Tensor:
        """Read the next tokens, [B, T, H, Dk] and [B, T, D]; return the output [B, T, D], 0 at padding."""
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
        """Let every sequence begin anew, from the initial memory as it is now.

        A layer whose memory runs in another dtype than its Parameters has copied them when it made this object: there
        the sequences begin with that copy.
        """
        for one in self.sessions:
            one.state.reset()
            one.window = one.past = None
        self.columns = 0

    def reorder(self, indices: Tensor | Sequence[int]) -> None:
        """Let the sequences at `indices` go on, in this order: beams, sub-batches, several answers to one prompt.

        Args:
            indices: [new batch], integers in [0, batch); a sequence that comes twice goes on as two.

        Raises:
            TypeError, ValueError: for other indices. Under scope="batch" sequences share one memory, so indices must
                increase: rows can only be left out.
        """
        on_cpu = indices.cpu() if isinstance(indices, Tensor) else indices
        rows = checks.check_indices(on_cpu, self.batch).tolist()
        if self.scope == "batch":
            if any(after <= before for before, after in pairwise(rows)):
                raise ValueError(
                    f'`scope`="batch" has one memory, of which no sequence can be repeated, got rows {rows}'
                )
            if len(rows) < self.batch:
                self.sessions[0].select(rows)
        else:
            # The first place that takes a session gets the session itself; each further place gets a copy.
            self.sessions = [
                self.sessions[row] if row not in rows[:place] else self.sessions[row].clone()
                for place, row in enumerate(rows)
            ]
        self.batch = len(rows)

    def rollback(self, tokens: int) -> None:
        """Take back the last `tokens` tokens of every sequence, as if they had never been read.

        Within the present chunk that costs nothing. While `records_past` is True, a rollback also reaches over the
        beginning of the chunk, for at least chunk_size tokens. For that, a session that reads tokens which complete a
        chunk copies its memory before, with the table, and keeps the tokens; a rollback then restores the copy and
        reads the tokens that stay again. Clones, and a sequence that `reorder` repeats, have no such record.

        `tokens` counts tokens alone, without padding behind them, on the right.

        Raises:
            TypeError, ValueError: where a sequence cannot take back so many. Nothing has changed then.
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

    def __repr__(self) -> str:
        return f"StreamedMemory(batch={self.batch}, scope={self.scope!r}, positions={self.positions})"

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
