"""Blocks, joins, inverses and estimates, against dense matrices."""

import numpy as np
import pytest
import scipy.sparse.linalg as sla
import torch

import linearize as lz
from linearize.operators import (
    LinearOperator,
    SelfAdjoint,
    block_diagonal,
    from_diagonal,
    horizontal,
    identity,
    inverse,
    vertical,
)
from tests.support.functions import rand
from tests.support.operator_contract import check_operator

F64 = torch.float64


def model(p):
    """A dictionary to a dictionary, with a list below."""
    h = torch.tanh(p["w"] @ p["more"][0] + p["b"])
    return {"h": h, "rest": (h.sum() * p["more"][1], p["b"].exp())}


PARAMS = {"w": rand(2, 3), "b": rand(2, seed=1), "more": [rand(3, seed=2), rand(2, seed=3)]}


def whole():
    J = lz.Linearizer(model).at(PARAMS).jacobian
    return J, J.materialize()


COLUMNS = {"w": (0, 6), "b": (6, 8), "more": (8, 13)}
ROWS = {"h": (0, 2), "rest": (2, 6)}


@pytest.mark.parametrize("row", [slice(None), "h", "rest"])
@pytest.mark.parametrize("column", [slice(None), "w", "b", "more"])
def test_blocks(row, column):
    J, M = whole()
    a, b = ROWS.get(row, (0, 6)) if isinstance(row, str) else (0, 6)
    c, d = COLUMNS[column] if isinstance(column, str) else (0, 13)
    check_operator(J[row, column], M[a:b, c:d])


def test_blocks_of_blocks_and_of_symmetric_operators():
    J, M = whole()
    check_operator(J["rest", "more"][1, 0], M[4:6, 8:11])
    G = J.gram()
    check_operator(G["w", "b"], (M.T @ M)[:6, 6:8])
    check_operator(G["b", "b"], (M.T @ M)[6:8, 6:8])
    assert isinstance(G["b", "b"], SelfAdjoint)
    assert not isinstance(G["w", "b"], SelfAdjoint)
    assert repr(G["w", :]) == "<Jacobian.gram()['w', :] 6 x 13 float64>"


def test_what_is_no_block_is_named():
    J, _ = whole()
    for key in ("missing", 7, 1.5):
        with pytest.raises(lz.errors.StructureError, match=r"no part .*'w'"):
            J[:, key]
    with pytest.raises(lz.errors.StructureError, match=r"A\[rows, columns\]"):
        J["w"]
    x = lz.Linearizer(torch.sin).at(rand(3)).jacobian
    with pytest.raises(lz.errors.StructureError, match="no part 0"):
        x[0, :]
    with_none = lz.Linearizer(lambda p: p["a"]).at({"a": rand(2), "n": 3}).jacobian
    with pytest.raises(lz.errors.StructureError, match="no tangent"):
        with_none[:, "n"]


def test_joins():
    J, M = whole()
    other = rand(6, 6, seed=4)
    D = lz.Linearizer(
        lambda x: {"h": (other @ x)[:2], "rest": ((other @ x)[2:4], (other @ x)[4:])}
    )
    B = D.at(rand(6)).jacobian
    check_operator(horizontal(J, B), torch.cat([M, other], 1))
    check_operator(vertical(J, 2 * J, J - J), torch.cat([M, 2 * M, 0 * M]))
    check_operator(block_diagonal(J, B.H), torch.block_diag(M, other.T))
    G = block_diagonal(J.gram(), identity(B.in_space))
    assert isinstance(G, SelfAdjoint)
    check_operator(G, torch.block_diag(M.T @ M, torch.eye(6, dtype=F64)))
    assert vertical(J, J).out_space.unravel(rand(12))[1]["h"].shape == (2,)
    with pytest.raises(lz.errors.SpaceError, match="in_space"):
        vertical(J, B)
    with pytest.raises(lz.errors.SpaceError, match="out_space"):
        horizontal(J, J.H)
    for join in (vertical, horizontal, block_diagonal):
        with pytest.raises(lz.errors.StructureError, match="at least one"):
            join()
        with pytest.raises(lz.errors.StructureError, match="Tensor"):
            join(J, rand(6, 13))


