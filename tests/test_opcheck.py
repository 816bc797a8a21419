"""torch.library.opcheck of every operator that the package registers, with all of its tests."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fwpkm_kernels.documents  # noqa: F401  whose operators nothing else here would register
from fwpkm_kernels import MemoryState, testing
from fwpkm_kernels.options import Options
from fwpkm_kernels.plan import plan_segments
from fwpkm_kernels.records import Queue, Tokens
from tests.conftest import PLACES, SLOW_IN_INTERPRETER, Place
from tests.helpers.memory import make_inputs
from tests.helpers.streaming import make_state, stream
from tests.helpers.varlen import make_packed, make_rows

OPS = torch.ops.fwpkm_kernels

#: Arguments by what is special about them.
Samples = Iterator[tuple[str, tuple[Any, ...]]]


def lookup_samples(place: Place) -> Samples:
    queries, keys = testing.make_lookup_inputs(4, 2, 9, 8, device=place.device)
    options = ("idw", 1e-3, "ieee", place.backend)
    yield "plain", (queries, keys, 3, *options)
    yield "transposed", (*(testing.with_layout(x, "transposed") for x in (queries, keys)), 3, *options)
    yield "half precision by dot", (queries.bfloat16(), keys, 9, "dot", 1e-3, "tf32", place.backend)
    yield "float64", (queries.double(), keys.double(), 1, *options)
    yield "empty", (queries[:0], keys, 3, *options)


def lookup_grad_samples(place: Place) -> Samples:
    for name, (queries, keys, *options) in lookup_samples(place):
        scores, slots = OPS.product_key_lookup(queries, keys, *options)
        grad = torch.ones((), dtype=scores.dtype, device=place.device).expand(scores.shape)
        yield name, (grad, queries, keys, slots, True, *options)
        if name == "plain":
            yield "queries alone", (grad, queries, keys, slots, False, *options)


def gather_samples(place: Place) -> Samples:
    values, slots, weights = testing.make_gather_inputs(device=place.device)
    yield "plain", (values, slots, weights, place.backend)
    yield "sliced", (testing.with_layout(values, "sliced"), slots.t().contiguous().t(), weights, place.backend)
    yield "half precision, int32", (values.half(), slots.int(), weights, place.backend)
    yield "no tokens", (values, slots[:0], weights[:0], place.backend)
    yield "no picks", (values, slots[:, :0], weights[:, :0], place.backend)


def weights_grad_samples(place: Place) -> Samples:
    for name, (values, slots, weights, backend) in gather_samples(place):
        grad = torch.ones((), dtype=values.dtype, device=place.device).expand(len(slots), values.shape[1])
        yield name, (grad, values, slots, weights.dtype, backend)


def values_grad_samples(place: Place) -> Samples:
    for name, (values, slots, weights, backend) in gather_samples(place):
        grad = torch.ones(len(slots), values.shape[1], dtype=values.dtype, device=place.device)
        for compact in (False, True):
            plan = plan_segments(slots, len(values))
            arguments = (grad, weights, *plan, len(values), values.dtype, compact, backend)
            yield f"{name}, {'compact' if compact else 'dense'}", arguments


def write_samples(place: Place) -> Samples:
    values, slots, weights, targets, predictions, _, _ = testing.make_update_inputs(device=place.device)
    errors, plan = predictions - targets, plan_segments(slots, 64)
    yield "plain", (values, errors, weights, list(plan), 1.0, 0.0, None, place.backend)
    yield "decay and clip", (values, errors, weights, list(plan), 0.5, 0.1, 0.2, place.backend)
    yield (
        "transposed",
        (testing.with_layout(values, "transposed"), errors, weights, list(plan), 1.0, 0.1, None, place.backend),
    )
    yield "half precision", (values.bfloat16(), errors, weights, list(plan), 1.0, 0.0, 0.2, place.backend)
    nothing = (errors[:0], weights[:0], list(plan_segments(slots[:0], 64)))
    yield "empty", (values, *nothing, 1.0, 0.1, None, place.backend)


def count_samples(place: Place) -> Samples:
    slots, count_slots = (testing.make_slots(size, 64).to(place.device) for size in ((9, 3), (5, 4)))
    plan = plan_segments(slots, 64)
    yield "all", (list(plan), None, None, 64)
    yield "some", (list(plan), plan.order % 2 > 0, None, 64)
    yield "among others", (list(plan), None, count_slots.int().t(), 64)
    yield "among none", (list(plan), None, count_slots[:0], 64)
    yield "no accesses", (list(plan_segments(slots[:0], 64)), None, count_slots, 64)


def write_grad_samples(place: Place) -> Samples:
    grad, slots, weights, targets, predictions, _, _ = testing.make_update_inputs(device=place.device)
    errors, plan = predictions - targets, plan_segments(slots, 64)
    expanded = torch.ones((), device=place.device).expand(grad.shape)
    fields = (errors, weights, slots, *plan)
    yield "plain", (grad, *fields, 1.0, 0.0, None, place.backend)
    yield "clip", (grad, *fields, 1.0, 0.0, 0.2, place.backend)
    yield "expanded", (expanded, *fields, 0.5, 0.0, 0.2, place.backend)
    nothing = (errors[:0], weights[:0], slots[:0], *plan_segments(slots[:0], 64))
    yield "empty", (grad, *nothing, 1.0, 0.0, None, place.backend)


def key_step_samples(place: Place) -> Samples:
    queries, keys = testing.make_lookup_inputs(1, 2, 3, 8, device=place.device)
    yield "plain", (keys, queries, 2, "idw", 1e-3, 1.0, 1.0, 0.0, None, "ieee", place.backend)
    yield "clip", (keys, queries, 2, "dot", 1e-3, 0.5, 1.0, 0.1, 0.02, "ieee", place.backend)
    yield "decay alone", (keys, queries, 2, "idw", 1e-3, 0.5, 0.0, 0.1, None, "ieee", place.backend)
    strange = [testing.with_layout(x, "transposed") for x in (keys, queries)]
    yield "transposed", (*strange, 2, "idw", 1e-3, 1.0, 1.0, 0.0, None, "ieee", place.backend)
    yield "half precision", (keys.half(), queries, 3, "idw", 1e-3, 1.0, 1.0, 0.0, None, "tf32", place.backend)
    yield "empty", (keys, queries[:0], 2, "idw", 1e-3, 1.0, 1.0, 0.1, None, "ieee", place.backend)


def key_step_grad_samples(place: Place) -> Samples:
    for name, arguments in key_step_samples(place):
        keys, queries, *options = arguments
        new_keys, half_scores, sub_keys = OPS.product_key_update(*arguments)
        yield name, (torch.ones_like(new_keys), keys, queries, half_scores, sub_keys, *options)


def memory_arguments(
    place: Place, length: int, keep: bool, layout: str = "contiguous", carried: int = 0, as_rows: bool = False,
    **options: Any,
) -> tuple[Any, ...]:  # fmt: skip
    # No slot is read twice in a chunk: rows of the undo log where no segment starts are left unwritten.
    inputs = make_inputs(2, length, num_keys=30, mask="real", dtype=torch.float32, layout=layout, device=place.device)
    names = ("queries", "targets", "keys", "values", "gates", "mask")
    o = Options(chunk_size=3, top_k=2, backend=place.backend, **options)
    inputs["targets"] = inputs["targets"][:, carried:]
    return (*(inputs[name] for name in names), keep, carried, as_rows, *o)


def memory_samples(place: Place) -> Samples:
    """What forward keeps for backward depends on the options; where it keeps nothing, only the strides may differ."""
    for boundary in ("carry", "drop"):
        for options in ({}, {"addressing_weight": 0.0}, {"key_gradient": "all"}):
            name = f"{boundary}, {options}, keeping"
            yield name, memory_arguments(place, 7, True, boundary=boundary, clip=0.1, **options)
    arguments = memory_arguments(place, 4, True)
    yield "no gates, keeping", (*arguments[:4], None, None, *arguments[6:])
    for keep in (False, True):
        yield f"transposed, keeping {keep}", memory_arguments(place, 7, keep, "transposed", weight_decay=0.1)
        yield f"no tokens, keeping {keep}", memory_arguments(place, 0, keep)
        yield f"rows, keeping {keep}", memory_arguments(place, 4, keep, as_rows=True)
        yield f"rows with a carry, keeping {keep}", memory_arguments(place, 3, keep, carried=1, as_rows=True)
        yield f"rows of no tokens, keeping {keep}", memory_arguments(place, 0, keep, as_rows=True)
    for length in (9, 3):
        for options in ({}, {"addressing_weight": 0.0}, {"key_gradient": "all"}):
            name = f"carried before {length - 1}, {options}, keeping"
            yield name, memory_arguments(place, length, True, carried=1, **options)
    yield "coupled keys, not keeping", memory_arguments(place, 7, False, key_gradient="all")


def memory_grad_samples(place: Place) -> Samples:
    for name, arguments in memory_samples(place):
        queries, targets, keys, _, gates, mask, keep, carried, as_rows, *options = arguments
        if not keep or Options(*options).key_gradient == "all":
            continue
        output, new_keys, new_values, _, _, *kept = OPS.fast_weight_memory(*arguments)
        incoming = [testing.random_cotangent(x) for x in (output, new_keys, new_values)]
        tensors = (queries, targets, gates, mask, keys.shape[2])
        if as_rows:
            slot, *kept = kept
            kept.append(slot)
            yield f"{name}, not spread", (*incoming, *tensors, True, False, carried, "", kept, *options)
        yield name, (*incoming, *tensors, True, True, carried, "", kept, *options)
        if not name.startswith("carry, {}"):
            continue
        yield (
            f"{name}, of the output alone",
            (incoming[0], None, None, *tensors, True, True, carried, "", kept, *options),
        )
        yield f"{name}, without addresses", (*incoming, *tensors, False, True, carried, "", kept, *options)


def step_samples(place: Place) -> Samples:
    inputs = make_inputs(2, 13, mask="bool", dtype=torch.float32, device=place.device)
    small = {"chunk_size": 4, "top_k": 2, "backend": place.backend}
    for name, count, names, options in (
        ("read only", 1, ("gates", "mask"), {}),
        ("over several chunks", 7, (), {"weight_decay": 0.1}),
        ("to the end of a chunk", 2, ("gates",), {"key_gradient": "all"}),
        ("no tokens", 0, (), {}),
    ):
        state = make_state(inputs)
        stream(state, inputs, [6], **small, **options)
        tokens = {name: inputs[name][:, 6 : 6 + count] for name in ("queries", "targets", *names)}
        given = [tokens.get(name) for name in Tokens._fields]
        yield name, (*tensors_of(state), *given, *Options(**small, **options))


def first_step_samples(place: Place) -> Samples:
    for name, arguments in step_samples(place):
        yield name, (*arguments[:4], *arguments[4 + len(Queue._fields) :])


def tensors_of(state: MemoryState) -> tuple[Tensor, ...]:
    assert state._queue is not None
    return (state.keys, state.values, state._position, state._touched, *state._queue)


def copy_samples(place: Place) -> Samples:
    x = torch.randn(3, 4, device=place.device)
    yield "plain", (x, x.device)
    yield "transposed", (x.t(), x.device)
    yield "expanded", (x[:1].expand(3, 4), x.device)
    yield "empty", (x[:0], x.device)


def apply_samples(place: Place) -> Samples:
    table, rows = torch.randn(7, 4, device=place.device), torch.randn(3, 4, device=place.device)
    slot = torch.tensor([5, -1, 0], device=place.device)
    yield "plain", (table, torch.zeros_like(slot), slot, rows, place.backend)
    yield "transposed", (testing.with_layout(table, "transposed"), torch.zeros_like(slot), slot, rows, place.backend)
    yield "nothing", (table, slot[:0], slot[:0], rows[:0], place.backend)


def read_samples(place: Place) -> Samples:
    inputs = make_inputs(2, 5, dtype=torch.float32, device=place.device)
    tensors, o = [inputs[name] for name in ("queries", "keys", "values")], Options(top_k=2, backend=place.backend)
    yield "plain", (*tensors, torch.float32, *o)
    yield "half precision", (tensors[0].bfloat16(), *tensors[1:], torch.float16, *o)
    yield "no tokens", (tensors[0][:, :0], *tensors[1:], torch.float32, *o)


def queue_samples(place: Place) -> Samples:
    inputs = make_inputs(2, 4, mask="bool", dtype=torch.float32, device=place.device)
    tensors = [inputs[name] for name in ("keys", "values", "queries", "targets")]
    o = Options(chunk_size=4, top_k=2, backend=place.backend)
    yield "carried", (*tensors, inputs["gates"], inputs["mask"], 1, *o)
    yield "first chunk", (*tensors[:2], *(x[:, 1:] for x in tensors[2:]), None, None, 0, *o)
    yield "no tokens", (*tensors[:2], *(x[:, :0] for x in tensors[2:]), None, None, 0, *o)


def rollback_samples(place: Place) -> Samples:
    yield "some", (torch.tensor(7), 2, 4)
    yield "none", (torch.tensor(8), 0, 4)


def varlen_samples(place: Place) -> Samples:
    """Where forward keeps less than it could, what is behind is 0; so only rows of the log may be left unwritten."""
    inputs = make_packed((4, 0, 8, 1), num_keys=60, dtype=torch.float32, device=place.device)
    names = ("queries", "targets", "keys", "values", "cu_seqlens", "carried", "gates", "mask")
    tensors = [inputs.get(name) for name in names]
    rows = make_rows(inputs, ((0, 3), (2, -1), (3, 5)))
    rows = rows._replace(decay=torch.tensor([1.0, 0.5, 0.9, 1.0], device=place.device))
    o = Options(chunk_size=3, top_k=2, backend=place.backend)
    own = inputs["keys"].expand(4, *inputs["keys"].shape)
    for keep in (True, False):
        for boundary in ("carry", "drop"):
            yield f"{boundary}, keeping {keep}", (*tensors, *rows, keep, *o._replace(boundary=boundary))
        yield f"no gates and rows, keeping {keep}", (*tensors[:5], *(None,) * 7, keep, *o._replace(clip=0.1))
        half = (tensors[3].bfloat16(), *tensors[4:], *rows._replace(value=rows.value.bfloat16()))
        yield f"own keys and half values, keeping {keep}", (*tensors[:2], own, *half, keep, *o)
        # The second document goes on behind a chunk, and three tokens are surplus.
        cuts = (torch.tensor([0, 4, 9, 9, 10]), torch.tensor([0, 1, 0, 0]))
        yield f"carried, keeping {keep}", (*tensors[:4], *cuts, *tensors[6:], *rows, keep, *o)
        still = o._replace(addressing_weight=0.0, weight_decay=0.0)
        yield f"still keys, keeping {keep}", (*tensors, *rows, keep, *still)


def varlen_grad_samples(place: Place) -> Samples:
    for name, arguments in varlen_samples(place):
        queries, targets, keys, values, *others, _, _, value, decay, keep = arguments[:13]
        inputs = (queries, targets, keys, values.shape[0], *others)
        if keep:
            output, keys, document, slot, value, _, _, *kept = OPS.fast_weight_memory_varlen(*arguments)
            grads = [testing.random_cotangent(x) for x in (output, keys, value)]
            if name.startswith(("own keys", "drop")):
                grads = [testing.with_layout(x, "transposed") for x in grads]
            for needed in (True, False):
                flags, kept_options = (decay, needed, needed, not name.startswith("own"), ""), arguments[13:]
                yield f"{name}, {needed}", (*grads, *inputs, document, slot, *flags, *kept, *kept_options)


def continue_samples(place: Place) -> Samples:
    yield "of any lengths", (torch.tensor([0, 2, 2, 7]), torch.tensor([5, 0, 3]), 7, False, 3, 2)
    yield "chunks of a token", (torch.tensor([0, 2], dtype=torch.int32), torch.tensor([5]), 2, False, 1, 0)
    yield "no tokens", (torch.tensor([0, 0]), torch.tensor([4]), 0, False, 3, 1)
    yield "padding behind", (torch.tensor([0, 2, 5]), torch.tensor([1, 4]), 7, True, 3, 1)


SAMPLES: dict[str, Callable[[Place], Samples]] = {
    "product_key_lookup": lookup_samples,
    "product_key_lookup_halves": lookup_samples,
    "product_key_lookup_backward": lookup_grad_samples,
    "sparse_value_gather": gather_samples,
    "sparse_value_gather_backward_weights": weights_grad_samples,
    "sparse_value_gather_backward_values": values_grad_samples,
    "apply_rows_": apply_samples,
    "chunk_value_update": write_samples,
    "chunk_value_update_": write_samples,
    "chunk_value_update_backward": write_grad_samples,
    "chunk_value_update_counts": count_samples,
    "product_key_update": key_step_samples,
    "product_key_update_backward": key_step_grad_samples,
    "fast_weight_memory": memory_samples,
    "fast_weight_memory_backward": memory_grad_samples,
    "continue_documents": continue_samples,
    "fast_weight_memory_varlen": varlen_samples,
    "fast_weight_memory_varlen_backward": varlen_grad_samples,
    "fast_weight_memory_step": step_samples,
    "fast_weight_memory_first_step": first_step_samples,
    "fast_weight_memory_read": read_samples,
    "fast_weight_memory_queue": queue_samples,
    "private_copy": copy_samples,
    "rollback": rollback_samples,
}


def test_every_operator_has_samples():
    names = torch._C._dispatch_get_all_op_names()
    assert {name for name in names if name.startswith("fwpkm_kernels::")} == {f"fwpkm_kernels::{op}" for op in SAMPLES}


def names(op: str) -> list[str]:
    """Of the samples: they are small, and made in PyTorch on the CPU in no time."""
    return [name for name, _ in SAMPLES[op](PLACES[0])]


def cases() -> list[Any]:
    """One sample each; in the interpreter the first alone, of the whole memory in `make test-all`."""
    return [
        pytest.param(
            op,
            name,
            place,
            marks=SLOW_IN_INTERPRETER if place.backend == "triton" and "memory" in op else (),
            id=f"{op}-{name}-{place.backend}",
        )
        for op in SAMPLES
        for place in PLACES
        for name in names(op)[: 1 if place == ("triton", "cpu") else None]
    ]


@pytest.mark.parametrize("op, name, place", cases())
def test_opcheck(op, name, place):
    arguments = next(arguments for other, arguments in SAMPLES[op](place) if other == name)
    torch.library.opcheck(getattr(OPS, op).default, arguments)


@pytest.mark.parametrize("op", SAMPLES)
def test_samples_have_names_of_their_own(op):
    assert len(set(names(op))) == len(names(op))
