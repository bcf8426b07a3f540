"""Custom Functions as published packages write them, through both products.

J·v is compared with finite differences (with the transpose of native backward where a package
gives surrogate gradients), Jᵀ·u with native backward; f runs once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import linearize as lz
from linearize.errors import MissingDerivativeError
from tests.support.comparing import CALLS, Counted, close, compare
from tests.support.references import Plain, gradient, like

D, C = torch.float64, torch.complex128
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = D) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def needs(name: str) -> Any:
    return pytest.importorskip(
        name, reason=f"{name} is not installed (extra `packages`)", exc_type=ImportError
    )


# -- entmax: sparse alternatives to softmax, backward in PyTorch operations ----------------------


@pytest.mark.parametrize(
    "name",
    ["sparsemax", "entmax15", "entmax_bisect", "sparsemax_bisect", "normmax_bisect"],
)
def test_entmax(name: str) -> None:
    entmax = needs("entmax")
    fn = getattr(entmax, name)
    compare(lambda x: fn(2 * x, dim=-1).sin(), rand(4, 6), tol=1e-5)


def test_entmax_alpha() -> None:
    """The order of the map is differentiable too."""
    entmax = needs("entmax")

    def f(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        return entmax.entmax_bisect(x, alpha, dim=-1, n_iter=60)

    compare(f, rand(4, 6), torch.full((4, 1), 1.4, dtype=D), tol=1e-4)


@pytest.mark.parametrize("name", ["sparsemax_loss", "entmax15_loss", "entmax_bisect_loss"])
def test_entmax_losses(name: str) -> None:
    entmax = needs("entmax")
    target = torch.tensor([0, 3, 5, 1])
    compare(lambda x: getattr(entmax, name)(x, target), rand(4, 6), tol=1e-5)


# -- torchdiffeq: an adjoint that solves an equation in its backward -----------------------------


@pytest.mark.parametrize("adjoint", [False, True])
def test_torchdiffeq(adjoint: bool) -> None:
    """With the adjoint, backward solves another equation, for the solution and the cotangent in
    one vector: not linear in the cotangent step by step, so that J·v needs the matrix."""
    torchdiffeq = needs("torchdiffeq")
    times = torch.linspace(0, 1, 4, dtype=D)

    class Field(torch.nn.Module):
        def __init__(self, w: torch.Tensor) -> None:
            super().__init__()
            self.w = w

        def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (self.w @ y).tanh() + t

    def f(y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        options = {"adjoint_params": (w,)} if adjoint else {}
        solve = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint
        return solve(Field(w), y, times, method="rk4", options={"step_size": 0.05}, **options)

    if not adjoint:
        compare(f, rand(3), rand(3, 3, seed=1))
        return
    with pytest.raises(MissingDerivativeError, match="OdeintAdjointMethod"):
        lz.Linearizer(f).at(rand(3), rand(3, 3, seed=1)).jvp_fn(rand(3), rand(3, 3))
    compare(f, rand(3), rand(3, 3, seed=1), tol=1e-3, opaque="materialize")


# -- pytorch-finufft: transforms in C -------------------------------------------------------------

NUFFT: dict[str, Callable[..., Any]] = {
    "type 1": lambda F, p, z: F.finufft_type1(p, z, (6, 7)),
    "type 2": lambda F, p, z: F.finufft_type2(p, z.reshape(5, 4)),
}


@pytest.mark.parametrize("name", NUFFT)
def test_finufft(name: str) -> None:
    """The backward leaves PyTorch: Jᵀ·u calls it, J·v needs a matrix."""
    pytorch_finufft = needs("pytorch_finufft")
    F = pytorch_finufft.functional
    points, strengths = rand(2, 20), rand(20, seed=1, dtype=C)

    def f(p: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return NUFFT[name](F, p, z)

    here = lz.Linearizer(f).at(points, strengths)
    with pytest.raises(MissingDerivativeError, match="Finufft"):
        here.jvp_fn(points, strengths)
    compare(f, points, strengths, tol=1e-5, opaque="materialize")


# -- qpth: a layer that solves quadratic programs ------------------------------------------------


def test_qpth() -> None:
    """A batched interior-point solver; backward solves with the factorization of forward."""
    QPFunction = needs("qpth.qp").QPFunction
    Q, G = torch.eye(3, dtype=D) * 2, rand(4, 3, seed=2)
    h, A, b = torch.ones(4, dtype=D), rand(1, 3, seed=3), torch.zeros(1, dtype=D)

    def f(p: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return QPFunction(verbose=-1, eps=1e-14)(Q, p, G, h, A, b)

    compare(f, rand(3), h, tol=1e-4)


# -- snntorch: spikes with surrogate gradients ---------------------------------------------------

SURROGATES = ["fast_sigmoid", "atan", "sigmoid", "triangular", "straight_through_estimator"]


@pytest.mark.parametrize("name", SURROGATES)
def test_snntorch(name: str) -> None:
    """Surrogates are no derivatives: both products are what the author's backward says.

    The spikes are float32, and so is what flows back through them.
    """
    snntorch = needs("snntorch")
    spike = getattr(needs("snntorch.surrogate"), name)()
    leaky = snntorch.Leaky(beta=0.8, spike_grad=spike)
    w = rand(5, 4)

    def f(x: torch.Tensor) -> torch.Tensor:
        mem = torch.zeros(3, 5, dtype=D)
        out = []
        for step in x:
            spk, mem = leaky(step @ w.T, mem)
            out.append(mem + spk)
        return torch.stack(out)

    x = rand(3, 3, 4, seed=2)
    plain, counted = Plain(f, (x,)), Counted(f)
    here = lz.Linearizer(counted).at(x)
    rows = torch.eye(45, dtype=D).reshape(45, 3, 3, 5)
    J = torch.stack([gradient(plain, [r])[0].flatten() for r in rows])
    assert J.abs().max() > 0
    for call in range(CALLS):
        v, u = like(x, call), like(here.value, call)
        close(here.jvp_fn(v).flatten(), J @ v.flatten(), 1e-5)
        close(here.vjp_fn(u)[0].flatten(), J.T @ u.flatten(), 1e-5)
    assert counted.runs == 1


# -- warp-lang: kernels compiled by a package, in a Function around them -------------------------


def test_warp(tmp_path: Any) -> None:
    """The pattern of its documentation: a Function with a recorded tape; backward replays it."""
    wp = needs("warp")
    wp.config.quiet = True
    wp.config.kernel_cache_dir = str(tmp_path)
    wp.init()

    @wp.kernel
    def shape(x: wp.array(dtype=wp.float64), y: wp.array(dtype=wp.float64)):
        i = wp.tid()
        y[i] = wp.sin(x[i]) * x[i]

    class Shape(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.x = wp.from_torch(x.detach().contiguous(), requires_grad=True)
            ctx.y = wp.zeros_like(ctx.x, requires_grad=True)
            wp.launch(shape, dim=len(x), inputs=[ctx.x], outputs=[ctx.y], device="cpu")
            return wp.to_torch(ctx.y).detach().clone()

        @staticmethod
        def backward(ctx: Any, u: torch.Tensor) -> torch.Tensor:
            ctx.x.grad.zero_()
            ctx.y.grad = wp.from_torch(u.contiguous())
            wp.launch(
                shape,
                dim=len(u),
                inputs=[ctx.x],
                outputs=[ctx.y],
                adj_inputs=[ctx.x.grad],
                adj_outputs=[ctx.y.grad],
                adjoint=True,
                device="cpu",
            )
            return wp.to_torch(ctx.x.grad).clone()

    def f(x: torch.Tensor) -> torch.Tensor:
        return Shape.apply(x.exp()).cumsum(0)

    here = lz.Linearizer(f).at(rand(5))
    with pytest.raises(MissingDerivativeError, match="Shape"):
        here.jvp_fn(rand(5))
    compare(f, rand(5), opaque="materialize")


# -- torchlpc: recursive filters, with jvp and backward ------------------------------------------


def test_torchlpc() -> None:
    torchlpc = needs("torchlpc")

    def f(x: torch.Tensor, a: torch.Tensor, zi: torch.Tensor) -> torch.Tensor:
        return torchlpc.sample_wise_lpc(x, 0.3 * a.tanh(), zi)

    compare(f, rand(2, 9), rand(2, 9, 3, seed=1), rand(2, 3, seed=2))


def test_torchlpc_recurrence() -> None:
    needs("torchlpc")
    from torchlpc.recurrence import Recurrence

    def f(a: torch.Tensor, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return Recurrence.apply(x, 0.5 * a.tanh(), z)

    compare(f, rand(2, 9), rand(2, seed=1), rand(2, 9, seed=2))
