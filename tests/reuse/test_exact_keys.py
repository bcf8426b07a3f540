"""Numbers that are equal and yet not the same: programs tell 0.0 and -0.0 apart."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import linearize as lz
from linearize._spaces.compare import exact

F64 = torch.float64
INFINITE = torch.tensor([math.inf, math.inf], dtype=F64)


def test_keys_of_numbers_are_their_bits() -> None:
    numbers: list[Any] = [0, 0.0, -0.0, 0j, complex(0.0, -0.0), complex(-0.0, 0.0)]
    numbers += [complex(-0.0, -0.0), 1, 1.0, 1 + 0j, complex(1.0, -0.0), 2.5, math.inf, -math.inf]
    keys = [exact(x) for x in numbers]
    assert len(set(keys)) == len(keys)
    assert exact(0.0) == exact(0.0)
    assert exact(math.nan) == exact(float("nan"))
    assert exact((1.0, [0.0])) != exact((1.0, [-0.0]))


#: Functions of a number and a point, at which the derivative shows the sign of a zero.
DIVIDED: dict[str, Callable[[float, torch.Tensor], torch.Tensor]] = {
    "by a number": lambda zero, x: x / zero,
    "by a number, in place": lambda zero, x: x.clone().div_(zero),
    "by a number after another": lambda zero, x: (x * 2.0) / 2.0 / zero,
    "by a tensor": lambda zero, x: x / torch.tensor([zero, zero], dtype=F64),
    "by a tensor of no dimension": lambda zero, x: x / torch.tensor(zero, dtype=F64),
}


@pytest.mark.parametrize("name", DIVIDED)
@pytest.mark.parametrize("order", [(0.0, -0.0), (-0.0, 0.0)])
def test_zeros_of_either_sign_have_programs_of_their_own(
    name: str, order: tuple[float, float]
) -> None:
    v = torch.ones(2, dtype=F64)
    for zero in order * 2:
        lin = lz.Linearizer(lambda x, zero=zero: DIVIDED[name](zero, x))
        for shift in (1.0, 2.0):
            x = torch.full((2,), shift, dtype=F64)
            (want,) = torch.autograd.functional.vjp(lambda x, z=zero: DIVIDED[name](z, x), x, v)[
                1:
            ]
            here = lin.at(x)
            for _ in range(5):
                assert torch.equal(here.vjp_fn(v)[0], want), (zero, want)
                assert torch.equal(here.jvp_fn(v), want), (zero, want)


@pytest.mark.parametrize("order", [(0.0, -0.0), (-0.0, 0.0)])
def test_a_power_tells_the_sides_of_the_branch_cut_apart(order: tuple[float, float]) -> None:
    x, v = torch.full((2,), 0.5, dtype=F64), torch.ones(2, dtype=F64)
    for zero in order * 2:
        base = complex(-2.0, zero)

        def f(x: torch.Tensor, base: complex = base) -> torch.Tensor:
            return base**x

        want = cmath.log(base) * f(x) * v
        here = lz.Linearizer(f).at(x)
        for _ in range(5):
            torch.testing.assert_close(here.jvp_fn(v), want)


def test_both_zeros_in_one_function() -> None:
    a, b = torch.tensor([0.0, 1.0], dtype=F64), torch.tensor([-0.0, 1.0], dtype=F64)
    here = lz.Linearizer(lambda x, y: (x / a, y / b)).at(
        torch.ones(2, dtype=F64), torch.ones(2, dtype=F64)
    )
    v = torch.ones(2, dtype=F64)
    for _ in range(5):
        one, other = here.jvp_fn(v, v)
        assert one.tolist() == [math.inf, 1]
        assert other.tolist() == [-math.inf, 1]
        one, other = here.vjp_fn((v, v))
        assert one.tolist() == [math.inf, 1]
        assert other.tolist() == [-math.inf, 1]


def test_a_number_and_its_kin_of_another_type() -> None:
    x, v = torch.tensor([1.5, 2.0], dtype=F64), torch.ones(2, dtype=F64)
    for exponent in (2, 2.0, 2 + 0j, 2):
        here = lz.Linearizer(lambda x, n=exponent: x**n).at(x)
        for _ in range(4):
            got = here.jvp_fn(v)
            assert got.is_complex() == isinstance(exponent, complex)
            torch.testing.assert_close(got.real if got.is_complex() else got, 2 * x)
