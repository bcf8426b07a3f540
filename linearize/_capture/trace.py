"""Which line of f made which node of the autograd graph.

At each call of PyTorch's Python interface `Trace` writes the line of f into the metadata of the
nodes that the call made; they go with the graph. PyTorch numbers the nodes of a thread in the
order in which they are made, which tells new nodes from old ones. Nodes made out of sight, by
other threads for instance, have no line: better none than a wrong one.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .._spaces.nested import leaves
from .._text.labels import Line, Locator, at_line
from .._torch.graphs import (
    Node,
    beneath,
    children,
    history,
    is_custom,
    let_die_in_turn,
    next_node_number,
    node_number,
)
from .._torch.modes import functorch_active
from .._torch.names import RUNS_BACKWARD
from .contexts import ContextRecords

#: Where a node's metadata have its line.
_KEY = "linearize.line"


class Trace(TorchFunctionMode):
    """Notes the line of f at each operation while f runs, called by the code `stop`.

    Lines of custom Functions, whose calls this mode does not see, stand in the records.
    """

    def __init__(self, stop: CodeType, records: ContextRecords) -> None:
        super().__init__()
        self.locate = Locator(stop)
        self._records = records
        #: Numbers given and lines of calls inside transforms, whose nodes cannot be reached.
        self._hidden: list[tuple[range, Line]] = []
        #: How many nodes were seen.
        self._count = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        old = set(beneath(history(_tensors((args, kwargs))))) if func in RUNS_BACKWARD else None
        first = next_node_number()
        result = func(*args, **(kwargs or {}))
        after = next_node_number()
        if after > first or old is not None:
            line = self.locate()
            if line is not None:
                self._note(line, result, (args, kwargs), range(first, after), old)
        return result

    def _note(
        self, line: Line, result: Any, given: Any, numbers: range, old: set[Node] | None
    ) -> None:
        """Write a line into the nodes that a call made, those with `numbers` of this thread.

        What the call was given it may have changed. In a backward pass, which other threads may
        do, all nodes are new that are not among `old`.
        """
        nodes = history(_tensors(result) or _tensors(given))
        made = []
        while nodes:
            node = nodes.pop()
            new = node_number(node) in numbers if old is None else node not in old
            metadata: Any = node.metadata
            if not new or _KEY in metadata:
                continue
            metadata[_KEY] = line
            made.append(node)
            if len(made) < len(numbers) or old is not None:
                nodes += children(node)
        let_die_in_turn(made, self._count)
        self._count += len(made)
        if len(made) < len(numbers) and functorch_active():
            self._hidden.append((numbers, line))

    def line(self, node: Node) -> Line | None:
        """Return the line that made a node, None if it was not seen."""
        if is_custom(node):
            return self._records.get(node).line
        metadata: Any = node.metadata
        line: Line | None = metadata.get(_KEY)
        if line is None and self._hidden:
            number = node_number(node)
            i = bisect.bisect_right(self._hidden, number, key=lambda known: known[0].start) - 1
            if i >= 0 and number in self._hidden[i][0]:
                line = self._hidden[i][1]
        return line

    def label(self, node: Node) -> str:
        """Return a node's name, with its line if that is known."""
        return at_line(node.name(), self.line(node))


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in leaves((tree,)) if isinstance(x, torch.Tensor)]