# -- inverses -----------------------------------------------------------------------------


def square(n=5, dtype=F64):
    A = rand(n, n, dtype=dtype) + 6 * torch.eye(n, dtype=dtype)
    return lz.Linearizer(lambda x: A @ x).at(rand(n, dtype=dtype, seed=1)).jacobian, A


@pytest.mark.parametrize("dtype", [F64, torch.complex128])
@pytest.mark.parametrize("solve", [None, lz.solvers.dense, lz.solvers.gmres, lz.solvers.iterative])
def test_inverse(solve, dtype):
    J, A = square(dtype=dtype)
    check_operator(inverse(J, solve), torch.linalg.inv(A))


def test_inverse_of_symmetric_operators():
    J, A = square()
    G = inverse(J.gram().damped(0.1))
    assert isinstance(G, SelfAdjoint)
    check_operator(G, torch.linalg.inv(A.T @ A + 0.1 * torch.eye(5, dtype=F64)))


def test_the_matrix_is_factorized_once():
    products = 0
    J, A = square()

    def apply(parts, *, stacked):
        nonlocal products
        products += len(parts[0]) if stacked else 1
        return [parts[0] @ A.T]

    def back(parts, *, stacked):
        nonlocal products
        products += len(parts[0]) if stacked else 1
        return [parts[0] @ A]

    B = inverse(LinearOperator(J.in_space, J.out_space, apply, back))
    for k in range(4):
        torch.testing.assert_close(B @ rand(5, seed=k), torch.linalg.solve(A, rand(5, seed=k)))
    assert products == 5 + 4  # the matrix, and one look at each solution


def test_wrong_solutions_are_refused():
    J, _ = square()
    for bad in (lambda A, b: 0 * b, lambda A, b: b, lambda A, b: b * float("nan")):
        with pytest.raises(lz.errors.LinearizeError, match="left a residual"):
            inverse(J, bad) @ rand(5)
    single = lz.Linearizer(lambda x: 3 * x).at(rand(3).float()).jacobian
    with pytest.raises(lz.errors.LinearizeError, match="left a residual"):
        inverse(single, lambda A, b: 0 * b) @ rand(3).float()
    singular = lz.Linearizer(lambda x: x.sum() + 0 * x).at(rand(4)).jacobian
    with pytest.raises(lz.errors.LinearizeError):
        inverse(singular) @ rand(4)
    with pytest.raises(lz.errors.SpaceError, match="not square"):
        inverse(whole()[0])


def test_large_systems_are_solved_by_products():
    n = 1_500
    f = lambda x: 3 * x + x.roll(1).sin() + 0.5 * x.roll(-1)  # noqa: E731
    J = lz.Linearizer(f).at(rand(n)).jacobian
    products = 0
    inner = J._apply

    def counted(parts, *, stacked):
        nonlocal products
        products += len(parts[0]) if stacked else 1
        return inner(parts, stacked=stacked)

    b = rand(n, seed=1)
    A = LinearOperator(J.in_space, J.out_space, counted, J._apply_adjoint)
    x = inverse(A) @ b
    torch.testing.assert_close(J @ x, b, rtol=1e-7, atol=1e-7)
    assert products < 200
    y = inverse(A).H @ b
    torch.testing.assert_close(J.H @ y, b, rtol=1e-7, atol=1e-7)
    G = J.gram()
    torch.testing.assert_close(G @ (inverse(G) @ b), b, rtol=1e-7, atol=1e-7)
    # not definite: conjugate gradients do not serve
    signs = torch.ones(n, dtype=F64)
    signs[::2] = -1
    D = from_diagonal(J.in_space, signs * (1 + rand(n, seed=2).abs()))
    torch.testing.assert_close(D @ (inverse(D) @ b), b, rtol=1e-6, atol=1e-6)


