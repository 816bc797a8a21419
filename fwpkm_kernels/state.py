"""The state of a streamed memory: its private copies, what it is tied to, copies of it, saving and loading."""

import copy
import pickle
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from . import _checks as checks
from ._operators import operator
from .binding import Binding, Queue, check_binding, check_queue, from_bytes, make_queue, to_bytes, to_plain, waiting
from .chunks import Options
from .memory import check_memory

#: What a copy of a state has anew; other attributes are the initial memory, and those of subclasses.
_COPIED = frozenset(("_keys", "_values", "_touched", "_position", "_binding", "_queue"))


@operator("private_copy")
def _private_copy(x: Tensor, device: torch.device) -> Tensor:
    """A contiguous copy on a device, which a step may write in and out of inference mode.

    An operator, since what compiled code makes itself in inference mode can be written there alone.
    """
    with torch.inference_mode(False):
        return x.detach().to(device, copy=True, memory_format=torch.contiguous_format)


@_private_copy.register_fake
def _(x, device):  # type: ignore[no-untyped-def]
    return torch.empty(x.shape, dtype=x.dtype, device=device)


class MemoryState:
    """A memory that reads and writes step by step: see `fast_weight_memory_step`.

    It keeps `keys` [H, 2, n, Dk/2] and `values` [N, D] as the initial memory and never writes them: many states may
    share them. It writes private copies, `state.keys` and `state.values`. The first step binds batch size, dtypes and
    all options but lr, weight_decay, clip and addressing_weight.

    The tie to the initial memory is to the very tensors that were given (of one that autograd has computed, to the same
    storage), so give the Parameters themselves. `reset` copies what they hold then, whoever wrote it. A state in a
    module stays tied to the module's Parameters through copy.deepcopy, pickle and torch.save of the whole module, in
    other processes, and through `.to()`, `.double()` and what else sets `Parameter.data`: the state itself takes over
    another dtype or device at its next reset. Untied is a state whose module gets other tensors: by
    load_state_dict(assign=True), by `.to()` for a buffer, by a parametrization. `rebind` ties it again.

    Copies are independent: `clone` and copy.copy share the initial memory; copy.deepcopy and pickle copy it too, once
    for all states that are copied together. A state that is sent to another process is a copy there, whatever the
    start method; its initial memory is shared if it is Parameters, or was in shared memory before.
    torch.load(weights_only=True) accepts a state.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._device: torch.device | None = None  # of the private copies; None is that of the initial memory
        self._tie(keys, values)
        self._set_up(keys, values)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        ForkingPickler.register(cls, _for_another_process)

    def _set_up(self, keys: Tensor, values: Tensor) -> None:
        """Make private copies of these, with nothing read and nothing bound."""
        device = self._device or values.device
        with torch.no_grad():
            self._keys, self._values = _private_copy(keys, device), _private_copy(values, device)
        # On the CPU, so that reading it never waits for a GPU; a tensor, so that torch.compile does not count with it.
        cpu = torch.device("cpu")
        self._position = _private_copy(torch.zeros((), dtype=torch.int64, device=cpu), cpu)
        self._touched = _private_copy(torch.zeros(self._values.shape[0], dtype=torch.uint8, device=device), device)
        self._binding: Binding | None = None
        self._queue: Queue | None = None
        self._made_in_export = torch.compiler.is_exporting()  # then it is part of the program

    @property
    def keys(self) -> Tensor:
        """The present sub-keys, [H, 2, n, Dk/2]. What is assigned, or written in place, lasts until the next reset."""
        return self._keys

    @keys.setter
    def keys(self, keys: Tensor) -> None:
        self._assign("keys", self._keys, keys)

    @property
    def values(self) -> Tensor:
        """The present table, [N, D]. What is assigned, or written in place, lasts until the next reset."""
        return self._values

    @values.setter
    def values(self, values: Tensor) -> None:
        self._assign("values", self._values, values)

    def _assign(self, name: str, own: Tensor, x: Tensor) -> None:
        """Copy what is assigned: steps write in place, and would write the tensor of somebody else."""
        checks.check_tensor(name, x)
        if x.shape != own.shape or x.dtype != own.dtype:
            wanted, came = (f"{checks.shape(t)} of {t.dtype}" for t in (own, x))
            raise ValueError(f"`{name}` must be {wanted} as in the state, got {came}")
        with torch.no_grad():
            own.copy_(x)
        self._all_touched()

    @property
    def position(self) -> int:
        """Tokens read so far, by each item of the batch."""
        return int(self._position)

    def rebind(self, keys: Tensor, values: Tensor) -> None:
        """Tie the state to another initial memory, to which `reset` returns from now on.

        The present memory, the position and what is bound stay as they are.

        Args:
            keys: [H, 2, n, Dk/2], of any strides, float32, float64, float16 or bfloat16.
            values: [N, D], N = n², likewise and on the same device.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        check_initial_memory(keys, values)
        for name, x, own in (("keys", keys, self._keys), ("values", values, self._values)):
            if x.shape != own.shape:
                raise ValueError(f"`{name}` must be {checks.shape(own)} as in the state, got {checks.shape(x)}")
        self._tie(keys, values)
        self._all_touched()

    def _tie(self, keys: Tensor, values: Tensor) -> None:
        """Keep the initial memory."""
        check_initial_memory(keys, values)
        # A leaf is kept itself, since only it shows what its `.data` is set to; of another its graph must not be kept.
        self._initial_keys, self._initial_values = _leaf(keys), _leaf(values)

    def _all_touched(self) -> None:
        """Note that any row may differ from the initial memory."""
        with torch.inference_mode(False):
            self._touched.fill_(1)

    @torch.inference_mode(False)
    @torch.no_grad()
    def reset(self, *, touched_rows_only: bool = False) -> None:
        """Return to the initial memory as it is now, and to position 0; what is bound stays bound.

        All rows are copied, so nothing is believed of who wrote the initial memory or `state.keys` and `state.values`.
        Where the initial memory has another shape, dtype or device than the state by now, the state is set up anew,
        and nothing is bound.

        Args:
            touched_rows_only: copy back only the rows of `values` that steps have written since the last reset, which
                is faster where these are few. It believes that nothing but steps has written `state.values`, and that
                nobody has written the initial values since: what else was changed stays as it is. Sub-keys are copied
                whole. All rows are copied after a write with weight_decay > 0, a load, an assignment or `rebind`.

        Raises:
            TypeError, ValueError: if the initial memory is none any more, or `touched_rows_only` is no bool.
        """
        checks.check_flag("touched_rows_only", touched_rows_only)
        check_initial_memory(self._initial_keys, self._initial_values)
        device = self._device or self._initial_values.device
        initial = ((self._keys, self._initial_keys), (self._values, self._initial_values))
        if any(own.shape != x.shape or own.dtype != x.dtype or own.device != device for own, x in initial):
            self._set_up(self._initial_keys, self._initial_values)
            return
        self._keys.copy_(self._initial_keys)
        if not touched_rows_only or self._initial_values.device != device:
            self._values.copy_(self._initial_values)
        elif self._values.is_cuda:
            from .kernels.memory import restore_rows

            restore_rows(self._values, self._initial_values, self._touched)
        else:
            rows = torch.nonzero(self._touched).flatten()
            self._values[rows] = self._initial_values[rows]
        for x in (self._touched, self._position, *(self._queue or ())):
            x.zero_()

    def clone(self) -> "MemoryState":
        """An independent copy that shares the initial memory."""
        return self._copy(self._values.device)

    __copy__ = clone

    def to(self, device: torch.device | str | int) -> "MemoryState":
        """An independent copy on `device`, where it stays: its resets copy the initial memory, which is shared, there.

        Raises:
            TypeError, ValueError: for what is no device.
        """
        try:
            device = torch.device(device)
        except (TypeError, RuntimeError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"`device` must be a device, got {device!r}: {str(error).splitlines()[0]}") from None
        other = self._copy(device)
        other._device = other._values.device  # which has an index
        return other

    @torch.no_grad()
    def _copy(self, device: torch.device) -> "MemoryState":
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        for name in ("_keys", "_values", "_touched"):
            setattr(other, name, _private_copy(getattr(self, name), device))
        other._position = _private_copy(self._position, self._position.device)
        if self._queue is not None:
            other._queue = Queue(*(_private_copy(x, device) for x in self._queue))
        return other

    def select(self, indices: Tensor | Sequence[int]) -> "MemoryState":
        """An independent copy in which only some items of the batch go on: a sub-batch, or the beams that are kept.

        They share keys and values, as all items do; what is selected is whose tokens wait for the chunk to be full. The
        copy is as if the others had ended here, and as if items that are selected twice had read the same tokens.

        Args:
            indices: [new B], integers in [0, B), in any order and with repetitions. The range is checked on CPUs only.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came; ValueError too for a state
                that is not bound, which has no items yet.
        """
        other = self.clone()
        other.select_(indices)
        return other

    @torch.inference_mode(False)
    @torch.no_grad()
    def select_(self, indices: Tensor | Sequence[int]) -> None:
        """`select` in this state itself: no table is copied, so that beams may be reordered at every token."""
        if self._binding is None or self._queue is None:
            raise ValueError("`indices` must select among the items of a batch, and this state has not read one yet")
        batch = self._binding.batch
        rows = _check_indices(indices, batch).to(self._values.device)
        selected = Queue(*(_private_copy(x.index_select(1, rows), x.device) for x in self._queue))
        if len(rows) == batch:  # the tensors stay, and so do graphs that were captured with them
            for x, new in zip(self._queue, selected, strict=True):
                x.copy_(new)
        else:
            self._queue, self._binding = selected, self._binding._replace(batch=len(rows))

    @torch.inference_mode(False)
    def __deepcopy__(self, memo: dict[int, Any]) -> "MemoryState":
        other = memo[id(self)] = self.clone()
        self._initial_keys, self._initial_values = _leaf(self._initial_keys), _leaf(self._initial_values)
        for name in set(self.__dict__) - _COPIED:
            setattr(other, name, copy.deepcopy(getattr(self, name), memo))
        return other

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: tensors and plain types, so that a careful unpickler needs to trust this class only."""
        fields = {name: x for name, x in self.__dict__.items() if name not in _COPIED}
        fields["_initial_keys"], fields["_initial_values"] = _leaf(self._initial_keys), _leaf(self._initial_values)
        # The position is no tensor here, for torch.load would put that on another device.
        binding = None if self._binding is None else to_plain(self._binding)
        queue = None if self._queue is None else self._queue._asdict()
        memory = {"keys": self._keys, "values": self._values, "touched": self._touched, "queue": queue}
        return fields | {"_memory": memory, "_position": self.position, "_binding": binding}

    @torch.inference_mode(False)  # what is unpickled in inference mode can be stepped outside of it
    def __setstate__(self, fields: dict[str, Any]) -> None:
        missing = {"_initial_keys", "_initial_values", "_device", "_memory", "_position", "_binding"} - set(fields)
        if missing:
            raise ValueError(f"a pickled MemoryState must hold {sorted(missing)}, got {sorted(map(str, fields))}")
        memory, position, binding = (fields[name] for name in ("_memory", "_position", "_binding"))
        self.__dict__.update({name: x for name, x in fields.items() if name != "_memory"})
        self._tie(self._initial_keys, self._initial_values)
        # The file may be anybody's: what it holds is checked as an initial memory and a state dict are.
        check_initial_memory(memory["keys"], memory["values"])
        if self._device is not None:
            self._device = memory["values"].device  # torch.load may have moved it
        self._set_up(memory["keys"], memory["values"])
        tensors = {"keys": memory["keys"], "values": memory["values"]}
        position = checks.check_int("position", position, minimum=0)
        tensors["position"] = torch.tensor(position, dtype=torch.int64, device="cpu")
        if binding is not None:
            tensors["binding"] = to_bytes(binding)
            tensors |= {f"queue.{name}": x for name, x in memory["queue"].items()}
        self.load_state_dict(tensors)
        self._touched.copy_(memory["touched"])

    def named_tensors(self) -> dict[str, Tensor]:
        """The tensors that a step writes, themselves: for a program that is to keep them as its buffers.

        A module exports with its state to AOTInductor once the state is bound, by a step of no tokens, and these are
        registered as buffers: torch.export.export(module, …, strict=True) finds them so, and may make tokens dynamic.
        """
        tensors = {"keys": self._keys, "values": self._values, "position": self._position, "touched": self._touched}
        return tensors | {f"queue_{name}": x for name, x in (self._queue._asdict() if self._queue else {}).items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Memory, position, queue and bound options as flat, contiguous, unshared tensors, as safetensors wants them.

        The initial memory is not included. What a state holds that is not bound is keys, values and position. So
        torch.distributed.checkpoint, which loads only the tensors that there are already, needs a state that is bound:
        a step of no tokens, with batch, dtypes and options of the one that was saved, binds a fresh one.
        """
        tensors = {"keys": self._keys, "values": self._values, "position": self._position}
        if self._binding is not None and self._queue is not None:
            tensors["binding"] = to_bytes(to_plain(self._binding))
            queue = waiting(self._queue, self.position, self._binding.options)
            tensors |= {f"queue.{name}": x for name, x in queue.items()}
        return {name: x.detach().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}

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
            if not isinstance(x, Tensor) or (x.is_meta and self._values.is_meta):
                continue
            if x.is_nested or x.layout != torch.strided or x.is_meta or hasattr(x, "to_local"):
                raise ValueError(
                    f"`state_dict` must hold dense, plain tensors with data, got a {type(x).__name__} of {x.layout} on "
                    f"{x.device} for {name!r}"
                )
        binding = self._load_binding(state_dict["binding"]) if "binding" in state_dict else None
        expected = {"keys": self._keys, "values": self._values, "position": self._position}
        position, queue = state_dict["position"], None
        # An unbound state has read no tokens, so its position must be 0.
        is_number = isinstance(position, Tensor) and position.numel() == 1 and not position.is_meta
        if is_number and (position < 0 or (binding is None and position != 0)):
            raise ValueError(
                f"`state_dict` must hold a 'position' that its 'binding' allows, got {int(position)}; a checkpoint that"
                " loads only what a state has needs one that is bound: step it with no tokens first"
            )
        if binding is not None:
            if self._binding is not None:
                check_binding(self._binding, binding)
            # Compare with meta tensors: sizes from a foreign dict may not fit in memory.
            queue = make_queue(self._keys, self._values, binding, torch.device("meta"))
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
            if not self._values.is_meta:
                tensors = {name: state_dict[f"queue.{name}"] for name in ("slots", "sub_keys")}
                check_queue(tensors, self._keys, len(self._values), int(position) % binding.options.chunk_size)
            queue = self._queue
            if queue is None:
                queue = make_queue(self._keys, self._values, binding, self._values.device)
        buffers = {"keys": self._keys, "values": self._values, "position": self._position}
        buffers |= {} if queue is None else {f"queue.{name}": x for name, x in queue._asdict().items()}
        with torch.no_grad():
            for name, x in buffers.items():
                x.copy_(state_dict[name])
        self._all_touched()
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
            binding = from_bytes(x)
            heads, _, _, half = self._keys.shape
            queries = self._keys.new_empty((binding.batch, 0, heads, 2 * half), dtype=binding.queries_dtype)
            targets = self._values.new_empty((binding.batch, 0, self._values.shape[1]), dtype=binding.targets_dtype)
            check_step(self, queries, targets, None, None, binding.options)
        except (AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"`state_dict` must hold bound options that fit under 'binding', got {error!r}") from None
        return binding

    def _bind(self, queries: Tensor, targets: Tensor, o: Options, queue: Queue | None = None) -> Queue:
        """Bind at the first step, with `queue` where that is made already; later refuse what differs."""
        binding = Binding.of(queries, targets, o)
        if self._binding is None or self._queue is None:
            self._queue = make_queue(self._keys, self._values, binding, self._values.device) if queue is None else queue
            self._binding = binding
        else:
            check_binding(self._binding, binding)
        return self._queue


