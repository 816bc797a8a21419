"""The interpreter with a GPU's rounding: what it emulates, and the numeric tests of kernels in it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import reference
from fwpkm_kernels import product_key_lookup, testing
from tests.conftest import HAS_GPU
from tests.gpu_rounding import divide, dot, exp, exp2, gpu_rounding, log, tensor_core, to_tf32, tree_sum

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(HAS_GPU, reason="of the interpreter, which has no part in a process with a GPU")


@triton.jit
def softmax_kernel(x_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    power = tl.exp(tl.load(x_ptr + offs))
    tl.store(out_ptr + offs, power / tl.sum(power, axis=0))


@triton.jit
def log_kernel(x_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(out_ptr + offs, tl.log(tl.load(x_ptr + offs)))


@triton.jit
def fused_kernel(x_ptr, out_ptr, N: tl.constexpr):
    """x·x and 1 one from the other, either way, and twice x·x."""
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs)
    tl.store(out_ptr + offs, x * x - 1.0)
    tl.store(out_ptr + N + offs, 1.0 - x * x)
    tl.store(out_ptr + 2 * N + offs, x * x + x * x)


@triton.jit
def square_sum_kernel(x_ptr, out_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(out_ptr, tl.sum(x * x, axis=0))


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, PRECISION: tl.constexpr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tile = offs[:, None] * N + offs[None, :]
    total = tl.load(out_ptr + tile)
    tl.store(out_ptr + tile, tl.dot(tl.load(a_ptr + tile), tl.load(b_ptr + tile), total, input_precision=PRECISION))


def numbers(size: int, seed: int = 0) -> np.ndarray:
    return (5 * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


def test_the_mode_is_on_where_it_is_asked_for(request):
    x = torch.from_numpy(np.abs(numbers(256)))
    out = torch.empty_like(x)
    log_kernel[(1,)](x, out, N=256)
    is_on = not np.array_equal(out, np.log(x.numpy()))
    assert is_on == request.config.getoption("--gpu-rounding")
    with gpu_rounding():
        log_kernel[(1,)](x, out, N=256)
    assert np.array_equal(out, log(x.numpy()))


@pytest.mark.parametrize("function, exact, ulps", [(exp2, np.exp2, 2), (log, np.log, 1), (divide, np.divide, 2)])
def test_errors_fill_their_bound(function, exact, ulps):
    x = np.abs(numbers(20000)) if function is log else numbers(20000)
    operands = [x, numbers(20000, seed=1)] if function is divide else [x]
    expected = exact(*(x.astype(np.float64) for x in operands))
    actual = function(*operands)
    assert actual.dtype == np.float32
    errors = (actual - expected) / np.spacing(np.abs(expected).astype(np.float32))
    assert 0.9 * ulps < errors.max() < ulps
    assert -ulps < errors.min() < -0.9 * ulps
    assert np.mean(actual != expected.astype(np.float32)) > 0.2
    assert np.array_equal(function(*operands), actual), "runs differ"
    assert np.array_equal(function(*(x[::-1] for x in operands)), actual[::-1]), "it depends on the place in the tile"


def test_the_error_of_exp_grows_with_its_argument():
    """The product with log2(e) is rounded: CUDA promises 2 + 1.173·|x| ulp of `__expf`, the same two instructions."""
    x = numbers(20000) * 4
    exact = np.exp(x.astype(np.float64))
    errors = np.abs(exp(x) - exact) / np.spacing(exact.astype(np.float32))
    assert (errors < 2 + 1.173 * np.abs(x)).all()
    assert errors.max() > 10


def test_special_values():
    inf, nan = np.float32(np.inf), np.float32(np.nan)
    x = np.array([0, -0.0, 1, -1, inf, -inf, nan, 1e-45, 200, -200], dtype=np.float32)
    with np.errstate(all="ignore"):
        for function, exact in ((exp, np.exp), (log, np.log)):
            expected = exact(x)
            special = ~np.isfinite(expected) | (expected == 0) | (x == 0)
            assert special.sum() > 4
            np.testing.assert_array_equal(function(x)[special], expected[special])
        assert log(np.float32([1])) == 0
        for y in (0.0, -0.0, inf, nan, 1.0, -4.0, 2.0**-130):  # a reciprocal of a power of two is exact
            y = np.float32([y])
            np.testing.assert_array_equal(divide(x, y), x / y)
    assert (np.signbit(divide(np.float32([-1e-45, 1e-45]), np.float32([3, -3])))).all()


def test_a_product_that_is_added_is_rounded_once():
    x = torch.tensor([1 + 2.0**-12, 1 + 2.0**-20])
    out = torch.empty(3, 2)
    fused_kernel[(1,)](x, out, N=2)
    assert out[0].tolist() == [2.0**-11, 2.0**-19], "the interpreter rounds the product"
    with gpu_rounding():
        fused_kernel[(1,)](x, out, N=2)
    assert out[0].tolist() == [2.0**-11 + 2.0**-24, 2.0**-19 + 2.0**-40]
    assert out[1].tolist() == [-(2.0**-11) - 2.0**-24, -(2.0**-19) - 2.0**-40]
    assert out[2].tolist() == [2 + 2.0**-10, 2 + 2.0**-18]


def test_sums_are_trees():
    big = 2.0**24
    x = np.float32([[1, 1, 1, big], [1, 1, 1, -big], [1, 1, 1, 1], [0, 0, 1, 1]])
    # Threads: 2^24 + 4, as 3 is added at once; 3 - 2^24; 4; 2. Halves: 2^24 + 8; 5 - 2^24.
    assert tree_sum(x.reshape(16), 0) == 13
    assert tree_sum(x.T.copy(), 1)[3] == 2, "2^24 - 2^24 + 1 + 1 in one thread"
    assert tree_sum(x[:, 3:], 0) == [2]
    assert tree_sum(np.ones((1, 1), np.float32), 0) == [1]
    with gpu_rounding():
        square_sum_kernel[(1,)](torch.tensor([1, 1 + 3 * 2.0**-13, 0, 0]), out := torch.empty(1), N=4)
    assert out.item() == 2 + 3 * 2.0**-12 + 2.0**-22, "9/16 of a place, but 1/2 if the square were rounded first"


@triton.jit
def cast_kernel(x_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs).to(tl.bfloat16))


def test_bfloat16_is_rounded():
    x = torch.from_numpy(numbers(256))
    x[:8] = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 3.4e38, -3.4e38, torch.inf, 1e-40, torch.nan, -0.0])
    out = torch.empty(256, dtype=torch.bfloat16)
    with gpu_rounding():
        cast_kernel[(1,)](x, out, N=256)
    torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


ONE = np.float32([[1]])


@pytest.mark.parametrize("sign", [1, -1])
def test_the_accumulator_truncates(sign):
    def summed(total: float, *products: float) -> float:
        terms, ones = np.float32([products]), np.ones((len(products), 1), np.float32)
        with np.errstate(invalid="ignore"):
            return sign * tensor_core(sign * terms, ones, sign * total * ONE, 8).item()

    assert summed(1, 2.0**-23) == 1 + 2.0**-23
    assert summed(1, 1.5 * 2.0**-23) == 1 + 2.0**-23, "to nearest it were one place more"
    assert summed(1, -(2.0**-25)) == 1 - 2.0**-24, "toward zero it is one place less, to nearest none"
    assert summed(1, -(2.0**-26)) == 1, "beyond 25 places"
    assert summed(1, *[0.75 * 2.0**-25] * 8) == 1, "each is cut alone: together they were 1.5 places"
    assert summed(1, *[2.0**-25] * 8) == 1 + 2.0**-22, "they are added before the cut"
    assert summed(1, *[2.0**-25] * 4, *[0.0] * 4, *[2.0**-25] * 4) == 1 + 2.0**-23 * 2
    assert summed(1, *[2.0**-25] * 3, *[0.0] * 5, *[2.0**-25] * 3) == 1, "cut after every step of eight"
    assert summed(0, 2.0**-140, 2.0**-149) == 2.0**-140 + 2.0**-149
    assert summed(0) == summed(0, 0.0) == 0
    assert summed(1, np.inf) == np.inf
    assert np.isnan(summed(1, np.inf, -np.inf, 1.0))


def test_a_product_counts_with_the_exponents_of_its_factors():
    """1.5·1.5 is aligned as if it were below 2, which keeps one place more; not beside a total of 2 or more."""
    a, b = np.float32([[1.5, 1]]), np.float32([[1.5], [2.0**-25]])
    assert tensor_core(a, b, -1.984375 * ONE, 8) == 0.265625 + 2.0**-25
    assert tensor_core(a, b, -2.25 * ONE, 8) == 0


def test_precisions_of_dot():
    a = (1 + 3 * 2.0**-13) * ONE  # its tf32 is 1, what is missing 3·2^-13
    exact = (a.astype(np.float64) ** 2).astype(np.float32)
    assert exact == 1 + 3 * 2.0**-12 + 2.0**-23
    assert dot(a, a, 0 * ONE, "IEEE") == exact
    assert dot(a, a, 0 * ONE, "TF32x3") == 1 + 3 * 2.0**-12, "small·small, 9·2^-26, is dropped"
    assert dot(a, a, 0 * ONE, "TF32") == 1
    almost = (1 + 2.0**-10 - 2.0**-23) * ONE
    assert to_tf32(almost) == 1 + 2.0**-10, "rounded"
    assert dot(almost, ONE, 0 * ONE, "TF32") == 1, "not rounded, cut"
    assert dot(almost, ONE, 0 * ONE, "TF32x3") == almost
    assert to_tf32((1 + 2.0**-11) * ONE) == 1 + 2.0**-10, "ties away from zero"
    # One after the other, from the total on: 1 is lost against 2^24 each time.
    assert dot(np.ones((1, 4), np.float32), np.ones((4, 1), np.float32), 2.0**24 * ONE, "IEEE") == 2.0**24
    with np.errstate(invalid="ignore"):
        for precision in ("IEEE", "TF32x3", "TF32"):
            assert dot(np.inf * ONE, ONE, 0 * ONE, precision) == np.inf
            assert np.isnan(dot(np.nan * ONE, ONE, 0 * ONE, precision))
    half = np.full((1, 16), 2.0**-13, np.float16)
    assert dot(half, half.T, 1 * ONE, "IEEE") == 1, "float16 takes the tensor core whatever the precision"
    with pytest.raises(NotImplementedError, match="bf16x6"):
        dot(ONE, ONE, ONE, "BF16x6")


@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
def test_dot_of_a_kernel(precision):
    a, b, total = (numbers(256, seed=i).reshape(16, 16) for i in range(3))
    out = torch.from_numpy(total.copy())
    with gpu_rounding():
        dot_kernel[(1,)](torch.from_numpy(a), torch.from_numpy(b), out, PRECISION=precision, N=16)
    assert np.array_equal(out, dot(a, b, total, {"tf32x3": "TF32x3"}.get(precision, precision.upper())))
    assert not np.array_equal(out, a @ b + total)


def test_parts_of_a_long_product_are_more_exact_than_a_chain():
    """What a kernel can do about an accumulator that truncates: begin each part with zeros, add parts in float32."""
    a, b = numbers(16 * 256).reshape(16, 256), numbers(256 * 16, seed=1).reshape(256, 16)
    exact = a.astype(np.float64) @ b
    chain = dot(a, b, np.zeros((16, 16), np.float32), "TF32x3")
    parts = sum(
        dot(a[:, i : i + 32], b[i : i + 32], np.zeros((16, 16), np.float32), "TF32x3") for i in range(0, 256, 32)
    )
    chain, parts, plain = (np.sqrt(np.mean((x - exact) ** 2)) for x in (chain, parts, a @ b))
    assert parts < plain < chain / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_dot_scores_are_as_exact_as_in_float32(dtype):
    """Of the best, whose products are mostly positive: what truncation loses adds up, unlike what rounding does."""
    inputs = testing.make_lookup_inputs(12, 1, 32, 512, dtype=dtype, keys_dtype=dtype)
    exact, exact_slots = reference.product_key_lookup(*testing.as_float64(inputs), 8, score="dot")
    plain, _ = reference.product_key_lookup(*(x.float() for x in inputs), 8, score="dot")
    with gpu_rounding():
        scores, slots = product_key_lookup(*inputs, 8, score="dot", precision="tf32x3", backend="triton")
    assert torch.equal(slots, exact_slots)
    error, plain_error = ((x - exact).square().mean().sqrt() for x in (scores, plain))
    assert error < 3 * plain_error


def test_a_tolerance_that_only_exact_arithmetic_meets():
    """Softmax within 2 units of the last place: on a CPU yes, on a GPU no."""
    x = torch.from_numpy(numbers(256))
    out = torch.empty_like(x)
    exact = x.double().softmax(0).float()
    softmax_kernel[(1,)](x, out, N=256)
    torch.testing.assert_close(out, exact, rtol=4 * torch.finfo(torch.float32).eps, atol=0)
    with gpu_rounding():
        softmax_kernel[(1,)](x, out, N=256)
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(out, exact, rtol=4 * torch.finfo(torch.float32).eps, atol=0)
    torch.testing.assert_close(out, exact, rtol=40 * torch.finfo(torch.float32).eps, atol=0)


def test_float64_is_left_alone():
    x = torch.from_numpy(numbers(256)).double()
    out, expected = torch.empty_like(x), torch.empty_like(x)
    softmax_kernel[(1,)](x, expected, N=256)
    with gpu_rounding():
        softmax_kernel[(1,)](x, out, N=256)
    assert torch.equal(out, expected)


# Compiles a kernel above and prints its PTX, in a process without the interpreter.
COMPILE = """
import json
import os
import sys

