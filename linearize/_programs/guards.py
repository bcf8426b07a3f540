"""Constants that are kept only to see that nobody changes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from .._torch.names import reachable_elsewhere
from .program import Program
from .residuals import Residual


def guards(before: Program, after: Program) -> list[Residual]:
    """Return the residuals that only `before` reads and that somebody else can change.

    They are kept to see that nobody does: without their numbers.
    """
    kept = {id(r) for r in after.residuals()}
    gone = [r for r in before.residuals() if id(r) not in kept]
    return watched(gone, before.residuals())


def watched(residuals: Iterable[Residual], ours: Iterable[Residual]) -> list[Residual]:
    """Return those residuals that somebody else can change, without their numbers.

    A tensor whose storage nobody but `ours` refers to cannot be changed from outside.
    """
    count: Counter[int] = Counter()
    for r in ours:
        if r.size:
            count[r.tensor.untyped_storage().data_ptr()] += 1

    def can_change(r: Residual) -> bool:
        return reachable_elsewhere(r.tensor, count[r.tensor.untyped_storage().data_ptr()])

    return [r.without_memory() for r in residuals if r.size and can_change(r)]
