"""Marking the numbers of a graph node that only scale, where they appear in what it computes."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

from .._programs.aten import schema_of
from .._programs.origins import Number
from .._programs.scales import marked
from .._spaces.compare import exact
from .._spaces.nested import map_leaves
from .._torch.names import OpOverload

#: What takes a whole number to scale with; elsewhere it may be a dimension or a size.
_SCALE = frozenset(("mul", "div", "fill_", "leaky_relu_backward", "_conj"))


class Scales:
    """Numbers of one node, told by their bits.

    A number of the node's code that is none of them could be computed of one: then nothing is
    known of any.
    """

    __slots__ = ("_marks", "_numbers")

    def __init__(self, numbers: Iterable[tuple[Number, Any]] = ()) -> None:
        self._numbers: list[Number] = []
        self._marks: dict[Hashable, Any] = {}
        for number, value in numbers:
            self._numbers.append(number)
            if exact(value) in self._marks:  # which of the two is meant cannot be told
                self.spoil()
            self._marks[exact(value)] = marked(value, number)

    def __bool__(self) -> bool:
        return bool(self._marks)

    def spoil(self) -> None:
        """Note that a number of the node was met in disguise."""
        for number in self._numbers:
            number.clean = False

    def marked(self, func: OpOverload, tree: Any) -> Any:
        """Return arguments of an operation with marks on the numbers."""
        whole = schema_of(func).name in _SCALE

        def leaf(x: Any) -> Any:
            if type(x) not in (float, complex) and not (whole and type(x) is int):
                return x
            known = self._marks.get(exact(x))
            if known is None:
                self.spoil()
            return x if known is None else known

        return map_leaves(leaf, tree)
