"""Linear operators, matrices that are known by their products alone.

`here.jacobian` is one. Operators add, scale and multiply to operators, and every one of them
can be applied to pytrees, to flat vectors and to matrices of these, turned into its adjoint
and written out as a matrix.

>>> import torch, linearize as lz
>>> J = lz.Linearizer(lambda x: x[1:] * x[:-1]).at(torch.tensor([1.0, 2.0, 3.0])).jacobian
>>> J
<Jacobian 2 x 3 float32>
>>> J @ torch.tensor([1.0, 0.0, 0.0])
tensor([2., 0.])
>>> normal = J.gram() + 0.1 * lz.operators.identity(J.in_space)
>>> normal.shape
(3, 3)
"""

from __future__ import annotations

from ._points.jacobian import Jacobian
from ._spaces.estimates import Estimate
from ._spaces.joins import block_diagonal, horizontal, vertical
from ._spaces.operators import LinearOperator, SelfAdjoint, from_diagonal, identity
from ._spaces.solvers import inverse
from ._spaces.space import Space

__all__ = [
    "Estimate",
    "Jacobian",
    "LinearOperator",
    "SelfAdjoint",
    "Space",
    "block_diagonal",
    "from_diagonal",
    "horizontal",
    "identity",
    "inverse",
    "vertical",
]


def __dir__() -> list[str]:
    return __all__
