"""Gradients that PyTorch gets wrong, or right only in the order in which it computes them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import linearize as lz
from tests.support.functions import randn
from tests.support.references import finite_difference

D, C = torch.float64, torch.complex128
Function = Callable[..., torch.Tensor]


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.vdot(a.flatten(), b.flatten()).real


def check(f: Function, *primals: torch.Tensor) -> lz.Linearization:
    """Compare four calls of each product with finite differences, and with one another."""
    runs = 0

    def counted(*x: torch.Tensor) -> torch.Tensor:
        nonlocal runs
        runs += 1
        return f(*x)

    here = lz.Linearizer(counted).at(*primals)
    v = [randn(*p.shape, dtype=p.dtype, seed=1) for p in primals]
    u = randn(*here.value.shape, dtype=here.value.dtype, seed=2)
    (expected,) = finite_difference(f, primals, v)
    for _ in range(4):
        jv, gradients = here.jvp_fn(*v), here.vjp_fn(u)
        torch.testing.assert_close(jv, expected, rtol=1e-6, atol=1e-8)
        total = sum(dot(g, t) for g, t in zip(gradients, v, strict=True))
        torch.testing.assert_close(total, dot(u, jv))
    assert runs == 1
    return here


# -- zero divided by zero -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [D, C])
@pytest.mark.parametrize("p", [0.5, 1.0, 1.5, 2.0, 3.0, math.inf])
def test_norms_of_rows_of_which_one_is_zero(p: float, dtype: torch.dtype) -> None:
    """PyTorch's gradient is zero there: it divides by zero, and drops the result."""
    x = randn(3, 4, dtype=dtype)
    x[1] = 0
    here = lz.Linearizer(lambda x: torch.linalg.vector_norm(x, p, dim=1)).at(x)
    others = lz.Linearizer(lambda x: torch.linalg.vector_norm(x, p, dim=1)).at(x[::2])
    for seed in range(4):
        v = randn(3, 4, dtype=dtype, seed=seed)
        jv = here.jvp_fn(v)
        assert jv[1] == 0
        torch.testing.assert_close(jv[::2], others.jvp_fn(v[::2]))
        (back,) = here.vjp_fn(jv)
        torch.testing.assert_close(dot(back, v), dot(jv, jv).to(D))


