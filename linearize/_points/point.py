"""A point at which f has run, and its linearization once somebody has asked for it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

from .._capture.capture import Capture
from .linearization import Guarded, Linearization


class Point:
    """A run of f, `captured`, which is linearized when that is first asked for."""

    def __init__(self, captured: Capture) -> None:
        self.in_space, self.out_space = captured.in_space, captured.out_space
        self._captured: Capture | None = captured
        self._value = Guarded(captured.value, "the value")
        self._lock = threading.Lock()
        self._made: Linearization | None = None
        #: The tensors that f read, with their versions after the run.
        self.reads: list[tuple[weakref.ref[torch.Tensor], int]] = captured.reads
        #: Those of them that PyTorch writes to without raising their version.
        self.moving = captured.moving

    def linearized(self, linearize: Callable[[Capture], Linearization]) -> Linearization:
        """Return the linearization, each time the same; `linearize` makes it.

        A point that kept the maker, whose memo keeps the point, would outlive both.
        """
        if self._made is None:
            with self._lock:
                if self._made is None:
                    assert self._captured is not None
                    self._made = linearize(self._captured)
                    self._captured = None
        return self._made

    @property
    def value(self) -> Any:
        """The value of f, in its structure."""
        return self._value.get()

    def size(self) -> int:
        """Return the bytes that the products keep."""
        return 0 if self._made is None else self._made._size()

    def fresh(self) -> bool:
        """Whether nothing that the point gives was changed in place, and it is open."""
        if self._made is not None:
            return self._made._fresh()
        return not any(r.changed() for r in self._value.stamps)

    def intact(self) -> bool:
        """Whether the same holds, and of what the graph keeps too."""
        return self.fresh() if self._made is None else self._made._intact()
