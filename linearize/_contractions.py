"""Floor 3: matrix products in the form that costs least."""

from __future__ import annotations

from ._program import Emitter, Equation, Program, Residual, Var, evaluated
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
        matrix = evaluated(aten.select.int, r, 0, 0, source=r.source)
        matrix.version = r.version
        flat = TensorSpec((count * rows, inner), out.spec.dtype, out.spec.device)
        tall = e.emit(aten.reshape.default, (v, list(flat.shape)), flat)
        product = TensorSpec((count * rows, columns), out.spec.dtype, out.spec.device)
        done = e.emit(aten.mm.default, (tall, matrix), product)
        args = (done, list(out.spec.shape))
        e.equations.append(Equation(aten.reshape.default, args, {}, (out,), eq.source))
    return program.with_equations(e.equations)
