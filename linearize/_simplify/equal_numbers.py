"""Computed tensors with the same numbers, kept once.

The two directions multiply the same factors in another order, and the graph often keeps one
tensor for several operations: what is computed of them is the same but for rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .._programs.numbers import Numbers
from .._programs.origins import roots
from .._programs.residuals import Residual
from .._programs.values import Constant

#: How many last digits numbers may differ in to be the same.
_DIGITS = 8
#: How much their sums may, which are looked at first.
_SUMS = 1e-4
#: What comes of more tensors than this is not looked for in other programs.
_MOST_ROOTS = 64
#: How many tensors may come of the same ones there.
_MOST = 4


def keep_once(constants: Sequence[Constant], numbers: Numbers) -> None:
    """Let constants take the tensors of others, computed before, that hold the same numbers.

    Only the tensors: at another point the numbers may not be the same.
    """
    residuals = numbers.residuals(constants)
    for c, r in zip(constants, residuals, strict=True):
        made_of = roots([c.origin], _MOST_ROOTS)
        for i in range(0 if made_of is None else _MOST):
            other = numbers.pool.setdefault((made_of, _kind(r), i), r)
            if other is r or _taken(r, other):
                break
    kinds: dict[Any, list[Residual]] = {}
    for r in residuals:
        kinds.setdefault(_kind(r), []).append(r)
    for alike in kinds.values():
        if len(alike) > 1:
            sums = torch.stack([r.tensor.sum().abs() for r in alike]).tolist()
            last, *rest = sorted(zip(sums, range(len(sums)), strict=True))
            for now in rest:
                near = now[0] - last[0] <= _SUMS * now[0]
                if not (near and _taken(alike[now[1]], alike[last[1]])):
                    last = now


def _kind(r: Residual) -> Any:
    return r.tensor.shape, r.tensor.dtype, r.tensor.device


def _taken(r: Residual, other: Residual) -> bool:
    """Whether a residual could take the tensor of another one: all numbers are the same."""
    if other.tensor is r.tensor:
        return True
    if other.changed() or not _same(other.tensor, r.tensor):
        return False
    r.take(other)
    return True


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether all numbers agree but for rounding, those that are small too, and zeros in sign."""
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    near = _DIGITS * torch.finfo(a.dtype).eps
    some = (slice(0, 4),) * a.dim()  # mostly enough to tell them apart
    return all(
        bool(((x - y).abs() - y.abs() * near).amax() <= 0) for x, y in ((a[some], b[some]), (a, b))
    ) and torch.equal(_signs(a), _signs(b))


def _signs(t: torch.Tensor) -> torch.Tensor:
    return torch.signbit(torch.view_as_real(t.resolve_conj()) if t.is_complex() else t)
