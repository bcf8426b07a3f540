"""Matrices at many points: the programs of the first one serve all, those for stacks too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import linearize as lz
from linearize._execute.thresholds import (
    STACK_AT,
    STACK_BYTES,
    STACK_BYTES_MULTIPLIED,
    STACK_COMPARED,
)
from linearize._forms import plan, stacks
from linearize._points import programs
from linearize._programs.program import Equation, Program
from linearize._programs.values import Var
from linearize._reuse.shared import SHARED
from tests.support.functions import point

N = 12


def rosenbrock(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([10 * (x[1:] - x[:-1] ** 2), 1 - x[:-1]])


def by_hand(x: torch.Tensor) -> torch.Tensor:
    J = torch.zeros(2 * (N - 1), N, dtype=x.dtype)
    for i in range(N - 1):
        J[i, i], J[i, i + 1], J[N - 1 + i, i] = -20 * x[i], 10, -1
    return J


def cubes(x: torch.Tensor) -> torch.Tensor:
    return (x**3).sum() + (x[1:] * x[:-1]).sum()


def hessian_by_hand(x: torch.Tensor) -> torch.Tensor:
    off = torch.ones(N - 1, dtype=x.dtype)
    return torch.diag(6 * x) + torch.diag(off, 1) + torch.diag(off, -1)


def _at(read: Callable[[lz.Linearization], Any]) -> Callable[[], Callable[..., Any]]:
    def make() -> Callable[..., Any]:
        lin = lz.Linearizer(rosenbrock, maxsize=0)
        return lambda x: read(lin.at(x))

    return make


def _scipy(kind: Any) -> Callable[..., Any]:
    problem = lz.scipy.VectorFunction(rosenbrock, point(N), jac=kind, maxsize=2)

    def jac(x: torch.Tensor) -> torch.Tensor:
        found = problem.jac(x.numpy())
        return torch.from_numpy(np.asarray(found.todense() if kind == "sparse" else found))

    return jac


def _hessian() -> Callable[..., Any]:
    lin = lz.Linearizer(torch.func.grad(cubes), maxsize=0)
    return lambda x: lin.at(x).jacobian.materialize()


def _gram(x: torch.Tensor) -> torch.Tensor:
    return by_hand(x).mT @ by_hand(x)


FACES: dict[str, tuple[Callable[[], Callable[..., Any]], Callable[..., Any]]] = {
    "materialize": (_at(lambda h: h.jacobian.materialize()), by_hand),
    "columns": (_at(lambda h: h.jacobian.materialize(direction="forward")), by_hand),
    "rows": (_at(lambda h: h.jacobian.materialize(direction="reverse")), by_hand),
    "in pieces": (_at(lambda h: h.jacobian.materialize(chunk_size=5)), by_hand),
    "adjoint": (_at(lambda h: h.jacobian.H.materialize().mH), by_hand),
    "multiple": (_at(lambda h: (2.0 * h.jacobian).materialize() / 2), by_hand),
    "gram": (_at(lambda h: h.jacobian.gram().materialize()), _gram),
    "gram diagonal": (
        _at(lambda h: torch.diag(h.jacobian.gram().diagonal())),
        lambda x: torch.diag(_gram(x).diagonal()),
    ),
    "sparse": (_at(lambda h: lz.sparse.jacobian(h).to_dense()), by_hand),
    "looked at": (_at(lambda h: (h.program, h.jacobian.materialize())[1]), by_hand),
    "VectorFunction, dense": (lambda: _scipy("dense"), by_hand),
    "VectorFunction, sparse": (lambda: _scipy("sparse"), by_hand),
    "jacfwd": (lambda: lz.func.jacfwd(rosenbrock), by_hand),
    "jacrev": (lambda: lz.func.jacrev(rosenbrock), by_hand),
    "hessian": (lambda: lz.func.hessian(cubes), hessian_by_hand),
    "functional.hessian": (lambda: lambda x: lz.functional.hessian(cubes, x), hessian_by_hand),
}


@pytest.mark.parametrize("name", FACES)
def test_recorded_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = []
    original = programs.record_pullback

    def counted(*args: Any, **kwargs: Any) -> Any:
        recorded.append(None)
        return original(*args, **kwargs)

    monkeypatch.setattr(programs, "record_pullback", counted)
    SHARED.clear()
    make, expected = FACES[name]
    matrix = make()
    for k in range(8):
        x = point(N, seed=k)
        torch.testing.assert_close(matrix(x), expected(x))
    # Columns and rows, where both are tried, are of one recording.
    assert len(recorded) == 1


def test_fifty_points() -> None:
    lin = lz.Linearizer(rosenbrock, maxsize=0)
    for k in range(50):
        x = point(N, seed=k)
        torch.testing.assert_close(lin.at(x).jacobian.materialize(), by_hand(x))
    assert (lin.stats().recorded, lin.stats().reused) == (1, 49)


def test_programs_for_stacks_serve_later_points(monkeypatch: pytest.MonkeyPatch) -> None:
    made, mapped = [], []
    original = stacks.vectorized
    monkeypatch.setattr(
        stacks, "vectorized", lambda *args: made.append(args[2]) or original(*args)
    )
    vmap = torch.vmap
    monkeypatch.setattr(torch, "vmap", lambda f, **k: mapped.append(None) or vmap(f, **k))
    lin = lz.Linearizer(rosenbrock, maxsize=0)
    for k in range(10):
        x = point(N, seed=k)
        J = torch.stack(list(lin.at(x).jvp_fn.batched(torch.eye(N, dtype=x.dtype))), 1)
        torch.testing.assert_close(J, by_hand(x))
    assert made == [N]
    assert len(mapped) == STACK_AT - 1 + STACK_COMPARED


def test_a_wrong_program_for_stacks_is_seen_at_the_second_point(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = stacks.vectorized

    def wrong(program: Program, numbers: Any, count: int) -> Program | None:
        made = original(program, numbers, count)
        assert made is not None
        (out,) = made.outputs
        assert out is not None
        twice = Var(out.spec)
        doubled = Equation(torch.ops.aten.mul.Tensor, (out, 2.0), {}, (twice,))
        return made.with_equations([*made.equations, doubled], [twice])

    monkeypatch.setattr(stacks, "vectorized", wrong)
    SHARED.clear()
    lin = lz.Linearizer(lambda x: x**2, maxsize=0, simplify=False)
    eye = torch.eye(3, dtype=torch.float64)
    nothing = lin.at(torch.zeros(3, dtype=torch.float64))  # twice nothing is nothing
    for _ in range(4):
        assert not nothing.jvp_fn.batched(eye).any()
    for k in range(4):
        x = point(3, seed=k)
        here = lin.at(x)
        for _ in range(3):
            torch.testing.assert_close(here.jvp_fn.batched(eye), torch.diag(2 * x))


def test_another_form_may_take_over_while_a_stack_is_prepared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As another thread may have it: the program and its numbers belong together."""

    def steps(x: torch.Tensor) -> torch.Tensor:
        for _ in range(20):
            x = x + 0.1 * (x.roll(1) - 2 * x + x.roll(-1)) - 0.05 * x * (x - x.roll(1))
        return x

    SHARED.clear()
    lin = lz.Linearizer(steps, maxsize=0)
    eye = torch.eye(N, dtype=torch.float64)
    for k in range(STACK_AT + STACK_COMPARED):
        lin.at(point(N, seed=k)).jvp_fn.batched(eye)
    x = point(N, seed=9)
    here, known, taken = lin.at(x), plan.stacks_of, lin.stats().dense

    def meanwhile(executor: Any) -> Any:
        found = known(executor)
        for _ in range(40):  # the matrix takes over
            here.jvp_fn(eye[0])
        return found

    monkeypatch.setattr(plan, "stacks_of", meanwhile)
    J = here.jvp_fn.batched(eye)
    assert lin.stats().dense == taken + 1
    torch.testing.assert_close(J.T, torch.autograd.functional.jacobian(steps, x))


