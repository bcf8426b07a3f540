"""Linear layers with tanh, with respect to the input and with respect to the parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from benchmarks.case import Case, Limit, Problem, Tensors, numpy, randn


def parameters(width: int, depth: int, dtype: torch.dtype) -> Tensors:
    """Return weights and biases in turn."""
    found = []
    for i in range(depth):
        found.append(randn(width, width, dtype=dtype, seed=10 + i) * width**-0.5)
        found.append(randn(width, dtype=dtype, seed=30 + i) * 0.1)
    return tuple(found)


def net(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
    """Return the last layer's tanh."""
    for w, b in zip(parameters[::2], parameters[1::2], strict=True):
        x = torch.tanh(functional.linear(x, w, b))
    return x


def _jax_net(x: Any, *parameters: Any) -> Any:
    import jax.numpy as jnp

    for w, b in zip(parameters[::2], parameters[1::2], strict=True):
        x = jnp.tanh(x @ w.T + b)
    return x


def wrt_input(width: int, batch: int, dtype: torch.dtype) -> Problem:
    x, theta = randn(batch, width, dtype=dtype), parameters(width, 6, dtype)

    def limit() -> Limit:
        layers, y = [], x
        for w, b in zip(theta[::2], theta[1::2], strict=True):
            y = torch.tanh(functional.linear(y, w, b))
            layers.append((w, w.T, 1 - y**2))

        def jvp(v: torch.Tensor) -> torch.Tensor:
            for _, turned, slope in layers:
                v = torch.mm(v, turned).mul_(slope)
            return v

        def vjp(u: torch.Tensor) -> torch.Tensor:
            for w, _, slope in reversed(layers):
                u = torch.mm(u * slope, w)
            return u

        return Limit(jvp, vjp)

    def jax() -> Any:
        weights = [numpy(t) for t in theta]
        return lambda x: _jax_net(x, *weights), (numpy(x),)

    return Problem(lambda x: net(x, *theta), (x,), limit, jax=jax)


def parameter_limit(x: torch.Tensor, theta: Tensors) -> Limit:
    """Return the products with respect to the parameters."""
    layers, y = [], x
    for w, b in zip(theta[::2], theta[1::2], strict=True):
        z = torch.tanh(functional.linear(y, w, b))
        layers.append((y, w, w.T, 1 - z**2))
        y = z

    def jvp(*v: torch.Tensor) -> torch.Tensor:
        d: Any = None
        for (y, _, turned, slope), dw, db in zip(layers, v[::2], v[1::2], strict=True):
            own = torch.addmm(db, y, dw.T)
            d = (own if d is None else own.addmm_(d, turned)).mul_(slope)
        return d

    def vjp(u: torch.Tensor) -> Tensors:
        found: list[torch.Tensor] = []
        for y, w, _, slope in reversed(layers):
            u = u * slope
            found[:0] = [u.T @ y, u.sum(0)]
            if y is not x:
                u = u @ w
        return tuple(found)

    return Limit(jvp, vjp)


def wrt_parameters(width: int, batch: int, dtype: torch.dtype) -> Problem:
    x, theta = randn(batch, width, dtype=dtype), parameters(width, 6, dtype)

    def jax() -> Any:
        given = numpy(x)
        return lambda *theta: _jax_net(given, *theta), [numpy(t) for t in theta]

    return Problem(
        lambda *theta: net(x, *theta), theta, lambda: parameter_limit(x, theta), jax=jax
    )


SIZES = ((64, 16, "small"), (256, 128, "medium"), (512, 256, "large"))
CASES = tuple(
    Case(
        f"MLP 6 x {width}, batch {batch}, w.r.t. {what}",
        size,
        lambda dtype, make=make, width=width, batch=batch: make(width, batch, dtype),
        by_blas=size != "small",
        kind="mlp",
    )
    for width, batch, size in SIZES
    for what, make in (("input", wrt_input), ("parameters", wrt_parameters))
)
