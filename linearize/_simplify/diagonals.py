"""Folding diagonals.

A pointwise operation that is linear in its one variable argument is a diagonal: chains of
diagonals multiply into one, sums of diagonals of the same base add. Values are kept as sums
Σ dᵢ ⊙ baseᵢ, and only what is not pointwise (matrix products, stencils, reductions, calls of
custom Functions) remains as a step.

What chooses between an entry and zero remains a step too, with the factors taken out of it: to
multiply by zero makes NaN of an infinity in the branch that was not taken.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from .._programs.aten import CHOICES, MULTIPLYING, SHOWN, chooses, schema_of
from .._programs.broadcast import broadcasts
from .._programs.numbers import Numbers
from .._programs.program import Emitter, Equation, Operation, Program
from .._programs.residuals import finite
from .._programs.values import Constant, Var, frozen
from .._spaces.space import TensorSpec
from .._torch.names import OpOverload, aten
from .equal_numbers import keep_once

#: A coefficient of a term: a number, or a constant that broadcasts to the base's shape.
Coefficient: TypeAlias = "complex | Constant"

#: What the constants made here are for.
FOLDED = "folded diagonals"
#: A sum of more terms than this is computed before it is used further.
MOST_TERMS = 6


@dataclasses.dataclass(slots=True)
class _Form:
    """A value as a sum of coefficients times bases, not computed yet.

    Attributes
    ----------
    terms
        Coefficient by base.
    equation
        The equation that computes it as it stood, if it is one operation on one base.
    """

    terms: dict[Var, Coefficient]
    equation: Equation | None = None


def fold_diagonals(program: Program, numbers: Numbers) -> Program:
    """Multiply chains of pointwise operations into one, and add those with the same base.

    Factors that are fine one after the other may overflow when they are multiplied first; a
    program of which that is true is left alone.
    """
    folded = _Folding(program, numbers).run()
    new = [c for c in folded.constants if c.folded]
    if not finite([numbers[c] for c in new]):
        return program
    keep_once([c for c in new if c.spec.numel > 1], numbers)
    return folded


class _Folding:
    def __init__(self, program: Program, numbers: Numbers) -> None:
        self.program = program
        self.c = _Coefficients(numbers)
        self.forms: dict[Var, _Form] = {}
        self.computed: dict[Var, Var] = {}
        self.moved: dict[Any, Var] = {}
        #: How entries were chosen of which these are.
        self.choices: dict[Var, Any] = {}
        self.e = Emitter(numbers=numbers)
        #: How often each variable is read, with those that were made here.
        self.readers = Counter(v for eq in program.equations for v in eq.inputs())
        #: Values that are needed as they are, by steps or as results, or more than once.
        self.results = {v for v in program.outputs if v is not None}
        self.needed = set(self.results)
        met: set[Var] = set()
        for eq in program.equations:
            read = set(eq.inputs())
            self.needed.update(read & met if _foldable(self.c, eq) else read)
            met |= read

    def run(self) -> Program:
        with torch.no_grad():
            for eq, gone in zip(self.program.equations, self.program.last_uses(), strict=True):
                out = eq.result
                form = self.folded(eq, out) if out is not None else None
                if form is not None and out is not None:
                    self.forms[out] = form
                    if len(form.terms) > 1 and out in self.needed:
                        # Each use would otherwise repeat its terms.
                        self.value(out)
                elif not self.scaled(eq):
                    self.step(eq)
                for v in gone:
                    self.forms.pop(v, None)  # its coefficients are not needed any more
            outputs = [None if v is None else self.value(v) for v in self.program.outputs]
        return self.program.with_equations(self.e.equations, outputs).live()

    def scaled(self, eq: Equation) -> bool:
        """Keep an equation, with a number in its one argument left for later: A(c x) = c (A x).

        In the end numbers meet a coefficient or a sum, where they cost nothing.
        """
        variables = set(eq.inputs())
        if len(variables) != 1 or isinstance(eq.op, Operation):
            return False
        (x,) = variables
        form = self.forms.get(x)
        if form is None or x in self.computed or len(form.terms) != 1:
            return False
        ((base, c),) = form.terms.items()
        number = c.real if isinstance(c, complex) and c.imag == 0 else c
        if not isinstance(number, (int, float)) or base.spec != x.spec:
            return False  # what is linear for real numbers need not be for complex ones

        def rename(y: Any) -> Any:
            return base if y is x else y

        bare = tuple(None if v is None else Var(v.spec) for v in eq.outputs)
        self.e.equations.append(eq.renamed(rename, outputs=bare))
        for v, new in zip(eq.outputs, bare, strict=True):
            if v is not None and new is not None:
                self.forms[v] = _Form({new: number})
        return True

    def step(self, eq: Equation) -> None:
        """Keep an equation, with its arguments computed."""
        self.e.equations.append(eq.renamed(lambda x: self.value(x) if type(x) is Var else x))

    def form(self, v: Var) -> _Form:
        """Return a value as a sum of terms; what is computed already is its own base."""
        if v in self.computed:
            return _Form({self.computed[v]: 1.0})
        return self.forms.get(v) or _Form({v: 1.0})

    # -- folding ------------------------------------------------------------------------

    def folded(self, eq: Equation, out: Var) -> _Form | None:
        """Return the form of an equation's result, None if the equation must be a step."""
        if not isinstance(eq.op, OpOverload):
            return None
        if eq.op in (aten.add.Tensor, aten.sub.Tensor):
            return self.sum(eq, out)
        if eq.op in _MOVES:
            return self.move(eq, out)
        variables = eq.inputs()
        if len(variables) != 1 or sum(a is variables[0] for a in eq.args) != 1:
            return None
        x = variables[0]
        if x.spec != out.spec:
            return None
        if chooses(eq.op):
            return self.choice(eq, x)
        factor = _factor(self.c, eq, x)
        if factor is None:
            return None
        before = self.form(x)
        if len(before.terms) > 1 and eq.constants() and not self.shared(before):
            return None  # d ⊙ Σ takes one factor, Σ d ⊙ takes one for each term
        terms: dict[Var, Coefficient] = {}
        for base, c in before.terms.items():
            product = factor(c)
            if product is None or _grows(product, c, eq):
                return None
            terms[base] = product
        alone = len(terms) == 1 and x not in self.forms
        return _Form(terms, eq if alone else None)

    def choice(self, eq: Equation, x: Var) -> _Form | None:
        """Return the form of chosen entries of d ⊙ base: d ⊙ the chosen entries of the base."""
        if not _real_and_broadcast(eq, x):
            return None
        form = self.form(x)
        if len(form.terms) != 1:
            form = _Form({self.value(x): 1.0})
        ((base, c),) = form.terms.items()
        if base.spec != x.spec:
            return None
        if isinstance(c, Constant) and eq.op in CHOICES:
            # Where it is not chosen it may be infinite.
            whole = self.c.evaluated(aten.expand.default, c, list(x.spec.shape))
            made = self.c.evaluated(eq.op, *_with(eq, x, whole), **eq.kwargs)
            c = c if _grows(made, c, eq) else made
        return _Form({self.chosen(eq, x, base): c})

    def chosen(self, eq: Equation, x: Var, base: Var) -> Var:
        """Return the chosen entries of a base, emitted once."""
        key = frozen(eq.op, _with(eq, x, None), eq.kwargs)
        if self.choices.get(base) == key:
            return base
        if (key, base) not in self.moved:
            new = self.e.emit(eq.op, _with(eq, x, base), base.spec, **eq.kwargs)
            self.moved[key, base] = new
            self.readers[new] += 1
            if eq.op in CHOICES:
                self.choices[new] = key
        return self.moved[key, base]

    def shared(self, form: _Form) -> bool:
        """Whether something else is made of the bases of a sum, so that terms may be added."""
        return any(self.readers[base] > 1 for base in form.terms)

    def move(self, eq: Equation, out: Var) -> _Form | None:
        """Return the form of a moved value d ⊙ base: the moved d ⊙ the moved base."""
        x, *rest = eq.args
        form = self.forms.get(x)
        if form is None or x in self.computed or len(form.terms) != 1:
            return None
        if eq.op in SHOWN and self.readers[x] > 1:
            return None  # to move what is computed anyway costs nothing
        ((base, c),) = form.terms.items()
        if isinstance(c, Constant):
            if c.spec.shape != x.spec.shape:
                return None
            c = self.c.evaluated(eq.op, c, *rest, **eq.kwargs)
        key = frozen(eq.op, (base, *rest), eq.kwargs)
        if key not in self.moved:
            self.moved[key] = self.e.emit(eq.op, (base, *rest), out.spec, **eq.kwargs)
        moved = self.moved[key]
        self.readers[moved] += self.readers[out]
        return _Form({moved: c}, self.shown(form.equation, eq, moved))

    def shown(self, diagonal: Equation | None, move: Equation, x: Var) -> Equation | None:
        """Return a diagonal in another shape, None if that takes memory that it did not take.

        `move` shows its result in another shape; `x` is its argument in that shape.
        """
        if diagonal is None or diagonal.op not in _LIGHT or move.op not in SHOWN:
            return None
        numbers = self.e.numbers
        shape, rest = diagonal.outputs[0].spec.shape, move.args[1:]  # type: ignore[union-attr]
        for c in diagonal.constants():
            t = numbers[c]
            if c.spec.shape != shape or not _same_memory(move.op(t, *rest), t):
                return None
        made = diagonal.renamed(
            lambda y: x if isinstance(y, Var) else numbers.viewed(move.op, y, *rest)
        )
        return Equation(made.op, made.args, made.kwargs, move.outputs, made.source)

    def sum(self, eq: Equation, out: Var) -> _Form | None:
        """Return the form of a sum or difference of values of one shape and dtype."""
        a, b = eq.args[:2]
        if not (isinstance(a, Var) and isinstance(b, Var) and a.spec == out.spec == b.spec):
            return None
        alpha = eq.kwargs.get("alpha", 1)
        sign = -alpha if eq.op is aten.sub.Tensor else alpha
        common = self.common(a, b)
        if common is not None and sign == 1:
            (x, y), number = common
            return _Form({self.e.emit(aten.add.Tensor, (x, y), out.spec): number})
        terms = dict(self.form(a).terms)
        for base, c in self.form(b).terms.items():
            c = self.c.product(c, sign)
            terms[base] = self.c.total(terms[base], c) if base in terms else c
        return _Form(terms) if len(terms) <= MOST_TERMS else None

    def common(self, a: Var, b: Var) -> tuple[tuple[Var, Var], complex] | None:
        """Return the bases of two values and the number that both are multiplied by."""
        first, second = self.form(a).terms, self.form(b).terms
        if len(first) != 1 or len(second) != 1:
            return None
        ((x, c),), ((y, d),) = first.items(), second.items()
        if isinstance(c, Constant) or isinstance(d, Constant) or c != d or c == 1 or x is y:
            return None
        return (x, y), c

    # -- computing ----------------------------------------------------------------------

    def value(self, v: Var) -> Var:
        """Return the variable that holds a value, computing it if it is a form still."""
        if v in self.computed:
            return self.computed[v]
        form = self.forms.get(v)
        if form is None:
            return v
        result = self.compute(form, v)
        self.computed[v] = result
        if result is not v:
            self.readers[result] += self.readers[v]
        return result

    def compute(self, form: _Form, v: Var) -> Var:
        """Emit the equations of a sum of terms."""
        if form.equation is not None:
            self.step(form.equation)
            return v
        total: Var | None = None
        # Products with tensors first: the first needs no addition. Then plain terms: the
        # first needs nothing at all.
        terms = sorted(
            form.terms.items(), key=lambda t: (not isinstance(t[1], Constant), not _is_one(t[1]))
        )
        for base, c in terms:
            total = self.add_term(total, base, c, v.spec)
        assert total is not None
        return total

    def add_term(self, total: Var | None, base: Var, c: Coefficient, spec: TensorSpec) -> Var:
        """Emit `total + c * base`."""
        if isinstance(c, Constant):
            if total is None:
                return self.e.emit(aten.mul.Tensor, (base, c), spec)
            return self.e.emit(aten.addcmul.default, (total, base, c), spec)
        number = c.real if isinstance(c, complex) and c.imag == 0 else c
        if total is None:
            return base if number == 1 else self.e.emit(aten.mul.Scalar, (base, number), spec)
        if number == 1:
            return self.e.emit(aten.add.Tensor, (total, base), spec)
        return self.e.emit(aten.add.Tensor, (total, base), spec, alpha=number)


