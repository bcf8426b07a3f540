"""Reprojection residuals, written twice: as plain torch and as a custom Function over NumPy.

A camera turns a point by its rotation (axis times angle, on top of a fixed start), shifts it,
divides by the depth, bends the ray by the lens (Brown's model) and scales it to pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .data import Scene

__all__ = ["NumpyReprojection", "residual_in_numpy", "residual_in_torch"]

Array = NDArray[np.float64]

# -- plain torch --------------------------------------------------------------------------------


def residual_in_torch(scene: Scene) -> Any:
    """Return the residuals as a function of rotations, shifts and points."""
    focal, cx, cy, k1, k2, k3, p1, p2 = scene.intrinsics
    turn, observed = torch.from_numpy(scene.turn), torch.from_numpy(scene.xy)
    camera, point = torch.from_numpy(scene.camera), torch.from_numpy(scene.point)
    turn = turn[camera]

    def f(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        w, t = parameters["rotation"][camera], parameters["shift"][camera]
        p = (turn @ parameters["points"][point].unsqueeze(2)).squeeze(2)
        theta2 = (w * w).sum(-1, keepdim=True) + 1e-24
        theta = theta2.sqrt()
        c = torch.linalg.cross(w, p)
        cc = torch.linalg.cross(w, c)
        seen = p + theta.sin() / theta * c + 2 * ((theta / 2).sin() / theta) ** 2 * cc + t
        a, b = (seen[:, :2] / seen[:, 2:]).unbind(1)
        r2 = a * a + b * b
        radial = 1 + r2 * (k1 + r2 * (k2 + r2 * k3))
        u = a * radial + 2 * p1 * a * b + p2 * (r2 + 2 * a * a)
        v = b * radial + 2 * p2 * a * b + p1 * (r2 + 2 * b * b)
        return torch.stack([focal * u + cx, focal * v + cy], 1) - observed

    return f


# -- a custom Function --------------------------------------------------------------------------


def _skew(w: Array) -> Array:
    """Return the matrices of w ↦ w × p."""
    K = np.zeros((*w.shape, 3))
    K[..., 2, 1], K[..., 0, 2], K[..., 1, 0] = w[..., 0], w[..., 1], w[..., 2]
    return K - K.swapaxes(-1, -2)


def _exp(w: Array) -> tuple[Array, Array]:
    """Return rotation matrices and the left Jacobians D: exp(w + dw) = exp(D·dw)·exp(w)."""
    K = _skew(w)
    theta = np.sqrt((w * w).sum(-1) + 1e-24)[:, None, None]
    sine, cosine = np.sin(theta) / theta, 2 * (np.sin(theta / 2) / theta) ** 2
    # 1 − sin θ / θ cancels for small angles; its series does not.
    third = np.where(theta < 1e-2, 1 / 6 - theta**2 / 120, (1 - sine) / theta**2)
    return np.eye(3) + sine * K + cosine * K @ K, np.eye(3) + cosine * K + third * K @ K


class NumpyReprojection(torch.autograd.Function):
    """The residuals in NumPy: autograd sees nothing of them but `jvp` and `backward`.

    `forward` works out the 2 x 6 and 2 x 3 blocks of the Jacobian by hand. The products only
    gather, multiply small matrices, and add up.
    """

    @staticmethod
    def forward(
        ctx: Any, rotation: torch.Tensor, shift: torch.Tensor, points: torch.Tensor, scene: Scene
    ) -> torch.Tensor:
        focal, cx, cy, k1, k2, k3, p1, p2 = scene.intrinsics
        R, D = _exp(rotation.numpy())
        turned = (R @ scene.turn)[scene.camera]
        q = (turned @ points.numpy()[scene.point][:, :, None])[:, :, 0]
        seen = q + shift.numpy()[scene.camera]
        a, b, depth = seen[:, 0] / seen[:, 2], seen[:, 1] / seen[:, 2], seen[:, 2]
        r2 = a * a + b * b
        radial = 1 + r2 * (k1 + r2 * (k2 + r2 * k3))
        slope = 2 * (k1 + r2 * (2 * k2 + 3 * k3 * r2))  # of radial, by a: slope·a
        u = a * radial + 2 * p1 * a * b + p2 * (r2 + 2 * a * a)
        v = b * radial + 2 * p2 * a * b + p1 * (r2 + 2 * b * b)

        cross = slope * a * b + 2 * p1 * a + 2 * p2 * b
        lens = np.empty((len(a), 2, 2))
        lens[:, 0, 0] = radial + slope * a * a + 2 * p1 * b + 6 * p2 * a
        lens[:, 0, 1] = lens[:, 1, 0] = cross
        lens[:, 1, 1] = radial + slope * b * b + 2 * p2 * a + 6 * p1 * b
        rays = np.zeros((len(a), 2, 3))
        rays[:, 0, 0] = rays[:, 1, 1] = 1 / depth
        rays[:, 0, 2], rays[:, 1, 2] = -a / depth, -b / depth
        project = focal * lens @ rays
        ctx.by_camera = np.concatenate([-project @ _skew(q) @ D[scene.camera], project], 2)
        ctx.by_point = project @ turned
        ctx.scene, ctx.counts = scene, (len(rotation), len(points))
        return torch.from_numpy(np.stack([focal * u + cx, focal * v + cy], 1) - scene.xy)

    @staticmethod
    def jvp(ctx: Any, dw: Any, dt: Any, dx: Any, _: None) -> torch.Tensor:
        cameras, points = ctx.counts
        zero = torch.zeros(max(cameras, points), 3, dtype=torch.float64)
        dw, dt = (zero[:cameras] if d is None else d for d in (dw, dt))
        pose = torch.cat([dw, dt], 1).numpy()[ctx.scene.camera]
        move = (zero[:points] if dx is None else dx).numpy()[ctx.scene.point]
        change = ctx.by_camera @ pose[:, :, None] + ctx.by_point @ move[:, :, None]
        return torch.from_numpy(change[:, :, 0])

    @staticmethod
    def backward(ctx: Any, u: torch.Tensor) -> Any:
        cameras, points = ctx.counts
        row = u.numpy()[:, None, :]
        pose = _sums((row @ ctx.by_camera)[:, 0], ctx.scene.camera, cameras)
        moved = _sums((row @ ctx.by_point)[:, 0], ctx.scene.point, points)
        return (*map(torch.from_numpy, (pose[:, :3], pose[:, 3:], moved)), None)


def _sums(rows: Array, where: NDArray[np.int64], count: int) -> Array:
    """Add the rows that go to the same place."""
    columns = [np.bincount(where, column, minlength=count) for column in rows.T]
    return np.stack(columns, 1)


def residual_in_numpy(scene: Scene) -> Any:
    """Return the same residuals as `residual_in_torch`, from the custom Function."""

    def f(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs = (parameters[name] for name in ("rotation", "shift", "points"))
        result: torch.Tensor = NumpyReprojection.apply(*inputs, scene)
        return result

    return f
