"""Floor 3: matrix products in the form that costs least."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ._program import Emitter, Equation, Program, Residual, Var, viewed
from ._space import TensorSpec
from ._torch import aten


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
        matrix = viewed(aten.select.int, r, 0, 0)
        flat = TensorSpec((count * rows, inner), out.spec.dtype, out.spec.device)
        tall = e.emit(aten.reshape.default, (v, list(flat.shape)), flat)
        product = TensorSpec((count * rows, columns), out.spec.dtype, out.spec.device)
        done = e.emit(aten.mm.default, (tall, matrix), product)
        args = (done, list(out.spec.shape))
        e.equations.append(Equation(aten.reshape.default, args, {}, (out,), eq.source))
    return program.with_equations(e.equations)


def _definitions(program: Program, *ops: Any) -> dict[Var, Equation]:
    """Return the equations of some operations by what they define."""
    return {
        eq.outputs[0]: eq for eq in program.equations if eq.op in ops and eq.outputs[0] is not None
    }


def transpose_products(program: Program) -> Program:
    """Replace (A B)ᵀ by Bᵀ Aᵀ: a transposed factor costs nothing, a transposed sum does."""
    uses, products = program.uses(), _definitions(program, aten.mm.default)
    e = Emitter()

    def turned(x: Var | Residual) -> Var | Residual:
        if isinstance(x, Residual):
            return viewed(aten.t.default, x)
        rows, columns = x.spec.shape
        spec = TensorSpec((columns, rows), x.spec.dtype, x.spec.device)
        return e.emit(aten.t.default, (x,), spec)

    for eq in program.equations:
        product = products.get(eq.args[0]) if eq.op is aten.t.default else None
        out = eq.outputs[0]
        if product is None or out is None or uses[eq.args[0]] != 1:
            e.equations.append(eq)
            continue
        e.source = eq.source
        factors = turned(product.args[1]), turned(product.args[0])
        new = Equation(aten.mm.default, factors, {}, (out,), eq.source)
        e.equations.append(new)
        products[out] = new
    return program.with_equations(e.equations).live()


_FUSED = {aten.mm.default: aten.addmm.default, aten.bmm.default: aten.baddbmm.default}


def add_products(program: Program) -> Program:
    """Add matrix products to sums in one operation, where they are made."""
    uses = program.uses()
    made = _definitions(program, *_FUSED)
    equations = []
    for eq in program.equations:
        fused = _fused(eq, made, uses) if eq.op is aten.add.Tensor else None
        equations.append(fused or eq)
    return program.with_equations(equations).live()


def _fused(eq: Equation, made: dict[Var, Equation], uses: Counter[Var]) -> Equation | None:
    a, b = eq.args
    out, alpha = eq.outputs[0], eq.kwargs.get("alpha", 1)
    if out is None or not out.spec.dtype.is_floating_point:
        return None
    if not all(isinstance(x, Var) and x.spec == out.spec for x in (a, b)):
        return None
    for other, x, factors in ((a, b, {"alpha": alpha}), (b, a, {"beta": alpha})):
        product = made.get(x)
        if product is None or uses[x] != 1 or other is x:
            continue
        if product.inputs()[0].spec.dtype != out.spec.dtype:
            continue
        kwargs = {k: n for k, n in factors.items() if n != 1}
        return Equation(_FUSED[product.op], (other, *product.args), kwargs, (out,), eq.source)
    return None


def apply_diagonals(program: Program) -> Program:
    """Multiply entry by entry with what is only the diagonal of a factor or of a product."""
    uses = program.uses()
    diagonals = {
        v: eq
        for v, eq in _definitions(program, aten.diagonal_backward.default).items()
        if len(v.spec.shape) == 2 and v.spec.shape[0] == v.spec.shape[1] and _is_main(eq.args[2:])
    }
    products = _definitions(program, aten.mm.default)
    e = Emitter()
    for eq in program.equations:
        e.source = eq.source
        out = eq.outputs[0]
        if eq.op is aten.mm.default and isinstance(eq.args[1], Residual):
            diagonal = diagonals.get(eq.args[0])
            if diagonal is not None and out is not None:  # diag(v) R
                v = diagonal.args[0]
                spec = TensorSpec((*v.spec.shape, 1), v.spec.dtype, v.spec.device)
                column = e.emit(aten.unsqueeze.default, (v, 1), spec)
                factors = (column, eq.args[1])
                e.equations.append(Equation(aten.mul.Tensor, factors, {}, (out,), eq.source))
                continue
        if eq.op is aten.diagonal.default and _is_main(eq.args[1:]):
            product = products.get(eq.args[0])
            if product is not None and out is not None and uses[eq.args[0]] == 1:
                a, r = product.args
                if isinstance(a, Var) and isinstance(r, Residual) and _square(product):
                    rows = e.emit(aten.mul.Tensor, (a, viewed(aten.t.default, r)), a.spec)
                    args = (rows, [1])
                    e.equations.append(Equation(aten.sum.dim_IntList, args, {}, (out,), eq.source))
                    continue
        e.equations.append(eq)
    return program.with_equations(e.equations).live()


def _is_main(args: tuple[Any, ...]) -> bool:
    """Whether `diagonal` with these arguments is the main diagonal of a matrix."""
    offset, first, second = args + (0, 0, 1)[len(args) :]
    return bool(offset == 0) and (first % 2, second % 2) == (0, 1)


def _square(product: Equation) -> bool:
    shape = product.outputs[0].spec.shape  # type: ignore[union-attr]
    return shape[0] == shape[1]
