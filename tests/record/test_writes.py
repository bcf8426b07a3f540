"""Writes in place: what they are recorded as, and what PyTorch refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import linearize as lz
from tests.support.comparing import CALLS, close, compare
from tests.support.references import Plain, gradient, like, tensors

D, C = torch.float64, torch.complex128
# `torch.func.jvp`, a reference, compiles something when it is first called.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = D) -> torch.Tensor:
    wide = C if dtype.is_complex else D
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=wide, generator=generator).to(dtype)


def writes(body: Callable[[torch.Tensor, torch.Tensor], Any]) -> Callable[..., Any]:
    """Let `body` write to a copy of the first argument; return the copy unless it returns."""

    def f(x: torch.Tensor, y: torch.Tensor) -> Any:
        h = x.clone()
        result = body(h, y)
        return h if result is None else result

    f.__name__ = body.__name__
    return f


def on_slices(h: torch.Tensor, y: torch.Tensor) -> None:
    h[0] = y[0].sin()
    h[1:, ::2] *= y[1:, ::2]
    h[:, 1] += h[:, 0] * 2
    h[..., -1].mul_(h[0, 0].clone())


def with_masks(h: torch.Tensor, y: torch.Tensor) -> None:
    h[h > 0] = 2 * y[h > 0]
    h.masked_fill_(y > 1, 0.5)
    h.masked_scatter_(y < -0.5, y.flatten().cos())


def by_index(h: torch.Tensor, y: torch.Tensor) -> None:
    index = torch.tensor([2, 0, 2])
    h.index_put_((index, torch.tensor([1, 1, 1])), y[index, 0], accumulate=True)
    h.index_add_(0, index, y[:3].exp(), alpha=0.5)
    h.index_copy_(1, torch.tensor([3, 0]), y[:, :2])
    h.scatter_(1, torch.tensor([[0], [2], [3]]), y[:, :1])
    h.scatter_add_(0, torch.tensor([[0, 2, 0, 1]]), y[:1])
    h[[0, 1], [1, 2]] = y[0, :2] ** 2


def through_views(h: torch.Tensor, y: torch.Tensor) -> None:
    flat, turned = h.view(-1), h.t()
    turned[1].add_(y[:, 1])
    flat[::3].copy_(y.reshape(-1)[::3].sin())
    h.diagonal().mul_(y.diagonal())
    h.unfold(1, 2, 2)[0, 1].sub_(y[2, :2])
    first, second = h[:, :2].clone(), h[:, 2:]
    second.addcmul_(first, y[:, :2])
    h.unsqueeze_(0).squeeze_(0)


def pointwise(h: torch.Tensor, y: torch.Tensor) -> Any:
    h.sin_().add_(1.5).mul_(y).clamp_(-1, 1)
    h.lerp_(y, 0.25)
    h.addmm_(y[:, :3], y, alpha=0.1)
    h.tanh_()
    g = h.clone().zero_() + h
    return g.copy_(h.exp()).sub_(y, alpha=2)


def to_something_fresh(h: torch.Tensor, y: torch.Tensor) -> Any:
    out = torch.empty(3, 4, dtype=D)
    total = torch.zeros((), dtype=D)
    for i in range(3):
        out[i] = h[i] * y[i].sum()
        total += out[i].clone().prod()
    big = torch.full((3, 8), 2.0, dtype=D)
    big[:, 2:6] = h
    return out, total, big.cumsum(1)


def recurrences(h: torch.Tensor, y: torch.Tensor) -> None:
    for i in range(1, 4):
        h[:, i] = h[:, i].clone() + y[:, i] * h[:, i - 1].clone()


def of_itself(h: torch.Tensor, y: torch.Tensor) -> None:
    h.mul_(h.clone())
    h.add_(h.t()[:3].t()[:, :3].sum() * y)
    h[0].copy_(h[1])
    h.add_(h)
    h[1:].sub_(h[:-1].clone())


def values_that_are_thrown_away(h: torch.Tensor, y: torch.Tensor) -> Any:
    g = h + y
    h.fill_(3.0)
    g[0].zero_()
    return g, h


def conditionally(h: torch.Tensor, y: torch.Tensor) -> None:
    for i in range(3):
        if h[i].sum() > y[i].sum():
            h[i] *= 2
        else:
            h[i] = h[i - 1].clone() * y[i]


def resized(h: torch.Tensor, y: torch.Tensor) -> Any:
    h.t_()
    h.transpose_(0, 1).squeeze_()
    h.unsqueeze_(1).swapaxes_(0, 2)
    return h * y.t()[:, None]


WRITES = [
    on_slices,
    with_masks,
    by_index,
    through_views,
    pointwise,
    to_something_fresh,
    recurrences,
    of_itself,
    values_that_are_thrown_away,
    conditionally,
    resized,
]


def uses_itself_twice(h: torch.Tensor, y: torch.Tensor) -> None:
    h.mul_(h)


def overwrites_a_factor(h: torch.Tensor, y: torch.Tensor) -> Any:
    g = h * y
    h[0] = 0.0
    return g


def overwrites_by_a_view(h: torch.Tensor, y: torch.Tensor) -> Any:
    g = h[1].prod()
    h.view(-1)[5].zero_()
    return g


@pytest.mark.parametrize("body", [uses_itself_twice, overwrites_a_factor, overwrites_by_a_view])
def test_what_pytorch_refuses_is_refused(body: Callable[..., Any]) -> None:
    """A tensor that the derivative needs is gone; the value is right all the same."""
    f = writes(body)
    x, y = rand(3, 4), rand(3, 4, seed=1)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        gradient(Plain(f, (x, y)), [torch.ones_like(t) for t in tensors(f(x, y))])
    here = lz.Linearizer(f).at(x, y)
    close(here.value, f(x, y), 0.0)
    for _ in range(CALLS):
        with pytest.raises(lz.errors.StalenessError, match="changed in place"):
            here.jvp_fn(x, y)
        with pytest.raises(lz.errors.StalenessError, match="changed in place"):
            here.vjp_fn(like(here.value, 1))


@pytest.mark.parametrize("body", WRITES, ids=lambda f: f.__name__)
def test_writes_in_place(body: Callable[..., Any]) -> None:
    compare(writes(body), rand(3, 4), rand(3, 4, seed=1))


def test_out_arguments_of_constants() -> None:
    """Autograd takes no `out=` for what is differentiated, but f may use it for the rest."""
    buffer = torch.empty(3, dtype=D)

    def f(x: torch.Tensor) -> torch.Tensor:
        torch.add(x.detach(), 1.0, out=buffer)
        a = x * buffer
        torch.mul(buffer, 0.0, out=torch.empty(3, dtype=D))
        return a

    here = lz.Linearizer(f).at(rand(3))
    for call in range(CALLS):
        v = rand(3, seed=call)
        torch.testing.assert_close(here.jvp_fn(v), v * (rand(3) + 1))


def test_a_buffer_used_again_in_the_same_run() -> None:
    """PyTorch finds that a saved tensor was overwritten; so must we, and not compute."""
    buffer = torch.empty(3, dtype=D)

    def f(x: torch.Tensor) -> torch.Tensor:
        torch.sin(x.detach(), out=buffer)
        a = x * buffer
        torch.cos(x.detach(), out=buffer)
        return a * buffer

    here = lz.Linearizer(f).at(rand(3))
    for _ in range(CALLS):
        for product in (here.jvp_fn, here.vjp_fn):
            with pytest.raises(lz.errors.StalenessError):
                product(rand(3))


def test_a_primal_written_in_place() -> None:
    """A leaf that requires grad cannot be written to; the error is PyTorch's own."""
    lin = lz.Linearizer(lambda x: x.mul_(2))
    x = rand(3)
    with pytest.raises(RuntimeError, match="leaf Variable"):
        lin.at(x)
    torch.testing.assert_close(x, rand(3))
