"""Every kernel under `tests.sanitizer`, and that it finds what it is for: in small kernels, and planted in our own."""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, Phase, given, settings
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor

import fwpkm_kernels
from fwpkm_kernels import testing
from fwpkm_kernels.compact import put_rows, take_rows
from fwpkm_kernels.kernels import gather, segments, streaming, update
from tests import judge
from tests.conftest import HAS_GPU, PLACES
from tests.helpers.pool import Pair
from tests.helpers.varlen import make_packed
from tests.sanitizer import KINDS, Fault, Sanitizer, full_name, sanitized
from tests.strategies import OPERATIONS, Case, cases, make_tensors

pytestmark = pytest.mark.skipif(HAS_GPU, reason="kernels are compiled here")

#: Rows that a chunk has written are flagged by each of its accesses.
MARKS = ("plan_chunk_kernel.touched_ptr",)


def run(case: Case) -> Sanitizer:
    """What was seen of a case, whose results are judged too."""
    with sanitized(MARKS) as seen:
        judge.check(case, "triton", "cpu")
    return seen


def floats(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "float32")


MEMORY: dict[str, Any] = {
    "sizes": {"B": 1, "T": 5, "H": 1, "n": 3, "Dk": 6, "D": 5},
    "dtypes": floats("queries", "targets", "keys", "values", "gates", "mask"),
    "pattern": "random",
    "options": {
        "chunk_size": 2, "top_k": 2, "lookahead": 1, "score": "idw", "eps": 0.3, "weighting": "softmax",
        "temperature": 0.6, "lr": 0.3, "weight_decay": 0.05, "clip": 0.5, "addressing_weight": 1.0,
        "key_gradient": "addressing", "step": "normalized", "precision": "tf32x3",
    },
}  # fmt: skip
#: A chunk whose accesses are all to one slot, so that they are added in pieces.
WRITE: dict[str, Any] = {
    "sizes": {"rows": 9, "J": 11, "N": 5, "D": 5},
    "dtypes": floats("values", "weights", "targets", "predictions") | {"slots": "int64"},
    "pattern": "one_slot",
    "options": {"lr": 1.0, "weight_decay": 0.1, "clip": 0.5},
}
#: Together they launch every kernel but three that are called below: `restore_kernel`, which CPU tensors have no use
#: for, `copy_rows_kernel`, and `read_sessions_kernel`.
EVERY_KERNEL = [
    Case("fast_weight_memory", **MEMORY),
    Case("fast_weight_memory_step", **MEMORY, actions=(2, 1, "no gates", 2)),
    Case("chunk_value_update_", **WRITE),
]


def functions() -> set[str]:
    """All that the package decorates with `triton.jit`, as "module.name"."""
    modules = pkgutil.walk_packages(fwpkm_kernels.__path__, "fwpkm_kernels.")
    members = [x for module in modules for x in vars(importlib.import_module(module.name)).values()]
    return {full_name(x.fn) for x in members if isinstance(x, InterpretedFunction)}


def test_every_kernel():
    """Each is launched, or called by one that is, and none has a fault."""
    ran: set[str] = set()
    for case in EVERY_KERNEL:
        seen = run(case)
        assert not seen.faults, case.op
        ran |= seen.launched | seen.called
    values = torch.zeros(7, 5)
    with sanitized() as seen:
        update.restore_rows(values, torch.ones(7, 5), torch.arange(7) % 2 == 1)
        rows = take_rows(values, torch.tensor([6, -1, 1]), "triton")
        put_rows(values, torch.tensor([4, -1, 2]), rows, "triton")
    with sanitized(MARKS) as seen_of_pool:
        serve()
    assert not seen_of_pool.faults
    ran |= seen_of_pool.launched | seen_of_pool.called
    assert not seen.faults
    assert values.sum() == 20
    assert functions() - ran - seen.launched == set(), "launch it in EVERY_KERNEL"


def test_packed_documents():
    """Whose heads lie side by side in a key step; one of them has a tail, and keys of its own."""
    inputs = make_packed((3, 2), heads=1, num_keys=3, key_width=2, dtype=torch.float32)
    inputs["queries"].requires_grad_()
    with sanitized(MARKS) as seen:
        result = fwpkm_kernels.fast_weight_memory_varlen(**inputs, chunk_size=2, top_k=1, backend="triton")
        (result.output.sum() + result.keys.square().sum()).backward()
    assert not seen.faults
    assert {"usage_kernel", "step_grad_kernel"} <= {name.split(".")[-1] for name in seen.launched}


