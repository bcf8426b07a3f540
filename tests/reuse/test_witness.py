"""What a call met that was watched, and what of it may differ at a later point without a trace."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import linearize as lz
from linearize._reuse.shared import SHARED
from tests.support.comparing import CALLS

D = torch.float64
N = 6


def numbers(seed: int, *shape: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (N,)), dtype=D, generator=g)


@pytest.fixture(autouse=True)
def forgotten() -> None:
    SHARED.clear()


def function(backward: Callable[..., Any], value: Callable[..., Any] = torch.sin) -> Any:
    """Return a Function of x and an object, with a backward only."""

    class Made(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, state: Any) -> torch.Tensor:
            ctx.save_for_backward(x)
            ctx.state = state
            return value(x)

        @staticmethod
        def _backward(ctx: Any, g: torch.Tensor) -> Any:
            return backward(ctx.state, g, *ctx.saved_tensors), None

    Made.backward = Made._backward
    return Made.apply


def matrix(f: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
    return torch.autograd.functional.jacobian(f, x).reshape(-1, x.numel())


def agree(here: lz.Linearization, j: torch.Tensor, count: int = CALLS) -> None:
    for k in range(count):
        v, u = numbers(20 + k), numbers(30 + k, len(j))
        torch.testing.assert_close(here.jvp_fn(v), j @ v)
        torch.testing.assert_close(here.vjp_fn(u)[0], u @ j)


def through(backward: Callable[..., Any], *states: Any) -> lz.Linearizer:
    """Compare at a point for each state."""
    apply = function(backward)
    now = states[0]
    lin = lz.Linearizer(lambda x: apply(x * 2, now) * x, maxsize=0, opaque="materialize")
    for k, now in enumerate(states):
        x = numbers(k)
        j = matrix(lambda x, now=now: apply(x * 2, now) * x, x)
        agree(lin.at(x), j)
    return lin


# -- zeros -------------------------------------------------------------------------------------


def test_a_zero_that_scales_is_a_number_like_any_other() -> None:
    states = [numbers(k) * (k % 3 > 0) for k in range(6)]
    lin = through(lambda a, g, x: g * x + g.flip(0) * a, *states)
    assert (lin.stats().recorded, lin.stats().reused) == (1, 5)


def test_two_factors_that_were_equal_at_one_point() -> None:
    pairs = [(numbers(1), numbers(1)), (numbers(2), numbers(3)), (numbers(4), numbers(4))]
    lin = through(lambda s, g, x: g * s[0] * x + (g * s[1]).flip(0), *pairs, *pairs)
    assert (lin.stats().recorded, lin.stats().reused) == (1, 5)


def test_zeros_behind_a_mask_that_are_none_later() -> None:
    """The transpose drops what the mask drops, which is right for zeros only."""

    def backward(s: Any, g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.where(s[0] != 0, g / s[0], s[1])

    masks = [torch.tensor([1.0, 0, 2, 0, 1, 3], dtype=D).roll(k) for k in range(4)]
    zero = torch.zeros(N, dtype=D)
    lin = through(backward, *((m, zero.clone()) for m in masks))
    assert lin.stats().recorded == 1
    apply = function(backward)
    state = masks[0], zero
    lin = lz.Linearizer(lambda x: apply(x, state), maxsize=0, opaque="error")
    lin.at(zero).jvp_fn(numbers(1))
    state = masks[1], zero + 1
    with pytest.raises(lz.LinearizeError):  # that is no linear map
        lin.at(zero).jvp_fn(numbers(1))
    state = masks[2], zero
    agree(lin.at(zero), torch.diag(torch.where(masks[2] != 0, 1 / masks[2], 0)))


def test_a_sum_with_zeros_that_are_none_later() -> None:
    apply = function(lambda a, g, x: g * x + a)
    state = torch.zeros(N, dtype=D)
    lin = lz.Linearizer(lambda x: apply(x, state), maxsize=0, opaque="error")
    for k in range(6):
        state = torch.full((N,), float(k % 2), dtype=D)
        here, x = lin.at(numbers(k)), numbers(k)
        if k % 2:
            with pytest.raises(lz.LinearizeError):
                here.jvp_fn(x)
        else:
            agree(here, torch.diag(x))


def out_of_sight(k: Any, g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    out = torch.empty(N, dtype=D)
    out.numpy()[:] = g.numpy() * k
    return out


def partly(k: Any, g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return g * x + torch.from_numpy(g.numpy() * k)


@pytest.mark.parametrize("backward", [out_of_sight, partly])
@pytest.mark.parametrize("states", [(0.0, 2.0, 0.0, 3.0), (2.0, 0.0, 2.0)], ids=str)
def test_nothing_at_one_point_and_out_of_sight_at_another(backward: Any, states: Any) -> None:
    through(backward, *states)


@pytest.mark.parametrize("indices", [([0, 1, 2], [0, 0, 2], [3, 1, 0]), ([2, 2, 1], [0, 1, 2])])
def test_indices_that_repeat_themselves_at_a_later_point(indices: Any) -> None:
    """Into a part of a tensor: PyTorch counts entries there that others overwrite."""

    def f(x: torch.Tensor) -> torch.Tensor:
        out = x * 1
        out[:4].index_put_((index,), x[3:].sin())
        return out

    lin = lz.Linearizer(f, maxsize=0)
    for k, i in enumerate(indices * 2):
        index, x = torch.tensor(i), numbers(k)
        if len(set(i)) == 3:
            agree(lin.at(x), matrix(f, x))
        else:
            with pytest.raises(lz.LinearizeError, match="repeated"):
                lin.at(x).jvp_fn(x)


def test_tensors_that_are_made_inside() -> None:
    """PyTorch detaches what it makes if somebody holds it."""

    def backward(k: Any, g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        made = torch.zeros((), dtype=D), torch.eye(N, dtype=D), torch.tensor([2.0] * N, dtype=D)
        made[1][0, 1] = float(x[0].detach() > 9)
        return torch.where(x > 0, g, made[0]) + made[1] @ g * made[2]

    lin = through(backward, *range(5))
    assert lin.stats().recorded == 1


# -- chance and state --------------------------------------------------------------------------


def test_chance_that_matters_at_a_later_point_only() -> None:
    """The same operations: a noise of no size, then one of some."""
    apply = function(lambda size, g, x: g * (x + size * torch.randn(N, dtype=D)))
    size = torch.zeros((), dtype=D)
    lin = lz.Linearizer(lambda x: apply(x, size), maxsize=0, opaque="error")
    for k in range(3):
        x = numbers(k)
        agree(lin.at(x), torch.diag(x))
    size = torch.ones((), dtype=D)
    with pytest.raises(lz.LinearizeError):
        lin.at(numbers(9)).jvp_fn(numbers(8))


def test_the_state_of_the_generator_stays_as_it_would_be() -> None:
    """A block that is run once more draws what it drew before, and nothing of what comes."""

    def f(x: torch.Tensor) -> torch.Tensor:
        def block(a: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.dropout(a.sin(), 0.5) * a

        return checkpoint(block, x, use_reentrant=False)

    lin = lz.Linearizer(f, maxsize=0)
    with torch.random.fork_rng(devices=[]):
        for k in range(4):
            torch.manual_seed(k)
            here = lin.at(numbers(k))
            before = torch.random.get_rng_state()
            here.jvp_fn(numbers(k))
            assert torch.equal(torch.random.get_rng_state(), before)
    assert lin.stats().recorded == 1


def test_a_backward_that_counts_its_calls() -> None:
    class State:
        count = 0

    def backward(s: Any, g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        s[0].count += 1
        return g * x if s[1] else g * x * s[0].count

    apply = function(backward)
    state: Any = (State(), True)
    lin = lz.Linearizer(lambda x: apply(x, state), maxsize=0, opaque="error")
    for k in range(3):
        x = numbers(k)
        agree(lin.at(x), torch.diag(x))
    state = (State(), False)
    with pytest.raises(lz.LinearizeError):
        lin.at(numbers(5)).jvp_fn(numbers(6))
    state = (State(), True)
    agree(lin.at(numbers(7)), torch.diag(numbers(7)))


def test_a_backward_that_writes_to_what_it_keeps_at_some_points() -> None:
    def backward(s: Any, g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        factor, writes = s
        if writes:
            factor.mul_(2).mul_(0.5)
        return g * factor * x

    through(backward, *((numbers(k), k % 2) for k in range(6)))


def several_constants(k: Any, g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    c, d = x * 1, x * 2
    torch._foreach_mul_([c, d], k)
    first = g * c
    torch._foreach_add_([c, d], [x, x])
    return first + g * c * d + g.flip(0)


def several_gradients(k: Any, g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    a, b = g * x, g * k
    torch._foreach_mul_([a, b], [x, x])
    return a + b + g.flip(0)


@pytest.mark.parametrize("backward", [several_constants, several_gradients])
def test_writes_to_several_tensors_at_once(backward: Any) -> None:
    through(backward, 2.0, 2.0, 3.0, 2.0)


# -- what is returned --------------------------------------------------------------------------


class Pair(torch.autograd.Function):
    """Two arguments and one result; the gradients share memory, or do not."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor, how: int) -> torch.Tensor:
        ctx.how = how
        return x + y

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        if ctx.how == 0:
            return g, g, None
        if ctx.how == 1:
            return g.clone(), g, None
        both = torch.stack([g, g])
        return both[0], both[ctx.how - 2], None


