"""Plain tensors that become DTensors in f, and DTensors that become plain ones.

What `to_local` gives of a tensor that all ranks have is the same on all of them, and PyTorch
takes its gradient to be so too. So a value that comes of it counts once, and not once on each
rank; and so does a primal of which `from_local` makes a DTensor that all ranks have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch

from .._spaces.compare import close
from .._spaces.sharding import Layout
from .._torch.graphs import Node, beneath, children, forward_class, is_custom
from .._torch.ranks import device_of, members
from .._torch.sharded import copies_given, copies_taken, own_function, summed, takes_parts
from ..errors import UnsupportedError
from .graph import Graph, Layouts

#: The process groups over which numbers are the same.
Groups: TypeAlias = tuple[Any, ...]


def is_conversion(node: Node) -> bool:
    """Whether a graph node is a Function of DTensor's own."""
    return is_custom(node) and own_function(forward_class(node))


def check_alike(t: torch.Tensor, groups: Groups, what: str) -> None:
    """Raise, on all ranks, if a tensor (`what`) differs between the ranks of some groups."""
    for group in groups:
        with torch.no_grad():
            mean = summed(t, group) / len(members(group))
            off = torch.tensor(float(not close(t, mean)), device=device_of(group))
        if float(summed(off, group)):
            raise UnsupportedError(
                f"{what} is not the same on all ranks, which it has to be where a DTensor that "
                "all ranks have (Replicate) was made a plain tensor, or of one: give to_local() "
                "or from_local() the grad_placements that are right (Partial, if each rank uses "
                "it in another way), or compute with DTensors"
            )


def laid_out_roots(graph: Graph, layouts: Layouts) -> tuple[Layout | None, ...]:
    """Return how values lie on the ranks, those that came of `to_local` too."""
    found = list(layouts)
    for i, (edge, layout) in enumerate(zip(graph.roots, layouts, strict=True)):
        if layout is None and edge is not None:
            ends = [n for n in _reached(graph, [edge[0]]) if is_conversion(n)]
            if any(map(takes_parts, ends)):
                raise UnsupportedError(
                    "the value comes of to_local() of a DTensor whose ranks hold what is still to "
                    "be added up (Partial), so that no rank has it: redistribute() it before"
                )
            found[i] = _alike(ends, copies_taken, "the value", "to_local")
    return tuple(found)


def laid_out_leaves(graph: Graph, layouts: Layouts) -> tuple[Layout | None, ...]:
    """Return how primals lie on the ranks, those too of which `from_local` makes DTensors."""
    users: dict[Node, list[Node]] = {leaf: [] for leaf in graph.leaves}
    for node in graph.order:
        if is_conversion(node) and copies_given(node) is not None:
            below = [n for n, _ in node.next_functions if n in graph.places]
            for end in _reached(graph, below):
                if end in users:
                    users[end].append(node)
    return tuple(
        [
            _alike(users[leaf], copies_given, "a primal", "from_local")
            if layout is None
            else layout
            for leaf, layout in zip(graph.leaves, layouts, strict=True)
        ]
    )


def _alike(
    nodes: Iterable[Node], copies: Callable[[Any], Groups | None], what: str, method: str
) -> Layout | None:
    """Return over which groups a plain tensor is the same, from where it is converted."""
    known = {groups for groups in map(copies, nodes) if groups is not None}
    if len(known) > 1:
        raise UnsupportedError(
            f"{method}: {what} is a plain tensor that belongs to several DTensors, the same on "
            "other ranks in one than in the other; let f take and return DTensors"
        )
    groups = known.pop() if known else ()
    return Layout(None, groups) if groups else None


def _reached(graph: Graph, roots: Sequence[Node]) -> list[Node]:
    """Return the nodes that plain gradients come to, conversions included, but not behind them."""

    def below(node: Node) -> list[Node]:
        return [] if is_conversion(node) else [n for n in children(node) if n in graph.places]

    return list(beneath([n for n in roots if n in graph.places], below=below))
