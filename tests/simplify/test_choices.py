"""A choice between an entry and zero is no multiplication: zero times infinity is NaN."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

import linearize as lz
from linearize._execute.thresholds import COSTLY_AT
from linearize._simplify.passes import simplify
from tests.support.infinite import INFINITE, compare_infinite, directions

D = torch.float64
MASK = torch.tensor([True, False, True, False, True, True])
W = torch.linspace(-2, 3, 36, dtype=D).sin().reshape(6, 6)
X = torch.linspace(-1, 1.5, 6, dtype=D)


def padded_attention(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention in which the second row has nothing to attend to."""
    gone = torch.tensor([[False, False, True], [True, True, True]])
    scores = ((W @ x).reshape(2, 3) * scale).masked_fill(gone, -1e30)
    return scores.softmax(-1).masked_fill(gone, 0).reshape(-1) * x


def rows(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Something of each row of a long tensor, in many steps."""
    y = (x.repeat(50).reshape(50, 6) @ W * scale).sin()[:, :3]
    parts = [torch.where(y[:, 0] > 0, y[:, 0], 0.0) * y[:, 1], y.sum(1) * y[:, 0], y[:, 2].relu()]
    return torch.stack(parts, 1)


CASES: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "relu": lambda x, s: ((x.sin() * 2 * s).relu() * 3).cos(),
    "leaky relu": lambda x, s: F.leaky_relu(x * 2 * s) * x,
    "relu6": lambda x, s: F.relu6(x * 5 * s) * x,
    "masked_fill": lambda x, s: (x.sin() * 2 * s).masked_fill(MASK, 0) * x.cos(),
    "where": lambda x, s: torch.where(MASK, x.sin(), x * s * x.exp() * s) * 2,
    "where and a tensor": lambda x, s: torch.where(MASK, x.sin() * s, W[0]) * (x * 2),
    "clamp": lambda x, s: (x * 2 * s).clamp(-0.5, 0.5) * x,
    "hardtanh": lambda x, s: F.hardtanh(x * 3 * s).sin(),
    "hardswish": lambda x, s: F.hardswish(x * 5 * s) * 2,
    "hardsigmoid": lambda x, s: F.hardsigmoid(x * 5 * s) * x,
    "hardshrink": lambda x, s: F.hardshrink(x * 3 * s) * x,
    "softshrink": lambda x, s: F.softshrink(x * 3 * s) * x,
    "threshold": lambda x, s: F.threshold(x * 3 * s, 0.1, 0.0) * x,
    "maximum with ties": lambda x, s: torch.maximum(x, x.detach() * MASK) * x.sin() * s,
    "fmax": lambda x, s: torch.fmax(x * 2 * s, W[0]) * x,
    "triangle": lambda x, s: (W * x * s).tril() * x.sin(),
    "dropout mask": lambda x, s: x.sin() * MASK * 2 * s,
    "padding": lambda x, s: F.pad(x * 2 * s, (1, 2)).sin(),
    "difference": lambda x, s: x.sin() * s + x - x,
    "guarded logarithm": lambda x, s: (
        torch.where(x.abs() > 0.5, x.abs().clamp_min(0.5).log(), 0.0) * x * s
    ),
    "choices in shapes": lambda x, s: (x * s).relu().reshape(2, 3).t().relu() * x.reshape(3, 2),
    "several of one base": lambda x, s: (
        x.relu() + torch.where(MASK, x * x, 0.0) + x.masked_fill(MASK, 0) * s * x
    ),
    "overflow behind products": lambda x, s: torch.where(
        MASK, x.sin(), torch.eye(6, dtype=D) * s @ (torch.eye(6, dtype=D) * s @ x)
    ),
    "two layers": lambda x, s: (W @ (W @ (x * s)).relu() * 2).relu(),
    "padded attention": padded_attention,
    "rows": rows,
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_finite_stays_finite(name: str) -> None:
    scale = [1.0]
    f = lambda x: CASES[name](x, scale[0])  # noqa: E731
    lin = lz.Linearizer(f)
    for point, scale[0] in enumerate((1.0, 1e160, 1.0, 1e-3)):
        compare_infinite(lin, f, X + 0.1 * point, calls=7)


@pytest.mark.parametrize("number", INFINITE)
def test_each_pass_of_a_chain_of_choices(number: float) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = F.hardtanh(x * 1.5).relu() * 0.7
        return x

    here = lz.Linearizer(f).at(X)
    for v in directions(X, number):
        expected = torch.func.jvp(f, (X,), (v,))[1]
        for _ in range(6):
            torch.testing.assert_close(here.jvp_fn(v), expected, equal_nan=True)


def test_factors_around_choices_are_multiplied() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        for _ in range(20):
            x = x.sin() * 1.1
        x = x.relu()
        for _ in range(20):
            x = x.sin() * 1.1
        return x

    here = lz.Linearizer(f, simplify=False).at(X)
    for program in (here.program.pushforward, here.program.pullback):
        smaller = program.made(simplify)
        assert len(program.equations) == 81
        assert [eq.name for eq in smaller.equations] == ["threshold_backward", "mul.Tensor"]


def test_a_choice_made_twice_is_made_once() -> None:
    here = lz.Linearizer(
        lambda x: (x * 2).masked_fill(MASK, 0).masked_fill(MASK, 0) * 3, simplify=False
    ).at(X)
    smaller = here.program.pushforward.made(simplify)
    assert [eq.name for eq in smaller.equations] == ["masked_fill.Scalar", "mul.Scalar"]


def turned(w: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Turn points around axes, in many steps."""
    angle = ((w * w).sum(-1, keepdim=True) + 1e-3).sqrt()
    axis = w / angle
    across = torch.linalg.cross(axis, p)
    along = axis * (axis * p).sum(-1, keepdim=True)
    return p * angle.cos() + across * angle.sin() + along * (1 - angle.cos())


def narrow(x: torch.Tensor) -> torch.Tensor:
    p = turned(x[:, :3], x[:, :3] + 1) + x[:, 3:] + 9
    return p[:, :2] / p[:, 2:]


def wide(x: torch.Tensor) -> torch.Tensor:
    a, b = x[:, :3], x[:, 3:]
    for _ in range(2):
        a, b = turned(a, a + 1), turned(b, b - 1)
    return torch.cat([a, b], 1)


def mixed(x: torch.Tensor) -> torch.Tensor:
    a, b = x[:, :3], x[:, 3:]
    for _ in range(2):
        a, b = turned(a, b + 1), turned(b, a - 1)
    return torch.cat([a, b], 1)


@pytest.mark.parametrize(("f", "taken"), [(narrow, True), (wide, False), (mixed, True)])
def test_rows_hold_apart_what_does_not_depend_on_each_other(
    f: Callable[[torch.Tensor], torch.Tensor], taken: bool
) -> None:
    lin = lz.Linearizer(f)
    x = torch.linspace(-1, 1, 240, dtype=D).reshape(40, 6)
    for point in range(3):
        here = compare_infinite(lin, f, x * (1 - 0.1 * point), calls=COSTLY_AT + 2)
        for program in (here.program.pushforward, here.program.pullback):
            assert any(r.source == "rows" for r in program.residuals()) == taken
