"""Streaming: a memory that is kept between calls and reads any number of tokens in each, in place.

A step reads its tokens from the present state. When the last token of a chunk has been read, the chunk is written, as
`fast_weight_memory(boundary="carry")` writes it. What a chunk will need then waits in the state's queue: tokens that
were read are not looked up again, but for the `lookahead` ones that are carried into the next chunk.
"""

import json
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks as checks
from .addressing import step_keys
from .chunks import OPTIONS_SCHEMA, Options, fold_write_weights, weigh, write_scale
from .coupled import coupled_step
from .gather import gather_rows
from .kernels import compute_dtype
from .lookup import lookup_halves
from .memory import check_memory, run_scans
from .plan import count_accesses, plan_segments
from .scans import read, write

#: Options that may change from step to step.
FREE_OPTIONS = ("lr", "weight_decay", "clip", "addressing_weight")


class Queue(NamedTuple):
    """What waits for a chunk to be full: C tokens of the present chunk, after L that are carried from the one before.

    Time first, so that the tokens of a chunk are a slice.
    """

    queries: Tensor  #: [L + C, B, H, Dk]
    gates: Tensor  #: [L + C, B]
    mask: Tensor  #: [L + C, B]
    targets: Tensor  #: [C, B, D]
    predictions: Tensor  #: [C, B, D], not rounded
    slots: Tensor  #: int64 [C, B, H, K]
    weights: Tensor  #: [C, B, J]
    half_scores: Tensor  #: [C, B, H, 2, K]
    sub_keys: Tensor  #: int32 [C, B, H, 2, K]


class Binding(NamedTuple):
    """What the first step of a state settles for all later ones."""

    batch: int
    queries_dtype: torch.dtype
    targets_dtype: torch.dtype
    options: Options  #: the free ones at their defaults


