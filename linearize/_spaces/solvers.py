"""Linear systems with an operator, and its inverse as an operator."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import TypeAlias

import torch

from .._text.progress import progress
from ..errors import LinearizeError, SpaceError, StructureError
from .flat import Parts
from .gmres import gmres
from .joins import check_operators
from .memory import memory_budget
from .operators import LinearOperator, SelfAdjoint, operator_between
from .space import Space, check_whole
from .specs import TensorSpec, describe

#: Given an operator A and a flat vector b, returns the flat vector x with A·x = b.
Solve: TypeAlias = Callable[[LinearOperator, torch.Tensor], torch.Tensor]

#: Up to so many unknowns the matrix is written out.
DENSE_UP_TO = 1_000


def dense(A: LinearOperator, b: torch.Tensor) -> torch.Tensor:
    """Solve A·x = b by writing the matrix out: exact, for some thousands of unknowns.

    Parameters
    ----------
    A
        An operator of shape (n, n).
    b
        A vector of shape (n,).

    Returns
    -------
    torch.Tensor
        Of shape (n,).
    """
    check_whole(A.in_space, "dense")
    x: torch.Tensor = torch.linalg.solve(A.materialize(), b)
    return x


def iterative(A: LinearOperator, b: torch.Tensor) -> torch.Tensor:
    """Solve A·x = b by products alone.

    An operator that is its own adjoint is tried with the conjugate gradients of
    torchsparsegradutils where that is installed; any other one, or one that is not positive
    definite, is solved by `gmres`.

    Parameters
    ----------
    A
        An operator of shape (n, n).
    b
        A vector of shape (n,).

    Returns
    -------
    torch.Tensor
        Of shape (n,).

    Raises
    ------
    LinearizeError
        If `gmres` does not come to an end.
    """
    check_whole(A.in_space, "iterative")
    if isinstance(A, SelfAdjoint) and not b.is_complex() and find_spec("torchsparsegradutils"):
        x = _conjugate_gradients(A, b)
        if x is not None:
            return x
    return gmres(A, b)


def _conjugate_gradients(A: LinearOperator, b: torch.Tensor) -> torch.Tensor | None:
    from torchsparsegradutils.utils import linear_cg

    tolerance = 1e-10 if b.dtype == torch.float64 else 1e-5
    try:
        x: torch.Tensor = linear_cg(A.__matmul__, b, tolerance=tolerance, max_iter=2 * len(b))
    except (RuntimeError, ValueError):  # not positive definite
        return None
    fine = torch.linalg.vector_norm(A @ x - b) <= 10 * tolerance * torch.linalg.vector_norm(b)
    return x if fine else None


def inverse(
    A: LinearOperator, solve: Solve | None = None, *, tol: float | None = None
) -> LinearOperator:
    """Return the inverse of a square operator as an operator.

    Parameters
    ----------
    A
        An operator of shape (n, n).
    solve
        Takes an operator, A or its adjoint, and a flat vector b, and returns x with A·x = b.
        None for one that suits the size: up to a thousand unknowns the matrix is written out
        and factorized, once for all products; beyond, `linearize.solvers.iterative`.
    tol
        How large the residual of a solution may be beside its right-hand side. None for 1e-3
        in double precision and 1e-2 in single.

    Returns
    -------
    LinearOperator
        From A's `out_space` to its `in_space`; a `SelfAdjoint` if A is.

    Raises
    ------
    SpaceError
        If A is not square.
    StructureError
        If it is no operator.
    LinearizeError
        In products, if what was found is no solution.
    """
    check_operators([A], "inverse")
    A._check_square("inverse")
    return checked_inverse(A, Automatic() if solve is None else Solving(solve), tol)


class Solving:
    """Solves systems by a function of the user's."""

    def __init__(self, solve: Solve) -> None:
        self._solve = solve

    def solved(self, A: LinearOperator, b: torch.Tensor, *, adjoint: bool) -> torch.Tensor:
        """Return x with A·x = b, or Aᴴ·x = b."""
        x = self._solve(A.H if adjoint else A, b)
        if not isinstance(x, torch.Tensor) or x.shape != b.shape or x.dtype != b.dtype:
            raise StructureError(
                f"solve: expected a function that returns the vector x, {TensorSpec.of(b)}, got "
                f"{describe(x)}; a solver of NumPy arrays gives torch.from_numpy(x)"
            )
        return x


