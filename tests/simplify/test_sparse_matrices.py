"""Constant sparse matrices inside f: stored by rows once at a point, right at each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

import linearize as lz
from linearize._simplify import sparse_matrices

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")

M, N = 7, 5


def dense(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return a matrix with an empty row and an empty column."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(M, N, generator=generator, dtype=dtype)
    W[torch.rand(M, N, generator=generator) < 0.5] = 0
    W[2], W[:, 3] = 0, 0
    return W


Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
PRODUCTS: dict[str, Product] = {
    "mv": lambda W, x: torch.mv(W, x[0]).sin(),
    "@": lambda W, x: (W @ x[0]).exp(),
    "mm": lambda W, x: torch.mm(W, x.mT).sin(),
    "sparse.mm": lambda W, x: (torch.mm if W.layout is torch.strided else torch.sparse.mm)(
        W, x.mT.sin()
    ),
    "addmm": lambda W, x: torch.addmm(x.new_ones(M, 2), W, x.mT, beta=0.5, alpha=2).sin(),
    "twice": lambda W, x: (W @ (W.mT @ (W @ x.mT))).sin(),
}


def check(here: lz.Linearization, f: Any, x: torch.Tensor, products: int = 6) -> None:
    for k in range(products):
        generator = torch.Generator().manual_seed(k)
        v = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        value, along = torch.func.jvp(f, (x,), (v,))
        u = torch.randn(value.shape, generator=generator, dtype=value.dtype)
        torch.testing.assert_close(here.jvp_fn(v), along)
        torch.testing.assert_close(here.vjp_fn(u), torch.func.vjp(f, x)[1](u))
    stack = torch.randn(3, *value.shape, dtype=value.dtype)
    expected = torch.stack([torch.func.vjp(f, x)[1](u)[0] for u in stack])
    for _ in range(3):
        torch.testing.assert_close(here.vjp_fn.batched(stack)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex128])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str, dtype: torch.dtype) -> None:
    product = PRODUCTS[name]
    lin: lz.Linearizer = lz.Linearizer(lambda W, x: product(W, x), argnums=1, maxsize=0)
    for seed in range(3):  # other numbers, in other places
        W = dense(seed, dtype)
        x = torch.randn(2, N, dtype=dtype)
        check(lin.at(W.to_sparse_csr(), x), lambda x: product(W, x), x)  # noqa: B023


def test_once_at_a_point(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = torch.argsort
    monkeypatch.setattr(torch, "argsort", lambda *a, **k: calls.append(None) or original(*a, **k))
    W = dense(0).to_sparse_csr()
    lin = lz.Linearizer(lambda x: (W @ x).sin(), maxsize=0)
    for k in range(4):
        here = lin.at(torch.full((N,), 0.1 * k, dtype=torch.float64))
        for _ in range(6):
            here.vjp_fn(torch.ones(M, dtype=torch.float64))
            here.jvp_fn(torch.ones(N, dtype=torch.float64))
    assert len(calls) == 4
    assert sparse_matrices.stores_by_rows(here.vjp_fn.program.program)


@pytest.mark.parametrize("products", [0, 1, 5])
def test_what_was_stored_again_is_that_of_the_point(products: int) -> None:
    W = dense(0).to_sparse_csr()
    lin = lz.Linearizer(lambda x: (W @ x).sin(), maxsize=0)
    u, v = torch.ones(M, dtype=torch.float64), torch.ones(N, dtype=torch.float64)
    for change in (lambda: W.mul_(2), lambda: W.values().mul_(2), lambda: W.mul_(2)):
        x = torch.rand(N, dtype=torch.float64)
        here, f = lin.at(x), W.to_dense()
        right = f.mT @ (u * (f @ x).cos())
        for _ in range(products):
            torch.testing.assert_close(here.vjp_fn(u)[0], right)
        change()
        with pytest.raises(lz.errors.StalenessError):
            here.jvp_fn(v)
        # The numbers that were stored again are nobody else's.
        with contextlib.suppress(lz.errors.StalenessError):
            torch.testing.assert_close(here.vjp_fn(u)[0], right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
def test_by_rows(dtype: torch.dtype, index: torch.dtype) -> None:
    W = dense(1, dtype).to_sparse_csr()
    W = torch.sparse_csr_tensor(
        W.crow_indices().to(index),
        W.col_indices().to(index),
        W.values(),
        W.shape,
        check_invariants=True,
    )
    turned = sparse_matrices.by_rows(W.t())
    assert turned.layout is torch.sparse_csr
    assert turned.col_indices().dtype is index
    torch.testing.assert_close(turned.to_dense(), dense(1, dtype).t())
    empty = torch.zeros(M, N).to_sparse_csr().t()
    assert not sparse_matrices.by_rows(empty).to_dense().any()
    assert sparse_matrices.by_rows(W) is W
