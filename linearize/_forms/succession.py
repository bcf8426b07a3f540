"""When the next form of a map takes over: what was counted, and what the structure has learned.

A program as it was recorded is followed by the simplified one, that one compiled, the matrix.
Each is tried once, when the products so far have paid for it. What is decided here depends on
counts and on the program, see `_execute.thresholds` and `_programs.price`, and never on a clock.
"""

from __future__ import annotations

import dataclasses
import enum
import math

from .._execute import thresholds
from .._programs.price import price
from .._programs.program import Program
from .._simplify.sparse_matrices import stores_by_rows
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
    left
        What another point left that is to be taken over in its time.
    now
        The program, if something was left.
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

    __slots__ = (
        "_at",
        "_dense",
        "_products",
        "_simplify",
        "_soon",
        "compiling",
        "learned",
        "quiet",
    )

    def __init__(
        self,
        *,
        simplify: bool,
        left: Left | None = None,
        now: Program | None = None,
        dense: Dense | None = None,
        compiling: Options | None = None,
        soon: bool = False,
        learned: Learned | None = None,
    ) -> None:
        self.learned = learned or Learned()
        self._simplify = simplify and self.learned.simplifies
        self._at: int | None = None if left is None or now is None else left.due(now)
        self._dense = dense
        self.compiling = compiling
        self._soon = soon
        self._products = 0
        self.quiet = False

    @property
    def settled(self) -> bool:
        """Whether the program is not to be simplified any more."""
        return not self._simplify

    def due(self, runs: int) -> Form | None:
        """Count a product, and return the form that is to be tried at it.

        Parameters
        ----------
        runs
            How often the program has run, at this point and others.
        """
        dense = self._dense
        if dense is not None:
            dense.count += 1
        if self._simplify:
            self._products += 1
            late = runs >= thresholds.SIMPLIFY_AT - 1
            if self._at is not None:
                late = self._products >= self._at
            return Form.SIMPLIFIED if late or self._soon else None
        if self.compiling is not None:
            return Form.COMPILED
        if dense is None:
            self.quiet = True
            # Another thread may have asked for a compiled form just now.
            self.quiet = self.compiling is None
            return None
        return Form.MATRIX if dense.count >= dense.due else None

    def simplifies(self) -> None:
        """Take note that the simplified program is tried, now and not again."""
        self._simplify = False

    def compiles(self) -> Options | None:
        """Take note that the program is compiled, now and not again; return how."""
        options, self.compiling = self.compiling, None
        return options

    def writes_out(self) -> Dense | None:
        """Take note that the matrix is tried, now and not again; return what makes it."""
        dense, self._dense = self._dense, None
        return dense

    def compile(self, options: Options) -> None:
        """Have the map compiled at one of the next products."""
        self._soon = True
        self.compiling = options
        self.quiet = False  # last, see `due`


def pays(before: Program, after: Program) -> bool:
    """Whether a simplified program saves enough work or memory to be tried."""
    if stores_by_rows(after) and not stores_by_rows(before):
        return True  # prices do not tell how a matrix is stored
    then, now = price(after), price(before)
    if then <= thresholds.SIMPLIFIED_SHARE * now:
        return True
    kept = _kept(before)
    return then <= now and kept > 0 and _kept(after) <= thresholds.SIMPLIFIED_SHARE * kept


def _kept(program: Program) -> int:
    return sum(c.spec.nbytes for c in program.constants)
