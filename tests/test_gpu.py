"""Products where the data lives: on a GPU, without the host waiting for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import linearize as lz

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
