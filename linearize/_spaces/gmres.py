"""GMRES on tensors: every vector stays on its device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from .._text.progress import ticking
from ..errors import LinearizeError, OptionError, SpaceError
from .operators import LinearOperator
from .space import check_whole


def gmres(
    A: LinearOperator | Callable[[torch.Tensor], torch.Tensor],
    b: torch.Tensor,
    *,
    rtol: float | None = None,
    restart: int = 50,
    max_products: int | None = None,
    preconditioner: LinearOperator | Callable[[torch.Tensor], torch.Tensor] | None = None,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """Solve A·x = b for a square A that need not be symmetric.

    Parameters
    ----------
    A
        An operator, or a function that maps a vector to A times that vector.
    b
        The right-hand side, of shape (n,).
    rtol
        Solved when the norm of b − A·x is at most this times the norm of b. None for 1e-10 in
        double precision and 1e-5 in single.
    restart
        Vectors that are kept before it starts again from the best x.
    max_products
        The most products with A. None for 10 n, at least 1,000.
    preconditioner
        An approximate inverse of A, as an operator or a function. It is applied on the right,
        so that `rtol` speaks of the true residual.
    start
        The x to begin with; None for zero.

    Returns
    -------
    torch.Tensor
        Of shape (n,).

    Raises
    ------
    LinearizeError
        If the residual is still larger after `max_products` products.
    UnsupportedError
        If the spaces are complex and the map is only real-linear.

    Notes
    -----
    Y. Saad, M. H. Schultz, "GMRES: a generalized minimal residual algorithm for solving
    nonsymmetric linear systems", SIAM J. Sci. Stat. Comput. 7, 1986. New vectors are made
    orthogonal twice, by two products with the whole basis.
    """
    if not isinstance(b, torch.Tensor) or b.dim() != 1:
        raise SpaceError("gmres: expected a right-hand side of shape (n,)")
    if not isinstance(restart, int) or restart < 1:
        raise OptionError(f"restart must be a positive integer, got {restart!r}")
    if isinstance(A, LinearOperator):
        A.check_complex_linear("gmres")
    tol = _tolerance(b.dtype) if rtol is None else rtol
    most = max(1_000, 10 * len(b)) if max_products is None else max_products
    times, inverse = _function(A), _function(preconditioner)
    x = torch.zeros_like(b) if start is None else start.clone()
    goal = tol * float(torch.linalg.vector_norm(b))
    residual = b if start is None else b - times(x)
    used, tick = int(start is not None), ticking(most, "gmres, at most")
    while not (size := float(torch.linalg.vector_norm(residual))) <= goal:
        if used >= most or not math.isfinite(size):
            raise LinearizeError(
                f"gmres: after {used} products a residual of {size:.3g} is left where {goal:.3g} "
                "was asked for; give a preconditioner, a larger restart or rtol, or more products"
            )
        cycle = _Cycle(times, inverse, residual, min(restart, len(b), most - used), tick)
        step = cycle.run(goal)
        used += cycle.products + 1
        x = x + step
        residual = b - times(x)
    return x


class _Cycle:
    """The vectors and rotations between two restarts."""

    def __init__(
        self,
        times: Callable[[torch.Tensor], torch.Tensor],
        inverse: Callable[[torch.Tensor], torch.Tensor],
        residual: torch.Tensor,
        length: int,
        tick: Callable[[], object],
    ) -> None:
        self._times, self._inverse = times, inverse
        self._size = float(torch.linalg.vector_norm(residual))
        self._basis = residual.new_empty(length + 1, len(residual))
        self._basis[0] = residual / self._size
        self._length, self._tick = length, tick
        self.products = 0

    def run(self, goal: float) -> torch.Tensor:
        """Return the step to the x with the least residual that is found."""
        columns: list[list[Any]] = []
        rotations: list[tuple[Any, Any]] = []
        rest: list[Any] = [self._size]
        for k in range(self._length):
            column = self._next(k)
            for i, (c, s) in enumerate(rotations):
                upper, lower = column[i], column[i + 1]
                column[i] = c * upper + s * lower
                column[i + 1] = -_conjugate(s) * upper + c * lower
            c, s, column[k] = _rotation(column[k], column[k + 1])
            broke = column[k + 1] == 0
            rotations.append((c, s))
            rest.append(-_conjugate(s) * rest[k])
            rest[k] = c * rest[k]
            columns.append(column[: k + 1])
            if abs(rest[k + 1]) <= goal or broke:
                break
        return self._inverse(self._combined(columns, rest))

    def _next(self, k: int) -> list[Any]:
        """Add a vector to the basis, and return its column of the Hessenberg matrix."""
        v = self._times(self._inverse(self._basis[k]))
        self.products += 1
        self._tick()
        known = self._basis[: k + 1]
        first = known.conj() @ v
        v = v - first @ known
        second = known.conj() @ v
        v = v - second @ known
        size = torch.linalg.vector_norm(v)
        column: list[Any] = [*(first + second).tolist(), float(size)]
        lost = column[k + 1] <= torch.finfo(v.dtype).eps * max(map(abs, column))
        self._basis[k + 1] = torch.zeros_like(v) if lost else v / size
        column[k + 1] = 0.0 if lost else column[k + 1]
        return column

    def _combined(self, columns: list[list[Any]], rest: list[Any]) -> torch.Tensor:
        """Return the combination of the basis whose coefficients solve the triangular system."""
        count = len(columns)
        y: list[Any] = [0.0] * count
        for i in reversed(range(count)):
            known = sum(columns[j][i] * y[j] for j in range(i + 1, count))
            y[i] = (rest[i] - known) / columns[i][i] if columns[i][i] != 0 else 0.0
        weights = torch.tensor(y, dtype=self._basis.dtype, device=self._basis.device)
        return weights @ self._basis[:count]


def _rotation(a: Any, b: float) -> tuple[float, Any, Any]:
    """Return c, s and r so that [c, s; -s̄, c] times (a, b) is (r, 0)."""
    if b == 0:
        return 1.0, 0.0, a
    if a == 0:
        return 0.0, 1.0, b
    size = math.hypot(abs(a), b)
    phase = a / abs(a)
    return abs(a) / size, phase * b / size, phase * size


def _conjugate(x: Any) -> Any:
    return x.conjugate() if isinstance(x, complex) else x


def _function(A: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    if A is None:
        return lambda v: v
    if not isinstance(A, LinearOperator):
        function: Callable[[torch.Tensor], torch.Tensor] = A
        return function
    check_whole(A.in_space, "gmres")
    return A.__matmul__


def _tolerance(dtype: torch.dtype) -> float:
    return 1e-10 if dtype.to_real() == torch.float64 else 1e-5
