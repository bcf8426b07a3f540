"""SciPy's BDF on the Brusselator: with sparse Jacobians of this package, and with its own ones.

    python -m benchmarks.stiff                # 800 equations
    python -m benchmarks.stiff --equations 4000 --repeat 3

SciPy forms finite differences of the right-hand side, coloured by the pattern that it is told;
this package finds the pattern, and computes the entries exactly. Both get the same right-hand
side, once written in PyTorch and once in NumPy (of which the Jacobian is still taken by PyTorch).
The solvers take turns in one process with one thread, and processor time is taken; the least of
each is shown. "first" is the first solve, in which the pattern is found and programs are recorded;
at "later" ones the function is known. What the first one takes more does not grow with the
equations: the graph is recorded, its two programs are held against each other, pattern and colours
are found, and the program is simplified. With 800 equations SciPy's eight Jacobians take less than
that, from about 2,000 on they take more.

The Brusselator with diffusion is the stiff problem of E. Hairer, G. Wanner, "Solving Ordinary
Differential Equations II", section IV.1.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import Any

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import numpy as np  # noqa: E402
import scipy.sparse as sp  # noqa: E402
import torch  # noqa: E402
from scipy.integrate import solve_ivp  # noqa: E402

import linearize as lz  # noqa: E402
import linearize.scipy  # noqa: E402

A, B, DIFFUSION = 1.0, 3.0, 1 / 50


def brusselator(y: torch.Tensor) -> torch.Tensor:
    """The right-hand side, in PyTorch."""
    u, v = y.chunk(2)
    c = DIFFUSION * (len(u) + 1) ** 2
    padded = (torch.nn.functional.pad(w, (1, 1), value=k) for w, k in ((u, A), (v, B / A)))
    du, dv = (c * (w[2:] - 2 * w[1:-1] + w[:-2]) for w in padded)
    r = u * u * v
    return torch.cat([A + r - (B + 1) * u + du, B * u - r + dv])


def by_numpy(_: float, y: np.ndarray) -> np.ndarray:
    """The same in NumPy, as SciPy calls it."""
    u, v = np.split(y, 2)
    c = DIFFUSION * (len(u) + 1) ** 2
    padded = (np.concatenate([[k], w, [k]]) for w, k in ((u, A), (v, B / A)))
    du, dv = (c * (w[2:] - 2 * w[1:-1] + w[:-2]) for w in padded)
    r = u * u * v
    return np.concatenate([A + r - (B + 1) * u + du, B * u - r + dv])


def by_torch(_: float, y: np.ndarray) -> np.ndarray:
    """The same in PyTorch, as SciPy calls it."""
    return brusselator(torch.from_numpy(y)).numpy()


def start(equations: int) -> np.ndarray:
    """The initial state."""
    n = equations // 2
    x = np.linspace(0, 1, n + 2)[1:-1]
    return np.concatenate([1 + np.sin(2 * np.pi * x), np.full(n, B / A)])


def pattern(equations: int) -> Any:
    """What SciPy has to be told."""
    n = equations // 2
    line = sp.diags_array([np.ones(n)] * 3, offsets=[-1, 0, 1], shape=(n, n))
    return sp.block_array([[line, sp.eye_array(n)], [sp.eye_array(n), line]], format="csc")


def solvers(equations: int) -> dict[str, Callable[[], Any]]:
    """Ways to solve the problem, by name."""
    y0, entries = start(equations), pattern(equations)

    def ours(f: Callable[..., Any]) -> Callable[[], Any]:
        p = lz.scipy.VectorFunction(brusselator, torch.from_numpy(y0), jac="sparse")
        return lambda: solve_ivp(f, (0, 10), y0, method="BDF", jac=lambda _, y: p.jac(y))

    def scipys(f: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: solve_ivp(f, (0, 10), y0, method="BDF", jac_sparsity=entries)

    return {
        "NumPy, SciPy's differences": scipys(by_numpy),
        "NumPy, this package's Jacobian": ours(by_numpy),
        "PyTorch, SciPy's differences": scipys(by_torch),
        "PyTorch, this package's Jacobian": ours(by_torch),
    }


def measured(equations: int, repeat: int) -> dict[str, tuple[float, float, int]]:
    """Return for each solver the time of its first solve, the least later one, and Jacobians."""
    found: dict[str, tuple[float, float, int]] = {}
    ways = solvers(equations)
    for k in range(repeat + 1):
        for name, way in ways.items():
            begin = time.process_time()
            result = way()
            taken = time.process_time() - begin
            assert result.success
            first, least, _ = found.get(name, (taken, float("inf"), 0))
            found[name] = first, min(least, taken) if k else least, result.njev
    return found


def main(args: list[str]) -> int:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--equations", type=int, default=800)
    options.add_argument("--repeat", type=int, default=5)
    given = options.parse_args(args)
    torch.set_num_threads(1)
    print(f"{given.equations} equations, seconds")
    for name, (first, later, jacobians) in measured(given.equations, given.repeat).items():
        print(f"{name:34} first {first:6.3f}   later {later:6.3f}   {jacobians} Jacobians")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
