"""The structures that a `Linearizer` has met, and those that all of the process share.

Who makes a new `Linearizer` for the same function at each step, or calls `linearize.func` in a
loop, meets the same graphs again and again. Graphs of equal signatures have the same programs,
whichever function they come from.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, MutableMapping, Sequence
from typing import Any, TypeAlias

import cachetools
import torch
from cachetools.keys import hashkey

from .._capture.graph import Graph
from .._capture.matcher import Place
from .._execute.executor import Executor
from .._forms.segments import Segments
from .._spaces.space import TensorSpec
from .structure import Structure

#: Whether a structure is that of a graph.
Fits: TypeAlias = Callable[[Structure], bool]


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
        #: The latest of those that differ in numbers only.
        self._families: cachetools.LRUCache[Hashable, Structure] = cachetools.LRUCache(256)

    def find(
        self, policy: Hashable, signature: tuple[Any, ...], fits: Fits = lambda _: True
    ) -> Structure | None:
        """Return a structure that somebody else met; what is found out about it serves all.

        `policy` is what its programs depend on besides the graph; `fits` tells whether it is that
        of the graph in what the signature does not tell.
        """
        try:
            key = hashkey(policy, signature)
            with self._lock:
                known = self._known.get(key)
                family = None
                if known is None and signature[-1]:
                    family = self._families.get(hashkey(policy, signature[:-1]))
            if family is not None and family.common is not None:
                known = family.common(signature)
            return known if known is not None and fits(known) else None
        except TypeError:  # it has a part without a hash
            return None

    def keep(self, policy: Hashable, structure: Structure) -> None:
        """Remember a structure."""
        with self._lock, contextlib.suppress(TypeError, ValueError):  # no hash, or too large
            self._known[hashkey(policy, structure.signature)] = structure
            if structure.common is not None:
                self._families[hashkey(policy, structure.signature[:-1])] = structure

    def drop(self, policy: Hashable, structure: Structure) -> None:
        """Forget a structure."""
        with self._lock, contextlib.suppress(TypeError):  # no hash: it is not here
            self._known.pop(hashkey(policy, structure.signature), None)
            self._families.pop(hashkey(policy, structure.signature[:-1]), None)

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._known.clear()
            self._families.clear()


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
    counts
        How many points were "recorded", and how many took over a structure ("reused"); how many
        matrices took the place of programs ("dense"), and how many programs were "compiled".
    pulls_much
        Whether a point was asked for more pullbacks than PyTorch's engine gives.
    why
        Why points were recorded although others had been, and how many.
    forms
        Compiled programs, by what runs them otherwise: who did not ask for one does not run it.
    """

    #: How many are kept; each is a few kilobytes per operation.
    limit = 16

    def __init__(self, policy: Hashable = None) -> None:
        self._policy = policy
        self._lock = threading.Lock()
        self._known: list[Structure] = []
        self.counts = dict.fromkeys(("recorded", "reused", "dense", "compiled"), 0)
        self.pulls_much = False
        self.why: Counter[str] = Counter()
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

    def find(
        self, of: tuple[Any, ...], fits: Fits = lambda _: True, *, shared: bool = False
    ) -> Structure | None:
        """Return the structure with a signature; if `shared`, one that others left will do."""
        with self._lock:
            known = list(self._known)
        found = next((s for s in known if s.signature == of and fits(s)), None)
        if found is None and shared:
            found = SHARED.find(self._policy, of, fits)
        if found is None and of[-1]:
            common = (s.common(of) for s in known if s.common is not None)
            found = next((s for s in common if s is not None and fits(s)), None)
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
        structure.wrong = True
        with self._lock:
            self._known = [s for s in self._known if s is not structure]
        SHARED.drop(self._policy, structure)

    def _insert(self, structure: Structure) -> None:
        with self._lock:
            self._known = [structure, *(s for s in self._known if s is not structure)]
            del self._known[self.limit :]

    @property
    def met(self) -> bool:
        """Whether there was a point already whose programs were asked for."""
        return self.counts["recorded"] + self.counts["reused"] > 0

    def count(self, what: str, more: int = 1) -> None:
        """Count one more, or as many, of what is counted."""
        with self._lock:
            self.counts[what] += more

    def note(self, why: str) -> None:
        """Take note of why a point was recorded although others had been."""
        with self._lock:
            self.why[why] += 1

    def latest(self) -> Structure | None:
        """Return the structure that was met last."""
        with self._lock:
            return self._known[0] if self._known else None
