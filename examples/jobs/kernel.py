"""A migration: the empirical neural tangent kernel, as PyTorch's tutorial has it.

K = J·Jᵀ of a network's outputs by its parameters. First with `torch.func`, then with nothing but
the import changed, then as an operator.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.func
from torch.func import functional_call

import linearize as lz
import linearize.func

from .cnn_curvature import Problem, make
from .job import Job


def by_linearize(problem: Problem) -> Any:
    params, x = inputs(problem)
    here = lz.Linearizer(lambda p: functional_call(problem.net, p, (x,))).at(params)
    J = here.jacobian.materialize()
    return J @ J.T


def by_import(problem: Problem) -> Any:
    params, x = inputs(problem)
    model = lambda p: functional_call(problem.net, p, (x,))  # noqa: E731
    J = lz.func.jacrev(model)(params)
    J = torch.cat([j.flatten(2) for j in J.values()], 2).flatten(0, 1)
    return J @ J.T


def by_torch(problem: Problem) -> Any:
    params, x = inputs(problem)
    model = lambda p: functional_call(problem.net, p, (x,))  # noqa: E731
    J = torch.func.jacrev(model)(params)
    J = torch.cat([j.flatten(2) for j in J.values()], 2).flatten(0, 1)
    return J @ J.T


def inputs(problem: Problem) -> Any:
    """Return the parameters and thirty images."""
    params = {name: p.detach() for name, p in problem.net.named_parameters()}
    return params, problem.batches[0][0][:30]


def error(problem: Problem, K: Any) -> float:
    """Compare with gradients by plain autograd, one after another."""
    _, x = inputs(problem)
    leaves = list(problem.net.parameters())
    rows = [
        torch.cat([g.reshape(-1) for g in torch.autograd.grad(t, leaves, retain_graph=True)])
        for t in problem.net.layers(x).reshape(-1)
    ]
    J = torch.stack(rows)
    return float((K - J @ J.T).norm() / K.norm())


JOB = Job(
    "A migration",
    make,
    error,
    1e-10,
    {"linearize": by_linearize, "linearize.func": by_import, "torch.func": by_torch},
)
