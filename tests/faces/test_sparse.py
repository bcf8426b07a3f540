"""Sparse Jacobians: patterns against the entries of dense ones, products counted."""

import numpy as np
import pytest
import scipy.optimize as so
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import linearize as lz
import linearize.scipy
import linearize.sparse as sparse
from linearize.sparse import _reading
from tests.support.functions import rand

F64 = torch.float64


INDEX = torch.tensor([3, 1, 1, 5])
MASK = torch.tensor([True, False, True, True, False, True])
KERNEL = rand(1, 1, 3, seed=1)
KERNEL2 = rand(4, 2, 3, 2, seed=2)
MATRIX = rand(4, 6, seed=3)
BATCH = rand(2, 2, 3, seed=4)
SPARSE = torch.sparse_coo_tensor(
    [[0, 1, 3], [2, 5, 0]], rand(3), (4, 6), check_invariants=True
).coalesce()

#: Functions of six numbers whose patterns are found exactly.
EXACT = {
    "pointwise": lambda x: x.sin() * x.exp() - x,
    "stencil": lambda x: x[2:] - 2 * x[1:-1] ** 2 + x[:-2],
    "roll": lambda x: x.roll(1) * x,
    "gather": lambda x: x[INDEX] * x[1],
    "take_along": lambda x: x.view(2, 3).gather(1, torch.tensor([[0, 2], [1, 1]])).exp(),
    "mask": lambda x: x[MASK] ** 2,
    "scatter": lambda x: torch.zeros(7, dtype=F64).index_add(0, INDEX, x[:4].cos()),
    "scatter_add": lambda x: torch.zeros(7, dtype=F64).scatter_add(0, INDEX, x[:4] ** 2),
    "written": lambda x: torch.cat([x[:2].prod()[None], x[3:]]).sin(),
    "matrix": lambda x: x.view(3, 2).T.cos(),
    "rows": lambda x: x.view(3, 2).sum(1) ** 2,
    "mean": lambda x: x.view(3, 2).mean(0, keepdim=True).exp() * x.view(3, 2)[:1],
    "sum": lambda x: x.sum() * torch.ones(2, dtype=F64),
    "cumsum": lambda x: x.cumsum(0) ** 2,
    "softmax": lambda x: x.view(3, 2).softmax(1),
    "log_softmax": lambda x: x.view(3, 2).log_softmax(0),
    "mv": lambda x: (MATRIX[:, :2] @ x[:2]) ** 2,
    "mm": lambda x: torch.tanh(x.view(3, 2) @ MATRIX[:2]),
    "left": lambda x: torch.tanh(MATRIX[:, :3] @ x.view(3, 2)),
    "bmm": lambda x: torch.bmm(x.view(2, 1, 3), BATCH.mT.contiguous()) ** 2,
    "left_bmm": lambda x: torch.bmm(BATCH, x.view(2, 3, 1)) ** 2,
    "conv": lambda x: F.conv1d(x[None, None], KERNEL).exp(),
    "strided": lambda x: F.conv1d(x[None, None], KERNEL, stride=2, padding=2, dilation=2) ** 2,
    "transposed": lambda x: F.conv_transpose1d(x[None, None], KERNEL, stride=2) ** 2,
    "pad": lambda x: F.pad(x, (1, 2)) ** 2,
    "unfold": lambda x: x.unfold(0, 3, 2).sin(),
    "flip": lambda x: x.flip(0) * x,
    "stack": lambda x: torch.stack([x, x.roll(2)], 1).sin(),
    "relu": lambda x: F.softplus(x) + F.silu(x.roll(1)),
    "repeat": lambda x: x.repeat(2) ** 2,
    "chunks": lambda x: x.chunk(3)[1].sin(),
    "diagonal": lambda x: (x[:, None] * torch.ones(6, dtype=F64)).diagonal() ** 2,
    "constant": lambda x: torch.cat([x[:2], torch.ones(2, dtype=F64)]),
}
#: Functions whose patterns are too large: no rule for an operation, or numbers would matter.
LARGER = {
    "where": lambda x: torch.where(MASK, x, x.roll(1) ** 2),
    "index_put": lambda x: x.clone().index_put((INDEX[:2],), x[:2] * x[2]),
    "norm": lambda x: torch.linalg.norm(x.view(3, 2), dim=1),
    "fft": lambda x: torch.fft.irfft(torch.fft.rfft(x) * 2),
    "prod": lambda x: x.view(3, 2).prod(1),
    "sort": lambda x: x.sort().values.sin(),
    "max_pool": lambda x: F.max_pool1d(x[None], 2).sin(),
    "layer_norm": lambda x: F.layer_norm(x.view(3, 2), (2,)),
    "sparse": lambda x: torch.sparse.mm(SPARSE, x[:, None]).sin(),
    "as_strided": lambda x: x.as_strided((3,), (2,)).sin(),
    "triangle": lambda x: torch.linalg.solve(torch.eye(6, dtype=F64) * 2 + torch.diag(x), x),
}
POINT = rand(6, seed=7)