# -- GMRES --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, torch.complex128, torch.float32])
@pytest.mark.parametrize("restart", [3, 10, 100])
def test_gmres_against_scipy(dtype, restart):
    A = rand(40, 40, dtype=dtype) + 15 * torch.eye(40, dtype=dtype)
    b = rand(40, dtype=dtype, seed=1)
    single = dtype == torch.float32
    x = lz.solvers.gmres(A.__matmul__, b, restart=restart)
    assert torch.dist(A @ x, b) <= (1e-5 if single else 1e-10) * b.norm()
    rtol = 1e-5 if single else 1e-10
    products = 0

    def counted(v):
        nonlocal products
        products += 1
        return A @ v

    lz.solvers.gmres(counted, b, restart=restart, rtol=rtol)
    theirs = 0

    def matvec(v):
        nonlocal theirs
        theirs += 1
        return A.numpy() @ v

    S = sla.LinearOperator((40, 40), matvec=matvec, dtype=A.numpy().dtype)
    want, info = sla.gmres(S, b.numpy(), rtol=rtol, restart=restart, maxiter=1000)
    assert info == 0
    np.testing.assert_allclose(
        x, want, rtol=1e-3 if single else 1e-7, atol=1e-3 if single else 1e-8
    )
    assert products <= 1.3 * theirs + 3


def test_gmres_with_a_preconditioner_and_a_start():
    d = torch.logspace(0, 6, 60, dtype=F64)
    A = torch.diag(d) + 0.1 * rand(60, 60)
    b = rand(60, seed=1)
    counts = []
    for M in (None, lambda v: v / d):
        products = 0

        def counted(v):
            nonlocal products
            products += 1
            return A @ v

        x = lz.solvers.gmres(counted, b, preconditioner=M, rtol=1e-8)
        assert torch.dist(A @ x, b) <= 1e-8 * b.norm()
        counts.append(products)
    assert counts[1] < counts[0] / 3
    again = lz.solvers.gmres(A.__matmul__, b, start=x, rtol=1e-8)
    torch.testing.assert_close(again, x)
    J = lz.Linearizer(lambda v: A @ v).at(b).jacobian
    M = from_diagonal(J.in_space, 1 / d)
    torch.testing.assert_close(lz.solvers.gmres(J, b, preconditioner=M, rtol=1e-8), x)


def test_gmres_where_it_breaks_down():
    # The solution lies in the first Krylov space.
    assert torch.equal(lz.solvers.gmres(lambda v: 2 * v, torch.ones(5)), torch.full((5,), 0.5))
    assert torch.equal(lz.solvers.gmres(lambda v: v, torch.zeros(5)), torch.zeros(5))
    # A cyclic shift makes no progress before the last step.
    b = torch.zeros(8, dtype=F64)
    b[0] = 1
    x = lz.solvers.gmres(lambda v: v.roll(1), b)
    torch.testing.assert_close(x.roll(1), b)
    with pytest.raises(lz.errors.LinearizeError, match="residual"):
        lz.solvers.gmres(lambda v: v.roll(1), b, restart=4, max_products=40)
    with pytest.raises(lz.errors.LinearizeError, match="residual"):
        lz.solvers.gmres(lambda v: 0 * v, b)
    with pytest.raises(lz.errors.LinearizeError, match="residual"):
        lz.solvers.gmres(lambda v: v * float("nan"), b)
    with pytest.raises(lz.errors.SpaceError):
        lz.solvers.gmres(lambda v: v, torch.ones(2, 2))
    with pytest.raises(lz.errors.OptionError):
        lz.solvers.gmres(lambda v: v, b, restart=0)
    z = torch.ones(3, dtype=torch.complex128)
    J = lz.Linearizer(lambda z: z + 2 * z.conj()).at(z).jacobian
    with pytest.raises(lz.errors.UnsupportedError, match=r"gmres.*as_real"):
        lz.solvers.gmres(J, z)


