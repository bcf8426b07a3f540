"""Derivatives of derivatives through custom Functions: right, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import linearize as lz
import linearize.func as lf
from linearize import curvature, functional, implicit
from linearize.errors import UnsupportedError

D = torch.float64
X = torch.tensor([1.5, 2.0], dtype=D)
V = torch.tensor([1.0, -0.5], dtype=D)


class Cube(Function):
    """x³; a backward that PyTorch can differentiate."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        return 3 * ctx.saved_tensors[0] ** 2 * g


class KeepsInput(Cube):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.x = x
        return x**3

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        return 3 * ctx.x**2 * g


class Checks(Cube):
    """Looks at numbers, and makes no use of them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        if not bool(torch.isfinite(x).all()):
            raise ValueError("not finite")
        ctx.scale, ctx.mask = 3.0, (x > 0).to(x.dtype)
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        assert bool((g == g).all())
        (x,) = ctx.saved_tensors
        return ctx.scale * x**2 * g + torch.zeros_like(g)


class SquareNumpy(Function):
    """g·3x² over NumPy, with derivatives of its own in both directions."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, g)
        return torch.from_numpy(3 * x.detach().numpy() ** 2 * g.detach().numpy())

    @staticmethod
    def backward(ctx: Any, u: torch.Tensor) -> Any:
        x, g = ctx.saved_tensors
        return 6 * x * g * u, 3 * x**2 * u

    @staticmethod
    def jvp(ctx: Any, dx: Any, dg: Any) -> Any:
        x, g = ctx.saved_tensors
        return 6 * x * g * dx + 3 * x**2 * dg


class ThroughAnother(Cube):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().numpy() ** 3)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        return SquareNumpy.apply(ctx.saved_tensors[0], g)

    @staticmethod
    def jvp(ctx: Any, t: torch.Tensor) -> torch.Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * t


class Once(Cube):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        return 3 * ctx.saved_tensors[0] ** 2 * g


class OverNumpy(Cube):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.n = x.detach().numpy().copy()
        return torch.from_numpy(ctx.n**3)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        return torch.from_numpy(3 * ctx.n**2 * g.detach().numpy())


class HalfNumpy(Cube):
    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        rest = torch.from_numpy(2 * x.detach().numpy() ** 2 * g.detach().numpy())
        return x**2 * g + rest


class SlopeOverNumpy(Cube):
    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        return torch.from_numpy(3 * ctx.saved_tensors[0].detach().numpy() ** 2) * g