def _leaf(x: Tensor) -> Tensor:
    """The tensor itself, or without the graph that autograd computed it by."""
    return x if x.is_leaf else x.detach()


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


def _check_indices(indices: Tensor | Sequence[int], batch: int) -> Tensor:
    """Validate the argument of `select`, and make it an int64 tensor [new B]."""
    if not isinstance(indices, Tensor):
        if not isinstance(indices, Iterable):
            raise TypeError(f"`indices` must be a tensor or a sequence of ints, got {type(indices).__name__}")
        indices = [checks.check_int("indices", x, minimum=0) for x in indices]
        indices = torch.tensor(indices, dtype=torch.int64, device="cpu")
    checks.check_tensor("indices", indices, 1, "[new B]")
    checks.check_slots("indices", indices)
    checks.check_slot_range("indices", indices, batch)
    return indices.long()


def _is_state(x: object) -> bool:
    """Whether `x` is a MemoryState, also one that was made before this module was reloaded."""
    name = (MemoryState.__module__, MemoryState.__qualname__)
    return isinstance(x, MemoryState) or any((c.__module__, c.__qualname__) == name for c in type(x).__mro__)


def check_step(
    state: MemoryState, queries: Tensor, targets: Tensor, gates: Tensor | None, mask: Tensor | None, o: Options
) -> Options:
    """Validate the arguments of a step; returns the options with their numbers as floats."""
    if not _is_state(state):
        kind = type(state)
        raise TypeError(f"`state` must be a MemoryState of {__package__}, got {kind.__module__}.{kind.__qualname__}")
    o = check_memory(queries, targets, state.keys, state.values, gates, mask, o)
    checks.check_choice("boundary", o.boundary, ("carry",))
    checks.use_triton(o.backend, state.values)  # raises where it cannot run, before anything is bound
    return o


def _for_another_process(state: MemoryState) -> tuple[Any, ...]:
    """How multiprocessing pickles a state: as bytes, since tensors that it pickles share memory from then on.

    An initial memory that is shared already, or as Parameters of a module is about to be, stays so: the copy of the
    state is then tied to the copy of the module.
    """
    fields = state.__getstate__()
    names = ("_initial_keys", "_initial_values")
    shared = {name: fields[name] for name in names if isinstance(fields[name], Parameter) or fields[name].is_shared()}
    own = {name: x for name, x in fields.items() if name not in shared}
    return _from_another_process, (type(state), shared, pickle.dumps(own))


def _from_another_process(cls: type[MemoryState], shared: dict[str, Tensor], own: bytes) -> MemoryState:
    """The inverse."""
    state = cls.__new__(cls)
    state.__setstate__(shared | pickle.loads(own))
    return state


ForkingPickler.register(MemoryState, _for_another_process)
torch.serialization.add_safe_globals([MemoryState])
