"""Custom Functions that leave PyTorch: hundreds of NumPy iterations, cheap derivatives."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmarks.case import Case, Limit, Problem, numpy, randn

STEPS = 200


class Fixpoint(torch.autograd.Function):
    """Solve y = cos(y)/2 + x entry by entry; a product is one multiplication."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        given = x.numpy(force=True)
        y = given.copy()
        for _ in range(STEPS):
            y = np.cos(y) / 2 + given
        ctx.slope = 1 / (1 + np.sin(y) / 2)
        return torch.from_numpy(y)

    @staticmethod
    def backward(ctx: Any, u: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(ctx.slope * u.numpy(force=True))

    @staticmethod
    def jvp(ctx: Any, v: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(ctx.slope * v.numpy(force=True))


class Network(torch.autograd.Function):
    """Solve y = tanh(W y)/2 + x; a product solves with the matrix I - diag(s) W."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        given, weight = x.numpy(force=True), w.numpy(force=True)
        y = given.copy()
        for _ in range(STEPS):
            y = np.tanh(weight @ y) / 2 + given
        slope = (1 - np.tanh(weight @ y) ** 2) / 2
        ctx.system = np.eye(len(y)) - slope[:, None] * weight
        return torch.from_numpy(y)

    @staticmethod
    def backward(ctx: Any, u: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.from_numpy(np.linalg.solve(ctx.system.T, u.numpy(force=True))), None

    @staticmethod
    def jvp(ctx: Any, v: torch.Tensor, _: None) -> torch.Tensor:
        return torch.from_numpy(np.linalg.solve(ctx.system, v.numpy(force=True)))


def fixpoint(n: int, dtype: torch.dtype) -> Problem:
    x = randn(n, dtype=dtype)

    def limit() -> Limit:
        given = numpy(x)
        y = given.copy()
        for _ in range(STEPS):
            y = np.cos(y) / 2 + given
        slope = 1 / (1 + np.sin(y) / 2)
        product = lambda v: torch.from_numpy(slope * v.numpy(force=True))  # noqa: E731
        return Limit(product, product)

    return Problem(Fixpoint.apply, (x,), limit)


def network(n: int, dtype: torch.dtype) -> Problem:
    x, w = randn(n, dtype=dtype), randn(n, n, dtype=dtype, seed=3) * n**-0.5

    def limit() -> Limit:
        given, weight = numpy(x), numpy(w)
        y = given.copy()
        for _ in range(STEPS):
            y = np.tanh(weight @ y) / 2 + given
        system = np.eye(n) - ((1 - np.tanh(weight @ y) ** 2) / 2)[:, None] * weight
        turned = system.T
        return Limit(
            lambda v: torch.from_numpy(np.linalg.solve(system, v.numpy(force=True))),
            lambda u: torch.from_numpy(np.linalg.solve(turned, u.numpy(force=True))),
        )

    return Problem(lambda x: Network.apply(x, w), (x,), limit)


class Swish(torch.autograd.Function):
    """x sigmoid(x), of the commonest kind: old style, only a backward, in PyTorch operations."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, u: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return u * (s * (1 + x * (1 - s)))


def inlined(dtype: torch.dtype) -> Problem:
    """Return a network whose activations are such Functions, by its input."""
    x, weights = randn(16, 64, dtype=dtype), randn(6, 64, 64, dtype=dtype, seed=3) / 8

    def net(x: torch.Tensor, activation: Any) -> torch.Tensor:
        for w in weights:
            x = activation(x @ w)
        return x

    def limit() -> Limit:
        raise NotImplementedError("no limit by hand")

    return Problem(
        lambda x: net(x, Swish.apply),
        (x,),
        limit,
        functional=lambda x: net(x, torch.nn.functional.silu),
    )


def case(name: str, size: str, make: Any) -> Case:
    return Case(name, size, make, dtype=torch.float64, opaque=True, kind="opaque")


CASES = (
    case("opaque NumPy fixpoint, n = 10", "small", lambda d: fixpoint(10, d)),
    case("opaque NumPy fixpoint, n = 10,000", "medium", lambda d: fixpoint(10_000, d)),
    case("opaque NumPy system, n = 100", "medium", lambda d: network(100, d)),
)
