"""Camera calibration.

Lens and poses of a film camera (*Tears of Steel*, see `examples/data/bundle`) are fitted to the
markers in some images, the points being known: eight numbers that all residuals depend on, and
six for each image.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from bundle.data import read
from scipy.optimize import least_squares
from torch.func import jacfwd

import linearize as lz
import linearize.scipy

from .job import Counted, Job


@dataclasses.dataclass
class Problem:
    f: Counted
    start: dict[str, torch.Tensor]


def make(quick: bool) -> Problem:
    scene = read("problem_01.bin")
    images = np.arange(0, 333, 60 if quick else 20)
    used = np.isin(scene.camera, images)
    camera = torch.from_numpy(np.searchsorted(images, scene.camera[used]))
    xy = torch.from_numpy(scene.xy[used])
    seen = torch.from_numpy(scene.points[scene.point[used]])
    turn = torch.from_numpy(scene.turn[images])
    turned = (turn[camera] @ seen.unsqueeze(2)).squeeze(2)

    def f(p: dict[str, torch.Tensor]) -> torch.Tensor:
        w = p["rotation"][camera]
        angle = ((w * w).sum(1, keepdim=True) + 1e-24).sqrt()
        once = torch.linalg.cross(w, turned)
        twice = torch.linalg.cross(w, once)
        half = 2 * ((angle / 2).sin() / angle) ** 2
        X = turned + angle.sin() / angle * once + half * twice + p["shift"][camera]
        x, y = (X[:, :2] / X[:, 2:]).unbind(1)
        k1, k2, k3, p1, p2 = p["lens"].unbind()
        r2 = x * x + y * y
        radial = 1 + r2 * (k1 + r2 * (k2 + r2 * k3))
        u = x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x)
        v = y * radial + 2 * p2 * x * y + p1 * (r2 + 2 * y * y)
        return (p["focal"] * torch.stack([u, v], 1) + p["centre"] - xy).reshape(-1)

    focal, *centre = scene.intrinsics[:3]
    start = {
        "focal": torch.tensor([0.8 * focal], dtype=torch.float64),
        "centre": torch.tensor(centre, dtype=torch.float64),
        "lens": torch.zeros(5, dtype=torch.float64),
        "rotation": torch.zeros(len(images), 3, dtype=torch.float64),
        "shift": torch.from_numpy(scene.shift[images]),
    }
    return Problem(Counted(f), start)


def by_linearize(problem: Problem) -> Any:
    p = lz.scipy.VectorFunction(problem.f, problem.start)
    return least_squares(p.fun, p.x0, p.jac, x_scale="jac", method="lm").x


def by_torch(problem: Problem) -> Any:
    sizes = [t.numel() for t in problem.start.values()]

    def parameters(x: Any) -> dict[str, torch.Tensor]:
        parts = torch.as_tensor(x).split(sizes)
        named = zip(problem.start.items(), parts, strict=True)
        return {name: part.view(like.shape) for (name, like), part in named}

    fun = lambda x: problem.f(parameters(x)).numpy()  # noqa: E731
    jac = lambda x: jacfwd(lambda x: problem.f(parameters(x)))(torch.from_numpy(x)).numpy()  # noqa: E731
    x0 = np.concatenate([t.numpy().ravel() for t in problem.start.values()])
    return least_squares(fun, x0, jac, x_scale="jac", method="lm").x


def by_scipy(problem: Problem) -> Any:
    sizes = [t.numel() for t in problem.start.values()]

    def parameters(x: Any) -> dict[str, torch.Tensor]:
        parts = torch.as_tensor(x).split(sizes)
        named = zip(problem.start.items(), parts, strict=True)
        return {name: part.view(like.shape) for (name, like), part in named}

    fun = lambda x: problem.f(parameters(x)).numpy()  # noqa: E731
    x0 = np.concatenate([t.numpy().ravel() for t in problem.start.values()])
    return least_squares(fun, x0, x_scale="jac", method="lm").x


def error(problem: Problem, x: Any) -> float:
    """Return the largest gradient, from central differences, over the scale of its terms."""
    sizes = [t.numel() for t in problem.start.values()]

    def f(x: torch.Tensor) -> torch.Tensor:
        parts = zip(problem.start.items(), x.split(sizes), strict=True)
        return problem.f.f({name: part.view(like.shape) for (name, like), part in parts})

    x = torch.from_numpy(x)
    steps = torch.diag(1e-5 * x.abs().clamp(min=1e-2))
    J = torch.stack([(f(x + s) - f(x - s)) / (2 * s.sum()) for s in steps], 1)
    r = f(x)
    if float(r.square().mean().sqrt()) > 2:  # pixels
        return float("inf")
    return float(((J.T @ r).abs() / (J.norm(dim=0) * r.norm())).max())


JOB = Job(
    "Camera calibration",
    make,
    error,
    1e-5,
    {"linearize": by_linearize, "torch.func": by_torch, "SciPy alone": by_scipy},
    loose={"SciPy alone": 1e-3},
)
