"""Outputs, primals and directions of every kind: aliases, views, precisions, complex numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import linearize as lz
from tests.support.comparing import CALLS, Counted, close, compare
from tests.support.references import Plain, gradient, like, tensors

D, C = torch.float64, torch.complex128
# `torch.func.jvp`, a reference, compiles something when it is first called.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = D) -> torch.Tensor:
    wide = C if dtype.is_complex else D
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=wide, generator=generator).to(dtype)


A = torch.arange(12.0, dtype=D).view(3, 4).cos()

OUTPUTS: dict[str, Callable[..., Any]] = {
    "the input": lambda x: x,
    "the input twice": lambda x: (x, x),
    "views of the input": lambda x: (x.t(), x[0], x[:, 1::2], x.view(-1), x.flatten()),
    "overlapping views": lambda x: x.unfold(1, 3, 1),
    "an expanded view": lambda x: (x[:, None].expand(3, 5, 4), x[0].expand_as(x)),
    "a result and its views": lambda x: (lambda y: (y, y[0], y.t(), y.diagonal()))(x.sin()),
    "some that do not depend": lambda x: (x * 2, torch.ones(2, dtype=D), A),
    "integers beside": lambda x: (x.argsort(), x.sin(), x > 0, x.long()),
    "sorted, with indices": lambda x: x.sort(1),
    "a maximum, with indices": lambda x: x.max(0),
    "numbers": lambda x: (x.sum(), x[0, 0], x.prod() * 2),
    "nothing inside": lambda x: (x[:0], x[:, :0].sum(), x[:0].sum(0), x),
    "a list of parts": lambda x: list(x.unbind(1)),
    "a nested dictionary": lambda x: {"a": {"b": x.cos()}, "c": [x[0], (x[1],)]},
    "real and imaginary parts": lambda x: torch.view_as_real(torch.complex(x, x.sin())),
    "a conjugate": lambda x: torch.complex(x, x.sin()).conj(),
    "a negated view": lambda x: torch.complex(x, x.sin()).conj().imag,
    "complex beside real": lambda x: (torch.polar(x.exp(), x), x),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs(name: str) -> None:
    compare(OUTPUTS[name], rand(3, 4))


@pytest.mark.parametrize("name", ["the input", "the input twice", "views of the input"])
def test_outputs_that_alias_a_primal_do_not_show_it(name: str) -> None:
    """Writing to a product's result must not reach the primal, the value, or a later result."""
    x = rand(3, 4)
    here = lz.Linearizer(OUTPUTS[name]).at(x)
    for _ in range(CALLS):
        for t in tensors(here.jvp_fn(x)) + tensors(here.vjp_fn(like(here.value, 1))):
            t.contiguous()
            if t._base is None:
                t.fill_(7.0)
        close(x, rand(3, 4), 0.0)
        close(here.value, OUTPUTS[name](rand(3, 4)), 0.0)


def mixing(x: torch.Tensor) -> torch.Tensor:
    return (x.sin() * x.sum()).cumsum(-1) if x.dim() else x.sin() ** 2


