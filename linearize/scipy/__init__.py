"""Operators and functions in the form that SciPy's solvers expect.

>>> import torch, linearize as lz, linearize.scipy
>>> from scipy.optimize import least_squares
>>> from scipy.sparse.linalg import lsmr
>>> here = lz.Linearizer(torch.exp).at(torch.zeros(2, dtype=torch.float64))
>>> A = lz.scipy.aslinearoperator(here.jacobian)
>>> lsmr(A, [1.0, 2.0])[0]
array([1., 2.])
>>> p = lz.scipy.VectorFunction(lambda x: torch.exp(x) - 1, [1.0, 1.0])
>>> bool(abs(least_squares(p.fun, p.x0, p.jac).x).max() < 1e-6)
True
"""

from ._functions import ScalarFunction, VectorFunction
from ._newton import newton_krylov
from ._operators import aslinearoperator

__all__ = ["ScalarFunction", "VectorFunction", "aslinearoperator", "newton_krylov"]


def __dir__() -> list[str]:
    return __all__
