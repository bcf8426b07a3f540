"""Calls inside of traces and of compiled functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import linearize as lz
import linearize.func as lf
from linearize import curvature, functional, implicit
from linearize.errors import UnsupportedError

pytestmark = pytest.mark.filterwarnings("ignore")  # of PyTorch's compiler, of itself

D = torch.float64
X = torch.tensor([0.1, 0.2, 0.3], dtype=D)
Y = torch.tensor([1.0, -1.0, 2.0], dtype=D)
U = torch.tensor([1.0, 2.0, 3.0], dtype=D)


def total(x: torch.Tensor) -> torch.Tensor:
    return x.sin().sum()


FUNCTIONS: dict[str, tuple[Callable[[torch.Tensor], Any], Callable[..., torch.Tensor]]] = {
    "vjp": (lambda x: lf.vjp(torch.sin, x)[1](U)[0], lambda x: x.cos() * U),
    "jvp": (lambda x: lf.jvp(torch.sin, (x,), (U,))[1], lambda x: x.cos() * U),
    "linearize": (lambda x: lf.linearize(torch.sin, x)[1](U), lambda x: x.cos() * U),
    "jacrev": (lambda x: lf.jacrev(torch.sin)(x) @ U, lambda x: x.cos() * U),
    "jacfwd": (lambda x: lf.jacfwd(torch.sin)(x) @ U, lambda x: x.cos() * U),
    "hessian": (lambda x: lf.hessian(total)(x) @ U, lambda x: -x.sin() * U),
    "jacobian": (lambda x: functional.jacobian(torch.sin, x) @ U, lambda x: x.cos() * U),
    "functional.hessian": (lambda x: functional.hessian(total, x) @ U, lambda x: -x.sin() * U),
    "hvp": (lambda x: functional.hvp(total, x, U)[1], lambda x: -x.sin() * U),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_make_fx(name: str) -> None:
    f, expected = FUNCTIONS[name]
    traced = make_fx(f)(X)
    for x in (X, Y):
        torch.testing.assert_close(traced(x), expected(x))


def test_make_fx_of_a_point_is_refused() -> None:
    calls: list[Callable[[torch.Tensor], Any]] = [
        lambda x: lz.Linearizer(torch.sin).at(x).jvp_fn(U),
        lambda x: curvature.hessian(total, x) @ U,
        lambda x: implicit.root(lambda z, p: z - p, x, x),
        lambda x: lf.linear_transpose(lambda z: 2 * z, x)(U),
    ]
    for call in calls:
        with pytest.raises(UnsupportedError, match="cannot be traced"):
            make_fx(call)(X)


def test_make_fx_of_a_product() -> None:
    here = lz.Linearizer(torch.sin).at(X)
    traced = make_fx(lambda v: here.jvp_fn(v))(U)
    for v in (U, Y):
        torch.testing.assert_close(traced(v), X.cos() * v)
        torch.testing.assert_close(here.jvp_fn(v), X.cos() * v)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_inside_a_compiled_function(name: str) -> None:
    f, expected = FUNCTIONS[name]
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: 2 * f(x), backend="eager")
    for x in (X, Y):
        torch.testing.assert_close(compiled(x), 2 * expected(x))


def test_a_point_inside_a_compiled_function() -> None:
    torch._dynamo.reset()
    runs = []

    def f(x: torch.Tensor) -> torch.Tensor:
        runs.append(1)
        return x.sin()

    lin = lz.Linearizer(f)
    compiled = torch.compile(lambda x: 2 * lin.at(x).value, backend="eager")
    for x in (X, Y):
        torch.testing.assert_close(compiled(x), 2 * x.sin())
    assert len(runs) == 2
    root = torch.compile(
        lambda p: 2 * implicit.root(lambda x, p: x - p, p.detach(), p), backend="eager"
    )
    torch.testing.assert_close(root(X), 2 * X)
