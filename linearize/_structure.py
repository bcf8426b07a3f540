"""Floor 3: what the graphs of different points have in common.

A solver linearizes one function at many points, and the graphs mostly differ in nothing but
the numbers that they saved. The `signature` of a graph is all else that its derivative
depends on: the nodes and how they hang together, shapes and dtypes, static arguments, the
classes of custom Functions. Points with equal signatures share a `Structure`: their linear
programs as `Template`s, into which the numbers of each point are bound.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch

from ._capture import Edge, Graph
from ._execute import Binding, Executor
from ._functions import CustomNode
from ._origin import Origin, Saved, Schedule
from ._program import Equation, Operation, Program, Residual, map_leaves
from ._simplify import FOLDED, finite
from ._space import TensorSpec
from ._torch import (
    Node,
    input_metadata,
    is_generated,
    is_wrapped_number,
    saved_names,
    unpacks_by_hook,
)
from .errors import LinearizeError

#: A direction, and which arguments are not zero.
Key: TypeAlias = tuple[str, tuple[bool, ...]]

#: Nodes with state that cannot be read from Python and is not told by shapes and dtypes.
_HIDDEN_STATE = frozenset(
    {
        "AsStridedBackward0",
        "AsStridedBackward0_copy",
        "AsStridedBackward1",
        "AsStridedScatterBackward0",
        "NativeDropoutBackward0",
        "SoftmaxBackwardDataBackward0",
        "ToDenseBackward0",
    }
)
#: Nodes that know the sizes of all arguments; without an edge a size cannot be seen.
_KNOW_ALL_SIZES = frozenset({"CatBackward0", "BlockDiagBackward0"})


class HiddenError(LinearizeError):
    """Raised where the structure of a graph cannot be seen."""


# -- signatures -------------------------------------------------------------------------------


def signature(graph: Graph, specs: Sequence[Sequence[TensorSpec]]) -> tuple[Any, ...] | None:
    """Return what the derivative of a graph depends on besides numbers.

    None if that cannot be seen.
    """
    places = {node: i for i, node in enumerate(graph.order)}

    def edge(target: Node | None, nr: int) -> tuple[int, int]:
        return (-1 if target is None else places.get(target, -2), nr)

    def roots(edges: Sequence[Edge | None]) -> Iterator[Any]:
        return (None if e is None else edge(*e) for e in edges)

    if graph.hidden:
        return None
    ends = set(graph.leaves)
    try:
        nodes = tuple(
            places[node] if node in ends else _node(graph, node, edge) for node in graph.order
        )
    except (HiddenError, RuntimeError):  # recording has the words for what is wrong
        return None
    leaves = tuple(places.get(leaf) for leaf in graph.leaves)
    return nodes, tuple(roots(graph.roots)), leaves, tuple(map(tuple, specs))


def _node(graph: Graph, node: Node, edge: Callable[..., Any]) -> tuple[Any, ...]:
    edges = tuple(edge(*e) for e in node.next_functions)
    metadata: tuple[Any, ...] = tuple((m.shape, m.dtype, m.device) for m in input_metadata(node))
    line = graph.line(node)
    if line is not None:  # programs name the lines that they come from
        metadata = (*metadata, line)
    custom = graph.custom.get(node)
    if custom is not None:
        return custom.signature(), edges, metadata
    kind = type(node)
    if not is_generated(kind) or kind.__name__ in _HIDDEN_STATE:
        raise HiddenError(kind.__name__)
    if kind.__name__ in _KNOW_ALL_SIZES and any(target == -1 for target, _ in edges):
        raise HiddenError(kind.__name__)
    tensors, static = saved_names(kind)
    saved = [t for _, _, t in _saved(node, tensors)]
    return (
        kind,
        edges,
        metadata,
        tuple(getattr(node, name) for name in static),
        tuple(map(_layout, saved)),
        _sharing(saved),
    )


def _saved(
    node: Any, names: Sequence[str]
) -> Iterator[tuple[str, int | None, torch.Tensor | None]]:
    """Yield attribute, position and tensor of what a built-in node saved."""
    for name in names:
        if unpacks_by_hook(node, name):
            raise HiddenError(name)
        value = getattr(node, name)
        if isinstance(value, (tuple, list)):
            yield from ((name, i, t) for i, t in enumerate(value))
        else:
            yield name, None, value


def _layout(t: torch.Tensor | None) -> Any:
    if t is None or t.layout != torch.strided:
        return None if t is None else (t.layout, t.shape, t.dtype)
    # A Python number in f is saved as a tensor; recorded code has it as a number again.
    number = t.item() if t.dim() == 0 and is_wrapped_number(t) else None
    return t.shape, t.stride(), t.dtype, t.device, t.is_conj(), t.is_neg(), number


def _sharing(saved: Sequence[torch.Tensor | None]) -> Any:
    """Return which of the tensors lie in the same memory: they may differ elsewhere."""
    if len(saved) < 2:
        return None
    first: dict[int, int] = {}
    return tuple(
        -1 if t is None or t.layout != torch.strided else first.setdefault(t.data_ptr(), i)
        for i, t in enumerate(saved)
    )


def saved_by(node: Node, place: int) -> list[tuple[torch.Tensor, Origin]]:
    """Return what a built-in node saved, with the names by which it is found again."""
    if not is_generated(type(node)):
        return []
    tensors, _ = saved_names(type(node))
    try:
        return [
            (t, Saved(place, name, i)) for name, i, t in _saved(node, tensors) if t is not None
        ]
    except (HiddenError, RuntimeError):
        return []


# -- templates --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """Stands for a custom Function's node in a template."""

    index: int
    name: str
    has_jvp: bool
    has_backward: bool


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
    """

    __slots__ = ("_ops", "_schedules", "_wanted", "executor", "program", "simplified")

    def __init__(self, program: Program, places: dict[int, int], *, simplified: bool) -> None:
        blank: dict[Residual, Residual] = {}

        def without_numbers(x: Any) -> Any:
            if not isinstance(x, Residual):
                return x
            if x not in blank:
                blank[x] = x.blank()
            return blank[x]

        def place(node: CustomNode) -> Any:
            return _Place(places[id(node)], node.name, node.has_jvp, node.has_backward)

        self.program = _mapped(program, without_numbers, place)
        self.executor = Executor(self.program)
        self.simplified = simplified
        self._wanted = [(r, r.origin) for r in self.program.residuals() if r.origin is not None]
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
        used = {o: read(o) for o in schedule.saved}
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


class Structure:
    """What is known of all points with one signature."""

    def __init__(self, of: tuple[Any, ...]) -> None:
        self.signature = of
        self._lock = threading.Lock()
        self._templates: dict[Key, list[Template]] = {}

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
    """

    #: How many are kept; each is a few kilobytes per operation.
    limit = 16

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: list[Structure] = []
        self.recorded = 0
        self.reused = 0

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

    def clear(self) -> None:
        """Forget all structures."""
        with self._lock:
            self._known = []
