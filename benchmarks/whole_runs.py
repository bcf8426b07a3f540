"""Whole runs of Levenberg-Marquardt: bundle adjustment of real cameras, from start to end.

Unlike the loops of `benchmarks.outer`, points are those that a solver goes to, both directions
are asked for, and what happens between the products counts as well. All engines take the same
steps: each of them solves its linear system by a fixed number of conjugate gradients, on JᵀJ plus
a multiple of the identity. Their last costs are compared before any is timed.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

import linearize as lz
from benchmarks.case import Problem, Tensors, randn
from benchmarks.cases import bundle
from benchmarks.engines import NotInstalledError, forget_programs
from benchmarks.steps import (
    COMPILED,
    COMPILED_F,
    DOUBLE,
    FORWARD,
    JITTED,
    OURS,
    fresh,
    with_jax,
)

STEPS, INNER, ROUNDS = 10, 10, 2
#: How far the start is from what the file holds, relative to the size of each argument.
AWAY = 1e-3
#: By how much costs may differ, relatively.
TOLERANCE = 1e-6
Vector: TypeAlias = Any


@dataclasses.dataclass(frozen=True)
class Point:
    """Where a run is: half the sum of squares, and the step for a damping."""

    cost: float
    step: Callable[[float], Vector]


#: From a flat vector to the point there.
To: TypeAlias = Callable[[Vector], Point]


def run(to: To, start: Vector) -> float:
    """Take `STEPS` steps and return the cost at the end."""
    x, here, damping = start, to(start), 1e-2
    for _ in range(STEPS):
        there_x = x + here.step(damping)
        there = to(there_x)
        if there.cost < here.cost:
            x, here, damping = there_x, there, damping / 5
        else:
            damping *= 10
    return here.cost


def conjugate_gradients(product: Callable[[Vector], Vector], b: Vector) -> Vector:
    """Return what `INNER` steps make of the solution."""
    x, r = torch.zeros_like(b), b
    p, rr = r, r @ r
    for _ in range(INNER):
        q = product(p)
        a = rr / (p @ q)
        x, r = x + a * p, r - a * q
        rr, old = r @ r, rr
        p = r + (rr / old) * p
    return x


# -- the engines ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Maps:
    """The value at a point and both products, of the shapes that f has."""

    value: torch.Tensor
    push: Callable[..., torch.Tensor]
    pull: Callable[[torch.Tensor], Tensors]


def by_torch(problem: Problem, maps: Callable[[Tensors], Maps]) -> To:
    """Return points whose steps are made of an engine's products."""
    shapes = [p.shape for p in problem.primals]
    sizes = [p.numel() for p in problem.primals]

    def split(x: torch.Tensor) -> Tensors:
        return tuple(t.view(s) for t, s in zip(x.split(sizes), shapes, strict=True))

    def joined(ts: Tensors) -> torch.Tensor:
        return torch.cat([t.reshape(-1) for t in ts])

    def to(x: torch.Tensor) -> Point:
        made = maps(split(x))

        def step(damping: float) -> torch.Tensor:
            def damped(v: torch.Tensor) -> torch.Tensor:
                return joined(made.pull(made.push(*split(v)))) + damping * v

            return conjugate_gradients(damped, -joined(made.pull(made.value)))

        return Point(0.5 * float(made.value.square().sum()), step)

    return to


def ours(f: Callable[..., Any], **options: Any) -> Callable[[Tensors], Maps]:
    """Return the points of one `Linearizer`."""
    forget_programs()
    lin = lz.Linearizer(f, maxsize=0, **options)

    def maps(x: Tensors) -> Maps:
        here = lin.at(*x)
        return Maps(here.value, here.jvp_fn, here.vjp_fn)

    return maps


def by_func(problem: Problem) -> To:
    """`torch.func`: f runs for each J·v, and once for all Jᵀ·u."""
    f = problem.f

    def maps(x: Tensors) -> Maps:
        value, pull = torch.func.vjp(f, *x)
        return Maps(value, lambda *v: torch.func.jvp(f, x, v)[1], pull)

    return by_torch(problem, maps)


def by_two_backwards(problem: Problem) -> To:
    """One graph that is kept, with its backward as a graph for J·v."""

    def maps(x: Tensors) -> Maps:
        leaves = [t.detach().requires_grad_() for t in x]
        y = problem.f(*leaves)
        u = torch.zeros_like(y, requires_grad=True)
        pulled = torch.autograd.grad(y, leaves, u, create_graph=True)

        def push(*v: torch.Tensor) -> torch.Tensor:
            return torch.autograd.grad(pulled, u, v, retain_graph=True)[0]

        def pull(u: torch.Tensor) -> Tensors:
            return torch.autograd.grad(y, leaves, u, retain_graph=True)

        return Maps(y.detach(), push, pull)

    return by_torch(problem, maps)


