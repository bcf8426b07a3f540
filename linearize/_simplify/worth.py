"""Whether a simplified program is worth it."""

from __future__ import annotations

from .._execute.binding import BoundProgram
from .._execute.thresholds import SIMPLIFIED_SHARE
from .._programs.numbers import Pool
from .._programs.price import price
from .._programs.program import Program
from .passes import simplify
from .sparse_matrices import stores_by_rows


def simplified(program: BoundProgram, pool: Pool | None = None) -> BoundProgram | None:
    """Return the simplified program, None if it saves too little to be tried."""
    after = program.made(simplify, pool=pool)
    return after if pays(program.program, after.program) else None


def pays(before: Program, after: Program) -> bool:
    """Whether a simplified program saves enough work or memory to be tried."""
    if stores_by_rows(after) and not stores_by_rows(before):
        return True  # prices do not tell how a matrix is stored
    then, now = price(after), price(before)
    if then <= SIMPLIFIED_SHARE * now:
        return True
    kept = _kept(before)
    return then <= now and kept > 0 and _kept(after) <= SIMPLIFIED_SHARE * kept


def _kept(program: Program) -> int:
    return sum(c.spec.nbytes for c in program.constants)
