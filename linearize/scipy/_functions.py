"""Functions with their derivatives, in the form that SciPy's optimizers take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Literal, TypeVar, overload

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch

from .._capture.dependence import derivative
from .._derivatives.gradient import gradient_and_value
from .._points.linearization import Linearization
from .._points.linearizer import Linearizer
from .._spaces.between import as_real
from .._spaces.trees import tangent_leaves, tangent_part
from .._text.labels import function_name
from ..errors import SpaceError
from ._first_order import FirstOrder
from ._flattened import Flattened, Kind, check_kind, matrix, values
from ._operators import Array, array, through

#: What matrices come as.
M = TypeVar("M")


class VectorFunction(Flattened, Generic[M]):
    """A function with its Jacobian, for `least_squares`, `root` and `NonlinearConstraint`.

    SciPy asks for `fun` and `jac` in separate calls, each with an array of its own. The points
    are recognised by their numbers, and `f` runs once for each; it is linearized when a derivative
    is asked for. Integrators of differential equations (`solve_ivp`) ask for many values and few
    Jacobians: where `fun` was called `maxsize` times and no derivative was asked for, further runs
    of `f` are plain ones, of which nothing is kept; a derivative there takes one run more.

    Complex numbers, of the start and of the value, count as two real ones: real and imaginary
    parts in pairs, `z.view(float)` in NumPy.

    Parameters
    ----------
    f
        A function of one pytree of tensors that returns a tensor or a pytree of them.
    x0
        The start: a pytree of tensors, of NumPy arrays, or a list of numbers. It also says
        structure, shapes, dtypes and devices of what f is given, which is tensors. In single
        precision the finite differences that some solvers form are meaningless: prefer float64.
    jac
        What `jac` and `hess` return: "operator" a `scipy.sparse.linalg.LinearOperator`
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

    @overload
    def __init__(
        self: VectorFunction[Array],
        f: Callable[[Any], Any],
        x0: Any,
        *,
        jac: Literal["dense"] = "dense",
        maxsize: int = 8,
    ) -> None: ...
    @overload
    def __init__(
        self: VectorFunction[scipy.sparse.csr_matrix],
        f: Callable[[Any], Any],
        x0: Any,
        *,
        jac: Literal["sparse"],
        maxsize: int = 8,
    ) -> None: ...
    @overload
    def __init__(
        self: VectorFunction[scipy.sparse.linalg.LinearOperator],
        f: Callable[[Any], Any],
        x0: Any,
        *,
        jac: Literal["operator"],
        maxsize: int = 8,
    ) -> None: ...
    def __init__(
        self,
        f: Callable[[Any], Any],
        x0: Any,
        *,
        jac: Kind = "dense",
        maxsize: int = 8,
    ) -> None:
        check_kind(jac, "jac")
        self._many, self._values_alone = max(maxsize, 1), 0
        self._kind = jac
        super().__init__(f, x0, maxsize, has_aux=False)
        self._name = function_name(f)

        @derivative
        def weighted(x: Any, weights: torch.Tensor) -> Any:
            return gradient_and_value(lambda x: _weighted_sum(f(x), weights))(x)

        self._weighted = Linearizer(
            weighted, argnums=0, has_aux=True, match="value", maxsize=maxsize
        )

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
        if self._values_alone >= self._many:
            return self.plain_value(x)
        self._values_alone += 1
        return self.value(x)

    @property
    def at(self) -> Callable[[Array], Linearization]:
        """The linearization at a flat vector, as a function of it."""
        self._values_alone = 0
        return super().at

    def jac(self, x: Array) -> M:
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
        found: M = matrix(self.at(x).jacobian, self._kind)
        return found

    def hess(self, x: Array, v: Array) -> M:
        """Return the Hessian of vᵀ·f, as `NonlinearConstraint` asks for it.

        f runs once more for each pair of x and v.

        Parameters
        ----------
        x
            A NumPy vector of shape (n,).
        v
            One of shape (m,), the Lagrange multipliers.

        Returns
        -------
        numpy.ndarray, scipy.sparse.csr_matrix or scipy.sparse.linalg.LinearOperator
            Of shape (n, n), in the form of `jac`.

        Raises
        ------
        SpaceError
            If a vector has another length.
        """
        weights = torch.tensor(np.ascontiguousarray(v))
        here = self._weighted.at(self.unravel(x), weights)
        found: M = matrix(here.jacobian, self._kind, symmetric=True)
        return found

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
        value = here.out_space.filled(tangent_part(here.value))
        J = here.jacobian.as_real()
        parts = as_real(value, here.out_space)
        return array(J.in_space.join(J._apply_adjoint(parts, stacked=False)))


