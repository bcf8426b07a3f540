"""Standing in the place of something of PyTorch's, and who in a thread wants to be told of it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any


class Installed:
    """Something of this package's that stands in PyTorch while somebody needs it, in any thread.

    A class and no generator: what interrupts the way out of a generator keeps it from its end.

    Parameters
    ----------
    put, remove
        Called when the first one enters, and when the last one leaves.
    """

    def __init__(self, put: Callable[[], object], remove: Callable[[], object]) -> None:
        self._put, self._remove = put, remove
        self.lock = threading.RLock()
        self.users = 0

    def __enter__(self) -> None:
        with self.lock:
            if self.users == 0:
                self._put()
            self.users += 1

    def __exit__(self, *exc: object) -> None:
        with self.lock:
            self.users -= 1
            if self.users == 0:
                self._remove()


class ThreadStack(threading.local):
    """What a thread has entered and not left yet, the innermost last."""

    def __init__(self) -> None:
        self.entered: list[Any] = []

    @property
    def innermost(self) -> Any:
        """What was entered last; None if there is nothing."""
        return self.entered[-1] if self.entered else None

    @contextlib.contextmanager
    def emptied(self) -> Iterator[None]:
        """Have entered nothing for a while."""
        before, self.entered = self.entered, []
        try:
            yield
        finally:
            self.entered = before
