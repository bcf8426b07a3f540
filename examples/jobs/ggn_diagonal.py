"""The diagonal of a Gauss–Newton matrix, for a preconditioner or Laplace's approximation.

The network is that of the job before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.func import functional_call, jacrev, vmap

import linearize as lz
import linearize.curvature

from .cnn_curvature import Problem, make, matrix
from .job import Job


def by_linearize(problem: Problem) -> Any:
    return lz.curvature.gauss_newton(problem.net, problem.loss, problem.batches).diagonal()


def by_curvlinops(problem: Problem) -> Any:
    from curvlinops import GGNLinearOperator

    parameters = list(problem.net.parameters())
    options = {"check_deterministic": False}
    G = GGNLinearOperator(problem.net, problem.loss, parameters, problem.batches, **options)
    n, found = G.shape[1], []
    for start in range(0, n, 64):
        columns = torch.eye(n, dtype=torch.float64)[:, start : start + 64]
        found.append((G @ columns)[start : start + 64].diagonal())
    return torch.cat(found)


def by_xdiag(problem: Problem) -> Any:
    from curvlinops import GGNLinearOperator, xdiag

    parameters = list(problem.net.parameters())
    options = {"check_deterministic": False}
    G = GGNLinearOperator(problem.net, problem.loss, parameters, problem.batches, **options)
    return xdiag(G, num_matvecs=100)


def by_torch(problem: Problem) -> Any:
    params = {n: p.detach() for n, p in problem.net.named_parameters()}
    total = torch.zeros(sum(p.numel() for p in params.values()), dtype=torch.float64)
    for x, _ in problem.batches:
        one = lambda p, x: functional_call(problem.net, p, (x[None],))[0]  # noqa: E731
        s = vmap(one, (None, 0))(params, x).softmax(1)
        J = vmap(jacrev(one), (None, 0))(params, x)
        J = torch.cat([j.flatten(2) for j in J.values()], 2)
        mean = (s[:, :, None] * J).sum(1)
        total += ((s[:, :, None] * J.square()).sum(1) - mean.square()).sum(0)
    return total / sum(len(y) for _, y in problem.batches)


def error(problem: Problem, found: Any) -> float:
    """Compare with the diagonal of the whole matrix."""
    known = matrix(problem).diagonal()
    return float((found - known).norm() / known.norm())


JOB = Job(
    "The diagonal of a Gauss–Newton matrix",
    make,
    error,
    1e-10,
    {
        "linearize": by_linearize,
        "curvlinops, exact": by_curvlinops,
        "curvlinops, xdiag": by_xdiag,
        "torch.func": by_torch,
    },
    loose={"curvlinops, xdiag": 0.5},
)
