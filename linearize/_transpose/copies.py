"""Programs whose vectors several ranks have alike.

The transpose of what hands the same numbers to all ranks is a sum over them. So the transpose of
a program gives, where several ranks have a tensor, something of it on each: here the mean is
taken. What is alike already need not be summed; it is multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .._capture.mesh_collectives import MeshCollective, summed_over_ranks
from .._programs.numbers import Numbers
from .._programs.program import Emitter, Equation, Program
from .._programs.values import Var
from .._spaces.sharding import Layout
from .._spaces.space import TensorSpec
from .._torch.names import aten
from .._torch.ranks import members

#: Operations of one variable whose result is alike where that is.
_PASSING = frozenset(
    {
        aten.clone.default,
        aten.contiguous.default,
        aten.detach.default,
        aten.expand.default,
        aten.mul.Scalar,
        aten.mul.Tensor,
        aten.neg.default,
        aten.permute.default,
        aten.reshape.default,
        aten.t.default,
        aten.transpose.int,
        aten.unsqueeze.default,
        aten.view.default,
    }
)


def among_ranks(
    program: Program,
    numbers: Numbers,
    takes: Sequence[Layout | None],
    gives: Sequence[Layout | None],
) -> Program:
    """Return a transpose that takes and gives the same numbers where several ranks have a tensor.

    `takes` and `gives` are how its arguments and its results lie on the ranks.
    """
    e = Emitter(numbers=numbers, fixed=program.fixed)
    alike: dict[Any, frozenset[Any]] = {
        v: frozenset(layout.groups)
        for v, layout in zip(program.inputs, takes, strict=True)
        if layout is not None
    }
    for eq in program.equations:
        e.equations.append(_written(eq, alike))
    pairs = zip(program.outputs, program.specs, gives, strict=True)
    outputs = [
        v if layout is None else _mean(e, v, spec, layout, alike.get(v, frozenset()))
        for v, spec, layout in pairs
    ]
    return Program(
        program.inputs, e.equations, outputs, program.specs, program.name, e.fixed
    ).live()


def _written(eq: Equation, alike: dict[Any, frozenset[Any]]) -> Equation:
    """Return an equation, without the sum of what is alike; note what it leaves alike."""
    inputs = eq.inputs()
    known = alike.get(inputs[0], frozenset()) if len(inputs) == 1 else frozenset()
    out = eq.outputs[0] if eq.outputs else None
    node = getattr(eq.op, "node", None)
    if isinstance(node, MeshCollective) and node.factor:
        alike[out] = known | {node.group}
        if node.group in known:
            factor = node.factor * len(members(node.group))
            return Equation(aten.mul.Tensor, (inputs[0], factor), {}, eq.outputs, eq.source)
    elif eq.op in _PASSING and known and not eq.constants():
        alike[out] = known
    return eq


def _mean(
    e: Emitter, v: Var | None, spec: TensorSpec, layout: Layout, known: frozenset[Any]
) -> Var | None:
    """Write down the mean over the ranks that have a tensor."""
    for group in layout.groups:
        if group in known:
            continue
        summed = e.emit(summed_over_ranks(spec, group), (v,), spec)
        v = e.emit(aten.mul.Tensor, (summed, 1 / len(members(group))), spec)
    return v
