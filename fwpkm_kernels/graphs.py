"""CUDA graphs of streaming steps: what a step launches, captured once and replayed as one launch."""

import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from . import _checks as checks
from ._autograd import refuse_recomputation, refuse_transforms
from .lanes import Lanes
from .options import Options
from .pool import MemoryPool
from .records import Tokens, each
from .serving import Readers, finish, read_tokens
from .state import MemoryState, check_step
from .streaming import Memory, close_chunk, fast_weight_memory_step, read_and_close_chunk, read_piece


class Graph(Protocol):
    """The part of `torch.cuda.CUDAGraph` that is used here."""

    def replay(self) -> None:
        """Run what was captured again."""


def capture(function: Callable[[], None], warm_up: Callable[[], None]) -> Graph:
    """Capture `function` in a CUDA graph, after running `warm_up`, which launches the same on other tensors."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        warm_up()  # kernels are compiled, and libraries set up, outside the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads go on, and by default their allocations would break the capture.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        function()
    return graph


def _index(device: torch.device) -> int:
    """The number of a GPU; -1, which torch.cuda.device leaves alone, of a CPU."""
    return -1 if device.index is None else device.index


def _memory(state: MemoryState) -> Memory:
    """What a step reads and writes of a bound state."""
    assert state._queue is not None
    return Memory(state.keys, state.values, state._touched, state._queue)


def _options(options: dict[str, Any]) -> Options:
    """The options of a graph, which may be those of a step only."""
    unknown = sorted(set(options) - set(Options._fields))
    if unknown:
        raise TypeError(f"`options` must be among {sorted(Options._fields)}, got {unknown}")
    return Options(**options)


def _check_place(name: str, values: Tensor, o: Options) -> None:
    """Raise ValueError unless what works on these values can be captured."""
    if not values.is_cuda:
        raise ValueError(f"`{name}` must be on a GPU to be captured, got {values.device}")
    if o.backend == "torch":
        raise ValueError("`backend` must be 'auto' or 'triton' to be captured: 'torch' waits for the GPU")


def _check_captured(gates: Tensor | None, mask: Tensor | None, tokens: Tokens) -> None:
    """Raise ValueError unless gates and mask are there, in the same dtypes, as they were at the capture."""
    for name, x, static in (("gates", gates, tokens.gates), ("mask", mask, tokens.mask)):
        if (x is None) != (static is None):
            raise ValueError(f"`{name}` must be given if and only if it was for the capture")
        if x is not None and static is not None and x.dtype != static.dtype:
            raise ValueError(f"`{name}` must have the dtype that was captured, {static.dtype}, got {x.dtype}")


class MemoryGraph:
    """Streaming steps of a fixed number of tokens, replayed as CUDA graphs.

    A step branches on the host where a chunk ends, which a captured graph would freeze. So there are two graphs: one
    reads `t` tokens somewhere inside a chunk, one reads the `t` tokens that complete a chunk and writes it; the right
    one is replayed. With t = chunk_size, or several chunks, there is only the second. The first chunk of a sequence
    carries nothing over from a chunk before, so the step that completes it is not captured but run as
    `fast_weight_memory_step`. In a graph the addresses of a chunk, its plan and its values are on streams of their own:
    with t of several chunks the addresses run ahead of the values, and what has been found for each of them is kept.

    All options are frozen into the graphs, also lr, weight_decay, clip and addressing_weight.

    Args:
        state: the memory, on a GPU; the graphs read and write its tensors in place. Between calls it may be reset,
            rolled back, loaded into, and stepped by other means. A copy of it is held while the graphs are captured.
        queries: [B, t, H, Dk]: only the shape and dtype matter. `t` must divide `chunk_size` or be a multiple of it.
        targets: [B, t, D], likewise.
        gates, mask: [B, t], likewise; None if calls will have none.
        options: those of `fast_weight_memory_step`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came: a state that is not on a GPU, a
            number of tokens that neither divides `chunk_size` nor is a multiple of it.
    """

    def __init__(
        self,
        state: MemoryState,
        queries: Tensor,
        targets: Tensor,
        *,
        gates: Tensor | None = None,
        mask: Tensor | None = None,
        **options: Any,
    ) -> None:
        o = check_step(state, queries, targets, gates, mask, _options(options))
        _check_place("state", state.values, o)
        self._count = queries.shape[1]
        if self._count == 0 or (o.chunk_size % self._count != 0 and self._count % o.chunk_size != 0):
            raise ValueError(
                f"`queries` [B, t, H, Dk] must have a t that divides `chunk_size` or is a multiple of it, "
                f"got {checks.shape(queries)} against {o.chunk_size}"
            )
        self._state, self._options, self._process = state, o, os.getpid()
        state._bind(queries, targets, o)
        self._captured = self._tensors()
        with torch.inference_mode(False), torch.no_grad(), self._on_device():
            static = each(lambda x: torch.empty_like(x.transpose(0, 1)), gates, mask)
            self._tokens = Tokens(
                torch.zeros_like(queries.transpose(0, 1), memory_format=torch.contiguous_format),
                torch.zeros_like(targets.transpose(0, 1), memory_format=torch.contiguous_format),
                *static,
            )
            self._output = torch.empty_like(self._tokens.targets)
            self._place = torch.zeros((), dtype=torch.int64, device=state.values.device)
            spare = self._full_state(state)
            self._close = capture(lambda: self._run_close(state), lambda: self._run_close(spare))
            self._read = None
            if self._count < o.chunk_size:
                self._read = capture(lambda: self._run_read(state), lambda: self._run_read(spare))

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a MemoryGraph cannot be copied, pickled or sent to another process: copy or send its state, and capture a"
            " graph of the copy"
        )

    def _full_state(self, state: MemoryState) -> MemoryState:
        """A copy for warming up, as if all tokens of a chunk had been read: each picked the first sub-keys."""
        spare, o = state.clone(), self._options
        assert spare._queue is not None
        sub_keys = spare._queue.sub_keys  # [C, B, H, 2, K]
        heads, num_keys = sub_keys.shape[2], state.keys.shape[2]
        first = torch.arange(0, heads * 2 * num_keys, num_keys, dtype=sub_keys.dtype, device=sub_keys.device)
        picks = torch.arange(o.top_k, dtype=sub_keys.dtype, device=sub_keys.device)
        sub_keys.copy_(first.view(heads, 2, 1) + picks)
        return spare

    def _on_device(self) -> torch.cuda.device:
        """Make the state's GPU the current one: a graph is captured, and replayed, on a stream of the current GPU."""
        return torch.cuda.device(_index(self._state.values.device))

    def _tensors(self) -> list[int]:
        """Where the state's tensors lie."""
        *tensors, queue = _memory(self._state)
        return [x.data_ptr() for x in (*tensors, *queue)]

    def _run_read(self, state: MemoryState) -> None:
        """Read the tokens, at a place in the chunk that is known when the graph is replayed."""
        with torch.autocast(state.values.device.type, enabled=False):
            read_piece(_memory(state), self._tokens, self._output, self._place, self._options)

    def _run_close(self, state: MemoryState) -> None:
        """Read the last tokens of a chunk that is not the first, and write it; or whole chunks."""
        memory, o = _memory(state), self._options
        lanes = Lanes(state.values.is_cuda and torch.cuda.is_current_stream_capturing())
        with torch.autocast(state.values.device.type, enabled=False):
            try:
                if self._count < o.chunk_size:
                    place = o.chunk_size - self._count
                    read_piece(memory, self._tokens, self._output, place, o)
                    close_chunk(memory, False, lanes, o)
                else:
                    for begin in range(0, self._count, o.chunk_size):
                        part = self._tokens.part(begin, begin + o.chunk_size)
                        output = self._output[begin : begin + o.chunk_size]
                        read_and_close_chunk(memory, part, output, False, lanes, o)
            finally:  # a lane left open would keep this capture from ending, and all later ones from beginning
                lanes.join()

    def __call__(
        self, queries: Tensor, targets: Tensor, *, gates: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Read the next tokens: what `fast_weight_memory_step` does, by replaying graphs.

        Args:
            queries: [B, m, H, Dk], m a multiple of the captured t.
            targets: [B, m, D].
            gates, mask: [B, m], given if and only if they were for the capture.

        Returns:
            output [B, m, D], a tensor of its own.

        Raises:
            ValueError: where the graphs would be wrong: m is not a multiple of t, the state's position is not, the
                state's tensors are not those that were captured, or gates or mask are there and were not, or the
                reverse. Nothing has been written by then.
            RuntimeError: where `fast_weight_memory_step` raises it, but for captures; in a process that was forked
                after the capture.
        """
        if os.getpid() != self._process:
            raise RuntimeError(
                "a MemoryGraph runs in the process that captured it, and this one was forked from it:"
                " capture a graph of the state here"
            )
        o, state = self._options, self._state
        refuse_transforms("MemoryGraph", (queries, targets, gates, mask))
        refuse_recomputation("MemoryGraph")
        check_step(state, queries, targets, gates, mask, o)
        if state._queue is None or self._tensors() != self._captured:
            raise ValueError("`state` has other tensors than at the capture; capture it again")
        state._bind(queries, targets, o)
        _check_captured(gates, mask, self._tokens)
        length, count = queries.shape[1], self._count
        place = min(count, o.chunk_size)
        if length % count != 0:
            raise ValueError(f"`queries` must have a t that is a multiple of the {count} tokens captured, got {length}")
        if state.position % place != 0:
            raise ValueError(f"`state` must be at a position that is a multiple of {place}, got {state.position}")
        with torch.no_grad(), self._on_device():
            return self._replay(queries, targets, gates, mask)

    def _replay(self, queries: Tensor, targets: Tensor, gates: Tensor | None, mask: Tensor | None) -> Tensor:
        """One replay for each t tokens, but for the one that completes the first chunk."""
        o, state, count = self._options, self._state, self._count
        output = torch.empty(targets.shape, dtype=targets.dtype, device=targets.device)
        for begin in range(0, queries.shape[1], count):
            part = slice(begin, begin + count)
            given = [None if x is None else x[:, part] for x in (queries, targets, gates, mask)]
            place = state.position % o.chunk_size
            closes = place + count >= o.chunk_size
            if closes and state.position < o.chunk_size:
                options = o._asdict() | dict(zip(Tokens._fields, given, strict=True))
                output[:, part] = fast_weight_memory_step(state, **options)
                continue
            for static, x in zip(self._tokens, given, strict=True):
                if static is not None and x is not None:
                    static.copy_(x.transpose(0, 1))
            if closes or self._read is None:
                self._close.replay()
            else:
                self._place.fill_(place)
                self._read.replay()
            output[:, part] = self._output.transpose(0, 1)
            state._position += count
        return output


class PoolGraph:
    """The reads of a pool's decoding steps, a fixed number of tokens of a fixed number of sessions, as one CUDA graph.

    Which sessions read, and where each of them is in its chunk, are tensors that a replay reads, so one graph serves
    any sessions of the pool. Chunks that a call fills are written after the replay, as `fast_weight_memory_step` writes
    them: for their rows the host decides. All options are frozen, also lr, clip and addressing_weight.

    Args:
        pool: on a GPU. It may be used by other means between calls. When it has made room for more sessions, rows, or
            keys that have moved, the next call captures the graph again.
        queries: [S, t, H, Dk]: only the shape and dtype matter; t is at most `chunk_size`.
        targets: [S, t, D], likewise.
        gates, mask: [S, t], likewise; None if calls will have none.
        options: those of `fast_weight_memory_step` but `sessions` and `lengths`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came: a pool that is not on a GPU, or
            more tokens than a chunk has.
    """

    def __init__(
        self,
        pool: MemoryPool,
        queries: Tensor,
        targets: Tensor,
        *,
        gates: Tensor | None = None,
        mask: Tensor | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(pool, MemoryPool):
            raise TypeError(f"`pool` must be a MemoryPool, got {type(pool).__name__}")
        o = pool._check(queries, targets, gates, mask, _options(options))
        _check_place("pool", pool._store.initial, o)
        if not 0 < queries.shape[1] <= o.chunk_size or len(queries) == 0:
            raise ValueError(
                f"`queries` [S, t, H, Dk] must have sessions, and a t from 1 to `chunk_size`={o.chunk_size}, got "
                f"{checks.shape(queries)}"
            )
        pool._bind(queries, targets, o)
        self._pool, self._options, self._process = pool, o, os.getpid()
        with torch.inference_mode(False), torch.no_grad():
            self._tokens = Tokens(queries, targets, gates, mask).map(
                lambda x: torch.zeros_like(x.transpose(0, 1), memory_format=torch.contiguous_format)
            )
            self._output = torch.empty_like(self._tokens.targets)
            self._capture()

    def _capture(self) -> None:
        """Capture the reads of the tensors that the pool has now; a seat of its own is there for the warm-up alone."""
        pool = self._pool
        self._captured: list[int] = []  # until the capture has succeeded: the next call then captures again
        spare = pool.open()
        try:
            self._readers = Readers.of([pool._sessions[spare]] * self._output.shape[1], pool._store)._replace(
                keys_at=None
            )
            with torch.cuda.device(_index(pool.device)):
                self._graph = capture(self._run, self._run)
            self._captured = self._tensors()
        finally:
            pool.close(spare)

    def _tensors(self) -> list[int]:
        """Where the pool's tensors lie."""
        store = self._pool._store
        tensors = (store.initial, store.pages.buffer, *store.shelf.tensors, *store.keys.tensors)
        return [x.data_ptr() for x in tensors]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a PoolGraph cannot be copied, pickled or sent to another process: capture another one there")

    def _run(self) -> None:
        """Read the tokens, each session from its place on."""
        with torch.autocast(self._pool.device.type, enabled=False):
            store = self._pool._store
            read_tokens(store, self._readers, self._tokens.queries, self._output, self._tokens, self._options)

    def __call__(
        self,
        queries: Tensor,
        targets: Tensor,
        *,
        sessions: Sequence[int] | Tensor,
        gates: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Read the next tokens: what `fast_weight_memory_step` does, by replaying the graph.

        Args:
            queries: [S, t, H, Dk], as captured.
            targets: [S, t, D].
            sessions: the ids of S sessions, each with at least t tokens left in its present chunk.
            gates, mask: [S, t], given if and only if they were for the capture.

        Returns:
            output [S, t, D], a tensor of its own.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came; also where a session has too
                few tokens left in its chunk.
            RuntimeError: where `fast_weight_memory_step` raises it, but for captures; in a process that was forked
                after the capture.
        """
        if os.getpid() != self._process:
            raise RuntimeError("a PoolGraph runs in the process that captured it, and this one was forked from it")
        o, pool = self._options, self._pool
        refuse_transforms("PoolGraph", (queries, targets, gates, mask))
        refuse_recomputation("PoolGraph")
        pool._check(queries, targets, gates, mask, o)
        if queries.shape[:2] != self._output.shape[1::-1]:
            wanted = list(self._output.shape[1::-1])
            raise ValueError(
                f"`queries` must have the S and t that were captured, {wanted}, got {checks.shape(queries)}"
            )
        ones = pool._named(sessions, len(queries))
        pool._bind(queries, targets, o)
        _check_captured(gates, mask, self._tokens)
        length = queries.shape[1]
        for one in ones:
            if one.position % o.chunk_size + length > o.chunk_size:
                raise ValueError(
                    f"`sessions` must have {length} tokens left in their chunks, got position {one.position}"
                )
        without_autocast = torch.autocast(pool.device.type, enabled=False)
        with torch.inference_mode(False), torch.no_grad(), without_autocast, torch.cuda.device(_index(pool.device)):
            if self._tensors() != self._captured:
                self._capture()
            for static, x in zip(self._tokens, (queries, targets, gates, mask), strict=True):
                if static is not None and x is not None:
                    static.copy_(x.transpose(0, 1))
            for static, x in zip(self._readers[:3], Readers.of(ones, pool._store)[:3], strict=True):
                static.copy_(x)
            self._graph.replay()
            output = self._output.transpose(0, 1).clone(memory_format=torch.contiguous_format)
            finish(pool._store, [(one, length) for one in ones], pool.keep_past, o)
        return output
