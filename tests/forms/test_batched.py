"""Many vectors at once: the same as one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import linearize as lz
from tests.support.functions import randn

D = torch.float64


def test_batched_products_equal_single_ones() -> None:
    primals = randn(3, 4), randn(4, 5)

    def f(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(F.gelu(x @ w), (5,)).softmax(-1)

    here = lz.Linearizer(f).at(*primals)
    tangents = tuple(randn(6, *p.shape, seed=1) for p in primals)
    u = randn(6, *here.value.shape, seed=2)
    for chunk in (None, 1, 4):
        got = here.jvp_fn.batched(*tangents, chunk_size=chunk)
        singles = [here.jvp_fn(*(t[k] for t in tangents)) for k in range(6)]
        torch.testing.assert_close(got, torch.stack(singles))
        rows = here.vjp_fn.batched(u, chunk_size=chunk)
        for i, row in enumerate(rows):
            torch.testing.assert_close(row, torch.stack([here.vjp_fn(w)[i] for w in u]))
    torch.testing.assert_close(
        here.jvp_fn.batched(tangents[0], None),
        torch.stack([here.jvp_fn(t, None) for t in tangents[0]]),
    )


def test_opaque_functions_are_looped_inside_the_pass() -> None:
    calls = []

    class Sine(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.x = x.detach()
            return torch.from_numpy(ctx.x.numpy() * 1.0).sin()

        @staticmethod
        def jvp(ctx: Any, v: torch.Tensor) -> torch.Tensor:
            calls.append(tuple(v.shape))
            return torch.from_numpy(v.numpy() * ctx.x.cos().numpy())

        @staticmethod
        def backward(ctx: Any, u: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(u.numpy() * ctx.x.cos().numpy())

    weight = randn(4, 4)
    here = lz.Linearizer(lambda x: weight @ Sine.apply(weight @ x)).at(randn(4))
    eye = torch.eye(4, dtype=D)
    columns = here.jvp_fn.batched(eye)
    assert calls == [(4,)] * 4
    x = weight @ randn(4)
    torch.testing.assert_close(columns.T, weight @ torch.diag(x.cos()) @ weight)
    torch.testing.assert_close(here.vjp_fn.batched(eye)[0], columns.T)
    torch.testing.assert_close(torch.vmap(here.jvp_fn)(eye), columns)


def test_batches_that_do_not_fit_are_refused() -> None:
    here = lz.Linearizer(lambda x, y: x * y).at(randn(3), randn(3))
    with pytest.raises(lz.errors.SpaceError, match=r"tangent\[1\].*\[5,3\].*\[5,4\]"):
        here.jvp_fn.batched(randn(5, 3), randn(5, 4))
    with pytest.raises(lz.errors.StructureError, match="lengths"):
        here.jvp_fn.batched(randn(5, 3), randn(4, 3))
    with pytest.raises(lz.errors.StructureError, match="lengths"):
        here.jvp_fn.batched(None, None)
    assert here.jvp_fn.batched(randn(5, 3), randn(5, 3)).shape == (5, 3)