def test_what_is_no_operator():
    here = lz.Linearizer(torch.sin).at(torch.zeros(3))
    for wrong in (here, here.jvp_fn, torch.eye(3), None):
        for make in (lz.operators.inverse, lz.operators.vertical, lz.operators.block_diagonal):
            with pytest.raises(lz.errors.StructureError, match=r"expected operators.*jacobian"):
                make(wrong)


# -- diagonals and traces -----------------------------------------------------------------


def counting(J):
    """Return an operator like J, and the list of how many vectors each call maps."""
    sizes = []

    def around(apply):
        def counted(parts, *, stacked):
            sizes.append(len(parts[0]) if stacked else 1)
            return apply(parts, stacked=stacked)

        return counted

    return LinearOperator(
        J.in_space, J.out_space, around(J._apply), around(J._apply_adjoint)
    ), sizes


def test_the_diagonal_of_a_gram_matrix_takes_the_fewer_products():
    J, M = whole()
    A, sizes = counting(J)
    torch.testing.assert_close(A.gram().diagonal(), (M.T @ M).diagonal())
    assert sum(sizes) == 6
    sizes.clear()
    torch.testing.assert_close(A.H.gram().trace(), (M @ M.T).trace())
    assert sum(sizes) == 6
    damped = 3 * A.gram().damped(0.1) + from_diagonal(A.in_space, torch.ones(13, dtype=F64))
    sizes.clear()
    want = 3 * (M.T @ M).diagonal() + 0.3 + 1
    torch.testing.assert_close(damped.diagonal(), want)
    assert sum(sizes) == 6


def test_a_program_of_pointwise_operations_tells_its_diagonal():
    runs = []

    def f(p):
        a = p["a"].sin().exp() * 3 - p["a"]
        return {"a": torch.where(a > 0, a, a * 0.1), "b": torch.tanh(p["b"]) / (1 + p["b"] ** 2)}

    p = {"a": rand(50_000), "b": rand(3, 4, seed=1)}
    here = lz.Linearizer(f).at(p)
    leaves = [t.clone().requires_grad_() for t in p.values()]
    want = torch.autograd.grad(
        [t.sum() for t in f(dict(zip(p, leaves, strict=True))).values()], leaves
    )
    torch.testing.assert_close(here.jacobian.diagonal(), torch.cat([t.reshape(-1) for t in want]))
    assert not runs
    # Looks alike, and is not: the leaves change places, or one entry reaches another.
    x, y = rand(3), rand(3, seed=1)
    swapped = lz.Linearizer(lambda x, y: (y.sin(), x.exp())).at(x, y).jacobian
    torch.testing.assert_close(swapped.diagonal(), torch.zeros(6, dtype=F64))
    mixed = lz.Linearizer(lambda x: x.roll(1) * x).at(x).jacobian
    torch.testing.assert_close(mixed.diagonal(), x.roll(1))
    broadcast = lz.Linearizer(lambda x: x * x[:1]).at(x).jacobian
    want = torch.autograd.functional.jacobian(lambda x: x * x[:1], x).diagonal()
    torch.testing.assert_close(broadcast.diagonal(), want)
    for holomorphic in (torch.exp, lambda z: (2 + 1j) * z):
        z = rand(3, dtype=torch.complex128)
        J = lz.Linearizer(holomorphic).at(z).jacobian
        torch.testing.assert_close(J.diagonal(), J.materialize().diagonal())
    with pytest.raises(lz.errors.UnsupportedError, match="holomorphic"):
        lz.Linearizer(lambda z: z * z.conj()).at(z).jacobian.diagonal()


APART = {
    "layer": lambda x: torch.tanh(x @ rand(4, 4)) * x,
    "complex layer": lambda z: torch.tanh(z @ rand(4, 4, dtype=torch.complex128)) * z,
    "to fewer": lambda x: torch.sin(x @ rand(4, 2)),
    "to more": lambda x: torch.cat([x, torch.relu(x[:, :2]).exp()], 1),
    "to one": lambda x: (x * x).sum(1).sqrt(),
    "reshaped": lambda x: torch.linalg.cross(x.view(60, 2, 2)[:, 0, :1] * x[:, :3], x[:, 1:]),
}


