"""Processes that run scenes of a test module together, over gloo."""

import importlib
import os
import sys
import traceback
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

F64 = torch.float64


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def worker(rank, world, store, module, scenes):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*is deprecated")
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=30),
        )
        for scene in scenes:
            getattr(importlib.import_module(module), scene)(rank, world)
    except BaseException:
        print(f"rank {rank}, {scene}", file=sys.stderr)
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def together(world, path, module, *scenes, seconds=240):
    """Run scenes in as many processes; a test fails if one of them does, or does not end."""
    context = mp.get_context("spawn")
    arguments = (world, str(path / "store"), module, scenes)
    ranks = [context.Process(target=worker, args=(rank, *arguments)) for rank in range(world)]
    for p in ranks:
        p.start()
    for p in ranks:
        p.join(seconds)
    late = [p for p in ranks if p.exitcode is None]
    for p in late:
        p.kill()
    assert not late, "ranks hang"
    assert [p.exitcode for p in ranks] == [0] * world
