"""Linear solvers that work on tensors, for the systems that operators stand for.

Vectors stay on their device, and a solve sees the operator's products alone. Any function of an
operator and a vector can take their place.

>>> import torch, linearize as lz
>>> here = lz.Linearizer(lambda x: x + x.roll(1) ** 2).at(torch.full((3,), 0.1))
>>> b = torch.tensor([1.0, 2.0, 3.0])
>>> x = lz.solvers.gmres(here.jacobian, b)
>>> bool(torch.dist(here.jacobian @ x, b) < 1e-4)
True

For definite matrices and least squares there are CG, MINRES and LSMR in torchsparsegradutils,
which take a function: `linear_cg(G.__matmul__, b)`. `linearize.operators.inverse` makes a solver
an operator.
"""

from __future__ import annotations

from ._spaces.gmres import gmres
from ._spaces.solvers import dense, iterative

__all__ = ["dense", "gmres", "iterative"]


def __dir__() -> list[str]:
    return __all__