class ScalarFunction(Flattened, Generic[M]):
    """A scalar function with gradient and Hessian, for `minimize`.

    As long as values and gradients are asked for, `f` runs once at each point under plain
    autograd. From the moment that `hessp`, `hess` or `at` is looked up, `minimize(...,
    hessp=p.hessp)` for instance, the gradient is linearized: one run of `f` and of its backward
    at each point gives value, gradient and every Hessian product. At a point from before, `f`
    runs once more for that. The points are recognised by their numbers.

    Complex numbers of the start count as two real ones: real and imaginary parts in pairs.

    Parameters
    ----------
    f
        A function of one pytree of tensors that returns one real number as a tensor.
    x0
        The start, as for `VectorFunction`.
    hess
        What `hess` returns: "operator" a `scipy.sparse.linalg.LinearOperator`, "dense" an array
        (`method="trust-exact"`), "sparse" a sparse matrix found with few products.
    maxsize
        The most points that are remembered.

    Attributes
    ----------
    x0 : numpy.ndarray
        The start as a flat vector, in double precision.
    linearizer : Linearizer
        What remembers the points that are linearized.
    """

    @overload
    def __init__(
        self: ScalarFunction[Array],
        f: Callable[[Any], Any],
        x0: Any,
        *,
        hess: Literal["dense"],
        maxsize: int = 8,
    ) -> None: ...
    @overload
    def __init__(
        self: ScalarFunction[scipy.sparse.csr_matrix],
        f: Callable[[Any], Any],
        x0: Any,
        *,
        hess: Literal["sparse"],
        maxsize: int = 8,
    ) -> None: ...
    @overload
    def __init__(
        self: ScalarFunction[scipy.sparse.linalg.LinearOperator],
        f: Callable[[Any], Any],
        x0: Any,
        *,
        hess: Literal["operator"] = "operator",
        maxsize: int = 8,
    ) -> None: ...
    def __init__(
        self,
        f: Callable[[Any], Any],
        x0: Any,
        *,
        hess: Kind = "operator",
        maxsize: int = 8,
    ) -> None:
        check_kind(hess, "hess")
        self._kind = hess
        super().__init__(gradient_and_value(f), x0, maxsize, has_aux=True)
        self._name = function_name(f)
        self._first_order: FirstOrder | None = FirstOrder(f, maxsize, self.unravel, self._of_parts)

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
        if self._first_order is None:
            return float(self.at(x).aux)
        return self._first_order.at(np.asarray(x)).value

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
        if self._first_order is None:
            return values(self.at(x))
        return self._first_order.at(np.asarray(x)).gradient.copy()

    @property
    def at(self) -> Callable[[Array], Linearization]:
        """The linearization of the gradient at a flat vector; its `aux` is the value."""
        self._first_order = None
        return super().at

    @property
    def hessp(self) -> Callable[[Array, Array], Array]:
        """The Hessian at x times p, as a function of both, NumPy vectors of shape (n,)."""
        self._first_order = None
        return self._hessp

    @property
    def hess(self) -> Callable[[Array], M]:
        """The Hessian, as a function of x that returns what the option of that name says."""
        self._first_order = None
        return self._hess

    def _hessp(self, x: Array, p: Array) -> Array:
        return through(self.at(x).jacobian.as_real().H, np.asarray(p))

    def _hess(self, x: Array) -> M:
        found: M = matrix(self.at(x).jacobian, self._kind, symmetric=True)
        return found


def _weighted_sum(value: Any, weights: torch.Tensor) -> torch.Tensor:
    """Return the inner product of a value's real and imaginary parts with a vector."""
    parts = tangent_leaves(value)
    flat = torch.cat([(torch.view_as_real(t) if t.is_complex() else t).reshape(-1) for t in parts])
    if flat.shape != weights.shape:
        raise SpaceError(f"v: expected shape {tuple(flat.shape)}, got {tuple(weights.shape)}")
    return flat @ weights.to(dtype=flat.dtype, device=flat.device)
