"""The solution of a linear system as a function of its diagonal: an implicit function."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.case import Case, Limit, Problem, numpy, randn


def problem(n: int, dtype: torch.dtype) -> Problem:
    base = randn(n, n, dtype=dtype) * (0.3 * n**-0.5) + 2 * torch.eye(n, dtype=dtype)
    b, x = randn(n, dtype=dtype, seed=3), randn(n, dtype=dtype, seed=4) * 0.1

    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve(base + torch.diag(x), b)

    def limit() -> Limit:
        lu, pivots = torch.linalg.lu_factor(base + torch.diag(x))
        negative = -torch.linalg.lu_solve(lu, pivots, b[:, None])[:, 0]

        def jvp(v: torch.Tensor) -> torch.Tensor:
            return torch.linalg.lu_solve(lu, pivots, (negative * v)[:, None])[:, 0]

        def vjp(u: torch.Tensor) -> torch.Tensor:
            return torch.linalg.lu_solve(lu, pivots, u[:, None], adjoint=True)[:, 0] * negative

        return Limit(jvp, vjp)

    def dense() -> Limit:
        y = f(x)
        turned = (-torch.linalg.inv(base + torch.diag(x)) * y).T.contiguous()
        matrix = turned.T.contiguous()
        return Limit(lambda v: torch.mv(matrix, v), lambda u: torch.mv(turned, u))

    def jax() -> Any:
        import jax.numpy as jnp

        matrix, right = numpy(base), numpy(b)
        return lambda x: jnp.linalg.solve(matrix + jnp.diag(x), right), (numpy(x),)

    return Problem(f, (x,), limit, dense, jax)


CASES = tuple(
    Case(f"linalg.solve, n = {n}", size, lambda dtype, n=n: problem(n, dtype), kind="implicit")
    for n, size in ((20, "small"), (200, "medium"), (500, "large"))
)
