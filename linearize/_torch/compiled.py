"""How functions under `torch.compile` run while f runs.

They run compiled, through the compiler that was asked for. Each piece that it makes is looked at
when it is made: what leaves a node that cannot be read runs as it was written, from the start.
Pieces made for the Linearizer stand beside those that are made outside, on the same code.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from . import contexts, hooks
from .contexts import eager_compiled_functions
from .modes import COMPILING, Hidden
from .pieces import WATCHING, CompiledCalls, Looking, Piece
from .ranks import distributed
from .watching import Installed

_FRAMES: Any = torch._C._dynamo.eval_frame

#: What stands in PyTorch's module: who asks for a compiler, and who sets it.
_THEIRS: tuple[Any, Any] = None, None


def _put(asked: Any, entered: Any) -> None:
    frames = _module()
    frames._callback_from_stance, frames._maybe_set_eval_frame = asked, entered


#: Counts who wants to be asked; in other threads all is as ever.
_ASKING = Installed(lambda: _put(_asked, _entered), lambda: _put(*_THEIRS))


@contextlib.contextmanager
def compiled_functions(calls: CompiledCalls) -> Iterator[None]:
    """Run compiled functions compiled, as far as their pullbacks can be read.

    `torch._dynamo` is costly to import; where it is not loaded nothing can be compiled.
    """
    if _frames() is None or distributed():
        with eager_compiled_functions():
            yield
        return
    with _ASKING:
        WATCHING.entered.append(calls)
        try:
            yield
        finally:
            WATCHING.entered.pop()


def compiled(f: Callable[..., Any], settings: Mapping[str, Any]) -> Callable[..., Any]:
    """Return a function under `torch.compile`, or as it is if it cannot be or is already.

    That all of it be one graph is not asked for, whatever the settings say.
    """
    if (
        contexts.function_of(f) is not None
        or hasattr(f, "_torchdynamo_orig_callable")
        or hasattr(f, "_orig_mod")
    ):
        return f
    importlib.import_module("torch._dynamo.eval_frame")
    if _frames() is None:
        return f
    made: Callable[..., Any] = torch.compile(f, **{**settings, "fullgraph": False})
    return made


def _module() -> Any:
    """Return PyTorch's module that runs compiled functions; None if nothing was compiled."""
    return sys.modules.get("torch._dynamo.eval_frame")


def _frames() -> Any:
    """Return PyTorch's module that runs compiled functions; None if it is not as it was known."""
    global _THEIRS
    frames = _module()
    needed = (
        *("_callback_from_stance", "_maybe_set_eval_frame", "_create_wrapped_callback"),
        "innermost_backend",
    )
    if frames is None or not all(hasattr(frames, name) for name in needed):
        return None
    if _THEIRS[0] is None:
        _THEIRS = frames._callback_from_stance, frames._maybe_set_eval_frame
        _leave_alone((*contexts.HOOKS, *hooks.HOOKS))
    return frames


def _leave_alone(functions: Sequence[Any]) -> None:
    """Have functions of this package never compiled, wherever they are called."""
    skip = _FRAMES._FrameAction.SKIP
    for f in functions:
        _FRAMES.set_code_exec_strategy(f.__code__, _FRAMES._FrameExecStrategy(skip, skip))


def _asked(callback: Any) -> Any:
    """Stand for what says which compiler looks at a function that is called now."""
    chosen = _THEIRS[0](callback)
    calls: CompiledCalls | None = WATCHING.innermost
    if calls is None or chosen is None or chosen is False:
        return chosen
    caller = sys._getframe(1)
    backend = _module().innermost_backend(chosen)
    reason = _unfit(backend)
    if reason and not getattr(caller.f_locals.get("self"), "fullgraph", False):
        calls.pieces[Piece(_called(caller), reason)] = None
        return None
    if calls.away is None and caller.f_code.co_name == "compile_wrapper":
        calls.frame, calls.away = id(caller), Hidden(calls.reads)
    # What is to be compiled as a whole must be compiled, says PyTorch; its graph runs as it is.
    return _compiler(backend, reason)


def _entered(callback: Any) -> Any:
    """Stand for what sets it: at the begin of the call, and once more at its end."""
    calls: CompiledCalls | None = WATCHING.innermost
    if calls is not None and calls.away is not None and calls.frame == id(sys._getframe(1)):
        if calls.away.entered:
            calls.away.leave()
            calls.away = None
        else:
            calls.away.enter()
    return _THEIRS[1](callback)


def _called(frame: Any) -> str:
    f = frame.f_locals.get("fn")
    return str(getattr(f, "__qualname__", None) or type(f).__name__)


#: The compilers met, with what asks them, and whether graphs are run as they are; few, since
#: equal ones are taken for one.
_COMPILERS: list[tuple[Any, str, Any]] = []
_MOST_COMPILERS = 32
_LOCK = threading.Lock()
#: Compilers that run the graph that they are given, as it is.
_PLAIN = frozenset({"eager", "eager_noexcept", "eager_debug"})
#: Who has AOTAutograd make the pullback, or leaves the graph that it was given.
_READ = frozenset(
    "torch torch._dynamo.backends.inductor torch._dynamo.backends.debugging "
    "torch._dynamo.backends.common torch._inductor.compile_fx".split()
)


def _compiler(backend: Any, reason: str = "") -> Any:
    """Return who compiles in place of a compiler; it runs all as it is if there is a reason."""
    with _LOCK:
        for known, why, ours in _COMPILERS:
            same = known is backend or (type(known) is type(backend) and known == backend)
            if same and why == reason:
                return ours
        ours = _Apart(Looking(backend, reason))
        _COMPILERS.insert(0, (backend, reason, ours))
        del _COMPILERS[_MOST_COMPILERS:]
    return ours


class _Apart:
    """Has frames of functions compiled, out of sight of those who watch f.

    What a compiler warns of concerns its own ways, not the function: all that comes of it here is
    that a piece runs as it is, which is written down.
    """

    def __init__(self, looking: Looking) -> None:
        self._convert = _module()._create_wrapped_callback(looking)
        self._torchdynamo_orig_backend = self._convert  # told from others by that

    def __call__(self, *given: Any) -> Any:
        COMPILING.add(threading.get_ident())
        try:
            with (
                contexts.no_contexts_watched(),
                hooks.no_hooks_watched(),
                warnings.catch_warnings(action="ignore"),
            ):
                return self._convert(*given)
        finally:
            COMPILING.discard(threading.get_ident())


def _unfit(backend: Any) -> str:
    inner = getattr(backend, "compiler_fn", backend)
    home = getattr(inner, "__module__", type(inner).__module__)
    if getattr(inner, "__name__", "") in _PLAIN:
        return "its compiler compiles nothing"
    if home not in _READ:
        return f"the compiler {getattr(inner, '__name__', type(inner).__name__)} is not PyTorch's"
    if torch.cuda.is_available() and _replays(backend):
        return "a CUDA graph overwrites at the next point what was saved at this one"
    return ""


def _replays(backend: Any) -> bool:
    """Whether a compiler replays CUDA graphs."""
    config: Any = getattr(backend, "config", None) or {}
    given = getattr(backend, "kwargs", {}).get("options") or {}
    own = sys.modules.get("torch._inductor.config")
    name = "triton.cudagraphs"
    everywhere = own is not None and own.triton.cudagraphs
    return bool(config.get(name, given.get(name, everywhere)))
