"""Recording and transposing PyTorch operations, against PyTorch's own derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import linearize as lz
from tests.support.functions import randn

D = torch.float64
C = torch.complex128


def check(f: Callable[..., Any], *primals: torch.Tensor, forward: bool = True) -> lz.Linearization:
    """Compare both products with native ones; with `forward=False` J·v through the adjoint."""
    here = lz.Linearizer(f).at(*primals)
    v = [randn(*p.shape, dtype=p.dtype, seed=1) for p in primals]
    leaves = [p.clone().requires_grad_() for p in primals]
    value = f(*leaves)
    u = randn(*value.shape, dtype=value.dtype, seed=2)
    torch.testing.assert_close(here.value, value.detach())
    expected = torch.autograd.grad(value, leaves, u, allow_unused=True, materialize_grads=True)
    for _ in range(2):  # a second call must give what the first gave
        torch.testing.assert_close(here.vjp_fn(u), expected)
        got = here.jvp_fn(*v)
        if forward:
            torch.testing.assert_close(got, torch.func.jvp(f, primals, tuple(v))[1])
        lhs = torch.vdot(u.flatten(), got.flatten()).real
        rhs = sum(
            torch.vdot(a.flatten(), b.flatten()).real for a, b in zip(expected, v, strict=True)
        )
        torch.testing.assert_close(lhs, rhs)
    return here


SQUARE = randn(4, 4, seed=7) + 4 * torch.eye(4, dtype=D)
FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "pointwise": (lambda x: (x.sin() * 1.1 - 0.03).tanh().exp() / 3, (randn(5),)),
    "broadcast": (lambda x, y: x * y + y / 2 - x, (randn(3, 1), randn(4))),
    "matmul": (lambda x, y: x @ y @ x, (randn(4, 4), randn(4, 4))),
    "bmm and mv": (lambda x, y: (x @ x.mT) @ y, (randn(2, 3, 4), randn(3))),
    "reductions": (lambda x: x.sum(0) * x.mean(1, keepdim=True) + x.mean(), (randn(3, 4),)),
    "views": (
        lambda x: x.t().reshape(2, 6)[:, 1:5:2].unsqueeze(0).expand(3, 2, 2).permute(2, 0, 1) ** 2,
        (randn(3, 4),),
    ),
    "slices from the end": (lambda x: x[-2:] * x[:-1][1:] + x[1], (randn(3, 4),)),
    "cat and stack": (lambda x, y: torch.cat([torch.stack([x, x * y]), y[None]]), (randn(3),) * 2),
    "index": (lambda x: x[torch.tensor([0, 2, 0])] * x[:1], (randn(3, 2),)),
    "gather and scatter": (
        lambda x: (
            x.gather(0, torch.tensor([[1, 0]]))
            + x.scatter_add(0, torch.tensor([[1, 1], [0, 1]]), x)
        ),
        (randn(2, 2),),
    ),
    "where": (lambda x: torch.where(x > 0, x, 2 * x).clamp(min=-0.5), (randn(9),)),
    "maximum": (
        lambda x: x.max(1).values + x.amax(0)[:3] + x.sort(0).values[0, :3],
        (randn(3, 4),),
    ),
    "norm": (lambda x: x / x.norm(dim=1, keepdim=True), (randn(3, 4),)),
    "std": (lambda x: x.std(0), (randn(3, 4),)),
    "cumulative": (lambda x: x.cumsum(0) * x.cumprod(1), (randn(3, 4),)),
    "softmax": (lambda x: x.softmax(-1) + x.log_softmax(0) + x.logsumexp(0), (randn(3, 4),)),
    "solve": (lambda a, b: torch.linalg.solve(a, b), (SQUARE, randn(4))),
    "inverse": (lambda a: torch.linalg.inv(a).logdet()[None], (SQUARE @ SQUARE.T,)),
    "qr": (lambda a: torch.linalg.qr(a)[1], (SQUARE,)),
    "svd": (lambda a: torch.linalg.svdvals(a), (SQUARE,)),
    "einsum": (lambda x, y: torch.einsum("ij,kj->ik", x, y), (randn(2, 3), randn(4, 3))),
    "fft": (lambda x: torch.fft.irfft(torch.fft.rfft(x) * 2), (randn(6),)),
    "layer norm": (lambda x: F.layer_norm(x, (4,)), (randn(3, 4),)),
    "group norm": (lambda x: F.group_norm(x, 2), (randn(2, 4, 3),)),
    "batch norm": (
        lambda x: F.batch_norm(x, None, None, training=True),
        (randn(5, 3),),
    ),
    "conv": (
        lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1, groups=2),
        (randn(2, 4, 5, 5), randn(6, 2, 3, 3), randn(6)),
    ),
    "transposed conv": (
        lambda x, w: F.conv_transpose1d(x, w, stride=2, output_padding=1),
        (randn(2, 4, 5), randn(4, 3, 3)),
    ),
    "pooling": (lambda x: F.max_pool2d(x, 2) + F.avg_pool2d(x, 2), (randn(1, 2, 4, 4),)),
    "padding": (lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"), (randn(1, 2, 4, 4),)),
    "interpolate": (
        lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
        (randn(1, 1, 3, 3),),
    ),
    "embedding": (lambda w: F.embedding(torch.tensor([0, 2, 2]), w), (randn(3, 4),)),
    "cross entropy": (lambda x: F.cross_entropy(x, torch.tensor([1, 0]))[None], (randn(2, 3),)),
    "roll and flip": (lambda x: x.roll(1, 0) * x.flip(1).tril(), (randn(3, 3),)),
    "lstm": (
        lambda x: torch.lstm_cell(x, (x, x), SQUARE[:, :].repeat(4, 1), SQUARE.repeat(4, 1))[0],
        (randn(2, 4),),
    ),
    "complex product": (lambda x: x * (1 + 2j) * x.conj(), (randn(4, dtype=C),)),
    "complex matrices": (
        lambda x, y: (x @ y).abs() + (x.mH @ y).real,
        (randn(3, 3, dtype=C),) * 2,
    ),
    "complex to real": (lambda x: x.real * x.imag + x.abs(), (randn(4, dtype=C),)),
    "real to complex": (lambda x: torch.complex(x, 2 * x).exp() + x * 1j, (randn(4),)),
    "complex solve": (
        lambda x: torch.linalg.pinv(x),
        (randn(2, 3, dtype=C),),
    ),
    "cast": (lambda x: x.to(torch.float32).sin().to(D) * x, (randn(4),)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_products_equal_native_ones(name: str) -> None:
    f, primals = FUNCTIONS[name]
    if name == "cast":
        with pytest.MonkeyPatch.context() as m:  # float32 in the middle: its own tolerance
            m.setattr(torch.testing, "assert_close", _loose(torch.testing.assert_close))
            check(f, *primals)
    else:
        check(f, *primals)


def _loose(strict: Callable[..., None]) -> Callable[..., None]:
    return lambda a, b: strict(a, b, rtol=1e-5, atol=1e-6)


def test_in_place_steps_inside_f() -> None:
    """In-place operations on f's own copies, on slices and through views."""

    def f(x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        y[1:] *= x[:-1].sin()
        y[0].mul_(3).add_(x[1])
        z = torch.zeros(3, 4, dtype=x.dtype)
        z[:, ::2] = y[:, 1:3]
        z.t()[1].copy_(x[:, 0])
        z.index_put_((torch.tensor([0, 0]),), x[:2], accumulate=True)
        return z.masked_fill_(z > 2, 0.0) + y

    check(f, randn(3, 4))


@pytest.mark.parametrize(
    "name", ["silu", "mish", "hardswish", "gelu", "softplus", "elu", "hardsigmoid"]
)
def test_activations_whose_backward_pytorch_will_not_differentiate(name: str) -> None:
    """Their fused backward kernels are their own transpose."""
    check(getattr(F, name), randn(50))


def test_attention_with_the_flash_kernel_is_right() -> None:
    """PyTorch has no J·v of it at all."""
    q, k, v = (randn(1, 2, 4, 8, seed=s) for s in range(3))
    here = lz.Linearizer(F.scaled_dot_product_attention).at(q, k, v)
    u = randn(1, 2, 4, 8, seed=9)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*leaves), leaves, u)
    torch.testing.assert_close(here.vjp_fn(u), expected)
    with sdpa_kernel(SDPBackend.MATH):
        primals = (q, k, v)
        _, expected_jv = torch.func.jvp(F.scaled_dot_product_attention, primals, primals)
    torch.testing.assert_close(here.jvp_fn(q, k, v), expected_jv)


