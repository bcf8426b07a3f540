"""Operators in the form that the solvers of `cupyx.scipy.sparse.linalg` expect.

Vectors go from CuPy to PyTorch and back by DLPack: they stay where they are on the GPU, nothing
is copied, and nothing passes through the host. The streams of the two libraries are made to wait
for each other by the exchange itself.

    A = linearize.cupy.aslinearoperator(here.jacobian.gram())
    x, info = cupyx.scipy.sparse.linalg.cg(A, b)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ._points.linearization import Linearization
from ._spaces.flat import check_flat
from ._spaces.operators import LinearOperator
from ._spaces.space import check_whole
from .errors import SpaceError, StructureError, UnsupportedError

__all__ = ["aslinearoperator"]


def __dir__() -> list[str]:
    return __all__


def aslinearoperator(operator: LinearOperator | Linearization, *, real: bool = False) -> Any:
    """Return a `cupyx.scipy.sparse.linalg.LinearOperator` with all four products.

    Parameters
    ----------
    operator
        Any operator of this package on a CUDA device, or a linearization, which stands for its
        Jacobian.
    real
        Whether complex numbers count as two real ones, real and imaginary parts in pairs.

    Returns
    -------
    cupyx.scipy.sparse.linalg.LinearOperator
        Of the flat vectors of both sides, which are CuPy arrays of the operator's dtype on its
        device.

    Raises
    ------
    ImportError
        If CuPy is not installed.
    SpaceError
        If the operator is not on a CUDA device; in products, if a vector does not fit.
    UnsupportedError
        If the operator's dtype is unknown to CuPy's solvers (half precision), or it is linear
        over the real numbers only although its spaces are complex.
    """
    import cupy
    import cupyx.scipy.sparse.linalg as solvers

    products = Products(operator, cupy.from_dlpack, real=real)
    if products.operator.device.type != "cuda":
        raise SpaceError(
            f"linearize.cupy: expected an operator on a CUDA device, got one on "
            f"{products.operator.device}; for the CPU there is linearize.scipy"
        )
    return solvers.LinearOperator(
        products.operator.shape,
        matvec=products.forward,
        rmatvec=products.back,
        matmat=products.forward,
        rmatmat=products.back,
        dtype=cupy.dtype(str(products.operator.dtype).removeprefix("torch.")),
    )


class Products:
    """The products of an operator on arrays of another library that speaks DLPack.

    Parameters
    ----------
    operator
        The operator, or a linearization.
    from_dlpack
        Makes an array of the other library from a tensor, without copying.
    real
        Whether complex numbers count as two real ones.

    Attributes
    ----------
    forward, back
        Functions of an array of the operator's dtype and device that return A·x and Aᴴ·x: of a
        vector of shape (n,), or of a matrix, all columns of which go in one vectorised pass.
    """

    def __init__(
        self,
        operator: LinearOperator | Linearization,
        from_dlpack: Callable[[Any], Any],
        *,
        real: bool = False,
    ) -> None:
        if isinstance(operator, Linearization):
            operator = operator.jacobian
        if not isinstance(operator, LinearOperator):
            raise StructureError(
                "aslinearoperator: expected a linear operator or a linearization, got "
                f"{type(operator).__name__}"
            )
        for space in (operator.in_space, operator.out_space):
            check_whole(space, "aslinearoperator")
        if real:
            operator = operator.as_real()
        sides = [s.vector.dtype for s in (operator.in_space, operator.out_space)]
        for dtype in sides:
            if dtype not in (torch.float32, torch.float64, torch.complex64, torch.complex128):
                raise UnsupportedError(
                    f"aslinearoperator: solvers work in single or double precision, got {dtype}"
                )
        if sides[0] != sides[1]:
            raise UnsupportedError(
                f"aslinearoperator: the two sides have different dtypes, {sides[0]} and {sides[1]}"
            )
        operator.check_complex_linear("aslinearoperator")
        self.operator = operator
        self._from_dlpack = from_dlpack
        self.forward = functools.partial(self._through, operator)
        self.back = functools.partial(self._through, operator.H)

    def _through(self, operator: LinearOperator, x: Any) -> Any:
        given = torch.utils.dlpack.from_dlpack(x)
        check_flat(operator.in_space, given, f"{operator!r} @ array")
        if given.dim() not in (1, 2) or given.shape[0] != operator.shape[1]:
            raise SpaceError(
                f"{operator!r} @ array: expected shape ({operator.shape[1]},) or "
                f"({operator.shape[1]}, k), got {tuple(given.shape)}"
            )
        result = (operator @ given).detach().resolve_conj().resolve_neg()
        return self._from_dlpack(result)
