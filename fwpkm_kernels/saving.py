"""How a state is saved and loaded: as a dict of tensors, pickled, and sent to another process."""

import copyreg
import pickle
import sys
from collections.abc import Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _checks as checks
from .binding import (
    Binding,
    check_binding,
    check_initial_memory,
    check_queue,
    check_step_inputs,
    from_bytes,
    make_queue,
    to_bytes,
    to_plain,
    waiting,
)
from .records import Inputs, Queue

if TYPE_CHECKING:
    from .state import MemoryState


def saved(state: "MemoryState") -> dict[str, Tensor]:
    """`MemoryState.state_dict`."""
    tensors = {"keys": state._keys, "values": state._values, "position": state._position}
    return saved_memory(tensors, state._binding, state._queue)


def saved_memory(tensors: dict[str, Tensor], binding: Binding | None, queue: Queue | None) -> dict[str, Tensor]:
    """Copies of a memory's tensors, its `position` among them, with what is bound and what waits in its queue."""
    if binding is not None and queue is not None:
        waits = waiting(queue, int(tensors["position"]), binding.options)
        tensors = tensors | {"binding": to_bytes(to_plain(binding))} | {f"queue.{name}": x for name, x in waits.items()}
    return {name: x.detach().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}


def load(state: "MemoryState", state_dict: Mapping[str, Tensor]) -> None:
    """`MemoryState.load_state_dict`."""
    buffers = {"keys": state._keys, "values": state._values, "position": state._position}
    binding = check_saved(state_dict, buffers, state._keys, state._values, state._binding)
    queue = state._queue
    if binding is None:
        queue = None
    elif queue is None:
        queue = make_queue(state._keys, state._values, binding, state._values.device)
    buffers |= {} if queue is None else {f"queue.{name}": x for name, x in queue._asdict().items()}
    with torch.no_grad():
        for name, x in buffers.items():
            x.copy_(state_dict[name])
    state._all_touched()
    state._binding, state._queue = binding, queue


