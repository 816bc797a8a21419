"""Cases of what a public function refuses: changes to a good call, and what the error says."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

Arguments = dict[str, Any]


class Case(NamedTuple):
    """A change to a good call that is refused."""

    error: type[Exception]
    #: arguments that the message has in backticks
    names: tuple[str, ...]
    #: bad arguments, or functions of the good ones that make them
    changes: dict[str, Any]
    #: what the message shows of each name: "type", "shape", "dtype" or "value"
    shows: str = ""
    #: what else it says
    says: tuple[str, ...] = ()


Cases = dict[str, Case]


def tensor_cases(name: str, kind: str = "float", *, ranks: bool = True, optional: bool = False) -> Cases:
    """What any tensor argument is refused for; `kind` is "float", "slots" or "mask"."""
    dtypes = {
        "float": (torch.int64, torch.bool, torch.complex64, torch.float8_e5m2),
        "slots": (torch.float32, torch.bool, torch.int16, torch.complex64),
        "mask": (torch.complex64, torch.uint16, torch.float8_e5m2),
    }[kind]

    def case(error: type[Exception], make: Callable[[Tensor], Any], shows: str = "", *says: str) -> Case:
        return Case(error, (name,), {name: lambda arguments: make(arguments[name])}, shows, says)

    cases = {
        "a list": case(TypeError, Tensor.tolist, "type"),
        "of NumPy": case(TypeError, Tensor.numpy, "type"),
        "a str": case(TypeError, str, "type"),
        "sparse": case(TypeError, Tensor.to_sparse, "", "sparse"),
        "a DTensor": case(TypeError, distributed, "", "got a DTensor", "to_local()"),
        "on another device": case(ValueError, lambda x: x.to("meta"), "", "meta", "cpu"),
        **{f"of {dtype}": case(TypeError, lambda x, dtype=dtype: x.to(dtype), "dtype") for dtype in dtypes},
    }
    if not optional:
        cases["None"] = Case(TypeError, (name,), {name: None}, "type")
    if ranks:
        cases["with a dimension more"] = case(ValueError, lambda x: x.unsqueeze(0), "shape")
        cases["with a dimension less"] = case(ValueError, lambda x: x[0], "shape")
    if kind == "float":
        cases["nested"] = case(TypeError, lambda x: torch.nested.nested_tensor([x, x]), "", "nested")
        cases["of float64 beside float32"] = case(TypeError, Tensor.double, "", "torch.float64", "torch.float32")
    return {f"{name} {what}": one for what, one in cases.items()}


def distributed(x: Tensor) -> DTensor:
    return DTensor.from_local(x, init_device_mesh("cpu", (1,)), [Replicate()])


def mismatch(name: str, other: str, change: Callable[[Tensor], Tensor], *says: str, **others: Any) -> Case:
    """Two arguments that do not fit; the message has both of their shapes."""
    changes = {name: lambda arguments: change(arguments[name]), **others}
    return Case(ValueError, (name, other), changes, "shape", says)


def option_cases(name: str, error: type[Exception], shows: str, *values: Any) -> Cases:
    return {f"{name}={value!r:.40}": Case(error, (name,), {name: value}, shows) for value in values}


def number_cases(name: str, *, below: tuple[float, ...] = (), optional: bool = False) -> Cases:
    """What a number is refused for; `below` are numbers that are too small."""
    no_numbers = ("1", [1.0], 1j, True, torch.ones(()), np.ones(3))
    infinite = (float("nan"), float("inf"), -float("inf"), np.float32("nan"), 1e39, -1e39)
    cases = option_cases(name, TypeError, "type", *no_numbers, *(() if optional else (None,)))
    cases |= option_cases(name, ValueError, "value", *infinite, *below)
    return cases | {f"{name}=10**5000": Case(ValueError, (name,), {name: 10**5000}, "", ("16610 bits",))}


def int_cases(name: str, *outside: int) -> Cases:
    """What an integer is refused for; `outside` are those out of range."""
    no_ints = ("2", 2.0, True, None, [2], torch.tensor(2), np.float64(2.0), np.bool_(True))
    return option_cases(name, TypeError, "type", *no_ints) | option_cases(name, ValueError, "value", *outside, 2**63)


def choice_cases(*names: str) -> Cases:
    cases: Cases = {}
    for name in names:
        cases |= option_cases(name, ValueError, "value", "other", "")
        cases |= option_cases(name, TypeError, "type", 1, None, True, ["idw"])
    return cases
