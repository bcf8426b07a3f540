"""`Linearizer`, which runs a function once per point and remembers the points."""

from __future__ import annotations

import dataclasses
import gc
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import torch
from cachetools.keys import hashkey

from .._capture.capture import capture
from .._capture.contexts import ContextRecords
from .._forms.compiled import Options
from .._reuse.shared import Structures
from .._spaces.trees import flatten
from .._torch.modes import eagerly
from ..errors import CopyError, OptionError, StructureError
from .linearization import Linearization
from .memo import Memo, Stats, content_key
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
        Whether programs that are run repeatedly go through `torch.compile`, each once for all
        points with one structure: True, or a dict of options of `torch.compile` (`mode`,
        `backend`, `options`). Custom Functions stay calls. On CUDA the rest is replayed from
        CUDA graphs too, unless the dict has `"cudagraph": False`.
    trace
        Whether to note which line of f keeps what, for `residuals()`, `summary()` and
        `report()` of a `Linearization`, and for messages. It makes each operation of f some
        microseconds slower.

    Notes
    -----
    The memo sees in-place changes of primals, module parameters and buffers, and of other
    tensors that f read. It cannot see a Python variable rebound, a module switched to `eval`,
    a file, a random draw, or a write that PyTorch does not see (through NumPy or `.data`).
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
    ) -> None:
        if not callable(f):
            raise StructureError(f"Linearizer: f must be callable, got {type(f).__name__}")
        _check_argnums(argnums)
        if match not in ("identity", "value"):
            raise OptionError(f'match must be "identity" or "value", got {match!r}')
        if opaque not in ("error", "materialize"):
            raise OptionError(f'opaque must be "error" or "materialize", got {opaque!r}')
        if check not in ("structure", "always", "never"):
            raise OptionError(f'check must be "structure", "always" or "never", got {check!r}')
        limits = {"maxsize": maxsize, "max_bytes": max_bytes, "dense_limit": dense_limit}
        Options.of(compile)  # raises
        for name, limit in limits.items():
            if limit is not None and limit < 0:
                raise OptionError(f"{name} must not be negative, got {limit}")
        self.f = f
        self._argnums = argnums
        self._has_aux = has_aux
        self._trace = trace
        self._by_value = match == "value"
        self._policy = Policy(
            opaque == "materialize", opaque_limit, simplify, check, dense_limit or 0, compile
        )
        self._keeps = maxsize != 0
        self._memo: Memo[Linearization] = Memo(
            maxsize, max_bytes, Linearization._size, Linearization._fresh
        )
        self._structures = Structures(self._policy.shared)
        self._open: weakref.WeakSet[Any] = weakref.WeakSet()
        self._scopes: list[weakref.WeakSet[Any]] = []
        self._lock = threading.Lock()
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
        argnums = self._positions(len(args))
        found = self._key(args, kwargs) if self._keeps else None
        if found is None:
            self._memo.missed()
            return self._run(args, kwargs, argnums, None)
        key, structure, _, stamps = found
        while True:
            point = self._memo.get(key, (structure, [v for _, v in stamps]))
            if point is not None:
                return point
            with self._lock:
                run = self._running.get(key)
                mine = run is None
                if run is None:
                    run = self._running[key] = _Run()
                me = threading.get_ident()
                inside = any(r.thread == me and r is not run for r in self._running.values())
            # A call of `at` from inside f waits for nobody: two could wait for each other.
            if mine or inside or run.thread == me:
                break
            run.done.wait()
        try:
            self._memo.missed()
            return self._run(args, kwargs, argnums, found)
        finally:
            if mine:
                with self._lock:
                    del self._running[key]
                run.done.set()

    def stats(self) -> Stats:
        """Return the memo's counters, and how many points shared their structure."""
        known = self._structures
        return dataclasses.replace(
            self._memo.stats(),
            recorded=known.recorded,
            reused=known.reused,
            dense=known.dense,
            compiled=known.compiled,
        )

    def clear(self) -> None:
        """Forget all points. Those still held elsewhere go on working."""
        self._memo.clear()

    def close(self) -> None:
        """Close every point made so far, wherever it is held, and forget it."""
        self._memo.clear()
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
        name = getattr(self.f, "__qualname__", None) or repr(self.f)
        return f"<Linearizer of {name}: {self._memo.stats()}>"

    def __reduce__(self) -> Any:
        raise CopyError("a Linearizer cannot be copied or pickled: make one from its function")

    # -- one point ----------------------------------------------------------------------

    def _run(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], argnums: Sequence[int], found: Any
    ) -> Linearization:
        point, reads = self._linearize(args, kwargs, argnums, watch=found is not None)
        with self._lock:
            for group in (self._open, *self._scopes):
                group.add(point._lifetime)
        # Another rank may have forgotten what this one remembers, and would run f alone.
        if found is not None and point.in_space.group is None:
            key, structure, owners, stamps = found
            self._memo.put(
                key, (structure, [v for _, v in stamps]), point, owners, [*stamps, *reads]
            )
        return point

    def _linearize(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], argnums: Sequence[int], watch: bool
    ) -> tuple[Linearization, Any]:
        def once() -> tuple[Linearization, Any]:
            records = ContextRecords()
            held = self._policy.check != "never"
            (point, reads), ranks = run_of_f(records, lambda: run(records), held=held)
            point._lifetime.ranks = ranks
            point.in_space.group = point.out_space.group = group_of_records(records)
            return point, reads

        def run(records: ContextRecords) -> tuple[Linearization, Any]:
            captured = capture(
                self.f,
                args,
                kwargs,
                argnums,
                has_aux=self._has_aux,
                watch=watch,
                copy=self._by_value,
                trace=self._trace,
                records=records,
            )
            notify = self._notifier()
            point = Linearization(captured, self._policy, notify, self._structures, alone=False)
            return point, captured.reads

        try:
            return once()
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
        # What the memo keeps is the first thing to give up; the error, with the frames that
        # it holds, is gone by now.
        self._memo.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return once()

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

    def _key(self, args: Any, kwargs: Any) -> Any:
        """Return the memo's key, the structure, the owners of the key and their versions.

        None if the arguments cannot be recognised again.
        """
        leaves, structure = flatten((args, kwargs))
        parts: list[Hashable] = [_ambient()]
        owners: list[Any] = []
        stamps: list[Any] = []
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
        return hashkey(structure, *parts), structure, owners, stamps


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