PRIMALS: dict[str, torch.Tensor] = {
    "a number": rand(),
    "one number": rand(1),
    "nothing": torch.empty(0, dtype=D),
    "nothing in two dimensions": torch.empty(3, 0, 2, dtype=D),
    "transposed": rand(3, 4).t(),
    "strided": rand(6, 8)[::2, 1::3],
    "with an offset": rand(20)[7:].view(13),
    "expanded": rand(1, 4).expand(3, 4),
    "expanded number": rand().expand(2, 3),
    "overlapping": rand(8).unfold(0, 4, 2),
    "channels last": rand(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "channels last 3d": rand(1, 2, 3, 3, 2).to(memory_format=torch.channels_last_3d),
    "conjugate": rand(3, 4, dtype=C).conj(),
    "conjugate and transposed": rand(3, 4, dtype=C).mH,
    "imaginary part": rand(3, 4, dtype=C).imag,
    "negated": rand(3, 4, dtype=C).conj().imag,
    "a parameter": nn.Parameter(rand(3, 4)),
    "of another tensor's graph": rand(3, 4).requires_grad_() * 2,
}


@pytest.mark.parametrize("name", PRIMALS)
def test_primals(name: str) -> None:
    x = PRIMALS[name]
    assert name != "negated" or x.is_neg()
    here = compare(mixing, x, simplify=name != "strided")
    # Directions may be laid out like the primal too.
    v = rand(*x.shape, seed=3, dtype=x.dtype)
    laid_out = torch.empty_strided(
        x.shape, [max(s, 1) for s in x.stride()] if 0 in x.stride() else x.stride(), dtype=x.dtype
    )
    if name not in ("overlapping", "expanded", "expanded number"):
        laid_out.copy_(v)
        close(here.jvp_fn(laid_out), here.jvp_fn(v), 1e-12)
        close(here.vjp_fn(laid_out), here.vjp_fn(v), 1e-12)


@pytest.mark.parametrize("kind", ["conjugate", "negated", "expanded", "strided"])
def test_directions_of_every_kind(kind: str) -> None:
    x = rand(3, 4, dtype=C) if kind == "conjugate" else rand(3, 4)
    here = compare(mixing, x)
    z = rand(3, 4, seed=5, dtype=C)
    v = {
        "conjugate": z.conj(),
        "negated": z.conj().imag,
        "expanded": rand(4).expand(3, 4),
        "strided": rand(9, 8)[::3, ::2],
    }[kind]
    plain = v.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    for _ in range(CALLS):
        close(here.jvp_fn(v), here.jvp_fn(plain), 1e-12)
        close(here.vjp_fn(v), here.vjp_fn(plain), 1e-12)


def test_channels_last_through_a_network() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # weights for which no difference goes across a kink of ReLU
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    net = net.double().to(memory_format=torch.channels_last)
    x = rand(2, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    here = compare(net, x)
    v = rand(2, 3, 5, 5, seed=9)
    last = v.contiguous(memory_format=torch.channels_last)
    for _ in range(CALLS):
        close(here.jvp_fn(v), here.jvp_fn(last), 1e-12)


def test_no_differentiable_primal_is_zero_sized_only() -> None:
    here = compare(lambda e, x: torch.cat([e, x.sin()]), torch.empty(0, 2, dtype=D), rand(3, 2))
    assert here.vjp_fn(rand(3, 2))[0].shape == (0, 2)


LOW = {torch.bfloat16: 0.03, torch.float16: 4e-3, torch.float32: 2e-5}


@pytest.mark.parametrize("dtype", LOW)
def test_primals_of_low_precision(dtype: torch.dtype) -> None:
    """Compared with the products of the same function in float64."""
    W = rand(4, 4, seed=2).to(dtype)

    def f(x: torch.Tensor) -> torch.Tensor:
        return (W.to(x.dtype) @ x.sin()).tanh() * x

    x = rand(4).to(dtype)
    counted = Counted(f)
    here = lz.Linearizer(counted).at(x)
    exact = lz.Linearizer(f).at(x.double())
    J = torch.func.jacrev(f)(x.double())
    for call in range(CALLS):
        v = rand(4, seed=call).to(dtype)
        close(exact.jvp_fn(v.double()), J @ v.double(), 1e-10)
        got, back = here.jvp_fn(v), here.vjp_fn(v)[0]
        assert got.dtype == back.dtype == dtype
        close(got.double(), J @ v.double(), LOW[dtype])
        close(back.double(), J.T @ v.double(), LOW[dtype])
    assert counted.runs == 1


def test_casts_inside_f() -> None:
    def f(x: torch.Tensor, y: torch.Tensor) -> Any:
        a = x.double().sin() * y
        b = a.float().exp() * x
        return a, b, (b.half().float() + y.to(torch.complex64)).abs()

    x, y = rand(4, dtype=torch.float32), rand(4, seed=1)
    plain = Plain(f, (x, y))
    here = lz.Linearizer(Counted(f)).at(x, y)
    for call in range(CALLS):
        v, u = like((x, y), call), like(here.value, call)
        got = here.jvp_fn(*v)
        assert [t.dtype for t in got] == [D, torch.float32, torch.float32]
        close(got, torch.func.jvp(f, (x, y), v)[1], 1e-3)
        close(here.vjp_fn(u), gradient(plain, tensors(u)), 1e-3)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 4, 3), nn.LayerNorm(6)
        self.attention, self.out = nn.MultiheadAttention(4, 2), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.conv(x)).permute(2, 0, 1)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return F.softmax(self.out(3 * h), -1)


