"""The bridge to SciPy: its solvers against dense algebra, with the runs of f counted."""

import numpy as np
import pytest
import scipy.optimize as so
import scipy.sparse.linalg as sla
import torch

import linearize as lz
import linearize.scipy
from tests.support.comparing import Counted, noted
from tests.support.functions import rand

# -- linear solvers -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tall():
    """A well-conditioned nonlinear map of 6 numbers to 9."""
    A = rand(9, 6)
    f = Counted(lambda x: A @ (x + 0.1 * x.sin()))
    x = rand(6, seed=1)
    matrix = torch.autograd.functional.jacobian(f.f, x)
    return f, lz.Linearizer(f).at(x), matrix.numpy()


def test_symmetric_solvers(tall):
    f, here, M = tall
    G = lz.scipy.aslinearoperator(here.jacobian.gram())
    b = M.T @ np.arange(9.0)
    want = np.linalg.solve(M.T @ M, b)
    for solve in (sla.cg, sla.minres, sla.gmres):
        x, info = solve(G, b, rtol=1e-12)
        assert info == 0
        np.testing.assert_allclose(x, want, rtol=1e-6)
    w, V = sla.eigsh(G, k=2)
    W = np.linalg.eigvalsh(M.T @ M)
    np.testing.assert_allclose(w, W[-2:], rtol=1e-9)
    np.testing.assert_allclose(G @ V, V * w, atol=1e-8 * W[-1])
    assert f.runs == 1


def test_least_squares_solvers(tall):
    f, here, M = tall
    A = lz.scipy.aslinearoperator(here)
    b = np.arange(9.0)
    want = np.linalg.lstsq(M, b)[0]
    for solve in (sla.lsmr, sla.lsqr):
        x = solve(A, b, atol=1e-14, btol=1e-14)[0]
        np.testing.assert_allclose(x, want, rtol=1e-7)
    s = np.sort(sla.svds(A, k=3, return_singular_vectors=False))
    np.testing.assert_allclose(s, np.linalg.svd(M, compute_uv=False)[2::-1], rtol=1e-8)
    assert f.runs == 1


def test_complex_operator():
    z = rand(4, dtype=torch.complex128)
    A = rand(4, 4, dtype=torch.complex128, seed=1) + 5 * torch.eye(4)
    here = lz.Linearizer(lambda z: A @ z.exp()).at(z)
    M = (A * z.exp()).numpy()
    S = lz.scipy.aslinearoperator(here)
    b = np.arange(4) + 1j
    x, info = sla.gmres(S, b, rtol=1e-12)
    assert info == 0
    np.testing.assert_allclose(x, np.linalg.solve(M, b), rtol=1e-8)


def test_arrays_of_other_dtypes(tall):
    _, here, M = tall
    S = lz.scipy.aslinearoperator(here)
    v = np.arange(6)
    np.testing.assert_allclose(S @ v, M @ v)
    np.testing.assert_allclose(S @ (v + 2j * v), M @ (v + 2j * v))
    backwards = np.arange(6.0)[::-1]  # negative strides
    np.testing.assert_allclose(S @ backwards, M @ backwards)
    single = lz.Linearizer(torch.sin).at(torch.ones(3)).jacobian
    S = lz.scipy.aslinearoperator(single)
    assert S.dtype == np.float32
    np.testing.assert_allclose(S @ np.ones(3), np.cos(np.ones(3)), rtol=1e-6)
    half = lz.Linearizer(torch.sin).at(torch.ones(3, dtype=torch.bfloat16)).jacobian
    assert lz.scipy.aslinearoperator(half).dtype == np.float32


def test_results_share_no_memory():
    here = lz.Linearizer(lambda x: x.view(-1)).at(rand(3))
    S = lz.scipy.aslinearoperator(here)
    v = np.ones(3)
    out = S @ v
    out[:] = 7
    assert np.array_equal(v, np.ones(3))
    p = lz.scipy.VectorFunction(lambda x: x * x, rand(3))
    p.fun(p.x0)[:] = 7
    p.jac(p.x0)[:] = 7
    np.testing.assert_allclose(p.fun(p.x0), p.x0**2)


