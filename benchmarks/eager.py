"""The operations and the memory in plain PyTorch, sparse and dense.

Each takes the arguments of the reference of the same operation, by name.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.inputs import Memory
from fwpkm_kernels.options import Options

#: ε of every row.
EPS = Options().eps


def _half_winners(queries: Tensor, keys: Tensor, top_k: int, score: str) -> tuple[Tensor, Tensor]:
    """Scores and sub-keys of the K best of each half, [H, 2, M, K]: one matrix product and torch.topk."""
    rows = _halves(queries, keys)
    scores = rows @ keys.mT  # [H, 2, M, n]
    if score == "dot":
        best, columns = scores.topk(top_k)
        return best, columns
    distance = rows.square().sum(-1, keepdim=True) - 2 * scores + keys.square().sum(-1).unsqueeze(-2)
    nearest, columns = distance.topk(top_k, largest=False)
    return -torch.log(EPS + nearest.clamp(min=0)), columns  # the logarithm of the winners only


def _halves(queries: Tensor, keys: Tensor) -> Tensor:
    """[M, H, Dk] as [H, 2, M, Dk/2]."""
    return queries.to(keys.dtype).unflatten(-1, (2, keys.shape[3])).permute(1, 2, 0, 3)


def _pair_winners(best: Tensor, columns: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """Scores and slots [M, H, K] from the winners of the halves: torch.topk of the pairs."""
    top_k = best.shape[-1]
    sums = (best[:, 0].unsqueeze(-1) + best[:, 1].unsqueeze(-2)).flatten(-2)  # [H, M, K·K]
    scores, pair = sums.topk(top_k)
    slots = columns[:, 0].gather(-1, pair // top_k) * num_keys + columns[:, 1].gather(-1, pair % top_k)
    return scores.transpose(0, 1), slots.transpose(0, 1)


def torch_lookup(queries: Tensor, keys: Tensor, top_k: int, score: str) -> tuple[Tensor, Tensor]:
    return _pair_winners(*_half_winners(queries, keys, top_k, score), keys.shape[2])


def _step_keys(keys: Tensor, queries: Tensor, best: Tensor, columns: Tensor, score: str, weight: float) -> Tensor:
    """The key step in closed form, from the winners of the halves; differentiable.

    With P the softmax of a row's winners, g = dL/dP̄ and c = λ/(M·H)·P·(g - <P, g>), the gradient of a sub-key is the
    sum of c·ds/dk over the rows that pick it: one matrix product with the c, scattered into [M, n].
    """
    count = best.shape[0] * best.shape[2]
    by_half = columns.transpose(0, 1).flatten(1)  # [2, H·M·K]
    probabilities = best.softmax(-1)
    usage = best.new_zeros(2, keys.shape[2]).scatter_add(1, by_half, probabilities.transpose(0, 1).flatten(1)) / count
    slope = (usage + 1e-8).log() + usage / (usage + 1e-8)
    slopes = slope.gather(1, by_half).view(columns.transpose(0, 1).shape).transpose(0, 1)
    mean = (probabilities * slopes).sum(-1, keepdim=True)
    coefficients = weight / count * probabilities * (slopes - mean)
    if score == "idw":  # ds/dk = 2·(q - k) / (eps + d²)
        coefficients = 2 * coefficients * best.exp()
    spread = best.new_zeros(*best.shape[:3], keys.shape[2]).scatter(-1, columns, coefficients)
    gradient = spread.mT @ _halves(queries, keys)
    if score == "idw":
        gradient = gradient - spread.sum(-2).unsqueeze(-1) * keys
    return keys - gradient


def torch_key_step(keys: Tensor, queries: Tensor, top_k: int, score: str, weight: float) -> Tensor:
    return _step_keys(keys, queries, *_half_winners(queries, keys, top_k, score), score, weight)


def dense_key_step(keys: Tensor, queries: Tensor, top_k: int, score: str, weight: float) -> Tensor:
    """The entropy over all [M, n] scores, of which the K best of a row are not -inf, and torch.autograd.grad of it."""
    differentiable = torch.is_grad_enabled() and (keys.requires_grad or queries.requires_grad)
    with torch.enable_grad():
        moved = keys if keys.requires_grad else keys.detach().requires_grad_()
        rows = _halves(queries, keys)
        scores = rows @ moved.mT
        if score == "idw":
            distance = rows.square().sum(-1, keepdim=True) - 2 * scores + moved.square().sum(-1).unsqueeze(-2)
            scores = -torch.log(EPS + distance.clamp(min=0))
        columns = scores.topk(top_k).indices
        others = torch.ones_like(scores, dtype=torch.bool).scatter_(-1, columns, False)
        usage = scores.masked_fill(others, -torch.inf).log_softmax(-1).exp().mean((0, 2))  # [2, n]
        loss = weight * (usage * (usage + 1e-8).log()).sum()
        (gradient,) = torch.autograd.grad(loss, moved, create_graph=differentiable)
    return keys - gradient


def torch_gather(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """The rows, [M, J, D], and one batched product with the weights."""
    return _predictions(values, slots, weights).to(values.dtype)


def _predictions(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    return torch.bmm(weights.unsqueeze(1), values[slots].to(weights.dtype)).squeeze(1)


def embedding_bag(values: Tensor, slots: Tensor, weights: Tensor, *, sparse: bool = False) -> Tensor:
    return F.embedding_bag(slots, values, mode="sum", per_sample_weights=weights.to(values.dtype), sparse=sparse)


def torch_update_(
    values: Tensor, slots: Tensor, weights: Tensor, targets: Tensor, predictions: Tensor, *,
    counted: Tensor | None = None, alpha: float | None = None,
) -> None:  # fmt: skip
    """M·J rows added into the table, by whichever of the two ways is faster: atomics on GPUs, index_put_ on CPUs. The
    only array of the table's length is one of counts. n_s counts accesses of `counted`, or `slots`; α is J by default.
    """
    counted = (slots if counted is None else counted).flatten()
    counts = weights.new_zeros(len(values)).index_add_(0, counted, weights.new_ones(counted.shape))
    write_weights = ((alpha or slots.shape[1]) * weights / counts[slots]).unsqueeze(-1)
    steps = (write_weights * (targets - predictions).unsqueeze(1)).flatten(0, 1).to(values.dtype)
    if values.is_cuda:
        values.index_add_(0, slots.flatten(), steps)
    else:
        values.index_put_((slots.flatten(),), steps, accumulate=True)


def torch_update(values: Tensor, **write: Any) -> Tensor:
    """The same, into a copy of the table."""
    out = values.clone()
    torch_update_(out, **write)
    return out


def _dense_step(
    values: Tensor, slots: Tensor, weights: Tensor, targets: Tensor, predictions: Tensor, *,
    counted: Tensor | None = None, alpha: float | None = None,
) -> Tensor:  # fmt: skip
    """The step α·G/n_s over the whole table, as the equation has it: a gradient and a step for all rows."""
    terms = (weights.unsqueeze(-1) * (targets - predictions).unsqueeze(1)).flatten(0, 1).to(values.dtype)
    gradient = torch.zeros_like(values).index_add_(0, slots.flatten(), terms)
    counts = torch.bincount((slots if counted is None else counted).flatten(), minlength=len(values)).clamp(min=1)
    return (alpha or slots.shape[1]) * gradient / counts.unsqueeze(1)


def dense_update(values: Tensor, **write: Any) -> Tensor:
    return values + _dense_step(values, **write)


def dense_update_(values: Tensor, **write: Any) -> None:
    values.add_(_dense_step(values, **write))


def chunk(
    keys: Tensor, values: Tensor, queries: Tensor, targets: Tensor, carried: int, o: Options, *,
    dense: bool = False, gates: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Read a chunk and write it: predictions of its tokens, new keys, and new values, which are the old ones in place
    unless `dense`.

    Args:
        queries: [M, H, Dk]: the `carried` rows of the chunk before, which are read again to be written, then the chunk.
        targets: [E, D], of the first E rows: those that are written.
        gates: [E], by which they are; None is all ones.
    """
    best, columns = _half_winners(queries, keys, o.top_k, o.score)
    scores, slots = _pair_winners(best, columns, keys.shape[2])
    slots, weights = slots.flatten(1), scores.flatten(1).softmax(-1)
    predictions = _predictions(values, slots, weights)
    if gates is not None:
        targets = torch.lerp(predictions[: len(targets)], targets, gates.unsqueeze(-1))
    if o.addressing_weight != 0:
        own = best[:, :, carried:], columns[:, :, carried:]
        keys = _step_keys(keys, queries[carried:], *own, o.score, o.addressing_weight)
    written = slice(0, len(targets))
    write: dict[str, Any] = {"targets": targets, "predictions": predictions[written]}
    write |= {"slots": slots[written], "weights": weights[written]}
    if o.boundary == "drop":  # every access of the chunk counts, and α has the ratio of what is read to what is written
        write |= {"counted": slots, "alpha": slots.shape[1] * len(slots) / max(1, len(targets))}
    if dense:
        values = dense_update(values, **write)
    else:
        torch_update_(values, **write)
    return predictions[carried:], keys, values


