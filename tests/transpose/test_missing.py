"""Custom Functions with one direction only: errors, and matrices from unit vectors."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import Function

import linearize as lz
from linearize.errors import MissingDerivativeError
from tests.support.functions import F64, direction, point
from tests.support.references import native_jvp, native_vjp

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

close = torch.testing.assert_close


def plain(a, b):
    """What `Opaque` computes, in PyTorch."""
    return a * b, (3 * a.sum()).reshape(1, 1), 3 * b.sin()


def counting() -> tuple[type[Function], Counter[str]]:
    """Return an opaque Function of two arguments with a backward only, and its call counts."""
    calls: Counter[str] = Counter()

    class Opaque(Function):
        @staticmethod
        def forward(ctx, a, b, k):
            calls["forward"] += 1
            ctx.arrays = a.detach().numpy().copy(), b.detach().numpy().copy()
            ctx.k = k
            x, y = ctx.arrays
            outs = (x * y, np.array([[k * x.sum()]]), x > 0, k * np.sin(y))
            first, total, mask, last = (torch.from_numpy(t) for t in outs)
            return first, "text", total, mask, last

        @staticmethod
        def backward(ctx, g, _, total, mask, last):
            calls["backward"] += 1
            a, b = ctx.arrays
            da = g.numpy() * b + ctx.k * total.item()
            db = g.numpy() * a + ctx.k * np.cos(b) * last.numpy()
            return torch.from_numpy(da), torch.from_numpy(db), None

    return Opaque, calls


def used(outs: Any) -> tuple[torch.Tensor, ...]:
    return outs[0], outs[2], outs[4]


def test_missing_method_is_named_and_the_other_product_works():
    Opaque, calls = counting()
    primals = point(seed=1), point(seed=2)
    here = lz.Linearizer(lambda a, b: used(Opaque.apply(a.exp(), b, 3.0))).at(*primals)
    v = [direction(x) for x in primals]
    u = tuple(direction(y, 3) for y in here.value)
    expected = native_vjp(lambda a, b: plain(a.exp(), b), primals, u)
    for _ in range(2):
        with pytest.raises(MissingDerivativeError, match=r"Opaque.*jvp.*materialize"):
            here.jvp_fn(*v)
        close(list(here.vjp_fn(u)), expected)
    assert calls["forward"] == 1


def test_missing_backward_is_named_and_the_other_product_works():
    class Forward(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.x = x.detach()
            return x.sin()

        @staticmethod
        def jvp(ctx, dx):
            return torch.from_numpy(dx.numpy() * np.cos(ctx.x.numpy()))

    x = point()
    v = direction(x)
    here = lz.Linearizer(Forward.apply).at(x)
    for _ in range(2):
        with pytest.raises(MissingDerivativeError, match=r"Forward.*backward.*materialize"):
            here.vjp_fn(v)
        close(here.jvp_fn(v), x.cos() * v)
    here = lz.Linearizer(Forward.apply, opaque="materialize").at(x)
    close(here.vjp_fn(v)[0], x.cos() * v)


def test_matrix_of_an_opaque_function():
    Opaque, calls = counting()
    primals = point(seed=1), point(seed=2)

    def f(a, b):
        return used(Opaque.apply(a.exp(), b, 3.0))

    here = lz.Linearizer(f, opaque="materialize").at(*primals)
    assert calls == {"forward": 1}, "nothing is built before it is needed"
    u = tuple(direction(y, 3) for y in here.value)
    pulled = native_vjp(lambda a, b: plain(a.exp(), b), primals, u)
    close(list(here.vjp_fn(u)), pulled)
    calls.clear()
    count = 0
    for k in range(5):
        v = direction(primals[0], k), direction(primals[1], 20 + k)
        close(here.jvp_fn(*v), native_jvp(lambda a, b: plain(a.exp(), b), primals, v))
        count = count or calls["backward"]
    # One backward for each scalar of the three results, and a bounded number to find out
    # that it is opaque; none for the products that follow.
    assert 13 <= count <= 15
    assert calls == {"backward": count}
    close(list(here.vjp_fn(u)), pulled)


@pytest.mark.parametrize("given", [(True, False), (False, True)])
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 2)])
def test_matrix_of_a_part(given, which):
    """Some arguments without tangent, some outputs that are not used."""
    Opaque, _ = counting()
    primals = point(seed=1), point(seed=2)

    def f(a, b):
        outs = used(Opaque.apply(a, b, 3.0))
        return [outs[k] for k in which]

    here = lz.Linearizer(f, opaque="materialize").at(*primals)
    v = [direction(x) if g else None for x, g in zip(primals, given, strict=True)]
    full = [torch.zeros_like(x) if t is None else t for x, t in zip(primals, v, strict=True)]
    expected = native_jvp(lambda a, b: [plain(a, b)[k] for k in which], primals, full)
    close(here.jvp_fn(*v), expected)
    # And with the other one on top, which needs another part of the matrix.
    v = [direction(x, 5) for x in primals]
    expected = native_jvp(lambda a, b: [plain(a, b)[k] for k in which], primals, v)
    close(here.jvp_fn(*v), expected)


def test_limit_of_the_matrix():
    Opaque, calls = counting()
    primals = point(seed=1), point(seed=2)
    bytes_needed = 13 * 12 * 8

    def f(a, b):
        return used(Opaque.apply(a, b, 3.0))

    v = [direction(x) for x in primals]
    here = lz.Linearizer(f, opaque="materialize", opaque_limit=bytes_needed - 1).at(*primals)
    for _ in range(2):
        with pytest.raises(MissingDerivativeError, match=r"Opaque.*13 by 12.*1,248.*opaque_limit"):
            here.jvp_fn(*v)
    assert calls["backward"] <= 4, "the size is known before the matrix is built"
    u = tuple(direction(y) for y in here.value)
    close(list(here.vjp_fn(u)), native_vjp(plain, primals, u))
    here = lz.Linearizer(f, opaque="materialize", opaque_limit=bytes_needed).at(*primals)
    close(here.jvp_fn(*v), native_jvp(plain, primals, v))


def test_matrix_in_a_mixed_graph():
    """Only the opaque node is built as a matrix; others go their own way."""
    Opaque, calls = counting()

    def f(x, function=lambda a, b: used(Opaque.apply(a, b, 3.0))):
        a, total, c = function(x.sin(), x * 2)
        first = a * total.reshape(()) + c
        again = function(first, first.cos())
        return again[0].sum() + again[2]

    x = point(4)
    here = lz.Linearizer(f, opaque="materialize").at(x)
    for seed in range(3):
        v, u = direction(x, seed), direction(here.value, 10 + seed)
        close(here.jvp_fn(v), native_jvp(lambda x: f(x, plain), (x,), (v,)))
        close(list(here.vjp_fn(u)), native_vjp(lambda x: f(x, plain), (x,), u))
    assert calls["forward"] == 2


def test_matrix_in_single_precision_and_with_mixed_dtypes():
    class Mixed(Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            return a.double() * b, a * 2

        @staticmethod
        def backward(ctx, g, h):
            a, b = (t.numpy() for t in ctx.saved_tensors)
            ga = (g.numpy() * b).astype(np.float32) + 2 * h.numpy()
            return torch.from_numpy(ga), torch.from_numpy(g.numpy() * a)

    a, b = point(5, torch.float32), point(5, F64, 2)
    here = lz.Linearizer(Mixed.apply, opaque="materialize").at(a, b)
    va, vb = direction(a), direction(b, 2)
    first, second = here.jvp_fn(va, vb)
    assert (first.dtype, second.dtype) == (F64, torch.float32)
    close(first, va.double() * b + a.double() * vb, rtol=1e-6, atol=1e-6)
    close(second, 2 * va)


def test_differentiable_product_through_a_matrix():
    Opaque, _ = counting()
    primals = point(4, seed=1), point(4, seed=2)

    def f(a, b):
        return Opaque.apply(a, b, 3.0)[0]

    here = lz.Linearizer(f, opaque="materialize").at(*primals)
    v = direction(primals[0]).requires_grad_()
    (got,) = torch.autograd.grad(here.jvp_fn(v, None), v, torch.ones(4, dtype=F64))
    close(got, primals[1])
