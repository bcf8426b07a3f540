"""Recognising a graph whose structure is known, by the lump.

`signature` writes down node by node what the derivative of a graph depends on. Most graphs turn
out to be like the one before: to see that, it is enough to ask all nodes one thing after the
other, without a line of Python for each.

A `Matcher` is made of a graph that has a signature. A graph that it matches has the same one, for
it compares no less: the classes of the nodes and their edges; shapes, dtypes and devices of the
gradients that they take; static arguments; how each saved tensor lies in memory and what number
it stands for; which of them share memory, and how. A graph that it does not match may still have
the same signature. There are no matchers where more than that counts: custom Functions, lines of
f, writes that may put several entries at one place, tensors without memory of their own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, TypeAlias

import torch

from .._spaces.compare import exact
from .._spaces.space import TensorSpec
from .._torch.graphs import Node, input_metadata, saved_names
from .._torch.names import BITS, has_memory, is_wrapped_number, native_method
from .graph import Graph
from .repeated import may_repeat

_EDGES: Callable[[Node], Any] = operator.attrgetter("next_functions")
_SPEC: Callable[[Any], Any] = operator.attrgetter("shape", "dtype", "device")
_LAYOUT: Callable[[Any], Any] = operator.attrgetter("shape", "dtype", "device", "layout")
_STRIDE, _ADDRESS = native_method("stride"), native_method("data_ptr")
_OFFSET = native_method("storage_offset")

#: Where a tensor was saved: the node's place, its attribute, the place in the attribute.
Place: TypeAlias = tuple[int, str, int | None]


class Matcher:
    """Tells whether a graph has the structure of another one, which has a signature."""

    def __init__(self, graph: Graph, specs: Sequence[Sequence[TensorSpec]]) -> None:
        self._specs = specs
        ends, order = set(graph.leaves), graph.order
        self._kinds = list(map(type, order))
        self._inner = [i for i, node in enumerate(order) if node not in ends]
        names = {kind: saved_names(kind) for kind in graph.kinds}
        read = [(i, names[type(order[i])]) for i in self._inner]
        #: What is read of which node.
        self._saved = [(i, _reader(tensors)) for i, (tensors, _) in read if tensors]
        self._static = [(i, _reader(others)) for i, (_, others) in read if others]
        #: Where each saved tensor comes from.
        self._places: list[Place] = []
        for i, get in self._saved:
            for name, value in zip(names[type(order[i])][0], get(order[i]), strict=True):
                several = range(len(value)) if isinstance(value, (tuple, list)) else [None]
                self._places += [(i, name, k) for k in several]
        #: Which tensors may stand for numbers, and the bytes of an entry of each.
        there = [t for t in self._read(graph) if t is not None]
        self._numbers = [k for k, t in enumerate(there) if not t.dim()]
        self._sizes = [t.element_size() for t in there]
        self._facts = [fact() for fact in self._asked(graph, [])]

    @staticmethod
    def of(graph: Graph, specs: Sequence[Sequence[TensorSpec]]) -> Matcher | None:
        """Return the matcher of a graph that has a signature; None if there can be none."""
        beyond = graph.custom or graph.hidden or graph.traced or any(map(may_repeat, graph.kinds))
        if beyond or set(graph.order) <= set(graph.leaves):
            return None
        saved = (t for node in graph.order for t in graph.saved_by(node))
        if not all(t.layout is torch.strided and has_memory(t) for t in saved):
            return None
        try:
            return Matcher(graph, specs)
        except RuntimeError:  # somebody changed a tensor just now
            return None

    def __call__(
        self, graph: Graph, specs: Sequence[Sequence[TensorSpec]]
    ) -> dict[Place, torch.Tensor | None] | None:
        """Return what a graph of the same structure saved, by its places; None for another one.

        No hooks must have packed it.
        """
        if specs != self._specs or list(map(type, graph.order)) != self._kinds:
            return None
        tensors: list[torch.Tensor | None] = []
        try:
            for fact, known in zip(self._asked(graph, tensors), self._facts, strict=True):
                if fact() != known:
                    return None
        except RuntimeError:  # a tensor that it saved was changed or freed, or is a sparse one
            return None
        return dict(zip(self._places, tensors, strict=True))

    def _asked(
        self, graph: Graph, tensors: list[torch.Tensor | None]
    ) -> tuple[Callable[[], Any], ...]:
        """Return what is asked of a graph, in turn; `tensors` receives what it saved."""
        order, places = graph.order, graph.places
        nodes = [order[i] for i in self._inner]
        there: list[torch.Tensor] = []

        def edges() -> Any:
            found = list(map(_EDGES, nodes))
            targets, numbers = zip(*chain.from_iterable(found), strict=True)
            lacking = [n is None for n in targets]
            return list(map(len, found)), list(map(places.get, targets)), lacking, numbers

        def ends() -> Any:
            roots = [None if e is None else (places.get(e[0]), e[1]) for e in graph.roots]
            return roots, list(map(places.get, graph.leaves))

        def received() -> Any:
            found = list(map(input_metadata, nodes))
            return list(map(len, found)), list(map(_SPEC, chain.from_iterable(found)))

        def static() -> Any:
            return [exact(x) for i, get in self._static for x in get(order[i])]

        def layouts() -> Any:
            tensors.extend(self._read(graph))
            there.extend([t for t in tensors if t is not None])
            return (
                [t is None for t in tensors],
                list(map(_LAYOUT, there)),
                list(map(_STRIDE, there)),
                [list(map(bit, there)) for bit in BITS],
            )

        def numbers() -> Any:
            among = [there[k] for k in self._numbers]
            return [exact(t.item()) if is_wrapped_number(t) else None for t in among]

        def memory() -> Any:
            return _lie(there, self._sizes)

        return edges, ends, received, static, layouts, numbers, memory

    def _read(self, graph: Graph) -> list[torch.Tensor | None]:
        """Return what was saved, in order."""
        order = graph.order
        found: list[Any] = []
        for i, get in self._saved:
            for value in get(order[i]):
                if isinstance(value, (tuple, list)):
                    found += value
                else:
                    found.append(value)
        return found


def _reader(names: Sequence[str]) -> Callable[[Any], Sequence[Any]]:
    """Return what reads attributes, always as a tuple."""
    get = operator.attrgetter(*names)
    return get if len(names) > 1 else lambda node: (get(node),)


def _lie(tensors: Sequence[torch.Tensor], sizes: Iterable[int]) -> Any:
    """Return for each tensor the first on the same storage, and how many bytes after it it begins.

    Where that is the same, and layouts are too, the same tensors share memory in the same way.
    """
    addresses = list(map(_ADDRESS, tensors))
    first: dict[int, int] = {}
    before = [
        first.setdefault(address - offset * size, k)
        for k, (address, offset, size) in enumerate(
            zip(addresses, map(_OFFSET, tensors), sizes, strict=True)
        )
    ]
    return before, [address - addresses[k] for address, k in zip(addresses, before, strict=True)]
