"""Ways to write functions: writes in place, views, precisions, checkpoints, hooks, layouts.

J·v is compared with finite differences, Jᵀ·u with PyTorch's engine, unless said otherwise.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu, saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import linearize as lz
from linearize.errors import UnsupportedError
from tests.support.comparing import CALLS, Counted, close, compare
from tests.support.references import Plain, gradient, like, tensors

D, C = torch.float64, torch.complex128
# `torch.func.jvp`, a reference, compiles something when it is first called.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = D) -> torch.Tensor:
    wide = C if dtype.is_complex else D
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=wide, generator=generator).to(dtype)


# -- writes in place --------------------------------------------------------------------------


def writes(body: Callable[[torch.Tensor, torch.Tensor], Any]) -> Callable[..., Any]:
    """Let `body` write to a copy of the first argument; return the copy unless it returns."""

    def f(x: torch.Tensor, y: torch.Tensor) -> Any:
        h = x.clone()
        result = body(h, y)
        return h if result is None else result

    f.__name__ = body.__name__
    return f


def on_slices(h: torch.Tensor, y: torch.Tensor) -> None:
    h[0] = y[0].sin()
    h[1:, ::2] *= y[1:, ::2]
    h[:, 1] += h[:, 0] * 2
    h[..., -1].mul_(h[0, 0].clone())


def with_masks(h: torch.Tensor, y: torch.Tensor) -> None:
    h[h > 0] = 2 * y[h > 0]
    h.masked_fill_(y > 1, 0.5)
    h.masked_scatter_(y < -0.5, y.flatten().cos())


def by_index(h: torch.Tensor, y: torch.Tensor) -> None:
    index = torch.tensor([2, 0, 2])
    h.index_put_((index, torch.tensor([1, 1, 1])), y[index, 0], accumulate=True)
    h.index_add_(0, index, y[:3].exp(), alpha=0.5)
    h.index_copy_(1, torch.tensor([3, 0]), y[:, :2])
    h.scatter_(1, torch.tensor([[0], [2], [3]]), y[:, :1])
    h.scatter_add_(0, torch.tensor([[0, 2, 0, 1]]), y[:1])
    h[[0, 1], [1, 2]] = y[0, :2] ** 2


def through_views(h: torch.Tensor, y: torch.Tensor) -> None:
    flat, turned = h.view(-1), h.t()
    turned[1].add_(y[:, 1])
    flat[::3].copy_(y.reshape(-1)[::3].sin())
    h.diagonal().mul_(y.diagonal())
    h.unfold(1, 2, 2)[0, 1].sub_(y[2, :2])
    first, second = h[:, :2].clone(), h[:, 2:]
    second.addcmul_(first, y[:, :2])
    h.unsqueeze_(0).squeeze_(0)


def pointwise(h: torch.Tensor, y: torch.Tensor) -> Any:
    h.sin_().add_(1.5).mul_(y).clamp_(-1, 1)
    h.lerp_(y, 0.25)
    h.addmm_(y[:, :3], y, alpha=0.1)
    h.tanh_()
    g = h.clone().zero_() + h
    return g.copy_(h.exp()).sub_(y, alpha=2)


def to_something_fresh(h: torch.Tensor, y: torch.Tensor) -> Any:
    out = torch.empty(3, 4, dtype=D)
    total = torch.zeros((), dtype=D)
    for i in range(3):
        out[i] = h[i] * y[i].sum()
        total += out[i].clone().prod()
    big = torch.full((3, 8), 2.0, dtype=D)
    big[:, 2:6] = h
    return out, total, big.cumsum(1)


def recurrences(h: torch.Tensor, y: torch.Tensor) -> None:
    for i in range(1, 4):
        h[:, i] = h[:, i].clone() + y[:, i] * h[:, i - 1].clone()


def of_itself(h: torch.Tensor, y: torch.Tensor) -> None:
    h.mul_(h.clone())
    h.add_(h.t()[:3].t()[:, :3].sum() * y)
    h[0].copy_(h[1])
    h.add_(h)
    h[1:].sub_(h[:-1].clone())


def values_that_are_thrown_away(h: torch.Tensor, y: torch.Tensor) -> Any:
    g = h + y
    h.fill_(3.0)
    g[0].zero_()
    return g, h


def conditionally(h: torch.Tensor, y: torch.Tensor) -> None:
    for i in range(3):
        if h[i].sum() > y[i].sum():
            h[i] *= 2
        else:
            h[i] = h[i - 1].clone() * y[i]


def resized(h: torch.Tensor, y: torch.Tensor) -> Any:
    h.t_()
    h.transpose_(0, 1).squeeze_()
    h.unsqueeze_(1).swapaxes_(0, 2)
    return h * y.t()[:, None]


WRITES = [
    on_slices,
    with_masks,
    by_index,
    through_views,
    pointwise,
    to_something_fresh,
    recurrences,
    of_itself,
    values_that_are_thrown_away,
    conditionally,
    resized,
]


def uses_itself_twice(h: torch.Tensor, y: torch.Tensor) -> None:
    h.mul_(h)


def overwrites_a_factor(h: torch.Tensor, y: torch.Tensor) -> Any:
    g = h * y
    h[0] = 0.0
    return g


def overwrites_by_a_view(h: torch.Tensor, y: torch.Tensor) -> Any:
    g = h[1].prod()
    h.view(-1)[5].zero_()
    return g


@pytest.mark.parametrize("body", [uses_itself_twice, overwrites_a_factor, overwrites_by_a_view])
def test_what_pytorch_refuses_is_refused(body: Callable[..., Any]) -> None:
    """A tensor that the derivative needs is gone; the value is right all the same."""
    f = writes(body)
    x, y = rand(3, 4), rand(3, 4, seed=1)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        gradient(Plain(f, (x, y)), [torch.ones_like(t) for t in tensors(f(x, y))])
    here = lz.Linearizer(f).at(x, y)
    close(here.value, f(x, y), 0.0)
    for _ in range(CALLS):
        with pytest.raises(lz.errors.StalenessError, match="changed in place"):
            here.jvp_fn(x, y)
        with pytest.raises(lz.errors.StalenessError, match="changed in place"):
            here.vjp_fn(like(here.value, 1))


@pytest.mark.parametrize("body", WRITES, ids=lambda f: f.__name__)
def test_writes_in_place(body: Callable[..., Any]) -> None:
    compare(writes(body), rand(3, 4), rand(3, 4, seed=1))


def test_out_arguments_of_constants() -> None:
    """Autograd takes no `out=` for what is differentiated, but f may use it for the rest."""
    buffer = torch.empty(3, dtype=D)

    def f(x: torch.Tensor) -> torch.Tensor:
        torch.add(x.detach(), 1.0, out=buffer)
        a = x * buffer
        torch.mul(buffer, 0.0, out=torch.empty(3, dtype=D))
        return a

    here = lz.Linearizer(f).at(rand(3))
    for call in range(CALLS):
        v = rand(3, seed=call)
        torch.testing.assert_close(here.jvp_fn(v), v * (rand(3) + 1))


def test_a_buffer_used_again_in_the_same_run() -> None:
    """PyTorch finds that a saved tensor was overwritten; so must we, and not compute."""
    buffer = torch.empty(3, dtype=D)

    def f(x: torch.Tensor) -> torch.Tensor:
        torch.sin(x.detach(), out=buffer)
        a = x * buffer
        torch.cos(x.detach(), out=buffer)
        return a * buffer

    here = lz.Linearizer(f).at(rand(3))
    for _ in range(CALLS):
        for product in (here.jvp_fn, here.vjp_fn):
            with pytest.raises(lz.errors.StalenessError):
                product(rand(3))


def test_a_primal_written_in_place() -> None:
    """A leaf that requires grad cannot be written to; the error is PyTorch's own."""
    lin = lz.Linearizer(lambda x: x.mul_(2))
    x = rand(3)
    with pytest.raises(RuntimeError, match="leaf Variable"):
        lin.at(x)
    torch.testing.assert_close(x, rand(3))


