"""The verdict on one sample of an operator, and on all of them."""

from __future__ import annotations

import collections
import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

import linearize as lz

from .comparing import all_close, distance, inner, size, tolerance
from .database import Problem, problems
from .disputes import DISPUTES
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
    try:
        here = lz.Linearizer(problem.run, maxsize=0).at(*problem.primals)
        JTu = _three_times("Jᵀ·u", here.vjp_fn, u)
        Jv = _three_times("J·v", lambda t: here.jvp_fn(*t), v)
        return _compare(graph, here.value, u, v, JTu, Jv, gradient)
    except WrongError as wrong:
        return Verdict("wrong", str(wrong), wrong.kind)
    except lz.LinearizeError as error:
        return Verdict("refused", _text(error))
    except Exception as error:
        return Verdict("failed", f"raises {_text(error)}")


def _judge_sparse(problem: Problem) -> Verdict:
    try:
        lz.Linearizer(problem.run, maxsize=0).at(*problem.primals)
    except lz.LinearizeError as error:
        return Verdict("refused", _text(error))
    except Exception as error:
        return Verdict("failed", f"raises {_text(error)}")
    return Verdict("wrong", "a sparse layout was accepted", "sparse")


def _three_times(
    name: str, product: Callable[[Any], Any], direction: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Call a product three times; each call must leave its argument alone and give the same."""
    given = [t.clone() for t in direction]
    first = [t.clone() for t in product(given)]
    limits = tolerance([*first, *direction])
    for count in ("first", "second", "third"):
        if not all_close(given, direction, (0.0, 0.0)):
            raise WrongError("repeat", f"the {count} call of {name} changed its argument")
        if count != "third" and not all_close(
            product(given), first, (limits[0] / 1000, limits[1] / 1000)
        ):
            raise WrongError("repeat", f"a later call of {name} differs from the first")
    return first


def _compare(
    graph: Graph,
    value: Sequence[torch.Tensor],
    u: Sequence[torch.Tensor],
    v: Sequence[torch.Tensor],
    JTu: Sequence[torch.Tensor],
    Jv: Sequence[torch.Tensor],
    gradient: Sequence[torch.Tensor | None],
) -> Verdict:
    problem = graph.problem
    limits = tolerance([*problem.primals, *graph.value])
    if not all_close(value, graph.value, limits):
        raise WrongError("value", "the value differs")
    exact = limits[0] <= 1e-7  # differences mean something in double precision only
    by = ""
    if not all_close(JTu, gradient, limits):
        if exact and differences_confirm(problem, u, JTu):
            by = "finite differences against the gradient"
        elif exact or not _no_worse(graph, u, v, JTu, gradient, transposed=True):
            raise WrongError("gradient", "Jᵀ·u differs from torch.autograd.grad")
    left, right = inner(u, Jv), inner(JTu, v)
    room = limits[0] * (size(u, Jv) + size(JTu, v)) + limits[1]
    # A sum with a number that is not finite says nothing.
    if abs(left - right) > room:
        raise WrongError("adjoint", f"⟨u, J·v⟩ = {left:.9g} but ⟨Jᵀ·u, v⟩ = {right:.9g}")
    native = forward(problem, v)
    if native is not None and all_close(Jv, native, limits):
        return Verdict("right", by or "forward AD")
    twice = graph.twice(u, v)
    if native is None and twice is not None and all_close(Jv, twice, limits):
        return Verdict("right", by or "double backward")
    if native is not None and not exact and _no_worse(graph, u, v, Jv, native, transposed=False):
        return Verdict("right", "forward AD in double precision")
    if not exact:
        if native is None and twice is None:
            return Verdict("right", by or "adjoint identity")
    elif all_close(Jv, differences(problem, v), FINITE):
        return Verdict("right", by or "finite differences")
    names = [n for n, r in (("forward AD", native), ("double backward", twice)) if r is not None]
    agreeing = twice is not None and all_close(Jv, twice, limits)
    reason = f"J·v differs from {names[0] if names else 'finite differences'}"
    if names and exact:
        reason += " and finite differences"
    raise WrongError("tangent", reason + (", not from double backward" if agreeing else ""))


def _no_worse(
    graph: Graph,
    u: Sequence[torch.Tensor],
    v: Sequence[torch.Tensor],
    ours: Sequence[torch.Tensor],
    theirs: Sequence[torch.Tensor | None],
    transposed: bool,
) -> bool:
    """Whether a result in low precision is about as near to the precise one as PyTorch's."""
    assert graph.problem.wider is not None
    try:
        wide = Graph(graph.problem.wider())
        directions = [t.to(w.dtype) for t, w in zip(u, wide.value, strict=True)]
        tangents = [t.to(w.dtype) for t, w in zip(v, wide.primals, strict=True)]
        precise = wide.gradient(directions) if transposed else forward(wide.problem, tangents)
    except Refusals:
        return False
    if precise is None:
        return False
    for a, b, p in zip(ours, theirs, precise, strict=True):
        (mine, scale), (other, _) = (
            distance(a, p),
            distance(torch.zeros_like(a) if b is None else b, p),
        )
        if not mine <= 10 * other + 1e-5 * scale:
            return False
    return True


def judge_operator(
    name: str, dtype: torch.dtype, limit: int | None, progress: Callable[[int], None]
) -> dict[str, Any]:
    """Return the outcome of an operator: that of its worst sample, and how many of each."""
    counts: collections.Counter[str] = collections.Counter()
    means: collections.Counter[str] = collections.Counter()
    worst, first = Verdict(OUTCOMES[-1], "no samples"), None
    progress(-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, problem in enumerate(problems(name, dtype, limit)):
            progress(number)
            verdict = judge(problem)
            if verdict.outcome == "wrong" and verdict.kind in DISPUTES.get(name, ((), ""))[0]:
                verdict = dataclasses.replace(verdict, outcome="disputed")
            counts[verdict.outcome] += 1
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
        "means": dict(means),
    }
