"""The linear systems behind implicit derivatives: large ones, batches, transforms."""

import pytest
import torch

import linearize as lz
from linearize import func
from linearize._spaces import solvers as ways
from linearize.implicit import least_squares, minimum, root
from tests.support.functions import rand

F64 = torch.float64


def tridiagonal(x, p):
    """A boundary value problem, nonlinear, diagonally dominant."""
    padded = torch.nn.functional.pad(x, (1, 1))
    return 4 * x - padded[2:] - padded[:-2] + x**3 - p


def newton(f, x, p):
    for _ in range(30):
        J = torch.autograd.functional.jacobian(lambda x: f(x, p), x)
        x = x - torch.linalg.solve(J, f(x, p))
    return x


@pytest.mark.parametrize("attach", [root, None], ids=["root", "minimum"])
def test_large_systems_are_not_written_out(attach, monkeypatch):
    """The same numbers as for a small system, repeated, by products alone."""
    n = 7
    p = rand(n)
    small = newton(tridiagonal, torch.zeros(n, dtype=F64), p)
    k = 300
    assert n * k > ways.DENSE_UP_TO

    def f(x, p):
        return torch.vmap(tridiagonal)(x.view(k, n), p.view(k, n)).view(-1)

    def energy(x, p):
        x, p = x.view(k, n), p.view(k, n)
        padded = torch.nn.functional.pad(x, (1, 0))
        return (2 * x**2 - x * padded[:, :-1] + x**4 / 4 - p * x).sum()

    def refuse(*args, **options):
        raise AssertionError("written out")

    monkeypatch.setattr(ways.LinearOperator, "materialize", refuse)
    q = p.repeat(k).requires_grad_()
    x = root(f, small.repeat(k), q) if attach is root else minimum(energy, small.repeat(k), q)
    u = rand(n, seed=1)
    (got,) = torch.autograd.grad(x, q, u.repeat(k))
    monkeypatch.undo()
    J = torch.autograd.functional.jacobian(lambda x: tridiagonal(x, p), small)
    torch.testing.assert_close(got.view(k, n)[5], torch.linalg.solve(J.T, u), rtol=1e-7, atol=1e-9)


def test_without_torchsparsegradutils(monkeypatch):
    monkeypatch.setattr(ways, "find_spec", lambda name: None)
    n = 1_200
    d = 1 + rand(n).abs()
    y = rand(n, seed=1).requires_grad_()
    x = minimum(lambda x, y: (d * x * x / 2 - x * y).sum(), (y / d).detach(), y)
    (g,) = torch.autograd.grad(x.sum(), y)
    torch.testing.assert_close(g, 1 / d)


def test_a_system_that_products_do_not_solve_is_written_out():
    n = 1_100

    def shifted(x, p):  # GMRES makes no progress on a shift before the last step
        return x.roll(1) - p

    p = rand(n).requires_grad_()
    x = root(shifted, p.detach().roll(-1), p)
    u = rand(n, seed=1)
    (g,) = torch.autograd.grad(x, p, u)
    torch.testing.assert_close(g, u.roll(1))


# -- batches ------------------------------------------------------------------------------


def layer(z, x, W):
    """A fixed point for each row: a deep equilibrium layer."""
    return {"z": z["z"] - torch.tanh(z["z"] @ W.T + x)}


def solved(x, W):
    z = torch.zeros_like(x)
    for _ in range(300):
        z = torch.tanh(z @ W.T + x)
    return z


def test_a_batch_is_solved_in_one_go(monkeypatch):
    W = (0.3 * rand(4, 4)).requires_grad_()
    x = rand(50, 4, seed=1).requires_grad_()
    u = rand(50, 4, seed=2)
    want = torch.autograd.grad(solved(x, W), (x, W), u)
    found = {"z": solved(x, W).detach()}
    sizes = []
    factorized = torch.linalg.lu_factor_ex
    monkeypatch.setattr(
        torch.linalg, "lu_factor_ex", lambda A: sizes.append(tuple(A.shape)) or factorized(A)
    )
    z = root(layer, found, x, W, batch=True)
    for _ in range(3):
        got = torch.autograd.grad(z["z"], (x, W), u, retain_graph=True)
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)
    assert sizes == [(50, 4, 4)]
    # forward mode
    v = rand(50, 4, seed=3)
    _, want = torch.func.jvp(lambda x: solved(x, W.detach()), (x.detach(),), (v,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), v)
        out = root(layer, found, dual, W.detach(), batch=True)["z"]
        got = torch.autograd.forward_ad.unpack_dual(out).tangent
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


