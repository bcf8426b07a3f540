"""What users write around the products: checked by type checkers, and run."""

from collections.abc import Callable, Iterator
from typing import Any, assert_type

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
from numpy.typing import NDArray

import linearize as lz
from linearize.operators import Estimate, LinearOperator, Space

here = lz.Linearizer(torch.sin).at(torch.zeros(3))
J = here.jacobian
v = torch.ones(3)
assert_type(J @ v, torch.Tensor)
assert_type(v @ J, torch.Tensor)
assert_type(J @ J.H, lz.operators.LinearOperator)
assert_type(J.gram(), lz.operators.LinearOperator)
assert_type(J.gram() + 0.1 * lz.operators.identity(J.in_space), lz.operators.LinearOperator)
assert_type(J.gram().damped(0.1)[:, :].as_real(), lz.operators.LinearOperator)
assert_type(J.adjoint(), lz.operators.LinearOperator)
assert_type(J.shape, tuple[int, int])
assert_type(J.materialize(), torch.Tensor)
assert_type(J.diagonal(), torch.Tensor)
assert_type(J.trace(samples=10), lz.operators.Estimate)
assert_type(J.trace(samples=10).error, torch.Tensor)
assert_type(here.vjp_fn(v), tuple[Any, ...])
assert_type(here.in_space.ravel(v), torch.Tensor)
assert_type(here.out_space.dot(v, v), torch.Tensor)
assert_type(lz.solvers.gmres(J, v), torch.Tensor)
assert_type(lz.operators.inverse(J) @ v, torch.Tensor)
net = torch.nn.Linear(2, 2)
G = lz.curvature.gauss_newton(net, "mse", [(torch.ones(1, 2), torch.ones(1, 2))])
assert_type(G, lz.curvature.Curvature)
assert_type(G.flat_gradient, torch.Tensor)
assert_type(lz.scipy.aslinearoperator(J), scipy.sparse.linalg.LinearOperator)
assert_type(J.to_scipy(), scipy.sparse.linalg.LinearOperator)
p = lz.scipy.VectorFunction(torch.sin, [1.0])
assert_type(p.x0, NDArray[Any])
assert_type(p.fun(p.x0), NDArray[Any])
assert_type(lz.scipy.ScalarFunction(torch.sum, [1.0]).fun(np.ones(1)), float)

assert_type(lz.operators.vertical(J, 2 * J) @ v, torch.Tensor)
assert_type(J.columns(), Iterator[tuple[int, list[torch.Tensor]]])
assert_type(J.diagonal(samples=3), Estimate)

# Matrices come in the form that was asked for.
sparse = lz.scipy.VectorFunction(torch.sin, [1.0], jac="sparse")
assert_type(p.jac(p.x0), NDArray[Any])
assert_type(sparse.jac(p.x0), scipy.sparse.csr_matrix)
assert_type(sparse.hess(p.x0, p.x0), scipy.sparse.csr_matrix)
products = lz.scipy.VectorFunction(torch.sin, [1.0], jac="operator")
assert_type(products.jac(p.x0), scipy.sparse.linalg.LinearOperator)
energy = lz.scipy.ScalarFunction(torch.sum, [1.0])
assert_type(energy.hess(p.x0), scipy.sparse.linalg.LinearOperator)
assert_type(energy.hessp(p.x0, p.x0), NDArray[Any])
assert_type(lz.scipy.ScalarFunction(torch.sum, [1.0], hess="dense").hess(p.x0), NDArray[Any])
assert_type(p.at(p.x0), lz.Linearization)
assert_type(lz.sparse.jacobian(here), torch.Tensor)
assert_type(lz.sparse.jacobian(here, layout="csr"), torch.Tensor)
assert_type(lz.sparse.jacobian(J.gram(), layout="scipy"), scipy.sparse.csr_array)
assert_type(lz.sparse.pattern(here), scipy.sparse.csr_array)
assert_type(lz.sparse.explain(J), str)


# Solutions are structured like the start.
def off(x: dict[str, torch.Tensor]) -> torch.Tensor:
    return (x["a"] - 1).square().sum()


assert_type(lz.implicit.root(torch.sin, 0 * v), torch.Tensor)
assert_type(lz.implicit.minimum(off, {"a": v}), dict[str, torch.Tensor])
assert_type(G["weight", "bias"], LinearOperator)
assert_type(G @ torch.ones(6), torch.Tensor)


def conjugate_gradients(A: LinearOperator, b: torch.Tensor, steps: int) -> torch.Tensor:
    x, r = torch.zeros_like(b), b
    p, size = r, r @ r
    for _ in range(steps):
        Ap = A @ p
        length = size / (p @ Ap)
        x, r = x + length * p, r - length * Ap
        size, before = r @ r, size
        p = r + size / before * p
    return x


def levenberg_marquardt(x: torch.Tensor) -> torch.Tensor:
    lin = lz.Linearizer(torch.sin, match="value")
    for _ in range(3):
        at = lin.at(x)
        (gradient,) = at.vjp_fn(at.value)
        J = at.jacobian
        x = x - conjugate_gradients(J.gram().damped(0.1 * J.gram().diagonal()), gradient, 5)
    return x


assert_type(levenberg_marquardt(v), torch.Tensor)


class Layer(torch.nn.Module):
    """A deep equilibrium layer."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(size) / 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def residual(z: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return z - torch.tanh(z @ weight + x)

        z, lin = torch.zeros_like(x), lz.Linearizer(residual, argnums=0)
        for _ in range(5):
            at = lin.at(z, self.weight)
            step = lz.solvers.gmres(at.jacobian, at.out_space.ravel(at.value))
            z = z - at.jacobian.in_space.unravel(step)
        return lz.implicit.root(residual, z, self.weight)


def preconditioner(A: LinearOperator) -> Callable[[torch.Tensor], torch.Tensor]:
    diagonal = A.diagonal()
    return lambda r: r / diagonal


def flat_norm(space: Space, element: dict[str, torch.Tensor]) -> float:
    return float(space.norm(element)) + float(space.ravel(element).abs().max())


def stiff(y: NDArray[Any]) -> scipy.sparse.csr_matrix:
    problem = lz.scipy.VectorFunction(lambda y: y - y * y, y, jac="sparse")
    return problem.jac(problem.x0)


def gauss_newton_step(r: Callable[[torch.Tensor], torch.Tensor], x: NDArray[Any]) -> NDArray[Any]:
    problem = lz.scipy.VectorFunction(r, x, jac="dense")
    A = problem.jac(x)
    return np.linalg.solve(A.T @ A, -problem.gradient(x))


def trace_of(A: LinearOperator) -> tuple[float, float]:
    found = A.trace(samples=8, generator=torch.Generator().manual_seed(0))
    return float(found.value), float(found.error)


def step(net: torch.nn.Module, data: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    G = lz.curvature.gauss_newton(net, "mse", data)
    return lz.operators.inverse(G.damped(1e-3)) @ -G.flat_gradient


assert_type(Layer(3)(v), Any)
assert_type(preconditioner(J)(v), torch.Tensor)
assert_type(gauss_newton_step(torch.sin, np.ones(3)), NDArray[Any])
assert_type(stiff(np.ones(3)), scipy.sparse.csr_matrix)
assert_type(flat_norm(G.in_space, {"weight": torch.ones(2, 2), "bias": torch.ones(2)}), float)
assert_type(trace_of(J), tuple[float, float])
assert_type(step(net, [(torch.ones(8, 2), torch.ones(8, 2))]), torch.Tensor)
