"""Matrices and directions that are not finite: what the program gives, and no NaN elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import linearize as lz
from linearize._execute.thresholds import MATRIX_FROM as LEAST
from tests.support.infinite import compare_infinite, same_where_finite

D = torch.float64
N = 30
X = torch.linspace(-1, 1, N, dtype=D)
W = torch.linspace(-2, 3, N * N, dtype=D).sin().reshape(N, N)


def halves(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2)
    for _ in range(20):
        a, b = (a.sin() * 1.1).roll(1) + a, (b.relu() * 0.9).roll(1) + b
    return torch.cat([a, b])


def steps(x: torch.Tensor) -> torch.Tensor:
    for _ in range(3):
        x = x + 0.1 * (x.roll(1) - 2 * x + x.roll(-1)) - 0.05 * x.relu()
    return x


def layers(x: torch.Tensor) -> torch.Tensor:
    for _ in range(5):
        x = (W @ x).relu().roll(1) * 0.2
    return x


@pytest.mark.parametrize("f", [halves, steps, layers])
def test_a_matrix_does_not_spread_what_is_not_finite(
    f: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    lin = lz.Linearizer(f)
    for point in range(3):
        compare_infinite(lin, f, X + 0.1 * point, calls=LEAST + 28)
    assert lin.stats().dense == 3


def test_an_overflow_that_was_not_chosen_stays_out_of_the_matrix() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        for _ in range(10):
            x = x.roll(1) * 1.5
        return torch.where(X > 0, x * 1e200, 0.0) + x

    lin = lz.Linearizer(f)
    here = lin.at(X)
    for call in range(LEAST + 10):
        v = torch.full_like(X, 1e150 if call % 2 else 1.0)
        same_where_finite(here.jvp_fn(v), torch.func.jvp(f, (X,), (v,))[1])
    assert lin.stats().dense == 1


def test_stacks_and_transforms_after_the_takeover() -> None:
    here = compare_infinite(lz.Linearizer(halves), halves, X, calls=LEAST + 10)
    stack = torch.stack([X.cos(), X.sin(), X.exp()])
    stack[1, 3] = torch.nan
    expected = torch.stack([torch.func.jvp(halves, (X,), (v,))[1] for v in stack])
    for _ in range(3):
        same_where_finite(here.jvp_fn.batched(stack), expected)
        same_where_finite(torch.vmap(here.jvp_fn)(stack), expected)
