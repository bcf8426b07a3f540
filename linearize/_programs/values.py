"""What stands in linear programs for tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .._spaces.space import TensorSpec
from .origins import Origin, Zeros


class Value:
    """A value of a linear program.

    Attributes
    ----------
    spec
        Its shape, dtype and device.
    """

    __slots__ = ("spec",)

    def __init__(self, spec: TensorSpec) -> None:
        self.spec = spec


class Var(Value):
    """A value that depends on the program's inputs."""

    __slots__ = ()


class Constant(Value):
    """A value that does not; its tensor stands beside the program, for each point another one.

    Attributes
    ----------
    origin
        How it comes about. This tells it from others, never which tensor it was somewhere.
    source
        What it is kept for, for printing and errors.
    folded
        Whether it multiplies factors that came one after the other, so that it may overflow
        where these do not.
    depth
        How many constants were made, each of the one before, to make it.
    """

    __slots__ = ("__weakref__", "depth", "folded", "origin", "source")

    def __init__(
        self, spec: TensorSpec, origin: Origin, source: str = "", *, folded: bool = False
    ) -> None:
        super().__init__(spec)
        self.origin = origin
        self.source = source
        self.folded = folded
        self.depth = 0

    @property
    def is_zero(self) -> bool:
        """Whether it is zero at every point."""
        return isinstance(self.origin, Zeros)


def zeros(spec: TensorSpec) -> Constant:
    """Return zeros of a shape as a constant; they take no memory."""
    return Constant(spec, Zeros(spec), "zeros")


def frozen(op: Any, args: Any, kwargs: Any) -> Any:
    """Return what two applications of an operation have in common that compute the same."""
    return op, _frozen(args), tuple([(k, _frozen(v)) for k, v in sorted(kwargs.items())])


def _frozen(x: Any) -> Any:
    if isinstance(x, (list, tuple)):
        return tuple(map(_frozen, x))
    return x if isinstance(x, Value) else (type(x).__name__, repr(x))


def last_uses(
    steps: Sequence[Iterable[Var | None]], results: Iterable[Var | None]
) -> list[list[Var]]:
    """Return for each step the variables that can go after it: none that the results need."""
    met = set(results)
    found: list[list[Var]] = []
    for step in reversed(steps):
        found.append([v for v in dict.fromkeys(step) if v is not None and v not in met])
        met.update(found[-1])
    return found[::-1]
