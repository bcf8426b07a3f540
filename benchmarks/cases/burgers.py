"""Explicit time stepping of the Burgers equation: a stencil, many times over."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.case import Case, Limit, Problem, numpy, randn

CACHED = 10_000  # up to here one operation on three rows beats three operations


def problem(n: int, steps: int, dtype: torch.dtype) -> Problem:
    u0 = randn(n, dtype=dtype).abs() * 0.3

    def f(u: torch.Tensor) -> torch.Tensor:
        for _ in range(steps):
            u = u - 0.1 * u * (u - u.roll(1)) + 0.05 * (u.roll(1) - 2 * u + u.roll(-1))
        return u

    def bands() -> list[torch.Tensor]:
        """Return, step by step, the coefficients of the left, the middle and the right."""
        found, u = [], u0
        for _ in range(steps):
            left, right = u.roll(1), u.roll(-1)
            middle = 1 - 0.1 * (2 * u - left) - 0.1
            found.append(torch.stack([0.1 * u + 0.05, middle, torch.full_like(u, 0.05)]))
            u = u - 0.1 * u * (u - left) + 0.05 * (left - 2 * u + right)
        return found

    def limit() -> Limit:
        forward = bands()
        # The transpose of a band is a band: its coefficients sit at the neighbours.
        backward = [torch.stack([b[2].roll(1), b[1], b[0].roll(-1)]) for b in reversed(forward)]
        return Limit(_stepper(forward), _stepper(backward))

    def dense() -> Limit:
        apply = limit().jvp
        turned = torch.stack([apply(e) for e in torch.eye(n, dtype=dtype)])
        matrix = turned.T.contiguous()
        return Limit(lambda v: torch.mv(matrix, v), lambda u: torch.mv(turned, u))

    def jax() -> Any:
        import jax.numpy as jnp
        from jax import lax

        def step(u: Any, _: Any) -> Any:
            left, right = jnp.roll(u, 1), jnp.roll(u, -1)
            return u - 0.1 * u * (u - left) + 0.05 * (left - 2 * u + right), None

        return lambda u: lax.scan(step, u, length=steps)[0], (numpy(u0),)

    return Problem(f, (u0,), limit, dense if n <= 1000 else None, jax)


def _stepper(bands: list[torch.Tensor]) -> Any:
    """Apply one band after the other, in three or four operations each.

    Neighbours are read through windows of a buffer. It is padded at its end only, so that what
    is kept moves by one entry at each step; the coefficients are moved beforehand.
    """
    n, steps = bands[0].shape[1], len(bands)
    moved = [b.roll(-k - 1, 1) for k, b in enumerate(bands)]
    rows = [tuple(b) for b in moved]

    def apply(v: torch.Tensor) -> torch.Tensor:
        padded = v.new_empty(n + 2)
        inner, start, end = padded[:n], padded[:2], padded[n:]
        inner.copy_(v)
        if n <= CACHED:
            windows = padded.as_strided((3, n), (1, 1))
            for band in moved:
                end.copy_(start)
                torch.sum(band * windows, 0, out=inner)
            return inner.roll(steps)
        middle, right = padded[1:-1], padded[2:]
        for b0, b1, b2 in rows:
            end.copy_(start)
            inner.copy_(torch.mul(b0, inner).addcmul_(b1, middle).addcmul_(b2, right))
        return inner.roll(steps)

    return apply


SIZES = ((100, 20, "small"), (1000, 50, "medium"), (100_000, 20, "large"))
CASES = tuple(
    Case(
        f"Burgers, {steps} steps, n = {n:,}",
        size,
        lambda dtype, n=n, steps=steps: problem(n, steps, dtype),
        kind="stencil",
    )
    for n, steps, size in SIZES
)
