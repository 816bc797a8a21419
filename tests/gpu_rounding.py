"""Triton's interpreter with the rounding of a GPU, so that a tolerance that only a CPU meets shows without one.

    with gpu_rounding(): ...          # or, for whole tests: pytest --gpu-rounding

NumPy, which the interpreter computes with, rounds every operation to the nearest number, and sums in an order of its
own. Here float32 is computed with what Triton compiles the same operations to for sm_90:

- exp: `mul.f32` with log2(e), whose rounding grows with |x|, then `ex2.approx.f32`: 2 units in the last place (ulp);
- division: `div.full.f32`: 2 ulp; log: libdevice's `logf`: 1 ulp;
- a product that is added or subtracted at once: one `fma.rn.f32`, rounded once;
- float32 to bfloat16: rounded to the nearest, which the interpreter truncates;
- sums: four neighbours one after the other, as in a thread, then halves onto halves, as between lanes and warps;
- dot products: see `dot`.

The errors of exp, division and log depend on the operands' bits alone, so equal operands give equal results, as they do
on a GPU, and runs repeat; what they are on a GPU is known only within the bound. Not emulated: which products the
compiler fuses beyond the rule above, how a layout deals the terms of a sum to threads, the order of atomics, float64.
A function that is missing here raises.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

LOG2_E = np.float32(1.4426950408889634)


def hashed(bits: np.ndarray) -> np.ndarray:
    """Pseudo-random 32 bits for each 32 bits: the finalizer of MurmurHash3."""
    bits = (bits ^ (bits >> 16)) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * np.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def off_by(ulps: int, exact: np.ndarray, *operands: np.ndarray) -> np.ndarray:
    """The float64 `exact` as a float32 less than `ulps` units of its last place away, as the operands' bits decide.

    Zeros, infinities, NaN and signs stay.
    """
    seed = np.uint32(0)
    for operand in operands:
        seed = hashed(operand.view(np.uint32) ^ seed)
    noise = (seed / 2.0**31 - 1) * (ulps - 0.5)  # rounding is the last half
    rounded = exact.astype(np.float32)
    size = np.maximum(np.abs(exact) + noise * np.spacing(np.abs(rounded)), 0)
    return np.where(np.isfinite(rounded) & (rounded != 0), np.copysign(size, exact).astype(np.float32), rounded)


def exp(x: np.ndarray) -> np.ndarray:
    return exp2(x * LOG2_E)


def exp2(x: np.ndarray) -> np.ndarray:
    """`ex2.approx.f32`, which makes 1 of both zeros."""
    return np.where(x == 0, np.float32(1), off_by(2, np.exp2(x.astype(np.float64)), x))


def log(x: np.ndarray) -> np.ndarray:
    return off_by(1, np.log(x.astype(np.float64)), x)


def divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """`div.full.f32`, which multiplies by a reciprocal: that of a power of two is exact."""
    exact = x.astype(np.float64) / y
    is_power = np.frexp(y)[0] == np.copysign(np.float32(0.5), y)
    return np.where(is_power, exact.astype(np.float32), off_by(2, exact, *np.broadcast_arrays(x, y)))


def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x·y + z: the product is exact in float64, the sum all but."""
    return (x.astype(np.float64) * y + z).astype(np.float32)


def tree_sum(terms: np.ndarray, axis: int) -> np.ndarray:
    """float32 sum over one axis of float32 terms, or of exact products in float64, which are then added by fma."""
    terms = np.moveaxis(terms, axis, -1)
    terms = terms.reshape(*terms.shape[:-1], -1, min(4, terms.shape[-1]))
    total = np.float32(0)
    for i in range(terms.shape[-1]):
        total = (terms[..., i] + total).astype(np.float32)
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2
        total = total[..., :half] + total[..., half:]
    return total[..., 0]


def truncated(x: np.ndarray, bits: int) -> np.ndarray:
    """Floats without the last `bits` bits of their significand."""
    integer = np.dtype(f"uint{8 * x.itemsize}").type
    return (x.view(integer) >> integer(bits) << integer(bits)).view(x.dtype)


def to_tf32(x: np.ndarray) -> np.ndarray:
    """`cvt.rna.tf32.f32`: rounded to 10 bits behind the point, ties away from zero."""
    rounded = truncated((x.view(np.uint32) + np.uint32(0x1000)).view(np.float32), 13)
    return np.where(np.isfinite(x), rounded, x)


def exponents(x: np.ndarray) -> np.ndarray:
    """e of x = s·2^e with 1 <= |s| < 2; far below all others for 0."""
    return np.where(x == 0, -1000, np.frexp(x)[1] - 1)


def tensor_core(a: np.ndarray, b: np.ndarray, total: np.ndarray, step: int) -> np.ndarray:
    """total + a·b [M, K]·[K, N] by Hopper's WGMMA: `step` exact products and the accumulator are summed at a time.

    All of them are cut to 25 binary places below the largest exponent, where a product counts with the sum of the
    exponents of its factors and nothing is below -133; the sum is cut to float32. So others have measured it, bit by
    bit: arXiv 2511.10909 (MMA-Sim) and 2512.07004. Sums below the normal numbers are rounded instead.
    """
    for start in range(0, a.shape[1], step):
        x, y = a[:, start : start + step, None].astype(np.float64), b[None, start : start + step].astype(np.float64)
        exponent = np.maximum((exponents(x) + exponents(y)).max(axis=1), exponents(total))
        scale = np.ldexp(1.0, 25 - np.maximum(exponent, -133))
        sums = np.trunc(x * y * scale[:, None]).sum(axis=1) + np.trunc(total * scale)
        total = truncated(sums / scale, 29).astype(np.float32)
    return total


