"""Programs check themselves: pushforward and pullback are adjoint, or an error names why not."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch.autograd import Function

import linearize as lz
from linearize import _rules
from linearize._torch import aten
from linearize.errors import AdjointError, OptionError


class Scale(Function):
    """2x, whose methods count their calls; `wrong` makes its jvp another map."""

    calls: ClassVar[list[str]] = []
    wrong = False

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        Scale.calls.append("backward")
        return 2 * grad

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor) -> torch.Tensor:
        Scale.calls.append("jvp")
        return (3 if Scale.wrong else 2) * tangent


class Rounded(Function):
    """A straight-through estimator whose jvp tells the truth."""

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(tangent)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    Scale.calls = []
    Scale.wrong = False


def broken(monkeypatch: pytest.MonkeyPatch, op: Any) -> None:
    """Give an operation a transpose that is twice the right one."""
    right = _rules.rule_for(op)
    assert right is not None

    def twice(e: Any, eq: Any, cts: Any) -> Any:
        return [
            (v, e.emit(aten.mul.Scalar, (ct, 2.0), v.spec)) for v, ct in right(e, eq, cts) or []
        ]

    monkeypatch.setitem(_rules._RULES, op, twice)


X = torch.linspace(-1, 1, 6, dtype=torch.float64)
A = torch.linspace(1, 3, 24, dtype=torch.float64).sin().reshape(4, 6)


def test_a_wrong_rule_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, aten.roll.default)
    here = lz.Linearizer(lambda x: (A @ x.sin().roll(1)).cos()).at(X)
    with pytest.raises(AdjointError, match=r"first to part is roll, from RollBackward"):
        here.jvp_fn(X)
    with pytest.raises(AdjointError):  # and no number the next time either
        here.jvp_fn(X)
    here.vjp_fn(torch.ones(4, dtype=torch.float64))


def test_a_wrong_rule_beside_opaque_calls_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, aten.roll.default)
    here = lz.Linearizer(lambda x: Scale.apply(x.sin()).roll(2) * Scale.apply(x)).at(X)
    with pytest.raises(AdjointError, match=r"first to part is roll"):
        here.jvp_fn(X)
    assert Scale.calls == []


def test_never_checks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, aten.roll.default)
    here = lz.Linearizer(lambda x: x.roll(1), check="never").at(X)
    torch.testing.assert_close(here.jvp_fn(X), 2 * X.roll(1))


def test_once_per_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    from linearize import _source

    count = 0
    check = _source.check_built_in

    def counted(*args: Any) -> None:
        nonlocal count
        count += 1
        check(*args)

    monkeypatch.setattr(_source, "check_built_in", counted)
    lin = lz.Linearizer(lambda x: (A @ x.sin()).cos())
    for k in range(4):
        here = lin.at(X + k)
        for _ in range(4):
            here.jvp_fn(X)
            here.vjp_fn(torch.ones(4, dtype=torch.float64))
    assert lin.stats().recorded == 1
    assert count == 1


def test_by_default_user_code_is_called_for_products_only() -> None:
    here = lz.Linearizer(lambda x: Scale.apply(x.sin()).exp()).at(X)
    for _ in range(4):
        here.jvp_fn(X)
        here.vjp_fn(X)
    assert Scale.calls == ["jvp", "backward"] * 4


def test_a_wrong_jvp_is_named_at_every_point() -> None:
    lin = lz.Linearizer(lambda x: Scale.apply(x.sin()).exp(), check="always")
    torch.testing.assert_close(lin.at(X).jvp_fn(X), 2 * X.cos() * (2 * X.sin()).exp() * X)
    assert sorted(Scale.calls) == ["backward", "jvp", "jvp"]  # one of each for the check
    Scale.wrong = True
    second = lin.at(X + 1)
    for _ in range(4):
        with pytest.raises(AdjointError, match=r"Scale\.jvp.* not the adjoint of .*Scale\.backw"):
            second.jvp_fn(X)
        with pytest.raises(AdjointError, match="Scale"):
            second.vjp_fn(X)


def test_the_first_function_at_fault_is_named() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return Rounded.apply(Scale.apply(3 * x)) * Rounded.apply(x)  # type: ignore[no-any-return]

    here = lz.Linearizer(f).at(X)
    with pytest.raises(AdjointError, match=r"Rounded\.jvp"):
        here.check()


def test_a_straight_through_estimator_is_left_alone() -> None:
    here = lz.Linearizer(Rounded.apply).at(X)
    for _ in range(4):
        torch.testing.assert_close(here.jvp_fn(X), 0 * X)
        torch.testing.assert_close(here.vjp_fn(X)[0], X)
    with pytest.raises(AdjointError, match=r"Rounded\.jvp"):
        here.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.bfloat16])
def test_right_products_pass(dtype: torch.dtype) -> None:
    x, a = X.to(dtype), A.to(dtype)

    def f(x: torch.Tensor) -> Any:
        y = a @ torch.sin(x)
        # Real-linear, but not complex-linear.
        return y.conj() * y.roll(1), (x * x.abs().mean()).real.sum()

    here = lz.Linearizer(f, check="always").at(x)
    here.check()
    here.jvp_fn(x)


def test_large_terms_that_cancel_pass() -> None:
    big = torch.full((50, 50), 1e9)

    def f(x: torch.Tensor) -> torch.Tensor:
        y = big @ x
        return y + x - y  # what is left of x is rounding

    here = lz.Linearizer(f, simplify=False).at(torch.linspace(0, 1, 50))
    here.jvp_fn(torch.ones(50))
    here.check()


def test_numbers_that_are_not_finite_pass() -> None:
    here = lz.Linearizer(torch.sqrt, check="always").at(torch.tensor([0.0, 1.0]))
    assert here.jvp_fn(torch.tensor([1.0, 1.0])).tolist() == [float("inf"), 0.5]


def test_a_missing_direction_leaves_nothing_to_compare() -> None:
    class OneWay(Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(grad.numpy() * 2)

    here = lz.Linearizer(OneWay.apply, check="always").at(X)
    torch.testing.assert_close(here.vjp_fn(X)[0], 2 * X)


def test_the_option() -> None:
    with pytest.raises(OptionError, match='"structure", "always" or "never"'):
        lz.Linearizer(torch.sin, check="sometimes")  # type: ignore[arg-type]
