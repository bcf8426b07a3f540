"""Running linear programs.

An `Executor` prepares a program for repeated runs: where each argument comes from, when each
intermediate is last used, which results must be copied so that they share memory with
nothing that is kept or owned by somebody else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from .._programs.aten import returns_several
from .._programs.program import Equation, Operation, Program, op_name
from .._programs.values import Value
from .._spaces.compare import close
from .._spaces.nested import map_leaves
from .._spaces.space import TensorSpec
from .._torch.modes import functions_as_they_are, functions_overridden, functorch_active
from ..errors import LinearizeError
from .binding import Binding, BoundProgram, unread_after
from .mapped import Slot, call, filled
from .memory import shared_results
from .thresholds import WRITE_OUT_AT, WRITE_OUT_SOON
from .written import Bound, generate_bound


class _Step:
    """One equation, prepared."""

    __slots__ = (
        "call",
        "communicates",
        "expected",
        "free",
        "many",
        "nested",
        "op",
        "opaque",
        "outs",
        "place",
        "plain",
        "source",
        "unread",
        "variables",
    )

    def __init__(self, eq: Equation, slots: dict[Any, int]) -> None:
        def placed(x: Any) -> Any:
            return Slot(slots[x]) if isinstance(x, Value) else x

        self.op = eq.op
        #: The place among the program's opaque operations.
        self.place = -1
        #: Positional arguments that are a value; whether values stand elsewhere too.
        self.plain = [(i, slots[x]) for i, x in enumerate(eq.args) if isinstance(x, Value)]
        self.nested = len(self.plain) < len(eq.reads())
        #: Arguments; in nested ones slots stand for what is known at run time.
        self.call: Any = list(eq.args), eq.kwargs
        if self.nested:
            self.call = map_leaves(placed, self.call)
        #: The variables among the values, which can be undefined; a residual cannot.
        self.variables = [(slots[v], v.spec) for v in eq.inputs()]
        self.outs: list[int] = []
        self.opaque = isinstance(eq.op, Operation)
        self.communicates = eq.communicates
        self.many = self.opaque or len(eq.outputs) != 1 or returns_several(eq.op)
        self.free: list[int] = []
        #: The places of residuals that later steps read, for user code.
        self.unread: tuple[int, ...] = ()
        self.expected, self.source = eq.outputs, eq.source

    def verify(self, out: Any) -> None:
        """Raise if a result has not the shape and dtype that the program says."""
        for v, t in zip(self.expected, out if self.many else (out,), strict=True):
            if v is not None and t is not None and not v.spec.matches(t):
                raise LinearizeError(
                    f"{op_name(self.op)} (from {self.source or 'the graph'}) gave "
                    f"{TensorSpec.of(t)}, the linear program expects {v.spec}; please report this"
                )

    def with_undefined(self, op: Callable[..., Any], values: Sequence[Any]) -> Any:
        """Run the operation with some values undefined; all undefined gives undefined."""
        missing = {slot: spec for slot, spec in self.variables if values[slot] is None}
        if not self.communicates and all(slot in missing for slot, _ in self.variables):
            return (None,) * len(self.outs) if self.many else None
        if not self.opaque:  # user code is told, for others it is zero
            values = list(values)
            for slot, spec in missing.items():
                values[slot] = spec.zeros()
        return call(op, *self.arguments(values))

    def arguments(self, values: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments of a call."""
        if self.nested:
            return filled(self.call, values)  # type: ignore[no-any-return]
        template, keywords = self.call
        args = list(template)
        for i, slot in self.plain:
            args[i] = values[slot]
        return args, keywords


