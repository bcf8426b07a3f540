"""A walk over an autograd graph, from its roots to its leaves, that writes it down.

A built-in node is called with random cotangents under a `Recorder`, which writes down each ATen
operation that touches something derived from a cotangent; all else that the node computes is a
residual. A custom Function's node is written down as one operation and not executed.

Random cotangents, because real backward formulas branch on zeros.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from cachetools.keys import hashkey

from .._capture.collectives import Collective, CollectiveNode, OpaqueNode
from .._capture.contexts import fitted
from .._capture.custom_operations import CustomBackward
from .._capture.graph import Edge, Graph
from .._capture.scales import scales_at
from .._capture.signature import HiddenError, arguments, node_key, saved_by
from .._programs.broadcast import broadcasts, summed
from .._programs.origins import Number, Origin, Saved
from .._programs.program import Emitter, Operation
from .._programs.values import Constant, Var
from .._spaces.space import TensorSpec
from .._torch.aot import reading_of
from .._torch.graphs import Node, input_metadata, saved_tensors, walking
from .._torch.modes import NOTHING
from .._torch.names import aten
from .._torch.ranks import collectives_seen
from .._torch.sharded import is_sharded, local_of
from ..errors import UnsupportedError
from .calls import NotRecordedError, as_it_is, called, check_dense, unpacked
from .node_formulas import formula_of, refuse_repeated
from .node_programs import (
    NODE_PROGRAMS,
    Gradient,
    NodeProgram,
    copied,
    dense,
    layout_of,
    placeholder_like,
)
from .opinion import second_opinion
from .parts import closed, opened, parts, takes_sharded
from .recorder import Recorder
from .recording import OpaqueError, Recording, SparseError
from .stretch import Cut, NodeBackward, Stretch, alone
from .witness import Unseen, Witness


class Walk:
    """One walk over a graph, from roots to leaves.

    Parameters
    ----------
    graph
        The graph.
    emitter
        Receives the equations.
    generator
        Of the random numbers that stand for gradients.
    remembered
        Whether constants are traced back to what the graph saved.
    factor
        What the random numbers are multiplied by.
    lazy
        Whether what is known of single nodes is used. Then numbers that stand for a gradient
        are drawn when they are first needed, and do not go with those of others.
    cut
        Says what is not written down but left to PyTorch.
    """

    def __init__(
        self,
        graph: Graph,
        emitter: Emitter,
        generator: torch.Generator,
        *,
        remembered: bool = False,
        lazy: bool = False,
        cut: Cut | None = None,
        factor: float = 1.0,
    ) -> None:
        self.graph = graph
        self.cut = cut
        self.factor = factor
        self.emitter = emitter
        self.generator = generator
        self.remembered = remembered
        self.lazy = lazy and graph.layouts is None
        self.unseen: list[Unseen] = []  # what was called that does not show all that it does
        #: Whether random numbers stood for a gradient that in truth depends on others.
        self.invented = False
        self.recording = Recording(emitter)
        self.recorder = Recorder(self.recording)
        self.pending: dict[Node, dict[int, Gradient]] = {}
        self.inputs: set[Var] = set()

    def seed(self, var: Var) -> Gradient:
        """Return a gradient to begin with, or to go on with after an operation not executed."""
        g = Gradient(var, dense(var.spec.shape))
        if not self.lazy:
            self.number(g)
        return g

    def number(self, g: Gradient) -> torch.Tensor:
        """Return numbers that stand for a gradient."""
        if g.tensor is None:
            self.invented |= self.lazy and g.var not in self.inputs
            numbers = g.var.spec.random(self.generator) * self.factor
            g.tensor = placeholder_like(g.layout, numbers)
            self.recording.define(g.tensor, g.var)
        return g.tensor

    def apart(self, g: Gradient) -> Gradient:
        """Return the same gradient with numbers that lie apart from all others."""
        own = Gradient(g.var, g.layout)
        if not self.lazy:  # those that it has can come about
            own.tensor = copied(g.layout, self.number(g))
            self.recording.define(own.tensor, g.var)
        return own

    def computed(self, t: torch.Tensor) -> Gradient | None:
        """Return a gradient that was computed; None if it does not descend from a cotangent."""
        part = local_of(t)
        var = self.recording.variable(part)
        return None if var is None else Gradient(var, layout_of(part), t)

    def run(self, seeds: Sequence[Gradient]) -> list[Gradient | None]:
        """Walk from the roots, one seed each; return what arrives at the leaves."""
        with collectives_seen():
            result = walking(lambda: self._run(seeds))
        self.recording.finish()
        return result

    def _run(self, seeds: Sequence[Gradient]) -> list[Gradient | None]:
        outs, ins = self.graph.layouts or ([None] * len(seeds), [None] * len(self.graph.leaves))
        for i, (edge, seed, layout) in enumerate(zip(self.graph.roots, seeds, outs, strict=True)):
            if edge is not None and layout is not None:
                t = opened(self.recorder, seed.var, layout, i, self.factor)
                self.deliver(edge, self.computed(t) or seed)
            elif edge is not None:
                self.deliver(edge, seed)
        cut = self.cut
        self.visit_all(self.graph.order if cut is None else cut.before)
        if cut is not None:
            self.part(cut.stretch, cut.reason)
            self.visit_all(cut.after)
        arrived = [self.pending.get(leaf, {}).get(0) for leaf in self.graph.leaves]
        return [
            g
            if g is None or layout is None
            else self.computed(closed(self.recorder, self.number(g), layout))
            for g, layout in zip(arrived, ins, strict=True)
        ]

    def visit_all(self, nodes: Sequence[Node]) -> None:
        """Write down nodes, in their order."""
        targets = set(self.graph.leaves)
        for node in nodes:
            if node in targets:
                continue
            received = self.pending.pop(node, {})
            if received or isinstance(self.graph.custom.get(node), CollectiveNode):
                self.visit(node, received)

    def deliver(self, edge: Edge, grad: Gradient) -> None:
        """Add a gradient to what a node receives, in the shape and dtype that it expects."""
        node, nr = edge
        spec = TensorSpec.received(input_metadata(node)[nr])
        given = grad.var.spec
        fits = given is spec or given == spec
        if grad.tensor is not None and is_sharded(grad.tensor):
            fits = spec.matches(grad.tensor)
        same = (given.dtype, given.device) == (spec.dtype, spec.device)
        if not fits and self.lazy and same and broadcasts(spec.shape, given.shape):
            grad = Gradient(summed(self.emitter, grad.var, spec.shape), dense(spec.shape))
        elif not fits:
            number = self.number(grad)
            with self.recorder:
                number = fitted(number, spec)
            computed = self.computed(number)
            if computed is None:
                return
            grad = computed
        slot = self.pending.setdefault(node, {})
        slot[nr] = self.sum(slot[nr], grad) if nr in slot else grad

    def sum(self, a: Gradient, b: Gradient) -> Gradient:
        """Add two gradients of one shape and dtype."""
        if a.tensor is not None and b.tensor is not None:
            with self.recorder:
                t = a.tensor + b.tensor
            return self.computed(t) or Gradient(a.var, layout_of(local_of(t)), t)
        spec = a.var.spec
        var = self.emitter.emit(aten.add.Tensor, (a.var, b.var), spec)
        return Gradient(var, a.layout if a.layout == b.layout else dense(spec.shape))

    def visit(self, node: Node, received: dict[int, Gradient]) -> None:
        """Write down one node."""
        self.emitter.source = self.graph.label(node)
        custom = self.graph.custom.get(node)
        if custom is not None:
            self.custom(custom, node, received)
            return
        key = self.key(node, received)
        known = None if key is None else NODE_PROGRAMS.find(key)
        if known is not None:
            self.forward(node, self.from_memory(node, known, received))
            return
        grads = [received.get(i) for i in range(len(input_metadata(node)))]
        self.recording.constants.at_node(self.saved(node), self.numbers(node))
        sharded = self.graph.layouts is not None and takes_sharded(node, received.values())
        formula = None if sharded else formula_of(node)
        if formula is not None:
            op, point = unpacked(self.graph.label(node), lambda: formula(node))
            self.place(op, node.next_functions, grads, map(self.recording.constant, point))
            return
        mark = len(self.emitter.equations)
        before = self.emitter.fixed, self.recording.frozen
        self.emitter.fixed = self.recording.frozen = ""
        witness = self.witness(node, received)
        if witness is not None:
            grads = [None if g is None else self.apart(g) for g in grads]
        result, reason = self.listened(node, grads, witness, mark)
        if witness is None and not reason and self.may_be_watched(node):
            # Numbers decided something: another graph's may decide the same.
            self.graph.unseen[node] = self.emitter.fixed
            del self.emitter.equations[mark:]
            self.emitter.fixed, self.recording.frozen = before
            self.visit(node, received)
            return
        if reason and sharded:
            raise UnsupportedError(
                f"{self.graph.label(node)}: an operation on DTensors cannot be recorded: "
                f"{reason}; compute it with to_local(), or with local_map"
            )
        if reason:
            del self.emitter.equations[mark:]
            self.opaque(alone(self.graph, node), received, reason)
        else:
            found = [None if g is None else self.computed(g) for g in result]
            if witness is not None:
                self.watched(witness, result)
            elif key is not None and not (self.emitter.fixed or self.recording.frozen):
                self.remember(key, node, received, found, mark)
            self.forward(node, found)
        self.emitter.fixed = before[0] or self.emitter.fixed
        self.recording.frozen = before[1] or self.recording.frozen

    def lay_out(
        self, node: Node, grads: Sequence[Gradient | None], numbers: list[torch.Tensor | None]
    ) -> None:
        """Lay out numbers in memory as a compiled piece wants them; nothing depends on that."""
        reading = reading_of(node)
        for i, (g, t) in enumerate(zip(grads, numbers, strict=True) if reading else ()):
            if g is not None and t is not None and reading is not None:
                numbers[i] = own = reading.laid_out(i, t)
                if own is not t:
                    self.recording.define(own, g.var)

    def saved(self, node: Node) -> Iterable[tuple[torch.Tensor, Origin | None]]:
        """Return what a node saved, with what tells it from the rest."""
        found: Iterable[tuple[torch.Tensor, Origin | None]]
        if self.remembered:
            found = saved_by(node, self.graph.places[node])
        else:
            found = [(t, None) for t in saved_tensors(node)]
        return found if self.graph.layouts is None else parts(found, self.recording.sharded)

    def numbers(self, node: Node) -> list[tuple[Number, Any]]:
        """Return the numbers of a node that only scale, with what tells them from the rest."""
        return scales_at(node, self.graph.places[node]) if self.remembered else []

    def forward(self, node: Node, result: Sequence[Gradient | None]) -> None:
        """Hand on what a node returned."""
        for (target, nr), grad in zip(node.next_functions, result, strict=False):
            if target is not None and grad is not None and target in self.graph.places:
                self.deliver((target, nr), grad)

    # -- nodes of a kind that was met before ------------------------------------------------

    def key(self, node: Node, received: dict[int, Gradient]) -> Hashable:
        """Return what the recording of a node depends on; None if that cannot be seen."""
        if not self.lazy:
            return None
        try:
            layouts = [(i, g.layout) for i, g in sorted(received.items())]
            key = hashkey(node_key(self.graph, node), arguments(self.graph, node), *layouts)
            hash(key)  # computed once, and kept
        except (HiddenError, RuntimeError, TypeError):  # the recording has the words for it
            return None
        return key

    def from_memory(
        self, node: Any, known: NodeProgram, received: dict[int, Gradient]
    ) -> list[Gradient | None]:
        """Write down what is known of nodes of this kind."""
        saved: dict[str, Any] = {}

        def read(origin: Saved) -> torch.Tensor:
            value = saved.get(origin.name)
            if value is None:
                value = unpacked(self.graph.label(node), lambda: getattr(node, origin.name))
                saved[origin.name] = value
            t: torch.Tensor = value if origin.position is None else value[origin.position]
            return t

        inputs = [g.var for _, g in sorted(received.items())]
        place = self.graph.places[node]

        def move(origin: Saved) -> Origin:
            return origin.moved(place)

        return known.write(self.emitter, inputs, read, move, self.recording.constant, place)

    def remember(
        self,
        key: Hashable,
        node: Node,
        received: dict[int, Gradient],
        result: Sequence[Gradient | None],
        mark: int,
    ) -> None:
        """Keep what was recorded for other nodes of the same kind."""
        inputs = [g.var for _, g in sorted(received.items())]
        outputs = [None if g is None else (g.var, g.layout) for g in result]
        program = NodeProgram.of(
            self.graph.places[node],
            inputs,
            self.emitter.equations[mark:],
            outputs,
            lambda c: self.recording.constants.origin(self.emitter.numbers[c]),
        )
        if program is not None:
            NODE_PROGRAMS.keep(key, program)

    # -- nodes that are called --------------------------------------------------------------

    def may_be_watched(self, node: Node) -> bool:
        """Whether numbers decided what was recorded of a node, as those of others may too."""
        decided = self.emitter.fixed and self.remembered and not self.recording.frozen
        return bool(decided) and self.graph.layouts is None and reading_of(node) is None

    def witness(self, node: Node, received: dict[int, Gradient]) -> Witness | None:
        """Return what watches a node that does not show all that it does."""
        witness = None
        if self.remembered and node in self.graph.unseen:
            how = tuple([(i, g.layout) for i, g in sorted(received.items())])
            witness = Witness(self.graph.places[node], "", how)
        self.recording.constants.witness = witness
        return witness

    def watched(self, witness: Witness, result: Sequence[torch.Tensor | None]) -> None:
        """Take note of what a node did that does not show it."""
        call = witness.ended(result)
        if call is None:
            self.recording.constants.decided(f"{self.emitter.source}: {witness.blind}")
        else:
            self.unseen.append(call)

    def listened(
        self, node: Node, grads: Sequence[Gradient | None], witness: Witness | None, mark: int
    ) -> tuple[Sequence[torch.Tensor | None], str]:
        """Call a built-in node; return what it gives, and why that cannot be written down."""
        numbers = [None if g is None else self.number(g) for g in grads]
        self.lay_out(node, grads, numbers)
        result: Sequence[torch.Tensor | None] = ()
        if witness is not None:
            witness.begin(numbers)
        try:
            with self.recorder, NOTHING if witness is None else witness:
                result = called(node, numbers, self.emitter.source)
            check_dense([node], node.next_functions, result)
            if node.name().endswith("CopySlices"):
                known = self.emitter.numbers, self.recording.constants.decided_by
                refuse_repeated(node, self.emitter.equations[mark:], *known)
            if self.is_opaque(result):
                return result, "its result does not descend from the cotangent"
            if self.graph.hidden and node.name().endswith("CopySlices"):
                recorded = numbers, self.emitter.equations[mark:], result
                return result, second_opinion(self.recording, self.generator, node, recorded)
        except SparseError as error:
            sparse = NotRecordedError(f"{node.name()}: {error}")
            return result, as_it_is(node, numbers, sparse, helped=self.remembered)
        except OpaqueError as error:
            return result, str(error)
        except NotRecordedError as error:
            return result, as_it_is(node, numbers, error, helped=self.remembered)
        return result, ""

    def is_opaque(self, result: Sequence[torch.Tensor | None]) -> bool:
        """Whether a gradient does not descend from the cotangents although it is not zero."""
        return any(
            g is not None and self.recording.variable(g) is None and not self.recording.vanishes(g)
            for g in (None if g is None else local_of(g) for g in result)
        )

    def opaque(self, stretch: Stretch, received: dict[int, Gradient], reason: str) -> None:
        """Write down a node as one operation, because of `reason`."""
        grads = [received.get(nr) for _, nr in stretch.entries]
        self.place(NodeBackward(stretch, reason), stretch.exits, grads)

    def part(self, stretch: Stretch, reason: str) -> None:
        """Write down a part of the graph as one operation."""
        grads = [self.pending.get(n, {}).get(nr) for n, nr in stretch.entries]
        if not any(grads):
            return
        self.emitter.source = stretch.label
        numbers = [None if g is None else g.var.spec.random(self.generator) for g in grads]
        check_dense(stretch.nodes, stretch.exits, stretch(*numbers))
        self.place(NodeBackward(stretch, reason), stretch.exits, grads)

    def custom(self, custom: OpaqueNode, node: Node, received: dict[int, Gradient]) -> None:
        """Write down the node of a custom Function, or of a collective, as one operation."""
        custom.know_outputs(received.keys())
        unpacked(self.emitter.source, custom.unpack)  # together with what those around it saved
        edges = [edge for edge in node.next_functions if edge[0] is not None]
        grads = [received.get(i) for i in range(len(custom.outputs))]
        op: Operation = (
            Collective(custom, back=True)
            if isinstance(custom, CollectiveNode)
            else CustomBackward(custom)
        )
        self.place(op, edges, grads)

    def place(
        self,
        op: Operation,
        edges: Sequence[tuple[Node | None, int]],
        grads: Sequence[Gradient | None],
        point: Iterable[Constant] = (),
    ) -> None:
        """Write down an operation that is not executed."""
        within = [n is not None and n in self.graph.places for n, _ in edges]
        outputs = [
            Var(TensorSpec.received(input_metadata(n)[nr])) if here else None
            for (n, nr), here in zip(edges, within, strict=True)
        ]
        args = (*(None if g is None else g.var for g in grads), *point)
        self.emitter.add(op, args, outputs)
        for (n, nr), var in zip(edges, outputs, strict=True):
            if n is not None and var is not None:
                self.deliver((n, nr), self.seed(var))
