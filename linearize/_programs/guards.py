"""Constants that are kept only to see that nobody changes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch

from .._torch.names import reachable_elsewhere
from .residuals import Residual


def guards(before: Iterable[Residual], after: Iterable[Residual]) -> list[Residual]:
    """Return the residuals that are not read any more and that somebody else can change.

    They are kept to see that nobody does, without their numbers: the program `after` was made of
    the one `before`, which did read them.
    """
    ours, kept = list(before), {id(r) for r in after}
    return watched([r for r in ours if id(r) not in kept], ours)


def watched(residuals: Iterable[Residual], ours: Iterable[Residual]) -> list[Residual]:
    """Return those residuals that somebody else can change, without their numbers.

    A tensor whose storage nobody but `ours` refers to cannot be changed from outside.
    """
    count: Counter[int] = Counter()
    for r in ours:
        if r.size:
            count[r.tensor.untyped_storage().data_ptr()] += 1

    def can_change(r: Residual) -> bool:
        if _is_sparse(r):  # there is no telling who holds a part of it
            return True
        holders = 1 + (r.counter is r.tensor)
        return reachable_elsewhere(r.tensor, count[r.tensor.untyped_storage().data_ptr()], holders)

    return [r.without_memory() for r in residuals if (r.size or _is_sparse(r)) and can_change(r)]


def _is_sparse(r: Residual) -> bool:
    return r.tensor.layout is not torch.strided
