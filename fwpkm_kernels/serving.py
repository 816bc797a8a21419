"""Steps of the sessions of a pool: reading is done for all sessions at once, writing for one after the other.

A call goes in rounds. In each, every session that has tokens left reads up to the end of its present chunk; those that
read as many share one launch. Then the chunks that are full are planned, the room for their rows is checked, and they
are written.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks as checks
from .gather import gather_rows, gather_torch
from .lanes import Lanes
from .options import Options
from .pages import Missing, rows_of
from .records import Addresses, Picks, Tokens
from .sessions import PoolFullError, Session, SessionStore
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


def read_all(
    store: SessionStore, ones: list[Session], counts: list[int], tokens: Tokens, keep_past: bool, o: Options
) -> Tensor:
    """Read the last tokens of the rows [S, t, ...], so many of each session, and write every chunk that they fill.

    The output is [S, t, D], and 0 at tokens that are not read.

    A round is written as a whole or not at all, but the next one may find no room. Where that may be, copies of the
    sessions that write go through the rounds, and are taken over at the end; the rows that they share count twice.

    Raises:
        PoolFullError: there are too few free rows. No session has read anything then, and nothing has been written.
    """
    chunks = [(one.position % o.chunk_size + count) // o.chunk_size for one, count in zip(ones, counts, strict=True)]
    wanted, free = 0, store.pages.num_free
    if max(chunks, default=0) > 1 and not store.grows:
        accesses = o.chunk_size * tokens.queries.shape[2] * o.top_k
        wanted = sum(
            store.most_wanted(one, count, accesses, keep_past) for one, count in zip(ones, chunks, strict=True) if count
        )
    if wanted <= free:
        return _read_rounds(store, ones, counts, tokens, keep_past, o)
    drafts, positions = list(ones), [one.position for one in ones]
    try:
        for row, count in enumerate(chunks):
            if count > 0:
                drafts[row] = store.copy(ones[row])
        output = _read_rounds(store, drafts, counts, tokens, keep_past, o)
        store.drop(*(one for one, draft in zip(ones, drafts, strict=True) if draft is not one))
    except BaseException as error:
        for one, position in zip(ones, positions, strict=True):
            one.position = position
        store.drop(*(draft for one, draft in zip(ones, drafts, strict=True) if draft is not one))
        if isinstance(error, PoolFullError):
            what = f"the {max(chunks)} chunks that a session reads, with those of others, at most"
            raise PoolFullError(wanted, free, len(store.pages.buffer), what) from None
        raise
    for one, draft in zip(ones, drafts, strict=True):
        if draft is not one:
            vars(one).update(vars(draft))
    return output


def _read_rounds(
    store: SessionStore, ones: list[Session], counts: list[int], tokens: Tokens, keep_past: bool, o: Options
) -> Tensor:
    """`read_all` without looking ahead: a PoolFullError leaves what the rounds before have read and written."""
    output, length = tokens.targets.new_zeros(tokens.targets.shape), tokens.targets.shape[1]
    begins = [length - count for count in counts]
    while any(begin < length for begin in begins):
        parts: dict[int, list[int]] = {}  # the rows that read so many tokens
        for row, begin in enumerate(begins):
            count = min(length - begin, o.chunk_size - ones[row].position % o.chunk_size)
            if count > 0:
                parts.setdefault(count, []).append(row)
        for count, rows in parts.items():
            where = [(row, slice(begins[row], begins[row] + count)) for row in rows]
            _read_part(store, tokens, output, [ones[row] for row in rows], where, o)
        read = sorted((row, count) for count, rows in parts.items() for row in rows)
        finish(store, [(ones[row], count) for row, count in read], keep_past, o)
        for row, count in read:
            begins[row] += count
    return output


def _read_part(
    store: SessionStore, tokens: Tokens, output: Tensor, ones: list[Session], where: list[tuple[int, slice]], o: Options
) -> None:
    """Read tokens of some rows, equally many of each."""
    readers, (_, first) = Readers.of(ones, store), where[0]
    if len(where) == len(output) and all(part == first for _, part in where):  # no copies are needed
        part = tokens.map(lambda x: x[:, first].transpose(0, 1))
        read_tokens(store, readers, part.queries, output[:, first].transpose(0, 1), part, o)
        return
    part = tokens.map(lambda x: torch.stack([x[place] for place in where], dim=1))
    read = torch.empty_like(part.targets)
    read_tokens(store, readers, part.queries, read, part, o)
    for i, place in enumerate(where):
        output[place] = read[:, i]


def finish(store: SessionStore, read: list[tuple[Session, int]], keep_past: bool, o: Options) -> None:
    """Write the chunks of sessions whose last tokens, so many, have been read, and move all positions.

    Raises:
        PoolFullError: there are too few free rows. No position has moved then, and nothing has been written.
    """
    full = [one for one, count in read if (one.position + count) % o.chunk_size == 0]
    if full:
        write_chunks(store, full, keep_past, o)
    for one, count in read:
        one.position += count


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
    # The host waits for a GPU here, and below for the pasts that are dropped and each that is kept.
    freed_rows, *numbers = torch.cat((freed.sum().view(1), *(closing.missing.counts for closing in closings))).tolist()
    counts = list(zip(numbers[::2], numbers[1::2], strict=True))
    store.make_room(sum(missing for missing, _ in counts) - freed_rows, f"writing {len(ones)} full chunks")
    store.drop(*pasts)  # before any row is taken, since their rows were counted as free
    for one in ones:
        one.past = None
    moves = o.keys_move or o.key_gradient == "all"
    taken: list[tuple[Session | None, int]] = []  # the past and the seat of the keys of each
    with ExitStack() as undo:  # where memory ends, it ends before anything is written
        for one in ones:
            new_past, keys = store.copy(one) if keep_past else None, one.keys
            if new_past is not None:
                undo.callback(store.drop, new_past)
            if keys == 0 and moves:
                keys = store.keys.copy(0)
                undo.callback(store.keys.give, keys)
            taken.append((new_past, keys))
        for one, closing, (missing, shared) in zip(ones, closings, counts, strict=True):
            index, slots = store.indices[one.seat], closing.missing.slots(missing)
            store.pages.own(index, slots, shared, store.initial, o.backend)
        undo.pop_all()
    for one, (new_past, keys) in zip(ones, taken, strict=True):
        one.past, one.keys = new_past, keys
    for one, closing in zip(ones, closings, strict=True):
        _write(store, one, closing, o)


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


def _write(store: SessionStore, one: Session, closing: Closing, o: Options) -> None:
    """Write the chunk of a session that has all its rows: values and keys."""
    writes, again = closing.writes, closing.again
    index, queue = store.indices[one.seat], store.queue_of(one.seat)
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
