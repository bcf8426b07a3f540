"""The check that a pushforward owes, made at its first product."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .._execute.binding import Binding, BoundProgram
from .._execute.executor import Executor, runner
from .._programs.program import Equation, Operation
from .._spaces.balance import Balance, Tensors, over_sizes
from .._torch.modes import being_traced, functorch_active, outside_transforms, unobserved
from ..errors import AdjointError
from .adjoint import Transposed, check_built_in, node_of, rounding_limit


class Proof:
    """The check that a pushforward is the adjoint of its pullback, made at the first product.

    `transposed` made the pushforward; `passed` is called when the check has passed.
    """

    def __init__(
        self,
        pullback: BoundProgram,
        pushforward: BoundProgram,
        transposed: Transposed,
        passed: Callable[[], None],
    ) -> None:
        self._programs: tuple[BoundProgram, BoundProgram] | None = (pullback, pushforward)
        self._transposed = transposed
        self._passed = passed
        self._lock = threading.RLock()
        self._error: AdjointError | None = None
        self._aside = False

    @property
    def settled(self) -> bool:
        """Whether the check has passed."""
        return self._programs is None and self._error is None

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Stand aside for a check that covers this one, and is not to be made twice."""
        with self._lock:
            self._aside = True
            try:
                yield
            finally:
                self._aside = False
            if self._programs is not None:
                self._settle()

    def run(
        self, executor: Executor, binding: Binding, arguments: Sequence[torch.Tensor], whole: bool
    ) -> list[torch.Tensor | None]:
        """Run the pushforward for the first time; `whole` says that no tangent is missing.

        Raises `AdjointError` if the two are not adjoint, now and at each later call.
        """
        with self._lock:
            if self._aside:
                return executor(arguments, binding)
            programs = self._programs
            if whole and programs is not None and self._serves(binding, arguments):
                results, balance = self._tried(executor, binding, arguments)
                if balance.holds(rounding_limit(*programs)):
                    self._settle()
                    return results
            self.complete()
        return executor(arguments, binding)

    def complete(self) -> None:
        """Make the check with numbers of its own, if it has not been made.

        Raises
        ------
        AdjointError
            If the two programs are not adjoint.
        """
        with self._lock:
            if self._error is not None:
                raise self._error
            if self._programs is None or self._aside:
                return
            pullback, pushforward = self._programs
            try:
                with outside_transforms(), unobserved(), torch.inference_mode(False):
                    check_built_in(pullback, pushforward, self._transposed)
            except AdjointError as error:
                self._error = error
                self._programs = None
                raise
            self._settle()

    def _settle(self) -> None:
        self._programs = None
        self._passed()

    def _serves(self, binding: Binding, arguments: Sequence[torch.Tensor]) -> bool:
        """Whether the first product can be held against the pullback."""
        if functorch_active() or being_traced() or not all(map(_is_generic, arguments)):
            return False
        assert self._programs is not None
        # A method that was missing is not called: a program stands in its place.
        if any(op.communicates for op in binding.ops):
            return False  # nobody may have to run it a second time, which others would not
        called = {id(node_of(op)) for op in binding.ops}
        return all({id(node_of(op)) for op in _opaque(p)} <= called for p in self._programs)

    def _tried(
        self, executor: Executor, binding: Binding, arguments: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor | None], Balance]:
        assert self._programs is not None
        pullback, _ = self._programs
        balance = Balance()
        if not _opaque(pullback):
            # One after the other, which takes less memory.
            results = executor(arguments, binding)
            trial = _Trial(pullback, results)
            balance.add(1, trial.cotangents, results, drawn=trial.drawn)
            balance.add(-1, trial.results, arguments)
            return results, balance
        trial = _Trial(pullback)

        def seen(op: Operation) -> Any:
            cut = trial.cuts.get(id(node_of(op)))
            if cut is None:
                return op

            def call(*args: torch.Tensor | None) -> Any:
                balance.add(1, cut.results, args, lasting=False)
                results = op(*args)
                balance.add(-1, cut.received, results, lasting=False)
                return results

            return call

        watched = binding.with_ops([seen(op) for op in binding.ops])
        results = executor(arguments, watched)
        balance.add(1, trial.cotangents, results)
        balance.add(-1, trial.results, arguments)
        return results, balance


def _opaque(program: BoundProgram) -> list[Any]:
    return [eq.op for eq in program.equations if node_of(eq.op) is not None]


class _Cut(Operation):
    """Stands for an opaque operation: takes note of its arguments, gives random numbers."""

    __slots__ = ("name", "received", "results")
    may_alias = False

    def __init__(self, results: Tensors, name: str) -> None:
        self.received: Tensors = [None] * len(results)
        self.results, self.name = results, name

    def __call__(self, *args: torch.Tensor | None) -> list[torch.Tensor | None]:
        """Return copies of the random numbers."""
        self.received = args
        return [None if t is None else t.clone() for t in self.results]


class _Trial:
    """A pullback run with random cotangents, cut at opaque operations.

    Where the tangents that they meet are known, small entries of these count like large ones.
    """

    def __init__(self, pullback: BoundProgram, met: Tensors | None = None) -> None:
        generator = torch.Generator().manual_seed(3)
        self.cuts: dict[int, _Cut] = {}

        def cut(eq: Equation) -> Any:
            if node_of(eq.op) is None:
                return eq.op
            numbers = [None if v is None else v.spec.random(generator) for v in eq.outputs]
            made = self.cuts[id(node_of(eq.op))] = _Cut(numbers, eq.name)
            return made

        program = pullback.with_opaque(cut)
        # Modes of the caller's, which count operations perhaps, see the product only.
        with unobserved(), torch.inference_mode(False), torch.no_grad():
            self.drawn = [v.spec.random(generator) for v in program.inputs]
            self.cotangents: Any = self.drawn
            if met is not None:
                self.cotangents = over_sizes(self.drawn, met)
            self.results = runner(program)(self.cotangents)


def _is_generic(t: torch.Tensor) -> bool:
    """Whether a vector looks as if it could tell linear maps apart: unlike zeros, ones, units."""
    flat = t.reshape(-1)[:: max(1, t.numel() // 128)]
    if flat.numel() < 4:
        return bool((flat != 0).all())
    changes = int((flat[1:] != flat[:-1]).sum())
    return 2 * min(changes + 1, int(flat.count_nonzero())) > flat.numel()
