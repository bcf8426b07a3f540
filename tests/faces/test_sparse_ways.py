"""The ways to a sparse matrix: colourings, both directions, symmetry, layouts, points, words."""

import numpy as np
import pytest
import scipy.optimize as so
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import linearize as lz
import linearize.curvature
import linearize.scipy
import linearize.sparse as sparse
from linearize.sparse import _coloring, _ways
from tests.support.functions import rand

F64 = torch.float64


def arrow(x):
    """Each output depends on its own input and the first one; the first output on all."""
    return torch.cat([(x**2).sum()[None], x[1:].sin() * x[0]])


ARROW = rand(40, seed=1)


def dense(f, x):
    return torch.autograd.functional.jacobian(lambda x: f(x).reshape(-1), x)


def patterns():
    """Boolean matrices of up to 12 by 12, empty rows and columns, arrows and bands among them."""

    def made(m, n, seed, density, full):
        rng = np.random.default_rng(seed)
        entries = rng.random((m, n)) < density
        if full & 1 and m:
            entries[rng.integers(m)] = True
        if full & 2 and n:
            entries[:, rng.integers(n)] = True
        if full & 4 and m:
            entries[rng.integers(m)] = False
        return entries

    sizes = st.integers(1, 12)
    return st.builds(
        made, sizes, sizes, st.integers(0, 9999), st.floats(0, 0.6), st.integers(0, 7)
    )


@settings(max_examples=80, deadline=None)
@given(patterns(), st.sampled_from(["auto", "forward", "reverse", "both"]), st.booleans())
def test_any_pattern_is_recovered(entries, direction, is_complex):
    dtype = torch.complex128 if is_complex else F64
    M = torch.from_numpy(entries) * rand(*entries.shape, seed=3, dtype=dtype)
    J = lz.Linearizer(lambda x: M @ x).at(rand(entries.shape[1], dtype=dtype)).jacobian
    got = sparse.jacobian(J, pattern=entries, direction=direction)
    assert torch.equal(got.indices(), torch.from_numpy(entries).nonzero().T)
    torch.testing.assert_close(got.to_dense(), M)


@settings(max_examples=60, deadline=None)
@given(patterns(), st.booleans())
def test_symmetric_patterns_are_recovered(entries, is_complex):
    n = min(entries.shape)
    half = entries[:n, :n]
    entries = half | half.T
    dtype = torch.complex128 if is_complex else F64
    M = torch.from_numpy(entries) * rand(n, n, seed=4, dtype=dtype)
    M = M + M.mH
    A = lz.Linearizer(lambda x: M @ x).at(rand(n, dtype=dtype)).jacobian
    for lower in (entries, np.tril(entries)):  # half a pattern stands for its mirror image too
        symmetric = sparse.jacobian(A, pattern=entries, direction="symmetric")
        torch.testing.assert_close(symmetric.to_dense(), M)
        way, _ = _ways.ways(sp.csr_array(lower), "symmetric", _ways.Prices(), symmetric=True)
        assert way.products <= max(n, 1)


def test_an_arrow_takes_a_handful_of_products():
    here = lz.Linearizer(arrow).at(ARROW)
    pattern = sparse.pattern(here)
    assert pattern.nnz == 40 + 39 + 39
    told = sparse.explain(here)
    assert "both: 2 products forward and 1 in reverse" in told
    assert told.partition("  <- taken")[0].splitlines()[-1].startswith("  both: ")
    torch.testing.assert_close(sparse.jacobian(here).to_dense(), dense(arrow, ARROW))
    # Dense rows in one half of the columns, dense columns in the other half of the rows.
    f = lambda x: torch.cat([arrow(x[:20]), (x[20] * x[21:]).exp(), x.prod()[None]])  # noqa: E731
    torch.testing.assert_close(
        sparse.jacobian(lz.Linearizer(f).at(ARROW), direction="both").to_dense(), dense(f, ARROW)
    )


def test_dense_rows_that_overlap_in_one_column_share_a_product():
    entries = np.zeros((10, 101), dtype=bool)
    entries[:, 100] = True
    for i in range(10):
        entries[i, 10 * i : 10 * i + 10] = True
    way, compared = _ways.ways(sp.csr_array(entries), "auto", _ways.Prices(), symmetric=False)
    assert way.products == 2, compared


def test_the_cheaper_direction_is_taken():
    band = sp.diags_array([np.ones(30)] * 3, offsets=[-1, 0, 1], shape=(30, 30)).tocsr()
    for prices, name in ((_ways.Prices(1, 2), "forward"), (_ways.Prices(2, 1), "reverse")):
        assert _ways.ways(band, "auto", prices, symmetric=False)[0].name == name
    missing = _ways.Prices(np.inf, 1)
    assert _ways.ways(band, "auto", missing, symmetric=True)[0].name == "reverse"


