"""Who is measured in outer loops: ways to go to a point and take K products J·v there."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import time
import types
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

import linearize as lz
from benchmarks.case import Problem, Tensors
from benchmarks.engines import NotInstalledError, double_backward, forget_programs

#: One iteration: the point and the directions, to the products.
Step: TypeAlias = Callable[[Tensors, Sequence[Tensors]], Sequence[Any]]


class Ours:
    """One `Linearizer` for all points, of graphs that nobody met before.

    Parameters
    ----------
    f
        What is linearized.
    options
        Of the `Linearizer`.
    """

    #: What the parts of an iteration are called, see `parts`.
    PARTS = ("at", "first J·v", "second J·v", "further J·v, each", "letting go")

    def __init__(self, f: Callable[..., Any], **options: Any) -> None:
        forget_programs()
        self._lin = lz.Linearizer(f, maxsize=0, **options)

    def __call__(self, x: Tensors, vs: Sequence[Tensors]) -> list[Any]:
        jvp_fn = self._lin.at(*x).jvp_fn
        return [jvp_fn(*v) for v in vs]

    def parts(self, x: Tensors, vs: Sequence[Tensors]) -> list[float]:
        """Return the seconds that the parts of an iteration take; zero where there is none."""
        clock, times = time.process_time, [0.0] * len(self.PARTS)
        last = clock()

        def lap() -> float:
            nonlocal last
            before, last = last, clock()
            return last - before

        jvp_fn = self._lin.at(*x).jvp_fn
        times[0] = lap()
        for place, some in ((1, vs[:1]), (2, vs[1:2]), (3, vs[2:])):
            for v in some:
                jvp_fn(*v)
            times[place] = lap() / max(len(some), 1)
        del jvp_fn
        times[4] = lap()
        return times


_FRESH = itertools.count()


def fresh(f: Callable[..., Any]) -> Callable[..., Any]:
    """Return f as a function for which nothing was compiled: that is kept by code objects."""

    def g(*primals: torch.Tensor) -> Any:
        return f(*primals)

    code = g.__code__.replace(co_name=f"f{next(_FRESH)}")
    return types.FunctionType(code, g.__globals__, code.co_name, None, g.__closure__)


def compiled_function(problem: Problem) -> Step:
    """One `Linearizer` for a function under `torch.compile`."""
    return Ours(torch.compile(fresh(problem.f)))


def compiled(problem: Problem) -> Step:
    """`Linearizer(f, compile=True)`."""
    return Ours(fresh(problem.f), compile=True)


def forward_mode(problem: Problem) -> Step:
    """`torch.func.jvp`, which runs f at each product."""
    f = problem.functional or problem.f
    return lambda x, vs: [torch.func.jvp(f, x, v)[1] for v in vs]


def func_linearize(problem: Problem) -> Step:
    """`torch.func.linearize`, at each point anew."""
    f = problem.functional or problem.f

    def step(x: Tensors, vs: Sequence[Tensors]) -> list[Any]:
        push = torch.func.linearize(f, *x)[1]
        return [push(*v) for v in vs]

    return step


def two_backwards(problem: Problem) -> Step:
    """The trick with two backwards, with the graph of the first kept."""

    def step(x: Tensors, vs: Sequence[Tensors]) -> list[Any]:
        jvp = double_backward(dataclasses.replace(problem, primals=x)).jvp
        assert jvp is not None
        return [jvp(*v) for v in vs]

    return step


def with_jax(problem: Problem) -> Any:
    """Return the module and the function, where both are there."""
    if importlib.util.find_spec("jax") is None:
        raise NotInstalledError("jax")
    if problem.jax is None:
        raise NotImplementedError("no counterpart")
    import jax

    jax.config.update("jax_enable_x64", val=True)
    return jax, problem.jax()[0]


def jitted(problem: Problem) -> Step:
    """`jax.jit` around `jax.linearize` and a scan over the products."""
    jax, f = with_jax(problem)

    @jax.jit
    def run(x: Any, vs: Any) -> Any:
        _, push = jax.linearize(f, *x)
        return jax.lax.map(lambda v: push(*v), vs)

    stacks: dict[int, Any] = {}

    def step(x: Tensors, vs: Sequence[Tensors]) -> list[Any]:
        if len(vs) not in stacks:  # directions are at hand in the form that an engine wants
            columns = [torch.stack(c).numpy() for c in zip(*vs, strict=True)]
            stacks[len(vs)] = [jax.device_put(c) for c in columns]
        given = [jax.device_put(t.numpy()) for t in x]
        out = jax.block_until_ready(run(given, stacks[len(vs)]))
        return list(out) if not isinstance(out, (tuple, list)) else list(zip(*out, strict=True))

    return step


OURS, COMPILED_F, COMPILED = "linearize", "linearize, compiled f", "linearize, compile=True"
FORWARD, DOUBLE, JITTED = "torch.func.jvp", "double backward", "jax.jit"
ENGINES: dict[str, Callable[[Problem], Step]] = {
    OURS: lambda problem: Ours(problem.f),
    COMPILED_F: compiled_function,
    COMPILED: compiled,
    FORWARD: forward_mode,
    "torch.func.linearize": func_linearize,
    DOUBLE: two_backwards,
    JITTED: jitted,
}
