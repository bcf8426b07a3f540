"""Derivatives from sources that know nothing of the package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree


def differentiable(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex())


def tensors(tree: Any) -> list[torch.Tensor]:
    """Return the differentiable tensors of a pytree."""
    return [t for t in pytree.tree_leaves(tree) if differentiable(t)]


def like(tree: Any, seed: int) -> Any:
    """Return random numbers structured like `tree`; None for what has no tangent."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(x: Any) -> Any:
        if not differentiable(x):
            return None
        wide = torch.complex128 if x.is_complex() else torch.float64
        return torch.randn(x.shape, dtype=wide, generator=generator).to(x.dtype)

    return pytree.tree_map(numbers, tree)


class Plain:
    """A function of a flat list of tensors, made of one of pytrees; counts nothing."""

    def __init__(self, f: Callable[..., Any], primals: Sequence[Any]) -> None:
        self.f = f
        self.leaves, self.spec = pytree.tree_flatten(tuple(primals))
        self.where = [i for i, x in enumerate(self.leaves) if differentiable(x)]
        self.at = [self.leaves[i].detach() for i in self.where]

    def __call__(self, chosen: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        full = list(self.leaves)
        for i, t in zip(self.where, chosen, strict=True):
            full[i] = t
        return tensors(self.f(*pytree.tree_unflatten(full, self.spec)))


def difference(f: Plain, v: Sequence[torch.Tensor], h: float = 1e-4) -> list[torch.Tensor]:
    """Return J·v by central differences of fourth order."""

    def at(k: int) -> list[torch.Tensor]:
        moved = [x + k * h * t for x, t in zip(f.at, v, strict=True)]
        with torch.no_grad():
            return [y.clone() for y in f(moved)]

    return [
        (8 * (p1 - m1) - (p2 - m2)) / (12 * h)
        for p1, m1, p2, m2 in zip(at(1), at(-1), at(2), at(-2), strict=True)
    ]


def gradient(f: Plain, u: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return Jᵀ·u by PyTorch's engine."""
    leaves = [x.clone().requires_grad_() for x in f.at]
    pairs = [(y, w) for y, w in zip(f(leaves), u, strict=True) if y.requires_grad]
    if not pairs:
        return [torch.zeros_like(x) for x in leaves]
    got = torch.autograd.grad(
        [y for y, _ in pairs], leaves, [w for _, w in pairs], allow_unused=True
    )
    return [
        torch.zeros_like(x) if g is None else g.to_dense()
        for g, x in zip(got, leaves, strict=True)
    ]


def native(f: Plain, v: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return J·v by PyTorch's forward mode."""
    return list(torch.func.jvp(lambda *x: tuple(f(x)), tuple(f.at), tuple(v))[1])


def twice_backward(f: Plain, v: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return J·v as the derivative of Jᵀ·u with respect to u."""
    leaves = [x.clone().requires_grad_() for x in f.at]
    ys = f(leaves)
    us = [torch.zeros_like(y, requires_grad=True) for y in ys]
    back = torch.autograd.grad(ys, leaves, us, create_graph=True, materialize_grads=True)
    pairs = [(b, t) for b, t in zip(back, v, strict=True) if b.requires_grad]
    if not pairs:  # of tensors without elements
        return [torch.zeros_like(u) for u in us]
    along, directions = zip(*pairs, strict=True)
    return list(torch.autograd.grad(along, us, directions, materialize_grads=True))


REFERENCES = {"difference": difference, "native": native, "twice": twice_backward}


def finite_difference(
    f: Callable[..., Any], primals: Sequence[torch.Tensor], tangents: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Return J·v by fourth-order central differences."""
    h = 1e-4

    def at(k: int) -> list[torch.Tensor]:
        with torch.no_grad():
            y = f(*(x + k * h * t for x, t in zip(primals, tangents, strict=True)))
        return [y] if isinstance(y, torch.Tensor) else list(y)

    return [
        (8 * (p1 - m1) - (p2 - m2)) / (12 * h)
        for p1, m1, p2, m2 in zip(at(1), at(-1), at(2), at(-2), strict=True)
    ]


def native_jvp(f: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
    """Return J·v by PyTorch's forward mode; a tangent may be None."""
    with forward_ad.dual_level():
        duals = [
            x if t is None else forward_ad.make_dual(x, t)
            for x, t in zip(primals, tangents, strict=True)
        ]
        return torch.utils._pytree.tree_map(
            lambda y: forward_ad.unpack_dual(y).tangent if isinstance(y, torch.Tensor) else y,
            f(*duals),
        )


def native_vjp(f: Callable[..., Any], primals: Sequence[torch.Tensor], u: Any) -> list[Any]:
    """Return Jᵀ·u by PyTorch's engine."""
    leaves = [x.detach().clone().requires_grad_() for x in primals]
    y = f(*leaves)
    ys, us = ([y], [u]) if isinstance(y, torch.Tensor) else (list(y), list(u))
    return list(torch.autograd.grad(ys, leaves, us, allow_unused=True))
