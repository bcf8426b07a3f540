"""Samples on which PyTorch's own derivatives contradict each other, and what is done there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Dispute:
    """What may differ, why, and for which samples.

    A value, a repeated call or the adjoint identity is never open to dispute.
    """

    reason: str
    kinds: tuple[str, ...] = ("tangent",)
    applies: Callable[[Any], bool] = lambda sample: True


def _repeated_indices(sample: Any) -> bool:
    """Whether two entries of one channel are put at the same place."""
    indices: torch.Tensor = sample.args[0]
    dims = sample.kwargs["kernel_size"]
    count = indices.ndim - 2 if isinstance(dims, int) else len(dims)
    planes = indices.flatten(-count).reshape(-1, indices[0].flatten(-count).shape[-1])
    return any(len(plane.unique()) < len(plane) for plane in planes)


_UNPOOL = Dispute(
    "with repeated indices PyTorch leaves the value undefined: one entry wins, and the others "
    "have derivative zero by forward AD but not by autograd; the products here are "
    "autograd's gradient and its transpose",
    applies=_repeated_indices,
)

DISPUTES: dict[str, Dispute] = {
    "as_strided_scatter": Dispute(
        "autograd's gradient of the first argument keeps the window that is overwritten and "
        "drops the rest, which forward AD and finite differences contradict; the products here "
        "are autograd's gradient and its transpose"
    ),
    "nn.functional.max_unpool1d": _UNPOOL,
    "nn.functional.max_unpool2d": _UNPOOL,
    "nn.functional.max_unpool3d": _UNPOOL,
    "normal": Dispute(
        "PyTorch defines the derivative of a draw as zero; finite differences under a fixed seed "
        "see the dependence on mean and deviation"
    ),
}


def disputed(name: str, kind: str, sample: Any) -> bool:
    """Whether a difference of this kind is one that PyTorch has with itself."""
    dispute = DISPUTES.get(name)
    return dispute is not None and kind in dispute.kinds and dispute.applies(sample)
