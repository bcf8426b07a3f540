"""Sums of inner products, which are zero where two maps are adjoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch

from .._execute.binding import BoundProgram
from .._programs.program import Program
from .._spaces.compare import tolerance

Tensors: TypeAlias = Sequence[torch.Tensor | None]
#: A linear map on flat lists of tensors; None is zero.
Map: TypeAlias = Callable[[Sequence[Any]], Tensors]
#: Sums numbers over the ranks that run a product together.
Total: TypeAlias = Callable[[Sequence[float]], Sequence[float]]
#: A cotangent and a tangent, or what the two maps make of them.
Pair: TypeAlias = tuple[Tensors, Tensors]


class Balance:
    """A sum of inner products that should be zero, and how large it could well be.

    A random vector with entries of size one and any other one x have a product of the size of
    ‖x‖, not ‖x‖ times the length of the first; rounding has no preferred direction either.
    """

    def __init__(self) -> None:
        self.total = 0.0
        #: The products themselves, all taken as positive.
        self._sum = 0.0
        self._scale = 0.0
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, sign: int, first: Tensors, second: Tensors, *, lasting: bool = True) -> None:
        """Add Re⟨first, second⟩, None for zero.

        Parameters
        ----------
        sign
            1 or -1.
        first, second
            The vectors.
        lasting
            Whether nobody writes to them before the balance is drawn.
        """
        for a, b in zip(first, second, strict=True):
            if a is not None and b is not None and a.numel():
                product = _dot(a, b)
                self.total += sign * product
                self._sum += abs(product)
                if lasting:
                    self._pairs.append((a, b))
                else:
                    self._scale += _size(a, b)

    def sum_up(self, total: Total) -> None:
        """Add what other ranks have."""
        self._scale += sum(_size(a, b) for a, b in self._pairs)
        self._pairs = []
        self.total, self._sum, self._scale = total([self.total, self._sum, self._scale])

    def holds(self, limit: float) -> bool:
        """Whether the sum is zero within a relative error, or not finite."""
        # Mostly the products are as large as can be expected, and no lengths are needed.
        return abs(self.total) <= limit * self._sum or not self.off > limit

    @property
    def off(self) -> float:
        """By how much the sum is not zero, relative to its terms; NaN if they are not finite."""
        self._scale += sum(_size(a, b) for a, b in self._pairs)
        self._pairs = []
        return abs(self.total) / self._scale if self._scale else abs(self.total)


def _size(a: torch.Tensor, b: torch.Tensor) -> float:
    return math.sqrt(_dot(a, a) / a.numel()) * math.sqrt(_dot(b, b))


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return Re⟨a, b⟩."""
    if a.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    a, b = a.reshape(-1), b.reshape(-1)
    if a.dtype not in (torch.float32, torch.float64):
        a, b = a.float(), b.float()
    result = float(torch.dot(a, b))
    return result if math.isfinite(result) else float(torch.dot(a.double(), b.double()))


def inner(a: Tensors, b: Tensors) -> float:
    return sum(_dot(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None)


def rounding_limit(*programs: BoundProgram | Program) -> float:
    """Return the relative error that may be rounding, in the coarsest dtype that occurs."""
    dtypes = {v.spec.dtype for p in programs for v in p.inputs}
    dtypes |= {v.spec.dtype for p in programs for eq in p.equations for v in eq.outputs if v}
    return max(map(tolerance, dtypes), default=1.0)


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point or dtype.is_complex else 0.0


def balances(
    pullback: Map, pushforward: Map, u: Tensors, v: Tensors, *, columns: bool
) -> Iterator[tuple[Balance, Pair, Pair]]:
    """Yield Re⟨u, J·v⟩ - Re⟨Jᴴ·u, v⟩ for u and v scaled so that entries of all sizes count alike.

    Parameters
    ----------
    pullback, pushforward
        The maps.
    u, v
        Random vectors; None for zero.
    columns
        Whether there is a second pair in which v is scaled too, not u alone.

    Yields
    ------
    balance, arguments, results
        What was balanced.
    """
    tangent, sizes = v, [None if t is None else torch.ones_like(t) for t in v]
    for again in (True, False) if columns else (False,):
        jv = pushforward(tangent)
        weights = weights_of(jv, u)
        cotangent = over(u, weights)
        jtu = pullback(cotangent)
        balance = Balance()
        balance.add(1, u, over(jv, weights))
        balance.add(-1, over(jtu, sizes), v)
        yield balance, (cotangent, tangent), (jtu, jv)
        if again:
            sizes = weights_of(jtu, v)
            tangent = over(v, sizes)


def weights_of(tensors: Tensors, others: Tensors) -> list[torch.Tensor | None]:
    """Return the sizes of numbers relative to the largest, but not below what rounding may be.

    Parameters
    ----------
    tensors
        The numbers; None for zeros.
    others
        Tensors of the same shapes; None where no sizes are wanted.
    """
    most = max((float(t.abs().max()) for t in tensors if t is not None and t.numel()), default=0.0)
    found: list[torch.Tensor | None] = []
    for t, other in zip(tensors, others, strict=True):
        if other is None:
            found.append(None)
            continue
        least = math.sqrt(eps(other.dtype))
        if not 0 < most < math.inf:
            sizes = torch.ones_like(other.real)
        else:
            sizes = torch.zeros_like(other.real) if t is None else t.abs() / most
        found.append(sizes.clamp(min=least))
    return found


def over(tensors: Tensors, weights: Tensors) -> list[torch.Tensor | None]:
    """Return tensors divided by weights; None for what is None."""
    return [
        None if t is None or w is None else t / w for t, w in zip(tensors, weights, strict=True)
    ]
