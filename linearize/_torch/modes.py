"""Modes of PyTorch: those that see operations, transforms, grad and inference mode."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch._C._functorch import TransformType, _add_batch_dim
from torch._functorch.pyfunctorch import (
    retrieve_current_functorch_interpreter,
    temporarily_clear_interpreter_stack,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

P = ParamSpec("P")
R = TypeVar("R")

NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


class DispatchMode(TorchDispatchMode):
    """A dispatch mode that does not load the compiler.

    The base class wraps its subclasses' methods in a way that imports `torch._dynamo` at the
    first call, which takes a second.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


#: Whether a `torch.func` transform is running around the caller.
functorch_active: Callable[[], bool] = torch._C._are_functorch_transforms_active

#: Switches grad mode on or off, as `torch.no_grad` does at both its ends, and much quicker.
set_grad_mode: Callable[[bool], None] = torch._C._set_grad_enabled


#: Whether somebody watches or replaces PyTorch's Python functions in this thread.
functions_overridden: Callable[[], bool] = torch._C._is_torch_function_mode_enabled


#: Hides PyTorch's Python functions from those who watch or replace them.
functions_as_they_are: Callable[[], contextlib.AbstractContextManager[Any]]
functions_as_they_are = torch._C.DisableTorchFunction

#: Lets operations on tensor subclasses return plain tensors, as C++ code sees them.
subclasses_ignored: Callable[[], contextlib.AbstractContextManager[Any]]
subclasses_ignored = torch._C.DisableTorchFunctionSubclass

#: Suspends dispatch modes.
unobserved: Callable[[], contextlib.AbstractContextManager[Any]] = _disable_current_modes


def undisturbed() -> bool:
    """Whether nobody around the caller watches, replaces or transforms operations."""
    return not (
        functorch_active()
        or functions_overridden()
        or torch._C._len_torch_dispatch_stack()
        or torch.is_inference_mode_enabled()
        or torch._C._get_tracing_state() is not None
        or torch._C._current_graph_task_id() != -1
        or being_traced()
    )


def casts() -> bool:
    """Whether operations are run in other dtypes than those of their arguments (autocast)."""
    return torch._C._is_any_autocast_enabled()


#: The threads in which a part of f is being compiled. While one does it, PyTorch says of every
#: thread that it compiles.
COMPILING: set[int] = set()


def being_traced() -> bool:
    """Whether somebody writes down operations here: `torch.compile`, `export` or `make_fx`."""
    if torch.compiler.is_compiling() and (not COMPILING or threading.get_ident() in COMPILING):
        return True
    tracing = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return tracing is not None and tracing.get_proxy_mode() is not None


def eagerly(f: Callable[P, R]) -> Callable[P, R]:
    """Let a function run outside of `torch.compile`, where the caller is compiled."""

    @functools.wraps(f)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        if _compiled_around():
            outside: Callable[P, R] = torch.compiler.disable(f)
            return outside(*args, **kwargs)
        return f(*args, **kwargs)

    return called


def _compiled_around() -> bool:
    """Whether the frames that run here are looked at by `torch.compile`."""
    if "torch._dynamo" not in sys.modules:
        return False
    if torch.compiler.is_compiling():
        return True
    return callable(torch._C._dynamo.eval_frame.get_eval_frame_callback())


def transform_depth() -> int:
    """Return how many `torch.func` transforms are running around the caller, one in another."""
    return len(torch._C._functorch.get_interpreter_stack() or ())


def batch_size() -> int | None:
    """Return over how many entries the innermost `torch.vmap` maps; None if none is innermost."""
    if not functorch_active():
        return None
    innermost: Any = retrieve_current_functorch_interpreter()
    return int(innermost.batch_size()) if innermost.key() == TransformType.Vmap else None


def batch_marker() -> torch.Tensor:
    """Return a number that differs, for all PyTorch knows, in each entry of the batch."""
    innermost: Any = retrieve_current_functorch_interpreter()
    with outside_transforms():
        numbers = torch.zeros(innermost.batch_size())
    return _add_batch_dim(numbers, 0, innermost.level())


def without_subclass(t: torch.Tensor) -> torch.Tensor:
    """Return `t` without history as a plain tensor on the same memory."""
    if type(t) is torch.Tensor:
        return t.detach()
    with subclasses_ignored():
        plain = t.detach()
        return plain if type(plain) is torch.Tensor else plain.as_subclass(torch.Tensor)


def without_inference_mode() -> contextlib.AbstractContextManager[None]:
    """Leave inference mode, without grad mode, which leaving alone would switch on."""
    return _outside_inference(grad=False) if torch.is_inference_mode_enabled() else NOTHING


def grad_enabled() -> contextlib.AbstractContextManager[None]:
    """Run with a graph, whatever the modes around; where there is nothing to do, at no cost."""
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        return NOTHING
    return _outside_inference(grad=True)


@contextlib.contextmanager
def _outside_inference(*, grad: bool) -> Iterator[None]:
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        yield


def outside_transforms() -> contextlib.AbstractContextManager[Any]:
    """Suspend `torch.func` transforms, for work that has nothing to do with them."""
    return temporarily_clear_interpreter_stack() if functorch_active() else NOTHING


def lazy_bits_respected() -> contextlib.AbstractContextManager[Any]:
    """Let operations inside `__torch_dispatch__` see conjugate, negative and zero bits.

    PyTorch hands over below the keys that resolve these bits, so that there
    `x.conj() * 2` would be `x * 2`, also inside composite operations such as `linalg.pinv`.
    """
    now = torch._C._dispatch_tls_local_exclude_set()
    raw = now.raw_repr()
    excluded = _LESS_EXCLUDED.get(raw)
    if excluded is None:
        key = torch._C.DispatchKey
        for lazy in (key.Conjugate, key.Negative, key.ZeroTensor):
            now = now.remove(lazy)
        excluded = _LESS_EXCLUDED[raw] = now
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


_LESS_EXCLUDED: dict[int, Any] = {}


class Hidden:
    """A function mode that is taken off this thread's stack for a while; others stay."""

    def __init__(self, mode: Any) -> None:
        self._mode = mode
        self._stack: list[Any] = []
        self.entered = False

    def enter(self) -> None:
        """Take it off."""
        self.entered = True
        self._stack = _popped()
        _pushed([m for m in self._stack if m is not self._mode])

    def leave(self) -> None:
        """Put it back where it was."""
        _popped()
        _pushed(self._stack)


def _popped() -> list[Any]:
    """Take all function modes off the stack; return them, the innermost last."""
    count = torch._C._len_torch_function_stack()
    return [torch._C._pop_torch_function_stack() for _ in range(count)][::-1]


def _pushed(modes: Sequence[Any]) -> None:
    for mode in modes:
        torch._C._push_on_torch_function_stack(mode)
