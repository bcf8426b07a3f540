"""Parts of one whole, put side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from .._programs.numbers import Numbers
from .._programs.program import Equation, Program
from .._programs.values import Var
from .._torch.names import aten

_PARTS = {
    aten.select_backward.default: aten.stack.default,
    aten.slice_backward.default: aten.cat.default,
}


def join_parts(program: Program, _: Numbers | None = None) -> Program:
    """Replace a sum of parts, each padded with zeros to the whole, by the parts side by side."""
    made = {eq.outputs[0]: eq for eq in program.equations if len(eq.outputs) == 1}
    uses = program.uses()
    #: Sums that are terms of another one.
    inner = {
        v
        for eq in program.equations
        if eq.op is aten.add.Tensor and not eq.kwargs
        for v in eq.inputs()
        if uses[v] == 1 and v.spec == eq.outputs[0].spec  # type: ignore[union-attr]
    }

    def join(eq: Equation) -> Equation:
        out = eq.outputs[0]
        if eq.op is not aten.add.Tensor or out is None or out in inner:
            return eq
        whole = _joined([made.get(v) for v in _terms(out, made, uses)], uses)
        if whole is None:
            return eq
        op, pieces, dim = whole
        return Equation(op, (pieces, dim), {}, eq.outputs, eq.source)

    return program.with_equations([join(eq) for eq in program.equations]).live()


def _terms(v: Var, made: dict[Any, Equation], uses: Counter[Any]) -> list[Var]:
    """Return the terms of a sum; sums that are used elsewhere too are terms themselves."""
    found: list[Var] = []
    stack = [v]
    while stack:
        x = stack.pop()
        eq = made.get(x)
        inside = x is v or uses[x] == 1
        if eq is not None and inside and eq.op is aten.add.Tensor and not eq.kwargs:
            terms = eq.args
            if all(isinstance(t, Var) and t.spec == v.spec for t in terms):
                stack += terms
                continue
        found.append(x)
    return found


def _joined(
    parts: Sequence[Equation | None], uses: Counter[Any]
) -> tuple[Any, list[Var], int] | None:
    """Return the operation that puts parts side by side, if together they are the whole."""
    first = parts[0]
    if len(parts) < 2 or first is None or first.op not in _PARTS:
        return None
    _, shape, dim, *_ = first.args
    placed = []
    for part in parts:
        if part is None or part.op is not first.op or part.args[1:3] != first.args[1:3]:
            return None
        if not isinstance(part.args[0], Var) or uses[part.outputs[0]] != 1:
            return None
        start, end, step = (*part.args[3:], None, 1)[:3]
        if first.op is aten.select_backward.default:
            start = start % shape[dim]
            end = start + 1
        if step != 1:
            return None
        placed.append((start, end, part.args[0]))
    placed.sort(key=lambda p: p[0])
    ends = [0, *(end for _, end, _ in placed)]
    if [start for start, _, _ in placed] != ends[:-1] or ends[-1] != shape[dim]:
        return None
    return _PARTS[first.op], [x for *_, x in placed], dim
