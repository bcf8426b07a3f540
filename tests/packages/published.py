"""Functions and operations of published packages, each as a small function of dense primals.

A case is a function that imports the package and returns f and its primals.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

D, C = torch.float64, torch.complex128
Made: TypeAlias = tuple[Callable[..., Any], tuple[torch.Tensor, ...]]


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = D) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def definite(n: int, seed: int = 0) -> torch.Tensor:
    a = rand(n, n, seed=seed)
    return a @ a.T / n + torch.eye(n, dtype=D)


def square(a: torch.Tensor) -> torch.Tensor:
    """Make a matrix definite inside f, so that every direction may be taken."""
    return a @ a.mT + 2 * torch.eye(a.shape[-1], dtype=a.dtype)


CASES: dict[str, Callable[[], Made]] = {}


def case(package: str, name: str) -> Callable[[Callable[[], Made]], Callable[[], Made]]:
    def register(make: Callable[[], Made]) -> Callable[[], Made]:
        CASES[f"{package}: {name}"] = make
        return make

    return register


# -- torchkbnufft (imported before torch_geometric, which replaces a function that it scripts) ----


@case("torchkbnufft", "KbNufft")
def _() -> Made:
    import torchkbnufft

    transform = torchkbnufft.KbNufft(im_size=(6, 6), dtype=D)
    points = rand(2, 9, seed=1)
    return lambda z: transform(z, points), (rand(1, 1, 6, 6, dtype=C),)


@case("torchkbnufft", "KbNufftAdjoint")
def _() -> Made:
    import torchkbnufft

    transform = torchkbnufft.KbNufftAdjoint(im_size=(6, 6), dtype=D)
    points = rand(2, 9, seed=1)
    return lambda z: transform(z, points), (rand(1, 1, 9, dtype=C),)


# -- xitorch: solvers and their adjoints -------------------------------------------------------


@case("xitorch", "linalg.solve")
def _() -> Made:
    import xitorch
    from xitorch.linalg import solve

    def f(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return solve(xitorch.LinearOperator.m(square(a), is_hermitian=True), b)

    return f, (rand(4, 4), rand(4, 2, seed=1))


@case("xitorch", "linalg.symeig")
def _() -> Made:
    import xitorch
    from xitorch.linalg import symeig

    def f(a: torch.Tensor) -> torch.Tensor:
        operator = xitorch.LinearOperator.m(square(a), is_hermitian=True)
        values, vectors = symeig(operator, neig=2, method="exacteig")
        return values + (vectors**2).sum(0)

    return f, (rand(4, 4),)


@case("xitorch", "optimize.rootfinder")
def _() -> Made:
    from xitorch.optimize import rootfinder

    def g(y: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return (a @ y).tanh() * 0.3 + y - 0.5

    def f(a: torch.Tensor) -> torch.Tensor:
        return rootfinder(g, torch.zeros(3, dtype=D), params=(a,), f_tol=1e-12)

    return f, (rand(3, 3),)


@case("xitorch", "integrate.quad")
def _() -> Made:
    from xitorch.integrate import quad

    ends = torch.zeros(1, dtype=D), torch.ones(1, dtype=D)

    def f(a: torch.Tensor) -> torch.Tensor:
        return quad(lambda t, a: (a * t).sin() + a, *ends, params=(a,), n=20)

    return f, (rand(3),)


@case("xitorch", "integrate.solve_ivp")
def _() -> Made:
    from xitorch.integrate import solve_ivp

    times = torch.linspace(0, 1, 5, dtype=D)

    def f(a: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return solve_ivp(lambda t, y, a: (a @ y).tanh(), times, y, params=(a,), method="rk4")

    return f, (rand(3, 3), rand(3, seed=1))


# -- linear_operator ------------------------------------------------------------------------------


@case("linear_operator", "solve")
def _() -> Made:
    from linear_operator import to_linear_operator

    return lambda a, b: to_linear_operator(square(a)).solve(b), (rand(4, 4), rand(4, 2, seed=1))


@case("linear_operator", "inv_quad_logdet")
def _() -> Made:
    from linear_operator import to_linear_operator

    def f(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.stack(to_linear_operator(square(a)).inv_quad_logdet(b, logdet=True))

    return f, (rand(4, 4), rand(4, 2, seed=1))


@case("linear_operator", "matmul")
def _() -> Made:
    from linear_operator.operators import DiagLinearOperator, ToeplitzLinearOperator

    def f(column: torch.Tensor, d: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (ToeplitzLinearOperator(column) + DiagLinearOperator(d.exp())) @ b

    return f, (rand(4), rand(4, seed=1), rand(4, 2, seed=2))


@case("linear_operator", "sqrt_inv_matmul")
def _() -> Made:
    from linear_operator import to_linear_operator

    return lambda a, b: to_linear_operator(square(a)).sqrt_inv_matmul(b), (
        rand(4, 4),
        rand(4, 2, seed=1),
    )


@case("linear_operator", "root_decomposition")
def _() -> Made:
    from linear_operator import to_linear_operator

    def f(a: torch.Tensor) -> torch.Tensor:
        return to_linear_operator(square(a)).root_decomposition().to_dense()

    return f, (rand(4, 4),)


@case("linear_operator", "pivoted_cholesky")
def _() -> Made:
    from linear_operator import to_linear_operator

    return lambda a: to_linear_operator(square(a)).pivoted_cholesky(rank=3), (rand(4, 4),)


@case("linear_operator", "diagonalization")
def _() -> Made:
    from linear_operator import to_linear_operator

    def f(a: torch.Tensor) -> torch.Tensor:
        values, _ = to_linear_operator(square(a)).diagonalization(method="symeig")
        return values

    return f, (rand(4, 4),)


# -- torchopt -------------------------------------------------------------------------------------


@case("torchopt", "implicit.custom_root")
def _() -> Made:
    import torchopt

    def optimality(y: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return square(a) @ y - a[0]

    @torchopt.diff.implicit.custom_root(optimality, argnums=1)
    def solver(y: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve(square(a), a[0])

    return lambda a: solver(torch.zeros(3, dtype=D), a), (rand(3, 3),)


@case("torchopt", "accelerated Adam")
def _() -> Made:
    from torchopt.accelerated_op.adam_op import AdamOp

    def f(g: torch.Tensor, m: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        op = AdamOp(b1=0.9, b2=0.999, eps=1e-6, eps_root=1e-6, inplace=False)
        return op(1 * m, n.exp(), 1 * g, 2)[2]

    return f, (rand(4), rand(4, seed=1), rand(4, seed=2))


# -- torch_geometric ------------------------------------------------------------------------------


@case("torch_geometric", "sparse_cross_entropy")
def _() -> Made:
    from torch_geometric.utils.cross_entropy import sparse_cross_entropy

    labels = torch.tensor([[0, 1, 2, 2], [1, 0, 2, 3]])
    return lambda x: sparse_cross_entropy(x, labels), (rand(3, 4),)


@case("torch_geometric", "EdgeIndex @ x")
def _() -> Made:
    from torch_geometric import EdgeIndex

    edges = [[0, 1, 1, 2], [1, 0, 2, 1]]
    index = EdgeIndex(edges, sparse_size=(3, 3), sort_order="row").fill_cache_()
    ones = torch.ones(4, dtype=D)
    return lambda x: index.matmul(x.sin(), input_value=ones), (rand(3, 2),)


@case("torch_geometric", "GATConv")
def _() -> Made:
    from torch_geometric.nn import GATConv

    torch.manual_seed(0)
    conv = GATConv(3, 2).to(D)
    edges = torch.tensor([[0, 1, 1, 2, 3], [1, 0, 2, 3, 0]])
    return lambda x: conv(x, edges), (rand(4, 3),)


@case("torch_geometric", "GroupAddRev")
def _() -> Made:
    from torch_geometric.nn import GroupAddRev, SAGEConv

    torch.manual_seed(0)
    block = GroupAddRev(SAGEConv(2, 2), num_groups=2, num_bwd_passes=1000).to(D)
    edges = torch.tensor([[0, 1, 1, 2, 3], [1, 0, 2, 3, 0]])
    return lambda x: block(x.sin(), edges), (rand(4, 4),)


# -- torchsparsegradutils -------------------------------------------------------------------------

PLACES = torch.tensor([[0, 1, 1, 2, 2], [0, 0, 1, 1, 2]])


def lower(values: torch.Tensor) -> torch.Tensor:
    values = values + torch.tensor([3.0, 0, 3, 0, 3], dtype=D)
    return torch.sparse_coo_tensor(PLACES, values, (3, 3), check_invariants=True).coalesce()


@case("torchsparsegradutils", "sparse_mm")
def _() -> Made:
    from torchsparsegradutils import sparse_mm

    return lambda v, b: sparse_mm(lower(v), b), (rand(5), rand(3, 2, seed=1))


@case("torchsparsegradutils", "sparse_triangular_solve")
def _() -> Made:
    from torchsparsegradutils import sparse_triangular_solve

    return lambda v, b: sparse_triangular_solve(lower(v).to_sparse_csr(), b, upper=False), (
        rand(5),
        rand(3, 2, seed=1),
    )


@case("torchsparsegradutils", "sparse_generic_solve")
def _() -> Made:
    from torchsparsegradutils import sparse_generic_solve
    from torchsparsegradutils.utils import bicgstab

    return lambda v, b: sparse_generic_solve(
        lower(v), b, solve=bicgstab, transpose_solve=bicgstab
    ), (rand(5), rand(3, seed=1))


@case("torchsparsegradutils", "sparse_generic_lstsq")
def _() -> Made:
    from torchsparsegradutils import sparse_generic_lstsq

    return lambda v, b: sparse_generic_lstsq(lower(v), b), (rand(5), rand(3, seed=1))


# -- images ---------------------------------------------------------------------------------------


@case("kornia", "BinaryFocalLoss")
def _() -> Made:
    from kornia.losses import focal_loss

    labels = torch.tensor([[0, 1, 2], [2, 2, 1]])
    return lambda x: focal_loss(x, labels, alpha=0.5), (rand(2, 4, 3),)


@case("kornia", "null space of the five point method")
def _() -> Made:
    from kornia.geometry.epipolar.essential import _NullSpaceBasis

    def f(x: torch.Tensor) -> torch.Tensor:
        basis = _NullSpaceBasis.apply(x)[0]
        return basis @ basis.mT  # the subspace; a basis of it is up to the library

    return f, (rand(1, 5, 9),)


@case("kornia", "warp_perspective")
def _() -> Made:
    from kornia.geometry.transform import warp_perspective

    eye = torch.eye(3, dtype=D)[None]
    return lambda x, m: warp_perspective(x, eye + 0.01 * m, (4, 4)), (
        rand(1, 1, 5, 5),
        rand(1, 3, 3, seed=1),
    )


# -- e3nn -----------------------------------------------------------------------------------------


@case("e3nn", "soft_unit_step")
def _() -> Made:
    from e3nn.math import soft_unit_step

    return lambda x: soft_unit_step(x) * x, (rand(6),)


@case("e3nn", "FullyConnectedTensorProduct")
def _() -> Made:
    from e3nn import o3

    torch.manual_seed(0)
    product = o3.FullyConnectedTensorProduct("2x0e+1x1o", "1x0e+1x1o", "1x0e+1x1o").to(D)
    return lambda x, y: product(x, y), (rand(2, 5), rand(2, 4, seed=1))


# -- layers that solve problems -------------------------------------------------------------------


@case("cvxpylayers", "CvxpyLayer")
def _() -> Made:
    import cvxpy
    from cvxpylayers.torch import CvxpyLayer

    x = cvxpy.Variable(2)
    a, b = cvxpy.Parameter((3, 2)), cvxpy.Parameter(3)
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(a @ x - b)), [x >= -5])
    layer = CvxpyLayer(problem, parameters=[a, b], variables=[x])
    return lambda a, b: layer(a, b, solver_args={"eps": 1e-12})[0], (rand(3, 2), rand(3, seed=1))


@case("osqp", "OSQP layer")
def _() -> Made:
    import numpy as np
    from osqp.nn.torch import OSQP

    eye = (np.arange(2), np.arange(2))
    layer = OSQP(eye, (2, 2), eye, (2, 2), eps_rel=1e-10, eps_abs=1e-10)
    bound = torch.ones(2, dtype=D)
    return lambda p, q: layer(p.exp(), q, torch.ones(2, dtype=D), -3 * bound, 3 * bound), (
        rand(2),
        rand(2, seed=1),
    )
