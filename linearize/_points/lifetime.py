"""Whether a point is open, who runs it, and what is let go of."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from .._torch.modes import undisturbed
from .ranks import Ranks

#: Points one of whose products has died since somebody tidied up.
DUE: deque[weakref.ref[Any]] = deque()


def tidy() -> None:
    """Let go of what points keep for products that have died, unless somebody would notice."""
    for _ in range(len(DUE)):
        if not undisturbed():
            return
        try:
            due = DUE.popleft()
        except IndexError:  # another thread was quicker
            return
        point = due()
        if point is not None and not point.tidy():
            DUE.append(due)


class Lifetime:
    """Whether a point is open, and what to release when it closes."""

    def __init__(self, notify: Callable[[bool], None] | None) -> None:
        self.closed = False
        #: Who runs its products together; None if f does not communicate.
        self.ranks: Ranks | None = None
        self._notify = notify
        self._parts: list[weakref.ref[Any]] = []
        #: When those that are dead are looked for.
        self._most = 16
        self._lock = threading.Lock()

    def register(self, part: Any) -> None:
        """Have `part._release()` called at the end, if it lives that long."""
        with self._lock:
            self._parts.append(weakref.ref(part))
            if len(self._parts) > self._most:
                self._parts = [ref for ref in self._parts if ref() is not None]
                self._most = 16 + 2 * len(self._parts)

    def close(self) -> None:
        """Release all parts."""
        with self._lock:
            self.closed = True
            parts = [part for ref in self._parts if (part := ref()) is not None]
        for part in parts:
            part._release()
        self.changed()

    def changed(self) -> None:
        """Tell the memo that the point has grown or was closed."""
        if self._notify is not None:
            self._notify(self.closed)
