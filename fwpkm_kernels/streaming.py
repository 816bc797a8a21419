"""Streaming: a memory that is kept between calls and reads any number of tokens in each, in place.

A step reads its tokens from the present state. When the last token of a chunk has been read, the chunk is written, as
`fast_weight_memory(boundary="carry")` writes it. What a chunk will need then waits in the state's queue: tokens that
were read are not looked up again, but for the `lookahead` ones that are carried into the next chunk.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks as checks
from .addressing import step_keys
from .chunks import OPTIONS_SCHEMA, Options, fold_write_weights, weigh, write_scale
from .coupled import coupled_step
from .gather import gather_rows
from .lookup import lookup_halves
from .memory import run_scans
from .plan import count_accesses, plan_segments
from .scans import read, write
from .state import MemoryState, Queue, check_step


def _look_up(queries: Tensor, keys: Tensor, o: Options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights [M, J], slots [M, H, K], half scores and sub-keys [M, H, 2, K] of queries [M, H, Dk]."""
    scores, slots, half_scores, sub_keys = lookup_halves(queries, keys, **o.lookup)
    return weigh(scores.flatten(1), o.weighting, o.temperature), slots, half_scores, sub_keys


class Tokens(NamedTuple):
    """Some tokens of all items of the batch, time first."""

    queries: Tensor  #: [t, B, H, Dk]
    targets: Tensor  #: [t, B, D]
    gates: Tensor | None  #: [t, B]
    mask: Tensor | None  #: [t, B]

    def part(self, begin: int, end: int) -> "Tokens":
        """The tokens from `begin` to `end`."""
        return Tokens(*(None if x is None else x[begin:end] for x in self))  # type: ignore[arg-type]


def read_piece(
    keys: Tensor, values: Tensor, queue: Queue, tokens: Tokens, output: Tensor, where: slice | Tensor, o: Options
) -> None:
    """Read tokens of the present chunk and put them into the queue, at `where` among its tokens.

    `where` is a tensor of indices in a captured graph, where the place is not known yet.
    """
    count = tokens.queries.shape[0]
    weights, slots, half_scores, sub_keys = _look_up(tokens.queries.flatten(0, 1), keys, o)
    predictions = gather_rows(values, slots.flatten(1), weights, weights.dtype, o.backend)
    output.copy_(predictions.view(output.shape))
    behind = (
        slice(where.start + o.lookahead, where.stop + o.lookahead) if isinstance(where, slice) else where + o.lookahead
    )
    queue.queries[behind] = tokens.queries
    for buffer, x in ((queue.gates, tokens.gates), (queue.mask, tokens.mask)):
        # Not a number at indices, which would come from the host: a captured graph must not wait for it.
        buffer[behind] = torch.ones_like(buffer[:count]) if x is None else x.to(buffer.dtype)
    queue.targets[where] = tokens.targets
    for buffer, x in (
        (queue.predictions, predictions),
        (queue.slots, slots),
        (queue.weights, weights),
        (queue.half_scores, half_scores),
        (queue.sub_keys, sub_keys),
    ):
        buffer[where] = x.view(count, *buffer.shape[1:])


def close_chunk(keys: Tensor, values: Tensor, touched: Tensor, queue: Queue, is_first: bool, o: Options) -> None:
    """Write the chunk that fills the queue: read the carried tokens again, and pair the reads with the targets."""
    carried = 0 if is_first else o.lookahead
    queries = queue.queries[o.lookahead - carried :]  # the window: what is carried, then the chunk
    slots, weights, predictions = (x.flatten(0, 1) for x in (queue.slots, queue.weights, queue.predictions))
    if carried > 0:
        again, slots_again, _, _ = _look_up(queries[:carried].flatten(0, 1), keys, o)
        predicted_again = gather_rows(values, slots_again.flatten(1), again, again.dtype, o.backend)
        pairs = ((slots_again, slots), (again, weights), (predicted_again, predictions))
        slots, weights, predictions = (torch.cat(pair) for pair in pairs)
    pair_targets = queue.targets[o.lookahead - carried :].flatten(0, 1)
    errors = predictions[: len(pair_targets)] - pair_targets
    half_scores, sub_keys = queue.half_scores.flatten(0, 1), queue.sub_keys.flatten(0, 1)
    factors = [x[o.lookahead - carried :] for x in (queue.gates, queue.mask)]
    _write_chunk(keys, values, touched, queries, slots, weights, errors, factors, half_scores, sub_keys, o)
    _carry(queue, queue.queries, [queue.gates, queue.mask], o)


