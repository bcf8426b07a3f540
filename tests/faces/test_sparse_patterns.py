"""Patterns through PyTorch's kernels and custom Functions, against dense Jacobians."""

import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch.autograd import Function

import linearize as lz
import linearize.sparse as sparse
from tests.support.functions import rand

F64 = torch.float64


GRID = torch.rand(1, 3, 4, 2, generator=torch.Generator().manual_seed(3), dtype=F64) * 1.6 - 0.8
SPD = 30 * torch.eye(3, dtype=F64)
BUSES = 20


def admittances():
    """A network of buses in a ring with a few chords, stored densely and sparsely."""
    Y = torch.zeros(BUSES, BUSES, dtype=torch.complex128)
    for i in range(BUSES):
        for j in {(i + 1) % BUSES, (i * 7) % BUSES} - {i}:
            y = 1 / (0.01 + 0.1j * (1 + i / BUSES))
            Y[i, j], Y[j, i] = Y[i, j] - y, Y[j, i] - y
            Y[i, i], Y[j, j] = Y[i, i] + y, Y[j, j] + y
    return Y


Y = admittances()
SPARSE_Y = Y.to_sparse_coo().coalesce()


def power_flow(x, currents):
    angle, size = x.chunk(2)
    V = torch.polar(1 + 0.05 * size, 0.1 * angle)
    S = V * currents(V).conj()
    return torch.cat([S.real[1:], S.imag[3:]])


#: Functions with the number of their arguments, whose patterns are found exactly.
EXACT = {
    "power flow": (2 * BUSES, lambda x: power_flow(x, lambda V: (SPARSE_Y @ V[:, None])[:, 0])),
    "dense admittances": (2 * BUSES, lambda x: power_flow(x, lambda V: Y @ V)),
    "complex parts": (8, lambda x: torch.view_as_real(torch.view_as_complex(x.view(4, 2)) ** 2)),
    "complex": (8, lambda x: torch.complex(x[:4], x[4:]).abs()),
    "avg_pool1d": (12, lambda x: F.avg_pool1d(x[None] ** 2, 3, 2, 1)),
    "avg_pool2d": (24, lambda x: F.avg_pool2d(x.view(1, 4, 6) ** 2, (2, 3), 1)),
    "avg_pool3d": (24, lambda x: F.avg_pool3d(x.view(1, 2, 3, 4) ** 2, 2)),
    "adaptive": (24, lambda x: F.adaptive_avg_pool2d(x.view(1, 4, 6) ** 2, (2, 4))),
    "nearest": (12, lambda x: F.interpolate(x.view(1, 1, 3, 4).exp(), scale_factor=2)),
    "bilinear": (
        12,
        lambda x: F.interpolate(x.view(1, 1, 3, 4).exp(), (5, 7), mode="bilinear"),
    ),
    "bicubic": (40, lambda x: F.interpolate(x.view(1, 1, 5, 8).exp(), (7, 9), mode="bicubic")),
    "cross": (12, lambda x: torch.linalg.cross(x.view(4, 3), x.view(4, 3).roll(1, 0))),
    "as_strided": (12, lambda x: x.view(3, 4).as_strided((3, 3), (4, 1), 1).sin()),
    "overlapping": (12, lambda x: x.exp().as_strided((5, 3), (2, 1)).sin()),
    "solve_triangular": (
        24,
        lambda x: torch.linalg.solve_triangular(
            SPD + SPD.roll(1, 0).tril(), x.view(4, 3, 2), upper=False
        ),
    ),
    "fft": (24, lambda x: torch.fft.fft(x.view(4, 6) ** 2, dim=0).abs()),
    "rfft": (24, lambda x: torch.fft.rfft(x.view(4, 6) ** 2, dim=1).abs()),
    "grid_sample": (30, lambda x: F.grid_sample(x.view(1, 1, 5, 6), GRID, align_corners=False)),
    "conv2d": (50, lambda x: F.conv2d(x.view(1, 2, 5, 5), rand(2, 1, 3, 3), padding=1, groups=2)),
    "replicate": (12, lambda x: F.pad(x.view(1, 3, 4) ** 2, (1, 1), mode="replicate")),
    "reflect": (12, lambda x: F.pad(x.view(1, 3, 4) ** 2, (2, 1), mode="reflect")),
    "circular": (12, lambda x: F.pad(x.view(1, 3, 4) ** 2, (2, 1), mode="circular")),
    "fold": (27, lambda x: F.unfold(x.view(1, 3, 3, 3) ** 2, 2)),
    "layer_norm": (12, lambda x: F.layer_norm(x.view(4, 3), (3,))),
    "group_norm": (24, lambda x: F.group_norm(x.view(2, 4, 3), 2)),
    "softmax": (12, lambda x: x.view(4, 3).softmax(1)),
    "cumsum": (12, lambda x: (x.view(4, 3) ** 2).cumsum(1)),
    "logcumsumexp": (12, lambda x: x.view(4, 3).logcumsumexp(1)),
    "trace": (16, lambda x: torch.stack([x.view(4, 4).trace() ** 2, x[1].exp()])),
    "cdist": (12, lambda x: torch.cdist(x.view(4, 3), rand(2, 3))),
    "attention": (
        24,
        lambda x: F.scaled_dot_product_attention(*[x.view(2, 1, 4, 3)] * 3),
    ),
    "embedding": (8, lambda x: F.embedding(torch.tensor([1, 3, 1]), x.view(4, 2)) ** 2),
    "masked_select": (6, lambda x: x.masked_select(torch.tensor([True, False] * 3)) ** 2),
    "index_put": (6, lambda x: x.clone().index_put((torch.tensor([4, 1]),), x[:2] ** 2)),
    "slice_scatter": (6, lambda x: (x**2).slice_scatter(x[:2].sin(), 0, 3, 5)),
    "huber": (6, lambda x: F.huber_loss(x, torch.zeros_like(x), reduction="none", delta=9.0)),
}
#: Those that may hold all entries of a batch entry, with how many these are.
BATCHED = {
    "solve": (
        48,
        lambda x: torch.linalg.solve(SPD + x[:36].view(4, 3, 3), x[36:].view(4, 3)),
        12 * 12,
    ),
    "cholesky": (
        36,
        lambda x: torch.linalg.cholesky(SPD + x.view(4, 3, 3) @ x.view(4, 3, 3).mT),
        36 * 9,
    ),
    "inverse": (36, lambda x: torch.linalg.inv(SPD + x.view(4, 3, 3)), 36 * 9),
    "matrix_exp": (36, lambda x: torch.linalg.matrix_exp(x.view(4, 3, 3)), 36 * 9),
    "det": (36, lambda x: torch.linalg.det(SPD + x.view(4, 3, 3)), 36),
    "irfft": (24, lambda x: torch.fft.irfft(torch.fft.rfft(x.view(4, 6)) ** 2), 24 * 6),
    "eigvalsh": (36, lambda x: torch.linalg.eigvalsh(x.view(4, 3, 3) + SPD), 12 * 9),
}


