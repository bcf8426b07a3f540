"""The built-in parts of linear programs through `torch.compile`.

A program is cut at opaque operations, which stay calls; each stretch between them is compiled
with residuals as inputs, so that one compilation serves all points of a structure.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .._execute.binding import Binding
from .._execute.written import Function
from .._programs.program import Program
from .._spaces.compare import close, rounding
from ..errors import LinearizeError, OptionError
from .segments import Segments, Stretch
from .timing import seconds

#: Shorter stretches are left alone.
SHORTEST = 2
#: The share of the time of a stretch that its compiled form may take on the CPU.
GAIN = 0.95

_LOCK = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Options:
    """How programs are compiled.

    Attributes
    ----------
    torch
        Passed to `torch.compile`.
    cudagraph
        Whether stretches on CUDA are replayed from CUDA graphs.
    """

    torch: Mapping[str, Any]
    cudagraph: bool = True

    @staticmethod
    def of(given: Any) -> Options | None:
        """Return what an option `compile=` means, None for no compilation.

        Raises
        ------
        OptionError
            If it is neither a bool nor a dict.
        """
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


class CompilationFailure(LinearizeError):  # noqa: N818 (raised inside the package only)
    """Raised where a program cannot be compiled."""


def compiled(
    program: Program,
    copies: Sequence[bool],
    binding: Binding,
    options: Options,
    failed: Callable[[str], None],
) -> Segments | None:
    """Return a program with its stretches compiled, as far as that makes them quicker.

    Each is compared with what it replaces, on random inputs.

    Parameters
    ----------
    program, copies
        As of `Segments`.
    binding
        The numbers of a point, to try it with.
    options
        How to compile.
    failed
        Told why, if the compiler fails or its result is wrong.

    Returns
    -------
    Segments or None
        None if there is nothing to gain.
    """
    try:
        segments = Segments(program, copies)
    except LinearizeError as error:
        failed(str(error))
        return None
    generator = torch.Generator().manual_seed(8)
    gained = 0
    try:
        with _LOCK:
            for stretch in segments.stretches:
                if _suits(stretch):
                    residuals = [binding.residuals[k].tensor for k in stretch.residuals]
                    inputs = [v.spec.random(generator) for v in stretch.inputs]
                    gained += _compile(stretch, residuals, inputs, options)
    except CompilationFailure as reason:
        failed(str(reason))
    return segments if gained or replayed(program, options) else None


def replayed(program: Program, options: Options) -> bool:
    """Whether a program's stretches are to be replayed from CUDA graphs."""
    return options.cudagraph and any(v.spec.device.type == "cuda" for v in program.inputs)


def _suits(stretch: Stretch) -> bool:
    specs = [v.spec for eq in stretch.program.equations for v in eq.outputs if v is not None]
    specs += [v.spec for v in stretch.inputs]
    # Inductor has no complex numbers.
    return len(stretch.program.equations) >= SHORTEST and not any(
        s.dtype.is_complex for s in specs
    )


def _compile(
    stretch: Stretch,
    residuals: list[torch.Tensor],
    inputs: list[torch.Tensor],
    options: Options,
) -> bool:
    """Compile a stretch, and use that if it is quicker."""
    settings = {"dynamic": False, "fullgraph": True, **options.torch}
    eager = stretch.function
    quicker = _alone(torch.compile(eager, **settings))
    with torch.inference_mode(False), torch.no_grad():
        expected = eager(residuals, inputs)
        try:
            found = quicker(residuals, inputs)
        except Exception as error:  # whatever a compiler may raise
            reason = " ".join(str(error).split())[:300]
            raise CompilationFailure(f"{type(error).__name__}: {reason}") from error
        for a, b in zip(found, expected, strict=True):
            if not close(a, b, rounding):
                raise CompilationFailure("what was compiled does not give the same")
        device = inputs[0].device
        if device.type == "cpu":
            now = seconds(lambda: eager(residuals, inputs), device)
            if seconds(lambda: quicker(residuals, inputs), device) > GAIN * now:
                return False
    stretch.function = quicker
    return True


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
