"""The pullbacks of single graph nodes, remembered.

Graphs repeat themselves: a time step after another, layer after layer. What a built-in node's
derivative does depends on nothing but its `node_key`, the layout of the gradients that it
takes, and numbers that it saved. So it is recorded once, and written down again from memory
for all other nodes of the kind, in this graph and in others, without computing anything.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias, cast

import cachetools
import torch

from .._execute.schedule import Portable
from .._programs.origins import Marked, Number, Origin, Saved, has_marks
from .._programs.program import Emitter, Equation, Operation, Program
from .._programs.scales import marked
from .._programs.values import Constant, Var
from .._spaces.nested import map_leaves
from .._torch.names import aten

#: Strides, and whether the numbers are stored conjugated or negated.
Layout: TypeAlias = tuple[tuple[int, ...], bool, bool]


def layout_of(t: torch.Tensor) -> Layout:
    """Return how a tensor lies in memory."""
    return t.stride(), t.is_conj(), t.is_neg()


def dense(shape: Sequence[int]) -> Layout:
    """Return how a contiguous tensor lies in memory."""
    strides = []
    size = 1
    for n in reversed(shape):
        strides.append(size)
        size *= max(n, 1)
    return tuple(reversed(strides)), False, False


class Gradient:
    """A gradient on its way through the graph.

    Attributes
    ----------
    var
        The variable that it is.
    layout
        How it lies in memory.
    tensor
        Random numbers that stand for it; None as long as nobody needs any.
    """

    __slots__ = ("layout", "tensor", "var")

    def __init__(self, var: Var, layout: Layout, tensor: torch.Tensor | None = None) -> None:
        self.var, self.layout, self.tensor = var, layout, tensor


class NodeProgram(Portable):
    """What one kind of node does to gradients: a program, and how what it gives lies in memory."""

    __slots__ = ("_layouts", "_marked")

    def __init__(self, program: Program, layouts: Sequence[Layout | None]) -> None:
        super().__init__(program)
        self._layouts = tuple(layouts)
        self._marked = any(has_marks((eq.args, eq.kwargs)) for eq in program.equations)

    @staticmethod
    def of(
        place: int,
        inputs: Sequence[Var],
        equations: Sequence[Equation],
        outputs: Sequence[tuple[Var, Layout] | None],
        known: Callable[[Constant], Origin | None] = lambda c: None,
    ) -> NodeProgram | None:
        """Take over what was just recorded of the node at `place`.

        None if it says nothing about other nodes of the kind.

        Parameters
        ----------
        place, inputs, equations
            What was recorded.
        outputs
            What the node gives, and how it lies in memory.
        known
            Gives the origin of a constant at this node, if another one saved it too.
        """
        if len(set(inputs)) != len(inputs):
            return None  # the same gradient twice: others may take different ones
        if any(isinstance(eq.op, Operation) and eq.op.of_point for eq in equations):
            return None
        moved: dict[Any, Constant] = {}
        for c in dict.fromkeys(c for eq in equations for c in eq.constants()):
            if not _belongs(c.origin, place):
                origin = known(c)
                if origin is None or not _belongs(origin, place):
                    return None
                moved[c] = Constant(c.spec, origin, c.source)
        copies = [eq.renamed(lambda x: moved.get(x, x), source="") for eq in equations]
        results = [None if o is None else o[0] for o in outputs]
        specs = [inputs[0].spec if v is None else v.spec for v in results]
        layouts = [None if o is None else o[1] for o in outputs]
        return NodeProgram(Program(inputs, copies, results, specs), layouts)

    def write(
        self,
        emitter: Emitter,
        inputs: Sequence[Var],
        read: Callable[[Saved], torch.Tensor],
        move: Callable[[Saved], Origin],
        adopt: Callable[[torch.Tensor, Origin], Constant],
        place: int = -1,
    ) -> list[Gradient | None]:
        """Write down the equations for another node of the kind; return its gradients.

        Parameters
        ----------
        emitter
            Receives the equations.
        inputs
            The gradients that it takes.
        read, move
            Give what it saved, and what tells it from the rest.
        adopt
            Makes a constant.
        place
            Where the node stands, for numbers that only scale.
        """
        computed = self.computed(read)
        moved: dict[Origin, Origin] = {}
        constants = {}
        for c in self.program.constants:
            o = c.origin
            t = read(o) if isinstance(o, Saved) else computed[o]
            constants[c] = adopt(t, _moved(o, move, moved))
        mark = len(emitter.equations)
        results = emitter.inline(self.program, inputs, constants)
        if self._marked:
            emitter.equations[mark:] = [_placed(eq, place) for eq in emitter.equations[mark:]]
        return [
            None if v is None or layout is None else Gradient(v, layout)
            for v, layout in zip(results, self._layouts, strict=True)
        ]


def _belongs(origin: Origin, place: int) -> bool:
    """Whether a constant comes from the node at `place` alone."""
    stack = [origin]
    while stack:
        o = stack.pop()
        if not o.portable or (isinstance(o, Saved) and o.node != place):
            return False
        stack.extend(o.inputs())
    return True


def _moved(origin: Origin, move: Callable[[Saved], Origin], known: dict[Origin, Origin]) -> Origin:
    """Return the origin of the same constant of another node."""
    if origin.static:
        return origin
    if origin not in known:
        if isinstance(origin, Saved):
            known[origin] = move(origin)
        else:

            def leaf(x: Any) -> Any:
                if isinstance(x, Marked):
                    return marked(x, cast("Number", move(x.origin)))
                return _moved(x, move, known) if isinstance(x, Origin) else x

            args, kwargs = map_leaves(leaf, origin.args), map_leaves(leaf, origin.kwargs)
            known[origin] = Origin(origin.op, args, kwargs)
    return known[origin]


def _placed(eq: Equation, place: int) -> Equation:
    """Return an equation with the numbers of another node of the kind."""

    def leaf(x: Any) -> Any:
        return marked(x, x.origin.moved(place)) if isinstance(x, Marked) else x

    args, kwargs = map_leaves(leaf, eq.args), map_leaves(leaf, eq.kwargs)
    return Equation(eq.op, args, kwargs, eq.outputs, eq.source)


class NodePrograms(cachetools.LRUCache[Hashable, NodeProgram]):
    """What is remembered of the nodes and operations met lately, for the whole process.

    It holds shapes, static arguments and operations; no tensors but single numbers.
    """

    def __init__(self) -> None:
        super().__init__(4096)
        self._lock = threading.Lock()

    def find(self, key: Hashable) -> NodeProgram | None:
        """Return the program of a kind of node."""
        with self._lock:
            return self.get(key)

    def keep(self, key: Hashable, program: NodeProgram) -> None:
        """Remember the program of a kind of node."""
        with self._lock:
            self[key] = program


NODE_PROGRAMS = NodePrograms()


def placeholder_like(layout: Layout, numbers: torch.Tensor) -> torch.Tensor:
    """Return `numbers`, some of them repeated, laid out in memory like a gradient."""
    strides, conjugate, negative = layout
    if strides != numbers.stride():
        shape = numbers.shape
        repeated = [n > 1 and s == 0 for n, s in zip(shape, strides, strict=True)]
        few = numbers[tuple(slice(0, 1) if again else slice(None) for again in repeated)]
        order = sorted(range(few.dim()), key=lambda i: -strides[i])
        back = [order.index(i) for i in range(few.dim())]
        numbers = few.permute(order).contiguous().permute(back).expand(shape)
    if conjugate:
        numbers = aten._conj.default(numbers)
    return aten._neg_view.default(numbers) if negative else numbers


def copied(layout: Layout, t: torch.Tensor) -> torch.Tensor:
    """Return a copy of a gradient that lies in memory like it."""
    _, conjugate, negative = layout
    numbers = t.clone(memory_format=torch.contiguous_format).resolve_conj().resolve_neg()
    numbers = numbers.conj().resolve_conj() if conjugate else numbers
    return placeholder_like(layout, -numbers if negative else numbers)
