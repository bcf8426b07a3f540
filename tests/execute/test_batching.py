"""Batched products: operations whose batching rule in PyTorch is missing, refuses, or is wrong."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import linearize as lz
from linearize._execute import mapped
from tests.support.functions import randn

D = torch.float64
Function = Callable[..., torch.Tensor]


def dense_jacobian(f: Function, x: torch.Tensor) -> torch.Tensor:
    """Return the Jacobian, one entry of the value at a time, by native backward."""
    leaf = x.clone().requires_grad_()
    value = f(leaf)
    rows = [torch.autograd.grad(y, leaf, retain_graph=True)[0].flatten() for y in value.flatten()]
    return torch.stack(rows)


INDEX = torch.tensor([1, 1, 3, 4, 1, 6, 0])
SPARSE = torch.diag(randn(4)).roll(1, 0)

CASES: dict[str, tuple[Function, torch.Tensor]] = {
    # PyTorch's rule for `index_fill` gives wrong numbers.
    "trace": (torch.trace, randn(3, 4)),
    # So does that of `_cdist_backward`, for a second argument that is not batched.
    "cdist": (lambda x: torch.cdist(x, randn(6, 3), 3.0), randn(5, 3)),
    # `as_strided_scatter` has none.
    "as_strided": (lambda x: torch.as_strided(x, (2, 3), (4, 1), 1), randn(3, 4)),
    "as_strided, overlapping": (lambda x: x.sin().as_strided((3, 3), (1, 1)), randn(7)),
    "rfft": (lambda x: torch.view_as_real(torch.fft.rfft(x)), randn(6)),
    "qr": (lambda x: torch.linalg.qr(x)[0], randn(4, 3)),
    # `clone` in another memory format is refused.
    "channels last": (
        lambda x: F.max_pool2d(x.to(memory_format=torch.channels_last), 2),
        randn(2, 3, 4, 4),
    ),
    # None at all: PyTorch would warn and loop, or raise.
    "embedding_bag": (
        lambda w: F.embedding_bag(INDEX, w, torch.tensor([0, 2, 2, 4]), mode="max"),
        randn(7, 3),
    ),
    "ctc_loss": (
        lambda x: F.ctc_loss(
            x.log_softmax(-1), torch.tensor([[1, 2], [3, 3]]), [6, 5], [2, 2], reduction="none"
        ),
        randn(6, 2, 4),
    ),
    "pdist": (F.pdist, randn(4, 3)),
    "attention": (
        lambda x: F.scaled_dot_product_attention(x, 2 * x, x.sin(), is_causal=True),
        randn(1, 2, 4, 3),
    ),
    "group_norm": (lambda x: F.group_norm(x, 2), randn(2, 4, 3)),
    "grid_sample": (
        lambda x: F.grid_sample(x, randn(1, 2, 3, 2).tanh(), align_corners=False),
        randn(1, 2, 4, 4),
    ),
    "a constant sparse matrix": (lambda x: torch.sparse.mm(SPARSE.to_sparse(), x), randn(4, 2)),
    "an empty result": (lambda x: torch.cdist(x, randn(0, 3), 3.0), randn(2, 3)),
}


@pytest.mark.parametrize("name", CASES)
def test_batched_products_are_the_jacobian(name: str) -> None:
    f, x = CASES[name]
    runs = 0

    def counted(x: torch.Tensor) -> torch.Tensor:
        nonlocal runs
        runs += 1
        return f(x)

    here = lz.Linearizer(counted).at(x)
    expected = torch.zeros(0, x.numel(), dtype=D)
    if here.value.numel():
        expected = dense_jacobian(f, x)
    count = here.value.numel()
    us = torch.eye(count, dtype=D).reshape(count, *here.value.shape)
    vs = torch.eye(x.numel(), dtype=D).reshape(x.numel(), *x.shape)
    for _ in range(4):
        if count:
            rows = here.vjp_fn.batched(us)[0].reshape(count, -1)
            torch.testing.assert_close(rows, expected)
        columns = here.jvp_fn.batched(vs).reshape(x.numel(), -1)
        torch.testing.assert_close(columns, expected.T)
    # Simplified programs, in chunks, and mapped by the caller along another dimension.
    here.jvp_fn(vs[0]), here.jvp_fn(vs[0]), here.jvp_fn(vs[0])
    torch.testing.assert_close(
        here.jvp_fn.batched(vs, chunk_size=3).reshape(x.numel(), -1), expected.T
    )
    columns = torch.vmap(here.jvp_fn, in_dims=-1)(vs.movedim(0, -1))
    torch.testing.assert_close(columns.reshape(x.numel(), -1), expected.T)
    assert runs == 1


@pytest.mark.parametrize("name", ["trace", "cdist", "as_strided", "embedding_bag", "pdist"])
def test_a_map_inside_a_map(name: str) -> None:
    f, x = CASES[name]
    here = lz.Linearizer(f).at(x)
    u = randn(2, 3, *here.value.shape)
    (got,) = torch.vmap(torch.vmap(here.vjp_fn), in_dims=1)(u.transpose(0, 1))
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(got[i, j], here.vjp_fn(u[i, j])[0])


def _library_operator(vmap: Callable[..., Any] | None) -> Function:
    """Return x ↦ 3x as an operator whose backward is an operator itself."""
    space = f"linearize_test_{uuid.uuid4().hex[:8]}"

    @torch.library.custom_op(f"{space}::scale", mutates_args=())
    def scale(x: torch.Tensor) -> torch.Tensor:
        return 3 * x

    scale.register_autograd(lambda ctx, grad: scale(grad))
    if vmap is not None:
        scale.register_vmap(vmap)
    return scale


def _wrong(info: Any, in_dims: Any, x: torch.Tensor) -> Any:
    return 4 * x, in_dims[0]


@pytest.mark.parametrize("vmap", [None, _wrong])
def test_operators_of_a_library(vmap: Callable[..., Any] | None) -> None:
    """Without a batching rule, and with one that is wrong."""
    scale = _library_operator(vmap)
    x, v = randn(4), randn(3, 4)
    here = lz.Linearizer(lambda x: scale(x.sin())).at(x)
    for _ in range(4):
        torch.testing.assert_close(here.vjp_fn.batched(v)[0], 3 * v * x.cos())
        torch.testing.assert_close(here.jvp_fn.batched(v), 3 * v * x.cos())


def test_an_operation_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    passes = mapped._passes

    def counted(op: Any, template: Any, given: Any) -> bool:
        tried.append(op)
        return passes(op, template, given)

    monkeypatch.setattr(mapped, "_passes", counted)
    monkeypatch.setattr(mapped, "_known", {})
    x = randn(3, 4)
    for _ in range(3):
        here = lz.Linearizer(torch.trace).at(x)
        here.vjp_fn.batched(randn(5))
    assert len(tried) == len(set(tried)) >= 1


@pytest.mark.parametrize(
    ("f", "x"),
    [
        (lambda x: F.group_norm(x, 2), randn(2, 4, 3, 3)),
        (lambda x: torch.cdist(x, randn(4, 3), 3.0), randn(4, 3)),
        (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), randn(1, 2, 3, 3)),
        (
            lambda x: F.grid_sample(x, randn(1, 4, 4, 2).tanh(), align_corners=False),
            CASES["grid_sample"][1],
        ),
        (lambda x: F.adaptive_avg_pool2d(x, 2), randn(2, 2, 4, 4)),
    ],
)
def test_cotangents_of_any_strides_reach_kernels_that_read_them_in_order(
    f: Function, x: torch.Tensor
) -> None:
    """`native_group_norm_backward` on the CPU takes every gradient to be contiguous."""
    here = lz.Linearizer(f).at(x)
    leaf = x.clone().requires_grad_()
    value = f(leaf)
    u = randn(*value.shape)
    apart = torch.stack([u, torch.full_like(u, torch.nan)], -1)[..., 0]
    turned = u.permute(*reversed(range(u.dim()))).contiguous().permute(*reversed(range(u.dim())))
    (expected,) = torch.autograd.grad(value, leaf, u)
    for given in (u, apart, turned, apart, turned):
        torch.testing.assert_close(here.vjp_fn(given)[0], expected)
    v = randn(*x.shape)
    expected = here.jvp_fn(v)
    for given in (torch.stack([v, v], -1)[..., 0], v.mT.contiguous().mT) * 2:
        torch.testing.assert_close(here.jvp_fn(given), expected)
