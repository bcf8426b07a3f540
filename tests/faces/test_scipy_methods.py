"""Every method of SciPy that takes derivatives or operators, with the runs of f counted."""

import functools
import queue
import threading

import numpy as np
import pytest
import scipy.integrate as si
import scipy.optimize as so
import scipy.sparse.linalg as sla
import torch

import linearize as lz
import linearize.scipy
from tests.support.comparing import Counted, noted
from tests.support.functions import rand


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def residuals(x):
    return torch.cat([10 * (x[1:] - x[:-1] ** 2), 1 - x[:-1]])


# -- minimize -----------------------------------------------------------------------------

FIRST = ["CG", "BFGS", "L-BFGS-B", "TNC", "SLSQP"]
SECOND = ["Newton-CG", "trust-ncg", "trust-krylov", "trust-constr"]
DENSE = ["dogleg", "trust-exact", "trust-constr"]


def convex(x):
    """Where `dogleg` may start: its Hessian must be positive definite on the way."""
    return ((x - 1) ** 2).sum() + ((x - 1) ** 4).sum() + (x[0] - x[1]).cosh()


def minimized(f, method, x0=(-1.2, 1.0, 0.7), **chosen):
    counted, points = Counted(f), set()
    p = lz.scipy.ScalarFunction(counted, list(x0), hess=chosen.get("kind", "operator"))
    derivatives = {name: noted(getattr(p, name), points) for name in chosen.get("wants", ())}
    sol = so.minimize(
        noted(p.fun, points), p.x0, jac=noted(p.jac, points), method=method, **derivatives
    )
    assert counted.runs == len(points)
    return sol


@pytest.mark.parametrize("method", FIRST)
def test_minimize_by_gradients(method):
    sol = minimized(rosenbrock, method)
    reference = so.minimize(so.rosen, [-1.2, 1.0, 0.7], jac=so.rosen_der, method=method)
    assert sol.fun <= max(2 * reference.fun, 1e-4)


@pytest.mark.parametrize("method", SECOND)
def test_minimize_by_products(method):
    sol = minimized(rosenbrock, method, wants=("hessp",))
    np.testing.assert_allclose(sol.x, np.ones(3), atol=1e-4)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("method", DENSE)
def test_minimize_by_matrices(method, kind):
    if kind == "sparse" and method != "trust-constr":
        pytest.skip("takes dense matrices only")
    sol = minimized(convex, method, wants=("hess",), kind=kind)
    assert sol.success or method == "trust-constr"
    np.testing.assert_allclose(sol.jac if method != "trust-constr" else sol.grad, 0, atol=1e-4)


@pytest.mark.parametrize("kind", ["dense", "operator", "sparse"])
def test_hessians_against_scipys_own(kind):
    p = lz.scipy.ScalarFunction(rosenbrock, rand(5), hess=kind)
    for x in (p.x0, p.x0 + 0.3, p.x0 - 1):
        H = p.hess(x)
        H = H.toarray() if kind == "sparse" else H @ np.eye(5)
        np.testing.assert_allclose(H, so.rosen_hess(x), atol=1e-9)


def test_gradients_alone_are_not_linearized():
    counted = Counted(rosenbrock)
    p = lz.scipy.ScalarFunction(counted, rand(4))
    for k in range(3):
        x = p.x0 + k
        np.testing.assert_allclose(p.fun(x), so.rosen(x))
        np.testing.assert_allclose(p.jac(x), so.rosen_der(x))
        np.testing.assert_allclose(p.jac(p.x0), so.rosen_der(p.x0))
    assert counted.runs == 3
    assert p.linearizer.stats().misses == 0
    # From here on it is.
    np.testing.assert_allclose(p.hessp(x, np.ones(4)), so.rosen_hess_prod(x, np.ones(4)))
    assert counted.runs == 4
    p.fun(x), p.jac(x), p.hessp(x, np.arange(4.0))
    assert counted.runs == 4


def test_gradients_alone_see_data_that_change_in_place():
    data = torch.ones(3, dtype=torch.float64)
    p = lz.scipy.ScalarFunction(lambda x: (data * x * x).sum(), [1.0, 2.0, 3.0])
    assert p.fun(p.x0) == 14
    data.mul_(2)
    assert p.fun(p.x0) == 28
    np.testing.assert_allclose(p.jac(p.x0), [4, 8, 12])


