"""`Linearizer`, which runs a function once per point and remembers the points."""

from __future__ import annotations

import dataclasses
import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import torch
from cachetools.keys import hashkey

from .._capture.capture import Capture, capture
from .._capture.contexts import ContextRecords
from .._capture.reach import Reach
from .._capture.state import State
from .._forms.compiled import Options
from .._reuse.shared import Structures
from .._spaces.trees import flatten
from .._text.labels import function_name
from .._torch.compiled import compiled
from .._torch.modes import eagerly
from ..errors import CopyError, MemoWarning, OptionError, StructureError
from .lifetime import tidy
from .linearization import Linearization
from .memo import Memo, Repeats, Stats, content_key, numbers
from .point import Point
from .policy import Policy
from .ranks import group_of_records, run_of_f

__all__ = ["Linearizer"]


class Linearizer:
    """Linearizes a function at points, running it once per point.

    Parameters
    ----------
    f
        Any function of tensors, or of pytrees of them, that returns tensors or a pytree of
        them. It just runs: control flow, `.item()`, prints and custom
        `torch.autograd.Function` objects are all fine.
    argnums
        Which positional arguments are differentiated: a position or a sequence of them.
        None means all. The others, and keyword arguments, are passed through.
    has_aux
        Whether f returns `(value, aux)`; aux is not differentiated.
    maxsize
        The most points that the memo keeps, least recently used dropped first. None for any
        number, 0 for none.
    max_bytes
        The most bytes of residuals that the memo keeps. None for no limit.
    match
        When `at` takes a point for one that it has seen: "identity" compares tensor objects
        and their version counters; "value" compares contents, for callers that pass a fresh
        or a reused buffer each time (f then runs on copies). Comparing contents synchronises
        with the device.
    opaque
        What to do when a product needs a method that a custom Function lacks and that cannot
        be derived: "error" raises `MissingDerivativeError`; "materialize" builds the matrix of
        that Function from unit vectors.
    opaque_limit
        The most bytes that one such matrix may take.
    simplify
        Whether a program that is run repeatedly is simplified; the simplified one takes over
        when it was seen to give the same.
    check
        When the two products are checked to be adjoint on one random pair, and programs taken
        over from another point to be those of this one. "structure": once for all points with
        one structure, without calling custom Functions. "always": at each point, before its
        first product, with the methods of custom Functions, each called once more for it.
        "never": not at all. A failure is an `AdjointError` or a `ReuseError`.
    dense_limit
        The most bytes that the Jacobian of a point may take as a matrix. A program that is
        slower than its matrix, and was run often enough to pay for it, is replaced by it;
        programs that call custom Functions are not, nor any if `simplify` is False. 0 or None
        for no matrices.
    compile
        Whether f, and programs that are run repeatedly, go through `torch.compile`, programs each
        once for all points with one structure: True, or a dict of options of `torch.compile`
        (`mode`, `backend`, `options`). Of f, what cannot be compiled or seen through runs as it
        is, and `print(here.program)` says why. Custom Functions stay calls. On CUDA programs are
        replayed from CUDA graphs too, unless the dict has `"cudagraph": False`.
    trace
        Whether to note which line of f keeps what, for `residuals()`, `summary()` and
        `report()` of a `Linearization`, and for messages. It makes each operation of f some
        microseconds slower.
    unseen
        What the memo takes things for that f can reach and that cannot be looked into: functions
        in C of packages that it does not know, objects that hide their state, iterators. With
        "changes" no point is remembered then, and a `MemoWarning` says so when f runs again at
        the same primals; with "constant" the caller vouches that they stay as they are.

    Notes
    -----
    The memo sees in-place changes of primals and of whatever tensors f read, and every change of
    what f's code can reach: variables of enclosing functions, global variables, attributes of
    objects and modules, lists, dicts, sets, NumPy arrays. It cannot see a file, a clock, a random
    draw, the inside of installed packages, or a write that PyTorch does not see (`.data`).
    """

    def __init__(
        self,
        f: Callable[..., Any],
        *,
        argnums: int | Sequence[int] | None = None,
        has_aux: bool = False,
        maxsize: int | None = 64,
        max_bytes: int | None = None,
        match: Literal["identity", "value"] = "identity",
        opaque: Literal["error", "materialize"] = "error",
        opaque_limit: int = 1 << 28,
        simplify: bool = True,
        check: Literal["structure", "always", "never"] = "structure",
        dense_limit: int | None = 1 << 24,
        compile: bool | dict[str, Any] = False,
        trace: bool = False,
        unseen: Literal["changes", "constant"] = "changes",
    ) -> None:
        if not callable(f):
            raise StructureError(f"Linearizer: f must be callable, got {type(f).__name__}")
        _check_argnums(argnums)
        if match not in ("identity", "value"):
            raise OptionError(f'match must be "identity" or "value", got {match!r}')
        if opaque not in ("error", "materialize"):
            raise OptionError(f'opaque must be "error" or "materialize", got {opaque!r}')
        if unseen not in ("changes", "constant"):
            raise OptionError(f'unseen must be "changes" or "constant", got {unseen!r}')
        if check not in ("structure", "always", "never"):
            raise OptionError(f'check must be "structure", "always" or "never", got {check!r}')
        limits = {"maxsize": maxsize, "max_bytes": max_bytes, "dense_limit": dense_limit}
        options = Options.of(compile)  # raises
        for name, limit in limits.items():
            if limit is not None and limit < 0:
                raise OptionError(f"{name} must not be negative, got {limit}")
        self.f = f
        self._options = options
        self._compiled: Callable[..., Any] | None = None
        self._argnums = argnums
        self._has_aux = has_aux
        self._trace = trace
        self._by_value = match == "value"
        self._policy = Policy(
            opaque == "materialize", opaque_limit, simplify, check, dense_limit or 0, compile
        )
        self._keeps = maxsize != 0
        self._reach = Reach(f)
        self._vouched = unseen == "constant"
        self._repeats = Repeats()
        self._memo = Memo(maxsize, max_bytes, Point.size, Point.fresh, Point.intact)
        self._structures = Structures(self._policy.shared)
        self._open: weakref.WeakSet[Any] = weakref.WeakSet()
        self._scopes: list[weakref.WeakSet[Any]] = []
        self._running: dict[Hashable, _Run] = {}

    @eagerly
    def at(self, *args: Any, **kwargs: Any) -> Linearization:
        """Linearize f at a point, or return the linearization made there before.

        Parameters
        ----------
        *args, **kwargs
            The arguments of f.

        Returns
        -------
        Linearization
            The same object for the same point, as long as the memo keeps it.

        Raises
        ------
        StructureError
            If no argument is differentiable, or f's output is not made of tensors.
        UnsupportedError
            If a primal or an output has a layout that is not supported.
        Exception
            Whatever f raises; nothing is kept then.
        """
        return self._point(args, kwargs).linearized(self._linearized)

    def _point(self, args: Sequence[Any], kwargs: dict[str, Any], *, later: bool = False) -> Point:
        """Return a point where f has run; with `later` it is linearized at the first need."""
        argnums = self._positions(len(args))
        tidy()
        asked = self._asked(args, kwargs) if self._keeps else None
        if asked is None:
            self._memo.missed()
            return self._run(args, kwargs, argnums, None, later)
        if asked.state.unseen and not self._vouched:
            self._memo.missed()
            self._warn_of_repeats(asked)
            return self._run(args, kwargs, argnums, None, later)
        point = self._memo.get(asked.key, asked.structure, asked.state)
        if point is not None:
            return point
        run = _Run()
        # Twice: an interrupt may come before the first has begun. The `return` stands behind both,
        # as Python 3.12 leaves it out of what they guard.
        try:
            try:
                known = self._awaited(asked, run)
                point = known or self._run(args, kwargs, argnums, asked, later)
            finally:
                self._end(asked.key, run)
        finally:
            self._end(asked.key, run)
        return point

    def _awaited(self, asked: _Asked, mine: _Run) -> Point | None:
        """Return the point if another thread is about to make it; else it is ours to make."""
        while True:
            # Without a lock: an interrupt could leave it locked.
            run = self._running.setdefault(asked.key, mine)
            others = [r for r in list(self._running.values()) if r is not run]
            inside = any(r.thread == mine.thread for r in others)
            # A call of `at` from inside f waits for nobody: two could wait for each other.
            waits = not (run is mine or inside or run.thread == mine.thread)
            if waits:
                run.done.wait()
                asked.state = self._reach.now(asked.others)
            point = self._memo.get(asked.key, asked.structure, asked.state)
            if point is not None:
                return point
            if not waits:
                self._memo.missed()
                return None

    def _warn_of_repeats(self, asked: _Asked) -> None:
        if self._repeats.noted(asked.key, asked.structure, asked.owners):
            warnings.warn(
                f"f ran again at a point where it ran before: {asked.state.unseen} cannot be "
                'looked into, so that no point is remembered. Pass unseen="constant" to '
                "Linearizer if it stays as it is",
                MemoWarning,
                stacklevel=4,
            )

    def _end(self, key: Hashable, run: _Run) -> None:
        """Let those who wait for a run go on; may be called again."""
        if self._running.get(key) is run:
            del self._running[key]
        if not run.done.is_set():
            run.done.set()

    def stats(self) -> Stats:
        """Return the memo's counters, and how many points shared their structure."""
        known = self._structures
        return dataclasses.replace(
            self._memo.stats(),
            **known.counts,
            why=dict(known.why),
        )

    def clear(self) -> None:
        """Forget all points. Those still held elsewhere go on working."""
        self._memo.clear()

    def close(self) -> None:
        """Close every point made so far, wherever it is held, and forget it."""
        self.clear()
        for lifetime in list(self._open):
            lifetime.close()

    def __enter__(self) -> Linearizer:
        self._scopes.append(weakref.WeakSet())
        return self

    def __exit__(self, *exc: object) -> None:
        for lifetime in list(self._scopes.pop()):
            lifetime.close()
        self._memo.tidy()

    def __repr__(self) -> str:
        return f"<Linearizer of {function_name(self.f)}: {self._memo.stats()}>"

    def __reduce__(self) -> Any:
        raise CopyError("a Linearizer cannot be copied or pickled: make one from its function")

    # -- one point ----------------------------------------------------------------------

    def _run(
        self,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        argnums: Sequence[int],
        asked: _Asked | None,
        later: bool,
    ) -> Point:
        def run(records: ContextRecords) -> Point:
            captured = capture(
                self.f,
                args,
                kwargs,
                argnums,
                has_aux=self._has_aux,
                # Where all that f can read is known, nobody has to look on.
                watch=asked is not None and not asked.state.whole,
                copy=self._by_value,
                trace=self._trace,
                records=records,
                compiled=self._run_as,
            )
            point = Point(captured)
            # What was seen of custom Functions, or out of sight, is noted now or never.
            if not later or captured.watched or len(records) or records.communicates():
                point.linearized(self._linearized)
            return point

        point = self._with_room(lambda: self._by_all_ranks(run))
        # Another rank may have forgotten what this one remembers, and would run f alone.
        if asked is not None and point.in_space.group is None:
            read = [*point.reads, *numbers(point.moving), *asked.state.stamps()]
            stamps = [*asked.stamps, *read]
            self._memo.put(asked.key, asked.structure, asked.state, point, asked.owners, stamps)
        return point

    def _by_all_ranks(self, run: Callable[[ContextRecords], Point]) -> Point:
        """Run f, together with the ranks that it communicates with."""
        records = ContextRecords()
        held = self._policy.check != "never"
        point, ranks = run_of_f(records, lambda: run(records), held=held)
        if records.communicates():
            point.linearized(self._linearized)._lifetime.ranks = ranks
        point.in_space.group = point.out_space.group = group_of_records(records)
        return point

    def _with_room(self, make: Callable[[], Point]) -> Point:
        """Make a point; where memory runs out, once more without those that are remembered."""
        try:
            return make()
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
        # The error, with the frames that it holds, is gone by now.
        self._memo.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return make()

    def _linearized(self, captured: Capture) -> Linearization:
        point = Linearization(
            captured, self._policy, self._notifier(), self._structures, alone=False
        )
        for group in (self._open, *self._scopes):
            group.add(point._lifetime)
        return point

    @property
    def _run_as(self) -> Callable[..., Any]:
        """What runs in the place of f: f, compiled if that was asked for."""
        if self._compiled is None:
            options = self._options
            self._compiled = self.f if options is None else compiled(self.f, options.torch)
        return self._compiled

    def _notifier(self) -> Callable[[bool], None]:
        """Return what a point calls when it has grown or, told so, was closed."""
        memo = weakref.ref(self._memo)

        def notify(closed: bool) -> None:
            known = memo()
            if known is not None:
                known.tidy() if closed else known.shrink()

        return notify

    def _positions(self, count: int) -> Sequence[int]:
        given = self._argnums
        if given is None:
            return range(count)
        positions = [given] if isinstance(given, int) else list(given)
        resolved = [p + count if p < 0 else p for p in positions]
        for p, r in zip(positions, resolved, strict=True):
            if not 0 <= r < count:
                raise StructureError(
                    f"argnums={given!r}: position {p} is out of range, at() got {count} "
                    "positional arguments"
                )
        if len(set(resolved)) != len(resolved):
            raise StructureError(f"argnums={given!r}: a position stands twice")
        return resolved

    def _asked(self, args: Any, kwargs: Any) -> _Asked | None:
        """Return what a point is recognised by, None if it cannot be."""
        leaves, structure = flatten((args, kwargs))
        parts: list[Hashable] = [_ambient()]
        owners: list[Any] = []
        stamps: list[Any] = []
        others: list[Any] = []
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                if leaf.layout != torch.strided or leaf.is_nested or leaf.device.type == "meta":
                    return None  # `capture` has the words for it
                if self._by_value:
                    parts.append(content_key(leaf))
                    continue
                if leaf.is_inference():
                    return None  # has no version: a change could not be seen
                parts.append(id(leaf))
                owners.append(leaf)
                stamps.append((weakref.ref(leaf), leaf._version))
            elif isinstance(leaf, _PLAIN):
                parts.append((type(leaf), repr(leaf)))
            elif hasattr(leaf, "__array_interface__"):
                data = torch.as_tensor(leaf)
                parts.append((type(leaf), *content_key(data)))
            else:
                parts.append((type(leaf), id(leaf)))
                owners.append(leaf)
                others.append(leaf)
        versions = [version for _, version in stamps]
        return _Asked(
            key=hashkey(structure, *parts),
            structure=(structure, versions),
            state=self._reach.now(others),
            owners=owners,
            others=others,
            stamps=stamps,
        )


