"""How much memory tensors take, and how much may be taken at once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import torch

#: The most bytes that `chunk_size="auto"` takes for intermediates.
_MOST = 1 << 31
#: How many vectors ranks that communicate take in one pass: all have to take as many.
ON_RANKS = 32


def total_bytes(tensors: Iterable[torch.Tensor], excluding: Iterable[int] = ()) -> int:
    """Return the bytes of the distinct storages of tensors, except those with some data pointers.

    Views of one storage count once.
    """
    seen: set[int] = set(excluding)
    count = 0
    for t in (part for whole in tensors for part in dense_parts(whole)):
        storage = t.untyped_storage()
        pointer = storage.data_ptr()
        if pointer not in seen:
            seen.add(pointer)
            count += storage.nbytes()
    return count


def dense_parts(t: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return the dense tensors of which a sparse one consists."""
    if t.layout == torch.strided:
        return (t,)
    if t.layout == torch.sparse_coo:
        return t._indices(), t._values()
    if t.layout in (torch.sparse_csr, torch.sparse_bsr):
        return t.crow_indices(), t.col_indices(), t.values()
    if t.layout in (torch.sparse_csc, torch.sparse_bsc):
        return t.ccol_indices(), t.row_indices(), t.values()
    return ()


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
