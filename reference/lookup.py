"""Product-key lookup: the K best of n² slots, found through the K best sub-keys of each half."""

import torch
from torch import Tensor

# Most elements of one block of differences [rows, n, Dk/2]; it only bounds the memory used.
MAX_DIFFERENCES = 1 << 24


def product_key_lookup(
    queries: Tensor, keys: Tensor, top_k: int, *, score: str = "idw", eps: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """The K best slots of every query and head, by the two-stage rule.

    For head h and half a in {1, 2}, with qᵃ that half of the query: sᵃⱼ = q·k (``dot``) or −log(eps + ‖q − k‖²)
    (``idw``) over k = keys[h, a, j]. The K best of each half make K×K sums; the K best sums are the answer. Of equal
    half scores the lower sub-key index comes first; of equal sums the lower pair position i·K + j, where i and j are
    ranks within the halves. NaN comes before every number, as in ``torch.sort(descending=True)``.

    Args:
        queries: [..., H, Dk], any float dtype.
        keys: [H, 2, n, Dk/2], any float dtype.
        top_k: K, at most n.

    Returns:
        scores [..., H, K], descending, float32 (float64 for float64 inputs), differentiable in queries and keys;
        slots [..., H, K], int64, slot = j₁·n + j₂.
    """
    n = keys.shape[2]
    (first_best, first_index), (second_best, second_index) = best_half_scores(
        queries, keys, top_k, score=score, eps=eps
    )
    pair_sums = (first_best.unsqueeze(-1) + second_best.unsqueeze(-2)).flatten(-2)  # [..., H, K·K]
    pair_slots = (first_index.unsqueeze(-1) * n + second_index.unsqueeze(-2)).flatten(-2)
    scores, pair = _best(pair_sums, top_k)
    return scores, pair_slots.gather(-1, pair)


def brute_force_lookup(
    queries: Tensor, keys: Tensor, top_k: int, *, score: str = "idw", eps: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """The K best slots of every query and head, by one stable sort of all n² scores.

    Arguments and results are those of :func:`product_key_lookup`. The scores are always the same numbers, since rounded
    addition is monotonic, and so are the slots where no two scores are equal. Ties can differ: here the lower slot
    wins, there the lower pair of ranks. With half scores (0, 1) and (0, 1), slots 1 and 2 both score 1: slot 1 comes
    first here, and slot 2 there, being the best of the first half with the second best of the second.
    """
    first, second = half_scores(queries, keys, score=score, eps=eps)
    all_scores = (first.unsqueeze(-1) + second.unsqueeze(-2)).flatten(-2)  # [..., H, n·n], at position j₁·n + j₂
    return _best(all_scores, top_k)


def best_half_scores(
    queries: Tensor, keys: Tensor, top_k: int, *, score: str = "idw", eps: float = 1e-3
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The K best scores of each half and their sub-keys, [..., H, K], the best first.

    Only the sub-keys that are picked are scored with autograd. For the others it would multiply a gradient of 0 with a
    derivative that is NaN where a query is, and so write NaN where there is no gradient.
    """
    dtype = torch.promote_types(torch.promote_types(queries.dtype, keys.dtype), torch.float32)
    heads, _, _, half = keys.shape
    head = torch.arange(heads, device=keys.device).unsqueeze(-1)
    with torch.no_grad():
        positions = [_best(scores, top_k)[1] for scores in half_scores(queries, keys, score=score, eps=eps)]
    rows = queries.to(dtype).unflatten(-1, (2, half))  # [..., H, 2, Dk/2]
    first, second = (
        _score(rows[..., side, :], keys.to(dtype)[head, side, position], score, eps)
        for side, position in enumerate(positions)
    )
    return (first, positions[0]), (second, positions[1])


def half_scores(queries: Tensor, keys: Tensor, *, score: str = "idw", eps: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Scores of all n sub-keys of the two halves, two tensors [..., H, n]."""
    dtype = torch.promote_types(torch.promote_types(queries.dtype, keys.dtype), torch.float32)
    heads, _, n, half = keys.shape
    rows = queries.to(dtype).reshape(-1, heads, 2, half)
    halves = keys.to(dtype)
    block = max(1, MAX_DIFFERENCES // max(1, halves.numel()))
    scores = torch.cat([_score(part, halves, score, eps) for part in torch.split(rows, block)])  # [rows, H, 2, n]
    scores = scores.reshape(*queries.shape[:-1], 2, n)
    return scores[..., 0, :], scores[..., 1, :]


def _score(queries: Tensor, keys: Tensor, score: str, eps: float) -> Tensor:
    """[rows, H, 2, Dk/2], [H, 2, n, Dk/2] -> [rows, H, 2, n]."""
    pairs = queries.unsqueeze(-2)  # [rows, H, 2, 1, Dk/2]
    if score == "dot":
        return (pairs * keys).sum(-1)
    if score == "idw":
        return -torch.log(eps + (pairs - keys).square().sum(-1))
    raise ValueError(f"`score` must be 'idw' or 'dot', got {score!r}")


def _best(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The ``top_k`` largest along the last dimension and their positions; of equal ones the lower position first."""
    ordered, position = torch.sort(scores, dim=-1, descending=True, stable=True)
    return ordered[..., :top_k], position[..., :top_k]
