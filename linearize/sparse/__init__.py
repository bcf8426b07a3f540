"""Sparse Jacobians from few products.

>>> import torch, linearize as lz, linearize.sparse
>>> x = torch.linspace(0, 1, 1000, dtype=torch.float64)
>>> here = lz.Linearizer(lambda x: x[2:] - 2 * x[1:-1] ** 2 + x[:-2]).at(x)
>>> found = lz.sparse.pattern(here)
>>> found.shape, found.nnz
((998, 1000), 2994)
>>> int(lz.sparse.coloring(found).max()) + 1  # so many products give the whole matrix
3
>>> lz.sparse.jacobian(here).shape
torch.Size([998, 1000])

Needs SciPy.
"""

from ._declared import declare
from ._jacobian import coloring, explain, jacobian, pattern

__all__ = ["coloring", "declare", "explain", "jacobian", "pattern"]


def __dir__() -> list[str]:
    return __all__
