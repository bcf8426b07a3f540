"""The spectrum of a network's Gauss–Newton matrix on handwritten digits, by Lanczos.

The matrix has 43 million entries; SciPy's `eigsh` finds its outer eigenvalues from products alone,
and the network runs once for each batch of data, however many products there are. Where curvlinops
is installed, it estimates the whole density from the same operator, and its own operator, which
runs the network at every product, is timed beside it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gallery import figure, options, save, table
from scipy.sparse.linalg import LinearOperator, eigsh
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call
from tqdm import tqdm

import linearize as lz
import linearize.scipy
from linearize.curvature import Curvature, gauss_newton

Batches = list[tuple[torch.Tensor, torch.Tensor]]
PEER = importlib.util.find_spec("curvlinops") is not None


class Digits:
    """The network and the data."""

    def __init__(self, widths: Sequence[int], count: int | None = None) -> None:
        torch.manual_seed(0)
        X, y = load_digits(return_X_y=True)
        shuffled = np.random.default_rng(0).permutation(len(X))[:count]
        inputs = torch.from_numpy(X[shuffled] / 16).float()
        targets = torch.from_numpy(y[shuffled])
        self.batches: Batches = list(zip(inputs.split(300), targets.split(300), strict=True))
        sizes = [64, *widths, 10]
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b), nn.Tanh()]
        self.net = nn.Sequential(*layers[:-1])
        self.runs = 0
        self.net.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.runs += 1

    def train(self, epochs: int, bar: Any) -> None:
        """Train with Adam."""
        optimizer = torch.optim.Adam(self.net.parameters(), lr=3e-3)
        for _ in range(epochs):
            for x, y in self.batches:
                optimizer.zero_grad()
                F.cross_entropy(self.net(x), y).backward()
                optimizer.step()
            bar.update()

    def accuracy(self) -> float:
        """Return the part of the digits that are recognised."""
        with torch.no_grad():
            right = [(self.net(x).argmax(1) == y).float() for x, y in self.batches]
        return float(torch.cat(right).mean())

    def matrix(self) -> Curvature:
        """Return the Gauss–Newton matrix of the mean loss; the network runs once for a batch."""
        params = {name: p.detach().clone() for name, p in self.net.named_parameters()}

        def model(p: dict[str, torch.Tensor], x: torch.Tensor) -> Any:
            return functional_call(self.net, p, (x,))

        return gauss_newton(model, params, "cross_entropy", self.batches, reduction="mean")


@dataclasses.dataclass
class Spectrum:
    """Eigenvalues, the largest first, and what they took."""

    values: np.ndarray
    residual: float
    """The largest of ‖G·v − λ·v‖ in units of the largest eigenvalue."""
    products: int
    runs: int
    seconds: float


def outer(digits: Digits, make: Any, count: int) -> Spectrum:
    """Find the outer eigenvalues of an operator of NumPy vectors."""
    digits.runs, products, began = 0, 0, time.process_time()
    A = make()

    def counted(v: np.ndarray) -> Any:
        nonlocal products
        products += 1
        return A.matvec(v.astype(np.float32).ravel())

    start = np.random.default_rng(1).standard_normal(A.shape[0])
    counting = LinearOperator(A.shape, matvec=counted, dtype=np.float64)
    values, vectors = eigsh(counting, k=count, v0=start, tol=1e-4)
    seconds, done, runs = time.process_time() - began, products, digits.runs
    wrong = counting.matmat(vectors) - vectors * values
    residual = np.linalg.norm(wrong, axis=0).max() / values[-1]
    return Spectrum(values[::-1], float(residual), done, runs, seconds)


def by_curvlinops(digits: Digits) -> Any:
    """Return the same matrix from curvlinops, as SciPy's operator."""
    from curvlinops import GGNLinearOperator

    params = list(digits.net.parameters())
    operator = GGNLinearOperator(
        digits.net, nn.CrossEntropyLoss(), params, digits.batches, check_deterministic=False
    )
    return operator.to_scipy()


def density(G: Curvature, largest: float) -> tuple[np.ndarray, np.ndarray]:
    """Return logarithms of eigenvalues and their density, estimated by curvlinops."""
    from curvlinops.papyan2020traces import spectrum

    torch.manual_seed(2)
    steps = spectrum.fast_lanczos(G, 60)
    grid, values = spectrum.lanczos_approximate_log_spectrum_from_iter(
        steps, boundaries=(0.0, largest), num_points=512, kappa=1.04, margin=0.05, epsilon=1e-5
    )
    return grid.numpy(), values.numpy()


def picture(found: dict[str, Spectrum], densities: dict[str, Any], path: Path) -> None:
    """Draw the eigenvalues, and the density if there is one."""
    made, (axes,) = figure(2 if densities else 1)
    for name, spectrum in found.items():
        axes[0].semilogy(np.arange(1, len(spectrum.values) + 1), spectrum.values, ".-", label=name)
    axes[0].axvline(9.5, color="k", linewidth=0.5, linestyle=":")
    axes[0].set(xlabel="number", ylabel="eigenvalue")
    axes[0].legend()
    for name, (grid, values) in densities.items():
        axes[1].loglog(grid, values, label=name)
    if densities:
        axes[1].set(xlabel="eigenvalue", ylabel="density")
        axes[1].legend()
    save(made, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, find the spectra, draw; return 1 if an eigenvalue is not one."""
    chosen = options(__doc__, "spectrum", arguments)
    quick = chosen.quick
    digits = Digits((8,), 600) if quick else Digits((64, 32))
    count, epochs = (12, 10) if quick else (40, 60)
    found: dict[str, Spectrum] = {}
    densities: dict[str, Any] = {}
    rows = []
    failed = False
    with tqdm(total=epochs, unit="epoch", disable=chosen.quiet, leave=False) as bar:
        for name in ("at the start", "trained"):
            if name == "trained":
                digits.train(epochs, bar)
            accuracy = digits.accuracy()
            ours = found[name] = outer(
                digits, lambda: lz.scipy.aslinearoperator(digits.matrix()), count
            )
            tasks = {f"{name}, linearize": ours}
            if PEER and not quick:
                tasks[f"{name}, curvlinops"] = outer(digits, lambda: by_curvlinops(digits), count)
                densities[name] = density(digits.matrix(), float(ours.values[0]))
            for label, s in tasks.items():
                shown = (f"{s.values[i]:.4f}" for i in (0, 8, 9, count - 1))
                effort = s.products, s.runs, f"{s.seconds:.2f}"
                rows.append([label, f"{accuracy:.3f}", *shown, f"{s.residual:.0e}", *effort])
                failed |= s.residual > 1e-3 or abs(s.values[0] / ours.values[0] - 1) > 1e-3
            failed |= ours.runs != len(digits.batches)
    data = sum(len(x) for x, _ in digits.batches)
    weights = sum(p.numel() for p in digits.net.parameters())
    print(f"{weights} weights, {data} digits in {len(digits.batches)} batches")
    header = ("Gauss–Newton matrix", "accuracy", "λ1", "λ9", "λ10", f"λ{count}", "residual")
    print(table((*header, "products", "runs of f", "seconds"), rows))
    picture(found, densities, chosen.out)
    if failed:
        print("An eigenvalue is wrong, or the network ran too often.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
