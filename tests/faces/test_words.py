"""Messages that say what to do, where they were found to be of no help."""

import numpy as np
import pytest
import torch

import linearize as lz
from linearize.curvature import gauss_newton, hessian
from linearize.implicit import root
from tests.support.functions import rand


@pytest.mark.parametrize("make", [hessian, gauss_newton], ids=lambda f: f.__name__)
def test_curvature_of_data_that_changed(make):
    data = rand(5, 3)
    w = rand(3, seed=1)
    if make is hessian:
        G = hessian(lambda w: (data @ w).exp().sum(), w)
    else:
        G = gauss_newton(lambda w: (data @ w).exp(), w, lambda y: (y**2).sum())
    data.mul_(2)
    with pytest.raises(lz.errors.StalenessError) as error:
        G @ w
    text = str(error.value)
    assert "changed in place" in text
    assert "version 1" in text
    assert "linearize anew" in text
    assert "anomaly" not in text
    assert "\n" not in text


def test_a_jvp_of_other_arguments():
    class Times(torch.autograd.Function):
        @staticmethod
        def forward(x, y):
            return x * y

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx, g):
            x, y = ctx.saved_tensors
            return g * y, g * x

        @staticmethod
        def jvp(ctx, t):
            return t

    x = rand(3)
    here = lz.Linearizer(Times.apply).at(x, x + 1)
    with pytest.raises(
        lz.errors.FunctionContractError, match="each of the 2 arguments of forward"
    ):
        here.jvp_fn(x, x)

    class Wrong(Times):
        @staticmethod
        def jvp(ctx, a, b):
            return a + "one"  # a mistake of its own stays what it is

    here = lz.Linearizer(Wrong.apply).at(x, x + 1)
    with pytest.raises(TypeError, match="unsupported operand"):
        here.jvp_fn(x, x)


def test_a_solve_that_returns_an_array():
    p = torch.ones(3, dtype=torch.float64, requires_grad=True)
    for solve, what in (
        (lambda A, b: b.numpy(), "ndarray"),
        (lambda A, b: (b, 0), "tuple of 2"),
        (lambda A, b: b[:2], r"float64\[2\]"),
        (lambda A, b: b.float(), r"float32\[3\]"),
    ):
        x = root(lambda x, p: 2 * x - p, p.detach() / 2, p, solve=solve)
        with pytest.raises(
            lz.errors.StructureError, match=rf"solve: expected.*float64\[3\].*{what}"
        ):
            x.sum().backward()


def test_functions_of_torch_have_their_names():
    assert repr(lz.Linearizer(torch.sin)).startswith("<Linearizer of sin: ")
    assert repr(lz.scipy.VectorFunction(torch.sin, [1.0])).startswith("<VectorFunction of sin: ")


def test_starts_that_are_no_tensors():
    with pytest.raises(lz.errors.StructureError, match="x: expected floating point tensors"):
        lz.implicit.root(torch.sin, np.zeros(3))
    with pytest.raises(lz.errors.StructureError, match=r"x0: expected rows of one length"):
        lz.scipy.VectorFunction(torch.sin, [[1, 2], [3]])