def by_jax(problem: Problem) -> To:
    """Jitted: the cost; the linearization, its transpose and all conjugate gradients."""
    jax, f = with_jax(problem)
    jnp = jax.numpy
    shapes = [tuple(p.shape) for p in problem.primals]
    ends = torch.tensor([p.numel() for p in problem.primals]).cumsum(0).tolist()[:-1]

    def g(x: Any) -> Any:
        parts = zip(jnp.split(x, ends), shapes, strict=True)
        return f(*(t.reshape(s) for t, s in parts))

    @jax.jit
    def cost(x: Any) -> Any:
        return 0.5 * jnp.sum(g(x) ** 2)

    @jax.jit
    def step(x: Any, damping: Any) -> Any:
        value, push = jax.linearize(g, x)
        pull = jax.linear_transpose(push, x)
        b = -pull(value)[0]

        def body(_: int, state: Any) -> Any:
            s, r, p, rr = state
            q = pull(push(p))[0] + damping * p
            a = rr / (p @ q)
            s, r = s + a * p, r - a * q
            new = r @ r
            return s, r, r + (new / rr) * p, new

        return jax.lax.fori_loop(0, INNER, body, (jnp.zeros_like(b), b, b, b @ b))[0]

    return lambda x: Point(float(cost(x)), lambda damping: step(x, damping))


ENGINES: dict[str, Callable[[Problem], To]] = {
    FORWARD: by_func,  # first: the others are compared with it
    OURS: lambda p: by_torch(p, ours(p.f)),
    COMPILED_F: lambda p: by_torch(p, ours(torch.compile(fresh(p.f)))),
    COMPILED: lambda p: by_torch(p, ours(fresh(p.f), compile=True)),
    DOUBLE: by_two_backwards,
    JITTED: by_jax,
}


# -- measured -------------------------------------------------------------------------------


def scaled(name: str) -> Problem:
    """Return the residuals at a start some way off the solution, by unknowns of like weight.

    Marquardt's scaling: one of an unknown changes the residuals by one in all.
    """
    given = bundle.problem(name, None, torch.float64)
    start = tuple(
        p + AWAY * p.abs().mean() * randn(*p.shape, dtype=p.dtype, seed=7 + k)
        for k, p in enumerate(given.primals)
    )
    norms = lz.Linearizer(given.f).at(*start).jacobian.squared_norms().sqrt()
    parts = norms.split([p.numel() for p in start])
    by = tuple(1 / n.view_as(p) for n, p in zip(parts, start, strict=True))

    def f(*x: torch.Tensor) -> torch.Tensor:
        return given.f(*(t * s for t, s in zip(x, by, strict=True)))

    def jax() -> Any:
        g, _ = given.jax()  # type: ignore[misc]
        scales = [s.numpy() for s in by]
        return (lambda *x: g(*(t * s for t, s in zip(x, scales, strict=True)))), start

    primals = tuple(p / s for p, s in zip(start, by, strict=True))
    return dataclasses.replace(given, f=f, primals=primals, jax=jax)


RUNS: dict[str, Callable[[], Problem]] = {
    f"bundle adjustment, {markers} markers, whole run": lambda name=name: scaled(name)
    for markers, name in (("5,421", "problem_01.bin"), ("6,184", "problem_03.bin"))
}


def measure(name: str, make: Callable[[], Problem]) -> dict[str, Any]:
    """Time whole runs; the first one of an engine, with all that is compiled, by itself."""
    problem = make()
    flat = torch.cat([p.reshape(-1) for p in problem.primals])
    begun: dict[str, tuple[To, Vector]] = {}
    found: dict[str, dict[str, Any]] = {}
    wanted = 0.0
    for engine, maker in ENGINES.items():
        try:
            to = maker(problem)
        except (NotInstalledError, NotImplementedError) as error:
            found[engine] = {"fails": f"no {error}"}
            continue
        start = flat if engine != JITTED else with_jax(problem)[0].device_put(flat.numpy())
        first, cost = _timed(to, start)
        wanted = wanted or cost
        if abs(cost - wanted) > TOLERANCE * wanted:
            found[engine] = {"fails": "wrong"}
            continue
        begun[engine], found[engine] = (to, start), {"first": first, "cost": cost}
    later: dict[str, list[float]] = {engine: [] for engine in begun}
    for _ in range(ROUNDS):
        for engine, (to, start) in begun.items():
            later[engine].append(_timed(to, start)[0])
    for engine, times in later.items():
        found[engine]["later"] = statistics.median(times)
    at_start = 0.5 * float(problem.f(*problem.primals).square().sum())
    return {"case": name, "k": 2 * INNER, "run": found, "from": at_start}


def _timed(to: To, start: Vector) -> tuple[float, float]:
    begin = time.process_time()
    cost = run(to, start)
    return time.process_time() - begin, cost
