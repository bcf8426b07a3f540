"""What running a linear program costs, estimated from shapes, and tables of it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .._execute.binding import BoundProgram
from .._programs.aten import COPIES, may_alias
from .._programs.numbers import Numbers
from .._programs.price import PRODUCTS, arithmetic
from .._programs.program import Equation, Operation
from .._programs.values import Constant, Value, Var
from .._spaces.nested import map_leaves
from .._text.tables import as_html, code, number, size


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
    """What one run of a linear program costs, estimated from shapes and not measured.

    Attributes
    ----------
    equations
        Number of equations.
    operations
        How often each operation occurs, the most frequent first.
    flops
        Floating point operations. Matrix products, convolutions and attention by the formulas
        of `torch.utils.flop_counter` (a product with an m×n matrix is 2mn), other operations
        as one for each entry of the largest operand or result; views, copies and custom
        Functions as none.
    traffic
        Bytes of what built-in operations read and write, each operand and result once; views
        as none. What lies in a cache is not told from what does not.
    peak
        The most bytes that intermediate results take at once, each view counted in full.
    calls
        Calls of custom Functions and other opaque code, whose cost is not known.
    """

    equations: int
    operations: dict[str, int]
    flops: int
    traffic: int
    peak: int
    calls: int


def cost_of(program: BoundProgram) -> Cost:
    """Estimate what one run of a program costs."""
    kinds = Counter(eq.kind for eq in program.equations)
    numbers = program.numbers()
    return Cost(
        equations=len(program.equations),
        operations=dict(kinds.most_common()),
        flops=sum(_flops(eq, numbers) for eq in program.equations),
        traffic=sum(_traffic(eq, numbers) for eq in program.equations),
        peak=program.peak_bytes(),
        calls=sum(isinstance(eq.op, Operation) for eq in program.equations),
    )


def _flops(eq: Equation, numbers: Numbers) -> int:
    if may_alias(eq.op) or eq.kind in COPIES:
        return 0
    packet = getattr(eq.op, "overloadpacket", None)
    if packet in PRODUCTS:
        return int(arithmetic(eq))
    from torch.utils.flop_counter import flop_registry  # not needed to compute products

    formula: Any = flop_registry.get(packet)
    if formula is not None:
        outs = tuple(None if v is None else _placeholder(v) for v in eq.outputs)
        given = numbers.filled(eq.args), numbers.filled(eq.kwargs)
        args, kwargs = map_leaves(_placeholder, given[0]), map_leaves(_placeholder, given[1])
        try:
            return int(formula(*args, **kwargs, out_val=outs if len(outs) > 1 else outs[0]))
        except (AssertionError, AttributeError, IndexError, TypeError, ValueError):
            pass  # a form of the operation that the formula does not know
    values = (*eq.reads(), *(v for v in eq.outputs if v is not None))
    return max((x.spec.numel for x in values), default=0)


def _traffic(eq: Equation, numbers: Numbers) -> int:
    if may_alias(eq.op):
        return 0
    read = sum(_nbytes(x, numbers) for x in dict.fromkeys(eq.reads()))
    return read + sum(v.spec.nbytes for v in eq.outputs if v is not None)


def _nbytes(x: Value, numbers: Numbers) -> int:
    if isinstance(x, Var):
        return x.spec.nbytes
    assert isinstance(x, Constant)
    stored = numbers.residual(x).size
    # What is expanded is read from fewer numbers.
    return min(x.spec.nbytes, stored) if stored else x.spec.nbytes


def _placeholder(x: Any) -> Any:
    return (
        torch.empty(x.spec.shape, dtype=x.spec.dtype, device="meta") if isinstance(x, Var) else x
    )


# -- tables ---------------------------------------------------------------------------------


def known_of(costs: Mapping[str, Cost | str]) -> dict[str, Cost]:
    """Return the costs without the texts that stand for those that cannot be had."""
    return {k: c for k, c in costs.items() if isinstance(c, Cost)}


def cost_table(costs: Mapping[str, Cost | str]) -> tuple[list[str], list[list[str]]]:
    """Return the names of columns, and a row of cells for each program."""
    head = ["", "equations", "flops", "bytes moved", "peak bytes", "opaque calls"]
    rows = [
        [k, number(c.equations), number(c.flops), size(c.traffic), size(c.peak), str(c.calls)]
        for k, c in known_of(costs).items()
    ]
    return head, rows


def operation_table(costs: Mapping[str, Cost | str]) -> tuple[list[str], list[list[str]]]:
    """Return the names of columns, and a row of cells for each operation."""
    kinds = {k: c.operations for k, c in known_of(costs).items()}
    total = summed(pair for ops in kinds.values() for pair in ops.items())
    rows = [[op, *(str(ops.get(op, 0)) for ops in kinds.values())] for op in total]
    return ["operation", *kinds], rows


def operations_as_html(costs: Mapping[str, Cost | str]) -> str:
    """Return how often each operation occurs in each program."""
    head, rows = operation_table(costs)
    cells = [[code(op), *counts] for op, *counts in rows]
    return as_html(head, cells, right=range(1, len(head)))


def summed(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Return the sum for each key, the largest first."""
    total: Counter[str] = Counter()
    for key, n in pairs:
        total[key] += n
    return dict(total.most_common())
