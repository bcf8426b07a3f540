"""Methods that an author did not really give: stubs, wrappers of PyTorch's, older definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import linearize as lz
from linearize._capture.methods import gives_backward, gives_jvp

F64 = torch.float64


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=F64, generator=generator).to(dtype)


class Square(torch.autograd.Function):
    """x² without a jvp."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return 2 * ctx.saved_tensors[0] * g


class Passed(Square):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """To be written."""


class ReturnsNone(Square):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return None


class ReturnsNoneLater(Square):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        if len(tangents) > 3:
            print("not yet")
            return None
        return None


class Raises(Square):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError("no forward mode")


class RaisesInWords(Square):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        kind = type(ctx).__name__
        raise RuntimeError(f"{kind}: no forward mode")


class Real(Square):
    @staticmethod
    def jvp(ctx: Any, t: torch.Tensor) -> torch.Tensor:
        return 2 * ctx.saved_tensors[0] * t


class SometimesNone(Square):
    @staticmethod
    def jvp(ctx: Any, t: torch.Tensor | None) -> torch.Tensor | None:
        if t is None:
            return None
        return 2 * ctx.saved_tensors[0] * t


STUBS = [Passed, ReturnsNone, ReturnsNoneLater, Raises]


@pytest.mark.parametrize("function", [*STUBS, Real, SometimesNone, Square])
def test_a_stub_is_no_jvp(function: Any) -> None:
    assert gives_jvp(function) == (function in (Real, SometimesNone))
    assert gives_backward(function)
    x, v = numbers(4), numbers(4, seed=1)
    lin = lz.Linearizer(lambda x: function.apply(x).sin())
    for shift in (0.0, 1.0):
        here = lin.at(x + shift)
        slope = 2 * (x + shift) * ((x + shift) ** 2).cos()
        for _ in range(4):
            torch.testing.assert_close(here.jvp_fn(v), slope * v)
            torch.testing.assert_close(here.vjp_fn(v)[0], slope * v)
        here.check()


def test_the_error_of_an_author_reaches_the_caller() -> None:
    assert gives_jvp(RaisesInWords)
    here = lz.Linearizer(RaisesInWords.apply).at(numbers(3))
    with pytest.raises(RuntimeError, match="no forward mode"):
        here.jvp_fn(numbers(3))


def test_a_choice_between_a_tangent_and_none_is_no_stub() -> None:
    class Chooses(Square):
        @staticmethod
        def jvp(ctx: Any, t: torch.Tensor | None) -> torch.Tensor | None:
            return None if t is None else 2 * ctx.saved_tensors[0] * t

    class ChoosesLast(Square):
        @staticmethod
        def jvp(ctx: Any, t: torch.Tensor | None) -> torch.Tensor | None:
            return 2 * ctx.saved_tensors[0] * t if t is not None else None

    assert gives_jvp(Chooses)
    assert gives_jvp(ChoosesLast)


def test_a_stub_beside_an_opaque_backward_is_named() -> None:
    class Opaque(ReturnsNone):
        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(g.numpy() * 2)

    with pytest.raises(lz.errors.MissingDerivativeError, match=r"Opaque has no jvp"):
        lz.Linearizer(Opaque.apply).at(numbers(3)).jvp_fn(numbers(3))


# -- functions that torch.vmap makes --------------------------------------------------------------


