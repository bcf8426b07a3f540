"""Curvature of a convolutional network: the largest eigenvalues of its Gauss–Newton matrix.

The network classifies the digits that come with scikit-learn.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call, jacrev, jvp, vjp, vmap

import linearize as lz
import linearize.curvature

from .job import Counted, Job

COUNT = 4


class Net(nn.Module):
    """Two convolutions and a linear layer; it counts its runs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(8 * width, 10),
        )
        self.run = Counted(self.layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x)


@dataclasses.dataclass
class Problem:
    net: Net
    loss: nn.Module
    batches: list[tuple[torch.Tensor, torch.Tensor]]
    known: list[Any] = dataclasses.field(default_factory=list)

    @property
    def f(self) -> Counted:
        return self.net.run


def make(quick: bool) -> Problem:
    X, y = load_digits(return_X_y=True)
    count = 60 if quick else 300
    torch.manual_seed(0)
    net = Net(2 if quick else 4).double()
    images = torch.from_numpy(X[:count] / 16).view(-1, 1, 8, 8)
    labels = torch.from_numpy(y[:count])
    batches = list(zip(images.split(count // 3), labels.split(count // 3), strict=True))
    return Problem(net, nn.CrossEntropyLoss(), batches)


def by_linearize(problem: Problem) -> Any:
    G = lz.curvature.gauss_newton(problem.net, problem.loss, problem.batches)
    return eigsh(G.to_scipy(), k=COUNT, return_eigenvectors=False)


def by_curvlinops(problem: Problem) -> Any:
    from curvlinops import GGNLinearOperator

    parameters = list(problem.net.parameters())
    options = {"check_deterministic": False}
    G = GGNLinearOperator(problem.net, problem.loss, parameters, problem.batches, **options)
    return eigsh(G.to_scipy(), k=COUNT, return_eigenvectors=False)


def by_torch(problem: Problem) -> Any:
    params = {n: p.detach() for n, p in problem.net.named_parameters()}
    sizes = [p.numel() for p in params.values()]
    count = sum(len(y) for _, y in problem.batches)

    def product(v: Any) -> Any:
        parts = torch.from_numpy(v).view(-1).split(sizes)
        named = zip(params.items(), parts, strict=True)
        tangent = {name: part.view(like.shape) for (name, like), part in named}
        total = torch.zeros(sum(sizes), dtype=torch.float64)
        for x, y in problem.batches:
            model = lambda p, x=x: functional_call(problem.net, p, (x,))  # noqa: E731
            loss = lambda z, y=y: problem.loss(z, y) * len(y) / count  # noqa: E731
            z, Jv = jvp(model, (params,), (tangent,))
            HJv = jvp(torch.func.grad(loss), (z,), (Jv,))[1]
            (found,) = vjp(model, params)[1](HJv)
            total += torch.cat([g.reshape(-1) for g in found.values()])
        return total.numpy()

    G = LinearOperator((sum(sizes), sum(sizes)), product, dtype=float)
    return eigsh(G, k=COUNT, return_eigenvectors=False)


def matrix(problem: Problem) -> torch.Tensor:
    """Return the Gauss–Newton matrix from PyTorch's Jacobian and a formula by hand."""
    if not problem.known:
        params = {n: p.detach() for n, p in problem.net.named_parameters()}
        params = {n.removeprefix("layers."): p for n, p in params.items()}
        x = torch.cat([x for x, _ in problem.batches])
        one = lambda p, x: functional_call(problem.net.layers, p, (x[None],))[0]  # noqa: E731
        J = vmap(jacrev(one), (None, 0), chunk_size=100)(params, x)
        J = torch.cat([j.flatten(2) for j in J.values()], 2)
        s = vmap(one, (None, 0))(params, x).softmax(1)
        H = torch.diag_embed(s) - s[:, :, None] * s[:, None, :]
        problem.known.append((J.mT @ H).movedim(0, 1).flatten(1) @ J.flatten(0, 1) / len(x))
    return problem.known[0]


def error(problem: Problem, found: Any) -> float:
    """Compare with the eigenvalues of the whole matrix."""
    known = torch.linalg.eigvalsh(matrix(problem))[-COUNT:].numpy()
    return float(np.abs(np.sort(found) / known - 1).max())


JOB = Job(
    "Curvature of a convolutional network",
    make,
    error,
    1e-8,
    {"linearize": by_linearize, "curvlinops": by_curvlinops, "torch.func": by_torch},
)
