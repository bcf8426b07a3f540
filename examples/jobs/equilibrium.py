"""A deep equilibrium model: the gradient of a loss behind a layer that is defined by an equation.

z = tanh(W·z + U·x + b) for each digit of scikit-learn's. The fixed point is given; what is asked
for is the gradient by the parameters.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.func import vjp
from torch.nn.functional import cross_entropy

import linearize as lz
import linearize.implicit

from .job import Counted, Job

Parameters = dict[str, torch.Tensor]


@dataclasses.dataclass
class Problem:
    f: Counted
    z: torch.Tensor
    labels: torch.Tensor
    parameters: Parameters
    images: torch.Tensor
    kept: dict[str, Any] = dataclasses.field(default_factory=dict)


def make(quick: bool) -> Problem:
    X, y = load_digits(return_X_y=True)
    count, hidden = (20, 8) if quick else (400, 40)
    x = torch.from_numpy(X[:count] / 16)
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=draw, dtype=torch.float64)

    parameters = {
        "W": normal(hidden, hidden, scale=0.4 / hidden**0.5),
        "U": normal(hidden, 64, scale=1 / 8),
        "b": normal(hidden, scale=0.1),
        "out": normal(10, hidden, scale=1 / hidden**0.5),
    }

    def f(z: torch.Tensor, p: Parameters) -> torch.Tensor:
        return torch.tanh(z @ p["W"].T + x @ p["U"].T + p["b"])

    z = torch.zeros(count, hidden, dtype=torch.float64)
    for _ in range(300):
        z = f(z, parameters)
    return Problem(Counted(f), z, torch.from_numpy(y[:count]), parameters, x)


def by_linearize(problem: Problem) -> Any:
    p = {name: t.clone().requires_grad_() for name, t in problem.parameters.items()}
    layer = {name: p[name] for name in ("W", "U", "b")}
    z = lz.implicit.root(lambda z, p: z - problem.f(z, p), problem.z, layer, batch=True)
    cross_entropy(z @ p["out"].T, problem.labels).backward()
    return {name: t.grad for name, t in p.items()}


def by_hook(problem: Problem) -> Any:
    p = {name: t.clone().requires_grad_() for name, t in problem.parameters.items()}
    z = problem.f(problem.z, p)
    start = problem.z.clone().requires_grad_()
    again = problem.f(start, p)

    def hook(u: torch.Tensor) -> torch.Tensor:
        found = u
        for _ in range(300):
            (step,) = torch.autograd.grad(again, start, found, retain_graph=True)
            found, before = u + step, found
            if float((found - before).abs().max()) < 1e-14:
                break
        return found

    z.register_hook(hook)
    cross_entropy(z @ p["out"].T, problem.labels).backward()
    return {name: t.grad for name, t in p.items()}


def by_torch(problem: Problem) -> Any:
    p = problem.parameters
    loss = lambda z, out: cross_entropy(z @ out.T, problem.labels)  # noqa: E731
    u, out = torch.func.grad(loss, (0, 1))(problem.z, p["out"])
    layer = {name: p[name] for name in ("W", "U", "b")}
    _, pull = vjp(problem.f, problem.z, layer)
    rows = torch.eye(u.shape[1], dtype=u.dtype)
    J = torch.stack([pull(row.expand_as(u))[0] for row in rows], 1)  # a matrix for each digit
    w = torch.linalg.solve(torch.eye(len(rows), dtype=u.dtype) - J.mT, u)
    return pull(w)[1] | {"out": out}


def by_lineax(problem: Problem) -> Any:
    import jax
    import jax.numpy as jnp
    import lineax as lx

    jax.config.update("jax_enable_x64", val=True)
    x, labels = problem.images.numpy(), problem.labels.numpy()

    def f(z: Any, p: Any) -> Any:
        return jnp.tanh(z @ p["W"].T + x @ p["U"].T + p["b"])

    def loss(z: Any, out: Any) -> Any:
        scores = jax.nn.log_softmax(z @ out.T)
        return -scores[jnp.arange(len(labels)), labels].mean()

    def gradient(z: Any, p: Any) -> Any:
        u, out = jax.grad(loss, (0, 1))(z, p["out"])
        _, pull = jax.vjp(f, z, p)
        like = jax.ShapeDtypeStruct(z.shape, z.dtype)
        A = lx.FunctionLinearOperator(lambda w: w - pull(w)[0], like)
        w = lx.linear_solve(A, u, lx.GMRES(rtol=1e-12, atol=1e-14)).value
        return pull(w)[1] | {"out": out}

    gradient = problem.kept.setdefault("gradient", jax.jit(gradient))  # compiled once
    found = gradient(problem.z.numpy(), {n: t.numpy() for n, t in problem.parameters.items()})
    return {name: torch.from_numpy(np.array(t)) for name, t in found.items()}


def error(problem: Problem, found: Any) -> float:
    """Compare with the gradient through very many iterations."""
    p = {name: t.clone().requires_grad_() for name, t in problem.parameters.items()}
    z = problem.z
    for _ in range(60):
        z = problem.f.f(z, p)
    cross_entropy(z @ p["out"].T, problem.labels).backward()
    return max(float((found[n] - t.grad).norm() / t.grad.norm()) for n, t in p.items())


JOB = Job(
    "A deep equilibrium model",
    make,
    error,
    1e-8,
    {
        "linearize": by_linearize,
        "autograd, a hook": by_hook,
        "torch.func": by_torch,
        "lineax": by_lineax,
    },
)
