"""Several arguments in one pass: how many, and the programs for stacks of them.

All points that run one program share its programs for stacks. Such a program depends on nothing
but the program that it was made of and the length of the stack: its constants are computed of
that program's, at each point anew. At the first points it is held against what
`torch.vmap` gives.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import MutableMapping
from typing import Any

import torch

from .._execute.binding import Binding
from .._execute.executor import Executor
from .._execute.schedule import Portable
from .._execute.thresholds import (
    LARGE_ENTRY,
    MOST_STACKS,
    STACK_AT,
    STACK_BYTES,
    STACK_BYTES_MULTIPLIED,
)
from .._programs.aten import may_alias
from .._programs.numbers import Numbers
from .._programs.origins import Literal, Saved
from .._programs.price import multiplies
from .._programs.program import Operation, Program
from .._programs.residuals import Residual
from .._programs.values import Constant
from .._spaces.memory import memory_budget
from .stacked import vectorized


def at_once(program: Program, device: torch.device) -> int:
    """Return how many arguments are best taken in one pass."""
    most = memory_budget(device)
    if device.type == "cpu" and not program.is_opaque():  # user code may take all at once
        fits = STACK_BYTES_MULTIPLIED if multiplies(program) else STACK_BYTES
        most = min(most, fits * torch.get_num_threads())
    return max(1, most // max(program.peak_bytes(), 1))


class Stack(Portable):
    """A program for stacks of one length, for all points that run the program it is made of.

    `compared` counts the points at which it was found to be right.
    """

    __slots__ = ("compared", "executor")

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.executor = Executor(program)
        self.compared = 0

    @staticmethod
    def of(program: Program, binding: Binding, count: int) -> Stack:
        """Make the program for `count` arguments."""
        stand_ins = {
            c: Constant(c.spec, Saved(i, ""), c.source)
            for i, c in enumerate(program.constants)
            if not isinstance(c.origin, Literal)
        }
        numbers = Numbers()
        numbers.put(program.constants, binding.residuals)
        numbers.put(stand_ins.values(), [numbers.residual(c) for c in stand_ins])

        def stand_in(x: Any) -> Any:
            return stand_ins.get(x, x)

        moved = program.with_equations([eq.renamed(stand_in) for eq in program.equations])
        with torch.inference_mode(False), torch.no_grad():
            return Stack(vectorized(moved, numbers, count))

    def bind(self, binding: Binding) -> Binding:
        """Compute the numbers of a point of those of the program for one argument."""
        binding.check()
        theirs = binding.residuals
        with torch.inference_mode(False), torch.no_grad():
            computed = self.computed(lambda o: theirs[o.node].tensor)
        made = Binding(
            [
                theirs[c.origin.node]
                if isinstance(c.origin, Saved)
                else Residual(computed[c.origin], c.source)
                for c in self.program.constants
            ],
            (),
        )
        made.follow(binding)
        return made


class Stacks:
    """What is known of the stacks that one program was asked for, at any point.

    Attributes
    ----------
    gain
        Whether several arguments are taken together faster than one after the other.
    known
        Programs by the lengths of stacks; None where one was found to be wrong.
    """

    def __init__(self, program: Program) -> None:
        slower = _mostly_opaque(program) or _fills_caches(program)
        self.gain = program.communicates() or not slower  # all ranks do the same
        self.known: dict[int, Stack | None] = {}
        self._counts: Counter[int] = Counter()

    def due(self, count: int) -> bool:
        """Count a stack, and tell whether a program for its length is worth it."""
        self._counts[count] += 1
        return self._counts[count] >= STACK_AT

    def keep(self, count: int, stack: Stack) -> None:
        """Remember a program; only those of few lengths are kept."""
        if len(self.known) >= MOST_STACKS:
            self.known = {}
        self.known[count] = stack


_STACKS: MutableMapping[Executor, Stacks] = weakref.WeakKeyDictionary()


def stacks_of(executor: Executor) -> Stacks:
    """Return what is known of the stacks of a program."""
    found = _STACKS.get(executor)
    if found is None:
        found = _STACKS[executor] = Stacks(executor.program)
    return found


def _mostly_opaque(program: Program) -> bool:
    """Whether there is no more to do than to call user code that does not take batches."""
    user = program.opaque()
    built_in = (eq.op for eq in program.equations if not isinstance(eq.op, Operation))
    alone = bool(user) and not any(op.takes_batches for op in user)
    return alone and sum(not may_alias(op) for op in built_in) <= len(user)


def _fills_caches(program: Program) -> bool:
    """Whether values are so large that the processor's caches do not hold several of them."""
    values = (v for eq in program.equations for v in eq.outputs if v is not None)
    return any(v.spec.device.type == "cpu" and v.spec.numel >= LARGE_ENTRY for v in values)
