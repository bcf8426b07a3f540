"""Floor 3: making linear programs smaller.

A program that will run a hundred times is worth simplifying. Passes are small functions from
a program to a program that is the same map:

- `merge_copies` drops casts and views that change nothing and computes equal things once;
- `join_parts` puts side by side what would be padded with zeros and added;
- `share_matrices` multiplies a batch by one matrix where all are the same;
- `fold_diagonals` treats a pointwise linear operation as what it is, a diagonal: chains of
  diagonals multiply into one, sums of diagonals of the same base add.

In each pass values are kept as sums Σ dᵢ ⊙ baseᵢ, and only what is not pointwise (matrix
products, stencils, reductions, calls of custom Functions) remains as a step.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch

from ._linearity import schema_of
from ._program import (
    Emitter,
    Equation,
    Operation,
    Program,
    Residual,
    Var,
    evaluated,
    map_leaves,
    total_bytes,
)
from ._rules import UNTAGGED_POINTWISE
from ._space import TensorSpec
from ._torch import OpOverload, aten, reachable_elsewhere

#: A coefficient of a term: a number, or a residual that broadcasts to the base's shape.
Coefficient: TypeAlias = "complex | Residual"

#: The source of residuals made here.
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


#: The passes, in order.
PASSES: tuple[Callable[[Program], Program], ...]


def simplify(program: Program) -> Program:
    """Return a smaller program that is the same map."""
    for one in PASSES:
        program = one(program)
    return program


def guards(before: Program, after: Program) -> list[Residual]:
    """Return the residuals that only `before` reads and that somebody else can change."""
    kept = {id(r) for r in after.residuals()}
    gone = [r for r in before.residuals() if id(r) not in kept]
    return watched(gone, before.residuals())


def watched(residuals: Iterable[Residual], ours: Iterable[Residual]) -> list[Residual]:
    """Return those residuals that somebody else can change.

    A tensor whose storage nobody but `ours` refers to cannot be changed from outside.
    """
    count: Counter[int] = Counter()
    for r in ours:
        if r.size:
            count[r.tensor.untyped_storage().data_ptr()] += 1
    return [
        r
        for r in residuals
        if r.size and reachable_elsewhere(r.tensor, count[r.tensor.untyped_storage().data_ptr()])
    ]


def explain(program: Program) -> str:
    """Tell what each pass makes of a program: equations and bytes kept."""
    lines = [f"{program.name}: {_size(program)}"]
    for one in PASSES:
        program = one(program)
        lines.append(f"  after {one.__name__}: {_size(program)}")
    return "\n".join(lines)


def _size(program: Program) -> str:
    kept = total_bytes(program.kept_tensors())
    return f"{len(program.equations)} equations, {kept:,} bytes kept"


# -- views, casts and repetitions ----------------------------------------------------------


_NOTHING = frozenset(
    {
        aten.alias.default,
        aten.detach.default,
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.expand.default,
        aten._to_copy.default,
        aten.squeeze.dim,
        aten.squeeze.default,
        aten.lift_fresh.default,
    }
)
_RESHAPES = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.squeeze.default,
    }
)


def merge_copies(program: Program) -> Program:
    """Drop operations that change nothing, join reshapes, compute equal things once."""
    same: dict[Var, Var] = {}
    origin: dict[Var, Var] = {}
    known: dict[Any, tuple[Var | None, ...]] = {}
    kept: list[Equation] = []

    def rename(x: Any) -> Any:
        return same.get(x, x) if isinstance(x, Var) else x

    for eq in program.equations:
        args, kwargs = map_leaves(rename, eq.args), map_leaves(rename, eq.kwargs)
        out = eq.outputs[0] if len(eq.outputs) == 1 else None
        if isinstance(eq.op, Operation) or not isinstance(eq.op, OpOverload):
            kept.append(Equation(eq.op, args, kwargs, eq.outputs, eq.source))
            continue
        idle = eq.op in _NOTHING and isinstance(args[0], Var)
        if out is not None and idle and args[0].spec == out.spec:
            same[out] = args[0]
            continue
        op = eq.op
        if out is not None and op in _RESHAPES and isinstance(args[0], Var):
            base = origin.get(args[0], args[0])
            origin[out] = base
            if base.spec == out.spec:
                same[out] = base
                continue
            if base is not args[0]:
                op, args, kwargs = aten.reshape.default, (base, list(out.spec.shape)), {}
        key = _key(op, args, kwargs)
        if key in known and all(
            a is not None or b is None for a, b in zip(known[key], eq.outputs, strict=True)
        ):
            pairs = zip(eq.outputs, known[key], strict=True)
            same |= {ours: theirs for ours, theirs in pairs if ours and theirs}
            continue
        known[key] = eq.outputs
        kept.append(Equation(op, args, kwargs, eq.outputs, eq.source))
    outputs = [None if v is None else same.get(v, v) for v in program.outputs]
    return program.with_equations(kept, outputs).live()


def _key(op: Any, args: Any, kwargs: Any) -> Any:
    return op, _frozen(args), tuple((k, _frozen(v)) for k, v in sorted(kwargs.items()))


def _frozen(x: Any) -> Any:
    if isinstance(x, (list, tuple)):
        return tuple(map(_frozen, x))
    return id(x) if isinstance(x, (Var, Residual)) else (type(x).__name__, repr(x))


# -- diagonals ------------------------------------------------------------------------------


def fold_diagonals(program: Program) -> Program:
    """Multiply chains of pointwise operations into one, and add those with the same base.

    Factors that are fine one after the other may overflow when they are multiplied first; a
    program of which that is true is left alone.
    """
    folded = _Folding(program).run()
    new = [r for r in folded.residuals() if r.source == FOLDED]
    return folded if finite([r.tensor for r in new]) else program


def finite(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether no tensor holds an infinite number or NaN; denied too if a sum overflows.

    One pass over each tensor, and the host waits for the device once.
    """
    sums = [t.sum().abs() for t in tensors]
    groups: dict[Any, list[torch.Tensor]] = {}
    for t in sums:
        groups.setdefault((t.dtype, t.device), []).append(t)
    return all(bool(torch.isfinite(torch.stack(group)).all()) for group in groups.values())


