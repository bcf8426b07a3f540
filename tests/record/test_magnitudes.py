"""Linear, really: at every magnitude, of either sign, and in entries far smaller than others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from torch.nn import functional as F

import linearize as lz
from linearize import sparse
from linearize._spaces.compare import close_at, magnitudes
from linearize.func import linear_transpose

F64 = torch.float64
Gradient = Callable[[torch.Tensor], torch.Tensor]


def function_with(backward: Gradient) -> Any:
    """Return a Function, the identity, with a backward of its own."""

    class Passed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 1.0

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            return backward(g)

    return Passed


def clipped(g: torch.Tensor) -> torch.Tensor:
    g = g.clone()
    g[g > 100] = 100.0
    return g


#: None of these is linear; all look so in single precision for gradients of order one.
BENT: dict[str, Gradient] = {
    "tanh": lambda g: 1e3 * torch.tanh(g / 1e3),
    "asinh": lambda g: 1e4 * torch.asinh(g / 1e4),
    "expm1": lambda g: 1e5 * torch.expm1(g / 1e5),
    "clamp": lambda g: g.clamp(-100, 100),
    "clamp from above": lambda g: g.clamp(max=100),
    "clamp from below": lambda g: g.clamp(min=-100),
    "clamp in place": lambda g: g.clone().clamp_(-100, 100),
    "hardtanh": lambda g: F.hardtanh(g, -100, 100),
    "minimum": lambda g: torch.minimum(g, torch.tensor(100.0)),
    "by norm": lambda g: g / (g.norm() / 1e3).clamp(min=1.0),
    "by norm, from below": lambda g: g * (1e3 / (g.norm() + 1e-6)).clamp(max=1.0),
    "renorm": lambda g: g.reshape(1, -1).renorm(2, 0, 1e3).reshape(g.shape),
    "where": lambda g: torch.where(g > 100, 100.0, g),
    "masked_fill": lambda g: g.masked_fill(g.abs() > 100, 0.0),
    "times a mask": lambda g: g * (g < 100),
    "indexed": clipped,
    "if any": lambda g: g * 0 if bool((g > 100).any()) else g,
    "softshrink": lambda g: F.softshrink(g, 1e-5),
    "hardshrink": lambda g: F.hardshrink(g, 1e-5),
    "round": lambda g: torch.round(g * 1e5) / 1e5,
    "round to decimals": lambda g: torch.round(g, decimals=5),
    "a small constant": lambda g: g + 1e-6,
    "a slope of its own": lambda g: F.leaky_relu(g + 1e3, 0.5) - 1e3,
}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", BENT)
def test_what_bends_gradients_is_refused_by_name(name: str, count: int) -> None:
    function = function_with(BENT[name])
    here = lz.Linearizer(lambda x: function.apply(x) * 2).at(torch.ones(count))
    for _ in range(2):
        with pytest.raises(lz.errors.LinearizeError, match="Passed"):
            here.jvp_fn(torch.ones(count))
    u = torch.ones(count)
    assert torch.equal(here.vjp_fn(u)[0], BENT[name](2 * u))  # the author's, called as it is


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1e-30, 1e-3, 1.0, 1e3, 1e30])
def test_steep_and_flat_maps_are_linear(dtype: torch.dtype, factor: float) -> None:
    if dtype == torch.float16 and not 1e-4 < factor < 1e4:
        return
    a = torch.tensor([1.0, 0.5, -2.0, 3.0], dtype=dtype)
    function = function_with(lambda g: torch.addcmul(torch.zeros_like(g), g * factor, a))
    here = lz.Linearizer(function.apply).at(torch.ones(4, dtype=dtype))
    v = torch.tensor([1.0, 2.0, 3.0, -1.0], dtype=dtype)
    for _ in range(4):
        torch.testing.assert_close(here.jvp_fn(v), v * factor * a, rtol=1e-2, atol=0)


def test_a_kernel_that_compares_is_tried_at_all_magnitudes() -> None:
    backward = function_with(lambda g: torch.where(g > 1e12, 0.0, g))
    here = lz.Linearizer(backward.apply).at(torch.ones(3))
    with pytest.raises(lz.errors.MissingDerivativeError, match="not linear"):
        here.jvp_fn(torch.ones(3))


def test_every_dtype_has_magnitudes_of_either_sign_within_its_range() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, F64, torch.complex64):
        found = magnitudes(dtype)
        assert min(found) < 0 < max(found)
        assert all(np.isfinite(f) and np.log2(abs(f)) % 1 == 0 for f in found)
        one = torch.ones(3, dtype=dtype)
        for f in found:
            assert torch.isfinite(f * one).all()
            assert close_at(f, f * one, f * one)
            assert not close_at(f, one.clamp(max=1.0) if not one.is_complex() else one, f * one)


# -- on request -------------------------------------------------------------------------------


def test_the_matrix_of_a_clipping_backward_is_its_linear_part() -> None:
    here = lz.Linearizer(
        lambda x: function_with(BENT["clamp"]).apply(x) * 2, opaque="materialize"
    ).at(torch.ones(3))
    for _ in range(4):
        assert torch.equal(here.jvp_fn(torch.full((3,), 1e4)), torch.full((3,), 2e4))


@pytest.mark.parametrize("name", ["sign", "square", "absolute value"])
def test_no_matrix_stands_for_what_is_far_from_linear(name: str) -> None:
    backward = {"sign": torch.sign, "square": torch.square, "absolute value": torch.abs}[name]
    here = lz.Linearizer(function_with(backward).apply, opaque="materialize").at(torch.ones(3))
    with pytest.raises(lz.errors.NotLinearError, match="Passed"):
        here.jvp_fn(torch.ones(3))


# -- checks -----------------------------------------------------------------------------------


class OverNumpy(torch.autograd.Function):
    """The identity, whose backward clips out of sight and whose jvp does not."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.clip(g.numpy(), -100, 100))

    @staticmethod
    def jvp(ctx: Any, t: torch.Tensor) -> torch.Tensor:
        return t * 1.0


