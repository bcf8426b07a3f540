"""References that are independent of the package, and custom Functions shared by tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.autograd import Function

F64 = torch.float64


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    """Return normal random numbers, the same for the same seed."""
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    """Return normal random numbers, others for each shape."""
    return rand(*shape, seed=seed + sum(shape), dtype=dtype)


def point(n: int = 6, dtype: torch.dtype = F64, seed: int = 0) -> torch.Tensor:
    """Return numbers of order one, away from zero."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_complex:
        parts = 0.3 + torch.rand(n, 2, generator=generator, dtype=F64)
        return torch.view_as_complex(parts).to(dtype)
    return (0.3 + torch.rand(n, generator=generator, dtype=F64)).to(dtype)


def direction(like: torch.Tensor, seed: int = 1) -> torch.Tensor:
    """Return normal random numbers of the shape and dtype of `like`."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.complex128 if like.is_complex() else F64
    return torch.randn(like.shape, generator=generator, dtype=dtype).to(like.dtype)


def opaque(method: Callable[..., Any]) -> Callable[..., Any]:
    """Hide from PyTorch how a method's results come from its arguments."""

    def hide(t: Any) -> Any:
        if not isinstance(t, torch.Tensor):
            return t
        return torch.from_numpy(np.array(t.detach().resolve_conj().numpy()))

    def hidden(ctx: Any, *args: Any) -> Any:
        result = method(ctx, *(hide(a) for a in args))
        return tuple(map(hide, result)) if isinstance(result, tuple) else hide(result)

    return hidden


def backward_only(
    backward: Callable[..., Any], forward: Callable[..., Any] | None = None
) -> type[Function]:
    """Return a Function of one argument, `x sin x` by default, that saves the argument."""
    run = (lambda x: x * x.sin()) if forward is None else forward

    def save_and_run(ctx: Any, x: torch.Tensor) -> Any:
        ctx.save_for_backward(x)
        return run(x)

    name = getattr(backward, "__name__", "Custom")
    methods = {"forward": staticmethod(save_and_run), "backward": staticmethod(backward)}
    return type(name, (Function,), methods)


def slope(x: torch.Tensor) -> torch.Tensor:
    """Return the derivative of `x sin x`."""
    return x.sin() + x * x.cos()


def quadratic() -> tuple[type[Function], Counter[str]]:
    """Return y = a x² + b x + c whose methods all leave PyTorch, and its call counts."""
    calls: Counter[str] = Counter()

    class Quadratic(Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, a: torch.Tensor, b: float, c: float) -> Any:
            calls["forward"] += 1
            ctx.save_for_backward(x, a)
            ctx.save_for_forward(x, a)
            ctx.b = b
            return torch.tensor(
                [a.item() * t.item() ** 2 + b * t.item() + c for t in x], dtype=F64
            )

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> Any:
            calls["backward"] += 1
            x, a = ctx.saved_tensors
            dx = [(2 * a.item() * t.item() + ctx.b) * s.item() for t, s in zip(x, g, strict=True)]
            da = sum(t.item() ** 2 * s.item() for t, s in zip(x, g, strict=True))
            return torch.tensor(dx, dtype=F64), torch.tensor(da, dtype=F64), None, None

        @staticmethod
        def jvp(ctx: Any, dx: torch.Tensor, da: torch.Tensor, *_: None) -> Any:
            calls["jvp"] += 1
            x, a = ctx.saved_tensors
            slopes = [2 * a.item() * t.item() + ctx.b for t in x]
            squares = [t.item() ** 2 for t in x]
            dy = [
                s * d.item() + q * da.item() for s, q, d in zip(slopes, squares, dx, strict=True)
            ]
            return torch.tensor(dy, dtype=F64)

    return Quadratic, calls
