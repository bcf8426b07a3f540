"""Failures of f on other ranks: left in the store for those who may wait in vain."""

from __future__ import annotations

import contextlib
from typing import ClassVar

import torch.distributed as dist

from .._torch.ranks import distributed, store


class _Posted:
    """What ranks leave in the store when they fail in f and do not know who waits for them."""

    #: How many runs of f went well: word of a failure before the latest says nothing.
    runs = 0
    failures = 0
    #: What was read, so that it is told once.
    told: ClassVar[dict[int, bytes]] = {}


def went_well() -> None:
    """Take note that f ran on all ranks."""
    _Posted.runs += 1


def _key(rank: int) -> str:
    return f"linearize/failed/{rank}"


def post(failure: BaseException) -> None:
    """Leave word of a failure where others look when they wait in vain."""
    if not distributed():
        return
    _Posted.failures += 1
    text = f"{_Posted.runs} {_Posted.failures} {type(failure).__name__}: {failure}"
    with contextlib.suppress(RuntimeError):  # whoever keeps the store is gone
        store().set(_key(dist.get_rank()), text)


def posted() -> str:
    """Return what other ranks have left word of since somebody last looked."""
    found: dict[int, bytes] = {}
    with contextlib.suppress(RuntimeError):
        kept, me = store(), dist.get_rank()
        for rank in range(dist.get_world_size()):
            if rank != me and kept.check([_key(rank)]):
                found[rank] = kept.get(_key(rank))
    told = []
    for rank, word in found.items():
        runs, _, text = word.decode().split(" ", 2)
        if _Posted.told.get(rank) != word and int(runs) >= _Posted.runs:
            told.append(f"rank {rank}: {text}")
    _Posted.told |= found
    return f"; f failed on {'; '.join(told)}" if told else ""
