"""Operators on which PyTorch's own derivatives part, and what is done here."""

from __future__ import annotations

#: For each operator, at which comparisons it may differ, and why. A value, a repeated call or
#: the adjoint identity is never open to dispute.
DISPUTES: dict[str, tuple[tuple[str, ...], str]] = {}
