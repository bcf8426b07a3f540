"""A sparse Jacobian for BDF: the Brusselator in one dimension.

Hairer and Wanner, "Solving Ordinary Differential Equations II", section IV.1; the two substances
of each place stand side by side.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import scipy.sparse
import torch
from scipy.integrate import solve_ivp
from torch.func import jacfwd

import linearize as lz
import linearize.scipy

from .job import Counted, Job

END = 2.0
OPTIONS = {"method": "BDF", "rtol": 1e-6, "atol": 1e-8}


@dataclasses.dataclass
class Problem:
    f: Counted
    start: Any
    known: list[Any] = dataclasses.field(default_factory=list)


def make(quick: bool) -> Problem:
    n = 20 if quick else 400
    x = np.arange(1, n + 1) / (n + 1)
    ends = torch.tensor([[1.0, 3.0]], dtype=torch.float64)

    def f(y: torch.Tensor) -> torch.Tensor:
        both = y.view(-1, 2)
        u, v = both.unbind(1)
        react = torch.stack([1 + u * u * v - 4 * u, 3 * u - u * u * v], 1)
        padded = torch.cat([ends, both, ends])
        spread = (padded[2:] - 2 * both + padded[:-2]) * ((n + 1) ** 2 / 50)
        return (react + spread).reshape(-1)

    start = np.stack([1 + np.sin(2 * np.pi * x), np.full(n, 3.0)], 1).ravel()
    return Problem(Counted(f), start)


def by_linearize(problem: Problem) -> Any:
    p = lz.scipy.VectorFunction(problem.f, problem.start, jac="sparse")
    fun, jac = lambda t, y: p.fun(y), lambda t, y: p.jac(y)
    return solve_ivp(fun, (0, END), p.x0, jac=jac, **OPTIONS).y[:, -1]


def by_scipy(problem: Problem) -> Any:
    n = len(problem.start)
    near = np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
    places = np.arange(n) // 2
    same = np.equal.outer(places, places)
    pattern = scipy.sparse.csr_matrix(same | (near == 2))
    fun = lambda t, y: problem.f(torch.from_numpy(y)).numpy()  # noqa: E731
    return solve_ivp(fun, (0, END), problem.start, jac_sparsity=pattern, **OPTIONS).y[:, -1]


def by_torch(problem: Problem) -> Any:
    derivative = jacfwd(problem.f)
    fun = lambda t, y: problem.f(torch.from_numpy(y)).numpy()  # noqa: E731
    jac = lambda t, y: scipy.sparse.csr_matrix(derivative(torch.from_numpy(y)).numpy())  # noqa: E731
    return solve_ivp(fun, (0, END), problem.start, jac=jac, **OPTIONS).y[:, -1]


def error(problem: Problem, found: Any) -> float:
    """Compare with another method, at tighter tolerances, on the equations in NumPy."""
    if not problem.known:
        n = len(problem.start) // 2
        ends = np.array([[1.0, 3.0]])

        def fun(t: float, y: Any) -> Any:
            both = y.reshape(-1, 2)
            u, v = both.T
            padded = np.concatenate([ends, both, ends])
            spread = (padded[2:] - 2 * both + padded[:-2]) * ((n + 1) ** 2 / 50)
            return (np.stack([1 + u * u * v - 4 * u, 3 * u - u * u * v], 1) + spread).ravel()

        near = scipy.sparse.diags_array(
            [np.ones(2 * n - abs(k)) for k in range(-3, 4)], offsets=range(-3, 4)
        )
        options = {"method": "Radau", "rtol": 1e-8, "atol": 1e-10, "jac_sparsity": near}
        problem.known.append(solve_ivp(fun, (0, END), problem.start, **options).y[:, -1])
    return float(np.abs(found / problem.known[0] - 1).max())


JOB = Job(
    "A sparse Jacobian for BDF",
    make,
    error,
    1e-4,
    {"linearize": by_linearize, "SciPy alone": by_scipy, "torch.func": by_torch},
)
