"""The first pullbacks of a point, by PyTorch's engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .._capture.graph import Graph
from .._execute.thresholds import BY_ENGINE
from .._torch.graphs import pulled_back, some_custom
from .._torch.hooks import Unhooked
from .._torch.modes import casts, undisturbed


class ByEngine:
    """Applies the pullback of a graph by PyTorch's engine, to the first few cotangents.

    It does so where it does what a program would do: there are no custom Functions, whose methods
    are called under guards, no compiled pieces, no hooks, which it would run, and no modes that
    change operations.
    """

    __slots__ = ("_count", "_graph", "_leaves", "_plain", "_unhooked")

    def __init__(self, graph: Graph, leaves: Sequence[torch.Tensor], unhooked: Unhooked) -> None:
        self._graph, self._leaves, self._unhooked = graph, leaves, unhooked
        self._plain = not (graph.hidden or graph.layouts or some_custom(graph.kinds))
        self._count = 0

    @property
    def spent(self) -> bool:
        """Whether it applied the pullback as often as it will."""
        return self._count >= BY_ENGINE

    @property
    def unhooked(self) -> bool:
        """Whether no hooks were registered."""
        return self._unhooked.still

    def __call__(
        self, cotangents: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None] | None:
        """Return Jᵀ·u; None if a program has to compute it."""
        ready = self._plain and not self.spent and self._unhooked.still
        if not ready or not undisturbed() or casts():
            return None
        pairs = zip(self._graph.roots, cotangents, strict=True)
        given = [(e, u) for e, u in pairs if e is not None and u is not None]
        if not given or any(type(u) is not torch.Tensor for _, u in given):
            return None
        self._count += 1
        try:
            return pulled_back([e for e, _ in given], [u for _, u in given], self._leaves)
        except RuntimeError:  # what is wrong is told where the program is made
            return None
