"""Products as differentiable functions of their arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class DifferentiableProduct(torch.autograd.Function):
    """A product as a function of its argument: its derivative is the other product."""

    generate_vmap_rule = True

    @staticmethod
    def forward(product: Any, *tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        return tuple(product._apply([None if t is None else t.detach() for t in tensors]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.product = inputs[0]
        ctx.given = [t is not None for t in inputs[1:]]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        results = ctx.product._transposed()._apply(grads)
        return (None, *(r if w else None for r, w in zip(results, ctx.given, strict=True)))

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: torch.Tensor | None) -> Any:
        return tuple(ctx.product._apply(tangents))


class DifferentiableStack(torch.autograd.Function):
    """A batched product as a function of its arguments."""

    @staticmethod
    def forward(
        ctx: Any, product: Any, chunk_size: int | None, *tensors: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        ctx.product, ctx.chunk_size = product, chunk_size
        ctx.given = [t is not None for t in tensors]
        ctx.set_materialize_grads(False)
        detached = [None if t is None else t.detach() for t in tensors]
        return tuple(product._batched(detached, chunk_size))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        results = ctx.product._transposed()._batched(grads, ctx.chunk_size)
        return (None, None, *(r if w else None for r, w in zip(results, ctx.given, strict=True)))


def wants_history(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether one of some tensors requires grad."""
    for t in tensors:  # noqa: SIM110 (quicker than any(), and this runs at every call)
        if t is not None and t.requires_grad:
            return True
    return False
