"""How functions under `torch.compile` run while f runs.

They run compiled, through the compiler that was asked for. Each piece that it makes is looked at
when it is made: what leaves a node that cannot be read runs as it was written, from the start.
Pieces made for the Linearizer stand beside those that are made outside, on the same code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch._guards import detect_fake_mode

from . import contexts, hooks
from .aot import UnreadableError, is_piece, read
from .contexts import eager_compiled_functions
from .modes import DispatchMode, Hidden
from .names import MOVING_STATISTICS
from .ranks import distributed


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """A part of f that `torch.compile` was asked to compile.

    Attributes
    ----------
    name
        The function, and where it stands.
    reason
        Why it runs as it was written; empty if it runs compiled.
    """

    name: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name}: " + (f"as it is ({self.reason})" if self.reason else "compiled")


class CompiledCalls:
    """What is to know of calls of compiled functions in one run of f.

    Parameters
    ----------
    hidden
        Modes that compiled functions must not see: they would be compiled into them.
    noted
        Is given what compiled code reads, and those running statistics among it that move.

    Attributes
    ----------
    pieces
        What ran, each once.
    """

    def __init__(
        self,
        hidden: Sequence[Any] = (),
        noted: Callable[[Sequence[Any], Sequence[torch.Tensor]], None] | None = None,
    ) -> None:
        self.hidden, self._noted = hidden, noted
        self.pieces: dict[Piece, None] = {}
        #: The frame of the outermost call of a compiled function, and what it does not see.
        self.frame = 0
        self.away: Hidden | None = None

    def ran(self, piece: Piece, arguments: Sequence[Any], moving: Sequence[torch.Tensor]) -> None:
        """Take note of a piece that is about to run."""
        self.pieces[piece] = None
        if self._noted is not None:
            self._noted(arguments, moving)


class _Watch:
    """Counts who wants to be asked; in other threads all is as ever."""

    lock = threading.Lock()
    users = 0
    local = threading.local()

    @classmethod
    def current(cls) -> CompiledCalls | None:
        stack = cls.local.__dict__.get("stack")
        return stack[-1] if stack else None

    @classmethod
    def begin(cls, frames: Any, calls: CompiledCalls) -> None:
        with cls.lock:
            if cls.users == 0:
                frames._callback_from_stance, frames._maybe_set_eval_frame = _asked, _entered
            cls.users += 1
        cls.local.__dict__.setdefault("stack", []).append(calls)

    @classmethod
    def end(cls, frames: Any) -> None:
        cls.local.stack.pop()
        with cls.lock:
            cls.users -= 1
            if cls.users == 0:
                frames._callback_from_stance, frames._maybe_set_eval_frame = _THEIRS


_FRAMES: Any = torch._C._dynamo.eval_frame

#: What stands in PyTorch's module: who asks for a compiler, and who sets it.
_THEIRS: tuple[Any, Any] = None, None


@contextlib.contextmanager
def compiled_functions(calls: CompiledCalls) -> Iterator[None]:
    """Run compiled functions compiled, as far as their pullbacks can be read.

    `torch._dynamo` is costly to import; where it is not loaded nothing can be compiled.
    """
    frames = _frames()
    if frames is None or distributed():
        with eager_compiled_functions():
            yield
        return
    _Watch.begin(frames, calls)
    try:
        yield
    finally:
        _Watch.end(frames)


def compiled(f: Callable[..., Any], settings: Mapping[str, Any]) -> Callable[..., Any]:
    """Return a function under `torch.compile`, or as it is if it cannot be or is already.

    Parameters
    ----------
    f
        The function.
    settings
        For `torch.compile`. That all of it be one graph is not asked for.
    """
    owner = getattr(f, "__self__", None)
    applies = isinstance(owner, type) and issubclass(owner, torch.autograd.Function)
    if applies or hasattr(f, "_torchdynamo_orig_callable") or hasattr(f, "_orig_mod"):
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
    calls = _Watch.current()
    if calls is None or chosen is None or chosen is False:
        return chosen
    caller = sys._getframe(1)
    backend = _module().innermost_backend(chosen)
    reason = _unfit(backend)
    if reason and not getattr(caller.f_locals.get("self"), "fullgraph", False):
        calls.pieces[Piece(_called(caller), reason)] = None
        return None
    if calls.away is None and caller.f_code.co_name == "compile_wrapper":
        calls.frame, calls.away = id(caller), Hidden(calls.hidden)
    # What is to be compiled as a whole must be compiled, says PyTorch; its graph runs as it is.
    return _compiler(backend, reason)


def _entered(callback: Any) -> Any:
    """Stand for what sets it: at the begin of the call, and once more at its end."""
    calls = _Watch.current()
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
        ours = _Apart(_Looking(backend, reason))
        _COMPILERS.insert(0, (backend, reason, ours))
        del _COMPILERS[_MOST_COMPILERS:]
    return ours


class _Apart:
    """Has frames of functions compiled, out of sight of those who watch f.

    What a compiler warns of concerns its own ways, not the function: all that comes of it here is
    that a piece runs as it is, which is written down.
    """

    def __init__(self, looking: _Looking) -> None:
        self._convert = _module()._create_wrapped_callback(looking)
        self._torchdynamo_orig_backend = self._convert  # told from others by that

    def __call__(self, *given: Any) -> Any:
        with (
            contexts.ContextWatcher.none(),
            hooks.HookWatcher.none(),
            warnings.catch_warnings(action="ignore"),
        ):
            return self._convert(*given)


def _unfit(backend: Any) -> str:
    inner = getattr(backend, "compiler_fn", backend)
    home = getattr(inner, "__module__", type(inner).__module__)
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


class _Looking:
    """A compiler that looks at what another one makes."""

    def __init__(self, backend: Any, reason: str) -> None:
        self._backend, self._reason = backend, reason

    def __call__(self, module: Any, inputs: Sequence[Any]) -> Callable[..., Any]:
        name = _name_of(module.graph)
        reason = self._reason or _unfit_for(self._backend, module, inputs)
        if not reason:
            plain = torch.fx.Graph()  # a compiler may change the graph that it is given
            plain.output(plain.graph_copy(module.graph, {}))
            known = _functions()
            statistics = _statistics(module.graph)
            try:
                compiled = _aot(self._backend)(module, inputs)
                for cls in _functions() - known:
                    if is_piece(cls):
                        read(cls, name)
                return _noted(Piece(name), compiled, statistics)
            except UnreadableError as error:
                reason = str(error)
            except Exception as error:
                if isinstance(error, _passed_on()):
                    raise
                reason = _said(error)
            module = torch.fx.GraphModule(module, plain)
        return _noted(Piece(name, reason), module.forward)


def _aot(backend: Any) -> Any:
    """Return what compiles a piece, with its pullback written down as autograd would do it.

    The forward is left to `backend`. That does not see the pullback: it would take operations
    apart, and compute anew what the forward knows.
    """
    if getattr(getattr(backend, "compiler_fn", backend), "__name__", "") in _PLAIN:
        return backend
    common: Any = importlib.import_module("torch._dynamo.backends.common")
    partitions: Any = importlib.import_module("torch._functorch.partitioners")

    def forward(module: Any, inputs: Sequence[Any]) -> Any:
        context = torch._guards.TracingContext(detect_fake_mode(inputs))
        with torch._guards.tracing(context), torch.no_grad():
            run = _bare(backend(module, inputs))

        def called(arguments: list[Any]) -> Any:
            return run(*arguments)

        called._boxed_call = True  # type: ignore[attr-defined]
        return called

    return common.aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda module, inputs: module,
        partition_fn=partitions.default_partition,
    )


#: Compilers that run the graph that they are given, as it is.
_PLAIN = frozenset({"eager", "eager_noexcept", "eager_debug"})


def _noted(
    piece: Piece, run: Callable[..., Any], statistics: dict[int, bool] | None = None
) -> Callable[..., Any]:
    """Return what runs a piece, and tells who watches.

    Running statistics that are only read are handed on as copies: PyTorch moves them elsewhere
    without raising their version.
    """
    still = [i for i, moves in (statistics or {}).items() if not moves]
    run = _bare(run)

    def called(*arguments: Any) -> Any:
        calls = _Watch.current()
        if calls is None:
            return run(*arguments)
        calls.ran(piece, arguments, [arguments[i] for i in statistics or ()])
        if not still:
            return run(*arguments)
        return run(*[t.clone() if i in still else t for i, t in enumerate(arguments)])

    return called


def _bare(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return what runs a piece without what keeps the compiler from looking at it.

    Nobody does: whoever calls a piece has seen to that.
    """
    inner: Callable[..., Any] = getattr(run, "_torchdynamo_orig_callable", run)
    return inner


