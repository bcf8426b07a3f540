"""Computing the constants of a program from what a point has."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

import torch

from .._programs.origins import Literal, Origin, Saved, ordered
from .._programs.program import Program
from .._spaces.nested import map_leaves
from .._torch.modes import functions_as_they_are, functions_overridden
from .quickest import quickest
from .thresholds import WRITE_OUT_NUMBERS_AT
from .writer import Writer


class Schedule:
    """Computes tensors from their origins, each intermediate once and no longer than needed.

    Attributes
    ----------
    saved
        What is read of the graph, in the order in which it is asked for.
    """

    __slots__ = ("_calls", "_gone", "_order", "_run", "_wanted", "saved")

    def __init__(self, wanted: Sequence[Origin]) -> None:
        self._wanted = tuple(wanted)
        self._order = ordered(wanted)
        self.saved = [o for o in self._order if isinstance(o, Saved)]
        last = {x: o for o in self._order for x in o.inputs()}
        kept = set(self._wanted)
        #: What each leaves behind that is needed no more.
        self._gone: dict[Origin, list[Origin]] = {}
        for x, o in last.items():
            if x not in kept:
                self._gone.setdefault(o, []).append(x)
        self._calls = 0
        self._run: Callable[[Sequence[torch.Tensor]], list[torch.Tensor]] = self._interpret

    def __call__(self, read: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Compute the wanted tensors, given what is saved."""
        self._calls += 1
        if self._calls == WRITE_OUT_NUMBERS_AT:
            self._run = self._written_out()
            try:
                return self._run(read)
            except TypeError:  # the quickest way to call takes fewer kinds of arguments
                self._run = self._interpret
        if functions_overridden():
            with functions_as_they_are():
                return self._run(read)
        return self._run(read)

    def _interpret(self, read: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        values: dict[Origin, Any] = dict(zip(self.saved, read, strict=True))
        for o in self._order:
            if isinstance(o, Literal):
                values[o] = o.tensor
            elif o.op is not None:
                args, kwargs = map_leaves(
                    lambda x: values[x] if isinstance(x, Origin) else x, (o.args, o.kwargs)
                )
                values[o] = o.op(*args, **kwargs)
            for x in self._gone.get(o, ()):
                del values[x]
        return [values[o] for o in self._wanted]

    def _written_out(self) -> Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]:
        """Return straight-line Python that does the same."""
        w = Writer((Origin,))
        w.names = names = {o: f"t{i}" for i, o in enumerate(self._order)}
        lines = ["def run(saved):"]
        if self.saved:
            lines.append(f" {', '.join(names[o] for o in self.saved)}, = saved")
        for o in self._order:
            if isinstance(o, Literal):
                lines.append(f" {names[o]} = {w.constant(o.tensor)}")
            elif o.op is not None:
                lines.append(
                    f" {names[o]} = {w.call(w.constant(quickest(o.op)), o.args, o.kwargs)}"
                )
            if o in self._gone:
                lines.append(f" del {', '.join(names[x] for x in self._gone[o])}")
        lines.append(f" return [{', '.join(names[o] for o in self._wanted)}]")
        return w.function(lines, "origins")


class Portable:
    """A program with constants that are computed of what a graph saved.

    What it depends on besides these is told by the key under which it is kept: `node_key` for a
    program of a single node, `signature` for one of a whole graph. It holds no tensors but those
    that are part of the structure.
    """

    __slots__ = ("_computed", "_schedules", "program")

    def __init__(self, program: Program) -> None:
        self.program = program
        origins = dict.fromkeys(c.origin for c in program.constants)
        self._computed = [o for o in origins if not isinstance(o, Saved)]
        self._schedules: dict[Any, Schedule] = {}

    def computed(
        self, read: Callable[[Saved], torch.Tensor], known: Container[Origin] = ()
    ) -> dict[Origin, torch.Tensor]:
        """Compute the constants that are not `known`, nor read from what the graph saved."""
        missing = [o for o in self._computed if o not in known]
        if not missing:
            return {}
        key = tuple(map(id, missing))
        schedule = self._schedules.get(key)
        if schedule is None:
            schedule = self._schedules[key] = Schedule(missing)
        return dict(zip(missing, schedule([read(o) for o in schedule.saved]), strict=True))
