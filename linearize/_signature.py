"""Floor 2: what the derivative of a graph depends on besides numbers.

The `signature` of a graph tells its nodes and how they hang together, shapes and dtypes,
static arguments, the classes of custom Functions. Where two graphs have equal signatures,
their linear programs differ in nothing but the residuals' numbers. `node_key` is the part
that belongs to one built-in node.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ._capture import Graph
from ._origin import Origin, Saved
from ._space import TensorSpec
from ._torch import (
    Node,
    has_memory,
    input_metadata,
    is_generated,
    is_wrapped_number,
    saved_names,
    unpacked,
)
from .errors import LinearizeError

#: Nodes with state that cannot be read from Python and is not told by shapes and dtypes.
_HIDDEN_STATE = frozenset(
    {
        "AsStridedBackward0",
        "AsStridedBackward0_copy",
        "AsStridedBackward1",
        "AsStridedScatterBackward0",
        "NativeDropoutBackward0",
        "SoftmaxBackwardDataBackward0",
        "ToDenseBackward0",
    }
)
#: Nodes that know the sizes of all arguments; without an edge a size cannot be seen.
_KNOW_ALL_SIZES = frozenset({"CatBackward0", "BlockDiagBackward0"})


class HiddenError(LinearizeError):
    """Raised where the structure of a graph cannot be seen."""


def signature(graph: Graph, specs: Sequence[Sequence[TensorSpec]]) -> tuple[Any, ...] | None:
    """Return what the derivative of a graph depends on besides numbers.

    None if that cannot be seen.
    """
    places, custom, keys = graph.places, graph.custom, graph.keys

    def described(node: Node) -> Any:
        edges = tuple([(places.get(n, -2) if n else -1, nr) for n, nr in node.next_functions])
        if node in custom:
            key = (custom[node].signature(), expected(node))
        else:
            key = keys[node] = _node_key(node)
        line = graph.line(node)  # programs name the lines that they come from
        return (key, edges) if line is None else (key, edges, line)

    if graph.hidden:
        return None
    ends = set(graph.leaves)
    try:
        nodes = tuple([places[n] if n in ends else described(n) for n in graph.order])
    except (HiddenError, RuntimeError):  # recording has the words for what is wrong
        return None
    leaves = tuple(places.get(leaf) for leaf in graph.leaves)
    roots = tuple([None if e is None else (places.get(e[0], -2), e[1]) for e in graph.roots])
    return nodes, roots, leaves, tuple(map(tuple, specs))


def expected(node: Node) -> tuple[Any, ...]:
    """Return the shapes, dtypes and devices of the gradients that a node takes."""
    metadata = input_metadata(node)
    if len(metadata) == 1:  # mostly; this runs at each node of each new point
        m = metadata[0]
        return ((tuple(m.shape), m.dtype, m.device),)
    return tuple([(tuple(m.shape), m.dtype, m.device) for m in metadata])


def arguments(graph: Graph, node: Node) -> tuple[Any, ...]:
    """Return the shapes, dtypes and devices of what a node was computed from.

    Nodes know them without showing them, but for those through which no gradient goes.
    """
    found = []
    for target, i in node.next_functions:
        if target is not None:
            known = graph.keys.get(target)
            found.append((expected(target) if known is None else known[_EXPECTED])[i])
    return tuple(found)


def node_key(graph: Graph, node: Node) -> tuple[Any, ...]:
    """Return what the derivative of a built-in node depends on, besides numbers and `arguments`.

    Looked at once, when the graph is new.

    Raises
    ------
    HiddenError
        If that cannot be seen.
    RuntimeError
        If a tensor that it saved was changed in place.
    """
    known = graph.keys.get(node)
    if known is None:
        known = graph.keys[node] = _node_key(node)
    return known


def _node_key(node: Node) -> tuple[Any, ...]:
    tensors, static, partial = _shown(type(node))
    wanted = tuple([target is not None for target, _ in node.next_functions])
    if partial and not all(wanted):
        raise HiddenError(node.name())
    others = tuple([getattr(node, name) for name in static]) if static else ()
    saved: list[torch.Tensor | None] = []
    for name, raw in tensors:
        value = unpacked(node, name, raw)
        if isinstance(value, (tuple, list)):
            saved.extend(value)
        else:
            saved.append(value)
    return type(node), wanted, expected(node), others, _layouts(saved)


#: Where `expected` stands in a node's key.
_EXPECTED = 2


def _layouts(saved: Sequence[torch.Tensor | None]) -> Any:
    """Return the layouts of tensors, and which share memory: they may differ elsewhere."""
    if len(saved) < 2:
        return tuple([_layout(t) for t in saved])
    first: dict[int, int] = {}
    layouts = []
    for i, t in enumerate(saved):
        shared = t is not None and t.layout == torch.strided and first.setdefault(t.data_ptr(), i)
        layouts.append((_layout(t), shared))
    return tuple(layouts)


@functools.lru_cache(maxsize=4096)
def _shown(kind: type) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...], bool]:
    """Return what nodes of a class show: tensors, with their packed form, and other arguments.

    Last, whether they hide the sizes of arguments through which no gradient goes.
    """
    if not is_generated(kind) or kind.__name__ in _HIDDEN_STATE:
        raise HiddenError(kind.__name__)
    tensors, static = saved_names(kind)
    return (
        tuple([(name, f"_raw{name}") for name in tensors]),
        static,
        kind.__name__ in _KNOW_ALL_SIZES,
    )


def _saved(node: Node, names: Sequence[str]) -> Iterator[tuple[str, int | None, Any]]:
    """Yield attribute, position and tensor of what a built-in node saved."""
    for name in names:
        value = unpacked(node, name, f"_raw{name}")
        if isinstance(value, (tuple, list)):
            yield from ((name, i, t) for i, t in enumerate(value))
        else:
            yield name, None, value


def _layout(t: torch.Tensor | None) -> Any:
    if t is None:
        return None
    shape = t.shape
    if t.layout != torch.strided:
        return t.layout, shape, t.dtype
    # A Python number in f is saved as a tensor; recorded code has it as a number again.
    number = t.item() if not shape and is_wrapped_number(t) else None
    bits = t.is_conj(), t.is_neg(), has_memory(t)
    return shape, t.stride(), t.dtype, t.device, bits, number


def saved_by(node: Node, place: int) -> list[tuple[torch.Tensor, Origin]]:
    """Return what a built-in node saved, with the names by which it is found again."""
    if not is_generated(type(node)):
        return []
    tensors, _ = saved_names(type(node))
    try:
        return [
            (t, Saved(place, name, i)) for name, i, t in _saved(node, tensors) if t is not None
        ]
    except (HiddenError, RuntimeError):
        return []
