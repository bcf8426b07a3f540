"""Python numbers that do nothing but scale: programs are taken over with others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import linearize as lz
from linearize._reuse.shared import SHARED
from tests.support.comparing import CALLS

D = torch.float64
N = 4
M = torch.linspace(-1, 1, N * N, dtype=D).reshape(N, N)


def numbers(seed: int, *shape: int, dtype: torch.dtype = D) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (N,)), dtype=D, generator=g).to(dtype)


def agree(lin: Any, f: Callable[..., Any], x: torch.Tensor, tol: float = 1e-9) -> None:
    """Compare products with those of the engine; entries that are not finite too."""
    here = lin.at(x)
    j = torch.autograd.functional.jacobian(f, x.to(D) if x.dtype != D else x).reshape(-1, N)
    for k in range(CALLS):
        v, u = numbers(20 + k, dtype=x.dtype), torch.ones_like(here.value)
        got, back = here.jvp_fn(v), here.vjp_fn(u)[0]
        assert got.dtype == here.value.dtype
        assert back.dtype == x.dtype
        t = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(f(t), t, u)
        torch.testing.assert_close(back, expected, rtol=tol, atol=tol, equal_nan=True)
        if bool(j.isfinite().all()):
            forward = (j @ v.to(j.dtype)).reshape(here.value.shape)
            torch.testing.assert_close(got, forward.to(got.dtype), rtol=tol, atol=tol)


def counts(lin: lz.Linearizer) -> tuple[int, int]:
    return lin.stats().recorded, lin.stats().reused


Scaled = Callable[[torch.Tensor, Any], torch.Tensor]
SCALING: dict[str, Scaled] = {
    "mul": lambda x, a: x.sin() * a,
    "mul, in front": lambda x, a: a * x.sin(),
    "mul in place": lambda x, a: x.sin().mul_(a).tanh(),
    "mul by a scalar": lambda x, a: torch.ops.aten.mul.Scalar(x.sin(), a),
    "twice": lambda x, a: (x.sin() * a + x * (a / 2)) * a,
    "div": lambda x, a: x.sin() / a,
    "div by a scalar": lambda x, a: torch.ops.aten.div.Scalar(x.sin(), a),
    "divided": lambda x, a: a / (2 + x.sin()),
    "add": lambda x, a: torch.add(x, x.sin(), alpha=a).exp(),
    "add in place": lambda x, a: x.sin().add_(x, alpha=a).exp(),
    "sub": lambda x, a: torch.sub(x, x.sin(), alpha=a).exp(),
    "rsub": lambda x, a: torch.rsub(x.sin(), x, alpha=a).exp(),
    "addcmul": lambda x, a: torch.addcmul(x, x, x.sin(), value=a),
    "addcdiv": lambda x, a: torch.addcdiv(x, x.cos(), 2 + x.sin(), value=a),
    "addmm": lambda x, a: torch.addmm(x[None].sin(), x[None], M, alpha=a, beta=3.5)[0],
    "addmm, beta": lambda x, a: torch.addmm(x[None].sin(), x[None], M, alpha=3.5, beta=a)[0],
    "addmv": lambda x, a: torch.addmv(x.sin(), M, x, alpha=a, beta=3.5),
    "addr": lambda x, a: torch.addr(M, x, x.sin(), alpha=a, beta=3.5).flatten(),
    "baddbmm": lambda x, a: torch.baddbmm(
        x.sin().expand(1, N, N), x.diag()[None], M[None], beta=a
    )[0].flatten(),
    "addbmm": lambda x, a: torch.addbmm(
        x.sin().diag(), x.diag()[None], M[None], alpha=a
    ).flatten(),
    "lerp": lambda x, a: torch.lerp(x, x.sin(), a),
    "leaky relu": lambda x, a: F.leaky_relu(x * 2, a),
    "leaky relu in a chain": lambda x, a: F.leaky_relu(x.sin(), a).exp() * x,
    "of no dimension": lambda x, a: (x.square().sum() * a).expand(N),
    "a stencil": lambda x, a: x + a * (x.roll(1) - 2 * x + x.roll(-1)) - a * x * (1 - x * x),
    "in a loss": lambda x, a: (x.sin() - 1).square().mean()[None] + a * x.abs().sum(),
}
VALUES = (0.3, 0.7, 2.5, -1.25, 0.3)


@pytest.mark.parametrize("name", SCALING)
@pytest.mark.parametrize("dtype", [D, torch.float32], ids=["double", "single"])
def test_another_number_is_no_other_structure(name: str, dtype: torch.dtype) -> None:
    SHARED.clear()
    f = SCALING[name]
    if dtype != D and "add" in name and any(s in name for s in ("mm", "mv", "addr")):
        pytest.skip("the matrix is in double precision")
    lin = lz.Linearizer(lambda x: f(x, a), maxsize=0)
    for k, a in enumerate(VALUES):
        agree(lin, lambda x, a=a: f(x, a), numbers(k, dtype=dtype), 1e-9 if dtype == D else 1e-4)
    assert counts(lin) == (1, 4)


@pytest.mark.parametrize("name", SCALING)
@pytest.mark.parametrize(
    "values",
    [
        (0.3, 0.0, -0.0, 1.0, -1.0, 0.3),
        (0.0, 0.5, -0.0, 1.0),
        (1.0, 0.3, 1.0, 0.0),
        (2, 2.0, 3, 0.5, 1, 7),
        (0.3, math.inf, math.nan, 0.5, -math.inf),
        (math.nan, 0.5, 0.7),
    ],
    ids=str,
)
def test_numbers_of_which_formulas_may_know(name: str, values: Sequence[Any]) -> None:
    SHARED.clear()
    f = SCALING[name]
    lin = lz.Linearizer(lambda x: f(x, a), maxsize=0)
    for k, a in enumerate(values):
        agree(lin, lambda x, a=a: f(x, a), numbers(k))


@pytest.mark.parametrize("order", [(0.0, -0.0), (-0.0, 0.0), (0.5, 0.0, -0.0, -0.5)])
def test_the_sign_of_a_zero_is_bound(order: Sequence[float]) -> None:
    SHARED.clear()
    lin = lz.Linearizer(lambda x: (x.exp() / zero).cumsum(0), maxsize=0)
    x = torch.zeros(2, dtype=D)
    for zero in (*order, *order):
        here = lin.at(x)
        want = math.copysign(math.inf, zero) if zero == 0 else 1 / zero
        for _ in range(CALLS):
            assert here.jvp_fn(torch.ones_like(x)).tolist()[0] == want
            assert here.vjp_fn(torch.ones_like(x))[0].tolist()[1] == want
        x = x + 0
    assert counts(lin)[0] == 1


STRUCTURE: dict[str, Scaled] = {
    "power": lambda x, a: x.abs() ** a,
    "base": lambda x, a: abs(a) ** x,
    "bound": lambda x, a: x.sin().clamp(-0.3, a / 4),
    "sharpness": lambda x, a: F.softplus(x, abs(a) + 1),
    "branch": lambda x, a: x.sin() if a > 0.5 else x.cos() * 2,
    "shift": lambda x, a: x.sin().roll(int(4 * a)),
    "slope below": lambda x, a: F.elu(x, abs(a)),
    "sharp and scaled": lambda x, a: F.softplus(x, abs(a) + 1) * a,
}


@pytest.mark.parametrize("name", STRUCTURE)
def test_numbers_that_decide_are_structure(name: str) -> None:
    SHARED.clear()
    f = STRUCTURE[name]
    lin = lz.Linearizer(lambda x: f(x, a), maxsize=0)
    for k, a in enumerate((*VALUES, 0.0, 1.0, 2.0)):
        agree(lin, lambda x, a=a: f(x, a), numbers(k))


def test_two_numbers_that_are_equal_at_one_point() -> None:
    SHARED.clear()

    def f(x: torch.Tensor, a: float, b: float) -> torch.Tensor:
        y = torch.addmm(x[None].sin(), x[None], M, alpha=a, beta=b)[0]
        return torch.lerp(y, x * a / b, a) * b + (x * a) * b

    lin = lz.Linearizer(lambda x: f(x, *both), maxsize=0)
    pairs = [
        (0.5, 0.5),
        (0.5, 0.5),
        (0.25, 0.75),
        (0.75, 0.25),
        (0.3, 0.3),
        (0.3, 2.0),
        (1.0, 0.5),
    ]
    for k, both in enumerate(pairs + pairs):
        agree(lin, lambda x, both=both: f(x, *both), numbers(k))


@pytest.mark.parametrize("options", [{"simplify": False}, {"check": "never"}, {"check": "always"}])
def test_simplifying_and_checking_make_no_difference(options: dict[str, Any]) -> None:
    SHARED.clear()
    f = SCALING["a stencil"]
    lin = lz.Linearizer(lambda x: f(x, a), maxsize=0, **options)
    for k, a in enumerate((*VALUES, 0.0, 1.0)):
        agree(lin, lambda x, a=a: f(x, a), numbers(k))
    assert counts(lin) == (1, 6)


def test_half_precision_and_complex_numbers() -> None:
    SHARED.clear()
    lin = lz.Linearizer(lambda x: (x.sin() * a).exp().abs() * b, maxsize=0)
    for k, a in enumerate((0.3j, 0.5 + 1j, 0.25, 0.75, complex(0.0, -0.0), 1j)):
        for b in (0.5, 2.0):

            def f(x: torch.Tensor, a: complex = a, b: float = b) -> torch.Tensor:
                return (x.sin() * a).exp().abs() * b

            agree(lin, f, numbers(k))
    lin = lz.Linearizer(lambda x: (x.sin() * a).mean() * a + F.leaky_relu(x, a) * a, maxsize=0)
    for k, a in enumerate(VALUES):

        def g(x: torch.Tensor, a: float = a) -> torch.Tensor:
            return (x.sin() * a).mean() * a + F.leaky_relu(x, a) * a

        agree(lin, g, numbers(k, dtype=torch.bfloat16), 0.1)


def test_another_linearizer_takes_it_over() -> None:
    SHARED.clear()
    f = SCALING["a stencil"]
    for k, a in enumerate(VALUES):
        lin = lz.Linearizer(lambda x, a=a: f(x, a))
        agree(lin, lambda x, a=a: f(x, a), numbers(k))
        assert counts(lin) == ((1, 0) if k == 0 else (0, 1))


class Squared(torch.autograd.Function):
    """Both methods, so that the program belongs to one `Linearizer`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, u: torch.Tensor) -> torch.Tensor:
        return 2 * ctx.saved_tensors[0] * u

    jvp = backward


