"""Points of one structure share their programs; whatever differs is seen."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import linearize as lz
from linearize.errors import StalenessError


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype)


def check(lin: lz.Linearizer, f: Callable[..., Any], *primals: Any, calls: int = 4) -> None:
    """Compare both products at a point with PyTorch's, more than once."""
    here = lin.at(*primals)
    for _ in range(calls):
        v = tuple(torch.randn_like(p) for p in primals)
        value, expected = torch.func.jvp(f, primals, v)
        u = torch.randn_like(value)
        torch.testing.assert_close(here.jvp_fn(*v), expected)
        torch.testing.assert_close(here.vjp_fn(u), torch.func.vjp(f, *primals)[1](u))


def counts(lin: lz.Linearizer) -> tuple[int, int]:
    stats = lin.stats()
    return stats.recorded, stats.reused


W = torch.linspace(-1, 1, 35, dtype=torch.float64).reshape(5, 7)


def layers(x: torch.Tensor) -> torch.Tensor:
    y = torch.tanh(x @ W) * 1.5 + torch.softmax(x @ W, -1)
    return torch.cat([y.sin().exp(), y.roll(1, -1) ** 2 / 3, y[:, 1:3]], -1).cumsum(0)


def burgers(u: torch.Tensor) -> torch.Tensor:
    for _ in range(5):
        u = u - 0.1 * u * (u - u.roll(1)) + 0.05 * (u.roll(1) - 2 * u + u.roll(-1))
    return u


def network() -> Callable[..., Any]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.GELU(), nn.Flatten(), nn.Linear(48, 4)
    )
    return net.double().eval().requires_grad_(requires_grad=False)


def attention() -> Callable[..., Any]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return layer.double().requires_grad_(requires_grad=False)


@pytest.mark.parametrize(
    ("f", "shape"),
    [(layers, (4, 5)), (burgers, (9,)), (network(), (2, 2, 6, 6))],
    ids=["layers", "burgers", "convolutions"],
)
def test_a_loop_over_points_records_once(f: Callable[..., Any], shape: tuple[int, ...]) -> None:
    lin = lz.Linearizer(f)
    for calls in (4, 1, 2, 4, 1):
        check(lin, f, randn(*shape), calls=calls)
    assert counts(lin) == (1, 4)


def test_attention_records_once() -> None:
    layer = attention()

    def f(x: torch.Tensor) -> torch.Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return layer(x)

    lin = lz.Linearizer(f)
    for _ in range(3):
        check(lin, f, randn(2, 3, 8))
    assert counts(lin) == (1, 2)


def test_a_newton_loop_records_once_and_converges() -> None:
    target = randn(6).abs()
    lin = lz.Linearizer(lambda x: x**3 + x - target)
    x = torch.ones(6, dtype=torch.float64)
    for _ in range(50):
        here = lin.at(x)
        J = torch.stack([here.jvp_fn(e) for e in torch.eye(6, dtype=torch.float64)], 1)
        x = x - torch.linalg.solve(J, here.value)
    assert here.value.abs().max() < 1e-12
    assert counts(lin) == (1, 49)


def test_each_branch_is_a_structure_of_its_own() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return x.sin() * 2 if x.sum() > 0 else x.cos() * x

    lin = lz.Linearizer(f)
    a = randn(5).abs()
    for x in (a, -a, a + 1, -a - 1, a + 2):
        check(lin, f, x)
    assert counts(lin) == (2, 3)


@pytest.mark.parametrize(
    "make",
    [
        lambda k: lambda x: x.sin() * (2.0 + k),
        lambda k: lambda x: x.abs() ** (2.0 + k),
        lambda k: lambda x: x.sin().roll(k, 0),
        lambda k: lambda x: x.sin() * x.detach().norm().item(),
        lambda k: lambda x: torch.where(x.sin() > 0, x * k, x.exp()),
        lambda k: lambda x: nn.functional.leaky_relu(x * 2, 0.1 + k),
        lambda k: lambda x: nn.functional.softplus(x, 1.0 + k),
        lambda k: lambda x: x.sin().clamp(-0.3, 0.1 + k / 10),
        lambda k: lambda x: x.sin().view(3, 4).transpose(0, 1).sum(k % 2),
        lambda k: lambda x: x.sin()[torch.tensor([k % 5, 2, 3])],
        lambda k: lambda x: torch.cat([torch.ones(1 + k % 2), x.sin(), torch.ones(2 - k % 2)]),
        lambda k: lambda x: x.sin().as_strided((3,), (1 + k % 3,)),
        lambda k: lambda x: (x.sin() * (k + 1)).sum().expand(3) * W[0, k],
        lambda k: lambda x: x.sin().index_fill(0, torch.tensor([k % 5]), 0.0),
    ],
)
def test_static_arguments_that_differ_are_seen(make: Callable[[int], Any]) -> None:
    k = 0
    lin = lz.Linearizer(lambda x: make(k)(x))
    for i in range(6):
        k = i
        check(lin, make(k), randn(12), calls=3)
        check(lin, make(k), randn(12), calls=1)


