"""What the first step of a state binds for all later ones, and the queue, whose sizes follow from it."""

import json
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks as checks
from .kernels import compute_dtype
from .memory import check_memory
from .options import Options
from .records import Inputs, Queue

#: Options that may change from step to step.
FREE_OPTIONS = ("lr", "weight_decay", "clip", "addressing_weight")
#: Bytes of every saved binding: a distributed checkpoint loads only into tensors of the shape that was saved.
SAVED_BYTES = 1024


class Binding(NamedTuple):
    """What the first step of a state settles for all later ones."""

    batch: int
    queries_dtype: torch.dtype
    targets_dtype: torch.dtype
    options: Options  #: the free ones at their defaults

    @classmethod
    def of(cls, queries: Tensor, targets: Tensor, o: Options) -> "Binding":
        """What a step with these arguments binds."""
        defaults = {name: Options._field_defaults[name] for name in FREE_OPTIONS}
        bound = Options(**{**o._asdict(), **defaults})  # torch.compile of PyTorch 2.11 fails at o._replace(…)
        return cls(queries.shape[0], queries.dtype, targets.dtype, bound)


@torch.inference_mode(False)  # otherwise no step outside of inference mode could write the queue
def make_queue(keys: Tensor, values: Tensor, binding: Binding, device: torch.device) -> Queue:
    """An empty queue for what is bound, of a memory of these shapes and dtypes."""
    batch, o = binding.batch, binding.options
    heads, _, _, half = keys.shape
    chunk, window, width = o.chunk_size, o.lookahead + o.chunk_size, values.shape[1]
    dtype = compute_dtype(values.dtype)

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


def waiting(queue: Queue, position: int, o: Options) -> dict[str, Tensor]:
    """A copy of the queue with zeros for tokens that no longer wait, so that equal states save equal tensors."""
    copies = {name: x.clone() for name, x in queue._asdict().items()}
    for name, x in copies.items():
        first = o.lookahead if name in ("queries", "gates", "mask") else 0
        x[first + position % o.chunk_size :] = 0
        if position < o.chunk_size:
            x[:first] = 0
    return copies


def check_binding(bound: Binding, came: Binding) -> None:
    """Raise ValueError, which names the first thing that differs from what was bound."""
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


def check_queue(tensors: dict[str, Tensor], keys: Tensor, num_slots: int, waiting: int) -> None:
    """Raise ValueError unless a saved queue of the right shapes names slots and sub-keys that exist.

    The sub-keys [waiting, B, H, 2, K] of the tokens that wait must be of their own half, and different, as a lookup
    picks them: the plan of a key step relies on that.
    """
    heads, _, num_keys, _ = keys.shape
    for name, size in (("slots", num_slots), ("sub_keys", 2 * heads * num_keys)):
        checks.check_slot_range(f"state_dict['queue.{name}']", tensors[name].cpu(), size)
    picks = tensors["sub_keys"][:waiting].cpu().sort(-1).values
    half = torch.arange(2 * heads, dtype=picks.dtype, device="cpu").view(heads, 2, 1)
    if not ((picks // num_keys == half).all() and (picks.diff(dim=-1) > 0).all()):
        raise ValueError("`state_dict` must hold different sub-keys of each token's own half in 'queue.sub_keys'")


def to_plain(binding: Binding) -> dict[str, Any]:
    """What is bound, in the types of JSON."""
    dtypes = [str(x).removeprefix("torch.") for x in (binding.queries_dtype, binding.targets_dtype)]
    return {"batch": binding.batch, "dtypes": dtypes, "options": binding.options._asdict()}


def to_bytes(plain: dict[str, Any]) -> Tensor:
    """The same as JSON in a uint8 tensor, padded with blanks."""
    text = json.dumps(plain).ljust(SAVED_BYTES)
    return torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu")


def from_bytes(x: Tensor) -> Binding:
    """The binding that `to_bytes` has written; other bytes raise errors of several classes."""
    fields = json.loads(bytes(x.tolist()))
    queries_dtype, targets_dtype = (getattr(torch, name) for name in fields["dtypes"])
    return Binding(fields["batch"], queries_dtype, targets_dtype, Options(**fields["options"]))


def check_initial_memory(keys: Tensor, values: Tensor) -> None:
    """Validate what may be a state's memory."""
    checks.check_tensor("keys", keys, 4, "[H, 2, n, Dk/2]")
    checks.check_tensor("values", values, 2, "[N, D]")
    checks.check_float("keys", keys)
    checks.check_float("values", values)
    checks.check_together(values=values, keys=keys)
    if keys.shape[1] != 2:
        raise ValueError(f"`keys` must hold two halves, [H, 2, n, Dk/2], got shape {checks.shape(keys)}")
    checks.check_table(values, keys)


def check_step_inputs(inputs: Inputs, o: Options) -> Options:
    """Validate what a step of a memory is given; returns the options with their numbers as floats."""
    o = check_memory(inputs, o)
    checks.check_choice("boundary", o.boundary, ("carry",))
    checks.use_triton(o.backend, inputs.values)  # raises where it cannot run, before anything is bound
    return o
