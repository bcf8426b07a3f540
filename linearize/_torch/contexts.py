"""The contexts of custom Functions, seen while they are made."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch.autograd import function as autograd_function
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.autograd.graph import Node
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from .aot import is_piece
from .modes import NOTHING
from .watching import Installed, ThreadStack

#: Told of a context and the arguments of its `forward`.
OnCreate: TypeAlias = Callable[[Any, tuple[Any, ...] | None], None]


#: Has compiled functions run eagerly; the stance is one for all threads.
_STANCE = contextlib.ExitStack()
_EAGER = Installed(
    lambda: _STANCE.enter_context(torch.compiler.set_stance("force_eager")), _STANCE.close
)


def eager_compiled_functions() -> contextlib.AbstractContextManager[None]:
    """Run `torch.compile`d functions eagerly, so that they leave an ordinary graph.

    `torch._dynamo` is costly to import; where it is not loaded nothing can be compiled.
    """
    return _EAGER if "torch._dynamo" in sys.modules else NOTHING


def _checkpointed(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
    """Stand for `CheckpointFunction.apply` while a watcher is active in this thread."""
    if _WATCHERS.innermost is None:
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
        Called with a context and its arguments, None where they cannot be seen.
    on_call
        By the names of these methods: called with a context and what the method was given.
    """

    def __init__(self, on_create: OnCreate, on_call: Mapping[str, Callable[..., None]]) -> None:
        self.on_create = [on_create]
        self.on_call = on_call

    def __enter__(self) -> None:
        _WATCHING.__enter__()
        _WATCHERS.entered.append(self)

    def __exit__(self, *exc: object) -> None:
        _WATCHERS.entered.pop()
        _WATCHING.__exit__()


#: The watchers of each thread.
_WATCHERS = ThreadStack()
no_contexts_watched = _WATCHERS.emptied


class _Hooks:
    """What stands in the place of PyTorch's own functions, the methods of contexts if need be."""

    on_contexts = False

    @classmethod
    def put(cls) -> None:
        CheckpointFunction.apply = staticmethod(_checkpointed)  # type: ignore[method-assign]
        if _APPLY_ASKS:
            autograd_function._is_setup_context_defined = _asked
        else:
            cls.expect()

    @classmethod
    def remove(cls) -> None:
        del CheckpointFunction.apply
        if _APPLY_ASKS:
            autograd_function._is_setup_context_defined = _ASKED
        if cls.on_contexts:
            cls.on_contexts = False
            del BackwardCFunction.__init__
            for name, method in _OWN.items():
                setattr(FunctionCtx, name, method)
            if _APPLY_CODE is None:
                torch.autograd.Function.apply = _APPLY  # type: ignore[method-assign]

    @classmethod
    def expect(cls) -> None:
        """Make ready for a context that is about to be made."""
        if cls.on_contexts:
            return
        cls.on_contexts = True
        BackwardCFunction.__init__ = _created  # type: ignore[method-assign]
        for name, method in _TELLING.items():
            setattr(FunctionCtx, name, method)
        if _APPLY_CODE is None:
            torch.autograd.Function.apply = classmethod(_applied)  # type: ignore[assignment,method-assign]


_WATCHING = Installed(_Hooks.put, _Hooks.remove)

_APPLY: Any = torch.autograd.Function.__dict__["apply"]
#: The Python part of `Function.apply`; None where there is none (from PyTorch 2.15 on).
_APPLY_CODE = getattr(getattr(_APPLY, "__func__", None), "__code__", None)


#: Asked by the Python part of `Function.apply` before it does anything else.
_ASKED: Any = getattr(autograd_function, "_is_setup_context_defined", None)
_APPLY_ASKS = _APPLY_CODE is not None and "_is_setup_context_defined" in _APPLY_CODE.co_names


def _asked(method: Any) -> Any:
    if _WATCHERS.innermost is not None:
        caller = sys._getframe(1)  # `apply`, or the compiler
        if not is_piece(caller.f_locals.get("cls") if caller.f_code is _APPLY_CODE else None):
            with _WATCHING.lock:
                _Hooks.expect()
    return _ASKED(method)


def function_of(f: Any) -> Any:
    """Return the custom Function that a method belongs to, such as `F.apply`; None for none."""
    owner = getattr(f, "__self__", None)
    own = isinstance(owner, type) and issubclass(owner, torch.autograd.Function)
    return owner if own else None


def applied_late(f: Callable[..., Any]) -> Callable[..., Any]:
    """Return `F.apply` such that a watcher sees its arguments, anything else as it is."""
    owner = function_of(f) if _APPLY_CODE is None else None
    if owner is not None and getattr(f, "__name__", "") == "apply":
        return lambda *args, **kwargs: owner.apply(*args, **kwargs)
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
    watcher = _WATCHERS.innermost
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
    for told in watcher.on_create:
        told(self, arguments)


def _telling(name: str) -> Callable[..., None]:
    """Return a method of contexts that tells the watcher of its calls."""
    own: Callable[..., None] = getattr(FunctionCtx, name)

    def called(self: Any, *given: Any, **named: Any) -> None:
        own(self, *given, **named)
        watcher = _WATCHERS.innermost
        if watcher is not None:
            watcher.on_call[name](self, *given, **named)

    return called


_TOLD = ("save_for_forward", "set_materialize_grads", "mark_dirty")
_OWN = {name: getattr(FunctionCtx, name) for name in _TOLD}
_TELLING = {name: _telling(name) for name in _TOLD}
#: What runs in the place of PyTorch's own functions.
HOOKS = (_checkpointed, _asked, _applied, _created, *_TELLING.values())


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
def contexts_told(told: OnCreate) -> Iterator[None]:
    """Have somebody else told too of the contexts that the watcher of this thread is told of."""
    watcher = _WATCHERS.innermost
    if watcher is None:
        yield
        return
    watcher.on_create.append(told)
    try:
        yield
    finally:
        watcher.on_create.remove(told)
