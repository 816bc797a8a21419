"""Many streamed memories over one initial memory, each at the price of the rows that it has written."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from . import _checks as checks
from ._autograd import refuse_recomputation, refuse_transforms
from .binding import Binding, check_binding, check_initial_memory, check_step_inputs
from .options import Options
from .pages import count_rows
from .reading import read_options
from .records import Inputs, Tokens
from .serving import Readers, check_lengths, read_all, read_tokens
from .sessions import PoolFullError, Session, SessionStore

_Method = TypeVar("_Method", bound=Callable[..., Any])


def _alone(method: _Method) -> _Method:
    """Run a method of the pool without autograd, on tensors that may be written in and out of inference mode."""

    @functools.wraps(method)
    def wrapper(pool: "MemoryPool", *args: Any, **options: Any) -> Any:
        refuse_recomputation(f"MemoryPool.{method.__name__}")
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(pool.device.type, enabled=False):
            return method(pool, *args, **options)

    return cast(_Method, _disable_dynamo(wrapper))  # torch.compiler.disable would import Dynamo with the package


class MemoryPool:
    """Streamed memories, called sessions, over one initial memory: see `fast_weight_memory_step`.

    Each session is as a `MemoryState` of batch 1 that is alone, but keeps only what it has changed: rows of `values` in
    one buffer that all sessions share, an index of 4 bytes a slot, sub-keys once they have moved, and the tokens of its
    present chunk. The first step binds dtypes and options for all sessions, as that of a state does.

    `keys` and `values` are read where they lie, and never written. So nobody else may write them while sessions are
    open; `open` and `reset` begin with what they hold then.

    At the paper's size, a table of 512² rows of 512 floats (512 MiB), with the default options, a session that has read
    4 096 tokens takes at most 69.1 MiB: 64 of rows, if no two accesses are to the same slot, and 5.1 besides. So 16
    such sessions take no more than two tables where at least 8 % of their accesses repeat a slot, as those of random
    tokens do with keys as a layer draws them (62.6 MiB each), and at most 1 106 MiB in any case.

    A session is known by the int that `open` or `fork` has returned, until it is closed. A pool cannot be copied or
    pickled; `state_dict` moves sessions to other pools and processes. It is for one thread at a time.

    Where memory ends, an OutOfMemoryError leaves all sessions and rows as they were, but for a step that has begun to
    write chunks: its sessions may have read a part of the tokens or written a part of a chunk, and are to be reset.

    Args:
        keys: the initial sub-keys [H, 2, n, Dk/2], of any strides, float32, float64, float16 or bfloat16.
        values: the initial table [N, D], N = n², likewise and on the same device.
        capacity: how many rows [D] the buffer holds for all sessions together; or its bytes, as "2 GiB". A session
            needs a row for every slot that it has written, at most J for each token that it has read, and N in all.
            None: the buffer begins empty and grows by itself where rows are missing, as `grow` does, by half, or less
            where all sessions can hold no more.
        keep_past: whether `rollback` reaches through the last written chunk. A session then holds index, queue, keys
            and the rows that this chunk has changed twice. It may be set at any time, as an attribute, for chunks that
            are written after that.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(self, keys: Tensor, values: Tensor, *, capacity: int | str | None, keep_past: bool = False) -> None:
        check_initial_memory(keys, values)
        self.keep_past = keep_past
        rows = 0 if capacity is None else count_rows(capacity, values.shape[1] * values.itemsize)
        self._keys, self._values = keys, values
        self._sessions: dict[int, Session] = {}
        self._ended: list[int] = []  # sessions that are closed as soon as room is wanted: finalizers name them
        self._next = 0
        with torch.inference_mode(False), torch.no_grad():
            self._store = SessionStore(keys, values, rows, grows=capacity is None)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a MemoryPool cannot be copied or pickled: move its sessions by state_dict and load_state_dict")

    def __repr__(self) -> str:
        sessions, capacity, free = len(self.sessions), self.capacity, self.num_free_rows
        return f"MemoryPool(sessions={sessions}, capacity={capacity}, free={free}, device={self.device})"

    @property
    def keep_past(self) -> bool:
        """Whether `rollback` reaches through the last chunk that is written from now on."""
        return self._keep_past

    @keep_past.setter
    def keep_past(self, keep_past: bool) -> None:
        checks.check_flag("keep_past", keep_past)
        self._keep_past = keep_past

    @property
    def keys(self) -> Tensor:
        """The initial sub-keys, [H, 2, n, Dk/2], as they were given."""
        return self._keys

    @property
    def values(self) -> Tensor:
        """The initial table, [N, D], as it was given."""
        return self._values

    @property
    def device(self) -> torch.device:
        """Where the pool's tensors are."""
        return self._store.device

    @property
    def dtype(self) -> torch.dtype:
        """That of the rows."""
        return self._store.pages.buffer.dtype

    @property
    def sessions(self) -> list[int]:
        """The ids of all open sessions, in the order in which they were opened."""
        self._close_ended()
        return list(self._sessions)

    @property
    def capacity(self) -> int:
        """How many rows the buffer holds."""
        return len(self._store.pages.buffer)

    @property
    def grows(self) -> bool:
        """Whether the buffer grows by itself: whether `capacity` was None."""
        return self._store.grows

    @property
    def num_free_rows(self) -> int:
        """How many of them no session holds."""
        self._close_ended()
        return self._store.pages.num_free

    def num_rows(self, session: int) -> int:
        """How many rows a session holds, shared ones included; 0 while it is evicted. This waits for a GPU."""
        return self._store.count_rows(self._get(session))

    def num_bytes(self, session: int) -> int:
        """Bytes on the device that a session holds: rows, shared ones included, index, queue and moved keys, its past
        not included; 0 while it is evicted. This waits for a GPU.
        """
        one, store = self._get(session), self._store
        if one.stored is not None:
            return 0
        row = store.pages.buffer.shape[1] * store.pages.buffer.itemsize
        return store.count_rows(one) * row + store.shelf.num_bytes + (store.keys.num_bytes if one.keys else 0)

    def position(self, session: int) -> int:
        """How many tokens a session has read."""
        return self._get(session).position

    def reach(self, session: int) -> int:
        """How many of the last tokens `rollback` can take back."""
        return self._store.reach(self._get(session))

    @_alone
    def grow(self, rows: int) -> None:
        """Make the buffer larger by so many rows; sessions stay as they are.

        It is copied into another tensor, and until then both are there. A `PoolGraph` captures anew at its next call.

        Raises:
            TypeError, ValueError: `rows` is no int, below 0, or more than a buffer can have. Nothing has changed then.
        """
        self._store.pages.grow(checks.check_int("rows", rows, minimum=0))

    @_alone
    def open(self) -> int:
        """Begin a session with the initial memory as it is now; its id.

        Raises:
            TypeError, ValueError: if the initial memory is none any more.
            RuntimeError: it has another shape, dtype or device than when the pool was made.
        """
        self._close_ended()
        return self._add(self._store.new())

    @_alone
    def close(self, session: int) -> None:
        """End a session; what it alone has held is free."""
        self._store.drop(self._get(session))
        del self._sessions[session]

    @_alone
    def reset(self, session: int) -> None:
        """Return a session, evicted or not, to the initial memory as it is now and to position 0.

        Raises:
            TypeError, ValueError, RuntimeError: as `open`, and for an id that is not open.
        """
        self._sessions[session] = self._store.replace(self._get(session))

    @_alone
    def fork(self, session: int) -> int:
        """Begin another session that goes on from where this one is; its id.

        The two share rows until one of them writes them. Index, queue and moved keys are copied; the past is not.
        """
        return self._add(self._store.copy(self._present(session, "session")))

    @_alone
    def rollback(self, session: int, tokens: int) -> None:
        """Take back the last tokens that a session has read, as if they had never come.

        Within the present chunk that only moves the position. Beyond its beginning the session becomes, bit by bit,
        what it was before the last written chunk was written; for that it must have been written with `keep_past`, and
        the session neither evicted nor loaded since. Another rollback cannot go beyond the beginning of that chunk.

        Raises:
            TypeError, ValueError: for an id that is not open, what is no int, or more tokens than that. Nothing has
                changed then.
        """
        one = self._get(session)
        tokens = checks.check_int("tokens", tokens, minimum=0)
        place, past, most = one.position % self._store.chunk_size, one.past, self._store.reach(one)
        if tokens > most:
            what = "its present chunk" if past is None else "its present chunk and the last written one"
            raise ValueError(
                f"`tokens` must be at most {most}, as many as the session has read in {what}, got {tokens}"
            )
        position = one.position - tokens
        if past is None or tokens <= place:
            self._store.move(one, position)
            return
        self._store.release([one])
        past.position = position
        self._sessions[session] = past

    @_alone
    def evict(self, session: int) -> None:
        """Move a session to the host: what it alone has held is free for others; the pool's tensors keep their size.

        `restore` brings it back.
        """
        one = self._present(session, "session")
        stored = {name: x.to("cpu") for name, x in self._store.save(one).items()}
        self._store.drop(one)
        one.past, one.stored = None, stored

    @_alone
    def restore(self, session: int) -> None:
        """Bring an evicted session back; nothing happens to one that is there.

        Raises:
            TypeError, ValueError: for an id that is not open.
            PoolFullError: there are too few free rows. The session stays evicted then.
        """
        one = self._get(session)
        if one.stored is not None:
            self._sessions[session] = self._store.load(one.stored, one)

    @_alone
    def state_dict(self, session: int) -> dict[str, Tensor]:
        """All that a session is but the initial memory, as flat, contiguous, unshared tensors: see `load_state_dict`.

        `slots` int64 [R] and `rows` [R, D] are what it has written, `keys` its present sub-keys, `position` an int64;
        a pool that is bound adds the binding and the queue, as `MemoryState.state_dict` does.
        """
        return self._store.save(self._get(session))

    @_alone
    def load_state_dict(self, session: int, state_dict: Mapping[str, Tensor]) -> None:
        """Let a session, evicted or not, go on as the one whose `state_dict` this is, of this pool or of another.

        The initial values of both pools must be the same, which is not checked: rows that the session has not written
        are not saved.

        Raises:
            TypeError: for what is no mapping, or no id.
            ValueError: for an id that is not open, names, shapes or dtypes that do not fit, or bound options other than
                those of this pool. Nothing has been changed by then.
            PoolFullError: there are too few free rows, with those that the session alone holds. Nothing has changed.
        """
        self._sessions[session] = self._store.load(state_dict, self._get(session))

    @_alone
    def read(
        self,
        sessions: Sequence[int] | Tensor,
        queries: Tensor,
        *,
        top_k: int | None = None,
        score: str | None = None,
        eps: float | None = None,
        weighting: str | None = None,
        temperature: float | None = None,
        precision: str | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """Read without writing: what the sessions' present keys and values give; neither queue nor position changes.

        Args:
            sessions: S ids; one may come several times.
            queries: [S, t, H, Dk].

        Of an option None is what is bound, or the default of `fast_weight_memory_step` where nothing is.

        Returns:
            output [S, t, D], in the dtype of the bound targets, or of `values` in a pool that is not bound.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
            RuntimeError: under a transform of torch.func, or in a backward pass.
        """
        refuse_transforms("MemoryPool.read", (queries,))
        binding = self._store.binding
        how = {"top_k": top_k, "score": score, "eps": eps, "weighting": weighting, "temperature": temperature}
        o = read_options(None if binding is None else binding.options, **how, precision=precision, backend=backend)
        checks.check_tensor("queries", queries, 4, "[S, t, H, Dk]")
        dtype = self._values.dtype if binding is None else binding.targets_dtype
        output = torch.empty(*queries.shape[:2], self._values.shape[1], dtype=dtype, device=self.device)
        o = check_step_inputs(Inputs(queries, output, self._keys, self._values, None, None), o)
        ones = self._named(sessions, len(queries), once=False)
        if output.numel() > 0:
            readers = Readers.of(ones, self._store)
            read_tokens(self._store, readers, queries.detach().transpose(0, 1), output.transpose(0, 1), None, o)
        return output

    @_alone
    def _step_sessions(
        self,
        queries: Tensor,
        targets: Tensor,
        gates: Tensor | None,
        mask: Tensor | None,
        sessions: Sequence[int] | Tensor | None,
        lengths: Sequence[int] | Tensor | None,
        o: Options,
    ) -> Tensor:
        """`fast_weight_memory_step` of a pool."""
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a CUDA graph of fast_weight_memory_step would freeze the positions; use PoolGraph")
        o = self._check(queries, targets, gates, mask, o)
        ones = self._named(sessions, len(queries))
        counts = check_lengths(lengths, len(ones), queries.shape[1])
        was_bound = self._store.binding is not None
        self._bind(queries, targets, o)
        tokens = Tokens(queries, targets, gates, mask).map(Tensor.detach)
        try:
            return read_all(self._store, ones, counts, tokens, self.keep_past, o)
        except PoolFullError:
            if not was_bound:
                self._store.unbind()
            raise

    def _check(
        self, queries: Tensor, targets: Tensor, gates: Tensor | None, mask: Tensor | None, o: Options
    ) -> Options:
        """Validate the tokens of a step; returns the options with their numbers as floats."""
        o = check_step_inputs(Inputs(queries, targets, self._keys, self._values, gates, mask), o)
        if o.weight_decay != 0.0:
            raise ValueError(
                f"`weight_decay` must be 0 in a pool, where rows that are shared stay, got {o.weight_decay}"
            )
        return o

    def _bind(self, queries: Tensor, targets: Tensor, o: Options) -> None:
        """Bind at the first step; later refuse what differs."""
        binding = Binding.of(queries, targets, o)._replace(batch=1)
        if self._store.binding is None:
            self._store.bind(binding)
        else:
            check_binding(self._store.binding, binding)

    @_alone
    def _rebind(self, keys: Tensor, values: Tensor) -> None:
        """Go over to another initial memory.

        That is as if somebody had written the one before: sessions that are open must be reset before they go on.

        Raises:
            TypeError, ValueError, RuntimeError: as `open`. Nothing has changed then.
        """
        self._store.rebind(keys, values)
        self._keys, self._values = keys, values

    def _close_ended(self) -> None:
        """Close the sessions of memories that are gone, so that their rows are free."""
        while self._ended:
            number = self._ended[0]  # finalizers add more at the end, at any time
            if number in self._sessions:  # somebody may have closed it by its number
                with torch.inference_mode(False), torch.no_grad():
                    self._store.drop(self._sessions[number])
                del self._sessions[number]
            del self._ended[0]

    def _get(self, session: int, name: str = "session") -> Session:
        """The session with an id."""
        number = checks.check_int(name, session, minimum=0)
        self._close_ended()
        if number not in self._sessions:
            raise ValueError(f"`{name}` must be open, among {self.sessions}, got {number}")
        return self._sessions[number]

    def _present(self, session: int, name: str) -> Session:
        """The session with an id, which must not be evicted."""
        one = self._get(session, name)
        if one.stored is not None:
            raise ValueError(f"`{name}` must not be evicted, got {session}: restore it first")
        return one

    def _named(self, sessions: Any, count: int, *, once: bool = True) -> list[Session]:
        """The sessions of a call with `count` rows."""
        if not isinstance(sessions, Tensor | Sequence) or isinstance(sessions, str):
            raise TypeError(f"`sessions` must be the ids of a pool's sessions, got {type(sessions).__name__}")
        if isinstance(sessions, Tensor):
            checks.check_tensor("sessions", sessions, 1, "[S]")
            checks.check_slots("sessions", sessions)
            checks.check_data("sessions", sessions)
        ids = sessions.tolist() if isinstance(sessions, Tensor) else list(sessions)
        ones = [self._present(session, "sessions") for session in ids]
        if len(ones) != count:
            raise ValueError(f"`sessions` must name one for each row of `queries`, {count}, got {len(ones)}")
        if once and len(set(ids)) < len(ids):
            raise ValueError(f"`sessions` must name each session once, got {ids}")
        return ones

    def _add(self, one: Session) -> int:
        """Give a session an id."""
        self._sessions[self._next] = one
        self._next += 1
        return self._next - 1