#: Operations that put the entries of a tensor elsewhere, or some of them.
_MOVES = SHOWN | {aten.roll.default, aten.flip.default, aten.slice.Tensor, aten.select.int}


def _with(eq: Equation, x: Var, new: Any) -> tuple[Any, ...]:
    """Return an equation's arguments with another one in place of a variable."""
    return tuple([new if a is x else a for a in eq.args])


#: Diagonals that take no longer than a multiplication.
_LIGHT = frozenset(
    {
        aten.mul.Tensor,
        aten.threshold_backward.default,
        aten.tanh_backward.default,
        aten.sigmoid_backward.default,
    }
)


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _foldable(coefficients: _Coefficients, eq: Equation) -> bool:
    """Whether an equation can become a part of a sum of terms."""
    out, variables = eq.result, eq.inputs()
    if out is None or not isinstance(eq.op, OpOverload):
        return False
    if eq.op in _MOVES:
        return True
    if eq.op in (aten.add.Tensor, aten.sub.Tensor):
        return len(variables) == 2 and all(v.spec == out.spec for v in variables)
    if len(variables) != 1 or variables[0].spec != out.spec:
        return False
    return _factor(coefficients, eq, variables[0]) is not None


def _grows(product: Coefficient, c: Coefficient, eq: Equation) -> bool:
    """Whether a coefficient is larger than all that it is made from (an outer product)."""
    if not isinstance(product, Constant):
        return False
    sizes = [c.spec.numel if isinstance(c, Constant) else 1]
    sizes += [r.spec.numel for r in eq.constants()]
    return product.spec.numel > max(sizes)


