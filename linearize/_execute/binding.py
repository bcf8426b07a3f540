"""The numbers with which an executor runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from .._programs.program import Operation, Program
from .._programs.residuals import Residual, first_freed


class Binding:
    """The numbers of one point for an `Executor`.

    Attributes
    ----------
    residuals
        What the program reads, in the order of `Program.residuals`.
    ops
        Its opaque operations, in order.
    guards
        Residuals that must not have changed although the program does not read them: it was
        made from one that did.
    """

    __slots__ = ("_all", "guards", "makes_history", "ops", "residuals")

    def __init__(
        self,
        residuals: Sequence[Residual],
        ops: Sequence[Operation],
        guards: Sequence[Residual] = (),
    ) -> None:
        self.residuals = tuple(residuals)
        self.ops = tuple(ops)
        #: Whether something in it could require grad, as user code may.
        self.makes_history = bool(ops) or any(r.tensor.requires_grad for r in residuals)
        self.guard_by(guards)

    def guard_by(self, guards: Sequence[Residual]) -> None:
        """Change what is watched besides the residuals."""
        self.guards = tuple(guards)
        self._all = (*self.residuals, *self.guards)

    @classmethod
    def of(cls, program: Program, guards: Sequence[Residual] = ()) -> Binding:
        """Return the numbers that stand in a program."""
        ops = [eq.op for eq in program.equations if isinstance(eq.op, Operation)]
        return cls(program.residuals(), ops, guards)

    def check(self) -> None:
        """Raise `StalenessError` if a residual was changed in place."""
        for r in self._all:
            if r.version is not None and r.tensor._version != r.version:
                r.check()
        if self.ops:  # user code was seen to free memory that it does not own
            self.check_memory()

    def watched(self) -> tuple[Residual, ...]:
        """Return the residuals that must not have changed."""
        return self._all

    def check_unread(self, places: Iterable[int]) -> None:
        """Raise `StalenessError` if user code spoiled what is still to be read.

        Parameters
        ----------
        places
            Of those residuals. Others may have been a workspace of its own.
        """
        self.check_memory()
        for place in places:
            self.residuals[place].check()

    def check_memory(self) -> None:
        """Raise `StalenessError` if the memory of a residual was freed."""
        freed = first_freed(self._all)
        if freed is not None:
            freed.check_memory()

    def kept(self) -> Iterator[torch.Tensor]:
        """Yield the tensors that are kept alive; one may come several times."""
        for r in self._all:
            yield r.tensor
        for op in self.ops:
            yield from op.bytes_kept()


def filled(program: Program, binding: Binding) -> Program:
    """Return a program with the numbers of a point in place of its own."""
    numbers = dict(zip(program.residuals(), binding.residuals, strict=True))
    ops = iter(binding.ops)

    equations = []
    for eq in program.equations:
        op = next(ops) if isinstance(eq.op, Operation) else eq.op
        equations.append(eq.renamed(lambda x: numbers.get(x, x), op=op))
    return program.with_equations(equations)


def unread_after(program: Program) -> list[tuple[int, ...]]:
    """Return for each opaque operation the places of residuals that are read after it.

    For other operations nothing: they write to no residual.
    """
    places = {r: i for i, r in enumerate(program.residuals())}
    later: set[int] = set()
    found: list[tuple[int, ...]] = []
    for eq in reversed(program.equations):
        found.append(tuple(sorted(later)) if isinstance(eq.op, Operation) else ())
        later.update(places[r] for r in eq.residuals())
    return found[::-1]
