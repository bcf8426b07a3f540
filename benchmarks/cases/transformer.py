"""One encoder layer (attention by its formula, layer norms after the sums, ReLU)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.case import Case, Limit, Problem, Tensors, frozen, numpy, randn, seeded

HEADS, EPS = 4, 1e-5
NAMES = (
    "self_attn.in_proj_weight",
    "self_attn.in_proj_bias",
    "self_attn.out_proj.weight",
    "self_attn.out_proj.bias",
    "linear1.weight",
    "linear1.bias",
    "linear2.weight",
    "linear2.bias",
    "norm1.weight",
    "norm1.bias",
    "norm2.weight",
    "norm2.bias",
)


def layer(width: int, dtype: torch.dtype) -> nn.Module:
    """Return the layer in training mode, so that no fused kernel for inference steps in."""
    make = lambda: nn.TransformerEncoderLayer(  # noqa: E731
        width, HEADS, 2 * width, dropout=0.0, batch_first=True
    )
    return frozen(seeded(make), dtype)


def problem(width: int, length: int, batch: int, dtype: torch.dtype, *, inputs: bool) -> Problem:
    net, x = layer(width, dtype), randn(batch, length, width, dtype=dtype)
    theta = tuple(dict(net.named_parameters())[name] for name in NAMES)

    def f(*primals: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            if inputs:
                return net(*primals)
            return torch.func.functional_call(net, dict(zip(NAMES, primals, strict=True)), (x,))

    def jax() -> Any:
        if inputs:
            weights = [numpy(t) for t in theta]
            return lambda x: _jax_layer(x, *weights), (numpy(x),)
        given = numpy(x)
        return lambda *theta: _jax_layer(given, *theta), [numpy(t) for t in theta]

    limit = lambda: by_hand(x, theta, inputs=inputs)  # noqa: E731
    return Problem(f, (x,) if inputs else theta, limit, jax=jax)


def _jax_layer(x: Any, *theta: Any) -> Any:
    import jax
    import jax.numpy as jnp

    wi, bi, wo, bo, w1, b1, w2, b2, g1, c1, g2, c2 = theta
    batch, length, width = x.shape

    def norm(x: Any, g: Any, c: Any) -> Any:
        x = x - x.mean(-1, keepdims=True)
        return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + EPS) * g + c

    qkv = (x @ wi.T + bi).reshape(batch, length, 3, HEADS, width // HEADS)
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)
    p = jax.nn.softmax(q @ k.swapaxes(-1, -2) * (width // HEADS) ** -0.5, -1)
    o = (p @ v).transpose(0, 2, 1, 3).reshape(batch, length, width)
    y = norm(x + o @ wo.T + bo, g1, c1)
    return norm(y + jax.nn.relu(y @ w1.T + b1) @ w2.T + b2, g2, c2)


class _Norm:
    """Layer norm's Jacobian diag(weight) A, with A symmetric and applied by one kernel."""

    def __init__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self.x, self.weight, self.bias, self.shape = x, weight, bias, [x.shape[-1]]
        self.value, self.mean, self.rstd = torch.native_layer_norm(
            x, self.shape, weight, bias, EPS
        )
        self.unit = (x - self.mean) * self.rstd

    def inner(self, v: torch.Tensor) -> torch.Tensor:
        """Return A v."""
        return torch.ops.aten.native_layer_norm_backward(
            v, self.x, self.shape, self.mean, self.rstd, None, None, [True, False, False]
        )[0]

    def pull(self, u: torch.Tensor, *, parameters: bool) -> Tensors:
        """Return the cotangents of the input and, if wanted, of weight and bias."""
        return torch.ops.aten.native_layer_norm_backward(
            u,
            self.x,
            self.shape,
            self.mean,
            self.rstd,
            self.weight,
            self.bias,
            [True, parameters, parameters],
        )