def test_conjugate_bits_survive_recording() -> None:
    """Inside a dispatch mode PyTorch ignores conjugate bits; recorded residuals must not."""
    here = check(torch.linalg.pinv, randn(2, 3, dtype=C))
    kept = here.program.pullback.residuals()
    inverse = torch.linalg.pinv(randn(2, 3, dtype=C))
    assert any(
        (r.tensor.shape == (3, 2) and torch.allclose(r.tensor.resolve_conj(), inverse))
        or (r.tensor.shape == (2, 3) and torch.allclose(r.tensor.resolve_conj(), inverse.mH))
        for r in kept
    )  # fmt: skip


def test_constants_overwritten_by_f_are_not_overwritten_again() -> None:
    """`x * full(2).pow_(2)`: a constant changed in place, at every call the same product."""
    here = check(lambda x: x * torch.full((4,), 2.0, dtype=D).pow_(2), randn(4))
    torch.testing.assert_close(here.jvp_fn(torch.ones(4, dtype=D)), torch.full((4,), 4.0, dtype=D))


def test_deep_graphs_need_no_recursion() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        for _ in range(1500):
            x = x * 0.999
        return x

    here = lz.Linearizer(f).at(torch.ones(1, dtype=D))
    factor = here.jvp_fn(torch.ones(1, dtype=D))
    torch.testing.assert_close(factor, torch.full((1,), 0.999**1500, dtype=D))
    torch.testing.assert_close(here.vjp_fn(torch.ones(1, dtype=D))[0], factor)


