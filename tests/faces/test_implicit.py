"""Derivatives of solutions against formulas, differences and unrolled solvers."""

import numpy as np
import pytest
import scipy.optimize as so
import torch
from torch.autograd import forward_ad

import linearize as lz
from linearize.implicit import least_squares, minimum, root
from tests.support.functions import rand

F64 = torch.float64


def kepler(x, p):
    """Kepler's equation for several orbits, coupled a little."""
    return x - p["e"] * x.sin() - p["m"] + 0.1 * x.mean()


def solve_kepler(p):
    x = p["m"].clone()
    for _ in range(200):
        x = p["e"] * x.sin() + p["m"] - 0.1 * x.mean()
    return x


P = {"e": torch.tensor([0.3, 0.1, 0.5], dtype=F64), "m": torch.tensor([1.0, 2.0, 0.7], dtype=F64)}


def leaves(requires_grad=True):
    return {k: t.clone().requires_grad_(requires_grad) for k, t in P.items()}


def test_root_against_the_unrolled_solver():
    runs = 0

    def f(x, p):
        nonlocal runs
        runs += 1
        return kepler(x, p)

    p = leaves()
    u = rand(3)
    want = torch.autograd.grad(solve_kepler(p), list(p.values()), u)
    with torch.no_grad():
        found = solve_kepler(p)
    x = root(f, found, p)
    assert torch.equal(x, found)
    for _ in range(4):
        got = torch.autograd.grad(x, list(p.values()), u, retain_graph=True)
        torch.testing.assert_close(got, want)
    assert runs == 1


def test_forward_mode():
    v = {k: rand(3, seed=i) for i, k in enumerate(P)}
    _, want = torch.func.jvp(solve_kepler, (P,), (v,))
    with forward_ad.dual_level():
        dual = {k: forward_ad.make_dual(t, v[k]) for k, t in P.items()}
        x = root(kepler, solve_kepler(P), dual)
        got = forward_ad.unpack_dual(x).tangent
    torch.testing.assert_close(got, want)


def test_iterative_solvers_and_pytrees():
    tsgu = pytest.importorskip("torchsparsegradutils.utils")
    A = rand(6, 6) + 6 * torch.eye(6, dtype=F64)

    def f(x, A, b):
        return {"r": A @ torch.cat([x["a"], x["b"].reshape(-1)]) - b}

    b = rand(6, seed=1).requires_grad_()
    A.requires_grad_()
    s = torch.linalg.solve(A, b)
    u = rand(6, seed=2)
    want = torch.autograd.grad(s, (A, b), u)
    start = {"a": s.detach()[:2], "b": s.detach()[2:].view(2, 2)}
    x = root(f, start, A, b, solve=lambda M, c: tsgu.bicgstab(M.__matmul__, c))
    flat = torch.cat([x["a"], x["b"].reshape(-1)])
    got = torch.autograd.grad(flat, (A, b), u)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def curve(x, t, y):
    return x[0] * (x[1] * t).exp() + 0.3 * (x[0] * t) ** 2 - y


def test_least_squares_where_residuals_remain():
    t = torch.linspace(0, 1, 9, dtype=F64)
    y = 2 * (-t).exp() + 0.3 * rand(9)

    def solution(y):
        y = torch.tensor(y)
        half = lambda x: (curve(x, t, y) ** 2).sum() / 2  # noqa: E731
        x = torch.tensor(so.minimize(lambda x: half(torch.tensor(x)).item(), [1.0, -1.0]).x)
        for _ in range(4):  # Newton's method, to the last digit
            x = x - torch.linalg.solve(torch.func.hessian(half)(x), torch.func.grad(half)(x))
        return x.numpy()

    y.requires_grad_()
    x = least_squares(lambda x, y: curve(x, t, y), torch.tensor(solution(y.detach().numpy())), y)
    J = torch.stack([torch.autograd.grad(x[i], y, retain_graph=True)[0] for i in range(2)])
    h, base = 1e-4, y.detach().numpy()
    columns = [(solution(base + h * e) - solution(base - h * e)) / (2 * h) for e in np.eye(9)]
    np.testing.assert_allclose(J.numpy(), np.stack(columns, 1), rtol=1e-5, atol=1e-6)


def test_minimum_of_ridge_regression():
    A, y = rand(8, 3), rand(8, seed=1)
    k = torch.tensor(0.7, dtype=F64, requires_grad=True)

    def closed(k):
        return torch.linalg.solve(A.T @ A + k * torch.eye(3, dtype=F64), A.T @ y)

    def loss(x, k):
        return ((A @ x - y) ** 2).sum() / 2 + k * (x**2).sum() / 2

    u = rand(3, seed=2)
    (want,) = torch.autograd.grad(closed(k), k, u)
    (got,) = torch.autograd.grad(minimum(loss, closed(k), k), k, u)
    torch.testing.assert_close(got, want)


def test_what_cannot_be_right_is_refused():
    p = leaves()
    with torch.no_grad():
        found = solve_kepler(p)
    with pytest.raises(lz.errors.LinearizeError, match="no solution"):
        root(kepler, found + 1e-3, p)
    _ = root(kepler, found + 1e-3, p, tol=0.1)
    with pytest.raises(lz.errors.LinearizeError, match="no solution"):
        root(lambda x, p: x * float("nan"), found, p)
    with pytest.raises(lz.errors.SpaceError, match="returns 1"):
        root(lambda x, p: 0 * x[:1], found, p)
    with pytest.raises(lz.errors.UnsupportedError, match="complex"):
        root(kepler, found + 0j, p)
    x = root(kepler, found, p, solve=lambda A, b: 0 * b)
    with pytest.raises(lz.errors.LinearizeError, match="left a residual"):
        x.sum().backward()
    # A second derivative is refused, not wrong.
    for of in (torch.sum, lambda x: (x**3).sum()):
        x = root(kepler, found, p)
        (g,) = torch.autograd.grad(of(x), p["e"], create_graph=True)
        with pytest.raises(lz.errors.UnsupportedError, match="once"):
            torch.autograd.grad((g + p["e"] ** 2).sum(), p["e"])


def test_no_gradient_no_history():
    assert not root(kepler, solve_kepler(P), P).requires_grad