def test_batches_of_pytrees_and_of_minima():
    A = rand(3, 5, 5)
    A = A @ A.mT + torch.eye(5, dtype=F64)
    b = rand(3, 5, seed=1).requires_grad_()

    def loss(x, b):
        y = torch.cat([x["p"].reshape(3, 4), x["q"][:, None]], 1)
        return (y * (A @ y[..., None])[..., 0]).sum() / 2 - (b * y).sum()

    s = torch.linalg.solve(A, b)
    start = {"p": s.detach()[:, :4].reshape(3, 2, 2), "q": s.detach()[:, 4]}
    u, w = rand(3, 2, 2, seed=2), rand(3, seed=3)
    x = minimum(loss, start, b, batch=True)
    (got,) = torch.autograd.grad((x["p"], x["q"]), b, (u, w))
    (want,) = torch.autograd.grad(s, b, torch.cat([u.reshape(3, 4), w[:, None]], 1))
    torch.testing.assert_close(got, want)
    x = least_squares(lambda x, b: (x - b) * 3, b.detach(), b, batch=True)
    torch.testing.assert_close(torch.autograd.grad(x.sum(), b)[0], torch.ones(3, 5, dtype=F64))


def test_what_is_no_batch_is_refused():
    p = rand(4, 2).requires_grad_()
    # The entries are not independent: the residual shows it.
    M = torch.eye(4, dtype=F64) + 0.3 * rand(4, 4)
    found = torch.linalg.solve(M, p.detach())
    x = root(lambda x, p: M @ x - p, found, p, batch=True)
    with pytest.raises(lz.errors.LinearizeError, match="left a residual"):
        x.sum().backward()
    x = root(lambda x, p: M @ x - p, found, p)
    (g,) = torch.autograd.grad(x.sum(), p)
    torch.testing.assert_close(g, torch.linalg.solve(M.T, torch.ones(4, 2, dtype=F64)))
    with pytest.raises(lz.errors.SpaceError, match="batch=True"):
        root(lambda x, p: (x - p).view(2, 4), p.detach(), p, batch=True)
    q = torch.tensor(2.0, dtype=F64, requires_grad=True)
    with pytest.raises(lz.errors.SpaceError, match="batch=True"):
        root(lambda x, q: x - q, q.detach(), q, batch=True)


# -- transforms ---------------------------------------------------------------------------


def kepler(x, m):
    return x - 0.3 * x.sin() - m


def orbit(m):
    x = m.detach().clone()
    for _ in range(100):
        x = 0.3 * x.sin() + m.detach()
    return x


def test_jacobians_of_solutions():
    m = rand(3)
    x = orbit(m)
    want = torch.diag(1 / (1 - 0.3 * x.cos()))
    f = lambda m: root(kepler, x, m)  # noqa: E731
    torch.testing.assert_close(func.jacrev(f)(m), want)
    torch.testing.assert_close(func.jacfwd(f)(m), want)
    torch.testing.assert_close(torch.autograd.functional.jacobian(f, m), want)


@pytest.mark.parametrize(
    "use",
    [
        lambda f, m: torch.func.jacrev(f)(m),
        lambda f, m: torch.func.jacfwd(f)(m),
        lambda f, m: torch.func.grad(lambda m: f(m).sum())(m),
        lambda f, m: torch.vmap(f)(m[:, None].expand(3, 3)),
        lambda f, m: torch.func.jvp(f, (m,), (m,)),
    ],
)
@pytest.mark.parametrize("attach", [root, minimum, least_squares])
def test_transforms_are_refused_with_a_way_out(use, attach):
    m = rand(3)
    x = orbit(m)
    with pytest.raises(lz.errors.UnsupportedError, match=r"batch=True.*jacrev"):
        use(lambda m: attach(kepler, x, m), m)
