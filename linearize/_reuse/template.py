"""Programs that all points with one signature run.

What such a program depends on is said here and nowhere else:

* the `signature` of the graph: its nodes and edges, shapes and dtypes, static arguments, the
  classes of custom Functions, and which saved tensors share memory;
* Python numbers of f's, by their bits: what a program was made or simplified to may come of their
  values. Where such a number only scales and was seen to differ, a structure that such graphs
  share (`families`) has a constant in its place, and depends on it no more;
* the `Origin` of each constant, by which each point computes its own numbers. A constant is
  told from others by its origin, never by the tensor that it was at some point;
* what was called that does not show all that it does, operation by operation (`Unseen`): nodes of
  the graph for all its programs, methods of custom Functions for those that they are part of;
* for custom Functions, which stand in the program as `Place`s, the node at each place.

Numbers in constants decide nothing: a recording that looked at some has `fixed` set, and is not
shared.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from .._capture.collectives import OpaqueNode
from .._execute.binding import Binding
from .._execute.executor import Executor
from .._execute.schedule import Portable
from .._programs.origins import Costly, Number, Origin, Saved, ordered
from .._programs.program import Program
from .._programs.residuals import Residual, finite
from .._record.witness import Unseen


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Stands for a custom Function's node in a program."""

    index: int
    name: str
    has_jvp: bool
    has_backward: bool
    takes_batches: bool


class Template(Portable):
    """A linear program with an executor, for all points of a structure.

    Attributes
    ----------
    executor
        Runs it with a `Binding`.
    simplified
        Whether it is the simplified one.
    cost
        The price of its numbers, as far as these cost as much as several products; else 0.
    unseen
        The methods of custom Functions that are written down in it, as they were called: where
        they do something else, it is not the program of the graph.
    verified
        Set when it was held against a graph that it was not made from.
    """

    __slots__ = ("_saved", "cost", "executor", "simplified", "unseen", "verified")

    def __init__(
        self, program: Program, *, simplified: bool, unseen: Sequence[Unseen] = ()
    ) -> None:
        super().__init__(program)
        self.executor = Executor(program, final=simplified)
        self.simplified = simplified
        self.unseen = tuple(unseen)
        self.verified = threading.Event()
        needed = ordered([c.origin for c in program.constants])
        costly = [cast("Costly", o.op) for o in needed if isinstance(o.op, Costly)]
        self.cost = sum(op.cost for op in costly)
        #: What is read of the graph, by this direction or by the other one before.
        self._saved = [o for o in needed if isinstance(o, Saved) and not isinstance(o, Number)]

    @staticmethod
    def of(
        program: Program,
        places: dict[int, int],
        *,
        simplified: bool,
        unseen: Sequence[Unseen] = (),
    ) -> Template | None:
        """Make a template of a program, None if it holds at its point only."""
        placed = portable(program, places)
        return None if placed is None else Template(placed, simplified=simplified, unseen=unseen)

    @property
    def kind(self) -> tuple[object, ...]:
        """What tells it from others of the same map."""
        return self.simplified, self.unseen

    def bind(
        self,
        read: Callable[[Saved], Residual],
        number: Callable[[Number], Any],
        node: Callable[[int], OpaqueNode],
        known: dict[Origin, Residual],
    ) -> Binding | None:
        """Compute the residuals of another point.

        Parameters
        ----------
        read, number
            Give what the graph saved there.
        node
            Gives the custom Function's node at a place of the graph.
        known
            What was computed there before; receives what is computed now.

        Returns
        -------
        Binding or None
            None if the numbers do not allow this program: a factor overflows.
        """
        used: dict[Origin, Residual] = {o: read(o) for o in self._saved}

        def value(o: Saved) -> Any:
            return number(o) if isinstance(o, Number) else used[o].tensor

        with torch.inference_mode(False), torch.no_grad():
            computed = self.computed(value, known)
        residuals = []
        for c in self.program.constants:
            r = used.get(c.origin) or known.get(c.origin)
            if r is None:
                r = known[c.origin] = Residual(computed[c.origin], c.source)
            residuals.append(r)
        pairs = zip(self.program.constants, residuals, strict=True)
        if not finite([r.tensor for c, r in pairs if c.folded]):
            return None
        ops = [op.moved(lambda p: node(p.index)) for op in self.program.opaque()]
        mine = set(map(id, residuals))
        guards = [r for r in used.values() if id(r) not in mine]
        return Binding(residuals, [op for op in ops if op is not None], guards)


def portable(program: Program, places: dict[int, int]) -> Program | None:
    """Return a program with places for the nodes of its graph, None if it holds there only."""
    if program.fixed or not all(c.origin.portable for c in program.constants):
        return None
    #: Nodes of another graph, which was made to transpose an operation.
    others: list[OpaqueNode] = []

    def place(node: OpaqueNode) -> Place:
        if id(node) not in places:
            others.append(node)
        index = places.get(id(node), -1)
        return Place(index, node.name, node.has_jvp, node.has_backward, node.takes_batches)

    moved = [op.moved(place) for op in program.opaque()]
    ops = [op for op in moved if op is not None]
    return program.with_opaque(ops) if len(ops) == len(moved) and not others else None
