"""What the graph of a point saved, read when it is asked for, each once."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch

from .._capture.collectives import OpaqueNode
from .._capture.graph import Graph
from .._execute.binding import Binding
from .._programs.origins import Number, Origin, Saved
from .._programs.residuals import Residual
from .._record.witness import MET
from .._reuse.template import Template
from .._torch.modes import without_inference_mode
from ..errors import StalenessError


class Reader:
    """Reads a graph.

    Parameters
    ----------
    graph
        The graph.

    Attributes
    ----------
    read
        What was read, or met in calls, by the places of its origins.
    seen
        What the graph saved, if it was looked at already.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.read: dict[Hashable, Residual] = {}
        self.seen: Mapping[Any, torch.Tensor | None] = {}
        self._computed: dict[Origin, Residual] = {}
        self._sequences: dict[tuple[int, str], Any] = {}

    def bind(self, template: Template) -> Binding | None:
        """Return the numbers with which a template runs; None if they do not allow it."""
        return template.bind(self._saved, self._number, self._custom, self._computed)

    def value(self, origin: Saved) -> Any:
        """Return a tensor, or a number, that was saved; None if it was met and not kept."""
        if isinstance(origin, Number):
            return self._number(origin)
        known = origin.place in self.read or not origin.name.startswith(MET)
        return self._saved(origin).tensor if known else None

    def _saved(self, origin: Saved) -> Residual:
        known = self.read.get(origin.place)
        if known is None:
            node = self._graph.order[origin.node]
            t = self.seen.get(origin.place)
            if t is None:
                t = self._unpacked(node, origin)
            with without_inference_mode():
                known = Residual(t, self._graph.label(node)).settle()
            self.read[origin.place] = known
        return known

    def _number(self, origin: Number) -> Any:
        return origin.read(self._graph.order[origin.node])

    def _unpacked(self, node: Any, origin: Saved) -> torch.Tensor:
        try:
            value = self._attribute(node, origin)
        except RuntimeError as error:
            raise StalenessError(
                f"{self._graph.label(node)}: a tensor that it needs was changed in place "
                f"after the linearization: {error}"
            ) from error
        t: torch.Tensor = value if origin.position is None else value[origin.position]
        return t

    def _attribute(self, node: Any, origin: Saved) -> Any:
        """Return an attribute of a node, a sequence once: to ask for it unpacks all of it."""
        if origin.position is None:
            return getattr(node, origin.name)
        key = origin.node, origin.name
        known = self._sequences.get(key)
        if known is None:
            known = self._sequences[key] = getattr(node, origin.name)
        return known

    def _custom(self, place: int) -> OpaqueNode:
        return self._graph.custom[self._graph.order[place]]
