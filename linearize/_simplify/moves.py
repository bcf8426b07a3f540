"""Reshapes and permutations, merged and put where they cost least.

A chain of them takes the entries of a value elsewhere: the value's dimensions are cut into
pieces, the pieces permuted and joined to other dimensions. What a chain does is found so, and
done in at most three steps. Matrix products let the order of their rows through.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from .._programs.aten import RESHAPES, permutation
from .._programs.numbers import Numbers
from .._programs.program import Emitter, Equation, Program
from .._programs.values import Constant, Var
from .._spaces.space import TensorSpec
from .._torch.names import aten
from .copies import laid_out


def merge_moves(program: Program, numbers: Numbers) -> Program:
    """Do chains of reshapes and permutations in few steps, before or after matrix products."""
    moved = _Moves(program, numbers).run()
    return moved if len(moved.equations) <= len(program.equations) else program


@dataclasses.dataclass(frozen=True, slots=True)
class _Form:
    """A value as another one whose dimensions are cut into pieces and permuted.

    Attributes
    ----------
    base
        The other value.
    sizes
        Of the pieces, in the order in which they lie in `base`; none is 1.
    order
        The pieces in the order in which they lie in the value.
    """

    base: Var
    sizes: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def moved(self) -> tuple[int, ...]:
        """The sizes as they lie in the value."""
        return tuple([self.sizes[i] for i in self.order])

    def cut(self, shape: Sequence[int]) -> _Form | None:
        """Cut pieces so that each dimension of a shape is made of whole ones."""
        sizes, order = list(self.sizes), list(self.order)
        ends, place = {math.prod(shape[:i]) for i in range(len(shape) + 1)}, 1
        at = 0
        while at < len(order):
            size = sizes[order[at]]
            inside = sorted(e for e in ends if place < e < place * size)
            if inside:
                first, rest = divmod(inside[0], place)
                if rest or size % first:
                    return None
                piece = order[at]
                sizes[piece : piece + 1] = [first, size // first]
                order = [i + (i > piece) for i in order]
                order.insert(at + 1, piece + 1)
                size = first
            place *= size
            at += 1
        return _Form(self.base, tuple(sizes), tuple(order))

    def groups(self, shape: Sequence[int]) -> list[list[int]]:
        """Return the pieces of each dimension; after `cut`."""
        rest = list(self.order)
        found: list[list[int]] = []
        for n in shape:
            found.append([])
            while math.prod(self.sizes[i] for i in found[-1]) != n:
                found[-1].append(rest.pop(0))
        return found

    def of_base(self) -> list[list[int]]:
        """Return the pieces of each dimension of the base."""
        straight = _Form(self.base, self.sizes, tuple(range(len(self.sizes))))
        return straight.groups(self.base.spec.shape)

    def coarse(self, apart: Sequence[Sequence[int]] = ()) -> _Form:
        """Join pieces that stay side by side, but for the first ones of groups."""
        firsts = {group[0] for group in apart if group}
        runs: list[list[int]] = []
        for i in self.order:
            if runs and runs[-1][-1] == i - 1 and i not in firsts:
                runs[-1].append(i)
            else:
                runs.append([i])
        starts = sorted(run[0] for run in runs)
        by_start = {run[0]: math.prod(self.sizes[i] for i in run) for run in runs}
        sizes = tuple([by_start[s] for s in starts])
        return _Form(self.base, sizes, tuple([starts.index(run[0]) for run in runs]))

    def shortest(self, shape: Sequence[int]) -> _Form:
        """Return the form that takes fewest steps to a value of a shape."""
        forms = [self.coarse(), self.coarse(self.of_base())]
        cut = self.cut(shape)
        if cut is not None:
            forms += [cut.coarse(cut.groups(shape))]
        return min(
            forms, key=lambda f: (f.sizes != self.base.spec.shape) + (f.moved != tuple(shape))
        )

    @property
    def straight(self) -> bool:
        """Whether nothing is permuted."""
        return list(self.order) == sorted(self.order)


def _whole(v: Var) -> _Form:
    sizes = tuple([n for n in v.spec.shape if n != 1])
    return _Form(v, sizes, tuple(range(len(sizes))))


def turned(e: Emitter, x: Var | Constant) -> Var | Constant:
    """Return a matrix, or each of a batch, transposed."""
    *batch, rows, columns = x.spec.shape
    op, dims = (aten.transpose.int, (1, 2)) if batch else (aten.t.default, ())
    if isinstance(x, Constant):
        return e.numbers.viewed(op, x, *dims)
    return e.emit(op, (x, *dims), x.spec.shaped(*batch, columns, rows))


class _Moves:
    def __init__(self, program: Program, numbers: Numbers) -> None:
        self.program = program
        self.uses = program.uses()
        self.strided = laid_out(program)
        self.e = Emitter(numbers=numbers)
        self.forms: dict[Var, _Form] = {}
        self.same: dict[Var, Var] = {}
        self.products: dict[Var, Equation] = {}
        #: Values in the first other shape that they were shown in.
        self.copied: dict[Var, Var] = {}
        #: The operands of products, as they were before they were moved.
        self.operands: dict[Var, _Form] = {}
        self.readers: dict[Var, list[Equation]] = {}
        for eq in program.equations:
            for v in eq.inputs():
                self.readers.setdefault(v, []).append(eq)
        self.results = set(program.outputs)

    def run(self) -> Program:
        for eq in self.program.equations:
            self.e.source = eq.source
            if not (self.move(eq) or self.turn_rows(eq) or self.stack(eq)):
                self.step(eq)
        outputs = [None if v is None else self.value(v) for v in self.program.outputs]
        return self.program.with_equations(self.e.equations, outputs).live()

    def step(self, eq: Equation) -> None:
        """Keep an equation."""
        before = self.forms.get(eq.args[0]) if eq.args and isinstance(eq.args[0], Var) else None
        kept = eq.renamed(lambda x: self.value(x) if type(x) is Var else x)
        self.e.equations.append(kept)
        out = eq.result
        if eq.op in (aten.mm.default, aten.bmm.default) and out is not None:
            self.products[out] = kept
            if before is not None and self.uses[eq.args[0]] == 1:
                self.operands[out] = before

    def form(self, v: Var) -> _Form:
        """Return what a value is made of, if nobody else needs it as it is."""
        if v in self.forms and v not in self.same and self.uses[v] == 1:
            return self.forms[v]
        return _whole(self.value(v))

    # -- what is moved ------------------------------------------------------------------

    def is_move(self, eq: Equation) -> bool:
        """Whether an equation only shows or permutes its one argument."""
        if not (eq.op in RESHAPES or permutation(eq.op, eq.args) is not None):
            return False
        x, out = eq.args[0], eq.result
        if not isinstance(x, Var) or out is None or 0 in out.spec.shape:
            return False
        return x not in self.strided and out not in self.strided

    def is_permuted(self, v: Var) -> bool:
        """Whether all that is made of a value is permuted, before anything else happens to it."""
        readers = self.readers.get(v, [])
        return (
            v not in self.results
            and bool(readers)
            and all(
                self.is_move(eq)
                and (permutation(eq.op, eq.args) is not None or self.is_permuted(eq.outputs[0]))  # type: ignore[arg-type]
                for eq in readers
            )
        )

    def move(self, eq: Equation) -> bool:
        """Take note of a reshape or a permutation."""
        if not self.is_move(eq):
            return False
        x, out = eq.args[0], eq.outputs[0]
        assert out is not None
        order = permutation(eq.op, eq.args)
        for form in (self.form(x), None):
            if form is None:
                form = _whole(self.value(x))
            if order is None:
                new = form.cut(out.spec.shape)
            else:
                groups = form.groups(x.spec.shape)
                turned = [i for d in order for i in groups[d]]
                new = _Form(form.base, form.sizes, tuple(turned))
            if new is not None:
                self.forms[out] = new
                return True
        return False

    def turn_rows(self, eq: Equation) -> bool:
        """Multiply rows in the order in which they lie, and permute them afterwards."""
        if eq.op is not aten.mm.default or not isinstance(eq.args[0], Var):
            return False
        (a, factor), out = eq.args, eq.result
        if out is None or out in self.results or a not in self.forms or self.uses[a] != 1:
            return False
        form = self.form(a)
        rows, inner = form.groups(a.spec.shape)
        if (
            not self.is_permuted(out)
            or form.straight
            or inner != list(range(len(form.sizes)))[len(rows) :]
        ):
            return False
        flat = self.emitted(_Form(form.base, form.sizes, tuple(range(len(form.sizes)))), a.spec)
        factor = self.value(factor) if isinstance(factor, Var) else factor
        product = self.e.emit(eq.op, (flat, factor), out.spec)
        self.uses[product] = self.uses[out]
        count = out.spec.shape[1]
        sizes = (*(form.sizes[: len(rows)]), *([count] * (count != 1)))
        self.forms[out] = _Form(product, sizes, (*rows, *range(len(rows), len(sizes))))
        return True

    def stack(self, eq: Equation) -> bool:
        """Stack parts as they lie, if all are permuted in the same way, and permute the whole."""
        out = eq.result
        if eq.op is not aten.stack.default or out is None or out in self.strided:
            return False
        parts, dim = eq.args[0], eq.argument(1, 0)
        if not all(isinstance(v, Var) and v in self.forms and self.uses[v] == 1 for v in parts):
            return False
        if len(set(parts)) < len(parts) or len(parts) < 2:
            return False
        forms = [self.transposed(self.form(v)) for v in parts]
        self.forms.update(zip(parts, forms, strict=True))
        first, shape = forms[0].coarse(), parts[0].spec.shape
        alike = all(
            (f.coarse().sizes, f.coarse().order) == (first.sizes, first.order)
            and f.base.spec == first.base.spec
            for f in forms
        )
        if first.straight or not alike:
            return False
        cut = forms[0]
        groups = [[i + 1 for i in group] for group in cut.groups(shape)]
        groups.insert(dim % (len(shape) + 1), [0])
        spec = first.base.spec
        whole = spec.shaped(len(parts), *spec.shape)
        base = self.e.emit(aten.stack.default, ([f.base for f in forms], 0), whole)
        self.uses[base] = 1
        order = tuple([i for group in groups for i in group])
        self.forms[out] = _Form(base, (len(parts), *cut.sizes), order)
        return True

    # -- how it is done -----------------------------------------------------------------

    def value(self, v: Var) -> Var:
        """Return the variable that holds a value, emitting the steps to it if need be."""
        if v not in self.same:
            if v not in self.forms:
                return v
            self.same[v] = self.emitted(self.reordered(self.forms[v]), v.spec)
        return self.same[v]

    def emitted(self, form: _Form, spec: TensorSpec) -> Var:
        """Emit the steps from a base to a value."""
        if form.straight:
            return self.shaped(form.base, spec)
        form = form.shortest(spec.shape)
        pieces = self.shaped(form.base, spec.shaped(*form.sizes))
        moved = spec.shaped(*form.moved)
        if len(form.order) == 2:
            return self.shaped(self.e.emit(aten.t.default, (pieces,), moved), spec)
        args = pieces, list(form.order)
        return self.shaped(self.e.emit(aten.permute.default, args, moved), spec)

    def shaped(self, v: Var, spec: TensorSpec) -> Var:
        """Emit a value in another shape; what is copied to be shown in one is copied once."""
        if v.spec.shape == spec.shape:
            return v
        new = self.e.shaped(self.copied.get(v, v), *spec.shape)
        self.copied.setdefault(v, new)
        return new

    def transposed(self, form: _Form) -> _Form:
        """Replace (A B)ᵀ by Bᵀ Aᵀ where that leaves less to permute."""
        eq = self.products.get(form.base)
        if eq is None or eq.op is not aten.bmm.default or self.uses[form.base] != 1:
            return form
        count, rows, columns = form.base.spec.shape
        batch, first, second = form.of_base()
        if not first or not second or form.order[-1] != first[-1]:
            return form
        places = [form.order.index(i) for i in (*second, *first)]
        if places != sorted(places):
            return form
        a, b = (turned(self.e, x) for x in eq.args)
        new = self.e.emit(eq.op, (b, a), form.base.spec.shaped(count, columns, rows))
        self.uses[new] = 1
        self.products[new] = self.e.equations[-1]
        lie = [*batch, *second, *first]
        order = tuple([lie.index(i) for i in form.order])
        return _Form(new, tuple([form.sizes[i] for i in lie]), order)

    def reordered(self, form: _Form) -> _Form:
        """Have a product's rows come in the order in which they are wanted.

        Where they are permuted before the product anyway, to do so in another way is free.
        """
        eq, before = self.products.get(form.base), self.operands.get(form.base)
        if eq is None or before is None or eq.op is not aten.mm.default or form.straight:
            return form
        if self.uses[form.base] != 1 or before.straight:
            return form
        rows, columns = form.of_base()
        wanted = form.order[: len(rows)]
        if set(wanted) != set(rows) or list(form.order[len(rows) :]) != columns:
            return form
        shape = (*form.sizes[: len(rows)], eq.args[0].spec.shape[1])
        cut = before.cut(shape)
        if cut is None:
            return form
        groups = cut.groups(shape)
        order = tuple([i for k in (*wanted, -1) for i in groups[k]])
        operand = self.emitted(_Form(cut.base, cut.sizes, order), eq.args[0].spec)
        product = self.e.emit(eq.op, (operand, eq.args[1]), form.base.spec)
        return _Form(product, form.moved, tuple(range(len(form.sizes))))
