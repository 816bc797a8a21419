"""What is asked of a result beside its reference: the budget of its errors, where it is promised at all."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fwpkm_kernels import testing


def compared_rms(sources: Iterable[Tensor], result: Tensor, dtype: torch.dtype) -> tuple[float, bool]:
    """The largest RMS of `sources`, and whether that of `result` is at most √ε times as much."""
    floats = [x.double() for x in sources if x.is_floating_point() and x.numel()]
    largest = max((float(x[x.isfinite()].square().mean().sqrt()) for x in floats), default=0.0)
    return largest, float(result[result.isfinite()].square().mean().sqrt()) <= torch.finfo(dtype).eps ** 0.5 * largest


class Budget(NamedTuple):
    """What is asked of a result: about `length` terms are added up for an element; errors are relative to no less than
    `floor`; with `strict` what is finite in neither result is not finite either; only what is in `stays` is promised.
    """

    length: int
    floor: float
    strict: bool
    stays: Tensor

    def compare(self, name: str, actual: Tensor, exact: Tensor, baseline: Tensor, factor: float = 3.0) -> set[str]:
        rounded = exact.to(actual.dtype)
        promised = rounded.isfinite() & baseline.isfinite() & self.stays
        if self.strict:
            lost = ~rounded.isfinite() & ~baseline.isfinite() & actual.isfinite()
            assert not lost.any(), f"{name}: {int(lost.sum())} elements are finite which must not be"
        one, other, basis = (torch.where(promised, x, torch.zeros_like(x)) for x in (actual, exact, baseline))
        rms = float(other.square().mean().sqrt()) if other.numel() else 0.0
        # Below the smallest normal number each term has an absolute error.
        scale = max(rms, self.floor, torch.finfo(actual.dtype).tiny * self.length**0.5)
        options = {"reduction_length": self.length, "scale": scale, "factor": factor}
        testing.assert_within_budget(one, other, basis, name=name, **options)
        return set() if promised.all() else {"overflow"}