class Executor:
    """Runs a program on tensors.

    The numbers come from a `Binding`, so that one executor serves many points. No method of the
    program may be missing (see `resolve`); `final` says that no simpler one will take its place
    soon.
    """

    __slots__ = (
        "__weakref__",
        "_function",
        "_inputs",
        "_outputs",
        "_size",
        "_steps",
        "_verified",
        "_write_out_at",
        "copies",
        "program",
        "runs",
    )

    def __init__(self, program: Program, *, final: bool = True) -> None:
        self.program = program
        self._write_out_at = WRITE_OUT_SOON if final else WRITE_OUT_AT
        slots: dict[Any, int] = {c: i for i, c in enumerate(program.constants)}
        for v in program.inputs:
            if v in slots:
                program.check()
            slots[v] = len(slots)
        self._steps = _prepared(program, slots)
        self._size = len(slots)
        program.check_outputs(slots)
        self._inputs = [slots[v] for v in program.inputs]
        self._outputs = [-1 if v is None else slots[v] for v in program.outputs]
        #: Which results may share memory with an argument, a residual or a user's tensor.
        self.copies = shared_results(program)
        self._verified = False
        self._function: Bound | None = None
        #: How often it ran.
        self.runs = 0

    def __call__(
        self,
        arguments: Sequence[torch.Tensor],
        binding: Binding | None = None,
        tape: list[Any] | None = None,
    ) -> list[torch.Tensor | None]:
        """Run the program on one tensor per input; return one per output, None for zero.

        The binding can be left out if the program has no constants. The results of user code come
        into the tape in order, for `Binding.replaying`.
        """
        if binding is None:
            binding = Binding((), self.program.opaque())
        batching = functorch_active()
        if tape is None and not batching:
            if self._function is not None:
                binding.check()
                if not functions_overridden():
                    return self._function(binding, arguments, self)
                if not binding.ops:
                    with functions_as_they_are():
                        return self._function(binding, arguments, self)
                return self._interpreted(self._begin(arguments, binding), binding, 0)
            return self._counted(arguments, binding)
        binding.check()
        return self._interpreted(self._begin(arguments, binding), binding, 0, tape)

    @property
    def function(self) -> Bound | None:
        """The program written out, once it has run often enough."""
        return self._function

    def first(
        self, arguments: Sequence[torch.Tensor], binding: Binding, tape: list[Any]
    ) -> tuple[list[torch.Tensor | None], Bound | None]:
        """Run the program to compare it with another one, written out at once where that can be.

        User code is not called: its results are on the tape. The function that is returned beside
        the results, if there is one, is for `adopt` if these are right.
        """
        if self._write_out_at and not (binding.ops or functions_overridden()):
            binding.check()
            written = self._written_out(arguments, binding)
            if written is not None:
                return written
        binding = binding.replaying(tape)
        binding.check()
        return self._interpreted(self._begin(arguments, binding), binding, 0), None

    def adopt(self, function: Bound) -> None:
        """Run the program, or an equal one, by a function that was found to give the same."""
        self._function = function
        self._write_out_at = 0

    def _written_out(
        self, arguments: Sequence[torch.Tensor], binding: Binding
    ) -> tuple[list[torch.Tensor | None], Bound] | None:
        """Write the program out as a function; return what that gives, and the function."""
        function = generate_bound(self.program, self.copies)
        try:
            return None if function is None else (function(binding, arguments, self), function)
        except TypeError:  # an operation's quicker name does not take these arguments
            return None

    def resume(
        self, binding: Binding, start: int, known: dict[int, torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        """Go on from an equation where the function left off: a value is undefined."""
        return self._interpreted(self._placed(binding, known.items()), binding, start)

    def _counted(
        self, arguments: Sequence[torch.Tensor], binding: Binding
    ) -> list[torch.Tensor | None]:
        """Run the program step by step; in time, have it written out."""
        binding.check()
        last = 0 < self._write_out_at <= self.runs + 1
        tape: list[Any] | None = [] if last and binding.ops else None
        results = self._interpreted(self._begin(arguments, binding), binding, 0, tape)
        self.runs += 1
        if last:
            self._write_out_at = 0
            self._adopt_if_equal(arguments, binding, results, tape)
        return results

    def _begin(self, arguments: Sequence[torch.Tensor], binding: Binding) -> list[Any]:
        return self._placed(binding, zip(self._inputs, arguments, strict=True))

    def _placed(self, binding: Binding, known: Iterable[tuple[int, Any]]) -> list[Any]:
        """Return a place for each value, with what is known by the numbers of the places."""
        values: list[Any] = [r.tensor for r in binding.residuals]
        values += [None] * (self._size - len(values))
        for slot, t in known:
            values[slot] = t
        return values

    def _interpreted(
        self,
        values: list[Any],
        binding: Binding,
        start: int,
        tape: list[Any] | None = None,
    ) -> list[torch.Tensor | None]:
        """Run the program from an equation on; `values` has a place for each value."""
        batching = functorch_active()
        ops = binding.ops
        for step in self._steps[start:] if start else self._steps:
            template, keywords = step.call
            op = step.op if step.place < 0 else ops[step.place]
            undefined = False
            if step.nested:
                args, keywords = step.arguments(values)
                undefined = any(values[slot] is None for slot, _ in step.variables)
            else:
                args = template.copy()
                for i, slot in step.plain:
                    value = values[slot]
                    args[i] = value
                    if value is None:
                        undefined = True
            if undefined:
                # A custom Function returned None: an undefined tangent, which is zero.
                out: Any = step.with_undefined(op, values)
            elif batching:
                out = call(op, args, keywords)
            else:
                out = op(*args, **keywords)
            if step.opaque:
                binding.check_unread(step.unread)
                if tape is not None:
                    tape.append(out)
            if not self._verified:
                step.verify(out)
            if step.many:
                for slot, t in zip(step.outs, out, strict=True):
                    if slot >= 0:
                        values[slot] = t
            else:
                values[step.outs[0]] = out
            for slot in step.free:
                values[slot] = None
        self._verified |= not start
        results = [None if slot < 0 else values[slot] for slot in self._outputs]
        return [
            t.clone() if copy and t is not None else t
            for t, copy in zip(results, self.copies, strict=True)
        ]

    def _adopt_if_equal(
        self,
        arguments: Sequence[torch.Tensor],
        binding: Binding,
        results: Sequence[torch.Tensor | None],
        tape: list[Any] | None,
    ) -> None:
        """Write the program out as a function, and use it if it gives the same."""
        if tape is not None:  # user code is not called again
            binding = binding.replaying(tape)
        written = self._written_out(arguments, binding)
        if written is not None and all(
            (a is None) == (b is None)
            and (a is None or b is None or (a.dtype == b.dtype and close(a, b)))
            for a, b in zip(written[0], results, strict=True)
        ):
            self._function = written[1]


def runner(
    program: BoundProgram,
) -> Callable[[Sequence[torch.Tensor]], list[torch.Tensor | None]]:
    """Return what runs a program with its numbers."""
    executor, binding = Executor(program.program), program.binding
    return lambda arguments: executor(arguments, binding)


def _prepared(program: Program, slots: dict[Any, int]) -> list[_Step]:
    """Return the steps of a program; the places of what they make come into `slots`."""
    steps: list[_Step] = []
    opaque = 0
    for eq, unread in zip(program.equations, unread_after(program), strict=True):
        try:
            step = _Step(eq, slots)
        except KeyError:
            program.check()  # has the words for it
            raise
        steps.append(step)
        step.unread = unread
        if step.opaque:
            step.place = opaque
            opaque += 1
        for out in eq.outputs:
            if out is None:
                step.outs.append(-1)
                continue
            if out in slots:
                program.check()
            step.outs.append(len(slots))
            slots[out] = len(slots)
    for step, gone in zip(steps, program.last_uses(), strict=True):
        step.free = [slots[v] for v in gone]
    return steps