@pytest.mark.parametrize("which", list(APART))
def test_a_program_that_treats_rows_alone_tells_its_diagonals(which, monkeypatch):
    f, x = APART[which], rand(60, 4, dtype=torch.complex128 if "complex" in which else F64)
    units = torch.eye(240, dtype=x.dtype).view(240, 60, 4)
    M = torch.stack([torch.func.jvp(f, (x,), (v,))[1].reshape(-1) for v in units], 1)
    J = lz.Linearizer(f).at(x).jacobian

    def many(*args):
        raise AssertionError("a product for every row or column")

    monkeypatch.setattr(lz.operators.LinearOperator, "columns", many)
    monkeypatch.setattr(lz.operators.LinearOperator, "rows", many)
    for chunk_size in ("auto", 1, 3, None):
        got = J.gram().diagonal(chunk_size=chunk_size)
        torch.testing.assert_close(got, (M.mH @ M).diagonal())
        if M.shape[0] == M.shape[1]:
            torch.testing.assert_close(J.diagonal(chunk_size=chunk_size), M.diagonal())


def test_what_mixes_rows_is_no_matter_of_rows():
    x = rand(60, 4, seed=4)
    W = rand(60, 60, seed=5)
    for f in (
        lambda x: W @ x,
        lambda x: x * x.mean(0),
        lambda x: x.flip(0) * x,
        lambda x: x.cumsum(0),
        lambda x: x.softmax(0),
        lambda x: x.reshape(4, 60).T * x,
        lambda x: x.T.reshape(60, 4) * x,
        lambda x: torch.cat([x[:30], x[30:] * x[:30]]),
    ):
        M = torch.autograd.functional.jacobian(f, x).reshape(240, 240)
        J = lz.Linearizer(f).at(x).jacobian
        torch.testing.assert_close(J.diagonal(), M.diagonal())
        torch.testing.assert_close(J.gram().diagonal(), (M.T @ M).diagonal())


@pytest.mark.parametrize("dtype", [F64, torch.complex128])
def test_estimates_say_their_error(dtype):
    A = rand(30, 30, dtype=dtype)
    J = lz.Linearizer(lambda x: A @ x).at(rand(30, dtype=dtype)).jacobian
    generator = torch.Generator().manual_seed(5)
    trace = J.trace(samples=400, generator=generator, chunk_size=37)
    assert trace.samples == 400
    assert (trace.value - A.trace()).abs() < 4 * trace.error
    off = A - torch.diag(A.diagonal())
    # Of zᵀ·A·z with random signs, the variance is the sum of |a_ij + a_ji|² over i < j.
    variance = (off + off.mT).abs().square().sum() / 2
    torch.testing.assert_close(trace.error, (variance / 400).sqrt(), rtol=0.2, atol=0)
    diagonal = J.diagonal(samples=400, generator=generator)
    assert diagonal.value.shape == (30,)
    assert ((diagonal.value - A.diagonal()).abs() < 5 * diagonal.error).all()
    variance = off.abs().square().sum(1)
    torch.testing.assert_close(diagonal.error, (variance / 400).sqrt(), rtol=0.3, atol=0)
    again = J.trace(samples=400, generator=torch.Generator().manual_seed(5), chunk_size=37)
    assert torch.equal(again.value, trace.value)
    exact = from_diagonal(J.in_space, A.diagonal()).trace(samples=2)
    torch.testing.assert_close(exact.value, A.trace())
    assert exact.error < 1e-12
    for wrong in (1, 0, 2.5, "many"):
        with pytest.raises(lz.errors.OptionError, match="samples"):
            J.trace(samples=wrong)