def dense(f, x=POINT):
    return torch.autograd.functional.jacobian(lambda x: f(x).reshape(-1), x)


@pytest.mark.parametrize("name", [*EXACT, *LARGER])
def test_patterns_hold_every_entry(name):
    f = EXACT.get(name) or LARGER[name]
    here = lz.Linearizer(f).at(POINT)
    want = dense(f)
    found = torch.from_numpy(sparse.pattern(here).toarray())
    assert found.shape == want.shape
    assert not (want.ne(0) & ~found).any()
    if name in EXACT:
        assert torch.equal(found, want.ne(0))
    for direction in ("auto", "forward", "reverse"):
        got = sparse.jacobian(here, direction=direction)
        assert got.layout == torch.sparse_coo
        torch.testing.assert_close(got.to_dense(), want)


def test_two_dimensional_convolution_with_groups():
    f = lambda x: F.conv2d(x.view(2, 2, 5, 4), KERNEL2[:, :1], stride=(2, 1), padding=1, groups=2)  # noqa: E731
    x = rand(80)
    here = lz.Linearizer(f).at(x)
    assert np.array_equal(sparse.pattern(here).toarray(), dense(f, x).ne(0).numpy())


def test_custom_functions_count_as_full():
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.flip(0)

        @staticmethod
        def backward(ctx, g):
            return torch.from_numpy(g.detach().numpy()[::-1].copy())

    f = lambda x: torch.cat([Opaque.apply(x[:2]), x[2:] ** 2])  # noqa: E731
    here = lz.Linearizer(f, opaque="materialize").at(POINT)
    found = sparse.pattern(here).toarray()
    want = np.zeros((6, 6), dtype=bool)
    want[:2, :2] = True
    want[[2, 3, 4, 5], [2, 3, 4, 5]] = True
    assert np.array_equal(found, want)
    torch.testing.assert_close(sparse.jacobian(here).to_dense(), dense(f))


PIECES = [name for name in EXACT if name not in ("constant",)]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(PIECES), min_size=2, max_size=3), st.booleans())
def test_compositions(names, through):
    def f(x):
        for name in names:
            y = EXACT[name](x).reshape(-1)
            x = torch.cat([y, x])[:6] if through else F.pad(y, (0, max(0, 6 - len(y))))[:6]
        return x

    here = lz.Linearizer(f).at(POINT)
    want = dense(f)
    found = torch.from_numpy(sparse.pattern(here).toarray())
    assert not (want.ne(0) & ~found).any()
    torch.testing.assert_close(sparse.jacobian(here).to_dense(), want)


def grid(u):
    """The five-point Laplacian of a square grid, with a reaction."""
    n = round(len(u) ** 0.5)
    p = F.pad(u.view(n, n), (1, 1, 1, 1))
    return (p[2:, 1:-1] + p[:-2, 1:-1] + p[1:-1, 2:] + p[1:-1, :-2] - 4 * u.view(n, n)).reshape(
        -1
    ) + u.exp()


def test_as_many_products_as_colours():
    u = rand(400)
    runs = 0

    def f(u):
        nonlocal runs
        runs += 1
        return grid(u)

    here = lz.Linearizer(f).at(u)
    found = sparse.pattern(here)
    assert found.nnz == 5 * 400 - 4 * 20
    colours = sparse.coloring(found)
    assert colours.max() + 1 <= 8
    mapped = []
    J = here.jacobian
    inner = J._apply

    def counting(parts, *, stacked):
        mapped.append(len(parts[0]) if stacked else 1)
        return inner(parts, stacked=stacked)

    J._apply = counting
    got = sparse.jacobian(J, pattern=found)
    assert sum(mapped) == colours.max() + 4  # the last three check the result
    assert runs == 1
    torch.testing.assert_close(got.to_dense(), dense(grid, u))


def test_coloring_is_valid_and_few():
    band = sp.diags_array([np.ones(50)] * 3, offsets=[-1, 0, 1], shape=(50, 50))
    colours = sparse.coloring(band)
    assert colours.max() + 1 == 3
    some = sp.random_array((40, 30), density=0.08, rng=0, format="csr")
    colours = sparse.coloring(some)
    for i in range(40):
        row = colours[some[[i]].indices]
        assert len(set(row)) == len(row)
    assert len(set(sparse.coloring(np.ones((3, 5))))) == 5
    assert sparse.coloring(sp.csr_array((3, 4))).max() == 0


