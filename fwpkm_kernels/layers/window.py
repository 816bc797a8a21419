"""The hidden states that a layer's convolution still needs, of sequences that stream."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._compile import _disable_dynamo


class Window:
    """The last hidden states of S sequences, in rows that all end at the same column, wherever each sequence stands.

    A rollback of all sequences then moves that end, and the next tokens of all are put behind it at once.
    """

    def __init__(self, width: int, chunk_size: int) -> None:
        self._before, self._chunk_size = width - 1, chunk_size
        self._rows: Tensor | None = None  #: [S, w - 1 + 2·C, d]; None is zeros
        self._end = self._before  #: how many columns are in use

    @_disable_dynamo
    def join(self, x: Tensor, lengths: list[int] | None) -> Tensor:
        """x [S, t, d] behind the w - 1 hidden states before each sequence's tokens, [S, w - 1 + t, d].

        Args:
            lengths: how many tokens there are of each sequence, at the end of its row; None means t.
        """
        if self._rows is None:
            before = x.new_zeros(x.shape[0], self._before, x.shape[2])
        else:
            before = self._rows[:, self._end - self._before : self._end].to(x.dtype)
        return _behind(before, x, lengths)

    def keep(self, x: Tensor, lengths: list[int] | None, reach: int) -> None:
        """Put x [S, t, d] behind what is there; a rollback of as many tokens as `reach` must be possible then."""
        kept = self._before + reach
        if x.shape[1] > kept:  # those before are needed by none
            lengths = None if lengths is None else [min(length, kept) for length in lengths]
            x = x[:, x.shape[1] - kept :]
        with torch.inference_mode(False), torch.no_grad():  # a later step outside of inference mode writes it
            if self._rows is None:
                size = (x.shape[0], self._before + 2 * self._chunk_size, x.shape[2])
                self._rows = torch.zeros(size, dtype=x.dtype, device=x.device)
            rows, end = self._rows, self._end + x.shape[1]
            if end <= rows.shape[1] and (lengths is None or min(lengths, default=0) == x.shape[1]):
                rows[:, self._end : end] = x
            else:
                rows[:, :kept] = _behind(rows[:, : self._end], x.to(rows.dtype), lengths)[:, end - kept :]
                end = kept
            self._end = end

    @property
    def num_bytes(self) -> int:
        return 0 if self._rows is None else self._rows.nbytes

    def rollback(self, tokens: int) -> None:
        """Forget the last tokens of all sequences."""
        if self._rows is not None:
            self._end -= tokens

    def emptied(self) -> "Window":
        """One like it, for sequences that begin."""
        return Window(self._before + 1, self._chunk_size)

    @torch.inference_mode(False)
    def select(self, rows: list[int], device: torch.device | None = None) -> "Window":
        """A copy with these sequences, on `device` if given."""
        other = self.emptied()
        if self._rows is not None:
            index = torch.tensor(rows, dtype=torch.int64, device=self._rows.device)
            other._rows, other._end = self._rows.index_select(0, index).to(device or self._rows.device), self._end
        return other

    @staticmethod
    @torch.inference_mode(False)
    def joined(windows: "Sequence[Window]", counts: Sequence[int]) -> "Window":
        """A copy with the sequences of several windows of one layer, so many of each."""
        joined = windows[0].emptied()
        joined._end = max(one._end for one in windows)
        like = next((one._rows for one in windows if one._rows is not None), None)
        if like is not None:
            pairs = zip(windows, counts, strict=True)
            rows = [like.new_zeros(count, *like.shape[1:]) if x._rows is None else x._rows for x, count in pairs]
            moves = [joined._end - x._end for x in windows]
            joined._rows = torch.cat([x.roll(move, dims=1) for x, move in zip(rows, moves, strict=True)])
        return joined


def _behind(before: Tensor, x: Tensor, lengths: list[int] | None) -> Tensor:
    """The last `lengths` tokens of each row of x [S, t, d] behind `before` [S, w, d], at the end of [S, w + t, d].

    Where a row has fewer tokens than t, columns in front of `before` hold anything.
    """
    both = torch.cat((before, x), dim=1)
    if lengths is None or min(lengths, default=0) == x.shape[1]:
        return both
    width, length = before.shape[1], x.shape[1]
    gaps = torch.tensor([[length - count] for count in lengths], dtype=torch.int64, device="cpu").to(x.device)
    column = torch.arange(width + length, device=x.device)
    index = torch.where(column < width + gaps, (column - gaps).clamp(min=0), column)
    return both.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))
