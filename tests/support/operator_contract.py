"""What every operator must satisfy, checked against its matrix."""

import numpy as np
import torch

import linearize.scipy
from linearize.operators import LinearOperator


def flat(space, tree):
    """Return a pytree as a vector, without the package's own flattening."""
    leaves = torch.utils._pytree.tree_leaves(tree)
    return torch.cat([t.reshape(-1) for t in leaves if t is not None])


def element(space, vector):
    """Return a vector as a pytree, without the package's own flattening."""
    parts = []
    for leaf in space.tensors:
        parts.append(vector[: leaf.numel].reshape(leaf.shape))
        vector = vector[leaf.numel :]
    return space.unflatten(parts)


def check_operator(A: LinearOperator, matrix: torch.Tensor) -> None:
    """Compare every form of an operator with the dense matrix that it stands for.

    Each product is formed several times: programs are simplified on the way.
    """
    m, n = matrix.shape
    close = torch.testing.assert_close
    generator = torch.Generator().manual_seed(0)

    def vector(size, *more):
        return torch.randn(size, *more, dtype=matrix.dtype, generator=generator)

    assert A.shape == (m, n)
    assert A.dtype == matrix.dtype
    assert A.device == matrix.device
    assert A.in_space.size == n
    assert A.out_space.size == m

    for _ in range(4):
        x, y, u = vector(n), vector(n), vector(m)
        # flat vectors, both directions
        close(A @ x, matrix @ x)
        close(A.H @ u, matrix.mH @ u)
        close(A.T @ u, matrix.mT @ u)
        # pytrees
        close(flat(A.out_space, A(element(A.in_space, x))), matrix @ x)
        close(flat(A.in_space, A.H(element(A.out_space, u))), matrix.mH @ u)
        # linearity
        close(A @ (2.5 * x - y), 2.5 * (A @ x) - A @ y)
        # adjoint
        close(torch.vdot(u, A @ x), torch.vdot(A.H @ u, x))
        # rows
        close(u @ A, u @ matrix)

    # matrices of vectors
    X, U = vector(n, 3), vector(m, 3)
    for _ in range(4):
        close(A @ X, matrix @ X)
        close(A.H @ U, matrix.mH @ U)
    close(A @ X[:, :1], matrix @ X[:, :1])
    assert (A @ X[:, :0]).shape == (m, 0)
    close(U.mT @ A, U.mT @ matrix)

    # the matrix, from columns, from rows, in pieces
    for direction in ("auto", "forward", "reverse"):
        close(A.materialize(direction=direction), matrix)
    close(A.materialize(chunk_size=1), matrix)
    close(A.materialize(chunk_size=2, direction="reverse"), matrix)
    close(A.materialize(chunk_size=None), matrix)

    # other shapes of the same
    close(A.H.materialize(), matrix.mH)
    close(A.T.materialize(), matrix.mT)
    close(A.H.H.materialize(), matrix)
    close(A.T.T.materialize(), matrix)
    close(A.H.T.materialize(), matrix.conj())
    close(A.gram().materialize(), matrix.mH @ matrix)
    close((2 * A + A / 4 - A).materialize(), 1.25 * matrix)
    close((A.H @ A).materialize(), matrix.mH @ matrix)
    close((A @ A.H).materialize(direction="reverse"), matrix @ matrix.mH)

    # SciPy
    S = linearize.scipy.aslinearoperator(A)
    dense = matrix.numpy()
    assert S.shape == dense.shape
    assert S.dtype == dense.dtype
    x, u, X, U = (t.numpy() for t in (x, u, X, U))
    for got, want in (
        (S.matvec(x), dense @ x),
        (S.matvec(x[:, None]), dense @ x[:, None]),
        (S.rmatvec(u), dense.conj().T @ u),
        (S.matmat(X), dense @ X),
        (S.rmatmat(U), dense.conj().T @ U),
        (S.H.matvec(u), dense.conj().T @ u),
        (S.T.matvec(u), dense.T @ u),
        ((S.H * S).matvec(x), dense.conj().T @ (dense @ x)),
    ):
        assert isinstance(got, np.ndarray)
        np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-10)
