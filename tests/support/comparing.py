"""Comparing both products of a function with references that know nothing of the package."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

import linearize as lz

#: At the third call of a closure the simplified program is tried, at the fourth it serves.
CALLS = 4


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


class Counted:
    """Counts the runs of a function."""

    def __init__(self, f: Callable[..., Any]) -> None:
        self.f = f
        self.runs = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.runs += 1
        return self.f(*args, **kwargs)


@contextlib.contextmanager
def same_draws(seed: int = 0) -> Iterator[None]:
    """Let every function inside draw the same numbers, and leave the outside as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def compare(
    f: Callable[..., Any],
    *primals: Any,
    reference: str = "difference",
    tol: float = 1e-7,
    **options: Any,
) -> lz.Linearization:
    """Compare value and products of `f`, each called four times, and count the runs of `f`.

    `f` must compute the same each time. Directions differ from call to call, so that nothing
    can be right by being remembered. Returns the linearization.
    """
    plain = Plain(f, primals)
    value = [y.detach().clone() for y in plain(plain.at)]
    counted = Counted(f)
    here = lz.Linearizer(counted, **options).at(*primals)
    close(here.value, value, 1e-12 if tol < 1e-6 else tol)
    for call in range(CALLS):
        v = like(primals, seed=2 * call + 1)
        close(here.jvp_fn(*v), REFERENCES[reference](plain, tensors(v)), tol)
        u = like(here.value, seed=2 * call + 2)
        close(here.vjp_fn(u), gradient(plain, tensors(u)), tol)
    close(here.value, value, 1e-12 if tol < 1e-6 else tol)
    assert counted.runs == 1
    return here


def close(got: Any, expected: Any, tol: float) -> None:
    """Compare the differentiable tensors, with a tolerance relative to the largest entry."""
    mine, theirs = tensors(got), tensors(expected)
    assert len(mine) == len(theirs)
    size = max((float(t.abs().max()) for t in theirs if t.numel()), default=0.0)
    for a, b in zip(mine, theirs, strict=True):
        assert not a.requires_grad
        torch.testing.assert_close(a, b, rtol=tol, atol=tol * max(size, 1e-3))