class _Folding:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.forms: dict[Var, _Form] = {}
        self.computed: dict[Var, Var] = {}
        self.moved: dict[Any, Var] = {}
        self.e = Emitter()
        #: Values that are needed as they are, by steps or as results, or more than once.
        self.results = {v for v in program.outputs if v is not None}
        self.needed = set(self.results)
        met: set[Var] = set()
        for eq in program.equations:
            read = set(eq.inputs())
            self.needed.update(read & met if _foldable(eq) else read)
            met |= read

    def run(self) -> Program:
        last = {v: i for i, eq in enumerate(self.program.equations) for v in eq.inputs()}
        with torch.no_grad():
            for i, eq in enumerate(self.program.equations):
                out = eq.outputs[0] if len(eq.outputs) == 1 else None
                form = self.folded(eq, out) if out is not None else None
                if form is not None and out is not None:
                    self.forms[out] = form
                    if len(form.terms) > 1 and out in self.needed:
                        # Each use would otherwise repeat its terms.
                        self.value(out)
                elif not self.scaled(eq):
                    self.step(eq)
                for v in eq.inputs():
                    if last[v] == i and v not in self.results:
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
        args, kwargs = map_leaves(rename, eq.args), map_leaves(rename, eq.kwargs)
        self.e.equations.append(Equation(eq.op, args, kwargs, bare, eq.source))
        for v, new in zip(eq.outputs, bare, strict=True):
            if v is not None and new is not None:
                self.forms[v] = _Form({new: number})
        return True

    def step(self, eq: Equation) -> None:
        """Keep an equation, with its arguments computed."""

        def rename(x: Any) -> Any:
            return self.value(x) if isinstance(x, Var) else x

        args, kwargs = map_leaves(rename, eq.args), map_leaves(rename, eq.kwargs)
        self.e.equations.append(Equation(eq.op, args, kwargs, eq.outputs, eq.source))

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
        factor = _factor(eq, x)
        if factor is None:
            return None
        before = self.form(x)
        terms: dict[Var, Coefficient] = {}
        for base, c in before.terms.items():
            product = factor(c)
            if product is None or _grows(product, c, eq):
                return None
            terms[base] = product
        alone = len(terms) == 1 and x not in self.forms
        return _Form(terms, eq if alone else None)

    def move(self, eq: Equation, out: Var) -> _Form | None:
        """Return the form of a moved value d ⊙ base: the moved d ⊙ the moved base."""
        x, *rest = eq.args
        form = self.forms.get(x)
        if form is None or x in self.computed or len(form.terms) != 1:
            return None
        ((base, c),) = form.terms.items()
        if isinstance(c, Residual):
            if c.tensor.shape != x.spec.shape:
                return None
            c = evaluated(eq.op, c, *rest, source=FOLDED, **eq.kwargs)
        key = _key(eq.op, (base, *rest), eq.kwargs)
        if key not in self.moved:
            self.moved[key] = self.e.emit(eq.op, (base, *rest), out.spec, **eq.kwargs)
        return _Form({self.moved[key]: c})

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
            c = _product(c, sign)
            terms[base] = _total(terms[base], c) if base in terms else c
        return _Form(terms) if len(terms) <= MOST_TERMS else None

    def common(self, a: Var, b: Var) -> tuple[tuple[Var, Var], complex] | None:
        """Return the bases of two values and the number that both are multiplied by."""
        first, second = self.form(a).terms, self.form(b).terms
        if len(first) != 1 or len(second) != 1:
            return None
        ((x, c),), ((y, d),) = first.items(), second.items()
        if isinstance(c, Residual) or isinstance(d, Residual) or c != d or c == 1 or x is y:
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
            form.terms.items(), key=lambda t: (not isinstance(t[1], Residual), not _is_one(t[1]))
        )
        for base, c in terms:
            total = self.add_term(total, base, c, v.spec)
        assert total is not None
        return total

    def add_term(self, total: Var | None, base: Var, c: Coefficient, spec: TensorSpec) -> Var:
        """Emit `total + c * base`."""
        if isinstance(c, Residual):
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
_MOVES = frozenset(
    {
        aten.roll.default,
        aten.flip.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.t.default,
        aten.transpose.int,
        aten.permute.default,
        aten.view.default,
        aten.reshape.default,
        aten.unsqueeze.default,
    }
)


