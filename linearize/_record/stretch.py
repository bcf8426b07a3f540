"""Parts of a graph that cannot be written down: PyTorch's own nodes serve them.

A node that leaves PyTorch's operations is one such part. Where a gradient is no dense tensor,
because f made a sparse one of its primals, the nodes on both sides belong to one part, so that
what enters and leaves it is dense.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.autograd.graph import GradientEdge

from .._capture.contexts import fitted
from .._capture.custom import CustomNode
from .._capture.graph import Edge, Graph
from .._programs.program import Operation
from .._spaces.balance import Tensors
from .._spaces.space import TensorSpec
from .._torch.graphs import Node, input_metadata, outside_backward, saved_tensors
from ..errors import UnsupportedError
from .calls import unpacked
from .node_formulas import differentiable, mended


class Stretch:
    """Nodes of a graph whose gradients are computed by calling them, one after the other.

    Called with a gradient for each entry it returns one for each exit, in the grad mode of the
    caller, so that PyTorch can differentiate it.

    Parameters
    ----------
    graph
        The graph.
    nodes
        The nodes, each before all that it leads to; no way leads out and in again.
    entries
        The edges by which gradients come in from outside.
    engine
        Whether PyTorch's engine does it all, from the roots of the graph to its leaves.

    Attributes
    ----------
    exits
        The edges by which gradients go out.
    label
        What it is called.
    """

    def __init__(
        self,
        graph: Graph,
        nodes: Sequence[Node],
        entries: Sequence[Edge],
        *,
        engine: bool = False,
    ) -> None:
        self._engine = engine
        self._leaves = set(graph.leaves)
        self._places = graph.places
        self.nodes, self.entries = tuple(nodes), tuple(entries)
        found = ((n, graph.custom.get(n)) for n in nodes)
        self._custom = {n: c for n, c in found if isinstance(c, CustomNode)}
        #: Custom Functions that know what stands for outputs without a gradient.
        self._ready: set[Node] = set()
        within = set(nodes)
        leaving = (e for n in nodes for e in n.next_functions)
        self.exits = _distinct(e for e in leaving if e[0] in graph.places and e[0] not in within)
        first, more = graph.label(nodes[0]), len(nodes) - 1
        self.label = f"{first} and {more} more node{'s' * (more > 1)}" if more else first

    def __call__(self, *grads: torch.Tensor | None) -> Tensors:
        """Return the gradients at the exits; those of other nodes may be sparse."""
        make = torch.is_grad_enabled()

        def call() -> Tensors:
            with torch.inference_mode(False), torch.set_grad_enabled(make):
                return self._by_engine(grads) if self._engine else self._by_hand(grads)

        return outside_backward(call)

    def takes(self) -> list[TensorSpec]:
        """Return the specifications of the gradients that come in."""
        return [TensorSpec.received(input_metadata(n)[i]) for n, i in self.entries]

    def gives(self) -> list[TensorSpec]:
        """Return those of the gradients that go out."""
        return [TensorSpec.received(input_metadata(n)[i]) for n, i in self.exits]

    def kept(self) -> Iterator[torch.Tensor]:
        """Yield the tensors that the nodes keep."""
        for node in self.nodes:
            custom = self._custom.get(node)
            yield from saved_tensors(node) if custom is None else custom.kept()

    def _by_engine(self, grads: Tensors) -> Tensors:
        given = [(GradientEdge(*e), g) for e, g in zip(self.entries, grads, strict=True)]
        some = [(e, g) for e, g in given if g is not None]
        found = torch.autograd.grad(
            [e for e, _ in some],
            [GradientEdge(*e) for e in self.exits],
            [g for _, g in some],
            retain_graph=True,
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
        return self._fitted(found)

    def _by_hand(self, grads: Tensors) -> Tensors:
        given = zip(self.entries, grads, strict=True)
        left = handed_on(self.nodes, given, self._called, self._places)
        return self._fitted([left.get(e) for e in self.exits])

    def _called(self, node: Node, grads: Tensors) -> Tensors:
        custom = self._custom.get(node)
        if custom is None:
            call = differentiable(node) if torch.is_grad_enabled() else mended(node)
            return call(grads)
        if node not in self._ready:
            custom.know_outputs([i for i, g in enumerate(grads) if g is not None])
            custom.unpack()
            self._ready.add(node)
        return by_edges(node, custom.backward(grads))

    def _fitted(self, grads: Tensors) -> Tensors:
        found: list[torch.Tensor | None] = []
        for (node, _), g, spec in zip(self.exits, grads, self.gives(), strict=True):
            if g is not None and node in self._leaves and g.layout != torch.strided:
                g = g.to_dense()
            found.append(g if g is None or g.layout != torch.strided else fitted(g, spec))
        return found


class Cut:
    """A graph with one part that is not taken apart.

    Parameters
    ----------
    graph
        The graph.
    nodes
        What belongs together. What lies between is added, so that no way leads out and in again.
    reason
        Why it is not taken apart.
    engine
        Whether PyTorch's engine does all of it.

    Attributes
    ----------
    stretch
        The part.
    before, after
        The other nodes, in the order in which they are to be visited.
    """

    def __init__(
        self, graph: Graph, nodes: Collection[Node], reason: str, *, engine: bool = False
    ) -> None:
        below = _below(graph, nodes)
        within = (below & _above(graph, nodes)) - set(graph.leaves)
        self.reason = reason
        self.before = [n for n in graph.order if n not in below]
        self.after = [n for n in graph.order if n in below and n not in within]
        arriving = [*graph.roots, *(e for n in self.before for e in n.next_functions)]
        entries = _distinct(e for e in arriving if e is not None and e[0] in within)
        inside = [n for n in graph.order if n in within]
        self.stretch = Stretch(graph, inside, entries, engine=engine)


def alone(graph: Graph, node: Node) -> Stretch:
    """Return one node as a part of its own."""
    return Stretch(graph, [node], [(node, i) for i in range(len(input_metadata(node)))])


def _distinct(edges: Iterable[Any]) -> list[Edge]:
    return list(dict.fromkeys((node, nr) for node, nr in edges))


def _below(graph: Graph, nodes: Collection[Node]) -> set[Node]:
    """Return nodes with all that they lead to."""
    found = set(nodes)
    for n in graph.order:
        if n in found:
            found.update(t for t, _ in n.next_functions if t in graph.places)
    return found


def _above(graph: Graph, nodes: Collection[Node]) -> set[Node]:
    """Return nodes with all that leads to them."""
    found = set(nodes)
    for n in reversed(graph.order):
        if any(t in found for t, _ in n.next_functions):
            found.add(n)
    return found


def handed_on(
    nodes: Iterable[Node],
    given: Iterable[tuple[Edge, torch.Tensor | None]],
    call: Callable[[Node, list[torch.Tensor | None]], Tensors],
    places: Container[Node],
) -> dict[Edge, torch.Tensor]:
    """Call nodes, one after the other, and hand on what they give as PyTorch's engine does.

    Parameters
    ----------
    nodes
        Each before all that it leads to.
    given
        The gradients that they begin with.
    call
        Returns one gradient for each edge of a node.
    places
        The nodes that receive gradients.

    Returns
    -------
    dict
        What arrived at other nodes.
    """
    pending: dict[Edge, torch.Tensor] = {}

    def deliver(edge: Edge, g: torch.Tensor) -> None:
        if g.layout == torch.strided:
            g = fitted(g, TensorSpec.received(input_metadata(edge[0])[edge[1]]))
        known = pending.get(edge)
        if known is not None:  # a sparse tensor can be added to a dense one only
            g = known + g if known.layout == torch.strided else g + known
        pending[edge] = g

    for edge, g in given:
        if g is not None:
            deliver(edge, g)
    for node in nodes:
        received = [pending.pop((node, i), None) for i in range(len(input_metadata(node)))]
        if all(g is None for g in received):
            continue
        for (target, nr), g in zip(node.next_functions, call(node, received), strict=False):
            if g is not None and target is not None and target in places:
                deliver((target, nr), g)
    return pending


def by_edges(node: Node, results: Iterable[torch.Tensor | None]) -> Tensors:
    """Return the gradients of a custom Function's inputs, with None for other arguments."""
    rest = iter(results)
    return [None if target is None else next(rest) for target, _ in node.next_functions]


class NodeBackward(Operation):
    """The pullback of a part of the graph that is not written down."""

    __slots__ = ("inputs", "label", "node", "outputs", "reason")

    def __init__(self, stretch: Stretch, reason: str) -> None:
        self.node = stretch
        self.label = stretch.label
        #: Why it could not be written down in PyTorch operations.
        self.reason = reason
        #: Specs of the gradients that it returns, and of those that it takes.
        self.inputs, self.outputs = tuple(stretch.gives()), tuple(stretch.takes())

    @property
    def name(self) -> str:  # type: ignore[override]
        """Printable name."""
        return self.label

    @property
    def note(self) -> str:  # type: ignore[override]
        """Why PyTorch does it."""
        return f"PyTorch's own backward ({self.reason})"

    def __call__(self, *grads: torch.Tensor | None) -> Any:
        """Call the nodes."""
        with torch.no_grad():
            copies = [None if g is None else g.clone() for g in grads]
            return unpacked(self.label, lambda: self.node(*copies), UnsupportedError)

    def bytes_kept(self) -> Iterable[torch.Tensor]:
        """Return the tensors that the nodes keep."""
        return self.node.kept()