def test_rows_are_grouped_where_that_is_cheaper():
    f = lambda x: torch.cat([x.sum()[None] ** 2, x**2])  # noqa: E731
    x = rand(50)  # one full row: columns need 50 colours, rows 2
    here = lz.Linearizer(f).at(x)
    assert sparse.coloring(sparse.pattern(here).T).max() + 1 == 2
    torch.testing.assert_close(sparse.jacobian(here).to_dense(), dense(f, x))
    J = here.jacobian
    J._apply_adjoint = None
    with pytest.raises(TypeError):  # it was the rows that were taken
        sparse.jacobian(J)


def test_several_arguments_and_outputs():
    def f(x, p):
        return {"a": x[1:] * p["s"], "b": p["v"] ** 2}

    x, p = rand(4), {"s": rand(3, seed=1), "v": rand(2, seed=2)}
    here = lz.Linearizer(f).at(x, p)
    want = here.jacobian.materialize()
    got = sparse.jacobian(here)
    torch.testing.assert_close(got.to_dense(), want)
    assert got._nnz() == 8


def test_complex():
    z = rand(5, dtype=torch.complex128)
    here = lz.Linearizer(lambda z: z[1:] ** 2 * (1 + 2j) + z[:-1]).at(z)
    for direction in ("forward", "reverse"):
        got = sparse.jacobian(here, direction=direction)
        torch.testing.assert_close(got.to_dense(), here.jacobian.materialize())


def test_complex_numbers_as_two_real_ones():
    z = rand(5, dtype=torch.complex128)
    for f in (lambda z: z * z.conj() + z.roll(1), lambda z: z.abs() + z.roll(1).real):
        for k in range(2):
            J = lz.Linearizer(f).at(z + k).jacobian.as_real()
            got, want = sparse.jacobian(J), J.materialize()
            torch.testing.assert_close(got.to_dense(), want)
            assert got._nnz() == 4 * len(want)  # two numbers, two parts of each
            assert (sparse.pattern(J).toarray() >= (want != 0).numpy()).all()
            assert "6 products" in sparse.explain(J)


def test_a_pattern_that_lacks_entries_is_an_error():
    here = lz.Linearizer(lambda x: x * x.roll(1)).at(POINT)
    with pytest.raises(lz.errors.LinearizeError, match="lacks entries"):
        sparse.jacobian(here, pattern=sp.eye_array(6))
    with pytest.raises(lz.errors.SpaceError):
        sparse.jacobian(here, pattern=sp.eye_array(5))
    with pytest.raises(lz.errors.OptionError):
        sparse.jacobian(here, direction="sideways")
    with pytest.raises(lz.errors.StructureError, match="has to be given"):
        sparse.jacobian(here.jacobian.H)
    for wrong in (torch.sin, here.jvp_fn, np.eye(6)):
        for ask in (sparse.jacobian, sparse.pattern, sparse.explain):
            with pytest.raises(lz.errors.StructureError, match="expected a linearization"):
                ask(wrong)
    torch.testing.assert_close(
        sparse.jacobian(here.jacobian.gram(), pattern=np.ones((6, 6))).to_dense(),
        here.jacobian.gram().materialize(),
    )


def test_a_pattern_that_is_too_large_counts_as_full(monkeypatch):
    monkeypatch.setattr(_reading, "LIMIT", 3)
    here = lz.Linearizer(lambda x: x * x.roll(1)).at(POINT)
    assert sparse.pattern(here).nnz == 36
    torch.testing.assert_close(sparse.jacobian(here).to_dense(), dense(lambda x: x * x.roll(1)))


def test_empty():
    here = lz.Linearizer(lambda x: x[:0]).at(POINT)
    assert sparse.jacobian(here).shape == (0, 6)


def test_least_squares_with_a_sparse_jacobian():
    runs = 0

    def f(u):
        nonlocal runs
        runs += 1
        return torch.cat([10 * (u[1:] - u[:-1] ** 2), 1 - u])

    p = lz.scipy.VectorFunction(f, torch.full((30,), 0.7, dtype=F64), jac="sparse")
    assert sp.issparse(p.jac(p.x0))
    np.testing.assert_allclose(p.jac(p.x0).toarray(), dense(f, torch.from_numpy(p.x0)).numpy())
    runs = 0
    sol = so.least_squares(p.fun, p.x0, p.jac)
    np.testing.assert_allclose(sol.x, 1.0, atol=1e-6)
    assert runs <= sol.nfev
