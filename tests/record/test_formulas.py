"""Gradients of graph nodes that PyTorch's own formula has wrong, refuses, or hides in a kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import linearize as lz

F64 = torch.float64


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=F64, generator=generator).to(dtype)


def against(here: lz.Linearization, jacobian: torch.Tensor, tol: float = 1e-9) -> None:
    """Compare products, and stacks of them, with a matrix."""
    space, value = here.in_space.tensors[0], here.out_space.tensors[0]
    for seed in range(4):
        v = numbers(*space.shape, seed=seed, dtype=space.dtype)
        u = numbers(*value.shape, seed=seed + 9, dtype=value.dtype)
        jv, jtu = jacobian @ v.reshape(-1), jacobian.mT @ u.reshape(-1)
        torch.testing.assert_close(here.jvp_fn(v).reshape(-1), jv, rtol=tol, atol=tol)
        torch.testing.assert_close(here.vjp_fn(u)[0].reshape(-1), jtu, rtol=tol, atol=tol)
        torch.testing.assert_close(here.vjp_fn(-u)[0].reshape(-1), -jtu, rtol=tol, atol=tol)
    units = torch.eye(value.numel, dtype=value.dtype).reshape(-1, *value.shape)
    for sign in (1, -1):
        rows = here.vjp_fn.batched(sign * units)[0].reshape(len(units), -1)
        torch.testing.assert_close(rows, sign * jacobian, rtol=tol, atol=tol)
    here.check()


# -- determinants -----------------------------------------------------------------------------


def cofactors(a: torch.Tensor) -> torch.Tensor:
    """Return the matrix of signed minors, each a determinant of what is left."""
    n = a.shape[-1]
    found = torch.zeros_like(a)
    for i in range(n):
        for j in range(n):
            rows = [k for k in range(n) if k != i]
            columns = [k for k in range(n) if k != j]
            found[i, j] = (-1) ** (i + j) * torch.linalg.det(a[rows][:, columns])
    return found


SINGULAR = {
    "rank one": torch.tensor([[1.0, 2.0], [2.0, 4.0]], dtype=F64),
    "rank two of three": torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=F64),
    "a row of zeros": torch.tensor([[1.0, 2, 3], [0, 0, 0], [7, 8, 10]], dtype=F64),
    "a column of zeros": torch.tensor([[0.0, 2, 3], [0, 5, 1], [0, 8, 10]], dtype=F64),
    "rank one of three": torch.tensor([[1.0, 2, 3], [2, 4, 6], [3, 6, 9]], dtype=F64),
    "zero": torch.zeros(3, 3, dtype=F64),
    "small": 1e-9 * torch.tensor([[1.0, 2.0], [2.0, 4.0]], dtype=F64),
    "one number": torch.zeros(1, 1, dtype=F64),
    "regular": numbers(4, 4),
    "permuted": numbers(4, 4)[[2, 0, 3, 1]].t(),
}


@pytest.mark.parametrize("name", SINGULAR)
@pytest.mark.parametrize("det", [torch.linalg.det, torch.det])
def test_determinants_have_their_cofactors_at_singular_matrices(name: str, det: Any) -> None:
    a = SINGULAR[name]
    here = lz.Linearizer(det).at(a)
    want = cofactors(a) if len(a) > 1 else torch.ones(1, 1, dtype=F64)
    against(here, want.reshape(1, -1), tol=1e-12)


def test_singular_and_regular_matrices_may_stand_in_one_batch() -> None:
    a = torch.stack([SINGULAR["rank two of three"], numbers(3, 3), SINGULAR["zero"]])
    lin = lz.Linearizer(torch.linalg.det)
    for shift in (0.0, 0.1):  # the second point takes the programs over
        here = lin.at(a + shift)
        blocks = torch.block_diag(*(cofactors(x).reshape(1, -1) for x in a + shift))
        against(here, blocks)
    assert lin.stats().reused == 1


@pytest.mark.parametrize("shape", [(0, 0), (3, 0, 0), (0, 2, 2)])
def test_determinants_of_matrices_without_entries(shape: tuple[int, ...]) -> None:
    a = torch.zeros(shape, dtype=torch.float64)
    here = lz.Linearizer(torch.linalg.det).at(a)
    for _ in range(4):
        torch.testing.assert_close(here.jvp_fn(a), torch.zeros(shape[:-2], dtype=a.dtype))
        (back,) = here.vjp_fn(torch.ones_like(here.value))
        assert back.shape == shape


def test_complex_determinants_have_their_cofactors() -> None:
    a = torch.complex(SINGULAR["rank one"], SINGULAR["rank one"].clone())
    v = torch.complex(numbers(2, 2), numbers(2, 2, seed=1))
    here = lz.Linearizer(torch.linalg.det).at(a)
    u = torch.tensor(0.3 - 0.7j, dtype=torch.complex128)
    for _ in range(4):
        torch.testing.assert_close(here.jvp_fn(v), (cofactors(a) * v).sum())
        torch.testing.assert_close(here.vjp_fn(u)[0], (cofactors(a).conj() * u))


# -- segments ---------------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", ["max", "min"])
def test_equal_entries_of_a_segment_share_the_gradient_of_either_sign(reduce: str) -> None:
    x = torch.tensor([1.0, 1, 0, 0, 2, 3, 3, 3, -1], dtype=F64)
    lengths = torch.tensor([4, 4, 1])
    here = lz.Linearizer(lambda x: torch.segment_reduce(x, reduce, lengths=lengths)).at(x)
    extreme = torch.segment_reduce(x, reduce, lengths=lengths)
    member = torch.block_diag(*(torch.ones(1, int(n), dtype=F64) for n in lengths))
    ties = member * (x == extreme[:, None])
    against(here, ties / ties.sum(1, keepdim=True))


@pytest.mark.parametrize("reduce", ["sum", "mean", "max", "min", "prod"])
@pytest.mark.parametrize("by", ["lengths", "offsets"])
@pytest.mark.parametrize(("shape", "axis"), [((5,), -1), ((2, 5), -1), ((2, 5), 1), ((5, 2), 0)])
def test_segments_along_any_axis(reduce: str, by: str, shape: Any, axis: int) -> None:
    lengths = torch.tensor([1, 3, 1]).expand(*shape[: axis % len(shape)], 3).contiguous()
    zero = torch.zeros_like(lengths[..., :1])
    given = lengths if by == "lengths" else torch.cat([zero, lengths.cumsum(-1)], -1)

    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.segment_reduce(x, reduce, axis=axis % x.dim(), **{by: given})

    def g(x: torch.Tensor) -> torch.Tensor:
        return torch.segment_reduce(x, reduce, axis=axis, **{by: given})

    x = numbers(*shape, seed=3)
    y = f(x)
    jacobian = torch.autograd.functional.jacobian(f, x).reshape(y.numel(), -1)
    against(lz.Linearizer(g).at(x), jacobian)


def test_segments_without_entries_and_with_a_first_number() -> None:
    x = numbers(4, seed=5)
    lengths = torch.tensor([0, 3, 0, 1])

    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.segment_reduce(x, "max", lengths=lengths, initial=0.1)

    jacobian = torch.autograd.functional.jacobian(f, x)
    against(lz.Linearizer(f).at(x), jacobian)


# -- embeddings, losses -----------------------------------------------------------------------


@pytest.mark.parametrize("padding", [None, 1, -1])
def test_embeddings_scaled_by_frequency_have_both_products(padding: int | None) -> None:
    index = torch.tensor([[0, 0, 1], [2, 2, 2]])

    def f(w: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(index, w, padding, scale_grad_by_freq=True)

    w = numbers(4, 3)
    jacobian = torch.autograd.functional.jacobian(f, w).reshape(18, 12)
    against(lz.Linearizer(f).at(w), jacobian)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_losses_of_images_take_scores_of_any_layout(reduction: str) -> None:
    target = torch.randint(0, 3, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    target[0, 0, 0] = -100
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=F64)

    def f(x: torch.Tensor) -> torch.Tensor:
        scores = x.permute(0, 3, 1, 2)
        return nn.functional.nll_loss(scores, target, weight, reduction=reduction)

    def dense(x: torch.Tensor) -> torch.Tensor:
        scores = x.permute(0, 3, 1, 2).contiguous()
        return nn.functional.nll_loss(scores, target, weight, reduction=reduction)

    x = numbers(2, 4, 4, 3)
    y = dense(x)
    jacobian = torch.autograd.functional.jacobian(dense, x).reshape(y.numel(), -1)
    against(lz.Linearizer(f).at(x), jacobian)


def test_losses_take_scores_of_any_layout() -> None:
    target = torch.tensor([0, 1, 2, 1])

    def f(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.nll_loss(x.t(), target)

    x = numbers(3, 4)
    jacobian = torch.autograd.functional.jacobian(f, x).reshape(1, -1)
    against(lz.Linearizer(f).at(x), jacobian)


# -- recurrent layers on oneDNN ---------------------------------------------------------------

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "both ways": {"bidirectional": True},
    "two layers": {"num_layers": 2},
    "no bias": {"bias": False},
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("outputs", ["all", "output", "state", "cell"])
def test_lstm_in_single_precision(name: str, outputs: str) -> None:
    torch.manual_seed(0)
    layer = nn.LSTM(3, 4, **LAYERS[name])
    double = nn.LSTM(3, 4, **LAYERS[name]).double()
    double.load_state_dict(layer.state_dict())
    count = layer.num_layers * (1 + layer.bidirectional)
    point = {k: p.detach() for k, p in layer.named_parameters()}
    point |= {
        "x": numbers(5, 2, 3, dtype=torch.float32),
        "h": numbers(count, 5 if "first" in name else 2, 4, dtype=torch.float32, seed=1),
        "c": numbers(count, 5 if "first" in name else 2, 4, dtype=torch.float32, seed=2),
    }

    def of(module: nn.Module) -> Any:
        def f(point: dict[str, torch.Tensor]) -> Any:
            rest = {k: t for k, t in point.items() if len(k) > 1}
            y, (h, c) = torch.func.functional_call(
                module, rest, (point["x"], (point["h"], point["c"]))
            )
            return {"all": (y, h, c), "output": (y,), "state": (h,), "cell": (c,)}[outputs]

        return f

    def wide(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {k: t.double() for k, t in tree.items()}
        return tuple(t.double() for t in tree)

    v = {k: numbers(*t.shape, seed=7 + i, dtype=t.dtype) for i, (k, t) in enumerate(point.items())}
    value, jv = torch.func.jvp(of(double), (wide(point),), (wide(v),))
    u = tuple(numbers(*t.shape, seed=40 + i, dtype=torch.float32) for i, t in enumerate(value))
    jtu = torch.func.vjp(of(double), wide(point))[1](wide(u))[0]
    lin = lz.Linearizer(of(layer))
    here = lin.at(point)
    for _ in range(4):
        got, back = here.jvp_fn(v), here.vjp_fn(u)[0]
        for a, b in zip(got, jv, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
        for k in point:
            torch.testing.assert_close(back[k].double(), jtu[k], rtol=1e-4, atol=1e-4)
    here.check()


def test_lstm_with_fixed_parameters_and_no_first_state() -> None:
    torch.manual_seed(0)
    layer = nn.LSTM(3, 4)
    double = nn.LSTM(3, 4).double()
    double.load_state_dict(layer.state_dict())
    x, v = numbers(5, 2, 3, dtype=torch.float32), numbers(5, 2, 3, seed=1, dtype=torch.float32)
    lin = lz.Linearizer(lambda x: layer(x)[0])
    for shift in (0.0, 0.5):
        here = lin.at(x + shift)
        want = torch.func.jvp(lambda x: double(x)[0], ((x + shift).double(),), (v.double(),))[1]
        for _ in range(4):
            torch.testing.assert_close(here.jvp_fn(v).double(), want, rtol=1e-4, atol=1e-4)
    assert lin.stats().reused == 1