def read_and_close_chunk(
    keys: Tensor,
    values: Tensor,
    touched: Tensor,
    queue: Queue,
    tokens: Tokens,
    output: Tensor,
    is_first: bool,
    o: Options,
) -> None:
    """A whole chunk at once: one lookup and one read for the carried tokens and the chunk, and nothing waits."""
    carried, batch = 0 if is_first else o.lookahead, tokens.queries.shape[1]
    queries, factors = _after_carried(queue, tokens, carried)
    weights, slots, half_scores, sub_keys = _look_up(queries.flatten(0, 1), keys, o)
    pair_targets = tokens.targets[o.lookahead - carried :]
    errors = read(values, slots.flatten(1), weights, pair_targets, output, o.backend)[: pair_targets.shape[:2].numel()]
    rows = slice(carried * batch, None)
    _write_chunk(keys, values, touched, queries, slots, weights, errors, factors, half_scores[rows], sub_keys[rows], o)
    _carry(queue, queries, factors, o)


def read_and_close_chunks(
    keys: Tensor,
    values: Tensor,
    touched: Tensor,
    queue: Queue,
    tokens: Tokens,
    output: Tensor,
    is_first: bool,
    o: Options,
) -> None:
    """Several whole chunks at once, as `fast_weight_memory` does it: all addresses first, one plan for all writes."""
    carried = 0 if is_first else o.lookahead
    queries, factors = _after_carried(queue, tokens, carried)
    gates, mask = (x.flatten() for x in factors)
    targets, by_item = tokens.targets.transpose(0, 1), output.transpose(0, 1)
    tensors = (queries.flatten(0, 1), targets, keys, values, gates, mask, by_item)
    new_keys, slots, _, _, _ = run_scans(*tensors, carried, False, o)
    keys.copy_(new_keys)
    _touch(touched, slots, o)
    _carry(queue, queries, factors, o)


def _after_carried(queue: Queue, tokens: Tokens, carried: int) -> tuple[Tensor, list[Tensor]]:
    """Queries, and gates and mask, of the carried tokens and those that come."""
    size = tokens.queries.shape[:2]
    factors = [
        torch.cat((buffer[:carried], buffer.new_ones(size) if x is None else x.to(buffer.dtype)))
        for buffer, x in ((queue.gates, tokens.gates), (queue.mask, tokens.mask))
    ]
    return torch.cat((queue.queries[:carried], tokens.queries)), factors


def _carry(queue: Queue, queries: Tensor, factors: list[Tensor], o: Options) -> None:
    """Carry the last L tokens of a chunk into the next one."""
    for buffer, x in zip((queue.queries, queue.gates, queue.mask), (queries, *factors), strict=True):
        buffer[: o.lookahead] = x[len(x) - o.lookahead :]


def _touch(touched: Tensor, slots: Tensor, o: Options) -> None:
    """Remember which rows may differ from the initial memory."""
    if o.weight_decay != 0.0:
        touched.fill_(1)
    else:
        touched.index_fill_(0, slots.flatten(), 1)


def _write_chunk(
    keys: Tensor,
    values: Tensor,
    touched: Tensor,
    queries: Tensor,
    slots: Tensor,
    weights: Tensor,
    errors: Tensor,
    factors: list[Tensor],
    half_scores: Tensor,
    sub_keys: Tensor,
    o: Options,
) -> None:
    """Write values and keys, both from the state that was read.

    Args:
        queries: [window, B, H, Dk]; the last C positions are those that the chunk read for output.
        slots, weights: [window·B, ...], of which the first E rows are written.
        errors: [E, D].
        factors: gates and mask, [window, B].
        half_scores, sub_keys: [C·B, H, 2, K].
    """
    pairs = slice(0, len(errors))
    pair_slots, pair_weights = slots[pairs], weights[pairs]
    gates, mask = (x.flatten()[pairs] for x in factors)
    plan = plan_segments(pair_slots, values.shape[0])
    counts = count_accesses(plan, (mask > 0).repeat_interleave(pair_weights.shape[1])).view(pair_weights.shape)
    scale = write_scale(pair_weights, None, o.step)
    pair_write_weights = fold_write_weights(pair_weights, counts, scale, [gates, mask])

    rows = queries.flatten(0, 1)
    chunk_queries = rows[len(rows) - len(sub_keys) :]
    if o.key_gradient == "all":
        pair_rows = values[pair_slots.flatten(1)].to(errors.dtype)
        tensors = (rows[pairs], pair_slots, pair_rows, errors, [gates, mask])
        new_keys = coupled_step(keys, chunk_queries, sub_keys, *tensors, o)
    elif o.keys_move:
        new_keys = step_keys(keys, chunk_queries, half_scores, sub_keys, **o.key_step)
    else:
        new_keys = keys
    write(
        values,
        errors,
        pair_write_weights,
        plan,
        lr=o.lr,
        weight_decay=o.weight_decay,
        clip=o.clip,
        backend=o.backend,
    )
    if new_keys is not keys:
        keys.copy_(new_keys)
    _touch(touched, pair_slots, o)


#: The tensors of a state that a step writes, in the order of the operator's arguments.
_STATE_FIELDS = ("keys", "values", "position", "touched", *(f"queue_{name}" for name in Queue._fields))