class Mapped(torch.autograd.Function):
    """x² w, for torch.vmap."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x**2 * w

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        x, w = ctx.saved_tensors
        return 2 * x * w * g, x**2 * g


class MappedWithJvp(Mapped):
    @staticmethod
    def jvp(ctx: Any, dx: torch.Tensor, dw: torch.Tensor) -> torch.Tensor:
        x, w = ctx.saved_tensors
        return 2 * x * w * dx + x**2 * dw


class MappedByJvp(MappedWithJvp):
    backward = staticmethod(torch.autograd.Function.backward)


@pytest.mark.parametrize("function", [Mapped, MappedWithJvp, MappedByJvp])
@pytest.mark.parametrize("depth", [1, 2])
def test_functions_under_vmap_have_what_their_author_gave(function: Any, depth: int) -> None:
    def f(x: torch.Tensor, w: torch.Tensor, apply: Any = function.apply) -> torch.Tensor:
        inner = apply if depth == 1 else torch.vmap(apply, (0, None))
        return torch.vmap(inner, (0, None))(x, w).sin()

    x, w = numbers(3, 2), numbers(2, seed=3) if depth == 1 else numbers(1, seed=3)[0]
    lin = lz.Linearizer(f)
    for shift in (0.0, 1.0):
        here = lin.at(x + shift, w)
        for seed in range(4):
            v = numbers(3, 2, seed=seed + 4), numbers(*w.shape, seed=seed + 9)
            u = numbers(3, 2, seed=seed + 5)
            plain = lambda x, w: (x**2 * w).sin()  # noqa: E731
            want = torch.func.jvp(plain, (x + shift, w), v)[1]
            torch.testing.assert_close(here.jvp_fn(*v), want)
            if function is not MappedByJvp:
                for a, b in zip(
                    here.vjp_fn(u), torch.func.vjp(plain, x + shift, w)[1](u), strict=True
                ):
                    torch.testing.assert_close(a, b)


# -- operators that are defined anew --------------------------------------------------------------


def scaled_by(k: float) -> Any:
    @torch.library.custom_op("linearize_methods::scaled", mutates_args=())
    def scaled(x: torch.Tensor) -> torch.Tensor:
        return x * k

    scaled.register_autograd(lambda ctx, g: g * k)
    return scaled


def test_a_registered_jvp_goes_with_its_definition() -> None:
    x, v = numbers(3), numbers(3, seed=1)
    calls = []

    def doubled(ctx: Any, t: torch.Tensor) -> torch.Tensor:
        calls.append(2)
        return 2 * t

    first = scaled_by(2.0)
    lz.register_jvp(first, doubled)
    before = lz.Linearizer(lambda x: first(x)).at(x)
    torch.testing.assert_close(before.jvp_fn(v), 2 * v)
    assert calls == [2]
    second = scaled_by(3.0)
    here = lz.Linearizer(lambda x: second(x)).at(x)
    for _ in range(4):
        torch.testing.assert_close(here.jvp_fn(v), 3 * v)
        torch.testing.assert_close(here.vjp_fn(v)[0], 3 * v)
    here.check()
    assert calls == [2]
    lz.register_jvp(second, lambda ctx, t: 3 * t)
    again = lz.Linearizer(lambda x: second(x)).at(x)
    torch.testing.assert_close(again.jvp_fn(v), 3 * v)


@pytest.mark.parametrize("materialize", [None, True, False])
def test_a_registered_jvp_gets_zeros_for_constants(materialize: bool | None) -> None:
    @torch.library.custom_op("linearize_methods::product", mutates_args=())
    def product(x: torch.Tensor, y: torch.Tensor, k: float) -> torch.Tensor:
        return x * y * k

    def remember(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.k = inputs[2]
        if materialize is not None:
            ctx.set_materialize_grads(materialize)

    def backward(ctx: Any, g: torch.Tensor) -> Any:
        x, y = ctx.saved_tensors
        return g * y * ctx.k, g * x * ctx.k, None

    product.register_autograd(backward, setup_context=remember)
    seen = []

    def jvp(ctx: Any, *tangents: Any) -> torch.Tensor:
        seen.append(tangents)
        (x, y), (dx, dy, _) = ctx.saved_tensors, tangents
        return (dx * y + x * dy) * ctx.k

    lz.register_jvp(product, jvp)
    x, y, v = numbers(3), numbers(3, seed=1), numbers(3, seed=2)
    here = lz.Linearizer(lambda x: product(x, y, 2.0)).at(x)
    for _ in range(3):
        torch.testing.assert_close(here.jvp_fn(v), 2 * y * v)
    for _, dy, k in seen:
        assert k is None
        assert torch.equal(dy, torch.zeros_like(y))
