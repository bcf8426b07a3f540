"""Jacobian-vector products that are registered for `torch.library` operators."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from .._torch.graphs import operator_of
from .._torch.names import OpOverload
from ..errors import StructureError

#: By operator: one that is defined anew under the same name is another one.
_REGISTERED: weakref.WeakKeyDictionary[OpOverload, Callable[..., Any]]
_REGISTERED = weakref.WeakKeyDictionary()


def register_jvp(op: Any, fn: Callable[..., Any]) -> Callable[..., Any]:
    """Give a `torch.library` custom operator its own Jacobian-vector product.

    Parameters
    ----------
    op
        A `torch.library.custom_op` (or an overload such as `torch.ops.mylib.myop.default`)
        whose backward was registered with `register_autograd`.
    fn
        `fn(ctx, *tangents)`, with the contract of `torch.autograd.Function.jvp`: `ctx` is the
        one that `setup_context` filled; one tangent per argument of the operator, zeros for
        tensors without one, None for arguments that are not tensors; returns the tangent of
        each output. May be opaque.

    Returns
    -------
    callable
        `fn`, so that this can be used through `functools.partial` as a decorator.

    Raises
    ------
    StructureError
        If `op` is not a custom operator.
    """
    overload = getattr(op, "_opoverload", op)
    if not isinstance(overload, OpOverload):
        overload = getattr(op, "default", None)
    if not isinstance(overload, OpOverload):
        raise StructureError(f"register_jvp: expected a torch.library custom op, got {op!r}")
    namespace = overload.namespace
    if namespace in ("aten", "prim", "prims"):
        raise StructureError(f"register_jvp: {op!r} is PyTorch's own, not a custom op")
    _REGISTERED[overload] = fn
    return fn


def registered_jvp(cls: Any) -> Callable[..., Any] | None:
    """Return the jvp registered for the operator that a Function was made for.

    Parameters
    ----------
    cls
        The Function.

    Returns
    -------
    callable or None
        None if there is none.
    """
    operator = operator_of(cls) if _REGISTERED else None
    return None if operator is None else _REGISTERED.get(operator)
