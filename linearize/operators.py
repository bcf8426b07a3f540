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

from typing import Any

import torch

from ._points.jacobian import Jacobian
from ._spaces.flat import Parts, check_flat, split
from ._spaces.operators import LinearOperator, SelfAdjoint
from ._spaces.space import Space

__all__ = ["Jacobian", "LinearOperator", "SelfAdjoint", "Space", "from_diagonal", "identity"]


def __dir__() -> list[str]:
    return __all__


def _diagonal(space: Space, entries: Parts, name: str) -> LinearOperator:
    def apply(parts: Parts, *, stacked: bool) -> Parts:
        return [d * t for d, t in zip(entries, parts, strict=True)]

    def apply_adjoint(parts: Parts, *, stacked: bool) -> Parts:
        return [d.conj() * t for d, t in zip(entries, parts, strict=True)]

    if not any(t.is_complex() for t in entries):
        return SelfAdjoint(space, apply, name=name)
    return LinearOperator(space, space, apply, apply_adjoint, name=name)


def identity(space: Space) -> LinearOperator:
    """Return the identity of a space, for damping: `J.gram() + 0.1 * identity(J.in_space)`.

    Parameters
    ----------
    space
        An operator's `in_space` or `out_space`.

    Returns
    -------
    SelfAdjoint
        Of shape (n, n).
    """

    def apply(parts: Parts, *, stacked: bool) -> Parts:
        return [t.clone() for t in parts]

    return SelfAdjoint(space, apply, name="identity")


def from_diagonal(space: Space, entries: Any) -> LinearOperator:
    """Return the diagonal operator of a space with the given entries.

    Parameters
    ----------
    space
        An operator's `in_space` or `out_space`.
    entries
        A pytree structured like the space, or a flat vector of shape (n,).

    Returns
    -------
    LinearOperator
        Of shape (n, n); a `SelfAdjoint` if the entries are real.

    Raises
    ------
    StructureError, SpaceError
        If the entries do not fit.
    """
    if isinstance(entries, torch.Tensor) and tuple(entries.shape) == (space.size,):
        check_flat(space, entries, "from_diagonal")
        parts = [t.clone() for t in split(space, entries)]
    else:
        given = zip(space.flatten(entries), space.tensors, strict=True)
        parts = [s.zeros() if t is None else t.clone() for t, s in given]
    return _diagonal(space, parts, "diagonal")
