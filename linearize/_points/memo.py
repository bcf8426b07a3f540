"""The memo of points.

Entries are held within a budget and go by themselves: when a primal dies, when one that
was read is seen to have changed, and least recently used first when the budget is full.
Nothing here knows what a point is, beyond its size in bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import cachetools
import torch

from .._capture.state import State
from .._torch.sharded import local_of

P = TypeVar("P")
#: How many points are looked at when one is added.
_FEW = 2
#: A tensor with its version, or with the key of its content where a version would not tell.
Stamp = tuple["weakref.ref[torch.Tensor]", int | tuple[Any, ...]]
_REF = weakref.ref


@dataclasses.dataclass(frozen=True)
class Stats:
    """Counters of a `Linearizer`; fields can also be read by name, `stats["hits"]`.

    Attributes
    ----------
    hits
        Calls of `at` that were answered without running f.
    misses
        Calls of `at` that ran f.
    evictions
        Points dropped from the memo: budget, death of a primal, a change seen, or memory.
    points
        Points in the memo now.
    bytes
        Bytes of their residuals.
    recorded
        Points whose programs were recorded from their graph.
    reused
        Points that took over the programs of another one, whose graph has the same structure.
    dense
        Matrices that took the place of programs.
    compiled
        Programs that were compiled; one serves all points of a structure.
    why
        Why points were recorded although others had been, and how many: the first operation that
        differs, with the line of f if it is traced, or that does not show what it does.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    points: int = 0
    bytes: int = 0
    recorded: int = 0
    reused: int = 0
    dense: int = 0
    compiled: int = 0
    why: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __getitem__(self, name: str) -> int:
        if name not in self.__dataclass_fields__ or name == "why":
            raise KeyError(name)
        return int(getattr(self, name))


@dataclasses.dataclass(eq=False)
class _Entry(Generic[P]):
    point: P
    structure: Any
    state: State
    #: Keep weak references, and so their callbacks, alive.
    refs: list[Any]
    stamps: list[Stamp]

    def orphaned(self) -> bool:
        """Whether an owner is dead, and so perhaps its id taken by another object.

        Its entry is buried as soon as the memo's lock is free, which may be too late.
        """
        return not all(map(_alive, self.refs))


