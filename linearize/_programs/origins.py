"""How constants of a linear program come about.

An `Origin` is an expression: it says how a tensor was computed from what the autograd graph
saved. With it the same tensor can be computed at another point whose graph has the same
structure, without recording anew.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch

from .._execute.quickest import quickest
from .._execute.writer import Writer
from .._torch.names import aten, functions_as_they_are, functions_overridden


class Origin:
    """The result of an operation on other origins and static arguments.

    Attributes
    ----------
    op
        The operation.
    args, kwargs
        Its arguments; origins may stand in lists and tuples.
    static
        Whether nothing of a run goes into it, so that it is the same at every point.
    """

    __slots__ = ("args", "kwargs", "op", "static")

    def __init__(
        self,
        op: Callable[..., Any] | None,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.op = op
        self.args = args
        self.kwargs = dict(kwargs or {})
        self.static: bool = all(map(operator.attrgetter("static"), self.inputs()))

    def inputs(self) -> list[Origin]:
        """Return the origins among the arguments."""
        found: list[Origin] = []
        _gather((self.args, self.kwargs), found)
        return found


class Costly:
    """Marks an operation that costs as much as several products."""

    __slots__ = ()


class Saved(Origin):
    """A tensor that a graph node saved.

    Attributes
    ----------
    node
        The node's place in the graph's order.
    name
        The attribute of the node.
    position
        The place in the attribute, if that is a list; else None.
    """

    __slots__ = ("name", "node", "position")

    def __init__(self, node: int, name: str, position: int | None = None) -> None:
        super().__init__(None)
        self.node, self.name, self.position = node, name, position
        self.static = False

    @property
    def place(self) -> Hashable:
        """What tells it from others of the same graph."""
        return self.node, self.name, self.position


class Literal(Origin):
    """A tensor that is part of the structure."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__(None)
        self.tensor = tensor


def results(origin: Origin, count: int) -> list[Origin]:
    """Return the origins of the single results of an operation that returns several."""
    return [Origin(operator.getitem, (origin, i)) for i in range(count)]


def filled(shape: Sequence[int], value: Any, like: torch.Tensor) -> Origin:
    """Return the origin of a tensor filled with one number."""
    kwargs = {"dtype": like.dtype, "device": like.device}
    return Origin(aten.full.default, (list(shape), value), kwargs)


def _gather(tree: Any, found: list[Origin]) -> None:
    for x in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(x, Origin):
            found.append(x)
        elif isinstance(x, (list, tuple, dict)):
            _gather(x, found)


class Schedule:
    """Computes tensors from their origins, each intermediate once and no longer than needed.

    Attributes
    ----------
    saved
        What is read of the graph, in the order in which it is asked for.
    """

    __slots__ = ("_calls", "_gone", "_order", "_run", "_wanted", "saved")

    def __init__(self, wanted: Sequence[Origin]) -> None:
        self._wanted = tuple(wanted)
        self._order = ordered(wanted)
        self.saved = [o for o in self._order if isinstance(o, Saved)]
        last = {x: o for o in self._order for x in o.inputs()}
        kept = set(self._wanted)
        #: What each leaves behind that is needed no more.
        self._gone: dict[Origin, list[Origin]] = {}
        for x, o in last.items():
            if x not in kept:
                self._gone.setdefault(o, []).append(x)
        self._calls = 0
        self._run: Callable[[Sequence[torch.Tensor]], list[torch.Tensor]] = self._interpret

    def __call__(self, read: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Compute the wanted tensors, given what is saved."""
        self._calls += 1
        if self._calls == _WRITE_OUT_AT:
            self._run = self._written_out()
            try:
                return self._run(read)
            except TypeError:  # the quickest way to call takes fewer kinds of arguments
                self._run = self._interpret
        if functions_overridden():
            with functions_as_they_are():
                return self._run(read)
        return self._run(read)

    def _interpret(self, read: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        values: dict[Origin, Any] = dict(zip(self.saved, read, strict=True))
        for o in self._order:
            if isinstance(o, Literal):
                values[o] = o.tensor
            elif o.op is not None:
                args = [_replaced(a, values) for a in o.args]
                kwargs = {k: _replaced(a, values) for k, a in o.kwargs.items()}
                values[o] = o.op(*args, **kwargs)
            for x in self._gone.get(o, ()):
                del values[x]
        return [values[o] for o in self._wanted]

    def _written_out(self) -> Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]:
        """Return straight-line Python that does the same."""
        w = Writer((Origin,))
        w.names = names = {o: f"t{i}" for i, o in enumerate(self._order)}
        lines = ["def run(saved):"]
        if self.saved:
            lines.append(f" {', '.join(names[o] for o in self.saved)}, = saved")
        for o in self._order:
            if isinstance(o, Literal):
                lines.append(f" {names[o]} = {w.constant(o.tensor)}")
            elif o.op is not None:
                lines.append(
                    f" {names[o]} = {w.call(w.constant(quickest(o.op)), o.args, o.kwargs)}"
                )
            if o in self._gone:
                lines.append(f" del {', '.join(names[x] for x in self._gone[o])}")
        lines.append(f" return [{', '.join(names[o] for o in self._wanted)}]")
        return w.function(lines, "origins")


#: At which call a schedule is written out: most are followed once or not at all.
_WRITE_OUT_AT = 3


def _replaced(tree: Any, values: Mapping[Origin, Any]) -> Any:
    if isinstance(tree, Origin):
        return values[tree]
    if isinstance(tree, (list, tuple)):
        return type(tree)(_replaced(x, values) for x in tree)
    return tree


def ordered(wanted: Sequence[Origin]) -> list[Origin]:
    """Return what has to be computed, each after what it needs. Iterative: chains are long."""
    order: dict[Origin, None] = {}
    entered: set[Origin] = set()
    stack = list(reversed(wanted))
    while stack:
        o = stack[-1]
        if o in order:
            stack.pop()
        elif o in entered:
            order[stack.pop()] = None
        else:
            entered.add(o)
            stack.extend(x for x in o.inputs() if x not in order)
    return list(order)