def dense(f, x):
    return torch.autograd.functional.jacobian(lambda x: f(x).reshape(-1), x)


@pytest.mark.parametrize("name", EXACT)
def test_exact(name):
    n, f = EXACT[name]
    lin = lz.Linearizer(f)
    union = None
    for seed in range(3):
        x = rand(n, seed=seed)
        here, want = lin.at(x), dense(f, x)
        nonzero = want.abs() > 1e-14 * want.abs().max()
        union = nonzero if union is None else union | nonzero
        torch.testing.assert_close(sparse.jacobian(here).to_dense(), want)
    found = torch.from_numpy(sparse.pattern(here).toarray())
    assert torch.equal(found, union)


@pytest.mark.parametrize("name", BATCHED)
def test_within_a_batch_entry(name):
    n, f, most = BATCHED[name]
    x = rand(n, seed=1)
    here, want = lz.Linearizer(f).at(x), dense(f, x)
    assert sparse.pattern(here).nnz <= most
    torch.testing.assert_close(sparse.jacobian(here).to_dense(), want)


def test_half_precision_has_room_for_indices():
    """Places of entries were counted in the dtype of what stands beside them."""
    x = torch.ones(3000, dtype=torch.float16)
    f = lambda x: torch.cat([x * 2, torch.zeros(1, dtype=torch.float16)])  # noqa: E731
    found = sparse.pattern(lz.Linearizer(f).at(x))
    assert (found != sp.eye_array(3001, 3000)).nnz == 0


class Elementwise(Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx, g):
        x, y = (t.numpy() for t in ctx.saved_tensors)
        g = g.numpy()
        return torch.from_numpy(g * y), torch.from_numpy((g * x).sum(0))

    @staticmethod
    def jvp(ctx, dx, dy):
        x, y = (t.numpy() for t in ctx.saved_tensors)
        return torch.from_numpy(dx.numpy() * y + x * dy.numpy())


class Rows(Function):
    calls = 0

    @staticmethod
    def forward(ctx, x, n):
        ctx.n = n
        return x.cumsum(1)

    @staticmethod
    def backward(ctx, g):
        Rows.calls += 1
        return torch.from_numpy(np.cumsum(g.numpy()[:, ::-1], 1)[:, ::-1].copy()), None

    @staticmethod
    def jvp(ctx, dx, _):
        Rows.calls += 1
        return torch.from_numpy(np.cumsum(dx.numpy(), 1))


class Shift(Function):
    @staticmethod
    def forward(ctx, z):
        return z.roll(1).conj()

    @staticmethod
    def backward(ctx, g):
        return torch.from_numpy(np.roll(g.resolve_conj().numpy(), -1).conj())


def shift(n):
    return sp.csr_array(np.roll(np.eye(n), 1, 0))


@pytest.fixture(autouse=True)
def forgotten():
    yield
    for cls in (Elementwise, Rows, Shift):
        sparse._declared._DECLARED.pop(cls, None)


