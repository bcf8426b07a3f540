"""What the graphs of different points have in common.

A solver linearizes one function at many points, and the graphs mostly differ in nothing but
the numbers that they saved: they have equal signatures. Such points share a `Structure`:
their linear programs as `Template`s, into which the numbers of each point are bound.
"""

from __future__ import annotations

import threading
from typing import Any, TypeAlias

from .._capture.matcher import Matcher
from .._forms.succession import Learned
from .template import Template

#: A direction, and which arguments are not zero.
Key: TypeAlias = tuple[str, tuple[bool, ...]]


#: The structures whose programs were found to be adjoint, the latest last, as hashes of their
#: signatures: a function that is linearized anew need not be checked anew.
PROVED: dict[int, None] = {}
_MOST_PROVED = 10_000
_PROVED_LOCK = threading.Lock()


class Structure:
    """What is known of all points with one signature."""

    def __init__(self, of: tuple[Any, ...]) -> None:
        self.signature = of
        #: Recognises its graphs; None if there is none, or not yet.
        self.matcher: Matcher | None = None
        self._lock = threading.Lock()
        self._templates: dict[Key, list[Template]] = {}
        self._learned: dict[Key, Learned] = {}
        try:
            self._hash: int | None = hash(of)
        except TypeError:
            self._hash = None
        self._proved = self._hash in PROVED

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
                if len(PROVED) > _MOST_PROVED:
                    del PROVED[next(iter(PROVED))]

    def offer(self, key: Key, template: Template) -> Template:
        """Take a template in, unless there is one; return the one that runs this program."""
        with self._lock:
            known = self._templates.setdefault(key, [])
            for t in known:
                if t.simplified == template.simplified:
                    return t if t.program is template.program else template
            known.append(template)
            known.sort(key=lambda t: not t.simplified)  # simplified ones are preferred
            return template

    def templates(self, key: Key) -> list[Template]:
        """Return the templates of a map, the best first."""
        with self._lock:
            return list(self._templates.get(key, ()))

    def learned(self, key: Key) -> Learned:
        """Return what points have found out about a map, and may add to."""
        with self._lock:
            return self._learned.setdefault(key, Learned())
