"""Streaming: a memory that is kept between calls and reads any number of tokens in each, in place.

A step reads its tokens from the present state. When the last token of a chunk has been read, the chunk is written, as
`fast_weight_memory(boundary="carry")` writes it. What a chunk will need then waits in the state's queue: tokens that
were read are not looked up again, but for the `lookahead` ones that are carried into the next chunk.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import _checks as checks
from ._autograd import is_exporting, refuse_recomputation, refuse_traces, refuse_transforms
from ._operators import function_of, is_plain, operator
from .binding import Binding, make_queue
from .coupled import coupled_step
from .gather import gather_rows, gather_torch
from .kernels import compute_dtype
from .key_step import step_keys
from .lanes import Lanes
from .lookup import lookup_halves
from .memory import count_most_accesses
from .options import Options, schema_of
from .plan import count_accesses, plan_segments, row_dtype
from .records import Addresses, Picks, Plan, Queue, Tokens, each
from .scans import read
from .sequence import run_scans
from .state import MemoryState, check_step
from .update import write
from .weights import fold_write_weights, weigh, write_scale

if TYPE_CHECKING:
    from .pool import MemoryPool


def look_up(queries: Tensor, keys: Tensor, o: Options, memories: int = 1) -> tuple[Tensor, Addresses]:
    """Weights [M, J] and addresses of queries [M, H, Dk].

    Several memories can be looked up as heads of one, [M, memories·H, Dk]; the weights are then [M·memories, J].
    """
    heads = keys.shape[0] // memories
    if heads == 1 and checks.use_triton(o.backend, queries):  # a lookup of one head weighs all picks of a token
        from .kernels.lookup import lookup

        weights = torch.empty(len(queries), memories, o.top_k, dtype=compute_dtype(keys.dtype), device=keys.device)
        how: dict[str, Any] = {"top_k": o.top_k, "idw": o.score == "idw", "eps": o.eps, "precision": o.precision}
        how |= {"weights": weights, "weighting": o.weighting, "temperature": o.temperature}
        return weights.flatten(0, 1), lookup(queries, keys, **how)
    found = lookup_halves(queries, keys, o.lookup)
    scores = found.scores.view(len(queries) * memories, heads * o.top_k)
    return weigh(scores, o.weighting, o.temperature), found


class Memory(NamedTuple):
    """What a step reads and writes of a state."""

    keys: Tensor  #: [H, 2, n, Dk/2]
    values: Tensor  #: [N, D]
    touched: Tensor  #: uint8 [N]: which rows may differ from the initial memory
    queue: Queue


def read_piece(memory: Memory, tokens: Tokens, output: Tensor, place: int | Tensor, o: Options) -> None:
    """Read tokens of the present chunk and put them into the queue, from `place` on among its tokens.

    In a captured graph the place is not known yet, so `place` is a tensor of one integer.
    """
    keys, values, _, queue = memory
    weights, found = look_up(tokens.queries.flatten(0, 1), keys, o)
    if checks.use_triton(o.backend, values):
        from .kernels import streaming

        streaming.read_to_queue(values, found, weights, tokens, queue, output, place, o.lookahead)
        return
    predictions = gather_torch(values, found.slots.flatten(1), weights, weights.dtype)
    output.copy_(predictions.view(output.shape))
    where = slice(int(place), int(place) + tokens.queries.shape[0])
    enqueue(queue, tokens.queries, tokens.gates, tokens.mask, where.start + o.lookahead, o)
    queue.targets[where] = tokens.targets
    read = {"predictions": predictions, "weights": weights, **found._asdict()}
    del read["scores"]
    for name, x in read.items():
        buffer = getattr(queue, name)[where]
        buffer.copy_(x.view(buffer.shape))


def enqueue(queue: Queue, queries: Tensor, gates: Tensor | None, mask: Tensor | None, first: int, o: Options) -> None:
    """Put queries, gates and mask into the queue from `first` on, where the carried tokens are the first L."""
    if checks.use_triton(o.backend, queries):
        from .kernels import streaming

        streaming.enqueue(queries, gates, mask, queue, first)
        return
    where = slice(first, first + queries.shape[0])
    queue.queries[where] = queries
    for buffer, x in ((queue.gates, gates), (queue.mask, mask)):
        buffer[where] = 1.0 if x is None else x


def close_chunk(memory: Memory, is_first: bool, lanes: Lanes, o: Options) -> None:
    """Write the chunk that fills the queue: read the carried tokens again, and pair the reads with the targets.

    At most once in a capture, since the reads do not wait for earlier writes on another lane.
    """
    queue, carried = memory.queue, 0 if is_first else o.lookahead
    slots, weights, predictions = (x.flatten(0, 1) for x in (queue.slots, queue.weights, queue.predictions))
    if carried > 0:
        again = queue.queries[o.lookahead - carried : o.lookahead].flatten(0, 1)
        weights_again, found_again = look_up(again, memory.keys, o)
        slots_again = found_again.slots
        of_rows = (slots_again.flatten(1), weights_again, weights_again.dtype)
        predicted_again = gather_rows(memory.values, *of_rows, o.backend)
        pairs = ((slots_again, slots), (weights_again, weights), (predicted_again, predictions))
        slots, weights, predictions = (torch.cat(pair) for pair in pairs)
    lanes.hold(predictions)
    pair_targets = queue.targets[o.lookahead - carried :].flatten(0, 1)
    writes = plan_chunk_writes(memory, carried, slots, weights, lanes, o)
    with lanes.on(lanes.values):
        errors = predictions[: len(pair_targets)] - pair_targets
    picks = Picks(queue.half_scores.flatten(0, 1), queue.sub_keys.flatten(0, 1))
    apply_chunk_writes(memory, writes, errors, picks, lanes, o)


def read_and_close_chunk(
    memory: Memory, tokens: Tokens, output: Tensor, is_first: bool, lanes: Lanes, o: Options
) -> None:
    """Read and write a whole chunk at once, by one lookup and one read of the carried tokens and the chunk."""
    queue, carried, batch = memory.queue, 0 if is_first else o.lookahead, tokens.queries.shape[1]
    enqueue(queue, tokens.queries, tokens.gates, tokens.mask, o.lookahead, o)
    weights, found = look_up(queue.queries[o.lookahead - carried :].flatten(0, 1), memory.keys, o)
    pair_targets = tokens.targets[o.lookahead - carried :]
    writes = plan_chunk_writes(memory, carried, found.slots, weights, lanes, o)
    with lanes.on(lanes.values):
        errors = read(memory.values, found.slots.flatten(1), weights, pair_targets, output, o.backend)
    of_pairs = slice(0, pair_targets.shape[:2].numel())
    lanes.hold(found, errors)
    apply_chunk_writes(memory, writes, errors[of_pairs], found.picks.since(carried * batch), lanes, o)


def read_and_close_chunks(memory: Memory, tokens: Tokens, output: Tensor, is_first: bool, o: Options) -> None:
    """Several whole chunks at once, as `fast_weight_memory` does it: all addresses first, one plan for all writes."""
    queue, carried = memory.queue, 0 if is_first else o.lookahead
    queries, factors = _after_carried(queue, tokens, carried)
    gates, mask = (x.flatten() for x in factors)
    targets, by_item = tokens.targets.transpose(0, 1), output.transpose(0, 1)
    tensors = (queries.flatten(0, 1), targets, memory.keys, memory.values, gates, mask, by_item)
    new_keys, _, kept = run_scans(*tensors, o, carried=carried)
    memory.keys.copy_(new_keys)
    _touch(memory.touched, kept.found.slots, o)
    for buffer, x in zip((queue.queries, queue.gates, queue.mask), (queries, *factors), strict=True):
        buffer[: o.lookahead] = x[len(x) - o.lookahead :]


def _after_carried(queue: Queue, tokens: Tokens, carried: int) -> tuple[Tensor, list[Tensor]]:
    """Queries, and gates and mask, of the carried tokens and those that come."""
    size = tokens.queries.shape[:2]
    factors = [
        torch.cat((buffer[:carried], buffer.new_ones(size) if x is None else x.to(buffer.dtype)))
        for buffer, x in ((queue.gates, tokens.gates), (queue.mask, tokens.mask))
    ]
    return torch.cat((queue.queries[:carried], tokens.queries)), factors


def _carry(queue: Queue, o: Options) -> None:
    """Carry the last L tokens of a chunk into the next one."""
    if o.lookahead > 0:
        queries, gates, mask = (buffer[o.chunk_size :] for buffer in (queue.queries, queue.gates, queue.mask))
        enqueue(queue, queries, gates, mask, 0, o)


def _touch(touched: Tensor, slots: Tensor, o: Options) -> None:
    """Remember which rows may differ from the initial memory."""
    if o.weight_decay != 0.0:
        touched.fill_(1)
    else:
        touched.index_fill_(0, slots.flatten(), 1)


class ChunkWrites(NamedTuple):
    """What a chunk writes, planned: of E pairs of a token that was read and its target, time first."""

    carried: int  #: how many positions before the chunk are written with it
    slots: Tensor  #: [E, H, K]
    rows: Tensor  #: [E, J]: where the values of these slots stand
    gates: Tensor  #: [E]
    mask: Tensor  #: [E]
    plan: Plan
    write_weights: Tensor  #: [E, J]


def plan_chunk_writes(
    memory: Memory, carried: int, slots: Tensor, weights: Tensor, lanes: Lanes, o: Options
) -> ChunkWrites:
    """Plan the writes of a chunk from slots and weights of all its reads, [(carried + C)·B, ...], time first."""
    queue, first = memory.queue, o.lookahead - carried
    num_pairs = (o.chunk_size - first) * queue.gates.shape[1]
    gates, mask = (x[first:].flatten()[:num_pairs] for x in (queue.gates, queue.mask))
    pair_slots, pair_weights = slots[:num_pairs], weights[:num_pairs]
    with lanes.on(lanes.plans):
        plan, write_weights = _plan_pairs(pair_slots, pair_weights, gates, mask, memory.touched, o)
    lanes.hold(slots, weights, plan, write_weights)
    return ChunkWrites(carried, pair_slots, pair_slots.flatten(1), gates, mask, plan, write_weights)


def apply_chunk_writes(
    memory: Memory, writes: ChunkWrites, errors: Tensor, picks: Picks, lanes: Lanes, o: Options
) -> None:
    """Write values and keys, both from the state that was read, and carry the last tokens over.

    Args:
        errors: [E, D], of the pairs, launched on the lane of values.
        picks: of the tokens of the chunk, M = C·B.
    """
    keys, values, _, queue = memory
    window = queue.queries[o.lookahead - writes.carried :].flatten(0, 1)  # the carried tokens, then those of the chunk
    chunk = window[writes.carried * queue.gates.shape[1] :]
    lanes.hold(errors, picks)
    if o.key_gradient == "all":
        with lanes.on(lanes.values):
            lanes.wait(lanes.plans)
            pair_rows = values[writes.rows].to(errors.dtype)
            pairs = (window[: len(errors)], writes.slots, pair_rows, errors, [writes.gates, writes.mask])
            keys.copy_(coupled_step(keys, chunk, picks.sub_keys, *pairs, o))
            write(values, errors, writes.write_weights, writes.plan, o.write)
            _carry(queue, o)
        lanes.wait(lanes.values)
        return
    with lanes.on(lanes.plans):
        _carry(queue, o)
    with lanes.on(lanes.values):
        lanes.wait(lanes.plans)
        write(values, errors, writes.write_weights, writes.plan, o.write)
    if o.keys_move:
        step_keys(keys, chunk, picks, o.key_step, out=keys)
    # The next chunk puts its tokens behind the carried ones and looks up both, so it must wait for `_carry`.
    lanes.wait(lanes.plans)


def _plan_pairs(
    slots: Tensor, weights: Tensor, gates: Tensor, mask: Tensor, touched: Tensor, o: Options
) -> tuple[Plan, Tensor]:
    """The plan and the write weights [E, J] of pairs that read slots [E, H, K]; marks the rows that they touch."""
    if o.weight_decay != 0.0:
        touched.fill_(1)
    num_slots, picks = touched.shape[0], weights.shape[1]
    if checks.use_triton(o.backend, weights):
        from .kernels.streaming import MOST_COMPARED, plan_chunk

        if weights.numel() <= MOST_COMPARED:
            return plan_chunk(slots, weights, gates, mask, touched, row_dtype=row_dtype(num_slots), step=o.step)
    plan = plan_segments(slots, num_slots)
    counts = count_accesses(plan, (mask > 0).repeat_interleave(picks)).view(weights.shape)
    _touch(touched, slots, o)
    return plan, fold_write_weights(weights, counts, write_scale(weights, None, o.step), [gates, mask])


#: A step reads the position on the host, and branches on it: so Inductor partitions its CUDA graphs around steps.
_STEP_TAGS = (torch.Tag.cudagraph_unsafe,)
#: The tensors of a state that a step writes, in the order of the operator's arguments.
_STATE_FIELDS = ("keys", "values", "position", "touched", *(f"queue_{name}" for name in Queue._fields))


@operator(
    "fast_weight_memory_step",
    mutates_args=_STATE_FIELDS,
    schema=f"({', '.join(f'Tensor(a{i}!) {name}' for i, name in enumerate(_STATE_FIELDS))}, "
    f"Tensor queries, Tensor targets, Tensor? gates, Tensor? mask, {schema_of(Options)}) -> Tensor",
    tags=_STEP_TAGS,
)
def _step_op(keys: Tensor, values: Tensor, position: Tensor, touched: Tensor, *rest: Any) -> Tensor:
    count = len(Queue._fields)
    return _step(Memory(keys, values, touched, Queue(*rest[:count])), position, *rest[count:])


@_step_op.register_fake
def _(keys, values, position, touched, *rest):  # type: ignore[no-untyped-def]
    targets = rest[len(Queue._fields) + 1]
    return targets.new_empty(targets.shape)


@operator(
    "fast_weight_memory_first_step",
    mutates_args=_STATE_FIELDS[:4],
    schema=f"({', '.join(f'Tensor(a{i}!) {name}' for i, name in enumerate(_STATE_FIELDS[:4]))}, "
    f"Tensor queries, Tensor targets, Tensor? gates, Tensor? mask, {schema_of(Options)}) -> "
    f"({', '.join(['Tensor'] * (1 + len(Queue._fields)))})",
    tags=_STEP_TAGS,
)
def _first_step_op(keys: Tensor, values: Tensor, position: Tensor, touched: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """A step that makes the queue too; output and queue."""
    queries, targets, _, _, *options = rest
    queue = make_queue(keys, values, Binding.of(queries, targets, Options(*options)), values.device)
    return _step(Memory(keys, values, touched, queue), position, *rest), *queue


@_first_step_op.register_fake
def _(keys, values, position, touched, queries, targets, gates, mask, *options):  # type: ignore[no-untyped-def]
    queue = make_queue(keys, values, Binding.of(queries, targets, Options(*options)), values.device)
    return targets.new_empty(targets.shape), *queue


def _refuse_replays(values: Tensor) -> None:
    """Raise where a step would not run once and now: in a CUDA graph's capture, in a backward pass."""
    if values.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a CUDA graph of fast_weight_memory_step would freeze the position; use MemoryGraph")
    refuse_recomputation("fast_weight_memory_step")


