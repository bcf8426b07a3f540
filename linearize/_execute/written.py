"""Linear programs as Python functions.

A program that runs often is written out as straight-line Python, one call per equation, so
that nothing but the operations themselves is left to do. Where an operand is an intermediate
of the program's own that is not needed any more, the operation writes into it instead of into
new memory; not in programs that call user code, whose results may lie in the operands' memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from .._programs.aten import functional_variant, operations, returns_several
from .._programs.program import Equation, Operation, Program
from .._programs.values import Constant, Var
from .binding import unread_after
from .memory import owners
from .quickest import quickest
from .writer import Writer

#: From residuals and arguments to results.
Function: TypeAlias = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], list[Any]]
#: From a binding, arguments and the executor to results.
Bound: TypeAlias = Callable[[Any, Sequence[torch.Tensor], Any], list[Any]]

#: Longer programs would take Python's compiler too long.
LONGEST = 20_000

#: What writes into its first operand, by the operation that does the same without.
_IN_PLACE = {
    functional_variant(op): op
    for op in operations(
        "mul_.Tensor mul_.Scalar div_.Tensor div_.Scalar add_.Tensor sub_.Tensor neg_ addcmul_ "
        "addmm_ baddbmm_"
    )
}
#: Those whose first two operands can be swapped.
_SWAPPING = frozenset(operations("mul.Tensor add.Tensor"))


def generate(program: Program, copies: Sequence[bool]) -> Function | None:
    """Write a program out as a function of residuals and arguments, which writes nowhere.

    `copies` says which results must be copied, because they may share memory with something else.
    None if the program calls user code or is very long.
    """
    if len(program.equations) > LONGEST or program.is_opaque():
        return None
    writer = _Writer(program, copies)
    lines = ["def run(residuals, arguments):"]
    if writer.residuals:
        lines.append(f" {', '.join(writer.residuals)}, = residuals")
    return writer.function([*lines, *writer.body()], program.name)


def generate_bound(program: Program, copies: Sequence[bool]) -> Bound | None:
    """Write a program out as a function of a binding, arguments and its executor.

    After each call of user code it has the binding check the memory of the residuals. If user code
    returns None, the executor's `resume` goes on with the values that are needed. None if the
    program is very long.
    """
    if len(program.equations) > LONGEST:
        return None
    writer = _BoundWriter(program, copies)
    lines = ["def run(binding, arguments, executor):"]
    if writer.residuals:
        lines.append(f" {', '.join(writer.residuals)}, = binding.residuals")
        lines += [f" {name} = {name}.tensor" for name in writer.residuals]
    if writer.ops:
        lines.append(f" {', '.join(writer.ops.values())}, = binding.ops")
    lines += writer.body()
    return writer.function(lines, program.name) if writer.handed_on <= LONGEST else None


class _Writer(Writer):
    def __init__(self, program: Program, copies: Sequence[bool]) -> None:
        super().__init__((Var, Constant))
        self.program = program
        self.copies = copies
        for i, c in enumerate(program.constants):
            self.names[c] = f"r{i}"
        self.residuals = list(self.names.values())
        for v in (*program.inputs, *(v for eq in program.equations for v in eq.outputs if v)):
            self.names[v] = f"v{len(self.names)}"
        #: What can go after each equation.
        self.gone = program.last_uses()

    def body(self) -> list[str]:
        lines = []
        if self.program.inputs:
            lines.append(f" {', '.join(self.names[v] for v in self.program.inputs)}, = arguments")
        for i, eq in enumerate(self.program.equations):
            lines += [f" {line}" for line in self.step(i, eq)]
            if self.gone[i]:
                lines.append(f" del {', '.join(sorted(self.names[v] for v in self.gone[i]))}")
        results = [
            "None" if v is None else f"{self.names[v]}.clone()" if copy else self.names[v]
            for v, copy in zip(self.program.outputs, self.copies, strict=True)
        ]
        return [*lines, f" return [{', '.join(results)}]"]

    def step(self, i: int, eq: Equation) -> list[str]:
        return [self.called(self.constant(eq.op), eq.args, eq)]

    def called(self, op: str, args: Sequence[Any], eq: Equation) -> str:
        called = self.call(op, args, eq.kwargs)
        several = isinstance(eq.op, Operation) or len(eq.outputs) != 1 or returns_several(eq.op)
        if not several:
            return f"{self.names[eq.outputs[0]]} = {called}"
        outs = ["_" if v is None else self.names[v] for v in eq.outputs]
        return f"{', '.join(outs)}, = {called}"


class _BoundWriter(_Writer):
    """Writes what is run over and over: by the quickest names, into memory that is free."""

    def __init__(self, program: Program, copies: Sequence[bool]) -> None:
        super().__init__(program, copies)
        #: The names of opaque operations, by the place of their equations.
        self.ops = {
            i: f"o{i}" for i, eq in enumerate(program.equations) if isinstance(eq.op, Operation)
        }
        self.unread = unread_after(program)
        self.group, self.group_end = self._groups()
        #: What is needed after the equation at hand, in order.
        used = program.uses()
        self.live = dict.fromkeys(v for v in program.inputs if v in used)
        #: How many values are handed on to `resume`, counted for each place where that may be.
        self.handed_on = 0

    def step(self, i: int, eq: Equation) -> list[str]:
        if self.ops:
            self.live.update((v, None) for v in eq.outputs if v is not None)
            for v in self.gone[i]:
                del self.live[v]
        if i in self.ops:
            return self.user_code(i, eq)
        op, args = self.in_place(i, eq) or (eq.op, eq.args)
        return [self.called(self.constant(quickest(op)), args, eq)]

    def user_code(self, i: int, eq: Equation) -> list[str]:
        check = f"binding.check_unread({self.unread[i]!r})"
        lines = [self.called(self.ops[i], eq.args, eq), check]
        outs = [self.names[v] for v in eq.outputs if v is not None]
        if outs:
            undefined = " or ".join(f"{name} is None" for name in outs)
            self.handed_on += len(self.live)
            # The numbers of the names are those of the executor's places.
            values = ", ".join(f"{self.names[v][1:]}: {self.names[v]}" for v in self.live)
            lines.append(f"if {undefined}: return executor.resume(binding, {i + 1}, {{{values}}})")
        return lines

    def _groups(self) -> tuple[dict[Var, int | None], dict[int | None, int]]:
        """Return which equation made the memory of each variable, and when that is last read."""
        # By equations, as two results of one operation may be the same tensor.
        made = {v: i for i, eq in enumerate(self.program.equations) for v in eq.outputs if v}
        group = {v: None if o is None else made[o] for v, o in owners(self.program).items()}
        last = {v: i for i, gone in enumerate(self.gone) for v in gone}
        last.update((v, len(self.gone)) for v in self.program.outputs if v is not None)
        end: dict[int | None, int] = {}
        for v, place in group.items():
            end[place] = max(end.get(place, -1), last.get(v, -1))
        return group, end

    def in_place(self, i: int, eq: Equation) -> tuple[Any, tuple[Any, ...]] | None:
        """Return an operation that writes into an operand which is needed no more."""
        op = None if self.ops else _IN_PLACE.get(eq.op)  # type: ignore[call-overload]
        if op is None:
            return None
        (first, *rest), out = eq.args, eq.outputs[0]
        if self.is_free(i, first, rest, out):
            return op, eq.args
        if eq.op in _SWAPPING and not eq.kwargs and self.is_free(i, rest[0], [first], out):
            return op, (rest[0], first)
        return None

    def is_free(self, i: int, x: Any, rest: Sequence[Any], out: Var | None) -> bool:
        if not isinstance(x, Var) or out is None or x.spec != out.spec or x in rest:
            return False
        place = self.group[x]
        if place is None or self.group_end[place] != i or x not in self.gone[i]:
            return False
        # The operands beside it must not lie in the same memory, shifted.
        beside = {self.group[y] for y in rest if isinstance(y, Var)}
        # And it must be what an operation computed, not a view of that.
        return place not in beside and x in self.program.equations[place].outputs
