"""How a linear map is run, from its first product to its thousandth.

A `Plan` begins with the program as it was recorded, held against its transpose at the first
product. As more products are asked for, better forms take over, each compared with the one
before it: the simplified program, that one compiled, the matrix. `succession` says when.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, TypeAlias

import torch

from .._execute.binding import Binding, BoundProgram, bound
from .._execute.executor import Executor
from .._execute.mapped import stack_results
from .._execute.shortcut import Closable, short_way
from .._execute.thresholds import MOST_STACKS, STACK_COMPARED
from .._spaces.compare import all_close, close, rounding
from .._torch.modes import functorch_active
from .compiled import Compiled, Options, compiled
from .dense import Dense, can_be_looked_at, can_be_trusted, numbers_at_hand, random_arguments
from .segments import Segments
from .stacks import Stack, at_once, stacks_of
from .succession import Form, Succession

Results: TypeAlias = Sequence[torch.Tensor | None]
#: Runs a map for the first time, and tells whether all is checked that had to be before that.
Owed: TypeAlias = Callable[
    [Executor, Binding, Sequence[torch.Tensor]], tuple[list[torch.Tensor | None], bool]
]
#: What was compiled, by what runs it otherwise; None where that failed or does not pay.
CompiledForms: TypeAlias = MutableMapping[Executor, Segments | None]


class Plan:
    """How a map is run.

    Parameters
    ----------
    executor, binding
        What is run.
    succession
        Decides when another form takes over.
    simplified
        Gives the simplified program, None if it saves too little to be tried.
    owed
        Runs the map as long as something is to be checked before a result is handed out.
    forward
        Whether the map is a pushforward, else its matrix is a transpose.
    forms
        What was compiled for other points, and receives what is compiled for this one.
    counted
        Called when a program was compiled.
    better
        Gives the simplified program that another point left and the numbers of this one, where
        these are not computed before it is worth it.
    taken
        Called when another program has taken over; gives what runs it for other points too.
    """

    def __init__(
        self,
        executor: Executor,
        binding: Binding,
        *,
        succession: Succession,
        simplified: Callable[[BoundProgram], BoundProgram | None],
        owed: Owed | None = None,
        forward: bool = True,
        forms: CompiledForms | None = None,
        counted: Callable[[], None] = lambda: None,
        better: Callable[[], tuple[Executor, Binding] | None] | None = None,
        taken: Callable[[BoundProgram], Executor | None] = lambda _: None,
    ) -> None:
        #: What runs, what runs inside of transforms, and the numbers. One reference, so that a
        #: change is seen as a whole.
        self._running: tuple[Executor | Compiled, Executor, Binding] = executor, executor, binding
        #: What a matrix took the place of: it spreads an infinity or a NaN to all results.
        self._exact: tuple[Executor, Binding] | None = None
        self._succession = succession
        self._simplify = simplified
        self._owed = owed
        self._forward = forward
        self._forms: CompiledForms = {} if forms is None else forms
        self._counted = counted
        self._better = better
        self._taken = taken
        self._lock = threading.Lock()
        #: What runs stacks of each size.
        self._stacked: dict[int, tuple[Executor, Binding]] = {}

    def __call__(self, arguments: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """Run the map."""
        exact = self._exact
        if exact is not None:
            return self._by_matrix(arguments, *exact)
        return self._proceed(arguments)

    def _by_matrix(
        self, arguments: Sequence[torch.Tensor], executor: Executor, binding: Binding
    ) -> list[torch.Tensor | None]:
        """Run the map by its matrix, and without it where something is not finite."""
        if can_be_looked_at():
            results = self._proceed(arguments)
            if can_be_trusted(results):
                return results
        return executor(arguments, binding)

    def _proceed(self, arguments: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """Run the map, or another form of it if one is due."""
        run, executor, binding = self._running
        if self._succession.quiet:
            return run(arguments, binding)
        owed = self._owed  # another thread may settle it
        if owed is not None:
            results, settled = owed(executor, binding, arguments)
            if settled:
                self._owed = None
            return results
        form = self._succession.due(executor.runs)
        if form is not None and _undisturbed() and self._lock.acquire(blocking=False):
            try:
                return self._try(form, arguments)
            finally:
                self._lock.release()
        return run(arguments, binding)

    def short_way(self, lifetime: Closable, *, in_tuple: bool) -> Callable[[Any], Any] | None:
        """Return what runs a settled map of one tensor quickest, None if it is not one."""
        run, executor, binding = self._running
        if run is not executor or not self.quiet:
            return None
        fine = None if self._exact is None else can_be_trusted
        return short_way(executor, binding, lifetime, in_tuple=in_tuple, fine=fine)

    @property
    def quiet(self) -> bool:
        """Whether there is nothing to do at a call but to run what is there."""
        return self._succession.quiet

    def compile(self, options: Options) -> None:
        """Have the map compiled at one of the next calls."""
        _, executor, _ = self._running
        if self._forms.get(executor) is None:
            self._forms.pop(executor, None)  # tried anew
        self._succession.compile(options)

    @property
    def makes_history(self) -> bool:
        """Whether autograd would record a call in grad mode."""
        return self._running[2].makes_history or functorch_active()

    @property
    def binding(self) -> Binding:
        """The numbers that are used."""
        return self._running[2]

    def program(self) -> BoundProgram:
        """Return what is run, with its numbers."""
        _, executor, binding = self._running
        return bound(executor.program, binding)

    # -- many arguments at once ---------------------------------------------------------

    def stacked(
        self,
        arguments: Sequence[torch.Tensor],
        mapped: Callable[[], Sequence[torch.Tensor]],
    ) -> Sequence[torch.Tensor | None]:
        """Apply the map to stacks of arguments, along their first dimension; without grad mode.

        By a program of its own if it gives what `mapped` does, as soon as stacks of this length
        have come twice, at any point.
        """
        count = len(arguments[0])
        ready = self._stacked.get(count)
        if ready is None:
            return self._first_stack(count, arguments, mapped)
        executor, binding = ready
        results = executor(arguments, binding)
        if self._exact is None or can_be_trusted(results):
            return results
        return mapped()

    def _first_stack(
        self,
        count: int,
        arguments: Sequence[torch.Tensor],
        mapped: Callable[[], Sequence[torch.Tensor]],
    ) -> Sequence[torch.Tensor | None]:
        """Apply the map to a stack for which nothing is bound yet."""
        _, executor, binding = self._running
        stacks = stacks_of(executor)
        if not stacks.gain:
            return self._looped(arguments)
        if count < 2 or executor.program.is_opaque():  # user code is not called to try something
            return mapped()
        if count not in stacks.known:
            if not stacks.due(count):
                return mapped()
            if not self._succession.settled and self._lock.acquire(blocking=False):
                try:
                    self._try(Form.SIMPLIFIED, [t[0] for t in arguments])
                finally:
                    self._lock.release()
            _, executor, binding = self._running
            stacks = stacks_of(executor)
        if count not in stacks.known:
            stacks.keep(count, Stack.of(executor.program, binding, count))
        stack = stacks.known.get(count)
        if stack is None:
            return mapped()
        if len(self._stacked) >= MOST_STACKS:
            self._stacked.clear()
        ready = stack.executor, stack.bind(binding)
        if stack.compared >= STACK_COMPARED:
            self._stacked[count] = ready
            return self.stacked(arguments, mapped)
        expected = mapped()
        if _gives_stack(*ready, arguments, expected):
            stack.compared += 1
            self._stacked[count] = ready
        else:
            stacks.known[count] = None
        return expected

    def _looped(self, arguments: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        rows = [self(row) for row in zip(*(t.unbind() for t in arguments), strict=True)]
        return [stack_results(column) for column in zip(*rows, strict=True)]

    def at_once(self, device: torch.device) -> int:
        """Return how many arguments are best taken in one pass."""
        return at_once(self._running[1].program, device)

    def bindings(self) -> list[Binding]:
        """Return the numbers that are used, those for stacks too."""
        return [binding for _, binding in self._all()]

    def programs(self) -> list[BoundProgram]:
        """Return what is run, with its numbers; stacks too."""
        return [bound(e.program, b) for e, b in self._all()]

    def _all(self) -> list[tuple[Executor, Binding]]:
        exact = [] if self._exact is None else [self._exact]
        return [self._running[1:], *exact, *self._stacked.values()]

    @property
    def may_ask(self) -> bool:
        """Whether it asks for a program that another point left, later on."""
        return self._better is not None

    # -- better forms -------------------------------------------------------------------

    def _try(self, form: Form, arguments: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """Run as before, and try another form, once."""
        _, executor, binding = self._running
        tape: list[Any] = []
        results = executor(arguments, binding, tape)
        given = self._succession.begins(form)
        if given is None:
            return results
        if form is Form.SIMPLIFIED:
            self._try_simplified(arguments, tape, results)
        elif form is Form.COMPILED:
            self._try_compiled(given, arguments, tape, results)
        else:
            self._try_dense(given, arguments, results)
        return results

    def _try_simplified(
        self, arguments: Sequence[torch.Tensor], tape: list[Any], results: Results
    ) -> None:
        """Take the simplified program, a new one or one that another point left.

        It must save something and give the same, as precisely: a sum of large terms that cancel
        may lose digits when a factor goes to each term.
        """
        better, self._better = self._better, None
        if better is not None:
            known = better()
            if known is not None and self._gives(*known, arguments, tape, results):
                self._run(*known)
            return
        with torch.inference_mode(False), torch.no_grad():
            after = self._simplify(self.program())
        if after is not None:
            smaller = Executor(after.program)
            if self._gives(smaller, after.binding, arguments, tape, results):
                self._take(smaller, after)
                return
        self._succession.learned.simplifies = False

    def _gives(
        self,
        executor: Executor,
        binding: Binding,
        arguments: Sequence[torch.Tensor],
        tape: list[Any],
        expected: Results,
    ) -> bool:
        """Whether a program gives what another one gave; user code is not called again."""
        found, function = executor.first(arguments, binding, tape)
        same = all_close(found, expected, rounding)
        if same and function is not None and _same_dtypes(found, expected):
            executor.adopt(function)
        return same

    def _try_dense(
        self, dense: Dense, arguments: Sequence[torch.Tensor], results: Results
    ) -> None:
        """Take the matrix if that costs less and gives the same."""
        _, executor, old = self._running
        learned = self._succession.learned
        with torch.inference_mode(False), torch.no_grad():
            before = self.program()
            after = dense.program(before, forward=self._forward)
            learned.matrix = False
            if after is None:
                return
            smaller, binding = Executor(after.program), after.binding
            probe = random_arguments(before)
            # A result that is not finite is left to the program anyway.
            if all_close(smaller(probe, binding), executor(probe, old), rounding) and (
                not can_be_trusted(results)
                or all_close(smaller(arguments, binding), results, rounding)
            ):
                if dense.spreads:
                    if not numbers_at_hand(dense.spec.device):
                        return
                    self._exact = executor, old
                learned.matrix = True
                self._take(smaller, after)
                dense.taken()

    def _take(self, executor: Executor, after: BoundProgram) -> None:
        after.binding.follow(self.binding)
        self._run(executor, after.binding)
        shared = self._taken(after)
        if shared is not None:
            if executor.function is not None and shared.program is executor.program:
                shared.adopt(executor.function)
            self._run(shared, after.binding)

    def _run(self, executor: Executor, binding: Binding) -> None:
        self._running = executor, executor, binding
        self._stacked = {}

    def _try_compiled(
        self,
        options: Options,
        arguments: Sequence[torch.Tensor],
        tape: list[Any],
        results: Results,
    ) -> None:
        """Take the program compiled if that gives the same; one serves all points."""
        _, executor, binding = self._running
        if executor not in self._forms:
            again = binding.replaying(tape)
            with torch.inference_mode(False), torch.no_grad():
                made = compiled(executor, again, options, arguments, results)
            self._forms[executor] = made
            if made is not None:
                self._counted()
        segments = self._forms[executor]
        if segments is not None:
            run = Compiled(segments, executor, options, arguments[0].device)
            self._running = run, executor, binding


def _gives_stack(
    executor: Executor,
    binding: Binding,
    arguments: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
) -> bool:
    """Whether a program for stacks gives what mapping over them does."""
    try:
        with torch.no_grad():
            results = executor(arguments, binding)
    except RuntimeError as error:  # what PyTorch maps need not be possible in another way
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return False
    return all(
        not b.any() if a is None else close(a, b, rounding)
        for a, b in zip(results, expected, strict=True)
    )


def _same_dtypes(a: Sequence[torch.Tensor | None], b: Sequence[torch.Tensor | None]) -> bool:
    return all(x is None or y is None or x.dtype == y.dtype for x, y in zip(a, b, strict=True))


def _undisturbed() -> bool:
    """Whether nobody transforms or captures what is run now."""
    capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    return not (capturing or functorch_active())
