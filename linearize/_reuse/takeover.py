"""Holding a program that comes from another graph against the graph at hand.

What such a program depends on stands in `signature`; the numbers come by their `Origin`s. If
either forgot something, both directions would be wrong together, and no check of one against
the other could tell. So the graph itself is asked: its nodes are called one after the other
with a random cotangent, as PyTorch's engine does. Custom Functions are not called: a map of
rank one stands for each, the same on both sides.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch

from .._capture.collectives import Collective, OpaqueNode
from .._capture.custom import CustomNode
from .._capture.custom_operations import CustomBackward
from .._capture.graph import Edge, Graph
from .._capture.mesh_collectives import OnMesh
from .._check.adjoint import RankOne, StandIns
from .._execute.binding import Binding, BoundProgram
from .._execute.executor import Executor
from .._programs.program import Operation
from .._record.node_formulas import mended
from .._record.stretch import by_edges, handed_on
from .._spaces.balance import Balance, Tensors
from .._spaces.compare import agree, tolerance
from .._spaces.sharding import Layout
from .._spaces.space import TensorSpec
from .._torch.graphs import Node, walking
from .._torch.modes import unobserved
from .._torch.ranks import collectives_seen


def engine_pullback(
    graph: Graph,
    cotangents: Tensors,
    stand_ins: StandIns,
    places: Container[int] = (),
) -> Tensors:
    """Return what arrives at the leaves of a graph, calling one node after the other.

    There is a cotangent for each root, None for zero. Of custom Functions, stand-ins are called,
    except at `places`.
    """
    outs, ins = graph.layouts or ((None,) * len(graph.roots), (None,) * len(graph.leaves))

    def called(node: Node, grads: list[torch.Tensor | None]) -> Tensors:
        custom = graph.custom.get(node)
        if custom is None:
            return mended(node)(grads)
        if graph.places[node] in places and isinstance(custom, CustomNode):
            custom.know_outputs([i for i, g in enumerate(grads) if g is not None])
            custom.unpack()
            return by_edges(node, custom.backward(grads))
        return by_edges(node, _stand_in(stand_ins, custom, backward=True)(*grads))

    def walk() -> dict[Edge, torch.Tensor]:
        given = [
            (edge, g if g is None or layout is None else layout.given(g))
            for edge, g, layout in zip(graph.roots, cotangents, outs, strict=True)
            if edge is not None
        ]
        ends = set(graph.leaves)
        nodes = [n for n in graph.order if n not in ends]
        return handed_on(nodes, given, called, graph.places)

    with collectives_seen():
        left = walking(walk)
        arrived = [left.get((leaf, 0)) for leaf in graph.leaves]
        return [
            g if g is None or layout is None else layout.scaled(layout.lying(g))
            for g, layout in zip(arrived, ins, strict=True)
        ]


class Comparison:
    """Compares programs with a graph, for one random cotangent and one random tangent.

    `out_specs` and `in_specs` say what its roots and its leaves take.
    """

    def __init__(
        self, graph: Graph, out_specs: Sequence[TensorSpec], in_specs: Sequence[TensorSpec]
    ) -> None:
        self._graph = graph
        self._outs, self._ins = tuple(out_specs), tuple(in_specs)
        self._stand_ins = StandIns()
        generator = torch.Generator().manual_seed(6)
        outs, ins = graph.layouts or ((), ())
        self._u = _drawn(self._outs, outs, generator)
        self._v = _drawn(self._ins, ins, generator)
        self._known: dict[Any, Tensors | None] = {}

    def __call__(
        self,
        executor: Executor,
        binding: Binding,
        present: Sequence[bool],
        called: frozenset[int] = frozenset(),
        *,
        forward: bool,
    ) -> bool | None:
        """Whether a program is what the graph says; None if that cannot be told.

        A pullback gives the same, a pushforward (`forward`) is adjoint to it for one pair. Custom
        Functions at the places `called` are part of it.
        """
        there = (True,) * len(self._outs) if forward else tuple(present)
        expected = self._expected(there, called)
        if expected is None:
            return None
        got = self._run(executor, binding, self._v if forward else self._u, present)
        if forward:
            return self._are_adjoint(got, expected, present)
        return agree(got, expected, self._ins)

    def _are_adjoint(self, got: Tensors, expected: Tensors, present: Sequence[bool]) -> bool:
        balance = Balance()
        balance.add(1, self._u, got)
        chosen = [v if here else None for v, here in zip(self._v, present, strict=True)]
        balance.add(-1, expected, chosen)
        if self._graph.layouts is not None:
            balance.sum_up(self._graph.total)
        return balance.holds(max(tolerance(s.dtype) for s in (*self._outs, *self._ins)))

    def _expected(self, present: tuple[bool, ...], called: frozenset[int]) -> Tensors | None:
        """Return what the graph gives, None if it gives nothing that could be compared."""
        key = present, called
        if key not in self._known:
            cotangents = [u if here else None for u, here in zip(self._u, present, strict=True)]
            try:
                found = engine_pullback(self._graph, cotangents, self._stand_ins, called)
            except RuntimeError as error:  # it saved something that was changed, and is not needed
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                found = None
            finite = found is not None and all(t is None or t.isfinite().all() for t in found)
            self._known[key] = found if finite else None
        return self._known[key]

    def _run(
        self,
        executor: Executor,
        binding: Binding,
        arguments: Sequence[torch.Tensor],
        present: Sequence[bool],
    ) -> Tensors:
        chosen = [t for t, here in zip(arguments, present, strict=True) if here]
        ops = [self._replaced(op) for op in binding.ops]
        with unobserved(), torch.inference_mode(False), torch.no_grad():
            return executor(chosen, binding.with_ops(ops))

    def _replaced(self, op: Any) -> Operation:
        node: OpaqueNode | None = getattr(op, "node", None)
        if node is None or isinstance(op, OnMesh):
            kept: Operation = op
            return kept
        backward = op.back if isinstance(op, Collective) else isinstance(op, CustomBackward)
        return _stand_in(self._stand_ins, node, backward=backward)


def _stand_in(stand_ins: StandIns, node: OpaqueNode, *, backward: bool) -> RankOne:
    return stand_ins.of(node, node.outputs, node.inputs, node.name, backward=backward)


def _drawn(
    specs: Sequence[TensorSpec], layouts: Sequence[Layout | None], generator: torch.Generator
) -> list[torch.Tensor]:
    """Return random numbers; where several ranks have a tensor, the same on them."""
    known = layouts or [None] * len(specs)
    return [
        s.random(generator if layout is None else torch.Generator().manual_seed(i))
        for i, (s, layout) in enumerate(zip(specs, known, strict=True))
    ]


def first_parting(fresh: BoundProgram, taken: BoundProgram) -> str:
    """Return where in the graph two recordings of it part: the label of the node."""
    ours, theirs = fresh.numbers(), taken.numbers()
    for a, b in zip(fresh.equations, taken.equations, strict=False):
        opaque = isinstance(a.op, Operation) and isinstance(b.op, Operation)
        here = [ours[c] for c in a.constants()]
        there = [theirs[c] for c in b.constants()]
        if _differ(here, there) or not (opaque or a.op is b.op):
            return a.source
    return ""


def _differ(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    return len(a) != len(b) or any(
        x.shape != y.shape or not torch.equal(x, y) for x, y in zip(a, b, strict=True)
    )
