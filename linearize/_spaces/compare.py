"""Comparing numbers: what may be rounding and what may not."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from .specs import TensorSpec

#: Kinds whose equal values are the same.
_WHOLE = frozenset((int, str, type(None)))


def exact(x: Any) -> Hashable:
    """Return what stands for a number in a key: equal for numbers with the same bits only.

    0.0 == -0.0, and yet they divide to infinities of either sign; 2 == 2.0.
    """
    kind = type(x)
    if kind is float or kind is complex:
        return kind, repr(x)
    if kind is tuple or kind is list:
        return tuple(x) if _WHOLE.issuperset(map(type, x)) else tuple([exact(y) for y in x])
    return x  # type: ignore[no-any-return]


_TOLERANCE = {
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
    torch.float32: 1e-3,
    torch.complex64: 1e-3,
    torch.complex32: 2e-2,
}


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative error within which two results of this dtype count as equal."""
    return _TOLERANCE.get(dtype, 1e-8)


def rounding(dtype: torch.dtype) -> float:
    """Return the relative error that rounding in another order may well amount to.

    Less than `tolerance` in single precision: there, digits that a simplified program loses by
    cancellation are missed.
    """
    return min(tolerance(dtype), max(200 * torch.finfo(dtype).eps, 1e-9))


def roughly(dtype: torch.dtype) -> float:
    """Return the relative error within which results of user code count as equal.

    It may solve equations to a tolerance of its own.
    """
    return max(1e-3, tolerance(dtype))


def close(
    a: torch.Tensor, b: torch.Tensor, within: Callable[[torch.dtype], float] = tolerance
) -> bool:
    """Whether two tensors agree within the tolerance of their dtype, relative to the largest.

    Numbers that are not finite must stand at the same places.
    """
    if a.shape != b.shape or a.numel() == 0:
        return a.shape == b.shape
    limit = max(within(a.dtype), within(b.dtype))
    if _close_at_once(a, b, limit):
        return True
    same, off, large = [], [], []
    for x, y in zip(_pieces(a.detach()), _pieces(b.detach()), strict=True):
        wide = torch.complex128 if x.is_complex() or y.is_complex() else torch.float64
        x, y = x.to(wide), y.to(wide)
        finite = torch.isfinite(x)
        same.append((finite == torch.isfinite(y)).all())
        x, y = torch.where(finite, x, 0), torch.where(finite, y, 0)
        off.append((x - y).abs().max())
        large.append(torch.stack([x.abs().max(), y.abs().max()]))
    if not torch.stack(same).all():
        return False
    return bool(torch.stack(off).max() <= limit * torch.stack(large).amax(0).sum() + 1e-300)


def _close_at_once(a: torch.Tensor, b: torch.Tensor, limit: float) -> bool:
    """Whether two tensors agree, in as few passes as possible; False says nothing."""
    if a.dtype != b.dtype or a.device != b.device or a.layout != b.layout:
        return False
    if a.layout != torch.strided or not (a.is_floating_point() or a.is_complex()):
        return False
    a, b = a.detach(), b.detach()
    off, one, two = torch.stack([largest(t) for t in (a - b, a, b)]).tolist()
    # NaN and infinity compare as false, or are not finite.
    return math.isfinite(one + two) and off <= limit * (one + two)


def largest(t: torch.Tensor) -> torch.Tensor:
    """Return the largest modulus of a tensor with entries, NaN if one of them is that."""
    if t.is_complex():
        return t.abs().max().double()
    low, high = t.aminmax()
    return torch.maximum(high, -low).double()


def all_close(
    found: Sequence[torch.Tensor | None],
    expected: Sequence[torch.Tensor | None],
    within: Callable[[torch.dtype], float] = tolerance,
) -> bool:
    """Whether two results of one map agree, tensor by tensor; None is zero and agrees with None.

    A tensor that is nothing but rounding next to the largest number of all agrees too: two
    numbers that are zero on paper differ in all their digits.
    """
    far = []
    for a, b in zip(found, expected, strict=True):
        if (a is None) != (b is None):
            return False
        if a is not None and b is not None and not close(a, b, within):
            far.append((a, b))
    if not far:
        return True
    scale = max(float(largest(t)) for t in expected if t is not None and t.numel())
    return math.isfinite(scale) and all(
        a.shape == b.shape
        and max(float(largest(a)), float(largest(b))) <= 0.1 * within(a.dtype) * scale
        for a, b in far
    )


#: How many numbers are compared at once: the comparison takes several times their memory.
_AT_ONCE = 1 << 20


def _pieces(t: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return parts of a tensor, none of them much larger than what is compared at once."""
    if t.numel() <= _AT_ONCE:
        return (t,)
    dim = max(range(t.dim()), key=t.shape.__getitem__)
    pieces: Sequence[torch.Tensor] = torch.split(
        t, max(1, t.shape[dim] * _AT_ONCE // t.numel()), dim
    )
    return pieces


def magnitudes(*dtypes: torch.dtype) -> tuple[float, ...]:
    """Return factors at which a map that looks linear must be so too, over the range of dtypes.

    Powers of two, which lose no digits: large ones of both signs, a small and a moderate one.
    What clips, rounds or saturates is told by one of them.
    """
    ranges = [torch.finfo(d).max for d in dtypes if d.is_floating_point or d.is_complex]
    if not ranges:
        return ()
    most = min(ranges)
    half = max(10, (math.frexp(most)[1] - 1) // 2)
    return 2.0**half, -(2.0**half), 2.0**-half, -(2.0 ** (half // 4))


def close_at(
    factor: float,
    a: torch.Tensor,
    b: torch.Tensor,
    within: Callable[[torch.dtype], float] = tolerance,
) -> bool:
    """Whether two results agree for arguments that were multiplied by a factor.

    Nothing is said where numbers leave the range of the dtype at the largest and smallest factors.
    """
    if close(a, b, within):
        return True
    most = max(magnitudes(a.dtype), default=0.0)
    if factor == 1 / most:
        return _tiny(a) and _tiny(b)
    beyond = not (bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all()))
    return beyond and abs(factor) == most


def agree(
    found: Sequence[torch.Tensor | None],
    expected: Sequence[torch.Tensor | None],
    specs: Sequence[TensorSpec],
    factor: float = 1.0,
) -> bool:
    """Whether results agree, None being zero, for arguments that were multiplied by a factor."""
    return all(
        close_at(factor, spec.or_zeros(a), spec.or_zeros(b))
        for a, b, spec in zip(found, expected, specs, strict=True)
    )


def _tiny(t: torch.Tensor) -> bool:
    """Whether the numbers of a tensor are so small that they lose digits."""
    info = torch.finfo(t.dtype)
    return bool(t.abs().max() < info.tiny / info.eps)
