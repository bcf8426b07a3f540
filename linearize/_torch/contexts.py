"""The contexts of custom Functions, seen while they are made."""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd import function as autograd_function
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.autograd.graph import Node
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from .aot import is_piece
from .modes import NOTHING


class _Eager:
    """Has compiled functions run eagerly; the stance is one for all threads, so users are counted.

    A class and no generator: what interrupts the way out of a generator keeps it from its end.
    """

    lock = threading.Lock()
    users = 0
    stance: Any = None

    def __enter__(self) -> None:
        cls = _Eager
        with cls.lock:
            if cls.users == 0:
                cls.stance = torch.compiler.set_stance("force_eager")
                cls.stance.__enter__()
            cls.users += 1

    def __exit__(self, *exc: object) -> None:
        cls = _Eager
        with cls.lock:
            cls.users -= 1
            if cls.users == 0:
                cls.stance.__exit__(None, None, None)
                cls.stance = None


def eager_compiled_functions() -> contextlib.AbstractContextManager[None]:
    """Run `torch.compile`d functions eagerly, so that they leave an ordinary graph.

    `torch._dynamo` is costly to import; where it is not loaded nothing can be compiled.
    """
    return _Eager() if "torch._dynamo" in sys.modules else NOTHING


def _checkpointed(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
    """Stand for `CheckpointFunction.apply` while a watcher is active in this thread."""
    if ContextWatcher.current() is None:
        return _APPLY.__get__(None, CheckpointFunction)(function, preserve, *args)
    return checkpoint(
        function,
        *args,
        use_reentrant=False,
        preserve_rng_state=preserve,
        determinism_check="none",
    )


class ContextWatcher:
    """Learns what the contexts of custom Functions do not tell after `forward`.

    Reentrant checkpoints become plain ones meanwhile: the backward of a reentrant one runs the
    block again at each product, adds to the `grad` of parameters, and does not know of
    primals that the block reads from a closure.

    While it is active, in this thread only, it is told of each new context, of the arguments
    of its `forward`, and of calls of `save_for_forward` (PyTorch drops those tensors after
    `forward`), `set_materialize_grads` (which can be set but not read) and `mark_dirty`.

    The hooks are installed on PyTorch's context classes when a custom Function is applied while a
    watcher is active in that thread, and removed with the last watcher of any thread. Not before:
    to change a method of a class with a hundred subclasses takes longer than many a run of f.

    Parameters
    ----------
    on_create
        Called with `(context, arguments)`; arguments is None where they cannot be seen.
    on_save_for_forward
        Called with `(context, tensors)`.
    on_materialize
        Called with `(context, flag)`.
    on_mark_dirty
        Called with `(context, tensors)`.
    """

    _lock = threading.Lock()
    _users = 0
    _hooked = False
    _local = threading.local()
    _save_for_forward: Callable[..., None] = FunctionCtx.save_for_forward
    _set_materialize: Callable[..., None] = FunctionCtx.set_materialize_grads
    _mark_dirty: Callable[..., None] = FunctionCtx.mark_dirty

    def __init__(
        self,
        on_create: Callable[[Any, tuple[Any, ...] | None], None],
        on_save_for_forward: Callable[[Any, tuple[Any, ...]], None],
        on_materialize: Callable[[Any, bool], None],
        on_mark_dirty: Callable[[Any, tuple[Any, ...]], None],
    ) -> None:
        self.on_create = on_create
        self.on_save_for_forward = on_save_for_forward
        self.on_materialize = on_materialize
        self.on_mark_dirty = on_mark_dirty

    def __enter__(self) -> ContextWatcher:
        cls = ContextWatcher
        with cls._lock:
            if cls._users == 0:
                CheckpointFunction.apply = staticmethod(_checkpointed)  # type: ignore[method-assign]
                if _APPLY_ASKS:
                    autograd_function._is_setup_context_defined = _asked
                else:
                    cls._hook()
            cls._users += 1
        stack = cls._local.__dict__.setdefault("stack", [])
        stack.append(self)
        return self

    def __exit__(self, *exc: object) -> None:
        cls = ContextWatcher
        cls._local.stack.pop()
        with cls._lock:
            cls._users -= 1
            if cls._users == 0:
                del CheckpointFunction.apply
                if _APPLY_ASKS:
                    autograd_function._is_setup_context_defined = _ASKED
                cls._unhook()

    @classmethod
    def expect(cls) -> None:
        """Make ready for a context that is about to be made."""
        with cls._lock:
            if cls._users:
                cls._hook()

    @classmethod
    def _hook(cls) -> None:
        if cls._hooked:
            return
        cls._hooked = True
        BackwardCFunction.__init__ = _created  # type: ignore[method-assign]
        FunctionCtx.save_for_forward = _saving  # type: ignore[method-assign]
        FunctionCtx.set_materialize_grads = _materializing  # type: ignore[method-assign]
        FunctionCtx.mark_dirty = _dirtying  # type: ignore[method-assign]
        if _APPLY_CODE is None:
            torch.autograd.Function.apply = classmethod(_applied)  # type: ignore[assignment,method-assign]

    @classmethod
    def _unhook(cls) -> None:
        if not cls._hooked:
            return
        cls._hooked = False
        del BackwardCFunction.__init__
        FunctionCtx.save_for_forward = cls._save_for_forward  # type: ignore[method-assign]
        FunctionCtx.set_materialize_grads = cls._set_materialize  # type: ignore[method-assign]
        FunctionCtx.mark_dirty = cls._mark_dirty  # type: ignore[method-assign]
        if _APPLY_CODE is None:
            torch.autograd.Function.apply = _APPLY  # type: ignore[method-assign]

    @classmethod
    @contextlib.contextmanager
    def none(cls) -> Iterator[None]:
        """Have no watcher in this thread for a while."""
        stack = cls._local.__dict__.setdefault("stack", [])
        stack.append(None)
        try:
            yield
        finally:
            stack.pop()

    @classmethod
    def current(cls) -> ContextWatcher | None:
        """Return the innermost watcher of this thread."""
        stack = cls._local.__dict__.get("stack")
        return stack[-1] if stack else None


_APPLY: Any = torch.autograd.Function.__dict__["apply"]
#: The Python part of `Function.apply`; None where there is none (from PyTorch 2.15 on).
_APPLY_CODE = getattr(getattr(_APPLY, "__func__", None), "__code__", None)


#: Asked by the Python part of `Function.apply` before it does anything else.
_ASKED: Any = getattr(autograd_function, "_is_setup_context_defined", None)
_APPLY_ASKS = _APPLY_CODE is not None and "_is_setup_context_defined" in _APPLY_CODE.co_names


def _asked(method: Any) -> Any:
    if ContextWatcher.current() is not None:
        caller = sys._getframe(1)  # `apply`, or the compiler
        if not is_piece(caller.f_locals.get("cls") if caller.f_code is _APPLY_CODE else None):
            ContextWatcher.expect()
    return _ASKED(method)


def applied_late(f: Callable[..., Any]) -> Callable[..., Any]:
    """Return `F.apply` such that a watcher sees its arguments, anything else as it is."""
    owner = getattr(f, "__self__", None)
    own = isinstance(owner, type) and issubclass(owner, torch.autograd.Function)
    if _APPLY_CODE is None and own and getattr(f, "__name__", "") == "apply":
        return lambda *args, **kwargs: owner.apply(*args, **kwargs)  # type: ignore[union-attr]
    return f


_NO_SETUP: Any = torch.autograd.Function.setup_context


def _applied(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """Stand for `Function.apply` where that has no Python part."""
    if cls.setup_context is not _NO_SETUP:
        bound = inspect.signature(cls.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        args, kwargs = bound.args, bound.kwargs
    return _APPLY.__get__(None, cls)(*args, **kwargs)


def _created(self: Any) -> None:
    watcher = ContextWatcher.current()
    if watcher is None or is_piece(type(self)._forward_cls):
        return
    # The C++ part of `Function.apply` makes the context; its Python part is the caller and
    # holds the arguments.
    frame = sys._getframe(1)
    known = frame.f_code in (_APPLY_CODE, _applied.__code__)
    arguments = frame.f_locals.get("args") if known else None
    if frame.f_globals.get("__name__") == "torch._library.autograd":
        # An operator that takes lists goes past the Python part, if it was made before.
        given = frame.f_locals
        arguments = (*given["flat_args"], given["metadata"]) if "flat_args" in given else None
    watcher.on_create(self, arguments)


def _saving(self: Any, *tensors: torch.Tensor) -> None:
    ContextWatcher._save_for_forward(self, *tensors)
    watcher = ContextWatcher.current()
    if watcher is not None:
        watcher.on_save_for_forward(self, tensors)


def _materializing(self: Any, value: bool) -> None:
    ContextWatcher._set_materialize(self, value)
    watcher = ContextWatcher.current()
    if watcher is not None:
        watcher.on_materialize(self, value)


def _dirtying(self: Any, *tensors: torch.Tensor) -> None:
    ContextWatcher._mark_dirty(self, *tensors)
    watcher = ContextWatcher.current()
    if watcher is not None:
        watcher.on_mark_dirty(self, tensors)


#: What runs in the place of PyTorch's own functions.
HOOKS = (_checkpointed, _asked, _applied, _created, _saving, _materializing, _dirtying)


def _contexts_keep_nodes() -> bool:
    """Whether a context keeps what its node saved, when nothing else of the graph is left."""

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x.clone()

    with torch.inference_mode(False), torch.enable_grad():
        node: Any = Probe.apply(torch.ones((), requires_grad=True)).grad_fn  # type: ignore[no-untyped-call]
        try:
            return len(node.saved_tensors) == 1
        except RuntimeError:
            return False


_CONTEXTS_KEEP_NODES = _contexts_keep_nodes()


def owner_of(t: torch.Tensor) -> Node | None:
    """Return what keeps the graph of a tensor alive for its contexts, None if they do so.

    Before PyTorch 2.13 they do not.
    """
    if _CONTEXTS_KEEP_NODES or not t.requires_grad:
        return None
    with torch.enable_grad():
        return t.view_as(t).grad_fn


@contextlib.contextmanager
def calls_watched(ctx: Any, watch: Callable[..., Any]) -> Iterator[None]:
    """Have PyTorch's engine call `watch(backward, cotangents)` in place of a context's backward.

    It is given what calls the backward, and the tuple of cotangents, and returns the results.
    """
    backward = ctx.apply
    ctx.apply = lambda *cotangents: watch(backward, cotangents)
    try:
        yield
    finally:
        del ctx.apply


@contextlib.contextmanager
def contexts_told(told: Callable[[Any, tuple[Any, ...] | None], None]) -> Iterator[None]:
    """Have somebody else told too of the contexts that the watcher of this thread is told of."""
    watcher = ContextWatcher.current()
    if watcher is None:
        yield
        return
    before = watcher.on_create

    def both(ctx: Any, arguments: tuple[Any, ...] | None) -> None:
        before(ctx, arguments)
        told(ctx, arguments)

    watcher.on_create = both
    try:
        yield
    finally:
        watcher.on_create = before