def dot(a: np.ndarray, b: np.ndarray, total: np.ndarray, precision: str) -> np.ndarray:
    """total + a·b of float32 or float16.

    ieee: one fma after the other, beginning with `total`. tf32 and half precision: the tensor core, which ignores the
    last 13 bits of a float32. tf32x3: big parts rounded to tf32, small parts, what is missing from them, cut to it by
    the tensor core; small·big, big·small and, NaN replaced by 0, big·big on top of one another; no small·small; `total`
    added last.
    """
    if a.dtype == np.float16:
        return tensor_core(a, b, total, 16)
    if precision == "IEEE":
        for i in range(a.shape[1]):
            total = fma(a[:, i, None], b[None, i], total)
        return total
    if precision == "TF32":
        return tensor_core(truncated(a, 13), truncated(b, 13), total, 8)
    if precision != "TF32x3":
        raise NotImplementedError(f"`input_precision` must be ieee, tf32 or tf32x3, got {precision.lower()}")
    big_a, big_b = to_tf32(a), to_tf32(b)
    small_a, small_b = truncated(a - big_a, 13), truncated(b - big_b, 13)
    part = tensor_core(small_a, big_b, np.zeros_like(total), 8)
    part = tensor_core(big_a, small_b, part, 8)
    return total + tensor_core(big_a, big_b, np.where(np.isnan(part), np.float32(0), part), 8)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """The bits of `cvt.rn.bf16.f32`: ties to even."""
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def is_float32(*handles: TensorHandle) -> bool:
    return all(handle.data.dtype == np.float32 for handle in handles)


def in_float32(function: Callable[..., np.ndarray], otherwise: Callable[..., TensorHandle]) -> Callable[..., Any]:
    """A builder's method that computes float32 by `function` and leaves the rest to `otherwise`."""

    def method(self: InterpreterBuilder, *handles: TensorHandle) -> TensorHandle:
        if not is_float32(*handles):
            return otherwise(self, *handles)
        with np.errstate(all="ignore"):
            return TensorHandle(function(*(handle.data for handle in handles)), handles[-1].dtype.scalar)

    return method


def multiply(self: InterpreterBuilder, x: TensorHandle, y: TensorHandle) -> TensorHandle:
    """Remembers the factors, for the sum that may follow."""
    product = self.binary_op(x, y, np.multiply)
    if is_float32(x, y):
        product.attr["factors"] = x.data, y.data
    return product


def add_or_subtract(sign: int, otherwise: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """x ± y: by fma if x, or else y, is a product."""

    def method(self: InterpreterBuilder, x: TensorHandle, y: TensorHandle) -> TensorHandle:
        if "factors" in x.attr:
            (p, q), z = x.attr["factors"], sign * y.data
        elif "factors" in y.attr:
            (p, q), z = y.attr["factors"], x.data
            p = sign * p
        else:
            return otherwise(self, x, y)
        with np.errstate(all="ignore"):
            return TensorHandle(fma(p, q, z), x.dtype.scalar)

    return method


def reduce_sum(self: ReduceOps, x: tl.tensor) -> tl.tensor:
    data = x.handle.data
    if data.dtype != np.float32:
        return self.to_tensor(np.sum(data, axis=self.axis, keepdims=self.keep_dims), x.dtype)
    axis = self.axis
    with np.errstate(all="ignore"):
        if "factors" in x.handle.attr:
            p, q = x.handle.attr["factors"]
            data = p.astype(np.float64) * q
        if axis is None:
            data, axis = data.reshape(-1), 0
        total = tree_sum(data, axis)
    if self.keep_dims:
        total = total.reshape([1] * x.handle.data.ndim) if self.axis is None else np.expand_dims(total, axis)
    return self.to_tensor(total, x.dtype)


def matrix_product(
    self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, total: TensorHandle, precision: Any, _: Any
) -> TensorHandle:
    with np.errstate(all="ignore"):
        return TensorHandle(dot(a.data, b.data, total.data, precision.name), total.dtype.scalar)


def cast(otherwise: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def method(self: InterpreterBuilder, x: TensorHandle, dtype: Any) -> TensorHandle:
        if is_float32(x) and dtype.scalar == tl.bfloat16:
            return TensorHandle(to_bfloat16(x.data), tl.bfloat16)
        return otherwise(self, x, dtype)

    return method


def missing(self: InterpreterBuilder, *handles: TensorHandle) -> TensorHandle:
    raise NotImplementedError("tests/gpu_rounding.py does not know how a GPU rounds this function")


@contextlib.contextmanager
def gpu_rounding() -> Iterator[None]:
    """Inside, kernels in the interpreter round as on a GPU."""
    builder = InterpreterBuilder
    methods = {
        "create_exp": in_float32(exp, builder.create_exp),
        "create_exp2": in_float32(exp2, builder.create_exp2),
        "create_log": in_float32(log, builder.create_log),
        "create_fdiv": in_float32(divide, builder.create_fdiv),
        "create_fma": in_float32(fma, builder.create_fma),
        "create_fmul": multiply,
        "create_fadd": add_or_subtract(1, builder.create_fadd),
        "create_fsub": add_or_subtract(-1, builder.create_fsub),
        "create_dot": matrix_product,
        "cast_impl": cast(builder.cast_impl),
    }
    unknown = ("create_sqrt", "create_rsqrt", "create_sin", "create_cos", "create_erf", "create_log2", "create_frem")
    methods |= dict.fromkeys(unknown, missing)
    with mock.patch.multiple(builder, **methods), mock.patch.object(ReduceOps, "sum", reduce_sum):
        yield
