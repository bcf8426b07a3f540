"""Follow the solutions of Δu + λ·exp(u) = 0 around their fold, and find the critical λ.

Newton–Krylov with exact products (`linearize.scipy.newton_krylov`) follows the branch by its arc
length, past the point where no method that fixes λ gets through. The fold is the root of a larger
system (Moore and Spence), which contains a Jacobian-vector product and is linearized like any
other function. SciPy's own Newton–Krylov, which forms its products by differences, is the peer.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.fft
import torch
import torch.nn.functional as F
from gallery import figure, options, save, table
from scipy.optimize import root
from scipy.sparse.linalg import LinearOperator
from tqdm import tqdm

from linearize.scipy import newton_krylov

KNOWN = {1: 3.513830719, 2: 6.808124423}  # critical values of the interval and of the square


@dataclasses.dataclass
class Counted:
    """A function and how often it ran."""

    f: Callable[..., Any]
    runs: int = 0

    def __call__(self, *inputs: Any) -> Any:
        self.runs += 1
        return self.f(*inputs)


class Bratu:
    """The equation on n inner points along each axis of the unit interval or square.

    The discretisation is of fourth order: the compact ("Mehrstellen") stencils of L. Collatz.
    """

    def __init__(self, n: int, dim: int = 2) -> None:
        self.n, self.dim, self.h = n, dim, 1 / (n + 1)
        stencils = {
            1: ([1.0, -2, 1], [1.0, 10, 1], 1),
            2: ([[1.0, 4, 1], [4, -20, 4], [1, 4, 1]], [[0.0, 1, 0], [1, 8, 1], [0, 1, 0]], 6),
        }
        left, right, scale = stencils[dim]
        as_kernel = lambda rows: torch.tensor(rows, dtype=torch.float64)[None, None]  # noqa: E731
        self.laplace = as_kernel(left) / (scale * self.h**2)
        self.average = as_kernel(right) / 12
        self._convolve = F.conv1d if dim == 1 else F.conv2d
        angles = np.pi * self.h * np.arange(1, n + 1) / 2
        axis = -4 / self.h**2 * np.sin(angles) ** 2
        self._eigenvalues = axis if dim == 1 else axis[:, None] + axis

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of u."""
        return (self.n,) * self.dim

    def residual(self, u: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        """Return Δu + λ·exp(u) at the inner points; u is zero on the boundary."""
        margin = (1, 1) * self.dim
        bent = self._convolve(F.pad(u, margin)[None, None], self.laplace)
        source = self._convolve(F.pad(u.exp(), margin, value=1.0)[None, None], self.average)
        return (bent + parameter * source)[0, 0]

    def inverse_laplacian(self, fields: int, scalars: int) -> LinearOperator:
        """Return an operator that solves Δx = b for some fields and leaves some numbers alone."""
        size = self.n**self.dim

        def apply(b: Any) -> Any:
            out = np.array(b, dtype=float).ravel()
            for k in range(fields):
                field = out[k * size : (k + 1) * size].reshape(self.shape)
                modes = scipy.fft.dstn(field, type=1) / self._eigenvalues
                out[k * size : (k + 1) * size] = scipy.fft.idstn(modes, type=1).ravel()
            return out

        total = fields * size + scalars
        return LinearOperator((total, total), matvec=apply, dtype=float)


@dataclasses.dataclass
class Work:
    """What solves took altogether."""

    newton: int = 0
    products: int = 0
    runs: int = 0
    seconds: float = 0.0

    def solve(self, f: Callable[[Any], Any], x0: Any, M: LinearOperator) -> Any:
        """Solve, and count what it took."""
        began = time.process_time()
        counted = Counted(f)
        found = newton_krylov(counted, x0, tol=1e-8, preconditioner=lambda here: M)
        if not found.success:
            raise RuntimeError(found.message)
        self.seconds += time.process_time() - began
        self.newton += found.nit
        self.products += found.njvp
        self.runs += counted.runs
        return found.x


@dataclasses.dataclass
class Fold:
    """Where the branch turns."""

    u: torch.Tensor
    direction: torch.Tensor
    parameter: torch.Tensor


def branch(problem: Bratu, step: float, bar: Any) -> tuple[list[Any], Work]:
    """Follow the solutions from u = 0, λ = 0 by their arc length, until λ is small again.

    Each point is the root of the equation together with a fixed distance along the last secant
    (H. B. Keller's pseudo-arclength).
    """
    zero = torch.tensor(0.0, dtype=torch.float64)
    work, M = Work(), problem.inverse_laplacian(1, 1)
    # The inner product: an integral for u; λ, which hardly moves near the fold, counts little.
    weight, little = problem.h**problem.dim, 0.01

    first = torch.zeros(problem.shape, dtype=torch.float64), zero
    second = work.solve(
        lambda x: (problem.residual(*x), x[1] - step / little**0.5),
        (first[0].clone(), zero.clone()),
        M,
    )
    points = [first, second]
    while points[-1][1] > 0.4 * max(p for _, p in points):
        (u0, p0), (u1, p1) = points[-2:]
        du, dp = u1 - u0, p1 - p0
        length = float((weight * (du * du).sum() + little * dp * dp).sqrt())
        du, dp = du / length, dp / length

        def f(x: Any, u1: Any = u1, p1: Any = p1, du: Any = du, dp: Any = dp) -> Any:
            u, p = x
            along = weight * ((u - u1) * du).sum() + little * (p - p1) * dp
            return problem.residual(u, p), along - step

        points.append(work.solve(f, (u1 + step * du, p1 + step * dp), M))
        bar.set_postfix_str(f"λ = {float(points[-1][1]):.3f}")
        bar.update()
    return points, work


def fold(problem: Bratu, start: Fold) -> tuple[Fold, Work]:
    """Solve for u, φ and λ: the equation, J·φ = 0, and φ of a fixed length.

    G. Moore and A. Spence, "The calculation of turning points of nonlinear equations", SIAM J.
    Numer. Anal. 17, 1980.
    """
    scale = start.direction / start.direction.square().sum()

    def f(x: Any) -> Any:
        u, direction, parameter = x
        value, slope = torch.func.jvp(lambda u: problem.residual(u, parameter), (u,), (direction,))
        return value, slope, (scale * direction).sum() - 1

    work = Work()
    x0 = start.u, start.direction, start.parameter
    return Fold(*work.solve(f, x0, problem.inverse_laplacian(2, 1))), work


def refined(coarse: torch.Tensor, n: int) -> torch.Tensor:
    """Interpolate to n inner points along each axis."""
    mode = "linear" if coarse.dim() == 1 else "bicubic"
    padded = F.pad(coarse, (1, 1) * coarse.dim())[None, None]
    size = (n + 2,) * coarse.dim()
    fine = F.interpolate(padded, size=size, mode=mode, align_corners=True)[0, 0]
    return fine[(slice(1, -1),) * coarse.dim()].clone()


def folds(dim: int, sizes: Sequence[int], points: list[Any]) -> list[tuple[int, Fold, Work]]:
    """Find the fold on finer and finer grids, the first time near the turn of the branch."""
    turn = int(np.argmax([float(p) for _, p in points]))
    u, parameter = points[turn]
    direction = points[turn + 1][0] - points[turn - 1][0]
    at = Fold(u, direction / direction.abs().max(), parameter)
    found = []
    for n in sizes:
        at = Fold(refined(at.u, n), refined(at.direction, n), at.parameter)
        at, work = fold(Bratu(n, dim), at)
        found.append((n, at, work))
    return found


def compare(problem: Bratu) -> list[list[Any]]:
    """Solve at λ = 6 with exact products and with differences, to the same accuracy."""
    parameter, tolerance = torch.tensor(6.0, dtype=torch.float64), 1e-8
    M, start = problem.inverse_laplacian(1, 0), torch.zeros(problem.shape, dtype=torch.float64)
    work = Work()
    u = work.solve(lambda u: problem.residual(u, parameter), start, M)
    error = float(problem.residual(u, parameter).abs().max())
    rows = [["newton_krylov", work.newton, work.products, work.runs, error, work.seconds]]

    counted = Counted(lambda x: problem.residual(torch.from_numpy(x), parameter).numpy())
    began = time.process_time()
    fit = root(
        counted,
        start.numpy(),
        method="krylov",
        options={"fatol": tolerance, "jac_options": {"inner_M": M}},
    )
    seconds, runs = time.process_time() - began, counted.runs
    error = float(np.abs(fit.fun).max())
    rows.append(['root(method="krylov")', fit.nit, "–", runs, error, seconds])
    return [[a, b, c, d, f"{e:.0e}", f"{s:.2f}"] for a, b, c, d, e, s in rows]


def picture(points: list[Any], at: Fold, path: Path) -> None:
    """Draw the branch, and the solution where it turns."""
    made, ((left, right),) = figure(2)
    left.plot([float(p) for _, p in points], [float(u.max()) for u, _ in points], ".-")
    critical = float(at.parameter)
    left.plot([critical], [float(at.u.max())], "ro", label=f"fold, λ = {critical:.6f}")
    left.set(xlabel="λ", ylabel="max u")
    left.legend()
    shown = F.pad(at.u, (1, 1, 1, 1)).numpy()
    image = right.imshow(shown, extent=(0, 1, 0, 1), origin="lower", cmap="viridis")
    right.set_title("u at the fold")
    made.colorbar(image, ax=right)
    save(made, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Follow, find the folds, compare, draw; return 1 if a critical value is not the known one."""
    chosen = options(__doc__, "bratu", arguments)
    sizes = (7, 15) if chosen.quick else (15, 31, 63, 127)
    rows, failed = [], False
    for dim in (2,) if chosen.quick else (1, 2):
        with tqdm(unit="point", disable=chosen.quiet, leave=False) as bar:
            points, work = branch(Bratu(sizes[0], dim), 0.2 if chosen.quick else 0.1, bar)
        name = "interval" if dim == 1 else "square"
        rows.append([f"branch, {name}", sizes[0], "", "", *_counts(work)])
        found = folds(dim, sizes, points)
        for n, at, work in found:
            error = abs(float(at.parameter) - KNOWN[dim])
            numbers = [f"{float(at.parameter):.9f}", f"{error:.1e}"]
            rows.append([f"fold, {name}", n, *numbers, *_counts(work)])
        failed |= error > (1e-3 if chosen.quick else 1e-6)
    header = ("", "n", "critical λ", "error", "Newton steps", "J·v", "runs of f", "seconds")
    print(table(header, rows))
    print()
    header = ("λ = 6, square", "Newton steps", "J·v", "runs of f", "max |f|", "seconds")
    print(table(header, compare(Bratu(sizes[-1]))))
    picture(points, found[-1][1], chosen.out)
    if failed:
        print("A critical value differs from the known one.", file=sys.stderr)
    return int(failed)


def _counts(work: Work) -> list[Any]:
    return [work.newton, work.products, work.runs, f"{work.seconds:.2f}"]


if __name__ == "__main__":
    sys.exit(main())
