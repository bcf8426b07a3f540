"""The gradient of a scalar function, as a function that can be linearized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .._spaces.space import differentiable
from .._torch.names import pytree
from ..errors import StructureError


def gradient_and_value(f: Callable[..., Any]) -> Callable[..., tuple[Any, torch.Tensor]]:
    """Return a function that gives the gradient of f, structured like its one argument, and f.

    It runs f once, under autograd, and its backward with a graph of its own: linearized, its
    Jacobian is the Hessian. Leaves without tangents have the gradient None.

    Parameters
    ----------
    f
        A function of one pytree that returns one real number as a tensor.
    """

    def gradient(x: Any) -> tuple[Any, torch.Tensor]:
        value = f(x)
        check_scalar(value)
        leaves, spec = pytree.tree_flatten(x)
        grads = iter(gradients(value, [t for t in leaves if differentiable(t)]))
        tree = pytree.tree_unflatten(
            [next(grads) if differentiable(t) else None for t in leaves], spec
        )
        return tree, value.detach()

    return gradient


def gradients(value: torch.Tensor, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return the gradient of one number, differentiable again; zeros where it does not depend."""
    if not value.requires_grad:
        return tuple(torch.zeros_like(t) for t in inputs)
    return torch.autograd.grad(
        value.reshape(()), inputs, create_graph=True, allow_unused=True, materialize_grads=True
    )


def check_scalar(value: Any) -> None:
    """Raise `StructureError` if a function returned something other than one real number."""
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.is_floating_point():
        what = (
            f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
            if isinstance(value, torch.Tensor)
            else type(value).__name__
        )
        raise StructureError(f"expected a function that returns one real number, got {what}")