def _statistics(graph: Any) -> dict[int, bool]:
    """Return the places of running statistics among the arguments, and whether they move."""
    places = {n: i for i, n in enumerate(n for n in graph.nodes if n.op == "placeholder")}
    found: dict[int, bool] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target in MOVING_STATISTICS:
            first, flag, default = MOVING_STATISTICS[node.target]
            given = dict(enumerate(node.args)) | node.kwargs
            moves = bool(given.get(5, given.get(flag, default)))
            for key in (first, first + 1, "running_mean", "running_var"):
                if given.get(key) in places:
                    place = places[given[key]]
                    found[place] = found.get(place, False) or moves
    return found


def _functions() -> set[type]:
    return set(torch.autograd.Function.__subclasses__())


def _passed_on() -> tuple[type[BaseException], ...]:
    """Return the exceptions by which PyTorch steers itself."""
    own: Any = sys.modules["torch._dynamo.exc"]
    return own.RestartAnalysis, own.SkipFrame


#: Operations whose derivative the package writes down in its own words, because PyTorch's is
#: wrong at places or not linear step by step: an ordinary node shows them, a piece does not.
OWN_WORDS = frozenset(
    "_embedding_bag _index_put_impl_ _linalg_det as_strided_scatter index_copy index_copy_ "
    "index_put index_put_ linalg_matrix_exp logcumsumexp _unsafe_index_put max_unpool2d "
    "max_unpool3d mkldnn_rnn_layer nll_loss2d_forward put put_ scatter scatter_ "
    "segment_reduce".split()
)


