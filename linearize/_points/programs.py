"""Where the programs of one point come from.

They are recorded from the point's graph, unless a point with the same structure was recorded
before: then its numbers are bound into the known programs.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .._capture.capture import Capture
from .._capture.graph import Graph
from .._capture.matcher import Matcher
from .._capture.signature import signature
from .._check.proof import Proof
from .._execute.binding import Binding, BoundProgram, bound
from .._execute.executor import Executor
from .._forms.dense import Dense
from .._forms.plan import CompiledForms
from .._forms.succession import Learned, Left
from .._programs.guards import watched
from .._programs.numbers import Numbers, Pool
from .._programs.program import Program
from .._programs.scales import unmarked
from .._record.pullback import record_pullback
from .._record.witness import Unseen
from .._reuse import reasons
from .._reuse.families import Family
from .._reuse.shared import Structures
from .._reuse.structure import RECORDED, Structure
from .._reuse.takeover import Comparison, first_parting
from .._reuse.template import Template, portable
from .._torch.graphs import outside_backward
from .._transpose.copies import among_ranks
from .._transpose.missing import lacks_methods
from .._transpose.transpose import transpose
from ..errors import ReuseError
from .by_engine import ByEngine
from .lifetime import DUE, tidy
from .reader import Reader
from .watched import Watched

#: The names of the two directions.
PULLBACK, PUSHFORWARD = "pullback", "pushforward"
#: What is held against the graph.
_COMPARED = (PULLBACK, PUSHFORWARD, RECORDED)


class PointPrograms:
    """Gives the programs of one point when they are first needed, each once.

    Parameters
    ----------
    captured
        The run of f.
    structures
        What is known of other points.
    check
        When to check that the two programs are adjoint, and that those taken over from other
        points are those of this graph: "structure" (once for each), "always" or "never".

    Attributes
    ----------
    proof
        That check, as long as it has not been made.
    places
        Where the custom Functions' nodes stand in the graph, by their ids.
    pool
        What is known of the point's numbers, for as long as programs are made of each other.
    """

    def __init__(
        self, captured: Capture, structures: Structures, *, check: str = "structure"
    ) -> None:
        self.lock = threading.RLock()
        # The graph is made now: it stamps what contexts keep, before anybody changes it.
        graph = captured.graph()
        self._graph: Graph | None = graph
        self._layouts = graph.layouts
        #: Running statistics that it keeps, with the names of their nodes. Those of a run that
        #: was watched are copies.
        self.moving = [] if captured.watched else list(graph.moving())
        self._leaves: list[torch.Tensor] = captured.leaves
        self._specs = (captured.out_space.tensors, captured.in_space.tensors)
        self._pullback: BoundProgram | None = None
        self._structures = structures
        self._check = check
        self.pool = Pool()
        #: What the pushforward owes before its first product is handed out.
        self.proof: Proof | None = None
        self._dense: Dense | None = None
        self._comparison: Comparison | None = None
        self._structure: Structure | None = None
        self._signature: tuple[Any, ...] | None = None
        self._searched = False
        #: Whether it was counted as one that took programs over, or as recorded.
        self._counted: bool | None = None
        self.places: dict[int, int] = {}
        self._reader: Reader | None = Reader(graph)
        self._bound: list[Binding] = []
        self._watched = Watched()
        self._engine: ByEngine | None = ByEngine(graph, captured.leaves, captured.unhooked)
        #: Who may still ask for a program.
        self._waiting: dict[str, weakref.ref[Any]] = {}

    def wait(self, direction: str, user: Any) -> None:
        """Expect `user` to ask for a direction, as long as it lives."""
        me = weakref.ref(self)

        def died(_: Any) -> None:
            # Called wherever the collector runs, perhaps inside a transform of somebody else's
            # or in the midst of this point's own work: then the next call tidies up.
            if not sys.is_finalizing():
                point = me()
                if point is not None and not point.awaited():
                    DUE.append(me)
                    tidy()

        self._waiting[direction] = weakref.ref(user, died)

    def awaited(self) -> bool:
        """Whether somebody lives who may still ask for a program."""
        return any(user() is not None for user in list(self._waiting.values()))

    def served(self, direction: str) -> None:
        """Take note that a direction is not asked for any more."""
        with self.lock:
            self._waiting.pop(direction, None)
            self._let_go()

    def tidy(self) -> bool:
        """Let go of what nobody will ask for; False if that must wait."""
        owned: bool = self.lock._is_owned()  # type: ignore[attr-defined]
        if owned or not self.lock.acquire(blocking=False):
            return False
        try:
            self._let_go()
        finally:
            self.lock.release()
        return True

    def _let_go(self) -> None:
        if not self.awaited():
            self._let_go_of_graph()
            self._pullback = None

    # -- recorded ---------------------------------------------------------------------------

    def pullback(self) -> BoundProgram:
        """Return the recorded pullback."""
        with self.lock:
            if self._pullback is None:
                present = (True,) * len(self._specs[0])
                known = self._recorded(PULLBACK, present) or self._recorded(RECORDED, present)
                self._pullback = known or self._record()
                self._let_go_of_graph()
            return self._pullback

    def pushforward(self) -> BoundProgram:
        """Return the transpose of the pullback."""
        present = (True,) * len(self._specs[1])
        with self.lock:
            known = self._recorded(PUSHFORWARD, present)
            if known is not None:
                return known
            pullback = self.pullback()
            pushforward = pullback.made(transpose, PUSHFORWARD, pool=self.pool)
            if self._owes_proof():
                self.proof = Proof(pullback, pushforward, transpose, self._proved)
            pushforward = self._among_ranks(pushforward)
            self._leave(PUSHFORWARD, present, pushforward.program)
            return pushforward

    def _among_ranks(self, pushforward: BoundProgram) -> BoundProgram:
        """Return a pushforward that gives the same on all ranks that have a tensor."""
        if self._layouts is None:
            return pushforward
        outs, ins = self._layouts
        return pushforward.made(among_ranks, ins, outs, pool=self.pool)

    def _recorded(self, direction: str, present: tuple[bool, ...]) -> BoundProgram | None:
        """Return the program as another point recorded it, with the numbers of this one."""
        known = self.known(direction, present, simplified=False)
        return None if known is None else bound(known[0].program, known[1])

    def _leave(self, direction: str, present: tuple[bool, ...], program: Program) -> None:
        """Let other points take over a program, also where this one only looks at it."""
        if not lacks_methods(program):
            self.offer(direction, present, program, simplified=False)

    def _owes_proof(self) -> bool:
        structure = self._structure
        return self._check != "never" and not (structure is not None and structure.proved)

    def _proved(self) -> None:
        self.proof = None
        if self._structure is not None:
            self._structure.proved = True

    def _record(self) -> BoundProgram:
        graph = self._graph
        assert graph is not None
        self._search()
        numbers = Numbers(self.pool)
        program, unseen = record_pullback(graph, *self._specs, numbers, remembered=True)
        if self._structures.counts["recorded"] and self._counted is None:
            why = reasons.of_program(program) or self._watched.differs
            latest = self._structures.latest()
            before = None if latest is None else latest.signature
            self._structures.note(why or reasons.of_signature(graph, self._signature, before))
        self._count(reused=False)
        if self._signature is not None and self._structure is None and not program.fixed:
            recorded = portable(program, self.places)
            made = self._structure = Structure(self._signature, recorded, unseen)
            if recorded is not None and self._signature[-1]:
                made.common = Family(made, recorded).common
            self._structures.add(made, shared=graph.is_anybodys)
        program = unmarked(program)
        self._leave(PULLBACK, (True,) * len(self._specs[0]), program)
        return BoundProgram.of(program, numbers)

    def pulled_back(
        self, cotangents: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None] | None:
        """Return Jᵀ·u as PyTorch's engine computes it from the graph; None if a program has to.

        The engine may where a program would have to be looked for first, but not at the first
        point of a `Linearizer`: what is wrong with its programs is told by the first product. Nor
        may it once a point was asked for more than it gives: then a program pays from the start.
        """
        engine, structures = self._engine, self._structures
        if engine is None or self._searched or self._check == "always" or not structures.met:
            return None
        structures.pulls_much = structures.pulls_much or engine.spent
        return None if structures.pulls_much else engine(cotangents)

    # -- taken over -------------------------------------------------------------------------

    def known(
        self,
        direction: str,
        present: tuple[bool, ...],
        *,
        simplified: bool = True,
        costly: bool = True,
    ) -> tuple[Template, Binding] | None:
        """Return the program that another point left, with the numbers of this one.

        Parameters
        ----------
        direction
            Of the map.
        present
            Which arguments are not zero.
        simplified
            Whether a simplified program will do.
        costly
            Whether one is taken though another one's numbers cost less to compute.
        """
        with self.lock:
            if self._graph is None:
                return None
            self._search()
            if self._structure is None or (direction == PUSHFORWARD and self._owes_proof()):
                return None
            templates = self._structure.templates((direction, present))
            for template in templates if costly else sorted(templates, key=lambda t: t.cost):
                if template.simplified and not simplified:
                    continue
                if not self._same((*self._structure.unseen, *template.unseen)):
                    continue
                assert self._reader is not None
                binding = self._reader.bind(template)
                if binding is not None and self._agrees(template, binding, direction, present):
                    self._count(reused=True)
                    self._bound.append(binding)
                    self._watched.inlined(template.unseen)
                    return template, binding
            return None

    def inlined(self, calls: Sequence[Unseen]) -> None:
        """Take note of methods of custom Functions that were written down in a program."""
        self._watched.inlined(calls)
        if calls:
            self._anew(self._watched.differs)
        self._count(reused=True)

    def _anew(self, why: str) -> None:
        """Take note of why a point has to make a program that others had made."""
        if why and self._counted:
            self._structures.count("reused", -1)
            self._structures.note(why)
            self._counted = None
            self._count(reused=False)

    def _same(self, calls: Sequence[Unseen]) -> bool:
        """Whether what does not show what it does, does here what was recorded elsewhere."""
        assert self._graph is not None
        assert self._reader is not None
        return self._watched.agree(self._graph, calls, self._reader.read)

    def _agrees(
        self, template: Template, binding: Binding, direction: str, present: tuple[bool, ...]
    ) -> bool:
        """Whether a program of another point does what the graph of this one does.

        Looked at when it is first taken over. False if it loses digits here.

        Raises
        ------
        ReuseError
            If it does something else.
        """
        known = template.verified.is_set() and self._check != "always"
        if known or self._check == "never" or direction not in _COMPARED:
            return True
        if any(c.method == "jvp" for c in template.unseen):
            return True  # the graph has no backward to compare with
        assert self._graph is not None
        if self._comparison is None:
            self._comparison = Comparison(self._graph, *self._specs)
        called = frozenset(c.place for c in template.unseen)
        with torch.no_grad():  # also where a backward pass with a graph asks for a product
            same = self._comparison(
                template.executor, binding, present, called, forward=direction == PUSHFORWARD
            )
        if same:
            template.verified.set()
        if same is False:
            self._explain(template, direction, present)
        return same is not False

    def _explain(self, template: Template, direction: str, present: tuple[bool, ...]) -> None:
        """Raise unless a program that does not do what the graph does only loses digits."""
        known, reader = self._structure, self._reader
        assert known is not None
        assert reader is not None
        assert self._graph is not None
        assert self._comparison is not None
        numbers = Numbers()
        program, _ = record_pullback(self._graph, *self._specs, numbers, remembered=True)
        fresh = BoundProgram.of(program, numbers)
        turned = direction == PUSHFORWARD
        right = self._among_ranks(fresh.made(transpose)) if turned else fresh
        called = frozenset(c.place for c in template.unseen)
        pulled = functools.partial(self._comparison, forward=False)
        compare = functools.partial(self._comparison, called=called, forward=turned)
        for nearer, given in ((fresh, pulled), (right, compare)):
            if not given(Executor(nearer.program), nearer.binding, (True,) * len(nearer.inputs)):
                return  # what is recorded here is no nearer to the graph: both are rounding
        where = ""
        for other in known.templates((direction, present)):
            binding = None if other.simplified else reader.bind(other)
            if binding is None:
                continue
            if other is not template and compare(other.executor, binding, present):
                return  # the simplified program is less precise
            if all(present):
                where = first_parting(right, bound(other.program, binding))
        self._structures.drop(known)
        self._structure = None
        raise ReuseError(
            f"the {direction} recorded at another point of the same structure is not the one of "
            f"this graph, from {where or 'a node not known'} on; it was forgotten, and the next "
            "call records this point anew; please report this"
        )

    def better(self, direction: str, present: tuple[bool, ...]) -> Left | None:
        """Return what simplified program another point left whose numbers cost much."""
        with self.lock:
            known = self._structure
            if known is None:
                return None
            for t in known.templates((direction, present)):
                if t.simplified and t.cost:
                    return Left(t.program, t.cost)
            return None

    def learned(self, direction: str, present: tuple[bool, ...]) -> Learned:
        """Return what points of this structure have found out about a map."""
        with self.lock:
            known = self._structure
            return Learned() if known is None else known.learned((direction, present))

    def offer(
        self, direction: str, present: tuple[bool, ...], program: Program, *, simplified: bool
    ) -> Template | None:
        """Let other points take over a program; return what they run if they can."""
        if self._structure is None:
            return None
        turned = {PULLBACK: "jvp", PUSHFORWARD: "backward"}.get(direction)
        unseen = self._watched.methods(turned)
        template = Template.of(program, self.places, simplified=simplified, unseen=unseen)
        if template is None:
            if all(present) and not simplified:
                self._anew(reasons.of_program(program))
            return None
        return self._structure.offer((direction, present), template)

    def dense(self, limit: int) -> Dense | None:
        """Return what stands ready to become the matrix of both products."""
        with self.lock:
            if self._dense is None:
                outs, ins = self._specs
                # A method of this object's would make a cycle.
                taken = functools.partial(self._structures.count, "dense")
                self._dense = Dense.of(ins, outs, limit, taken, transpose)
            return self._dense

    @property
    def forms(self) -> CompiledForms:
        """What was compiled for points of the same `Linearizer`."""
        return self._structures.forms

    def count_compiled(self) -> None:
        """Take note that a program was compiled."""
        self._structures.count("compiled")

    def changed(self) -> bool:
        """Whether a tensor that the graph keeps was changed in place, as long as there is one.

        Without the lock: a thread that records the programs may hold it long.
        """
        graph = self._graph
        return graph is not None and graph.changed()

    def kept(self) -> Iterator[torch.Tensor]:
        """Yield the tensors that are kept for programs still to be made."""
        graph, pullback = self.waiting()
        if graph is not None:
            yield from graph.saved_tensors()
        elif pullback is not None:
            yield from pullback.kept_tensors()

    def waiting(self) -> tuple[Graph | None, BoundProgram | None]:
        """Return what programs are still to be made of: the graph, or the pullback."""
        graph = self._graph
        return graph, self._pullback if graph is None else None

    def _search(self) -> None:
        """Look once whether a point of the same structure was recorded."""
        if self._searched or self._graph is None:
            return
        graph = self._graph
        self._searched = True
        self.places = {id(custom): graph.places[node] for node, custom in graph.custom.items()}
        unhooked = self._engine is not None and self._engine.unhooked and not graph.layouts
        known = self._structures.recognised(graph, self._specs) if unhooked else None
        if known is not None:
            assert self._reader is not None
            self._structure, self._reader.seen = known
            self._signature = self._structure.signature
            return
        self._signature = outside_backward(lambda: signature(graph, self._specs))
        if self._signature is not None:
            self._structure = self._structures.find(
                self._signature, lambda s: self._same(s.unseen), shared=graph.is_anybodys
            )
            self._learn_to_match()

    def _learn_to_match(self) -> None:
        """Have graphs of the structure recognised sooner: there are several."""
        known, graph, engine = self._structure, self._graph, self._engine
        if known is None or known.unseen or graph is None or graph.layouts:
            return  # what does not show what it does has to be called
        if engine is not None and engine.unhooked:
            known.matcher = known.matcher or Matcher.of(graph, self._specs)

    def _count(self, *, reused: bool) -> None:
        if self._counted is None:
            self._counted = reused
            self._structures.count("reused" if reused else "recorded")

    def _let_go_of_graph(self) -> None:
        """Let go of the graph, once everything is made of it."""
        self._graph = self._engine = None
        self._watched.let_go()
        self._leaves, self._reader, self._comparison = [], None, None
        bindings, self._bound = self._bound, []
        ours = {id(r): r for b in bindings for r in (*b.residuals, *b.guards)}
        for b in bindings:
            b.guard_by(watched(b.guards, ours.values()))
