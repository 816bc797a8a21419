"""The memory of a layer that streams: one for each sequence, or one for the whole batch."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from .. import _checks as checks
from ..documents import Documents
from ..options import Options
from ..pool import MemoryPool
from ..records import Tokens
from ..state import MemoryState
from .convolution import slide
from .memories import Pooled, States, joined
from .window import Window


class Alignment(NamedTuple):
    """Where the tokens of S sequences, each at the end of a row [t], lie among the B·T."""

    lengths: list[int] | None  #: how many tokens each row has; None means t
    places: Tensor | None  #: int64 [S, t], on the CPU: which token is where; None where rows are those of the batch

    @classmethod
    def of(cls, documents: Documents) -> "Alignment":
        """Rows of the batch stay where they are if all padding is on the left. A mask on a GPU is waited for."""
        if documents.are_rows:
            return cls(None, None)
        pieces = documents.pieces()
        lengths = [x.stop - x.start if isinstance(x, slice) else len(x) for x in pieces]
        ends = [documents.length * (row + 1) for row in range(len(pieces))]
        if documents.cu_seqlens is None and all(
            isinstance(x, slice) and x.stop in (x.start, end) for x, end in zip(pieces, ends, strict=True)
        ):
            return cls(lengths, None)
        longest = max(lengths, default=0)
        places = torch.zeros(len(pieces), longest, dtype=torch.int64, device="cpu")
        for row, (piece, length) in enumerate(zip(pieces, lengths, strict=True)):
            where = torch.arange(piece.start, piece.stop, device="cpu") if isinstance(piece, slice) else piece
            places[row, longest - length :] = where
        return cls(lengths, places)

    def take(self, x: Tensor) -> Tensor:
        """The rows [S, t, ...] of x [B, T, ...]."""
        if self.places is None:
            return x
        return x.flatten(0, 1)[self.places.to(x.device)]

    def put_back(self, rows: Tensor, like: Tensor) -> Tensor:
        """The inverse of `take`, [B, T, ...] as `like` has B and T; 0 at padding."""
        if self.places is None or self.lengths is None:
            return rows
        gaps = rows.shape[1] - torch.tensor(self.lengths, dtype=torch.int64, device="cpu")
        is_real = torch.arange(rows.shape[1], device="cpu") >= gaps.unsqueeze(1)
        source = is_real.flatten().nonzero().flatten()
        to, source = (x.to(rows.device) for x in (self.places.flatten()[source], source))
        flat = rows.new_zeros(like.shape[0] * like.shape[1], *rows.shape[2:])
        return flat.index_copy(0, to, rows.flatten(0, 1)[source]).view(*like.shape[:2], *rows.shape[2:])


class StreamedMemory:
    """What a `FastWeightProductKeyMemory` reads and writes in place, call after call: see its `new_memory`.

    Attributes: `batch`, how many sequences; `positions`, how many tokens each has read, without padding; `columns`, how
    many with padding; `records_past`, which lets `rollback` reach further, and may be set at any time; `pool`, the
    `MemoryPool` in which the sequences are sessions, or None.
    """

    def __init__(
        self, memories: Pooled | States, batch: int, scope: str, options: Options, conv_width: int, columns: int = 0
    ) -> None:
        self._memories, self.batch, self.scope, self.columns = memories, batch, scope, columns
        self._options, self._conv_width, self._records_past = options, conv_width, False
        self.window = Window(conv_width, options.chunk_size)
        self._coming: Tensor | None = None  #: what `convolve` was given; `step` puts it into the window

    @classmethod
    def of_state(cls, state: MemoryState, batch: int, options: Options) -> "StreamedMemory":
        """Wrap the caller's own state, which steps write, as one memory of `batch` sequences."""
        return cls(States([state], options), batch, "batch", options, 1, state.position)

    @classmethod
    def joined(cls, memories: "Sequence[StreamedMemory]") -> "StreamedMemory":
        """The sequences of several memories as those of one, one memory's behind the other's.

        They may have read differently many tokens. The memories that are given have none any more, as after `close`.

        Raises:
            TypeError, ValueError: the memories are not all of one layer and in one `MemoryPool`, one comes twice, or
                there is none.
        """
        for one in memories:
            if not isinstance(one, StreamedMemory):
                raise TypeError(f"`memories` must be StreamedMemorys, got {type(one).__name__}")
        if len({(one._conv_width, one._options.chunk_size) for one in memories}) != 1:
            raise ValueError(f"`memories` must be of one layer, got {list(memories)}")
        if len({id(one) for one in memories}) < len(memories):
            raise ValueError(f"`memories` must name each memory once, got {list(memories)}")
        self = memories[0]._alias()
        self.window = Window.joined([one.window for one in memories], [one.batch for one in memories])
        self.batch, self.columns = sum(one.batch for one in memories), max(one.columns for one in memories)
        self._memories = joined([one._memories for one in memories])
        for one in memories:
            one.close()
        return self

    def take_over(
        self, keys: tuple[int, ...], values: tuple[int, ...], scope: str, options: Options, conv_width: int
    ) -> None:
        """Use the layer's present options from now on; refuse a layer unlike the one that has made this memory.

        Of its keys and of its columns of the values these are the shapes.

        The memories themselves refuse a change of options that must be the same in all steps.
        """
        if self.batch > 0:
            names = ("scope", "query_conv", "keys", "values", "chunk_size")
            came = (scope, conv_width, list(keys), list(values), options.chunk_size)
            memories = self._memories
            shapes = (list(memories.keys.shape), list(memories.values.shape))
            own = (self.scope, self._conv_width, *shapes, self._options.chunk_size)
            for name, ours, theirs in zip(names, came, own, strict=True):
                if ours != theirs:
                    raise ValueError(
                        f"`memory` must have been made by this layer, whose {name} is {ours}, got {theirs}"
                    )
        self._options = options

    @property
    def pool(self) -> MemoryPool | None:
        return self._memories.pool if isinstance(self._memories, Pooled) else None

    @property
    def positions(self) -> list[int]:
        """How many tokens each sequence has read; under scope="batch" padding counts."""
        positions = self._memories.positions
        return positions if self.scope == "sequence" else positions * self.batch

    @property
    def records_past(self) -> bool:
        """Whether `rollback` reaches through the last chunk that is written from now on."""
        return self._records_past

    @records_past.setter
    def records_past(self, records_past: bool) -> None:
        checks.check_flag("records_past", records_past)
        self._records_past = records_past

    @property
    def device(self) -> torch.device:
        """Where the memory is. That of no sequences has none without a pool, and raises a ValueError."""
        return self._memories.device

    @property
    def dtype(self) -> torch.dtype:
        """That of the memory. That of no sequences has none without a pool, and raises a ValueError."""
        return self._memories.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of what the sequences hold: rows, index, queue and keys in a pool, `MemoryPool.num_bytes` of each, or
        tables and queues; and what the convolution needs. Pasts do not count. This waits for a GPU."""
        return self._memories.num_bytes + self.window.num_bytes

    def _alignment(self, documents: Documents) -> Alignment:
        return Alignment.of(documents) if self.scope == "sequence" else Alignment(None, None)

    @torch.no_grad()
    def convolve(self, x: Tensor, weight: Tensor, documents: Documents) -> Tensor:
        """The layer's convolution over the next tokens' x [B, T, d]; to be called before `step`."""
        if self.scope == "batch" and documents.mask is not None:
            x = torch.where((documents.mask > 0).unsqueeze(-1), x, 0.0)
        if self.batch == 0:
            return x
        alignment = self._alignment(documents)
        self._coming = alignment.take(x)
        rows = slide(self.window.join(self._coming, alignment.lengths), weight.to(x.dtype))
        return alignment.put_back(rows, x)

    @torch.no_grad()
    def step(self, queries: Tensor, targets: Tensor, gates: Tensor | None, documents: Documents) -> Tensor:
        """Read the next tokens, [B, T, H, Dk] and [B, T, D]; return the output [B, T, D], 0 at padding."""
        alignment, coming = self._alignment(documents), self._coming
        self._coming = None
        if self.batch == 0:
            return torch.zeros_like(targets)
        mask = documents.mask if self.scope == "batch" else None
        tokens = Tokens(queries, targets, gates, mask).map(alignment.take)
        read = self._memories.step(tokens, alignment.lengths, self._options, self.records_past)
        if coming is not None:  # only now, so that a step that raises has changed nothing
            self._keep(coming, alignment.lengths)
        self.columns += documents.length
        return alignment.put_back(read, targets)

    @_disable_dynamo
    def _keep(self, coming: Tensor, lengths: list[int] | None) -> None:
        """Put what was convolved into the window, which a rollback may need."""
        self.window.keep(coming, lengths, max(self._memories.reach))

    def reset(self) -> None:
        """Let every sequence begin anew, from the initial memory as it is now.

        That is what the layer has that made this object, or the one of which this is a clone, also where
        load_state_dict(assign=True) has given it other tensors. A pool goes over to these, and its other memories raise
        until they are reset too.

        These begin with what they had before: memories of a layer that casts or computes its keys or table, or whose
        Parameters have no data now; what `to` has made in a pool on another device; and what comes out of a file, with
        the tensors that were pickled with it.

        Raises:
            RuntimeError: the sequences are in a pool, and the layer has moved to another dtype or device; make another
                memory then. Nothing has changed.
        """
        self._memories.reset()
        self.window = self.window.emptied()
        self.columns = 0

    def reorder(self, indices: Tensor | Sequence[int]) -> None:
        """Let the sequences at `indices` go on, in this order: beams, sub-batches, several answers to one prompt.

        Args:
            indices: [new batch], integers in [0, batch); a sequence that comes twice goes on as two.

        Raises:
            TypeError, ValueError: for other indices. Under scope="batch" sequences share one memory, so indices must
                increase: rows can only be left out.
        """
        on_cpu = indices.cpu() if isinstance(indices, Tensor) and not indices.is_meta else indices
        rows = checks.check_indices(on_cpu, self.batch).tolist()
        if self.scope == "batch" and any(after <= before for before, after in pairwise(rows)):
            raise ValueError(f'`scope`="batch" has one memory, of which no sequence can be repeated, got rows {rows}')
        if rows == list(range(self.batch)):
            return
        if self.scope == "batch" and isinstance(self._memories, States):
            self._memories.select_batch(rows)
        else:
            self._memories.select(rows)
        self.window = self.window.select(rows)
        self.batch = len(rows)

    def rollback(self, tokens: int) -> None:
        """Take back the last `tokens` tokens of every sequence, as if they had never been read.

        Within the present chunk that costs nothing. Where a chunk was written while `records_past` was True, a rollback
        also reaches to its beginning: so over chunk_size tokens or more. In a pool a sequence then holds index, queue,
        keys and the rows that this chunk has changed twice: `MemoryPool(keep_past=True)`. A memory without a pool
        copies its table before it reads what completes a chunk, keeps these tokens, and reads those that stay again.
        Clones, and a sequence that `reorder` repeats, have no such record.

        `tokens` counts tokens alone, without padding behind them, on the right.

        Raises:
            TypeError, ValueError: where a sequence cannot take back so many. Nothing has changed then.
        """
        checks.check_int("tokens", tokens, minimum=0)
        least = min(self._memories.reach, default=tokens)
        if tokens > least:
            raise ValueError(
                f"`tokens` must be at most {least}, what every sequence has read of its present chunk, or with "
                f"`records_past` since the one before began, got {tokens}"
            )
        self._memories.rollback(tokens)
        self.window.rollback(tokens)
        self.columns -= tokens

    def close(self) -> None:
        """Free what the sequences hold, in the caller's own pool too; this memory is for no sequences then."""
        self._memories.close()
        self.window = self.window.emptied()
        self.batch = 0

    def __repr__(self) -> str:
        return f"StreamedMemory(batch={self.batch}, scope={self.scope!r}, positions={self.positions})"

    def clone(self) -> "StreamedMemory":
        """An independent copy, which shares the initial memory, and in a pool all rows that neither writes."""
        return self._copy(None)

    __copy__ = clone

    def __deepcopy__(self, memo: dict[int, Any]) -> "StreamedMemory":
        return self.clone()

    def to(self, device: torch.device | str | int) -> "StreamedMemory":
        """An independent copy on another device, in a pool of its own there.

        Raises:
            TypeError, ValueError: for what is no device, or for a pool the meta device, where nothing has data.
        """
        device = checks.as_device("device", device)
        if device.type == "meta" and self.pool is not None:
            raise ValueError("`device` must be one on which tensors have data, got meta")
        return self._copy(torch.empty(0, device=device).device)

    def _alias(self) -> "StreamedMemory":
        """Another object with the same attributes."""
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        return other

    def _copy(self, device: torch.device | None) -> "StreamedMemory":
        other = self._alias()
        other._memories = self._memories.copy(device)
        other.window = self.window.select(list(range(self.batch)), device)
        return other
