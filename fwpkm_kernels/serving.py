"""Steps of the sessions of a pool: reading is done for all sessions at once, writing for one after the other.

A call goes in rounds. In each, every session that has tokens left reads up to the end of its present chunk; those that
read as many share one launch. Then the chunks that are full are planned, the room for their rows is checked, and they
are written.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks as checks
from .gather import gather_rows, gather_torch
from .lanes import Lanes
from .options import Options
from .pages import Missing, rows_of
from .records import Addresses, Picks, Tokens
from .sessions import Session, SessionStore
from .streaming import ChunkWrites, Memory, apply_chunk_writes, look_up, plan_chunk_writes


def check_lengths(lengths: Sequence[int] | Tensor | None, sessions: int, length: int) -> list[int]:
    """How many tokens each session reads."""
    if lengths is None:
        return [length] * sessions
    if isinstance(lengths, Tensor):
        checks.check_tensor("lengths", lengths, 1, "[S]")
        checks.check_slots("lengths", lengths)
        if not lengths.is_cpu:
            raise ValueError(f"`lengths` must be on the CPU, got {lengths.device}")
        lengths = lengths.tolist()
    elif not isinstance(lengths, Sequence) or isinstance(lengths, str):
        raise TypeError(f"`lengths` must be a number for each session, got {type(lengths).__name__}")
    counts = [checks.check_int("lengths", count, minimum=0) for count in lengths]
    if len(counts) != sessions or max(counts, default=0) > length:
        raise ValueError(
            f"`lengths` must have a number from 0 to {length} for each of {sessions} sessions, got {counts}"
        )
    return counts


class Readers(NamedTuple):
    """The sessions that read together: tensors are [S], int64."""

    seats: Tensor
    keys: Tensor  #: seats of their keys
    places: Tensor  #: of their first tokens among those of the present chunks
    keys_at: int | slice | None  #: the seat of keys that all read; or consecutive ones, one for each; None otherwise

    @classmethod
    def of(cls, ones: list[Session], store: SessionStore) -> "Readers":
        """From what the host knows; nothing waits for a GPU."""
        device, keys = store.device, [one.keys for one in ones]
        columns = ([one.seat for one in ones], keys, [one.position % store.chunk_size for one in ones])
        numbers = torch.tensor(columns, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
        seats, of_keys, places = numbers.to(device, non_blocking=True)
        at: int | slice | None = None
        if len(set(keys)) == 1:
            at = keys[0]
        elif keys == list(range(keys[0], keys[0] + len(keys))):
            at = slice(keys[0], keys[0] + len(keys))
        return cls(seats, of_keys, places, at)


def look_up_each(store: SessionStore, readers: Readers, queries: Tensor, o: Options) -> tuple[Tensor, Addresses]:
    """Weights [t·S, J] and addresses of queries [t, S, H, Dk], each session's in its own keys.

    Triton kernels take the sessions as heads of one lookup: what a row finds does not depend on what comes with it.
    """
    length, sessions, heads, _ = queries.shape
    (keys,) = store.keys.tensors
    if isinstance(readers.keys_at, int):
        return look_up(queries.flatten(0, 1), keys[readers.keys_at], o)
    if not checks.use_triton(o.backend, queries):
        parts = [look_up(queries[:, i], keys[seat], o) for i, seat in enumerate(readers.keys.tolist())]
        columns = zip(*((x, *y) for x, y in parts), strict=True)
        each, *each_found = (torch.stack(column, 1).flatten(0, 1) for column in columns)
        return each, Addresses(*each_found)
    own_keys = keys.index_select(0, readers.keys) if readers.keys_at is None else keys[readers.keys_at]  # no copy
    weights, together = look_up(queries.flatten(1, 2), own_keys.flatten(0, 1), o, sessions)
    found = Addresses(*(x.view(length * sessions, heads, *x.shape[2:]) for x in together))
    # Sub-keys are numbered as rows of all keys together, and are wanted as those of each session's.
    own = torch.arange(sessions, dtype=torch.int32, device=keys.device) * (2 * heads * keys.shape[3])
    found.sub_keys.view(length, sessions, -1).sub_(own.view(1, sessions, 1))
    return weights, found


def read_tokens(
    store: SessionStore, readers: Readers, queries: Tensor, output: Tensor, tokens: Tokens | None, o: Options
) -> None:
    """Read queries [t, S, H, Dk] to output [t, S, D]; with `tokens`, put them and what was found into the queues."""
    weights, found = look_up_each(store, readers, queries, o)
    buffer, initial, indices, (seats, _, places, _) = store.pages.buffer, store.initial, store.indices, readers
    if checks.use_triton(o.backend, initial):
        from .kernels.pool import read_sessions

        how: dict[str, Any] = {}
        if tokens is not None:
            how = {"tokens": tokens, "queue": store.queue, "places": places, "lookahead": o.lookahead}
        read_sessions(buffer, initial, indices, seats, found, weights, output, **how)
        return
    length, sessions = queries.shape[:2]
    slots = found.slots.flatten(1)
    by_row = seats.expand(length, sessions).flatten()
    values = store.pages.look_up(slots.flatten(), indices[by_row.unsqueeze(1), slots].flatten(), initial)
    each_row = torch.arange(slots.numel(), device=slots.device).view(slots.shape)
    predictions = gather_torch(values, each_row, weights, weights.dtype)
    output.copy_(predictions.view(output.shape))
    if tokens is None:
        return
    where = places + torch.arange(length, device=places.device).unsqueeze(1)  # [t, S]
    ones = predictions.new_ones(length, sessions)
    read = {"predictions": predictions, "weights": weights, **found._asdict(), "targets": tokens.targets}
    carried = {"queries": tokens.queries, "gates": tokens.gates, "mask": tokens.mask}
    queue = store.queue._asdict()
    for name, x in carried.items():
        queue[name][seats, where + o.lookahead] = (ones if x is None else x).to(queue[name].dtype)
    del read["scores"]
    for name, x in read.items():
        queue[name][seats, where] = x.reshape(*where.shape, *queue[name].shape[2:])


class Closing(NamedTuple):
    """A chunk that is full, as its session will write it."""

    writes: ChunkWrites
    missing: Missing
    again: tuple[Tensor, Tensor] | None  #: slots and weights [L, J] of the carried tokens


def write_chunks(store: SessionStore, ones: list[Session], keep_past: bool, o: Options) -> None:
    """Write the chunks that fill the queues of some sessions, whose positions are still those before their last read.

    All chunks are planned, then the room for their rows is checked, and then they are written, one after the other.

    Raises:
        PoolFullError: there are too few free rows. Nothing has been written then.
    """
    pasts = [one.past for one in ones if one.past is not None]
    references, freed = store.pages.without([store.indices[past.seat] for past in pasts])
    closings = [_plan(store, one, references, keep_past, o) for one in ones]
    # The host waits for a GPU here, and below for each past that is dropped; nowhere else.
    freed_rows, *numbers = torch.cat((freed.view(1), *(closing.missing.counts for closing in closings))).tolist()
    counts = list(zip(numbers[::2], numbers[1::2], strict=True))
    store.make_room(sum(missing for missing, _ in counts) - freed_rows, f"writing {len(ones)} full chunks")
    for past in pasts:  # before any row is taken, since their rows were counted as free
        store.drop(past)
    for one in ones:
        one.past = None
    for one, closing, (missing, shared) in zip(ones, closings, counts, strict=True):
        if keep_past:
            one.past = store.copy(one)
        if one.keys == 0 and (o.keys_move or o.key_gradient == "all"):
            one.keys = store.keys.copy(0)
        _write(store, one, closing, missing, shared, o)


def _plan(store: SessionStore, one: Session, references: Tensor, keep_past: bool, o: Options) -> Closing:
    """Plan the write of the chunk that fills a session's queue; `references` is as `Missing` takes it."""
    queue, keys = store.queue_of(one.seat), store.keys.tensors[0][one.keys]
    carried = 0 if one.position < o.chunk_size else o.lookahead
    slots, weights = queue.slots.flatten(0, 1), queue.weights.flatten(0, 1)
    again = None
    if carried > 0:
        weights_again, found = look_up(queue.queries[o.lookahead - carried : o.lookahead].flatten(0, 1), keys, o)
        again = (found.slots.flatten(1), weights_again)
        slots, weights = torch.cat((found.slots, slots)), torch.cat((weights_again, weights))
    memory = Memory(keys, store.pages.buffer, store.touched, queue)
    writes = plan_chunk_writes(memory, carried, slots, weights, Lanes(), o)
    return Closing(writes, Missing(references, store.indices[one.seat], writes.plan, keep_past), again)