class _Operations(DispatchMode):
    """Notes why what runs must not be compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.reason = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.__name__.partition(".")[0]
        if getattr(func, "namespace", "") not in ("aten", "prims", "prim"):
            self.reason = f"it calls {func}, which may have a derivative of its own"
        elif name in OWN_WORDS or (name == "embedding" and any(args[3:])):
            self.reason = f"PyTorch's derivative of {name} does not do"
        return func(*args, **(kwargs or {}))


def _unfit_for(backend: Any, module: Any, inputs: Sequence[Any]) -> str:
    """Return why a piece must not be compiled, empty if it may.

    It runs once without numbers for that.
    """
    if type(backend).__name__ == "_TorchCompileInductorWrapper" and any(
        isinstance(t, torch.Tensor) and t.is_complex() for t in (*inputs, *_values(module.graph))
    ):
        return "Inductor has no complex numbers"
    fake: Any = detect_fake_mode(inputs)
    if fake is None:
        return ""  # without tensors
    seen = _Operations()
    try:
        with (
            contextlib.nullcontext()
            if fake.shape_env is None
            else fake.shape_env.ignore_fresh_unbacked_symbols(),
            patch.object(fake, "allow_non_fake_inputs", True),
            torch.enable_grad(),
            fake,
            seen,
        ):
            module(*[x.clone() if isinstance(x, torch.Tensor) else x for x in inputs])
    except Exception as error:  # whatever stands in for numbers may raise
        return f"it does not run without numbers: {_said(error)}"
    return seen.reason


def _values(graph: Any) -> Iterator[Any]:
    for node in graph.nodes:
        yield node.meta.get("example_value")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _name_of(graph: Any) -> str:
    """Return the function that a piece begins in, with its line."""
    for node in graph.nodes:
        found = re.findall(r'File "([^"]*)", line (\d+), in (\S+)', node.stack_trace or "")
        if found:
            file, line, function = found[0]
            return f"{function} ({os.path.basename(file)}:{line})"
    return "a compiled function"
