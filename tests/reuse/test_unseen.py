"""Nodes and methods that do not show all that they do: called at each point, and compared.

Where they do the same as at the point before, its programs are taken over; where anything differs,
never.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import linearize as lz
from linearize._reuse.shared import SHARED
from tests.support.comparing import CALLS

D = torch.float64
N = 8
Function: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


def numbers(seed: int, *shape: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (N,)), dtype=D, generator=g)


M = numbers(99, N, N)
ONE = torch.ones(1, dtype=D)


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=D)


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=D)


@pytest.fixture(autouse=True)
def forgotten() -> None:
    SHARED.clear()


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def agree(lin: lz.Linearizer, f: Function, x: torch.Tensor, seed: int = 0) -> lz.Linearization:
    """Compare products with the Jacobian of PyTorch's engine, row by row."""
    with seeded(seed):
        here = lin.at(x)
    with seeded(seed):
        j = torch.autograd.functional.jacobian(f, x)
    count = here.value.dim()
    for k in range(CALLS):
        v, u = torch.randn_like(x), torch.randn_like(here.value)
        torch.testing.assert_close(here.jvp_fn(v), torch.tensordot(j, v, x.dim()))
        torch.testing.assert_close(here.vjp_fn(u)[0], torch.tensordot(u, j, count))
        if k == 2:
            v = torch.stack([v, 2 * v, v - 1])
            stacked = torch.stack([torch.tensordot(j, t, x.dim()) for t in v])
            torch.testing.assert_close(here.jvp_fn.batched(v), stacked)
    return here


def counts(lin: lz.Linearizer) -> tuple[int, int]:
    return lin.stats().recorded, lin.stats().reused


class Old(torch.autograd.Function):
    """Old style, a backward only, in PyTorch's operations."""

    backwards = 0

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.exp() * x

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        Old.backwards += 1
        (x,) = ctx.saved_tensors
        return g * x.exp() * (1 + x)


class Surrogate(torch.autograd.Function):
    """Both are one in PyTorch's eyes: the gradient goes straight through."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return g


class Several(torch.autograd.Function):
    """Two arguments, two results, a workspace that is written to at each call."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, a: torch.Tensor) -> Any:
        ctx.save_for_backward(x, a)
        ctx.work = torch.empty_like(x)
        return x * a, (x + a).sin()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor, h: torch.Tensor) -> Any:
        x, a = ctx.saved_tensors
        both = h * (x + a).cos()
        out = torch.zeros_like(x)
        out += g * a
        out.add_(both)
        return out, (g * x + both) if ctx.needs_input_grad[1] else None


@torch.library.custom_op("linearize_unseen::squared", mutates_args=())
def squared(x: torch.Tensor) -> torch.Tensor:
    return x * x


