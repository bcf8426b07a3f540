"""Bayesian logistic regression on the breast cancer data by Laplace's approximation.

SciPy finds the most probable weights by exact Hessian products. The Hessian there, whole or as an
operator, comes from one run of the loss, and so does the Gauss–Newton matrix: for this model both
equal the closed form. With the Gaussian that they give, the prior is chosen by its evidence, and
predictions say how sure they are.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gallery import figure, options, save, table
from scipy.optimize import minimize
from sklearn.datasets import load_breast_cancer
from sklearn.decomposition import PCA
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch.distributions import MultivariateNormal
from tqdm import tqdm

import linearize as lz
import linearize.func
import linearize.scipy
from linearize.curvature import gauss_newton, hessian


def data() -> tuple[torch.Tensor, ...]:
    """Return standardised features with a column of ones, and labels, to train and to test."""
    X, y = load_breast_cancer(return_X_y=True)
    parts = train_test_split(X, y, test_size=0.3, random_state=0, stratify=y)
    scaler = StandardScaler().fit(parts[0])
    train, test = (
        torch.from_numpy(np.column_stack([scaler.transform(p), np.ones(len(p))]))
        for p in parts[:2]
    )
    return train, test, torch.from_numpy(parts[2]).double(), torch.from_numpy(parts[3]).double()


@dataclasses.dataclass
class Regression:
    """The negative logarithm of the posterior, up to a constant."""

    X: torch.Tensor
    y: torch.Tensor
    precision: float
    runs: int = 0

    def likelihood(self, w: torch.Tensor) -> torch.Tensor:
        """Return −log p(y | w)."""
        return F.binary_cross_entropy_with_logits(self.X @ w, self.y, reduction="sum")

    def __call__(self, w: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        return self.likelihood(w) + 0.5 * self.precision * (w @ w)

    def closed_form(self, w: torch.Tensor) -> torch.Tensor:
        """Return the Hessian Xᵀ·diag(p(1 − p))·X + precision·I."""
        p = (self.X @ w).sigmoid()
        eye = torch.eye(len(w), dtype=w.dtype)
        return self.X.T @ ((p * (1 - p))[:, None] * self.X) + self.precision * eye


@dataclasses.dataclass
class Posterior:
    """The Gaussian at the most probable weights."""

    loss: Regression
    mean: torch.Tensor
    hessian: torch.Tensor
    iterations: int
    runs: int

    @property
    def evidence(self) -> float:
        """log p(y) in Laplace's approximation."""
        count = len(self.mean)
        prior = 0.5 * count * np.log(self.loss.precision)
        # The factors (2π)^(n/2) of prior and integral cancel.
        return float(-self.loss(self.mean)) + prior - 0.5 * float(self.hessian.logdet())

    def probability(self, X: torch.Tensor) -> torch.Tensor:
        """Return p(y = 1 | x), averaged over the weights.

        The integral over the logit is that of D. J. C. MacKay, "The evidence framework applied to
        classification networks", Neural Computation 4, 1992.
        """
        normal = MultivariateNormal(self.mean, precision_matrix=self.hessian)
        variance = ((X @ normal.scale_tril) ** 2).sum(1)
        return (X @ self.mean / (1 + torch.pi / 8 * variance).sqrt()).sigmoid()


def posterior(X: torch.Tensor, y: torch.Tensor, precision: float) -> Posterior:
    """Find the most probable weights, and the Hessian there."""
    loss = Regression(X, y, precision)
    p = lz.scipy.ScalarFunction(loss, torch.zeros(X.shape[1], dtype=X.dtype))
    fit = minimize(
        p.fun, p.x0, jac=p.jac, hessp=p.hessp, method="trust-ncg", options={"gtol": 1e-8}
    )
    H = p.at(fit.x).jacobian.materialize()
    return Posterior(loss, p.unravel(fit.x), H, fit.nit, loss.runs)