def _write(store: SessionStore, one: Session, closing: Closing, missing: int, shared: int, o: Options) -> None:
    """Get the rows that are missing, of which some were shared, and write the chunk: values and keys."""
    writes, again = closing.writes, closing.again
    index, queue = store.indices[one.seat], store.queue_of(one.seat)
    store.pages.own(index, closing.missing.slots(missing), shared, store.initial, o.backend)
    memory = Memory(store.keys.tensors[0][one.keys], store.pages.buffer, store.touched, queue)
    predictions = queue.predictions.flatten(0, 1)
    if again is not None:
        # All carried tokens are written, so all their rows are the session's own by now.
        rows, weights = rows_of(index, again[0]), again[1]
        predictions = torch.cat((gather_rows(memory.values, rows, weights, weights.dtype, o.backend), predictions))
    pair_targets = queue.targets[o.lookahead - writes.carried :].flatten(0, 1)
    errors = predictions[: len(pair_targets)] - pair_targets
    # The plan was made for the slots, so that sums are in the order in which a state adds them.
    plan = writes.plan._replace(rows=index[writes.plan.rows.long()])
    writes = writes._replace(plan=plan, rows=rows_of(index, writes.rows))
    picks = Picks(queue.half_scores.flatten(0, 1), queue.sub_keys.flatten(0, 1))
    apply_chunk_writes(memory, writes, errors, picks, Lanes(), o)
