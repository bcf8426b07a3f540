"""How the leaves of a space lie on several ranks.

A tensor of which several ranks hold the same numbers counts once, as a vector: to a program each
of n copies is the tensor divided by √n. Then the sum over all ranks of the inner products of
their parts is the inner product of the whole, whatever the placements, and a transpose is one.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from .._torch.ranks import members, summed_over
from .._torch.sharded import (
    copies,
    is_sharded,
    lies,
    local_of,
    lying,
    part_of,
    placed,
    stacked,
    wrapped,
)
from ..errors import SpaceError
from .specs import TensorSpec, describe, differing


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """How one leaf lies on the ranks.

    `whole` has mesh, placements and shape of a DTensor; all ranks of one of the `groups` have the
    same numbers.
    """

    whole: Any
    groups: tuple[Any, ...]

    @classmethod
    def of(cls, t: torch.Tensor) -> Layout | None:
        """Return how a tensor lies; None for one that is no DTensor."""
        if not is_sharded(t):
            return None
        spec = lies(t)
        whole = lying(spec.mesh, spec.placements, t, t.shape)
        return cls(whole, copies(spec.mesh, spec.placements))

    @property
    def count(self) -> int:
        """How many ranks have the same numbers."""
        return math.prod([len(members(g)) for g in self.groups])

    def __str__(self) -> str:
        if self.whole is None:
            return f"the same on {self.count} ranks"
        shape, _, dtype = self.whole.tensor_meta
        spec = TensorSpec(tuple(shape), dtype, torch.device(self.whole.mesh.device_type))
        return f"{spec} {_names(self.whole)} on {self.whole.mesh.size()} ranks"

    def taken(self, given: torch.Tensor, what: str, several: bool) -> torch.Tensor:
        """Return what a program takes for an element's leaf, which errors call `what`.

        With `several` it is a stack, along a new first dimension.
        """
        if self.whole is not None:
            given = part_of(self._fitting(given, what, several))
        return self.scaled(given)

    def lying(self, t: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of a tensor, moved to where the leaf's is."""
        return t if self.whole is None else local_of(placed(t, self.whole))

    def scaled(self, part: torch.Tensor) -> torch.Tensor:
        """Return what a program takes or gives for this rank's part of the leaf."""
        if not self.groups:
            return part
        return rescaled(part, self.count**-0.5)

    def mean(self, part: torch.Tensor) -> torch.Tensor:
        """Return the mean of the parts of all ranks that have the same tensor."""
        for group in self.groups:
            part = summed_over(group, part) / len(members(group))
        return part

    def given(self, part: torch.Tensor) -> torch.Tensor:
        """Return the leaf for what a program gives."""
        if self.groups:
            part = rescaled(part, self.count**0.5)
        if self.whole is None:
            return part
        single = part.dim() == len(self.whole.tensor_meta.shape)
        return wrapped(part.contiguous(), self.whole if single else stacked(self.whole, len(part)))

    def whole_numbers(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return this rank's part, for a program, of numbers that all ranks know in full."""
        mesh, placements = self.whole.mesh, self.whole.placements
        for dim, placement in enumerate(placements):
            if hasattr(placement, "dim"):
                pieces = numbers.chunk(mesh.size(dim), placement.dim)
                none = numbers.narrow(placement.dim, 0, 0)
                rank = mesh.get_local_rank(dim)
                numbers = pieces[rank] if rank < len(pieces) else none
        part: torch.Tensor = numbers.contiguous() * self.count**-0.5
        return part

    def _fitting(self, given: torch.Tensor, what: str, several: bool) -> Any:
        whole = self.whole
        if not is_sharded(given):
            raise SpaceError(
                f"{what}: expected a DTensor {self}, got {describe(given)}; "
                "torch.distributed.tensor.distribute_tensor makes one of it"
            )
        if several:
            whole = stacked(whole, given.shape[0] if given.dim() else 0)
        shape, _, dtype = whole.tensor_meta
        spec = TensorSpec(tuple(shape), dtype, given.device)
        if not spec.matches(given):
            raise SpaceError(
                f"{what}: expected {self}, got {TensorSpec.of(given)} ({differing(given, spec)})"
            )
        if given.device_mesh != whole.mesh:  # type: ignore[attr-defined]
            raise SpaceError(
                f"{what}: expected a DTensor on {whole.mesh}, got one on another mesh"
            )
        return placed(given, whole)


def _names(spec: Any) -> str:
    return f"({', '.join(map(repr, spec.placements))})"


def rescaled(t: torch.Tensor, factor: float) -> torch.Tensor:
    """Return a tensor times a factor that stands for the number of copies."""
    if not (t.requires_grad and torch.is_grad_enabled()):
        return t * factor
    return _Rescaled.apply(t, factor)  # type: ignore[no-untyped-call,no-any-return]


class _Rescaled(torch.autograd.Function):
    """A factor that stands for the number of copies, and is no part of a derivative.

    What PyTorch calls the gradient of a tensor that several ranks have is the same on all of
    them, too: it is not divided among them.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(t: torch.Tensor, factor: float) -> torch.Tensor:
        return t * factor

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return rescaled(grad, 1 / ctx.factor), None

    @staticmethod
    def jvp(ctx: Any, t: torch.Tensor, _: Any) -> torch.Tensor:
        result: torch.Tensor = t * ctx.factor
        return result