def test_what_a_stack_reads_must_not_change() -> None:
    w = point(N)
    lin = lz.Linearizer(lambda x: x * w, maxsize=0)
    eye = torch.eye(N, dtype=w.dtype)
    for k in range(5):
        here = lin.at(point(N, seed=k))
        torch.testing.assert_close(here.jvp_fn.batched(eye), torch.diag(w))
        w.mul_(2)
        with pytest.raises(lz.errors.StalenessError):
            here.jvp_fn.batched(eye)
    here = lin.at(point(N))
    w.mul_(2)  # before anything was bound
    with pytest.raises(lz.errors.StalenessError):
        here.jvp_fn.batched(eye)


def test_few_lengths_are_kept() -> None:
    lin = lz.Linearizer(torch.sin, maxsize=0)
    for k in range(4):
        x = point(3, seed=k)
        here = lin.at(x)
        for count in range(2, 14):
            v = torch.randn(count, 3, dtype=x.dtype)
            torch.testing.assert_close(here.jvp_fn.batched(v), v * x.cos())
    (executor,) = {p._running[1] for p in here.jvp_fn._plans.values()}
    assert len(stacks.stacks_of(executor).known) <= plan.MOST_STACKS


# -- how many at once -----------------------------------------------------------------------


def stencil(x: torch.Tensor) -> torch.Tensor:
    for _ in range(10):
        x = x + 0.1 * (x.roll(1) - 2 * x + x.roll(-1)) - 0.01 * x * (x - x.roll(1))
    return x


