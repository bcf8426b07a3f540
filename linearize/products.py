"""Floor 4: the two products of a linearization, as functions."""

from __future__ import annotations

import functools
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ._execute import Binding, Executor, filled
from ._linearity import close, rounding
from ._program import Program, Residual
from ._simplify import guards, simplify
from ._source import PULLBACK, PUSHFORWARD, Source
from ._space import Space
from ._structure import Template
from ._torch import functorch_active, outside_transforms
from ._transpose import Policy, resolve, transpose
from ._vectorize import vectorized
from .errors import ClosedError, CopyError, StructureError

#: At which call a program is simplified: sooner would cost more than it saves.
SIMPLIFY_AT = 3
#: For how many sizes of stacks programs are kept.
MOST_STACKS = 4


class _Plan:
    """How a map is run: as recorded at first, simplified once it is run again and again.

    Parameters
    ----------
    executor, binding
        What is run.
    settled
        Whether nothing is to be simplified (any more).

    Attributes
    ----------
    news
        The simplified program that has taken over, until somebody takes note.
    """

    def __init__(
        self,
        executor: Executor,
        binding: Binding,
        *,
        settled: bool,
    ) -> None:
        #: One reference, so that a change is seen as a whole.
        self._running = executor, binding
        self._settled = settled
        self.news: Program | None = None
        self._lock = threading.Lock()
        #: How often stacks of each size came, and what runs them.
        self._counts: Counter[int] = Counter()
        self._stacked: dict[int, tuple[Executor, Binding] | None] = {}

    def __call__(self, arguments: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        executor, binding = self._running
        due = not self._settled and executor.runs >= SIMPLIFY_AT - 1
        if due and not functorch_active() and self._lock.acquire(blocking=False):
            try:
                return self._settle(arguments)
            finally:
                self._settled = True
                self._lock.release()
        return executor(arguments, binding)

    def stacked(
        self,
        arguments: Sequence[torch.Tensor],
        mapped: Callable[[], Sequence[torch.Tensor]],
    ) -> Sequence[torch.Tensor | None]:
        """Apply the map to stacks of arguments, along their first dimension.

        From the second time on by a program of its own, if it gives what `mapped` does.
        """
        count = len(arguments[0])
        known = self._stacked.get(count)
        if known is not None:
            executor, binding = known
            with torch.no_grad():
                return executor(arguments, binding)
        if not self._running[0].gains_by_stacks:
            with torch.no_grad():
                return self._looped(arguments)
        self._counts[count] += 1
        if self._counts[count] < 2 or count in self._stacked or count < 2:
            return mapped()
        if not self._settled and self._lock.acquire(blocking=False):
            try:
                with torch.no_grad():
                    self._settle([t[0] for t in arguments])
            finally:
                self._settled = True
                self._lock.release()
        expected = mapped()
        if len(self._stacked) >= MOST_STACKS:
            self._stacked.clear()
        self._stacked[count] = self._stacked_program(count, arguments, expected)
        return expected

    def _looped(self, arguments: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        rows = [self(row) for row in zip(*(t.unbind() for t in arguments), strict=True)]
        stacks: list[torch.Tensor | None] = []
        for column in zip(*rows, strict=True):
            like = next((t for t in column if t is not None), None)
            some = [torch.zeros_like(like) if t is None else t for t in column]  # type: ignore[arg-type]
            stacks.append(None if like is None else torch.stack(some))
        return stacks

    def _stacked_program(
        self, count: int, arguments: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]
    ) -> tuple[Executor, Binding] | None:
        before = self.program()
        with torch.inference_mode(False), torch.no_grad():
            after = vectorized(before, count)
        if after is None:
            return None
        executor, binding = Executor(after), Binding.of(after)
        with torch.no_grad():
            results = executor(arguments, binding)
        if not all(
            not b.any() if a is None else close(a, b, rounding)
            for a, b in zip(results, expected, strict=True)
        ):
            return None
        binding.guard_by([*guards(before, after), *self._running[1].guards])
        return executor, binding

    def bindings(self) -> list[Binding]:
        """Return the numbers that are used, those for stacks too."""
        stacked = [known[1] for known in self._stacked.values() if known is not None]
        return [self._running[1], *stacked]

    @property
    def makes_history(self) -> bool:
        """Whether autograd would record a call in grad mode."""
        return self._running[1].makes_history or functorch_active()

    @property
    def binding(self) -> Binding:
        """The numbers that are used."""
        return self._running[1]

    def program(self) -> Program:
        """Return what is run, with its numbers."""
        executor, binding = self._running
        return filled(executor.program, binding)

    def _settle(self, arguments: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """Run as before, and take the simplified program if it gives the same, as precisely.

        A sum of large terms that cancel may lose digits when a factor goes to each term.
        """
        tape: list[Any] = []
        executor, old = self._running
        results = executor(arguments, old, tape)
        before = filled(executor.program, old)
        with torch.inference_mode(False), torch.no_grad():
            after = simplify(before)
        smaller = Executor(after)
        binding = Binding.of(after)
        again = smaller(arguments, binding, tape, replay=True)
        if all(
            (a is None) == (b is None) and (a is None or b is None or close(a, b, rounding))
            for a, b in zip(again, results, strict=True)
        ):
            binding.guard_by([*guards(before, after), *old.guards])
            self._running = smaller, binding
            self._stacked = {}
            self.news = after
        return results

    def use(self, executor: Executor) -> None:
        """Run the same program by an executor that other points use too."""
        self._running = executor, self.binding


class Lifetime:
    """Whether a point is open, and what to release when it closes."""

    def __init__(self, notify: Callable[[], None] | None) -> None:
        self.closed = False
        self._notify = notify
        self._parts: weakref.WeakSet[Any] = weakref.WeakSet()
        self._lock = threading.Lock()

    def register(self, part: Any) -> None:
        """Have `part._release()` called at the end, if it lives that long."""
        with self._lock:
            self._parts.add(part)

    def close(self) -> None:
        """Release all parts."""
        with self._lock:
            self.closed = True
            parts = list(self._parts)
        for part in parts:
            part._release()
        self.changed()

    def changed(self) -> None:
        """Tell the memo that the point has grown or was closed."""
        if self._notify is not None:
            self._notify()


class Product:
    """A linear map as a function: the common part of `jvp_fn` and `vjp_fn`.

    A product outlives the objects that made it, and keeps only what it needs itself. It may
    be called from several threads, under `torch.no_grad` and in inference mode. If an
    argument requires grad, the result is differentiable with respect to the argument.
    """

    #: Name in messages.
    _name = "product"
    _direction = ""

    def __init__(
        self,
        make: Callable[[], Program],
        arguments: Space,
        results: Space,
        lifetime: Lifetime,
        policy: Policy,
        source: Source | None = None,
        joined: str = "",
    ) -> None:
        self._make: Callable[[], Program] | None = make
        self._source = source
        #: What it is called among the programs that points of one structure share.
        self._direction = joined or self._direction
        self._arguments = arguments
        self._results = results
        self._lifetime = lifetime
        self._policy = policy
        self._lock = threading.RLock()
        self._program: Program | None = None
        self._plans: dict[tuple[bool, ...], _Plan] = {}
        self._turned: Product | None = None
        lifetime.register(self)
        if source is not None and not joined:
            source.wait(self._direction, self)

    @property
    def program(self) -> Program:
        """The linear program, recorded when first needed."""
        self._check_open()
        with self._lock:
            if self._program is None:
                assert self._make is not None
                whole = self._plans.get((True,) * len(self._arguments.tensors))
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

    def _release(self) -> None:
        with self._lock:
            self._make = self._program = self._turned = self._source = None
            self._plans = {}

    def _plan(self, present: tuple[bool, ...]) -> _Plan:
        """Return what runs the program for arguments of which some are zero."""
        plan = self._plans.get(present)
        if plan is None:
            with self._lock:
                with outside_transforms(), torch.inference_mode(False):
                    plan = self._shared_plan(present) or self._own_plan(present)
                self._check_open()
                self._plans[present] = plan
                self._lifetime.changed()
        return plan

    def _shared_plan(self, present: tuple[bool, ...]) -> _Plan | None:
        """Take over what another point of the same structure left."""
        source = self._source
        if source is None or self._program is not None:
            return None
        known = source.known(self._direction, present, simplified=self._policy.simplify)
        if known is None:
            return None
        template, binding = known
        if all(present):
            source.served(self._direction)
        return _Plan(
            template.executor,
            binding,
            settled=template.simplified or not self._policy.simplify,
        )

    def _own_plan(self, present: tuple[bool, ...]) -> _Plan:
        """Make a plan of this point's program."""
        program = self.program
        if not all(present):
            program = program.restricted(present)
        program = resolve(program, self._policy)
        template = self._offer(present, program, simplified=False)
        return _Plan(
            Executor(program) if template is None else template.executor,
            Binding.of(program),
            settled=not self._policy.simplify,
        )

    def _offer(
        self, present: tuple[bool, ...], program: Program, *, simplified: bool
    ) -> Template | None:
        source = self._source
        if source is None:
            return None
        return source.offer(self._direction, present, program, simplified=simplified)

    def _take_note(self, plan: _Plan, present: tuple[bool, ...]) -> None:
        """Let go of the program as it was recorded: a simplified one gives the same."""
        with self._lock:
            program, plan.news = plan.news, None
            if program is None:
                return
            template = self._offer(present, program, simplified=True)
            if template is not None:
                plan.use(template.executor)
            if self._program is not None and all(present):
                self._program = program
        self._lifetime.changed()

    def _batched(
        self, tensors: Sequence[torch.Tensor | None], chunk_size: int | None
    ) -> list[torch.Tensor]:
        """Apply the map to stacks of arguments, along their first dimension."""
        given = [t for t in tensors if t is not None]
        present = tuple([t is not None for t in tensors])

        def one(*parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
            rest = iter(parts)
            return tuple(self._apply([next(rest) if here else None for here in present]))

        differentiable = torch.is_grad_enabled() and _wants_history(given)
        if differentiable or functorch_active() or not len(given[0]):
            return list(torch.vmap(one, chunk_size=chunk_size)(*given))
        self._check_open()
        plan = self._plans.get(present) or self._plan(present)
        size = chunk_size or len(given[0])
        each = torch.vmap(one)
        chunks = [
            self._stack(plan, present, parts, functools.partial(each, *parts))
            for parts in zip(*(t.split(size) for t in given), strict=True)
        ]
        return [c[0] if len(c) == 1 else torch.cat(c) for c in zip(*chunks, strict=True)]

    def _stack(
        self,
        plan: _Plan,
        present: tuple[bool, ...],
        parts: Sequence[torch.Tensor],
        mapped: Callable[[], Sequence[torch.Tensor]],
    ) -> list[torch.Tensor]:
        results = plan.stacked(parts, mapped)
        if plan.news is not None:
            self._take_note(plan, present)
        return [
            spec.zeros().expand(len(parts[0]), *spec.shape).clone() if t is None else t
            for t, spec in zip(results, self._results.tensors, strict=True)
        ]

    def _apply(self, tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        """Apply the map to flat lists of tensors, None for zero."""
        grad = torch.is_grad_enabled()
        if grad and _wants_history(tensors):
            return list(_DifferentiableProduct.apply(self, *tensors))  # type: ignore[no-untyped-call]
        present = tuple([t is not None for t in tensors])
        self._check_open()
        plan = self._plans.get(present) or self._plan(present)
        given: Any = tensors if all(present) else [t for t in tensors if t is not None]
        if grad and plan.makes_history:
            with torch.no_grad():
                results = plan(given)
        else:
            results = plan(given)
        if plan.news is not None:
            self._take_note(plan, present)
        return [
            spec.zeros() if t is None else t
            for t, spec in zip(results, self._results.tensors, strict=True)
        ]

    def _then(self, other: Product, name: str) -> Product:
        """Return this product followed by another one, as one program: one pass.

        If both are of one point, other points of the same structure take the program over.
        """
        mine, theirs = self._source, other._source
        return Product(
            lambda: self.program.then(other.program, name),
            self._arguments,
            other._results,
            self._lifetime,
            self._policy,
            mine if mine is theirs else None,
            name,
        )

    def _transposed(self) -> Product:
        """Return the other product."""
        with self._lock:
            if self._turned is None:
                self._turned = Product(
                    lambda: transpose(self.program, f"transpose of {self.program.name}"),
                    self._results,
                    self._arguments,
                    self._lifetime,
                    self._policy,
                )
            return self._turned

    def _residuals(self) -> list[Residual]:
        """Return the residuals of this product, as far as it is recorded."""
        program, plans = self._program, list(self._plans.values())
        residuals = [] if program is None else program.residuals()
        bindings = [b for plan in plans for b in plan.bindings()]
        return [*residuals, *(r for b in bindings for r in b.residuals)]

    def _kept(self) -> Iterator[torch.Tensor]:
        """Yield the tensors that this product keeps alive."""
        program, plans = self._program, list(self._plans.values())
        if program is not None:
            yield from program.kept_tensors()
        for plan in plans:
            for binding in plan.bindings():
                yield from binding.kept()


class _DifferentiableProduct(torch.autograd.Function):
    """A product as a function of its argument: its derivative is the other product."""

    generate_vmap_rule = True

    @staticmethod
    def forward(product: Product, *tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        return tuple(product._apply([None if t is None else t.detach() for t in tensors]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.product = inputs[0]
        ctx.given = [t is not None for t in inputs[1:]]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        results = ctx.product._transposed()._apply(grads)
        return (None, *(r if w else None for r, w in zip(results, ctx.given, strict=True)))

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: torch.Tensor | None) -> Any:
        return tuple(ctx.product._apply(tangents))


def _wants_history(tensors: Sequence[torch.Tensor | None]) -> bool:
    for t in tensors:  # noqa: SIM110 (quicker than any(), and this runs at every call)
        if t is not None and t.requires_grad:
            return True
    return False


def _stack_sizes(space: Space, flat: Sequence[torch.Tensor | None]) -> None:
    sizes = {t.shape[0] for t in flat if t is not None}
    if len(sizes) != 1:
        raise StructureError(
            f"batched: expected {space.word}s stacked along their first dimension, all of one "
            f"length, got lengths {sorted(sizes)}"
        )


class JvpFn(Product):
    """The pushforward of a linearization: tangents of the primals to the tangent of the value.

    Call it with one tangent per primal, each structured like the primal; None, for a whole
    primal or any part of it, is zero. The result is structured like the value; leaves that
    have no tangent (integers, strings) are None.

    Raises
    ------
    StructureError, SpaceError
        If a tangent does not fit; the message names it.
    StalenessError
        If a residual was changed in place since the linearization.
    ClosedError
        If the linearization was closed.
    MissingDerivativeError
        If a custom Function has no `jvp` and its `backward` cannot be transposed.
    """

    _name = "jvp_fn"
    _direction = PUSHFORWARD

    def __call__(self, *tangents: Any) -> Any:
        """Return J·v."""
        self._check_open()
        flat = self._arguments.flatten(tangents)
        return self._results.unflatten(self._apply(flat))

    def batched(self, *tangents: Any, chunk_size: int | None = None) -> Any:
        """Return J·v for K tangents in one pass.

        Parameters
        ----------
        *tangents
            As for a single product, each tensor with a first dimension of length K.
        chunk_size
            How many are taken at once, which bounds the memory; None for all.

        Returns
        -------
        pytree
            Structured like the value, each tensor with a first dimension of length K.

        Raises
        ------
        StructureError, SpaceError
            If a tangent does not fit.

        Notes
        -----
        Built-in operations are vectorised (`torch.vmap`); custom Functions are called once per
        tangent, inside the pass.
        """
        self._check_open()
        flat = self._arguments.flatten(tangents, stacked=True)
        _stack_sizes(self._arguments, flat)
        return self._results.unflatten(self._batched(flat, chunk_size))


class VjpFn(Product):
    """The pullback of a linearization: a cotangent of the value to those of the primals.

    Call it with one cotangent structured like the value; None, for all or any part of it, is
    zero. The result is a tuple with one entry per primal; leaves that have no tangent are
    None. For complex numbers this is Jᴴ·u, PyTorch's convention for gradients.

    Raises
    ------
    StructureError, SpaceError
        If the cotangent does not fit; the message names the leaf.
    StalenessError
        If a residual was changed in place since the linearization.
    ClosedError
        If the linearization was closed.
    MissingDerivativeError
        If a custom Function has no `backward` and its `jvp` cannot be transposed.
    """

    _name = "vjp_fn"
    _direction = PULLBACK

    def __call__(self, *cotangent: Any) -> Any:
        """Return Jᵀ·u (Jᴴ·u for complex numbers)."""
        self._check_open()
        if len(cotangent) != 1:
            raise StructureError(
                "vjp_fn: expected 1 cotangent, structured like the value (for a tuple of outputs, "
                f"one tuple), got {len(cotangent)}"
            )
        flat = self._arguments.flatten(cotangent[0])
        return self._results.unflatten(self._apply(flat))

    def batched(self, cotangent: Any, *, chunk_size: int | None = None) -> Any:
        """Return Jᵀ·u for K cotangents in one pass.

        Parameters
        ----------
        cotangent
            As for a single product, each tensor with a first dimension of length K.
        chunk_size
            How many are taken at once, which bounds the memory; None for all.

        Returns
        -------
        tuple
            One entry per primal, each tensor with a first dimension of length K.

        Raises
        ------
        StructureError, SpaceError
            If the cotangent does not fit.
        """
        self._check_open()
        flat = self._arguments.flatten(cotangent, stacked=True)
        _stack_sizes(self._arguments, flat)
        return self._results.unflatten(self._batched(flat, chunk_size))
