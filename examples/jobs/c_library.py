"""Newton–Krylov over a C library.

The Poisson–Boltzmann equation -Δu + κ² sinh(u) = ρ around two charged disks in a salt solution,
on a square, times h². sinh and cosh are those of the C library, called through `ctypes`.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import dataclasses
import functools
from typing import Any

import numpy as np
import scipy.fft
import scipy.sparse
import torch
from scipy.optimize import root
from scipy.sparse.linalg import LinearOperator, spsolve

import linearize as lz
import linearize.scipy

from .job import Counted, Job


@functools.cache
def in_c(name: str) -> Any:
    """Return a function of the C library for arrays of float64."""
    function = getattr(ctypes.CDLL(ctypes.util.find_library("m")), name)
    function.argtypes, function.restype = [ctypes.c_double], ctypes.c_double

    def every(x: Any) -> Any:
        return np.array([function(t) for t in x.ravel().tolist()]).reshape(x.shape)

    return every


class Sinh(torch.autograd.Function):
    """sinh by the C library: nothing of it is seen by autograd."""

    @staticmethod
    def forward(ctx: Any, u: torch.Tensor) -> torch.Tensor:
        ctx.slope = torch.from_numpy(in_c("cosh")(u.numpy()))
        return torch.from_numpy(in_c("sinh")(u.numpy()))

    @staticmethod
    def jvp(ctx: Any, v: torch.Tensor) -> torch.Tensor:
        return ctx.slope * v

    backward = jvp


@dataclasses.dataclass
class Problem:
    f: Counted
    start: Any
    charge: Any
    h: float
    kept: dict[str, Any] = dataclasses.field(default_factory=dict)


STRENGTH = 40.0


def make(quick: bool) -> Problem:
    n = 15 if quick else 40
    h = 1 / (n + 1)
    x = np.linspace(h, 1 - h, n)
    charge = np.zeros((n, n))
    for centre, sign in (((0.3, 0.4), 1.0), ((0.7, 0.6), -1.0)):
        far = np.hypot(x[:, None] - centre[0], x[None] - centre[1])
        charge += sign * 400 * (far < 0.1)

    def f(u: torch.Tensor) -> torch.Tensor:
        p = torch.nn.functional.pad(u, (1, 1, 1, 1))
        around = p[2:, 1:-1] + p[:-2, 1:-1] + p[1:-1, 2:] + p[1:-1, :-2]
        return 4 * u - around + h**2 * (STRENGTH * Sinh.apply(u) - torch.from_numpy(charge))

    return Problem(Counted(f), torch.zeros(n, n, dtype=torch.float64), charge, h)


def inverse_laplacian(problem: Problem) -> LinearOperator:
    """Return the inverse of -Δ by fast sine transforms: a preconditioner."""
    n = len(problem.charge)
    axis = 2 - 2 * np.cos(np.pi * np.arange(1, n + 1) / (n + 1))
    values = axis[:, None] + axis + problem.h**2 * STRENGTH

    def solve(b: Any) -> Any:
        return scipy.fft.idstn(scipy.fft.dstn(b.reshape(n, n), 1) / values, 1).ravel()

    return LinearOperator((n * n, n * n), solve, dtype=float)


def by_linearize(problem: Problem) -> Any:
    M = inverse_laplacian(problem)
    found = lz.scipy.newton_krylov(problem.f, problem.start, preconditioner=M, tol=1e-10)
    return found.x.numpy()


def by_scipy(problem: Problem) -> Any:
    n = len(problem.charge)
    M = inverse_laplacian(problem)
    fun = lambda u: problem.f(torch.from_numpy(u).view(n, n)).numpy().ravel()  # noqa: E731
    options = {"fatol": 1e-10, "jac_options": {"inner_M": M}}
    return root(fun, np.zeros(n * n), method="krylov", options=options).x.reshape(n, n)


def by_lineax(problem: Problem) -> Any:
    import jax
    import jax.numpy as jnp
    import lineax as lx

    jax.config.update("jax_enable_x64", val=True)
    n = len(problem.charge)

    def called(name: str, u: Any) -> Any:
        return jax.pure_callback(lambda u: in_c(name)(np.asarray(u)), u, u)

    sinh = jax.custom_jvp(lambda u: called("sinh", u))
    sinh.defjvp(lambda u, v: (sinh(*u), called("cosh", *u) * v[0]))

    def f(u: Any, args: Any = None) -> Any:
        p = jnp.pad(u, 1)
        around = p[2:, 1:-1] + p[:-2, 1:-1] + p[1:-1, 2:] + p[1:-1, :-2]
        return 4 * u - around + problem.h**2 * (STRENGTH * sinh(u) - problem.charge)

    axis = 2 - 2 * np.cos(np.pi * np.arange(1, n + 1) / (n + 1))
    sines = np.sin(np.pi * np.outer(np.arange(1, n + 1), np.arange(1, n + 1)) / (n + 1))
    values = (axis[:, None] + axis + problem.h**2 * STRENGTH) * ((n + 1) / 2) ** 2
    like = jax.ShapeDtypeStruct((n, n), float)
    M = lx.FunctionLinearOperator(lambda b: sines @ ((sines @ b @ sines) / values) @ sines, like)

    def step(u: Any) -> tuple[Any, Any]:
        J = lx.JacobianLinearOperator(f, u, jac="fwd")
        solver = lx.GMRES(rtol=1e-6, atol=1e-12)
        d = lx.linear_solve(J, -f(u), solver, options={"preconditioner": M}, throw=False)
        size = jnp.linalg.norm(f(u))
        t = jax.lax.while_loop(
            lambda t: (jnp.linalg.norm(f(u + t * d.value)) > (1 - 1e-4 * t) * size) & (t > 1e-8),
            lambda t: t / 2,
            1.0,
        )
        return u + t * d.value, jnp.abs(f(u + t * d.value)).max()

    step = problem.kept.setdefault("step", jax.jit(step))  # compiled once
    u, size = jnp.zeros((n, n)), np.inf
    while size > 1e-10:
        u, size = step(u)
    return np.asarray(u)


def error(problem: Problem, found: Any) -> float:
    """Compare with Newton's method in NumPy, its matrices written by hand."""
    n = len(problem.charge)
    line = scipy.sparse.diags_array(
        [np.full(n - 1, -1.0), np.full(n, 2.0), np.full(n - 1, -1.0)], offsets=[-1, 0, 1]
    )
    one = scipy.sparse.eye_array(n)
    A = (scipy.sparse.kron(line, one) + scipy.sparse.kron(one, line)) / problem.h**2
    u = np.zeros(n * n)
    for _ in range(100):
        r = A @ u + STRENGTH * np.sinh(u) - problem.charge.ravel()
        step = spsolve((A + scipy.sparse.diags_array(STRENGTH * np.cosh(u))).tocsc(), r)
        u = u - step / max(1.0, float(np.abs(step).max()))
    return float(np.abs(found.ravel() - u).max())


JOB = Job(
    "Newton–Krylov over a C library",
    make,
    error,
    1e-7,
    {"linearize": by_linearize, "SciPy alone": by_scipy, "lineax": by_lineax},
    refused={"torch.func": "`jvp` refuses the Function, and NumPy in it"},
)
