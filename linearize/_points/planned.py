"""The programs of a linear map at a point, and the plans that run them."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .._check.proof import Proof
from .._execute.binding import Binding, BoundProgram
from .._execute.executor import Executor
from .._forms.compiled import Options
from .._forms.dense import Dense
from .._forms.plan import Owed, Plan
from .._forms.succession import Learned, Left, Succession
from .._programs.numbers import Pool
from .._programs.origins import Origin
from .._programs.program import Program
from .._programs.residuals import Residual
from .._record.witness import Unseen
from .._reuse.template import Template
from .._simplify.worth import simplified
from .._spaces.memory import ON_RANKS
from .._spaces.space import Space
from .._torch.modes import outside_transforms
from .._transpose.missing import resolve
from .._transpose.transpose import transpose
from ..errors import ClosedError, CopyError
from .lifetime import Lifetime, tidy
from .notes import shared, value
from .policy import Policy
from .programs import PULLBACK, PUSHFORWARD, PointPrograms


def _nothing() -> None:
    """Do nothing."""


class Planned:
    """A linear map with the plans that run it.

    It outlives the objects that made it, and keeps only what it needs itself.
    """

    #: Name in messages.
    _name = "product"
    _direction = ""

    def __init__(
        self,
        make: Callable[[], BoundProgram],
        arguments: Space,
        results: Space,
        lifetime: Lifetime,
        policy: Policy,
        source: PointPrograms | None = None,
        joined: str = "",
        pool: Pool | None = None,
    ) -> None:
        self._make: Callable[[], BoundProgram] | None = make
        self._source = source
        #: What is known of the numbers of the point.
        self._pool = pool if pool is not None else Pool() if source is None else source.pool
        #: What it is called among the programs that points of one structure share.
        self._direction = joined or self._direction
        self._arguments = arguments
        self._results = results
        self._lifetime = lifetime
        self._policy = policy
        self._compiling = Options.of(policy.compile)
        self._hurry = False
        self._lock = threading.RLock()
        self._program: BoundProgram | None = None
        self._plans: dict[tuple[bool, ...], Plan] = {}
        #: The arguments that are there, if all are.
        self._whole = (True,) * len(arguments.tensors)
        self._turned: Planned | None = None
        #: Runs a settled product of one tensor; whether there was a look for it.
        self._short: Callable[[Any], Any] | None = None
        self._shortened = False
        #: Matrices that were written out at this point, by what they are of.
        self._matrices: dict[str, torch.Tensor] = {}
        #: What others found out about this point.
        self._own_notes: dict[str, Any] = {}
        #: Checks the product before its first use.
        self._first: Callable[[], None] | None = None
        lifetime.register(self)
        if source is not None and not joined:
            source.wait(self._direction, self)

    @property
    def program(self) -> BoundProgram:
        """The linear program, recorded when first needed."""
        self._check_open()
        with self._lock:
            if self._program is None:
                assert self._make is not None
                whole = self._plans.get(self._whole)
                # What is kept must be usable everywhere.
                with outside_transforms(), torch.inference_mode(False):
                    program = self._make() if whole is None else whole.program()
                self._check_open()
                self._program, self._make = program, None
                if self._source is not None:
                    self._source.served(self._direction)
                self._lifetime.changed()
            return self._program

    def __repr__(self) -> str:
        state = "closed" if self._lifetime.closed else f"from {self._arguments}"
        return f"<{self._name} {state}>"

    def __reduce__(self) -> Any:
        raise CopyError(f"a {self._name} cannot be copied or pickled: it holds graph contexts")

    def _check_open(self) -> None:
        if self._lifetime.closed:
            raise ClosedError(
                f"{self._name}: its linearization was closed (at the end of a `with` block, or by "
                "close()); linearize anew with at(...)"
            )

    def _notes(self) -> dict[str, Any]:
        """Return what is known of all points of this structure, to be added to."""
        notes = shared(self._source)
        return self._own_notes if notes is None else notes

    def _read(self, origin: Origin) -> torch.Tensor:
        """Return what a constant of the program is at this point.

        Raises
        ------
        LookupError
            If it is none of the program's.
        """
        t = value(self._source, origin)
        if t is not None:
            return t
        program = self.program
        for c, r in zip(program.program.constants, program.residuals(), strict=True):
            if c.origin is origin:
                return r.tensor
        raise LookupError

    def _release(self) -> None:
        with self._lock:
            self._make = self._program = self._turned = self._source = self._first = None
            self._short = None
            self._plans, self._matrices, self._own_notes = {}, {}, {}

    def _plan(self, present: tuple[bool, ...]) -> Plan:
        """Return what runs the program for arguments of which some are zero."""
        plan = self._plans.get(present)
        if plan is None:
            tidy()
            with self._lock:
                with outside_transforms(), torch.inference_mode(False):
                    plan = self._shared_plan(present) or self._own_plan(present)
                self._check_open()
                self._plans[present] = plan
                self._lifetime.changed()
                self._served(present, plan)  # last: whoever is interrupted asks once more
        return plan

    def _served(self, present: tuple[bool, ...], plan: Plan) -> None:
        """Let the point know that a plan needs no program of its own."""
        if self._source is not None and all(present) and not plan.may_ask:
            self._source.served(self._direction)

    def at_once(self) -> int:
        """Return how many arguments are best mapped in one pass."""
        if self._lifetime.ranks is not None:
            return ON_RANKS
        plan = self._plans.get(self._whole) or self._plan(self._whole)
        given = self._arguments.tensors
        return plan.at_once(given[0].device) if given else 1

    def _shared_plan(self, present: tuple[bool, ...]) -> Plan | None:
        """Take over what another point of the same structure left."""
        source = self._source
        if source is None or self._program is not None:
            return None
        known = source.known(
            self._direction, present, simplified=self._policy.simplify, costly=False
        )
        if known is None:
            return None
        template, binding = known
        simplify = self._policy.simplify
        left = source.better(self._direction, present) if simplify else None
        if template.simplified:
            left = None
        direction = self._direction  # a reference to the product itself would make a cycle

        def better() -> tuple[Executor, Binding] | None:
            with outside_transforms(), torch.inference_mode(False):
                found = source.known(direction, present)
            if all(present):
                source.served(direction)
            return None if found is None else (found[0].executor, found[1])

        return self._made_plan(
            present,
            template.executor,
            binding,
            simplify=simplify and not template.simplified,
            left=left,
            better=None if left is None else better,
        )

    def _own_plan(self, present: tuple[bool, ...]) -> Plan:
        """Make a plan of this point's program."""
        made = self.program
        numbers, program = made.numbers(self._pool), made.program
        if not all(present):
            program = program.restricted(present)
        source, calls = self._source, list[Unseen]()
        places = {} if source is None else source.places
        program = resolve(program, numbers, **self._policy.opaque, places=places, unseen=calls)
        if source is not None:
            source.inlined(calls)
        template = self._offer(present, program, simplified=False)
        return self._made_plan(
            present,
            Executor(program, final=False) if template is None else template.executor,
            Binding.of(program, numbers),
            simplify=self._policy.simplify,
            owed=self._owed(whole=all(present)),
        )

    def _owed(self, *, whole: bool) -> Owed | None:
        """Return what runs the map while its proof is owed; `whole`: no argument is zero."""
        proof = self._proof()
        if proof is None:
            return None

        def run(
            executor: Executor, binding: Binding, arguments: Sequence[torch.Tensor]
        ) -> tuple[list[torch.Tensor | None], bool]:
            return proof.run(executor, binding, arguments, whole), proof.settled

        return run

    def _made_plan(
        self,
        present: tuple[bool, ...],
        executor: Executor,
        binding: Binding,
        *,
        simplify: bool,
        left: Left | None = None,
        **more: Any,
    ) -> Plan:
        me = weakref.ref(self)  # a reference to the product itself would make a cycle

        def taken(program: BoundProgram) -> Executor | None:
            product = me()
            return None if product is None else product._take_note(program, present)

        source = self._source
        learned = Learned() if source is None else source.learned(self._direction, present)
        succession = Succession(
            simplify=simplify,
            at=None if left is None else left.due(executor.program),
            dense=self._dense(executor.program, present, learned),
            compiling=self._compiling,
            soon=self._hurry,
            learned=learned,
        )
        return Plan(
            executor,
            binding,
            succession=succession,
            simplified=functools.partial(simplified, pool=self._pool),
            forward=self._direction != PULLBACK,
            forms=None if source is None else source.forms,
            counted=_nothing if source is None else source.count_compiled,
            taken=taken,
            **more,
        )

    def _dense(
        self, program: Program, present: tuple[bool, ...], learned: Learned
    ) -> Dense | None:
        """Return what may become the matrix of a program."""
        policy, source = self._policy, self._source
        if not (policy.simplify and policy.dense_limit and all(present)):
            return None
        if learned.matrix is False:
            return None
        if program.is_of_point:
            return None  # custom Functions are promised one call for each product
        if source is not None and self._direction in (PUSHFORWARD, PULLBACK):
            dense = source.dense(policy.dense_limit)
        else:
            sides = self._arguments.tensors, self._results.tensors
            dense = Dense.of(*sides, policy.dense_limit, lambda: None, transpose)
        if dense is not None and learned.matrix:
            if learned.again is None:  # once for all points: it goes through the program
                learned.again = dense.again(program)
            dense.due = min(dense.due, learned.again)
        return dense

    def _written(self, matrix: torch.Tensor) -> None:
        """Let products use the matrix of the pushforward, if that is cheaper."""
        policy, source = self._policy, self._source
        real = not any(
            s.dtype.is_complex for s in (*self._arguments.tensors, *self._results.tensors)
        )
        dense = source.dense(policy.dense_limit) if source is not None and real else None
        if dense is not None:
            dense.written(matrix)

    def _proof(self) -> Proof | None:
        """Return what is to be checked before the first product is handed out."""
        source = self._source
        return source.proof if source is not None and self._direction == PUSHFORWARD else None

    def _proved(self) -> BoundProgram:
        """Return the program, checked: it goes elsewhere."""
        program = self.program
        proof = self._proof()
        if proof is not None:
            proof.complete()
        return program

    def _compile(self, options: Options) -> None:
        """Have the programs compiled, or not, those to come too."""
        with self._lock:
            self._compiling, self._hurry = options, True
            plans = list(self._plans.values())
        for plan in plans:
            plan.compile(options)
        with self._lock:  # afterwards: a plan that is not quiet any more gives no short way
            self._short, self._shortened = None, False

    def _offer(
        self, present: tuple[bool, ...], program: Program, *, simplified: bool
    ) -> Template | None:
        source = self._source
        if source is None:
            return None
        return source.offer(self._direction, present, program, simplified=simplified)

    def _take_note(self, program: BoundProgram, present: tuple[bool, ...]) -> Executor | None:
        """Let go of the program as it was recorded: a simplified one gives the same.

        Returns
        -------
        Executor or None
            What runs it for other points too.
        """
        with self._lock:
            template = self._offer(present, program.program, simplified=True)
            if self._program is not None and all(present):
                self._program = program
        self._lifetime.changed()
        return None if template is None else template.executor

    def _residuals(self) -> list[Residual]:
        """Return what must not have changed for this product, as far as it is recorded."""
        program, plans = self._program, list(self._plans.values())
        bindings = [] if program is None else [program.binding]
        bindings += [b for plan in plans for b in plan.bindings()]
        return [r for b in bindings for r in b.watched()]

    def _programs(self) -> Iterator[BoundProgram]:
        """Yield each program that is kept."""
        program, plans = self._program, list(self._plans.values())
        if program is not None:
            yield program
        for plan in plans:
            yield from plan.programs()

    def _kept(self) -> Iterator[torch.Tensor]:
        """Yield the tensors that this product keeps alive."""
        program, plans = self._program, list(self._plans.values())
        yield from list(self._matrices.values())
        if program is not None:
            yield from program.kept_tensors()
        for plan in plans:
            for binding in plan.bindings():
                yield from binding.kept()
