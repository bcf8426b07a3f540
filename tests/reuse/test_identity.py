"""Graphs that differ in nothing but which of their tensors are the same.

What was recorded of one must not serve the other: a program reads each number where its own
graph keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import pytest
import torch

import linearize as lz
from linearize._reuse.shared import SHARED

D = torch.float64
N = 4

Function: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
Make: TypeAlias = Callable[[Any, Any], Function]


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (N,)), dtype=D, generator=torch.Generator().manual_seed(seed))


def mask(seed: int) -> torch.Tensor:
    return numbers(seed) > 0


def index(seed: int) -> torch.Tensor:
    return torch.randint(N, (N,), generator=torch.Generator().manual_seed(seed))


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a)
        return x * a

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        return g * ctx.saved_tensors[0], None

    @staticmethod
    def jvp(ctx: Any, t: torch.Tensor, _: Any) -> torch.Tensor:
        return t * ctx.saved_tensors[0]


def whole(seed: int) -> torch.Tensor:
    return numbers(seed, 2 * N)


def image(f: Callable[[torch.Tensor], torch.Tensor]) -> Function:
    return lambda x: f(x.reshape(1, 1, 2, 2)).reshape(-1)


#: What makes a function of two constants, and what makes a constant.
KINDS: dict[str, tuple[Make, Callable[[int], Any]]] = {
    "factors": (lambda a, b: lambda x: x * a * b, numbers),
    "masks": (lambda a, b: lambda x: ((x * a).tanh() * b).tanh(), numbers),
    "quotients": (lambda a, b: lambda x: x / a / b, numbers),
    "sum": (lambda a, b: lambda x: (x * a).exp() - (x * b).exp(), numbers),
    "nonlinear": (lambda a, b: lambda x: (x * a).sin() * (x + b).cos() * b, numbers),
    "where": (
        lambda a, b: lambda x: torch.where(a, x.sin(), x) * torch.where(b, x, 3 * x),
        mask,
    ),
    "masked_fill": (
        lambda a, b: lambda x: x.masked_fill(a, 0.0).sin() + x.masked_fill(b, 0.0),
        mask,
    ),
    "index": (lambda a, b: lambda x: x[a].sin() * x[b], index),
    "gather": (lambda a, b: lambda x: x.gather(0, a).sin() * x.gather(0, b), index),
    "index_select": (
        lambda a, b: lambda x: x.index_select(0, a).sin() * x.index_select(0, b),
        index,
    ),
    "index_add": (
        lambda a, b: lambda x: torch.zeros(N, dtype=D).index_add(0, a, x).sin().index_add(0, b, x),
        index,
    ),
    "matrices": (lambda a, b: lambda x: a @ (b @ x).sin(), lambda s: numbers(s, N, N)),
    "bilinear": (lambda a, b: lambda x: (x @ a) * (x @ b).sin(), lambda s: numbers(s, N, N)),
    "convolution": (
        lambda a, b: image(
            lambda x: torch.conv2d(torch.conv2d(x, a, padding=1).tanh(), b, padding=1)
        ),
        lambda s: numbers(s, 1, 1, 3, 3),
    ),
    "powers": (lambda a, b: lambda x: (x.abs() + 1) ** a * (x.abs() + 2) ** b, numbers),
    "atan2": (lambda a, b: lambda x: torch.atan2(x, a) * torch.atan2(x, b), numbers),
    "targets": (
        lambda a, b: lambda x: ((x - a) ** 2 * torch.nn.functional.huber_loss(x, b)).sum()[None],
        numbers,
    ),
    "views": (lambda a, b: lambda x: x * a[:N] * b[:N], whole),
    "other parts": (lambda a, b: lambda x: x * a[:N] * b[N:], whole),
    "overlapping": (lambda a, b: lambda x: x * a[1 : N + 1] * b[:N], whole),
    "lerp": (lambda a, b: lambda x: torch.lerp(x, a, b), numbers),
    "addcmul": (lambda a, b: lambda x: torch.addcmul(x, x.sin() * a, b), numbers),
    "einsum": (
        lambda a, b: lambda x: torch.einsum("i,ij,jk->k", x, a, b),
        lambda s: numbers(s, N, N),
    ),
    "layer norm": (
        lambda a, b: lambda x: torch.layer_norm(torch.layer_norm(x, (N,), a), (N,), b),
        numbers,
    ),
    "custom": (lambda a, b: lambda x: Scaled.apply(Scaled.apply(x, a).sin(), b), numbers),
    "custom and built in": (lambda a, b: lambda x: Scaled.apply((x * a).sin(), b) * b, numbers),
    "cdist": (
        lambda a, b: (
            lambda x: (
                torch.cdist(x[:, None], a[:, None]).sum(1)
                * torch.cdist(x[:, None], b[:, None]).sum(1)
            )
        ),
        numbers,
    ),
}


def agree(f: Function, times: int, lin: Callable[..., Any] = lz.Linearizer) -> None:
    """Compare products with those of the engine, at a point of its own."""
    x = numbers(7)
    here = lin(f).at(x)
    rows = here.value.numel()
    for k in range(times):
        v, u = numbers(20 + k), numbers(50 + k, rows)
        t = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(f(t), t, u)
        torch.testing.assert_close(here.vjp_fn(u)[0], expected)
        j = torch.autograd.functional.jacobian(f, x)
        torch.testing.assert_close(here.jvp_fn(v), j @ v)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_one_tensor_twice_or_two_tensors(name: str, order: Sequence[bool]) -> None:
    make, constant = KINDS[name]
    SHARED.clear()
    a, b = constant(1), constant(2)
    for same in (*order, *order):
        agree(make(a, a if same else b), 5)


@pytest.mark.parametrize("name", KINDS)
def test_also_within_one_linearizer(name: str) -> None:
    make, constant = KINDS[name]
    SHARED.clear()
    a, b = constant(1), constant(2)
    current = make(a, a)
    lin = lz.Linearizer(lambda x: current(x), maxsize=0)
    for args in ((a, a), (a, b), (b, a), (b, b), (a, b)):
        current = make(*args)
        agree(current, 4, lambda _: lin)


def test_which_of_three_tensors_are_the_same() -> None:
    a, b, c = (numbers(s) for s in range(3))
    SHARED.clear()
    for p, q, r in ((a, a, b), (a, b, b), (a, b, a), (a, b, c), (a, a, a), (c, b, a)):
        agree(lambda x, p=p, q=q, r=r: ((x * p).sin() * q).cos() * r, 4)


def test_a_constant_that_is_the_primal() -> None:
    SHARED.clear()
    b = numbers(3)
    for mine in (True, False, True, False):
        agree(lambda x, mine=mine: x.sin() * (x if mine else b) * x, 4)
        agree(lambda x, mine=mine: x * (x.detach() if mine else b) * b, 4)


def test_a_result_that_is_saved_twice() -> None:
    SHARED.clear()
    for twice in (True, False, True, False):

        def f(x: torch.Tensor, twice: bool = twice) -> torch.Tensor:
            y = x.tanh()
            z = y if twice else x.sigmoid()
            return x.exp() * y.detach() * z.detach() + y

        agree(f, 4)


def test_weights_that_are_tied() -> None:
    SHARED.clear()
    first, second = torch.nn.Linear(N, N).double(), torch.nn.Linear(N, N).double()
    for layers in ((first, first), (first, second), (first, first), (second, first)):
        agree(lambda x, layers=layers: layers[1](layers[0](x).tanh()), 4)


def test_points_of_one_kind_still_share_programs() -> None:
    SHARED.clear()
    data = numbers(9, 10 * N)
    lin = lz.Linearizer(lambda x, k: (x * data[k : k + N]).sin() * data[k : k + N])
    for k in range(6):
        here = lin.at(numbers(k), k)
        here.jvp_fn(numbers(30 + k), None)
    assert (lin.stats().recorded, lin.stats().reused) == (1, 5)
