"""An operation mapped over stacks by `torch.vmap`, or called for each entry."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .._execute.mapped import Slot, apply_to, call_again, entries, stack_results
from .._programs.aten import schema_of
from .._programs.values import Value, Var
from .._spaces.nested import map_leaves
from .._torch.names import OpOverload

#: From how many numbers in one entry on a kernel is called for each entry.
LARGE = 1 << 13


class Mapped:
    """An operation mapped over the first dimension of its variables."""

    def __init__(self, op: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self.op = op
        self.dims: list[int | None] = []
        given: list[Any] = []

        def place(x: Any) -> Any:
            if not isinstance(x, Value):
                return x
            given.append(x)
            self.dims.append(0 if isinstance(x, Var) else None)
            return Slot(len(given) - 1)

        self.template = map_leaves(place, (list(args), kwargs))
        self.given = tuple(given)

    def __repr__(self) -> str:
        return f"each {self.op}"

    def __call__(self, *given: Any) -> tuple[Any, ...]:
        """Apply it; returns all results."""
        if self.by_hand(given):
            return self.looped(given)
        there: list[bool] = []
        again = functools.partial(call_again, self.op)

        def one(*tensors: Any) -> tuple[Any, ...]:
            out = apply_to(again, self.template, tensors)
            results = out if isinstance(out, (tuple, list)) else (out,)
            there[:] = [t is not None for t in results]
            return tuple(t for t in results if t is not None)

        found = iter(torch.vmap(one, tuple(self.dims))(*given))
        return tuple(next(found) if here else None for here in there)

    def by_hand(self, given: Sequence[Any]) -> bool:
        """Whether entries are so large that a kernel for each beats simpler operations on all."""
        schema = schema_of(self.op) if isinstance(self.op, OpOverload) else None
        if schema is None or schema.pointwise or not schema.name.endswith("_backward"):
            return False
        stacks = (t for t, d in zip(given, self.dims, strict=True) if d == 0)
        return any(t[0].numel() >= LARGE for t in stacks)

    def looped(self, given: Sequence[Any]) -> tuple[Any, ...]:
        count = next(len(t) for t, d in zip(given, self.dims, strict=True) if d == 0)
        outs = [apply_to(self.op, self.template, row) for row in entries(given, self.dims, count)]
        results = [out if isinstance(out, (tuple, list)) else (out,) for out in outs]
        return tuple([stack_results(column) for column in zip(*results, strict=True)])
