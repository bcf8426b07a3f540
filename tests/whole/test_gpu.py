"""Products where the data lives: on a GPU, without the host waiting for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import linearize as lz
from benchmarks import gpu
from benchmarks.case import Case

pytestmark = pytest.mark.gpu


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode(before)


def f(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x @ w).softmax(-1) * x.sin()


def test_products_stay_on_the_device_and_equal_those_of_the_cpu() -> None:
    point = [torch.randn(8, 8, dtype=torch.float64) for _ in range(2)]
    v = [torch.randn(8, 8, dtype=torch.float64) for _ in range(2)]
    u = torch.randn(8, 8, dtype=torch.float64)
    there = lz.Linearizer(f).at(*(t.cuda() for t in point))
    here = lz.Linearizer(f).at(*point)
    for _ in range(5):
        jv = there.jvp_fn(*(t.cuda() for t in v))
        ju = there.vjp_fn(u.cuda())
        assert jv.is_cuda
        assert all(t.is_cuda for t in ju)
        torch.testing.assert_close(jv.cpu(), here.jvp_fn(*v))
        torch.testing.assert_close([t.cpu() for t in ju], list(here.vjp_fn(u)))


def test_products_do_not_wait_for_the_device(request: pytest.FixtureRequest) -> None:
    point = [torch.randn(8, 8, device="cuda") for _ in range(2)]
    there = lz.Linearizer(f).at(*point)
    for _ in range(5):  # recorded and simplified by now, which does synchronise
        there.jvp_fn(*point)
        there.vjp_fn(point[0])
    request.getfixturevalue("no_synchronisation")
    there.jvp_fn(*point)
    there.vjp_fn(point[0])


def test_a_tangent_on_another_device_is_refused() -> None:
    there = lz.Linearizer(torch.sin).at(torch.ones(3, device="cuda"))
    with pytest.raises(lz.errors.SpaceError, match="device: expected cuda:0, got cpu"):
        there.jvp_fn(torch.ones(3))


def test_products_work_on_a_stream_that_is_not_the_one_of_capture() -> None:
    point = [torch.randn(64, 64, dtype=torch.float64, device="cuda") for _ in range(2)]
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    first.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(first):
        there = lz.Linearizer(f).at(*point)
        there.vjp_fn(point[0])
    second.wait_stream(first)
    with torch.cuda.stream(second):
        found = [there.jvp_fn(*point) for _ in range(5)]
        pulled = there.vjp_fn(point[0])
    torch.cuda.current_stream().wait_stream(second)
    expected = torch.func.jvp(f, tuple(point), tuple(point))[1]
    for jv in found:
        torch.testing.assert_close(jv, expected)
    leaves = [p.clone().requires_grad_() for p in point]
    expected_back = torch.autograd.grad(f(*leaves), leaves, point[0])
    torch.testing.assert_close(list(pulled), list(expected_back))


def test_products_can_be_captured_into_a_graph_and_replayed() -> None:
    point = [torch.randn(32, 32, dtype=torch.float64, device="cuda") for _ in range(2)]
    there = lz.Linearizer(f).at(*point)
    replay = gpu.replayed(there.jvp_fn, tuple(point))
    for seed in range(3):
        torch.manual_seed(seed)
        v = [torch.randn_like(p) for p in point]
        torch.testing.assert_close(replay(*v)[0], torch.func.jvp(f, tuple(point), tuple(v))[1])


def test_a_triton_function_runs_its_own_kernels(request: pytest.FixtureRequest) -> None:
    pytest.importorskip("triton")
    from benchmarks.triton_functions import SiLU

    x = torch.randn(5000, device="cuda")
    w = torch.randn(5000, device="cuda")
    runs = 0

    def g(x: torch.Tensor) -> torch.Tensor:
        nonlocal runs
        runs += 1
        return SiLU.apply(SiLU.apply(x) * w)

    def plain(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(torch.nn.functional.silu(x) * w)

    there = lz.Linearizer(g).at(x)
    v, u = torch.randn_like(x), torch.randn_like(x)
    expected = torch.func.jvp(plain, (x,), (v,))[1]
    (pulled,) = torch.func.vjp(plain, x)[1](u)
    for _ in range(4):
        torch.testing.assert_close(there.jvp_fn(v), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(there.vjp_fn(u)[0], pulled, rtol=1e-4, atol=1e-5)
    assert runs == 1
    request.getfixturevalue("no_synchronisation")
    there.jvp_fn(v)
    there.vjp_fn(u)


def test_large_products_take_the_time_of_their_kernels() -> None:
    w = torch.randn(4096, 4096, device="cuda")
    x = torch.randn(4096, 4096, device="cuda")
    there = lz.Linearizer(lambda x: torch.tanh(torch.tanh(x @ w) @ w)).at(x)
    for _ in range(5):
        there.jvp_fn(x)
    elapsed = min(gpu.seconds(lambda: there.jvp_fn(x)) for _ in range(3))
    assert elapsed < 1.3 * gpu.kernel_seconds(lambda: there.jvp_fn(x))


@pytest.mark.parametrize("case", gpu.cases()[:4], ids=lambda case: case.name)
def test_the_benchmark_verifies_its_engines(case: Case) -> None:
    found = gpu.measure(case, 1)["engines"]
    for name in ("linearize", "linearize, captured", "limit", "limit, captured"):
        assert "error" in found[name], found[name]


# -- compiled, and replayed from CUDA graphs ----------------------------------------------------


class Doubled(torch.autograd.Function):
    """2x, by the host: cannot be captured."""

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return (2 * grad.cpu()).cuda()

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor) -> torch.Tensor:
        return (2 * tangent.cpu()).cuda()


def steps(x: torch.Tensor, middle: Any) -> torch.Tensor:
    for i in range(12):
        x = x + 0.1 * (x.roll(1) - x.roll(-1)) * x
        x = middle(x) / 2 if i == 5 else x
    return x


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("middle", [lambda x: 2 * x, Doubled.apply])
@pytest.mark.parametrize("options", [True, {"backend": "eager"}])
def test_replayed_products_equal_those_of_the_cpu(middle: Any, options: Any) -> None:
    x = torch.linspace(-1, 1, 500, dtype=torch.float64)
    lin = lz.Linearizer(lambda x: steps(x, middle), compile=options, dense_limit=0)
    for k in range(2):
        point = x * (1 + k)
        there = lin.at(point.cuda())
        here = lz.Linearizer(lambda x: steps(x, lambda x: 2 * x)).at(point)
        kept = []
        for i in range(8):
            v = (x + i).cos()
            kept.append((there.jvp_fn(v.cuda()), here.jvp_fn(v)))
            kept.append((there.vjp_fn(v.cuda())[0], here.vjp_fn(v)[0]))
        for got, expected in kept:  # none of them was overwritten by a later run
            torch.testing.assert_close(got.cpu(), expected)


def replaying(size: int = 1 << 20) -> tuple[lz.Linearization, torch.Tensor]:
    x = torch.linspace(-1, 1, size, device="cuda", dtype=torch.float64)
    here = lz.Linearizer(
        lambda x: steps(x, lambda x: 2 * x), compile={"backend": "eager"}, dense_limit=0
    ).at(x)
    for _ in range(8):
        here.jvp_fn(x)
    return here, x


def test_runs_on_several_streams_wait_for_each_other() -> None:
    here, x = replaying()
    expected = [here.jvp_fn(x * k).cpu() for k in range(8)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for k in range(8):
        with torch.cuda.stream(streams[k % 4]):
            results.append(here.jvp_fn(x * k))
    torch.cuda.synchronize()
    for got, e in zip(results, expected, strict=True):
        torch.testing.assert_close(got.cpu(), e)


def test_replayed_products_do_not_wait_for_the_device(request: pytest.FixtureRequest) -> None:
    here, x = replaying(1000)
    request.getfixturevalue("no_synchronisation")
    here.jvp_fn(x)
