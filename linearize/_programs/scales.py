"""Numbers of f's that do nothing but scale: a time step, a damping, a weight.

A recording holds such a number as it is, with a mark that says where the graph keeps it. As long
as it is the same at all points nothing comes of the mark. Where it changes, `with_numbers` makes
a constant of it, which each point reads of its own graph like the constants that are tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch

from .._spaces.nested import leaves, map_leaves
from .._spaces.space import TensorSpec
from .._torch.names import aten
from .origins import Marked, Number, Origin, has_marks
from .program import Equation, Program
from .values import Constant, Var

#: Where in the graph a number is: the place of the node, and its attribute.
Where: TypeAlias = tuple[int, str]


class _Float(Marked, float):
    __slots__ = ("origin",)


class _Complex(Marked, complex):
    __slots__ = ("origin",)


class _Int(Marked, int):
    pass


_KINDS: dict[type, type[Any]] = {float: _Float, complex: _Complex, int: _Int}


def marked(value: Any, origin: Number) -> Any:
    """Return a number with a mark that says where it comes from."""
    kind = _KINDS.get(type(value)) or next(k for k in _KINDS.values() if isinstance(value, k))
    made = kind(value)
    made.origin = origin
    return made


def unmarked(program: Program) -> Program:
    """Return a program with plain numbers, for those who compile it."""
    equations = [
        Equation(
            eq.op,
            map_leaves(_plain, eq.args),
            map_leaves(_plain, eq.kwargs),
            eq.outputs,
            eq.source,
        )
        if has_marks((eq.args, eq.kwargs))
        else eq
        for eq in program.equations
    ]
    return program.with_equations(equations)


def _plain(x: Any) -> Any:
    kind = next((k for k, marked in _KINDS.items() if type(x) is marked), None)
    return x if kind is None else kind(x)


def scales_of(program: Program) -> frozenset[Where]:
    """Return which numbers `with_numbers` can make constants of, in a program as recorded."""
    known: dict[Where, bool] = {}
    for x, fits in _marks(program):
        where = _where(x)
        known[where] = known.get(where, True) and fits and x.origin.clean
    return frozenset(where for where, fits in known.items() if fits)


def _where(x: Marked) -> Where:
    return x.origin.node, x.origin.name


def _marks(program: Program) -> Iterator[tuple[Any, bool]]:
    """Yield marked numbers, and whether they may be anything where they stand."""
    for eq in program.equations:
        for x in leaves((eq.args, eq.kwargs)):
            if isinstance(x, Marked):
                yield x, eq.op in _SCALINGS and _dtype(eq.args[0], x) is not None
    seen: set[Origin] = set()
    stack = [c.origin for c in program.constants]
    while stack:
        o = stack.pop()
        if o not in seen:
            seen.add(o)
            stack += o.inputs()
            yield from ((x, True) for x in leaves((o.args, o.kwargs)) if isinstance(x, Marked))


def with_numbers(program: Program, changing: frozenset[Where]) -> Program:
    """Return a program, as it was recorded, that reads some of its numbers at each point.

    These are among `scales_of` the program.
    """
    moved: dict[Origin, Origin] = {}
    constants: dict[Any, Constant] = {}

    def computed(o: Origin) -> Origin:
        if o.op is None:
            return o
        if o not in moved:
            moved[o] = Origin(o.op, map_leaves(inside, o.args), map_leaves(inside, o.kwargs))
        return moved[o]

    def inside(x: Any) -> Any:
        if isinstance(x, Origin):
            return computed(x)
        return x.origin if isinstance(x, Marked) and _where(x) in changing else x

    def constant(c: Constant) -> Constant:
        if c not in constants:
            constants[c] = Constant(c.spec, computed(c.origin), c.source, folded=c.folded)
        return constants[c]

    equations: list[Equation] = []
    for eq in program.equations:
        number = next((x for x in leaves((eq.args, eq.kwargs)) if isinstance(x, Marked)), None)
        eq = eq.renamed(lambda x: constant(x) if isinstance(x, Constant) else x)
        if number is None or _where(number) not in changing:
            equations.append(eq)
            continue
        v: Var = eq.args[0]
        dtype = _dtype(v, number)
        key = _where(number), number.origin.rest, dtype, v.spec.device
        if key not in constants:
            spec = TensorSpec((), dtype, v.spec.device)
            how = {"dtype": spec.dtype, "device": spec.device}
            made = Origin(aten.scalar_tensor.default, (number.origin,), how)
            constants[key] = Constant(spec, made, eq.source)
        equations.append(_SCALINGS[eq.op](eq, v, constants[key]))
    return program.with_equations(equations)


def _dtype(v: Any, number: Any) -> Any:
    """Return the dtype of the tensor that stands for a number; None if there is none.

    A number changes no dtype, and is not rounded to half precision; nor are tensors without
    dimensions that are multiplied with tensors that have some.
    """
    if not isinstance(v, Var):
        return None
    dtype = v.spec.dtype
    if isinstance(number, complex) and not dtype.is_complex:
        return None
    if dtype in (torch.float16, torch.bfloat16):
        return torch.float32 if v.spec.shape else None
    return dtype if isinstance(number, complex) or not dtype.is_complex else dtype.to_real()


def _by(op: Callable[..., Any]) -> Callable[[Equation, Var, Constant], Equation]:
    return lambda eq, v, c: Equation(op, (v, c), {}, eq.outputs, eq.source)


def _leaky(eq: Equation, v: Var, c: Constant) -> Equation:
    """Scale where the argument of f, or its value, is not positive."""
    at = eq.args[1]
    one = Origin(aten.ones_like.default, (c.origin,))
    positive = Origin(aten.gt.Scalar, (at.origin, 0))
    either = Origin(aten.where.self, (positive, one, c.origin))
    factor = Origin(aten._to_copy.default, (either,), {"dtype": v.spec.dtype})
    return _by(aten.mul.Tensor)(eq, v, Constant(v.spec, factor, eq.source))


_SCALINGS: dict[Any, Callable[[Equation, Var, Constant], Equation]] = {
    aten.mul.Tensor: _by(aten.mul.Tensor),
    aten.mul.Scalar: _by(aten.mul.Tensor),
    aten.div.Tensor: _by(aten.div.Tensor),
    aten.div.Scalar: _by(aten.div.Tensor),
    aten.leaky_relu_backward.default: _leaky,
}
