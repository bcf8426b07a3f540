"""Levenberg–Marquardt whose linear systems are solved by preconditioned conjugate gradients.

The solver knows the residuals by their values and by the products with their Jacobian. Three
engines give these products; the steps are the same with each.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import scipy.sparse.linalg
import torch
from numpy.typing import NDArray

import linearize as lz
import linearize.scipy

from .data import Scene

__all__ = ["ENGINES", "Fit", "Point", "adjust"]

Array = NDArray[np.float64]
Parameters = dict[str, torch.Tensor]
Residual = Callable[[Parameters], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Point:
    """The residuals at a point and the products with their Jacobian, of flat arrays.

    Attributes
    ----------
    value
        r
    gram
        v ↦ JᵀJ·v
    pull
        u ↦ Jᵀ·u
    columns
        V ↦ J·V, of several vectors
    """

    value: Array
    gram: Callable[[Array], Array]
    pull: Callable[[Array], Array]
    columns: Callable[[Array], Array]


class Engine(Protocol):
    """Makes points."""

    def __call__(self, f: Residual, start: Parameters) -> Callable[[Array], Point]: ...


def by_linearize(f: Residual, start: Parameters) -> Callable[[Array], Point]:
    """One run of f for each point."""
    function = lz.scipy.VectorFunction(f, start, jac="operator")

    def at(x: Array) -> Point:
        J = function.at(x).jacobian
        A = lz.scipy.aslinearoperator(J)
        gram = lz.scipy.aslinearoperator(J.gram())
        return Point(function.fun(x), gram.matvec, A.rmatvec, A.matmat)

    return at


def _flat(f: Residual, start: Parameters) -> Callable[[torch.Tensor], torch.Tensor]:
    def g(x: torch.Tensor) -> torch.Tensor:
        pieces = x.split([t.numel() for t in start.values()])
        named = zip(start.items(), pieces, strict=True)
        return f({name: piece.view_as(t) for (name, t), piece in named}).flatten()

    return g


def by_func_jvp(f: Residual, start: Parameters) -> Callable[[Array], Point]:
    """`torch.func.jvp` for each J·v, which runs f; `torch.func.vjp` once for each point."""
    g = _flat(f, start)

    def at(x: Array) -> Point:
        primal = torch.from_numpy(x)
        value, vjp = torch.func.vjp(g, primal)

        def push(v: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = torch.func.jvp(g, (primal,), (v,))[1]
            return result

        return _point(value, push, lambda u: vjp(u)[0])

    return at


def by_func_linearize(f: Residual, start: Parameters) -> Callable[[Array], Point]:
    """`torch.func.linearize` and `torch.func.vjp`, each once for each point."""
    g = _flat(f, start)

    def at(x: Array) -> Point:
        primal = torch.from_numpy(x)
        value, vjp = torch.func.vjp(g, primal)
        push: list[Any] = []  # made when first needed: a rejected step needs none

        def pushed(v: torch.Tensor) -> torch.Tensor:
            if not push:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of torch.fx, about its own work
                    push.append(torch.func.linearize(g, primal)[1])
            result: torch.Tensor = push[0](v)
            return result

        return _point(value, pushed, lambda u: vjp(u)[0])

    return at


def _point(value: torch.Tensor, push: Callable[..., Any], pull: Callable[..., Any]) -> Point:
    return Point(
        value.detach().numpy(),
        lambda v: pull(push(torch.from_numpy(v))).numpy(),
        lambda u: pull(torch.from_numpy(u)).numpy(),
        lambda V: torch.stack([push(v) for v in torch.from_numpy(V.T.copy())], 1).numpy(),
    )


ENGINES: dict[str, Engine] = {
    "linearize": by_linearize,
    "torch.func.jvp": by_func_jvp,
    "torch.func.linearize": by_func_linearize,
}


@dataclasses.dataclass
class Fit:
    """What came out, and what it took."""

    parameters: Array
    errors: list[float]
    """Root of the mean squared distance in pixels: at the start, then after each step."""
    iterations: int
    runs: int
    products: int
    """Products with JᵀJ."""
    seconds: float


def adjust(
    f: Residual,
    scene: Scene,
    start: Parameters,
    engine: Engine,
    *,
    max_iterations: int = 50,
    progress: Callable[[float], None] = lambda error: None,
) -> Fit:
    """Minimize half the sum of squared residuals.

    The damping follows Nielsen ("Damping parameter in Marquardt's method", 1999), scaled by the
    diagonal of JᵀJ. Stops when a step takes off less than a millionth of the sum.
    """
    runs, products = 0, 0

    def counted(parameters: Parameters) -> torch.Tensor:
        nonlocal runs
        runs += 1
        return f(parameters)

    began = time.process_time()
    at = engine(counted, start)
    x = torch.cat([t.flatten() for t in start.values()]).numpy()
    here = at(x)
    cost = 0.5 * float(here.value @ here.value)
    errors = [float(np.sqrt(2 * cost / len(scene.xy)))]
    damping, growth, iterations = 1e-4, 2.0, 0
    blocks = _diagonal_blocks(here, scene, start)
    while iterations < max_iterations:
        iterations += 1
        gradient = here.pull(here.value)
        weights = damping * np.concatenate(
            [np.einsum("nii->ni", b).clip(1e-8).ravel() for b in blocks]
        )
        point, shift = here, weights

        def damped(v: Array, point: Point = point, shift: Array = shift) -> Array:
            nonlocal products
            products += 1
            return point.gram(v) + shift * v

        n = len(x)
        A = scipy.sparse.linalg.LinearOperator((n, n), matvec=damped, dtype=float)
        M = _block_jacobi(blocks, weights)
        step, _ = scipy.sparse.linalg.cg(A, -gradient, rtol=1e-2, maxiter=200, M=M)
        there = at(x + step)
        trial = 0.5 * float(there.value @ there.value)
        gain = (cost - trial) / (0.5 * step @ (weights * step - gradient))
        if gain > 0:
            done = cost - trial < 1e-6 * cost
            x, here, cost = x + step, there, trial
            damping *= max(1 / 3, 1 - (2 * gain - 1) ** 3)
            growth = 2.0
            errors.append(float(np.sqrt(2 * cost / len(scene.xy))))
            progress(errors[-1])
            if done:
                break
            blocks = _diagonal_blocks(here, scene, start)
        else:
            damping, growth = damping * growth, growth * 2
    return Fit(x, errors, iterations, runs, products, time.process_time() - began)


def _diagonal_blocks(here: Point, scene: Scene, start: Parameters) -> list[Array]:
    """Return the 3 x 3 blocks on the diagonal of JᵀJ: for each rotation, shift and point.

    A marker depends on one camera and one point. So the product with a vector that has ones at
    the first coordinate of all points, say, holds every marker's derivative by that coordinate
    of its own point: nine products give all the blocks.
    """
    counts = [len(t) for t in start.values()]
    units = np.zeros((sum(counts) * 3, 9))
    first = 0
    for k, count in enumerate(counts):
        for i in range(3):
            units[first + i : first + 3 * count : 3, 3 * k + i] = 1
        first += 3 * count
    derivatives = here.columns(units).reshape(-1, 2, 9)
    blocks = []
    for k, (count, where) in enumerate(
        zip(counts, (scene.camera, scene.camera, scene.point), strict=True)
    ):
        part = derivatives[:, :, 3 * k : 3 * k + 3]
        block = np.zeros((count, 3, 3))
        np.add.at(block, where, part.swapaxes(1, 2) @ part)
        blocks.append(block)
    return blocks


def _block_jacobi(blocks: list[Array], weights: Array) -> Any:
    """Return the inverse of the damped blocks, as an operator."""
    stacked = np.concatenate(blocks)
    inverse = np.linalg.inv(stacked + weights.reshape(-1, 3, 1) * np.eye(3))
    n = 3 * len(inverse)
    apply = lambda v: (inverse @ v.reshape(-1, 3, 1)).ravel()  # noqa: E731
    return scipy.sparse.linalg.LinearOperator((n, n), matvec=apply, dtype=float)
