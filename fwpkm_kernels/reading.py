"""What a state does besides steps: it reads without writing, and goes on from a call of `fast_weight_memory`."""

from typing import Any

import torch
from torch import Tensor

from . import _checks as checks
from ._autograd import refuse_transforms
from ._operators import operator
from .binding import Binding, check_step_inputs, make_queue
from .carry import check_carry, count_carried
from .gather import gather_rows
from .options import Options, schema_of
from .records import Carry, Inputs, MemoryOutput, Queue, Rows, Tokens, each
from .state import MemoryState
from .streaming import Memory, enqueue, look_up, read_piece


def read_options(bound: Options | None, **given: Any) -> Options:
    """The options of a read: those that are given, else those that are bound, else the defaults.

    Raises:
        ValueError: naming an option that is given and differs from what is bound.
    """
    o = Options() if bound is None else bound
    for name, x in given.items():
        if x is None:
            continue
        if bound is not None and x != getattr(bound, name):
            raise ValueError(f"`{name}` must stay as in the state's first step, {getattr(bound, name)!r}, got {x!r}")
        o = o._replace(**{name: x})
    return o


@operator(
    "fast_weight_memory_read",
    schema=f"(Tensor queries, Tensor keys, Tensor values, ScalarType dtype, {schema_of(Options)}) -> Tensor",
)
@checks.without_autocast
def _read_op(queries: Tensor, keys: Tensor, values: Tensor, dtype: torch.dtype, *options: Any) -> Tensor:
    o = Options(*options)
    weights, found = look_up(queries.flatten(0, 1), keys, o)
    predictions = gather_rows(values, found.slots.flatten(1), weights, weights.dtype, o.backend)
    return predictions.to(dtype, copy=True).view(*queries.shape[:2], values.shape[1])


@_read_op.register_fake
def _(queries, keys, values, dtype, *options):  # type: ignore[no-untyped-def]
    return queries.new_empty((*queries.shape[:2], values.shape[1]), dtype=dtype)


def read_state(state: MemoryState, queries: Tensor, **given: Any) -> Tensor:
    """`MemoryState.read`."""
    refuse_transforms("MemoryState.read", (queries,))
    binding, values = state._binding, state.values
    o = read_options(None if binding is None else binding.options, **given)
    checks.check_tensor("queries", queries, 4, "[B, t, H, Dk]")
    dtype = values.dtype if binding is None else binding.targets_dtype
    targets = values.new_empty(1, dtype=dtype).expand(*queries.shape[:2], values.shape[1])
    o = check_step_inputs(Inputs(queries, targets, state.keys, values, None, None), o)
    return _read_op(queries.detach(), state.keys.detach(), values.detach(), dtype, *o)


@operator(
    "fast_weight_memory_queue",
    schema="(Tensor keys, Tensor values, Tensor queries, Tensor targets, Tensor? gates, Tensor? mask, int carried, "
    f"{schema_of(Options)}) -> ({', '.join(['Tensor'] * len(Queue._fields))})",
)
@checks.without_autocast
def _queue_op(  # type: ignore[no-untyped-def]
    keys, values, queries, targets, gates, mask, carried, *options
) -> tuple[Tensor, ...]:
    """The queue of a chunk that has read some tokens, behind `carried` ones; it is an operator as the first step is."""
    o = Options(*options)
    queue = make_queue(keys, values, Binding.of(queries, targets, o), values.device)
    tokens = Tokens(*each(lambda x: x.transpose(0, 1), queries, targets, gates, mask))  # type: ignore[arg-type]
    before, present = tokens.part(0, carried), tokens.part(carried, queries.shape[1])
    enqueue(queue, before.queries, before.gates, before.mask, o.lookahead - carried, o)
    if queries.shape[1] > carried:
        touched = torch.empty(0, dtype=torch.uint8, device=values.device)
        memory = Memory(keys, values, touched, queue)
        read_piece(memory, present, torch.empty_like(present.targets), 0, o)
    return tuple(queue)


@_queue_op.register_fake
def _(keys, values, queries, targets, gates, mask, carried, *options):  # type: ignore[no-untyped-def]
    return tuple(make_queue(keys, values, Binding.of(queries, targets, Options(*options)), values.device))


def queue_of(output: MemoryOutput, carry: Carry, o: Options) -> tuple[Binding, Queue]:
    """Validate what a call of `fast_weight_memory` has left, and make what a state that goes on there has bound."""
    if not isinstance(carry, Carry):
        raise TypeError(f"`carry` must be a Carry, as return_carry=True gives it, got {type(carry).__name__}")
    if not isinstance(output, MemoryOutput):
        raise TypeError(f"`output` must be a MemoryOutput, got {type(output).__name__}")
    if isinstance(output.values, Rows):
        raise TypeError('`output.values` must be a table, as final="table" gives it, got Rows')
    queries, targets, gates, mask, position = carry
    inputs = Inputs(queries, targets, output.keys, output.values, gates, mask)
    refuse_transforms("MemoryState.from_output", inputs)
    o = check_step_inputs(inputs, o)
    check_carry(carry, inputs, o)
    queries, targets, keys, values, gates, mask = inputs.detach()
    queue = _queue_op(keys, values, queries, targets, gates, mask, count_carried(position, o), *o)
    return Binding.of(queries, targets, o), Queue(*queue)
