"""Tensors that are sharded over the ranks of a mesh: PyTorch's `DTensor`.

It is loaded by whoever makes one, and not by this package: it takes seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

_MODULE = "torch.distributed.tensor"
#: Where the Functions are that turn local tensors into DTensors, back, and into others.
_OWN = tuple(f"{_MODULE}.{name}" for name in ("_api", "_redistribute"))


def may_be_sharded() -> bool:
    """Whether anybody has loaded what DTensors are."""
    return _MODULE in sys.modules


def is_sharded(x: Any) -> bool:
    """Whether something is a DTensor."""
    module = sys.modules.get(_MODULE)
    return module is not None and isinstance(x, module.DTensor)


def has_sharded(types: Sequence[type]) -> bool:
    """Whether a DTensor's class is among those of an operation's arguments."""
    module = sys.modules.get(_MODULE)
    return module is not None and any(issubclass(t, module.DTensor) for t in types)


def is_fake(types: Sequence[type]) -> bool:
    """Whether an operation only asks for a shape, as DTensors do before they run it."""
    return any(t.__name__ == "FakeTensor" for t in types)


def local_of(t: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a DTensor, without history; any other tensor as it is."""
    if not is_sharded(t):
        return t
    part: Any = t._local_tensor  # type: ignore[attr-defined]
    waited: torch.Tensor = part.wait() if hasattr(part, "trigger_wait") else part
    return waited.detach() if waited.requires_grad else waited


def own_function(cls: Any) -> bool:
    """Whether a Function is one of those that make DTensors of others."""
    return str(cls.__module__) in _OWN


def lies(t: Any) -> Any:
    """Return how a DTensor lies on its mesh: mesh, placements, and the shape of the whole."""
    return t._spec


def lying(mesh: Any, placements: Sequence[Any], like: torch.Tensor, shape: Sequence[int]) -> Any:
    """Return how a DTensor of another shape, but of the dtype of `like`, lies row by row."""
    spec: Any = lies(like)
    strides, size = [], 1
    for n in reversed(shape):
        strides.append(size)
        size *= max(n, 1)
    meta = type(spec.tensor_meta)(torch.Size(shape), tuple(reversed(strides)), like.dtype)
    return type(spec)(mesh, tuple(placements), tensor_meta=meta)


def stacked(spec: Any, count: int) -> Any:
    """Return how several such DTensors lie, stacked along a new first dimension."""
    placements = [_shifted(p) for p in spec.placements]
    shape, strides, dtype = spec.tensor_meta
    size = strides[0] * max(shape[0], 1) if shape else 1
    meta = type(spec.tensor_meta)(torch.Size((count, *shape)), (size, *strides), dtype)
    return type(spec)(spec.mesh, tuple(placements), tensor_meta=meta)


def _shifted(placement: Any) -> Any:
    if not hasattr(placement, "dim"):
        return placement
    more = {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}
    return type(placement)(placement.dim + 1, **more)


def wrapped(local: torch.Tensor, spec: Any) -> torch.Tensor:
    """Return the DTensor that has `local` as this rank's part, with its history."""
    made: Any = sys.modules[_MODULE].DTensor
    meta = spec.tensor_meta
    if local.requires_grad and torch.is_grad_enabled():
        result: torch.Tensor = made.from_local(
            local,
            spec.mesh,
            spec.placements,
            run_check=False,
            shape=meta.shape,
            stride=meta.stride,
        )
        return result
    return made(local, spec, requires_grad=False)  # type: ignore[no-any-return]


def part_of(t: Any) -> torch.Tensor:
    """Return this rank's part of a DTensor, with its history."""
    if t.requires_grad and torch.is_grad_enabled():
        part: torch.Tensor = t.to_local()
        return part
    return local_of(t)


def placed(t: Any, spec: Any) -> Any:
    """Return a DTensor with the placements of `spec`, with its history."""
    if t.placements == spec.placements:
        return t
    return t.redistribute(spec.mesh, spec.placements)


def reduced(t: Any) -> Any:
    """Return a DTensor whose ranks hold what adds up to it as one that each has in full."""
    if not any(p.is_partial() for p in t.placements):
        return t
    whole = sys.modules[_MODULE].Replicate()
    return t.redistribute(t.device_mesh, [whole if p.is_partial() else p for p in t.placements])


def groups_of(mesh: Any) -> list[Any]:
    """Return the process groups of a mesh, one for each of its dimensions."""
    return [mesh.get_group(i) for i in range(mesh.ndim)]


def copies(mesh: Any, placements: Sequence[Any]) -> tuple[Any, ...]:
    """Return the groups all of whose ranks hold the same numbers."""
    return tuple(
        [
            mesh.get_group(i)
            for i, p in enumerate(placements)
            if p.is_replicate() and mesh.size(i) > 1
        ]
    )


def copies_taken(ctx: Any) -> tuple[Any, ...] | None:
    """Return over which groups `to_local` expects the same gradient; None for another Function."""
    if not hasattr(ctx, "dtensor_spec"):
        return None
    spec = ctx.dtensor_spec
    if ctx.grad_placements is not None:
        return copies(spec.mesh, ctx.grad_placements)
    whole = sys.modules[_MODULE].Replicate()
    return copies(spec.mesh, [whole if p.is_partial() else p for p in spec.placements])


def takes_parts(ctx: Any) -> bool:
    """Whether `to_local` gives what is to be added up, and takes one gradient for all ranks."""
    spec = getattr(ctx, "dtensor_spec", None)
    return (
        spec is not None
        and ctx.grad_placements is None
        and any(p.is_partial() for p in spec.placements)
    )


def copies_given(ctx: Any) -> tuple[Any, ...] | None:
    """Return over which groups `from_local` takes the same numbers; None for another Function."""
    if not hasattr(ctx, "forward_input_device_mesh"):
        return None
    # That of a part of a sum is the same on all ranks, and yet each has its own part.
    placements = getattr(ctx, "grad_placements", None) or ctx.forward_input_placements
    return copies(ctx.forward_input_device_mesh, placements)


def settings_of(ctx: Any) -> tuple[Any, ...]:
    """Return what the backward of a Function of DTensor's own depends on, but its argument."""
    return tuple(sorted(vars(ctx).items()))


def mesh_of(ctx: Any) -> Any:
    """Return the mesh that a Function of DTensor's own is about."""
    spec = getattr(ctx, "dtensor_spec", None) or getattr(ctx, "current_spec", None)
    return ctx.forward_input_device_mesh if spec is None else spec.mesh


def summed(t: torch.Tensor, group: Any) -> torch.Tensor:
    """Return the sum over a group, by an operation that dispatch modes see."""
    found = torch.ops._c10d_functional.all_reduce(t.contiguous(), "sum", group.group_name)
    return waited(found)


def exchanged_dims(t: torch.Tensor, gathered: int, cut: int, group: Any) -> torch.Tensor:
    """Return a tensor whole along one dimension, and this rank's part of it along another."""
    op = torch.ops._dtensor.shard_dim_alltoall
    return waited(op(t.contiguous(), gathered, cut, group.group_name))


def waited(t: torch.Tensor) -> torch.Tensor:
    """Return a tensor when it is there."""
    result: torch.Tensor = torch.ops._c10d_functional.wait_tensor(t)
    return result


#: The libraries of operations by which DTensors communicate.
COMMUNICATING = ("_c10d_functional", "_dtensor")
#: Those of them that only wait.
WAITING = ("wait_tensor", "_wrap_tensor_autograd")