@dataclasses.dataclass(slots=True)
class _Asked:
    """What a point is recognised by.

    Attributes
    ----------
    key
        Equal for the same primals.
    structure
        Of the arguments, with the versions of the tensors among them.
    state
        What f can reach beside them.
    owners
        Objects that the key tells by their ids.
    others
        Those that are no tensors.
    stamps
        The tensors among them, with their versions.
    """

    key: Hashable
    structure: Any
    state: State
    owners: list[Any]
    others: list[Any]
    stamps: list[Any]


_PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device)


def _check_argnums(argnums: Any) -> None:
    numbers = [argnums] if isinstance(argnums, int) else argnums
    fine = numbers is None or (
        isinstance(numbers, (list, tuple, range)) and all(isinstance(n, int) for n in numbers)
    )
    if not fine:
        raise StructureError(
            f"argnums must be a position, a sequence of positions or None, got {argnums!r}"
        )


class _Run:
    """A run of f in progress."""

    __slots__ = ("done", "thread")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.thread = threading.get_ident()


def _ambient() -> Hashable:
    """Return the ambient settings that change what f computes."""
    cast = tuple(
        (device, torch.get_autocast_dtype(device))
        for device in ("cpu", "cuda")
        if torch.is_autocast_enabled(device)
    )
    return torch.get_default_dtype(), cast


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in text