@pytest.mark.parametrize("leaf", [False, True])
def test_gradients_alone_see_what_a_thread_read_where_the_graph_has_it(leaf):
    data = torch.ones(3, dtype=torch.float64, requires_grad=leaf)
    box = queue.Queue()  # what is in it cannot be looked at
    box.put(data)

    def work(x, out):
        box.put(here := box.get())
        out.append((x * x + here).sum() if leaf else (here * x * x).sum())

    def f(x):
        out = []
        thread = threading.Thread(target=work, args=(x, out))
        thread.start()
        thread.join()
        return out[0]

    p = lz.scipy.ScalarFunction(f, [1.0, 2.0, 3.0])
    assert p.fun(p.x0) == (17 if leaf else 14)
    assert p.fun(p.x0) == (17 if leaf else 14)
    with torch.no_grad():
        data.mul_(2)
    assert p.fun(p.x0) == (20 if leaf else 28)
    np.testing.assert_allclose(p.jac(p.x0), [2, 4, 6] if leaf else [4, 8, 12])


def test_gradients_of_what_x_does_not_reach():
    p = lz.scipy.ScalarFunction(lambda p: p["a"].sum() * 2, {"a": rand(2), "b": rand(3)})
    np.testing.assert_allclose(p.jac(p.x0), [2, 2, 0, 0, 0])
    p = lz.scipy.ScalarFunction(lambda x: torch.tensor(3.0), rand(2))
    assert p.fun(p.x0) == 3
    np.testing.assert_allclose(p.jac(p.x0), [0, 0])
    p = lz.scipy.ScalarFunction(torch.sin, rand(3))
    with pytest.raises(lz.errors.StructureError, match=r"one real number.*\(3,\)"):
        p.jac(p.x0)


# -- constraints --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "operator", "sparse"])
def test_constraints_with_their_hessian(kind):
    def constraint(x):
        return torch.stack([(x * x).sum(), x[0] * x[1].exp()])

    goal = lz.scipy.ScalarFunction(lambda x: (x - 2).square().sum(), [1.0, 0.0, 0.2])
    c = lz.scipy.VectorFunction(constraint, goal.x0, jac=kind)
    v = np.array([2.0, -0.5])
    H = c.hess(goal.x0, v)
    H = H.toarray() if kind == "sparse" else H @ np.eye(3)
    want = torch.autograd.functional.hessian(
        lambda x: constraint(x) @ torch.tensor(v), torch.tensor(goal.x0)
    )
    np.testing.assert_allclose(H, want, atol=1e-12)
    if kind == "operator":
        return  # of constraints, trust-constr takes matrices only
    sol = so.minimize(
        goal.fun,
        goal.x0,
        jac=goal.jac,
        hess=goal.hess,
        method="trust-constr",
        constraints=[so.NonlinearConstraint(c.fun, -np.inf, [1.0, 5.0], jac=c.jac, hess=c.hess)],
    )
    np.testing.assert_allclose(sol.x, np.full(3, 3**-0.5), atol=1e-4)
    with pytest.raises(lz.errors.SpaceError, match=r"v: expected shape \(2,\)"):
        c.hess(goal.x0, np.ones(3))


# -- least squares, roots, differential equations ------------------------------------------


@pytest.mark.parametrize("method", ["trf", "dogbox", "lm"])
@pytest.mark.parametrize("kind", ["dense", "sparse", "operator"])
def test_least_squares(kind, method):
    if method == "lm" and kind != "dense":
        pytest.skip("SciPy's lm takes dense Jacobians only")
    counted, points = Counted(residuals), set()
    p = lz.scipy.VectorFunction(counted, np.full(4, -1.2), jac=kind)
    options = {} if method == "lm" else {"tr_solver": "exact" if kind == "dense" else "lsmr"}
    sol = so.least_squares(
        noted(p.fun, points), p.x0, noted(p.jac, points), method=method, **options
    )
    np.testing.assert_allclose(sol.x, np.ones(4), atol=1e-6)
    assert counted.runs == len(points)


def equation(x):
    return x + 0.5 * x.sin() - torch.linspace(0, 1, len(x), dtype=x.dtype)


