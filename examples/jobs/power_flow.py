"""A sparse Jacobian of complex equations: the power flow of the IEEE 14-bus system.

Voltages V and admittances Y give the power V·conj(Y·V) that each bus takes from the network, which
is prescribed; generators prescribe |V| instead of the reactive power. Copies of the network, each
tied to the next by a line, make it larger.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import scipy.sparse
import torch
from scipy.optimize import root
from scipy.sparse.linalg import spsolve
from torch.func import jacfwd

import linearize as lz
import linearize.scipy

from .job import Counted, Job

#: From, to, resistance, reactance, charging, and the ratio of the transformer.
BRANCHES = np.array(
    [
        (1, 2, 0.01938, 0.05917, 0.0528, 1),
        (1, 5, 0.05403, 0.22304, 0.0492, 1),
        (2, 3, 0.04699, 0.19797, 0.0438, 1),
        (2, 4, 0.05811, 0.17632, 0.034, 1),
        (2, 5, 0.05695, 0.17388, 0.0346, 1),
        (3, 4, 0.06701, 0.17103, 0.0128, 1),
        (4, 5, 0.01335, 0.04211, 0, 1),
        (4, 7, 0, 0.20912, 0, 0.978),
        (4, 9, 0, 0.55618, 0, 0.969),
        (5, 6, 0, 0.25202, 0, 0.932),
        (6, 11, 0.09498, 0.1989, 0, 1),
        (6, 12, 0.12291, 0.25581, 0, 1),
        (6, 13, 0.06615, 0.13027, 0, 1),
        (7, 8, 0, 0.17615, 0, 1),
        (7, 9, 0, 0.11001, 0, 1),
        (9, 10, 0.03181, 0.0845, 0, 1),
        (9, 14, 0.12711, 0.27038, 0, 1),
        (10, 11, 0.08205, 0.19207, 0, 1),
        (12, 13, 0.22092, 0.19988, 0, 1),
        (13, 14, 0.17093, 0.34802, 0, 1),
    ]
)
#: What each bus takes, in MW and Mvar; what generators give; their voltages, 0 for the others.
LOAD = [0, 21.7, 94.2, 47.8, 7.6, 11.2, 0, 0, 29.5, 9, 3.5, 6.1, 13.5, 14.9]
REACTIVE = [0, 12.7, 19, -3.9, 1.6, 7.5, 0, 0, 16.6, 5.8, 1.8, 1.6, 5.8, 5]
GIVEN = [232.4, 40, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
HELD = [1.06, 1.045, 1.01, 0, 0, 1.07, 0, 1.09, 0, 0, 0, 0, 0, 0]
#: The solution as it is published with the data: magnitudes, and angles in degrees.
MAGNITUDES = [
    1.06,
    1.045,
    1.01,
    1.019,
    1.02,
    1.07,
    1.062,
    1.09,
    1.056,
    1.051,
    1.057,
    1.055,
    1.05,
    1.036,
]
ANGLES = [
    0,
    -4.98,
    -12.72,
    -10.33,
    -8.78,
    -14.22,
    -13.37,
    -13.36,
    -14.94,
    -15.1,
    -14.79,
    -15.07,
    -15.16,
    -16.04,
]


def admittances(copies: int) -> Any:
    """Return Y. Copies are tied to the next by a weak line between their fourteenth buses."""
    n = 14 * copies
    Y = scipy.sparse.lil_matrix((n, n), dtype=complex)
    for k in range(copies):
        branches = BRANCHES + np.array((14 * k, 14 * k, 0, 0, 0, 0))
        if k:
            branches = np.vstack([branches, (14 * k, 14 * k + 14, 0.2, 0.4, 0, 1)])
        for a, b, r, x, charging, ratio in branches:
            i, j, y = int(a) - 1, int(b) - 1, 1 / complex(r, x)
            Y[i, i] += (y + 0.5j * charging) / ratio**2
            Y[j, j] += y + 0.5j * charging
            Y[i, j] -= y / ratio
            Y[j, i] -= y / ratio
        Y[14 * k + 8, 14 * k + 8] += 0.19j
    return Y.tocsr()


@dataclasses.dataclass
class Problem:
    f: Counted
    start: torch.Tensor
    copies: int


def make(quick: bool) -> Problem:
    copies = 1 if quick else 12
    Y = admittances(copies).tocoo()
    n = Y.shape[0]
    row, column = torch.from_numpy(Y.row).long(), torch.from_numpy(Y.col).long()
    entries = torch.from_numpy(Y.data)
    held = torch.tensor(HELD, dtype=torch.float64).repeat(copies)
    given = np.array(GIVEN) - LOAD - 1j * np.array(REACTIVE)
    wanted = torch.from_numpy(given / 100).repeat(copies)
    slack = (torch.arange(n) % 14) == 0

    def f(V: torch.Tensor) -> torch.Tensor:
        current = torch.zeros_like(V).index_add(0, row, entries * V[column])
        power = V * current.conj() - wanted
        size = torch.where(held > 0, V.abs().square() - held**2, power.imag)
        return torch.where(slack, V - held, torch.complex(power.real, size))

    start = torch.where(held > 0, held, torch.ones(n, dtype=torch.float64)).to(torch.complex128)
    return Problem(Counted(f), start, copies)


def by_linearize(problem: Problem) -> Any:
    p = lz.scipy.VectorFunction(problem.f, problem.start, jac="sparse")
    x = p.x0
    while np.abs(p.fun(x)).max() > 1e-10:
        x = x - spsolve(p.jac(x).tocsc(), p.fun(x))
    return x.view(complex)


def by_torch(problem: Problem) -> Any:
    def real(x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(problem.f(torch.view_as_complex(x.view(-1, 2)))).reshape(-1)

    x = torch.view_as_real(problem.start).reshape(-1)
    while (r := real(x)).abs().max() > 1e-10:
        x = x - torch.linalg.solve(jacfwd(real)(x), r)
    return x.numpy().view(complex)


def by_scipy(problem: Problem) -> Any:
    fun = lambda x: problem.f(torch.from_numpy(x.view(complex))).numpy().view(float)  # noqa: E731
    return root(fun, problem.start.numpy().view(float), tol=1e-10).x.view(complex)


def error(problem: Problem, V: Any) -> float:
    """Compare with the published solution where it is known, and insert it into the equations."""
    if problem.copies == 1:
        known = MAGNITUDES * np.exp(1j * np.deg2rad(ANGLES))
        off = np.abs(V - known).max()
        if off > 2e-3:
            return float(off)
    Y = admittances(problem.copies)
    power = V * (Y @ V).conj() * 100
    held = np.array(HELD * problem.copies)
    active = (power.real - np.tile(np.subtract(GIVEN, LOAD), problem.copies))[held != 1.06]
    reactive = (power.imag + np.tile(REACTIVE, problem.copies))[held == 0]
    size = (np.abs(V) - held)[held > 0]
    return float(max(np.abs(p).max() for p in (active, reactive, size)))


JOB = Job(
    "A sparse Jacobian of complex equations",
    make,
    error,
    1e-6,
    {"linearize": by_linearize, "torch.func": by_torch, "SciPy alone": by_scipy},
)
