"""When the next form of a map takes over: what was counted, and what the structure has learned.

A program as it was recorded is followed by the simplified one, that one compiled, the matrix.
Each is tried once, when the products so far have paid for it. What is decided here depends on
counts and on the program, see `_execute.thresholds` and `_programs.price`, and never on a clock.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Any

from .._execute import thresholds
from .._programs.price import price
from .._programs.program import Program
from .compiled import Options
from .dense import Dense


class Form(enum.Enum):
    """What takes the place of a program as it was recorded."""

    SIMPLIFIED = enum.auto()
    COMPILED = enum.auto()
    MATRIX = enum.auto()


@dataclasses.dataclass(slots=True)
class Learned:
    """What the points of a structure have found out about one map, without tensors.

    Attributes
    ----------
    simplifies
        False once a simplified program saved nothing or lost digits.
    matrix
        Whether the matrix is worth it; None if that was not asked yet.
    again
        At how many products of a further point it is, if that was computed.
    """

    simplifies: bool = True
    matrix: bool | None = None
    again: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Left:
    """What another point left, whose numbers cost much to compute, and the price of these."""

    program: Program
    cost: float

    def due(self, now: Program) -> int:
        """Return at which product it is worth it to give up a program for this one."""
        saved = price(now) - price(self.program)
        if saved <= 0:
            return thresholds.NEVER
        return max(thresholds.COSTLY_AT, math.ceil(self.cost / saved))


class Succession:
    """Decides when the next form of one map takes over.

    Parameters
    ----------
    simplify
        Whether the program may be simplified (any more).
    at
        At which product what another point left is taken over, if it left something.
    dense
        What may become the map's matrix.
    compiling
        How to compile, None for not at all.
    soon
        Whether to do so as soon as possible.
    learned
        What the structure's points have found out.

    Attributes
    ----------
    quiet
        Whether there is nothing to do at a product but to run what is there.
    """

    __slots__ = ("_at", "_coming", "_products", "_soon", "learned", "quiet")

    def __init__(
        self,
        *,
        simplify: bool,
        at: int | None = None,
        dense: Dense | None = None,
        compiling: Options | None = None,
        soon: bool = False,
        learned: Learned | None = None,
    ) -> None:
        self.learned = learned or Learned()
        #: What has not been tried yet, with what it takes.
        self._coming: dict[Form, Any] = {
            Form.SIMPLIFIED: (simplify and self.learned.simplifies) or None,
            Form.COMPILED: compiling,
            Form.MATRIX: dense,
        }
        self._at = at
        self._soon = soon
        self._products = 0
        self.quiet = False

    @property
    def settled(self) -> bool:
        """Whether the program is not to be simplified any more."""
        return self._coming[Form.SIMPLIFIED] is None

    def due(self, runs: int) -> Form | None:
        """Count a product, and return the form that is to be tried at it.

        `runs` says how often the program has run, at this point and others.
        """
        dense: Dense | None = self._coming[Form.MATRIX]
        if dense is not None:
            dense.count += 1
        if not self.settled:
            self._products += 1
            late = runs >= thresholds.SIMPLIFY_AT - 1
            if self._at is not None:
                late = self._products >= self._at
            return Form.SIMPLIFIED if late or self._soon else None
        if self._coming[Form.COMPILED] is not None:
            return Form.COMPILED
        if dense is None:
            self.quiet = True
            # Another thread may have asked for a compiled form just now.
            self.quiet = self._coming[Form.COMPILED] is None
            return None
        return Form.MATRIX if dense.count >= dense.due else None

    def begins(self, form: Form) -> Any:
        """Take note that a form is tried, now and not again.

        Returns what it takes; None if it has been tried already, by another thread.
        """
        given, self._coming[form] = self._coming[form], None
        return given

    def compile(self, options: Options) -> None:
        """Have the map compiled at one of the next products."""
        self._soon = True
        self._coming[Form.COMPILED] = options
        self.quiet = False  # last, see `due`