def test_declared_patterns():
    sparse.declare(Elementwise, "elementwise")
    f = lambda x: Elementwise.apply(x.view(4, 3), x[:3]).reshape(-1)  # noqa: E731
    x = rand(12)
    here = lz.Linearizer(f).at(x)
    assert sparse.pattern(here).nnz == 12 + 9
    torch.testing.assert_close(sparse.jacobian(here).to_dense(), here.jacobian.materialize())

    sparse.declare(Rows, "row-wise")
    lin = lz.Linearizer(lambda x: Rows.apply(x.view(4, 3) ** 2, 2))
    here = lin.at(x)
    assert sparse.pattern(here).nnz == 12 * 3
    want = dense(lambda x: (x.view(4, 3) ** 2).cumsum(1), x)
    torch.testing.assert_close(sparse.jacobian(here).to_dense(), want)
    sparse.jacobian(lin.at(rand(12, seed=1)))
    Rows.calls = 0
    y = rand(12, seed=2)
    got = sparse.jacobian(lin.at(y))  # the pattern is known and checked: three products and one
    torch.testing.assert_close(got.to_dense(), dense(lambda x: (x.view(4, 3) ** 2).cumsum(1), y))
    assert Rows.calls == 4


@pytest.mark.parametrize("how", ["matrix", "function"])
@pytest.mark.parametrize("dtype", [F64, torch.complex128])
def test_declared_matrices(how, dtype):
    f = lambda z: Shift.apply(z**2)  # noqa: E731
    z = rand(5, dtype=dtype)
    here = lz.Linearizer(f, opaque="materialize").at(z)
    assert sparse.pattern(here).nnz == 25
    sparse.declare(Shift, shift(5) if how == "matrix" else lambda ins, outs: shift(ins[0][0]))
    assert (sparse.pattern(here) != shift(5).astype(bool)).nnz == 0
    if dtype == F64:
        torch.testing.assert_close(
            sparse.jacobian(here).to_dense(), dense(lambda z: (z**2).roll(1), z)
        )


def test_wrong_declarations_are_errors():
    x = rand(12)
    sparse.declare(Rows, "elementwise")
    here = lz.Linearizer(lambda x: Rows.apply(x.view(4, 3), 2)).at(x)
    with pytest.raises(lz.errors.FunctionContractError, match=r"Rows\..*depends on more than"):
        sparse.jacobian(here)
    here.vjp_fn(torch.ones(4, 3, dtype=F64))  # the linearization stays usable
    sparse.declare(Rows, sp.eye_array(5))
    with pytest.raises(lz.errors.FunctionContractError, match=r"\(5, 5\), expected \(12, 12\)"):
        sparse.jacobian(here)
    sparse.declare(Elementwise, "elementwise")
    wide = lz.Linearizer(lambda x: Elementwise.apply(x[None, :4], x[:4].view(4, 1)).sum(1))
    with pytest.raises(lz.errors.LinearizeError):
        sparse.jacobian(wide.at(x))
    with pytest.raises(lz.errors.OptionError, match="row-wise"):
        sparse.declare(Rows, "rowwise")
    with pytest.raises(lz.errors.StructureError, match="custom operator"):
        sparse.declare(torch.sin, "elementwise")


@torch.library.custom_op("test_sparse_patterns::triple", mutates_args=())
def triple(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(3 * x.numpy(force=True))


triple.register_autograd(lambda ctx, g: torch.from_numpy(3 * g.numpy(force=True)))


def test_operators_of_torch_library():
    x = rand(4)
    here = lz.Linearizer(lambda x: triple(x**2)).at(x)
    assert sparse.pattern(here).nnz == 16
    sparse.declare(triple, "elementwise")
    assert sparse.pattern(here).nnz == 4
    torch.testing.assert_close(sparse.jacobian(here).to_dense(), torch.diag(6 * x))


def test_a_backward_in_torch_operations_needs_no_declaration():
    class Square(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        def backward(ctx, g):
            return 2 * ctx.saved_tensors[0] * g

    here = lz.Linearizer(lambda x: Square.apply(x).roll(1)).at(rand(6))
    assert sparse.pattern(here).nnz == 6


def test_explain_names_the_function_that_fills():
    f = lambda x: Rows.apply(x.view(4, 3), 2)  # noqa: E731
    here = lz.Linearizer(f, trace=True).at(rand(12))
    told = sparse.explain(here)
    line = f.__code__.co_firstlineno
    assert f"counted as full: Rows.backward (test_sparse_patterns.py:{line})" in told
    assert "linearize.sparse.declare" in told
    sparse.declare(Rows, "row-wise")
    assert "counted as full" not in sparse.explain(here)


@pytest.mark.slow
def test_no_operator_lacks_entries():
    """In a process of its own: importing PyTorch's database changes global settings."""
    pytest.importorskip("expecttest", reason="PyTorch's operator database needs it")
    done = subprocess.run(
        [sys.executable, "-m", "conformance.patterns", "--samples", "2"],
        cwd="tools",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
