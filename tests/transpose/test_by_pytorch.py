"""What cannot be recorded is served by PyTorch's own nodes, and turned around by it too."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import Function

import linearize as lz
from linearize.errors import MissingDerivativeError, StalenessError, UnsupportedError
from tests.support.comparing import CALLS, Counted, close
from tests.support.functions import rand
from tests.support.references import like

D, C = torch.float64, torch.complex128
pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]


def coo(x: torch.Tensor) -> torch.Tensor:
    places = torch.tensor([[0, 1, 2], [1, 0, 3]])
    return torch.sparse_coo_tensor(places, x[0, :3], (4, 4), check_invariants=True)


def twice_there(x: torch.Tensor) -> torch.Tensor:
    places = torch.tensor([[0, 0, 2], [1, 1, 3]])  # added up where they meet
    return torch.sparse_coo_tensor(places, x[1, :3], (4, 4), check_invariants=True)


def doubled(x: torch.Tensor) -> torch.Tensor:
    return x + x


def check(f: Callable[..., Any], x: torch.Tensor, *, pushforward: bool = True) -> Any:
    """Compare both products with native gradients, one by one and in stacks."""
    t = x.clone().requires_grad_()
    y = f(t)
    rows = torch.eye(y.numel(), dtype=y.dtype)
    given = [rows, 1j * rows] if y.is_complex() else [rows]

    def pulled(u: torch.Tensor) -> torch.Tensor:
        (g,) = torch.autograd.grad(y, t, u.reshape(y.shape), retain_graph=True)
        return g.to_dense()

    counted = Counted(f)
    here = lz.Linearizer(counted).at(x)
    for k in range(CALLS):
        u = like(here.value, k)
        close(here.vjp_fn(u)[0], pulled(u), 1e-9)
        if pushforward:
            v = like(x, 10 + k)
            parts = [torch.stack([_real(pulled(r), v) for r in some]) for some in given]
            expected = torch.complex(*parts) if len(parts) > 1 else parts[0]
            close(here.jvp_fn(v), expected.reshape(y.shape), 1e-9)
    stack = torch.stack([like(here.value, 20 + k) for k in range(3)])
    close(here.vjp_fn.batched(stack)[0], torch.stack([pulled(u) for u in stack]), 1e-9)
    if pushforward:
        vs = torch.stack([like(x, 30 + k) for k in range(3)])
        close(here.jvp_fn.batched(vs), torch.stack([here.jvp_fn(v) for v in vs]), 1e-9)
    assert counted.runs == 1
    return here


def _real(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b.conj()).real.sum() if a.is_complex() else (a * b).sum()


# -- sparse tensors made of the primals ---------------------------------------------------------

SPARSE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "there and back": lambda x: x.to_sparse().to_dense() * x,
    "to dense": lambda x: (coo(x).to_dense() @ x).sin(),
    "times dense": lambda x: torch.sparse.mm(coo(x.sin()), x.cos()),
    "broadcast between": lambda x: torch.sparse.mm(
        coo(x), torch.sparse.mm(twice_there(x), x)[:1].sin() * x
    ),
    "one gradient twice between": lambda x: torch.sparse.mm(
        coo(x), doubled(torch.sparse.mm(twice_there(x), x).sin())
    ),
    "by operator": lambda x: coo(x) @ x,
    "transposed": lambda x: coo(x).t() @ x,
    "sum": lambda x: torch.sparse.sum(x.to_sparse()) * x,
    "values": lambda x: x.to_sparse().coalesce().values().sin(),
    "product": lambda x: (coo(x) * coo(x.sin())).to_dense(),
    "sums": lambda x: (coo(x) + twice_there(x)).to_dense() @ x,
    "addmm": lambda x: torch.sparse.addmm(x, coo(x.sin()), x),
    "in two places": lambda x: torch.sparse.mm(coo(torch.sparse.mm(coo(x), x).tanh()), x),
    "repeated indices": lambda x: torch.sparse.mm(twice_there(x), x),
    "compressed": lambda x: x.to_sparse_csr() @ x,
}
#: What PyTorch differentiates once only.
ONCE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "values of csr": lambda x: x.to_sparse_csr().values().sin(),
    "two sparse factors": lambda x: torch.sparse.mm(coo(x), coo(x)).to_dense(),
    "softmax": lambda x: torch.sparse.softmax(coo(x), 1).to_dense(),
    "a mask": lambda x: x.sparse_mask(coo(torch.ones(4, 4, dtype=D)).coalesce()).to_dense(),
}


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_tensors_made_of_the_primals(name: str) -> None:
    check(SPARSE[name], rand(4, 4))


def test_complex_sparse_tensors() -> None:
    check(lambda x: torch.sparse.mm(coo(x), x), rand(4, 4, dtype=C))


@pytest.mark.parametrize("name", ONCE)
def test_without_a_second_derivative_there_is_the_matrix(name: str) -> None:
    f, x, v = ONCE[name], rand(4, 4), rand(4, 4, seed=1)
    here = check(f, x, pushforward=False)
    for _ in range(2):
        with pytest.raises(MissingDerivativeError, match=r"by PyTorch neither.*materialize"):
            here.jvp_fn(v)
    jacobian = torch.autograd.functional.jacobian(f, x).reshape(-1, 16)
    here = lz.Linearizer(f, opaque="materialize").at(x)
    for _ in range(CALLS):
        close(here.jvp_fn(v).reshape(-1), jacobian @ v.reshape(-1), 1e-9)


def test_tensors_of_unequal_rows() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        ragged = torch.nested.as_nested_tensor([x[0, :3].clone(), x[1]])
        return torch.nested.to_padded_tensor(ragged.sin(), 0.0) * x[:2].exp()

    check(f, rand(4, 4))


def test_only_what_must_be_is_left_to_pytorch() -> None:
    """The rest of f is recorded and simplified, and Functions before and after are called."""

    class Scaled(Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return 3 * x

        @staticmethod
        def jvp(ctx: Any, t: torch.Tensor) -> torch.Tensor:
            return 3 * t

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            return 3 * g

    here = check(
        lambda x: Scaled.apply(torch.sparse.mm(coo(Scaled.apply(x).sin()), x.cos()).exp() * x),
        rand(4, 4),
    )
    assert str(here.program.pushforward).count("Scaled.jvp(") == 2
    assert str(here.program.pullback).count("Scaled.backward(") == 2
    told = here.program.explain()
    assert "PyTorch's own backward (a gradient inside is no dense tensor)" in told
    assert "folded diagonals" in str(here.program.pullback)


def test_a_graph_that_is_kept_counts() -> None:
    n = 1000
    places = torch.arange(n).repeat(2, 1)

    def f(x: torch.Tensor) -> torch.Tensor:
        square = torch.sparse_coo_tensor(places, x, (n, n), check_invariants=True)
        return torch.sparse.mm(square, x[:, None])

    here = lz.Linearizer(f).at(rand(n))
    here.vjp_fn(rand(n, 1))
    here.jvp_fn(rand(n))
    assert here.nbytes >= 3 * 8 * n
    assert here.residuals().nbytes >= 3 * 8 * n
    node = weakref.ref(here.value)
    del here
    gc.collect()
    assert node() is None


def test_something_that_it_keeps_was_changed() -> None:
    w = rand(4, 4, seed=3)
    here = lz.Linearizer(lambda x: torch.sparse.mm(coo(x), w)).at(rand(4, 4))
    u = rand(4, 4, seed=1)
    here.vjp_fn(u)
    w.add_(1)
    for _ in range(2):
        with pytest.raises(StalenessError):
            here.vjp_fn(u)


def test_a_sparse_gradient_of_a_function() -> None:
    class Sparse(Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            return (2 * ctx.saved_tensors[0] * g).to_sparse()

    here = lz.Linearizer(lambda x: Sparse.apply(x) * x).at(x := rand(4))
    for k in range(CALLS):
        close(here.vjp_fn(u := rand(4, seed=k))[0], 3 * x.square() * u, 1e-12)


# -- custom Functions whose backward cannot be recorded -----------------------------------------

MATRIX = torch.eye(4, dtype=D) * 3 + 0.3 * rand(4, 4, seed=5)


class Times(Function):
    """Leaves PyTorch, in its backward too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, s: float) -> torch.Tensor:
        ctx.s = s
        return torch.from_numpy(x.detach().numpy() * s)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        return torch.from_numpy(g.detach().numpy() * ctx.s), None


