"""Simplified programs: the same maps, with fewer operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import linearize as lz
from linearize._execute.binding import BoundProgram
from linearize._execute.executor import runner
from linearize._programs.numbers import Numbers
from linearize._programs.program import Emitter, Program
from linearize._simplify.copies import merge_copies
from linearize._simplify.diagonals import fold_diagonals
from linearize._simplify.passes import simplify
from linearize._torch.names import aten
from tests.support.functions import randn

D = torch.float64
C = torch.complex128


def chain(x: torch.Tensor) -> torch.Tensor:
    for _ in range(200):
        x = torch.sin(x) * 1.1 - 0.028
    return x


def burgers(u: torch.Tensor) -> torch.Tensor:
    for _ in range(20):
        u = u - 0.1 * u * (u - u.roll(1)) + 0.05 * (u.roll(1) - 2 * u + u.roll(-1))
    return u


CASES: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "chain": (chain, (randn(10),)),
    "explicit time steps": (burgers, (randn(40) * 0.1,)),
    "branches that meet": (lambda x: (x.sin() * 2 + x.cos()) * x.exp() - x, (randn(7),)),
    "broadcast factors": (lambda x, y: (x * y).tanh() * y + x, (randn(3, 1), randn(4))),
    "complex": (lambda x: (x * (1 + 2j)).conj() * x.real + x / 3, (randn(4, dtype=C),)),
    "casts": (lambda x: (x.to(torch.float32) * 3).to(D) * x, (randn(4),)),
    "views": (lambda x: (x * 2).t().reshape(2, 6)[:, 1:4].flip(0) * 3, (randn(3, 4),)),
    "dropout mask": (lambda x: F.dropout(x * 2, 0.5) * 3, (randn(50),)),
    "a layer": (
        lambda x, w: F.layer_norm(F.gelu(x @ w), (5,)).softmax(-1),
        (randn(3, 4), randn(4, 5)),
    ),
    "sums over one base": (lambda x: sum((k * x * x.detach() for k in range(12)), x), (randn(5),)),
    "zero and negative": (lambda x: -(0 * x) - (-x) / -2, (randn(5),)),
}


def both(name: str) -> list[tuple[BoundProgram, BoundProgram]]:
    f, primals = CASES[name]
    torch.manual_seed(0)
    here = lz.Linearizer(f, simplify=False).at(*primals)
    return [(p, p.made(simplify)) for p in (here.program.pushforward, here.program.pullback)]


@pytest.mark.parametrize("name", CASES)
def test_the_map_stays_the_same(name: str) -> None:
    for recorded, smaller in both(name):
        smaller.program.check()
        arguments = [
            randn(*v.spec.shape, seed=3).to(v.spec.dtype)
            if not v.spec.dtype.is_complex
            else randn(*v.spec.shape, dtype=C, seed=3)
            for v in recorded.inputs
        ]
        expected, got = runner(recorded)(arguments), runner(smaller)(arguments)
        for a, b in zip(got, expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                tolerance = {"rtol": 1e-4, "atol": 1e-5} if name == "casts" else {}
                torch.testing.assert_close(a, b, **tolerance)
        assert len(smaller.equations) <= len(recorded.equations)


def test_a_chain_becomes_one_multiplication() -> None:
    for recorded, smaller in both("chain"):
        assert len(recorded.equations) == 400
        assert [eq.name for eq in smaller.equations] == ["mul.Tensor"]


def test_a_time_step_takes_five_operations() -> None:
    for recorded, smaller in both("explicit time steps"):
        assert len(recorded.equations) > 300
        assert len(smaller.equations) <= 5 * 20


def test_residuals_that_no_operation_uses_are_not_kept() -> None:
    for recorded, smaller in both("chain"):
        assert sum(1 for _ in recorded.kept_tensors()) == 200
        assert sum(1 for _ in smaller.kept_tensors()) == 1


def test_products_that_overflow_are_not_formed() -> None:
    """1e-200 and 1e+200 in a chain: multiplied first in pairs they leave the range."""

    def f(x: torch.Tensor) -> torch.Tensor:
        return x * 1e-200 * 1e-200 * torch.full((3,), 1e300, dtype=D) * 1e200

    for factor in (1e200, 1.0):
        here = lz.Linearizer(f).at(torch.ones(3, dtype=D))
        v = torch.full((3,), factor, dtype=D)
        first = here.jvp_fn(v)
        for _ in range(4):
            torch.testing.assert_close(here.jvp_fn(v), first)

    big = torch.full((3,), 1e200, dtype=D)
    here = lz.Linearizer(lambda x: x * big * big / big).at(torch.ones(3, dtype=D))
    small = torch.full((3,), 1e-200, dtype=D)
    for _ in range(5):
        torch.testing.assert_close(here.jvp_fn(small), torch.ones(3, dtype=D))


def test_the_simplified_program_takes_over_and_gives_the_same() -> None:
    here = lz.Linearizer(chain).at(randn(10))
    reference = lz.Linearizer(chain, simplify=False).at(randn(10))
    for k in range(6):
        v = randn(10, seed=k)
        torch.testing.assert_close(here.jvp_fn(v), reference.jvp_fn(v))
        torch.testing.assert_close(here.vjp_fn(v), reference.vjp_fn(v))
    plan = here.jvp_fn._plan((True,))
    assert len(plan.program().equations) == 1
    assert len(reference.jvp_fn._plan((True,)).program().equations) == 400


def test_user_code_runs_once_per_product_also_while_the_program_changes() -> None:
    calls = {"jvp": 0, "backward": 0}

    class Sine(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.x = x
            return x.sin()

        @staticmethod
        def jvp(ctx: Any, v: torch.Tensor) -> torch.Tensor:
            calls["jvp"] += 1
            return v * ctx.x.cos()

        @staticmethod
        def backward(ctx: Any, u: torch.Tensor) -> torch.Tensor:
            calls["backward"] += 1
            return u * ctx.x.cos()

    here = lz.Linearizer(lambda x: chain(Sine.apply(chain(x)))).at(randn(4))
    results = [(here.jvp_fn(randn(4)), here.vjp_fn(randn(4))[0]) for _ in range(6)]
    assert calls == {"jvp": 6, "backward": 6}
    for jv, ju in results[1:]:
        torch.testing.assert_close(jv, results[0][0])
        torch.testing.assert_close(ju, results[0][1])


def test_passes_are_explained() -> None:
    here = lz.Linearizer(chain).at(randn(10))
    text = here.program.explain()
    assert "pushforward: 400 equations" in text
    assert "after merge_copies: 400 equations" in text
    assert "after fold_diagonals: 1 equations" in text
    assert "mul.Tensor" in str(here.program.simplified())


def test_each_pass_alone_keeps_the_map() -> None:
    for name in CASES:
        for recorded, _ in both(name):
            for one in (merge_copies, fold_diagonals):
                one(recorded.program, recorded.numbers()).check()


def test_a_changed_weight_is_noticed_after_it_was_folded() -> None:
    weight = randn(5)
    here = lz.Linearizer(lambda x: (x * weight).sin() * weight).at(randn(5))
    for _ in range(5):
        here.jvp_fn(randn(5))
        here.vjp_fn(randn(5))
    weight.mul_(2)
    for product in (here.jvp_fn, here.vjp_fn):
        with pytest.raises(lz.errors.StalenessError):
            product(randn(5))


def test_what_was_folded_is_let_go() -> None:
    x = randn(1000)
    here = lz.Linearizer(chain).at(x)
    for _ in range(2):
        here.jvp_fn(x)
        here.vjp_fn(x)
    before = here.nbytes
    for _ in range(3):
        here.jvp_fn(x)
        here.vjp_fn(x)
    assert before > 100 * x.nbytes
    assert here.nbytes <= 2 * x.nbytes
    assert "400" not in repr(here.program)
    torch.testing.assert_close(here.vjp_fn(x)[0], here.jvp_fn(x))  # the Jacobian is diagonal
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(here.jvp_fn(leaf), leaf, x)
    torch.testing.assert_close(grad, here.jvp_fn(x))


@pytest.mark.parametrize(("loss", "taken"), [(1e-4, False), (1e-6, True)])
def test_a_simplified_program_that_loses_digits_does_not_take_over(
    loss: float, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In single precision, where a tolerance for wrong numbers would let them through."""

    def lossy(program: Program, numbers: Numbers) -> Program:
        small = simplify(program, numbers)
        e = Emitter()
        e.equations.extend(small.equations)
        outputs = [e.emit(aten.mul.Scalar, (v, 1 + loss), v.spec) for v in small.outputs if v]
        return small.with_equations(e.equations, outputs)

    monkeypatch.setattr("linearize._simplify.worth.simplify", lossy)
    x = torch.linspace(0.1, 1, 50)
    here = lz.Linearizer(lambda x: (x.sin() * x).exp()).at(x)
    results = [here.jvp_fn(torch.ones_like(x)) for _ in range(5)]
    changed = (results[-1] - results[0]).abs().max() / results[0].abs().max()
    assert (changed > loss / 2) == taken
