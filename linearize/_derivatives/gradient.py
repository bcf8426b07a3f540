"""The gradient of a scalar function, as a function that can be linearized."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .._capture.dependence import derivative, read_behind
from .._capture.graph import edge_of, other_leaves
from .._spaces.space import differentiable
from .._spaces.trees import tangent_leaves
from .._torch.names import pytree
from ..errors import StructureError
from .sight import Sight, seen


def gradient_and_value(f: Callable[..., Any]) -> Callable[..., tuple[Any, torch.Tensor]]:
    """Return a function that gives the gradient of f, structured like its one argument, and f.

    It runs f once, under autograd, and its backward with a graph of its own: linearized, its
    Jacobian is the Hessian. Leaves without tangents have the gradient None.
    """

    @derivative
    def gradient(x: Any) -> tuple[Any, torch.Tensor]:
        value, tree = value_and_gradient(f, (x,), x)
        return tree, value.detach()

    return gradient


def value_and_gradient(
    f: Callable[..., Any], args: tuple[Any, ...], by: Any
) -> tuple[torch.Tensor, Any]:
    """Return the one number that f gives, with its history, and its gradient by some arguments."""
    value, sight = seen(f, args)
    check_scalar(value)
    tree = gradient_by(value, by, sight)
    sight.warn_if_independent()
    return value, tree


def gradient_by(value: torch.Tensor, by: Any, sight: Sight) -> Any:
    """Return the gradient of one number, differentiable again, structured like what it is by.

    Zeros where it does not depend, None for leaves without tangents.
    """
    inputs = tangent_leaves(by)
    grads: Sequence[torch.Tensor | None] = [None] * len(inputs)
    if value.requires_grad:
        number = value.reshape(())
        grads = sight.gradients([number], inputs, [torch.ones_like(number)])
    if any(g is None for g in grads):
        _look_behind(value, inputs, grads)
    rest = iter(grads)

    def leaf(t: Any) -> Any:
        if not differentiable(t):
            return None
        g = next(rest)
        return torch.zeros_like(t) if g is None else g

    return pytree.tree_map(leaf, by)


def _look_behind(
    value: torch.Tensor, inputs: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None]
) -> None:
    """Raise or warn if a function lost its inputs; these are aliases of what it was given."""
    others = {_place(t): t for t in other_leaves([edge_of(value)], [])}
    for i, (x, g) in enumerate(zip(inputs, grads, strict=True)):
        behind = others.get(_place(x))
        if g is None and behind is not None and behind is not x:
            raise read_behind(f"primal leaf {i}", x)


def _place(t: torch.Tensor) -> tuple[object, ...]:
    """Return where the numbers of a tensor are."""
    return t.data_ptr(), t.shape, t.dtype, t.device


def check_scalar(value: Any) -> None:
    """Raise `StructureError` if a function returned something other than one real number."""
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.is_floating_point():
        what = (
            f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
            if isinstance(value, torch.Tensor)
            else type(value).__name__
        )
        raise StructureError(f"expected a function that returns one real number, got {what}")