def by_hand(x: torch.Tensor, theta: Tensors, *, inputs: bool) -> Limit:
    """Return the least linear work with respect to the input or to the parameters."""
    wi, bi, wo, bo, w1, b1, w2, b2, g1, c1, g2, c2 = theta
    batch, length, width = x.shape
    rows, head = batch * length, width // HEADS
    scale = head**-0.5

    def split(t: torch.Tensor) -> Tensors:
        t = t.view(batch, length, 3, HEADS, head).permute(2, 0, 3, 1, 4)
        return tuple(t.reshape(3, batch * HEADS, length, head))

    def joined(t: torch.Tensor) -> torch.Tensor:
        return t.view(batch, HEADS, length, head).transpose(1, 2).reshape(rows, width)

    flat_x = x.view(rows, width)
    q, k, v = split(functional.linear(flat_x, wi, bi))
    p = torch.softmax(q @ k.mT * scale, -1)
    o = joined(p @ v)
    first = _Norm(flat_x + functional.linear(o, wo, bo), g1, c1)
    hidden = functional.linear(first.value, w1, b1)
    mask = (hidden > 0).to(x.dtype)
    active = hidden * mask
    second = _Norm(first.value + functional.linear(active, w2, b2), g2, c2)
    qs, ks = q * scale, k * scale

    def softmax(t: torch.Tensor) -> torch.Tensor:  # symmetric: it serves both directions
        return torch._softmax_backward_data(t, p, -1, p.dtype)

    def attend(dqkv: torch.Tensor) -> torch.Tensor:
        dq, dk, dv = split(dqkv)
        dp = softmax(torch.baddbmm(torch.bmm(dq, ks.mT), qs, dk.mT))
        return joined(torch.baddbmm(torch.bmm(dp, v), p, dv))

    def attend_back(u: torch.Tensor) -> torch.Tensor:
        u = u.view(batch, length, HEADS, head).transpose(1, 2).reshape(-1, length, head)
        ds = softmax(torch.bmm(u, v.mT))
        parts = torch.stack([torch.bmm(ds, ks), torch.bmm(ds.mT, qs), torch.bmm(p.mT, u)])
        parts = parts.view(3, batch, HEADS, length, head).permute(1, 3, 0, 2, 4)
        return parts.reshape(rows, 3 * width)

    def jvp_input(d: torch.Tensor) -> torch.Tensor:
        d = d.view(rows, width)
        d = first.inner(torch.addmm(d, attend(torch.mm(d, wi.T)), wo.T)).mul_(g1)
        d = torch.addmm(d, torch.mm(d, w1.T).mul_(mask), w2.T)
        return second.inner(d).mul_(g2).view(x.shape)

    def jvp_parameters(*t: torch.Tensor) -> torch.Tensor:
        dwi, dbi, dwo, dbo, dw1, db1, dw2, db2, dg1, dc1, dg2, dc2 = t
        d = torch.addmm(dbo, o, dwo.T).addmm_(attend(torch.addmm(dbi, flat_x, dwi.T)), wo.T)
        d = first.inner(d).mul_(g1).addcmul_(first.unit, dg1).add_(dc1)
        h = torch.addmm(db1, first.value, dw1.T).addmm_(d, w1.T).mul_(mask)
        d = d.add_(db2).addmm_(active, dw2.T).addmm_(h, w2.T)
        return second.inner(d).mul_(g2).addcmul_(second.unit, dg2).add_(dc2).view(x.shape)

    def vjp_input(u: torch.Tensor) -> torch.Tensor:
        u = second.pull(u.view(rows, width), parameters=False)[0]
        u = torch.addmm(u, torch.mm(u, w2).mul_(mask), w1)
        u = first.pull(u, parameters=False)[0]
        return torch.addmm(u, attend_back(torch.mm(u, wo)), wi).view(x.shape)

    def vjp_parameters(u: torch.Tensor) -> Tensors:
        u, ug2, uc2 = second.pull(u.reshape(rows, width), parameters=True)
        h = torch.mm(u, w2).mul_(mask)
        uw2, ub2 = u.T @ active, u.sum(0)
        u, ug1, uc1 = first.pull(torch.addmm(u, h, w1), parameters=True)
        z = attend_back(torch.mm(u, wo))
        feed = (h.T @ first.value, h.sum(0), uw2, ub2)
        return (z.T @ flat_x, z.sum(0), u.T @ o, u.sum(0), *feed, ug1, uc1, ug2, uc2)

    return Limit(jvp_input, vjp_input) if inputs else Limit(jvp_parameters, vjp_parameters)


SIZES = ((32, 8, 2, "small"), (64, 32, 8, "medium"), (128, 64, 8, "large"))
CASES = tuple(
    Case(
        f"transformer layer {width}, {batch} x {length}, w.r.t. {what}",
        size,
        lambda dtype, w=width, n=length, b=batch, what=what: problem(
            w, n, b, dtype, inputs=what == "input"
        ),
        by_blas=size != "small",
        kind="transformer",
    )
    for width, length, batch, size in SIZES
    for what in ("input", "parameters")
)