@pytest.mark.parametrize("method", ["hybr", "lm", "krylov"])
def test_root(method):
    counted, points = Counted(equation), set()
    p = lz.scipy.VectorFunction(counted, np.zeros(5))
    if method == "krylov":
        M = lz.operators.inverse(p.at(p.x0).jacobian).to_scipy()
        given = {"options": {"jac_options": {"inner_M": M}}}
        points.add(p.x0.tobytes())
    else:
        given = {"jac": noted(p.jac, points)}
    sol = so.root(noted(p.fun, points), p.x0, method=method, tol=1e-10, **given)
    assert sol.success
    np.testing.assert_allclose(equation(torch.tensor(sol.x)), 0, atol=1e-8)
    assert counted.runs == len(points)


def reaction(y):
    """Robertson's, in scaled units: stiff."""
    a, b, c = y.unbind()
    first, second, third = 0.04 * a, 1e2 * b * c, 3e3 * b * b
    return torch.stack([second - first, first - second - third, third])


@functools.cache
def reacted():
    """What SciPy finds by its own differences."""
    f = lambda t, y: reaction(torch.tensor(y)).numpy()  # noqa: E731
    start = np.array([1.0, 0.0, 0.0])
    return si.solve_ivp(f, (0, 2), start, method="Radau", rtol=1e-9, atol=1e-11).y[:, -1]


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("method", ["BDF", "Radau", "LSODA"])
def test_solve_ivp(method, kind):
    if method == "LSODA" and kind == "sparse":
        pytest.skip("LSODA takes dense Jacobians only")

    counted, points = Counted(reaction), set()
    p = lz.scipy.VectorFunction(counted, [1.0, 0.0, 0.0], jac=kind)
    fun, jac = noted(p.fun, points), noted(p.jac, points)
    sol = si.solve_ivp(
        lambda t, y: fun(y),
        (0, 2),
        p.x0,
        method=method,
        jac=lambda t, y: jac(y),
        rtol=1e-8,
        atol=1e-10,
    )
    assert sol.success
    np.testing.assert_allclose(sol.y.sum(0), 1, atol=1e-9)
    np.testing.assert_allclose(sol.y[:, -1], reacted(), rtol=1e-5, atol=1e-7)
    assert counted.runs <= sol.nfev + sol.njev
    assert counted.runs == len(points) or counted.runs < 1.2 * len(points)  # 8 are remembered


# -- linear systems and eigenvalues --------------------------------------------------------


@pytest.fixture(scope="module")
def square():
    """A well-conditioned map of 30 numbers to 30, not symmetric."""
    A = rand(30, 30) + 12 * torch.eye(30, dtype=torch.float64)
    f = Counted(lambda x: A @ (x + 0.1 * x.sin()))
    x = rand(30, seed=1)
    matrix = torch.autograd.functional.jacobian(f.f, x)
    return f, lz.Linearizer(f).at(x).jacobian, matrix.numpy()


@pytest.mark.parametrize(
    "solver", ["bicg", "bicgstab", "cgs", "gcrotmk", "gmres", "lgmres", "qmr", "tfqmr"]
)
def test_krylov_solvers(square, solver):
    f, J, M = square
    b = np.arange(30.0)
    x, info = getattr(sla, solver)(J.to_scipy(), b, rtol=1e-11)
    assert info == 0
    np.testing.assert_allclose(x, np.linalg.solve(M, b), rtol=1e-7, atol=1e-8)
    assert f.runs == 1


@pytest.mark.parametrize("solver", ["cg", "minres"])
def test_krylov_solvers_of_symmetric_systems(square, solver):
    f, J, M = square
    b, G = np.arange(30.0), J.gram()
    jacobi = sla.aslinearoperator(np.diag(1 / G.diagonal().numpy()))
    x, info = getattr(sla, solver)(G.to_scipy(), b, rtol=1e-12, M=jacobi)
    assert info == 0
    np.testing.assert_allclose(x, np.linalg.solve(M.T @ M, b), rtol=1e-6)
    assert f.runs == 1


@pytest.mark.parametrize("solver", ["lsqr", "lsmr"])
def test_least_squares_solvers(square, solver):
    f, J, M = square
    tall = lz.operators.vertical(J, 2 * J).to_scipy()
    b = np.arange(60.0)
    x = getattr(sla, solver)(tall, b, atol=1e-14, btol=1e-14)[0]
    want = np.linalg.lstsq(np.concatenate([M, 2 * M]), b)[0]
    np.testing.assert_allclose(x, want, rtol=1e-6, atol=1e-8)
    assert f.runs == 1