def test_gradients_that_share_memory_or_not() -> None:
    how = 0
    lin = lz.Linearizer(lambda x: Pair.apply(x.sin(), x * x, how) * x, maxsize=0)
    for k in range(16):
        how, x = k % 4, numbers(k)
        agree(lin.at(x), matrix(lambda x: (x.sin() + x * x) * x, x), 6)
    assert lin.stats().recorded == 4


# -- tensors that cannot be described ----------------------------------------------------------


def sparse_product(a: torch.Tensor, g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.sparse.mm(a, g[:, None])[:, 0] * x


def test_a_sparse_tensor_inside_is_no_hindrance() -> None:
    matrices = [torch.diag(numbers(k)).to_sparse() for k in range(3)]
    apply = function(sparse_product)
    lin = lz.Linearizer(lambda x: apply(x, a), maxsize=0)
    for k, a in enumerate(matrices):
        x = numbers(k)
        agree(lin.at(x), torch.diag(a.to_dense() @ torch.ones(N, dtype=D) * x))
    assert lin.stats().recorded == 3
    assert "another kind" in str(lin.stats())


def test_a_sparse_tensor_at_a_later_point_only() -> None:
    def backward(a: Any, g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return sparse_product(a, g, x) if a.layout == torch.sparse_coo else g * x * a.diagonal()

    matrices = [torch.diag(numbers(k)) for k in range(6)]
    states = [m.to_sparse() if k % 2 else m for k, m in enumerate(matrices)]
    lin = through(backward, *states)
    assert lin.stats().reused == 2


# -- several at once ---------------------------------------------------------------------------


def test_points_of_several_threads() -> None:
    apply = function(lambda k, g, x: g * x * k if k > 1 else g * x.cos() * k + 0 * g.flip(0))
    lin = lz.Linearizer(lambda x, k: torch.cat([x[:1], apply(x, k)]) * k, maxsize=0)
    wrong: list[str] = []

    def work(i: int) -> None:
        for k in range(6):
            x, s = numbers(10 * i + k), (0.5, 2.0, 0.7, 3.0)[(i + k) % 4]
            here = lin.at(x, s)
            j = torch.diag(x * s if s > 1 else x.cos() * s)
            j = torch.cat([torch.eye(1, N, dtype=D), j]) * s
            v, u = numbers(40 + k), numbers(50 + k, N + 1)
            for _ in range(CALLS):
                got, back = here.jvp_fn(v, None), here.vjp_fn(u)[0]
                if not (torch.allclose(got, j @ v) and torch.allclose(back, u @ j)):
                    wrong.append(f"thread {i}, point {k}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert lin.stats().recorded + lin.stats().reused == 18
