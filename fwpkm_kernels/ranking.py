"""The best columns of each row in plain PyTorch, in a definite order where there are equals."""

import torch
from torch import Tensor

# Up to so many columns are sorted in the time in which torch.topk finds the best ones and equals are looked for.
_FEW_COLUMNS = 32


def _top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """torch.topk of the last dimension, of many columns by way of the k groups of them with the largest maxima.

    These hold k elements that are no less than any element of the other groups. Of equals, any may be among the k.
    """
    columns, groups = scores.shape[-1], max(64, 4 * k)
    if columns < 4 * groups or columns % groups:
        return torch.topk(scores, k)
    grouped = scores.unflatten(-1, (columns // groups, groups))
    largest = torch.topk(grouped.amax(-2), k, sorted=False).indices
    members = grouped.gather(-1, largest.unsqueeze(-2).expand(*grouped.shape[:-1], k)).flatten(-2)
    best, place = _top(members, k)
    return best, (place // k).mul_(groups).add_(largest.gather(-1, place % k))


def best_columns(scores: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best k of the last dimension and their columns, in order: the lower of equals first, NaN is the largest.

    Third comes the best of the others, with one column; without others no column.
    torch.topk promises nothing about equals, and a stable sort of many columns costs many times more: so of those only
    rows in which one of the k has an equal, or is NaN, are sorted whole.
    """
    if scores.shape[-1] <= _FEW_COLUMNS:
        best, columns = torch.sort(scores, dim=-1, descending=True, stable=True)
    else:
        best, columns = _top(scores, min(k + 1, scores.shape[-1]))
        is_clear = best[..., 1:] < best[..., :-1]
        if not is_clear.all():
            tied = ~is_clear.all(-1)
            ordered, order = torch.sort(scores[tied], dim=-1, descending=True, stable=True)
            best[tied], columns[tied] = ordered[..., : best.shape[-1]], order[..., : best.shape[-1]]
    return best[..., :k], columns[..., :k], best[..., k : k + 1]


def order_equals_(scores: Tensor, columns: Tensor) -> None:
    """Put scores [..., K], and the columns that they belong to, in descending order, the lower of equals first.

    Most rows stand so already: only others are sorted.
    """
    is_clear = scores[..., 1:] < scores[..., :-1]
    if not is_clear.all():
        tied = ~is_clear.all(-1)
        found, order = torch.sort(columns[tied], dim=-1)
        scores[tied], places = torch.sort(scores[tied].gather(-1, order), dim=-1, descending=True, stable=True)
        columns[tied] = found.gather(-1, places)


def may_have_equals(rows: Tensor, norms: Tensor) -> bool:
    """Whether two of the rows [G, n, width] of one g may be equal; `norms` [G, n] are equal for equal rows.

    Different rows hardly ever have the same norm and the same first number.
    """
    marks = torch.add(norms.double(), rows[..., :1].sum(-1), alpha=1e-7).sort(-1).values
    return bool((marks[..., 1:] == marks[..., :-1]).any())
