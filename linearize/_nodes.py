"""Floor 2: pullbacks of graph nodes whose formula is linear as a whole, not step by step.

PyTorch computes some gradients by steps that are not linear in the cotangent although the
result is: through a block matrix, or through logarithms of its positive and negative parts.
Such a node is recognised by its name and written down as one `Differential`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from ._program import Operation
from ._torch import Node


class Differential(Operation):
    """The derivative of a function of one tensor at a point, or the transpose of it.

    It is called with a tangent (a cotangent, if `adjoint`) and the tensors of the point.
    """

    __slots__ = ("adjoint", "setting")
    may_alias = False
    of_point = False

    def __init__(self, adjoint: bool, setting: Any = None) -> None:
        self.adjoint = adjoint
        self.setting = setting

    def turned(self) -> Differential:
        """Return the transpose."""
        return type(self)(not self.adjoint, self.setting)

    def __call__(self, t: torch.Tensor | None, *point: torch.Tensor) -> Any:
        """Apply the derivative or its transpose."""
        return (None if t is None else self.apply(t, *point),)

    def apply(self, t: torch.Tensor, *point: torch.Tensor) -> torch.Tensor:
        """Do so for a tangent that is not zero."""
        raise NotImplementedError


class MatrixExpDifferential(Differential):
    """exp([[A, E], [0, A]]) has L(A, E), the derivative at A along E, in its upper right.

    The transpose of E ↦ L(A, E) is E ↦ L(Aᴴ, E). Higham, Functions of Matrices (2008),
    theorem 3.6 and section 10.2; Najfeld and Havel, Adv. Appl. Math. 16 (1995).
    """

    __slots__ = ()
    name = "matrix_exp differential"

    def apply(self, t: torch.Tensor, *point: torch.Tensor) -> torch.Tensor:
        """Return L(A, t)."""
        (a,) = point
        if self.adjoint:
            a = a.mH
        n = a.shape[-1]
        # L is linear: with a direction not larger than A no digits are lost to scaling.
        norm = t.abs().amax((-2, -1), keepdim=True) if t.numel() else torch.ones_like(t)
        size = torch.where(norm > 0, norm, torch.ones_like(norm))
        above = torch.cat([a, t / size], -1)
        below = torch.cat([torch.zeros_like(a), a], -1)
        both = torch.linalg.matrix_exp(torch.cat([above, below], -2))
        upper: torch.Tensor = both[..., :n, n:] * size
        return upper


class LogCumSumExpDifferential(Differential):
    """The derivative of y = logcumsumexp(x): dyᵢ = Σ exp(xⱼ - yᵢ) dxⱼ over j ≤ i.

    No factor is ever large: partial sums over a stretch that ends at i - s are carried to i by
    exp(yᵢ₋ₛ - yᵢ), with s doubling (the scan of Hillis and Steele, Comm. ACM 29, 1986). The
    transpose does the same steps in reverse. Where y is -inf, the derivative is taken as zero.
    """

    __slots__ = ()
    name = "logcumsumexp differential"

    def apply(self, t: torch.Tensor, *point: torch.Tensor) -> torch.Tensor:
        """Return the tangent of y, or from a cotangent of y that of x."""
        x, y = point
        if x.dim() == 0:
            return t.clone()
        dim = self.setting
        t, x, y = t.transpose(dim, -1), x.transpose(dim, -1), y.transpose(dim, -1)
        count = x.shape[-1]
        strides = [1 << k for k in range(max(count - 1, 0).bit_length())]
        if not self.adjoint:
            t = _ratio(x, y) * t
            for s in strides:
                carried = _ratio(y[..., :-s], y[..., s:]) * t[..., :-s]
                t = torch.cat([t[..., :s], t[..., s:] + carried], -1)
            return t.transpose(dim, -1)
        for s in reversed(strides):
            carried = _ratio(y[..., :-s], y[..., s:]).conj() * t[..., s:]
            t = torch.cat([t[..., :-s] + carried, t[..., -s:]], -1)
        return (_ratio(x, y).conj() * t).transpose(dim, -1)


def _ratio(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return exp(a - b), zero where a is -inf."""
    gone = (a.real if a.is_complex() else a) == -torch.inf
    return torch.exp(a - b).masked_fill(gone, 0)


Formula: TypeAlias = Callable[[Any], tuple[Operation, Sequence[torch.Tensor]]]


def _matrix_exp(node: Any) -> tuple[Operation, Sequence[torch.Tensor]]:
    return MatrixExpDifferential(adjoint=True), [node._saved_self]


def _logcumsumexp(node: Any) -> tuple[Operation, Sequence[torch.Tensor]]:
    x, y = node._saved_self, node._saved_result
    dim = node._saved_dim  # a negative one comes as an unsigned number
    return LogCumSumExpDifferential(True, dim - (1 << 64) if dim >= 1 << 63 else dim), [x, y]


_FORMULAS: dict[str, Formula] = {
    "LinalgMatrixExpBackward0": _matrix_exp,
    "LogcumsumexpBackward0": _logcumsumexp,
}


def formula_of(node: Node) -> Formula | None:
    """Return what gives a node's pullback and the tensors of its point, None if nothing does."""
    return _FORMULAS.get(node.name())