def torch_memory(
    queries: Tensor, targets: Tensor, keys: Tensor, values: Tensor,
    *, dense: bool = False, gates: Tensor | None = None, **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """A sequence of whole chunks, with a lookahead of 1: output, keys and values; differentiable."""
    values, o = values if dense else values.clone(), Options(**options)
    queries, targets = queries.transpose(0, 1), targets.transpose(0, 1)  # time first
    outputs = []
    for start in range(0, len(queries), o.chunk_size):
        carried, stop = min(1, start) if o.boundary == "carry" else 0, start + o.chunk_size
        window, pairs = queries[start - carried : stop], targets[start - carried + 1 : stop]
        of_pairs = None if gates is None else gates.T[start - carried :][: len(pairs)].flatten()
        rows, count = (window.flatten(0, 1), pairs.flatten(0, 1)), carried * queries.shape[1]
        out, keys, values = chunk(keys, values, *rows, count, o, dense=dense, gates=of_pairs)
        outputs.append(out)
    return torch.cat(outputs).view(targets.shape).transpose(0, 1).to(targets.dtype), keys, values


class EagerMemory:
    """A memory that is kept between steps; a step has whole chunks, or tokens that end no later than a chunk does."""

    def __init__(self, memory: Memory, chunk: Callable[..., tuple[Tensor, Tensor, Tensor]]):
        self.keys, self.values = memory.keys.clone(), memory.values.clone()
        self._chunk = chunk
        self._carried: Tensor | None = None  # the last queries of the chunk before, [1, B, H, Dk]
        self._waiting: list[tuple[Tensor, Tensor]] = []  # read, and not yet written

    @torch.no_grad()
    def step(self, queries: Tensor, targets: Tensor, **options: Any) -> Tensor:
        o = Options(**options)
        queries, by_time = queries.transpose(0, 1), targets.transpose(0, 1)
        if len(queries) % o.chunk_size == 0:
            parts = zip(queries.split(o.chunk_size), by_time.split(o.chunk_size), strict=True)
            output = torch.cat([self._close(*part, o) for part in parts])
        else:
            scores, slots = torch_lookup(queries.flatten(0, 1), self.keys, o.top_k, o.score)
            output = _predictions(self.values, slots.flatten(1), scores.flatten(1).softmax(-1))
            self._waiting.append((queries, by_time))
            if sum(len(part) for part, _ in self._waiting) == o.chunk_size:
                waiting = [torch.cat(column) for column in zip(*self._waiting, strict=True)]
                self._close(*waiting, o)
                self._waiting = []
        return output.view(by_time.shape).transpose(0, 1).to(targets.dtype)

    def _close(self, queries: Tensor, targets: Tensor, o: Options) -> Tensor:
        carried = queries[:0] if self._carried is None else self._carried
        pairs = targets[1 - len(carried) :].flatten(0, 1)
        rows = torch.cat((carried, queries)).flatten(0, 1)
        count = len(carried) * queries.shape[1]
        output, keys, self.values = self._chunk(self.keys, self.values, rows, pairs, count, o)
        self.keys.copy_(keys)
        self._carried = queries[-1:]
        return output


def compile_lazily(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of a function, at the first call and for each shape: with default options, and so that a backward
    may run again."""

    @functools.cache
    def compile_once() -> Callable[..., Any]:
        from torch._functorch import config

        config.donated_buffer = False  # else a second backward of the same forward is refused
        return torch.compile(function, dynamic=False)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return compile_once()(*args, **kwargs)

    return run


dense_chunk = functools.partial(chunk, dense=True)
compiled_chunk = compile_lazily(chunk)
