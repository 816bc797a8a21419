"""The state of a streamed memory: its private copies, the queue of the present chunk, and what its first step bound."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks as checks
from .chunks import Options
from .kernels import compute_dtype
from .memory import check_memory

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

    # For copy.deepcopy and pickle, which copy the initial memory too; one that is shared by states that are copied
    # together stays shared under copy.deepcopy and torch.save.
    def __getstate__(self) -> dict[str, Any]:
        fields = dict(self.__dict__)
        if self._initial_version != _version(self._initial_values):
            fields["_touched"] = torch.ones_like(self._touched)
        return fields

    @torch.inference_mode(False)
    def __setstate__(self, fields: dict[str, Any]) -> None:
        self.__dict__.update(fields)
        # What was copied in inference mode can be stepped outside of it.
        for name in ("keys", "values", "_position", "_touched"):
            setattr(self, name, _usable(getattr(self, name)))
        if self._queue is not None:
            self._queue = Queue(*map(_usable, self._queue))
        self._initial_version = _version(self._initial_values)  # the copy counts its own changes

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
            TypeError: for what is no mapping.
            ValueError: for names, shapes or dtypes that do not fit, or bound options other than those of this state.
                Nothing has been changed by then.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"`state_dict` must be a mapping of names to tensors, got {type(state_dict).__name__}")
        for name in ("keys", "values", "position"):
            if name not in state_dict:
                raise ValueError(f"`state_dict` must hold {name!r}, got {sorted(map(str, state_dict))}")
        for name, x in state_dict.items():
            if isinstance(x, Tensor) and (x.is_nested or x.layout != torch.strided or x.is_meta):
                raise ValueError(
                    f"`state_dict` must hold dense tensors with data, got {x.layout} on {x.device} for {name!r}"
                )
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
            missing, unknown = sorted(names - set(state_dict)), sorted(map(str, set(state_dict) - names))
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
            waiting = int(position) % binding.options.chunk_size
            self._check_picks(state_dict["queue.sub_keys"][:waiting])
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

    def _check_picks(self, sub_keys: Tensor) -> None:
        """Picks [tokens, B, H, 2, K] are of their own half, and differ: what plans a key step relies on that."""
        heads, _, num_keys, _ = self.keys.shape
        picks = sub_keys.cpu().sort(-1).values
        half = torch.arange(2 * heads, dtype=picks.dtype).view(heads, 2, 1)
        if not ((picks // num_keys == half).all() and (picks.diff(dim=-1) > 0).all()):
            raise ValueError("`state_dict` must hold different sub-keys of each token's own half in 'queue.sub_keys'")

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
        defaults = {name: Options._field_defaults[name] for name in FREE_OPTIONS}
        bound = Options(**{**o._asdict(), **defaults})  # o._replace(…) is more than torch.compile of 2.11 can keep
        binding = Binding(queries.shape[0], queries.dtype, targets.dtype, bound)
        if self._binding is None or self._queue is None:
            self._binding, self._queue = binding, self._make_queue(binding, self.values.device)
        else:
            _check_binding(self._binding, binding)
        return self._queue


def _usable(x: Tensor) -> Tensor:
    """A tensor that may be written outside of inference mode."""
    return x.clone() if x.is_inference() else x


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