def matrices(best: Posterior) -> list[list[Any]]:
    """Make the Hessian in several ways; compare with the closed form."""
    loss, w = best.loss, best.mean
    known = loss.closed_form(w)
    eye = loss.precision * torch.eye(len(w), dtype=w.dtype)

    def model(w: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
        loss.runs += 1
        return X @ w

    def by_gauss_newton() -> torch.Tensor:
        def nll(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return F.binary_cross_entropy_with_logits(z, y, reduction="sum")

        return gauss_newton(model, w, nll, [(loss.X, loss.y)]).materialize() + eye

    makers: dict[str, Callable[[], torch.Tensor]] = {
        "linearize.curvature.hessian": lambda: hessian(loss, w).materialize(),
        "linearize.curvature.gauss_newton": by_gauss_newton,
        "linearize.func.hessian": lambda: lz.func.hessian(loss)(w),
        "torch.func.hessian": lambda: torch.func.hessian(loss)(w),
        "torch.autograd.functional.hessian": lambda: torch.autograd.functional.hessian(loss, w),
    }
    rows = []
    for name, make in makers.items():
        make()  # once, to warm up
        loss.runs, began = 0, time.process_time()
        H = make()
        seconds = time.process_time() - began
        error = float((H - known).abs().max() / known.abs().max())
        rows.append([name, loss.runs, f"{1e3 * seconds:.2f}", f"{error:.0e}"])
    return rows


def picture(
    found: dict[float, Posterior], scores: dict[float, Any], plane: Any, path: Path
) -> None:
    """Draw evidence and test loss over the prior, and predictions in the plane of two features."""
    made, ((left, right),) = figure(2)
    precisions = list(found)
    left.semilogx(precisions, [p.evidence for p in found.values()], "k.-")
    left.set(xlabel="precision of the prior", ylabel="log evidence")
    twin = left.twinx()
    for k, (name, style) in enumerate((("most probable", "C1.--"), ("averaged", "C0.-"))):
        twin.semilogx(precisions, [s[k] for s in scores.values()], style, label=name)
    twin.set_ylabel("test loss")
    twin.legend(fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))

    Z, y, sure = plane
    x1, x2 = (np.linspace(Z[:, k].min() - 4, Z[:, k].max() + 4, 120) for k in (0, 1))
    grid = np.stack(np.meshgrid(x1, x2), -1).reshape(-1, 2)
    ones = np.ones((len(grid), 1))
    p = sure.probability(torch.from_numpy(np.hstack([grid, ones]))).numpy().reshape(120, 120)
    image = right.contourf(x1, x2, p, np.linspace(0, 1, 11), cmap="RdBu", alpha=0.7)
    right.contour(x1, x2, p, [0.5], colors="k", linewidths=1)
    right.scatter(
        *Z.T, c=np.where(y > 0, "deepskyblue", "orange"), s=12, edgecolors="w", linewidths=0.3
    )
    right.set(xlabel="first principal component", ylabel="second", title="p(benign), averaged")
    made.colorbar(image, ax=right)
    save(made, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fit, compare, choose, draw; return 1 if a Hessian differs from the closed form."""
    chosen = options(__doc__, "laplace", arguments)
    train, test, y, y_test = data()
    precisions = np.logspace(-2, 2, 5 if chosen.quick else 13).tolist()
    found, scores = {}, {}
    for precision in tqdm(precisions, unit="prior", disable=chosen.quiet, leave=False):
        found[precision] = fitted = posterior(train, y, precision)
        plain = (test @ fitted.mean).sigmoid()
        averaged = fitted.probability(test)
        scores[precision] = tuple(log_loss(y_test, p) for p in (plain, averaged))
        scores[precision] += (float(((averaged > 0.5) == (y_test > 0.5)).double().mean()),)
    rows = [
        [
            f"{precision:.3g}",
            fitted.iterations,
            fitted.runs,
            f"{fitted.evidence:.2f}",
            *(f"{s:.4f}" for s in scores[precision]),
        ]
        for precision, fitted in found.items()
    ]
    header = ("prior", "Newton steps", "runs of f", "log evidence", "loss, most probable")
    print(f"{len(train)} cells to train, {len(test)} to test, {train.shape[1]} weights")
    print(table((*header, "loss, averaged", "accuracy"), rows))
    best = max(found.values(), key=lambda fitted: fitted.evidence)
    print(f"The evidence is greatest for a prior of precision {best.loss.precision:.3g}.\n")
    compared = matrices(best)
    print(table(("Hessian there", "runs of f", "ms", "error"), compared))

    components = PCA(2).fit_transform(train[:, :-1])
    with_ones = torch.from_numpy(np.column_stack([components, np.ones(len(components))]))
    plane = components, y.numpy(), posterior(with_ones, y, best.loss.precision)
    picture(found, scores, plane, chosen.out)
    if any(float(row[-1]) > 1e-10 for row in compared):
        print("A Hessian differs from the closed form.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
