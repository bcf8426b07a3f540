"""The numbers with which a program runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from .._programs.guards import guards
from .._programs.numbers import Numbers, Pool
from .._programs.origins import Here
from .._programs.program import Emitter, Equation, Operation, Program, printed
from .._programs.residuals import Residual, check_memory
from .._programs.values import Constant, Var
from .._spaces.memory import total_bytes
from .._spaces.space import TensorSpec
from .._text.tables import escaped, framed, shortened


class Binding:
    """The numbers of one point for an `Executor`.

    Attributes
    ----------
    residuals
        What the program reads, in the order of `Program.constants`.
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
        watched: Sequence[Residual] = (),
    ) -> None:
        self.residuals = tuple(residuals)
        self.ops = tuple(ops)
        #: Whether something in it could require grad, as user code may.
        self.makes_history = bool(ops) or any(r.tensor.requires_grad for r in residuals)
        self.guard_by(watched)

    def guard_by(self, watched: Sequence[Residual]) -> None:
        """Change what is watched besides the residuals."""
        self.guards = tuple(watched)
        self._all = (*self.residuals, *self.guards)

    def follow(self, before: Binding) -> None:
        """Watch what was read before too, as far as somebody else can change it."""
        self.guard_by([*guards(before.residuals, self.residuals), *before.guards])

    def with_ops(self, ops: Sequence[Operation]) -> Binding:
        """Return the same numbers with others in place of the opaque operations."""
        return Binding(self.residuals, ops, self.guards)

    def replaying(self, tape: Sequence[Any]) -> Binding:
        """Return the same numbers with user code that is not called: it gives what it gave."""
        ops: Any = [lambda *_, out=out, **__: out for out in tape]
        return self.with_ops(ops)

    @staticmethod
    def of(program: Program, numbers: Numbers) -> Binding:
        """Return the numbers that a program reads."""
        return Binding(numbers.residuals(program.constants), program.opaque())

    def check(self) -> None:
        """Raise `StalenessError` if a residual was changed in place."""
        for r in self._all:
            if r.version is not None and r.counter._version != r.version:
                r.check()
        if self.ops:  # user code was seen to free memory that it does not own
            check_memory(self._all)

    def watched(self) -> tuple[Residual, ...]:
        """Return the residuals that must not have changed."""
        return self._all

    def check_unread(self, places: Iterable[int]) -> None:
        """Raise `StalenessError` if user code spoiled what is still to be read, at some places.

        Other residuals may have been a workspace of its own.
        """
        check_memory(self._all)
        for place in places:
            self.residuals[place].check()

    def kept(self) -> Iterator[torch.Tensor]:
        """Yield the tensors that are kept alive; one may come several times."""
        for r in self._all:
            yield r.tensor
        for op in self.ops:
            yield from op.bytes_kept()


class BoundProgram:
    """A linear program with the numbers of a point."""

    __slots__ = ("__weakref__", "binding", "program")

    def __init__(self, program: Program, binding: Binding) -> None:
        self.program = program
        self.binding = binding

    @staticmethod
    def of(program: Program, numbers: Numbers) -> BoundProgram:
        """Return a program with the numbers that it reads."""
        return BoundProgram(program, Binding.of(program, numbers))

    @property
    def name(self) -> str:
        """What the program is called."""
        return self.program.name

    @property
    def inputs(self) -> tuple[Var, ...]:
        """The variables that stand for the argument."""
        return self.program.inputs

    @property
    def equations(self) -> tuple[Equation, ...]:
        """The equations, in order of execution."""
        return self.program.equations

    @property
    def outputs(self) -> tuple[Var | None, ...]:
        """One variable per component of the result; None for one that is always zero."""
        return self.program.outputs

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """Shape, dtype and device of each component of the result."""
        return self.program.specs

    def peak_bytes(self) -> int:
        """Return the most bytes that variables take at once, each counted in full."""
        return self.program.peak_bytes()

    def numbers(self, pool: Pool | None = None) -> Numbers:
        """Return the numbers for programs that are made of this one."""
        numbers = Numbers(pool)
        numbers.put(self.program.constants, self.binding.residuals)
        return numbers

    def made(
        self, make: Callable[..., Program], *args: Any, pool: Pool | None = None, **kwargs: Any
    ) -> BoundProgram:
        """Return, with its numbers, what is made of the program and its numbers."""
        numbers = self.numbers(pool)
        return BoundProgram.of(make(self.program, numbers, *args, **kwargs), numbers)

    def with_opaque(self, stand_in: Callable[[Equation], Operation]) -> BoundProgram:
        """Return the program with something in place of its opaque operations."""
        ops = [stand_in(eq) for eq in self.equations if isinstance(eq.op, Operation)]
        return bound(self.program, self.binding.with_ops(ops))

    def residuals(self) -> list[Residual]:
        """Return the tensors that the program reads, each once."""
        return list(self.binding.residuals)

    def kept_tensors(self) -> Iterator[torch.Tensor]:
        """Yield every tensor that the program keeps alive; one may come several times."""
        return self.binding.kept()

    def then(self, other: BoundProgram, name: str, pool: Pool | None = None) -> BoundProgram:
        """Return the program that applies this one and hands its result on to `other`."""
        numbers = self.numbers(pool)
        e = Emitter(numbers=numbers)
        inputs = [Var(v.spec) for v in self.inputs]
        middle = e.inline(self.program, inputs)
        rest = other.program.restricted([v is not None for v in middle])
        # Points of one structure share their constants, but not what these stand for.
        ours = set(self.program.constants)
        there = other.numbers()
        moved: dict[Constant, Constant] = {}
        for c in rest.constants:
            r = there.residual(c)
            if c in ours and numbers.residual(c) is not r:
                moved[c] = Constant(c.spec, Here(), c.source)
            numbers.put([moved.get(c, c)], [r])
        outputs = e.inline(rest, [v for v in middle if v is not None], moved)
        made = Program(inputs, e.equations, outputs, other.specs, name, e.fixed).live()
        return BoundProgram.of(made, numbers)

    def __str__(self) -> str:
        size = total_bytes(r.tensor for r in self.binding.residuals)
        return "\n".join(printed(self.program, f", {size:,} bytes kept"))

    def _repr_html_(self) -> str:
        return framed(f"<pre>{escaped(shortened(str(self)))}</pre>")

    def __repr__(self) -> str:
        return repr(self.program)


def bound(program: Program, binding: Binding) -> BoundProgram:
    """Return a program that several points run with the numbers and operations of one."""
    return BoundProgram(program.with_opaque(binding.ops), binding)


def unread_after(program: Program) -> list[tuple[int, ...]]:
    """Return for each opaque operation the places of constants that are read after it.

    For other operations nothing: they write to no constant.
    """
    places = {c: i for i, c in enumerate(program.constants)}
    later: set[int] = set()
    found: list[tuple[int, ...]] = []
    for eq in reversed(program.equations):
        found.append(tuple(sorted(later)) if isinstance(eq.op, Operation) else ())
        later.update(places[c] for c in eq.constants())
    return found[::-1]