def test_an_operation_without_derivative_is_named() -> None:
    """A bag's gradient scaled by frequency is no derivative, and has no transpose here."""

    def f(w: torch.Tensor) -> torch.Tensor:
        return F.embedding_bag(torch.tensor([[0, 1]]), w, mode="sum", scale_grad_by_freq=True)

    here = lz.Linearizer(f).at(randn(2, 3))
    with pytest.raises(lz.errors.UnsupportedError, match="_embedding_bag_backward"):
        here.jvp_fn(randn(2, 3))


def test_programs_print_shapes_and_sizes() -> None:
    here = lz.Linearizer(lambda x, w: torch.tanh(x @ w)).at(randn(2, 3), randn(3, 4))
    text = str(here.program)
    assert "pushforward (v0: float64[2,3], v1: float64[3,4])" in text
    assert "pullback (v0: float64[2,4])" in text
    assert "tanh_backward" in text
    assert "bytes kept" in text


def test_cotangents_may_have_any_layout() -> None:
    """What was recorded with contiguous numbers must hold for others, as in a later run."""

    def f(x: torch.Tensor) -> torch.Tensor:
        y = torch.view_as_complex(x.reshape(4, 3, 2)).abs().exp()
        return y.as_strided((3, 4), (4, 1)) * x.view(3, 8)[:, :4].unflatten(1, (2, 2)).flatten(1)

    x = randn(4, 6)
    here = lz.Linearizer(f).at(x)
    leaf = x.clone().requires_grad_()
    value = f(leaf)
    for u in (randn(4, 3).t(), randn(3, 8)[:, ::2], randn(1, 4).expand(3, 4)):
        (expected,) = torch.autograd.grad(value, leaf, u, retain_graph=True)
        for _ in range(4):
            torch.testing.assert_close(here.vjp_fn(u)[0], expected)
    for v in (randn(6, 4).t(), randn(4, 12)[:, ::2]):
        expected = torch.func.jvp(f, (x,), (v.contiguous(),))[1]
        for _ in range(4):
            torch.testing.assert_close(here.jvp_fn(v), expected)