class SlopeKept(Cube):
    """The slope is kept by `forward`, where nothing has a history."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(3 * x**2)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        return ctx.saved_tensors[0] * g


class SlopeAttribute(Cube):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.slope = 3 * x.detach() ** 2
        return x**3

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        return ctx.slope * g


class SlopeNumpyKept(Cube):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.slope = 3 * x.detach().numpy() ** 2
        return x**3

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        return torch.as_tensor(ctx.slope) * g


class SlopeNumpySaved(Cube):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(torch.from_numpy(3 * x.detach().numpy() ** 2))
        return x**3

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        return ctx.saved_tensors[0] * g


class Items(Cube):
    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return torch.stack([3 * t.item() ** 2 * u for t, u in zip(x.detach(), g, strict=True)])


class ItemsInForward(Cube):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.slopes = [3 * t.item() ** 2 for t in x]
        return x**3

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        return torch.stack([s * u for s, u in zip(ctx.slopes, g, strict=True)])


class UnderNoGrad(Cube):
    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        with torch.no_grad():
            slope = 3 * ctx.saved_tensors[0] ** 2
        return slope * g


class Detaches(Cube):
    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return x * 3 * x.detach() * g


class Data(Cube):
    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return x * 3 * x.data * g


class Filled(Cube):
    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        slope = torch.empty_like(x)
        slope.numpy()[:] = 3 * x.detach().numpy() ** 2
        return slope * g


class AutogradInside(Cube):
    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = x**3
        return torch.autograd.grad(y, x, g)


@torch.library.custom_op("second_derivatives::cube", mutates_args=())
def cube_op(x: torch.Tensor) -> torch.Tensor:
    return x**3


@torch.library.custom_op("second_derivatives::slope", mutates_args=())
def slope_op(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return 3 * x**2 * g


@slope_op.register_fake
def _(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


cube_op.register_autograd(
    lambda ctx, g: slope_op(ctx.saved_tensors[0], g),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@torch.library.custom_op("second_derivatives::opaque", mutates_args=())
def opaque_op(x: torch.Tensor) -> torch.Tensor:
    return x**3


opaque_op.register_autograd(
    lambda ctx, g: torch.from_numpy(
        3 * ctx.saved_tensors[0].detach().numpy() ** 2 * g.detach().numpy()
    ),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)

Apply = Callable[[torch.Tensor], torch.Tensor]
RIGHT: dict[str, Apply] = {
    cls.__name__: cls.apply for cls in (Cube, KeepsInput, Checks, ThroughAnother)
}
REFUSED: dict[str, Apply] = {
    cls.__name__: cls.apply
    for cls in (
        Once,
        OverNumpy,
        HalfNumpy,
        SlopeOverNumpy,
        SlopeKept,
        SlopeAttribute,
        SlopeNumpyKept,
        SlopeNumpySaved,
        Items,
        ItemsInForward,
        UnderNoGrad,
        Detaches,
        Data,
        Filled,
        AutogradInside,
    )
} | {"second_derivatives_opaque": opaque_op, "slope": cube_op}

#: Hessian times V of a scalar function of the cubes, by every face that has one.
HESSIANS: dict[str, Callable[[Any], torch.Tensor]] = {
    "func.hessian": lambda f: lf.hessian(f)(X) @ V,
    "func.jacfwd of jacrev": lambda f: lf.jacfwd(lambda x: lf.jacrev(f)(x))(X) @ V,
    "functional.hessian": lambda f: functional.hessian(f, X) @ V,
    "functional.hvp": lambda f: functional.hvp(f, X, V)[1],
    "functional.vhp": lambda f: functional.vhp(f, X, V)[1],
    "functional.hvp, create_graph": lambda f: functional.hvp(f, X, V, create_graph=True)[1],
    "curvature.hessian": lambda f: curvature.hessian(f, X) @ V,
    "double backward of the value": lambda f: _double(f),
}


def _double(f: Any) -> torch.Tensor:
    x = X.clone().requires_grad_()
    (g,) = torch.autograd.grad(lf.vjp(f, x)[0], x, create_graph=True)
    return torch.autograd.grad(g, x, V)[0]


OUTER: dict[str, tuple[Callable[[Apply], Any], Any]] = {
    "sum": (lambda c: lambda x: c(x).sum(), 6 * X * V),
    "square": (lambda c: lambda x: (c(x) ** 2).sum(), 30 * X**4 * V),
    "weighted": (lambda c: lambda x: (x * c(x)).sum(), 12 * X**2 * V),
}


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("face", HESSIANS)
@pytest.mark.parametrize("name", RIGHT)
def test_right_where_the_backward_has_a_derivative(name: str, face: str, outer: str) -> None:
    make, expected = OUTER[outer]
    if name == "ThroughAnother" and face == "func.jacfwd of jacrev" and outer != "sum":
        pytest.skip("refused: the history of a Jacobian is not transposed through an opaque jvp")
    torch.testing.assert_close(HESSIANS[face](make(RIGHT[name])), expected)


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("face", HESSIANS)
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_where_it_has_none(name: str, face: str, outer: str) -> None:
    make, _ = OUTER[outer]
    # An operator without any formula raises what PyTorch says of it.
    kind = RuntimeError if name == "slope" else UnsupportedError
    with pytest.raises(kind, match=name):
        HESSIANS[face](make(REFUSED[name]))


def test_gauss_newton_losses_and_minima_are_refused_too() -> None:
    params = {"w": X.clone()}
    losses: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        name: (lambda y, apply=apply: apply(y).sum()) for name, apply in REFUSED.items()
    }
    for name in ("Once", "OverNumpy", "HalfNumpy", "Items"):
        with pytest.raises(UnsupportedError, match=name):
            curvature.gauss_newton(lambda p: 2 * p["w"], params, losses[name])
    right = curvature.gauss_newton(lambda p: 2 * p["w"], params, lambda y: Cube.apply(y).sum())
    torch.testing.assert_close(right @ {"w": V}, {"w": 4 * 6 * 2 * X * V})

    p = X.clone().requires_grad_()
    found = p.detach() ** 2
    for apply in (Once.apply, OverNumpy.apply):
        with pytest.raises(UnsupportedError, match="second derivative"):
            implicit.minimum(lambda x, p, apply=apply: (apply(x) / 3 - p**4 * x).sum(), found, p)
    x = implicit.minimum(lambda x, p: (Cube.apply(x) / 3 - p**4 * x).sum(), found, p)
    torch.testing.assert_close(torch.autograd.grad(x.sum(), p)[0], 2 * X)


@pytest.mark.parametrize("name", REFUSED)
def test_a_product_differentiated_by_the_point_is_refused(name: str) -> None:
    kind = RuntimeError if name == "slope" else UnsupportedError
    x, u = X.clone().requires_grad_(), V.clone().requires_grad_()
    (g,) = lf.vjp(REFUSED[name], x)[1](u)
    torch.testing.assert_close(g.detach(), 3 * X**2 * V)
    with pytest.raises(kind, match=name):
        (g.sum() + (x**2).sum()).backward()
    J = lf.jacrev(REFUSED[name])(x)
    with pytest.raises(kind, match=name):
        J.sum().backward()


@pytest.mark.parametrize("name", RIGHT)
def test_a_product_differentiated_by_the_point_is_right(name: str) -> None:
    x, u = X.clone().requires_grad_(), V.clone().requires_grad_()
    for g in (lf.vjp(RIGHT[name], x)[1](u)[0], lf.jvp(RIGHT[name], (x,), (u,))[1]):
        by_x, by_u = torch.autograd.grad((g * g).sum(), [x, u])
        torch.testing.assert_close(by_x, 36 * X**3 * V**2)
        torch.testing.assert_close(by_u, 18 * X**4 * V)


def test_third_derivatives() -> None:
    x = X.clone().requires_grad_()
    (h,) = torch.autograd.grad(lf.vjp(Cube.apply, x)[1](V)[0].sum(), x, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(h.sum(), x)[0], 6 * V)


def test_a_function_that_is_not_refused_is_called_as_often_as_before() -> None:
    calls = []

    class Counted(Cube):
        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> Any:
            calls.append(1)
            return 3 * ctx.saved_tensors[0] ** 2 * g

    here = curvature.hessian(lambda x: Counted.apply(x).sum(), X)
    assert len(calls) == 1
    for _ in range(5):
        torch.testing.assert_close(here @ V, 6 * X * V)


def test_contexts_are_left_as_they_were() -> None:
    kept = []

    class Kept(Cube):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            kept.append(ctx)
            ctx.save_for_backward(x)
            return x**3

    lf.hessian(lambda x: Kept.apply(x).sum())(X)
    assert not vars(kept.pop())


def test_an_object_computed_outside_is_no_constant() -> None:
    class Array(Cube):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.kept = {"slope": np.square(x.detach().numpy()) * 3}
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> Any:
            return torch.as_tensor(ctx.kept["slope"]) * g + 0 * ctx.saved_tensors[0]

    with pytest.raises(UnsupportedError, match=r"Array.*ctx\.kept"):
        lf.hessian(lambda x: Array.apply(x).sum())(X)


def test_first_derivatives_need_no_second_one() -> None:
    for apply in REFUSED.values():
        here = lz.Linearizer(apply).at(X)
        torch.testing.assert_close(here.vjp_fn(V)[0], 3 * X**2 * V)
        torch.testing.assert_close(lf.vjp(apply, X)[1](V)[0], 3 * X**2 * V)


class InPlace(Function):
    """Writes into a view, so that its node is hidden inside another."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.kept = x.detach().clone()
        x.pow_(3)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        return 3 * ctx.kept**2 * g


