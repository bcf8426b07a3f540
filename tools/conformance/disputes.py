"""Samples on which PyTorch's own derivatives contradict each other, and what is done there."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Dispute:
    """What may differ, and why.

    A value, a repeated call or the adjoint identity is never open to dispute.
    """

    reason: str
    kinds: tuple[str, ...] = ("tangent",)


DISPUTES: dict[str, Dispute] = {
    "normal": Dispute(
        "PyTorch defines the derivative of a draw as zero; finite differences under a fixed seed "
        "see the dependence on mean and deviation"
    ),
}


def disputed(name: str, kind: str) -> bool:
    """Whether a difference of this kind is one that PyTorch has with itself."""
    dispute = DISPUTES.get(name)
    return dispute is not None and kind in dispute.kinds
