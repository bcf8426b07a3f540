"""Several threads at once: `at` runs f once per point, products stay right."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import linearize as lz
from linearize.errors import ClosedError
from tests.support.functions import rand

PATIENCE = 60.0  # seconds; nothing here takes more than a moment unless it hangs


def together(n: int, call: Callable[[int], Any]) -> list[Any]:
    """Results, or exceptions, of n calls that start at the same moment."""
    start = threading.Barrier(n)
    results: list[Any] = [TimeoutError("a thread hangs")] * n

    def run(i: int) -> None:
        start.wait(PATIENCE)
        try:
            results[i] = call(i)
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(n)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(PATIENCE)
    for r in results:
        if isinstance(r, TimeoutError):
            raise r
    return results


@pytest.mark.parametrize("match", ["identity", "value"])
def test_one_run_for_the_same_primals(match: Any) -> None:
    runs = 0
    entered, release = threading.Event(), threading.Event()

    def f(x: torch.Tensor) -> torch.Tensor:
        nonlocal runs
        runs += 1
        entered.set()
        release.wait(PATIENCE)
        return x.sin()

    lin = lz.Linearizer(f, match=match)
    x = rand(3)
    timer = threading.Timer(0.2, release.set)
    timer.start()
    points = together(8, lambda i: lin.at(x if match == "identity" else x.clone()))
    timer.join()
    assert runs == 1
    assert all(p is points[0] for p in points)
    stats = lin.stats()
    assert (stats.hits, stats.misses) == (7, 1)


def test_different_primals_do_not_wait_for_each_other() -> None:
    """Each run waits until the other has started too."""
    both = threading.Barrier(2)

    def f(x: torch.Tensor) -> torch.Tensor:
        both.wait(PATIENCE)
        return x * 2

    lin = lz.Linearizer(f)
    primals = [rand(3, seed=i) for i in range(2)]
    points = together(2, lambda i: lin.at(primals[i]))
    for x, here in zip(primals, points, strict=True):
        torch.testing.assert_close(here.value, 2 * x)


class Cube(torch.autograd.Function):
    """Keeps things on its context while a method runs: calls must not overlap."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        ctx.g = g
        (x,) = ctx.saved_tensors
        return 3 * x**2 * ctx.g

    @staticmethod
    def jvp(ctx: Any, v: torch.Tensor) -> torch.Tensor:
        ctx.v = v
        (x,) = ctx.saved_tensors
        return 3 * x**2 * ctx.v


@pytest.mark.parametrize("warm", [False, True])
def test_products_at_once(warm: bool) -> None:
    W = rand(4, 4)
    x = rand(4, seed=1)
    here = lz.Linearizer(lambda x: Cube.apply(W @ x).tanh()).at(x)
    J = torch.func.jacrev(lambda x: ((W @ x) ** 3).tanh())(x)
    if warm:
        here.jvp_fn(x)
        here.vjp_fn(x)

    def call(i: int) -> None:
        for k in range(20):
            v = rand(4, seed=100 * i + k)
            if (i + k) % 3 == 0:
                torch.testing.assert_close(here.jvp_fn(v), J @ v)
            elif (i + k) % 3 == 1:
                torch.testing.assert_close(here.vjp_fn(v)[0], J.T @ v)
            else:
                v.requires_grad_()
                (g,) = torch.autograd.grad(here.jvp_fn(v), v, x)
                torch.testing.assert_close(g, J.T @ x)

    assert together(8, call) == [None] * 8


def test_many_points_at_once() -> None:
    lin = lz.Linearizer(lambda x: x.sin() * x, maxsize=3)
    shared = [rand(3, seed=i) for i in range(6)]

    def call(i: int) -> None:
        for k in range(60):
            x = shared[(i * 7 + k) % 6] if k % 2 else rand(3, seed=1000 * i + k)
            here = lin.at(x)
            torch.testing.assert_close(here.value, x.sin() * x)
            torch.testing.assert_close(here.jvp_fn(x), x * (x.cos() * x + x.sin()))
            lin.stats()
            if k % 20 == 0:
                lin.clear()

    assert together(6, call) == [None] * 6
    stats = lin.stats()
    assert stats.hits + stats.misses == 360
    assert stats.points <= 3


class OwnError(Exception):
    pass


