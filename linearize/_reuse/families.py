"""Graphs that differ in nothing but numbers that scale.

A time step that changes makes another structure of each graph. As soon as a number is seen to
differ, it becomes a constant of a structure that all such graphs have in common, whose program
is made of the one that was recorded. It depends on what the signature says of these numbers
still: on their types, and on none of them being one where formulas leave that out. Numbers that
were the same so far stay what they were: a program with fewer constants is a quicker one.
"""

from __future__ import annotations

import threading
from typing import Any

from .._programs.program import Program
from .._programs.scales import Where, scales_of, with_numbers
from .structure import Structure


class Family:
    """The graphs whose signatures are those of one that was recorded, but for numbers.

    Parameters
    ----------
    first
        Of the one that was recorded.
    program
        Its pullback, as it was recorded.
    """

    def __init__(self, first: Structure, program: Program) -> None:
        self._of = first.signature
        self._program = program
        self._unseen = first.unseen
        self._lock = threading.Lock()
        self._free: frozenset[Where] | None = None
        self._changing: frozenset[Where] = frozenset()
        self._common: Structure | None = None

    def common(self, of: tuple[Any, ...]) -> Structure | None:
        """Return what a graph shares with those before; None if that is not all but numbers."""
        if of[:-1] != self._of[:-1]:
            return None
        pairs = zip(self._of[-1], of[-1], strict=True)
        differing = {(place, name) for (place, name, a), (_, _, b) in pairs if a != b}
        with self._lock:
            if self._common is not None and self._common.wrong:
                return None
            if differing <= self._changing:
                return self._common
            if self._free is None:
                self._free = scales_of(self._program)
            if not differing <= self._free:
                return None
            self._changing |= differing
            numbers = [
                (*x[:2], None) if (x[0], x[1]) in self._changing else x for x in self._of[-1]
            ]
            program = with_numbers(self._program, self._changing)
            self._common = Structure((*of[:-1], tuple(numbers)), program, self._unseen)
            return self._common
