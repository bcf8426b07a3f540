"""What was called at a point because it does not show what it does."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from .._capture.graph import Graph
from .._record.witness import Done, Met, Unseen, attend
from .._torch.graphs import walking


class Watched:
    """The calls of one point.

    Attributes
    ----------
    differs
        What did something else than where a program comes from; empty if nothing did.
    """

    def __init__(self) -> None:
        self.differs = ""
        #: What was called, and what it did.
        self._done: dict[Hashable, Done] = {}
        #: What did as elsewhere.
        self._same: set[Unseen] = set()
        #: The methods of custom Functions that are written down in programs of the point.
        self._inlined: dict[Unseen, None] = {}

    def agree(self, graph: Graph, calls: Iterable[Unseen], met: Met) -> bool:
        """Whether all does here what was recorded elsewhere; `met` receives what is read of it."""
        todo = [call for call in calls if call not in self._same]

        def agree() -> bool:
            differs = ""
            for call in todo:  # all in one go: checkpoints compute once for several nodes
                found, why = attend(graph, call, self._done)
                differs = differs or why
                if not why:
                    self._same.add(call)
                for place, r in found.items():
                    met.setdefault(place, r)
            self.differs = differs or self.differs
            return not differs

        return not todo or walking(agree)

    def let_go(self) -> None:
        """Let go of what was met, when nothing more is taken over."""
        self._done, self._same = {}, set()

    def inlined(self, calls: Iterable[Unseen]) -> None:
        """Take note of methods that are written down in a program."""
        self._inlined.update(dict.fromkeys(calls))

    def methods(self, kind: str | None) -> list[Unseen]:
        """Return the methods, of one kind, that any program of the point may hold.

        Programs are made of each other: what was written down for one may be part of another.
        """
        calls = (c for c in self._inlined if kind in (c.method, None))
        return sorted(calls, key=lambda c: (c.place, c.method, str(c.how)))
