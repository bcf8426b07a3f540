"""Who is measured: ways to apply a Jacobian again and again at one point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import linearize as lz

Product = Callable[..., Any]


def ours(f: Callable[..., Any], *primals: torch.Tensor) -> Product:
    """One run, then the recorded and simplified program."""
    return lz.Linearizer(f, maxsize=0).at(*primals).jvp_fn


def func_jvp(f: Callable[..., Any], *primals: torch.Tensor) -> Product:
    """PyTorch's forward mode: f runs at every product."""
    return lambda *v: torch.func.jvp(f, primals, v)[1]


def func_linearize(f: Callable[..., Any], *primals: torch.Tensor) -> Product:
    """PyTorch's `linearize`: f runs twice, and is traced."""
    return torch.func.linearize(f, *primals)[1]


def double_backward(f: Callable[..., Any], *primals: torch.Tensor) -> Product:
    """The trick with two backwards, with the graph of the first kept."""
    leaves = [p.detach().requires_grad_() for p in primals]
    y = f(*leaves)
    u = torch.zeros_like(y, requires_grad=True)
    pulled = torch.autograd.grad(y, leaves, u, create_graph=True)
    return lambda *v: torch.autograd.grad(pulled, u, v, retain_graph=True)[0]


ENGINES: dict[str, Callable[..., Product]] = {
    "linearize": ours,
    "torch.func.jvp": func_jvp,
    "torch.func.linearize": func_linearize,
    "double backward": double_backward,
}