@checks.without_autocast
def _step(memory: Memory, position: Tensor, queries: Tensor, targets: Tensor, *rest: Any) -> Tensor:
    """Read all tokens, and write every chunk that they fill; output [B, t, D]. The rest: gates, mask, options."""
    _refuse_replays(memory.values)
    gates, mask, *options = rest
    o = Options(*options)
    checks.check_num_accesses(queries, count_most_accesses(queries, o.chunk_size, o.lookahead, o.top_k))
    tokens = Tokens(*each(lambda x: x.transpose(0, 1), queries, targets, gates, mask))  # type: ignore[arg-type]
    output = torch.empty(targets.shape, dtype=targets.dtype, device=memory.values.device)
    begin, length, now, lanes = 0, targets.shape[1], int(position), Lanes()
    try:
        while begin < length:
            offset, left = now % o.chunk_size, length - begin
            count = min(o.chunk_size - offset, left)
            if offset == 0 and left >= 2 * o.chunk_size and o.key_gradient != "all":
                count = left - left % o.chunk_size
            part, out = tokens.part(begin, begin + count), output[:, begin : begin + count].transpose(0, 1)
            is_first = now < o.chunk_size
            if count > o.chunk_size:
                read_and_close_chunks(memory, part, out, is_first, o)
            elif count == o.chunk_size:
                read_and_close_chunk(memory, part, out, is_first, lanes, o)
            else:
                read_piece(memory, part, out, offset, o)
                if offset + count == o.chunk_size:
                    close_chunk(memory, is_first, lanes, o)
            begin, now = begin + count, now + count
            position.fill_(now)
    except BaseException:
        memory.touched.fill_(1)  # the rows written are not known, so the reset that must follow copies all
        raise
    return output


