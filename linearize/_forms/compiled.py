"""The built-in parts of linear programs through `torch.compile`.

A program is cut at opaque operations, which stay calls; each stretch between them is compiled
with residuals as inputs, so that one compilation serves all points of a structure.
"""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .._execute.binding import Binding
from .._execute.executor import Executor
from .._execute.thresholds import COMPILE_FROM, COMPILED_CALL
from .._execute.written import Function
from .._programs.aten import may_alias, schema_of
from .._programs.price import machine
from .._programs.program import Equation, Program
from .._programs.values import Var
from .._spaces.compare import all_close, close, rounding
from .._torch.modes import functorch_active
from .._torch.names import OpOverload
from ..errors import CompilationWarning, LinearizeError, OptionError
from .cuda_graphs import Replays, capture_on_cuda
from .segments import Segments, Stretch

_LOCK = threading.Lock()
_DIFFERS = "what was compiled does not give the same"


@dataclasses.dataclass(frozen=True)
class Options:
    """How programs are compiled.

    `torch` is for `torch.compile`; `cudagraph` says whether stretches on CUDA are replayed from
    CUDA graphs.
    """

    torch: Mapping[str, Any]
    cudagraph: bool = True

    @staticmethod
    def of(given: Any) -> Options | None:
        """Return what an option `compile=` means, None for no compilation."""
        if given is None or given is False:
            return None
        if given is True:
            return Options({})
        if not isinstance(given, Mapping):
            raise OptionError(
                f"compile must be a bool or a dict of options of torch.compile, got {given!r}"
            )
        rest = dict(given)
        return Options(rest, bool(rest.pop("cudagraph", True)))


def compiled(
    executor: Executor,
    binding: Binding,
    options: Options,
    arguments: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor | None],
) -> Segments | None:
    """Return a program with its stretches compiled, None if that does not pay or is wrong.

    Each is compared with what it replaces, on random inputs and the numbers of one point, and the
    whole with what the program gave there. If the compiler fails, or its result is wrong, there is
    a `CompilationWarning`.
    """
    program = executor.program
    try:
        segments = Segments(program, executor.copies)
    except LinearizeError as error:
        _warn(program, str(error))
        return None
    generator = torch.Generator().manual_seed(8)
    gained = 0
    with _LOCK:
        for stretch in segments.stretches:
            if _suits(stretch) and worth(stretch.program):
                residuals = [binding.residuals[k].tensor for k in stretch.residuals]
                inputs = [v.spec.random(generator) for v in stretch.inputs]
                fault = _compile(stretch, residuals, inputs, options)
                if fault:
                    _warn(program, fault)
                    break
                gained += 1
    if not gained and not replayed(program, options):
        return None
    if all_close(segments(arguments, binding), expected, rounding):
        return segments
    _warn(program, _DIFFERS)
    return None


def _warn(program: Program, reason: str) -> None:
    warnings.warn(
        f"{program.name}: torch.compile failed, the program runs as it was: {reason}",
        CompilationWarning,
        stacklevel=2,
    )


def replayed(program: Program, options: Options) -> bool:
    """Whether a program's stretches are to be replayed from CUDA graphs."""
    return options.cudagraph and any(v.spec.device.type == "cuda" for v in program.inputs)


def _suits(stretch: Stretch) -> bool:
    specs = [v.spec for eq in stretch.program.equations for v in eq.outputs if v is not None]
    specs += [v.spec for v in stretch.inputs]
    # Inductor has no complex numbers.
    return len(stretch.program.equations) >= COMPILE_FROM and not any(
        s.dtype.is_complex for s in specs
    )


def worth(program: Program) -> bool:
    """Whether a compiler saves more than a call of what it made costs, on paper.

    Operations on entries that follow each other become one, and what goes from one to the next
    is neither written nor read. On other devices than the CPU each launch saved counts.
    """
    device = next((v.spec.device for eq in program.equations for v in eq.outputs if v), None)
    if device is None:
        return False
    if device.type != "cpu":
        return True
    m = machine(device)
    launches = sum(not may_alias(eq.op) for eq in program.equations)
    inner: set[Var] = {v for eq in program.equations if _fuses(eq) for v in eq.outputs if v}
    read_elsewhere = {v for eq in program.equations if not _fuses(eq) for v in eq.inputs()}
    inner -= read_elsewhere | set(program.outputs)
    left = launches - len(inner)
    saved = (launches - max(left, 1)) * m.launch
    saved += sum(2 * m.moved(v.spec.nbytes) for v in inner)
    return saved > COMPILED_CALL


def _fuses(eq: Equation) -> bool:
    return isinstance(eq.op, OpOverload) and not may_alias(eq.op) and schema_of(eq.op).pointwise


def _compile(
    stretch: Stretch,
    residuals: list[torch.Tensor],
    inputs: list[torch.Tensor],
    options: Options,
) -> str:
    """Compile a stretch, and use that if it gives the same; return why not, else nothing."""
    settings = {"dynamic": False, "fullgraph": True, **options.torch}
    eager = stretch.function
    quicker = _alone(torch.compile(eager, **settings))
    with torch.inference_mode(False), torch.no_grad():
        expected = eager(residuals, inputs)
        try:
            found = quicker(residuals, inputs)
        except Exception as error:  # whatever a compiler may raise
            reason = " ".join(str(error).split())[:300]
            return f"{type(error).__name__}: {reason}"
        if not all(close(a, b, rounding) for a, b in zip(found, expected, strict=True)):
            return _DIFFERS
    stretch.function = quicker
    return ""


class Compiled:
    """Runs a compiled program at one point, and as it was (`executor`) inside of transforms.

    Its stretches may run from CUDA graphs.
    """

    __slots__ = ("_executor", "_replays", "_segments")

    def __init__(
        self, segments: Segments, executor: Executor, options: Options, device: torch.device
    ) -> None:
        self._segments, self._executor = segments, executor
        replaying = replayed(executor.program, options)
        self._replays = Replays(capture_on_cuda(device), device) if replaying else None

    def __call__(
        self, arguments: Sequence[torch.Tensor], binding: Binding
    ) -> list[torch.Tensor | None]:
        """Run the program."""
        if functorch_active():
            return self._executor(arguments, binding)
        return self._segments(arguments, binding, self._replays)


def _alone(function: Function) -> Function:
    """Return a compiled function that is always met by the same conditions.

    It would be compiled anew for each combination of gradient mode, strides and the like.
    """

    def run(residuals: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> list[Any]:
        with torch.inference_mode(False), torch.no_grad():
            return function(list(residuals), [_plain(t) for t in inputs])

    return run


def _plain(t: torch.Tensor) -> torch.Tensor:
    if t.is_inference():
        return t.clone(memory_format=torch.contiguous_format)
    if t.is_neg():
        t = t.resolve_neg()
    return t.detach().contiguous() if t.requires_grad else t.contiguous()