squared.register_autograd(
    lambda ctx, g: g * 2 * ctx.saved_tensors[0],
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def image(f: Function) -> Function:
    return lambda x: f(x.reshape(1, 2, 4)).flatten()


def slices(x: torch.Tensor) -> torch.Tensor:
    out = zeros(N)
    out[1:-1] = x[2:] - x[:-2]
    out[0] = x[0].sin()
    return out


def scaled_slices(x: torch.Tensor) -> torch.Tensor:
    out = x.clone()
    out[1:-1] *= 2.5
    out[::2] += x[1::2].sin()
    out[0] = 0
    return out


def softmax_inside(x: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        y = x if x.requires_grad else x.detach().requires_grad_()
        z = (y.softmax(0) * torch.arange(N, dtype=D)).sum()
        return torch.autograd.grad(z, y, create_graph=True)[0]


def block(x: torch.Tensor) -> torch.Tensor:
    """A block of a causal language model, with the empty cache of its first call."""
    past = zeros(0, 4)
    h = F.layer_norm(x.reshape(2, 4), (4,))
    q, k, v = (h @ M[:4, :4], h @ M[4:, :4], h @ M[:4, 4:])
    k, v = torch.cat([past, k]), torch.cat([past, v])
    h = x.reshape(2, 4) + F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
    return (h + F.gelu(h @ M[:4]) @ M[:, :4]).flatten()


def hooked(x: torch.Tensor) -> torch.Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: 1 * t, lambda t: t):
        return (x.sin() * x).exp()


def on_cpu(x: torch.Tensor) -> torch.Tensor:
    with torch.autograd.graph.save_on_cpu():
        return (x.sin() * x).exp()


def both_of(f: Function) -> Function:
    return lambda x: f(x.sin()) * x


torch.manual_seed(0)
EMBEDDING = nn.Embedding(10, N).double()
ATTENTION = nn.MultiheadAttention(N, 2, batch_first=True).double()
LAYER = nn.TransformerEncoderLayer(N, 2, 16, dropout=0.0, batch_first=True).double()
CONV, NORM = nn.Conv1d(1, 2, 3, padding=1).double(), nn.BatchNorm1d(4).double()
STILL = nn.BatchNorm1d(4).double().eval()
LSTM, GRU = nn.LSTM(N, N).double(), nn.GRU(N, N).double()
IDS = torch.tensor([1, 2, 3, 1])

#: Everyday kinds of functions.
KINDS: dict[str, Function] = {
    "cat with constants": lambda x: torch.cat([ONE, x.sin(), ONE, ONE]),
    "cat with nothing": lambda x: torch.cat([zeros(0), x.sin()]),
    "stack with a constant": lambda x: torch.stack([x, ones(N)]).sin(),
    "constant padding": lambda x: F.pad(x.sin(), (1, 2)),
    "circular padding": image(lambda x: F.pad(x, (1, 2), mode="circular").sin()),
    "reflected padding": image(lambda x: F.pad(x, (1, 1), mode="reflect").sin()),
    "writes to slices": slices,
    "more writes to slices": scaled_slices,
    "a slice put in": lambda x: torch.slice_scatter(x.sin(), x[:3] * 2, 0, 1, 4) * x,
    "a row put in": lambda x: torch.select_scatter(x.reshape(2, 4).sin(), x[:4] * 2, 0, -1).exp(),
    "a diagonal put in": lambda x: torch.diagonal_scatter(x.reshape(2, 4).sin(), x[:2], 1).exp(),
    "index_put": lambda x: zeros(N).index_put((torch.tensor([1, 2]),), x[:2]).sin(),
    "real FFT": lambda x: torch.fft.irfft(torch.fft.rfft(x.sin()) * torch.arange(5)).exp(),
    "power spectrum": lambda x: torch.fft.rfft(x).abs() ** 2,
    "FFT": lambda x: torch.fft.fft(x).real.exp(),
    "as_strided": lambda x: x.sin().as_strided((3, 3), (2, 1)).exp(),
    "unfold": lambda x: x.sin().unfold(0, 3, 2).exp(),
    "block_diag": lambda x: torch.block_diag(x.reshape(2, 4), ones(2, 2)).sin(),
    "checkpoint": lambda x: checkpoint(lambda a: (a.sin() * a).exp(), x, use_reentrant=False) * 2,
    "two checkpoints": lambda x: checkpoint(
        torch.tanh, checkpoint(lambda a: a.sin() @ M, x, use_reentrant=False), use_reentrant=False
    ),
    "dropout in a checkpoint": lambda x: checkpoint(
        lambda a: F.dropout(a.sin(), 0.5).exp(), x, use_reentrant=False
    ),
    "dropout": lambda x: F.dropout(x.sin(), 0.5) * x,
    "hooks": hooked,
    "saved on the CPU": on_cpu,
    "custom operator": both_of(squared),
    "softmax differentiated inside": softmax_inside,
    "backward only": both_of(Old.apply),
    "straight through": lambda x: Surrogate.apply(3 * x) * x,
    "backward of two": lambda x: torch.cat(Several.apply(x.sin(), x)),
    "backward of one of two": lambda x: torch.cat(Several.apply(x.sin(), ones(N))),
    "one result of two": lambda x: Several.apply(x.sin(), x)[1],
    "embedding": lambda x: (EMBEDDING(IDS) * x).tanh(),
    "embedded": lambda x: F.embedding(IDS, x.reshape(4, 2)).sin(),
    "attention": lambda x: ATTENTION(*(x.expand(1, 3, N) * ones(3, 1).cumsum(0),) * 3)[0],
    "encoder layer": lambda x: LAYER(x * ones(1, 3, 1).cumsum(1)),
    "block with an empty cache": block,
    "convolution": lambda x: CONV(x[None, None]).tanh(),
    "batch norm": lambda x: NORM(x.reshape(2, 4)),
    "batch norm, evaluated": lambda x: STILL(x.reshape(2, 4)),
    "LSTM": lambda x: LSTM(x[None])[0],
    "GRU": lambda x: GRU(x[None])[0],
    "index": lambda x: x[torch.tensor([1, 0, 3])].exp(),
    "mask": lambda x: x[torch.arange(N) % 2 == 0].exp(),
    "sorted": lambda x: x.sort()[0] * torch.arange(N),
    "solve": lambda x: torch.linalg.solve(M + 9 * torch.eye(N, dtype=D), x.sin()),
}


@pytest.mark.parametrize("name", KINDS)
def test_everyday_functions_are_recorded_once_in_five_points(name: str) -> None:
    f = KINDS[name]
    lin = lz.Linearizer(f, maxsize=0)
    for k in range(5):
        agree(lin, f, numbers(k), seed=k)
    assert counts(lin) == (1, 4)


def test_a_backward_runs_once_at_a_later_point() -> None:
    lin = lz.Linearizer(lambda x: Old.apply(x.sin()) * 2, maxsize=0, check="never")
    for k in range(5):
        here = lin.at(numbers(k))
        Old.backwards = 0
        for _ in range(5):
            here.jvp_fn(numbers(7))
        assert k < 2 or Old.backwards == 1


# -- what differs is seen ----------------------------------------------------------------------


def padded(x: torch.Tensor, k: int) -> torch.Tensor:
    out = zeros(N + 3)
    out[k : k + N] = x.sin()
    return out


def overwritten(x: torch.Tensor, k: int) -> torch.Tensor:
    out = x.sin()
    out[k % 4 : k % 4 + 3] = x[:3].exp()
    return out


def onto_something(x: torch.Tensor, k: int) -> torch.Tensor:
    out = zeros(N) + (k % 2)
    out[2:4] = x[:2]
    out[k % 3] *= 2.0
    return out.sin() + x


def twice(x: torch.Tensor, k: int) -> torch.Tensor:
    def inner(a: torch.Tensor) -> torch.Tensor:
        return (a.sin() * (1.0 + k)).exp() if k % 2 else (a.cos() * numbers(k)).exp()

    return checkpoint(inner, x, use_reentrant=False) * x


#: Functions of a point and of something that PyTorch's nodes do not show.
HIDDEN: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "where constants stand": lambda x, k: torch.cat([ones(1 + k), x.sin(), ones(3 - k)])[1:4],
    "how long constants are": lambda x, k: torch.cat([x, ones(2 - k % 2), x.sin(), ones(k)])[:N],
    "strides": lambda x, k: x.sin().as_strided((3,), (1 + k % 3,)),
    "an offset": lambda x, k: x.sin().as_strided((3,), (2,), k),
    "blocks": lambda x, k: torch.block_diag(ones(k, 1), x.reshape(2, 4), ones(3 - k, 1)).sin(),
    "padding": lambda x, k: F.pad(x[None], (k, 3 - k), mode="circular").sin(),
    "where slices are written": padded,
    "what slices leave": overwritten,
    "onto what": onto_something,
    "what a checkpoint does": twice,
}


