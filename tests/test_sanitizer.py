"""Every kernel under `tests.sanitizer`, and that it finds what it is for: in small kernels, and planted in our own."""

import importlib
import importlib.util
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, Phase, given, settings
from triton.runtime.interpreter import InterpretedFunction

import fwpkm_kernels
from fwpkm_kernels import testing
from fwpkm_kernels.kernels import gather, memory, segments, streaming
from tests import judge
from tests.conftest import HAS_GPU
from tests.sanitizer import KINDS, Fault, Sanitizer, full_name, sanitized
from tests.strategies import OPERATIONS, Case, cases

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
    "sizes": {"B": 1, "T": 5, "H": 2, "n": 3, "Dk": 6, "D": 5},
    "dtypes": floats("queries", "targets", "keys", "values", "gates", "mask"),
    "pattern": "random",
    "options": {
        "chunk_size": 2, "top_k": 2, "lookahead": 1, "score": "idw", "eps": 0.3, "weighting": "softmax",
        "temperature": 0.6, "lr": 0.3, "weight_decay": 0.05, "clip": 0.5, "addressing_weight": 1.0,
        "key_gradient": "addressing", "step": "normalized", "precision": "tf32x3",
    },
}  # fmt: skip
#: Chunks whose accesses are all to one slot, so that they are added in pieces.
WRITE: dict[str, Any] = {
    "sizes": {"rows": 9, "J": 11, "N": 5, "D": 5},
    "dtypes": floats("values", "weights", "targets", "predictions") | {"slots": "int64"},
    "pattern": "one_slot",
    "options": {"lr": 1.0, "weight_decay": 0.1, "clip": 0.5},
}
#: Together they launch every kernel but `restore_kernel`, which CPU tensors have no use for.
EVERY_KERNEL = [
    Case("fast_weight_memory", **MEMORY),
    Case("fast_weight_memory_step", **MEMORY, actions=(1, 2, "no gates", 2)),
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
        memory.restore_rows(values, torch.ones(7, 5), torch.arange(7) % 2 == 1)
    assert not seen.faults
    assert values.sum() == 15
    assert functions() - ran - seen.launched == set(), "launch it in EVERY_KERNEL"


def check_cases(op: str, examples: int) -> None:
    """Drawn options, dtypes, layouts and odd sizes, forward and backward."""

    @settings(max_examples=examples, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(cases(op, small=True))
    def check(case: Case) -> None:
        assert not run(case).faults

    check()


@pytest.mark.parametrize("op", OPERATIONS)
def test_drawn_cases(op):
    check_cases(op, 1)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPERATIONS)
def test_many_drawn_cases(op):
    check_cases(op, 10)


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
    """out[targets[r, i]] = values[sources[r, i]], round by round. A program owns two lanes. Grid: (LANES / 2,)."""
    for i_r in range(ROUNDS):
        lane = i_r * LANES + tl.program_id(0) * 2 + tl.arange(0, 2)
        source = tl.load(sources_ptr + lane)
        target = tl.load(targets_ptr + lane)
        x = tl.load(values_ptr + source * stride_v, mask=source != MASKED, other=0)
        tl.store(out_ptr + target, x, mask=target != MASKED)
        if BARRIER:
            tl.debug_barrier()


def move(
    sources: list[list[int]],
    targets: list[list[int]],
    values: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    stride: int = 1,
    barrier: bool = False,
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
    "store far away": (IN_TURN, [[0, 1, 2, 2**50]], {}, [("outside", "no argument", (), [1])]),
    "two programs store": ([[0, 1, 7, 3]], [[0, 1, 1, 3]], {}, [("race", "out_ptr", (1,), [0, 1])]),
    "one loads what another stored": ([[0, 1, 1, 3]], IN_TURN, {}, [("race", "values_ptr", (1,), [0, 1])]),
    "one stores what another loaded": ([[2, 1, 2, 3]], IN_TURN, {}, [("race", "out_ptr", (2,), [0, 1])]),
    "several load what one stores": (
        [[4, 5, 4, 5, 4, 5]], [[0, 1, 2, 3, 4, 5]], {}, [("race", "out_ptr", (4,), [0, 2])]
    ),
    "load of what was stored": (
        [[0, 1, 2, 3], [0, 3, 2, 1]], [[4, 1, 6, 3], [4, 5, 6, 7]], {},
        [("race", "values_ptr", (1,), [0, 1])],
    ),
    "load of what another lane stored": (
        [[0, 1, 2, 3], [5, 4, 7, 6]], [[4, 5, 6, 7], [0, 1, 2, 3]], {}, [("unordered", "values_ptr", (5,), [0])]
    ),
    "with a barrier": ([[0, 1, 2, 3], [5, 4, 7, 6]], [[4, 5, 6, 7], [0, 1, 2, 3]], {"barrier": True}, []),
    "stored again by another instruction": ([[0, 1, 2, 3]] * 2, [[4, 5, 6, 7]] * 2, {}, []),
    "two lanes store": (IN_TURN, [[0, 1, 2, 2]], {}, [("twice", "out_ptr", (2,), [1])]),
    "two lanes store, one is masked": (IN_TURN, [[0, 1, MASKED, MASKED]], {}, []),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVES)
def test_moves(name):
    sources, targets, options, expected = MOVES[name]
    faults = move(sources, targets, torch.arange(8.0), **options)
    assert {fault.kernel for fault in faults} <= {"move_kernel"}
    found = [(x.kind, x.argument, x.element, [program[0] for program in x.programs]) for x in faults]
    if name == "store far away":
        found = [(kind, argument, (), programs) for kind, argument, _, programs in found]
    assert found == expected
