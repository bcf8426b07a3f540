"""Floor 3: what the graphs of different points have in common.

A solver linearizes one function at many points, and the graphs mostly differ in nothing but
the numbers that they saved: they have equal signatures. Such points share a `Structure`:
their linear programs as `Template`s, into which the numbers of each point are bound.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from ._execute import Binding, Executor
from ._folding import FOLDED, finite
from ._functions import CustomNode
from ._origin import Costly, Origin, Saved, Schedule, ordered
from ._program import Equation, Operation, Program, Residual, map_leaves
from ._signature import HiddenError

#: A direction, and which arguments are not zero.
Key: TypeAlias = tuple[str, tuple[bool, ...]]


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
    )

    def __init__(self, program: Program, places: dict[int, int], *, simplified: bool) -> None:
        blank: dict[Residual, Residual] = {}

        def without_numbers(x: Any) -> Any:
            if not isinstance(x, Residual):
                return x
            if x not in blank:
                blank[x] = x.blank()
            return blank[x]

        def place(node: CustomNode) -> Any:
            return _Place(
                places[id(node)], node.name, node.has_jvp, node.has_backward, node.takes_batches
            )

        self.program = _mapped(program, without_numbers, place)
        self.executor = Executor(self.program, final=simplified)
        self.simplified = simplified
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

    def bind(
        self,
        read: Callable[[Saved], Residual],
        node: Callable[[int], CustomNode],
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
            computed = schedule(lambda o: used[o].tensor)
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
    program: Program, leaf: Callable[[Any], Any], place: Callable[[CustomNode], Any]
) -> Program:
    equations = []
    for eq in program.equations:
        op = eq.op
        if isinstance(op, Operation):
            moved = op.moved(place)
            if moved is None:
                raise HiddenError(op.name)
            op = moved
        args, kwargs = map_leaves(leaf, eq.args), map_leaves(leaf, eq.kwargs)
        equations.append(Equation(op, args, kwargs, eq.outputs, eq.source))
    return program.with_equations(equations)


#: The structures whose programs were found to be adjoint, the latest last, as hashes of their
#: signatures: a function that is linearized anew need not be checked anew.
PROVED: dict[int, None] = {}
_MOST_PROVED = 10_000
_PROVED_LOCK = threading.Lock()


class Structure:
    """What is known of all points with one signature."""

    def __init__(self, of: tuple[Any, ...]) -> None:
        self.signature = of
        self._lock = threading.Lock()
        self._templates: dict[Key, list[Template]] = {}
        try:
            self._hash: int | None = hash(of)
        except TypeError:
            self._hash = None
        self._proved = self._hash in PROVED

    @property
    def proved(self) -> bool:
        """Whether its two programs were found to be adjoint."""
        return self._proved

    @proved.setter
    def proved(self, value: bool) -> None:
        self._proved = value
        if value and self._hash is not None:
            with _PROVED_LOCK:
                PROVED[self._hash] = None
                if len(PROVED) > _MOST_PROVED:
                    del PROVED[next(iter(PROVED))]

    def offer(self, key: Key, template: Template) -> None:
        """Take a template in; simplified ones are preferred."""
        with self._lock:
            known = self._templates.setdefault(key, [])
            if all(t.simplified != template.simplified for t in known):
                known.append(template)
                known.sort(key=lambda t: not t.simplified)

    def templates(self, key: Key) -> list[Template]:
        """Return the templates of a map, the best first."""
        with self._lock:
            return list(self._templates.get(key, ()))


class Structures:
    """The structures that a `Linearizer` has met, the latest first.

    Attributes
    ----------
    recorded, reused
        How many points were recorded, and how many took over a structure.
    dense
        How many matrices took the place of programs.
    compiled
        How many programs were compiled.
    """

    #: How many are kept; each is a few kilobytes per operation.
    limit = 16

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: list[Structure] = []
        self.recorded = 0
        self.reused = 0
        self.dense = 0
        self.compiled = 0

    def find(self, of: tuple[Any, ...]) -> Structure | None:
        """Return the structure with a signature."""
        with self._lock:
            for i, s in enumerate(self._known):
                if s.signature == of:
                    self._known.insert(0, self._known.pop(i))
                    return s
            return None

    def add(self, structure: Structure) -> None:
        """Take in a structure that was recorded."""
        with self._lock:
            self._known.insert(0, structure)
            del self._known[self.limit :]

    def count(self, *, reused: bool) -> None:
        """Count a point."""
        with self._lock:
            if reused:
                self.reused += 1
            else:
                self.recorded += 1

    def count_dense(self) -> None:
        """Count a matrix."""
        with self._lock:
            self.dense += 1

    def count_compiled(self) -> None:
        """Count a compiled program."""
        with self._lock:
            self.compiled += 1

    def clear(self) -> None:
        """Forget all structures."""
        with self._lock:
            self._known = []
