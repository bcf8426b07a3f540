"""Convolutions with batch norm (statistics of the batch) and SiLU, with respect to the input."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from benchmarks.case import Case, Limit, Problem, numpy, randn

CHANNELS, STRIDES, EPS = (3, 16, 32, 64), (1, 2, 2), 1e-5


def problem(size: int, batch: int, dtype: torch.dtype) -> Problem:
    x = randn(batch, 3, size, size, dtype=dtype)
    layers = []
    for i, (n, m, stride) in enumerate(zip(CHANNELS, CHANNELS[1:], STRIDES, strict=False)):
        w = randn(m, n, 3, 3, dtype=dtype, seed=10 + i) * (9 * n) ** -0.5
        g, b = (randn(m, dtype=dtype, seed=s + i) * 0.1 + o for s, o in ((20, 1.0), (30, 0.0)))
        layers.append((w, g, b, stride))

    def f(x: torch.Tensor) -> torch.Tensor:
        for w, g, b, stride in layers:
            x = functional.conv2d(x, w, stride=stride, padding=1)
            x = functional.silu(functional.batch_norm(x, None, None, g, b, training=True, eps=EPS))
        return x.mean((2, 3))

    def limit() -> Limit:
        steps, y = [], x
        for w, g, b, stride in layers:
            z = functional.conv2d(y, w, stride=stride, padding=1)
            h, mean, rstd = torch.native_batch_norm(z, g, b, None, None, True, 0.0, EPS)
            s = torch.sigmoid(h)
            # The slope of SiLU and the weight of the norm: one diagonal.
            slope = (s * (1 + h * (1 - s))) * g[:, None, None]
            steps.append((y, z, w, stride, mean, rstd, slope))
            y = h * s
        area, shape = y.shape[2] * y.shape[3], y.shape

        def inner(v: torch.Tensor, z: torch.Tensor, mean: Any, rstd: Any) -> torch.Tensor:
            # Batch norm without its weight is symmetric: its backward is its jvp.
            return torch.ops.aten.native_batch_norm_backward(
                v, z, None, None, None, mean, rstd, True, EPS, [True, False, False]
            )[0]

        def jvp(v: torch.Tensor) -> torch.Tensor:
            for _, z, w, stride, mean, rstd, slope in steps:
                v = inner(functional.conv2d(v, w, stride=stride, padding=1), z, mean, rstd)
                v.mul_(slope)
            return v.mean((2, 3))

        def vjp(u: torch.Tensor) -> torch.Tensor:
            u = (u / area)[:, :, None, None].expand(shape)
            for y, z, w, stride, mean, rstd, slope in reversed(steps):
                u = torch.ops.aten.convolution_backward(
                    inner(u * slope, z, mean, rstd),
                    y,
                    w,
                    None,
                    [stride] * 2,
                    [1, 1],
                    [1, 1],
                    False,
                    [0, 0],
                    1,
                    [True, False, False],
                )[0]
            return u

        return Limit(jvp, vjp)

    def jax() -> Any:
        import jax
        import jax.numpy as jnp

        given = [(numpy(w), numpy(g), numpy(b), s) for w, g, b, s in layers]

        def net(x: Any) -> Any:
            for w, g, b, stride in given:
                x = jax.lax.conv_general_dilated(x, w, (stride, stride), [(1, 1), (1, 1)])
                x = x - x.mean((0, 2, 3), keepdims=True)
                x = x / jnp.sqrt((x * x).mean((0, 2, 3), keepdims=True) + EPS)
                x = jax.nn.silu(x * g[:, None, None] + b[:, None, None])
            return x.mean((2, 3))

        return net, (numpy(x),)

    return Problem(f, (x,), limit, jax=jax)


CASES = tuple(
    Case(
        f"conv net with batch norm, {batch} x {n}²",
        size,
        lambda dtype, n=n, batch=batch: problem(n, batch, dtype),
        by_blas=size != "small",
        kind="convnet",
    )
    for n, batch, size in ((8, 2, "small"), (32, 8, "medium"), (64, 16, "large"))
)
