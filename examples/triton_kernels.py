"""Root-mean-square normalisation as Triton kernels, and the custom Function made of them."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

EPS = 1e-6


@triton.jit
def _forward(x, y, scale, n, eps, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    at = tl.arange(0, block)
    a = tl.load(x + row * n + at, mask=at < n, other=0.0)
    r = 1 / tl.sqrt(tl.sum(a * a, 0) / n + eps)
    tl.store(y + row * n + at, a * r, mask=at < n)
    tl.store(scale + row, r)


@triton.jit
def _product(v, y, scale, out, n, block: tl.constexpr):  # type: ignore[no-untyped-def]
    # With y = r·x and r = (mean x² + eps)^(−1/2): dy = r·(dx − y·mean(y·dx)).
    row = tl.program_id(0)
    at = tl.arange(0, block)
    d = tl.load(v + row * n + at, mask=at < n, other=0.0)
    b = tl.load(y + row * n + at, mask=at < n, other=0.0)
    r = tl.load(scale + row)
    along = tl.sum(b * d, 0) / n
    tl.store(out + row * n + at, r * (d - b * along), mask=at < n)


class Launches:
    """How often each kernel was launched."""

    forward = 0
    product = 0


def _apply_jacobian(v: torch.Tensor, y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return J·v, which is Jᵀ·v as well."""
    Launches.product += 1
    v, out = v.contiguous(), torch.empty_like(y)
    rows, n = y.shape
    with torch.cuda.device_of(y):
        _product[(rows,)](v, y, scale, out, n, block=triton.next_power_of_2(n))
    return out


class TritonNorm(torch.autograd.Function):
    """The rows of a matrix over the root of their mean squares."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        Launches.forward += 1
        x = x.contiguous()
        rows, n = x.shape
        y, scale = torch.empty_like(x), x.new_empty(rows)
        with torch.cuda.device_of(x):
            _forward[(rows,)](x, y, scale, n, EPS, block=triton.next_power_of_2(n))
        ctx.save_for_backward(y, scale)
        ctx.save_for_forward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, u: torch.Tensor) -> torch.Tensor:
        return _apply_jacobian(u, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, v: torch.Tensor) -> torch.Tensor:
        return _apply_jacobian(v, *ctx.saved_tensors)
