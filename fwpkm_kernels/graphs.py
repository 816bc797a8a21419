"""CUDA graphs of streaming steps: what a step launches, captured once and replayed as one launch."""

import os
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from . import _checks as checks
from ._autograd import refuse_recomputation, refuse_transforms
from .lanes import Lanes
from .options import Options
from .records import Tokens, each
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


def _memory(state: MemoryState) -> Memory:
    """What a step reads and writes of a bound state."""
    assert state._queue is not None
    return Memory(state.keys, state.values, state._touched, state._queue)


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
        unknown = sorted(set(options) - set(Options._fields))
        if unknown:
            raise TypeError(f"`options` must be among {sorted(Options._fields)}, got {unknown}")
        o = check_step(state, queries, targets, gates, mask, Options(**options))
        if not state.values.is_cuda:
            raise ValueError(f"`state` must be on a GPU to be captured, got {state.values.device}")
        if o.backend == "torch":
            raise ValueError("`backend` must be 'auto' or 'triton' to be captured: 'torch' waits for the GPU")
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
        index = self._state.values.device.index
        return torch.cuda.device(-1 if index is None else index)

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
        for name, x, static in (("gates", gates, self._tokens.gates), ("mask", mask, self._tokens.mask)):
            if (x is None) != (static is None):
                raise ValueError(f"`{name}` must be given if and only if it was for the capture")
            if x is not None and static is not None and x.dtype != static.dtype:
                raise ValueError(f"`{name}` must have the dtype that was captured, {static.dtype}, got {x.dtype}")
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