class Automatic(Solving):
    """Solves systems by what suits their size; keeps the factors of a matrix."""

    def __init__(self) -> None:
        super().__init__(iterative)
        self._factors: tuple[torch.Tensor, torch.Tensor] | None = None

    def solved(self, A: LinearOperator, b: torch.Tensor, *, adjoint: bool) -> torch.Tensor:
        """Return x with A·x = b, or Aᴴ·x = b."""
        if len(b) > DENSE_UP_TO and self._factors is None:
            try:
                return super().solved(A, b, adjoint=adjoint)
            except LinearizeError:
                if len(b) ** 2 * A.dtype.itemsize > memory_budget(A.device):
                    raise
        return self._by_factors(A.materialize, b, adjoint)

    def _by_factors(
        self, matrix: Callable[[], torch.Tensor], b: torch.Tensor, adjoint: bool
    ) -> torch.Tensor:
        """Return the solution for a matrix, or those of several; the first time it is made."""
        if self._factors is None:
            factors, pivots, _ = torch.linalg.lu_factor_ex(matrix())
            self._factors = factors, pivots
        x: torch.Tensor = torch.linalg.lu_solve(*self._factors, b[..., None], adjoint=adjoint)
        return x[..., 0]


class Blocks(Automatic):
    """Solves the independent systems of a batch: one small matrix for each entry."""

    def solved(self, A: LinearOperator, b: torch.Tensor, *, adjoint: bool) -> torch.Tensor:
        """Return x with A·x = b, or Aᴴ·x = b."""
        given, wanted = (A.in_space, A.out_space) if adjoint else (A.out_space, A.in_space)
        right = _by_entry(given, given.split(b), stacked=False)
        x = self._by_factors(lambda: _blocks(A), right, adjoint)
        return wanted.join(_from_entries(wanted, x))


def _blocks(A: LinearOperator) -> torch.Tensor:
    """Return the matrices of a batch, from as many products as one entry has unknowns."""
    count = batch_size(A.in_space, A.out_space)
    size = A.shape[1] // max(count, 1)
    spec = A.in_space.vector
    units = torch.eye(size, dtype=spec.dtype, device=spec.device)
    stacks = units[:, None, :].expand(size, count, size)
    images = A._apply(_from_entries(A.in_space, stacks), stacked=True)
    return _by_entry(A.out_space, images, stacked=True).permute(1, 2, 0)


def batch_size(*spaces: Space) -> int:
    """Return the first dimension that all tensors of some spaces have.

    Raises
    ------
    SpaceError
        If they have none in common, or the entries of the spaces differ in size.
    """
    first = {leaf.shape[:1] for space in spaces for leaf in space.tensors}
    if len(first) != 1 or first == {()} or len({space.size for space in spaces}) != 1:
        raise SpaceError(
            "batch=True: the first dimension of every tensor of x and of f(x) must count the "
            f"same independent systems, got {' and '.join(map(repr, spaces))}"
        )
    return first.pop()[0]


def _by_entry(space: Space, parts: Parts, *, stacked: bool) -> torch.Tensor:
    """Return elements as one vector for each entry of the batch."""
    front = parts[0].shape[: 1 + int(stacked)]
    rows = [
        t.reshape(*front, math.prod(leaf.shape[1:])).to(space.vector.dtype)
        for t, leaf in zip(parts, space.tensors, strict=True)
    ]
    return torch.cat(rows, dim=-1)


def _from_entries(space: Space, vectors: torch.Tensor) -> Parts:
    """Return the elements that vectors of all entries stand for."""
    sizes = [math.prod(leaf.shape[1:]) for leaf in space.tensors]
    return [
        part.reshape(*vectors.shape[:-2], *leaf.shape).to(leaf.dtype)
        for part, leaf in zip(vectors.split(sizes, dim=-1), space.tensors, strict=True)
    ]


def checked_inverse(A: LinearOperator, solving: Solving, tol: float | None) -> LinearOperator:
    """Return the inverse by a way of solving, each solution of which is looked at."""
    limit = (1e-3 if A.dtype.to_real() == torch.float64 else 1e-2) if tol is None else tol

    def one(b: torch.Tensor, adjoint: bool) -> torch.Tensor:
        x = solving.solved(A, b, adjoint=adjoint)
        error, size = float(((A.H if adjoint else A) @ x - b).norm()), float(b.norm())
        if not error <= limit * size:
            raise LinearizeError(
                f"inverse of {A!r}: the solver left a residual of {error:.3g} for a right-hand "
                f"side of norm {size:.3g}; the system may be singular, or the solver stopped early"
            )
        return x

    def apply(parts: Parts, *, stacked: bool, adjoint: bool = False) -> Parts:
        ours, theirs = (A.in_space, A.out_space) if adjoint else (A.out_space, A.in_space)
        flat = ours.join(parts, stacked=stacked)
        if stacked:
            found = [one(b, adjoint) for b in progress(flat, len(flat), "solutions")]
            rows = torch.stack(found) if found else flat.new_zeros(0, theirs.size)
            return theirs.split(rows)
        return theirs.split(one(flat, adjoint))

    return operator_between(
        A.out_space,
        A.in_space,
        apply,
        functools.partial(apply, adjoint=True),
        self_adjoint=isinstance(A, SelfAdjoint),
        at_once=A._at_once,
        name=f"inverse({A._name})",
    )
