"""Where the function of an operator takes its place: only for tensors of which nothing more is asked."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fwpkm_kernels import product_key_lookup, product_key_update, sparse_value_gather, testing
from fwpkm_kernels._operators import is_plain


class Own(torch.Tensor):
    """A class of tensors of its own."""


class Seen(TorchDispatchMode):
    """Notes which operators run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_what_is_plain():
    x = torch.ones(2)
    wanted = torch.ones(2, requires_grad=True)
    assert is_plain(x, torch.nn.Parameter(x, requires_grad=False))
    assert not is_plain(x, wanted)
    with torch.no_grad():
        assert is_plain(x, wanted)
    negated, zero = torch.view_as_complex(torch.ones(1, 2)).conj().imag, torch._efficientzerotensor(2)
    wanted_too = 2 * wanted
    assert not is_plain(wanted_too)
    for other in (x.as_subclass(Own), x.to("meta"), negated, zero, None, 1.0):
        assert not is_plain(x, other)
    with Seen():
        assert not is_plain(x)
    with FakeTensorMode() as mode:
        assert not is_plain(x)
    assert not is_plain(mode.from_tensor(x))
    seen = []
    torch.autograd.functional.jacobian(lambda y: _Doubled.apply(y, seen), x, vectorize=True)
    torch.jit.trace(lambda y: seen.append(is_plain(y)) or 2 * y, x, check_trace=False)
    assert seen == [False, False]


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seen):
        ctx.seen = seen
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        ctx.seen.append(is_plain(grad))
        return 2 * grad, None


def lookup(queries, keys):
    return product_key_lookup(queries, keys, 3)


def key_step(queries, keys):
    return (product_key_update(keys, queries, top_k=3, weight=5.0),)


def gather(queries, keys):
    slots = torch.arange(12).view(4, 3) % keys.shape[2]
    return (sparse_value_gather(keys[0, 0], slots, queries[:4, 0, :3].contiguous()),)


@pytest.mark.parametrize("function", [lookup, key_step, gather])
def test_both_ways_give_the_same_and_what_watches_sees_the_operator(function):
    queries, keys = testing.make_lookup_inputs(6, 1, 9, 8)
    direct = function(queries, keys)
    differentiated = function(queries.clone().requires_grad_(), keys.clone().requires_grad_())
    with Seen() as seen:
        watched = function(queries, keys)
    assert any(name.startswith("fwpkm_kernels::") for name in seen.names)
    assert differentiated[0].requires_grad
    assert not direct[0].requires_grad
    for a, b, c in zip(direct, differentiated, watched, strict=True):
        testing.assert_bitwise_equal(a, b.detach())
        testing.assert_bitwise_equal(a, c)
