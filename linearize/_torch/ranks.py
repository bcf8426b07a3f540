"""Process groups, and the Functions by which PyTorch communicates inside a graph."""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

#: Where the Functions are defined whose contexts are the nodes of collectives.
_FUNCTIONS = "torch.distributed.nn.functional"
_FUNCTIONAL = "torch.distributed._functional_collectives"
_GENERATED = "GeneratedBackwardFor_"


def distributed() -> bool:
    """Whether there are process groups."""
    return dist.is_available() and dist.is_initialized()


def collective_kind(cls: Any) -> str:
    """Return which collective the context of a Function belongs to; empty if to none.

    Of `torch.distributed.nn.functional` it is the name of the class, of the functional
    collectives that of the operator.
    """
    if cls.__module__ == _FUNCTIONS:
        return str(cls.__name__)
    name = str(cls.__name__)
    for library in ("_c10d_functional_autograd", "_c10d_functional"):
        prefix = f"{_GENERATED}{library}_"
        if name.startswith(prefix):
            return name.removeprefix(prefix).removesuffix("_default")
    return ""


def group_of(group: Any) -> Any:
    """Return a process group that is given as such, by its name, or as None for all ranks."""
    if group is None:
        return dist.group.WORLD
    if isinstance(group, str):
        return dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
    return group


def members(group: Any) -> tuple[int, ...]:
    """Return the ranks of a group."""
    return tuple(dist.get_process_group_ranks(group))


def timeout_of(group: Any) -> timedelta:
    """Return after which time a collective of a group gives up."""
    try:
        found: timedelta = group._get_backend(torch.device("cpu")).options._timeout
    except (RuntimeError, AttributeError):  # not a group of the CPU
        found = dist.distributed_c10d.default_pg_timeout
    return found


def companion(ranks: tuple[int, ...], timeout: timedelta) -> Any:
    """Make a group of some ranks for short messages; each of them calls this, nobody else."""
    return dist.new_group(
        list(ranks), timeout=timeout, backend="gloo", use_local_synchronization=True
    )


def store() -> Any:
    """Return what all ranks can write to and read from, without communicating."""
    return dist.distributed_c10d._get_default_store()


def order_of(node: Any) -> int:
    """Return a number that is higher for nodes that were made later, in one thread."""
    return int(node._sequence_nr())


class _Waiting:
    """Has functional collectives wait for their results while f runs, in this thread.

    Otherwise they return tensors of a class of their own, which wait when they are first used and
    whose memory cannot be looked at.
    """

    _lock = threading.Lock()
    _users = 0
    _local = threading.local()
    _given: Any = None

    @classmethod
    def begin(cls) -> None:
        module: Any = importlib.import_module(_FUNCTIONAL)
        with cls._lock:
            if cls._users == 0:
                cls._given = module._maybe_wrap_tensor
                module._maybe_wrap_tensor = _waited
            cls._users += 1
        cls._local.depth = getattr(cls._local, "depth", 0) + 1

    @classmethod
    def end(cls) -> None:
        cls._local.depth -= 1
        with cls._lock:
            cls._users -= 1
            if cls._users == 0:
                sys.modules[_FUNCTIONAL]._maybe_wrap_tensor = cls._given  # type: ignore[attr-defined]


def _waited(t: torch.Tensor) -> Any:
    if not getattr(_Waiting._local, "depth", 0):
        return _Waiting._given(t)
    with torch.no_grad():
        torch.ops._c10d_functional.wait_tensor(t.detach())
    return t


@contextlib.contextmanager
def collectives_waited_for() -> Iterator[None]:
    """Let functional collectives return plain tensors that are ready."""
    if not distributed():
        yield
        return
    _Waiting.begin()
    try:
        yield
    finally:
        _Waiting.end()
