"""Newton's method with exact products, as SciPy would have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
from scipy.optimize import OptimizeResult

from .._points.linearization import Linearization
from .._spaces.operators import LinearOperator
from .._text.progress import ticking
from ..errors import SpaceError, StructureError
from ._functions import VectorFunction
from ._operators import Array, array, aslinearoperator


def newton_krylov(
    f: Callable[..., Any],
    x0: Any,
    *,
    args: Any = (),
    tol: float = 1e-10,
    max_iterations: int = 50,
    preconditioner: Any = None,
    restart: int = 50,
    callback: Callable[[Any, Array], object] | None = None,
) -> OptimizeResult:
    """Solve f(x) = 0 by Newton's method, its linear systems by GMRES with exact products.

    `scipy.optimize.root(method="krylov")` forms J·v by differences of f, each of which is a
    run of f and loses half of the digits. Here f runs once at each point.

    Parameters
    ----------
    f
        A function of one pytree of tensors that returns one of the same size.
    x0
        The start: a pytree of tensors, of NumPy arrays, or a list of numbers, real or complex.
    args
        What f is given after x: a tuple, or one thing that is none.
    tol
        Solved when the largest component of f(x) is not greater.
    max_iterations
        The most Newton steps.
    preconditioner
        An approximate inverse of the Jacobian: a matrix, dense or sparse, an operator of SciPy
        or of this package, or a function that is given the linearization at each point and
        returns one of these, or a function of a vector.
    restart
        Vectors that GMRES keeps.
    callback
        Called as `callback(x, f(x))` after each step, x structured like the start and f(x) a
        flat array. It may raise `StopIteration`.

    Returns
    -------
    scipy.optimize.OptimizeResult
        `x` (structured like x0), `fun` (flat), `success`, `message`, `nit`, `nfev` (runs of f)
        and `njvp` (products).

    Raises
    ------
    SpaceError
        If f does not return as many numbers as it takes, or the preconditioner has another
        shape.

    Notes
    -----
    The systems are solved to the accuracy that the Newton step can use (Eisenstat and Walker,
    "Choosing the forcing terms in an inexact Newton method", SIAM J. Sci. Comput. 17, 1996,
    choice 2); a step that does not reduce the norm of f enough is halved. For f with complex
    numbers, flat arrays have real and imaginary parts in pairs.
    """
    more = args if isinstance(args, tuple) else (args,)
    p = VectorFunction((lambda x: f(x, *more)) if more else f, x0, jac="operator", maxsize=2)
    x = p.x0.copy()
    residual = p.value(x)
    if residual.shape != x.shape:
        raise SpaceError(f"newton_krylov: f takes {x.size} numbers and returns {residual.size}")
    norm, products, forcing, steps, runs = float(np.linalg.norm(residual)), 0, 0.1, 0, 1
    message = "the largest component of f(x) is within tol"
    tick = ticking(max_iterations, "Newton steps, at most")
    # Negated, so that nan goes on to the line search and is reported there.
    while not np.abs(residual).max(initial=0.0) <= tol:
        if steps == max_iterations:
            message = f"no solution within {max_iterations} Newton steps"
            break
        here = p.at(x)
        counted = _Counted(aslinearoperator(here, real=True))
        step, _ = scipy.sparse.linalg.gmres(
            counted,
            -residual,
            rtol=forcing,
            restart=min(restart, x.size),
            maxiter=10,
            M=_approximate_inverse(preconditioner, here, x.size),
        )
        products += counted.products
        ahead, trial, size, tries = _line_search(p.value, x, step, norm)
        runs += tries
        if not size < norm:
            message = "no step along the Newton direction reduces the norm of f"
            break
        forcing = min(max(0.9 * (size / norm) ** 2, 0.9 * forcing**2 * (forcing > 0.33)), 0.5)
        x, residual, norm = ahead, trial, size
        steps += 1
        tick()
        if _stops(callback, p.like_start(x), residual):
            message = "the callback stopped it"
            break
    return OptimizeResult(
        x=p.like_start(x),
        fun=residual,
        success=bool(np.abs(residual).max(initial=0.0) <= tol),
        message=message,
        nit=steps,
        nfev=runs,
        njvp=products,
    )


def _line_search(
    f: Callable[[Array], Array], x: Array, step: Array, norm: float
) -> tuple[Array, Array, float, int]:
    """Halve a step until it reduces the norm of f enough, or is next to nothing.

    Returns where it leads, f and its norm there, and how often f ran.
    """
    length, runs = 1.0, 0
    while True:
        ahead, runs = x + length * step, runs + 1
        value = f(ahead)
        size = float(np.linalg.norm(value))
        if size <= (1 - 1e-4 * length) * norm or length < 1e-8:
            return ahead, value, size, runs
        length /= 2


def _stops(callback: Callable[[Any, Array], object] | None, x: Any, residual: Array) -> bool:
    """Call the callback, and say whether it wants to stop."""
    if callback is None:
        return False
    try:
        callback(x, residual)
    except StopIteration:
        return True
    return False


def _approximate_inverse(given: Any, here: Linearization, size: int) -> Any:
    """Return a preconditioner as SciPy takes it."""
    if given is not None and not _is_matrix(given) and callable(given):
        given = given(here)
    if given is None:
        return None
    if isinstance(given, torch.Tensor):
        given = array(given)
    if isinstance(given, LinearOperator):
        given = aslinearoperator(given, real=True)
    if not _is_matrix(given):
        if not callable(given):
            raise StructureError(
                "preconditioner: expected a matrix, an operator, or a function that returns one, "
                f"got {type(given).__name__}"
            )
        return scipy.sparse.linalg.LinearOperator((size, size), matvec=given, dtype=float)
    if given.shape != (size, size):
        raise SpaceError(
            f"preconditioner: expected shape ({size}, {size}), got {tuple(given.shape)}"
        )
    return given


def _is_matrix(x: Any) -> bool:
    """Whether it is a matrix or an operator: operators can be called too."""
    kinds = (np.ndarray, torch.Tensor, LinearOperator, scipy.sparse.linalg.LinearOperator)
    return isinstance(x, kinds) or scipy.sparse.issparse(x)


class _Counted(scipy.sparse.linalg.LinearOperator):  # type: ignore[misc]
    """Counts the products with an operator."""

    def __init__(self, of: Any) -> None:
        super().__init__(of.dtype, of.shape)
        self._of = of
        self.products = 0

    def _matvec(self, x: Array) -> Array:
        self.products += 1
        result: Array = self._of.matvec(x.reshape(-1))
        return result
