"""Which values of a program may share memory."""

from __future__ import annotations

from .._programs.aten import may_alias
from .._programs.program import Operation, Program
from .._programs.values import Var


def owners(program: Program) -> dict[Var, Var | None]:
    """Return for each variable the one whose memory it may share, itself if it has its own.

    None where that is foreign memory: an argument's, a residual's or a user's.
    """
    found: dict[Var, Var | None] = dict.fromkeys(program.inputs)
    for eq in program.equations:
        user = isinstance(eq.op, Operation)
        own = not (eq.op.may_alias if isinstance(eq.op, Operation) else may_alias(eq.op))
        theirs = {found[v] for v in eq.inputs()}
        one = len(theirs) == 1 and not (user or eq.constants())
        shared = theirs.pop() if one else None
        found.update((v, v if own else shared) for v in eq.outputs if v is not None)
    return found


def shared_results(program: Program) -> list[bool]:
    """Return which results may share memory with something that is not only theirs."""
    owner = owners(program)
    found: list[bool] = []
    taken: set[Var | None] = {None}
    for out in program.outputs:
        mine = None if out is None else owner[out]
        found.append(out is not None and mine in taken)
        taken.add(mine)
    return found
