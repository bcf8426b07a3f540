"""Progress bars, and how much may be done at once."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

import torch

T = TypeVar("T")

#: The most bytes that `chunk_size="auto"` takes for intermediates.
_MOST = 1 << 31


def progress(steps: Iterable[T], total: int, what: str) -> Iterable[T]:
    """Return `steps` with a progress bar where tqdm is installed; short work shows none."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return steps
    return tqdm(steps, total=total, desc=what, delay=1.0, leave=False)


def memory_budget(device: torch.device) -> int:
    """Return the bytes that a vectorised pass may take: a quarter of the free memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        try:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):  # not on every system
            free = 4 * _MOST
    return min(free // 4, _MOST)
