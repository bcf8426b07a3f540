"""Who is measured: ways to apply a Jacobian again and again at one point.

An engine makes a `Made` from a problem: the two products, from tensors to a tuple of tensors. A
direction that an engine does not have is None. All of them are made by the same means that a
user would use.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch

import linearize as lz
from benchmarks.case import Map, Problem, Tensors, flat, single
from linearize._reuse.shared import SHARED


@dataclasses.dataclass(frozen=True)
class Made:
    """The products of one engine at one point.

    Attributes
    ----------
    jvp, vjp
        From tangents to outputs, from cotangents to the primals' cotangents.
    convert
        What arguments are turned into beforehand, outside the time that is taken.
    wait
        Called with a result, waits until it is there.
    """

    jvp: Map | None
    vjp: Map | None = None
    convert: Callable[[torch.Tensor], Any] = lambda t: t
    wait: Callable[[Any], Any] = lambda y: y


class NotInstalledError(Exception):
    """An optional peer is missing."""


def forget_programs() -> None:
    """Let the graphs to come be such that nobody met before."""
    SHARED.clear()


def ours(problem: Problem) -> Made:
    """One run, then recorded and simplified programs; of graphs that nobody met before."""
    forget_programs()
    return point(lz.Linearizer(problem.f, maxsize=1), problem.primals)


def compiled(problem: Problem) -> Made:
    """The same through `torch.compile`."""
    forget_programs()
    return point(lz.Linearizer(problem.f, maxsize=1, compile=True), problem.primals)


def point(lin: lz.Linearizer, primals: Tensors) -> Made:
    """Return the products at a point; lone cotangents go in as they are."""
    here = lin.at(*primals)
    vjp_fn = here.vjp_fn
    if isinstance(here.value, torch.Tensor):
        return Made(here.jvp_fn, vjp_fn)
    return Made(here.jvp_fn, lambda *u: vjp_fn(u))


def func_each(problem: Problem) -> Made:
    """PyTorch's forward mode, f run at every product; its vjp keeps a graph."""
    f, primals = problem.functional or problem.f, problem.primals
    _, pull = torch.func.vjp(f, *primals)
    return Made(lambda *v: torch.func.jvp(f, primals, v)[1], lambda *u: pull(single(u)))


def func_linearize(problem: Problem) -> Made:
    """PyTorch's `linearize`: f runs twice, and is traced; there is no transpose."""
    _, push = torch.func.linearize(problem.functional or problem.f, *problem.primals)
    return Made(push)


def double_backward(problem: Problem) -> Made:
    """The trick with two backwards, with the graph of the first kept."""
    leaves = [p.detach().requires_grad_() for p in problem.primals]
    y = flat(problem.f(*leaves))
    u = tuple(torch.zeros_like(t, requires_grad=True) for t in y)
    pulled = torch.autograd.grad(y, leaves, u, create_graph=True)

    def jvp(*v: torch.Tensor) -> Tensors:
        return torch.autograd.grad(pulled, u, v, retain_graph=True)

    def vjp(*u: torch.Tensor) -> Tensors:
        return torch.autograd.grad(y, leaves, u, retain_graph=True)

    return Made(jvp, vjp)


def functional(problem: Problem) -> Made:
    """`torch.autograd.functional`: everything anew at every product."""
    f, primals = problem.f, problem.primals
    return Made(
        lambda *v: torch.autograd.functional.jvp(f, primals, v)[1],
        lambda *u: torch.autograd.functional.vjp(f, primals, single(u))[1],
    )


def _jax(problem: Problem) -> tuple[Any, Callable[..., Any], list[Any]]:
    if importlib.util.find_spec("jax") is None:
        raise NotInstalledError("jax")
    if problem.jax is None:
        raise NotImplementedError("no counterpart")
    import jax

    jax.config.update("jax_enable_x64", val=True)
    f, primals = problem.jax()
    return jax, f, [jax.device_put(p) for p in primals]


def _jax_made(jax: Any, jvp: Map, vjp: Map) -> Made:
    return Made(jvp, vjp, lambda t: jax.device_put(t.numpy()), jax.block_until_ready)


def jax_baked(problem: Problem) -> Made:
    """`jax.jit` of `jax.linearize`'s and `jax.vjp`'s maps, their residuals constants."""
    jax, f, primals = _jax(problem)
    push = jax.jit(jax.linearize(f, *primals)[1])
    pull = jax.jit(jax.vjp(f, *primals)[1])
    return _jax_made(jax, push, lambda *u: pull(single(u)))


def jax_arguments(problem: Problem) -> Made:
    """The same maps, their residuals arguments of the compiled function."""
    jax, f, primals = _jax(problem)
    apply = jax.jit(lambda fn, *v: fn(*v))
    push, pull = jax.linearize(f, *primals)[1], jax.vjp(f, *primals)[1]
    return _jax_made(jax, lambda *v: apply(push, *v), lambda *u: apply(pull, single(u)))


def limit(problem: Problem) -> Made:
    """By hand."""
    made = problem.limit()
    return Made(made.jvp, made.vjp)


def dense(problem: Problem) -> Made:
    """By hand, with small Jacobians as matrices."""
    if problem.dense is None:
        raise NotImplementedError("no such limit")
    made = problem.dense()
    return Made(made.jvp, made.vjp)


OURS, LIMIT, DENSE = "linearize", "limit", "limit (matrices)"
#: Takes part if it is asked for: it compiles for minutes.
COMPILED = "linearize, compiled"
ENGINES: dict[str, Callable[[Problem], Made]] = {
    OURS: ours,
    "torch.func.jvp, vjp": func_each,
    "torch.func.linearize": func_linearize,
    "double backward": double_backward,
    "autograd.functional": functional,
    "jax, baked": jax_baked,
    "jax, arguments": jax_arguments,
    LIMIT: limit,
    DENSE: dense,
}
TORCH_PEERS: Sequence[str] = [*ENGINES][1:5]
JAX_PEERS: Sequence[str] = [*ENGINES][5:7]
