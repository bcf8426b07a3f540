"""A program without the numbers of its point."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import torch

from .._capture.collectives import OpaqueNode
from .._capture.signature import HiddenError
from .._execute.binding import Binding
from .._execute.executor import Executor
from .._execute.schedule import Schedule
from .._programs.origins import Costly, Origin, Saved, ordered
from .._programs.program import Operation, Program, Var
from .._programs.residuals import FOLDED, Residual, finite


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """Stands for a custom Function's node in a template."""

    index: int
    name: str
    has_jvp: bool
    has_backward: bool
    takes_batches: bool


class Template:
    """A linear program without numbers.

    Attributes
    ----------
    program
        With residuals that have no tensor.
    executor
        Runs it with a `Binding`.
    simplified
        Whether it is the simplified one.
    costly
        Whether its numbers cost as much to compute as several products.
    verified
        Set when it was held against a graph that it was not made from; forks share it.
    """

    __slots__ = (
        "_ops",
        "_saved",
        "_schedules",
        "_wanted",
        "costly",
        "executor",
        "program",
        "simplified",
        "verified",
    )

    def __init__(self, program: Program, places: dict[int, int], *, simplified: bool) -> None:
        blank: dict[Residual, Residual] = {}

        def without_numbers(x: Any) -> Any:
            if type(x) is Var:
                return x
            if x not in blank:
                blank[x] = x.blank()
            return blank[x]

        def place(node: OpaqueNode) -> Any:
            return _Place(
                places[id(node)], node.name, node.has_jvp, node.has_backward, node.takes_batches
            )

        self.program = _mapped(program, without_numbers, place)
        self.executor = Executor(self.program, final=simplified)
        self.simplified = simplified
        self.verified = threading.Event()
        self._wanted = [(r, r.origin) for r in self.program.residuals() if r.origin is not None]
        needed = ordered([o for _, o in self._wanted])
        self.costly = any(isinstance(o.op, Costly) for o in needed)
        #: What is read of the graph, by this direction or by the other one before.
        self._saved = [o for o in needed if isinstance(o, Saved)]
        self._ops = [eq.op for eq in self.program.equations if isinstance(eq.op, Operation)]
        self._schedules: dict[Any, Schedule] = {}

    @staticmethod
    def of(program: Program, places: dict[int, int], *, simplified: bool) -> Template | None:
        """Make a template of a program, None if it holds at its point only."""
        if program.fixed or any(r.origin is None for r in program.residuals()):
            return None
        try:
            return Template(program, places, simplified=simplified)
        except HiddenError:
            return None

    def fork(self) -> Template:
        """Return one that can be compiled without the other."""
        made = copy.copy(self)
        made.executor = self.executor.fork()
        return made

    def bind(
        self,
        read: Callable[[Saved], Residual],
        node: Callable[[int], OpaqueNode],
        known: dict[Origin, Residual],
    ) -> Binding | None:
        """Compute the residuals of another point.

        Parameters
        ----------
        read
            Gives what the graph saved there.
        node
            Gives the custom Function's node at a place of the graph.
        known
            What was computed there before.

        Returns
        -------
        Binding or None
            None if the numbers do not allow this program: a factor overflows.
        """
        missing = [o for o in dict.fromkeys(o for _, o in self._wanted) if o not in known]
        key = tuple(map(id, missing))
        schedule = self._schedules.get(key)
        if schedule is None:
            schedule = self._schedules[key] = Schedule(missing)
        used = {o: read(o) for o in self._saved}
        with torch.inference_mode(False), torch.no_grad():
            computed = schedule([used[o].tensor for o in schedule.saved])
        found = dict(zip(missing, computed, strict=True))
        residuals = []
        for blank, origin in self._wanted:
            r = known.get(origin) or used.get(origin)  # type: ignore[call-overload]
            if r is None:
                t = found[origin]
                r = known[origin] = Residual(t, blank.source, origin)
            residuals.append(r)
        if not finite([r.tensor for r in residuals if r.source == FOLDED]):
            return None
        ops = [op.moved(lambda p: node(p.index)) for op in self._ops]
        mine = set(map(id, residuals))
        guards = [r for r in used.values() if id(r) not in mine]
        return Binding(residuals, [op for op in ops if op is not None], guards)


def _mapped(
    program: Program, leaf: Callable[[Any], Any], place: Callable[[OpaqueNode], Any]
) -> Program:
    equations = []
    for eq in program.equations:
        op = eq.op
        if isinstance(op, Operation):
            moved = op.moved(place)
            if moved is None:
                raise HiddenError(op.name)
            op = moved
        equations.append(eq.renamed(leaf, op=op))
    return program.with_equations(equations)