def chosen(f: Callable[..., Any], n: int, *, adjoint: bool = False) -> tuple[int, int]:
    """Return how many vectors are taken at once, and the bytes that one of them takes."""
    J = lz.Linearizer(f).at(torch.rand(n, dtype=torch.float64)).jacobian
    product = J._products[adjoint]
    count = (J.H if adjoint else J)._chunk("auto", 1 << 40)
    return count, product.program.peak_bytes()


@pytest.mark.parametrize("adjoint", [False, True])
def test_a_pass_stays_in_the_caches(adjoint: bool) -> None:
    count, each = chosen(stencil, 3_000, adjoint=adjoint)
    room = STACK_BYTES * torch.get_num_threads()
    assert room / 2 < count * each <= room
    assert chosen(stencil, STACK_BYTES // 8, adjoint=adjoint)[0] == 1


def test_large_matrices_are_read_for_more_vectors() -> None:
    W = torch.randn(3_000, 3_000, dtype=torch.float64)
    few, _ = chosen(lambda x: x.sin().cos(), 3_000)
    many, each = chosen(lambda x: (W @ x).sin(), 3_000)
    assert many > few
    assert many * each <= STACK_BYTES_MULTIPLIED * torch.get_num_threads()


def test_memory_bounds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "memory_budget", lambda device: 100_000)
    count, each = chosen(stencil, 300)
    assert count == 100_000 // each


def test_the_progress_bar_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    from linearize._spaces import flat

    seen: list[int] = []

    def progress(steps: Any, total: int, what: str) -> Any:
        seen.append(total)
        return steps

    monkeypatch.setattr(flat, "progress", progress)
    J = lz.Linearizer(stencil).at(torch.rand(2_000, dtype=torch.float64)).jacobian
    J.materialize()
    assert seen[0] >= 10


def test_one_direction_is_enough_for_the_estimate() -> None:
    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_forward(x)
            return x.sin()

        @staticmethod
        def jvp(ctx: Any, v: torch.Tensor) -> torch.Tensor:
            (x,) = ctx.saved_tensors
            return torch.from_numpy(v.numpy() * np.cos(x.numpy()))

    x = point(4)
    lin = lz.Linearizer(Forward.apply)
    for direction in ("auto", "forward"):
        J = lin.at(x.clone()).jacobian.materialize(direction=direction)
        torch.testing.assert_close(J, torch.diag(x.cos()))