def test_eigenvalues_and_singular_values(square):
    f, J, M = square
    G, W = J.gram().to_scipy(), np.linalg.eigvalsh(M.T @ M)
    np.testing.assert_allclose(sla.eigsh(G, k=3)[0], W[-3:], rtol=1e-8)
    start = np.random.default_rng(0).normal(size=(30, 3))
    w, V = sla.lobpcg(G, start, largest=True, tol=1e-9, maxiter=200)
    np.testing.assert_allclose(np.sort(w), W[-3:], rtol=1e-6)
    np.testing.assert_allclose(G @ V, V * w, atol=1e-4 * W[-1])
    singular = np.linalg.svd(M, compute_uv=False)
    s = sla.svds(J.to_scipy(), k=2, return_singular_vectors=False, tol=1e-9)
    np.testing.assert_allclose(np.sort(s), singular[1::-1], rtol=1e-5)
    eigs = sla.eigs(J.to_scipy(), k=2, return_eigenvectors=False)
    every = np.linalg.eigvals(M)
    want = np.sort(np.abs(every))[-2:]
    np.testing.assert_allclose(np.sort(np.abs(eigs)), want, rtol=1e-6)
    assert f.runs == 1


# -- starts of every kind ------------------------------------------------------------------


def test_starts():
    seen = []

    def f(x):
        seen.append(x)
        return x * 2

    for x0, dtype in (
        ([1.0, 2.0], torch.float64),
        ((1, 2), torch.float64),
        (np.array([1, 2]), torch.float64),
        (np.array([1.0, 2.0], dtype=np.float32), torch.float32),
        (np.array([1.0, 2.0])[::-1], torch.float64),
        (np.array([1.0, 2.0], dtype=">f8"), torch.float64),
        ([[1.0, 2.0], [3.0, 4.0]], torch.float64),
        ([1 + 2j, 3.0], torch.complex128),
    ):
        p = lz.scipy.VectorFunction(f, x0)
        np.testing.assert_array_equal(p.fun(p.x0), 2 * p.x0)
        assert isinstance(seen[-1], torch.Tensor)
        assert seen[-1].dtype == dtype
        plain = np.array(x0)
        assert tuple(seen[-1].shape) == plain.shape
        flat = plain.reshape(-1)
        np.testing.assert_array_equal(
            p.x0, flat.view(float) if np.iscomplexobj(flat) else flat.astype(float)
        )
    arrays = {"a": np.ones(2), "n": np.array([1, 2]), "b": torch.ones(1)}
    p = lz.scipy.VectorFunction(lambda p: p["a"] * torch.tensor(p["n"]) + p["b"], arrays)
    np.testing.assert_allclose(p.fun(p.x0), [2, 3])
    assert p.unravel(p.x0)["n"] is arrays["n"]
    for wrong in (3.0, "x", [], [True], np.array(["a"]), {"n": 3}):
        with pytest.raises(lz.errors.StructureError, match=r"x0: expected .*got "):
            lz.scipy.VectorFunction(f, wrong)


def test_repr():
    p = lz.scipy.VectorFunction(rosenbrock, [1.0, 2.0])
    assert repr(p) == "<VectorFunction of rosenbrock: Space(value: float64[2])>"
    assert "ScalarFunction of rosenbrock" in repr(lz.scipy.ScalarFunction(rosenbrock, [1.0]))


# -- Newton–Krylov -------------------------------------------------------------------------


def bratu(u, strength=1.0):
    padded = torch.nn.functional.pad(u, (1, 1))
    h = 1 / (len(u) + 1)
    return (padded[2:] - 2 * u + padded[:-2]) / h**2 + strength * u.exp()


def test_newton_krylov_takes_arrays_arguments_and_a_callback():
    seen = []
    sol = lz.scipy.newton_krylov(
        bratu, np.zeros(20), args=(2.0,), callback=lambda x, r: seen.append((x, r))
    )
    assert sol.success
    assert isinstance(sol.x, np.ndarray)
    assert len(seen) == sol.nit
    assert seen[-1][0] is not sol.x
    np.testing.assert_array_equal(seen[-1][0], sol.x)
    np.testing.assert_allclose(bratu(torch.tensor(sol.x), 2.0), 0, atol=1e-9)
    alone = lz.scipy.newton_krylov(bratu, np.zeros(20), args=2.0)
    np.testing.assert_allclose(alone.x, sol.x)
    tensor = lz.scipy.newton_krylov(bratu, torch.zeros(20, dtype=torch.float64))
    assert isinstance(tensor.x, torch.Tensor)

    def stop(x, r):
        raise StopIteration

    stopped = lz.scipy.newton_krylov(bratu, np.zeros(20), callback=stop)
    assert not stopped.success
    assert stopped.nit == 1
    assert "callback" in stopped.message


