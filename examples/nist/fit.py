"""Fit a problem with SciPy, fed by `linearize`.

Every problem and every start goes the same way, without hand tuning:

1. `scipy.optimize.least_squares`, trust-region reflective, variables scaled by the columns of
   the Jacobian, tolerances at machine precision. The Jacobian's p columns are J·v products.
2. `scipy.optimize.root` (MINPACK's hybrid method) solves Jᵀr = 0 from there, which is one
   Jᵀ·u product per point. A sum of squares is flat at its minimum, so a solver that watches it
   cannot place the parameters to better than about half of the digits; the gradient passes
   through zero at full slope and places them to nearly all. The result is kept if the gradient
   has become smaller and the sum of squares has not grown beyond rounding.

SciPy asks for the residual, the Jacobian and the gradient in separate calls, each time with an
array of its own. `linearize.scipy.VectorFunction` recognizes the point by its numbers, so all of
them come from one run of the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import least_squares, root

from linearize.scipy import VectorFunction

from .data import Problem
from .models import MODELS

__all__ = ["LRE_MAX", "LRE_SOLVED", "Counts", "Fit", "Objective", "fit", "log_relative_error"]

Array = NDArray[np.float64]

LRE_MAX = 11.0
"""Digits that are certified; agreement beyond them cannot be measured."""

LRE_SOLVED = 4.0
"""A run counts as solved from this many correct digits on."""

_EPS = float(np.finfo(np.float64).eps)
_MAX_RESIDUALS = 1000
_MAX_GRADIENTS = 200
_ROUNDING = 1e-6


@dataclass
class Counts:
    """What one run cost.

    Attributes
    ----------
    requests
        Times that the solvers asked for a residual, a Jacobian or a gradient.
    runs
        Times that the model ran, counted inside it.
    jvps, vjps
        Products with the Jacobian and with its transpose.
    """

    requests: int = 0
    runs: int = 0
    jvps: int = 0
    vjps: int = 0


@dataclass(frozen=True)
class Fit:
    """The outcome of one problem from one start.

    Attributes
    ----------
    problem
        What was fitted.
    start
        1 (far) or 2 (near).
    parameters
        Estimates, shape (p,).
    rss
        Residual sum of squares there, in squared units of y.
    trust_region_steps, gradient_steps
        Iterations of the two stages, rejected ones included.
    lre, trust_region_lre
        Correct digits of the worst parameter, at the end and before the second stage.
    counts
        What it cost.
    points
        Distinct points at which anything was asked for, told apart by their bytes.
    """

    problem: Problem
    start: int
    parameters: Array
    rss: float
    trust_region_steps: int
    gradient_steps: int
    lre: float
    trust_region_lre: float
    counts: Counts
    points: int

    @property
    def solved(self) -> bool:
        """Whether at least four digits of every parameter are right."""
        return self.lre >= LRE_SOLVED


class Objective:
    """Residual, Jacobian and gradient of one problem, counted.

    Use it as a context manager: what is kept for its points is released at the end.
    """

    def __init__(self, problem: Problem) -> None:
        self._predict = MODELS[problem.name].predict
        self._x = torch.from_numpy(problem.x)
        self._y = torch.from_numpy(problem.y)
        self._function = VectorFunction(
            self._model,
            torch.from_numpy(problem.starts[0]),
            maxsize=_MAX_RESIDUALS + _MAX_GRADIENTS,
        )
        self._visited: set[bytes] = set()
        self.counts = Counts()

    @property
    def points(self) -> int:
        """Number of distinct points asked for so far."""
        return len(self._visited)

    def _model(self, b: torch.Tensor) -> torch.Tensor:
        self.counts.runs += 1
        return self._predict(b, self._x) - self._y

    def _note(self, b: Array) -> Array:
        self.counts.requests += 1
        self._visited.add(b.tobytes())
        return b

    def residual(self, b: Array) -> Array:
        """Return r(b) = model - data, shape (m,)."""
        return self._function.fun(self._note(b))

    def jacobian(self, b: Array) -> Array:
        """Return J(b), shape (m, p), from p products J·v."""
        matrix: Array = self._function.jac(self._note(b))
        self.counts.jvps += matrix.shape[1]
        return matrix

    def gradient(self, b: Array) -> Array:
        """Return Jᵀr, shape (p,): half the gradient of the sum of squares, one Jᵀ·u product."""
        self.counts.vjps += 1
        return self._function.gradient(self._note(b))

    def __enter__(self) -> Objective:
        return self

    def __exit__(self, *exception: object) -> None:
        self._function.linearizer.close()


def fit(problem: Problem, start: int) -> Fit:
    """Fit one problem from one of its two starting points.

    Parameters
    ----------
    problem
        The problem; its certified values serve only to measure the result.
    start
        1 or 2.
    """
    # Trial steps may overflow; the solvers see inf or nan there and step back.
    with Objective(problem) as objective, np.errstate(over="ignore", invalid="ignore"):
        first = least_squares(
            objective.residual,
            problem.starts[start - 1],
            objective.jacobian,
            method="trf",
            x_scale="jac",
            ftol=_EPS,
            xtol=_EPS,
            gtol=_EPS,
            max_nfev=_MAX_RESIDUALS,
        )
        b, gradient_steps = _refine(objective, first.x)
        residual = objective.residual(b)
        return Fit(
            problem=problem,
            start=start,
            parameters=b,
            rss=float(residual @ residual),
            trust_region_steps=first.nfev - 1,
            gradient_steps=gradient_steps,
            lre=log_relative_error(b, problem.certified),
            trust_region_lre=log_relative_error(first.x, problem.certified),
            counts=objective.counts,
            points=objective.points,
        )


def _refine(objective: Objective, b: Array) -> tuple[Array, int]:
    """Solve Jᵀr = 0 from b; return the better of the two points and the number of steps."""
    scale: Array = np.linalg.norm(objective.jacobian(b), axis=0)
    if not (np.isfinite(scale).all() and scale.all()):
        return b, 0

    def gradient(c: Array) -> Array:
        scaled: Array = objective.gradient(c) / scale
        return scaled

    def gauss_newton_matrix(c: Array) -> Array:
        jacobian = objective.jacobian(c)
        matrix: Array = jacobian.T @ jacobian / scale[:, None]
        return matrix

    second = root(
        gradient,
        b,
        jac=gauss_newton_matrix,
        method="hybr",
        options={"xtol": _EPS, "maxfev": _MAX_GRADIENTS, "diag": scale},
    )
    before, after = objective.residual(b), objective.residual(second.x)
    smaller_gradient = np.linalg.norm(second.fun) < np.linalg.norm(gradient(b))
    no_larger_sum = after @ after <= (1.0 + _ROUNDING) * (before @ before)
    refined: Array = second.x if smaller_gradient and no_larger_sum else b
    return refined, second.nfev - 1


def log_relative_error(estimate: Array, certified: Array) -> float:
    """Return the correct leading digits of the worst parameter, from 0 to `LRE_MAX`."""
    error = np.abs(estimate - certified) / np.abs(certified)
    if not np.isfinite(error).all():
        return 0.0
    worst = max(float(error.max()), 10.0**-LRE_MAX)
    return max(0.0, float(-np.log10(worst)))
