"""What is measured: functions at points, small enough for a laptop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclasses.dataclass(frozen=True)
class Case:
    """A function, its point, and what of it can be done by hand.

    Attributes
    ----------
    name
        For the table.
    make
        Returns `(f, primals)` for a dtype.
    by_hand
        Returns the least linear work, `v -> J·v` with residuals precomputed, or None.
    opaque
        Whether f leaves PyTorch, so that most peers cannot take part.
    """

    name: str
    make: Callable[[torch.dtype], tuple[Callable[..., Any], tuple[torch.Tensor, ...]]]
    by_hand: Callable[..., Callable[..., Any]] | None = None
    opaque: bool = False


def _seeded(build: Callable[[], Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()


def _frozen(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    return module.to(dtype).requires_grad_(requires_grad=False)


def _randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)


def chain(n: int) -> Case:
    """600 pointwise operations; the offset keeps the Jacobian of order one."""

    def f(x: torch.Tensor) -> torch.Tensor:
        for _ in range(200):
            x = torch.sin(x) * 1.1 - 0.028
        return x

    def by_hand(x: torch.Tensor) -> Callable[..., Any]:
        diagonal = torch.ones_like(x)
        for _ in range(200):
            diagonal = diagonal * torch.cos(x) * 1.1
            x = torch.sin(x) * 1.1 - 0.028
        return lambda v: diagonal * v

    return Case(f"pointwise chain, n = {n}", lambda d: (f, (_randn(n, dtype=d),)), by_hand)


def mlp(width: int, batch: int) -> Case:
    """Six linear layers with tanh, with respect to the input."""

    def make(dtype: torch.dtype) -> Any:
        layers = [m for _ in range(6) for m in (nn.Linear(width, width), nn.Tanh())]
        net = _seeded(lambda: _frozen(nn.Sequential(*_fresh(layers)), dtype))
        return net, (_randn(batch, width, dtype=dtype),)

    def by_hand(x: torch.Tensor) -> Callable[..., Any]:
        net, _ = make(x.dtype)
        steps = []
        for layer in net:
            if isinstance(layer, nn.Linear):
                weight = layer.weight.T
            else:
                steps.append((weight, 1 - torch.tanh(x) ** 2))
            x = layer(x)

        def apply(v: torch.Tensor) -> torch.Tensor:
            for weight, slope in steps:
                v = (v @ weight) * slope
            return v

        return apply

    return Case(f"MLP 6 x {width}, batch {batch}", make, by_hand)


def _fresh(layers: list[nn.Module]) -> list[nn.Module]:
    return [
        nn.Linear(m.in_features, m.out_features) if isinstance(m, nn.Linear) else nn.Tanh()
        for m in layers
    ]


def transformer(width: int, length: int) -> Case:
    """One encoder layer with math attention, with respect to the input."""

    def make(dtype: torch.dtype) -> Any:
        layer = _seeded(
            lambda: _frozen(
                nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True),
                dtype,
            )
        )

        def f(x: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(SDPBackend.MATH):
                return layer(x)

        return f, (_randn(8, length, width, dtype=dtype),)

    return Case(f"transformer layer, width {width}, length {length}", make)


def burgers(n: int, steps: int) -> Case:
    """Explicit time stepping of the Burgers equation."""

    def f(u: torch.Tensor) -> torch.Tensor:
        for _ in range(steps):
            u = u - 0.1 * u * (u - u.roll(1)) + 0.05 * (u.roll(1) - 2 * u + u.roll(-1))
        return u

    return Case(
        f"Burgers, {steps} steps, n = {n}", lambda d: (f, (_randn(n, dtype=d).abs() * 0.3,))
    )


class _Fixpoint(torch.autograd.Function):
    """Solve y = cos(y)/2 + x by 200 NumPy iterations; its derivatives are one division."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        given = x.numpy(force=True)
        y = given.copy()
        for _ in range(200):
            y = np.cos(y) / 2 + given
        ctx.slope = 1 / (1 + np.sin(y) / 2)
        return torch.from_numpy(y)

    @staticmethod
    def backward(ctx: Any, u: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(ctx.slope * u.numpy(force=True))

    @staticmethod
    def jvp(ctx: Any, v: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(ctx.slope * v.numpy(force=True))


def fixpoint(n: int) -> Case:
    """An expensive opaque Function: hundreds of iterations forward, one division to apply."""

    def by_hand(x: torch.Tensor) -> Callable[..., Any]:
        y = x.clone()
        for _ in range(200):
            y = torch.cos(y) / 2 + x
        slope = 1 / (1 + torch.sin(y) / 2)
        return lambda v: slope * v

    make = lambda d: (_Fixpoint.apply, (_randn(n, dtype=d),))  # noqa: E731
    return Case(f"opaque NumPy fixpoint, n = {n}", make, by_hand, opaque=True)


CASES = (
    chain(10),
    chain(100_000),
    mlp(64, 16),
    mlp(512, 256),
    transformer(64, 16),
    transformer(128, 64),
    burgers(1000, 50),
    fixpoint(10_000),
)