def richardson(matrix: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    x = torch.zeros_like(b)
    step = 1 / torch.linalg.matrix_norm(matrix, 2)
    for _ in range(500):
        r = b - matrix @ x
        if r.norm().item() <= 1e-13 * b.norm().item():
            break
        x = x + step * r
    return x


def conjugate_gradients(matrix: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """On the normal equations."""
    x, r = torch.zeros_like(b), matrix.T @ b
    p, old = r, r @ r
    for _ in range(30):
        if old.sqrt().item() <= 1e-14 * b.norm().item():
            break
        q = matrix.T @ (matrix @ p)
        x, r = x + (old / (p @ q)) * p, r - (old / (p @ q)) * q
        p, old = r + (r @ r / old) * p, r @ r
    return x


def inside(ctx: Any, g: torch.Tensor) -> torch.Tensor:
    """Autograd within, behind a test of the numbers."""
    (x,) = ctx.saved_tensors
    if not g.abs().max().item():
        return torch.zeros_like(g)
    with torch.enable_grad():
        t = x.detach().requires_grad_()
        return torch.autograd.grad(t * t.sin(), t, g, create_graph=True)[0]


def made(
    forward: Callable[[torch.Tensor], torch.Tensor], backward: Callable[..., Any]
) -> type[Function]:
    def run(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return forward(x)

    methods = {"forward": staticmethod(run), "backward": staticmethod(backward)}
    return type("Made", (Function,), methods)


FUNCTIONS: dict[str, type[Function]] = {
    "autograd inside": made(lambda x: x * x.sin(), inside),
    "an iterative solver": made(
        lambda b: torch.linalg.solve(MATRIX, b), lambda ctx, g: richardson(MATRIX.T, g)
    ),
    "conjugate gradients": made(
        lambda b: torch.linalg.solve(MATRIX, b), lambda ctx, g: conjugate_gradients(MATRIX.T, g)
    ),
    "a chain of Functions": made(lambda x: 3 * x, lambda ctx, g: Times.apply(g, 3.0)),
    "half a chain": made(lambda x: 5 * x, lambda ctx, g: Times.apply(g, 3.0) + 2 * g),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_backward_turned_around_by_pytorch(name: str) -> None:
    apply = FUNCTIONS[name].apply
    here = check(lambda x: apply(x.sin()).cos() * x, rand(4))
    assert "transposed Made: PyTorch's second derivative" in here.program.explain()
    here.check()


def test_a_jvp_turned_around_by_pytorch() -> None:
    class Tripled(Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return 3 * x

        @staticmethod
        def jvp(ctx: Any, t: torch.Tensor) -> torch.Tensor:
            return Times.apply(t, 3.0)

    here = lz.Linearizer(lambda x: Tripled.apply(x.sin())).at(x := rand(4))
    for k in range(CALLS):
        u = rand(4, seed=k)
        close(here.vjp_fn(u)[0], 3 * x.cos() * u, 1e-12)
        close(here.jvp_fn(u), 3 * x.cos() * u, 1e-12)


def _half(ctx: Any, g: torch.Tensor) -> torch.Tensor:
    return g + torch.from_numpy(np.array(g.detach().numpy()))


def _clipped_by_norm(ctx: Any, g: torch.Tensor) -> torch.Tensor:
    norm = g.norm().item()
    return 2 * g if norm < 100 else g * (200 / norm)


def _dead_zone(ctx: Any, g: torch.Tensor) -> torch.Tensor:
    return 2 * g * float(g.norm().item() > 1e-2)


def _other_in_grad_mode(ctx: Any, g: torch.Tensor) -> torch.Tensor:
    return (2 if torch.is_grad_enabled() else 3) * g * (1 + 0 * g.sum().item())


@torch.autograd.function.once_differentiable
def _once(ctx: Any, g: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(2 * g.numpy())


def _raises_in_grad_mode(ctx: Any, g: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(2 * g.numpy())


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "terms are missing": (_half, "lacks terms"),
    "clipping": (_clipped_by_norm, "not linear"),
    "a threshold": (_dead_zone, "not linear"),
    "grad mode tells": (_other_in_grad_mode, "where gradients are recorded"),
    "once differentiable": (_once, "lacks terms|once_differentiable|requires grad"),
    "an error in grad mode": (_raises_in_grad_mode, "RuntimeError: Can't call numpy"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_believed(name: str) -> None:
    """It is tested for linearity at several sizes, both signs, and against the backward."""
    backward, words = REFUSED[name]
    apply = made(lambda x: 2 * x, backward).apply
    here = lz.Linearizer(lambda x: apply(x.sin())).at(rand(4))
    for _ in range(2):
        with pytest.raises(MissingDerivativeError, match=rf"Made.*by PyTorch neither.*({words})"):
            here.jvp_fn(rand(4))
    here.vjp_fn(rand(4))


def test_no_derivative_at_all() -> None:
    here = lz.Linearizer(lambda x: torch.special.zeta(x, x + 1)).at(rand(4).exp() + 1)
    for call in (here.vjp_fn, here.jvp_fn):
        with pytest.raises(UnsupportedError, match=r"Zeta.*not implemented") as caught:
            call(rand(4))
        assert type(caught.value) is UnsupportedError
