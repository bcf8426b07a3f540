"""Bratu's problem: the five-point Laplacian of u plus λ exp(u) on a square, zero at its edge."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from benchmarks.case import Problem, Tensors, numpy, randn

LAMBDA = 5.0


def problem(n: int, dtype: torch.dtype) -> Problem:
    """Return the residual on n x n inner points."""
    scale = LAMBDA / (n + 1) ** 2
    u0 = randn(n, n, dtype=dtype).abs() * 0.1

    def f(u: torch.Tensor) -> torch.Tensor:
        p = functional.pad(u, (1, 1, 1, 1))
        sides = p[:-2, 1:-1] + p[2:, 1:-1] + p[1:-1, :-2] + p[1:-1, 2:]
        return sides - 4 * u + scale * torch.exp(u)

    def jax() -> Any:
        import jax.numpy as jnp

        def g(u: Any) -> Any:
            p = jnp.pad(u, 1)
            sides = p[:-2, 1:-1] + p[2:, 1:-1] + p[1:-1, :-2] + p[1:-1, 2:]
            return sides - 4 * u + scale * jnp.exp(u)

        return g, (numpy(u0),)

    def limit() -> Any:
        raise NotImplementedError("no limit by hand")

    primals: Tensors = (u0,)
    return Problem(f, primals, limit, jax=jax)
