"""Which results of a linear program can depend on which of its arguments.

Each variable has a boolean matrix, one row per entry, one column per entry of the program's
arguments. Operations that move entries move rows, pointwise operations join the rows of their
arguments, contractions join rows along a dimension. Kernels are tried out (see `_probing`), custom
Functions have the pattern that their author declared. What any other operation gives counts as
depending on all that its arguments depend on. So a pattern can hold too much, never too little.

Numbers do not matter, except where they say what is read: indices, positions, and the zeros of a
matrix that f found ready. What was looked at is noted, so that the pattern is used where these are
the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

from .._execute.binding import BoundProgram
from .._programs.origins import Origin
from .._programs.program import Equation
from .._programs.values import Constant, Var, frozen
from .._spaces.nested import map_leaves
from .._text.labels import beside
from .._torch.names import OpOverload
from . import _declared, _probing, _reading
from ._boolean import Rows
from ._reading import Look, Reader, TooDenseError
from ._rules import rule_for


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """What an operation does to the number of entries.

    Attributes
    ----------
    name
        Of the operation, with the line of f if that is known.
    before, after
        The most arguments that an entry of what goes in, and of what comes out, depends on.
    guessed
        Whether its result counts as depending on everything, for want of a rule.
    """

    name: str
    before: int
    after: int
    guessed: bool


@dataclasses.dataclass(slots=True)
class Dependence:
    """The boolean matrix of a program.

    Attributes
    ----------
    rows
        One row per entry of the results.
    steps
        The operations whose results depend on more than their arguments do.
    looked_at
        What was read of constants, by their origins.
    here_only
        Whether the program may be another one at other points of the structure.
    """

    rows: Rows
    steps: list[Step]
    looked_at: dict[Origin, tuple[Look, torch.Tensor]]
    here_only: bool

    @property
    def exact(self) -> bool:
        """Whether nothing was guessed."""
        return not any(step.guessed for step in self.steps)

    def holds(self, read: Callable[[Origin], torch.Tensor]) -> bool:
        """Whether it is the one of another point too, of which constants can be read."""
        try:
            return not self.here_only and all(
                torch.equal(look(read(o).detach()), seen)
                for o, (look, seen) in self.looked_at.items()
            )
        except LookupError:  # recorded anew
            return False


class _Walk(Reader):
    """Reads one equation after the other, and notes what they do."""

    def __init__(self, program: BoundProgram) -> None:
        super().__init__(program)
        self.steps: list[Step] = []
        self._tried: dict[Hashable, Rows | None] = {}

    def read(self, eq: Equation) -> None:
        """Find the rows of an equation's results."""
        results = self._found(eq)
        guessed = results is None
        if results is None:
            results = self.everything(eq)
        after = 0
        for out, rows in zip(eq.outputs, results, strict=True):
            if out is not None:
                if rows.nnz > _reading.LIMIT:
                    raise TooDenseError
                assert rows.shape == (out.spec.numel, self.width), eq.name
                self.rows[out] = rows
                after = max(after, _most(rows))
        if eq.kwargs.get("memory_format") == torch.contiguous_format or eq.kind == "contiguous":
            self.contiguous.update(v for v in eq.outputs if v is not None)
        before = max((_most(self.rows[v]) for v in eq.inputs()), default=0)
        if guessed or after > before:
            name = beside(eq.name, eq.source)
            self.steps.append(Step(name, before, after, guessed and after > 1))

    def _found(self, eq: Equation) -> list[Rows] | None:
        if not isinstance(eq.op, OpOverload):
            declared = _declared.relation(eq)
            if declared is not None:
                return self.linked(eq, declared)
        elif eq.op.namespace != "aten":
            return None
        elif (rule := rule_for(eq.op)) is not None:
            results = rule(self, eq)
            if results is not None:
                return results
        return self.linked(eq, self._try(eq)) if _probing.tried(eq) else None

    def _try(self, eq: Equation) -> Rows | None:
        """Try an operation out, once for all that are alike."""
        variables, kept = eq.inputs(), _probing.kept(eq)
        for c in kept:
            self.read_numbers(c)

        def kind(x: Any) -> Any:
            if isinstance(x, Var):
                return variables.index(x), x.spec
            return ("any", x.spec) if isinstance(x, Constant) and x not in kept else x

        key = frozen(eq.op, map_leaves(kind, eq.args), map_leaves(kind, eq.kwargs))
        if key not in self._tried:
            self._tried[key] = _probing.relation(eq, self.numbers, _reading.LIMIT)
        return self._tried[key]


def _most(rows: Rows) -> int:
    return int(np.diff(rows.indptr).max(initial=0))


def dependence(program: BoundProgram) -> Dependence:
    """Return the boolean matrix of a program's result, and how it came about.

    Raises
    ------
    TooDenseError
        If it would have too many entries to be worth it.
    """
    walk = _Walk(program)
    for eq, gone in zip(program.equations, program.program.last_uses(), strict=True):
        walk.read(eq)
        for v in gone:
            del walk.rows[v]
    blocks = [
        sp.csr_array((spec.numel, walk.width), dtype=bool) if v is None else walk.rows[v]
        for v, spec in zip(program.outputs, program.specs, strict=True)
    ]
    empty = sp.csr_array((0, walk.width), dtype=bool)
    rows = sp.vstack([*blocks, empty], format="csr").astype(bool)
    return Dependence(rows, walk.steps, walk.looked_at, bool(program.program.fixed))
