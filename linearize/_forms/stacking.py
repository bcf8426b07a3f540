"""Putting a dimension more in front of all values of a program.

By the rule of an operation, or by `torch.vmap` where it has none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch

from .._execute.mapped import Slot, apply_to, by_entry, call_again
from .._programs.aten import schema_of
from .._programs.numbers import Numbers
from .._programs.program import Emitter, Equation, Program
from .._programs.values import Constant, Value, Var
from .._spaces.nested import map_leaves
from .._spaces.space import TensorSpec
from .._torch.names import OpOverload, aten

#: From how many numbers in one entry on a kernel is called for each entry.
LARGE = 1 << 13


class Vectorizer:
    """Makes a program for many arguments at once, by the rules for its operations."""

    def __init__(self, program: Program, numbers: Numbers, count: int) -> None:
        self.program = program
        self.count = count
        self.e = Emitter(numbers=numbers)
        self.numbers = numbers
        self.names: dict[Var, Var] = {}
        #: Values that do not lie in memory in order.
        self.turned: set[Var] = set()

    def run(self) -> Program:
        inputs = [Var(self.spec(v.spec)) for v in self.program.inputs]
        self.names = dict(zip(self.program.inputs, inputs, strict=True))
        with torch.no_grad():
            for eq in self.program.equations:
                self.equation(eq)
        outputs = [None if v is None else self.names[v] for v in self.program.outputs]
        specs = [self.spec(s) for s in self.program.specs]
        name = f"{self.count} times {self.program.name}"
        return Program(inputs, self.e.equations, outputs, specs, name).live()

    def equation(self, eq: Equation) -> None:
        self.e.source = eq.source
        mark = len(self.e.equations)
        wanted = [v for v in eq.outputs if v is not None]
        found = self.by_rule(eq, wanted[0].spec) if wanted else ()
        if len(found) != len(wanted):
            del self.e.equations[mark:]
            found = self.mapped(eq)
        self.names.update(zip(wanted, found, strict=True))

    def by_rule(self, eq: Equation, out: TensorSpec) -> Sequence[Var]:
        """Return the results that are used; not as many where the rule does not hold."""
        rule = RULES.get(eq.op)
        if rule is None and len(eq.outputs) == 1 and isinstance(eq.op, OpOverload):
            rule = Vectorizer.pointwise if schema_of(eq.op).pointwise else None
        found = None if rule is None else rule(self, eq, out)
        return [found] if isinstance(found, Var) else found or ()

    # -- what rules are made of -------------------------------------------------------------

    def spec(self, spec: TensorSpec) -> TensorSpec:
        """Return the spec of a stack."""
        return TensorSpec((self.count, *spec.shape), spec.dtype, spec.device)

    def emit(self, op: Any, args: tuple[Any, ...], shape: Sequence[int], **kwargs: Any) -> Var:
        """Emit an operation whose result has the dtype and device of its first variable."""
        like = next(a for a in args if isinstance(a, Var)).spec
        return self.e.emit(op, args, TensorSpec(tuple(shape), like.dtype, like.device), **kwargs)

    def reshape(self, v: Var, *shape: int) -> Var:
        if v.spec.shape == shape:
            return v
        return self.emit(aten.reshape.default, (v, list(shape)), shape)

    def permute(self, v: Var, *dims: int) -> Var:
        shape = [v.spec.shape[d] for d in dims]
        out = self.emit(aten.permute.default, (v, list(dims)), shape)
        if dims != tuple(range(len(dims))):
            self.turned.add(out)
        return out

    def raised(self, v: Var, rank: int) -> Var:
        """Return a stack of values seen as values of a higher rank, as broadcasting does."""
        shape = v.spec.shape[1:]
        return self.reshape(v, self.count, *(1,) * (rank - len(shape)), *shape)

    def pointwise(self, eq: Equation, out: TensorSpec) -> Var | None:
        """Apply a pointwise operation as it stands, its operands aligned."""
        rank = len(out.shape)
        if any(len(c.spec.shape) > rank for c in eq.constants()):
            return None
        # A tensor without dimensions is a number to type promotion, a stack of them is not.
        if any(not v.spec.shape and v.spec.dtype != out.dtype for v in eq.inputs()):
            return None

        def aligned(x: Any) -> Any:
            return self.raised(self.names[x], rank) if isinstance(x, Var) else x

        args, kwargs = map_leaves(aligned, eq.args), map_leaves(aligned, eq.kwargs)
        return self.e.emit(eq.op, args, self.spec(out), **kwargs)

    def repeated(self, c: Constant) -> Constant:
        """Return a constant as a stack of which all entries are the same."""
        return self.numbers.viewed(aten.expand.default, c, [self.count, *c.spec.shape])

    def summed(self, v: Var, kept: int) -> Var:
        """Sum the entries of a stack over all but the last dimensions."""
        dims = list(range(1, len(v.spec.shape) - kept))
        if not dims:
            return v
        shape = (self.count, *v.spec.shape[len(dims) + 1 :])
        return self.emit(aten.sum.dim_IntList, (v, dims), shape)

    def mapped(self, eq: Equation) -> list[Var]:
        """Map an operation over the stack; return the results that are used."""
        outs = tuple(None if v is None else Var(self.spec(v.spec)) for v in eq.outputs)
        args, kwargs = map_leaves(
            lambda x: self.names[x] if isinstance(x, Var) else x, (eq.args, eq.kwargs)
        )
        op = Mapped(eq.op, args, kwargs)
        self.e.equations.append(Equation(op, op.given, {}, outs, eq.source))
        return [v for v in outs if v is not None]


class Mapped:
    """An operation mapped over the first dimension of its variables."""

    def __init__(self, op: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self.op = op
        self.dims: list[int | None] = []
        given: list[Any] = []

        def place(x: Any) -> Any:
            if not isinstance(x, Value):
                return x
            given.append(x)
            self.dims.append(0 if isinstance(x, Var) else None)
            return Slot(len(given) - 1)

        self.template = map_leaves(place, (list(args), kwargs))
        self.given = tuple(given)

    def __repr__(self) -> str:
        return f"each {self.op}"

    def __call__(self, *given: Any) -> tuple[Any, ...]:
        """Apply it; returns all results."""
        if self.by_hand(given):
            count = next(len(t) for t, d in zip(given, self.dims, strict=True) if d == 0)
            out = by_entry(self.op, self.template, given, self.dims, count)
            return out if isinstance(out, tuple) else (out,)
        there: list[bool] = []
        again = functools.partial(call_again, self.op)

        def one(*tensors: Any) -> tuple[Any, ...]:
            out = apply_to(again, self.template, tensors)
            results = out if isinstance(out, (tuple, list)) else (out,)
            there[:] = [t is not None for t in results]
            return tuple(t for t in results if t is not None)

        found = iter(torch.vmap(one, tuple(self.dims))(*given))
        return tuple(next(found) if here else None for here in there)

    def by_hand(self, given: Sequence[Any]) -> bool:
        """Whether entries are so large that a kernel for each beats simpler operations on all."""
        schema = schema_of(self.op) if isinstance(self.op, OpOverload) else None
        if schema is None or schema.pointwise or not schema.name.endswith("_backward"):
            return False
        stacks = (t for t, d in zip(given, self.dims, strict=True) if d == 0)
        return any(t[0].numel() >= LARGE for t in stacks)


#: Gives the result, or all results that are used; None if it does not hold.
Rule: TypeAlias = Callable[[Vectorizer, Equation, TensorSpec], Var | Sequence[Var] | None]
RULES: dict[Any, Rule] = {}


def rule(*ops: Any) -> Callable[[Rule], Rule]:
    """Register the rule of some operations."""

    def register(fn: Rule) -> Rule:
        RULES.update(dict.fromkeys(ops, fn))
        return fn

    return register


def rank(v: Var) -> int:
    """Return the number of dimensions of a value for one argument."""
    return len(v.spec.shape)


def later(dims: Iterable[int], rank: int) -> list[int]:
    """Return dimensions of a value as those of a stack."""
    return [d % max(rank, 1) + 1 for d in dims]