def preconditioners():
    import scipy.sparse as sp

    n = 40
    T = sp.diags_array([np.ones(n - 1), np.full(n, -2.0), np.ones(n - 1)], offsets=[-1, 0, 1])
    inverse = np.linalg.inv(T.toarray() * (n + 1) ** 2)
    solve = sla.factorized(sp.csc_matrix(T * (n + 1) ** 2))
    return {
        "matrix": inverse,
        "sparse": sp.csr_matrix(inverse),
        "tensor": torch.tensor(inverse),
        "operator": sla.aslinearoperator(inverse),
        "function": lambda here: solve,
        "ours": lambda here: lz.operators.inverse(here.jacobian),
        "function of matrices": lambda here: inverse,
    }


@pytest.mark.parametrize("kind", list(preconditioners()))
def test_newton_krylov_takes_preconditioners_of_every_kind(kind):
    start = torch.zeros(40, dtype=torch.float64)
    plain = lz.scipy.newton_krylov(bratu, start, tol=1e-9)
    better = lz.scipy.newton_krylov(bratu, start, tol=1e-9, preconditioner=preconditioners()[kind])
    assert better.success
    assert better.njvp < plain.njvp / 3
    torch.testing.assert_close(better.x, plain.x, rtol=0, atol=1e-8)


def test_wrong_preconditioners():
    start = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(lz.errors.SpaceError, match=r"preconditioner.*\(4, 4\).*\(3, 3\)"):
        lz.scipy.newton_krylov(bratu, start, preconditioner=np.eye(3))
    with pytest.raises(lz.errors.StructureError, match=r"preconditioner.*str"):
        lz.scipy.newton_krylov(bratu, start, preconditioner="ilu")


# -- complex numbers -----------------------------------------------------------------------


def phases(z):
    """Intensities of a discrete Fourier transform: not holomorphic."""
    return torch.fft.fft(z).abs().square()


def real_jacobian(f, z):
    """Return the Jacobian by real and imaginary parts, from PyTorch alone."""

    def real(x):
        y = f(torch.view_as_complex(x))
        return torch.view_as_real(y).reshape(-1) if y.is_complex() else y.reshape(-1)

    J = torch.autograd.functional.jacobian(real, torch.view_as_real(z))
    return J.reshape(J.shape[0], -1).numpy()


@pytest.mark.parametrize("f", [phases, lambda z: z * z.conj() + z.exp(), torch.exp])
def test_operators_of_complex_functions(f):
    z = rand(6, dtype=torch.complex128)
    here, M = lz.Linearizer(f).at(z), real_jacobian(f, z)
    S = lz.scipy.aslinearoperator(here, real=True)
    assert S.shape == M.shape
    assert S.dtype == np.float64
    for k in range(4):
        v, u = rand(M.shape[1], seed=k).numpy(), rand(M.shape[0], seed=9 + k).numpy()
        np.testing.assert_allclose(S @ v, M @ v, atol=1e-10)
        np.testing.assert_allclose(S.T @ u, M.T @ u, atol=1e-10)
    np.testing.assert_allclose(S @ np.eye(M.shape[1]), M, atol=1e-10)
    b = M @ np.arange(12.0)
    step = sla.lsmr(S, b, atol=1e-13, btol=1e-13, maxiter=500)[0]
    np.testing.assert_allclose(M @ step, b, rtol=1e-6, atol=1e-6)
    real = lz.Linearizer(torch.sin).at(rand(3))
    assert lz.scipy.aslinearoperator(real, real=True).shape == (3, 3)


