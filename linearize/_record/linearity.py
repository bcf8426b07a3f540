"""Whether operations are linear in their variable arguments jointly: only those are recorded.

For most operations of PyTorch's backward formulas that is known here by name; for any other it
is tested on numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .._programs.aten import (
    BILINEAR,
    GRADIENT_FIRST,
    JOINTLY_LINEAR,
    LINEAR_AT,
    LINEAR_FIRST,
    LINEAR_FIRST_KINDS,
    PLACING,
    schema_of,
)
from .._spaces.compare import close, close_at, magnitudes
from .._spaces.nested import leaves, map_leaves
from .._torch.names import OpOverload


def known_linear(op: OpOverload, variable: Sequence[bool]) -> bool:
    """Whether an operation is known to be linear in its variable arguments.

    `variable` says for each positional argument whether it is or contains a variable.
    """
    if op.namespace != "aten":
        return False
    name = schema_of(op).name
    count = sum(variable)
    first_only = count == 1 and variable[0]
    if name in LINEAR_FIRST or name in GRADIENT_FIRST:
        return first_only
    if name in BILINEAR:
        return count == 1
    if name == "div":
        return first_only and op._overloadname in ("Tensor", "Scalar")
    # `add(g, constant)` is affine: only a constant that is zero makes it linear.
    return name in JOINTLY_LINEAR and count == len(variable) and op._overloadname != "Scalar"


def linear_by_meaning(
    op: OpOverload, variable: Sequence[bool], others_static: Callable[[], bool]
) -> bool:
    """Whether an operation that tested linear is so for all numbers in its other arguments.

    `others_static` tells whether the other floating point arguments are the same at every point.
    """
    if op.namespace != "aten":
        return False
    name = schema_of(op).name
    if name.endswith("_backward") and not name.endswith("_backward_backward"):
        # The derivative of something, applied to the gradient that comes first.
        first = op._schema.arguments[0].name
        return first.startswith("grad") and variable[0] and sum(variable) == 1
    if name in LINEAR_AT:
        return sum(variable) == 1 and any(variable[i] for i in LINEAR_AT[name])
    if name.startswith(LINEAR_FIRST_KINDS):
        return variable[0] and sum(variable) == 1
    return name in PLACING and others_static()


def tested_linear(
    op: Callable[..., Any], args: Any, kwargs: Any, is_variable: Callable[[Any], bool]
) -> list[bool] | None:
    """Test on random numbers whether an operation is linear in its variable arguments.

    At several magnitudes: what clips, rounds or saturates is linear at one. For each output that
    is a tensor the result has True, or False if it does not depend on the variables at all; it is
    None if one is neither.
    """

    def at(alpha: float, beta: float) -> list[torch.Tensor]:
        def combine(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            if not is_variable(x):
                return x.clone()
            # Any second direction will do, if it is the same at each call.
            count = max(x.numel(), 1)
            ramp = torch.arange(count, device=x.device, dtype=torch.float32).mul_(1.7).cos_()
            return alpha * x + beta * ramp[: x.numel()].reshape(x.shape).to(x.dtype)

        result = op(*map_leaves(combine, args), **map_leaves(combine, kwargs))
        return [t for t in leaves(result) if isinstance(t, torch.Tensor)]

    both, first, second, twice = at(1.0, 1.0), at(1.0, 0.0), at(0.0, 1.0), at(-2.0, 0.0)
    linear = []
    for b, x, y, t in zip(both, first, second, twice, strict=True):
        if not (x.is_floating_point() or x.is_complex()) or (
            bool(x[torch.isfinite(x)].any()) and close(b, x) and close(y, x) and close(t, x)
        ):
            linear.append(False)
        elif close(b, x + y) and close(t, -2 * x):
            linear.append(True)
        else:
            return None
    for factor in magnitudes(*(x.dtype for x in leaves((args, kwargs)) if is_variable(x))):
        for x, y, same in zip(first, at(factor, 0.0), linear, strict=True):
            number = x.is_floating_point() or x.is_complex()
            if number and not close_at(factor, y, factor * x if same else x):
                return None
    return linear