def serve() -> None:
    """Two sessions of a pool that read together, in and beyond a chunk, go apart, and are read."""
    pair = Pair(PLACES[1], heads=2)
    first, second = pair.open(), pair.open()
    for lengths in ([5, 2], [1, 2]):
        pair.step([first, second], 5, lengths)
    pair.step([pair.fork(first), first], 3)
    pair.pool.read([second, first], pair.tokens(2, 1)["queries"], top_k=2, backend="triton")


def check_cases(op: str, share: float) -> None:
    """Drawn options, dtypes, layouts and odd sizes, forward and backward: a share of the cases the profile has."""
    examples = max(2, round(share * settings.default.max_examples))  # of which the first is the simplest there is

    @settings(max_examples=examples, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(cases(op, small=True))
    def check(case: Case) -> None:
        assert not run(case).faults

    check()


@pytest.mark.parametrize("op", OPERATIONS)
def test_drawn_cases(op):
    check_cases(op, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPERATIONS)
def test_many_drawn_cases(op):
    check_cases(op, 0.2)


#: Several tiles of sub-keys, picks and columns, the last ones not full.
LOOKUP: dict[str, Any] = {"sizes": {"rows": 3, "H": 2, "n": 150, "Dk": 42}, "dtypes": floats("queries", "keys")}
WIDE: dict[str, Any] = {"sizes": {"rows": 7, "J": 19, "N": 23, "D": 1100}, "pattern": "zipf"}
LARGER = [
    Case(
        "product_key_lookup", **LOOKUP, pattern="near",
        options={"top_k": 33, "score": "idw", "eps": 1e-3, "precision": "tf32x3"},
    ),
    Case(
        "product_key_update", **LOOKUP, pattern="random",
        options={
            "top_k": 9, "score": "idw", "eps": 1e-3, "precision": "tf32x3", "lr": 1.0, "weight": 1.0,
            "weight_decay": 0.05, "clip": 0.02,
        },
    ),
    Case(
        "sparse_value_gather", **WIDE, dtypes=floats("values", "weights") | {"slots": "int32"},
        layouts={"values": "sliced", "cotangent": "expanded"}, options={"sparse_grad": False},
    ),
    Case("chunk_value_update", **WRITE | WIDE),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGER, ids=lambda case: case.op)
def test_larger_cases(case):
    assert not run(case).faults


#: The index of a lane that is masked.
MASKED = 99


@triton.jit
def move_kernel(
    values_ptr,
    out_ptr,
    sources_ptr,
    targets_ptr,
    stride_v,
    LANES: tl.constexpr,
    ROUNDS: tl.constexpr,
    BARRIER: tl.constexpr,
    MASKED: tl.constexpr,
):
    """out[targets[r, i]] = values[sources[r, i]], round by round, a barrier behind one. A program owns two lanes.

    Grid: (LANES / 2,).
    """
    for i_r in range(ROUNDS):
        lane = i_r * LANES + tl.program_id(0) * 2 + tl.arange(0, 2)
        source = tl.load(sources_ptr + lane)
        target = tl.load(targets_ptr + lane)
        x = tl.load(values_ptr + source * stride_v, mask=source != MASKED, other=0)
        tl.store(out_ptr + target, x, mask=target != MASKED)
        if i_r == BARRIER:
            tl.debug_barrier()


def move(
    sources: list[list[int]],
    targets: list[list[int]],
    values: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    stride: int = 1,
    barrier: int = -1,
    marks: tuple[str, ...] = (),
) -> list[Fault]:
    """The faults of `move_kernel`; without `out` it works in place."""
    indices = [torch.tensor(x) for x in (sources, targets)]
    (rounds, lanes), out = indices[0].shape, values if out is None else out
    with sanitized(marks) as seen:
        move_kernel[(lanes // 2,)](
            values, out, *indices, stride, LANES=lanes, ROUNDS=rounds, BARRIER=barrier, MASKED=MASKED
        )
    return seen.faults


IN_TURN = [[0, 1, 2, 3]]
#: Sources, targets and options of a move in place, and its faults: kind, argument, element, programs.
MOVES: dict[str, tuple[list[list[int]], list[list[int]], dict[str, Any], list[tuple]]] = {
    "each its own": (IN_TURN, IN_TURN, {}, []),
    "own ones in another order": ([[1, 0, 3, 2]], IN_TURN, {}, []),
    "all load one": ([[5, 5, 5, 5]], IN_TURN, {}, []),
    "masked where there is nothing": ([[0, 1, 2, MASKED]], [[0, 1, MASKED, 3]], {}, []),
    "load behind the end": ([[0, 1, 2, 8]], IN_TURN, {}, [("outside", "values_ptr", (8,), [1])]),
    "store before the beginning": (IN_TURN, [[0, -2, 2, 3]], {}, [("outside", "out_ptr", (-2,), [0])]),
    "two programs store": ([[4, 5, 6, 7]], [[0, 1, 1, 3]], {}, [("race", "out_ptr", (1,), [0, 1])]),
    "one loads what another stored": ([[0, 1, 1, 3]], IN_TURN, {}, [("race", "values_ptr", (1,), [0, 1])]),
    "one stores what another loaded": ([[2, 1, 2, 3]], IN_TURN, {}, [("race", "out_ptr", (2,), [0, 1])]),
    "several load what one stores": (
        [[4, 5, 4, 5, 4, 5]], [[0, 1, 2, 3, 4, 5]], {}, [("race", "out_ptr", (4,), [0, 2])]
    ),
    "load of what another lane stored": (
        [[0, 1, 2, 3], [5, 4, 7, 6]], [[4, 5, 6, 7], [0, 1, 2, 3]], {}, [("unordered", "values_ptr", (5,), [0])]
    ),
    "with a barrier": ([[0, 1, 2, 3], [5, 4, 7, 6]], [[4, 5, 6, 7], [0, 1, 2, 3]], {"barrier": 0}, []),
    "with a barrier too early": (
        [[0, 1, 2, 3], [0, 1, 2, 3], [5, 4, 7, 6]], [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]], {"barrier": 0},
        [("unordered", "values_ptr", (5,), [0])],
    ),
    "stored again by another instruction": ([[0, 1, 2, 3]] * 2, [[4, 5, 6, 7]] * 2, {}, []),
    "two lanes store": (IN_TURN, [[0, 1, 2, 2]], {}, [("twice", "out_ptr", (2,), [1])]),
    "two masked lanes": (IN_TURN, [[0, 1, MASKED, MASKED]], {}, []),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVES)
def test_moves(name):
    sources, targets, options, expected = MOVES[name]
    faults = move(sources, targets, torch.arange(8.0), **options)
    assert {fault.kernel for fault in faults} <= {"move_kernel"}
    found = [(x.kind, x.argument, x.element, [program[0] for program in x.programs]) for x in faults]
    assert found == expected


def test_a_fault_says_what_it_is():
    assert [str(fault) for fault in move([[0, 1, 1, 3]], IN_TURN, torch.arange(8.0))] == [
        "move_kernel: (0, 0, 0) and (1, 0, 0) both access, and one stores, the same element of `values_ptr`: [1]"
    ]
    assert {kind for *_, faults in MOVES.values() for kind, *_ in faults} == set(KINDS)


def test_an_offset_as_large_as_addresses():
    """Whose pointer would be another argument's; it is not followed."""
    (fault,) = move(IN_TURN, [[0, 1, 2, 2**50]], torch.arange(8.0))
    assert fault[:3] == ("outside", "move_kernel", "no argument")


def test_elements_are_those_of_the_tensor():
    """Not all of its storage, and not what lies between them."""
    storage = torch.arange(24.0)
    out = torch.zeros(2, 4)
    strided, tail, matrix = storage[1:12:3], storage[20:], storage.view(4, 6)[1:3, 1:3]
    assert not move(IN_TURN, IN_TURN, strided, out=out, stride=3)
    assert out[0].tolist() == [1, 4, 7, 10]
    assert not move(IN_TURN, IN_TURN, tail, out=out)
    assert not move([[0, 1, 6, 7]], IN_TURN, matrix, out=out)
    assert not move(IN_TURN, IN_TURN, storage[:1].expand(4), out=out, stride=0)
    for values, outside in ((strided, 1), (matrix, 2), (tail, 4), (tail, -1), (storage[:0], 0)):
        (fault,) = move([[MASKED, outside, MASKED, MASKED]], IN_TURN, values, out=out)
        assert (fault.kind, fault.argument, fault.element) == ("outside", "values_ptr", (outside,))
    # What another argument has there is no excuse, and one memory is one by whatever name.
    (fault,) = move([[0, 1, 2, 4]], IN_TURN, storage[:4], out=storage[4:8])
    assert (fault.kind, fault.argument) == ("outside", "values_ptr")
    (fault,) = move([[MASKED, MASKED, 0, MASKED]], IN_TURN, storage[1:5], out=storage[:4])
    assert fault == ("race", "move_kernel", "values_ptr", (0,), ((0, 0, 0), (1, 0, 0)))
    assert not move([[MASKED, MASKED, 1, MASKED]], IN_TURN, storage[1:5], out=storage[:4])


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_neighbours_in_a_word(dtype):
    """They are elements of their own."""
    values = torch.arange(8).to(dtype)
    assert not move(IN_TURN, IN_TURN, values)
    assert [x[:4] for x in move([[0, 1, 2, 8]], [[0, 1, 1, 3]], values)] == [
        ("outside", "move_kernel", "values_ptr", (8,)),
        ("race", "move_kernel", "out_ptr", (1,)),
    ]


def test_views_of_one_memory_in_two_dtypes():
    values = torch.zeros(8)
    (fault,) = move([[0, 0, 0, 0]], [[4, 5, 6, 4]], values, out=values.view(torch.uint8))
    assert fault[:4] == ("race", "move_kernel", "out_ptr", (4,))
    (fault,) = move([[0, 0, 1, 1]], [[0, 1, 2, 3]], values, out=values.view(torch.uint8))
    assert fault[:4] == ("race", "move_kernel", "out_ptr", (2,))


def test_marks():
    """One same value from all, and only in an argument that is named."""
    targets, ones, marks = [[0, 0, 0, 1]], torch.ones(8), ("move_kernel.out_ptr",)
    expected = {"race", "twice"}
    assert {x.kind for x in move(IN_TURN, targets, ones, out=torch.zeros(8))} == expected
    assert {x.kind for x in move(IN_TURN, targets, torch.arange(8.0), out=torch.zeros(8), marks=marks)} == expected
    assert not move(IN_TURN, targets, ones, out=torch.zeros(8), marks=marks)
    assert move(IN_TURN, targets, ones, out=torch.zeros(8), marks=("other_kernel.out_ptr",))
    # Who loads a mark may come before or after.
    (fault,) = move([[4, 5, 7, 0]], targets, ones, marks=marks)
    assert fault[:4] == ("race", "move_kernel", "values_ptr", (0,))


@triton.jit
def add_kernel(out_ptr, targets_ptr, LANES: tl.constexpr, SWAP: tl.constexpr):
    """out[targets[i]] += 1, or 1 instead of 0. Grid: any."""
    target = tl.load(targets_ptr + tl.arange(0, LANES))
    if SWAP:
        tl.atomic_cas(out_ptr + target, tl.zeros([LANES], tl.int32), tl.full([LANES], 1, tl.int32))
    else:
        tl.atomic_add(out_ptr + target, tl.full([LANES], 1, tl.int32))


@pytest.mark.parametrize("swap", [False, True])
def test_atomic_operations(swap):
    """They may meet, inside of the tensor."""
    for target, faults in ((3, []), (4, [("outside", "add_kernel", "out_ptr", (4,), ((0, 0, 0),))])):
        out = torch.zeros(5, dtype=torch.int32)
        with sanitized() as seen:
            add_kernel[(3,)](out[:4], torch.tensor([0, 0, target, target]), LANES=4, SWAP=swap)
        assert seen.faults == faults
        assert out.tolist() == [1 if swap else 6, 0, 0, (1 if swap else 6) * (target == 3), 0]


@triton.jit
def add_rows_kernel(tensors, rows, LANES: tl.constexpr):
    """tensors[0] + one of `rows`, a descriptor, to tensors[1]. Grid: (1,)."""
    lane = tl.arange(0, LANES)
    x = tl.load(tensors[0] + lane) + tl.reshape(rows.load([1, 0]), [LANES])
    tl.store(tensors[1] + lane, x)
    tl.store(tensors[1] + lane // 2, x)


def test_tensors_inside_of_arguments():
    descriptor = TensorDescriptor.from_tensor(torch.arange(32.0).view(2, 16), [1, 16])
    values, out = torch.ones(15), torch.zeros(16)
    with sanitized() as seen:
        add_rows_kernel[(1,)]((values, out), descriptor, LANES=16)
    assert [(x.kind, x.argument, x.element) for x in seen.faults] == [
        ("outside", "tensors[0]", (15,)),
        ("twice", "tensors[1]", (0,)),
    ]
    assert out[8:].tolist() == [25, 26, 27, 28, 29, 30, 31, 31]


def test_the_interpreter_is_left_as_it_was():
    with pytest.raises(ZeroDivisionError), sanitized() as seen:
        raise ZeroDivisionError
    move_kernel[(2,)](*[torch.zeros(8)] * 2, *[torch.tensor(IN_TURN)] * 2, 1, 4, 1, -1, MASKED)
    assert not seen.launched


def read_from_a_view() -> None:
    values, slots, weights = testing.make_gather_inputs(2, 3, 12, 5)
    fwpkm_kernels.sparse_value_gather(testing.with_layout(values, "sliced"), slots, weights, backend="triton")


def remember() -> None:
    case = EVERY_KERNEL[0]
    fwpkm_kernels.fast_weight_memory(
        **{name: x.requires_grad_(name == "values") for name, x in make_tensors(case).items()},
        **case.options,
        backend="triton",
    )


def step() -> None:
    case = EVERY_KERNEL[1]
    tensors = make_tensors(case)
    state = fwpkm_kernels.MemoryState(tensors.pop("keys"), tensors.pop("values"))
    for begin, end in ((0, 1), (1, 5)):
        part = {name: x[:, :1].expand_as(x)[:, begin:end] for name, x in tensors.items()}  # all to the same slots
        fwpkm_kernels.fast_weight_memory_step(state, **part, **case.options, backend="triton")


def write_one_slot() -> None:
    case = EVERY_KERNEL[2]
    fwpkm_kernels.chunk_value_update_(**make_tensors(case), **case.options, backend="triton")


#: Of each kind a slip in one of our kernels: the code before and after, the argument, and what launches the kernel.
SLIPS: dict[str, tuple[ModuleType, str, str, str, str, Callable[[], None]]] = {
    "outside": (
        gather, "gather_kernel", "mask=mask_j[:, None] & mask_d[None, :]", "mask=mask_j[:, None]", "values_ptr",
        read_from_a_view,
    ),
    "race": (
        segments, "segment_kernel", "partials_ptr + (i_a // PIECE)", "partials_ptr + (start // PIECE)", "partials_ptr",
        write_one_slot,
    ),
    "unordered": (
        segments, "segment_kernel", "old.to(log_ptr.dtype.element_ty)",
        "tl.load(table_ptr + row * stride_tn + offs_d * stride_td, mask=mask_d)", "table_ptr", remember,
    ),
    "twice": (streaming, "plan_chunk_kernel", "order_ptr + place", "order_ptr + start", "order_ptr", step),
}  # fmt: skip


@pytest.mark.parametrize("kind", SLIPS)
def test_slips_in_our_kernels(kind, monkeypatch, tmp_path):
    module, kernel, before, after, argument, launch = SLIPS[kind]
    with sanitized(MARKS) as seen:
        launch()
    assert not seen.faults
    assert full_name(getattr(module, kernel).fn) in seen.launched
    source = Path(str(module.__file__)).read_text("utf-8")
    assert before in source
    path = tmp_path / "with_a_slip.py"
    path.write_text(source.replace(before, after), "utf-8")
    spec = importlib.util.spec_from_file_location(f"{module.__package__}.with_a_slip", path)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    monkeypatch.setattr(module, kernel, getattr(copy, kernel))
    with sanitized(MARKS) as seen:
        launch()
    assert (kind, kernel, argument) in [fault[:3] for fault in seen.faults]


def test_marks_of_our_kernels():
    """They would be faults: what is excepted is there."""
    with sanitized() as seen:
        step()
    assert {f"{fault.kernel}.{fault.argument}" for fault in seen.faults} == set(MARKS)