def fast_weight_memory_step(
    state: "MemoryState | MemoryPool",
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
    sessions: Sequence[int] | Tensor | None = None,
    lengths: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """Read the next tokens of a sequence, and write every chunk that they fill; in place, without autograd.

    Cut a sequence into steps anywhere, down to single tokens: outputs and state are those of
    `fast_weight_memory(boundary="carry")` on the whole sequence, up to rounding. Source: FwPKM, arXiv 2601.00671.

    A token is looked up and read when it comes; only the `lookahead` tokens that are carried from one chunk into the
    next are read again. When the last token of a chunk has been read, the chunk is written, with the options of that
    call. A step of a state never waits for the GPU, and is one operator that mutates the state.
    torch.compile(fullgraph=True) compiles it once for all numbers of tokens if their dimension is marked
    (torch._dynamo.mark_dynamic), once more for a single token, and once more if its first call binds; numbers among the
    options are constants to it, as in `fast_weight_memory`. `MemoryGraph` captures steps as CUDA graphs.

    A step of a pool is no operator: compiled code breaks its graph there, and fullgraph=True refuses it. It waits for
    the GPU only where chunks are full, whose rows the host must count. `PoolGraph` captures what comes before that.

    Args:
        state: the memory; its first step binds batch size, dtypes and all options but lr, weight_decay, clip and
            addressing_weight.
        queries: [B, t, H, Dk], any t.
        targets: [B, t, D].
        gates, mask: [B, t] or None, each step as it likes; None is all ones.
        boundary: "carry" is the only one that can stream.
        sessions: for a MemoryPool, and only there: the ids of the S sessions that read, each once. A row of the batch
            is then a session, wherever it stands: [S, t, ...] instead of [B, t, ...]. Each session is as if it were
            alone; what a call reads of several is launched together, and chunks are written one after the other.
        lengths: [S], a tensor on the CPU or ints: how many tokens each session reads, the last ones of its row; the
            output of the others is 0. None means t.

    The other options are those of `fast_weight_memory`, as is what NaN does; `state.reset()` removes what it wrote.

    Returns:
        output [B, t, D] in the targets' dtype, without autograd.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. The state is unchanged then. After
            any other error, one of the device say, the state (or sessions) must be reset or loaded into.
        RuntimeError: in a CUDA graph capture; `MemoryGraph` is there for that. In a backward pass, where an activation
            checkpoint would apply the step again: step outside of it, or let a policy save the step's output
            (torch.utils.checkpoint.create_selective_checkpoint_contexts). Under a transform of torch.func. The state is
            unchanged then. Where torch.export or make_fx traces a state that is not bound, or make_fx one of real
            tensors with fake tokens.
        PoolFullError: a pool has too few free rows for the chunks that would be full. No session has read or written
            anything then.
    """
    o = Options(
        chunk_size, top_k, lookahead, score, eps, weighting, temperature, lr, weight_decay, clip,
        addressing_weight, key_gradient, step, boundary, precision, backend,
    )  # fmt: skip
    refuse_transforms("fast_weight_memory_step", (queries, targets, gates, mask))
    if hasattr(state, "_step_sessions"):
        return state._step_sessions(queries, targets, gates, mask, sessions, lengths, o)
    if sessions is not None or lengths is not None:
        raise TypeError(f"`sessions` and `lengths` need a MemoryPool as `state`, got a {type(state).__name__}")
    o = check_step(state, queries, targets, gates, mask, o)
    if not state._made_in_export:
        refuse_traces("fast_weight_memory_step", state.values, queries, state._binding is not None)
    # Refuse before `_bind` changes the state. Compiled code binds after its operators have run, and a bound state has
    # nothing to lose: there the operator's check is enough, and the only one, as a checkpoint's policy may skip it.
    if state._binding is None and not torch.compiler.is_compiling():
        _refuse_replays(state.values)
    tokens = each(Tensor.detach, queries, targets, gates, mask)
    if is_exporting():  # a program that raises within no_grad would leave gradients disabled
        return _run_step(state, tokens, o)
    with torch.no_grad():
        return _run_step(state, tokens, o)


def _run_step(state: MemoryState, tokens: tuple[Any, ...], o: Options) -> Tensor:
    """Bind the state at its first step, and run the operator; or its function: such a long schema takes 0.3 ms."""
    queries, targets, _, _ = tokens
    output: Tensor
    if state._binding is None and torch.compiler.is_compiling():
        # The operator makes the queue: no step outside of inference mode could write one that compiled code made in it.
        output, *new = _first_step_op(state._keys, state._values, state._position, state._touched, *tokens, *o)
        state._bind(queries, targets, o, Queue(*new))
    else:
        queue = state._bind(queries, targets, o)
        run = function_of(_step_op) if is_plain(state._values, *(x for x in tokens if x is not None)) else _step_op
        output = run(state._keys, state._values, state._position, state._touched, *queue, *tokens, *o)
    return output
