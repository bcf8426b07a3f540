"""Pointwise operations only, 600 of them: the Jacobian is a diagonal."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.case import Case, Limit, Problem, numpy, randn

STEPS = 200


def f(x: torch.Tensor) -> torch.Tensor:
    """Return the chain; its offset keeps the Jacobian of order one, others let it underflow."""
    for _ in range(STEPS):
        x = torch.sin(x) * 1.1 - 0.028
    return x


def problem(n: int, dtype: torch.dtype) -> Problem:
    x = randn(n, dtype=dtype)

    def limit() -> Limit:
        diagonal, y = torch.ones_like(x), x
        for _ in range(STEPS):
            diagonal = diagonal * torch.cos(y) * 1.1
            y = torch.sin(y) * 1.1 - 0.028
        product = lambda v: diagonal * v  # noqa: E731
        return Limit(product, product)

    def jax() -> Any:
        import jax.numpy as jnp
        from jax import lax

        def g(y: Any) -> Any:
            return lax.scan(lambda y, _: (jnp.sin(y) * 1.1 - 0.028, None), y, length=STEPS)[0]

        return g, (numpy(x),)

    return Problem(f, (x,), limit, jax=jax)


def case(n: int, size: str) -> Case:
    return Case(f"pointwise chain, n = {n:,}", size, lambda dtype: problem(n, dtype), kind="chain")


CASES = (case(10, "small"), case(1000, "medium"), case(100_000, "large"))
