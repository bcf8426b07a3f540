"""Writes into parts of tensors that lie in memory in any order, and user code in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import linearize as lz

F64 = torch.float64


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=F64, generator=generator)


def changed(y: torch.Tensor, change: Callable[[torch.Tensor], Any]) -> torch.Tensor:
    change(y)
    return y


def zero_row(y: torch.Tensor) -> Any:
    y[0] = 0


def double_part(y: torch.Tensor) -> Any:
    y[..., 1:].mul_(2)


def copy_part(y: torch.Tensor) -> Any:
    y[1:2].copy_(y[:1].clone().sin())


def every_other(y: torch.Tensor) -> Any:
    y[..., ::2] = y[..., :1].clone() ** 2


def diagonal(y: torch.Tensor) -> Any:
    y.select(-1, 0).diagonal(0, 0, -1).add_(y.sum())


def twice(y: torch.Tensor) -> Any:
    y[0] = y[1] * 3
    y[:, 1].mul_(y[:, 0].clone())


CHANGES = [zero_row, double_part, copy_part, every_other, diagonal, twice]
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda x: x.transpose(0, 2) * 2,
    "permuted": lambda x: x.permute(2, 0, 1) * 2,
    "the first two exchanged": lambda x: x.transpose(0, 1) * 2,
    "channels last": lambda x: (x[None] * 2).contiguous(memory_format=torch.channels_last)[0],
    "in rows": lambda x: x * 2,
    "with gaps": lambda x: torch.cat([x, x])[::2] * 2,
    "a view of a whole": lambda x: (x * 2).transpose(0, 2),
    "a part of a permuted one": lambda x: (torch.cat([x, x * 3], 1).permute(2, 0, 1) * 1)[
        :, :, 2:
    ],
    "one column": lambda x: x[:, :, :1].transpose(0, 1) * 2,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("change", CHANGES)
def test_writes_into_parts_of_any_layout(layout: str, change: Callable[..., Any]) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return changed(LAYOUTS[layout](x), change).sin()

    lin = lz.Linearizer(f)
    for shift in (0.0, 0.5):
        x = numbers(3, 4, 2) + shift
        here = lin.at(x)
        for seed in range(4):
            v, u = numbers(3, 4, 2, seed=seed + 1), numbers(*here.value.shape, seed=seed + 9)
            torch.testing.assert_close(here.jvp_fn(v), torch.func.jvp(f, (x,), (v,))[1])
            torch.testing.assert_close(here.vjp_fn(u)[0], torch.func.vjp(f, x)[1](u)[0])
        stack = numbers(3, 3, 4, 2, seed=7)
        rows = torch.stack([torch.func.jvp(f, (x,), (v,))[1] for v in stack])
        torch.testing.assert_close(here.jvp_fn.batched(stack), rows)


# -- user code that changes a part -------------------------------------------------------------


class Scaled(torch.autograd.Function):
    """x² w in place of x, with a backward over NumPy."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x.clone(), w)
        x.mul_(x * w)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        x, w = (t.detach().numpy() for t in ctx.saved_tensors)
        return torch.from_numpy(g.numpy() * 2 * x * w), torch.from_numpy(g.numpy() * x**2)


def reference(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x * x * w


def both_vary(x: torch.Tensor, scaled: Any) -> torch.Tensor:
    y = x * 2
    y[:2] = scaled(y[:2].clone(), x[2:]) if scaled is reference else scaled(y[:2], x[2:])
    return y


def weight_is_fixed(x: torch.Tensor, scaled: Any) -> torch.Tensor:
    y, w = x * 2, torch.ones(2, dtype=F64)
    y[:2] = scaled(y[:2].clone(), w) if scaled is reference else scaled(y[:2], w)
    return y


def part_is_fixed(x: torch.Tensor, scaled: Any) -> torch.Tensor:
    y = torch.full((4,), 1.5, dtype=F64)
    y[:2] = scaled(y[:2].clone(), x[:2]) if scaled is reference else scaled(y[:2], x[:2])
    return y


@pytest.mark.parametrize("f", [both_vary, weight_is_fixed, part_is_fixed])
def test_functions_over_numpy_that_change_a_part_have_a_matrix(f: Any) -> None:
    x = numbers(4)
    here = lz.Linearizer(lambda x: f(x, Scaled.apply), opaque="materialize").at(x)
    jacobian = torch.func.jacrev(lambda x: f(x, reference))(x)
    for seed in range(4):
        v, u = numbers(4, seed=seed), numbers(4, seed=seed + 9)
        torch.testing.assert_close(here.jvp_fn(v), jacobian @ v)
        torch.testing.assert_close(here.vjp_fn(u)[0], jacobian.T @ u)
    with pytest.raises(lz.errors.MissingDerivativeError, match="materialize"):
        lz.Linearizer(lambda x: f(x, Scaled.apply)).at(x).jvp_fn(x)


class ExpInPlace(torch.autograd.Function):
    """exp(x) in place of x, which both methods read."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, marked_last: bool) -> torch.Tensor:
        x.exp_()
        if not marked_last:
            ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        if marked_last:
            ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        return g * ctx.saved_tensors[0], None

    @staticmethod
    def jvp(ctx: Any, t: torch.Tensor, _: None) -> torch.Tensor:
        return t.mul_(ctx.saved_tensors[0])


@pytest.mark.parametrize("marked_last", [False, True])
def test_functions_in_place_may_save_their_output_for_both_methods(marked_last: bool) -> None:
    x, v = numbers(4), numbers(4, seed=1)
    lin = lz.Linearizer(lambda x: ExpInPlace.apply(x * 1, marked_last) * 1)
    for shift in (0.0, 1.0):
        here = lin.at(x + shift)
        for _ in range(4):
            torch.testing.assert_close(here.jvp_fn(v), (x + shift).exp() * v)
            torch.testing.assert_close(here.vjp_fn(v)[0], (x + shift).exp() * v)


def test_what_f_changes_after_a_function_in_place_is_still_seen() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = ExpInPlace.apply(x * 1, False)
        z = y * 1
        with torch.no_grad():
            y.mul_(2)
        return z

    here = lz.Linearizer(f).at(numbers(4))
    with pytest.raises(lz.errors.StalenessError):
        here.jvp_fn(numbers(4))
