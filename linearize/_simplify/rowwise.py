"""Steps that treat each row by itself, as one small matrix for each row.

Programs over many small things (points, particles, samples of a small model) do the same to
each row of a tensor, in dozens of small steps. Where a stretch of such steps leads from few
numbers a row to few numbers a row, its matrices, found by applying it to unit vectors, all
rows at once, need less work and less memory than the steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from .._programs.aten import chooses, schema_of
from .._programs.numbers import Numbers
from .._programs.origins import postorder
from .._programs.program import Emitter, Equation, Program
from .._programs.values import Var
from .._torch.names import OpOverload, aten
from .rowwise_matrices import SOURCE, multiply, width

#: Fewer rows are not worth it.
FEWEST_ROWS = 32
#: A row of more numbers than this is no small thing.
WIDEST = 16
#: How much less a matrix must read than the steps that it replaces.
GAIN = 0.7

_DTYPES = (torch.float32, torch.float64)


def multiply_rows(program: Program, numbers: Numbers) -> Program:
    """Replace stretches of steps that treat each row by itself by one matrix for each row."""
    depth: dict[Var, int] = dict.fromkeys(program.inputs, 0)
    groups: dict[Any, list[Equation]] = {}
    for eq in program.equations:
        at = max((depth[v] for v in eq.inputs()), default=0)
        kind = _rows(eq)
        if kind is not None:
            groups.setdefault((at, kind), []).append(eq)
        depth.update((v, at + (kind is None)) for v in eq.outputs if v is not None)
    uses = program.uses() if groups else Counter[Var]()
    stretches = [s for equations in groups.values() for s in _stretches(equations, uses)]
    if not stretches:
        return program
    inside = {eq: s for s in stretches for eq in s.equations}
    e = Emitter(numbers=numbers)
    done: set[Program] = set()
    for eq in program.equations:
        stretch = inside.get(eq)
        if stretch is None:
            e.equations.append(eq)
        elif stretch not in done:
            done.add(stretch)
            multiply(e, stretch)
    # There is an order: what is at one depth does not need, through other steps, what is at the
    # same depth.
    made = {v: eq for eq in e.equations for v in eq.outputs if v is not None}
    order = postorder(e.equations, lambda eq: [made[v] for v in eq.inputs() if v in made])
    return program.with_equations(order).live()


def _stretches(equations: Sequence[Equation], uses: Counter[Var]) -> Iterator[Program]:
    """Yield steps that have variables in common, from few numbers a row to few numbers a row.

    Only what is worth replacing; `uses` are those in the whole program.
    """
    for part in _connected(equations):
        # In the order of the equations.
        made = dict.fromkeys(v for eq in part for v in eq.outputs if v is not None)
        inputs = list(dict.fromkeys(v for eq in part for v in eq.inputs() if v not in made))
        inner = Counter(v for eq in part for v in eq.inputs())
        outputs = [v for v in made if uses[v] > inner[v]]
        if not (inputs and outputs and len(part) > 3 + len(inputs) + len(outputs)):
            continue
        into, out = (sum(width(v.spec) for v in side) for side in (inputs, outputs))
        passed = (x for eq in part for x in (*eq.reads(), *eq.outputs) if x is not None)
        now = sum(x.spec.numel for x in passed)
        then = outputs[0].spec.shape[0] * (into * out + 2 * into + 2 * out)
        mixed = any(eq.op in _MIXING for eq in part)  # diagonals are for `fold_diagonals`
        if mixed and then <= GAIN * now:
            yield Program(inputs, part, outputs, [v.spec for v in outputs], SOURCE)


def _connected(equations: Sequence[Equation]) -> list[list[Equation]]:
    """Return the groups of equations that have variables in common."""
    above = list(range(len(equations)))

    def top(i: int) -> int:
        while above[i] != i:
            above[i] = i = above[above[i]]
        return i

    met: dict[Var, int] = {}
    for i, eq in enumerate(equations):
        for v in (*eq.inputs(), *eq.outputs):
            if v is not None:
                above[top(i)] = top(met.setdefault(v, i))
    groups: dict[int, list[Equation]] = {}
    for i, eq in enumerate(equations):
        groups.setdefault(top(i), []).append(eq)
    return list(groups.values())


# -- which steps treat each row by itself -----------------------------------------------------


def rows_apart(program: Program) -> bool:
    """Whether each row of the only output depends on the same row of the only input alone."""
    if len(program.inputs) != 1 or len(program.outputs) != 1 or program.outputs[0] is None:
        return False
    shape = program.inputs[0].spec.shape
    return bool(shape) and all(_keeps_rows(eq, shape[0]) for eq in program.equations)


def _keeps_rows(eq: Equation, count: int) -> bool:
    """Whether an operation treats each of so many rows by itself."""
    if not isinstance(eq.op, OpOverload) or eq.result is None:
        return False
    out = eq.result.spec.shape
    if any(v.spec.shape[:1] != (count,) for v in (*eq.inputs(), eq.result)):
        return False
    rule = _RULES.get(eq.op)
    return rule(eq, out) if rule is not None else _is_pointwise(eq, out)


def _rows(eq: Equation) -> Any:
    """Return the number of rows, their dtype and device; None if they are not small and apart."""
    result = eq.result
    if result is None:
        return None
    out = result.spec
    if len(out.shape) < 1 or out.shape[0] < FEWEST_ROWS or out.dtype not in _DTYPES:
        return None
    kind = (out.shape[0], out.dtype, out.device)
    for v in (*eq.inputs(), result):
        if (*v.spec.shape[:1], v.spec.dtype, v.spec.device) != kind or width(v.spec) > WIDEST:
            return None
    # In a matrix, what is not chosen would be multiplied by zero.
    fine = _keeps_rows(eq, out.shape[0]) and not (eq.op not in _RULES and _is_choice(eq))
    return kind if fine else None


def _is_pointwise(eq: Equation, shape: Sequence[int]) -> bool:
    assert isinstance(eq.op, OpOverload)
    schema = schema_of(eq.op)
    return schema.pointwise and not schema.writes and _aligned(eq, shape)


def _is_choice(eq: Equation) -> bool:
    assert isinstance(eq.op, OpOverload)
    return chooses(eq.op) if len(eq.inputs()) == 1 else eq.op is aten.where.self


def _aligned(eq: Equation, shape: Sequence[int]) -> bool:
    """Whether operands broadcast such that the rows of all lie on those of the result."""
    if any(isinstance(a, (list, tuple)) for a in eq.args):
        return False
    return all(len(v.spec.shape) == len(shape) for v in eq.inputs()) and all(
        len(c.spec.shape) < len(shape) or c.spec.shape[0] in (1, shape[0]) for c in eq.constants()
    )


def _other(dims: Iterable[int], rank: int) -> bool:
    """Whether none of the dimensions is the first."""
    return all(d % rank != 0 for d in dims)


def _rank(x: Any) -> int:
    return len(x.spec.shape)


Rule = Callable[[Equation, Sequence[int]], bool]
_RULES: dict[Any, Rule] = {
    **dict.fromkeys(
        (aten.sum.dim_IntList, aten.mean.dim),
        lambda eq, _: bool(eq.args[1]) and _other(eq.args[1], _rank(eq.args[0])),
    ),
    **dict.fromkeys(
        (aten.reshape.default, aten.view.default, aten.clone.default), lambda eq, shape: True
    ),
    **dict.fromkeys(
        (aten.squeeze.dim, aten.select.int, aten.slice.Tensor),
        lambda eq, _: _other([eq.argument(1, 0)], _rank(eq.args[0])),
    ),
    **dict.fromkeys(
        (aten.select_backward.default, aten.slice_backward.default),
        lambda eq, shape: _other([eq.args[2]], len(shape)),
    ),
    **dict.fromkeys(
        (aten.stack.default, aten.cat.default),
        lambda eq, shape: not eq.constants() and _other([eq.argument(1, 0)], len(shape)),
    ),
    **dict.fromkeys(
        (aten.bmm.default, aten.baddbmm.default),
        lambda eq, shape: all(c.spec.shape[0] == shape[0] for c in eq.constants()),
    ),
    aten.expand.default: lambda eq, shape: _rank(eq.args[0]) == len(shape),
    aten.unsqueeze.default: lambda eq, shape: _other([eq.args[1]], len(shape)),
    aten.squeeze.dims: lambda eq, _: _other(eq.args[1], _rank(eq.args[0])),
    aten.transpose.int: lambda eq, shape: _other(eq.args[1:3], len(shape)),
    aten.permute.default: lambda eq, shape: eq.args[1][0] % len(shape) == 0,
    aten.linalg_cross.default: lambda eq, shape: (
        _aligned(eq, shape) and _other([eq.kwargs.get("dim", -1)], len(shape))
    ),
    aten.mm.default: lambda eq, _: isinstance(eq.args[0], Var),
    aten.addmm.default: lambda eq, _: all(isinstance(a, Var) for a in eq.args[:2]),
}
#: Steps after which a number depends on others of its row.
_MIXING = frozenset(
    {
        aten.sum.dim_IntList,
        aten.mean.dim,
        aten.select.int,
        aten.slice.Tensor,
        aten.select_backward.default,
        aten.slice_backward.default,
        aten.linalg_cross.default,
        aten.stack.default,
        aten.cat.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten.mm.default,
        aten.addmm.default,
    }
)