def _foldable(eq: Equation) -> bool:
    """Whether an equation can become a part of a sum of terms."""
    out = eq.outputs[0] if len(eq.outputs) == 1 else None
    variables = eq.inputs()
    if out is None or not isinstance(eq.op, OpOverload):
        return False
    if eq.op in _MOVES:
        return True
    if eq.op in (aten.add.Tensor, aten.sub.Tensor):
        return len(variables) == 2 and all(v.spec == out.spec for v in variables)
    if len(variables) != 1 or variables[0].spec != out.spec:
        return False
    return _factor(eq, variables[0]) is not None


def _grows(product: Coefficient, c: Coefficient, eq: Equation) -> bool:
    """Whether a coefficient is larger than all that it is made from (an outer product)."""
    if not isinstance(product, Residual):
        return False
    sizes = [c.tensor.numel() if isinstance(c, Residual) else 1]
    sizes += [r.tensor.numel() for r in eq.residuals()]
    return product.tensor.numel() > max(sizes)


def _factor(eq: Equation, x: Var) -> Callable[[Coefficient], Coefficient | None] | None:
    """Return what a pointwise operation makes of a coefficient, None if it is no diagonal."""
    op, args = eq.op, eq.args
    if op is aten.neg.default:
        return lambda c: _product(c, -1)
    if op in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
        if eq.kwargs:
            return None
        other = args[1] if args[0] is x else args[0]
        divide = op in (aten.div.Tensor, aten.div.Scalar)
        return lambda c: _times(c, other, x.spec, divide=divide)
    assert isinstance(op, OpOverload)
    schema = schema_of(op)
    if not (schema.pointwise or schema.name in UNTAGGED_POINTWISE):
        return None
    if x.spec.dtype.is_complex or not all(_fits(r.tensor, x.spec) for r in eq.residuals()):
        return None

    def apply(c: Coefficient) -> Coefficient | None:
        whole = evaluated(aten.expand.default, _residual(c, x.spec), x.spec.shape, source=FOLDED)
        args = [whole if a is x else a for a in eq.args]
        return evaluated(op, *args, source=FOLDED, **eq.kwargs)

    return apply


def _fits(t: torch.Tensor, spec: TensorSpec) -> bool:
    return bool(torch.broadcast_shapes(t.shape, spec.shape) == torch.Size(spec.shape))


