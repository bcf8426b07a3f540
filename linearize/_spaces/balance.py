"""Sums of inner products that should be zero, and the sizes of what goes into them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

from .compare import largest

Tensors: TypeAlias = Sequence[torch.Tensor | None]
#: Sums numbers over the ranks that run a product together.
Total: TypeAlias = Callable[[Sequence[float]], Sequence[float]]


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
        self._pairs: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []

    def add(
        self,
        sign: int,
        first: Tensors,
        second: Tensors,
        *,
        lasting: bool = True,
        drawn: Tensors | None = None,
    ) -> None:
        """Add or take away Re⟨first, second⟩, None for zero.

        `lasting` says that nobody writes to them before the balance is drawn. `drawn` is what the
        first were before they were divided by sizes: the second then tell how large the product
        could be.
        """
        for a, b, d in zip(first, second, drawn or [None] * len(first), strict=True):
            if a is not None and b is not None and a.numel():
                product = _dot(a, b)
                self.total += sign * product
                self._sum += abs(product)
                if lasting:
                    self._pairs.append((a, b, d))
                else:
                    self._scale += _size(a, b)

    def sum_up(self, total: Total) -> None:
        """Add what other ranks have."""
        self._measure()
        self.total, self._sum, self._scale = total([self.total, self._sum, self._scale])

    def holds(self, limit: float) -> bool:
        """Whether the sum is zero within a relative error, or not finite."""
        # Mostly the products are as large as can be expected, and no lengths are needed.
        return abs(self.total) <= limit * self._sum or not self.off > limit

    @property
    def off(self) -> float:
        """By how much the sum is not zero, relative to its terms; NaN if they are not finite."""
        self._measure()
        return abs(self.total) / self._scale if self._scale else abs(self.total)

    def _measure(self) -> None:
        for a, b, d in self._pairs:
            weighed = b if d is None else b * (a / torch.where(d == 0, 1, d))
            self._scale += _size(a if d is None else d, weighed)
        self._pairs = []


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
    """Return Re⟨a, b⟩ of lists of tensors, None for zero."""
    return sum(_dot(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None)


def eps_of(dtype: torch.dtype) -> float:
    """Return the spacing of numbers of a dtype next to one; 0 for integers."""
    return torch.finfo(dtype).eps if dtype.is_floating_point or dtype.is_complex else 0.0


def weights_of(
    tensors: Tensors, others: Tensors, most: float | None = None
) -> list[torch.Tensor | None]:
    """Return the sizes of numbers relative to the largest, but not below what rounding may be.

    None stands for zeros; where one of `others`, of the same shapes, is None, no sizes are wanted.
    `most` is the largest number, if it is known.
    """
    most = _largest(tensors) if most is None else most
    found: list[torch.Tensor | None] = []
    for t, other in zip(tensors, others, strict=True):
        if other is None:
            found.append(None)
            continue
        least = math.sqrt(eps_of(other.dtype))
        if not 0 < most < math.inf:
            sizes = torch.ones_like(other.real)
        else:
            sizes = torch.zeros_like(other.real) if t is None else t.abs() / most
        found.append(sizes.clamp(min=least))
    return found


def over_sizes(drawn: Tensors, tensors: Tensors) -> list[torch.Tensor | None]:
    """Return random numbers over the sizes of others, much as `weights_of` has them.

    In as few passes over memory as there can be.
    """
    most = _largest(tensors)
    found: list[torch.Tensor | None] = []
    for d, t in zip(drawn, tensors, strict=True):
        if d is None or t is None or t.dtype not in _REAL or not 0 < most < math.inf:
            found += over([d], weights_of([t], [d], most))
        else:
            zero = torch.zeros((), dtype=t.dtype, device=t.device)
            sizes = torch.hypot(t, torch.full_like(zero, math.sqrt(eps_of(t.dtype)) * most))
            found.append(torch.addcdiv(zero, d, sizes, value=most))
    return found


_REAL = (torch.float32, torch.float64)


def _largest(tensors: Tensors) -> float:
    return max((float(largest(t)) for t in tensors if t is not None and t.numel()), default=0.0)


def over(tensors: Tensors, weights: Tensors) -> list[torch.Tensor | None]:
    """Return tensors divided by weights; None for what is None."""
    return [
        None if t is None or w is None else _quotient(t, w)
        for t, w in zip(tensors, weights, strict=True)
    ]


def _quotient(t: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    # PyTorch has no quotients of complex numbers in half precision.
    return t * w.reciprocal() if t.dtype is torch.complex32 else t / w
