"""What the derivative of a graph depends on besides numbers.

The `signature` of a graph tells its nodes and how they hang together, shapes and dtypes,
static arguments, the classes of custom Functions, and which of the tensors that it saved share
memory: a recording takes one tensor that two nodes saved for one. Where two graphs have equal
signatures, their linear programs differ in nothing but the residuals' numbers. `node_key` is
the part that belongs to one built-in node.

Python numbers of f's are part of it. Those that do nothing but scale stand at the end, by
themselves: graphs that differ only there have the same program but for these numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch

from .._programs.origins import Literal, Origin, Saved
from .._spaces.compare import exact
from .._spaces.space import TensorSpec
from .._torch.aot import Reading, named_by_piece, reading_of, saved_by_piece
from .._torch.graphs import (
    Node,
    PackedError,
    forward_class,
    input_metadata,
    is_custom,
    is_generated,
    packed_by_hooks,
    saved_names,
    unpacked,
)
from .._torch.names import has_memory, is_wrapped_number
from .._torch.sharded import is_sharded, lies, local_of, settings_of
from ..errors import LinearizeError
from .graph import Graph
from .repeated import may_repeat, repeats
from .scales import Scaling, scales, scaling

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

    None if that cannot be seen. Nodes that do not show all that they do are in `graph.unseen`
    afterwards: what these depend on is not part of it.
    """
    places, custom, keys = graph.places, graph.custom, graph.keys
    saved: list[Placed] = []
    numbers: list[Scale] = []

    def described(node: Node) -> Any:
        key: tuple[Any, ...]
        edges = tuple([(places.get(n, -2) if n else -1, nr) for n, nr in node.next_functions])
        if node in custom:
            key = (custom[node].signature(), expected(node))
        elif (
            is_custom(node) and reading_of(node) is None
        ):  # what makes a DTensor of another, and keeps no tensors
            settings = forward_class(node), settings_of(node)
            hash(settings)
            key = (settings, expected(node))
        else:
            try:
                key = keys[node] = _node_key(node, saved)
            except (HiddenError, PackedError) as error:  # whoever takes a program over calls it
                if graph.layouts is not None or reading_of(node) is not None:
                    raise
                graph.unseen[node] = str(error)
                wanted = tuple([target is not None for target, _ in node.next_functions])
                key = type(node), wanted, expected(node), ()
            if key[-1] and graph.layouts is None:
                numbers.extend([(places[node], name, value) for name, value in key[-1]])
                key = key[:-1]
        line = graph.line(node)  # programs name the lines that they come from
        return (key, edges) if line is None else (key, edges, line)

    if graph.hidden:
        return None
    ends = set(graph.leaves)
    try:
        nodes = tuple([places[n] if n in ends else described(n) for n in graph.order])
        shared = _shared(saved)
    except (HiddenError, RuntimeError, TypeError):  # recording has the words for what is wrong
        return None
    leaves = tuple(places.get(leaf) for leaf in graph.leaves)
    roots = tuple([None if e is None else (places.get(e[0], -2), e[1]) for e in graph.roots])
    around = nodes, roots, leaves, tuple(map(tuple, specs)), shared, graph.layouts, graph.meshes
    return *around, tuple(numbers)


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

    Looked at once, when the graph is new. A `HiddenError` if that cannot be seen; a `RuntimeError`
    if a tensor that it saved was changed in place.
    """
    known = graph.keys.get(node)
    if known is None:
        known = graph.keys[node] = _node_key(node, [])
    return known


def _node_key(node: Node, seen: list[Placed]) -> tuple[Any, ...]:
    """Return a node's key; add the tensors that it saved to those `seen`.

    The numbers of the node that only scale come last, and stand nowhere else.
    """
    reading = reading_of(node)
    if reading is not None:
        return *_piece_key(reading, node, seen), ()
    tensors, static, partial, writes, may_scale = _shown(type(node))
    wanted = tuple([target is not None for target, _ in node.next_functions])
    if partial and not all(wanted):
        raise HiddenError("it does not show the sizes of constants")
    saved: list[torch.Tensor | None] = []
    for name, raw in tensors:
        value = unpacked(node, name, raw)
        if isinstance(value, (tuple, list)):
            saved.extend(value)
        else:
            saved.append(value)
    # Not before it is known that no hook has to unpack anything.
    found = scales(may_scale, wanted, functools.partial(getattr, node)) if may_scale else ()
    numbers = tuple([(name, exact(value)) for name, value in found])
    apart = dict(numbers)
    others = tuple(
        [type(x) if n in apart else exact(x) for n in static for x in [getattr(node, n)]]
    )
    lying: tuple[Any, ...] = ()
    if not _PLAIN.issuperset(map(type, saved)):
        lying = tuple([lies(t) if is_sharded(t) else None for t in saved])
        saved = [t if t is None else local_of(t) for t in saved]
    if writes:
        others += (repeats(node),)
    layouts = tuple([_layout(t) for t in saved])
    if apart and tensors:  # of those kinds that save one tensor under a name
        names = zip(tensors, layouts, strict=True)
        layouts = tuple([x[:-1] if name in apart else x for (name, _), x in names])
    placed = _placed(saved)
    seen += placed
    return type(node), wanted, expected(node), others, layouts, _shared(placed), lying, numbers


def _piece_key(reading: Reading, node: Any, seen: list[Placed]) -> tuple[Any, ...]:
    """Return the key of a compiled piece's node: its pullback, and the sizes that it takes."""
    if packed_by_hooks(node):
        raise HiddenError(node.name())
    saved = saved_by_piece(node)
    wanted = tuple([target is not None for target, _ in node.next_functions])
    given = tuple(node.needs_input_grad), tuple(map(exact, node.symints))
    layouts = tuple([_layout(t) for t in saved])
    placed = _placed(saved)
    seen += placed
    return reading.key, wanted, expected(node), given, layouts, _shared(placed)


