"""Pieces of f that a compiler makes.

Each is looked at when it is made. Its forward is what the compiler makes of it; its pullback is
written down by AOTAutograd, in the operations that autograd itself would call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._guards import detect_fake_mode

from .aot import UnreadableError, is_piece, read
from .modes import DispatchMode, Hidden
from .names import MOVING_STATISTICS, statistics_of
from .watching import ThreadStack

#: Who watches calls of compiled functions.
WATCHING = ThreadStack()


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
    """What is to know of calls of compiled functions in one run of f, and the pieces that ran.

    Compiled functions must not see who notes the `reads` of f: it would be compiled into them.
    It is told what compiled code reads, and those running statistics among it that move.
    """

    def __init__(self, reads: Any = None) -> None:
        self.reads = reads
        self.pieces: dict[Piece, None] = {}
        #: The frame of the outermost call of a compiled function, and what it does not see.
        self.frame = 0
        self.away: Hidden | None = None

    def ran(self, piece: Piece, arguments: Sequence[Any], moving: Sequence[torch.Tensor]) -> None:
        """Take note of a piece that is about to run."""
        self.pieces[piece] = None
        if self.reads is not None:
            self.reads.note_compiled(arguments, moving)


class Looking:
    """A compiler that looks at what another one makes; given a reason, nothing is compiled."""

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
        calls: CompiledCalls | None = WATCHING.innermost
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
            given, moves = statistics_of(node.target, node.args, node.kwargs)
            for place in (places[x] for x in given.values() if x in places):
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
    tensors = (*inputs, *(n.meta.get("example_value") for n in module.graph.nodes))
    inductor = type(backend).__name__ == "_TorchCompileInductorWrapper"
    if inductor and any(isinstance(t, torch.Tensor) and t.is_complex() for t in tensors):
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
            _constants_allowed(fake),
            torch.enable_grad(),
            fake,
            seen,
        ):
            module(*[x.clone() if isinstance(x, torch.Tensor) else x for x in inputs])
    except Exception as error:  # whatever stands in for numbers may raise
        return f"it does not run without numbers: {_said(error)}"
    return seen.reason


@contextlib.contextmanager
def _constants_allowed(fake: Any) -> Iterator[None]:
    """Let tensors with numbers meet those without."""
    before = fake.allow_non_fake_inputs
    fake.allow_non_fake_inputs = True
    try:
        yield
    finally:
        fake.allow_non_fake_inputs = before


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
