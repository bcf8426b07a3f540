"""When two tensors count as the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

#: Relative and absolute tolerance; directions are of order one.
_TOLERANCE = {
    torch.float64: (1e-7, 1e-10),
    torch.float32: (1e-3, 1e-4),
    torch.float16: (1e-2, 1e-3),
    torch.bfloat16: (8e-2, 1e-2),
}
Tensors = Sequence[torch.Tensor | None]


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real()


def tolerance(tensors: Iterable[torch.Tensor]) -> tuple[float, float]:
    """Return the tolerance for results computed from or as these: that of the coarsest."""
    return max((_TOLERANCE.get(_real(t.dtype), (8e-2, 1e-2)) for t in tensors), default=(0, 0))


def _wide(t: torch.Tensor) -> torch.Tensor:
    return t.detach().to(torch.complex128 if t.is_complex() else torch.float64)


def distance(a: torch.Tensor, b: torch.Tensor | None) -> tuple[float, float]:
    """Return the largest difference and the largest magnitude; None is zero.

    Where both are not finite they count as equal; where only one is, as infinitely far apart.
    """
    b = torch.zeros_like(a) if b is None else b
    if a.shape != b.shape:
        return float("inf"), 0.0
    if a.numel() == 0:
        return 0.0, 0.0
    a, b = _wide(a), _wide(b)
    finite = torch.isfinite(a)
    if not torch.equal(finite, torch.isfinite(b)):
        return float("inf"), 0.0
    a, b = torch.where(finite, a, 0), torch.where(finite, b, 0)
    return float((a - b).abs().max()), float(torch.maximum(a.abs().max(), b.abs().max()))


def close(a: torch.Tensor, b: torch.Tensor | None, limits: tuple[float, float]) -> bool:
    """Whether two tensors agree, relative to the largest number in them."""
    error, size = distance(a, b)
    return error <= limits[0] * size + limits[1]


def all_close(a: Sequence[torch.Tensor], b: Tensors, limits: tuple[float, float]) -> bool:
    return len(a) == len(b) and all(close(x, y, limits) for x, y in zip(a, b, strict=True))


def inner(a: Sequence[torch.Tensor], b: Tensors) -> float:
    """Return the real inner product of two lists of tensors."""
    total = 0.0
    for x, y in zip(a, b, strict=True):
        if y is not None:
            x, y = _wide(x).flatten(), _wide(y).flatten()
            wide = torch.promote_types(x.dtype, y.dtype)
            total += float(torch.vdot(x.to(wide), y.to(wide)).real)
    return total


def size(a: Sequence[torch.Tensor], b: Tensors) -> float:
    """Return the largest that the inner product could be: what rounding is relative to."""
    pairs = zip(a, b, strict=True)
    return sum(float((_wide(x).abs() * _wide(y).abs()).sum()) for x, y in pairs if y is not None)
