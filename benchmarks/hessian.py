"""The Hessian of a Bayesian logistic regression, by every way to get it in PyTorch.

    python -m benchmarks.hessian

The data are the 569 tumours of scikit-learn's breast cancer set, 30 standardized features and a
constant, with a normal prior. This is the case of the request that led to `vectorize=True` in
`torch.autograd.functional`. The ways take turns; the smallest time of each counts, and all must
agree with the formula to 1e-10.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from linearize import func, functional
from linearize.curvature import hessian


def posterior() -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor, torch.Tensor]:
    """Return the negative logarithm of the posterior, a point, and the Hessian there."""
    from sklearn.datasets import load_breast_cancer
    from sklearn.preprocessing import scale

    features, labels = load_breast_cancer(return_X_y=True)
    X = torch.from_numpy(scale(features))
    X = torch.cat([X, torch.ones(len(X), 1)], dim=1)
    y = torch.from_numpy(labels).double()

    def negative_log_posterior(w: torch.Tensor) -> torch.Tensor:
        fit = F.binary_cross_entropy_with_logits(X @ w, y, reduction="sum")
        return fit + 0.5 * (w * w).sum()

    w = 0.1 * torch.randn(X.shape[1], generator=torch.Generator().manual_seed(0))
    p = torch.sigmoid(X @ w)
    exact = X.T @ ((p * (1 - p))[:, None] * X) + torch.eye(len(w))
    return negative_log_posterior, w, exact


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    f, w, exact = posterior()
    theirs = torch.autograd.functional.hessian
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "torch.autograd.functional.hessian": lambda: theirs(f, w),
        "… vectorize=True": lambda: theirs(f, w, vectorize=True),
        "torch.func.hessian": lambda: torch.func.hessian(f)(w),
        "linearize.functional.hessian": lambda: functional.hessian(f, w),
        "linearize.func.hessian": lambda: func.hessian(f)(w),
        "linearize.curvature.hessian, dense": lambda: hessian(f, w).materialize(),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(given.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            result = way()
            times[name].append(time.perf_counter() - start)
            assert (result - exact).abs().max() < 1e-10 * exact.abs().max(), name
    print("| way | first (ms) | best (ms) |\n|---|---|---|")
    for name, taken in times.items():
        print(f"| {name} | {1e3 * taken[0]:.1f} | {1e3 * min(taken):.2f} |")


if __name__ == "__main__":
    main()
