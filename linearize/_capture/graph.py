"""The autograd graph between a function's primals and its value."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch

from .._spaces.sharding import Layout
from .._text.labels import Line
from .._torch.aot import reading_of
from .._torch.graphs import (
    NORMS,
    AccumulateGrad,
    Node,
    accumulators,
    beneath,
    children,
    forward_class,
    gradient_edge,
    is_custom,
    leaf_variable,
    let_die_in_turn,
    node_number,
    saved_changed,
    saved_tensors,
    some_custom,
)
from .._torch.ranks import device_of, summed_over
from .._torch.sharded import local_of, own_function
from ..errors import UnsupportedError
from .collectives import CollectiveNode, OpaqueNode
from .contexts import ContextRecords, is_collective
from .custom import CustomNode
from .trace import Trace

Edge: TypeAlias = tuple[Node, int]
Layouts: TypeAlias = Sequence[Layout | None]


class Graph:
    """The part of an autograd graph that leads from some outputs to some leaves.

    Attributes
    ----------
    roots
        One edge per output; None for an output that does not depend on the leaves.
    leaves
        The `AccumulateGrad` node of each leaf.
    order
        The nodes between, from the roots to the leaves, each before all that it leads to.
    custom
        The custom Functions' nodes among them, and the collectives'.
    hidden
        Whether there are custom Functions that are not, as inside `CopySlices`.
    places
        Where each node stands in the order.
    keys
        What is known of each node's kind.
    layouts
        How the tensors at the roots and at the leaves lie on the ranks of a mesh; None where
        there are no DTensors.
    meshes
        The process groups of their meshes.
    unseen
        Nodes that do not show all that they do, with the reasons.
    """

    def __init__(
        self,
        roots: Sequence[Edge | None],
        leaves: Sequence[Node | torch.Tensor],
        records: ContextRecords | None = None,
        trace: Trace | None = None,
        owners: Sequence[Node] = (),
    ) -> None:
        self._trace = trace
        records = ContextRecords() if records is None else records
        # Other ranks may wait for a collective from which nothing comes to the value here.
        shared = records.communicating()
        ends = _Ends(leaves)
        self.order, reaches = _walked([*_nodes(roots), *shared], ends, shared)
        self.leaves = ends.nodes()
        #: The leaf tensors that it leads to besides the primals.
        self.constants = [
            t for n, ours in reaches.items() if not ours and (t := leaf_variable(n)) is not None
        ]
        self.layouts: tuple[Layouts, Layouts] | None = None
        self.meshes = tuple(records.meshes)
        if shared or records.meshes:
            self.order = _latest_first(self.order, self.leaves)
        self.keys: dict[Node, tuple[Any, ...]] = {}
        self.unseen: dict[Node, str] = {}
        self.places = {node: i for i, node in enumerate(self.order)}
        self.roots = tuple(e if e is not None and e[0] in self.places else None for e in roots)
        #: Their classes, each once: most questions about nodes are answered by them.
        self.kinds = set(map(type, self.order))
        self.custom: dict[Node, OpaqueNode] = {}
        if some_custom(self.kinds):
            self.custom = {
                n: CollectiveNode(n, records.get(n))
                if is_collective(n)
                else CustomNode(n, records.get(n), owners)
                for n in self.order
                if is_custom(n) and reading_of(n) is None and not own_function(forward_class(n))
            }
        #: Whether contexts were made that are no nodes here: they may be inside others.
        self.hidden = len(records) > len(self.custom)

    @property
    def traced(self) -> bool:
        """Whether the lines of f are known that made its nodes."""
        return self._trace is not None

    @property
    def communicates(self) -> bool:
        """Whether there are collectives among the nodes, or DTensors, whose nodes may run some."""
        collectives = (isinstance(node, CollectiveNode) for node in self.custom.values())
        return self.layouts is not None or any(collectives)

    @property
    def is_anybodys(self) -> bool:
        """Whether its programs hold nothing of a user's: no custom Function, no process group."""
        return not (self.custom or self.layouts)

    def total(self, numbers: Sequence[float]) -> list[float]:
        """Return sums of numbers over all ranks that have parts of DTensors."""
        t = torch.tensor(list(numbers), dtype=torch.float64)
        for group in self.meshes:
            t = summed_over(group, t.to(device_of(group)))
        return [float(x) for x in t]

    def label(self, node: Node) -> str:
        """Return a node's name; it knows the line of f that made it, if f was traced."""
        reading = reading_of(node)
        if reading is not None:
            return f"compiled {reading.name}"
        return node.name() if self._trace is None else self._trace.label(node)

    def line(self, node: Node) -> Line | None:
        """Return the line of f that made a node, None if that is not known."""
        return None if self._trace is None else self._trace.line(node)

    def moving(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield running statistics that nodes keep, which PyTorch moves without a version."""
        norms = self.kinds & NORMS
        for node in self.order if norms else ():
            if type(node) in norms and not getattr(node, "_saved_training", True):
                for saved in ("_saved_running_mean", "_saved_running_var"):
                    t = getattr(node, saved, None)
                    if t is not None:
                        yield self.label(node), t

    def changed(self) -> bool:
        """Whether a tensor that a built-in node keeps was changed in place after it was saved."""
        return any(saved_changed(node) for node in self.order if not is_custom(node))

    def saved_tensors(self) -> Iterator[torch.Tensor]:
        """Yield the tensors that the graph keeps for its backward."""
        for node in self.order:
            yield from self.saved_by(node)

    def saved_by(self, node: Node) -> Iterator[torch.Tensor]:
        """Yield the tensors that a node of the graph keeps for its backward."""
        custom = self.custom.get(node)
        if custom is not None:
            yield from custom.kept()
        elif not is_custom(node):
            yield from map(local_of, saved_tensors(node))


def _latest_first(order: Sequence[Node], leaves: Sequence[Node]) -> list[Node]:
    """Return nodes in the opposite order to that in which f made them, the leaves last.

    On all ranks collectives come in one order then, however else their graphs differ.
    """
    ends = set(leaves)
    found = sorted(order, key=lambda n: 1 if n in ends else -node_number(n))
    places = {node: i for i, node in enumerate(found)}
    for node, place in places.items():
        below = [] if node in ends else children(node)
        if any(places.get(n, place + 1) <= place for n in below):
            raise UnsupportedError(
                f"{node.name()}: f communicates, and runs operations in several threads, so that "
                "the order of its collectives is not known; run them in one thread"
            )
    return found


def between(roots: Sequence[Node], leaves: Sequence[Node]) -> list[Node]:
    """Return the nodes on paths from `roots` to `leaves`, in topological order."""
    return _walked(roots, _Ends(leaves), ())[0]


class _Ends:
    """The leaves in which a walk ends, each known by its node or by its tensor."""

    def __init__(self, leaves: Sequence[Node | torch.Tensor]) -> None:
        self.leaves = list(leaves)
        #: The nodes that are known.
        self.found = {x for x in leaves if not isinstance(x, torch.Tensor)}
        self._places = {id(x): i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)}

    def take(self, node: Any) -> bool:
        """Whether a node that was not met before is that of a leaf."""
        if type(node) is not AccumulateGrad:
            return node in self.found
        place = self._places.get(id(node.variable))
        if place is None:
            return node in self.found
        self.leaves[place] = node
        self.found.add(node)
        return True

    def nodes(self) -> tuple[Node, ...]:
        """Return all nodes; one of its own for a leaf that the walk has not met."""
        own = iter(accumulators([x for x in self.leaves if isinstance(x, torch.Tensor)]))
        return tuple([next(own) if isinstance(x, torch.Tensor) else x for x in self.leaves])


def _walked(
    roots: Sequence[Node], ends: _Ends, always: Sequence[Node]
) -> tuple[list[Node], dict[Node, bool]]:
    """Return the nodes between, and of all nodes below the roots whether they lead to a leaf.

    Those of `always`, and what leads to them, count as if they led to one.
    Iterative, because graphs are deeper than Python's recursion limit.
    """
    post_order: list[Node] = []
    #: Whether a node leads to a leaf; the walk does not go below the leaves, which end it.
    reaches: dict[Node, bool] = {}
    wanted = set(always)
    for root in roots:
        if root in reaches:
            continue
        is_end = ends.take(root)
        reaches[root] = is_end or root in wanted
        if is_end:
            post_order.append(root)
            continue
        stack: list[tuple[Node, Iterator[Any]]] = [(root, iter(root.next_functions))]
        while stack:
            node, edges = stack[-1]
            for child, _ in edges:
                if child is None:
                    continue
                known = reaches.get(child)
                if known is None:
                    known = reaches[child] = ends.take(child)
                    if not known:
                        reaches[child] = child in wanted
                        stack.append((child, iter(child.next_functions)))
                        break
                    post_order.append(child)
                if known:
                    reaches[node] = True
            else:
                stack.pop()
                if reaches[node]:
                    post_order.append(node)
                    if stack:
                        reaches[stack[-1][0]] = True
    let_die_in_turn(reaches)
    return post_order[::-1], reaches


#: Marks the cotangents that are no tensors of the user's.
_SEED = "_linearize_seed"


def as_seed(cotangent: torch.Tensor) -> torch.Tensor:
    """Return a cotangent as a leaf with a history of its own, which counts for nobody's."""
    seed = cotangent.detach().requires_grad_()
    setattr(seed, _SEED, True)
    return seed


def edge_of(t: torch.Tensor) -> Edge | None:
    """Return where the gradient of a tensor goes, None if it goes nowhere."""
    if not t.requires_grad:
        return None
    if type(t) is torch.Tensor and t.grad_fn is not None:
        return t.grad_fn, t.output_nr  # quicker
    edge = gradient_edge(t)
    return edge.node, edge.output_nr


def other_leaves(edges: Sequence[Edge | None], leaves: Sequence[Node]) -> list[torch.Tensor]:
    """Return the leaf tensors that a graph leads to besides `leaves`."""
    variables = map(leaf_variable, beneath(_nodes(edges), leaves))
    return [t for t in variables if t is not None and not hasattr(t, _SEED)]


def in_graph(edges: Sequence[Edge | None]) -> list[torch.Tensor]:
    """Return the leaf tensors that a graph leads to, and those that its nodes keep."""
    nodes = list(beneath(_nodes(edges)))
    leaves = [t for t in map(leaf_variable, nodes) if t is not None]
    return [*leaves, *(t for node in nodes for t in saved_tensors(node))]


def _nodes(edges: Iterable[Edge | None]) -> list[Node]:
    return [edge[0] for edge in edges if edge is not None]