@pytest.mark.parametrize("kind", ["dense", "operator", "sparse"])
def test_phase_retrieval(kind):
    z = rand(5, dtype=torch.complex128)
    data = phases(z)
    mask = rand(5, 5, dtype=torch.complex128, seed=3)
    more = (mask @ z).abs().square()

    def residual(z):
        return torch.cat([phases(z) - data, (mask @ z).abs().square() - more])

    counted, points = Counted(residual), set()
    start = (z + 0.1 * rand(5, dtype=torch.complex128, seed=1)).numpy()
    p = lz.scipy.VectorFunction(counted, start, jac=kind)
    np.testing.assert_array_equal(p.x0, start.view(float))
    J = p.jac(p.x0)
    J = J.toarray() if kind == "sparse" else J @ np.eye(10)
    np.testing.assert_allclose(J, real_jacobian(residual, torch.tensor(start)), atol=1e-9)
    np.testing.assert_allclose(p.gradient(p.x0), J.T @ p.fun(p.x0), rtol=1e-9)
    points.add(p.x0.tobytes())
    options = {"tr_solver": "exact"} if kind == "dense" else {"tr_solver": "lsmr"}
    sol = so.least_squares(
        noted(p.fun, points), p.x0, noted(p.jac, points), xtol=1e-12, gtol=1e-12, **options
    )
    assert counted.runs == len(points)
    found = p.unravel(sol.x)
    assert found.dtype == torch.complex128
    turn = (z[0] / found[0]) / (z[0] / found[0]).abs()  # a common phase is free
    torch.testing.assert_close(found * turn, z, rtol=1e-4, atol=1e-4)


def test_minimize_over_complex_numbers():
    A, b = rand(4, 3, dtype=torch.complex128), rand(4, dtype=torch.complex128, seed=1)

    def loss(z):
        return (A @ z - b).abs().square().sum() + (z.abs() ** 4).sum()

    start = rand(3, dtype=torch.complex128, seed=2)
    p = lz.scipy.ScalarFunction(loss, start)

    def plain(x):
        return loss(torch.view_as_complex(torch.tensor(x).view(3, 2)))

    real = torch.view_as_real(start).reshape(-1)
    of_parts = lambda x: loss(torch.view_as_complex(x.view(3, 2)))  # noqa: E731
    np.testing.assert_allclose(p.jac(p.x0), torch.func.grad(of_parts)(real), atol=1e-10)
    H = torch.autograd.functional.hessian(of_parts, real).numpy()
    for _ in range(4):
        np.testing.assert_allclose(p.hessp(p.x0, np.arange(6.0)), H @ np.arange(6.0), atol=1e-9)
    np.testing.assert_allclose(p.hess(p.x0) @ np.eye(6), H, atol=1e-9)
    for method in ("BFGS", "trust-ncg"):
        q = lz.scipy.ScalarFunction(loss, start)
        given = {} if method == "BFGS" else {"hessp": q.hessp}
        sol = so.minimize(q.fun, q.x0, jac=q.jac, method=method, **given)
        reference = so.minimize(lambda x: plain(x).item(), q.x0, tol=1e-8)
        np.testing.assert_allclose(sol.x, reference.x, atol=1e-4)


def test_newton_krylov_over_complex_numbers():
    def f(z):
        return z + 0.3 * z.conj() * z - (1 + 1j)

    sol = lz.scipy.newton_krylov(f, np.zeros(4, dtype=complex))
    assert sol.success
    assert sol.x.dtype == np.complex128
    np.testing.assert_allclose(f(torch.tensor(sol.x)), 0, atol=1e-9)
    assert sol.fun.shape == (8,)
    ours = lz.scipy.newton_krylov(
        f,
        np.zeros(4, dtype=complex),
        preconditioner=lambda here: lz.operators.inverse(here.jacobian.as_real()),
    )
    np.testing.assert_allclose(ours.x, sol.x, atol=1e-9)


# -- values alone --------------------------------------------------------------------------


def test_values_are_linearized_when_a_derivative_is_asked_for():
    counted = Counted(residuals)
    p = lz.scipy.VectorFunction(counted, rand(4))
    points = [p.x0 + k for k in range(4)]
    for x in points:
        np.testing.assert_allclose(p.fun(x), residuals(torch.tensor(x)))
    assert p.linearizer.stats().bytes == 0
    for x in reversed(points):
        want = torch.autograd.functional.jacobian(residuals, torch.tensor(x))
        for _ in range(2):
            np.testing.assert_allclose(p.jac(x), want)
            np.testing.assert_allclose(p.fun(x), residuals(torch.tensor(x)))
            np.testing.assert_allclose(p.gradient(x), want.T @ residuals(torch.tensor(x)))
    assert p.linearizer.stats().bytes > 0
    assert counted.runs == len(points)
    assert p.at(points[0]) is p.linearizer.at(p.unravel(points[0]))
    assert counted.runs == len(points)


