"""How constants of a linear program come about.

An `Origin` is an expression: it says how a tensor was computed from what the autograd graph
saved. With it the same tensor can be computed at another point whose graph has the same
structure, without recording anew.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from .._spaces.nested import leaves
from .._spaces.space import TensorSpec
from .._torch.names import aten

T = TypeVar("T")


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
    portable
        Whether it can be computed at another point.
    """

    __slots__ = ("args", "kwargs", "op", "portable", "static")

    def __init__(
        self,
        op: Callable[..., Any] | None,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.op = op
        self.args = args
        self.kwargs = dict(kwargs or {})
        inputs = self.inputs()
        self.static: bool = all(o.static for o in inputs) and not has_marks((args, self.kwargs))
        self.portable: bool = all(o.portable for o in inputs)

    def inputs(self) -> list[Origin]:
        """Return the origins among the arguments."""
        return [x for x in leaves((self.args, self.kwargs)) if isinstance(x, Origin)]


class Here(Origin):
    """A tensor of one point of which nothing more is known."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(None)
        self.static = self.portable = False


class Costly:
    """An operation that costs as much as several products.

    Attributes
    ----------
    cost
        Its price, see `price`.
    """

    __slots__ = ("cost",)
    cost: float


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
    ready
        Whether f found it ready, as far as is known: nothing was differentiated on the way to it.
    """

    __slots__ = ("name", "node", "position", "ready")

    def __init__(
        self, node: int, name: str, position: int | None = None, *, ready: bool = False
    ) -> None:
        super().__init__(None)
        self.node, self.name, self.position, self.ready = node, name, position, ready
        self.static = False

    @property
    def place(self) -> Hashable:
        """What tells it from others of the same graph."""
        return self.node, self.name, self.position

    def moved(self, node: int) -> Saved:
        """Return what another node saved in its stead."""
        return Saved(node, self.name, self.position, ready=self.ready)


class Number(Saved):
    """A Python number that a graph node saved.

    Attributes
    ----------
    rest
        Whether it is what is missing to one.
    clean
        Whether all that its node computed of it is known; set to False where it is not.
    """

    __slots__ = ("clean", "rest")

    def __init__(self, node: int, name: str, *, rest: bool = False, clean: bool = True) -> None:
        super().__init__(node, name)
        self.rest, self.clean = rest, clean

    def moved(self, node: int) -> Number:
        """Return the same number of another node."""
        return Number(node, self.name, rest=self.rest, clean=self.clean)

    def read(self, node: Any) -> Any:
        """Return the number, given the node."""
        value = getattr(node, self.name)
        value = value.item() if isinstance(value, torch.Tensor) else value
        return 1 - value if self.rest else value


class Marked:
    """A number that knows where it comes from, and is used as any other."""

    __slots__ = ()
    origin: Number


def has_marks(tree: Any) -> bool:
    """Whether there are marked numbers among nested arguments."""
    return any(isinstance(x, Marked) for x in leaves(tree))


class Literal(Origin):
    """A tensor that is part of the structure."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__(None)
        self.tensor = tensor


class Zeros(Literal):
    """Zeros of a shape, expanded from one zero: they take no memory."""

    __slots__ = ()

    def __init__(self, spec: TensorSpec) -> None:
        zero = torch.zeros((), dtype=spec.dtype, device=spec.device)
        super().__init__(zero.expand(spec.shape))


def roots(origins: Iterable[Origin], most: int) -> frozenset[Origin] | None:
    """Return what of a run origins begin with; None if that is more than `most`."""
    stack, seen, found = list(origins), set[Origin](), set[Origin]()
    while stack:
        o = stack.pop()
        if o in seen or o.static:
            continue
        seen.add(o)
        stack += o.inputs()
        if o.op is None:
            found.add(o)
        if len(found) > most or len(seen) > _MOST_SEEN:
            return None
    return frozenset(found)


#: How many origins `roots` looks at.
_MOST_SEEN = 4096


def results(origin: Origin, count: int) -> list[Origin]:
    """Return the origins of the single results of an operation that returns several."""
    return [Origin(operator.getitem, (origin, i)) for i in range(count)]


def filled(shape: Sequence[int], value: Any, like: torch.Tensor) -> Origin:
    """Return the origin of a tensor filled with one number."""
    kwargs = {"dtype": like.dtype, "device": like.device}
    return Origin(aten.full.default, (list(shape), value), kwargs)


def ordered(wanted: Sequence[Origin]) -> list[Origin]:
    """Return what has to be computed, each after what it needs."""
    return postorder(wanted, Origin.inputs)


def postorder(first: Sequence[T], needs: Callable[[T], Iterable[T]]) -> list[T]:
    """Return things and all that they need, each after that. Iterative: chains are long."""
    order: dict[T, None] = {}
    entered: set[T] = set()
    stack = list(reversed(first))
    while stack:
        x = stack[-1]
        if x in order:
            stack.pop()
        elif x in entered:
            order[stack.pop()] = None
        else:
            entered.add(x)
            stack.extend(y for y in needs(x) if y not in order)
    return list(order)
