"""Why points were recorded although others had been: the statistics say so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import linearize as lz
from linearize._reuse.shared import SHARED

D = torch.float64
N = 4


class Settable(torch.autograd.Function):
    """A backward only, with a setting."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, k: int) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.k = k
        return x**k

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return ctx.k * x ** (ctx.k - 1) * g, None


def at(f: Callable[..., Any], *settings: Any, trace: bool = False) -> lz.Linearizer:
    """Ask for both products at a point for each setting."""
    SHARED.clear()
    now: list[Any] = []
    lin = lz.Linearizer(lambda x: f(x, now[-1]), maxsize=0, trace=trace)
    for setting in settings:
        now.append(setting)
        x = torch.rand(N, dtype=D) + 1
        here = lin.at(x)
        here.jvp_fn(x)
        here.vjp_fn(here.value)
    return lin


def reflect(x: torch.Tensor, k: int) -> torch.Tensor:
    return torch.cat([torch.ones(k, dtype=D), x.sin(), torch.ones(3 - k, dtype=D)])


#: Functions with settings, and the words that must stand in the reason.
CASES: list[tuple[Callable[..., Any], Sequence[Any], str]] = [
    (lambda x, k: x.exp() ** k, (2, 3), "PowBackward0: another static argument"),
    (lambda x, k: x.sin() if k else x.cos(), (0, 1), "another operation"),
    (lambda x, k: x[:k].sin(), (2, 3), "SinBackward0: another shape, dtype or device"),
    (lambda x, k: (x.sin() * x) if k else x.sin(), (0, 1), "another operation"),
    (reflect, (1, 2), "CatBackward0: does something else than when it was recorded"),
    (Settable.apply, (2, 3), "Settable, backward: does something else"),
]


@pytest.mark.parametrize(("f", "settings", "words"), CASES)
def test_what_differs_is_named(f: Callable[..., Any], settings: Sequence[Any], words: str) -> None:
    stats = at(f, *settings, *settings).stats()
    assert (stats.recorded, stats.reused) == (2, 2)
    assert list(stats.why.values()) == [1]
    (why,) = stats.why
    assert words in why.replace("SettableBackward", "Settable")
    assert words in str(stats).replace("SettableBackward", "Settable")


def test_nothing_is_said_where_programs_were_taken_over() -> None:
    stats = at(lambda x, k: x.sin() * k, 0.5, 0.7, 0.9).stats()
    assert (stats.recorded, stats.reused, dict(stats.why)) == (1, 2, {})
    with pytest.raises(KeyError):
        stats["why"]


def test_the_line_of_a_function_that_is_traced_is_named() -> None:
    stats = at(lambda x, k: x.exp() ** k, 2, 3, trace=True).stats()
    (why,) = stats.why
    assert "test_reasons.py:" in why


def test_what_numbers_decided_at_each_point_is_named() -> None:
    def by_numbers(x: torch.Tensor, k: int) -> torch.Tensor:
        out = torch.ones(2 * N, dtype=D) * k
        out[:N] = x.sin()
        out[2 : N + 2] = 3 * x
        return out * x[0]

    stats = at(by_numbers, 0, 1, 0, 2).stats()
    assert stats.recorded == 1 + sum(stats.why.values())