# -- outputs ------------------------------------------------------------------------------------

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


# -- primals ------------------------------------------------------------------------------------


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


# -- precision ----------------------------------------------------------------------------------


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


# -- complex ------------------------------------------------------------------------------------

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


# -- checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("first", ["jvp", "vjp"])
def test_checkpoints(reentrant: bool, first: str) -> None:
    """Right, and each block runs once more for all products together."""
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    net = net.double()
    blocks = 0

    def block(x: torch.Tensor, i: int) -> torch.Tensor:
        nonlocal blocks
        blocks += 1
        return net[i + 1](net[i](x))

    def f(x: torch.Tensor) -> torch.Tensor:
        for i in (0, 2):
            x = checkpoint(block, x, i, use_reentrant=reentrant)
        return net[4](x).sin()

    x = rand(5, 4)
    plain = compare(lambda x: net(x).sin(), x)
    counted = Counted(f)
    here = lz.Linearizer(counted).at(x)
    assert blocks == 2
    (here.jvp_fn if first == "jvp" else here.vjp_fn)(rand(5, 4) if first == "jvp" else rand(5, 3))
    ran = blocks
    assert ran == 4  # once more for each block, not for each tensor that it had saved
    for call in range(CALLS):
        v, u = rand(5, 4, seed=call), rand(5, 3, seed=call)
        close(here.jvp_fn(v), plain.jvp_fn(v), 1e-10)
        close(here.vjp_fn(u), plain.vjp_fn(u), 1e-10)
    assert blocks == ran
    assert counted.runs == 1
    assert all(p.grad is None for p in net.parameters())


