"""Every operation on drawn inputs against the reference: the cases of the fuzzer, a few of them at each run.

`--hypothesis-profile=nightly`, or HYPOTHESIS_PROFILE=nightly in the environment, draws more, and other ones each time.
"""

import pytest
from hypothesis import HealthCheck, given, settings

from tests import judge
from tests.conftest import HAS_GPU, PLACES, Place, slow_in_interpreter
from tests.strategies import OPERATIONS, Case, cases

EACH = pytest.mark.parametrize("op", OPERATIONS)


def check_cases(op: str, place: Place, share: float = 1.0) -> None:
    """As many cases as the profile says, or a share of them."""
    small = place == Place("triton", "cpu")
    examples = max(1, round(share * settings.default.max_examples))

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(cases(op, small=small))
    def check(case: Case) -> None:
        judge.check(case, place.backend, place.device)

    check()


@EACH
def test_in_torch(op):
    check_cases(op, PLACES[0])


@EACH
def test_in_triton(op, triton_place):
    # A second or more in the interpreter for a case of the memory, less for others.
    few = 0.05 if op.startswith("fast_weight_memory") else 0.075
    check_cases(op, triton_place, share=1.0 if HAS_GPU else few)


@EACH
@slow_in_interpreter
def test_many_in_triton(op, triton_place):
    check_cases(op, triton_place, share=0.25)