#: What is no DTensor.
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))
#: A number that only scales: the place of the node, its attribute, and what is exact of it.
Scale: TypeAlias = tuple[int, str, Any]
#: A tensor that a node saved, and where its storage begins.
Placed: TypeAlias = tuple[torch.Tensor | None, int]
#: Where `expected` stands in a node's key.
_EXPECTED = 2


def shared_memory(tensors: Sequence[torch.Tensor | None]) -> tuple[Any, ...]:
    """Return which tensors share memory, and how they lie to each other.

    For each piece of memory on which there are several: their places among `tensors`, and by how
    many bytes each begins after the first of them. Not where in memory that is, nor anything of
    tensors that lie apart, be it on one storage: that may change from point to point.
    """
    return _shared(_placed(tensors))


def _placed(tensors: Iterable[torch.Tensor | None]) -> list[Placed]:
    return [(t, _beginning(t)) for t in tensors]


def _shared(placed: Sequence[Placed]) -> tuple[Any, ...]:
    if len(placed) < 2 or len({begin for _, begin in placed}) == len(placed):
        return ()
    storages: dict[int, list[int]] = {}
    for i, (_, begin) in enumerate(placed):
        if begin:
            storages.setdefault(begin, []).append(i)
    found: list[tuple[tuple[int, int], ...]] = []
    for group in storages.values():
        if len(group) > 1:
            found.extend(_overlapping([(i, *_extent(placed[i][0])) for i in group]))
    return tuple(sorted(found, key=min))


def _overlapping(extents: list[tuple[int, int, int]]) -> Iterator[tuple[tuple[int, int], ...]]:
    """Yield groups of tensors whose extents overlap, given their places, beginnings and ends."""
    extents.sort(key=lambda e: (e[1], e[0]))
    group: list[tuple[int, int]] = []
    first = last = 0
    for i, begin, end in extents:
        if group and begin >= last:
            if len(group) > 1:
                yield tuple(group)
            group = []
        if not group:
            first = last = begin
        last = max(last, end)
        group.append((i, begin - first))
    if len(group) > 1:
        yield tuple(group)


def _beginning(t: torch.Tensor | None) -> int:
    """Return where the storage of a tensor begins; something of its own for what has none."""
    if t is None:
        return 0
    if t.layout != torch.strided or not has_memory(t):
        return -id(t)
    return int(t.data_ptr() - t.storage_offset() * t.element_size())


def _extent(t: torch.Tensor | None) -> tuple[int, int]:
    """Return where the memory of a tensor begins and ends."""
    if t is None or t.layout != torch.strided or not has_memory(t):
        return 0, 1  # what is in this group is one tensor
    if not t.numel():
        return 0, 0
    begin, size = t.data_ptr(), t.element_size()
    reach = sum([(n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)])
    return begin, begin + (reach + 1) * size


@functools.lru_cache(maxsize=4096)
def _shown(
    kind: type,
) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...], bool, bool, Scaling]:
    """Return what nodes of a class show: tensors, with their packed form, and other arguments.

    Then, whether they hide the sizes of arguments through which no gradient goes, whether they
    may put several entries at one place, and which numbers may only scale.
    """
    if not is_generated(kind) or kind.__name__ in _HIDDEN_STATE:
        raise HiddenError("it does not show what it depends on")
    tensors, static = saved_names(kind)
    return (
        tuple([(name, f"_raw{name}") for name in tensors]),
        static,
        kind.__name__ in _KNOW_ALL_SIZES,
        may_repeat(kind),
        scaling(kind),
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
    """Return how a tensor lies in memory, and what number it stands for, if it does for one."""
    if t is None:
        return None
    shape = t.shape
    if t.layout != torch.strided:
        return t.layout, shape, t.dtype
    # A Python number in f is saved as a tensor; recorded code has it as a number again.
    number = exact(t.item()) if not shape and is_wrapped_number(t) else None
    bits = t.is_conj(), t.is_neg(), has_memory(t)
    return shape, t.stride(), t.dtype, t.device, bits, number


def saved_by(node: Node, place: int) -> list[tuple[torch.Tensor, Origin]]:
    """Return what a built-in node saved, with the names by which it is found again."""
    reading = reading_of(node)
    if reading is None and not is_generated(type(node)):
        return []
    try:
        if reading is not None:
            saved = [(t, Saved(place, name, i)) for name, i, t in named_by_piece(node)]
            return [*saved, *((t, Literal(t)) for t in reading.constants)]
        return [
            (t, Saved(place, name, i, ready=not t.requires_grad))
            for name, i, t in _saved(node, saved_names(type(node))[0])
            if t is not None
        ]
    except RuntimeError:  # whoever reads has the words for it
        return []