def check_saved(
    state_dict: Mapping[str, Tensor], own: dict[str, Tensor], keys: Tensor, values: Tensor, bound: Binding | None
) -> Binding | None:
    """Validate what is to be loaded into a memory; what it binds, or None.

    Args:
        own: tensors of the shapes and dtypes that must come, `position` among them; without the queue.
        keys, values: of the memory.
        bound: what the memory has bound by now.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"`state_dict` must be a mapping of names to tensors, got {type(state_dict).__name__}")
    for name in own:
        if name not in state_dict:
            raise ValueError(f"`state_dict` must hold {name!r}, got {sorted(map(str, state_dict))}")
    for name, x in state_dict.items():
        if not isinstance(x, Tensor) or (x.is_meta and values.is_meta):
            continue
        if x.is_nested or x.layout != torch.strided or x.is_meta or hasattr(x, "to_local"):
            raise ValueError(
                f"`state_dict` must hold dense, plain tensors with data, got a {type(x).__name__} of {x.layout} on "
                f"{x.device} for {name!r}"
            )
    binding = _load_binding(keys, values, state_dict["binding"]) if "binding" in state_dict else None
    expected = dict(own)
    position = state_dict["position"]
    # An unbound memory has read no tokens, so its position must be 0.
    is_number = isinstance(position, Tensor) and position.numel() == 1 and position.dtype == torch.int64
    if is_number and not position.is_meta and (position < 0 or (binding is None and position != 0)):
        raise ValueError(
            f"`state_dict` must hold a 'position' that its 'binding' allows, got {int(position)}; a checkpoint that"
            " loads only what a state has needs one that is bound: step it with no tokens first"
        )
    if binding is not None:
        if bound is not None:
            check_binding(bound, binding)
        # Compare with meta tensors: sizes from a foreign dict may not fit in memory.
        queue = make_queue(keys, values, binding, torch.device("meta"))
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
    if binding is not None and not values.is_meta:
        tensors = {name: state_dict[f"queue.{name}"] for name in ("slots", "sub_keys")}
        check_queue(tensors, keys, len(values), int(position) % binding.options.chunk_size)
    return binding


def _load_binding(keys: Tensor, values: Tensor, x: Tensor) -> Binding:
    """What a state dict says was bound; ValueError if no step on this memory could have bound it."""
    try:
        binding = from_bytes(x)
        heads, _, _, half = keys.shape
        queries = keys.new_empty((binding.batch, 0, heads, 2 * half), dtype=binding.queries_dtype)
        targets = values.new_empty((binding.batch, 0, values.shape[1]), dtype=binding.targets_dtype)
        check_step_inputs(Inputs(queries, targets, keys, values, None, None), binding.options)
        make_queue(keys, values, binding, torch.device("meta"))
    except (AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"`state_dict` must hold bound options that fit under 'binding', got {error!r}") from None
    return binding


def pickled(state: "MemoryState") -> dict[str, Any]:
    """What is private to a state, as tensors and plain types, which an unpickler that trusts no other classes takes."""
    # The position is pickled as a number, since torch.load may put a tensor on another device.
    binding = None if state._binding is None else to_plain(state._binding)
    queue = None if state._queue is None else state._queue._asdict()
    memory = {"keys": state._keys, "values": state._values, "touched": state._touched, "queue": queue}
    return {"_memory": memory, "_position": state.position, "_binding": binding}


def unpickle(state: "MemoryState", fields: dict[str, Any]) -> None:
    """`MemoryState.__setstate__`. The file may be anybody's, so all of it is checked."""
    _refuse_old_files()
    tied, private = ("_initial_keys", "_initial_values", "_device"), ("_memory", "_position", "_binding")
    missing = {*tied, *private} - set(fields)
    unknown = [x for x in fields if not isinstance(x, str) or hasattr(type(state), x)]
    if missing or unknown:
        raise ValueError(f"a pickled MemoryState must hold {sorted([*tied, *private])}, got {missing=} and {unknown=}")
    state.__dict__.update({name: x for name, x in fields.items() if name not in private})
    memory, position, binding = (fields[name] for name in private)
    state._tie(state._initial_keys, state._initial_values)
    position = checks.check_int("position", position, minimum=0)
    try:
        keys, values, touched, queue = (memory[name] for name in ("keys", "values", "touched", "queue"))
        check_initial_memory(keys, values)
        tensors = {"keys": keys, "values": values}
        tensors["position"] = torch.tensor(position, dtype=torch.int64, device="cpu")
        if binding is not None:
            tensors["binding"] = to_bytes(binding)
            tensors |= {f"queue.{name}": x for name, x in queue.items()}
        if touched.dtype != torch.uint8 or touched.shape != values.shape[:1]:
            raise ValueError(f"touched must be [N] of uint8, got {checks.shape(touched)} of {touched.dtype}")
        if state._device is not None:
            state._device = values.device  # torch.load may have moved the state
        state._set_up(keys, values)
        load(state, tensors)
        with torch.no_grad():
            state._touched.copy_(touched)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"a pickled MemoryState must hold what it was pickled with, got {error!r}") from error


def _refuse_old_files() -> None:
    """Raise while torch.load reads torch.save's old format, which fills a state's tensors only after its checks."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_legacy_load":
            raise ValueError(
                "a MemoryState cannot be read from a file in torch.save's old format: save its state_dict(), or leave"
                " _use_new_zipfile_serialization as it is"
            )
        frame = frame.f_back


def reduce_for_processes(state: "MemoryState") -> tuple[Any, ...]:
    """How multiprocessing pickles a state: what is private as bytes, since tensors would be shared by the processes.

    The initial memory remains tensors, which the module that they belong to may be pickled with.
    """
    fields = state.__getstate__()
    fields["_memory"] = pickle.dumps(fields["_memory"])
    return copyreg.__newobj__, (type(state),), fields, None, None, _from_process  # type: ignore[attr-defined]


def _from_process(state: "MemoryState", fields: dict[str, Any]) -> None:
    """The inverse of `reduce_for_processes`. No file names this function, so no bytes of a file are unpickled here."""
    state.__setstate__(fields | {"_memory": pickle.loads(fields["_memory"])})


def trust_newest(cls: "type[MemoryState]") -> None:
    """Let torch.load(weights_only=True) make states, but none of the class before a reload of its module."""
    name = (cls.__module__, cls.__qualname__)
    trusted = torch.serialization.get_safe_globals()
    others = [x for x in trusted if (getattr(x, "__module__", None), getattr(x, "__qualname__", None)) != name]
    if len(others) != len(trusted):
        torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([*others, cls])