def test_what_has_no_jvp_is_had_in_reverse():
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.flip(0)

        @staticmethod
        def backward(ctx, g):
            return torch.from_numpy(g.detach().numpy()[::-1].copy())

    f = lambda x: torch.cat([Opaque.apply(x[:2]), x[2:] ** 2, x.sum()[None]])  # noqa: E731
    x = rand(6)
    here = lz.Linearizer(f).at(x)
    with pytest.raises(lz.errors.MissingDerivativeError):
        sparse.jacobian(here, direction="forward")
    for _ in range(2):
        torch.testing.assert_close(sparse.jacobian(here, pattern=None).to_dense(), dense(f, x))


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum() + x[0] * x.sum()


def test_hessians_take_fewer_products():
    x = rand(30, seed=2)
    H = lz.curvature.hessian(rosenbrock, x)
    want = torch.autograd.functional.hessian(rosenbrock, x)
    assert sparse.pattern(H).nnz == int(want.ne(0).sum())
    told = sparse.explain(H)
    assert "symmetric: 4 products, price 1.00  <- taken" in told  # one full row: else 30
    torch.testing.assert_close(sparse.jacobian(H).to_dense(), want)
    p = lz.scipy.ScalarFunction(rosenbrock, x, hess="sparse")
    for point in (p.x0, p.x0 + 0.1):
        got = p.hess(point)
        np.testing.assert_allclose(
            got.toarray(),
            torch.autograd.functional.hessian(rosenbrock, torch.from_numpy(point)).numpy(),
        )
    here = lz.Linearizer(arrow).at(ARROW)
    with pytest.raises(lz.errors.LinearizeError, match="symmetric"):
        sparse.jacobian(here, direction="symmetric")
    with pytest.raises(lz.errors.SpaceError, match="square"):
        sparse.jacobian(lz.Linearizer(lambda x: x[1:]).at(x), symmetric=True)


def test_gram_and_gauss_newton_matrices():
    x = rand(12)
    here = lz.Linearizer(lambda x: x[1:] * x[:-1]).at(x)
    G = here.jacobian.gram()
    assert sparse.pattern(G).nnz == 12 + 2 * 11
    torch.testing.assert_close(sparse.jacobian(G).to_dense(), G.materialize())
    J = sparse.jacobian(here, layout="scipy")
    np.testing.assert_allclose(J.power(2).sum(0), G.diagonal())
    N = lz.curvature.gauss_newton(lambda x: x[1:] * x[:-1], x, lambda y: (y**4).sum())
    assert sparse.pattern(N).nnz == 12 + 2 * 11
    torch.testing.assert_close(sparse.jacobian(N).to_dense(), N.materialize())


@pytest.mark.parametrize("layout", ["coo", "csr", "csc", "scipy"])
def test_layouts(layout):
    here = lz.Linearizer(arrow).at(ARROW)
    got = sparse.jacobian(here, layout=layout)
    want = dense(arrow, ARROW)
    if layout == "scipy":
        assert isinstance(got, sp.csr_array)
        assert got.has_canonical_format
        np.testing.assert_allclose(got.toarray(), want.numpy())
        got.data[:], got.indices[:] = 0, 0  # its arrays are its own
    else:
        assert got.layout == getattr(torch, f"sparse_{layout}")
        v = rand(40, seed=5)
        torch.testing.assert_close(got @ v, want @ v)
        torch.testing.assert_close(got.to_dense(), want)
        got.values().zero_()
    again = sparse.jacobian(here, layout=layout)
    again = torch.from_numpy(again.toarray()) if layout == "scipy" else again.to_dense()
    torch.testing.assert_close(again, want)
    with pytest.raises(lz.errors.OptionError, match="layout"):
        sparse.jacobian(here, layout="bsr")


def test_from_real_to_complex_numbers():
    a = rand(4, dtype=torch.complex128)
    here = lz.Linearizer(lambda x: x * a + x.roll(1)).at(rand(4))
    want = here.jacobian.materialize()
    torch.testing.assert_close(sparse.jacobian(here).to_dense(), want)
    with pytest.raises(lz.errors.UnsupportedError, match="real parts"):
        sparse.jacobian(here, direction="reverse")


def counted(monkeypatch):
    found = []
    inner = sparse._patterns.dependence
    monkeypatch.setattr(sparse._patterns, "dependence", lambda p: found.append(1) or inner(p))
    return found


def test_points_of_one_structure_share_pattern_and_colours(monkeypatch):
    found = counted(monkeypatch)
    runs = 0

    def f(x):
        nonlocal runs
        runs += 1
        return arrow(x)

    lin = lz.Linearizer(f)
    for k in range(6):
        x = rand(40, seed=k)
        torch.testing.assert_close(sparse.jacobian(lin.at(x)).to_dense(), dense(arrow, x))
    assert len(found) == 1
    assert runs == 6