def test_what_is_no_operator_is_refused():
    with pytest.raises(lz.errors.StructureError, match="ndarray"):
        lz.scipy.aslinearoperator(np.eye(2))


# -- optimizers ---------------------------------------------------------------------------


def rosenbrock_residuals(x):
    return torch.cat([10 * (x[1:] - x[:-1] ** 2), 1 - x[:-1]])


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


@pytest.mark.parametrize("kind", ["dense", "operator"])
@pytest.mark.parametrize("method", ["trf", "dogbox", "lm"])
def test_least_squares(kind, method):
    if method == "lm" and kind == "operator":
        pytest.skip("SciPy's lm takes dense Jacobians only")
    f = Counted(rosenbrock_residuals)
    p = lz.scipy.VectorFunction(f, torch.full((4,), -1.2, dtype=torch.float64), jac=kind)
    points = set()
    options = {} if method == "lm" else {"tr_solver": "lsmr" if kind == "operator" else "exact"}
    sol = so.least_squares(
        noted(p.fun, points), p.x0, noted(p.jac, points), method=method, **options
    )
    assert sol.success
    np.testing.assert_allclose(sol.x, np.ones(4), atol=1e-6)
    assert f.runs == len(points)
    reference = so.least_squares(
        lambda x: rosenbrock_residuals(torch.tensor(x)).numpy(), p.x0, method=method
    )
    np.testing.assert_allclose(sol.x, reference.x, atol=1e-6)


@pytest.mark.parametrize("method", ["trust-krylov", "trust-ncg", "Newton-CG", "BFGS"])
def test_minimize(method):
    f = Counted(rosenbrock)
    p = lz.scipy.ScalarFunction(f, torch.tensor([-1.2, 1.0, 0.7], dtype=torch.float64))
    points, x0 = set(), p.x0
    hessp = {} if method == "BFGS" else {"hessp": noted(p.hessp, points)}
    sol = so.minimize(noted(p.fun, points), x0, jac=noted(p.jac, points), method=method, **hessp)
    assert sol.success, sol.message
    np.testing.assert_allclose(sol.x, np.ones(3), atol=1e-4)
    assert f.runs == len(points)


def test_scalar_function_against_scipys_own_derivatives():
    p = lz.scipy.ScalarFunction(rosenbrock, rand(5))
    for x in (p.x0, p.x0 + 0.3):
        np.testing.assert_allclose(p.fun(x), so.rosen(x))
        np.testing.assert_allclose(p.jac(x), so.rosen_der(x))
        H = so.rosen_hess(x)
        for _ in range(4):
            np.testing.assert_allclose(p.hessp(x, np.arange(5.0)), H @ np.arange(5.0))
        np.testing.assert_allclose(p.hess(x) @ np.eye(5), H, atol=1e-10)


def test_trust_constr_takes_the_hessian_operator():
    p = lz.scipy.ScalarFunction(rosenbrock, torch.zeros(3, dtype=torch.float64))
    sol = so.minimize(p.fun, p.x0, jac=p.jac, hess=p.hess, method="trust-constr")
    np.testing.assert_allclose(sol.x, np.ones(3), atol=1e-5)


def test_pytrees_and_other_leaves():
    data = torch.tensor([1, 2, 3])

    def f(p):
        return ((p["a"] * p["n"] - 1) ** 2).sum() + (p["b"] - 2).pow(2)

    x0 = {"a": rand(3), "n": data, "b": torch.tensor(0.5, dtype=torch.float64)}
    p = lz.scipy.ScalarFunction(f, x0)
    sol = so.minimize(p.fun, p.x0, jac=p.jac, hessp=p.hessp, method="trust-krylov")
    best = p.unravel(sol.x)
    torch.testing.assert_close(best["a"], 1 / data.double())
    torch.testing.assert_close(best["b"], torch.tensor(2.0, dtype=torch.float64))
    assert best["n"] is data


