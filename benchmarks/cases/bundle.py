"""Bundle adjustment: reprojection residuals of real cameras (`examples/data/bundle`)."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.case import Case, Limit, Problem, Tensors, numpy, randn
from examples.bundle.data import read


def _cross(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.linalg.cross(a, b)


def problem(name: str, count: int | None, dtype: torch.dtype) -> Problem:
    """Return the residuals in pixels, by rotations (axis times angle), shifts and points."""
    scene = read(name)
    keep = slice(count)
    focal, cx, cy, k1, k2, k3, p1, p2 = scene.intrinsics
    cast = lambda a: torch.tensor(a, dtype=dtype)  # noqa: E731
    start, observed = cast(scene.turn), cast(scene.xy[keep])
    camera, point = torch.tensor(scene.camera[keep]), torch.tensor(scene.point[keep])
    # The files hold the solution's rotations: some way off it, no derivative is special.
    omega = randn(len(start), 3, dtype=dtype, seed=5) * 0.01
    primals = (omega, cast(scene.shift), cast(scene.points))

    def rotate(w: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        theta2 = (w * w).sum(-1, keepdim=True) + 1e-12
        theta = theta2.sqrt()
        c = _cross(w, p)
        return p + torch.sin(theta) / theta * c + (1 - torch.cos(theta)) / theta2 * _cross(w, c)

    def project(x: torch.Tensor) -> torch.Tensor:
        a, b = (x[:, :2] / x[:, 2:]).unbind(1)
        r2 = a * a + b * b
        radial = 1 + r2 * (k1 + r2 * (k2 + r2 * k3))
        u = a * radial + 2 * p1 * a * b + p2 * (r2 + 2 * a * a)
        v = b * radial + 2 * p2 * a * b + p1 * (r2 + 2 * b * b)
        return torch.stack([focal * u + cx, focal * v + cy], 1)

    def turned(x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(start[camera], x[point].unsqueeze(2)).squeeze(2)

    def f(w: torch.Tensor, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return project(rotate(w[camera], turned(x)) + t[camera]) - observed

    def blocks() -> Tensors:
        """Return the derivatives of each residual by rotation, shift and point, (n, 2, 3)."""
        w, t, x = primals
        seen = rotate(w[camera], turned(x)) + t[camera]
        by_position = torch.func.vmap(torch.func.jacrev(lambda s: project(s[None])[0]))(seen)
        by_rotation = torch.func.vmap(torch.func.jacrev(rotate))(w[camera], turned(x))
        by_turned = torch.func.vmap(torch.func.jacrev(rotate, 1))(w[camera], turned(x))
        return by_position, by_rotation, torch.bmm(by_turned, start[camera])

    def sums(part: torch.Tensor, where: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(like).index_add_(0, where, part)

    def limit() -> Limit:
        project_, rotation, move = blocks()
        w, t, x = primals

        def jvp(dw: torch.Tensor, dt: torch.Tensor, dx: torch.Tensor) -> torch.Tensor:
            # A camera's and a point's part, then the projection, marker by marker.
            d = torch.baddbmm(dt[camera].unsqueeze(2), rotation, dw[camera].unsqueeze(2))
            d = torch.baddbmm(d, move, dx[point].unsqueeze(2))
            return torch.bmm(project_, d).squeeze(2)

        def vjp(u: torch.Tensor) -> Tensors:
            s = torch.bmm(u.unsqueeze(1), project_)
            return (
                sums(torch.bmm(s, rotation).squeeze(1), camera, w),
                sums(s.squeeze(1), camera, t),
                sums(torch.bmm(s, move).squeeze(1), point, x),
            )

        return Limit(jvp, vjp)

    def dense() -> Limit:
        project_, rotation, move = blocks()
        whole = torch.cat([torch.bmm(project_, rotation), project_], 2).contiguous()
        by_point = torch.bmm(project_, move)
        w, _, x = primals

        def jvp(dw: torch.Tensor, dt: torch.Tensor, dx: torch.Tensor) -> torch.Tensor:
            pose = torch.cat([dw, dt], 1)[camera].unsqueeze(2)
            d = torch.bmm(whole, pose)
            return torch.baddbmm(d, by_point, dx[point].unsqueeze(2)).squeeze(2)

        def vjp(u: torch.Tensor) -> Tensors:
            u = u.unsqueeze(1)
            pose = torch.zeros(len(w), 6, dtype=dtype)
            pose.index_add_(0, camera, torch.bmm(u, whole).squeeze(1))
            return pose[:, :3], pose[:, 3:], sums(torch.bmm(u, by_point).squeeze(1), point, x)

        return Limit(jvp, vjp)

    def jax() -> Any:
        import jax.numpy as jnp

        cam, pts, base, target = (numpy(a) for a in (camera, point, start, observed))

        def g(w: Any, t: Any, x: Any) -> Any:
            w, p = w[cam], jnp.einsum("nij,nj->ni", base[cam], x[pts])
            theta2 = (w * w).sum(-1, keepdims=True) + 1e-12
            theta = jnp.sqrt(theta2)
            c = jnp.cross(w, p)
            s = p + jnp.sin(theta) / theta * c + (1 - jnp.cos(theta)) / theta2 * jnp.cross(w, c)
            s = s + t[cam]
            a, b = s[:, 0] / s[:, 2], s[:, 1] / s[:, 2]
            r2 = a * a + b * b
            radial = 1 + r2 * (k1 + r2 * (k2 + r2 * k3))
            u = a * radial + 2 * p1 * a * b + p2 * (r2 + 2 * a * a)
            v = b * radial + 2 * p2 * a * b + p1 * (r2 + 2 * b * b)
            return jnp.stack([focal * u + cx, focal * v + cy], 1) - target

        return g, [numpy(t) for t in primals]

    return Problem(f, primals, limit, dense, jax)


CASES = tuple(
    Case(
        f"bundle adjustment, {name}",
        size,
        lambda dtype, file=file, count=count: problem(file, count, dtype),
        kind="bundle",
    )
    for name, file, count, size in (
        ("300 markers", "problem_01.bin", 300, "small"),
        ("5,421 markers", "problem_01.bin", None, "medium"),
        ("6,184 markers", "problem_03.bin", None, "large"),
    )
)