def _residual(c: Coefficient, spec: TensorSpec) -> Residual:
    if isinstance(c, Residual):
        return c
    value = c.real if isinstance(c, complex) and not spec.dtype.is_complex else c
    kwargs = {"dtype": spec.dtype, "device": spec.device}
    return evaluated(aten.full.default, [], value, source=FOLDED, **kwargs)


def _product(a: Coefficient, b: Coefficient) -> Coefficient:
    """Return a · b."""
    if isinstance(a, Residual) or isinstance(b, Residual):
        if not isinstance(a, Residual):
            a, b = b, a
        return a if _is_one(b) else evaluated(aten.mul.Tensor, a, b, source=FOLDED)
    return a * b


def _total(a: Coefficient, b: Coefficient) -> Coefficient:
    """Return a + b."""
    if isinstance(a, Residual) or isinstance(b, Residual):
        first, second = (a, b) if isinstance(a, Residual) else (b, a)
        return evaluated(aten.add.Tensor, first, second, source=FOLDED)
    return a + b


def _is_one(c: Coefficient) -> bool:
    return isinstance(c, (int, float, complex)) and c == 1


def _times(c: Coefficient, by: Any, spec: TensorSpec, *, divide: bool) -> Coefficient | None:
    """Return c · by, or c / by; None if that is no coefficient of a value like `spec`."""
    if not isinstance(by, (Residual, int, float, complex)):
        return None
    if isinstance(by, Residual):
        if not _fits(by.tensor, spec):
            return None
        if by.tensor.dtype != spec.dtype:
            by = evaluated(aten._to_copy.default, by, source=FOLDED, dtype=spec.dtype)
    if _is_one(c) and not divide:
        # Marked as made here, so that it is watched for overflow like the others.
        return (
            evaluated(aten.resolve_conj.default, by, source=FOLDED)
            if isinstance(by, Residual)
            else by
        )
    if not divide:
        return _product(c, by)
    if isinstance(by, Residual):
        if isinstance(c, Residual):
            return evaluated(aten.div.Tensor, c, by, source=FOLDED)
        inverse = evaluated(aten.reciprocal.default, by, source=FOLDED)
        return _product(inverse, c)
    if isinstance(c, Residual):
        return None if by == 0 else evaluated(aten.div.Scalar, c, by, source=FOLDED)
    return None if by == 0 else c / by


# -- parts of one whole, one matrix for all ---------------------------------------------------

_PARTS = {
    aten.select_backward.default: aten.stack.default,
    aten.slice_backward.default: aten.cat.default,
}


def join_parts(program: Program) -> Program:
    """Replace a sum of parts, each padded with zeros to the whole, by the parts side by side."""
    made = {eq.outputs[0]: eq for eq in program.equations if len(eq.outputs) == 1}
    uses = Counter(v for eq in program.equations for v in eq.inputs())
    uses.update(v for v in program.outputs if v is not None)
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


def share_matrices(program: Program) -> Program:
    """Multiply a batch by one matrix, instead of by as many copies of it."""
    e = Emitter()
    for eq in program.equations:
        out = eq.outputs[0]
        if eq.op is not aten.bmm.default or out is None:
            e.equations.append(eq)
            continue
        v, r = eq.args
        if not (isinstance(v, Var) and isinstance(r, Residual) and r.tensor.stride(0) == 0):
            e.equations.append(eq)
            continue
        count, rows, inner = v.spec.shape
        columns = out.spec.shape[-1]
        e.source = eq.source
        matrix = evaluated(aten.select.int, r, 0, 0, source=r.source)
        matrix.version = r.version
        flat = TensorSpec((count * rows, inner), out.spec.dtype, out.spec.device)
        tall = e.emit(aten.reshape.default, (v, list(flat.shape)), flat)
        product = TensorSpec((count * rows, columns), out.spec.dtype, out.spec.device)
        done = e.emit(aten.mm.default, (tall, matrix), product)
        args = (done, list(out.spec.shape))
        e.equations.append(Equation(aten.reshape.default, args, {}, (out,), eq.source))
    return program.with_equations(e.equations)


PASSES = (merge_copies, join_parts, share_matrices, fold_diagonals, merge_copies)