def _factor(
    coefficients: _Coefficients, eq: Equation, x: Var
) -> Callable[[Coefficient], Coefficient | None] | None:
    """Return what a pointwise operation makes of a coefficient, None if it is no diagonal."""
    op, args = eq.op, eq.args
    if op is aten.neg.default:
        return lambda c: coefficients.product(c, -1)
    if op in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
        if eq.kwargs:
            return None
        other = args[1] if args[0] is x else args[0]
        divide = op in (aten.div.Tensor, aten.div.Scalar)
        return lambda c: coefficients.times(c, other, x.spec, divide=divide)
    assert isinstance(op, OpOverload)
    if schema_of(op).name not in MULTIPLYING:
        return None
    if not _real_and_broadcast(eq, x):
        return None

    def apply(c: Coefficient) -> Coefficient | None:
        # Numbers are left for later: where they stand differs between the two directions.
        given = coefficients.constant(c if isinstance(c, Constant) else 1, x.spec)
        whole = coefficients.evaluated(aten.expand.default, given, list(x.spec.shape))
        made = coefficients.evaluated(op, *_with(eq, x, whole), **eq.kwargs)
        return made if isinstance(c, Constant) else coefficients.product(made, c)

    return apply


def _real_and_broadcast(eq: Equation, x: Var) -> bool:
    """Whether a variable is real, and the constants besides broadcast to its shape."""
    shapes = (c.spec.shape for c in eq.constants())
    return not x.spec.dtype.is_complex and all(broadcasts(s, x.spec.shape) for s in shapes)