def test_a_pattern_is_found_again_where_indices_differ(monkeypatch):
    found = counted(monkeypatch)

    def f(x, index):
        return x[index] * x[:3]

    lin = lz.Linearizer(f, argnums=0)
    for index in ([0, 1, 2], [0, 1, 2], [5, 4, 3], [5, 4, 3], [0, 5, 0]):
        x, i = rand(6, seed=sum(index)), torch.tensor(index)
        got = sparse.jacobian(lin.at(x, i))
        want = torch.autograd.functional.jacobian(lambda x, i=i: f(x, i), x)
        torch.testing.assert_close(got.to_dense(), want)
        assert got._nnz() == int(want.ne(0).sum())
    assert len(found) == 3


def test_sorting_and_pooling_follow_their_indices():
    f = lambda x: torch.nn.functional.max_pool1d(x.sort().values[None] ** 2, 2)[0]  # noqa: E731
    lin = lz.Linearizer(f)
    for k in range(4):
        x = rand(8, seed=k)
        got = sparse.jacobian(lin.at(x))
        torch.testing.assert_close(got.to_dense(), dense(f, x))
        assert got._nnz() == 4


def test_each_point_is_checked():
    """A Function whose backward takes another way at another point."""

    class Turning(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.turned = bool(x[0] > 0)
            return x.flip(0) if ctx.turned else x.clone()

        @staticmethod
        def backward(ctx, g):
            return g.flip(0) if ctx.turned else g.clone()

    f = lambda x: Turning.apply(x) ** 2  # noqa: E731
    lin = lz.Linearizer(f)
    for k in range(6):
        x = rand(5, seed=k)
        torch.testing.assert_close(sparse.jacobian(lin.at(x)).to_dense(), dense(f, x))
    assert sparse.pattern(lin.at(rand(5))).nnz == 5


def test_a_matrix_that_f_found_ready_keeps_its_zeros():
    D = torch.diag(torch.ones(6, dtype=F64)) - torch.diag(torch.ones(5, dtype=F64), 1)
    lin = lz.Linearizer(lambda x, D: (D @ x) ** 2, argnums=0)
    x = rand(6)
    assert sparse.pattern(lin.at(x, D)).nnz == 11
    for M in (D, D.T.contiguous(), rand(6, 6)):  # the zeros are elsewhere, or there are none
        got = sparse.jacobian(lin.at(x, M))
        torch.testing.assert_close(got.to_dense(), 2 * (M @ x)[:, None] * M)
        assert got._nnz() == int(M.ne(0).sum())
    # One that depends on the argument is zero at this point only.
    g = lambda x: x.relu().view(2, 3).T @ x.view(2, 3)  # noqa: E731
    y = -rand(6).abs()
    assert sparse.pattern(lz.Linearizer(g).at(y)).nnz == 9 * 4 - 3 * 2


def test_explain_names_what_fills():
    def f(x):
        y = torch.fft.rfft(x).abs()
        return y + x[:4]

    here = lz.Linearizer(f, trace=True).at(rand(6))
    told = sparse.explain(here)
    assert "4 x 6, 24 entries: 6 in a row, 6 at most" in told
    line = f.__code__.co_firstlineno + 1
    assert f"test_sparse_ways.py:{line}" in told
    assert "_fft" in told
    assert "counted as full" not in told


def test_large_patterns_take_linear_time():
    """Counted in colours and entries, not in seconds."""
    n = 20_000
    band = sp.diags_array([np.ones(n)] * 5, offsets=[-2, -1, 0, 1, 2], shape=(n, n)).tocsr()
    assert _coloring.count(_coloring.grouped(band.astype(bool))) == 5
    assert _coloring.count(_coloring.star(band.astype(bool))) <= 5
    hub = sp.eye_array(n, format="lil", dtype=bool)
    hub[0, :] = hub[:, 0] = True
    hub = hub.tocsr()
    assert _coloring.count(_coloring.star(hub)) == 2
    assert _ways.ways(hub, "auto", _ways.Prices(), symmetric=False)[0].products == 3


def test_least_squares_and_constraints_with_sparse_matrices():
    def f(u):
        return torch.cat([10 * (u[1:] - u[:-1] ** 2), 1 - u])

    p = lz.scipy.VectorFunction(f, torch.full((30,), 0.7, dtype=F64), jac="sparse")
    sol = so.least_squares(p.fun, p.x0, p.jac, method="trf")
    np.testing.assert_allclose(sol.x, 1.0, atol=1e-6)
    v = np.linspace(0, 1, 59)
    H = p.hess(p.x0, v)
    assert sp.issparse(H)
    weights = torch.from_numpy(v)
    want = torch.autograd.functional.hessian(lambda u: weights @ f(u), torch.from_numpy(p.x0))
    np.testing.assert_allclose(H.toarray(), want.numpy())