def test_gradient_of_the_sum_of_squares():
    p = lz.scipy.VectorFunction(rosenbrock_residuals, rand(4))
    np.testing.assert_allclose(p.gradient(p.x0), p.jac(p.x0).T @ p.fun(p.x0))
    np.testing.assert_allclose(p.gradient(p.x0), so.rosen_der(p.x0) / 2)


def bratu(u):
    """A boundary value problem: u'' + exp(u) = 0 on a grid."""
    padded = torch.nn.functional.pad(u, (1, 1))
    h = 1 / (len(u) + 1)
    return (padded[2:] - 2 * u + padded[:-2]) / h**2 + u.exp()


def test_root_krylov_runs_on_values_alone():
    f = Counted(lambda x: x + 0.5 * x.sin() - 1)
    p = lz.scipy.VectorFunction(f, torch.zeros(5, dtype=torch.float64))
    points = set()
    sol = so.root(noted(p.fun, points), p.x0, method="krylov", tol=1e-9)
    assert sol.success
    assert f.runs == len(points)
    sol = so.root(p.fun, p.x0, jac=p.jac, tol=1e-12)
    np.testing.assert_allclose(sol.x + 0.5 * np.sin(sol.x), 1.0)


def test_newton_krylov():
    f = Counted(bratu)
    u0 = torch.zeros(40, dtype=torch.float64)
    sol = lz.scipy.newton_krylov(f, u0, tol=1e-9)
    assert sol.success, sol.message
    assert f.runs == sol.nfev == sol.nit + 1  # no step was cut here
    assert sol.njvp > sol.nit
    assert bratu(sol.x).abs().max() < 1e-9
    reference = so.root(lambda u: bratu(torch.tensor(u)).numpy(), u0.numpy(), tol=1e-12)
    np.testing.assert_allclose(sol.x.numpy(), reference.x, atol=1e-8)
    # A preconditioner saves products.
    T = np.diag(np.full(40, -2.0)) + np.diag(np.ones(39), 1) + np.diag(np.ones(39), -1)
    inverse = np.linalg.inv(T * 41**2)
    better = lz.scipy.newton_krylov(
        bratu, u0, tol=1e-9, preconditioner=lambda here: sla.aslinearoperator(inverse)
    )
    assert better.success
    assert better.njvp < sol.njvp / 3
    np.testing.assert_allclose(better.x.numpy(), reference.x, atol=1e-8)


def test_newton_krylov_damps_its_steps_and_says_when_it_fails():
    f = Counted(torch.atan)  # the full step diverges from |x| > 1.39
    sol = lz.scipy.newton_krylov(f, torch.tensor([3.0], dtype=torch.float64))
    assert sol.success
    assert abs(sol.x.item()) < 1e-9
    assert f.runs == sol.nfev > sol.nit + 1
    none = lz.scipy.newton_krylov(lambda x: x * x + 1, torch.ones(1, dtype=torch.float64))
    assert not none.success
    stopped = lz.scipy.newton_krylov(bratu, torch.zeros(5, dtype=torch.float64), max_iterations=1)
    assert not stopped.success
    assert "1 Newton steps" in stopped.message
    with pytest.raises(lz.errors.SpaceError):
        lz.scipy.newton_krylov(lambda x: x[:1], torch.ones(2, dtype=torch.float64))


def test_wrong_arguments():
    x = rand(3)
    with pytest.raises(lz.errors.OptionError):
        lz.scipy.VectorFunction(torch.sin, x, jac="banded")
    with pytest.raises(lz.errors.StructureError):
        lz.scipy.VectorFunction(torch.sin, 3.0)
    p = lz.scipy.ScalarFunction(torch.sin, x)
    with pytest.raises(lz.errors.StructureError, match=r"one real number.*\(3,\)"):
        p.fun(p.x0)
    with pytest.raises(lz.errors.SpaceError):
        lz.scipy.VectorFunction(torch.sin, x).fun(np.ones(4))
