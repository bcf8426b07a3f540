"""Processes that run scenes of a test module together: ranks of `torch.distributed`."""

import importlib
import multiprocessing
import os
import time
import traceback
import warnings
from datetime import timedelta
from multiprocessing.connection import wait

import pytest
import torch
import torch.distributed as dist

from linearize.errors import DistributedError

F64 = torch.float64
#: How long others may still say why, when a rank has failed.
GRACE = 10.0

#: What ranks need is imported once: they are forked from a process that has done nothing else.
ready = multiprocessing.get_context("forkserver")
ready.set_forkserver_preload(
    [
        "linearize.distributed",
        "linearize.scipy",
        "numpy",
        "pytest",
        "scipy.sparse.linalg",
        "torch._dynamo",  # which functional collectives ask for
        "torch.distributed.nn.functional",
        "torch.distributed.tensor",  # which torch.testing asks for
    ]
)


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(*shape, dtype=F64, generator=generator, device="cpu")
    return numbers.to(torch.get_default_device())


def expect(words, call):
    """Call something that all ranks must fail in."""
    with pytest.raises(DistributedError) as caught:
        call()
    assert words in str(caught.value)


def over_all(number):
    """Return the sum of a tensor over all ranks."""
    number = number.detach().clone()
    dist.all_reduce(number)
    return number


def begin(rank, world, store, backend, seconds):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
        torch.set_default_device(f"cuda:{rank}")
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*is deprecated")
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=seconds),
    )


def work(answers, module, scene, rank, world, *settings):
    """Be one rank, and answer with what went wrong."""
    try:
        begin(rank, world, *settings)
        getattr(importlib.import_module(module), scene)(rank, world)
        answers.send("")
    except BaseException:
        answers.send(traceback.format_exc())
    # Not by the interpreter's own end, where threads of gloo may abort the process.
    os._exit(0)


def together(world, path, scene, *, backend="gloo", seconds=300, timeout=30):
    """Run a scene in as many processes; fail if one of them does, or does not end in time.

    One that ends its process itself, by `os._exit(0)`, does so on purpose.
    """
    ranks = {}
    for rank in range(world):
        mine, theirs = ready.Pipe(duplex=False)
        settings = (str(path / "store"), backend, timeout)
        arguments = (theirs, scene.__module__, scene.__name__, rank, world, *settings)
        ranks[mine] = rank, ready.Process(target=work, args=arguments)
        ranks[mine][1].start()
        theirs.close()
    try:
        said = heard(ranks, seconds)
    finally:
        for _, process in ranks.values():
            process.kill()
            process.join()
    told = [f"rank {rank}: {said.get(rank, 'hangs')}" for rank in range(world)]
    wrong = [text for rank, text in enumerate(told) if said.get(rank, "hangs")]
    assert not wrong, "\n".join(wrong)


def heard(ranks, seconds):
    """Return what ranks have answered until the time is over, by their numbers."""
    said, until = {}, time.monotonic() + seconds
    while len(said) < len(ranks):
        silent = [c for c, (rank, _) in ranks.items() if rank not in said]
        answering = wait(silent, max(0.0, until - time.monotonic()))
        if not answering:
            break
        for connection in answering:
            rank, process = ranks[connection]
            try:
                said[rank] = connection.recv()
            except EOFError:
                process.join(GRACE)
                code = process.exitcode
                said[rank] = f"ended with exit code {code}" if code else ""
        if any(said.values()):
            until = min(until, time.monotonic() + GRACE)
    return said
