"""How much may be done at once."""

from __future__ import annotations

import os

import torch

#: The most bytes that `chunk_size="auto"` takes for intermediates.
_MOST = 1 << 31
#: What a core of a processor has in its own cache. Intermediates that do not fit come from the
#: memory, several times slower.
_CACHE = 1 << 22


def at_once(nbytes: int, device: torch.device) -> int:
    """Return how many vectors are mapped in one pass, of which each takes so many bytes."""
    most = memory_budget(device)
    if device.type == "cpu":
        most = min(most, _CACHE * torch.get_num_threads())
    return most // max(nbytes, 1)


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
