"""How a linear map is run, from its first product to its thousandth.

A `Plan` begins with the program as it was recorded, held against its transpose at the first
product. As more products are asked for, better forms take over, each compared with the one
before it: the simplified program, that one compiled, the matrix.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .._check.proof import Proof
from .._execute.binding import Binding, BoundProgram, bound
from .._execute.executor import Executor
from .._execute.mapped import stack_results
from .._execute.shortcut import Closable, short_way
from .._programs.numbers import Pool
from .._simplify.passes import simplify
from .._spaces.compare import close, rounding
from .._torch.modes import functorch_active
from ..errors import CompilationWarning
from .compiled import Options, compiled, replayed
from .cuda_graphs import Replays, capture_on_cuda
from .dense import Dense, can_be_looked_at, can_be_trusted, random_arguments
from .segments import Segments
from .stacked import vectorized

#: At which call a program is simplified: sooner would cost more than it saves.
SIMPLIFY_AT = 3
#: At which call of a new point a simplified program takes over whose numbers cost as much to
#: compute as several products.
COSTLY_AT = 8
#: For how many sizes of stacks programs are kept.
MOST_STACKS = 4


class Plan:
    """How a map is run.

    Parameters
    ----------
    executor, binding
        What is run.
    settled
        Whether nothing is to be simplified (any more).
    proof
        What is to be checked before the first result is handed out.
    whole
        Whether no argument is zero.
    dense
        What may become the map's matrix.
    forward
        Whether that is the matrix itself, or its transpose.
    compiling
        How to compile, None for not at all.
    hurry
        Whether to do so as soon as possible.
    counted
        Called when a program was compiled.
    better
        Gives the simplified program that another point left and the numbers of this one, where
        these are not computed before it is worth it.
    taken
        Called when another program has taken over; gives what runs it for other points too.
    pool
        What is known of the point's numbers.
    """

    def __init__(
        self,
        executor: Executor,
        binding: Binding,
        *,
        settled: bool,
        proof: Proof | None = None,
        whole: bool = True,
        dense: Dense | None = None,
        forward: bool = True,
        compiling: Options | None = None,
        hurry: bool = False,
        counted: Callable[[], None] = lambda: None,
        better: Callable[[], tuple[Executor, Binding] | None] | None = None,
        taken: Callable[[BoundProgram], Executor | None] = lambda _: None,
        pool: Pool | None = None,
    ) -> None:
        #: One reference, so that a change is seen as a whole.
        self._running = executor, binding
        #: What a matrix took the place of: it spreads an infinity or a NaN to all results.
        self._exact: tuple[Executor, Binding] | None = None
        self._settled = settled
        self._proof = proof
        self._whole = whole
        self._dense = dense
        self._forward = forward
        self._compiling = compiling
        self._counted = counted
        self._hurry = hurry
        self._better = better
        self._taken = taken
        self._pool = pool
        self._calls = 0
        #: Whether there is nothing to do at a call but to run what is there.
        self._quiet = False
        #: Runs the stretches of a compiled program from CUDA graphs.
        self._replays: Replays | None = None
        self._lock = threading.Lock()
        #: How often stacks of each size came, and what runs them.
        self._counts: Counter[int] = Counter()
        self._stacked: dict[int, tuple[Executor, Binding] | None] = {}

    def __call__(self, arguments: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """Run the map."""
        exact = self._exact
        if exact is not None:
            return self._by_matrix(arguments, *exact)
        return self._run(arguments)

    def _by_matrix(
        self, arguments: Sequence[torch.Tensor], executor: Executor, binding: Binding
    ) -> list[torch.Tensor | None]:
        """Run the map by its matrix, and without it where something is not finite."""
        if can_be_looked_at(arguments):
            results = self._run(arguments)
            if can_be_trusted(results):
                return results
        return executor(arguments, binding)

    def _run(self, arguments: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        executor, binding = self._running
        if self._quiet:
            return executor(arguments, binding)
        if self._proof is not None:
            results = self._proof.run(executor, binding, arguments, self._whole)
            self._proof = None
            return results
        if self._due(executor) and _undisturbed() and self._lock.acquire(blocking=False):
            try:
                return self._advance(arguments)
            finally:
                self._lock.release()
        replays = self._replays
        if replays is not None and not functorch_active():
            segments = executor.compiled
            if isinstance(segments, Segments):
                return segments(arguments, binding, replays)
        return executor(arguments, binding)

    def short_way(self, lifetime: Closable, *, in_tuple: bool) -> Callable[[Any], Any] | None:
        """Return what runs a settled map of one tensor quickest, None if it is not one."""
        executor, binding = self._running
        if not self._quiet:
            return None
        fine = None if self._exact is None else can_be_trusted
        return short_way(executor, binding, lifetime, in_tuple=in_tuple, fine=fine)

    @property
    def quiet(self) -> bool:
        """Whether there is nothing to do at a call but to run what is there."""
        return self._quiet

    def compile(self, options: Options) -> None:
        """Have the map compiled at one of the next calls."""
        self._hurry = True
        self._compiling = options
        self._quiet = False  # last, see _due
        executor, _ = self._running
        executor.tried = executor.compiled is not None

    @property
    def makes_history(self) -> bool:
        """Whether autograd would record a call in grad mode."""
        return self._running[1].makes_history or functorch_active()

    @property
    def binding(self) -> Binding:
        """The numbers that are used."""
        return self._running[1]

    def program(self) -> BoundProgram:
        """Return what is run, with its numbers."""
        executor, binding = self._running
        return bound(executor.program, binding)

    # -- many arguments at once ---------------------------------------------------------

    def stacked(
        self,
        arguments: Sequence[torch.Tensor],
        mapped: Callable[[], Sequence[torch.Tensor]],
    ) -> Sequence[torch.Tensor | None]:
        """Apply the map to stacks of arguments, along their first dimension; without grad mode.

        From the second time on by a program of its own, if it gives what `mapped` does.
        """
        count = len(arguments[0])
        known = self._stacked.get(count)
        if known is not None:
            executor, binding = known
            results = executor(arguments, binding)
            if self._exact is None or can_be_trusted(results):
                return results
            return mapped()
        if not self._running[0].gains_by_stacks:
            return self._looped(arguments)
        self._counts[count] += 1
        if self._counts[count] < 2 or count in self._stacked or count < 2:
            return mapped()
        if self._running[0].program.is_opaque():
            return mapped()  # user code is not called to try something
        if not self._settled and self._lock.acquire(blocking=False):
            try:
                self._advance([t[0] for t in arguments])
            finally:
                self._lock.release()
        expected = mapped()
        if len(self._stacked) >= MOST_STACKS:
            self._stacked.clear()
        self._stacked[count] = self._stacked_program(count, arguments, expected)
        return expected

    def _looped(self, arguments: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        rows = [self(row) for row in zip(*(t.unbind() for t in arguments), strict=True)]
        return [stack_results(column) for column in zip(*rows, strict=True)]

    def _stacked_program(
        self, count: int, arguments: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]
    ) -> tuple[Executor, Binding] | None:
        before = self.program()
        numbers = before.numbers(self._pool)
        with torch.inference_mode(False), torch.no_grad():
            after = vectorized(before.program, numbers, count)
        if after is None:
            return None
        executor, binding = Executor(after), Binding.of(after, numbers)
        try:
            with torch.no_grad():
                results = executor(arguments, binding)
        except RuntimeError as error:  # what PyTorch maps need not be possible in another way
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return None
        if not all(
            not b.any() if a is None else close(a, b, rounding)
            for a, b in zip(results, expected, strict=True)
        ):
            return None
        binding.follow(self._running[1])
        return executor, binding

    def bindings(self) -> list[Binding]:
        """Return the numbers that are used, those for stacks too."""
        return [binding for _, binding in self._all()]

    def programs(self) -> list[BoundProgram]:
        """Return what is run, with its numbers; stacks too."""
        return [bound(e.program, b) for e, b in self._all()]

    def _all(self) -> list[tuple[Executor, Binding]]:
        exact = [] if self._exact is None else [self._exact]
        return [self._running, *exact, *(s for s in self._stacked.values() if s is not None)]

    # -- better forms -------------------------------------------------------------------

    def _due(self, executor: Executor) -> bool:
        dense = self._dense
        if dense is not None:
            dense.count += 1
        if not self._settled:
            self._calls += 1
            late = executor.runs >= SIMPLIFY_AT - 1
            return self._hurry or (late if self._better is None else self._calls >= COSTLY_AT)
        if self._compiling is None and dense is None and self._replays is None:
            self._quiet = True
            # Another thread may have asked for a compiled form just now.
            self._quiet = self._compiling is None
        return self._compiling is not None or (dense is not None and dense.count >= dense.due)

    def _advance(self, arguments: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """Run as before, and try the next form, once."""
        if not self._settled:
            self._settled = True
            better, self._better = self._better, None
            if better is not None:
                return self._taken_over(arguments, better)
            return self._simplified(arguments)
        compiling, self._compiling = self._compiling, None
        if compiling is not None:
            return self._compiled(arguments, compiling)
        dense, self._dense = self._dense, None
        if dense is not None:
            return self._made_dense(arguments, dense)
        executor, binding = self._running
        return executor(arguments, binding)

    def _simplified(self, arguments: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """Take the simplified program if it gives the same, as precisely.

        A sum of large terms that cancel may lose digits when a factor goes to each term.
        """
        tape: list[object] = []
        executor, old = self._running
        results = executor(arguments, old, tape)
        before = bound(executor.program, old)
        with torch.inference_mode(False), torch.no_grad():
            after = before.made(simplify, pool=self._pool)
        smaller = Executor(after.program)
        if _same(smaller(arguments, after.binding, tape, replay=True), results):
            self._take(smaller, after)
        return results

    def _taken_over(
        self,
        arguments: Sequence[torch.Tensor],
        better: Callable[[], tuple[Executor, Binding] | None],
    ) -> list[torch.Tensor | None]:
        """Take the simplified program that another point left."""
        tape: list[object] = []
        executor, old = self._running
        results = executor(arguments, old, tape)
        known = better()
        if known is not None:
            smaller, binding = known
            if _same(smaller(arguments, binding, tape, replay=True), results):
                self._running = known
                self._stacked = {}
        return results

    def _made_dense(
        self, arguments: Sequence[torch.Tensor], dense: Dense
    ) -> list[torch.Tensor | None]:
        """Take the matrix if that is quicker and gives the same."""
        executor, old = self._running
        results = executor(arguments, old)
        with torch.inference_mode(False), torch.no_grad():
            before = bound(executor.program, old)
            after = dense.program(before, lambda a: executor(a, old), forward=self._forward)
            if after is None:
                return results
            smaller, binding = Executor(after.program), after.binding
            probe = random_arguments(before)
            # A result that is not finite is left to the program anyway.
            if _same(smaller(probe, binding), executor(probe, old)) and (
                not can_be_trusted(results) or _same(smaller(arguments, binding), results)
            ):
                self._replays = None
                if dense.spreads:
                    self._exact = executor, old
                self._take(smaller, after)
                dense.taken()
        return results

    def _take(self, executor: Executor, after: BoundProgram) -> None:
        after.binding.follow(self.binding)
        self._running = executor, after.binding
        self._stacked = {}
        shared = self._taken(after)
        if shared is not None:
            self._running = shared, after.binding

    def _compiled(
        self, arguments: Sequence[torch.Tensor], options: Options
    ) -> list[torch.Tensor | None]:
        """Take the program compiled if that gives the same; one serves all points."""
        executor, binding = self._running
        tape: list[object] = []
        results = executor(arguments, binding, tape)
        if not executor.tried:
            executor.tried = True
            with torch.inference_mode(False), torch.no_grad():
                segments = compiled(
                    executor.program, executor.copies, binding, options, self._not_compiled
                )
                # User code is not called again.
                ops: Any = [lambda *_, k=k: tape[k] for k in range(len(binding.ops))]
                taped = Binding(binding.residuals, ops, binding.guards)
                if segments is not None and not _same(segments(arguments, taped), results):
                    self._not_compiled("what was compiled does not give the same")
                elif segments is not None:
                    executor.compiled = segments
                    self._counted()
        if executor.compiled is not None and replayed(executor.program, options):
            device = arguments[0].device
            self._replays = Replays(capture_on_cuda(device), device)
        return results

    def _not_compiled(self, reason: str) -> None:
        executor, _ = self._running
        warnings.warn(
            f"{executor.program.name}: torch.compile failed, the program runs as it was: {reason}",
            CompilationWarning,
            stacklevel=2,
        )


def _undisturbed() -> bool:
    """Whether nobody transforms or captures what is run now."""
    capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    return not (capturing or functorch_active())


def _same(a: Sequence[torch.Tensor | None], b: Sequence[torch.Tensor | None]) -> bool:
    """Whether two results are the same within rounding."""
    return all(
        (x is None) == (y is None) and (x is None or y is None or close(x, y, rounding))
        for x, y in zip(a, b, strict=True)
    )
