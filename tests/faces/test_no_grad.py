"""`torch.no_grad()` inside f: as PyTorch's own function of the same name, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import Function

import linearize as lz
import linearize.func as lf
from linearize import functional
from linearize.errors import IndependenceWarning, UnsupportedError

# `torch.func.jvp`, the reference here, compiles something when it is first called.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

D = torch.float64
X = torch.tensor([0.4, -1.2, 0.9], dtype=D)
V = torch.tensor([1.0, 0.5, -2.0], dtype=D)
NET = torch.nn.Linear(3, 3, dtype=D)
Map = Callable[[torch.Tensor], torch.Tensor]


class Sevenfold(Function):
    """Its derivative is not that of its forward, so that one can tell who was asked."""

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def jvp(ctx: Any, t: torch.Tensor) -> torch.Tensor:
        return t * 7

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return g * 7


def part(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = torch.sin(x)
    return y * x


@torch.no_grad()
def decorated(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(NET(x)).exp()


def largest(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        m = x.max()
    return (x - m).exp()


def detached(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        order, scale = x.argsort(), x.detach().sum()
    return x[order] * scale


def switched(x: torch.Tensor) -> torch.Tensor:
    torch.set_grad_enabled(False)
    try:
        return x * x
    finally:
        torch.set_grad_enabled(True)


def nested(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        with torch.enable_grad():
            y = x.sin()
        z = y * 2
        with torch.no_grad():
            z = z * x
        return z + 1


def constant_only(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        w = NET.weight * 2
    return w @ x


def after_a_function(x: torch.Tensor) -> torch.Tensor:
    y = Sevenfold.apply(x)
    with torch.no_grad():
        return y * x


def written(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = torch.zeros(3, dtype=D)
        out[0] = x[0].sin()
    return out * x


def in_place(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return x.sin().cos_()


def custom(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return Sevenfold.apply(x) + x


def mapped(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y: torch.Tensor = torch.vmap(lambda t: t.sin() * 2)(x)
    return y * x


RIGHT = (part, decorated, largest, detached, switched, nested, constant_only, after_a_function)
REFUSED = (written, in_place, custom, mapped)
FORWARD: dict[str, Callable[[Map], torch.Tensor]] = {
    "jvp": lambda f: lf.jvp(f, (X,), (V,))[1],
    "linearize": lambda f: lf.linearize(f, X)[1](V),
    "jacfwd": lambda f: lf.jacfwd(f)(X) @ V,
    "jacobian": lambda f: functional.jacobian(f, X, strategy="forward-mode") @ V,
}


@pytest.mark.parametrize("face", FORWARD)
@pytest.mark.parametrize("f", RIGHT)
def test_forward_functions_see_through(f: Map, face: str) -> None:
    expected = torch.func.jvp(f, (X,), (V,))[1]
    assert expected.any()
    torch.testing.assert_close(FORWARD[face](f), expected)


@pytest.mark.parametrize("face", FORWARD)
@pytest.mark.parametrize("f", REFUSED)
def test_or_refuse(f: Map, face: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"{face}: .*no_grad"):
        FORWARD[face](f)


@pytest.mark.filterwarnings("ignore::linearize.errors.IndependenceWarning")
@pytest.mark.parametrize("f", [*RIGHT, written])
def test_reverse_functions_take_it_for_constant(f: Map) -> None:
    if f in (decorated, switched, after_a_function, nested):
        assert not lf.vjp(f, X)[1](V)[0].any()  # torch.func.vjp raises
        return
    torch.testing.assert_close(lf.vjp(f, X)[1](V), torch.func.vjp(f, X)[1](V))
    torch.testing.assert_close(lf.jacrev(f)(X), torch.func.jacrev(f)(X))
    here = lz.Linearizer(f).at(X)
    torch.testing.assert_close(here.jvp_fn(V), lf.jacrev(f)(X) @ V)


def test_a_hessian_through_it_is_refused() -> None:
    # In PyTorch the gradient takes the region for constant, and its derivative does not.
    with pytest.raises(UnsupportedError, match=r"hessian: .*no_grad"):
        lf.hessian(lambda x: part(x).sum())(X)


def test_statistics_kept_on_the_side_get_no_history() -> None:
    mean = torch.zeros(3, dtype=D)

    def f(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            mean.mul_(0.9).add_(x * 0.1)
        return x.sin()

    torch.testing.assert_close(lf.jvp(f, (X,), (V,))[1], X.cos() * V)
    assert not mean.requires_grad
    torch.testing.assert_close(mean, 0.1 * X)
    with pytest.raises(UnsupportedError, match="a write"):
        lf.jvp(lambda x: f(x) * mean, (X,), (V,))


def test_a_linearizer_warns_where_nothing_is_left() -> None:
    with pytest.warns(IndependenceWarning, match="no_grad"):
        here = lz.Linearizer(decorated).at(X)
    assert not here.jvp_fn(V).any()


def test_grad_mode_outside_of_f_is_of_no_account() -> None:
    with torch.no_grad():
        torch.testing.assert_close(lf.jvp(torch.sin, (X,), (V,))[1], X.cos() * V)
        torch.testing.assert_close(lf.hessian(lambda x: x.sin().sum())(X), -torch.diag(X.sin()))
