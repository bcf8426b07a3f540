"""How much may be done at once."""

from __future__ import annotations

import os

import torch

#: The most bytes that `chunk_size="auto"` takes for intermediates.
_MOST = 1 << 31
#: How many vectors ranks that communicate take in one pass: all have to take as many.
ON_RANKS = 32


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