import tests.conftest  # chooses the interpreter
os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tests import test_gpu_rounding as module

result = []
for name, constants in json.loads(sys.argv[1]):
    kernel = getattr(module, name)
    signature = {x: "constexpr" if x in constants else "*fp32" for x in kernel.arg_names}
    pointers = {(i,): [["tt.divisibility", 16]] for i, x in enumerate(kernel.arg_names) if x not in constants}
    constants = {(kernel.arg_names.index(x),): value for x, value in constants.items()}
    source = ASTSource(kernel, signature, constants, pointers)
    options = {"enable_fp_fusion": True}
    result += [triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]]
print(json.dumps(result))
"""


def test_what_the_compiler_makes_of_each_operation(tmp_path):
    cases = [
        ("softmax_kernel", {"N": 128}),
        ("log_kernel", {"N": 128}),
        ("fused_kernel", {"N": 128}),
        ("square_sum_kernel", {"N": 512}),
        ("dot_kernel", {"N": 64, "PRECISION": "ieee"}),
        ("dot_kernel", {"N": 64, "PRECISION": "tf32"}),
        ("dot_kernel", {"N": 64, "PRECISION": "tf32x3"}),
    ]
    command = [sys.executable, "-c", COMPILE, json.dumps(cases)]
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = []
    for ptx in json.loads(done.stdout):
        arithmetic = r"^\s*((?:add|sub|mul|fma|div|ex2|lg2|rcp|cvt\.rna|wgmma\.mma_async)\.[\w.:]*f32[\w.]*)"
        found.append(re.findall(arithmetic, ptx, re.M))
    softmax, logarithm, fused, square_sum, ieee, tf32, tf32x3 = found
    assert set(softmax) == {"mul.f32", "ex2.approx.f32", "add.f32", "div.full.f32"}
    assert "fma.rn.ftz.f32" in logarithm, "libdevice's"
    assert not [x for x in logarithm if "approx" in x]
    assert fused.count("fma.rn.f32") == 3
    assert square_sum[:4] == ["mul.f32"] + 3 * ["fma.rn.f32"]
    assert set(square_sum[4:]) == {"add.f32"}
    assert set(ieee) == {"fma.rn.f32"}
    step = "wgmma.mma_async.sync.aligned.m64n64k8.f32.tf32.tf32"
    assert tf32 == 8 * [step], "operands as they are, the accumulator carried on"
    assert tf32x3.count(step) == 3 * 8
    assert "cvt.rna.tf32.f32" in tf32x3
    assert tf32x3[-32:] == 32 * ["add.f32"], "the total comes last"


# Of the numeric tests of each file those that take longest for what they show are left out.
NUMERIC = {
    "lookup": "matches or dtypes or near_keys or every_tile or batch",
    "gather update": "not (sparse or hot or beyond) or 127",
    "key_step": "matches or clip or weight or dtypes or near_keys or joint or halves",
    "chunks scans streaming_kernels plan": "not log_keeps",
    "memory": "golden or edges_in_triton or identical or bits",
    "streaming": "precision or bitwise or strides or each_step",
}


@pytest.mark.slow
@pytest.mark.parametrize("files", NUMERIC)
def test_kernels_keep_their_tolerances(files):
    """All that is within a budget, bitwise equal to another run or kernel, or in order, is so with a GPU's rounding."""
    chosen = f"mode_is_on or not (float64 or gradcheck) and ({NUMERIC[files]})"
    command = [sys.executable, "-m", "pytest", "-qrA", "-p", "no:cacheprovider", "--gpu-rounding", "-m", "not slow"]
    command += ["-k", chosen, "tests/test_gpu_rounding.py::test_the_mode_is_on_where_it_is_asked_for"]
    command += [f"tests/test_{name}.py" for name in files.split()]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in files.split():
        passed = re.findall(rf"^PASSED tests/test_{name}\.py::", done.stdout, re.M)
        assert len(passed) >= 8, f"the choice goes by names of tests: {passed}"
