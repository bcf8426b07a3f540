"""The operations that a custom Function's node stands for in programs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch

from .._programs.program import Operation
from .._spaces.space import TensorSpec
from .custom import CustomNode


class _OfNode(Operation):
    """One of the two methods of a node."""

    __slots__ = ("node",)
    may_return_none = True
    may_alias = False

    def __init__(self, node: CustomNode) -> None:
        self.node = node

    @property
    def takes_batches(self) -> bool:  # type: ignore[override]
        """Whether the author says so."""
        return self.node.takes_batches

    def bytes_kept(self) -> Iterable[torch.Tensor]:
        """Return the tensors that the context keeps."""
        return self.node.kept()


class CustomBackward(_OfNode):
    """The pullback of a custom Function: cotangents of its outputs to those of its inputs."""

    __slots__ = ()

    @property
    def name(self) -> str:  # type: ignore[override]
        """Printable name."""
        return f"{self.node.name}.backward"

    def moved(self, counterpart: Callable[[Any], Any]) -> CustomBackward:
        """Return the same with another node."""
        return CustomBackward(counterpart(self.node))

    def __call__(self, *grads: torch.Tensor | None) -> list[torch.Tensor | None]:
        """Call the user's `backward`."""
        return self.node.backward(grads)


class CustomJvp(_OfNode):
    """The pushforward of a custom Function: tangents of its inputs to those of its outputs."""

    __slots__ = ("wanted",)

    def __init__(self, node: CustomNode, wanted: Sequence[bool]) -> None:
        super().__init__(node)
        self.wanted = tuple(wanted)

    @property
    def name(self) -> str:  # type: ignore[override]
        """Printable name."""
        return f"{self.node.name}.jvp"

    def moved(self, counterpart: Callable[[Any], Any]) -> CustomJvp:
        """Return the same with another node."""
        return CustomJvp(counterpart(self.node), self.wanted)

    def __call__(self, *tangents: torch.Tensor | None) -> list[torch.Tensor | None]:
        """Call the user's `jvp`."""
        return self.node.jvp(tangents, self.wanted)


#: A method as a function, and what it takes and returns.
Direction: TypeAlias = tuple[
    Callable[..., Sequence[torch.Tensor | None]], list[TensorSpec], list[TensorSpec]
]


def direction_of(node: CustomNode, method: str, chosen: Sequence[bool]) -> Direction:
    """Return one of the two methods, "backward" or "jvp", as a function of all of its arguments.

    `chosen` tells which results of `forward` have a gradient, or a tangent that is used.
    """
    inputs = list(node.inputs)
    outputs = [s if s is not None else _NOTHING for s in node.outputs]

    def backward(*grads: torch.Tensor) -> list[torch.Tensor | None]:
        return node.backward([g if w else None for g, w in zip(grads, chosen, strict=True)])

    def jvp(*tangents: torch.Tensor) -> list[torch.Tensor | None]:
        return node.jvp(tangents, chosen)

    return (backward, outputs, inputs) if method == "backward" else (jvp, inputs, outputs)


#: Stands for an output that is not a tensor.
_NOTHING = TensorSpec((), torch.float32, torch.device("cpu"))
