"""Programs that hold at other nodes and points of the same structure."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch

from .._programs.origins import Origin, Saved
from .._programs.program import Program
from .schedule import Schedule


class Portable:
    """A program with constants that are computed of what a graph saved.

    What it depends on besides these is told by the key under which it is kept: `node_key` for
    a program of a single node, `signature` for one of a whole graph. It holds no tensors but
    those that are part of the structure.

    Attributes
    ----------
    program
        The program.
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
        """Compute the constants that are not just read.

        Parameters
        ----------
        read
            Gives what the graph saved.
        known
            What need not be computed.
        """
        missing = [o for o in self._computed if o not in known]
        if not missing:
            return {}
        key = tuple(map(id, missing))
        schedule = self._schedules.get(key)
        if schedule is None:
            schedule = self._schedules[key] = Schedule(missing)
        return dict(zip(missing, schedule([read(o) for o in schedule.saved]), strict=True))
