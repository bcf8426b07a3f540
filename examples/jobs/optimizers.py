"""SciPy's optimizers: logistic regression by `trust-krylov`.

Wisconsin's breast cancer data, which come with scikit-learn; each measurement is scaled to mean 0
and deviation 1. With differences of f, SciPy has no Hessian products, and BFGS takes their place.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression

import linearize as lz
import linearize.scipy

from .job import Counted, Job


@dataclasses.dataclass
class Problem:
    f: Counted
    X: Any
    y: Any


def make(quick: bool) -> Problem:
    X, y = load_breast_cancer(return_X_y=True)
    X = (X - X.mean(0)) / X.std(0)
    X, y = (X[:, :5], y) if quick else (X, y)
    inputs, labels = torch.from_numpy(X), torch.from_numpy(2.0 * y - 1)

    def f(w: torch.Tensor) -> torch.Tensor:
        fit = torch.nn.functional.softplus(-labels * (inputs @ w)).sum()
        return fit + 0.5 * (w * w).sum()

    return Problem(Counted(f), X, y)


def by_linearize(problem: Problem) -> Any:
    p = lz.scipy.ScalarFunction(problem.f, np.zeros(problem.X.shape[1]))
    return minimize(p.fun, p.x0, jac=p.jac, hessp=p.hessp, method="trust-krylov").x


def by_torch(problem: Problem) -> Any:
    f = problem.f
    gradient = torch.func.grad(f)
    return minimize(
        lambda w: f(torch.from_numpy(w)).item(),
        np.zeros(problem.X.shape[1]),
        jac=lambda w: gradient(torch.from_numpy(w)).numpy(),
        hessp=lambda w, v: torch.func.jvp(
            gradient, (torch.from_numpy(w),), (torch.from_numpy(v),)
        )[1].numpy(),
        method="trust-krylov",
    ).x


def by_scipy(problem: Problem) -> Any:
    fun = lambda w: problem.f(torch.from_numpy(w)).item()  # noqa: E731
    return minimize(fun, np.zeros(problem.X.shape[1]), method="BFGS").x


def error(problem: Problem, found: Any) -> float:
    """Compare with scikit-learn's own solver."""
    model = LogisticRegression(fit_intercept=False, solver="newton-cholesky", tol=1e-12)
    known = model.fit(problem.X, problem.y).coef_[0]
    return float(np.abs(found - known).max())


JOB = Job(
    "SciPy's optimizers",
    make,
    error,
    1e-4,
    {"linearize": by_linearize, "torch.func": by_torch, "SciPy alone": by_scipy},
    loose={"SciPy alone": 1e-3},
)