def test_a_node_hidden_inside_another() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x * 1.0
        InPlace.apply(y[:1])
        return y.sum()

    with pytest.raises(UnsupportedError, match="InPlace"):
        lf.hessian(f)(X)


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_a_checkpoint(reentrant: bool) -> None:
    def loss(apply: Apply) -> Apply:
        def block(x: torch.Tensor) -> torch.Tensor:
            return apply(x).sin()

        return lambda x: checkpoint(block, x * 1, use_reentrant=reentrant).sum()

    expected = torch.func.hessian(lambda x: (x**3).sin().sum())(X)
    for cls in (Cube, KeepsInput):
        torch.testing.assert_close(lf.hessian(loss(cls.apply))(X), expected)
    for cls in (Once, SlopeKept, SlopeOverNumpy):
        with pytest.raises(UnsupportedError, match=cls.__name__):
            lf.hessian(loss(cls.apply))(X)


class Mapped(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor) -> Any:
        return x**3, 3 * x**2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs, output[1].detach())

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor, _: Any) -> Any:
        return 3 * ctx.saved_tensors[0] ** 2 * g


class MappedDetached(Mapped):
    @staticmethod
    def backward(ctx: Any, g: torch.Tensor, _: Any) -> Any:
        return 3 * ctx.saved_tensors[0].detach() ** 2 * g


class MappedKept(Mapped):
    @staticmethod
    def backward(ctx: Any, g: torch.Tensor, _: Any) -> Any:
        return ctx.saved_tensors[1] * g


@pytest.mark.parametrize("mapped", [False, True])
def test_inside_vmap(mapped: bool) -> None:
    def loss(cls: Any) -> Apply:
        def single(x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = cls.apply(x)[0]
            return result

        return lambda x: (torch.vmap(single)(x) if mapped else single(x)).sum()

    torch.testing.assert_close(lf.hessian(loss(Mapped))(X), torch.diag(6 * X))
    for cls in (MappedDetached, MappedKept):
        with pytest.raises(UnsupportedError, match=cls.__name__):
            lf.hessian(loss(cls))(X)