def test_shapes_and_dtypes_that_differ_are_seen() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return x.sin() * x.sum()

    lin = lz.Linearizer(f)
    for x in (randn(3), randn(4), randn(2, 3), randn(3, dtype=torch.float32), randn(3), randn(4)):
        check(lin, f, x)
    assert counts(lin) == (4, 2)


def test_two_arguments_that_were_one_tensor_are_told_apart() -> None:
    def f(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x * y + (x * y).sin()

    lin = lz.Linearizer(f)
    x = randn(4)
    for y in (x, randn(4), x, randn(4)):
        check(lin, f, x, y)


def test_weights_that_were_trained_in_between_are_used() -> None:
    w = randn(5, 5)

    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ w) @ w

    lin = lz.Linearizer(f)
    for _ in range(4):
        check(lin, f, randn(3, 5))
        w.mul_(1.1).add_(0.05)
    assert counts(lin) == (1, 3)


@pytest.mark.parametrize("folded", [False, True])
def test_a_residual_changed_at_a_later_point_is_an_error(folded: bool) -> None:
    w = randn(5)

    def f(x: torch.Tensor) -> torch.Tensor:
        return (x * w).sin() * w if folded else (x * w).cumsum(0)

    lin = lz.Linearizer(f)
    check(lin, f, randn(5))
    here = lin.at(randn(5))
    here.jvp_fn(randn(5))
    here.vjp_fn(randn(5))
    w.mul_(2)
    with pytest.raises(StalenessError):
        here.jvp_fn(randn(5))
    with pytest.raises(StalenessError):
        here.vjp_fn(randn(5))
    untouched = lin.at(randn(5))
    w.mul_(2)
    with pytest.raises(StalenessError):
        untouched.jvp_fn(randn(5))
    check(lin, f, randn(5))


def test_a_factor_that_overflows_elsewhere_is_not_folded() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return (x * a) * b

    a, b = randn(3).fill_(1e200), randn(3).fill_(1e-200)
    lin = lz.Linearizer(f)
    check(lin, f, randn(3))
    a.fill_(1e300)
    b.fill_(1e300)
    here = lin.at(randn(3))
    tiny = randn(3).fill_(1e-300)
    torch.testing.assert_close(here.jvp_fn(tiny), tiny * 1e300 * 1e300)
    assert counts(lin) == (1, 1)


