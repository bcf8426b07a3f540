"""No product needs a number on the host: on an accelerator it would wait for the device.

Products run under `FakeTensorMode`, whose tensors have no numbers: to ask for one is an error.
Points are linearized and settled with real tensors before. Where a CPU may look at a result and
an accelerator must not, the test says that numbers are not at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import linearize as lz
from linearize._execute.thresholds import MATRIX_FROM
from tests.support.functions import backward_only, direction, point

N = 6
W = torch.linspace(-2, 3, N * N, dtype=torch.float64).sin().reshape(N, N)


def chain(x: torch.Tensor) -> torch.Tensor:
    for _ in range(5):
        x = (x * 1.1 - 0.02).sin()
    return x


def layers(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm((x @ W).tanh() @ W, (N,)).softmax(-1)


def attention(x: torch.Tensor) -> torch.Tensor:
    q = torch.outer(x, x)
    return F.scaled_dot_product_attention(*(t[None, None] for t in (q, q.sin(), q.cos())))


def stencil(x: torch.Tensor) -> torch.Tensor:
    for _ in range(8):
        x = x + 0.1 * (x.roll(1) - 2 * x + x.roll(-1)) - 0.05 * x.relu()
    return x


def convolution(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool1d(F.silu(F.conv1d(x[None, None], W[:2, None, :3], padding=1)), 2)


def choices(x: torch.Tensor) -> torch.Tensor:
    y = torch.where(x > 0.8, x.exp(), x[[5, 3, 3, 1, 0, 2]])
    return torch.cat([y.cumsum(0), y.sort().values, y.clamp(0.5, 1).amax(0, keepdim=True)])


def solved(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.solve(W + torch.diag(x), x)


def spectrum(x: torch.Tensor) -> torch.Tensor:
    return torch.fft.rfft(x * x).abs()


def written(x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros(N + 2, dtype=x.dtype)
    y[1:-1] = x.sin()
    y.index_add_(0, torch.tensor([0, 1, 0, 3, 4, 7]), x * x)
    return y


def _swish(ctx: Any, u: torch.Tensor) -> torch.Tensor:
    (x,) = ctx.saved_tensors
    return u * (x.sin() + x * x.cos())


custom = backward_only(_swish).apply
FUNCTIONS = (
    chain, layers, attention, stencil, convolution, choices, solved, spectrum, written, custom
)  # fmt: skip


@pytest.fixture(params=FUNCTIONS, ids=lambda f: getattr(f, "__name__", "custom"))
def f(request: pytest.FixtureRequest) -> Callable[[torch.Tensor], torch.Tensor]:
    found: Callable[[torch.Tensor], torch.Tensor] = request.param
    return found


@pytest.fixture
def accelerated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the CPU for a device whose numbers are not at hand."""
    for place in ("dense", "plan"):
        monkeypatch.setattr(f"linearize._forms.{place}.numbers_at_hand", lambda _: False)


def without_numbers(call: Callable[..., Any], *arguments: torch.Tensor) -> None:
    """Call with tensors that have no numbers, and compare shapes with those of a real call."""
    expected = call(*arguments)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        found = call(*(mode.from_tensor(t) for t in arguments))
    for got, known in zip(
        *(t if isinstance(t, tuple) else (t,) for t in (found, expected)), strict=True
    ):
        assert got.fake_mode is mode
        assert got.shape == known.shape
        assert got.dtype == known.dtype


def test_to_ask_for_a_number_is_seen() -> None:
    with pytest.raises(DataDependentOutputException):
        without_numbers(lambda x: x / x.sum().item(), point(N))


@pytest.mark.parametrize("simplify", [True, False])
@pytest.mark.parametrize("calls", [8, MATRIX_FROM + 10])
def test_products(
    f: Callable[[torch.Tensor], torch.Tensor], accelerated: None, calls: int, simplify: bool
) -> None:
    """Of whatever form has taken over by their count, at a second point as well."""
    lin = lz.Linearizer(f, simplify=simplify)
    for k in range(2):
        here = lin.at(point(N, seed=k))
        v, u = direction(point(N)), direction(here.value)
        for _ in range(calls):
            here.jvp_fn(v)
            here.vjp_fn(u)
        without_numbers(here.jvp_fn, v)
        without_numbers(here.vjp_fn, u)


def test_gram_and_stacks(f: Callable[[torch.Tensor], torch.Tensor], accelerated: None) -> None:
    here = lz.Linearizer(f).at(point(N))
    v, u = direction(point(N)), direction(here.value)
    J = here.jacobian
    vs, us = (torch.stack([t, t.sin(), t.cos()]) for t in (v, u))
    calls = (
        (J.gram().__matmul__, v),
        (here.jvp_fn.batched, vs),
        (here.vjp_fn.batched, us),
        (torch.vmap(here.jvp_fn), vs),
    )
    for _ in range(MATRIX_FROM + 10):
        for call, given in calls:
            call(given)
    for call, given in calls:
        without_numbers(call, given)


@pytest.mark.parametrize(("n", "dense"), [(N, 1), (40, 0)])
def test_a_matrix_takes_over_where_none_of_its_results_need_be_looked_at(
    accelerated: None, n: int, dense: int
) -> None:
    """One without zeros; another one would spread what is not finite."""
    lin, x = lz.Linearizer(stencil), point(n)
    here, v = lin.at(x), direction(point(n))
    expected = torch.func.jvp(stencil, (x,), (v,))[1]
    for _ in range(MATRIX_FROM + 10):
        torch.testing.assert_close(here.jvp_fn(v), expected)
    assert lin.stats().dense == dense
    without_numbers(here.jvp_fn, v)
