"""Derivatives that would be lost without a word: an error or a warning says so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import linearize as lz
import linearize.func as lf
from linearize import curvature, functional, implicit
from linearize.errors import IndependenceWarning, StalenessError, UnsupportedError
from linearize.testing import check_linearization

D = torch.float64
X = torch.tensor([0.4, -1.2, 0.9], dtype=D)
V = torch.tensor([1.0, 0.5, -2.0], dtype=D)


def linear() -> tuple[torch.nn.Linear, dict[str, torch.Tensor], torch.Tensor]:
    net = torch.nn.Linear(3, 2, dtype=D)
    return net, dict(net.named_parameters()), torch.randn(5, 3, dtype=D)


def test_parameters_read_behind_the_argument() -> None:
    net, params, x = linear()
    calls = [
        lambda: lz.Linearizer(lambda p: net(x)).at(params),
        lambda: lz.Linearizer(lambda p, y: net(y), argnums=0).at(params, x),
        lambda: lf.vjp(lambda p: net(x), params),
        lambda: lf.jacrev(lambda p: net(x))(params),
        lambda: lf.hessian(lambda p: net(x).square().sum())(params),
        lambda: functional.hvp(lambda w, b: net(x).square().sum(), (net.weight, net.bias), None),
        lambda: curvature.hessian(lambda p: net(x).square().sum(), params),
        lambda: curvature.gauss_newton(lambda p, y: net(y), params, "mse", [(x, net(x).detach())]),
    ]
    for call in calls:
        with pytest.raises(UnsupportedError, match=r"primal.*very tensor.*functional_call"):
            call()


def test_the_tensor_that_is_at_fault_is_named() -> None:
    net, params, x = linear()
    with pytest.raises(UnsupportedError, match=r"primal\[0\]\['bias'\].*\(2,\)"):
        lz.Linearizer(lambda p: x @ p["weight"].mT + net.bias).at(params)


def test_a_view_of_a_primal_and_a_primal_with_a_history() -> None:
    w = torch.randn(3, dtype=D, requires_grad=True)
    with pytest.raises(UnsupportedError, match="very tensor"):
        lz.Linearizer(lambda p: w[:2] * 2).at(w)
    made = w * 2
    with pytest.raises(UnsupportedError, match="very tensor"):
        lz.Linearizer(lambda p: made.sin()).at(made)
    first, second = (w * 3).split([1, 2])
    # The other half of one node is not the primal.
    with pytest.warns(IndependenceWarning):
        lz.Linearizer(lambda p: first * 2).at(second)


def test_a_tensor_may_be_read_beside_the_argument() -> None:
    """A residual of one step: the previous state is where it starts."""
    previous = X.clone().requires_grad_()
    here = lz.Linearizer(lambda u: u - previous + 0.1 * u**3).at(previous)
    torch.testing.assert_close(here.jvp_fn(V), V + 0.3 * X**2 * V)
    value, vjp_fn = lf.vjp(lambda u: u * previous, previous)
    torch.testing.assert_close(vjp_fn(V)[0], X * V)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), previous)[0], 2 * X)


def test_the_check_fails_too() -> None:
    net, params, x = linear()
    with pytest.raises(UnsupportedError, match="very tensor"):
        check_linearization(lambda p: net(x), params, dtype=None)


def test_a_value_that_depends_on_no_primal_warns() -> None:
    w = torch.ones(3, dtype=D, requires_grad=True)
    functions: list[Any] = [
        lambda x: torch.from_numpy(np.sin(x.detach().numpy())),
        lambda x: torch.tensor([t.item() for t in x], dtype=D),
        lambda x: x.detach() * 2,
        lambda x: w * 2,
        lambda x: {"a": torch.ones(2), "b": w.sum()},
    ]
    for f in functions:
        with pytest.warns(IndependenceWarning, match="no primal.*filterwarnings") as seen:
            here = lz.Linearizer(f).at(X)
        assert seen[0].filename == __file__
        assert not any(t.any() for t in torch.utils._pytree.tree_leaves(here.jvp_fn(V)))
        with pytest.warns(IndependenceWarning):
            lf.vjp(f, X)
    for f in functions[:4]:
        with pytest.warns(IndependenceWarning):
            curvature.hessian(lambda x, f=f: f(x).sum(), X)
        with pytest.warns(IndependenceWarning):
            functional.hvp(lambda x, f=f: f(x).sum(), X, V)


def test_what_is_constant_by_nature_does_not_warn() -> None:
    assert not lf.hessian(lambda x: x.sum())(X).any()
    assert not functional.hessian(lambda x: x.sum(), X).any()
    assert not (curvature.hessian(lambda x: x.sum(), X) @ V).any()
    assert not functional.hvp(lambda x: x.sum(), X, V)[1].any()
    assert not lf.jacfwd(lf.jacrev(lambda x: 2 * x))(X).any()
    assert lz.Linearizer(lambda x: (x, torch.ones(2))).at(X).jvp_fn(V)[0] is not None
    H = lf.hessian(lambda x: (x.prod(), torch.ones((), dtype=D)))(X)
    assert H[0].any()
    assert not H[1].any()
    model, loss = lambda p: p["w"] * 2, lambda y: y.sum()
    assert not (curvature.gauss_newton(model, {"w": X}, loss) @ {"w": V})["w"].any()


def test_implicit_derivatives_by_what_is_closed_over() -> None:
    w = torch.tensor(0.5, dtype=D, requires_grad=True)
    z = torch.tensor(2.0, dtype=D)
    with pytest.raises(UnsupportedError, match="no arguments of it"):
        implicit.root(lambda z: z - w * z - 1.0, z)
    with pytest.raises(UnsupportedError, match="no arguments of it"):
        implicit.minimum(lambda z: (z - 1 / w) ** 2, z)
    with pytest.raises(UnsupportedError, match="no arguments of it"):
        implicit.least_squares(lambda z, p: z - p / w, z, torch.ones((), dtype=D))
    net = torch.nn.Linear(1, 1, dtype=D)
    start = torch.zeros(1, dtype=D)
    with pytest.raises(UnsupportedError, match=r"shapes .*\(1, 1\)"):
        implicit.root(lambda z: net(z) - net(start), start)

    x = implicit.root(lambda z, w: z - w * z - 1.0, z, w)
    torch.testing.assert_close(torch.autograd.grad(x, w)[0], torch.tensor(4.0, dtype=D))
    fixed = w.detach()
    assert implicit.root(lambda z: z - fixed * z - 1.0, z) == z
    with torch.no_grad():  # nobody asks for a derivative
        assert implicit.root(lambda z: z - w * z - 1.0, z) == z


@pytest.mark.parametrize("max_bytes", [None, 0])
@pytest.mark.parametrize("what", ["params", "inputs", "targets"])
def test_a_curvature_operator_notices_that_its_data_changed(what: str, max_bytes: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3, dtype=D, generator=generator)
    inputs = torch.randn(2, 4, 3, dtype=D, generator=generator)
    targets = torch.randn(2, 4, dtype=D, generator=generator)

    def loss(w: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ((x @ w).tanh() - y).square().sum()

    batches = [(x.clone(), y.clone()) for x, y in zip(inputs, targets, strict=True)]
    H = curvature.hessian(loss, w, batches, max_bytes=max_bytes)
    whole = torch.func.hessian(
        lambda w: sum(loss(w, x, y) for x, y in zip(inputs, targets, strict=True))
    )
    expected = whole(w) @ V
    torch.testing.assert_close(H @ V, expected)
    # The value stays: only the version tells of it.
    {"params": w, "inputs": batches[1][0], "targets": batches[1][1]}[what].mul_(1.0)
    try:
        got = H @ V
    except StalenessError:
        return
    assert max_bytes is None
    torch.testing.assert_close(got, expected)
