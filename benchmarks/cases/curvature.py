"""Hessian- and Gauss-Newton-vector products of a regression loss of an MLP."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from benchmarks.case import Case, Limit, Problem, Tensors, numpy, randn
from benchmarks.cases import mlp

DEPTH = 6


def _loss(y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return 0.5 * ((y - target) ** 2).sum() / len(target)


def hessian(width: int, batch: int, dtype: torch.dtype) -> Problem:
    """Return the gradient as the function: its J·v is the Hessian times v."""
    x, target = randn(batch, width, dtype=dtype), randn(batch, width, dtype=dtype, seed=3)
    theta = mlp.parameters(width, DEPTH, dtype)

    def loss(*theta: torch.Tensor) -> torch.Tensor:
        return _loss(mlp.net(x, *theta), target)

    def gradient(*theta: torch.Tensor) -> Tensors:
        return torch.autograd.grad(loss(*theta), theta, create_graph=True)

    functional_gradient = torch.func.grad(loss, argnums=tuple(range(len(theta))))

    def limit() -> Limit:
        product = hessian_by_hand(x, target, theta)
        return Limit(product, product)

    def jax() -> Any:
        import jax

        given, wanted = numpy(x), numpy(target)

        def loss(*theta: Any) -> Any:
            return 0.5 * ((mlp._jax_net(given, *theta) - wanted) ** 2).sum() / batch

        return jax.grad(loss, tuple(range(len(theta)))), [numpy(t) for t in theta]

    return Problem(gradient, theta, limit, jax=jax, functional=functional_gradient)


def hessian_by_hand(x: torch.Tensor, target: torch.Tensor, theta: Tensors) -> Any:
    """Return v -> H v: the linearized forward pass, then the linearized backward pass."""
    pairs = list(zip(theta[::2], theta[1::2], strict=True))
    below, above = [x], []
    for w, b in pairs:
        above.append(torch.tanh(functional.linear(below[-1], w, b)))
        below.append(above[-1])
    slopes = [1 - a**2 for a in above]
    pulled = (above[-1] - target) / len(x)
    deltas, bends = [], []
    for (w, _), a, slope in reversed(list(zip(pairs, above, slopes, strict=True))):
        bends.append(pulled * slope * -2 * a)  # the second derivative of tanh, pulled back
        deltas.append(pulled * slope)
        pulled = deltas[-1] @ w
    deltas, bends = deltas[::-1], bends[::-1]
    scale = 1 / len(x)

    def product(*v: torch.Tensor) -> Tensors:
        d: Any = None
        before, raw = [], []
        for i, (w, _) in enumerate(pairs):
            own = torch.addmm(v[2 * i + 1], below[i], v[2 * i].T)
            own = own if d is None else own.addmm_(d, w.T)
            before.append(d)
            raw.append(own)
            d = own * slopes[i]
        up = d.mul_(scale)
        found: list[torch.Tensor] = []
        for i in reversed(range(len(pairs))):
            delta = (up * slopes[i]).addcmul_(raw[i], bends[i])
            grad = delta.T @ below[i]
            if before[i] is not None:
                grad.addmm_(deltas[i].T, before[i])
                up = torch.addmm(delta @ pairs[i][0], deltas[i], v[2 * i])
            found[:0] = [grad, delta.sum(0)]
        return tuple(found)

    return product


def gauss_newton(width: int, batch: int, dtype: torch.dtype) -> Problem:
    """Return the network, with the loss's Hessian in the middle of the product."""
    inner = mlp.wrt_parameters(width, batch, dtype)
    return Problem(
        inner.f, inner.primals, inner.limit, jax=inner.jax, middle=lambda d: d * (1 / batch)
    )


def case(title: str, make: Any, width: int, batch: int, size: str) -> Case:
    return Case(
        f"{title}, MLP 6 x {width}, batch {batch}",
        size,
        lambda dtype: make(width, batch, dtype),
        by_blas=size != "small",
        kind="curvature",
    )


CASES = tuple(
    case(title, make, width, batch, size)
    for title, make in (("Hessian", hessian), ("Gauss-Newton", gauss_newton))
    for width, batch, size in ((64, 16, "small"), (256, 128, "medium"), (512, 256, "large"))
)
