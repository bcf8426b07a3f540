"""What an output of a program can depend on."""

from __future__ import annotations

from .._torch.names import OpOverload
from .aten import schema_of
from .program import Equation, Program
from .values import Var


def is_diagonal(program: Program) -> bool:
    """Whether each entry of each output depends on the same entry of the same input alone.

    True only if all operations are seen to be pointwise, on tensors of one shape.
    """
    inputs, outputs = [v.spec for v in program.inputs], program.specs
    if [s.shape for s in inputs] != [s.shape for s in outputs]:
        return False
    reach: dict[Var, frozenset[int]] = {v: frozenset((i,)) for i, v in enumerate(program.inputs)}
    for eq in program.equations:
        if not _is_pointwise(eq):
            return False
        (out,) = eq.outputs
        if out is not None:
            reach[out] = frozenset().union(*(reach[v] for v in eq.inputs()))
    return all(v is None or reach[v] <= {k} for k, v in enumerate(program.outputs))


def _is_pointwise(eq: Equation) -> bool:
    if not isinstance(eq.op, OpOverload) or len(eq.outputs) != 1:
        return False
    schema = schema_of(eq.op)
    if not schema.by_entry or schema.writes:
        return False
    (out,) = eq.outputs
    return out is None or all(v.spec.shape == out.spec.shape for v in eq.inputs())