def test_an_error_in_one_thread_does_not_block_the_others() -> None:
    """Whoever waited for the run that failed makes a run of its own."""
    lock = threading.Lock()
    fail = [True]
    running = threading.Event()

    def f(x: torch.Tensor) -> torch.Tensor:
        with lock:
            first, fail[0] = fail[0], False
        if first:
            running.wait(0.2)
            raise OwnError
        return x * 2

    lin = lz.Linearizer(f)
    x = rand(3)
    results = together(5, lambda i: lin.at(x))
    errors = [r for r in results if isinstance(r, OwnError)]
    points = [r for r in results if isinstance(r, lz.Linearization)]
    assert (len(errors), len(points)) == (1, 4)
    assert all(p is points[0] for p in points)
    assert lin.at(x) is points[0]


def test_points_that_ask_for_each_other_do_not_deadlock() -> None:
    """Two threads run f at two points, and each run asks for the point of the other."""
    primals = [rand(3), rand(3, seed=1)]
    both = threading.Barrier(2)
    inside = threading.local()

    def f(x: torch.Tensor, other: int) -> torch.Tensor:
        if getattr(inside, "yes", False):
            return x * 2
        inside.yes = True
        both.wait(PATIENCE)
        below = lin.at(primals[other], 1 - other)
        return x * 2 + 0 * below.value

    lin = lz.Linearizer(f, argnums=0)
    points = together(2, lambda i: lin.at(primals[i], 1 - i))
    for x, here in zip(primals, points, strict=True):
        torch.testing.assert_close(here.value, 2 * x)


def test_contexts_are_watched_per_thread() -> None:
    """What a Function saves in one thread must not end up with the run of another."""
    both = threading.Barrier(4)

    class Weighted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            ctx.save_for_forward(w)
            ctx.save_for_backward(x)
            both.wait(PATIENCE)
            return x * w

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> Any:
            raise AssertionError("not needed")

        @staticmethod
        def jvp(ctx: Any, v: torch.Tensor, _: Any) -> torch.Tensor:
            (w,) = ctx.saved_for_forward
            return v * w

    x = rand(3)

    def call(i: int) -> torch.Tensor:
        w = rand(3, seed=10 + i)
        here = lz.Linearizer(lambda x: Weighted.apply(x, w)).at(x)
        torch.testing.assert_close(here.jvp_fn(x), x * w)
        return here.value

    values = together(4, call)
    for i, value in enumerate(values):
        torch.testing.assert_close(value, x * rand(3, seed=10 + i))


def test_grad_mode_of_the_calling_thread_stays() -> None:
    x = rand(3)

    def call(i: int) -> tuple[bool, bool]:
        with torch.set_grad_enabled(i % 2 == 0):
            for _ in range(20):
                here = lz.Linearizer(torch.sin).at(x)
                here.jvp_fn(x)
                here.vjp_fn(x)
            return torch.is_grad_enabled(), i % 2 == 0

    for got, expected in together(4, call):
        assert got == expected


def test_closing_while_others_work() -> None:
    """Each product is right or says that it was closed; nothing in between."""
    W = rand(20, 20)
    x = rand(20)
    expected = (W @ x).cos() * (W @ x)
    for _ in range(10):
        here = lz.Linearizer(lambda x: (W @ x).sin()).at(x)

        def call(i: int, here: lz.Linearization = here) -> int:
            done = 0
            if i == 0:
                here.jvp_fn(x)
                here.close()
                return 0
            for _ in range(50):
                try:
                    torch.testing.assert_close(here.jvp_fn(x), expected)
                except ClosedError:
                    return done
                done += 1
            return done

        assert all(isinstance(r, int) for r in together(4, call))
        with pytest.raises(ClosedError):
            here.jvp_fn(x)


def test_a_pool_of_workers() -> None:
    """Closures made in one thread, used in others, freed in any."""
    with ThreadPoolExecutor(4) as pool:
        closures = list(
            pool.map(lambda i: lz.Linearizer(torch.sin).at(rand(3, seed=i)).jvp_fn, range(20))
        )
        ones = torch.ones(3, dtype=torch.float64)
        results = list(pool.map(lambda fn: fn(ones), closures))
    for i, r in enumerate(results):
        torch.testing.assert_close(r, rand(3, seed=i).cos())


def test_torch_compile_works_after_two_threads_have_linearized_at_once() -> None:
    import torch._dynamo

    from linearize._torch.contexts import eager_compiled_functions

    first, second = eager_compiled_functions(), eager_compiled_functions()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # not in the order of a stack, as threads do
    second.__exit__(None, None, None)
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compile(torch.sin, backend=backend)(torch.ones(3))
    assert len(graphs) == 1