@torch.library.custom_op(
    "fwpkm_kernels::fast_weight_memory_step",
    mutates_args=_STATE_FIELDS,
    schema=f"({', '.join(f'Tensor(a{i}!) {name}' for i, name in enumerate(_STATE_FIELDS))}, "
    f"Tensor queries, Tensor targets, Tensor? gates, Tensor? mask, {OPTIONS_SCHEMA}) -> Tensor",
)
def _step_op(keys: Tensor, values: Tensor, position: Tensor, touched: Tensor, *rest: Any) -> Tensor:
    count = len(Queue._fields)
    queue, o = Queue(*rest[:count]), Options(*rest[count + 4 :])
    queries, targets, gates, mask = rest[count : count + 4]
    gates, mask = (None if x is None else x.transpose(0, 1) for x in (gates, mask))
    tokens = Tokens(queries.transpose(0, 1), targets.transpose(0, 1), gates, mask)
    return _step(keys, values, position, touched, queue, tokens, o)


@_step_op.register_fake
def _(keys, values, position, touched, *rest):  # type: ignore[no-untyped-def]
    targets = rest[len(Queue._fields) + 1]
    return targets.new_empty(targets.shape)


@checks.without_autocast
def _step(
    keys: Tensor, values: Tensor, position: Tensor, touched: Tensor, queue: Queue, tokens: Tokens, o: Options
) -> Tensor:
    """Read all tokens, and write every chunk that they fill; output [B, t, D]."""
    if values.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a CUDA graph of fast_weight_memory_step would freeze the position; use MemoryGraph")
    length, batch, width = tokens.targets.shape
    output = torch.empty(batch, length, width, dtype=tokens.targets.dtype, device=values.device)
    begin, now = 0, int(position)
    try:
        while begin < length:
            offset, left = now % o.chunk_size, length - begin
            count = min(o.chunk_size - offset, left)
            if offset == 0 and left >= 2 * o.chunk_size and o.key_gradient != "all":
                count = left - left % o.chunk_size
            part, out = tokens.part(begin, begin + count), output[:, begin : begin + count].transpose(0, 1)
            memory, is_first = (keys, values, touched, queue), now < o.chunk_size
            if count > o.chunk_size:
                read_and_close_chunks(*memory, part, out, is_first, o)
            elif count == o.chunk_size:
                read_and_close_chunk(*memory, part, out, is_first, o)
            else:
                read_piece(keys, values, queue, part, out, slice(offset, offset + count), o)
                if offset + count == o.chunk_size:
                    close_chunk(*memory, is_first, o)
            begin, now = begin + count, now + count
            position.fill_(now)
    except BaseException:
        touched.fill_(1)  # who knows which rows were: so reset, the way out, copies all
        raise
    return output


def fast_weight_memory_step(
    state: MemoryState,
    queries: Tensor,
    targets: Tensor,
    *,
    chunk_size: int = 512,
    top_k: int = 8,
    lookahead: int = 1,
    score: str = "idw",
    eps: float = 1e-3,
    weighting: str = "softmax",
    temperature: float = 1.0,
    gates: Tensor | None = None,
    mask: Tensor | None = None,
    lr: float = 1.0,
    weight_decay: float = 0.0,
    clip: float | None = None,
    addressing_weight: float = 1.0,
    key_gradient: str = "addressing",
    step: str = "paper",
    boundary: str = "carry",
    precision: str = "tf32x3",
    backend: str = "auto",
) -> Tensor:
    """Read the next tokens of a sequence, and write every chunk that they fill; in place, without autograd.

    Cut a sequence into steps anywhere, down to single tokens: outputs and state are those of
    `fast_weight_memory(boundary="carry")` on the whole sequence, up to rounding. Source: FwPKM, arXiv 2601.00671.

    A token is looked up and read when it comes; only the `lookahead` tokens that are carried from one chunk into the
    next are read again. When the last token of a chunk has been read, the chunk is written, with the options of that
    call. A step never waits for the GPU, and is one operator that mutates the state: torch.compile(fullgraph=True)
    compiles it once for each number of tokens. `MemoryGraph` captures steps as CUDA graphs.

    Args:
        state: the memory; its first step binds batch size, dtypes and all options but lr, weight_decay, clip and
            addressing_weight.
        queries: [B, t, H, Dk], any t.
        targets: [B, t, D].
        gates, mask: [B, t] or None, each step as it likes; None is all ones.
        boundary: "carry" is the only one that can stream.

    The other options are those of `fast_weight_memory`.

    Returns:
        output [B, t, D] in the targets' dtype, without autograd.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. The state is unchanged then. After
            any other error, one of the device say, the state must be reset or loaded into.
        RuntimeError: in a CUDA graph capture; `MemoryGraph` is there for that.
    """
    o = Options(
        chunk_size, top_k, lookahead, score, eps, weighting, temperature, lr, weight_decay, clip,
        addressing_weight, key_gradient, step, boundary, precision, backend,
    )  # fmt: skip
    o = check_step(state, queries, targets, gates, mask, o)
    with torch.no_grad():
        queue = state._bind(queries, targets, o)
        memory = (state.keys, state.values, state._position, state._touched)
        output: Tensor = _step_op(*memory, *queue, queries, targets, gates, mask, *o)
    return output
