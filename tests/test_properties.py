"""Every operation on drawn inputs against the reference: the cases of the fuzzer, a few of them at each run.

`--hypothesis-profile=nightly`, or HYPOTHESIS_PROFILE=nightly in the environment, draws more, and other ones each time.
"""

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests import judge
from tests.conftest import PLACES, Place
from tests.strategies import OPERATIONS, Case, cases

EACH = pytest.mark.parametrize("op", OPERATIONS)
MEMORIES = ("fast_weight_memory", "fast_weight_memory_step")
SLOW_OPERATIONS = (*MEMORIES, "fast_weight_memory_varlen", "fast_weight_layer")


def check_cases(op: str, place: Place, share: float = 1.0) -> None:
    """As many cases as the profile says, or a share of them."""
    small = place == Place("triton", "cpu")
    examples = max(1, round(share * settings.default.max_examples))
    # To shrink takes minutes in the interpreter, and on a GPU, where each size is compiled; the fuzzer does it.
    phases = [phase for phase in settings.default.phases if phase is not Phase.shrink or place.backend == "torch"]

    @settings(max_examples=examples, phases=phases, suppress_health_check=list(HealthCheck))
    @given(cases(op, small=small))
    def check(case: Case) -> None:
        judge.check(case, place.backend, place.device)

    check()


@EACH
def test_in_torch(op):
    check_cases(op, PLACES[0])


@EACH
def test_in_triton(op, triton_place):
    # A second or more in the interpreter for a case of a memory, and as much to compile a kernel on a GPU.
    check_cases(op, triton_place, share=0.05 if op in SLOW_OPERATIONS else 0.1)


@EACH
@pytest.mark.slow
def test_many_in_triton(op, triton_place):
    check_cases(op, triton_place, share=0.25)


@pytest.mark.parametrize("key_gradient", ["addressing", "all"])
@pytest.mark.parametrize("op", MEMORIES)
def test_reads_of_what_was_written(op, key_gradient, place):
    """Two chunks and a part of one: with so few rows, later reads see earlier writes, and targets of another chunk."""
    options = {
        "chunk_size": 2, "top_k": 2, "lookahead": 1, "score": "idw", "eps": 0.3, "weighting": "softmax",
        "temperature": 0.6, "lr": 0.3, "weight_decay": 0.05, "clip": 0.5, "addressing_weight": 1.0,
        "key_gradient": key_gradient, "step": "normalized", "precision": "tf32x3",
    }  # fmt: skip
    case = Case(
        op, {"B": 2, "T": 5, "H": 1, "n": 3, "Dk": 4, "D": 3},
        dict.fromkeys(("queries", "targets", "keys", "values", "gates", "mask"), "float32"), pattern="random",
        options=options, actions=(1, 3, "no gates", 1) if op.endswith("step") else (), seed=3,
    )  # fmt: skip
    assert not judge.check(case, place.backend, place.device), "judged in full"


def test_packed_documents_in_segments(place):
    """Two documents with keys and rows of their own, the second with no token at first, go on behind a full chunk."""
    names = ("queries", "targets", "keys", "values", "gates", "mask", "row_values")
    options = {
        "chunk_size": 2, "top_k": 2, "lookahead": 1, "score": "idw", "eps": 0.3, "weighting": "softmax",
        "temperature": 0.6, "lr": 0.3, "weight_decay": 0.05, "clip": 0.5, "addressing_weight": 1.0,
        "key_gradient": "addressing", "step": "normalized", "precision": "tf32x3", "boundary": "carry",
        "sparse_grad": True,
    }  # fmt: skip
    case = Case(
        "fast_weight_memory_varlen", {"S": 2, "H": 1, "n": 3, "Dk": 4, "D": 3, "own keys": 1, "R": 4},
        dict.fromkeys(names, "float32") | {"cu_seqlens": "int64", "row_slots": "int64"}, pattern="random",
        options=options, actions=(3, 0, 1, 3), seed=3,
    )  # fmt: skip
    assert not judge.check(case, place.backend, place.device), "judged in full"


def test_gradients_of_sub_keys_that_all_tie():
    """Their rounding is multiplied by the slope of a distance's logarithm, 1/eps; exact results cancel otherwise."""
    options = {
        "chunk_size": 5, "top_k": 5, "lookahead": 2, "score": "idw", "eps": 1e-3, "weighting": "silu",
        "temperature": 3.0, "lr": 1.0, "weight_decay": 0.05, "clip": 0.02, "addressing_weight": 1.0,
        "key_gradient": "all", "step": "gradient", "precision": "tf32x3", "boundary": "carry",
    }  # fmt: skip
    names = ("queries", "targets", "keys", "values", "gates")
    case = Case(
        "fast_weight_memory", {"B": 1, "T": 20, "H": 1, "n": 5, "Dk": 6, "D": 33},
        dict.fromkeys((*names, "mask"), "float64"), {"queries": "expanded", "targets": "expanded"},
        dict.fromkeys(names, "tiny"), "random", options, seed=1665,
    )  # fmt: skip
    assert judge.check(case) == {"unstable"}