def test_what_has_no_diagonal():
    J, _ = whole()
    for read in (J.diagonal, J.trace):
        with pytest.raises(lz.errors.SpaceError, match="not square"):
            read()
    with pytest.raises(lz.errors.SpaceError):
        J.damped(0.1)


# -- arrays, and what is no operator -------------------------------------------------------


def test_an_operator_is_no_array():
    J, A = square()
    for make in (np.asarray, np.array, lambda J: np.asarray(J, dtype=float)):
        with pytest.raises(lz.errors.StructureError, match="materialize"):
            make(J)
    for product in (lambda: np.ones(5) @ J, lambda: J @ np.ones(5), lambda: np.ones((2, 5)) @ J):
        with pytest.raises(lz.errors.StructureError, match="to_scipy"):
            product()
    torch.testing.assert_close(torch.ones(5, dtype=F64) @ J, torch.ones(5, dtype=F64) @ A)


def test_messages_of_constructors():
    for make in (identity, lambda n: from_diagonal(n, [1.0])):
        with pytest.raises(lz.errors.StructureError, match=r"expected a space.*got int 3"):
            make(3)
    J, _ = square()
    with pytest.raises(lz.errors.SpaceError) as error:
        J @ rand(4)
    assert str(error.value).count("(5,)") == 1


# -- matrices that are there ---------------------------------------------------------------


def test_a_matrix_is_written_out_once_at_a_point():
    runs, products = 0, []
    M = rand(4, 3)

    class Times(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return M @ x

        @staticmethod
        def backward(ctx, g):
            products.append(1)
            return M.T @ g

        @staticmethod
        def jvp(ctx, t):
            products.append(1)
            return M @ t

    def f(x):
        nonlocal runs
        runs += 1
        return Times.apply(x)

    here = lz.Linearizer(f).at(rand(3))
    first = here.jacobian.materialize()
    torch.testing.assert_close(first, M)
    taken = len(products)
    first.zero_()  # the caller's own
    torch.testing.assert_close(here.jacobian.materialize(), M)
    torch.testing.assert_close(here.jacobian.gram().materialize(), M.T @ M)
    torch.testing.assert_close(here.jacobian.gram().diagonal(), (M.T @ M).diagonal())
    assert len(products) == taken
    here.jacobian @ rand(3)  # a custom Function is called at each product
    assert len(products) == taken + 1
    assert runs == 1
    assert here.nbytes >= M.nbytes


def test_a_matrix_that_is_there_serves_products_and_is_never_stale():
    c = rand(3)

    def f(x):
        for _ in range(30):
            x = torch.sin(c * x).cumsum(0)
        return x

    x = rand(3, seed=1)
    want = torch.autograd.functional.jacobian(f, x)
    here = lz.Linearizer(f).at(x)
    J = here.jacobian
    J.materialize(), J.gram().materialize()
    for k in range(4):
        v = rand(3, seed=k)
        torch.testing.assert_close(J @ v, want @ v)
        torch.testing.assert_close(J.H @ v, want.T @ v)
        torch.testing.assert_close(J.gram() @ v, want.T @ (want @ v))
        torch.testing.assert_close(J @ rand(3, 2, seed=k), want @ rand(3, 2, seed=k))
    v = rand(3).requires_grad_()
    torch.testing.assert_close(torch.autograd.grad((J @ v).sum(), v)[0], want.sum(0))
    with torch.no_grad():
        c.mul_(2)
    with pytest.raises(lz.errors.StalenessError):
        J @ rand(3)
    with pytest.raises(lz.errors.StalenessError):
        J.materialize()
    other = lz.Linearizer(torch.exp).at(x)
    A = other.jacobian
    A.materialize()
    other.close()
    for use in (A.materialize, lambda: A @ x, lambda: A.gram() @ x, A.diagonal):
        with pytest.raises(lz.errors.ClosedError):
            use()
    none = lz.Linearizer(torch.exp, dense_limit=0).at(x).jacobian
    none.materialize()
    assert none._written.matrix() is None
