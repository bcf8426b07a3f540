"""Magnetic resonance imaging: an image and the sensitivities of the coils that saw it.

The head phantom of Shepp and Logan, in complex numbers, seen by four coils that each measure a
part of its Fourier transform. Image and coils are found together by Gauss–Newton steps with
damping (Uecker, Hohage, Block and Frahm, "Image reconstruction by regularized nonlinear
inversion", Magnetic Resonance in Medicine 60, 2008), each by LSMR.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, lsmr
from torch.func import jvp, vjp

import linearize as lz

from .job import Counted, Job

#: Intensity, half axes, centre and angle of the ellipses, in the modified version of Toft.
ELLIPSES = (
    (1.0, 0.69, 0.92, 0.0, 0.0, 0),
    (-0.8, 0.6624, 0.874, 0.0, -0.0184, 0),
    (-0.2, 0.11, 0.31, 0.22, 0.0, -18),
    (-0.2, 0.16, 0.41, -0.22, 0.0, 18),
    (0.1, 0.21, 0.25, 0.0, 0.35, 0),
    (0.1, 0.046, 0.046, 0.0, 0.1, 0),
    (0.1, 0.046, 0.046, 0.0, -0.1, 0),
    (0.1, 0.046, 0.023, -0.08, -0.605, 0),
    (0.1, 0.023, 0.023, 0.0, -0.606, 0),
    (0.1, 0.023, 0.046, 0.06, -0.605, 0),
)
STEPS, ITERATIONS = 6, 12


def phantom(n: int) -> Any:
    axis = np.linspace(-1, 1, n)
    x, y = axis[None], -axis[:, None]
    image = np.zeros((n, n))
    for value, a, b, x0, y0, angle in ELLIPSES:
        c, s = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
        u, v = (x - x0) * c + (y - y0) * s, (y - y0) * c - (x - x0) * s
        image[(u / a) ** 2 + (v / b) ** 2 <= 1] += value
    return image


@dataclasses.dataclass
class Problem:
    f: Counted
    data: torch.Tensor
    start: dict[str, torch.Tensor]
    mask: torch.Tensor
    smooth: torch.Tensor
    known: list[Any] = dataclasses.field(default_factory=list)


def make(quick: bool) -> Problem:
    n, coils = (12, 2) if quick else (64, 4)
    rng = np.random.default_rng(0)
    image = torch.from_numpy(phantom(n) * np.exp(0.5j * np.linspace(-1, 1, n)[:, None]))
    angle = 2 * np.pi * np.arange(coils)[:, None, None] / coils
    x, y = np.meshgrid(np.linspace(-1, 1, n), np.linspace(-1, 1, n))
    far = (x - 1.3 * np.cos(angle)) ** 2 + (y - 1.3 * np.sin(angle)) ** 2
    coil = torch.from_numpy(np.exp(-far / 2 + 1j * angle))
    rows = rng.random(n) < 0.5
    rows[n // 2 - n // 8 : n // 2 + n // 8] = True
    mask = torch.fft.ifftshift(torch.from_numpy(rows).double())[:, None]
    # Coils are smooth: their Fourier coefficients fall off.
    k = np.fft.fftfreq(n) * n
    smooth = torch.from_numpy((1 + 0.05 * (k[:, None] ** 2 + k**2)) ** -2.0)

    def f(p: dict[str, torch.Tensor]) -> torch.Tensor:
        return mask * torch.fft.fft2(p["image"] * torch.fft.ifft2(smooth * p["coils"]) * n)

    data = mask * torch.fft.fft2(image * coil)
    flat = torch.zeros(coils, n, n, dtype=torch.complex128)
    flat[:, 0, 0] = 1
    start = {"image": torch.ones(n, n, dtype=torch.complex128), "coils": flat}
    return Problem(Counted(f), data, start, mask, smooth)


def by_linearize(problem: Problem) -> Any:
    lin, p = lz.Linearizer(problem.f), problem.start
    for step in range(STEPS):
        here = lin.at(p)
        A, b = here.jacobian.to_scipy(), (problem.data - here.value).numpy().ravel()
        change = lsmr(A, b, damp=0.5**step, maxiter=ITERATIONS)[0]
        change = here.jacobian.in_space.unravel(torch.from_numpy(change))
        p = {name: t + change[name] for name, t in p.items()}
    return p


def by_torch(problem: Problem) -> Any:
    p, f = problem.start, problem.f
    sizes, shapes = [t.numel() for t in p.values()], [t.shape for t in p.values()]

    def tree(x: Any) -> dict[str, torch.Tensor]:
        parts = torch.as_tensor(x.astype(complex)).view(-1).split(sizes)
        return {n: t.view(shape) for n, t, shape in zip(p, parts, shapes, strict=True)}

    for step in range(STEPS):
        value, pull = vjp(f, p)

        def forward(v: Any, p: Any = p) -> Any:
            return jvp(f, (p,), (tree(v),))[1].numpy().ravel()

        def back(u: Any, pull: Any = pull) -> Any:
            (found,) = pull(torch.from_numpy(u.astype(complex)).view_as(problem.data))
            return torch.cat([t.reshape(-1) for t in found.values()]).resolve_conj().numpy()

        A = LinearOperator((value.numel(), sum(sizes)), forward, back, dtype=complex)
        b = (problem.data - value).numpy().ravel()
        change = tree(lsmr(A, b, damp=0.5**step, maxiter=ITERATIONS)[0])
        p = {name: t + change[name] for name, t in p.items()}
    return p


def by_scipy(problem: Problem) -> Any:
    mask, smooth, data = problem.mask.numpy(), problem.smooth.numpy(), problem.data.numpy()
    image, coils = problem.start["image"].numpy(), problem.start["coils"].numpy()
    n, coil, fft, ifft = len(image), coils.shape, np.fft.fft2, np.fft.ifft2
    for step in range(STEPS):
        seen = ifft(smooth * coils) * n

        def forward(v: Any, image: Any = image, seen: Any = seen) -> Any:
            d, c = v[: n * n].reshape(n, n), v[n * n :].reshape(coil)
            return (mask * fft(d * seen + image * ifft(smooth * c) * n)).ravel()

        def back(u: Any, image: Any = image, seen: Any = seen) -> Any:
            w = ifft(mask * u.reshape(data.shape)) * n**2
            c = smooth * fft(image.conj() * w) / n
            return np.concatenate([(seen.conj() * w).sum(0).ravel(), c.ravel()])

        size = image.size + coils.size
        A = LinearOperator((data.size, size), forward, back, dtype=complex)
        b = (data - mask * fft(image * seen)).ravel()
        change = lsmr(A, b, damp=0.5**step, maxiter=ITERATIONS)[0]
        image = image + change[: n * n].reshape(n, n)
        coils = coils + change[n * n :].reshape(coils.shape)
    return {"image": torch.from_numpy(image), "coils": torch.from_numpy(coils)}


def error(problem: Problem, found: Any) -> float:
    """Compare with the same steps, written in NumPy with derivatives by hand."""
    if not problem.known:
        problem.known.append(by_scipy(problem))
    known = problem.known[0]
    return max(float((found[n] - t).norm() / t.norm()) for n, t in known.items())


JOB = Job(
    "Magnetic resonance imaging",
    make,
    error,
    1e-6,
    {"linearize": by_linearize, "torch.func": by_torch, "SciPy alone": by_scipy},
)
