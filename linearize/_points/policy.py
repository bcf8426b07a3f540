"""What a user wants of a point's products."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any, TypedDict


class Opaque(TypedDict):
    """What `resolve` is told about methods that an author did not give."""

    materialize: bool
    limit: int


@dataclasses.dataclass(frozen=True, slots=True)
class Policy:
    """What to do about opaque operations that lack a direction.

    Attributes
    ----------
    materialize
        Whether to build the matrix of such an operation from unit vectors.
    limit
        The most bytes that one such matrix may take.
    simplify
        Whether programs that are run often are simplified.
    check
        When the two programs are checked to be adjoint: "structure", "always" or "never".
    dense_limit
        The most bytes that the matrix of a whole program may take; 0 for no such matrices.
    compile
        Whether programs that are run often are compiled: a bool, or options for that.
    """

    materialize: bool = False
    limit: int = 1 << 28
    simplify: bool = True
    check: str = "structure"
    dense_limit: int = 1 << 24
    compile: Any = False

    @property
    def opaque(self) -> Opaque:
        """What to do about methods that an author did not give."""
        return {"materialize": self.materialize, "limit": self.limit}

    @property
    def shared(self) -> Hashable:
        """What must be equal for the programs of equal graphs to be the same."""
        return self.simplify, repr(self.compile)