class Opaque(torch.autograd.Function):
    """x², through NumPy."""

    forwards = 0

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        Opaque.forwards += 1
        ctx.x = x.numpy(force=True).copy()
        return torch.from_numpy(ctx.x**2)

    @staticmethod
    def backward(ctx: Any, u: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(2 * ctx.x * u.numpy(force=True))

    @staticmethod
    def jvp(ctx: Any, v: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(2 * ctx.x * v.numpy(force=True))


def test_opaque_functions_are_called_with_the_context_of_their_point() -> None:
    lin = lz.Linearizer(lambda x: Opaque.apply(Opaque.apply(x.sin()) + x) * 3)
    Opaque.forwards = 0

    def plain(x: torch.Tensor) -> torch.Tensor:
        return (x.sin() ** 2 + x) ** 2 * 3

    for _ in range(4):
        check(lin, plain, randn(5))
    assert counts(lin) == (1, 3)
    assert Opaque.forwards == 8


class BackwardOnly(torch.autograd.Function):
    """k x³ with a backward in PyTorch's operations and a number that no graph shows."""

    k = 1.0

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.k = BackwardOnly.k
        return BackwardOnly.k * x**3

    @staticmethod
    def backward(ctx: Any, u: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 3 * ctx.k * x**2 * u


def test_a_backward_that_is_transposed_is_read_at_each_point() -> None:
    lin = lz.Linearizer(lambda x: BackwardOnly.apply(x.sin()))
    for k in (1.0, 2.0, 2.0, 3.5):
        BackwardOnly.k = k
        check(lin, lambda x, k=k: k * x.sin() ** 3, randn(4))


def test_missing_tangents_are_structures_of_their_own() -> None:
    def f(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.sin() * y.exp()

    lin = lz.Linearizer(f)
    for _ in range(3):
        x, y, v = randn(4), randn(4), randn(4)
        here = lin.at(x, y)
        for _ in range(4):
            torch.testing.assert_close(here.jvp_fn(v, None), x.cos() * y.exp() * v)
            torch.testing.assert_close(here.jvp_fn(None, v), x.sin() * y.exp() * v)
    assert counts(lin) == (1, 2)


def test_the_program_of_a_later_point_has_its_numbers() -> None:
    lin = lz.Linearizer(layers)
    check(lin, layers, randn(4, 5))
    x = randn(4, 5)
    here = lin.at(x)
    text = str(here.program)
    assert "pushforward" in text
    assert "pullback" in text
    v = randn(4, 5)
    torch.testing.assert_close(here.jvp_fn(v), torch.func.jvp(layers, (x,), (v,))[1])
    torch.testing.assert_close(here.jvp_fn.batched(torch.stack([v, 2 * v]))[1], 2 * here.jvp_fn(v))


def test_products_of_later_points_are_differentiable() -> None:
    lin = lz.Linearizer(lambda x: x.sin().cumsum(0))
    check(lin, lin.f, randn(4))
    here = lin.at(randn(4))
    v = randn(4).requires_grad_()
    u = randn(4)
    here.jvp_fn(v).backward(u)
    torch.testing.assert_close(v.grad, here.vjp_fn(u)[0])


def test_a_structure_keeps_no_tensor_of_a_point() -> None:
    lin = lz.Linearizer(lambda x: (x.sin() * x).cumsum(0).exp(), maxsize=1)
    alive = []
    for _ in range(3):
        x = randn(1000)
        here = lin.at(x)
        for _ in range(4):
            here.jvp_fn(x)
            here.vjp_fn(x)
        alive += [weakref.ref(r.tensor) for r in here.program.pullback.residuals()]
        alive += [weakref.ref(r.tensor) for r in here.program.pushforward.residuals()]
        del here, x
    lin.clear()
    gc.collect()
    assert len(alive) >= 6
    assert not any(ref() is not None for ref in alive)


def test_what_was_folded_is_let_go_at_later_points_too() -> None:
    def chain(x: torch.Tensor) -> torch.Tensor:
        for _ in range(100):
            x = torch.sin(x) * 1.1 - 0.028
        return x

    lin = lz.Linearizer(chain)
    check(lin, chain, randn(1000))
    x = randn(1000)
    here = lin.at(x)
    here.jvp_fn(x)
    here.vjp_fn(x)
    assert counts(lin) == (1, 1)
    assert here.nbytes <= 2 * x.nbytes


def test_a_product_of_two_points_reads_the_numbers_of_both() -> None:
    """Points of one structure run one program, each with numbers of its own."""
    lin = lz.Linearizer(lambda x: x.sin() * x.exp())
    x, y = (torch.linspace(0.1, k, 4, dtype=torch.float64) for k in (1, 2))
    here, there = lin.at(x), lin.at(y)
    for _ in range(4):  # what comes of both directions is simplified and shared
        here.jvp_fn(x), here.vjp_fn(x), there.jvp_fn(x), there.vjp_fn(x)
    both = here.jvp_fn._then(there.vjp_fn, "both")
    turned = both._transposed()

    def d(x: torch.Tensor) -> torch.Tensor:
        return x.exp() * (x.sin() + x.cos())

    for _ in range(5):
        torch.testing.assert_close(both._apply([x])[0], d(x) * d(y) * x)
        torch.testing.assert_close(turned._apply([x])[0], d(x) * d(y) * x)
        here.jvp_fn(x), there.vjp_fn(x)
