"""AlexNet at evaluation: 61 million parameters, where keeping too much runs out of memory."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from benchmarks.case import Case, Limit, Problem, Tensors, numpy, randn

# Channels in and out, size of the kernel, stride, padding, whether pooling follows.
CONVOLUTIONS = (
    (3, 64, 11, 4, 2, True),
    (64, 192, 5, 1, 2, True),
    (192, 384, 3, 1, 1, False),
    (384, 256, 3, 1, 1, False),
    (256, 256, 3, 1, 1, True),
)
LINEAR = ((256 * 36, 4096), (4096, 4096), (4096, 1000))


def parameters(dtype: torch.dtype) -> Tensors:
    """Return weights and biases in turn, scaled so that activations stay of order one."""
    shapes = [(m, n, k, k) for n, m, k, *_ in CONVOLUTIONS] + [(m, n) for n, m in LINEAR]
    found = []
    for i, shape in enumerate(shapes):
        generator = torch.Generator().manual_seed(100 + i)
        # Made in float32 for every dtype: the numbers are the same, at half the memory.
        w = torch.randn(shape, generator=generator)
        found.append(w.mul_((2 / w[0].numel()) ** 0.5).to(dtype))
        found.append(randn(shape[0], dtype=dtype, seed=200 + i) * 0.1)
    return tuple(found)


def net(x: torch.Tensor, *theta: torch.Tensor) -> torch.Tensor:
    """Return the class scores."""
    pairs = list(zip(theta[::2], theta[1::2], strict=True))
    for (w, b), (*_, stride, padding, pool) in zip(pairs, CONVOLUTIONS, strict=False):
        x = functional.relu(functional.conv2d(x, w, b, stride, padding))
        x = functional.max_pool2d(x, 3, 2) if pool else x
    x = x.flatten(1)
    for i, (w, b) in enumerate(pairs[5:]):
        x = functional.linear(x, w, b)
        x = functional.relu(x) if i < 2 else x
    return x


def _jax_net(x: Any, *theta: Any) -> Any:
    import jax
    import jax.numpy as jnp

    pairs = list(zip(theta[::2], theta[1::2], strict=True))
    for (w, b), (*_, stride, p, pool) in zip(pairs, CONVOLUTIONS, strict=False):
        x = jax.lax.conv_general_dilated(x, w, (stride, stride), [(p, p), (p, p)])
        x = jax.nn.relu(x + b[:, None, None])
        if pool:
            x = jax.lax.reduce_window(
                x, -jnp.inf, jax.lax.max, (1, 1, 3, 3), (1, 1, 2, 2), "VALID"
            )
    x = x.reshape(x.shape[0], -1)
    for i, (w, b) in enumerate(pairs[5:]):
        x = x @ w.T + b
        x = jax.nn.relu(x) if i < 2 else x
    return x


def _backward(
    u: torch.Tensor, x: torch.Tensor, w: torch.Tensor, stride: int, padding: int, mask: list[bool]
) -> Tensors:
    steps, pads, bias = [stride] * 2, [padding] * 2, [w.shape[0]]
    return torch.ops.aten.convolution_backward(
        u, x, w, bias, steps, pads, [1, 1], False, [0, 0], 1, mask
    )


def by_hand(x: torch.Tensor, theta: Tensors, *, inputs: bool) -> Limit:
    """Return the least linear work with respect to the input or to the parameters."""
    pairs = list(zip(theta[::2], theta[1::2], strict=True))
    stages: list[Any] = []
    y = x
    for (w, b), (*_, stride, padding, pool) in zip(pairs, CONVOLUTIONS, strict=False):
        z = functional.conv2d(y, w, b, stride, padding)
        mask = (z > 0).to(x.dtype)
        a, where = functional.relu(z), None
        if pool:
            a, where = functional.max_pool2d(a, 3, 2, return_indices=True)
            # The slope is needed where the largest entries are, and nowhere else.
            mask = mask.flatten(2).gather(2, where.flatten(2)).view(where.shape)
        stages.append((y, w, stride, padding, mask, where, z.shape))
        y = a
    shape, y = y.shape, y.flatten(1)
    dense: list[Any] = []
    for i, (w, b) in enumerate(pairs[5:]):
        z = functional.linear(y, w, b)
        dense.append((y, w, (z > 0).to(x.dtype) if i < 2 else None))
        y = functional.relu(z)

    def jvp(*given: torch.Tensor) -> torch.Tensor:
        d: Any = given[0] if inputs else None
        for i, (y, w, stride, padding, mask, where, _) in enumerate(stages):
            carried = None if d is None else functional.conv2d(d, w, None, stride, padding)
            if inputs:
                d = carried
            else:
                dw, db = given[2 * i : 2 * i + 2]
                d = functional.conv2d(y, dw, db, stride, padding)
                d = d if carried is None else d.add_(carried)
            if where is not None:
                d = d.flatten(2).gather(2, where.flatten(2)).view(where.shape)
            d = d.mul_(mask)
        d = d.flatten(1)
        for i, (y, w, mask) in enumerate(dense):
            if inputs:
                d = torch.mm(d, w.T)
            else:
                dw, db = given[10 + 2 * i : 12 + 2 * i]
                d = torch.addmm(db, y, dw.T).addmm_(d, w.T)
            d = d if mask is None else d.mul_(mask)
        return d

    def vjp(u: torch.Tensor) -> Any:
        found: list[torch.Tensor] = []
        for y, w, mask in reversed(dense):
            u = u if mask is None else u * mask
            if not inputs:
                found[:0] = [u.T @ y, u.sum(0)]
            u = u @ w
        u = u.view(shape)
        for i, (y, w, stride, padding, mask, where, full) in reversed(list(enumerate(stages))):
            u = u * mask
            if where is not None:
                wide = u.new_zeros(full).flatten(2)
                u = wide.scatter_add_(2, where.flatten(2), u.flatten(2)).view(full)
            below = inputs or i > 0
            grads = _backward(u, y, w, stride, padding, [below, not inputs, not inputs])
            if not inputs:
                found[:0] = grads[1:]
            u = grads[0]
        return u if inputs else tuple(found)

    return Limit(jvp, vjp)


def problem(batch: int, dtype: torch.dtype, *, inputs: bool) -> Problem:
    x, theta = randn(batch, 3, 224, 224, dtype=dtype), parameters(dtype)

    def jax() -> Any:
        if inputs:
            weights = [numpy(t) for t in theta]
            return lambda x: _jax_net(x, *weights), (numpy(x),)
        given = numpy(x)
        return lambda *theta: _jax_net(given, *theta), [numpy(t) for t in theta]

    def f(*primals: torch.Tensor) -> torch.Tensor:
        return net(*primals, *theta) if inputs else net(x, *primals)

    limit = lambda: by_hand(x, theta, inputs=inputs)  # noqa: E731
    return Problem(f, (x,) if inputs else theta, limit, jax=jax)


CASES = tuple(
    Case(
        f"AlexNet, batch 2, w.r.t. {what}",
        "large",
        lambda dtype, what=what: problem(2, dtype, inputs=what == "input"),
        by_blas=True,
        kind="alexnet",
    )
    for what in ("input", "parameters")
)
