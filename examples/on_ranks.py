"""Ranks of torch.distributed, as processes of this machine that speak over gloo's TCP."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["counting", "on_ranks"]


def on_ranks(worlds: Iterable[int], job: Callable[..., Any], *arguments: Any) -> dict[int, Any]:
    """Return what a job finds on each rank, by the number of ranks that do it together.

    What the job needs is imported once: ranks are forked from a process that did nothing else.
    """
    multiprocessing.set_forkserver_preload([job.__module__])
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for world in worlds:
            torch.multiprocessing.start_processes(
                _work, (world, folder, job, arguments), world, start_method="forkserver"
            )
            found[world] = torch.load(f"{folder}/found{world}.pt", weights_only=False)
    return found


def _work(rank: int, world: int, folder: str, job: Callable[..., Any], arguments: Any) -> None:
    """Be one rank."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store{world}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=120),
    )
    everywhere: list[Any] = [None] * world
    dist.all_gather_object(everywhere, job(*arguments))
    if rank == 0:
        torch.save(everywhere, f"{folder}/found{world}.pt")
    dist.barrier()
    # Without the interpreter's own end: gloo's threads were seen to abort the process there.
    os._exit(0)


@contextmanager
def counting(*names: str) -> Iterator[list[tuple[str, int]]]:
    """Take note of messages meanwhile: who sends, and how many bytes this rank hands in.

    The message by which ranks agree on what they do is called "agree".
    """
    given = {name: getattr(dist, name) for name in names}
    found: list[tuple[str, int]] = []

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            sent = args[0] if name in ("all_reduce", "isend") else args[1]
            parts = sent if isinstance(sent, (list, tuple)) else [sent]
            agreeing = parts[0].dtype == torch.int64
            found.append(("agree" if agreeing else name, sum(t.nbytes for t in parts)))
            return given[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counted(name))
    try:
        yield found
    finally:
        for name in names:
            setattr(dist, name, given[name])
