"""Matrices with few diagonals: products, what is kept, and when they are taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd.functional import jacobian

import linearize as lz
from linearize._execute.binding import BoundProgram
from linearize._execute.executor import runner
from linearize._forms import dense as _dense
from linearize._forms.banded import Banded
from linearize._programs.program import Emitter, Program
from linearize._programs.values import Var
from linearize._spaces.space import TensorSpec

N = 30


def with_diagonals(n: int, *offsets: int) -> torch.Tensor:
    """Return a matrix of random diagonals, each closed around the corners."""
    generator = torch.Generator().manual_seed(n)
    matrix = torch.zeros(n, n, dtype=torch.float64)
    i = torch.arange(n)
    for offset in offsets:
        matrix[i, (i + offset) % n] = torch.randn(n, dtype=torch.float64, generator=generator)
    return matrix


def product(banded: Banded, x: torch.Tensor, *, forward: bool) -> torch.Tensor:
    e, v = Emitter("a band"), Var(TensorSpec.of(x))
    out = (banded.times if forward else banded.transposed_times)(e, v)
    program = Program([v], e.equations, [out], [v.spec])
    result = runner(BoundProgram.of(program, e.numbers))([x])[0]
    assert result is not None
    return result


@pytest.mark.parametrize(
    ("offsets", "width", "lower"),
    [
        ([0], 2, 0),
        ([1], 2, 0),
        ([-1], 2, 1),
        ([-1, 0, 1], 3, 1),
        ([5, 6], 7, 0),
        ([-3, 2], 6, 3),
        ([-9, -8], 10, 9),
        ([-4, 4], 9, 4),
    ],
)
def test_products_with_the_diagonals(offsets: list[int], width: int, lower: int) -> None:
    matrix = with_diagonals(N, *offsets)
    banded = Banded.of(matrix)
    assert banded is not None
    assert (banded.diagonals.shape, banded.lower) == ((width, N), lower)
    x = torch.linspace(1, 2, N, dtype=torch.float64).cos()
    torch.testing.assert_close(product(banded, x, forward=True), matrix @ x)
    torch.testing.assert_close(product(banded, x, forward=False), matrix.T @ x)


def test_diagonals_that_end_at_the_corners() -> None:
    matrix = torch.zeros(N, N, dtype=torch.float64)
    for offset in (-2, 0, 1):
        matrix += torch.diag(torch.arange(1.0, N - abs(offset) + 1, dtype=torch.float64), offset)
    banded = Banded.of(matrix)
    assert banded is not None
    x = torch.linspace(1, 2, N, dtype=torch.float64)
    torch.testing.assert_close(product(banded, x, forward=True), matrix @ x)
    torch.testing.assert_close(product(banded, x, forward=False), matrix.T @ x)


@pytest.mark.parametrize(
    "matrix",
    [
        torch.ones(N, N),
        torch.ones(N, N + 1),
        torch.ones(1, 1),
        with_diagonals(N, N // 2),  # far from the main diagonal
        with_diagonals(N, *range(11)),
    ],
    ids=["full", "oblong", "one", "far", "wide"],
)
def test_other_matrices_are_no_bands(matrix: torch.Tensor) -> None:
    assert Banded.of(matrix) is None


def test_no_entry_is_lost() -> None:
    for value in (float("nan"), float("inf"), 1e-300):
        matrix = with_diagonals(N, -1, 0, 1)
        matrix[3, 8] = value
        banded = Banded.of(matrix)
        assert banded is not None
        assert banded.diagonals.shape[0] == 7
    matrix[3, 18] = 1.0
    assert Banded.of(matrix) is None


def steps(x: torch.Tensor) -> torch.Tensor:
    """Some steps of an explicit scheme, as long as the domain is wide."""
    for _ in range(12):
        x = x + 0.1 * (x.roll(1) - 2 * x + x.roll(-1)) - 0.05 * x * (x - x.roll(1))
    return x


X = torch.linspace(-1, 1, 400, dtype=torch.float64)


@pytest.fixture
def dear_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let matrices take over, so that bands are considered."""
    monkeypatch.setattr(_dense, "MATRIX_SHARE", 1e3)


def used(f: Any, x: torch.Tensor) -> lz.Linearization:
    here = lz.Linearizer(f).at(x)
    for _ in range(len(x) // 2 + 8):
        here.vjp_fn(torch.ones_like(here.value))
        here.jvp_fn(x)
    return here


@pytest.mark.usefixtures("dear_programs")
@pytest.mark.parametrize("complex_numbers", [False, True])
def test_the_band_of_explicit_time_stepping(complex_numbers: bool) -> None:
    def real(x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(steps(torch.view_as_complex(x.view(-1, 2)))).flatten()

    f = real if complex_numbers else steps
    x = torch.cat([X, X.cos()]) if complex_numbers else X
    here = used(f, x)
    matrix = jacobian(f, x)
    n = len(x)
    for program in (here.program.pushforward, here.program.pullback):
        (kept,) = program.residuals()
        assert kept.tensor.shape[0] < n / 3
        assert kept.tensor.shape[1] == n
        assert "unfold" in str(program) or "slice" in str(program)
    forth, back = (p.residuals()[0] for p in (here.program.pushforward, here.program.pullback))
    assert forth.tensor.data_ptr() == back.tensor.data_ptr()
    assert forth.tensor.nbytes <= here.nbytes < matrix.nbytes / 3
    for k in range(3):
        v = x + k
        torch.testing.assert_close(here.jvp_fn(v), matrix @ v)
        torch.testing.assert_close(here.vjp_fn(v)[0], matrix.T @ v)
    many = torch.stack([x + k for k in range(5)])
    for _ in range(3):
        torch.testing.assert_close(here.jvp_fn.batched(many), many @ matrix.T)
        torch.testing.assert_close(here.vjp_fn.batched(many)[0], many @ matrix)
    torch.testing.assert_close(torch.vmap(here.jvp_fn)(many), many @ matrix.T)
    v = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(here.jvp_fn(v).sum(), v)
    torch.testing.assert_close(grad, matrix.sum(0))


@pytest.mark.usefixtures("dear_programs")
def test_a_band_that_costs_more_is_not_taken() -> None:
    """Sixty numbers: a product with the whole matrix is one operation on next to nothing."""
    x = X[:60]
    here = used(steps, x)
    assert any(eq.name == "mv" for eq in here.program.pushforward.equations)
    torch.testing.assert_close(here.jvp_fn(x), jacobian(steps, x) @ x)


@pytest.mark.usefixtures("dear_programs")
def test_a_field_of_several_numbers_at_each_place() -> None:
    def f(state: dict[str, torch.Tensor]) -> torch.Tensor:
        u = state["u"]
        for _ in range(4):
            u = u + 0.1 * (u.roll(1, 0) - 2 * u + u.roll(-1, 0)) * u.flip(1)
        return u

    x = torch.stack([X[:120], X[:120].sin()], 1)
    here = lz.Linearizer(f).at({"u": x})
    for _ in range(x.numel() // 2 + 8):
        here.jvp_fn({"u": x})
        here.vjp_fn(x)
    whole = jacobian(lambda u: f({"u": u}), x).reshape(240, 240)
    torch.testing.assert_close(here.jvp_fn({"u": x}), (whole @ x.flatten()).view(120, 2))
    torch.testing.assert_close(here.vjp_fn(x)[0]["u"], (whole.T @ x.flatten()).view(120, 2))
    assert here.program.pullback.residuals()[0].tensor.shape == (17, 240)
