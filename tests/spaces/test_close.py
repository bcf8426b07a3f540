"""When two tensors count as the same, and what it takes to find out."""

from __future__ import annotations

import pytest
import torch

from benchmarks.measure import memory
from linearize._spaces import compare
from linearize._spaces.compare import close, rounding

NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=[8, 1 << 20], ids=["in pieces", "at once"])
def _pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "_AT_ONCE", request.param)


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("shape", [(50,), (7, 9), (2, 3, 11), (60, 1)])
def test_a_difference_is_seen_wherever_it_is(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(shape, dtype=dtype, generator=generator)
    assert close(a, a.clone(), rounding)
    assert close(a, a * (1 + torch.finfo(dtype).eps), rounding)
    for place in (0, a.numel() // 2, a.numel() - 1):
        b = a.clone()
        b.view(-1)[place] += 0.01
        assert not close(a, b, rounding)
        b.view(-1)[place] = NAN
        assert not close(a, b, rounding)
        assert close(b, b.clone(), rounding)
    assert not close(a, a[:1], rounding)
    turned = a.transpose(0, -1)
    assert close(turned, turned.contiguous(), rounding)


@pytest.mark.usefixtures("_pieces")
def test_the_largest_number_of_all_is_the_measure() -> None:
    a = torch.zeros(40, dtype=torch.float64)
    a[3] = 1e6
    b = a.clone()
    b[33] = 1e-4  # nothing beside a million, much beside zero
    assert close(a, b, rounding)
    a[3] = b[3] = INF
    assert not close(a, b, rounding)
    assert close(torch.zeros(40), torch.zeros(40))


def test_large_tensors_are_compared_in_little_memory() -> None:
    a = torch.randn(2500, 2500)
    _, peak = memory(lambda: close(a, a, rounding))
    assert peak < 3 * a.nbytes
