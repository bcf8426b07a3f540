"""The structures that a `Linearizer` has met, and those that all of the process share.

Who makes a new `Linearizer` for the same function at each step, or calls `linearize.func` in a
loop, meets the same graphs again and again. Graphs of equal signatures have the same programs,
whichever function they come from.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable, MutableMapping, Sequence
from typing import Any

import cachetools
import torch
from cachetools.keys import hashkey

from .._capture.graph import Graph
from .._capture.matcher import Place
from .._execute.executor import Executor
from .._forms.segments import Segments
from .._spaces.space import TensorSpec
from .structure import Structure


class Shared:
    """The structures met lately, without tensors but single numbers.

    Graphs with custom Functions are not among them: what is kept of those is their classes.

    Parameters
    ----------
    most
        How many nodes the graphs may have together; a node takes some ten kilobytes.
    """

    def __init__(self, most: int = 2_000) -> None:
        self._lock = threading.Lock()
        self._known: cachetools.LRUCache[Hashable, Structure]
        self._known = cachetools.LRUCache(most, getsizeof=lambda s: max(1, s.size))

    def find(self, policy: Hashable, signature: tuple[Any, ...]) -> Structure | None:
        """Return a structure that somebody else met; what is found out about it serves all.

        Parameters
        ----------
        policy
            What its programs depend on besides the graph.
        signature
            Of the graph.
        """
        try:
            key = hashkey(policy, signature)
            with self._lock:
                return self._known.get(key)
        except TypeError:  # it has a part without a hash
            return None

    def keep(self, policy: Hashable, structure: Structure) -> None:
        """Remember a structure."""
        try:
            with self._lock:
                self._known[hashkey(policy, structure.signature)] = structure
        except (TypeError, ValueError):  # no hash, or too large
            return

    def drop(self, policy: Hashable, structure: Structure) -> None:
        """Forget a structure."""
        try:
            with self._lock:
                self._known.pop(hashkey(policy, structure.signature), None)
        except TypeError:  # no hash: it is not here
            return

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._known.clear()


SHARED = Shared()
#: How many of a `Linearizer`'s structures a graph is held against at once.
_LATEST = 3


class Structures:
    """The structures that a `Linearizer` has met, the latest first.

    Parameters
    ----------
    policy
        What programs depend on besides the graph.

    Attributes
    ----------
    recorded, reused
        How many points were recorded, and how many took over a structure.
    dense
        How many matrices took the place of programs.
    compiled
        How many programs were compiled.
    forms
        What came of it, by what runs them otherwise: who did not ask for it does not run it.
    """

    #: How many are kept; each is a few kilobytes per operation.
    limit = 16

    def __init__(self, policy: Hashable = None) -> None:
        self._policy = policy
        self._lock = threading.Lock()
        self._known: list[Structure] = []
        self.recorded = 0
        self.reused = 0
        self.dense = 0
        self.compiled = 0
        self.forms: MutableMapping[Executor, Segments | None] = weakref.WeakKeyDictionary()

    def recognised(
        self, graph: Graph, specs: Sequence[Sequence[TensorSpec]]
    ) -> tuple[Structure, dict[Place, torch.Tensor | None]] | None:
        """Return the structure of a graph if it is one of the latest, and what the graph saved."""
        for structure in self._known[:_LATEST]:
            saved = None if structure.matcher is None else structure.matcher(graph, specs)
            if saved is not None:
                return structure, saved
        return None

    def find(self, of: tuple[Any, ...], *, shared: bool = False) -> Structure | None:
        """Return the structure with a signature; if `shared`, also what others left."""
        with self._lock:
            for i, s in enumerate(self._known):
                if s.signature == of:
                    self._known.insert(0, self._known.pop(i))
                    return s
        found = SHARED.find(self._policy, of) if shared else None
        if found is not None:
            self._insert(found)
        return found

    def add(self, structure: Structure, *, shared: bool = False) -> None:
        """Take in a structure that was recorded; if `shared`, for others too."""
        self._insert(structure)
        if shared:
            SHARED.keep(self._policy, structure)

    def drop(self, structure: Structure) -> None:
        """Forget a structure that was found to be wrong, for others too."""
        with self._lock:
            self._known = [s for s in self._known if s is not structure]
        SHARED.drop(self._policy, structure)

    def _insert(self, structure: Structure) -> None:
        with self._lock:
            self._known.insert(0, structure)
            del self._known[self.limit :]

    @property
    def met(self) -> bool:
        """Whether there was a point already whose programs were asked for."""
        return self.recorded + self.reused > 0

    def count(self, *, reused: bool) -> None:
        """Count a point."""
        with self._lock:
            if reused:
                self.reused += 1
            else:
                self.recorded += 1

    def count_dense(self) -> None:
        """Count a matrix."""
        with self._lock:
            self.dense += 1

    def count_compiled(self) -> None:
        """Count a compiled program."""
        with self._lock:
            self.compiled += 1
