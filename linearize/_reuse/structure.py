"""What the graphs of different points have in common.

A solver linearizes one function at many points, and the graphs mostly differ in nothing but
the numbers that they saved: they have equal signatures. Such points share a `Structure`:
their linear programs as `Template`s, into which the numbers of each point are bound.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import cachetools

from .._capture.matcher import Matcher
from .._forms.succession import Learned
from .._programs.program import Program
from .._record.witness import Unseen
from .template import Template

#: A direction, and which arguments are not zero.
Key: TypeAlias = tuple[str, tuple[bool, ...]]


#: How many templates of a map are kept: methods of custom Functions may do one thing or another.
_MOST_TEMPLATES = 8
#: The direction under which the pullback stands as it was recorded.
RECORDED = "recorded pullback"

#: The structures whose programs were found to be adjoint, the latest last, as hashes of their
#: signatures and of what was called: a function that is linearized anew need not be checked anew.
PROVED: cachetools.FIFOCache[int, None] = cachetools.FIFOCache(10_000)
_PROVED_LOCK = threading.Lock()


class Structure:
    """What is known of all points with one signature.

    Parameters
    ----------
    of
        The signature.
    recorded
        The pullback as it was recorded, with what an author did not give still missing; None if
        it holds at one point only.
    unseen
        What was called that the signature does not tell all of: where it does something else,
        the graph is not of this structure.

    Attributes
    ----------
    notes
        What others found out about it, under names of their own.
    """

    def __init__(
        self, of: tuple[Any, ...], recorded: Program | None = None, unseen: Sequence[Unseen] = ()
    ) -> None:
        self.signature = of
        self.unseen = tuple(unseen)
        self.recorded = recorded
        #: Recognises its graphs; None if there is none, or not yet.
        self.matcher: Matcher | None = None
        self._lock = threading.Lock()
        self._templates: dict[Key, list[Template]] = {}
        self._learned: dict[Key, Learned] = {}
        self.notes: dict[str, Any] = {}
        try:
            self._hash: int | None = hash((of, tuple([c.trace for c in self.unseen])))
        except TypeError:
            self._hash = None
        self._proved = self._hash in PROVED
        #: Gives what a graph of another signature shares with this one; None if it is nothing.
        self.common: Callable[[tuple[Any, ...]], Structure | None] | None = None
        #: Set when a program was found to be wrong.
        self.wrong = False

    @property
    def size(self) -> int:
        """How many nodes the graph has."""
        return len(self.signature[0])

    @property
    def proved(self) -> bool:
        """Whether its two programs were found to be adjoint."""
        return self._proved

    @proved.setter
    def proved(self, value: bool) -> None:
        self._proved = value
        if value and self._hash is not None:
            with _PROVED_LOCK:
                PROVED[self._hash] = None

    def offer(self, key: Key, template: Template) -> Template:
        """Take a template in, unless there is one; return the one that runs this program."""
        with self._lock:
            known = self._templates.setdefault(key, [])
            for t in known:
                if t.kind == template.kind:
                    return t if t.program is template.program else template
            known.insert(0, template)
            del known[_MOST_TEMPLATES:]
            known.sort(key=lambda t: not t.simplified)  # simplified ones are preferred
            return template

    def templates(self, key: Key) -> list[Template]:
        """Return the templates of a map, the best first."""
        with self._lock:
            if key[0] == RECORDED and self.recorded is not None and key not in self._templates:
                self._templates[key] = [Template(self.recorded, simplified=False)]
            return list(self._templates.get(key, ()))

    def learned(self, key: Key) -> Learned:
        """Return what points have found out about a map, and may add to."""
        with self._lock:
            return self._learned.setdefault(key, Learned())
