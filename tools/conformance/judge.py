"""The verdict on one sample of an operator, and on all of them."""

from __future__ import annotations

import collections
import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

import linearize as lz

from .comparing import all_close, inner, size, tolerance
from .database import Problem, problems
from .disputes import disputed
from .references import (
    FINITE,
    Graph,
    Refusals,
    differences,
    differences_confirm,
    forward,
    random_like,
)

#: From what is worst to what says least: the outcome of an operator is its worst sample's.
OUTCOMES = ("wrong", "failed", "refused", "disputed", "right", "not comparable")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What came out for one sample; `kind` says what a wrong one failed at."""

    outcome: str
    reason: str = ""
    kind: str = ""


Directions = Sequence[torch.Tensor]
Product = Callable[[Directions], Directions]
#: Said of a gradient that finite differences prefer to PyTorch's.
AGAINST = "finite differences, against autograd"


class WrongError(Exception):
    """A product or the value is not what it must be."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: " + " ".join(str(error).split())[:400]


def judge(problem: Problem) -> Verdict:
    """Compare value and products of one sample with the references."""
    if not problem.primals:
        return Verdict("not comparable", "no argument requires grad")
    try:
        graph = Graph(problem)
    except Refusals as error:
        return Verdict("not comparable", f"the function raises {_text(error)}")
    if not any(graph.live):
        return Verdict("not comparable", "no output requires grad")
    if any(t.layout != torch.strided for t in (*problem.primals, *graph.value)):
        return _judge_sparse(problem)
    generator = torch.Generator().manual_seed(1)
    u, v = (random_like(side, generator) for side in (graph.value, problem.primals))
    try:
        gradient = graph.gradient(u)
    except Refusals as error:
        return Verdict("not comparable", f"PyTorch has no gradient: {_text(error)}")
    if any(g is not None and g.layout != torch.strided for g in gradient):
        gradient = [None if g is None else g.to_dense() for g in gradient]
    stage = ""
    try:
        here = lz.Linearizer(problem.run, maxsize=0).at(*problem.primals)
        vjp_fn: Product = here.vjp_fn
        jvp_fn: Product = lambda t: here.jvp_fn(*t)  # noqa: E731
        JTu, Jv = _repeated("Jᵀ·u", vjp_fn, u), _repeated("J·v", jvp_fn, v)
        verdict = _compare(graph, here.value, u, v, JTu, Jv, gradient)
        if verdict.outcome != "right":
            return verdict
        # The programs that have taken over, in directions that they have not seen.
        more_u, more_v = (random_like(t, generator) for t in (graph.value, problem.primals))
        more_JTu, more_Jv = vjp_fn(more_u), jvp_fn(more_v)
        if verdict.reason != AGAINST:
            _check_settled(graph, more_u, more_JTu)
        limits = tolerance([*problem.primals, *graph.value])
        _check_adjoint(more_u, more_v, more_JTu, more_Jv, limits)
        _check_layout("Jᵀ·u", vjp_fn, more_u, more_JTu, limits)
        _check_layout("J·v", jvp_fn, more_v, more_Jv, limits)
        stage = "batched products: "
        for _ in range(3):  # at the third call a program for stacks has taken over
            stacked = here.vjp_fn.batched(_stack(u, more_u))
            _check_batched("Jᵀ·u", stacked, _stack(JTu, more_JTu), limits)
            stacked = here.jvp_fn.batched(*_stack(v, more_v))
            _check_batched("J·v", stacked, _stack(Jv, more_Jv), limits)
        return verdict
    except WrongError as wrong:
        return Verdict("wrong", str(wrong), wrong.kind)
    except lz.LinearizeError as error:
        return Verdict("refused", stage + _text(error), "batched" if stage else "")
    except Exception as error:
        return Verdict("failed", f"{stage}raises {_text(error)}", "batched" if stage else "")


def _judge_sparse(problem: Problem) -> Verdict:
    try:
        lz.Linearizer(problem.run, maxsize=0).at(*problem.primals)
    except lz.LinearizeError as error:
        return Verdict("refused", _text(error))
    except Exception as error:
        return Verdict("failed", f"raises {_text(error)}")
    return Verdict("wrong", "a sparse layout was accepted", "sparse")


def _repeated(name: str, product: Product, direction: Directions) -> Directions:
    """Call a product often enough for simplified programs to take over.

    Each call must leave its argument alone and give what the first gave.
    """
    given = [t.clone() for t in direction]
    first = [t.clone() for t in product(given)]
    relative, absolute = tolerance([*first, *direction])
    # A simplified program rounds differently, which single precision amplifies visibly.
    closer = 1000 if relative <= 1e-7 else 1
    limits = relative / closer, absolute / closer
    for count in range(2, 5):
        if not all_close(given, direction, (0.0, 0.0)):
            raise WrongError("repeat", f"a call of {name} changed its argument")
        if not all_close(product(given), first, limits):
            raise WrongError("repeat", f"call {count} of {name} differs from the first")
    return first


