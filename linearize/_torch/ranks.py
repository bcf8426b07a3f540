"""Process groups, and the Functions by which PyTorch communicates inside a graph."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..errors import DistributedError, MissingDerivativeError, UnsupportedError
from .graphs import library_name
from .modes import NOTHING, DispatchMode
from .sharded import own_function
from .watching import Installed, ThreadStack

_FUNCTIONAL = "torch.distributed._functional_collectives"
_FSDP = "torch.distributed.fsdp._fully_shard._fsdp_param_group"


def distributed() -> bool:
    """Whether there are process groups."""
    return dist.is_available() and dist.is_initialized()


def collective_kind(cls: Any) -> str:
    """Return which collective the context of a Function belongs to; empty if to none.

    Of the Functions of `torch.distributed` it is the name of the class, of the functional
    collectives that of the operator.
    """
    if str(cls.__module__).startswith("torch.distributed."):
        return "" if own_function(cls) else str(cls.__name__)
    name = library_name(cls) or ""
    for prefix in ("_c10d_functional_autograd_", "_c10d_functional_"):
        if name.startswith(prefix):
            return name.removeprefix(prefix).removesuffix("_default")
    return ""


def group_of(group: Any) -> Any:
    """Return a process group that is given as such, by its name, or as None for all ranks."""
    if group is None:
        return dist.group.WORLD
    if isinstance(group, str):
        return dist.distributed_c10d._resolve_process_group(group)  # type: ignore[attr-defined,arg-type]
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


def device_of(group: Any) -> torch.device:
    """Return where a group takes its tensors from."""
    if "gloo" in dist.get_backend(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def summed_over(group: Any, t: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over the ranks of a group."""
    t = t.clone()
    try:
        dist.all_reduce(t, group=group)
    except RuntimeError as error:
        raise DistributedError(
            f"an inner product: a rank cannot be reached; it may have died, or raised an error "
            f"elsewhere ({error})"
        ) from error
    return t


def agreed_number(number: int, group: Any) -> int:
    """Return the number that the first rank of a group has."""
    t = torch.tensor(number, device=device_of(group))
    dist.broadcast(t, members(group)[0], group=group)
    return int(t)


class _Alone(DispatchMode):
    """Refuses to communicate."""

    def __init__(self, message: str) -> None:
        super().__init__()
        self._message = message

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace.lstrip("_").startswith("c10d"):
            raise MissingDerivativeError(self._message)
        return func(*args, **(kwargs or {}))


def alone(message: str) -> contextlib.AbstractContextManager[Any]:
    """Have what communicates inside raise a `MissingDerivativeError` in its place."""
    return _Alone(message) if distributed() else NOTHING


_failed = threading.local()


@contextlib.contextmanager
def failing(error: Exception) -> Iterator[None]:
    """Have the first product inside fail on all ranks, since something has failed here."""
    _failed.error = error
    try:
        yield
    finally:
        _failed.error = None


def fail_if_told() -> None:
    """Raise what has failed before a product, where other ranks learn of it."""
    error: Exception | None = getattr(_failed, "error", None)
    if error is not None:
        _failed.error = None
        raise error


def store() -> Any:
    """Return what all ranks can write to and read from, without communicating."""
    return dist.distributed_c10d._get_default_store()


#: What process groups do to tensors in place, so that autograd does not learn of it.
_UNSEEN = (
    "allreduce",
    "allreduce_coalesced",
    "broadcast",
    "allgather",
    "_allgather_base",
    "all_gather_single",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "reduce",
    "reduce_scatter",
    "_reduce_scatter_base",
    "reduce_scatter_single",
    "alltoall",
    "alltoall_base",
    "all_to_all_single",
    "gather",
    "scatter",
    "send",
    "recv",
)


class _Watch:
    """Has collectives behave, in this thread, as a graph can tell of them.

    Functional ones wait for their results, where otherwise they return tensors of a class of
    their own, which wait when they are first used and whose memory cannot be looked at. Those
    that write in place refuse what requires grad, as autograd would not learn of it.
    """

    def __enter__(self) -> None:
        _IN_PLACE.__enter__()
        _WATCHES.entered.append(self)

    def __exit__(self, *exc: object) -> None:
        _WATCHES.entered.pop()
        _IN_PLACE.__exit__()


_WATCHES = ThreadStack()
#: What is replaced while somebody watches: where it stands, its name, and what stands there else.
_THEIRS: list[tuple[Any, str, Any]] = []


def _replace() -> None:
    module: Any = importlib.import_module(_FUNCTIONAL)
    group = dist.ProcessGroup
    ours = {(module, "_maybe_wrap_tensor"): _waited(module._maybe_wrap_tensor)}
    ours |= {(group, name): _refusing(name) for name in _UNSEEN if name in vars(group)}
    sharding = getattr(sys.modules.get(_FSDP), "FSDPParamGroup", None)
    if sharding is not None:
        ours[sharding, "pre_forward"] = _not_gathering(sharding.pre_forward)
    for (where, name), own in ours.items():
        _THEIRS.append((where, name, vars(where)[name]))
        setattr(where, name, own)


def _restore() -> None:
    while _THEIRS:
        setattr(*_THEIRS.pop())


_IN_PLACE = Installed(_replace, _restore)


def _waited(wrap: Callable[..., Any]) -> Callable[..., Any]:
    def called(t: torch.Tensor) -> Any:
        if not _WATCHES.entered:
            return wrap(t)
        if t.requires_grad and not collective_kind(getattr(t.grad_fn, "_forward_cls", object)):
            raise UnsupportedError(
                "a functional collective for which PyTorch has no derivative (broadcast, say) was "
                "called inside f with a tensor that requires grad; use "
                "torch.distributed.nn.functional"
            )
        with torch.no_grad():
            torch.ops._c10d_functional.wait_tensor(t.detach())
        return t

    return called


def _refusing(name: str) -> Any:
    method = getattr(dist.ProcessGroup, name)

    @functools.wraps(method)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _WATCHES.entered and torch.is_grad_enabled() and any(map(_requires_grad, args)):
            raise UnsupportedError(
                f"torch.distributed ({name}) was called inside f with a tensor that depends on a "
                "primal, or on something else that requires grad: autograd does not see it, and "
                "the products would be wrong; use torch.distributed.nn.functional, or pass "
                "t.detach() if nothing depends on it"
            )
        return method(self, *args, **kwargs)

    return called


def _not_gathering(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return what takes the place of what gathers the parameters of a module for its forward."""

    @functools.wraps(method)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _WATCHES.entered:
            raise UnsupportedError(
                "f calls a module that fully_shard was applied to: it computes with parameters "
                "that are gathered out of sight of autograd and freed afterwards, so that there "
                "is no derivative by what is sharded, and nothing to run products with; instead, "
                "make its parameters DTensors (torch.distributed.tensor.distribute_tensor, "
                "Shard(0)), call the module with them by torch.func.functional_call, and let "
                "operations on DTensors gather"
            )
        return method(self, *args, **kwargs)

    return called


def _requires_grad(x: Any) -> bool:
    if isinstance(x, (list, tuple)):
        return any(map(_requires_grad, x))
    return isinstance(x, torch.Tensor) and x.requires_grad


def collectives_seen() -> contextlib.AbstractContextManager[None]:
    """Run f such that its graph tells of the collectives in it."""
    return _Watch() if distributed() else NOTHING