def test_values_alone_see_data_that_change_in_place():
    data, kept = torch.ones(3, dtype=torch.float64), []

    def f(x):
        kept[:] = [data * x.sin()]
        return kept[0]

    p = lz.scipy.VectorFunction(f, [1.0, 2.0, 3.0])
    for change in (lambda: data.mul_(2), lambda: kept[0].zero_()):
        value = p.fun(p.x0)
        change()
        np.testing.assert_allclose(p.fun(p.x0), data.numpy() * np.sin(p.x0))
        change()
        np.testing.assert_allclose(p.jac(p.x0), np.diag(data.numpy() * np.cos(p.x0)))
        assert value[0] != 0


def test_running_statistics_that_move_unseen_are_seen():
    data, other = rand(5, 3), rand(50, 3, seed=1)
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    normed = torch.nn.functional.batch_norm
    net = torch.nn.BatchNorm1d(3, affine=False).double().eval()

    def by_module(x):
        return net(data * x).square().sum()

    def by_attribute(x):
        return torch.nn.functional.batch_norm(data * x, mean, var).square().sum()

    def by_name(x):
        return normed(data * x, mean, var).square().sum()

    def by_kernel(x):
        return torch.native_batch_norm(data * x, None, None, mean, var, False, 0.1, 1e-5)[0].sum()

    def moved():
        normed(other + 3, mean, var, training=True)
        normed(other + 3, net.running_mean, net.running_var, training=True)

    for f in (by_module, by_attribute, by_name, by_kernel):
        problem = lz.scipy.ScalarFunction(f, np.ones(3))
        vector = lz.scipy.VectorFunction(f, np.ones(3))
        for _ in range(3):
            want = f(torch.ones(3, dtype=torch.float64)).item()
            slope = torch.func.grad(f)(torch.ones(3, dtype=torch.float64))
            assert problem.fun(problem.x0) == pytest.approx(want)
            np.testing.assert_allclose(problem.jac(problem.x0), slope)
            np.testing.assert_allclose(vector.fun(vector.x0), want)
            moved()
            slope = torch.func.grad(f)(torch.ones(3, dtype=torch.float64))
            np.testing.assert_allclose(vector.jac(vector.x0)[0], slope)
            moved()


class Scaled(torch.autograd.Function):
    """Keeps a list, which f changes after the call."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x * scale[0]

    @staticmethod
    def backward(ctx, u):
        return u * ctx.scale[0], None


def test_values_of_custom_functions():
    counted = Counted(lambda x: Scaled.apply(x, [3.0]).sin())
    p = lz.scipy.VectorFunction(counted, [0.1, 0.2])
    for x in (p.x0, p.x0 + 1):
        np.testing.assert_allclose(p.fun(x), np.sin(3 * x))
        np.testing.assert_allclose(p.jac(x), np.diag(3 * np.cos(3 * x)))
    assert counted.runs == 2


def test_many_values_and_few_jacobians_take_plain_runs():
    modes = []

    def f(x):
        modes.append((x.requires_grad, torch.is_grad_enabled()))
        slope = torch.autograd.grad(x.square().sum(), x, create_graph=True)[0]  # wants a graph
        return {"a": slope * x, "n": torch.tensor(3)}

    p = lz.scipy.VectorFunction(f, [1.0, 2.0])
    points = [p.x0 + k for k in range(20)]
    with torch.no_grad():
        for x in points:
            np.testing.assert_allclose(p.fun(x), 2 * x**2)
    assert p.linearizer.stats().misses == 8
    assert len(modes) == 20
    assert set(modes) == {(True, True)}
    for x in points[-2:]:  # one more run for each
        np.testing.assert_allclose(p.jac(x), np.diag(4 * x))
        np.testing.assert_allclose(p.fun(x), 2 * x**2)
    assert len(modes) == 22
    with torch.inference_mode():
        for x in points:
            np.testing.assert_allclose(p.fun(x + 0.5), 2 * (x + 0.5) ** 2)
    z = lz.scipy.VectorFunction(lambda z: z * z.conj() + z, [1.0 + 2j, 3.0])
    for x in (z.x0 + k for k in range(12)):
        c = x.view(complex)
        np.testing.assert_allclose(z.fun(x), (c * c.conj() + c).view(float))