def _check_layout(
    name: str,
    product: Product,
    given: Directions,
    expected: Directions,
    limits: tuple[float, float],
) -> None:
    """Call a product with every other entry of a longer direction."""
    apart = [torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0] for t in given]
    if not all_close(product(apart), expected, limits):
        raise WrongError("layout", f"{name} depends on the strides of its argument")


def _stack(a: Directions, b: Directions) -> Directions:
    return [torch.stack(pair) for pair in zip(a, b, strict=True)]


def _check_batched(
    name: str, stacked: Directions, single: Directions, limits: tuple[float, float]
) -> None:
    if not all_close(stacked, single, limits):
        raise WrongError("batched", f"batched {name} differs from the single products")


def _check_settled(graph: Graph, u: Directions, JTu: Directions) -> None:
    limits = tolerance([*graph.primals, *graph.value])
    # In low precision, the gradient may be rounded as badly as the product.
    if limits[0] <= 1e-7 and not all_close(JTu, graph.gradient(u), limits):
        raise WrongError("settled", "a later Jᵀ·u differs from torch.autograd.grad")


def _check_adjoint(
    u: Directions,
    v: Directions,
    JTu: Directions,
    Jv: Directions,
    limits: tuple[float, float],
) -> None:
    left, right = inner(u, Jv), inner(JTu, v)
    room = limits[0] * (size(u, Jv) + size(JTu, v)) + limits[1]
    # Where both are not finite, the sums say nothing.
    if abs(left - right) > room or math.isfinite(left) != math.isfinite(right):
        raise WrongError("adjoint", f"⟨u, J·v⟩ = {left:.9g} but ⟨Jᵀ·u, v⟩ = {right:.9g}")


def _compare(
    graph: Graph,
    value: Directions,
    u: Directions,
    v: Directions,
    JTu: Directions,
    Jv: Directions,
    gradient: Sequence[torch.Tensor | None],
) -> Verdict:
    problem = graph.problem
    limits = tolerance([*problem.primals, *graph.value])
    if not all_close(value, graph.value, limits):
        raise WrongError("value", "the value differs")
    # Differences mean something in double precision only.
    exact = limits[0] <= 1e-7
    precise, room = (problem, FINITE) if exact else (problem.wider(), limits)
    against = not all_close(JTu, gradient, limits)
    if against and not differences_confirm(precise, u, JTu, room):
        raise WrongError("gradient", "Jᵀ·u differs from torch.autograd.grad")
    _check_adjoint(u, v, JTu, Jv, limits)
    native = forward(problem, v)
    if native is not None and all_close(Jv, native, limits):
        return Verdict("right", AGAINST if against else "forward AD")
    twice = graph.twice(u, v)
    by_twice = twice is not None and all_close(Jv, twice, limits)
    if native is None and by_twice:
        return Verdict("right", AGAINST if against else "double backward")
    if all_close(Jv, differences(precise, v), room):
        return Verdict("right", AGAINST if against else "finite differences")
    named = [n for n, r in (("forward AD", native), ("double backward", twice)) if r is not None]
    reason = " and from ".join([*named[:1], "finite differences"])
    also = ", not from double backward" if by_twice else ""
    raise WrongError("tangent", f"J·v differs from {reason}{also}")


def judge_operator(
    name: str, dtype: torch.dtype, limit: int | None, progress: Callable[[int], None]
) -> dict[str, Any]:
    """Return the outcome of an operator: that of its worst sample, and how many of each."""
    counts: collections.Counter[str] = collections.Counter()
    means: collections.Counter[str] = collections.Counter()
    single: collections.Counter[str] = collections.Counter()
    worst, first = Verdict(OUTCOMES[-1], "no samples"), None
    progress(-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # PyTorch's own loop over a batch, where it has no batching rule.
        warnings.filterwarnings("error", message=".*performance drop")
        for number, problem in enumerate(problems(name, dtype, limit)):
            progress(number)
            verdict = judge(problem)
            if verdict.outcome == "wrong" and disputed(name, verdict.kind):
                verdict = dataclasses.replace(verdict, outcome="disputed")
            counts[verdict.outcome] += 1
            single["right" if verdict.kind == "batched" else verdict.outcome] += 1
            if verdict.outcome == "right":
                means[verdict.reason] += 1
            if first is None or OUTCOMES.index(verdict.outcome) < OUTCOMES.index(worst.outcome):
                worst, first = verdict, number
    return {
        "outcome": worst.outcome,
        "reason": "" if worst.outcome == "right" else worst.reason,
        "kind": worst.kind,
        "sample": first,
        "counts": dict(counts),
        "single": dict(single),
        "means": dict(means),
    }
