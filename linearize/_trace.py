"""Floor 2: which line of f made which node of the autograd graph.

PyTorch numbers the nodes of a thread in the order in which they are made. `Trace` notes the
line of f and the numbers given meanwhile at each call of PyTorch's Python interface.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ._contexts import ContextRecords
from ._lines import Line, Locator, Site
from ._torch import Node, is_custom, next_node_number, node_number, pytree

_RUNS_BACKWARD = (torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward)


class Trace(TorchFunctionMode):
    """Notes the line of f at each operation while f runs.

    Parameters
    ----------
    stop
        The code of the function that calls f.
    records
        Where the lines of custom Functions are noted, which this mode does not see.
    """

    def __init__(self, stop: CodeType, records: ContextRecords) -> None:
        super().__init__()
        self.locate = Locator(stop)
        self._records = records
        self._first: list[int] = []
        self._after: list[int] = []
        self._lines: list[Line | None] = []
        #: Whether nodes were made in other threads, whose numbers overlap with this one's.
        self._unsure = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        first = next_node_number()
        result = func(*args, **(kwargs or {}))
        after = next_node_number()
        if after > first:
            self._first.append(first)
            self._after.append(after)
            self._lines.append(self.locate())
        if func in _RUNS_BACKWARD and _elsewhere((args, kwargs)):
            self._unsure = True
        return result

    def line(self, node: Node) -> Line | None:
        """Return the line that made a node, None if it was not seen."""
        if is_custom(node):
            return self._records.get(node).line
        if self._unsure:
            return None
        number = node_number(node)
        i = bisect.bisect_right(self._first, number) - 1
        return self._lines[i] if i >= 0 and number < self._after[i] else None

    def label(self, node: Node) -> str:
        """Return a node's name, with its line if that is known."""
        line = self.line(node)
        return node.name() if line is None else Site(f"{node.name()} ({line})", [line])


def _elsewhere(arguments: Any) -> bool:
    """Whether a backward pass runs in threads of the engine: on all devices but the CPU."""
    leaves = pytree.tree_leaves(arguments)
    return any(isinstance(t, torch.Tensor) and t.device.type != "cpu" for t in leaves)