def test_beside_a_custom_function() -> None:
    lin = lz.Linearizer(lambda x: Squared.apply(x * a).sin() * a, maxsize=0)
    for k, a in enumerate(VALUES):
        agree(lin, lambda x, a=a: (x * a).square().sin() * a, numbers(k))
    assert counts(lin) == (1, 4)


def test_only_numbers_that_changed_are_read_anew() -> None:
    """What stays the same is folded as it was."""
    SHARED.clear()
    lin = lz.Linearizer(lambda x: ((x * 3.0).sin() * a / 7.0) * b, maxsize=0)
    b = 2.0
    for k, a in enumerate((0.5, 0.7, 0.9)):
        agree(lin, lambda x, a=a: ((x * 3.0).sin() * a / 7.0) * 2.0, numbers(k))
    here = lin.at(numbers(9))
    text = str(here.program.pullback)
    assert "7" in text
    assert ", 2)" in text or ", 2.0)" in text
    b = 2.5
    agree(lin, lambda x: ((x * 3.0).sin() * 0.9 / 7.0) * 2.5, numbers(8))
    assert counts(lin)[0] == 1


def test_stacks_and_matrices_have_the_numbers_of_their_point() -> None:
    SHARED.clear()
    f = SCALING["a stencil"]
    lin = lz.Linearizer(lambda x: f(x, a), maxsize=0)
    points = []
    for k, a in enumerate((0.3, 0.7, 0.9, 1.1)):
        x = numbers(k)
        here = lin.at(x)
        j = torch.autograd.functional.jacobian(lambda x, a=a: f(x, a), x)
        points.append((here, j))
        for _ in range(3):
            here.jvp_fn(x)
    for here, j in points:
        eye = torch.eye(N, dtype=D)
        torch.testing.assert_close(here.jvp_fn.batched(eye), j.T)
        torch.testing.assert_close(here.vjp_fn.batched(eye)[0], j)
        torch.testing.assert_close(here.jacobian.materialize(), j)
    assert counts(lin) == (1, 3)
