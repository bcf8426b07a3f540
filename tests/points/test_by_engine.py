"""The first pullbacks of a later point come from PyTorch's engine, where that is the same."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

import linearize as lz
from linearize._execute.thresholds import BY_ENGINE
from linearize._points import by_engine
from linearize.errors import StalenessError

T = torch.Tensor
D = torch.float64
W = torch.linspace(-1, 1, 12, dtype=D).reshape(3, 4)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """What the engine was asked for: the number of cotangents, each time."""
    calls: list[int] = []
    real = by_engine.pulled_back

    def counted(roots: Any, cotangents: Any, leaves: Any) -> Any:
        calls.append(len(cotangents))
        return real(roots, cotangents, leaves)

    monkeypatch.setattr(by_engine, "pulled_back", counted)
    return calls


def later(f: Callable[..., Any], *primals: T, **options: Any) -> lz.Linearization:
    """A point of a Linearizer that has met one before."""
    lin = lz.Linearizer(f, maxsize=0, **options)
    here = lin.at(*[p + 0.1 for p in primals])
    here.vjp_fn(_like(here.value))
    return lin.at(*primals)


def _like(value: Any) -> Any:
    return torch.utils._pytree.tree_map(
        lambda t: torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).reshape(t.shape), value
    )


def native(f: Callable[..., Any], primals: tuple[T, ...], u: Any) -> list[T]:
    leaves = [p.detach().clone().requires_grad_() for p in primals]
    outputs = torch.utils._pytree.tree_leaves(f(*leaves))
    pairs = zip(outputs, torch.utils._pytree.tree_leaves(u), strict=True)
    chosen = [(y, c) for y, c in pairs if y.requires_grad]
    grads = torch.autograd.grad(
        [y for y, _ in chosen], leaves, [c for _, c in chosen], allow_unused=True
    )
    return [torch.zeros_like(p) if g is None else g for p, g in zip(primals, grads, strict=True)]


X, Y = torch.linspace(0.1, 1, 4, dtype=D), torch.linspace(1, 2, 4, dtype=D)
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "products": lambda x, y: (W @ (x * y)).sin(),
    "broadcast": lambda x, y: (W + x) * y.exp(),
    "unused": lambda x, y: x.exp(),
    "itself": lambda x, y: x,
    "a view": lambda x, y: x.view(2, 2),
    "shifted": lambda x, y: x + 1,
    "sum": lambda x, y: x + y,
    "several": lambda x, y: {"a": x * y, "b": (x.sum(), y.cumsum(0)), "c": torch.ones(2, dtype=D)},
    "twice": lambda x, y: (z := x * y, z),
    "scalar": lambda x, y: x.sum() + (y * y).sum(),
    "complex": lambda x, y: torch.fft.rfft(x * torch.complex(y, x)[0].real),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_products_are_those_of_autograd_from_first_to_last(name: str, asked: list[int]) -> None:
    f = FUNCTIONS[name]
    here = later(f, X, Y)
    for k in range(BY_ENGINE + 3):
        u = torch.utils._pytree.tree_map(lambda t, k=k: t + k, _like(here.value))
        torch.testing.assert_close(list(here.vjp_fn(u)), native(f, (X, Y), u))
    assert len(asked) == BY_ENGINE


@pytest.mark.parametrize("name", FUNCTIONS)
def test_results_are_the_callers_own(name: str) -> None:
    here = later(FUNCTIONS[name], X, Y)
    u = _like(here.value)
    kept = torch.utils._pytree.tree_map(torch.clone, u)
    expected = [g.clone() for g in here.vjp_fn(u)]
    for g in here.vjp_fn(u):
        g.fill_(torch.nan)
    torch.testing.assert_close(u, kept)
    torch.testing.assert_close(list(here.vjp_fn(u)), expected)


def test_sparse_gradients_are_dense_here(asked: list[int]) -> None:
    places = torch.tensor([0, 2, 2])
    here = later(lambda w: F.embedding(places, w, sparse=True) * 2, W)
    u = torch.linspace(-1, 1, 12, dtype=D).reshape(3, 4)
    expected = torch.zeros_like(W).index_add(0, places, 2 * u)
    for _ in range(BY_ENGINE + 2):
        torch.testing.assert_close(here.vjp_fn(u)[0], expected)
    assert len(asked) == BY_ENGINE


def test_parts_of_a_cotangent_may_be_missing(asked: list[int]) -> None:
    def f(x: T, y: T) -> tuple[T, T]:
        return x * y, y.exp()

    here = later(f, X, Y)
    x_bar, y_bar = here.vjp_fn((X, None))
    torch.testing.assert_close((x_bar, y_bar), (X * Y, X * X))
    x_bar, y_bar = here.vjp_fn((None, X))
    torch.testing.assert_close((x_bar, y_bar), (torch.zeros_like(X), Y.exp() * X))
    assert asked == [1, 1]


def test_the_first_point_is_recorded(asked: list[int]) -> None:
    lin = lz.Linearizer(lambda x: x.sin(), maxsize=0)
    lin.at(X).vjp_fn(X)
    assert not asked
    assert lin.stats().recorded == 1


def test_a_point_that_found_its_programs_uses_them(asked: list[int]) -> None:
    here = later(lambda x: x.sin(), X)
    here.jvp_fn(X)
    torch.testing.assert_close(here.vjp_fn(X)[0], X.cos() * X)
    assert not asked


class Cube(torch.autograd.Function):
    calls = 0

    @staticmethod
    def forward(ctx: Any, x: T) -> T:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, u: T) -> T:
        Cube.calls += 1
        (x,) = ctx.saved_tensors
        return 3 * x**2 * u


def test_custom_functions_are_called_by_programs(asked: list[int]) -> None:
    here = later(lambda x: Cube.apply(x) * 2, X)
    torch.testing.assert_close(here.vjp_fn(X)[0], 6 * X**3)
    assert not asked


def leaks(x: T, out: list[T]) -> T:
    out.append(y := x * 2)
    return y.sin()


def test_a_hook_registered_afterwards_is_not_run(asked: list[int]) -> None:
    seen: list[T] = []
    here = later(lambda x: leaks(x, seen), X)
    right = 2 * (2 * X).cos() * X
    torch.testing.assert_close(here.vjp_fn(X)[0], right)
    seen[-1].register_hook(lambda g: 10 * g)
    for _ in range(4):
        torch.testing.assert_close(here.vjp_fn(X)[0], right)
    assert len(asked) == 1


def test_nor_is_one_that_another_thread_registers_in_f(asked: list[int]) -> None:
    def f(x: T) -> T:
        y = x * 2
        worker = threading.Thread(target=lambda: y.register_hook(lambda g: 10 * g))
        worker.start()
        worker.join()
        return y.sin()

    here = later(f, X)
    torch.testing.assert_close(here.vjp_fn(X)[0], 2 * (2 * X).cos() * X)
    assert not asked


def test_handles_are_made_as_ever_when_the_points_are_gone() -> None:
    gc.collect()
    before, enter = RemovableHandle.__init__, torch.autograd.graph.saved_tensors_hooks.__enter__
    here = later(lambda x: x.sin(), X)
    here.vjp_fn(X)
    del here
    gc.collect()
    assert RemovableHandle.__init__ is before
    assert torch.autograd.graph.saved_tensors_hooks.__enter__ is enter


def test_a_checkpoint_of_somebody_else_does_not_count(asked: list[int]) -> None:
    here = later(lambda x: x.sin(), X)
    checkpoint(torch.sin, X.clone().requires_grad_(), use_reentrant=False).sum().backward()
    torch.testing.assert_close(here.vjp_fn(X)[0], X.cos() * X)
    assert len(asked) == 1


def test_a_checkpoint_runs_no_more_often_than_before(asked: list[int]) -> None:
    runs = []

    def block(x: T) -> T:
        runs.append(1)
        return x.sin().exp()

    here = later(lambda x: checkpoint(block, x, use_reentrant=False) * x, X)
    torch.testing.assert_close(here.vjp_fn(X)[0], (X.sin().exp() * (1 + X * X.cos())) * X)
    assert not asked


@pytest.mark.parametrize("around", [False, True])
def test_saved_tensors_are_unpacked_by_programs(around: bool, asked: list[int]) -> None:
    hooks = torch.autograd.graph.saved_tensors_hooks

    def f(x: T) -> T:
        if around:
            return x.sin()
        with hooks(lambda t: t + 0, lambda t: t):
            return x.sin()

    with hooks(lambda t: t + 0, lambda t: t):
        here = later(f, X)
    torch.testing.assert_close(here.vjp_fn(X)[0], X.cos() * X)
    assert not asked


@pytest.mark.parametrize(
    "mode",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.inference_mode(),
        lambda: FlopCounterMode(display=False),
    ],
)
def test_inside_of_modes_programs_run(mode: Any, asked: list[int]) -> None:
    here = later(lambda x: (x * 2).sin(), X)
    with mode():
        torch.testing.assert_close(here.vjp_fn(X)[0], 2 * (2 * X).cos() * X)
    assert not asked


def test_batches_and_derivatives_go_on(asked: list[int]) -> None:
    here = later(lambda x: (W * x).sin().sum(0), X)
    slope = (W * X).cos().mul(W).sum(0)
    stack = torch.stack([X, Y])
    torch.testing.assert_close(torch.vmap(lambda u: here.vjp_fn(u)[0])(stack), stack * slope)
    here = later(lambda x: (W * x).sin().sum(0), X)
    u = X.clone().requires_grad_()
    (g,) = here.vjp_fn(u)
    torch.testing.assert_close(g.detach(), slope * X)
    (again,) = torch.autograd.grad(g, u, Y, create_graph=True)
    torch.testing.assert_close(again.detach(), slope * Y)
    assert len(asked) == 1


@pytest.mark.parametrize("before", [0, 1])
def test_what_was_changed_is_noticed(before: int) -> None:
    x = X.clone()
    here = later(lambda x: x.sin(), x)
    for _ in range(before):
        here.vjp_fn(X)
    x.add_(1)
    with pytest.raises(StalenessError, match="changed in place"):
        here.vjp_fn(X)


def test_the_graph_goes_with_the_product() -> None:
    seen: list[weakref.ref[T]] = []

    def f(x: T) -> T:
        seen.append(weakref.ref(y := x * 2))
        return y.sin().exp()

    for products in (1, BY_ENGINE + 1):
        vjp_fn = later(f, X).vjp_fn
        for _ in range(products):
            vjp_fn(X)
        assert (seen[-1]() is None) == (products > BY_ENGINE)
        del vjp_fn
        gc.collect()
        assert seen[-1]() is None


def test_programs_come_at_once_where_points_are_asked_for_many(asked: list[int]) -> None:
    lin = lz.Linearizer(lambda x: (W * x).sin().sum(0))
    right = [(W * (X + k)).cos().mul(W).sum(0) * X for k in range(4)]
    lin.at(X - 1).vjp_fn(X)
    for k, products in enumerate((BY_ENGINE, BY_ENGINE + 1, 2, 1)):
        here = lin.at(X + k)
        for _ in range(products):
            torch.testing.assert_close(here.vjp_fn(X)[0], right[k])
    assert len(asked) == 2 * BY_ENGINE  # the second of these points told that more will come


def test_threads_get_the_same() -> None:
    here = later(lambda x: (W * x).sin().sum(0), X)
    right = (W * X).cos().mul(W).sum(0) * X
    found: list[T] = []
    workers = [
        threading.Thread(target=lambda: found.extend(here.vjp_fn(X)[0] for _ in range(5)))
        for _ in range(4)
    ]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert len(found) == 20
    for g in found:
        torch.testing.assert_close(g, right)


def test_check_always_compares_the_programs(asked: list[int]) -> None:
    here = later(lambda x: x.sin(), X, check="always")
    here.vjp_fn(X)
    assert not asked