def test_reentrant_checkpoints_over_a_closure() -> None:
    """PyTorch's own backward of such a block does not know of `w`: its gradient is lost."""

    def f(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda h: (h * w).sin(), x, use_reentrant=True) * w

    compare(lambda x, w: (x * w).sin() * w, rand(3), rand(3, seed=1))
    x, w = rand(3), rand(3, seed=1)
    here, plain = (lz.Linearizer(g).at(x, w) for g in (f, lambda x, w: (x * w).sin() * w))
    for call in range(CALLS):
        v, u = like((x, w), call), rand(3, seed=call)
        close(here.jvp_fn(*v), plain.jvp_fn(*v), 1e-12)
        close(here.vjp_fn(u), plain.vjp_fn(u), 1e-12)
    # Outside, checkpoints are what they were.
    leaf = x.clone().requires_grad_()
    assert "CheckpointFunction" in f(leaf, w).grad_fn.next_functions[0][0].name()


def test_a_checkpoint_over_a_node_that_is_read_twice() -> None:
    """Its indices are unpacked by PyTorch's own formula, and once more to mend that."""
    indices = torch.tensor([[[[0, 3], [9, 12]]]])

    def block(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.max_unpool2d(x.sin(), indices, 2) * x.sum()

    x, u = rand(1, 1, 2, 2), rand(1, 1, 4, 4)
    here, plain = (
        lz.Linearizer(g).at(x)
        for g in (lambda x: checkpoint(block, x, use_reentrant=False), block)
    )
    for call in range(CALLS):
        v = rand(1, 1, 2, 2, seed=call)
        close(here.jvp_fn(v), plain.jvp_fn(v), 1e-12)
        close(here.vjp_fn(u), plain.vjp_fn(u), 1e-12)
    q = x.clone().requires_grad_()
    close(here.vjp_fn(u)[0], torch.autograd.grad(block(q), q, u)[0], 1e-12)


def test_checkpoints_draw_the_mask_of_the_run() -> None:
    net = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 3)).double()
    x = rand(5, 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        plain = lz.Linearizer(net).at(x)
        torch.manual_seed(1)
        here = lz.Linearizer(lambda x: checkpoint(net, x, use_reentrant=False)).at(x)
        after = torch.get_rng_state()
        for call in range(CALLS):
            v, u = rand(5, 4, seed=call), rand(5, 3, seed=call)
            close(here.jvp_fn(v), plain.jvp_fn(v), 1e-12)
            close(here.vjp_fn(u), plain.vjp_fn(u), 1e-12)
        assert torch.equal(torch.get_rng_state(), after)


def test_nested_checkpoints_and_parameters() -> None:
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))).double()

    def f(p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        def inner(x: torch.Tensor) -> torch.Tensor:
            return checkpoint_sequential(net, 2, x, use_reentrant=False).tanh()

        def outer(x: torch.Tensor) -> torch.Tensor:
            return checkpoint(inner, x, use_reentrant=False).sin()

        return torch.func.functional_call(
            _Calls(net, outer), {f"net.{k}": t for k, t in p.items()}, (x,)
        )

    compare(f, {k: p.detach() for k, p in net.named_parameters()}, rand(3, 4))


class _Calls(nn.Module):
    def __init__(self, net: nn.Module, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.net, self.fn = net, fn

    def forward(self, x: torch.Tensor) -> Any:
        return self.fn(x)


# -- hooks on saved tensors ---------------------------------------------------------------------


def layered(x: torch.Tensor) -> torch.Tensor:
    return (x.sin() * x.exp()).cumsum(0).tanh() * x


def test_save_on_cpu_around_at() -> None:
    x = rand(5)
    expected = compare(layered, x)
    with save_on_cpu():
        here = compare(layered, x)
    for call in range(CALLS):
        v = rand(5, seed=call)
        close(here.jvp_fn(v), expected.jvp_fn(v), 1e-12)


@pytest.mark.parametrize("inside", [False, True])
def test_hooks_that_pack_and_unpack(inside: bool) -> None:
    """Each tensor is unpacked at most once per program; what they pack goes with the graph."""
    counts = {"pack": 0, "unpack": 0}
    alive: list[weakref.ref[Any]] = []

    class Packed:
        def __init__(self, t: torch.Tensor) -> None:
            self.data = t.detach().numpy().copy()

    def pack(t: torch.Tensor) -> Packed:
        counts["pack"] += 1
        packed = Packed(t)
        alive.append(weakref.ref(packed))
        return packed

    def unpack(p: Packed) -> torch.Tensor:
        counts["unpack"] += 1
        return torch.from_numpy(p.data)

    def f(x: torch.Tensor) -> torch.Tensor:
        if inside:
            with saved_tensors_hooks(pack, unpack):
                return layered(x)
        return layered(x)

    x = rand(5)
    if inside:
        here = lz.Linearizer(f).at(x)
    else:
        with saved_tensors_hooks(pack, unpack):
            here = lz.Linearizer(f).at(x)
    plain = lz.Linearizer(layered).at(x)
    for call in range(CALLS):
        v = rand(5, seed=call)
        close(here.jvp_fn(v), plain.jvp_fn(v), 1e-12)
        close(here.vjp_fn(v), plain.vjp_fn(v), 1e-12)
    assert counts["pack"] > 0
    assert counts["unpack"] <= counts["pack"]
    del here, plain
    assert not any(ref() for ref in alive)


def test_hooks_are_disabled_around_at() -> None:
    with disable_saved_tensors_hooks("no hooks here"):
        compare(layered, rand(5))


def test_hooks_that_quantize_give_what_pytorch_gives() -> None:
    """Lossy packing changes the derivative: both products are those of what was unpacked."""

    def pack(t: torch.Tensor) -> torch.Tensor:
        return t.to(torch.bfloat16)

    def unpack(t: torch.Tensor) -> torch.Tensor:
        return t.to(D)

    x = rand(6)
    with saved_tensors_hooks(pack, unpack):
        here = lz.Linearizer(layered).at(x)
        leaf = x.clone().requires_grad_()
        y = layered(leaf)
    basis = torch.eye(6, dtype=D)
    J = torch.stack([torch.autograd.grad(y, leaf, e, retain_graph=True)[0] for e in basis])
    exact = torch.func.jacrev(layered)(x)
    assert (J - exact).abs().max() > 1e-5
    for call in range(CALLS):
        v = rand(6, seed=call)
        close(here.vjp_fn(v), J.T @ v, 1e-12)
        close(here.jvp_fn(v), J @ v, 1e-12)


# -- hooks on gradients -------------------------------------------------------------------------


def test_tensor_hooks_are_no_part_of_the_derivative() -> None:
    """Hooks on tensors, on nodes, on accumulated gradients: none of them runs."""
    called = []

    def f(x: torch.Tensor) -> torch.Tensor:
        h = x.sin()
        if h.requires_grad:
            h.register_hook(lambda g: called.append("tensor") or 10 * g)
            h.grad_fn.register_hook(lambda gi, go: called.append("node") or gi)
            h.grad_fn.register_prehook(lambda go: called.append("prehook") or go)
            h.retain_grad()
            x.register_post_accumulate_grad_hook(lambda t: called.append("accumulate"))
        return h * 2

    x = rand(3)
    here = lz.Linearizer(f).at(x)
    for call in range(CALLS):
        v = rand(3, seed=call)
        close(here.jvp_fn(v), 2 * x.cos() * v, 1e-12)
        close(here.vjp_fn(v), 2 * x.cos() * v, 1e-12)
    assert not called


def test_module_hooks() -> None:
    """Forward hooks are part of f. Backward hooks change gradients, and are not run."""
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    plain = compare(lambda x: net[2](2 * net[1](net[0](x + 1))), rand(3))
    called = []
    net.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    net[1].register_forward_hook(lambda m, args, out: 2 * out)
    net[1].register_full_backward_hook(
        lambda m, gi, go: called.append("full") or tuple(7 * g for g in gi)
    )
    net[0].register_full_backward_pre_hook(
        lambda m, go: called.append("pre") or tuple(7 * g for g in go)
    )
    here = lz.Linearizer(net).at(rand(3))
    for call in range(CALLS):
        v, u = rand(3, seed=call), rand(2, seed=call)
        close(here.jvp_fn(v), plain.jvp_fn(v), 1e-12)
        close(here.vjp_fn(u), plain.vjp_fn(u), 1e-12)
    assert not called


# -- compiled and scripted ----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("warm", [False, True])
def test_compiled_functions_inside_f(backend: str, warm: bool) -> None:
    """They run as they were written, and so leave a graph."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    compiled, function = (torch.compile(f, backend=backend) for f in (net, layered))
    x = rand(5, 3)
    if warm:
        compiled(function(x))
    here = lz.Linearizer(Counted(lambda x: compiled(function(x)))).at(x)
    plain = compare(lambda x: net(layered(x)), x)
    for call in range(CALLS):
        v, u = rand(5, 3, seed=call), rand(5, 2, seed=call)
        close(here.jvp_fn(v), plain.jvp_fn(v), 1e-10)
        close(here.vjp_fn(u), plain.vjp_fn(u), 1e-10)


SCRIPT = pytest.mark.filterwarnings("ignore:`torch.jit")


@SCRIPT
def test_scripted_functions_inside_f() -> None:
    """A scripted function leaves a graph; its profiling runs must not change that."""

    def plain(x: torch.Tensor, n: int) -> torch.Tensor:
        for _ in range(n):
            x = x.sin() * 1.1 if bool(x.sum() > 0) else x.cos() * x
        return x

    scripted = torch.jit.script(plain)
    for _ in range(4):  # the executor specialises after some runs
        compare(lambda x: scripted(x, 3), rand(4))


@SCRIPT
def test_scripted_and_traced_modules() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = rand(5, 3)
    plain = compare(net, x)
    for module in (torch.jit.script(net), torch.jit.trace(net, (x,))):
        for _ in range(4):
            here = compare(module, x)
            v = rand(5, 3, seed=8)
            close(here.jvp_fn(v), plain.jvp_fn(v), 1e-10)


# -- subclasses and layouts ---------------------------------------------------------------------


class Tagged(torch.Tensor):
    """A subclass that changes nothing but the type: PyTorch's own operations see through it."""


class Logging(torch.Tensor):
    """A subclass that intercepts functions and hands them on."""

    calls = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Logging.calls += 1
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("kind", [Tagged, Logging, nn.Parameter, nn.Buffer])
def test_plain_subclasses(kind: Any) -> None:
    x = rand(3, 4)
    given = x.as_subclass(kind) if issubclass(kind, (Tagged, Logging)) else kind(x)
    plain = compare(mixing, x)
    here = lz.Linearizer(mixing).at(given)
    for call in range(CALLS):
        v = rand(3, 4, seed=call)
        for mine, theirs in (
            (here.jvp_fn(v), plain.jvp_fn(v)),
            (here.vjp_fn(v)[0], plain.vjp_fn(v)[0]),
        ):
            assert type(mine) is torch.Tensor
            torch.testing.assert_close(mine, theirs)


def test_subclasses_as_directions() -> None:
    here = compare(mixing, rand(3, 4))
    v = rand(3, 4, seed=4)
    for kind in (Tagged, Logging):
        for _ in range(CALLS):
            got = here.jvp_fn(v.as_subclass(kind))
            torch.testing.assert_close(got.as_subclass(torch.Tensor), here.jvp_fn(v))


def test_subclasses_that_dispatch_are_refused_by_name() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    two = TwoTensor(rand(3), rand(3))
    with pytest.raises(UnsupportedError, match="TwoTensor"):
        lz.Linearizer(torch.sin).at(two)
    with pytest.raises(UnsupportedError, match="TwoTensor"):
        lz.Linearizer(lambda x: TwoTensor(x, x)).at(rand(3))


def sparse(layout: torch.layout) -> torch.Tensor:
    dense = torch.eye(4, dtype=D)
    options = {"blocksize": (2, 2)} if layout in (torch.sparse_bsr, torch.sparse_bsc) else {}
    return dense.to_sparse(layout=layout, **options)


LAYOUTS = [
    torch.sparse_coo,
    torch.sparse_csr,
    torch.sparse_csc,
    torch.sparse_bsr,
    torch.sparse_bsc,
]


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_sparse_layouts_are_refused_by_name(layout: torch.layout) -> None:
    name = str(layout).removeprefix("torch.")
    with pytest.raises(UnsupportedError, match=name):
        lz.Linearizer(lambda x: x).at(sparse(layout))
    with pytest.raises(UnsupportedError, match=name):
        lz.Linearizer(
            lambda x: x.to_sparse(layout=layout, **({"blocksize": (2, 2)} if "bs" in name else {}))
        ).at(rand(4, 4))


SPARSE_INSIDE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a constant in csr": lambda x: sparse(torch.sparse_csr) @ x,
    "a constant in coo": lambda x: sparse(torch.sparse_coo) @ x.sin(),
    "a transposed constant": lambda x: torch.sparse.mm(sparse(torch.sparse_coo).t(), x) * x,
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("name", SPARSE_INSIDE)
def test_sparse_constants_inside_f(name: str) -> None:
    compare(SPARSE_INSIDE[name], rand(4, 4))


def coo(x: torch.Tensor) -> torch.Tensor:
    return torch.sparse_coo_tensor([[0, 1, 2], [1, 0, 3]], x[0, :3], (4, 4), check_invariants=True)


SPARSE_REFUSED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "there and back": lambda x: x.to_sparse().to_dense() * x,
    "to dense": lambda x: coo(x).to_dense() @ x,
    "times dense": lambda x: torch.sparse.mm(coo(x), x),
    "sum": lambda x: torch.sparse.sum(x.to_sparse()),
    "values": lambda x: x.to_sparse().coalesce().values().sin(),
    "values of csr": lambda x: x.to_sparse_csr().values().sin(),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("name", SPARSE_REFUSED)
def test_gradients_of_sparse_tensors_are_refused(name: str) -> None:
    here = lz.Linearizer(SPARSE_REFUSED[name]).at(rand(4, 4))
    for _ in range(CALLS):
        for call in (lambda: here.jvp_fn(rand(4, 4)), lambda: here.vjp_fn(like(here.value, 1))):
            with pytest.raises(UnsupportedError, match=r"Backward0: .*[Ss]parse"):
                call()