def _is_one(c: Coefficient) -> bool:
    return isinstance(c, (int, float, complex)) and c == 1


class _Coefficients:
    """Computes coefficients."""

    def __init__(self, numbers: Numbers) -> None:
        self.numbers = numbers

    def evaluated(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Constant:
        """Apply an operation to constants, now."""
        return self.numbers.evaluated(op, *args, source=FOLDED, folded=True, **kwargs)

    def constant(self, c: Coefficient, spec: TensorSpec) -> Constant:
        """Return a coefficient as a constant."""
        if isinstance(c, Constant):
            return c
        value = c.real if isinstance(c, complex) and not spec.dtype.is_complex else c
        kwargs = {"dtype": spec.dtype, "device": spec.device}
        return self.evaluated(aten.full.default, [], value, **kwargs)

    def product(self, a: Coefficient, b: Coefficient) -> Coefficient:
        """Return a · b."""
        if isinstance(a, Constant) or isinstance(b, Constant):
            if not isinstance(a, Constant):
                a, b = b, a
            return a if _is_one(b) else self.evaluated(aten.mul.Tensor, a, b)
        return a * b

    def total(self, a: Coefficient, b: Coefficient) -> Coefficient:
        """Return a + b."""
        if isinstance(a, Constant) or isinstance(b, Constant):
            first, second = (a, b) if isinstance(a, Constant) else (b, a)
            return self.evaluated(aten.add.Tensor, first, second)
        return a + b

    def times(
        self, c: Coefficient, by: Any, spec: TensorSpec, *, divide: bool
    ) -> Coefficient | None:
        """Return c · by, or c / by; None if that is no coefficient of a value like `spec`."""
        if not isinstance(by, (Constant, int, float, complex)):
            return None
        if isinstance(by, Constant):
            if not broadcasts(by.spec.shape, spec.shape):
                return None
            if by.spec.dtype != spec.dtype:
                by = self.evaluated(aten._to_copy.default, by, dtype=spec.dtype)
        if _is_one(c) and not divide:
            # Marked as made here, so that it is watched for overflow like the others.
            return (
                self.evaluated(aten.resolve_conj.default, by) if isinstance(by, Constant) else by
            )
        if not divide:
            return self.product(c, by)
        if isinstance(by, Constant):
            if isinstance(c, Constant):
                return self.evaluated(aten.div.Tensor, c, by)
            return self.product(self.evaluated(aten.reciprocal.default, by), c)
        if by == 0:
            return None
        return self.evaluated(aten.div.Scalar, c, by) if isinstance(c, Constant) else c / by