class Memo(Generic[P]):
    """A thread-safe memo of points with a budget.

    Parameters
    ----------
    maxsize
        The most points that are kept; 0 keeps none, None any number.
    max_bytes
        The most bytes that they may keep together; None for no limit.
    size_of
        Returns a point's bytes.
    fresh
        Whether a point can still be used.
    intact
        The same, looked at more closely: before a point is handed out again.
    """

    def __init__(
        self,
        maxsize: int | None,
        max_bytes: int | None,
        size_of: Callable[[P], int],
        fresh: Callable[[P], bool],
        intact: Callable[[P], bool],
    ) -> None:
        limit = float("inf") if maxsize is None else maxsize
        self._entries: cachetools.LRUCache[Hashable, _Entry[P]] = cachetools.LRUCache(limit)
        self._max_bytes = max_bytes
        self._size_of = size_of
        self._fresh, self._intact = fresh, intact
        self._lock = threading.Lock()
        self._dead: deque[tuple[Hashable, _Entry[P]]] = deque()
        #: Whose turn it is to be looked at.
        self._turns: deque[Hashable] = deque()
        self._hits = self._misses = self._evictions = 0

    def get(self, key: Hashable, structure: Any, state: State) -> P | None:
        """Return the point for a key if nothing that it was made from has changed.

        Parameters
        ----------
        key, structure
            Of the arguments.
        state
            What else f can reach.
        """
        gone = None
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and not (
                entry.structure == structure
                and not entry.orphaned()
                and not changed(entry.stamps)
                and entry.state.same(state)
                and self._intact(entry.point)
            ):
                gone = self._entries.pop(key)
                self._evictions += 1
                entry = None
            if entry is not None:
                self._hits += 1
        self._bury()
        del gone  # outside the lock: what it frees may call back
        return None if entry is None else entry.point

    def put(
        self,
        key: Hashable,
        structure: Any,
        state: State,
        point: P,
        owners: Iterable[Any],
        stamps: Sequence[Stamp],
    ) -> None:
        """Keep a point until one of `owners` dies or the budget needs its place."""
        entry = _Entry(point, structure, state, [], list(stamps))
        this = weakref.ref(self)
        bound = weakref.ref(entry)

        def died(_: Any) -> None:
            memo, own = this(), bound()
            if sys.is_finalizing():
                return
            if memo is not None and own is not None:
                memo._dead.append((key, own))
                memo._bury()

        entry.refs = [_reference(owner, died) for owner in owners]
        gone: list[Any] = []
        with self._lock:
            if self._entries.maxsize >= 1:
                before = len(self._entries)
                if key in self._entries:
                    gone.append(self._entries.pop(key))
                while len(self._entries) >= self._entries.maxsize:
                    gone.append(self._entries.popitem())
                self._entries[key] = entry
                self._evictions += before + 1 - len(self._entries)
        gone.clear()
        self._bury()
        self.sweep()
        self.shrink()

    def missed(self) -> None:
        """Count a miss."""
        with self._lock:
            self._misses += 1

    def shrink(self) -> None:
        """Drop least recently used points until the bytes are within the budget."""
        if self._max_bytes is None:
            return
        while True:
            with self._lock:
                points = [self._peek(key).point for key in self._entries]
            total = sum(map(self._size_of, points))
            del points
            if total <= self._max_bytes:
                return
            with self._lock:
                if not self._entries:
                    return
                gone = self._entries.popitem()
                self._evictions += 1
            del gone

    def clear(self) -> None:
        """Drop every point."""
        with self._lock:
            gone = list(self._entries.values())
            self._entries.clear()
            self._turns.clear()
            self._evictions += len(gone)
        gone.clear()
        self._bury()

    def tidy(self) -> None:
        """Drop points that cannot be used any more, and what is over the budget."""
        with self._lock:
            gone = self._stale(list(self._entries))
        gone.clear()
        self._bury()
        self.shrink()

    def sweep(self) -> None:
        """Drop those of a few points that cannot be used any more; each has its turn."""
        with self._lock:
            if not self._turns:
                self._turns.extend(self._entries)
            few = [self._turns.popleft() for _ in range(min(_FEW, len(self._turns)))]
            gone = self._stale([key for key in few if key in self._entries])
        gone.clear()
        self._bury()

    def _stale(self, keys: Sequence[Hashable]) -> list[_Entry[P]]:
        """Take out and return the entries that cannot be used any more; the lock is held."""
        old = [key for key in keys if not self._fresh(self._peek(key).point)]
        self._evictions += len(old)
        return [self._entries.pop(key) for key in old]

    def _peek(self, key: Hashable) -> _Entry[P]:
        """Return an entry; that is no use of it."""
        return cachetools.Cache.__getitem__(self._entries, key)

    def stats(self) -> Stats:
        """Return the counters."""
        self._bury()
        with self._lock:
            points = [self._peek(key).point for key in self._entries]
            counters = (self._hits, self._misses, self._evictions, len(points))
        return Stats(*counters, sum(map(self._size_of, points)))

    def _bury(self) -> None:
        """Drop the entries of dead owners.

        May be called by the garbage collector at any moment, also by a thread that holds the
        lock: then the holder does it when it is done.
        """
        while self._dead:
            if not self._lock.acquire(blocking=False):
                return
            gone = []
            try:
                while self._dead:
                    key, entry = self._dead.popleft()
                    if self._entries.get(key) is entry:
                        gone.append(self._entries.pop(key))
                        self._evictions += 1
            finally:
                self._lock.release()
            gone.clear()


class Repeats:
    """Knows whether the arguments of one call are those of the call before; tells it once."""

    def __init__(self) -> None:
        self._last: tuple[Hashable, Any, list[Any]] | None = None
        self._told = False

    def noted(self, key: Hashable, structure: Any, owners: Iterable[Any]) -> bool:
        """Take note of a call; return whether it is the first that repeats another one."""
        if self._told:
            return False
        last = self._last
        refs = [_reference(owner, lambda _: None) for owner in owners]
        self._last = (key, structure, refs)
        if last is None or last[:2] != (key, structure):
            return False
        self._told = all(_alive(ref) for ref in last[2])
        return self._told


def _alive(ref: Any) -> bool:
    return type(ref) is not _REF or ref() is not None


def _reference(owner: Any, callback: Callable[[Any], None]) -> Any:
    try:
        return weakref.ref(owner, callback)
    except TypeError:
        return owner


def changed(stamps: Iterable[Stamp]) -> bool:
    """Whether a tensor has another version, or other numbers, than it had."""
    for ref, stamp in stamps:
        t = ref()
        if t is not None and (t._version if type(stamp) is int else content_key(t)) != stamp:
            return True
    return False


def numbers(moving: Iterable[torch.Tensor]) -> list[Stamp]:
    """Return tensors that move without a count of changes with the keys of their content."""
    return [(weakref.ref(t), content_key(t)) for t in moving]


def content_key(t: torch.Tensor) -> tuple[Any, ...]:
    """Return a key that is equal for tensors of equal dtype, shape, device and bytes."""
    plain = local_of(t).detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    data = plain.view(torch.uint8).numpy()
    digest = hashlib.blake2b(data.tobytes(), digest_size=32).digest()
    return (tuple(t.shape), t.dtype, t.device, digest)
