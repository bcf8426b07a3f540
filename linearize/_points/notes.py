"""What others find out about a point, and about all points of its structure."""

from __future__ import annotations

from typing import Any

import torch

from .._execute.schedule import Schedule
from .._programs.origins import Origin
from .programs import PointPrograms


def shared(source: PointPrograms | None) -> dict[str, Any] | None:
    """Return the notes on all points of a structure, to be added to; None if there is none."""
    if source is None:
        return None
    with source.lock:
        source._search()
        return None if source._structure is None else source._structure.notes


def value(source: PointPrograms | None, origin: Origin) -> torch.Tensor | None:
    """Return what a constant is at a point, None if that cannot be computed any more."""
    if source is None or not origin.portable:
        return None
    with source.lock, torch.inference_mode(False), torch.no_grad():
        if source._reader is None:
            return None
        schedule = Schedule([origin])
        read = [source._reader.value(o) for o in schedule.saved]
        return None if any(x is None for x in read) else schedule(read)[0]
