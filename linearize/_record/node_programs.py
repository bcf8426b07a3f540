"""The pullbacks of single graph nodes, remembered.

Graphs repeat themselves: a time step after another, layer after layer. What a built-in node's
derivative does depends on nothing but its `node_key`, the layout of the gradients that it
takes, and numbers that it saved. So it is recorded once, and written down again from memory
for all other nodes of the kind, in this graph and in others, without computing anything.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import cachetools
import torch

from .._execute.schedule import Schedule
from .._programs.origins import Literal, Origin, Saved
from .._programs.program import Emitter, Equation, Operation, Var
from .._programs.residuals import Residual
from .._spaces.nested import map_leaves
from .._spaces.space import TensorSpec
from .._torch.names import aten
from .constants import Constants

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


class NodeProgram:
    """What one kind of node does to gradients, without numbers."""

    __slots__ = ("_equations", "_inputs", "_outputs", "_residuals", "_schedule")

    def __init__(
        self,
        inputs: Sequence[Var],
        equations: Sequence[Equation],
        outputs: Sequence[tuple[Var, Layout] | None],
        residuals: Sequence[tuple[Residual, Origin]],
    ) -> None:
        self._inputs = tuple(inputs)
        self._equations = tuple(equations)
        self._outputs = tuple(outputs)
        self._residuals = tuple(residuals)
        self._schedule = Schedule([o for _, o in residuals if not isinstance(o, Saved)])

    @staticmethod
    def of(
        place: int,
        inputs: Sequence[Var],
        equations: Sequence[Equation],
        outputs: Sequence[tuple[Var, Layout] | None],
        constants: Constants | None = None,
    ) -> NodeProgram | None:
        """Take over what was just recorded of the node at `place`.

        None if it says nothing about other nodes of the kind.
        """
        if len(set(inputs)) != len(inputs):
            return None  # the same gradient twice: others may take different ones
        blanks: dict[Residual, Residual] = {}
        origins: list[tuple[Residual, Origin]] = []
        for eq in equations:
            if isinstance(eq.op, Operation) and eq.op.of_point:
                return None
            for r in eq.residuals():
                if r in blanks:
                    continue
                origin = r.origin
                if constants is not None and (origin is None or not _belongs(origin, place)):
                    origin = constants.origin(r.tensor)  # of another node, which saved it too
                if origin is None or not _belongs(origin, place):
                    return None
                blanks[r] = r.blank()
                origins.append((blanks[r], origin))

        copies = [eq.renamed(lambda x: blanks.get(x, x), source="") for eq in equations]
        return NodeProgram(inputs, copies, outputs, origins)

    def write(
        self,
        emitter: Emitter,
        inputs: Sequence[Var],
        read: Callable[[Saved], torch.Tensor],
        move: Callable[[Saved], Origin | None],
        adopt: Callable[[torch.Tensor, Origin | None], Residual],
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
            Makes a residual.
        """
        names: dict[Any, Any] = dict(zip(self._inputs, inputs, strict=True))
        if self._residuals:
            computed = iter(self._schedule([read(o) for o in self._schedule.saved]))
            moved: dict[Origin, Origin | None] = {}
            for blank, origin in self._residuals:
                t = read(origin) if isinstance(origin, Saved) else next(computed)
                names[blank] = adopt(t, _moved(origin, move, moved))

        for eq in self._equations:
            outs = tuple([None if v is None else Var(v.spec) for v in eq.outputs])
            emitter.equations.append(
                eq.renamed(names.__getitem__, outputs=outs, source=emitter.source)
            )
            names.update(zip(eq.outputs, outs, strict=True))
        return [None if o is None else Gradient(names[o[0]], o[1]) for o in self._outputs]


def _belongs(origin: Origin, place: int) -> bool:
    """Whether a constant comes from the node at `place` alone."""
    stack = [origin]
    while stack:
        o = stack.pop()
        if isinstance(o, Saved):
            if o.node != place:
                return False
        else:
            stack.extend(o.inputs())
    return True


def _moved(
    origin: Origin,
    move: Callable[[Saved], Origin | None],
    known: dict[Origin, Origin | None],
) -> Origin | None:
    """Return the origin of the same constant of another node, None if that is not known."""
    if isinstance(origin, Literal):
        return origin
    if origin not in known:
        if isinstance(origin, Saved):
            known[origin] = move(origin)
        elif all(_moved(o, move, known) is not None for o in origin.inputs()):

            def leaf(x: Any) -> Any:
                return known.get(x, x) if isinstance(x, Origin) else x

            args, kwargs = map_leaves(leaf, origin.args), map_leaves(leaf, origin.kwargs)
            known[origin] = Origin(origin.op, args, kwargs)
        else:
            known[origin] = None
    return known[origin]


class NodePrograms:
    """What is remembered of the nodes and operations met lately, for the whole process.

    It holds shapes, static arguments and operations; no tensors but single numbers.
    """

    def __init__(self, most: int = 4096) -> None:
        self._lock = threading.Lock()
        self._known: cachetools.LRUCache[Hashable, NodeProgram | None]
        self._known = cachetools.LRUCache(most)

    def find(self, key: Hashable) -> NodeProgram | None:
        """Return the program of a kind of node."""
        with self._lock:
            return self._known.get(key)

    def keep(self, key: Hashable, program: NodeProgram) -> None:
        """Remember the program of a kind of node."""
        with self._lock:
            self._known[key] = program

    def __len__(self) -> int:
        return len(self._known)

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._known.clear()


NODE_PROGRAMS = NodePrograms()


def placeholder_like(layout: Layout, spec: TensorSpec, numbers: torch.Tensor) -> torch.Tensor:
    """Return `numbers`, some of them repeated, laid out in memory like a gradient."""
    strides, conjugate, negative = layout
    if strides != numbers.stride():
        repeated = [n > 1 and s == 0 for n, s in zip(spec.shape, strides, strict=True)]
        few = numbers[tuple(slice(0, 1) if again else slice(None) for again in repeated)]
        order = sorted(range(few.dim()), key=lambda i: -strides[i])
        back = [order.index(i) for i in range(few.dim())]
        numbers = few.permute(order).contiguous().permute(back).expand(spec.shape)
    if conjugate:
        numbers = aten._conj.default(numbers)
    return aten._neg_view.default(numbers) if negative else numbers
