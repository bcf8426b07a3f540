"""Products with directions that hold infinities and NaN, compared with PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import linearize as lz

INFINITE = (torch.inf, -torch.inf, torch.nan)


def directions(like: torch.Tensor, *numbers: float) -> Iterator[torch.Tensor]:
    """Yield directions, finite but for one number; the first without it."""
    generator = torch.Generator().manual_seed(like.numel())
    plain = torch.randn(like.shape, dtype=like.dtype, generator=generator)
    yield plain
    for number in numbers:
        for place in (1, like.numel() // 2):
            v = plain.clone()
            v.view(-1)[place] = number
            yield v


def compare_infinite(
    lin: lz.Linearizer,
    f: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    *,
    calls: int,
) -> lz.Linearization:
    """Compare both products at a point: each direction is given in turn, `calls` of each kind.

    Where native forward mode and backward are finite, the products are finite and the same;
    elsewhere they are not finite.
    """
    here = lin.at(x)
    turned = x.clone().requires_grad_()
    value = f(turned)
    vs, us = (list(directions(t, *INFINITE)) for t in (x, value.detach()))
    forth = [torch.func.jvp(f, (x,), (v,))[1] for v in vs]
    back = [torch.autograd.grad(value, turned, u, retain_graph=True)[0] for u in us]
    for call in range(calls):
        k = call % len(vs)
        same_where_finite(here.jvp_fn(vs[k]), forth[k])
        same_where_finite(here.vjp_fn(us[k])[0], back[k])
    return here


def same_where_finite(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare two tensors where they are finite, which they must be at the same places."""
    finite = expected.isfinite()
    assert torch.equal(got.isfinite(), finite), (got, expected)
    torch.testing.assert_close(got[finite], expected[finite], rtol=1e-9, atol=1e-12)
