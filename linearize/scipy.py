"""Operators and functions in the form that SciPy's solvers expect.

>>> import torch, linearize as lz, linearize.scipy
>>> from scipy.optimize import least_squares
>>> from scipy.sparse.linalg import lsmr
>>> here = lz.Linearizer(torch.exp).at(torch.zeros(2, dtype=torch.float64))
>>> A = lz.scipy.aslinearoperator(here.jacobian)
>>> lsmr(A, [1.0, 2.0])[0]
array([1., 2.])
>>> p = lz.scipy.VectorFunction(lambda x: torch.exp(x) - 1, torch.ones(2, dtype=torch.float64))
>>> bool(abs(least_squares(p.fun, p.x0, p.jac).x).max() < 1e-6)
True
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
from numpy.typing import NDArray
from scipy.optimize import OptimizeResult

from . import sparse
from ._derivatives.gradient import gradient_and_value
from ._points.linearization import Linearization
from ._points.linearizer import Linearizer
from ._spaces.flat import flat_spec, join, split
from ._spaces.operators import LinearOperator
from ._spaces.space import Space, differentiable
from ._torch.names import pytree
from .distributed import gathered
from .errors import OptionError, SpaceError, StructureError, UnsupportedError

__all__ = ["ScalarFunction", "VectorFunction", "aslinearoperator", "newton_krylov"]


def __dir__() -> list[str]:
    return __all__


Array = NDArray[Any]


# -- operators ------------------------------------------------------------------------------


class _Operator(scipy.sparse.linalg.LinearOperator):  # type: ignore[misc]
    """A linear operator of NumPy arrays."""

    def __init__(self, of: LinearOperator, adjoint: LinearOperator) -> None:
        super().__init__(_numpy_dtype(of.dtype), of.shape)
        self._of = of
        self._back = adjoint

    def _matvec(self, x: Array) -> Array:
        return _through(self._of, x.reshape(-1))

    def _matmat(self, X: Array) -> Array:
        return _through(self._of, X)

    def _rmatvec(self, x: Array) -> Array:
        return _through(self._back, x.reshape(-1))

    def _rmatmat(self, X: Array) -> Array:
        return _through(self._back, X)

    def _adjoint(self) -> _Operator:
        return _Operator(self._back, self._of)


def aslinearoperator(operator: LinearOperator | Linearization) -> Any:
    """Return a `scipy.sparse.linalg.LinearOperator` with all four products.

    Parameters
    ----------
    operator
        Any operator of this package, or a linearization, which stands for its Jacobian. Where
        its vectors are parts that ranks have (see `linearize.distributed`), all ranks call this,
        and run the same solver: on each the vectors are whole, as of `distributed.gathered`.

    Returns
    -------
    scipy.sparse.linalg.LinearOperator
        Of the flat vectors of both sides. `matmat` and `rmatmat` map all columns in one
        vectorised pass. Arrays of another precision are converted, as SciPy does with
        matrices; a complex array meets a real operator as its real and imaginary parts.

    Raises
    ------
    UnsupportedError
        If the map is linear over the real numbers only, although its spaces are complex.

    Notes
    -----
    An operator on a GPU copies each vector there and back; `linearize.cupy` does not.
    """
    if isinstance(operator, Linearization):
        operator = operator.jacobian
    if not isinstance(operator, LinearOperator):
        raise StructureError(
            "aslinearoperator: expected a linear operator or a linearization, got "
            f"{type(operator).__name__}"
        )
    if operator.in_space.group is not None or operator.out_space.group is not None:
        operator = gathered(operator)
    operator.check_complex_linear("aslinearoperator")
    kinds = {flat_spec(s).dtype.is_complex for s in (operator.in_space, operator.out_space)}
    if len(kinds) > 1:
        raise UnsupportedError(
            "aslinearoperator: the operator maps between real and complex numbers, and its "
            "adjoint keeps real parts only; let the function use torch.view_as_real(z)"
        )
    return _Operator(operator, operator.H)


def _numpy_dtype(dtype: torch.dtype) -> Any:
    if dtype in (torch.bfloat16, torch.float16):  # SciPy's solvers have no half precision
        dtype = torch.float32
    return torch.empty(0, dtype=dtype).numpy().dtype


def _through(operator: LinearOperator, x: Array) -> Array:
    """Apply an operator to a NumPy vector or matrix."""
    spec = flat_spec(operator.in_space)
    if np.iscomplexobj(x) and not spec.dtype.is_complex:
        return _through(operator, x.real) + 1j * _through(operator, x.imag)
    given = torch.tensor(np.ascontiguousarray(x)).to(dtype=spec.dtype, device=spec.device)
    return _array(operator @ given)


def _array(t: torch.Tensor) -> Array:
    """Return a NumPy array of its own."""
    t = t.detach().resolve_conj().cpu()
    if t.dtype in (torch.bfloat16, torch.float16):
        t = t.float()
    array: Array = t.numpy().copy()
    return array


# -- functions ------------------------------------------------------------------------------


class _Flattened:
    """A function of a pytree, seen as a function of a flat vector; one run for each point."""

    def __init__(self, f: Callable[..., Any], x0: Any, maxsize: int, *, has_aux: bool) -> None:
        self._space = Space.of_tree(x0, "tangent", "x0")
        if not self._space.tensors:
            raise StructureError("x0: expected floating point tensors, found none")
        if any(leaf.dtype.is_complex for leaf in self._space.tensors):
            raise UnsupportedError("x0: SciPy's optimizers work with real numbers, got complex")
        leaves = pytree.tree_leaves(x0)
        # What is no variable stays as it is given.
        self._others = [None if differentiable(x) else x for x in leaves]
        parts = [x.detach() for x in leaves if differentiable(x)]
        #: The start as SciPy wants it.
        self.x0: Array = _array(join(self._space, parts).double())
        self.linearizer = Linearizer(f, match="value", maxsize=maxsize, has_aux=has_aux)

    def unravel(self, x: Array) -> Any:
        """Return the pytree that a flat vector stands for.

        Parameters
        ----------
        x
            A NumPy vector of shape (n,).

        Returns
        -------
        pytree
            Structured like the start, with its dtypes and devices; leaves that are not
            differentiated are the start's.

        Raises
        ------
        SpaceError
            If the vector has another length.
        """
        given = torch.tensor(np.ascontiguousarray(x))
        size = self._space.size
        if tuple(given.shape) != (size,):
            raise SpaceError(f"x: expected shape ({size},), got {tuple(given.shape)}")
        spec = flat_spec(self._space)
        parts = split(self._space, given.to(dtype=spec.dtype, device=spec.device))
        return self._space.unflatten(parts, self._others)

    def at(self, x: Array) -> Linearization:
        """Return the linearization at a flat vector.

        For a `ScalarFunction` it is that of the gradient, and its `aux` is the value.

        Parameters
        ----------
        x
            A NumPy vector of shape (n,).

        Returns
        -------
        Linearization
            The same object if the point is remembered.

        Raises
        ------
        SpaceError
            If the vector has another length.
        """
        here = self.linearizer.at(self.unravel(x))
        here._check_whole("functions for SciPy's optimizers")
        return here


class VectorFunction(_Flattened):
    """A function with its Jacobian, for `least_squares` and `root`.

    SciPy asks for `fun` and `jac` in separate calls, each with an array of its own. The points
    are recognised by their numbers, and `f` runs once for each.

    Parameters
    ----------
    f
        A function of one pytree of real tensors that returns a tensor or a pytree of them.
    x0
        The start; it also says structure, shapes, dtypes and devices. In single precision the
        finite differences that some solvers form are meaningless: prefer float64.
    jac
        What `jac` returns: "operator" a `scipy.sparse.linalg.LinearOperator`
        (`least_squares(..., tr_solver="lsmr")`), "dense" an array, "sparse" a sparse matrix
        found with few products; its pattern is found at the first point, and each matrix is
        checked (see `linearize.sparse`).
    maxsize
        The most points that are remembered.

    Attributes
    ----------
    x0 : numpy.ndarray
        The start as a flat vector, in double precision.
    linearizer : Linearizer
        What remembers the points.
    """

    def __init__(
        self,
        f: Callable[[Any], Any],
        x0: Any,
        *,
        jac: Literal["dense", "operator", "sparse"] = "dense",
        maxsize: int = 8,
    ) -> None:
        if jac not in ("dense", "operator", "sparse"):
            raise OptionError(f'jac must be "dense", "operator" or "sparse", got {jac!r}')
        super().__init__(f, x0, maxsize, has_aux=False)
        self._kind = jac
        self._pattern: Any = None

    def fun(self, x: Array) -> Array:
        """Return f at a flat vector, as a flat vector.

        Parameters
        ----------
        x
            A NumPy vector of shape (n,).

        Returns
        -------
        numpy.ndarray
            Of shape (m,), the concatenation of the value's leaves.
        """
        return _value(self.at(x))

    def jac(self, x: Array) -> Any:
        """Return the Jacobian at a flat vector, in the form that was asked for.

        Parameters
        ----------
        x
            A NumPy vector of shape (n,).

        Returns
        -------
        numpy.ndarray, scipy.sparse.csr_matrix or scipy.sparse.linalg.LinearOperator
            Of shape (m, n).
        """
        J = self.at(x).jacobian
        if self._kind == "operator":
            return aslinearoperator(J)
        if self._kind == "sparse":
            if self._pattern is None:
                self._pattern = sparse.pattern(J)
            t = sparse.jacobian(J, pattern=self._pattern)
            return scipy.sparse.csr_matrix(
                (_array(t.values()), t.indices().cpu().numpy()), shape=J.shape
            )
        return _array(J.materialize())

    def gradient(self, x: Array) -> Array:
        """Return Jᵀ·r, the gradient of half the sum of squares.

        Parameters
        ----------
        x
            A NumPy vector of shape (n,).

        Returns
        -------
        numpy.ndarray
            Of shape (n,).
        """
        here = self.at(x)
        value = here.out_space.flatten(_differentiable_part(here))
        J = here.jacobian
        parts = [t for t in value if t is not None]
        return _array(join(J.in_space, J._apply_adjoint(parts, stacked=False)))


class ScalarFunction(_Flattened):
    """A scalar function with gradient and Hessian products, for `minimize`.

    The gradient is linearized: one run of `f` and of its backward at each point gives value,
    gradient and every Hessian product. The points are recognised by their numbers.

    Parameters
    ----------
    f
        A function of one pytree of real tensors that returns one real number as a tensor.
    x0
        The start; it also says structure, shapes, dtypes and devices.
    maxsize
        The most points that are remembered.

    Attributes
    ----------
    x0 : numpy.ndarray
        The start as a flat vector, in double precision.
    linearizer : Linearizer
        What remembers the points.
    """

    def __init__(self, f: Callable[[Any], Any], x0: Any, *, maxsize: int = 8) -> None:
        super().__init__(gradient_and_value(f), x0, maxsize, has_aux=True)

    def fun(self, x: Array) -> float:
        """Return f at a flat vector.

        Parameters
        ----------
        x
            A NumPy vector of shape (n,).

        Returns
        -------
        float
            The value.
        """
        return float(self.at(x).aux)

    def jac(self, x: Array) -> Array:
        """Return the gradient at a flat vector.

        Parameters
        ----------
        x
            A NumPy vector of shape (n,).

        Returns
        -------
        numpy.ndarray
            Of shape (n,).
        """
        return _value(self.at(x))

    def hessp(self, x: Array, p: Array) -> Array:
        """Return the Hessian at x times p.

        Parameters
        ----------
        x, p
            NumPy vectors of shape (n,).

        Returns
        -------
        numpy.ndarray
            Of shape (n,).
        """
        return _through(self.at(x).jacobian.H, np.asarray(p))

    def hess(self, x: Array) -> Any:
        """Return the Hessian at x as a `scipy.sparse.linalg.LinearOperator`.

        Parameters
        ----------
        x
            A NumPy vector of shape (n,).

        Returns
        -------
        scipy.sparse.linalg.LinearOperator
            Of shape (n, n).
        """
        return aslinearoperator(self.at(x).jacobian)


def _differentiable_part(here: Linearization) -> Any:
    return pytree.tree_map(lambda t: t if differentiable(t) else None, here.value)


def _value(here: Linearization) -> Array:
    parts = [t for t in pytree.tree_leaves(here.value) if differentiable(t)]
    return _array(join(here.out_space, parts))


def newton_krylov(
    f: Callable[[Any], Any],
    x0: Any,
    *,
    tol: float = 1e-10,
    max_iterations: int = 50,
    preconditioner: Callable[[Linearization], Any] | None = None,
    restart: int = 50,
) -> OptimizeResult:
    """Solve f(x) = 0 by Newton's method, its linear systems by GMRES with exact products.

    `scipy.optimize.root(method="krylov")` forms J·v by differences of f, each of which is a
    run of f and loses half of the digits. Here f runs once at each point.

    Parameters
    ----------
    f
        A function of one pytree of real tensors that returns one of the same size.
    x0
        The start.
    tol
        Solved when the largest component of f(x) is not greater.
    max_iterations
        The most Newton steps.
    preconditioner
        Given the linearization, returns what SciPy takes as an approximate inverse of J.
    restart
        Vectors that GMRES keeps.

    Returns
    -------
    scipy.optimize.OptimizeResult
        `x` (structured like x0), `fun` (flat), `success`, `message`, `nit`, `nfev` (runs of f)
        and `njvp` (products).

    Raises
    ------
    SpaceError
        If f does not return as many numbers as it takes.

    Notes
    -----
    The systems are solved to the accuracy that the Newton step can use (Eisenstat and Walker,
    "Choosing the forcing terms in an inexact Newton method", SIAM J. Sci. Comput. 17, 1996,
    choice 2); a step that does not reduce the norm of f enough is halved.
    """
    p = VectorFunction(f, x0, jac="operator", maxsize=2)
    x = p.x0.copy()
    residual = p.fun(x)
    if residual.shape != x.shape:
        raise SpaceError(f"newton_krylov: f takes {x.size} numbers and returns {residual.size}")
    norm, products, forcing, steps, runs = float(np.linalg.norm(residual)), 0, 0.1, 0, 1
    message = "the largest component of f(x) is within tol"
    # Negated, so that nan goes on to the line search and is reported there.
    while not np.abs(residual).max(initial=0.0) <= tol:
        if steps == max_iterations:
            message = f"no solution within {max_iterations} Newton steps"
            break
        here = p.at(x)
        counted = _Counted(aslinearoperator(here))
        step, _ = scipy.sparse.linalg.gmres(
            counted,
            -residual,
            rtol=forcing,
            restart=min(restart, x.size),
            maxiter=10,
            M=None if preconditioner is None else preconditioner(here),
        )
        products += counted.products
        length = 1.0
        while True:
            trial = p.fun(x + length * step)
            runs += 1
            size = float(np.linalg.norm(trial))
            if size <= (1 - 1e-4 * length) * norm or length < 1e-8:
                break
            length /= 2
        if not size < norm:
            message = "no step along the Newton direction reduces the norm of f"
            break
        forcing = min(max(0.9 * (size / norm) ** 2, 0.9 * forcing**2 * (forcing > 0.33)), 0.5)
        x, residual, norm = x + length * step, trial, size
        steps += 1
    return OptimizeResult(
        x=p.unravel(x),
        fun=residual,
        success=bool(np.abs(residual).max(initial=0.0) <= tol),
        message=message,
        nit=steps,
        nfev=runs,
        njvp=products,
    )


class _Counted(scipy.sparse.linalg.LinearOperator):  # type: ignore[misc]
    """Counts the products with an operator."""

    def __init__(self, of: Any) -> None:
        super().__init__(of.dtype, of.shape)
        self._of = of
        self.products = 0

    def _matvec(self, x: Array) -> Array:
        self.products += 1
        result: Array = self._of.matvec(x)
        return result