def test_a_check_finds_gradients_that_are_clipped_out_of_sight() -> None:
    here = lz.Linearizer(lambda x: OverNumpy.apply(x) * 2).at(torch.ones(3))
    here.jvp_fn(torch.ones(3))
    with pytest.raises(lz.errors.NotLinearError, match=r"OverNumpy\.backward is not linear"):
        here.check()


def slightly_wrong(place: int, direction: str, size: float) -> Any:
    """Return a Function whose jvp is wrong in one small row or column."""

    class Slightly(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.scale = torch.ones_like(x)
            ctx.scale[place] = size
            return Slightly.scaled(ctx, x)

        @staticmethod
        def scaled(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            if direction == "row":
                return ctx.scale * (x + x.roll(1))
            x = ctx.scale * x
            return x + x.roll(1)

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            if direction == "row":
                g = ctx.scale * g
                return g + g.roll(-1)
            return ctx.scale * (g + g.roll(-1))

        @staticmethod
        def jvp(ctx: Any, t: torch.Tensor) -> torch.Tensor:
            t = t.clone()
            if direction == "column":
                t[place] = t[place] * 1.5
            y = Slightly.scaled(ctx, t)
            if direction == "row":
                y[place] *= 1.5
            return y

    return Slightly


@pytest.mark.parametrize("direction", ["row", "column"])
@pytest.mark.parametrize(("dtype", "size"), [(F64, 1e-6), (F64, 1e-7), (torch.float32, 1e-3)])
def test_a_check_finds_errors_in_small_rows_and_columns(
    direction: str, dtype: torch.dtype, size: float
) -> None:
    f = slightly_wrong(2, direction, size)
    here = lz.Linearizer(f.apply).at(torch.linspace(1, 2, 6, dtype=dtype))
    with pytest.raises(lz.errors.AdjointError, match=r"Slightly.jvp"):
        here.check()


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_checks_pass_where_entries_differ_by_far(dtype: torch.dtype) -> None:
    scale = torch.logspace(-12, 12, 9, dtype=F64).to(dtype)
    turn = torch.linalg.qr(torch.arange(81.0, dtype=F64).reshape(9, 9).cos())[0].to(dtype)

    def f(x: torch.Tensor) -> torch.Tensor:
        y = scale * (turn @ (scale.flip(0) * x)).sin()
        return torch.cat([y, turn @ y, y - y.roll(1) * (1 + 1e-7), (y - y) * 3])

    for shift in (0.0, 1.0):
        here = lz.Linearizer(f, check="always").at(torch.linspace(0, 1, 9, dtype=dtype) + shift)
        here.jvp_fn(torch.linspace(1, 2, 9, dtype=dtype).cos())
        here.jvp_fn(torch.ones(9, dtype=dtype))
        here.check()


# -- sparse Jacobians -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("large", [1.0, 1e4, 1e12])
@pytest.mark.parametrize("where", ["row", "column"])
def test_a_pattern_that_lacks_entries_is_an_error(
    dtype: torch.dtype, large: float, where: str
) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        if where == "column":
            return x.sin() + torch.cat([x[:1] * large, x[1:].flip(0) * 0.5])
        return torch.cat([x[:1] * large, x[1:] ** 2 + x[1:].flip(0) * 0.5])

    here = lz.Linearizer(f).at(torch.linspace(1, 2, 6, dtype=dtype))
    with pytest.raises(lz.errors.LinearizeError, match=r"lacks entries.*row"):
        sparse.jacobian(here, pattern=scipy.sparse.eye(6))
    full = scipy.sparse.eye(6).tolil()
    for k in range(1, 6):
        full[k, 6 - k] = 1
    found = sparse.jacobian(here, pattern=full).to_dense()
    torch.testing.assert_close(found, here.jacobian.materialize())


def test_a_pattern_may_lack_what_cancels() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = 1e6 * x.sum()
        return torch.cat([x * 1e-3 + y - y, 1e6 * x])

    here = lz.Linearizer(f, simplify=False).at(torch.linspace(1, 2, 6))
    eye = scipy.sparse.vstack([scipy.sparse.eye(6), scipy.sparse.eye(6)])
    sparse.jacobian(here, pattern=eye)


# -- transposes of linear functions -----------------------------------------------------------


@pytest.mark.parametrize("name", BENT)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_functions_that_bend_are_not_transposed(name: str, dtype: torch.dtype) -> None:
    if name in ("minimum", "if any"):
        return  # of another dtype; not a function of tensors alone
    with pytest.raises(lz.errors.NotLinearError, match="not linear"):
        linear_transpose(BENT[name], torch.zeros(3, dtype=dtype))


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.complex64, torch.bfloat16])
def test_linear_functions_are_transposed(dtype: torch.dtype) -> None:
    a = torch.arange(6.0).reshape(2, 3).to(dtype)
    count = 0

    def f(x: dict[str, torch.Tensor]) -> Any:
        nonlocal count
        count += 1
        return a @ x["x"] + 3 * x["y"].sum(), x["x"].flip(0)

    point = {"x": torch.zeros(3, dtype=dtype), "y": torch.zeros(4, dtype=dtype)}
    transposed = linear_transpose(f, point)
    runs = count
    u, w = torch.ones(2, dtype=dtype), torch.arange(3.0).to(dtype)
    for _ in range(4):
        (got,) = transposed((u, w))
        torch.testing.assert_close(got["x"], a.mT @ u + w.flip(0))
        torch.testing.assert_close(got["y"], torch.full((4,), 6.0).to(dtype))
    assert count == runs
