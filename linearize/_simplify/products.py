"""Matrix products in the form that costs least."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from .._programs.aten import SHOWN, SHOWN_IN_ORDER
from .._programs.numbers import Numbers
from .._programs.program import Emitter, Equation, Program
from .._programs.values import Constant, Var
from .._spaces.space import TensorSpec
from .._torch.names import aten
from .moves import turned


def _rewritten(
    program: Program, numbers: Numbers, rewrite: Callable[[Emitter, Equation, Var], bool]
) -> Program:
    """Return a program in which the results of some equations come about in another way.

    `rewrite` emits what defines the result of an equation, or returns False.
    """
    e = Emitter(numbers=numbers)
    for eq in program.equations:
        e.source = eq.source
        if eq.result is None or not rewrite(e, eq, eq.result):
            e.equations.append(eq)
    return program.with_equations(e.equations).live()


def share_matrices(program: Program, numbers: Numbers) -> Program:
    """Multiply a batch by one matrix, instead of by as many copies of it."""

    def share(e: Emitter, eq: Equation, out: Var) -> bool:
        v, r = eq.args if eq.op is aten.bmm.default else (None, None)
        if not (isinstance(v, Var) and isinstance(r, Constant) and numbers[r].stride(0) == 0):
            return False
        count, rows, inner = v.spec.shape
        factors = e.shaped(v, count * rows, inner), numbers.viewed(aten.select.int, r, 0, 0)
        spec = out.spec.shaped(count * rows, out.spec.shape[-1])
        product = e.emit(aten.mm.default, factors, spec)
        e.add(aten.reshape.default, (product, list(out.spec.shape)), (out,))
        return True

    return _rewritten(program, numbers, share)


def _definitions(program: Program, *ops: Any) -> dict[Var, Equation]:
    """Return the equations of some operations by what they define."""
    return {
        eq.outputs[0]: eq for eq in program.equations if eq.op in ops and eq.outputs[0] is not None
    }


def transpose_products(program: Program, numbers: Numbers) -> Program:
    """Replace (A B)ᵀ by Bᵀ Aᵀ: a transposed factor costs nothing, a transposed sum does."""
    uses, products = program.uses(), _definitions(program, aten.mm.default)

    def turn(e: Emitter, eq: Equation, out: Var) -> bool:
        product = products.get(eq.args[0]) if eq.op is aten.t.default else None
        if product is None or uses[eq.args[0]] != 1:
            return False
        a, b = product.args
        e.add(aten.mm.default, (turned(e, b), turned(e, a)), (out,))
        products[out] = e.equations[-1]
        return True

    return _rewritten(program, numbers, turn)


_FUSED = {aten.mm.default: aten.addmm.default, aten.bmm.default: aten.baddbmm.default}


def add_products(program: Program, numbers: Numbers) -> Program:
    """Add products to sums in one operation, where they are made."""
    uses = program.uses()
    made = _definitions(program, *_FUSED, *SHOWN_IN_ORDER, aten.expand.default, aten.mul.Tensor)

    def add(e: Emitter, eq: Equation, out: Var) -> bool:
        return eq.op is aten.add.Tensor and _fused(e, eq, out, made, uses)

    return _rewritten(program, numbers, add)


def _fused(
    e: Emitter, eq: Equation, out: Var, made: dict[Var, Equation], uses: Counter[Var]
) -> bool:
    """Emit a sum as one operation that multiplies and adds, if one of its terms is a product."""
    (a, b), alpha = eq.args, eq.kwargs.get("alpha", 1)
    if not out.spec.dtype.is_floating_point:
        return False
    if not all(isinstance(x, Var) and x.spec == out.spec for x in (a, b)):
        return False
    for other, x, factors in ((a, b, {"alpha": alpha}), (b, a, {"beta": alpha})):
        product, shown = made.get(x), None
        if product is not None and product.op is aten.mul.Tensor and other is not x:
            if _add_entries(e, eq, out, other, product, made, uses):
                return True
            continue
        if product is not None and product.op in SHOWN_IN_ORDER and uses[x] == 1:
            shown, product = product, made.get(product.args[0])
        if product is None or product.op not in _FUSED or other is x:
            continue
        (v,) = product.outputs
        if v is None or uses[v] != 1 or product.inputs()[0].spec.dtype != out.spec.dtype:
            continue
        kwargs = {k: n for k, n in factors.items() if n != 1}
        term = _row(other, made, v.spec)
        if term is other:
            term = e.shaped(other, *v.spec.shape)
        if shown is None:
            e.add(_FUSED[product.op], (term, *product.args), (out,), **kwargs)
        else:
            total = e.emit(_FUSED[product.op], (term, *product.args), v.spec, **kwargs)
            e.add(aten.reshape.default, (total, list(out.spec.shape)), (out,))
        return True
    terms = [_row(x, made, out.spec) for x in (a, b)]
    if terms == [a, b] or (terms[0] is not a and terms[1] is not b):
        return False
    e.add(eq.op, tuple(terms), (out,), **eq.kwargs)
    return True


def _add_entries(
    e: Emitter,
    eq: Equation,
    out: Var,
    other: Var,
    product: Equation,
    made: dict[Var, Equation],
    uses: Counter[Var],
) -> bool:
    """Emit a sum in which one term is multiplied entry by entry."""
    (x,), (v,) = product.inputs() or (None,), product.outputs
    if v is None or x is None or product.kwargs or uses[v] != 1:
        return False
    if x.spec.dtype != out.spec.dtype or not product.constants():
        return False
    number = eq.kwargs.get("alpha", 1)
    if number != 1 and eq.args[0] is v:
        return False
    (factor,) = product.constants()
    if (factor.spec.dtype, factor.spec.device) != (out.spec.dtype, out.spec.device):
        return False
    kwargs = {} if number == 1 else {"value": number}
    e.add(aten.addcmul.default, (_row(other, made, out.spec), x, factor), (out,), **kwargs)
    return True


def _row(v: Var, made: dict[Var, Equation], like: TensorSpec) -> Var:
    """Return the one row, as those of `like`, that all rows of a value repeat, else the value."""
    x: Var = v
    row = like.shape[-1:]
    while row and x in made and made[x].op in (aten.expand.default, *SHOWN_IN_ORDER):
        x = made[x].args[0]
        if x.spec.shape == row and v.spec.shape[-1:] == row:
            return x
        if x.spec.shape[-1:] != row:
            break
    return v


def scale_products(program: Program, _: Numbers | None = None) -> Program:
    """Multiply what several products have in common by a number, instead of each product."""
    uses = program.uses()
    made = {v: eq for eq in program.equations for v in eq.outputs if v is not None}

    def before(v: Var) -> Var:
        """Return what a value is that was only shown in other shapes."""
        while uses[v] == 1 and v in made and made[v].op in SHOWN:
            v = made[v].args[0]
        return v

    #: By factor and number, the equations that multiply products of that factor by it.
    found: dict[tuple[Var, float], list[Equation]] = {}
    for eq in program.equations:
        if eq.op is aten.mul.Scalar and not eq.kwargs and isinstance(eq.args[1], float):
            product = made.get(v := before(eq.args[0]))
            factors = product.inputs() if product is not None and product.op in _FUSED else []
            if uses[v] == 1 and len(factors) == 1:
                found.setdefault((factors[0], eq.args[1]), []).append(eq)
    same: dict[Var, Var] = {}
    scaled: dict[Var, float] = {}
    for (factor, number), equations in found.items():
        if 1 < len(equations) == uses[factor] and factor in made:
            same |= {eq.outputs[0]: eq.args[0] for eq in equations if eq.outputs[0] is not None}
            v = made[factor].args[0] if made[factor].op in SHOWN else factor
            scaled[v if uses[v] == 1 and v in made else factor] = number

    def rename(x: Any) -> Any:
        while isinstance(x, Var) and x in same:
            x = same[x]
        return x

    if not same:
        return program
    e = Emitter()
    for eq in program.equations:
        if eq.outputs[0] not in same:
            e.equations.append(eq.renamed(rename))
            for whole in eq.outputs:
                if whole is not None and whole in scaled:
                    args = whole, scaled[whole]
                    same[whole] = e.emit(aten.mul.Scalar, args, whole.spec)
    return program.with_equations(e.equations, [rename(v) for v in program.outputs])


def apply_diagonals(program: Program, numbers: Numbers) -> Program:
    """Multiply entry by entry with what is only the diagonal of a factor or of a product."""
    uses = program.uses()
    diagonals = {
        v: eq
        for v, eq in _definitions(program, aten.diagonal_backward.default).items()
        if len(v.spec.shape) == 2 and v.spec.shape[0] == v.spec.shape[1] and _is_main(eq.args[2:])
    }
    products = _definitions(program, aten.mm.default)

    def apply(e: Emitter, eq: Equation, out: Var) -> bool:
        if eq.op is aten.mm.default:  # diag(v) R
            diagonal, r = diagonals.get(eq.args[0]), eq.args[1]
            if diagonal is None or not isinstance(r, Constant):
                return False
            v = diagonal.args[0]
            e.add(aten.mul.Tensor, (e.shaped(v, *v.spec.shape, 1), r), (out,))
            return True
        if eq.op is not aten.diagonal.default or not _is_main(eq.args[1:]):
            return False
        product = products.get(eq.args[0])
        if product is None or uses[eq.args[0]] != 1 or not _square(product):
            return False
        a, r = product.args
        if not (isinstance(a, Var) and isinstance(r, Constant)):
            return False
        rows = e.emit(aten.mul.Tensor, (a, turned(e, r)), a.spec)
        e.add(aten.sum.dim_IntList, (rows, [1]), (out,))
        return True

    return _rewritten(program, numbers, apply)


def _is_main(args: tuple[Any, ...]) -> bool:
    """Whether `diagonal` with these arguments is the main diagonal of a matrix."""
    offset, first, second = args + (0, 0, 1)[len(args) :]
    return bool(offset == 0) and (first % 2, second % 2) == (0, 1)


def _square(product: Equation) -> bool:
    shape = product.outputs[0].spec.shape  # type: ignore[union-attr]
    return shape[0] == shape[1]
