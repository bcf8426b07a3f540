"""What running a linear program costs, estimated from shapes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import torch

from .._execute.binding import BoundProgram
from .._programs.aten import COPIES, may_alias
from .._programs.numbers import Numbers
from .._programs.price import PRODUCTS, arithmetic
from .._programs.program import Equation, Operation
from .._programs.values import Constant, Value, Var
from .._spaces.nested import map_leaves


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
    size = numbers.residual(x).size
    # What is expanded is read from fewer numbers.
    return min(x.spec.nbytes, size) if size else x.spec.nbytes


def _placeholder(x: Any) -> Any:
    return (
        torch.empty(x.spec.shape, dtype=x.spec.dtype, device="meta") if isinstance(x, Var) else x
    )
