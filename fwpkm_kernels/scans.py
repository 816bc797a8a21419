"""The two scans of a sequence, chunk by chunk, and their backward; and the read and the write of one chunk.

Addresses never depend on values. So the address scan of a whole sequence runs first, one sort plans the writes of all
chunks, and the value scan follows. It is one sparse delta rule with read weights w and write weights c::

    p = Σⱼ wⱼ values[slotⱼ]      G[s] = Σ cⱼ e      values ← (1 - lr·wd) values - lr·clamp(G)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks as checks
from .chunks import Chunk, Span
from .gather import gather_torch, row_dots
from .kernels import compute_dtype
from .key_step import address_grad, step_keys
from .lookup import lookup_halves
from .options import Options, Write
from .records import Addresses, Plan, Writes
from .update import write, write_grad


def read(values: Tensor, slots: Tensor, weights: Tensor, targets: Tensor, output: Tensor, backend: str) -> Tensor:
    """The reads of a chunk, p = Σⱼ wⱼ·values[slotⱼ], and the errors e = p - y of those that are written, [M, D].

    Args:
        slots, weights: [M, J], M = positions·B rows.
        targets: [positions written, B, D]: those of the first rows; the errors of the other rows are 0.
        output: [positions output, B, D], any strides and float dtype: receives p of the last rows.
    """
    if checks.use_triton(backend, values):
        from .kernels.scans import read as launch

        return launch(values, slots, weights, targets, output)
    predictions = gather_torch(values, slots, weights, compute_dtype(values.dtype))
    num_written, num_output = targets.shape[:2].numel(), output.shape[:2].numel()
    output.copy_(predictions[len(slots) - num_output :].view(output.shape))
    predictions[:num_written] -= targets.reshape(num_written, predictions.shape[1])
    predictions[num_written:] = 0.0
    return predictions


class _ReadGrad(NamedTuple):
    """What the backward of reads and writes reads and fills, [R, J] each."""

    log_rows: Tensor  #: which row of its chunk's log each access finds
    slots: Tensor
    weights: Tensor  #: w
    write_weights: Tensor  #: c
    grad_weights: Tensor  #: dw, to be filled
    grad_write_weights: Tensor  #: dc, to be filled


def _read_grad(
    grad_values: Tensor,
    log: Tensor,
    reads: _ReadGrad,
    plan: Plan,
    targets: Tensor,
    grad_output: Tensor,
    grad_targets: Tensor,
    o: Options,
) -> Tensor:
    """Backward of a chunk's reads and of the small side of its write, from G' = grad_values after it.

    Returns dp [M, D], and fills dy = `grad_targets` [positions written, B, D], dw and dc [M, J]::

        r = Σⱼ cⱼ Ĝ'[slotⱼ],   dp = dout - r,   dy = r,   dcⱼ = -<Ĝ'[slotⱼ], e>,   dwⱼ = <dp, old values[slotⱼ]>
    """
    log_rows, slots, weights, write_weights, grad_weights, grad_write_weights = reads
    if checks.use_triton(o.backend, grad_values):
        from .kernels.scans import read_grad
        from .kernels.update import step_grad

        steps, step_rows, factor = grad_values, slots, o.lr
        if o.clip is not None:
            errors = read(log, log_rows, weights, targets, grad_output[:0], o.backend)
            steps = step_grad(grad_values, errors, write_weights, plan, lr=o.lr, clip=o.clip)
            step_rows, factor = log_rows, 1.0
        inputs = (log, log_rows, steps, step_rows, weights, write_weights, targets, grad_output)
        return read_grad(*inputs, grad_targets, grad_weights, grad_write_weights, factor=factor)
    num_written, num_output = targets.shape[:2].numel(), grad_output.shape[:2].numel()
    errors = read(log, log_rows, weights, targets, grad_output[:0], o.backend)
    sums, dots = write_grad(grad_values, errors, write_weights, slots, plan, o.write)
    # Rows that are not written have c = 0. Their sums and dots are set to 0, since 0·NaN would be NaN.
    sums[num_written:] = 0.0
    dots[num_written:] = 0.0
    grad_targets.copy_(sums[:num_written].view(targets.shape))
    grad_predictions = sums.neg_()
    grad_predictions[len(slots) - num_output :] += grad_output.reshape(num_output, sums.shape[1])
    grad_weights.copy_(row_dots(log, log_rows, grad_predictions))
    torch.neg(dots, out=grad_write_weights)
    return grad_predictions


def _add_rows(grad_values: Tensor, vectors: Tensor, weights: Tensor, plan: Plan, span: Span, o: Options) -> None:
    """grad_values = decay·grad_values + Σ weights·vectors, in place: a write with lr = -1 and 1 - lr·wd = decay."""
    decay = 1.0 - o.lr * o.weight_decay if span.is_written else 1.0
    how = Write(lr=-1.0, weight_decay=decay - 1.0, backend=o.backend)
    write(grad_values, vectors, weights, plan, how, decays=None if span.decays is None else span.decays())


def _that_are_read(x: Tensor, chunks: list[Chunk], batch: int, carried: int) -> Tensor:
    """The rows of the positions that a chunk reads: only a first chunk that is written reads carried ones."""
    return x if chunks and chunks[0].first < chunks[0].start else x[carried * batch :]


def _by_read(x: Tensor, chunks: list[Chunk], batch: int, carried: int) -> Tensor:
    """The rows of the positions that are read, the carried ones first, in the order of the reads: [R, ...]."""
    if all(chunk.first == chunk.start for chunk in chunks):
        return x
    return torch.cat([x[(chunk.first + carried) * batch : (chunk.stop + carried) * batch] for chunk in chunks])


def _sizes(spans: list[Span], rows: int) -> list[int]:
    """How many rows each span has of a tensor with `rows` rows for each position read."""
    return [span.reads * rows for span in spans]


def address_scan(
    queries: Tensor, keys: Tensor, chunks: list[Chunk], batch: int, carried: int, keep: bool, o: Options
) -> tuple[Addresses, Tensor, Tensor]:
    """Look up every read, chunk by chunk, and move the keys after each chunk.

    Args:
        queries: [positions·B, H, Dk], the carried ones first.

    Returns:
        The addresses; the keys after the last write; and, with `keep`, what backward needs to know of the keys that
        each chunk read: [writes + 1, H, 2, n, Dk/2], or [1, ...] if they never move, or where a row for each pick is
        less (`Options.keeps_picks`), [R, H, 2, K, Dk/2].
    """
    chunk_keys = keys.new_empty(0)
    if not o.keys_move:
        queries = _that_are_read(queries, chunks, batch, carried)
        found = Addresses(*(_by_read(x, chunks, batch, carried) for x in lookup_halves(queries, keys, o.lookup)))
        return found, keys.clone(), keys.unsqueeze(0).clone() if keep else chunk_keys
    keeps_picks = o.keeps_picks(batch, keys.shape[2])
    if keep and keeps_picks:
        reads = sum(chunk.stop - chunk.first for chunk in chunks) * batch
        chunk_keys = keys.new_empty(reads, *keys.shape[:2], o.top_k, keys.shape[3])
    elif keep:
        writes = sum(chunk.is_written for chunk in chunks)
        chunk_keys = keys.new_empty(writes + 1, *keys.shape)
        chunk_keys[0] = keys
    parts = [] if chunks else [lookup_halves(queries[:0], keys, o.lookup)]
    in_place = not (keep and not keeps_picks)
    moved = keys.clone() if in_place else keys
    for index, chunk in enumerate(chunks):
        start, stop = (chunk.start + carried) * batch, (chunk.stop + carried) * batch
        rereads = (chunk.start - chunk.first) * batch
        parts.append(lookup_halves(queries[start - rereads : stop], moved, o.lookup))
        picks = parts[-1].picks
        if keep and keeps_picks:
            picked = chunk_keys[chunk.rows(batch)].flatten(0, 3)
            torch.index_select(moved.flatten(0, 2), 0, picks.sub_keys.flatten(), out=picked)
        if chunk.is_written:
            out = moved if in_place else chunk_keys[index + 1]
            moved = step_keys(moved, queries[start:stop], picks.since(rereads), o.key_step, out=out)
    found = Addresses(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
    return found, moved if in_place else moved.clone(), chunk_keys


def address_scan_grad(
    grad_keys: Tensor,
    grad_scores: Tensor,
    queries: Tensor,
    found: Addresses,
    chunk_keys: Tensor,
    chunks: list[Chunk],
    batch: int,
    carried: int,
    o: Options,
) -> tuple[Tensor, Tensor]:
    """Backward of the address scan, in the compute dtype.

    Args:
        queries: [positions·B, H, Dk], the carried ones first.

    Returns the gradients of the query of each read, [R, H, Dk], and of the initial keys.
    """
    no_step = o.key_step._replace(weight=0.0, weight_decay=0.0)
    if not o.keys_move:
        queries = _by_read(_that_are_read(queries, chunks, batch, carried), chunks, batch, carried)
        return address_grad(grad_keys, chunk_keys[0], queries, grad_scores, found.slots, found.picks, no_step)
    grad_queries = grad_keys.new_empty(len(found.scores), *queries.shape[1:])
    keeps_picks = o.keeps_picks(batch, grad_keys.shape[2])
    keys = torch.zeros(grad_keys.shape, dtype=chunk_keys.dtype, device=chunk_keys.device) if keeps_picks else grad_keys
    sizes = [(chunk.stop - chunk.first) * batch for chunk in chunks]
    of_reads = (found.split(sizes), grad_scores.split_with_sizes(sizes), grad_queries.split_with_sizes(sizes))
    parts = list(enumerate(zip(chunks, *of_reads, strict=True)))
    for index, (chunk, chunk_found, chunk_grad_scores, chunk_grad_queries) in reversed(parts):
        if keeps_picks:  # rows of the keys that no read picked are never read here
            picked = chunk_keys[chunk.rows(batch)].flatten(0, 3)
            keys.flatten(0, 2)[chunk_found.sub_keys.flatten().long()] = picked
        else:
            keys = chunk_keys[index]
        _, grad_keys = address_grad(
            grad_keys,
            keys,
            queries[(chunk.first + carried) * batch : (chunk.stop + carried) * batch],
            chunk_grad_scores,
            chunk_found.slots,
            chunk_found.picks,
            o.key_step if chunk.is_written else no_step,
            first_row=(chunk.start - chunk.first) * batch,
            out=chunk_grad_queries,
        )
    return grad_queries, grad_keys


def value_scan(
    values: Tensor,
    targets: Tensor,
    slots: Tensor,
    writes: Writes,
    output: Tensor,
    log: Tensor | None,
    spans: list[Span],
    o: Options,
) -> None:
    """Read and write span by span: changes `values`, fills `output` [B, T, D] and the log [R·J, D]."""
    batch, picks = targets.shape[0], slots.shape[1]
    targets, output = targets.transpose(0, 1), output.transpose(0, 1)
    sizes, accesses = _sizes(spans, batch), _sizes(spans, batch * picks)
    of_reads = (x.split_with_sizes(sizes) for x in (slots, writes.weights, writes.write_weights))
    logs = [None] * len(spans) if log is None else log.split_with_sizes(accesses)
    of_spans = zip(spans, *of_reads, writes.plan.split(accesses), logs, strict=True)
    for span, span_slots, weights, write_weights, plan, span_log in of_spans:
        errors = read(values, span_slots, weights, targets[span.pairs], output[span.outputs], o.backend)
        if span.is_written or log is not None:
            how = o.write if span.is_written else o.write._replace(weight_decay=0.0)
            decays = None if span.decays is None else span.decays()
            write(values, errors, write_weights, plan, how, span_log, decays)


def value_scan_grad(
    grad_values: Tensor,
    grad_output: Tensor,
    targets: Tensor,
    slots: Tensor,
    writes: Writes,
    log: Tensor,
    log_rows: Tensor,
    spans: list[Span],
    o: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of the value scan: turns `grad_values` from that of the final table into that of the initial one.

    `log_rows` [R, J] says which row of its span's part of the log each access finds.

    Returns the gradients of the targets [B, T, D], of the weights as read [R, J] and of the write weights [R, J].
    """
    batch, picks = targets.shape[0], slots.shape[1]
    grad_targets = torch.empty(targets.shape, dtype=targets.dtype, device=targets.device)
    grad_weights, grad_write_weights = (torch.empty_like(writes.weights) for _ in range(2))
    targets, grad_output, by_time = targets.transpose(0, 1), grad_output.transpose(0, 1), grad_targets.transpose(0, 1)
    done = 0
    for pairs in [span.pairs for span in spans if span.pairs.stop > span.pairs.start] + [slice(len(by_time), None)]:
        if pairs.start > done:  # no span writes the positions in between
            by_time[done : pairs.start].zero_()
        done = pairs.stop
    reads = _ReadGrad(log_rows, slots, writes.weights, writes.write_weights, grad_weights, grad_write_weights)
    sizes, accesses = _sizes(spans, batch), _sizes(spans, batch * picks)
    of_reads = map(_ReadGrad._make, zip(*(x.split_with_sizes(sizes) for x in reads), strict=True))
    of_spans = zip(spans, of_reads, writes.plan.split(accesses), log.split_with_sizes(accesses), strict=True)
    for span, span_reads, plan, span_log in reversed(list(of_spans)):
        grads = (grad_output[span.outputs], by_time[span.pairs])
        grad_predictions = _read_grad(grad_values, span_log, span_reads, plan, targets[span.pairs], *grads, o)
        _add_rows(grad_values, grad_predictions, span_reads.weights, plan, span, o)
    return grad_targets, grad_weights, grad_write_weights