class MemoryState:
    """A memory that reads and writes step by step: see `fast_weight_memory_step`.

    It keeps `keys` [H, 2, n, Dk/2] and `values` [N, D], detached, as the initial memory, and never writes them: many
    states may share them. It writes private copies, `state.keys` and `state.values`. The first step binds batch size,
    dtypes and all options but lr, weight_decay, clip and addressing_weight.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    @torch.inference_mode(False)  # a state that is set up in inference mode can be stepped outside of it
    def __init__(self, keys: Tensor, values: Tensor) -> None:
        check_initial_memory(keys, values)
        self._initial_keys, self._initial_values = keys.detach(), values.detach()
        self.keys = self._initial_keys.clone(memory_format=torch.contiguous_format)
        self.values = self._initial_values.clone(memory_format=torch.contiguous_format)
        # On the CPU, so that reading it never waits for a GPU; a tensor, so that torch.compile does not count with it.
        self._position = torch.zeros((), dtype=torch.int64)
        self._touched = torch.zeros(values.shape[0], dtype=torch.uint8, device=values.device)
        self._initial_version = _version(self._initial_values)
        self._binding: Binding | None = None
        self._queue: Queue | None = None

    @property
    def position(self) -> int:
        """Tokens read so far, by each item of the batch."""
        return int(self._position)

    def reset(self) -> None:
        """Return to the initial memory and position 0; what is bound stays bound.

        Copies back the rows that were touched; all of them after a write with weight_decay > 0, or if the initial
        memory was itself changed in place since.
        """
        with torch.no_grad():
            if self._initial_version != (version := _version(self._initial_values)):
                self._touched.fill_(1)
                self._initial_version = version
            self.keys.copy_(self._initial_keys)
            if self.values.is_cuda:
                from .kernels.memory import restore_rows

                restore_rows(self.values, self._initial_values, self._touched)
            else:
                rows = torch.nonzero(self._touched).flatten()
                self.values[rows] = self._initial_values[rows]
            for x in (self._touched, self._position, *(self._queue or ())):
                x.zero_()

    @torch.inference_mode(False)
    def clone(self) -> "MemoryState":
        """An independent copy that shares the initial memory."""
        other = MemoryState.__new__(MemoryState)
        other._initial_keys, other._initial_values = self._initial_keys, self._initial_values
        other.keys, other.values = self.keys.clone(), self.values.clone()
        other._position, other._touched = self._position.clone(), self._touched.clone()
        other._initial_version, other._binding = self._initial_version, self._binding
        other._queue = None if self._queue is None else Queue(*(x.clone() for x in self._queue))
        return other

    __copy__ = clone

    def state_dict(self) -> dict[str, Tensor]:
        """Memory, position, queue and bound options as flat, contiguous, unshared tensors, as safetensors wants them.

        The initial memory is not included.
        """
        tensors = {"keys": self.keys, "values": self.values, "position": self._position}
        if self._binding is not None and self._queue is not None:
            tensors["binding"] = _to_bytes(self._binding)
            tensors |= {f"queue.{name}": x for name, x in self._waiting(self._binding.options, self._queue).items()}
        return {name: x.detach().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}

    def _waiting(self, o: Options, queue: Queue) -> dict[str, Tensor]:
        """The queue without what no longer waits: equal states save equal tensors, and no other tokens."""
        waiting = {name: x.clone() for name, x in queue._asdict().items()}
        for name, x in waiting.items():
            first = o.lookahead if name in ("queries", "gates", "mask") else 0
            x[first + self.position % o.chunk_size :] = 0
            if self.position < o.chunk_size:
                x[:first] = 0
        return waiting

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Take over what `state_dict` saved; `reset` still returns to the initial memory of this state.

        Raises:
            ValueError: for names, shapes or dtypes that do not fit, or bound options other than those of this state.
                Nothing has been changed by then.
        """
        for name in ("keys", "values", "position"):
            if name not in state_dict:
                raise ValueError(f"`state_dict` must hold {name!r}, got {sorted(state_dict)}")
        binding = self._load_binding(state_dict["binding"]) if "binding" in state_dict else None
        expected = {"keys": self.keys, "values": self.values, "position": self._position}
        position, queue = state_dict["position"], None
        # What is not bound has not stepped.
        is_number = isinstance(position, Tensor) and position.numel() == 1
        if is_number and (position < 0 or (binding is None and position != 0)):
            raise ValueError(f"`state_dict` must hold a 'position' that its 'binding' allows, got {int(position)}")
        if binding is not None:
            if self._binding is not None:
                _check_binding(self._binding, binding)
            # Of no memory yet: what is asked for may be absurd.
            queue = self._make_queue(binding, torch.device("meta"))
            expected |= {f"queue.{name}": x for name, x in queue._asdict().items()}
        names = set(expected) | ({"binding"} if binding is not None else set())
        if set(state_dict) != names:
            missing, unknown = sorted(names - set(state_dict)), sorted(set(state_dict) - names)
            raise ValueError(f"`state_dict` must hold exactly {sorted(names)}, got {missing=} and {unknown=}")
        for name, x in expected.items():
            got = state_dict[name]
            if not isinstance(got, Tensor) or got.shape != x.shape or got.dtype != x.dtype:
                came = f"{checks.shape(got)} of {got.dtype}" if isinstance(got, Tensor) else type(got).__name__
                raise ValueError(
                    f"`state_dict` comes from another configuration: {name!r} must be {checks.shape(x)} of {x.dtype}, "
                    f"got {came}"
                )
        if binding is not None:
            for name, size in (("queue.slots", len(self.values)), ("queue.sub_keys", self.keys.shape[:3].numel())):
                checks.check_slot_range(f"state_dict[{name!r}]", state_dict[name].cpu(), size)
            queue = self._queue if self._queue is not None else self._make_queue(binding, self.values.device)
        buffers = {"keys": self.keys, "values": self.values, "position": self._position}
        buffers |= {} if queue is None else {f"queue.{name}": x for name, x in queue._asdict().items()}
        with torch.no_grad():
            for name, x in buffers.items():
                x.copy_(state_dict[name])
            # Which rows differ from the initial memory is not known: reset copies all of them.
            self._touched.fill_(1)
        self._binding, self._queue = binding, queue

    def __repr__(self) -> str:
        heads, _, num_keys, half = self.keys.shape
        return (
            f"MemoryState(position={self.position}, heads={heads}, n={num_keys}, Dk={2 * half}, "
            f"values={checks.shape(self.values)} of {self.values.dtype} on {self.values.device})"
        )

    def _load_binding(self, x: Tensor) -> Binding:
        """What a state dict says was bound; ValueError if no step on this state could have bound it."""
        try:
            binding = _from_bytes(x)
            heads, _, _, half = self.keys.shape
            queries = self.keys.new_empty((binding.batch, 0, heads, 2 * half), dtype=binding.queries_dtype)
            targets = self.values.new_empty((binding.batch, 0, self.values.shape[1]), dtype=binding.targets_dtype)
            check_step(self, queries, targets, None, None, binding.options)
        except (AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"`state_dict` must hold bound options that fit under 'binding', got {error!r}") from None
        return binding

    @torch.inference_mode(False)
    def _make_queue(self, binding: Binding, device: torch.device) -> Queue:
        """An empty queue for what is bound."""
        batch, o = binding.batch, binding.options
        heads, _, _, half = self.keys.shape
        chunk, window, width = o.chunk_size, o.lookahead + o.chunk_size, self.values.shape[1]
        dtype = compute_dtype(self.values.dtype)

        def zeros(*size: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        return Queue(
            queries=zeros(window, batch, heads, 2 * half, dtype=binding.queries_dtype),
            gates=zeros(window, batch),
            mask=zeros(window, batch),
            targets=zeros(chunk, batch, width, dtype=binding.targets_dtype),
            predictions=zeros(chunk, batch, width),
            slots=zeros(chunk, batch, heads, o.top_k, dtype=torch.int64),
            weights=zeros(chunk, batch, heads * o.top_k),
            half_scores=zeros(chunk, batch, heads, 2, o.top_k),
            sub_keys=zeros(chunk, batch, heads, 2, o.top_k, dtype=torch.int32),
        )

    def _bind(self, queries: Tensor, targets: Tensor, o: Options) -> Queue:
        """Bind at the first step; later refuse what differs."""
        free = {name: Options._field_defaults[name] for name in FREE_OPTIONS}
        binding = Binding(queries.shape[0], queries.dtype, targets.dtype, o._replace(**free))
        if self._binding is None or self._queue is None:
            self._binding, self._queue = binding, self._make_queue(binding, self.values.device)
        else:
            _check_binding(self._binding, binding)
        return self._queue


def _version(x: Tensor) -> int | None:
    """How often a tensor was changed in place; None in inference mode, which does not count."""
    return None if x.is_inference() else x._version


def check_initial_memory(keys: Tensor, values: Tensor) -> None:
    """Validate the arguments of `MemoryState`."""
    checks.check_tensor("keys", keys, 4, "[H, 2, n, Dk/2]")
    checks.check_tensor("values", values, 2, "[N, D]")
    checks.check_float("keys", keys)
    checks.check_float("values", values)
    checks.check_together(values=values, keys=keys)
    if keys.shape[1] != 2:
        raise ValueError(f"`keys` must hold two halves, [H, 2, n, Dk/2], got shape {checks.shape(keys)}")
    if values.shape[0] != keys.shape[2] ** 2:
        raise ValueError(
            f"`values` [N, D] must have N = n² rows for the n sub-keys of `keys` [H, 2, n, Dk/2], "
            f"got {checks.shape(values)} against {checks.shape(keys)}"
        )


def _check_binding(bound: Binding, came: Binding) -> None:
    """Name the first thing that is not as it was bound."""
    if came.batch != bound.batch:
        raise ValueError(f"`queries` must keep the state's batch size, {bound.batch}, got {came.batch}")
    dtypes = {
        "queries": (bound.queries_dtype, came.queries_dtype),
        "targets": (bound.targets_dtype, came.targets_dtype),
    }
    for name, (before, after) in dtypes.items():
        if before != after:
            raise ValueError(f"`{name}` must keep the dtype of the state's first step, {before}, got {after}")
    for name, was, now in zip(Options._fields, bound.options, came.options, strict=True):
        if was != now:
            raise ValueError(f"`{name}` must stay as in the state's first step, {was!r}, got {now!r}")


def _to_bytes(binding: Binding) -> Tensor:
    """What is bound as JSON in a uint8 tensor."""
    dtypes = [str(x).removeprefix("torch.") for x in (binding.queries_dtype, binding.targets_dtype)]
    text = json.dumps({"batch": binding.batch, "dtypes": dtypes, "options": binding.options._asdict()})
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _from_bytes(x: Tensor) -> Binding:
    """The inverse; any of several errors if it is not one."""
    fields = json.loads(bytes(x.tolist()))
    queries_dtype, targets_dtype = (getattr(torch, name) for name in fields["dtypes"])
    return Binding(fields["batch"], queries_dtype, targets_dtype, Options(**fields["options"]))


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


def check_step(
    state: MemoryState, queries: Tensor, targets: Tensor, gates: Tensor | None, mask: Tensor | None, o: Options
) -> Options:
    """Validate the arguments of a step; returns the options with their numbers as floats."""
    if not isinstance(state, MemoryState):
        raise TypeError(f"`state` must be a MemoryState, got {type(state).__name__}")
    o = check_memory(queries, targets, state.keys, state.values, gates, mask, o)
    checks.check_choice("boundary", o.boundary, ("carry",))
    checks.use_triton(o.backend, state.values)  # raises where it cannot run, before anything is bound
    return o


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
