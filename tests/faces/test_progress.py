"""What may take long shows a progress bar where tqdm is installed, and ends it."""

import numpy as np
import pytest
import torch

import linearize as lz
from tests.support.functions import rand

tqdm_auto = pytest.importorskip("tqdm.auto")


A = rand(30, 30) + 12 * torch.eye(30, dtype=torch.float64)


def f(x):
    return A @ (x + 0.1 * x.sin())


def jacobian():
    return lz.Linearizer(f).at(rand(30, seed=1)).jacobian


def curvature(**options):
    w, x, y = rand(3, 4), rand(10, 4, seed=1), rand(10, 3, seed=2)
    batches = list(zip(x.split(5), y.split(5), strict=True))
    return lz.curvature.gauss_newton(
        lambda w, x: torch.tanh(x @ w.T), w, "mse", batches, **options
    )


def rows_apart():
    W = rand(4, 4)
    return lz.Linearizer(lambda x: torch.tanh(x @ W)).at(rand(9, 4)).jacobian


LONG = {
    "columns": lambda: jacobian().materialize(direction="forward"),
    "rows": lambda: jacobian().materialize(direction="reverse"),
    "the diagonal": lambda: jacobian().diagonal(),
    "the diagonal of a Gram matrix": lambda: jacobian().gram().diagonal(),
    "the diagonal, by rows": lambda: rows_apart().diagonal(),
    "an estimate": lambda: jacobian().trace(samples=20),
    "func.jacrev": lambda: lz.func.jacrev(f)(rand(30)),
    "func.jacfwd": lambda: lz.func.jacfwd(f)(rand(30)),
    "func.hessian": lambda: lz.func.hessian(lambda x: f(x).square().sum())(rand(30)),
    "functional.jacobian": lambda: lz.functional.jacobian(f, rand(30)),
    "sparse.jacobian": lambda: lz.sparse.jacobian(
        lz.Linearizer(lambda x: x * x.roll(1)).at(rand(30)), chunk_size=1
    ),
    "batches": curvature,
    "a product with batches beyond the budget": lambda: curvature(max_bytes=0) @ rand(12),
    "the gradient of such": lambda: curvature(max_bytes=0).gradient,
    "the diagonal from outputs": lambda: curvature().diagonal(),
    "gmres": lambda: lz.solvers.gmres(jacobian(), rand(30)),
    "newton_krylov": lambda: lz.scipy.newton_krylov(lambda x: f(x) - 1, np.zeros(30)),
    "several solutions": lambda: lz.operators.inverse(jacobian()) @ rand(30, 5),
}


@pytest.mark.parametrize("what", list(LONG))
def test_it_shows_a_bar_and_takes_it_away(what, monkeypatch):
    bars = []

    class Bar(tqdm_auto.tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **{**options, "disable": True})
            self.given, self.moved = options, 0
            bars.append(self)

        def __iter__(self):
            self.open = True
            try:
                for step in self.iterable:
                    self.moved += 1
                    yield step
            finally:
                self.open = False

    monkeypatch.setattr(tqdm_auto, "tqdm", Bar)
    LONG[what]()
    assert any(bar.moved for bar in bars)
    for bar in bars:
        assert bar.given["delay"] >= 1  # short work shows none
        assert bar.given["leave"] is False
        assert bar.given["desc"]
        assert bar.moved <= bar.given["total"]
        assert not getattr(bar, "open", False)


def test_short_products_have_none(monkeypatch):
    def bar(*args, **options):
        raise AssertionError

    J, G = jacobian(), curvature()
    monkeypatch.setattr(tqdm_auto, "tqdm", bar)
    for _ in range(5):
        J @ rand(30), J.T @ rand(30), G @ rand(12)