@pytest.mark.parametrize("name", HIDDEN)
def test_what_nodes_do_not_show_is_seen(name: str) -> None:
    f = HIDDEN[name]
    lin = lz.Linearizer(lambda x: f(x, k), maxsize=0)
    for i, k in enumerate((0, 1, 0, 2, 3, 1, 0, 2, 0)):
        agree(lin, lambda x, k=k: f(x, k), numbers(i))
    recorded, reused = counts(lin)
    assert recorded <= 4 + 4 * (name == "what a checkpoint does")
    assert reused >= 1


WEIGHT = 1.0


def function(backward: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    """Return a Function of x, a setting and two constants, with a backward only."""

    class Made(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, x: torch.Tensor, k: Any, a: torch.Tensor, b: torch.Tensor
        ) -> torch.Tensor:
            ctx.save_for_backward(x, a, b)
            ctx.k = k
            return x.sin()

        @staticmethod
        def _backward(ctx: Any, g: torch.Tensor) -> Any:
            return backward(ctx, g, *ctx.saved_tensors), None, None, None

    Made.backward = Made._backward
    return Made.apply


def by_numpy(ctx: Any, g: torch.Tensor, x: torch.Tensor, a: Any, b: Any) -> torch.Tensor:
    factor = torch.empty(N, dtype=D)
    factor.numpy()[:] = x.detach().numpy() * ctx.k
    return g * factor


def by_workspace(ctx: Any, g: torch.Tensor, x: torch.Tensor, a: Any, b: Any) -> torch.Tensor:
    c = x * a
    first = g * c
    c.mul_(b)
    return first + g * c + ctx.k * g


def by_item(ctx: Any, g: torch.Tensor, x: torch.Tensor, a: Any, b: Any) -> torch.Tensor:
    return g * a if float(x.detach().sum()) > 0 else g * b * 2


def by_parts(ctx: Any, g: torch.Tensor, x: torch.Tensor, a: Any, b: Any) -> torch.Tensor:
    out = torch.zeros_like(x)
    out[ctx.k :] = (g * a)[ctx.k :]
    return out + g * x[ctx.k]


def by_state(ctx: Any, g: torch.Tensor, x: torch.Tensor, a: Any, b: Any) -> torch.Tensor:
    return g * x.abs() if ctx.needs_input_grad[0] and WEIGHT > 1 else WEIGHT * g * x


def by_where(ctx: Any, g: torch.Tensor, x: torch.Tensor, a: Any, b: Any) -> torch.Tensor:
    return torch.where(a > 0, g * x, torch.zeros_like(g)) * ctx.k


#: Backwards that depend on a setting, and on more than a graph shows.
BACKWARDS: dict[str, Callable[..., torch.Tensor]] = {
    "a static argument": lambda ctx, g, x, a, b: g * x.cos() ** ctx.k,
    "a factor": lambda ctx, g, x, a, b: g * x * (0.5 + ctx.k),
    "a branch": lambda ctx, g, x, a, b: g * x if ctx.k % 2 else (g * a).cumsum(0),
    "a shift": lambda ctx, g, x, a, b: (g * x).roll(ctx.k),
    "a part": lambda ctx, g, x, a, b: g * x[ctx.k],
    "the same operations on others": lambda ctx, g, x, a, b: g * a * x if ctx.k else g * b * x,
    "which are the same": lambda ctx, g, x, a, b: (g * a).tanh_() * 0 + (g * a) * b,
    "NumPy": by_numpy,
    "a workspace": by_workspace,
    "numbers": by_item,
    "parts": by_parts,
    "the state of the process": by_state,
    "a mask": by_where,
    "nothing": lambda ctx, g, x, a, b: g * x if ctx.k else torch.zeros_like(g),
    "a new tensor": lambda ctx, g, x, a, b: g * torch.full((N,), 1.0 + ctx.k, dtype=D) * x,
    "a shape": lambda ctx, g, x, a, b: (g * x[: 1 + ctx.k].sum()) + g * x[: 2 * ctx.k].sum(),
}
BACKWARDS.pop("which are the same")  # tanh_ of a gradient is not linear


@pytest.mark.parametrize("name", BACKWARDS)
def test_what_a_backward_depends_on_is_seen(name: str) -> None:
    global WEIGHT
    apply = function(BACKWARDS[name])
    constants = [numbers(50), numbers(51)]
    state = (0, constants[0], constants[1])
    lin = lz.Linearizer(lambda x: apply(x * 2, *state) * x, maxsize=0)
    settings = [(k, i, j) for k in (0, 1, 2) for i, j in ((0, 1), (0, 0), (1, 0))]
    try:
        for n, (k, i, j) in enumerate(settings + settings):
            state = (k, constants[i], constants[j])
            WEIGHT = 1.0 + 0.5 * (n % 3)

            def f(x: torch.Tensor, state: Any = state) -> torch.Tensor:
                return apply(x * 2, *state) * x

            agree(lin, f, numbers(n))
    finally:
        WEIGHT = 1.0


def test_programs_of_both_settings_are_kept() -> None:
    apply = function(BACKWARDS["a branch"])
    a, b = numbers(50), numbers(51)
    k = 0
    lin = lz.Linearizer(lambda x: apply(x, k, a, b) * 2, maxsize=0)
    for n in range(8):
        k = n % 2
        agree(lin, lambda x, k=k: apply(x, k, a, b) * 2, numbers(n))
    assert counts(lin) == (2, 6)


def test_which_argument_wants_a_gradient() -> None:
    both = True

    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.cat(Several.apply(x.sin(), x if both else x.detach()))

    lin = lz.Linearizer(f, maxsize=0)
    for n, both in enumerate((True, False, True, False, False, True)):
        x = numbers(n)
        here = lin.at(x)
        a = x if both else x.detach()
        for _ in range(CALLS):
            v = torch.randn_like(x)
            w = v if both else zeros(N)
            t = v * x.cos()
            expected = torch.cat([t * a + x.sin() * w, (x.sin() + a).cos() * (t + w)])
            torch.testing.assert_close(here.jvp_fn(v), expected)
    assert counts(lin) == (2, 4)


def test_a_backward_that_draws_at_random_is_not_believed() -> None:
    """Its numbers are those of the call: at each point those of that point's."""

    class Noisy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            return g * torch.randn(N, dtype=D)

    lin = lz.Linearizer(Noisy.apply, maxsize=0, opaque="error")
    for k in range(3):
        here = lin.at(numbers(k))
        with pytest.raises(lz.LinearizeError):
            here.jvp_fn(numbers(8))


def test_numbers_that_scale_beside_what_is_not_seen() -> None:
    def f(x: torch.Tensor, a: float) -> torch.Tensor:
        return Old.apply(torch.cat([ONE, x * a, ONE])) * a

    lin = lz.Linearizer(lambda x: f(x, a), maxsize=0)
    for k, a in enumerate((0.3, 0.7, 0.9, 0.3, 2.0)):
        agree(lin, lambda x, a=a: f(x, a), numbers(k))
    assert counts(lin) == (1, 4)


def test_what_was_met_is_let_go() -> None:
    """A product keeps what it reads, and nothing of the rest that was met."""
    lin = lz.Linearizer(lambda x: torch.cat([ONE, Old.apply(x.sin())]), maxsize=0)
    for k in range(3):
        here = agree(lin, lin.f, numbers(k))
    assert here.nbytes <= 6 * N * 8