@pytest.mark.parametrize("where", ["inside", "around"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(where: str, dtype: torch.dtype) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Net()

    def inside(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype):
            return net(x)

    x = rand(2, 2, 8, dtype=torch.float32)
    counted = Counted(inside if where == "inside" else net)
    with torch.autocast("cpu", dtype, enabled=where == "around"):
        here = lz.Linearizer(counted).at(x)
    leaf = x.clone().requires_grad_()
    value = inside(leaf)
    torch.testing.assert_close(here.value, value.detach())
    exact = torch.autograd.functional.jacobian(net, x).double()
    for call in range(CALLS):
        u, v = like(value, call), rand(2, 2, 8, seed=10 + call, dtype=torch.float32)
        # Outside autocast or inside, a product is the run's own.
        with torch.autocast("cpu", dtype, enabled=call % 2 == 1):
            back, pushed = here.vjp_fn(u)[0], here.jvp_fn(v)
        (expected,) = torch.autograd.grad(value, leaf, u, retain_graph=True)
        close(back, expected, 2e-2)
        assert (back.dtype, pushed.dtype) == (torch.float32, value.dtype)
        want = torch.tensordot(exact, v.double(), 3)
        assert (pushed.double() - want).norm() < 0.05 * want.norm()
    assert counted.runs == 1


COMPLEX: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "real times complex": (lambda x, z: x * z.exp(), (rand(3), rand(3, dtype=C))),
    "complex scalar": (lambda x, z: z * x.sum(), (rand(3), rand(dtype=C))),
    "not analytic": (lambda z: z.conj() * z.real + z.abs(), (rand(3, dtype=C),)),
    "real output": (lambda z: (z.angle(), z.real, z.imag, z.abs().sum()), (rand(3, dtype=C),)),
    "complex of reals": (lambda x, y: torch.complex(x, y).sqrt(), (rand(3), rand(3, seed=1))),
    "fft": (lambda x: torch.fft.fft(x.sin()).abs(), (rand(8),)),
    "rfft and back": (
        lambda x, w: torch.fft.irfft(torch.fft.rfft(x, dim=1) * w, n=7, dim=1),
        (rand(2, 7), rand(4, dtype=C)),
    ),
    "Hermitian products": (lambda z: z.mH @ z + z.sum().conj(), (rand(3, 2, dtype=C),)),
    "views as real": (
        lambda z: torch.view_as_complex(torch.view_as_real(z).flip(-1) * 2) * z,
        (rand(3, dtype=C),),
    ),
    "parts written": (
        lambda z, x: (lambda h: (h.real.mul_(x), h)[1])(z.clone()),
        (rand(3, dtype=C), rand(3)),
    ),
    "eigenvalues": (lambda x: torch.linalg.eigvals(x).abs().sum(), (rand(3, 3),)),
    "einsum": (
        lambda a, b: torch.einsum("ij,jk->ik", a.to(C), b.conj()),
        (rand(2, 3), rand(3, 2, dtype=C)),
    ),
    "complex64 beside": (
        lambda z, x: z.to(torch.complex64).to(C) * 0 + z * x,
        (rand(3, dtype=C), rand(3)),
    ),
}


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_combinations(name: str) -> None:
    f, primals = COMPLEX[name]
    compare(lambda *a: f(*a), *primals)


@pytest.mark.parametrize("to_real", [True, False])
def test_vectors_that_are_stored_conjugated(to_real: bool) -> None:
    z = rand(3, dtype=C)
    x = z if to_real else torch.view_as_real(z).clone()
    f = torch.view_as_real if to_real else torch.view_as_complex
    here = lz.Linearizer(lambda x: f(x * 2)).at(x)
    for _ in range(CALLS):
        product = here.jvp_fn(z.conj()) if to_real else here.vjp_fn(z.conj())[0]
        close(product, 2 * torch.view_as_real(z.conj().resolve_conj()), 1e-12)