def _by_backward(pullback: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Function:
    """Return x ↦ x.clone() with this pullback."""

    class Given(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return pullback(grad, *ctx.saved_tensors)

    return Given.apply


ZERO = torch.zeros((), dtype=D)
#: Pullbacks that drop what a division by zero, or a product with infinity, has given.
DROPPING: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "masked_fill": lambda g, x: (g / x).masked_fill(x == 0, 0),
    "masked_fill_": lambda g, x: (g / x).masked_fill_(x == 0, 0),
    "masked_fill with a tensor": lambda g, x: (g / x).masked_fill(x == 0, ZERO),
    "where": lambda g, x: torch.where(x == 0, 0.0, g / x),
    "where not": lambda g, x: torch.where(x != 0, g / x, 0.0),
    "a chain": lambda g, x: torch.where(x == 0, 0.0, -(g / x) * 2 / x),
    "a product": lambda g, x: torch.where(x == 0, 0.0, g * (1 / x)),
    "a broadcast": lambda g, x: torch.where(x == 0, 0.0, g.sum() / x),
    "used twice": lambda g, x: g + torch.where(x == 0, 0.0, g / x),
}


@pytest.mark.parametrize("name", DROPPING)
def test_what_a_pullback_drops_is_dropped_in_the_pushforward(name: str) -> None:
    pullback = DROPPING[name]
    x = randn(5)
    x[1] = x[3] = 0
    columns = torch.stack([pullback(e, x) for e in torch.eye(5, dtype=D)], 1)
    assert bool(columns.isfinite().all())
    here = lz.Linearizer(_by_backward(pullback)).at(x)
    for seed in range(4):
        v = randn(5, seed=seed)
        torch.testing.assert_close(here.jvp_fn(v), columns.T @ v)
        torch.testing.assert_close(here.vjp_fn(v)[0], columns @ v)


# -- windows and places -------------------------------------------------------------------------


def test_a_window_that_is_written_over() -> None:
    """PyTorch's gradient of the first argument is that of the window, which is lost."""
    x, window = randn(4, 5), randn(2, 2)
    f = lambda x, w: x.as_strided_scatter(w, (2, 2), (5, 2), 6)  # noqa: E731
    here = check(f, x, window)
    covered = torch.zeros(4, 5, dtype=torch.bool).as_strided_scatter(
        torch.ones(2, 2, dtype=torch.bool), (2, 2), (5, 2), 6
    )
    u = randn(4, 5)
    rest, inside = here.vjp_fn(u)
    torch.testing.assert_close(rest, u.masked_fill(covered, 0))
    torch.testing.assert_close(inside, u.as_strided((2, 2), (5, 2), 6))


def test_a_window_counted_from_the_start_of_memory() -> None:
    """A primal is known to begin elsewhere; of a value computed on the way nothing is known."""
    whole = randn(5, 5)
    f = lambda x, w: x.as_strided_scatter(w, (2, 2), (5, 2), 6)  # noqa: E731
    here = lz.Linearizer(f).at(whole[1:], randn(2, 2))
    rest, _ = here.vjp_fn(torch.ones(4, 5, dtype=D))
    assert rest.flatten().nonzero().flatten().tolist() == [
        i for i in range(20) if i not in (1, 3, 6, 8)
    ]
    check(lambda x, w: (2 * x).as_strided_scatter(w, (2, 2), (5, 2)), randn(4, 5), randn(2, 2))
    with pytest.raises(lz.errors.UnsupportedError, match="AsStridedScatterBackward0"):
        lz.Linearizer(lambda x: (2 * x).as_strided_scatter(x[:2, :2], (2, 2), (5, 2), 6)).at(
            whole
        ).vjp_fn(whole)


def test_a_window_that_overlaps_itself_is_refused() -> None:
    here = lz.Linearizer(lambda x, w: x.as_strided_scatter(w, (2, 2), (1, 1), 0)).at(
        randn(6), randn(2, 2)
    )
    with pytest.raises(lz.errors.UnsupportedError, match="overlaps itself"):
        here.vjp_fn(randn(6))


@pytest.fixture
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


UNPOOL: dict[str, tuple[Function, torch.Tensor]] = {
    "1d": (
        lambda x: F.max_unpool1d(x, torch.tensor([[[0, 3, 3], [1, 1, 1]]]), 2),
        randn(1, 2, 3),
    ),
    "2d": (
        lambda x: F.max_unpool2d(x, torch.tensor([[[[0, 3], [3, 9]], [[5, 5], [5, 0]]]]), 2),
        randn(1, 2, 2, 2),
    ),
    "3d": (
        lambda x: F.max_unpool3d(x, torch.tensor([[[[[0, 3], [3, 9]]]]]), (1, 2, 2)),
        randn(1, 1, 1, 2, 2),
    ),
}


@pytest.mark.parametrize("name", UNPOOL)
@pytest.mark.usefixtures("one_thread")
def test_entries_that_others_overwrite(name: str) -> None:
    """PyTorch's gradient counts them as if each were there."""
    check(*UNPOOL[name])


@pytest.mark.parametrize("name", UNPOOL)
@pytest.mark.usefixtures("one_thread")
def test_entries_that_threads_race_for(name: str) -> None:
    f, x = UNPOOL[name]
    torch.set_num_threads(2)
    here = lz.Linearizer(f).at(x)
    with pytest.raises(lz.errors.UnsupportedError, match=r"MaxUnpool\dDBackward0.*repeated"):
        here.jvp_fn(x)


def test_entries_at_places_of_their_own_need_no_order() -> None:
    x = randn(1, 2, 4, 4)
    _, index = F.max_pool2d(x, 2, return_indices=True)
    check(lambda y: F.max_unpool2d(y, index, 2), randn(1, 2, 2, 2))


@pytest.mark.parametrize("reduce", ["sum", "mean", "max", "min", "prod"])
@pytest.mark.parametrize("by", ["lengths", "offsets"])
def test_segments_that_do_not_cover_the_axis(reduce: str, by: str) -> None:
    where = {"lengths": [1, 2, 0, 3], "offsets": [0, 1, 3, 3, 6]}[by]
    check(
        lambda x: torch.segment_reduce(
            x, reduce, **{by: torch.tensor(where)}, initial=1, unsafe=True
        ),
        randn(8, 2),
    )


# -- buffers that a backward uses piece by piece ------------------------------------------------


def _reused(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return (g * exp(x)) by way of a buffer that holds constants first, in pieces of two."""
    buffer = torch.zeros(2, dtype=g.dtype)
    parts = []
    for i in range(0, len(g), 2):
        piece = buffer.narrow(0, 0, len(g[i : i + 2]))
        torch.exp(x[i : i + 2], out=piece)
        piece.mul_(g[i : i + 2])
        parts.append(piece.clone())
    return torch.cat(parts)


def _residual_overwritten(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    slope = x.cos()
    first = g * slope
    slope.view(-1).mul_(g)  # the memory of what `first` was made from
    return first + slope


def _constant_through_a_view(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    buffer = g * x
    rest = buffer[2:]
    torch.sin(x[:2], out=buffer[:2])
    return rest.sum() * x


@pytest.mark.parametrize("pullback", [_reused, _residual_overwritten, _constant_through_a_view])
def test_buffers_that_hold_constants_and_gradients_by_turns(
    pullback: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    x = randn(5)
    here = lz.Linearizer(_by_backward(pullback)).at(x)
    matrix = torch.stack([pullback(e, x) for e in torch.eye(5, dtype=D)], 1)
    for seed in range(4):
        v = randn(5, seed=seed)
        torch.testing.assert_close(here.jvp_fn(v), matrix.T @ v)
        torch.testing.assert_close(here.vjp_fn(v)[0], matrix @ v)


def _affine(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    buffer = g * x
    buffer[:2].copy_(x[:2].sin())
    return buffer


def _affine_in_two_steps(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    buffer = g * x
    piece = buffer[:2]
    piece.zero_()
    piece.add_(1.0)
    return buffer


@pytest.mark.parametrize("pullback", [_affine, _affine_in_two_steps])
def test_a_buffer_that_ends_half_constant_is_not_linear(
    pullback: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    here = lz.Linearizer(_by_backward(pullback)).at(randn(5))
    with pytest.raises(lz.errors.MissingDerivativeError, match="constant into something linear"):
        here.jvp_fn(randn(5))


def test_a_chunked_loss_of_pytorch_itself() -> None:
    """Its backward uses one buffer for chunks of two lengths."""
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None:
        pytest.skip("this version of PyTorch has none")
    target, chunks = torch.tensor([2, 2, 1, 1, 2, 3, 0, 3]), options(batch_chunk_size=3)
    here = check(
        lambda x, w: F.linear_cross_entropy(x, w, target, reduction="none", options=chunks),
        randn(8, 3),
        randn(4, 3),
    )
    assert "chunked" in str(here.program.pullback)


# -- sparse tensors -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_a_constant_sparse_matrix(layout: torch.layout) -> None:
    dense = randn(5, 4).masked_fill(randn(5, 4, seed=1) > 0, 0)
    matrix = dense.to_sparse(layout=layout)
    here = lz.Linearizer(lambda x: matrix @ x.sin()).at(x := randn(4, 3))
    v, u = randn(2, 4, 3), randn(2, 5, 3)
    for _ in range(4):
        torch.testing.assert_close(here.jvp_fn(v[0]), dense @ (v[0] * x.cos()))
        torch.testing.assert_close(here.vjp_fn(u[0])[0], (dense.T @ u[0]) * x.cos())
    torch.testing.assert_close(here.jvp_fn.batched(v), dense @ (v * x.cos()))
    torch.testing.assert_close(here.vjp_fn.batched(u)[0], (dense.T @ u) * x.cos())


def test_a_sparse_primal_is_refused_with_a_way_out_that_works() -> None:
    with pytest.raises(lz.errors.UnsupportedError, match="index_select and index_add"):
        lz.Linearizer(lambda x: x.to_dense()).at(torch.eye(3).to_sparse())
    row, column = torch.tensor([0, 0, 1]), torch.tensor([0, 2, 2])
    check(
        lambda values, x: torch.zeros(2, 2, dtype=D).index_add(
            0, row, values[:, None] * x.index_select(0, column)
        ),
        randn(3),
        randn(3, 2),
    )


# -- points of one structure --------------------------------------------------------------------


def _pooled_back(x: torch.Tensor) -> torch.Tensor:
    y, index = F.max_pool2d(x, 2, stride=1, return_indices=True)
    return F.max_unpool2d(y, index, 2, stride=1)


AT_MANY_POINTS: dict[str, Function] = {
    "unpooling": _pooled_back,
    "norms": lambda x: torch.linalg.vector_norm(x, 3, dim=-1),
    "largest": lambda x: torch.linalg.vector_norm(x, math.inf, dim=-1),
    "window": lambda x: x.as_strided_scatter(x[0, 0, :2, :2].sin(), (2, 2), (4, 1), 1),
    "segments": lambda x: torch.segment_reduce(
        x[0, 0], "max", lengths=torch.tensor([1, 3]), unsafe=True
    ),
    "group norm": lambda x: F.group_norm(x, 2),
}


@pytest.mark.parametrize("name", AT_MANY_POINTS)
@pytest.mark.usefixtures("one_thread")
def test_what_numbers_decide_is_decided_at_each_point(name: str) -> None:
    """Entries that are zero, or that win, are others at other points."""
    f = AT_MANY_POINTS[name]
    lin = lz.Linearizer(f, maxsize=0)
    for seed in range(6):
        x = randn(1, 2, 4, 4, seed=10 * seed)
        if name in ("norms", "largest"):
            x[0, seed % 2, seed % 4] = 0
        here, alone = lin.at(x), lz.Linearizer(f, maxsize=0).at(x)
        for call in range(4):
            v, u = randn(1, 2, 4, 4, seed=call), randn(*here.value.shape, seed=call)
            torch.testing.assert_close(here.jvp_fn(v), alone.jvp_fn(v))
            torch.testing.assert_close(here.vjp_fn(u), alone.vjp_fn(u))
        if name not in ("norms", "largest"):
            (expected,) = finite_difference(f, [x], [v])
            torch.testing.assert_close(here.jvp_fn(v), expected, rtol=1e-5, atol=1e-7)
