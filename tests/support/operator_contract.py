"""What every operator must satisfy, checked against its matrix."""

import numpy as np
import scipy
import torch

import linearize.scipy
from linearize.operators import LinearOperator, block_diagonal, horizontal, vertical

#: Whether `matvec` of SciPy's operators takes columns of shape (n, 1) without a warning.
OLD_COLUMNS = tuple(map(int, scipy.__version__.split(".")[:2])) < (1, 18)


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
    return space.element_of(parts)


def real_matrix(matrix):
    """Return the matrix of real and imaginary parts, in pairs."""
    if not matrix.is_complex():
        return matrix
    m, n = matrix.shape
    real = torch.stack(
        [
            torch.stack([matrix.real, -matrix.imag], -1),
            torch.stack([matrix.imag, matrix.real], -1),
        ],
        1,
    )
    return real.reshape(2 * m, 2 * n)


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

    # what can be read off the matrix
    close(A.adjoint().materialize(), matrix.mH)
    close(A.gram().diagonal(), (matrix.mH @ matrix).diagonal())
    close(A.gram().diagonal(chunk_size=2), (matrix.mH @ matrix).diagonal())
    close(A.gram().trace(), (matrix.mH @ matrix).trace())
    close((A.H.gram() / 2).diagonal(), (matrix @ matrix.mH).diagonal() / 2)
    damping = torch.rand(n, dtype=matrix.dtype.to_real(), generator=generator).to(matrix.dtype)
    damped = matrix.mH @ matrix + torch.diag(damping)
    close(A.gram().damped(damping).diagonal(), damped.diagonal())
    close(A.gram().damped(damping).materialize(), damped)
    close(A.gram().damped(0.5).materialize(), matrix.mH @ matrix + 0.5 * torch.eye(n))
    if m == n:
        close(A.diagonal(), matrix.diagonal())
        close(A.diagonal(chunk_size=2), matrix.diagonal())
        close(A.H.diagonal(), matrix.mH.diagonal())
        close(A.trace(), matrix.trace())
        if A.in_space.tensors == A.out_space.tensors:
            close((2 * A + A.H).diagonal(), (2 * matrix + matrix.mH).diagonal())

    # elements as vectors
    for space, size in ((A.in_space, n), (A.out_space, m)):
        z = vector(size)
        assert torch.equal(space.ravel(element(space, z)), z)
        assert torch.equal(flat(space, space.unravel(z)), z)

    # real and imaginary parts
    R, real = A.as_real(), real_matrix(matrix)
    assert R.shape == real.shape
    for _ in range(4):
        p, q = (torch.randn(k, dtype=real.dtype, generator=generator) for k in real.shape[::-1])
        close(R @ p, real @ p)
        close(R.H @ q, real.T @ q)
        close(R.T @ q, real.T @ q)
    close(R.materialize(), real)
    close(R.gram().materialize(), real.T @ real)
    close(A.gram().as_real().materialize(), real.T @ real)

    # beside each other
    beside = torch.cat([matrix, matrix], 1)
    close(horizontal(A, A).materialize(), beside)
    close(horizontal(A, A).H.materialize(), beside.mH)
    close(vertical(A.H, A.H).materialize(), beside.mH)
    close(vertical(A.H, A.H).T.materialize(), beside.conj())
    both = torch.block_diag(matrix, matrix.mH)
    close(block_diagonal(A, A.H).materialize(), both)
    close(block_diagonal(A, A.H).H.materialize(), both.mH)
    close(A[:, :].materialize(), matrix)
    close(vertical(A.H, A.H)[1, :].materialize(), matrix.mH)
    close(horizontal(A, A)[:, 0].H.materialize(), matrix.mH)

    # SciPy
    S = linearize.scipy.aslinearoperator(A)
    assert A.to_scipy().shape == S.shape
    dense = matrix.numpy()
    assert S.shape == dense.shape
    assert S.dtype == dense.dtype
    x, u, X, U = (t.numpy() for t in (x, u, X, U))
    for got, want in (
        (S.matvec(x), dense @ x),
        (S.matmat(x[:, None]), dense @ x[:, None]),
        (S.rmatvec(u), dense.conj().T @ u),
        (S.matmat(X), dense @ X),
        (S.rmatmat(U), dense.conj().T @ U),
        (S.H.matvec(u), dense.conj().T @ u),
        (S.T.matvec(u), dense.T @ u),
        ((S.H * S).matvec(x), dense.conj().T @ (dense @ x)),
    ):
        assert isinstance(got, np.ndarray)
        np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-10)
    if OLD_COLUMNS:  # from SciPy 1.18 on, columns are for `matmat`
        np.testing.assert_allclose(S.matvec(x[:, None]), dense @ x[:, None], rtol=1e-7, atol=1e-10)
        got = S.rmatvec(u[:, None])
        np.testing.assert_allclose(got, dense.conj().T @ u[:, None], rtol=1e-7, atol=1e-10)
