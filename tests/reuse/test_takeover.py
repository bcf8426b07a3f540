"""Programs taken over from another graph are held against the graph at hand.

The signature is made blind here, so that graphs share programs that they must not share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import linearize as lz
from linearize._capture import signature as _signature
from linearize._capture.capture import capture
from linearize._points import by_engine as _by_engine
from linearize._reuse import takeover
from linearize._reuse.shared import SHARED
from linearize.errors import ReuseError

D = torch.float64
A, B, X, V = (
    torch.randn(4, dtype=D, generator=torch.Generator().manual_seed(k)) for k in range(4)
)


class Sine(torch.autograd.Function):
    calls = 0

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        Sine.calls += 1
        return g * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx: Any, t: torch.Tensor) -> torch.Tensor:
        Sine.calls += 1
        return t * ctx.saved_tensors[0].cos()


def built_in(a: torch.Tensor, b: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: ((x * a).tanh() * b).exp()


def with_function(a: torch.Tensor, b: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    def f(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = Sine.apply(x * a)  # type: ignore[no-untyped-call]
        return (y * b).exp()

    return f


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    SHARED.clear()
    monkeypatch.setattr(_signature, "_shared", lambda *_: ())
    monkeypatch.setattr(_by_engine, "BY_ENGINE", 0)  # or nothing is taken over at once


def jacobian(f: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    found = torch.autograd.functional.jacobian(f, X)
    assert isinstance(found, torch.Tensor)
    return found


@pytest.mark.parametrize("make", [built_in, with_function])
@pytest.mark.parametrize("products", [1, 5])
@pytest.mark.parametrize("direction", ["jvp_fn", "vjp_fn"])
@pytest.mark.usefixtures("blind")
def test_a_wrong_program_is_an_error_and_then_recorded_anew(
    make: Any, products: int, direction: str
) -> None:
    current = make(A, A)
    lin = lz.Linearizer(lambda x: current(x), maxsize=0)
    here = lin.at(X)
    for _ in range(products):
        here.jvp_fn(V)
        here.vjp_fn(V)
    current = make(A, B)
    here = lin.at(X)
    with pytest.raises(ReuseError, match=r"not the one of this graph, from \w+Backward0? on"):
        getattr(here, direction)(V)
    j = jacobian(current)
    for _ in range(5):
        torch.testing.assert_close(here.jvp_fn(V), j @ V)
        torch.testing.assert_close(here.vjp_fn(V)[0], j.T @ V)
    here = lin.at(X)  # takes over what was recorded just now
    torch.testing.assert_close(here.jvp_fn(V), j @ V)
    assert (lin.stats().recorded, lin.stats().reused) == (2, 1)


@pytest.mark.usefixtures("blind")
def test_also_between_linearizers() -> None:
    lz.Linearizer(built_in(A, A)).at(X).jvp_fn(V)
    with pytest.raises(ReuseError):
        lz.Linearizer(built_in(A, B)).at(X).jvp_fn(V)


@pytest.mark.usefixtures("blind")
def test_never_means_never() -> None:
    lin = lz.Linearizer(built_in(A, A), check="never")
    lin.at(X).jvp_fn(V)
    got = lz.Linearizer(built_in(A, B), check="never").at(X).jvp_fn(V)
    assert not torch.allclose(got, jacobian(built_in(A, B)) @ V)  # nobody looks, as asked for


@pytest.mark.parametrize(("check", "times"), [("structure", 2), ("always", 6), ("never", 0)])
def test_how_often_the_graph_is_asked(
    check: Any, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    SHARED.clear()
    asked = []
    walk = takeover.engine_pullback

    def counted(*args: Any) -> Any:
        asked.append(1)
        return walk(*args)

    monkeypatch.setattr(takeover, "engine_pullback", counted)
    lin = lz.Linearizer(built_in(A, B), check=check)
    for k in range(7):
        here = lin.at(X + k / 10)
        here.vjp_fn(V)
        here.jvp_fn(V)
        if k == 1 and check == "structure":
            assert len(asked) == 1  # one walk serves both directions
    # The plain and the simplified program of each direction are looked at once, at most.
    assert len(asked) <= times
    assert bool(asked) == bool(times)


def test_custom_functions_are_not_called_for_it() -> None:
    SHARED.clear()
    lin = lz.Linearizer(with_function(A, B), maxsize=0)
    for _ in range(3):
        Sine.calls = 0
        here = lin.at(X)
        here.jvp_fn(V)
        here.vjp_fn(V)
        assert Sine.calls == 2


@pytest.mark.parametrize("make", [built_in])
def test_the_walk_is_what_the_engine_computes(make: Any) -> None:
    def f(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        w = y.sin()  # receives one and the same gradient twice
        return make(A, B)(x) * (w + w).sum(), (x[:2, None] * y).float().cumsum(0) + y[0]

    y = torch.randn(3, dtype=D)
    captured = capture(f, (X, y), {}, (0, 1))
    u = [torch.randn(4, dtype=D), torch.randn(2, 3)]
    got = takeover.engine_pullback(captured.graph(), u, takeover.StandIns())
    leaves = X.clone().requires_grad_(), y.clone().requires_grad_()
    expected = torch.autograd.grad(f(*leaves), leaves, u)
    torch.testing.assert_close(list(got), list(expected))
