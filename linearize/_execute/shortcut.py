"""The shortest way to call a settled product of one tensor.

Where a product is one operation on a small tensor, all that is around it takes longer than the
product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from .._torch.modes import functions_overridden, functorch_active
from .binding import Binding
from .executor import Executor


class Closable(Protocol):
    """What can be closed."""

    closed: bool


def short_way(
    executor: Executor,
    binding: Binding,
    lifetime: Closable,
    *,
    in_tuple: bool,
    fine: Callable[[Sequence[Any]], bool] | None = None,
) -> Callable[[Any], Any] | None:
    """Return what runs a program of one argument and one result, and little else, or None.

    The function that is returned gives None where the call must be looked at more closely.

    Parameters
    ----------
    executor, binding
        What is run, and the numbers of the point; nothing better will take their place.
    lifetime
        Whether the point was closed.
    in_tuple
        Whether the result comes as a tuple of one.
    fine
        Tells of results whether they can be handed out; by default all can.
    """
    run, program = executor.function, executor.program
    if run is None or binding.ops or binding.makes_history:
        return None
    if len(program.inputs) != 1 or len(program.outputs) != 1 or program.outputs[0] is None:
        return None
    spec = program.inputs[0].spec
    shape, dtype, device = spec.shape, spec.dtype, spec.device
    watched = [(r.counter, r.version) for r in binding.watched() if r.version is not None]
    plain, strided = torch.Tensor, torch.strided

    def short(t: Any) -> Any:
        if (
            type(t) is not plain
            or t.dtype is not dtype
            or t.requires_grad
            or t.layout is not strided
            or t.is_nested
            or t.shape != shape
            or t.device != device
            or functorch_active()
            or functions_overridden()
            or lifetime.closed
        ):
            return None
        for kept, version in watched:
            if kept._version != version:
                return None
        result = run(binding, (t,), executor)
        if fine is not None and not fine(result):
            return None
        return tuple(result) if in_tuple else result[0]

    return short
