"""Operators in the form that SciPy's solvers take."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse.linalg
import torch
from numpy.typing import NDArray

from .._points.linearization import Linearization
from .._spaces.operators import LinearOperator
from ..distributed import gathered
from ..errors import StructureError, UnsupportedError

Array = NDArray[Any]


class _Operator(scipy.sparse.linalg.LinearOperator):  # type: ignore[misc]
    """A linear operator of NumPy arrays."""

    def __init__(self, of: LinearOperator, adjoint: LinearOperator) -> None:
        super().__init__(_numpy_dtype(of.dtype), of.shape)
        self._of = of
        self._back = adjoint

    def _matvec(self, x: Array) -> Array:
        return through(self._of, x.reshape(-1))

    def _matmat(self, X: Array) -> Array:
        return through(self._of, X)

    def _rmatvec(self, x: Array) -> Array:
        return through(self._back, x.reshape(-1))

    def _rmatmat(self, X: Array) -> Array:
        return through(self._back, X)

    def _adjoint(self) -> _Operator:
        return _Operator(self._back, self._of)


def aslinearoperator(
    operator: LinearOperator | Linearization, *, real: bool = False
) -> scipy.sparse.linalg.LinearOperator:
    """Return a `scipy.sparse.linalg.LinearOperator` with all four products.

    Parameters
    ----------
    operator
        Any operator of this package, or a linearization, which stands for its Jacobian. Where
        its vectors are parts that ranks have (see `linearize.distributed`), all ranks call this,
        and run the same solver: on each the vectors are whole, as of `distributed.gathered`.
    real
        Whether complex numbers count as two real ones, real and imaginary parts in pairs: the
        vectors are `z.view(float)` of complex ones. Every map has such an operator, and its
        transpose is that of the real inner product.

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
            f"{type(operator).__name__}; for matrices and functions there is SciPy's own"
        )
    if operator.in_space.group is not None or operator.out_space.group is not None:
        operator = gathered(operator)
    if real:
        operator = operator.as_real()
    operator.check_complex_linear("aslinearoperator")
    kinds = {s.vector.dtype.is_complex for s in (operator.in_space, operator.out_space)}
    if len(kinds) > 1:
        raise UnsupportedError(
            "aslinearoperator: the operator maps between real and complex numbers, and its "
            "adjoint keeps real parts only; pass real=True, which counts a complex number as two"
        )
    return _Operator(operator, operator.H)


def _numpy_dtype(dtype: torch.dtype) -> Any:
    if dtype in (torch.bfloat16, torch.float16):  # SciPy's solvers have no half precision
        dtype = torch.float32
    return torch.empty(0, dtype=dtype).numpy().dtype


def through(operator: LinearOperator, x: Array) -> Array:
    """Apply an operator to a NumPy vector or matrix."""
    spec = operator.in_space.vector
    if np.iscomplexobj(x) and not spec.dtype.is_complex:
        return through(operator, x.real) + 1j * through(operator, x.imag)
    given = torch.tensor(np.ascontiguousarray(x)).to(dtype=spec.dtype, device=spec.device)
    return array(operator @ given)


def array(t: torch.Tensor) -> Array:
    """Return a NumPy array of its own."""
    t = t.detach().resolve_conj().cpu()
    if t.dtype in (torch.bfloat16, torch.float16):
        t = t.float()
    own: Array = t.numpy().copy()
    return own
