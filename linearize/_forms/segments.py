"""Linear programs cut into runs of built-in operations and single opaque ones.

A compiler or a CUDA graph takes over what lies between the calls of user code. `Segments`
runs such a program: each stretch of built-in operations is a function of residuals and
inputs, which can be replaced by one that does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from .._execute.binding import Binding
from .._execute.executor import Executor
from .._execute.written import generate
from .._programs.program import Equation, Operation, Program
from .._programs.residuals import check_memory
from .._programs.values import Var, last_uses
from ..errors import LinearizeError


class Part:
    """What is run in one go, as a program of its own; its constants by their places."""

    def __init__(self, program: Program, places: dict[Any, int]) -> None:
        self.program = program
        self.inputs, self.outputs = program.inputs, program.outputs
        self.residuals = [places[c] for c in program.constants]


class Stretch(Part):
    """Built-in operations, one after the other, and what runs them."""

    def __init__(self, program: Program, copies: Sequence[bool], places: dict[Any, int]) -> None:
        super().__init__(program, places)
        function = generate(program, copies)
        if function is None:
            raise LinearizeError("the program is too long to be written out")
        self.function = function


#: Runs a stretch: its number, the stretch, residuals and inputs to results.
Runner: TypeAlias = Callable[
    [int, Stretch, Sequence[torch.Tensor], Sequence[torch.Tensor]], Sequence[torch.Tensor]
]


class _Call(Part):
    """One opaque operation, and its number among these."""

    def __init__(self, eq: Equation, number: int, places: dict[Any, int]) -> None:
        outputs = [v for v in eq.outputs if v is not None]
        specs = [v.spec for v in outputs]
        super().__init__(
            Program(list(dict.fromkeys(eq.inputs())), [eq], outputs, specs, eq.name), places
        )
        self.executor = Executor(self.program)
        self.number = number


class Segments:
    """A program in segments, which are run in order; `copies` as of `generate`."""

    def __init__(self, program: Program, copies: Sequence[bool]) -> None:
        self.program = program
        places: dict[Any, int] = {c: i for i, c in enumerate(program.constants)}
        self.parts: list[Stretch | _Call] = []
        opaque = (eq for eq in program.equations if isinstance(eq.op, Operation))
        numbers = {eq: i for i, eq in enumerate(opaque)}
        for group in _groups(program):
            if isinstance(group[0].op, Operation):
                self.parts.append(_Call(group[0], numbers[group[0]], places))
            else:
                self.parts.append(_stretch(program, group, copies, places))
        made = {v for part in self.parts if isinstance(part, Stretch) for v in part.outputs}
        #: Results that no stretch has copied already.
        self._copies = [
            copy and v not in made for copy, v in zip(copies, program.outputs, strict=True)
        ]
        #: What is not needed any more after each part.
        self._gone = last_uses([(*p.inputs, *p.outputs) for p in self.parts], program.outputs)

    @property
    def stretches(self) -> list[Stretch]:
        """The parts without user code."""
        return [part for part in self.parts if isinstance(part, Stretch)]

    def __call__(
        self,
        arguments: Sequence[torch.Tensor],
        binding: Binding,
        runner: Runner | None = None,
    ) -> list[torch.Tensor | None]:
        """Run the program; `runner` may do so with the stretches."""
        binding.check()
        tensors = [r.tensor for r in binding.residuals]
        values: dict[Var, torch.Tensor | None] = dict(
            zip(self.program.inputs, arguments, strict=True)
        )
        for i, part in enumerate(self.parts):
            given = [values[v] for v in part.inputs]
            if isinstance(part, _Call):
                own = Binding(
                    [binding.residuals[k] for k in part.residuals], [binding.ops[part.number]]
                )
                found: Sequence[Any] = part.executor(given, own)  # type: ignore[arg-type]
                check_memory(binding.watched())
            else:
                # A custom Function returned None, which is zero.
                pairs = zip(given, part.inputs, strict=True)
                inputs = [v.spec.zeros() if t is None else t for t, v in pairs]
                residuals = [tensors[k] for k in part.residuals]
                if runner is None:
                    found = part.function(residuals, inputs)
                else:
                    found = runner(i, part, residuals, inputs)
            values.update(zip(part.outputs, found, strict=True))  # type: ignore[arg-type]
            for v in self._gone[i]:
                del values[v]
        results = [None if v is None else values[v] for v in self.program.outputs]
        return [
            t.clone() if copy and t is not None else t
            for t, copy in zip(results, self._copies, strict=True)
        ]


def _groups(program: Program) -> list[list[Equation]]:
    """Return the equations in as few groups as possible, opaque ones alone.

    A built-in operation joins a later group if nothing needs it before: opaque calls that do
    not depend on each other then leave few stretches.
    """
    #: For each variable, the number of opaque calls that come before it.
    depth: dict[Var, int] = dict.fromkeys(program.inputs, 0)
    levels: dict[int, list[Equation]] = {}
    calls: dict[int, list[Equation]] = {}
    for eq in program.equations:
        level = max((depth[v] for v in eq.inputs()), default=0)
        if isinstance(eq.op, Operation):
            calls.setdefault(level, []).append(eq)
            level += 1
        else:
            levels.setdefault(level, []).append(eq)
        depth.update((v, level) for v in eq.outputs if v is not None)
    groups: list[list[Equation]] = []
    for level in range(max([*levels, *calls], default=-1) + 1):
        if level in levels:
            groups.append(levels[level])
        groups += [[eq] for eq in calls.get(level, ())]
    return groups


def _stretch(
    program: Program,
    group: Sequence[Equation],
    copies: Sequence[bool],
    places: dict[Any, int],
) -> Stretch:
    inside = {v for eq in group for v in eq.outputs if v is not None}
    ours = set(map(id, group))
    inputs = [v for v in dict.fromkeys(v for eq in group for v in eq.inputs()) if v not in inside]
    read = {v for eq in program.equations if id(eq) not in ours for v in eq.inputs()}
    copied = {v for v, copy in zip(program.outputs, copies, strict=True) if copy}
    wanted = {v for v in program.outputs if v is not None} | read
    outputs = [v for eq in group for v in eq.outputs if v is not None and v in wanted]
    part = Program(inputs, group, outputs, [v.spec for v in outputs], program.name)
    return Stretch(part, [v in copied for v in outputs], places)
